"""Parts of format 1 written again in format 2: the same view, whoever does it, how often, and wherever it is stopped."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from block_stores import batch_of, small_chunks, values_of
from crash_operations import in_child
from paths import SUPPORT
from s3_server import S3
from stores import GROUP, Stops, make_batch
from versions import old_format
from warmed import Warmed

import lmprobe_zarr as lz
from lmprobe_zarr.errors import LmprobeZarrError
from lmprobe_zarr.storage import s3_uploads
from lmprobe_zarr.storage.base import Storage
from lmprobe_zarr.storage.open import open_storage
from lmprobe_zarr.store.store import Store

STRESS = bool(os.environ.get("LMPROBE_ZARR_STRESS"))

Shown = tuple[xr.Dataset, xr.Dataset]


def shown(place: Any) -> Shown:
    store = lz.open_store(place, "r")
    return store.dataset(dtype="stored").load(), store.tokens(dtype="stored").load()


def check_same(place: Any, before: Shown) -> None:
    for found, expected in zip(shown(place), before, strict=True):
        xr.testing.assert_identical(found, expected)
    assert lz.open_store(place, "r").verify(progress=False).ok


def fill(place: Any) -> Shown:
    """Parts of format 1 that replace values of each other, a part of format 2 between them, columns, a removed layer."""
    store = lz.open_store(place, durable=False)
    with old_format():
        store.write(GROUP, make_batch(["a", "bb", "ccc"], seed=1, columns={"label": [1, 2, 3]}))
        store.write(GROUP, make_batch(["bb", "dddd"], seed=2, columns={"label": [4, 5]}), compressed=False)
        store.drop("acme/toy", ["resid"], layers=[3])
    store.write(GROUP, make_batch(["e", "a"], seed=3))
    with old_format():
        store.write(GROUP, make_batch(["f"], seed=4, layers=(1,)))
        store.annotate("acme/toy", {"note": {"a": "x", "f": "y"}})
    before = shown(place)
    assert {part.info.version for part in parts(place)} == {1, 2}
    return before


def parts(place: Any) -> list[Any]:
    listing = lz.open_store(place, "r").listing(GROUP)
    return [part for part in (*listing.parts, *listing.annotations) if part.info.name not in listing.replaced]


def upgrade(store: Store, **options: Any) -> Any:
    return store.compact(progress=False, **{"upgrade": True, "min_parts": 1000, **options})


@pytest.mark.few(1)
@pytest.mark.parametrize("options", [{}, {"min_parts": 2}, {"shards": False}, {"part_bytes": 1}])
def test_an_upgrade_changes_no_view_and_is_done_once(tmp_path: Path, options: dict[str, Any]) -> None:
    before = fill(tmp_path / "s")
    old = [part.info for part in parts(tmp_path / "s") if part.info.version == 1]
    store = lz.open_store(tmp_path / "s", durable=False)
    assert store.compact(progress=False, dry_run=True, min_parts=1000).runs == (), "nobody is upgraded who did not ask for it"
    planned = upgrade(store, dry_run=True, **options)
    assert {part.info.version for part in parts(tmp_path / "s")} == {1, 2}, "only a plan"
    done = upgrade(store, **options)
    assert [[part.path for part in run.parts] for run in done.runs] == [[part.path for part in run.parts] for run in planned.runs]
    assert {info.name for info in old} <= {part.info.name for run in done.runs for part in run.parts}
    assert {part.info.version for part in parts(tmp_path / "s")} == {2}
    check_same(tmp_path / "s", before)
    assert upgrade(lz.open_store(tmp_path / "s", durable=False), **options).runs == ()
    store.gc(max_age=0)
    check_same(tmp_path / "s", before)


def test_what_an_upgraded_part_records_is_what_the_old_one_recorded(tmp_path: Path) -> None:
    store = lz.open_store(tmp_path / "s", durable=False)
    with old_format():
        store.write(GROUP, make_batch(["a", "bb"], seed=1), recorded={"device": "cpu", "versions": {"torch": "2"}})
    (old,) = parts(tmp_path / "s")
    upgrade(store)
    (new,) = parts(tmp_path / "s")
    assert {key: new.info.recorded[key] for key in ("device", "versions", "written")} == {
        key: old.info.recorded[key] for key in ("device", "versions", "written")
    }
    assert new.info.odd == old.info.odd
    assert new.info.digests.tolist() == old.info.digests.tolist()
    assert {key: (a.shape, a.dtype, a.attributes) for key, a in new.info.arrays.items()} == {
        key: (a.shape, a.dtype, a.attributes) for key, a in old.info.arrays.items()
    }
    assert new.info.replaces == (old.info.name,)


# ------------------------------------------------------------------------------------------------------- several at a time


def test_two_upgrades_at_once_leave_the_same_view(tmp_path: Path) -> None:
    for turn in range(4):
        place = tmp_path / str(turn)
        before = fill(place)
        barrier = threading.Barrier(3)
        errors: list[BaseException] = []

        def run(min_parts: int, place: Path = place, barrier: threading.Barrier = barrier, errors: list[BaseException] = errors) -> None:
            try:
                store = lz.open_store(place, durable=False)
                barrier.wait()
                upgrade(store, min_parts=min_parts)
            except BaseException as error:  # noqa: BLE001
                errors.append(error)

        threads = [threading.Thread(target=run, args=(min_parts,)) for min_parts in (1000, 1000, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        check_same(place, before)
        upgrade(lz.open_store(place, durable=False))
        assert {part.info.version for part in parts(place)} == {2}
        lz.open_store(place, durable=False).gc(max_age=0)
        check_same(place, before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children")
def test_upgrades_that_are_killed_at_any_moment_are_completed_by_the_next(warmed: Warmed, tmp_path: Path) -> None:
    """In a process of its own that forks, because a parent must have no threads when it forks."""
    code = "import sys; sys.path[:0] = sys.argv[1:3]; from test_upgrade import Path, kill_upgrades; print(kill_upgrades(Path(sys.argv[3])))"
    done = warmed.run(code, str(SUPPORT), str(Path(__file__).parent), str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[-1]) >= (5 if STRESS else 1), "children that were killed in the middle"


def start(work: Callable[[], object]) -> int:
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    return child


def kill_upgrades(base: Path) -> int:
    """Two children at once that upgrade a store, one or both of which are killed; then another one that completes it."""
    kills = 0
    rng = np.random.default_rng(0)
    for turn in range(10 if STRESS else 3):
        place = base / f"k{turn}"
        assert in_child(lambda place=place: np.save(base / "before", shown_bytes(fill(place)))) == 0  # type: ignore[misc]

        def work(place: Path = place) -> None:
            with small_chunks(64, 192):
                upgrade(lz.open_store(place, durable=False))

        children = [start(work), start(work)]
        time.sleep(float(rng.uniform(0.0, 0.06)))
        os.kill(children[0], 9)
        if turn % 2:
            os.kill(children[1], 9)
        ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        kills += ends.count(-9)

        def check(place: Path = place) -> None:
            expected = np.load(base / "before.npy")
            assert np.array_equal(shown_bytes(shown(place)), expected)
            work(place)
            assert np.array_equal(shown_bytes(shown(place)), expected)
            assert {part.info.version for part in parts(place)} == {2}
            lz.open_store(place, durable=False).gc(max_age=0)
            assert np.array_equal(shown_bytes(shown(place)), expected)
            assert lz.open_store(place).listing(GROUP).unfinished == ()
            assert lz.open_store(place).verify(progress=False).ok

        assert in_child(check) == 0, f"turn {turn}: {ends}"
    return kills


def shown_bytes(found: Shown) -> Any:
    """Everything that a store shows, as one array of bytes."""
    texts = [f"{data.to_dict(data='list')!r}" for data in found]
    return np.frombuffer("".join(texts).encode(), np.uint8)


# ---------------------------------------------------------------------------------------------------------------------- S3


@pytest.mark.long
@pytest.mark.few(1)
@pytest.mark.parametrize("after", [1, 4, 9])
def test_an_upgrade_on_s3_that_was_stopped_is_completed_and_its_uploads_are_aborted(
    s3: S3, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers of 12 MiB, uploaded in parts of 5 MiB, the least that a server takes."""
    url = f"s3://pub/{tmp_path.name}-{after}-{os.getpid()}/acts"
    monkeypatch.setattr(s3_uploads, "PART_BYTES", 5 * 2**20)
    values = values_of("bytes", (2, 768, 8192), "float16")
    with old_format():
        lz.open_store(url).write(GROUP, batch_of(values, 4))
    view = lz.open_store(url, "r").tokens(dtype="stored").resid
    storage = Stops(open_storage(url), after, moment="after")
    with pytest.raises(OSError, match="plug"):
        upgrade(Store(storage, durable=False))
    found: Storage = open_storage(url)
    (old,) = parts(url)
    assert old.info.version == 1
    strays = found.stray_uploads("")
    assert (len(strays) > 0) == (after > 1), "what the killed writer leaves"
    np.testing.assert_array_equal(view.isel(layer=1, token=slice(10, 200)).values, values[1, 10:200])
    upgrade(lz.open_store(url))
    (new,) = parts(url)
    assert new.info.version == 2
    assert new.info.arrays["tokens/resid"].shard_blocks > 1
    store = lz.open_store(url)
    summary = store.gc(max_age=0)
    assert len(summary.uploads) == len(strays)
    assert found.stray_uploads("") == []
    assert [part.info.name for part in store.listing(GROUP).parts] == [new.info.name]
    np.testing.assert_array_equal(lz.open_store(url, "r").tokens(dtype="stored").resid.values, values)
    np.testing.assert_array_equal(lz.open_store(url, "r").tokens(dtype="stored").resid.isel(layer=0, token=[700]).values, values[0, [700]])
    assert lz.open_store(url, "r").verify(progress=False).ok


def test_a_refused_upload_ends_the_upgrade_and_leaves_the_store_as_it_was(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from s3_server import Fault

    url = f"s3://pub/{tmp_path.name}-{os.getpid()}/refused"
    monkeypatch.setattr(s3_uploads, "PART_BYTES", 5 * 2**20)
    values = values_of("bytes", (1, 512, 8192), "float16")
    with old_format():
        lz.open_store(url).write(GROUP, batch_of(values, 4))
    quick = {"config_kwargs": {"retries": {"total_max_attempts": 1}}}
    store = lz.open_store(url, storage_options=s3.options(counted=True, **quick))
    store.listing(GROUP)
    s3.proxy.fault = lambda request: (
        Fault(status=403, code="AccessDenied") if "uploadId" in request.query and request.method == "PUT" else None
    )
    with pytest.raises(LmprobeZarrError):
        upgrade(store)
    s3.proxy.reset()
    assert open_storage(url).stray_uploads("") == []
    (old,) = parts(url)
    assert old.info.version == 1
    np.testing.assert_array_equal(lz.open_store(url, "r").tokens(dtype="stored").resid.values, values)
    assert lz.open_store(url, "r").listing(GROUP).unfinished == ()


def test_format_1_is_written_where_a_test_asks_for_it(tmp_path: Path) -> None:
    lz.open_store(tmp_path / "new", durable=False).write(GROUP, make_batch(["a"]))
    assert [part.info.version for part in parts(tmp_path / "new")] == [2]
    with old_format():
        lz.open_store(tmp_path / "s", durable=False).write(GROUP, make_batch(["a"]))
    assert [part.info.version for part in parts(tmp_path / "s")] == [1]
