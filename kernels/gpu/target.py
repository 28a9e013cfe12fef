"""What the kernels have to know about a GPU, by compute capability."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Target:
    """A GPU generation.

    Attributes:
        arch: compute capability as one number: 90 is sm_90.
        shared_bytes: shared memory that one block may use at most.
        multiprocessors: of the usual part; a GPU at hand says its own number.
        name: parts that have it.
    """

    arch: int
    shared_bytes: int
    multiprocessors: int
    name: str

    @property
    def has_tma(self) -> bool:
        """Tensor memory accelerator: whole tiles are copied to shared memory by one instruction."""
        return self.arch >= 90

    @property
    def has_pdl(self) -> bool:
        """Programmatic dependent launch: a kernel may start while the one before it still runs."""
        return self.arch >= 90


_KIB = 1024
#: Shared memory from the CUDA programming guide ("Technical Specifications per Compute Capability": the most per
#: thread block); multiprocessors from the data sheets of the named parts.
TARGETS = {
    target.arch: target
    for target in (
        Target(80, 163 * _KIB, 108, "A100"),
        Target(86, 99 * _KIB, 82, "RTX 3090"),
        Target(87, 163 * _KIB, 16, "Jetson AGX Orin"),
        Target(89, 99 * _KIB, 128, "RTX 4090"),
        Target(90, 227 * _KIB, 132, "H100, H200"),
        Target(100, 227 * _KIB, 148, "B200"),
        Target(110, 227 * _KIB, 20, "Jetson AGX Thor"),
        Target(120, 99 * _KIB, 170, "RTX 5090"),
    )
}


def parse_target(text: str) -> Target:
    """``"sm_90"`` -> its :class:`Target`.

    Raises:
        ValueError: not one of the known ones.
    """
    prefix, _, number = text.partition("_")
    if prefix != "sm" or not number.isdigit() or int(number) not in TARGETS:
        raise ValueError(f"target is {text!r}, expected one of {[f'sm_{arch}' for arch in TARGETS]}")
    return TARGETS[int(number)]


def nearest_target(arch: int) -> Target:
    """The known generation that is closest: the newest one not newer than ``arch``, else the oldest."""
    older = [known for known in TARGETS if known <= arch]
    return TARGETS[max(older) if older else min(TARGETS)]


def target_of(device: torch.device) -> Target:
    """The GPU at hand, with its own number of multiprocessors; sm_90 where there is none (interpreting, recording)."""
    if device.type != "cuda":
        return TARGETS[90]
    major, minor = torch.cuda.get_device_capability(device)
    known = nearest_target(10 * major + minor)
    found = torch.cuda.get_device_properties(device)
    return dataclasses.replace(
        known, arch=10 * major + minor, multiprocessors=found.multi_processor_count, name=found.name
    )
