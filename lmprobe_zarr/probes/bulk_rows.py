"""The rows of a layer on a device, and fits of the same number of decisions that share them. torch is imported when one is made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lmprobe_zarr.typing import Array, Floats

if TYPE_CHECKING:
    import torch

__all__ = ["FitRequest", "Fits", "RowsOfFits", "present_classes"]

#: Values of a block of rows in float64.
_BLOCK_VALUES: Final = 2**21
#: Leading directions of the preconditioner, and rows that they are taken from.
_DIRECTIONS, _SKETCHED_ROWS = 128, 8192
#: Rows whose eigenvalues are spread more than this, times what random rows of that number would show, have leading directions.
_SPREAD: Final = 4.0
#: A unit whose variance over training rows is below this share of its mean square is measured again by itself.
_CANCELLED: Final = 1e-6


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


def present_classes(request: FitRequest) -> Array:
    """The numbers of the classes of the training rows."""
    assert request.classes is not None  # noqa: S101  (asked of classifications alone)
    return np.unique(np.searchsorted(request.classes, request.values[request.train]))


class RowsOfFits:
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


class Fits:
    """Some fits with the same number of decisions. Arrays have the axes (fit, decision, row or hidden)."""

    def __init__(self, rows: RowsOfFits, requests: Sequence[FitRequest], width: int) -> None:
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
        present = request.classes[present_classes(request)]
        return np.asarray([values == label for label in (present[1:] if self.width == 1 else present)], np.float64)
