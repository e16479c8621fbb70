"""What scores of many shuffled labels say about a score: their mean, their spread and a permutation p-value. Never fits.

Labels without meaning are exchangeable, so the score of the true labels is as likely as that of any shuffle to be the best. Where n
shuffles are tried and k are at least as good, p is (1 + k) / (1 + n), which is never 0. Source: B. Phipson and G. K. Smyth, "Permutation
P-values Should Never Be Zero", Statistical Applications in Genetics and Molecular Biology 9 (2010).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any, Final, NamedTuple

import xarray as xr

__all__ = [
    "add_p_values", "count_shuffles", "describe_p_values", "describe_shuffles", "describe_spread", "is_of_many_shuffles", "is_of_shuffles",
    "shuffled_attributes", "shuffled_name", "spread_of_shuffles",
]  # fmt: skip

#: The attribute of every variable that this module makes.
_SHUFFLES: Final = "shuffles"
#: Means over folds differ by rounding where the scores are equal.
_ROUNDING: Final = 1e-12
#: Begins the name of the control of a probe.
_CONTROL: Final = "shuffled_labels:"


def shuffled_name(metric: str) -> str:
    """The name of the variable that holds a metric's score of each shuffle."""
    return f"{metric}_shuffled"


def is_of_shuffles(variable: xr.DataArray) -> bool:
    """Whether a variable holds scores of many shuffles, or a statistic of them, and so is no score of its own."""
    return _SHUFFLES in variable.attrs


def is_of_many_shuffles(scores: xr.Dataset, metric: str, probe: Any) -> bool:
    """Whether the score of a control is a mean over many shuffles, so that its spread over the folds says nothing of a single one."""
    return shuffled_name(metric) in scores and str(probe).startswith(_CONTROL)


def spread_of_shuffles(scores: xr.Dataset, metric: str) -> xr.DataArray | None:
    """The standard deviation over the shuffles (of all seeds), at the control that is their mean.

    Parameters
    ----------
    scores : Dataset
        With the dim ``probe``.
    metric : str

    Returns
    -------
    DataArray or None
        Over the dims of the metric without ``fold`` and ``seed``; NaN for everything else, and for a control whose probe is not there.
        None where labels were not shuffled many times.
    """
    name = shuffled_name(metric)
    if name not in scores or not {"probe", "shuffle"} <= set(scores[name].dims):
        return None
    drawn = scores[name]
    over = [dim for dim in ("shuffle", "seed") if dim in drawn.dims]
    known = drawn.notnull().any(over)
    spread = drawn.where(known, 0.0).std(over).where(known)
    spread = spread.drop_vars([coord for coord in ("kind", "control") if coord in spread.coords])
    return spread.assign_coords(probe=[f"{_CONTROL}{probe}" for probe in spread["probe"].values]).reindex(probe=scores["probe"].values)


def count_shuffles(scores: xr.Dataset) -> str:
    """How many shuffles there are, in words."""
    seeds = scores.sizes.get("seed", 1)
    return f"{scores.sizes['shuffle']} shuffles" + (f" and {seeds} seeds" if seeds > 1 else "")


def describe_spread(scores: xr.Dataset, metrics: Iterable[str]) -> list[str]:
    """A sentence on what ± means for the control; none where labels were not shuffled many times, or the control is not there."""
    spreads = [spread for metric in metrics if (spread := spread_of_shuffles(scores, metric)) is not None]
    if not any(bool(spread.notnull().any()) for spread in spreads):
        return []
    return [f"{_CONTROL.rstrip(':')}: ± over its {count_shuffles(scores)}, of which each counts by its mean over the folds."]


def shuffled_attributes(long_name: str, n: int, *, larger_is_better: bool) -> dict[str, Any]:
    """Attributes of the variable that holds the score of each shuffle."""
    return {
        "long_name": f"{long_name} of the probe on shuffled labels, mean over the folds",
        _SHUFFLES: n,
        "larger_is_better": int(larger_is_better),
    }


def add_p_values(scores: xr.Dataset, metrics: Iterable[str]) -> xr.Dataset:
    """The scores with mean, spread and p-values for each metric whose shuffles they hold.

    Parameters
    ----------
    scores : Dataset
        With ``<metric>_shuffled`` over ``shuffle`` and all dims of the metric but ``fold``.
    metrics : iterable of str

    Returns
    -------
    Dataset
        With four variables more for each metric: ``<metric>_shuffled_mean`` and ``<metric>_shuffled_std``; ``<metric>_p_value``, the
        permutation p-value of each layer by itself; ``<metric>_p_any_layer``, where a shuffle counts that is as good in any layer, so
        that the best of many layers may be chosen by it. All are NaN for controls.
    """
    for metric in metrics:
        name = shuffled_name(metric)
        if name not in scores:
            continue
        shuffled = scores[name]
        real = scores[metric].mean("fold")
        n = shuffled.attrs[_SHUFFLES]
        larger = bool(shuffled.attrs["larger_is_better"])
        drawn = int(shuffled.sizes["shuffle"])
        known = shuffled.notnull().any("shuffle") & real.notnull()
        best = (shuffled.max if larger else shuffled.min)("layer") if "layer" in shuffled.dims else shuffled
        # Of missing scores alone, numpy would warn that there is no mean; `known` leaves these out below.
        filled = shuffled.where(known, 0.0)
        found = {
            f"{name}_mean": (filled.mean("shuffle"), f"mean over {drawn} shuffles of the labels"),
            f"{name}_std": (filled.std("shuffle"), f"standard deviation over {drawn} shuffles of the labels"),
            f"{metric}_p_value": (_p_value(real, shuffled, larger=larger), "permutation p-value of each layer by itself"),
            f"{metric}_p_any_layer": (
                _p_value(real, best, larger=larger),
                "permutation p-value among the best layers of all shuffles: of a layer that was chosen for its score",
            ),
        }
        for new, (values, long_name) in found.items():
            attrs = {"long_name": long_name, _SHUFFLES: n} | ({} if new.endswith(("_mean", "_std")) else {"units": "1"})
            scores[new] = values.where(known).transpose(*real.dims).assign_attrs(attrs)
            scores[new].attrs = attrs
    return scores


def _p_value(real: xr.DataArray, shuffled: xr.DataArray, *, larger: bool) -> xr.DataArray:
    # A shuffle that has no score counts as at least as good.
    worse = shuffled < real - _ROUNDING if larger else shuffled > real + _ROUNDING
    return (1 + (~worse).sum("shuffle")) / (1 + shuffled.sizes["shuffle"])


#: As many probes and metrics are named with the p-value of their best layer.
_NAMED: Final = 12


def describe_p_values(scores: xr.Dataset, metrics: Iterable[str]) -> list[str]:
    """What p is and how small it can be, then a line with that of the best layer for each probe and metric; none where there is no p.

    The best layer of further dims, such as ``variable``, is that of each entry.
    """
    found: list[str] = []
    n = 0
    for metric in metrics:
        held = scores.get(f"{metric}_p_value")
        if held is None or shuffled_name(metric) not in scores or not bool(held.notnull().any()):
            continue
        n = int(scores[shuffled_name(metric)].attrs[_SHUFFLES])
        if "seed" in held.dims or scores.sizes.get("layer", 1) < 2 or "layer" not in held.dims:
            continue
        others = [dim for dim in held.dims if dim not in ("layer", "probe")]
        for probe in scores["probe"].values.tolist():
            for place in product(*(range(scores.sizes[dim]) for dim in others)):
                at = dict(zip(others, place, strict=True))
                named = [f"{dim} {scores[dim].values[number] if dim in scores.coords else number}" for dim, number in at.items()]
                best = _of_best_layer(scores.isel(at), metric, probe)
                if best is not None:
                    found.append(f"{', '.join([str(probe), *named])}: {metric} at layer {best.layer} has p = {best.p:.2g}")
    if not n:
        return []
    smallest = f"of {n} shuffles it is at least 1/{n + 1} = {1 / (n + 1):.2g}"
    lines = [f"p: the permutation p-value of each layer by itself; {smallest}."]
    if found:
        layers = scores.sizes["layer"]
        lines.append(f"p of the best of {layers} layers, where a shuffle counts that is as good in any layer: {'; '.join(found[:_NAMED])}.")
    if len(found) > _NAMED:
        lines[-1] = f"{lines[-1][:-1]}; and {len(found) - _NAMED} more, in the variables …_p_any_layer."
    return lines


class _Best(NamedTuple):
    """Of the best layer of a probe: mean and spread of the shuffles there, the p-value among the best layers, their number, the layer."""

    mean: float
    spread: float
    p: float
    n: int
    layer: Any


def _of_best_layer(scores: xr.Dataset, metric: str, probe: Any) -> _Best | None:
    """What the shuffles say of the best layer of a probe.

    None where the scores hold no shuffles of this probe, or have dims that a single layer is not chosen from.
    """
    name = shuffled_name(metric)
    if name not in scores or "fold" not in scores[metric].dims or not set(scores[name].dims) <= {"layer", "probe", "shuffle"}:
        return None
    of = scores[[metric, name]].sel(probe=probe)
    of = add_p_values(of, [metric])
    if not bool(of[f"{metric}_p_value"].notnull().any()):
        return None
    means = of[metric].mean("fold")
    larger = bool(scores[name].attrs["larger_is_better"])
    at = (means.argmax if larger else means.argmin)("layer")
    found = of.isel(layer=int(at))
    values = [float(found[f"{name}_{which}"]) for which in ("mean", "std")]
    p, n = float(found[f"{metric}_p_any_layer"]), int(scores[name].sizes["shuffle"])
    return _Best(values[0], values[1], p, n, found["layer"].item() if "layer" in found.coords else int(at))


def describe_shuffles(scores: xr.Dataset, metric: str, probe: Any) -> str:
    """The same in words; empty where there is nothing to say."""
    found = _of_best_layer(scores, metric, probe)
    if found is None:
        return ""
    mean, spread, p, n, _ = found
    layers = scores.sizes.get("layer", 1)
    chosen = f" among the best of {layers} layers" if layers > 1 else ""
    return f"{n} shuffles of the labels {mean:.3f} ± {spread:.3f}, p = {p:.2g}{chosen}"
