"""The collection of garbage: what others replaced and what killed writers left goes, once it is old; nothing else ever does."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import xarray as xr
from stores import GROUP, make_batch

import lmprobe_zarr as lz
from lmprobe_zarr.store.format.part_names import new_part_name
from lmprobe_zarr.store.store import Store


def below(folder: Path | str) -> set[str]:
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


def age(folder: Path | str, seconds: float) -> None:
    """Make everything below a folder look so old."""
    for path in [Path(folder), *Path(folder).rglob("*")]:
        os.utime(path, (time.time() - seconds,) * 2)


def begun(store: Store, *, texts: tuple[str, ...] = ("x", "y")) -> str:
    """A part as a writer leaves it that is killed right before its commit; returns its folder's key."""
    store.storage.write(f"{GROUP.name}/zarr.json", GROUP.to_document(), durable=False)
    writer = store.new_part(GROUP)
    writer.append(make_batch(list(texts)))
    real = store.storage.commit
    try:
        object.__setattr__(store.storage, "commit", lambda *a, **k: (_ for _ in ()).throw(OSError("killed")))
        with pytest.raises(OSError, match="killed"):
            writer.commit()
    finally:
        object.__setattr__(store.storage, "commit", real)
    return writer.path


@pytest.fixture
def folder(tmp_path: Path) -> Store:
    store = lz.open_store(tmp_path / "s", durable=False)
    for i in range(3):
        store.write(GROUP, make_batch(["a", f"p{i}"], seed=i))
    return store


@pytest.mark.few(1)
def test_replaced_parts_go_once_they_are_old_and_the_view_stays(store: Store) -> None:
    for i in range(3):
        store.write(GROUP, make_batch(["a", f"p{i}"], seed=i))
        store.annotate("acme/toy", {"label": {"a": i}})
    before = store.dataset().load()
    store.compact()
    assert store.gc().young == 6
    planned = store.gc(max_age=0, dry_run=True)
    assert len(planned.replaced) == 6
    assert len(store.list_parts(GROUP.name)) == 4
    gone = store.gc(max_age=0)
    assert "6 replaced parts" in str(gone)
    assert gone.freed == planned.freed > 0
    fresh = lz.open_store(store.url)
    assert len(fresh.list_parts(GROUP.name)) == 1
    xr.testing.assert_identical(fresh.dataset().load(), before)
    assert store.gc(max_age=0).freed == 0


def test_gc_removes_files_of_a_killed_writer_once_they_are_old(store: Store) -> None:
    store.write(GROUP, make_batch(["a"]))
    key = begun(store)
    assert store.storage.list(key)
    assert store.gc().young == 1
    assert store.storage.list(key)
    assert len(store.gc(max_age=0).unfinished) == 1
    assert not store.storage.list(key)
    assert key.rpartition("/")[2] not in store.storage.list(GROUP.name)
    assert len(lz.open_store(store.url).view(GROUP)) == 1


def test_the_newest_file_tells_the_age_of_a_part_that_is_being_written(folder: Store) -> None:
    part = Path(folder.url) / begun(folder)
    age(part, 7200)
    assert len(folder.gc(max_age=3600, dry_run=True).unfinished) == 1
    chunk = next(path for path in part.rglob("c.*"))
    chunk.touch()
    summary = folder.gc(max_age=3600)
    assert (summary.unfinished, summary.young) == ((), 1)
    assert chunk.exists()


def test_gc_keeps_foreign_files_in_every_folder(folder: Store) -> None:
    root = Path(folder.url)
    part = root / begun(folder)
    strange = [
        root / "notes.txt",
        root / ".zarr.json.partial",
        root / GROUP.name / "mine" / "prompts" / "x" / "c.0",
        root / GROUP.name / new_part_name(),  # a file with a name like a part's
        part / "notes.txt",
        part / "prompts" / "notes.txt",
        part / "prompts" / "resid_mean" / "c.old",
        part / "other" / "resid" / "c.0",
        root / GROUP.name / ".used" / "notes",
        root / "other-model" / new_part_name() / "prompts" / "x" / "c.0",
    ]
    for path in strange:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"mine")
    folder.compact()
    age(root, 7200)
    folder.gc(max_age=3600)
    assert [path for path in strange if not path.exists()] == []
    assert not (part / "prompts" / "resid_mean" / "c.0.0.0").exists()
    assert len(lz.open_store(root, mode="r").view(GROUP)) == 4


def test_staged_documents_old_stamps_and_empty_folders_go(folder: Store) -> None:
    root = Path(folder.url)
    name = new_part_name()
    for path in (
        root / ".zarr.json.0123456789ab.partial",
        root / GROUP.name / ".zarr.json.0123456789ab.partial",
        root / GROUP.name / ".used" / new_part_name(),
    ):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (root / GROUP.name / name / "prompts" / "resid_mean").mkdir(parents=True)
    folder.mark_used(folder.view(GROUP).parts)
    kept = {path for path in below(root) if "partial" not in path and not path.endswith(name)}
    assert folder.gc().partials == ()
    age(root, 7200)
    summary = folder.gc(max_age=3600)
    assert (len(summary.partials), len(summary.stamps), len(summary.unfinished)) == (2, 1, 1)
    assert not (root / GROUP.name / name).exists()
    left = below(root)
    assert not [path for path in left if "partial" in path]
    assert {path for path in kept if "/.used/" not in path} <= left
    assert len([path for path in left if "/.used/" in path]) == 3, "marks of parts that are there stay"


def test_nothing_goes_whose_replacement_is_not_whole(folder: Store) -> None:
    folder.compact()
    merged = folder.view(GROUP).parts[0]
    chunk = Path(folder.url) / merged.path / "prompts/resid_mean/c.0.0.0"
    data = chunk.read_bytes()
    chunk.write_bytes(data[:-1])
    assert folder.gc(max_age=0).replaced == ()
    chunk.write_bytes(data)
    assert len(folder.gc(max_age=0).replaced) == 3


def test_nothing_becomes_visible_again_when_a_chain_of_replacements_is_removed(folder: Store) -> None:
    folder.compact()
    folder.write(GROUP, make_batch(["z"], seed=9))
    before = folder.dataset().load()
    folder.compact()
    assert len(folder.gc(max_age=0).replaced) == 5
    xr.testing.assert_identical(lz.open_store(folder.url).dataset().load(), before)


def test_a_damaged_part_keeps_what_it_replaced(folder: Store) -> None:
    folder.compact()
    document = Path(folder.url) / folder.view(GROUP).parts[0].path / "zarr.json"
    document.write_bytes(document.read_bytes()[:-20])
    fresh = lz.open_store(folder.url)
    with pytest.warns(lz.errors.CacheWarning):
        assert fresh.gc(max_age=0).replaced == ()
    with pytest.raises(lz.errors.CorruptPartError):
        lz.open_store(folder.url).dataset()


def test_a_wrong_age_is_refused(store: Store) -> None:
    for wrong in (-1, float("nan"), "1 day", True):
        with pytest.raises(lz.errors.InvalidArgumentError):
            store.gc(max_age=wrong)  # type: ignore[arg-type]
