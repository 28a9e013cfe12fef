"""The architecture as a test: imports go one way, and what is optional is imported only where it is used."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: Folder -> package, as setup.py maps them.
FOLDERS = {"python/pi0_engine": "pi0_engine", "engine": "pi0_engine.engine", "kernels": "pi0_engine.kernels"}

#: Layers from the bottom up. A module imports its own layer and lower ones. Prefixes; the longest match counts.
LAYERS = [
    ["pi0_engine.config"],
    [
        "pi0_engine.parameters",
        "pi0_engine.images",
        "pi0_engine.inputs",
        "pi0_engine.reference",
        "pi0_engine.rtc",
        "pi0_engine.kernels",
        "pi0_engine._C",
    ],
    [
        "pi0_engine.cases",
        "pi0_engine.checkpoint",
        "pi0_engine.frames",
        "pi0_engine.guards",
        "pi0_engine.hub",
        "pi0_engine.lora",
        "pi0_engine.normalization",
        "pi0_engine.observation",
        "pi0_engine.random_weights",
        "pi0_engine.robot",
        "pi0_engine.tokenizer",
        "pi0_engine.transforms",
        "pi0_engine.engine",
    ],
    [
        "pi0_engine.policy",
        "pi0_engine.benchmark",
        "pi0_engine.continuation",
        "pi0_engine.demo",
        "pi0_engine.op_calls",
        "pi0_engine.plots",
        "pi0_engine.profiling",
        "pi0_engine.recording",
        "pi0_engine.timing",
        "pi0_engine.tuning",
    ],
    [
        "pi0_engine.client",
        "pi0_engine.commands",
        "pi0_engine.cli",
        "pi0_engine.serving",
        "pi0_engine.integrations",
        "pi0_engine.__main__",
    ],
]

#: Only these project modules may be imported by those (prefixes on both sides; the first that matches a module counts).
ALLOWED = {
    "pi0_engine.config": (),
    "pi0_engine.parameters": ("pi0_engine.config",),
    "pi0_engine.inputs": ("pi0_engine.config", "pi0_engine.images"),
    "pi0_engine.rtc": (),
    # The oracle shares no code with what it judges.
    "pi0_engine.reference": ("pi0_engine.config", "pi0_engine.reference"),
    "pi0_engine.kernels": ("pi0_engine.config", "pi0_engine.kernels", "pi0_engine._C"),
    "pi0_engine.engine": (
        "pi0_engine.config",
        "pi0_engine.parameters",
        "pi0_engine.inputs",
        "pi0_engine.images",
        "pi0_engine.frames",
        "pi0_engine.kernels",
        "pi0_engine.engine",
    ),
}

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


def imports(path: Path, *, top_level: bool) -> set[str]:
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
    return found


def within(module: str, prefix: str) -> bool:
    """``pi0_engine.robots`` is within ``pi0_engine.robot``: a prefix stands for a family of files."""
    return module.startswith(prefix)


def layer(module: str) -> int:
    matches = [(len(p), level) for level, prefixes in enumerate(LAYERS) for p in prefixes if within(module, p)]
    assert matches, f"{module} is in no layer: add it to LAYERS in {__file__}"
    return max(matches)[1]


def project_imports(module: str, *, top_level: bool = False) -> set[str]:
    found = imports(MODULES[module], top_level=top_level)
    return {name for name in found if name.split(".")[0] == "pi0_engine"}


def test_there_are_modules() -> None:
    assert {"pi0_engine", "pi0_engine.reference", "pi0_engine.engine.runtime", "pi0_engine.kernels.gemm"} <= set(
        MODULES
    )


@pytest.mark.parametrize("module", [name for name in MODULES if name != "pi0_engine"])
def test_imports_go_down(module: str) -> None:
    upward = {name for name in project_imports(module) if name != "pi0_engine" and layer(name) > layer(module)}
    assert not upward, f"{module} imports from above: {sorted(upward)}"


@pytest.mark.parametrize("module", MODULES)
def test_the_core_imports_only_what_it_may(module: str) -> None:
    rule = next((rule for rule in ALLOWED if within(module, rule)), None)
    if rule is not None:
        extra = {name for name in project_imports(module) if not any(within(name, p) for p in ALLOWED[rule])}
        assert not extra, f"{module} may import {ALLOWED[rule]}, not {sorted(extra)}"


def test_nothing_imports_in_a_circle() -> None:
    """At import time. ``kernels.registry`` asks for the ops' modules when it is first used."""
    graph = {module: project_imports(module, top_level=True) & set(MODULES) - {module} for module in MODULES}
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
