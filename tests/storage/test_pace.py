"""How many requests are under way at a time: more to a server far away, fewer to one that refuses because there are too many."""

from __future__ import annotations

import contextlib
import pickle
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
from s3_server import S3, Fault, Request

from lmprobe_zarr.errors import UnreachableError
from lmprobe_zarr.storage import Pace, Storage, local_pace, open_storage, run_all
from lmprobe_zarr.storage import remote as remote_module
from lmprobe_zarr.storage.pace import REMOTE_REQUESTS

CLIENTS = pytest.mark.parametrize("client", ["s3fs", "obstore"])


def answer_all(pace: Pace, requests: int, seconds: Callable[[int], float]) -> None:
    """So many requests with all turns taken; each takes `seconds` of how many are under way."""
    for _ in range(requests):
        pace._under_way = pace.at_once
        pace.answered(seconds(pace.at_once))
    pace._under_way = 0


def test_the_number_grows_while_requests_only_wait() -> None:
    pace = Pace(32, 64)
    answer_all(pace, 31, lambda _: 0.1)
    assert pace.at_once == 63
    answer_all(pace, 100, lambda _: 0.1)
    assert pace.at_once == 64, "never above the most"


def test_the_number_stays_where_requests_wait_for_one_another() -> None:
    # A server, a network or an interpreter that can do 200 requests a second, 20 ms away.
    pace = Pace(4, 500)
    answer_all(pace, 1000, lambda under_way: max(0.02, under_way / 200))
    assert pace.at_once == 9, "the first number with which a request takes more than twice as long"


def test_the_number_stays_where_fewer_are_asked_for() -> None:
    pace = Pace(32, 64)
    for _ in range(1000):
        with pace.turn():
            pace.answered(0.1)
    assert pace.at_once == 32


def test_refusals_halve_the_number_once_for_all_that_were_under_way() -> None:
    pace = Pace(32, 64)
    sent = time.monotonic()
    for _ in range(32):
        pace.refused(sent)
    assert pace.at_once == 16
    pace.refused(time.monotonic())
    assert pace.at_once == 8
    for _ in range(20):
        pace.refused(time.monotonic())
    assert pace.at_once == 1, "never none"


def test_the_number_grows_slowly_after_a_refusal() -> None:
    pace = Pace(32, 64)
    pace.refused(time.monotonic())
    answer_all(pace, 17, lambda _: 0.1)
    assert pace.at_once == 17, "one more for a round of answers"


def test_no_more_turns_are_taken_than_there_are_and_none_is_lost() -> None:
    pace, lock = Pace(3, 3), threading.Lock()
    now = most = 0

    def job() -> None:
        nonlocal now, most
        with pace.turn(), pace.turn():  # a second one in the same thread is the first
            with lock:
                now, most = now + 1, max(most, now + 1)
            time.sleep(0.001)
            with lock:
                now -= 1
            if random.random() < 0.3:
                raise OSError("on the way")

    def attempt() -> None:
        with contextlib.suppress(OSError):
            job()

    def attempts() -> None:
        for _ in range(20):
            attempt()

    threads = [threading.Thread(target=attempts) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == 3
    assert pace._under_way == 0


def test_run_all_starts_more_threads_when_the_number_grows() -> None:
    pace, lock, enough = Pace(2, 40), threading.Lock(), threading.Event()
    waiting = 0

    def job() -> None:
        nonlocal waiting
        if not enough.is_set():
            with lock:
                waiting += 1
                if waiting == 3:  # with two threads, only because of what the first job did
                    enough.set()
        enough.wait(20)

    def grow() -> None:
        pace._limit = 10.0

    run_all([grow, *[job] * 30], pace)
    assert enough.is_set()
    assert 3 <= waiting <= 10


def test_run_all_stops_at_the_first_error_and_runs_each_job_once() -> None:
    for pace in (local_pace(), Pace(8, 64)):
        done: list[int] = []
        run_all([partial(done.append, i) for i in range(500)], pace)
        assert sorted(done) == list(range(500))

        def fail() -> None:
            raise ValueError("the first")

        with pytest.raises(ValueError, match="the first"):
            run_all([fail, *[lambda: time.sleep(0.01)] * 100], pace)


# -------------------------------------------------------------------------------------------------------------- servers


class TokenBucket:
    """Refuses requests beyond so many a second."""

    def __init__(self, rate: float, burst: int) -> None:
        self.rate, self.burst = rate, burst
        self.left, self.last, self.lock = float(burst), time.monotonic(), threading.Lock()
        self.count: Counter[str] = Counter()

    def __call__(self, request: Request) -> Fault | None:
        with self.lock:
            now = time.monotonic()
            self.left, self.last = min(self.burst, self.left + (now - self.last) * self.rate), now
            if self.left < 1:
                self.count["refused"] += 1
                return Fault(status=503, code="SlowDown")
            self.left -= 1
            self.count["answered"] += 1
            return None


def fill(s3: S3, url: str, files: int) -> dict[str, bytes]:
    storage = open_storage(url, s3.options())
    held = {f"f{i}": bytes([i % 256]) * (i + 1) for i in range(files)}
    run_all([partial(storage.write, key, data, durable=False) for key, data in held.items()], storage.pace)
    return held


def read_all(storage: Storage, keys: list[str]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}

    def read(key: str) -> None:
        found[key] = storage.read(key)

    run_all([partial(read, key) for key in keys], storage.pace)
    return found


@CLIENTS
def test_a_server_that_refuses_for_there_are_too_many_gets_fewer_and_everything_is_read(s3: S3, client: str) -> None:
    if client == "obstore":
        pytest.importorskip("obstore")
    url = f"s3://team/slow-down-{client}"
    held = fill(s3, url, 100)
    storage = open_storage(url, s3.options(counted=True, client=client))
    s3.proxy.fault = bucket = TokenBucket(rate=30, burst=10)
    began = time.monotonic()
    assert read_all(storage, list(held)) == held
    seconds = time.monotonic() - began
    assert bucket.count["answered"] == 100
    assert bucket.count["refused"] > 20
    assert seconds > 2.9, "90 of them at 30 a second"
    assert seconds < 25
    assert storage.pace.at_once < REMOTE_REQUESTS
    # The number is kept for the next reads of this client, and shared by all that use it.
    assert open_storage(url, s3.options(counted=True, client=client)).pace is storage.pace


@CLIENTS
def test_a_server_that_refuses_everything_is_given_up_soon(s3: S3, client: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if client == "obstore":
        pytest.importorskip("obstore")
    monkeypatch.setattr(remote_module, "_WAITS", (0.01, 0.02))
    storage = open_storage(
        "s3://team/overloaded", s3.options(counted=True, client=client, config_kwargs={"retries": {"total_max_attempts": 1}})
    )
    s3.proxy.fault = lambda _: Fault(status=503, code="SlowDown")
    began = time.monotonic()
    with pytest.raises(UnreachableError, match="overloaded"):
        read_all(storage, [f"f{i}" for i in range(8)])
    assert time.monotonic() - began < 30


def test_a_file_that_alone_is_refused_is_given_up_once_the_others_are_read(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "_WAITS", (0.01, 0.02))
    url = "s3://team/one-refused"
    held = fill(s3, url, 40)
    storage = open_storage(url, s3.options(counted=True, config_kwargs={"retries": {"total_max_attempts": 1}}))
    s3.proxy.fault = lambda request: Fault(status=503, code="SlowDown") if request.path.endswith("/f0") else None
    with pytest.raises(UnreachableError, match="f0 is overloaded"):
        read_all(storage, list(held))
    s3.proxy.reset()
    assert read_all(storage, list(held)) == held


def test_only_the_client_that_gains_sends_more_to_a_server_far_away(s3: S3) -> None:
    pytest.importorskip("obstore")
    held = fill(s3, "s3://team/far", 150)
    for client in ("obstore", "s3fs"):
        storage = open_storage("s3://team/far", s3.options(counted=True, client=client))
        s3.proxy.fault = lambda _: Fault(delay=0.2)
        assert read_all(storage, list(held)) == held
        assert s3.proxy.most_at_once <= storage.pace.at_once
        assert (storage.pace.at_once > REMOTE_REQUESTS) == (client == "obstore")
        s3.proxy.reset()


def test_a_pace_is_of_the_process_and_the_client(s3: S3) -> None:
    storage = open_storage("s3://team/acts", s3.options())
    assert pickle.loads(pickle.dumps(storage)).pace is storage.pace  # noqa: S301
    assert open_storage("s3://pub/acts", s3.options()).pace is storage.pace, "one server, by the same credentials"
    assert open_storage("s3://pub/acts", {"anon": True, **s3.options()}).pace is not storage.pace
    assert open_storage("memory://acts").pace is not storage.pace
