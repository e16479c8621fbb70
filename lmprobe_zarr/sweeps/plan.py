"""The plan of a sweep: which labels, folds, probes and controls, how many fits, how many bytes to read.

All arguments are parsed, and errors in them raised, before any activation is read. Never a fit, a score or a place to write to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
import xarray as xr

from lmprobe_zarr.batch import ALL, check_flag, split_variable
from lmprobe_zarr.display import format_bytes
from lmprobe_zarr.errors import LabelError
from lmprobe_zarr.probes import FitPlan, FitTask, FitVariable, Labels, bare_variable, draw_within, group_codes, list_prompts, number_repeats
from lmprobe_zarr.probes.controls import Shuffle, make_estimator, parse_controls, read_features, shuffle_labels
from lmprobe_zarr.probes.folds import Fold
from lmprobe_zarr.sweeps.choice import check_names
from lmprobe_zarr.sweeps.given import check_seed, is_drawn, layers_of, parse_activations
from lmprobe_zarr.sweeps.options import (
    Data,
    SweepOptions,
    check_layer_0,
    parse_choice,
    parse_data,
    parse_design,
    parse_folds,
    parse_seeds,
    parse_solver,
    parse_strengths,
)
from lmprobe_zarr.tokens import order_attributes
from lmprobe_zarr.typing import Array

__all__ = ["Sweep", "SweepPlan", "make_sweep", "plan_sweep"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SweepPlan:
    """What a sweep would do. Printing it shows it as a table.

    Parameters
    ----------
    variables : tuple of str
        The variables that are fitted.
    layers : tuple
        Their layers.
    probes, controls : tuple of str
        Labels along ``probe``.
    metrics : tuple of str
    dims : tuple of str
        Dims of every measure in the result.
    n_prompts, n_dropped : int
        Prompts with a label, and those left out because they have none.
    n_folds, n_fits, n_tasks : int
        A task fits everything on one layer of one variable.
    nbytes : int
        Bytes of activations to read, as they are stored and before compression.
    cv : str
        How the folds come about.
    choice : str
        What is chosen within each training fold, and by what; empty if nothing is.
    """

    variables: tuple[str, ...]
    layers: tuple[Any, ...]
    probes: tuple[str, ...]
    controls: tuple[str, ...]
    metrics: tuple[str, ...]
    dims: tuple[str, ...]
    n_prompts: int
    n_dropped: int
    n_folds: int
    n_fits: int
    n_tasks: int
    nbytes: int
    cv: str
    choice: str = ""

    def __str__(self) -> str:
        further = [dim for dim in self.dims if dim not in ("layer", "probe", "fold")]
        rows = {
            "variables": ", ".join(self.variables),
            "layers": f"{len(self.layers)} ({self.layers[0]} to {self.layers[-1]})" if len(self.layers) > 1 else str(self.layers[0]),
            "probes": ", ".join(self.probes),
            "controls": ", ".join(self.controls) or "none",
            "metrics": ", ".join(self.metrics),
            "prompts": f"{self.n_prompts}{f' ({self.n_dropped} without a label left out)' * bool(self.n_dropped)}",
            "folds": f"{self.n_folds}, {self.cv}",
            **({"chosen": self.choice} if self.choice else {}),
            **({"also by": ", ".join(further)} if further else {}),
            "fits": f"{self.n_fits} in {self.n_tasks} tasks",
            "to read": f"{format_bytes(self.nbytes)}, each layer once",
        }
        return "\n".join(f"{name:<11}{value}" for name, value in rows.items())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sweep:
    """A sweep that is ready to run: its plan for callers, and what its tasks and its result need.

    Parameters
    ----------
    plan : SweepPlan
    fits : FitPlan
        What all tasks share.
    arrays : tuple of DataArray
        The variables that are fitted.
    dims : tuple of str
        Of the scores of all that can be chosen.
    attrs, coords : mapping
        Of these scores.
    """

    plan: SweepPlan
    fits: FitPlan
    arrays: tuple[xr.DataArray, ...]
    dims: tuple[str, ...]
    attrs: Mapping[str, Any]
    coords: Mapping[str, Any]

    def tasks(self, workers: int) -> list[FitTask]:
        """All tasks: first those that other layers wait for, then layer by layer.

        Where there are at least as many layers as workers, each layer is one task, so that it is read once.

        Parameters
        ----------
        workers : int
            How many run at a time.

        Returns
        -------
        list of FitTask
        """
        plan = self.fits
        trials = range(len(plan.trials))
        by_layer = tuple(number for number in trials if plan.trials[number].by_layer)
        at_zero = tuple(number for number in trials if not plan.trials[number].by_layer and not plan.trials[number].constant)
        layers = [(source, layer) for source, held in enumerate(plan.variables) for layer in range(len(held.layers))]
        found = [FitTask(-1, -1, (number,)) for number in trials if plan.trials[number].constant]
        for source, layer in layers:
            place = plan.variables[source].layers[layer]
            here = by_layer + (at_zero if place >= 0 and plan.layers[place] == "0" else ())
            found += [FitTask(source, layer, here)] if len(layers) >= workers else [FitTask(source, layer, (number,)) for number in here]
        return sorted(found, key=lambda task: not self.spreads(task))

    def spreads(self, task: FitTask) -> bool:
        """Whether a score of a task belongs to other layers too, so that none of them is complete without it.

        Parameters
        ----------
        task : FitTask
            One of `tasks`.

        Returns
        -------
        bool
        """
        return any(not self.fits.trials[trial].by_layer for trial in task.trials)

    def fingerprint(self) -> dict[str, Any]:
        """What a resumed sweep must have in common with the one that was interrupted, by name; JSON."""
        plan = self.fits
        words = {
            "labels": [[each.name, _digest(each.values[each.rows]), _digest(each.rows)] for each in plan.labels],
            "prompts": _digest(np.array(list_prompts(self.arrays[0]))),
            "folds": [self.attrs["cv"], _digest(*(side for fold in plan.folds for side in fold))],
            "layers": [str(layer) for layer in self.plan.layers],
            "variables": [
                [name, [plan.layers[place] for place in source.layers if place >= 0], list(array.shape), _stored_dtype(array).name]
                for name, source, array in zip(self.plan.variables, plan.variables, self.arrays, strict=True)
            ],
            "model": self.attrs.get("model", ""),
            "probes": [[trial.name, trial.control, trial.features, _describe(trial.probe)] for trial in plan.trials],
            "features of the controls": {
                name: _digest(np.array(held) if isinstance(held, list) else held) if not isinstance(held, xr.Variable) else list(held.shape)
                for name, held in plan.features.items()
            },
            "metrics": list(self.plan.metrics),
            "seeds": [self.attrs["random_state"], *plan.seeds],
            "strengths": [list(plan.strengths), plan.inner, "" if plan.choose_by is None else plan.choose_by.name],
            "preprocessing": plan.preprocessing or "",
            "task": plan.task,
            "predictions": plan.predictions,
            **({"shuffles": plan.shuffles} if plan.shuffles else {}),
            **({"solver": [plan.solver, plan.device]} if plan.solver != "scikit-learn" else {}),
            # Raised when fits, folds or shuffled labels of an unchanged call change.
            "way of fitting": 2,
            "version of scikit-learn": next(v for v in self.attrs["versions"] if v.startswith("scikit-learn")),
        }
        if plan.choose:
            words["what is chosen"] = list(plan.choose)
        return dict(json.loads(json.dumps(words)))


def _describe(probe: Any) -> str:
    """A probe in words that are the same in every process."""
    if isinstance(probe, str):
        return probe
    parameters = ", ".join(f"{name}={value!r}" for name, value in sorted(probe.get_params().items()) if not hasattr(value, "get_params"))
    return f"{type(probe).__module__}.{type(probe).__qualname__}({' '.join(parameters.split())})"


def _digest(*arrays: Any) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(json.dumps(np.asarray(array).tolist(), default=str).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def plan_sweep(
    activations: xr.DataArray | xr.Dataset,
    labels: Any,
    probes: str | Iterable[Any] | Mapping[str, Any] = ("logistic_regression",),
    cv: Any = None,
    *,
    groups: Any = None,
    split: Any = None,
    task: str = "classification",
    metrics: str | Iterable[str] | None = None,
    controls: str | Iterable[str] | Mapping[str, Any] | None = None,
    preprocessing: str | None = None,
    strengths: Iterable[float] | None = None,
    choose: str | Iterable[str] | None = None,
    inner_cv: int | None = None,
    choose_by: str | None = None,
    repeats: int = 1,
    seeds: int | Iterable[int] | None = None,
    missing: str = "raise",
    predictions: bool = False,
    solver: str = "scikit-learn",
    device: str | None = None,
    random_state: int = 0,
) -> SweepPlan:
    """What :func:`lmprobe_zarr.sweep` would do with the same arguments; nothing is read but coordinates.

    Parameters
    ----------
    activations, labels, probes, cv, groups, split, task, metrics, controls, preprocessing
        As for :func:`lmprobe_zarr.sweep`.
    strengths, choose, inner_cv, choose_by, repeats, seeds, missing, predictions, solver, device, random_state
        As for :func:`lmprobe_zarr.sweep`.

    Returns
    -------
    SweepPlan
        ``print(plan)`` shows the number of fits and the bytes to read.

    Raises
    ------
    As :func:`lmprobe_zarr.sweep`, for everything that can be known before activations are read.
    """
    options = SweepOptions(
        activations=activations, labels=labels, probes=probes, cv=cv, groups=groups, split=split, task=task, metrics=metrics,
        controls=controls, preprocessing=preprocessing, strengths=strengths, choose=choose, inner_cv=inner_cv, choose_by=choose_by,
        repeats=repeats, seeds=seeds, missing=missing, predictions=predictions, random_state=random_state, solver=solver, device=device,
    )  # fmt: skip
    return make_sweep(options, run=False).plan


def make_sweep(options: SweepOptions, *, run: bool = True) -> Sweep:
    """The sweep that options describe; nothing is read but coordinates, and no model is run but that of a control, with `run`.

    Raises
    ------
    As :func:`lmprobe_zarr.sweep`, for everything that can be known before activations are read.
    """
    controls = parse_controls(options.controls)
    dataset, arrays = parse_activations(options.activations, controls)
    seed = check_seed(options.random_state)
    data = parse_data(options, dataset, arrays)
    design = parse_design(options, controls, data.n_classes)
    folds, cv = parse_folds(options, data, seed)
    seeds = parse_seeds(options.seeds, seed)
    strengths = parse_strengths(options.strengths, design.trials)
    choose, inner, choose_by = parse_choice(options, data, design, strengths)
    solver, device = parse_solver(options.solver, options.device, design.trials, design.preprocessing)
    layers, variables = _fit_variables(arrays, named=dataset is not None)
    check_layer_0(design.trials, layers)
    codes = np.zeros(len(data.prompts), dtype=int)
    codes[data.rows] = group_codes([data.prompts[row] for row in data.rows], None)
    shuffled: tuple[tuple[tuple[Shuffle, ...], ...], ...] = ()
    if any(trial.shuffled for trial in design.trials):

        def draw_folds(dealt: Labels) -> tuple[Fold, ...]:
            # Folds that do not depend on the labels are the same for all; those of a splitter may be fewer for other labels.
            drawn = parse_folds(options, replace(data, labels=(dealt,) if len(data.labels) == 1 else data.labels), seed)[0]
            return drawn if len(drawn) == len(folds) else folds

        of = draw_folds if options.split is None and is_drawn(options.cv) else partial(_checked, folds)
        times = range(max(1, *(trial.shuffles for trial in design.trials)))
        shuffled = tuple(
            tuple(tuple(shuffle_labels(each, data.prompts, data.groups, of, drawn, number) for number in times) for drawn in seeds)
            for each in data.labels
        )
    fits = FitPlan(
        variables=variables,
        features=read_features(design.trials, controls, arrays[0], dataset, data.rows, run=run),
        labels=data.labels,
        shuffled=shuffled,
        folds=folds,
        kept=codes if data.groups is None else data.groups.codes,
        layers=tuple(str(layer) for layer in layers),
        trials=design.trials,
        metrics=design.metrics,
        seeds=seeds,
        strengths=strengths,
        choose=choose,
        inner=inner,
        within=(),
        choose_by=choose_by,
        random_state=seed,
        grouped=data.groups is not None,
        preprocessing=design.preprocessing,
        task=options.task,
        predictions=check_flag("predictions", options.predictions),
        solver=solver,
        device=device,
    )
    check_names(fits)
    if inner:
        within = [[draw_within(fits, each.values, each, train) for train, _ in folds] for each in data.labels]
        fits = replace(fits, within=tuple(map(tuple, within)))
    dims = _dims(fits, data, layers, seeded=options.seeds is not None)
    plan = _summarise(fits, data, layers, tuple(dim for dim in dims if dim == "probe" or dim not in choose), cv)
    attrs, coords = _attributes(fits, data, cv, seed), _coordinates(fits, data, dims)
    return Sweep(plan=plan, fits=fits, arrays=arrays, dims=tuple(dims), attrs=attrs, coords=coords)


def _checked(folds: tuple[Fold, ...], labels: Labels) -> tuple[Fold, ...]:
    """The same folds, if each trains on two classes of these labels."""
    if labels.classes is not None and any(len(np.unique(labels.values[train])) < 2 for train, _ in folds):
        raise LabelError("a fold trains on one class")
    return folds


def _summarise(fits: FitPlan, data: Data, layers: Array, dims: tuple[str, ...], cv: str) -> SweepPlan:
    n_tasks, n_fits = _count(fits)
    features = [values for values in fits.features.values() if isinstance(values, xr.Variable)]
    return SweepPlan(
        variables=tuple(str(array.name) if array.name is not None else "activations" for array in data.arrays),
        layers=tuple(layers.tolist()),
        probes=tuple(trial.name for trial in fits.trials if not trial.control),
        controls=tuple(trial.name for trial in fits.trials if trial.control),
        metrics=tuple(metric.name for metric in fits.metrics),
        dims=dims,
        n_prompts=len(data.rows),
        n_dropped=len(data.prompts) - len(data.rows),
        n_folds=len(fits.folds),
        n_fits=n_fits,
        n_tasks=n_tasks,
        nbytes=sum(array.size * _stored_dtype(array).itemsize for array in data.arrays)
        + sum(values.size * values.dtype.itemsize for values in features),
        cv=cv,
        choice=_describe_choice(fits),
    )


def _describe_choice(fits: FitPlan) -> str:
    if not fits.choose or fits.choose_by is None:
        return ""
    return f"{' and '.join(fits.choose)}, in each fold by {fits.choose_by.name} over {fits.inner} inner folds of its training prompts"


def _stored_dtype(array: xr.DataArray) -> np.dtype[Any]:
    """The dtype that is read: float16 where a store holds it, which is handed out as float32."""
    narrow = array.dtype == np.float32 and array.attrs.get("stored_dtype") == "float16"
    return np.dtype(np.float16) if narrow else array.dtype


def _fit_variables(arrays: tuple[xr.DataArray, ...], *, named: bool) -> tuple[Array, tuple[FitVariable, ...]]:
    """All layers, and each variable with the places of its own layers among them."""
    held = [layers_of(array) for array in arrays]
    layers = np.array(list(dict.fromkeys(layer for each in held for layer in (each if each is not None else ())))) if any(
        each is not None for each in held
    ) else np.arange(1)  # fmt: skip
    if len(arrays) > 1 and layers.dtype.kind in "iuf":
        layers = np.sort(layers)
    places = {layer: place for place, layer in enumerate(layers.tolist())}
    variables = []
    for array, own in zip(arrays, held, strict=True):
        variable = bare_variable(array.variable)
        in_memory = variable.chunks is None and variable._in_memory
        variables.append(
            FitVariable(
                name=str(array.name) if named else "",
                # A variable without layers has the same scores in all of them. An array without layers counts as one layer.
                layers=(-1,) if own is None and named else (0,) if own is None else tuple(places[layer] for layer in own),
                activations=variable if variable.chunks is None and not in_memory else None,
            )
        )
    return layers, tuple(variables)


# -- metadata of the result ------------------------------------------------------------------------------------------------


def _count(plan: FitPlan) -> tuple[int, int]:
    """The number of tasks, each of which fits everything on one layer, and the number of fits."""
    layers = sum(len(source.layers) for source in plan.variables)
    per_entry = {"layer": layers, "zero": len(plan.variables), "constant": 1}
    fits = 0
    for trial in plan.trials:
        times = per_entry["layer" if trial.by_layer else "constant" if trial.constant else "zero"]
        times *= len(plan.folds) * len(plan.labels) * (len(plan.seeds) if trial.random(plan.preprocessing) else 1)
        if plan.chooses_strength(trial):
            times *= len(plan.strengths) * plan.inner + 1
        else:
            times *= len(plan.strengths) if trial.penalised and plan.strengths else 1
            times *= 1 + plan.inner if plan.is_candidate(trial) else 1
        fits += times * max(1, trial.shuffles)
    return layers + sum(trial.constant for trial in plan.trials), fits


def _dims(fits: FitPlan, data: Data, layers: Array, *, seeded: bool) -> dict[str, Array]:
    """The dims of every measure and their labels; the arguments decide which dims there are."""
    labels = {
        "variable": [source.name for source in fits.variables] if data.dataset is not None else None,
        "layer": layers,
        "probe": [trial.name for trial in fits.trials],
        "fold": np.arange(len(fits.folds)),
        "seed": list(fits.seeds) if seeded else None,
        "strength": list(fits.strengths) if fits.strengths and "strength" not in fits.choose else None,
        "label": [each.name for each in data.labels] if data.several else None,
    }
    return {dim: np.asarray(values) for dim, values in labels.items() if values is not None}


def _attributes(fits: FitPlan, data: Data, cv: str, seed: int) -> dict[str, Any]:
    array, only = data.arrays[0], data.labels[0]
    attrs: dict[str, Any] = {"labels": ", ".join(each.name for each in data.labels), "task": fits.task}
    if only.classes is not None and len(data.labels) == 1:
        # Of the prompts that are scored, which of a single split are some.
        scored = only.values[np.unique(np.concatenate([test for _, test in fits.folds]))]
        counts = np.array([int((scored == label).sum()) for label in only.classes])
        attrs |= {"classes": only.classes.tolist(), "class_counts": counts.tolist(), "majority_share": float(counts.max() / counts.sum())}
    estimators = [make_estimator(trial, seed, fits.task, preprocessing=fits.preprocessing) for trial in fits.trials]
    attrs |= {
        "n_prompts": len(only.rows),
        "n_dropped": len(data.prompts) - len(only.rows),
        "groups": data.groups.name if data.groups is not None else "",
        "cv": cv,
        "random_state": seed,
        "preprocessing": fits.preprocessing or "",
        "variable": "" if data.dataset is not None or array.name is None else str(array.name),
        "estimators": [" ".join(repr(estimator).split()) for estimator in estimators],
        "versions": list(_versions()),
    }
    if fits.solver != "scikit-learn":
        attrs |= {"solver": fits.solver, "device": fits.device}
    if fits.choose:
        attrs["choose"] = list(fits.choose)
    if "strength" in fits.choose:
        attrs["strengths_chosen_from"] = list(fits.strengths)
    if "model" in array.coords and array.coords["model"].ndim == 0:
        attrs["model"] = str(array.coords["model"].item())
    return attrs


def _coordinates(fits: FitPlan, data: Data, dims: Mapping[str, Array]) -> dict[str, Any]:
    array = data.arrays[0]
    coords: dict[str, Any] = {dim: (dim, labels) for dim, labels in dims.items()}
    coords["kind"] = ("probe", np.array([trial.kind for trial in fits.trials]))
    coords["control"] = ("probe", np.array([trial.control for trial in fits.trials]))
    repeats = number_repeats(fits.folds)
    if repeats[-1]:
        coords["repeat"] = ("fold", repeats)
    if "variable" in dims:
        parts = [split_variable(str(each.name)) for each in data.arrays]
        coords["site"] = ("variable", np.array([site for site, _, _ in parts]))
        coords["pooling"] = ("variable", np.array([pooling or "" for _, pooling, _ in parts]))
        if any(part != ALL for _, _, part in parts):
            coords["over"] = ("variable", np.array([part for _, _, part in parts]))
    if "model" in array.coords and array.coords["model"].ndim == 0:
        coords["model"] = str(array.coords["model"].item())
    return coords | _prompt_coordinates(fits, data, dims) if fits.predictions else coords


def _prompt_coordinates(fits: FitPlan, data: Data, dims: Mapping[str, Array]) -> dict[str, Any]:
    """What the predictions of each prompt are compared with."""
    rows = data.rows
    true = [each.codes[rows] for each in data.labels]
    coords: dict[str, Any] = {
        "prompt": ("prompt", np.array([data.prompts[row] for row in rows]), order_attributes(data.arrays[0])),
        "true": (("label", "prompt"), np.array(true)) if "label" in dims else ("prompt", true[0]),
    }
    if fits.shuffled and not fits.shuffles:
        # Predictions of controls with shuffled labels are compared with these labels, not with the true ones.
        by_label = zip(data.labels, fits.shuffled, strict=True)
        dealt = np.array([[replace(each, values=values).codes[rows] for ((values, _),) in drawn] for each, drawn in by_label])
        by = [dim for dim in ("label", "seed") if dim in dims]
        coords["dealt"] = ((*by, "prompt"), dealt.reshape([len(dims[dim]) for dim in by] + [len(rows)]))
        tests = np.array([[_test_folds(folds, rows, number_repeats(fits.folds)) for ((_, folds),) in drawn] for drawn in fits.shuffled])
        several = ["repetition"] if tests.shape[2] > 1 else []
        shape = [len(dims[dim]) for dim in by] + ([tests.shape[2]] if several else []) + [len(rows)]
        coords["dealt_fold"] = ((*by, *several, "prompt"), tests.reshape(shape))
    if data.groups is not None:
        coords["group"] = ("prompt", data.groups.codes[rows])
    return coords


def _test_folds(folds: Sequence[Fold], rows: Array, repeats: Array) -> Array:
    """The fold that tests each row in each repeat, −1 for none, shape (repetition, row)."""
    place = np.full(int(rows.max()) + 1, -1)
    place[rows] = np.arange(len(rows))
    found = np.full((int(repeats[-1]) + 1, len(rows)), -1, np.int32)
    for fold, (_, test) in enumerate(folds):
        found[repeats[fold], place[test]] = fold
    return found


@cache
def _versions() -> tuple[str, ...]:
    from importlib.metadata import version

    return tuple(f"{package} {version(package)}" for package in ("lmprobe-zarr", "scikit-learn", "numpy", "xarray", "dask"))
