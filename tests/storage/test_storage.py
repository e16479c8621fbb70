"""One contract that every kind of storage keeps."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lmprobe_zarr.errors import AlreadyCommittedError, InvalidArgumentError, InvalidTypeError, NoSpaceError, NotAStoreError, ReadOnlyError
from lmprobe_zarr.storage.base import Storage
from lmprobe_zarr.storage.local import LocalStorage
from lmprobe_zarr.storage.open import open_storage
from lmprobe_zarr.storage.s3 import S3Storage


@pytest.fixture
def storage(root: str) -> Storage:
    return open_storage(root)


@pytest.mark.few(2)
def test_written_files_are_read_and_listed(storage: Storage) -> None:
    storage.write("a/b/file", b"bytes", durable=True)
    storage.commit("a/b/file2", b"more", durable=False)
    assert storage.read("a/b/file") == b"bytes"
    assert bytes(storage.read_view("a/b/file2")) == b"more"
    assert storage.list("a/b") == ["file", "file2"]
    assert storage.list("a") == ["b"]
    assert storage.is_file("a/b/file")
    assert not storage.is_file("a/b")


@pytest.mark.few(2)
def test_missing_files_are_reported_as_missing(storage: Storage) -> None:
    assert storage.list("") == []
    assert storage.list("nowhere") == []
    assert not storage.is_file("nowhere")
    with pytest.raises(FileNotFoundError):
        storage.read("nowhere")
    with pytest.raises(FileNotFoundError):
        storage.read_view("no/where")
    storage.remove_tree("nowhere")


@pytest.mark.few(3)
def test_writing_again_replaces(storage: Storage) -> None:
    storage.write("f", b"a longer text", durable=False)
    storage.write("f", b"short", durable=False)
    assert storage.read("f") == b"short"
    storage.commit("f", b"x", durable=True)
    assert storage.read("f") == b"x"


@pytest.mark.few(3)
def test_a_commit_never_takes_the_place_of_another(storage: Storage) -> None:
    storage.commit("g/p/zarr.json", b"one", durable=False, replace=False)
    storage.commit("g/p/zarr.json", b"one", durable=True, replace=False)  # as when the answer to the first was lost
    with pytest.raises(AlreadyCommittedError, match="by another writer"):
        storage.commit("g/p/zarr.json", b"two", durable=False, replace=False)
    assert storage.read("g/p/zarr.json") == b"one"
    assert storage.list("g/p") == ["zarr.json"]


@pytest.mark.few(2)
def test_a_scan_tells_names_sizes_and_times(storage: Storage) -> None:
    storage.write("g/f", b"12345", durable=False)
    storage.write("g/p/zarr.json", b"{}", durable=False)
    found = storage.scan("g")
    assert list(found) == ["f", "p"]
    assert (found["f"].is_file, found["f"].nbytes, found["p"].is_file) == (True, 5, False)
    assert abs(time.time() - (found["f"].modified or 0)) < 60
    storage.remove(["g/f", "g/nowhere"])
    assert list(storage.scan("g")) == ["p"], "a look after a removal sees it"
    assert not storage.is_file("g/f")


@pytest.mark.few(2)
def test_a_stamp_is_an_empty_file(storage: Storage) -> None:
    storage.touch("g/.used/part")
    storage.touch("g/.used/part")
    assert storage.read("g/.used/part") == b""


@pytest.mark.few(3)
def test_removing_a_folder_keeps_its_neighbours(storage: Storage) -> None:
    storage.write("a/f", b"1", durable=False)
    storage.write("ab/f", b"2", durable=False)
    storage.remove_tree("a")
    assert storage.list("a") == []
    assert storage.list("ab") == ["f"]
    if not isinstance(storage, S3Storage):  # this server goes on to list an emptied folder for a while
        assert storage.list("") == ["ab"]


@pytest.mark.few(3)
def test_it_survives_pickling(storage: Storage) -> None:
    storage.write("f", b"1", durable=False)
    assert pickle.loads(pickle.dumps(storage)).read("f") == b"1"  # noqa: S301 — our own bytes


def test_memory_cannot_be_handed_to_another_process() -> None:
    data = pickle.dumps(open_storage("memory://here"))
    code = "import pickle, sys; pickle.loads(sys.stdin.buffer.read())"
    done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, timeout=120, check=False)
    assert b"lies in the memory of one process" in done.stderr


def test_opening_writes_nothing(tmp_path: Path) -> None:
    open_storage(tmp_path / "new").list("")
    assert list(tmp_path.iterdir()) == []


def test_a_commit_leaves_no_temporary_file(tmp_path: Path) -> None:
    LocalStorage(tmp_path).commit("a/f", b"1", durable=True)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["f"]


def test_a_commit_that_cannot_be_finished_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = LocalStorage(tmp_path)
    storage.commit("f", b"old", durable=False)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(NoSpaceError, match="free some space"):
        storage.commit("f", b"new", durable=False)
    assert storage.read("f") == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full, a file on a full disk, is a Linux device")
def test_a_full_disk_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "f").symlink_to("/dev/full")
    with pytest.raises(NoSpaceError, match="no space left"):
        LocalStorage(tmp_path).write("f", b"x" * 100_000, durable=False)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="/proc is a folder that refuses writing to root too, on Linux only")
def test_a_place_that_cannot_be_written_is_an_error_of_ours() -> None:
    with pytest.raises((ReadOnlyError, FileNotFoundError)):
        LocalStorage("/proc/self/acts").write("f", b"x", durable=False)


def test_a_file_where_a_folder_must_be_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("hello")
    with pytest.raises(NotAStoreError, match="a file stands where"):
        LocalStorage(tmp_path / "f").write("a/b", b"x", durable=False)
    assert (tmp_path / "f").read_text() == "hello"


def test_places_that_cannot_be() -> None:
    with pytest.raises(InvalidTypeError, match="not by int"):
        open_storage(3)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="empty"):
        open_storage("")
    with pytest.raises(InvalidArgumentError, match="nosuch:// cannot be opened"):
        open_storage("nosuch://bucket")
    with pytest.raises(InvalidArgumentError, match="NUL"):
        open_storage("a\0b")
    with pytest.raises(InvalidArgumentError, match="storage_options"):
        open_storage("folder", {"anon": True})


def test_a_store_does_not_move_with_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage = open_storage("acts")
    monkeypatch.chdir("/")
    storage.write("f", b"1", durable=False)
    assert (tmp_path / "acts" / "f").read_bytes() == b"1"
