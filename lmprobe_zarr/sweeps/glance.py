"""Scores of a sweep at a glance: the best layer of each probe, as text and as a card for notebooks. Reads nothing but scores."""

from __future__ import annotations

import numpy as np
import xarray as xr

from lmprobe_zarr.display import Html, card, sparkline, table
from lmprobe_zarr.sweeps.shuffles import describe_shuffles
from lmprobe_zarr.typing import Array

__all__ = ["describe_scores", "scores_card"]


def describe_scores(data: xr.Dataset) -> str | None:
    """A line for each probe and usual metric with the best layer; None where there are no scores over layers and probes."""
    rows = _scores_by_probe(data)
    if not rows:
        return None
    lines = []
    for probe, metric, layers, values in rows:
        if np.isfinite(values).any():
            best = int(np.nanargmax(values))
            beside = describe_shuffles(data, metric, probe)
            lines.append(f"  {probe}: best {metric} {values[best]:.3f} at layer {layers[best]}" + f" ({beside})" * bool(beside))
    return "\n".join(lines)


def scores_card(data: xr.Dataset) -> Html | None:
    """The same as a card, with a curve over the layers for each probe; None where there are no such scores."""
    rows = _scores_by_probe(data)
    if not rows:
        return None
    attrs = data.attrs
    body: list[tuple[object, ...]] = []
    for probe, metric, layers, values in rows:
        if not np.isfinite(values).any():
            body.append((probe, metric, "undefined", "", ""))
            continue
        low, high, best = float(np.nanmin(values)), float(np.nanmax(values)), int(np.nanargmax(values))
        label = f"{metric} of {probe} by layer, from {low:.3f} to {high:.3f}, highest at layer {layers[best]}"
        curve = sparkline(values.tolist(), low, high, label=label) if len(layers) > 1 else Html("")
        beside = describe_shuffles(data, metric, probe)
        body.append((f"{probe} ({beside})" if beside else probe, metric, Html(f"{high:.3f}"), str(layers[best]), curve))
    origin = " from ".join(str(attrs[name]) for name in ("labels", "variable") if attrs.get(name))
    note = " · ".join(part for part in (str(attrs.get("model", "")), origin) if part)
    return card("scores of a sweep", note, table(("probe", "score", "best", "at layer", "by layer"), body))


def _scores_by_probe(data: xr.Dataset) -> list[tuple[str, str, Array, Array]]:
    """For each probe and usual metric: both names, the layers, and the mean score of each layer. Empty if there are no scores."""
    if not {"layer", "probe"} <= set(data.dims):
        return []
    metrics = [name for name in ("accuracy", "auroc", "r2") if name in data and {"layer", "probe"} <= set(data[name].dims)]
    found = []
    for metric in metrics:
        scores = data[metric]
        means = scores.mean([dim for dim in scores.dims if dim not in ("layer", "probe")]).sortby("layer").transpose("probe", "layer")
        found += [(str(probe), metric, means.layer.values, row.values) for probe, row in zip(means.probe.values, means, strict=True)]
    return sorted(found, key=lambda scores_of_probe: scores_of_probe[0])
