"""Where the packages lie and how the extension is built; all else is in pyproject.toml.

``pi0_engine._C`` needs a C++17 compiler and Python's headers, not torch. Without them the package installs all the
same and runs its Python fallback, which says so. With nvcc (CUDA_HOME's, else on PATH, else in /usr/local/cuda) the
extension also holds the CUDA kernels of csrc/*.cu, and still imports where there is no driver. PI0_ENGINE_CUDA=0 leaves
them out.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_packages, setup

#: Importable package -> its folder here.
PACKAGE_DIR = {"pi0_engine": "python/pi0_engine", "pi0_engine.kernels": "kernels", "pi0_engine.engine": "engine"}

#: GPUs to compile for, as far as nvcc knows them: A100, RTX 30, Orin, RTX 40, H100, B200, Thor, RTX 50.
CUDA_ARCHITECTURES = (80, 86, 87, 89, 90, 100, 110, 120)
#: Like the C++ flags below: no fused multiply-add, so that a GPU rounds as a CPU does.
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "--threads=2", "-Xcompiler=-fPIC,-fvisibility=hidden"]


def all_packages() -> list[str]:
    """The three packages above and every package below them."""
    nested = [f"{name}.{child}" for name, folder in PACKAGE_DIR.items() for child in find_packages(folder)]
    return [*PACKAGE_DIR, *nested]


def find_nvcc() -> str | None:
    """CUDA_HOME says which CUDA is meant; without it, whatever is there."""
    if os.environ.get("PI0_ENGINE_CUDA") == "0":
        return None
    if home := os.environ.get("CUDA_HOME"):
        return shutil.which("nvcc", path=f"{home}/bin")
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class BuildExtension(build_ext):
    """Leaves the extension out where it cannot be built. An error in our C++ or CUDA code still fails the build."""

    def build_extensions(self) -> None:
        missing = self._missing_tool()
        if missing is None:
            for extension in self.extensions:
                self._add_cuda(extension)
            super().build_extensions()
        else:
            self.extensions.clear()
            logging.warning("pi0_engine is installed without its C++ extension: %s", missing)

    def _missing_tool(self) -> str | None:
        if self.compiler.compiler_type != "unix":
            return None
        compiler = self.compiler.compiler_cxx[0]
        if shutil.which(compiler) is None:
            return f"no C++ compiler ({compiler!r} is not on PATH; CXX names another)"
        header = Path(sysconfig.get_paths()["include"], "Python.h")
        if not header.exists():
            return f"Python's C headers are missing ({header}; Debian and Ubuntu: apt install python3-dev)"
        return None

    def _add_cuda(self, extension: Pybind11Extension) -> None:
        """Compile csrc/*.cu and link it to ``extension``, if there is an nvcc."""
        nvcc = find_nvcc()
        known = set(re.findall(r"sm_(\d+)\b", run(nvcc, "--list-gpu-code"))) if nvcc else set()
        targets = [number for number in CUDA_ARCHITECTURES if str(number) in known]
        if nvcc is None or not targets:
            why = f"{nvcc} knows none of {CUDA_ARCHITECTURES}" if nvcc else "no nvcc"
            logging.warning("pi0_engine._C is built without CUDA kernels: %s", why)
            return
        code = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in targets]
        code.append(f"-gencode=arch=compute_{targets[-1]},code=compute_{targets[-1]}")  # PTX, for later GPUs
        os.makedirs(self.build_temp, exist_ok=True)
        for source in sorted(Path("csrc").glob("*.cu")):
            made = os.path.join(self.build_temp, f"{source.stem}.cu.o")
            self.spawn([nvcc, *NVCC_FLAGS, *code, "-c", str(source), "-o", made])
            extension.extra_objects.append(made)
        # nvcc itself knows best where its libraries are; it says so on stderr.
        plan = subprocess.run([nvcc, "--dryrun", made], check=True, capture_output=True, text=True).stderr
        extension.library_dirs += dict.fromkeys(re.findall(r'"-L([^"]+)"', plan))
        # The runtime stays private to the extension: torch brings one of its own, often of another version.
        extension.extra_link_args += ["-lcudart_static", "-ldl", "-lrt", "-Wl,--exclude-libs,ALL"]
        extension.define_macros.append(("PI0_CUDA_ARCHITECTURES", ",".join(map(str, targets))))


setup(
    package_dir=PACKAGE_DIR,
    packages=all_packages(),
    ext_modules=[
        Pybind11Extension(
            "pi0_engine._C",
            sources=sorted(str(path) for path in Path("csrc").glob("*.cpp")),
            depends=sorted(str(path) for path in Path("csrc").glob("*") if path.suffix in (".h", ".cu")),
            cxx_std=17,
            # No fused multiply-add: every processor rounds the resampling weights alike.
            extra_compile_args=["-O3", "-Wall", "-Wextra", "-ffp-contract=off"],
            extra_link_args=["-pthread"],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
