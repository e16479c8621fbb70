"""The call `open_legacy`: an lmprobe cache as a lazy dataset, without importing it.

``lmprobe_lazy`` makes the dataset; here the arguments are checked and the entries chosen.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import xarray as xr

from lmprobe_zarr.batch import LayerSpec, choose_layers
from lmprobe_zarr.bridges.entry import Entry, Skipped
from lmprobe_zarr.bridges.files import open_files
from lmprobe_zarr.bridges.import_plan import of_one_width, prompt_list
from lmprobe_zarr.bridges.lmprobe_cache import known_name
from lmprobe_zarr.bridges.lmprobe_lazy import entries_dataset
from lmprobe_zarr.bridges.lmprobe_v2 import LmprobeV2
from lmprobe_zarr.bridges.summaries import Tally
from lmprobe_zarr.errors import InvalidArgumentError, MissingPromptsError, ModelNotStoredError
from lmprobe_zarr.store import Dtype, Model, reads_stored
from lmprobe_zarr.store.format import LEVELS, Level

__all__ = ["open_legacy"]


def open_legacy(
    cache_dir: str | os.PathLike[str],
    model: Model,
    *,
    level: Level = "prompts",
    prompts: Iterable[str] | None = None,
    layers: LayerSpec | None = None,
    dtype: Dtype = None,
    storage_options: Mapping[str, Any] | None = None,
) -> xr.Dataset:
    """An lmprobe cache (safetensors, format v2) as a lazy dataset; nothing is copied.

    Parameters
    ----------
    cache_dir : path or URL
        The cache: a folder, or any URL that fsspec knows. This call reads headers only; values are read when they are selected.
    model : str or path
        The model as lmprobe was given it, or another path of the same folder.
    level : {"prompts", "tokens"}
        One row per prompt, as in `Store.dataset`, or one per token, as in `Store.tokens`.
    prompts : iterable of str, optional
        Texts or hashes: exactly these, in this order, repeats included. None for all.
    layers : int, sequence of int, slice or word, optional
        Which layers; None for all that are stored.
    dtype : "stored", optional
        None gives float16 as float32, as in `Store.dataset`.
    storage_options : mapping, optional
        For the file system.

    Returns
    -------
    xarray.Dataset
        With the names, dimensions, coordinates and index of a store's dataset. The attribute ``skipped`` says what could not be read.

    Raises
    ------
    ModelNotStoredError, MissingPromptsError, LayerOutOfRangeError
        The cache does not hold the model, a prompt or a layer.
    CorruptFileError
        When values are read: a file is damaged, or has changed since this call.
    """
    if level not in LEVELS:
        raise InvalidArgumentError(f"level={level!r} is unknown: use 'prompts' or 'tokens'")
    stored = reads_stored(dtype)
    files = open_files(cache_dir, storage_options)
    source = LmprobeV2(files, known_name(files, model))
    skipped = Tally()
    wanted = None if prompts is None else prompt_list(prompts)
    found: list[Entry | None] = []
    if wanted is None:
        found = [_or_tally(item, skipped) for item in source.entries()]
    else:
        different = list(dict.fromkeys(wanted))
        items_of = dict(zip(different, source.find(different), strict=True))
        entries = {prompt: _first_entry(items or [], skipped) for prompt, items in items_of.items()}
        found = [entries[prompt] for prompt in wanted]
        absent = [prompt for prompt, entry in zip(wanted, found, strict=True) if entry is None]
        if absent:
            raise MissingPromptsError(
                f"{len(absent)} of {len(wanted)} prompts are not in {source.url}, or are damaged there: first {absent[0][:40]!r}"
            )
    chosen = [entry for entry in found if entry is not None and (level == "prompts" or any(h.level == "tokens" for h in entry.holds))]
    if wanted is not None and len(chosen) < len(found):
        raise MissingPromptsError(f"{len(found) - len(chosen)} of {len(found)} prompts are in {source.url} without tokens")
    fitting = of_one_width(chosen, None, skipped)
    if not fitting:
        raise ModelNotStoredError(f"{source.url} holds no {level} of {source.model!r} that can be read: check the name and the folder")
    available = sorted({i for entry in fitting for h in entry.holds if h.level == level for i in h.layers or ()})
    data = entries_dataset(source, fitting, level, choose_layers(available, layers, where=source.url), stored=stored)
    return data.assign_attrs(skipped="; ".join(map(str, skipped.reasons()))) if len(skipped) else data


def _or_tally(found: Entry | Skipped, skipped: Tally) -> Entry | None:
    """An entry, or None for something skipped, which is counted."""
    if isinstance(found, Entry):
        return found
    skipped.add(found.reason, found.name, found.detail)
    return None


def _first_entry(items: Sequence[Entry | Skipped], skipped: Tally) -> Entry | None:
    entries = [entry for entry in (_or_tally(item, skipped) for item in items) if entry is not None]
    return entries[0] if entries else None
