"""Rows of a chunked, compressed array, decoded in order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pi0_engine.checkpoints import zarr
from pi0_engine.checkpoints.zarr import open_arrays
from tests.support.checkpoints import write_jax

tensorstore = pytest.importorskip("tensorstore", reason="JAX checkpoints need the extra [jax]")
bytes_of_store = zarr._StoredBytes


@pytest.fixture
def stack(tmp_path: Path) -> np.ndarray:
    array = np.random.default_rng(0).standard_normal((7, 5, 6), dtype=np.float32)
    write_jax(tmp_path, {"a": array})
    return array


def test_layers_in_any_order(tmp_path: Path, stack: np.ndarray) -> None:
    array = open_arrays(tmp_path / "params")["params.a"]
    for layer in (0, 1, 4, 4, 6, 2, 0):
        assert np.array_equal(array.read_rows(layer, layer + 1)[0].numpy(), stack[layer])
    assert np.array_equal(array.read_rows(2, 6).numpy(), stack[2:6])


def test_layers_in_order_decode_the_chunk_once(
    tmp_path: Path, stack: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    monkeypatch.setattr(zarr, "_StoredBytes", lambda *args: opened.append(args) or bytes_of_store(*args))
    array = open_arrays(tmp_path / "params")["params.a"]
    for layer in range(7):
        array.read_rows(layer, layer + 1)
    assert len(opened) == 1


def test_a_tensorstore_that_reads_whole_values_only(
    tmp_path: Path, stack: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = open_arrays(tmp_path / "params")["params.a"]

    class OldStore:
        def __init__(self, store: tensorstore.KvStore) -> None:
            self._store = store

        def read(self, key: str) -> object:
            return self._store.read(key)

    monkeypatch.setattr(array, "_store", OldStore(array._store))
    assert np.array_equal(array.read_rows(0, 7).numpy(), stack)


def test_zarr3(tmp_path: Path) -> None:
    array = np.random.default_rng(0).standard_normal((3, 4), dtype=np.float32)
    store = {"driver": "ocdbt", "base": f"file://{tmp_path}/", "path": "params.a/"}
    spec = {"driver": "zarr3", "kvstore": store, "dtype": "float32", "schema": {"domain": {"shape": [3, 4]}}}
    tensorstore.open(spec, create=True).result().write(array).result()
    assert np.array_equal(open_arrays(tmp_path)["params.a"].read_rows(1, 3).numpy(), array[1:])


def test_chunks_left_out_are_zero(tmp_path: Path) -> None:
    """Without store_data_equal_to_fill_value a chunk of zeros is not written."""
    path = tmp_path / "params"
    write_jax(tmp_path, {"a": np.zeros((3, 4), np.float32)}, metadata={"fill_value": 0})
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{path}/"}).result()
    assert b"params.a/0.0" not in store.list().result()
    assert np.array_equal(open_arrays(path)["params.a"].read_rows(1, 3).numpy(), np.zeros((2, 4)))
