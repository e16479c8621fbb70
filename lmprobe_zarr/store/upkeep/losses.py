"""What a repair did and what is lost, as records that print well: values to extract again, and columns."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lmprobe_zarr.batch import ALL, BUILT_IN_SITES, SCALARS, describe_layers, is_top_k, split_variable
from lmprobe_zarr.display import count_of, shortened
from lmprobe_zarr.store.upkeep.problems import Problem

__all__ = ["LostColumn", "LostValues", "RepairSummary"]


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
    noted : mapping of str to mapping
        What the arrays of a variable say of its site and of the tokens that it is pooled over.
    """

    model: str
    group: str
    variables: tuple[str, ...]
    layers: tuple[int, ...]
    hashes: tuple[str, ...]
    texts: tuple[str | None, ...]
    noted: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def prompts(self) -> list[str]:
        """The texts that are known: what to give to `extract`."""
        return [text for text in self.texts if text is not None]

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of `extract` beside model and prompts: ``extract(model, lost.prompts, store=store, **lost.arguments)``.

        Variables of which nobody knows what they are of, as those of a caller's own arrays, are not among them.
        """
        found: dict[str, Any] = {"keep_tokens": False}
        sites: dict[str, str] = {}
        poolings: dict[str, None] = {}
        over: dict[str, Any] = {}
        for name in self.variables:
            site, pooling, part = split_variable(name)
            noted = self.noted.get(name, {})
            path = noted.get("site_path") or (site if site in BUILT_IN_SITES else None)
            if name in ("perplexity", *SCALARS):
                found["perplexity"] = True
            elif name == "router":
                found["router"] = True
            elif name.startswith("logits"):
                found["logits"] = "last_token" if name.startswith("logits_last_token") else "all"
                found["logits_top_k"] = found.get("logits_top_k") or (1 if is_top_k(name) else None)
            elif path is not None and (part == ALL or "over" in noted):
                sites[site] = path
                found["keep_tokens"] |= pooling is None
                poolings |= {} if pooling is None else {pooling: None}
                over |= {} if pooling is None else {part: ALL if part == ALL else json.loads(noted["over"])}
        plain = all(site == path for site, path in sites.items())
        found |= {"sites": list(sites) if plain else sites, "pooling": list(poolings)}
        found |= {} if set(over) <= {ALL} else {"over": over}
        return found | ({"layers": list(self.layers)} if self.layers else {})

    def __str__(self) -> str:
        unknown = sum(text is None for text in self.texts)
        where = f", layer{'s' if len(self.layers) > 1 else ''} {describe_layers(self.layers)}" if self.layers else ""
        more = f" ({unknown} of them without a known text)" if unknown else ""
        return f"{', '.join(self.variables)}{where} of {count_of(len(self.hashes), 'prompt')} of {self.model}{more}"


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
        The prompts that had a value in it.
    """

    part: str
    column: str
    hashes: tuple[str, ...]

    def __str__(self) -> str:
        return f"column {self.column!r} of {count_of(len(self.hashes), 'prompt')}, of {self.part}"


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
        Keys of parts that were removed whole.
    lost : tuple of LostValues
        What the store no longer holds anywhere: what to extract again.
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
        restored, rewritten = count_of(len(self.restored), "document"), count_of(len(self.rewritten), "part")
        lines = [f"{self.url}: {restored} {verb}restored, {rewritten} {verb}written again, {len(self.dropped)} {verb}dropped"]
        for title, rows in (
            ("extract again", self.lost), ("lost columns", self.columns), ("nobody knows what these held", self.unknown),
            ("left as they are", self.left),
        ):  # fmt: skip
            lines += [f"{title}:", *shortened(rows)] if rows else []
        if self.lost and self.dry_run:
            lines.append("their prompts are in summary.lost, with the arguments of extract for each")
        elif self.lost:
            lines.append("to get them back, for each of summary.lost: extract(model, lost.prompts, store=store, **lost.arguments)")
        return "\n".join(lines)
