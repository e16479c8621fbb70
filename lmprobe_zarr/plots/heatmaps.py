"""Coloured grids: scores of one prompt's tokens by layer, and square matrices of scores or cosines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xarray as xr

from lmprobe_zarr.batch import prompt_hash
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.interchange import read_list
from lmprobe_zarr.plots.cells import SMALLEST, draw_mesh, format_cells, set_ticks, write_numbers
from lmprobe_zarr.plots.layout import Canvas, add_bar, bar_width, finish, open_canvas
from lmprobe_zarr.plots.roles import draw_roles
from lmprobe_zarr.plots.style import SCORE_LABELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_cosine", "plot_tokens", "plot_transfer"]

_TEXTS_SHOWN, _TEXT_LENGTH = 64, 16
#: Up to so many rows of a matrix are all named, and up to so many have numbers in their cells.
_NAMES_SHOWN, _NUMBERS_SHOWN = 60, 12
#: Inches between the names of two rows, at least, and of the lowest heat map; of a token, and of the narrowest heat map.
_LINE, _LOWEST = 0.17, 1.8
_TOKEN, _NARROWEST = 0.17, 3.1
#: Inches of the narrowest matrix.
_LEAST = 1.0
#: The share of a figure's width that names of rows may take, and the width of a letter as a share of its size.
_NAMES, _LETTER = 0.3, 0.55


def plot_tokens(
    scores: xr.DataArray,
    prompt: str | None = None,
    ax: Axes | None = None,
    *,
    roles: bool = True,
    width: Literal["page", "column"] | float = "page",
) -> Axes:
    """Axes with the score of every token of one prompt at every layer, as colours, and with the roles of the tokens.

    Parameters
    ----------
    scores : DataArray, dims (layer, token), or (token)
        From :func:`lmprobe_zarr.score_tokens`, or weights from :func:`lmprobe_zarr.pooling_weights`. Of several classes or heads select
        one, ``scores.sel({"class": …})``.
    prompt : str, optional
        The hash or the text of one prompt, if `scores` holds more than one.
    ax : matplotlib Axes, optional
    roles : bool
        Whether a band above the tokens shows their coordinates ``role`` and ``generated``, where `scores` have them.
    width : {"page", "column"} or float
        As for :func:`plot_scores`.

    Returns
    -------
    Axes
        The colour scale is symmetric about 0, where the predicted class changes; of weights it begins at 0. NaN is hatched. Tokens
        are labelled by ``token_text``, cut to 16 characters, with ␣ for spaces and ↵ for line breaks, if there are at most 64 and their
        texts fit. Other tokens are labelled by their position. Characters that no installed font has are drawn as ▯, and a note in the
        picture says of which scripts they are. In the band of roles, each role has a colour and a pattern of its own, named in a legend;
        headers and other tokens whose role is unknown are left empty, and a thick line marks the tokens that the model generated.

    Raises
    ------
    MissingDependencyError
        matplotlib is not installed.
    InvalidTypeError, InvalidArgumentError
        `scores` are not scores of tokens, or hold several prompts, or do not hold `prompt`; a width that no figure can have.
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
    named = "token_text" in tokens.coords and 0 < len(places) <= _TEXTS_SHOWN
    canvas = open_canvas(ax, width)
    axes, lettering = canvas.axes, canvas.lettering
    # What is left beside the numbers of layers and the colour bar.
    broad = min(float(max(_NARROWEST, _TOKEN * len(places))), canvas.width - bar_width(canvas) - 0.4) if canvas.is_new else canvas.width
    height = float(np.clip(_LINE * len(layers), _LOWEST, 6.5)) if canvas.is_new else _height(ax)
    named = named and broad / len(places) * 72 > SMALLEST
    largest = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 1.0
    weights = scores.name == "weight"
    mesh = draw_mesh(canvas, values, 0.0 if weights else -(largest or 1.0), largest or 1.0)
    set_ticks(axes.yaxis, lettering.fit_all(layers, 24), min(16, max(1, int(height / _LINE + 0.5))))
    if named:
        texts = lettering.fit_all(map(_visible_text, tokens["token_text"].values.tolist()), _TEXT_LENGTH, keep_start=True)
        size = min(canvas.points("small"), 0.85 * 72 * broad / len(places))
        axes.set_xticks(np.arange(len(places)), texts, rotation=90, fontsize=size)
    else:
        set_ticks(axes.xaxis, [str(place) for place in places], min(16, max(1, int(broad / 0.3))))
    axes.set_xlabel("token" if named else "position of the token")
    axes.set_ylabel("layer")
    classes = read_list(scores.attrs, "classes") or []
    beyond = lettering.fit_all([str(c) for c in classes], 24)[1] if len(classes) == 2 else ""
    label = "weight in its prompt" if weights else "score" + (f" (above 0: {beyond})" if beyond else "")
    bar = add_bar(canvas, mesh, label, () if weights else (0.0,))
    title = [str(tokens.coords["model"].item())] if "model" in tokens.coords and tokens.coords["model"].ndim == 0 else []
    _set_title(canvas, [*title, str(scores.attrs.get("labels", "")), str(scores.attrs.get("probe", ""))])
    shown = draw_roles(canvas, _column(tokens, "role"), _column(tokens, "generated")) if roles else None
    entries, above = ([], None) if shown is None else shown
    finish(canvas, (broad, height), bar=bar, legend=entries, above=above)
    return axes  # type: ignore[no-any-return]


def plot_transfer(
    scores: xr.Dataset,
    metric: str = "accuracy",
    ax: Axes | None = None,
    *,
    width: Literal["page", "column"] | float = "page",
) -> Axes:
    """Axes with a score for every pair of training and test set, as colours and numbers.

    Parameters
    ----------
    scores : Dataset
        From :func:`lmprobe_zarr.sweep_transfer`, of one layer and probe: ``scores.sel(layer=16, probe="mass_mean")``.
    metric : str
        "accuracy" or "auroc".
    ax : matplotlib Axes, optional
    width : {"page", "column"} or float
        As for :func:`plot_scores`.

    Returns
    -------
    matplotlib Axes

    Raises
    ------
    MissingDependencyError
        matplotlib is not installed.
    InvalidTypeError, InvalidArgumentError
        `scores` are not those of `sweep_transfer`, do not hold the metric, or hold several layers or probes; a width that no figure can
        have.
    """
    if not isinstance(scores, xr.Dataset) or not {"train", "test"} <= set(scores.dims):
        raise InvalidTypeError("scores are the xarray.Dataset that sweep_transfer gives, with dims train and test")
    if metric not in scores or not {"train", "test"} <= set(scores[metric].dims):
        raise InvalidArgumentError(f"there is no score {metric!r} over train and test: use 'accuracy' or 'auroc'")
    values = scores[metric]
    for dim in set(values.dims) - {"train", "test"}:
        if values.sizes[dim] > 1:
            raise InvalidArgumentError(
                f"there are {values.sizes[dim]} along {dim!r}: draw one, as in scores.sel({dim}={values[dim].values[:1].tolist()[0]!r})"
            )
    at = {str(dim): values[dim].values[0] for dim in values.dims if dim not in ("train", "test")}
    at |= {name: values.coords[name].item() for name in ("layer", "probe") if name in values.coords and not values.coords[name].ndim}
    matrix = values.isel({dim: 0 for dim in values.dims if dim not in ("train", "test")}, drop=True)
    limits = (0.5, 1.0) if bool((matrix.fillna(0.5) >= 0.5).all()) else (0.0, 1.0)
    title = [str(scores.attrs.get("model", "")), str(at.get("probe", "")), f"layer {at['layer']}" if "layer" in at else ""]
    labels = (f"tested on (diagonal: {scores.attrs['cv']} folds)" if "cv" in scores.attrs else "tested on", "fitted on")
    canvas = open_canvas(ax, width)
    return _draw_matrix(canvas, matrix, ("train", "test"), limits, SCORE_LABELS.get(metric, metric), labels, title)


def plot_cosine(matrix: xr.DataArray, ax: Axes | None = None, *, width: Literal["page", "column"] | float = "page") -> Axes:
    """Axes with the cosine of every pair of directions, as colours, and also as numbers for at most twelve directions.

    Parameters
    ----------
    matrix : DataArray, dims (direction, other)
        From :func:`lmprobe_zarr.cosine_similarity`.
    ax : matplotlib Axes, optional
    width : {"page", "column"} or float
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
    InvalidArgumentError
        A width that no figure can have.
    """
    if not isinstance(matrix, xr.DataArray) or set(matrix.dims) != {"direction", "other"}:
        raise InvalidTypeError("matrix is the xarray.DataArray that cosine_similarity gives, with dims (direction, other)")
    return _draw_matrix(open_canvas(ax, width), matrix, ("direction", "other"), (-1.0, 1.0), "cosine similarity")


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


def _column(tokens: xr.DataArray, name: str) -> list[Any]:
    """The values of a coordinate of the tokens; none where there is no such coordinate."""
    held = name in tokens.coords and tokens.coords[name].dims == ("token",)
    return list(tokens.coords[name].values.tolist()) if held else []


def _height(ax: Any) -> float:
    return float(ax.get_window_extent().height / ax.figure.dpi)


def _set_title(canvas: Canvas, parts: list[str]) -> None:
    shown = canvas.lettering.fit_all(parts, 80)
    canvas.axes.set_title(" · ".join(part for part in shown if part), fontsize=canvas.points("medium"))


def _draw_matrix(
    canvas: Canvas,
    matrix: xr.DataArray,
    dims: tuple[str, str],
    limits: tuple[float, float],
    label: str,
    labels: tuple[str, str] = ("", ""),
    title: Sequence[str] = (),
) -> Axes:
    """A square matrix with its names, its numbers where they fit, and a colour bar."""
    axes, lettering = canvas.axes, canvas.lettering
    turned = matrix.transpose(*dims)
    values = turned.values.astype(float)
    most = max(values.shape)
    mesh = draw_mesh(canvas, values, *limits)
    axes.invert_yaxis()
    axes.set_aspect("equal")
    length = 32 if most <= 16 else 24
    if canvas.is_new:
        length = int(np.clip(_NAMES * 72 * canvas.width / (_LETTER * canvas.letters), 8, length))
    names = [lettering.fit_all(turned[dim].values, length) for dim in dims]
    side, size = _fit_side(canvas, most, max(map(len, names[0]), default=0))
    named = min(_NAMES_SHOWN, max(1, int(72 * side / size)))
    set_ticks(axes.yaxis, names[0], named, fontsize=size)
    longest = max(map(len, names[1]), default=0)
    upright = longest > 4 or 0.75 * size * longest > 72 * side / most
    set_ticks(axes.xaxis, names[1], named, fontsize=size, rotation=90 if upright else 0)
    bar = add_bar(canvas, mesh, lettering.fit(label), pad=0.02)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    _set_title(canvas, list(title))
    finish(canvas, (side, side), bar=bar)
    if most <= _NUMBERS_SHOWN:
        write_numbers(canvas, mesh, values, format_cells(values), canvas.points("small"))
    return axes  # type: ignore[no-any-return]


def _fit_side(canvas: Canvas, rows: int, letters: int) -> tuple[float, float]:
    """Inches of the side of a matrix, and points of the names of its rows: wider where these are small."""
    if not canvas.is_new:
        side = min(canvas.width, _height(canvas.axes))
        return side, float(np.clip(0.8 * 72 * side / rows, SMALLEST, canvas.letters))
    wanted = side = float(np.clip(0.55 * rows, 2.4, 7.0))
    size = canvas.letters
    for _ in range(4):
        size = float(np.clip(0.8 * 72 * side / rows, SMALLEST, canvas.letters))
        side = min(wanted, max(_LEAST, canvas.width - _LETTER * size * letters / 72 - bar_width(canvas)))
    return side, size
