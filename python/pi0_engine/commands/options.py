"""What several subcommands share: which model, and how to run it."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import tyro

from pi0_engine.checkpoint import Checkpoint, open_checkpoint
from pi0_engine.config import AttentionName, BackendName, DtypeName, EngineConfig, Pi0Config, SolverName
from pi0_engine.normalization import NormStats
from pi0_engine.policy import DEFAULT_RTC, Pi0Policy
from pi0_engine.random_weights import RandomCheckpoint
from pi0_engine.robots import Robot
from pi0_engine.rtc import RtcConfig
from pi0_engine.tokenizer_files import demo_tokenizer

Attention = AttentionName
Backend = BackendName
Dtype = DtypeName
Solver = SolverName


@dataclass(frozen=True)
class ModelOptions:
    """Which model to run: a checkpoint, or random weights of a given seed."""

    checkpoint: str | None = None
    """Checkpoint file or directory, or a Hugging Face Hub id."""
    revision: str | None = None
    """Revision of a Hub id."""
    base: str | None = None
    """For a LoRA adapter: its base checkpoint, where it is not what the adapter names."""
    random_weights: Annotated[int | None, tyro.conf.arg(metavar="SEED")] = None
    """Instead of a checkpoint: seeded random weights. Needs --config."""
    config: str | None = None
    """'pi0', 'pi05' or a JSON file of sizes. Only needed where the checkpoint does not tell."""

    def open(self, fallback_config: Pi0Config | None = None, dtype: torch.dtype = torch.float32) -> Checkpoint:
        """The checkpoint; ``fallback_config`` serves where neither the user nor the checkpoint says the sizes.

        ``dtype`` is that of random weights.
        """
        if (self.checkpoint is None) == (self.random_weights is None):
            raise ValueError("expected exactly one of --checkpoint and --random-weights")
        config = Pi0Config.load(self.config) if self.config else None
        if self.checkpoint is not None:
            return open_checkpoint(
                self.checkpoint, config=config or fallback_config, revision=self.revision, base=self.base
            )
        config = config or fallback_config
        if config is None or self.random_weights is None:
            raise ValueError("--random-weights needs --config: 'pi0', 'pi05' or a JSON file")
        return RandomCheckpoint(config, self.random_weights, dtype)

    def policy(
        self,
        robot: Robot,
        engine: EngineConfig,
        *,
        tokenizer: str | None,
        norm_stats: str | None,
        asset_id: str | None,
        rtc: RtcConfig = DEFAULT_RTC,
        progress: bool = False,
    ) -> Pi0Policy:
        """The model behind a robot. Random weights have no files: they get the demo's tokenizer and no statistics."""
        is_random = self.random_weights is not None
        return Pi0Policy.from_checkpoint(
            self.open(),
            robot=robot,
            engine=engine,
            tokenizer=tokenizer or (demo_tokenizer() if is_random else None),
            norm_stats=norm_stats or (NormStats.identity() if is_random else None),
            asset_id=asset_id,
            rtc=rtc,
            progress=progress,
        )


def print_json(data: Any) -> None:
    json.dump(data, sys.stdout, indent=2)
    print()


def show_progress(json_output: bool) -> bool:
    """Bars only for people: on a terminal, and not beside JSON."""
    return sys.stderr.isatty() and not json_output


def table(header: list[str], rows: list[list[str]], left: int = 1) -> str:
    """Plain aligned columns, the first ``left`` of them to the left, the others to the right."""
    cells = [header, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(line.rstrip() for line in lines)
