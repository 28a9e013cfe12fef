"""Compile launches for a GPU that is not there, and read what became of them: registers, spills, shared memory.

Triton itself specialises the arguments, so what is compiled is the very instance that would run. Needs no GPU and no
CUDA toolkit: Triton brings ptxas and cuobjdump.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import re
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tqdm import tqdm

from pi0_engine.kernels.gpu.launch import Launch
from pi0_engine.kernels.gpu.target import Target

#: Columns of tensor memory on the GPUs that have it (sm_100, sm_110); one block may take them all.
TENSOR_COLUMNS = 512


@dataclass(frozen=True)
class Compiled:
    """One kernel instance on one target.

    Attributes:
        key: what Triton tells instances apart by; see :func:`instance_key`.
        registers: per thread.
        spill_bytes: written to and read from local memory, per thread, because registers ran out.
        stack_bytes: local memory per thread, for spills and for arrays that are indexed at run time.
        shared_bytes: per block; tensor_columns: columns of tensor memory per block, 0 where there is none.
        seconds: to compile it; None if Triton's cache had it.
    """

    target: Target
    key: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    tensor_columns: int
    seconds: float | None

    @property
    def problem(self) -> str | None:
        """Why it must not be shipped, or None."""
        problems = []
        if self.shared_bytes > self.target.shared_bytes:
            limit = f"{self.target.shared_bytes / 1024:.0f}"
            problems.append(f"takes {self.shared_bytes / 1024:.1f} KiB of shared memory of {limit}")
        if self.tensor_columns > TENSOR_COLUMNS:
            problems.append(f"takes {self.tensor_columns} columns of tensor memory of {TENSOR_COLUMNS}")
        if self.spill_bytes:
            problems.append(f"spills {self.spill_bytes} bytes")
        return " and ".join(problems) or None


@dataclass(frozen=True)
class Outcome:
    """What became of one launch: ``compiled``, or else ``error`` says why it does not compile."""

    launch: Launch
    target: Target
    compiled: Compiled | None
    error: str | None = None

    @property
    def problem(self) -> str | None:
        """Why it must not be shipped, or None."""
        return self.compiled.problem if self.compiled else f"does not compile: {self.error}"


def triton_version() -> str:
    """Version of the installed Triton.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import triton
    except ImportError as error:
        raise ValueError("compiling kernels needs Triton: pip install 'pi0-engine[gpu]'") from error
    return str(triton.__version__)


@lru_cache
def why_not(target: Target) -> str | None:
    """Why this Triton cannot compile for ``target``, or None: its ptxas may be older than the GPU."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    tool, name = get_ptxas(target.arch), sm_arch_from_capability(target.arch)
    if f"'{name}'" in _output_of(tool.path, "--help"):
        return None
    variable = "TRITON_PTXAS_PATH" if target.arch < 90 else "TRITON_PTXAS_BLACKWELL_PATH"
    return f"Triton {triton_version()} uses ptxas {tool.version}, which does not know {name} ({variable} names another)"


def instance_key(launch: Launch, target: Target) -> str:
    """Launches with the same key run the same compiled kernel: Triton's specialisation of the arguments, and options.

    Raises:
        ValueError: the kernel was imported for Triton's interpreter.
    """
    _check_compilable(launch)
    with _pretending_to_be(target):
        binder = launch.kernel.device_caches[target.arch][-1]
        _, specialization, options = binder(**launch.arguments, **launch.options)
    return f"{launch.kernel.__module__}.{launch.kernel.__qualname__} {specialization} {options}"


def compile_launch(launch: Launch, target: Target) -> Compiled:
    """Compile for ``target``, or find it in Triton's cache. Nothing is loaded or run.

    Raises:
        ValueError: the kernel was imported for Triton's interpreter.
        Exception: whatever Triton raises on a kernel that it cannot compile.
    """
    from triton import knobs

    key = instance_key(launch, target)
    cached = False

    def listener(*, cache_hit: bool, **_: Any) -> None:
        nonlocal cached
        cached = cache_hit

    # Triton prints a PTX file that ptxas refuses; the exception says enough.
    with _pretending_to_be(target), knobs.compilation.scope(), contextlib.redirect_stdout(io.StringIO()):
        knobs.compilation.listener = listener
        start = time.perf_counter()
        kernel = launch.kernel.warmup(grid=launch.grid, **launch.arguments, **launch.options)
        seconds = time.perf_counter() - start
    registers, stack = _resources(kernel.asm["cubin"])
    return Compiled(
        target=target,
        key=key,
        registers=registers,
        spill_bytes=_spill_bytes(kernel) if stack else 0,
        stack_bytes=stack,
        shared_bytes=kernel.metadata.shared,
        tensor_columns=kernel.metadata.tmem_size or 0,
        seconds=None if cached else seconds,
    )


def compile_all(
    jobs: Iterable[tuple[Launch, Target]], *, processes: int = 1, progress: bool = False
) -> Iterator[tuple[int, Outcome]]:
    """:func:`compile_launch` for every job, in as many processes: yields (number of the job, outcome) as they end."""
    jobs = list(jobs)
    # Forked, because a kernel defined at run time and a tensor descriptor cannot be sent to another process.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, context, initializer=_take, initargs=(jobs,)) as pool:
        running = {pool.submit(_compile_job, number): number for number in range(len(jobs))}
        for done in tqdm(as_completed(running), "compiling", len(jobs), disable=not progress, leave=False):
            number = running[done]
            try:
                compiled, error = done.result()
            except BrokenProcessPool:
                compiled, error = None, "the compiler crashed, on this kernel or on one beside it"
            yield number, Outcome(*jobs[number], compiled, error)


_jobs: list[tuple[Launch, Target]] = []


def _take(jobs: list[tuple[Launch, Target]]) -> None:
    """In a process of the pool: what job numbers refer to."""
    _jobs[:] = jobs


def _compile_job(number: int) -> tuple[Compiled | None, str | None]:
    try:
        return compile_launch(*_jobs[number]), None
    except Exception as error:  # the compiler's many ways to fail are results here
        return None, f"{type(error).__name__}: {_essence(str(error))}"


def _essence(message: str) -> str:
    """Of a message that quotes a ptxas log, the first line that says what is wrong."""
    said = [line.strip() for line in message.splitlines() if re.match(r"ptxas.*(error|fatal) *:", line)]
    return said[0] if said else message.strip()


def _check_compilable(launch: Launch) -> None:
    triton_version()
    from triton.runtime.jit import JITFunction

    if not isinstance(launch.kernel, JITFunction):
        raise ValueError(
            f"op {launch.op!r}: {launch.kernel!r} was imported for Triton's interpreter and cannot be compiled; "
            "start without TRITON_INTERPRET=1"
        )


class _AbsentGpu:
    """What Triton asks its driver for in order to compile. Its caches are per device, so the device is the target."""

    def __init__(self, target: Target) -> None:
        self._arch = target.arch

    def get_current_device(self) -> int:
        return self._arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._arch, warp_size=32)


@contextlib.contextmanager
def _pretending_to_be(target: Target) -> Iterator[None]:
    from triton.runtime.driver import driver

    before = driver._active  # driver.active would look for a GPU; None lets it look when it is next needed
    driver.set_active(_AbsentGpu(target))
    try:
        yield
    finally:
        driver.set_active(before)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of stack, per thread."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output_of(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
    found = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
    if not found:
        raise RuntimeError(f"cuobjdump -res-usage said {usage!r}")
    return max(int(registers) for registers, _ in found), sum(int(stack) for _, stack in found)


def _spill_bytes(kernel: Any) -> int:
    """Stores plus loads, from ptxas under Triton's own flags: they change what spills. As slow as ptxas is."""
    from triton import knobs
    from triton.compiler.compiler import make_backend

    target = kernel.metadata.target
    backend, log = make_backend(target), io.StringIO()
    options = backend.parse_options(kernel.metadata._asdict())
    with knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        backend.make_cubin(kernel.asm["ptx"], {}, options, target.arch)
    found = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log.getvalue())
    if not found:
        raise RuntimeError(f"ptxas said {log.getvalue()!r}")
    return sum(int(stores) + int(loads) for stores, loads in found)


def _output_of(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout
