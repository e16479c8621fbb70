"""Folds: which prompts train and which test, with everything that must stay together on one side.

Holds row numbers and the rules for them. Never labels as they are given, activations, fits or files.
"""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, LabelError
from lmprobe_zarr.probes.labels import Groups

__all__ = ["Fold", "plan_folds"]

Array = npt.NDArray[Any]
#: Row numbers (train, test).
Fold = tuple[Array, Array]


def plan_folds(labels: Array, prompts: Sequence[str], groups: Groups | None, cv: Any, random_state: int) -> tuple[tuple[Fold, ...], str]:
    """Every fold, and what made them.

    Parameters
    ----------
    labels : ndarray, shape (prompt,)
        From :func:`~lmprobe_zarr.probes.labels.parse_labels`.
    prompts : sequence of str, shape (prompt,)
        Rows of an equal prompt stay on one side.
    groups : Groups, optional
        So do rows of an equal group.
    cv : int, scikit-learn splitter, or iterable of (train, test)
        A number means stratified shuffled folds.
    random_state : int
        The seed where `cv` is a number.

    Raises
    ------
    InvalidTypeError
        `cv` is nothing of that.
    InvalidArgumentError
        A fold is no pair of row numbers, has prompts or groups on both sides, or the splitter refuses.
    LabelError
        Fewer groups, or fewer prompts of one class, than folds; or a fold trains on one class only.
    """
    n = len(labels)
    codes = np.unique(np.array(prompts), return_inverse=True)[1]
    # No prompt is in two groups, so groups keep repeated prompts together as well.
    kept = groups.codes if groups is not None else codes
    pairs: Iterable[Any]
    if isinstance(cv, int | np.integer) and not isinstance(cv, bool):
        _check_counts(labels, codes, groups, int(cv))
        grouped = groups is not None or int(codes.max()) + 1 < n
        splitter = _stratified(int(cv), random_state, grouped=grouped)
        pairs = _split(splitter, labels, kept, given=False)
        described = repr(splitter) + ("" if not grouped else f" grouped by {'prompt' if groups is None else groups.name}")
    elif hasattr(cv, "split") and not isinstance(cv, str):
        described = " ".join(repr(cv).split())
        try:
            pairs = _split(cv, labels, kept, given=groups is not None)
        except ValueError as error:
            raise InvalidArgumentError(f"cv={described} cannot split these {n} prompts: {error}") from error
    elif isinstance(cv, Iterable) and not isinstance(cv, str | bytes | Mapping):
        pairs, described = cv, ""
    else:
        raise InvalidTypeError(f"cv={cv!r} is neither a number of folds, a scikit-learn splitter nor an iterable of (train, test)")
    folds = tuple(_parse_fold(number, pair, n) for number, pair in enumerate(pairs))
    if not folds:
        raise InvalidArgumentError("cv gives no folds: give at least one (train, test)")
    for number, fold in enumerate(folds):
        _check_apart(number, fold, kept, groups)
        _check_classes(number, labels[fold[0]], groups)
    return folds, described or f"{len(folds)} (train, test) pairs"


def _check_counts(labels: Array, codes: Array, groups: Groups | None, n_splits: int) -> None:
    if n_splits < 2:
        raise InvalidArgumentError(f"cv={n_splits!r} leaves nothing to test on: give at least 2 folds")
    if groups is not None and len(groups.values) < n_splits:
        raise LabelError(
            f"{n_splits} folds need {n_splits} different groups, but there are {len(groups.values)} of {groups.name!r}: use fewer folds"
        )
    classes, counts = np.unique(labels[np.unique(codes, return_index=True)[1]], return_counts=True)
    if counts.min() < n_splits:
        listed = ", ".join(f"{label!r}: {count}" for label, count in zip(classes.tolist(), counts.tolist(), strict=True))
        raise LabelError(
            f"{n_splits} folds need {n_splits} different prompts of each class, but there are {{{listed}}}: use fewer folds or label more"
        )


def _stratified(n_splits: int, seed: int, *, grouped: bool) -> Any:
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    kind = StratifiedGroupKFold if grouped else StratifiedKFold
    return kind(n_splits=n_splits, shuffle=True, random_state=seed)


def _split(cv: Any, labels: Array, kept: Array, *, given: bool) -> list[Any]:
    """What the splitter makes of these rows; `given` says whether the caller gave groups."""
    from sklearn.model_selection import GroupKFold, GroupShuffleSplit, LeaveOneGroupOut, LeavePGroupsOut, StratifiedGroupKFold

    rows = np.zeros((len(labels), 1))
    # The others of scikit-learn would warn that they ignore the groups.
    by_group = isinstance(cv, GroupKFold | GroupShuffleSplit | LeaveOneGroupOut | LeavePGroupsOut | StratifiedGroupKFold)
    foreign = given and not type(cv).__module__.startswith("sklearn.") and "groups" in inspect.signature(cv.split).parameters
    return list(cv.split(rows, labels, groups=kept) if by_group or foreign else cv.split(rows, labels))


def _parse_fold(number: int, pair: Any, n: int) -> Fold:
    try:
        train, test = (np.asarray(side) for side in pair)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(f"fold {number} is not a pair (train, test) of row numbers") from error
    sides: list[Array] = []
    for which, side in (("train", train), ("test", test)):
        if side.dtype == bool and side.shape == (n,):
            side = np.flatnonzero(side)
        if side.ndim != 1 or side.dtype.kind not in "iu" or not len(side):
            raise InvalidArgumentError(
                f"fold {number}: {which} has shape {side.shape} and dtype {side.dtype}, expected row numbers, at least one"
            )
        if side.min() < 0 or side.max() >= n:
            raise InvalidArgumentError(
                f"fold {number}: {which} holds rows {side.min()} to {side.max()}, but there are {n} prompts, 0 to {n - 1}"
            )
        sides.append(side.astype(np.intp))
    return sides[0], sides[1]


def _check_apart(number: int, fold: Fold, kept: Array, groups: Groups | None) -> None:
    both = np.intersect1d(kept[fold[0]], kept[fold[1]])
    if not len(both):
        return
    if groups is None:
        first = f"first row {int(np.flatnonzero(kept == both[0])[0])}"
        what, remedy = "prompts", "which keeps repeats together, or drop_duplicates('prompt')"
    else:
        first = f"first {reprlib.repr(groups.values[both[0]])} of {groups.name!r}"
        what, remedy = "groups", "which keeps groups together, or a splitter by group such as GroupKFold"
    raise InvalidArgumentError(
        f"fold {number} has {len(both)} {what} on both sides, {first}: test scores would be too good; use cv=5, {remedy}"
    )


def _check_classes(number: int, trained: Array, groups: Groups | None) -> None:
    if len(np.unique(trained)) < 2:
        remedy = (
            "stratify, or use fewer folds"
            if groups is None
            else f"use fewer folds, or groups that mix classes more than {groups.name!r} do"
        )
        raise LabelError(f"fold {number} trains on {len(trained)} prompts that all are {trained[0].item()!r}: {remedy}")
