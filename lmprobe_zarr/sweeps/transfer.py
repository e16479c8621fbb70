"""Whether a probe generalises: fitted on one dataset and tested on another.

Never a store, a model or a plot; fits and scores are those of ``probes``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, LabelError
from lmprobe_zarr.interchange import to_interchange
from lmprobe_zarr.probes import (
    as_fit_dtype,
    converged,
    describe_unfit,
    fits_running,
    list_prompts,
    make_probe,
    not_finite_rows,
    parse_labels,
    plan_folds,
    read_layer,
)
from lmprobe_zarr.probes.metrics import accuracy, auroc, class_scores
from lmprobe_zarr.sweeps.given import refuse_choice
from lmprobe_zarr.tasks import parse_runner
from lmprobe_zarr.typing import Array

__all__ = ["sweep_transfer"]


def sweep_transfer(
    datasets: Mapping[str, xr.DataArray],
    labels: Any,
    probes: str | Iterable[str] | Mapping[str, Any] = ("mass_mean",),
    cv: int = 5,
    *,
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
    probes : str, iterable of str, or {name: estimator}
        As for :func:`lmprobe_zarr.sweep`.
    cv : int
        Where train and test are the same dataset, the score is the mean over this many folds, so that it too is of unseen prompts.
    choose : None
        Nothing is chosen here; any other value is an error that says how to choose a layer.
    random_state : int
    scheduler : "threads", "processes" or "synchronous"
    n_workers : int, optional

    Returns
    -------
    Dataset
        ``accuracy`` and ``auroc`` (0 to 1), ``converged`` (layer, probe, train, test); ``n_train`` and ``n_test`` (train, test), numbers
        of prompts. Prompts that are in both sets are not tested. Scores are NaN where no other prompts are left, or where the hidden
        sizes differ.

    Raises
    ------
    InvalidTypeError, InvalidArgumentError, LabelError
        As `sweep`; fewer than two datasets, no layer in common, or other classes.

    Notes
    -----
    Each task reads one layer of every dataset. Source of the question: S. Marks and M. Tegmark, "The Geometry of Truth" (2023),
    arXiv:2310.06824, section 5.
    """
    refuse_choice(
        choose, "choose by lz.sweep(datasets[name], …, choose='layer') of the training set, and read off the scores of that layer elsewhere"
    )
    runner = parse_runner(scheduler=scheduler, n_workers=n_workers)
    transfer = _plan(datasets, labels, probes, cv, random_state)
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
    return _scores(transfer, found)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fits:
    """What the tasks of all layers share. The first three lists have one item per dataset."""

    labels: list[Array]
    folds: list[Any]
    #: By training set and test set, the rows of the test set whose prompts the training set does not have.
    unseen: list[list[Array]]
    probes: dict[str, Any]
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Transfer:
    """What is fitted and tested: datasets, the layers that all of them have, and metadata of the result."""

    names: list[str]
    arrays: list[xr.DataArray]
    prompts: list[list[str]]
    layers: list[Any]
    label: str
    classes: Array
    cv: int
    fits: _Fits


@dataclass(frozen=True, slots=True)
class _NotFinite:
    """The dataset, by number, and its rows that hold NaN or infinity."""

    number: int
    rows: list[int]


# -- arguments -------------------------------------------------------------------------------------------------------------


def _plan(datasets: Any, labels: Any, probes: Any, cv: int, seed: int) -> _Transfer:
    if not isinstance(datasets, Mapping) or not all(isinstance(array, xr.DataArray) for array in datasets.values()):
        raise InvalidTypeError("datasets are a mapping from name to DataArray over layer, prompt and hidden, as {'cities': ds.resid_mean}")
    if len(datasets) < 2:
        raise InvalidArgumentError(f"there is {len(datasets)} dataset, and nothing to carry over to: give at least two, or use sweep")
    names = [str(name) for name in datasets]
    arrays = [_by_layer(str(name), array) for name, array in datasets.items()]
    layers = [layer for layer in arrays[0]["layer"].values.tolist() if all(layer in array["layer"].values for array in arrays)]
    if not layers:
        listed = "; ".join(f"{name}: {array['layer'].values.tolist()}" for name, array in zip(names, arrays, strict=True))
        raise InvalidArgumentError(f"the datasets have no layer in common: {listed}")
    given = [labels[name] if isinstance(labels, Mapping) and set(labels) == set(datasets) else labels for name in datasets]
    parsed = [parse_labels(array, of_array) for array, of_array in zip(arrays, given, strict=True)]
    classes = np.unique(parsed[0][1])
    for name, (_, y) in zip(names, parsed, strict=True):
        if np.unique(y).tolist() != classes.tolist():
            raise LabelError(
                f"{name!r} has the classes {np.unique(y).tolist()} and {names[0]!r} {classes.tolist()}: give all datasets the same classes"
            )
    chosen = _probes(probes)
    prompts = [list_prompts(array) for array in arrays]
    fits = _Fits(
        labels=[y for _, y in parsed],
        folds=[plan_folds(y, of_array, None, cv, seed)[0] for (_, y), of_array in zip(parsed, prompts, strict=True)],
        unseen=[[np.flatnonzero(~np.isin(test, train)) for test in prompts] for train in prompts],
        probes=chosen,
        seed=seed,
    )
    return _Transfer(
        names=names, arrays=arrays, prompts=prompts, layers=layers, label=parsed[0][0], classes=classes, cv=cv, fits=fits
    )  # fmt: skip


def _by_layer(name: str, array: xr.DataArray) -> xr.DataArray:
    if set(array.dims) not in ({"layer", "prompt", "hidden"}, {"prompt", "hidden"}):
        raise InvalidArgumentError(f"{name!r} has dims {tuple(array.dims)}, expected layer (or none), prompt and hidden: pool tokens first")
    if "layer" not in array.dims:
        array = array.expand_dims("layer") if "layer" in array.coords else array.expand_dims(layer=[0])
    if "layer" not in array.coords:
        array = array.assign_coords(layer=np.arange(array.sizes["layer"]))
    empty = [str(dim) for dim in array.dims if not array.sizes[dim]]
    if empty:
        raise InvalidArgumentError(f"{name!r} has no {' and no '.join(empty)}: there is nothing to fit")
    return array


def _probes(probes: Any) -> dict[str, Any]:
    listed = dict(probes) if isinstance(probes, Mapping) else {name: name for name in ([probes] if isinstance(probes, str) else probes)}
    if not listed:
        raise InvalidArgumentError("probes is empty: name at least one, such as 'mass_mean'")
    for probe in listed.values():
        make_probe(probe)
    return listed


# -- one layer -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _LayerScores:
    """Scores of one layer, each of shape (probe, train, test)."""

    accuracy: Array
    auroc: Array
    converged: Array


def _transfer_layer(fits: _Fits, *variables: xr.Variable) -> _LayerScores | _NotFinite:
    """Every probe of one layer fitted on every dataset and tested on every one; the body of a task."""
    matrices = [as_fit_dtype(read_layer(variable, 0)) for variable in variables]
    for number, matrix in enumerate(matrices):
        bad = not_finite_rows(matrix)
        if bad:
            return _NotFinite(number, bad)
    shape = (len(fits.probes), len(matrices), len(matrices))
    scores = _LayerScores(np.full(shape, np.nan), np.full(shape, np.nan), np.ones(shape, bool))
    with fits_running():
        for p, probe in enumerate(fits.probes.values()):
            for i, (x, y) in enumerate(zip(matrices, fits.labels, strict=True)):
                within = [_fit_fold(probe, fits.seed, x, y, *fold) for fold in fits.folds[i]]
                # Each fold weighs the same, as in a sweep. A fold that tests only one class has no AUROC, and is left out of that mean.
                areas = [area for _, area, _ in within if not np.isnan(area)]
                scores.accuracy[p, i, i] = np.mean([share for share, _, _ in within])
                scores.auroc[p, i, i] = np.mean(areas) if areas else np.nan
                scores.converged[p, i, i] = all(ended for _, _, ended in within)
                fitted = make_probe(probe, fits.seed).fit(x, y)
                for j, other in enumerate(matrices):
                    rows = fits.unseen[i][j]
                    if j != i and len(rows) and other.shape[1] == x.shape[1]:
                        scores.accuracy[p, i, j], scores.auroc[p, i, j] = _tested(fitted, other[rows], fits.labels[j][rows])
                        scores.converged[p, i, j] = converged(fitted)
    return scores


def _fit_fold(probe: Any, seed: int, x: Array, y: Array, train: Array, test: Array) -> tuple[float, float, bool]:
    fitted = make_probe(probe, seed).fit(x[train], y[train])
    return (*_tested(fitted, x[test], y[test]), converged(fitted))


def _tested(fitted: Any, x: Array, y: Array) -> tuple[float, float]:
    return accuracy(fitted.predict(x), y), auroc(class_scores(fitted, x), y, fitted.classes_)[0]


# -- result ----------------------------------------------------------------------------------------------------------------


def _scores(transfer: _Transfer, found: list[_LayerScores]) -> xr.Dataset:
    names, prompts, unseen, cv = transfer.names, transfer.prompts, transfer.fits.unseen, transfer.cv
    dims = ("layer", "probe", "train", "test")
    described = {"accuracy": {"long_name": "accuracy", "units": "1"}, "auroc": {"long_name": "area under the ROC curve", "units": "1"}}
    # On the diagonal all prompts are tested, in folds.
    n_test = np.array([[len(have) if i == j else len(unseen[i][j]) for j, have in enumerate(prompts)] for i in range(len(names))])
    n_train = np.array(
        [[round(len(have) * (1 - 1 / cv)) if i == j else len(have) for j in range(len(names))] for i, have in enumerate(prompts)]
    )
    scores = xr.Dataset(
        {
            **{name: (dims, np.stack([getattr(layer, name) for layer in found]), attrs) for name, attrs in described.items()},
            "converged": (dims, np.stack([layer.converged for layer in found])),
            "n_train": (("train", "test"), n_train),
            "n_test": (("train", "test"), n_test),
        },
        coords={"layer": transfer.layers, "probe": list(transfer.fits.probes), "train": names, "test": names},
    )
    first = transfer.arrays[0]
    scores.attrs = {
        "labels": transfer.label,
        "classes": transfer.classes.tolist(),
        "cv": cv,
        "random_state": transfer.fits.seed,
        "variable": str(first.name) if first.name is not None else "",
    }
    models = {str(a.coords["model"].item()) for a in transfer.arrays if "model" in a.coords and a.coords["model"].ndim == 0}
    if len(models) == 1:
        scores.attrs["model"] = models.pop()
    return to_interchange(scores)
