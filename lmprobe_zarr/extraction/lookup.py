"""What is asked for, what is stored, and so what is missing. Knows models and stores; runs and writes nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lmprobe_zarr import config
from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.extraction import models as extraction
from lmprobe_zarr.extraction.models import ModelIdentity, Prompts
from lmprobe_zarr.extraction.request import Request
from lmprobe_zarr.store import ambiguous
from lmprobe_zarr.store.format import GroupInfo
from lmprobe_zarr.store.parts import View

if TYPE_CHECKING:
    from lmprobe_zarr.extraction.models import LoadedModel

__all__ = ["Lookup", "group_of", "load", "look_up", "look_up_loaded", "settle_dtype"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookup:
    """What is asked for, and the stored group that may hold it already."""

    identity: ModelIdentity | None
    prompts: Prompts
    group: GroupInfo | None
    view: View | None


# ------------------------------------------------------------------------------------------------------------ looking up


def look_up(request: Request) -> Lookup:
    """The stored group of a named model, from what is known of it without loading it."""
    identity = _identify(request)
    group = _find_group(request, identity)
    if identity.num_layers is None and group is None:
        # A hub model that this machine has never seen: its configuration comes with its tokenizer.
        tokenizer_of(request)
        identity = _identify(request)
        group = _find_group(request, identity)
    tokenizer = tokenizer_of(request) if request.kind == "chat" else None
    prompts = extraction.parse_prompts(request.given, tokenizer=tokenizer)
    # A damaged part is as good as missing here: what only it holds is run again.
    view = None if group is None else request.store.view(group, whole=False)
    return Lookup(identity=identity, prompts=prompts, group=group, view=view)


def _find_group(request: Request, identity: ModelIdentity) -> GroupInfo | None:
    known = {**identity.provenance, **request.provenance}
    # A group with fields of somebody's own, such as a steering vector, is meant only by who names them.
    fixed = {*extraction.PROVENANCE_FIELDS, *request.own_provenance}
    matching = request.store.matching(identity.name, known, request.group, whole=False)
    found = [info for info in matching if fixed.issuperset(info.provenance)]
    if len(found) > 1:
        found = [info for info in found if request.store.holds_parts(info.name)]
    if len(found) > 1 and request.dtype is None:
        # Any dtype serves: that of lmprobe where there are several.
        found = [info for info in found if info.provenance.get("compute_dtype") == "float32"] or found
    if len(found) > 1:
        raise ambiguous(found, request.store.where)
    return found[0] if found else None


def _identify(request: Request) -> ModelIdentity:
    identity = extraction.identify(
        request.model, name=request.name, tokenizer=request.tokenizer, revision=request.revision,
        dtype="auto" if request.dtype is None else request.dtype, prompts_kind=request.kind, max_length=request.max_length,
        truncation=request.truncation, memory=config.weights_memory(), modules=request.modules, provenance=request.own_provenance,
    )  # fmt: skip
    if request.dtype is None:  # whatever was computed in serves
        return replace(identity, provenance={k: v for k, v in identity.provenance.items() if k != "compute_dtype"})
    return identity


def settle_dtype(request: Request, looked: Lookup) -> Request:
    """The request with the dtype to compute in, where any served: that of the stored group, else float32, as in lmprobe."""
    if request.dtype is not None:
        return request
    stored = None if looked.group is None else looked.group.provenance.get("compute_dtype")
    return replace(request, dtype=str(stored or "float32"))


def look_up_loaded(request: Request, loaded: LoadedModel, before: Lookup | None = None) -> Lookup:
    """The stored group of a loaded model, all of whose provenance is known."""
    group = group_of(loaded)
    if request.group is not None and request.group != group.name:
        raise InvalidArgumentError(
            f"group={request.group!r} was asked for, but this model as it is loaded makes {group.name!r}: leave group out, or read only"
        )
    prompts = before.prompts if before is not None and request.kind != "ids" else None
    prompts = prompts or extraction.parse_prompts(request.given, tokenizer=loaded.tokenizer)
    stored = request.store.groups(whole=False).get(group.name)
    view = None if stored is None else request.store.view(stored, whole=False)
    return Lookup(identity=before.identity if before else None, prompts=prompts, group=stored, view=view)


def group_of(loaded: LoadedModel) -> GroupInfo:
    return GroupInfo(model=loaded.name, provenance=loaded.provenance, num_layers=loaded.num_layers, hidden_size=loaded.hidden_size)


def tokenizer_of(request: Request) -> Any:
    if request.tokenizer is not None and not isinstance(request.tokenizer, (str, os.PathLike)):
        return request.tokenizer
    source = request.model if request.tokenizer is None else request.tokenizer
    return extraction.load_tokenizer(source, revision=request.revision, trust_remote_code=request.trust_remote_code)


def load(request: Request, *, device: Any, device_map: Any) -> LoadedModel:
    """The model, with all of its provenance."""
    return extraction.load_model(
        request.model, name=request.name, tokenizer=request.tokenizer, revision=request.revision, dtype=request.dtype, device=device,
        device_map=device_map, trust_remote_code=request.trust_remote_code, modules=request.modules, prompts_kind=request.kind,
        max_length=request.max_length, truncation=request.truncation, memory=config.weights_memory(), provenance=request.own_provenance,
        head=request.outputs.needs_head,
    )  # fmt: skip
