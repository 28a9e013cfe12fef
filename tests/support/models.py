"""Small models with seeded weights, inputs for them, and what is compared. For tests to import."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pi0_engine.checkpoints.random_weights import RandomCheckpoint
from pi0_engine.config import EngineConfig, GemmaConfig, ModelType, Pi0Config, SiglipConfig, SolverName
from pi0_engine.engine.runtime import Engine
from pi0_engine.inputs import ModelInputs
from pi0_engine.reference.model import Pi0Reference

MODEL_TYPES: list[ModelType] = ["pi0", "pi05"]
SECOND_ORDER: list[SolverName] = ["midpoint", "adams_bashforth"]


@functools.cache
def small_config(model_type: ModelType, **changes: Any) -> Pi0Config:
    """A model that runs in milliseconds: 4 patches per camera, and sizes that are equal to no other where possible."""
    config = Pi0Config(
        model_type,
        vision=SiglipConfig(width=36, depth=2, num_heads=3, mlp_dim=52, image_size=28),
        llm=GemmaConfig(40, 3, 56, num_heads=4, num_kv_heads=1, head_dim=16, vocab_size=97),
        expert=GemmaConfig(28, 3, 44, num_heads=4, num_kv_heads=1, head_dim=16),
        action_dim=7,
        max_token_len=12,
        action_horizon=5,
        num_steps=3,
    )
    return dataclasses.replace(config, **changes)


@functools.cache
def reference(config: Pi0Config, dtype: torch.dtype = torch.float32) -> Pi0Reference:
    return Pi0Reference.from_tensors(config, RandomCheckpoint(config).tensor, dtype)


@functools.cache
def smooth_in_time(model_type: ModelType) -> Pi0Reference:
    """A small model that does not see the time embedding's periods below 2: at 4e-3 no step here would resolve it."""
    config = small_config(model_type)
    source, half = RandomCheckpoint(config), config.expert.width // 2
    name = "time_mlp_in.weight" if config.is_pi05 else "action_time_mlp_in.weight"
    period = 4e-3 * 1000 ** torch.linspace(0, 1, half)

    def tensor(asked: str) -> Tensor:
        found = source.tensor(asked)
        if asked == name:
            found = found.clone()
            found[:, -2 * half :] *= (period >= 2).repeat(2)
        return found

    return Pi0Reference.from_tensors(config, tensor)


def fresh_engine(config: Pi0Config, dtype: str = "float32", **options: Any) -> Engine:
    """An engine that no other test has used."""
    return Engine(RandomCheckpoint(config), EngineConfig(dtype=dtype, **options))  # type: ignore[arg-type]


#: The same, one for all tests: its buffers hold whatever the last call left there.
engine = functools.cache(fresh_engine)


def random_inputs(
    config: Pi0Config,
    cameras: Sequence[Sequence[bool]] = ((True, True, True),),
    prompt_lengths: Sequence[int] = (5,),
    *,
    length: int | None = None,
    seed: int = 0,
) -> ModelInputs:
    """One observation per entry; masked cameras and padding ids hold random values like the others."""
    random = torch.Generator().manual_seed(seed)
    masks = np.array(cameras, dtype=np.bool_)
    (batch, views), size = masks.shape, config.vision.image_size
    length = config.token_capacity if length is None else length
    assert config.llm.vocab_size is not None
    return ModelInputs(
        images=(torch.rand(batch, views, size, size, 3, generator=random) * 2 - 1).numpy(),
        image_masks=masks,
        tokens=torch.randint(0, config.llm.vocab_size, (batch, length), generator=random).numpy(),
        token_mask=np.arange(length) < np.array(prompt_lengths)[:, None],
        state=torch.randn(batch, config.action_dim, generator=random).numpy(),
    )


class Tensors(NamedTuple):
    """``ModelInputs`` as the reference takes them."""

    images: Tensor
    image_masks: Tensor
    tokens: Tensor
    token_mask: Tensor
    state: Tensor


def tensors(inputs: ModelInputs) -> Tensors:
    i = inputs
    return Tensors(*(torch.from_numpy(x) for x in (i.pixels, i.image_masks, i.tokens, i.token_mask, i.state)))


def random_noise(config: Pi0Config, batch: int = 1, samples: int = 1, horizon: int | None = None) -> Tensor:
    """float32 [B, samples, H, action_dim]; every chunk different."""
    shape = (batch, samples, horizon or config.action_horizon, config.action_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def rows(inputs: ModelInputs, *which: int) -> ModelInputs:
    """A batch of only these observations, which have images."""
    index = list(which)
    given = {f.name: getattr(inputs, f.name) for f in dataclasses.fields(inputs)}
    assert given.pop("frames") is None
    return ModelInputs(**{name: array[index] for name, array in given.items()})


def reference_actions(
    model: Pi0Reference,
    inputs: ModelInputs,
    noise: Tensor,
    num_steps: int | None = None,
    solver: SolverName = "euler",
) -> Tensor:
    """[B, samples, H, A] of the reference, which knows no samples: each is a run of its own."""
    given = tensors(inputs)
    return torch.stack([model.sample_actions(*given, sample, num_steps, solver) for sample in noise.unbind(1)], dim=1)


def rel_l2(actual: Tensor, expected: Tensor) -> float:
    """||a - b|| / ||b|| in float64; shapes must match exactly. NaN if either holds one."""
    assert actual.shape == expected.shape, f"{list(actual.shape)} against {list(expected.shape)}"
    a, b = actual.double(), expected.double()
    return float((a - b).norm() / b.norm())


class Recorder:
    """Inputs and outputs of every submodule of a reference model while it runs, as it computed them.

    ``inputs["llm.layers.0.o_proj"][n]`` is the first argument of the module's n-th call, ``outputs`` its result (of a
    norm, which returns a gate too, the normed tensor).
    """

    def __init__(self, model: Pi0Reference) -> None:
        self.inputs: dict[str, list[Tensor]] = {}
        self.outputs: dict[str, list[Tensor]] = {}
        self._model = model
        self._handles: list[Any] = []

    def __enter__(self) -> Recorder:
        for name, module in self._model.named_modules():
            self._handles.append(module.register_forward_hook(self._keep(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _keep(self, name: str) -> Any:
        def hook(_: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.inputs.setdefault(name, []).append(args[0])
            self.outputs.setdefault(name, []).append(output if isinstance(output, Tensor) else output[0])

        return hook
