"""Which implementation of an op runs, and how that is said."""

from __future__ import annotations

import ast
import copy
import dataclasses
import inspect
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import pytest
import torch

from pi0_engine.kernels import availability
from pi0_engine.kernels.availability import UNAVAILABLE
from pi0_engine.kernels.gpu.launch import Launcher
from pi0_engine.kernels.linear import linear
from pi0_engine.kernels.registry import REGISTRY, Choice, Cost, Op, all_ops, nbytes, op, select_ops
from tests.support.paths import ROOT

CPU, CUDA, META = (torch.device(name) for name in ("cpu", "cuda", "meta"))
KERNELS = ROOT / "kernels"


@dataclasses.dataclass
class Implementations:
    """Stand-ins for real ones: ``reasons`` says why one is unavailable, ``calls`` keeps what they were called with."""

    reasons: dict[str, str | None] = dataclasses.field(default_factory=dict)
    calls: list[tuple[str, str, tuple[Any, ...]]] = dataclasses.field(default_factory=list)

    def module(self, implementation: str) -> ModuleType:
        module = ModuleType(f"pi0_engine.kernels.fake_{implementation}")
        for name in all_ops():
            setattr(module, name, self._function(implementation, name))
        return module

    def _function(self, implementation: str, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: self.calls.append((implementation, name, args))


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Implementations:
    """Every op has "triton", and ``linear`` "flash_attn" behind it; both are available until a reason is set."""
    made = Implementations()
    for implementation in ("triton", "flash_attn"):
        monkeypatch.setitem(sys.modules, f"pi0_engine.kernels.fake_{implementation}", made.module(implementation))
        monkeypatch.setitem(UNAVAILABLE, implementation, lambda device, name=implementation: made.reasons.get(name))
    for name, entry in all_ops().items():
        modules = {"triton": "fake_triton", **({"flash_attn": "fake_flash_attn"} if name == "linear" else {})}
        monkeypatch.setitem(REGISTRY, name, dataclasses.replace(entry, implementations=modules))
    return made


def chosen(ops: Any) -> dict[str, tuple[str, str]]:
    return {choice.op: (choice.implementation, choice.reason) for choice in ops.choices}


def test_the_ops_of_the_engine() -> None:
    assert sorted(all_ops()) == [
        "embed_prompt",
        "frames_to_patches",
        "layernorm_linear",
        "linear",
        "linear_residual",
        "patch_embed",
        "prefix_attention",
        "rmsnorm_geglu",
        "rmsnorm_linear_euler",
        "rmsnorm_linear_second_order",
        "rmsnorm_mlp_residual",
        "rmsnorm_qkv_rope",
        "suffix_attention",
        "vision_attention",
    ]
    assert all(isinstance(entry, Op) and entry.meaning.__doc__ for entry in all_ops().values())


@pytest.mark.parametrize("name", sorted(all_ops()))
def test_cost_and_implementations_take_the_arguments_of_the_meaning(name: str) -> None:
    """Implementations take a launcher in front; they are read, not imported, because they need packages."""
    entry = all_ops()[name]
    wanted = parameters(inspect.signature(entry.meaning).parameters)
    assert parameters(inspect.signature(entry.cost).parameters) == wanted
    assert next(iter(entry.implementations)) == ("cuda" if name == "frames_to_patches" else "triton")
    for module in entry.implementations.values():
        path = KERNELS.joinpath(*module.split(".")).with_suffix(".py")
        functions = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef) and n.name == name]
        assert len(functions) == 1, f"{path} has no function {name}"
        arguments = functions[0].args
        assert arguments.args[0].arg == "launcher"
        assert [a.arg for a in arguments.args[1:]] == wanted[0] and [a.arg for a in arguments.kwonlyargs] == wanted[1]


def parameters(signature: Mapping[str, inspect.Parameter]) -> tuple[list[str], list[str]]:
    """Names by position, and by keyword only."""
    keyword = [name for name, p in signature.items() if p.kind == inspect.Parameter.KEYWORD_ONLY]
    return [name for name in signature if name not in keyword], keyword


def test_torch_takes_the_meanings() -> None:
    ops = select_ops("torch", CPU)
    assert ops.linear is linear
    assert set(chosen(ops)) == set(all_ops())
    assert set(chosen(ops).values()) == {("torch", "asked for by name")}
    assert ops.launcher is None


def test_only_what_is_chosen_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = dataclasses.replace(all_ops()["linear"], implementations={"triton": "no_such_module"})
    monkeypatch.setitem(REGISTRY, "linear", changed)
    monkeypatch.setitem(UNAVAILABLE, "triton", lambda device: "no GPU")
    assert select_ops("torch", META).linear is select_ops("auto", META).linear is linear
    monkeypatch.setitem(UNAVAILABLE, "triton", lambda device: None)
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        select_ops("auto", META, prefer={name: "torch" for name in all_ops() if name != "linear"})


def test_auto_without_alternatives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REGISTRY, "linear", dataclasses.replace(all_ops()["linear"], implementations={}))
    for device in (CPU, META):
        monkeypatch.setitem(UNAVAILABLE, "triton", lambda device: "no GPU")
        assert chosen(select_ops("auto", device))["linear"] == ("torch", "the only implementation")


def test_auto_on_a_cpu_takes_the_meanings(fakes: Implementations) -> None:
    """Even where Triton's interpreter would run: nobody gets it without asking."""
    fakes.reasons["flash_attn"] = "no GPU"
    ops = select_ops("auto", CPU)
    assert ops.linear is linear and ops.launcher is None
    assert chosen(ops)["linear"] == ("torch", "triton: it is for GPUs; flash_attn: no GPU")
    assert chosen(ops)["patch_embed"] == ("torch", "triton: it is for GPUs")


def test_auto_takes_what_is_available(fakes: Implementations) -> None:
    """A function of the op's name in the module, called with the launcher in front."""
    ops = select_ops("auto", META)
    assert set(chosen(ops).values()) == {("triton", "fastest available")}
    ops.linear(1, 2, out=3)
    assert fakes.calls == [("triton", "linear", (ops.launcher, 1, 2))]


def test_auto_says_what_it_passed_over(fakes: Implementations) -> None:
    fakes.reasons["triton"] = "no GPU"
    ops = select_ops("auto", META)
    assert chosen(ops)["linear"] == ("flash_attn", "triton: no GPU; fastest available")
    assert chosen(ops)["patch_embed"] == ("torch", "triton: no GPU")
    assert ops.patch_embed is all_ops()["patch_embed"].meaning
    fakes.reasons["flash_attn"] = "not installed"
    ops = select_ops("auto", META)
    assert ops.linear is linear
    assert Choice("linear", "torch", "triton: no GPU; flash_attn: not installed") in ops.choices


def test_availability_is_asked_about_the_device(fakes: Implementations, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(UNAVAILABLE, "triton", lambda device: f"not on {device}")
    assert chosen(select_ops("auto", META))["patch_embed"] == ("torch", "triton: not on meta")


def test_a_named_backend_is_taken(fakes: Implementations) -> None:
    ops = select_ops("triton", CPU)
    assert set(chosen(ops).values()) == {("triton", "asked for by name")}


def test_a_named_backend_that_is_unavailable_says_why(fakes: Implementations) -> None:
    fakes.reasons["triton"] = "no GPU"
    with pytest.raises(ValueError, match=r"^backend 'triton' cannot run op '\w+' on cpu: no GPU$"):
        select_ops("triton", CPU)


def test_an_unknown_backend_says_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"backend 'vulkan' .*no such implementation \(it has \['torch', '\w+'"):
        select_ops("vulkan", CPU)


def test_an_op_without_the_named_backend_chooses_by_itself(fakes: Implementations) -> None:
    """Only ``linear`` has flash-attn here; the others take what "auto" would."""
    ops = select_ops("flash_attn", META)
    assert chosen(ops)["linear"] == ("flash_attn", "asked for by name")
    assert chosen(ops)["patch_embed"] == ("triton", "fastest available")


def test_prefer_names_another_implementation_of_single_ops(fakes: Implementations) -> None:
    ops = select_ops("triton", CPU, prefer={"linear": "flash_attn", "patch_embed": "torch"})
    others = {name: choice for name, choice in chosen(ops).items() if name not in ("linear", "patch_embed")}
    assert set(others.values()) == {("triton", "asked for by name")}
    assert chosen(ops)["linear"] == ("flash_attn", "asked for by name")
    ops.linear(1)
    assert fakes.calls == [("flash_attn", "linear", (ops.launcher, 1))]
    assert ops.patch_embed is all_ops()["patch_embed"].meaning
    ops = select_ops("torch", META, prefer={"linear": "auto"})
    assert chosen(ops)["linear"] == ("triton", "fastest available")
    assert ops.launcher is not None


def test_a_preference_that_cannot_be_met_is_refused(fakes: Implementations) -> None:
    fakes.reasons["flash_attn"] = "not installed"
    with pytest.raises(ValueError, match="backend 'flash_attn' cannot run op 'linear' on cpu: not installed"):
        select_ops("torch", CPU, prefer={"linear": "flash_attn"})
    with pytest.raises(ValueError, match=r"'flash_attn' cannot run op 'patch_embed' .*it has \['torch', 'triton'\]"):
        select_ops("torch", CPU, prefer={"patch_embed": "flash_attn"})
    with pytest.raises(ValueError, match=r"there is no op 'linera'; the ops are \['embed_prompt'"):
        select_ops("torch", CPU, prefer={"linera": "torch"})


def test_the_launcher_is_the_callers_or_for_the_device_at_hand(fakes: Implementations) -> None:
    """In the interpreter programs run one after another; whoever is asked about sm_90 records for an H100."""
    made = select_ops("triton", CPU).launcher
    assert isinstance(made, Launcher) and not made.concurrent and made.target.arch == 90
    recorded = select_ops("triton", META).launcher
    assert recorded is not None and recorded.concurrent
    assert select_ops("triton", CPU, made).launcher is made
    ops = select_ops("triton", META, made)
    ops.patch_embed()
    assert fakes.calls == [("triton", "patch_embed", (made,))]


def test_an_op_is_registered_once_and_with_known_implementations() -> None:
    def linear() -> None: ...

    def another() -> None: ...

    with pytest.raises(AssertionError, match="op linear is registered twice"):
        op(cost=lambda: Cost(0, 0))(linear)
    with pytest.raises(AssertionError, match="vulkan"):
        op(cost=lambda: Cost(0, 0), vulkan="gpu.linear")(another)
    assert "another" not in REGISTRY


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reason = UNAVAILABLE["triton"](CPU)
    assert reason == "on a CPU it only runs in Triton's slow interpreter, with TRITON_INTERPRET=1"
    with pytest.raises(ValueError, match=r"backend 'triton' cannot run op '\w+' on cpu: on a CPU it only runs in"):
        select_ops("triton", CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert UNAVAILABLE["triton"](CPU) is None


@pytest.mark.parametrize(("name", "package"), [("triton", "Triton"), ("flash_attn", "flash-attn")])
def test_what_is_not_installed_says_how_to_install_it(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "find_spec", lambda module: None)
    extra = {"triton": "gpu", "flash_attn": "flash-attn"}[name]
    for device in (CPU, CUDA, META):
        assert UNAVAILABLE[name](device) == f"{package} is not installed (pip install 'pi0-engine[{extra}]')"


def test_what_is_installed_needs_a_gpu_that_is_new_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "find_spec", lambda module: module)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert UNAVAILABLE["triton"](META) is None, "launches are recorded on meta"
    assert UNAVAILABLE["flash_attn"](META) == "it needs a CUDA GPU, the device is 'meta'"
    assert UNAVAILABLE["flash_attn"](CPU) == "it needs a CUDA GPU, the device is 'cpu'"
    for name in ("triton", "flash_attn"):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert UNAVAILABLE[name](CUDA) == "it needs compute capability 8.0 or newer, Tesla T4 has 7.5"
        for capability in ((8, 0), (8, 9), (12, 0)):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
            assert UNAVAILABLE[name](CUDA) is None


def test_an_unknown_op_is_named() -> None:
    with pytest.raises(AttributeError, match=r"there is no op 'softmax'; the ops are \['embed_prompt'"):
        _ = select_ops("torch", CPU).softmax


def test_the_table_can_be_copied() -> None:
    assert copy.deepcopy(select_ops("torch", CPU)).linear is linear


def test_cost_and_bytes() -> None:
    assert Cost(1, 2) + Cost(10, 20) == Cost(11, 22)
    assert nbytes(torch.zeros(3, dtype=torch.bfloat16), None, torch.zeros(2, 2)) == 6 + 16
