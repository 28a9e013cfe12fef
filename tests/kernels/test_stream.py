"""The residual stream: its parts, its slices, and that they are all a linear layer behind a norm needs."""

from __future__ import annotations

import pytest
import torch

from pi0_engine.kernels.stream import Scratch, Stream, sum_blocks
from tests.support.op_checks import (
    block_sums,
    check,
    check_stream,
    layer_norm,
    randn,
    rms_norm,
    stream,
    unset_stream,
    weight,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(("width", "blocks"), [(1, 1), (63, 1), (64, 1), (65, 2), (128, 2), (150, 3), (2048, 32)])
def test_one_partial_sum_per_64_columns(width: int, blocks: int) -> None:
    assert sum_blocks(width) == blocks


@pytest.mark.parametrize("width", [13, 64, 150])
@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_write(width: int, sums: bool, scaled: bool, dtype: torch.dtype) -> None:
    """The rows as they are, a copy times the next norm's scale that is rounded once, and sums of the unscaled rows."""
    x, scale = 3 + 5 * randn(4, width), 1 + 0.3 * randn(width) if scaled else None
    target = unset_stream(4, width, dtype, sums=sums)
    target.write(x, scale)
    assert torch.equal(target.x, x)
    check_stream(target, x.double(), scale, dtype)
    assert (target.sums is not None) is sums


def test_sums_by_hand() -> None:
    """65 columns: 64 ones and a three."""
    x = torch.ones(1, 65)
    x[0, 64] = 3
    target = unset_stream(1, 65, sums=True)
    target.write(x, None)
    assert target.square_sums.tolist() == [[64, 9]]
    assert target.sums is not None and target.sums.tolist() == [[64, 3]]


def test_a_slice_of_rows_is_a_view() -> None:
    whole = unset_stream(5, 70, torch.bfloat16, sums=True)
    x = randn(2, 70)
    whole[1:3].write(x, None)
    check_stream(whole[1:3], x.double(), None, torch.bfloat16)
    for part in whole.tensors.values():
        assert part[1:3].isfinite().all() and part[[0, 3, 4]].isnan().all()
    assert unset_stream(5, 70)[2:].sums is None


def test_parts_by_name() -> None:
    with_sums = unset_stream(2, 70, sums=True)
    assert list(with_sums.tensors) == ["x", "rounded", "square_sums", "sums"]
    assert list(unset_stream(2, 70).tensors) == ["x", "rounded", "square_sums"]
    assert all(getattr(with_sums, name) is tensor for name, tensor in with_sums.tensors.items())


def test_layernorm_needs_no_more_than_the_parts() -> None:
    """Without any mean subtracted from the rows: the weight's rows have mean 0, the variance comes from the sums."""
    x, original = 3 + 5 * randn(4, 150), weight(7, 150)
    centred = original.double() - original.double().mean(dim=1, keepdim=True)
    s = written(x, None, sums=True)
    assert s.sums is not None
    mean, square = (total.double().sum(1, keepdim=True) / 150 for total in (s.sums, s.square_sums))
    product = s.rounded.double() @ centred.T / (square - mean**2 + 1e-6).sqrt()
    check(product, layer_norm(x) @ original.double().T, torch.float32)


def test_adarms_needs_no_more_than_the_parts() -> None:
    """The scale is in the rounded copy, the shift in a bias; the row's factor is of the unscaled row."""
    x, w, scale, shift = randn(4, 150), weight(7, 150), 1 + 0.3 * randn(150), 0.3 * randn(150)
    s = written(x, scale)
    square = s.square_sums.double().sum(1, keepdim=True) / 150
    product = s.rounded.double() @ w.double().T / (square + 1e-6).sqrt() + shift.double() @ w.double().T
    check(product, (rms_norm(x, scale) + shift.double()) @ w.double().T, torch.float32)


def written(x: torch.Tensor, scale: torch.Tensor | None, *, sums: bool = False) -> Stream:
    target = unset_stream(*x.shape, sums=sums)
    target.write(x, scale)
    return target


def test_the_checks_themselves() -> None:
    """``stream`` of the tests is what ``write`` leaves; a stream with one wrong number in any part is refused."""
    x, scale = randn(3, 150), 1 + 0.3 * randn(150)
    for name, part in written(x, scale, sums=True).tensors.items():
        torch.testing.assert_close(part, stream(x, torch.float32, scale=scale, sums=True).tensors[name])
        wrong = written(x, scale, sums=True)
        wrong.tensors[name][1, 0] += 0.01
        with pytest.raises(AssertionError):
            check_stream(wrong, x.double(), scale, torch.float32)
    assert torch.equal(block_sums(torch.ones(1, 70)), torch.tensor([[64.0, 6.0]]))


def test_scratch_is_empty_where_no_kernel_asks_for_it() -> None:
    assert [t.numel() for t in vars(Scratch.allocate(CPU, needed=False)).values()] == [0, 0, 2]
    needed = Scratch.allocate(CPU, needed=True)
    assert [(t.numel(), t.dtype) for t in vars(needed).values()] == [
        (8 << 20, torch.float32),
        (1 << 14, torch.int32),
        (2, torch.int32),
    ]
    assert not needed.counters.any() and not needed.barrier.any()
