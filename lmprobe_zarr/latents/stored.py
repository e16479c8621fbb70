"""What of a DataArray or a dataset is stored: the variable, its rows, its group. Reads no activations."""

from __future__ import annotations

import json
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import xarray as xr
from xarray.core import indexing

from lmprobe_zarr.batch import variable_problem
from lmprobe_zarr.display import name_in_messages
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, ReadOnlyError
from lmprobe_zarr.latents.encoder import NO_LATENT
from lmprobe_zarr.store import Store
from lmprobe_zarr.store.format import SAE
from lmprobe_zarr.store.parts import LazyArray, VirtualArray
from lmprobe_zarr.tokens import prompts_of, unwrapped
from lmprobe_zarr.typing import Ints

__all__ = [
    "INDICES",
    "VALUES",
    "Latents",
    "StoredRows",
    "check_feature",
    "check_name",
    "latents_in",
    "lazy_array",
    "list_names_of",
    "stored_rows_of",
]

VALUES: Final = "_values"
INDICES: Final = "_indices"
_LISTS: Final = "_max"
_LONGEST: Final = 64 - len(_LISTS + INDICES)


def check_name(name: Any) -> str:
    """A name for latents, checked.

    Raises
    ------
    InvalidTypeError, InvalidArgumentError
    """
    if not isinstance(name, str):
        raise InvalidTypeError(f"name={name!r:.60} is no name: give a text, such as 'latents_8'")
    problem = variable_problem(name)
    if problem is None and len(name) > _LONGEST:
        problem = f"give at most {_LONGEST} letters"
    if problem is not None:
        raise InvalidArgumentError(f"name={name!r:.80} is no name for latents: {problem}")
    return name


def list_names_of(name: str) -> tuple[str, str]:
    """The names of the variables with the lists of latents by prompt."""
    return f"{name}{_LISTS}{VALUES}", f"{name}{_LISTS}{INDICES}"


# -- rows to encode --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StoredRows:
    """Whole prompts of a stored variable of tokens.

    Parameters
    ----------
    variable : str
        Its name.
    group : str
        Name of the group.
    layers : tuple of int, optional
        Those that were chosen; None where the variable has none.
    hashes : tuple of str
        The prompts, each once.
    counts : ndarray of int64, shape (prompt,)
        How many tokens of each were given.
    width : int
        Values of a row.
    array : VirtualArray
    """

    variable: str
    group: str
    layers: tuple[int, ...] | None
    hashes: tuple[str, ...]
    counts: Ints
    width: int
    array: VirtualArray

    def own_store(self) -> Store:
        """The store that the rows are in, to write to.

        Raises
        ------
        ReadOnlyError
            It was opened for reading.
        """
        places = {array.storage.url: array for array in self.array.arrays}
        if len(places) > 1:
            raise InvalidArgumentError(f"these rows are in {' and '.join(places)}: give the store to write to, store=…")
        (url, array), *_ = places.items()
        if not array.noted:
            raise ReadOnlyError(f"{url} was opened for reading, and latents are stored beside the rows: open it with mode='a'")
        return Store(array.storage)


def lazy_array(variable: xr.Variable) -> tuple[VirtualArray, tuple[Any, ...]] | None:
    """The stored variable behind a lazy one, and what is selected of it; None where it was loaded, computed with, or made a Dask array."""
    data = unwrapped(variable._data)
    if not isinstance(data, indexing.LazilyIndexedArray) or not isinstance(data.array, LazyArray):
        return None
    return data.array.array, data.key.tuple


def stored_rows_of(activations: Any) -> StoredRows:
    """The stored rows that a DataArray shows, which must be whole prompts, as they are.

    Raises
    ------
    InvalidTypeError, InvalidArgumentError
        Anything else.
    """
    if not isinstance(activations, xr.DataArray):
        ways = "one variable of it, such as toks.resid" if isinstance(activations, xr.Dataset) else "store.tokens().resid"
        raise InvalidTypeError(f"activations is a {type(activations).__name__}, and encode takes a DataArray: give {ways}")
    named = name_in_messages(activations)
    if "token" not in activations.dims:
        raise InvalidArgumentError(f"{named} has dims {activations.dims}, and latents are those of tokens: give store.tokens().resid")
    found = lazy_array(activations.variable)
    if found is None:
        raise InvalidArgumentError(
            f"{named} is no variable as it is stored: it was loaded, computed with or opened with chunks. Give store.tokens().resid "
            "itself; the rows are read block by block"
        )
    array, key = found
    dims = (("layer",) if array.layers is not None else ()) + ("token", "width")
    if len(key) != len(dims) or not isinstance(key[-1], slice) or len(range(array.row_shape[-1])[key[-1]]) != array.row_shape[-1]:
        raise InvalidArgumentError(f"{named} is not of whole rows of {array.row_shape} values: select no units")
    layers = None if array.layers is None else tuple(int(layer) for layer in np.atleast_1d(np.array(array.layers)[key[0]]))
    group, _, variable = (array.arrays[0].path.split("/")[part] for part in (0, 1, -1))
    numbers, prompts = prompts_of(activations, "token")
    hashes = tuple(map(str, prompts))
    rows = np.arange(array.n_rows)[key[-2]]
    if len(np.unique(rows)) < len(rows):
        raise InvalidArgumentError(f"{named} has tokens twice: select each prompt once")
    counts = np.bincount(numbers, minlength=len(hashes)).astype(np.int64)
    return StoredRows(variable, group, layers, hashes, counts, array.row_shape[-1], array)


# -- latents that were encoded ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Latents:
    """The two variables of one autoencoder's latents in a dataset of tokens.

    Parameters
    ----------
    name : str
    values, indices : DataArray, dims (token, <name>_k)
    num_latents : int
    """

    name: str
    values: xr.DataArray
    indices: xr.DataArray
    num_latents: int

    @property
    def dim(self) -> Hashable:
        """The dimension of the tokens."""
        return self.values.dims[0]


def latents_in(data: Any, name: str | None = None) -> Latents:
    """The latents of a dataset of tokens; the only ones where there is no name.

    Raises
    ------
    InvalidTypeError
        No dataset.
    InvalidArgumentError
        There are none, several without a name, or none of that name.
    """
    if not isinstance(data, xr.Dataset):
        raise InvalidTypeError(
            f"latents is a {type(data).__name__}, and they are two variables, values and indices: give the dataset that encode returned"
        )
    known = {
        str(found).removesuffix(VALUES): json.loads(variable.attrs[SAE])
        for found, variable in data.data_vars.items()
        if SAE in variable.attrs and str(found).endswith(VALUES) and variable.dims[:1] == ("token",)
    }
    known = {found: record for found, record in known.items() if f"{found}{INDICES}" in data.data_vars}
    if not known:
        raise InvalidArgumentError("this dataset has no latents of tokens: give what lz.encode(toks.resid, sae) returns")
    if name is None and len(known) > 1:
        raise InvalidArgumentError(f"this dataset has several latents, {', '.join(known)}: say which, name={next(iter(known))!r}")
    chosen = next(iter(known)) if name is None else name
    if chosen not in known:
        raise InvalidArgumentError(f"this dataset has no latents named {chosen!r:.80}: it has {', '.join(known)}")
    values, indices = data[f"{chosen}{VALUES}"], data[f"{chosen}{INDICES}"]
    return Latents(chosen, values, indices, int(known[chosen]["num_latents"]))


def check_feature(feature: Any, latents: Latents) -> int:
    """The number of a latent, checked.

    Raises
    ------
    InvalidTypeError, InvalidArgumentError
    """
    if isinstance(feature, bool) or not isinstance(feature, int | np.integer):
        raise InvalidTypeError(f"feature={feature!r:.60} is no whole number: give the number of a latent, from 0")
    if not NO_LATENT < feature < latents.num_latents:
        raise InvalidArgumentError(f"feature={feature} is none of the latents of {latents.name!r}: give 0 to {latents.num_latents - 1}")
    return int(feature)
