"""Whether what a probe learned holds elsewhere: fitted on one dataset and tested on another, and directions held against one another.

Holds the two calls and what comes back as labelled arrays. Never a store, a model or a plot; fits and scores are those of ``probes``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import xarray as xr

from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, LabelError
from lmprobe_zarr.probes import converged, fits_running, list_prompts, make_probe, parse_labels, plan_folds, show_prompts
from lmprobe_zarr.probes.metrics import accuracy, auroc, class_scores
from lmprobe_zarr.typing import Array

__all__ = ["sweep_transfer"]


def sweep_transfer(
    datasets: Mapping[str, xr.DataArray],
    labels: Any,
    probes: str | Iterable[str] | Mapping[str, Any] = ("mass_mean",),
    cv: int = 5,
    *,
    random_state: int = 0,
    scheduler: str = "threads",
    n_workers: int | None = None,
) -> xr.Dataset:
    """Scores of probes that were fitted on one dataset and tested on another, over ``layer, probe, train, test``.

    Parameters
    ----------
    datasets : {name: DataArray}
        Activations with dims (layer, prompt, hidden), at least two, of the same model and site. The layers that all of them have count.
    labels : str or {name: labels}
        As for :func:`lmprobe_zarr.sweep`: the name of a coordinate that all datasets have, or the labels of each; the same classes in all.
    probes : str, iterable of str, or {name: estimator}
        As there.
    cv : int
        Where train and test are the same dataset, the score is the mean over so many folds of it, so that it is of unseen prompts too.
    random_state : int
    scheduler : "threads", "processes" or "synchronous"
    n_workers : int, optional

    Returns
    -------
    Dataset
        ``accuracy`` and ``auroc`` (0 to 1), ``converged`` (layer, probe, train, test); ``n_train`` and ``n_test`` (train, test), prompts:
        those of the test set that the training set has too are left out, since they are not unseen. NaN where none is left, or where the
        hidden sizes differ.

    Raises
    ------
    InvalidTypeError, InvalidArgumentError, LabelError
        As `sweep`; fewer than two datasets, no layer in common, or other classes.

    Notes
    -----
    Each task reads one layer of every dataset. Source of the question: S. Marks and M. Tegmark, "The Geometry of Truth" (2023),
    arXiv:2310.06824, section 5.
    """
    import dask.base
    from dask.delayed import delayed

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
    parsed = [parse_labels(array, one) for array, one in zip(arrays, given, strict=True)]
    classes = np.unique(parsed[0][1])
    for name, (_, y) in zip(names, parsed, strict=True):
        if np.unique(y).tolist() != classes.tolist():
            raise LabelError(
                f"{name!r} has the classes {np.unique(y).tolist()} and {names[0]!r} {classes.tolist()}: give all datasets the same classes"
            )
    chosen = _probes(probes)
    prompts = [list_prompts(array) for array in arrays]
    folds = [plan_folds(y, have, None, cv, random_state)[0] for (_, y), have in zip(parsed, prompts, strict=True)]
    unseen = [[np.flatnonzero(~np.isin(test, train)) for test in prompts] for train in prompts]
    fit = delayed(_transfer_layer, pure=False)
    tasks = []
    for layer in layers:
        # Taken apart by task, so that a layer is read when it is its turn; lazy arrays go as they are.
        parts = [delayed(array.sel(layer=layer).variable, traverse=False, pure=False) for array in arrays]
        tasks.append(fit(parts, [y for _, y in parsed], folds, unseen, chosen, random_state))
    compute: Any = dask.base.compute
    found = compute(*tasks, scheduler=scheduler, **({} if n_workers is None else {"num_workers": n_workers}))
    for layer, result in zip(layers, found, strict=True):
        if result["bad"]:
            number, rows = result["bad"]
            raise InvalidArgumentError(
                f"layer {layer} of {names[number]!r} is NaN or infinite for {len(rows)} of {len(prompts[number])} prompts "
                f"({show_prompts(arrays[number], rows)}): drop them with .dropna('prompt'), or extract them again"
            )
    dims = ("layer", "probe", "train", "test")
    described = {"accuracy": {"long_name": "accuracy", "units": "1"}, "auroc": {"long_name": "area under the ROC curve", "units": "1"}}
    # On the diagonal all prompts are tested, in folds.
    n_test = np.array([[len(have) if i == j else len(unseen[i][j]) for j, have in enumerate(prompts)] for i in range(len(names))])
    n_train = np.array(
        [[round(len(have) * (1 - 1 / cv)) if i == j else len(have) for j in range(len(names))] for i, have in enumerate(prompts)]
    )
    scores = xr.Dataset(
        {
            **{name: (dims, np.stack([result[name] for result in found]), attrs) for name, attrs in described.items()},
            "converged": (dims, np.stack([result["converged"] for result in found])),
            "n_train": (("train", "test"), n_train),
            "n_test": (("train", "test"), n_test),
        },
        coords={"layer": layers, "probe": list(chosen), "train": names, "test": names},
    )
    scores.attrs = {
        "labels": parsed[0][0],
        "classes": classes.tolist(),
        "cv": cv,
        "random_state": random_state,
        "variable": str(arrays[0].name) if arrays[0].name is not None else "",
    }
    models = {str(array.coords["model"].item()) for array in arrays if "model" in array.coords and array.coords["model"].ndim == 0}
    if len(models) == 1:
        scores.attrs["model"] = models.pop()
    return scores


# -- inside ----------------------------------------------------------------------------------------------------------------


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


def _transfer_layer(
    variables: list[xr.Variable],
    labels: list[Array],
    folds: list[Any],
    unseen: list[list[Array]],
    probes: dict[str, Any],
    seed: int,
) -> dict[str, Any]:
    """Every probe of one layer fitted on every dataset and tested on every one; the body of a task."""
    # Read before it is turned: a lazy transpose reads point by point.
    matrices = [np.asarray(v.values if v.dims[0] == "prompt" else v.values.T) for v in variables]
    matrices = [matrix.astype(np.float64 if matrix.dtype.itemsize > 4 else np.float32) for matrix in matrices]
    shape = (len(probes), len(matrices), len(matrices))
    share, area, ended = np.full(shape, np.nan), np.full(shape, np.nan), np.ones(shape, bool)
    for number, matrix in enumerate(matrices):
        bad = np.flatnonzero(~np.isfinite(matrix).all(axis=1))
        if len(bad):
            return {"bad": (number, bad.tolist())}
    with fits_running():
        for p, probe in enumerate(probes.values()):
            for i, (x, y) in enumerate(zip(matrices, labels, strict=True)):
                ones = []
                for train, test in folds[i]:
                    fitted = make_probe(probe, seed).fit(x[train], y[train])
                    ones.append((*_tested(fitted, x[test], y[test]), converged(fitted)))
                # Each fold weighs the same, as in a sweep; without one of the classes in a fold its AUROC does not count.
                areas = [one[1] for one in ones if not np.isnan(one[1])]
                share[p, i, i], area[p, i, i] = np.mean([one[0] for one in ones]), np.mean(areas) if areas else np.nan
                ended[p, i, i] = all(one[2] for one in ones)
                fitted = make_probe(probe, seed).fit(x, y)
                for j, other in enumerate(matrices):
                    rows = unseen[i][j]
                    if j != i and len(rows) and other.shape[1] == x.shape[1]:
                        share[p, i, j], area[p, i, j] = _tested(fitted, other[rows], labels[j][rows])
                        ended[p, i, j] = converged(fitted)
    return {"bad": None, "accuracy": share, "auroc": area, "converged": ended}


def _tested(fitted: Any, x: Array, y: Array) -> tuple[float, float]:
    return accuracy(fitted.predict(x), y), auroc(class_scores(fitted, x), y, fitted.classes_)[0]
