"""`Column`: a value per prompt, of one kind, in which some may be missing. Knows no file and no dataset; `parse_column` makes one.

A kind says what the values are; numpy says only how they are held. Whatever numpy would change on the way (integers with gaps, categories,
time zones) is kept beside the values, so that `Column.to_pandas` gives back what was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import numpy as np
import pandas as pd

from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.typing import Array, Mask

__all__ = [
    "ANY_KIND",
    "Column",
    "ColumnKind",
    "KindName",
    "check_texts",
    "fit_column",
    "has_utf8",
    "is_wide",
    "join_columns",
    "merge_kinds",
    "show_value",
]

KindName = Literal["bool", "int", "float", "text", "datetime", "timedelta", "date", "missing"]
WORDS: Final = {
    "bool": "truth values", "int": "integers", "float": "floating-point numbers", "text": "texts", "datetime": "datetimes",
    "timedelta": "timedeltas", "date": "dates", "missing": "missing values only",
}  # fmt: skip
# What stands at the rows without a value in `Column.values`.
FILLS: Final[dict[str, Any]] = {"bool": False, "int": 0, "float": np.nan, "text": "", "missing": np.nan}
NULLABLE: Final = {"bool": "boolean", "int": "Int64"}
EXACT_FLOAT: Final = 2**53


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnKind:
    """What the values of a column are.

    Parameters
    ----------
    name : str
        ``bool``, ``int``, ``float``, ``text``, ``datetime``, ``timedelta``, ``date``; ``missing`` where no value is there to say.
    unit : {"s", "ms", "us", "ns"}, optional
        Of datetimes and timedeltas.
    zone : str, optional
        Time zone of datetimes, whose values are then in UTC.
    dtype : str, optional
        The dtype of numpy or pandas that the values were given in, where it is not numpy's own int64, float64 or bool, or texts.
    categories : tuple, optional
        Everything that a value may be, in this order; times as numbers of their unit.
    ordered : bool
        Whether the order of the categories means anything.
    """

    name: KindName
    unit: str | None = None
    zone: str | None = None
    dtype: str | None = None
    categories: tuple[Any, ...] | None = None
    ordered: bool = False

    def __str__(self) -> str:
        """The kind in words, for messages."""
        words = WORDS[self.name]
        if self.name == "datetime":
            words += f" in the time zone {self.zone}" if self.zone else " without a time zone"
        if self.categories is None:
            return words
        shown = ", ".join(repr(value) for value in self.categories[:5]) + (", …" if len(self.categories) > 5 else "")
        return f"{'ordered ' if self.ordered else ''}categories ({shown}) of {words}"

    @property
    def is_plain(self) -> bool:
        """Whether numpy alone holds the values as they were given."""
        return self.name in ("bool", "int", "float", "text") and self.dtype is None and self.categories is None


ANY_KIND: Final = ColumnKind(name="missing")


@dataclass(frozen=True, slots=True, eq=False)
class Column:
    """One value per prompt.

    Parameters
    ----------
    values : ndarray, shape (prompt,)
        bool, int64, float64, datetime64, timedelta64, or objects that are str.
    kind : ColumnKind
        What they are.
    missing : ndarray of bool, shape (prompt,), optional
        Which rows have no value; None where all have one.
    """

    values: Array
    kind: ColumnKind
    missing: Mask | None = None

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: Any) -> Column:
        """Some of the rows: a slice, numbers or truth values."""
        missing = None if self.missing is None else self.missing[rows]
        return Column(self.values[rows], self.kind, missing if missing is not None and missing.any() else None)

    @property
    def n_missing(self) -> int:
        """How many rows have no value."""
        return 0 if self.missing is None else int(self.missing.sum())

    @property
    def nbytes(self) -> int:
        """Approximate bytes in memory."""
        return sum(map(len, self.values)) if self.values.dtype == object else self.values.nbytes

    def bare(self) -> Array:
        """The values without units: times as int64."""
        return self.values.astype(np.int64) if self.kind.unit else self.values

    def shown(self) -> Array:
        """The values as a dataset shows them: integers and truth values are float64 where some are missing, and missing texts NaN.

        Integers that float64 does not hold stay integers, in an array of objects.
        """
        if self.missing is None:
            return self.values
        if self.kind.name == "bool" or (self.kind.name == "int" and not is_wide(self.values)):
            values: Array = self.values.astype(np.float64)
        elif self.kind.name in ("int", "text"):
            values = self.values.astype(object)
        else:
            return self.values  # NaN and NaT say it themselves
        values[self.missing] = np.nan
        return values

    def show(self, row: int) -> str:
        """One value, for a message."""
        return "none" if self.missing is not None and self.missing[row] else show_value(self.values[row])

    def equals(self, other: Column) -> Mask:
        """Which rows have the same value as in another column of the same length, or neither has one."""
        none = np.zeros(len(self), bool)
        mine, others = (none if column.missing is None else column.missing for column in (self, other))
        if "missing" in (self.kind.name, other.kind.name):
            return np.asarray(mine & others)
        if replace(self.kind, dtype=None, unit=None) != replace(other.kind, dtype=None, unit=None):
            return none
        same = np.asarray(self.values == other.values, bool)
        if self.kind.name == "float":
            same |= np.isnan(self.values) & np.isnan(other.values)
        return np.asarray(np.where(mine | others, mine & others, same), bool)

    def to_pandas(self) -> Any:
        """The values as an array that pandas takes, of the dtype that they were given in; a nullable one where some are missing."""
        kind, missing = self.kind, np.zeros(len(self), bool) if self.missing is None else self.missing
        if kind.categories is not None:
            codes = pd.Index(_as_index(kind, kind.categories)).get_indexer(pd.Index(self._plain()))
            codes = np.where(missing, -1, codes)
            return pd.Categorical.from_codes(codes, categories=_as_index(kind, kind.categories), ordered=kind.ordered)
        values = self._plain()
        dtype = kind.dtype or (NULLABLE.get(kind.name) if self.missing is not None else None)
        if dtype is None or dtype == "object":
            return values
        known = _known_dtype(dtype, kind)
        if self.missing is not None and isinstance(known, np.dtype) and known.kind in "iu":
            known = pd.api.types.pandas_dtype(known.name.replace("int", "Int").replace("u", "U"))
        return pd.array(values, dtype=known)

    def _plain(self) -> Any:
        """The values as an array that pandas converts to any dtype of the kind, with missing ones marked."""
        if self.kind.name == "datetime" and self.kind.zone:
            return pd.DatetimeIndex(self.values).tz_localize("UTC").tz_convert(self.kind.zone).array
        if self.kind.name == "date":
            days = self.values.astype("M8[D]").astype(object)
            days[np.isnat(self.values)] = None
            return days
        if self.kind.name in ("datetime", "timedelta", "float", "missing") or self.missing is None:
            return self.values
        values = self.values.astype(object)
        values[self.missing] = np.nan if self.kind.name == "text" and self.kind.dtype is None else None
        return values


def _as_index(kind: ColumnKind, values: Sequence[Any]) -> Any:
    """Categories as an index of their own dtype."""
    if kind.name == "datetime" and kind.zone:
        return pd.DatetimeIndex(np.array(values, f"M8[{kind.unit}]")).tz_localize("UTC").tz_convert(kind.zone)
    if kind.name in ("datetime", "timedelta"):
        return pd.Index(np.array(values, f"{'M' if kind.name == 'datetime' else 'm'}8[{kind.unit}]"))
    if kind.name == "date":
        return pd.Index(np.array(values, "M8[s]").astype("M8[D]").astype(object), dtype=object)
    return pd.Index(list(values), dtype=kind.dtype) if kind.dtype else pd.Index(list(values))


def _known_dtype(dtype: str, kind: ColumnKind) -> Any:
    """A dtype by its name; where it needs a library that is not installed, that of pandas itself."""
    try:
        known = pd.api.types.pandas_dtype(dtype)
        # Before pandas 3 "str" is a dtype of numpy, which makes a text of what is missing too.
        return known if not isinstance(known, np.dtype) or known.kind != "U" else np.dtype(object)
    except (ImportError, TypeError):
        return NULLABLE.get(kind.name) or {"float": "Float64", "text": "string"}.get(kind.name)


def is_wide(values: Array) -> bool:
    """Whether some integers are beyond those that float64 holds exactly."""
    return bool(len(values) and values.dtype.kind == "i" and (values.min() < -EXACT_FLOAT or values.max() > EXACT_FLOAT))


def show_value(value: Any) -> str:
    """A value for a message, shortened."""
    text = (
        str(value) if isinstance(value, np.datetime64 | np.timedelta64) else ascii(value.item() if isinstance(value, np.generic) else value)
    )
    return text if len(text) <= 40 else text[:39] + "…"


def has_utf8(text: str) -> bool:
    """Whether UTF-8 can hold a text: not if it has half a surrogate pair, as broken JSON leaves it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# ------------------------------------------------------------------------------------------------- several columns of one name


def merge_kinds(kinds: Sequence[ColumnKind]) -> ColumnKind | None:
    """The kind of a column of which parts were written at different times; None where they differ in what their values are.

    Categories without an order are joined, those of earlier parts first.
    """
    known = list(dict.fromkeys(kind for kind in kinds if kind.name != "missing"))
    if not known:
        return ANY_KIND
    first = known[0]
    if len(known) == 1:
        return first
    if any(
        (kind.name, kind.zone, kind.ordered, kind.categories is None) != (first.name, first.zone, first.ordered, first.categories is None)
        for kind in known
    ):
        return None
    dtypes, units = {kind.dtype for kind in known}, [kind.unit for kind in known if kind.unit]
    merged = replace(first, dtype=first.dtype if len(dtypes) == 1 else None, unit=max(units, key=_UNITS.index) if units else None)
    if first.categories is None:
        return merged
    if first.ordered and len({kind.categories for kind in known}) > 1:
        return None
    return replace(merged, categories=tuple(dict.fromkeys(value for kind in known for value in kind.categories or ())))


_UNITS: Final = ("s", "ms", "us", "ns")


def fit_column(name: str, column: Column, stored: Sequence[ColumnKind]) -> Column:
    """A column as it can be added to what is stored under its name.

    Parameters
    ----------
    name : str
    column : Column
    stored : sequence of ColumnKind
        The kinds of the stored parts of the column, in their order; usually all equal.

    Raises
    ------
    InvalidArgumentError
        It is of another kind; the message names both.
    """
    known = list(dict.fromkeys(kind for kind in stored if kind.name != "missing"))
    if not known or column.kind.name == "missing":
        return column
    mine = column.kind
    kind = merge_kinds(known)
    if kind is None:  # parts of several kinds, as two writers at once leave them: any of these goes on
        if any(merge_kinds([each, mine]) is not None for each in known):
            return column
        raise InvalidArgumentError(_another_kind(name, mine, " and ".join(str(each) for each in known)))
    if kind.categories is not None and mine.categories is None and mine.name == kind.name:
        present = column.bare() if column.missing is None else column.bare()[~column.missing]
        outside = sorted({show_value(value) for value in set(present.tolist()) - set(kind.categories)})
        if outside:
            raise InvalidArgumentError(
                f"column {name!r} has the categories {', '.join(map(show_value, kind.categories[:5]))}, and {outside[0]} is none of them: "
                "give a pandas Categorical that has it too, or store it under another name"
            )
        mine = replace(kind, dtype=kind.dtype)
    if merge_kinds([kind, mine]) is None:
        raise InvalidArgumentError(_another_kind(name, mine, str(kind)))
    if mine.unit != kind.unit:
        values = column.values.astype(f"{column.values.dtype.kind}8[{kind.unit}]")
        if not np.array_equal(values.astype(column.values.dtype), column.values, equal_nan=True) or not _same_times(values, column.values):
            raise InvalidArgumentError(
                f"column {name!r} is stored in units of {kind.unit}, which do not hold these values of {mine.unit} exactly: "
                "round them, or store them under another name"
            )
        return Column(values, replace(mine, unit=kind.unit), column.missing)
    if mine.dtype is None and mine.categories is None and column.values.dtype.kind != "O":
        mine = replace(mine, dtype=kind.dtype)  # plain values go on as the stored ones, where their dtype holds them
        mine = mine if _holds(mine.dtype, column) else column.kind
    return Column(column.values, mine, column.missing)


def _same_times(values: Array, others: Array) -> bool:
    """Whether times in two units are equal; a value beyond the range of the finer unit wraps round, and changes its sign."""
    there = ~np.isnat(others)
    return bool(np.all((values[there].astype(np.int64) >= 0) == (others[there].astype(np.int64) >= 0)))


def _holds(dtype: str | None, column: Column) -> bool:
    """Whether a dtype of numbers holds the values of a column."""
    if dtype is None or column.kind.name not in ("int", "float"):
        return True
    try:
        numeric = pd.api.types.pandas_dtype(dtype)
        held = np.asarray(column.values, numeric if isinstance(numeric, np.dtype) else numeric.numpy_dtype)  # type: ignore[attr-defined]
    except (TypeError, ImportError, OverflowError, AttributeError):
        return False
    extension = not isinstance(numeric, np.dtype)
    return bool(np.array_equal(held.astype(column.values.dtype), column.values, equal_nan=column.kind.name == "float")) and (
        extension or column.kind.name == "float" or column.missing is None
    )


def _another_kind(name: str, mine: ColumnKind, stored: str) -> str:
    return f"column {name!r} holds {stored}, and these are {mine}: convert them to what is stored, or store them under another name"


def join_columns(name: str, columns: Sequence[Column]) -> Column:
    """Columns of the same kind end to end.

    Raises
    ------
    InvalidArgumentError
        They differ in kind.
    """
    if len(columns) == 1:
        return columns[0]
    kinds = [column.kind for column in columns]
    kind = merge_kinds(kinds)
    if kind is None:
        others = list(dict.fromkeys(map(str, kinds)))
        raise InvalidArgumentError(f"column {name!r} holds {others[0]} first and {others[-1]} later: convert them to one kind")
    missing = np.concatenate([np.zeros(len(c), bool) if c.missing is None else c.missing for c in columns])
    holding = [column for column in columns if column.kind.name != "missing"]
    dtype = np.result_type(*(column.values for column in holding)) if holding else np.dtype(np.float64)
    values = np.empty(len(missing), dtype)
    start = 0
    for column in columns:
        fill = FILLS.get(kind.name, np.array("NaT", dtype) if dtype.kind in "mM" else np.nan)
        values[start : start + len(column)] = fill if column.kind.name == "missing" else column.values
        start += len(column)
    return Column(values, kind, missing if missing.any() else None)


def check_texts(texts: Sequence[Any], name: str = "prompts") -> None:
    """Raise `InvalidArgumentError` where one of some texts has half a surrogate pair; it could only be stored as another text."""
    try:
        "".join([text for text in texts if isinstance(text, str)]).encode()
    except UnicodeEncodeError:
        number = next(number for number, text in enumerate(texts) if isinstance(text, str) and not has_utf8(text))
        raise InvalidArgumentError(
            f"{name}[{number}] {texts[number][:40]!a} holds a lone surrogate at character {_surrogate(texts[number])}, which no UTF-8 can "
            'hold: mend the text, text.encode("utf-8", "replace").decode(), or leave it out'
        ) from None


def _surrogate(text: str) -> int:
    return next(place for place, character in enumerate(text) if "\ud800" <= character <= "\udfff")
