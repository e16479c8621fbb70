"""Fits: one layer at a time, all folds of some probes, and their scores.

Holds the plan that all tasks share, the body of every task, and what a process is set to while it fits. Never how tasks are
spread, a store or a plot: what is fitted is the array that is given.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import xarray as xr

from lmprobe_zarr.errors import InvalidArgumentError, LmprobeZarrError
from lmprobe_zarr.probes.classifiers import converged, fit_in_place
from lmprobe_zarr.probes.controls import DIRECTION, Entry, make_entry
from lmprobe_zarr.probes.folds import inner_folds
from lmprobe_zarr.probes.gram import FoldGrams, gram_worthwhile
from lmprobe_zarr.probes.labels import Labels
from lmprobe_zarr.probes.layer import bad_rows, computable, fits_running, read_layer
from lmprobe_zarr.probes.metrics import NOT_STORED, Outcome, outcome_of, score_outcome
from lmprobe_zarr.probes.task import Fit, NotFiniteError, Plan, Task
from lmprobe_zarr.typing import Array

__all__ = ["fit_task"]


def fit_task(plan: Plan, task: Task, values: Any) -> list[Fit]:
    """All folds of some entries on one layer; the body of every task.

    Parameters
    ----------
    plan : Plan
    task : Task
    values : array of real numbers, shape (prompt, hidden), or None
        None where the task reads its layer itself, from its source.

    Raises
    ------
    NotFiniteError
        The layer holds NaN or infinity in a row that is fitted or scored.
    """
    if task.source < 0:
        found = [(entry, _constant_features(plan, task, entry)) for entry in task.entries]
    else:
        whole = plan.sources[task.source].activations
        matrix = computable(values if whole is None else read_layer(whole, task.layer))
        del values
        if plan.sources[task.source].name and np.isnan(matrix).all():
            # Of several variables each has its own layers, and a dataset has NaN in those of the others.
            return [_not_stored(plan, task, entry) for entry in task.entries]
        _check_finite(plan, task, task.entries[0], matrix)
        found = [(entry, matrix) for entry in task.entries]
    with fits_running():
        return [fit for entry, features in found for fit in _fit_entry(plan, task, entry, features)]


def _not_stored(plan: Plan, task: Task, entry: int) -> Fit:
    layer = plan.sources[task.source].layers[task.layer] if plan.entries[entry].by_layer else -1
    nothing = (np.nan,) * len(plan.metrics)
    return Fit((task.source, layer, entry, -1, -1, -1, -1), nothing, NOT_STORED, np.nan, True, np.nan, None)


def _constant_features(plan: Plan, task: Task, entry: int) -> Any:
    features = plan.features[plan.entries[entry].features]
    if isinstance(features, list):
        return np.array(features, dtype=object)
    if isinstance(features, xr.Variable):
        features = features.values if features.dims[0] == "prompt" else features.values.T
    matrix = computable(features)
    _check_finite(plan, task, entry, matrix)
    return matrix


def _check_finite(plan: Plan, task: Task, entry: int, matrix: Array) -> None:
    bad = bad_rows(matrix, plan.labels[0].rows)
    if bad:
        raise NotFiniteError(task.layer, bad, task.source, entry)


def _fit_entry(plan: Plan, task: Task, number: int, matrix: Array) -> Iterator[Fit]:
    entry = plan.entries[number]
    random = entry.random(plan.preprocessing)
    grid = entry.penalised and bool(plan.strengths) and not plan.inner
    strengths: tuple[float | None, ...] = plan.strengths if grid else (None,)
    layer = -1 if task.source < 0 or not entry.by_layer else plan.sources[task.source].layers[task.layer]
    # Of one seed all entries have their place; of several, what draws nothing is fitted once.
    seeds = range(len(plan.seeds)) if random or len(plan.seeds) == 1 else range(1)
    grams: FoldGrams | None = None
    if gram_worthwhile(plan, entry, matrix, len(strengths)):
        grams = FoldGrams(matrix, plan.folds, plan.labels[0].rows)
    for fold in range(len(plan.folds)):
        for seed in seeds:
            rows = _project(plan, entry, seed, matrix) if entry.features == DIRECTION else matrix
            for which in range(len(plan.labels)):
                at = (task.source, layer, number, fold, seed if random or len(plan.seeds) == 1 else -1)
                solved = None if grams is None else grams.solve(fold, plan.labels[which], strengths)
                for place, strength in enumerate(strengths):
                    where = (*at, place if grid else -1, which)
                    if solved is not None:
                        yield _scored(plan, where, solved[place].outcome, solved[place].seconds, ended=True)
                    else:
                        yield _fit_fold(plan, task, where, rows, strength)


def _project(plan: Plan, entry: Entry, seed: int, matrix: Array) -> Array:
    """The activations along one random direction, the same for every layer and fold; shape (prompt, 1)."""
    rng = np.random.default_rng(_seed_of(f"{plan.seeds[seed]}\0{entry.name}\0direction"))
    direction = rng.standard_normal(matrix.shape[1])
    return np.asarray(matrix.astype(np.float64) @ (direction / np.linalg.norm(direction)))[:, None]


def _seed_of(words: str) -> int:
    return int.from_bytes(hashlib.sha256(words.encode("utf-8", "surrogatepass")).digest()[:4], "little")


def _fit_seed(plan: Plan, task: Task, entry: Entry, fold: int, seed: int) -> int:
    return _seed_of(f"{plan.seeds[seed]}\0{_layer_name(plan, task)}\0{entry.name}\0{fold}")


def _layer_name(plan: Plan, task: Task) -> str:
    """Empty for what knows no layer."""
    place = plan.sources[task.source].layers[task.layer] if task.source >= 0 else -1
    return plan.layers[place] if place >= 0 else ""


def _fit_fold(plan: Plan, task: Task, at: tuple[int, int, int, int, int, int, int], matrix: Array, strength: float | None) -> Fit:
    import sklearn

    _, _, number, fold, seed, _, which = at
    entry, labels = plan.entries[number], plan.labels[which]
    values = plan.shuffled[which][max(seed, 0)] if entry.shuffled else labels.values
    train, test = plan.folds[fold]
    drawn = _fit_seed(plan, task, entry, fold, max(seed, 0))
    chosen = np.nan
    # The layer was checked once; each estimator would check each fold several times more.
    with sklearn.config_context(assume_finite=True), _named(plan, task, entry):
        if plan.inner and entry.penalised:
            chosen = strength = _choose_strength(plan, entry, matrix[train], train, values, drawn, labels)
        estimator = make_entry(entry, drawn, plan.task, preprocessing=plan.preprocessing, strength=strength)
        rows = matrix[train]
        started = time.perf_counter()
        estimator = _fitted(plan, entry, estimator, rows, values[train])
        seconds = time.perf_counter() - started
        del rows
        outcome = _outcome(plan, labels, estimator, matrix[test], values[test], values[train])
    return _scored(plan, at, outcome, seconds, ended=converged(estimator), strength=chosen)


def _fitted(plan: Plan, entry: Entry, estimator: Any, rows: Array, values: Array) -> Any:
    if plan.preprocessing is None and entry.features != "text":
        return fit_in_place(entry.probe, estimator, rows, values)
    return estimator.fit(rows, values)


def _outcome(plan: Plan, labels: Labels, estimator: Any, rows: Array, true: Array, known: Array) -> Outcome:
    needs = {metric.needs for metric in (*plan.metrics, *([plan.choose_by] if plan.choose_by else []))}
    if plan.predictions:
        needs |= {"scores", "probabilities"}
    codes = true if labels.classes is None else np.searchsorted(labels.classes, true)
    return outcome_of(estimator, rows, codes, labels.classes, needs=needs, known=np.unique(known))


def _scored(
    plan: Plan, at: tuple[int, int, int, int, int, int, int], outcome: Outcome, seconds: float, *, ended: bool, strength: float = np.nan
) -> Fit:
    values, reasons = score_outcome(outcome, plan.metrics)
    return Fit(at, tuple(values), reasons, seconds, ended, strength, outcome if plan.predictions else None)


def _choose_strength(plan: Plan, entry: Entry, rows: Array, train: Array, values: Array, seed: int, labels: Labels) -> float:
    """The strength with the best mean score over folds within the training rows; of equals the strongest."""
    assert plan.choose_by is not None  # noqa: S101  (for mypy: strengths are chosen by something)
    codes = None if labels.classes is None else np.searchsorted(labels.classes, values[train])
    within = inner_folds(codes, plan.kept[train], plan.inner, seed)
    means = []
    for strength in plan.strengths:
        scores = []
        for learn, look in within:
            estimator = make_entry(entry, seed, plan.task, preprocessing=plan.preprocessing, strength=strength)
            estimator = _fitted(plan, entry, estimator, rows[learn], values[train][learn])
            outcome = _outcome(plan, labels, estimator, rows[look], values[train][look], values[train][learn])
            scores.append(score_outcome(outcome, [plan.choose_by])[0][0])
        means.append(np.mean(scores) if plan.choose_by.larger_is_better else -np.mean(scores))
    if np.isnan(means).all():
        raise InvalidArgumentError(
            f"no strength can be chosen by {plan.choose_by.name!r}, which is undefined for {entry.name!r}: use another, or fewer folds"
        )
    best = np.flatnonzero(np.asarray(means) == np.nanmax(means))
    return max(plan.strengths[place] for place in best)


@contextmanager
def _named(plan: Plan, task: Task, entry: Entry) -> Iterator[None]:
    """An estimator's own complaint, with the names of what was fitted."""
    try:
        yield
    except (ValueError, TypeError) as error:
        if isinstance(error, LmprobeZarrError):
            raise
        layer = _layer_name(plan, task)
        raise InvalidArgumentError(
            f"{entry.name!r} cannot be fitted{f' on layer {layer}' * bool(layer)}: {' '.join(str(error).split())[:200]}"
        ) from error
