"""A Triton whose kernels may compute wrong numbers: known by version and GPU, told to everybody, refused by serve."""

from __future__ import annotations

import importlib.metadata
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from pi0_engine.cli import main
from pi0_engine.engine import choices, machine, runtime
from pi0_engine.engine.choices import why_unsafe
from pi0_engine.kernels.availability import unsafe_triton
from pi0_engine.kernels.gpu.target import TARGETS
from pi0_engine.kernels.registry import select_ops
from tests.support.models import fresh_engine, small_config

CUDA = torch.device("cuda")


@pytest.mark.parametrize("version", ["3.6.0", "3.7.0", "3.7.0+git1", "2.9", "3.5.1.post2"])
@pytest.mark.parametrize("arch", [90, 100, 110, 120, None])
def test_old_tritons_are_unsafe_where_products_read_shared_memory(arch: int | None, version: str) -> None:
    said = unsafe_triton(arch, version)
    assert said is not None and f"Triton {version} is unsafe" in said and "expected 3.7.1 or newer" in said
    assert (f"sm_{arch}" if arch else "sm_90 and newer") in said


@pytest.mark.parametrize(
    ("arch", "version"), [(90, "3.7.1"), (120, "3.8.0"), (None, "3.10.0"), (89, "3.6.0"), (87, "3.0"), (80, "3.7.0")]
)
def test_others_are_safe(arch: int | None, version: str) -> None:
    assert unsafe_triton(arch, version) is None


@pytest.fixture
def old_triton_on_an_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as Python can tell: there is no such GPU here."""
    versions = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.6.0" if name == "triton" else versions(name))
    for module in (choices, machine):
        monkeypatch.setattr(module, "target_of", lambda device: TARGETS[90])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")


@pytest.mark.usefixtures("old_triton_on_an_h100")
def test_it_counts_where_triton_runs() -> None:
    chosen = {"triton": select_ops("triton", torch.device("meta")), "torch": select_ops("torch", torch.device("cpu"))}
    assert "Triton 3.6.0 is unsafe on sm_90" in str(why_unsafe(chosen["triton"], CUDA))
    assert why_unsafe(chosen["torch"], CUDA) is None
    assert why_unsafe(chosen["triton"], torch.device("cpu")) is None


@pytest.mark.usefixtures("old_triton_on_an_h100")
def test_results_say_so() -> None:
    assert "unsafe on sm_90" in str(machine.describe_machine(CUDA)["unsafe"])
    assert "unsafe" not in machine.describe_machine(torch.device("cpu"))


@pytest.mark.usefixtures("old_triton_on_an_h100")
def test_env_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    assert "Triton 3.6.0 is unsafe on sm_90 and newer" in capsys.readouterr().out


def test_an_engine_says_so_when_it_is_built(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(runtime, "why_unsafe", lambda ops, device: "Triton 3.6.0 is unsafe on sm_90")
    with caplog.at_level(logging.WARNING):
        fresh_engine(small_config("pi0"))
    assert "Triton 3.6.0 is unsafe on sm_90" in caplog.text


@pytest.mark.parametrize("told", [False, True])
def test_the_server_refuses_it_unless_told(
    told: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(choices, "why_unsafe", lambda ops, device: "Triton 3.6.0 is unsafe on sm_90")
    missing: list[Any] = ["--checkpoint", str(tmp_path / "none")]  # what comes next, where it is not refused
    flag = ["--allow-unsafe-triton"] if told else []
    assert main(["serve", "--robot", "libero", "--port", "0", *missing, *flag]) == 2
    said = capsys.readouterr().err
    assert ("Triton 3.6.0 is unsafe on sm_90. --backend torch does without it" in said) is not told
    assert (str(tmp_path / "none") in said) is told
