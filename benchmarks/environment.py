"""What is here: ``python benchmarks/environment.py`` prints the machine, what would run on it, and its ceilings."""

from __future__ import annotations

import json
import sys

import torch

from harness import clocks, describe_environment
from pi0_engine.config import EngineConfig
from pi0_engine.engine.choices import choose_ops
from pi0_engine.images.resize import FramePreprocessor
from pi0_engine.kernels.availability import unsafe_triton
from pi0_engine.kernels.gpu.configs import configs_for
from pi0_engine.kernels.gpu.target import target_of
from pi0_engine.measuring.benchmark import measure_ceilings


def main() -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(json.dumps(describe_environment(device), indent=2))
    frames = FramePreprocessor()
    print(f"frames: {frames.implementation}: {frames.reason}")
    try:
        from pi0_engine import _C

        print(f"extension: {_C.__file__}, {sorted(name for name in dir(_C) if not name.startswith('_'))}")
    except ImportError as error:
        print(f"extension: none ({error})")
    for choice in choose_ops(EngineConfig(device=str(device)), device).choices:
        print(f"op {choice.op}: {choice.implementation}: {choice.reason}")
    if device.type != "cuda":
        return 0
    target = target_of(device)
    print(f"target: {target}; launch configurations of sm_{configs_for(target.arch)[1]}")
    if unsafe := unsafe_triton(target.arch):
        print(f"UNSAFE: {unsafe}")
    print(f"clocks before: {clocks()}")
    ceilings = measure_ceilings(torch.bfloat16, device)
    print(f"clocks after: {clocks()}")
    print(
        f"{torch.cuda.get_device_name(device)}: {ceilings['flops_per_s'] / 1e12:.0f} TFLOP/s in bfloat16, "
        f"{ceilings['bytes_per_s'] / 1e12:.2f} TB/s measured"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
