"""JAX checkpoints: those that orbax wrote, and the variations that training on other devices produces."""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from pi0_engine.checkpoints import zarr
from pi0_engine.checkpoints.checkpoint import Checkpoint, open_checkpoint
from tests.support.checkpoints import (
    assert_holds_the_seeded_weights,
    expected_tensor,
    jax_arrays,
    tiny_config,
    write_jax,
)
from tests.support.paths import DATA

tensorstore = pytest.importorskip("tensorstore", reason="JAX checkpoints need the extra [jax]")
ml_dtypes = pytest.importorskip("ml_dtypes")

CHECKPOINTS = DATA / "checkpoints"
PI0 = tiny_config("pi0")
ATTENTION, MLP = "PaliGemma/llm/layers/attn", "PaliGemma/llm/layers/mlp"


@pytest.mark.parametrize(
    ("source", "step", "model_type"),
    [
        ("pi0_tiny_orbax", "1000", "pi0"),
        ("pi0_tiny_orbax/1000", ".", "pi0"),
        ("pi0_tiny_orbax/1000/params", "..", "pi0"),
        ("pi05_tiny_orbax", ".", "pi05"),
        ("pi05_tiny_orbax/params", "..", "pi05"),
    ],
)
def test_directories_written_by_orbax(source: str, step: str, model_type: str) -> None:
    """π0 as training saves it (names end in ``value``), π0.5 as released (they do not)."""
    config = tiny_config(model_type)  # type: ignore[arg-type]
    checkpoint = open_checkpoint(CHECKPOINTS / source, config=config)
    assert checkpoint.path.resolve() == (CHECKPOINTS / source / step).resolve()
    assert checkpoint.format == "openpi-jax"
    assert_holds_the_seeded_weights(checkpoint, config)


@pytest.mark.parametrize(
    "options",
    [
        {"value": True},
        {"chunk_limit": 40},
        {"metadata": {"compressor": None}},
        {"metadata": {"compressor": {"id": "zlib", "level": 1}}},
    ],
    ids=str,
)
def test_other_storage(tmp_path: Path, options: dict[str, object]) -> None:
    config = tiny_config("pi05")
    write_jax(tmp_path, jax_arrays(config), **options)  # type: ignore[arg-type]
    assert_holds_the_seeded_weights(open_checkpoint(tmp_path, config=config), config)


def test_readers_a_few_layers_apart_decode_each_array_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that pack a layer each ask for layers slightly out of order, and for the halves of an array apart."""
    opened: Counter[str] = Counter()
    stored_bytes = zarr._StoredBytes

    def count(store: object, key: str) -> object:
        opened[key] += 1
        return stored_bytes(store, key)

    checkpoint = open_checkpoint(write_jax(tmp_path, jax_arrays(PI0)), config=PI0)
    monkeypatch.setattr(zarr, "_StoredBytes", count)
    halves = ("gate_proj", "up_proj")
    for layer, half in ((1, 0), (0, 0), (2, 0), (0, 1), (2, 1), (1, 1)):
        name = f"llm.layers.{layer}.{halves[half]}.weight"
        assert torch.equal(checkpoint.tensor(name), expected_tensor(name, PI0))
    assert list(opened.values()) == [1]
    again = "llm.layers.1.gate_proj.weight"
    assert torch.equal(checkpoint.tensor(again), expected_tensor(again, PI0))
    assert list(opened.values()) == [2]


def test_bfloat16(tmp_path: Path) -> None:
    arrays = {path: array.astype(ml_dtypes.bfloat16) for path, array in jax_arrays(PI0).items()}
    write_jax(tmp_path, arrays)
    assert_holds_the_seeded_weights(open_checkpoint(tmp_path, config=PI0), PI0, torch.bfloat16)


def low_rank(arrays: dict[str, np.ndarray], path: str, rank: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Adds a random adapter of one array, beside it, as openpi names it."""
    rng, shape = np.random.default_rng(seed), arrays[path].shape
    a = rng.standard_normal((*shape[:-1], rank), dtype=np.float32)
    b = rng.standard_normal((*shape[:-2], rank, shape[-1]), dtype=np.float32)
    stem = f"{path.removesuffix('/w')}/" if path.endswith("/w") else f"{path}_"
    arrays[f"{stem}lora_a"], arrays[f"{stem}lora_b"] = a, b
    return a, b


def project(name: str, checkpoint: Checkpoint, x: np.ndarray) -> np.ndarray:
    return x @ checkpoint.tensor(name).double().numpy().T


@pytest.mark.parametrize(("tower", "suffix", "rank"), [("llm", "", 16), ("expert", "_1", 32)])
def test_adapters_are_merged(tmp_path: Path, tower: str, suffix: str, rank: int) -> None:
    """The merged projection of an input equals openpi's unmerged einsums: base, plus the two factors in turn."""
    gemma, arrays = getattr(PI0, tower), jax_arrays(PI0)
    paths = {
        "q": f"{ATTENTION}/q_einsum{suffix}/w",
        "kv": f"{ATTENTION}/kv_einsum{suffix}/w",
        "o": f"{ATTENTION}/attn_vec_einsum{suffix}/w",
        "gating": f"{MLP}{suffix}/gating_einsum",
        "linear": f"{MLP}{suffix}/linear",
    }
    base = {name: arrays[path].astype(np.float64) for name, path in paths.items()}
    factors = {name: low_rank(arrays, path, rank, seed) for seed, (name, path) in enumerate(paths.items())}
    checkpoint = open_checkpoint(write_jax(tmp_path, arrays, value=True), config=PI0)

    rng = np.random.default_rng(9)
    x = rng.standard_normal((3, gemma.width))
    heads = rng.standard_normal((3, gemma.num_heads, gemma.head_dim))
    hidden = rng.standard_normal((3, gemma.mlp_dim))
    for layer in range(gemma.depth):
        w = {name: array[layer] for name, array in base.items()}
        a = {name: pair[0][layer].astype(np.float64) for name, pair in factors.items()}
        b = {name: pair[1][layer].astype(np.float64) for name, pair in factors.items()}
        unmerged = {
            "q_proj": np.einsum("td,ndh->tnh", x, w["q"])
            + np.einsum("tnr,nrh->tnh", np.einsum("td,ndr->tnr", x, a["q"]), b["q"]),
            "k_proj": np.einsum("td,kdh->tkh", x, w["kv"][0]) + np.einsum("td,kdr,krh->tkh", x, a["kv"][0], b["kv"][0]),
            "v_proj": np.einsum("td,kdh->tkh", x, w["kv"][1]) + np.einsum("td,kdr,krh->tkh", x, a["kv"][1], b["kv"][1]),
            # openpi contracts the heads already in the first factor: its result has no head axis
            "o_proj": np.einsum("tnh,nhd->td", heads, w["o"])
            + np.einsum("tr,nrd->td", np.einsum("tnh,nhr->tr", heads, a["o"]), b["o"]),
            "gate_proj": x @ w["gating"][0] + x @ a["gating"][0] @ b["gating"][0],
            "up_proj": x @ w["gating"][1] + x @ a["gating"][1] @ b["gating"][1],
            "down_proj": hidden @ w["linear"] + hidden @ a["linear"] @ b["linear"],
        }
        for name, expected in unmerged.items():
            inputs = {"o_proj": heads.reshape(3, -1), "down_proj": hidden}.get(name, x)
            merged = project(f"{tower}.layers.{layer}.{name}.weight", checkpoint, inputs)
            np.testing.assert_allclose(merged, expected.reshape(3, -1), rtol=2e-5, atol=2e-4, err_msg=name)

    other = "expert" if tower == "llm" else "llm"
    untouched = f"{other}.layers.1.o_proj.weight"
    assert torch.equal(checkpoint.tensor(untouched), expected_tensor(untouched, PI0))


def test_an_unusual_rank_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arrays = jax_arrays(PI0)
    low_rank(arrays, f"{MLP}/linear", rank=4, seed=0)
    open_checkpoint(write_jax(tmp_path, arrays), config=PI0)
    assert "adapter of rank 4 where openpi's variants have 16; merging with alpha = rank" in caplog.text


def test_adapters_that_do_not_fit(tmp_path: Path) -> None:
    arrays = jax_arrays(PI0)
    low_rank(arrays, f"{MLP}/linear", rank=16, seed=0)
    low_rank(arrays, f"{ATTENTION}/q_einsum/w", rank=16, seed=0)
    low_rank(arrays, f"{MLP}_1/linear", rank=32, seed=0)
    del arrays[f"{MLP}/linear_lora_b"]
    arrays[f"{ATTENTION}/q_einsum/lora_a"] = np.zeros((3, 8, 5, 16), np.float32)
    arrays[f"{MLP}_1/linear_lora_a"] = arrays[f"{MLP}_1/linear_lora_a"].astype(np.float64)
    write_jax(tmp_path, arrays)
    with pytest.raises(ValueError, match=r"arrays that do not fit together \(3\)") as error:
        open_checkpoint(tmp_path, config=PI0)
    assert "mlp.linear: its adapter is incomplete" in str(error.value)
    assert "q_einsum.w [3, 8, 64, 32]: lora_a [3, 8, 5, 16]" in str(error.value)
    assert "mlp_1.linear: its adapter has the dtypes <f8 and float32" in str(error.value)


def test_one_error_names_everything(tmp_path: Path) -> None:
    arrays = jax_arrays(PI0)
    del arrays[f"{MLP}/gating_einsum"], arrays["action_in_proj/bias"]
    arrays["value_head/kernel"] = np.ones((2, 2), np.float32)
    arrays[f"{MLP}/linear_lora"] = np.ones((2, 2), np.float32)
    arrays["state_proj/kernel"] = arrays["state_proj/kernel"][:7]
    arrays["state_proj/bias"] = arrays["state_proj/bias"].astype(np.int32)
    write_jax(tmp_path, arrays)
    with pytest.raises(ValueError) as error:
        open_checkpoint(tmp_path, config=PI0)
    assert str(error.value).splitlines() == [
        f"{tmp_path}/params: the tensors are not those of the model (sizes from the given config)",
        "  missing (2):",
        "    PaliGemma.llm.layers.mlp.gating_einsum",
        "    action_in_proj.bias",
        "  unexpected (2):",
        "    params.PaliGemma.llm.layers.mlp.linear_lora",
        "    params.value_head.kernel",
        "  misshapen (1):",
        "    params.state_proj.kernel: [48, 7], expected [48, 32]",
        "  not float32, bfloat16, float16 (1):",
        "    params.state_proj.bias: <i4",
    ]


def test_arrays_of_another_rank(tmp_path: Path) -> None:
    arrays = jax_arrays(PI0)
    arrays["state_proj/bias"] = arrays["state_proj/bias"][None]
    arrays[f"{ATTENTION}/kv_einsum/w"] = arrays[f"{ATTENTION}/kv_einsum/w"][:, :1]
    write_jax(tmp_path, arrays)
    with pytest.raises(ValueError, match=r"do not fit together \(2\)") as error:
        open_checkpoint(tmp_path, config=PI0)
    assert "kv_einsum.w: [3, 1, 1, 64, 32], expected the axes L 2 K D H" in str(error.value)


def test_other_models(tmp_path: Path) -> None:
    arrays = jax_arrays(PI0)
    without_expert = {path: array for path, array in arrays.items() if "_1/" not in path}
    with pytest.raises(ValueError, match="a language model but no action expert"):
        open_checkpoint(write_jax(tmp_path / "fast", without_expert))
    with pytest.raises(ValueError, match=r"is not a π0 or π0\.5 checkpoint"):
        open_checkpoint(write_jax(tmp_path / "other", {"Dense_0/kernel": np.ones((2, 2), np.float32)}))


def test_damaged_data_is_an_error_when_read(tmp_path: Path) -> None:
    write_jax(tmp_path, jax_arrays(PI0))
    for file in (tmp_path / "params/d").iterdir():
        content = file.read_bytes()
        if len(content) > 100_000:
            file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"array params\.\S+ cannot be read, its data is damaged or missing"):
        checkpoint = open_checkpoint(tmp_path, config=PI0)
        for name in checkpoint.shapes:
            checkpoint.tensor(name)


def test_damaged_directories(tmp_path: Path) -> None:
    (tmp_path / "params").mkdir()
    (tmp_path / "params/manifest.ocdbt").write_bytes(b"not a manifest")
    with pytest.raises(ValueError, match="is damaged or not an orbax checkpoint"):
        open_checkpoint(tmp_path)
    tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{tmp_path}/empty/params/"}).result().write(
        "a", json.dumps({}).encode()
    ).result()
    with pytest.raises(ValueError, match="holds no arrays"):
        open_checkpoint(tmp_path / "empty")


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    with pytest.raises(ValueError, match=r"needs tensorstore and zstandard, pip install 'pi0-engine\[jax\]'"):
        open_checkpoint(CHECKPOINTS / "pi05_tiny_orbax")


def test_opening_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    open_checkpoint(CHECKPOINTS / "pi0_tiny_orbax", config=PI0)
    assert "pi0_tiny_orbax: taking 1000" in caplog.text
    assert "openpi-jax pi0, sizes from the given config" in caplog.text
