"""Layer numbers from what a caller gives as ``layers``. Pure integers; never a model or a store."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from lmprobe_zarr.errors import InvalidTypeError, LayerOutOfRangeError

__all__ = ["LayerSpec", "choose_layers", "describe_layers", "parse_sweep", "resolve_layers"]

_USE = "use 'all', 'middle', 'last', a number, a list of numbers or a slice"

LayerSpec = int | str | slice | Sequence[int] | npt.NDArray[np.integer[Any]]


def resolve_layers(layers: LayerSpec, num_layers: int) -> tuple[int, ...]:
    """Layer numbers, ascending and without repeats.

    Parameters
    ----------
    layers : "all", "middle", "last", int, sequence of int, or slice
        Negative numbers count from the end. ``"middle"`` is the middle third, as in lmprobe: ``n // 3`` up to and without
        ``n - n // 3``.
    num_layers : int
        How many decoder (or encoder) blocks the model has.

    Raises
    ------
    LayerOutOfRangeError
        A number outside ``-num_layers … num_layers - 1``, or no layer at all.
    InvalidTypeError
        Something that names no layers.
    """
    if isinstance(layers, np.ndarray):
        layers = layers.tolist()  # operator.index would accept an array of one element
    if isinstance(layers, str):
        third = num_layers // 3
        words = {"all": range(num_layers), "middle": range(third, num_layers - third), "last": range(num_layers - 1, num_layers)}
        if layers not in words:
            raise InvalidTypeError(f"layers={layers!r} names no layers: {_USE}")
        return tuple(words[layers])
    if isinstance(layers, slice):
        numbers = list(range(num_layers)[layers])
    else:
        try:
            numbers = [operator.index(layers)] if isinstance(layers, SupportsIndex) else [operator.index(i) for i in layers]
        except TypeError as error:
            raise InvalidTypeError(f"layers={layers!r} names no layers: {_USE}") from error
        if any(isinstance(i, bool | np.bool_) for i in ([layers] if isinstance(layers, SupportsIndex) else layers)):
            raise InvalidTypeError(f"layers={layers!r} holds truth values: give layer numbers")
    for number in numbers:
        if not -num_layers <= number < num_layers:
            raise LayerOutOfRangeError(f"layer {number} is out of range: there are {num_layers} layers, 0 to {num_layers - 1}")
    if not numbers:
        raise LayerOutOfRangeError(f"layers={layers!r} selects none of the {num_layers} layers, 0 to {num_layers - 1}")
    return tuple(sorted({number % num_layers for number in numbers}))


def choose_layers(held: Sequence[int], layers: LayerSpec | None, *, where: str, num_layers: int | None = None) -> tuple[int, ...]:
    """Which of the stored layers a caller wants, ascending.

    Parameters
    ----------
    held : sequence of int
        The layers that are stored, ascending.
    layers : int, sequence of int, slice or str, optional
        As for `resolve_layers`. None and ``"all"`` take every stored layer. Each number must be stored. A slice or a word takes those of
        its layers that are stored, and needs at least one.
    where : str
        Where they are stored, for the message.
    num_layers : int, optional
        How many layers the model has; by default up to the last one stored.

    Raises
    ------
    LayerOutOfRangeError
        A wanted layer is not stored.
    """
    if layers is None or (isinstance(layers, str) and layers == "all"):
        return tuple(held)
    wanted = resolve_layers(layers, num_layers or (max(held, default=-1) + 1))
    chosen = tuple(layer for layer in wanted if layer in held)
    if len(chosen) < len(wanted) and (not chosen or not isinstance(layers, slice | str)):
        absent = next(layer for layer in wanted if layer not in held)
        raise LayerOutOfRangeError(f"layer {absent} is not stored in {where}, which holds layers {describe_layers(held)}: extract it first")
    return chosen


def parse_sweep(layers: LayerSpec) -> LayerSpec | None:
    """The layers of a sweep, or None if `layers` describes no sweep.

    Parameters
    ----------
    layers : any
        As in lmprobe: ``"sweep"`` is all layers, ``"sweep:10"`` every tenth from the first on, and ``"sweep:55-65"`` those from 55 to 65
        that the model has.

    Raises
    ------
    InvalidTypeError
        A sweep with something else after the colon.
    """
    if not isinstance(layers, str) or not layers.startswith("sweep"):
        return None
    if layers == "sweep":
        return "all"
    if match := re.fullmatch(r"sweep:(\d+)", layers):
        if int(match[1]):
            return slice(None, None, int(match[1]))
    elif (match := re.fullmatch(r"sweep:(\d+)-(\d+)", layers)) and int(match[1]) <= int(match[2]):
        return slice(int(match[1]), int(match[2]) + 1)
    raise InvalidTypeError(f"layers={layers!r} is no sweep: use 'sweep', 'sweep:10' (every tenth layer) or 'sweep:55-65'")


def describe_layers(numbers: Sequence[int]) -> str:
    """Layer numbers as people write them: ``0-5, 8``."""
    runs = np.split(np.asarray(numbers), np.flatnonzero(np.diff(numbers) > 1) + 1) if len(numbers) else []
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs) or "none"
