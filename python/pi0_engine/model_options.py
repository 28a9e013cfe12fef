"""Which model to run, as users say it: options that commands and servers share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from pi0_engine.config import EngineConfig, Pi0Config
from pi0_engine.policy import DEFAULT_RTC, Pi0Policy
from pi0_engine.robots.declaration import Robot
from pi0_engine.robots.normalization import NormStats
from pi0_engine.rtc.schedule import RtcConfig
from pi0_engine.text.files import demo_tokenizer
from pi0_engine.torch_needed import torch_needed

if TYPE_CHECKING:
    import torch

    from pi0_engine.checkpoints.checkpoint import Checkpoint


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

    def open(self, fallback_config: Pi0Config | None = None, dtype: torch.dtype | None = None) -> Checkpoint:
        """The checkpoint; ``fallback_config`` serves where neither the user nor the checkpoint says the sizes.

        ``dtype`` is that of random weights, float32 where not given.
        """
        self.check()
        with torch_needed("a model"):
            from pi0_engine.checkpoints.checkpoint import open_checkpoint
            from pi0_engine.checkpoints.random_weights import RandomCheckpoint

        config = Pi0Config.load(self.config) if self.config else None
        if self.checkpoint is not None:
            return open_checkpoint(
                self.checkpoint, config=config or fallback_config, revision=self.revision, base=self.base
            )
        config = config or fallback_config
        if config is None or self.random_weights is None:
            raise ValueError("--random-weights needs --config: 'pi0', 'pi05' or a JSON file")
        given = {} if dtype is None else {"dtype": dtype}
        return RandomCheckpoint(config, self.random_weights, **given)

    def check(self) -> None:
        """Raises ValueError for options that name no model, or two. Needs no torch."""
        if (self.checkpoint is None) == (self.random_weights is None):
            raise ValueError("expected exactly one of --checkpoint and --random-weights")

    def policy(
        self,
        robot: Robot,
        engine: EngineConfig,
        *,
        tokenizer: str | None,
        norm_stats: str | None,
        asset_id: str | None,
        rtc: RtcConfig = DEFAULT_RTC,
        allow_unsafe_triton: bool = True,
        progress: bool = False,
    ) -> Pi0Policy:
        """The model behind a robot. Random weights have no files: they get the demo's tokenizer and no statistics.

        Raises:
            ValueError: what :meth:`Pi0Policy.from_checkpoint` says; without ``allow_unsafe_triton`` also a Triton whose
                kernels may compute wrong numbers on this GPU.
        """
        self.check()
        if not allow_unsafe_triton:
            _refuse_unsafe_triton(engine)
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


def _refuse_unsafe_triton(engine: EngineConfig) -> None:
    """Before anything is loaded."""
    with torch_needed("a model"):
        from pi0_engine.engine.choices import choose_ops, resolve_device, why_unsafe

    device = resolve_device(engine.device)
    if why := why_unsafe(choose_ops(engine, device), device):
        raise ValueError(f"{why}. --backend torch does without it, --allow-unsafe-triton serves all the same")
