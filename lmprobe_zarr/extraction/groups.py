"""Which stored groups may serve a request: those that record all that it needs, and those that the caller says are of the same model.

An imported group records little or nothing of how its activations came about. It never serves by itself. A call that names it, or that
gives ``provenance="any"``, takes the caller's word for what it does not record; what it does record must agree.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lmprobe_zarr.batch import ALL, split_variable
from lmprobe_zarr.errors import AmbiguousProvenanceError, InvalidArgumentError
from lmprobe_zarr.extraction import models
from lmprobe_zarr.extraction.models import ModelIdentity
from lmprobe_zarr.extraction.request import Request
from lmprobe_zarr.log import warn
from lmprobe_zarr.store import NamedModel, ambiguous
from lmprobe_zarr.store.format import LEVELS, GroupInfo, unrecorded_fields

if TYPE_CHECKING:
    from lmprobe_zarr.extraction.models import ReadyModel

__all__ = ["candidates", "contradictions", "group_of", "is_alike", "unrecorded"]


def candidates(request: Request, model: ModelIdentity | ReadyModel) -> list[GroupInfo]:
    """The stored groups that may serve a request, the most certain first. Of those that record everything there is one at most.

    Parameters
    ----------
    request : Request
    model : ModelIdentity or ReadyModel
        What is known of the model; a loaded one is known altogether.

    Raises
    ------
    AmbiguousProvenanceError
        Several groups match what is known of the model; or any may, and several models have its name.
    InvalidArgumentError
        The group that the call names says that it is of another model, or that it was computed otherwise.
    """
    known = _find_known(request, model) if isinstance(model, ModelIdentity) else _find_own(request, model)
    if known is not None and request.group is None:
        known = request.store.groups(whole=False).get(_for_sites(request, known).name)
    certain = [known] if known is not None and request.group in (None, known.name) and not _others(request, known) else []
    if request.group is not None:
        named = request.store.groups(whole=False).get(request.group)
        if certain or named is None:
            return certain
        if not is_alike(request, model.name, named):
            raise InvalidArgumentError(
                f"group={request.group!r} is of model {named.model!r}, not of {model.name!r}: if that is the same model, say so with "
                f"name={named.model!r}"
            )
        if problems := contradictions(request, model, named):
            raise InvalidArgumentError(
                f"group={request.group!r} was asked for, but it says otherwise than this call: {'; '.join(problems.values())}\n"
                "give the same here, or leave group out"
            )
        if other := _others(request, named):
            raise InvalidArgumentError(
                f"group={request.group!r} was asked for, but it holds {_told(other)}: choose another name for it, or leave group out"
            )
        return [named]
    if not request.any_provenance:
        return certain
    held = [info for info in request.store.groups(whole=False).values() if info not in certain and is_alike(request, model.name, info)]
    taken = [info for info in held if not contradictions(request, model, info) and request.store.holds_parts(info.name)]
    taken = [info for info in taken if not _others(request, info)]
    taken = [info for info in taken if _is_named(request, model.name, info)] or taken
    if len(names := sorted({info.model for info in taken if not _is_named(request, model.name, info)})) > 1:
        raise AmbiguousProvenanceError(
            f"provenance='any' does not say which of {', '.join(map(repr, names))} is {model.name!r}: name one of their groups with group="
        )
    return certain + sorted(taken, key=lambda info: (len(unrecorded(info)), len(info.provenance), info.name))


def group_of(loaded: ReadyModel, request: Request) -> GroupInfo:
    """The group of a loaded model.

    Modules that were named although they are found anyway make no group of their own. A group that an earlier version made of them is
    used further.
    """
    depth = {"num_layers": loaded.num_layers, "hidden_size": loaded.hidden_size}
    group = GroupInfo(model=loaded.name, provenance=loaded.provenance, **depth)
    named = models.modules_field(request.choice.modules)
    if named is not None and loaded.provenance.get("modules") != named:
        earlier = GroupInfo(model=loaded.name, provenance={**loaded.provenance, "modules": named}, **depth)
        held = request.store.groups(whole=False)
        group = earlier if earlier.name in held and group.name not in held else group
    return _for_sites(request, group)


def _for_sites(request: Request, info: GroupInfo) -> GroupInfo:
    """The group; or, where it holds something else under a name that is requested, one whose provenance says what is requested.

    That one may exist, and hold something else under another name that is requested now.
    """
    made, told = info, []
    while other := _others(request, made):
        further = {name: wanted for name, (_, wanted) in sorted(other.items())}
        if all(made.provenance.get(name) == wanted for name, wanted in further.items()):
            raise InvalidArgumentError(
                f"group {made.name!r} holds {_told(other)}, though its provenance says otherwise: choose another name for what this call "
                "asks for"
            )
        told.append(f"{made.name!r} holds {_told(other)}")
        made = GroupInfo(
            model=info.model,
            provenance={**made.provenance, **further},
            num_layers=info.num_layers,
            hidden_size=info.hidden_size,
        )
    if told:
        warn(f"group {', and '.join(told)}: what this call asks for is kept in a group of its own, {made.name!r}", UserWarning)
    return made


def _told(other: Mapping[str, tuple[str, str]]) -> str:
    return " and ".join(held for held, _ in other.values())


def _others(request: Request, info: GroupInfo) -> dict[str, tuple[str, str]]:
    """What a group holds of another module or other tokens than requested under the same name.

    By the field of a provenance that tells them apart: what is held, in words, and what is requested.
    """
    found: dict[str, tuple[str, str]] = {}
    paths, parts = request.sites.paths, {name: text for name, text in request.part_names.items() if text}
    if not (paths or parts) or not request.store.holds_parts(info.name):
        return found
    view = request.store.view(info, whole=False)
    for level in LEVELS:
        for name, array in view.variables(level).items():
            site, _, part = split_variable(name) if level == "prompts" else (name, None, ALL)
            path, over = (str(array.attributes.get(key, "")) for key in ("site_path", "over"))
            if site in paths and not _same_module(path, paths[site]):
                found[f"site_{site}"] = f"{site!r} of {f'the module {path!r}' if path else 'a module that is not recorded'}", paths[site]
            if part in parts and over != parts[part]:
                found[f"over_{part}"] = f"what is pooled over {part!r} of {over or 'tokens that are not recorded'}", parts[part]
    return found


def is_alike(request: Request, name: str, info: GroupInfo) -> bool:
    """Whether a group could be of a model by its name: it is the model's, or a path that leads to it or ends in its name."""
    same_end = info.model.rstrip("/").rpartition("/")[2] == name.rpartition("/")[2]
    return _is_named(request, name, info) or (same_end and ("/" not in name or NamedModel(info.model).is_path))


def _is_named(request: Request, name: str, info: GroupInfo) -> bool:
    model = request.choice.model
    by_path = isinstance(model, (str, os.PathLike)) and request.choice.name is None and NamedModel(model).is_named(info)
    return info.model == name or by_path


def contradictions(request: Request, model: ModelIdentity | ReadyModel, info: GroupInfo) -> dict[str, str]:
    """The fields in which a group says otherwise than is known of the model, with both values in words."""
    known: Mapping[str, Any] = {**model.provenance, **request.choice.provenance}
    found = {}
    for name, value in {**known, "num_layers": model.num_layers, "hidden_size": model.hidden_size}.items():
        if name in ("num_layers", "hidden_size"):
            held = getattr(info, name)
            differs = None not in (held, value) and held != value
        else:
            held = info.provenance.get(name)
            # What a whole record of an extraction does not name is as it is for a plain model.
            differs = (name in info.provenance and held != value) or (name not in info.provenance and not unrecorded(info))
        if differs and not (name == "compute_dtype" and request.any_dtype):
            found[name] = f"{name} is {held!r} there, and {value!r} here"
    for name in set(info.provenance) & set(models.FIXED_FIELDS) - set(models.PROVENANCE_FIELDS) - set(known):
        if name == "engine" and unrecorded(info):
            continue  # an import says what computed it, and is taken on the caller's word
        found[name] = f"{name} is {info.provenance[name]!r} there, and nothing here"
    return found


def unrecorded(info: GroupInfo) -> tuple[str, ...]:
    """The fields of the provenance that a group does not record; none of a group that `extract` made."""
    return unrecorded_fields(info.provenance)


def _find_own(request: Request, loaded: ReadyModel) -> GroupInfo | None:
    return request.store.groups(whole=False).get(group_of(loaded, request).name)


def _find_known(request: Request, identity: ModelIdentity) -> GroupInfo | None:
    """The stored group that fits what is known of a named model."""
    known = {**identity.provenance, **request.choice.provenance}
    if request.any_dtype:
        known.pop("compute_dtype", None)
    # A group with further fields, such as ``autocast`` or a user's own ``steering``, is found only if these are known or given.
    fixed = {*models.PROVENANCE_FIELDS, *known}
    matching = request.store.matching(provenance=known, group=request.group, whole=False)
    found = [info for info in matching if info.model == identity.name and fixed.issuperset(info.provenance)]
    if len(found) > 1:
        found = [info for info in found if request.store.holds_parts(info.name)]
    if len(found) > 1 and (request.choice.dtype is None or request.any_dtype):
        # Any dtype is accepted; of several, float32, which is lmprobe's default.
        found = [info for info in found if info.provenance.get("compute_dtype") == "float32"] or found
    if len(found) > 1:
        raise ambiguous(found, request.store.where)
    return found[0] if found else None


def _same_module(held: str, asked: str) -> bool:
    """Whether two paths name one module: outside of the blocks the path of the whole model is longer than that of its body."""
    if not (held.startswith("/") and asked.startswith("/")):
        return held == asked
    return f".{asked[1:]}".endswith(f".{held[1:]}") or f".{held[1:]}".endswith(f".{asked[1:]}")
