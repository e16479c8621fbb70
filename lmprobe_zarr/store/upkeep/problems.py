"""What a verification found, as records that print well: damaged files, and values that are not finite or blank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lmprobe_zarr.display import count_of, format_bytes, shortened

__all__ = ["OddValues", "Problem", "ProblemKind", "VerifySummary"]


ProblemKind = Literal["missing", "size", "content", "document", "version", "unreadable"]


def describe_odd(not_finite: int, blank: int) -> str:
    """Values that are not finite and rows of zeros, counted."""
    values = f"{count_of(not_finite, 'value')} {'is' if not_finite == 1 else 'are'} not finite"
    return f"{values}, {count_of(blank, 'row')} {'is' if blank == 1 else 'are'} all zeros"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One file that is not what was committed.

    Parameters
    ----------
    url : str
        The store's root.
    part : str
        Key of the part's folder below it; that of the group for a group's own document, empty for that of the root.
    variable : str
        The array that the file belongs to, as ``"tokens/resid"``; empty where it belongs to none.
    file : str
        Key of the file below the root.
    kind : {"missing", "size", "content", "document", "version", "unreadable"}
        ``content``: the length is right and the checksum is not. ``document``: a ``zarr.json`` that says something else than it should.
        ``version``: one of a format version that this release does not know. ``unreadable``: the file is there and the place refuses it.
    what : str
        The same in words.
    advice : str
        What to do.
    """

    url: str
    part: str
    variable: str
    file: str
    kind: ProblemKind
    what: str
    advice: str

    def __str__(self) -> str:
        return f"{self.url}/{self.file} {self.what}: {self.advice}"


@dataclass(frozen=True, slots=True, kw_only=True)
class OddValues:
    """Values of a variable that are stored as the model gave them, and that nothing can be learnt from.

    Parameters
    ----------
    part, variable : str
        As in `Problem`.
    not_finite : int
        Values that are infinite or no number.
    blank : int
        Rows (what one prompt or token has in one layer) that hold nothing but zeros.
    """

    part: str
    variable: str
    not_finite: int
    blank: int

    def __str__(self) -> str:
        return f"{self.variable} of {self.part}: {describe_odd(self.not_finite, self.blank)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifySummary:
    """What a verification found; true where nothing is wrong. Prints well.

    Parameters
    ----------
    url : str
        The store.
    full : bool
        Whether every file was read and its checksum compared, or only documents and sizes.
    groups, parts, annotations : int
        What was looked at, replaced parts too.
    files, nbytes : int
        Files of these, and their bytes by the commits' own tables.
    problems : tuple of Problem
        Everything that is wrong.
    odd : tuple of OddValues
        Values that are not finite, and blank rows, in visible parts. They were written so: this is no damage, but worth knowing.
    uncounted : int
        Parts without such counts: they were written before these were counted, and are not read now.
    unfinished : int
        Folders like a part's without a commit: being written, or left by a writer that was killed; or their commit itself was lost.
    seconds : float
        From call to return.
    """

    url: str
    full: bool
    groups: int
    parts: int
    annotations: int
    files: int
    nbytes: int
    problems: tuple[Problem, ...]
    odd: tuple[OddValues, ...]
    uncounted: int
    unfinished: int
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def __bool__(self) -> bool:
        return self.ok

    @property
    def not_finite(self) -> int:
        """Values that are infinite or no number, in all."""
        return sum(odd.not_finite for odd in self.odd)

    @property
    def blank(self) -> int:
        """Rows that hold nothing but zeros, in all."""
        return sum(odd.blank for odd in self.odd)

    def __str__(self) -> str:
        how = "every checksum" if self.full else "documents and sizes only"
        lines = [
            f"store     {self.url}",
            f"checked   {how}: {count_of(self.parts, 'part')} and {count_of(self.annotations, 'annotation')} in "
            f"{count_of(self.groups, 'group')}, {count_of(self.files, 'file')}, "
            f"{format_bytes(self.nbytes)}, in {self.seconds:.1f} s",
            f"problems  {len(self.problems) or 'none'}",
            *shortened(self.problems),
        ]
        if self.odd:
            lines += [
                f"values    {describe_odd(self.not_finite, self.blank)}; they were written so",
                *shortened(self.odd),
            ]
        if self.uncounted:
            are = "is" if self.uncounted == 1 else "are"
            read = "was" if self.uncounted == 1 else "were"
            lines.append(f"          {count_of(self.uncounted, 'part')} {are} older than the counting of such values, and {read} not read")
        if self.unfinished:
            lines.append(f"unfinished {count_of(self.unfinished, 'folder')} without a commit: being written, or garbage for gc()")
        return "\n".join(lines)
