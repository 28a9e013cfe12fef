"""Launch configurations: tile sizes as data per (op, shape, GPU generation), in ``launch_configs/sm_XX.json``.

Nothing is tuned when a robot starts: ``pi0-engine tune`` measures candidates once, on the GPU at hand, and writes them.
A rule's ``source`` says whether it was measured, when and on what, or only reasoned.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "launch_configs"


@dataclass(frozen=True)
class LaunchConfig:
    """How one kernel is cut and compiled.

    Attributes:
        block_m, block_n, block_k: tile of rows, columns and products. In attention: query rows, keys, unused.
        splits: how many programs share the products (or keys) of one tile; the last to finish adds the parts up.
        warps, stages: per program, and of the software pipeline.
        tma: whether tiles are read by the tensor memory accelerator.
        pdl: whether the kernel may start early and prefetch its weights into L2 meanwhile.
        ahead_bytes: how much of the weights that are read later an attention kernel brings into L2.
    """

    block_m: int
    block_n: int
    block_k: int
    splits: int = 1
    warps: int = 4
    stages: int = 3
    tma: bool = False
    pdl: bool = False
    ahead_bytes: int = 0


#: Largest block_m, block_n, block_k of an op whose operands are float32 where the engine's are usually 16 bits wide.
#: The rules are written for tensor cores, which read shared memory. Exact float32 products run on the ordinary cores,
#: with operands in registers: on sm_90 tiles of 128 x 128 spill 40 to 90 KB per thread, or do not fit at all.
_FLOAT32_TILES = {
    "layernorm_linear": (64, 64, 32),
    "linear_residual": (64, 64, 32),
    "rmsnorm_qkv_rope": (32, 32, 32),
    "rmsnorm_geglu": (32, 32, 32),
    "mlp_up": (32, 32, 32),
    "mlp_down": (32, 64, 32),
    "vision_attention": (32, 32, 0),
    "prefix_attention": (16, 16, 0),
    "suffix_attention": (16, 16, 0),
}


def for_float32(op: str, config: LaunchConfig) -> LaunchConfig:
    """``config`` cut down to what exact float32 products can run; for parity, not for speed."""
    if op not in _FLOAT32_TILES:  # written for float32
        return config
    tile = (config.block_m, config.block_n, config.block_k)
    block_m, block_n, block_k = (min(pair) for pair in zip(tile, _FLOAT32_TILES[op], strict=True))
    return dataclasses.replace(
        config,
        block_m=block_m,
        block_n=block_n,
        block_k=block_k,
        warps=min(config.warps, 4),
        stages=min(config.stages, 2),
        tma=False,
    )


@dataclass(frozen=True)
class Rule:
    """``config`` for problems of ``op`` with at most ``max_rows`` rows, and of just this ``n`` and ``k`` if given."""

    op: str
    config: LaunchConfig
    source: str
    max_rows: int | None = None
    n: int | None = None
    k: int | None = None

    def fits(self, op: str, rows: int, n: int, k: int) -> bool:
        limits = self.max_rows is None or rows <= self.max_rows
        return self.op == op and limits and self.n in (None, n) and self.k in (None, k)


class LaunchConfigs:
    """Rules in order: the first that fits is used."""

    def __init__(self, rules: list[Rule]) -> None:
        self.rules = rules

    def find(self, op: str, *, rows: int, n: int, k: int) -> LaunchConfig:
        """The configuration for this op and shape.

        Raises:
            ValueError: no rule fits.
        """
        for rule in self.rules:
            if rule.fits(op, rows, n, k):
                return rule.config
        raise ValueError(f"no launch configuration for op {op!r} with {rows} rows, n {n}, k {k}")

    @classmethod
    def load(cls, path: Path) -> LaunchConfigs:
        """Rules from a JSON file; an unknown or missing key raises ValueError naming it."""
        try:
            entries = json.loads(path.read_text())["rules"]
        except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"launch configurations {path} cannot be read: {error!r}") from error
        return cls([_rule(entry, f"{path} rule {number}") for number, entry in enumerate(entries)])

    def save(self, path: Path) -> None:
        entries = [dataclasses.asdict(rule) for rule in self.rules]
        kept = [{name: value for name, value in entry.items() if value is not None} for entry in entries]
        lines = ",\n  ".join(json.dumps(entry) for entry in kept)
        path.write_text(f'{{"rules": [\n  {lines}\n]}}\n')


def configs_for(arch: int) -> tuple[LaunchConfigs, int]:
    """The rules of a GPU generation, and the generation they were written for: its own or the nearest listed one."""
    listed = sorted(int(path.stem.removeprefix("sm_")) for path in FOLDER.glob("sm_*.json"))
    older = [known for known in listed if known <= arch]
    nearest = max(older) if older else min(listed)
    return LaunchConfigs.load(FOLDER / f"sm_{nearest}.json"), nearest


def _rule(entry: dict[str, Any], where: str) -> Rule:
    try:
        return Rule(**{**entry, "config": LaunchConfig(**entry["config"])})
    except (TypeError, KeyError) as error:
        raise ValueError(f"{where}: {error!r}") from error
