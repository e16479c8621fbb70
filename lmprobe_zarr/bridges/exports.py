"""Exports activations of a store to lmprobe's files: the call, and the rows that go into each prompt's files.

The files themselves are made in ``lmprobe_write``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Final

import numpy as np

from lmprobe_zarr.batch import HASH_DIGITS, UNKNOWN_DIGITS, LayerSpec, choose_layers, is_top_k, list_names, offsets_of, prompt_sha256
from lmprobe_zarr.bridges import lmprobe_write
from lmprobe_zarr.bridges.files import open_files
from lmprobe_zarr.bridges.lmprobe_folders import read_manifest
from lmprobe_zarr.bridges.lmprobe_write import has_place
from lmprobe_zarr.bridges.summaries import ExportSummary, Tally
from lmprobe_zarr.display import nearest, progress_bar
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.safetensors_file import narrow_bfloat16, widen_bfloat16
from lmprobe_zarr.storage import Storage, open_storage, run_all
from lmprobe_zarr.store import Model, Place, open_to_read
from lmprobe_zarr.store.format import LEVELS, Level, Provenance
from lmprobe_zarr.store.parts import NOWHERE, View, VirtualArray
from lmprobe_zarr.typing import Array, Ints

__all__ = ["FLOAT_DTYPES", "ExportRows", "ManifestLines", "export_safetensors"]

EXPORT_BYTES: Final = 2**27
EXPORT_PROMPTS: Final = 4096
FLOAT_DTYPES: Final = ("float32", "float16", "bfloat16", "float64")
MANIFEST_LINES: Final = 2048
_EXPORTABLE: Final = "it holds resid, what is pooled from it, logits, perplexities and router"


class ManifestLines:
    """Collects lines for the manifest, for prompts that it does not list yet, and appends many at once."""

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


class ExportRows:
    """The rows of a view that go into lmprobe's files, prompt by prompt.

    `no_place` names the variables that lmprobe's format cannot hold.
    """

    def __init__(
        self, view: View, rows: Ints, layers: Mapping[Level, tuple[int, ...]], dtype: str | None, variables: Collection[str] | None = None
    ) -> None:
        self.view, self.rows, self.layers, self.dtype = view, rows, layers, dtype
        self.counts = view.token_counts()[rows]
        self.offsets = offsets_of(self.counts)
        self.lengths = self._column("prompt_length", np.full(len(rows), -1, np.int64))
        self.texts = self._texts()
        self.arrays: dict[tuple[Level, str], VirtualArray] = {}
        self.no_place: list[str] = []
        for level in LEVELS:
            for name, info in view.variables(level).items():
                if variables is not None and name not in variables:
                    continue
                if not has_place(name):
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
        """The text of each prompt; None if it is not stored, or was changed to be stored (lone surrogates, see ``store.parts.writer``)."""
        texts = self._column("text", np.full(len(self.rows), "", object))
        digests = [self.view.digests[row].tobytes().hex() for row in self.rows]
        return [t if prompt_sha256(t)[: len(d.removesuffix(UNKNOWN_DIGITS))] == d.removesuffix(UNKNOWN_DIGITS) else None
                for t, d in zip(texts, digests, strict=True)]  # fmt: skip

    def name(self, at: int) -> str:
        """The hash of a prompt, which names its files."""
        return str(self.view.digests[self.rows[at]].tobytes().hex()[:HASH_DIGITS])

    def count(self, at: int) -> int | None:
        """Number of token rows of a prompt; None if there are none."""
        return int(self.counts[at]) or None

    def length(self, at: int) -> int | None:
        """Number of tokens of a prompt; None if unknown."""
        return self.count(at) or (int(self.lengths[at]) if self.lengths[at] > 0 else None)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """First and last (exclusive) prompt of the runs that are read together."""
        per_prompt = per_token = 0
        for (level, _), array in self.arrays.items():
            layers = len(array.layers) if array.layers is not None else 1
            nbytes = layers * int(np.prod(array.row_shape, dtype=np.int64)) * array.dtype.itemsize
            per_prompt, per_token = (per_prompt + nbytes, per_token) if level == "prompts" else (per_prompt, per_token + nbytes)
        first, size = 0, 0
        for i, count in enumerate(self.counts.tolist()):
            nbytes = per_prompt + count * per_token
            if i > first and (size + nbytes > EXPORT_BYTES or i - first >= EXPORT_PROMPTS):
                yield first, i
                first, size = i, 0
            size += nbytes
        if len(self.counts):
            yield first, len(self.counts)

    def read(self, first: int, last: int) -> Iterator[tuple[dict[tuple[str, int | None], tuple[Array, str]], str]]:
        """For each prompt of a run its rows in the dtype to write, and why some of its values are not written (empty if all are)."""
        bounds = {"prompts": (first, last), "tokens": (int(self.offsets[first]), int(self.offsets[last]))}
        values = {}
        for (level, name), array in self.arrays.items():
            places = np.arange(1 if array.layers is None else len(array.layers))
            values[level, name] = array.read(places, slice(*bounds[level]), note=True)
        positions = None
        if self.positions is not None:
            positions = self.positions.read(np.zeros(1, np.int64), slice(*bounds["tokens"]))[0]
        for at in range(first, last):
            begin, end = int(self.offsets[at]) - bounds["tokens"][0], int(self.offsets[at + 1]) - bounds["tokens"][0]
            whole = positions is None or bool((positions[begin:end] == np.arange(end - begin)).all())
            whole = whole and int(self.lengths[at]) in (-1, end - begin)
            problem = "" if whole or begin == end else "prompts stored with only some of their tokens, which lmprobe would take for all"
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
        """The values of one variable for one prompt, by layer; the name of the wanted dtype where values are beyond its range."""
        rows: dict[tuple[str, int | None], tuple[Array, str] | str] = {}
        for place, layer in enumerate(array.layers or (None,)):
            source = int(array.source[array.classes[place], at])
            if source == NOWHERE or (name == "token_id" and (values[place] < 0).any()):
                continue
            # Shape and dtype of the part that holds them: other parts may hold more of the largest values, or wider numbers.
            info = array.arrays[source].info
            held = values[place, ..., : info.row_shape[0]] if is_top_k(name) else values[place]
            rows[name, layer] = self._convert(name, held, str(info.attributes.get("stored_dtype", info.dtype)))
        return rows

    def _convert(self, name: str, values: Array, stored: str) -> tuple[Array, str] | str:
        """Values in the dtype to write, and its name; the name alone if values are beyond the range of that dtype."""
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


# ------------------------------------------------------------------------------------------------------------- exporting


def export_safetensors(
    store: Place,
    cache_dir: str | os.PathLike[str],
    *,
    model: Model | None = None,
    prompts: Iterable[Any] | None = None,
    layers: LayerSpec | None = None,
    variables: str | Iterable[str] | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    provenance: Provenance | None = None,
    group: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> ExportSummary:
    """Write activations as an lmprobe cache (safetensors, format v2), which lmprobe then uses as its own.

    Parameters
    ----------
    store : Store, path or URL, or a sequence of these
        The store to read; None for the default store.
    cache_dir : path or URL
        The cache to write to: a folder, which may already be an lmprobe cache, or a URL.
    model, provenance, group : optional
        Choose the group of the store; the model by its name, hub id or folder.
    prompts : iterable of texts, hashes or token ids, optional
        Only these; None for all.
    layers : int, sequence of int, slice or word, optional
        Only these; None for all that are stored.
    variables : str or iterable of str, optional
        Only these; None for all that lmprobe's format has a name for, which the summary says of the others.
    dtype : {"float32", "float16", "bfloat16", "float64"}, optional
        Convert activations, logits and router scores to this dtype; None keeps the stored dtype, bfloat16 too.
    overwrite : bool
        Replace existing files of these prompts, each as a whole. False leaves them as they are.
    storage_options : mapping, optional
        Passed to the file system of `cache_dir`.
    progress : bool
        Show a progress bar on terminals and in notebooks.

    Returns
    -------
    ExportSummary
        What was written, and what was left out and why.

    Raises
    ------
    ModelNotStoredError, AmbiguousProvenanceError, MissingPromptsError, LayerOutOfRangeError
        Nothing is written.
    InvalidArgumentError
        Nothing is written. Also where lmprobe's format has no name for one of `variables`, or for anything that is stored.
    NoSpaceError, ReadOnlyError
        The files of prompts written before the error are complete.

    Notes
    -----
    No padding is written. A prompt whose text is not stored is written under its hash, but cannot be listed in the manifest. Each
    file appears complete or not at all. Existing files, lines of the manifest and the model's name are never deleted.
    """
    began = time.monotonic()
    source = open_to_read(store)
    if isinstance(prompts, str):
        raise InvalidTypeError("prompts is one text: give a list of texts, hashes or token ids")
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise InvalidArgumentError(f"dtype={dtype!r} is unknown: use one of {', '.join(map(repr, FLOAT_DTYPES))}, or None")
    info = source.find_group(model, provenance=provenance, group=group)
    view = source.view(info)
    rows = np.arange(len(view)) if prompts is None else np.array(list(dict.fromkeys(view.select(prompts).tolist())), np.int64)
    export = ExportRows(view, rows, _export_layers(view, layers), dtype, _chosen_variables(view, variables))
    target = open_storage(cache_dir, storage_options)
    skipped, notes = Tally(), Tally()
    for variable in export.no_place:
        notes.add("variables that lmprobe's format has no place for", variable)
    if any(level == "tokens" and name.startswith("logits") for level, name in export.arrays):
        for level, name in export.arrays:
            if level == "prompts" and name.startswith("logits"):
                notes.add("variables that are left out because the logits of every token contain them", name)
    folder = lmprobe_write.write_model_name(target, info.model) if len(rows) else ""
    known = read_manifest(open_files(target), folder).texts if len(rows) else {}
    # On an object store, one listing saves sending files that exist already; in a local folder each file is checked as it is written.
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
                        skipped.add("prompts that hold nothing of what was requested", export.name(first + i))
                run_all(work, target.pace)
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


def _chosen_variables(view: View, given: str | Iterable[str] | None) -> tuple[str, ...] | None:
    """The variables to write, None for all; an error where lmprobe's format has no name for one, or for any that is stored."""
    stored = list(dict.fromkeys(name for level in LEVELS for name in view.variables(level)))
    there = [name for name in stored if has_place(name)]
    if given is None:
        if stored and not there:
            raise InvalidArgumentError(
                f"lmprobe's format has no name for anything that {view.where} holds ({', '.join(stored)}): {_EXPORTABLE}; "
                "store.copy_to(…) takes the rest to another store"
            )
        return None
    chosen = tuple(list_names("variables", given, "resid"))
    for name in chosen:
        if name not in stored:
            raise InvalidArgumentError(
                f"{name!r:.80} is not stored in {view.where}{nearest(name, stored)}: there is {', '.join(stored) or 'none'}"
            )
        if name not in there:
            raise InvalidArgumentError(
                f"lmprobe's format has no name for {name!r}: {_EXPORTABLE}; of what is stored here, {', '.join(there) or 'none'}"
            )
    if not chosen:
        raise InvalidArgumentError(f"variables is empty: give some of {', '.join(there) or 'none'}, or None for all")
    return chosen


def _export_layers(view: View, layers: LayerSpec | None) -> dict[Level, tuple[int, ...]]:
    held: dict[Level, tuple[int, ...]] = {level: view.layers(level) for level in LEVELS}
    wanted = choose_layers(view.all_layers(), layers, where=view.where, num_layers=view.group.num_layers)
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
