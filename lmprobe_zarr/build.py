"""What is missing → run the model → write → commit. The one place that knows both models and stores."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lmprobe_zarr import config, extraction
from lmprobe_zarr.batch import TokenBatch
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, NoSpaceError
from lmprobe_zarr.extraction import ModelIdentity, Prompts, TokenizedPrompts
from lmprobe_zarr.ingest import PART_BYTES, PART_SECONDS, Ingest
from lmprobe_zarr.layers import LayerSpec, resolve_layers
from lmprobe_zarr.pooling import parse_poolings
from lmprobe_zarr.reader import View, describe_layers
from lmprobe_zarr.schema import UNLAYERED_SITES, GroupInfo, Level, Provenance, validate_column_names
from lmprobe_zarr.store import Store, annotation_batch, open_store
from lmprobe_zarr.writer import as_column

if TYPE_CHECKING:
    import torch

    from lmprobe_zarr.extraction import LoadedModel

__all__ = ["ExtractPlan", "ExtractStats", "extract", "plan_extract"]

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]
Columns = Mapping[str, Sequence[Any] | Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractPlan:
    """What an extraction would do. Printing it shows it as a table.

    Parameters
    ----------
    model : str
        Name of the model in the store.
    url : str
        The store.
    prompts : int
        Different prompts asked for.
    found : int
        Of these, how many are stored with everything that is asked for.
    tokens : int
        Tokens of the missing prompts.
    layers : tuple of int
        Layers asked for.
    variables : tuple of str
        What would be stored per prompt and per token.
    dtype : str
        The dtype computed in, and stored.
    nbytes : int
        Bytes of the missing activations before compression.
    free_bytes : int, optional
        Bytes that the store's place has left; None where it does not tell.
    """

    model: str
    url: str
    prompts: int
    found: int
    tokens: int
    layers: tuple[int, ...]
    variables: tuple[str, ...]
    dtype: str
    nbytes: int
    free_bytes: int | None

    @property
    def missing(self) -> int:
        """Prompts that the model has to be run on."""
        return self.prompts - self.found

    @property
    def fits(self) -> bool:
        """Whether the missing activations fit on the store's place, uncompressed."""
        return self.free_bytes is None or self.nbytes <= self.free_bytes

    def __str__(self) -> str:
        free = "unknown" if self.free_bytes is None else format_bytes(self.free_bytes)
        rows = {
            "model": self.model,
            "store": self.url,
            "prompts": f"{self.prompts} ({self.found} found, {self.missing} to extract)",
            "tokens": f"{self.tokens} to run",
            "layers": describe_layers(self.layers),
            "variables": ", ".join(self.variables),
            "size": f"{format_bytes(self.nbytes)} of {self.dtype}, before compression",
            "free": f"{free}{'' if self.fits else ', which is too little'}",
        }
        return "\n".join(f"{name:<10}{value}" for name, value in rows.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractStats:
    """What an extraction did.

    Parameters
    ----------
    model, group : str
        Name of the model, and the group of the store that holds it.
    prompts : int
        Different prompts asked for.
    found : int
        Of these, how many were stored already.
    extracted : int
        Of these, how many the model was run on.
    tokens : int
        Tokens of the latter.
    nbytes : int
        Bytes of activations written, before compression.
    parts : int
        Parts committed.
    model_loaded : bool
        Whether the model's weights were needed at all.
    seconds : float
        From call to return.
    """

    model: str
    group: str
    prompts: int
    found: int
    extracted: int
    tokens: int
    nbytes: int
    parts: int
    model_loaded: bool
    seconds: float

    @property
    def hit_rate(self) -> float:
        """Share of the prompts that were stored already."""
        return self.found / self.prompts

    def __str__(self) -> str:
        loaded = "" if self.model_loaded else "; the model was not loaded"
        return (
            f"{self.model}: {self.prompts} prompts, {self.found} found in the store, {self.extracted} extracted "
            f"({self.tokens} tokens, {format_bytes(self.nbytes)}) in {self.seconds:.1f} s{loaded}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """What is asked for, checked, with the model and the prompts as the caller gave them."""

    model: Any
    given: list[Any]
    kind: extraction.PromptKind
    store: Store
    layers: LayerSpec
    sites: tuple[str, ...]
    poolings: tuple[str, ...]
    keep_tokens: bool
    name: str | None
    tokenizer: Any
    revision: str | None
    dtype: Any
    max_length: int | None
    truncation: bool
    refresh: bool
    provenance: Provenance
    trust_remote_code: bool

    @property
    def by_name(self) -> bool:
        """Whether the model is named, so that it need not be loaded to be known."""
        return isinstance(self.model, (str, os.PathLike))

    def wanted(self, layers: tuple[int, ...]) -> list[tuple[Level, str, tuple[int, ...]]]:
        """Every variable asked for: its level, its name and its layers."""
        found: list[tuple[Level, str, tuple[int, ...]]] = []
        for site in self.sites:
            held = () if site in UNLAYERED_SITES else layers
            found += [("prompts", f"{site}_{pooling}", held) for pooling in self.poolings]
            found += [("tokens", site, held)] if self.keep_tokens else []
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lookup:
    """What is asked for, and the stored group that may hold it already."""

    identity: ModelIdentity | None
    prompts: Prompts
    group: GroupInfo | None
    view: View | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """Places among the different prompts of those that are missing, and their tokens (None where none is)."""

    missing: Ints
    tokenized: TokenizedPrompts | None


def plan_extract(
    model: str | os.PathLike[str] | torch.nn.Module,
    prompts: Iterable[Any],
    *,
    store: Store | str | os.PathLike[str] | None = None,
    layers: LayerSpec = "all",
    sites: str | Sequence[str] = ("resid",),
    pooling: str | Sequence[str] = ("last_token",),
    keep_tokens: bool = False,
    name: str | None = None,
    tokenizer: Any = None,
    revision: str | None = None,
    dtype: Any = "auto",
    max_length: int | None = None,
    truncation: bool = False,
    refresh: bool = False,
    provenance: Provenance | None = None,
    trust_remote_code: bool = False,
) -> ExtractPlan:
    """What `extract` would do with the same arguments; loads a tokenizer at most, and writes nothing.

    Returns
    -------
    ExtractPlan
        Prompts found and missing, tokens, bytes, free space; prints as a table.

    Raises
    ------
    As `extract` does before it loads the model.
    """
    opened = store if isinstance(store, Store) else open_store(store)
    request = _check_request(
        model=model, prompts=prompts, store=opened, layers=layers, sites=sites, pooling=pooling, keep_tokens=keep_tokens, name=name,
        tokenizer=tokenizer, revision=revision, dtype=dtype, max_length=max_length, truncation=truncation, refresh=refresh,
        provenance=provenance, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    loaded = None if request.by_name else _load(request, device="auto", device_map=None, modules=None)
    looked = _look_up(request) if loaded is None else _look_up_loaded(request, loaded)
    return _plan(request, looked, loaded)[0]


def extract(
    model: str | os.PathLike[str] | torch.nn.Module,
    prompts: Iterable[Any],
    *,
    store: Store | str | os.PathLike[str] | None = None,
    layers: LayerSpec = "all",
    sites: str | Sequence[str] = ("resid",),
    pooling: str | Sequence[str] = ("last_token",),
    keep_tokens: bool = False,
    coords: Columns | None = None,
    name: str | None = None,
    tokenizer: Any = None,
    revision: str | None = None,
    dtype: Any = "auto",
    device: Any = "auto",
    device_map: Any = None,
    batch_tokens: int | None = None,
    max_length: int | None = None,
    truncation: bool = False,
    refresh: bool = False,
    provenance: Provenance | None = None,
    modules: Mapping[str, str] | None = None,
    trust_remote_code: bool = False,
    store_text: bool = True,
    part_bytes: int = PART_BYTES,
    part_seconds: float = PART_SECONDS,
    progress: bool = True,
) -> ExtractStats:
    """Run a model over the prompts that are not stored yet, and store their activations.

    Parameters
    ----------
    model : str, path or torch Module
        A hub id, a folder that ``save_pretrained`` wrote, or a loaded model (PEFT, quantised, edited in memory; then `name` and
        `tokenizer` too).
    prompts : iterable of str, of chats, or of token ids
        One kind per call. A chat is a list of ``{"role", "content"}``, rendered by the tokenizer's template; its text and hash are
        those of what was rendered. Prompts that occur twice are run once.
    store : Store, path or URL, optional
        Where to; None is the default root, ``$LMPROBE_CACHE_DIR/.zarr``.
    layers : "all", "middle", "last", int, sequence of int or slice
        Negative numbers count from the end. Nothing behind the deepest layer is computed.
    sites : str or sequence of {"resid", "attn", "mlp", "embed"}
        Where in each block: its output, its attention's or its MLP's contribution, or (once) its embeddings.
    pooling : str or sequence of {"last_token", "first_token", "mean", "max", "min"}
        What is stored per prompt, as ``<site>_<pooling>``; may be empty where tokens are kept.
    keep_tokens : bool
        Whether every token is stored too, as ``<site>``.
    coords : mapping of str to sequence, optional
        Columns aligned with `prompts`, such as ``{"label": y}``. For prompts that are stored already, new values are added as an
        annotation.
    name : str, optional
        Name in the store; by default the hub id or the folder's own name.
    tokenizer : tokenizer, folder or hub id, optional
        By default the model's own.
    revision : str, optional
        Branch, tag or commit of a hub model.
    dtype : "auto", str or torch.dtype
        What to compute in, and store; ``"auto"`` is what the model's configuration names.
    device, device_map : optional
        ``"auto"`` takes CUDA, then MPS, then the CPU; a device map spreads the model as in transformers.
    batch_tokens : int, optional
        Padded tokens per batch; None chooses by device. Halved by itself when the device runs out of memory.
    max_length : int, optional
        Longest prompt in tokens; None is the model's context window.
    truncation : bool
        Whether longer prompts are cut; otherwise they are an error. Part of the provenance.
    refresh : bool
        Run the model on all prompts, stored or not; the new activations win.
    provenance : mapping, optional
        Chooses between stored groups of one model where what is known here does not.
    modules : mapping, optional
        For unknown architectures, ``{"layers": "model.layers", "attn": "self_attn", "mlp": "mlp"}``.
    trust_remote_code : bool
        Whether code that comes with the model may run.
    store_text : bool
        False leaves the texts out of the store; prompts are still found by text or hash.
    part_bytes, part_seconds : int, float
        When to commit: an interruption loses at most this much.
    progress : bool
        A bar on terminals and in notebooks.

    Returns
    -------
    ExtractStats

    Raises
    ------
    InvalidArgumentError, InvalidTypeError, LayerOutOfRangeError, PromptTooLongError
        Something does not fit; raised before anything is run or written.
    ModelNotFoundError, UnknownArchitectureError, MissingDependencyError
        The model cannot be loaded, or its blocks are not found.
    AmbiguousProvenanceError
        Several stored groups fit what is known of the model.
    NoSpaceError
        The missing activations would not fit; or the medium became full, then what was committed is whole.
    ReadOnlyError, DeviceMemoryError
    """
    began = time.perf_counter()
    opened = store if isinstance(store, Store) else open_store(store)
    opened.check_writable()
    request = _check_request(
        model=model, prompts=prompts, store=opened, layers=layers, sites=sites, pooling=pooling, keep_tokens=keep_tokens, name=name,
        tokenizer=tokenizer, revision=revision, dtype=dtype, max_length=max_length, truncation=truncation, refresh=refresh,
        provenance=provenance, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    columns = _check_columns(coords, len(request.given))
    loaded = None if request.by_name else _load(request, device=device, device_map=device_map, modules=modules)
    looked = _look_up(request) if loaded is None else _look_up_loaded(request, loaded)
    per_prompt = _columns_by_prompt(columns, looked.prompts)
    plan, work = _plan(request, looked, loaded)
    _check_space(plan)
    if len(work.missing) and loaded is None:
        loaded = _load(request, device=device, device_map=device_map, modules=modules)
        looked = _look_up_loaded(request, loaded, looked)
        # Only now is the whole provenance known; what was found may be another's.
        plan, work = _plan(request, looked, loaded, work)
    _annotate_found(request.store, looked, work.missing, per_prompt)
    if loaded is None or work.tokenized is None:
        return _stats(plan, looked.group, began, model_loaded=loaded is not None)
    group = looked.group or _group_of(loaded)
    batches = extraction.run(
        loaded,
        work.tokenized,
        layers=plan.layers or "all",
        sites=request.sites,
        poolings=request.poolings,
        keep_tokens=keep_tokens,
        batch_tokens=batch_tokens,
    )
    ingest = Ingest(opened, group, part_bytes=part_bytes, part_seconds=part_seconds, recorded=loaded.recorded)
    rows = {digest: row for row, digest in enumerate(looked.prompts.sha256)}
    with _progress_bar(plan.tokens, enabled=progress) as advance, ingest:
        for batch in batches:
            ingest.put(_with_columns(batch, rows, per_prompt, store_text))
            advance(int(np.sum(batch.prompt_length)) if batch.prompt_length is not None else 0)
    done = _stats(plan, group, began, model_loaded=True)
    return replace(done, extracted=ingest.prompts, nbytes=ingest.nbytes, parts=len(ingest.parts), tokens=plan.tokens)


# -------------------------------------------------------------------------------------------------------------- checking


def _check_request(
    *,
    model: Any,
    prompts: Iterable[Any],
    sites: str | Sequence[str],
    pooling: str | Sequence[str],
    provenance: Provenance | None,
    **rest: Any,
) -> _Request:
    if isinstance(prompts, str):
        raise InvalidTypeError("prompts is one text: give a list of prompts")
    given = list(prompts)
    if not given:
        raise InvalidArgumentError("prompts is empty: give at least one prompt")
    names = extraction.parse_sites(sites)
    poolings = parse_poolings(pooling if isinstance(pooling, str) else tuple(pooling))
    if not poolings and not rest["keep_tokens"]:
        raise InvalidArgumentError("nothing would be stored: give a pooling, or keep_tokens=True")
    kind = extraction.prompts_kind(given)
    return _Request(model=model, given=given, kind=kind, sites=names, poolings=poolings, provenance=dict(provenance or {}), **rest)


def _check_columns(coords: Columns | None, n_prompts: int) -> dict[str, Array]:
    validate_column_names(coords or {})
    columns = {}
    for name, values in (coords or {}).items():
        if isinstance(values, (str, bytes)) or not hasattr(values, "__len__"):
            raise InvalidTypeError(f"coords[{name!r}] is a {type(values).__name__}: give one value per prompt")
        if len(values) != n_prompts:
            raise InvalidArgumentError(
                f"coords[{name!r}] has {len(values)} values for {n_prompts} prompts: give one per prompt, in their order"
            )
        columns[name] = as_column(name, values.detach().cpu().numpy() if hasattr(values, "detach") else values)
    return columns


def _columns_by_prompt(columns: Mapping[str, Array], prompts: Prompts) -> dict[str, Array]:
    """One value per different prompt; a prompt that occurs twice must have the same value twice."""
    for name, values in columns.items():
        expected = values[prompts.first][prompts.row]
        same = (values == expected) | ((values != values) & (expected != expected))  # NaN equals NaN here
        if not np.all(same):
            i = int(np.argmin(same))
            first = int(prompts.first[prompts.row[i]])
            raise InvalidArgumentError(
                f"coords[{name!r}] gives the same prompt two values: {values[first]!r} at number {first}, {values[i]!r} at number {i}"
            )
    return {name: values[prompts.first] for name, values in columns.items()}


# ------------------------------------------------------------------------------------------------------------ looking up


def _look_up(request: _Request) -> _Lookup:
    """The stored group of a named model, from what is known of it without loading it."""
    identity = _identify(request)
    known = {**identity.provenance, **request.provenance}
    if identity.num_layers is None and not request.store.matching(identity.name, known):
        # A hub model that this machine has never seen: its configuration comes with its tokenizer.
        _tokenizer(request)
        identity = _identify(request)
        known = {**identity.provenance, **request.provenance}
    tokenizer = _tokenizer(request) if request.kind == "chat" else None
    prompts = extraction.parse_prompts(request.given, tokenizer=tokenizer)
    group = request.store.find_group(identity.name, provenance=known) if request.store.matching(identity.name, known) else None
    return _Lookup(identity=identity, prompts=prompts, group=group, view=None if group is None else request.store.view(group))


def _identify(request: _Request) -> ModelIdentity:
    return extraction.identify(
        request.model, name=request.name, tokenizer=request.tokenizer, revision=request.revision, dtype=request.dtype,
        prompts_kind=request.kind, max_length=request.max_length, truncation=request.truncation, memory=config.weights_memory(),
    )  # fmt: skip


def _look_up_loaded(request: _Request, loaded: LoadedModel, before: _Lookup | None = None) -> _Lookup:
    """The stored group of a loaded model, all of whose provenance is known."""
    group = _group_of(loaded)
    prompts = before.prompts if before is not None and request.kind != "ids" else None
    prompts = prompts or extraction.parse_prompts(request.given, tokenizer=loaded.tokenizer)
    stored = request.store.groups().get(group.name)
    view = None if stored is None else request.store.view(stored)
    return _Lookup(identity=before.identity if before else None, prompts=prompts, group=stored, view=view)


def _group_of(loaded: LoadedModel) -> GroupInfo:
    return GroupInfo(model=loaded.name, provenance=loaded.provenance, num_layers=loaded.num_layers, hidden_size=loaded.hidden_size)


def _tokenizer(request: _Request) -> Any:
    if request.tokenizer is not None and not isinstance(request.tokenizer, (str, os.PathLike)):
        return request.tokenizer
    source = request.model if request.tokenizer is None else request.tokenizer
    return extraction.load_tokenizer(source, revision=request.revision, trust_remote_code=request.trust_remote_code)


def _load(request: _Request, *, device: Any, device_map: Any, modules: Mapping[str, str] | None) -> LoadedModel:
    return extraction.load_model(
        request.model, name=request.name, tokenizer=request.tokenizer, revision=request.revision, dtype=request.dtype, device=device,
        device_map=device_map, trust_remote_code=request.trust_remote_code, modules=modules, prompts_kind=request.kind,
        max_length=request.max_length, truncation=request.truncation, memory=config.weights_memory(),
    )  # fmt: skip


def _plan(request: _Request, looked: _Lookup, loaded: LoadedModel | None, before: _Work | None = None) -> tuple[ExtractPlan, _Work]:
    """The plan, and the work that it means."""
    prompts, known = looked.prompts, loaded or looked.identity
    assert known is not None  # noqa: S101 — a model is named or loaded
    depth = known.num_layers or (looked.group.num_layers if looked.group else None)
    if depth is None:
        raise InvalidArgumentError(
            f"how many layers {known.name!r} has is not known without its configuration: check the name, or go online"
        )
    layers = resolve_layers(request.layers, depth) if set(request.sites) - UNLAYERED_SITES else ()
    missing = _missing(request, looked.view, prompts, layers)
    if before is not None and np.array_equal(before.missing, missing):
        tokenized = before.tokenized
    else:
        tokenized = _tokenize(request, prompts, missing, loaded, known) if len(missing) else None
    hidden = known.hidden_size or (looked.group.hidden_size if looked.group else None) or 0
    dtype = str(known.provenance.get("compute_dtype") or "float32")
    weight = extraction.row_bytes(
        layers=len(layers), hidden_size=hidden, dtype=dtype, sites=request.sites, pooling=request.poolings, keep_tokens=request.keep_tokens
    )
    plan = ExtractPlan(
        model=known.name,
        url=request.store.url,
        prompts=len(prompts),
        found=len(prompts) - len(missing),
        tokens=0 if tokenized is None else tokenized.num_tokens,
        layers=layers,
        variables=tuple(name for _, name, _ in request.wanted(layers)),
        dtype=dtype,
        nbytes=0 if tokenized is None else weight.total(len(tokenized), tokenized.num_tokens),
        free_bytes=request.store.storage.free_bytes(),
    )
    return plan, _Work(missing=missing, tokenized=tokenized)


def _tokenize(
    request: _Request, prompts: Prompts, missing: Ints, loaded: LoadedModel | None, known: LoadedModel | ModelIdentity
) -> TokenizedPrompts:
    tokenizer = loaded.tokenizer if loaded is not None else _tokenizer(request)
    if prompts.text is None:
        prompts = extraction.parse_prompts(request.given, tokenizer=tokenizer)
    return extraction.tokenize(
        prompts.take(missing),
        tokenizer,
        context_length=known.context_length,
        max_length=request.max_length,
        truncation=request.truncation,
        vocab_size=known.vocab_size,
    )


def _missing(request: _Request, view: View | None, prompts: Prompts, layers: tuple[int, ...]) -> Ints:
    """Places among the different prompts of those that lack anything asked for."""
    if view is None:
        return np.arange(len(prompts))
    rows = view.find(prompts.sha256)  # also where all are run again: a collision must be noticed before anything is run
    if request.refresh:
        return np.arange(len(prompts))
    there = rows >= 0
    for level, name, held in request.wanted(layers):
        there[there] &= view.covers(level, name, rows[there], held).all(axis=0)
    return np.flatnonzero(~there)


def _check_space(plan: ExtractPlan) -> None:
    if not plan.fits and plan.free_bytes is not None:
        raise NoSpaceError(
            f"{plan.missing} prompts need {format_bytes(plan.nbytes)} in {plan.url}, which has {format_bytes(plan.free_bytes)} free\n"
            "take fewer layers or prompts, leave tokens out (keep_tokens=False), use a smaller dtype, or give another store"
        )


# --------------------------------------------------------------------------------------------------------------- writing


def _with_columns(batch: TokenBatch, rows: Mapping[str, int], columns: Mapping[str, Array], store_text: bool) -> TokenBatch:
    chosen = np.array([rows[digest] for digest in batch.sha256])
    return replace(
        batch,
        prompt_columns={name: values[chosen] for name, values in columns.items()},
        text=batch.text if store_text else None,
    )


def _annotate_found(store: Store, looked: _Lookup, missing: Ints, columns: Mapping[str, Array]) -> None:
    """Write the columns of prompts that are stored already, where they are new or differ."""
    if not columns or looked.view is None or looked.group is None:
        return
    view = looked.view
    found = np.setdiff1d(np.arange(len(looked.prompts)), missing)
    rows = view.find([looked.prompts.sha256[i] for i in found])
    known = view.columns("prompts")
    together: dict[tuple[int, ...], dict[str, list[Any]]] = {}
    for name, values in columns.items():
        wanted = values[found]
        changed = np.ones(len(found), bool)
        if name in known:
            array = view.source("prompts", name, rows, ())
            stored = array.read(np.zeros(1, np.int64), slice(0, len(rows)))[0]
            there = view.covers("prompts", name, rows, ())[0]
            alike = (np.asarray(stored == wanted, bool)) & (stored.dtype.kind == wanted.dtype.kind or stored.dtype.kind in "iub")
            changed = ~(there & alike)
        if changed.any():
            together.setdefault(tuple(np.flatnonzero(changed).tolist()), {})[name] = wanted[changed].tolist()
    for places, named in together.items():
        store.write(looked.group, annotation_batch(view, rows[list(places)].tolist(), named), kind="annotation")


def _stats(plan: ExtractPlan, group: GroupInfo | None, began: float, *, model_loaded: bool) -> ExtractStats:
    return ExtractStats(
        model=plan.model,
        group="" if group is None else group.name,
        prompts=plan.prompts,
        found=plan.found,
        extracted=0,
        tokens=0,
        nbytes=0,
        parts=0,
        model_loaded=model_loaded,
        seconds=time.perf_counter() - began,
    )


@contextmanager
def _progress_bar(tokens: int, *, enabled: bool) -> Iterator[Callable[[int], None]]:
    if not enabled:
        yield lambda _: None
        return
    from tqdm.auto import tqdm

    # On a terminal or in a notebook, whose output is no terminal; never into a file or a pipe.
    with tqdm(total=tokens, unit="tok", unit_scale=True, desc="extract", disable=False if "ipykernel" in sys.modules else None) as bar:

        def advance(count: int) -> None:
            bar.update(count)

        yield advance


def format_bytes(nbytes: int) -> str:
    """A number of bytes as people read it, in powers of 1024."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
