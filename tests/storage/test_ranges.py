"""Ranges of files: every place returns the right bytes, and reads no more of a file than the ranges and the small gaps between them."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import pickle
import tracemalloc
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from s3_server import ANON, S3, Fault, Request
from web_server import HONEST, WHOLE, serving

from lmprobe_zarr.errors import AccessDeniedError, InvalidArgumentError, UnreachableError
from lmprobe_zarr.storage import LocalStorage, Storage, open_storage, remote
from lmprobe_zarr.storage.base import Storage as Base
from lmprobe_zarr.storage.ranges import LOCAL_GAP, REMOTE_GAP, Answer, Run, answered, cut, joined
from lmprobe_zarr.store.parts.frozen import FrozenStorage

DATA = np.random.default_rng(7).bytes(3_000_000)
SIZE = len(DATA)
# Apart from each other everywhere, one behind another, over the end, behind it, empty, the same twice, overlapping; in no order.
MANY = [
    (2_000_000, 2_000_100),
    (0, 10),
    (10, 20),
    (5, 5),
    (SIZE - 5, SIZE + 100),
    (700_000, 765_536),
    (700_000, 765_536),
    (760_000, 770_000),
    (SIZE + 10, SIZE + 20),
    (0, 1),
    (1_300_000, 1_300_001),
    (770_000 + LOCAL_GAP, 770_100 + LOCAL_GAP),
    (SIZE, SIZE),
]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> LocalStorage:
    storage = LocalStorage(tmp_path_factory.mktemp("filled"))
    storage.write("f", DATA, durable=False)
    return storage


@pytest.fixture
def storage(root: str) -> Storage:
    return open_storage(root)


def right(ranges: Sequence[tuple[int, int]], data: bytes = DATA) -> list[bytes]:
    return [data[start:stop] for start, stop in ranges]


def read(storage: Storage, ranges: Sequence[tuple[int, int]], key: str = "f") -> list[bytes]:
    return [bytes(each) for each in storage.read_ranges(key, ranges)]


# ----------------------------------------------------------------------------------------------------------- every place


@pytest.mark.few(2)
def test_ranges_are_slices_of_the_file(storage: Storage) -> None:
    storage.write("a/f", DATA, durable=False)
    assert read(storage, MANY, "a/f") == right(MANY)
    for each in MANY:
        assert read(storage, [each], "a/f") == right([each])
    numbers = [(np.int64(3), np.uint64(9))]
    assert read(storage, numbers, "a/f") == right([(3, 9)])  # type: ignore[arg-type]


def test_a_missing_file_is_reported_as_missing_and_nothing_is_asked_for_no_byte(storage: Storage) -> None:
    for key in ("nowhere", "no/where"):
        for ranges in ([(0, 1)], MANY):
            with pytest.raises(FileNotFoundError):
                storage.read_ranges(key, ranges)
        assert storage.read_ranges(key, []) == []
        assert storage.read_ranges(key, [(7, 7), (0, 0)]) == [b"", b""]


def test_of_a_file_without_bytes_every_range_is_empty(storage: Storage) -> None:
    storage.write("f", b"", durable=False)
    assert read(storage, [(0, 1), (5, 2**60), (0, 0)]) == [b"", b"", b""]


def test_what_is_no_range_is_an_error(storage: Storage) -> None:
    storage.write("f", b"12345", durable=False)
    for ranges in ([(-1, 5)], [(5, 4)], [(0, 1), (2**60, 0)]):
        with pytest.raises(InvalidArgumentError, match="no range"):
            storage.read_ranges("f", ranges)


@pytest.mark.few(2)
def test_a_range_takes_no_more_memory_than_the_file_has(storage: Storage) -> None:
    storage.write("f", DATA[:100_000], durable=False)
    tracemalloc.start()
    try:
        found = read(storage, [(0, 2**60), (50_000, 2**62), (2**61, 2**61 + 1), (99_999, 2**60)])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == [DATA[:100_000], DATA[50_000:100_000], b"", DATA[99_999:100_000]]
    assert peak < 3_000_000


@pytest.mark.few(2)
def test_it_is_read_from_threads_and_after_pickling(storage: Storage) -> None:
    storage.write("f", DATA, durable=False)
    copied = pickle.loads(pickle.dumps(storage))  # noqa: S301 — our own bytes
    shifted = [[(start + n, stop + n) for start, stop in MANY] for n in range(12)]
    with ThreadPoolExecutor(6) as pool:
        for ranges, found in zip(shifted, pool.map(lambda ranges: read(copied, ranges), shifted), strict=True):
            assert found == right(ranges)


def test_a_published_copy_reads_ranges_and_takes_no_pieces() -> None:
    for name in ("read_ranges", "open_pieces"):
        assert name in vars(FrozenStorage)
        assert name in Base.__abstractmethods__, "so that no other wrapper forgets it"


# ------------------------------------------------------------------------------------------------------------ joining runs


positions = st.integers(0, 2_000_000) | st.integers(0, 300)
some_ranges = st.lists(st.tuples(positions, st.integers(0, 300_000) | st.integers(0, 3)).map(lambda r: (r[0], sum(r))), max_size=12)


@given(some_ranges, st.sampled_from([0, 1, LOCAL_GAP, REMOTE_GAP]))
@settings(max_examples=60)
@example([(0, 2**26), (2**26, 2**26 + 1), (5, 2**27)], REMOTE_GAP)
def test_runs_cover_the_ranges_and_no_gap_that_is_wider(ranges: list[tuple[int, int]], gap: int) -> None:
    runs = joined(ranges, gap)
    assert all(run.start < run.stop for run in runs)
    assert all(before.stop <= after.start for before, after in itertools.pairwise(runs))
    wanted = sorted(each for each in ranges if each[0] < each[1])
    assert all(sum(run.start <= start and stop <= run.stop for run in runs) == 1 for start, stop in wanted)
    # Every byte of a run that no range has lies in a gap between two ranges that is no wider.
    reached = 0
    for start, stop in wanted:
        inside = any(run.start < start and start <= run.stop for run in runs)
        if reached and start > reached and inside:
            assert start - reached <= gap
        reached = max(reached, stop)
    for run in runs:
        assert run.start in {start for start, _ in wanted}
        assert run.stop in {stop for _, stop in wanted}


@given(some_ranges)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_ranges_of_a_local_file_are_its_slices(filled: LocalStorage, ranges: list[tuple[int, int]]) -> None:
    assert read(filled, ranges) == right(ranges)


@given(some_ranges, st.data())
@settings(max_examples=40)
def test_whatever_a_server_sends_with_its_place_is_put_there(ranges: list[tuple[int, int]], data: Any) -> None:
    runs = joined(ranges, REMOTE_GAP)
    answers = {}
    for run in runs:
        first = data.draw(st.integers(0, run.start))
        answers[run] = Answer(first, DATA[first : data.draw(st.integers(min(run.stop, SIZE), SIZE))])
    assert [bytes(each) for each in cut(ranges, runs, answers)] == right(ranges)


@pytest.mark.parametrize(
    ("body", "content_range", "start"),
    [
        (b"ab", "bytes 5-6/10", 5),
        (b"ab", "bytes 4-5/6", 4),
        (b"ab", None, 5),
        (b"ab", "nonsense", 5),
        (b"abc", None, 0),
        (b"ab", "bytes 5-6/*", 5),
    ],
)
def test_an_answer_says_where_its_bytes_are(body: bytes, content_range: str | None, start: int) -> None:
    answer = answered(Run(5, 7), body, is_partial=True, content_range=content_range)
    assert answer is not None
    assert answer.start == start


# --------------------------------------------------------------------------------------------------------- local folders


def count_calls(monkeypatch: pytest.MonkeyPatch, *names: str) -> dict[str, list[int]]:
    calls: dict[str, list[int]] = {name: [] for name in names}

    def counting(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            found = real(*args, **kwargs)
            calls[name].append(found if isinstance(found, int) else len(found))
            return found

        return call

    for name in names:
        monkeypatch.setattr(os, name, counting(name, getattr(os, name)))
    return calls


def test_a_local_file_is_opened_once_and_read_once_for_neighbours(filled: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    ranges = [(i * (4096 + LOCAL_GAP), i * (4096 + LOCAL_GAP) + 4096) for i in range(10)]
    apart = [(start + 1_000_000 + i, stop + 1_000_000 + i) for i, (start, stop) in enumerate(ranges[:4])]
    calls = count_calls(monkeypatch, "open", "preadv", "pread")
    assert read(filled, [*apart, *ranges]) == right([*apart, *ranges])
    assert len(calls["open"]) == 1
    assert len(calls["preadv"]) == 5, "the first ten are one run, and the others are a byte too far apart"
    assert sum(calls["preadv"]) == 10 * 4096 + 9 * LOCAL_GAP + 4 * 4096
    assert not calls["pread"]


def test_without_preadv_files_are_read_all_the_same(filled: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "preadv")
    assert read(filled, MANY) == right(MANY)
    assert bytes(filled.read_view("f")) == DATA
    for parts in ((SIZE - 100, 100), (SIZE, 0), (SIZE - 101, 100), (SIZE - 50, 100)):
        target, tail = (memoryview(bytearray(part)) for part in parts)
        assert filled.read_into("f", target, tail) == SIZE
        if sum(parts) == SIZE:
            assert bytes(target) + bytes(tail) == DATA
    with pytest.raises(FileNotFoundError):
        filled.read_ranges("nowhere", [(0, 1)])


@pytest.mark.parametrize("has_preadv", [True, False])
def test_a_system_that_returns_less_than_was_requested_is_asked_again(
    filled: LocalStorage, monkeypatch: pytest.MonkeyPatch, has_preadv: bool
) -> None:
    preadv, pread = os.preadv, os.pread
    if has_preadv:
        monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:40_000]], offset))
    else:
        monkeypatch.delattr(os, "preadv")
        monkeypatch.setattr(os, "pread", lambda fd, count, offset: pread(fd, min(count, 40_000), offset))
    assert read(filled, MANY) == right(MANY)
    assert bytes(filled.read_view("f")) == DATA
    target, tail = memoryview(bytearray(SIZE - 7)), memoryview(bytearray(7))
    assert filled.read_into("f", target, tail) == SIZE
    assert bytes(target) + bytes(tail) == DATA


def test_a_file_that_becomes_shorter_meanwhile_gives_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_bytes(DATA[:1000])
    preadv = os.preadv

    def shorten(*args: Any) -> int:
        os.truncate(tmp_path / "f", 500)
        return preadv(*args)

    monkeypatch.setattr(os, "preadv", shorten)
    assert read(LocalStorage(tmp_path), [(0, 1000), (600, 700), (400, 600)]) == [DATA[:500], b"", DATA[400:500]]


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.ESTALE, UnreachableError), (errno.EACCES, AccessDeniedError), (errno.EIO, OSError), (errno.EMFILE, UnreachableError)],
)
@pytest.mark.parametrize("call", ["open", "preadv"])
def test_errors_of_the_system_are_those_of_reading(
    filled: LocalStorage, monkeypatch: pytest.MonkeyPatch, call: str, number: int, kind: type[Exception]
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(kind) as of_ranges:
        filled.read_ranges("f", [(0, 1)])
    with pytest.raises(kind) as of_reading:
        filled.read_view("f")
    assert type(of_ranges.value) is type(of_reading.value)
    assert str(of_ranges.value) == str(of_reading.value)


# ------------------------------------------------------------------------------------------------------------ web servers


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records if record.name == "lmprobe_zarr.storage"]


@pytest.mark.parametrize("habit", HONEST)
def test_a_web_server_is_asked_for_each_run(habit: str, said: Callable[[], list[str]]) -> None:
    with serving({"a/f": DATA}, habit) as server:
        web = open_storage(f"{server.url}/a")
        assert read(web, MANY) == right(MANY)
        runs = joined(MANY, REMOTE_GAP)
        assert {request[:2] for request in server.requests} == {("GET", run.header) for run in runs}
        assert len(server.requests) == len(runs) > 3
        assert sum(request[2] for request in server.requests) <= sum(run.nbytes for run in runs) + len(runs) * 4096
        assert not said()
        assert read(web, [(2**60, 2**60 + 1)]) == [b""]
        with pytest.raises(FileNotFoundError):
            web.read_ranges("nowhere", MANY)
        assert read(web, [(0, 0)], "nowhere") == [b""]


@pytest.mark.parametrize("habit", WHOLE)
def test_a_web_server_without_ranges_is_read_whole_and_noted_once(habit: str, said: Callable[[], list[str]]) -> None:
    with serving({"f": DATA, "short": DATA[:700]}, habit) as server:
        web = open_storage(server.url)
        assert read(web, MANY) == right(MANY)
        assert sum(request[2] for request in server.requests) <= 2 * SIZE, "one range is requested, and no more when the answer is the file"
        for ranges in ([(100, 1000)], [(100, 800)], [(699, 2**60)], [(700, 1400)], [(2**60, 2**61)], [(0, 700)]):
            assert read(web, ranges, "short") == right(ranges, DATA[:700]), "shorter than the range, or just as long"
        again = pickle.loads(pickle.dumps(web))  # noqa: S301 — our own bytes
        assert read(again, MANY) == right(MANY)
        assert len(said()) == 1
        assert f"{server.url} sends whole files" in said()[0]
        with pytest.raises(FileNotFoundError):
            web.read_ranges("nowhere", MANY)


@pytest.mark.parametrize("habit", ["cut", "less"])
def test_an_answer_that_is_too_short_is_an_error_and_no_bytes(habit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_WAITS", (0.01, 0.01))
    with serving({"f": DATA}, habit) as server, pytest.raises(UnreachableError, match="cut short"):
        open_storage(server.url).read_ranges("f", MANY)


def test_an_answer_that_was_cut_is_requested_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_WAITS", (0.01, 0.01))
    with serving({"f": DATA}, "cut", cuts=2) as server:
        assert read(open_storage(server.url), MANY) == right(MANY)


# --------------------------------------------------------------------------------------------------- fsspec's own caches


# fsspec's cache of blocks opens no files in memory, and leaves one of its own open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize(
    ("cache", "below"),
    [("simplecache", "memory"), ("simplecache", "http"), ("filecache", "memory"), ("filecache", "http"), ("blockcache", "http")],
)
def test_caching_file_systems_return_the_right_bytes(cache: str, below: str, tmp_path: Path) -> None:
    options = {cache: {"cache_storage": str(tmp_path / "cache")}}
    with serving({f"{below}/f": DATA, f"{below}/short": DATA[:100_000]}) as server:
        if below == "memory":
            url = f"memory://{uuid.uuid4().hex}"
            for name, data in (("f", DATA), ("short", DATA[:100_000])):
                open_storage(url).write(name, data, durable=False)
        else:
            url = f"{server.url}/http"
        cached = open_storage(f"{cache}::{url}", options)
        for _ in range(2):
            assert read(cached, MANY) == right(MANY)
        tracemalloc.start()
        try:
            assert read(cached, [(0, 2**60), (99_999, 2**61), (2**60, 2**61)], "short") == [DATA[:100_000], DATA[99_999:100_000], b""]
            assert tracemalloc.get_traced_memory()[1] < 12_000_000
        finally:
            tracemalloc.stop()
        with pytest.raises(FileNotFoundError):
            cached.read_ranges("nowhere", MANY)


def test_a_client_that_returns_the_whole_file_is_noticed_by_its_length(said: Callable[[], list[str]]) -> None:
    class Ignores(fsspec.get_filesystem_class("memory")):  # type: ignore[misc]
        def cat_file(self, path: str, start: int | None = None, end: int | None = None, **more: Any) -> bytes:
            return bytes(super().cat_file(path))

    url = f"odd://{uuid.uuid4().hex}"
    odd = remote.FsspecStorage(Ignores(skip_instance_cache=True), f"/{uuid.uuid4().hex}", url)
    odd.write("f", DATA, durable=False)
    assert read(odd, MANY) == right(MANY)
    assert len(said()) == 1


# --------------------------------------------------------------------------------------------------------------------- S3


@pytest.fixture
def bucket(s3: S3) -> Storage:
    url = f"s3://pub/{uuid.uuid4().hex}"
    open_storage(url).write("f", DATA, durable=False)
    # Without a signature, so that the proxy may change the header.
    found = open_storage(url, s3.options(ANON, counted=True))
    found.read_ranges("f", [(0, 1)])  # the connection
    s3.proxy.reset()
    return found


def test_each_run_is_one_request_to_s3(s3: S3, bucket: Storage) -> None:
    assert read(bucket, MANY) == right(MANY)
    runs = joined(MANY, REMOTE_GAP)
    assert len(runs) > 3
    assert dict(s3.proxy.kinds()) == {"GET": len(runs)}
    s3.proxy.reset()
    assert read(bucket, [(SIZE, SIZE + 1)]) == [b""]
    assert dict(s3.proxy.kinds()) == {"GET": 1, "HEAD": 1}, "refused, and so its size is looked up"
    s3.proxy.reset()
    ranges = [(n * 400_000, n * 400_000 + 1000) for n in range(7)] + [(n * 400_000 + 1500, n * 400_000 + 2000) for n in range(7)]
    assert read(bucket, ranges) == right(ranges)
    assert dict(s3.proxy.kinds()) == {"GET": 7}
    assert s3.proxy.bytes_sent == 7 * 2000
    assert s3.proxy.most_at_once > 1
    s3.proxy.reset()
    assert read(bucket, [(4, 4)]) == [b""]
    assert not s3.proxy.requests


def test_a_cut_answer_of_s3_is_requested_again_and_never_taken_for_the_end(
    s3: S3, bucket: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_WAITS", (0.01, 0.01))
    left = [2]

    def cut_some(request: Request) -> Fault | None:
        left[0] -= 1
        return Fault(cut=100) if left[0] >= 0 else None

    s3.proxy.fault = cut_some
    assert read(bucket, [(500, 1500)]) == right([(500, 1500)])
    s3.proxy.fault = lambda request: Fault(cut=100)
    with pytest.raises(UnreachableError, match="cut short"):
        bucket.read_ranges("f", [(500, 1500)])


def test_s3_that_ignores_or_refuses_ranges_gives_the_right_bytes(s3: S3, bucket: Storage, said: Callable[[], list[str]]) -> None:
    s3.proxy.fault = lambda request: Fault(whole=True)
    assert read(bucket, MANY) == right(MANY)
    assert read(bucket, MANY) == right(MANY)
    s3.proxy.fault = lambda request: Fault(status=416, code="InvalidRange") if request.range else None
    assert read(bucket, MANY) == right(MANY)
    assert len(said()) == 1
