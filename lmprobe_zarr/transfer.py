"""Activations from and to other formats: what is missing → read → write → commit. Knows bridges and stores, never models.

Whatever the format, an import goes the same way: the source says from headers alone what it holds, all of that is checked
before anything is written, and what is not in the store yet is read in batches of bounded size.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd
import xarray as xr

from lmprobe_zarr.batch import HASH_DIGITS, TokenBatch, prompt_sha256
from lmprobe_zarr.bridges import lmprobe_v1, lmprobe_v2, lmprobe_write, neighbours
from lmprobe_zarr.bridges.entry import UNKNOWN_DIGITS, Entry, Held, Skipped, Source
from lmprobe_zarr.bridges.files import open_files
from lmprobe_zarr.bridges.lazy import entries_dataset
from lmprobe_zarr.bridges.safetensors_file import narrow_bfloat16, widen_bfloat16
from lmprobe_zarr.chunks import run_all
from lmprobe_zarr.errors import (
    CorruptFileError,
    InvalidArgumentError,
    InvalidTypeError,
    LayerOutOfRangeError,
    MissingPromptsError,
    ModelNotStoredError,
)
from lmprobe_zarr.ingest import PART_BYTES, Ingest
from lmprobe_zarr.layers import LayerSpec, describe_layers, resolve_layers
from lmprobe_zarr.progress import progress_bar
from lmprobe_zarr.ragged import offsets_of
from lmprobe_zarr.schema import LEVELS, GroupInfo, Level, Provenance
from lmprobe_zarr.sites import is_top_k
from lmprobe_zarr.storage import Storage, open_storage
from lmprobe_zarr.store import Store, open_store
from lmprobe_zarr.summaries import ExportSummary, ImportSummary, Tally
from lmprobe_zarr.view import View
from lmprobe_zarr.virtual import NOWHERE, VirtualArray

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

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]

# A batch is read while two wait and one is being written: together well below a gigabyte with the writer's own buffers.
BATCH_BYTES: Final = 2**26
BATCH_PROMPTS: Final = 4096
EXPORT_BYTES: Final = 2**27
FLOAT_DTYPES: Final = ("float32", "float16", "bfloat16", "float64")
MANIFEST_LINES: Final = 2048


# ------------------------------------------------------------------------------------------------------------- importing


def import_safetensors(
    cache_dir: str | os.PathLike[str],
    store: Store | str | os.PathLike[str] | None = None,
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
    store : Store, path or URL, optional
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
    return _import(
        sources, store, files.url, tally, dry_run=dry_run, strict=strict, provenance=provenance, progress=progress, part_bytes=part_bytes
    )


def import_pt(
    cache_dir: str | os.PathLike[str],
    store: Store | str | os.PathLike[str] | None = None,
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
    store: Store | str | os.PathLike[str] | None = None,
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
    """
    source = neighbours.VllmFiles(open_files(folder, storage_options), layers, prompts=prompts)
    return import_source(
        source, store, model=model, dry_run=dry_run, strict=strict, provenance=provenance, progress=progress, part_bytes=part_bytes
    )


def import_npy(
    folder: str | os.PathLike[str],
    store: Store | str | os.PathLike[str] | None = None,
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
    """
    source = neighbours.npy_layers(
        open_files(folder, storage_options), prompts, variable=variable, name=name, offsets=offsets, dtype=dtype, hidden_size=hidden_size
    )
    return import_source(
        source, store, model=model, dry_run=dry_run, strict=strict, provenance=provenance, progress=progress, part_bytes=part_bytes
    )


def import_tensors(
    path: str | os.PathLike[str],
    store: Store | str | os.PathLike[str] | None = None,
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
    """
    folder, _, key = os.fspath(path).rpartition("/")
    source = neighbours.tensor_file(open_files(folder or ".", storage_options), key, prompts, mapping, offsets=offsets, mask=mask)
    return import_source(
        source, store, model=model, dry_run=dry_run, strict=strict, provenance=provenance, progress=progress, part_bytes=part_bytes
    )


def import_source(
    source: Source,
    store: Store | str | os.PathLike[str] | None = None,
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
    """
    return _import(
        [(model, source)], store, source.url, Tally(), dry_run=dry_run, strict=strict, provenance=provenance, progress=progress,
        part_bytes=part_bytes,
    )  # fmt: skip


@dataclass
class _Plan:
    """What is to be imported of one model."""

    model: str
    source: Source
    group: GroupInfo
    entries: list[Entry]
    found: int
    stored: int
    part_names: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)


def _import(
    sources: Sequence[tuple[str, Source]],
    store: Store | str | os.PathLike[str] | None,
    origin: str,
    skipped: Tally,
    *,
    dry_run: bool,
    strict: bool,
    provenance: Provenance | None,
    progress: bool,
    part_bytes: int,
) -> ImportSummary:
    began = time.monotonic()
    target = store if isinstance(store, Store) else open_store(store)
    if not dry_run:
        target.check_writable()
    if part_bytes < 1:
        raise InvalidArgumentError(f"part_bytes={part_bytes!r} is no number of bytes: give at least 1")
    notes = Tally()
    plans = [_plan(name, source, target, provenance or {}, skipped, notes, progress) for name, source in sources]
    if strict and len(skipped):
        reasons = "; ".join(f"{r.count} × {r.text} ({', '.join(r.names)})" for r in skipped.reasons())
        raise CorruptFileError(f"strict=True, and of {origin} this would be skipped: {reasons}\nnothing was written")
    tokens = nbytes = imported = parts = 0
    with progress_bar(
        sum(plan.nbytes for plan in plans), description=f"importing into {target.url}", unit="B", enabled=progress and not dry_run
    ) as advance:
        for plan in plans:
            done = plan.entries if dry_run else _carry_out(plan, target, skipped, part_bytes, advance, origin)
            imported += len(done)
            tokens += sum(entry.n_tokens or 0 for entry in done if any(held.level == "tokens" for held in entry.holds))
            nbytes += sum(entry.nbytes for entry in done)
            parts += len(plan.part_names)
    return ImportSummary(
        source=origin,
        url=target.url,
        models=tuple(plan.model for plan in plans),
        groups=tuple(plan.group.name for plan in plans),
        found=sum(plan.found for plan in plans),
        stored=sum(plan.stored for plan in plans),
        imported=imported,
        tokens=tokens,
        nbytes=nbytes,
        parts=parts,
        skipped=skipped.reasons(),
        notes=notes.reasons(),
        dry_run=dry_run,
        seconds=time.monotonic() - began,
    )


def _plan(model: str, source: Source, store: Store, provenance: Provenance, skipped: Tally, notes: Tally, progress: bool) -> _Plan:
    """What a source holds that the store does not; everything that can be wrong is found here, before anything is written."""
    entries: dict[str, Entry] = {}
    with progress_bar(0, description=f"looking at {model}", unit="prompt", enabled=progress) as advance:
        for found in source.entries():
            advance(1)
            if isinstance(found, Skipped):
                skipped.add(found.reason, found.name, found.detail)
            elif found.hash in entries:
                skipped.add("prompts that the source holds twice: the first one counts", found.name)
            else:
                entries[found.hash] = found
    group = _group(store, model, provenance, entries.values())
    view = store.view(group) if group.name in store.groups() else None
    fitting = _of_one_width(entries.values(), view, skipped)
    fitting = fitting if view is None else _as_stored(fitting, view, skipped)
    for entry in fitting:
        for note in entry.notes:
            notes.add(note, entry.name)
        if entry.text is None:
            notes.add("prompts of unknown text, which are found by their hash", entry.name)
    _note_layers(fitting, notes)
    missing = fitting if view is None else _missing(fitting, view)
    return _Plan(model, source, group, missing, len(entries), len(fitting) - len(missing))


def _group(store: Store, model: str, provenance: Provenance, entries: Iterable[Entry]) -> GroupInfo:
    """The group of a model's imports: the one that is there, also where either side does not know the hidden size."""
    widths = Counter(held.row_shape[-1] for entry in entries for held in entry.holds if held.variable.startswith("resid"))
    hidden = widths.most_common(1)[0][0] if widths else None
    wanted = GroupInfo(model=model, provenance=provenance, num_layers=None, hidden_size=hidden)
    groups = store.groups()
    if wanted.name in groups:
        return wanted
    for info in groups.values():
        alike = (info.model, info.provenance, info.num_layers) == (model, wanted.provenance, None)
        if alike and None in (info.hidden_size, hidden):
            return info
    return wanted


def _of_one_width(entries: Iterable[Entry], view: View | None, skipped: Tally) -> list[Entry]:
    """Those entries whose rows are as wide as those of most, or as those that are stored."""
    listed = list(entries)
    count: dict[tuple[Level, str], Counter[tuple[int, ...]]] = {}
    for holds, number in Counter(entry.holds for entry in listed).items():
        for held in holds:
            count.setdefault((held.level, held.variable), Counter())[held.row_shape] += number
    usual = {name: shapes.most_common(1)[0][0] for name, shapes in count.items()}
    for level in LEVELS if view is not None else ():
        assert view is not None  # noqa: S101 — see above
        usual |= {(level, name): info.row_shape for name, info in view.variables(level).items()}
    fitting = []
    for entry in listed:
        odd = [h for h in entry.holds if h.row_shape != usual[h.level, h.variable] and not is_top_k(h.variable)]
        if odd:
            detail = f"{odd[0].variable} has rows of {odd[0].row_shape}, others of {usual[odd[0].level, odd[0].variable]}"
            skipped.add("prompts whose activations are of another width than the others", entry.name, detail)
        else:
            fitting.append(entry)
    return fitting


def _as_stored(entries: Sequence[Entry], view: View, skipped: Tally) -> list[Entry]:
    """The entries with the digests that the store has for their prompts.

    A digest of which only 16 digits are known (see `bridges.entry.digest_of_hash`) is the same prompt as one that is whole.
    """
    rows = _rows_of(entries, view)
    fitting = []
    for entry, row in zip(entries, rows, strict=True):
        stored = None if row < 0 else view.digests[row].tobytes().hex()
        if stored is None or stored == entry.sha256:
            fitting.append(entry)
        elif UNKNOWN_DIGITS in (stored[HASH_DIGITS:], entry.sha256[HASH_DIGITS:]):
            fitting.append(replace(entry, sha256=stored))
        else:
            skipped.add("prompts that share their hash with another one in the store", entry.name)
    return fitting


def _rows_of(entries: Sequence[Entry], view: View) -> Ints:
    return np.asarray(pd.Index(view.hashes).get_indexer(pd.Index([entry.hash for entry in entries])), np.int64)


def _missing(entries: Sequence[Entry], view: View) -> list[Entry]:
    """Those entries of which anything is not in the view."""
    rows = _rows_of(entries, view)
    there = rows >= 0
    alike: dict[tuple[Held, ...], list[int]] = {}
    for i in np.flatnonzero(there).tolist():
        alike.setdefault(entries[i].holds, []).append(i)
    for holds, members in alike.items():
        for held in holds:
            covered = view.covers(held.level, held.variable, rows[members], held.layers or ())
            there[members] &= covered.all(axis=0)
    return [entry for entry, known in zip(entries, there, strict=True) if not known]


def _note_layers(entries: Sequence[Entry], notes: Tally) -> None:
    """Note prompts that hold fewer layers of a variable than the others."""
    every: dict[str, set[int]] = {}
    for holds in {entry.holds for entry in entries}:
        for held in holds:
            every.setdefault(held.variable, set()).update(held.layers or ())
    for entry in entries:
        held_layers: dict[str, set[int]] = {}
        for held in entry.holds:
            held_layers.setdefault(held.variable, set()).update(held.layers or ())
        if any(every[variable] - layers for variable, layers in held_layers.items()):
            notes.add("prompts that hold fewer layers than others", entry.name)


# ------------------------------------------------------------------------------------------------------ carrying it out


def _carry_out(plan: _Plan, store: Store, skipped: Tally, part_bytes: int, advance: Callable[[int], object], origin: str) -> list[Entry]:
    """Read and write what is missing; returns the entries that came over whole."""
    alike: dict[tuple[Any, ...], list[Entry]] = {}
    for entry in plan.entries:
        alike.setdefault((entry.holds, entry.text is None, _pieces(entry)), []).append(entry)
    failed: set[str] = set()
    with Ingest(store, plan.group, part_bytes=part_bytes, recorded={"imported_from": origin}) as ingest:
        # Like by like, and each run of entries with all that it holds, so that an interruption leaves few that are there by halves.
        for (holds, _, pieces), entries in alike.items():
            units = _units(holds, pieces)
            for some in _batches(entries, max(units, key=lambda unit: sum(held.row_nbytes for held in unit))):
                for unit in units:
                    for batch in _read(plan.source, [entry for entry in some if entry.hash not in failed], unit, skipped, failed):
                        ingest.put(batch)
                    advance(sum(_rows_nbytes(entry, unit) for entry in some))
    plan.part_names += ingest.parts
    return [entry for entry in plan.entries if entry.hash not in failed]


def _layered_nbytes(entry: Entry) -> int:
    return sum(_rows_nbytes(entry, [held]) for held in entry.holds if held.layers is not None)


def _rows_nbytes(entry: Entry, holds: Iterable[Held]) -> int:
    return sum(held.row_nbytes * (1 if held.level == "prompts" else entry.n_tokens or 0) for held in holds)


def _pieces(entry: Entry) -> int:
    """Into how many runs of layers a prompt is cut, so that no run is larger than a batch: a power of two, so that few differ."""
    return int(2 ** max(0, np.ceil(np.log2(max(1, _layered_nbytes(entry)) / BATCH_BYTES))))


def _units(holds: Sequence[Held], pieces: int) -> list[list[Held]]:
    """What is written together: variables of the same layers, cut into runs of layers, and beside them those without layers."""
    by_layers: dict[tuple[int, ...], list[Held]] = {}
    for held in holds:
        if held.layers is not None:
            by_layers.setdefault(held.layers, []).append(held)
    units: list[list[Held]] = []
    for layers, members in by_layers.items():
        for run in np.array_split(np.array(layers), min(pieces, len(layers))):
            units += _one_dtype([replace(held, layers=tuple(run.tolist())) for held in members])
    apart: list[Held] = []
    for held in (held for held in holds if held.layers is None):
        # Only beside others of its level: a part says of each level that it has something in whether it has layers.
        beside = next((unit for unit in units if any(other.level == held.level for other in unit)), apart)
        beside.append(held)
    return [*units, apart] if apart else units


def _one_dtype(holds: Sequence[Held]) -> list[list[Held]]:
    """Apart where one variable occurs twice, in two dtypes."""
    apart: list[list[Held]] = []
    for held in holds:
        free = next((unit for unit in apart if held.variable not in {other.variable for other in unit}), None)
        if free is None:
            apart.append([held])
        else:
            free.append(held)
    return apart


def _batches(entries: Sequence[Entry], unit: Sequence[Held]) -> Iterator[list[Entry]]:
    some: list[Entry] = []
    nbytes = 0
    for entry in entries:
        size = _rows_nbytes(entry, unit)
        if some and (nbytes + size > BATCH_BYTES or len(some) == BATCH_PROMPTS):
            yield some
            some, nbytes = [], 0
        some.append(entry)
        nbytes += size
    if some:
        yield some


def _read(source: Source, entries: list[Entry], unit: Sequence[Held], skipped: Tally, failed: set[str]) -> Iterator[TokenBatch]:
    """A batch of all entries, or, where a file turns out to be damaged, of each of the others by itself."""
    if not entries:
        return
    try:
        yield source.read(entries, unit)
        return
    except CorruptFileError as error:
        if len(entries) == 1:
            skipped.add("files that were changed or damaged while they were read", entries[0].name, str(error))
            failed.add(entries[0].hash)
            return
    for entry in entries:
        yield from _read(source, [entry], unit, skipped, failed)


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
    fitting = _of_one_width(chosen, None, skipped)
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
    store: Store | str | os.PathLike[str] | None,
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
    store : Store, path or URL
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
    export = _Export(view, rows, _export_layers(view, layers), dtype)
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
    listed = _ManifestLines(partial(lmprobe_write.append_manifest, target, folder), known)
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
    export: _Export,
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


class _ManifestLines:
    """Lines for the manifest, written some at a time, for prompts that it does not list yet."""

    def __init__(self, append: Callable[[list[tuple[str, int | None]]], None], known: Mapping[str, str]) -> None:
        self.append, self.known = append, set(known.values())
        self.waiting: list[tuple[str, int | None]] = []

    def add(self, text: str, tokens: int | None) -> None:
        if text not in self.known:
            self.known.add(text)
            self.waiting.append((text, tokens))
        if len(self.waiting) >= MANIFEST_LINES:
            self.flush()

    def flush(self) -> None:
        self.append(self.waiting)
        self.waiting = []


class _Export:
    """What of a view goes into lmprobe's files, prompt by prompt."""

    def __init__(self, view: View, rows: Ints, layers: Mapping[Level, tuple[int, ...]], dtype: str | None) -> None:
        self.view, self.rows, self.layers, self.dtype = view, rows, layers, dtype
        self.counts = view.token_counts()[rows]
        self.offsets = offsets_of(self.counts)
        self.lengths = self._column("prompt_length", np.full(len(rows), -1, np.int64))
        self.texts = self._texts()
        self.arrays: dict[tuple[Level, str], VirtualArray] = {}
        self.no_place: list[str] = []
        for level in LEVELS:
            for name, info in view.variables(level).items():
                if not lmprobe_write.has_place(name):
                    self.no_place.append(name)
                elif not info.layered or layers[level]:
                    self.arrays[level, name] = self._source(level, name)
        if "token_id" in view.columns("tokens"):
            self.arrays["tokens", "token_id"] = self._source("tokens", "token_id")
        self.positions = self._source("tokens", "position") if "position" in view.columns("tokens") else None

    def _source(self, level: Level, name: str) -> VirtualArray:
        return self.view.source(level, name, self.rows, self.layers[level], self.counts if level == "tokens" else None)

    def _column(self, name: str, otherwise: Array) -> Array:
        if name not in self.view.columns("prompts") or not len(self.rows):
            return otherwise
        array = self.view.source("prompts", name, self.rows, ())
        values: Array = array.read(np.zeros(1, np.int64), slice(0, len(self.rows)))[0]
        return values

    def _texts(self) -> list[str | None]:
        """The text of each prompt, None where it is not stored, or not as it was (see `writer`: lone surrogates)."""
        texts = self._column("text", np.full(len(self.rows), "", object))
        digests = [self.view.digests[row].tobytes().hex() for row in self.rows]
        return [t if prompt_sha256(t)[: len(d.removesuffix(UNKNOWN_DIGITS))] == d.removesuffix(UNKNOWN_DIGITS) else None
                for t, d in zip(texts, digests, strict=True)]  # fmt: skip

    def name(self, at: int) -> str:
        """Hash of a prompt, which names its files."""
        return str(self.view.digests[self.rows[at]].tobytes().hex()[:HASH_DIGITS])

    def count(self, at: int) -> int | None:
        """Token rows of a prompt; None where there are none."""
        return int(self.counts[at]) or None

    def length(self, at: int) -> int | None:
        """Tokens of a prompt, as far as they are known."""
        return self.count(at) or (int(self.lengths[at]) if self.lengths[at] > 0 else None)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Runs of prompts that are read together."""
        per_prompt = per_token = 0
        for (level, _), array in self.arrays.items():
            layers = len(array.layers) if array.layers is not None else 1
            nbytes = layers * int(np.prod(array.row_shape, dtype=np.int64)) * array.dtype.itemsize
            per_prompt, per_token = (per_prompt + nbytes, per_token) if level == "prompts" else (per_prompt, per_token + nbytes)
        first, size = 0, 0
        for i, count in enumerate(self.counts.tolist()):
            nbytes = per_prompt + count * per_token
            if i > first and (size + nbytes > EXPORT_BYTES or i - first >= BATCH_PROMPTS):
                yield first, i
                first, size = i, 0
            size += nbytes
        if len(self.counts):
            yield first, len(self.counts)

    def read(self, first: int, last: int) -> Iterator[tuple[dict[tuple[str, int | None], tuple[Array, str]], str]]:
        """For each prompt of a run its rows, as they are written, and what of it is not written."""
        bounds = {"prompts": (first, last), "tokens": (int(self.offsets[first]), int(self.offsets[last]))}
        values = {}
        for (level, name), array in self.arrays.items():
            places = np.arange(1 if array.layers is None else len(array.layers))
            values[level, name] = array.read(places, slice(*bounds[level]))
        positions = None
        if self.positions is not None:
            positions = self.positions.read(np.zeros(1, np.int64), slice(*bounds["tokens"]))[0]
        for at in range(first, last):
            begin, end = int(self.offsets[at]) - bounds["tokens"][0], int(self.offsets[at + 1]) - bounds["tokens"][0]
            whole = positions is None or bool((positions[begin:end] == np.arange(end - begin)).all())
            whole = whole and int(self.lengths[at]) in (-1, end - begin)
            problem = "" if whole or begin == end else "prompts of which only some tokens are kept, which lmprobe would take for all"
            rows: dict[tuple[str, int | None], tuple[Array, str] | str] = {}
            for (level, name), array in self.arrays.items():
                if level == "prompts":
                    rows |= self._rows(name, array, values[level, name][:, at - first], at)
                elif whole and end > begin:
                    rows |= self._rows(name, array, values[level, name][:, begin:end], at)
            if any(isinstance(converted, str) for converted in rows.values()):
                yield {}, f"prompts with values beyond the range of {self.dtype}"
            else:
                yield {key: converted for key, converted in rows.items() if not isinstance(converted, str)}, problem

    def _rows(self, name: str, array: VirtualArray, values: Array, at: int) -> dict[tuple[str, int | None], tuple[Array, str] | str]:
        """What is held of one variable for one prompt, by layer; a text where it does not fit into the wanted dtype."""
        rows: dict[tuple[str, int | None], tuple[Array, str] | str] = {}
        for place, layer in enumerate(array.layers or (None,)):
            source = int(array.source[array.classes[place], at])
            if source == NOWHERE or (name == "token_id" and (values[place] < 0).any()):
                continue
            # What this very part holds: others may hold more of the largest values, or wider numbers.
            info = array.arrays[source].info
            held = values[place, ..., : info.row_shape[0]] if is_top_k(name) else values[place]
            rows[name, layer] = self._convert(name, held, str(info.attributes.get("stored_dtype", info.dtype)))
        return rows

    def _convert(self, name: str, values: Array, stored: str) -> tuple[Array, str] | str:
        """Values in the dtype they are written in, and its name; the name alone where they do not fit into it."""
        fixed = values.dtype.kind != "f" or "perplexity" in name or self.dtype is None
        target = stored if fixed or self.dtype is None else self.dtype
        if target == "bfloat16":
            exact = np.asarray(values, np.float32)
            if not fixed and (np.isfinite(values) & np.isinf(widen_bfloat16(narrow_bfloat16(exact)))).any():
                return target
            return exact, target
        with np.errstate(over="ignore"):
            converted = values.astype(target, copy=False)
        if not fixed and (np.isfinite(values) & np.isinf(converted)).any():
            return target
        return converted, target
