"""The whole engine through its Triton kernels, on a machine without a GPU: Triton's interpreter runs them one by one.

On a GPU the same tests run there; what only a GPU has (graphs, streams) is in test_gpu.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pi0_engine.config import ModelType, Pi0Config, SolverName
from pi0_engine.engine.plan import ShapePlan
from pi0_engine.engine.runtime import Engine
from pi0_engine.engine.trace import record_launches
from pi0_engine.kernels.gpu.configs import LaunchConfig, LaunchConfigs, Rule
from pi0_engine.kernels.gpu.target import TARGETS
from pi0_engine.rtc.guidance import FixedPrefix, Guide
from tests.support import golden
from tests.support.models import (
    MODEL_TYPES,
    SECOND_ORDER,
    engine,
    fresh_engine,
    random_inputs,
    random_noise,
    reference,
    reference_actions,
    rel_l2,
    small_config,
)
from tests.support.triton_ops import DEVICE, INTERPRETED

#: Rows behind the last have no norm: what is computed of them overflows, and is not stored.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

#: Large tiles: the interpreter's time goes into the number of programs. Every op once, with parts where it has any.
CONFIGS = {
    "linear": LaunchConfig(block_m=64, block_n=64, block_k=32),
    "patch_embed": LaunchConfig(block_m=128, block_n=128, block_k=256),
    "layernorm_linear": LaunchConfig(block_m=128, block_n=128, block_k=64, tma=True),
    "linear_residual": LaunchConfig(block_m=128, block_n=64, block_k=32, splits=2, tma=True),
    "rmsnorm_qkv_rope": LaunchConfig(block_m=128, block_n=64, block_k=64),
    "rmsnorm_geglu": LaunchConfig(block_m=128, block_n=64, block_k=64),
    "rmsnorm_linear_euler": LaunchConfig(block_m=64, block_n=32, block_k=32, splits=2),
    "mlp_up": LaunchConfig(block_m=64, block_n=64, block_k=64),
    "mlp_down": LaunchConfig(block_m=64, block_n=64, block_k=64, splits=2),
    "vision_attention": LaunchConfig(block_m=128, block_n=128, block_k=0),
    "prefix_attention": LaunchConfig(block_m=128, block_n=128, block_k=0, splits=2),
    "suffix_attention": LaunchConfig(block_m=128, block_n=128, block_k=0, splits=3),
    "embed_prompt": LaunchConfig(block_m=32, block_n=128, block_k=0),
}


@pytest.fixture
def launch_configs(tmp_path: Path) -> str | None:
    """A file of them; on a GPU, whose memory tiles must fit into, those that are shipped."""
    if not INTERPRETED:
        return None
    path = tmp_path / "launch_configs.json"
    LaunchConfigs([Rule(op, config, "a test") for op, config in CONFIGS.items()]).save(path)
    return str(path)


def triton_engine(
    config: Pi0Config,
    launch_configs: str | None,
    dtype: str = "float32",
    prompt_bucket: int | None = None,
    solver: SolverName = "euler",
) -> Engine:
    running = fresh_engine(
        config,
        dtype,
        device=DEVICE.type,
        backend="triton",
        launch_configs=launch_configs,
        prompt_bucket=prompt_bucket,
        solver=solver,
    )
    others = {choice.op for choice in running.ops.choices if choice.implementation != "triton"}
    assert others == {"frames_to_patches"}
    return running


@pytest.mark.parametrize("case", golden.WHOLE)
def test_openpis_actions(case: str, launch_configs: str | None) -> None:
    """As exact as the torch meanings are (tests/parity/test_openpi.py)."""
    recorded = golden.load(case)
    running = triton_engine(recorded.config, launch_configs)
    actions = running.infer(recorded.inputs, recorded.noise[:, None], num_steps=recorded.num_steps).actions[:, 0]
    error = rel_l2(actions, recorded.actions)
    print(f"{case}: relative L2 {error:.2e}")
    assert error <= 3e-6


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_batch_with_absent_cameras_and_two_samples(model_type: ModelType, launch_configs: str | None) -> None:
    """Observations of different lengths share buffers; each has two chunks on one prefix."""
    config = small_config(model_type)
    inputs = random_inputs(config, [[True, False, True], [False, True, False]], [12, 3])
    noise = random_noise(config, 2, samples=2)
    expected = engine(config, backend="torch").infer(inputs, noise).actions
    running = triton_engine(config, launch_configs)
    actions = running.infer(inputs, noise).actions
    error = rel_l2(actions, expected)
    print(f"{model_type}: relative L2 {error:.2e}")
    assert error <= 3e-6
    # Nothing is read that this call does not write: NaN in every byte of every buffer before the next.
    for session in running._sessions.values():
        session.space.arena.fill_(0xFF)
    assert torch.equal(running.infer(inputs, noise).actions, actions)
    assert not running.scratch.counters.any() and not running.scratch.barrier.any()


@pytest.mark.parametrize(("views", "prompt"), [(1, 1), (2, 5), (3, 7), (4, 11)])
def test_any_number_of_views_and_prompts_in_a_bucket(views: int, prompt: int, launch_configs: str | None) -> None:
    """Rows behind the prompt's last token are in the plan, and nobody sees them."""
    config = small_config("pi0")
    inputs, noise = random_inputs(config, [[True] * views], [prompt]), random_noise(config)
    expected = engine(config, backend="torch").infer(inputs, noise).actions
    running = triton_engine(config, launch_configs, prompt_bucket=8)
    error = rel_l2(running.infer(inputs, noise).actions, expected)
    print(f"{views} views, prompt {prompt}: relative L2 {error:.2e}")
    assert error <= 3e-6


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_halves_are_the_whole(model_type: ModelType, launch_configs: str | None) -> None:
    config = small_config(model_type)
    inputs, noise = random_inputs(config, [[True, False, False]], [3]), random_noise(config)
    running = triton_engine(config, launch_configs)
    expected = running.infer(inputs, noise).actions
    running.observe(inputs)
    assert torch.equal(running.sample(noise).actions, expected)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_chunk_that_continues_another(model_type: ModelType, launch_configs: str | None) -> None:
    """Guided by the Euler step's kernel; without weights the step is the plain one, bit for bit."""
    config = small_config(model_type)
    inputs, noise = random_inputs(config, [[True, False, False]], [3]), random_noise(config, samples=2)
    weights = np.array([[1.0, 1.0, 0.6, 0.2, 0.0]], np.float32)
    guide = Guide((random_noise(config)[:, 0] - 1).numpy(), weights, 5.0)
    expected = engine(config, backend="torch").infer(inputs, noise, continuation=guide).actions
    running = triton_engine(config, launch_configs)
    error = rel_l2(running.infer(inputs, noise, continuation=guide).actions, expected)
    print(f"{model_type}: relative L2 {error:.2e}")
    assert error <= 3e-6
    plain = running.infer(inputs, noise).actions
    nothing = Guide(guide.previous, np.zeros_like(weights), 5.0)
    assert torch.equal(running.infer(inputs, noise, continuation=nothing).actions, plain)
    assert len(running._sessions) == 1


def test_a_chunk_whose_first_actions_are_given(launch_configs: str | None) -> None:
    """Rows of one tile are at two flow times; the given ones come back as they are."""
    config = small_config("pi05")
    inputs, noise = random_inputs(config, [[True, False, False], [False, True, False]], [3, 1]), random_noise(config, 2)
    prefix = FixedPrefix((random_noise(config, 2)[:, 0] - 1).numpy(), (2, 4))
    expected = engine(config, backend="torch").infer(inputs, noise, continuation=prefix).actions
    running = triton_engine(config, launch_configs)
    actions = running.infer(inputs, noise, continuation=prefix).actions
    error = rel_l2(actions, expected)
    print(f"relative L2 {error:.2e}")
    assert error <= 3e-6
    for b, rows in enumerate(prefix.rows):
        assert np.array_equal(actions[b, 0, :rows], prefix.previous[b, :rows])


@pytest.mark.parametrize("solver", SECOND_ORDER)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_solvers_of_second_order(model_type: ModelType, solver: SolverName, launch_configs: str | None) -> None:
    """Two samples in three steps; the halves give the same, and π0.5 with a given prefix what the meanings give."""
    config = small_config(model_type)
    inputs, noise = random_inputs(config, [[True, False, False]], [3]), random_noise(config, samples=2)
    running = triton_engine(config, launch_configs, solver=solver)
    actions = running.infer(inputs, noise).actions
    error = rel_l2(actions, reference_actions(reference(config), inputs, noise, None, solver))
    print(f"{model_type} {solver}: relative L2 {error:.2e}")
    assert error <= 2e-5
    running.observe(inputs, samples=2)
    assert torch.equal(running.sample(noise).actions, actions)
    if config.is_pi05:
        prefix = FixedPrefix((random_noise(config)[:, 0] - 1).numpy(), (2,))
        expected = engine(config, backend="torch", solver=solver).infer(inputs, noise, continuation=prefix).actions
        actions = running.infer(inputs, noise, continuation=prefix).actions
        assert rel_l2(actions, expected) <= 3e-6
        assert np.array_equal(actions[0, :, :2], np.stack([prefix.previous[0, :2]] * 2))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_float16(model_type: ModelType, launch_configs: str | None) -> None:
    """No worse than the torch meanings are in float16, which round as often; a quarter is left to chance."""
    config = small_config(model_type)
    inputs, noise = random_inputs(config, [[True, False, True]], [5]), random_noise(config)
    expected = engine(config, backend="torch").infer(inputs, noise).actions
    error = rel_l2(triton_engine(config, launch_configs, "float16").infer(inputs, noise).actions, expected)
    torchs = rel_l2(engine(config, "float16", backend="torch").infer(inputs, noise).actions, expected)
    print(f"{model_type}: relative L2 {error:.2e}, of the torch meanings {torchs:.2e}")
    assert error <= 1.25 * torchs <= 5e-3


@pytest.mark.parametrize("arch", sorted(TARGETS))
@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_fewer_than_1000_launches(model_type: ModelType, views: int, arch: int) -> None:
    """Every launch costs a graph node its 1 to 2 us. Five per layer of vision and prefix, four of the expert.

    Beside the layers: patches and projector; the prompt; the last layer's keys and values; the state token (π0); the
    actions' way in and out of each step.
    """
    config = Pi0Config(model_type)
    plan = ShapePlan.of(config, views=[views], prompt_lengths=[20], prompt_bucket=16)
    launches = record_launches(config, plan, torch.bfloat16, TARGETS[arch])
    vision, prefix = 5 * config.vision.depth + 2, 5 * (config.llm.depth - 1) + 1 + 1
    state, way_in = (0, 1) if config.is_pi05 else (1, 2)
    flow = state + config.num_steps * (way_in + 4 * config.expert.depth + 1)
    assert len(launches) == vision + prefix + flow < 1000


@pytest.mark.parametrize("arch", sorted(TARGETS))
def test_float32_gets_tiles_that_fit_into_registers(arch: int) -> None:
    """Tensor cores' tiles of 128 x 128 would spill, or need more shared memory than there is: parity needs neither."""
    config = Pi0Config("pi0")
    plan = ShapePlan.of(config, views=[3], prompt_lengths=[20], prompt_bucket=16)
    for launch in record_launches(config, plan, torch.float32, TARGETS[arch]):
        sizes = [value for name, value in launch.arguments.items() if name in ("BLOCK_M", "BLOCK_N", "UP_M", "UP_N")]
        assert all(size <= 64 for size in sizes) or launch.op == "embed_prompt"
        assert not any(launch.arguments.get(name) for name in ("TMA", "UP_TMA", "DOWN_TMA"))
        assert launch.num_stages <= 3
