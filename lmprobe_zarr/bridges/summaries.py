"""What an import, an export, a verification or a repair would do or did, as values that print well. Never a file or a store."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lmprobe_zarr.display import format_bytes

__all__ = ["ExportSummary", "ImportSummary", "Reason", "Tally"]

SHOWN_NAMES = 3


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
