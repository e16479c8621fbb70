"""Stores of every version of the format open for ever, with the values that were written; a newer version is refused with a sentence.

The files in ``old_stores/`` were written once by the code of their time (`make_old_store.py`) and are never made again.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import xarray as xr
from paths import OLD_STORES

import lmprobe_zarr as lz
from lmprobe_zarr.errors import ReadOnlyError, UnsupportedVersionError
from lmprobe_zarr.store.format.names import PART_VERSION

OLD = OLD_STORES
VERSIONS = [f"version-{number}" for number in range(1, PART_VERSION + 1)]
DTYPES = {"resid": "float16", "resid_mean": "float32", "logits_last_token_top_k_indices": "int32"}


@pytest.fixture(params=VERSIONS)
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy, so that what reads it can be seen to write nothing."""
    shutil.copytree(OLD / request.param, tmp_path / "old")
    return tmp_path / "old"


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def check(store: lz.Store, expected: dict[str, npt.NDArray[Any]], group: str) -> None:
    """Every array that is expected of a group, and nothing else."""
    data, tokens = store.dataset(group=group, dtype="stored"), store.tokens(group=group, dtype="stored")
    wanted = {key.removeprefix(f"{group}/"): array for key, array in expected.items() if key.startswith(f"{group}/")}
    for key, array in wanted.items():
        level, _, name = key.rpartition("/")
        found = (tokens if level == "tokens" else data)[name].values
        if name == "n_tokens" and found.dtype.kind == "f":
            array = np.where(array > 0, array, np.nan)  # the versions before showed 0 where no tokens are kept
        np.testing.assert_array_equal(found, array, err_msg=key)
        if name in DTYPES and group.startswith("acme--toy"):
            assert found.dtype == DTYPES[name], key
    for level, dataset in (("prompts", data), ("tokens", tokens)):
        assert {f"{level}/{name}" for name in dataset.data_vars} <= set(wanted)


def load(old: Path) -> dict[str, npt.NDArray[Any]]:
    with np.load(old / "expected.npz", allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


def test_there_is_a_store_of_every_version() -> None:
    assert sorted(path.name for path in OLD.iterdir()) == VERSIONS


@pytest.mark.few(2)
@pytest.mark.parametrize("mode", ["r", "a"])
def test_an_old_store_opens_with_the_values_that_were_written(old: Path, mode: Any) -> None:
    expected, before = load(old), files_of(old)
    store = lz.open_store(old / "store", mode=mode)
    groups = {key.split("/")[0] for key in expected}
    assert set(store.groups()) == groups
    for group in groups:
        check(store, expected, group)
    data = store.dataset("acme/toy")
    for name, wanted in json.loads((old / "expected.json").read_text()).items():
        found = [None if value != value else value for value in data[name].values.tolist()]
        assert found == wanted, name
    assert store.tokens("acme/toy").attn.attrs["stored_dtype"] == "bfloat16"
    assert store.find_group("acme/toy").provenance["scale"] == 0.5
    now = files_of(old)
    # A store that may be written to notes that it was read.
    assert {name: data for name, data in now.items() if mode == "r" or "/.used/" not in name} == before


def test_an_old_published_copy_opens_too_and_stays_frozen(old: Path) -> None:
    expected = load(old)
    assert lz.open_store(old / "published").dataset().label.values.tolist()[1] == 3
    for copy in sorted(old.glob("published*")):
        store = lz.open_store(copy)
        (group,) = store.groups()
        check(store, expected, group)
        assert store.verify().ok
        with pytest.raises(ReadOnlyError):
            lz.open_store(copy, mode="a")


def test_the_store_of_version_2_has_what_version_2_has() -> None:
    folder = OLD / "version-2"
    store = lz.open_store(folder / "store", mode="r")
    view = store.view(store.find_group("acme/large"))
    tables = [(part, key, table) for part in view.parts for key, table in (part.info.tables or {}).items()]
    blocks = [(part.info.arrays[key], table) for part, key, table in tables if table.block_nbytes]
    assert {table.chunks is None for _, _, table in tables} == {True, False}, "in the document and as a file"
    assert {table.blocks is None for _, table in blocks} == {True, False}
    assert {info.shuffle is None for info, _ in blocks} == {True, False}, "in compressed chunks and in raw ones"
    assert {info.shard_blocks > 0 for info, _ in blocks} == {True, False}
    assert any(note.info.is_tombstone for note in view.annotations)
    tokens = store.tokens("acme/large")
    assert tokens.head_scores.dims == ("layer", "token", "head_scores_unit")
    assert {"role", "turn", "generated"} <= set(tokens.coords)
    assert {part.info.version for name in store.groups() for part in store.view(store.find_group(group=name)).parts} == {2}
    assert lz.open_store(folder / "published-large").view(store.find_group("acme/large")).parts[1].info.has_shards
    assert sum(len(data) for data in files_of(folder).values()) < 2 * 2**20


def test_plain_xarray_reads_a_part_of_an_old_store(old: Path) -> None:
    store = lz.open_store(old / "store")
    (part,) = (candidate for candidate in store.view(store.find_group("acme/toy")).parts if "tokens/resid" in candidate.info.arrays)
    plain = xr.open_zarr(f"{old / 'store'}/{part.path}", group="tokens", chunks=None)
    np.testing.assert_array_equal(plain.resid.values, store.tokens("acme/toy").resid.sel(layer=list(part.info.layers)).values)


@pytest.mark.few(1)
def test_an_old_store_grows_and_is_compacted_and_verified(old: Path) -> None:
    expected = load(old)
    store = lz.open_store(old / "store")
    lz.write_activations(store, model="new", prompts=["n"], pooled={"resid_mean": {0: np.ones((1, 4), np.float32)}})
    assert store.verify().ok
    store.compact()
    store.gc(max_age=0)
    assert store.verify().ok
    for group in {key.split("/")[0] for key in expected}:
        check(lz.open_store(old / "store"), expected, group)


@pytest.mark.parametrize("document", ["zarr.json", "*/zarr.json", "*/*/zarr.json"])
def test_a_newer_version_is_refused_with_a_sentence(old: Path, document: str) -> None:
    before = files_of(old)
    for path in (old / "store").glob(document):
        path.write_text(re.sub(r'"format_version":\d', f'"format_version":{PART_VERSION + 1}', path.read_text()))
    assert files_of(old) != before
    with pytest.raises(UnsupportedVersionError) as error:
        lz.open_store(old / "store").dataset("acme/toy")
    assert f"format version {PART_VERSION + 1}" in str(error.value)
    assert ("reads versions 1 and 2:" if document == "*/*/zarr.json" else "reads version 1:") in str(error.value)
    assert "upgrade lmprobe-zarr" in str(error.value)
    assert len(str(error.value).splitlines()) <= 2
