"""Scores of a sweep at a glance: the best layer of each probe, as text, as a card for notebooks and as a dataset. Reads nothing but scores.

The best of many is a choice on the scores that are shown, which makes them too high. Everything here says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import numpy as np
import xarray as xr

from lmprobe_zarr.batch import list_names
from lmprobe_zarr.display import Html, card, sparkline, table
from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.interchange import to_interchange
from lmprobe_zarr.probes.metrics import parse_metrics
from lmprobe_zarr.sweeps.shuffles import describe_shuffles, is_of_shuffles
from lmprobe_zarr.tokens import is_inner_dim
from lmprobe_zarr.typing import Array

__all__ = ["best_scores", "describe_scores", "scores_card"]

_REPEATED: Final = ("fold", "seed", "repeat")
#: Numbers of a sweep that are no scores.
_NO_SCORES: Final = ("fit_seconds", "pass_seconds", "inner_score")
_USUAL: Final = ("accuracy", "auroc", "r2")
_MOST_ROWS: Final = 12  # of a card, and lines of a text


def _describe_best(n: int, dim: str = "layer") -> str:
    """What to know of the best of `n` entries along a dim."""
    return (
        f"the best of {n} {dim}s was chosen by the score that is shown, which is therefore too high: "
        f"sweep(…, choose={dim!r}) chooses within the training folds"
    )


def describe_scores(data: xr.Dataset) -> str | None:
    """A line for each probe and usual metric with the best layer; None where there are no scores over layers and probes."""
    if "chosen" in data.attrs and "layer" not in data.dims:
        return _describe_chosen(data)
    rows = _scores_by_probe(data)
    if not rows:
        return None
    lines = []
    for probe, metric, layers, values, beside in rows[:_MOST_ROWS]:
        if np.isfinite(values).any():
            best = int(np.nanargmax(values))
            lines.append(f"  {probe}: best {metric} {values[best]:.3f} at layer {layers[best]}" + f" ({beside})" * bool(beside))
    if len(rows) > _MOST_ROWS:
        lines.append(f"  (and {len(rows) - _MOST_ROWS} more: .lz.table() shows all)")
    if lines and data.sizes["layer"] > 1:
        lines.append(f"  ({_describe_best(data.sizes['layer'])})")
    return "\n".join(lines)


def _describe_chosen(data: xr.Dataset) -> str | None:
    rows = _chosen_by_probe(data)
    if rows is None:
        return None
    lines = [f"  {probe}: {metric} {value:.3f}{f' with {chosen}' * bool(chosen)}" for probe, metric, value, chosen in rows]
    return "\n".join([*lines, f"  (chosen: {data.attrs['chosen']})"])


def _chosen_by_probe(data: xr.Dataset) -> list[tuple[str, str, float, str]] | None:
    """For each probe and usual metric: both names, the mean score, and what was chosen, how often."""
    if "probe" not in data.dims:
        return None
    rows = []
    for number, probe in enumerate(data["probe"].values.tolist()):
        words = []
        for dim in ("variable", "layer", "probe", "strength"):
            if f"chosen_{dim}" in data and "probe" in data[f"chosen_{dim}"].dims:
                words += _count_chosen(dim, data[f"chosen_{dim}"].isel(probe=number).values)
        metrics = [name for name in _USUAL if name in data and "probe" in data[name].dims]
        rows += [(str(probe), metric, float(data[metric].isel(probe=number).mean()), ", ".join(words)) for metric in metrics]
    return rows


def _count_chosen(dim: str, values: Array) -> list[str]:
    flat = values.ravel()
    known = flat[~np.isnan(flat)] if flat.dtype.kind == "f" else flat[flat != ""] if flat.dtype.kind in "OU" else flat
    if not len(known):
        return []
    found, counts = np.unique(known, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    shown = [f"{found[place]:g}" if found.dtype.kind in "if" else str(found[place]) for place in order[:3]]
    times = [f"{name} (in {counts[place]} of {len(flat)})" for name, place in zip(shown, order, strict=False)]
    return [f"{dim} {' or '.join(times)}{' or others' if len(order) > 3 else ''}"]


def scores_card(data: xr.Dataset) -> Html | None:
    """The same as a card, with a curve over the layers for each probe; None where there are no such scores."""
    attrs = data.attrs
    origin = " from ".join(str(attrs[name]) for name in ("labels", "variable") if attrs.get(name))
    note = " · ".join(part for part in (str(attrs.get("model", "")), origin) if part)
    if "chosen" in attrs and "layer" not in data.dims:
        chosen = _chosen_by_probe(data)
        if chosen is None:
            return None
        shown = [(probe, metric, Html(f"{value:.3f}"), what) for probe, metric, value, what in chosen]
        note = " · ".join(part for part in (note, f"chosen: {attrs['chosen']}") if part)
        return card("scores of a sweep", note, table(("probe", "score", "mean", "with"), shown))
    rows = _scores_by_probe(data)
    if not rows:
        return None
    body: list[tuple[object, ...]] = []
    for probe, metric, layers, values, beside in rows[:_MOST_ROWS]:
        if not np.isfinite(values).any():
            body.append((probe, metric, "undefined", "", ""))
            continue
        low, high, best = float(np.nanmin(values)), float(np.nanmax(values)), int(np.nanargmax(values))
        label = f"{metric} of {probe} by layer, from {low:.3f} to {high:.3f}, highest at layer {layers[best]}"
        curve = sparkline(values.tolist(), low, high, label=label) if len(layers) > 1 else Html("")
        body.append((f"{probe} ({beside})" if beside else probe, metric, Html(f"{high:.3f}"), str(layers[best]), curve))
    if len(rows) > _MOST_ROWS:
        body.append((f"and {len(rows) - _MOST_ROWS} more", "", "", "", ""))
    if data.sizes["layer"] > 1:
        note = " · ".join(part for part in (note, _describe_best(data.sizes["layer"])) if part)
    return card("scores of a sweep", note, table(("probe", "score", "best", "at layer", "by layer"), body))


def _scores_by_probe(data: xr.Dataset) -> list[tuple[str, str, Array, Array, str]]:
    """For each probe and usual metric: both names, the layers, the mean score of each layer, and what shuffled labels gave.

    Empty if there are no scores.
    Where there are several variables, labels or other entries, each has rows of its own, under the name of the probe with that entry.
    """
    if not {"layer", "probe"} <= set(data.dims):
        return []
    metrics = [name for name in _USUAL if name in data and {"layer", "probe"} <= set(data[name].dims)]
    found = []
    for metric in metrics:
        scores = data[metric]
        others = [dim for dim in scores.dims if dim not in ("layer", "probe", *_REPEATED)]
        means = scores.mean([dim for dim in scores.dims if dim in _REPEATED]).sortby("layer").transpose("probe", *others, "layer")
        for place in np.ndindex(*means.shape[:-1]):
            row = means[place]
            entries = [row[dim].item() if dim in means.coords else at for dim, at in zip(others, place[1:], strict=True)]
            named = [f"{dim} {entry}" for dim, entry in zip(others, entries, strict=True) if means.sizes[dim] > 1]
            probe = str(row["probe"].item())
            of_entry = data.isel(dict(zip(others, place[1:], strict=True)))
            beside = describe_shuffles(of_entry, metric, probe)
            found.append((", ".join([probe, *named]), metric, means.layer.values, row.values, beside))
    return sorted(found, key=lambda scores_of_probe: scores_of_probe[0])


def best_scores(data: xr.Dataset, metric: str | None = None, along: str | Iterable[str] = "layer") -> xr.Dataset:
    """The best entries with their scores; see `lmprobe_zarr.accessor.DatasetAccessor.best`."""
    held_by_probe = {str(name): held for name, held in data.data_vars.items() if held.dtype.kind == "f" and "probe" in held.dims}
    metrics = [
        name
        for name, held in held_by_probe.items()
        if name not in _NO_SCORES
        and not name.startswith("chosen_")
        and not is_of_shuffles(held)
        and not {"bound", "prompt"} & set(held.dims)
        and not any(map(is_inner_dim, held.dims))
    ]
    if not metrics:
        raise InvalidArgumentError(f"this holds no scores by probe to choose by (dims {dict(data.sizes)}): give what sweep returns")
    metric = metrics[0] if metric is None else metric
    if not isinstance(metric, str) or metric not in metrics:
        raise InvalidArgumentError(f"there is no score {metric!r:.60} to choose by: use one of {', '.join(map(repr, metrics))}")
    held = data[metric]
    dims = list_names("along", along, "layer")
    possible = [str(dim) for dim in held.dims if dim not in _REPEATED]
    wrong = next((dim for dim in dims if dim not in possible), None)
    if wrong is not None or not dims:
        if f"chosen_{wrong}" in data:
            raise InvalidArgumentError(
                f"{wrong!r} was chosen within each training fold: scores.{metric}.mean('fold') is its score, and scores.chosen_{wrong} "
                "says which was chosen"
            )
        raise InvalidArgumentError(f"{metric!r} has no dim {wrong!r} to choose along: use some of {', '.join(map(repr, possible))}")
    means = held.mean([dim for dim in _REPEATED if dim in held.dims])
    if "probe" in dims and "kind" in means.coords:
        means = means.isel(probe=np.flatnonzero(means["kind"].values == "probe"))
    rest = [dim for dim in means.dims if dim not in dims]
    values = means.transpose(*rest, *dims).values.reshape(*(means.sizes[dim] for dim in rest), -1)
    signed = np.where(np.isnan(values), -np.inf, values if _larger_is_better(metric, data) else -values)
    best = signed.argmax(axis=-1)
    undefined = np.isnan(values).all(axis=-1)
    n = values.shape[-1]
    chosen = f"the best of {n}, by these scores themselves"
    why = (
        f"{chosen}, which are too high because of it: sweep(…, choose={dims[0] if len(dims) == 1 else dims!r}) chooses within the training "
        "folds, and reports the scores of other prompts"
    )
    picked = np.take_along_axis(values, best[..., None], -1)[..., 0]
    found = xr.Dataset({metric: (rest, picked, {**held.attrs, "chosen": why})}, attrs={**data.attrs, "chosen": why})
    places = np.unravel_index(best, [means.sizes[dim] for dim in dims])
    for dim, place in zip(dims, places, strict=True):
        labels = means[dim].values if dim in means.coords else np.arange(means.sizes[dim])
        at = labels[place]
        if undefined.any():
            at = np.where(undefined, np.nan, at) if labels.dtype.kind in "iuf" else np.where(undefined, "", at.astype(object))
        found[f"best_{dim}"] = (rest, at)
    coords = {name: coord for name, coord in means.coords.items() if not set(coord.dims) & set(dims)}
    return to_interchange(found.assign_coords({**coords, "chosen_by": chosen if n > 1 else "there is a single one"}))


def _larger_is_better(metric: str, data: xr.Dataset) -> bool:
    task: Any = data.attrs.get("task", "classification")
    try:
        return bool(parse_metrics(metric, task, 2)[0].larger_is_better)
    except InvalidArgumentError:
        return True
