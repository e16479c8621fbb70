"""`PromptLists`: the stored lists of latents of the prompts in a dataset of tokens, each from the part that its tokens are in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lmprobe_zarr.batch import offsets_of
from lmprobe_zarr.errors import MissingPromptsError, PartGoneError
from lmprobe_zarr.latents.stored import Latents, lazy_array, list_names_of
from lmprobe_zarr.store.format import parse_part
from lmprobe_zarr.store.parts import NOWHERE, Part, StoredArray, VirtualArray
from lmprobe_zarr.tokens import prompts_of
from lmprobe_zarr.typing import Array, Ints, Mask

__all__ = ["PromptLists", "open_lists"]

READ_BYTES: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class _OfPart:
    """The lists of the prompts that are in one part: which prompts of the dataset, and their lists, None where the part has none."""

    prompts: Ints
    values: VirtualArray | None
    indices: VirtualArray | None


@dataclass(frozen=True, slots=True)
class PromptLists:
    """The lists of the prompts of a dataset.

    Parameters
    ----------
    latents : Latents
    n_prompts : int
        By their first appearance.
    parts : tuple
    whole : ndarray of bool, shape (prompt,)
        Whether all tokens of a prompt are in the dataset, so that its list is of just these.
    """

    latents: Latents
    n_prompts: int
    parts: tuple[_OfPart, ...]
    whole: Mask

    def bounds(self, feature: int) -> npt.NDArray[np.float32]:
        """For each prompt a value that the latent does not exceed at any of its tokens; 0 where it is not active there. Infinite where
        nothing is known.
        """
        found = np.full(self.n_prompts, np.inf, np.float32)
        for part in self.parts:
            if part.indices is None or part.values is None:
                continue
            for block in _blocks(part.indices):
                indices = _read(part.indices, block)
                here, columns = np.nonzero(indices == feature)
                full = (indices[:, -1] >= 0) & (indices.shape[1] < self.latents.num_latents)
                full[here] = False
                bound = np.zeros(len(indices), np.float32)
                wanted = np.flatnonzero(full)
                rows = np.union1d(here, wanted)
                if len(rows):
                    values = _read(part.values, block.start + rows)
                    bound[here] = values[np.searchsorted(rows, here), columns]
                    bound[wanted] = values[np.searchsorted(rows, wanted), -1]
                found[part.prompts[block]] = bound
        return found

    def entries(self) -> tuple[Ints, Ints, npt.NDArray[np.float32]] | None:
        """All latents of all prompts, as `by_prompt` gives them in any order; None where a list is not known to hold all of its prompt."""
        if not self.whole.all() or any(part.indices is None or part.values is None for part in self.parts):
            return None
        found: list[tuple[Ints, Ints, npt.NDArray[np.float32]]] = []
        for part in self.parts:
            assert part.indices is not None  # noqa: S101 — seen above
            assert part.values is not None  # noqa: S101
            for block in _blocks(part.indices):
                indices = _read(part.indices, block)
                if indices.shape[1] < self.latents.num_latents and (indices[:, -1] >= 0).any():
                    return None
                rows, columns = np.nonzero(indices >= 0)
                found.append((part.prompts[block][rows], indices[rows, columns].astype(np.int64), _read(part.values, block)[rows, columns]))
        return tuple(np.concatenate(each) for each in zip(*found, strict=True)) if found else None  # type: ignore[return-value]


def open_lists(latents: Latents) -> PromptLists | None:
    """The lists of the prompts of a dataset; None where its latents are not read from a store.

    Raises
    ------
    MissingPromptsError
        Some prompts have no latents.
    """
    found = lazy_array(latents.indices.variable)
    if found is None or len(found[1]) != 2 or lazy_array(latents.values.variable) is None:
        return None
    array, key = found
    numbers, hashes = prompts_of(latents.indices, str(latents.dim))
    rows = np.arange(array.n_rows)[key[0]]
    all_kept = isinstance(key[1], slice) and range(array.row_shape[-1])[key[1]] == range(array.row_shape[-1])
    if array.offsets is None or not len(rows) or not all_kept:
        return None
    held = np.searchsorted(array.offsets, rows, "right") - 1  # which prompt of the array each token is of
    first = np.unique(numbers, return_index=True)[1]
    of = held[first]
    source, start = array.source[0, of], array.start[0, of]
    if (source == NOWHERE).any():
        lacking = np.flatnonzero(source == NOWHERE)
        raise MissingPromptsError(
            f"{len(lacking)} of {len(of)} prompts have no latents named {latents.name!r}, first {hashes[lacking[0]]}: encode them, or give "
            "the dataset that encode returned"
        )
    counts = np.bincount(numbers, minlength=len(of))
    whole = counts == np.diff(array.offsets)[of]
    parts = tuple(_of_part(array.arrays[number], latents.name, np.flatnonzero(source == number), start) for number in np.unique(source))
    return PromptLists(latents, len(of), parts, np.asarray(whole, bool))


def _of_part(indices: StoredArray, name: str, prompts: Ints, start: Ints) -> _OfPart:
    """The lists of some prompts, whose first tokens are at `start` in one part."""
    path = indices.path.rsplit("/", 2)[0]
    try:
        document = indices.storage.read(f"{path}/zarr.json")
    except FileNotFoundError as error:
        raise PartGoneError(f"part {path!r} of {indices.storage.url} has been removed since this was opened: open it again") from error
    info = parse_part(document, path)
    arrays = [f"prompts/{each}" for each in list_names_of(name)]
    if info.n_tokens is None or not all(each in info.arrays for each in arrays):
        return _OfPart(prompts, None, None)
    part = Part(indices.storage, path, info, noted=indices.noted, kept=indices.kept)
    rows = np.searchsorted(offsets_of(info.n_tokens), start[prompts], "right") - 1
    values, ids = (_rows_of(part.array_of(each), rows) for each in arrays)
    return _OfPart(prompts, values, ids)


def _rows_of(array: StoredArray, rows: Ints) -> VirtualArray:
    """Some rows of an array without layers."""
    return VirtualArray(
        arrays=(array,), layers=None, layer_rows=np.zeros((1, 1), np.int32), classes=np.zeros(1, np.int64),
        source=np.zeros((1, len(rows)), np.int32), start=np.asarray(rows, np.int64)[None], offsets=None,
    )  # fmt: skip


def _blocks(array: VirtualArray) -> Iterator[slice]:
    size = max(1, READ_BYTES // (8 * array.row_shape[-1]))
    for begin in range(0, array.n_rows, size):
        yield slice(begin, min(array.n_rows, begin + size))


def _read(array: VirtualArray, rows: slice | Ints) -> Array:
    found: Any = array.read(np.zeros(1, np.int64), rows, note=True)[0]
    return np.asarray(found)
