"""A medium that is full, read-only, forbidden, slow, flapping, or has another time: an error that says so, nothing half visible.

And when it is well again, the next try succeeds.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crash_operations import BEFORE, FIRST, MODEL, NEW, SECOND, SPLIT, Truth, annotated, check_between, check_equal, without, written
from own_mounts import OWN_MOUNTS, needs_mounts
from paths import SUPPORT
from s3_server import S3, Fault, Request
from shown_values import truth_of
from stores import GROUP, make_batch

import lmprobe_zarr as lz
from lmprobe_zarr.errors import UnreachableError
from lmprobe_zarr.store.store import Store

STRESS = bool(os.environ.get("LMPROBE_ZARR_STRESS"))
CHILD = SUPPORT / "medium_child.py"


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that another user can reach, as pytest's own cannot be."""
    folder = Path(tempfile.mkdtemp())
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def run(what: str, folder: Path, step: int, *before: str) -> None:
    command = [*before, sys.executable, str(CHILD), what, str(folder), str(step)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800 if STRESS else 240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[-1]) > 3, "it was ill often enough"


@needs_mounts
def test_on_a_full_disk_nothing_half_shows_and_with_some_space_the_next_try_succeeds(tmp_path: Path) -> None:
    run("full", tmp_path, 1 if STRESS else 97, *OWN_MOUNTS)


@pytest.mark.long
@needs_mounts
def test_on_a_disk_that_becomes_read_only_nothing_half_shows(tmp_path: Path) -> None:
    run("read_only", tmp_path, 5 if STRESS else 70, *OWN_MOUNTS)


@pytest.mark.long
def test_missing_permissions_are_reported_and_not_taken_for_damage(open_folder: Path) -> None:
    run("permission", open_folder, 5 if STRESS else 90)


def test_a_process_without_a_file_to_open_takes_nothing_for_damaged_or_missing(tmp_path: Path) -> None:
    run("files", tmp_path, 1)


# ------------------------------------------------------------------------------------------------------------- the clock


@pytest.mark.few(1)
def test_a_clock_that_jumps_back_changes_neither_order_nor_what_may_go(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 2e9

    def jump(seconds: float) -> None:
        nonlocal now
        now += seconds
        monkeypatch.setattr(time, "time", lambda: now)
        monkeypatch.setattr(time, "time_ns", lambda: int(now * 1e9))

    jump(0)
    store = lz.open_store(root, durable=False)
    truth: Truth = {}
    for seed, by in enumerate((0.0, -86400.0, -3e8, 5.0, -1.0)):
        jump(by)
        # Whoever writes next, in whatever process, and whatever else lies there.
        store = lz.open_store(root, durable=False)
        batch = make_batch(["a", "bb"], seed=seed, columns={"label": [seed, -seed - 1]})
        store.write(GROUP, batch)
        store.annotate(MODEL, {"split": {"a": f"s{seed}"}})
        truth = annotated(written(truth, batch), "split", {"a": f"s{seed}"})
        check_equal(truth_of(lz.open_store(root)), truth)
        store.storage.write(f"{GROUP.name}/notes-{seed}.txt", b"mine", durable=False)
    jump(-7200)
    store.compact(progress=False)
    check_equal(truth_of(lz.open_store(root)), truth)
    assert store.gc(max_age=86400).replaced == ()
    assert len(store.gc(max_age=0).replaced) > 0
    check_equal(truth_of(lz.open_store(root)), truth)
    store.delete(MODEL, ["bb"])
    check_equal(truth_of(lz.open_store(root)), without(truth, ("bb",)))
    plan = lz.evict(store, max_gb=0, min_age=0, annotations=True)
    assert plan is not None
    assert plan.kept == 0, "what was written in the future was not used a moment ago"
    assert lz.open_store(root).models() == []


# -------------------------------------------------------------------------------------------------------------------- S3


@pytest.fixture
def url() -> str:
    return f"s3://team/{uuid.uuid4().hex}/acts"


FAULTS = {
    "overloaded": Fault(status=503, code="SlowDown"),
    "broken": Fault(status=500, code="InternalError"),
    "cut short": Fault(cut=20),
    "hung up on": Fault(lose_answer=True),
    "slow": Fault(delay=0.3),
}


def some_work(store: Store) -> None:
    """As people do: write, label, merge, write again, delete, clean."""
    store.write(GROUP, FIRST)
    store.write(GROUP, SECOND)
    store.annotate(MODEL, {"split": SPLIT})
    check_equal(truth_of(store), BEFORE)
    store.compact(progress=False)
    store.gc(max_age=0)
    store.write(GROUP, NEW)
    store.delete(MODEL, ["a"])


@pytest.mark.long
@pytest.mark.few(1)
@pytest.mark.parametrize("what", FAULTS if STRESS else ("overloaded", "cut short"))
def test_on_a_flapping_server_everything_comes_out_right(s3: S3, url: str, what: str) -> None:
    """Every few requests fail, of every kind, and never the same one again and again."""
    count = 0

    def fault(request: Request) -> Fault | None:
        nonlocal count
        count += 1
        return FAULTS[what] if count % (5 if STRESS else 29) == 0 else None

    s3.proxy.fault = fault
    some_work(lz.open_store(url, storage_options=s3.options(counted=True)))
    expected = without(written(BEFORE, NEW), ("a",))
    check_equal(truth_of(lz.open_store(url, "r", storage_options=s3.options(counted=True))), expected)
    s3.proxy.reset()
    check_equal(truth_of(lz.open_store(url, "r", storage_options=s3.options())), expected)
    assert count > 50


WORK: dict[str, tuple[Callable[[Store], object], Any]] = {
    "a part": (lambda s: s.write(GROUP, NEW), written(BEFORE, NEW)),
    "annotate": (lambda s: s.annotate(MODEL, {"split": {"bb": "dev"}}), annotated(BEFORE, "split", {"bb": "dev"})),
    "compact": (lambda s: s.compact(progress=False), BEFORE),
    "delete": (lambda s: s.delete(MODEL, ["bb"]), without(BEFORE, ("bb",))),
    "evict": (lambda s: lz.evict(s, max_gb=0, min_age=0), {}),
}


@pytest.mark.parametrize("name", WORK)
@pytest.mark.parametrize("fault", ["overloaded", "hung up on"] if STRESS else ["overloaded"])
@pytest.mark.few(1)
def test_a_server_that_goes_down_in_the_middle_is_an_error_and_the_next_try_completes_it(
    s3: S3, url: str, name: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)  # it is down for good, so that there is no need to wait for it
    impatient = {"config_kwargs": {"retries": {"mode": "standard", "total_max_attempts": 1}, "connect_timeout": 5}}
    options = {**s3.options(counted=True), **impatient, "skip_instance_cache": True}
    do, after = WORK[name]
    failures = 0
    for n in range(0, 10_000, 3 if STRESS else 61):
        place = f"{url}-{n}"
        store = lz.open_store(place, storage_options=s3.options())
        store.write(GROUP, FIRST)
        store.write(GROUP, SECOND)
        store.annotate(MODEL, {"split": SPLIT})
        count = 0

        def down(request: Request, n: int = n) -> Fault | None:
            nonlocal count
            count += 1
            return FAULTS[fault] if count > n else None

        s3.proxy.fault = down
        try:
            do(lz.open_store(place, storage_options=options))
        except UnreachableError as error:
            assert place in str(error)  # noqa: PT017
            assert len(str(error).splitlines()) <= 2  # noqa: PT017
            failures += 1
        s3.proxy.reset()
        fresh = lz.open_store(place, storage_options=s3.options())
        check_between(truth_of(fresh), BEFORE, after)
        if name != "delete" or "bb" in truth_of(fresh):
            do(fresh)
        check_equal(truth_of(lz.open_store(place, "r", storage_options=s3.options())), after)
        if count <= n:
            break
    assert failures > 0


def test_times_of_a_slow_server_add_up_by_rounds_and_not_by_requests(s3: S3, url: str) -> None:
    store = lz.open_store(url, storage_options=s3.options())
    for seed in range(12):
        store.write(GROUP, make_batch([f"p{seed}"], seed=seed, tokens=False))
    took: list[float] = []
    for fault in (None, Fault(delay=0.25)):
        s3.proxy.reset()
        s3.proxy.fault = functools.partial(lambda given, _request: given, fault)
        began = time.monotonic()
        data = lz.open_store(url, "r", storage_options=s3.options(counted=True)).dataset().resid_mean.load()
        took.append(time.monotonic() - began)
        assert np.isfinite(data.values).all()
    requests = sum(s3.proxy.kinds().values())
    assert requests > 40
    # On a busy machine everything takes longer; what the delays add is what counts.
    assert took[1] - took[0] < 0.25 * requests / 2, "they wait for one another no more than they must"
