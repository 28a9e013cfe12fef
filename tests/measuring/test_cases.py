"""Reading recorded cases, and that the regenerated ones are what was recorded."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pi0_engine.config import CAMERA_SLOTS
from pi0_engine.measuring.cases import Case, Difference, load_case
from tests.support import golden

WHOLE = golden.GOLDEN / f"{golden.WHOLE[0]}.npz"


@pytest.mark.parametrize("name", golden.RECORDED)
def test_regenerated_inputs_are_the_recorded_ones(name: str) -> None:
    """Bit for bit: the checksums were taken of what openpi was given."""
    arrays = golden.arrays(name)
    found = {
        "images": np.stack([arrays[f"in_image_{camera}"] for camera in CAMERA_SLOTS], axis=1),
        **{what: arrays[f"in_{what}"] for what in ("tokens", "state", "noise")},
    }
    checksums = {what: f"{zlib.crc32(np.ascontiguousarray(a).tobytes()):08x}" for what, a in found.items()}
    assert checksums == golden.RECORDED[name]["crc32"]


@pytest.mark.parametrize("name", golden.WHOLE)
def test_a_whole_case_is_the_regenerated_one(name: str) -> None:
    ours, theirs = golden.load(name), load_case(golden.GOLDEN / f"{name}.npz")
    assert_same(theirs, ours)
    assert theirs.config is not None
    assert theirs.config.llm == golden.config_of(name).llm
    assert theirs.config.expert == golden.config_of(name).expert
    assert theirs.config.vision == golden.config_of(name).vision
    assert theirs.config.action_horizon == ours.noise.shape[1]


def assert_same(a: Case, b: Case) -> None:
    assert (a.name, a.num_steps) == (b.name, b.num_steps)
    for field, array in arrays(a).items():
        other = arrays(b)[field]
        np.testing.assert_array_equal(array, other, field, strict=True)


def arrays(case: Case) -> dict[str, np.ndarray]:
    assert case.inputs.frames is None
    given = {name: value for name, value in vars(case.inputs).items() if name != "frames"}
    return {**given, "noise": case.noise.numpy(), "actions": case.actions.numpy()}


def test_a_case_fits_its_model() -> None:
    case = load_case(WHOLE)
    assert case.config is not None
    case.inputs.validate(case.config)
    assert float(case.inputs.images.min()) >= -1 and float(case.inputs.images.max()) <= 1


def write(path: Path, **changes: Any) -> Path:
    """A copy of a whole case with arrays replaced, or removed where None."""
    arrays: dict[str, Any] = {**golden.arrays(golden.WHOLE[0]), **changes}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def test_a_variant_takes_its_inputs_from_the_file_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "case.npz")
    variant = tmp_path / "case__bf16.npz"
    np.savez(variant, out_actions=np.ones((1, 10, 32), np.float32))
    case = load_case(variant)
    assert case.name == "case__bf16"
    assert torch.equal(case.actions, torch.ones(1, 10, 32))
    assert torch.equal(case.noise, load_case(tmp_path / "case.npz").noise)


def test_a_variant_without_its_inputs_says_where_it_looked(tmp_path: Path) -> None:
    np.savez(tmp_path / "case__bf16.npz", out_actions=np.ones((1, 10, 32), np.float32))
    with pytest.raises(ValueError, match=r"it has no in_tokens, .* \(looked in case\.npz as well\)"):
        load_case(tmp_path / "case__bf16.npz")


def test_cameras_come_in_openpis_order_and_others_behind_them(tmp_path: Path) -> None:
    a = golden.arrays(golden.WHOLE[0])
    frames = {name: np.full_like(a["in_image_base_0_rgb"], value) for value, name in enumerate(("a_top", "z_low"))}
    changes = {f"in_image_{name}": frame for name, frame in frames.items()}
    changes |= {f"in_image_mask_{name}": np.array([True]) for name in frames}
    case = load_case(write(tmp_path / "case.npz", **changes))
    assert case.inputs.images.shape[1] == 5
    recorded = load_case(WHOLE).inputs
    np.testing.assert_array_equal(case.inputs.images[:, :3], recorded.images)
    assert case.inputs.images[0, 3:, 0, 0, 0].tolist() == pytest.approx([-1, 1 / 127.5 - 1])


def test_a_case_need_not_record_sizes(tmp_path: Path) -> None:
    assert load_case(write(tmp_path / "case.npz")).config is None
    meta = np.array(json.dumps({"model": "pi0", "size": "full"}))
    assert load_case(write(tmp_path / "full.npz", meta=meta)).config is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_noise": None}, "is not a parity case: it has no in_noise"),
        ({"out_actions": None, "in_state": None}, "it has no in_state, out_actions"),
        ({"in_image_left_wrist_0_rgb": None}, "it has no in_image_left_wrist_0_rgb"),
        ({"in_image_base_0_rgb": np.zeros((1, 224, 224, 3))}, "images are float64, expected uint8"),
    ],
)
def test_an_incomplete_case_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_case(write(tmp_path / "case.npz", **changes))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"\x80\x04pickle"])
def test_a_file_of_another_kind_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "case.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"case\.npz is not an \.npz file"):
        load_case(path)
    with pytest.raises(ValueError, match="there is no case file"):
        load_case(tmp_path / "other.npz")


def test_difference() -> None:
    found = Difference.between(torch.tensor([[3.0, 4.5]]), torch.tensor([[3.0, 4.0]]))
    assert found.rel_l2 == pytest.approx(0.1)
    assert found.max_abs == 0.5
    assert found.cosine == pytest.approx(27 / (5 * math.hypot(3, 4.5)))
    same = Difference.between(torch.ones(3), torch.ones(3))
    assert (same.rel_l2, same.max_abs, same.cosine) == (0, 0, pytest.approx(1))
    assert math.isnan(Difference.between(torch.tensor([math.nan]), torch.ones(1)).rel_l2)


def test_a_variant_without_actions_does_not_take_those_of_its_base(tmp_path: Path) -> None:
    whole = golden.GOLDEN / f"{golden.WHOLE[0]}.npz"
    (tmp_path / "case.npz").write_bytes(whole.read_bytes())
    np.savez(tmp_path / "case__other.npz", out_actions_of_another_kind=np.zeros(3))
    with pytest.raises(ValueError, match=r"it has no out_actions \(looked in case\.npz as well\)"):
        load_case(tmp_path / "case__other.npz")
