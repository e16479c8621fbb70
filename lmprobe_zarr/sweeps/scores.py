"""`Scores`, the table of fits: entered in whatever order they come, it becomes one labelled dataset. Never fits, schedulers or storage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import xarray as xr

from lmprobe_zarr.interchange import to_interchange
from lmprobe_zarr.probes import Fit, FitTask, number_repeats
from lmprobe_zarr.probes.metrics import FAILED, undefined_reasons
from lmprobe_zarr.sweeps.choice import choose_scores, list_entries
from lmprobe_zarr.sweeps.plan import Sweep
from lmprobe_zarr.sweeps.shuffles import add_p_values, shuffled_attributes, shuffled_name
from lmprobe_zarr.typing import Array

__all__ = ["Scores"]

#: Dims of every measure, in this order; the dataset leaves out those that the sweep does not vary.
_AXES: Final = ("variable", "layer", "probe", "fold", "seed", "strength", "label")
#: Dims of scores of many shuffles, which are means over the folds.
_PER_SHUFFLE: Final = ("variable", "layer", "probe", "seed", "strength", "label", "shuffle")
#: Dims of predictions. There is no fold: a prompt's prediction comes from the fold that tests it.
_PER_PROMPT: Final = ("variable", "layer", "probe", "repetition", "seed", "strength", "label", "prompt")


@dataclass(frozen=True, slots=True)
class _Column:
    dims: tuple[str, ...]
    values: Array
    attrs: Mapping[str, Any]


class Scores:
    """The table that fits are entered into.

    Parameters
    ----------
    sweep : Sweep
    """

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        fits = sweep.fits
        self._repeats = number_repeats(fits.folds)
        rows = fits.labels[0].rows
        self._place = np.full(int(rows.max()) + 1, -1)
        self._place[rows] = np.arange(len(rows))
        self._sizes = {
            "variable": len(fits.variables), "layer": len(fits.layers), "probe": len(fits.trials), "fold": len(fits.folds),
            "seed": len(fits.seeds), "strength": 1 if "strength" in fits.choose else max(1, len(fits.strengths)), "label": len(fits.labels),
            "repetition": int(self._repeats[-1]) + 1, "prompt": len(rows), "shuffle": fits.shuffles,
            "class": max((len(each.classes) for each in fits.labels if each.classes is not None), default=0),
        }  # fmt: skip
        self._columns = dict(self._make_columns())
        #: By the name of a probe, the errors that its fits ended in, each with the layer of the first.
        self._problems: dict[str, dict[str, str]] = {}
        self._entered = np.zeros((len(fits.variables), len(fits.layers), len(fits.trials)), dtype=bool)
        # Layers that a variable does not have count as entered, and so do controls on its layer 0 where it has none: their scores stay NaN.
        for place, source in enumerate(fits.variables):
            if source.layers != (-1,):
                self._entered[place, [layer for layer in range(len(fits.layers)) if layer not in source.layers]] = True
            if "0" not in [fits.layers[layer] for layer in source.layers if layer >= 0]:
                self._entered[place, :, [number for number, trial in enumerate(fits.trials) if not (trial.by_layer or trial.constant)]] = (
                    True
                )
        self._columns["converged"].values[self._entered] = True

    def _make_columns(self) -> Iterator[tuple[str, _Column]]:
        fits = self._sweep.fits
        for metric in fits.metrics:
            yield metric.name, self._column(_AXES, np.nan, {"long_name": metric.long_name, "units": metric.units})
        yield "fit_seconds", self._column(_AXES, np.nan, {"long_name": "wall time of the fit", "units": "s"})
        yield "converged", self._column(_AXES, False, {"long_name": "fit ended before its iteration limit"})
        yield "undefined", self._column(_AXES, np.uint8(0), {"long_name": "reasons why measures are NaN, as bits"})
        if "strength" in fits.choose:
            yield "chosen_strength", self._column(_AXES, np.nan, {"long_name": "regularisation strength chosen by inner folds"})
        if fits.choose_by is not None:
            yield "inner_score", self._column(_AXES, np.nan, {"long_name": f"mean {fits.choose_by.long_name} of inner folds, to choose by"})
        for metric in fits.metrics if fits.shuffles else ():
            attrs = shuffled_attributes(metric.long_name, fits.shuffles, larger_is_better=metric.larger_is_better)
            yield shuffled_name(metric.name), self._column(_PER_SHUFFLE, np.nan, attrs)
        if not fits.predictions:
            return
        what = "prediction by the fold that tests the prompt"
        if fits.task == "regression":
            yield "predicted", self._column(_PER_PROMPT, np.nan, {"long_name": what})
            return
        yield "predicted", self._column(_PER_PROMPT, np.int16(-1), {"long_name": f"{what}, as the number of its class"})
        by_class = self._sizes["class"] > 2
        dims = (*_PER_PROMPT, "class") if by_class else _PER_PROMPT
        yield "score", self._column(dims, np.nan, {"long_name": "what prompts are ranked by"})
        whose = "each class" if by_class else "the second class"
        yield "probability", self._column(dims, np.nan, {"long_name": f"probability of {whose}"})

    def _column(self, dims: tuple[str, ...], fill: Any, attrs: Mapping[str, Any]) -> _Column:
        return _Column(dims, np.full([self._sizes[dim] for dim in dims], fill), attrs)

    # ------------------------------------------------------------------------------------------------------------ entering

    def enter(self, task: FitTask, fits: Iterable[Fit]) -> None:
        """Enter every fit of a task."""
        for fit in fits:
            self._enter_fit(fit)
        for trial in task.trials:
            self._entered[self._where(task, trial)] = True

    def _where(self, task: FitTask, trial: int) -> tuple[Any, ...]:
        plan = self._sweep.fits
        source = slice(None) if task.variable < 0 else task.variable
        place = -1 if task.variable < 0 or not plan.trials[trial].by_layer else plan.variables[task.variable].layers[task.layer]
        return source, slice(None) if place < 0 else place, trial

    def _enter_fit(self, fit: Fit) -> None:
        at = tuple(slice(None) if place < 0 else place for place in fit.at)
        plan = self._sweep.fits
        for metric, value in zip(plan.metrics, fit.values, strict=True):
            self._put(metric.name, at, value)
        self._put("fit_seconds", at, fit.seconds)
        self._put("converged", at, fit.converged)
        self._put("undefined", at, fit.reasons)
        if "strength" in plan.choose:
            self._put("chosen_strength", at, fit.strength)
        if plan.choose:
            self._put("inner_score", at, fit.inner)
        if fit.problem:
            layer = fit.at[_AXES.index("layer")]
            of_probe = self._problems.setdefault(plan.trials[fit.at[_AXES.index("probe")]].name, {})
            of_probe.setdefault(fit.problem, f"layer {plan.layers[layer]}" if layer >= 0 else "no layer")
        if fit.shuffled is not None:
            # Held by the probe whose score they are compared with.
            name = plan.trials[fit.at[_AXES.index("probe")]].name.partition(":")[2]
            of = next(number for number, trial in enumerate(plan.trials) if trial.name == name)
            where = dict(zip(_AXES, at, strict=True)) | {"probe": of}
            for metric, values in zip(plan.metrics, fit.shuffled, strict=True):
                self._put(shuffled_name(metric.name), (*(where[dim] for dim in _PER_SHUFFLE[:-1]), slice(None)), values)
        if fit.outcome is None:
            return
        fold = fit.at[_AXES.index("fold")]
        place = dict(zip(_AXES, at, strict=True)) | {"repetition": int(self._repeats[fold]), "prompt": self._place[self._tested(fit)]}
        per_prompt = tuple(place[dim] for dim in _PER_PROMPT)
        outcome = fit.outcome
        self._put("predicted", per_prompt, outcome.predicted)
        if plan.task == "regression":
            return
        several = self._sizes["class"] > 2
        if outcome.scores is not None:
            by_class = outcome.scores.ndim == 2 or not several
            self._put("score", per_prompt, outcome.scores if by_class else np.stack([-outcome.scores, outcome.scores], axis=1))
        if outcome.probabilities is not None:
            self._put("probability", per_prompt, outcome.probabilities if several else outcome.probabilities[:, 1])

    def _tested(self, fit: Fit) -> Array:
        plan = self._sweep.fits
        _, _, trial, fold, seed, _, which = fit.at
        folds = plan.shuffled[which][max(seed, 0)][0][1] if plan.trials[trial].shuffled else plan.folds
        return folds[fold][1]

    def _put(self, name: str, at: tuple[Any, ...], value: Any) -> None:
        column = self._columns[name].values
        if isinstance(value, np.ndarray):
            # Assigned to a view that the other indices have selected, so that the axis of the prompts stays the last.
            column = column[at[:-1]]
            if value.ndim == 2:
                value = value[:, : column.shape[-1]]
                column[..., at[-1], : value.shape[1]] = value
            else:
                column[..., at[-1]] = value
            return
        column[at] = value

    # ------------------------------------------------------------------------------------------------------------- layer by layer

    def whole(self) -> list[tuple[int, int]]:
        """Places (variable, layer) of which every fit has been entered."""
        return [(int(source), int(layer)) for source, layer in np.argwhere(self._entered.all(axis=2))]

    def missing(self, task: FitTask) -> bool:
        """Whether a fit of a task has not been entered yet."""
        return not all(self._entered[self._where(task, trial)].all() for trial in task.trials)

    def piece(self, source: int, layer: int) -> dict[str, Array]:
        """Every column of one layer of one variable, with the dims of the dataset; the axes of variable and layer have length 1."""
        return {
            name: self._squeezed(name)[
                (slice(source, source + 1), slice(layer, layer + 1)) if self._has_dim("variable") else slice(layer, layer + 1)
            ]
            for name in self._columns
        }

    def take_piece(self, source: int, layer: int, piece: Mapping[str, Array]) -> None:
        """Enter what `piece` returned before. Scores that do not depend on the layer are in every piece, and are entered for all layers."""
        plan = self._sweep.fits
        for name, column in self._columns.items():
            values = piece[name].reshape(column.values[source : source + 1, layer : layer + 1].shape)[0, 0]
            column.values[source, layer] = values
            for number, trial in enumerate(plan.trials):
                if trial.constant:
                    column.values[:, :, number] = values[number]
                elif not trial.by_layer or plan.variables[source].layers == (-1,):
                    column.values[source, :, number] = values[number]
        self._entered[source, layer] = True
        for number, trial in enumerate(plan.trials):
            if trial.constant:
                self._entered[:, :, number] = True
            elif not trial.by_layer or plan.variables[source].layers == (-1,):
                self._entered[source, :, number] = True

    # ------------------------------------------------------------------------------------------------------------- the dataset

    def _has_dim(self, dim: str) -> bool:
        if dim == "repetition":
            return self._sizes[dim] > 1
        return dim in self._sweep.dims or dim in ("prompt", "class", "shuffle")

    def _squeezed(self, name: str) -> Array:
        column = self._columns[name]
        axes = tuple(axis for axis, dim in enumerate(column.dims) if not self._has_dim(dim))
        return column.values.squeeze(axes)

    def columns(self) -> xr.Dataset:
        """Every column as it is now, with ``undefined``, which says why measures are NaN."""
        plan = self._sweep.fits
        held: dict[str, Any] = {}
        for name, column in self._columns.items():
            held[name] = (tuple(dim for dim in column.dims if self._has_dim(dim)), self._squeezed(name), dict(column.attrs))
        held["n_train"] = ("fold", np.array([len(train) for train, _ in plan.folds]))
        held["n_test"] = ("fold", np.array([len(test) for _, test in plan.folds]))
        if plan.predictions:
            held["test_fold"] = self._test_folds()
        data = xr.Dataset(held, coords=dict(self._sweep.coords), attrs={**self._sweep.attrs})
        data = data.assign_coords({"class": data.attrs["classes"]}) if "class" in data.dims and "classes" in data.attrs else data
        return to_interchange(data)

    def table(self) -> xr.Dataset:
        """Everything entered so far, also what was not chosen; NaN where a fit is missing."""
        return self._shown(self.columns(), [(trial.name, [place]) for place, trial in enumerate(self._sweep.fits.trials)])

    def dataset(self) -> xr.Dataset:
        """The scores as callers see them: those of what was chosen in each fold, or all where nothing is."""
        data = choose_scores(self.columns(), self._sweep.fits)
        if self._sweep.plan.choice:
            for held in (data, *(data[metric.name] for metric in self._sweep.fits.metrics)):
                held.attrs["chosen"] = self._sweep.plan.choice
        return self._shown(data, list_entries(self._sweep.fits))

    def _shown(self, data: xr.Dataset, entries: Sequence[tuple[str, list[int]]]) -> xr.Dataset:
        n_failed = int(((data["undefined"].values & FAILED) == FAILED).sum())
        data = self._with_nan_reasons(data, entries)
        unknown = [name for name in ("score", "probability") if name in data and bool(data[name].isnull().all())]
        data = add_p_values(data.drop_vars(unknown), [metric.name for metric in self._sweep.fits.metrics])
        data.attrs["n_unconverged"] = int((~data["converged"]).sum())
        if n_failed:
            data.attrs["n_failed"] = n_failed
        return to_interchange(data)

    def _n_failed(self) -> int:
        bits = self._columns["undefined"].values
        return int(((bits & FAILED) == FAILED).sum())

    def failures(self) -> str:
        """How many fits ended in an error, and the first error of each probe; empty if none did."""
        if not self._n_failed():
            return ""
        shown = [f"{name} on {where}: {problem}" for name, found in self._problems.items() for problem, where in list(found.items())[:1]]
        what = "scores are NaN because their fits failed"
        what = "fits of what could be chosen failed" if self._sweep.fits.chooses_among_scores else what
        many = f"{self._n_failed()} of {self._columns['undefined'].values.size} {what}"
        return f"{many} ({'; '.join(shown[:3])}{'; …' if len(shown) > 3 else ''})" if shown else many

    def all_failed(self) -> bool:
        """Whether every fit of every probe ended in an error; controls do not count."""
        bits = np.moveaxis(self._columns["undefined"].values, _AXES.index("probe"), 0)
        probes = [number for number, trial in enumerate(self._sweep.fits.trials) if not trial.control]
        return bool(((bits[probes] & FAILED) == FAILED).all())

    def _test_folds(self) -> tuple[tuple[str, ...], Array, dict[str, str]]:
        plan = self._sweep.fits
        values = np.full((self._sizes["repetition"], self._sizes["prompt"]), -1, np.int32)
        for fold, (_, test) in enumerate(plan.folds):
            values[self._repeats[fold], self._place[test]] = fold
        several = self._has_dim("repetition")
        dims = ("repetition", "prompt") if several else ("prompt",)
        return dims, values if several else values[0], {"long_name": "fold that tests the prompt, -1 for none"}

    def _with_nan_reasons(self, data: xr.Dataset, entries: Sequence[tuple[str, list[int]]]) -> xr.Dataset:
        """The dataset, with the reasons why measures are NaN as words instead of bits."""
        bits = data["undefined"].transpose("probe", ...).values
        for metric in self._sweep.fits.metrics:
            reasons: dict[str, list[str]] = {}
            nan = np.isnan(data[metric.name].transpose("probe", ...).values)
            for (name, places), undefined, where in zip(entries, bits, nan, strict=True):
                failed = where & ((undefined & FAILED) == FAILED)
                if failed.any():
                    of = [self._problems.get(self._sweep.fits.trials[place].name, {}) for place in places]
                    problem = next((text for problems in of for text in problems), "")
                    reasons.setdefault("the fit failed" + f" ({problem})" * bool(problem), []).append(str(name))
                where = where & ~failed
                together = int(np.bitwise_or.reduce(undefined[where], axis=None)) if where.any() else 0
                for reason in undefined_reasons(together, metric):
                    reasons.setdefault(reason, []).append(str(name))
            if reasons:
                data[metric.name].attrs["nan_reasons"] = [f"{', '.join(sorted(names))}: {why}" for why, names in sorted(reasons.items())]
        return data.drop_vars("undefined")
