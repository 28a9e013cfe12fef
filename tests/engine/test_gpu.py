"""The engine on a GPU: CUDA graphs, memory, parity. What does not need one is asked of the engine on a CPU as well."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pi0_engine.checkpoints.random_weights import RandomCheckpoint
from pi0_engine.config import EngineConfig, ModelType, Pi0Config, SolverName
from pi0_engine.engine.runtime import Engine
from pi0_engine.engine.trace import record_launches
from pi0_engine.kernels.gpu.target import target_of
from pi0_engine.rtc.guidance import FixedPrefix, Guide
from tests.support import golden
from tests.support.models import (
    MODEL_TYPES,
    SECOND_ORDER,
    fresh_engine,
    random_inputs,
    random_noise,
    reference,
    reference_actions,
    rel_l2,
    small_config,
)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, torch sees none")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
PI0 = small_config("pi0")
ONE, ALL = (False, True, False), (True, True, True)


@pytest.fixture(autouse=True)
def memory_is_given_back() -> Iterator[None]:
    """Each test has the GPU to itself."""
    yield
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def graphs(running: Engine) -> list[tuple[str, int]]:
    """What was captured, over all plans."""
    return [key for session in running._sessions.values() for key in session.graphs]


# --- parity ---


@pytest.mark.parametrize("case", golden.TINY)
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
def test_float32_is_openpis(device: str, case: str) -> None:
    """TF32 is off: kernels multiply float32 as it is, and so does torch unless it is told otherwise."""
    assert not torch.backends.cuda.matmul.allow_tf32
    assert golden.error(fresh_engine(golden.config_of(case), device=device), golden.load(case)) <= 2e-5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", golden.WHOLE)
def test_bfloat16_is_no_worse_than_openpis(case: str, device: str) -> None:
    assert golden.error(
        fresh_engine(golden.config_of(case), "bfloat16", device=device), golden.load(case)
    ) <= golden.openpis_error(case)


@needs_gpu
@pytest.mark.full_size
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", golden.FULL_SIZE)
def test_full_size_is_openpis(case: str, dtype: str) -> None:
    checkpoint = RandomCheckpoint(golden.config_of(case), dtype=torch.float32)
    running = Engine(checkpoint, EngineConfig(device="cuda", dtype=dtype))  # type: ignore[arg-type]
    found = golden.error(running, golden.load(case))
    print(f"{case}: engine {dtype} on the GPU {found:.2e}")
    assert found <= (1e-4 if dtype == "float32" else golden.openpis_error(case))


# --- one observation, several calls ---


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_halves_are_the_whole_as_often_as_wanted(model_type: ModelType, device: str) -> None:
    config = small_config(model_type)
    running = fresh_engine(config, device=device)
    inputs, noise = random_inputs(config, [ONE, ALL], [3, 12]), random_noise(config, 2, samples=2)
    expected = [running.infer(inputs, chunk).actions for chunk in (noise, -noise)]
    running.observe(inputs, samples=2)
    assert torch.equal(running.sample(noise).actions, expected[0])
    assert torch.equal(running.sample(-noise).actions, expected[1])
    assert torch.equal(running.sample(noise).actions, expected[0])


@pytest.mark.parametrize("device", DEVICES)
def test_results_are_copies(device: str) -> None:
    running, inputs, noise = fresh_engine(PI0, device=device), random_inputs(PI0), random_noise(PI0)
    first = running.infer(inputs, noise).actions
    kept = first.clone()
    assert not torch.equal(running.infer(inputs, -noise).actions, kept)
    assert torch.equal(first, kept) and first.device.type == "cpu" and not first.is_inference()
    first.zero_()
    assert torch.equal(running.infer(inputs, noise).actions, kept)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_samples_are_runs_of_their_own(model_type: ModelType, device: str) -> None:
    config = small_config(model_type)
    running, inputs, noise = fresh_engine(config, device=device), random_inputs(config), random_noise(config, 1, 3)
    together = running.infer(inputs, noise).actions
    alone = [running.infer(inputs, noise[:, i : i + 1]).actions for i in range(3)]
    assert rel_l2(together, torch.cat(alone, dim=1)) <= 3e-6


@pytest.mark.parametrize("device", DEVICES)
def test_two_engines_take_turns(device: str) -> None:
    configs = [small_config(model_type) for model_type in MODEL_TYPES]
    calls = [(random_inputs(config), random_noise(config)) for config in configs]
    alone = [
        fresh_engine(config, device=device).infer(*call).actions for config, call in zip(configs, calls, strict=True)
    ]
    both = [fresh_engine(config, device=device) for config in configs]
    for _ in range(3):
        for running, call, expected in zip(both, calls, alone, strict=True):
            assert torch.equal(running.infer(*call).actions, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_new_instruction_captures_nothing(model_type: ModelType, device: str) -> None:
    """Prompts of a bucket share buffers and graph, and the right rows of them count; another bucket adds one graph."""
    config = small_config(model_type)
    running, noise = fresh_engine(config, device=device, prompt_bucket=8), random_noise(config)

    def check(length: int) -> None:
        inputs = random_inputs(config, [ALL], [length], seed=length)
        actions = running.infer(inputs, noise).actions
        assert rel_l2(actions, reference_actions(reference(config), inputs, noise)) <= 2e-5

    per_plan = int(running.use_graph)
    check(8)
    (session,) = running._sessions.values()
    captured = dict(session.graphs)
    assert len(captured) == per_plan
    for length in (1, 5, 8, 3):
        check(length)
    assert list(running._sessions.values()) == [session] and session.graphs == captured
    check(9)
    assert len(running._sessions) == 2 and len(graphs(running)) == 2 * per_plan
    check(2)
    assert len(running._sessions) == 2 and session.graphs == captured


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_continuing_a_chunk_captures_nothing(model_type: ModelType, device: str) -> None:
    """What a chunk is pulled towards is contents of buffers; without a pull the actions are the plain ones."""
    config = small_config(model_type)
    running, inputs, noise = fresh_engine(config, device=device), random_inputs(config), random_noise(config)
    plain = running.infer(inputs, noise).actions
    captured = graphs(running)
    for max_weight in (10.0, 2.0):
        guide = Guide(
            (random_noise(config)[:, 0] - 1).numpy(), np.array([[1.0, 0.7, 0.4, 0.0, 0.0]], np.float32), max_weight
        )
        expected = fresh_engine(config, device="cpu", backend="torch").infer(inputs, noise, continuation=guide).actions
        assert rel_l2(running.infer(inputs, noise, continuation=guide).actions, expected) <= 3e-6
        assert torch.equal(running.infer(inputs, noise).actions, plain)
    assert graphs(running) == captured and len(running._sessions) == 1


@pytest.mark.parametrize("device", DEVICES)
def test_a_longer_prefix_captures_nothing(device: str) -> None:
    """A given prefix has a plan of its own, whose graph serves prefixes of any length."""
    config = small_config("pi05")
    running, inputs, noise = fresh_engine(config, device=device), random_inputs(config), random_noise(config)
    for rows in (0, 3, 5):
        prefix = FixedPrefix((random_noise(config)[:, 0] - 1).numpy(), (rows,))
        expected = fresh_engine(config, device="cpu", backend="torch").infer(inputs, noise, continuation=prefix).actions
        assert rel_l2(running.infer(inputs, noise, continuation=prefix).actions, expected) <= 3e-6
    assert len(running._sessions) == 1 and len(graphs(running)) == int(running.use_graph)


@pytest.mark.parametrize("device", DEVICES)
def test_step_counts_share_buffers_but_no_graph(device: str) -> None:
    running, inputs, noise = fresh_engine(PI0, device=device), random_inputs(PI0), random_noise(PI0)
    for num_steps in (3, 1, 7, 2, 5, 4, 3, 1):  # more than the terms that are kept
        expected = reference_actions(reference(PI0), inputs, noise, num_steps)
        assert rel_l2(running.infer(inputs, noise, num_steps=num_steps).actions, expected) <= 2e-5
    assert len(running._sessions) == 1
    assert len(graphs(running)) == (6 if running.use_graph else 0)


@pytest.mark.parametrize("device", DEVICES)
def test_the_least_recently_used_plan_is_freed_with_its_graphs(device: str) -> None:
    running = fresh_engine(PI0, device=device, max_plans=2, prompt_bucket=4)
    for length in (4, 8, 4, 12):
        running.infer(random_inputs(PI0, [ALL], [length]), random_noise(PI0))
    assert [plan.prefix - 3 * 4 for plan in running._sessions] == [4, 12]
    assert len(graphs(running)) == (2 if running.use_graph else 0)
    inputs = random_inputs(PI0, [ALL], [7])
    expected = reference_actions(reference(PI0), inputs, random_noise(PI0))
    assert rel_l2(running.infer(inputs, random_noise(PI0)).actions, expected) <= 2e-5


@pytest.mark.parametrize("device", DEVICES)
def test_many_calls_with_changing_inputs(device: str) -> None:
    """A thousand on a GPU: each call gives what the same inputs gave before, and takes no more memory."""
    running, eager = fresh_engine(PI0, device=device), fresh_engine(PI0, device=device, use_cuda_graph=False)
    calls = [(random_inputs(PI0, [ALL], [1 + seed], seed=seed), random_noise(PI0) * (1 + seed)) for seed in range(7)]
    expected = [eager.infer(*call).actions for call in calls]
    for call in calls:
        running.infer(*call)
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    for number in range(1000 if device == "cuda" else 20):
        which = number % len(calls)
        assert torch.equal(running.infer(*calls[which]).actions, expected[which]), f"call {number}"
    assert (torch.cuda.memory_allocated() if device == "cuda" else 0) == before


@needs_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_replay_is_the_eager_run(model_type: ModelType, dtype: str) -> None:
    """Bit for bit: the same kernels, in the same order, on the same memory."""
    config = small_config(model_type)
    inputs, noise = random_inputs(config, [ALL, ONE], [12, 1]), random_noise(config, 2, samples=2)
    eager = fresh_engine(config, dtype, device="cuda", use_cuda_graph=False).infer(inputs, noise).actions
    running = fresh_engine(config, dtype, device="cuda")
    for _ in range(3):
        assert torch.equal(running.infer(inputs, noise).actions, eager)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("solver", SECOND_ORDER)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_solvers_of_second_order_run_in_a_graph(model_type: ModelType, solver: SolverName, device: str) -> None:
    """Against the reference, again from the same noise, and in halves."""
    config = small_config(model_type)
    inputs, noise = random_inputs(config, [ALL, ONE], [12, 1]), random_noise(config, 2, samples=2)
    running = fresh_engine(config, device=device, solver=solver)
    first = running.infer(inputs, noise).actions
    assert rel_l2(first, reference_actions(reference(config), inputs, noise, None, solver)) <= 2e-5
    running.infer(inputs, -noise)
    assert torch.equal(running.infer(inputs, noise).actions, first)
    running.observe(inputs, samples=2)
    for _ in range(2):
        assert torch.equal(running.sample(noise).actions, first)
    assert len(graphs(running)) == (3 if running.use_graph else 0)


# --- the graph itself ---


@needs_gpu
def test_a_replay_does_not_wait_for_the_gpu() -> None:
    running, inputs, noise = fresh_engine(PI0, device="cuda"), random_inputs(PI0), random_noise(PI0)
    running.infer(inputs, noise)
    graph = running.graph(next(iter(running._sessions)))
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        graph.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


@needs_gpu
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_nodes_are_the_launches(model_type: ModelType, tmp_path: Path) -> None:
    """Read from the captured graph itself: kernels and nothing else, with the grids that were asked for."""
    pytest.importorskip("cuda.bindings.driver", reason="the nodes of a graph are read by cuda-python")
    config = small_config(model_type)
    running = fresh_engine(config, "bfloat16", device="cuda", backend="triton")
    plan = running.plan(views=[3], prompt_lengths=[5])
    nodes = running.graph(plan).nodes()
    launches = record_launches(config, plan, torch.bfloat16, target_of(running.device))
    assert {node.kind for node in nodes} == {"kernel"}
    expected = Counter((launch.kernel.__name__, (*launch.grid, 1, 1)[:3]) for launch in launches)
    assert Counter((node.name, tuple(node.grid)) for node in nodes) == expected
    running.graph(plan).write_dot(tmp_path / "graph.dot")
    assert (tmp_path / "graph.dot").read_text().startswith("digraph")


@pytest.mark.parametrize("device", DEVICES)
def test_graphs_are_made_only_where_they_are_wanted(device: str) -> None:
    running = fresh_engine(PI0, device=device, use_cuda_graph=False)
    running.infer(random_inputs(PI0), random_noise(PI0))
    assert graphs(running) == []
    with pytest.raises(ValueError, match="this engine runs without CUDA graphs"):
        running.graph(running.plan(views=[3], prompt_lengths=[5]))


# --- memory ---


def fill_memory(leave: int) -> torch.Tensor:
    """All of the GPU's memory but ``leave`` bytes."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    return torch.empty(free - leave, dtype=torch.uint8, device="cuda")


@needs_gpu
def test_too_little_memory_for_an_engine_is_said_in_gigabytes() -> None:
    blocked = fill_memory(leave=200 << 20)
    with pytest.raises(MemoryError, match=r"has 0\.\d\d of \d+\.\d\d GB free, but 0\.\d\d GB are needed"):
        fresh_engine(PI0, device="cuda")
    del blocked
    torch.cuda.empty_cache()
    fresh_engine(PI0, device="cuda").infer(random_inputs(PI0), random_noise(PI0))


@needs_gpu
def test_too_little_memory_for_a_shape_is_said_in_gigabytes() -> None:
    """A hundred thousand chunks take 0.8 GB. The engine goes on with the shapes that fit."""
    running, inputs, noise = fresh_engine(PI0, device="cuda"), random_inputs(PI0), random_noise(PI0)
    expected = running.infer(inputs, noise).actions
    blocked = fill_memory(leave=200 << 20)
    with pytest.raises(MemoryError, match=r"the buffers of ShapePlan\(.*\) did not fit: \d+\.\d\d of \d+\.\d\d GB"):
        running.infer(inputs, noise.expand(-1, 100_000, -1, -1))
    del blocked
    assert torch.equal(running.infer(inputs, noise).actions, expected)


@needs_gpu
@pytest.mark.full_size
def test_full_size_fits_in_5_8_gb_with_fewer_than_1000_nodes() -> None:
    """Weights, three plans and their graphs; the embedding table stays on the host."""
    gc.collect()
    torch.cuda.empty_cache()
    before, _ = torch.cuda.mem_get_info()
    config = Pi0Config("pi0")
    running = fresh_engine(config, "bfloat16", device="cuda")
    for views in ([True, False, False], [True, True, False], [True, True, True]):
        running.infer(random_inputs(config, [views], [20]), random_noise(config))
    torch.cuda.synchronize()
    taken = before - torch.cuda.mem_get_info()[0]
    print(f"{taken / 1e9:.2f} GB taken, {torch.cuda.max_memory_allocated() / 1e9:.2f} allocated at most")
    assert taken <= 5.8e9
    for plan in list(running._sessions):
        assert len(running.graph(plan).nodes()) < 1000
