"""Activations of prompts as an array, whatever it takes: from the store, from its tokens, or by running the model and keeping what it says.

Stands between who wants values (`probe`) and who fills stores (`build`). Where nothing can be kept it says so once and goes on.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from lmprobe_zarr import config
from lmprobe_zarr.batch import NO_OUTPUTS, LayerSpec, Stage, concat_ranges, describe_layers, hashes_of, offsets_of
from lmprobe_zarr.bridges import beside
from lmprobe_zarr.errors import (
    CorruptFileError,
    CorruptPartError,
    InvalidArgumentError,
    NoSpaceError,
    NotAStoreError,
    PartGoneError,
    ReadOnlyError,
)
from lmprobe_zarr.extraction.models import Prompts
from lmprobe_zarr.extraction.request import check_request
from lmprobe_zarr.extraction.run import Keeping, ModelMemory, Outcome, Running, carry_out, keeping_of
from lmprobe_zarr.log import cache_logger, warn
from lmprobe_zarr.store import Place, Store, open_store
from lmprobe_zarr.store.format import Level, Provenance
from lmprobe_zarr.store.parts import read_values
from lmprobe_zarr.typing import Array, Ints

if TYPE_CHECKING:
    import torch

__all__ = ["Activations", "Supplied", "Supply", "SupplyMemory", "read_activations"]

# A part that is evicted or found damaged under a call is looked for again; more often than this something is wrong.
ATTEMPTS: Final = 5
# Of each stage: which layers, and of each prompt (layer, row, hidden).
Elsewhere = dict[Stage, tuple[tuple[int, ...], list[Array]]]
# Stands for a cache that cannot even be looked into.
NOTHING: Final = "memory://lmprobe-zarr-nothing"


@dataclass(frozen=True, slots=True)
class Activations:
    """What a probe learns from or scores.

    Parameters
    ----------
    features : ndarray of float, shape (row, layer × hidden)
        A row is a prompt or a token; the layers of a row stand side by side.
    layers : tuple of int
    n_tokens : ndarray of int, shape (prompt,), optional
        Rows of each prompt, where a row is a token.
    hashes : ndarray of str, shape (prompt,)
    compute_dtype : str, optional
        What they were computed in, where that is known.
    """

    features: Array
    layers: tuple[int, ...]
    n_tokens: Ints | None
    hashes: npt.NDArray[np.str_]
    compute_dtype: str | None


@dataclass(slots=True)
class SupplyMemory:
    """What is remembered from call to call and never saved: the loaded model, the opened store, and what was warned of."""

    model: ModelMemory = field(default_factory=ModelMemory)
    store: Store | None = None
    warned: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True, kw_only=True)
class Supply:
    """Which model, which store and how; the fields are those of `lmprobe_zarr.Probe`."""

    model: str | os.PathLike[str] | torch.nn.Module | None
    store: Place
    dtype: Any
    device: Any
    device_map: Any
    batch_size: int | None
    cache_only: bool
    name: str | None
    tokenizer: Any
    revision: str | None
    max_length: int | None
    truncation: bool
    provenance: Provenance | None
    modules: Mapping[str, str] | None
    trust_remote_code: bool
    legacy: str
    group: str | None
    memory: SupplyMemory

    def activations(self, prompts: list[Any], stage: Stage, layers: LayerSpec, *, refresh: bool = False) -> Activations:
        """The activations of prompts, in their order, repeats included.

        Raises
        ------
        MissingPromptsError
            Some are not stored, and ``cache_only`` says not to run the model.
        PartGoneError
            Parts go faster than they can be read.
        others
            As `lmprobe_zarr.extract` does.
        """
        for attempt in range(ATTEMPTS):
            # Anew only the first time: what is looked for after that was damaged, or has gone.
            with self.supplied(prompts, (stage,), layers, refresh=refresh and not attempt) as supplied:
                try:
                    return read_activations(supplied.outcome, supplied.stores, stage)
                except (CorruptPartError, PartGoneError) as error:
                    supplied.leave_out(error)
        raise PartGoneError(f"parts went {ATTEMPTS} times while they were read: is the cache's limit smaller than one call needs?")

    @contextmanager
    def supplied(self, prompts: list[Any], stages: Sequence[Stage], layers: LayerSpec, *, refresh: bool = False) -> Iterator[Supplied]:
        """All that these stages need of the prompts, to be read layer by layer for the duration; the model is run at most once.

        Raises
        ------
        As `activations` does.
        """
        if self.model is None:
            raise InvalidArgumentError("this probe has no model to run prompts through: give Probe(model=…), or activations")
        store = self._open()
        request = check_request(
            model=self.model, prompts=prompts, store=store, layers=layers, sites=("resid",),
            pooling=tuple(dict.fromkeys(stage.pooling for stage in stages if not stage.needs_tokens)),
            keep_tokens=any(stage.needs_tokens for stage in stages), outputs=NO_OUTPUTS, keep_passed=True, name=self.name,
            tokenizer=self.tokenizer, revision=self.revision, dtype=self.dtype, max_length=self.max_length, truncation=self.truncation,
            refresh=refresh, provenance=self.provenance, modules=self.modules, trust_remote_code=self.trust_remote_code,
            group=self.group,
        )  # fmt: skip
        running = Running(device=self.device, device_map=self.device_map, batch_prompts=self.batch_size, progress=False)
        keeping = keeping_of(store)
        options: dict[str, Any] = {"memory": self.memory.model, "cache_only": self.cache_only}
        if not refresh and request.kind == "text":
            options["elsewhere"] = self._lmprobes(store, stages)
        outcome = None
        if keeping.limit != 0:
            try:
                outcome = carry_out(request, keeping, running, **options)
            except (ReadOnlyError, NoSpaceError, NotAStoreError) as error:
                if not store.is_default:
                    raise
                self._warn(store.url, error)
        if outcome is not None:
            yield Supplied(self, prompts, outcome, [store])
            return
        # Nothing may be stored, or can be: what is missing goes into memory, for this call only.
        sink = open_store(f"memory://lmprobe-zarr-{uuid.uuid4().hex}")
        try:
            outcome = carry_out(request, Keeping(precision=keeping.precision), running, sink=sink, **options)
            yield Supplied(self, prompts, outcome, [sink, store])
        finally:
            sink.storage.remove_tree("")

    def _lmprobes(self, store: Store, stages: Sequence[Stage]) -> Callable[[Prompts, tuple[int, ...]], Elsewhere | None] | None:
        """What looks into lmprobe's own entries beside the store; None where they cannot be what is meant.

        Nothing is known of how they came about but the model's name and lmprobe's default, float32.
        """
        cache = beside(store) if self.legacy == "auto" and isinstance(self.model, (str, os.PathLike)) else None
        named = (self.name, self.revision, self.tokenizer, self.provenance, self.modules, self.max_length, self.group)
        if cache is None or any(one is not None for one in named) or self.truncation:
            return None
        if self.dtype is not None and str(self.dtype).removeprefix("torch.") != "float32":
            return None
        model = os.fspath(self.model)  # type: ignore[arg-type]
        changed = weights_changed_at(model)

        def serve(prompts: Prompts, layers: tuple[int, ...]) -> Elsewhere | None:
            texts = list(prompts.text or ())
            if changed is not None and changed > cache.written_at(model, texts):
                cache_logger().info("[cache] lmprobe's own entries are older than the weights in %s, so none is used", model)
                return None
            served = {}
            for stage in stages:
                try:
                    pieces, held = cache.serve(model, texts, None if stage.needs_tokens else stage.pooling, layers)
                except CorruptFileError as error:
                    warn(f"{error}\nlmprobe's own entries are left out")
                    return None
                if pieces is None:
                    if held:
                        cache_logger().info(
                            "[cache] lmprobe's own entries hold %d of %d prompts with all layers, so none is used", held, len(texts)
                        )
                    return None
                served[stage] = layers, pieces
            cache_logger().info("[cache] %s: %d hits among lmprobe's own entries, layers %s", model, len(texts), describe_layers(layers))
            return served

        return serve

    def _open(self) -> Store:
        """The store; while it lies at the same place always the same object, which knows its parts already, and the damaged ones."""
        if isinstance(self.store, Store):
            return self.store
        try:
            opened = open_store(self.store)
        except (NotAStoreError, ReadOnlyError) as error:
            if self.store is not None:
                raise
            # Computing goes on without a cache.
            self._warn(str(config.default_root()), error)
            opened = Store(open_store(NOTHING).storage, mode="r", is_default=True)
        kept = self.memory.store
        if kept is None or (kept.where, kept.mode, kept.is_default) != (opened.where, opened.mode, opened.is_default):
            self.memory.store = kept = opened
        return kept

    def _warn(self, place: str, error: Exception) -> None:
        if place == NOTHING or place in self.memory.warned:
            return
        self.memory.warned.add(place)
        variable = "LMPROBE_CACHE_DIR" if config.cache_backend() is None else "LMPROBE_CACHE_BACKEND"
        warn(
            f"nothing is stored in the cache {place} ({str(error).splitlines()[0]})\n"
            f"activations are computed again at every call: make room there, or name another place with {variable}"
        )


@dataclass(frozen=True, slots=True)
class Supplied:
    """What was asked for, wherever it lies, while the context of `Supply.supplied` lasts."""

    supply: Supply
    prompts: list[Any]
    outcome: Outcome
    stores: list[Store]

    def read(self, stage: Stage, layer: int) -> Activations:
        """One layer of all prompts."""
        try:
            return read_activations(replace(self.outcome, layers=(layer,)), self.stores, stage)
        except (CorruptPartError, PartGoneError) as error:
            self.leave_out(error)
            return self.supply.activations(self.prompts, stage, [layer])

    def leave_out(self, error: CorruptPartError | PartGoneError) -> None:
        """Go on without what could not be read: other parts serve what it held, or the model is run again."""
        store = self.stores[-1]
        if isinstance(error, CorruptPartError):
            store.set_aside(error)
        else:
            # Evicted between two looks: the next one finds what is there now.
            store.forget_all()


def weights_changed_at(model: str) -> float | None:
    """When the weights of a local model were last written, in seconds since 1970; None for what is no folder with weights."""
    folder = Path(model).expanduser()
    with suppress(OSError, ValueError):
        times = [path.stat().st_mtime for ending in ("*.safetensors", "*.bin") for path in folder.glob(ending)]
        return max(times, default=None)
    return None


def read_activations(outcome: Outcome, stores: Sequence[Store], stage: Stage) -> Activations:
    """What an extraction has made sure of, from the places that hold it, in the order of the given prompts.

    Raises
    ------
    PartGoneError, CorruptPartError
        A part has gone since, or is damaged.
    """
    prompts, layers = outcome.prompts, outcome.layers
    if outcome.elsewhere is not None:
        held, pieces_there = outcome.elsewhere[stage]
        at = [held.index(layer) for layer in layers]
        return _in_order(outcome, {i: piece[at] for i, piece in enumerate(pieces_there)}, stage)
    level: Level = "tokens" if stage.needs_tokens else "prompts"
    name = "resid" if stage.needs_tokens else f"resid_{stage.pooling}"
    pieces: dict[int, Array] = {}
    for store in stores:
        info = store.groups(whole=False).get(outcome.group.name)
        if info is None:
            continue
        view = store.view(info, whole=False)
        rows = view.find(prompts.sha256)
        places = np.array([i for i in np.flatnonzero(rows >= 0) if i not in pieces], np.int64)
        places = places[np.asarray(view.covers(level, name, rows[places], layers).all(axis=0))]
        if not len(places):
            continue
        values = read_values(view, level, name, rows[places], layers)
        counts = view.token_counts()[rows[places]] if stage.needs_tokens else np.ones(len(places), np.int64)
        bounds = offsets_of(counts)
        pieces |= {int(i): values[:, a:b] for i, a, b in zip(places, bounds[:-1], bounds[1:], strict=True)}
    absent = len(prompts) - len(pieces)
    if absent:
        raise PartGoneError(f"{absent} of {len(prompts)} prompts went from {stores[-1].where} while they were read: call again")
    return _in_order(outcome, pieces, stage)


def _in_order(outcome: Outcome, pieces: Mapping[int, Array], stage: Stage) -> Activations:
    """What was read of the different prompts, (layer, row, hidden) each, as rows in the order of the given ones."""
    prompts, layers = outcome.prompts, outcome.layers
    counts = np.array([pieces[i].shape[1] for i in range(len(prompts))], np.int64)
    joined = np.concatenate([pieces[i] for i in range(len(prompts))], axis=1)
    ordered = joined[:, concat_ranges(offsets_of(counts)[prompts.row], counts[prompts.row])]
    wide = np.float64 if ordered.dtype == np.float64 else np.float32
    features = np.ascontiguousarray(ordered.transpose(1, 0, 2), wide).reshape(ordered.shape[1], -1)
    digests = np.frombuffer(bytes.fromhex("".join(prompts.sha256)), np.uint8).reshape(-1, 32)
    dtype = outcome.group.provenance.get("compute_dtype")
    return Activations(
        features,
        layers,
        counts[prompts.row] if stage.needs_tokens else None,
        hashes_of(digests)[prompts.row],
        None if dtype is None else str(dtype),
    )
