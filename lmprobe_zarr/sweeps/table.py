"""Scores as a table to print or to put into a paper: the mean with its interval, rounded as the interval says. Computes no score.

``layout_scores`` makes the cells, which the formats only write in their own way.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import xarray as xr

from lmprobe_zarr.batch import list_names
from lmprobe_zarr.display import count_of
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.interchange import read_list
from lmprobe_zarr.sweeps.shuffles import (
    count_shuffles,
    describe_p_values,
    describe_spread,
    is_of_many_shuffles,
    is_of_shuffles,
    spread_of_shuffles,
)
from lmprobe_zarr.tokens import is_inner_dim
from lmprobe_zarr.typing import Array

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["NOT_FINITE", "NOT_STORED", "NOT_TESTED", "parse_table_path", "table_of_scores"]

#: What a cell says in place of a score: it was never fitted; it was, and is NaN or infinite; no other prompts are left to test it on.
NOT_STORED: Final = "not stored"
NOT_FINITE: Final = "not finite"
NOT_TESTED: Final = "not tested"
#: Without `fit_seconds`, nothing says whether a NaN was ever fitted.
_UNKNOWN: Final = "NaN"
_REPEATED: Final = ("fold", "seed")
_NO_SCORES: Final = ("fit_seconds", "pass_seconds", "chosen_strength", "chosen_layer", "inner_score")
#: Decimals where no interval decides, and at most. A narrower interval than this is rounding of the computation.
_DECIMALS: Final = 3
_MOST_DECIMALS: Final = 6
_NARROWEST: Final = 5e-7


def table_of_scores(
    scores: xr.Dataset | xr.DataArray,
    metrics: str | Iterable[str] | None = None,
    *,
    intervals: xr.Dataset | None = None,
    format: str | None = None,  # noqa: A002 (the word that pandas and others use)
    path: str | os.PathLike[str] | None = None,
) -> pd.DataFrame | str:
    """The table; see `lmprobe_zarr.accessor.DatasetAccessor.table`."""
    kind = parse_table_path(path) if path is not None and format is None else None
    if format is not None and (not isinstance(format, str) or format not in _WRITERS):
        known = ", ".join(map(repr, _WRITERS))
        raise InvalidArgumentError(f"format={format!r:.60} is unknown: use one of {known}, or None for a DataFrame")
    written = format or kind
    # A CSV file has no place for remarks.
    layout = layout_scores(scores, metrics, intervals, any_layer=written == "csv")
    if written is None:
        return _as_frame(layout)
    text = _WRITERS[written](layout)
    if path is not None:
        try:
            Path(path).write_text(text, encoding="utf-8", newline="")
        except OSError as error:
            raise InvalidArgumentError(f"the table cannot be written to {os.fspath(path)!r} ({error}): give another path") from error
    return text


def parse_table_path(path: str | os.PathLike[str]) -> str:
    """The format of a file for a table, by its ending.

    Raises
    ------
    InvalidArgumentError
        Another ending, or a folder that does not exist.
    """
    if not isinstance(path, str | os.PathLike):
        raise InvalidTypeError(f"path={path!r:.60} is no path: give the file to write, such as 'scores.csv'")
    ending = Path(path).suffix.lower()
    if ending not in _ENDINGS:
        raise InvalidArgumentError(
            f"{os.fspath(path)!r} has {f'the ending {ending}' if ending else 'no ending'} for a table: use one of {', '.join(_ENDINGS)}"
        )
    if not Path(path).absolute().parent.is_dir():
        raise InvalidArgumentError(f"{os.fspath(path)!r}: the folder {str(Path(path).parent)!r} does not exist, make it first")
    return _ENDINGS[ending]


# -- the cells -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Cell:
    """One mean as text, with its half width or its bounds; or, in place of all of them, why there is no mean."""

    value: str
    spread: str = ""
    lower: str = ""
    upper: str = ""
    note: str = ""
    #: What the half width is over, where that is neither folds nor seeds.
    over: str = ""

    @property
    def is_number(self) -> bool:
        return self.value not in {"", NOT_STORED, NOT_FINITE, NOT_TESTED, _UNKNOWN}


@dataclass(frozen=True, slots=True)
class _Layout:
    """Labels and cells of a table; `columns` are pairs of metric and label, of which the metric is shown if there are several."""

    index: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    columns: tuple[tuple[str, Any], ...]
    cells: tuple[tuple[_Cell, ...], ...]
    caption: str
    over: str
    #: Remarks, each a line of its own below the caption.
    notes: tuple[str, ...] = ()
    #: What was scored; empty where the scores do not say.
    origin: str = ""
    #: The only probe; empty where there are several, or where the scores do not say.
    probe: str = ""

    @property
    def has_metrics(self) -> bool:
        return len({metric for metric, _ in self.columns}) > 1

    def title(self, column: tuple[str, Any]) -> str:
        """Metric and label in one text."""
        metric, label = column
        return f"{metric} {label}" if self.has_metrics else str(label)


def layout_scores(
    scores: xr.Dataset | xr.DataArray,
    metrics: str | Iterable[str] | None = None,
    intervals: xr.Dataset | None = None,
    *,
    any_layer: bool = False,
) -> _Layout:
    """Rows, columns and cells of a table; with `any_layer` also a column with the p-value among the best layers of all shuffles.

    Raises
    ------
    InvalidArgumentError
        There are no scores, no such metric, or intervals of something else.
    """
    data = _as_dataset(scores)
    names = _metrics(data, metrics)
    bounds = data if "bound" in data[names[0]].dims else intervals
    values = {name: data[name].sel(bound="estimate", drop=True) if "bound" in data[name].dims else data[name] for name in names}
    first = values[names[0]]
    repeated: list[str] = [dim for dim in _REPEATED if dim in first.dims]
    over = "probe" if "probe" in first.dims else "layer" if "layer" in first.dims else ""
    dims = [str(dim) for dim in first.dims if dim not in repeated and dim != over]
    differ = [name for name in names if set(values[name].dims) != set(first.dims)]
    if differ:
        raise InvalidArgumentError(f"{differ[0]!r} has other dims than {names[0]!r}: make a table of each")
    labels = list(first[over].values.tolist()) if over and over in first.coords else [""]
    index, rows = _rows(first, dims)
    blocks: list[list[list[_Cell]]] = []
    columns: list[tuple[str, Any]] = []
    for name in names:
        flat = values[name].transpose(*dims, *([over] if over else []), *repeated).values
        flat = flat.reshape(len(rows), len(labels), -1)
        missing = _missing(data, dims, over, repeated).reshape(len(rows), len(labels))
        limits = None if bounds is None else _limits(bounds, name, values[name], dims, over)
        spreads = _spreads(data, name, labels, dims, len(rows))
        p_values = _p_values(data, name, labels, dims, len(rows), any_layer=any_layer) if over == "probe" else {}
        block: list[list[_Cell]] = [[] for _ in rows]
        for column, label in enumerate(labels):
            columns.append((name, label))
            for row, cells in enumerate(block):
                at = row, column
                cells.append(_cell(flat[at], missing[at], None if limits is None else limits[:, row, column], spreads.get(at)))
            for title, shown in p_values.get(column, {}).items():
                columns.append((name, title))
                for cells, text in zip(block, shown, strict=True):
                    cells.append(_Cell(text))
        blocks.append(block)
    n = int(np.prod([first.sizes[dim] for dim in repeated], dtype=int))
    counted = " and ".join(f"{first.sizes[dim]} {dim}{'s' * (first.sizes[dim] != 1)}" for dim in repeated)
    notes = [*describe_spread(data, names), *describe_p_values(data, names)] if over == "probe" else []
    level = None if bounds is None else bounds.attrs.get("level")
    if bounds is not None:
        share = "interval" if level is None else f"{100 * float(level):g} % interval"
        caption = f"Mean [lower, upper bound of the {share}]" + (f" over {counted}." if counted else ".")
        for name in names:
            of = f"{name} of " if len(names) > 1 else ""
            notes += [f"Without an interval: {of}{reason}." for reason in read_list(bounds[name].attrs, "nan_reasons") or ()]
    else:
        caption = f"Mean ± standard deviation over {counted}." if n > 1 else "Scores."
    chosen = data.attrs.get("chosen", first.attrs.get("chosen"))
    caption += f" Chosen: {chosen}." if chosen else ""
    return _Layout(
        index=index,
        rows=tuple(rows),
        columns=tuple(columns),
        cells=tuple(tuple(cell for block in blocks for cell in block[row]) for row in range(len(rows))),
        caption=caption,
        over=over,
        notes=tuple(notes),
        origin=_describe_origin(data.attrs),
        probe=_only_probe(first) if over == "probe" else "",
    )


def _describe_origin(attrs: Mapping[Any, Any]) -> str:
    """Labels, variable, model, prompts and groups, as far as a sweep has recorded them."""
    of = " from ".join(str(attrs[name]) for name in ("labels", "variable") if attrs.get(name))
    parts = [of] if of else []
    if attrs.get("model"):
        parts.append(f"model {attrs['model']}")
    counts = attrs.get("n_prompts"), attrs.get("n_dropped")
    scored, dropped = (int(count) if isinstance(count, int | np.integer) else 0 for count in counts)
    if scored:
        parts.append(count_of(scored, "prompt") + (f", {dropped} without label left out" if dropped else ""))
    if isinstance(attrs.get("groups"), str) and attrs["groups"]:
        parts.append(f"folds by {attrs['groups']}")
    return f"{'; '.join(parts)}." if parts else ""


def _only_probe(scores: xr.DataArray) -> str:
    if "kind" not in scores.coords or scores["kind"].dims != ("probe",):
        return ""
    probes = scores["probe"].values[scores["kind"].values == "probe"].tolist()
    return str(probes[0]) if len(probes) == 1 else ""


def _as_dataset(scores: Any) -> xr.Dataset:
    if isinstance(scores, xr.DataArray):
        return scores.to_dataset(name=str(scores.name) if scores.name is not None and scores.name not in scores.coords else "score")
    data: xr.Dataset = scores
    return data


def _metrics(data: xr.Dataset, metrics: str | Iterable[str] | None) -> list[str]:
    numbers = [str(name) for name, held in data.data_vars.items() if held.dtype.kind == "f"]
    fitting = [
        name
        for name in numbers
        if "probe" in data[name].dims and "prompt" not in data[name].dims and name not in _NO_SCORES and not is_of_shuffles(data[name])
    ]
    if not fitting and len(numbers) == 1 and {"layer"} <= set(data[numbers[0]].dims) and not any(map(is_inner_dim, data[numbers[0]].dims)):
        fitting = numbers
    if metrics is None:
        if not fitting:
            raise InvalidArgumentError(f"this holds no scores by layer and probe (dims {dict(data.sizes)}): give what sweep returns")
        return fitting
    names = list_names("metrics", metrics, "accuracy")
    unknown = [name for name in names if name not in numbers]
    if unknown or not names:
        raise InvalidArgumentError(f"there is no score {unknown[0] if unknown else ''!r}: use one of {', '.join(fitting or numbers)}")
    return names


def _rows(array: xr.DataArray, dims: list[str]) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """Names and labels of the rows; tokens are named by their prompt, position and text."""
    named: list[tuple[list[str], list[tuple[Any, ...]]]] = []
    for dim in dims:
        names = [name for name in ("prompt", "position", "token_text") if name in array.coords and array.coords[name].dims == ("token",)]
        names = names if dim == "token" and names else [dim]
        columns = [array.coords[name].values.tolist() if name in array.coords else list(range(array.sizes[dim])) for name in names]
        named.append((names, list(zip(*columns, strict=True))))
    rows: list[tuple[Any, ...]] = [()]
    for _, labels in named:
        rows = [(*row, *label) for row in rows for label in labels]
    return tuple(name for names, _ in named for name in names), rows


def _missing(data: xr.Dataset, dims: list[str], over: str, repeated: list[str]) -> Array:
    """For each cell what to say where it holds no finite score."""
    wanted = [*dims, *([over] if over else [])]
    shape = [data.sizes[dim] for dim in wanted]
    if {"train", "test"} <= set(wanted) and "accuracy" in data:
        tested = np.isfinite(data["accuracy"].transpose(*wanted).values)
        return np.where(tested, NOT_FINITE, NOT_TESTED)
    if "fit_seconds" in data and set(wanted) | set(repeated) == set(data["fit_seconds"].dims):
        fitted = data["fit_seconds"].notnull().any(repeated).transpose(*wanted).values
        return np.where(fitted, NOT_FINITE, NOT_STORED)
    return np.full(shape, _UNKNOWN)


def _limits(bounds: Any, metric: str, values: xr.DataArray, dims: list[str], over: str) -> Array:
    """Lower and upper bound of each cell, shape (2, row, column)."""
    if not isinstance(bounds, xr.Dataset) or metric not in bounds or "bound" not in bounds[metric].dims:
        raise InvalidArgumentError(f"intervals have no {metric!r} over bound: give confidence_intervals of the same scores")
    wanted = [*dims, *([over] if over else [])]
    held = bounds[metric]
    if set(held.dims) != {*wanted, "bound"}:
        raise InvalidArgumentError(f"intervals of {metric!r} have dims {tuple(held.dims)}, and the scores {tuple(values.dims)}")
    held = held.reindex({dim: values[dim] for dim in wanted if dim in values.coords})
    rows = int(np.prod([values.sizes[dim] for dim in dims], dtype=int))
    return np.stack([held.sel(bound=bound).transpose(*wanted).values.reshape(rows, -1) for bound in ("lower", "upper")])


@dataclass(frozen=True, slots=True)
class _Spread:
    """The deviation of a mean over many shuffles, NaN where it is not known, and what it is over."""

    value: float
    over: str


def _spreads(data: xr.Dataset, metric: str, labels: list[Any], dims: list[str], n_rows: int) -> dict[tuple[int, int], _Spread]:
    """The spread over the shuffles by row and column, for the columns of controls of many shuffles."""
    columns = [column for column, label in enumerate(labels) if is_of_many_shuffles(data, metric, label)]
    held = spread_of_shuffles(data, metric) if columns else None
    if held is None:
        return {}
    values = held.transpose(*dims, "probe").values.reshape(n_rows, -1)
    over = count_shuffles(data)
    return {(row, column): _Spread(float(values[row, column]), over) for row in range(n_rows) for column in columns}


def _p_values(
    data: xr.Dataset, metric: str, labels: list[Any], dims: list[str], n_rows: int, *, any_layer: bool
) -> dict[int, dict[str, list[str]]]:
    """The columns of p-values, by their titles, that follow the column of a probe; none of scores of several seeds, each with its own."""
    found: dict[int, dict[str, list[str]]] = {}
    for name, title in ((f"{metric}_p_value", "p"), (f"{metric}_p_any_layer", "p any layer")):
        if name not in data or set(data[name].dims) != {*dims, "probe"} or (title != "p" and not any_layer):
            continue
        values = data[name].transpose(*dims, "probe").values.reshape(n_rows, -1)
        for column in np.flatnonzero(np.isfinite(values).any(axis=0)).tolist():
            shown = [f"{value:.2g}" if math.isfinite(value) else "" for value in values[:, column].tolist()]
            found.setdefault(column, {})[f"{labels[column]} {title}"] = shown
    return found


def _cell(values: Array, missing: str, limits: Array | None, of_shuffles: _Spread | None = None) -> _Cell:
    finite = values[np.isfinite(values)]
    if not len(finite):
        infinite = bool(np.isinf(values).any())
        return _Cell(NOT_FINITE if infinite else str(missing))
    note = f"{len(finite)} of {len(values)}" if len(finite) < len(values) else ""
    mean = float(finite.mean())
    if limits is not None and np.isfinite(limits).all():
        places = _decimals(float(limits[1] - limits[0]) / 2)
        return _Cell(_rounded(mean, places), "", _rounded(float(limits[0]), places), _rounded(float(limits[1]), places), note)
    if of_shuffles is not None or (limits is None and len(finite) > 1):
        spread = float(finite.std()) if of_shuffles is None else of_shuffles.value
        if math.isfinite(spread):
            places = _decimals(spread)
            over = "" if of_shuffles is None else of_shuffles.over
            return _Cell(_rounded(mean, places), _rounded(spread, places), note=note, over=over)
    return _Cell(_rounded(mean, _DECIMALS), note=note)


def _decimals(width: float) -> int:
    """Decimals with which a half width has two significant digits."""
    if width < _NARROWEST:
        return _DECIMALS
    exponent = math.floor(math.log10(width))
    # 0.0996 becomes 0.10, and not 0.100.
    if Decimal(_rounded(width, 1 - exponent)) >= Decimal(10).scaleb(exponent):
        exponent += 1
    return min(max(1 - exponent, 0), _MOST_DECIMALS)


def _rounded(value: float, places: int) -> str:
    """A number with that many decimals, rounded half to even from its shortest decimal form."""
    found = Decimal(repr(value)).quantize(Decimal(1).scaleb(-max(places, 0)), ROUND_HALF_EVEN)
    return format(found or abs(found), "f")


# -- the formats -----------------------------------------------------------------------------------------------------------


def _plain(cell: _Cell) -> str:
    interval = f" ± {cell.spread}" if cell.spread else f" [{cell.lower}, {cell.upper}]" if cell.lower else ""
    return f"{cell.value}{interval}" + (f" ({cell.note})" if cell.note else "")


def _as_frame(layout: _Layout) -> pd.DataFrame:
    import pandas as pd

    index: Any = None
    if len(layout.index) == 1:
        index = pd.Index([row[0] for row in layout.rows], name=layout.index[0])
    elif layout.index:
        index = pd.MultiIndex.from_tuples(list(layout.rows), names=list(layout.index))
    columns: Any
    if layout.has_metrics:
        columns = pd.MultiIndex.from_tuples(list(layout.columns), names=["metric", layout.over])
    else:
        columns = pd.Index([label for _, label in layout.columns], name=layout.over or None)
    frame = pd.DataFrame([[_plain(cell) for cell in row] for row in layout.cells], index=index, columns=columns)
    frame.attrs["caption"] = "\n".join([layout.caption, *layout.notes])
    return frame


def _as_markdown(layout: _Layout) -> str:
    heads = [*layout.index, *(layout.title(column) for column in layout.columns)]
    lines = [_markdown_row(map(_escape_markdown, heads)), _markdown_row(["---"] * len(layout.index) + ["---:"] * len(layout.columns))]
    for labels, cells in zip(layout.rows, layout.cells, strict=True):
        lines.append(_markdown_row([*(_escape_markdown(str(label)) for label in labels), *map(_plain, cells)]))
    notes = [f"* {_escape_markdown(note)}" for note in layout.notes]
    return "\n".join([*lines, "", layout.caption, *([""] if notes else []), *notes, ""])


def _markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escape_markdown(text: str) -> str:
    """A text that means itself in a cell of a Markdown table."""
    # Not every reader of Markdown takes a backslash before these.
    text = re.sub(r"[&<>$~]", lambda found: f"&#{ord(found[0])};", _in_a_line(text))
    return re.sub(r"(?<!&)([\\`*_{}\[\]|]|#)", r"\\\1", text)


def _as_latex(layout: _Layout) -> str:
    lines = [f"% {_in_a_line(remark)}" for remark in (layout.caption, layout.origin, *layout.notes) if remark]
    lines += [rf"\begin{{tabular}}{{{'l' * len(layout.index)}{'r' * len(layout.columns)}}}", r"\hline"]
    if layout.has_metrics:
        counts: dict[str, int] = {}
        for metric, _ in layout.columns:
            counts[metric] = counts.get(metric, 0) + 1
        above = [rf"\multicolumn{{{count}}}{{c}}{{{_escape_latex(metric)}}}" for metric, count in counts.items()]
        lines.append(" & ".join([*("" for _ in layout.index), *above]) + r" \\")
    # The controls of a single probe need not say whose they are.
    ending = f":{layout.probe}" if layout.probe else ""
    heads = [*layout.index, *(str(label).removesuffix(ending) for _, label in layout.columns)]
    lines += [" & ".join(map(_escape_latex, heads)) + r" \\", r"\hline"]
    for labels, cells in zip(layout.rows, layout.cells, strict=True):
        lines.append(" & ".join([*(_escape_latex(str(label)) for label in labels), *map(_latex_cell, cells)]) + r" \\")
    return "\n".join([*lines, r"\hline", r"\end{tabular}", ""])


def _latex_cell(cell: _Cell) -> str:
    if not cell.is_number:
        return _escape_latex(cell.value)
    interval = rf" \pm {cell.spread}" if cell.spread else rf"\ [{cell.lower}, {cell.upper}]" if cell.lower else ""
    return f"${cell.value}{interval}$" + (f" ({cell.note})" if cell.note else "")


#: Brackets and asterisks are arguments of the line break before them.
_LATEX: Final[Mapping[str, str]] = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "[": "{[}", "]": "{]}", "*": "{*}", **{c: f"\\{c}" for c in "&%$#_{}"},
}  # fmt: skip


def _escape_latex(text: str) -> str:
    return "".join(_LATEX.get(c, c) for c in _in_a_line(text))


def _in_a_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _as_csv(layout: _Layout) -> str:
    """Numbers in cells of their own: the mean, then its half width or its bounds."""
    parts: list[list[tuple[str, Callable[[_Cell], str]]]] = []
    for number in range(len(layout.columns)):
        column = [row[number] for row in layout.cells]
        shown: list[tuple[str, Callable[[_Cell], str]]] = [("", lambda cell: cell.value)]
        if any(cell.spread for cell in column):
            over = next((cell.over for cell in column if cell.over), "")
            shown.append((f" ± over {over}" if over else " ±", lambda cell: cell.spread))
        if any(cell.lower for cell in column):
            shown += [(" lower", lambda cell: cell.lower), (" upper", lambda cell: cell.upper)]
        if any(cell.note for cell in column):
            shown.append((" folds", lambda cell: cell.note))
        parts.append(shown)
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*layout.index, *(layout.title(c) + end for c, shown in zip(layout.columns, parts, strict=True) for end, _ in shown)])
    for labels, cells in zip(layout.rows, layout.cells, strict=True):
        writer.writerow([*labels, *(take(cell) for cell, shown in zip(cells, parts, strict=True) for _, take in shown)])
    return out.getvalue()


_WRITERS: Final[Mapping[str, Callable[[_Layout], str]]] = {"markdown": _as_markdown, "latex": _as_latex, "csv": _as_csv}
_ENDINGS: Final[Mapping[str, str]] = {".md": "markdown", ".tex": "latex", ".csv": "csv"}
