"""Summaries of stored activations: norms and outliers by layer, a number for every token and layer. Never draws.

Values are read layer by layer, and only as many as the caller allows, whatever the size of the store.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from lmprobe_zarr.batch import INNER_DIMS, LAYERED_SITES, POOLINGS, SCALARS
from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.pages import LayerProfile, TokenMap
from lmprobe_zarr.probes import BoundSequences, class_scores, fit_in_place, make_probe
from lmprobe_zarr.store.format import Level
from lmprobe_zarr.store.parts import View, read_values
from lmprobe_zarr.typing import Array, Estimator, Ints

__all__ = [
    "choose_profiled",
    "fit_by_layer",
    "list_sites",
    "map_tokens",
    "profile_layers",
    "score_of",
    "weigh_of",
]
#: Rows of activations, shape (row, hidden), to one number each.
Score = Callable[[Array], Array]
#: Rows of whole prompts end to end, shape (token, hidden), and how many each has, to one weight for each row.
Weigh = Callable[[Array, Ints], Array]

RUNS: Final = 8
# A unit is an outlier if its root mean square is more than this many times that of the median unit of its layer.
OUTLIER_RATIO: Final = 6.0
QUANTILES: Final = (0.05, 0.5, 0.95)
FITTED_PROMPTS: Final = 2000


def choose_profiled(view: View) -> tuple[Level, str] | None:
    """The most informative variable of a group: its residual stream by token, else another site by token, else a pooled variable."""
    levels: tuple[Level, ...] = ("tokens", "prompts")
    found = ((level, name) for level in levels for name in list_sites(view, level) if view.variables(level)[name].layered)
    return next(found, None)


def list_sites(view: View, level: Level) -> list[str]:
    """The variables of a level that hold a site, and no output of the model: those of the residual stream first."""
    poolings = ("",) if level == "tokens" else tuple(f"_{pooling}" for pooling in POOLINGS)
    known = [f"{site}{pooling}" for site in LAYERED_SITES for pooling in poolings]
    held = [name for name in view.variables(level) if name not in INNER_DIMS and name not in SCALARS]
    return [*(name for name in known if name in held), *(name for name in held if name not in known)]


def _sample(weights: Ints, most: int) -> Ints:
    """All prompts if they have at most `most` rows; else eight evenly spaced runs of neighbours that have about as many together."""
    n = len(weights)
    if int(weights.sum()) <= most or n <= RUNS:
        return np.arange(n)
    length = max(1, int(most / RUNS / max(1.0, float(weights.mean()))))
    starts = np.linspace(0, n - length, RUNS).astype(np.int64)
    return np.unique(np.concatenate([np.arange(start, start + length) for start in starts]))


def profile_layers(view: View, level: Level, variable: str, layers: Sequence[int], *, sample_bytes: int) -> LayerProfile:
    """Norms and outliers by layer.

    Parameters
    ----------
    view : View
    level, variable
        A variable of the view with layers, and its level.
    layers : sequence of int
    sample_bytes : int
        At most this many bytes are read, over all layers. If there are more, eight runs of neighbouring prompts are read, evenly spaced.
    """
    info = view.variables(level)[variable]
    width = int(np.prod(info.row_shape)) * np.dtype(info.dtype).itemsize
    counts = view.token_counts()
    held = np.flatnonzero(counts) if level == "tokens" else np.arange(len(view))
    weights = counts[held] if level == "tokens" else np.ones(len(held), np.int64)
    rows = held[_sample(weights, max(1, sample_bytes // max(1, width * len(layers))))]
    lengths = counts[rows] if level == "tokens" else np.ones(len(rows), np.int64)
    first = np.zeros(int(lengths.sum()), bool)
    first[np.cumsum(lengths) - lengths] = True
    n = len(layers)
    norms, largest, firsts, peak, ratio = (np.full(shape, np.nan) for shape in ((len(QUANTILES), n), n, n, n, n))
    unit, outliers, missing = (np.zeros(n, np.int64) for _ in range(3))
    for i, layer in enumerate(layers):
        values = read_values(view, level, variable, rows, (layer,), note=True)[0].reshape(len(first), -1)
        kept = np.isfinite(values).all(axis=1)
        missing[i] = int((~kept).sum())
        values = np.asarray(values[kept], np.float32)
        if not values.size:
            continue
        row_norms = np.sqrt(np.einsum("ij,ij->i", values, values, dtype=np.float64))
        norms[:, i], largest[i] = np.quantile(row_norms, QUANTILES), row_norms.max()
        if first[kept].any():
            firsts[i] = np.median(row_norms[first[kept]])
        peak[i] = np.abs(values).max()
        rms = np.sqrt(np.einsum("ij,ij->j", values, values, dtype=np.float64) / len(values))
        middle = float(np.median(rms))
        unit[i] = int(rms.argmax())
        if middle > 0:
            ratio[i], outliers[i] = rms.max() / middle, int((rms > OUTLIER_RATIO * middle).sum())
    return LayerProfile(
        variable=variable,
        level=level,
        layers=tuple(layers),
        rows=len(first),
        of_rows=int(weights.sum()),
        prompts=len(rows),
        of_prompts=len(held),
        norms=norms,
        largest_norm=largest,
        first_norm=firsts if level == "tokens" else None,
        peak=peak,
        ratio=ratio,
        unit=unit,
        n_outliers=outliers,
        not_finite=missing,
    )


# ------------------------------------------------------------------------------------------------------------------ tokens


def map_tokens(
    view: View,
    variable: str,
    rows: Ints,
    layers: Sequence[int],
    scores: Mapping[int, Score] | None = None,
    weights: Mapping[int, Weigh] | None = None,
    *,
    most: int,
) -> TokenMap:
    """A number for every token of some prompts: its score or weight by the layer's probe, or its norm if there are no probes.

    Parameters
    ----------
    view : View
    variable : str
        With tokens and layers.
    rows : ndarray of int
        Prompts.
    layers : sequence of int
        If `scores` are given, layers of theirs.
    scores : mapping of int to callable, optional
    weights : mapping of int to callable, optional
        Instead of scores. They are those in the whole prompt, however many of its tokens are kept.
    most : int
        At most this many tokens of each prompt are kept, its first ones.
    """
    whole = view.token_counts()[rows]
    counts = np.minimum(whole, most)
    starts = np.cumsum(whole) - whole
    taken = np.concatenate([np.arange(start, start + count) for start, count in zip(starts, counts, strict=True)]).astype(np.int64)
    values = np.full((len(layers), len(taken)), np.nan)
    for i, layer in enumerate(layers):
        every = np.asarray(read_values(view, "tokens", variable, rows, (layer,), note=True)[0], np.float32)
        if weights is not None:
            values[i] = _weigh(weights[layer], every, whole)[taken]
            continue
        read = every[taken]
        kept = np.isfinite(read).all(axis=1)
        if kept.any():
            found = np.linalg.norm(read[kept], axis=1) if scores is None else scores[layer](read[kept])
            values[i, kept] = found
    return TokenMap(layers=tuple(layers), rows=rows, counts=counts, of_counts=whole, values=values)


def _weigh(weigh: Weigh, every: Array, counts: Ints) -> Array:
    """The weights of the tokens of whole prompts; NaN in prompts with a token that is not stored or not finite."""
    known = np.logical_and.reduceat(np.isfinite(every).all(axis=1), np.cumsum(counts) - counts)
    found = np.full(len(every), np.nan)
    if known.any():
        there = np.repeat(known, counts)
        found[there] = weigh(every[there], counts[known])
    return found


def fit_by_layer(view: View, variable: str, rows: Ints, labels: Array, layers: Sequence[int]) -> dict[int, Score]:
    """For every layer, the log-odds of the second class by a logistic regression on what is stored per prompt.

    Parameters
    ----------
    view : View
    variable : str
        Per prompt, with layers.
    rows : ndarray of int
        Prompts to learn from; if there are more than 2,000, as many evenly spaced ones are used.
    labels : ndarray, shape (len(rows),)
        Of two classes.
    layers : sequence of int
    """
    from threadpoolctl import threadpool_limits

    if len(rows) > FITTED_PROMPTS:
        kept = np.linspace(0, len(rows) - 1, FITTED_PROMPTS).astype(np.int64)
        rows, labels = rows[kept], labels[kept]
    fitted: dict[int, Score] = {}
    with threadpool_limits(1):
        for layer in layers:
            values = np.asarray(read_values(view, "prompts", variable, rows, (layer,), note=True)[0], np.float32)
            finite = np.isfinite(values).all(axis=1)
            if len(np.unique(labels[finite])) == 2:
                estimator = fit_in_place("logistic_regression", make_probe("logistic_regression"), values[finite], labels[finite])
                fitted[layer] = score_of(estimator)
    return fitted


def score_of(estimator: Estimator) -> Score:
    """The score of a fitted classifier of two classes: above 0 for the second class. For a logistic regression the log-odds.

    Raises
    ------
    InvalidArgumentError
        The classifier gives neither scores nor probabilities.
    """
    if not hasattr(estimator, "decision_function") and not hasattr(estimator, "predict_proba"):
        raise InvalidArgumentError(f"a {type(estimator).__name__} gives no scores: give a probe with a decision function or probabilities")

    def score(values: Array) -> Array:
        found = class_scores(estimator, values)
        if found is None or hasattr(estimator, "decision_function"):
            return np.full(len(values), np.nan) if found is None else np.asarray(found, float)
        chance = np.clip(np.asarray(found, float), 1e-9, 1 - 1e-9)
        return np.asarray(np.log(chance / (1 - chance)))

    return score


def weigh_of(pipeline: Any) -> Weigh:
    """The weights of the tokens of prompts by a fitted pipeline whose classifier pools them: the mean over heads, and over classes."""

    def weigh(rows: Array, counts: Ints) -> Array:
        return np.asarray(BoundSequences(pipeline, counts).weights(rows).mean(axis=(1, 2)))

    return weigh
