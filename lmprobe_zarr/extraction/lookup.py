"""What the store has of a request: the model's group, and which prompts lack something. Runs no model and writes nothing."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lmprobe_zarr.batch import (
    HASH_DIGITS,
    Prompts,
    describe_layers,
    parse_prompts,
    render_chat,
    resolve_layers,
    split_variable,
    unused_arguments,
)
from lmprobe_zarr.bridges import beside
from lmprobe_zarr.errors import InvalidArgumentError, LmprobeZarrError
from lmprobe_zarr.extraction import models
from lmprobe_zarr.extraction.answers import Answers, as_stored, ask
from lmprobe_zarr.extraction.groups import candidates, contradictions, group_of, is_alike, unrecorded
from lmprobe_zarr.extraction.model_choice import LoadingOptions, ModelMemory
from lmprobe_zarr.extraction.models import DTYPES, ModelIdentity
from lmprobe_zarr.extraction.plan import HeldElsewhere
from lmprobe_zarr.extraction.request import Request, Wanted
from lmprobe_zarr.log import warn
from lmprobe_zarr.store.format import LEVELS, GroupInfo
from lmprobe_zarr.store.parts import View, read_column
from lmprobe_zarr.typing import Ints, Mask

if TYPE_CHECKING:
    from lmprobe_zarr.extraction.models import ReadyModel

__all__ = ["Lookup", "load_and_look_up", "look_up"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookup:
    """What the store has of a request, and what it lacks.

    Parameters
    ----------
    request : Request
    identity : ModelIdentity, optional
        What is known of a named model without loading it.
    loaded : ReadyModel, optional
        The model, if it had to be loaded.
    tokenizer : tokenizer, optional
        Loaded if prompts are missing or chats had to be rendered.
    prompts : Prompts
        The distinct prompts, and the index of each given prompt among them.
    group : GroupInfo, optional
        The stored group; None if there is none yet. It may be one that does not record everything, if the caller allows that.
    view : View, optional
        Its parts, without damaged ones.
    layers : tuple of int
        Requested layers.
    wanted : list of Wanted
    missing : ndarray of int
        Indices, among the distinct prompts, of those that the model has to be run on.
    derived : mapping of tuple of str to ndarray of int
        What can be pooled from stored tokens: by names of variables, the indices of the prompts that lack exactly these variables.
    elsewhere : tuple of HeldElsewhere
        Other groups of a model of this name that hold some of what is missing.
    in_lmprobe : int
        How many of the missing prompts are among lmprobe's own entries beside the store, with whatever values.
    began : float
        When the lookup began, in seconds of `time.perf_counter`.
    answers : Answers, optional
        What `prompts` are answers to, where answers were asked for; stored ones of missing prompts are known.
    num_layers : int
        How many layers the model has.
    """

    request: Request
    identity: ModelIdentity | None
    loaded: ReadyModel | None
    tokenizer: Any
    prompts: Prompts
    group: GroupInfo | None
    view: View | None
    layers: tuple[int, ...]
    wanted: list[Wanted]
    missing: Ints
    derived: Mapping[tuple[str, ...], Ints]
    elsewhere: tuple[HeldElsewhere, ...]
    in_lmprobe: int
    began: float
    answers: Answers | None = None
    num_layers: int = 0

    @property
    def model(self) -> ReadyModel | ModelIdentity:
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
        """The dtype that the model computes in, or would."""
        if self.loaded is not None:
            return str(self.loaded.provenance.get("compute_dtype") or "float32")
        if self.takes_dtype:
            return self.stored_dtype
        return str(self.model.provenance.get("compute_dtype") or self.stored_dtype)

    @property
    def takes_dtype(self) -> bool:
        """Whether the model computes in the dtype of the group that was found, because the call leaves it open."""
        return self.request.choice.dtype is None or (self.request.any_dtype and self.group is not None)

    @property
    def stored_dtype(self) -> str:
        """The dtype that the group was computed in. Where it is not recorded, the one that all of it is stored with, or float32."""
        recorded = None if self.group is None else self.group.provenance.get("compute_dtype")
        if recorded is None and self.view is not None and self.unknown:
            held = _dtypes_of(self.view)
            recorded = held.pop() if len(held) == 1 and held <= set(DTYPES) else None
        return str(recorded or "float32")

    @property
    def held_dtypes(self) -> set[str]:
        """The dtypes with which the requested variables are stored of other prompts."""
        names = [variable.name for variable in self.wanted if split_variable(variable.name)[0] in self.request.sites.names]
        return set() if self.view is None else _dtypes_of(self.view, names)

    @property
    def widths(self) -> dict[str, int]:
        """Values of one token at every requested site, as far as is known: of the loaded model, or as stored."""
        found = {}
        for level in LEVELS if self.view is not None else ():
            for name, array in self.view.variables(level).items():  # type: ignore[union-attr]
                if (site := split_variable(name)[0]) in self.request.sites.names:
                    found[site] = int(np.prod(array.row_shape))
        if self.loaded is not None:
            places = models.where_sites_are(self.loaded, self.request.sites, self.layers)
            found |= {site: place.width for site, place in places.items() if place.width}
        return found

    @property
    def unknown(self) -> tuple[str, ...]:
        """The fields that the group does not record, and that are taken on the caller's word."""
        return () if self.group is None else unrecorded(self.group)

    @property
    def makes_group(self) -> GroupInfo:
        """The group that holds, or will hold, the requested activations."""
        if self.group is not None:
            return self.group
        assert self.loaded is not None  # noqa: S101 — without a group prompts are missing, and the model is loaded
        return group_of(self.loaded, self.request)


def _dtypes_of(view: View, names: Collection[str] | None = None) -> set[str]:
    """The dtypes with which variables are stored, by default all."""
    held = [(level, name) for level in LEVELS for name in view.variables(level) if names is None or name in names]
    return {dtype for level, name in held for dtype in view.stored_dtypes(level, name)}


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
    groups = candidates(request, identity)
    if identity.num_layers is None and not groups:
        # No file of this hub model is on this machine yet: loading its tokenizer fetches its configuration too.
        tokenizer = request.choice.load_tokenizer()
        identity = request.choice.identify(request.kind, device, device_map)
        groups = candidates(request, identity)
    if identity.num_layers is None and not groups and identity.model_type is not None:
        # Its configuration does not say how deep it is; the model itself does.
        dtype = "auto" if request.choice.dtype is None else request.choice.dtype
        return _look_up_loaded(request, memory.load(request.choice, _options(request, dtype, device, device_map), identity), None, began)
    if request.kind == "chat" and tokenizer is None:
        tokenizer = request.choice.load_tokenizer()
    prompts, answers = _parse(request, tokenizer if request.kind == "chat" else None)
    lookup = _compare(
        request, identity=identity, loaded=None, tokenizer=tokenizer, prompts=prompts, answers=answers, groups=groups, began=began
    )  # fmt: skip
    if len(lookup.missing) and tokenizer is None:
        return replace(lookup, tokenizer=request.choice.load_tokenizer())
    return lookup


def load_and_look_up(before: Lookup, memory: ModelMemory, device: Any, device_map: Any, *, stream: bool = False) -> Lookup:
    """What the store has of a named model, now that the model is loaded.

    Only the loaded model has its whole provenance and knows which layers have routers, so another group may match now.
    """
    request = before.request
    dtype = before.stored_dtype if before.takes_dtype else request.choice.dtype
    options = replace(_options(request, dtype, device, device_map), stream=stream)
    loaded = memory.load(request.choice, options, before.identity)
    return _look_up_loaded(request, loaded, before, before.began)


def _look_up_loaded(request: Request, loaded: ReadyModel, before: Lookup | None, began: float) -> Lookup:
    own, groups = group_of(loaded, request), candidates(request, loaded)
    if before is not None and before.group is not None and before.unknown:
        groups = [info for info in groups if info == before.group]  # whose values were found, and whose dtype the model computes in
        if not groups:
            problems = "; ".join(contradictions(request, loaded, before.group).values())
            raise InvalidArgumentError(f"group {before.group.name!r} is not of this model as it is loaded: {problems}")
    if request.group is not None and not groups and request.group != own.name:
        raise InvalidArgumentError(
            f"group={request.group!r} was asked for, but this model as it is loaded makes {own.name!r}: leave group out, or read only"
        )
    known = before is not None and request.kind != "ids"  # texts of token ids need the model's own tokenizer
    if before is not None and known:
        prompts, answers = before.prompts, before.answers
    else:
        prompts, answers = _parse(request, loaded.tokenizer, loaded)
    return _compare(
        request, identity=None if before is None else before.identity, loaded=loaded, tokenizer=loaded.tokenizer, prompts=prompts,
        answers=answers, groups=groups, began=began,
    )  # fmt: skip


def _parse(request: Request, tokenizer: Any, loaded: ReadyModel | None = None) -> tuple[Prompts, Answers | None]:
    """The prompts, with their answers if these were asked for; with a warning for arguments of a chat template that change nothing."""
    prompts = parse_prompts(request.given, tokenizer=tokenizer, chat=request.chat)
    unused = unused_arguments(tokenizer, request.chat) if request.kind == "chat" else []
    if unused:
        warn(f"this tokenizer's chat template never uses {', '.join(map(repr, unused))}: check the name, or leave it out", UserWarning)
    if request.kind == "chat":
        _check_roles(request, prompts, tokenizer)
    if request.generate is None:
        return prompts, None
    # A named model is described by its files, whether it is loaded or not, so that both ways find the same answers.
    model = request.choice.model
    if loaded is not None and not request.choice.by_name:
        assert isinstance(loaded, models.LoadedModel)  # noqa: S101 - engines load models by name
        model = loaded.module if loaded.located.whole is None else loaded.located.whole
    return ask(request.generate, prompts, models.own_generation(model, request.choice.revision), request.drawn_seed)


def _check_roles(request: Request, prompts: Prompts, tokenizer: Any) -> None:
    """Raise if two chats of one text have other roles and these are asked for: a text is one prompt, and has one set of values."""
    part = next((part for part in request.parts if part is not None and part.needs_roles), None)
    if part is None or prompts.text is None or len(prompts) == len(request.given):
        return
    for number, place in enumerate(prompts.row.tolist()):
        first = int(prompts.first[place])
        if first == number or prompts.messages is None:
            continue
        one, other = prompts.messages[place], render_chat(request.given[number], number, tokenizer, prompts.chat).messages
        if one == other or models.have_same_roles(one, other, prompts.text[place], tokenizer, prompts.chat):
            continue
        raise InvalidArgumentError(
            f"prompts[{first}] and prompts[{number}] are chats that the template renders to the same text, in which other characters are "
            f"those of over={part.name!r}, and a text is one prompt: leave one of them out, or give the characters of each in calls of "
            "their own with other names, over={'name': {'span': (start, end)}}"
        )


def _options(request: Request, dtype: Any, device: Any, device_map: Any) -> LoadingOptions:
    return LoadingOptions(kind=request.kind, dtype=dtype, device=device, device_map=device_map, head=request.needs_head)


# ------------------------------------------------------------------------------------------------------ what is missing


def _compare(
    request: Request,
    *,
    identity: ModelIdentity | None,
    loaded: ReadyModel | None,
    tokenizer: Any,
    prompts: Prompts,
    answers: Answers | None,
    groups: Sequence[GroupInfo],
    began: float,
) -> Lookup:
    """The request, compared with what the groups hold that may serve it. The one that lacks least is chosen, of equal ones the first."""
    known = loaded or identity
    assert known is not None  # noqa: S101 — a model is named or loaded
    compared = []
    for group in groups or (None,):
        # A damaged part counts as missing here: the model is run again on prompts that no other part holds.
        view = None if group is None else request.store.view(group, whole=False)
        # A loaded model, or the group that one made, knows the depth better than a configuration does.
        depth = (None if loaded is None else loaded.num_layers) or (None if group is None else group.num_layers) or known.num_layers
        if depth is None:
            raise InvalidArgumentError(
                f"how many layers {known.name!r} has is not known without its configuration: check the name, or go online"
            )
        layers = resolve_layers(request.layers, depth) if request.layered else ()
        has = _noted_layers(view) if loaded is None else _model_layers(loaded, request, layers)
        wanted = request.wanted(layers, has)
        _check_names(request, wanted, view)
        stored, without_text = _as_stored(view, prompts)
        missing, derived = _find_gaps(request, wanted, view, stored)
        lookup = Lookup(
            request=request, identity=identity, loaded=loaded, tokenizer=tokenizer, prompts=stored, group=group, view=view, layers=layers,
            wanted=wanted, missing=missing, derived=derived, elsewhere=(), in_lmprobe=0, began=began,
            answers=answers, num_layers=depth,
        )  # fmt: skip
        compared.append((lookup, without_text))
    chosen, without_text = min(compared, key=lambda pair: len(pair[0].missing))
    _check_texts(without_text, chosen.missing, chosen.prompts)
    _check_spans(chosen)
    if answers is not None:
        stored, answers = as_stored(answers, chosen.prompts, chosen.view, chosen.missing, tokenizer)
        chosen = replace(chosen, prompts=stored, answers=answers)
    if not len(chosen.missing) or request.refresh:
        return chosen
    return replace(chosen, elsewhere=_held_elsewhere(chosen), in_lmprobe=_count_in_lmprobe(chosen))


def _noted_layers(view: View | None) -> dict[str, tuple[int, ...]]:
    """The layers of the model that have each site, where the store says that some lack it."""
    found = {}
    for level in LEVELS if view is not None else ():
        for name, array in view.variables(level).items():  # type: ignore[union-attr]
            if "site_layers" in array.attributes:
                found[split_variable(name)[0]] = tuple(array.attributes["site_layers"])
    return found


def _model_layers(loaded: ReadyModel, request: Request, layers: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The layers of a loaded model that have each requested site."""
    places = models.where_sites_are(loaded, request.sites, layers)
    return {site: place.layers for site, place in places.items() if place.layered} | {"router": loaded.router_layers}


def _check_names(request: Request, wanted: Sequence[Wanted], view: View | None) -> None:
    """Raise if a variable would have the name of a column in the store, or a column that of a variable."""
    if view is None:
        return
    variables, columns = {variable.name for variable in wanted}, set(view.columns("prompts"))
    if same := sorted(variables & columns):
        raise InvalidArgumentError(
            f"{same[0]!r} is a column of {view.where}, and would be the name of a variable too: choose another name for the site"
        )
    spans = {part.span_column for part in request.parts if part is not None}
    if pooled := next((name for name in sorted(set(request.columns) - spans) if view.pooled_by(name)), None):
        raise InvalidArgumentError(
            f"coords names {pooled!r}, the characters that {next(iter(view.pooled_by(pooled)))!r} of {view.where} is pooled over: give the "
            "column another name, or other spans with over="
        )
    held = {name for level in LEVELS for name in view.variables(level)}
    if same := sorted(held & set(request.columns)):
        raise InvalidArgumentError(f"{same[0]!r} is a variable of {view.where}: choose another name for that column")


def _held_elsewhere(lookup: Lookup) -> tuple[HeldElsewhere, ...]:
    """Other groups of a model of this name that hold missing prompts with all that is requested. Reads documents only."""
    request, model, found = lookup.request, lookup.model, []
    lacking = lookup.prompts.take(lookup.missing)
    for info in request.store.groups(whole=False).values():
        if info == lookup.group or not is_alike(request, model.name, info) or not request.store.holds_parts(info.name):
            continue
        try:
            missing, _ = _find_gaps(request, lookup.wanted, request.store.view(info, whole=False), lacking)
        except LmprobeZarrError:
            continue  # such as a prompt with the same hash: that group cannot serve
        if len(missing) < len(lacking):
            differs = contradictions(request, model, info)
            own = [name for name in info.provenance if name not in (*models.FIXED_FIELDS, *request.choice.provenance)]
            differs |= {name: f"{name} is {info.provenance[name]!r} there" for name in own if not unrecorded(info)}
            found.append(
                HeldElsewhere(
                    group=info.name, model=info.model, prompts=len(lacking) - len(missing), unknown=unrecorded(info), differs=tuple(differs)
                )
            )
    return tuple(found)


def _count_in_lmprobe(lookup: Lookup) -> int:
    """How many missing prompts lmprobe's own entries beside the store have. One list of a folder; no file is opened."""
    cache = beside(lookup.request.store) if lookup.request.kind == "text" and lookup.request.choice.by_name else None
    if cache is None:
        return 0
    held = cache.hashes(lookup.request.choice.model)
    return sum(lookup.prompts.sha256[i][:HASH_DIGITS] in held for i in lookup.missing)


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
        if variable.part is not None and variable.part.span_column:
            stored &= _same_spans(request, view, variable.part.span_column, prompts.first[places], known)
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


def _same_spans(request: Request, view: View, column: str, places: Ints, rows: Ints) -> Mask:
    """Which prompts are stored with the span that is asked for now."""
    wanted = request.columns[column][places]
    if column not in view.columns("prompts"):
        return np.zeros(len(rows), bool)
    return np.asarray(view.covers("prompts", column, rows, ())[0] & read_column(view, column, rows).equals(wanted))


def _check_spans(lookup: Lookup) -> None:
    """Raise if stored values of a part would be left with another span than the one that is asked for now.

    A prompt has one span of a part, so all that is pooled over the part has to be computed anew with it.
    """
    request, view, prompts = lookup.request, lookup.view, lookup.prompts
    for part in request.parts:
        if view is None or part is None or not part.span_column or part.span_column not in view.columns("prompts"):
            continue
        rows = view.find([prompts.sha256[i] for i in lookup.missing])
        places, rows = lookup.missing[rows >= 0], rows[rows >= 0]
        other = ~_same_spans(request, view, part.span_column, prompts.first[places], rows)
        places, rows = places[other], rows[other]
        wanted = {variable.name: variable.layers for variable in lookup.wanted}
        for name, info in view.pooled_by(part.span_column).items():
            layers = tuple(np.setdiff1d(view.layers("prompts"), wanted.get(name, ())).tolist()) if info.layered else ()
            if not len(rows) or (name in wanted and not layers):
                continue
            stale = view.covers("prompts", name, rows, layers)
            if not stale.any():
                continue
            where = f" in layers {describe_layers([layers[i] for i in np.flatnonzero(stale.any(axis=1))])}" if layers else ""
            raise InvalidArgumentError(
                f"prompts[{prompts.first[places[np.argmax(stale.any(axis=0))]]}] is stored with another span of over={part.name!r}, and "
                f"{name!r}{where} would be left with it: ask for that too, in this call, or give the part another name"
            )


def _has_all(view: View, variable: Wanted, rows: Ints) -> Mask:
    """Which rows have all of a variable."""
    stored = np.asarray(view.covers(variable.level, variable.name, rows, variable.layers).all(axis=0))
    if variable.at_least is not None and stored.any():
        stored[stored] = view.row_lengths(variable.level, variable.name, rows[stored]) >= variable.at_least
    return stored
