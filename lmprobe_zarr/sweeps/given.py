"""Arguments that sweeps of every kind share, checked in one place."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from lmprobe_zarr.batch import INNER_DIMS
from lmprobe_zarr.display import name_in_messages
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.probes import Labels, make_probe
from lmprobe_zarr.tokens import find_inner_dim, is_ranked, without_absent_layers
from lmprobe_zarr.typing import Array, is_listed

__all__ = [
    "check_activations",
    "check_seed",
    "check_several",
    "describe_failed_layers",
    "is_drawn",
    "layer_labels",
    "layers_of",
    "parse_activations",
    "parse_probes",
    "parse_token_activations",
    "refuse_choice",
    "warn_failed",
    "warn_failed_layers",
    "warn_unconverged",
]

_DIMS = ("layer", "prompt", "hidden")
#: Inner dimensions of what is no activations, and so is left out where a whole dataset is given.
_OUTPUTS = frozenset(INNER_DIMS.values())


def parse_activations(activations: Any, controls: Mapping[str, Any]) -> tuple[xr.Dataset | None, tuple[xr.DataArray, ...]]:
    """The dataset, or None where an array was given, and its variables of activations; no values are read."""
    if isinstance(activations, xr.Dataset):
        held = {str(name): array for name, array in activations.data_vars.items() if _holds_activations(array)}
        if controls.get("embed", ()) is None:
            held = {name: array for name, array in held.items() if name.partition("_")[0] != "embed"}
        if not held:
            listed = ", ".join(f"{name} {array.dims}" for name, array in activations.data_vars.items())
            raise InvalidArgumentError(
                f"the dataset holds no activations over prompt and an inner dimension such as hidden, only {listed or 'nothing'}: "
                "pool tokens first"
            )
        # Layers that a variable lacks stay: other variables may have them, and their scores say that they are not stored.
        return activations, tuple(_checked(array) for array in held.values())
    if not isinstance(activations, xr.DataArray):
        raise InvalidTypeError(
            f"activations are an xarray.DataArray with dims {_DIMS}, or a Dataset of such, not {type(activations).__name__}"
        )
    return None, (check_activations(activations),)


def _holds_activations(array: xr.DataArray) -> bool:
    """Whether a variable has values of several units for each prompt, which are not an output of the model such as its logits."""
    inner = find_inner_dim(array.dims)
    return "prompt" in array.dims and inner not in (None, *_OUTPUTS) and array.dtype.kind not in "OUSmM" and not is_ranked(array)


def check_activations(activations: xr.DataArray) -> xr.DataArray:
    """The array without layers that are nowhere stored, if it holds activations of prompts; nothing is read."""
    return without_absent_layers(_checked(activations))


def _checked(activations: xr.DataArray) -> xr.DataArray:
    dims = tuple(str(dim) for dim in activations.dims)
    inner = find_inner_dim(dims)
    if inner is None or set(dims) not in ({"layer", "prompt", inner}, {"prompt", inner}):
        remedy = "pool the tokens first, as in toks.lz.pool('mean')" if "token" in dims else "select, rename, or stack several into one"
        raise InvalidArgumentError(
            f"{name_in_messages(activations)} has dims {dims}, expected layer (or none), prompt and one inner dimension "
            f"such as hidden: {remedy}"
        )
    _check_values(activations, "to fit")
    _check_layers(activations)
    return activations


def parse_token_activations(activations: Any) -> tuple[xr.DataArray, str]:
    """The array, and the name of its row dimension, ``token`` or ``prompt``; nothing is read."""
    if isinstance(activations, xr.Dataset):
        variables = ", ".join(str(name) for name in activations.data_vars)
        raise InvalidTypeError(f"activations are one variable, not a whole dataset: give toks[name], with one of {variables or 'none'}")
    if not isinstance(activations, xr.DataArray):
        raise InvalidTypeError(f"activations are an xarray.DataArray with dims (layer, token, hidden), not {type(activations).__name__}")
    dims = {str(dim) for dim in activations.dims}
    inner = find_inner_dim(activations.dims)
    for dim in ("token", "prompt"):
        if inner is not None and dims in ({"layer", dim, inner}, {dim, inner}):
            break
    else:
        raise InvalidArgumentError(
            f"{name_in_messages(activations)} has dims {tuple(activations.dims)}, expected layer (or none), token and one inner dimension "
            "such as hidden: select or rename"
        )
    _check_values(activations, "to fit or score")
    _check_layers(activations)
    return without_absent_layers(activations), dim


def _check_values(activations: xr.DataArray, purpose: str) -> None:
    """Raise where an array is empty, or its values are not real numbers."""
    if is_ranked(activations):
        raise InvalidArgumentError(
            f"{name_in_messages(activations)} has other latents in every row, which are no units {purpose}: give lz.pool_latents to "
            "Probe.fit_from_activations"
        )
    empty = [str(dim) for dim in activations.dims if not activations.sizes[dim]]
    if empty:
        raise InvalidArgumentError(f"{name_in_messages(activations)} has no {' and no '.join(empty)}: there is nothing {purpose}")
    # ml_dtypes' bfloat16 has kind "V", as structured types have, but no fields.
    if activations.dtype.kind not in "fiub" and not (activations.dtype.kind == "V" and activations.dtype.names is None):
        raise InvalidTypeError(f"{name_in_messages(activations)} has dtype {activations.dtype}, expected real numbers")


def _check_layers(activations: xr.DataArray) -> None:
    """Raise where layers cannot be told apart by their labels."""
    labels = np.atleast_1d(activations.coords["layer"].values).tolist() if "layer" in activations.coords else []
    if any(label != label for label in labels):
        raise InvalidArgumentError(f"{name_in_messages(activations)} has a layer whose label is NaN: give each layer its number")
    if len(set(labels)) < len(labels):
        raise InvalidArgumentError(f"{name_in_messages(activations)} holds a layer twice: drop one with .drop_duplicates('layer')")


def refuse_choice(choose: Any, instead: str) -> None:
    """Raise where something is to be chosen by a sweep that chooses nothing."""
    if choose is not None:
        raise InvalidArgumentError(f"choose={choose!r:.60}: only lz.sweep chooses within training folds; {instead}")


def layers_of(array: xr.DataArray) -> list[Any] | None:
    """Layers of an array, or None where it has none."""
    if "layer" in array.coords:
        return list(np.atleast_1d(array.coords["layer"].values).tolist())
    return list(range(array.sizes["layer"])) if "layer" in array.dims else None


def layer_labels(array: xr.DataArray) -> Array:
    """Labels of the layers of an array; 0 where it has none."""
    return np.atleast_1d(array.coords["layer"].values) if "layer" in array.coords else np.arange(array.sizes.get("layer", 1))


def check_seed(random_state: Any) -> int:
    """The seed as an int, checked."""
    if isinstance(random_state, bool) or not isinstance(random_state, int | np.integer):
        raise InvalidTypeError(f"random_state={random_state!r} is not a whole number: sweeps are reproducible, give a seed such as 0")
    if not 0 <= random_state < 2**32:
        raise InvalidArgumentError(f"random_state={random_state!r} is out of range: give a seed from 0 to 2**32 - 1")
    return int(random_state)


def is_drawn(cv: Any) -> bool:
    """Whether folds are made from the labels, by a number or a splitter, rather than given."""
    return cv is None or isinstance(cv, int | np.integer) or hasattr(cv, "split")


def parse_probes(probes: Any, task: str, example: str = "logistic_regression") -> dict[str, Any]:
    """Name to probe, in the caller's order; each can be made."""
    if isinstance(probes, Mapping):
        pairs = list(probes.items())
    else:
        listed = [probes] if isinstance(probes, str) or hasattr(probes, "fit") or not is_listed(probes) else list(probes)
        if task == "regression":
            # The default of `sweep` is a classifier.
            listed = ["ridge_regression" if isinstance(probe, str) and probe == "logistic_regression" else probe for probe in listed]
        pairs = [(probe if isinstance(probe, str) else type(probe).__name__, probe) for probe in listed]
    if not pairs:
        raise InvalidArgumentError(f"probes is empty: name at least one, such as {example!r}")
    chosen: dict[str, Any] = {}
    for name, probe in pairs:
        if not isinstance(name, str):
            raise InvalidTypeError(f"a probe is named by a text, not {name!r}")
        if name in chosen:
            raise InvalidArgumentError(f"two probes are called {name!r}: tell them apart with a mapping, {{'name': estimator, …}}")
        make_probe(probe, task=task)
        chosen[name] = probe
    return chosen


def check_several(sets: Sequence[Labels]) -> Labels:
    """The only set of labels, for calls that learn a single one."""
    if len(sets) > 1:
        raise InvalidArgumentError("several sets of labels were given: give one, and call once for each")
    return sets[0]


def warn_unconverged(found: xr.Dataset, remedy: str, *, stacklevel: int = 3) -> None:
    """Warn once, with their number, of fits that stopped at their iteration limit.

    Parameters
    ----------
    found : Dataset
        With ``converged``.
    remedy : str
        What helps with the probes of this call.
    stacklevel : int
        Of the caller's caller, as `warnings.warn` takes it.
    """
    early = int((~found["converged"]).sum())
    if early:
        from sklearn.exceptions import ConvergenceWarning

        warnings.warn(
            f"{early} of {found['converged'].size} fits stopped at their iteration limit, as converged says: {remedy}",
            ConvergenceWarning,
            stacklevel=stacklevel,
        )


def describe_failed_layers(failed: Mapping[Any, str]) -> list[str]:
    """Why layers are NaN, for the attribute ``nan_reasons``: by layer the error that its fit ended in."""
    return [f"layer {layer}: the fit failed ({problem})" for layer, problem in failed.items()]


def warn_failed_layers(probe: Any, failed: Mapping[Any, str], n_layers: int) -> None:
    """Warn once of layers that are NaN because their fits ended in an error."""
    if failed:
        from sklearn.exceptions import FitFailedWarning

        layer, problem = next(iter(failed.items()))
        warnings.warn(
            f"{probe!r} could not be fitted on {len(failed)} of {n_layers} layers, which are NaN (layer {layer}: {problem}): "
            "the attribute nan_reasons says which",
            FitFailedWarning,
            stacklevel=3,
        )


def warn_failed(failures: str, *, stacklevel: int = 3) -> None:
    """Warn once of fits that ended in an error, so that their scores are NaN."""
    if failures:
        from sklearn.exceptions import FitFailedWarning

        warnings.warn(f"{failures}: the attribute nan_reasons of each measure says which", FitFailedWarning, stacklevel=stacklevel)
