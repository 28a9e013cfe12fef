"""The architecture as a test: imports go one way, and what is optional is imported only where it is used."""

from __future__ import annotations

import ast
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

#: Folder -> package, as setup.py maps them.
FOLDERS = {"python/pi0_engine": "pi0_engine", "engine": "pi0_engine.engine", "kernels": "pi0_engine.kernels"}

#: Folder or module -> what of the project it may import, wherever in it: folders, or modules of one. Itself always.
ROOMS = {
    "config": (),
    "torch_needed": (),
    "images": ("_C",),
    "inputs": ("config", "images"),
    "checkpoints": ("config",),
    "text": ("config", "checkpoints.folder"),
    "robots": ("config", "images", "inputs", "text", "checkpoints.folder"),
    "rtc": ("config", "robots"),
    # The oracle shares no code with what it judges.
    "reference": ("config",),
    "kernels": ("config", "_C"),
    "engine": ("config", "images", "inputs", "rtc.guidance", "checkpoints.parameters", "kernels"),
    "policy": ("config", "torch_needed", "inputs", "text", "robots", "rtc", "checkpoints", "engine"),
    "model_options": ("config", "torch_needed", "text", "robots", "rtc", "checkpoints", "engine", "policy"),
    "recording": ("robots", "rtc", "policy"),
    "serving": ("config", "torch_needed", "inputs", "robots", "rtc", "policy", "model_options", "recording"),
    "client": ("config", "inputs", "text", "robots", "rtc", "policy", "serving.wire"),
    "measuring": (
        *("config", "images", "inputs", "text", "robots", "reference", "checkpoints", "kernels", "engine", "policy"),
        "serving",
    ),
    "demo": (
        *("config", "text", "robots", "rtc", "reference", "checkpoints", "engine", "policy"),
        "measuring",
    ),
    "integrations": ("config", "inputs", "rtc", "checkpoints", "engine"),
    "commands": (
        *("config", "torch_needed", "images", "text", "robots", "rtc", "reference", "checkpoints", "kernels", "engine"),
        *("policy", "model_options", "recording", "serving", "client", "measuring", "demo"),
    ),
    "cli": ("torch_needed", "commands"),
}

#: Of a robot's computer: numpy arrays, no torch. Nothing that is imported with these imports torch or Triton.
WITHOUT_TORCH = (
    *("config", "torch_needed", "images", "inputs", "text", "robots", "rtc", "policy", "model_options", "recording"),
    *("serving", "client", "commands", "cli", "checkpoints.folder"),
)
#: Of them, what starts an engine: torch is imported in its functions, where it is needed.
STARTS_AN_ENGINE = ("policy", "model_options", "torch_needed", "commands")

#: They import in functions what imports them.
FIRST_USED_LATER = ("pi0_engine", "pi0_engine.kernels.registry")

#: Imported inside functions only, with an error that names the extra.
OPTIONAL = (
    "fastapi",
    "flash_attn",
    "flax",
    "imageio",
    "jax",
    "jaxlib",
    "lerobot",
    "matplotlib",
    "metaworld",
    "msgpack",
    "mujoco",
    "orbax",
    "prometheus_client",
    "ray",
    "rerun",
    "scipy",
    "starlette",
    "tensorstore",
    "transformers",
    "triton",
    "uvicorn",
    "websockets",
    "zstandard",
)


#: Kernels are written in Triton, so these import it; ``Op.load`` imports them when their implementation is chosen.
KERNELS_IN_TRITON = "pi0_engine.kernels.gpu"
#: What tells about GPUs and launches without Triton: a machine without it imports these.
WITHOUT_TRITON = ("", ".configs", ".cross_compile", ".launch", ".operands", ".target")


def modules() -> dict[str, Path]:
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if parts[0] != "data":  # scripts that made data files
                found[".".join([package, *(p for p in parts if p != "__init__")])] = path
    return found


MODULES = modules()


@functools.cache
def imports(path: Path, *, top_level: bool) -> frozenset[str]:
    """Full names that a file imports: at import time only, or anywhere in it. ``if TYPE_CHECKING`` does not count."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; the project imports absolutely"
            assert node.module is not None
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in MODULES else node.module)
        deferred = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and top_level
        if deferred or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return frozenset(found)


def within(name: str, place: str) -> bool:
    """Whether a module is that one, or in that folder; both without the package's name."""
    return name == place or name.startswith(f"{place}.")


def short(module: str) -> str:
    return module.removeprefix("pi0_engine.")


def room(module: str) -> str:
    return short(module).partition(".")[0]


def project_imports(module: str, *, top_level: bool = False) -> set[str]:
    found = imports(MODULES[module], top_level=top_level)
    return {name for name in found if name.split(".")[0] == "pi0_engine"}


def test_there_are_modules() -> None:
    assert {"pi0_engine", "pi0_engine.reference.model", "pi0_engine.engine.runtime", "pi0_engine.kernels.gemm"} <= set(
        MODULES
    )


@pytest.mark.parametrize("module", [name for name in MODULES if name != "pi0_engine"])
def test_a_module_imports_what_its_room_may(module: str) -> None:
    assert room(module) in ROOMS, f"{module} is in no room: say in {__file__} what it may import"
    allowed = (room(module), *ROOMS[room(module)])
    extra = {
        name
        for name in project_imports(module)
        if name != "pi0_engine" and not any(within(short(name), place) for place in allowed)
    }
    assert not extra, f"{module} may import {allowed}, not {sorted(extra)}"


def test_every_room_is_there() -> None:
    assert set(ROOMS) == {room(module) for module in MODULES if module != "pi0_engine"}


def test_rooms_are_in_no_circle() -> None:
    """Each names only rooms above it in the table, so that there is an order; functions' imports count too."""
    seen = {"_C"}
    for name, allowed in ROOMS.items():
        below = {place.partition(".")[0] for place in allowed}
        assert below <= seen, f"{name} may import {sorted(below - seen)}, which come after it"
        seen.add(name)


def loaded_with(module: str) -> set[str]:
    """The project's modules that are imported with this one, packages of packages too."""
    found, waiting = set[str](), [module]
    while waiting:
        name = waiting.pop()
        parents = {name.rpartition(".")[0]} - {""}
        if name not in found:
            found.add(name)
            waiting += (project_imports(name, top_level=True) & set(MODULES)) | (parents & set(MODULES))
    return found


@pytest.mark.parametrize("module", [name for name in MODULES if any(within(short(name), w) for w in WITHOUT_TORCH)])
def test_a_robots_side_imports_no_torch(module: str) -> None:
    torch = {name for name in loaded_with(module) if torch_in(name, top_level=True)}
    assert not torch, f"{module} imports torch, by {sorted(torch)}"
    if not any(within(short(module), place) for place in STARTS_AN_ENGINE):
        assert not torch_in(module, top_level=False), f"{module} imports torch in a function"


def torch_in(module: str, *, top_level: bool) -> set[str]:
    named = {name.partition(".")[0] for name in imports(MODULES[module], top_level=top_level)}
    return named & {"torch", "triton"}


def test_the_rule_for_torch_can_fail() -> None:
    assert torch_in("pi0_engine.engine.runtime", top_level=True) == {"torch"}
    assert "pi0_engine.engine.plan" in loaded_with("pi0_engine.engine.runtime")
    assert torch_in("pi0_engine.torch_needed", top_level=False) and not torch_in(
        "pi0_engine.torch_needed", top_level=True
    )


def test_the_house_has_rooms() -> None:
    """What everybody meets first is on the ground floor; all else is in a folder of its kind."""
    ground = [name for name in MODULES if name.count(".") == 1 and MODULES[name].name != "__init__.py"]
    assert len(ground) <= 12, ground


@pytest.mark.parametrize("path", [*MODULES.values(), *sorted((ROOT / "tests").rglob("*.py"))], ids=str)
def test_files_are_short(path: Path) -> None:
    """A module is one idea. Tests of one idea may be longer."""
    limit = 600 if path.is_relative_to(ROOT / "tests") else 400
    assert len(path.read_text().splitlines()) <= limit


@pytest.mark.parametrize("package", [name for name, path in MODULES.items() if path.name == "__init__.py"])
def test_a_room_says_what_it_is(package: str) -> None:
    said = ast.get_docstring(ast.parse(MODULES[package].read_text()))
    assert said and "TODO" not in said


def test_nothing_imports_in_a_circle() -> None:
    """Not in functions either, but for ``kernels.registry``: it asks for the ops' modules when it is first used."""
    graph = {
        module: project_imports(module, top_level=module in FIRST_USED_LATER) & set(MODULES) - {module}
        for module in MODULES
    }
    done: set[str] = set()
    while len(done) < len(graph):
        ready = {module for module, needs in graph.items() if module not in done and needs <= done}
        assert ready, f"circle among {sorted(set(graph) - done)}"
        done |= ready


def may_import_at_the_top(module: str) -> set[str]:
    if module.startswith(f"{KERNELS_IN_TRITON}."):
        return set() if module.removeprefix(KERNELS_IN_TRITON) in WITHOUT_TRITON else {"triton"}
    return set()


@pytest.mark.parametrize("module", MODULES)
def test_optional_packages_are_imported_where_they_are_used(module: str) -> None:
    optional = set(OPTIONAL) - may_import_at_the_top(module)
    early = {name for name in imports(MODULES[module], top_level=True) if name.split(".")[0] in optional}
    assert not early, f"{module} imports {sorted(early)} at import time"


def test_the_rule_for_kernels_names_modules_that_exist() -> None:
    assert {KERNELS_IN_TRITON + name for name in WITHOUT_TRITON} <= set(MODULES)
    assert may_import_at_the_top("pi0_engine.kernels.gpu.tiles") == {"triton"}
    for module in ("pi0_engine.kernels.gpu.launch", "pi0_engine.kernels.gpu", "pi0_engine.kernels.linear"):
        assert may_import_at_the_top(module) == set()


@pytest.mark.parametrize("module", [name for name in MODULES if not may_import_at_the_top(name)])
def test_kernels_in_triton_are_imported_lazily(module: str) -> None:
    """At the top only by each other: everything else reaches them through the registry, or inside a function."""
    early = {name for name in project_imports(module, top_level=True) if may_import_at_the_top(name)}
    assert not early, f"{module} imports {sorted(early)} at import time"


LOADED = f"print(*sorted({set(OPTIONAL)!r} & {{m.partition('.')[0] for m in sys.modules}}))"


@pytest.mark.parametrize("module", ["pi0_engine.policy", "pi0_engine.cli", "pi0_engine.engine.trace"])
def test_importing_the_package_loads_nothing_optional(module: str) -> None:
    """As the interpreter sees it, other people's packages included."""
    script = f"import sys, {module}; {LOADED}"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd="/")
    assert run.stdout.split() == []


def test_an_engine_on_a_cpu_loads_nothing_optional() -> None:
    """Choosing its ops neither: Triton alone would be 70 MB and 0.3 s of every start."""
    imported = "import sys, torch; from pi0_engine.kernels.registry import select_ops"
    for choose in ("select_ops('auto', torch.device('cpu'))", "select_ops('torch', torch.device('cpu'))"):
        command = [sys.executable, "-c", f"{imported}; {choose}; {LOADED}"]
        run = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/", env=without_interpreter())
        assert run.stdout.split() == []


def without_interpreter() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@pytest.mark.parametrize("package", ["pi0_engine.kernels", "pi0_engine.engine"])
def test_package_files_are_only_docstrings(package: str) -> None:
    """Python started in the repository finds ``kernels/`` when a library asks for the package of that name on PyPI.

    transformers does, and catches ImportError only: there must be nothing in it that could fail otherwise.
    """
    body = ast.parse(MODULES[package].read_text()).body
    assert len(body) == 1 and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)


def test_transformers_can_be_imported_from_the_repository() -> None:
    script = "import transformers.models.gemma.modeling_gemma"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
