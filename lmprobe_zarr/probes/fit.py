"""The body of every task: all folds of some trials on one layer, and their scores.

Never how tasks are distributed, a store or a plot. The records are in ``task``, how a layer is read and checked in ``layer``.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import reduce
from itertools import product
from operator import or_
from typing import Any

import numpy as np
import xarray as xr

from lmprobe_zarr.display import describe_error
from lmprobe_zarr.errors import LabelError
from lmprobe_zarr.probes.batched import BATCHED, Bulk, FitRequest
from lmprobe_zarr.probes.classifiers import converged, fit_in_place
from lmprobe_zarr.probes.controls import DIRECTION, Trial, make_estimator
from lmprobe_zarr.probes.folds import Fold, inner_folds, keep_together
from lmprobe_zarr.probes.gram import RidgeTarget, Solved, solve_ridge
from lmprobe_zarr.probes.labels import Labels
from lmprobe_zarr.probes.layer import as_fit_dtype, fits_running, not_finite_rows, read_layer
from lmprobe_zarr.probes.metrics import FAILED, NOT_STORED, Outcome, outcome_of, score_outcome
from lmprobe_zarr.probes.ridge import fit_probe, is_ridge, rows_for
from lmprobe_zarr.probes.task import Fit, FitPlan, FitTask, NotFiniteError
from lmprobe_zarr.tokens import stored_rows
from lmprobe_zarr.typing import Array, Estimator

__all__ = ["draw_within", "fit_task"]
#: Variable, layer, trial, fold, seed, strength and labels of a fit, as `Fit.at` has them.
_Place = tuple[int, int, int, int, int, int, int]
#: Whether ridges on a processor are left to `solve_ridge`; tests of the batch say no.
_RIDGES_BY_GRAM = True


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
    chosen = plan.chooses_strength(trial)
    grid = trial.penalised and bool(plan.strengths) and not chosen
    strengths: tuple[float | None, ...] = plan.strengths if grid else (None,)
    layer = -1 if task.variable < 0 or not trial.by_layer else plan.variables[task.variable].layers[task.layer]
    # With several seeds, a trial that draws nothing at random is fitted once and its scores apply to every seed.
    seeds = range(len(plan.seeds)) if random or len(plan.seeds) == 1 else range(1)
    if trial.shuffles:
        yield from _fit_shuffles(plan, task, number, matrix, layer, strengths if grid else None)
        return
    bulk = _bulk(plan, trial, matrix)
    grams: list[list[list[Solved]]] | None = None
    if not bulk and _is_plain_ridge(plan, trial, matrix) and not chosen and not trial.shuffled:
        # All folds, strengths and labels at once, since they share products of rows.
        wanted = [RidgeTarget(each.values, each.classes) for each in plan.labels]
        # Where it raises, each fit is made by itself below, so that only those that fail are lost.
        with suppress(ArithmeticError, np.linalg.LinAlgError, ValueError):
            grams = solve_ridge(matrix, plan.folds, wanted, strengths)
    elif not _is_plain_ridge(plan, trial, matrix):
        # Where one set of targets needs float64, all are fitted in it.
        for each in plan.labels:
            matrix = rows_for(trial.probe, matrix, None if each.classes is not None else each.values[each.rows])
    within = chosen or plan.is_candidate(trial)
    candidates = plan.strengths if chosen else strengths
    places = [
        (task.variable, layer, number, fold, seed if random or len(plan.seeds) == 1 else -1, -1, which)
        for fold in range(len(plan.folds))
        for seed in seeds
        for which in range(len(plan.labels))
    ]
    rows = {
        seed: _project(plan, trial, max(seed, 0), matrix) if trial.features == DIRECTION else matrix for seed in {at[4] for at in places}
    }
    if within:
        bulk.solve(_requests_within(plan, trial, places, candidates, bulk))
    inner = {at: _score_within(plan, task, at, rows[at[4]], candidates, bulk) for at in places} if within else {}
    best = {at: _best_strength(plan, means) for at, (means, _) in inner.items()} if chosen else {}
    whole = [(strength, place) for place, strength in enumerate(strengths)]
    fitted = {at: [(plan.strengths[best[at]], best[at])] if chosen else whole for at in places}
    bulk.solve(_request(plan, trial, at, strength) for at in places for strength, _ in fitted[at])
    for at in places:
        for strength, place in fitted[at]:
            where = (*at[:5], place if grid else -1, at[6])
            means, problems = inner.get(at, (None, None))
            if problems is not None and problems[place]:
                yield _failed(plan, where, problems[place])
                continue
            if grams is not None:
                solved = grams[at[3]][place][at[6]]
                fit = _score(plan, where, solved.outcome, solved.seconds, ended=True)
            else:
                fit = _fit_fold(plan, task, where, rows[at[4]], strength, bulk)
            if means is not None:
                picked = strength if chosen and strength is not None else np.nan
                fit = replace(fit, strength=picked, inner=float(means[place]))
            yield fit


def _bulk(plan: FitPlan, trial: Trial, matrix: Any) -> Bulk:
    """What solves the fits of a trial together, if the plan says so and its probe is one that can be."""
    plain = plan.preprocessing is None and trial.features != DIRECTION and not trial.of_words and matrix.ndim == 2
    named = plan.solver == "batched" and plain and isinstance(trial.probe, str) and trial.probe in BATCHED
    # On a processor, `solve_ridge` shares more: it takes a quarter of the time.
    named = named and not (_RIDGES_BY_GRAM and plan.device == "cpu" and is_ridge(trial.probe))
    return Bulk(trial.probe if named else "", matrix, plan.device)


def _request(plan: FitPlan, trial: Trial, at: _Place, strength: float | None, shuffle: int = 0) -> FitRequest:
    values, folds = _labels_of(plan, trial, at[6], at[4], shuffle)
    train, test = folds[at[3]]
    return FitRequest(train, test, values, plan.labels[at[6]].classes, strength)


def _requests_within(
    plan: FitPlan, trial: Trial, places: Iterable[_Place], strengths: Sequence[float | None], bulk: Bulk, shuffles: Iterable[int] = (0,)
) -> Iterator[FitRequest]:
    """The fits of the inner folds; none where they cannot be drawn, which `_score_within` reports."""
    for at, shuffle in product(places, shuffles):
        with suppress(LabelError):
            values, within = _folds_within(plan, trial, at, shuffle, bulk)
            for (train, test), strength in product(within, strengths):
                yield FitRequest(train, test, values, plan.labels[at[6]].classes, strength)


def _fit_shuffles(
    plan: FitPlan, task: FitTask, number: int, matrix: Array, layer: int, grid: tuple[float | None, ...] | None
) -> Iterator[Fit]:
    """Fits on labels that are shuffled many times: by fold the mean over the shuffles, with the mean over the folds of each shuffle."""
    trial = plan.trials[number]
    bulk = _bulk(plan, trial, matrix)
    for seed, which in np.ndindex(len(plan.seeds), len(plan.labels)):
        of_folds = [(task.variable, layer, number, fold, seed, -1, which) for fold in range(len(plan.folds))]
        every = list(product(of_folds, range(trial.shuffles)))
        if plan.chooses_strength(trial):
            bulk.solve(_requests_within(plan, trial, of_folds, plan.strengths, bulk, range(trial.shuffles)))
            inner = (
                {(at, shuffle): _score_within(plan, task, at, matrix, plan.strengths, bulk, shuffle) for at, shuffle in every}
                if bulk
                else {}
            )
            chosen = {key: plan.strengths[_best_strength(plan, means)] for key, (means, _) in inner.items()}
            bulk.solve(_request(plan, trial, at, strength, shuffle) for (at, shuffle), strength in chosen.items())
        else:
            bulk.solve(_request(plan, trial, at, strength, shuffle) for (at, shuffle), strength in product(every, grid or (None,)))
        for place, strength in enumerate(grid or (None,)):
            at = (task.variable, layer, number, 0, seed, place if grid else -1, which)
            fits = [_fit_shuffle(plan, task, at, matrix, strength, shuffle, bulk) for shuffle in range(trial.shuffles)]
            values = np.array([[fit.values for fit in of_shuffle] for of_shuffle in fits]).transpose(2, 0, 1)  # metric, shuffle, fold
            for fold, of_fold in enumerate(zip(*fits, strict=True)):
                failed = [fit for fit in of_fold if (fit.reasons & FAILED) == FAILED]
                yield Fit(
                    (*at[:3], fold, *at[4:]),
                    tuple(_known_mean(values[:, :, fold]).tolist()),
                    # A shuffle whose fit failed is left out of the mean, and counts as no worse than the probe in the p-value.
                    FAILED if len(failed) == len(of_fold) else reduce(or_, (fit.reasons for fit in of_fold if fit not in failed)),
                    float(np.nansum([fit.seconds for fit in of_fold])),
                    all(fit.converged for fit in of_fold),
                    np.nan,
                    None,
                    failed[0].problem if failed else "",
                    shuffled=None if fold else _known_mean(values),
                )


def _fit_shuffle(plan: FitPlan, task: FitTask, at: _Place, matrix: Array, strength: float | None, shuffle: int, bulk: Bulk) -> list[Fit]:
    """The fits of all folds of one shuffle."""
    trial, labels = plan.trials[at[2]], plan.labels[at[6]]
    values, folds = _labels_of(plan, trial, at[6], at[4], shuffle)
    places = [(*at[:3], fold, *at[4:]) for fold in range(len(folds))]
    if plan.chooses_strength(trial):
        return [_fit_chosen(plan, task, where, matrix, shuffle, bulk) for where in places]
    if not bulk and _is_plain_ridge(plan, trial, matrix):
        # All folds at once, since they share products of rows.
        solved = solve_ridge(matrix, folds, [RidgeTarget(values, labels.classes)], [strength])
        return [_score(plan, where, each[0][0].outcome, each[0][0].seconds, ended=True) for where, each in zip(places, solved, strict=True)]
    return [_fit_fold(plan, task, where, matrix, strength, bulk, shuffle) for where in places]


def _fit_chosen(plan: FitPlan, task: FitTask, at: _Place, matrix: Array, shuffle: int, bulk: Bulk) -> Fit:
    """The fit of one fold of a shuffle, with a strength that is chosen within its training rows."""
    inner, problems = _score_within(plan, task, at, matrix, plan.strengths, bulk, shuffle)
    best = _best_strength(plan, inner)
    return _failed(plan, at, problems[best]) if problems[best] else _fit_fold(plan, task, at, matrix, plan.strengths[best], bulk, shuffle)


def _known_mean(values: Array) -> Array:
    """The mean along the last axis of what is not NaN; NaN where all is."""
    known = np.isfinite(values)
    counted = known.sum(axis=-1)
    total = np.where(known, values, 0.0).sum(axis=-1)
    return np.asarray(np.divide(total, counted, out=np.full(counted.shape, np.nan), where=counted > 0))


def _is_plain_ridge(plan: FitPlan, trial: Trial, matrix: Array) -> bool:
    """Whether a trial is the named ridge on rows as they are, which `solve_ridge` fits."""
    return is_ridge(trial.probe) and plan.preprocessing is None and trial.features != DIRECTION and not trial.of_words and matrix.ndim == 2


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


def _labels_of(plan: FitPlan, trial: Trial, which: int, seed: int, shuffle: int = 0) -> tuple[Array, Sequence[Fold]]:
    """The labels that a trial learns, shape (prompt,), and its folds."""
    return plan.shuffled[which][max(seed, 0)][shuffle] if trial.shuffled else (plan.labels[which].values, plan.folds)


def _fit_fold(plan: FitPlan, task: FitTask, at: _Place, matrix: Array, strength: float | None, bulk: Bulk, shuffle: int = 0) -> Fit:
    """One fit; NaN with its error where the estimator raises any, so that a sweep keeps all other scores."""
    import sklearn

    _, _, number, fold, seed, _, which = at
    trial, labels = plan.trials[number], plan.labels[which]
    values, folds = _labels_of(plan, trial, which, seed, shuffle)
    ready = bulk.take(folds[fold][0], values, strength)
    if ready is not None:
        return _score(plan, at, ready.outcome, ready.seconds, ended=ready.ended)
    try:
        # The layer has been checked; without this, each estimator would check each fold several times again.
        with sklearn.config_context(assume_finite=True):
            if _is_plain_ridge(plan, trial, matrix):
                solved = solve_ridge(matrix, [folds[fold]], [RidgeTarget(values, labels.classes)], [strength])[0][0][0]
                return _score(plan, at, solved.outcome, solved.seconds, ended=True)
            drawn = _fit_seed(plan, task, trial, fold, max(seed, 0))
            needs = {metric.needs for metric in plan.metrics} | ({"scores", "probabilities"} if plan.predictions else set())
            outcome, seconds, ended = _fit_and_predict(plan, trial, labels, values, matrix, folds[fold], drawn, strength, needs)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  (whatever the caller's own estimators raise)
        return _failed(plan, at, describe_error(error))
    return _score(plan, at, outcome, seconds, ended=ended)


def _failed(plan: FitPlan, at: _Place, problem: str) -> Fit:
    return Fit(at, (np.nan,) * len(plan.metrics), FAILED, np.nan, True, np.nan, None, problem)


def _fit_and_predict(
    plan: FitPlan,
    trial: Trial,
    labels: Labels,
    values: Array,
    matrix: Array,
    fold: Fold,
    seed: int,
    strength: float | None,
    needs: Iterable[str],
) -> tuple[Outcome, float, bool]:
    """The predictions for the test rows of a fold, the seconds of the fit, and whether it converged."""
    train, test = fold
    estimator = make_estimator(trial, seed, plan.task, preprocessing=plan.preprocessing, strength=strength)
    codes = None if labels.classes is None else np.searchsorted(labels.classes, values[train])
    # On the folds that `choose` draws too, so that both choose alike.
    keep_together(estimator, trial.probe, codes, plan.kept[train], plan.random_state)
    rows = matrix[train]
    started = time.perf_counter()
    estimator = _fit(plan, trial, estimator, rows, values[train])
    seconds = time.perf_counter() - started
    del rows
    true = values[test] if labels.classes is None else np.searchsorted(labels.classes, values[test])
    outcome = outcome_of(estimator, matrix[test], true, labels.classes, needs=set(needs), known=np.unique(values[train]))
    return outcome, seconds, converged(estimator)


def _fit(plan: FitPlan, trial: Trial, estimator: Estimator, rows: Array, values: Array) -> Any:
    if plan.preprocessing is None and not trial.of_words:
        return fit_in_place(trial.probe, estimator, rows, values)
    return fit_probe(trial.probe, estimator, rows, values)


def _score(plan: FitPlan, at: _Place, outcome: Outcome, seconds: float, *, ended: bool) -> Fit:
    values, reasons = score_outcome(outcome, plan.metrics)
    return Fit(at, tuple(values), reasons, seconds, ended, np.nan, outcome if plan.predictions else None)


# -- choosing within training folds ----------------------------------------------------------------------------------------


def _score_within(
    plan: FitPlan,
    task: FitTask,
    at: _Place,
    matrix: Array,
    strengths: Sequence[float | None],
    bulk: Bulk,
    shuffle: int = 0,
) -> tuple[Array, list[str]]:
    """For each strength the mean score over inner folds of the training rows, NaN where there is none, with the problem."""
    import sklearn

    assert plan.choose_by is not None  # noqa: S101  (for mypy: what is chosen is chosen by something)
    _, _, number, _, seed, _, which = at
    trial, labels, metric = plan.trials[number], plan.labels[which], plan.choose_by
    found, problems = np.full(len(strengths), np.nan), [""] * len(strengths)
    try:
        values, within = _folds_within(plan, trial, at, shuffle, bulk)
        with sklearn.config_context(assume_finite=True):
            # All strengths at once, since they share products of rows.
            ridge = not bulk and _is_plain_ridge(plan, trial, matrix)
            solved = solve_ridge(matrix, within, [RidgeTarget(values, labels.classes)], strengths) if ridge else []
            for place, strength in enumerate(strengths):
                try:
                    ready = [bulk.take(learn, values, strength) for learn, _ in within]
                    outcomes = [of_fold[place][0].outcome for of_fold in solved] or [
                        done.outcome
                        if (done := ready[inner]) is not None
                        else _fit_and_predict(
                            plan, trial, labels, values, matrix, each, _fit_seed(plan, task, trial, inner, max(seed, 0)), strength,
                            {metric.needs},
                        )[0]
                        for inner, each in enumerate(within)
                    ]  # fmt: skip
                except MemoryError:
                    raise
                except Exception as error:  # noqa: BLE001  (whatever the caller's own estimators raise)
                    problems[place] = describe_error(error)
                    continue
                scores = np.array([score_outcome(outcome, [metric])[0][0] for outcome in outcomes])
                # Undefined for a fold, as AUROC is where it tests a single class: undefined for all that could be chosen.
                if np.isnan(scores).all():
                    problems[place] = f"{metric.name!r}, by which is chosen, is undefined in every inner fold: use another, or fewer folds"
                else:
                    found[place] = np.nanmean(scores)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001
        problems = [describe_error(error)] * len(strengths)
    return found, problems


def _folds_within(plan: FitPlan, trial: Trial, at: _Place, shuffle: int, bulk: Bulk) -> tuple[Array, tuple[Fold, ...]]:
    """The labels that a trial learns, and the inner folds of one of its training sets."""
    _, _, _, fold, seed, _, which = at
    values, folds = _labels_of(plan, trial, which, seed, shuffle)
    if not trial.shuffled:
        return values, plan.within[which][fold]
    train = folds[fold][0]
    return values, bulk.once(train, values, lambda: draw_within(plan, values, plan.labels[which], train))


def draw_within(plan: FitPlan, values: Array, labels: Labels, train: Array) -> tuple[Fold, ...]:
    """Inner folds of the training rows of a fold, as rows of the matrix: those of a sweep of these rows alone.

    Parameters
    ----------
    plan : FitPlan
    values : ndarray, shape (prompt,)
        What is learned: the true labels, or shuffled ones.
    labels : Labels
        Their classes.
    train : ndarray of int

    Raises
    ------
    LabelError
        The training rows hold a class in a single prompt (or group).
    """
    codes = None if labels.classes is None else np.searchsorted(labels.classes, values[train])
    found = inner_folds(codes, plan.kept[train], plan.inner, plan.random_state, grouped=plan.grouped)
    return tuple((train[learn], train[look]) for learn, look in found)


def _best_strength(plan: FitPlan, means: Array) -> int:
    """The place of the strength with the best score; the strongest of equally good ones; the first where there are no scores."""
    assert plan.choose_by is not None  # noqa: S101  (for mypy)
    means = means if plan.choose_by.larger_is_better else -means
    if np.isnan(means).all():
        return 0
    best: list[int] = np.flatnonzero(means == np.nanmax(means)).tolist()
    return max(best, key=lambda place: plan.strengths[place])
