"""Pictures of scores, with matplotlib, and their files. Never computes a score; matplotlib is imported when something is drawn."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_scores", "save_plot"]

# Source: M. Okabe and K. Ito, "Color Universal Design" (2008), without yellow (too light on white) and black (used for chance).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_DASHES = ("--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
_LABELS = {"accuracy": "accuracy", "auroc": "AUROC", "fit_seconds": "fit time (s)"}


def plot_scores(
    scores: xr.Dataset, metric: str = "accuracy", ax: Axes | None = None, baseline: float | Mapping[str, float] | None = None
) -> Axes:
    """Axes with one line per probe: the mean of a score over the folds by layer, and a band from the lowest to the highest fold.

    Parameters
    ----------
    scores : Dataset
        From :func:`lmprobe_zarr.sweep`.
    metric : str
        A variable with dims (layer, probe, fold): "accuracy", "auroc" or "fit_seconds".
    ax : matplotlib Axes, optional
        Where to draw. Without it a new figure is made: by pyplot in a notebook or where the caller has imported pyplot, so that
        it is shown; else a bare figure, which needs no display and can be saved with :func:`save_plot`.
    baseline : float or {label: float}, optional
        Scores to draw as horizontal lines, such as ``{"bag of words": 0.71}``.

    Returns
    -------
    Axes
        Chance is drawn too: the share of the largest class for accuracy, 0.5 for AUROC. No matplotlib setting is changed.

    Raises
    ------
    MissingDependencyError
        matplotlib is not installed.
    InvalidTypeError
        `scores` is no dataset.
    InvalidArgumentError
        There is no such metric over layer, probe and fold.
    """
    values = _metric(scores, metric)
    lines = dict(baseline) if isinstance(baseline, Mapping) else {} if baseline is None else {"baseline": float(baseline)}
    axes: Any = _axes() if ax is None else ax

    layers = values["layer"].values
    numeric = layers.dtype.kind in "iuf"
    x = layers if numeric else np.arange(len(layers))
    order = np.argsort(x)
    for number, probe in enumerate(values["probe"].values):
        _draw_probe(
            axes, x[order], values.sel(probe=probe).values[order], str(probe) + _unconverged(scores, probe), number, values.sizes["probe"]
        )
    for number, (label, height) in enumerate({**_chance(scores, metric), **lines}.items()):
        # Chance comes first and is black; what the caller adds is grey and told apart by its dashes.
        colour = "black" if number == 0 and label not in lines else "0.35"
        axes.axhline(
            height, color=colour, linestyle=_DASHES[number % len(_DASHES)], linewidth=1.2, zorder=1.5, label=f"{label} ({height:.2f})"
        )

    _dress(axes, scores, metric, x[order], layers[order] if not numeric else None, values.sizes["fold"])
    if ax is None:
        # Below the picture no curve can run behind it; the caller's own axes may have no room there.
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False, fontsize="small")
    else:
        axes.legend(frameon=True, framealpha=0.9, edgecolor="0.85", fontsize="small")
    return axes  # type: ignore[no-any-return]


def save_plot(axes: Axes, path: str | PathLike[str], dpi: int = 150) -> None:
    """Writes the whole figure of some axes to a file, whose ending says in which format.

    Parameters
    ----------
    axes : matplotlib Axes
        From :func:`plot_scores`.
    path : str or path
        With an ending that matplotlib knows, such as ``.png``, ``.svg`` or ``.pdf``. A file that is there is replaced, once the
        picture is drawn.
    dpi : int
        Dots per inch; formats of lines take no heed of it.

    Raises
    ------
    InvalidArgumentError
        Another ending or none, or the picture cannot be drawn or written.
    """
    path = Path(path)
    # Through the canvas: axes may lie in a part of a figure, which cannot be saved by itself.
    canvas = axes.figure.canvas
    endings = sorted(canvas.get_supported_filetypes())
    ending = path.suffix.lower().removeprefix(".")
    valid = f"use a path that can be written and ends with one of {', '.join(f'.{known}' for known in endings)}"
    if ending not in endings:
        raise InvalidArgumentError(f"{str(path)!r} has {f'the ending .{ending}' if ending else 'no ending'} for a picture: {valid}")
    drawn = io.BytesIO()
    try:
        canvas.figure.savefig(drawn, format=ending, dpi=dpi)
        path.write_bytes(drawn.getvalue())
    except (OSError, RuntimeError, ValueError) as error:
        raise InvalidArgumentError(f"the picture cannot be written to {str(path)!r} ({error}): {valid}") from error


def _metric(scores: Any, metric: str) -> xr.DataArray:
    if not isinstance(scores, xr.Dataset):
        raise InvalidTypeError(f"scores are the xarray.Dataset that sweep gives, not {type(scores).__name__}")
    dims = {"layer", "probe", "fold"}
    fitting = [str(name) for name, variable in scores.data_vars.items() if set(variable.dims) == dims and variable.dtype.kind == "f"]
    if metric not in fitting:
        raise InvalidArgumentError(
            f"there is no score {metric!r} over layer, probe and fold: use one of {', '.join(fitting) or 'none (not a sweep)'}"
        )
    return scores[metric].transpose("layer", "probe", "fold")


def _axes() -> Any:
    """Axes of a new figure, shown where the caller looks at figures."""
    shell = sys.modules.get("IPython")
    try:
        # pyplot picks a backend for the whole process and keeps every figure alive: only where it is in use anyway.
        if "matplotlib.pyplot" in sys.modules or (shell is not None and shell.get_ipython() is not None):
            import matplotlib.pyplot as plt

            return plt.subplots(figsize=(7.2, 4.2), layout="constrained")[1]
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError('plots need matplotlib, which is not installed: pip install "lmprobe-zarr[plot]"') from error
    return Figure(figsize=(7.2, 4.2), layout="constrained").subplots()


def _draw_probe(axes: Any, x: Any, values: Any, label: str, number: int, of: int) -> None:
    """One line with its band; `values` has shape (layer, fold)."""
    defined = ~np.isnan(values).all(axis=1)
    if not defined.any():
        axes.plot([], [], color=_COLOURS[number % len(_COLOURS)], label=f"{label} (undefined)")
        return
    x, values = x[defined], values[defined]
    mean, low, high = np.nanmean(values, axis=1), np.nanmin(values, axis=1), np.nanmax(values, axis=1)
    if len(x) == 1:
        # Side by side, or the bars would hide one another.
        x = x + (number - (of - 1) / 2) * 0.8 / of
    colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
    axes.plot(
        x,
        mean,
        color=colour,
        marker=marker,
        # About twenty marks are told apart on one line; probes start at different layers so that marks do not lie on one another.
        markevery=(number % max(1, len(x) // 20), max(1, len(x) // 20)),
        markersize=5.5,
        markeredgecolor="white",
        markeredgewidth=0.6,
        linewidth=1.8,
        label=label,
        zorder=3,
    )
    if len(x) == 1:
        axes.errorbar(x, mean, yerr=np.stack([mean - low, high - mean]), color=colour, capsize=4, linewidth=1.2, zorder=2)
    else:
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0, zorder=2)


def _unconverged(scores: xr.Dataset, probe: Any) -> str:
    if "converged" not in scores:
        return ""
    ended = scores["converged"].sel(probe=probe)
    stopped = int((~ended).sum())
    return f" ({stopped} of {ended.size} fits not converged)" if stopped else ""


def _chance(scores: xr.Dataset, metric: str) -> dict[str, float]:
    if metric == "auroc":
        return {"chance": 0.5}
    if metric == "accuracy" and "majority_share" in scores.attrs:
        return {"majority class": float(scores.attrs["majority_share"])}
    return {}


def _dress(axes: Any, scores: xr.Dataset, metric: str, x: Any, names: Any, n_folds: int) -> None:
    from matplotlib.ticker import MaxNLocator

    if names is not None or len(x) <= 16:
        every = max(1, -(-len(x) // 16))
        axes.set_xticks(x[::every], [str(name) for name in (x if names is None else names)[::every]])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    if len(x) == 1:
        axes.set_xlim(x[0] - 1, x[0] + 1)
    else:
        margin = 0.02 * (x[-1] - x[0])
        axes.set_xlim(x[0] - margin, x[-1] + margin)
    axes.set_xlabel("layer")
    spread = f"mean of {n_folds} folds, {'bar' if len(x) == 1 else 'band'}: lowest to highest" if n_folds > 1 else "one fold"
    axes.set_ylabel(f"{_LABELS.get(metric, metric)}\n({spread})", linespacing=1.5)
    variable, labels = scores.attrs.get("variable", ""), scores.attrs.get("labels", "")
    of = " from ".join(part for part in (labels, variable) if part)
    model = scores.attrs.get("model", "")
    axes.set_title(" · ".join(part for part in (model, of) if part), fontsize="medium")
    axes.grid(visible=True, color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
