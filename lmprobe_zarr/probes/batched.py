"""Logistic regression, ridge and mass-mean in bulk: every fit of a layer at once, in torch, on a processor or a GPU.

A fit is one row of a batch. All of them share products with the rows of the layer: the folds differ in which rows count, and their
standardisations are undone in the coefficients, so one matrix product serves every fold, strength, seed and set of labels. Products are
made in float32; what is wrong with a solution is computed in float64 from the rows themselves, and a fit that float32 is too coarse for
goes on in float64.

Logistic regression is solved by L-BFGS, whose line search is nearly exact: along a direction, the decisions are known without another
product. Its preconditioner has the curvature of each fit and the leading directions of the rows. Never where labels or folds come from;
torch is imported when something is solved.

Sources: J. Nocedal and S. Wright, "Numerical Optimization" (2006), chapter 7.2 (L-BFGS); Z. Frangella, J. Tropp and M. Udell, "Randomized
Nyström Preconditioning", SIAM Journal on Matrix Analysis and Applications 44 (2023).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np

from lmprobe_zarr.errors import DeviceMemoryError
from lmprobe_zarr.probes.gram import Solved
from lmprobe_zarr.probes.metrics import Outcome
from lmprobe_zarr.typing import Array, Floats

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

__all__ = ["BATCHED", "TOLERANCE", "Bulk", "FitRequest", "solve_batched"]

#: The named probes that are solved in bulk.
BATCHED: Final = ("logistic_regression", "ridge", "ridge_regression", "mass_mean")
#: A fit has converged when its coefficients, for standardised units, are this close to the optimum by estimate, as a share of the largest
#: where that is above 1. Tests hold the true distance to `TOLERANCE`.
_ENOUGH: Final = 1e-5
TOLERANCE: Final = 1e-4
_MOST_ITERATIONS: Final = 1000
#: Pairs of steps that L-BFGS remembers, and over how many steps the rate of convergence is taken.
_MEMORY, _WINDOW = 5, 8
#: A search along a step may end where the slope has shrunk to this share.
_NEAR: Final = 0.3
#: Values of all fits that are in memory at a time; more fits are solved in turn.
_VALUES_AT_ONCE: Final = 2**25
#: Values of a block of rows in float64.
_BLOCK_VALUES: Final = 2**21
#: Leading directions of the preconditioner, and rows that they are taken from.
_DIRECTIONS, _SKETCHED_ROWS = 128, 8192
#: Rows whose eigenvalues are spread more than this, times what random rows of that number would show, have leading directions.
_SPREAD: Final = 4.0
#: A unit whose variance over training rows is below this share of its mean square is measured again by itself.
_CANCELLED: Final = 1e-6
#: A penalty of a ridge below this share of the sum of eigenvalues needs singular values, which scikit-learn's way takes.
_LEAST_PENALTY: Final = 1e-12

#: One layer at a time on a GPU, whose memory all threads of a process share; others read their layers meanwhile.
_ONE_AT_A_TIME: Final = threading.Lock()


@dataclass(frozen=True, slots=True, eq=False)
class FitRequest:
    """One fit.

    Parameters
    ----------
    train, test : ndarray of int
        Rows of the matrix.
    values : ndarray, shape (row,)
        A label or a number for each row of the matrix.
    classes : ndarray, shape (class,), or None
        All labels, sorted; None for numbers.
    strength : float or None
        The penalty: ``alpha``, or 1 / ``C``; None is 1.
    """

    train: Array
    test: Array
    values: Array
    classes: Array | None
    strength: float | None


class Bulk:
    """Fits of one trial that are solved together before they are asked for; empty where its probe is fitted one by one.

    Parameters
    ----------
    probe : str
        One of `BATCHED`, or empty.
    matrix : ndarray of float, shape (row, hidden)
    device : str
    """

    def __init__(self, probe: str, matrix: Any, device: str) -> None:
        self._probe, self._matrix, self._device = probe, matrix, device
        # Requests are kept, so that the identities of their arrays stay taken.
        self._found: dict[tuple[int, int, float | None], tuple[FitRequest, Solved | None]] = {}
        self._drawn: dict[tuple[int, int], Any] = {}

    def __bool__(self) -> bool:
        return bool(self._probe)

    def solve(self, requests: Iterable[FitRequest]) -> None:
        """Solve some fits, so that `take` has them; does nothing where the probe is fitted one by one."""
        if self._probe:
            wanted = {_identity(each.train, each.values, each.strength): each for each in requests}
            wanted = {key: each for key, each in wanted.items() if key not in self._found}
            solved = solve_batched(self._probe, self._matrix, list(wanted.values()), self._device)
            self._found |= {key: (each, fit) for (key, each), fit in zip(wanted.items(), solved, strict=True)}

    def once(self, train: Array, values: Array, draw: Callable[[], T]) -> T:
        """What a function returns for some training rows and labels, called once for them, so that its arrays keep their identities."""
        key = id(train), id(values)
        if key not in self._drawn:
            self._drawn[key] = draw()
        found: T = self._drawn[key]
        return found

    def take(self, train: Array, values: Array, strength: float | None) -> Solved | None:
        """A fit that was solved, by the arrays that its request had; None where there is none."""
        return self._found.get(_identity(train, values, strength), (None, None))[1]


def _identity(train: Array, values: Array, strength: float | None) -> tuple[int, int, float | None]:
    return id(train), id(values), strength


def solve_batched(probe: str, matrix: Array, requests: Sequence[FitRequest], device: str = "cpu") -> list[Solved | None]:
    """Every fit that was asked for, or None where scikit-learn has to say what is wrong with it, as with labels of one class.

    Each has the objective of the named probe with its standardisation, in float64. Coefficients of logistic regression, for standardised
    units, are within `TOLERANCE` of the optimum.

    Parameters
    ----------
    probe : str
        One of `BATCHED`.
    matrix : ndarray of float32 or float64, shape (row, hidden)
        Finite in the rows that fits name.
    requests : sequence of FitRequest
    device : str
        From `lmprobe_zarr.probes.devices.parse_device`.
    """
    import torch

    started = time.perf_counter()
    found: list[Solved | None] = [None] * len(requests)
    groups: dict[int, list[int]] = {}
    for number, request in enumerate(requests):
        width = _width(request)
        if width:
            groups.setdefault(width, []).append(number)
    if not groups:
        return found
    with _used(device), _memory_errors(device), torch.no_grad():
        rows = _Rows(matrix, requests, device)
        for width, numbers in groups.items():
            at_once = max(1, _VALUES_AT_ONCE // (width * ((2 * _MEMORY + 8) * matrix.shape[1] + 8 * len(rows.used))))
            for start in range(0, len(numbers), at_once):
                some = numbers[start : start + at_once]
                fits = _Fits(rows, [requests[number] for number in some], width)
                decisions, ended = _SOLVERS[probe](fits)
                for place, number in enumerate(some):
                    request = requests[number]
                    tested = decisions[place][:, rows.places(request.test)].T
                    if not np.isfinite(tested).all():
                        continue
                    found[number] = Solved(_outcome(probe, request, tested), 0.0, bool(ended[place]))
    seconds = (time.perf_counter() - started) / sum(each is not None for each in found) if any(found) else 0.0
    return [None if each is None else Solved(each.outcome, seconds, each.ended) for each in found]


@contextmanager
def _memory_errors(device: str) -> Iterator[None]:
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(
            f"{device} has too little memory for the fits of a layer ({str(error).split('.')[0]}): "
            "free some, use device='cpu', or leave solver= out"
        ) from error


class _used:  # noqa: N801  (a context)
    """A processor is used by every thread, a GPU by one."""

    def __init__(self, device: str) -> None:
        self._lock = None if device == "cpu" else _ONE_AT_A_TIME

    def __enter__(self) -> None:
        if self._lock is not None:
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.release()


def _present(request: FitRequest) -> Array:
    """The numbers of the classes of the training rows."""
    assert request.classes is not None  # noqa: S101  (asked of classifications alone)
    return np.unique(np.searchsorted(request.classes, request.values[request.train]))


def _width(request: FitRequest) -> int:
    """How many decisions a fit has: one for two classes and for numbers, else one for each class; 0 where there is one class."""
    if request.classes is None:
        return 1
    present = len(_present(request))
    return {0: 0, 1: 0, 2: 1}.get(present, present)


def _outcome(probe: str, request: FitRequest, decisions: Floats) -> Outcome:
    """The predictions of the test rows, from decisions of shape (row, width), as `outcome_of` has them."""
    if request.classes is None:
        return Outcome(request.values[request.test], decisions[:, 0])
    from scipy.special import expit, softmax

    n_classes, present = len(request.classes), _present(request)
    true = np.searchsorted(request.classes, request.values[request.test])
    two = decisions.shape[1] == 1
    predicted = present[(decisions[:, 0] > 0).astype(int) if two else decisions.argmax(axis=1)]
    by_class = np.hstack([-decisions, decisions]) if two else decisions
    scores = decisions[:, 0]
    if n_classes > 2:
        scores = np.full((len(true), n_classes), np.nan)
        scores[:, present] = by_class
    probabilities = None
    if probe != "ridge":
        probabilities = np.zeros((len(true), n_classes))
        probabilities[:, present] = expit(by_class) if two else softmax(by_class, axis=1)
    return Outcome(true, predicted, n_classes, scores, probabilities)


# -- the rows of a layer ---------------------------------------------------------------------------------------------------------


class _Rows:
    """The rows of a layer on a device, in standard deviations of all of them, and what each training set is about."""

    def __init__(self, matrix: Array, requests: Sequence[FitRequest], device: str) -> None:
        import torch

        self.device = device
        sides = {id(side): side for request in requests for side in (request.train, request.test)}
        self.used = np.unique(np.concatenate(list(sides.values())))
        # Rows that no fit names may hold NaN. The usual case, in which all rows are used, copies nothing.
        held = matrix if len(self.used) == len(matrix) else matrix[self.used]
        self._held = torch.from_numpy(np.ascontiguousarray(held)).to(device)
        self.n, self.hidden = self._held.shape
        self.mean = self._held.mean(dim=0, dtype=torch.float64)
        self.scale = torch.ones_like(self.mean)
        squares = torch.zeros_like(self.mean)
        for _, block in self._blocks():
            squares += block.square().sum(dim=0)
        scale = (squares / self.n).sqrt()
        self.scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        self.narrow = torch.empty(self.n, self.hidden, dtype=torch.float32, device=device)
        for place, block in self._blocks():
            self.narrow[place] = block
        #: The number of each training set, by the identity of its array.
        trains = {id(request.train): request.train for request in requests}
        self.fold = {key: number for number, key in enumerate(trains)}
        self._measure([self.places(train) for train in trains.values()])
        self._directions: tuple[torch.Tensor, torch.Tensor, float] | None = None

    def places(self, rows: Array) -> Array:
        """Places of rows of the matrix among those that are used."""
        return np.asarray(rows if len(self.used) == self.used[-1] + 1 else np.searchsorted(self.used, rows))

    def _blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """All rows in float64, some at a time."""
        size = max(16, _BLOCK_VALUES // self.hidden)
        for start in range(0, self.n, size):
            place = slice(start, min(start + size, self.n))
            yield place, (self._held[place].double() - self.mean) / self.scale

    def _measure(self, trains: list[Array]) -> None:
        """Mean and deviation of each unit over each training set, shape (fold, hidden), in the units of `narrow`."""
        import torch

        weights = np.zeros((len(trains), self.n))
        for fold, train in enumerate(trains):
            weights[fold] = np.bincount(train, minlength=self.n)
        self.weights = torch.from_numpy(weights).to(self.device)
        self.counts = self.weights.sum(dim=1)
        shift, squares = (torch.zeros(len(trains), self.hidden, dtype=torch.float64, device=self.device) for _ in range(2))
        for place, block in self._blocks():
            shift += self.weights[:, place] @ block
            squares += self.weights[:, place] @ block.square()
        shift /= self.counts[:, None]
        squares /= self.counts[:, None]
        variance = squares - shift.square()
        doubtful = variance <= _CANCELLED * squares
        for fold in torch.nonzero(doubtful.any(dim=1))[:, 0].tolist():
            units = torch.nonzero(doubtful[fold])[:, 0]
            taken = torch.from_numpy(trains[fold]).to(self.device)
            raw = (self._held[taken][:, units].double() - self.mean[units]) / self.scale[units]
            equal = raw.amin(dim=0) == raw.amax(dim=0)
            shift[fold, units] = raw.mean(dim=0)
            variance[fold, units] = torch.where(equal, torch.zeros_like(raw[0]), raw.var(dim=0, correction=0))
        # As scikit-learn's StandardScaler decides that a unit is constant; of such a unit nothing is learned.
        eps, counts = torch.finfo(torch.float64).eps, self.counts[:, None]
        absolute = self.mean / self.scale + shift
        flat = variance <= counts * eps * variance + (counts * absolute * eps).square()
        self.shift = shift
        self.inverse = torch.where(flat, torch.zeros_like(variance), variance.clamp_min(torch.finfo(torch.float64).tiny).rsqrt())

    def standardised(self, fold: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The training rows of a fold in their standard deviations, float64, times the root of how often each counts, and that root."""
        import torch

        taken = torch.nonzero(self.weights[fold])[:, 0]
        root = self.weights[fold, taken].sqrt()
        found = (self._held[taken].double() - self.mean) / self.scale
        return (found - self.shift[fold]) * self.inverse[fold] * root[:, None], root

    def times(self, coef: torch.Tensor) -> torch.Tensor:
        """Products of all rows with coefficients of shape (…, hidden), in their dtype; shape (…, row)."""
        import torch

        flat = coef.reshape(-1, self.hidden)
        if coef.dtype == torch.float32:
            return (flat @ self.narrow.t()).view(*coef.shape[:-1], self.n)
        return torch.cat([flat @ block.t() for _, block in self._blocks()], dim=1).view(*coef.shape[:-1], self.n)

    def sums(self, by_row: torch.Tensor) -> torch.Tensor:
        """Sums of the rows, each times its value of shape (…, row); shape (…, hidden)."""
        import torch

        flat = by_row.reshape(-1, self.n)
        if by_row.dtype == torch.float32:
            return (flat @ self.narrow).view(*by_row.shape[:-1], self.hidden)
        found = torch.zeros(len(flat), self.hidden, dtype=torch.float64, device=self.device)
        for place, block in self._blocks():
            found += flat[:, place] @ block
        return found.view(*by_row.shape[:-1], self.hidden)

    def directions(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Leading directions of the rows, shape (hidden, direction), their eigenvalues as means over rows, and the mean of the others."""
        import torch

        if self._directions is None:
            rows = self.narrow[:: max(1, self.n // _SKETCHED_ROWS)]
            n, hidden = rows.shape
            total = float(rows.square().sum(dtype=torch.float64)) / n
            generator = torch.Generator().manual_seed(0)
            few = torch.randn(16, hidden, generator=generator).to(rows)
            image = (few @ rows.t()) @ rows / n
            spread = float(image.square().mean(dtype=torch.float64)) / max((total / hidden) ** 2, 1e-300)
            count = min(_DIRECTIONS, n // 2, hidden // 2)
            found = torch.zeros(hidden, 0, device=self.device), torch.zeros(0, device=self.device), total / hidden
            if spread > _SPREAD * (1 + hidden / n) and count:
                many = torch.randn(count, hidden, generator=generator).to(rows)
                basis = torch.linalg.qr(((many @ rows.t()) @ rows / n).t())[0]
                inside = rows @ basis
                values, vectors = torch.linalg.eigh(inside.t() @ inside / n)
                values = values.clamp_min(0)
                found = basis @ vectors, values, max(0.0, total - float(values.sum(dtype=torch.float64))) / (hidden - count)
            self._directions = found
        return self._directions


class _Fits:
    """Some fits with the same number of decisions. Arrays have the axes (fit, decision, row or hidden)."""

    def __init__(self, rows: _Rows, requests: Sequence[FitRequest], width: int) -> None:
        import torch

        self.rows, self.requests, self.width = rows, requests, width
        on: dict[str, Any] = {"dtype": torch.float64, "device": rows.device}
        self.folds = torch.tensor([rows.fold[id(request.train)] for request in requests], device=rows.device)
        self.penalty = torch.tensor([1.0 if request.strength is None else request.strength for request in requests], **on)
        self.targets = torch.from_numpy(np.stack([self._target(request) for request in requests])).to(rows.device)

    def _target(self, request: FitRequest) -> Floats:
        """Numbers, or 1 for the class of a decision and 0 for others; shape (decision, row). Rows that no fit names count nothing."""
        values = request.values[self.rows.used]
        if request.classes is None:
            return np.asarray(values, np.float64)[None]
        present = request.classes[_present(request)]
        return np.asarray([values == label for label in (present[1:] if self.width == 1 else present)], np.float64)


# -- logistic regression ---------------------------------------------------------------------------------------------------------


def _logistic(fits: _Fits) -> tuple[Floats, Array]:
    """Decisions for all rows, float64, shape (fit, decision, row), and which fits converged."""
    import torch

    descent = _Descent(fits)
    # float32 is accurate enough for most fits; what is wrong with each is computed in float64. Coarser products of a GPU are of no use.
    coarse = fits.rows.device != "cpu" and torch.get_float32_matmul_precision() != "highest"
    for dtype in (torch.float64,) if coarse else (torch.float32, torch.float64):
        descent.run(dtype)
        descent.check()
        if not bool(descent.wrong.any()):
            break
    return descent.decided.cpu().numpy(), (~descent.wrong).cpu().numpy()


class _Descent:
    """L-BFGS of many fits. The loss is the sum over the training rows, as scikit-learn's times 1 / C."""

    def __init__(self, fits: _Fits) -> None:
        import torch

        rows, shape = fits.rows, (len(fits.requests), fits.width)
        self.fits = fits
        on: dict[str, Any] = {"dtype": torch.float64, "device": rows.device}
        self.coef, self.intercept = torch.zeros(*shape, rows.hidden, **on), torch.zeros(*shape, **on)
        self.decided = torch.zeros(*shape, rows.n, **on)
        #: Which fits have not converged.
        self.wrong = torch.ones(shape[0], dtype=torch.bool, device=rows.device)
        #: How much farther the optimum was than the last step of each fit was long.
        self._farther = torch.ones(shape[0], **on)
        #: The last steps of each fit, the last one first; zeros where there were fewer.
        sizes = ((*shape, rows.hidden), shape, (*shape, rows.hidden), shape, (shape[0],))
        self._pairs = [tuple(torch.zeros(*size, dtype=torch.float32, device=rows.device) for size in sizes) for _ in range(_MEMORY)]

    def run(self, dtype: torch.dtype) -> None:
        """Descend with the fits that are wrong until each has converged, or rounding lets it get no further."""
        import torch

        state = self._begin(dtype)
        lengths: list[torch.Tensor] = []
        for turn in range(_MOST_ITERATIONS):
            lengths = [*lengths[-_WINDOW:], state.advance()]
            # Steps shrink by about the same factor each time.
            last = torch.stack(lengths[-2:]).amax(dim=0)
            rate = ((last / lengths[0].clamp_min(1e-30)) ** (1 / max(1, len(lengths) - 1))).clamp(0.1, 0.98)
            farther = rate / (1 - rate)
            ended = ((last * farther <= _ENOUGH * state.size()) & (turn >= 2)) | ~torch.isfinite(last) | state.is_noise()
            over = bool(ended.all()) or turn == _MOST_ITERATIONS - 1
            if over or int(ended.sum()) * 8 >= len(ended):
                self._end(state, torch.ones_like(ended) if over else ended, farther)
                if over:
                    return
                state.keep(~ended)
                lengths = [length[~ended] for length in lengths]

    def _begin(self, dtype: torch.dtype) -> _State:
        import torch

        active = torch.nonzero(self.wrong)[:, 0]
        state = _State(self.fits, active, self.coef[active], self.intercept[active], dtype)
        state.pairs = [tuple(each[active].to(dtype) for each in pair) for pair in reversed(self._pairs)]
        return state

    def _end(self, state: _State, ended: torch.Tensor, farther: torch.Tensor) -> None:
        places = state.active[ended]
        self.coef[places], self.intercept[places] = state.coef[ended].double(), state.intercept[ended].double()
        self._farther[places] = farther[ended].double()
        for held, pair in zip(self._pairs, reversed(state.pairs), strict=False):
            for each, values in zip(held, pair, strict=True):
                each[places] = values[ended].float()

    def check(self) -> None:
        """Decide again in float64 which fits are wrong."""
        import torch

        state = self._begin(torch.float64)
        step, _ = state.direction()
        far = step.abs().amax(dim=(1, 2)) * self._farther[state.active].clamp_min(1.0)
        self.decided[state.active] = state.decided
        self.wrong[state.active] = ~(far <= 2 * _ENOUGH * state.size())


class _State:
    """Where some fits are, in one dtype."""

    def __init__(self, fits: _Fits, active: torch.Tensor, coef: torch.Tensor, intercept: torch.Tensor, dtype: torch.dtype) -> None:
        rows = fits.rows
        folds = fits.folds[active]
        self.rows, self.active, self.dtype = rows, active, dtype
        self.penalty = fits.penalty[active, None, None].to(dtype)
        self.counts = rows.counts[folds][:, None].to(dtype)
        self.weights = rows.weights[folds][:, None].to(dtype)
        self.shift, self.inverse = rows.shift[folds][:, None].to(dtype), rows.inverse[folds][:, None].to(dtype)
        self.targets = fits.targets[active].to(dtype)
        self.coef, self.intercept = coef.to(dtype), intercept.to(dtype)
        self.pairs: list[tuple[torch.Tensor, ...]] = []
        directions, values, rest = rows.directions()
        self.directions, self.values, self.rest = directions.to(dtype), values.to(dtype), rest
        self.decided = self.decide(self.coef, self.intercept)
        self._look()

    def keep(self, which: torch.Tensor) -> None:
        """Go on with some fits only."""
        for name in ("active", "penalty", "counts", "weights", "shift", "inverse", "targets", "coef", "intercept", "decided", "missed"):
            setattr(self, name, getattr(self, name)[which])
        for name in ("curvature", "gradient", "slope"):
            setattr(self, name, getattr(self, name)[which])
        self.pairs = [tuple(each[which] for each in pair) for pair in self.pairs]

    def size(self) -> torch.Tensor:
        """The largest coefficient of each fit, at least 1."""
        return self.coef.abs().amax(dim=(1, 2)).clamp_min(1.0)

    def is_noise(self) -> torch.Tensor:
        """Which gradients are no larger than what rounding makes of them."""
        import torch

        rounding = torch.finfo(self.dtype).eps * self.missed * (self.rows.hidden * self.coef.shape[1]) ** 0.5
        return torch.le(_inner(self.gradient, self.gradient).sqrt(), 2 * rounding)

    def decide(self, coef: torch.Tensor, intercept: torch.Tensor) -> torch.Tensor:
        raw = coef * self.inverse
        found = self.rows.times(raw)
        found += (intercept - (raw * self.shift).sum(dim=-1))[..., None]
        return found

    @staticmethod
    def _chances(decided: torch.Tensor) -> torch.Tensor:
        """Probabilities of the classes. Never below 1e-18: arithmetic on numbers below 1e-38 takes a hundred times as long."""
        return decided.clamp(min=-41).sigmoid() if decided.shape[1] == 1 else decided.softmax(dim=1).clamp_(min=1e-18)

    def _look(self) -> None:
        """Gradient, and the mean curvature of each decision, where the fits are."""
        chances = self._chances(self.decided)
        wrong = (chances - self.targets) * self.weights
        self.curvature = ((chances - chances.square()) * self.weights).sum(dim=-1).div_(self.counts).clamp_min_(1e-10)
        self.missed = _inner(wrong, wrong).sqrt()
        self.slope = wrong.sum(dim=-1)
        self.gradient = _centred((self.rows.sums(wrong) - self.shift * self.slope[..., None]) * self.inverse + self.penalty * self.coef)
        self.slope = _centred(self.slope)

    def _precondition(self, gradient: torch.Tensor, slope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = (self.curvature * self.counts)[..., None]
        others = 1 / (scale * self.rest + self.penalty)
        found = gradient * others
        if len(self.values):
            inside = gradient @ self.directions
            found += (inside * (1 / (scale * self.values + self.penalty) - others)) @ self.directions.t()
        return _centred(found), _centred(slope / scale[..., 0])

    def direction(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The step of L-BFGS, of coefficients and intercepts."""
        along, slope = self.gradient.clone(), self.slope.clone()
        shares = []
        for step, step_0, change, change_0, inverse in reversed(self.pairs):
            share = inverse * (_inner(step, along) + _inner(step_0, slope))
            along -= share[:, None, None] * change
            slope -= share[:, None] * change_0
            shares.append(share)
        along, slope = self._precondition(along, slope)
        if self.pairs:
            step, step_0, change, change_0, inverse = self.pairs[-1]
            scaled, scaled_0 = self._precondition(change, change_0)
            fitted = 1 / (inverse * (_inner(change, scaled) + _inner(change_0, scaled_0)))
            fitted = fitted.nan_to_num(1.0, 1.0, 1.0).clamp(1e-3, 1e3)
            along *= fitted[:, None, None]
            slope *= fitted[:, None]
        for (step, step_0, change, change_0, inverse), share in zip(self.pairs, reversed(shares), strict=True):
            rest = share - inverse * (_inner(change, along) + _inner(change_0, slope))
            along += rest[:, None, None] * step
            slope += rest[:, None] * step_0
        return -along, -slope

    def advance(self) -> torch.Tensor:
        """One step of every fit; the largest change of a coefficient of each."""
        import torch

        step, step_0 = self.direction()
        image = self.decide(step, step_0)
        start = _inner(self.gradient, step) + _inner(self.slope, step_0)
        length = self._search(image, step, start)
        step *= length[:, None, None]
        step_0 *= length[:, None]
        gradient, slope = self.gradient, self.slope
        self.coef = self.coef + step
        self.intercept = self.intercept + step_0
        self.decided += image.mul_(length[:, None, None])
        self._look()
        change, change_0 = self.gradient - gradient, self.slope - slope
        product = _inner(step, change) + _inner(step_0, change_0)
        # A pair that float rounding has spoiled says nothing.
        inverse = torch.where(product > 0, 1 / product, torch.zeros_like(product))
        self.pairs = [*self.pairs[-_MEMORY + 1 :], (step, step_0, change, change_0, inverse)]
        return step.abs().amax(dim=(1, 2))

    def _search(self, image: torch.Tensor, step: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """How far to go along a step: where the loss no longer falls, by Newton's method between bounds. The loss is convex."""
        import torch

        length, low = torch.ones_like(start), torch.zeros_like(start)
        high = torch.full_like(start, torch.inf)
        penalty = self.penalty[:, 0, 0]
        held, own = penalty * _inner(self.coef, step), penalty * _inner(step, step)
        weighted = image * self.weights
        for _ in range(12):
            chances = self._chances(self.decided + length[:, None, None] * image)
            slope = _inner(chances - self.targets, weighted) + held + length * own
            mean = (chances * image).sum(dim=1, keepdim=True)
            bend = _inner(chances * (image - mean), weighted) + own
            low, high = torch.where(slope < 0, length, low), torch.where(slope < 0, high, length)
            following = length - slope / bend
            inside = (following > low) & (following < high)
            near = slope.abs() <= _NEAR * start.abs()
            if bool(near.all()):
                # One more step of Newton's method, from here, costs nothing.
                length = torch.where(inside, following, length)
                break
            length = torch.where(inside, following, torch.where(torch.isinf(high), 2 * length, (low + high) / 2))
        return torch.where(start < 0, length, torch.zeros_like(length))


def _centred(values: torch.Tensor) -> torch.Tensor:
    """Values of several classes less their mean. The optimum has none, and the loss does not see one, so rounding would make it up."""
    return values if values.shape[1] == 1 else values - values.mean(dim=1, keepdim=True)


def _inner(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Inner products of the fits, over all other axes."""
    return (first * second).flatten(1).sum(dim=1)


# -- ridge and mass-mean ---------------------------------------------------------------------------------------------------------


def _ridge(fits: _Fits) -> tuple[Floats, Array]:
    """As `_logistic`. Every fold is factorised once for each penalty, for the targets of all its fits; NaN where it cannot be."""
    import torch

    rows, shape = fits.rows, (len(fits.requests), fits.width)
    classified = fits.requests[0].classes is not None
    targets = 2 * fits.targets - 1 if classified else fits.targets
    weights = rows.weights[fits.folds][:, None]
    centre = (targets * weights).sum(dim=-1) / rows.counts[fits.folds][:, None]
    apart = torch.where(weights > 0, targets - centre[..., None], torch.zeros_like(targets))
    size = apart.abs().amax(dim=-1, keepdim=True)
    size = torch.where(size > 0, size, torch.ones_like(size))
    apart = apart / size
    coef = torch.full((*shape, rows.hidden), torch.nan, dtype=torch.float64, device=rows.device)
    for fold in torch.unique(fits.folds).tolist():
        mine = torch.nonzero(fits.folds == fold)[:, 0]
        standard, root = rows.standardised(fold)
        trained = torch.nonzero(rows.weights[fold])[:, 0]
        wide = len(standard) < rows.hidden
        gram = standard @ standard.t() if wide else standard.t() @ standard
        largest = float(gram.diagonal().sum())
        for alpha in torch.unique(fits.penalty[mine]).tolist():
            of = mine[fits.penalty[mine] == alpha]
            wanted = (apart[of][..., trained] * root).reshape(-1, len(trained)).t()
            if alpha <= _LEAST_PENALTY * largest:
                continue
            penalised = gram.clone()
            penalised.diagonal().add_(alpha)
            factor, failed = torch.linalg.cholesky_ex(penalised)
            if int(failed):
                continue
            right = wanted if wide else standard.t() @ wanted
            found = torch.cholesky_solve(right, factor)
            # Once more with what is left, since a penalty far below the largest eigenvalue costs digits.
            fitted = standard.t() @ found if wide else found
            left = wanted - standard @ fitted
            found = found + torch.cholesky_solve((left if wide else standard.t() @ left) - alpha * found, factor)
            coef[of] = (standard.t() @ found if wide else found).t().reshape(len(of), fits.width, rows.hidden)
    raw = coef * rows.inverse[fits.folds][:, None]
    offset = (raw * rows.shift[fits.folds][:, None]).sum(dim=-1)
    decided = (rows.times(raw) - offset[..., None]) * size + centre[..., None]
    return decided.cpu().numpy(), np.ones(shape[0], bool)


def _mass_mean(fits: _Fits) -> tuple[Floats, Array]:
    """As `_logistic`: decisions by the nearest class mean, as `MassMeanClassifier` has them."""
    import torch

    rows = fits.rows
    targets = torch.cat([1 - fits.targets, fits.targets], dim=1) if fits.width == 1 else fits.targets
    weights = targets * rows.weights[fits.folds][:, None]
    means = rows.sums(weights) / weights.sum(dim=-1, keepdim=True)
    if fits.width == 1:
        coef = (means[:, 1:] - means[:, :1]) * rows.scale**2
        offset = -(coef * (means[:, 1:] + means[:, :1]) / 2).sum(dim=-1)
    else:
        absolute = rows.mean + rows.scale * means
        coef = absolute * rows.scale
        offset = (absolute * (rows.mean - absolute / 2)).sum(dim=-1)
    decided = rows.times(coef) + offset[..., None]
    return decided.cpu().numpy(), np.ones(len(fits.requests), bool)


_SOLVERS: Final = {"logistic_regression": _logistic, "ridge": _ridge, "ridge_regression": _ridge, "mass_mean": _mass_mean}
