"""Directions in files, read again here and by the readers of safetensors and gguf."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import lmprobe_zarr as lz
from lmprobe_zarr.errors import CorruptFileError, InvalidArgumentError, InvalidTypeError, MissingDependencyError


@pytest.fixture(scope="module")
def array() -> xr.DataArray:
    x = np.random.default_rng(0).standard_normal((4, 40, 8)).astype("float32")
    coords = {"layer": np.arange(4), "prompt": [f"p{i}" for i in range(40)], "model": "a/model"}
    return xr.DataArray(x, dims=("layer", "prompt", "hidden"), coords=coords, name="resid_mean")


@pytest.fixture(scope="module")
def directions(array: xr.DataArray) -> xr.Dataset:
    return lz.fit_directions(array, np.where(np.arange(40) % 2, "true", "false"), "ridge")


def test_a_safetensors_file_holds_everything_and_others_read_it(directions: xr.Dataset, array: xr.DataArray, tmp_path: Path) -> None:
    place = tmp_path / "directions.safetensors"
    directions.lz.save(place)
    found = lz.load_directions(place)
    xr.testing.assert_identical(found, directions)
    assert found.coef.dtype == np.float64
    decision = (array * found.coef).sum("hidden") + found.intercept
    np.testing.assert_array_equal(decision, (array * directions.coef).sum("hidden") + directions.intercept)
    several = lz.fit_directions(array, np.arange(40) % 3, "ridge")
    several.lz.save(place)
    xr.testing.assert_identical(lz.load_directions(place), several)
    assert [each.name for each in tmp_path.iterdir()] == [place.name]


def test_the_reader_of_safetensors_reads_it(directions: xr.Dataset, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    place = tmp_path / "directions.safetensors"
    directions.lz.save(place)
    with safetensors.safe_open(place, framework="np") as file:
        np.testing.assert_array_equal(file.get_tensor("coef"), directions.coef.values)
        told = file.metadata()
    assert told["model"] == "a/model"
    assert told["site"] == "resid_mean"
    assert json.loads(told["layers"]) == [0, 1, 2, 3]
    assert told["sign"] == "towards 'true', away from 'false'"
    assert told["scale"] == "coefficients: score per unit of activation"


@pytest.mark.parametrize("unit", ["activations", "mean_norm"])
def test_a_control_vector_is_read_by_gguf_and_loaded_again(directions: xr.Dataset, tmp_path: Path, unit: str) -> None:
    gguf = pytest.importorskip("gguf")
    place, some = tmp_path / "directions.gguf", directions.sel(layer=[1, 3])
    some.lz.save(place, unit=unit)
    reader = gguf.GGUFReader(place)
    told = {name: field.contents() for name, field in reader.fields.items()}
    assert told["general.architecture"] == "controlvector"
    assert told["controlvector.model_hint"] == told["lmprobe_zarr.model"] == "a/model"
    assert told["controlvector.layer_count"] == 2
    assert told["lmprobe_zarr.site"] == "resid_mean"
    assert told["lmprobe_zarr.sign"] == "towards 'true', away from 'false'"
    assert told["lmprobe_zarr.scale"].startswith(f"1 {unit}: ")
    assert [tensor.name for tensor in reader.tensors] == ["direction.1", "direction.3"]
    for tensor, layer in zip(reader.tensors, (1, 3), strict=True):
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert tensor.shape.tolist() == [8]
        row = some.coef.sel(layer=layer).values
        length = 1.0 if unit == "activations" else float(some.mean_norm.sel(layer=layer))
        np.testing.assert_allclose(tensor.data, length * row / np.linalg.norm(row), rtol=1e-6)
    found = lz.load_directions(place)
    np.testing.assert_allclose(found.coef, some.coef, rtol=1e-6)
    np.testing.assert_allclose(found.intercept, some.intercept)
    np.testing.assert_allclose(found.mean_norm, some.mean_norm)
    assert found.attrs == some.attrs
    assert found.model.item() == "a/model"


def test_a_control_vector_of_another_tool_is_read(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "controlvector")
    writer.add_string("controlvector.model_hint", "mistral")
    writer.add_uint32("controlvector.layer_count", 2)
    for layer in (2, 10):
        writer.add_tensor(f"direction.{layer}", np.full(3, layer, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = lz.load_directions(tmp_path / "other.gguf")
    assert found.layer.values.tolist() == [2, 10]
    assert found.coef.values.tolist() == [[2, 2, 2], [10, 10, 10]]
    assert found.model.item() == "mistral"


def test_what_a_file_cannot_hold_is_refused_and_leaves_the_old_one(directions: xr.Dataset, array: xr.DataArray, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    place = tmp_path / "directions.gguf"
    directions.sel(layer=[1]).lz.save(place)
    before = place.read_bytes()
    nan = directions.assign(coef=directions.coef.where(directions.layer != 2)).sel(layer=[1, 2])
    for data, options, words in (
        (directions, {}, "a control vector has no direction of layer 0"),
        (lz.fit_directions(array, np.arange(40) % 3, "ridge"), {}, "a control vector is one direction for each layer: choose a class"),
        (nan, {}, "the direction of layer 2 is zero, NaN or infinite"),
        (directions.sel(layer=[1]), {"unit": "metres"}, "unit='metres' is unknown"),
        (directions.sel(layer=[1]).drop_vars("mean_norm"), {"unit": "mean_norm"}, "needs the variable 'mean_norm'"),
    ):
        with pytest.raises(InvalidArgumentError, match=words):
            data.lz.save(place, **options)
        assert place.read_bytes() == before
        assert [each.name for each in tmp_path.iterdir()] == [place.name]
    with pytest.raises(InvalidArgumentError, match="ends in no known format"):
        directions.lz.save(tmp_path / "directions.pt")
    with pytest.raises(InvalidArgumentError, match="safetensors holds coefficients as they are"):
        directions.lz.save(tmp_path / "a.safetensors", unit="mean_norm")
    with pytest.raises(InvalidTypeError, match="only directions can be saved"):
        xr.Dataset({"accuracy": ("layer", [1.0])}).lz.save(tmp_path / "a.safetensors")


def test_damaged_and_foreign_files_are_errors(directions: xr.Dataset, tmp_path: Path) -> None:
    place = tmp_path / "a.safetensors"
    directions.lz.save(place)
    raw = place.read_bytes()
    for damaged in (raw[:-8], raw[:40], b"", b"\0" * 100, raw.replace(b"lmprobe-zarr directions", b"lmprobe-zarr dirextions")):
        place.write_bytes(damaged)
        with pytest.raises(CorruptFileError, match="holds no directions that can be read"):
            lz.load_directions(place)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        lz.load_directions(tmp_path / "nothing.safetensors")
    with pytest.raises(InvalidArgumentError, match="ends in no known format"):
        lz.load_directions(tmp_path / "a.bin")


def test_damaged_and_foreign_control_vectors_are_errors(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    place = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(place, "llama")
    writer.add_tensor("direction.1", np.ones(3, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CorruptFileError, match="a GGUF file of 'llama', and no control vector"):
        lz.load_directions(place)
    for damaged in (place.read_bytes()[:20], b"", b"GGUF" + b"\0" * 60):
        place.write_bytes(damaged)
        with pytest.raises(CorruptFileError, match="holds no directions"):
            lz.load_directions(place)


def test_without_gguf_the_message_says_what_to_install(directions: xr.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    modules: dict[str, Any] = sys.modules
    monkeypatch.setitem(modules, "gguf", None)
    with pytest.raises(MissingDependencyError, match=r"lmprobe-zarr\[gguf\]"):
        directions.sel(layer=[1]).lz.save(tmp_path / "a.gguf")
