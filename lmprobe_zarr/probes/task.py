"""Records of fits: the plan that all tasks share, one task, and the scores of one fit. Nothing here computes.

A plan is shipped once to every worker; tasks and fits name its variables, layers, trials, folds, seeds, strengths and labels by number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import xarray as xr

from lmprobe_zarr.probes.controls import Shuffle, Trial
from lmprobe_zarr.probes.folds import Fold
from lmprobe_zarr.probes.labels import Labels
from lmprobe_zarr.probes.metrics import Metric, Outcome
from lmprobe_zarr.typing import Array

__all__ = ["Fit", "FitPlan", "FitTask", "FitVariable", "NotFiniteError"]


@dataclass(frozen=True, slots=True)
class FitVariable:
    """One variable of activations that is fitted on.

    Parameters
    ----------
    name : str
        Empty where the plan has a single variable.
    layers : tuple of int
        Places of its layers among those of the plan; ``(-1,)`` for a variable without layers, whose scores apply to every layer.
    activations : Variable, optional
        The whole lazy variable, dims (layer, prompt, hidden) in any order, perhaps without layer; None where the caller passes each task
        its values.
    """

    name: str
    layers: tuple[int, ...]
    activations: xr.Variable | None


@dataclass(frozen=True, slots=True)
class FitPlan:
    """What all tasks share."""

    variables: tuple[FitVariable, ...]
    #: By name, what trials are fitted on that do not depend on a layer; see `Trial.features`.
    features: Mapping[str, Any]
    labels: tuple[Labels, ...]
    #: For each set of labels and each seed its shuffles, at least one; empty where no trial shuffles labels.
    shuffled: tuple[tuple[tuple[Shuffle, ...], ...], ...]
    folds: tuple[Fold, ...]
    #: Shape (prompt,). Rows with the same number stay on one side of every fold, inner folds included.
    kept: Array
    layers: tuple[str, ...]
    trials: tuple[Trial, ...]
    metrics: tuple[Metric, ...]
    seeds: tuple[int, ...]
    strengths: tuple[float, ...]
    #: What is chosen within each training fold: some of "variable", "layer", "probe" and "strength".
    choose: tuple[str, ...]
    #: The number of inner folds; 0 where nothing is chosen.
    inner: int
    #: For each set of labels and each fold its inner folds; empty where nothing is chosen.
    within: tuple[tuple[tuple[Fold, ...], ...], ...]
    #: The metric that is chosen by.
    choose_by: Metric | None
    #: The seed of inner folds.
    random_state: int
    #: Whether the caller gave groups.
    grouped: bool
    preprocessing: str | None
    task: str
    predictions: bool
    #: "scikit-learn", or "batched" for fits of a layer that are solved together, and the device for these.
    solver: str = "scikit-learn"
    device: str = "cpu"

    def chooses_strength(self, trial: Trial) -> bool:
        """Whether one of the strengths is chosen for a trial, within its task."""
        return "strength" in self.choose and trial.penalised and bool(self.strengths)

    @property
    def chooses_among_scores(self) -> bool:
        """Whether scores of several tasks or trials are compared to choose; a strength is chosen within its task."""
        return bool(set(self.choose) - {"strength"})

    def is_candidate(self, trial: Trial) -> bool:
        """Whether a trial needs a score of inner folds, because it, its layer or its variable may be chosen."""
        if trial.constant:
            return False
        if not trial.by_layer:
            return "variable" in self.choose
        return bool({"variable", "layer"} & set(self.choose)) or ("probe" in self.choose and (not trial.control or trial.shuffled))

    @property
    def shuffles(self) -> int:
        """How many times labels are shuffled for a p-value; 0 where none is wanted."""
        return max(trial.shuffles for trial in self.trials)


@dataclass(frozen=True, slots=True)
class FitTask:
    """Trials to fit on one layer of one variable.

    Parameters
    ----------
    variable : int
        Its place in the plan; −1 for trials that are fitted on no activations.
    layer : int
        Its place among the layers of its variable.
    trials : tuple of int
        Their places in the plan.
    """

    variable: int
    layer: int
    trials: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Fit:
    """The scores of one fit.

    Parameters
    ----------
    at : tuple of int
        Its places in the plan: variable, layer, trial, fold, seed, strength and labels. −1 where the score applies to every place of
        that axis.
    values : tuple of float
        One score per metric; NaN where it is undefined.
    reasons : int
        Why scores are NaN, as bits; see :func:`~lmprobe_zarr.probes.metrics.undefined_reasons`.
    seconds : float
        Duration of the fit.
    converged : bool
    strength : float
        The chosen regularisation strength; NaN where none was chosen.
    outcome : Outcome, optional
        Predictions of the test prompts, where the plan asks for them.
    problem : str
        The error that the fit ended in; empty if it did not.
    inner : float
        The mean score over the inner folds of the training prompts; NaN where nothing is chosen.
    shuffled : ndarray of float64, shape (metric, shuffle), optional
        Of labels that are shuffled many times: the score of each shuffle, as a mean over the folds. Held by the first fold.
    """

    at: tuple[int, int, int, int, int, int, int]
    values: tuple[float, ...]
    reasons: int
    seconds: float
    converged: bool
    strength: float
    outcome: Outcome | None
    problem: str = ""
    inner: float = math.nan
    shuffled: Array | None = None


class NotFiniteError(Exception):
    """NaN or infinity in some rows of a layer. Internal: the sweep turns it into an error that names the layer and the prompts."""

    def __init__(self, layer: int, rows: list[int], variable: int = 0, trial: int = 0) -> None:
        super().__init__(layer, rows, variable, trial)
        self.layer, self.rows, self.variable, self.trial = layer, rows, variable, trial
