"""Activations from and to other formats: what people call. Knows bridges and stores, never models.

Whatever the format, an import goes the same way, see `importing`; what an export reads is in `exporting`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from lmprobe_zarr.bridges import lmprobe_v1, lmprobe_v2, lmprobe_write, neighbours
from lmprobe_zarr.bridges.entry import Entry, Skipped, Source
from lmprobe_zarr.bridges.files import open_files
from lmprobe_zarr.bridges.lazy import entries_dataset
from lmprobe_zarr.chunks import run_all
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, LayerOutOfRangeError, MissingPromptsError, ModelNotStoredError
from lmprobe_zarr.exporting import FLOAT_DTYPES, ExportRows, ManifestLines
from lmprobe_zarr.importing import of_one_width, run_import
from lmprobe_zarr.ingest import PART_BYTES
from lmprobe_zarr.layers import LayerSpec, describe_layers, resolve_layers
from lmprobe_zarr.progress import progress_bar
from lmprobe_zarr.schema import LEVELS, Level, Provenance
from lmprobe_zarr.storage import Storage, open_storage
from lmprobe_zarr.store import Place, Store, open_store
from lmprobe_zarr.summaries import ExportSummary, ImportSummary, Tally
from lmprobe_zarr.view import View

__all__ = [
    "export_safetensors",
    "import_npy",
    "import_pt",
    "import_safetensors",
    "import_source",
    "import_tensors",
    "import_vllm",
    "open_legacy",
]

# ------------------------------------------------------------------------------------------------------------- importing


def import_safetensors(
    cache_dir: str | os.PathLike[str],
    store: Place = None,
    *,
    model: str | None = None,
    prompts: Iterable[str] | None = None,
    dry_run: bool = False,
    strict: bool = False,
    provenance: Provenance | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: bool = True,
    part_bytes: int = PART_BYTES,
) -> ImportSummary:
    """Bring the entries of an lmprobe cache (safetensors, format v2) into a store.

    Parameters
    ----------
    cache_dir : path or URL
        The cache: a folder, or any URL that fsspec knows. It is only read.
    store : Store, path or URL, or a sequence of these, optional
        Where to; None is the default store.
    model : str, optional
        Only this model; it also names a folder whose own name file is gone. None is every model of the cache.
    prompts : iterable of str, optional
        Only these, by text or by hash. Texts are also the names of prompts that the cache's manifest does not know.
    dry_run : bool
        Only say what would be done: headers are read, nothing is written.
    strict : bool
        Refuse to begin if anything of what is asked for would be skipped.
    provenance : mapping, optional
        What is known of how the activations came about. Other provenance is another group.
    storage_options : mapping, optional
        For the file system of `cache_dir`.
    progress : bool
        Show a progress bar on terminals and in notebooks.
    part_bytes : int
        Bytes of activations after which a part is committed.

    Returns
    -------
    ImportSummary
        What came over, and what did not and why.

    Raises
    ------
    CorruptFileError
        ``strict=True`` and something would be skipped; nothing was written.
    ModelNotStoredError
        The cache holds nothing of `model`, or no model at all.
    ReadOnlyError, NoSpaceError
        What was committed until then stays.

    Notes
    -----
    Padding is left out by the attention mask. A prompt that is in the store with all that the cache holds of it is not read
    again, so an interrupted import is resumed by running it again. What lmprobe pooled as ``first_token`` may be padding: it is
    pooled again from the raw layers, or left out where they are missing. A prompt of unknown text has no text in the store and
    is found by its hash; its digest is the hash and 48 zeros.
    """
    files = open_files(cache_dir, storage_options)
    wanted = None if prompts is None else _listed(prompts)
    tally = Tally()
    names = [model] if model is not None else []
    for found in [] if model is not None else lmprobe_v2.scan_models(files):
        if isinstance(found, Skipped):
            tally.add(found.reason, found.name, found.detail)
        else:
            names.append(found.model)
    if model is not None and not files.list(lmprobe_v2.model_hash(model)):
        raise ModelNotStoredError(f"{files.url} holds nothing of {model!r} (no folder {lmprobe_v2.model_hash(model)}): check the name")
    if not names and not len(tally):
        raise ModelNotStoredError(f"{files.url} is no lmprobe cache: it holds no folder that is named after a model's hash")
    sources: list[tuple[str, Source]] = [(name, lmprobe_v2.LmprobeV2(files, name, prompts=wanted)) for name in names]
    return run_import(
        sources, store, files.url, tally, dry_run=dry_run, strict=strict, provenance=provenance, progress=progress, part_bytes=part_bytes
    )


def import_pt(
    cache_dir: str | os.PathLike[str],
    store: Place = None,
    *,
    model: str,
    prompts: Sequence[str] | None = None,
    dry_run: bool = False,
    strict: bool = False,
    provenance: Provenance | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: bool = True,
    part_bytes: int = PART_BYTES,
) -> ImportSummary:
    """Bring the entries of an old lmprobe cache (``.pt`` files, format v1) into a store. The cache is only read.

    Parameters
    ----------
    cache_dir : path or URL
        The cache.
    model : str
        Name of the model: the cache does not hold it.
    prompts : sequence of str, optional
        Texts: the cache does not hold them either. Folders of lmprobe 0.2 and 0.3 hold a whole list of prompts and are found only
        by that list, in its order; give one list per call. None is every folder of a single prompt, known by its hash.
    store, dry_run, strict, provenance, storage_options, progress, part_bytes
        As for `import_safetensors`.

    Returns
    -------
    ImportSummary
        What came over, what was there, and what was skipped, with the reasons.

    Raises
    ------
    MissingDependencyError
        torch is not installed.
    ModelNotStoredError, CorruptFileError, ReadOnlyError, NoSpaceError
        As for `import_safetensors`.

    Notes
    -----
    A file that holds anything but a tensor, such as a pickle that would run code, is refused, and the rest is imported.
    """
    files = open_files(cache_dir, storage_options)
    wanted = None if prompts is None else _listed(prompts)
    if not files.list(lmprobe_v2.model_hash(model)):
        raise ModelNotStoredError(f"{files.url} holds nothing of {model!r} (no folder {lmprobe_v2.model_hash(model)}): check the name")
    source = lmprobe_v1.LmprobeV1(files, model, prompts=wanted)
    return import_source(
        source, store, model=model, dry_run=dry_run, strict=strict, provenance=provenance, progress=progress, part_bytes=part_bytes
    )


def import_vllm(
    folder: str | os.PathLike[str],
    store: Place = None,
    *,
    model: str,
    layers: Sequence[int],
    prompts: Mapping[int, str] | Sequence[str] | None = None,
    dry_run: bool = False,
    strict: bool = False,
    provenance: Provenance | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: bool = True,
    part_bytes: int = PART_BYTES,
) -> ImportSummary:
    """Bring hidden states that vLLM or speculators wrote (``hs_<number>.safetensors``) into a store.

    Parameters
    ----------
    folder : path or URL
        Where the files lie.
    layers : sequence of int
        The block whose output each slot holds, counted from 0; vLLM's own layer ids are one more.
    prompts : mapping of int to str, or sequence of str, optional
        Texts by number; a prompt without a text is known by its token ids.
    store, model, dry_run, strict, provenance, storage_options, progress, part_bytes
        As for `import_safetensors`.

    Returns
    -------
    ImportSummary
        What came over, what was there, and what was skipped, with the reasons.
    """
    source = neighbours.VllmFiles(open_files(folder, storage_options), layers, prompts=prompts)
    return import_source(
        source, store, model=model, dry_run=dry_run, strict=strict, provenance=provenance, progress=progress, part_bytes=part_bytes
    )


def import_npy(
    folder: str | os.PathLike[str],
    store: Place = None,
    *,
    model: str,
    prompts: Sequence[str | Sequence[int]],
    variable: str = "resid",
    name: str = "layer_{layer}.npy",
    offsets: str = "offsets.npy",
    dtype: str | None = None,
    hidden_size: int | None = None,
    dry_run: bool = False,
    strict: bool = False,
    provenance: Provenance | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: bool = True,
    part_bytes: int = PART_BYTES,
) -> ImportSummary:
    """Bring a folder with one ``.npy`` or memory-mapped array per layer into a store.

    Parameters
    ----------
    folder : path or URL
        Where the files lie.
    prompts, variable, name, offsets, dtype, hidden_size
        See `bridges.neighbours.npy_layers`.
    store, model, dry_run, strict, provenance, storage_options, progress, part_bytes
        As for `import_safetensors`.

    Returns
    -------
    ImportSummary
        What came over, what was there, and what was skipped, with the reasons.
    """
    source = neighbours.npy_layers(
        open_files(folder, storage_options), prompts, variable=variable, name=name, offsets=offsets, dtype=dtype, hidden_size=hidden_size
    )
    return import_source(
        source, store, model=model, dry_run=dry_run, strict=strict, provenance=provenance, progress=progress, part_bytes=part_bytes
    )


def import_tensors(
    path: str | os.PathLike[str],
    store: Place = None,
    *,
    model: str,
    prompts: Sequence[str | Sequence[int]],
    mapping: Mapping[str, str | Mapping[int, str]],
    offsets: str | None = None,
    mask: str | None = None,
    dry_run: bool = False,
    strict: bool = False,
    provenance: Provenance | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: bool = True,
    part_bytes: int = PART_BYTES,
) -> ImportSummary:
    """Bring tensors of one safetensors file into a store.

    Parameters
    ----------
    path : path or URL
        The file.
    prompts, mapping, offsets, mask
        See `bridges.neighbours.tensor_file`.
    store, model, dry_run, strict, provenance, storage_options, progress, part_bytes
        As for `import_safetensors`.

    Returns
    -------
    ImportSummary
        What came over, what was there, and what was skipped, with the reasons.
    """
    folder, _, key = os.fspath(path).rpartition("/")
    source = neighbours.tensor_file(open_files(folder or ".", storage_options), key, prompts, mapping, offsets=offsets, mask=mask)
    return import_source(
        source, store, model=model, dry_run=dry_run, strict=strict, provenance=provenance, progress=progress, part_bytes=part_bytes
    )


def import_source(
    source: Source,
    store: Place = None,
    *,
    model: str,
    dry_run: bool = False,
    strict: bool = False,
    provenance: Provenance | None = None,
    progress: bool = True,
    part_bytes: int = PART_BYTES,
) -> ImportSummary:
    """Bring anything into a store that can be asked what a `bridges.entry.Source` can be asked.

    Parameters
    ----------
    source : Source
        The foreign format in its place.
    model : str
        Name of the model.
    store, dry_run, strict, provenance, progress, part_bytes
        As for `import_safetensors`.

    Returns
    -------
    ImportSummary
        What came over, what was there, and what was skipped, with the reasons.
    """
    return run_import(
        [(model, source)], store, source.url, Tally(), dry_run=dry_run, strict=strict, provenance=provenance, progress=progress,
        part_bytes=part_bytes,
    )  # fmt: skip


def _listed(prompts: Iterable[str]) -> list[str]:
    if isinstance(prompts, str):
        raise InvalidTypeError("prompts is one text: give a list of texts or hashes")
    listed = list(prompts)
    for prompt in listed:
        if not isinstance(prompt, str):
            raise InvalidTypeError(f"lmprobe knows prompts by their text, not by {type(prompt).__name__}: give texts or hashes")
    return listed


# -------------------------------------------------------------------------------------------------------------- in place


def open_legacy(
    cache_dir: str | os.PathLike[str],
    model: str,
    *,
    level: Level = "prompts",
    prompts: Iterable[str] | None = None,
    layers: LayerSpec | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> xr.Dataset:
    """An lmprobe cache (safetensors, format v2) as a lazy dataset, where it lies.

    Parameters
    ----------
    cache_dir : path or URL
        The cache: a folder, or any URL that fsspec knows. Headers are read; of tensors, later, only the bytes that are selected.
    model : str
        Name of the model.
    level : {"prompts", "tokens"}
        As `Store.dataset`, one row per prompt; or as `Store.tokens`, one per token.
    prompts : iterable of str, optional
        Texts or hashes: exactly these, in this order, repeats included. None is all.
    layers : int, sequence of int, slice or word, optional
        Which layers; None is all that are there.
    storage_options : mapping, optional
        For the file system.

    Returns
    -------
    xarray.Dataset
        The same names, dimensions, coordinates and index as a store shows. Its attribute ``skipped`` says what could not be read.

    Raises
    ------
    ModelNotStoredError, MissingPromptsError, LayerOutOfRangeError
        It is not in the cache.
    CorruptFileError
        At reading: a file was changed since, or is damaged.
    """
    if level not in LEVELS:
        raise InvalidArgumentError(f"level={level!r} is unknown: use 'prompts' or 'tokens'")
    source = lmprobe_v2.LmprobeV2(open_files(cache_dir, storage_options), model)
    skipped = Tally()
    wanted = None if prompts is None else _listed(prompts)
    found: list[Entry | None] = []
    if wanted is None:
        found = [_or_tally(item, skipped) for item in source.entries()]
    else:
        different = list(dict.fromkeys(wanted))
        looked = dict(zip(different, source.find(different), strict=True))
        entries = {prompt: _first_entry(items or [], skipped) for prompt, items in looked.items()}
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
        raise ModelNotStoredError(f"{source.url} holds no {level} of {model!r} that can be read: check the name and the folder")
    held = sorted({i for entry in fitting for h in entry.holds if h.level == level for i in h.layers or ()})
    data = entries_dataset(source, fitting, level, _choose(held, layers, source.url))
    return data.assign_attrs(skipped="; ".join(map(str, skipped.reasons()))) if len(skipped) else data


def _or_tally(found: Entry | Skipped, skipped: Tally) -> Entry | None:
    if isinstance(found, Entry):
        return found
    skipped.add(found.reason, found.name, found.detail)
    return None


def _first_entry(items: Sequence[Entry | Skipped], skipped: Tally) -> Entry | None:
    entries = [entry for entry in (_or_tally(item, skipped) for item in items) if entry is not None]
    return entries[0] if entries else None


def _choose(held: Sequence[int], layers: LayerSpec | None, where: str, num_layers: int | None = None) -> tuple[int, ...]:
    """Those of the layers that are there which are meant: numbers one by one, a slice or a word those of its layers."""
    if layers is None:
        return tuple(held)
    wanted = resolve_layers(layers, num_layers or max(held, default=-1) + 1)
    absent = [i for i in wanted if i not in held]
    if absent and (len(absent) == len(wanted) or not isinstance(layers, slice | str)):
        raise LayerOutOfRangeError(f"layer {absent[0]} is not in {where}, which holds layers {describe_layers(held)}")
    return tuple(i for i in wanted if i in held)


# ------------------------------------------------------------------------------------------------------------- exporting


def export_safetensors(
    store: Place,
    cache_dir: str | os.PathLike[str],
    *,
    model: str | None = None,
    prompts: Iterable[Any] | None = None,
    layers: LayerSpec | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    provenance: Provenance | None = None,
    group: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> ExportSummary:
    """Write activations as an lmprobe cache (safetensors, format v2) that lmprobe uses as its own.

    Parameters
    ----------
    store : Store, path or URL, or a sequence of these
        Where from; None is the default store.
    cache_dir : path or URL
        Where to: a folder that lmprobe may use already, or a URL.
    model, provenance, group : optional
        Which group of the store.
    prompts : iterable of texts, hashes or token ids, optional
        Only these; None is all.
    layers : int, sequence of int, slice or word, optional
        Only these; None is all that are stored.
    dtype : {"float32", "float16", "bfloat16", "float64"}, optional
        Convert activations, logits and router scores to it; None keeps each as it was stored, bfloat16 included.
    overwrite : bool
        Replace files of these prompts that are there already, each as a whole. False leaves them as they are.
    storage_options : mapping, optional
        For the file system of `cache_dir`.
    progress : bool
        Show a progress bar on terminals and in notebooks.

    Returns
    -------
    ExportSummary
        What was written, and what was not and why.

    Raises
    ------
    ModelNotStoredError, AmbiguousProvenanceError, MissingPromptsError, LayerOutOfRangeError, InvalidArgumentError
        Nothing is written.
    NoSpaceError, ReadOnlyError
        Prompts that were written until then are whole.

    Notes
    -----
    There is no padding in what is written. A prompt whose text is not stored is written under its hash, but cannot be listed in
    the manifest. Files of a prompt appear whole; existing files, the manifest's lines and the model's name are never deleted.
    """
    began = time.monotonic()
    source = store if isinstance(store, Store) else open_store(store, mode="r")
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise InvalidArgumentError(f"dtype={dtype!r} is unknown: use one of {', '.join(map(repr, FLOAT_DTYPES))}, or None")
    if isinstance(prompts, str):
        raise InvalidTypeError("prompts is one text: give a list of texts, hashes or token ids")
    info = source.find_group(model, provenance=provenance, group=group)
    view = source.view(info)
    rows = np.arange(len(view)) if prompts is None else np.array(list(dict.fromkeys(view.select(prompts).tolist())), np.int64)
    export = ExportRows(view, rows, _export_layers(view, layers), dtype)
    target = open_storage(cache_dir, storage_options)
    skipped, notes = Tally(), Tally()
    for variable in export.no_place:
        notes.add("variables that lmprobe's format has no place for", variable)
    if any(level == "tokens" and name.startswith("logits") for level, name in export.arrays):
        for level, name in export.arrays:
            if level == "prompts" and name.startswith("logits"):
                notes.add("variables that are left out where the logits of every token are there, which hold them", name)
    folder = lmprobe_write.write_model_name(target, info.model) if len(rows) else ""
    known = lmprobe_v2.read_manifest(open_files(target), folder).texts if len(rows) else {}
    # On an object store, one listing saves sending what would be refused; a local folder is asked file by file.
    there = frozenset() if target.is_local or overwrite or not len(rows) else frozenset(target.list(folder))
    listed = ManifestLines(partial(lmprobe_write.append_manifest, target, folder), known)
    exported = present = files = nbytes = 0
    with progress_bar(len(rows), description=f"exporting to {target.url}", unit="prompt", enabled=progress) as advance:
        try:
            for first, last in export.chunks():
                written: list[tuple[int, int] | None] = [None] * (last - first)
                work = []
                for i, (prompt_rows, problem) in enumerate(export.read(first, last)):
                    if problem:
                        skipped.add(problem, export.name(first + i))
                    if prompt_rows:
                        work.append(partial(_write_prompt, target, folder, export, first + i, prompt_rows, overwrite, there, written, i))
                    elif not problem:
                        skipped.add("prompts that hold nothing of what was asked for", export.name(first + i))
                run_all(work, local=target.is_local)
                for i, sizes in enumerate(written):
                    if sizes is None:
                        continue
                    exported, present = exported + (sizes[0] > 0), present + (sizes[0] == 0)
                    files, nbytes = files + sizes[0], nbytes + sizes[1]
                    text = export.texts[first + i]
                    if text is None:
                        notes.add("prompts of unknown text, which are written but not listed in the manifest", export.name(first + i))
                    else:
                        listed.add(text, export.length(first + i))
                advance(last - first)
        finally:
            listed.flush()
    return ExportSummary(
        url=source.url,
        target=target.url,
        model=info.model,
        group=info.name,
        prompts=len(rows),
        exported=exported,
        present=present,
        files=files,
        nbytes=nbytes,
        skipped=skipped.reasons(),
        notes=notes.reasons(),
        seconds=time.monotonic() - began,
    )


def _export_layers(view: View, layers: LayerSpec | None) -> dict[Level, tuple[int, ...]]:
    held: dict[Level, tuple[int, ...]] = {level: view.layers(level) for level in LEVELS}
    every = sorted({i for numbers in held.values() for i in numbers})
    wanted = _choose(every, layers, view.where, view.group.num_layers)
    return {level: tuple(i for i in numbers if i in wanted) for level, numbers in held.items()}


def _write_prompt(
    target: Storage,
    folder: str,
    export: ExportRows,
    at: int,
    rows: lmprobe_write.Rows,
    overwrite: bool,
    there: frozenset[str],
    written: list[tuple[int, int] | None],
    i: int,
) -> None:
    files = nbytes = 0
    for suffix, data in lmprobe_write.prompt_files(rows, export.count(at)).items():
        name = f"{export.name(at)}{suffix}.safetensors"
        if name not in there and lmprobe_write.write_file(target, f"{folder}/{name}", data, overwrite=overwrite):
            files, nbytes = files + 1, nbytes + len(data)
    written[i] = (files, nbytes)
