"""Layer numbers from what a caller gives as ``layers``. Pure integers; never a model or a store."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, SupportsIndex

import numpy as np
import numpy.typing as npt

from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, LayerOutOfRangeError

__all__ = [
    "LayerFractions", "LayerSpec", "LayerUnion", "choose_layers", "describe_layers", "parse_candidates", "parse_sweep", "resolve_layers",
]  # fmt: skip

_USE = "use 'all', 'middle', 'last', a number, a list of numbers or a slice"

#: Where in the depth of a model the candidates of ``layers="auto"`` are, as in lmprobe.
_QUARTERS: Final = (0.25, 0.5, 0.75)


@dataclass(frozen=True, slots=True)
class LayerFractions:
    """Layers by their place in the depth of a model, 0.0 being the first block and 1.0 the last.

    Parameters
    ----------
    fractions : tuple of float
        From 0.0 to 1.0.
    """

    fractions: tuple[float, ...]

    def of(self, num_layers: int) -> tuple[int, ...]:
        """Layer numbers, ascending and without repeats: fraction f is layer ``int(f * (num_layers - 1))``, as in lmprobe."""
        return tuple(sorted({int(fraction * (num_layers - 1)) for fraction in self.fractions}))


@dataclass(frozen=True, slots=True)
class LayerUnion:
    """The layers that any of several callers wants.

    Parameters
    ----------
    specs : tuple of LayerSpec
    """

    specs: tuple[Any, ...]

    def of(self, num_layers: int) -> tuple[int, ...]:
        """Layer numbers, ascending and without repeats."""
        return tuple(sorted({layer for spec in self.specs for layer in resolve_layers(spec, num_layers)}))


LayerSpec = int | str | slice | Sequence[int] | npt.NDArray[np.integer[Any]] | LayerFractions | LayerUnion


def resolve_layers(layers: LayerSpec, num_layers: int) -> tuple[int, ...]:
    """Layer numbers, ascending and without repeats.

    Parameters
    ----------
    layers : "all", "middle", "last", int, sequence of int, slice, LayerFractions or LayerUnion
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
    if isinstance(layers, LayerFractions | LayerUnion):
        return layers.of(num_layers)
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
            listed: list[Any] = [layers] if isinstance(layers, SupportsIndex) else list(layers)
            numbers = [operator.index(number) for number in listed]
        except TypeError as error:
            raise InvalidTypeError(f"layers={layers!r} names no layers: {_USE}") from error
        if any(isinstance(number, bool | np.bool_) for number in listed):
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


def parse_candidates(candidates: Any) -> LayerSpec:
    """Among which layers ``layers="auto"`` chooses, as in lmprobe.

    Parameters
    ----------
    candidates : sequence of int or float, or None
        Layer numbers, of which negative ones count from the end; or fractions of the depth, from 0.0 to 1.0. None is
        ``[0.25, 0.5, 0.75]``.

    Raises
    ------
    InvalidTypeError, InvalidArgumentError
        Something else, nothing, or numbers of both kinds.
    """
    if candidates is None:
        return LayerFractions(_QUARTERS)
    if isinstance(candidates, str | bytes | Mapping) or not isinstance(candidates, Iterable):
        raise InvalidTypeError(f"auto_candidates={candidates!r:.60} is no list: give layer numbers, or fractions such as [0.25, 0.5, 0.75]")
    given = list(candidates)
    if not given:
        raise InvalidArgumentError("auto_candidates is empty: give layer numbers or fractions, or None for [0.25, 0.5, 0.75]")
    if all(isinstance(item, int | np.integer) and not isinstance(item, bool) for item in given):
        return [int(item) for item in given]
    if all(isinstance(item, float | np.floating) and 0 <= item <= 1 for item in given):
        return LayerFractions(tuple(float(item) for item in given))
    raise InvalidArgumentError(
        f"auto_candidates={given!r:.60} are neither layer numbers nor fractions of the depth: give whole numbers, or floats from 0.0 to 1.0"
    )


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
