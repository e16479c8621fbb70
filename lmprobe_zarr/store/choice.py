"""TODO: lmprobe_zarr/store/choice.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from lmprobe_zarr.errors import (
    AmbiguousProvenanceError,
)
from lmprobe_zarr.store.format import GroupInfo, Provenance


def choose_group(model: str | None, provenance: Provenance | None, group: str | None) -> Callable[[GroupInfo], bool]:
    """Whether a group is one of those that are meant: no field that is given differs."""

    def meant(info: GroupInfo) -> bool:
        same = all(field in info.provenance and info.provenance[field] == value for field, value in (provenance or {}).items())
        return same and model in (None, info.model) and group in (None, info.name)

    return meant


def ambiguous(found: Sequence[GroupInfo], url: str) -> AmbiguousProvenanceError:
    """The error that names in what several matching groups differ."""
    models = sorted({info.model for info in found})
    if len(models) > 1:
        return AmbiguousProvenanceError(f"{url} holds several models ({named_model(models)}): say which with model=")
    names = ", ".join(info.name for info in found)
    return AmbiguousProvenanceError(
        f"{len(found)} groups of {models[0]!r} match; they differ in {_differing_fields(found)}\n"
        f"choose with provenance={{…}}, or with group= one of {names}"
    )


def named_model(names: Iterable[str]) -> str:
    """Names for a message: a few, on one line, and none of them without end."""
    listed = list(names)
    shown = [name if name.isprintable() and len(name) <= 100 else f"{name[:100]!r}" for name in listed[:20]]
    return ", ".join([*shown, *([f"{len(listed) - 20} more"] if len(listed) > 20 else [])])


def _differing_fields(found: Sequence[GroupInfo]) -> str:
    fields: dict[str, set[str]] = {}
    for name in ("num_layers", "hidden_size"):
        fields[name] = {repr(getattr(info, name)) for info in found}
    for name in sorted({name for info in found for name in info.provenance}):
        fields[name] = {repr(info.provenance[name]) if name in info.provenance else "unknown" for info in found}
    return "; ".join(f"{name}: {' or '.join(sorted(values))}" for name, values in fields.items() if len(values) > 1)
