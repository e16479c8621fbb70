"""Which numbers of a sweep are drawn: one score, with its folds, its chance level, and whether larger ones are better. Draws nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import xarray as xr

from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError

__all__ = ["NOT_RANKED", "REPEATED", "SMALLER_IS_BETTER", "chance_levels", "select_scores"]

#: Dims over which a score is repeated.
REPEATED: Final = ("fold", "seed", "repeat")
#: Measures of which the least is the best.
SMALLER_IS_BETTER: Final = frozenset({"brier", "ece", "log_loss", "mae"})
#: Numbers by layer that say nothing of how good a probe is.
NOT_RANKED: Final = frozenset({"chosen_strength", "fit_seconds", "n_test", "n_train"})


def select_scores(scores: Any, metric: str, dims: Sequence[str], *, as_rows: bool = False) -> xr.DataArray:
    """A score over `dims`, of which the last is ``fold``.

    Folds, seeds and repeats are stacked into it. Other dims that have one entry are left out.

    Raises
    ------
    InvalidTypeError
        `scores` is no dataset.
    InvalidArgumentError
        There is no such score, as in intervals and comparisons, or it has further dims, which can be rows where `as_rows`.
    """
    if not isinstance(scores, xr.Dataset):
        raise InvalidTypeError(f"scores are the xarray.Dataset that sweep gives, not {type(scores).__name__}")
    fitting = [str(name) for name, variable in scores.data_vars.items() if set(dims) <= set(variable.dims) and variable.dtype.kind == "f"]
    over = f"{', '.join(dims[:-1])} and {dims[-1]}"
    if metric not in fitting:
        if "chosen_layer" in scores:
            raise InvalidArgumentError(
                "the layer of these scores was chosen within each training fold, so there is nothing to draw by layer: "
                "print scores.lz.table(), or draw a sweep without choose"
            )
        if "bound" in scores.dims:
            drawn = metric if metric in scores else str(next(iter(scores.data_vars), metric))
            raise InvalidArgumentError(
                f"these are intervals: draw them with scores.lz.plot({drawn!r}, intervals=intervals), where scores are those of the sweep"
            )
        if "p_holm" in scores:
            raise InvalidArgumentError("these are comparisons, of which there is no picture: to_dataframe() shows them")
        raise InvalidArgumentError(f"there is no score {metric!r} over {over}: use one of {', '.join(fitting) or 'none (not a sweep)'}")
    values = scores[metric]
    for dim in [str(dim) for dim in values.dims if dim not in (*dims, *REPEATED)]:
        if values.sizes[dim] > 1:
            shown = values[dim].values[:1].tolist()[0] if dim in values.coords else 0
            instead = f", or all of one {dims[1]} with rows={dim!r}" if as_rows else ""
            raise InvalidArgumentError(
                f"there are {values.sizes[dim]} along {dim!r}: draw one at a time, as in scores.sel({dim}={shown!r}){instead}"
            )
        values = values.isel({dim: 0})
    repeated = [dim for dim in REPEATED if dim in values.dims]
    if len(repeated) > 1:
        plain = values.drop_vars([name for name in values.coords if set(values.coords[name].dims) & set(repeated)])
        values = plain.stack(one_fold=repeated, create_index=False).rename(one_fold="fold")
    return values.transpose(*dims)


def chance_levels(scores: xr.Dataset, metric: str) -> dict[str, float]:
    """The score of guessing, by what it is called; none where it is not known."""
    if metric == "auroc":
        return {"chance": 0.5}
    if metric == "accuracy" and "majority_share" in scores.attrs:
        return {"majority class": float(scores.attrs["majority_share"])}
    return {}
