"""Columns as they are stored: what an array on disk and its attribute ``column`` say together, and how many texts fit into a chunk.

The dtypes of the format hold truth values, integers, floats and texts. Everything else is one of these with an attribute. A reader that
does not know the attribute finds NaN where integers or truth values are missing, and a text for what is no number: never another number.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np

from lmprobe_zarr.batch import ANY_KIND, Column, ColumnKind, KindName, is_wide, merge_kinds, offsets_of, parse_column
from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.interchange import ABSENT_TEXT
from lmprobe_zarr.store.format import COLUMN, TEXT_BYTES, ArrayInfo
from lmprobe_zarr.typing import Array, Mask

__all__ = [
    "absent_value",
    "as_shown",
    "column_attrs",
    "column_of",
    "decode_column",
    "encode_column",
    "holds_texts_only",
    "kind_of",
    "merged_kind",
    "shown_column",
    "shown_dtype",
    "text_rows",
]

TEXT_ROWS: Final = 2**16
_PLAIN: Final[Mapping[str, KindName]] = {"b": "bool", "i": "int", "f": "float"}
KINDS: Final = ("bool", "int", "float", "text", "datetime", "date", "timedelta", "missing")
_TIMES: Final = {"datetime": "M", "date": "M", "timedelta": "m"}


def text_rows(key: str, values: Array) -> int:
    """How many texts go into one chunk: fewer where they are long."""
    offsets = offsets_of([4 + len(text.encode()) for text in values])
    rows = TEXT_ROWS
    while True:
        starts = np.arange(0, len(values), rows)
        longest = int((offsets[np.minimum(starts + rows, len(values))] - offsets[starts]).max())
        if longest <= TEXT_BYTES:
            return rows
        if rows == 1:
            raise InvalidArgumentError(f"{key} holds a text of {longest} bytes, and {TEXT_BYTES} is the most: leave it out, or shorten it")
        rows //= 2


# -------------------------------------------------------------------------------------------------------------- on disk


def encode_column(column: Column) -> tuple[Array, dict[str, Any]]:
    """A column as an array that the format holds, and the attributes of that array; none where the array alone says everything.

    Returns
    -------
    values : ndarray of bool, int64 or float64, or of texts as objects
    attributes : dict
        See ``docs/format.md``.
    """
    kind, missing = column.kind, column.missing
    described: dict[str, Any] = {"kind": kind.name}
    values = column.values
    if kind.name in _TIMES:
        values = values.astype("M8[D]") if kind.name == "date" else values
        values = np.datetime_as_string(values) if kind.name != "timedelta" else values.astype(np.int64).astype(str)
        values = values.astype(object)
    elif kind.name == "int" and is_wide(values):
        values = values.astype(str).astype(object)
    elif kind.name in ("int", "bool") and missing is not None:
        values = values.astype(np.float64)
    if values.dtype == object and missing is not None:
        described["missing_text"] = mark = _unused_text(values[~missing])
        values = values.copy()
        values[missing] = mark
    elif missing is not None:
        values = np.where(missing, np.nan, values)
    if missing is not None:
        described["missing"] = column.n_missing
    given = {"unit": kind.unit, "time_zone": kind.zone, "dtype": kind.dtype}
    described |= {key: value for key, value in given.items() if value is not None}
    if kind.categories is not None:
        described |= {"categories": list(kind.categories), "ordered": kind.ordered}
    # Texts always say so: what other parts lack of them is then shown as missing, and not as an empty text, as in earlier versions.
    told_by_dtype = (
        kind.is_plain
        and kind.name != "text"
        and (missing is None or kind.name == "float")
        and not (kind.name == "int" and values.dtype == object)
    )
    return values, {} if told_by_dtype else {COLUMN: described}


def _unused_text(values: Array) -> str:
    """A text for missing values that no other value is: the empty one if possible, as readers show what no part holds."""
    mark = ""
    there = set(values.tolist())
    while mark in there:
        mark = f"<{mark.strip('<>') or 'missing'}{'_' if mark else ''}>"
    return mark


def kind_of(info: ArrayInfo) -> ColumnKind:
    """The kind of a stored column; of one whose attribute a later version wrote, that of its dtype."""
    described = info.attributes.get(COLUMN, {})
    plain = ColumnKind(name="text" if info.dtype == "string" else _PLAIN[np.dtype(info.dtype).kind])
    if not _is_known(info):
        return plain
    categories = described.get("categories")
    return ColumnKind(
        name=described["kind"], unit=described.get("unit"), zone=described.get("time_zone"), dtype=described.get("dtype"),
        categories=None if categories is None else tuple(categories), ordered=bool(described.get("ordered")),
    )  # fmt: skip


def _is_known(info: ArrayInfo) -> bool:
    """Whether an array has an attribute that this version reads."""
    described = info.attributes.get(COLUMN)
    return isinstance(described, Mapping) and described.get("kind") in KINDS


def shown_dtype(info: ArrayInfo) -> np.dtype[Any]:
    """The dtype in which a dataset shows what one array holds."""
    kind, text = kind_of(info), info.dtype == "string"
    if kind.name in _TIMES:
        return np.dtype(f"{_TIMES[kind.name]}8[{kind.unit}]")
    if kind.name == "int" and text:
        return np.dtype(object if _missing(info) else np.int64)
    return np.dtype(object if text else info.dtype)


def _missing(info: ArrayInfo) -> int:
    return int(info.attributes[COLUMN].get("missing", 0)) if _is_known(info) else 0


def decode_column(values: Array, info: ArrayInfo, dtype: np.dtype[Any]) -> Array:
    """Stored values as a dataset of `dtype` shows them.

    Raises
    ------
    ValueError
        A text is not what the attribute says.
    """
    if not _is_known(info):
        return values
    kind, text = kind_of(info), info.dtype == "string"
    mark = info.attributes[COLUMN].get("missing_text")
    gone: Mask = values == mark if text and mark is not None else np.zeros(len(values), bool)
    if kind.name in _TIMES:
        texts = np.where(gone, "NaT", values).astype(str)
        if kind.name != "timedelta":
            return texts.astype(f"M8[{kind.unit}]")
        numbers = np.where(gone, np.iinfo(np.int64).min, np.where(texts == "NaT", "0", texts).astype(np.int64))
        return numbers.astype(f"m8[{kind.unit}]")
    if kind.name == "int" and text:
        numbers = np.where(gone, "0", values).astype(str).astype(np.int64)
        if dtype.kind != "O":
            return numbers
        held: Array = numbers.astype(object)
    elif text:
        held = values
    elif kind.name == "int" and dtype.kind == "O":
        gone = np.isnan(values) if values.dtype.kind == "f" else gone
        held = np.where(gone, 0, values).astype(np.int64).astype(object)
    else:
        return values
    if gone.any():
        held = held.copy()
        held[gone] = np.nan
    return held


# ------------------------------------------------------------------------------------------------------ several parts as one


def as_shown(infos: Sequence[ArrayInfo], *, absent: bool) -> np.dtype[Any]:
    """The dtype in which a dataset shows a column of several parts.

    Parameters
    ----------
    infos : sequence of ArrayInfo
        The column in each part that holds it.
    absent : bool
        Whether some prompts have no part that holds it.
    """
    told = [info for info in infos if kind_of(info).name != "missing"]
    if not told:
        return np.dtype(np.float64)
    absent = absent or len(told) < len(infos)
    dtypes = {shown_dtype(info) for info in told}
    kinds = {kind_of(info).name for info in told}
    if np.dtype(object) in dtypes or (len({dtype.kind in "mM" for dtype in dtypes}) > 1) or len({d.kind for d in dtypes} & {"m", "M"}) > 1:
        return np.dtype(object)
    common = np.result_type(*dtypes)
    if common.kind in "iubf" and "int" in kinds and any(info.dtype == "string" for info in told) and (absent or common.kind == "f"):
        return np.dtype(object)  # float64 would round them
    return np.dtype(np.float64) if common.kind in "iub" and absent else common


def absent_value(infos: Sequence[ArrayInfo], dtype: np.dtype[Any]) -> Any:
    """What a dataset shows where no part holds a column: NaN or NaT; an empty text where earlier versions wrote all parts of it."""
    if dtype.kind in "mM":
        return np.array("NaT", dtype)
    return ABSENT_TEXT if dtype.kind == "O" and not any(map(_is_known, infos)) else np.nan


def merged_kind(infos: Sequence[ArrayInfo]) -> ColumnKind | None:
    """The kind of a column of several parts; None where they differ."""
    return merge_kinds([kind_of(info) for info in infos])


def holds_texts_only(infos: Sequence[ArrayInfo]) -> bool:
    """Whether all parts of a column hold texts, and none that is missing."""
    return all(kind_of(info).name == "text" and not _missing(info) for info in infos)


def column_attrs(kind: ColumnKind | None, shown: np.dtype[Any]) -> dict[str, Any]:
    """What a dataset says of a column beside its values, in attributes that every file format takes.

    Parameters
    ----------
    kind : ColumnKind, optional
        None where parts of several kinds are one column.
    shown : numpy.dtype
        The dtype in which it is shown.
    """
    if kind is None or kind.name == "missing":
        return {}
    nullable = {"int": "Int64", "bool": "boolean"}
    if kind.dtype is None and kind.name in nullable and shown.kind in "fO" and kind.categories is None:
        return {"pandas_dtype": nullable[kind.name]}
    attrs: dict[str, Any] = {}
    if kind.categories is not None:
        attrs = {"categories": json.dumps(list(kind.categories)), "ordered": int(kind.ordered)}
    if kind.name == "date" or (kind.name in nullable and kind.categories is not None):
        attrs["kind"] = kind.name  # the dtype alone would say datetimes, or floats where some are missing
    if kind.zone:
        attrs["time_zone"] = kind.zone
    if kind.dtype:
        attrs["pandas_dtype"] = kind.dtype
    return attrs


def shown_column(values: Array, attrs: Mapping[str, Any]) -> Column:
    """The column that a dataset shows by these values and attributes, see `column_attrs`."""
    dtype = attrs.get("pandas_dtype")
    name = attrs.get("kind") or _kind_of_values(values, dtype if isinstance(dtype, str) else "")
    unit = np.datetime_data(values.dtype)[0] if values.dtype.kind in "mM" else None
    try:
        categories = None if "categories" not in attrs else tuple(json.loads(attrs["categories"]))
    except (TypeError, ValueError):
        categories = None
    kind = ColumnKind(
        name=name, unit=unit, zone=attrs.get("time_zone"), dtype=dtype, categories=categories, ordered=bool(attrs.get("ordered", 0))
    )
    column = column_of(values, kind) if _agrees(values, kind) else None
    # Attributes outlive the values that they describe: xarray keeps them in arithmetic, comparisons, where and astype.
    if column is None or not _holds(column, values):
        return parse_column("values", values)
    if categories is not None and not set(column[_present(column)].bare().tolist()) <= set(categories):
        return parse_column("values", values)
    return column


#: By kind, the dtypes of numpy that show it, and how the names of the dtypes of pandas that hold it begin.
_SHOWN_AS: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "bool": ("bfO", ("bool",)), "int": ("iufO", ("int", "uint")), "float": ("fO", ("float", "double")), "text": ("OUT", ()),
    "datetime": ("M", ()), "date": ("M", ()), "timedelta": ("m", ()),
}  # fmt: skip
_NUMBERS: Final = ("bool", "int", "uint", "float", "double")


def _agrees(values: Array, kind: ColumnKind) -> bool:
    """Whether values of this dtype can be a column of the kind that its attributes name."""
    shown, names = _SHOWN_AS.get(kind.name, ("", ()))
    lower = str(kind.dtype or "").lower()
    named = not lower or lower == "object" or (lower.startswith(names) if names else not lower.startswith(_NUMBERS))
    return values.dtype.kind in shown and named and (kind.zone is None or kind.name == "datetime")


def _holds(column: Column, values: Array) -> bool:
    """Whether a column has exactly these values, in a dtype that holds them."""
    there = _present(column)
    held, given = column.values[there], values[there]
    if not np.array_equal(there, ~_is_absent(values)) or not bool(np.all(held == given)):
        return False
    if column.kind.name == "date":
        return bool(np.all(given == given.astype("M8[D]")))
    lower = str(column.kind.dtype or "").lower()
    if not lower.startswith(("int", "uint", "float")):
        return True
    try:
        narrow = np.dtype(lower)
    except TypeError:
        return True
    with np.errstate(all="ignore"):
        return bool(np.all((held.astype(narrow) == held) | (held != held)))


def _is_absent(values: Array) -> Mask:
    if values.dtype.kind in "mM":
        return np.asarray(np.isnat(values), bool)
    if values.dtype == object:
        return np.fromiter((value is None or value != value for value in values), bool, len(values))
    return np.zeros(len(values), bool) if values.dtype.kind in "iubUT" else np.asarray(values != values, bool)


def _present(column: Column) -> Mask:
    return np.ones(len(column), bool) if column.missing is None else ~column.missing


def _kind_of_values(values: Array, dtype: str) -> KindName:
    """The kind of values by their own dtype, and by that in which they were given."""
    if values.dtype.kind in "mM":
        return "datetime" if values.dtype.kind == "M" else "timedelta"
    if values.dtype.kind in "biu":
        return "bool" if values.dtype.kind == "b" else "int"
    lower = dtype.lower()
    if lower.startswith("bool"):
        return "bool"
    if lower.startswith(("int", "uint")):
        return "int"
    return "float" if values.dtype.kind == "f" else "text"


def column_of(values: Array, kind: ColumnKind | None) -> Column | None:
    """A column from the values that a dataset shows; None where they are not of the kind."""
    if kind is None:
        return None
    if kind.name == "missing":
        return Column(np.full(len(values), np.nan), ANY_KIND, np.ones(len(values), bool))
    try:
        return _column_of(values, kind)
    except (ValueError, TypeError, OverflowError):
        return None


def _column_of(values: Array, kind: ColumnKind) -> Column:
    if kind.name in _TIMES:
        held: Array = values.astype(f"{_TIMES[kind.name]}8[{kind.unit or np.datetime_data(values.dtype)[0]}]")
        gone = np.isnat(held)
        return Column(held, replace(kind, unit=np.datetime_data(held.dtype)[0]), gone if gone.any() else None)
    gone = np.zeros(len(values), bool) if values.dtype.kind in "iub" else np.asarray(values != values, bool)
    if values.dtype == object:
        gone |= np.fromiter((value is None for value in values), bool, len(values))
    fill: Any = {"text": "", "float": np.nan}.get(kind.name, 0)
    held = np.where(gone, fill, values) if gone.any() else values
    held = held.astype({"bool": bool, "int": np.int64, "float": np.float64}.get(kind.name, object))
    if kind.name == "text" and not all(isinstance(value, str) for value in held):
        raise ValueError("not all are texts")
    return Column(held, kind, gone if gone.any() else None)
