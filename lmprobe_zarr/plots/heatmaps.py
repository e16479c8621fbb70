"""Coloured grids: scores of one prompt's tokens by layer, and square matrices of scores or cosines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np
import xarray as xr

from lmprobe_zarr.batch import prompt_hash
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.interchange import read_list
from lmprobe_zarr.plots.style import SCORE_LABELS, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_cosine", "plot_tokens", "plot_transfer"]

#: Its lightness rises monotonically, so it also works in grey; blue and yellow are distinguishable with almost any colour vision.
_COLOUR_MAP = "cividis"
_TEXTS_SHOWN, _TEXT_LENGTH = 64, 16


def plot_tokens(scores: xr.DataArray, prompt: str | None = None, ax: Axes | None = None) -> Axes:
    """Axes with the score of every token of one prompt at every layer, as colours.

    Parameters
    ----------
    scores : DataArray, dims (layer, token), or (token)
        From :func:`lmprobe_zarr.score_tokens`. For a probe with more than two classes select one, ``scores.sel({"class": …})``.
    prompt : str, optional
        The hash or the text of one prompt, if `scores` holds more than one.
    ax : matplotlib Axes, optional
        As for :func:`plot_scores`.

    Returns
    -------
    Axes
        The colour scale is symmetric about 0, where the predicted class changes; NaN is hatched. Up to 64 tokens are labelled by
        ``token_text``, cut to 16 characters, with ␣ for spaces and ↵ for line breaks. More tokens, or tokens without texts, are labelled
        by their position.

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
            f"scores have dims {tuple(scores.dims)}, expected (layer, token): select one class, or score every token"
        )
    tokens = _select_prompt(scores, prompt)
    tokens = tokens if "layer" in tokens.dims else tokens.expand_dims("layer")
    values = tokens.transpose("layer", "token").values.astype(float)
    layers = tokens["layer"].values if "layer" in tokens.coords else np.arange(len(values))
    places = tokens["position"].values if "position" in tokens.coords else np.arange(values.shape[1])
    texts = [_short_text(text) for text in tokens["token_text"].values.tolist()] if "token_text" in tokens.coords else []
    named = bool(texts) and len(places) <= _TEXTS_SHOWN
    width = float(np.clip(1.9 + 0.17 * len(places), 5.0, 12.6))
    height = float(np.clip(1.5 + 0.11 * len(layers) + (0.065 * max(map(len, texts)) if named else 0.2), 2.6, 8.0))
    axes: Any = new_axes((width, height)) if ax is None else ax
    largest = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 1.0
    mesh = _draw_mesh(axes, values, -(largest or 1.0), largest or 1.0)
    _set_ticks(axes.yaxis, [str(layer) for layer in layers], 16)
    if named:
        axes.set_xticks(np.arange(len(places)), texts, rotation=90, fontsize=8)
    else:
        _set_ticks(axes.xaxis, [str(place) for place in places], 16)
    axes.set_xlabel("token" if named else "position of the token")
    axes.set_ylabel("layer")
    bar = axes.figure.colorbar(mesh, ax=axes, pad=0.015, aspect=24)
    classes = read_list(scores.attrs, "classes") or []
    bar.set_label("score" + (f" (above 0: {_short_text(str(classes[1]))})" if len(classes) == 2 else ""))
    bar.ax.axhline(0, color="white", linewidth=1.2)
    title = [str(tokens.coords["model"].item())] if "model" in tokens.coords and tokens.coords["model"].ndim == 0 else []
    title += [str(scores.attrs.get("labels", "")), str(scores.attrs.get("probe", ""))]
    axes.set_title(" · ".join(part for part in title if part), fontsize="medium")
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
    matrix = values.squeeze(drop=True).transpose("train", "test")
    limits = (0.5, 1.0) if np.nanmin(matrix) >= 0.5 else (0.0, 1.0)
    axes = _draw_matrix(matrix.values, matrix["train"].values, matrix["test"].values, limits, SCORE_LABELS.get(metric, metric), ax)
    axes.set_xlabel(f"tested on (diagonal: {scores.attrs['cv']} folds)" if "cv" in scores.attrs else "tested on")
    axes.set_ylabel("fitted on")
    title = [str(scores.attrs.get("model", "")), str(at.get("probe", "")), f"layer {at['layer']}" if "layer" in at else ""]
    axes.set_title(" · ".join(part for part in title if part), fontsize="medium")
    return axes  # type: ignore[no-any-return]


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
    turned = matrix.transpose("direction", "other")
    drawn = _draw_matrix(turned.values, turned["direction"].values, turned["other"].values, (-1.0, 1.0), "cosine similarity", ax)
    return cast("Axes", drawn)


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


def _short_text(text: str) -> str:
    """The text cut short, with a visible sign for every space and line break."""
    plain = str(text).replace(" ", "␣").replace("\n", "↵").replace("\t", "→").replace("\r", "")
    # matplotlib would read text between dollar signs as mathematics.
    plain = (plain if len(plain) <= _TEXT_LENGTH else plain[: _TEXT_LENGTH - 1] + "…").replace("$", r"\$")
    return plain or "∅"


def _draw_mesh(axes: Any, values: Any, low: float, high: float) -> Any:
    """Coloured cells, centred on whole numbers; NaN is hatched."""
    edges = [np.arange(n + 1) - 0.5 for n in values.shape]
    mesh = axes.pcolormesh(edges[1], edges[0], np.ma.masked_invalid(values), cmap=_COLOUR_MAP, vmin=low, vmax=high, rasterized=True)
    if np.isnan(values).any():
        axes.patch.set(hatch="////", edgecolor="0.6", facecolor="white")
    return mesh


def _set_ticks(axis: Any, names: list[str], most: int) -> None:
    least = -(-len(names) // most)
    # Round steps: 1, 2 or 5 times a power of ten.
    every = next(step * 10**power for power in range(9) for step in (1, 2, 5) if step * 10**power >= least)
    places = np.arange(0, len(names), every)
    axis.set_ticks(places, [names[place] for place in places])


def _draw_matrix(values: Any, rows: Any, columns: Any, limits: tuple[float, float], label: str, ax: Axes | None) -> Any:
    side = float(np.clip(1.6 + 0.55 * len(rows), 3.2, 7.0))
    axes: Any = new_axes((side + 1.4, side)) if ax is None else ax
    mesh = _draw_mesh(axes, values.astype(float), *limits)
    axes.invert_yaxis()
    axes.set_aspect("equal")
    for axis, names in ((axes.yaxis, rows), (axes.xaxis, columns)):
        _set_ticks(axis, [name if len(name) <= 24 else name[:23] + "…" for name in map(str, names)], 24)
    axes.tick_params(axis="x", rotation=90 if max((len(str(name)) for name in columns), default=0) > 4 else 0)
    if max(values.shape) <= 12:
        middle = sum(limits) / 2
        for (row, column), value in np.ndenumerate(values):
            if not np.isnan(value):
                # Dark text on light cells, light text on dark ones.
                colour = "black" if value > middle else "white"
                axes.text(column, row, f"{value:.2f}".replace("-", "−"), ha="center", va="center", color=colour, fontsize=8)
    axes.figure.colorbar(mesh, ax=axes, pad=0.02, aspect=24, shrink=0.9).set_label(label)
    return axes
