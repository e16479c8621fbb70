"""`SweepOptions`, the arguments of a sweep of prompts, and functions that parse them; nothing is read but coordinates.

``given`` checks the arguments that sweeps of every kind share.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.probes import (
    Groups,
    Labels,
    check_folds_listed,
    check_task,
    list_prompts,
    parse_groups,
    parse_label_sets,
    parse_preprocessing,
    parse_sides,
    plan_folds,
)
from lmprobe_zarr.probes.batched import BATCHED
from lmprobe_zarr.probes.controls import Trial, list_trials, make_estimator
from lmprobe_zarr.probes.devices import parse_device
from lmprobe_zarr.probes.folds import Fold
from lmprobe_zarr.probes.metrics import Metric, parse_metrics
from lmprobe_zarr.sweeps.given import check_seed, parse_probes
from lmprobe_zarr.typing import Array, is_listed

__all__ = [
    "Data", "Design", "SweepOptions", "check_layer_0", "parse_choice", "parse_data", "parse_design", "parse_folds",
    "parse_seeds", "parse_solver", "parse_strengths",
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SweepOptions:
    """The arguments of :func:`lmprobe_zarr.sweep`, not parsed yet; they mean what they mean there."""

    activations: Any
    labels: Any
    probes: Any
    cv: Any
    groups: Any
    split: Any
    task: str
    metrics: Any
    controls: Any
    preprocessing: str | None
    strengths: Any
    choose: Any
    inner_cv: Any
    choose_by: str | None
    repeats: int
    seeds: Any
    missing: str
    predictions: bool
    random_state: Any
    solver: str = "scikit-learn"
    device: Any = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Data:
    """Activations and labels, parsed."""

    #: None where an array was given.
    dataset: xr.Dataset | None
    arrays: tuple[xr.DataArray, ...]
    labels: tuple[Labels, ...]
    #: Whether several sets of labels were given, so that the result has the dim ``label``.
    several: bool
    groups: Groups | None
    prompts: list[str]

    @property
    def rows(self) -> Array:
        """The numbers of the prompts that have a label."""
        return self.labels[0].rows

    @property
    def n_classes(self) -> int:
        return max((len(each.classes) for each in self.labels if each.classes is not None), default=0)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Design:
    """Trials, metrics and preprocessing, parsed."""

    trials: tuple[Trial, ...]
    metrics: tuple[Metric, ...]
    preprocessing: str | None


def parse_data(options: SweepOptions, dataset: xr.Dataset | None, arrays: tuple[xr.DataArray, ...]) -> Data:
    array = arrays[0]
    several = _several_sets(array, options.labels)
    labels = parse_label_sets(array, options.labels, task=check_task(options.task), missing=options.missing)
    groups = None if options.groups is None else parse_groups(array, options.groups, labels[0].rows)
    return Data(dataset=dataset, arrays=arrays, labels=labels, several=several, groups=groups, prompts=list_prompts(array))


def parse_design(options: SweepOptions, controls: Mapping[str, Any], n_classes: int) -> Design:
    trials = list_trials(parse_probes(options.probes, options.task), controls, options.task)
    metrics = parse_metrics(options.metrics, options.task, n_classes)
    preprocessing = _preprocessing(options.preprocessing)
    _check_probabilities(trials, metrics, options.task, preprocessing)
    return Design(trials=trials, metrics=metrics, preprocessing=preprocessing)


def parse_folds(options: SweepOptions, data: Data, seed: int) -> tuple[tuple[Fold, ...], str]:
    """The folds, and a text that says how they were made."""
    if options.split is not None and options.cv is not None:
        raise InvalidArgumentError("cv and split were given: a split is the one fold there is, leave one of the two out")
    check_folds_listed(data.arrays[0], options.cv)
    default = 5 if options.cv is None else options.cv
    cv = default if options.split is None else parse_sides(data.arrays[0], options.split)
    return plan_folds(data.labels, data.prompts, data.groups, cv, seed, repeats=options.repeats)


def check_layer_0(trials: tuple[Trial, ...], layers: Array) -> None:
    if any(trial.features == "layer_0" for trial in trials) and "0" not in [str(layer) for layer in layers]:
        raise InvalidArgumentError(
            f"control 'layer_0' needs layer 0, and there are layers {layers[0]} to {layers[-1]}: give all layers, or leave it out"
        )


def _several_sets(array: xr.DataArray, labels: Any) -> bool:
    if isinstance(labels, xr.DataArray):
        return labels.ndim == 2
    return isinstance(labels, list | tuple) and bool(labels) and all(isinstance(name, str) and name in array.coords for name in labels)


def parse_solver(solver: Any, device: Any, trials: tuple[Trial, ...], preprocessing: str | None) -> tuple[str, str]:
    """What solves the fits, and on which device."""
    if not isinstance(solver, str) or solver not in ("scikit-learn", "batched"):
        raise InvalidArgumentError(f"solver={solver!r} is unknown: use 'scikit-learn' or 'batched'")
    if solver == "scikit-learn":
        if device is not None:
            raise InvalidArgumentError(f"device={device!r} is where solver='batched' solves: give that too, or leave device= out")
        return solver, "cpu"
    if preprocessing is not None:
        raise InvalidArgumentError(f"solver='batched' standardises by itself: leave preprocessing={preprocessing!r} out, or solver=")
    named = [repr(trial.probe) if isinstance(trial.probe, str) else type(trial.probe).__name__ for trial in trials if not trial.control]
    if not any(isinstance(trial.probe, str) and trial.probe in BATCHED for trial in trials if not trial.control):
        raise InvalidArgumentError(
            f"solver='batched' solves {', '.join(map(repr, BATCHED))}, and the probes are {', '.join(named)}: "
            "give one of these, or leave solver= out"
        )
    return solver, parse_device("cpu" if device is None else device, needed_by="solver='batched'", double=True)


def parse_seeds(seeds: Any, random_state: int) -> tuple[int, ...]:
    if seeds is None:
        return (random_state,)
    counted = isinstance(seeds, int | np.integer) and not isinstance(seeds, bool)
    listed = list(range(int(seeds))) if counted else list(seeds) if is_listed(seeds) else []
    known = [check_seed(seed) for seed in listed]
    if not listed or len(set(known)) < len(known):
        raise InvalidArgumentError(f"seeds={seeds!r:.60} are no seeds: give a number of them, or different whole numbers such as [0, 1, 2]")
    return tuple(known)


def parse_strengths(strengths: Any, trials: tuple[Trial, ...]) -> tuple[float, ...]:
    if strengths is None:
        return ()
    listed = list(strengths) if is_listed(strengths) and not isinstance(strengths, str) else [strengths]
    good = all(isinstance(x, int | float | np.integer | np.floating) and not isinstance(x, bool) and 0 < x < np.inf for x in listed)
    if not listed or not good or len(set(listed)) < len(listed):
        raise InvalidArgumentError(f"strengths={strengths!r} are no strengths: give different positive numbers, larger being stronger")
    if not any(trial.penalised for trial in trials):
        raise InvalidArgumentError(
            f"strengths were given, and none of {', '.join(repr(e.name) for e in trials)} has one: use named probes such as 'ridge'"
        )
    return tuple(float(strength) for strength in listed)


def parse_choice(
    options: SweepOptions, data: Data, design: Design, strengths: tuple[float, ...]
) -> tuple[tuple[str, ...], int, Metric | None]:
    """What is chosen within training folds, the number of inner folds (0: nothing is chosen), and the metric to choose by."""
    inner_cv, choose_by = options.inner_cv, options.choose_by
    if options.choose is None and inner_cv is None:
        if choose_by is not None:
            raise InvalidArgumentError(
                f"choose_by={choose_by!r} chooses nothing without inner folds: name what to choose, as choose='layer', "
                "or give inner_cv, such as 5, and strengths"
            )
        return (), 0, None
    if inner_cv is not None and (isinstance(inner_cv, bool) or not isinstance(inner_cv, int | np.integer) or inner_cv < 2):
        raise InvalidArgumentError(f"inner_cv={inner_cv!r} is no number of folds: give a whole number of at least 2")
    if options.choose is None and len(strengths) < 2:
        raise InvalidArgumentError(
            "inner_cv chooses among strengths: give several, such as strengths=(0.01, 1, 100), or name what to choose, as choose='layer'"
        )
    chosen = ("strength",) if options.choose is None else _parse_choose(options.choose, data, strengths)
    if set(chosen) - {"strength"} and any(trial.shuffles for trial in design.trials):
        raise InvalidArgumentError(
            f"choose={options.choose!r:.60} and labels that are shuffled many times: only choose='strength' goes with "
            "them; controls='shuffled_labels' with seeds=100 shuffles once per seed, and chooses for each"
        )
    metric = design.metrics[0] if choose_by is None else parse_metrics(choose_by, options.task, data.n_classes)[0]
    _check_probabilities(design.trials, (metric,), options.task, design.preprocessing)
    return chosen, 5 if inner_cv is None else int(inner_cv), metric


def _parse_choose(given: Any, data: Data, strengths: tuple[float, ...]) -> tuple[str, ...]:
    """Names of dims, in the order in which ties are broken: the first entry of the first dim."""
    several = isinstance(given, Iterable) and not isinstance(given, str | Mapping)
    listed = list(given) if several else [given]
    if not all(isinstance(name, str) for name in listed):
        raise InvalidTypeError(f"choose={given!r:.60} names no dimension: give 'layer', or several, as ['layer', 'probe']")
    possible = {"variable": data.dataset is not None, "layer": True, "probe": True, "strength": bool(strengths)}
    names = ", ".join(repr(name) for name, there in possible.items() if there)
    if not listed or len(set(listed)) < len(listed):
        wrong = "a dimension twice" if listed else "nothing"
        raise InvalidArgumentError(f"choose={given!r:.60} names {wrong}: use some of {names}, or None")
    for name in listed:
        if possible.get(name):
            continue
        why = ""
        if name == "variable":
            why = "; 'variable' is chosen where a dataset of several is given"
        elif name in ("strength", "strengths", "C", "alpha"):
            why = "; 'strength' is chosen where strengths are given, such as strengths=(0.01, 1, 100)"
        raise InvalidArgumentError(f"choose={name!r} cannot be chosen within training folds: use some of {names}{why}")
    return tuple(name for name in possible if name in listed)


def _preprocessing(spec: Any) -> str | None:
    steps = parse_preprocessing(spec)
    return "+".join(map(str, steps)) or None


def _check_probabilities(trials: tuple[Trial, ...], metrics: tuple[Metric, ...], task: str, preprocessing: str | None) -> None:
    needing = [metric.name for metric in metrics if metric.needs == "probabilities"]
    without = [trial.name for trial in trials if not hasattr(make_estimator(trial, 0, task, preprocessing=preprocessing), "predict_proba")]
    if needing and without:
        raise InvalidArgumentError(
            f"metric {needing[0]!r} needs probabilities, and probe {without[0]!r} has no predict_proba: leave one of the two out, "
            "or use 'logistic_regression'"
        )
