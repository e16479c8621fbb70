"""Files of a reader's own cache: found whole or not at all, whatever happens to the folder; bounded, the least recently used go first."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import pickle
import random
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import pytest
from own_mounts import OWN_MOUNTS, needs_mounts

from lmprobe_zarr.storage import KeptReads, ReadCache
from lmprobe_zarr.storage.read_cache import _account_of

MB = 2**20
FORK = get_context("fork")


def content(number: int, nbytes: int = 5000) -> bytes:
    """Bytes that follow from a number."""
    return hashlib.shake_256(str(number).encode()).digest(nbytes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "reads"


def kept(folder: Path, limit: int = 64 * MB) -> KeptReads:
    _account_of.cache_clear()  # as in a new process
    return ReadCache(str(folder), limit).reads_of("s3://team/acts", "", "group/part", b"document")


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("??/*") if not path.name.startswith("."))


def nbytes_of(folder: Path) -> int:
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.glob("??/*"))


# ----------------------------------------------------------------------------------------------------------------- entries


def test_an_entry_comes_back_under_its_own_name_range_and_source_alone(folder: Path) -> None:
    reads = kept(folder)
    data = content(1)
    reads.keep("tokens/resid/c.0.0.0", 100, 5100, (data[:10], memoryview(data)[10:]))
    assert reads.read_bytes("tokens/resid/c.0.0.0", 100, 5100) == data
    assert pickle.loads(pickle.dumps(reads)).read_bytes("tokens/resid/c.0.0.0", 100, 5100) == data  # noqa: S301 — made above
    room = bytearray(20)
    assert reads.read("tokens/resid/c.0.0.0", 100, 5100, [memoryview(room)], skip=4000)
    assert room == data[4000:4020]
    others = [("tokens/resid/c.1.0.0", 100, 5100), ("tokens/resid/c.0.0.0", 101, 5101), ("tokens/resid/c.0.0.0", 100, 5099)]
    assert [reads.read_bytes(*other) for other in others] == [None] * 3
    cache = reads.cache
    identities = [
        ("s3://team/acts", "", "group/part", b"another document"), ("s3://team/acts", "", "group/other", b"document"),
        ("s3://team/acts", "http://other", "group/part", b"document"), ("s3://team/act", "s", "group/part", b"document"),
    ]  # fmt: skip
    assert [cache.reads_of(*each).read_bytes("tokens/resid/c.0.0.0", 100, 5100) for each in identities] == [None] * 4


def test_no_folder_is_made_by_reading_and_the_one_that_is_made_is_its_owners_alone(folder: Path) -> None:
    reads = kept(folder)
    assert reads.read_bytes("f", 0, 10) is None
    assert not reads.holds("f", 0, 10)
    assert reads.cache.size() == (0, 0)
    assert reads.cache.clear() == (0, 0)
    assert not folder.exists()
    reads.keep("f", 0, 10, (content(1, 10),))
    assert {stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.glob("??"))} == {0o700}
    assert [stat.S_IMODE(path.stat().st_mode) for path in entries(folder)] == [0o600]
    assert (folder / "CACHEDIR.TAG").read_bytes().startswith(b"Signature: 8a477f597d28d172789f06886806bc55")


def test_a_file_that_was_cut_or_grew_at_any_byte_or_has_another_header_is_no_entry(folder: Path) -> None:
    reads = kept(folder)
    reads.keep("f", 0, 40, (content(1, 40),))
    reads.keep("g", 0, 40, (content(2, 40),))
    path = Path(reads.cache.path_of(reads._key("f", 0, 40)))
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert reads.read_bytes("f", 0, 40) is None, length
    path.write_bytes(whole + b"\0")
    assert reads.read_bytes("f", 0, 40) is None
    for place in range(len(whole) - 40):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert reads.read_bytes("f", 0, 40) is None, f"byte {place} of the header"
    path.write_bytes(Path(reads.cache.path_of(reads._key("g", 0, 40))).read_bytes())
    assert reads.read_bytes("f", 0, 40) is None, "the content of another entry"
    path.unlink()
    path.mkdir()
    assert reads.read_bytes("f", 0, 40) is None
    reads.keep("f", 0, 40, (content(1, 40),))  # cannot replace a folder, and says so in the log only
    assert reads.read_bytes("f", 0, 40) is None


def test_what_is_distrusted_is_gone_and_may_be_kept_again(folder: Path) -> None:
    reads = kept(folder)
    reads.keep("f", 0, 40, (content(1, 40),))
    reads.distrust("f", 0, 40)
    reads.distrust("f", 0, 40)
    assert reads.read_bytes("f", 0, 40) is None
    reads.keep("f", 0, 40, (content(1, 40),))
    assert reads.read_bytes("f", 0, 40) == content(1, 40)


# -------------------------------------------------------------------------------------------------------------------- size


def test_the_limit_holds_and_the_least_recently_used_go_first(folder: Path) -> None:
    limit = 2 * MB
    reads = kept(folder, limit)
    for number in range(100):
        reads.keep("f", number, number + 50_000, (content(number, 50_000),))
        path = Path(reads.cache.path_of(reads._key("f", number, number + 50_000)))
        os.utime(path, (1e9 + number, 1e9 + number))  # as if each was used a second after the one before
        assert nbytes_of(folder) <= limit
        reads.read_bytes("f", 3, 50_003)  # is used again and again
    held = [number for number in range(100) if reads.read_bytes("f", number, number + 50_000) is not None]
    assert len(held) > 30
    assert held == [3, *range(held[1], 100)], "the one that was in use, and the latest"
    for number in held:
        assert reads.read_bytes("f", number, number + 50_000) == content(number, 50_000)
    assert reads.cache.size() == (len(held), nbytes_of(folder))


def test_a_smaller_limit_of_the_next_process_holds_from_its_first_write_on(folder: Path) -> None:
    reads = kept(folder)
    for number in range(50):
        reads.keep("f", number, number + 50_000, (content(number, 50_000),))
    small = kept(folder, MB)
    small.keep("g", 0, 100, (content(1, 100),))
    assert nbytes_of(folder) <= MB
    assert small.read_bytes("g", 0, 100) == content(1, 100)


def test_what_is_larger_than_the_limit_is_not_kept_and_drives_nothing_out(folder: Path) -> None:
    reads = kept(folder, MB)
    reads.keep("f", 0, 100, (content(1, 100),))
    reads.keep("g", 0, 2 * MB, (bytes(2 * MB),))
    assert reads.read_bytes("g", 0, 2 * MB) is None
    assert reads.read_bytes("f", 0, 100) == content(1, 100)


def test_a_clock_that_is_a_day_ahead_does_not_keep_entries_for_ever(folder: Path) -> None:
    reads = kept(folder, MB)
    for number in range(15):
        reads.keep("f", number, number + 50_000, (content(number, 50_000),))
    for path in entries(folder):  # used by a machine whose clock is a day ahead
        os.utime(path, (time.time() + 86_400,) * 2)
    for number in range(100, 120):
        reads.keep("f", number, number + 50_000, (content(number, 50_000),))
    assert nbytes_of(folder) <= MB
    assert reads.read_bytes("f", 119, 50_119) == content(119, 50_000)


def test_only_entries_are_ever_removed(folder: Path) -> None:
    folder.mkdir()
    foreign = [
        folder / "thesis.txt",
        folder / "ab" / "notes.txt",
        folder / "ab" / ("0" * 61),
        folder / "abc" / ("0" * 62),
        folder / ("0" * 64),
    ]
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(2 * MB))
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / ("1" * 62)).write_bytes(b"not ours")
    (folder / "cd").symlink_to(outside)
    (folder / "ab" / ("2" * 62)).symlink_to(outside / ("1" * 62))
    reads = kept(folder, MB)
    for number in range(40):
        reads.keep("f", number, number + 50_000, (content(number, 50_000),))
    reads.cache.clear()
    assert all(path.is_file() for path in foreign)
    assert (outside / ("1" * 62)).read_bytes() == b"not ours"
    assert reads.cache.size() == (0, 0)


def test_drafts_of_a_process_that_was_killed_go_after_an_hour_and_with_all_else(folder: Path) -> None:
    reads = kept(folder)
    reads.keep("f", 0, 10, (content(1, 10),))
    fresh, old = (entries(folder)[0].parent / f".{digit * 16}" for digit in "ab")
    for draft in (fresh, old):
        draft.write_bytes(bytes(9000))
    os.utime(old, (time.time() - 7200,) * 2)
    assert reads.cache.size() == (2, 4096 + 12288), "what is being written takes space too"
    assert (fresh.exists(), old.exists()) == (True, False)
    reads.cache.clear()
    assert list(folder.glob("??/*")) == []


# ------------------------------------------------------------------------------------------------- folders that are no good


def assert_logged_once(script: str, reason: int) -> None:
    """Run a script that has 3 MB at ``/mnt`` to itself; what it logs is one line with the reason."""
    command = f'mount -t tmpfs -o size=3m none /mnt && exec "{sys.executable}" -W error -c "$SCRIPT"'
    environment = {**os.environ, "SCRIPT": script}
    done = subprocess.run([*OWN_MOUNTS, "sh", "-c", command], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    logged = [line for line in done.stderr.splitlines() if line.startswith("LOG")]
    assert len(logged) == 1
    assert "/mnt/reads" in logged[0]
    assert os.strerror(reason) in logged[0]


def log_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


_READ_ONLY = """
import logging, subprocess
logging.basicConfig(format="LOG %(message)s")
from lmprobe_zarr.storage import ReadCache
reads = ReadCache("/mnt/reads", 10**9).reads_of("s3://team/acts")
reads.keep("f", 0, 10, (b"0123456789",))
import os
os.utime(reads.cache.path_of(reads._key("f", 0, 10)), (1e9, 1e9))  # a use would be noted now
subprocess.run(["mount", "-o", "remount,ro", "/mnt"], check=True)
assert reads.read_bytes("f", 0, 10) == b"0123456789"
for number in range(20):
    reads.keep("g", number, number + 10, (b"0123456789",))
    assert reads.read_bytes("g", number, number + 10) is None
reads.distrust("f", 0, 10)
assert reads.cache.clear() == (0, 0)
assert reads.read_bytes("f", 0, 10) == b"0123456789"
"""


@needs_mounts
def test_a_read_only_folder_is_read_from_and_logged_once() -> None:
    assert_logged_once(_READ_ONLY, errno.EROFS)


def test_a_folder_that_is_a_file_or_below_one_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("not a folder")
    for place in (tmp_path / "file", tmp_path / "file" / "reads", Path("/proc/none/reads")):
        caplog.clear()
        reads = kept(place)
        for number in range(20):
            reads.keep("f", number, number + 10, (content(number, 10),))
            assert reads.read_bytes("f", number, number + 10) is None
        assert len(log_of(caplog)) == 1, place
    assert (tmp_path / "file").read_text() == "not a folder"


def test_entries_may_lie_on_another_file_system(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = Path("/tmp") if str(tmp_path_factory.getbasetemp()).startswith("/dev/shm") else Path("/dev/shm")  # noqa: S108
    if not os.access(other, os.W_OK) or other.stat().st_dev == folder.parent.stat().st_dev:
        pytest.skip("there is one file system only")
    apart = other / f"lmprobe-zarr-{os.getpid()}"
    apart.mkdir()
    try:
        folder.symlink_to(apart)
        reads = kept(folder)
        reads.keep("f", 0, 10, (content(1, 10),))
        assert reads.read_bytes("f", 0, 10) == content(1, 10)
        assert reads.cache.clear().entries == 1
    finally:
        subprocess.run(["rm", "-r", str(apart)], check=True)


_FULL = """
import logging, sys
logging.basicConfig(format="LOG %(message)s")
from lmprobe_zarr.storage import ReadCache
from lmprobe_zarr.storage.read_cache import _account_of
reads = ReadCache("/mnt/reads", 10**9).reads_of("s3://team/acts")
right = {}
for number in range(60):
    data = bytes([number]) * 100_000
    reads.keep("f", number, number + 100_000, (data,))
    found = reads.read_bytes("f", number, number + 100_000)
    assert found in (None, data), number
    right[number] = found is not None
assert right[0] and not right[59], right
import os
free = os.statvfs("/mnt").f_bavail * os.statvfs("/mnt").f_frsize
assert free > 2**19, "some of it was given back"
assert not [name for _, _, names in os.walk("/mnt/reads") for name in names if name.startswith(".")], "no draft is left"
_account_of(os.getpid(), "/mnt/reads").paused_until = 0.0  # a minute later
reads.keep("g", 0, 10, (b"0123456789",))
assert reads.read_bytes("g", 0, 10) == b"0123456789"
"""


@needs_mounts
def test_on_a_full_disk_reading_goes_on_some_space_is_given_back_and_it_is_logged_once() -> None:
    assert_logged_once(_FULL, errno.ENOSPC)


# --------------------------------------------------------------------------------------------------------------- processes


def _use(folder: str, seed: int, seconds: float) -> int:
    """Keep and read entries of 100 numbers in turn with others; how many were found. Wrong bytes raise."""
    dice, found = random.Random(seed), 0
    reads = ReadCache(folder, 3 * MB).reads_of("s3://team/acts")  # a third of what they write
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        number = dice.randrange(100)
        data = reads.read_bytes("f", number, number + 100_000)
        if data is None:
            reads.keep("f", number, number + 100_000, (content(number, 100_000),))
        else:
            assert data == content(number, 100_000)
            found += 1
        if dice.random() < 0.02:
            reads.distrust("f", number, number + 100_000)
    return found


def test_processes_that_keep_read_and_evict_at_once_find_right_bytes_or_none(folder: Path) -> None:
    with FORK.Pool(4) as pool:
        found = pool.starmap(_use, [(str(folder), seed, 2.0) for seed in range(4)])
    assert all(found)
    assert nbytes_of(folder) <= 3 * MB * (1 + 2 / 32)
    assert not list(folder.glob("??/.*")), "no draft is left"


def test_a_process_that_is_killed_at_any_moment_leaves_entries_that_are_whole(folder: Path) -> None:
    for kill in range(12):
        child = FORK.Process(target=_use, args=(str(folder), kill, 60.0))
        child.start()
        time.sleep(0.05 + 0.02 * kill)
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
    reads = ReadCache(str(folder), 3 * MB).reads_of("s3://team/acts")
    held = {number: reads.read_bytes("f", number, number + 100_000) for number in range(100)}
    whole = [number for number, data in held.items() if data is not None]
    assert whole
    assert all(held[number] == content(number, 100_000) for number in whole)
    assert len(whole) == len(entries(folder))


def test_a_forked_child_does_not_wait_for_a_lock_of_its_parent(folder: Path) -> None:
    reads = kept(folder)
    reads.keep("f", 0, 10, (content(1, 10),))
    with reads.cache._account.lock:
        child = FORK.Process(target=reads.keep, args=("g", 0, 10, (content(2, 10),)))
        child.start()
        child.join(20)
        assert child.exitcode == 0
    assert reads.read_bytes("g", 0, 10) == content(2, 10)


@pytest.fixture(autouse=True)
def fresh_accounts() -> Iterator[None]:
    yield
    _account_of.cache_clear()
