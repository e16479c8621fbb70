"""Rounding of activations to fewer bits or another dtype, as they are stored. Pure numpy; never files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from lmprobe_zarr.errors import InvalidArgumentError, NumberRangeError
from lmprobe_zarr.typing import Array

__all__ = ["Precision", "count_odd", "round_bits", "store_as"]


def fill_value(dtype: str | np.dtype[Any]) -> Any:
    """The value that marks a missing one: NaN, −1 or an empty text. Truth values have none: False only pads the last chunk."""
    kind = "O" if dtype in ("string", object) else np.dtype(dtype).kind
    return {"f": np.nan, "O": "", "b": False}.get(kind, -1)


# Bits of the fraction, without the leading one that is not stored.
FRACTION_BITS: Final = {"float16": 10, "bfloat16": 7, "float32": 23, "float64": 52}
DTYPES: Final = ("float16", "bfloat16", "float32")
OVERFLOWS: Final = ("bfloat16", "raise")


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """The precision that activations are stored with.

    Parameters
    ----------
    dtype : {"float16", "bfloat16", "float32"}, optional
        None keeps the dtype that the model computes in. ``bfloat16`` is stored in float32 arrays, which every reader of Zarr understands;
        their last 16 bits are zero and compress away.
    keep_bits : int, optional
        How many bits of the fraction rounding keeps: the relative error is at most 2 to the power of −(keep_bits + 1). None keeps all.
    overflow : {"bfloat16", "raise"}
        What to do with a value beyond 65504, the largest of float16: keep the variable with bfloat16's precision, or raise.

    Raises
    ------
    InvalidArgumentError
        An unknown dtype or `overflow`, or more bits than the dtype has.
    """

    dtype: str | None = None
    keep_bits: int | None = None
    overflow: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise InvalidArgumentError(f"unknown dtype {self.dtype!r} to store with: use {', '.join(map(repr, DTYPES))}, or None")
        most = FRACTION_BITS[self.dtype or "float32"]
        bits = self.keep_bits
        if bits is not None and (isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= most):
            raise InvalidArgumentError(
                f"keep_bits={bits!r} is not possible with dtype {self.dtype!r}: give 1 to {most}, or None for all bits"
            )
        if self.overflow not in OVERFLOWS:
            raise InvalidArgumentError(f"overflow={self.overflow!r} is unknown: use {' or '.join(map(repr, OVERFLOWS))}")

    @property
    def changes_nothing(self) -> bool:
        """Whether everything is stored as it comes."""
        return self.dtype is None and self.keep_bits is None


def round_bits(values: Array, keep_bits: int) -> Array:
    """The nearest numbers with `keep_bits` bits of the fraction, ties to even, as a new array of the same dtype.

    Parameters
    ----------
    values : ndarray of float16, float32 or float64
    keep_bits : int

    Notes
    -----
    The rounding is that of numcodecs' BitRound (M. Klöwer et al., Nature Computational Science 1, 2021). BitRound turns some NaN into zero
    and the largest finite numbers into infinity; here NaN stays NaN, and finite numbers stay finite.
    """
    from numcodecs.bitround import BitRound

    if keep_bits >= FRACTION_BITS[values.dtype.name]:
        return values.copy()
    rounded: Array = BitRound(keep_bits).encode(np.ascontiguousarray(values)).view(values.dtype).reshape(values.shape)
    odd = ~np.isfinite(rounded) | ~np.isfinite(values)
    if odd.any():
        largest = _truncated(np.array(np.finfo(values.dtype).max, values.dtype), keep_bits)
        rounded[odd] = np.where(np.isfinite(values[odd]), np.copysign(largest, values[odd]), values[odd])
    return rounded


def _truncated(value: Array, keep_bits: int) -> Array:
    kind = f"u{value.dtype.itemsize}"
    dropped = FRACTION_BITS[value.dtype.name] - keep_bits
    bits = value.reshape(1).view(kind)
    return np.asarray((bits >> dropped << dropped).view(value.dtype)[0])


def store_as(name: str, values: Array, precision: Precision, *, source_dtype: str, wide: bool = False) -> tuple[Array, str, bool]:
    """Values as they are stored.

    Parameters
    ----------
    name : str
        Name of the variable, for messages.
    values : ndarray of float16, float32 or float64
    precision : Precision
    source_dtype : str
        The dtype that the values were computed in; ``bfloat16`` values come in float32 arrays.
    wide : bool
        Whether this variable overflowed float16 before, and is therefore stored with bfloat16's precision.

    Returns
    -------
    values : ndarray
        Of the dtype of the stored array.
    stored_dtype : str
        The dtype whose numbers they are: ``bfloat16`` for float32 arrays that hold bfloat16 numbers.
    overflowed : bool
        Whether a finite value is beyond the range of float16, so that bfloat16's precision was used instead.

    Raises
    ------
    NumberRangeError
        A finite value is beyond the range of float16, and ``precision.overflow`` is "raise".
    """
    target = precision.dtype or source_dtype
    overflowed = False
    if target == "float16":
        # Values are rounded once, before they become float16: rounding twice can err by more than half a step.
        bits = precision.keep_bits if precision.keep_bits is not None else FRACTION_BITS["float16"]
        with np.errstate(over="ignore"):
            narrow = (round_bits(values, bits) if bits < FRACTION_BITS["float16"] else values).astype(np.float16)
        beyond = np.isinf(narrow)
        # A value that the model itself computed as infinite is no overflow, and stays infinite.
        overflowed = bool(beyond.any()) and bool(np.isfinite(values[beyond]).any())
        if overflowed and precision.overflow == "raise":
            largest = float(np.abs(values[beyond & np.isfinite(values)]).max())
            raise NumberRangeError(
                f"{name!r} holds {largest:g}, and float16 ends at 65504: store it as 'bfloat16' or 'float32', or give overflow='bfloat16'"
            )
        if not (overflowed or wide):
            return narrow, target, False
        target = "bfloat16"
    if target == "bfloat16":
        return round_bits(values.astype(np.float32), min(precision.keep_bits or 7, 7)), "bfloat16", overflowed
    if target != values.dtype.name:
        values = values.astype(target)
    if precision.keep_bits is not None:
        values = round_bits(values, precision.keep_bits)
    return values, target, overflowed


def count_odd(values: Array, row_shape: tuple[int, ...]) -> tuple[int, int]:
    """How many values are not finite, and how many rows hold nothing but zeros.

    Parameters
    ----------
    values : ndarray of float16, float32 or float64, shape (…, *row_shape)
    row_shape : tuple of int
        Shape of what counts as one row.
    """
    # One pass over the bits: without the sign, they order as absolute values do, with infinity and NaN above all finite numbers.
    width = values.dtype.itemsize
    bits = np.ascontiguousarray(values).reshape(-1, int(np.prod(row_shape))).view(f"u{width}")
    largest = (bits & bits.dtype.type(2 ** (8 * width - 1) - 1)).max(axis=1, initial=0)
    infinite = np.array(np.inf, values.dtype).view(bits.dtype)
    suspects = largest >= infinite
    odd = int(np.count_nonzero(~np.isfinite(bits[suspects].view(values.dtype)))) if suspects.any() else 0
    return odd, int(np.count_nonzero(largest == 0))
