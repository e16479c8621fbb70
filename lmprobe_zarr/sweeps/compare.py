"""Statistics of a sweep's scores: confidence intervals, paired tests, and selectivity. Never fits; reads nothing but scores."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import numpy as np
import xarray as xr

from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.interchange import read_list, to_interchange
from lmprobe_zarr.probes.metrics import Metric, Outcome, measure_outcome, parse_metrics
from lmprobe_zarr.typing import Array, Floats

__all__ = ["compare", "confidence_intervals", "selectivity"]

_BOUNDS = ("lower", "estimate", "upper")
_RESAMPLES_AT_ONCE = 250


def confidence_intervals(
    scores: xr.Dataset, metrics: str | Iterable[str] | None = None, *, level: float = 0.95, n_resamples: int = 1000, random_state: int = 0
) -> xr.Dataset:
    """Bootstrap confidence intervals of the mean over the folds, from the prediction that each prompt got when it was tested.

    Within the test set of each fold, as many prompts are drawn as it has, with replacement. One resample is the mean over the folds of
    a metric of these prompts, and the interval is between two quantiles of the resamples. Where the sweep had groups, whole groups are
    drawn. The probes are not fitted again: the interval says how much the score depends on which prompts were tested, not on which
    were learned from.

    Parameters
    ----------
    scores : Dataset
        From :func:`lmprobe_zarr.sweep` with ``predictions=True``.
    metrics : names, optional
        Any that the predictions allow; those that the scores hold if not given.
    level : float
        Between 0 and 1.
    n_resamples : int
    random_state : int
        All probes and layers are tested on the same resamples.

    Returns
    -------
    Dataset
        A variable per metric over the dims of the scores without ``fold``, and ``bound``: "lower", "estimate" (the score itself, the
        mean over the folds), "upper". NaN where a score is undefined; undefined resamples are left out.

    Raises
    ------
    InvalidTypeError, InvalidArgumentError
        Not the scores of a sweep, scores without predictions, an unknown metric, or a level that is not between 0 and 1.

    Notes
    -----
    Source: B. Efron and R. Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13, the percentile interval; of groups,
    A. C. Davison and D. V. Hinkley, "Bootstrap Methods and their Application" (1997), section 3.8.
    """
    _check_scores(scores)
    if "predicted" not in scores:
        raise InvalidArgumentError("these scores hold no predictions, which intervals are made of: sweep with predictions=True")
    if not 0 < level < 1:
        raise InvalidArgumentError(f"level={level!r} is none: give a number between 0 and 1, such as 0.95")
    if isinstance(n_resamples, bool) or not isinstance(n_resamples, int | np.integer) or n_resamples < 2:
        raise InvalidArgumentError(f"n_resamples={n_resamples!r} are too few: give 1000 or more")
    classification = scores.attrs["task"] == "classification"
    n_classes = len(read_list(scores.attrs, "classes") or ((0, 1) if classification else ()))
    if metrics is None:
        metrics = [str(name) for name, held in scores.data_vars.items() if "fold" in held.dims and _is_metric(str(name), scores)]
    chosen = parse_metrics(metrics, scores.attrs["task"], n_classes)
    tail = (1 - level) / 2
    dims = [str(dim) for dim in scores["predicted"].dims if dim not in ("prompt", "repetition")]
    shape = [scores.sizes[dim] for dim in dims]
    found = {metric.name: np.full((*shape, len(_BOUNDS)), np.nan) for metric in chosen}
    folds = _tested(scores)
    weights = _draw(folds, scores["group"].values if "group" in scores.coords else None, int(n_resamples), random_state)
    for place in product(*(range(size) for size in shape)):
        cell = scores.isel(dict(zip(dims, place, strict=True)))
        outcomes = [_outcome(cell, repetition, rows, n_classes) for repetition, rows in folds]
        for metric in chosen:
            found[metric.name][place] = _interval(metric, outcomes, weights, tail)
    coords = {name: held for name, held in scores.coords.items() if set(held.dims) <= set(dims)}
    data = xr.Dataset({name: ((*dims, "bound"), values) for name, values in found.items()}, coords={**coords, "bound": list(_BOUNDS)})
    data.attrs = {
        **scores.attrs,
        "level": level,
        "n_resamples": int(n_resamples),
        "resampled": "group" if "group" in scores.coords else "prompt",
    }
    for metric in chosen:
        data[metric.name].attrs = {"long_name": metric.long_name, "units": metric.units}
    return to_interchange(data)


def _is_metric(name: str, scores: xr.Dataset) -> bool:
    try:
        parse_metrics(name, scores.attrs["task"], len(read_list(scores.attrs, "classes") or (0, 1)))
    except InvalidArgumentError:
        return False
    return True


def _tested(scores: xr.Dataset) -> list[tuple[int, Array]]:
    """The repetition of each fold, and the places of the prompts that it tests."""
    tests = np.atleast_2d(scores["test_fold"].values)
    return [
        (int(np.flatnonzero((tests == fold).any(axis=1))[0]), np.flatnonzero((tests == fold).any(axis=0)))
        for fold in range(scores.sizes["fold"])
    ]


def _draw(folds: list[tuple[int, Array]], groups: Array | None, n_resamples: int, random_state: int) -> list[Floats]:
    """How often each prompt of each fold is drawn, shape (resample, prompt)."""
    rng = np.random.default_rng(random_state)
    drawn = []
    for _, rows in folds:
        units = np.arange(len(rows)) if groups is None else np.unique(groups[rows], return_inverse=True)[1]
        n = int(units.max()) + 1
        counts = rng.multinomial(n, np.full(n, 1 / n), size=n_resamples)
        drawn.append(counts[:, units].astype(np.float64))
    return drawn


def _outcome(cell: xr.Dataset, repetition: int, rows: Array, n_classes: int) -> Outcome:
    def of(name: str) -> Array | None:
        if name not in cell:
            return None
        held = cell[name] if "repetition" not in cell[name].dims else cell[name].isel(repetition=repetition)
        values: Array = held.isel(prompt=rows).values
        return None if values.dtype.kind == "f" and np.isnan(values).all() else values

    labels = "dealt" if str(cell["control"].item()) == "shuffled_labels" else "true"
    predicted, true, score, probability = of("predicted"), cell[labels].values[rows], of("score"), of("probability")
    assert predicted is not None  # noqa: S101  (every fold has predicted its prompts)
    if probability is not None and probability.ndim == 1:
        probability = np.stack([1 - probability, probability], axis=1)
    return Outcome(true, predicted, n_classes, score, probability)


def _interval(metric: Metric, outcomes: list[Outcome], weights: list[Floats], tail: float) -> tuple[float, float, float]:
    estimate = float(np.mean([measure_outcome(metric, outcome, np.ones((1, len(outcome.true))))[0] for outcome in outcomes]))
    if np.isnan(estimate):
        return np.nan, np.nan, np.nan
    means = []
    for start in range(0, len(weights[0]), _RESAMPLES_AT_ONCE):
        some = slice(start, start + _RESAMPLES_AT_ONCE)
        with np.errstate(invalid="ignore", divide="ignore"):
            means.append(np.mean([measure_outcome(metric, o, w[some]) for o, w in zip(outcomes, weights, strict=True)], axis=0))
    resampled = np.concatenate(means)
    resampled = resampled[np.isfinite(resampled)]
    if not len(resampled):
        return np.nan, estimate, np.nan
    lower, upper = np.quantile(resampled, [tail, 1 - tail])
    return float(lower), estimate, float(upper)


def compare(scores: xr.Dataset, metric: str = "accuracy", *, along: str = "probe", reference: Any = None) -> xr.Dataset:
    """Whether layers, or probes, differ: each is compared with a reference on the same folds, by a corrected paired test.

    Scores of folds are not independent, since their training sets overlap, so an ordinary t-test finds far too many differences. The
    corrected test takes the variance of a mean over J folds to be (1/J + n_test/n_train) times the variance of the single differences.
    Among many comparisons a few p-values are small by chance: ``p_holm`` is corrected for all comparisons in the result.

    Parameters
    ----------
    scores : Dataset
        From :func:`lmprobe_zarr.sweep`, with two folds at least; ten or more, by ``repeats=``, have power.
    metric : str
        A variable over ``fold``.
    along : str
        The dim whose entries are compared: "probe", "layer", or another of the scores.
    reference : optional
        The entry that all others are compared with, by its label; the first if not given.

    Returns
    -------
    Dataset
        Over the dims of the score without ``fold``: ``difference`` (mean over the folds, entry less reference), ``t``, ``p_value``
        (two-sided) and ``p_holm``. NaN for the reference itself, and where a score is NaN. Where all folds differ by the same amount
        other than zero, t is infinite. Where no fold differs, t is 0 and p is 1.

    Raises
    ------
    InvalidTypeError, InvalidArgumentError
        Not the scores of a sweep, no such metric, dim or entry, or a single fold.

    Notes
    -----
    Source: C. Nadeau and Y. Bengio, "Inference for the Generalization Error", Machine Learning 52 (2003); for repeated folds R. R.
    Bouckaert and E. Frank (2004). S. Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of
    Statistics 6 (1979).
    """
    _check_scores(scores)
    held = _metric(scores, metric)
    if along not in held.dims or along == "fold":
        listed = ", ".join(repr(dim) for dim in held.dims if dim != "fold")
        raise InvalidArgumentError(f"{metric!r} has no dim {along!r} to compare along: use one of {listed}")
    labels = held.coords[along].values.tolist()
    reference = labels[0] if reference is None else reference
    if reference not in labels:
        raise InvalidArgumentError(f"there is no {along} {reference!r} to compare with: use one of {', '.join(map(repr, labels))}")
    n_folds = scores.sizes["fold"]
    if n_folds < 2:
        raise InvalidArgumentError("a single fold cannot be tested: sweep with more folds, such as cv=5, repeats=10")
    difference: xr.DataArray = held - held.sel({along: reference}, drop=True)
    ratio = float((scores["n_test"] / scores["n_train"]).mean())
    mean = difference.mean("fold", skipna=False)
    error = np.sqrt(difference.var("fold", ddof=1, skipna=False).values * (1 / n_folds + ratio))
    # Rounding leaves equal differences with a variance just above zero.
    error[error < 1e-14] = 0
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.where((error == 0) & (np.abs(mean.values) < 1e-14), 0.0, mean.values / error)
    itself = xr.DataArray(np.arange(len(labels)) == labels.index(reference), dims=along)
    t = mean.copy(data=values).where(~itself)
    p = t.copy(data=_two_sided(t.values, n_folds - 1))
    holm = p.copy(data=_holm(p.values))
    data = xr.Dataset({"difference": mean, "t": t, "p_value": p, "p_holm": holm})
    data.attrs = {"metric": metric, "along": along, "reference": reference, "degrees_of_freedom": n_folds - 1, "test_train_ratio": ratio}
    return to_interchange(data)


def _two_sided(t: Floats, freedom: int) -> Floats:
    from scipy.special import stdtr

    return np.asarray(2 * stdtr(freedom, -np.abs(t)))


def _holm(p: Floats) -> Floats:
    """The p-values, corrected for as many comparisons as there are finite ones."""
    corrected = np.full(p.shape, np.nan)
    known = np.flatnonzero(np.isfinite(p.ravel()))
    order = known[np.argsort(p.ravel()[known], kind="stable")]
    stepped = p.ravel()[order] * np.arange(len(order), 0, -1)
    corrected.ravel()[order] = np.minimum(np.maximum.accumulate(stepped), 1) if len(order) else stepped
    return corrected


def selectivity(scores: xr.Dataset, metric: str = "accuracy", *, control: str = "shuffled_labels") -> xr.DataArray:
    """How much better each probe scores on the labels than on the labels of a control.

    A selective probe scores high on the labels, and at chance on labels drawn at random. Source: J. Hewitt and P. Liang,
    "Designing and Interpreting Probes with Control Tasks" (2019), arXiv:1909.03368.

    Parameters
    ----------
    scores : Dataset
        From :func:`lmprobe_zarr.sweep` or :func:`lmprobe_zarr.sweep_tokens` with that control.
    metric : str
    control : {"shuffled_labels", "control_task"}
        The second is the control of the source; only sweeps of tokens have it.

    Returns
    -------
    DataArray
        Score on the labels minus score on the control's labels, with the dims of the score. Along ``probe`` only the probes that have
        this control.

    Raises
    ------
    InvalidTypeError, InvalidArgumentError
        Not the scores of a sweep, or no such metric or control.
    """
    if control not in ("shuffled_labels", "control_task"):
        raise InvalidArgumentError(f"control={control!r} has no labels of its own: use 'shuffled_labels' or 'control_task'")
    _check_scores(scores)
    held = _metric(scores, metric)
    prefix = f"{control}:"
    names = [str(name).removeprefix(prefix) for name in scores["probe"].values.tolist() if str(name).startswith(prefix)]
    if not names:
        raise InvalidArgumentError(f"these scores have no {control.replace('_', ' ')} to compare with: sweep with controls={control!r}")
    theirs = held.sel(probe=[prefix + name for name in names]).assign_coords(probe=names).drop_vars(("kind", "control"))
    found = held.sel(probe=names).drop_vars(("kind", "control")) - theirs
    found = found.rename("selectivity").assign_attrs(long_name=f"{metric} less that on {control.replace('_', ' ')}", units="1")
    return to_interchange(found)


def _check_scores(scores: Any) -> None:
    if not isinstance(scores, xr.Dataset):
        raise InvalidTypeError(f"scores are the xarray.Dataset that sweep gives, not {type(scores).__name__}")
    if not {"fold", "probe"} <= set(scores.dims) or "task" not in scores.attrs:
        raise InvalidArgumentError("this dataset holds no scores over probe and fold: give what sweep returns, with its attributes")


def _metric(scores: xr.Dataset, metric: str) -> xr.DataArray:
    if metric not in scores or "fold" not in scores[metric].dims or scores[metric].dtype.kind != "f":
        listed = [
            str(name) for name, held in scores.data_vars.items() if "fold" in held.dims and "probe" in held.dims and held.dtype.kind == "f"
        ]
        raise InvalidArgumentError(
            f"there is no score {metric!r} by fold: use one of {', '.join(listed)}, or sweep with metrics={metric!r}"
        )
    return scores[metric]
