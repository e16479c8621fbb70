"""Logistic regression whose loss and gradient are sums that passes over the rows give, so that the rows need not fit into memory.

`PassDescent` is one fit: it says where the next pass has to look, and takes what that found. `Point` and `look` are the work of a pass on
some rows. Pure numpy; never reads, and knows no fold or scheduler. ``batched`` solves fits whose rows are in memory.

Source: J. Nocedal and S. Wright, "Numerical Optimization" (2006), chapter 7.2 (L-BFGS).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from lmprobe_zarr.typing import Array, Floats

__all__ = ["Leading", "PassDescent", "Point", "Seen", "leading_directions", "look"]

#: A fit has converged when its coefficients, for standardised units, are this close to the optimum by estimate, as a share of the largest
#: where that is above 1.
_ENOUGH: Final = 1e-5
_MOST_PASSES: Final = 200
_MEMORY, _WINDOW = 8, 8
#: Leading directions of the preconditioner.
_DIRECTIONS: Final = 128
#: Shares of the slope: by how much a step must lessen the loss, and how much of the slope it may leave where that is lost in rounding.
_FALL, _LEFT = 1e-4, 0.9
_MOST_CUTS: Final = 20


@dataclass(frozen=True, slots=True)
class Point:
    """Where a pass looks: ``(rows − origin) @ coef.T + intercept`` are the decisions.

    Parameters
    ----------
    coef : ndarray of float64, shape (decision, hidden)
        A single decision for two classes.
    intercept : ndarray of float64, shape (decision,)
    classes : ndarray of int, shape (class,)
        The numbers of the classes that there are rows of.
    """

    coef: Floats
    intercept: Floats
    classes: Array


@dataclass(frozen=True, slots=True)
class Seen:
    """What a pass found at a point: sums over rows. Those of disjoint rows can be added.

    Parameters
    ----------
    loss : float
        In nats.
    gradient : ndarray of float64, shape (decision, hidden)
        By the coefficients, without a penalty.
    slope, curvature : ndarray of float64, shape (decision,)
        First and second derivative by the decisions.
    """

    loss: float
    gradient: Floats
    slope: Floats
    curvature: Floats

    def __add__(self, other: Seen) -> Seen:
        return Seen(self.loss + other.loss, self.gradient + other.gradient, self.slope + other.slope, self.curvature + other.curvature)


def look(rows: Floats, codes: Array, point: Point) -> Seen:
    """The sums over some rows, less the origin, shape (row, hidden), with the numbers of their classes."""
    from scipy.special import expit, log_expit, log_softmax

    decisions = rows @ point.coef.T + point.intercept
    if len(point.classes) == 2:
        hits = (codes == point.classes[1])[:, None]
        chances, loss = expit(decisions), -float(log_expit(np.where(hits, decisions, -decisions)).sum())
    else:
        hits = codes[:, None] == point.classes
        logs = log_softmax(decisions, axis=1)
        chances, loss = np.exp(logs), -float(logs[hits].sum())
    wrong = chances - hits
    return Seen(loss, wrong.T @ rows, wrong.sum(axis=0), (chances * (1 - chances)).sum(axis=0))


@dataclass(frozen=True, slots=True)
class Leading:
    """Directions in which standardised rows vary most, shape (hidden, direction), their variances, and the mean variance along others."""

    directions: Floats
    variances: Floats
    rest: float


def leading_directions(rows: Floats) -> Leading:
    """Those of a sample of standardised rows, shape (row, hidden)."""
    from scipy.linalg import svd

    n, hidden = rows.shape
    count = min(_DIRECTIONS, n // 4, hidden // 2)
    total = float(np.einsum("nd,nd->", rows, rows)) / n
    _, singular, right = svd(rows, full_matrices=False, check_finite=False)
    variances = singular[:count] ** 2 / n
    rest = max(total - float(variances.sum()), 0.0) / (hidden - count)
    return Leading(np.ascontiguousarray(right[:count].T), variances, rest)


class PassDescent:
    """One fit by L-BFGS, in standardised units. After each pass at `coef` and `intercept`, `enter` says where to look next.

    The loss is the sum over rows, with half the penalty times the squares of the coefficients, as scikit-learn's times 1 / C.

    Parameters
    ----------
    n_rows, n_decisions, hidden : int
    penalty : float
    leading : Leading
    """

    def __init__(self, n_rows: int, n_decisions: int, hidden: int, penalty: float, leading: Leading) -> None:
        self._n, self._penalty, self._leading = n_rows, penalty, leading
        #: Where the next pass looks; where the fit is, once it has ended.
        self.coef, self.intercept = np.zeros((n_decisions, hidden)), np.zeros(n_decisions)
        self.ended = self.converged = False
        self.problem = ""
        self.passes = 0
        self._pairs: list[tuple[Floats, Floats]] = []
        self._lengths: list[float] = []
        # The last point that was accepted: coefficients with the intercept as last column, their gradient, and the loss.
        self._at: tuple[Floats, Floats, float] | None = None
        self._step, self._share, self._cuts = np.zeros((n_decisions, hidden + 1)), 1.0, 0

    def enter(self, seen: Seen) -> None:
        """Take what a pass found at `coef` and `intercept`; the gradient is by coefficients of standardised units."""
        self.passes += 1
        point = np.column_stack([self.coef, self.intercept])
        gradient = _centred(np.column_stack([seen.gradient + self._penalty * self.coef, seen.slope]))
        loss = seen.loss + self._penalty / 2 * float(np.einsum("kd,kd->", self.coef, self.coef))
        if not (np.isfinite(loss) and np.isfinite(gradient).all()):
            self._cut("the loss is not finite", 0.1)
            return
        if self._at is not None:
            before, old, start = self._at
            slope, left = _inner(old, self._step), _inner(gradient, self._step)
            falls = loss <= start + _FALL * self._share * slope
            level = loss <= start + 1e-11 * abs(start) and abs(left) <= _LEFT * abs(slope)
            if not (falls or level):
                bend = 2 * (loss - start - self._share * slope) / self._share**2
                self._cut("no step lessens the loss", float(np.clip(-slope / bend / self._share if bend > 0 else 0.5, 0.1, 0.5)))
                return
            self._pairs = [*self._pairs[-_MEMORY + 1 :], (point - before, gradient - old)]
            self._lengths = [*self._lengths[-_WINDOW:], float(np.abs(point - before)[:, :-1].max())]
        self._at, self._cuts = (point, gradient, loss), 0
        if self._arrived():
            self.ended = self.converged = True
        elif self.passes >= _MOST_PASSES:
            self.ended = True
        else:
            self._step, self._share = self._direction(np.maximum(seen.curvature / self._n, 1e-10)), 1.0
            self._go()

    def _arrived(self) -> bool:
        if len(self._lengths) < 3:
            return False
        last, first = max(self._lengths[-2:]), max(self._lengths[0], 1e-300)
        rate = float(np.clip((last / first) ** (1 / (len(self._lengths) - 1)), 0.1, 0.98))
        return last * rate / (1 - rate) <= _ENOUGH * max(1.0, float(np.abs(self.coef).max()))

    def _cut(self, problem: str, by: float) -> None:
        """Try a shorter step, a few times."""
        self._cuts += 1
        if self._at is None:
            self.ended, self.problem = True, problem
        elif self._cuts > _MOST_CUTS or self.passes >= _MOST_PASSES:
            self.coef, self.intercept = self._at[0][:, :-1], self._at[0][:, -1]
            self.ended = True
        else:
            self._share *= by
            self._go()

    def _go(self) -> None:
        assert self._at is not None  # noqa: S101  (a step leads away from somewhere)
        point = self._at[0] + self._share * self._step
        self.coef, self.intercept = point[:, :-1], point[:, -1]

    def _direction(self, curvature: Floats) -> Floats:
        assert self._at is not None  # noqa: S101
        along, shares = self._at[1].copy(), []
        for step, change in reversed(self._pairs):
            share = _inner(step, along) / _inner(step, change)
            along -= share * change
            shares.append(share)
        along = self._precondition(along, curvature)
        if self._pairs:
            step, change = self._pairs[-1]
            along *= _inner(step, change) / _inner(change, self._precondition(change, curvature))
        for (step, change), share in zip(self._pairs, reversed(shares), strict=True):
            along += (share - _inner(change, along) / _inner(step, change)) * step
        return -along

    def _precondition(self, gradient: Floats, curvature: Floats) -> Floats:
        scale = (curvature * self._n)[:, None]
        others = 1 / (scale * self._leading.rest + self._penalty)
        inside = gradient[:, :-1] @ self._leading.directions
        found = others * gradient[:, :-1]
        found += (inside * (1 / (scale * self._leading.variances + self._penalty) - others)) @ self._leading.directions.T
        return _centred(np.column_stack([found, gradient[:, -1] / scale[:, 0]]))


def _centred(values: Floats) -> Floats:
    """Values of several classes less their mean, which the loss does not see."""
    return values if len(values) == 1 else values - values.mean(axis=0)


def _inner(first: Floats, second: Floats) -> float:
    return float(np.einsum("kd,kd->", first, second))
