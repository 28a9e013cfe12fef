"""Every way to install the package, each into an environment of its own, used from two folders.

Nothing is downloaded: the environments borrow the dependencies of the one that runs the tests.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.support.nvcc import NVCC
from tests.support.paths import ROOT

#: Importable package -> its folder in the repository.
FOLDERS = {"pi0_engine": "python/pi0_engine", "pi0_engine.kernels": "kernels", "pi0_engine.engine": "engine"}
BORROWED = ("torch", "numpy", "PIL", "tyro", "safetensors", "tokenizers", "pip", "setuptools", "pybind11")

_compiler = (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "g++").split()[0]
HAS_NVCC = NVCC is not None and os.environ.get("PI0_ENGINE_CUDA") != "0"
CAN_COMPILE = shutil.which(_compiler) is not None and Path(sysconfig.get_paths()["include"], "Python.h").exists()

#: What a program that uses the installed package sees.
PROBE = """
import importlib, json, logging
logging.disable()
from pi0_engine.images.resize import FramePreprocessor
preprocess = FramePreprocessor()
names = ["pi0_engine", "pi0_engine.kernels", "pi0_engine.engine"]
print(json.dumps({
    "folders": {name: importlib.import_module(name).__path__[0] for name in names},
    "implementation": preprocess.implementation,
    "reason": preprocess.reason,
    "cuda": preprocess.implementation == "cpp" and bool(importlib.import_module("pi0_engine._C").cuda_architectures()),
}))
"""


@dataclass
class Installed:
    mode: str
    python: Path
    sources: Path

    def probe(self, cwd: Path) -> dict[str, Any]:
        result: dict[str, Any] = json.loads(run(self.python, "-c", PROBE, cwd=cwd))
        return result


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, cwd=cwd, env=env | environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} failed in {cwd}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def copy_sources(target: Path) -> Path:
    made = shutil.ignore_patterns("__pycache__", "*.so", "build", "dist", "*.egg-info", ".*")
    target.mkdir()
    for folder in ("python", "kernels", "engine", "csrc"):
        shutil.copytree(ROOT / folder, target / folder, ignore=made)
    for file in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / file, target)
    return target


def new_environment(folder: Path) -> Path:
    """An environment that sees the packages of this one, but not this one's pi0_engine (its .pth is not read)."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=folder).strip())
    homes = {str(Path(spec.origin).parent.parent) for name in BORROWED if (spec := find_spec(name)) and spec.origin}
    (site / "borrowed.pth").write_text("\n".join(sorted(homes)) + "\n")
    return python


def install(mode: str, folder: Path) -> Installed:
    folder.mkdir()
    sources = copy_sources(folder / "sources")
    python = new_environment(folder / "environment")
    pip = (python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed")
    if mode == "editable":
        run(*pip, "-e", ".", cwd=sources)
    elif mode == "directory":
        run(*pip, ".", cwd=sources)
    elif mode == "without CUDA":
        run(*pip, ".", cwd=sources, PI0_ENGINE_CUDA="0")
    elif mode == "without compiler":
        run(*pip, ".", cwd=sources, CXX="no-such-compiler")
    elif mode == "sdist, wheel":
        run(python, "-c", "from setuptools.build_meta import build_sdist; build_sdist('dist')", cwd=sources)
        (sdist,) = (sources / "dist").glob("*.tar.gz")
        run(python, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", sdist, cwd=folder)
        (wheel,) = folder.glob("*.whl")
        run(*pip, wheel, cwd=folder)
    return Installed(mode, python, sources)


MODES = ["editable", "directory", "sdist, wheel", "without CUDA", "without compiler"]


@pytest.fixture(scope="module")
def installations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Installed]:
    folder = tmp_path_factory.mktemp("install")
    with ThreadPoolExecutor(2) as pool:
        return {made.mode: made for made in pool.map(lambda mode: install(mode, folder / mode), MODES)}


@pytest.fixture(params=MODES)
def installed(request: pytest.FixtureRequest, installations: dict[str, Installed]) -> Installed:
    return installations[request.param]


def test_imports(installed: Installed, tmp_path: Path) -> None:
    """From another folder and from the repository root, where ``kernels`` and ``engine`` lie about."""
    home = installed.sources if installed.mode == "editable" else installed.python.parent.parent
    for place in (tmp_path, installed.sources):
        seen = installed.probe(place)
        for package, folder in seen["folders"].items():
            assert Path(folder).is_relative_to(home), f"{package} comes from {folder}"
        if CAN_COMPILE and installed.mode != "without compiler":
            assert seen["implementation"] == "cpp"
            assert seen["cuda"] == (HAS_NVCC and installed.mode != "without CUDA")
        else:
            assert seen["implementation"] == "pillow"
            assert "compiled at installation where a C++17 compiler" in seen["reason"]


def test_every_file_is_installed(installed: Installed, tmp_path: Path) -> None:
    folders = installed.probe(tmp_path)["folders"]
    for package, folder in FOLDERS.items():
        source = installed.sources / folder
        expected = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
        expected = {path for path in expected if "__pycache__" not in path.parts and path.suffix != ".so"}
        assert expected
        missing = [str(path) for path in expected if not (Path(folders[package]) / path).is_file()]
        assert not missing, f"{package} lacks {sorted(missing)}"


def test_command_line(installed: Installed, tmp_path: Path) -> None:
    assert "demo" in run(installed.python.parent / "pi0-engine", "--help", cwd=tmp_path)


@pytest.mark.skipif(not CAN_COMPILE, reason="there is no C++ compiler, or Python's headers are missing")
def test_the_extension_is_here_where_it_can_be_built() -> None:
    """The image tests skip the extension where it is absent; that must not hide a failed build."""
    assert find_spec("pi0_engine._C") is not None


def test_import_is_light(tmp_path: Path) -> None:
    """``import pi0_engine`` loads neither torch nor numpy."""
    code = "import sys, pi0_engine; pi0_engine.Pi0Config; print({'torch', 'numpy'} & set(sys.modules))"
    assert run(sys.executable, "-c", code, cwd=tmp_path).strip() == "set()"


def test_public_names() -> None:
    import pi0_engine

    for name in pi0_engine.__all__:
        assert getattr(pi0_engine, name).__name__ == name
        assert name in dir(pi0_engine)
    with pytest.raises(AttributeError, match="no attribute 'Pi1Policy'"):
        _ = pi0_engine.Pi1Policy


def test_kernels_folder_does_not_disturb_transformers() -> None:
    """From the repository root, ``import kernels`` finds our folder instead of PyPI's package of that name, which
    transformers looks for. It must find an empty package there and go on."""
    module = ast.parse((ROOT / "kernels" / "__init__.py").read_text())
    assert [type(node) for node in module.body] == [ast.Expr], "kernels/__init__.py must stay a docstring"
    code = "import kernels; from transformers import GemmaModel, SiglipVisionModel; print(kernels.__file__)"
    printed = run(sys.executable, "-c", code, cwd=ROOT)
    assert Path(printed.splitlines()[-1]) == ROOT / "kernels" / "__init__.py"
