"""``bench --layers``: every shell is timed, and contains the one before it."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

import pi0_engine.measuring.serving_layers as latency_module
from pi0_engine.cli import main
from pi0_engine.config import EngineConfig
from pi0_engine.measuring.serving_layers import SHELLS, measure_shells
from tests.support.serving import SIZES, config


def test_shells_are_timed_from_the_inside_out() -> None:
    report = measure_shells(config(), EngineConfig(dtype="float32"), views=2, side=32, runs=5)
    assert list(report["shells"]) == list(SHELLS) and report["runs"] == 5 and report["dtype"] == "float32"
    assert all(0 < shell["p50_ms"] <= shell["p99_ms"] for shell in report["shells"].values())
    # The round trip of a request holds the engine's share of the same request, whatever else the machine does.
    assert report["beyond_engine"]["p50_ms"] > 0 and report["echo"]["p50_ms"] > 0
    two_frames_and_the_rest = 2 * 32 * 32 * 3 + 500
    assert 2 * 32 * 32 * 3 < report["observation"]["message_bytes"] < two_frames_and_the_rest


@pytest.mark.parametrize(
    ("options", "message"), [({"views": 4}, "views is 4, expected 1 to 3"), ({"runs": 0}, "runs is 0")]
)
def test_what_cannot_be_measured(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure_shells(config(), EngineConfig(), **options)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = tmp_path / "sizes.json"
    sizes.write_text(json.dumps(SIZES))
    command = ["bench", "--layers", "--config", str(sizes), "--runs", "2", "--dtype", "float32"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert all(shell in text for shell in SHELLS) and "beyond the engine" in text and "an echo of" in text
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["observation"]["views"] == 2


def test_a_server_that_does_not_start_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter would wait for it at its end, for ever."""

    def broken(*given: Any) -> Any:
        raise ValueError("no server today")

    monkeypatch.setattr(latency_module, "BackgroundServer", broken)
    with pytest.raises(ValueError, match="no server today"):
        measure_shells(config(), EngineConfig(dtype="float32"), side=32, runs=1)
    left = multiprocessing.active_children()
    for child in left:  # or this one would not end either
        child.kill()
    assert not left


def test_options_of_the_stages_are_not_ignored(capsys: pytest.CaptureFixture[str]) -> None:
    for options, named in (
        (["--baseline", "reference"], "--baseline"),
        (["--plot", "stages.png", "--horizon", "20"], "--horizon, --plot"),
        (["--num-steps", "5"], "--num-steps"),
        (["--prompt-tokens", "48"], "--prompt-tokens"),
    ):
        assert main(["bench", "--layers", *options]) == 2
        assert f"--layers knows no {named}:" in capsys.readouterr().err
