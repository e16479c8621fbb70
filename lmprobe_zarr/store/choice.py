"""Which groups a caller names with ``model=``, ``provenance=`` and ``group=``, and the errors where that is none or several.

Looks only at the documents of groups, in one root or several. Never opens a view.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias

from lmprobe_zarr.display import nearest
from lmprobe_zarr.errors import AmbiguousProvenanceError, InvalidTypeError, ModelNotStoredError
from lmprobe_zarr.store.format import ABSENT_FIELDS, PROCESS_FIELDS, GroupInfo, Provenance, describe_field
from lmprobe_zarr.store.named import Model, NamedModel
from lmprobe_zarr.store.parts import Catalog, any_holds_parts, groups_of, urls_of

__all__ = [
    "GivenProvenance",
    "ambiguous",
    "choose_group",
    "differences",
    "find_group",
    "find_groups",
    "matching_groups",
    "parse_provenance",
    "stored_models",
]

GivenProvenance: TypeAlias = Provenance | Literal["any"] | None


def parse_provenance(provenance: Any) -> tuple[Provenance, bool]:
    """The fields that a call gives, and whether it takes groups that do not record all fields.

    Raises
    ------
    InvalidTypeError
        Neither a mapping, nor None, nor ``"any"``.
    """
    if provenance is None or isinstance(provenance, Mapping):
        return dict(provenance or {}), False
    if provenance == "any":
        return {}, True
    raise InvalidTypeError(f"provenance={provenance!r}: give a mapping of fields, such as {{'revision': '…'}}, or 'any'")


def choose_group(model: Model | None, provenance: GivenProvenance, group: str | None) -> Callable[[GroupInfo], bool]:
    """Whether a group matches by itself: it is of the model, and no field that is given differs."""
    choose = _chooser(model, provenance, group)
    return lambda info: bool(choose([info]))


def _chooser(model: Model | None, provenance: GivenProvenance, group: str | None) -> Callable[[Iterable[GroupInfo]], list[GroupInfo]]:
    """A function that gives those groups that match; see `NamedModel.choose` for how the model is found."""
    fields, unknown = parse_provenance(provenance)
    named = None if model is None else NamedModel(model)

    def choose(groups: Iterable[GroupInfo]) -> list[GroupInfo]:
        alike = [
            info
            for info in groups
            if group in (None, info.name)
            and all(field in info.provenance and info.provenance[field] == value for field, value in fields.items())
        ]
        # A group that is named is of the model even where it does not record its weights.
        return alike if named is None else named.choose(alike, unknown=unknown or group is not None)

    return choose


def matching_groups(
    catalogs: Sequence[Catalog], model: Model | None, provenance: GivenProvenance, group: str | None, *, whole: bool = True
) -> list[GroupInfo]:
    """Groups in which no field that is given differs, with parts or without; `whole` as in `Catalog.groups`."""
    return _chooser(model, provenance, group)(groups_of(catalogs, whole=whole).values())


def stored_models(catalogs: Sequence[Catalog]) -> list[str]:
    """Names of all models of which any part is stored, sorted."""
    return sorted({info.model for name, info in groups_of(catalogs).items() if any_holds_parts(catalogs, name)})


def find_groups(catalogs: Sequence[Catalog], model: Model | None, provenance: GivenProvenance, group: str | None) -> list[GroupInfo]:
    """All matching groups that hold parts; none where nothing is stored and nothing was named.

    Raises
    ------
    ModelNotStoredError
        Something was named, and no group matches.
    """
    infos = groups_of(catalogs)
    chosen = _chooser(model, provenance, group)
    found = [info for info in chosen(infos.values()) if any_holds_parts(catalogs, info.name)]
    if not found and model is not None:  # evicted groups of the model may have been preferred to one that holds parts
        found = chosen(info for info in infos.values() if any_holds_parts(catalogs, info.name))
    if not found and (model is not None or provenance or group is not None):
        raise _not_stored(catalogs, model, provenance, group)
    return found


def find_group(catalogs: Sequence[Catalog], model: Model | None, provenance: GivenProvenance, group: str | None) -> GroupInfo:
    """The one matching group that holds parts.

    Raises
    ------
    ModelNotStoredError
        No group matches.
    AmbiguousProvenanceError
        Several match.
    """
    found = _without_settings(find_groups(catalogs, model, provenance, group))
    if not found:
        raise _not_stored(catalogs, model, provenance, group)
    if len(found) > 1:
        raise ambiguous(found, urls_of(catalogs))
    return found[0]


def _without_settings(found: Sequence[GroupInfo]) -> list[GroupInfo]:
    """The groups, without those that another one equals in all but settings of the process, such as autocast, which it does without."""

    def plain(info: GroupInfo) -> GroupInfo:
        return replace(info, provenance={name: value for name, value in info.provenance.items() if name not in PROCESS_FIELDS})

    return [info for info in found if plain(info) == info or plain(info) not in found]


def _not_stored(catalogs: Sequence[Catalog], model: Model | None, provenance: GivenProvenance, group: str | None) -> ModelNotStoredError:
    """The error that says what is stored instead."""
    where = urls_of(catalogs)
    fields, _ = parse_provenance(provenance)
    if model is None and group is None and not fields:
        return ModelNotStoredError(f"{where} holds nothing yet: extract something into it first")
    held = [info for name, info in groups_of(catalogs).items() if any_holds_parts(catalogs, name)]
    if model is not None and group is None:
        named = NamedModel(model)
        if known := [dict(info.provenance) for info in named.choose(held)]:
            return ModelNotStoredError(f"{named.given!r} is in {where}, but not with provenance {dict(fields)!r}: there is {known!r}")
        if alike := [info for info in held if info.model == named.name]:
            names = ", ".join(info.name for info in alike)
            return ModelNotStoredError(
                f"the model in {str(named.folder)!r} is not in {where}: what it holds as {named.name!r} has other weights, or does not "
                f"record them\nif it is the same model, name it by model={named.name!r}, or by group= one of {names}"
            )
    there = stored_models(catalogs) if group is None else [*groups_of(catalogs)]
    stored = _shortened_names(there) or "nothing yet"
    near = nearest(group if group is not None else "" if model is None else NamedModel(model).given, there)
    shown = f"group {group!r}" if group is not None else "model None" if model is None else f"model {NamedModel(model).given!r}"
    return ModelNotStoredError(f"{shown} is not in {where}{near}, which holds {stored}: check the name, or extract it first")


def ambiguous(found: Sequence[GroupInfo], where: str) -> AmbiguousProvenanceError:
    """The error that says in words in which fields several matching groups differ."""
    models = sorted({info.model for info in found})
    if len(models) > 1:
        return AmbiguousProvenanceError(f"{where} holds several models ({_shortened_names(models)}): say which with model=")
    names = ", ".join(info.name for info in found)
    folders = len({info.provenance.get("weights") for info in found}) > 1
    return AmbiguousProvenanceError(
        f"{len(found)} groups of {models[0]!r} match; they differ in {differences(found)}\n"
        f"choose with provenance={{…}}, {'with model= the path of the folder, ' if folders else ''}or with group= one of {names}"
    )


def _shortened_names(names: Iterable[str]) -> str:
    """Names for a message: at most 20, each at most 100 characters, on one line."""
    listed = list(names)
    shown = [name if name.isprintable() and len(name) <= 100 else f"{name[:100]!r}" for name in listed[:20]]
    return ", ".join([*shown, *([f"{len(listed) - 20} more"] if len(listed) > 20 else [])])


def differences(found: Sequence[GroupInfo]) -> str:
    """The fields in which groups differ, their values, and what they say; empty for a single group."""
    fields: dict[str, set[str]] = {}
    for name in ("num_layers", "hidden_size"):
        fields[name] = {repr(getattr(info, name)) for info in found}
    for name in sorted({name for info in found for name in info.provenance}):
        fields[name] = {repr(info.provenance[name]) if name in info.provenance else ABSENT_FIELDS.get(name, "unknown") for info in found}
    differing = {name: " or ".join(sorted(values)) for name, values in fields.items() if len(values) > 1}
    return "; ".join(f"{name}: {values}{describe_field(name)}" for name, values in differing.items())
