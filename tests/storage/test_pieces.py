"""Files that are written piece by piece: whole once they are closed, gone when they are not; and what is left where a writer was killed."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from s3_server import ADMIN, S3, Fault, Request

import lmprobe_zarr as lz
from lmprobe_zarr.errors import InvalidArgumentError, LmprobeZarrError, NoSpaceError, ReadOnlyError, UnreachableError
from lmprobe_zarr.storage import LocalStorage, PieceWriter, Storage, StrayUpload, open_storage, remote, s3_uploads
from lmprobe_zarr.storage.s3 import S3Storage

RNG = np.random.default_rng(3)


@pytest.fixture
def storage(root: str, monkeypatch: pytest.MonkeyPatch) -> Storage:
    # Parts of real sizes are uploaded in a test of their own.
    monkeypatch.setattr(s3_uploads, "PART_BYTES", 1000)
    return open_storage(root)


def pieces_of(*lengths: int) -> list[bytes]:
    return [RNG.bytes(length) for length in lengths]


# ----------------------------------------------------------------------------------------------------------- every place


@pytest.mark.parametrize("lengths", [(), (0,), (1,), (999,), (1000,), (5, 0, 7), (700, 700, 700), (3500, 2), (1000, 1000), (10,) * 250])
def test_pieces_become_one_file(storage: Storage, lengths: tuple[int, ...]) -> None:
    pieces = pieces_of(*lengths)
    writer = storage.open_pieces("a/b/file", durable=True)
    for piece in pieces:
        buffer = bytearray(piece)
        writer.append(memoryview(buffer))
        buffer[:] = bytes(len(buffer))  # the caller may use its buffer again
    assert writer.nbytes == sum(lengths)
    writer.close()
    writer.close()
    assert storage.read("a/b/file") == b"".join(pieces)
    assert storage.list("a/b") == ["file"]
    assert storage.stray_uploads("") == []
    with pytest.raises(InvalidArgumentError, match="is whole"):
        writer.append(b"more")
    writer.abort()
    assert storage.read("a/b/file") == b"".join(pieces), "what is whole stays"


def test_several_buffers_and_arrays_are_one_piece(storage: Storage) -> None:
    array = np.arange(300, dtype="f4").reshape(20, 15)
    with storage.open_pieces("f", durable=False) as writer:
        writer.append((b"head", memoryview(array), b"", b"tail"))
    assert storage.read("f") == b"head" + array.tobytes() + b"tail"
    assert writer.nbytes == 1208


def test_writing_again_replaces_a_longer_file(storage: Storage) -> None:
    storage.write("f", RNG.bytes(5000), durable=False)
    with storage.open_pieces("f", durable=False) as writer:
        writer.append(b"ab")
        writer.append(b"c")
    assert storage.read("f") == b"abc"


@pytest.mark.parametrize("lengths", [(), (10, 20), (1500, 700)])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_nothing_stays_of_a_file_that_is_not_finished(storage: Storage, error: type[BaseException], lengths: tuple[int, ...]) -> None:
    def fail() -> None:
        with storage.open_pieces("a/b/f", durable=True) as writer:
            for piece in pieces_of(*lengths):
                writer.append(piece)
            raise error

    storage.write("g", b"1", durable=False)
    with pytest.raises(error):
        fail()
    assert not storage.is_file("a/b/f")
    assert storage.list("a/b") == []
    assert storage.stray_uploads("") == []


def test_a_file_that_was_given_up_takes_nothing_more(storage: Storage) -> None:
    writer = storage.open_pieces("f", durable=False)
    writer.append(RNG.bytes(1200))
    writer.abort()
    writer.abort()
    for call in (lambda: writer.append(b"1"), writer.close):
        with pytest.raises(InvalidArgumentError, match="given up"):
            call()
    assert not storage.is_file("f")


def test_files_are_written_side_by_side(storage: Storage) -> None:
    keys = [f"p/c.{layer}.0.0" for layer in range(20)]
    writers = [storage.open_pieces(key, durable=False) for key in keys]
    written: dict[str, bytes] = dict.fromkeys(keys, b"")
    for _, (key, writer) in itertools.product(range(3), zip(keys, writers, strict=True)):
        piece = RNG.bytes(int(RNG.integers(0, 900)))
        writer.append(piece)
        written[key] += piece
    for writer in writers:
        writer.close()
    assert {key: storage.read(key) for key in keys} == written
    assert storage.list("p") == sorted(name.removeprefix("p/") for name in keys)


def test_a_place_without_uploads_has_none_that_are_stray(storage: Storage) -> None:
    storage.abort_uploads([])
    assert storage.stray_uploads("nowhere") == []


# --------------------------------------------------------------------------------------------------------- local folders

MANY_FILES = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from lmprobe_zarr.storage import LocalStorage
storage = LocalStorage(sys.argv[1])
writers = [storage.open_pieces(f'p/c.{n}', durable=n % 2 == 1) for n in range(400)]
for turn in range(3):
    for n, writer in enumerate(writers):
        writer.append(bytes([n % 256, turn]))
for writer in writers:
    writer.close()
print(sum(storage.read(f'p/c.{n}') == bytes([n % 256, 0, n % 256, 1, n % 256, 2]) for n in range(400)))
"""


def test_more_files_are_written_than_may_be_open(tmp_path: Path) -> None:
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 64, "the limit is set in the child"
    done = subprocess.run([sys.executable, "-c", MANY_FILES, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "400"


def test_a_durable_file_is_flushed_once_when_it_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.fstat(descriptor).st_size))
    for durable in (True, False):
        with LocalStorage(tmp_path).open_pieces("f", durable=durable) as writer:
            writer.append(b"123")
            writer.append(b"45")
            assert len(flushed) == (not durable)
        assert flushed == [5]


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, NoSpaceError), (errno.EROFS, ReadOnlyError), (errno.EIO, UnreachableError)]
)
@pytest.mark.parametrize("call", ["write", "fsync"])
def test_an_error_of_the_disk_is_one_of_ours_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, kind: type[Exception]
) -> None:
    writer = LocalStorage(tmp_path).open_pieces("a/f", durable=True)
    writer.append(b"123")

    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)

    def finish() -> None:
        writer.append(b"456")
        writer.close()

    with pytest.raises(kind, match=str(tmp_path)):
        finish()
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InvalidArgumentError, match="given up"):
        writer.append(b"7")


def test_a_file_that_something_else_changes_does_not_become_whole(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    for change in (lambda: os.truncate(tmp_path / "f", 1), lambda: storage.write("f", b"123456789", durable=False)):
        writer = storage.open_pieces("f", durable=False)
        writer.append(b"12345")
        change()
        with pytest.raises(UnreachableError, match="something else writes there"):
            writer.close()
    writer = storage.open_pieces("f", durable=False)
    writer.append(b"12345")
    storage.remove(["f"])
    with pytest.raises(FileNotFoundError):
        writer.append(b"1")


# ------------------------------------------------------------------------------------------ other places that fsspec opens


def test_a_file_behind_a_cache_is_written_and_given_up(tmp_path: Path) -> None:
    url = f"memory://{uuid.uuid4().hex}"
    cached = open_storage(f"simplecache::{url}", {"simplecache": {"cache_storage": str(tmp_path)}})
    with cached.open_pieces("f", durable=False) as writer:
        writer.append(b"12")
        writer.append(b"3")
    writer = cached.open_pieces("g", durable=False)
    writer.append(b"12")
    writer.abort()
    del writer
    assert open_storage(url).read("f") == b"123"
    assert open_storage(url).list("") == ["f"]


def test_where_no_file_can_be_opened_for_writing_the_error_says_so() -> None:
    with pytest.raises(ReadOnlyError, match="piece by piece"), open_storage("http://127.0.0.1:9/acts").open_pieces("f", durable=False) as web:
        web.append(b"1")


# --------------------------------------------------------------------------------------------------------------------- S3


@pytest.fixture
def bucket(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Storage]:
    """A prefix, through the proxy, with parts of 1,000 bytes and few waits."""
    monkeypatch.setattr(s3_uploads, "PART_BYTES", 1000)
    monkeypatch.setattr(remote, "_WAITS", (0.01, 0.01))
    quick = {"config_kwargs": {"retries": {"total_max_attempts": 1}}}
    found = open_storage(f"s3://team/{uuid.uuid4().hex}/acts", s3.options(counted=True, **quick))
    assert isinstance(found, S3Storage)
    yield found
    s3.proxy.reset()
    found.abort_uploads(found.stray_uploads(""))


def verbs(requests: list[Request]) -> list[str]:
    names = {("POST", "uploads"): "create", ("PUT", "uploadId"): "part", ("POST", "uploadId"): "complete", ("DELETE", "uploadId"): "abort"}
    found = []
    for request in requests:
        keys = {pair.partition("=")[0] for pair in request.query.split("&")}
        found.append(next((name for (method, key), name in names.items() if request.method == method and key in keys), request.kind))
    return found


def test_an_object_appears_when_it_is_whole_in_as_few_requests_as_it_has_parts(s3: S3, bucket: S3Storage) -> None:
    pieces = pieces_of(600, 600, 2000, 100)
    with bucket.open_pieces("p/c.0", durable=True) as writer:
        for piece in pieces:
            writer.append(piece)
            seen = open_storage(bucket.url)
            assert not seen.is_file("p/c.0")
            assert seen.list("p") == []
        with pytest.raises(FileNotFoundError):
            seen.read("p/c.0")
    assert verbs(s3.proxy.requests) == ["create", "part", "part", "part", "part", "complete"]
    assert bucket.read("p/c.0") == b"".join(pieces)
    s3.proxy.reset()
    with bucket.open_pieces("p/c.1", durable=True) as writer:
        writer.append(b"12")
        writer.append(b"3")
    assert verbs(s3.proxy.requests) == ["PUT"]


def test_parts_of_the_real_size(s3: S3) -> None:
    storage = open_storage(f"s3://team/{uuid.uuid4().hex}")
    pieces = pieces_of(9_000_000, 9_000_000, 16_000_000, 100)
    with storage.open_pieces("f", durable=True) as writer:
        for piece in pieces:
            writer.append(piece)
    assert storage.read("f") == b"".join(pieces)


@pytest.mark.parametrize("verb", ["create", "part", "complete"])
@pytest.mark.parametrize("status", [429, 503])
def test_a_request_that_is_refused_for_a_while_is_sent_again(s3: S3, bucket: S3Storage, verb: str, status: int) -> None:
    left = Counter({verb: 2})

    def refuse(request: Request) -> Fault | None:
        (name,) = verbs([request])
        left[name] -= 1
        return Fault(status=status, code="TooManyRequests" if status == 429 else "SlowDown") if left[name] >= 0 else None

    s3.proxy.fault = refuse
    pieces = pieces_of(1500, 800)
    with bucket.open_pieces("f", durable=True) as writer:
        for piece in pieces:
            writer.append(piece)
    assert bucket.read("f") == b"".join(pieces)


@pytest.mark.parametrize("verb", ["create", "part", "complete"])
@pytest.mark.parametrize(("status", "code", "kind"), [(403, "AccessDenied", ReadOnlyError), (507, "QuotaExceeded", NoSpaceError)])
def test_an_upload_that_is_refused_for_good_leaves_nothing(
    s3: S3, bucket: S3Storage, verb: str, status: int, code: str, kind: type[Exception]
) -> None:
    s3.proxy.fault = lambda request: Fault(status=status, code=code) if verbs([request]) == [verb] else None
    writer = bucket.open_pieces("f", durable=True)

    def finish() -> None:
        writer.append(RNG.bytes(1500))
        writer.append(RNG.bytes(800))
        writer.close()

    with pytest.raises(kind) as caught:
        finish()
    assert isinstance(caught.value, LmprobeZarrError)
    s3.proxy.reset()
    assert bucket.stray_uploads("") == []
    assert not bucket.is_file("f")


def test_an_answer_to_the_last_request_that_is_lost_is_no_failure(s3: S3, bucket: S3Storage) -> None:
    lost = [1]

    def lose(request: Request) -> Fault | None:
        if verbs([request]) != ["complete"] or not lost[0]:
            return None
        lost[0] -= 1
        return Fault(lose_answer=True)

    s3.proxy.fault = lose
    data = RNG.bytes(2500)
    with bucket.open_pieces("f", durable=True) as writer:
        writer.append(data)
    assert not lost[0]
    assert bucket.read("f") == data
    assert bucket.stray_uploads("") == []


def begin(storage: Storage, *keys: str) -> list[PieceWriter]:
    writers = [storage.open_pieces(key, durable=False) for key in keys]
    for writer in writers:
        writer.append(RNG.bytes(1200))
    return writers


def test_unfinished_uploads_are_found_below_a_folder_and_aborted(s3: S3, bucket: S3Storage) -> None:
    writers = begin(bucket, "g/p/c.0", "g/p/c.1", "g/q/c.0", "gg/c.0")
    found = bucket.stray_uploads("g")
    assert sorted(upload.key for upload in found) == ["g/p/c.0", "g/p/c.1", "g/q/c.0"]
    assert all(upload.began is not None and abs(upload.began - time.time()) < 60 for upload in found)
    assert len({upload.name for upload in found}) == 3
    bucket.abort_uploads(found)
    bucket.abort_uploads(found)
    assert [upload.key for upload in bucket.stray_uploads("")] == ["gg/c.0"]
    with pytest.raises(LmprobeZarrError if False else OSError):
        writers[0].close()
    assert not bucket.is_file("g/p/c.0")
    writers[3].close()
    assert bucket.stray_uploads("") == []


@pytest.mark.parametrize(("status", "code"), [(501, "NotImplemented"), (403, "AccessDenied"), (405, "MethodNotAllowed"), (404, "NoSuchKey"), (503, "Down")])
def test_a_server_that_lists_no_uploads_has_none(s3: S3, bucket: S3Storage, status: int, code: str) -> None:
    begin(bucket, "f")
    s3.proxy.fault = lambda request: Fault(status=status, code=code) if "uploads" in request.query and request.method == "GET" else None
    assert bucket.stray_uploads("") == []


class Answers:
    """A client that answers `list_multipart_uploads` from a list of pages."""

    def __init__(self, pages: list[dict[str, Any]]) -> None:
        self.pages, self.asked = pages, list[dict[str, Any]]()

    def __call__(self, verb: str, **request: Any) -> dict[str, Any]:
        assert verb == "list_multipart_uploads"
        self.asked.append(request)
        return self.pages[min(len(self.asked), len(self.pages)) - 1]


def test_uploads_are_listed_page_by_page_and_only_those_below(bucket: S3Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    root = bucket.root.partition("/")[2]
    entries = [{"Key": f"{root}/g/c.{n}", "UploadId": f"id{n}"} for n in range(4)]
    other = {"Key": "elsewhere/c.0", "UploadId": "x"}
    more = {"IsTruncated": True, "NextKeyMarker": "k", "NextUploadIdMarker": "u"}
    answers = Answers([{"Uploads": [*entries[:2], other], **more}, {**more, "NextKeyMarker": "l"}, {"Uploads": entries[2:], "IsTruncated": False}])
    monkeypatch.setattr(bucket.filesystem, "call_s3", answers)
    assert bucket.stray_uploads("g") == [StrayUpload(f"g/c.{n}", f"id{n}", None) for n in range(4)]
    assert [request.get("KeyMarker") for request in answers.asked] == [None, "k", "l"]
    endless = Answers([{"Uploads": entries, **more}])
    monkeypatch.setattr(bucket.filesystem, "call_s3", endless)
    assert len(bucket.stray_uploads("")) == 8, "a server that returns one page for ever is asked twice"


# ------------------------------------------------------------------------------------------------------- killed, and gc

UPLOADS = """
import sys, numpy as np, lmprobe_zarr as lz
from lmprobe_zarr.storage import s3_uploads
s3_uploads.PART_BYTES = 1000
store = lz.open_store(sys.argv[1])
with store.storage.open_pieces(sys.argv[2], durable=True) as writer:
    writer.append(bytes(2500))
    print('uploading', flush=True)
    sys.stdin.read()
"""


def test_a_writer_that_is_killed_leaves_nothing_that_is_seen_and_gc_removes_its_parts(s3: S3) -> None:
    url = f"s3://team/{uuid.uuid4().hex}/acts"
    store = lz.open_store(url)
    pooled = {"resid_mean": {0: np.ones((2, 8), "f4")}}
    lz.write_activations(store, model="m", prompts=["a", "b"], pooled=pooled)
    group = store.find_group("m").name
    (part,) = [name for name in store.storage.list(group) if store.storage.is_file(f"{group}/{name}/zarr.json")]
    before = store.dataset().resid_mean.values
    ours = f"{group}/{part[:-1]}0/tokens/resid/c.0.0.0"
    foreign = ["notes/c.0", f"{group}/notapart/c.0.0.0", f"{group}/{part}/notes.txt"]
    children = [
        subprocess.Popen([sys.executable, "-c", UPLOADS, url, key], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for key in (ours, *foreign)
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "uploading\n"
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert sorted(upload.key for upload in store.storage.stray_uploads("")) == sorted([ours, *foreign])
    assert not store.storage.is_file(ours)
    assert store.gc(max_age=3600).uploads == (), "younger than that"
    planned = store.gc(max_age=0, dry_run=True)
    assert [upload.key for upload in planned.uploads] == [ours]
    assert "1 unfinished upload" in str(planned)
    assert len(store.storage.stray_uploads("")) == 4, "a dry run removes nothing"
    assert store.gc(max_age=0).uploads == planned.uploads
    assert sorted(upload.key for upload in store.storage.stray_uploads("")) == sorted(foreign)
    assert store.gc(max_age=0).uploads == ()
    np.testing.assert_array_equal(lz.open_store(url).dataset().resid_mean.values, before)
    store.storage.abort_uploads(store.storage.stray_uploads(""))


def test_gc_of_a_server_that_lists_no_uploads_is_done(s3: S3) -> None:
    store = lz.open_store(f"s3://team/{uuid.uuid4().hex}/acts", storage_options=s3.options(ADMIN, counted=True))
    lz.write_activations(store, model="m", prompts=["a"], pooled={"resid_mean": {0: np.ones((1, 8), "f4")}})
    s3.proxy.fault = lambda request: Fault(status=501, code="NotImplemented") if "uploads" in request.query else None
    summary = store.gc(max_age=0)
    assert summary.uploads == ()
    assert "upload" not in str(summary)
