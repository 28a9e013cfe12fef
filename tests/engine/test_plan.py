"""Lengths, buffers and their places, decided before an inference runs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pi0_engine.config import ModelType, Pi0Config, SolverName
from pi0_engine.engine.plan import (
    ALIGNMENT,
    FLOW,
    PREFIX,
    VISION,
    Buffer,
    ShapePlan,
    Workspace,
    place_buffers,
    plan_buffers,
    rope_table,
)
from pi0_engine.kernels.stream import Scratch
from pi0_engine.reference.layers import rope
from tests.support.models import MODEL_TYPES, small_config

CPU = torch.device("cpu")


def workspace(config: Pi0Config, plan: ShapePlan, dtype: torch.dtype = torch.float32) -> Workspace:
    return Workspace(config, plan, dtype, CPU, Scratch.allocate(CPU, needed=False))


def test_lengths_of_two_cameras_and_twelve_tokens() -> None:
    plan = ShapePlan.of(Pi0Config("pi0"), views=[2], prompt_lengths=[12])
    lengths = {"views": (2,), "prefix": 524, "exact": True, "samples": 1, "horizon": 50, "num_steps": 10}
    assert plan == ShapePlan(**lengths, patches=256, state_rows=1)
    assert (plan.batch, plan.images, plan.chunks) == (1, 2, 1)
    assert (plan.image_rows, plan.prompt_rows, plan.action_rows, plan.suffix_rows) == ((512,), 12, 50, 51)
    pi05 = ShapePlan.of(Pi0Config("pi05"), views=[2], prompt_lengths=[12])
    assert pi05 == ShapePlan(**lengths, patches=256, state_rows=0)
    assert (pi05.action_rows, pi05.suffix_rows) == (50, 50)


def test_lengths_of_a_batch() -> None:
    """Rows for the longest; 4 patches per camera here."""
    config = small_config("pi0")
    plan = ShapePlan.of(config, views=[1, 3], prompt_lengths=[9, 2], samples=2, horizon=8, num_steps=1)
    lengths = {"views": (1, 3), "prefix": 14, "exact": False, "samples": 2, "horizon": 8, "num_steps": 1}
    assert plan == ShapePlan(**lengths, patches=4, state_rows=2)
    assert (plan.batch, plan.images, plan.chunks) == (2, 4, 4)
    # The first observation has 4 image rows, so 10 rows of the 14 are left for its prompt.
    assert (plan.image_rows, plan.prompt_rows, plan.action_rows, plan.suffix_rows) == ((4, 12), 10, 32, 34)
    assert ShapePlan.of(config, views=[1, 2], prompt_lengths=[5, 1]).exact


@pytest.mark.parametrize(("prompt", "rows"), [(0, 4), (1, 12), (8, 12), (9, 20)])
def test_prompt_lengths_are_rounded_up_to_the_bucket(prompt: int, rows: int) -> None:
    """And then no plan is exact, even if a prompt happens to fill its bucket: the others must share it."""
    plan = ShapePlan.of(small_config("pi0"), views=[1], prompt_lengths=[prompt], prompt_bucket=8)
    assert (plan.prefix, plan.exact) == (rows, False)
    assert ShapePlan.of(small_config("pi0"), views=[1], prompt_lengths=[prompt]).exact


def test_prompts_of_a_bucket_and_step_counts_share_a_plan() -> None:
    config = small_config("pi0")
    plans = {
        ShapePlan.of(config, views=[2], prompt_lengths=[prompt], num_steps=num_steps, prompt_bucket=8)
        for prompt in range(1, 9)
        for num_steps in (1, 10)
    }
    assert len(plans) == 1


def test_frames_of_any_size_share_a_few_plans() -> None:
    """Bytes and table entries are rounded up to powers of two, of at least 4 MiB and 32768 entries."""
    config = small_config("pi0")
    plans = [
        ShapePlan.of(config, views=[2], prompt_lengths=[3], frames=frames)
        for frames in ((1, 1), (4 << 20, 1 << 15), ((4 << 20) + 1, 1 << 15), (1, (1 << 15) + 1), (9 << 20, 70_000))
    ]
    assert [plan.frames for plan in plans] == [
        (4 << 20, 1 << 15),
        (4 << 20, 1 << 15),
        (8 << 20, 1 << 15),
        (4 << 20, 1 << 16),
        (16 << 20, 1 << 17),
    ]
    assert plans[0] == plans[1] != plans[2]
    shapes = {b.name: b.shape for b in plan_buffers(config, plans[2], torch.float32)}
    assert (shapes["pixels"], shapes["table"], shapes["patches"]) == ((8 << 20,), (1 << 15,), (8, 588))
    assert ShapePlan.of(config, views=[0], prompt_lengths=[3], frames=(1, 1)).frames is None


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
    """Widths 36, 40 and 28, 4 heads and 1 KV head of 16, horizon 5, prefix 4 + 4 + 3; a state row in π0 only."""
    config = small_config("pi0")
    plan = ShapePlan.of(config, views=[2], prompt_lengths=[3], samples=2)
    buffers = {b.name: b for b in plan_buffers(config, plan, torch.bfloat16)}
    assert {name: b.shape for name, b in buffers.items()} == {
        "pixels": (0,),
        "table": (0,),
        "patches": (8, 588),
        "vision_x": (8, 36),
        "vision_rounded": (8, 36),
        "vision_square_sums": (8, 1),
        "vision_sums": (8, 1),
        "vision_qkv": (8, 108),
        "vision_mixed": (8, 36),
        "vision_hidden": (8, 52),
        "prompt": (1, 3, 40),
        "prefix_x": (11, 40),
        "prefix_rounded": (11, 40),
        "prefix_square_sums": (11, 1),
        "prefix_q": (11, 64),
        "prefix_mixed": (11, 64),
        "prefix_hidden": (11, 56),
        "cache_k": (3, 11, 16),
        "cache_v": (3, 11, 16),
        "state": (1, 7),
        "actions": (10, 7),
        "previous": (10, 7),
        "prefix_weights": (10,),
        "max_weight": (1,),
        "time_index": (0,),
        "base": (0, 7),
        "action_hidden": (10, 28),
        "suffix_x": (11, 28),
        "suffix_rounded": (11, 28),
        "suffix_square_sums": (11, 1),
        "suffix_q": (11, 64),
        "suffix_k": (3, 11, 16),
        "suffix_v": (3, 11, 16),
        "suffix_mixed": (11, 64),
        "suffix_hidden": (11, 44),
    }
    streams = {f"{name}_{part}" for name in ("vision", "prefix", "suffix") for part in ("x", "square_sums")}
    ends = {"patches", "vision_sums", "prompt", "state", "actions", "action_hidden"}
    ends |= {"previous", "prefix_weights", "max_weight", "base"}
    assert {name for name, b in buffers.items() if b.dtype == torch.float32} == streams | ends
    config = small_config("pi05")
    plan = ShapePlan.of(config, views=[2], prompt_lengths=[3], samples=2)
    pi05 = {b.name: b for b in plan_buffers(config, plan, torch.bfloat16)}
    assert (buffers["pixels"].dtype, buffers["table"].dtype) == (torch.uint8, torch.int32)
    assert pi05["state"].shape == (0, 7)
    assert pi05["suffix_x"].shape == (10, 28) and pi05["suffix_k"].shape == (3, 10, 16)
    assert pi05["cache_k"].shape == (3, 11, 16)


@pytest.mark.parametrize("solver", ["midpoint", "adams_bashforth"])
def test_solvers_of_second_order_have_one_buffer_more(solver: SolverName) -> None:
    """In the flow alone; with Euler's there are no bytes for it, and the plans are not the same."""
    config = small_config("pi0")
    plain, plan = (ShapePlan.of(config, views=[2], prompt_lengths=[3], samples=2, solver=s) for s in ("euler", solver))
    euler, buffers = ({b.name: b for b in plan_buffers(config, p, torch.bfloat16)} for p in (plain, plan))
    assert buffers.pop("base") == Buffer("base", (10, 7), torch.float32, FLOW, FLOW)
    assert euler.pop("base").nbytes == 0 and euler == buffers and plain != plan


def test_a_partial_sum_per_64_columns() -> None:
    config = Pi0Config("pi0")
    plan = ShapePlan.of(config, views=[1], prompt_lengths=[20])
    shapes = {b.name: b.shape for b in plan_buffers(config, plan, torch.bfloat16)}
    assert shapes["vision_sums"] == shapes["vision_square_sums"] == (256, 18)
    assert (shapes["prefix_square_sums"], shapes["suffix_square_sums"]) == ((276, 32), (51, 16))


def test_full_size_works_in_38_megabytes() -> None:
    """The prefix stage needs most, and the arena has no byte beyond it. By hand, per row of the 532: the stream, its
    rounded copy and 32 sums; queries, attention and MLP; keys and values of 18 layers. And what waits for the flow:
    prompt, noise and the chunk to continue; state and weights of that chunk, each within 256 bytes; their bound.
    """
    config = Pi0Config("pi0")
    plan = ShapePlan.of(config, views=[2], prompt_lengths=[20])
    _, size = place_buffers(plan_buffers(config, plan, torch.bfloat16))
    row = 4 * 2048 + 2 * 2048 + 4 * 32 + 2 * 2 * 2048 + 2 * 16384 + 2 * 18 * 2 * 256
    assert size == 532 * row + 4 * (20 * 2048 + 2 * 50 * 32) + 2 * 256 + 4
    assert 37.9e6 < size < 38.9e6


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_what_is_read_later_lives_until_then(model_type: ModelType) -> None:
    """Inputs from the beginning; the prompt until the prefix; keys, values, state and actions to the end."""
    config = small_config(model_type)
    plan = ShapePlan.of(config, views=[2], prompt_lengths=[3])
    buffers = {b.name: (b.first, b.last) for b in plan_buffers(config, plan, torch.float32)}
    assert buffers["patches"] == (VISION, VISION)
    assert buffers["prompt"] == (VISION, PREFIX)
    assert {buffers[name] for name in ("prefix_x", "prefix_rounded", "prefix_square_sums")} == {(VISION, PREFIX)}
    assert buffers["cache_k"] == buffers["cache_v"] == (PREFIX, FLOW)
    assert buffers["state"] == buffers["actions"] == (VISION, FLOW)
    assert {buffers[name] for name in ("previous", "prefix_weights", "max_weight")} == {(VISION, FLOW)}
    assert {times for name, times in buffers.items() if name.startswith("suffix")} == {(FLOW, FLOW)}


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
    """State and actions follow the valid tokens, wherever their rows are: chunk by chunk, then the state tokens."""
    config = small_config(model_type)
    plan = ShapePlan.of(config, views=[1, 2], prompt_lengths=[2, 3], samples=2, horizon=3)
    space = workspace(config, plan)
    space.set_lengths(torch.tensor([6, 11]))
    state = 0 if config.is_pi05 else 1
    first, second = [[n + state + step for step in range(3)] for n in (6, 11)]
    states = [] if config.is_pi05 else [6, 11]
    expected = first + first + second + second + states
    assert space.suffix_positions.tolist() == expected
    assert space.suffix_positions_after(torch.tensor([6, 11])).tolist() == expected
    assert len(expected) == plan.suffix_rows and plan.action_rows == 12
    assert space.lengths.tolist() == [6, 11]
    assert space.prefix_positions.tolist() == list(range(11)) * 2
    assert space.suffix_positions.dtype == space.prefix_positions.dtype == space.lengths.dtype == torch.int32
    assert int(space.suffix_positions.max()) < len(space.rope_table)


@given(st.sampled_from(MODEL_TYPES), st.integers(1, 40), st.integers(0, 12), st.sampled_from([1, 8]))
def test_the_table_reaches_every_position(model_type: ModelType, horizon: int, prompt: int, bucket: int) -> None:
    config = small_config(model_type)
    plan = ShapePlan.of(config, views=[1], prompt_lengths=[prompt], horizon=horizon, prompt_bucket=bucket)
    space = workspace(config, plan)
    space.set_lengths(torch.tensor([plan.prefix]))
    assert int(space.suffix_positions.max()) < len(space.rope_table)


def test_lengths_are_checked_only_where_they_differ() -> None:
    config = small_config("pi0")
    for views, bucket, exact in (([1, 1], 1, True), ([1, 2], 1, False), ([1, 1], 8, False)):
        plan = ShapePlan.of(config, views=views, prompt_lengths=[3, 3], prompt_bucket=bucket)
        space = workspace(config, plan)
        assert (space.masked_lengths is None) is exact
        assert exact or space.masked_lengths is space.lengths


def test_workspace_is_one_allocation() -> None:
    config = small_config("pi0")
    space = workspace(config, ShapePlan.of(config, views=[1], prompt_lengths=[3]), torch.bfloat16)
    for buffer in plan_buffers(config, space.plan, torch.bfloat16):
        tensor = space[buffer.name]
        assert (tuple(tensor.shape), tensor.dtype) == (buffer.shape, buffer.dtype)
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().data_ptr() == space.arena.untyped_storage().data_ptr()


def test_streams_are_the_buffers_of_their_name() -> None:
    """Only SigLIP's LayerNorms subtract a mean, so only its stream has plain sums."""
    config = small_config("pi0")
    space = workspace(config, ShapePlan.of(config, views=[1], prompt_lengths=[3]), torch.bfloat16)
    for name, parts in (
        ("vision", ["x", "rounded", "square_sums", "sums"]),
        ("prefix", ["x", "rounded", "square_sums"]),
        ("suffix", ["x", "rounded", "square_sums"]),
    ):
        tensors = getattr(space, name).tensors
        assert list(tensors) == parts
        assert all(tensor is space[f"{name}_{part}"] for part, tensor in tensors.items())


def test_scratch_is_shared_by_all_plans() -> None:
    config, scratch = small_config("pi0"), Scratch.allocate(CPU, needed=True)
    plans = [ShapePlan.of(config, views=[views], prompt_lengths=[3]) for views in (1, 2)]
    assert all(Workspace(config, plan, torch.float32, CPU, scratch).scratch is scratch for plan in plans)


def test_rope_table_turns_as_the_reference_does() -> None:
    """Rotating (1, 0) gives (cos, sin): compare the table with the reference's rotation, bit for bit."""
    head_dim, positions = 16, torch.arange(900)
    ones = torch.cat([torch.ones(1, 1, 900, 8), torch.zeros(1, 1, 900, 8)], dim=-1)
    assert torch.equal(rope_table(900, head_dim), rope(ones, positions[None])[0, 0])


def test_more_than_the_kernels_can_index_is_refused() -> None:
    """168 observations of three cameras at full size: 168 * 784 rows of 16384 values are more than 2^31."""
    config = Pi0Config("pi0")
    plan = ShapePlan.of(config, views=[3] * 168, prompt_lengths=[16] * 168)
    with pytest.raises(
        ValueError, match=r"168 observations with 1 samples each are too many at once: buffer prefix_hidden"
    ):
        Workspace(
            config, plan, torch.bfloat16, torch.device("meta"), Scratch.allocate(torch.device("meta"), needed=False)
        )
