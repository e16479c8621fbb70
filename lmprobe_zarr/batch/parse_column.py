"""`parse_column`: what a caller gives as the values of a column, as a `Column`; whatever cannot be stored is refused with its row.

Lists, arrays of numpy, columns of pandas, polars, Arrow and torch are understood; the latter three by their attributes, without an import.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import date, datetime, timedelta
from typing import Any, Final

import numpy as np
import pandas as pd

from lmprobe_zarr.batch.columns import EXACT_FLOAT, FILLS, Column, ColumnKind, KindName, has_utf8, show_value
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.typing import Array, Mask

__all__ = ["parse_column", "with_encoder_texts"]

# More categories than these are no categories, and would make every document of a part large.
MOST_CATEGORIES: Final = 2**14
UNITS: Final = ("s", "ms", "us", "ns")
GIVE: Final = "give truth values, integers, floating-point numbers, texts, datetimes, timedeltas or dates, and one of these throughout"
HOW: Final[Mapping[str, str]] = {
    "bytes": "decode it, value.decode()", "complex": "store its real and imaginary parts as two columns",
    "Decimal": "give float(value), or str(value) where it must stay exact", "Fraction": "give float(value), or str(value)",
    "Period": "give value.start_time, or str(value)", "Interval": "give str(value)", "time": "give value.isoformat()",
    "list": "a column has one value per prompt", "dict": "a column has one value per prompt", "tuple": "a column has one value per prompt",
}  # fmt: skip


def parse_column(name: str, values: object) -> Column:
    """The values of a column, checked.

    Parameters
    ----------
    name : str
        Name of the column, for messages.
    values : sequence, array, tensor, or column of a table
        One value per prompt. None, NaN, ``pandas.NA`` and ``NaT`` are missing values. Subclasses of str, int and float are the value that
        they are equal to.

    Raises
    ------
    InvalidArgumentError
        A value that cannot be stored exactly, or several kinds of values; the message names the first such row, counted from 0.
    InvalidTypeError
        No sequence of values.
    """
    if isinstance(values, Column):
        return values
    if isinstance(values, Mapping | set | frozenset | str | bytes) or not isinstance(values, Iterable):
        raise InvalidTypeError(f"column {name!r} is a {type(values).__name__}: give one value per prompt, in the order of the prompts")
    given: Any = values
    if hasattr(given, "__dask_graph__") and hasattr(given, "compute"):
        given = given.compute()
    if hasattr(given, "detach"):
        given = given.detach().cpu().numpy()
    elif hasattr(given, "dims") and hasattr(given, "values"):
        given = given.values
    if hasattr(given, "to_pylist"):  # of Arrow, whose own scalars would be iterated over
        given = given.to_pylist()
    if isinstance(given, pd.Series | pd.Index | pd.api.extensions.ExtensionArray):
        return _of_pandas(name, given)
    if isinstance(given, np.ma.MaskedArray):
        return _without(_of_numpy(name, np.asarray(given.data)), np.ma.getmaskarray(given))
    return _of_numpy(name, given) if isinstance(given, np.ndarray) else _of_objects(name, list(given))


def with_encoder_texts(columns: Mapping[str, Column], pairs: Sequence[tuple[str, str]]) -> dict[str, Column]:
    """Columns and, as ``encoder_text``, the first text of every pair; the second is the prompt's text.

    Raises
    ------
    InvalidArgumentError
        A column of the caller's has that name.
    """
    if "encoder_text" in columns:
        raise InvalidArgumentError("coords names 'encoder_text', which is the first text of every pair: give the column another name")
    return {**columns, "encoder_text": parse_column("encoder_text", [text for text, _ in pairs])}


def _without(column: Column, missing: Mask) -> Column:
    """A column with further rows missing."""
    if column.missing is not None:
        missing = missing | column.missing
    if not missing.any():
        return column
    values = column.values.copy()
    values[missing] = FILLS.get(column.kind.name, np.array("NaT", values.dtype) if values.dtype.kind in "mM" else None)
    return Column(values, column.kind, missing)


# --------------------------------------------------------------------------------------------------------------- pandas


def _of_pandas(name: str, given: Any) -> Column:
    dtype = given.dtype
    if isinstance(dtype, pd.CategoricalDtype):
        return _of_categories(name, pd.Categorical(given))
    if isinstance(dtype, pd.DatetimeTZDtype):
        return _of_zoned(name, pd.DatetimeIndex(given))
    plain = (
        dtype if isinstance(dtype, np.dtype) else getattr(dtype, "numpy_dtype", None) if type(dtype).__name__ == "NumpyEADtype" else None
    )
    if isinstance(plain, np.dtype):
        column = _of_numpy(name, np.asarray(given, plain))
        return _named(column, "object") if plain.kind == "O" and column.kind.name == "text" else column
    if isinstance(dtype, pd.StringDtype):
        column = _of_objects(name, np.asarray(given, object).tolist())
        if column.kind.name == "missing":
            return _named(_no_texts(len(column)), str(dtype))
        # The dtype that pandas itself gives to texts needs no name.
        return column if str(dtype) == "str" else _named(column, str(dtype))
    if isinstance(dtype, pd.SparseDtype):
        return _of_numpy(name, np.asarray(given))
    missing = np.asarray(pd.isna(given), bool)
    numeric = getattr(dtype, "numpy_dtype", None)
    if isinstance(numeric, np.dtype) and numeric.kind in "iufb" and type(dtype).__name__ != "ArrowDtype":
        fill = FILLS["bool" if numeric.kind == "b" else "float" if numeric.kind == "f" else "int"]
        return _named(_without(_of_numpy(name, pd.array(given).to_numpy(numeric, na_value=fill)), missing), str(dtype))
    column = _of_objects(name, np.asarray(pd.Series(given).astype(object), object).tolist())
    return _named(column, str(dtype)) if column.kind.name in ("bool", "int", "float", "text") else column


def _named(column: Column, dtype: str) -> Column:
    kind = column.kind
    return Column(column.values, _kind(kind.name, unit=kind.unit, zone=kind.zone, dtype=dtype), column.missing)


def _kind(name: KindName, **given: Any) -> ColumnKind:
    return ColumnKind(name=name, **given)


def _no_texts(rows: int) -> Column:
    return Column(np.full(rows, "", object), _kind("text"), np.ones(rows, bool) if rows else None)


def _of_categories(name: str, given: pd.Categorical) -> Column:
    if len(given.categories) > MOST_CATEGORIES:
        raise InvalidArgumentError(
            f"column {name!r} has {len(given.categories)} categories, and {MOST_CATEGORIES} are the most: store plain values, "
            "column.astype(column.cat.categories.dtype)"
        )
    codes = np.asarray(given.codes, np.int64)
    if not len(given.categories):
        return Column(np.full(len(codes), "", object), _kind("text", categories=()), np.ones(len(codes), bool) if len(codes) else None)
    known = parse_column(f"{name} (its categories)", given.categories)
    kind = replace(known.kind, categories=tuple(known.bare().tolist()), ordered=bool(given.ordered))
    return _without(Column(known.values[np.maximum(codes, 0)], kind), codes < 0)


def _of_zoned(name: str, given: pd.DatetimeIndex) -> Column:
    zone = str(given.tz)
    try:
        restored = pd.DatetimeTZDtype("ns", zone)
    except (ValueError, TypeError, KeyError, OSError):
        restored = None
    if restored is None:
        raise InvalidArgumentError(
            f"column {name!r} has the time zone {zone!r}, which has no name to store: give .dt.tz_convert('UTC'), or a named zone"
        )
    values = np.asarray(given.tz_convert("UTC").tz_localize(None))
    return _times(values, _kind("datetime", zone=zone, unit=np.datetime_data(values.dtype)[0]))


# ---------------------------------------------------------------------------------------------------------------- numpy


def _of_numpy(name: str, values: Array) -> Column:
    if values.ndim != 1:
        raise InvalidArgumentError(f"column {name!r} has shape {values.shape}: give one value per prompt")
    kind, dtype = values.dtype.kind, values.dtype
    if kind == "b":
        return Column(values.astype(bool), _kind("bool"))
    if kind in "iu":
        if dtype.itemsize == 8 and kind == "u" and len(values) and int(values.max()) > np.iinfo(np.int64).max:
            raise _bad(name, int(values.argmax()), values[values.argmax()], "beyond 64 bits with a sign", "store them as texts")
        return Column(values.astype(np.int64), _kind("int", dtype=None if dtype.newbyteorder("=") == np.int64 else dtype.name))
    if kind == "f":
        with np.errstate(over="ignore"):
            held = values.astype(np.float64)
        lost = ~((held == values) | np.isnan(held)) if dtype.itemsize > 8 else np.zeros(0, bool)
        if lost.any():
            raise _bad(name, int(lost.argmax()), values[lost.argmax()], "more precise than float64", "convert them, or store them as texts")
        missing = np.isnan(held)
        named = None if dtype.itemsize >= 8 else dtype.name
        return Column(held, _kind("float", dtype=named), missing if missing.any() else None)
    if kind in "mM":
        return _of_times(name, values)
    if kind == "U":
        return _texts(name, values.astype(object), np.zeros(len(values), bool))
    return _of_objects(name, values.tolist())


def _of_times(name: str, values: Array) -> Column:
    word: KindName = "datetime" if values.dtype.kind == "M" else "timedelta"
    unit = np.datetime_data(values.dtype)[0]
    if unit == "generic":
        if not np.isnat(values).all():
            raise _bad(name, 0, values[0], "a timedelta without a unit", "give it one, np.timedelta64(1, 's')")
        return Column(np.full(len(values), np.nan), _kind("missing"), np.ones(len(values), bool) if len(values) else None)
    count = np.datetime_data(values.dtype)[1]
    held_unit = unit if unit in UNITS else "ns" if unit in ("ps", "fs", "as") else "s"
    if word == "timedelta" and unit in ("Y", "M"):
        raise _bad(name, 0, values[0], f"a timedelta in units of {unit}, whose length differs", "give days")
    if unit != held_unit or count != 1:
        held = values.astype(f"{values.dtype.kind}8[{held_unit}]")
        lost = (held.astype(values.dtype) != values) & ~np.isnat(values)
        if lost.any():
            raise _bad(name, int(lost.argmax()), values[lost.argmax()], f"not exact in {held_unit}", "round it")
        values = held
    return _times(values.astype(values.dtype.newbyteorder("=")), _kind(word, unit=held_unit))


def _times(values: Array, kind: ColumnKind) -> Column:
    missing = np.isnat(values)
    return Column(values, kind, missing if missing.any() else None)


# --------------------------------------------------------------------------------------------------------------- objects


def _of_objects(name: str, listed: Sequence[Any]) -> Column:
    """Values that are Python objects, by what each of them is."""
    types = dict.fromkeys(map(type, listed))
    kinds = {kind: _kind_of_type(kind) for kind in types}
    missing = np.zeros(len(listed), bool)
    if any(kind is None or _may_be_missing(cls) for cls, kind in kinds.items()):
        missing = np.fromiter((_is_missing(value) for value in listed), bool, len(listed))
    named = [kinds[type(value)] for value in listed] if len(set(kinds.values())) > 1 or missing.any() else []
    found = {kind for kind, gone in zip(named, missing, strict=True) if not gone} if named else set(kinds.values())
    if not found:
        return Column(np.full(len(listed), np.nan), _kind("missing"), missing if len(listed) else None)
    if found == {"int", "float"}:
        return _numbers(name, listed, missing)
    if len(found) > 1 or None in found:
        named = named or [kinds[type(value)] for value in listed]
        raise _mixed(name, listed, missing, named)
    kind = next(iter(found))
    assert kind is not None  # noqa: S101 - refused above
    if kind == "text":
        return _texts(
            name, np.array([None if gone else str.__str__(_bare(v)) for v, gone in zip(listed, missing, strict=True)], object), missing
        )
    present = [value for value, gone in zip(listed, missing, strict=True) if not gone]
    if kind in ("datetime", "date", "timedelta"):
        return _of_moments(name, present, missing, kind)
    if kind == "float":
        return _numbers(name, listed, missing)
    plain = [bool(value) if kind == "bool" else _as_int(value) for value in present]
    if kind == "int":
        beyond = next((place for place, value in enumerate(plain) if not -(2**63) <= value < 2**63), None)
        if beyond is not None:
            row = int(np.flatnonzero(~missing)[beyond])
            raise _bad(name, row, str(plain[beyond])[:24], "too large to be stored exactly", "store them as texts")
    values = np.full(len(listed), FILLS[kind], bool if kind == "bool" else np.int64)
    values[~missing] = plain
    return Column(values, _kind(kind), missing if missing.any() else None)


def _kind_of_type(cls: type) -> KindName | None:
    for kind, bases in _TYPES:
        if issubclass(cls, bases):
            return kind
    return None


_TYPES: Final[tuple[tuple[KindName, tuple[type, ...]], ...]] = (
    ("missing", (type(None), type(pd.NA), type(pd.NaT), type(np.ma.masked))),
    ("bool", (bool, np.bool_)),
    # numpy's timedelta64 is a subclass of its integers.
    ("timedelta", (timedelta, np.timedelta64)),
    ("int", (int, np.integer)),
    ("float", (float, np.floating)),
    ("text", (str,)),
    ("datetime", (datetime, np.datetime64)),
    ("date", (date,)),
)


def _may_be_missing(cls: type) -> bool:
    return issubclass(cls, float | np.floating | np.datetime64 | np.timedelta64) or _kind_of_type(cls) == "missing"


def _is_missing(value: Any) -> bool:
    if value is None or value is pd.NA or value is pd.NaT or value is np.ma.masked:
        return True
    if isinstance(value, float | np.floating):
        return bool(value != value)
    return isinstance(value, np.datetime64 | np.timedelta64) and bool(np.isnat(value))


def _bare(value: Any) -> Any:
    """A text, or a scalar of numpy, as Python's own."""
    return value.item() if isinstance(value, np.generic) else value


def _as_int(value: Any) -> int:
    """The integer that a subclass of int is equal to, whatever its own methods say."""
    return int(value.item()) if isinstance(value, np.generic) else int.__int__(value)


def _numbers(name: str, listed: Sequence[Any], missing: Mask) -> Column:
    """Floating-point numbers, integers among them."""
    values = np.full(len(listed), np.nan)
    for row, (value, gone) in enumerate(zip(listed, missing, strict=True)):
        if gone:
            continue
        if isinstance(value, int | np.integer):
            number = _as_int(value)
            if abs(number) > EXACT_FLOAT:
                raise _bad(
                    name, row, str(number)[:24], "too large to be stored exactly among floating-point numbers", "store them as texts"
                )
            values[row] = number
        else:
            values[row] = value.item() if isinstance(value, np.generic) else float.__float__(value)
            if isinstance(value, np.longdouble) and values[row] != value:
                raise _bad(name, row, value, "more precise than float64", "convert it, or store it as text")
    return Column(values, _kind("float"), missing if missing.any() else None)


def _texts(name: str, values: Array, missing: Mask) -> Column:
    if missing.any():
        values[missing] = ""
    try:
        "".join(values).encode()
    except UnicodeEncodeError:
        row = next(row for row, text in enumerate(values) if not has_utf8(text))
        raise InvalidArgumentError(
            f"column {name!r} holds {show_value(values[row])} in row {row}, which no UTF-8 can hold (half a surrogate pair): "
            'mend the text, text.encode("utf-8", "replace").decode()'
        ) from None
    return Column(values, _kind("text"), missing if missing.any() else None)


def _of_moments(name: str, present: list[Any], missing: Mask, word: KindName) -> Column:
    """Datetimes, dates and timedeltas given as Python objects."""
    rows = np.flatnonzero(~missing)
    if word == "date":
        held: Array = np.array(present, "M8[D]").astype("M8[s]")
        kind = _kind("date", unit="s")
    elif word == "timedelta":
        held = np.asarray(pd.to_timedelta(pd.Series(present, dtype=object)))
        kind = _kind("timedelta", unit=np.datetime_data(held.dtype)[0])
    else:
        zones = [str(value.tzinfo) if isinstance(value, datetime) and value.tzinfo is not None else "" for value in present]
        other = next((place for place, zone in enumerate(zones) if zone != zones[0]), None)
        if other is not None:
            words = [f"the time zone {zone}" if zone else "no time zone" for zone in (zones[0], zones[other])]
            raise InvalidArgumentError(
                f"column {name!r} has datetimes of several time zones: {words[0]} in row {rows[0]}, {words[1]} in row {rows[other]}; "
                "convert all to one, value.astimezone(timezone.utc)"
            )
        try:
            index = pd.DatetimeIndex(pd.to_datetime(pd.Series(present, dtype=object)))
        except (ValueError, OverflowError) as error:
            raise InvalidArgumentError(f"column {name!r} holds datetimes that pandas cannot hold: {error}") from error
        column = _of_pandas(name, index)
        held, kind = column.values, column.kind
    values = np.full(len(missing), np.array("NaT", held.dtype), held.dtype)
    values[rows] = held
    return Column(values, kind, missing if missing.any() else None)


# ---------------------------------------------------------------------------------------------------------------- errors


_SINGULAR: Final = {
    "bool": "the truth value", "int": "the integer", "float": "the number", "text": "the text", "datetime": "the datetime",
    "timedelta": "the timedelta", "date": "the date",
}  # fmt: skip


def _described(value: Any, kind: str | None) -> str:
    if kind is None:
        return f"a {type(value).__name__}"
    shown = str(value) if kind in ("datetime", "date", "timedelta") else show_value(value)
    return f"{_SINGULAR[kind]} {shown[:40]}"


def _mixed(name: str, listed: Sequence[Any], missing: Mask, kinds: Sequence[KindName | None]) -> InvalidArgumentError:
    rows = np.flatnonzero(~missing).tolist()
    strange = next((row for row in rows if kinds[row] is None), None)
    if strange is not None:
        how = HOW.get(type(listed[strange]).__name__)
        return InvalidArgumentError(
            f"column {name!r} holds {_described(listed[strange], None)} in row {strange}, which cannot be stored: {how or GIVE}"
        )
    first = rows[0]
    other = next(row for row in rows if kinds[row] != kinds[first])
    return InvalidArgumentError(
        f"column {name!r} holds values of several kinds, {_described(listed[first], kinds[first])} in row {first} and "
        f"{_described(listed[other], kinds[other])} in row {other}: give one kind only, such as texts, [str(value) for value in column]"
    )


def _bad(name: str, row: int, value: Any, what: str, todo: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"column {name!r} holds {value} in row {row}, {what}: {todo}")
