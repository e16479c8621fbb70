"""`find_groups`: which column of a dataset says that prompts belong together, such as the two wordings of a statement."""

from __future__ import annotations

import re
from typing import Final

import numpy as np
import xarray as xr

__all__ = ["find_groups"]

#: Folds of the report's own sweep; there have to be more groups than that, of each class.
FOLDS: Final = 5
#: A column of this many prompts for each value, everywhere, is taken for pairs (or triples, …) whatever its name.
LARGEST_EQUAL: Final = 4
#: What people call such a column. A longer name counts by its last word, and without "_id".
NAMES: Final = frozenset({"pair", "group", "triple", "cluster", "family", "statement", "fact", "question", "item", "source", "document"})


def find_groups(data: xr.Dataset, labels: str) -> str | None:
    """The name of a column whose values show pairs, or larger groups, of prompts; None where no column does.

    Parameters
    ----------
    data : Dataset
        Over ``prompt``.
    labels : str
        The column of the labels, which is never taken.

    Returns
    -------
    str or None
        The column where every prompt has a value, more than five values occur and most prompts share theirs with another; and either each
        value has equally many prompts, two to four, or the name says so (``pair_id``, ``group``, ``statement``, …).
    """
    found = []
    for name, column in data.coords.items():
        if column.dims != ("prompt",) or name in ("prompt", "text", labels) or column.dtype.kind not in "iubOUTf":
            continue
        values = column.values
        if values.dtype.kind == "f" and (not np.isfinite(values).all() or (values != np.round(values)).any()):
            continue
        listed = values.tolist()
        if any(value is None or value == "" or value != value for value in listed):
            continue
        counts = np.unique(np.array([str(value) for value in listed]), return_counts=True)[1]
        named = re.sub(r"_?ids?$", "", str(name).lower()).rpartition("_")[2] in NAMES
        equal = counts.min() == counts.max() and 2 <= counts[0] <= LARGEST_EQUAL
        if len(counts) > FOLDS and counts[counts > 1].sum() > len(listed) / 2 and (equal or named):
            found.append((not named, str(name)))
    return min(found)[1] if found else None
