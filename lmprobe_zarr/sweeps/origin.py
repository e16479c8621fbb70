"""`Origin`, the model and variable that activations are of, and a warning where a probe meets activations of another one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import xarray as xr

from lmprobe_zarr.batch import split_variable
from lmprobe_zarr.log import warn

__all__ = ["Origin", "warn_of_origin"]


#: The fields of a provenance that identify the weights.
_OF_WEIGHTS: Final = ("revision", "weights", "adapter")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where activations come from; empty where that is not known.

    Parameters
    ----------
    model : str
        The name of the model.
    variable : str
        As a store names it: a site, or a site with a pooling.
    weights : mapping of str to str
        What is recorded of the model's weights, as ``revision`` or ``weights``.
    """

    model: str = ""
    variable: str = ""
    weights: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, activations: Any) -> Origin:
        """That of an array of xarray, as its name and its coordinate ``model`` say."""
        if not isinstance(activations, xr.DataArray):
            return cls()
        model = activations.coords.get("model")
        named = "" if model is None or model.ndim else str(model.item())
        return cls(named, "" if activations.name is None else str(activations.name))

    @classmethod
    def of_group(cls, model: str, variable: str, provenance: Mapping[str, Any]) -> Origin:
        """That of a variable of a stored group."""
        return cls(model, variable, {name: str(held) for name in _OF_WEIGHTS if (held := provenance.get(name)) is not None})

    @classmethod
    def parse(cls, held: Any) -> Origin:
        """That which a file holds; unknown where it holds something else."""
        if not isinstance(held, Mapping) or not isinstance(held.get("weights", {}), Mapping):
            return cls()
        weights = {str(name): str(value) for name, value in held.get("weights", {}).items()}
        return cls(str(held.get("model") or ""), str(held.get("variable") or ""), weights)

    def __str__(self) -> str:
        return f"{self.variable or 'activations'}{f' of {self.model!r}' * bool(self.model)}"


def warn_of_origin(learned: Origin, given: Origin) -> None:
    """Warn where both say that the activations are of another model, site or pooling than those that were learned from.

    Rows of the same width are scored without an error, and the scores mean something only where the two are meant to be compared: a model
    and what was trained from it, a residual stream and what is added to it. What is pooled from a site lies in the space of its tokens.
    """
    other = [name for name in learned.weights if given.weights.get(name, learned.weights[name]) != learned.weights[name]]
    if other:
        values = " and ".join(f"{name} {held.weights[other[0]][:16]!r}" for name, held in (("its", learned), ("these have", given)))
        warn(
            f"the probe learned from {learned} with other weights ({other[0]}: {values}): fit it again, or give the model that it "
            "learned from",
            UserWarning,
        )
    if _same_model(learned.model, given.model) and _same_space(learned.variable, given.variable):
        return
    warn(
        f"the probe learned from {learned}, and is given {given} of the same width: give the same variable of the same model, unless you "
        "mean to compare the two",
        UserWarning,
    )


def _same_model(one: str, other: str) -> bool:
    # A model may be named by its folder in one place and by the folder's name in another.
    return not one or not other or one == other or one.rstrip("/").rpartition("/")[2] == other.rstrip("/").rpartition("/")[2]


def _same_space(one: str, other: str) -> bool:
    if not one or not other:
        return True
    sites, poolings = zip(*((site, rest) for site, *rest in map(split_variable, (one, other))), strict=True)
    return sites[0] == sites[1] and (poolings[0] == poolings[1] or None in (poolings[0][0], poolings[1][0]))
