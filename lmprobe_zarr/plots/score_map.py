"""Scores of a sweep as a heat map: one row per probe, variable or strength, one column per layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import xarray as xr

from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.plots.cells import SMALLEST, draw_mesh, format_cells, set_ticks, write_numbers
from lmprobe_zarr.plots.layout import Canvas, add_bar, bar_width, finish, open_canvas
from lmprobe_zarr.plots.scores import NOT_RANKED, REPEATED, SMALLER_IS_BETTER, chance_levels, select_scores
from lmprobe_zarr.plots.style import SCORE_LABELS
from lmprobe_zarr.typing import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_heatmap"]

#: Inches of the height of a row, of the lowest and highest axes, and of the widest cell.
_ROW: Final = 0.23
_LOWEST, _HIGHEST = 1.3, 8.0
_CELL: Final = 0.55
#: The share of a figure's width that names of rows may take, and the width of a letter as a share of its size.
_NAMES, _LETTER = 0.35, 0.55
#: Inches between the numbers of two layers, at least.
_TICK: Final = 0.26
#: Means that differ by less are equal: sums of the same folds in another order.
_EQUAL: Final = 1e-12


def plot_heatmap(
    scores: xr.Dataset,
    metric: str = "accuracy",
    ax: Axes | None = None,
    *,
    rows: str = "probe",
    width: Literal["page", "column"] | float = "page",
) -> Axes:
    """Axes with the mean of a score over the folds for every layer and probe, as colours, and as numbers where they fit.

    Parameters
    ----------
    scores : Dataset
        From :func:`lmprobe_zarr.sweep` or :func:`lmprobe_zarr.sweep_tokens`.
    metric : str
        A variable over layer and `rows`, and over folds, seeds or repeats if there are some.
    ax : matplotlib Axes, optional
        As for :func:`plot_scores`.
    rows : str
        The dim of the rows: "probe", with controls below the probes; "variable", "strength", "label" or any other dim of the scores. Of
        further dims select one entry: ``scores.sel(probe="ridge")``.
    width : {"page", "column"} or float
        As for :func:`plot_scores`.

    Returns
    -------
    Axes
        Controls lie below a gap. The light end of the colours is the better one. The scale covers all cells and the score of guessing,
        which a line in its bar marks. Cells without a score are hatched. The best cells of each row are outlined, unless all are equal. A
        remark below says that they were chosen by these scores themselves, so that they are too good; and how many cells are means of some
        of the folds only, since the others have no score.

    Raises
    ------
    MissingDependencyError
        matplotlib is not installed.
    InvalidTypeError
        `scores` is no dataset.
    InvalidArgumentError
        There is no such metric over layer and `rows`, or it has further dims; or a width that no figure can have.

    Examples
    --------
    >>> scores.lz.plot_heatmap("auroc")  # doctest: +SKIP
    >>> grid.sel(probe="ridge", variable="resid_mean").lz.plot_heatmap(rows="strength")  # doctest: +SKIP
    """
    each = select_scores(_with_rows(scores, metric, rows), metric, ("layer", rows, "fold"), as_rows=True).sortby("layer")
    names, controls = _name_rows(each, rows)
    order = np.argsort(controls, kind="stable")
    values, partial = _average(each.values[:, order].transpose(1, 0, 2))
    n_rows, n_layers = values.shape

    canvas = open_canvas(ax, width)
    axes, lettering = canvas.axes, canvas.lettering
    smaller = metric in SMALLER_IS_BETTER
    levels = chance_levels(scores, metric)
    mesh = draw_mesh(canvas, values, *_limits([*values.ravel(), *levels.values()]), dark_is_high=smaller)
    axes.invert_yaxis()
    shown = lettering.fit_all(
        [names[place] for place in order], int(np.clip(_NAMES * 72 * canvas.width / (_LETTER * canvas.letters), 8, 40))
    )
    height = float(np.clip(_ROW * n_rows, _LOWEST, _HIGHEST)) if canvas.is_new else axes.get_window_extent().height / axes.figure.dpi
    size = float(np.clip(0.8 * 72 * height / n_rows, SMALLEST, canvas.letters))
    set_ticks(axes.yaxis, shown, int(72 * height / size), fontsize=size)
    beside = _LETTER * size * max(map(len, shown), default=0) / 72 + bar_width(canvas) if canvas.is_new else 0.0
    across = min(_CELL * n_layers + 0.4, canvas.width - beside)
    layers = lettering.fit_all(each["layer"].values, 24)
    longest = max(map(len, layers), default=0)
    set_ticks(axes.xaxis, layers, int(across / (max(_TICK, 0.1 * longest) if longest <= 5 else 0.16)), rotation=90 if longest > 5 else 0)
    below = ["below the gap: controls"] if 0 < controls.sum() < n_rows else ["all rows are controls"] if controls.any() else []
    if 0 < controls.sum() < n_rows:
        axes.axhline(n_rows - controls.sum() - 0.5, color=canvas.tones.ground, linewidth=3, gid="gap")
    ranked = metric not in NOT_RANKED
    outlined = ranked and _outline_best(canvas, -values if smaller else values, 72 * across / max(1, n_layers))
    axes.set_xlabel("layer")
    axes.set_ylabel("" if rows == "probe" else lettering.fit(rows))
    means = f"{lettering.fit(SCORE_LABELS.get(metric, metric))}\n({_how(each.sizes['fold'], smaller=smaller)})"
    bar = add_bar(canvas, mesh, means, list(levels.values()))
    title = lettering.fit_all(_title_parts(scores, each, rows), 80)
    axes.set_title(" · ".join(part for part in title if part), fontsize=canvas.points("medium"))
    finish(canvas, (across, height), bar=bar, remarks=[*below, *_remarks(outlined=outlined, partial=partial, levels=levels)])
    write_numbers(canvas, mesh, values, format_cells(values), canvas.points("small"))
    return axes  # type: ignore[no-any-return]


def _with_rows(scores: Any, metric: str, rows: Any) -> Any:
    """The score with a dim of rows and one of folds, which a selection or a mean may have taken away."""
    if not isinstance(scores, xr.Dataset) or metric not in scores:
        return scores
    score = scores[metric]
    possible = [str(dim) for dim in score.dims if dim not in ("layer", *REPEATED)]
    if rows == "probe" and "probe" not in possible:
        score = score.expand_dims("probe" if "probe" in score.coords else {"probe": [metric]})
    elif rows not in possible:
        known = ", ".join(map(repr, dict.fromkeys(["probe", *possible])))
        raise InvalidArgumentError(f"rows={rows!r:.60} is no dim of the rows of {metric!r}: use one of {known}")
    return scores.drop_vars(metric).assign({metric: score if "fold" in score.dims else score.expand_dims("fold")})


def _name_rows(each: xr.DataArray, rows: str) -> tuple[list[str], Any]:
    """What the rows are called, and which of them are controls."""
    labels = each[rows].values.tolist() if rows in each.coords else list(range(each.sizes[rows]))
    names = [f"{label:g}" if isinstance(label, float) else str(label) for label in labels]
    kinds = np.broadcast_to(each["kind"].values, len(names)).tolist() if rows == "probe" and "kind" in each.coords else [""] * len(names)
    controls = np.array([str(kind) == "control" for kind in kinds], bool)
    return names, controls


def _average(folds: Array) -> tuple[Array, int]:
    """The mean over the last axis, of finite values alone, NaN where there are none; and how many means are not of all values."""
    known = np.isfinite(folds)
    counts = known.sum(axis=-1)
    means = np.where(counts > 0, np.where(known, folds, 0.0).sum(axis=-1) / np.maximum(counts, 1), np.nan)
    return means, int(((counts > 0) & (counts < folds.shape[-1])).sum())


def _limits(numbers: list[float]) -> tuple[float, float]:
    """Ends of a colour scale that has room for all finite numbers."""
    finite = [number for number in numbers if np.isfinite(number)]
    if not finite:
        return 0.0, 1.0
    low, high = min(finite), max(finite)
    return (low, high) if low < high else (low - 0.05, high + 0.05)


def _outline_best(canvas: Canvas, values: Array, wide: float) -> bool:
    """Outline the largest cells of each row that has different ones; says whether there are any. Cells are `wide` points wide."""
    from matplotlib.patches import Rectangle

    any_drawn = False
    for row, cells in enumerate(values):
        known = np.isfinite(cells)
        if not known.any() or np.ptp(cells[known]) <= _EQUAL:
            continue
        for column in np.flatnonzero(known & (cells >= cells[known].max() - _EQUAL)).tolist():
            # Black within white can be seen on every colour.
            for colour, line in (("white", 3.2), ("black", 1.6)):
                style: dict[str, Any] = {"fill": False, "edgecolor": colour, "linewidth": min(line, 0.2 * line * wide / 3.2), "zorder": 3}
                canvas.axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, gid="best", **style))
            any_drawn = True
    return any_drawn


def _remarks(*, outlined: bool, partial: int, levels: dict[str, float]) -> list[str]:
    """What a reader has to know of the marks."""
    remarks = ["outlined: best of its row, chosen by these very scores, and so too good"] if outlined else []
    remarks += [f"line in the bar: {name} ({level:.2f})" for name, level in levels.items()]
    if partial:
        cells = "1 cell is the mean" if partial == 1 else f"{partial} cells are means"
        remarks.append(f"{cells} of some of the folds only: the others have no score")
    return remarks


def _how(n_folds: int, *, smaller: bool) -> str:
    of = f"mean of {n_folds} folds" if n_folds > 1 else "one value"
    return f"{of}, less is better" if smaller else of


def _title_parts(scores: xr.Dataset, each: xr.DataArray, rows: str) -> list[str]:
    """Model, labels and variable, and what was selected of other dims."""
    selected = {
        name: each.coords[name].item() for name in ("probe", "variable", "label", "strength") if name in each.coords and not each[name].ndim
    }
    variable = "" if rows == "variable" or "variable" in selected else str(scores.attrs.get("variable", ""))
    of = " from ".join(part for part in (str(scores.attrs.get("labels", "")), variable) if part)
    shown = [f"{name} {value:g}" if isinstance(value, float) else str(value) for name, value in selected.items() if name != rows]
    return [str(scores.attrs.get("model", "")), of, *shown]
