"""Files that are written piece by piece: whole once they are closed, gone when they are not; and what is left where a writer was killed."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import signal
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from s3_server import S3, Fault, Request
from warmed import Warmed

import lmprobe_zarr as lz
from lmprobe_zarr.errors import InvalidArgumentError, LmprobeZarrError, NoSpaceError, ReadOnlyError, UnreachableError
from lmprobe_zarr.storage import LocalStorage, PieceWriter, Storage, StrayUpload, open_storage, remote, s3_uploads
from lmprobe_zarr.storage.s3 import S3Storage

RNG = np.random.default_rng(3)


LEAST = 5 * 2**20  # of which S3 takes parts, but for the last one


@pytest.fixture
def storage(root: str) -> Storage:
    return open_storage(root)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that are uploaded soon, to objects that no server would complete."""
    monkeypatch.setattr(s3_uploads, "PART_BYTES", 1000)


def pieces_of(*lengths: int) -> list[bytes]:
    return [RNG.bytes(length) for length in lengths]


# ----------------------------------------------------------------------------------------------------------- every place


@pytest.mark.few(2)
def test_pieces_become_one_file(storage: Storage) -> None:
    cases: list[tuple[int, ...]] = [(), (0,), (1,), (999,), (5, 0, 7), (70_000, 70_000, 2), (10,) * 250]
    for lengths in cases:
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
        with pytest.raises(InvalidArgumentError, match="is whole"):
            writer.append(b"more")
        writer.abort()
        assert storage.read("a/b/file") == b"".join(pieces), "what is whole stays"
    assert storage.stray_uploads("") == []


@pytest.mark.few(2)
def test_several_buffers_and_arrays_are_one_piece(storage: Storage) -> None:
    array: Any = np.arange(300, dtype="f4").reshape(20, 15)
    with storage.open_pieces("f", durable=False) as writer:
        writer.append((b"head", memoryview(array), b"", b"tail"))
    assert storage.read("f") == b"head" + array.tobytes() + b"tail"
    assert writer.nbytes == 1208


@pytest.mark.few(2)
def test_writing_again_replaces_a_longer_file(storage: Storage) -> None:
    storage.write("f", RNG.bytes(5000), durable=False)
    with storage.open_pieces("f", durable=False) as writer:
        writer.append(b"ab")
        writer.append(b"c")
    assert storage.read("f") == b"abc"


@pytest.mark.few(2)
@pytest.mark.usefixtures("small_parts")
def test_nothing_stays_of_a_file_that_is_not_finished(storage: Storage) -> None:
    def fail(error: type[BaseException], *lengths: int) -> None:
        with storage.open_pieces("a/b/f", durable=True) as writer:
            for piece in pieces_of(*lengths):
                writer.append(piece)
            raise error

    storage.write("g", b"1", durable=False)
    for lengths, error in itertools.product([(), (10, 20), (1500, 700)], [RuntimeError, KeyboardInterrupt]):
        with pytest.raises(error):
            fail(error, *lengths)
        assert not storage.is_file("a/b/f")
        assert storage.list("a/b") == []
        assert storage.stray_uploads("") == []


@pytest.mark.usefixtures("small_parts")
def test_a_file_that_was_given_up_takes_nothing_more(storage: Storage) -> None:
    writer = storage.open_pieces("f", durable=False)
    writer.append(RNG.bytes(1200))
    writer.abort()
    writer.abort()
    with pytest.raises(InvalidArgumentError, match="given up"):
        writer.append(b"1")
    with pytest.raises(InvalidArgumentError, match="given up"):
        writer.close()
    assert not storage.is_file("f")


@pytest.mark.few(2)
def test_files_are_written_side_by_side(storage: Storage) -> None:
    keys = [f"p/c.{layer}.0.0" for layer in range(20)]
    writers = [storage.open_pieces(key, durable=False) for key in keys]
    written: dict[str, bytes] = dict.fromkeys(keys, b"")
    assert storage.stray_uploads("nowhere") == []
    for _, (key, writer) in itertools.product(range(3), zip(keys, writers, strict=True)):
        piece = RNG.bytes(int(RNG.integers(0, 900)))
        writer.append(piece)
        written[key] += piece
    for writer in writers:
        writer.close()
    assert {key: storage.read(key) for key in keys} == written
    assert storage.list("p") == sorted(name.removeprefix("p/") for name in keys)


# --------------------------------------------------------------------------------------------------------- local folders


def test_more_files_are_written_than_may_be_open(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(path.name) for path in Path("/dev/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 8, hard))
    try:
        writers = [storage.open_pieces(f"p/c.{n}", durable=n % 20 == 1) for n in range(400)]
        for turn, (n, writer) in itertools.product(range(3), enumerate(writers)):
            writer.append(bytes([n % 256, turn]))
        for writer in writers:
            writer.close()
        for n in range(400):
            assert storage.read(f"p/c.{n}") == bytes([n % 256, 0, n % 256, 1, n % 256, 2])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_durable_file_is_flushed_once_when_it_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.fstat(descriptor).st_size))
    for durable in (True, False):
        with LocalStorage(tmp_path).open_pieces("f", durable=durable) as writer:
            writer.append(b"123")
            writer.append(b"45")
            assert len(flushed) == (not durable)
        assert flushed == [5]


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, NoSpaceError), (errno.EACCES, ReadOnlyError), (errno.EIO, UnreachableError)])
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
    for data in (b"1", b"123456789"):
        writer = storage.open_pieces("f", durable=False)
        writer.append(b"12345")
        storage.write("f", data, durable=False)
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
    writer = open_storage("http://127.0.0.1:9/acts").open_pieces("f", durable=False)
    with pytest.raises(ReadOnlyError, match="piece by piece"):
        writer.append(b"1")


# --------------------------------------------------------------------------------------------------------------------- S3


@pytest.fixture
def bucket(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Storage]:
    """A prefix, through the proxy, with the smallest parts that may be and few waits."""
    monkeypatch.setattr(s3_uploads, "PART_BYTES", LEAST)
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


def refusing(status: int, code: str, verb: str) -> Callable[[Request], Fault | None]:
    return lambda request: Fault(status=status, code=code) if verbs([request]) == [verb] else None


def test_an_object_appears_when_it_is_whole_in_as_few_requests_as_it_has_parts(s3: S3, bucket: S3Storage) -> None:
    pieces = pieces_of(LEAST // 2, LEAST // 2 - 1, LEAST + 2, 100)
    with bucket.open_pieces("p/c.0", durable=True) as writer:
        for piece in pieces:
            writer.append(piece)
            seen = open_storage(bucket.url)
            assert not seen.is_file("p/c.0")
            assert seen.list("p") == []
        with pytest.raises(FileNotFoundError):
            seen.read("p/c.0")
    assert verbs(s3.proxy.requests) == ["create", "part", "part", "part", "complete"]
    assert bucket.read("p/c.0") == b"".join(pieces)
    s3.proxy.reset()
    with bucket.open_pieces("p/c.1", durable=True) as writer:
        writer.append(b"12")
        writer.append(b"3")
    assert verbs(s3.proxy.requests) == ["PUT"]


def test_a_request_that_is_refused_for_a_while_is_sent_again(s3: S3, bucket: S3Storage) -> None:
    left = Counter({"create": 2, "part": 2, "complete": 2})

    def refuse(request: Request) -> Fault | None:
        (name,) = verbs([request])
        left[name] -= 1
        return [Fault(status=429, code="TooManyRequests"), Fault(status=503, code="SlowDown")][left[name]] if left[name] >= 0 else None

    s3.proxy.fault = refuse
    pieces = pieces_of(LEAST, 800)
    with bucket.open_pieces("f", durable=True) as writer:
        for piece in pieces:
            writer.append(piece)
    assert all(left[name] < 0 for name in ("create", "part", "complete"))
    assert bucket.read("f") == b"".join(pieces)


def test_an_upload_that_is_refused_for_good_leaves_nothing(s3: S3, bucket: S3Storage) -> None:
    refusals = [(507, "QuotaExceeded", NoSpaceError), (403, "AccessDenied", ReadOnlyError)]
    for verb, (status, code, kind) in itertools.product(["create", "part", "complete"], refusals):
        s3.proxy.fault = refusing(status, code, verb)
        writer = bucket.open_pieces("f", durable=True)

        def finish(writer: PieceWriter = writer) -> None:
            writer.append(bytes(LEAST))
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
    data = RNG.bytes(LEAST + 1)
    with bucket.open_pieces("f", durable=True) as writer:
        writer.append(data)
    assert not lost[0]
    assert bucket.read("f") == data
    assert bucket.stray_uploads("") == []


def begin(storage: Storage, *keys: str) -> list[PieceWriter]:
    writers = [storage.open_pieces(key, durable=False) for key in keys]
    for writer in writers:
        writer.append(RNG.bytes(LEAST))
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
    with pytest.raises(FileNotFoundError):
        writers[0].close()
    assert not bucket.is_file("g/p/c.0")
    writers[3].close()
    assert bucket.stray_uploads("") == []


def test_a_server_that_lists_no_uploads_has_none(s3: S3, bucket: S3Storage) -> None:
    begin(bucket, "f")
    assert len(bucket.stray_uploads("")) == 1
    answers = {501: "NotImplemented", 403: "AccessDenied", 405: "MethodNotAllowed", 404: "NoSuchKey", 400: "NobodyKnowsThisCode"}
    for status, code in answers.items():
        s3.proxy.fault = refusing(status, code, "GET")
        assert bucket.stray_uploads("") == []


class Answers:
    """A client that answers `list_multipart_uploads` from a list of pages."""

    def __init__(self, pages: list[dict[str, Any]]) -> None:
        self.pages, self.asked = pages, list[dict[str, Any]]()

    def __call__(self, verb: str, **request: Any) -> dict[str, Any]:
        assert verb == "list_multipart_uploads"
        self.asked.append(request)
        return self.pages[min(len(self.asked), len(self.pages)) - 1]


@pytest.mark.long
def test_uploads_are_listed_page_by_page_and_only_those_below(bucket: S3Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    root = bucket.root.partition("/")[2]
    entries = [{"Key": f"{root}/g/c.{n}", "UploadId": f"id{n}"} for n in range(4)]
    other = {"Key": "elsewhere/c.0", "UploadId": "x"}
    more = {"IsTruncated": True, "NextKeyMarker": "k", "NextUploadIdMarker": "u"}
    pages = [{"Uploads": [*entries[:2], other], **more}, {**more, "NextKeyMarker": "l"}, {"Uploads": entries[2:], "IsTruncated": False}]
    answers = Answers(pages)
    endless = Answers([{"Uploads": entries, **more}])
    with monkeypatch.context() as patched:
        patched.setattr(bucket.filesystem, "call_s3", answers)
        found = bucket.stray_uploads("g")
        patched.setattr(bucket.filesystem, "call_s3", endless)
        assert len(bucket.stray_uploads("")) == 8, "a server that returns one page for ever is asked twice"
    assert found == [StrayUpload(f"g/c.{n}", f"id{n}", None) for n in range(4)]
    assert [request.get("KeyMarker") for request in answers.asked] == [None, "k", "l"]


# ------------------------------------------------------------------------------------------------------- killed, and gc

UPLOADS = """
import os, signal, sys, lmprobe_zarr as lz
from lmprobe_zarr.storage import s3_uploads
s3_uploads.PART_BYTES = 1000
store = lz.open_store(sys.argv[1])
writers = [store.storage.open_pieces(key, durable=True) for key in sys.argv[2:]]
for writer in writers:
    writer.append(bytes(2500))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_writer_that_is_killed_leaves_nothing_that_is_seen_and_gc_removes_its_parts(s3: S3, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("torch", reason="the process that is killed is a child of one that imports it")
    url = f"s3://team/{uuid.uuid4().hex}/acts"
    store = lz.open_store(url)
    pooled = {"resid_mean": {0: np.ones((2, 8), "f4")}}
    lz.write_activations(store, model="m", prompts=["a", "b"], pooled=pooled)
    group = store.find_group("m").name
    (part,) = [name for name in store.storage.list(group) if store.storage.is_file(f"{group}/{name}/zarr.json")]
    before = store.dataset().resid_mean.values
    ours = f"{group}/{part[:-1]}0/tokens/resid/c.0.0.0"
    foreign = ["notes/c.0", f"{group}/notapart/c.0.0.0", f"{group}/{part}/notes.txt"]
    warmed: Warmed = request.getfixturevalue("warmed")
    assert warmed.run(UPLOADS, url, ours, *foreign).returncode == -signal.SIGKILL
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
    counted = lz.open_store(url, storage_options=s3.options(counted=True))
    s3.proxy.fault = lambda request: Fault(status=501, code="NotImplemented") if "uploads" in request.query else None
    summary = counted.gc(max_age=0)
    assert summary.uploads == (), "a server that lists none is no failure"
    assert "upload" not in str(summary)
