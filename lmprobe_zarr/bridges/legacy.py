"""The call `open_legacy`: the files of lmprobe or of another tool as a lazy dataset, without importing them.

``lazy`` makes the dataset; here the arguments are checked and the entries chosen.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import xarray as xr

from lmprobe_zarr.batch import LayerSpec, choose_layers, prompt_hash
from lmprobe_zarr.bridges.entry import Entry, LazySource, Skipped
from lmprobe_zarr.bridges.files import open_files
from lmprobe_zarr.bridges.import_plan import of_one_width, prompt_list
from lmprobe_zarr.bridges.lazy import entries_dataset
from lmprobe_zarr.bridges.lmprobe_cache import known_name
from lmprobe_zarr.bridges.lmprobe_v2 import LmprobeV2
from lmprobe_zarr.bridges.summaries import Tally
from lmprobe_zarr.bridges.tools import open_tool
from lmprobe_zarr.errors import InvalidArgumentError, MissingPromptsError, ModelNotStoredError
from lmprobe_zarr.store import Dtype, Model, reads_stored
from lmprobe_zarr.store.format import LEVELS, Level

__all__ = ["open_legacy"]


Tool = Literal["lmprobe", "saelens", "activault", "hallulens", "probelab"]


def open_legacy(
    cache_dir: str | os.PathLike[str],
    model: Model | None = None,
    *,
    level: Level = "prompts",
    prompts: Iterable[str] | None = None,
    layers: LayerSpec | None = None,
    dtype: Dtype = None,
    tool: Tool = "lmprobe",
    options: Mapping[str, Any] | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> xr.Dataset:
    """An lmprobe cache (safetensors, format v2), or the files of another tool, as a lazy dataset; nothing is copied.

    Parameters
    ----------
    cache_dir : path or URL
        The cache: a folder, or any URL that fsspec knows. This call reads headers only; values are read when they are selected.
    model : str or path, optional
        The model as lmprobe was given it, or another path of the same folder. For other tools its name, or None for the one in the files.
    level : {"prompts", "tokens"}
        One row per prompt, as in `Store.dataset`, or one per token, as in `Store.tokens`.
    prompts : iterable of str, optional
        Texts or hashes: exactly these, in this order, repeats included. None for all.
    layers : int, sequence of int, slice or word, optional
        Which layers; None for all that are stored.
    dtype : "stored", optional
        None gives float16 as float32, as in `Store.dataset`.
    tool : {"lmprobe", "saelens", "activault", "hallulens", "probelab"}
        Whose files they are.
    options : mapping, optional
        What the files of another tool do not say, with the names of the arguments of its import: ``{"mapping": …}`` of `import_activault`,
        ``{"responses": …}`` of `import_hallulens`, ``{"prompts": …, "variable": …, "layers": …}`` of `import_probelab`, ``{"variable": …,
        "layer": …}`` of `import_saelens`.
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
    others
        As for the import of the tool's files.
    """
    if level not in LEVELS:
        raise InvalidArgumentError(f"level={level!r} is unknown: use 'prompts' or 'tokens'")
    if tool not in get_args(Tool):
        raise InvalidArgumentError(f"tool={tool!r} is unknown: use one of {', '.join(map(repr, get_args(Tool)))}")
    stored = reads_stored(dtype)
    skipped = Tally()
    wanted = None if prompts is None else prompt_list(prompts)
    source: LazySource
    if tool == "lmprobe":
        if model is None or options:
            raise InvalidArgumentError("an lmprobe cache is opened with the model's name, as it was given to lmprobe, and without options=")
        files = open_files(cache_dir, storage_options)
        source = cache = LmprobeV2(files, known_name(files, model))
        name = cache.model
        found = _chosen(cache, wanted, skipped)
    else:
        source, name = open_tool(tool, cache_dir, options or {}, model=model, storage_options=storage_options)
        found = _among(source, wanted, skipped)
    if wanted is not None and (absent := [prompt for prompt, entry in zip(wanted, found, strict=True) if entry is None]):
        raise MissingPromptsError(
            f"{len(absent)} of {len(wanted)} prompts are not in {source.url}, or are damaged there: first {absent[0][:40]!r}"
        )
    there = [entry for entry in found if entry is not None]
    chosen = [entry for entry in there if any(held.level == level for held in entry.holds) or (tool == "lmprobe" and level == "prompts")]
    if wanted is not None and len(chosen) < len(found):
        raise MissingPromptsError(f"{len(found) - len(chosen)} of {len(found)} prompts are in {source.url} without {level}")
    fitting = of_one_width(chosen, None, skipped)
    if not fitting:
        raise ModelNotStoredError(f"{source.url} holds no {level} of {name!r} that can be read: check the name and the folder")
    available = sorted({i for entry in fitting for h in entry.holds if h.level == level for i in h.layers or ()})
    data = entries_dataset(source, fitting, level, choose_layers(available, layers, where=source.url), model=name, stored=stored)
    return data.assign_attrs(skipped="; ".join(map(str, skipped.reasons()))) if len(skipped) else data


def _chosen(cache: LmprobeV2, wanted: Sequence[str] | None, skipped: Tally) -> list[Entry | None]:
    """The entries of an lmprobe cache, or those of some prompts, which are looked up by name."""
    if wanted is None:
        return [_or_tally(item, skipped) for item in cache.entries()]
    different = list(dict.fromkeys(wanted))
    items_of = dict(zip(different, cache.find(different), strict=True))
    entries = {prompt: _first_entry(items or [], skipped) for prompt, items in items_of.items()}
    return [entries[prompt] for prompt in wanted]


def _among(source: LazySource, wanted: Sequence[str] | None, skipped: Tally) -> list[Entry | None]:
    """The entries of a source, the first of each prompt, or those of some prompts."""
    by_hash: dict[str, Entry] = {}
    for item in source.entries():
        entry = _or_tally(item, skipped)
        if entry is not None and entry.hash in by_hash:
            skipped.add("prompts that the source holds twice: the first is read", entry.name)
        elif entry is not None:
            by_hash[entry.hash] = entry
    if wanted is None:
        return list(by_hash.values())
    return [by_hash.get(prompt) or by_hash.get(prompt_hash(prompt)) for prompt in wanted]


def _or_tally(found: Entry | Skipped, skipped: Tally) -> Entry | None:
    """An entry, or None for something skipped, which is counted."""
    if isinstance(found, Entry):
        return found
    skipped.add(found.reason, found.name, found.detail)
    return None


def _first_entry(items: Sequence[Entry | Skipped], skipped: Tally) -> Entry | None:
    entries = [entry for entry in (_or_tally(item, skipped) for item in items) if entry is not None]
    return entries[0] if entries else None
