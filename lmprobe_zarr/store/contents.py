"""What a group holds, as values that can be shown: prompts, layers, variables with codecs and sizes. Reads documents, never values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmprobe_zarr.batch import describe_layers
from lmprobe_zarr.display import Html, definitions, format_bytes, section, table
from lmprobe_zarr.store.format import LEVELS, PROMPT_COLUMNS, TOKEN_COLUMNS, ArrayInfo, GroupInfo, Level
from lmprobe_zarr.store.parts import View

__all__ = ["GroupContents", "HeldArray", "describe_view"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldArray:
    """One variable or column over all parts of a view.

    Parameters
    ----------
    name : str
    level : {"prompts", "tokens"}
    dims : tuple of str
    dtype : str
        What the values were computed in, as far as that is stored; of several dtypes all.
    codecs : str
        What its chunks went through, as ``bitshuffle, lz4, crc32c``.
    raw_nbytes : int, optional
        Bytes of the values; None for texts, whose length is not fixed.
    nbytes : int
        Bytes of its files.
    """

    name: str
    level: Level
    dims: tuple[str, ...]
    dtype: str
    codecs: str
    raw_nbytes: int | None
    nbytes: int

    @property
    def ratio(self) -> float | None:
        """How many times smaller the files are than the values."""
        return self.raw_nbytes / self.nbytes if self.raw_nbytes and self.nbytes else None

    @property
    def described_ratio(self) -> str:
        """The same as people read it."""
        return "—" if self.ratio is None else f"{self.ratio:.2f} ×"


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupContents:
    """What a view shows of a group, and what that weighs.

    Parameters
    ----------
    group : GroupInfo
    prompts, tokens, parts, annotations : int
    layers : tuple of int
    variables, columns : tuple of HeldArray
        Activations and what a model says; and what describes prompts and tokens.
    nbytes : int
        Bytes of all files of the parts that show, their documents left out.
    """

    group: GroupInfo
    prompts: int
    tokens: int
    parts: int
    annotations: int
    layers: tuple[int, ...]
    variables: tuple[HeldArray, ...]
    columns: tuple[HeldArray, ...]
    nbytes: int

    @property
    def raw_nbytes(self) -> int:
        """Bytes of all activations before compression."""
        return sum(one.raw_nbytes or 0 for one in self.variables)

    @property
    def own_columns(self) -> tuple[str, ...]:
        """Names of the user's own columns."""
        return tuple(one.name for one in self.columns if one.name not in (*PROMPT_COLUMNS, *TOKEN_COLUMNS))

    @property
    def described_layers(self) -> str:
        """Layers as people write them, and of how many."""
        return describe_layers(self.layers) + (f" of {self.group.num_layers}" if self.group.num_layers else "")

    @property
    def described_parts(self) -> str:
        """Parts and annotations in words."""
        noted = f", {_counted(self.annotations, 'annotation')}" if self.annotations else ""
        return _counted(self.parts, "part") + noted

    @property
    def summary(self) -> str:
        """The group in one line."""
        return f"{_counted(self.prompts, 'prompt')}, {_counted(self.tokens, 'token')}, layers {describe_layers(self.layers)}"

    def facts(self) -> dict[str, str]:
        """What there is to say of it, by name."""
        known = {name: value for name, value in self.group.provenance.items() if value is not None}
        return {
            "prompts": f"{self.prompts:,} in {self.described_parts}",
            "tokens": f"{self.tokens:,}" if self.tokens else "none kept",
            "layers": self.described_layers,
            "hidden": str(self.group.hidden_size or "unknown"),
            "variables": ", ".join(f"{one.name} ({one.dtype})" for one in self.variables) or "none",
            "columns": ", ".join(one.name for one in self.columns if one.name not in ("prompt", "prompt_sha256")) or "none",
            "size": format_bytes(self.nbytes),
            "provenance": ", ".join(f"{name}={value}" for name, value in known.items()) or "unknown",
        }

    def to_html(self, *, opened: bool) -> Html:
        """The group as something that opens: its variables, columns and provenance."""
        content = Html("".join(map(str, self.sections())))
        return section(self.group.model, content, opened=opened, note=f"{self.summary}, {format_bytes(self.nbytes)}")

    def sections(self) -> list[Html]:
        """Its parts of speech, each to open and close."""
        facts = {name: value for name, value in self.facts().items() if name in ("layers", "hidden", "size")}
        facts = {"prompts": f"{self.prompts:,}", "tokens": f"{self.tokens:,}", "stored in": self.described_parts} | facts
        own = [one for one in self.columns if one.name in self.own_columns]
        rest = [one for one in self.columns if one.name not in self.own_columns]
        provenance: Mapping[str, Any] = self.group.provenance
        known = {name: str(value) for name, value in provenance.items() if value is not None}
        return [
            definitions({**facts, "group": self.group.name}),
            section("Variables", _array_table(self.variables), opened=True, note=f"({len(self.variables)})"),
            section("Your columns", _array_table(own), opened=bool(own), note=f"({len(own)})"),
            section("Other columns", _array_table(rest), note=f"({len(rest)})"),
            section("Provenance", definitions(known or {"": "unknown"}), note=f"({len(known)})"),
        ]


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _array_table(arrays: tuple[HeldArray, ...] | list[HeldArray]) -> Html:
    rows = [
        (
            one.name,
            f"({', '.join(one.dims)})",
            one.dtype,
            one.codecs,
            "—" if one.raw_nbytes is None else format_bytes(one.raw_nbytes),
            format_bytes(one.nbytes),
            one.described_ratio,
        )
        for one in arrays
    ]
    return table(("name", "dimensions", "dtype", "codecs", "values", "stored", "smaller"), rows) if rows else Html("none")


def describe_view(view: View) -> GroupContents:
    """What a view shows, from the documents of its parts."""
    owners = (*view.parts, *view.annotations)
    # One pass over the tables of files, which are the longest thing that a part says of itself.
    weights: dict[str, int] = {}
    for part in owners:
        for path, entry in part.info.files.items():
            key = "/".join(path.split("/")[:2])
            weights[key] = weights.get(key, 0) + int(entry[0])

    def held(level: Level, name: str) -> HeldArray:
        key = f"{level}/{name}"
        arrays = [part.info.arrays[key] for part in owners if key in part.info.arrays]
        return HeldArray(
            name=name,
            level=level,
            dims=arrays[-1].dims,
            dtype=", ".join(sorted({str(one.attributes.get("stored_dtype", one.dtype)) for one in arrays})),
            codecs="; ".join(sorted({_codecs(one) for one in arrays})),
            raw_nbytes=None if any(one.dtype == "string" for one in arrays) else sum(_raw(one) for one in arrays),
            nbytes=weights.get(key, 0),
        )

    return GroupContents(
        group=view.group,
        prompts=len(view),
        tokens=int(view.token_counts().sum()),
        parts=len(view.parts),
        annotations=len(view.annotations),
        layers=tuple(sorted({*view.layers("prompts"), *view.layers("tokens")})),
        variables=tuple(held(level, name) for level in LEVELS for name in view.variables(level)),
        columns=tuple(held(level, name) for level in LEVELS for name in view.columns(level)),
        nbytes=sum(weights.values()),
    )


def _raw(info: ArrayInfo) -> int:
    return math.prod(info.shape) * np.dtype(info.dtype).itemsize


def _codecs(info: ArrayInfo) -> str:
    """The chain in words, outermost last; that numbers become bytes goes without saying."""
    if info.shuffle is None:
        return "crc32c"
    packed = "zstd" if info.dtype == "string" else "lz4"
    return f"{packed}, crc32c" if info.shuffle == "noshuffle" else f"{info.shuffle}, {packed}, crc32c"
