"""`ReadCache`, files of this machine with what was read of remote places, up to a size; the least recently used go first.

Knows no format. An entry is some bytes under a key of 32 bytes. The caller chooses keys that name the content, compares what it gets with a
checksum of its own at every use, and says `distrust` where that fails. An entry appears whole, by rename, and any process may remove it
at any time: what cannot be read from here is read from its place. Nothing raises for want of space, rights or files; it logs and goes on.

Layout: ``<folder>/<2 hex digits>/<62 hex digits>``, the key in hex. Each file has a header of 64 bytes, in which the key stands again, and
then the bytes. Its time of modification is its last use. Names that begin with a dot are being written. Other files are never touched.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import logging
import os
import re
import secrets
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, NamedTuple

from lmprobe_zarr.storage.local import read_at
from lmprobe_zarr.typing import Buffer

__all__ = ["KeptReads", "ReadCache", "ReadCacheSize"]

_LOGGER: Final = logging.getLogger("lmprobe_zarr.storage")
_HEADER: Final = struct.Struct("<8s32sQ16x")
_MAGIC: Final = b"LMPROBE1"
_FOLDER: Final = re.compile(r"[0-9a-f]{2}")
_ENTRY: Final = re.compile(r"[0-9a-f]{62}")
_DRAFT: Final = re.compile(r"\.[0-9a-f]{16}")
_DRAFT_SECONDS: Final = 3600.0  # after which a draft counts as left by a process that was killed
_USED_SECONDS: Final = 60.0  # that a last use may be out of date: writing each down would cost as much as a small read
_PAUSE_SECONDS: Final = 60.0  # without writing, after a write has failed
_BLOCK: Final = 4096  # what a file takes is a multiple of that on most file systems
_TAG: Final = "CACHEDIR.TAG"  # https://bford.info/cachedir: backup programs leave such folders out
_TAGGED: Final = b"Signature: 8a477f597d28d172789f06886806bc55\n# Read from remote stores by lmprobe-zarr. It may be deleted at any time.\n"


class ReadCacheSize(NamedTuple):
    """How many entries a cache has, and how many bytes they take."""

    entries: int
    nbytes: int


class _Found(NamedTuple):
    used: float
    nbytes: int
    path: str


@dataclass(frozen=True, slots=True)
class ReadCache:
    """Entries in a folder of this machine, which several processes and machines may share. Picklable; nothing is written by making one.

    Parameters
    ----------
    folder : str
        Absolute path; made at the first write, for its owner alone.
    limit : int
        Bytes that the files may take together. A process looks what the others have written after each 32nd of it, and leaves a 16th free
        for that, so that more than two processes which write at once may exceed it by a 32nd each.
    """

    folder: str
    limit: int

    def reads_of(self, *identity: str | bytes) -> KeptReads:
        """The entries of one source whose files never change; `identity` must be another where any byte of them may be another."""
        found = hashlib.sha256()
        for each in identity:
            data = each.encode("utf-8", "surrogatepass") if isinstance(each, str) else each
            found.update(len(data).to_bytes(8, "little") + data)
        return KeptReads(self, found.digest())

    def size(self) -> ReadCacheSize:
        """What there is now, of any process."""
        found = list(self._scan())
        return ReadCacheSize(len(found), sum(entry.nbytes for entry in found))

    def clear(self) -> ReadCacheSize:
        """Remove every entry; returns what was removed. Files that are no entries stay."""
        gone = [entry for entry in self._scan(drafts=0.0) if _remove(entry.path)]
        self._account.forget()
        return ReadCacheSize(len(gone), sum(entry.nbytes for entry in gone))

    def path_of(self, key: bytes) -> str:
        """Where the entry of a key lies, whether or not there is one."""
        name = key.hex()
        return f"{self.folder}/{name[:2]}/{name[2:]}"

    @property
    def _account(self) -> _Account:
        return _account_of(os.getpid(), self.folder)

    def _scan(self, drafts: float | None = None) -> Iterator[_Found]:
        """Every entry; drafts of at least that age in seconds are removed."""
        now = time.time()
        oldest = _DRAFT_SECONDS if drafts is None else drafts
        for folder in _listed(self.folder):
            if not _FOLDER.fullmatch(folder.name) or folder.is_symlink():
                continue
            for file in _listed(folder.path):
                is_draft = _DRAFT.fullmatch(file.name) is not None
                if not is_draft and not _ENTRY.fullmatch(file.name):
                    continue
                try:
                    status = file.stat(follow_symlinks=False)
                except OSError:
                    continue
                if is_draft and now - status.st_mtime >= oldest:
                    _remove(file.path)
                    continue
                # A time in the future is that of another machine's clock, or of this one before it was set back.
                yield _Found(min(status.st_mtime, now), -(-status.st_size // _BLOCK) * _BLOCK, file.path)

    def make_room(self, nbytes: int) -> bool:
        """Whether an entry of so many bytes may be written now; removes the least recently used ones for it."""
        account, limit = self._account, self.limit - self.limit // 16
        nbytes = -(-nbytes // _BLOCK) * _BLOCK
        if nbytes > limit or time.monotonic() < account.paused_until:
            return False
        with account.lock:
            if account.written is None or account.written > self.limit // 32 or account.known + account.written + nbytes > limit:
                self._evict(limit - nbytes, min(limit - nbytes, limit - limit // 8))
                if account.known > limit - nbytes:
                    return False
            account.written = (account.written or 0) + nbytes
        return True

    def _evict(self, most: int, down_to: int) -> None:
        """Look what there is, and where it is more than `most`, remove the least recently used until it is `down_to`. Holds the lock."""
        found = list(self._scan())
        total = sum(entry.nbytes for entry in found)
        if total > most:
            for entry in sorted(found):
                if total <= down_to:
                    break
                if _remove(entry.path):
                    total -= entry.nbytes
        self._account.known, self._account.written = total, 0

    def failed(self, error: OSError) -> None:
        """Note that an entry could not be written: log it once for each reason, and write nothing for a while."""
        account = self._account
        with account.lock:
            account.paused_until = time.monotonic() + _PAUSE_SECONDS
            is_new = error.errno not in account.logged
            account.logged.add(error.errno)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):  # leave the medium some space: others write there too
                left = self.size().nbytes * 3 // 4
                self._evict(left, left)
        if is_new:
            reason = error.strerror or type(error).__name__
            _LOGGER.warning("the read cache in %s cannot be written (%s): reading goes on without keeping more", self.folder, reason)


class _Account:
    """What a process knows of a cache's size."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.logged: set[int | None] = set()
        self.paused_until = 0.0
        self.forget()

    def forget(self) -> None:
        """Look again before the next write."""
        self.known = 0
        self.written: int | None = None


@functools.cache
def _account_of(pid: int, folder: str) -> _Account:  # noqa: ARG001 — a lock that another thread holds at a fork is held in the child for ever
    return _Account()


@dataclass(frozen=True, slots=True)
class KeptReads:
    """What is kept of the files of one source, by name of the file and range. Picklable, and usable from many threads.

    Parameters
    ----------
    cache : ReadCache
    scope : bytes
        What tells the source from all others, and from itself with other content.
    """

    cache: ReadCache
    scope: bytes

    def _key(self, file: str, start: int, stop: int) -> bytes:
        return hashlib.sha256(self.scope + f"{start}:{stop}:{file}".encode()).digest()

    def holds(self, file: str, start: int, stop: int) -> bool:
        """Whether there is an entry of the right length, whatever is in it."""
        try:
            return os.stat(self.cache.path_of(self._key(file, start, stop))).st_size == _HEADER.size + stop - start
        except OSError:
            return False

    def read(self, file: str, start: int, stop: int, views: Sequence[memoryview], *, skip: int = 0) -> bool:
        """Fill memory with an entry; False where there is none, or it is not one of this range: the memory then holds anything.

        The bytes are those that the file holds, right or wrong: compare them with a checksum, and call `distrust` where they are wrong.

        Parameters
        ----------
        file : str
        start, stop : int
            Range of the file, of at least one byte.
        views : sequence of memoryview
            The memory to fill, one after the other; together as long as the range, or shorter.
        skip : int
            Bytes of the range that are left out before the first that is wanted.
        """
        key = self._key(file, start, stop)
        try:
            descriptor = os.open(self.cache.path_of(key), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            status, head, expected = os.fstat(descriptor), bytearray(_HEADER.size), sum(map(len, views))
            if status.st_size != len(head) + stop - start:
                return False
            if skip:
                if read_at(descriptor, [memoryview(head)], 0) + read_at(descriptor, [*views], len(head) + skip) != len(head) + expected:
                    return False
            elif read_at(descriptor, [memoryview(head), *views], 0) != len(head) + expected:
                return False
            if head != _HEADER.pack(_MAGIC, key, stop - start):
                return False
            if abs(time.time() - status.st_mtime) > _USED_SECONDS:
                with suppress(OSError):  # in a folder that is read-only, or of another user's
                    os.utime(descriptor)
            return True
        except OSError:  # the medium fails, or another machine has removed the file
            return False
        finally:
            os.close(descriptor)

    def read_bytes(self, file: str, start: int, stop: int) -> bytes | None:
        """An entry in memory of its own; None where there is none. As with `read`, compare it with a checksum."""
        if not self.holds(file, start, stop):
            return None
        data = bytearray(stop - start)
        return bytes(data) if self.read(file, start, stop, [memoryview(data)]) else None

    def keep(self, file: str, start: int, stop: int, data: Sequence[Buffer]) -> None:
        """Keep a range that was checked, given in one or several pieces, if there is room. Never raises for what the folder is or lacks."""
        if not self.cache.make_room(_HEADER.size + stop - start):
            return
        key = self._key(file, start, stop)
        path = self.cache.path_of(key)
        draft = f"{path[: -len(path.rpartition('/')[2])]}.{secrets.token_hex(8)}"
        try:
            _write(draft, (_HEADER.pack(_MAGIC, key, stop - start), *data), self.cache.folder)
            os.replace(draft, path)
        except OSError as error:
            _remove(draft)
            self.cache.failed(error)
        except BaseException:
            _remove(draft)
            raise

    def distrust(self, file: str, start: int, stop: int) -> None:
        """Remove an entry that was found to hold something else."""
        path = self.cache.path_of(self._key(file, start, stop))
        _LOGGER.info("%s of the read cache holds something else than was kept there: it is read anew", path)
        _remove(path)


def _write(path: str, pieces: Sequence[Buffer], root: str) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        os.makedirs(root, 0o700, exist_ok=True)
        tag = f"{root}/{_TAG}"
        if not os.path.exists(tag):
            with open(tag, "wb") as file:
                file.write(_TAGGED)
        with suppress(FileExistsError):
            os.mkdir(path.rpartition("/")[0], 0o700)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        for piece in pieces:
            left = memoryview(piece).cast("B")
            while left:
                left = left[os.write(descriptor, left) :]
    finally:
        os.close(descriptor)  # a full network file system may say so only now


def _listed(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []


def _remove(path: str) -> bool:
    """Whether a file is gone, removed by whomever."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
