from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from pi0_engine.config import Pi0Config
from pi0_engine.robots.norm_stats import load_norm_stats
from pi0_engine.robots.normalization import Normalizer, NormStats

PI0, PI05 = Pi0Config("pi0"), Pi0Config("pi05")


# --- formulas, with numbers worked out by hand -------------------------------------------------------------------


def test_openpi_zscore_by_hand() -> None:
    normalizer = Normalizer.zscore([1.0, -2.0], [0.5, 0.0])
    # (2 - 1) / (0.5 + 1e-6), (-1.999 + 2) / 1e-6
    np.testing.assert_allclose(normalizer.normalize([2.0, -1.999]), [1.999996000008, 1000.0], rtol=1e-10)
    # 3 * (0.5 + 1e-6) + 1, 3 * 1e-6 - 2
    np.testing.assert_allclose(normalizer.unnormalize([3.0, 3.0]), [2.500003, -1.999997], rtol=1e-12)


def test_openpi_quantile_by_hand() -> None:
    normalizer = Normalizer.quantile([-1.0, 5.0], [3.0, 5.0])
    # (2 + 1) / (4 + 1e-6) * 2 - 1; a range of 0 leaves the divisor 1e-6
    expected = [3 / 4.000001 * 2 - 1, (5.000001 - 5) / 1e-6 * 2 - 1]
    np.testing.assert_allclose(normalizer.normalize([2.0, 5.000001]), expected, rtol=1e-9)
    # (1 + 1) / 2 * 4.000001 - 1, (1 + 1) / 2 * 1e-6 + 5
    np.testing.assert_allclose(normalizer.unnormalize([1.0, 1.0]), [3.000001, 5.000001], rtol=1e-12)


def test_lerobot_zscore_has_its_epsilon_in_the_forward_direction_only() -> None:
    normalizer = Normalizer.zscore([1.0, 2.0], [0.25, 0.0], flavour="lerobot")
    assert normalizer.normalize([2.0, 2.0]).tolist() == [4.0, 0.0]
    assert normalizer.normalize([1.0, 2.5])[1] == pytest.approx(0.5 / 1e-8, rel=1e-6)
    # No epsilon back: std 0 gives the mean, whatever the network says.
    assert normalizer.unnormalize([2.0, 1e6]).tolist() == [1.5, 2.0]


def test_lerobot_range_has_an_epsilon_only_where_the_range_is_zero() -> None:
    for normalizer in (Normalizer.quantile([0.0, 7.0], [10.0, 7.0], flavour="lerobot"),
                       Normalizer.minmax([0.0, 7.0], [10.0, 7.0])):  # fmt: skip
        assert normalizer.normalize([7.5, 7.0]).tolist() == [0.5, -1.0]
        assert normalizer.unnormalize([1.0, -1.0]).tolist() == [10.0, 7.0]


def test_clipping_never_happens() -> None:
    assert Normalizer.minmax([0.0], [1.0]).normalize([2.0]).tolist() == [3.0]


def test_arithmetic_has_the_dtype_of_the_original() -> None:
    assert Normalizer.zscore([0.0], [1.0]).normalize(np.ones(1, np.float32)).dtype == np.float64
    assert Normalizer.zscore([0.0], [1.0], flavour="lerobot").normalize(np.ones(1, np.float64)).dtype == np.float32


@pytest.mark.parametrize("mode", ["zscore", "quantile", "minmax", "identity"])
@settings(deadline=None)
@given(data=st.data())
def test_unnormalize_is_the_inverse(mode: str, data: Any) -> None:
    dims = data.draw(st.integers(1, 6))
    finite = st.floats(-100, 100)
    low = np.array(data.draw(st.lists(finite, min_size=dims, max_size=dims)))
    spread = np.array(data.draw(st.lists(st.floats(0.01, 50), min_size=dims, max_size=dims)))
    normalizer = {
        "zscore": lambda: Normalizer.zscore(low, spread),
        "quantile": lambda: Normalizer.quantile(low, low + spread),
        "minmax": lambda: Normalizer.minmax(low, low + spread),
        "identity": Normalizer.identity,
    }[mode]()
    # Also more and fewer dimensions than the statistics.
    width = data.draw(st.integers(1, 8))
    x = np.array(data.draw(st.lists(finite, min_size=3 * width, max_size=3 * width))).reshape(3, width)
    tolerance = 1e-3 if mode == "minmax" else 1e-9  # lerobot's arithmetic is float32
    np.testing.assert_allclose(normalizer.unnormalize(normalizer.normalize(x)), x, atol=tolerance)


def test_extra_dimensions_pass_through_and_missing_ones_use_the_first_statistics() -> None:
    normalizer = Normalizer.quantile([0.0, 0.0], [2.0, 4.0])
    x = np.array([[1.0, 1.0, 9.0, -9.0]])
    assert normalizer.normalize(x)[0, 2:].tolist() == [9.0, -9.0]
    assert normalizer.unnormalize(x)[0, 2:].tolist() == [9.0, -9.0]
    assert normalizer.normalize([1.0]) == normalizer.normalize(x)[0, 0]
    assert x.tolist() == [[1.0, 1.0, 9.0, -9.0]], "the argument was changed"


@pytest.mark.parametrize(
    ("build", "values", "message"),
    [
        (Normalizer.zscore, ([0.0, float("nan")], [1.0, 1.0]), "mean is nan at dimension 1"),
        (Normalizer.zscore, ([0.0, 0.0], [1.0, -0.5]), "std is negative at dimension 1"),
        (Normalizer.zscore, ([0.0, 0.0], [1.0]), "mean has 2 dimensions and std 1"),
        (Normalizer.zscore, ([[0.0]], [1.0]), r"mean has shape \[1, 1\]"),
        (Normalizer.zscore, ([], []), r"mean has shape \[0\]"),
        (Normalizer.zscore, (["a"], [1.0]), "mean is not a list of numbers"),
        (Normalizer.quantile, ([0.0, 2.0], [1.0, 1.0]), "low is 2.0 and high 1.0 at dimension 1"),
        (Normalizer.quantile, ([0.0], [float("inf")]), "high is inf"),
    ],
)
def test_bad_statistics_are_refused(build: Any, values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(*values)


def test_a_scalar_is_refused() -> None:
    with pytest.raises(ValueError, match="scalar"):
        Normalizer.identity().normalize(1.0)


# --- openpi's files -----------------------------------------------------------------------------------------------


def write_openpi(folder: Path, mean: float = 0.0, **changes: Any) -> Path:
    group = {"mean": [mean, 0.0], "std": [1.0, 2.0], "q01": [-1.0, -2.0], "q99": [1.0, 2.0]}
    folder.mkdir(parents=True, exist_ok=True)
    content = {"norm_stats": {"state": group, "actions": {**group, **changes}}}
    (folder / "norm_stats.json").write_text(json.dumps(content))
    return folder


def test_openpi_mode_follows_the_model(tmp_path: Path) -> None:
    write_openpi(tmp_path)
    assert load_norm_stats(tmp_path, PI0).state.mode == "zscore"
    stats = load_norm_stats(tmp_path / "norm_stats.json", PI05)
    assert (stats.state.mode, stats.actions.mode) == ("quantile", "quantile")
    assert stats.source == str(tmp_path / "norm_stats.json") and stats.delta_mask is None


def test_openpi_assets_are_found_from_the_folder_its_params_and_a_file_in_it(tmp_path: Path) -> None:
    write_openpi(tmp_path / "assets" / "physical-intelligence" / "libero", mean=5.0)
    (tmp_path / "params").mkdir()
    (tmp_path / "model.safetensors").touch()
    for source in (tmp_path, tmp_path / "params", tmp_path / "model.safetensors"):
        assert load_norm_stats(source, PI0).state.offset[0] == 5.0
    assert load_norm_stats(tmp_path, PI0, asset_id="physical-intelligence/libero").state.offset[0] == 5.0


def test_several_asset_ids_must_be_chosen_from(tmp_path: Path) -> None:
    write_openpi(tmp_path / "assets" / "trossen", mean=1.0)
    write_openpi(tmp_path / "assets" / "droid", mean=2.0)
    with pytest.raises(ValueError, match=r"\['droid', 'trossen'\]: choose one with asset_id"):
        load_norm_stats(tmp_path, PI0)
    assert load_norm_stats(tmp_path, PI0, asset_id="droid").state.offset[0] == 2.0
    with pytest.raises(ValueError, match=r"asset_id is 'franka', .* statistics for \['droid', 'trossen'\]"):
        load_norm_stats(tmp_path, PI0, asset_id="franka")


def test_missing_statistics_are_an_error_that_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no normalisation statistics in .*_preprocessor\.json, norm_stats\.json"):
        load_norm_stats(tmp_path, PI0)
    with pytest.raises(ValueError, match=r"asset_id is 'trossen'.*nothing"):
        load_norm_stats(tmp_path, PI0, asset_id="trossen")
    assert NormStats.identity().state.normalize([1.0, 2.0]).tolist() == [1.0, 2.0]


def test_malformed_openpi_files_are_refused(tmp_path: Path) -> None:
    write_openpi(tmp_path, q01=None)
    assert load_norm_stats(tmp_path, PI0).actions.mode == "zscore"
    with pytest.raises(ValueError, match=r"norm_stats.actions lacks \['q01'\], which a pi05 checkpoint needs"):
        load_norm_stats(tmp_path, PI05)
    write_openpi(tmp_path, std=[1.0])
    with pytest.raises(ValueError, match=r"norm_stats\.json: norm_stats\.actions: mean has 2 dimensions and std 1"):
        load_norm_stats(tmp_path, PI0)
    for text, message in (("[]", "JSON list"), ("{", "as JSON"), ("{}", "expected 'norm_stats'")):
        (tmp_path / "norm_stats.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_norm_stats(tmp_path, PI0)


# --- lerobot's files ----------------------------------------------------------------------------------------------

STATE_FILE = "policy_preprocessor_step_5_normalizer_processor.safetensors"


def write_lerobot(
    folder: Path,
    modes: dict[str, str] | None = None,
    relative: dict[str, Any] | None = None,
    **settings: Any,
) -> Path:
    modes = {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "QUANTILES"} if modes is None else modes
    config = {"eps": 1e-8, "features": {}, "norm_map": modes, **settings}
    steps: list[dict[str, Any]] = [{"registry_name": "to_batch_processor", "config": {}}]
    if relative is not None:
        steps.append({"registry_name": "relative_actions_processor", "config": relative})
    steps.append({"registry_name": "normalizer_processor", "config": config, "state_file": STATE_FILE})
    post = {"registry_name": "unnormalizer_processor", "config": config, "state_file": "post_7.safetensors"}
    (folder / "policy_preprocessor.json").write_text(json.dumps({"name": "policy_preprocessor", "steps": steps}))
    (folder / "policy_postprocessor.json").write_text(json.dumps({"name": "policy_postprocessor", "steps": [post]}))
    for file, shift in ((STATE_FILE, 0.0), ("post_7.safetensors", 10.0)):
        numbers = {"mean": 1.0, "std": 2.0, "min": -4.0, "max": 4.0, "q01": -1.0, "q99": 1.0, "q10": -0.5, "q90": 0.5}
        save_file(
            {
                f"{feature}.{name}": np.full(3, value + (0.0 if name == "std" else shift), np.float32)
                for feature in ("observation.state", "action", "observation.images.top")
                for name, value in numbers.items()
            },
            folder / file,
        )
    return folder


def test_lerobot_files_name_mode_and_numbers(tmp_path: Path) -> None:
    # The model class would say z-score for both; the file's mode for actions wins, and post- differs from pre-.
    stats = load_norm_stats(write_lerobot(tmp_path), PI0)
    assert (stats.state.mode, stats.actions.mode) == ("zscore", "quantile")
    assert stats.state.normalize([5.0]).tolist() == [2.0]  # (5 - 1) / 2
    assert stats.state.unnormalize([2.0]).tolist() == [5.0]
    assert stats.actions.unnormalize([1.0, -1.0]).tolist() == [11.0, 9.0]
    assert stats.delta_mask is None


@pytest.mark.parametrize(
    ("mode", "expected"), [("MIN_MAX", 4.0), ("QUANTILES", 1.0), ("QUANTILE10", 0.5), ("IDENTITY", 1.0)]
)
def test_lerobot_modes(tmp_path: Path, mode: str, expected: float) -> None:
    stats = load_norm_stats(write_lerobot(tmp_path, {"STATE": mode, "ACTION": mode}), PI05)
    assert stats.state.unnormalize([1.0]).tolist() == [expected]


def test_lerobot_epsilon_comes_from_the_file(tmp_path: Path) -> None:
    stats = load_norm_stats(write_lerobot(tmp_path, eps=2.0), PI0)
    assert stats.state.normalize([5.0]).tolist() == [1.0]  # (5 - 1) / (2 + 2)


def test_lerobot_state_left_out_of_the_normalised_keys_is_identity(tmp_path: Path) -> None:
    stats = load_norm_stats(write_lerobot(tmp_path, normalize_observation_keys=["observation.environment"]), PI0)
    assert stats.state.mode == "identity" and stats.actions.mode == "quantile"


def test_lerobot_relative_actions(tmp_path: Path) -> None:
    names = ["shoulder.pos", "gripper.pos", "wrist.pos"]
    relative = {"enabled": True, "exclude_joints": ["Gripper"], "action_names": names}
    assert load_norm_stats(write_lerobot(tmp_path, relative=relative), PI0).delta_mask == (True, False, True)
    off = {**relative, "enabled": False}
    assert load_norm_stats(write_lerobot(tmp_path, relative=off), PI0).delta_mask == (False, False, False)
    unnamed = {**relative, "action_names": None}
    assert load_norm_stats(write_lerobot(tmp_path, relative=unnamed), PI0).delta_mask == (True, True, True)


def _edit(path: Path, change: Any) -> None:
    data = json.loads(path.read_text())
    change(data["steps"])
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda steps: steps.clear(), "has 0 steps 'normalizer_processor'"),
        (lambda steps: steps.append(steps[-1]), "has 2 steps 'normalizer_processor'"),
        (lambda steps: steps[-1].pop("state_file"), "declares MEAN_STD but its statistics are missing"),
        (lambda steps: steps[-1].update(state_file="absent.safetensors"), "'absent.safetensors'"),
        (lambda steps: steps[-1].update(state_file="../secret.safetensors"), "statistics are missing"),
        (lambda steps: steps[-1]["config"].pop("norm_map"), "no 'norm_map'"),
        (lambda steps: steps[-1]["config"]["norm_map"].update(STATE="LOG"), "mode of STATE is 'LOG', expected"),
    ],
)
def test_malformed_lerobot_files_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write_lerobot(folder)
    save_file({"observation.state.mean": np.zeros(3, np.float32)}, tmp_path / "secret.safetensors")
    _edit(folder / "policy_preprocessor.json", change)
    with pytest.raises(ValueError, match=message):
        load_norm_stats(folder, PI0)


def test_lerobot_files_that_lack_numbers_or_each_other_are_refused(tmp_path: Path) -> None:
    write_lerobot(tmp_path)
    save_file({"action.mean": np.zeros(3, np.float32)}, tmp_path / STATE_FILE)
    with pytest.raises(ValueError, match=r"lacks some of \['observation.state.mean', 'observation.state.std'\]"):
        load_norm_stats(tmp_path, PI0)
    (tmp_path / STATE_FILE).write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="cannot read"):
        load_norm_stats(tmp_path, PI0)
    (tmp_path / "policy_postprocessor.json").unlink()
    with pytest.raises(ValueError, match=r"no policy_postprocessor\.json"):
        load_norm_stats(tmp_path, PI0)


@pytest.mark.parametrize(
    ("dtype", "data"),
    [
        ("F64", np.array([1.5, 2.0, -3.0], "<f8").tobytes()),
        ("F16", np.array([1.5, 2.0, -3.0], "<f2").tobytes()),
        ("BF16", (np.array([1.5, 2.0, -3.0], "<f4").view("<u4") >> 16).astype("<u2").tobytes()),
        ("I16", np.array([1, 2, -3], "<i2").tobytes()),
        ("BOOL", np.array([True, False, True]).tobytes()),
    ],
)
def test_statistics_of_every_type_are_read(dtype: str, data: bytes, tmp_path: Path) -> None:
    """By hand, as a converter may write them: torch, which would read them all, is not asked."""
    expected = {"I16": [1, 2, -3], "BOOL": [1, 0, 1]}.get(dtype, [1.5, 2.0, -3.0])
    write_lerobot(tmp_path)
    names = ("observation.state.mean", "observation.state.std")
    deviations = np.ones(3, "<f4").tobytes()
    header = {
        names[0]: {"dtype": dtype, "shape": [3], "data_offsets": [0, len(data)]},
        names[1]: {"dtype": "F32", "shape": [3], "data_offsets": [len(data), len(data) + len(deviations)]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (tmp_path / STATE_FILE).write_bytes(len(text).to_bytes(8, "little") + text + data + deviations)
    stats = load_norm_stats(tmp_path, PI0)
    assert stats.state.offset.tolist() == expected


def test_a_type_that_is_no_number_is_named(tmp_path: Path) -> None:
    write_lerobot(tmp_path)
    header = {"observation.state.mean": {"dtype": "F8_E4M3", "shape": [3], "data_offsets": [0, 3]}}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (tmp_path / STATE_FILE).write_bytes(len(text).to_bytes(8, "little") + text + bytes(3))
    with pytest.raises(ValueError, match=r"observation\.state\.mean is F8_E4M3, expected one of \['BF16', 'F64'"):
        load_norm_stats(tmp_path, PI0)
