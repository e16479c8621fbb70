"""Activations of prompts as an array for a probe: from the store, from lmprobe's own entries, or by running the model.

If nothing can be stored, one warning says so, and the activations are computed for this call only.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lmprobe_zarr import config
from lmprobe_zarr.batch import (
    ALL,
    NO_CHAT_OPTIONS,
    NO_OUTPUTS,
    ChatOptions,
    LayerSpec,
    OverSpec,
    Stage,
    concat_ranges,
    describe_layers,
    hashes_of,
    offsets_of,
    one_part,
    pooled_name,
    resolve_layers,
)
from lmprobe_zarr.bridges import beside
from lmprobe_zarr.errors import (
    CorruptFileError,
    CorruptPartError,
    InvalidArgumentError,
    NoSpaceError,
    NotAStoreError,
    PartGoneError,
    ReadOnlyError,
    StoreNotFoundError,
)
from lmprobe_zarr.extraction.model_choice import ModelChoice, ModelMemory
from lmprobe_zarr.extraction.models import PROVENANCE_FIELDS
from lmprobe_zarr.extraction.options import Keeping, Options, keeping_of
from lmprobe_zarr.extraction.plan import ExtractStats
from lmprobe_zarr.extraction.request import Request, check_request
from lmprobe_zarr.extraction.run import Outcome, complete, prepare, without_damaged_parts
from lmprobe_zarr.extraction.work import Work
from lmprobe_zarr.log import cache_logger, warn
from lmprobe_zarr.store import Place, Store, open_store
from lmprobe_zarr.store.format import GroupInfo, Level
from lmprobe_zarr.store.parts import read_values
from lmprobe_zarr.sweeps.origin import Origin
from lmprobe_zarr.typing import Array, Ints

__all__ = ["Activations", "Supplied", "Supply", "SupplyMemory", "read_activations"]

# How many times a call reads when parts are evicted or found damaged meanwhile, before it raises an error.
ATTEMPTS: Final = 5
# For each stage, the rows of each distinct prompt in lmprobe's own entries, shape (layer, row, hidden).
Entries = dict[Stage, list[Array]]


@dataclass(frozen=True, slots=True)
class Activations:
    """What a probe learns from or scores.

    Parameters
    ----------
    stage : Stage
        Whether a row is a prompt or a token, and how tokens are pooled.
    features : ndarray of float, shape (row, layer × hidden)
        A row is a prompt or a token; its layers are side by side.
    layers : tuple of int
    n_tokens : ndarray of int, shape (prompt,), optional
        Rows of each prompt, if a row is a token.
    hashes : ndarray of str, shape (prompt,)
    compute_dtype : str, optional
        The dtype that they were computed in, if known.
    weights : mapping of str to str
        What is recorded of the model's weights, as far as it is: ``revision``, ``weights``, ``adapter``.
    """

    stage: Stage
    features: Array
    layers: tuple[int, ...]
    n_tokens: Ints | None
    hashes: npt.NDArray[np.str_]
    compute_dtype: str | None
    weights: Mapping[str, str] = field(default_factory=dict)

    def take(self, rows: Ints) -> Activations:
        """Those of some prompts, by their numbers, which may repeat; the tokens of a prompt stay together."""
        if self.n_tokens is None:
            return replace(self, features=self.features[rows], hashes=self.hashes[rows])
        counts = self.n_tokens[rows]
        tokens = concat_ranges(offsets_of(self.n_tokens)[rows], counts)
        return replace(self, features=self.features[tokens], n_tokens=counts, hashes=self.hashes[rows])


@dataclass(slots=True)
class SupplyMemory:
    """What is remembered from call to call and never saved: the loaded model, the opened store, and places that were warned of."""

    model: ModelMemory = field(default_factory=ModelMemory)
    store: Store | None = None
    warned: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True, kw_only=True)
class Supply:
    """Where a probe's activations come from: which model, which store and how; the fields are those of `lmprobe_zarr.Probe`."""

    choice: ModelChoice
    store: Place
    device: Any
    device_map: Any
    batch_size: int | None
    cache_only: bool
    legacy: str
    group: str | None
    any_provenance: bool
    memory: SupplyMemory
    chat: ChatOptions = NO_CHAT_OPTIONS
    over: OverSpec = ALL

    def activations(self, prompts: list[Any], stage: Stage, layers: LayerSpec, *, refresh: bool = False) -> Activations:
        """The activations of prompts, in their order, repeats included.

        Raises
        ------
        MissingPromptsError
            Some are not stored, and ``cache_only`` forbids running the model.
        PartGoneError
            Parts are removed faster than they can be read.
        others
            As `lmprobe_zarr.extract` does.
        """
        for attempt in range(ATTEMPTS):
            # The first attempt alone refreshes; later ones replace only what was damaged or removed.
            with self.supplied(prompts, (stage,), layers, refresh=refresh and not attempt) as supplied:
                try:
                    return supplied.read_all(stage)
                except (CorruptPartError, PartGoneError) as error:
                    supplied.leave_out(error)
        raise PartGoneError(f"parts went {ATTEMPTS} times while they were read: is the cache's limit smaller than one call needs?")

    @contextmanager
    def supplied(self, prompts: list[Any], stages: Sequence[Stage], layers: LayerSpec, *, refresh: bool = False) -> Iterator[Supplied]:
        """A context in which all that these stages need of the prompts can be read layer by layer; the model is run at most once.

        Raises
        ------
        As `activations` does.
        """
        if self.choice.model is None:
            raise InvalidArgumentError("this probe has no model to run prompts through: give Probe(model=…), or activations")
        store = self._open()
        keeping = keeping_of(is_default=store is None or store.is_default)
        options = Options(
            keeping=keeping, device=self.device, device_map=self.device_map, batch_prompts=self.batch_size, cache_only=self.cache_only,
            progress=False, memory=self.memory.model,
        )  # fmt: skip
        if store is not None and keeping.limit != 0:
            try:
                obtained = self._obtain(self._request(prompts, stages, layers, store, refresh=refresh), options, stages)
            except (ReadOnlyError, NoSpaceError, NotAStoreError) as error:
                if not store.is_default:
                    raise
                self._warn(store.url, error)
            else:
                yield Supplied(self, prompts, *obtained, [store])
                return
        # Nothing may or can be stored: what is missing is written to a store in memory, for this call only.
        with _store_in_memory() as sink:
            stores = [sink] if store is None else [sink, store]
            options = replace(options, keeping=Keeping(precision=keeping.precision), sink=sink)
            obtained = self._obtain(self._request(prompts, stages, layers, stores[-1], refresh=refresh), options, stages)
            yield Supplied(self, prompts, *obtained, stores)

    def _request(self, prompts: list[Any], stages: Sequence[Stage], layers: LayerSpec, store: Store, *, refresh: bool) -> Request:
        pooling = tuple(dict.fromkeys(stage.pooling for stage in stages if not stage.needs_tokens))
        return check_request(
            self.choice, prompts, store, layers=layers, sites=("resid",), pooling=pooling, outputs=NO_OUTPUTS, keep_passed=True,
            over=self.over,
            keep_tokens=any(stage.needs_tokens for stage in stages), refresh=refresh, group=self.group,
            any_provenance=self.any_provenance, chat=self.chat,
        )  # fmt: skip

    def _obtain(self, request: Request, options: Options, stages: Sequence[Stage]) -> tuple[Outcome, Entries | None]:
        """Make sure that all is stored, or find all in lmprobe's own entries, which are searched only if prompts are missing."""

        def attempt() -> tuple[Outcome, Entries | None]:
            work = prepare(request, options)
            entries = self._find_entries(work, stages) if len(work.lookup.missing) else None
            return (complete(work, options), None) if entries is None else (_all_found(work), entries)

        return without_damaged_parts(request.store, attempt)

    def _may_use_entries(self, request: Request) -> bool:
        """Whether lmprobe's own entries may serve the request.

        Of how they were made, only the model's name is known, and that lmprobe computes in float32 by default. So the request must leave
        every other option at its default.
        """
        choice = self.choice
        if self.legacy != "auto" or request.refresh or request.kind != "text" or not choice.by_name:
            return False
        if choice.truncation or not choice.add_special_tokens or self.over != ALL:
            return False
        given = (choice.name, choice.revision, choice.tokenizer, choice.provenance or None, choice.modules, choice.max_length, self.group)
        return all(value is None for value in given) and str(choice.dtype or "float32").removeprefix("torch.") == "float32"

    def _find_entries(self, work: Work, stages: Sequence[Stage]) -> Entries | None:
        """What lmprobe's own entries beside the store hold, if they hold all prompts and layers for all stages."""
        request, prompts, layers = work.lookup.request, work.lookup.prompts, work.lookup.layers
        known = {} if work.lookup.identity is None else work.lookup.identity.provenance
        plain = set(known) <= set(PROVENANCE_FIELDS)  # no autocast, no replaced code
        cache = beside(request.store) if plain and self._may_use_entries(request) else None
        if cache is None:
            return None
        model, texts = os.fspath(self.choice.model), list(prompts.text or ())
        changed = weights_changed_at(model)
        if changed is not None and changed > cache.written_at(model, texts):
            cache_logger().info("[cache] lmprobe's own entries are older than the weights in %s, so none is used", model)
            return None
        entries: Entries = {}
        for stage in stages:
            try:
                pieces, n_held = cache.serve(model, texts, None if stage.needs_tokens else stage.pooling, layers)
            except CorruptFileError as error:
                warn(f"{error}\nlmprobe's own entries are left out")
                return None
            if pieces is None:
                if n_held:
                    cache_logger().info(
                        "[cache] lmprobe's own entries hold %d of %d prompts with all layers, so none is used", n_held, len(texts)
                    )
                return None
            entries[stage] = pieces
        cache_logger().info("[cache] %s: %d hits among lmprobe's own entries, layers %s", model, len(texts), describe_layers(layers))
        return entries

    def _open(self) -> Store | None:
        """The store, or None if the cache cannot be opened.

        The same place always gives the same object, which has read its parts already and knows the damaged ones.
        """
        if isinstance(self.store, Store):
            return self.store
        try:
            opened = open_store(self.store)
        except (NotAStoreError, ReadOnlyError, StoreNotFoundError) as error:
            if self.store is not None:
                raise
            # Go on without a cache.
            self._warn(config.default_name(), error)
            return None
        kept = self.memory.store
        if kept is None or (kept.where, kept.mode, kept.is_default) != (opened.where, opened.mode, opened.is_default):
            self.memory.store = kept = opened
        return kept

    def _warn(self, place: str, error: Exception) -> None:
        """Warn that nothing is stored; only once for each place."""
        if place in self.memory.warned:
            return
        self.memory.warned.add(place)
        variable = "LMPROBE_CACHE_DIR" if config.cache_backend() is None else "LMPROBE_CACHE_BACKEND"
        warn(
            f"nothing is stored in the cache {place} ({str(error).splitlines()[0]})\n"
            f"activations are computed again at every call: make room there, or name another place with {variable}"
        )


@contextmanager
def _store_in_memory() -> Iterator[Store]:
    """An empty store in memory for the duration."""
    sink = open_store(f"memory://lmprobe-zarr-{uuid.uuid4().hex}")
    try:
        yield sink
    finally:
        sink.storage.remove_tree("")


def _all_found(work: Work) -> Outcome:
    """The outcome if lmprobe's own entries hold all prompts, so that nothing had to be done."""
    plan, lookup = work.plan, work.lookup
    group = lookup.group or GroupInfo(model=plan.model)
    stats = ExtractStats(
        model=plan.model, group=group.name, prompts=plan.prompts, found=plan.prompts, derived=plan.derived, extracted=0, tokens=0, nbytes=0,
        parts=0, model_loaded=False, seconds=time.perf_counter() - lookup.began,
    )  # fmt: skip
    return Outcome(stats=stats, prompts=lookup.prompts, layers=lookup.layers, group=group, num_layers=lookup.num_layers)


@dataclass(frozen=True, slots=True)
class Supplied:
    """The requested activations, wherever they are stored, while the context of `Supply.supplied` lasts.

    Parameters
    ----------
    supply : Supply
    prompts : list
        As the caller gave them.
    outcome : Outcome
    entries : dict, optional
        What lmprobe's own entries hold, if they serve the call instead of a store.
    stores : list of Store
        Where to read, in this order; the last one is the store that was searched.
    """

    supply: Supply
    prompts: list[Any]
    outcome: Outcome
    entries: Entries | None
    stores: list[Store]

    def read(self, stage: Stage, layer: int) -> Activations:
        """One layer of all prompts."""
        return self.read_some(stage, layer)

    def numbers(self, layers: LayerSpec) -> tuple[int, ...]:
        """Layer numbers of the model."""
        return resolve_layers(layers, self.outcome.num_layers)

    def read_some(self, stage: Stage, layers: LayerSpec) -> Activations:
        """Some of the requested layers of all prompts, side by side."""
        numbers = self.numbers(layers)
        try:
            if self.entries is not None:
                return _from_entries(self.outcome, self.entries[stage], stage, numbers)
            return read_activations(self.outcome, self.stores, stage, numbers, part=self.part)
        except (CorruptPartError, PartGoneError) as error:
            self.leave_out(error)
            return self.supply.activations(self.prompts, stage, list(numbers))

    def read_all(self, stage: Stage) -> Activations:
        """All layers of all prompts, side by side.

        Raises
        ------
        PartGoneError, CorruptPartError
            A part was removed since, or is damaged.
        """
        if self.entries is not None:
            return _from_entries(self.outcome, self.entries[stage], stage, self.outcome.layers)
        return read_activations(self.outcome, self.stores, stage, self.outcome.layers, part=self.part)

    @property
    def part(self) -> str:
        """The name of the part of the tokens that is pooled."""
        part = one_part(self.supply.over)
        return ALL if part is None else part.name

    def leave_out(self, error: CorruptPartError | PartGoneError) -> None:
        """Go on without what could not be read: other parts serve what it held, or the model is run again."""
        store = self.stores[-1]
        if isinstance(error, CorruptPartError):
            store.set_aside(error)
        else:
            # The part was evicted meanwhile: the next attempt lists the parts again.
            store.forget_all()


def weights_changed_at(model: str) -> float | None:
    """When the weights of a local model were last written, in seconds since 1970; None if `model` is no folder with weights."""
    folder = Path(model).expanduser()
    with suppress(OSError, ValueError):
        times = [path.stat().st_mtime for ending in ("*.safetensors", "*.bin") for path in folder.glob(ending)]
        return max(times, default=None)
    return None


def _from_entries(outcome: Outcome, entries: list[Array], stage: Stage, layers: tuple[int, ...]) -> Activations:
    at = [outcome.layers.index(layer) for layer in layers]
    return _in_order(outcome, {i: entry[at] for i, entry in enumerate(entries)}, stage, layers)


def read_activations(outcome: Outcome, stores: Sequence[Store], stage: Stage, layers: tuple[int, ...], *, part: str = ALL) -> Activations:
    """Layers that an extraction has provided, read from the stores that hold them, in the order of the given prompts.

    What is pooled is pooled over a `part` of the tokens.

    Raises
    ------
    PartGoneError, CorruptPartError
        A part was removed since, or is damaged.
    """
    prompts = outcome.prompts
    level: Level = "tokens" if stage.needs_tokens else "prompts"
    name = "resid" if stage.needs_tokens else pooled_name("resid", stage.pooling, part)
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
    return _in_order(outcome, pieces, stage, layers)


def _in_order(outcome: Outcome, pieces: Mapping[int, Array], stage: Stage, layers: tuple[int, ...]) -> Activations:
    """Values of the distinct prompts, each of shape (layer, row, hidden), as rows in the order of the given prompts."""
    prompts = outcome.prompts
    counts = np.array([pieces[i].shape[1] for i in range(len(prompts))], np.int64)
    joined = np.concatenate([pieces[i] for i in range(len(prompts))], axis=1)
    ordered = joined[:, concat_ranges(offsets_of(counts)[prompts.row], counts[prompts.row])]
    wide = np.float64 if ordered.dtype == np.float64 else np.float32
    features = np.ascontiguousarray(ordered.transpose(1, 0, 2), wide).reshape(ordered.shape[1], -1)
    digests = np.frombuffer(bytes.fromhex("".join(prompts.sha256)), np.uint8).reshape(-1, 32)
    dtype = outcome.group.provenance.get("compute_dtype")
    return Activations(
        stage,
        features,
        layers,
        counts[prompts.row] if stage.needs_tokens else None,
        hashes_of(digests)[prompts.row],
        None if dtype is None else str(dtype),
        Origin.of_group(outcome.group.model, "", outcome.group.provenance).weights,
    )
