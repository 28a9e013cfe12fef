"""One kernel launch as data: an op's Triton implementation describes it, a launcher runs, records or compiles it.

Problem -> launch, nothing hidden in between: the same description is executed on a GPU, executed by Triton's
interpreter on a CPU, recorded on torch's meta device, and cross-compiled for a GPU that is not there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pi0_engine.kernels.gpu.configs import LaunchConfig, LaunchConfigs, for_float32
from pi0_engine.kernels.gpu.target import Target


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid and its arguments.

    Attributes:
        op: the op it belongs to.
        kernel: a function under ``triton.jit``.
        grid: programs along each axis.
        arguments: the kernel's arguments by name: tensors, tensor descriptors, numbers, None, compile-time constants.
        num_warps, num_stages: of the compiled kernel.
        pdl: whether it may start before the previous kernel has ended (programmatic dependent launch, sm_90 and newer);
            it then waits by itself before it reads what that kernel wrote.
    """

    op: str
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int
    pdl: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """What Triton takes beside the kernel's own arguments."""
        # Multiply-add in one rounding, as until Triton 3.10, whose default is to keep the two apart.
        options: dict[str, Any] = {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }
        return {**options, "launch_pdl": True} if self.pdl else options


def run(launch: Launch) -> None:
    """Execute on the current CUDA stream, or in Triton's interpreter where TRITON_INTERPRET=1 was set at import."""
    launch.kernel[launch.grid](**launch.arguments, **launch.options)


class Launcher:
    """What an op's implementation needs to know to launch: the GPU, the launch configurations, and who executes.

    Args:
        target: the GPU that is launched on, or compiled for.
        configs: tile sizes by op and shape.
        execute: takes each :class:`Launch`; :func:`run`, or a list's ``append`` to record.
        concurrent: whether programs run at the same time, so that they may wait for each other and kernels may
            overlap. In the interpreter they do not, and there is no cache to prefetch into.
    """

    def __init__(
        self,
        target: Target,
        configs: LaunchConfigs,
        execute: Callable[[Launch], None] = run,
        *,
        concurrent: bool = True,
    ) -> None:
        self.target, self.configs, self._execute = target, configs, execute
        self.concurrent = concurrent

    def config(self, op: str, *, rows: int, n: int, k: int, dtype: torch.dtype | None = None) -> LaunchConfig:
        """The configuration for ``rows`` x ``n`` results from ``k`` products each, less what the GPU does not have."""
        found, target = self.configs.find(op, rows=rows, n=n, k=k), self.target
        if dtype == torch.float32 and self.concurrent:
            found = for_float32(op, found)
        return dataclasses.replace(
            found,
            tma=found.tma and target.has_tma,
            pdl=found.pdl and target.has_pdl and self.concurrent,
            ahead_bytes=found.ahead_bytes if self.concurrent else 0,
        )

    def __call__(self, launch: Launch) -> None:
        self._execute(launch)
