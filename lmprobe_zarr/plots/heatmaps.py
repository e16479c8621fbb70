"""Coloured grids: scores of one prompt's tokens by layer, and square matrices of scores or cosines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import xarray as xr

from lmprobe_zarr.batch import prompt_hash
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.interchange import read_list
from lmprobe_zarr.plots.layout import finish_figure, finish_given
from lmprobe_zarr.plots.names import Lettering
from lmprobe_zarr.plots.style import SCORE_LABELS, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_cosine", "plot_tokens", "plot_transfer"]

#: Its lightness rises monotonically, so it also works in grey; blue and yellow are distinguishable with almost any colour vision.
_COLOUR_MAP = "cividis"
_TEXTS_SHOWN, _TEXT_LENGTH = 64, 16
#: Up to so many rows of a matrix are all named.
_NAMES_SHOWN = 60
#: Inches between the names of two rows, at least; points of the smallest letters.
_LINE, _SMALLEST = 0.17, 5.0


def plot_tokens(scores: xr.DataArray, prompt: str | None = None, ax: Axes | None = None) -> Axes:
    """Axes with the score of every token of one prompt at every layer, as colours.

    Parameters
    ----------
    scores : DataArray, dims (layer, token), or (token)
        From :func:`lmprobe_zarr.score_tokens`, or weights from :func:`lmprobe_zarr.pooling_weights`. Of several classes or heads select
        one, ``scores.sel({"class": …})``.
    prompt : str, optional
        The hash or the text of one prompt, if `scores` holds more than one.
    ax : matplotlib Axes, optional
        As for :func:`plot_scores`.

    Returns
    -------
    Axes
        The colour scale is symmetric about 0, where the predicted class changes; of weights it begins at 0. NaN is hatched. Up to 64 tokens
        are labelled by ``token_text``, cut to 16 characters, with ␣ for spaces and ↵ for line breaks. More tokens, or tokens without texts,
        are labelled by their position. Characters that no installed font has are drawn as ▯, and a note in the picture says of which
        scripts they are.

    Raises
    ------
    MissingDependencyError
        matplotlib is not installed.
    InvalidTypeError, InvalidArgumentError
        `scores` are not scores of tokens, or hold several prompts, or do not hold `prompt`.
    """
    if not isinstance(scores, xr.DataArray):
        raise InvalidTypeError(f"scores are the xarray.DataArray that score_tokens gives, not {type(scores).__name__}")
    if "token" not in scores.dims or not set(scores.dims) <= {"layer", "token"}:
        raise InvalidArgumentError(
            f"scores have dims {tuple(scores.dims)}, expected (layer, token): select one class or head, or score every token"
        )
    tokens = _select_prompt(scores, prompt)
    tokens = tokens if "layer" in tokens.dims else tokens.expand_dims("layer")
    values = tokens.transpose("layer", "token").values.astype(float)
    layers = tokens["layer"].values if "layer" in tokens.coords else np.arange(len(values))
    places = tokens["position"].values if "position" in tokens.coords else np.arange(values.shape[1])
    lettering = Lettering()
    named = "token_text" in tokens.coords and 0 < len(places) <= _TEXTS_SHOWN
    width = float(np.clip(0.17 * len(places), 3.1, 10.9))
    height = float(np.clip(_LINE * len(layers), 2.0, 6.5))
    axes: Any = new_axes() if ax is None else ax
    if ax is not None:
        width, height = _inches(ax)
        named = named and width / len(places) * 72 > _SMALLEST
    largest = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 1.0
    weights = scores.name == "weight"
    mesh = _draw_mesh(axes, values, 0.0 if weights else -(largest or 1.0), largest or 1.0)
    _set_ticks(axes.yaxis, lettering.fit_all(layers, 24), min(16, max(1, int(height / _LINE + 0.5))))
    if named:
        texts = lettering.fit_all(map(_visible_text, tokens["token_text"].values.tolist()), _TEXT_LENGTH, keep_start=True)
        size = min(8.0, 0.85 * 72 * width / len(places))
        axes.set_xticks(np.arange(len(places)), texts, rotation=90, fontsize=size)
    else:
        _set_ticks(axes.xaxis, [str(place) for place in places], min(16, max(1, int(width / 0.3))))
    axes.set_xlabel("token" if named else "position of the token")
    axes.set_ylabel("layer")
    bar = axes.figure.colorbar(mesh, ax=axes, pad=0.015, aspect=24)
    classes = read_list(scores.attrs, "classes") or []
    above = lettering.fit_all([str(c) for c in classes], 24)[1] if len(classes) == 2 else ""
    bar.set_label("weight in its prompt" if weights else "score" + (f" (above 0: {above})" if above else ""))
    if not weights:
        bar.ax.axhline(0, color="white", linewidth=1.2)
    title = [str(tokens.coords["model"].item())] if "model" in tokens.coords and tokens.coords["model"].ndim == 0 else []
    title += [str(scores.attrs.get("labels", "")), str(scores.attrs.get("probe", ""))]
    _finish(axes, lettering, title, (width, height), bar, is_new=ax is None)
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
        `scores` are not those of `sweep_transfer`, do not hold the metric, or hold several layers or probes.
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
    matrix = values.isel({dim: 0 for dim in values.dims if dim not in ("train", "test")}, drop=True)
    limits = (0.5, 1.0) if bool((matrix.fillna(0.5) >= 0.5).all()) else (0.0, 1.0)
    drawn = _draw_matrix(matrix, ("train", "test"), limits, SCORE_LABELS.get(metric, metric), ax)
    drawn.axes.set_xlabel(f"tested on (diagonal: {scores.attrs['cv']} folds)" if "cv" in scores.attrs else "tested on")
    drawn.axes.set_ylabel("fitted on")
    title = [str(scores.attrs.get("model", "")), str(at.get("probe", "")), f"layer {at['layer']}" if "layer" in at else ""]
    drawn.finish(title, is_new=ax is None)
    return cast("Axes", drawn.axes)


def plot_cosine(matrix: xr.DataArray, ax: Axes | None = None) -> Axes:
    """Axes with the cosine of every pair of directions, as colours, and also as numbers for at most twelve directions.

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
        `matrix` is not such an array.
    """
    if not isinstance(matrix, xr.DataArray) or set(matrix.dims) != {"direction", "other"}:
        raise InvalidTypeError("matrix is the xarray.DataArray that cosine_similarity gives, with dims (direction, other)")
    drawn = _draw_matrix(matrix, ("direction", "other"), (-1.0, 1.0), "cosine similarity", ax)
    drawn.finish([], is_new=ax is None)
    return cast("Axes", drawn.axes)


def _select_prompt(scores: xr.DataArray, prompt: str | None) -> xr.DataArray:
    if prompt is not None:
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


def _visible_text(text: object) -> str:
    """The text of a token with a visible sign for every space and line break."""
    return str(text).replace(" ", "␣").replace("\n", "↵").replace("\t", "→").replace("\r", "") or "∅"


def _inches(axes: Any) -> tuple[float, float]:
    box = axes.get_window_extent()
    return float(box.width / axes.figure.dpi), float(box.height / axes.figure.dpi)


def _finish(axes: Any, lettering: Lettering, title: list[str], size: tuple[float, float], bar: Any, *, is_new: bool) -> None:
    shown = lettering.fit_all(title, 80)
    axes.set_title(" · ".join(part for part in shown if part), fontsize="medium")
    if is_new:
        finish_figure(axes, lettering, size, bar=bar)
    else:
        finish_given(axes, lettering, bar=bar)


def _draw_mesh(axes: Any, values: Any, low: float, high: float) -> Any:
    """Coloured cells, centred on whole numbers; NaN is hatched."""
    edges = [np.arange(n + 1) - 0.5 for n in values.shape]
    mesh = axes.pcolormesh(edges[1], edges[0], np.ma.masked_invalid(values), cmap=_COLOUR_MAP, vmin=low, vmax=high, rasterized=True)
    if np.isnan(values).any():
        axes.patch.set(hatch="////", edgecolor="0.6", facecolor="white")
    return mesh


def _set_ticks(axis: Any, names: list[str], most: int, **options: Any) -> None:
    least = -(-len(names) // most)
    # Round steps: 1, 2 or 5 times a power of ten.
    every = next(step * 10**power for power in range(9) for step in (1, 2, 5) if step * 10**power >= least)
    places = np.arange(0, len(names), every)
    axis.set_ticks(places, [names[place] for place in places], **options)


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A matrix that is drawn, before its labels are."""

    axes: Any
    lettering: Lettering
    bar: Any
    side: float

    def finish(self, title: list[str], *, is_new: bool) -> None:
        _finish(self.axes, self.lettering, title, (self.side, self.side), self.bar, is_new=is_new)


def _draw_matrix(matrix: xr.DataArray, dims: tuple[str, str], limits: tuple[float, float], label: str, ax: Axes | None) -> _Matrix:
    turned = matrix.transpose(*dims)
    values = turned.values.astype(float)
    most = max(values.shape)
    side = float(np.clip(0.55 * most, 2.4, 7.0)) if ax is None else min(_inches(ax))
    axes: Any = new_axes() if ax is None else ax
    lettering = Lettering()
    mesh = _draw_mesh(axes, values, *limits)
    axes.invert_yaxis()
    axes.set_aspect("equal")
    pitch = 72 * side / most
    size = float(np.clip(0.8 * pitch, _SMALLEST, 10.0))
    named = min(_NAMES_SHOWN, max(1, int(72 * side / size)))
    names = [lettering.fit_all(turned[dim].values, 32 if most <= 16 else 24) for dim in dims]
    _set_ticks(axes.yaxis, names[0], named, fontsize=size)
    longest = max(map(len, names[1]), default=0)
    upright = longest > 4 or 0.75 * size * longest > pitch
    _set_ticks(axes.xaxis, names[1], named, fontsize=size, rotation=90 if upright else 0)
    # Numbers where a cell has room for four characters.
    if most <= 12 and pitch > 4 * _SMALLEST * 0.6:
        middle = sum(limits) / 2
        for (row, column), value in np.ndenumerate(values):
            if not np.isnan(value):
                # Dark text on light cells, light text on dark ones.
                colour = "black" if value > middle else "white"
                number = f"{round(value, 2) + 0.0:.2f}".replace("-", "−")
                axes.text(column, row, number, ha="center", va="center", color=colour, fontsize=min(8.0, pitch / 2.8))
    bar = axes.figure.colorbar(mesh, ax=axes, pad=0.02, aspect=24, shrink=0.9)
    bar.set_label(lettering.fit(label))
    return _Matrix(axes, lettering, bar, side)
