"""Ranges of a file: neighbours joined into runs, runs cut into ranges again, and what an answer to a request for a run holds.

Reads nothing. A run is what one call of the system, or one request, fetches.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.storage.client_errors import CutShortError
from lmprobe_zarr.typing import Buffer

__all__ = ["LOCAL_GAP", "REMOTE_GAP", "Answer", "Run", "answered", "cut", "joined"]

# Ranges that are no further apart are read together. Measured: of a file in the system's cache, a gap of 16 KiB costs about as much as
# another call, and of one that is not, joining gains up to 32 KiB. A request costs more than the transfer of 256 KiB.
LOCAL_GAP: Final = 2**14
REMOTE_GAP: Final = 2**18
_JOINED_BYTES: Final = 2**26  # a run does not grow beyond that by joining, so that several are read in parallel
_CONTENT_RANGE: Final = re.compile(r"\s*bytes\s+(\d+)-(\d+)/(\d+|\*)\s*")


class Run(NamedTuple):
    """Bytes `start` to `stop` of a file, at least one."""

    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """How many."""
        return self.stop - self.start

    @property
    def header(self) -> str:
        """As the header of a request names it."""
        return f"bytes={self.start}-{self.stop - 1}"


class Answer(NamedTuple):
    """Bytes of a file from byte `start` on; `is_whole` where a server has sent all of it instead of the run that was requested."""

    start: int
    data: Buffer
    is_whole: bool = False


def joined(ranges: Iterable[tuple[int, int]], gap: int) -> list[Run]:
    """The runs to read for ranges, in the order of the file and apart from each other; none for ranges without a byte.

    Raises
    ------
    InvalidArgumentError
        A range begins before the file, or ends before it begins.
    """
    wanted = []
    for given in ranges:
        start, stop = int(given[0]), int(given[1])
        if not 0 <= start <= stop:
            raise InvalidArgumentError(f"({start}, {stop}) is no range of a file: give a start of at least 0, and a stop not below it")
        if start < stop:
            wanted.append((start, stop))
    wanted.sort()
    runs: list[Run] = []
    for start, stop in wanted:
        last = runs[-1] if runs else None
        if last is not None and (start < last.stop or (start - last.stop <= gap and stop - last.start <= _JOINED_BYTES)):
            runs[-1] = Run(last.start, max(last.stop, stop))
        else:
            runs.append(Run(start, stop))
    return runs


def cut(ranges: Iterable[tuple[int, int]], runs: Sequence[Run], answers: Mapping[Run, Answer]) -> list[Buffer]:
    """The bytes of each range, from the answers to the runs of `joined`; fewer where the file ends earlier."""
    starts = [run.start for run in runs]
    views = [(answers[run].start, memoryview(answers[run].data)) for run in runs]
    found: list[Buffer] = []
    for start, stop in ranges:
        if start == stop:
            found.append(b"")
            continue
        offset, view = views[bisect_right(starts, start) - 1]
        found.append(view[int(start) - offset : int(stop) - offset])
    return found


def answered(run: Run, data: bytes, *, is_partial: bool, content_range: str | None) -> Answer | None:
    """What a server's answer to the request for a run holds; None where it is bytes from behind the beginning of the run.

    Parameters
    ----------
    run : Run
        What was requested.
    data : bytes
        The answer's body.
    is_partial : bool
        Whether its status says that it is a part of the file (206).
    content_range : str, optional
        Its header of that name.

    Raises
    ------
    CutShortError
        The body is shorter than its header says, or than the rest of the file.
    """
    if not is_partial:
        return Answer(0, data, is_whole=True)
    found = _CONTENT_RANGE.fullmatch(content_range or "")
    if found is None:
        return Answer(0, data, is_whole=True) if len(data) > run.nbytes else Answer(run.start, data)
    first, last = int(found[1]), int(found[2])
    wanted = run.stop if found[3] == "*" else min(run.stop, int(found[3]))
    if len(data) < last + 1 - first or (found[3] != "*" and first + len(data) < wanted):
        raise CutShortError(f"{len(data)} bytes came of {content_range}, and bytes {run.start} to {run.stop} were requested")
    return Answer(first, data) if first <= run.start else None
