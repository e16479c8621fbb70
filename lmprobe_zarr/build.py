"""What is missing → run the model → write → commit. The one place that knows both models and stores."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lmprobe_zarr import extraction
from lmprobe_zarr.batch import TokenBatch
from lmprobe_zarr.errors import InvalidArgumentError, NoSpaceError
from lmprobe_zarr.extraction import Prompts
from lmprobe_zarr.ingest import PART_BYTES, PART_SECONDS, Ingest
from lmprobe_zarr.layers import LayerSpec
from lmprobe_zarr.missing import Lookup, check_request, group_of, load, look_up, look_up_loaded, plan_work
from lmprobe_zarr.plan import ExtractPlan, ExtractStats, format_bytes
from lmprobe_zarr.progress import progress_bar
from lmprobe_zarr.schema import GroupInfo, Provenance, validate_column_names
from lmprobe_zarr.store import Store, open_store
from lmprobe_zarr.writer import as_column

if TYPE_CHECKING:
    import torch


__all__ = ["ExtractPlan", "ExtractStats", "extract", "plan_extract"]

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]
Columns = Mapping[str, Sequence[Any] | Array]


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
    modules: Mapping[str, str] | None = None,
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
    request = check_request(
        model=model, prompts=prompts, store=opened, layers=layers, sites=sites, pooling=pooling, keep_tokens=keep_tokens, name=name,
        tokenizer=tokenizer, revision=revision, dtype=dtype, max_length=max_length, truncation=truncation, refresh=refresh,
        provenance=provenance, modules=modules, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    loaded = None if request.by_name else load(request, device="auto", device_map=None)
    looked = look_up(request) if loaded is None else look_up_loaded(request, loaded)
    return plan_work(request, looked, loaded)[0]


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
        By default the model's own. One that is given is known by its content, so even an equal one makes another group.
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
        Fields of your own, such as ``{"steering": "v3"}``, become part of the group: needed for models with hooks, which cannot be
        told apart otherwise. Fixed fields, such as ``revision``, choose between stored groups where what is known here does not.
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
    request = check_request(
        model=model, prompts=prompts, store=opened, layers=layers, sites=sites, pooling=pooling, keep_tokens=keep_tokens, name=name,
        tokenizer=tokenizer, revision=revision, dtype=dtype, max_length=max_length, truncation=truncation, refresh=refresh,
        provenance=provenance, modules=modules, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    columns = _check_columns(coords, len(request.given))
    loaded = None if request.by_name else load(request, device=device, device_map=device_map)
    looked = look_up(request) if loaded is None else look_up_loaded(request, loaded)
    per_prompt = _columns_by_prompt(columns, looked.prompts)
    plan, work = plan_work(request, looked, loaded)
    if len(work.missing):
        opened.check_writable()
    _check_space(plan)
    if len(work.missing) and loaded is None:
        loaded = load(request, device=device, device_map=device_map)
        looked = look_up_loaded(request, loaded, looked)
        # Only now is the whole provenance known; what was found may be another's.
        plan, work = plan_work(request, looked, loaded, work)
    _annotate_found(request.store, looked, work.missing, per_prompt)
    if loaded is None or work.tokenized is None:
        return _stats(plan, looked.group, began, model_loaded=loaded is not None)
    group = looked.group or group_of(loaded)
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
    with progress_bar(plan.tokens, description="extract", unit="tok", enabled=progress) as advance, ingest:
        for batch in batches:
            ingest.put(_with_columns(batch, rows, per_prompt, store_text))
            advance(int(np.sum(batch.prompt_length)) if batch.prompt_length is not None else 0)
    done = _stats(plan, group, began, model_loaded=True)
    return replace(done, extracted=ingest.prompts, nbytes=ingest.nbytes, parts=len(ingest.parts), tokens=plan.tokens)


# -------------------------------------------------------------------------------------------------------------- checking


def _check_columns(coords: Columns | None, n_prompts: int) -> dict[str, Array]:
    validate_column_names(coords or {})
    columns = {}
    for name, values in (coords or {}).items():
        column = as_column(name, values.detach().cpu().numpy() if hasattr(values, "detach") else values)
        if len(column) != n_prompts:
            raise InvalidArgumentError(
                f"coords[{name!r}] has {len(column)} values for {n_prompts} prompts: give one per prompt, in their order"
            )
        columns[name] = column
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


def _annotate_found(store: Store, looked: Lookup, missing: Ints, columns: Mapping[str, Array]) -> None:
    """Write the columns of prompts that are stored already, where they are new or differ."""
    if not columns or looked.view is None:
        return
    view = looked.view
    found = np.setdiff1d(np.arange(len(looked.prompts)), missing)
    rows = view.find([looked.prompts.sha256[i] for i in found])
    known = view.columns("prompts")
    changes: dict[str, tuple[Ints, list[Any]]] = {}
    for name, values in columns.items():
        wanted = values[found]
        changed = np.ones(len(found), bool)
        if name in known:
            array = view.source("prompts", name, rows, ())
            stored = array.read(np.zeros(1, np.int64), slice(0, len(rows)))[0]
            there = view.covers("prompts", name, rows, ())[0]
            alike = (stored == wanted) | ((stored != stored) & (wanted != wanted))  # NaN equals NaN here too
            changed = ~(there & np.asarray(alike, bool))
        if changed.any():
            changes[name] = rows[changed], wanted[changed].tolist()
    store.write_columns(view, changes)


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
