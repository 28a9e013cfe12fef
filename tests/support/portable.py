"""The numeric part of the suite under other instructions, threads, orders and loads: ``make test-portable``.

What a test expects must follow from the arithmetic, not from the machine it was written on: torch, oneDNN and OpenBLAS
take other kernels with other roundings on every family of processors. The settings here make one machine round like
others, as far as its instructions allow. Each runs in processes of its own; what it printed is in build/portable/.

A further setting is a line in :data:`SETTINGS`.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field

from tqdm import tqdm

from tests.support.paths import ROOT, TESTS

OUTPUT = ROOT / "build" / "portable"

#: Files whose tests compare numbers that floating-point arithmetic made, or count what comes of them.
NUMERIC = (
    "benchmarks/test_solver_error.py",
    "checkpoints/test_jax.py",
    "checkpoints/test_lora.py",
    "commands/test_replay.py",
    "csrc/test_[!c]*.py",
    "demo/test_[!c]*.py",
    "engine/test_*.py",
    "images/test_resize.py",
    "integrations/test_lerobot.py",
    "kernels/test_*.py",
    "kernels/gpu/test_[!ct]*.py",
    "measuring/test_cases.py",
    "parity/test_*.py",
    "reference/test_*.py",
    "robots/test_norm_stats.py",
    "robots/test_transforms.py",
    "rtc/test_continuation.py",
    "test_policy.py",
)
#: Tests in them that are about processes and files, and take long.
NOT_NUMERIC = ("any_number_of_processes", "another_seed", "eval_prints", "report_is_written", "peak_memory_of_loading")


@dataclass(frozen=True)
class Setting:
    """One way to run them.

    Attributes:
        environment: variables of the test processes.
        options: of pytest.
        threads: of each process.
        processes: of pytest-xdist.
        busy: so many further processes compute for nothing meanwhile.
    """

    environment: dict[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    threads: int = 1
    processes: int = 2
    busy: int = 0


SETTINGS = {
    "as it is": Setting(),
    "aten default": Setting({"ATEN_CPU_CAPABILITY": "default"}),
    "aten avx2": Setting({"ATEN_CPU_CAPABILITY": "avx2"}),
    "aten avx512": Setting({"ATEN_CPU_CAPABILITY": "avx512"}),
    "onednn avx2": Setting({"ONEDNN_MAX_CPU_ISA": "AVX2"}),
    "onednn avx512": Setting({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}),
    "openblas haswell": Setting({"OPENBLAS_CORETYPE": "Haswell"}),
    "openblas skylakex": Setting({"OPENBLAS_CORETYPE": "SkylakeX"}),
    "oldest of all": Setting(
        {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "OPENBLAS_CORETYPE": "Nehalem"}
    ),
    "2 threads": Setting(threads=2, processes=1),
    "4 threads": Setting(threads=4, processes=1),
    "any order": Setting(options=("-p", "randomly")),
    "beside two busy processes": Setting(busy=2),
}

_BUSY = "import numpy as np\na = np.ones((400, 400))\nwhile True: a @ a"


def run(name: str, options: list[str]) -> tuple[str, int]:
    """The closing line of pytest under a setting, and its exit status."""
    setting, log = SETTINGS[name], OUTPUT / f"{name.replace(' ', '-')}.log"
    files = sorted({path for pattern in NUMERIC for path in TESTS.glob(pattern)})
    environment = {**os.environ, **setting.environment, "OMP_NUM_THREADS": str(setting.threads)}
    command = [sys.executable, "-m", "pytest", "-q", "-n", str(setting.processes), "--dist", "loadfile"]
    command += ["--no-loadscope-reorder", "-k", " and ".join(f"not {part}" for part in NOT_NUMERIC)]
    with ExitStack() as stack, log.open("w") as out:
        for _ in range(setting.busy):
            busy = stack.enter_context(subprocess.Popen([sys.executable, "-c", _BUSY], env=environment))
            stack.callback(busy.kill)
        done = subprocess.run(
            [*command, *setting.options, *options, *map(str, files)], env=environment, stdout=out, stderr=out
        )
    closing = [line for line in log.read_text().splitlines() if re.search(r"\d+ (passed|failed|error)", line)]
    return closing[-1] if closing else f"no test was executed, see {log}", done.returncode


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", default=",".join(SETTINGS), help="some of them, with commas between")
    parser.add_argument("pytest", nargs="*", help="options of pytest, behind --")
    given = parser.parse_args(arguments)
    names = [name.strip() for name in given.settings.split(",")]
    if unknown := [name for name in names if name not in SETTINGS]:
        print(f"error: settings are {unknown}, expected some of {list(SETTINGS)}", file=sys.stderr)
        return 2
    OUTPUT.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in tqdm(names, unit="setting", disable=not sys.stderr.isatty()):
        started = time.monotonic()
        closing, status = run(name, given.pytest)
        tqdm.write(f"{name:26} {(time.monotonic() - started) / 60:5.1f} min  {closing}")
        sys.stdout.flush()
        if status:
            failed.append(name)
    if failed:
        print(f"FAILED under {len(failed)} of {len(names)} settings: {', '.join(failed)}; see {OUTPUT}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
