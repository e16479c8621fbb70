"""What `test_medium` runs in a process of its own: with a disk, rights or limits that no test may take from the others.

Each part of it makes the medium ill in the middle of an operation, looks at what is shown, makes the medium well, and tries again.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from crash_operations import OPERATIONS, Operation, check_between, check_equal, check_stopped, fill, shown
from stores import GROUP, Stops, make_batch

import lmprobe_zarr as lz
from lmprobe_zarr.errors import AccessDeniedError, LmprobeZarrError, NoSpaceError, ReadOnlyError, UnreachableError
from lmprobe_zarr.storage.local import LocalStorage
from lmprobe_zarr.store.store import Store

# What reads the parts of a page is imported when it is needed first, and then this user may not read the interpreter's own files.
importlib.import_module("importlib.readers")

WRITES = ("the first part", "a part", "an extraction", "annotate", "compact", "delete", "drop", "publish", "copy", "import")


def check_message(error: OSError, kind: type[LmprobeZarrError], root: Path) -> None:
    """Whether an error is one of ours, names the place, and says what to do in at most two lines."""
    assert isinstance(error, kind), repr(error)
    assert str(root) in str(error), str(error)
    assert len(str(error).splitlines()) <= 2, str(error)


def full(base: Path, step: int) -> int:
    """Every operation on a disk on which so many pages are left: 0, some, and more until it is enough."""
    failures = 0
    for name in WRITES:
        operation = OPERATIONS[name]
        for pages in range(0, 400, step):
            work = base / f"{name}-{pages}".replace(" ", "-")
            work.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "none", work], check=True)
            try:
                operation.prepare(work)
                free = os.statvfs(work).f_bavail * os.statvfs(work).f_frsize
                ballast = work / "ballast"
                ballast.write_bytes(bytes(max(0, free - pages * 4096)))
                try:
                    operation.run(work, Store(LocalStorage(work / operation.place), durable=False))
                    through = True
                except OSError as error:
                    check_message(error, NoSpaceError, work)
                    through = False
                check_between(shown(work / operation.place), operation.before, operation.after)
                left = [str(p) for p in (work / operation.place).rglob("*.partial")]
                assert not left, f"{name}: {left}"
                ballast.unlink()
                check_stopped(operation, work)
            finally:
                subprocess.run(["umount", work], check=True)
            failures += not through
            if through:
                break
        else:
            raise AssertionError(f"{name} needs more than 400 pages")
    return failures


def ill_in_the_middle(
    base: Path, names: tuple[str, ...], make_ill: Callable[[Path], object], make_well: Callable[[Path], object], step: int
) -> int:
    """The medium refuses every change from the n-th call on."""
    failures = 0
    for name in names:
        operation: Operation = OPERATIONS[name]
        for n in range(0, 10_000, step):
            work = base / f"{name}-{n}".replace(" ", "-")
            work.mkdir()
            operation.prepare(work)
            root = work / operation.place
            root.mkdir(exist_ok=True)
            storage = Stops(LocalStorage(root), n)
            storage.stop = lambda root=root: make_ill(root)  # type: ignore[misc]
            try:
                operation.run(work, Store(storage, durable=False))
            except OSError as error:
                check_message(error, ReadOnlyError, root)
                failures += 1
            through = storage.after >= 0
            check_between(shown(root), operation.before, operation.after)
            make_well(root)
            check_stopped(operation, work)
            if through:
                break
    return failures


def read_only(base: Path, step: int) -> int:
    """A disk that becomes read-only, as Linux makes one on which it finds faults."""

    def mount_again(root: Path, how: str) -> None:
        if not os.path.ismount(root):
            subprocess.run(["mount", "--bind", root, root], check=True)
        subprocess.run(["mount", "-o", f"remount,bind,{how}", root], check=True)

    fill(base)
    mount_again(base / "s", "ro")
    before = {str(p): p.read_bytes() for p in (base / "s").rglob("*") if p.is_file()}
    store = lz.open_store(base / "s")
    assert np.isfinite(store.dataset().resid_mean.values).all()
    assert len(lz.cache_info(store=base / "s").models) == 1
    for act in (
        lambda: store.write(GROUP, make_batch(["x"])),
        lambda: store.annotate("acme/toy", {"label": {"a": 9}}),
        lambda: store.compact(progress=False),
        lambda: store.gc(max_age=0),
        lambda: store.delete("acme/toy", ["a"]),
        lambda: store.drop("acme/toy", ["resid"]),
        lambda: lz.evict(store, max_gb=0, min_age=0),
        lambda: lz.clear_cache(url=store),
    ):
        try:
            act()
        except ReadOnlyError as error:
            check_message(error, ReadOnlyError, base / "s")
        else:
            raise AssertionError("written to a read-only disk")
    assert before == {str(p): p.read_bytes() for p in (base / "s").rglob("*") if p.is_file()}
    names = ("a part", "an extraction", "annotate", "compact", "gc", "delete", "drop", "evict", "publish", "copy")
    return ill_in_the_middle(base, names, lambda root: mount_again(root, "ro"), lambda root: mount_again(root, "rw"), step)


def permission(base: Path, step: int) -> int:
    """Somebody takes the right to write, or to read, from whom the store belongs to."""
    if os.getuid() == 0:
        # Root may do everything. What is imported late must be there before: the code may lie where others cannot read.
        fill(base / "warm")
        shown(base / "warm" / "s")
        base.chmod(0o777)
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)

    def chmod(root: Path, mode: int) -> None:
        for folder in [*[p for p in root.rglob("*") if p.is_dir()][::-1], root]:
            folder.chmod(mode)

    work = base / "read"
    fill(work)
    chmod(work / "s", 0o755)
    part = next(p for p in (work / "s" / GROUP.name).iterdir() if len(p.name) == 26)
    for place in (
        part / "zarr.json",
        part,
        work / "s" / GROUP.name / "zarr.json",
        work / "s" / GROUP.name,
        work / "s" / "zarr.json",
        work / "s",
    ):
        mode = place.stat().st_mode
        place.chmod(0)
        for act in (
            lambda: lz.open_store(work / "s").dataset(),
            lambda: lz.evict(work / "s", max_gb=0, min_age=0),
            lambda: lz.cache_info(store=work / "s"),
        ):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")  # a warning that it is damaged would be a lie
                    act()
            except (AccessDeniedError, ReadOnlyError) as error:
                check_message(error, type(error), work / "s")
            else:
                raise AssertionError(f"{place} was read")
        place.chmod(mode)
        lz.open_store(work / "s").dataset().load()
    chunk = part / "prompts" / "resid_mean" / "c.0.0.0"
    chunk.chmod(0)
    try:
        lz.open_store(work / "s").dataset().load()
    except AccessDeniedError as error:
        check_message(error, AccessDeniedError, chunk)
    names = ("a part", "an extraction", "annotate", "compact", "gc", "delete", "drop", "evict", "clear", "publish", "copy")
    return ill_in_the_middle(base, names, lambda root: chmod(root, 0o555), lambda root: chmod(root, 0o755), step)


def files(base: Path, step: int) -> int:
    """A process that has no file left to open: that says nothing about the store."""
    fill(base)
    store = lz.open_store(base / "s", durable=False)
    expected = shown(base / "s")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    failures = 0
    for act in (
        lambda: lz.open_store(base / "s"),
        lambda: lz.open_store(base / "s").dataset(),
        lambda: store.dataset().load(),
        lambda: lz.cache_info(store=lz.open_store(base / "s")),
        lambda: store.write(GROUP, make_batch(["x"], seed=8)),
        lambda: lz.evict(store, max_gb=0, min_age=0),
    ):
        for _ in range(2):
            taken = []
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
            with contextlib.suppress(OSError):
                while True:
                    taken.append(os.open(os.devnull, os.O_RDONLY))
            try:
                act()
            except UnreachableError:
                failures += 1
            except OSError as error:
                if error.errno != errno.EMFILE:  # as it is, where it is nothing to do with the store
                    raise
                failures += 1
            finally:
                for descriptor in taken:
                    os.close(descriptor)
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            check_equal(shown(base / "s"), expected)
    return failures


if __name__ == "__main__":
    warnings.simplefilter("error")
    sys.stdout.write(f"failures {globals()[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))}\n")
