"""The rows of a token axis, read block by block, and what all tasks of a fit share. Never a store or a fit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import xarray as xr

from lmprobe_zarr.batch import as_slice
from lmprobe_zarr.probes import SequenceSolution, Solution
from lmprobe_zarr.tokens import inner_dim
from lmprobe_zarr.typing import Array, Ints, Mask

__all__ = ["BLOCK_BYTES", "Fitted", "LayerRows", "Solutions", "TaskPlan", "blocks_of", "no_solution", "reader_of", "seed_of"]

#: Bytes of the rows in one block, as float64; a task holds about four times as much beside its sums.
BLOCK_BYTES: Final = 16 * 2**20


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


def blocks_of(plan: TaskPlan, layer: int, start: int, stop: int, values: Any) -> Iterator[tuple[slice, Array]]:
    """The rows of a span, block by block: of the values passed to the task, or read by it."""
    for begin in range(start, stop, plan.block_rows):
        place = slice(begin, min(begin + plan.block_rows, stop))
        if values is None:
            assert plan.layer_rows is not None  # noqa: S101  (without values, tasks read by themselves)
            yield place, plan.layer_rows.read(layer, place)
        else:
            yield place, np.asarray(values[begin - start : place.stop - start])


def reader_of(plan: TaskPlan, layer: int, values: Any) -> Callable[[Ints], Array]:
    """Reads rows of a layer by their places: by a function, of values that were passed to the task, or by the task itself."""
    if callable(values):
        return values  # type: ignore[no-any-return]
    if values is not None:
        return lambda places: np.asarray(values[places])
    assert plan.layer_rows is not None  # noqa: S101  (without values, tasks read by themselves)
    return partial(plan.layer_rows.read, layer)


def no_solution(classes: Array, hidden: int) -> Solution:
    rows = 1 if len(classes) == 2 else len(classes)
    return Solution(np.full((rows, hidden), np.nan), np.full(rows, np.nan), classes)


def seed_of(plan: TaskPlan, layer: int, probe: str, fold: int) -> int:
    words = f"{plan.random_state}\0{plan.layers[layer]}\0{probe}\0{fold}"
    return int.from_bytes(hashlib.sha256(words.encode("utf-8", "surrogatepass")).digest()[:4], "little")
