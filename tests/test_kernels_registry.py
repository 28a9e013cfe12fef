"""Which implementation of an op runs, and how that is said."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pi0_engine.kernels.linear import linear
from pi0_engine.kernels.registry import REGISTRY, Choice, Cost, Op, all_ops, nbytes, select_ops

CPU = torch.device("cpu")


@pytest.fixture
def add_triton(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str | None], Callable[..., None]]:
    """Give an op a second implementation, which is unavailable for a reason or available."""

    def add(name: str, reason: str | None) -> Callable[..., None]:
        def fast(*args: Any, **kwargs: Any) -> None: ...

        changed = dataclasses.replace(
            all_ops()[name], implementations={"triton": fast}, unavailable={"triton": lambda device: reason}
        )
        monkeypatch.setitem(REGISTRY, name, changed)
        return fast

    return add


def test_the_ops_of_the_engine() -> None:
    assert sorted(all_ops()) == [
        "layernorm_linear",
        "linear",
        "linear_residual",
        "patch_embed",
        "prefix_attention",
        "rmsnorm_geglu",
        "rmsnorm_linear_euler",
        "rmsnorm_qkv_rope",
        "suffix_attention",
        "vision_attention",
    ]
    assert all(isinstance(entry, Op) and entry.meaning.__doc__ for entry in all_ops().values())


def test_torch_takes_the_meanings() -> None:
    ops = select_ops("torch", CPU)
    assert ops.linear is linear
    assert {choice.op for choice in ops.choices} == set(all_ops())
    assert {(choice.implementation, choice.reason) for choice in ops.choices} == {("torch", "asked for by name")}


def test_auto_without_alternatives() -> None:
    assert select_ops("auto", CPU).choices[0].reason == "the only implementation"


def test_auto_takes_what_is_available(add_triton: Callable[..., Callable[..., None]]) -> None:
    fast = add_triton("linear", None)
    ops = select_ops("auto", CPU)
    assert ops.linear is fast
    assert Choice("linear", "triton", "fastest available") in ops.choices


def test_auto_says_why_it_fell_back(add_triton: Callable[..., Callable[..., None]]) -> None:
    add_triton("linear", "no GPU")
    ops = select_ops("auto", CPU)
    assert ops.linear is linear
    assert Choice("linear", "torch", "triton: no GPU") in ops.choices


def test_a_named_backend_that_is_unavailable_says_why(add_triton: Callable[..., Callable[..., None]]) -> None:
    for name in all_ops():
        add_triton(name, "no GPU")
    with pytest.raises(ValueError, match=r"backend 'triton' cannot run op '\w+' on cpu: no GPU"):
        select_ops("triton", CPU)


def test_a_named_backend_without_an_implementation_says_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"backend 'cuda' .*no such implementation \(it has \['torch'"):
        select_ops("cuda", CPU)


def test_an_unknown_op_is_named() -> None:
    with pytest.raises(AttributeError, match=r"there is no op 'softmax'; the ops are \['layernorm_linear'"):
        _ = select_ops("torch", CPU).softmax


def test_the_table_can_be_copied() -> None:
    assert copy.deepcopy(select_ops("torch", CPU)).linear is linear


def test_cost_and_bytes() -> None:
    assert Cost(1, 2) + Cost(10, 20) == Cost(11, 22)
    assert nbytes(torch.zeros(3, dtype=torch.bfloat16), None, torch.zeros(2, 2)) == 6 + 16
