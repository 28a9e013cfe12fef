"""Lengths, buffers and their places, decided before an inference runs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models import MODEL_TYPES, small_config
from pi0_engine.config import ModelType, Pi0Config
from pi0_engine.engine.plan import ALIGNMENT, Buffer, ShapePlan, Workspace, place_buffers, plan_buffers, rope_table
from pi0_engine.reference_layers import rope

CPU = torch.device("cpu")


def test_lengths_of_two_cameras_and_twelve_tokens() -> None:
    plan = ShapePlan.of(Pi0Config("pi0"), views=[2], prompt_lengths=[12])
    assert plan == ShapePlan(views=(2,), prefix=524, exact=True, samples=1, horizon=50, num_steps=10)
    assert (plan.batch, plan.images, plan.chunks) == (1, 2, 1)


def test_lengths_of_a_batch() -> None:
    """Rows for the longest; 4 patches per camera here."""
    config = small_config("pi0")
    plan = ShapePlan.of(config, views=[1, 3], prompt_lengths=[9, 2], samples=2, horizon=8, num_steps=1)
    assert plan == ShapePlan(views=(1, 3), prefix=14, exact=False, samples=2, horizon=8, num_steps=1)
    assert (plan.batch, plan.images, plan.chunks) == (2, 4, 4)
    assert ShapePlan.of(config, views=[1, 2], prompt_lengths=[5, 1]).exact


@pytest.mark.parametrize(("prompt", "rows", "exact"), [(0, 4, True), (1, 12, False), (8, 12, True), (9, 20, False)])
def test_prompt_lengths_are_rounded_up_to_the_bucket(prompt: int, rows: int, exact: bool) -> None:
    plan = ShapePlan.of(small_config("pi0"), views=[1], prompt_lengths=[prompt], prompt_bucket=8)
    assert (plan.prefix, plan.exact) == (rows, exact)


def test_counts_must_be_integers() -> None:
    with pytest.raises(ValueError, match=r"num_steps is 2\.0, expected an integer of at least 1"):
        ShapePlan.of(small_config("pi0"), views=[1], prompt_lengths=[1], num_steps=2.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "message"),
    [("samples", "num_samples is 0"), ("horizon", "action horizon is 0"), ("num_steps", "num_steps is 0")],
)
def test_counts_must_be_positive(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}, expected "):
        ShapePlan.of(small_config("pi0"), views=[1], prompt_lengths=[1], **{name: 0})


def test_buffers_of_a_small_model() -> None:
    """Width 40 and 28, 4 heads and 1 KV head of 16, horizon 5, prefix 4 + 4 + 3; a state row in π0 only."""
    config = small_config("pi0")
    plan = ShapePlan.of(config, views=[2], prompt_lengths=[3], samples=2)
    buffers = {b.name: b for b in plan_buffers(config, plan, torch.bfloat16)}
    assert buffers["vision_qkv"].shape == (2, 4, 108)
    assert buffers["prefix_x"].shape == (1, 11, 40)
    assert buffers["prefix_q"].shape == (1, 11, 64)
    assert buffers["cache_k"].shape == buffers["cache_v"].shape == (3, 1, 12, 16)
    assert buffers["suffix_x"].shape == (2, 5, 28)
    assert buffers["actions"].shape == (2, 5, 7)
    assert buffers["state_q"].shape == (1, 1, 64)
    streams = {"images", "vision_x", "prefix_x", "state", "state_x", "actions", "action_hidden", "suffix_x"}
    assert {name for name, b in buffers.items() if b.dtype == torch.float32} == streams
    pi05 = {b.name: b for b in plan_buffers(small_config("pi05"), plan, torch.bfloat16)}
    assert not any(name.startswith("state") for name in pi05)
    assert pi05["cache_k"].shape == (3, 1, 11, 16)


def test_full_size_works_in_36_megabytes() -> None:
    config = Pi0Config("pi0")
    plan = ShapePlan.of(config, views=[2], prompt_lengths=[20])
    _, size = place_buffers(plan_buffers(config, plan, torch.bfloat16))
    assert 35e6 < size < 37e6


@st.composite
def any_buffer(draw: st.DrawFn, name: str = "b") -> Buffer:
    first = draw(st.integers(0, 3))
    shape = tuple(draw(st.lists(st.integers(0, 40), min_size=1, max_size=3)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]))
    return Buffer(name, shape, dtype, first, draw(st.integers(first, 3)))


@given(st.lists(any_buffer(), max_size=12))
def test_no_two_living_buffers_share_bytes(drawn: list[Buffer]) -> None:
    buffers = [Buffer(str(i), b.shape, b.dtype, b.first, b.last) for i, b in enumerate(drawn)]
    offsets, size = place_buffers(buffers)
    assert set(offsets) == {b.name for b in buffers}
    for b in buffers:
        assert offsets[b.name] % ALIGNMENT == 0
        assert offsets[b.name] + b.nbytes <= size
    for n, a in enumerate(buffers):
        for b in buffers[:n]:
            if a.first <= b.last and b.first <= a.last:
                ends = offsets[a.name] + a.nbytes, offsets[b.name] + b.nbytes
                assert ends[0] <= offsets[b.name] or ends[1] <= offsets[a.name]
    busiest = max((sum(b.nbytes for b in buffers if b.first <= stage <= b.last) for stage in range(4)), default=0)
    assert size >= busiest


def test_buffers_that_never_meet_share_bytes() -> None:
    offsets, size = place_buffers([Buffer(n, (64,), torch.float32, s, s) for s, n in enumerate("abcd")])
    assert offsets == {"a": 0, "b": 0, "c": 0, "d": 0}
    assert size == 256


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_positions_follow_the_prefix(model_type: ModelType) -> None:
    """State and actions come behind the valid tokens, wherever the rows in the cache are."""
    config = small_config(model_type)
    plan = ShapePlan.of(config, views=[1, 2], prompt_lengths=[2, 3], samples=2, horizon=3)
    space = Workspace(config, plan, torch.float32, CPU)
    space.set_lengths(torch.tensor([6, 11]))
    state = 0 if config.is_pi05 else 1
    assert space.state_rows == state
    assert space.state_positions.tolist() == [[6], [11]]
    assert space.cache_lengths.tolist() == [6 + state, 11 + state]
    first, second = [[n + state + step for step in range(3)] for n in (6, 11)]
    assert space.suffix_positions.tolist() == [first, first, second, second]
    assert space.prefix_positions.tolist() == [list(range(11))] * 2
    assert int(space.suffix_positions.max()) < len(space.rope_table)


def test_lengths_are_checked_only_where_they_differ() -> None:
    config = small_config("pi0")
    for views, exact in ([1, 1], True), ([1, 2], False):
        plan = ShapePlan.of(config, views=views, prompt_lengths=[3, 3])
        space = Workspace(config, plan, torch.float32, CPU)
        assert (space.masked(space.lengths) is None) is exact


def test_workspace_is_one_allocation() -> None:
    config = small_config("pi0")
    space = Workspace(config, ShapePlan.of(config, views=[1], prompt_lengths=[3]), torch.bfloat16, CPU)
    for buffer in plan_buffers(config, space.plan, torch.bfloat16):
        tensor = space[buffer.name]
        assert (tuple(tensor.shape), tensor.dtype) == (buffer.shape, buffer.dtype)
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().data_ptr() == space.arena.untyped_storage().data_ptr()


def test_rope_table_turns_as_the_reference_does() -> None:
    """Rotating (1, 0) gives (cos, sin): compare the table with the reference's rotation, bit for bit."""
    head_dim, positions = 16, torch.arange(900)
    ones = torch.cat([torch.ones(1, 1, 900, 8), torch.zeros(1, 1, 900, 8)], dim=-1)
    assert torch.equal(rope_table(900, head_dim), rope(ones, positions[None])[0, 0])
