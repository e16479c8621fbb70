"""Folds: which prompts a probe trains on and which it is tested on. Repeated prompts, and groups, stay on one side.

Holds row numbers and the rules for them. Never parses labels; knows no activations, fits or files.
"""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

import numpy as np

from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, LabelError
from lmprobe_zarr.probes.labels import Groups, Labels, Sides
from lmprobe_zarr.tokens import check_listed
from lmprobe_zarr.typing import Array, is_listed

#: How many classes a message lists with their counts, those with the fewest prompts.
SHOWN_CLASSES: Final = 6

__all__ = [
    "Fold",
    "evaluation_folds",
    "group_codes",
    "inner_folds",
    "keep_together",
    "number_repeats",
    "number_units",
    "plan_folds",
]
#: Row numbers (train, test).
Fold = tuple[Array, Array]


def plan_folds(
    labels: Sequence[Labels] | Array, prompts: Sequence[str], groups: Groups | None, cv: Any, random_state: int, *, repeats: int = 1
) -> tuple[tuple[Fold, ...], str]:
    """All folds, and a description of how they were made.

    Parameters
    ----------
    labels : sequence of Labels, or ndarray, shape (prompt,)
        From :func:`~lmprobe_zarr.probes.labels.parse_label_sets`; only rows that have one are in a fold. An array is one set of classes.
    prompts : sequence of str, shape (prompt,)
        Rows of an equal prompt stay on one side.
    groups : Groups, optional
        So do rows of an equal group.
    cv : int, scikit-learn splitter, iterable of (train, test), or Sides
        A number makes shuffled folds, which are stratified if there is a single set of classes.
    random_state : int
        The seed where `cv` is a number; each repeat has its own.
    repeats : int
        How often a number of folds is drawn anew.

    Raises
    ------
    InvalidTypeError
        `cv` is nothing of that.
    InvalidArgumentError
        A fold is no pair of row numbers, has prompts or groups on both sides, or the splitter refuses.
    LabelError
        Fewer groups, or fewer prompts of one class, than folds; or a fold trains on one class only.
    """
    if isinstance(labels, np.ndarray):
        labels = [Labels("labels", labels, np.unique(labels), np.arange(len(labels)))]
    rows, n = labels[0].rows, len(prompts)
    codes = group_codes([prompts[row] for row in rows], None)
    # No prompt is in two groups, so groups keep repeated prompts together as well.
    kept = codes if groups is None else group_codes([], groups.codes[rows])
    strata = _strata(labels)
    counted = isinstance(cv, int | np.integer) and not isinstance(cv, bool)
    if isinstance(repeats, bool) or not isinstance(repeats, int | np.integer) or repeats < 1:
        raise InvalidArgumentError(f"repeats={repeats!r} is no number of repetitions: give a whole number of at least 1")
    repeats = int(repeats)
    if repeats > 1 and not counted:
        raise InvalidArgumentError(f"repeats={repeats!r} draws a number of folds anew: give cv as a number, such as 5")
    pairs: Iterable[Any]
    if counted:
        _check_counts(labels, codes, groups, int(cv))
        grouped = groups is not None or int(codes.max()) + 1 < len(rows)
        splitters = [_splitter(int(cv), (random_state + repeat) % 2**32, strata=strata, grouped=grouped) for repeat in range(repeats)]
        pairs = [pair for splitter in splitters for pair in _split(splitter, strata, kept, rows, given=False)]
        described = f"{repeats} times " * (repeats > 1) + repr(splitters[0])
        described += "" if not grouped else f" grouped by {'prompt' if groups is None else groups.name}"
    elif isinstance(cv, Sides):
        pairs = [(cv.train, cv.test)]
        described = f"split {cv.name!r}"
    elif hasattr(cv, "split") and not isinstance(cv, str | bytes | type):
        described = " ".join(repr(cv).split())
        try:
            pairs = _split(cv, labels[0].values[rows], kept, rows, given=groups is not None)
        except ValueError as error:
            raise InvalidArgumentError(f"cv={described} cannot split these {len(rows)} prompts: {error}") from error
    elif is_listed(cv) and not isinstance(cv, str | bytes | Mapping):
        pairs, described = cv, ""
    else:
        raise InvalidTypeError(f"cv={cv!r} is neither a number of folds, a scikit-learn splitter nor an iterable of (train, test)")
    folds = tuple(_parse_fold(number, pair, n, rows) for number, pair in enumerate(pairs))
    if not folds:
        raise InvalidArgumentError("cv gives no folds: give at least one (train, test)")
    everywhere = np.full(n, -1)
    everywhere[rows] = kept
    for number, fold in enumerate(folds):
        _check_apart(number, fold, everywhere, groups)
        for each in labels:
            if each.classes is not None:
                _check_classes(number, each.values[fold[0]], groups)
    return folds, described or f"{len(folds)} (train, test) pairs"


def check_folds_listed(array: Any, cv: Any) -> None:
    """Raise where folds are given as row numbers for rows in no known order."""
    counted = isinstance(cv, int | np.integer)
    if cv is not None and not counted and not hasattr(cv, "split") and isinstance(cv, Iterable) and not isinstance(cv, str | Mapping):
        check_listed(array, cv, "the folds of cv")


def group_codes(prompts: Sequence[str], groups: Array | None) -> Array:
    """For each row the number, from 0, of the group that must stay on one side; without groups, of its prompt."""
    return np.asarray(np.unique(np.array(prompts) if groups is None else groups, return_inverse=True)[1])


def number_repeats(folds: Sequence[Fold]) -> Array:
    """The repeat that each fold belongs to, from 0. Repeats follow one another, and within one no row is tested twice."""
    numbers, tested = [0] * len(folds), set[int]()
    for number, (_, test) in enumerate(folds):
        rows = set(test.tolist())
        again = bool(tested & rows)
        tested = rows if again else tested | rows
        numbers[number] = (numbers[number - 1] if number else 0) + again
    return np.array(numbers)


def inner_folds(codes: Array | None, kept: Array, n_splits: int, random_state: int, *, grouped: bool = False) -> list[Fold]:
    """Folds within the training rows of another fold, as places among these rows: those that `plan_folds` draws for these rows alone.

    Parameters
    ----------
    codes : ndarray of int, shape (row,), or None
        Classes to stratify by; None for a regression.
    kept : ndarray of int, shape (row,)
        Rows of an equal number stay on one side.
    n_splits : int
        The number of folds; fewer, but at least two, if a class has fewer prompts (or groups).
    grouped : bool
        Whether the caller gave groups, even if each has a single row here.

    Raises
    ------
    LabelError
        A class has a single prompt (or group).
    """
    units = len(np.unique(kept))
    strata = np.zeros(len(kept), int) if codes is None else codes
    fewest = _fewest_units(strata, kept)
    if fewest < 2:
        raise LabelError(
            "a training fold has a single prompt (or group) of a class: nothing can be chosen within it; use fewer folds or label more"
        )
    grouped = grouped or units < len(kept)
    splitter = _splitter(min(n_splits, fewest), random_state, strata=None if codes is None else strata, grouped=grouped)
    return [(train, test) for train, test in _split(splitter, strata, kept, np.arange(len(kept)), given=False)]


def evaluation_folds(prompts: Sequence[Any], labels: Array | None, groups: Any = None) -> list[Fold]:
    """Five folds (fewer where a class is small) of prompts that are only evaluated; equal prompts, or groups, are on one side.

    Parameters
    ----------
    prompts : sequence
        Texts, chats or token ids.
    labels : ndarray, shape (prompt,), or None
        Classes to stratify by.
    groups : sequence, optional
        One value per prompt.

    Raises
    ------
    LabelError
        A class has a single prompt (or group), or not every prompt has a group.
    """
    units = list(map(repr, prompts)) if groups is None else np.asarray(groups).tolist()
    if len(units) != len(prompts):
        raise LabelError(f"groups hold {len(units)} values for {len(prompts)} prompts: give one per prompt")
    codes = None if labels is None else np.unique(labels, return_inverse=True)[1]
    return inner_folds(codes, number_units(units), 5, 0, grouped=groups is not None)


def number_units(units: Sequence[Any]) -> Array:
    """For each row the number of its unit, as scikit-learn numbers them: sorted, or by first appearance where they cannot be sorted."""
    try:
        listed = list(dict.fromkeys(units))
    except TypeError as error:
        raise LabelError("groups hold what has no hash: give numbers, texts or tuples") from error
    with suppress(TypeError):
        listed = sorted(listed)
    numbers = {unit: number for number, unit in enumerate(listed)}
    return np.array([numbers[unit] for unit in units])


def keep_together(estimator: Any, probe: Any, codes: Array | None, kept: Array, random_state: int) -> None:
    """Give an estimator that cross-validates within its training rows folds that keep prompts and groups together.

    scikit-learn's own folds know neither: they would choose on rows that are not apart. Splitters that the caller gave stay as they are.

    Parameters
    ----------
    estimator : estimator
        Changed in place.
    probe : str or estimator
        What it was made from.
    codes : ndarray of int, shape (row,), or None
        The classes of the training rows.
    kept : ndarray of int, shape (row,)
        Rows of an equal number stay on one side.
    random_state : int

    Raises
    ------
    LabelError
        A class has a single prompt (or group).
    """
    given = estimator.get_params()
    names = [name for name in given if name.rpartition("__")[2] == "cv"]
    for name in names:
        value, owner = given[name], name.rpartition("cv")[0]
        counted = value is None or (isinstance(value, int | np.integer) and not isinstance(value, bool))
        # An estimator inside of another that cross-validates is given other rows.
        inside = any(other != name and owner.startswith(other.rpartition("cv")[0] + "estimator__") for other in names)
        if not counted or inside:
            continue
        first = np.unique(kept, return_index=True)[1]
        few = isinstance(probe, str) and codes is not None and _fewest_units(codes, kept) < (value or 5)
        if len(first) < len(kept) or few:
            estimator.set_params(**{name: inner_folds(codes, kept, int(value or 5), random_state)})


def _fewest_units(codes: Array, kept: Array) -> int:
    """In how many units, which are kept on one side, the class occurs that occurs in the fewest."""
    return int(np.unique(np.unique(np.stack([codes, kept]), axis=1)[0], return_counts=True)[1].min())


def _strata(labels: Sequence[Labels]) -> Array | None:
    """What shuffled folds are stratified by: the classes, if there is a single set of them."""
    only = labels[0]
    return only.values[only.rows] if len(labels) == 1 and only.classes is not None else None


def _check_counts(labels: Sequence[Labels], codes: Array, groups: Groups | None, n_splits: int) -> None:
    if n_splits < 2:
        raise InvalidArgumentError(f"cv={n_splits!r} leaves nothing to test on: give at least 2 folds")
    if groups is not None and len(groups.values) < n_splits:
        raise LabelError(
            f"{n_splits} folds need {n_splits} different groups, but there are {len(groups.values)} of {groups.name!r}: use fewer folds"
        )
    first = np.unique(codes, return_index=True)[1]
    if len(first) < n_splits:
        raise LabelError(f"{n_splits} folds need {n_splits} different prompts, but there are {len(first)}: use fewer folds or label more")
    for each in labels:
        if each.classes is None:
            continue
        classes, counts = np.unique(each.values[each.rows][first], return_counts=True)
        if counts.min() < n_splits:
            shown = np.sort(np.argsort(counts, kind="stable")[:SHOWN_CLASSES])
            listed = ", ".join(
                f"{label!r:.40}: {count}" for label, count in zip(classes[shown].tolist(), counts[shown].tolist(), strict=True)
            )
            more = f", … of {len(classes)} classes" if len(classes) > len(shown) else ""
            raise LabelError(
                f"{n_splits} folds need {n_splits} different prompts of each class, but there are {{{listed}{more}}}: "
                f"use fewer folds{', another column,' if more else ''} or label more"
            )


def _splitter(n_splits: int, seed: int, *, strata: Array | None, grouped: bool) -> Any:
    from sklearn.model_selection import KFold, StratifiedGroupKFold, StratifiedKFold

    # Also for groups without classes: with a single class for all rows it makes folds of similar size.
    kind = StratifiedGroupKFold if grouped else KFold if strata is None else StratifiedKFold
    return kind(n_splits=n_splits, shuffle=True, random_state=seed)


def _split(cv: Any, labels: Array | None, kept: Array, rows: Array, *, given: bool) -> list[Any]:
    """The splitter's folds of these rows, as row numbers; `given` says whether the caller gave groups."""
    from sklearn.model_selection import GroupKFold, GroupShuffleSplit, LeaveOneGroupOut, LeavePGroupsOut, StratifiedGroupKFold

    table = np.zeros((len(rows), 1))
    labels = np.zeros(len(rows), int) if labels is None else labels
    # scikit-learn's other splitters would warn that they ignore groups.
    by_group = isinstance(cv, GroupKFold | GroupShuffleSplit | LeaveOneGroupOut | LeavePGroupsOut | StratifiedGroupKFold)
    foreign = given and not type(cv).__module__.startswith("sklearn.") and "groups" in inspect.signature(cv.split).parameters
    found = cv.split(table, labels, groups=kept) if by_group or foreign else cv.split(table, labels)
    return [(rows[train], rows[test]) for train, test in found]


def _parse_fold(number: int, pair: Any, n: int, rows: Array) -> Fold:
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
        side = side.astype(np.intp)
        # Rows without a label are left out of every fold, also of the caller's.
        labelled = side if len(rows) == n else side[np.isin(side, rows)]
        if not len(labelled):
            raise LabelError(f"fold {number}: none of the {len(side)} prompts of {which} has a label: label some, or leave the fold out")
        sides.append(labelled)
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
