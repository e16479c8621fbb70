"""ROC and calibration curves of scores and true labels, as datasets. Never fits or draws anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import xarray as xr

from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, LabelError
from lmprobe_zarr.interchange import to_interchange
from lmprobe_zarr.probes.labels import align_labels, labels_of_one_kind
from lmprobe_zarr.typing import Array

__all__ = ["calibration_curves", "roc_curves"]


def roc_curves(scores: xr.DataArray | Mapping[str, Any], labels: str | Iterable[Any]) -> xr.Dataset:
    """ROC curves of scores for two classes.

    Parameters
    ----------
    scores : DataArray over prompt or token, perhaps with one more dim such as layer; or {name: scores}
        Larger means the second of the sorted classes. With one more dim a curve for each along it.
    labels : str or array
        A coordinate's name, or one label per prompt or token. Scores that are NaN are left out.

    Returns
    -------
    Dataset
        ``false_positive_rate``, ``true_positive_rate`` and ``threshold`` (curve, point), NaN behind a curve's end; ``auroc`` (curve).

    Raises
    ------
    LabelError
        Another number of labels than of scores, or another number of classes than two.
    InvalidArgumentError
        Scores of other dims, or none.

    Notes
    -----
    Source: T. Fawcett, "An introduction to ROC analysis", Pattern Recognition Letters 27 (2006), as scikit-learn's ``roc_curve``.
    """
    from sklearn.metrics import roc_auc_score, roc_curve

    found = []
    for name, values, true in _each(scores, labels):
        found.append((name, *roc_curve(true, values), float(roc_auc_score(true, values))))
    longest = max(len(curve[1]) for curve in found)
    padded = [np.stack([np.pad(curve[k], (0, longest - len(curve[k])), constant_values=np.nan) for curve in found]) for k in (1, 2, 3)]
    names = ("false_positive_rate", "true_positive_rate", "threshold")
    arrays = {name: (("curve", "point"), values) for name, values in zip(names, padded, strict=True)}
    area = ("curve", [curve[4] for curve in found])
    return to_interchange(xr.Dataset({**arrays, "auroc": area}, coords={"curve": [curve[0] for curve in found]}))


def calibration_curves(probabilities: xr.DataArray | Mapping[str, Any], labels: str | Iterable[Any], bins: int = 10) -> xr.Dataset:
    """Calibration curves: how often the second class is true, by the probability that a probe gives it.

    Parameters
    ----------
    probabilities : DataArray or mapping
        Of the second class, 0 to 1; otherwise as for :func:`roc_curves`.
    labels : str or array
    bins : int
        Of equal width.

    Returns
    -------
    Dataset
        ``predicted`` (the mean probability), ``observed`` (the share of the second class) and ``n`` (curve, bin); NaN where a bin is empty.
        ``ece`` (curve): the expected calibration error, the mean of ``|observed − predicted|`` weighted by n.

    Raises
    ------
    LabelError, InvalidArgumentError
        As :func:`roc_curves`; values outside 0 to 1, or no bin.

    Notes
    -----
    Source: C. Guo et al., "On Calibration of Modern Neural Networks" (2017), arXiv:1706.04599.
    """
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise InvalidArgumentError(f"bins={bins!r} is no number of bins: give a whole number of at least 1")
    names, predicted, observed, counts, errors = [], [], [], [], []
    for name, values, true in _each(probabilities, labels):
        if values.min() < 0 or values.max() > 1:
            raise InvalidArgumentError(f"{name!r} holds {values.min():.3g} to {values.max():.3g}, which are no probabilities: give 0 to 1")
        places = np.minimum((values * bins).astype(int), bins - 1)
        n = np.bincount(places, minlength=bins)
        with np.errstate(invalid="ignore"):
            mean, share = (np.bincount(places, each, minlength=bins) / n for each in (values, true))
        names.append(name)
        predicted.append(mean)
        observed.append(share)
        counts.append(n)
        errors.append(float(np.nansum(np.abs(share - mean) * n) / n.sum()))
    dims = ("curve", "bin")
    found = xr.Dataset(
        {
            "predicted": (dims, np.stack(predicted)),
            "observed": (dims, np.stack(observed)),
            "n": (dims, np.stack(counts)),
            "ece": ("curve", errors),
        },
        coords={"curve": names, "bin": (np.arange(bins) + 0.5) / bins},
    )
    return to_interchange(found)


def _each(scores: Any, labels: Any) -> list[tuple[str, Array, Array]]:
    """For every curve its name, the scores, and whether each label is the second class."""
    listed: list[tuple[str, Any, Any]] = []
    for name, given in scores.items() if isinstance(scores, Mapping) else [("", scores)]:
        if isinstance(given, xr.DataArray):
            rows = next((dim for dim in ("prompt", "token") if dim in given.dims), None)
            rest = [dim for dim in given.dims if dim != rows]
            if rows is None or len(rest) > 1:
                raise InvalidArgumentError(f"scores have dims {tuple(given.dims)}, expected prompt or token and at most one more: select")
            truth = given.coords[labels].values if isinstance(labels, str) and labels in given.coords else labels
            truth = align_labels(given, truth)
            turned = given.transpose(*rest, rows)
            if not rest:
                listed.append((str(name) or str(given.name or "scores"), turned.values, truth))
            for place in range(turned.sizes[rest[0]] if rest else 0):
                at = turned.coords[rest[0]].values[place] if rest[0] in turned.coords else place
                listed.append(
                    (f"{name} {rest[0]} {at}".strip() if rest[0] == "layer" else f"{name} {at}".strip(), turned.values[place], truth)
                )
        else:
            listed.append((str(name) or "scores", np.asarray(given), labels))
    if not listed:
        raise InvalidArgumentError("scores is empty: give at least one")
    return [(name, *_check_curve(name, _as_numbers(name, values), truth)) for name, values, truth in listed]


def _as_numbers(name: str, values: Any) -> Array:
    try:
        return np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidTypeError(f"{name!r} is {values!r:.60}: give numbers, one per prompt or token") from error


def _check_curve(name: str, values: Array, labels: Any) -> tuple[Array, Array]:
    if isinstance(labels, str):
        raise LabelError(f"{name!r} has no coordinate {labels!r}: give the labels themselves")
    if not isinstance(labels, Iterable) or isinstance(labels, Mapping):
        raise LabelError(f"labels of {name!r} are {type(labels).__name__}: give a coordinate's name, or one label per score")
    truth = labels_of_one_kind(name, labels) if len(labels := list(labels)) else np.zeros(0)
    if values.ndim != 1 or truth.shape != values.shape:
        raise LabelError(f"there are {len(truth)} labels for scores of shape {values.shape} in {name!r}: give one label per score")
    kept = np.isfinite(values)
    values, truth = values[kept], truth[kept]
    classes = np.unique(truth)
    if len(classes) != 2:
        raise LabelError(
            f"there are {len(classes)} classes among the labels of {name!r}: a curve is of two, compare with one, as in labels == 'a'"
        )
    return values, truth == classes[1]
