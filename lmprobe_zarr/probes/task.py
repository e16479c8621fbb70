"""Records that a fit is told and gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import xarray as xr

from lmprobe_zarr.probes.controls import Trial
from lmprobe_zarr.probes.folds import Fold
from lmprobe_zarr.probes.labels import Labels
from lmprobe_zarr.probes.metrics import Metric, Outcome
from lmprobe_zarr.typing import Array

__all__ = ["Fit", "FitPlan", "FitTask", "FitVariable", "NotFiniteError"]


@dataclass(frozen=True, slots=True)
class FitVariable:
    """One variable of activations.

    Parameters
    ----------
    name : str
        Empty where there is no other.
    layers : tuple of int
        Places of its layers among those of the plan; −1 where it has none, and so stands for all.
    activations : Variable, optional
        The whole lazy variable, dims (layer, prompt, hidden) in any order, perhaps without layer; None where tasks are handed values.
    """

    name: str
    layers: tuple[int, ...]
    activations: xr.Variable | None


@dataclass(frozen=True, slots=True)
class FitPlan:
    """What all tasks share; shipped once to each worker."""

    variables: tuple[FitVariable, ...]
    #: What trials that know no layer are fitted on.
    features: Mapping[str, Any]
    labels: tuple[Labels, ...]
    #: The shuffled values of each set of labels, by seed; empty where no trial shuffles.
    shuffled: tuple[tuple[Array, ...], ...]
    folds: tuple[Fold, ...]
    #: Rows of an equal number stay on one side, of inner folds too.
    kept: Array
    layers: tuple[str, ...]
    trials: tuple[Trial, ...]
    metrics: tuple[Metric, ...]
    seeds: tuple[int, ...]
    strengths: tuple[float, ...]
    #: Folds within a training fold by which a strength is chosen, and by what; 0 where none is chosen.
    inner: int
    choose_by: Metric | None
    preprocessing: str | None
    task: str
    predictions: bool


@dataclass(frozen=True, slots=True)
class FitTask:
    """Trials to fit on one layer of one variable.

    Parameters
    ----------
    variable : int
        −1 for what knows no layer.
    layer : int
        Its place among the layers of its variable.
    trials : tuple of int
    """

    variable: int
    layer: int
    trials: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Fit:
    """The scores of one fit, given by its place in the plan; −1 stands for every place of that axis.

    ``reasons`` are bits of :mod:`~lmprobe_zarr.probes.metrics`; ``strength`` is the chosen one, NaN where none was chosen.
    """

    at: tuple[int, int, int, int, int, int, int]  # variable, layer, trial, fold, seed, strength, labels
    values: tuple[float, ...]
    reasons: int
    seconds: float
    converged: bool
    strength: float
    outcome: Outcome | None


class NotFiniteError(Exception):
    """NaN or infinity in some rows of a layer. Never reaches the caller: it becomes an error that names layer and prompts."""

    def __init__(self, layer: int, rows: list[int], variable: int = 0, trial: int = 0) -> None:
        super().__init__(layer, rows, variable, trial)
        self.layer, self.rows, self.variable, self.trial = layer, rows, variable, trial
