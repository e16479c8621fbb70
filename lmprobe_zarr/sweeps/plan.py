"""What a sweep would do, as a value: which labels, folds, probes and controls, how many fits, how many bytes to read.

Everything that callers give is parsed here, and refused here, before anything is read. Never a fit, a score or a place to write to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import xarray as xr

from lmprobe_zarr.batch import split_variable
from lmprobe_zarr.display import called, format_bytes
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.probes import (
    FitPlan,
    FitTask,
    FitVariable,
    Groups,
    Labels,
    bare_variable,
    group_codes,
    list_prompts,
    make_probe,
    number_repeats,
    parse_groups,
    parse_label_sets,
    parse_preprocessing,
    parse_sides,
    plan_folds,
)
from lmprobe_zarr.probes.controls import Trial, list_trials, make_estimator, parse_controls, read_features, shuffle_labels
from lmprobe_zarr.probes.metrics import Metric, parse_metrics
from lmprobe_zarr.sweeps.given import check_seed, layers_of, parse_activations
from lmprobe_zarr.typing import Array

__all__ = ["SweepPlan", "plan_sweep"]


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
        What stands along ``probe``.
    metrics : tuple of str
    dims : tuple of str
        Of every measure, in the result.
    n_prompts, n_dropped : int
        Prompts with a label, and those left out because they have none.
    n_folds, n_fits, n_tasks : int
        A task fits everything on one layer of one variable.
    nbytes : int
        Bytes of activations to read, as they are stored and before compression.
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
    _fits: FitPlan = field(repr=False)
    _arrays: tuple[xr.DataArray, ...] = field(repr=False)
    _attrs: Mapping[str, Any] = field(repr=False)
    _coords: Mapping[str, Any] = field(repr=False)

    def __str__(self) -> str:
        asked = [dim for dim in self.dims if dim not in ("layer", "probe", "fold")]
        rows = {
            "variables": ", ".join(self.variables),
            "layers": f"{len(self.layers)} ({self.layers[0]} to {self.layers[-1]})" if len(self.layers) > 1 else str(self.layers[0]),
            "probes": ", ".join(self.probes),
            "controls": ", ".join(self.controls) or "none",
            "metrics": ", ".join(self.metrics),
            "prompts": f"{self.n_prompts}{f' ({self.n_dropped} without a label left out)' * bool(self.n_dropped)}",
            "folds": f"{self.n_folds}, {self._attrs['cv']}",
            **({"also by": ", ".join(asked)} if asked else {}),
            "fits": f"{self.n_fits} in {self.n_tasks} tasks",
            "to read": f"{format_bytes(self.nbytes)}, each layer once",
        }
        return "\n".join(f"{name:<11}{value}" for name, value in rows.items())

    def tasks(self, workers: int) -> list[FitTask]:
        """Everything to fit: first what other layers wait for, then layer by layer, each read once where there are as many as workers.

        Parameters
        ----------
        workers : int
            How many run at a time.

        Returns
        -------
        list of FitTask
        """
        plan = self._fits
        trials = range(len(plan.trials))
        by_layer = tuple(number for number in trials if plan.trials[number].by_layer)
        at_zero = tuple(number for number in trials if not plan.trials[number].by_layer and not plan.trials[number].constant)
        layers = [(variable, layer) for variable, held in enumerate(plan.variables) for layer in range(len(held.layers))]
        found = [FitTask(-1, -1, (number,)) for number in trials if plan.trials[number].constant]
        for variable, layer in layers:
            place = plan.variables[variable].layers[layer]
            here = by_layer + (at_zero if place >= 0 and plan.layers[place] == "0" else ())
            split = [here] if len(layers) >= workers else [(number,) for number in here]
            found += [FitTask(variable, layer, numbers) for numbers in split]
        return sorted(found, key=lambda task: not self.spreads(task))

    def spreads(self, task: FitTask) -> bool:
        """Whether something of a task is the score of other layers too, so that none of them is whole without it.

        Parameters
        ----------
        task : FitTask
            One of `tasks`.

        Returns
        -------
        bool
        """
        return any(not self._fits.trials[trial].by_layer for trial in task.trials)

    def fingerprint(self) -> dict[str, Any]:
        """What a resumed sweep must have in common with the one that was interrupted, by name; JSON."""
        plan = self._fits
        words = {
            "labels": [[each.name, _digest(each.values[each.rows]), _digest(each.rows)] for each in plan.labels],
            "prompts": _digest(np.array(list_prompts(self._arrays[0]))),
            "folds": [self._attrs["cv"], _digest(*(side for fold in plan.folds for side in fold))],
            "layers": [str(layer) for layer in self.layers],
            "variables": [
                [name, [plan.layers[place] for place in variable.layers if place >= 0], list(array.shape), str(array.dtype)]
                for name, variable, array in zip(self.variables, plan.variables, self._arrays, strict=True)
            ],
            "model": self._attrs.get("model", ""),
            "probes": [[trial.name, trial.control, trial.features, _describe(trial.probe)] for trial in plan.trials],
            "features of the controls": {
                name: _digest(np.array(held) if isinstance(held, list) else held) if not isinstance(held, xr.Variable) else list(held.shape)
                for name, held in plan.features.items()
            },
            "metrics": list(self.metrics),
            "seeds": [self._attrs["random_state"], *plan.seeds],
            "strengths": [list(plan.strengths), plan.inner, "" if plan.choose_by is None else plan.choose_by.name],
            "preprocessing": plan.preprocessing or "",
            "task": plan.task,
            "predictions": plan.predictions,
            "version of scikit-learn": next(v for v in self._attrs["versions"] if v.startswith("scikit-learn")),
        }
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
    inner_cv: int | None = None,
    choose_by: str | None = None,
    repeats: int = 1,
    seeds: int | Iterable[int] | None = None,
    missing: str = "raise",
    predictions: bool = False,
    random_state: int = 0,
) -> SweepPlan:
    """What :func:`lmprobe_zarr.sweep` would do with the same arguments; nothing is read but coordinates.

    Parameters
    ----------
    activations, labels, probes, cv, groups, split, task, metrics, controls, preprocessing
        As for :func:`lmprobe_zarr.sweep`.
    strengths, inner_cv, choose_by, repeats, seeds, missing, predictions, random_state
        As for :func:`lmprobe_zarr.sweep`.

    Returns
    -------
    SweepPlan
        ``print(plan)`` shows the number of fits and the bytes to read.

    Raises
    ------
    As :func:`lmprobe_zarr.sweep`, for everything that can be known before activations are read.
    """
    controls = parse_controls(controls)
    given, arrays = parse_activations(activations, controls)
    array = arrays[0]
    seed = check_seed(random_state)
    if task not in ("classification", "regression"):
        raise InvalidArgumentError(f"task={task!r} is unknown: use 'classification' or 'regression'")
    if missing not in ("raise", "drop"):
        raise InvalidArgumentError(f"missing={missing!r} is unknown: use 'raise' or 'drop'")
    several = _several_sets(array, labels)
    learned = parse_label_sets(array, labels, task=task, missing=missing)
    rows = learned[0].rows
    together = None if groups is None else parse_groups(array, groups, rows)
    chosen = _probes(probes, task)
    trials = list_trials(chosen, controls, task)
    n_classes = max((len(each.classes) for each in learned if each.classes is not None), default=0)
    measured = parse_metrics(metrics, task, n_classes)
    spec = _preprocessing(preprocessing)
    _check_probabilities(trials, measured, task, spec)
    if split is not None and cv is not None:
        raise InvalidArgumentError("cv and split were given: a split is the one fold there is, leave one of the two out")
    prompts = list_prompts(array)
    folds, described = plan_folds(
        learned, prompts, together, parse_sides(array, split) if split is not None else 5 if cv is None else cv, seed, repeats=repeats
    )
    drawn = _seeds(seeds, seed)
    strong = _strengths(strengths, trials)
    inner, by = _inner(inner_cv, choose_by, strong, measured, task, n_classes)
    layers, variables = _variables(arrays, named=given is not None)
    if any(trial.features == "layer_0" for trial in trials) and "0" not in [str(layer) for layer in layers]:
        raise InvalidArgumentError(
            f"control 'layer_0' needs layer 0, and there are layers {layers[0]} to {layers[-1]}: give all layers, or leave it out"
        )
    codes = np.full(len(prompts), -1)
    codes[rows] = group_codes([prompts[row] for row in rows], None)
    kept = codes if together is None else together.codes
    shuffled: tuple[tuple[Array, ...], ...] = ()
    if any(trial.shuffled for trial in trials):
        shuffled = tuple(tuple(shuffle_labels(each, codes, folds, one) for one in drawn) for each in learned)
    plan = FitPlan(
        variables=variables,
        features=read_features(trials, controls, array, given, rows),
        labels=learned,
        shuffled=shuffled,
        folds=folds,
        kept=kept,
        layers=tuple(str(layer) for layer in layers),
        trials=trials,
        metrics=measured,
        seeds=drawn,
        strengths=strong,
        inner=inner,
        choose_by=by,
        preprocessing=spec,
        task=task,
        predictions=bool(predictions),
    )
    dims = {
        "variable": [variable.name for variable in variables] if given is not None else None,
        "layer": layers,
        "probe": [trial.name for trial in trials],
        "fold": np.arange(len(folds)),
        "seed": list(drawn) if seeds is not None else None,
        "strength": list(strong) if strong and not inner else None,
        "label": [each.name for each in learned] if several else None,
    }
    attrs = _attributes(array, given, learned, together, described, seed, trials, task, spec, len(prompts), strong if inner else ())
    n_tasks, n_fits = _count(plan)
    return SweepPlan(
        variables=tuple(str(each.name) if each.name is not None else "activations" for each in arrays),
        layers=tuple(layers.tolist()),
        probes=tuple(trial.name for trial in trials if not trial.control),
        controls=tuple(trial.name for trial in trials if trial.control),
        metrics=tuple(metric.name for metric in measured),
        dims=tuple(name for name, values in dims.items() if values is not None),
        n_prompts=len(rows),
        n_dropped=len(prompts) - len(rows),
        n_folds=len(folds),
        n_fits=n_fits,
        n_tasks=n_tasks,
        nbytes=sum(each.nbytes for each in arrays)
        + sum(held.size * held.dtype.itemsize for held in plan.features.values() if isinstance(held, xr.Variable)),
        _fits=plan,
        _arrays=arrays,
        _attrs=attrs,
        _coords=_coordinates(dims, trials, folds, arrays, array, learned, together, shuffled, predictions=plan.predictions),
    )


def _variables(arrays: tuple[xr.DataArray, ...], *, named: bool) -> tuple[Array, tuple[FitVariable, ...]]:
    """All layers, and each variable with its own among them."""
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
        if own is not None and len(set(own)) < len(own):
            raise InvalidArgumentError(f"{called(array)} holds a layer twice: drop one with .drop_duplicates('layer')")
        variables.append(
            FitVariable(
                name=str(array.name) if named else "",
                # What has no layers has the same scores in all of them; alone, it is a layer of its own.
                layers=(-1,) if own is None and named else (0,) if own is None else tuple(places[layer] for layer in own),
                activations=variable if variable.chunks is None and not in_memory else None,
            )
        )
    return layers, tuple(variables)


def _several_sets(array: xr.DataArray, labels: Any) -> bool:
    if isinstance(labels, xr.DataArray):
        return labels.ndim == 2
    return isinstance(labels, list | tuple) and bool(labels) and all(isinstance(name, str) and name in array.coords for name in labels)


def _seeds(seeds: Any, random_state: int) -> tuple[int, ...]:
    if seeds is None:
        return (random_state,)
    listed = (
        list(range(seeds)) if isinstance(seeds, int) and not isinstance(seeds, bool) else list(seeds) if isinstance(seeds, Iterable) else []
    )
    if not listed or len(set(listed)) < len(listed):
        raise InvalidArgumentError(f"seeds={seeds!r} are no seeds: give a number of them, or different whole numbers such as [0, 1, 2]")
    return tuple(check_seed(one) for one in listed)


def _strengths(strengths: Any, trials: tuple[Trial, ...]) -> tuple[float, ...]:
    if strengths is None:
        return ()
    listed = list(strengths) if isinstance(strengths, Iterable) and not isinstance(strengths, str) else [strengths]
    good = all(isinstance(one, int | float | np.number) and not isinstance(one, bool) and np.isfinite(one) and one > 0 for one in listed)
    if not listed or not good or len(set(listed)) < len(listed):
        raise InvalidArgumentError(f"strengths={strengths!r} are no strengths: give different positive numbers, larger being stronger")
    if not any(trial.penalised for trial in trials):
        raise InvalidArgumentError(
            f"strengths were given, and none of {', '.join(repr(e.name) for e in trials)} has one: use named probes such as 'ridge'"
        )
    return tuple(float(one) for one in listed)


def _inner(
    inner_cv: Any, choose_by: str | None, strengths: tuple[float, ...], metrics: tuple[Metric, ...], task: str, n_classes: int
) -> tuple[int, Metric | None]:
    if inner_cv is None:
        if choose_by is not None:
            raise InvalidArgumentError(
                f"choose_by={choose_by!r} chooses nothing without inner folds: give inner_cv, such as 5, and strengths"
            )
        return 0, None
    if isinstance(inner_cv, bool) or not isinstance(inner_cv, int | np.integer) or inner_cv < 2:
        raise InvalidArgumentError(f"inner_cv={inner_cv!r} is no number of folds: give a whole number of at least 2")
    if len(strengths) < 2:
        raise InvalidArgumentError("inner_cv chooses among strengths: give several, such as strengths=(0.01, 1, 100)")
    return int(inner_cv), metrics[0] if choose_by is None else parse_metrics(choose_by, task, n_classes)[0]


def _preprocessing(spec: Any) -> str | None:
    steps = parse_preprocessing(spec)
    return "+".join(map(str, steps)) or None


def _probes(probes: Any, task: str) -> dict[str, Any]:
    """Name to probe, in the caller's order."""
    if isinstance(probes, Mapping):
        pairs = list(probes.items())
    else:
        listed = [probes] if isinstance(probes, str) or hasattr(probes, "fit") or not isinstance(probes, Iterable) else list(probes)
        if task == "regression":
            # The default of `sweep` is a classifier.
            listed = ["ridge_regression" if isinstance(probe, str) and probe == "logistic_regression" else probe for probe in listed]
        pairs = [(probe if isinstance(probe, str) else type(probe).__name__, probe) for probe in listed]
    if not pairs:
        raise InvalidArgumentError("probes is empty: name at least one, such as 'logistic_regression'")
    chosen: dict[str, Any] = {}
    for name, probe in pairs:
        if not isinstance(name, str):
            raise InvalidTypeError(f"a probe is named by a text, not {name!r}")
        if name in chosen:
            raise InvalidArgumentError(f"two probes are called {name!r}: tell them apart with a mapping, {{'name': estimator, …}}")
        make_probe(probe, task=task)
        chosen[name] = probe
    return chosen


def _check_probabilities(trials: tuple[Trial, ...], metrics: tuple[Metric, ...], task: str, preprocessing: str | None) -> None:
    needing = [metric.name for metric in metrics if metric.needs == "probabilities"]
    without = [trial.name for trial in trials if not hasattr(make_estimator(trial, 0, task, preprocessing=preprocessing), "predict_proba")]
    if needing and without:
        raise InvalidArgumentError(
            f"metric {needing[0]!r} needs probabilities, and probe {without[0]!r} has no predict_proba: leave one of the two out, "
            "or use 'logistic_regression'"
        )


# -- what the result says of itself ----------------------------------------------------------------------------------------


def _count(plan: FitPlan) -> tuple[int, int]:
    """Tasks, where each fits everything on one layer, and fits."""
    layers = sum(len(variable.layers) for variable in plan.variables)
    per_trial = {"layer": layers, "zero": len(plan.variables), "constant": 1}
    fits = 0
    for trial in plan.trials:
        times = per_trial["layer" if trial.by_layer else "constant" if trial.constant else "zero"]
        times *= len(plan.folds) * len(plan.labels) * (len(plan.seeds) if trial.random(plan.preprocessing) else 1)
        if trial.penalised and plan.strengths:
            times *= len(plan.strengths) * plan.inner + 1 if plan.inner else len(plan.strengths)
        fits += times
    return layers + sum(trial.constant for trial in plan.trials), fits


def _attributes(
    array: xr.DataArray,
    given: xr.Dataset | None,
    labels: tuple[Labels, ...],
    groups: Groups | None,
    cv: str,
    seed: int,
    trials: tuple[Trial, ...],
    task: str,
    preprocessing: str | None,
    n_rows: int,
    chosen_from: tuple[float, ...],
) -> dict[str, Any]:
    only = labels[0]
    attrs: dict[str, Any] = {"labels": ", ".join(each.name for each in labels), "task": task}
    if only.classes is not None and len(labels) == 1:
        classes, counts = np.unique(only.values[only.rows], return_counts=True)
        attrs |= {"classes": classes.tolist(), "class_counts": counts.tolist(), "majority_share": float(counts.max() / counts.sum())}
    attrs |= {
        "n_prompts": len(only.rows),
        "n_dropped": n_rows - len(only.rows),
        "groups": groups.name if groups is not None else "",
        "cv": cv,
        "random_state": seed,
        "preprocessing": preprocessing or "",
        "variable": "" if given is not None or array.name is None else str(array.name),
        "estimators": [" ".join(repr(make_estimator(trial, seed, task, preprocessing=preprocessing)).split()) for trial in trials],
        "versions": _versions(),
    }
    if chosen_from:
        attrs["strengths_chosen_from"] = list(chosen_from)
    if "model" in array.coords and array.coords["model"].ndim == 0:
        attrs["model"] = str(array.coords["model"].item())
    return attrs


def _coordinates(
    dims: Mapping[str, Any],
    trials: tuple[Trial, ...],
    folds: tuple[Any, ...],
    arrays: tuple[xr.DataArray, ...],
    array: xr.DataArray,
    labels: tuple[Labels, ...],
    groups: Groups | None,
    shuffled: tuple[tuple[Array, ...], ...],
    *,
    predictions: bool,
) -> dict[str, Any]:
    coords: dict[str, Any] = {name: (name, np.asarray(values)) for name, values in dims.items() if values is not None}
    coords["kind"] = ("probe", np.array([trial.kind for trial in trials]))
    coords["control"] = ("probe", np.array([trial.control for trial in trials]))
    repeats = number_repeats(folds)
    if repeats[-1]:
        coords["repeat"] = ("fold", repeats)
    if "variable" in coords:
        parts = [split_variable(str(each.name)) for each in arrays]
        coords["site"] = ("variable", np.array([site for site, _ in parts]))
        coords["pooling"] = ("variable", np.array([pooling or "" for _, pooling in parts]))
    if "model" in array.coords and array.coords["model"].ndim == 0:
        coords["model"] = str(array.coords["model"].item())
    if predictions:
        rows = labels[0].rows
        prompts = list_prompts(array)
        coords["prompt"] = ("prompt", np.array([prompts[row] for row in rows]))
        true = [each.codes[rows] for each in labels]
        coords["true"] = ("prompt", true[0]) if "label" not in coords else (("label", "prompt"), np.array(true))
        if shuffled:
            # What the controls with shuffled labels were asked: their predictions mean nothing beside the true ones.
            dealt = np.array(
                [[replace(each, values=values).codes[rows] for values in drawn] for each, drawn in zip(labels, shuffled, strict=True)]
            )
            asked = [dim for dim in ("label", "seed") if dim in coords]
            coords["dealt"] = ((*asked, "prompt"), dealt.reshape([len(coords[dim][1]) for dim in asked] + [len(rows)]))
        if groups is not None:
            coords["group"] = ("prompt", groups.codes[rows])
    return coords


def _versions() -> list[str]:
    from importlib.metadata import version

    return [f"{package} {version(package)}" for package in ("lmprobe-zarr", "scikit-learn", "numpy", "xarray", "dask")]
