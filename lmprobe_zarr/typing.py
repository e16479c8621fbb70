"""Types that many rooms share: arrays by dtype, and protocols of objects that callers pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["Array", "Buffer", "Client", "Estimator", "Floats", "Ints", "Mask", "is_listed"]

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Buffer = bytes | memoryview


def is_listed(value: Any) -> bool:
    """Whether a value can be iterated over; an array of no dimension cannot, though it has the method."""
    return isinstance(value, Iterable) and getattr(value, "ndim", 1) != 0


class Estimator(Protocol):
    """An object with the `fit` and `predict` of a scikit-learn estimator."""

    def fit(self, activations: Any, labels: Any, /) -> Any:
        """Fit on one row and one label per prompt; returns the estimator."""
        ...

    def predict(self, activations: Any, /) -> Any:
        """One label or value per row."""
        ...


class Client(Protocol):
    """The methods of a `distributed.Client` that this package uses. `distributed` is an optional dependency."""

    @property
    def loop(self) -> Any:
        """The event loop that the client runs on."""
        ...

    def nthreads(self) -> Mapping[str, int]:
        """Number of threads of each worker, by its address."""
        ...

    def submit(self, function: Callable[..., Any], /, *args: Any, pure: bool) -> Any:
        """A future of a function's result."""
        ...

    def compute(self, collection: Any, /) -> Any:
        """A future of a delayed value."""
        ...

    def scatter(self, data: Any, /, *, hash: bool) -> Any:  # noqa: A002 — as distributed names it
        """A future of data that is sent to the workers."""
        ...

    def cancel(self, futures: list[Any], /) -> Any:
        """Cancel futures."""
        ...
