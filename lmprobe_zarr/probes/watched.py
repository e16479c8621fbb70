"""Fitted probes in the form in which they score a text that still grows: a linear map of tokens, a running pooling, a score. Never torch.

A map and a pooling change places where that is exact: a linear probe on the mean of a prompt maps each token, and the mean of what comes
out is kept. Where it is not (the largest activation of each unit, an inner layer on pooled vectors) activations themselves are pooled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from lmprobe_zarr.batch import BY_PROBE, Stage
from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.probes.coefficients import coefficients, undo_steps
from lmprobe_zarr.probes.ridge import rows_for
from lmprobe_zarr.probes.running import RUNNING, Running, running_learned
from lmprobe_zarr.probes.sequences import SequenceSolution
from lmprobe_zarr.probes.sufficient import Solution
from lmprobe_zarr.typing import Array, Floats

__all__ = ["WatchedProbe", "watch_pipeline", "watch_solution"]

_Map = Callable[[Floats], Floats]
# Whose probabilities are the logistic function of the decision, or its softmax for several classes.
_LOGISTIC: Final = ("LogisticRegression", "LogisticRegressionCV", "LinearDiscriminantAnalysis", "MassMeanClassifier")


@dataclass(frozen=True, slots=True)
class WatchedProbe:
    """A probe for tokens that come in one after another.

    Parameters
    ----------
    layers : tuple of int
        Whose rows it reads.
    hidden : int
        The width of one layer.
    coef : ndarray of float64, shape (layer, value, hidden), optional
        The sum over layers of ``rows @ coef.T``, plus `intercept`, are the values of a token; None where those are its activations, the
        layers end to end.
    intercept : ndarray of float64, shape (value,)
        Of no length without `coef`.
    of_token : callable, optional
        Makes of values, shape (token, value), what is pooled, (token, value).
    pool : callable
        A fresh pooling, from the number of prompts.
    score : callable
        Makes of what is pooled, shape (prompt, value), the scores, (prompt,) or (prompt, class).
    classes : ndarray, optional
        The labels; None for a regression.
    """

    layers: tuple[int, ...]
    hidden: int
    coef: Floats | None
    intercept: Floats
    of_token: _Map | None
    pool: Callable[[int], Running]
    score: _Map
    classes: Array | None


def _squeezed(values: Floats) -> Floats:
    return values[:, 0] if values.shape[1] == 1 else values


def _as_column(scores: Array) -> Floats:
    wide = np.asarray(scores, np.float64)
    return wide[:, None] if wide.ndim == 1 else wide


def watch_solution(solution: Solution | SequenceSolution, stage: Stage | None, layer: int, classes: Array) -> WatchedProbe:
    """A probe that was fitted on tokens; its scores are decision values.

    Parameters
    ----------
    solution : Solution or SequenceSolution
    stage : Stage, optional
        Of scores, or of nothing; None for the pooling that it has learned.
    layer : int
    classes : ndarray
        The labels, sorted.
    """
    coef, intercept, width = solution.coef, solution.intercept, len(solution.intercept)
    of_token: _Map | None = None
    score: _Map = _squeezed
    if not isinstance(solution, SequenceSolution):
        assert stage is not None  # noqa: S101  (only a learned pooling is None)
        pool = _named_pooling(stage, width)
    elif stage is None:
        probe, outputs, score = solution.probe, len(solution.bias), solution.score

        def pool(prompts: int) -> Running:
            return running_learned(prompts, probe, outputs)
    else:
        learned = solution
        pool = _named_pooling(stage, len(solution.bias))

        def of_token(values: Floats) -> Floats:
            return _as_column(learned.pool(values, np.ones(len(values), np.int64)))

    return WatchedProbe((layer,), coef.shape[1], coef[None], intercept, of_token, pool, score, classes)


def watch_pipeline(pipeline: Any, stage: Stage, layers: tuple[int, ...], classifier: Any, classes: Array | None) -> WatchedProbe:
    """A fitted pipeline; its scores are probabilities where it has some, else decision values, or the values of a regression.

    Parameters
    ----------
    pipeline : fitted Pipeline
    stage : Stage
        What is pooled to predict.
    layers : tuple of int
        Which it reads, end to end.
    classifier : str or estimator
        What it was made from.
    classes : ndarray, optional
    """
    hidden = pipeline.n_features_in_ // len(layers)
    estimator = pipeline.steps[-1][1]
    has_probabilities = classes is not None and hasattr(pipeline, "predict_proba")
    if stage == BY_PROBE:
        solution: SequenceSolution = estimator.solution()
        coef, intercept = undo_steps([step for _, step in pipeline.steps[:-1]], solution.coef, solution.intercept)
        return WatchedProbe(
            layers, hidden, coef.reshape(len(coef), len(layers), hidden).transpose(1, 0, 2), intercept, None,
            lambda prompts: running_learned(prompts, solution.probe, len(solution.bias)),
            lambda pooled: _probabilities(solution.score(pooled)), classes,
        )  # fmt: skip

    def scores(rows: Floats) -> Floats:
        """As the pipeline itself gives them."""
        found = np.full((len(rows), 1), np.nan)
        known = np.isfinite(rows).all(axis=1)
        if not known.any():
            return found
        features = rows_for(classifier, rows[known].astype(np.float32))
        method = "predict" if classes is None else "predict_proba" if has_probabilities else "decision_function"
        if not hasattr(pipeline, method):
            raise InvalidArgumentError(f"{classifier!r} gives no scores that could be watched: use 'logistic_regression'")
        made = _as_column(getattr(pipeline, method)(features))
        made = made[:, 1:] if classes is not None and made.shape[1] == 2 == len(classes) else made
        found = np.full((len(rows), made.shape[1]), np.nan)
        found[known] = made
        return found

    linear = _linear(pipeline, len(layers), classes, has_probabilities)
    pools_rows = stage.of == "activation" and stage.pooling in ("max", "min")
    if linear is None or pools_rows:
        of_rows = scores if linear is None else lambda rows: linear[2](_apply(rows, linear[0], linear[1]))
        n_scores = 1 if classes is None or len(classes) == 2 else len(classes)
        if stage.of == "score":
            pool = _named_pooling(stage, n_scores)
            return WatchedProbe(layers, hidden, None, np.zeros(0), of_rows, pool, _squeezed, classes)
        pool = _named_pooling(stage, hidden * len(layers))
        return WatchedProbe(layers, hidden, None, np.zeros(0), None, pool, lambda rows: _squeezed(of_rows(rows)), classes)
    coef, intercept, link = linear
    of_token = link if stage.of == "score" else None
    pool = _named_pooling(stage, len(intercept))
    score: _Map = _squeezed if stage.of == "score" else lambda values: _squeezed(link(values))
    return WatchedProbe(layers, hidden, coef.transpose(1, 0, 2), intercept, of_token, pool, score, classes)


def _apply(rows: Floats, coef: Floats, intercept: Floats) -> Floats:
    return np.asarray(rows @ coef.reshape(len(coef), -1).T + intercept)


def _named_pooling(stage: Stage, width: int) -> Callable[[int], Running]:
    """A pooling by its word; where nothing is pooled each token has a score of its own, and that of the last one is shown."""
    word = stage.pooling or "last_token"
    return lambda prompts: RUNNING[word](prompts, width)


def _probabilities(scores: Array) -> Floats:
    """The probability of the second class, shape (prompt,), or of each, (prompt, class), from decision values."""
    from scipy.special import expit, softmax

    return np.asarray(expit(scores) if scores.ndim == 1 else softmax(scores, axis=1))


def _linear(pipeline: Any, n_layers: int, classes: Array | None, has_probabilities: bool) -> tuple[Floats, Floats, _Map] | None:
    """Coefficients, shape (value, layer, hidden), the intercept, and what makes scores of values; None where that is not known."""
    kind, estimator = type(pipeline.steps[-1][1]).__name__, pipeline.steps[-1][1]
    if has_probabilities and classes is not None:
        # Probabilities of other estimators are no function of the decision, or of several classes another one.
        known = kind in _LOGISTIC or (kind == "DescentClassifier" and estimator.loss == "log_loss" and len(classes) == 2)
        if not known or (len(classes) > 2 and getattr(estimator, "solver", "") == "liblinear"):
            return None
    try:
        coef, intercept = coefficients(pipeline, n_layers)
    except InvalidArgumentError:
        return None
    if not has_probabilities:
        return coef, intercept, lambda values: values
    return coef, intercept, lambda values: _as_column(_probabilities(_squeezed(values)))
