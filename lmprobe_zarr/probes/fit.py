"""The body of every task: all folds of some trials on one layer, and their scores.

Never how tasks are distributed, a store or a plot. The records are in ``task``, how a layer is read and checked in ``layer``.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import xarray as xr

from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.probes.classifiers import converged, fit_in_place
from lmprobe_zarr.probes.controls import DIRECTION, Trial, make_estimator
from lmprobe_zarr.probes.folds import inner_folds, keep_together
from lmprobe_zarr.probes.gram import RidgeTarget, Solved, solve_ridge
from lmprobe_zarr.probes.labels import Labels
from lmprobe_zarr.probes.layer import as_fit_dtype, fits_running, not_finite_rows, read_layer
from lmprobe_zarr.probes.metrics import FAILED, NOT_STORED, Outcome, outcome_of, score_outcome
from lmprobe_zarr.probes.ridge import fit_probe, is_ridge, rows_for
from lmprobe_zarr.probes.task import Fit, FitPlan, FitTask, NotFiniteError
from lmprobe_zarr.tokens import stored_rows
from lmprobe_zarr.typing import Array, Estimator

__all__ = ["fit_task"]


def fit_task(plan: FitPlan, task: FitTask, values: Any) -> list[Fit]:
    """All fits of a task: its trials on one layer, for every fold, seed, strength and set of labels.

    Parameters
    ----------
    plan : FitPlan
    task : FitTask
    values : array of real numbers, shape (prompt, hidden), or None
        None where the task reads its layer from the plan's variable.

    Raises
    ------
    NotFiniteError
        The layer holds NaN or infinity in a row that has a label.
    """
    if task.variable < 0:
        found = [(trial, _constant_features(plan, task, trial)) for trial in task.trials]
    else:
        whole = plan.variables[task.variable].activations
        matrix = as_fit_dtype(values if whole is None else read_layer(whole, task.layer))
        del values
        if plan.variables[task.variable].name and np.isnan(matrix).all() and not _is_stored(whole, task.layer):
            # Several variables may have different layers; a dataset holds NaN in the layers that a variable lacks.
            return [_not_stored(plan, task, trial) for trial in task.trials]
        _check_finite(plan, task, task.trials[0], matrix)
        found = [(trial, matrix) for trial in task.trials]
    with fits_running():
        return [fit for trial, features in found for fit in _fit_trial(plan, task, trial, features)]


def _is_stored(whole: xr.Variable | None, layer: int) -> bool:
    """Whether a layer is known to be stored, so that its NaN are values."""
    held = None if whole is None else stored_rows(whole.isel(layer=layer, missing_dims="ignore"))
    return held is not None and bool(held.all())


def _not_stored(plan: FitPlan, task: FitTask, trial: int) -> Fit:
    layer = plan.variables[task.variable].layers[task.layer] if plan.trials[trial].by_layer else -1
    nothing = (np.nan,) * len(plan.metrics)
    return Fit((task.variable, layer, trial, -1, -1, -1, -1), nothing, NOT_STORED, np.nan, True, np.nan, None)


def _constant_features(plan: FitPlan, task: FitTask, trial: int) -> Any:
    features = plan.features[plan.trials[trial].features]
    if isinstance(features, list):
        return np.array(features, dtype=object)
    if isinstance(features, xr.Variable):
        features = features.values if features.dims[0] == "prompt" else features.values.T
    matrix = as_fit_dtype(features)
    _check_finite(plan, task, trial, matrix)
    return matrix


def _check_finite(plan: FitPlan, task: FitTask, trial: int, matrix: Array) -> None:
    bad = not_finite_rows(matrix, plan.labels[0].rows)
    if bad:
        raise NotFiniteError(task.layer, bad, task.variable, trial)


def _fit_trial(plan: FitPlan, task: FitTask, number: int, matrix: Array) -> Iterator[Fit]:
    trial = plan.trials[number]
    random = trial.random(plan.preprocessing)
    grid = trial.penalised and bool(plan.strengths) and not plan.inner
    strengths: tuple[float | None, ...] = plan.strengths if grid else (None,)
    layer = -1 if task.variable < 0 or not trial.by_layer else plan.variables[task.variable].layers[task.layer]
    # With several seeds, a trial that draws nothing at random is fitted once and its scores apply to every seed.
    seeds = range(len(plan.seeds)) if random or len(plan.seeds) == 1 else range(1)
    grams: list[list[list[Solved]]] | None = None
    if _is_plain_ridge(plan, trial, matrix) and not plan.inner and not trial.shuffled:
        # All folds, strengths and labels at once, since they share products of rows.
        wanted = [RidgeTarget(each.values, each.classes) for each in plan.labels]
        # Where it raises, each fit is made by itself below, so that only those that fail are lost.
        with suppress(ArithmeticError, np.linalg.LinAlgError, ValueError):
            grams = solve_ridge(matrix, plan.folds, wanted, strengths)
    elif not _is_plain_ridge(plan, trial, matrix):
        # Where one set of targets needs float64, all are fitted in it.
        for each in plan.labels:
            matrix = rows_for(trial.probe, matrix, None if each.classes is not None else each.values[each.rows])
    for fold in range(len(plan.folds)):
        for seed in seeds:
            rows = _project(plan, trial, seed, matrix) if trial.features == DIRECTION else matrix
            for which in range(len(plan.labels)):
                at = (task.variable, layer, number, fold, seed if random or len(plan.seeds) == 1 else -1)
                for place, strength in enumerate(strengths):
                    where = (*at, place if grid else -1, which)
                    if grams is not None:
                        solved = grams[fold][place][which]
                        yield _score(plan, where, solved.outcome, solved.seconds, ended=True)
                    else:
                        yield _fit_fold(plan, task, where, rows, strength)


def _is_plain_ridge(plan: FitPlan, trial: Trial, matrix: Array) -> bool:
    """Whether a trial is the named ridge on rows as they are, which `solve_ridge` fits."""
    return is_ridge(trial.probe) and plan.preprocessing is None and trial.features not in (DIRECTION, "text") and matrix.ndim == 2


def _project(plan: FitPlan, trial: Trial, seed: int, matrix: Array) -> Array:
    """The activations along one random direction, the same for every layer and fold; shape (prompt, 1)."""
    rng = np.random.default_rng(_seed_of(f"{plan.seeds[seed]}\0{trial.name}\0direction"))
    direction = rng.standard_normal(matrix.shape[1])
    return np.asarray(matrix.astype(np.float64) @ (direction / np.linalg.norm(direction)))[:, None]


def _seed_of(words: str) -> int:
    return int.from_bytes(hashlib.sha256(words.encode("utf-8", "surrogatepass")).digest()[:4], "little")


def _fit_seed(plan: FitPlan, task: FitTask, trial: Trial, fold: int, seed: int) -> int:
    return _seed_of(f"{plan.seeds[seed]}\0{_layer_name(plan, task)}\0{trial.name}\0{fold}")


def _layer_name(plan: FitPlan, task: FitTask) -> str:
    """The layer of a task; empty where it has none."""
    place = plan.variables[task.variable].layers[task.layer] if task.variable >= 0 else -1
    return plan.layers[place] if place >= 0 else ""


def _fit_fold(plan: FitPlan, task: FitTask, at: tuple[int, int, int, int, int, int, int], matrix: Array, strength: float | None) -> Fit:
    """One fit; NaN with its error where the estimator raises any, so that a sweep keeps all other scores."""
    import sklearn

    _, _, number, fold, seed, _, which = at
    trial, labels = plan.trials[number], plan.labels[which]
    if trial.shuffled:
        values, folds = plan.shuffled[which][max(seed, 0)]
    else:
        values, folds = labels.values, plan.folds
    train, test = folds[fold]
    drawn = _fit_seed(plan, task, trial, fold, max(seed, 0))
    chosen = np.nan
    try:
        # The layer has been checked; without this, each estimator would check each fold several times again.
        with sklearn.config_context(assume_finite=True):
            if plan.inner and trial.penalised:
                chosen = strength = _choose_strength(plan, trial, matrix, train, values, drawn, labels)
            if _is_plain_ridge(plan, trial, matrix):
                solved = solve_ridge(matrix, [(train, test)], [RidgeTarget(values, labels.classes)], [strength])[0][0][0]
                return _score(plan, at, solved.outcome, solved.seconds, ended=True, strength=chosen)
            estimator = make_estimator(trial, drawn, plan.task, preprocessing=plan.preprocessing, strength=strength)
            codes = None if labels.classes is None else np.searchsorted(labels.classes, values[train])
            keep_together(estimator, trial.probe, codes, plan.kept[train], drawn)
            rows = matrix[train]
            started = time.perf_counter()
            estimator = _fit(plan, trial, estimator, rows, values[train])
            seconds = time.perf_counter() - started
            del rows
            outcome = _predict(plan, labels, estimator, matrix[test], values[test], values[train])
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  (whatever the caller's own estimators raise)
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return Fit(at, (np.nan,) * len(plan.metrics), FAILED, np.nan, True, chosen, None, problem)
    return _score(plan, at, outcome, seconds, ended=converged(estimator), strength=chosen)


def _fit(plan: FitPlan, trial: Trial, estimator: Estimator, rows: Array, values: Array) -> Any:
    if plan.preprocessing is None and trial.features != "text":
        return fit_in_place(trial.probe, estimator, rows, values)
    return fit_probe(trial.probe, estimator, rows, values)


def _predict(plan: FitPlan, labels: Labels, estimator: Estimator, rows: Array, true: Array, known: Array) -> Outcome:
    needs = {metric.needs for metric in (*plan.metrics, *([plan.choose_by] if plan.choose_by else []))}
    if plan.predictions:
        needs |= {"scores", "probabilities"}
    codes = true if labels.classes is None else np.searchsorted(labels.classes, true)
    return outcome_of(estimator, rows, codes, labels.classes, needs=needs, known=np.unique(known))


def _score(
    plan: FitPlan, at: tuple[int, int, int, int, int, int, int], outcome: Outcome, seconds: float, *, ended: bool, strength: float = np.nan
) -> Fit:
    values, reasons = score_outcome(outcome, plan.metrics)
    return Fit(at, tuple(values), reasons, seconds, ended, strength, outcome if plan.predictions else None)


def _choose_strength(plan: FitPlan, trial: Trial, matrix: Array, train: Array, values: Array, seed: int, labels: Labels) -> float:
    """The strength with the best mean score over inner folds of the training rows; the strongest of equally good ones."""
    assert plan.choose_by is not None  # noqa: S101  (for mypy: strengths are chosen by something)
    codes = None if labels.classes is None else np.searchsorted(labels.classes, values[train])
    within = [(train[learn], train[look]) for learn, look in inner_folds(codes, plan.kept[train], plan.inner, seed)]
    if _is_plain_ridge(plan, trial, matrix):
        solved = solve_ridge(matrix, within, [RidgeTarget(values, labels.classes)], plan.strengths)
        outcomes = [[of_fold[place][0].outcome for of_fold in solved] for place in range(len(plan.strengths))]
    else:
        outcomes = []
        for strength in plan.strengths:
            of_strength = []
            for learn, look in within:
                estimator = make_estimator(trial, seed, plan.task, preprocessing=plan.preprocessing, strength=strength)
                estimator = _fit(plan, trial, estimator, matrix[learn], values[learn])
                of_strength.append(_predict(plan, labels, estimator, matrix[look], values[look], values[learn]))
            outcomes.append(of_strength)
    means = np.array([np.mean([score_outcome(each, [plan.choose_by])[0][0] for each in of_strength]) for of_strength in outcomes])
    means = means if plan.choose_by.larger_is_better else -means
    if np.isnan(means).all():
        raise InvalidArgumentError(
            f"no strength can be chosen by {plan.choose_by.name!r}, which is undefined for {trial.name!r}: use another, or fewer folds"
        )
    best = np.flatnonzero(means == np.nanmax(means))
    return max(plan.strengths[place] for place in best)
