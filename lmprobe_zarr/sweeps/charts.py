"""The scores of a sweep as charts by layer, with a note on what was scored. Computes no score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import xarray as xr

from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.pages import Chart, Series
from lmprobe_zarr.sweeps.shuffles import describe_shuffles, is_of_shuffles
from lmprobe_zarr.tokens import is_inner_dim
from lmprobe_zarr.typing import Array

__all__ = ["choose_layer", "describe_charts", "draw_scores", "find_scored", "thin_layers"]

#: What bounds the charts, whatever the size of the sweep.
SHOWN_LAYERS: Final = 160
SHOWN_CURVES: Final = 12
SHOWN_METRICS: Final = 8

_TITLES: Final = {"accuracy": "Accuracy", "auroc": "AUROC", "r2": "R²"}
#: Variables of a sweep that are no scores.
_NO_SCORES: Final = ("fit_seconds", "n_train", "n_test", "inner_score", "chosen_strength")


def find_scored(scores: Any, models: Sequence[str]) -> int:
    """The index of the model that scores belong to.

    Raises
    ------
    InvalidTypeError
        Not a dataset.
    InvalidArgumentError
        Not the scores of a sweep, or scores of another model, or of one that several groups have.
    """
    if not isinstance(scores, xr.Dataset):
        raise InvalidTypeError(f"scores are the xarray.Dataset that sweep gives, not {type(scores).__name__}")
    if not _list_metrics(scores):
        if "chosen_layer" in scores:
            raise InvalidArgumentError(
                "the layer of these scores was chosen within each training fold, so there is nothing to plot by layer: "
                "give those of a sweep without choose"
            )
        raise InvalidArgumentError(f"scores have no variable over layer and probe (dims {dict(scores.sizes)}): give what sweep gives")
    model = scores.attrs.get(
        "model", scores.coords["model"].item() if "model" in scores.coords and not scores.coords["model"].ndim else None
    )
    if model is None and len(models) == 1:
        return 0
    if model not in models:
        raise InvalidArgumentError(f"scores are of model {model!r}, and shown is {', '.join(models) or 'nothing'}: choose it with model=")
    if (n := models.count(str(model))) > 1:
        raise InvalidArgumentError(f"scores are of model {model!r}, of which {n} groups are shown: choose one of them with group=")
    return models.index(str(model))


def _list_metrics(scores: xr.Dataset) -> list[str]:
    """Names of the scores, which are numbers over layer and probe; the usual ones come first."""
    found = [
        str(name)
        for name, v in scores.data_vars.items()
        if {"layer", "probe"} <= set(v.dims)
        and v.dtype.kind == "f"
        and name not in _NO_SCORES
        and v.dims[-1] != "prompt"
        and not is_inner_dim(v.dims[-1])
        and not is_of_shuffles(v)
    ]
    known = list(_TITLES)
    return sorted(found, key=lambda name: known.index(name) if name in known else len(known))


def draw_scores(scores: xr.Dataset) -> tuple[Chart, ...]:
    """One chart per metric; see `_draw_metric`."""
    scores = scores.sortby("layer")
    return tuple(_draw_metric(scores, metric) for metric in _list_metrics(scores)[:SHOWN_METRICS])


def _draw_metric(scores: xr.Dataset, metric: str) -> Chart:
    """One curve per probe and place on further dims: the mean over folds and seeds, with a band from the lowest to the highest."""
    step = -(-scores.sizes["layer"] // SHOWN_LAYERS)
    array = scores[metric].isel(layer=slice(None, None, step))
    averaged = [dim for dim in ("fold", "seed", "repeat") if dim in array.dims]
    rest = [dim for dim in array.dims if dim not in ("layer", *averaged)]
    array = array.transpose(*rest, "layer", *averaged)
    kinds = scores["kind"].values if "kind" in scores.coords and scores["kind"].dims == ("probe",) else None
    curves = []
    for place in np.ndindex(*(array.sizes[dim] for dim in rest)):
        at = dict(zip(rest, place, strict=True))
        names = {dim: array[dim].values[i] if dim in array.coords or dim == "probe" else i for dim, i in at.items()}
        name = ", ".join(str(value) if dim == "probe" else f"{dim} {value}" for dim, value in names.items())
        values = np.asarray(array.values[place], float).reshape(array.sizes["layer"], -1)
        curves.append(_average_curve(name, values, "probe" if kinds is None else str(kinds[at["probe"]])))
    curves.sort(key=lambda curve: curve.kind == "control")
    lines = []
    if metric == "auroc":
        lines = [("chance", 0.5)]
    elif metric == "accuracy" and "majority_share" in scores.attrs:
        share = float(scores.attrs["majority_share"])
        lines = [(f"majority class {share:.2f}", share)]
    note = f"The first {SHOWN_CURVES} of {len(curves)} curves." if len(curves) > SHOWN_CURVES else ""
    for probe in scores["probe"].values.tolist():
        beside = describe_shuffles(scores, metric, probe)
        note += f"{' ' * bool(note)}Best layer of {probe}: {beside}." if beside else ""
    title = _TITLES.get(metric, str(scores[metric].attrs.get("long_name", metric)))
    return Chart(
        title=title[:1].upper() + title[1:],
        unit=metric,
        layers=tuple(int(layer) for layer in array.layer.values),
        series=tuple(curves[:SHOWN_CURVES]),
        lines=tuple(lines),
        note=note,
    )


def _average_curve(name: str, values: Array, kind: str) -> Series:
    defined = np.isfinite(values).any(axis=1)
    mean, low, high = (np.full(len(values), np.nan) for _ in range(3))
    mean[defined], low[defined], high[defined] = (f(values[defined], axis=1) for f in (np.nanmean, np.nanmin, np.nanmax))
    # A single score has no spread, which is not a spread of 0.
    several = np.isfinite(values).sum(axis=1) > 1
    low[~several], high[~several] = np.nan, np.nan
    banded = bool(several.any())
    return Series(
        name=name, values=mean, low=low if banded else None, high=high if banded else None, kind="control" if kind == "control" else "probe"
    )


def describe_charts(scores: xr.Dataset) -> str:
    """What was scored, over how many folds, and what bands and dashes mean."""
    attrs = scores.attrs
    named = [f"labels {attrs['labels']!r}"] if attrs.get("labels") else []
    of = ", ".join([*named, *([f"from {attrs['variable']}"] if attrs.get("variable") else [])])
    folds = scores.sizes.get("fold", 1)
    over = f"Mean of {folds} folds; the band reaches from the lowest to the highest." if folds > 1 else "One fold."
    controls = " Dashed and grey: controls." if "kind" in scores.coords and (scores["kind"].values == "control").any() else ""
    layers = scores.sizes.get("layer", 1)
    best = f" The highest of {layers} layers is too high as a score of that layer, since it was chosen by it." if layers > 1 else ""
    return f"{of[:1].upper() + of[1:]}. {over}{controls}{best}" if of else f"{over}{controls}{best}"


def thin_layers(layers: tuple[int, ...]) -> tuple[int, ...]:
    """The layers that a page shows: all, or every n-th where there are too many."""
    return layers[:: -(-len(layers) // SHOWN_LAYERS) or 1]


def choose_layer(layers: tuple[int, ...], charts: tuple[Chart, ...]) -> int:
    """The layer that is selected when the page opens: the best one by the first metric, else the middle one."""
    for chart in charts[:1]:
        means = [np.asarray(series.values, float) for series in chart.series if series.kind == "probe"]
        if means and np.isfinite(means).any():
            best = int(chart.layers[int(np.nanargmax(np.nan_to_num(np.array(means), nan=-np.inf).max(axis=0)))])
            if best in layers:
                return best
    return layers[len(layers) // 2] if layers else 0
