"""The direction that a linear probe learns in each layer, in the units of the activations: for steering, and to compare with others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from lmprobe_zarr.display import describe_error
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.interchange import to_interchange
from lmprobe_zarr.probes import (
    Labels,
    as_fit_dtype,
    check_task,
    coefficients,
    converged,
    describe_unfit,
    fit_apart,
    fits_running,
    group_codes,
    has_strength,
    list_prompts,
    make_pipeline_for,
    make_probe,
    not_finite_rows,
    parse_groups,
    parse_label_sets,
    read_layer,
)
from lmprobe_zarr.sweeps.given import (
    check_activations,
    check_seed,
    check_several,
    describe_failed_layers,
    layers_of,
    warn_failed_layers,
    warn_unconverged,
)
from lmprobe_zarr.tasks import parse_runner
from lmprobe_zarr.tokens import find_inner_dim, inner_dim
from lmprobe_zarr.typing import Array

__all__ = ["cosine_similarity", "fit_directions"]


def fit_directions(
    activations: xr.DataArray,
    labels: Any,
    probe: Any = "logistic_regression",
    *,
    task: str = "classification",
    preprocessing: str | None = None,
    strength: float | None = None,
    groups: Any = None,
    missing: str = "raise",
    random_state: int = 0,
    n_workers: int | None = None,
) -> xr.Dataset:
    """Coefficients of one linear probe per layer, fitted on all prompts that have a label.

    Scaling and projections are undone: ``(activations * coef).sum("hidden") + intercept`` is the decision function on raw activations (of
    a regression: the prediction). So ``coef`` points where the score rises fastest, and is what one adds to a layer's output to steer the
    model. Its length is in units of the score per unit of activation.

    Parameters
    ----------
    activations : DataArray of float, dims (layer, prompt, hidden) in any order, or without layer
        Instead of ``hidden`` any inner dimension, such as ``neurons_unit``, which the coefficients then have.
    labels : str, DataArray, mapping or array
        One set, as for :func:`lmprobe_zarr.sweep`.
    probe : str or scikit-learn estimator
        A linear one.
    task, preprocessing, missing, random_state
        As for :func:`lmprobe_zarr.sweep`.
    strength : float, optional
        Regularisation strength of a named probe, larger being stronger.
    groups : str, DataArray, mapping or array, optional
        Kept together in the folds within which a probe such as "logistic_regression_cv" chooses; without groups, repeated prompts are.
    n_workers : int, optional
        Threads; by default one per core.

    Returns
    -------
    Dataset of float64
        ``coef`` with dims (layer, hidden) for two classes, pointing to the second, and for a regression; with more classes (layer, class,
        hidden). ``intercept`` has the same dims without hidden; ``converged`` (layer); ``mean_norm`` (layer), the mean norm of the rows
        that were fitted, in the units of the activations.

    Raises
    ------
    InvalidTypeError, InvalidArgumentError, LabelError
        As for :func:`lmprobe_zarr.sweep`, or the probe is not linear, or the fit of every layer ended in an error.

    Warns
    -----
    ConvergenceWarning, FitFailedWarning
        As :func:`lmprobe_zarr.sweep`. Layers whose fit ended in an error are NaN, and the attribute ``nan_reasons`` of ``coef`` says why.
    """
    if not isinstance(activations, xr.DataArray):
        raise InvalidTypeError(f"activations are one xarray.DataArray, not {type(activations).__name__}: give ds[name]")
    array = check_activations(activations)
    runner = parse_runner(n_workers=n_workers)
    seed = check_seed(random_state)
    sets = parse_label_sets(array, labels, task=check_task(task), missing=missing)
    only = check_several(sets)
    name = "ridge_regression" if task == "regression" and isinstance(probe, str) and probe == "logistic_regression" else probe
    number = isinstance(strength, int | float | np.integer | np.floating) and not isinstance(strength, bool)
    if strength is not None and not (number and has_strength(name) and 0 < strength < np.inf):
        raise InvalidArgumentError(
            f"strength={strength!r} of {name!r}: give a positive number, and a named probe that has one, such as 'ridge'"
        )
    make = partial(_make, name, seed, task, preprocessing, strength)
    make()
    prompts = list_prompts(array)
    kept = group_codes(prompts, None if groups is None else parse_groups(array, groups, only.rows).codes)
    fit = partial(_fit_layer, make, name, only, kept, seed, task)
    layers = layers_of(array) or [0]
    variable = array.variable
    lazy = variable.chunks is None and not variable._in_memory

    def start(place: int) -> Any:
        values = None if lazy else variable.isel(layer=place, missing_dims="ignore").transpose("prompt", ...).data
        return runner.call(fit, variable if lazy else None, place, values)

    found = runner.run([partial(start, place) for place in range(len(layers))], "fit")
    for place, fitted in enumerate(found):
        if isinstance(fitted, list):
            raise InvalidArgumentError(describe_unfit(array, place if "layer" in array.dims else None, fitted, len(only.rows)))
    failed = {layers[place]: fitted for place, fitted in enumerate(found) if isinstance(fitted, str)}
    if len(failed) == len(layers):
        layer, problem = next(iter(failed.items()))
        raise InvalidArgumentError(f"{probe!r} cannot be fitted on the {len(only.rows)} prompts of layer {layer}: {problem}")
    data = _dataset(array, only, task, repr(make()), layers, found)
    warn_failed_layers(probe, failed, len(layers))
    warn_unconverged(data, "give an estimator with a larger max_iter, or standardise")
    return data


def _make(probe: Any, seed: int, task: str, preprocessing: str | None, strength: float | None) -> Any:
    if preprocessing is None:
        return make_probe(probe, seed, task=task, strength=strength)
    return make_pipeline_for(probe, task=task, preprocessing=preprocessing, random_state=seed, strength=strength)


def _fit_layer(
    make: Callable[[], Any],
    probe: Any,
    labels: Labels,
    kept: Array,
    seed: int,
    task: str,
    whole: xr.Variable | None,
    layer: int,
    values: Any,
) -> Any:
    """Coefficients, intercept, whether the fit converged, and the mean norm; or the rows that are NaN or infinite; or the error."""
    import sklearn

    matrix = as_fit_dtype(values if whole is None else read_layer(whole, layer))
    bad = not_finite_rows(matrix, labels.rows)
    if bad:
        return bad
    with fits_running(), sklearn.config_context(assume_finite=True):
        rows = labels.rows
        try:
            estimator = fit_apart(make(), probe, matrix[rows], labels.values[rows], kept[rows], seed, task=task)
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001  (whatever the caller's own estimators raise)
            return describe_error(error)
    coef, intercept = coefficients(estimator)
    norm = float(np.linalg.norm(matrix[rows].astype(np.float64), axis=1).mean())
    return coef[:, 0], intercept, converged(estimator), norm


def _dataset(array: xr.DataArray, labels: Labels, task: str, estimator: str, layers: list[Any], found: Any) -> xr.Dataset:
    failed = {layer: fitted for layer, fitted in zip(layers, found, strict=True) if isinstance(fitted, str)}
    shown = next(fitted for fitted in found if not isinstance(fitted, str))
    nothing = np.full_like(shown[0], np.nan), np.full_like(shown[1], np.nan), True, np.nan
    found = [nothing if isinstance(fitted, str) else fitted for fitted in found]
    coef, intercept = (np.stack([fitted[place] for fitted in found]) for place in (0, 1))
    two = coef.shape[1] == 1
    inner = inner_dim(array)
    dims = ("layer", inner) if two else ("layer", "class", inner)
    data = xr.Dataset(
        {
            "coef": (dims, coef[:, 0] if two else coef, {"long_name": "coefficients, in the units of the activations"}),
            "intercept": (dims[:-1], intercept[:, 0] if two else intercept),
            "converged": ("layer", np.array([fitted[2] for fitted in found])),
            "mean_norm": ("layer", np.array([fitted[3] for fitted in found]), {"long_name": "mean norm of the activations"}),
        },
        coords={"layer": layers, **({} if two or labels.classes is None else {"class": labels.classes})},
    )
    data.attrs = {
        "labels": labels.name,
        "task": task,
        "estimator": " ".join(estimator.split()),
        "n_prompts": len(labels.rows),
        "variable": "" if array.name is None else str(array.name),
        **({} if labels.classes is None else {"classes": labels.classes.tolist()}),
    }
    if failed:
        data["coef"].attrs["nan_reasons"] = data["intercept"].attrs["nan_reasons"] = describe_failed_layers(failed)
    if "model" in array.coords and array.coords["model"].ndim == 0:
        data = data.assign_coords(model=str(array.coords["model"].item()))
    return to_interchange(data)


def cosine_similarity(directions: Mapping[str, xr.DataArray | xr.Dataset] | xr.DataArray | xr.Dataset) -> xr.DataArray:
    """The cosine of the angle between every two directions, −1 to 1, as a labelled matrix.

    Parameters
    ----------
    directions : {name: DataArray or Dataset}, DataArray or Dataset
        Coefficients with dims (layer, hidden), or (hidden) for a single one, or a dataset with them as ``coef``, as from
        :func:`lmprobe_zarr.fit_tokens`; each place along further dims, such as ``class``, is a direction of its own. The names say
        which dataset or model.

    Returns
    -------
    DataArray of float64
        Dims (direction, other), both with the same labels in the same order; along ``direction`` the coordinates ``name`` and ``layer``,
        where there are layers, and along ``other`` the same with the prefix ``other_``. NaN where hidden sizes differ or a direction has
        length 0.

    Raises
    ------
    InvalidTypeError, InvalidArgumentError
        A value without coefficients, or an empty mapping.
    """
    given = {"": directions} if isinstance(directions, xr.DataArray | xr.Dataset) else directions
    if not isinstance(given, Mapping):
        raise InvalidTypeError(f"directions are a mapping from name to coefficients, not {type(directions).__name__}")
    rows: list[tuple[str, Any, str, Array]] = []
    for name, held in given.items():
        coef = held["coef"] if isinstance(held, xr.Dataset) and "coef" in held else held
        inner = find_inner_dim(coef.dims) if isinstance(coef, xr.DataArray) else None
        if not isinstance(coef, xr.DataArray) or inner is None:
            raise InvalidTypeError(
                f"directions[{name!r}] has no coefficients over hidden, or over another inner dimension: give fit_tokens(…).coef"
            )
        coef = coef.transpose(..., inner)
        rest = [str(dim) for dim in coef.dims if dim != inner]
        layered = "layer" in coef.coords
        many = coef.sizes.get("layer", 1) > 1
        for place in np.ndindex(*(coef.sizes[dim] for dim in rest)):
            single = coef.isel(dict(zip(rest, place, strict=True)))
            layer = single.coords["layer"].item() if layered else None
            words = [str(name)] if str(name) else []
            words += [f"layer {layer}"] if layered and (many or not words) else []
            words += [
                str(single.coords[dim].item() if dim in single.coords else at)
                for dim, at in zip(rest, place, strict=True)
                if dim != "layer"
            ]
            rows.append((str(name), layer, " ".join(words) or "direction", np.asarray(single.values, np.float64)))
    if not rows:
        raise InvalidArgumentError("directions is empty: give at least one")
    found = np.full((len(rows), len(rows)), np.nan)
    for size in {len(vector) for *_, vector in rows}:
        members = [number for number, (*_, vector) in enumerate(rows) if len(vector) == size]
        vectors = np.stack([rows[number][3] for number in members])
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        with np.errstate(invalid="ignore", divide="ignore"):
            units = vectors / np.where(lengths > 0, lengths, np.nan)
        found[np.ix_(members, members)] = np.clip(units @ units.T, -1, 1)
    labels = [label for _, _, label, _ in rows]
    coords: dict[str, Any] = {"direction": labels, "other": labels}
    for prefix, dim in (("", "direction"), ("other_", "other")):
        coords[f"{prefix}name"] = (dim, [name for name, *_ in rows])
        if all(layer is not None for _, layer, *_ in rows):
            coords[f"{prefix}layer"] = (dim, [layer for _, layer, *_ in rows])
    attrs = {"long_name": "cosine similarity", "units": "1"}
    return to_interchange(xr.DataArray(found, dims=("direction", "other"), coords=coords, name="cosine", attrs=attrs))
