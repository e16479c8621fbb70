"""One fit of an estimator whose own cross-validation, where it has one, keeps prompts and groups together."""

from __future__ import annotations

from typing import Any

import numpy as np

from lmprobe_zarr.probes.folds import keep_together
from lmprobe_zarr.probes.ridge import fit_probe, rows_for
from lmprobe_zarr.typing import Array

__all__ = ["fit_apart"]


def fit_apart(
    estimator: Any, probe: Any, rows: Array, values: Array, kept: Array, random_state: int, *, task: str = "classification"
) -> Any:
    """An estimator fitted on rows; one that cross-validates within them keeps prompts and groups together, see `keep_together`.

    Parameters
    ----------
    estimator : estimator
    probe : str or estimator
        What it was made from.
    rows : ndarray, shape (row, hidden)
    values : ndarray, shape (row,)
        Classes, or numbers of a regression.
    kept : ndarray of int, shape (row,)
        Rows of an equal number stay on one side.
    random_state : int
    task : {"classification", "regression"}
    """
    codes = np.unique(values, return_inverse=True)[1] if task == "classification" else None
    keep_together(estimator, probe, codes, kept, random_state)
    return fit_probe(probe, estimator, rows_for(probe, rows, values if task == "regression" else None), values)
