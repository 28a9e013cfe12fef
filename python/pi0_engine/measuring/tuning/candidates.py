"""Launch configurations worth measuring for a problem: legal, within a GPU's memory, the most promising first.

A model of a few lines puts them in order; measuring decides. Nothing here needs a GPU or Triton.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from pi0_engine.kernels.gpu.configs import LaunchConfig
from pi0_engine.kernels.gpu.operands import divide, power_of_two
from pi0_engine.kernels.gpu.target import Target
from pi0_engine.kernels.stream import SUM_COLUMNS

#: tl.dot multiplies tiles of at least this.
SMALLEST_DOT = 16
#: Two weight rows per column of the result: queries and keys under RoPE, gate and up.
PAIRED = ("rmsnorm_qkv_rope", "rmsnorm_geglu", "mlp_up")
ATTENTION = ("vision_attention", "prefix_attention", "suffix_attention")
#: Both halves of the fused MLP are one launch, with the warps and stages of ``mlp_up``, which does not share its sums.
FUSED_UP, FUSED_DOWN = "mlp_up", "mlp_down"

_TILES = (16, 32, 64, 128, 256)
_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
#: Accumulators in registers: float32 per thread, of 255 registers.
_ACCUMULATORS = 128
_MOST_STAGES = 6
#: A multiprocessor's rates per clock, roughly, for putting candidates in order: multiply-adds of 16-bit and of float32
#: operands, bytes from L2; and clocks until a load arrives, of a step's own, and to hand parts of a sum over.
_DENSE_RATE, _FLOAT32_RATE, _LOAD_RATE, _LATENCY, _STEP, _HANDOVER = 2048, 128, 48, 600, 30, 1500


@dataclass(frozen=True)
class Problem:
    """What one launch configuration is asked for.

    Attributes:
        op: the name it is asked under; the fused MLP asks for "mlp_up" and "mlp_down".
        rows, n, k: as in :meth:`Launcher.config`. In attention: query rows of a head, keys, width of a head.
        instances: how many such products one call computes (heads and images of attention), else 1.
        element_bytes: of the operands.
        writes_stream: whether the result is a residual stream, whose tiles span whole partial sums.
    """

    op: str
    rows: int
    n: int
    k: int
    instances: int = 1
    element_bytes: int = 2
    writes_stream: bool = False

    @property
    def columns(self) -> int:
        """Of the result's tiles: a pair of weight rows counts once."""
        return self.n // 2 if self.op in PAIRED else self.n

    @property
    def operands(self) -> int:
        """Weight tiles, and accumulators, of a program."""
        return 2 if self.op in PAIRED else 1


def candidates(problem: Problem, present: LaunchConfig, target: Target, limit: int) -> list[LaunchConfig]:
    """``present``, then up to ``limit`` others, those first that the model expects to be fastest."""
    if problem.op == "embed_prompt":
        found = _copies(problem, present)
    elif problem.op in ATTENTION:
        found = _attention(problem, present, target)
    else:
        found = _products(problem, present, target)
    others = [c for c in dict.fromkeys(found) if c != present and is_legal(problem, c, target)]
    others.sort(key=lambda config: expected_clocks(problem, config, target))
    return [present, *others[:limit]]


def refinements(problem: Problem, best: LaunchConfig, target: Target) -> list[LaunchConfig]:
    """Neighbours of the best candidate that differ in what :func:`candidates` does not vary."""
    change = dataclasses.replace
    found = [change(best, pdl=not best.pdl), change(best, tma=not best.tma)] if target.has_pdl else []
    found += [change(best, warps=8 if best.warps == 4 else 4)]
    found += [change(best, stages=best.stages - step) for step in (1, 2, -1)]
    if problem.op == FUSED_DOWN:
        found = []
    if problem.op == "embed_prompt":
        found = found[:1] if target.has_pdl else []
    return [c for c in dict.fromkeys(found) if c != best and is_legal(problem, c, target)]


def is_legal(problem: Problem, config: LaunchConfig, target: Target) -> bool:
    """Whether the kernel can be compiled and launched so, as far as can be said without trying."""
    tiles = (config.block_m, config.block_n)
    if any(power_of_two(tile) != tile or tile < SMALLEST_DOT for tile in tiles):
        return False
    if config.warps not in (4, 8) or not 1 <= config.stages <= _MOST_STAGES or config.splits < 1:
        return False
    if problem.writes_stream and config.block_n % SUM_COLUMNS:
        return False
    if (config.tma and not target.has_tma) or (config.pdl and not target.has_pdl):
        return False
    if problem.op == "embed_prompt":
        return config.splits == 1 and not config.tma
    if problem.op in ATTENTION:
        accumulators = config.block_m * (power_of_two(problem.k) + config.block_n)
        if config.tma or config.splits > divide(problem.n, config.block_n):
            return False
    else:
        accumulators = config.block_m * config.block_n * problem.operands
        steps = divide(problem.k, config.block_k) if config.block_k else 0
        if config.block_k < SMALLEST_DOT or power_of_two(config.block_k) != config.block_k or config.splits > steps:
            return False
        if config.tma and (problem.op == FUSED_DOWN or problem.k * problem.element_bytes % 16):
            return False
        if config.splits > 1 and problem.op == FUSED_UP:
            return False
    return accumulators <= _ACCUMULATORS * 32 * config.warps and shared_bytes(problem, config) <= target.shared_bytes


def shared_bytes(problem: Problem, config: LaunchConfig) -> int:
    """Shared memory that the software pipeline takes, in bytes: an estimate from below."""
    if problem.op == "embed_prompt":
        return 0
    if problem.op in ATTENTION:
        queries, keys = config.block_m * problem.k, 2 * config.block_n * problem.k
        return (queries + keys * max(config.stages - 1, 1)) * problem.element_bytes
    tile = (config.block_m + config.block_n * problem.operands) * config.block_k
    return tile * config.stages * problem.element_bytes


def expected_clocks(problem: Problem, config: LaunchConfig, target: Target) -> float:
    """How long a call takes by a model that knows waves, arithmetic, loads and latency. Only the order counts."""
    tiles = divide(problem.rows, config.block_m) * problem.instances
    if problem.op in ATTENTION:
        steps = divide(divide(problem.n, config.block_n), config.splits)
        step_work = 2 * config.block_m * config.block_n * power_of_two(problem.k)
        step_loads = 2 * config.block_n * problem.k
    elif problem.op == "embed_prompt":
        steps, step_work, step_loads = 1, 0, config.block_m * config.block_n
        tiles *= divide(problem.n, config.block_n)
    else:
        tiles *= divide(problem.columns, config.block_n)
        steps = divide(divide(problem.k, config.block_k), config.splits)
        step_work = config.block_m * config.block_n * config.block_k * problem.operands
        step_loads = (config.block_m + config.block_n * problem.operands) * config.block_k
    rate = _DENSE_RATE if problem.element_bytes < 4 else _FLOAT32_RATE
    waves = math.ceil(tiles * config.splits / target.multiprocessors)
    step = max(step_work / rate, step_loads * problem.element_bytes / _LOAD_RATE, _LATENCY / config.stages) + _STEP
    handover = _HANDOVER + 100 * config.splits if config.splits > 1 else 0
    return waves * (steps * step + _LATENCY) + handover


def _products(problem: Problem, present: LaunchConfig, target: Target) -> Iterator[LaunchConfig]:
    """Tiles of a linear layer; of each, as few warps as its accumulators allow and as many stages as fit."""
    depths = (32, 64, 128) if problem.element_bytes < 4 else (16, 32, 64)
    splits = (1,) if problem.op == FUSED_UP else _SPLITS
    for block_m, block_n, block_k, parts in itertools.product(_TILES[:-1], _TILES, depths, splits):
        tile = dataclasses.replace(present, block_m=block_m, block_n=block_n, block_k=block_k, splits=parts)
        wasteful = block_m > power_of_two(max(problem.rows, SMALLEST_DOT)) or block_n > power_of_two(
            max(problem.columns, SUM_COLUMNS if problem.writes_stream else SMALLEST_DOT)
        )
        many = divide(problem.rows, block_m) * divide(problem.columns, block_n)
        if wasteful or (parts > 1 and many * parts > 4 * target.multiprocessors):
            continue
        if problem.op == FUSED_DOWN:  # its launch has the warps and stages of the other half
            yield tile
            continue
        warps = 4 if block_m * block_n * problem.operands <= 64 * 32 * 4 else 8
        one_stage = shared_bytes(problem, dataclasses.replace(tile, stages=1))
        steps = divide(divide(problem.k, block_k), parts)
        stages = min(_MOST_STAGES, max(steps, 2), target.shared_bytes // one_stage)
        if stages >= 2:
            yield dataclasses.replace(tile, warps=warps, stages=stages)


def _attention(problem: Problem, present: LaunchConfig, target: Target) -> Iterator[LaunchConfig]:
    """``ahead_bytes`` stays: what it brings shows in the op behind, not in this one."""
    for block_m, block_n, splits, warps in itertools.product((16, 32, 64, 128), (16, 32, 64, 128), _SPLITS, (4, 8)):
        programs = divide(problem.rows, block_m) * problem.instances
        wasteful = block_m > power_of_two(max(problem.rows, SMALLEST_DOT))
        if wasteful or (splits > 1 and programs >= 2 * target.multiprocessors):
            continue
        for stages in (1, 2, 3):
            tile = dataclasses.replace(present, block_m=block_m, block_n=block_n, splits=splits)
            yield dataclasses.replace(tile, warps=warps, stages=stages)


def _copies(problem: Problem, present: LaunchConfig) -> Iterator[LaunchConfig]:
    for block_m, block_n, warps in itertools.product((16, 32, 64), (64, 128, 256, 512), (4, 8)):
        yield dataclasses.replace(present, block_m=block_m, block_n=block_n, warps=warps)
