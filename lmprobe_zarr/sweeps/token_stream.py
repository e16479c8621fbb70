"""Probes on more rows than fit into memory: Dask tasks read the rows block by block, and add them to sums, or learn from them.

This module cuts a token axis into spans and blocks, does the work of one task on its span, and merges the results of the tasks. The sums
and their solutions are those of ``probes.sufficient``; ``tokens`` decides labels, folds and results. Never a store or a plot.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import numpy as np

from lmprobe_zarr.display import describe_error
from lmprobe_zarr.probes import (
    EXACT,
    ClassSums,
    NotFiniteError,
    SequenceSolution,
    Solution,
    Unit,
    empty_sums,
    fits_running,
    is_sequence_probe,
    merge_sums,
    not_finite_rows,
    order_of,
    scaling_of,
    solve,
    unit_of,
)
from lmprobe_zarr.sweeps.token_descents import BY_PASSES, Passes, fit_own_pooling, fit_sgd, leading_of, look_span
from lmprobe_zarr.sweeps.token_rows import Fitted, LayerRows, Solutions, TaskPlan, blocks_of, no_solution
from lmprobe_zarr.tasks import Runner
from lmprobe_zarr.typing import Array, Ints

__all__ = ["STREAMED", "Tested", "fit_stream", "measure_stream", "score_stream"]

#: The units of the sums come from a sample of this many rows, in this many runs.
_SAMPLE_ROWS, _SAMPLE_RUNS = 1024, 16

#: The named probes that can be fitted block by block.
STREAMED: Final = (*EXACT, BY_PASSES, "sgd")


# -- tasks -----------------------------------------------------------------------------------------------------------------


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
        for place, rows in blocks_of(plan, layer, start, stop, values):
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
    nothing = no_solution(np.flatnonzero(class_sums.counts[0]), len(class_sums.unit.origin))
    return Fitted(nothing, time.perf_counter() - began, True, problem)


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
        for place, rows in blocks_of(plan, layer, start, stop, values):
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
        [_scored(rows.astype(np.float64), solution).astype(dtype) for _, rows in blocks_of(plan, layer, start, stop, values)]
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
    if BY_PASSES in plan.probes:
        number = plan.probes.index(BY_PASSES)
        for layer, passes in enumerate(_fit_by_passes(spans, runner, [scaling for _, scaling, _ in solved], where)):
            fits[layer] |= {(number, fold): fitted for fold, fitted in passes.fitted().items()}
    if "sgd" in plan.probes:
        _descend(fit_sgd, spans, solved, runner, fits)
    if any(map(is_sequence_probe, plan.probes)):
        _descend(fit_own_pooling, spans, solved, runner, fits)
    return fits, [seconds for _, _, seconds in solved]


def _fit_by_passes(spans: _Spans, runner: Runner, scaling: Sequence[Sequence[Any]], sample: slice | Ints) -> list[Passes]:
    """Passes over all layers until every fit of each has ended."""
    from dask.delayed import delayed

    lead, look_at, collect = (delayed(call, pure=False) for call in (leading_of, look_span, _collect))
    plain = Runner(runner.client, runner.scheduler, runner.n_workers)

    def start_lead(layer: int) -> Any:
        values = spans.values(layer, sample)
        return lead(values) if values is not None else lead(None, spans.shared, layer, sample)

    leading = plain.run([partial(start_lead, layer) for layer in range(len(scaling))], "", spans.in_flight)
    found = [Passes(spans.plan, each, of_layer) for each, of_layer in zip(scaling, leading, strict=True)]

    def start(layer: int) -> Any:
        points, origin = found[layer].points(), found[layer].origin
        return collect(
            *(
                look_at(spans.shared, layer, points, origin, begin, end, spans.values(layer, slice(begin, end)))
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
