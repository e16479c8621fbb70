"""Whether a probe generalises: fitted on one dataset and tested on another.

Never a store, a model or a plot; fits and scores are those of ``probes``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from lmprobe_zarr.display import describe_error
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, LabelError, LmprobeZarrError
from lmprobe_zarr.interchange import to_interchange
from lmprobe_zarr.probes import (
    Groups,
    Labels,
    as_fit_dtype,
    converged,
    describe_unfit,
    fit_apart,
    fits_running,
    group_codes,
    list_prompts,
    make_probe,
    not_finite_rows,
    parse_groups,
    parse_label_sets,
    plan_folds,
    prompt_names,
    read_layer,
    rows_for,
    unseen_rows,
)
from lmprobe_zarr.probes.metrics import accuracy, auroc, class_scores
from lmprobe_zarr.sweeps.given import (
    check_activations,
    check_seed,
    check_several,
    parse_probes,
    refuse_choice,
    warn_failed,
    warn_unconverged,
)
from lmprobe_zarr.tasks import parse_runner
from lmprobe_zarr.tokens import inner_dim
from lmprobe_zarr.typing import Array

__all__ = ["sweep_transfer"]


def sweep_transfer(
    datasets: Mapping[str, xr.DataArray],
    labels: Any,
    probes: str | Iterable[Any] | Mapping[str, Any] = ("mass_mean",),
    cv: Any = 5,
    *,
    groups: Any = None,
    missing: str = "raise",
    choose: None = None,
    random_state: int = 0,
    scheduler: str = "threads",
    n_workers: int | None = None,
) -> xr.Dataset:
    """Scores of probes that were fitted on one dataset and tested on another, over ``layer, probe, train, test``.

    Parameters
    ----------
    datasets : {name: DataArray}
        Activations with dims (layer, prompt, hidden), at least two, of the same model and site. Only layers that all
        of them have are fitted.
    labels : str or {name: labels}
        As for :func:`lmprobe_zarr.sweep`: the name of a coordinate that all datasets have, or the labels of each; the same classes in all.
    probes : names, {name: estimator}, or a list of names and estimators
        As for :func:`lmprobe_zarr.sweep`.
    cv : int, or scikit-learn splitter
        Where train and test are the same dataset, the score is the mean over these folds, so that it too is of unseen prompts.
    groups : str or {name: groups}, optional
        As for :func:`lmprobe_zarr.sweep`: the name of a coordinate that all datasets have, or the groups of each. Prompts of an equal group
        are never learned from and tested, neither in the folds of a dataset nor between two: equal values are one group in all datasets.
    missing : {"raise", "drop"}
        What happens to prompts without a label.
    choose : None
        Nothing is chosen here; any other value is an error that says how to choose a layer.
    random_state : int
    scheduler : "threads", "processes" or "synchronous"
    n_workers : int, optional

    Returns
    -------
    Dataset
        ``accuracy`` and ``auroc`` (0 to 1), ``converged`` (layer, probe, train, test); ``n_train`` and ``n_test`` (train, test), numbers
        of prompts. Prompts that are in both sets are not tested; they are known by the hashes and texts that ``prompt`` and ``text``
        hold. Of datasets without either nothing says which prompts they share: all rows are tested, and the attribute
        ``without_identity`` names these datasets. Scores are NaN where no other prompts are left, where the hidden sizes differ, or where
        a fit failed, and the attribute ``nan_reasons`` says why.

    Raises
    ------
    InvalidTypeError, InvalidArgumentError, LabelError
        As `sweep`; fewer than two datasets, no layer in common, or other classes.

    Warns
    -----
    ConvergenceWarning, FitFailedWarning
        As `sweep`.

    Notes
    -----
    Each task reads one layer of every dataset. Source of the question: S. Marks and M. Tegmark, "The Geometry of Truth" (2023),
    arXiv:2310.06824, section 5.
    """
    refuse_choice(
        choose, "choose by lz.sweep(datasets[name], …, choose='layer') of the training set, and read off the scores of that layer elsewhere"
    )
    runner = parse_runner(scheduler=scheduler, n_workers=n_workers)
    transfer = _plan(datasets, labels, probes, cv, groups, missing, random_state)
    shared = runner.hand_over(transfer.fits)

    def start(layer: Any) -> Any:
        from dask.delayed import delayed

        # Lazy arrays are handed over as they are, so that each layer is read by its own task.
        variables = [delayed(array.sel(layer=layer).variable, traverse=False, pure=False) for array in transfer.arrays]
        return runner.call(_transfer_layer, shared, *variables)

    found = runner.run([partial(start, layer) for layer in transfer.layers], "transfer")
    for layer, result in zip(transfer.layers, found, strict=True):
        if isinstance(result, _NotFinite):
            array, name = transfer.arrays[result.number], repr(transfer.names[result.number])
            place = array["layer"].values.tolist().index(layer)
            raise InvalidArgumentError(describe_unfit(array, place, result.rows, array.sizes["prompt"], name=name))
    scores = _scores(transfer, found)
    failures = _failures(found)
    if all(layer.failed for layer in found) and all(np.isnan(layer.accuracy).all() for layer in found):
        raise InvalidArgumentError(f"{failures}: give a probe that can be fitted on these prompts, or fewer folds")
    warn_failed(failures)
    warn_unconverged(scores, "give an estimator with a larger max_iter, or standardise")
    return scores


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fits:
    """What the tasks of all layers share. The first three lists have one item per dataset."""

    labels: list[Labels]
    folds: list[Any]
    #: Rows of an equal number stay on one side, also where an estimator cross-validates by itself.
    kept: list[Array]
    #: By training set and test set, the rows of the test set whose prompts and groups the training set does not have.
    unseen: list[list[Array]]
    probes: dict[str, Any]
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Transfer:
    """What is fitted and tested: datasets, the layers that all of them have, and metadata of the result."""

    names: list[str]
    arrays: list[xr.DataArray]
    layers: list[Any]
    label: str
    variable: str
    classes: Array
    #: The number of folds, or how they were made.
    cv: int | str
    group: str
    #: Datasets of which nothing says which prompts they share with others.
    unnamed: list[str]
    n_dropped: list[int]
    fits: _Fits


@dataclass(frozen=True, slots=True)
class _NotFinite:
    """The dataset, by number, and its rows that hold NaN or infinity."""

    number: int
    rows: list[int]


# -- arguments -------------------------------------------------------------------------------------------------------------


def _plan(datasets: Any, labels: Any, probes: Any, cv: Any, groups: Any, missing: str, random_state: Any) -> _Transfer:
    if not isinstance(datasets, Mapping) or not all(isinstance(array, xr.DataArray) for array in datasets.values()):
        raise InvalidTypeError("datasets are a mapping from name to DataArray over layer, prompt and hidden, as {'cities': ds.resid_mean}")
    if len(datasets) < 2:
        raise InvalidArgumentError(f"there is {len(datasets)} dataset, and nothing to carry over to: give at least two, or use sweep")
    seed = check_seed(random_state)
    chosen = parse_probes(probes, "classification", "mass_mean")
    names = [str(name) for name in datasets]
    arrays = [_by_layer(array.rename(str(name))) for name, array in datasets.items()]
    layers = [layer for layer in arrays[0]["layer"].values.tolist() if all(layer in array["layer"].values for array in arrays)]
    if not layers:
        listed = "; ".join(f"{name}: {array['layer'].values.tolist()}" for name, array in zip(names, arrays, strict=True))
        raise InvalidArgumentError(f"the datasets have no layer in common: {listed}")
    _check_cv(cv)
    sets = [_of(name, "labels", _parse_labels, array, given, missing) for name, array, given in _by_dataset(datasets, arrays, labels)]
    classes = _common_classes(names, sets)
    grouped: list[Groups | None] = [
        None if given is None else _of(name, "groups", parse_groups, array, given, each.rows)
        for (name, array, given), each in zip(_by_dataset(datasets, arrays, groups), sets, strict=True)
    ]
    prompts = [list_prompts(array) for array in arrays]
    planned = [
        _of(name, "folds", plan_folds, [each], of_array, of_groups, cv, seed)
        for name, each, of_array, of_groups in zip(names, sets, prompts, grouped, strict=True)
    ]
    held = [prompt_names(array) for array in arrays]
    counted = isinstance(cv, int | np.integer)
    fits = _Fits(
        labels=sets,
        folds=[folds for folds, _ in planned],
        kept=[group_codes(of_array, None if g is None else g.codes) for of_array, g in zip(prompts, grouped, strict=True)],
        unseen=[[_unseen(train, test, sets, held, grouped) for test in range(len(sets))] for train in range(len(sets))],
        probes=chosen,
        seed=seed,
    )
    name = next(iter(datasets.values())).name
    variable = "" if name is None else str(name)
    first = next((each for each in grouped if each is not None), None)
    return _Transfer(
        names=names, arrays=arrays, layers=layers, label=sets[0].name, variable=variable, classes=classes,
        cv=int(cv) if counted else planned[0][1],
        group="" if first is None else first.name, unnamed=[n for n, of_array in zip(names, held, strict=True) if not any(of_array)],
        n_dropped=[array.sizes["prompt"] - len(each.rows) for array, each in zip(arrays, sets, strict=True)], fits=fits,
    )  # fmt: skip


def _by_dataset(datasets: Mapping[Any, Any], arrays: list[xr.DataArray], given: Any) -> list[tuple[str, xr.DataArray, Any]]:
    """The name, the array and its labels or groups, which are given by dataset or are one name for all."""
    by_name = isinstance(given, Mapping) and bool(given) and set(given) == set(datasets)
    return [(str(name), array, given[name] if by_name else given) for name, array in zip(datasets, arrays, strict=True)]


def _of(name: str, what: str, parse: Callable[..., Any], *given: Any) -> Any:
    """What `parse` makes of some arguments; an error says which dataset it is of."""
    try:
        return parse(*given)
    except LmprobeZarrError as error:
        raise type(error)(f"{what} of {name!r}: {error}") from error


def _parse_labels(array: xr.DataArray, labels: Any, missing: str) -> Labels:
    return check_several(parse_label_sets(array, labels, missing=missing))


def _check_cv(cv: Any) -> None:
    """Raise for folds that are row numbers: those of one dataset are not those of another."""
    if not isinstance(cv, str | int | np.integer) and not hasattr(cv, "split") and isinstance(cv, Iterable):
        raise InvalidArgumentError("cv holds (train, test) pairs, and every dataset has rows of its own: give a number or a splitter")


def _common_classes(names: list[str], sets: list[Labels]) -> Array:
    first = sets[0].classes
    assert first is not None  # noqa: S101  (for mypy: these are classes)
    for name, each in zip(names, sets, strict=True):
        assert each.classes is not None  # noqa: S101
        if each.classes.tolist() != first.tolist():
            raise LabelError(
                f"{name!r} has the classes {each.classes.tolist()} and {names[0]!r} {first.tolist()}: give all datasets the same classes"
            )
    return first


def _unseen(train: int, test: int, sets: list[Labels], names: list[list[frozenset[str]]], groups: list[Groups | None]) -> Array:
    """The labelled rows of one dataset whose prompts and groups another one has not learned from."""
    learned, rows = sets[train].rows, sets[test].rows
    rows = rows[unseen_rows([names[train][row] for row in learned], [names[test][row] for row in rows])]
    ours, theirs = groups[train], groups[test]
    if ours is None or theirs is None:
        return rows
    known = {ours.values[code] for code in np.unique(ours.codes[learned])}
    return rows[[theirs.values[code] not in known for code in theirs.codes[rows]]] if len(rows) else rows


def _by_layer(array: xr.DataArray) -> xr.DataArray:
    array = check_activations(array)
    if "layer" not in array.dims:
        array = array.expand_dims("layer") if "layer" in array.coords else array.expand_dims(layer=[0])
    if "layer" not in array.coords:
        array = array.assign_coords(layer=np.arange(array.sizes["layer"]))
    return array


# -- one layer -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _LayerScores:
    """Scores of one layer, each of shape (probe, train, test), and the first error of each probe whose fits failed."""

    accuracy: Array
    auroc: Array
    converged: Array
    failed: dict[str, str]


def _transfer_layer(fits: _Fits, *variables: xr.Variable) -> _LayerScores | _NotFinite:
    """Every probe of one layer fitted on every dataset and tested on every one; the body of a task."""
    matrices = [as_fit_dtype(read_layer(variable, 0)) for variable in variables]
    for number, (matrix, labels) in enumerate(zip(matrices, fits.labels, strict=True)):
        bad = not_finite_rows(matrix, labels.rows)
        if bad:
            return _NotFinite(number, bad)
    shape = (len(fits.probes), len(matrices), len(matrices))
    scores = _LayerScores(np.full(shape, np.nan), np.full(shape, np.nan), np.ones(shape, bool), {})
    with fits_running():
        for p, (name, probe) in enumerate(fits.probes.items()):
            for i in range(len(matrices)):
                try:
                    _fit_on(fits, probe, matrices, i, (p, i), scores)
                except MemoryError:
                    raise
                except Exception as error:  # noqa: BLE001  (whatever the caller's own estimators raise)
                    for values in (scores.accuracy, scores.auroc):
                        values[p, i] = np.nan
                    scores.failed.setdefault(name, describe_error(error))
    return scores


def _fit_on(fits: _Fits, probe: Any, matrices: list[Array], i: int, at: tuple[int, int], scores: _LayerScores) -> None:
    """Enter the scores of a probe that is fitted on dataset `i`: of its own folds, and of the other datasets."""
    x, labels = matrices[i], fits.labels[i]
    within = [_fit_fold(fits, probe, i, x, *fold) for fold in fits.folds[i]]
    # Each fold weighs the same, as in a sweep. A fold that tests only one class has no AUROC, and is left out of that mean.
    areas = [area for _, area, _ in within if not np.isnan(area)]
    scores.accuracy[*at, i] = np.mean([share for share, _, _ in within])
    scores.auroc[*at, i] = np.mean(areas) if areas else np.nan
    scores.converged[*at, i] = all(ended for _, _, ended in within)
    if not any(len(fits.unseen[i][j]) for j in range(len(matrices)) if j != i):
        return
    fitted = _fit_rows(fits, probe, i, x, labels.rows)
    for j, other in enumerate(matrices):
        rows = fits.unseen[i][j]
        if j != i and len(rows) and other.shape[1] == x.shape[1]:
            scores.accuracy[*at, j], scores.auroc[*at, j] = _tested(probe, fitted, other[rows], fits.labels[j].values[rows])
            scores.converged[*at, j] = converged(fitted)


def _fit_fold(fits: _Fits, probe: Any, i: int, x: Array, train: Array, test: Array) -> tuple[float, float, bool]:
    fitted = _fit_rows(fits, probe, i, x, train)
    return (*_tested(probe, fitted, x[test], fits.labels[i].values[test]), converged(fitted))


def _fit_rows(fits: _Fits, probe: Any, i: int, x: Array, rows: Array) -> Any:
    estimator = make_probe(probe, fits.seed)
    return fit_apart(estimator, probe, x[rows], fits.labels[i].values[rows], fits.kept[i][rows], fits.seed)


def _tested(probe: Any, fitted: Any, x: Array, y: Array) -> tuple[float, float]:
    x = rows_for(probe, x)
    return accuracy(fitted.predict(x), y), auroc(class_scores(fitted, x), y, fitted.classes_)[0]


def _failures(found: list[Any]) -> str:
    """What failed, and the first error of each probe; empty if nothing did."""
    problems = {name: problem for layer in reversed(found) for name, problem in layer.failed.items()}
    shown = "; ".join(f"{name}: {problem}" for name, problem in list(problems.items())[:3])
    return f"scores are NaN because fits failed ({shown})" if problems else ""


# -- result ----------------------------------------------------------------------------------------------------------------


def _scores(transfer: _Transfer, found: list[_LayerScores]) -> xr.Dataset:
    names, fits = transfer.names, transfer.fits
    labelled = [len(each.rows) for each in fits.labels]
    dims = ("layer", "probe", "train", "test")
    described = {"accuracy": {"long_name": "accuracy", "units": "1"}, "auroc": {"long_name": "area under the ROC curve", "units": "1"}}
    reasons = _nan_reasons(transfer, found)
    # On the diagonal, all prompts that the folds test.
    tested = [len(np.unique(np.concatenate([test for _, test in folds]))) for folds in fits.folds]
    trained = [round(float(np.mean([len(train) for train, _ in folds]))) for folds in fits.folds]
    n_test = np.array([[tested[i] if i == j else len(fits.unseen[i][j]) for j in range(len(names))] for i in range(len(names))])
    n_train = np.array([[trained[i] if i == j else labelled[i] for j in range(len(names))] for i in range(len(names))])
    scores = xr.Dataset(
        {
            **{name: (dims, np.stack([getattr(layer, name) for layer in found]), attrs | reasons) for name, attrs in described.items()},
            "converged": (dims, np.stack([layer.converged for layer in found])),
            "n_train": (("train", "test"), n_train),
            "n_test": (("train", "test"), n_test),
        },
        coords={"layer": transfer.layers, "probe": list(fits.probes), "train": names, "test": names},
    )
    scores.attrs = {
        "labels": transfer.label,
        "classes": transfer.classes.tolist(),
        "groups": transfer.group,
        "cv": transfer.cv,
        "n_dropped": transfer.n_dropped,
        "without_identity": transfer.unnamed,
        "random_state": fits.seed,
        "variable": transfer.variable,
    }
    models = {str(a.coords["model"].item()) for a in transfer.arrays if "model" in a.coords and a.coords["model"].ndim == 0}
    if len(models) == 1:
        scores.attrs["model"] = models.pop()
    return to_interchange(scores)


def _nan_reasons(transfer: _Transfer, found: list[_LayerScores]) -> dict[str, Any]:
    """Why scores are NaN, as an attribute; none where nothing is."""
    reasons = []
    shared = "prompt" if not transfer.group else f"prompt, or group of {transfer.group!r},"
    apart = "; give groups that differ values that differ" if transfer.group else ""
    for i, train in enumerate(transfer.names):
        empty = [test for j, test in enumerate(transfer.names) if i != j and not len(transfer.fits.unseen[i][j])]
        reasons += [f"train {train}, test {', '.join(empty)}: every {shared} is in both{apart}"] if empty else []
        wide = [
            test for test, array in zip(transfer.names, transfer.arrays, strict=True)
            if array.sizes[inner_dim(array)] != transfer.arrays[i].sizes[inner_dim(transfer.arrays[i])]
        ]  # fmt: skip
        reasons += [f"train {train}, test {', '.join(wide)}: the hidden sizes differ"] if wide else []
    problems = {name: problem for layer in reversed(found) for name, problem in layer.failed.items()}
    reasons += [f"{name}: the fit failed ({problem})" for name, problem in problems.items()]
    return {"nan_reasons": reasons} if reasons else {}
