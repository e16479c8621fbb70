"""`steer`: a loaded model whose residual stream is pushed along directions while it runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import xarray as xr

from lmprobe_zarr.batch import split_variable
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, MissingDependencyError
from lmprobe_zarr.tokens import inner_dim

if TYPE_CHECKING:
    import torch

__all__ = ["steer"]

_MODES: Final = ("add", "ablate", "clamp")
_UNITS: Final = ("activations", "mean_norm")


def steer(
    model: torch.nn.Module,
    directions: xr.Dataset | xr.DataArray,
    *,
    strength: float | None = None,
    mode: str = "add",
    unit: str = "activations",
    layers: int | Iterable[int] | None = None,
    tokens: str | int | slice = "all",
    modules: Mapping[str, str] | None = None,
) -> AbstractContextManager[None]:
    """A context in which a model runs with its residual stream changed along one direction per layer, by forward hooks on its blocks.

    Only where a direction points matters, not how long it is: it is taken with length 1, *d* below.

    Parameters
    ----------
    model : torch Module
        A loaded model of transformers, or around one. It is not copied, moved or changed otherwise.
    directions : Dataset or DataArray
        As from :func:`fit_directions` or :func:`fit_tokens`, or their ``coef``: dims (layer, hidden), or hidden for one direction, which
        has a coordinate ``layer`` or is given `layers`.
    strength : float, optional
        Needed for "add" and "clamp", where a negative one is against the direction. For "ablate" the share that is taken away; all of it
        if not given.
    mode : {"add", "ablate", "clamp"}
        To the rows *h* that a layer puts out, ``h + strength·d``; ``h − strength·(h·d)·d``, which leaves nothing along the direction; or
        ``h + (strength − h·d)·d``, which leaves `strength` along it.
    unit : {"activations", "mean_norm"}
        What `strength` is counted in: the units of the activations, or the mean norm of the rows that each layer's direction was fitted
        on, the variable ``mean_norm`` of the directions.
    layers : int or iterable of int, optional
        Only these layers of the directions.
    tokens : {"all", "generated"}, int or slice
        Which tokens: all; those that are fed in after the first pass, with a cache; or positions in the text, as batches have them with
        their padding. Counted from the end, they are those of every pass: −1 is the last token of the prompt, and each new one.
    modules : mapping, optional
        As for :func:`extract`.

    Returns
    -------
    context manager
        Hooks are there between its beginning and its end, whatever ends it. Contexts of several directions may be nested; they act in
        the order in which they were entered.

    Raises
    ------
    InvalidTypeError
        A model that is not loaded, or no directions.
    InvalidArgumentError
        Directions of another width than the model, of another site than the residual stream, of several classes at once, NaN or zero; a
        layer that one of them lacks; an unknown mode, unit or word for tokens; no strength, or one that is not finite.
    UnknownArchitectureError
        The blocks of the model were not found.

    Examples
    --------
    >>> with lz.steer(model, directions, strength=0.1, unit="mean_norm", layers=[6]):  # doctest: +SKIP
    ...     model.generate(**inputs)
    """
    coef = _coefficients(directions)
    if mode not in _MODES:
        raise InvalidArgumentError(f"mode={mode!r} is unknown: use {', '.join(map(repr, _MODES))}")
    if unit not in _UNITS:
        raise InvalidArgumentError(f"unit={unit!r} is unknown: use {' or '.join(map(repr, _UNITS))}")
    amount = _amount(strength, mode)
    chosen = _chosen(coef, layers)
    norms = _norms(directions, chosen) if unit == "mean_norm" and mode != "ablate" else dict.fromkeys(chosen, 1.0)
    asked = _tokens(tokens)
    try:
        import torch

        from lmprobe_zarr.extraction.models.steering import Push, steered
    except ImportError as error:
        raise MissingDependencyError("steering needs torch and transformers: pip install 'lmprobe-zarr[models]'") from error
    if not isinstance(model, torch.nn.Module):
        raise InvalidTypeError(f"model is a loaded torch Module, not {type(model).__name__}: load it with transformers")
    pushes = {layer: Push(direction, amount * norms[layer]) for layer, direction in chosen.items()}
    return steered(model, pushes, mode, asked, modules)


def _coefficients(directions: Any) -> xr.DataArray:
    coef = directions["coef"] if isinstance(directions, xr.Dataset) and "coef" in directions else directions
    if not isinstance(coef, xr.DataArray):
        raise InvalidTypeError(f"directions are what fit_directions or fit_tokens gives, not {type(directions).__name__}")
    if "class" in coef.dims:
        raise InvalidArgumentError(
            f"directions of {coef.sizes['class']} classes: choose one, as directions.sel({{'class': {coef['class'].values.tolist()[0]!r}}})"
        )
    site = split_variable(str(directions.attrs.get("variable", "")))[0]
    if site not in ("", "resid"):
        raise InvalidArgumentError(f"directions of {directions.attrs['variable']!r}: only the residual stream, 'resid', can be steered")
    inner = inner_dim(coef)
    further = [str(dim) for dim in coef.dims if dim not in ("layer", inner)]
    if further:
        raise InvalidArgumentError(f"directions have the dimension {further[0]!r}: choose one direction for each layer")
    return coef.transpose(..., inner)


def _amount(strength: Any, mode: str) -> float:
    if strength is None:
        if mode != "ablate":
            raise InvalidArgumentError(f"mode={mode!r} needs a strength: give strength=1.0, in the units that unit= says")
        return 1.0
    number = isinstance(strength, int | float | np.integer | np.floating) and not isinstance(strength, bool)
    if not number or not np.isfinite(strength):
        raise InvalidArgumentError(f"strength={strength!r} is no finite number")
    return float(strength)


def _chosen(coef: xr.DataArray, layers: Any) -> dict[int, Any]:
    """The directions by layer, of length 1."""
    asked = None if layers is None else [layers] if isinstance(layers, int | np.integer) else list(layers)
    if "layer" not in coef.coords:
        if asked is None or "layer" in coef.dims:
            raise InvalidArgumentError("directions do not say of which layer they are: give layers=, or the coordinate 'layer'")
        held = {int(layer): coef.values for layer in asked}
    else:
        numbers = np.atleast_1d(coef["layer"].values).tolist()
        rows = np.atleast_2d(coef.values)
        held = {int(layer): row for layer, row in zip(numbers, rows, strict=True)}
        lacking = [layer for layer in asked or () if layer not in held]
        if lacking:
            raise InvalidArgumentError(f"there is no direction of layer {lacking[0]!r}: there are layers {', '.join(map(str, held))}")
        held = held if asked is None else {int(layer): held[int(layer)] for layer in asked}
    if not held:
        raise InvalidArgumentError("no layer was named: give layers=[…], or leave it out for all directions")
    found = {}
    for layer, row in held.items():
        wide = np.asarray(row, np.float64)
        size = float(np.abs(wide).max())
        if not np.isfinite(wide).all() or size == 0:
            what = "zero" if size == 0 else "NaN or infinite"
            raise InvalidArgumentError(f"the direction of layer {layer} is {what}: leave the layer out")
        scaled = wide / size
        found[layer] = scaled / np.linalg.norm(scaled)
    return found


def _norms(directions: Any, chosen: Mapping[int, Any]) -> dict[int, float]:
    if not isinstance(directions, xr.Dataset) or "mean_norm" not in directions:
        raise InvalidArgumentError(
            "unit='mean_norm' needs the variable 'mean_norm' of the directions, which fit_directions gives: "
            "assign it, over layer, or give the strength in units of the activations"
        )
    norms = directions["mean_norm"]
    found = {}
    for layer in chosen:
        value = float(norms.sel(layer=layer) if "layer" in norms.dims else norms)
        if not np.isfinite(value):
            raise InvalidArgumentError(f"the mean norm of layer {layer} is {value}: leave the layer out")
        found[layer] = value
    return found


def _tokens(tokens: Any) -> slice | str:
    if isinstance(tokens, str) and tokens in ("all", "generated"):
        return tokens
    if isinstance(tokens, int | np.integer) and not isinstance(tokens, bool):
        return slice(int(tokens), None if tokens == -1 else int(tokens) + 1)
    if isinstance(tokens, slice) and tokens.step in (None, 1):
        return tokens
    raise InvalidArgumentError(f"tokens={tokens!r:.60} names no tokens: use 'all', 'generated', a position such as -1, or slice(4, None)")
