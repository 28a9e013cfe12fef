"""The full-size engine on a GPU against openpi's recorded actions: ``python benchmarks/gpu_parity.py``.

Weights are generated from a seed, as the recording did it. The error allowed is the one of openpi's own bfloat16 mode.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from pathlib import Path

import torch

from harness import DrawnWeights
from pi0_engine.config import EngineConfig
from pi0_engine.engine.choices import resolve_device
from pi0_engine.engine.runtime import Engine

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.support import golden

#: Replays of the same inputs that must give the same bits.
_REPEATS = 20


def check(case: str, device: str, dtype: str) -> bool:
    """One case; prints what was found."""
    config, recorded = golden.config_of(case), golden.load(case)
    started = time.perf_counter()
    weights = DrawnWeights(config, 0, torch.float32)
    drawn = time.perf_counter()
    engine = Engine(weights, EngineConfig(device=device, dtype=dtype))  # type: ignore[arg-type]
    found = golden.error(engine, recorded)
    first = time.perf_counter()
    bound = golden.openpis_error(case) if dtype == "bfloat16" else 1e-4
    noise = recorded.noise[:, None]
    actions = [engine.infer(recorded.inputs, noise, num_steps=recorded.num_steps).actions for _ in range(_REPEATS)]
    same = all(torch.equal(actions[0], other) for other in actions)
    print(
        f"{case} {dtype}: relative L2 {found:.2e}, allowed {bound:.2e}; {_REPEATS} replays "
        f"{'equal' if same else 'DIFFER'}; weights drawn in {drawn - started:.1f} s, then "
        f"{first - drawn:.1f} s to the first actions",
        flush=True,
    )
    return found <= bound and same


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--cases", nargs="+", default=golden.FULL_SIZE, choices=list(golden.RECORDED))
    options = parser.parse_args()
    resolve_device(options.device)
    good = []
    for case in options.cases:
        good.append(check(case, options.device, options.dtype))
        gc.collect()
    print(f"{sum(good)} of {len(good)} cases within openpi's own error")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
