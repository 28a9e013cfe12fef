"""openpi's JAX checkpoints (orbax): which array holds which parameter, and how it is laid out.

The arrays of a tower are stacked over its layers (axis ``L``). Names are those of openpi's models/gemma.py, lora.py
and siglip.py; a ``_1`` at the end of a module's name means the action expert. Linear kernels are [in, out].
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from pi0_engine.checkpoints.lora import openpi_delta
from pi0_engine.checkpoints.stored import WEIGHT_DTYPES, StoredModel, StoredTensor
from pi0_engine.checkpoints.zarr import ZarrArray, open_arrays

logger = logging.getLogger(__name__)
Transform = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class _Layout:
    """Axes of an array, one letter or fixed size each, and the parameters in it.

    L layers, N heads, K kv heads, H head_dim, D width, F mlp_dim or outputs, P patches, V vocabulary.
    """

    axes: str
    parts: dict[str, Transform]

    @property
    def is_stacked(self) -> bool:
        return self.axes.startswith("L")

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether the number of axes is right, and the size of those that have a fixed one."""
        if len(shape) != len(self.axes):
            return False
        return all(int(axis) == size for axis, size in zip(self.axes, shape, strict=True) if axis.isdigit())


def _as_stored(x: torch.Tensor) -> torch.Tensor:
    return x


def _transposed(x: torch.Tensor) -> torch.Tensor:
    return x.t()


def _first(x: torch.Tensor) -> torch.Tensor:
    return x[0]


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.flatten()


def _convolution(x: torch.Tensor) -> torch.Tensor:
    return x.permute(3, 2, 0, 1)  # [kh, kw, in, out] -> [out, in, kh, kw]


def _columns_from_heads(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).t()  # [D, N, H] -> [N*H, D]


def _rows_from_heads(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).flatten(0, 1)  # [N, D, H] -> [N*H, D]


def _output_projection(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(0, 1).t()  # [N, H, D] -> [D, N*H]


def _linear(array: str, name: str, *, stack: str = "") -> dict[str, _Layout]:
    return {
        f"{array}.kernel": _Layout(f"{stack}DF", {f"{name}.weight": _transposed}),
        f"{array}.bias": _Layout(f"{stack}F", {f"{name}.bias": _as_stored}),
    }


def _layer_norm(array: str, name: str, *, stack: str = "") -> dict[str, _Layout]:
    return {
        f"{array}.scale": _Layout(f"{stack}D", {f"{name}.weight": _as_stored}),
        f"{array}.bias": _Layout(f"{stack}D", {f"{name}.bias": _as_stored}),
    }


def _vision() -> dict[str, _Layout]:
    block, layer = "PaliGemma.img.Transformer.encoderblock", "vision.layers.#"
    layouts = {
        "PaliGemma.img.embedding.kernel": _Layout("hwCD", {"vision.patch_embedding.weight": _convolution}),
        "PaliGemma.img.embedding.bias": _Layout("D", {"vision.patch_embedding.bias": _as_stored}),
        "PaliGemma.img.pos_embedding": _Layout("1PD", {"vision.position_embedding.weight": _first}),
        **_layer_norm(f"{block}.LayerNorm_0", f"{layer}.norm1", stack="L"),
        **_layer_norm(f"{block}.LayerNorm_1", f"{layer}.norm2", stack="L"),
        **_linear(f"{block}.MlpBlock_0.Dense_0", f"{layer}.fc1", stack="L"),
        **_linear(f"{block}.MlpBlock_0.Dense_1", f"{layer}.fc2", stack="L"),
        **_layer_norm("PaliGemma.img.Transformer.encoder_norm", "vision.post_norm"),
        **_linear("PaliGemma.img.head", "projector"),
    }
    attention = f"{block}.MultiHeadDotProductAttention_0"
    for array, name in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        layouts[f"{attention}.{array}.kernel"] = _Layout("LDNH", {f"{layer}.{name}.weight": _columns_from_heads})
        layouts[f"{attention}.{array}.bias"] = _Layout("LNH", {f"{layer}.{name}.bias": _flat})
    layouts[f"{attention}.out.kernel"] = _Layout("LNHD", {f"{layer}.out_proj.weight": _output_projection})
    layouts[f"{attention}.out.bias"] = _Layout("LD", {f"{layer}.out_proj.bias": _as_stored})
    return layouts


def _gemma(tower: str, suffix: str) -> dict[str, _Layout]:
    llm, layer = "PaliGemma.llm", f"{tower}.layers.#"
    attention, mlp = f"{llm}.layers.attn", f"{llm}.layers.mlp{suffix}"
    keys_and_values: dict[str, Transform] = {
        f"{layer}.k_proj.weight": lambda x: _rows_from_heads(x[0]),
        f"{layer}.v_proj.weight": lambda x: _rows_from_heads(x[1]),
    }
    gate_and_up: dict[str, Transform] = {
        f"{layer}.gate_proj.weight": lambda x: x[0].t(),
        f"{layer}.up_proj.weight": lambda x: x[1].t(),
    }
    layouts = {
        f"{attention}.q_einsum{suffix}.w": _Layout("LNDH", {f"{layer}.q_proj.weight": _rows_from_heads}),
        f"{attention}.kv_einsum{suffix}.w": _Layout("L2KDH", keys_and_values),
        f"{attention}.attn_vec_einsum{suffix}.w": _Layout("LNHD", {f"{layer}.o_proj.weight": _output_projection}),
        f"{mlp}.gating_einsum": _Layout("L2DF", gate_and_up),
        f"{mlp}.linear": _Layout("LFD", {f"{layer}.down_proj.weight": _transposed}),
    }
    norms = {
        f"{llm}.layers.pre_attention_norm{suffix}": (f"{layer}.input_norm", "L"),
        f"{llm}.layers.pre_ffw_norm{suffix}": (f"{layer}.post_attention_norm", "L"),
        f"{llm}.final_norm{suffix}": (f"{tower}.norm", ""),
    }
    for array, (name, stack) in norms.items():
        layouts[f"{array}.scale"] = _Layout(f"{stack}D", {f"{name}.weight": _as_stored})
        if tower == "expert":  # adaRMS of π0.5
            layouts.update(_linear(f"{array}.Dense_0", f"{name}.dense", stack=stack))
    return layouts


_LAYOUTS = {
    **_vision(),
    "PaliGemma.llm.embedder.input_embedding": _Layout("VD", {"llm.embed_tokens.weight": _as_stored}),
    **_gemma("llm", ""),
    **_gemma("expert", "_1"),
    **_linear("action_in_proj", "action_in_proj"),
    **_linear("action_out_proj", "action_out_proj"),
    **_linear("state_proj", "state_proj"),
    **_linear("action_time_mlp_in", "action_time_mlp_in"),
    **_linear("action_time_mlp_out", "action_time_mlp_out"),
    **_linear("time_mlp_in", "time_mlp_in"),
    **_linear("time_mlp_out", "time_mlp_out"),
}
_ARRAY_OF = {name: array for array, layout in _LAYOUTS.items() for name in layout.parts}
#: Ranks of openpi's LoRA variants, where alpha equals the rank. The files do not carry alpha.
_LORA_RANKS = {"llm": 16, "expert": 32}


#: Decoded layers of one array that wait for their readers: as many as threads that each work on a layer of their own.
_MAX_WAITING_LAYERS = 4


class _Array:
    """An array with its adapter, decoded a layer at a time.

    Going back would mean to decode from the start. A decoded layer therefore waits until each of its parameters has
    been read once, and so do layers passed over on the way to a later one: readers may be a few layers apart.
    """

    def __init__(self, base: ZarrArray, lora: tuple[ZarrArray, ZarrArray] | None, layout: _Layout) -> None:
        self._base, self._lora, self._layout = base, lora, layout
        self._sum_heads = ".attn_vec_einsum" in base.key
        self._waiting: dict[int, tuple[torch.Tensor, set[str]]] = {}
        self._next = 0
        self._lock = threading.Lock()

    def read(self, part: str, layer: int) -> torch.Tensor:
        """The parameter ``part`` of ``layout.parts``; an array that is not stacked is its own layer 0."""
        with self._lock:
            if layer not in self._waiting:
                for passed in range(max(self._next, layer - _MAX_WAITING_LAYERS + 1), layer):
                    self._decode(passed)
                self._decode(layer)
                self._next = layer + 1
            values, unread = self._waiting[layer]
            unread.discard(part)
            if not unread:
                del self._waiting[layer]
        return self._layout.parts[part](values)

    def _decode(self, layer: int) -> None:
        while len(self._waiting) >= _MAX_WAITING_LAYERS:
            del self._waiting[min(self._waiting)]
        values = self._rows(self._base, layer)
        if self._lora is not None:
            a, b = (self._rows(array, layer) for array in self._lora)
            values = values.float() + openpi_delta(a, b, sum_heads=self._sum_heads)
        self._waiting[layer] = values, set(self._layout.parts)

    def _rows(self, array: ZarrArray, layer: int) -> torch.Tensor:
        if not self._layout.is_stacked:
            return array.read_rows(0, array.shape[0])
        return array.read_rows(layer, layer + 1)[0]


def read_orbax(directory: Path) -> StoredModel:
    """The model in an openpi JAX ``params`` directory, with its LoRA adapters merged.

    Memory: one layer of an array at a time (see ``zarr.py``) when layers are asked for in ascending order, or
    a few layers where several threads each ask for a layer of their own. Other orders only cost time.

    Raises:
        ValueError: a damaged directory, missing packages, an array of unexpected rank, or an incomplete adapter.
    """
    arrays = {_path(array.key): array for array in open_arrays(directory).values()}
    if not arrays:
        raise ValueError(f"{directory} holds no arrays: an incomplete checkpoint?")
    tensors: dict[str, StoredTensor] = {}
    problems: list[str] = []
    adapters = 0
    for path, base in arrays.items():
        layout = _LAYOUTS.get(path)
        if layout is None:
            continue
        if not layout.fits(base.shape):
            problems.append(f"{base.key}: {list(base.shape)}, expected the axes {' '.join(layout.axes)}")
            continue
        lora = _adapter(path, arrays, problems)
        adapters += lora is not None
        _add_parameters(tensors, base, layout, _Array(base, lora, layout))
    if problems:
        raise ValueError("\n    ".join([f"{directory}: arrays that do not fit together ({len(problems)}):", *problems]))
    if adapters:
        logger.info("%s: merging LoRA adapters into %d arrays", directory, adapters)
    adapted = {name for path in _LAYOUTS for name in _adapter_paths(path) if path in arrays}
    unexpected = tuple(a.key for path, a in arrays.items() if path not in _LAYOUTS and path not in adapted)
    return StoredModel(str(directory), tensors, (), unexpected, key_of=_array_of)


def _add_parameters(tensors: dict[str, StoredTensor], base: ZarrArray, layout: _Layout, array: _Array) -> None:
    shape = base.shape[1:] if layout.is_stacked else base.shape
    outlines = {name: torch.empty(shape, device="meta") for name in layout.parts}
    shapes = {name: tuple(layout.parts[name](outline).shape) for name, outline in outlines.items()}
    for layer in range(base.shape[0] if layout.is_stacked else 1):
        key = f"{base.key}[{layer}]" if layout.is_stacked else base.key
        for name in layout.parts:
            read = partial(array.read, name, layer)
            tensors[name.replace("#", str(layer))] = StoredTensor(key, shapes[name], base.dtype, read)


def _adapter(path: str, arrays: dict[str, ZarrArray], problems: list[str]) -> tuple[ZarrArray, ZarrArray] | None:
    found = [arrays.get(adapter) for adapter in _adapter_paths(path)]
    a, b = found
    if a is None and b is None:
        return None
    base = arrays[path]
    if a is None or b is None or min(len(a.shape), len(b.shape)) < 2:
        problems.append(f"{base.key}: its adapter is incomplete, expected lora_a and lora_b")
        return None
    if not {a.dtype, b.dtype} <= set(WEIGHT_DTYPES):
        problems.append(f"{base.key}: its adapter has the dtypes {a.dtype} and {b.dtype}")
        return None
    rank = a.shape[-1]
    if a.shape != (*base.shape[:-1], rank) or b.shape != (*base.shape[:-2], rank, base.shape[-1]):
        problems.append(f"{base.key} {list(base.shape)}: lora_a {list(a.shape)} and lora_b {list(b.shape)} do not fit")
        return None
    tower = "expert" if re.search(r"_1(\.|$)", path) else "llm"
    if rank != _LORA_RANKS[tower]:
        logger.warning(
            "%s: adapter of rank %d where openpi's variants have %d; merging with alpha = rank, as they do",
            base.key, rank, _LORA_RANKS[tower],
        )  # fmt: skip
    return a, b


def _adapter_paths(path: str) -> tuple[str, str]:
    """Where the adapter of an array is: beside ``w`` in an einsum, with the array's own name in the MLP."""
    stem = f"{path.removesuffix('.w')}." if path.endswith(".w") else f"{path}_"
    return f"{stem}lora_a", f"{stem}lora_b"


def _path(key: str) -> str:
    """An array's place in the model: training checkpoints add ``.value`` to each name, released ones do not."""
    return key.removeprefix("params.").removesuffix(".value")


def _array_of(canonical: str) -> str:
    return _ARRAY_OF[re.sub(r"\.layers\.\d+\.", ".layers.#.", canonical)]
