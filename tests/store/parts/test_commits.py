"""A part whose document somebody deleted is told from one that was never committed, before anything that it had replaced is shown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stores import GROUP, Stops, Wrapped, make_batch

import lmprobe_zarr as lz
from lmprobe_zarr.batch.hashes import prompt_sha256
from lmprobe_zarr.errors import CacheWarning, CorruptPartError
from lmprobe_zarr.storage import Storage
from lmprobe_zarr.storage.open import open_storage
from lmprobe_zarr.store.format.names import COMMITS
from lmprobe_zarr.store.parts import catalog, commits
from lmprobe_zarr.store.store import Store
from lmprobe_zarr.store.upkeep.evict import remove_entries
from lmprobe_zarr.store.upkeep.removal import remove_part

TEXTS = ["a", "bb", "ccc"]
MISSING = r"zarr\.json is missing, though the part was committed"


def write(store: Store, number: float, texts: list[str] = TEXTS) -> str:
    """The name of a new part whose values are all one number."""
    batch = make_batch(texts)
    for values in batch.prompts.values():
        values[...] = number
    return store.write(GROUP, batch)


def signs(storage: Storage) -> set[str]:
    return set(storage.list(f"{GROUP.name}/{COMMITS}"))


def delete_document(storage: Storage, name: str, folder: str = "") -> None:
    storage.remove([f"{GROUP.name}/{folder}{name}/zarr.json"])


def test_every_commit_leaves_its_sign_and_every_removal_takes_it(store: Store) -> None:
    storage = open_storage(store.url)
    names = {write(store, 1), write(store, 2, ["a"])}
    store.annotate(GROUP.model, {"label": {"a": 1, "bb": 0}})
    notes = {note.info.name for note in store.listing(GROUP).annotations}
    assert signs(storage) == names | notes
    store.delete(GROUP.model, ["bb"])
    store.drop(GROUP.model, ["resid_mean"], layers=[0])
    store.compact(progress=False)
    store.gc(max_age=0)
    listing = store.listing(GROUP)
    assert signs(storage) == {part.info.name for part in (*listing.parts, *listing.annotations)}
    store.delete(GROUP.model, store.dataset()["text"].values.tolist())
    store.gc(max_age=0)
    assert signs(storage) <= {note.info.name for note in store.listing(GROUP).annotations}


def test_a_copy_has_signs_of_its_own_and_a_published_one_needs_none(store: Store, tmp_path: Path) -> None:
    name = write(store, 1)
    store.copy_to(tmp_path / "copy", progress=False)
    assert signs(open_storage(str(tmp_path / "copy"))) == {name}
    store.publish(tmp_path / "published", progress=False)
    assert not any(COMMITS in path.parts for path in (tmp_path / "published").rglob("*"))


@pytest.mark.parametrize("read_before", [False, True])
def test_nothing_old_is_shown_in_place_of_a_part_whose_document_was_deleted(store: Store, read_before: bool) -> None:
    write(store, 1)
    name = write(store, 2, ["a", "bb"])
    if read_before:
        assert store.dataset().resid_mean.values[0, 0, 0] == 2
    delete_document(open_storage(store.url), name)
    reader = lz.open_store(store.url, "r")
    calls: list[Callable[[], Any]] = [reader.dataset, lambda: reader.view(GROUP), lambda: reader.listing(GROUP)]
    for call in calls:
        with pytest.raises(CorruptPartError, match=MISSING) as caught:
            call()
        assert caught.value.part == f"{GROUP.name}/{name}"
    with pytest.warns(CacheWarning, match="is missing"):
        view = reader.view(GROUP, whole=False)
    rows = view.find([prompt_sha256(text) for text in TEXTS])
    covered = [row >= 0 and view.covers("prompts", "resid_mean", np.array([row]), (0,)).all() for row in rows]
    assert covered == [False, False, True], "the cache runs the model again for what the part had replaced"
    (problem,) = reader.verify(progress=False).problems
    assert (problem.part, problem.kind) == (f"{GROUP.name}/{name}", "missing")
    summary = lz.open_store(store.url).repair(progress=False)
    assert {text for lost in summary.lost for text in lost.prompts} == {"a", "bb"}
    after = lz.open_store(store.url, "r").dataset()
    assert after["text"].values.tolist() == ["ccc"]
    assert (after.resid_mean.values == 1).all()
    assert name not in signs(open_storage(store.url))


def test_the_only_part_of_a_group_is_missed_too(store: Store) -> None:
    delete_document(open_storage(store.url), write(store, 1))
    with pytest.raises(CorruptPartError, match=MISSING):
        lz.open_store(store.url, "r").dataset()


def test_a_tombstone_that_was_deleted_does_not_bring_back_what_it_hides(store: Store) -> None:
    write(store, 1)
    name = write(store, 2, ["a", "bb"])
    part = next(part for part in store.listing(GROUP).parts if part.info.name == name)
    entry = next(entry for entry in store.entries(GROUP) if entry.part.path == part.path)
    remove_entries(store.catalog, [entry])
    (tombstone,) = [note for note in store.listing(GROUP).annotations if note.info.is_tombstone]
    assert store.dataset()["text"].values.tolist() == ["ccc"]
    delete_document(open_storage(store.url), tombstone.info.name, "annotations/")
    with pytest.raises(CorruptPartError, match=MISSING):
        lz.open_store(store.url, "r").dataset()
    lz.open_store(store.url).repair(progress=False)
    assert lz.open_store(store.url, "r").dataset()["text"].values.tolist() == ["ccc"]


def test_an_annotation_that_was_deleted_is_missed(store: Store) -> None:
    write(store, 1)
    store.annotate(GROUP.model, {"label": {"a": 1, "bb": 0}})
    store.annotate(GROUP.model, {"label": {"a": 0, "bb": 0}})
    newest = store.listing(GROUP).annotations[-1].info.name
    delete_document(open_storage(store.url), newest, "annotations/")
    with pytest.raises(CorruptPartError, match=MISSING):
        lz.open_store(store.url, "r").dataset()


class NoCommit(Wrapped):
    """A storage at whose commit of a part the writer stops for a while, or for ever."""

    def __init__(self, inner: Storage, meanwhile: Callable[[str, Any], None]) -> None:
        super().__init__(inner)
        self.meanwhile = meanwhile

    def commit(self, key: str, data: Any, *, durable: bool, replace: bool = True) -> None:
        if key.count("/") == 2:
            self.meanwhile(key, data)
        super().commit(key, data, durable=durable, replace=replace)


class KilledError(Exception):
    """In place of a signal."""


def test_what_is_being_written_and_what_a_killed_writer_left_is_passed_over(store: Store) -> None:
    write(store, 1)

    def look(*_: Any) -> None:
        assert len(lz.open_store(store.url, "r").dataset().prompt) == 3
        assert lz.open_store(store.url, "r").verify(progress=False).ok

    def die(*_: Any) -> None:
        raise KilledError

    storage = open_storage(store.url)
    Store(NoCommit(storage, look)).write(GROUP, make_batch(["dddd"]))
    assert len(store.dataset().prompt) == 4
    writer = Store(NoCommit(storage, die)).new_part(GROUP)
    writer.append(make_batch(["eeeee"]))
    with pytest.raises(KilledError):
        writer.commit()
    assert len(lz.open_store(store.url, "r").dataset().prompt) == 4
    assert lz.open_store(store.url, "r").verify(progress=False).ok
    assert len(store.gc(max_age=0).unfinished) == 1


def test_a_writer_killed_between_its_commit_and_the_sign_has_written_its_part(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmprobe_zarr.store.parts.writer.note_commit", lambda *_: None)
    name = write(store, 1)
    assert not signs(open_storage(store.url))
    assert len(lz.open_store(store.url, "r").dataset().prompt) == 3
    delete_document(open_storage(store.url), name)
    assert lz.open_store(store.url, "r").models() == [], "without its sign, a part without a document was never committed"


def test_a_place_that_takes_no_sign_takes_the_part(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, key: str) -> None:
        raise OSError(5, "refused", key)

    monkeypatch.setattr(type(store.catalog.storage), "touch", refuse)
    write(store, 1)
    assert len(lz.open_store(store.url, "r").dataset().prompt) == 3


@pytest.mark.few(1)
def test_a_removal_that_is_killed_at_any_moment_is_never_taken_for_damage(store: Store) -> None:
    """Readers see the part or pass it over; an interrupted removal is garbage."""
    write(store, 1)
    storage = open_storage(store.url)
    for after in range(40):
        name = write(store, 2, ["dddd"])
        part = next(part for part in store.listing(GROUP).parts if part.info.name == name)
        stopped = False
        try:
            remove_part(Stops(storage, after), part)
        except OSError:
            stopped = True
        reader = lz.open_store(store.url, "r")
        assert set(reader.dataset()["text"].values.tolist()) == {*TEXTS, "dddd"} if after < 3 else {*TEXTS}, after
        assert reader.verify(progress=False).ok, after
        store = lz.open_store(store.url)
        if after < 3:
            remove_part(storage, part)
        assert len(store.gc(max_age=0).unfinished) <= 1
        assert len(storage.list(GROUP.name)) == 3, "its document, the signs, and the part"
        if not stopped:
            break
    assert after > 5
    assert not stopped


def test_a_part_that_is_committed_while_a_reader_looks_is_no_damage(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is committed after the reader found no document, and before the reader looks for the sign."""
    write(store, 1)
    storage = open_storage(store.url)
    document: list[Any] = []

    def die(*given: Any) -> None:
        document.extend(given)
        raise KilledError

    writer = Store(NoCommit(storage, die)).new_part(GROUP)
    writer.append(make_batch(["dddd"]))
    with pytest.raises(KilledError):
        writer.commit()
    looked: list[list[str]] = []

    def find(storage: Storage, paths: list[str]) -> list[str]:
        looked.append(paths)
        storage.commit(*document, durable=False)
        commits.note_commit(storage, GROUP.name, writer.name)
        return commits.find_lost(storage, paths)

    monkeypatch.setattr(catalog, "find_lost", find)
    reader = lz.open_store(store.url, "r")
    assert set(reader.dataset()["text"].values.tolist()) == {*TEXTS}
    assert looked == [[f"{GROUP.name}/{writer.name}"]]
    monkeypatch.undo()
    assert len(reader.dataset().prompt) == 4


def test_a_published_copy_without_one_of_its_documents_is_damaged(store: Store, tmp_path: Path) -> None:
    write(store, 1)
    name = write(store, 2, ["dddd"])
    store.publish(tmp_path / "copy", progress=False)
    published = tmp_path / "copy"
    documents = sorted(published.glob(f"{GROUP.name}/*/zarr.json"))
    documents[-1].unlink()
    with pytest.raises(CorruptPartError, match="is missing, though this copy names it"):
        lz.open_store(published).dataset()
    assert name
