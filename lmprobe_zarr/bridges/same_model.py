"""`group_as_extracted`: the group that `lmprobe_zarr.extract` would make of a model, for activations of it that were computed elsewhere.

The model is not loaded: everything comes from its files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from lmprobe_zarr import config
from lmprobe_zarr.batch import HIDDEN_SITES, split_variable
from lmprobe_zarr.bridges.entry import Entry
from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.store import Model
from lmprobe_zarr.store.format import GroupInfo, Provenance

__all__ = ["check_fits", "group_as_extracted", "width_of"]


def group_as_extracted(model: Model, provenance: Provenance) -> GroupInfo:
    """The group of a model that ran on texts in float32, without truncation, as lmprobe runs it.

    Parameters
    ----------
    model : str or path
        A folder or hub id.
    provenance : mapping
        Fields in which it was run otherwise, such as ``{"compute_dtype": "bfloat16"}``, fields that cannot be known from files on this
        machine, and further ones of the caller's own.

    Raises
    ------
    ModelNotFoundError
        There is no such folder, and the name is no hub id.
    InvalidArgumentError
        Not everything is known of the model on this machine.
    """
    # In the function, since the model side is imported with the whole of ``extraction``, which imports this room.
    from lmprobe_zarr.extraction.models import PROVENANCE_FIELDS, identify

    identity = identify(model, dtype="float32", memory=config.weights_memory())
    # Settings of this process, such as autocast, say nothing about the one that computed the activations.
    known = {name: value for name, value in identity.provenance.items() if name in PROVENANCE_FIELDS} | dict(provenance)
    lacking = [name for name in PROVENANCE_FIELDS if name not in known]
    lacking += [name for name in ("num_layers", "hidden_size") if getattr(identity, name) is None]
    if lacking:
        raise InvalidArgumentError(
            f"as_model={str(model)!r}: {', '.join(lacking)} cannot be known from what is on this machine: load the model's tokenizer once, "
            "which fetches its configuration, or import without as_model, and name the group to extract and Probe with group="
        )
    return GroupInfo(model=identity.name, provenance=known, num_layers=identity.num_layers, hidden_size=identity.hidden_size)


def width_of(entries: Iterable[Entry]) -> int | None:
    """The most frequent width of the entries' residual streams; None where there are none."""
    widths = Counter(held.row_shape[-1] for entry in entries for held in entry.holds if split_variable(held.variable)[0] in HIDDEN_SITES)
    return widths.most_common(1)[0][0] if widths else None


def check_fits(group: GroupInfo, entries: Iterable[Entry]) -> None:
    """Raise `InvalidArgumentError` where entries cannot come from the model that they are said to come from."""
    listed = list(entries)
    width = width_of(listed)
    if width is not None and width != group.hidden_size:
        raise InvalidArgumentError(
            f"these activations are {width} wide, and the model {group.model!r} is {group.hidden_size} wide: they are of another model"
        )
    deepest = max((layer for entry in listed for held in entry.holds for layer in held.layers or ()), default=-1)
    if group.num_layers is not None and deepest >= group.num_layers:
        raise InvalidArgumentError(
            f"these activations have a layer {deepest}, and the model {group.model!r} has {group.num_layers} layers: they are of another "
            "model"
        )
