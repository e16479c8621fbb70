"""The card of a published dataset: what it holds and how to open it, as Markdown. Never values, and no texts of prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from lmprobe_zarr.batch import describe_layers
from lmprobe_zarr.display import format_bytes
from lmprobe_zarr.store.format import FORMAT_COLUMNS, LEVELS, GroupInfo
from lmprobe_zarr.store.parts import View

__all__ = ["CardGroup", "write_card"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CardGroup:
    """One group as the card shows it.

    Parameters
    ----------
    group : GroupInfo
    prompts, tokens, nbytes : int
        Prompts, token rows, and bytes as stored.
    layers : tuple of int
    variables : tuple of (str, str, str)
        Name, level and stored dtype.
    columns : tuple of str
        The user's own columns.
    part : str
        Key of one of its parts, for an example.
    """

    group: GroupInfo
    prompts: int
    tokens: int
    nbytes: int
    layers: tuple[int, ...]
    variables: tuple[tuple[str, str, str], ...]
    columns: tuple[str, ...]
    part: str

    @classmethod
    def of(cls, view: View, nbytes: int) -> CardGroup:
        """The record of a view."""
        held = [(name, level, ", ".join(view.stored_dtypes(level, name))) for level in LEVELS for name in view.variables(level)]
        return cls(
            group=view.group,
            prompts=len(view),
            tokens=int(view.token_counts().sum()),
            nbytes=nbytes,
            layers=view.all_layers(),
            variables=tuple(held),
            columns=tuple(name for name in view.columns("prompts") if name not in FORMAT_COLUMNS),
            part=view.parts[0].path,
        )


# The Hub's own classes of sizes, by number of rows.
_SIZES: Final = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M", 10_000_000: "1M<n<10M"}
_TAGS: Final = ("activations", "interpretability", "zarr", "lmprobe-zarr")


def write_card(groups: Sequence[CardGroup], url: str, *, text: bool, licence: str | None = None) -> str:
    """The card, as Markdown, behind metadata in YAML that the Hugging Face Hub shows and searches.

    Parameters
    ----------
    groups : sequence of CardGroup
    url : str
        The place of the copy. Of a local folder the path is not written, which nobody else has.
    text : bool
        Whether the prompts' texts are in it.
    licence : str, optional
        The Hub's name of a licence; None leaves it open.
    """
    models = list(dict.fromkeys(group.group.model for group in groups))
    lines = [
        *_front_matter(groups, models, licence),
        f"# Activations of {', '.join(models)}",
        "",
        f"License: {_cell(licence)}" if licence else "License: (say here under which terms others may use this dataset)",
        "",
        "Hidden states of language models, stored with lmprobe-zarr in Zarr v3. "
        + ("Prompts are there with their texts." if text else "Prompts are there by the sha256 of their texts only."),
        "",
    ]
    for group in groups:
        lines += _group_lines(group)
    first = groups[0]
    level = first.variables[0][1] if first.variables else "prompts"
    remote = "://" in url
    place = url if remote else "…"
    lines += [
        "## Opening it",
        "",
        *([] if remote else ["… is the place of this folder: its path, or its address on a web server.", ""]),
        "```python",
        "import lmprobe_zarr as lz",
        "",
        f"store = lz.open_store({place!r})",
        f"ds = store.dataset({first.group.model!r})",
        "```",
        "",
        "A part at a time, with xarray and zarr alone:",
        "",
        "```python",
        "import xarray as xr",
        "",
        f"ds = xr.open_zarr({f'{place}/{first.part}'!r}, group={level!r})",
        "```",
        "",
    ]
    return "\n".join(lines)


def _front_matter(groups: Sequence[CardGroup], models: Sequence[str], licence: str | None) -> list[str]:
    """The metadata: each value is JSON, which is YAML too, so that no name of a model can be anything else than a text."""
    prompts = sum(group.prompts for group in groups)
    size = next((name for limit, name in _SIZES.items() if prompts < limit), "n>10M")
    held = [
        {
            "model": group.group.model,
            "prompts": group.prompts,
            "tokens": group.tokens,
            "layers": list(group.layers),
            "hidden_size": group.group.hidden_size,
            "variables": [name for name, _, _ in group.variables],
            "bytes": group.nbytes,
        }
        for group in groups
    ]
    fields = {
        "license": licence or "unknown",
        "pretty_name": f"Activations of {', '.join(models)}",
        "size_categories": [size],
        "tags": [*_TAGS, *models],
        "viewer": False,
        "lmprobe_zarr": held,
    }
    return ["---", *(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in fields.items()), "---", ""]


def _group_lines(group: CardGroup) -> list[str]:
    rows = [
        ("prompts", str(group.prompts)),
        ("tokens", str(group.tokens)),
        ("layers", describe_layers(group.layers) if group.layers else "none"),
        ("size", format_bytes(group.nbytes)),
        ("columns", ", ".join(group.columns) or "none"),
        ("hidden size", str(group.group.hidden_size or "unknown")),
        *((f"provenance: {name}", str(value)) for name, value in group.group.provenance.items()),
    ]
    return [
        f"## {group.group.model}",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {_cell(value)} |" for name, value in rows),
        "",
        "| variable | one row per | dtype |",
        "|---|---|---|",
        *(f"| `{name}` | {level.removesuffix('s')} | {dtype} |" for name, level, dtype in group.variables),
        "",
    ]


def _cell(value: str) -> str:
    value = value if value.isprintable() else repr(value)
    return value.replace("|", "\\|").replace("\n", " ")
