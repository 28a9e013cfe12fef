"""Loading takes little more memory than the packed weights: measured on a real file in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pi0_engine.config import GemmaConfig, Pi0Config, SiglipConfig
from pi0_engine.engine import heap
from tests.support.checkpoints import write_openpi

#: Prints bytes: packed weights, embedding table, peak beyond what the imports take.
MEASURE = """
import re, sys
from pathlib import Path
from pi0_engine.checkpoints.checkpoint import open_checkpoint
from pi0_engine.config import EngineConfig
from pi0_engine.engine.runtime import Engine

def kilobytes(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

before = kilobytes("VmRSS")
engine = Engine(open_checkpoint(sys.argv[1]), EngineConfig(dtype="bfloat16"))
table = engine.weights.embed_tokens
print(engine.weights.packed_bytes, table.numel() * table.element_size(), 1024 * (kilobytes("VmHWM") - before))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peak memory is read from Linux's /proc")
def test_peak_memory_of_loading_is_at_most_1_3_times_the_packed_weights(tmp_path: Path) -> None:
    """A float32 file of 0.9 GB, packed to 0.4 GB of bfloat16; its embedding table is left in the file."""
    config = Pi0Config(
        "pi0",
        vision=SiglipConfig(width=144, depth=2, num_heads=2, mlp_dim=288),
        llm=GemmaConfig(1024, 8, 7168, num_heads=8, num_kv_heads=1, head_dim=128, vocab_size=20_000),
        expert=GemmaConfig(256, 8, 512, num_heads=8, num_kv_heads=1, head_dim=128),
    )
    directory = write_openpi(tmp_path, config)
    assert json.loads((directory / "config.json").read_text())["llm"]["width"] == 1024
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(directory)], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    packed, table, peak = (int(word) for word in run.stdout.split())
    assert packed > 3e8 and table > 8e7
    assert peak <= 1.3 * packed, f"{peak / packed:.2f} times the packed weights"


def test_the_heap_is_as_glibc_would_have_left_it() -> None:
    """The limits are set while weights are packed and after, also where packing fails."""
    calls: list[tuple[int, int]] = []

    class Library:
        def mallopt(self, name: int, value: int) -> int:
            calls.append((name, value))
            return 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heap.ctypes, "CDLL", lambda name: Library())
        with pytest.raises(KeyError), heap.freed_blocks_return():
            assert calls == [(-3, 1 << 20)]
            raise KeyError
        assert calls[1:] == [(-3, 32 << 20), (-1, 64 << 20)]
        patch.setattr(heap.ctypes, "CDLL", lambda name: object())  # another C library
        with heap.freed_blocks_return():
            assert len(calls) == 3
