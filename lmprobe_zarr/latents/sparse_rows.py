"""Latents as sparse arrays: of tokens, and pooled by prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import xarray as xr

from lmprobe_zarr.errors import InvalidArgumentError, MissingDependencyError, MissingPromptsError
from lmprobe_zarr.latents.prompt_lists import open_lists
from lmprobe_zarr.latents.stored import Latents, latents_in
from lmprobe_zarr.tokens import prompts_of
from lmprobe_zarr.typing import Array, Ints

__all__ = ["check_stored", "pool_latents", "to_sparse"]

READ_BYTES: Final = 64 << 20
_POOLINGS: Final = ("max", "mean")


def to_sparse(latents: xr.Dataset, name: str | None = None, kind: Literal["coo", "csr"] = "coo") -> Any:
    """The latents of tokens as one sparse array, shape (token, latent); see `lmprobe_zarr.accessor.DatasetAccessor.to_sparse`."""
    found = latents_in(latents, name)
    if kind not in ("coo", "csr"):
        raise InvalidArgumentError(f"kind={kind!r:.60} is unknown: give 'coo', for an array of sparse, or 'csr', for one of scipy")
    if kind == "coo":
        try:
            import sparse
        except ImportError as error:
            raise MissingDependencyError(
                'arrays of sparse need it: pip install "lmprobe-zarr[sparse]"; or give kind="csr", for an array of scipy'
            ) from error
    pieces = list(_entries(found))
    rows, columns, values = (np.concatenate(each) for each in zip(*pieces, strict=True))
    shape = (found.values.shape[0], found.num_latents)
    if kind == "csr":
        return _csr(rows, columns, values, shape)
    data = sparse.COO(np.stack([rows, columns]), values, shape=shape, has_duplicates=False, sorted=False)
    coords = found.values.isel({found.values.dims[1]: 0}, drop=True).coords
    return xr.DataArray(data, dims=(found.dim, "latent"), coords=coords, name=found.name, attrs=found.values.attrs)


def pool_latents(latents: xr.Dataset, pooling: Literal["max", "mean"] = "max", *, name: str | None = None) -> Any:
    """The latents of each prompt as one sparse row, for probes.

    Parameters
    ----------
    latents : Dataset
        That :func:`encode` returned, ``store.tokens()``, or a selection of either.
    pooling : {"max", "mean"}
        The largest value of a latent among the tokens of the prompt, or their mean, where a token without the latent counts as 0.
    name : str, optional
        Which latents, where the dataset has several.

    Returns
    -------
    scipy.sparse.csr_array of float32, shape (prompt, latent)
        The prompts in the order in which they first appear in the data: of the whole store that of ``store.dataset()``.

    Raises
    ------
    InvalidTypeError, InvalidArgumentError
        No dataset with latents, or an unknown pooling.
    MissingPromptsError
        Prompts without these latents.

    Notes
    -----
    What a token does not keep counts as 0: give :func:`encode` a `k` that is as large as the autoencoder needs. ``max`` of whole prompts
    reads the lists that :func:`encode` has stored for them, everything else all tokens, 64 MiB at a time.

    Examples
    --------
    >>> probe = lz.Probe(classifier="logistic_l1").fit_from_activations(lz.pool_latents(latents), labels)  # doctest: +SKIP
    """
    found = latents_in(latents, name)
    if pooling not in _POOLINGS:
        raise InvalidArgumentError(f"pooling={pooling!r:.60} is unknown for latents: give 'max' or 'mean'")
    numbers, prompts = prompts_of(found.values, str(found.dim))
    shape = (len(prompts), found.num_latents)
    lists = open_lists(found)
    entries = None if pooling == "mean" or lists is None else lists.entries()
    if entries is not None:
        return _csr(*_ordered(*entries, found.num_latents), shape)
    # Joined a block at a time: a prompt has far fewer different latents than its tokens have together.
    keys, held = np.zeros(0, np.int64), np.zeros(0, np.float64)
    for rows, columns, values in _entries(found):
        keys, where = np.unique(np.append(keys, numbers[rows] * found.num_latents + columns), return_inverse=True)
        joined = np.zeros(len(keys))
        combine: Any = np.maximum if pooling == "max" else np.add
        combine.at(joined, where, np.append(held, values))
        held = joined
    rows, columns = keys // found.num_latents, keys % found.num_latents
    if pooling == "mean":
        held = held / np.bincount(numbers, minlength=len(prompts))[rows]
    return _csr(rows, columns, held.astype(np.float32), shape)


def check_stored(latents: Latents, values: Array) -> None:
    """Raise where tokens without latents were read, which are NaN.

    Raises
    ------
    MissingPromptsError
    """
    if np.isnan(values[:, 0]).any():
        raise MissingPromptsError(
            f"{int(np.isnan(values[:, 0]).sum())} tokens have no latents named {latents.name!r}: encode their prompts, or give the dataset "
            "that encode returned"
        )


def _entries(latents: Latents) -> Iterator[tuple[Ints, Ints, npt.NDArray[np.float32]]]:
    """What is not zero, a block of tokens at a time: the token, the latent, the value."""
    most = max(1, READ_BYTES // (8 * latents.values.shape[1]))
    for begin in range(0, max(1, latents.values.shape[0]), most):
        block = {latents.dim: slice(begin, begin + most)}
        indices, values = latents.indices.isel(block).values, latents.values.isel(block).values
        check_stored(latents, values)
        rows, columns = np.nonzero(indices >= 0)
        yield rows + begin, indices[rows, columns].astype(np.int64), values[rows, columns]


def _ordered(rows: Ints, columns: Ints, values: Array, width: int) -> tuple[Ints, Ints, Array]:
    order = np.argsort(rows * width + columns, kind="stable")
    return rows[order], columns[order], values[order]


def _csr(rows: Ints, columns: Ints, values: Array, shape: tuple[int, int]) -> Any:
    """A CSR array, with the columns of each row ascending."""
    from scipy.sparse import csr_array

    rows, columns, values = _ordered(rows, columns, values, shape[1])
    starts = np.zeros(shape[0] + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=shape[0]), out=starts[1:])
    # scikit-learn takes indices of 32 bits alone.
    kind = np.int32 if max(len(values), *shape) < 2**31 else np.int64
    return csr_array((values, columns.astype(kind), starts.astype(kind)), shape=shape)
