"""`top_tokens`: the prompts in which a latent is strongest, and at which token; reads the lists of the prompts, and the tokens of a few."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import xarray as xr

from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.interchange import to_interchange
from lmprobe_zarr.latents.prompt_lists import open_lists
from lmprobe_zarr.latents.sparse_rows import check_stored
from lmprobe_zarr.latents.stored import Latents, check_feature, latents_in
from lmprobe_zarr.tokens import prompts_of
from lmprobe_zarr.typing import Ints

__all__ = ["top_tokens"]

READ_BYTES: Final = 64 << 20


def top_tokens(latents: xr.Dataset, feature: int, n: int = 10, *, name: str | None = None) -> xr.DataArray:
    """The prompts in which a latent is strongest, each by its strongest token.

    Parameters
    ----------
    latents : Dataset
        That :func:`encode` returned, ``store.tokens()``, or a selection of either.
    feature : int
        The number of the latent, from 0.
    n : int
        How many prompts, at most: there are fewer where the latent is active in fewer.
    name : str, optional
        Which latents, where the dataset has several.

    Returns
    -------
    DataArray of float32, dims (token,)
        The values, descending, in memory; of equal ones the prompt and the token that come first in the data. Its coordinates are those of
        the tokens: ``prompt``, ``position``, and what is stored of them, such as ``text`` and ``token_id``.

    Raises
    ------
    InvalidTypeError, InvalidArgumentError
        No dataset with latents, or `feature` or `n` out of range.
    MissingPromptsError
        Prompts without these latents.

    Notes
    -----
    What is read are the lists of latents that :func:`encode` has stored for every prompt, and then the tokens of those prompts that can be
    among the strongest. The answer is that of all tokens. Of latents that were loaded or computed with, everything is read.

    It ranks what is stored: a latent that was not among the `k` largest of a token is not there.
    """
    found = latents_in(latents, name)
    feature = check_feature(feature, found)
    if isinstance(n, bool) or not isinstance(n, int | np.integer):
        raise InvalidTypeError(f"n={n!r:.60} is no whole number: give how many prompts, such as 10")
    if n < 1:
        raise InvalidArgumentError(f"n={n} keeps nothing: give 1 or more")
    numbers, _ = prompts_of(found.values, str(found.dim))
    rows, values = _strongest(found, feature, int(n), np.asarray(numbers, np.int64))
    one = found.values.isel({found.values.dims[1]: 0}, drop=True).isel({found.dim: rows})
    result = xr.DataArray(values, dims=one.dims, coords=one.coords, name=f"{found.name}_{feature}", attrs={"feature": feature})
    return to_interchange(result)


def _strongest(latents: Latents, feature: int, n: int, numbers: Ints) -> tuple[Ints, npt.NDArray[np.float32]]:
    """The tokens, and their values."""
    count = int(numbers.max(initial=-1)) + 1
    order = np.argsort(numbers, kind="stable")  # the tokens prompt by prompt
    starts = np.searchsorted(numbers[order], np.arange(count + 1))
    lists = open_lists(latents)
    bounds = np.full(count, np.inf, np.float32) if lists is None else lists.bounds(feature)
    candidates = np.flatnonzero(bounds > 0)
    candidates = candidates[np.argsort(-bounds[candidates], kind="stable")]
    best = np.zeros(0, np.float32)
    where, of = np.zeros(0, np.int64), np.zeros(0, np.int64)
    done, step = 0, n
    while done < len(candidates):
        # A prompt whose bound is equal may come before another in the data.
        if len(best) == n and bounds[candidates[done]] < best[-1]:
            break
        chosen = candidates[done : done + step]
        done, step = done + len(chosen), 2 * step
        tokens, values = _of_prompts(latents, feature, chosen, order, starts)
        best, where, of = np.append(best, values), np.append(where, tokens), np.append(of, chosen)
        kept = np.lexsort((of, -best))
        kept = kept[best[kept] > 0][:n]
        best, where, of = best[kept], where[kept], of[kept]
    return where, best


def _of_prompts(latents: Latents, feature: int, prompts: Ints, order: Ints, starts: Ints) -> tuple[Ints, npt.NDArray[np.float32]]:
    """The strongest token of each prompt, the first of equal ones, and its value; 0 where the latent is not active."""
    largest = np.zeros(len(prompts), np.float32)
    where = np.zeros(len(prompts), np.int64)
    most = max(1, READ_BYTES // (8 * latents.values.shape[1]))
    counts = np.diff(starts)[prompts]
    which = np.repeat(np.arange(len(prompts)), counts)
    rows = np.concatenate([order[starts[prompt] : starts[prompt + 1]] for prompt in prompts])
    ascending = np.argsort(rows, kind="stable")
    for begin in range(0, len(rows), most):
        block = ascending[begin : begin + most]
        taken: Any = {latents.dim: rows[block]}
        indices, values = latents.indices.isel(taken).values, latents.values.isel(taken).values
        check_stored(latents, values)
        at, columns = np.nonzero(indices == feature)
        for row, value in zip(at.tolist(), values[at, columns].tolist(), strict=True):
            prompt = which[block[row]]
            if value > largest[prompt]:
                largest[prompt], where[prompt] = value, rows[block[row]]
    return where, largest
