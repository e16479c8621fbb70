"""`Origin`, the model and variable that activations are of, and a warning where a probe meets activations of another one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import xarray as xr

from lmprobe_zarr.batch import split_variable
from lmprobe_zarr.log import warn

__all__ = ["Origin", "warn_of_origin"]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where activations come from; empty where that is not known.

    Parameters
    ----------
    model : str
        The name of the model.
    variable : str
        As a store names it: a site, or a site with a pooling.
    """

    model: str = ""
    variable: str = ""

    @classmethod
    def of(cls, activations: Any) -> Origin:
        """That of an array of xarray, as its name and its coordinate ``model`` say."""
        if not isinstance(activations, xr.DataArray):
            return cls()
        model = activations.coords.get("model")
        named = "" if model is None or model.ndim else str(model.item())
        return cls(named, "" if activations.name is None else str(activations.name))

    def __str__(self) -> str:
        return f"{self.variable or 'activations'}{f' of {self.model!r}' * bool(self.model)}"


def warn_of_origin(learned: Origin, given: Origin) -> None:
    """Warn where both say that the activations are of another model, site or pooling than those that were learned from.

    Rows of the same width are scored without an error, and the scores mean something only where the two are meant to be compared: a model
    and what was trained from it, a residual stream and what is added to it. What is pooled from a site lies in the space of its tokens.
    """
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
