"""From which stored layer an extraction can go on: all tokens of all missing prompts, exactly as the model computed them. Runs no model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lmprobe_zarr.extraction import models
from lmprobe_zarr.extraction.lookup import Lookup
from lmprobe_zarr.store.parts import read_values
from lmprobe_zarr.typing import Array

if TYPE_CHECKING:
    from lmprobe_zarr.extraction.models import StoredRows

__all__ = ["share_of_work", "start_layer", "stored_rows_of"]


def start_layer(lookup: Lookup) -> int | None:
    """The deepest layer before all that is requested whose residual stream is stored for every token of every missing prompt.

    None where there is none, where its values are stored in another dtype than the model computes in, where something is asked for that
    comes before the blocks, or where an engine runs the model.
    """
    request, view, group = lookup.request, lookup.view, lookup.group
    if view is None or group is None or lookup.unknown or request.refresh or request.choice.engine is not None:
        return None
    if lookup.answers is not None or not len(lookup.missing):
        return None
    info = view.variables("tokens").get("resid")
    if info is None or not info.layered or "site_path" in info.attributes or not view.holds_whole_prompts or request.kind == "pair":
        return None
    if not all(request.sites.layered(site) for site in request.sites):
        return None
    depth = lookup.model.num_layers or group.num_layers
    below = min(request.kept_layers(lookup.layers)) if request.layered else depth
    rows = view.find([lookup.prompts.sha256[i] for i in lookup.missing])
    if not below or (rows < 0).any():
        return None
    layers = tuple(layer for layer in view.layers_with("tokens", "resid") if layer < below)
    complete = np.asarray(view.covers("tokens", "resid", rows, layers)).all(axis=1) if layers else np.zeros(0, bool)
    found = np.array(layers, np.int64)[complete].tolist()
    if not found:
        return None
    arrays = view.source("tokens", "resid", rows, (found[-1],)).arrays
    dtypes = {str(array.info.attributes.get("stored_dtype", array.info.dtype)) for array in arrays}
    return int(found[-1]) if dtypes == {lookup.compute_dtype} else None


def share_of_work(lookup: Lookup, layer: int) -> float:
    """How many of the blocks that a whole pass would run are run after `layer`, as a share."""
    request, depth = lookup.request, lookup.model.num_layers or (0 if lookup.group is None else lookup.group.num_layers) or 0
    last = depth if request.needs_head or not request.layered else max(request.kept_layers(lookup.layers)) + 1
    return max(0, last - layer - 1) / max(1, last)


def stored_rows_of(lookup: Lookup, layer: int) -> StoredRows:
    """What reads the rows after a layer for the model to go on from."""
    view = lookup.view
    assert view is not None  # noqa: S101 - as in `start_layer`

    def read(digests: Sequence[str]) -> Array:
        values: Array = read_values(view, "tokens", "resid", view.find(list(digests)), (layer,))
        rows: Array = values[0]
        return rows

    return models.StoredRows(layer=layer, read=read)
