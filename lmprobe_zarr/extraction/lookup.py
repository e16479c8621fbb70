"""What the store has of a request: the model's group, and which prompts lack something. Runs no model and writes nothing."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lmprobe_zarr.batch import Prompts, parse_prompts, resolve_layers, unused_arguments
from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.extraction import models
from lmprobe_zarr.extraction.model_choice import LoadingOptions, ModelMemory
from lmprobe_zarr.extraction.models import ModelIdentity
from lmprobe_zarr.extraction.request import Request, Wanted
from lmprobe_zarr.log import warn
from lmprobe_zarr.store import ambiguous
from lmprobe_zarr.store.format import GroupInfo
from lmprobe_zarr.store.parts import View
from lmprobe_zarr.typing import Ints, Mask

if TYPE_CHECKING:
    from lmprobe_zarr.extraction.models import LoadedModel

__all__ = ["Lookup", "load_and_look_up", "look_up"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookup:
    """What the store has of a request, and what it lacks.

    Parameters
    ----------
    request : Request
    identity : ModelIdentity, optional
        What is known of a named model without loading it.
    loaded : LoadedModel, optional
        The model, if it had to be loaded.
    tokenizer : tokenizer, optional
        Loaded if prompts are missing or chats had to be rendered.
    prompts : Prompts
        The distinct prompts, and the index of each given prompt among them.
    group : GroupInfo, optional
        The stored group; None if there is none yet.
    view : View, optional
        Its parts, without damaged ones.
    layers : tuple of int
        Requested layers.
    wanted : list of Wanted
    missing : ndarray of int
        Indices, among the distinct prompts, of those that the model has to be run on.
    derived : mapping of tuple of str to ndarray of int
        What can be pooled from stored tokens: by names of variables, the indices of the prompts that lack exactly these variables.
    began : float
        When the lookup began, in seconds of `time.perf_counter`.
    """

    request: Request
    identity: ModelIdentity | None
    loaded: LoadedModel | None
    tokenizer: Any
    prompts: Prompts
    group: GroupInfo | None
    view: View | None
    layers: tuple[int, ...]
    wanted: list[Wanted]
    missing: Ints
    derived: Mapping[tuple[str, ...], Ints]
    began: float

    @property
    def model(self) -> LoadedModel | ModelIdentity:
        """The model, or what is known of it."""
        known = self.loaded or self.identity
        assert known is not None  # noqa: S101 — a model is named or loaded
        return known

    @property
    def found(self) -> Ints:
        """Indices, among the distinct prompts, of those that the model need not be run on."""
        return np.setdiff1d(np.arange(len(self.prompts)), self.missing)

    @property
    def found_rows(self) -> Ints:
        """Rows in the view of the prompts that were found."""
        return np.zeros(0, np.int64) if self.view is None else self.view.find([self.prompts.sha256[i] for i in self.found])

    @property
    def compute_dtype(self) -> str:
        """The dtype that the model computes in, or that the stored group was computed in."""
        stored = None if self.group is None else self.group.provenance.get("compute_dtype")
        return str(self.model.provenance.get("compute_dtype") or stored or "float32")

    @property
    def makes_group(self) -> GroupInfo:
        """The group that holds, or will hold, the requested activations."""
        if self.group is not None:
            return self.group
        assert self.loaded is not None  # noqa: S101 — without a group prompts are missing, and the model is loaded
        return _group_of(self.loaded, self.request)


# --------------------------------------------------------------------------------------------------------------- looking up


def look_up(request: Request, memory: ModelMemory, device: Any = "auto", device_map: Any = None) -> Lookup:
    """What the store has of a request, as far as can be known without loading a named model; a model object is examined.

    A named model whose configuration does not say how many layers it has is loaded, if no stored group says so either.

    Raises
    ------
    AmbiguousProvenanceError
        Several stored groups match what is known of the model.
    InvalidArgumentError, others
        As `lmprobe_zarr.extract` does before it runs the model.
    """
    began = time.perf_counter()
    if not request.choice.by_name:
        dtype = "auto" if request.choice.dtype is None else request.choice.dtype
        return _look_up_loaded(request, memory.load(request.choice, _options(request, dtype, device, device_map), None), None, began)
    tokenizer = None
    identity = request.choice.identify(request.kind, device, device_map)
    group = _find_group(request, identity)
    if identity.num_layers is None and group is None:
        # No file of this hub model is on this machine yet: loading its tokenizer fetches its configuration too.
        tokenizer = request.choice.load_tokenizer()
        identity = request.choice.identify(request.kind, device, device_map)
        group = _find_group(request, identity)
    if identity.num_layers is None and group is None and identity.model_type is not None:
        # Its configuration does not say how deep it is; the model itself does.
        dtype = "auto" if request.choice.dtype is None else request.choice.dtype
        return _look_up_loaded(request, memory.load(request.choice, _options(request, dtype, device, device_map), identity), None, began)
    if request.kind == "chat" and tokenizer is None:
        tokenizer = request.choice.load_tokenizer()
    prompts = _parse(request, tokenizer if request.kind == "chat" else None)
    lookup = _compare(request, identity=identity, loaded=None, tokenizer=tokenizer, prompts=prompts, group=group, began=began)
    if len(lookup.missing) and tokenizer is None:
        return replace(lookup, tokenizer=request.choice.load_tokenizer())
    return lookup


def load_and_look_up(before: Lookup, memory: ModelMemory, device: Any, device_map: Any) -> Lookup:
    """What the store has of a named model, now that the model is loaded.

    Only the loaded model has its whole provenance and knows which layers have routers, so another group may match now.
    """
    request, stored = before.request, None if before.group is None else before.group.provenance.get("compute_dtype")
    dtype = str(stored or "float32") if request.choice.dtype is None else request.choice.dtype
    loaded = memory.load(request.choice, _options(request, dtype, device, device_map), before.identity)
    return _look_up_loaded(request, loaded, before, before.began)


def _look_up_loaded(request: Request, loaded: LoadedModel, before: Lookup | None, began: float) -> Lookup:
    group = _group_of(loaded, request)
    if request.group is not None and request.group != group.name:
        raise InvalidArgumentError(
            f"group={request.group!r} was asked for, but this model as it is loaded makes {group.name!r}: leave group out, or read only"
        )
    known = before is not None and request.kind != "ids"  # texts of token ids need the model's own tokenizer
    prompts = before.prompts if before is not None and known else _parse(request, loaded.tokenizer)
    return _compare(
        request, identity=None if before is None else before.identity, loaded=loaded, tokenizer=loaded.tokenizer, prompts=prompts,
        group=request.store.groups(whole=False).get(group.name), began=began,
    )  # fmt: skip


def _parse(request: Request, tokenizer: Any) -> Prompts:
    """The prompts; with a warning for arguments of a chat template that change nothing."""
    prompts = parse_prompts(request.given, tokenizer=tokenizer, chat=request.chat)
    unused = unused_arguments(tokenizer, request.chat) if request.kind == "chat" else []
    if unused:
        warn(f"this tokenizer's chat template never uses {', '.join(map(repr, unused))}: check the name, or leave it out", UserWarning)
    return prompts


def _options(request: Request, dtype: Any, device: Any, device_map: Any) -> LoadingOptions:
    return LoadingOptions(kind=request.kind, dtype=dtype, device=device, device_map=device_map, head=request.outputs.needs_head)


def _group_of(loaded: LoadedModel, request: Request) -> GroupInfo:
    """The group of a loaded model.

    Modules that were named although they are found anyway make no group of their own. A group that an earlier version made of them is
    used further.
    """
    depth = {"num_layers": loaded.num_layers, "hidden_size": loaded.hidden_size}
    group = GroupInfo(model=loaded.name, provenance=loaded.provenance, **depth)
    named = models.modules_field(request.choice.modules)
    if named is None or loaded.provenance.get("modules") == named:
        return group
    earlier = GroupInfo(model=loaded.name, provenance={**loaded.provenance, "modules": named}, **depth)
    held = request.store.groups(whole=False)
    return earlier if earlier.name in held and group.name not in held else group


def _find_group(request: Request, identity: ModelIdentity) -> GroupInfo | None:
    """The stored group that fits what is known of a named model."""
    known = {**identity.provenance, **request.choice.provenance}
    # A group with further fields, such as ``autocast`` or a user's own ``steering``, is found only if these are known or given.
    fixed = {*models.PROVENANCE_FIELDS, *known}
    matching = request.store.matching(identity.name, known, request.group, whole=False)
    found = [info for info in matching if fixed.issuperset(info.provenance)]
    if len(found) > 1:
        found = [info for info in found if request.store.holds_parts(info.name)]
    if len(found) > 1 and request.choice.dtype is None:
        # Any dtype is accepted; of several, float32, which is lmprobe's default.
        found = [info for info in found if info.provenance.get("compute_dtype") == "float32"] or found
    if len(found) > 1:
        raise ambiguous(found, request.store.where)
    return found[0] if found else None


# ------------------------------------------------------------------------------------------------------ what is missing


def _compare(
    request: Request,
    *,
    identity: ModelIdentity | None,
    loaded: LoadedModel | None,
    tokenizer: Any,
    prompts: Prompts,
    group: GroupInfo | None,
    began: float,
) -> Lookup:
    """The request, compared with what a group holds."""
    # A damaged part counts as missing here: the model is run again on prompts that no other part holds.
    view = None if group is None else request.store.view(group, whole=False)
    known = loaded or identity
    assert known is not None  # noqa: S101 — a model is named or loaded
    # A loaded model, or the group that one made, knows the depth better than a configuration does.
    depth = (None if loaded is None else loaded.num_layers) or (None if group is None else group.num_layers) or known.num_layers
    if depth is None:
        raise InvalidArgumentError(
            f"how many layers {known.name!r} has is not known without its configuration: check the name, or go online"
        )
    layers = resolve_layers(request.layers, depth) if request.layered else ()
    wanted = request.wanted(layers, None if loaded is None else loaded.router_layers)
    prompts, without_text = _as_stored(view, prompts)
    missing, derived = _find_gaps(request, wanted, view, prompts)
    _check_texts(without_text, missing, prompts)
    return Lookup(
        request=request, identity=identity, loaded=loaded, tokenizer=tokenizer, prompts=prompts, group=group, view=view, layers=layers,
        wanted=wanted, missing=missing, derived=derived, began=began,
    )  # fmt: skip


def _as_stored(view: View | None, prompts: Prompts) -> tuple[Prompts, Ints]:
    """The prompts, in which chats whose text depends on the time have the text that they are stored with; and those stored without text.

    A chat may be run again, for a further layer. All its values have to belong to one text.
    """
    none = np.zeros(0, np.int64)
    if view is None or prompts.timed is None:
        return prompts, none
    timed = np.flatnonzero(prompts.timed)
    rows = view.find([prompts.sha256[i] for i in timed])
    places, rows = timed[rows >= 0], rows[rows >= 0]
    if not len(rows) or "text" not in view.columns("prompts"):
        return prompts, places
    texts = view.source("prompts", "text", rows, ()).read(np.zeros(1, np.int64), slice(0, len(rows)))[0].tolist()
    known = {int(place): str(text) for place, text in zip(places, texts, strict=True) if text}
    return prompts.with_texts(known), np.setdiff1d(places, list(known)).astype(np.int64)


def _check_texts(unknown: Ints, missing: Ints, prompts: Prompts) -> None:
    """Raise if a chat lacks values and its stored values belong to a text that is not stored."""
    lost = np.intersect1d(unknown, missing)
    if len(lost):
        raise InvalidArgumentError(
            f"prompts[{prompts.first[lost[0]]}] is a chat whose template prints the time, stored without its text (store_text=False), "
            "so further values of it cannot be computed: delete it and extract all again, or give the template its date in "
            "chat_template_kwargs"
        )


def _find_gaps(request: Request, wanted: Sequence[Wanted], view: View | None, prompts: Prompts) -> tuple[Ints, dict[tuple[str, ...], Ints]]:
    """Indices of the prompts to run the model on, and, by the variables to pool, of those whose stored tokens suffice."""
    everything = np.arange(len(prompts))
    if view is None:
        return everything, {}
    rows = view.find(prompts.sha256)  # also for a refresh: a hash collision must be noticed before anything is run
    if request.refresh:
        return everything, {}
    places = np.flatnonzero(rows >= 0)
    known = rows[places]
    lacking = np.zeros(len(known), bool)  # prompts that the model has to be run on
    to_pool: dict[str, Mask] = {}
    for variable in wanted:
        stored = _has_all(view, variable, known)
        if variable.pooled_from is not None and view.holds_whole_prompts:
            from_tokens = view.covers("tokens", variable.pooled_from, known, variable.layers).all(axis=0)
            to_pool[variable.name] = from_tokens & ~stored
            stored = stored | from_tokens
        lacking |= ~stored
    derived: dict[tuple[str, ...], list[int]] = {}
    for i in np.flatnonzero(~lacking):
        names = tuple(name for name, chosen in to_pool.items() if chosen[i])
        if names:
            derived.setdefault(names, []).append(int(places[i]))
    return np.setdiff1d(everything, places[~lacking]), {names: np.array(chosen) for names, chosen in derived.items()}


def _has_all(view: View, variable: Wanted, rows: Ints) -> Mask:
    """Which rows have all of a variable."""
    stored = np.asarray(view.covers(variable.level, variable.name, rows, variable.layers).all(axis=0))
    if variable.at_least is not None and stored.any():
        stored[stored] = view.row_lengths(variable.level, variable.name, rows[stored]) >= variable.at_least
    return stored
