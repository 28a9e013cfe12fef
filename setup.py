"""Where the packages lie and how the extension is built; all else is in pyproject.toml.

``pi0_engine._C`` needs a C++17 compiler and Python's headers, not torch. Without them the package installs all the
same and runs its Python fallback, which says so.
"""

from __future__ import annotations

import logging
import shutil
import sysconfig
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_packages, setup

#: Importable package -> its folder here.
PACKAGE_DIR = {"pi0_engine": "python/pi0_engine", "pi0_engine.kernels": "kernels", "pi0_engine.engine": "engine"}


def all_packages() -> list[str]:
    """The three packages above and every package below them."""
    nested = [f"{name}.{child}" for name, folder in PACKAGE_DIR.items() for child in find_packages(folder)]
    return [*PACKAGE_DIR, *nested]


class BuildExtension(build_ext):
    """Leaves the extension out where it cannot be built. An error in our C++ code still fails the build."""

    def build_extensions(self) -> None:
        missing = self._missing_tool()
        if missing is None:
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


setup(
    package_dir=PACKAGE_DIR,
    packages=all_packages(),
    ext_modules=[
        Pybind11Extension(
            "pi0_engine._C",
            sources=sorted(str(path) for path in Path("csrc").glob("*.cpp")),
            depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
            cxx_std=17,
            # No fused multiply-add: every processor rounds the resampling weights alike.
            extra_compile_args=["-O3", "-Wall", "-Wextra", "-ffp-contract=off"],
            extra_link_args=["-pthread"],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
