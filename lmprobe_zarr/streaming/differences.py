"""How far two groups of activations are apart, layer by layer: of another engine, dtype, revision, or after rounding. Writes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd
import xarray as xr

from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.interchange import to_interchange
from lmprobe_zarr.tokens import prompts_of
from lmprobe_zarr.typing import Array, Floats, Ints

__all__ = ["DIFFERENCES", "compare_groups"]

DIFFERENCES: Final = ("largest", "relative", "typical", "rows", "one_sided")
# Of one group at a time, as float64.
BLOCK_BYTES: Final = 32 << 20
SHOWN: Final = 3


def compare_groups(a: xr.Dataset, b: xr.Dataset) -> xr.Dataset:
    """How far the values of two groups are apart, for each variable and layer that both have, over the prompts that both have.

    Parameters
    ----------
    a, b : Dataset
        Both of ``store.dataset(…, group=…)``, or both of ``store.tokens(…, group=…)``; of one store or of two, whole or selected. Rows are
        matched by prompt, and tokens by their position too. They are read a block at a time.

    Returns
    -------
    Dataset
        Every shared variable with the dimension ``layer``, if it has layers, and ``difference``, in float64:

        ``largest``
            The largest absolute difference of two values, in the unit of the activations.
        ``relative``
            That, divided by the largest absolute value of `a`.
        ``typical``
            The median over all rows of the length of the difference, divided by the length of the row of `a`.
        ``rows``
            How many rows were compared: those that are finite in both.
        ``one_sided``
            How many rows are finite in one of the two only, and so were not compared.

        The first three are NaN where nothing could be compared. The attributes ``a`` and ``b`` name the groups.

    Raises
    ------
    InvalidTypeError
        Not two datasets.
    InvalidArgumentError
        One is per prompt and one per token; they share no prompt, variable or layer; a row occurs twice; a variable has another width in
        the other; shared prompts have other tokens there.

    Examples
    --------
    >>> plain = store.dataset("gpt2", group="gpt2-7c5b0f3a1d20")  # doctest: +SKIP
    >>> lz.compare_groups(plain, store.dataset("gpt2", provenance={"engine": "vllm"})).resid_mean  # doctest: +SKIP
    """
    for name, data in (("a", a), ("b", b)):
        if not isinstance(data, xr.Dataset):
            raise InvalidTypeError(f"{name} is a {type(data).__name__}: give a dataset, store.dataset(…, group=…) or store.tokens(…)")
    dim = _row_dim(a, b)
    pairs = _shared_rows(a, b, dim)
    names = _shared_variables(a, b, dim)
    layers = _shared_layers(a, b) if any("layer" in a[name].dims for name in names) else []
    found = {}
    for name in names:
        if "layer" in a[name].dims:
            one, other = (data[name].sel(layer=layers) for data in (a, b))
            values = np.stack([_measure(one.isel(layer=i), other.isel(layer=i), dim, pairs) for i in range(len(layers))], axis=1)
            found[name] = xr.Variable(("difference", "layer"), values)
        else:
            found[name] = xr.Variable(("difference",), _measure(a[name], b[name], dim, pairs))
    coords: dict[str, Any] = {"difference": list(DIFFERENCES)} | ({"layer": layers} if layers else {})
    groups = {name: str(data.attrs["group"]) for name, data in (("a", a), ("b", b)) if "group" in data.attrs}
    return to_interchange(xr.Dataset(found, coords=coords, attrs=groups))


# ------------------------------------------------------------------------------------------------------------ what is shared


def _row_dim(a: xr.Dataset, b: xr.Dataset) -> str:
    kinds = ["token" if "token" in data.dims else "prompt" if "prompt" in data.dims else "" for data in (a, b)]
    if not kinds[0] or kinds[0] != kinds[1]:
        told = ["has neither prompts nor tokens" if not kind else f"has a row for every {kind}" for kind in kinds]
        raise InvalidArgumentError(f"a {told[0]} and b {told[1]}: give both of store.dataset(), or both of store.tokens()")
    return kinds[0]


def _shared_rows(a: xr.Dataset, b: xr.Dataset, dim: str) -> tuple[Ints, Ints]:
    """The places in both of the rows that both have, in the order of `a`."""
    (number, names), (other_number, other_names) = (_prompts(data, dim) for data in (a, b))
    known = pd.Index(names).get_indexer(pd.Index(other_names))  # of each prompt of b its number in a, −1 where a lacks it
    places, other_places = (_positions(data, dim) for data in (a, b))
    stride = int(max(places.max(initial=0), other_places.max(initial=0))) + 1
    keys, other_keys = number * stride + places, known[other_number] * stride + other_places
    there = np.flatnonzero(known[other_number] >= 0)
    for name, rows in (("a", keys), ("b", other_keys[there])):
        if len(np.unique(rows)) < len(rows):
            raise InvalidArgumentError(f"{name} has some rows twice: select every prompt once")
    _, one, other = np.intersect1d(keys, other_keys[there], assume_unique=True, return_indices=True)
    if not len(one):
        raise InvalidArgumentError("a and b share no prompt" + (" with tokens at the same positions" if dim == "token" else ""))
    order = np.argsort(one)
    one, other = one[order], there[other[order]]
    _check_token_ids(a, b, dim, one, other)
    return one, other


def _prompts(data: xr.Dataset, dim: str) -> tuple[Ints, Array]:
    if dim == "token":
        numbers, names = prompts_of(data, dim)  # type: ignore[arg-type]
        return numbers.astype(np.int64), names
    if "prompt" not in data.coords:
        raise InvalidArgumentError("a dataset has no prompt coordinate, by which rows are matched: open it with store.dataset()")
    labels = np.asarray(data.coords["prompt"].values, object)
    return np.arange(len(labels), dtype=np.int64), labels


def _positions(data: xr.Dataset, dim: str) -> Ints:
    if dim == "prompt":
        return np.zeros(data.sizes["prompt"], np.int64)
    if "position" not in data.coords:
        raise InvalidArgumentError("a dataset has no position coordinate, by which tokens are matched: open it with store.tokens()")
    return np.asarray(data.coords["position"].values, np.int64)


def _check_token_ids(a: xr.Dataset, b: xr.Dataset, dim: str, one: Ints, other: Ints) -> None:
    if dim != "token" or "token_id" not in a.coords or "token_id" not in b.coords:
        return
    ids, other_ids = np.asarray(a.coords["token_id"].values)[one], np.asarray(b.coords["token_id"].values)[other]
    differ = np.flatnonzero((ids != other_ids) & (ids >= 0) & (other_ids >= 0))
    if len(differ):
        row = int(one[differ[0]])
        raise InvalidArgumentError(
            f"{len(differ)} tokens have another id in b than in a, first at position {int(a.coords['position'].values[row])} of prompt "
            f"{str(a.coords['prompt'].values[row])!r}: the prompts were tokenized in two ways, so their rows are not of the same tokens"
        )


def _shared_variables(a: xr.Dataset, b: xr.Dataset, dim: str) -> list[str]:
    names = [
        str(name) for name in a.data_vars if name in b.data_vars and dim in a[name].dims and a[name].dtype.kind == b[name].dtype.kind == "f"
    ]
    if not names:
        held = ["; ".join(sorted(map(str, data.data_vars))[:SHOWN]) for data in (a, b)]
        raise InvalidArgumentError(f"a and b share no variable of numbers: a has {held[0]}, b has {held[1]}")
    for name in names:
        shapes = [{str(d): size for d, size in data[name].sizes.items() if d not in ("layer", dim)} for data in (a, b)]
        if list(shapes[0].values()) != list(shapes[1].values()) or ("layer" in a[name].dims) != ("layer" in b[name].dims):
            raise InvalidArgumentError(f"{name!r} has another shape in b, {shapes[1]} beside {shapes[0]}: it is of another module")
    return names


def _shared_layers(a: xr.Dataset, b: xr.Dataset) -> list[int]:
    held, other = (data.coords["layer"].values.tolist() for data in (a, b))
    layers = [layer for layer in held if layer in other]
    if not layers:
        raise InvalidArgumentError(f"a and b share no layer: a has {held}, b has {other}")
    return layers


# --------------------------------------------------------------------------------------------------------------- differences


@dataclass(slots=True)
class _Apart:
    """What was seen so far of one variable in one layer."""

    largest: float = 0.0
    greatest: float = 0.0
    one_sided: int = 0

    def add(self, one: Floats, other: Floats) -> Floats:
        """Take rows of both, shape (row, value); returns the relative length of the difference of each that is compared."""
        finite, other_finite = (np.isfinite(rows).all(axis=1) for rows in (one, other))
        self.one_sided += int((finite != other_finite).sum())
        one, other = one[finite & other_finite], other[finite & other_finite]
        apart = one - other
        if apart.size:
            self.largest = max(self.largest, float(np.abs(apart).max()))
            self.greatest = max(self.greatest, float(np.abs(one).max()))
        far, length = np.linalg.norm(apart, axis=1), np.linalg.norm(one, axis=1)
        with np.errstate(divide="ignore"):
            ratios: Floats = np.where(far == 0, 0.0, far / np.where(length == 0, np.where(far == 0, 1.0, 0.0), length))
        return ratios


def _measure(a: xr.DataArray, b: xr.DataArray, dim: str, pairs: tuple[Ints, Ints]) -> Floats:
    """The five numbers of `DIFFERENCES` for one variable in one layer."""
    apart = _Apart()
    ratios = np.concatenate([apart.add(*block) for block in _blocks(a, b, dim, pairs)])
    if not len(ratios):
        return np.array([np.nan, np.nan, np.nan, 0.0, apart.one_sided])
    relative = 0.0 if apart.largest == 0 else apart.largest / apart.greatest if apart.greatest else np.inf
    return np.array([apart.largest, relative, float(np.median(ratios)), len(ratios), apart.one_sided])


def _blocks(a: xr.DataArray, b: xr.DataArray, dim: str, pairs: tuple[Ints, Ints]) -> Iterator[tuple[Floats, Floats]]:
    width = int(np.prod([size for name, size in a.sizes.items() if name != dim]))
    step = max(1, BLOCK_BYTES // (8 * max(1, width)))
    for start in range(0, len(pairs[0]), step):
        one, other = (
            data.variable.isel({dim: rows[start : start + step]}).transpose(dim, ...).values.astype(np.float64)
            for data, rows in zip((a, b), pairs, strict=True)
        )
        yield one.reshape(len(one), -1), other.reshape(len(other), -1)
