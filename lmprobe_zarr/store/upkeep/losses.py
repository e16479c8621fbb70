"""What a repair did and what is lost, as records that print well: values to extract again, and columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lmprobe_zarr.batch import POOLINGS, SCALARS, SITES, describe_layers, is_top_k
from lmprobe_zarr.display import shortened
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
        """Arguments of `extract` beside model and prompts: ``extract(model, lost.prompts, store=store, **lost.arguments)``."""
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
        The prompts that had a value in it.
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
        lines = [
            f"{self.url}: {len(self.restored)} documents {verb}restored, {len(self.rewritten)} parts {verb}written again, "
            f"{len(self.dropped)} {verb}dropped"
        ]
        for title, rows in (
            ("extract again", self.lost), ("lost columns", self.columns), ("nobody knows what these held", self.unknown),
            ("left as they are", self.left),
        ):  # fmt: skip
            lines += [f"{title}:", *shortened(rows)] if rows else []
        return "\n".join(lines)
