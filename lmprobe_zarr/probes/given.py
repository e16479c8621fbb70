"""Parses and checks what callers give a `Probe`: prompts, labels, weights, or activations. Never extracts or fits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from lmprobe_zarr.batch import given_prompts, prompt_hash
from lmprobe_zarr.errors import InvalidArgumentError, LabelError, LmprobeZarrError
from lmprobe_zarr.probes.absent import describe_unfit, is_stored
from lmprobe_zarr.probes.folds import group_codes, number_units
from lmprobe_zarr.probes.identity import by_prompt, is_missing, list_prompts
from lmprobe_zarr.probes.labels import align_labels, check_width
from lmprobe_zarr.probes.layer import not_finite_rows
from lmprobe_zarr.tokens import find_inner_dim, without_absent_layers
from lmprobe_zarr.typing import Array, Estimator

__all__ = [
    "as_array",
    "check_agreement",
    "check_batch_size",
    "check_labels",
    "check_weights",
    "has_weights",
    "is_matrix",
    "is_sparse",
    "list_given",
    "parse_matrix",
    "rows_together",
    "split_labels",
    "true_labels",
]


def list_given(prompts: Any) -> list[Any]:
    """Prompts as a list; what is no list of prompts, such as a text, a table or a mapping, is an error."""
    return given_prompts(prompts)


def is_matrix(given: Any) -> bool:
    """Whether these are activations: an array of floats, or a table of numbers. An array of integers holds token ids."""
    if hasattr(given, "iloc") and getattr(given, "ndim", 0) == 2:
        return all(getattr(dtype, "kind", "O") in "fiub" for dtype in given.dtypes)  # a table of pandas
    dtype = getattr(given, "dtype", None)
    if dtype is None or getattr(given, "ndim", 0) not in (2, 3):
        return False
    return bool(getattr(dtype, "is_floating_point", False)) or getattr(dtype, "kind", "") == "f"


def as_array(values: Any) -> Array:
    """Values of any kind as an array; a torch tensor is copied to the CPU."""
    if isinstance(values, list | tuple) and values and all(isinstance(value, str) for value in values):
        return np.asarray(values, str)
    try:
        return np.asarray(values.detach().cpu().numpy() if hasattr(values, "detach") else values)
    except (TypeError, ValueError) as error:
        raise LabelError(f"values are given as {type(values).__name__} that is no list of single values: give one per prompt") from error


def parse_matrix(given: Any, n_layers: int) -> tuple[Array, tuple[int, ...], int]:
    """Activations as a matrix, their layers (ascending; empty if not known), and the number of layers side by side in a row.

    Raises
    ------
    InvalidArgumentError
        Other dimensions, no numbers, NaN or infinity, or a width that is no multiple of the layers.
    """
    layers: tuple[int, ...] = ()
    if is_sparse(given):
        return _parse_sparse(given, n_layers), layers, n_layers
    if isinstance(given, xr.DataArray):
        rows = next((dim for dim in ("prompt", "token") if dim in given.dims), None)
        inner = find_inner_dim(given.dims)
        if rows is None or inner is None or not {str(dim) for dim in given.dims} <= {rows, inner, "layer"}:
            raise InvalidArgumentError(
                f"activations have dims {given.dims}, expected prompt (or token), one inner dimension such as hidden, perhaps layer: "
                "rename or select"
            )
        given = without_absent_layers(given)
        if "layer" in given.coords:
            # Stored layers are always read in ascending order.
            given = given.sortby("layer") if "layer" in given.dims else given
            layers = tuple(int(layer) for layer in np.atleast_1d(given.coords["layer"].values))
        n_layers = given.sizes.get("layer", 1)
        values = given.transpose(rows, "layer", inner, missing_dims="ignore").values
    else:
        tensor = given.detach().cpu() if hasattr(given, "detach") else given
        values = np.asarray(tensor.float().numpy() if hasattr(tensor, "float") and str(tensor.dtype) == "torch.bfloat16" else tensor)
    if values.ndim < 2 or values.dtype.kind not in "fiu" or not len(values):
        raise InvalidArgumentError(f"activations have shape {values.shape} and dtype {values.dtype}, expected (row, hidden) numbers")
    features = values.reshape(len(values), -1)
    features = features.astype(np.float64 if features.dtype.itemsize > 4 else np.float32, copy=False)
    if features.shape[1] % n_layers:
        raise InvalidArgumentError(f"activations are {features.shape[1]} wide, which is no multiple of {n_layers} layers: check n_layers")
    bad = not_finite_rows(features)
    if bad:
        if isinstance(given, xr.DataArray):
            for place in range(given.sizes.get("layer", 1)):
                layer = place if "layer" in given.dims else None
                held = is_stored(given, layer)
                absent = [] if held is None else [row for row in bad if not held[row]]
                if absent:
                    noun = "prompt" if "prompt" in given.dims else "token"
                    raise InvalidArgumentError(describe_unfit(given, layer, absent, len(features), noun=noun))
        raise InvalidArgumentError(f"{len(bad)} of {len(features)} rows hold NaN or infinity, first row {bad[0]}: leave them out")
    return features, layers, n_layers


def is_sparse(rows: Any) -> bool:
    """Whether rows are a sparse array or matrix of scipy."""
    return hasattr(rows, "tocsr") and hasattr(rows, "nnz")


def _parse_sparse(given: Any, n_layers: int) -> Any:
    """A sparse matrix by rows, of float32 or float64; see `parse_matrix`."""
    from scipy.sparse import csr_array

    if given.ndim != 2 or given.dtype.kind not in "fiu" or not given.shape[0]:
        raise InvalidArgumentError(f"activations have shape {given.shape} and dtype {given.dtype}, expected (row, hidden) numbers")
    if n_layers != 1:
        raise InvalidArgumentError(f"n_layers={n_layers} of a sparse array: it is of one layer, leave it out")
    found = csr_array(given, dtype=np.float64 if given.dtype.itemsize > 4 else np.float32)
    if not np.isfinite(found.data).all():
        raise InvalidArgumentError("a sparse array holds NaN or infinity: leave those rows out")
    if found.indices.dtype != np.int32 and max(found.nnz, *found.shape) < 2**31:  # scikit-learn takes no others
        found = csr_array((found.data, found.indices.astype(np.int32), found.indptr.astype(np.int32)), shape=found.shape)
    return found


def split_labels(first: Any, second: Any, labels: Any) -> tuple[list[Any], Array]:
    """All prompts with their labels, from ``(positive, negative)`` or ``(prompts, labels)``. A second list of numbers is one of labels."""
    if (second is None) == (labels is None):
        raise InvalidArgumentError("fit takes (positive, negative) prompts, or (prompts, labels): give one of the two after the first")
    prompts = list_given(first)
    if labels is not None:
        return prompts, as_array(align_labels(prompts, labels))
    if isinstance(second, Mapping | xr.DataArray) or (isinstance(second, pd.Series) and second.dtype.kind in "biuf"):
        # Matched by prompt; prompts themselves are never given so.
        second = align_labels(prompts, second)
    others = as_array(second) if hasattr(second, "detach") else second
    listed = list_given(others)
    if listed and all(item is None or isinstance(item, (bool, int, float, np.number, np.bool_)) for item in listed):
        return prompts, np.asarray(listed)
    # As many texts as prompts, each of which occurs twice on average, are class names: prompts are hardly ever repeated like that.
    if len(listed) == len(prompts) > 2 and all(isinstance(item, str) for item in listed) and 2 * len(set(listed)) <= len(listed):
        return prompts, np.asarray(listed)
    return [*prompts, *listed], np.array([1] * len(prompts) + [0] * len(listed))


def true_labels(given: Any, labels: Any) -> Array:
    """What predictions are compared with: one label per prompt or row of activations, matched by prompt where it can be.

    Raises
    ------
    LabelError
        Labels are missing, or a prompt has two.
    """
    found = as_array(align_labels(given, labels))
    if found.ndim != 1:
        raise LabelError(f"there are labels of shape {found.shape}: give one for each prompt, in their order")
    lacking = [row for row, value in enumerate(found.tolist()) if is_missing(value)]
    if lacking:
        raise LabelError(f"{len(lacking)} of {len(found)} labels are missing, first row {lacking[0]}: leave these prompts out")
    check_width("labels", [value for value in found.tolist() if isinstance(value, int)])
    if isinstance(given, list | tuple) and not is_matrix(given):
        check_agreement(list(given), found)
    return found


def check_agreement(prompts: list[Any], labels: Array, noun: str = "label") -> None:
    """Raise where one prompt is given with two labels; lengths are compared elsewhere."""
    if len(prompts) == len(labels):
        by_prompt(zip(map(_name_of, prompts), labels.tolist(), strict=True), noun)


def rows_together(given: Any, groups: Any, n: int) -> Array:
    """For each row a number that rows share which stay together where an estimator cross-validates: of its group, else of its prompt.

    Parameters
    ----------
    given : list of prompts, or activations
    groups : sequence, coordinate's name, mapping, Series or DataArray, optional
    n : int
        The number of rows.

    Returns
    -------
    ndarray of int, shape (row,)

    Raises
    ------
    LabelError
        Another number of groups than of rows, one is missing, or a prompt is in two.
    """
    if groups is not None:
        listed = as_array(align_labels(given, groups, "group"))
        if listed.shape != (n,):
            raise LabelError(f"groups hold {listed.size} values for {n} prompts: give one per prompt")
        lacking = [row for row, value in enumerate(listed.tolist()) if is_missing(value)]
        if lacking:
            raise LabelError(f"{len(lacking)} of {n} groups are missing, first row {lacking[0]}: give each prompt a group")
        if isinstance(given, list):
            check_agreement(given, listed, "group")
        return number_units(listed.tolist())
    if isinstance(given, list):
        return group_codes([_name_of(prompt) for prompt in given], None)
    if isinstance(given, xr.DataArray) and "prompt" in given.dims:
        return group_codes(list_prompts(given), None)
    if isinstance(given, xr.DataArray) and "prompt" in given.coords and given.coords["prompt"].ndim == 1:
        return group_codes([str(prompt) for prompt in given.coords["prompt"].values.tolist()], None)
    return np.arange(n)


def _name_of(prompt: Any) -> str:
    """A name that equal prompts share, for messages too; of a chat, which only a tokenizer renders, by its messages."""
    try:
        return prompt_hash(prompt)
    except LmprobeZarrError:
        return prompt_hash(json.dumps(prompt, sort_keys=True, default=repr))


def check_weights(weights: Any, n: int) -> Array | None:
    """One weight per prompt, or None."""
    if weights is None:
        return None
    try:
        values = np.asarray(weights, float)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(f"sample_weight holds what is no number: give {n} numbers of at least 0, one per prompt") from error
    if values.shape != (n,) or not np.isfinite(values).all() or (values < 0).any() or not values.any():
        raise InvalidArgumentError(f"sample_weight has shape {values.shape}, expected {n} finite numbers of at least 0, one per prompt")
    return values


def has_weights(estimator: Estimator) -> bool:
    """Whether an estimator takes one weight per row."""
    from sklearn.utils.validation import has_fit_parameter

    return bool(has_fit_parameter(estimator, "sample_weight"))


def check_batch_size(size: object) -> None:
    """Raise unless `size` is a positive number of prompts."""
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise InvalidArgumentError(f"batch_size={size!r} is no number of prompts: give a whole number of at least 1, or None")


def check_labels(labels: Array, n: int, *, classes: bool) -> Array:
    """The labels of a classification, or the values of a regression, once checked.

    Raises
    ------
    LabelError
        The number of labels differs from `n`, labels are missing, or there are fewer than two classes.
    """
    if labels.ndim != 1 or len(labels) != n:
        raise LabelError(f"there are labels of shape {labels.shape} for {n} prompts: give one for each, in their order")
    if labels.dtype.kind == "f" and not np.isfinite(labels).all():
        raise LabelError(f"{int((~np.isfinite(labels)).sum())} of {n} labels are missing or infinite: leave those prompts out")
    if not n:
        raise LabelError("there are no prompts to learn from: give some of at least two classes")
    if labels.dtype.kind not in ("biufUT" if classes else "biuf"):
        kinds = sorted({type(label).__name__ for label in labels.tolist()})
        raise LabelError(f"labels hold {', '.join(kinds)}: give {'numbers, truth values or texts' if classes else 'numbers'}, none missing")
    if classes:
        found = np.unique(labels)
        if len(found) < 2:
            raise LabelError(f"all {n} labels are {found[0].item()!r}: a probe needs prompts of at least two classes")
        if labels.dtype.kind == "f" and (labels != np.round(labels)).any():
            raise LabelError("labels are not whole numbers: give classes, or task='regression' for values")
    return labels
