"""Which groups a caller names with ``model=``, ``provenance=`` and ``group=``, and the errors where that is none or several.

Looks only at the documents of groups, in one root or several. Never opens a view.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from lmprobe_zarr.errors import AmbiguousProvenanceError, ModelNotStoredError
from lmprobe_zarr.store.format import ABSENT_FIELDS, PROCESS_FIELDS, GroupInfo, Provenance, describe_field
from lmprobe_zarr.store.parts import Catalog, any_holds_parts, groups_of, urls_of

__all__ = ["ambiguous", "choose_group", "differences", "find_group", "find_groups", "matching_groups", "stored_models"]


def choose_group(model: str | None, provenance: Provenance | None, group: str | None) -> Callable[[GroupInfo], bool]:
    """Whether a group matches: no field that is given differs."""

    def matches(info: GroupInfo) -> bool:
        same = all(field in info.provenance and info.provenance[field] == value for field, value in (provenance or {}).items())
        return same and model in (None, info.model) and group in (None, info.name)

    return matches


def matching_groups(
    catalogs: Sequence[Catalog], model: str | None, provenance: Provenance | None, group: str | None, *, whole: bool = True
) -> list[GroupInfo]:
    """Groups in which no field that is given differs, with parts or without; `whole` as in `Catalog.groups`."""
    return list(filter(choose_group(model, provenance, group), groups_of(catalogs, whole=whole).values()))


def stored_models(catalogs: Sequence[Catalog]) -> list[str]:
    """Names of all models of which any part is stored, sorted."""
    return sorted({info.model for name, info in groups_of(catalogs).items() if any_holds_parts(catalogs, name)})


def find_groups(catalogs: Sequence[Catalog], model: str | None, provenance: Provenance | None, group: str | None) -> list[GroupInfo]:
    """All matching groups that hold parts; none where nothing is stored and nothing was named.

    Raises
    ------
    ModelNotStoredError
        Something was named, and no group matches.
    """
    found = [info for info in matching_groups(catalogs, model, provenance, group) if any_holds_parts(catalogs, info.name)]
    if not found and (model is not None or provenance or group is not None):
        raise _not_stored(catalogs, model, provenance, group)
    return found


def find_group(catalogs: Sequence[Catalog], model: str | None, provenance: Provenance | None, group: str | None) -> GroupInfo:
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


def _not_stored(catalogs: Sequence[Catalog], model: str | None, provenance: Provenance | None, group: str | None) -> ModelNotStoredError:
    """The error that says what is stored instead."""
    where = urls_of(catalogs)
    if model is not None and group is None and model in stored_models(catalogs):
        known = [dict(info.provenance) for info in matching_groups(catalogs, model, None, None)]
        return ModelNotStoredError(f"{model!r} is in {where}, but not with provenance {dict(provenance or {})!r}: there is {known!r}")
    if model is None and group is None and not provenance:
        return ModelNotStoredError(f"{where} holds nothing yet: extract something into it first")
    stored = _shortened_names(stored_models(catalogs) if group is None else groups_of(catalogs)) or "nothing yet"
    named = f"group {group!r}" if group is not None else f"model {model!r}"
    return ModelNotStoredError(f"{named} is not in {where}, which holds {stored}: check the name, or extract it first")


def ambiguous(found: Sequence[GroupInfo], where: str) -> AmbiguousProvenanceError:
    """The error that says in words in which fields several matching groups differ."""
    models = sorted({info.model for info in found})
    if len(models) > 1:
        return AmbiguousProvenanceError(f"{where} holds several models ({_shortened_names(models)}): say which with model=")
    names = ", ".join(info.name for info in found)
    return AmbiguousProvenanceError(
        f"{len(found)} groups of {models[0]!r} match; they differ in {differences(found)}\n"
        f"choose with provenance={{…}}, or with group= one of {names}"
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
