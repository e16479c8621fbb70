"""Scores of probes over layers: labels and folds are settled once, then every layer is fitted on Dask.

Holds the plan of a sweep and its execution. Never a store, a model or a plot: what is fitted is the array that is given.
"""

from __future__ import annotations

import hashlib
import threading
import time
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import xarray as xr

from lmprobe_zarr.batch import prompt_hash
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, LabelError
from lmprobe_zarr.probes import accuracy, auroc, class_scores, converged, fit_in_place, make_probe

__all__ = ["sweep"]

Array = npt.NDArray[Any]
Fold = tuple[Array, Array]
#: A layer's number and the numbers of the probes to fit on it.
_Job = tuple[int, tuple[int, ...]]

_DIMS = ("layer", "prompt", "hidden")
_SCHEDULERS = ("threads", "processes", "synchronous")
_SHOWN = 3


def sweep(
    activations: xr.DataArray,
    labels: str | xr.DataArray | Mapping[Any, Any] | Iterable[Any],
    probes: str | Iterable[Any] | Mapping[str, Any] = ("logistic_regression",),
    cv: Any = 5,
    *,
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
        fold); ``n_train`` and ``n_test`` (fold). Attributes name labels, classes, class counts, the share of the largest class
        (``majority_share``), folds, estimators and versions.

    Raises
    ------
    InvalidTypeError
        An argument of another type than named above.
    InvalidArgumentError
        Other dimensions, no prompts or layers, activations that are NaN or infinite, an unknown probe, folds that do not fit
        or that would put one prompt on both sides.
    LabelError
        Labels are missing, of another length, contradictory, continuous, all the same, or too few of one class.

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
    name, y = _labels(array, labels)
    chosen = _probes(probes)
    estimators = [make_probe(probe, seed) for probe in chosen.values()]
    folds, described = _folds(array, y, cv, seed)
    layers = np.atleast_1d(array.coords["layer"].values) if "layer" in array.coords else np.arange(array.sizes.get("layer", 1))
    _run_options(client, scheduler, n_workers)

    variable = _bare(array.variable)
    in_memory = variable.chunks is None and variable._in_memory
    plan = _Plan(
        activations=variable if variable.chunks is None and not in_memory else None,
        labels=y,
        folds=folds,
        layers=tuple(str(layer) for layer in layers),
        probes=tuple(chosen.items()),
        random_state=seed,
    )
    try:
        fits = _run(plan, variable, client=client, scheduler=scheduler or "threads", n_workers=n_workers, progress=progress)
    except _NotFiniteError as problem:
        raise InvalidArgumentError(
            f"layer {layers[problem.layer]} of {_called(array)} is NaN or infinite for {problem.count} of {len(y)} prompts "
            f"({_named(array, problem.rows)}): "
            "drop them with .dropna('prompt'), or extract them again (float16 overflows at 65504)"
        ) from None

    scores = _dataset(plan, fits, layers)
    classes, counts = np.unique(y, return_counts=True)
    scores.attrs = {
        "labels": name,
        "classes": classes.tolist(),
        "class_counts": counts.tolist(),
        "majority_share": float(counts.max() / counts.sum()),
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
    if client is not None and not (hasattr(client, "submit") and hasattr(client, "nthreads")):
        raise InvalidTypeError(f"client is a distributed.Client, not {type(client).__name__}")
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


# -- labels ----------------------------------------------------------------------------------------------------------------


def _prompts(array: xr.DataArray) -> list[str]:
    """The prompt of each row, or its number where there are none."""
    # tolist: numpy's StringDType, as which zarr gives texts, can neither be cast to str nor sorted with others.
    values = array.coords["prompt"].values.tolist() if "prompt" in array.coords else range(array.sizes["prompt"])
    return [str(value) for value in values]


def _named(array: xr.DataArray, rows: Iterable[int]) -> str:
    """The first few prompts by their hash. Never their text."""
    rows = list(rows)
    prompts = _prompts(array)
    shown = ", ".join(prompts[row] if "prompt" in array.coords else f"row {row}" for row in rows[:_SHOWN])
    return shown + (", …" if len(rows) > _SHOWN else "")


def _labels(array: xr.DataArray, labels: Any) -> tuple[str, Array]:
    """The name of the labels and their values, shape (prompt,), complete and of at least two classes."""
    import pandas as pd

    n = array.sizes["prompt"]
    name, absent = "labels", False
    if isinstance(labels, str):
        name = labels
        column = _coordinate(array, labels)
        # The reader fills a column that some prompts lack with -1 or "", and counts them in this attribute.
        absent = bool(column.attrs.get("missing", 0))
        values = list(column.values)
    elif isinstance(labels, xr.DataArray):
        name = str(labels.name) if labels.name is not None else name
        absent = bool(labels.attrs.get("missing", 0))
        values = _from_dataarray(array, labels)
    elif isinstance(labels, Mapping):
        values = _from_pairs(array, labels.items())
    elif isinstance(labels, pd.Series) and not isinstance(labels.index, pd.RangeIndex):
        # A column that was filtered or sorted carries its own index: by position it would be another prompt's label.
        name = str(labels.name) if labels.name is not None else name
        if not all(isinstance(key, str) for key in labels.index):
            raise LabelError(
                "labels are a pandas Series without prompts as its index: give labels.to_numpy() if its order is that of the prompts"
            )
        values = _from_pairs(array, labels.items())
    elif isinstance(labels, xr.Dataset | bytes) or not isinstance(labels, Iterable):
        raise InvalidTypeError(
            f"labels are a coordinate's name, a DataArray over prompt, a mapping or one value per prompt, not {type(labels).__name__}"
        )
    else:
        given = np.asarray(labels) if hasattr(labels, "__array__") else None
        if given is not None and given.ndim != 1:
            raise LabelError(f"labels have shape {given.shape}, expected one label per prompt: ({n},)")
        values = list(labels if given is None else given)
        if len(values) != n:
            raise LabelError(f"there are {len(values)} labels for {n} prompts: give one per prompt, in the order of activations.prompt")
    return name, _classes(array, name, values, absent)


def _coordinate(array: xr.DataArray, name: str) -> xr.DataArray:
    columns = sorted(
        str(key) for key, value in array.coords.items() if value.dims == ("prompt",) and key not in ("prompt", "prompt_sha256", "text")
    )
    if name not in array.coords:
        raise LabelError(
            f"there is no coordinate {name!r}: those per prompt are {', '.join(columns) or 'none'}; or give the labels themselves"
        )
    column = cast("xr.DataArray", array.coords[name])
    if column.dims != ("prompt",):
        raise LabelError(
            f"coordinate {name!r} has dims {column.dims}, expected ('prompt',): those per prompt are {', '.join(columns) or 'none'}"
        )
    return column


def _from_dataarray(array: xr.DataArray, labels: xr.DataArray) -> list[Any]:
    if labels.dims != ("prompt",):
        raise LabelError(f"labels have dims {labels.dims}, expected ('prompt',)")
    for what, of in ((labels, "the labels"), (array, "the activations")):
        if "prompt" not in what.coords:
            raise LabelError(f"{of} have no prompt coordinate to match by: give labels.values if their order is that of the prompts")
    found = _once(zip(_prompts(labels), labels.values.tolist(), strict=True))
    return [found.get(prompt) for prompt in _prompts(array)]


def _from_pairs(array: xr.DataArray, pairs: Iterable[tuple[Any, Any]]) -> list[Any]:
    """One label per prompt from (text or hash, label); None where there is none."""
    prompts = _prompts(array)
    if "prompt" not in array.coords and "text" not in array.coords:
        raise LabelError(
            "the activations have neither a prompt nor a text coordinate to match a mapping by: give one label per prompt, in order"
        )
    texts = array.coords["text"].values.tolist() if "text" in array.coords else []
    by_text = {text: prompt for prompt, text in zip(prompts, texts, strict=False) if text}
    known = set(prompts)

    def prompt_of(key: Any) -> str:
        # The text comes first: the hash of a prompt given as token ids is not that of its text.
        if isinstance(key, str) and key in by_text:
            return by_text[key]
        if isinstance(key, str) and key in known:
            return key
        return prompt_hash(key)

    found = _once(((prompt_of(key), label) for key, label in pairs))
    return [found.get(prompt) for prompt in prompts]


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Prompt to label; a prompt may come twice only with the same label."""
    found: dict[str, Any] = {}
    for prompt, label in pairs:
        if prompt in found and not (_is_missing(label) and _is_missing(found[prompt])) and found[prompt] != label:
            raise LabelError(f"prompt {prompt} has two labels, {found[prompt]!r} and {label!r}: give each prompt one")
        found[prompt] = label
    return found


def _is_missing(label: Any) -> bool:
    import pandas as pd

    return bool(pd.isna(label)) if pd.api.types.is_scalar(label) else False


def _classes(array: xr.DataArray, name: str, values: list[Any], absent: bool) -> Array:
    """The labels as a plain array of truth values, whole numbers or texts."""
    import pandas as pd

    n = len(values)
    if not all(pd.api.types.is_scalar(value) for value in values):
        raise LabelError(f"labels {name!r} hold sequences: give one truth value, whole number or text per prompt")
    values = [value.item() if isinstance(value, np.generic) else value for value in values]
    rows = [
        row
        for row, value in enumerate(values)
        if _is_missing(value) or (absent and (value == "" or (isinstance(value, int) and not isinstance(value, bool) and value == -1)))
    ]
    if rows:
        raise LabelError(
            f"labels {name!r} miss {len(rows)} of {n} prompts ({_named(array, rows)}): "
            "label them, or drop them first with activations.isel(prompt=…)"
        )
    kinds = {type(value) for value in values}
    if kinds <= {int, float} and any(value != int(value) for value in values if np.isfinite(value)):
        raise LabelError(
            f"labels {name!r} are continuous numbers: a probe learns classes, give whole numbers or texts (np.digitize makes bins)"
        )
    if not (kinds <= {int, float} or kinds in ({bool}, {str})) or not all(np.isfinite(v) for v in values if isinstance(v, float)):
        listed = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise LabelError(f"labels {name!r} hold {listed}: give truth values, whole numbers or texts, one kind only")
    y = np.array(values) if float not in kinds else np.array([int(value) for value in values])
    if len(set(values)) < 2:
        raise LabelError(f"all {n} labels {name!r} are {values[0]!r}: a probe needs prompts of at least two classes")
    return y


# -- folds -----------------------------------------------------------------------------------------------------------------


def _folds(array: xr.DataArray, y: Array, cv: Any, seed: int) -> tuple[tuple[Fold, ...], str]:
    """Row numbers (train, test) of every fold, and what made them."""
    n = len(y)
    codes = np.unique(np.array(_prompts(array)), return_inverse=True)[1]
    repeated = int(codes.max()) + 1 < n
    if isinstance(cv, int | np.integer) and not isinstance(cv, bool):
        splitter = _stratified(y, codes if repeated else None, int(cv), seed)
        pairs = splitter.split(np.zeros((n, 1)), y, codes) if repeated else splitter.split(np.zeros((n, 1)), y)
        described = repr(splitter) + (" grouped by prompt" if repeated else "")
    elif hasattr(cv, "split") and not isinstance(cv, str):
        described = " ".join(repr(cv).split())
        try:
            pairs = _split(cv, y, codes)
        except ValueError as error:
            raise InvalidArgumentError(f"cv={described} cannot split these {n} prompts: {error}") from error
    elif isinstance(cv, Iterable) and not isinstance(cv, str | bytes | Mapping):
        pairs, described = cv, ""
    else:
        raise InvalidTypeError(f"cv={cv!r} is neither a number of folds, a scikit-learn splitter nor an iterable of (train, test)")
    folds = tuple(_fold(number, pair, y, codes) for number, pair in enumerate(pairs))
    if not folds:
        raise InvalidArgumentError("cv gives no folds: give at least one (train, test)")
    return folds, described or f"{len(folds)} (train, test) pairs"


def _stratified(y: Array, groups: Array | None, n_splits: int, seed: int) -> Any:
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    if n_splits < 2:
        raise InvalidArgumentError(f"cv={n_splits!r} leaves nothing to test on: give at least 2 folds")
    labels = y if groups is None else y[np.unique(groups, return_index=True)[1]]
    classes, counts = np.unique(labels, return_counts=True)
    if counts.min() < n_splits:
        listed = ", ".join(f"{label!r}: {count}" for label, count in zip(classes.tolist(), counts.tolist(), strict=True))
        raise LabelError(
            f"{n_splits} folds need {n_splits} different prompts of each class, but there are {{{listed}}}: use fewer folds or label more"
        )
    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    return kind(n_splits=n_splits, shuffle=True, random_state=seed)


def _split(cv: Any, y: Array, codes: Array) -> list[Any]:
    from sklearn.model_selection import GroupKFold, GroupShuffleSplit, LeaveOneGroupOut, LeavePGroupsOut, StratifiedGroupKFold

    rows = np.zeros((len(y), 1))
    # The others would warn that they ignore the groups.
    if isinstance(cv, GroupKFold | GroupShuffleSplit | LeaveOneGroupOut | LeavePGroupsOut | StratifiedGroupKFold):
        return list(cv.split(rows, y, codes))
    return list(cv.split(rows, y))


def _fold(number: int, pair: Any, y: Array, codes: Array) -> Fold:
    n = len(y)
    try:
        train, test = (np.asarray(side) for side in pair)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(f"fold {number} is not a pair (train, test) of row numbers") from error
    sides: list[Array] = []
    for which, side in (("train", train), ("test", test)):
        if side.dtype == bool and side.shape == (n,):
            side = np.flatnonzero(side)
        if side.ndim != 1 or side.dtype.kind not in "iu" or not len(side):
            raise InvalidArgumentError(
                f"fold {number}: {which} has shape {side.shape} and dtype {side.dtype}, expected row numbers, at least one"
            )
        if side.min() < 0 or side.max() >= n:
            raise InvalidArgumentError(
                f"fold {number}: {which} holds rows {side.min()} to {side.max()}, but there are {n} prompts, 0 to {n - 1}"
            )
        sides.append(side.astype(np.intp))
    both = np.intersect1d(codes[sides[0]], codes[sides[1]])
    if len(both):
        raise InvalidArgumentError(
            f"fold {number} has {len(both)} prompts on both sides, first row {int(np.flatnonzero(codes == both[0])[0])}: "
            "test scores would be too good; use cv=5, which keeps repeats together, or drop_duplicates('prompt')"
        )
    if len(np.unique(y[sides[0]])) < 2:
        raise LabelError(
            f"fold {number} trains on {len(sides[0])} prompts that all are {y[sides[0]][0].item()!r}: stratify, or use fewer folds"
        )
    return sides[0], sides[1]


# -- fits ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Plan:
    """What all tasks share; shipped once to each worker."""

    #: The whole lazy array, dims (layer, prompt, hidden) in any order; None where tasks are handed values.
    activations: xr.Variable | None
    labels: Array
    folds: tuple[Fold, ...]
    layers: tuple[str, ...]
    probes: tuple[tuple[str, Any], ...]
    random_state: int


@dataclass(frozen=True, slots=True)
class _Fit:
    layer: int
    probe: int
    fold: int
    accuracy: float
    auroc: float
    nan_reason: str
    seconds: float
    converged: bool


class _NotFiniteError(Exception):
    """NaN or infinity in a task; becomes an InvalidArgumentError where the names of layer and prompts are known."""

    def __init__(self, layer: int, count: int, rows: list[int]) -> None:
        super().__init__(layer, count, rows)
        self.layer, self.count, self.rows = layer, count, rows


class _FitsRunning:
    """Settings of the whole process while any fit runs in it: one BLAS thread, no ConvergenceWarning.

    Both are process-wide, so tasks in several threads that each set and restored them would restore one another's: the last
    one out could leave BLAS at one thread for good. The first in sets, the last out restores.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._restore = ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        from sklearn.exceptions import ConvergenceWarning
        from threadpoolctl import threadpool_limits

        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._restore.enter_context(threadpool_limits(1, user_api="blas"))
                self._restore.enter_context(warnings.catch_warnings())
                # Counted by `converged` and said once by the caller.
                warnings.simplefilter("ignore", ConvergenceWarning)
        try:
            # OpenMP's limit belongs to the thread that sets it.
            with threadpool_limits(1, user_api="openmp"):
                yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._restore.close()


_fits_running = _FitsRunning()


def _fit_layer(plan: _Plan, layer: int, values: Any, probes: tuple[int, ...]) -> list[_Fit]:
    """All folds of some probes on one layer; the body of every task.

    `values` is an array (prompt, hidden), or None where the task reads its layer itself.
    """
    if values is None:
        assert plan.activations is not None  # noqa: S101  (for mypy: the plan holds what no task is handed)
        # Sliced here, not by the caller: xarray caches what a lazy slice has read in the slice, and the graph would keep it.
        sliced = plan.activations.isel(layer=layer, missing_dims="ignore")
        # Read before it is turned: a lazy transpose reads point by point.
        values = sliced.values if sliced.dims[0] == "prompt" else sliced.values.T
    matrix = _computable(values)
    del values
    _check_finite(layer, matrix)
    with _fits_running():
        return [_fit_fold(plan, layer, probe, fold, matrix) for probe in probes for fold in range(len(plan.folds))]


def _computable(values: Any) -> Array:
    """The layer in the float type that is fitted, rows contiguous: float64 as it is, all others that fit in float32."""
    values = np.asarray(values)
    wide = values.dtype.itemsize > {"f": 4, "i": 2, "u": 2}.get(values.dtype.kind, values.dtype.itemsize)
    return np.ascontiguousarray(values, dtype=np.float64 if wide else np.float32)


def _check_finite(layer: int, matrix: Array) -> None:
    # Row sums in float64 show any NaN or infinity without a second matrix of truth values; float64 may overflow, so each is looked at.
    with np.errstate(over="ignore", invalid="ignore"):
        suspicious = np.flatnonzero(~np.isfinite(matrix.sum(axis=1, dtype=np.float64)))
    bad = [int(row) for row in suspicious if not np.isfinite(matrix[row]).all()]
    if bad:
        raise _NotFiniteError(layer, len(bad), bad[: _SHOWN + 1])


def _fit_seed(plan: _Plan, layer: int, probe: int, fold: int) -> int:
    words = f"{plan.random_state}\0{plan.layers[layer]}\0{plan.probes[probe][0]}\0{fold}"
    return int.from_bytes(hashlib.sha256(words.encode("utf-8", "surrogatepass")).digest()[:4], "little")


def _fit_fold(plan: _Plan, layer: int, probe: int, fold: int, matrix: Array) -> _Fit:
    import sklearn

    train, test = plan.folds[fold]
    given = plan.probes[probe][1]
    estimator = make_probe(given, _fit_seed(plan, layer, probe, fold))
    # The layer was checked once; each estimator would check each fold several times more.
    with sklearn.config_context(assume_finite=True):
        rows = matrix[train]
        started = time.perf_counter()
        estimator = fit_in_place(given, estimator, rows, plan.labels[train])
        seconds = time.perf_counter() - started
        del rows
        rows = matrix[test]
        share = accuracy(estimator.predict(rows), plan.labels[test])
        area, reason = auroc(
            class_scores(estimator, rows), plan.labels[test], getattr(estimator, "classes_", np.unique(plan.labels[train]))
        )
    return _Fit(layer, probe, fold, share, area, reason, seconds, converged(estimator))


# -- execution -------------------------------------------------------------------------------------------------------------


def _run(plan: _Plan, variable: xr.Variable, *, client: Any, scheduler: str, n_workers: int | None, progress: bool) -> list[_Fit]:
    if client is not None:
        workers = sum(client.nthreads().values())
    else:
        from dask.system import CPU_COUNT

        workers = n_workers or CPU_COUNT
    # With enough layers each is read once for all of its probes.
    every = tuple(range(len(plan.probes)))
    groups = [every] if len(plan.layers) >= workers else [(probe,) for probe in every]
    jobs = [(layer, group) for layer in range(len(plan.layers)) for group in groups]
    with _bar(len(jobs), progress) as advance:
        if client is not None:
            done = _run_on_client(plan, variable, jobs, advance, client=client, in_flight=2 * max(1, workers))
        else:
            done = _run_here(plan, variable, jobs, advance, scheduler=scheduler, workers=workers)
    return [fit for fits in done for fit in fits]


@contextmanager
def _bar(total: int, progress: bool) -> Iterator[Callable[[], object]]:
    if not progress:
        yield lambda: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc="sweep", unit="task") as bar:
        yield bar.update


def _layer_values(plan: _Plan, variable: xr.Variable, layer: int) -> Any:
    """What a task is handed: nothing (it reads), the values in memory, or a dask array."""
    return None if plan.activations is not None else variable.isel(layer=layer, missing_dims="ignore").transpose("prompt", "hidden").data


def _run_here(
    plan: _Plan, variable: xr.Variable, jobs: Sequence[_Job], advance: Callable[[], object], *, scheduler: str, workers: int
) -> list[list[_Fit]]:
    import dask.base
    from dask.callbacks import Callback
    from dask.delayed import delayed

    callback: Any = Callback
    compute: Any = dask.base.compute
    shared = delayed(plan, traverse=False, pure=False)
    fit = delayed(_fit_layer, pure=False)
    tasks = [fit(shared, layer, _layer_values(plan, variable, layer), probes) for layer, probes in jobs]
    keys: set[Hashable] = {task.key for task in tasks}

    def posttask(key: Hashable, *_: object) -> None:
        if key in keys:
            advance()

    with callback(posttask=posttask):
        return list(compute(*tasks, scheduler=scheduler, num_workers=workers))


def _run_on_client(
    plan: _Plan, variable: xr.Variable, jobs: Sequence[_Job], advance: Callable[[], object], *, client: Any, in_flight: int
) -> list[list[_Fit]]:
    import distributed
    from dask.delayed import delayed

    shared = client.submit(_itself, plan, pure=False)
    sent: dict[int, Any] = {}

    def start(layer: int, probes: tuple[int, ...]) -> Any:
        values = _layer_values(plan, variable, layer)
        if hasattr(values, "__dask_graph__"):
            return client.compute(delayed(_fit_layer, pure=False)(shared, layer, values, probes))
        if values is not None:
            # As arguments they would be copied through the scheduler, which warns of it.
            if layer not in sent:
                sent.clear()
                sent[layer] = client.scatter(values, hash=False)
            values = sent[layer]
        return client.submit(_fit_layer, shared, layer, values, probes, pure=False)

    as_completed: Any = distributed.as_completed
    completed = as_completed(loop=client.loop)
    running: dict[Any, int] = {}
    results: dict[int, list[_Fit]] = {}
    try:
        for number, (layer, probes) in enumerate(jobs):
            future = start(layer, probes)
            running[future] = number
            completed.add(future)
            # Values are sent only as fast as they are fitted, so that few lie in the workers' memory.
            if len(running) >= in_flight:
                _collect(completed, running, results, advance)
        while running:
            _collect(completed, running, results, advance)
    finally:
        client.cancel(list(running))
    return [results[number] for number in range(len(jobs))]


def _collect(completed: Any, running: dict[Any, int], results: dict[int, list[_Fit]], advance: Callable[[], object]) -> None:
    future = next(completed)
    results[running.pop(future)] = cast("list[_Fit]", future.result())
    advance()


def _itself(plan: _Plan) -> _Plan:
    return plan


# -- what comes back -------------------------------------------------------------------------------------------------------


def _dataset(plan: _Plan, fits: Iterable[_Fit], layers: Array) -> xr.Dataset:
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
