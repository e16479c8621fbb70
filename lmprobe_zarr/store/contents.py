"""What a store holds, as values that print: of each group the prompts, layers, and variables with codecs and sizes.

Describes a store to its users, all of its roots together. The size of the cache by root, and its last use, are in
`lmprobe_zarr.cache.info`. Reads documents, never activations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import xarray as xr

from lmprobe_zarr.batch import describe_layers
from lmprobe_zarr.display import Html, card, definitions, escape, format_bytes, section, table, visible
from lmprobe_zarr.errors import LmprobeZarrError
from lmprobe_zarr.interchange import to_interchange
from lmprobe_zarr.pages import Coverage, ListedGroup
from lmprobe_zarr.store.format import FORMAT_COLUMNS, LEVELS, ArrayInfo, GroupInfo, Level, unrecorded_fields
from lmprobe_zarr.store.parts import Catalog, View, groups_of, open_union, urls_of

__all__ = [
    "GroupContents",
    "HeldArray",
    "StoreContents",
    "bin_coverage",
    "coverage_of",
    "describe_catalogs",
    "describe_view",
    "measure_coverage",
]

# A notebook shows this many groups with all that they hold, the others as one line each.
SHOWN_GROUPS: Final = 20
# What bounds the coverage on a page, whatever the store's size.
SHOWN_VARIABLES: Final = 8
COVERAGE_CELLS: Final = 24_000
COVERAGE_BINS: Final = 240


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldArray:
    """One variable or column over all parts of a view.

    Parameters
    ----------
    name : str
    level : {"prompts", "tokens"}
    dims : tuple of str
    dtype : str
        The dtype that the values were computed in, where that is stored; all dtypes where parts differ.
    codecs : str
        The codecs of its chunks, as ``bitshuffle, lz4, crc32c``.
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
        """Bytes of the values per byte of their files."""
        return self.raw_nbytes / self.nbytes if self.raw_nbytes and self.nbytes else None

    @property
    def described_ratio(self) -> str:
        """The ratio as text."""
        return "—" if self.ratio is None else f"{self.ratio:.2f} ×"


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupContents:
    """What a view of a group holds, and its size.

    Parameters
    ----------
    group : GroupInfo
    prompts, tokens, parts, annotations : int
    layers : tuple of int
    variables, columns : tuple of HeldArray
        Activations and other outputs of the model; and what describes prompts and tokens.
    nbytes : int
        Bytes of all files of the view's parts, their documents left out.
    found : str
        Which modules of the model gave its sites, as its latest part records it; empty where none does.
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
    found: str = ""

    @property
    def raw_nbytes(self) -> int:
        """Bytes of all activations before compression."""
        return sum(variable.raw_nbytes or 0 for variable in self.variables)

    @property
    def own_columns(self) -> tuple[str, ...]:
        """Names of the user's own columns."""
        return tuple(column.name for column in self.columns if column.name not in FORMAT_COLUMNS)

    @property
    def described_layers(self) -> str:
        """Layers as text, and of how many."""
        return describe_layers(self.layers) + (f" of {self.group.num_layers}" if self.group.num_layers else "")

    @property
    def described_parts(self) -> str:
        """How many parts and annotations, as text."""
        noted = f", {_counted(self.annotations, 'annotation')}" if self.annotations else ""
        return _counted(self.parts, "part") + noted

    @property
    def summary(self) -> str:
        """The group in one line."""
        return f"{_counted(self.prompts, 'prompt')}, {_counted(self.tokens, 'token')}, layers {describe_layers(self.layers)}"

    def facts(self) -> dict[str, str]:
        """Facts about the group as text, by name."""
        known = {name: value for name, value in self.group.provenance.items() if value is not None}
        return {
            "prompts": f"{self.prompts:,} in {self.described_parts}",
            "tokens": f"{self.tokens:,}" if self.tokens else "none kept",
            "layers": self.described_layers,
            "hidden": str(self.group.hidden_size or "unknown"),
            "variables": ", ".join(f"{variable.name} ({variable.dtype})" for variable in self.variables) or "none",
            "columns": ", ".join(dict.fromkeys(self.own_columns)) or "none",
            "size": format_bytes(self.nbytes),
            **({"modules": self.found} if self.found else {}),
            "provenance": ", ".join(f"{name}={value}" for name, value in known.items()) or "unknown",
            **({"unknown": ", ".join(missing)} if (missing := unrecorded_fields(self.group.provenance)) else {}),
        }

    def listed(self) -> ListedGroup:
        """The group as pages list it."""
        return ListedGroup(
            model=self.group.model,
            name=self.group.name,
            prompts=self.prompts,
            tokens=self.tokens,
            layers=self.described_layers,
            hidden=str(self.group.hidden_size or "unknown"),
            stored_in=self.described_parts,
            raw_nbytes=self.raw_nbytes,
            nbytes=self.nbytes,
            summary=self.summary,
            sections=tuple(self.sections()),
        )

    def to_html(self, *, opened: bool) -> Html:
        """A section that opens and closes, with variables, columns and provenance."""
        content = Html("".join(map(str, self.sections())))
        return section(self.group.model, content, opened=opened, note=f"{self.summary}, {format_bytes(self.nbytes)}")

    def sections(self) -> list[Html]:
        """What `to_html` shows, each table in a section of its own."""
        facts = {name: value for name, value in self.facts().items() if name in ("layers", "hidden", "size", "modules")}
        facts = {"prompts": f"{self.prompts:,}", "tokens": f"{self.tokens:,}", "stored in": self.described_parts} | facts
        own = [column for column in self.columns if column.name in self.own_columns]
        rest = [column for column in self.columns if column.name not in self.own_columns]
        provenance: Mapping[str, Any] = self.group.provenance
        known = {name: str(value) for name, value in provenance.items() if value is not None}
        missing = unrecorded_fields(self.group.provenance)
        absent = {"not recorded": ", ".join(missing)} if known and missing else {}
        return [
            definitions({**facts, "group": self.group.name}),
            section("Variables", _array_table(self.variables), opened=True, note=f"({len(self.variables)})"),
            section("Your columns", _array_table(own), opened=bool(own), note=f"({len(own)})"),
            section("Other columns", _array_table(rest), note=f"({len(rest)})"),
            section("Provenance", definitions((known or {"": "unknown"}) | absent), note=f"({len(known)})"),
        ]


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _array_table(arrays: Sequence[HeldArray]) -> Html:
    rows = [
        (
            array.name,
            f"({', '.join(array.dims)})",
            array.dtype,
            array.codecs,
            "—" if array.raw_nbytes is None else format_bytes(array.raw_nbytes),
            format_bytes(array.nbytes),
            array.described_ratio,
        )
        for array in arrays
    ]
    return table(("name", "dimensions", "dtype", "codecs", "values", "stored", "smaller"), rows) if rows else Html("none")


def describe_view(view: View) -> GroupContents:
    """What a view holds, from the documents of its parts."""
    owners = view.owners
    # One pass over the tables of files, by far the longest thing in a part's document.
    weights: dict[str, int] = {}
    for part in owners:
        for key, nbytes in part.info.nbytes_by_folder().items():
            weights[key] = weights.get(key, 0) + nbytes

    def held(level: Level, name: str) -> HeldArray:
        key = f"{level}/{name}"
        arrays = [part.info.arrays[key] for part in owners if key in part.info.arrays]
        return HeldArray(
            name=name,
            level=level,
            dims=arrays[-1].dims,
            dtype=", ".join(sorted({str(array.attributes.get("stored_dtype", array.dtype)) for array in arrays})),
            codecs="; ".join(sorted({_codecs(array) for array in arrays})),
            raw_nbytes=None if any(array.dtype == "string" for array in arrays) else sum(_raw_nbytes(array) for array in arrays),
            nbytes=weights.get(key, 0),
        )

    return GroupContents(
        group=view.group,
        prompts=len(view),
        tokens=int(view.token_counts().sum()),
        parts=len(view.parts),
        annotations=sum(not note.info.is_tombstone for note in view.annotations),
        layers=view.all_layers(),
        variables=tuple(held(level, name) for level in LEVELS for name in view.variables(level)),
        columns=tuple(held(level, name) for level in LEVELS for name in view.columns(level)),
        nbytes=sum(weights.values()),
        found=_modules_found(view),
    )


def _modules_found(view: View) -> str:
    recorded = next((part.info.recorded for part in reversed(view.parts) if "found_layers" in part.info.recorded), {})
    sites = ("layers", "attn", "mlp", "router")
    return ", ".join(f"{site}={recorded[f'found_{site}']}" for site in sites if f"found_{site}" in recorded)


def _raw_nbytes(info: ArrayInfo) -> int:
    return math.prod(info.shape) * np.dtype(info.dtype).itemsize


def _codecs(info: ArrayInfo) -> str:
    """The codecs as text, outermost last, without the one that turns numbers into bytes."""
    if info.shuffle is None:
        return "crc32c"
    packed = "zstd" if info.dtype == "string" else "lz4"
    return f"{packed}, crc32c" if info.shuffle == "noshuffle" else f"{info.shuffle}, {packed}, crc32c"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreContents:
    """What a store holds, and what is damaged in it. Prints well, in notebooks too.

    Parameters
    ----------
    url, mode : str
        The store's own root, and whether it may be written to.
    below : str
        The roots below it, empty where there are none.
    groups : tuple of GroupContents
    damage : tuple of str
        One line for each part or group that cannot be read; or why nothing can be.
    """

    url: str
    mode: str
    below: str
    groups: tuple[GroupContents, ...]
    damage: tuple[str, ...]

    @property
    def _over(self) -> str:
        return f", over {self.below}" if self.below else ""

    def __str__(self) -> str:
        lines = []
        for group in self.groups:
            lines.append(f"  {visible(group.group.model)}: {group.summary}")
            held = [f"{variable.name} ({variable.level})" for variable in group.variables]
            lines.append(f"    {', '.join(held) or 'nothing yet'}  [{group.group.name}]")
        lines += [f"  damaged: {visible(line)}" for line in self.damage]
        return "\n".join([f"<lmprobe_zarr.Store {self.url!r}, mode {self.mode!r}{self._over}>", *(lines or ["  empty"])])

    def to_html(self) -> Html:
        """The store for a notebook, each group in a section of its own."""
        shown = [group.to_html(opened=len(self.groups) == 1) for group in self.groups[:SHOWN_GROUPS]]
        if rest := self.groups[SHOWN_GROUPS:]:
            rows = [(group.group.model, group.summary) for group in rest]
            shown.append(section(f"{len(rest)} more groups", table(("model", "holds"), rows)))
        damage = Html("<br>".join(map(escape, self.damage)))
        damaged = [section("Damaged", damage, opened=True, note=f"({len(self.damage)})")] if self.damage else []
        return card("lmprobe_zarr.Store", f"{self.url}, mode {self.mode!r}{self._over}", *(shown or [Html("empty")]), *damaged)


def describe_catalogs(catalogs: Sequence[Catalog]) -> StoreContents:
    """What several roots, the lowest first, hold together. Raises no error of ours, since damaged stores are printed too."""
    try:
        found = groups_of(catalogs, whole=False)
        groups = [describe_view(open_union(catalogs, info, whole=False)) for info in found.values()]
        damage = [str(error).splitlines()[0] for catalog in catalogs for error in catalog.damage]
    except LmprobeZarrError as error:
        groups, damage = [], [str(error)]
    own = catalogs[-1]
    return StoreContents(url=own.url, mode=own.mode, below=urls_of(catalogs[:-1]), groups=tuple(groups), damage=tuple(damage))


def coverage_of(view: View, prompts: Iterable[Any] | None) -> xr.DataArray:
    """What a view holds: True for every variable, prompt and layer that some part has. No values are read."""
    rows = np.arange(len(view)) if prompts is None else view.select(prompts)
    layers = view.all_layers()
    names = [(level, name) for level in LEVELS for name in view.variables(level)]
    held = [np.broadcast_to(view.covers(level, name, rows, layers).T, (len(rows), len(layers))) for level, name in names]
    found = xr.DataArray(
        np.array(held, bool).reshape(len(names), len(rows), len(layers)),
        dims=("variable", "prompt", "layer"),
        coords={"variable": [name for _, name in names], "prompt": view.hashes[rows], "layer": list(layers)},
        name="coverage",
    )
    return to_interchange(found)


def measure_coverage(view: View, layers: Sequence[int]) -> tuple[Coverage, ...]:
    """The coverage of the first variables for a page; the more variables and layers, the fewer bins."""
    names = [(level, name) for level in LEVELS for name in view.variables(level)][:SHOWN_VARIABLES]
    bins = max(20, min(COVERAGE_BINS, COVERAGE_CELLS // max(1, len(names) * len(layers))))
    return tuple(bin_coverage(view, level, name, layers, bins=bins) for level, name in names)


def bin_coverage(view: View, level: Level, variable: str, layers: Sequence[int], *, bins: int) -> Coverage:
    """The coverage of one variable, in at most `bins` bins of neighbouring prompts. No values are read."""
    n = len(view)
    layered = view.variables(level)[variable].layered
    covered = view.covers(level, variable, np.arange(n), tuple(layers) if layered else ())
    edges = np.unique(np.linspace(0, n, min(bins, n) + 1).astype(np.int64))
    counted = np.add.reduceat(covered, edges[:-1], axis=1, dtype=np.int64)
    return Coverage(
        variable=variable,
        level=level,
        layers=tuple(layers) if layered else (),
        edges=tuple(edges.tolist()),
        shares=counted / np.diff(edges),
    )
