"""What a streamed run has computed so far, in files that outlive the process: a folder for each window of prompts.

A pass over one block writes the rows that go on to the next block, and what is kept of its own. Its index is written last, and renamed: a
pass without one was never made. Checksums in the index tell whether all of it arrived. Who finds a folder takes it only if nobody else
holds its lock, and it is this user's. Never a model or a store.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch

from lmprobe_zarr.errors import NoSpaceError
from lmprobe_zarr.extraction.models.checkpoint import raw_bytes

__all__ = ["PassValues", "Scratch", "ScratchPlace", "WindowPlan"]

FORMAT: Final = 1
FOLDER: Final = ".lmprobe-zarr-streamed"
MANIFEST: Final = "window.json"
LOCK: Final = "lock"
# A folder that nobody has gone on with for so long is removed by the next streamed run beside the same store.
FORGOTTEN_SECONDS: Final = 7 * 24 * 3600
READ_BYTES: Final = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class ScratchPlace:
    """Where streamed runs keep their files.

    Parameters
    ----------
    folder : str
    nbytes : int
        What they may take there at most.
    key : mapping
        What tells the runs of one store and model from others: values of JSON.
    committed : callable
        Called when all values of a window have been taken; returns once they are in the store for good.
    """

    folder: str
    nbytes: int
    key: Mapping[str, Any]
    committed: Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowPlan:
    """The prompts of one folder, in the order in which they are run.

    Parameters
    ----------
    digests : list of str
    lengths : list of int
        Tokens of each.
    content : list of str
        A digest of what is run of each: token ids, and which of them are pooled.
    first : int
        The first block that is computed; rows of the one before it come from a store.
    windows : list of list of list of int
        By window and batch, the places of prompts in `digests`.
    """

    digests: list[str]
    lengths: list[int]
    content: list[str]
    first: int
    windows: list[list[list[int]]]

    @property
    def batches(self) -> list[list[int]]:
        """All batches, one window after the other."""
        return [batch for window in self.windows for batch in window]


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor in a file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @staticmethod
    def of(values: Sequence[Any]) -> _Entry:
        dtype, shape, offset = values
        return _Entry(str(dtype), tuple(shape), int(offset))


@dataclass(slots=True)
class PassValues:
    """What a pass keeps of one batch: where each variable per token and per prompt lies, and what reads it."""

    path: Path
    tokens: dict[str, _Entry]
    prompts: dict[str, _Entry]

    def read(self, level: str, name: str) -> torch.Tensor:
        """The values of a variable of `level` ``tokens`` or ``prompts``."""
        return _read(self.path, (self.tokens if level == "tokens" else self.prompts)[name])


@dataclass(slots=True)
class Scratch:
    """One window's folder, whose lock this process holds.

    Parameters
    ----------
    folder : Path
    plan : WindowPlan
    """

    folder: Path
    plan: WindowPlan
    _lock: int
    _passes: list[list[dict[str, Any]]] = field(default_factory=list)

    @property
    def passes(self) -> int:
        """How many passes are complete."""
        return len(self._passes)

    def rows(self, number: int, batch: int) -> torch.Tensor:
        """The rows that a pass handed on of a batch: (token, hidden)."""
        return _read(self.folder / _rows(number), _Entry.of(self._passes[number][batch]["rows"]))

    def kept(self, number: int, batch: int) -> PassValues:
        """What a pass keeps of a batch."""
        entry = self._passes[number][batch]
        levels = ({name: _Entry.of(values) for name, values in entry[level].items()} for level in ("tokens", "prompts"))
        return PassValues(self.folder / _kept(number), *levels)

    @contextmanager
    def writing(self) -> Iterator[_Writer]:
        """Write the next pass; it counts once the context is left without an error.

        Raises
        ------
        NoSpaceError
            The files cannot be written. Passes before this one stay.
        """
        number = len(self._passes)
        try:
            with (self.folder / _rows(number)).open("wb") as rows, (self.folder / _kept(number)).open("wb") as kept:
                writer = _Writer(_File(rows), _File(kept))
                yield writer
            index = {"rows": writer.rows.described, "kept": writer.kept.described, "batches": writer.batches}
            _write_document(self.folder / _index(number), index)
        except OSError as error:
            for name in (_rows(number), _kept(number)):
                with suppress(OSError):
                    (self.folder / name).unlink()
            raise _no_space(self.folder, error) from error
        self._passes.append(writer.batches)
        if number:
            (self.folder / _rows(number - 1)).unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove the folder."""
        _remove(self.folder, self._lock)
        self._lock = -1

    def release(self) -> None:
        """Leave the folder to whoever goes on with it."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    # ---------------------------------------------------------------------------------------------- making and finding

    @staticmethod
    def create(place: ScratchPlace, key: str, plan: WindowPlan) -> Scratch:
        """A new folder.

        Raises
        ------
        NoSpaceError
            It cannot be written.
        """
        root = Path(place.folder) / FOLDER
        try:
            root.mkdir(mode=0o700, exist_ok=True)
            # Named after its key once it is locked and described: before that nobody takes it.
            begun = Path(tempfile.mkdtemp(prefix="new-", dir=root))
            lock = os.open(begun / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            _try_lock(lock)
            _write_document(begun / MANIFEST, {"format": FORMAT, "key": key, **asdict(plan)})
            folder = begun.rename(root / begun.name.replace("new-", f"{key}-", 1))
        except OSError as error:
            raise _no_space(root, error) from error
        return Scratch(folder, plan, lock)

    @staticmethod
    def find(place: ScratchPlace, key: str) -> Iterator[Scratch]:
        """Folders of the same key that earlier processes left, each with its lock held; the caller discards or releases each.

        What is damaged, and what nobody has gone on with for a week, is removed.
        """
        root = Path(place.folder) / FOLDER
        folders = sorted(root.iterdir()) if root.is_dir() and _is_own(root) else []
        for folder in folders:
            own = folder.name.startswith(f"{key}-")
            lock = _locked(folder) if own or _is_forgotten(folder) else None
            if lock is None:
                continue
            found = _opened(folder, key, lock) if own else None
            if found is None:
                _remove(folder, lock)
            else:
                yield found


def _remove(folder: Path, lock: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if lock >= 0:
        os.close(lock)
    with suppress(OSError):
        folder.parent.rmdir()  # only if nothing else is in it


class _File:
    """A file that is written, with the checksum of what was."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._size, self._sum = file, 0, 0

    def add(self, tensor: torch.Tensor) -> list[Any]:
        """Write a tensor; returns its entry for the index."""
        held = tensor.detach().cpu().contiguous()
        memory, offset = raw_bytes(held), self._size
        self._file.write(memory)
        self._size, self._sum = offset + len(memory), zlib.crc32(memory, self._sum)
        return [str(held.dtype).removeprefix("torch."), list(held.shape), offset]

    @property
    def described(self) -> list[int]:
        return [self._size, self._sum]


class _Writer:
    """Writes one pass, batch by batch."""

    def __init__(self, rows: _File, kept: _File) -> None:
        self.rows, self.kept, self.batches = rows, kept, list[dict[str, Any]]()

    def add(self, rows: torch.Tensor | None, tokens: Mapping[str, torch.Tensor], prompts: Mapping[str, torch.Tensor]) -> None:
        """Add a batch: the rows that go on to the next pass, and what is kept per token and per prompt, by variable."""
        self.batches.append(
            {
                "rows": None if rows is None else self.rows.add(rows),
                "tokens": {name: self.kept.add(values) for name, values in tokens.items()},
                "prompts": {name: self.kept.add(values) for name, values in prompts.items()},
            }
        )


def _rows(number: int) -> str:
    return f"rows-{number:04}"


def _kept(number: int) -> str:
    return f"kept-{number:04}"


def _index(number: int) -> str:
    return f"pass-{number:04}.json"


def _no_space(folder: Path, error: OSError) -> NoSpaceError:
    return NoSpaceError(
        f"what a streamed run computes cannot be written to {str(folder)!r} ({error.strerror or error}): free some space there; the next "
        "call goes on from the blocks that are through, and the store holds what was committed before"
    )


def _write_document(path: Path, document: Mapping[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(document), encoding="utf-8")
    partial.replace(path)


def _read_document(path: Path) -> dict[str, Any] | None:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) else None


def _read(path: Path, entry: _Entry) -> torch.Tensor:
    found = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
    memory = raw_bytes(found)
    with path.open("rb", buffering=0) as file:
        file.seek(entry.offset)
        done = 0
        while done < len(memory):
            count = file.readinto(memory[done:])
            if not count:
                raise OSError(f"{str(path)!r} is shorter than it was when it was written")
            done += count
    return found


def _is_own(folder: Path) -> bool:
    """Whether a folder is this user's, so that nobody else has put anything into it."""
    return not hasattr(os, "getuid") or folder.stat().st_uid == os.getuid()


def _is_forgotten(folder: Path) -> bool:
    with suppress(OSError):
        return max(path.stat().st_mtime for path in (folder, *folder.iterdir())) < time.time() - FORGOTTEN_SECONDS
    return False


def _locked(folder: Path) -> int | None:
    """The descriptor of a folder's lock; None where another process holds it, or it cannot be told whether one does."""
    try:
        lock = os.open(folder / LOCK, os.O_RDWR)
    except OSError:
        return None
    if _try_lock(lock):
        return lock
    os.close(lock)
    return None


def _try_lock(lock: int) -> bool:
    try:
        import fcntl
    except ImportError:
        return False  # on Windows no folder is gone on with
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _opened(folder: Path, key: str, lock: int) -> Scratch | None:
    """A folder with the passes that are whole; None where it holds none that can be used."""
    document = _read_document(folder / MANIFEST)
    if document is None or document.get("format") != FORMAT or document.get("key") != key:
        return None
    plan = WindowPlan(**{each.name: document[each.name] for each in fields(WindowPlan)})
    found = Scratch(folder, plan, lock)
    indexes: list[dict[str, Any]] = []
    while (index := _read_document(folder / _index(len(indexes)))) is not None:
        indexes.append(index)
    for number, index in enumerate(indexes):
        rows = number < len(indexes) - 1 or _is_whole(folder / _rows(number), index["rows"])
        if not rows or not _is_whole(folder / _kept(number), index["kept"]):
            return None
    found._passes.extend(index["batches"] for index in indexes)
    return found


def _is_whole(path: Path, described: Sequence[int]) -> bool:
    size, checksum = 0, 0
    try:
        with path.open("rb") as file:
            while block := file.read(READ_BYTES):
                size, checksum = size + len(block), zlib.crc32(block, checksum)
    except OSError:
        return False
    return [size, checksum] == list(described)
