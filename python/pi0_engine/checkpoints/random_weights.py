"""Seeded weights: every parameter from its name, its shape and a seed alone, so that nothing has to be downloaded.

With seed 0 a parameter is float32 ``offset + scale * N(0, 1)``, drawn in C order by numpy's PCG64 seeded with the
CRC-32 of its openpi name. The scales keep every part of the network in its working range: attention neither uniform
nor one-hot, residual branches that matter. Other implementations need numpy and zlib only to make the same weights.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from pi0_engine.checkpoints.checkpoint import Checkpoint
from pi0_engine.checkpoints.names import EMBEDDING_KEY, TIED_EMBEDDING_KEY, openpi_name
from pi0_engine.checkpoints.parameters import parameter_shapes
from pi0_engine.config import Pi0Config

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Values drawn at a time when the result is not float32: the float32 intermediate is 4 MB and stays in the cache.
_CHUNK_VALUES = 1 << 20


def random_parameter(openpi_key: str, shape: Sequence[int], seed: int = 0) -> np.ndarray:
    """float32 array of ``shape``: the value of one parameter of openpi's state dict.

    The tied key ``paligemma.lm_head.weight`` gets the value of ``embed_tokens.weight``.
    """
    shape = tuple(int(size) for size in shape)
    generator = _generator(openpi_key, seed)
    values = generator.standard_normal(shape, dtype=np.float32)
    _scale_in_place(values, openpi_key, shape)
    return values


class RandomCheckpoint(Checkpoint):
    """A checkpoint that exists nowhere: each tensor is drawn when it is asked for. Safe to use from several threads.

    Args:
        config: the model.
        seed: 0 or a positive integer.
        dtype: the dtype of every tensor. Float32 draws are rounded, a piece at a time, so that no float32 copy of a
            large tensor exists.
    """

    def __init__(self, config: Pi0Config, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        if seed < 0:
            raise ValueError(f"seed is {seed}, expected 0 or a positive integer")
        if dtype not in _DTYPES:
            raise ValueError(f"dtype is {dtype}, expected one of {list(_DTYPES)}")
        self._seed, self._dtype = seed, dtype
        shapes = parameter_shapes(config)
        super().__init__(config, "random", Path(f"random-weights-{seed}"), shapes, (), self._draw)

    def _draw(self, name: str) -> torch.Tensor:
        key, shape = openpi_name(name), self.shapes[name]
        if self._dtype == torch.float32:
            return torch.from_numpy(random_parameter(key, shape, self._seed))
        tensor = torch.empty(shape, dtype=self._dtype)
        flat, generator = tensor.view(-1), _generator(key, self._seed)
        buffer = np.empty(min(_CHUNK_VALUES, flat.numel()), dtype=np.float32)
        for start in range(0, flat.numel(), len(buffer)):
            values = buffer[: flat.numel() - start]
            generator.standard_normal(dtype=np.float32, out=values)
            _scale_in_place(values, key, shape)
            flat[start : start + len(values)].copy_(torch.from_numpy(values))
        return tensor


def _generator(openpi_key: str, seed: int) -> np.random.Generator:
    key = EMBEDDING_KEY if openpi_key == TIED_EMBEDDING_KEY else openpi_key
    checksum = zlib.crc32(key.encode())
    return np.random.Generator(np.random.PCG64(checksum if seed == 0 else [checksum, seed]))


def _scale_in_place(values: np.ndarray, key: str, shape: tuple[int, ...]) -> None:
    scale, offset = _scale_and_offset(key, shape)
    values *= np.float32(scale)
    if offset:
        values += np.float32(offset)


def _scale_and_offset(key: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """How a standard normal draw becomes a weight; ``shape`` is the whole parameter's."""
    if key.endswith(".bias"):
        return 0.1, 0.0
    if key.endswith(("embed_tokens.weight", "lm_head.weight")):
        return 1 / math.sqrt(shape[1]), 0.0  # the prefix multiplies by sqrt(width)
    if key.endswith("position_embedding.weight"):
        return 0.3, 0.0
    if key.endswith("patch_embedding.weight"):
        return 2 / math.sqrt(math.prod(shape[1:])), 0.0
    if len(shape) == 1:  # LayerNorm multiplies by w, Gemma's RMSNorm by 1 + w
        return 0.1, 1.0 if "vision_tower" in key else 0.0
    attention = key.endswith(("self_attn.q_proj.weight", "self_attn.o_proj.weight", "self_attn.out_proj.weight"))
    return (3.0 if attention else 1.0) / math.sqrt(shape[1]), 0.0
