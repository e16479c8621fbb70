"""What is reported of a sweep that chose: in each fold the scores of what its inner folds scored best. Never fits.

Every score of all that could be chosen is in one dataset, together with the score over inner folds, which saw only training prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import xarray as xr

from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.probes import FitPlan
from lmprobe_zarr.probes.controls import Trial
from lmprobe_zarr.typing import Array

__all__ = ["CHOSEN", "check_names", "choose_scores", "list_entries"]

#: The entry along ``probe`` where a probe is chosen.
CHOSEN: Final = "chosen"
_DIMS: Final = ("variable", "layer", "probe")
_CONCAT: Final[Any] = xr.Variable.concat
#: What stands where nothing could be chosen, by kind of dtype.
_NOTHING: Final[Mapping[str, Any]] = {"f": np.nan, "b": True, "i": -1}


def list_entries(fits: FitPlan) -> list[tuple[str, list[int]]]:
    """The entries along ``probe`` of the result, each with the places of the trials that it is chosen from."""
    if "probe" not in fits.choose:
        return [(trial.name, [place]) for place, trial in enumerate(fits.trials)]
    found: dict[str, list[int]] = {}
    for place, trial in enumerate(fits.trials):
        # Probes on shuffled labels are chosen as the probes themselves are, so that they say what the choice alone gains.
        name = f"{trial.control}:{CHOSEN}" if trial.shuffled else trial.name if trial.control else CHOSEN
        found.setdefault(name, []).append(place)
    return list(found.items())


def check_names(fits: FitPlan) -> None:
    """Raise where a control has the name of what is chosen."""
    if "probe" in fits.choose and CHOSEN in [trial.name for trial in fits.trials if trial.control]:
        raise InvalidArgumentError(f"a control is called {CHOSEN!r}, as the chosen probe is: give it another name")


def choose_scores(data: xr.Dataset, fits: FitPlan) -> xr.Dataset:
    """The scores of what is chosen in each fold, with ``chosen_<dim>`` for each dim that is gone.

    Parameters
    ----------
    data : Dataset
        The scores of all that can be chosen, with ``inner_score``.
    fits : FitPlan

    Returns
    -------
    Dataset
        Without the chosen dims; ``probe`` stays, with a single entry for all probes where one is chosen.
    """
    gone = tuple(dim for dim in _DIMS if dim in fits.choose and dim in data.dims)
    if not gone:
        return data
    listed = list_entries(fits)
    entries = [_choose(data, fits, gone, places) for _, places in listed]
    first = [places[0] for _, places in listed]
    rest = {name: held for name, held in data.data_vars.items() if not set(held.dims) & {*gone, "probe"}}
    found = xr.Dataset(rest, attrs=data.attrs)
    for name, variable in entries[0].items():
        source = data.data_vars.get(name)
        order = [dim for dim in (data["inner_score"] if source is None else source).dims if dim not in gone or dim == "probe"]
        joined = _CONCAT([entry[name] for entry in entries], "probe").transpose(*order)
        joined.attrs = variable.attrs if source is None else source.attrs
        found[name] = joined
    coords = {name: held for name, held in data.coords.items() if not set(held.dims) & {*gone, "probe"}}
    coords |= {name: data[name].variable[first] for name in ("kind", "control")}
    return found.assign_coords({**coords, "probe": np.array([name for name, _ in listed])})


def _choose(data: xr.Dataset, fits: FitPlan, gone: tuple[str, ...], places: list[int]) -> dict[str, xr.Variable]:
    """Every variable over ``probe`` for one entry of the result, without the chosen dims."""
    lead = gone if "probe" in gone else (*gone, "probe")
    some = {str(name): held.variable.isel(probe=places) for name, held in data.data_vars.items() if "probe" in held.dims}
    flat = {name: _stack(held, lead) for name, held in some.items()}
    best = _best(fits, flat["inner_score"], fits.trials[places[0]])
    found = {}
    for name, held in flat.items():
        at = best if "prompt" not in held.dims else _by_prompt(data, best, shuffled=fits.trials[places[0]].shuffled)
        picked: Any = held.isel(candidate=_from_zero(at))
        found[name] = picked if name == "undefined" else picked.where(at >= 0, _NOTHING[held.dtype.kind]).astype(held.dtype)
    sizes = [some["inner_score"].sizes[dim] for dim in lead]
    numbers = {dim: np.asarray(at) for dim, at in zip(lead, np.unravel_index(_from_zero(best).values, sizes), strict=True)}
    for dim in gone:
        there = (best >= 0) & _has(fits, dim, fits.trials[places[0]], best, numbers)
        labels = data[dim].values[places] if dim == "probe" else data[dim].values
        values = _label(labels, numbers[dim], there.values)
        found[f"chosen_{dim}"] = xr.Variable(best.dims, values, {"long_name": f"{dim} that inner folds of the training prompts chose"})
    return {name: held.set_dims(("probe", *held.dims)) for name, held in found.items()}


def _stack(variable: xr.Variable, dims: tuple[str, ...]) -> xr.Variable:
    """The variable with the dims made one, ``candidate``, which is the last."""
    rest = [dim for dim in variable.dims if dim not in dims]
    values = variable.transpose(*rest, *dims).values
    return xr.Variable((*rest, "candidate"), values.reshape(*(variable.sizes[dim] for dim in rest), -1))


def _from_zero(places: xr.Variable) -> xr.Variable:
    """Places to index with: 0 for −1."""
    return xr.Variable(places.dims, np.maximum(places.values, 0))


def _best(fits: FitPlan, inner: xr.Variable, trial: Trial) -> xr.Variable:
    """The number of the candidate with the best inner score, −1 where none has any; of equal ones the first."""
    if not fits.is_candidate(trial) or fits.choose_by is None:
        # The same score wherever it stands: there is nothing to choose.
        return xr.Variable(inner.dims[:-1], np.zeros(inner.shape[:-1], int))
    scores = inner.values if fits.choose_by.larger_is_better else -inner.values
    best = np.where(np.isnan(scores), -np.inf, scores).argmax(axis=-1)
    return xr.Variable(inner.dims[:-1], np.where(np.isnan(scores).all(axis=-1), -1, best))


def _by_prompt(data: xr.Dataset, best: xr.Variable, *, shuffled: bool) -> xr.Variable:
    """What was chosen in the fold that tests each prompt."""
    test = data["dealt_fold" if shuffled else "test_fold"].variable
    found: xr.Variable = best.isel(fold=_from_zero(test))
    return found


def _has(fits: FitPlan, dim: str, trial: Trial, best: xr.Variable, numbers: Mapping[str, Array]) -> Any:
    """Whether what was chosen has a label along a dim: controls without a layer, and variables without layers, have none."""
    if dim == "probe" or trial.constant:
        return dim == "probe"
    if dim == "variable" or not trial.by_layer:
        return dim == "variable"
    layered = np.array([source.layers != (-1,) for source in fits.variables])
    if "variable" in numbers:
        return xr.Variable(best.dims, layered[numbers["variable"]])
    return xr.Variable("variable", layered) if "variable" in best.dims else bool(layered[0])


def _label(labels: Array, numbers: Array, there: Array) -> Array:
    """The labels of places; NaN, or an empty text, where there is none."""
    found = labels[numbers]
    if there.all():
        return found
    if labels.dtype.kind in "iuf":
        return np.where(there, found.astype(np.float64), np.nan)
    return np.where(there, found.astype(object), "").astype(str)
