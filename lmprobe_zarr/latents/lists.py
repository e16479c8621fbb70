"""The latents of a whole prompt: each that is active at one of its tokens, with its largest value. Made from the latents of tokens."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from lmprobe_zarr.latents.encoder import NO_LATENT
from lmprobe_zarr.typing import Array, Ints

__all__ = ["by_prompt", "list_width", "lists_of"]

# A list of latents is as long as it must be for this share of the prompts of the first batch. Of the others the largest are kept.
SHARE: Final = 0.98
LEAST: Final = 16


def by_prompt(values: Array, indices: Array, counts: Ints, num_latents: int) -> tuple[Ints, Ints, npt.NDArray[np.float32]]:
    """Every latent that is active in a prompt: the number of the prompt, ascending, the latent, ascending in it, and its largest value.

    Parameters
    ----------
    values, indices : ndarray, shape (token, k)
    counts : ndarray of int64, shape (prompt,)
        Tokens of each prompt.
    num_latents : int
    """
    there = indices >= 0
    prompts = np.repeat(np.repeat(np.arange(len(counts)), counts), there.sum(axis=1))
    keys = prompts * num_latents + indices[there]
    if not len(keys):
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32)
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    starts = np.flatnonzero(np.diff(keys, prepend=keys[0] - 1))
    largest: npt.NDArray[np.float32] = np.maximum.reduceat(values[there][order], starts)
    keys = keys[starts]
    return keys // num_latents, keys % num_latents, largest


def list_width(prompts: Ints, n_prompts: int, num_latents: int) -> int:
    """How long the lists of all prompts are: a power of two, or all latents; from the entries of the first of them, see `by_prompt`.

    A list that is not full holds every latent that is active in its prompt.
    """
    lengths = np.sort(np.bincount(prompts, minlength=n_prompts))
    enough = int(lengths[min(n_prompts - 1, int(SHARE * n_prompts))]) + 1
    return min(num_latents, 1 << (max(LEAST, enough) - 1).bit_length())


def lists_of(
    entries: tuple[Ints, Ints, npt.NDArray[np.float32]], n_prompts: int, width: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    """The entries of `by_prompt` as a row for each prompt: the largest first, 0 and −1 where there are fewer."""
    prompts, latents, largest = entries
    order = np.lexsort((latents, -largest, prompts))
    starts = np.searchsorted(prompts, np.arange(n_prompts))
    place = np.arange(len(prompts)) - starts[prompts]  # the order within a prompt changes, that of the prompts does not
    first = place < width
    values = np.zeros((n_prompts, width), np.float32)
    indices = np.full((n_prompts, width), NO_LATENT, np.int32)
    rows, columns = prompts[first], place[first]
    values[rows, columns], indices[rows, columns] = largest[order][first], latents[order][first]
    return values, indices
