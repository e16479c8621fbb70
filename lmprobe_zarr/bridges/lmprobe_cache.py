"""lmprobe's own cache around the default store: finds, describes and reads its entries, and removes them on request.

Their provenance is unknown, so entries are matched by the model's name alone. They serve a call only if they hold all that it needs.
Nothing is written into this cache, and only lmprobe's entries are ever removed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np

from lmprobe_zarr.batch import HASH_DIGITS, offsets_of, pool_ragged, prompt_hash
from lmprobe_zarr.bridges.entry import Entry, Held, Source
from lmprobe_zarr.bridges.files import Files, open_files
from lmprobe_zarr.bridges.lmprobe_folders import ENTRY_FILE, MODEL_FOLDER, ModelFolder, model_hash, read_manifest, scan_models
from lmprobe_zarr.bridges.lmprobe_v1 import LmprobeV1
from lmprobe_zarr.bridges.lmprobe_v2 import LmprobeV2
from lmprobe_zarr.errors import MissingDependencyError
from lmprobe_zarr.storage import FsspecStorage, LocalStorage, Storage
from lmprobe_zarr.store import Model, NamedModel
from lmprobe_zarr.typing import Array

__all__ = ["FoundEntry", "LegacyCache", "LegacyModel", "beside", "known_name"]

_V1_FOLDER: Final = re.compile(r"[0-9a-f]{16}")
_V1_FILE: Final = re.compile(r"(?:attention_mask|perplexity|layer_\d+)\.pt")
_V1_POOLED: Final = re.compile(r"pooled_[a-z_:]+")
_MODEL_FILES: Final = ("_model_name.txt", "_manifest.jsonl")


@dataclass(frozen=True, slots=True)
class FoundEntry:
    """An entry, and the source that reads it."""

    source: Source
    entry: Entry


@dataclass(frozen=True, slots=True, kw_only=True)
class LegacyModel:
    """What lmprobe's cache holds of one model.

    Parameters
    ----------
    name : str
        As lmprobe recorded it, else the name of the folder.
    folder : str
    prompts : int
        Number of prompts.
    nbytes : int
        Bytes of all files.
    layers : int
        Number of layers of the first entry. To describe all entries would take a request for each.
    holds : tuple of Held
        What the first entry holds.
    """

    name: str
    folder: str
    prompts: int
    nbytes: int
    layers: int
    holds: tuple[Held, ...]


class StoreRoot(Protocol):
    """The attributes of a store that are needed to find the cache around it."""

    @property
    def storage(self) -> Storage:
        """Where the store keeps its files."""
        ...

    @property
    def is_default(self) -> bool:
        """Whether it is the default store."""
        ...


def beside(store: StoreRoot) -> LegacyCache | None:
    """Lmprobe's cache around the default store, if that store is the folder ``.zarr`` in it; None for any other store."""
    storage = store.storage
    if not store.is_default or not storage.url.endswith("/.zarr"):
        return None
    if isinstance(storage, LocalStorage):
        return LegacyCache(LocalStorage(storage.root.removesuffix("/.zarr")))
    if isinstance(storage, FsspecStorage):
        cache = type(storage)(storage.filesystem, storage.root.removesuffix("/.zarr"), storage.url.removesuffix("/.zarr"))
        return LegacyCache(cache)
    return None


def known_name(files: Files, model: Model) -> str:
    """The name that lmprobe knows a model by: as it is given, or a path that lmprobe was given and that leads to the same folder."""
    named = NamedModel(model)
    if (named.folder is None and not named.is_path) or files.list(model_hash(named.given)):
        return named.given
    known = (found.model for found in scan_models(files) if isinstance(found, ModelFolder))
    return next((name for name in known if named.is_path_of(name)), named.given)


class LegacyCache:
    """A folder with lmprobe's entries. Nothing is read when it is made.

    Parameters
    ----------
    storage : Storage
        The folder.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.files: Files = open_files(storage)

    # -------------------------------------------------------------------------------------------------------- finding

    def find(self, model: Model, prompts: Sequence[str]) -> list[FoundEntry | None]:
        """The entry of each prompt, in format v2 or else v1; None if no entry of it can be read."""
        model = known_name(self.files, model)
        folder = model_hash(model)
        listed = self.files.list(folder)
        found: list[FoundEntry | None] = [None] * len(prompts)
        if any(ENTRY_FILE.fullmatch(item.name) for item in listed):
            source = LmprobeV2(self.files, model)
            found = [_first(source, items) for items in source.find(prompts)]
        absent = [i for i, entry in enumerate(found) if entry is None]
        if absent and any(item.is_folder and not item.outside for item in listed):
            older = LmprobeV1(self.files, model)
            try:
                for i, items in zip(absent, older.find([prompts[i] for i in absent]), strict=True):
                    found[i] = _first(older, items)
            except MissingDependencyError:
                pass  # old entries are torch's own files, which cannot be read without torch
        return found

    def models(self, model: Model | None = None) -> list[LegacyModel]:
        """Every model of the cache, or the one that is given, from listings and the header of one entry per model."""
        only = None if model is None else known_name(self.files, model)
        named = {found.folder: found.model for found in scan_models(self.files) if isinstance(found, ModelFolder)}
        models = []
        for item in self.files.list(""):
            if MODEL_FOLDER.fullmatch(item.name) and item.is_folder and not item.outside:
                described = self._describe(item.name, named.get(item.name))
                if described.prompts and only in (None, described.name):
                    models.append(described)
        return models

    def _describe(self, folder: str, name: str | None) -> LegacyModel:
        sizes: dict[str, int] = {}
        for key, nbytes in self._entry_files(folder):
            prompt = key.split("/")[1][:16]
            sizes[prompt] = sizes.get(prompt, 0) + nbytes
        holds: tuple[Held, ...] = ()
        if name is not None and sizes:
            first = self.find(name, [next(iter(sizes))])[0]
            holds = () if first is None else first.entry.holds
        layers = {layer for held in holds for layer in held.layers or ()}
        shown = name or f"(folder {folder})"
        return LegacyModel(name=shown, folder=folder, prompts=len(sizes), nbytes=sum(sizes.values()), layers=len(layers), holds=holds)

    def texts(self, model: Model) -> dict[str, str | None]:
        """The prompts of a model in format v2: text by hash, None if lmprobe did not record the text."""
        folder = model_hash(known_name(self.files, model))
        recorded = read_manifest(self.files, folder).texts
        hashes = dict.fromkeys(match[1] for item in self.files.list(folder) if (match := ENTRY_FILE.fullmatch(item.name)))
        return {label: recorded.get(label) for label in hashes}

    def hashes(self, model: Model) -> frozenset[str]:
        """The hashes of a model's prompts of which there is any file, from one list."""
        names = (item.name for item in self.files.list(model_hash(known_name(self.files, model))) if not item.outside)
        return frozenset(name[:HASH_DIGITS] for name in names if ENTRY_FILE.fullmatch(name) or _V1_FOLDER.fullmatch(name))

    # -------------------------------------------------------------------------------------------------------- reading

    def serve(self, model: Model, prompts: Sequence[str], pooling: str | None, layers: tuple[int, ...]) -> tuple[list[Array] | None, int]:
        """The blocks' output for every prompt, if this cache holds all of the prompts with all layers.

        Parameters
        ----------
        model : str or path
            As it was given to lmprobe, or the same folder.
        prompts : sequence of str
            Texts.
        pooling : str, optional
            None for every token.
        layers : tuple of int

        Returns
        -------
        pieces : list of ndarray, shape (layer, row, hidden), or None
            One per prompt, with one row per token or a single pooled row; None if a prompt or a layer is missing.
        held : int
            How many of the prompts this cache holds with all layers.
        """
        found = [entry for entry in self.find(model, prompts) if entry is not None]
        planned = [(entry, plan) for entry in found if (plan := _plan_read(entry.entry, pooling, layers)) is not None]
        if len(planned) < len(prompts):
            return None, len(planned)
        together: dict[tuple[int, tuple[Held, ...], bool], list[int]] = {}
        for i, (entry, plan) in enumerate(planned):
            together.setdefault((id(entry.source), *plan), []).append(i)
        pieces: dict[int, Array] = {}
        for (_, holds, pool), members in together.items():
            entries = [found[i].entry for i in members]
            by_layer: dict[int, Array] = {}
            for held in holds:
                batch = found[members[0]].source.read(entries, (held,))
                values = (batch.prompts if held.level == "prompts" else batch.tokens)[held.variable]
                by_layer |= dict(zip(held.layers or (), values, strict=True))
            joined = np.stack([by_layer[layer] for layer in layers])
            counts = np.array([1 if holds[0].level == "prompts" else member.n_tokens for member in entries], np.int64)
            if pool and pooling is not None:
                joined, counts = pool_ragged(joined, counts, pooling), np.ones(len(entries), np.int64)
            bounds = offsets_of(counts)
            pieces |= {i: joined[:, a:b] for i, a, b in zip(members, bounds[:-1], bounds[1:], strict=True)}
        return [pieces[i] for i in range(len(prompts))], len(prompts)

    def written_at(self, model: Model, prompts: Sequence[str]) -> float:
        """When the oldest of the prompts' files was written, in seconds since 1970; infinity if the file system does not say."""
        wanted = {prompt_hash(prompt) for prompt in prompts}
        listed = self.storage.scan(model_hash(known_name(self.files, model)))
        times = [entry.modified for name, entry in listed.items() if name[:16] in wanted and entry.modified is not None]
        return min(times, default=float("inf"))

    # ------------------------------------------------------------------------------------------------------- clearing

    def clear(self, model: Model | None = None) -> int:
        """Remove lmprobe's entries, all or those of one model; returns the number of their prompts."""
        count, only = 0, None if model is None else model_hash(known_name(self.files, model))
        for item in self.files.list(""):
            wanted = only in (None, item.name)
            if not (wanted and MODEL_FOLDER.fullmatch(item.name) and item.is_folder and not item.outside):
                continue
            entries = [key for key, _ in self._entry_files(item.name)]
            if not entries:
                continue
            self.storage.remove(entries)
            self.storage.remove([f"{item.name}/{name}" for name in _MODEL_FILES])
            count += len({key.split("/")[1][:16] for key in entries})
        return count

    def _entry_files(self, folder: str) -> list[tuple[str, int]]:
        """Keys and sizes of all files of a model that belong to lmprobe's entries."""
        found, scanned = [], self.storage.scan(folder)
        for item in self.files.list(folder):
            if item.outside or item.name not in scanned:
                continue
            if ENTRY_FILE.fullmatch(item.name) and not item.is_folder:
                found.append((f"{folder}/{item.name}", scanned[item.name].nbytes))
            elif item.is_folder and _V1_FOLDER.fullmatch(item.name):
                found += self._v1_files(f"{folder}/{item.name}", pooled=True)
        return found

    def _v1_files(self, folder: str, *, pooled: bool) -> list[tuple[str, int]]:
        found, scanned = [], self.storage.scan(folder)
        for item in self.files.list(folder):
            if item.outside or item.name not in scanned:
                continue
            if _V1_FILE.fullmatch(item.name) and not item.is_folder:
                found.append((f"{folder}/{item.name}", scanned[item.name].nbytes))
            elif pooled and item.is_folder and _V1_POOLED.fullmatch(item.name):
                found += self._v1_files(f"{folder}/{item.name}", pooled=False)
        return found


def _first(source: Source, items: Sequence[Any] | None) -> FoundEntry | None:
    return next((FoundEntry(source, item) for item in items or () if isinstance(item, Entry)), None)


def _plan_read(entry: Entry, pooling: str | None, layers: tuple[int, ...]) -> tuple[tuple[Held, ...], bool] | None:
    """What to read of an entry, and whether its tokens have to be pooled; None if a layer is missing."""
    if pooling is not None and (holds := entry.covering("prompts", f"resid_{pooling}", layers)):
        return holds, False
    holds = entry.covering("tokens", "resid", layers)
    return None if not holds else (holds, pooling is not None)
