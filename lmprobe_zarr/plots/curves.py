"""ROC and calibration curves in a unit square."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import xarray as xr

from lmprobe_zarr.errors import InvalidTypeError
from lmprobe_zarr.plots.style import COLOURS, LINES, MARKERS, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_calibration", "plot_roc"]


def plot_roc(curves: xr.Dataset, ax: Axes | None = None) -> Axes:
    """Axes with ROC curves: the share of the second class that is found, by the share of the first class that is mistaken for it.

    Parameters
    ----------
    curves : Dataset
        From :func:`lmprobe_zarr.probes.roc_curves`.
    ax : matplotlib Axes, optional
        As for :func:`plot_scores`.

    Returns
    -------
    matplotlib Axes

    Raises
    ------
    MissingDependencyError
        matplotlib is not installed.
    InvalidTypeError
        `curves` is not such a dataset.
    """
    _check_curves(curves, "true_positive_rate", "roc_curves")
    axes: Any = new_axes((4.6, 4.9)) if ax is None else ax
    axes.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1, label="chance (0.50)", zorder=1.5)
    for number, name in enumerate(curves["curve"].values):
        curve = curves.isel(curve=number).dropna("point")
        label = f"{name} ({float(curve['auroc']):.2f})"
        _draw_curve(axes, curve["false_positive_rate"].values, curve["true_positive_rate"].values, label, number)
    axes.set_xlabel("false positive rate")
    axes.set_ylabel("true positive rate")
    _finish_square(axes, "AUROC", ax is None)
    return axes  # type: ignore[no-any-return]


def plot_calibration(curves: xr.Dataset, ax: Axes | None = None) -> Axes:
    """Axes with calibration curves: how often the second class is true, by the probability that a probe gives it.

    Parameters
    ----------
    curves : Dataset
        From :func:`lmprobe_zarr.probes.calibration_curves`.
    ax : matplotlib Axes, optional
        As for :func:`plot_scores`.

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
    """
    _check_curves(curves, "observed", "calibration_curves")
    axes: Any = new_axes((4.6, 4.9)) if ax is None else ax
    axes.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1, label="calibrated", zorder=1.5)
    most = float(curves["n"].max()) or 1.0
    for number, name in enumerate(curves["curve"].values):
        curve = curves.isel(curve=number)
        curve = curve.isel(bin=curve["n"].values > 0)
        x, y = curve["predicted"].values, curve["observed"].values
        _draw_curve(axes, x, y, f"{name} (ECE {float(curve['ece']):.2f})", number, marks=False)
        sizes = 16 + 90 * curve["n"].values / most
        axes.scatter(
            x, y, s=sizes, marker=MARKERS[number % len(MARKERS)], color=COLOURS[number % len(COLOURS)], edgecolor="white", zorder=4
        )
    axes.set_xlabel("predicted probability")
    axes.set_ylabel("observed share")
    _finish_square(axes, None, ax is None)
    return axes  # type: ignore[no-any-return]


def _check_curves(curves: Any, variable: str, made_by: str) -> None:
    if not isinstance(curves, xr.Dataset) or variable not in curves or "curve" not in curves.dims:
        raise InvalidTypeError(f"curves are the xarray.Dataset that probes.{made_by} gives, not {type(curves).__name__}")


def _draw_curve(axes: Any, x: Any, y: Any, label: str, number: int, *, marks: bool = True) -> None:
    axes.plot(
        x,
        y,
        color=COLOURS[number % len(COLOURS)],
        linestyle=LINES[number % len(LINES)],
        marker=MARKERS[number % len(MARKERS)],
        markevery=(0.02 * number, 0.12) if marks else (0, 1),
        markersize=5,
        markeredgecolor="white",
        markeredgewidth=0.6,
        linewidth=1.6,
        label=label,
        zorder=3,
        clip_on=False,
    )


def _finish_square(axes: Any, title: str | None, below: bool) -> None:
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_aspect("equal")
    axes.grid(visible=True, color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    options: dict[str, Any] = {"fontsize": "small", "title": title, "title_fontsize": "small", "handlelength": 3.2}
    if below:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False, **options)
    else:
        axes.legend(loc="lower right", frameon=True, framealpha=0.9, edgecolor="0.85", **options)
