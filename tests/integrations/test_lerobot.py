"""The lerobot adapter where lerobot is not: it imports, and refuses what is no policy. More is in tests/lerobot."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from pi0_engine.integrations.lerobot import accelerate, restore, sampler_of


def test_the_adapter_does_not_import_lerobot() -> None:
    script = (
        "import sys, pi0_engine.integrations.lerobot; print('lerobot' in sys.modules, 'transformers' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd="/")
    assert run.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("function", [accelerate, restore, sampler_of])
def test_what_is_no_lerobot_policy_is_refused(function: object) -> None:
    assert callable(function)
    with pytest.raises(ValueError, match=r"got a torch\.nn\..*Linear, expected lerobot's PI0Policy or PI05Policy"):
        function(torch.nn.Linear(1, 1))
