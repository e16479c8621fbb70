"""One value per prompt: labels to learn and groups to keep together, matched to the rows of some activations.

Holds how they are read, aligned and checked. Never an activation's value, a fold, a fit or a store.
"""

from __future__ import annotations

import reprlib
from collections.abc import Hashable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pandas as pd
import xarray as xr

from lmprobe_zarr.batch import prompt_hash
from lmprobe_zarr.display import nearest
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, LabelError
from lmprobe_zarr.probes.identity import by_prompt, is_missing, list_prompts, show_prompts
from lmprobe_zarr.tokens import check_listed
from lmprobe_zarr.typing import Array, is_listed

__all__ = [
    "Groups",
    "LabelColumn",
    "Labels",
    "Sides",
    "align_column",
    "align_labels",
    "bare_variable",
    "check_missing",
    "check_width",
    "labels_of_one_kind",
    "parse_groups",
    "parse_label_sets",
    "parse_labels",
    "parse_sides",
]


@dataclass(frozen=True, slots=True)
class Groups:
    """Which rows belong together.

    Parameters
    ----------
    name : str
        What the groups are called.
    codes : ndarray of int, shape (prompt,)
        The number of each row's group.
    values : tuple, shape (group,)
        What stands for each number: sorted, or by first appearance where values cannot be sorted.
    """

    name: str
    codes: Array
    values: tuple[Hashable, ...]


@dataclass(frozen=True, slots=True)
class Labels:
    """The label of each row: a class, or a number.

    Parameters
    ----------
    name : str
        What the labels are called.
    values : ndarray, shape (prompt,)
        Truth values, whole numbers or texts; for a regression float64. Rows that are not in `rows` hold an arbitrary one.
    classes : ndarray, shape (class,), or None
        All different labels, sorted; None for a regression.
    rows : ndarray of int
        The rows that have a label, ascending.
    """

    name: str
    values: Array
    classes: Array | None
    rows: Array

    @property
    def codes(self) -> Array:
        """The number of each row's class; for a regression its value."""
        return self.values if self.classes is None else np.searchsorted(self.classes, self.values)


@dataclass(frozen=True, slots=True)
class Sides:
    """A split given by the caller: the rows to learn from and the rows to test on."""

    name: str
    train: Array
    test: Array


@dataclass(frozen=True, slots=True)
class LabelColumn:
    """Values as they were given, in the order of the activations' rows; None for rows without one."""

    name: str
    values: list[Any]


def bare_variable(variable: xr.Variable) -> xr.Variable:
    """The variable without attributes and encoding, which workers do not need; a lazy one stays lazy."""
    bare = variable.copy(deep=False)
    bare.attrs, bare.encoding = {}, {}
    return bare


def parse_label_sets(array: xr.DataArray, labels: Any, *, task: str = "classification", missing: str = "raise") -> tuple[Labels, ...]:
    """The labels of each row: one set, or several of the same rows.

    Parameters
    ----------
    array : DataArray over prompt
        Whose rows the labels are for; only its coordinates are read.
    labels : str, DataArray, mapping or array
        A coordinate's name; a DataArray over ``prompt``; a mapping (or a pandas Series with an index of texts) from text or
        prompt hash; or values in the order of the rows. Several sets: a list of coordinates' names, or a DataArray over ``prompt``
        and one other dimension, whose coordinate names them.
    task : {"classification", "regression"}
        Classes, or numbers.
    missing : {"raise", "drop"}
        What happens to prompts that lack a label, or one of several.

    Raises
    ------
    InvalidTypeError
        `labels` has none of these forms.
    LabelError
        Labels are missing, of another length, contradictory, of several kinds, or all the same; classes are continuous; values of a
        regression are no numbers.
    """
    check_missing(missing)
    return _label_columns(array, [align_column(array, each, "label") for each in _sets(array, labels)], task, missing)


def parse_labels(array: xr.DataArray, labels: Any, *, missing: str = "raise") -> Labels:
    """One set of classes; otherwise as :func:`parse_label_sets`."""
    check_missing(missing)
    return _label_columns(array, [align_column(array, labels, "label")], "classification", missing)[0]


def _label_columns(array: xr.DataArray, columns: list[LabelColumn], task: str, missing: str) -> tuple[Labels, ...]:
    without = [_missing_rows(column) for column in columns]
    if missing == "raise":
        for column, lacking in zip(columns, without, strict=True):
            _check_whole(array, column, "label", lacking, "leave them out with missing='drop'")
    prompts = list_prompts(array)
    for column in columns:
        by_prompt(zip(prompts, column.values, strict=True), "label")
    dropped = set().union(*without)
    rows = np.array([row for row in range(array.sizes["prompt"]) if row not in dropped], dtype=np.intp)
    if not len(rows):
        raise LabelError(f"labels {columns[0].name!r} are missing for all {array.sizes['prompt']} prompts: nothing is left to learn from")
    return tuple(_labels(column, rows, task) for column in columns)


def check_missing(missing: Any) -> None:
    """Raise unless `missing` says what to do about rows without a label."""
    if not isinstance(missing, str) or missing not in ("raise", "drop"):
        raise InvalidArgumentError(f"missing={missing!r} is unknown: use 'raise', or 'drop' to leave out what has no label")


def _sets(array: xr.DataArray, labels: Any) -> list[Any]:
    if isinstance(labels, list | tuple) and labels and all(isinstance(name, str) and name in array.coords for name in labels):
        if len(set(labels)) < len(labels):
            raise LabelError(f"labels={labels!r} name one coordinate twice: name each once")
        return list(labels)
    if isinstance(labels, xr.DataArray) and labels.ndim == 2 and "prompt" in labels.dims:
        (dim,) = (dim for dim in labels.dims if dim != "prompt")
        if not labels.sizes[dim]:
            raise LabelError(f"labels have no {dim}: give at least one set")
        names = labels.coords[dim].values.tolist() if dim in labels.coords else list(range(labels.sizes[dim]))
        return [labels.isel({dim: place}, drop=True).rename(str(name)) for place, name in enumerate(names)]
    return [labels]


def _labels(column: LabelColumn, rows: Array, task: str) -> Labels:
    kept = LabelColumn(column.name, [column.values[row] for row in rows])
    found = _classes(kept) if task == "classification" else _numbers(kept)
    values = np.full(len(column.values), found[0], dtype=found.dtype)
    values[rows] = found
    return Labels(column.name, values, np.unique(found) if task == "classification" else None, rows)


def parse_sides(array: xr.DataArray, split: Any) -> Sides:
    """The rows to learn from and those to test on, from values "train" and "test", read as :func:`parse_label_sets` reads labels.

    Rows of any other value, such as "validation", and rows without one are on neither side.

    Raises
    ------
    InvalidTypeError
        As for labels.
    LabelError
        As for labels, or one side has no rows.
    """
    column = align_column(array, split, "side")
    sides = [np.array([row for row, value in enumerate(column.values) if value == side], dtype=np.intp) for side in ("train", "test")]
    if not all(map(len, sides)):
        others = sorted({str(value) for value in column.values if not is_missing(value)})
        raise LabelError(
            f"split {column.name!r} needs prompts of 'train' and of 'test', but holds {reprlib.repr(others)}: rename its values"
        )
    return Sides(column.name, sides[0], sides[1])


def parse_groups(array: xr.DataArray, groups: Any, rows: Array | None = None) -> Groups:
    """The group of each row, read as :func:`parse_label_sets` reads labels, but of any hashable values.

    With `rows`, only these rows need a group; the groups of other rows are not among the values.

    Raises
    ------
    InvalidTypeError
        As for labels.
    LabelError
        Groups are missing, of another length or not hashable, or one prompt is in two of them.
    """
    column = align_column(array, groups, "group")
    for row, value in enumerate(column.values):
        try:
            hash(value)
        except TypeError as error:
            raise LabelError(
                f"groups {column.name!r} hold {type(value).__name__} ({show_prompts(array, [row])}), which has no hash: "
                "give numbers, texts or tuples"
            ) from error
    kept = range(len(column.values)) if rows is None else rows.tolist()
    _check_whole(array, column, "group", sorted(set(_missing_rows(column)) & set(kept)))
    prompts = list_prompts(array)
    by_prompt(((prompts[row], column.values[row]) for row in kept), "group")
    values = list(dict.fromkeys(column.values[row] for row in kept))
    with suppress(TypeError):
        # As scikit-learn numbers them, so that its splitters give the same folds for these codes.
        values = sorted(values)
    numbers = {value: number for number, value in enumerate(values)}
    return Groups(column.name, np.array([numbers.get(value, -1) for value in column.values]), tuple(values))


def align_column(array: xr.DataArray, given: Any, noun: str) -> LabelColumn:
    """One value per row of the activations, from any of the forms that callers give.

    Parameters
    ----------
    array : DataArray over prompt
        Whose rows the values are for; only its coordinates are read.
    given : str, DataArray, mapping, Series or array
        See :func:`parse_label_sets`.
    noun : str
        What a value is called in messages, such as "label".

    Raises
    ------
    InvalidTypeError
        Something else.
    LabelError
        Values of another length or shape, two values for one prompt, or nothing to match them by.
    InvalidArgumentError
        A bare list, where the rows are in no known order (`lmprobe_zarr.tokens.check_listed`).
    """
    n = array.sizes["prompt"]
    if isinstance(given, str):
        return LabelColumn(given, _plain(_coordinate(array, given, noun).values))
    name = str(given.name) if isinstance(given, xr.DataArray | pd.Series) and given.name is not None else f"{noun}s"
    if isinstance(given, xr.DataArray):
        return LabelColumn(name, _from_dataarray(array, given, noun))
    if isinstance(given, Mapping):
        return LabelColumn(name, _from_pairs(array, given.items(), noun))
    if isinstance(given, pd.Series) and not isinstance(given.index, pd.RangeIndex):
        # A column that was filtered or sorted carries its own index: by position it would be another prompt's value.
        if not all(isinstance(key, str) for key in given.index):
            raise LabelError(
                f"{noun}s are a pandas Series without prompts as its index: give {noun}s.to_numpy() if its order is that of the prompts"
            )
        return LabelColumn(name, _from_pairs(array, given.items(), noun))
    if isinstance(given, xr.Dataset | bytes) or not is_listed(given):
        raise InvalidTypeError(
            f"{noun}s are a coordinate's name, a DataArray over prompt, a mapping or one value per prompt, not {type(given).__name__}"
        )
    if hasattr(given, "__array__"):
        shape = np.asarray(given).shape
        if len(shape) != 1:
            raise LabelError(f"{noun}s have shape {shape}, expected one {noun} per prompt: ({n},)")
    values = _plain(np.asarray(given) if hasattr(given, "__array__") else given)
    if len(values) != n:
        raise LabelError(f"there are {len(values)} {noun}s for {n} prompts: give one per prompt, in the order of activations.prompt")
    check_listed(array, given, f"{noun}s")
    return LabelColumn(name, values)


def align_labels(array: Any, given: Any, noun: str = "label") -> Any:
    """Values for the rows of some activations, or for prompts: matched by prompt where they can be, otherwise as they are.

    Parameters
    ----------
    array : DataArray, other array, or list of prompts
        What the values are for.
    given : object
        A coordinate's name; values by position; or a mapping, Series or DataArray by prompt.
    noun : str
        What a value is called in messages.

    Returns
    -------
    object
        `given` itself, or an array in the order of the rows.

    Raises
    ------
    InvalidArgumentError
        Values by position, where the rows are in no known order.
    LabelError
        A prompt without a value, or with two; no such coordinate.
    """
    if given is None:
        return given
    keyed = isinstance(given, Mapping) or (isinstance(given, pd.Series) and all(isinstance(key, str) for key in given.index))
    keyed |= isinstance(given, xr.DataArray) and given.dims == ("prompt",) and "prompt" in given.coords
    if not isinstance(array, xr.DataArray):
        if not keyed or not isinstance(array, list | tuple) or not len(given):
            return given
        return _matched(_named_rows([prompt_hash(prompt) for prompt in array]), given, noun)
    rows = "prompt" if "prompt" in array.dims else "token"
    if isinstance(given, str) and rows == "prompt":
        return _matched(array, given, noun)
    if isinstance(given, str):
        if given not in array.coords or array.coords[given].dims != (rows,):
            near = nearest(given, [name for name, column in array.coords.items() if column.dims == (rows,)])
            raise LabelError(f"there is no coordinate {given!r} along {rows!r}{near}: name one, or give the {noun}s themselves")
        return array.coords[given].values
    by_name = array.dims.count("prompt") == 1 and ("prompt" in array.coords or "text" in array.coords)
    if isinstance(given, xr.DataArray) and keyed and by_name and list_prompts(given) == list_prompts(array):
        keyed, given = False, given.values
    elif not keyed or not by_name or not len(given):
        check_listed(array, given, f"{noun}s")
    else:
        return _matched(array, given, noun)
    values = _plain(given) if is_listed(given) else []
    if by_name and noun != "weight" and len(values) == array.sizes["prompt"]:
        by_prompt(zip(list_prompts(array), values, strict=True), noun)
    return given


def _matched(array: xr.DataArray, given: Any, noun: str) -> Array:
    column = align_column(array, given, noun)
    _check_whole(array, column, noun, _missing_rows(column))
    if noun != "weight":
        by_prompt(zip(list_prompts(array), column.values, strict=True), noun)
    return np.asarray(column.values)


def _named_rows(prompts: list[str]) -> xr.DataArray:
    """Rows of these prompts and no activations, to match values by."""
    return xr.DataArray(np.zeros(len(prompts), np.int8), dims="prompt", coords={"prompt": np.array(prompts, object)})


def labels_of_one_kind(name: str, labels: Iterable[Any]) -> Array:
    """Labels of one kind, none of which is missing, as an array: the check that all calls share, for values without prompts."""
    column = LabelColumn(name, _plain(labels))
    lacking = _missing_rows(column)
    if lacking:
        raise LabelError(f"labels of {name!r} miss {len(lacking)} of {len(column.values)} rows, first row {lacking[0]}: {_LEAVE_OUT}")
    return _classes(column, least=1)


def _plain(values: Iterable[Any]) -> list[Any]:
    """Values as Python's own types. Times stay numpy's, because they would become bare nanoseconds."""
    return [value.item() if isinstance(value, np.generic) and value.dtype.kind not in "mM" else value for value in values]


def _coordinate(array: xr.DataArray, name: str, noun: str) -> xr.DataArray:
    columns = sorted(
        str(key) for key, value in array.coords.items() if value.dims == ("prompt",) and key not in ("prompt", "prompt_sha256", "text")
    )
    listed = f"those per prompt are {', '.join(columns) or 'none'}"
    if name not in array.coords:
        raise LabelError(f"there is no coordinate {name!r}{nearest(name, columns)}: {listed}; or give the {noun}s themselves")
    column = cast("xr.DataArray", array.coords[name])
    if column.dims != ("prompt",):
        raise LabelError(f"coordinate {name!r} has dims {column.dims}, expected ('prompt',): {listed}")
    return column


def _from_dataarray(array: xr.DataArray, given: xr.DataArray, noun: str) -> list[Any]:
    if given.dims != ("prompt",):
        tokens = ", or fit single tokens with sweep_tokens or fit_tokens" if "token" in given.dims else ""
        raise LabelError(f"{noun}s have dims {given.dims}, expected ('prompt',): give one {noun} per prompt{tokens}")
    for what, of in ((given, f"the {noun}s"), (array, "the activations")):
        if "prompt" not in what.coords:
            raise LabelError(f"{of} have no prompt coordinate to match by: give {noun}s.values if their order is that of the prompts")
    found = by_prompt(zip(list_prompts(given), _plain(given.values), strict=True), noun)
    return [found.get(prompt) for prompt in list_prompts(array)]


def _from_pairs(array: xr.DataArray, pairs: Iterable[tuple[Any, Any]], noun: str) -> list[Any]:
    """One value per prompt from (text or hash, value); None where there is none."""
    prompts = list_prompts(array)
    if "prompt" not in array.coords and "text" not in array.coords:
        raise LabelError(
            f"the activations have neither a prompt nor a text coordinate to match a mapping by: give one {noun} per prompt, in order"
        )
    texts = array.coords["text"].values.tolist() if "text" in array.coords else []
    by_text = {text: prompt for prompt, text in zip(prompts, texts, strict=False) if text}
    known = set(prompts)

    def prompt_of(key: Any) -> str:
        # The text comes first: the hash of a prompt given as token ids is not that of its text.
        if isinstance(key, str) and key in by_text:
            return by_text[key]
        if isinstance(key, str) and key in known:
            return key
        return prompt_hash(key)

    listed = list(pairs)
    found = by_prompt(zip([prompt_of(key) for key, _ in listed], _plain(value for _, value in listed), strict=True), noun)
    return [found.get(prompt) for prompt in prompts]


def _missing_rows(column: LabelColumn) -> list[int]:
    return [row for row, value in enumerate(column.values) if is_missing(value)]


_LEAVE_OUT = "drop these prompts first, as with .isel(prompt=…)"


def _check_whole(array: xr.DataArray, column: LabelColumn, noun: str, rows: list[int], remedy: str = _LEAVE_OUT) -> None:
    """Raise where rows have no value; `remedy` is what the call at hand can do about it."""
    if rows:
        raise LabelError(
            f"{noun}s {column.name!r} miss {len(rows)} of {len(column.values)} prompts ({show_prompts(array, rows)}): "
            f"give each a {noun}, or {remedy}"
        )


def check_width(name: str, values: Iterable[Any]) -> None:
    """Raise for whole numbers that no array of whole numbers holds."""
    if any(isinstance(value, int | float) and np.inf > abs(value) >= 2**63 for value in values):
        raise LabelError(f"labels {name!r} hold numbers beyond 64 bits: give classes as texts, and the values of a regression as floats")


def _classes(column: LabelColumn, least: int = 2) -> Array:
    """The labels as a plain array of truth values, whole numbers or texts."""
    name, values = column.name, column.values
    if not all(pd.api.types.is_scalar(value) for value in values):
        raise LabelError(f"labels {name!r} hold sequences: give one truth value, whole number or text per prompt")
    kinds = {type(value) for value in values}
    check_width(name, values)
    if kinds <= {int, float} and any(value != int(value) for value in values if np.isfinite(value)):
        raise LabelError(
            f"labels {name!r} are continuous numbers: give whole numbers or texts (np.digitize makes bins), or task='regression'"
        )
    if not (kinds <= {int, float} or kinds in ({bool}, {str})) or not all(np.isfinite(v) for v in values if isinstance(v, float)):
        listed = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise LabelError(f"labels {name!r} hold {listed}: give truth values, whole numbers or texts, one kind only")
    y = np.array(values) if float not in kinds else np.array([int(value) for value in values])
    if len(set(values)) < least:
        raise LabelError(f"all {len(values)} labels {name!r} are {values[0]!r}: a probe needs prompts of at least two classes")
    return y


def _numbers(column: LabelColumn) -> Array:
    """The values of a regression as float64."""
    kinds = {type(value) for value in column.values}
    check_width(column.name, [value for value in column.values if type(value) is int])
    if not kinds <= {int, float} or not all(np.isfinite(value) for value in column.values):
        listed = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise LabelError(f"labels {column.name!r} hold {listed}: a regression needs finite numbers; or give task='classification'")
    if len(set(column.values)) < 2:
        raise LabelError(f"all {len(column.values)} labels {column.name!r} are {column.values[0]!r}: a regression needs values that differ")
    return np.array(column.values, dtype=np.float64)
