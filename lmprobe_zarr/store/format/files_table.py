"""`FilesTable`, a part's table of files, which stays bytes until an entry is looked up. No I/O.

The table takes most of a part's document, and a view is opened without it. The first use parses it and checks every entry.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Final, TypeAlias

import numpy as np

from lmprobe_zarr.errors import CorruptPartError
from lmprobe_zarr.store.format.array import lengths_of
from lmprobe_zarr.store.format.names import reason_of
from lmprobe_zarr.typing import Ints

__all__ = ["FilesTable", "bytes_by_folder", "bytes_of_files", "check_table", "damaged_part"]

# A part's document decides which files are copied and removed. Only such keys are accepted: one with ".." would point outside the store.
_FILE_KEY: Final = re.compile(
    rb"(?:prompts|tokens)/(?:zarr\.json|[A-Za-z][A-Za-z0-9_]*/(?:zarr\.json|(?:chunk|block)_table|c(?:\.[0-9]+)+))"
)
# `_FILE_KEY` does not tell digits apart, so keys that differ in digits alone are matched once.
_DIGITS: Final = bytes.maketrans(b"123456789", b"000000000")
_Parsed: TypeAlias = tuple[dict[str, int], Ints]
# The shortest entry, with the comma or the brace that ends it.
_ENTRY_BYTES: Final = len('"tokens/a/c.0":[0,0],')
#: What a malformed document raises while it is parsed.
PARSE_ERRORS: Final = (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OverflowError)


class FilesTable(Mapping[str, tuple[int, int]]):
    """Length and crc32c of every file of a part, by key; see `PartInfo.files`. Immutable, picklable, usable from many threads.

    Looking entries up keeps the parsed table, without a Python object per entry but its key and its place.

    Parameters
    ----------
    data : bytes
        The table as JSON: one object, whose digest has been checked with its document's.
    where : str
        The part's folder, for messages.
    least : int
        How many entries there must be, as there are chunks of that number.

    Raises
    ------
    CorruptPartError
        By any use: the table is not one of a part. Nothing of it can be used then.
    """

    __slots__ = ("_held", "_least", "_nbytes", "_place", "_where")

    def __init__(self, data: bytes, where: str, *, least: int = 0) -> None:
        # One attribute, so that a thread finds either the bytes or the whole result. Two threads may both parse the bytes, with one result.
        self._held: bytes | _Parsed = data
        self._where, self._least = where, least
        self._place: tuple[str | None, str | None] = None, None
        self._nbytes: int | None = None

    def name_part(self, root: str, part: str) -> None:
        """Let errors name the part, by the URL of its root and its key below that."""
        self._place = root, part

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self._held, self._where, self._least, self._place)

    def __repr__(self) -> str:
        return f"FilesTable({self._where!r})"

    @property
    def at_most(self) -> int:
        """At least as many as there are entries, without parsing them."""
        held = self._held
        return len(held) // _ENTRY_BYTES if isinstance(held, bytes) else len(held[0])

    @property
    def _parsed(self) -> _Parsed:
        held = self._held
        if isinstance(held, bytes):
            keys, numbers = self._parse(held)
            held = self._held = dict(zip(keys, range(len(keys)), strict=True)), numbers
        return held

    def _parse(self, data: bytes) -> tuple[list[str], Ints]:
        try:
            keys, numbers = _checked(json.loads(data.decode("utf-8", "surrogatepass")))
            if len(keys) < self._least:
                raise ValueError(f"an array has {self._least} chunks, which are more than the {len(keys)} files")
        except PARSE_ERRORS as error:
            raised = damaged_part(self._where, error)
            raised.root, raised.part = self._place
            raise raised from error
        self._nbytes = _total(numbers[:, 0])
        return keys, numbers

    @property
    def nbytes(self) -> int:
        """Bytes of all files together. The table is checked, but not kept in its parsed form."""
        nbytes = self._nbytes
        if nbytes is None:
            held = self._held
            numbers = (self._parse(held) if isinstance(held, bytes) else held)[1]
            nbytes = self._nbytes = _total(numbers[:, 0])
        return nbytes

    def bytes_by_folder(self) -> dict[str, int]:
        """Bytes of the files of each folder, by its key: those of an array by ``"prompts/<name>"`` or ``"tokens/<name>"``."""
        held = self._held
        keys, numbers = self._parse(held) if isinstance(held, bytes) else held
        found: dict[str, int] = {}
        for key, length in zip(keys, numbers[:, 0].tolist(), strict=True):
            folder = key[: key.rindex("/")]
            found[folder] = found.get(folder, 0) + length
        return found

    def __getitem__(self, key: str) -> tuple[int, int]:
        places, numbers = self._parsed
        length, checksum = numbers[places[key]].tolist()
        return length, checksum

    def __contains__(self, key: object) -> bool:
        return key in self._parsed[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parsed[0])

    def __len__(self) -> int:
        return len(self._parsed[0])


def _restore(held: bytes | _Parsed, where: str, least: int, place: tuple[str | None, str | None]) -> FilesTable:
    table = FilesTable(b"", where, least=least)
    table._held, table._place = held, place
    return table


def _checked(document: object) -> tuple[list[str], Ints]:
    """Keys and numbers, shape (file, 2), of a parsed table; ValueError, TypeError or OverflowError where it is none.

    The work per entry is done by calls that run in C: a store may have tens of millions of them.
    """
    if not isinstance(document, dict):
        raise TypeError(f"its table of files is a {type(document).__name__}")
    keys, values = list(document), document.values()
    shapes = "\n".join(keys).encode("utf-8", "surrogatepass").translate(_DIGITS).split(b"\n") if keys else []
    if len(shapes) != len(keys) or not all(map(_FILE_KEY.fullmatch, set(shapes))):
        strange = next(key for key in keys if not _FILE_KEY.fullmatch(key.encode("utf-8", "surrogatepass")))
        raise ValueError(f"{strange[:80]!r} is no file of a part")
    if not (set(map(type, values)) <= {list} and set(map(len, values)) <= {2} and set(map(type, chain.from_iterable(values))) <= {int}):
        wrong = next(entry for entry in values if len(lengths_of(entry)) != 2)
        raise ValueError(f"its table of files has {wrong!r:.40} as length and checksum")
    numbers = np.fromiter(chain.from_iterable(values), np.int64, 2 * len(keys)).reshape(-1, 2)
    if ((numbers < 0) | (numbers >= 2**53)).any():
        raise ValueError("its table of files has lengths that cannot be")
    return keys, numbers


def _total(lengths: Ints) -> int:
    # Exact for any that `_checked` lets pass, of which a few thousand could exceed 64 bits.
    return (int((lengths >> 32).sum()) << 32) + int((lengths & 0xFFFFFFFF).sum())


def check_table(files: Mapping[str, Sequence[int]]) -> None:
    """Check a part's whole table, if that has not been done; raises `CorruptPartError`."""
    bytes_of_files(files)


def bytes_of_files(files: Mapping[str, Sequence[int]]) -> int:
    """Bytes of all files in a part's table."""
    return files.nbytes if isinstance(files, FilesTable) else sum(int(entry[0]) for entry in files.values())


def bytes_by_folder(files: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Bytes of the files of each folder of a part, by its key below the part: ``"prompts/<name>"``."""
    if isinstance(files, FilesTable):
        return files.bytes_by_folder()
    found: dict[str, int] = {}
    for key, entry in files.items():
        folder = key.rpartition("/")[0]
        found[folder] = found.get(folder, 0) + int(entry[0])
    return found


def damaged_part(where: str, error: Exception) -> CorruptPartError:
    """The error for a part whose document cannot be used."""
    return CorruptPartError(
        f"{where}/zarr.json is damaged ({reason_of(error)}): none of this part can be trusted\n"
        "delete that folder, and extract its prompts again"
    )
