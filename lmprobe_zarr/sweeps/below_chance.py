"""Controls that score clearly below chance, which is a sign of torn pairs. Reads nothing but scores, labels and folds.

Where two near duplicates have opposite labels, such as a statement and its negation, and folds put them on two sides, what is learned of
the first is wrong for the second. Then words alone, which should score at chance, score below it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import xarray as xr

from lmprobe_zarr.probes.folds import Fold
from lmprobe_zarr.typing import Array

__all__ = ["BelowChance", "describe_below_chance", "find_below_chance"]

#: How many standard errors below chance are clear. Of noise, fewer than 1 in 1,000 sweeps warn: docs/design/statistics.md has the figures.
_CLEARLY: Final = 4.75
#: Probes, and the most frequent class, which is often that of the other fold, so that it is right less than half of the time by itself.
_NOT_TESTED: Final = ("", "majority")


@dataclass(frozen=True, slots=True)
class BelowChance:
    """A control that scores clearly below chance, with the standard error of a score at chance."""

    name: str
    metric: str
    score: float
    error: float


def find_below_chance(scores: xr.Dataset, classes: Sequence[Array], folds: Sequence[Fold], units: Array) -> list[BelowChance]:
    """Each such control; none of a regression.

    Parameters
    ----------
    scores : Dataset
        Of a sweep.
    classes : sequence of ndarray of int, shape (row,)
        For each set of labels the number of each row's class.
    folds : sequence of (train, test)
        Of a single repetition.
    units : ndarray of int, shape (row,)
        The group of each row, else its prompt: rows of one unit count as one.
    """
    metric = next((name for name in ("auroc", "balanced_accuracy", "accuracy") if name in scores and "fold" in scores[name].dims), None)
    if metric is None or not set(scores["control"].values.tolist()) - set(_NOT_TESTED):
        return []
    held = scores[metric]
    means = held.mean([dim for dim in held.dims if dim not in ("probe", "label")])
    found = []
    for place, codes in enumerate(classes):
        chance, error = _at_chance(metric, codes, folds, units)
        of = means.isel(label=place) if "label" in means.dims else means
        for name, control, score in zip(of["probe"].values.tolist(), of["control"].values.tolist(), of.values.tolist(), strict=True):
            if control not in _NOT_TESTED and score < chance - _CLEARLY * error:
                found.append(BelowChance(str(name), metric, float(score), error))
    return found


def _at_chance(metric: str, codes: Array, folds: Sequence[Fold], units: Array) -> tuple[float, float]:
    """The score that guessing has at least, and its standard error."""
    counts = np.array([_count(codes[test], units[test], int(codes.max()) + 1) for _, test in folds], np.float64)  # fold, class
    if metric == "auroc":
        with np.errstate(divide="ignore"):
            rest = counts.sum(axis=1, keepdims=True) - counts
            variances = (counts.sum(axis=1, keepdims=True) + 1) / (12 * counts * rest)  # of the rank sum, fold by class
        known = np.isfinite(variances)
        by_fold = np.array([np.sqrt(row[of]).mean() ** 2 for row, of in zip(variances, known, strict=True) if of.any()])
        return 0.5, float(np.sqrt(by_fold.sum()) / len(by_fold)) if len(by_fold) else np.inf
    occurring = counts.sum(axis=0)[counts.sum(axis=0) > 0]
    # Whatever is guessed, it is right at least as often as the rarest class occurs.
    chance = 1 / len(occurring) if metric == "balanced_accuracy" else float(occurring.min() / occurring.sum())
    fewest = occurring.min() * len(occurring) if metric == "balanced_accuracy" else occurring.sum()
    return chance, float(np.sqrt(chance * (1 - chance) / fewest))


def _count(codes: Array, units: Array, n_classes: int) -> Array:
    """How many units of each class there are; a unit of several classes counts in each."""
    pairs = np.unique(np.stack([codes, units]), axis=1)
    return np.bincount(pairs[0], minlength=n_classes)


def describe_below_chance(found: Sequence[BelowChance], groups: str) -> str:
    """The text of the warning."""
    worst = min(found, key=lambda each: each.score)
    more = f", and {len(found) - 1} more" if len(found) > 1 else ""
    remedy = (
        f"the groups {groups!r} do not keep them together: give coarser ones"
        if groups
        else "name what belongs together with groups=, such as a column with the number of the pair, so that it is in one fold"
    )
    return (
        f"control {worst.name!r}{more} has the {worst.metric} {worst.score:.3f}, clearly below chance (standard error {worst.error:.3f}): "
        f"prompts that are nearly alike and have different labels are probably on two sides of a fold, and all scores are wrong; {remedy}"
    )
