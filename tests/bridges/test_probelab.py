"""Activations that probelab 0.1.0 saved, imported and read where they lie; the truth is what probelab itself reads."""

from __future__ import annotations

import builtins
import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from paths import DATA

import lmprobe_zarr as lz
from lmprobe_zarr.errors import (
    CorruptFileError,
    InvalidArgumentError,
    MissingDependencyError,
    NotAStoreError,
    UnsupportedVersionError,
)

FOLDER = DATA / "probelab-0.1.0"
TRUTH = np.load(DATA / "probelab-truth.npz")
OFFSETS = TRUTH["offsets"]
PROMPTS: list[Any] = ["one", [5, ], "three"]  # fmt: skip
FILES = {"memmap": "memmap", "tokens": "tokens.h5", "tokens-float32-gzip": "tokens-float32-gzip.h5"}


def imported(path: Path, place: Path, **options: Any) -> tuple[lz.Store, lz.ImportSummary]:
    summary = lz.import_probelab(path, place, model="m", **{"prompts": PROMPTS, "progress": False, **options})
    return lz.open_store(place), summary


@pytest.mark.parametrize("name", FILES)
def test_every_value_is_the_one_that_probelab_reads(tmp_path: Path, name: str) -> None:
    store, summary = imported(FOLDER / FILES[name], tmp_path / "acts", strict=True)
    assert summary.imported == 3
    (info,) = store.groups().values()
    assert info.provenance == {"engine": "probelab"}
    tokens = store.tokens(dtype="stored")
    assert tokens.layer.values.tolist() == [2, 5]
    assert tokens.resid.attrs.get("stored_dtype", "float32") == ("float32" if "float32" in name else "bfloat16")
    opened = lz.open_legacy(FOLDER / FILES[name], "m", tool="probelab", level="tokens", options={"prompts": PROMPTS})
    for prompt, a, b in zip(PROMPTS, OFFSETS[:-1], OFFSETS[1:], strict=True):
        for place, layer in enumerate((5, 2)):
            expected = TRUTH[name][a:b, place]
            np.testing.assert_array_equal(tokens.resid.sel(layer=layer, prompt=lz.prompt_hash(prompt)), expected)
            np.testing.assert_array_equal(opened.resid.sel(layer=layer, prompt=lz.prompt_hash(prompt))[-1:], expected[-1:])
    (note,) = summary.notes[:1]
    assert (note.count, "detection masks" in note.text) == (3, True)


def test_what_the_file_does_not_say_is_asked_for(tmp_path: Path) -> None:
    one, pooled = FOLDER / "one-layer.h5", FOLDER / "pooled.h5"
    with pytest.raises(InvalidArgumentError, match="layers="):
        imported(one, tmp_path / "acts")
    store, _ = imported(one, tmp_path / "acts", layers=[7], variable="mlp")
    np.testing.assert_array_equal(store.tokens(dtype="stored").mlp.sel(layer=7, prompt=lz.prompt_hash("three")), TRUTH["one-layer"][5:8])
    with pytest.raises(InvalidArgumentError, match="variable='resid_mean'"):
        imported(pooled, tmp_path / "pooled")
    with pytest.raises(InvalidArgumentError, match="does not fit"):
        imported(pooled, tmp_path / "pooled", variable="resid")
    store, _ = imported(pooled, tmp_path / "pooled", variable="resid_mean")
    np.testing.assert_array_equal(
        store.dataset(dtype="stored").resid_mean.sel(prompt=lz.prompt_hash("three"), layer=[5, 2]), TRUTH["pooled"][2]
    )
    opened = lz.open_legacy(pooled, "m", tool="probelab", options={"prompts": PROMPTS, "variable": "resid_mean"})
    np.testing.assert_array_equal(opened.resid_mean.sel(prompt=lz.prompt_hash("one"), layer=2), TRUTH["pooled"][0, 1])


@pytest.mark.parametrize("name", FILES)
def test_prompts_and_layers_that_do_not_fit_are_errors(tmp_path: Path, name: str) -> None:
    path = FOLDER / FILES[name]
    for options, match in (
        ({"prompts": ["one", "two"]}, "holds 3 prompts, and 2"), ({"prompts": ["one", [1, 2], "three"]}, "2 token ids"),
        ({"layers": [1]}, "holds 2 layers"), ({"layers": [1, 1]}, "a different block"), ({"layers": [-1, 1]}, "from 0"),
        ({"variable": "resid_mean"}, "does not fit"),
    ):  # fmt: skip
        with pytest.raises(InvalidArgumentError, match=match):
            imported(path, tmp_path / "acts", **options)
    store, _ = imported(path, tmp_path / "acts", layers=[0, 1])
    np.testing.assert_array_equal(store.tokens(dtype="stored").resid.sel(layer=0, prompt=lz.prompt_hash("one")), TRUTH[name][:4, 0])


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FOLDER, tmp_path / "copy"))


@pytest.mark.parametrize("name", ["layer_5.bin", "offsets.bin", "detection_mask.bin", "meta.json"])
@pytest.mark.parametrize("how", ["removed", "cut", "link"])
def test_a_damaged_folder_is_an_error_and_nothing_is_written(copy: Path, tmp_path: Path, name: str, how: str) -> None:
    victim = copy / "memmap" / name
    if how == "link":
        shutil.move(victim, tmp_path / "elsewhere")
        victim.symlink_to(tmp_path / "elsewhere")
    else:
        victim.write_bytes(victim.read_bytes()[:-3])
        if how == "removed":
            victim.unlink()
    with pytest.raises((CorruptFileError, NotAStoreError), match=name):
        imported(copy / "memmap", tmp_path / "acts")
    assert not (tmp_path / "acts").exists()


def test_documents_that_lie_are_errors(copy: Path, tmp_path: Path) -> None:
    meta = copy / "memmap/meta.json"
    said = json.loads(meta.read_text())
    for changed, error in (
        ({**said, "format": "memmap_v2"}, UnsupportedVersionError), ({**said, "layers": ["../../secret"]}, CorruptFileError),
        ({**said, "hidden_dim": 0}, CorruptFileError), ({**said, "layers": [5, 3]}, CorruptFileError),
    ):  # fmt: skip
        meta.write_text(json.dumps(changed))
        with pytest.raises(error):
            imported(copy / "memmap", tmp_path / "acts")
    meta.write_text(json.dumps(said))
    np.array([0, 5, 4, 8]).tofile(copy / "memmap/offsets.bin")
    with pytest.raises(CorruptFileError, match=r"offsets\.bin does not ascend"):
        imported(copy / "memmap", tmp_path / "acts")


def test_damaged_hdf5_files_are_errors(copy: Path, tmp_path: Path) -> None:
    victim = copy / "tokens.h5"
    victim.write_bytes(victim.read_bytes()[:-500])
    with pytest.raises(CorruptFileError, match=r"tokens\.h5 is no HDF5 file, or is cut off"):
        imported(victim, tmp_path / "acts")
    compressed = copy / "tokens-float32-gzip.h5"
    with h5py.File(compressed) as file:
        chunk = file["data"].id.get_chunk_info(0)
    data = bytearray(compressed.read_bytes())
    data[chunk.byte_offset : chunk.byte_offset + chunk.size] = bytes(chunk.size)
    compressed.write_bytes(data)
    with pytest.raises(CorruptFileError, match=r"tokens-float32-gzip\.h5"):
        lz.open_legacy(compressed, "m", tool="probelab", level="tokens", options={"prompts": PROMPTS}).resid.compute()
    with h5py.File(copy / "pooled.h5", "r+") as file:
        del file.attrs["dims"]
    with pytest.raises(NotAStoreError, match="no file of probelab"):
        imported(copy / "pooled.h5", tmp_path / "acts")


@pytest.mark.parametrize("how", ["external link", "soft link", "external values", "virtual"])
def test_an_hdf5_file_that_leads_to_others_is_not_followed(copy: Path, tmp_path: Path, how: str) -> None:
    values = np.ones((8, 2, 6), "float32")
    values.tofile(tmp_path / "secret.bin")
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["data"] = values
    path = copy / "tokens-float32-gzip.h5"
    with h5py.File(path, "r+") as file:
        file.move("data", "other")
        if how == "external link":
            file["data"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "data")
        elif how == "soft link":
            file["data"] = h5py.SoftLink("/other")
        elif how == "external values":
            file.create_dataset("data", (8, 2, 6), "float32", external=[(str(tmp_path / "secret.bin"), 0, values.nbytes)])
        else:
            layout = h5py.VirtualLayout((8, 2, 6), "float32")
            layout[:] = h5py.VirtualSource(str(tmp_path / "secret.h5"), "data", (8, 2, 6))
            file.create_virtual_dataset("data", layout)
    with pytest.raises(CorruptFileError, match="not followed"):
        imported(path, tmp_path / "acts")


def test_without_h5py_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any, **options: Any) -> Any:
        if name == "h5py":
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingDependencyError, match="pip install"):
        imported(FOLDER / "tokens.h5", tmp_path / "acts")
    _, summary = imported(FOLDER / "memmap", tmp_path / "acts")
    assert summary.imported == 3


def test_what_probelab_did_not_save_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotAStoreError, match="probelab"):
        imported(tmp_path, tmp_path / "acts")
    (tmp_path / "file.h5").write_bytes(b"no HDF5")
    with pytest.raises(CorruptFileError, match=r"file\.h5"):
        imported(tmp_path / "file.h5", tmp_path / "acts")
    with pytest.raises(InvalidArgumentError, match="copy it to this machine"):
        imported("s3://bucket/acts.h5", tmp_path / "acts")  # type: ignore[arg-type]
