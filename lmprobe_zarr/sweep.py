"""Scores of probes over layers: labels and folds are settled once, then every layer is fitted on Dask.

Holds the call that users make, and how fits are spread over threads, processes or a cluster and gathered again. Never a
store, a model or a plot; labels, folds and fits have rooms of their own in ``probes``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import xarray as xr

from lmprobe_zarr.cluster import check_client, run_on_client
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.probes import make_probe
from lmprobe_zarr.probes.fits import Fit, NotFiniteError, Plan, fit_layer
from lmprobe_zarr.probes.folds import plan_folds
from lmprobe_zarr.probes.labels import list_prompts, parse_groups, parse_labels, show_prompts
from lmprobe_zarr.progress import progress_bar

__all__ = ["sweep"]

Array = npt.NDArray[Any]
#: A layer's number and the numbers of the probes to fit on it.
_Job = tuple[int, tuple[int, ...]]

_DIMS = ("layer", "prompt", "hidden")
_SCHEDULERS = ("threads", "processes", "synchronous")


def sweep(
    activations: xr.DataArray,
    labels: str | xr.DataArray | Mapping[Any, Any] | Iterable[Any],
    probes: str | Iterable[Any] | Mapping[str, Any] = ("logistic_regression",),
    cv: Any = 5,
    *,
    groups: str | xr.DataArray | Mapping[Any, Any] | Iterable[Any] | None = None,
    random_state: int = 0,
    client: Any = None,
    scheduler: str | None = None,
    n_workers: int | None = None,
    progress: bool = False,
) -> xr.Dataset:
    """Scores of every probe on every layer and fold, as a dataset over ``layer, probe, fold``.

    Parameters
    ----------
    activations : DataArray of float, dims (layer, prompt, hidden) in any order
        What is fitted, exactly as given. Without ``layer`` it is one layer. A lazy array stays lazy: each task reads its own
        layer, one copy of which it holds at a time (float16 is computed in float32). Coordinates used where present:
        ``layer``, ``prompt``, ``text``, ``model`` and the labels.
    labels : str, DataArray, mapping or array
        The name of a coordinate over ``prompt``; a DataArray over ``prompt``, matched by prompt, whatever its order; a
        mapping from text or prompt hash to label; or values in the order of ``activations.prompt``.
    probes : names, {name: estimator}, or a list of names and estimators
        See :func:`lmprobe_zarr.probes.named_probes`. An estimator in a list is called by its class's name.
    cv : int, scikit-learn splitter, or iterable of (train, test)
        The same folds for every layer and probe. A number means stratified shuffled folds; where prompts repeat, all rows of
        one prompt lie in one fold. Pairs hold row numbers or truth values over the prompts.
    groups : str, DataArray, mapping or array, optional
        Prompts of an equal group, such as a pair of sentences or a source, never lie on both sides of a fold. Given as
        `labels` are, but of any values that have a hash. With a number as `cv`, as many groups at least; splitters of
        scikit-learn that know no groups, and pairs, are checked.
    random_state : int
        Seeds folds and fits. Each fit's seed depends only on it and on the names of layer, probe and fold, so scores are the
        same bit for bit on every scheduler and for any selection of layers. (Exception: estimators of the caller's that draw
        from a process-wide generator, such as ``LinearSVC(dual=True)``.)
    client : distributed.Client, optional
        Where to run. Lazy arrays are read by the workers, which must reach the store.
    scheduler : "threads" (default), "processes" or "synchronous"
        Where to run without a client.
    n_workers : int, optional
        Threads or processes without a client; by default one per core.
    progress : bool
        Shows a progress bar on stderr.

    Returns
    -------
    Dataset
        ``accuracy``, ``auroc`` (0 to 1; NaN where undefined, with the reasons in its attribute ``nan_reasons``),
        ``fit_seconds`` (wall time of the fit alone), ``converged`` (False: stopped at its iteration limit), each (layer, probe,
        fold); ``n_train`` and ``n_test`` (fold). Attributes name labels, groups, classes, class counts, the share of the largest class
        (``majority_share``), folds, estimators and versions.

    Raises
    ------
    InvalidTypeError
        An argument of another type than named above.
    InvalidArgumentError
        Other dimensions, no prompts or layers, activations that are NaN or infinite, an unknown probe, folds that do not fit
        or that would put one prompt or group on both sides.
    LabelError
        Labels are missing, of another length, contradictory, continuous, all the same, or too few of one class. Groups are
        missing, of another length, fewer than the folds, or one prompt is in two.

    Warns
    -----
    ConvergenceWarning
        scikit-learn's own, but once per sweep with the number of fits.

    Notes
    -----
    While fits run in a process, BLAS is limited to one thread there: one fit per core beats many cores per fit
    (measured 2 to 5 times).
    """
    array = _checked(activations)
    seed = _seed(random_state)
    name, y = parse_labels(array, labels)
    together = None if groups is None else parse_groups(array, groups)
    chosen = _probes(probes)
    estimators = [make_probe(probe, seed) for probe in chosen.values()]
    folds, described = plan_folds(y, list_prompts(array), together, cv, seed)
    layers = np.atleast_1d(array.coords["layer"].values) if "layer" in array.coords else np.arange(array.sizes.get("layer", 1))
    _run_options(client, scheduler, n_workers)

    variable = _bare(array.variable)
    in_memory = variable.chunks is None and variable._in_memory
    plan = Plan(
        activations=variable if variable.chunks is None and not in_memory else None,
        labels=y,
        folds=folds,
        layers=tuple(str(layer) for layer in layers),
        probes=tuple(chosen.items()),
        random_state=seed,
    )
    try:
        fits = _run(plan, variable, client=client, scheduler=scheduler or "threads", n_workers=n_workers, progress=progress)
    except NotFiniteError as problem:
        raise InvalidArgumentError(
            f"layer {layers[problem.layer]} of {_called(array)} is NaN or infinite for {len(problem.rows)} of {len(y)} prompts "
            f"({show_prompts(array, problem.rows)}): "
            "drop them with .dropna('prompt'), or extract them again (float16 overflows at 65504)"
        ) from None

    scores = _dataset(plan, fits, layers)
    classes, counts = np.unique(y, return_counts=True)
    scores.attrs = {
        "labels": name,
        "classes": classes.tolist(),
        "class_counts": counts.tolist(),
        "majority_share": float(counts.max() / counts.sum()),
        "groups": together.name if together is not None else "",
        "cv": described,
        "random_state": seed,
        "variable": str(activations.name) if activations.name is not None else "",
        "estimators": [" ".join(repr(estimator).split()) for estimator in estimators],
        "versions": _versions(),
        "n_unconverged": int((~scores["converged"]).sum()),
    }
    if "model" in activations.coords and activations.coords["model"].ndim == 0:
        scores = scores.assign_coords(model=str(activations.coords["model"].item()))
        scores.attrs["model"] = str(activations.coords["model"].item())
    if scores.attrs["n_unconverged"]:
        from sklearn.exceptions import ConvergenceWarning

        warnings.warn(
            f"{scores.attrs['n_unconverged']} of {scores['converged'].size} fits stopped at their iteration limit: "
            "scores.converged says which; give an estimator with a larger max_iter, or standardise",
            ConvergenceWarning,
            stacklevel=2,
        )
    return scores


# -- what is given ---------------------------------------------------------------------------------------------------------


def _called(activations: xr.DataArray) -> str:
    return repr(str(activations.name)) if activations.name is not None else "the activations"


def _checked(activations: Any) -> xr.DataArray:
    """The array itself; nothing is read."""
    if isinstance(activations, xr.Dataset):
        variables = ", ".join(str(name) for name in activations.data_vars)
        raise InvalidTypeError(f"sweep takes one variable, not a whole dataset: give ds[name], with one of {variables or 'no variables'}")
    if not isinstance(activations, xr.DataArray):
        raise InvalidTypeError(f"activations are an xarray.DataArray with dims {_DIMS}, not {type(activations).__name__}")
    dims = tuple(str(dim) for dim in activations.dims)
    if set(dims) not in (set(_DIMS), {"prompt", "hidden"}):
        remedy = "pool the tokens first, as in toks.lz.pool('mean')" if "token" in dims else "select or rename"
        raise InvalidArgumentError(f"{_called(activations)} has dims {dims}, expected layer (or none), prompt and hidden: {remedy}")
    empty = [dim for dim in dims if not activations.sizes[dim]]
    if empty:
        raise InvalidArgumentError(f"{_called(activations)} has no {' and no '.join(empty)}: there is nothing to fit")
    # ml_dtypes' bfloat16 has kind "V", as structured types have, but no fields.
    if activations.dtype.kind not in "fiub" and not (activations.dtype.kind == "V" and activations.dtype.names is None):
        raise InvalidTypeError(f"{_called(activations)} has dtype {activations.dtype}, expected real numbers")
    return activations


def _bare(variable: xr.Variable) -> xr.Variable:
    """The variable without attributes, which need not travel to the workers; a lazy one stays lazy."""
    bare = variable.copy(deep=False)
    bare.attrs = {}
    bare.encoding = {}
    return bare


def _seed(random_state: Any) -> int:
    if isinstance(random_state, bool) or not isinstance(random_state, int | np.integer):
        raise InvalidTypeError(f"random_state={random_state!r} is not a whole number: sweeps are reproducible, give a seed such as 0")
    if not 0 <= random_state < 2**32:
        raise InvalidArgumentError(f"random_state={random_state!r} is out of range: give a seed from 0 to 2**32 - 1")
    return int(random_state)


def _run_options(client: Any, scheduler: str | None, n_workers: int | None) -> None:
    if client is not None and (scheduler is not None or n_workers is not None):
        raise InvalidArgumentError("client and scheduler or n_workers were given: a client brings its own workers, leave the others out")
    if client is not None:
        check_client(client)
    if scheduler not in (None, *_SCHEDULERS):
        raise InvalidArgumentError(f"scheduler={scheduler!r} is unknown: use {', '.join(map(repr, _SCHEDULERS))}, or a client")
    if n_workers is not None and n_workers < 1:
        raise InvalidArgumentError(f"n_workers={n_workers!r} leaves nobody to work: give at least 1")


def _probes(probes: Any) -> dict[str, Any]:
    """Name to probe, in the caller's order."""
    if isinstance(probes, Mapping):
        pairs = list(probes.items())
    else:
        listed = [probes] if isinstance(probes, str) or hasattr(probes, "fit") or not isinstance(probes, Iterable) else list(probes)
        pairs = [(probe if isinstance(probe, str) else type(probe).__name__, probe) for probe in listed]
    if not pairs:
        raise InvalidArgumentError("probes is empty: name at least one, such as 'logistic_regression'")
    chosen: dict[str, Any] = {}
    for name, probe in pairs:
        if not isinstance(name, str):
            raise InvalidTypeError(f"a probe is named by a text, not {name!r}")
        if name in chosen:
            raise InvalidArgumentError(f"two probes are called {name!r}: tell them apart with a mapping, {{'name': estimator, …}}")
        make_probe(probe)
        chosen[name] = probe
    return chosen


# -- execution -------------------------------------------------------------------------------------------------------------


def _run(plan: Plan, variable: xr.Variable, *, client: Any, scheduler: str, n_workers: int | None, progress: bool) -> list[Fit]:
    if client is not None:
        workers = sum(client.nthreads().values())
    else:
        from dask.system import CPU_COUNT

        workers = n_workers or CPU_COUNT
    # With enough layers each is read once for all of its probes.
    every = tuple(range(len(plan.probes)))
    batches = [every] if len(plan.layers) >= workers else [(probe,) for probe in every]
    jobs = [(layer, batch) for layer in range(len(plan.layers)) for batch in batches]
    with progress_bar(len(jobs), description="sweep", unit="task", enabled=progress) as advance:
        if client is not None:
            done = _run_on_client(plan, variable, jobs, advance, client=client, in_flight=2 * max(1, workers))
        else:
            done = _run_here(plan, variable, jobs, advance, scheduler=scheduler, workers=workers)
    return [fit for fits in done for fit in fits]


def _layer_values(plan: Plan, variable: xr.Variable, layer: int) -> Any:
    """What a task is handed: nothing (it reads), the values in memory, or a dask array."""
    return None if plan.activations is not None else variable.isel(layer=layer, missing_dims="ignore").transpose("prompt", "hidden").data


def _run_here(
    plan: Plan, variable: xr.Variable, jobs: Sequence[_Job], advance: Callable[[int], None], *, scheduler: str, workers: int
) -> list[list[Fit]]:
    import dask.base
    from dask.callbacks import Callback
    from dask.delayed import delayed

    callback: Any = Callback
    compute: Any = dask.base.compute
    shared = delayed(plan, traverse=False, pure=False)
    fit = delayed(fit_layer, pure=False)
    tasks = [fit(shared, layer, _layer_values(plan, variable, layer), probes) for layer, probes in jobs]
    keys: set[Hashable] = {task.key for task in tasks}

    def posttask(key: Hashable, *_: object) -> None:
        if key in keys:
            advance(1)

    with callback(posttask=posttask):
        return list(compute(*tasks, scheduler=scheduler, num_workers=workers))


def _run_on_client(
    plan: Plan, variable: xr.Variable, jobs: Sequence[_Job], advance: Callable[[int], None], *, client: Any, in_flight: int
) -> list[list[Fit]]:
    from dask.delayed import delayed

    shared = client.submit(_itself, plan, pure=False)
    sent: dict[int, Any] = {}

    def start(layer: int, probes: tuple[int, ...]) -> Any:
        values = _layer_values(plan, variable, layer)
        if hasattr(values, "__dask_graph__"):
            return client.compute(delayed(fit_layer, pure=False)(shared, layer, values, probes))
        if values is not None:
            # As arguments they would be copied through the scheduler, which warns of it.
            if layer not in sent:
                sent.clear()
                sent[layer] = client.scatter(values, hash=False)
            values = sent[layer]
        return client.submit(fit_layer, shared, layer, values, probes, pure=False)

    # Values are sent only as fast as they are fitted, so that few lie in the workers' memory.
    starts = [partial(start, layer, probes) for layer, probes in jobs]
    return cast("list[list[Fit]]", run_on_client(client, starts, in_flight, lambda _: advance(1)))


def _itself(plan: Plan) -> Plan:
    return plan


# -- what comes back -------------------------------------------------------------------------------------------------------


def _dataset(plan: Plan, fits: Iterable[Fit], layers: Array) -> xr.Dataset:
    shape = (len(plan.layers), len(plan.probes), len(plan.folds))
    found = {name: np.full(shape, np.nan) for name in ("accuracy", "auroc", "fit_seconds")}
    ended = np.zeros(shape, dtype=bool)
    reasons: dict[str, set[str]] = {}
    for fit in fits:
        at = (fit.layer, fit.probe, fit.fold)
        found["accuracy"][at], found["auroc"][at], found["fit_seconds"][at], ended[at] = fit.accuracy, fit.auroc, fit.seconds, fit.converged
        if fit.nan_reason:
            reasons.setdefault(fit.nan_reason, set()).add(plan.probes[fit.probe][0])
    nan_reasons = [f"{', '.join(sorted(names))}: {reason}" for reason, names in sorted(reasons.items())]
    dims = ("layer", "probe", "fold")
    described = {
        "accuracy": {"long_name": "accuracy", "units": "1"},
        "auroc": {
            "long_name": "area under the ROC curve",
            "units": "1",
            **({"nan_reasons": nan_reasons} if nan_reasons else {}),
        },
        "fit_seconds": {"long_name": "wall time of the fit", "units": "s"},
    }
    return xr.Dataset(
        {
            **{name: (dims, values, described[name]) for name, values in found.items()},
            "converged": (dims, ended, {"long_name": "fit ended before its iteration limit"}),
            "n_train": ("fold", np.array([len(train) for train, _ in plan.folds])),
            "n_test": ("fold", np.array([len(test) for _, test in plan.folds])),
        },
        coords={"layer": layers, "probe": [name for name, _ in plan.probes], "fold": np.arange(len(plan.folds))},
    )


def _versions() -> list[str]:
    from importlib.metadata import version

    return [f"{package} {version(package)}" for package in ("lmprobe-zarr", "scikit-learn", "numpy", "xarray", "dask")]
