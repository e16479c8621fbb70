"""Probes on more rows than fit into memory: Dask tasks read the rows block by block, and add them to sums, or learn from them.

This module cuts a token axis into spans and blocks, does the work of one task on its span, and merges the results of the tasks. The sums
and their solutions are those of ``probes.sufficient``; ``tokens`` decides labels, folds and results. Never a store or a plot.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import numpy as np
import xarray as xr

from lmprobe_zarr.batch import as_slice, concat_ranges, offsets_of
from lmprobe_zarr.display import describe_error
from lmprobe_zarr.errors import LabelError
from lmprobe_zarr.probes import (
    EXACT,
    ClassSums,
    NotFiniteError,
    SequenceSolution,
    Solution,
    Unit,
    draw_looks,
    empty_sums,
    fit_sequences,
    fits_running,
    is_sequence_probe,
    merge_sums,
    not_finite_rows,
    order_of,
    parse_sequence_probe,
    scaling_of,
    solve,
    unit_of,
)
from lmprobe_zarr.probes.devices import parse_device
from lmprobe_zarr.probes.passes import Leading, PassDescent, Point, Seen, leading_directions, look
from lmprobe_zarr.probes.sequence_fits import SequenceFit
from lmprobe_zarr.tasks import Runner
from lmprobe_zarr.tokens import inner_dim
from lmprobe_zarr.typing import Array, Floats, Ints, Mask

__all__ = ["BLOCK_BYTES", "STREAMED", "Fitted", "LayerRows", "TaskPlan", "fit_stream", "measure_stream", "score_stream"]

#: Bytes of the rows in one block, as float64; a task holds about four times as much beside its sums.
BLOCK_BYTES: Final = 16 * 2**20
#: The units of the sums come from a sample of this many rows, in this many runs.
_SAMPLE_ROWS, _SAMPLE_RUNS = 1024, 16
#: Limits of a descent. It makes as many passes as see a million rows, which scikit-learn calls enough, but at least 20 and at most 1000.
#: It ends early when twice as many passes have changed the loss by less than the tolerance (in nats).
_EPOCHS, _ROWS_SEEN, _TOLERANCE = (20, 1000), 10**6, 1e-4
#: A minibatch is made of this many runs of rows from random places, since a store may be sorted by label.
_RUNS: Final = 16

#: The named probe that takes several passes, and its penalty.
_BY_PASSES, _PENALTY = "logistic_regression", 1.0

#: The named probes that can be fitted block by block.
STREAMED: Final = (*EXACT, _BY_PASSES, "sgd")


@dataclass(frozen=True, slots=True)
class LayerRows:
    """Some rows of every layer, read a block at a time.

    Parameters
    ----------
    variable : xarray.Variable, dims (layer, row, hidden) in any order, perhaps without layer
        In memory, lazy, or a Dask array.
    dim : str
        The name of the row dimension.
    rows : ndarray of int64
        Which rows, ascending.
    """

    variable: xr.Variable
    dim: str
    rows: Ints

    @property
    def hidden(self) -> int:
        """Width of a row."""
        return int(self.variable.sizes[inner_dim(self.variable)])

    @property
    def block_rows(self) -> int:
        """Rows of a block: `BLOCK_BYTES` in float64."""
        return max(16, BLOCK_BYTES // (8 * self.hidden))

    @property
    def is_dask(self) -> bool:
        return self.variable.chunks is not None

    @property
    def is_in_memory(self) -> bool:
        return not self.is_dask and bool(self.variable._in_memory)

    def blocks(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Start and stop of every block between two places among the rows."""
        for begin in range(start, stop, self.block_rows):
            yield begin, min(begin + self.block_rows, stop)

    def lazily(self, layer: int, places: slice | Ints) -> Any:
        """Some rows of a layer, shape (row, hidden): values, or a Dask array that is not computed yet."""
        rows = as_slice(self.rows[places])
        # Sliced anew every time: xarray caches in a lazy slice what it has read.
        taken = self.variable.isel({"layer": layer, self.dim: rows}, missing_dims="ignore")
        turned = taken.dims[0] != self.dim
        data = taken.data if self.is_dask else taken.values
        # Read before it is transposed: a lazy transpose reads point by point.
        return data.T if turned else data

    def read(self, layer: int, places: slice | Ints) -> Array:
        """Some rows of a layer as values, shape (row, hidden)."""
        data = self.lazily(layer, places)
        return np.asarray(data.compute() if self.is_dask else data)


@dataclass(frozen=True, slots=True)
class TaskPlan:
    """What all tasks of a fit share.

    Parameters
    ----------
    layer_rows : LayerRows or None
        None if the values are passed to the tasks.
    n_rows, hidden, block_rows : int
    layers, probes : tuple of str
    codes, cell, prompt : ndarray of int, shape (row,)
        Class, cell and prompt of each row.
    n_classes : int
    trains : ndarray of bool, shape (fold, cell)
    tests : ndarray of bool, shape (fold, prompt), or None
    random_state : int
    unit : ndarray of int, shape (prompt,), or None
        The group of each prompt, which stays whole where a fit holds some of its training prompts out.
    device : str
        Where probes with a pooling of their own learn.
    """

    layer_rows: LayerRows | None
    n_rows: int
    hidden: int
    block_rows: int
    layers: tuple[str, ...]
    probes: tuple[str, ...]
    codes: Array
    cell: Array
    prompt: Array
    n_classes: int
    trains: Mask
    tests: Mask | None
    random_state: int
    unit: Ints | None = None
    device: str = "cpu"


#: Solutions by number of the probe, and fold.
Solutions = dict[tuple[int, int], Solution | SequenceSolution]


@dataclass(frozen=True, slots=True)
class Fitted:
    """One probe on one layer and fold."""

    solution: Solution | SequenceSolution
    seconds: float
    converged: bool
    #: The error that the fit ended in; its solution then is NaN.
    problem: str = ""


# -- tasks -----------------------------------------------------------------------------------------------------------------


def _blocks(plan: TaskPlan, layer: int, start: int, stop: int, values: Any) -> Iterator[tuple[slice, Array]]:
    """The rows of a span, block by block: of the values passed to the task, or read by it."""
    for begin in range(start, stop, plan.block_rows):
        place = slice(begin, min(begin + plan.block_rows, stop))
        if values is None:
            assert plan.layer_rows is not None  # noqa: S101  (without values, tasks read by themselves)
            yield place, plan.layer_rows.read(layer, place)
        else:
            yield place, np.asarray(values[begin - start : place.stop - start])


def _sample_unit(values: Any, plan: TaskPlan | None = None, layer: int = 0, places: Any = None) -> Unit:
    rows = np.asarray(values) if values is not None else plan.layer_rows.read(layer, places)  # type: ignore[union-attr]
    finite = np.isfinite(rows.astype(np.float64).sum(axis=1))
    return unit_of(rows[finite] if finite.any() else np.zeros((1, rows.shape[1])))


@dataclass(frozen=True, slots=True)
class _SpanSums:
    class_sums: ClassSums
    #: Places of the rows that hold NaN or infinity; the sums leave them out.
    bad: tuple[Ints, ...]
    seconds: float


def _sum_span(plan: TaskPlan, layer: int, unit: Unit, before: _SpanSums | None, start: int, stop: int, values: Any) -> _SpanSums:
    """The sums over a span, added to those `before` it if given; the body of a task."""
    began = time.perf_counter()
    if before is None:
        order = order_of(probe for probe in plan.probes if probe in EXACT) if set(plan.probes) & set(EXACT) else 1
        class_sums, bad = empty_sums(unit, plan.trains.shape[1], plan.n_classes, order), []
    else:
        # Not in place: a scheduler may run a task again with the same arguments.
        class_sums, bad = before.class_sums.copy(), list(before.bad)
    with fits_running():
        for place, rows in _blocks(plan, layer, start, stop, values):
            cells, codes = plan.cell[place], plan.codes[place]
            not_finite = np.array(not_finite_rows(rows), np.int64)
            if len(not_finite):
                bad.append(not_finite + place.start)
                rows, cells, codes = (np.delete(each, not_finite, axis=0) for each in (rows, cells, codes))
            if len(rows):
                class_sums.add(rows, cells, codes)
    return _SpanSums(class_sums, tuple(bad), time.perf_counter() - began + (0 if before is None else before.seconds))


def _merge(sums: Sequence[_SpanSums]) -> _SpanSums:
    first, *others = sums
    if not others:
        return first
    class_sums = first.class_sums.copy()
    for other in others:
        class_sums = merge_sums(class_sums, other.class_sums)
    return _SpanSums(class_sums, tuple(bad for each in sums for bad in each.bad), sum(each.seconds for each in sums))


def _solve_layer(plan: TaskPlan, layer: int, sums: Sequence[_SpanSums]) -> tuple[dict[tuple[int, int], Fitted], list[Any], float]:
    """Every exact probe on every training set of a layer, the scaling of each training set for others, and the seconds of the pass."""
    whole = _merge(sums)
    if whole.bad:
        raise NotFiniteError(layer, np.concatenate(whole.bad).tolist())
    found: dict[tuple[int, int], Fitted] = {}
    scaling: list[Any] = []
    inexact = not set(plan.probes) <= set(EXACT)
    with fits_running():
        for fold, trained in enumerate(plan.trains):
            # A single cell needs no copy.
            class_sums = whole.class_sums if len(trained) == 1 else whole.class_sums.union(np.flatnonzero(trained))
            # Rounded, since the last digits depend on the number of tasks that summed, and the result of a descent would then too.
            scaling.append(tuple(each.astype(np.float32).astype(np.float64) for each in scaling_of(class_sums)) if inexact else None)
            for number, probe in enumerate(plan.probes):
                if probe in EXACT:
                    found[number, fold] = _solve_one(probe, class_sums)
    return found, scaling, whole.seconds


def _solve_one(probe: str, class_sums: ClassSums) -> Fitted:
    """One exact probe; NaN with its error where it cannot be solved, so that all other fits are kept."""
    began = time.perf_counter()
    try:
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            solution = solve(probe, class_sums)
        if np.isfinite(solution.coef).all() and np.isfinite(solution.intercept).all():
            return Fitted(solution, time.perf_counter() - began, True)
        problem = "the solution is not finite"
    except (ArithmeticError, ValueError) as error:  # LinAlgError is a ValueError
        problem = describe_error(error)
    nothing = _no_solution(np.flatnonzero(class_sums.counts[0]), len(class_sums.unit.origin))
    return Fitted(nothing, time.perf_counter() - began, True, problem)


def _no_solution(classes: Array, hidden: int) -> Solution:
    rows = 1 if len(classes) == 2 else len(classes)
    return Solution(np.full((rows, hidden), np.nan), np.full(rows, np.nan), classes)


def _seed_of(plan: TaskPlan, layer: int, probe: str, fold: int) -> int:
    words = f"{plan.random_state}\0{plan.layers[layer]}\0{probe}\0{fold}"
    return int.from_bytes(hashlib.sha256(words.encode("utf-8", "surrogatepass")).digest()[:4], "little")


def _minibatches(n: int, size: int, seed: int) -> Iterator[Ints]:
    """All numbers below n in random order, about `size` at a time. Each time they form `_RUNS` runs, so that reading takes few ranges."""
    rng = np.random.default_rng(seed)
    run = max(1, size // _RUNS)
    starts = rng.permutation(np.arange(0, n, run))
    for lot in range(0, len(starts), _RUNS):
        yield np.concatenate([np.arange(start, min(start + run, n)) for start in np.sort(starts[lot : lot + _RUNS])])


def _reader(plan: TaskPlan, layer: int, values: Any) -> Callable[[Ints], Array]:
    """Reads rows of a layer by their places: by a function, of values that were passed to the task, or by the task itself."""
    if callable(values):
        return values  # type: ignore[no-any-return]
    if values is not None:
        return lambda places: np.asarray(values[places])
    assert plan.layer_rows is not None  # noqa: S101  (without values, tasks read by themselves)
    return partial(plan.layer_rows.read, layer)


def _fit_sgd(plan: TaskPlan, layer: int, scaling: Sequence[Any], values: Any) -> dict[tuple[int, int], Fitted]:
    """Logistic regression by stochastic gradient descent on every training set of a layer at once; by number of the probe, and fold."""
    began = time.perf_counter()
    read = _reader(plan, layer, values)
    descents = [_Descent(plan, layer, fold, trained) for fold, trained in enumerate(plan.trains)]
    with fits_running():
        for epoch in range(int(np.clip(-(-_ROWS_SEEN // plan.n_rows), *_EPOCHS))):
            rng = np.random.default_rng([_seed_of(plan, layer, "order", 0), epoch])
            for places in _minibatches(plan.n_rows, plan.block_rows, _seed_of(plan, layer, f"epoch {epoch}", 0)):
                rows, cells, codes = read(places), plan.cell[places], plan.codes[places]
                order = rng.permutation(len(places))
                for descent, (mean, scale) in zip(descents, scaling, strict=True):
                    mine = order[descent.trained[cells[order]]]
                    if len(mine) and not descent.ended:
                        descent.learn_or_end((rows[mine] - mean) / scale, codes[mine])
            for descent in descents:
                descent.end_epoch(epoch + 1)
            if all(descent.ended for descent in descents):
                break
    seconds = (time.perf_counter() - began) / len(descents)
    found, number = {}, plan.probes.index("sgd")
    for fold, (descent, (mean, scale)) in enumerate(zip(descents, scaling, strict=True)):
        if descent.problem:
            found[number, fold] = Fitted(_no_solution(descent.classes, plan.hidden), seconds, True, descent.problem)
            continue
        solution = descent.mean()
        coef = solution[:, :-1] / scale
        found[number, fold] = Fitted(Solution(coef, solution[:, -1] - coef @ mean, descent.classes), seconds, descent.ended)
    return found


def _lead(values: Any, plan: TaskPlan | None = None, layer: int = 0, places: Any = None) -> Leading:
    """The leading directions of some rows in their standard deviations."""
    rows = np.asarray(values) if values is not None else plan.layer_rows.read(layer, places)  # type: ignore[union-attr]
    with fits_running():
        return leading_directions(unit_of(rows).apply(rows))


def _look_span(
    plan: TaskPlan, layer: int, points: Mapping[int, Point], origin: Floats, start: int, stop: int, values: Any
) -> dict[int, Seen]:
    """What a pass over a span finds at a point of each fold; the body of a task."""
    found: dict[int, Seen] = {}
    with fits_running():
        for place, rows in _blocks(plan, layer, start, stop, values):
            wide, cells, codes = rows.astype(np.float64) - origin, plan.cell[place], plan.codes[place]
            for fold, point in points.items():
                mine = plan.trains[fold][cells]
                seen = look(wide, codes, point) if mine.all() else look(wide[mine], codes[mine], point)
                found[fold] = found[fold] + seen if fold in found else seen
    return found


class _Passes:
    """Logistic regression on every training set of a layer, by passes that all of them share."""

    def __init__(self, plan: TaskPlan, scaling: Sequence[Any], leading: Leading) -> None:
        self._scaling, self.seconds = scaling, 0.0
        #: Rows are taken less this, so that products lose no digits where units are far from zero.
        self.origin = scaling[0][0]
        self.classes, self.descents = [], []
        for trained in plan.trains:
            counts = np.bincount(plan.codes[trained[plan.cell]], minlength=plan.n_classes)
            classes = np.flatnonzero(counts)
            self.classes.append(classes)
            width = 1 if len(classes) == 2 else len(classes)
            self.descents.append(PassDescent(int(counts.sum()), width, plan.hidden, _PENALTY, leading))

    def points(self) -> dict[int, Point]:
        """Where the next pass looks, by fold; empty when all have ended."""
        found = {}
        for fold, descent in enumerate(self.descents):
            if not descent.ended:
                solution = self._raw(fold)
                found[fold] = Point(solution.coef, solution.intercept + solution.coef @ self.origin, solution.classes)
        return found

    def enter(self, spans: Sequence[Mapping[int, Seen]], seconds: float) -> None:
        """Take what a pass found, the spans in their order."""
        self.seconds += seconds
        for fold in spans[0]:
            seen = spans[0][fold]
            for span in spans[1:]:
                seen = seen + span[fold]
            mean, scale = self._scaling[fold]
            gradient = (seen.gradient - np.outer(seen.slope, mean - self.origin)) / scale
            self.descents[fold].enter(replace(seen, gradient=gradient))

    def _raw(self, fold: int) -> Solution:
        descent, (mean, scale) = self.descents[fold], self._scaling[fold]
        coef = descent.coef / scale
        return Solution(coef, descent.intercept - coef @ mean, self.classes[fold])

    def fitted(self) -> dict[int, Fitted]:
        """Every fit, by fold."""
        each = self.seconds / len(self.descents)
        return {
            fold: Fitted(_no_solution(self.classes[fold], len(self.origin)), each, True, descent.problem)
            if descent.problem
            else Fitted(self._raw(fold), each, descent.converged)
            for fold, descent in enumerate(self.descents)
        }


class _Descent:
    """One fit of logistic regression by averaged stochastic gradient descent.

    Steps have a constant size, one over the hidden units, for which standardised rows are safe. The last step is noise; the mean of the
    steps is not. The mean is over the later half of the passes or somewhat more, so that it forgets the way there. Whenever the number of
    passes has doubled, the loss of the mean over all training rows is compared with that at half as many passes.

    Source: B. T. Polyak and A. B. Juditsky, "Acceleration of Stochastic Approximation by Averaging", SIAM Journal on Control and
    Optimization 30 (1992); F. Bach and E. Moulines, "Non-strongly-convex smooth stochastic approximation with convergence rate O(1/n)"
    (2013), arXiv:1306.2119.
    """

    def __init__(self, plan: TaskPlan, layer: int, fold: int, trained: Mask) -> None:
        from lmprobe_zarr.probes import make_probe

        self.trained = trained
        self.classes = np.unique(plan.codes[trained[plan.cell]])
        self.ended = False
        self.problem = ""
        # One regression per class against the rest: in scikit-learn's own of several classes, the intercept is no mean.
        self._wanted = self.classes[1:] if len(self.classes) == 2 else self.classes
        self._estimators = [
            make_probe("sgd", _seed_of(plan, layer, "sgd", fold), standardise=False).set_params(
                shuffle=False, learning_rate="constant", eta0=1 / max(1, plan.hidden), average=True
            )
            for _ in self._wanted
        ]
        # Of a rare class little can be said in nats: what knows its frequency alone has a small loss already.
        counts = np.bincount(plan.codes[trained[plan.cell]], minlength=plan.n_classes)[self._wanted]
        shares = np.clip(counts / max(1, counts.sum() if len(self._wanted) > 1 else int(trained[plan.cell].sum())), 1e-9, 1 - 1e-9)
        unknown = float(np.mean(-shares * np.log(shares) - (1 - shares) * np.log(1 - shares)))
        self._tolerance = _TOLERANCE * min(1.0, float(np.sqrt(unknown / np.log(2))))
        self._seen = 0
        # Sums of all steps so far, and rows seen, at passes 1, 2, 4, 8, ….
        self._marks: dict[int, tuple[Floats, int]] = {0: (np.zeros((1, 1)), 0)}
        self._epochs = 0
        self._candidate: Floats | None = None
        self._loss, self._counted, self._best = 0.0, 0, np.inf

    def _sums(self) -> Floats:
        whole = [np.concatenate([each.coef_, each.intercept_[:, None]], axis=1) for each in self._estimators]
        return np.asarray(np.concatenate(whole) * self._seen)

    def mean(self) -> Floats:
        """The mean of the steps of the later passes, shape (1 or class, hidden + 1), the intercept last."""
        first = max(mark for mark in self._marks if 2 * mark <= self._epochs)
        before, seen = self._marks[first]
        return np.asarray((self._sums() - before) / max(1, self._seen - seen))

    def learn_or_end(self, x: Floats, y: Array) -> None:
        """Learn from some rows; an error ends this descent, and no other one."""
        try:
            self.learn(x, y)
        except (ArithmeticError, ValueError) as error:
            self.ended, self.problem = True, describe_error(error)

    def learn(self, x: Floats, y: Array) -> None:
        hits = y[:, None] == self._wanted
        if self._candidate is not None:
            scores = x @ self._candidate[:, :-1].T + self._candidate[:, -1]
            self._loss += float(np.logaddexp(0, np.where(hits, -scores, scores)).sum()) / scores.shape[1]
            self._counted += len(x)
        for place, estimator in enumerate(self._estimators):
            estimator.partial_fit(x, hits[:, place].astype(int), classes=(0, 1))
        self._seen += len(x)

    def end_epoch(self, epochs: int) -> None:
        if self.ended:
            return
        self._epochs = epochs
        if self._candidate is not None:
            loss = self._loss / max(1, self._counted)
            self.ended = abs(self._best - loss) < self._tolerance
            self._best, self._candidate, self._loss, self._counted = loss, None, 0.0, 0
        if epochs & (epochs - 1) == 0:
            # Compared during the next pass, which reads all rows anyway.
            self._candidate = self.mean()
            self._marks[epochs] = self._sums(), self._seen


def _fit_sequences(plan: TaskPlan, layer: int, scaling: Sequence[Any], values: Any) -> dict[tuple[int, int], Fitted]:
    """Every probe with a pooling of its own on every training set of a layer at once; by number of the probe, and fold."""
    # torch must be there before `fits_running` looks for libraries whose threads it limits.
    parse_device(plan.device, needed_by="a probe that learns how to pool")
    read = _reader(plan, layer, values)
    used, first, number = np.unique(plan.prompt, return_index=True, return_inverse=True)
    counts = np.bincount(number).astype(np.int64)
    # The places of each prompt's rows, prompt by prompt.
    order, offsets = np.argsort(number, kind="stable"), offsets_of(counts)
    codes = plan.codes[first].astype(np.int64)
    kept = np.arange(len(used)) if plan.unit is None else plan.unit[used]

    def read_prompts(prompts: Ints) -> Array:
        places = order[concat_ranges(offsets[prompts], counts[prompts])]
        ascending = np.argsort(places, kind="stable")
        rows = read(places[ascending])
        return rows if (np.diff(ascending) == 1).all() else rows[np.argsort(ascending)]

    asked: dict[tuple[int, int], SequenceFit] = {}
    found: dict[tuple[int, int], Fitted] = {}
    for place, name in enumerate(plan.probes):
        probe = parse_sequence_probe(name)
        for fold, trained in enumerate(plan.trains if probe is not None else ()):
            assert probe is not None  # noqa: S101  (for mypy)
            learns, looks = trained[plan.cell[first]], np.zeros(len(used), bool)
            seed = _seed_of(plan, layer, name, fold)
            try:
                looks[learns] = draw_looks(codes[learns], kept[learns], plan.random_state, grouped=plan.unit is not None)
            except LabelError as error:
                found[place, fold] = Fitted(_no_solution(np.unique(codes[learns]), plan.hidden), 0.0, True, describe_error(error))
                continue
            mean, scale = scaling[fold]
            asked[place, fold] = SequenceFit(probe=probe, learns=learns & ~looks, looks=looks, mean=mean, scale=scale, seed=seed)
    with fits_running():
        order_seed = _seed_of(plan, layer, "order of prompts", 0)
        fits = fit_sequences(list(asked.values()), read_prompts, counts, codes, seed=order_seed, device=plan.device) if asked else []
    for key, fit in zip(asked, fits, strict=True):
        found[key] = Fitted(fit.solution, fit.seconds, fit.converged, fit.problem)
    return found


@dataclass(frozen=True, slots=True)
class Tested:
    """Scores of test rows.

    Parameters
    ----------
    places : mapping of fold to ndarray of int64, shape (row,)
        Places among the rows, which all probes of a fold share.
    scores : mapping of (probe, fold) to ndarray, shape (row,) or (row, class)
    """

    places: Mapping[int, Ints]
    scores: Mapping[tuple[int, int], Array]


def _test_span(plan: TaskPlan, layer: int, solutions: Solutions, start: int, stop: int, values: Any) -> Tested:
    """Scores of the test rows of a span; the body of a task."""
    places: dict[int, list[Ints]] = {fold: [] for _, fold in solutions}
    scores: dict[tuple[int, int], list[Array]] = {key: [] for key in solutions}
    with fits_running():
        for place, rows in _blocks(plan, layer, start, stop, values):
            wide = rows.astype(np.float64)
            for fold, found in places.items():
                assert plan.tests is not None  # noqa: S101  (only folds are tested)
                mine = np.flatnonzero(plan.tests[fold][plan.prompt[place]])
                if not len(mine):
                    continue
                found.append(mine + place.start)
                x = wide if len(mine) == len(wide) else wide[mine]
                for (probe, of), solution in solutions.items():
                    if of == fold:
                        scores[probe, fold].append(_scored(x, solution))
    return Tested(
        {fold: np.concatenate([np.zeros(0, np.int64), *some]) for fold, some in places.items()},
        {key: np.concatenate(some) if some else np.zeros(0) for key, some in scores.items()},
    )


def _scored(x: Array, solution: Solution | SequenceSolution) -> Array:
    """Scores of rows; their projections, for a probe that pools those of a prompt."""
    scores = x @ solution.coef.T + solution.intercept
    return np.asarray(scores[:, 0] if scores.shape[1] == 1 else scores)


def _score_span(plan: TaskPlan, layer: int, solution: Solution | SequenceSolution, start: int, stop: int, values: Any) -> Array:
    """Scores of all rows of a span, float32, shape (row,) or (row, class); or projections, float64; NaN where a row holds NaN."""
    # What is pooled further must not be rounded: a softmax is of differences, which may be small against the projections.
    dtype = np.float64 if isinstance(solution, SequenceSolution) else np.float32
    return np.concatenate(
        [_scored(rows.astype(np.float64), solution).astype(dtype) for _, rows in _blocks(plan, layer, start, stop, values)]
    )


def _collect(*parts: Any) -> list[Any]:
    return list(parts)


class _Spans:
    """Rows cut into spans for a runner's tasks, and the values that are passed to each task."""

    def __init__(self, layer_rows: LayerRows, plan: TaskPlan, runner: Runner) -> None:
        self.layer_rows, self.runner = layer_rows, runner
        self.hands_values = layer_rows.is_dask or (layer_rows.is_in_memory and not runner.reads_here)
        self.plan = replace(plan, layer_rows=None if self.hands_values else layer_rows)
        blocks = -(-plan.n_rows // plan.block_rows)
        spans = min(blocks, -(-runner.workers // max(1, len(plan.layers))))
        size = -(-blocks // spans) * plan.block_rows
        self.bounds = [(start, min(start + size, plan.n_rows)) for start in range(0, plan.n_rows, size)]
        self.shared = runner.hand_over(self.plan)
        self.in_flight = max(1, -(-2 * runner.workers // len(self.bounds)))

    def portions(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The portions of a span that are passed to tasks: the whole span, or its blocks if Dask loads them."""
        return list(self.layer_rows.blocks(start, stop)) if self.layer_rows.is_dask else [(start, stop)]

    def values(self, layer: int, places: slice | Ints) -> Any:
        """Values or a Dask array that a task is passed beside the plan; None if it reads by itself."""
        if not self.hands_values:
            return None
        data = self.layer_rows.lazily(layer, places)
        return data if self.layer_rows.is_dask else self.runner.hand_over_values(np.ascontiguousarray(data))


def fit_stream(layer_rows: LayerRows, plan: TaskPlan, runner: Runner) -> tuple[list[dict[tuple[int, int], Fitted]], list[float]]:
    """The fits of every layer by probe and fold, and the seconds of its pass, summed over all tasks.

    Raises
    ------
    NotFiniteError
        A layer holds NaN or infinity; the error's rows are places among `layer_rows.rows`.
    """
    from dask.delayed import delayed

    spans = _Spans(layer_rows, plan, runner)
    sample_unit, sum_span, solve_layer, collect = (delayed(call, pure=False) for call in (_sample_unit, _sum_span, _solve_layer, _collect))
    where = _sample_places(plan.n_rows)

    def start_unit(layer: int) -> Any:
        values = spans.values(layer, where)
        return sample_unit(values) if values is not None else sample_unit(None, spans.shared, layer, where)

    layers = range(len(plan.layers))
    # Run first, in a graph of their own: if the sums were in the same graph, Dask would keep the chunks that both need.
    units = Runner(runner.client, runner.scheduler, runner.n_workers).run([partial(start_unit, n) for n in layers], "", spans.in_flight)

    def start_sums(layer: int) -> Any:
        sums = []
        for start, stop in spans.bounds:
            state = None
            for begin, end in spans.portions(start, stop):
                state = sum_span(spans.shared, layer, units[layer], state, begin, end, spans.values(layer, slice(begin, end)))
            sums.append(state)
        return solve_layer(spans.shared, layer, collect(*sums))

    solved = runner.run([partial(start_sums, layer) for layer in layers], "fit", spans.in_flight)
    fits = [found for found, _, _ in solved]
    if _BY_PASSES in plan.probes:
        number = plan.probes.index(_BY_PASSES)
        for layer, passes in enumerate(_fit_by_passes(spans, runner, [scaling for _, scaling, _ in solved], where)):
            fits[layer] |= {(number, fold): fitted for fold, fitted in passes.fitted().items()}
    if "sgd" in plan.probes:
        _descend(_fit_sgd, spans, solved, runner, fits)
    if any(map(is_sequence_probe, plan.probes)):
        _descend(_fit_sequences, spans, solved, runner, fits)
    return fits, [seconds for _, _, seconds in solved]


def _fit_by_passes(spans: _Spans, runner: Runner, scaling: Sequence[Sequence[Any]], sample: slice | Ints) -> list[_Passes]:
    """Passes over all layers until every fit of each has ended."""
    from dask.delayed import delayed

    lead, look_span, collect = (delayed(call, pure=False) for call in (_lead, _look_span, _collect))
    plain = Runner(runner.client, runner.scheduler, runner.n_workers)

    def start_lead(layer: int) -> Any:
        values = spans.values(layer, sample)
        return lead(values) if values is not None else lead(None, spans.shared, layer, sample)

    leading = plain.run([partial(start_lead, layer) for layer in range(len(scaling))], "", spans.in_flight)
    found = [_Passes(spans.plan, each, of_layer) for each, of_layer in zip(scaling, leading, strict=True)]

    def start(layer: int) -> Any:
        points, origin = found[layer].points(), found[layer].origin
        return collect(
            *(
                look_span(spans.shared, layer, points, origin, begin, end, spans.values(layer, slice(begin, end)))
                for span in spans.bounds
                for begin, end in spans.portions(*span)
            )
        )

    while going := [layer for layer, passes in enumerate(found) if passes.points()]:
        began = time.perf_counter()
        seen = plain.run([partial(start, layer) for layer in going], "", spans.in_flight)
        for layer, of_layer in zip(going, seen, strict=True):
            found[layer].enter(of_layer, (time.perf_counter() - began) / len(going))
    return found


def _descend(
    fit: Callable[..., dict[tuple[int, int], Fitted]],
    spans: _Spans,
    solved: Sequence[Any],
    runner: Runner,
    fits: Sequence[dict[tuple[int, int], Fitted]],
) -> None:
    """Add to the fits of each layer those that a function makes in passes of its own, which need the scaling that the first pass gave."""
    from dask.delayed import delayed

    plan, layer_rows, layers = spans.plan, spans.layer_rows, range(len(spans.plan.layers))
    if layer_rows.is_dask:
        # The blocks are random, and each step needs the one before it, so this process requests them.
        compute: dict[str, Any] = {"scheduler": runner.scheduler} if runner.client is None else {"scheduler": runner.client}
        found = [
            fit(plan, n, solved[n][1], lambda places, n=n: np.asarray(layer_rows.lazily(n, places).compute(**compute))) for n in layers
        ]
    else:
        every, call = slice(0, plan.n_rows), delayed(fit, pure=False)
        starts = [lambda n=n: call(spans.shared, n, solved[n][1], spans.values(n, every)) for n in layers]
        found = runner.run(starts, "fit", 2 * runner.workers)
    for layer, of_layer in enumerate(found):
        fits[layer].update(of_layer)


def _sample_places(n: int) -> slice | Ints:
    if n <= _SAMPLE_ROWS:
        return slice(0, n)
    run = _SAMPLE_ROWS // _SAMPLE_RUNS
    starts = np.linspace(0, n - run, _SAMPLE_RUNS).astype(np.int64)
    return np.unique((starts[:, None] + np.arange(run)).ravel())


def measure_stream(
    layer_rows: LayerRows,
    plan: TaskPlan,
    runner: Runner,
    fits: Sequence[dict[tuple[int, int], Fitted]],
    measure: Callable[[Solutions, Tested], Any],
) -> list[Any]:
    """The result of a function of each layer's test scores, which a second pass computes.

    Parameters
    ----------
    layer_rows, plan, runner, fits
        As for and from `fit_stream`.
    measure : callable
        Takes the solutions of a layer and the scores of its test rows. It runs in a task, so it must be picklable.
    """
    from dask.delayed import delayed

    spans = _Spans(layer_rows, plan, runner)
    test_span, measured = delayed(_test_span, pure=False), delayed(_measure, pure=False)

    def start(layer: int) -> Any:
        solutions = {key: fitted.solution for key, fitted in fits[layer].items()}
        tested = [
            test_span(spans.shared, layer, solutions, begin, end, spans.values(layer, slice(begin, end)))
            for span in spans.bounds
            for begin, end in spans.portions(*span)
        ]
        return measured(measure, solutions, tested)

    return runner.run([partial(start, layer) for layer in range(len(plan.layers))], "score", spans.in_flight)


def _measure(measure: Callable[..., Any], solutions: Solutions, spans: Sequence[Tested]) -> Any:
    places = {fold: np.concatenate([span.places[fold] for span in spans]) for _, fold in solutions}
    scores = {}
    for probe, fold in solutions:
        # A span without rows of a fold has no axis of classes.
        scores[probe, fold] = np.concatenate([span.scores[probe, fold] for span in spans if len(span.places[fold])])
    return measure(solutions, Tested(places, scores))


def score_stream(
    layer_rows: LayerRows, plan: TaskPlan, runner: Runner, solutions: Sequence[Solution | SequenceSolution]
) -> Iterator[Array]:
    """The scores of all rows of each layer in turn, float32, shape (row,) or (row, class); or projections, float64."""
    from dask.delayed import delayed

    spans = _Spans(layer_rows, plan, runner)
    score_span, collect = delayed(_score_span, pure=False), delayed(_collect, pure=False)

    def start(layer: int) -> Any:
        return collect(
            *(
                score_span(spans.shared, layer, solutions[layer], begin, end, spans.values(layer, slice(begin, end)))
                for span in spans.bounds
                for begin, end in spans.portions(*span)
            )
        )

    for parts in runner.run([partial(start, layer) for layer in range(len(plan.layers))], "score", spans.in_flight):
        yield np.concatenate(parts)
