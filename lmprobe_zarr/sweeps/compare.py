"""Statistics of a sweep's scores: confidence intervals, paired tests, and selectivity. Never fits; reads nothing but scores."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import numpy as np
import xarray as xr

from lmprobe_zarr.batch import list_names
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.interchange import read_list, to_interchange
from lmprobe_zarr.probes.metrics import Metric, Outcome, measure_outcome, parse_metrics, score_outcome
from lmprobe_zarr.sweeps.given import check_seed
from lmprobe_zarr.sweeps.shuffles import shuffled_name
from lmprobe_zarr.typing import Array, Floats

__all__ = ["compare", "confidence_intervals", "selectivity"]

_BOUNDS = ("lower", "estimate", "upper")
_RESAMPLES_AT_ONCE = 250
#: Rounding makes means over folds differ by less than this.
_WIDTH = 1e-12
#: Measures that are means over prompts, so that each prompt adds its part to a difference.
_MEANS = ("accuracy", "log_loss", "brier", "mae")
#: Units whose predictions differ, at most, that are exchanged in every possible way.
_ENUMERATED = 12


def confidence_intervals(
    scores: xr.Dataset, metrics: str | Iterable[str] | None = None, *, level: float = 0.95, n_resamples: int = 1000, random_state: int = 0
) -> xr.Dataset:
    """Bootstrap confidence intervals of the mean over the folds, from the prediction that each prompt got when it was tested.

    Prompts are drawn with replacement, among those that the same folds test in every repeat; where the sweep had groups, whole groups are.
    A prompt stands in every row and in every repeat as often as it was drawn, so that testing it again makes no interval narrower. One
    resample is the mean over the folds of a metric of these prompts, and the interval is between two quantiles of the resamples, a
    little further out the fewer prompts or groups there are, since resamples of few vary too little. The probes are not fitted again: the
    interval says how much the score depends on which prompts were tested, not on which were learned from.

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
        mean over the folds), "upper". NaN where a score is undefined; undefined resamples are left out. Where a fold tests a single prompt
        or group, or all resamples have the same score, such as 1, nothing is known of how scores vary: the bounds are NaN, and the
        attribute ``nan_reasons`` says so.

    Raises
    ------
    InvalidTypeError, InvalidArgumentError
        Not the scores of a sweep, scores without predictions, an unknown metric, or a level that is not between 0 and 1.

    Notes
    -----
    Source: B. Efron and R. Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13, the percentile interval; of groups, A. C.
    Davison and D. V. Hinkley, "Bootstrap Methods and their Application" (1997), section 3.8; expanded for few units, T. C. Hesterberg,
    "What Teachers Should Know About the Bootstrap", The American Statistician 69 (2015).
    """
    _check_scores(scores)
    if "predicted" not in scores:
        raise InvalidArgumentError("these scores hold no predictions, which intervals are made of: sweep with predictions=True")
    scores = _along_prompts(scores)
    if isinstance(level, bool) or not isinstance(level, int | float | np.integer | np.floating) or not 0 < level < 1:
        raise InvalidArgumentError(f"level={level!r:.60} is none: give a number between 0 and 1, such as 0.95")
    if isinstance(n_resamples, bool) or not isinstance(n_resamples, int | np.integer) or n_resamples < 2:
        raise InvalidArgumentError(f"n_resamples={n_resamples!r:.60} are too few: give 1000 or more")
    classification = scores.attrs["task"] == "classification"
    n_classes = len(read_list(scores.attrs, "classes") or ((0, 1) if classification else ()))
    if metrics is None:
        metrics = [str(name) for name, held in scores.data_vars.items() if "fold" in held.dims and _is_metric(str(name), scores)]
    chosen = parse_metrics(list_names("metrics", metrics, "accuracy"), scores.attrs["task"], n_classes)
    dims = [str(dim) for dim in scores["predicted"].dims if dim not in ("prompt", "repetition")]
    shape = [scores.sizes[dim] for dim in dims]
    found = {metric.name: np.full((*shape, len(_BOUNDS)), np.nan) for metric in chosen}
    unit = "group" if "group" in scores.coords else "prompt"
    units = _units(scores)
    weights = _draw(units, int(n_resamples), check_seed(random_state))
    # The probes by the reason why they have no interval.
    reasons: dict[str, dict[str, dict[str, None]]] = {metric.name: {} for metric in chosen}
    for place in product(*(range(size) for size in shape)):
        cell = scores.isel(dict(zip(dims, place, strict=True)))
        name = str(cell["probe"].item())
        if str(cell["control"].item()) in ("shuffled_labels", "control_task") and "dealt" not in cell:
            # Of many shuffles, and of tokens' other labels, no predictions are kept.
            for metric in chosen:
                many = shuffled_name(metric.name) in cell
                why = (
                    f"a mean over many shuffles has none, see {metric.name}_shuffled_std"
                    if many
                    else "it has labels of its own, of which no predictions are kept"
                )
                reasons[metric.name].setdefault(why, {})[name] = None
                estimate = float(cell[metric.name].mean("fold")) if metric.name in cell else np.nan
                found[metric.name][place] = np.nan, estimate, np.nan
            continue
        folds = _tested(cell)
        single = [number for number, (_, rows) in enumerate(folds) if len(np.unique(units[rows])) < 2]
        outcomes = [_outcome(cell, repetition, rows, n_classes) for repetition, rows in folds]
        drawn = [] if single else [weights[:, rows] for _, rows in folds]
        tail = _tail(level, len(np.unique(units[np.concatenate([rows for _, rows in folds])])))
        for metric in chosen:
            low, estimate, high = _interval(metric, outcomes, drawn, tail)
            if single:
                why = f"fold {single[0]} tests a single {unit}, which says nothing of how others would score: use fewer folds"
                reasons[metric.name].setdefault(why, {})[name] = None
            elif high - low < _WIDTH:
                low = high = np.nan
                why = f"all resamples have the same score {estimate:.3g}, which says nothing of others: test more {unit}s"
                reasons[metric.name].setdefault(why, {})[name] = None
            found[metric.name][place] = low, estimate, high
    coords = {name: held for name, held in scores.coords.items() if set(held.dims) <= set(dims)}
    data = xr.Dataset({name: ((*dims, "bound"), values) for name, values in found.items()}, coords={**coords, "bound": list(_BOUNDS)})
    data.attrs = {
        **scores.attrs,
        "level": level,
        "n_resamples": int(n_resamples),
        "resampled": unit,
    }
    for metric in chosen:
        listed = [f"{', '.join(names)}: {why}" for why, names in reasons[metric.name].items()]
        why_nan = {"nan_reasons": listed} if listed else {}
        data[metric.name].attrs = {"long_name": metric.long_name, "units": metric.units} | why_nan
    return to_interchange(data)


def _units(scores: xr.Dataset) -> Array:
    """The number of each prompt's group; without groups, of the prompt itself, which may be in several rows."""
    held = scores["group" if "group" in scores.coords else "prompt"]
    # Texts that were read from a file may be of a dtype that does not become fixed-width texts.
    return np.asarray(np.unique(np.asarray(list(map(str, held.values)), str), return_inverse=True)[1])


def _is_metric(name: str, scores: xr.Dataset) -> bool:
    try:
        parse_metrics(name, scores.attrs["task"], len(read_list(scores.attrs, "classes") or (0, 1)))
    except InvalidArgumentError:
        return False
    return True


def _tested(cell: xr.Dataset) -> list[tuple[int, Array]]:
    """The repetition of each fold, and the places of the prompts that it tests."""
    # Folds of shuffled labels are drawn for these labels.
    dealt = str(cell["control"].item()) == "shuffled_labels" and "dealt_fold" in cell
    tests = np.atleast_2d(cell["dealt_fold" if dealt else "test_fold"].values)
    found = []
    # Where some folds were selected, their labels still say which they are.
    for fold in cell["fold"].values.tolist():
        repetitions, rows = np.nonzero(tests == fold)
        if not len(rows):
            raise InvalidArgumentError(
                f"fold {fold} tests none of the {tests.shape[1]} prompts that are left: leave it out too, scores.isel(fold=…), "
                "or give all prompts"
            )
        found.append((int(repetitions[0]), np.unique(rows)))
    return found


def _along_prompts(scores: xr.Dataset) -> xr.Dataset:
    """The scores with predictions along ``prompt``; tokens are rows of their prompt, which is drawn and exchanged whole."""
    return scores.swap_dims({"token": "prompt"}) if "predicted" in scores and "token" in scores["predicted"].dims else scores


def _draw(units: Array, n_resamples: int, random_state: int) -> Floats:
    """How often each prompt's unit is drawn, shape (resample, prompt): the same in all folds and repeats."""
    n = int(units.max()) + 1
    counts = np.random.default_rng(random_state).multinomial(n, np.full(n, 1 / n), size=n_resamples)
    return np.asarray(counts[:, units].astype(np.float64))


def _tail(level: float, n: int) -> float:
    """The share of resamples below the interval, and above it, for n units.

    The normal quantile times √(n / (n − 1)), as the deviation of resamples is that of the units divided by √n and not by √(n − 1), and with
    Student's quantile in its place, as the deviation is estimated.
    """
    from scipy.special import ndtr, stdtrit

    return float(ndtr(-np.sqrt(n / (n - 1)) * stdtrit(n - 1, (1 + level) / 2))) if n > 1 else (1 - level) / 2


def _outcome(cell: xr.Dataset, repetition: int, rows: Array, n_classes: int) -> Outcome | None:
    """The predictions for some prompts; None where a fit has none, because it failed or its layer is not stored."""

    def of(name: str) -> Array | None:
        if name not in cell:
            return None
        held = cell[name] if "repetition" not in cell[name].dims else cell[name].isel(repetition=repetition)
        values: Array = held.isel(prompt=rows).values
        return None if values.dtype.kind == "f" and np.isnan(values).all() else values

    labels = "dealt" if str(cell["control"].item()) == "shuffled_labels" and "dealt" in cell else "true"
    predicted, true, score, probability = of("predicted"), cell[labels].values[rows], of("score"), of("probability")
    if predicted is None or (n_classes and (predicted < 0).any()):
        return None
    if probability is not None and probability.ndim == 1:
        probability = np.stack([1 - probability, probability], axis=1)
    return Outcome(true, predicted, n_classes, score, probability)


def _interval(metric: Metric, outcomes: list[Outcome | None], weights: list[Floats], tail: float) -> tuple[float, float, float]:
    known = [outcome for outcome in outcomes if outcome is not None]
    if len(known) < len(outcomes):
        return np.nan, np.nan, np.nan
    estimate = float(np.mean([score_outcome(outcome, [metric])[0][0] for outcome in known]))
    if np.isnan(estimate) or not weights:
        return np.nan, estimate, np.nan
    means = []
    for start in range(0, len(weights[0]), _RESAMPLES_AT_ONCE):
        some = slice(start, start + _RESAMPLES_AT_ONCE)
        with np.errstate(invalid="ignore", divide="ignore"):
            by_fold = np.stack([measure_outcome(metric, o, w[some]) for o, w in zip(known, weights, strict=True)])
        # A fold of which nothing was drawn, or a single class, has no score in that resample: the mean is over the others.
        by_fold[~np.isfinite(by_fold) | (np.stack([w[some].sum(axis=1) for w in weights]) == 0)] = np.nan
        counted = np.isfinite(by_fold).sum(axis=0)
        means.append(np.divide(np.nansum(by_fold, axis=0), counted, out=np.full(len(counted), np.nan), where=counted > 0))
    resampled = np.concatenate(means)
    resampled = resampled[np.isfinite(resampled)]
    if not len(resampled):
        return np.nan, estimate, np.nan
    lower, upper = np.quantile(resampled, [tail, 1 - tail])
    return float(lower), estimate, float(upper)


def compare(
    scores: xr.Dataset, metric: str = "accuracy", *, along: str = "probe", reference: Any = None, permutations: int = 999
) -> xr.Dataset:
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
    permutations : int
        How many times predictions are exchanged for ``p_permutation``; 0 leaves it out.

    Returns
    -------
    Dataset
        Over the dims of the score without ``fold``: ``difference`` (mean over the folds, entry less reference), ``t``, ``p_value``
        (two-sided, never below 2 / 2ᴶ for J folds, the attribute ``p_floor``) and ``p_holm``. NaN for the reference itself, where a score
        is NaN, and for a control of many shuffles, whose folds are not those of the probes.

        Where the scores hold predictions, of accuracy, log loss, Brier score and mean absolute error also ``p_permutation``: of the two
        fitted probes, by exchanging their predictions for each prompt, or group, in all folds and repeats at once. It is exact where they
        differ for 12 prompts at most, which are exchanged in every possible way; else (1 + exchanges with at least this difference) / (1 +
        `permutations`). It says whether they differ for prompts like those tested, and is silent on probes fitted on other prompts.
        Of another metric the attribute ``no_p_permutation`` says why there is none.

    Raises
    ------
    InvalidTypeError, InvalidArgumentError
        Not the scores of a sweep, no such metric, dim or entry, or a single fold.

    Notes
    -----
    Source: C. Nadeau and Y. Bengio, "Inference for the Generalization Error", Machine Learning 52 (2003); for repeated folds R. R.
    Bouckaert and E. Frank (2004). S. Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of
    Statistics 6 (1979). Exchanges: R. A. Fisher, "The Design of Experiments" (1935), chapter 3.
    """
    _check_scores(scores)
    held = _metric(scores, metric)
    if along not in held.dims or along == "fold":
        listed = ", ".join(repr(dim) for dim in held.dims if dim != "fold")
        raise InvalidArgumentError(f"{metric!r} has no dim {along!r} to compare along: use one of {listed}")
    if not isinstance(permutations, int | np.integer) or isinstance(permutations, bool) or permutations < 0:
        raise InvalidArgumentError(f"permutations={permutations!r:.60} is no number of exchanges: give 999 or more, or 0 for none")
    labels = held.coords[along].values.tolist()
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise InvalidArgumentError(f"{along} {twice!r} is there twice: select each once, so that it is clear what is compared")
    reference = labels[0] if reference is None else reference
    if np.ndim(reference) or isinstance(reference, bool) is not isinstance(labels[0], bool) or reference not in labels:
        raise InvalidArgumentError(f"there is no {along} {reference!r:.60} to compare with: use one of {', '.join(map(repr, labels))}")
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
    unpaired = _of_many_shuffles(scores, metric, along, reference)
    t = mean.copy(data=values).where(~itself & ~unpaired)
    # t is infinite where all folds differ by the same amount, and huge where few folds happen to differ by nearly the same.
    floor = 2.0 ** (1 - n_folds)
    p = t.copy(data=np.maximum(_two_sided(t.values, n_folds - 1), floor))
    holm = p.copy(data=_holm(p.values))
    data = xr.Dataset({"difference": mean, "t": t, "p_value": p, "p_holm": holm})
    data.attrs = {"metric": metric, "along": along, "reference": reference, "degrees_of_freedom": n_folds - 1, "test_train_ratio": ratio}
    data.attrs["p_floor"] = floor
    if bool(unpaired.any()):
        data["p_value"].attrs["nan_reasons"] = [
            f"a mean over many shuffles has no folds to be paired with: see {metric}_p_value of the scores"
        ]
    if "predicted" in scores and metric in _MEANS and along != "label" and permutations:
        data["p_permutation"] = _exchange(_along_prompts(scores), metric, t, along, reference, int(permutations))
    elif "predicted" in scores and metric not in _MEANS and permutations:
        data.attrs["no_p_permutation"] = (
            f"{metric} is no mean over prompts, so that a prompt has no part in the difference that an exchange could turn round: "
            f"p_permutation is of {', '.join(_MEANS)}"
        )
    return to_interchange(data)


def _of_many_shuffles(scores: xr.Dataset, metric: str, along: str, reference: Any) -> xr.DataArray:
    """Which entries along ``probe``, or all of them, are or are compared with a mean over many shuffles."""
    if shuffled_name(metric) not in scores:
        return xr.DataArray(False)
    which = scores["control"] == "shuffled_labels"
    if along == "probe" and bool(which.sel(probe=reference)):
        which = xr.ones_like(which, bool)
    return which.drop_vars(("kind", "control"), errors="ignore")


def _exchange(scores: xr.Dataset, metric: str, t: xr.DataArray, along: str, reference: Any, permutations: int) -> xr.DataArray:
    """The p-value of every comparison, like `t`; NaN where that is, and for shuffled labels."""
    classification = scores.attrs["task"] == "classification"
    n_classes = len(read_list(scores.attrs, "classes") or ((0, 1) if classification else ()))
    (chosen,) = parse_metrics(metric, scores.attrs["task"], n_classes)
    units = _units(scores)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (permutations, int(units.max()) + 1))
    of_reference = scores.sel({along: reference})
    found = np.full(t.shape, np.nan)
    for place in np.argwhere(t.notnull().values):
        at = dict(zip(t.dims, place.tolist(), strict=True))
        cells = [scores.isel(at), of_reference.isel({dim: number for dim, number in at.items() if dim != along})]
        if any(str(cell["control"].item()) == "shuffled_labels" for cell in cells):
            continue
        folds = [(rows, [_outcome(cell, repetition, rows, n_classes) for cell in cells]) for repetition, rows in _tested(cells[0])]
        known = [(rows, mine, other) for rows, (mine, other) in folds if mine is not None and other is not None]
        if len(known) == len(folds):
            found[tuple(place)] = _exchange_p_value(chosen, known, units, signs)
    return t.copy(data=found)


def _exchange_p_value(metric: Metric, folds: list[tuple[Array, Outcome, Outcome]], units: Array, signs: Floats) -> float:
    # What each unit adds to the difference of the means over the folds; an exchange changes its sign.
    adds = np.zeros(signs.shape[1])
    for rows, mine, other in folds:
        apart = _by_prompt(metric, mine) - _by_prompt(metric, other)
        adds += np.bincount(units[rows], apart, minlength=len(adds)) / (len(rows) * len(folds))
    differ = np.flatnonzero(np.abs(adds) > _WIDTH / len(adds))
    exact = len(differ) <= _ENUMERATED
    every = np.arange(2 ** len(differ) if exact else 1)[:, None]
    chosen = 1.0 - 2 * (every >> np.arange(len(differ)) & 1) if exact else signs[:, differ]
    as_large = np.abs(chosen @ adds[differ]) >= abs(adds[differ].sum()) - _WIDTH
    return float(as_large.mean() if exact else (1 + as_large.sum()) / (1 + len(signs)))


def _by_prompt(metric: Metric, outcome: Outcome) -> Floats:
    """The measure of each prompt by itself."""
    found = []
    for start in range(0, len(outcome.true), _RESAMPLES_AT_ONCE):
        some = slice(start, start + _RESAMPLES_AT_ONCE)
        known = None if outcome.probabilities is None else outcome.probabilities[some]
        part = Outcome(outcome.true[some], outcome.predicted[some], outcome.n_classes, None, known)
        found.append(measure_outcome(metric, part, np.eye(len(part.true))))
    return np.concatenate(found)


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
    if not isinstance(control, str) or control not in ("shuffled_labels", "control_task"):
        raise InvalidArgumentError(f"control={control!r:.60} has no labels of its own: use 'shuffled_labels' or 'control_task'")
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
    empty = [str(dim) for dim, size in scores.sizes.items() if not size and dim in ("layer", "probe", "fold", "prompt", "token")]
    if empty:
        raise InvalidArgumentError(f"these scores are of no {' and no '.join(empty)}: select fewer away")


def _metric(scores: xr.Dataset, metric: str) -> xr.DataArray:
    if not isinstance(metric, str) or metric not in scores or "fold" not in scores[metric].dims or scores[metric].dtype.kind != "f":
        listed = [
            str(name) for name, held in scores.data_vars.items() if "fold" in held.dims and "probe" in held.dims and held.dtype.kind == "f"
        ]
        raise InvalidArgumentError(
            f"there is no score {metric!r:.60} by fold: use one of {', '.join(listed)}, or sweep with metrics={metric!r:.60}"
        )
    return scores[metric]
