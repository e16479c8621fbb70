"""Tokens of labelled arrays back to prompts: at one position, pooled, or padded; and which prompts, and which texts, tokens belong to.

Never a store, never a fit.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Final, TypeVar, cast

import numpy as np
import numpy.typing as npt
import pandas as pd
import xarray as xr

from lmprobe_zarr.batch import POOLINGS, as_slice, fill_value, offsets_of, parse_poolings, pool_ragged
from lmprobe_zarr.display import name_in_messages
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, LayerOutOfRangeError
from lmprobe_zarr.tokens.index import INDEXED_COLUMNS, TokenIndex, by_appearance, has_value
from lmprobe_zarr.tokens.inner import is_ranked
from lmprobe_zarr.typing import Array, Ints

__all__ = ["pad_tokens", "pool_tokens", "prompts_of", "sequences_of", "token_texts", "tokens_at"]

T = TypeVar("T", xr.Dataset, xr.DataArray)

# Coordinates of single tokens, which mean nothing for a whole prompt.
_OF_TOKENS: Final = ("position", "token_id", "char_start", "char_end")


# -- one row per prompt ----------------------------------------------------------------------------------------------------


def tokens_at(data: T, position: int, *, of: str | None = None, turn: int | None = None) -> T:
    """The values at one position of every prompt, one row per prompt; lazy where the data are.

    Parameters
    ----------
    data : Dataset or DataArray
        With a `TokenIndex`.
    position : int
        Counted from the prompt's first token in the data, or, if negative, from its last.
    of : str, optional
        Count only tokens with this role, or, as ``"generated"``, those that were generated.
    turn : int, optional
        Count only tokens of this message.

    Raises
    ------
    LayerOutOfRangeError
        A prompt has fewer tokens.
    MissingPromptsError
        No token at all has the role or the turn.
    InvalidArgumentError
        Roles, turns, or what was generated are not stored.
    """
    if isinstance(position, bool) or not isinstance(position, int | np.integer):
        raise InvalidTypeError(
            f"position={position!r} is no whole number: give one, such as 0 or -1; for several tokens of each prompt, "
            "mask_tokens(data, position=[-3, -2, -1]) selects them along token, and xr.concat joins one array for each position"
        )
    ordered, index, counts = _by_prompt(data)
    chosen: Ints | None = None
    which = "tokens"
    if of is not None or turn is not None:
        mask = np.ones(int(counts.sum()), bool)
        if of is not None:
            name, wanted = ("generated", True) if of == "generated" else ("role", of)
            mask &= has_value(name, _column(ordered, index, name), wanted)
            which = f"tokens of {of!r}"
        if turn is not None:
            mask &= has_value("turn", _column(ordered, index, "turn"), turn)
            which += f" in turn {turn}"
        chosen = np.flatnonzero(mask)
        counts = np.bincount(by_appearance(index.codes)[chosen], minlength=len(counts)).astype(np.int64)
    short = counts < (position + 1 if position >= 0 else -position)
    if short.any():
        first = index.labels[index.codes[np.unique(by_appearance(index.codes), return_index=True)[1][int(short.argmax())]]]
        raise LayerOutOfRangeError(
            f"{int(short.sum())} of {len(counts)} prompts have fewer {which} than position {position} needs, the shortest "
            f"{int(counts.min())}, first prompt {first}: select those that have it with sel(prompt=[…])"
        )
    offsets = offsets_of(counts)
    rows = (offsets[:-1] if position >= 0 else offsets[1:]) + position
    return _one_per_prompt(ordered.isel({index.dim: as_slice(rows if chosen is None else chosen[rows])}), index.dim)


def _column(data: xr.Dataset | xr.DataArray, index: TokenIndex, name: str) -> Array:
    """The values of a column of tokens, which may have come from a file."""
    stored = index.columns.get(name)
    if stored is None and not (name in data.coords and data.coords[name].dims == (index.dim,)):
        what = {"role": "roles are", "turn": "turns are", "generated": "what was generated is"}[name]
        raise InvalidArgumentError(f"{what} not stored with these tokens: extract the chats again, or select tokens with mask_tokens")
    return np.asarray(data.coords[name].values if stored is None else stored.values)


def pool_tokens(data: T, pooling: str) -> T:
    """One vector per prompt, ``token`` replaced by ``prompt``, named ``<name>_<pooling>``; in memory.

    Parameters
    ----------
    data : Dataset or DataArray
        With a `TokenIndex`. Of a dataset, every variable along its dimension is pooled but latents, and the others are left out.
    pooling : str
        One of `lmprobe_zarr.batch.POOLINGS`.
    """
    if not isinstance(pooling, str):
        raise InvalidTypeError(f"pooling={pooling!r:.60} is no name: give one of {', '.join(POOLINGS)}")
    parse_poolings(pooling)
    if isinstance(data, xr.Dataset):
        _, index, _ = _by_prompt(data)
        pooled = [_pool_array(array, pooling) for array in data.data_vars.values() if index.dim in array.dims and not is_ranked(array)]
        return xr.Dataset({array.name: array for array in pooled}, attrs=data.attrs)
    return _pool_array(data, pooling)


def pad_tokens(data: T) -> T:
    """``token`` replaced by ``prompt`` and ``position``, in memory; NaN (−1 for integers) where a prompt has no token.

    Parameters
    ----------
    data : Dataset or DataArray
        With a `TokenIndex`. Of a dataset, every variable along its dimension is padded; ``mask`` is True where there is a token.
    """
    if isinstance(data, xr.Dataset):
        ordered, index, counts = _by_prompt(data)
        padded = {array.name: _pad_array(array) for array in ordered.data_vars.values() if index.dim in array.dims}
        positions, columns = np.unique(index.positions, return_inverse=True)
        mask = np.zeros((len(counts), len(positions)), bool)
        mask[np.repeat(np.arange(len(counts)), counts), columns] = True
        return xr.Dataset(padded, attrs=data.attrs).assign(mask=(("prompt", "position"), mask))
    return _pad_array(data)


def _by_prompt(data: T) -> tuple[T, TokenIndex, Ints]:
    """The data with the tokens of each prompt together and in order, their index, and the number of tokens of each prompt."""
    data = _indexed(data)
    index = data.xindexes.get("prompt")
    if not isinstance(index, TokenIndex) or index.dim not in data.dims:
        raise InvalidArgumentError(
            f"this has no index over prompt and position (dims {tuple(data.sizes)}): open it with store.tokens(), "
            'or set_xindex(["prompt", "position"], lmprobe_zarr.TokenIndex)'
        )
    codes = index.codes
    appearance = by_appearance(codes)
    order = np.lexsort((index.positions, appearance))
    if (np.diff(order) != 1).any():
        data = data.isel({index.dim: order})
        taken = index.isel({index.dim: order})
        assert taken is not None  # noqa: S101 — an order along one dimension keeps the index
        index, appearance = taken, appearance[order]
    if (np.diff(index.positions)[np.diff(appearance) == 0] == 0).any():
        raise InvalidArgumentError("a prompt occurs several times along token: select each prompt once")
    return data, index, np.bincount(appearance).astype(np.int64)


def _indexed(data: T) -> T:
    """The data with their index over prompt and position, which files do not keep: there both are plain coordinates of the tokens."""
    held = [data.coords[name].variable for name in ("prompt", "position") if name in data.coords and name not in data.xindexes]
    if len(held) < 2 or held[0].ndim != 1 or held[0].dims != held[1].dims:
        return data
    return data.set_xindex(["prompt", "position"], TokenIndex)


def _one_per_prompt(data: T, dim: Hashable) -> T:
    """One token per prompt, now along ``prompt`` with its ordinary index."""
    index = data.xindexes.get("prompt")
    plain = data.drop_indexes(list(index.coord_names)) if isinstance(index, TokenIndex) else data
    swapped: T = plain.swap_dims({dim: "prompt"})
    return swapped


def _of_tokens(data: xr.DataArray, index: TokenIndex) -> list[Hashable]:
    """Coordinates of single tokens. A column of prompts may have the name of one: then all tokens of a prompt have the same value."""
    found: list[Hashable] = [*_OF_TOKENS, *index.columns]
    for name in INDEXED_COLUMNS:
        if name not in index.columns and name in data.coords and data.coords[name].dims == (index.dim,):
            values = np.asarray(data.coords[name].values)
            if (values[1:] != values[:-1])[index.codes[1:] == index.codes[:-1]].any():
                found.append(name)
    return found


def _pool_array(array: xr.DataArray, pooling: str) -> xr.DataArray:
    if is_ranked(array):
        raise InvalidArgumentError(
            f"{name_in_messages(array)} has other latents in every row, which no pooling can put together: use lz.pool_latents"
        )
    data, index, counts = _by_prompt(array)
    first = _one_per_prompt(data.isel({index.dim: offsets_of(counts)[:-1]}), index.dim).drop_vars(_of_tokens(data, index), errors="ignore")
    rest = [dim for dim in data.dims if dim not in ("layer", index.dim)]
    ordered: xr.DataArray = data.transpose("layer", index.dim, *rest, missing_dims="ignore")
    # One layer at a time, so that the tokens of one layer are in memory, whatever the number of layers.
    if ordered.sizes.get("layer"):
        values = np.stack([_pool_values(layer.values, counts, pooling) for layer in ordered])
    elif "layer" in ordered.dims:
        values = np.empty((0, len(counts), *ordered.shape[2:]), ordered.dtype)
    else:
        values = _pool_values(ordered.values, counts, pooling)
    dims = _with_prompt(ordered.dims, index.dim)
    name = f"{array.name}_{pooling}" if array.name else None
    return xr.DataArray(values, first.coords, dims, name, array.attrs).transpose(*_with_prompt(array.dims, index.dim))


def _pool_values(values: Array, counts: Ints, pooling: str) -> Array:
    """Pooled rows of values of shape (token, …)."""
    if pooling == "mean" and values.dtype.kind in "biu":
        values = values.astype(np.float64)
    flat = values.reshape(len(values), int(np.prod(values.shape[1:])))
    return pool_ragged(flat, counts, pooling).reshape(len(counts), *values.shape[1:])


def _with_prompt(dims: tuple[Any, ...], dim: Hashable) -> list[Any]:
    """The dimensions, with ``prompt`` in place of that of the tokens."""
    return ["prompt" if d == dim else d for d in dims]


def _pad_array(array: xr.DataArray) -> xr.DataArray:
    data, index, counts = _by_prompt(array)
    axis: int = data.dims.index(index.dim)
    values: Array = data.values
    positions, columns = np.unique(index.positions, return_inverse=True)
    dtype = np.dtype(np.int8) if values.dtype == bool else values.dtype
    filler = "" if dtype.kind == "U" else fill_value(dtype)
    if dtype.kind == "u":
        dtype = np.result_type(dtype, np.int8)
    out = np.full((*values.shape[:axis], len(counts), len(positions), *values.shape[axis + 1 :]), filler, dtype)
    lead: tuple[Any, ...] = (slice(None),) * axis
    out[(*lead, np.repeat(np.arange(len(counts)), counts), columns)] = values
    first = _one_per_prompt(data.isel({index.dim: offsets_of(counts)[:-1]}), index.dim)
    dropped = _of_tokens(data, index)
    kept = {name: coord for name, coord in first.coords.items() if name not in dropped}
    dims = [d for dim in data.dims for d in (("prompt", "position") if dim == index.dim else (dim,))]
    return xr.DataArray(out, coords={**kept, "position": positions}, dims=dims, name=array.name, attrs=array.attrs)


# -- prompts and texts -----------------------------------------------------------------------------------------------------


def prompts_of(array: xr.DataArray, dim: str) -> tuple[Array, Array]:
    """The number of each row's prompt, by first appearance, and the prompts.

    Raises
    ------
    InvalidArgumentError
        There is no ``prompt`` coordinate along the dimension.
    """
    index = array.xindexes.get("prompt")
    if isinstance(index, TokenIndex) and index.dim == dim:
        numbers = by_appearance(index.codes)
        first = np.unique(numbers, return_index=True)[1]
        return numbers, index.labels[index.codes[first]]
    if "prompt" not in array.coords or array.coords["prompt"].dims != (dim,):
        raise InvalidArgumentError(
            f"{name_in_messages(array)} has no prompt coordinate along {dim!r}, which says which tokens belong together: "
            "open it with store.tokens()"
        )
    numbers, names = pd.factorize(np.asarray(array.coords["prompt"].values, object))
    return numbers, np.asarray(list(map(str, names)), str)


def sequences_of(array: xr.DataArray, dim: str) -> tuple[Ints, Ints]:
    """How many rows each prompt has, by first appearance, and the places of the rows, prompt by prompt, in the order of their positions.

    Raises
    ------
    InvalidArgumentError
        There is no ``prompt`` coordinate along the dimension.
    """
    numbers, prompts = prompts_of(array, dim)
    there = dim == "token" and "position" in array.coords and array.coords["position"].dims == (dim,)
    position = np.asarray(array.coords["position"].values) if there else np.zeros(len(numbers), np.int64)
    return np.bincount(numbers, minlength=len(prompts)).astype(np.int64), np.lexsort((position, numbers))


def token_texts(tokens: xr.DataArray | xr.Dataset) -> npt.NDArray[np.str_] | None:
    """The text of each token in its prompt, shape (token,); "" for tokens that the tokenizer added. None where it is not known.

    Parameters
    ----------
    tokens : DataArray or Dataset
        With the coordinates ``text``, ``char_start`` and ``char_end`` along ``token``, as ``store.tokens()`` has them.
    """
    if not all(name in tokens.coords and tokens.coords[name].dims == ("token",) for name in ("text", "char_start", "char_end")):
        return None
    numbers, _ = prompts_of(cast("xr.DataArray", tokens), "token")
    first = np.unique(numbers, return_index=True)[1]
    texts = tokens.coords["text"].variable.isel(token=first).values.tolist()
    starts, ends = tokens.coords["char_start"].values.tolist(), tokens.coords["char_end"].values.tolist()
    if not any(texts):
        return None
    return np.array([texts[n][a:b] if a >= 0 else "" for n, a, b in zip(numbers.tolist(), starts, ends, strict=True)])
