"""Probes that take several passes over the rows of a layer: SGD, exact logistic regression, and probes with a pooling of their own.

Each function is the body of a task, and fits all training sets of a layer at once. ``token_stream`` says where the rows come from.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np

from lmprobe_zarr.batch import concat_ranges, offsets_of
from lmprobe_zarr.display import describe_error
from lmprobe_zarr.errors import LabelError
from lmprobe_zarr.probes import Solution, draw_looks, fit_sequences, fits_running, parse_sequence_probe, unit_of
from lmprobe_zarr.probes.devices import parse_device
from lmprobe_zarr.probes.passes import Leading, PassDescent, Point, Seen, leading_directions, look
from lmprobe_zarr.probes.sequence_fits import SequenceFit
from lmprobe_zarr.sweeps.token_rows import Fitted, TaskPlan, blocks_of, no_solution, reader_of, seed_of
from lmprobe_zarr.typing import Array, Floats, Ints, Mask

__all__ = ["BY_PASSES", "Passes", "fit_own_pooling", "fit_sgd", "leading_of", "look_span"]

#: Limits of a descent. It makes as many passes as see a million rows, which scikit-learn calls enough, but at least 20 and at most 1000.
#: It ends early when twice as many passes have changed the loss by less than the tolerance (in nats).
_EPOCHS, _ROWS_SEEN, _TOLERANCE = (20, 1000), 10**6, 1e-4
#: A minibatch is made of this many runs of rows from random places, since a store may be sorted by label.
_RUNS: Final = 16
#: The named probe that takes several passes, and its penalty.
BY_PASSES, _PENALTY = "logistic_regression", 1.0


def _minibatches(n: int, size: int, seed: int) -> Iterator[Ints]:
    """All numbers below n in random order, about `size` at a time. Each time they form `_RUNS` runs, so that reading takes few ranges."""
    rng = np.random.default_rng(seed)
    run = max(1, size // _RUNS)
    starts = rng.permutation(np.arange(0, n, run))
    for lot in range(0, len(starts), _RUNS):
        yield np.concatenate([np.arange(start, min(start + run, n)) for start in np.sort(starts[lot : lot + _RUNS])])


def fit_sgd(plan: TaskPlan, layer: int, scaling: Sequence[Any], values: Any) -> dict[tuple[int, int], Fitted]:
    """Logistic regression by stochastic gradient descent on every training set of a layer at once; by number of the probe, and fold."""
    began = time.perf_counter()
    read = reader_of(plan, layer, values)
    descents = [_AveragedDescent(plan, layer, fold, trained) for fold, trained in enumerate(plan.trains)]
    with fits_running():
        for epoch in range(int(np.clip(-(-_ROWS_SEEN // plan.n_rows), *_EPOCHS))):
            rng = np.random.default_rng([seed_of(plan, layer, "order", 0), epoch])
            for places in _minibatches(plan.n_rows, plan.block_rows, seed_of(plan, layer, f"epoch {epoch}", 0)):
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
            found[number, fold] = Fitted(no_solution(descent.classes, plan.hidden), seconds, True, descent.problem)
            continue
        solution = descent.mean()
        coef = solution[:, :-1] / scale
        found[number, fold] = Fitted(Solution(coef, solution[:, -1] - coef @ mean, descent.classes), seconds, descent.ended)
    return found


def leading_of(values: Any, plan: TaskPlan | None = None, layer: int = 0, places: Any = None) -> Leading:
    """The leading directions of some rows in their standard deviations."""
    rows = np.asarray(values) if values is not None else plan.layer_rows.read(layer, places)  # type: ignore[union-attr]
    with fits_running():
        return leading_directions(unit_of(rows).apply(rows))


def look_span(
    plan: TaskPlan, layer: int, points: Mapping[int, Point], origin: Floats, start: int, stop: int, values: Any
) -> dict[int, Seen]:
    """What a pass over a span finds at a point of each fold; the body of a task."""
    found: dict[int, Seen] = {}
    with fits_running():
        for place, rows in blocks_of(plan, layer, start, stop, values):
            wide, cells, codes = rows.astype(np.float64) - origin, plan.cell[place], plan.codes[place]
            for fold, point in points.items():
                mine = plan.trains[fold][cells]
                seen = look(wide, codes, point) if mine.all() else look(wide[mine], codes[mine], point)
                found[fold] = found[fold] + seen if fold in found else seen
    return found


class Passes:
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
            fold: Fitted(no_solution(self.classes[fold], len(self.origin)), each, True, descent.problem)
            if descent.problem
            else Fitted(self._raw(fold), each, descent.converged)
            for fold, descent in enumerate(self.descents)
        }


class _AveragedDescent:
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
            make_probe("sgd", seed_of(plan, layer, "sgd", fold), standardise=False).set_params(
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


def fit_own_pooling(plan: TaskPlan, layer: int, scaling: Sequence[Any], values: Any) -> dict[tuple[int, int], Fitted]:
    """Every probe with a pooling of its own on every training set of a layer at once; by number of the probe, and fold."""
    # torch must be there before `fits_running` looks for libraries whose threads it limits.
    parse_device(plan.device, needed_by="a probe that learns how to pool")
    read = reader_of(plan, layer, values)
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
            seed = seed_of(plan, layer, name, fold)
            try:
                looks[learns] = draw_looks(codes[learns], kept[learns], plan.random_state, grouped=plan.unit is not None)
            except LabelError as error:
                found[place, fold] = Fitted(no_solution(np.unique(codes[learns]), plan.hidden), 0.0, True, describe_error(error))
                continue
            mean, scale = scaling[fold]
            asked[place, fold] = SequenceFit(probe=probe, learns=learns & ~looks, looks=looks, mean=mean, scale=scale, seed=seed)
    with fits_running():
        order_seed = seed_of(plan, layer, "order of prompts", 0)
        fits = fit_sequences(list(asked.values()), read_prompts, counts, codes, seed=order_seed, device=plan.device) if asked else []
    for key, fit in zip(asked, fits, strict=True):
        found[key] = Fitted(fit.solution, fit.seconds, fit.converged, fit.problem)
    return found
