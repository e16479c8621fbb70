"""Activations of prompts as an array, whatever it takes: from the store, from its tokens, or by running the model and keeping what it says.

Stands between who wants values (`probe`) and who fills stores (`build`). Where nothing can be kept it says so once and goes on.
"""

from __future__ import annotations

import os
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from lmprobe_zarr import config
from lmprobe_zarr.build import Keeping, ModelMemory, Outcome, Running, carry_out, keeping_of
from lmprobe_zarr.errors import (
    CacheWarning,
    CorruptFileError,
    CorruptPartError,
    InvalidArgumentError,
    NoSpaceError,
    NotAStoreError,
    PartGoneError,
    ReadOnlyError,
)
from lmprobe_zarr.extraction import Prompts
from lmprobe_zarr.layers import LayerSpec, describe_layers
from lmprobe_zarr.legacy import beside
from lmprobe_zarr.log import cache_logger
from lmprobe_zarr.missing import check_request
from lmprobe_zarr.precision import Precision
from lmprobe_zarr.probes.stages import Stage
from lmprobe_zarr.ragged import concat_ranges, offsets_of
from lmprobe_zarr.reread import read_values
from lmprobe_zarr.schema import Level, Provenance
from lmprobe_zarr.sites import NO_OUTPUTS
from lmprobe_zarr.store import Place, Store, open_store
from lmprobe_zarr.view import hashes_of

if TYPE_CHECKING:
    import torch

__all__ = ["Activations", "Supply", "SupplyMemory", "read_activations"]

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]

# A part that is evicted or found damaged under a call is looked for again; more often than this something is wrong.
ATTEMPTS: Final = 5
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
    """

    features: Array
    layers: tuple[int, ...]
    n_tokens: Ints | None
    hashes: npt.NDArray[np.str_]


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
    memory: SupplyMemory

    def warm_up(self, prompts: list[Any], stages: Sequence[Stage], layers: LayerSpec, *, refresh: bool = False) -> Outcome:
        """See that everything which these stages need of the prompts is stored, and say what it took."""
        with self._extracted(prompts, stages, layers, refresh=refresh) as (outcome, _):
            return outcome

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
            with self._extracted(prompts, (stage,), layers, refresh=refresh and not attempt) as (outcome, stores):
                try:
                    return read_activations(outcome, stores, stage)
                except CorruptPartError as error:
                    # Left out from now on; other parts serve what it held, or the model is run again.
                    stores[-1].set_aside(error)
                except PartGoneError:
                    # Evicted between the two looks: the next one finds what is there now, and the model makes up for the rest.
                    stores[-1].forget_all()
        raise PartGoneError(f"parts went {ATTEMPTS} times while they were read: is the cache's limit smaller than one call needs?")

    @contextmanager
    def _extracted(
        self, prompts: list[Any], stages: Sequence[Stage], layers: LayerSpec, *, refresh: bool
    ) -> Iterator[tuple[Outcome, list[Store]]]:
        """What an extraction did, and where all of it can be read for the duration: the store last."""
        if self.model is None:
            raise InvalidArgumentError("this probe has no model to run prompts through: give Probe(model=…), or activations")
        store = self._open()
        request = check_request(
            model=self.model, prompts=prompts, store=store, layers=layers, sites=("resid",),
            pooling=tuple(dict.fromkeys(stage.pooling for stage in stages if not stage.needs_tokens)),
            keep_tokens=any(stage.needs_tokens for stage in stages), outputs=NO_OUTPUTS, keep_passed=True, name=self.name,
            tokenizer=self.tokenizer, revision=self.revision, dtype=self.dtype, max_length=self.max_length, truncation=self.truncation,
            refresh=refresh, provenance=self.provenance, modules=self.modules, trust_remote_code=self.trust_remote_code,
        )  # fmt: skip
        running = Running(device=self.device, device_map=self.device_map, batch_prompts=self.batch_size, progress=False)
        keeping = keeping_of(store, Precision())
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
            yield outcome, [store]
            return
        # Nothing may be stored, or can be: what is missing goes into memory, for this call only.
        sink = open_store(f"memory://lmprobe-zarr-{uuid.uuid4().hex}")
        try:
            yield carry_out(request, Keeping(precision=keeping.precision), running, sink=sink, **options), [sink, store]
        finally:
            sink.storage.remove_tree("")

    def _lmprobes(self, store: Store, stages: Sequence[Stage]) -> Callable[[Prompts, tuple[int, ...]], list[list[Array]] | None] | None:
        """What looks into lmprobe's own entries beside the store; None where they cannot be what is meant.

        Nothing is known of how they came about but the model's name and lmprobe's default, float32.
        """
        cache = beside(store) if self.legacy == "auto" and isinstance(self.model, (str, os.PathLike)) else None
        named = (self.name, self.revision, self.tokenizer, self.provenance, self.modules, self.max_length)
        if cache is None or any(one is not None for one in named) or self.truncation:
            return None
        if self.dtype is not None and str(self.dtype).removeprefix("torch.") != "float32":
            return None
        model = os.fspath(self.model)  # type: ignore[arg-type]

        def serve(prompts: Prompts, layers: tuple[int, ...]) -> list[list[Array]] | None:
            texts = list(prompts.text or ())
            served = []
            for stage in stages:
                try:
                    pieces, held = cache.serve(model, texts, None if stage.needs_tokens else stage.pooling, layers)
                except CorruptFileError as error:
                    warnings.warn(f"{error}\nlmprobe's own entries are left out", CacheWarning, stacklevel=2)
                    return None
                if pieces is None:
                    if held:
                        cache_logger().info(
                            "[cache] lmprobe's own entries hold %d of %d prompts with all layers, so none is used", held, len(texts)
                        )
                    return None
                served.append(pieces)
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
        warnings.warn(
            f"nothing is stored in the cache {place} ({str(error).splitlines()[0]})\n"
            f"activations are computed again at every call: make room there, or name another place with {variable}",
            CacheWarning,
            stacklevel=3,
        )


def read_activations(outcome: Outcome, stores: Sequence[Store], stage: Stage) -> Activations:
    """What an extraction has made sure of, from the places that hold it, in the order of the given prompts.

    Raises
    ------
    PartGoneError, CorruptPartError
        A part has gone since, or is damaged.
    """
    prompts, layers = outcome.prompts, outcome.layers
    if outcome.elsewhere is not None:
        return _in_order(outcome, dict(enumerate(outcome.elsewhere[0])), stage)
    level: Level = "tokens" if stage.needs_tokens else "prompts"
    name = "resid" if stage.needs_tokens else f"resid_{stage.pooling}"
    pieces: dict[int, Array] = {}
    for store in stores:
        info = store.groups().get(outcome.group.name)
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
    return Activations(features, layers, counts[prompts.row] if stage.needs_tokens else None, hashes_of(digests)[prompts.row])
