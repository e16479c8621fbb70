"""ROC and calibration curves in a unit square."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import xarray as xr

from lmprobe_zarr.errors import InvalidTypeError
from lmprobe_zarr.plots.layout import Canvas, Entry, finish, label_limit, open_canvas
from lmprobe_zarr.plots.style import COLOURS, LINES, MARKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_calibration", "plot_roc"]

#: Inches of the side of a new figure's axes.
_SIDE = 3.9


def plot_roc(curves: xr.Dataset, ax: Axes | None = None, *, width: Literal["page", "column"] | float = "page") -> Axes:
    """Axes with ROC curves: the share of the second class that is found, by the share of the first class that is mistaken for it.

    Parameters
    ----------
    curves : Dataset
        From :func:`lmprobe_zarr.probes.roc_curves`.
    ax : matplotlib Axes, optional
    width : {"page", "column"} or float
        As for :func:`plot_scores`. The square may be narrower than the page.

    Returns
    -------
    matplotlib Axes

    Raises
    ------
    MissingDependencyError
        matplotlib is not installed.
    InvalidTypeError
        `curves` is not such a dataset.
    InvalidArgumentError
        A width that no figure can have.
    """
    _check_curves(curves, "true_positive_rate", "roc_curves")
    canvas = open_canvas(ax, width)
    axes = canvas.axes
    names = canvas.lettering.fit_all(curves["curve"].values, label_limit(curves.sizes["curve"], canvas))
    entries = [_draw_diagonal(canvas, "chance (0.50)")]
    for number, name in enumerate(names):
        curve = curves.isel(curve=number).dropna("point")
        label = f"{name} ({float(curve['auroc']):.2f})"
        entries.append(_draw_curve(canvas, curve["false_positive_rate"].values, curve["true_positive_rate"].values, label, number))
    axes.set_xlabel("false positive rate")
    axes.set_ylabel("true positive rate")
    _finish_square(canvas, entries, "AUROC")
    return axes  # type: ignore[no-any-return]


def plot_calibration(curves: xr.Dataset, ax: Axes | None = None, *, width: Literal["page", "column"] | float = "page") -> Axes:
    """Axes with calibration curves: how often the second class is true, by the probability that a probe gives it.

    Parameters
    ----------
    curves : Dataset
        From :func:`lmprobe_zarr.probes.calibration_curves`.
    ax : matplotlib Axes, optional
    width : {"page", "column"} or float
        As for :func:`plot_scores`. The square may be narrower than the page.

    Returns
    -------
    Axes
        Markers grow with the number of predictions in their bin.

    Raises
    ------
    MissingDependencyError
        matplotlib is not installed.
    InvalidTypeError
        `curves` is not such a dataset.
    InvalidArgumentError
        A width that no figure can have.
    """
    _check_curves(curves, "observed", "calibration_curves")
    canvas = open_canvas(ax, width)
    axes = canvas.axes
    names = canvas.lettering.fit_all(curves["curve"].values, label_limit(curves.sizes["curve"], canvas))
    entries = [_draw_diagonal(canvas, "calibrated")]
    most = float(curves["n"].max()) or 1.0
    for number, name in enumerate(names):
        curve = curves.isel(curve=number)
        curve = curve.isel(bin=curve["n"].values > 0)
        x, y = curve["predicted"].values, curve["observed"].values
        entries.append(_draw_curve(canvas, x, y, f"{name} (ECE {float(curve['ece']):.2f})", number, marks=False))
        sizes = 16 + 90 * curve["n"].values / most
        mark, colour = MARKERS[number % len(MARKERS)], COLOURS[number % len(COLOURS)]
        axes.scatter(x, y, s=sizes, marker=mark, color=colour, edgecolor=canvas.tones.ground, zorder=4)
    axes.set_xlabel("predicted probability")
    axes.set_ylabel("observed share")
    _finish_square(canvas, entries, None)
    return axes  # type: ignore[no-any-return]


def _check_curves(curves: Any, variable: str, made_by: str) -> None:
    if not isinstance(curves, xr.Dataset) or variable not in curves or "curve" not in curves.dims:
        raise InvalidTypeError(f"curves are the xarray.Dataset that probes.{made_by} gives, not {type(curves).__name__}")


def _draw_diagonal(canvas: Canvas, label: str) -> Entry:
    (line,) = canvas.axes.plot([0, 1], [0, 1], color=canvas.tones.ink, linestyle="--", linewidth=1, label=label, zorder=1.5)
    return line, label


def _draw_curve(canvas: Canvas, x: Any, y: Any, label: str, number: int, *, marks: bool = True) -> Entry:
    (line,) = canvas.axes.plot(
        x,
        y,
        color=COLOURS[number % len(COLOURS)],
        linestyle=LINES[number % len(LINES)],
        marker=MARKERS[number % len(MARKERS)],
        markevery=(0.02 * (number % 6), 0.12) if marks else (0, 1),
        markersize=5,
        markeredgecolor=canvas.tones.ground,
        markeredgewidth=0.6,
        linewidth=1.6,
        label=label,
        zorder=3,
        clip_on=False,
    )
    return line, label


def _finish_square(canvas: Canvas, entries: list[Entry], title: str | None) -> None:
    axes = canvas.axes
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_aspect("equal")
    axes.grid(visible=True, color=canvas.tones.mix(0.1), linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    finish(canvas, (_SIDE, _SIDE), legend=entries, title=title, place="lower right")
