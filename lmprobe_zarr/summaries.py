"""What an import, an export, a verification or a repair would do or did, as values that print well. Never a file or a store."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from lmprobe_zarr.layers import describe_layers
from lmprobe_zarr.plan import format_bytes
from lmprobe_zarr.pooling import POOLINGS
from lmprobe_zarr.sites import SCALARS, SITES, is_top_k

__all__ = [
    "ExportSummary",
    "ImportSummary",
    "LostColumn",
    "LostValues",
    "OddValues",
    "Problem",
    "ProblemKind",
    "Reason",
    "RepairSummary",
    "Tally",
    "VerifySummary",
]

SHOWN_NAMES = 3
SHOWN_LINES = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """Why some things were skipped, left out or noted.

    Parameters
    ----------
    text : str
        What they have in common.
    count : int
        How many.
    names : tuple of str
        The first few.
    detail : str
        More of the first one.
    """

    text: str
    count: int
    names: tuple[str, ...]
    detail: str = ""

    def __str__(self) -> str:
        more = ", …" if self.count > len(self.names) else ""
        detail = f"\n    {self.detail}" if self.detail else ""
        return f"{self.count} × {self.text}: {', '.join(self.names)}{more}{detail}"


class Tally:
    """Counts reasons while something runs."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, list[str], str]] = {}

    def add(self, text: str, name: str, detail: str = "") -> None:
        """One more thing with this reason."""
        count, names, first = self._found.get(text, (0, [], detail))
        if len(names) < SHOWN_NAMES:
            names.append(name)
        self._found[text] = (count + 1, names, first)

    def reasons(self) -> tuple[Reason, ...]:
        """What was counted, the most frequent first."""
        found = [Reason(text=t, count=c, names=tuple(names), detail=d) for t, (c, names, d) in self._found.items()]
        return tuple(sorted(found, key=lambda reason: -reason.count))

    def __len__(self) -> int:
        """Things counted."""
        return sum(count for count, _, _ in self._found.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportSummary:
    """What came over into a store, and what did not and why. Printing it shows it as a table.

    Parameters
    ----------
    source, url : str
        Where from, and the store.
    models, groups : tuple of str
        Names of the models, and the group that each was put into.
    found : int
        Prompts that the source holds, of those asked for.
    stored : int
        Of these, how many were in the store already with all that the source holds of them.
    imported : int
        How many came over, or, where nothing was to be written, would.
    tokens, nbytes : int
        Their token rows, and bytes of activations before compression.
    parts : int
        Parts committed.
    skipped : tuple of Reason
        What did not come over at all.
    notes : tuple of Reason
        What of the others was left out, or is worth knowing.
    dry_run : bool
        Whether this is only the plan, and nothing was written.
    seconds : float
        From call to return.
    """

    source: str
    url: str
    models: tuple[str, ...]
    groups: tuple[str, ...]
    found: int
    stored: int
    imported: int
    tokens: int
    nbytes: int
    parts: int
    skipped: tuple[Reason, ...]
    notes: tuple[Reason, ...]
    dry_run: bool
    seconds: float

    def __str__(self) -> str:
        verb = "to import" if self.dry_run else "imported"
        rows = {
            "from": self.source,
            "store": self.url,
            "models": ", ".join(self.models) or "none",
            "prompts": f"{self.found} found, {self.stored} stored already, {self.imported} {verb}",
            "size": f"{self.tokens} tokens, {format_bytes(self.nbytes)} before compression",
        }
        return _table(rows, self.skipped, self.notes)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSummary:
    """What was written as lmprobe's files, and what was not and why. Printing it shows it as a table.

    Parameters
    ----------
    url, target : str
        The store, and where to.
    model, group : str
        Whose activations, and the group that they came from.
    prompts : int
        Prompts asked for.
    exported : int
        Of these, how many got at least one file.
    present : int
        Of these, how many had all of their files already, which stay as they are.
    files, nbytes : int
        Files written, and their bytes.
    skipped, notes : tuple of Reason
        What was not written, and what is worth knowing.
    seconds : float
        From call to return.
    """

    url: str
    target: str
    model: str
    group: str
    prompts: int
    exported: int
    present: int
    files: int
    nbytes: int
    skipped: tuple[Reason, ...]
    notes: tuple[Reason, ...]
    seconds: float

    def __str__(self) -> str:
        rows = {
            "store": self.url,
            "to": self.target,
            "model": self.model,
            "prompts": f"{self.prompts} asked for, {self.exported} exported, {self.present} there already",
            "size": f"{self.files} files, {format_bytes(self.nbytes)}",
        }
        return _table(rows, self.skipped, self.notes)


def _table(rows: dict[str, str], skipped: Iterable[Reason], notes: Iterable[Reason]) -> str:
    lines = [f"{name:<10}{value}" for name, value in rows.items()]
    for title, reasons in (("skipped", skipped), ("notes", notes)):
        lines += [f"{title if i == 0 else '':<10}{reason}" for i, reason in enumerate(reasons)]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------- verification

ProblemKind = Literal["missing", "size", "content", "document", "version", "unreadable"]


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
    """What a part holds of a variable that is stored as it came, and is nothing to learn from.

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
        return f"{self.variable} of {self.part}: {self.not_finite} values are not finite, {self.blank} rows are all zeros"


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
        Values that are not finite and blank rows of what the store shows. They were written so: no damage, and worth knowing.
    uncounted : int
        Parts of which nobody knows that: written before it was counted, and not read now.
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
        return sum(one.not_finite for one in self.odd)

    @property
    def blank(self) -> int:
        """Rows that hold nothing but zeros, in all."""
        return sum(one.blank for one in self.odd)

    def __str__(self) -> str:
        how = "every checksum" if self.full else "documents and sizes only"
        lines = [
            f"store     {self.url}",
            f"checked   {how}: {self.parts} parts and {self.annotations} annotations in {self.groups} groups, {self.files} files, "
            f"{format_bytes(self.nbytes)}, in {self.seconds:.1f} s",
            f"problems  {len(self.problems) or 'none'}",
            *_shortened(self.problems),
        ]
        if self.odd:
            lines += [
                f"values    {self.not_finite} are not finite, {self.blank} rows are all zeros; they were written so",
                *_shortened(self.odd),
            ]
        if self.uncounted:
            lines.append(f"          {self.uncounted} parts are older than the counting of such values, and were not read")
        if self.unfinished:
            lines.append(f"unfinished {self.unfinished} folders without a commit: being written, or garbage for gc()")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class LostValues:
    """Prompts that lack the same values now, and how to get these back.

    Parameters
    ----------
    model, group : str
        Name of the model, and the group.
    variables : tuple of str
        What is lost, as in `Store.dataset` and `Store.tokens`.
    layers : tuple of int
        Of these layers; empty for variables without layers.
    hashes : tuple of str
        The prompts, by their labels of 16 digits.
    texts : tuple of str or None
        Their texts, where these are known.
    """

    model: str
    group: str
    variables: tuple[str, ...]
    layers: tuple[int, ...]
    hashes: tuple[str, ...]
    texts: tuple[str | None, ...]

    @property
    def prompts(self) -> list[str]:
        """The texts that are known: what to give to `extract`."""
        return [text for text in self.texts if text is not None]

    @property
    def arguments(self) -> dict[str, Any]:
        """What `extract` is told beside model and prompts: ``extract(model, lost.prompts, store=store, **lost.arguments)``."""
        found: dict[str, Any] = {"sites": [], "pooling": [], "keep_tokens": False}
        for name in self.variables:
            pooling = next((p for p in POOLINGS if name.endswith(f"_{p}") and name.removesuffix(f"_{p}") in SITES), None)
            if pooling is not None:
                found["sites"].append(name.removesuffix(f"_{pooling}"))
                found["pooling"].append(pooling)
            elif name in SITES:
                found["sites"].append(name)
                found["keep_tokens"] = True
            elif name in ("perplexity", *SCALARS):
                found["perplexity"] = True
            elif name == "router":
                found["router"] = True
            elif name.startswith("logits"):
                found["logits"] = "last_token" if name.startswith("logits_last_token") else "all"
                found["logits_top_k"] = found.get("logits_top_k") or (1 if is_top_k(name) else None)
        found |= {key: list(dict.fromkeys(found[key])) for key in ("sites", "pooling")}
        return found | ({"layers": list(self.layers)} if self.layers else {})

    def __str__(self) -> str:
        unknown = sum(text is None for text in self.texts)
        where = f", layers {describe_layers(self.layers)}" if self.layers else ""
        more = f" ({unknown} of them without a known text)" if unknown else ""
        return f"{', '.join(self.variables)}{where} of {len(self.hashes)} prompts of {self.model}{more}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LostColumn:
    """A column that a part held and that is lost.

    Parameters
    ----------
    part : str
        Key of the part's folder.
    column : str
        Its name.
    hashes : tuple of str
        The prompts that it was of.
    """

    part: str
    column: str
    hashes: tuple[str, ...]

    def __str__(self) -> str:
        return f"column {self.column!r} of {len(self.hashes)} prompts, of {self.part}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairSummary:
    """What a repair did, or would do, and what is to be extracted again. Prints well.

    Parameters
    ----------
    url : str
        The store.
    restored : tuple of str
        Keys of documents that were written again as they had been: nothing of them is lost.
    rewritten : tuple of str
        Keys of parts that were written again without what was broken.
    dropped : tuple of str
        Keys of parts that went altogether.
    lost : tuple of LostValues
        What nothing in the store holds any more: what to extract again.
    columns : tuple of LostColumn
        Columns that are lost.
    unknown : tuple of str
        Keys of dropped parts of which nobody can tell what they held. `extract` over all of your prompts finds out what is missing.
    left : tuple of Problem
        What a repair does not touch.
    dry_run : bool
        Whether this is only the plan.
    """

    url: str
    restored: tuple[str, ...] = ()
    rewritten: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    lost: tuple[LostValues, ...] = ()
    columns: tuple[LostColumn, ...] = ()
    unknown: tuple[str, ...] = ()
    left: tuple[Problem, ...] = ()
    dry_run: bool = False

    @property
    def changes(self) -> int:
        """Documents and parts that are concerned."""
        return len(self.restored) + len(self.rewritten) + len(self.dropped)

    def __str__(self) -> str:
        verb = "to be " if self.dry_run else ""
        lines = [
            f"{self.url}: {len(self.restored)} documents {verb}restored, {len(self.rewritten)} parts {verb}written again, "
            f"{len(self.dropped)} {verb}dropped"
        ]
        for title, rows in (
            ("extract again", self.lost), ("lost columns", self.columns), ("nobody knows what these held", self.unknown),
            ("left as they are", self.left),
        ):  # fmt: skip
            lines += [f"{title}:", *_shortened(rows)] if rows else []
        return "\n".join(lines)


def _shortened(rows: Iterable[object]) -> list[str]:
    lines = [f"          {row}" for row in rows]
    more = len(lines) - SHOWN_LINES
    return lines if more <= 0 else [*lines[:SHOWN_LINES], f"          … and {more} more"]
