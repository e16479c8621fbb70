"""Logistic regression, ridge and mass-mean in bulk: every fit of a layer at once, in torch, on a processor or a GPU.

A fit is one row of a batch. All of them share products with the rows of the layer: the folds differ in which rows count, and their
standardisations are undone in the coefficients, so one matrix product serves every fold, strength, seed and set of labels. Products are
made in float32; what is wrong with a solution is computed in float64 from the rows themselves, and a fit that float32 is too coarse for
goes on in float64.

Never where labels or folds come from; torch is imported when something is solved.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import numpy as np

from lmprobe_zarr.errors import DeviceMemoryError
from lmprobe_zarr.probes.bulk_logistic import MEMORY, TOLERANCE, logistic
from lmprobe_zarr.probes.bulk_rows import FitRequest, Fits, RowsOfFits, present_classes
from lmprobe_zarr.probes.gram import Solved
from lmprobe_zarr.probes.metrics import Outcome
from lmprobe_zarr.typing import Array, Floats

T = TypeVar("T")

__all__ = ["BATCHED", "TOLERANCE", "Bulk", "FitRequest", "solve_batched"]

#: The named probes that are solved in bulk.
BATCHED: Final = ("logistic_regression", "ridge", "ridge_regression", "mass_mean")
#: Values of all fits that are in memory at a time; more fits are solved in turn.
_VALUES_AT_ONCE: Final = 2**25
#: A penalty of a ridge below this share of the sum of eigenvalues needs singular values, which scikit-learn's way takes.
_LEAST_PENALTY: Final = 1e-12

#: One layer at a time on a GPU, whose memory all threads of a process share; others read their layers meanwhile.
_ONE_AT_A_TIME: Final = threading.Lock()


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
        rows = RowsOfFits(matrix, requests, device)
        for width, numbers in groups.items():
            at_once = max(1, _VALUES_AT_ONCE // (width * ((2 * MEMORY + 8) * matrix.shape[1] + 8 * len(rows.used))))
            for start in range(0, len(numbers), at_once):
                some = numbers[start : start + at_once]
                fits = Fits(rows, [requests[number] for number in some], width)
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


def _width(request: FitRequest) -> int:
    """How many decisions a fit has: one for two classes and for numbers, else one for each class; 0 where there is one class."""
    if request.classes is None:
        return 1
    present = len(present_classes(request))
    return {0: 0, 1: 0, 2: 1}.get(present, present)


def _outcome(probe: str, request: FitRequest, decisions: Floats) -> Outcome:
    """The predictions of the test rows, from decisions of shape (row, width), as `outcome_of` has them."""
    if request.classes is None:
        return Outcome(request.values[request.test], decisions[:, 0])
    from scipy.special import expit, softmax

    n_classes, present = len(request.classes), present_classes(request)
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


# -- ridge and mass-mean ---------------------------------------------------------------------------------------------------------


def _ridge(fits: Fits) -> tuple[Floats, Array]:
    """As `logistic`. Every fold is factorised once for each penalty, for the targets of all its fits; NaN where it cannot be."""
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


def _mass_mean(fits: Fits) -> tuple[Floats, Array]:
    """As `logistic`: decisions by the nearest class mean, as `MassMeanClassifier` has them."""
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


_SOLVERS: Final = {"logistic_regression": logistic, "ridge": _ridge, "ridge_regression": _ridge, "mass_mean": _mass_mean}
