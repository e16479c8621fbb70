"""Pictures of scores, with matplotlib, and their files. Never computes a score; matplotlib is imported when something is drawn."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import xarray as xr

from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_calibration", "plot_cosine", "plot_roc", "plot_scores", "plot_tokens", "plot_transfer", "save_plot"]

# Source: M. Okabe and K. Ito, "Color Universal Design" (2008), without yellow (too light on white) and black (used for chance).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
#: Of probes, so that they are told apart without colour too.
_LINES = ("-", (0, (6, 1.5)), (0, (4, 1.2, 1, 1.2)), (0, (2.5, 1)), (0, (8, 1.5, 1, 1.5, 1, 1.5)))
_DASHES = ("--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
#: Of controls, which are grey, with open markers.
_GREYS = ("0.25", "0.5", "0.4", "0.6")
_LABELS = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "balanced_accuracy": "balanced accuracy",
    "brier": "Brier score",
    "ece": "expected calibration error",
    "f1": "F1",
    "fit_seconds": "fit time (s)",
    "log_loss": "log loss (nats)",
    "mae": "mean absolute error (units of the target)",
    "r2": "R²",
    "spearman": "Spearman's ρ",
}
#: Dims over which a score is repeated: their spread is the band.
_REPEATED = ("fold", "seed", "repeat")
#: Its lightness rises all the way, so that it reads in grey, and blue and yellow are told apart by nearly everybody.
_COLOUR_MAP = "cividis"
_TEXTS_SHOWN, _TEXT_LENGTH = 64, 16


def plot_scores(
    scores: xr.Dataset,
    metric: str = "accuracy",
    ax: Axes | None = None,
    baseline: float | Mapping[str, float] | None = None,
    *,
    intervals: xr.Dataset | None = None,
) -> Axes:
    """Axes with one line per probe: the mean of a score over the folds by layer, and a band around it.

    Parameters
    ----------
    scores : Dataset
        From :func:`lmprobe_zarr.sweep` or :func:`lmprobe_zarr.sweep_tokens`. Probes whose coordinate ``kind`` is "control" are drawn
        grey, with open markers.
    metric : str
        A variable with dims (layer, probe, fold), perhaps seed: "accuracy", "auroc" or "fit_seconds".
    ax : matplotlib Axes, optional
        Where to draw. Without it a new figure is made: by pyplot in a notebook or where the caller has imported pyplot, so that
        it is shown; else a bare figure, which needs no display and can be saved with :func:`save_plot`.
    baseline : float or {label: float}, optional
        Scores to draw as horizontal lines, such as ``{"bag of words": 0.71}``.
    intervals : Dataset, optional
        The metric over layer, probe and ``bound``, which holds "lower" and "upper", to draw as bands; its attribute ``level`` (0 to 1) is
        named where it has one.

    Returns
    -------
    Axes
        Without `intervals` a band reaches from the lowest to the highest fold. Chance is drawn too: the share of the largest class for
        accuracy, 0.5 for AUROC. No matplotlib setting is changed.

    Raises
    ------
    MissingDependencyError
        matplotlib is not installed.
    InvalidTypeError
        `scores` is no dataset.
    InvalidArgumentError
        There is no such metric over layer, probe and fold, or it has further dims.
    """
    values = _metric(scores, metric)
    interval = None if intervals is None else _bounds(intervals, metric, values)
    lines = dict(baseline) if isinstance(baseline, Mapping) else {} if baseline is None else {"baseline": float(baseline)}
    axes: Any = _axes() if ax is None else ax

    layers = values["layer"].values
    numeric = layers.dtype.kind in "iuf"
    x = layers if numeric else np.arange(len(layers))
    order = np.argsort(x)
    probes = values["probe"].values
    controls = [str(kind) == "control" for kind in scores["kind"].values] if "kind" in scores.coords else [False] * len(probes)
    for number, probe in enumerate(probes):
        label = str(probe) + _unconverged(scores, probe)
        drawn = _Drawn(label, sum(controls[n] == controls[number] for n in range(number)), controls[number], number, len(probes))
        bounds = None if interval is None else [bound.sel(probe=probe).values[order] for bound in interval]
        _draw_probe(axes, x[order], values.sel(probe=probe).values[order], drawn, bounds)
    for number, (label, height) in enumerate({**_chance(scores, metric), **lines}.items()):
        # Chance comes first and is black; what the caller adds is grey and told apart by its dashes.
        colour = "black" if number == 0 and label not in lines else "0.35"
        axes.axhline(
            height, color=colour, linestyle=_DASHES[number % len(_DASHES)], linewidth=1.2, zorder=1.5, label=f"{label} ({height:.2f})"
        )

    _dress(axes, scores, metric, x[order], layers[order] if not numeric else None, values.sizes["fold"], intervals)
    if ax is None:
        # Below the picture no curve can run behind it; the caller's own axes may have no room there.
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False, fontsize="small", handlelength=3.2)
    else:
        axes.legend(frameon=True, framealpha=0.9, edgecolor="0.85", fontsize="small", handlelength=3.2)
    return axes  # type: ignore[no-any-return]


def plot_tokens(scores: xr.DataArray, prompt: str | None = None, ax: Axes | None = None) -> Axes:
    """Axes with the score of every token of one prompt at every layer, as colours.

    Parameters
    ----------
    scores : DataArray, dims (layer, token), or (token)
        From :func:`lmprobe_zarr.score_tokens`. Of a probe with more classes select one, ``scores.sel({"class": …})``.
    prompt : str, optional
        The hash or the text of one prompt, where `scores` holds more than one.
    ax : matplotlib Axes, optional
        As for :func:`plot_scores`.

    Returns
    -------
    Axes
        Colours are the same distance from 0 on both sides, which is where the class changes; what is NaN is hatched. Up to 64 tokens are
        named by ``token_text``, cut to 16 characters, with ␣ for spaces and ↵ for line breaks; more, or without texts, by their position.

    Raises
    ------
    MissingDependencyError
        matplotlib is not installed.
    InvalidTypeError, InvalidArgumentError
        Something else than scores of tokens, several prompts, or a prompt that is not among them.
    """
    if not isinstance(scores, xr.DataArray):
        raise InvalidTypeError(f"scores are the xarray.DataArray that score_tokens gives, not {type(scores).__name__}")
    if "token" not in scores.dims or not set(scores.dims) <= {"layer", "token"}:
        raise InvalidArgumentError(
            f"scores have dims {tuple(scores.dims)}, expected (layer, token): select one class, or score every token"
        )
    one = _of_one_prompt(scores, prompt)
    one = one if "layer" in one.dims else one.expand_dims("layer")
    values = one.transpose("layer", "token").values.astype(float)
    layers = one["layer"].values if "layer" in one.coords else np.arange(len(values))
    places = one["position"].values if "position" in one.coords else np.arange(values.shape[1])
    texts = [_shown(text) for text in one["token_text"].values.tolist()] if "token_text" in one.coords else []
    named = bool(texts) and len(places) <= _TEXTS_SHOWN
    width = float(np.clip(1.9 + 0.17 * len(places), 5.0, 12.6))
    height = float(np.clip(1.5 + 0.11 * len(layers) + (0.065 * max(map(len, texts)) if named else 0.2), 2.6, 8.0))
    axes: Any = _axes((width, height)) if ax is None else ax
    largest = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 1.0
    mesh = _mesh(axes, values, -(largest or 1.0), largest or 1.0)
    _ticks(axes.yaxis, [str(layer) for layer in layers], 16)
    if named:
        axes.set_xticks(np.arange(len(places)), texts, rotation=90, fontsize=8)
    else:
        _ticks(axes.xaxis, [str(place) for place in places], 16)
    axes.set_xlabel("token" if named else "position of the token")
    axes.set_ylabel("layer")
    bar = axes.figure.colorbar(mesh, ax=axes, pad=0.015, aspect=24)
    classes = scores.attrs.get("classes", [])
    bar.set_label("score" + (f" (above 0: {_shown(str(classes[1]))})" if len(classes) == 2 else ""))
    bar.ax.axhline(0, color="white", linewidth=1.2)
    title = [str(one.coords["model"].item())] if "model" in one.coords and one.coords["model"].ndim == 0 else []
    title += [str(scores.attrs.get("labels", "")), str(scores.attrs.get("probe", ""))]
    axes.set_title(" · ".join(part for part in title if part), fontsize="medium")
    return axes  # type: ignore[no-any-return]


def plot_roc(curves: xr.Dataset, ax: Axes | None = None) -> Axes:
    """Axes with one ROC curve each: the share of the second class that is found, by the share of the first that is taken for it.

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
        Something else.
    """
    _check_curves(curves, "true_positive_rate", "roc_curves")
    axes: Any = _axes((4.6, 4.9)) if ax is None else ax
    axes.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1, label="chance (0.50)", zorder=1.5)
    for number, name in enumerate(curves["curve"].values):
        one = curves.isel(curve=number).dropna("point")
        label = f"{name} ({float(one['auroc']):.2f})"
        _draw_curve(axes, one["false_positive_rate"].values, one["true_positive_rate"].values, label, number)
    axes.set_xlabel("false positive rate")
    axes.set_ylabel("true positive rate")
    _square(axes, "AUROC", ax is None)
    return axes  # type: ignore[no-any-return]


def plot_calibration(curves: xr.Dataset, ax: Axes | None = None) -> Axes:
    """Axes with one curve each: how often the second class is true where a probe says it with some probability.

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
        Something else.
    """
    _check_curves(curves, "observed", "calibration_curves")
    axes: Any = _axes((4.6, 4.9)) if ax is None else ax
    axes.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1, label="calibrated", zorder=1.5)
    most = float(curves["n"].max()) or 1.0
    for number, name in enumerate(curves["curve"].values):
        one = curves.isel(curve=number)
        one = one.isel(bin=one["n"].values > 0)
        x, y = one["predicted"].values, one["observed"].values
        _draw_curve(axes, x, y, f"{name} (ECE {float(one['ece']):.2f})", number, marks=False)
        sizes = 16 + 90 * one["n"].values / most
        axes.scatter(
            x, y, s=sizes, marker=_MARKERS[number % len(_MARKERS)], color=_COLOURS[number % len(_COLOURS)], edgecolor="white", zorder=4
        )
    axes.set_xlabel("predicted probability")
    axes.set_ylabel("observed share")
    _square(axes, None, ax is None)
    return axes  # type: ignore[no-any-return]


def plot_transfer(scores: xr.Dataset, metric: str = "accuracy", ax: Axes | None = None) -> Axes:
    """Axes with a score for every pair of training and test set, as colours and numbers.

    Parameters
    ----------
    scores : Dataset
        From :func:`lmprobe_zarr.sweep_transfer`, of one layer and probe: ``scores.sel(layer=16, probe="mass_mean")``.
    metric : str
        "accuracy" or "auroc".
    ax : matplotlib Axes, optional
        As for :func:`plot_scores`.

    Returns
    -------
    matplotlib Axes

    Raises
    ------
    MissingDependencyError
        matplotlib is not installed.
    InvalidTypeError, InvalidArgumentError
        Something else, another metric, or several layers or probes.
    """
    if not isinstance(scores, xr.Dataset) or not {"train", "test"} <= set(scores.dims):
        raise InvalidTypeError("scores are the xarray.Dataset that sweep_transfer gives, with dims train and test")
    if metric not in scores or not {"train", "test"} <= set(scores[metric].dims):
        raise InvalidArgumentError(f"there is no score {metric!r} over train and test: use 'accuracy' or 'auroc'")
    values = scores[metric]
    for dim in set(values.dims) - {"train", "test"}:
        if values.sizes[dim] > 1:
            raise InvalidArgumentError(
                f"there are {values.sizes[dim]} along {dim!r}: draw one, as in scores.sel({dim}={values[dim].values[0].item()!r})"
            )
    at = {str(dim): values[dim].values[0] for dim in values.dims if dim not in ("train", "test")}
    at |= {name: values.coords[name].item() for name in ("layer", "probe") if name in values.coords and not values.coords[name].ndim}
    matrix = values.squeeze(drop=True).transpose("train", "test")
    limits = (0.5, 1.0) if np.nanmin(matrix) >= 0.5 else (0.0, 1.0)
    axes = _draw_matrix(matrix.values, matrix["train"].values, matrix["test"].values, limits, _LABELS.get(metric, metric), ax)
    axes.set_xlabel(f"tested on (diagonal: {scores.attrs['cv']} folds)" if "cv" in scores.attrs else "tested on")
    axes.set_ylabel("fitted on")
    title = [str(scores.attrs.get("model", "")), str(at.get("probe", "")), f"layer {at['layer']}" if "layer" in at else ""]
    axes.set_title(" · ".join(part for part in title if part), fontsize="medium")
    return axes  # type: ignore[no-any-return]


def plot_cosine(matrix: xr.DataArray, ax: Axes | None = None) -> Axes:
    """Axes with the cosine of every two directions, as colours, and as numbers where there are at most twelve.

    Parameters
    ----------
    matrix : DataArray, dims (direction, other)
        From :func:`lmprobe_zarr.cosine_similarity`.
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
        Something else.
    """
    if not isinstance(matrix, xr.DataArray) or set(matrix.dims) != {"direction", "other"}:
        raise InvalidTypeError("matrix is the xarray.DataArray that cosine_similarity gives, with dims (direction, other)")
    turned = matrix.transpose("direction", "other")
    drawn = _draw_matrix(turned.values, turned["direction"].values, turned["other"].values, (-1.0, 1.0), "cosine similarity", ax)
    return cast("Axes", drawn)


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
    """The score with all that repeats it along one ``fold``."""
    if not isinstance(scores, xr.Dataset):
        raise InvalidTypeError(f"scores are the xarray.Dataset that sweep gives, not {type(scores).__name__}")
    dims = {"layer", "probe", "fold"}
    fitting = [str(name) for name, variable in scores.data_vars.items() if dims <= set(variable.dims) and variable.dtype.kind == "f"]
    if metric not in fitting:
        raise InvalidArgumentError(
            f"there is no score {metric!r} over layer, probe and fold: use one of {', '.join(fitting) or 'none (not a sweep)'}"
        )
    values = scores[metric]
    for dim in [str(dim) for dim in values.dims if dim not in ("layer", "probe", *_REPEATED)]:
        if values.sizes[dim] > 1:
            shown = values[dim].values[0].item() if dim in values.coords else 0
            raise InvalidArgumentError(
                f"there are {values.sizes[dim]} along {dim!r}: draw one at a time, as in scores.sel({dim}={shown!r})"
            )
        values = values.isel({dim: 0}, drop=True)
    repeated = [dim for dim in _REPEATED if dim in values.dims]
    if len(repeated) > 1:
        plain = values.drop_vars([name for name in values.coords if set(values.coords[name].dims) & set(repeated)])
        values = plain.stack(one_fold=repeated, create_index=False).rename(one_fold="fold")
    return values.transpose("layer", "probe", "fold")


def _bounds(intervals: Any, metric: str, values: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray]:
    """Lower and upper bound of a score by layer and probe, in the order of the scores."""
    if not isinstance(intervals, xr.Dataset) or metric not in intervals or not {"layer", "probe", "bound"} <= set(intervals[metric].dims):
        raise InvalidArgumentError(f"intervals have no {metric!r} over layer, probe and bound: give those of the same scores")
    found = intervals[metric].squeeze([d for d in intervals[metric].dims if d not in ("layer", "probe", "bound")], drop=True)
    found = found.reindex(layer=values["layer"], probe=values["probe"]).transpose("layer", "probe", "bound")
    return found.sel(bound="lower"), found.sel(bound="upper")


def _axes(size: tuple[float, float] = (7.2, 4.2)) -> Any:
    """Axes of a new figure, shown where the caller looks at figures; `size` in inches."""
    shell = sys.modules.get("IPython")
    try:
        # pyplot picks a backend for the whole process and keeps every figure alive: only where it is in use anyway.
        if "matplotlib.pyplot" in sys.modules or (shell is not None and shell.get_ipython() is not None):
            import matplotlib.pyplot as plt

            return plt.subplots(figsize=size, layout="constrained")[1]
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError('plots need matplotlib, which is not installed: pip install "lmprobe-zarr[plot]"') from error
    return Figure(figsize=size, layout="constrained").subplots()


@dataclass(frozen=True, slots=True)
class _Drawn:
    """How one probe is drawn: `number` among its kind gives its look, `place` among all `of` where it stands."""

    label: str
    number: int
    control: bool
    place: int
    of: int

    @property
    def colour(self) -> str:
        return _GREYS[self.number % len(_GREYS)] if self.control else _COLOURS[self.number % len(_COLOURS)]

    @property
    def marker(self) -> str:
        # From the other end, so that the first control has not the first probe's.
        return _MARKERS[-1 - self.number % len(_MARKERS)] if self.control else _MARKERS[self.number % len(_MARKERS)]

    @property
    def line(self) -> Any:
        return (0, (1, 1.2)) if self.control else _LINES[self.number % len(_LINES)]


def _draw_probe(axes: Any, x: Any, values: Any, drawn: _Drawn, bounds: list[Any] | None) -> None:
    """One line with its band; `values` has shape (layer, fold)."""
    defined = ~np.isnan(values).all(axis=1)
    if not defined.any():
        axes.plot([], [], color=drawn.colour, label=f"{drawn.label} (undefined)")
        return
    x, values = x[defined], values[defined]
    mean = np.nanmean(values, axis=1)
    low, high = (np.nanmin(values, axis=1), np.nanmax(values, axis=1)) if bounds is None else (bound[defined] for bound in bounds)
    if len(x) == 1:
        # Side by side, or the bars would hide one another.
        x = x + (drawn.place - (drawn.of - 1) / 2) * 0.8 / drawn.of
    # About twenty marks are told apart on one line; probes start at different layers so that marks do not lie on one another.
    step = max(1, len(x) // 20)
    axes.plot(
        x,
        mean,
        color=drawn.colour,
        linestyle=drawn.line,
        marker=drawn.marker,
        markevery=(drawn.place % step, step),
        markersize=5 if drawn.control else 5.5,
        markerfacecolor="white" if drawn.control else drawn.colour,
        markeredgecolor=drawn.colour if drawn.control else "white",
        markeredgewidth=1 if drawn.control else 0.6,
        linewidth=1.2 if drawn.control else 1.8,
        label=drawn.label + (" (control)" if drawn.control and "control" not in drawn.label else ""),
        zorder=2.5 if drawn.control else 3,
    )
    if len(x) == 1:
        # An interval need not hold the mean over the folds.
        lengths = np.maximum(np.stack([mean - low, high - mean]), 0)
        axes.errorbar(x, mean, yerr=lengths, color=drawn.colour, capsize=4, linewidth=1.2, zorder=2)
    else:
        axes.fill_between(x, low, high, color=drawn.colour, alpha=0.1 if drawn.control else 0.15, linewidth=0, zorder=2)


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


def _dress(axes: Any, scores: xr.Dataset, metric: str, x: Any, names: Any, n_folds: int, intervals: Any) -> None:
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
    band = "bar" if len(x) == 1 else "band"
    spread = f"mean of {n_folds} folds" if n_folds > 1 else "one fold"
    if intervals is not None:
        level = intervals.attrs.get("level")
        spread += f", {band}: {'' if level is None else f'{100 * level:g} % '}interval"
    elif n_folds > 1:
        spread += f", {band}: lowest to highest"
    axes.set_ylabel(f"{_LABELS.get(metric, metric)}\n({spread})", linespacing=1.5)
    variable, labels = scores.attrs.get("variable", ""), scores.attrs.get("labels", "")
    of = " from ".join(part for part in (labels, variable) if part)
    model = scores.attrs.get("model", "")
    axes.set_title(" · ".join(part for part in (model, of) if part), fontsize="medium")
    axes.grid(visible=True, color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


# -- colours and curves ----------------------------------------------------------------------------------------------------


def _of_one_prompt(scores: xr.DataArray, prompt: str | None) -> xr.DataArray:
    if prompt is not None:
        from lmprobe_zarr.batch import prompt_hash

        held = set(scores["prompt"].values.tolist()) if "prompt" in scores.coords else set()
        chosen = next((key for key in (prompt, prompt_hash(prompt)) if key in held), None)
        if chosen is None:
            raise InvalidArgumentError(
                f"there are no scores of that prompt among those of {len(held)} prompts: give its hash or its whole text"
            )
        return scores.isel(token=scores["prompt"].values == chosen)
    several = len(set(scores["prompt"].values.tolist())) if "prompt" in scores.coords and scores["prompt"].ndim else 1
    if several > 1:
        raise InvalidArgumentError(f"there are tokens of {several} prompts, and one is drawn: give prompt=, its hash or its text")
    return scores


def _shown(text: str) -> str:
    """A short text in which every character is seen."""
    plain = str(text).replace(" ", "␣").replace("\n", "↵").replace("\t", "→").replace("\r", "")
    # As it is: no mathematics of matplotlib's in it.
    plain = (plain if len(plain) <= _TEXT_LENGTH else plain[: _TEXT_LENGTH - 1] + "…").replace("$", r"\$")
    return plain or "∅"


def _mesh(axes: Any, values: Any, low: float, high: float) -> Any:
    """Cells in the middle of whole numbers; NaN is hatched."""
    edges = [np.arange(n + 1) - 0.5 for n in values.shape]
    mesh = axes.pcolormesh(edges[1], edges[0], np.ma.masked_invalid(values), cmap=_COLOUR_MAP, vmin=low, vmax=high, rasterized=True)
    if np.isnan(values).any():
        axes.patch.set(hatch="////", edgecolor="0.6", facecolor="white")
    return mesh


def _ticks(axis: Any, names: list[str], most: int) -> None:
    least = -(-len(names) // most)
    # Steps that people count in.
    every = next(step * 10**power for power in range(9) for step in (1, 2, 5) if step * 10**power >= least)
    places = np.arange(0, len(names), every)
    axis.set_ticks(places, [names[place] for place in places])


def _draw_matrix(values: Any, rows: Any, columns: Any, limits: tuple[float, float], label: str, ax: Axes | None) -> Any:
    side = float(np.clip(1.6 + 0.55 * len(rows), 3.2, 7.0))
    axes: Any = _axes((side + 1.4, side)) if ax is None else ax
    mesh = _mesh(axes, values.astype(float), *limits)
    axes.invert_yaxis()
    axes.set_aspect("equal")
    for axis, names in ((axes.yaxis, rows), (axes.xaxis, columns)):
        _ticks(axis, [name if len(name) <= 24 else name[:23] + "…" for name in map(str, names)], 24)
    axes.tick_params(axis="x", rotation=90 if max((len(str(name)) for name in columns), default=0) > 4 else 0)
    if max(values.shape) <= 12:
        middle = sum(limits) / 2
        for (row, column), value in np.ndenumerate(values):
            if not np.isnan(value):
                # Dark on what is light, the other way round on what is dark.
                colour = "black" if value > middle else "white"
                axes.text(column, row, f"{value:.2f}".replace("-", "−"), ha="center", va="center", color=colour, fontsize=8)
    axes.figure.colorbar(mesh, ax=axes, pad=0.02, aspect=24, shrink=0.9).set_label(label)
    return axes


def _check_curves(curves: Any, variable: str, made_by: str) -> None:
    if not isinstance(curves, xr.Dataset) or variable not in curves or "curve" not in curves.dims:
        raise InvalidTypeError(f"curves are the xarray.Dataset that probes.{made_by} gives, not {type(curves).__name__}")


def _draw_curve(axes: Any, x: Any, y: Any, label: str, number: int, *, marks: bool = True) -> None:
    axes.plot(
        x,
        y,
        color=_COLOURS[number % len(_COLOURS)],
        linestyle=_LINES[number % len(_LINES)],
        marker=_MARKERS[number % len(_MARKERS)],
        markevery=(0.02 * number, 0.12) if marks else (0, 1),
        markersize=5,
        markeredgecolor="white",
        markeredgewidth=0.6,
        linewidth=1.6,
        label=label,
        zorder=3,
        clip_on=False,
    )


def _square(axes: Any, title: str | None, below: bool) -> None:
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
