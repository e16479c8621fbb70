"""What an import or an export did, or would do, as records that print well. Never a file or a store."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lmprobe_zarr.display import count_of, format_bytes

__all__ = ["ExportSummary", "ImportSummary", "Reason", "Tally"]

SHOWN_NAMES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """Why some prompts, files or variables were skipped, left out or noted.

    Parameters
    ----------
    text : str
        The reason.
    count : int
        How many it applies to.
    names : tuple of str
        The first few of them.
    detail : str
        More about the first.
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
        """Count a reason once more, for the thing of that name."""
        count, names, first = self._found.get(text, (0, [], detail))
        if len(names) < SHOWN_NAMES:
            names.append(name)
        self._found[text] = (count + 1, names, first)

    def reasons(self) -> tuple[Reason, ...]:
        """The reasons, the most frequent first."""
        found = [Reason(text=t, count=c, names=tuple(names), detail=d) for t, (c, names, d) in self._found.items()]
        return tuple(sorted(found, key=lambda reason: -reason.count))

    def __len__(self) -> int:
        """How many things were counted, over all reasons."""
        return sum(count for count, _, _ in self._found.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportSummary:
    """What an import brought into a store, and what it skipped and why. Prints as a table.

    Parameters
    ----------
    source, url : str
        The place that was read, and the store.
    models, groups : tuple of str
        Names of the models, and the group that each was put into.
    found : int
        Requested prompts that the source holds.
    stored : int
        How many of these the store already held with all that the source holds of them.
    imported : int
        How many were imported; with `dry_run`, how many would be.
    tokens, nbytes : int
        Their token rows, and their bytes of activations before compression.
    parts : int
        Parts committed.
    skipped : tuple of Reason
        What was not imported at all.
    notes : tuple of Reason
        What was left out of the imported prompts, or is worth knowing about them.
    dry_run : bool
        Whether nothing was written.
    seconds : float
        Duration of the call.
    unknown : tuple of str
        Fields of the provenance that the groups do not record.
    as_model : str
        What the activations are taken for on the caller's word, where a model was named.
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
    unknown: tuple[str, ...] = ()
    as_model: str = ""

    def __str__(self) -> str:
        verb = "to import" if self.dry_run else "imported"
        rows = {
            "from": self.source,
            "store": self.url,
            "models": ", ".join(self.models) or "none",
            "prompts": f"{self.found} found, {self.stored} stored already, {self.imported} {verb}",
            "size": f"{count_of(self.tokens, 'token')}, {format_bytes(self.nbytes)} before compression",
        }
        if self.as_model:
            rows["as"] = f"{self.as_model}, on your word"
        if self.unknown:
            serves = "extract and Probe use it with group= or provenance='any', or after an import with as_model="
            rows["unknown"] = f"{', '.join(self.unknown)}: {serves}"
        return _table(rows, self.skipped, self.notes)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSummary:
    """What an export wrote as lmprobe's files, and what it left out and why. Prints as a table.

    Parameters
    ----------
    url, target : str
        The store, and the cache that was written to.
    model, group : str
        The model, and its group in the store.
    prompts : int
        Requested prompts.
    exported : int
        How many of these got at least one file.
    present : int
        How many of these had all of their files already, which were left as they are.
    files, nbytes : int
        Files written, and their bytes.
    skipped, notes : tuple of Reason
        What was not written, and what is worth knowing.
    seconds : float
        Duration of the call.
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
            "prompts": f"{self.prompts} requested, {self.exported} exported, {self.present} present already",
            "size": f"{count_of(self.files, 'file')}, {format_bytes(self.nbytes)}",
        }
        return _table(rows, self.skipped, self.notes)


def _table(rows: dict[str, str], skipped: Iterable[Reason], notes: Iterable[Reason]) -> str:
    lines = [f"{name:<10}{value}" for name, value in rows.items()]
    for title, reasons in (("skipped", skipped), ("notes", notes)):
        lines += [f"{title if i == 0 else '':<10}{reason}" for i, reason in enumerate(reasons)]
    return "\n".join(lines)
