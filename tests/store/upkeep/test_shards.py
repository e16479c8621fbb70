"""Shards through all upkeep: merged, published, copied, dropped, deleted, collected, given up; the view is always that of single files."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from shown_values import assert_same, shown
from stores import GROUP, make_batch

import lmprobe_zarr as lz
from lmprobe_zarr.errors import CorruptPartError
from lmprobe_zarr.store.format import ArrayInfo
from lmprobe_zarr.store.parts import writer, written_arrays
from lmprobe_zarr.store.store import Store
from lmprobe_zarr.store.upkeep import verify

TEXTS = [f"prompt {i}" for i in range(60)]


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few rows and shards of four chunks, so that small stores have many of both."""
    for name, value in {
        "CHUNK_BYTES": 512,
        "REMOTE_CHUNK_BYTES": 512,
        "MIN_CHUNK_BYTES": 1,
        "SHARD_BYTES": 2048,
        "REMOTE_SHARD_BYTES": 2048,
    }.items():
        monkeypatch.setattr(writer, name, value)


def filled(url: str) -> Store:
    """Three parts and a column, with values that a later part replaces."""
    store = lz.open_store(url)
    for number, some in enumerate((TEXTS[:25], TEXTS[20:50], TEXTS[45:])):
        store.write(GROUP, make_batch(some, seed=number))
    store.annotate("acme/toy", {"label": {text: i for i, text in enumerate(TEXTS)}})
    return lz.open_store(url)


def arrays(store: Store) -> dict[str, ArrayInfo]:
    """The variables of a store that was compacted to one part."""
    (part,) = store.view(GROUP).parts
    return part.info.activations


@pytest.mark.few(1)
def test_a_merged_part_has_shards_and_shows_the_same(root: str) -> None:
    store = filled(root)
    before = shown(store)
    store.compact(progress=False)
    after = lz.open_store(root)
    assert_same(after, before)
    layered = {key: array for key, array in arrays(after).items() if array.layered}
    assert layered
    for key, array in layered.items():
        assert array.shard_blocks >= 2, key
        assert array.n_files < array.n_blocks, key
    assert any(array.n_files > 1 for array in layered.values()), "one layer is several shards"
    assert after.verify(progress=False).ok


@pytest.mark.few(1)
def test_shards_false_gives_each_chunk_a_file(root: str) -> None:
    store = filled(root)
    before = shown(store)
    store.compact(shards=False, progress=False)
    after = lz.open_store(root)
    assert_same(after, before)
    assert not any(array.shard_blocks for array in arrays(after).values())


def test_zarr_reads_every_shard(tmp_path: Path) -> None:
    store = filled(str(tmp_path / "acts"))
    store.compact(progress=False)
    store.gc(max_age=0)
    again = lz.open_store(store.url)
    (part,) = again.view(GROUP).parts
    for key, array in part.info.activations.items():
        level, _, name = key.partition("/")
        plain = zarr.open_array(str(tmp_path / "acts" / part.path / key), mode="r")
        stored: Any = part.array("tokens" if level == "tokens" else "prompts", name)
        layers = range(array.shape[0] if array.layered else 1)
        rows = [np.concatenate([stored.read_chunk(layer, block) for block in range(array.n_blocks)]) for layer in layers]
        expected = np.stack(rows)[:, : array.shape[array.sample_axis]] if array.layered else rows[0][: array.shape[0]]
        np.testing.assert_array_equal(plain[:], expected)
        assert (plain.shards is not None) == bool(array.shard_blocks)


@pytest.mark.few(1)
@pytest.mark.parametrize("shards", [True, False])
def test_a_published_copy_shows_the_same(root: str, tmp_path: Path, shards: bool) -> None:
    store = filled(root)
    store.publish(str(tmp_path / "copy"), shards=shards, progress=False)
    copy = lz.open_store(str(tmp_path / "copy"))
    assert_same(copy, shown(store))
    assert copy.verify(progress=False).ok
    assert any(array.shard_blocks for array in arrays(copy).values()) == shards


def test_a_copy_of_shards_is_byte_by_byte_and_a_damaged_one_is_not_copied(tmp_path: Path) -> None:
    store = filled(str(tmp_path / "acts"))
    store.compact(progress=False)
    store.gc(max_age=0)
    store = lz.open_store(store.url)
    store.copy_to(str(tmp_path / "team"), progress=False)
    (part,) = store.view(GROUP).parts
    names = sorted(part.info.file_names())
    for name in names:
        assert (tmp_path / "team" / part.path / name).read_bytes() == (tmp_path / "acts" / part.path / name).read_bytes()
    assert_same(lz.open_store(str(tmp_path / "team")), shown(store))
    (shard,) = [name for name in names if name.endswith("resid/c.1.0.0")]
    path = tmp_path / "acts" / part.path / shard
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptPartError, match="it was not copied"):
        store.copy_to(str(tmp_path / "other"), progress=False)
    assert not (tmp_path / "other" / part.path / "zarr.json").exists()


def test_dropping_and_deleting_keep_shards_and_leave_no_file(tmp_path: Path) -> None:
    store = filled(str(tmp_path / "acts"))
    store.compact(progress=False)
    store.gc(max_age=0)
    store = lz.open_store(store.url)
    expected = store.tokens("acme/toy").resid.sel(layer=[0, 3]).values
    store.drop("acme/toy", ["resid"], layers=[1])
    store = lz.open_store(store.url)
    np.testing.assert_array_equal(store.tokens("acme/toy").resid.dropna("layer", how="all").values, expected)
    assert all(part.info.has_shards for part in store.view(GROUP).parts), "a part with shards is written again with shards"
    store.delete("acme/toy", TEXTS)
    assert not list((tmp_path / "acts").rglob("c.*"))


def test_a_writer_that_gives_up_leaves_nothing_and_one_that_is_killed_leaves_garbage(root: str) -> None:
    store = lz.open_store(root)
    batch = make_batch(TEXTS)
    with pytest.raises(ZeroDivisionError), store.new_part(GROUP, shards=True) as part:
        part.append(batch)
        raise ZeroDivisionError
    assert not store.storage.list(part.path)
    killed = store.new_part(GROUP, shards=True)
    killed.append(batch)
    assert not lz.open_store(root).view(GROUP).parts
    store.gc(max_age=0)
    assert not store.storage.list(killed.path)


def test_a_part_of_one_chunk_per_layer_has_no_shards(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "CHUNK_BYTES", 2**20)
    monkeypatch.setattr(writer, "REMOTE_CHUNK_BYTES", 2**20)
    monkeypatch.setattr(writer, "SHARD_BYTES", 2**24)
    monkeypatch.setattr(writer, "REMOTE_SHARD_BYTES", 2**24)
    store = lz.open_store(root)
    batch = make_batch(TEXTS)
    with store.new_part(GROUP, shards=True) as part:
        part.append(batch)
        info = part.commit()
    assert not info.has_shards
    np.testing.assert_array_equal(lz.open_store(root).tokens("acme/toy").resid.values, batch.tokens["resid"])
    assert lz.open_store(root).verify(progress=False).ok


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[ArrayInfo]:
    """The variables of which chunks are encoded from now on."""
    found: list[ArrayInfo] = []
    encode: Any = vars(written_arrays)["encode_body"]

    def noted(values: Any, info: ArrayInfo, *more: Any) -> Any:
        found.extend([info] if len(info.dims) > 1 else [])
        return encode(values, info, *more)

    monkeypatch.setattr(written_arrays, "encode_body", noted)
    return found


@pytest.mark.few(1)
@pytest.mark.parametrize("shards", [True, False])
def test_chunks_move_whole_where_all_prompts_stay(tmp_path: Path, encoded: list[ArrayInfo], shards: bool) -> None:
    store = filled(str(tmp_path / "acts"))
    store.compact(shards=shards, progress=False)
    store.gc(max_age=0)
    store = lz.open_store(store.url)
    (old,) = store.view(GROUP).parts
    kept = {
        name: (tmp_path / "acts" / old.path / name).read_bytes()
        for name in old.info.file_names()
        if name.startswith("prompts/resid_mean/c.")
    }
    expected = store.dataset("acme/toy").load()
    encoded.clear()
    store.drop("acme/toy", ["resid"])
    store = lz.open_store(store.url)
    (new,) = store.view(GROUP).parts
    assert not encoded
    assert kept == {name: (tmp_path / "acts" / new.path / name).read_bytes() for name in kept}
    np.testing.assert_array_equal(store.dataset("acme/toy").resid_mean.values, expected.resid_mean.values)
    store.publish(str(tmp_path / "copy"), shards=not shards, progress=False)
    assert not encoded, "from shards to single files and back"
    copy = lz.open_store(str(tmp_path / "copy"))
    assert any(array.shard_blocks for array in arrays(copy).values()) != shards
    np.testing.assert_array_equal(copy.dataset("acme/toy").resid_mean.values, expected.resid_mean.values)
    assert copy.verify(progress=False).ok
    assert new.info.odd == arrays_odd(copy)
    store.delete("acme/toy", TEXTS[:3])
    assert encoded, "where prompts go, chunks are made anew"


def arrays_odd(store: Store) -> Any:
    (part,) = store.view(GROUP).parts
    return part.info.odd


def test_a_damaged_chunk_does_not_move(tmp_path: Path) -> None:
    store = filled(str(tmp_path / "acts"))
    store.compact(progress=False)
    store.gc(max_age=0)
    store = lz.open_store(store.url)
    (part,) = store.view(GROUP).parts
    path = tmp_path / "acts" / part.path / "prompts/resid_mean/c.1.0.0"
    data = bytearray(path.read_bytes())
    data[30] ^= 4
    path.write_bytes(data)
    with pytest.raises(CorruptPartError, match="resid_mean"):
        store.drop("acme/toy", ["resid"])
    with pytest.raises(CorruptPartError, match="resid_mean"):
        store.publish(str(tmp_path / "copy"), progress=False)
    assert not (tmp_path / "copy" / "zarr.json").exists()


def test_verify_holds_few_shards_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch, root: str) -> None:
    store = filled(root)
    store.compact(progress=False)
    store.gc(max_age=0)  # whose parts had no shards
    assert all(array.shard_blocks for array in arrays(store).values())
    reading, most, lock = [0], [0], threading.Lock()
    real = verify._file_fault

    def counted(storage: Any, key: str, *rest: Any) -> Any:
        is_shard = key.split("/")[-2] in ("resid", "resid_mean") and "/c." in key
        with lock:
            reading[0] += is_shard
            most[0] = max(most[0], reading[0])
        time.sleep(0.002)
        fault = real(storage, key, *rest)
        with lock:
            reading[0] -= is_shard
        return fault

    monkeypatch.setattr(verify, "_file_fault", counted)
    assert lz.open_store(root).verify(progress=False).ok
    assert 1 <= most[0] <= 2
