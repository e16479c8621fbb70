"""Labels of tokens, matched to the tokens of some activations, and folds that keep prompts whole.

Holds which tokens a probe learns from. Never an activation's value, a fit or a store. Labels per prompt are read by ``labels``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pandas as pd
import xarray as xr

from lmprobe_zarr.errors import InvalidArgumentError, LabelError
from lmprobe_zarr.interchange import AbsentText
from lmprobe_zarr.probes.folds import check_folds_listed, plan_folds
from lmprobe_zarr.probes.identity import by_prompt
from lmprobe_zarr.probes.labels import Groups, align_column, check_missing, check_width, parse_groups
from lmprobe_zarr.tokens import TokenIndex, check_listed, order_attributes, prompts_of
from lmprobe_zarr.typing import Array, Ints, Mask

__all__ = ["LabelledTokens", "TokenFolds", "cells_of", "group_tokens", "plan_token_folds", "select_labelled_tokens", "show_rows"]
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class LabelledTokens:
    """The tokens that a probe learns from, with their labels.

    Parameters
    ----------
    name : str
        What the labels are called.
    rows : ndarray of int64, shape (token,)
        Their places along the token axis, ascending.
    codes : ndarray of int, shape (token,)
        The number of each token's class.
    classes : ndarray, shape (class,)
        The labels, sorted: truth values, whole numbers or texts.
    prompt : ndarray of int, shape (token,)
        The number of each token's prompt.
    prompts : ndarray of str, shape (prompt,)
        The prompts by first appearance, including those without a labelled token.
    n_missing : int
        Tokens that are left out because they have no label.
    """

    name: str
    rows: Ints
    codes: Array
    classes: Array
    prompt: Array
    prompts: Array
    n_missing: int

    @property
    def by_prompt(self) -> bool:
        """Whether all tokens of a prompt have one label."""
        last = np.zeros(len(self.prompts), np.int64)
        last[self.prompt] = self.codes
        return bool((last[self.prompt] == self.codes).all())


@dataclass(frozen=True, slots=True)
class TokenFolds:
    """Folds over prompts.

    Parameters
    ----------
    train, test : ndarray of bool, shape (fold, prompt)
    described : str
        How they were made, for the attributes of scores.
    group : str
        The name of the groups that are kept together; empty without groups.
    unit : ndarray of int, shape (prompt,), or None
        The group of each prompt, −1 for prompts that are not used; None without groups.
    """

    train: Mask
    test: Mask
    described: str
    group: str
    unit: Ints | None = None


def select_labelled_tokens(array: xr.DataArray, dim: str, labels: Any, *, where: Any = None, missing: str = "raise") -> LabelledTokens:
    """The tokens to learn from, with their labels; reads no activation.

    Parameters
    ----------
    array : DataArray with a token dimension
    dim : str
        Its name.
    labels, where, missing
        As for `lmprobe_zarr.fit_tokens`.

    Raises
    ------
    InvalidTypeError, LabelError, InvalidArgumentError
        As there.
    """
    check_missing(missing)
    numbers, prompts = prompts_of(array, dim)
    kept = _mask(array, dim, where)
    name, codes, classes = _labels(array, dim, labels, numbers, prompts)
    without = kept & (codes < 0)
    if without.any() and missing == "raise":
        rows = np.flatnonzero(without)
        raise LabelError(
            f"labels {name!r} miss {len(rows)} of {int(kept.sum())} {dim}s, in {_shown_prompts(prompts, numbers[rows])}: "
            "give each a label, leave them out with where=, or drop them with missing='drop'"
        )
    rows = np.flatnonzero(kept & ~without)
    _check_agreement(array, dim, numbers[rows], prompts, codes[rows], classes, rows)
    if not len(rows):
        raise LabelError(f"none of {int(kept.sum())} {dim}s has a label in {name!r}: check what the labels are matched by")
    found = np.unique(codes[rows])
    if len(found) < 2:
        raise LabelError(
            f"all {len(rows)} {dim}s that are left have the label {classes[found[0]].item()!r} of {name!r}: "
            "a probe needs at least two classes"
        )
    renumbered = np.searchsorted(found, codes[rows])
    small = np.min_scalar_type(len(found))
    return LabelledTokens(name, rows, renumbered.astype(small), classes[found], numbers[rows].astype(np.int32), prompts, int(without.sum()))


def _check_agreement(array: xr.DataArray, dim: str, numbers: Array, prompts: Array, codes: Array, classes: Array, rows: Array) -> None:
    """Raise where rows of one prompt, and of one position in it, have two labels."""
    if dim != "prompt" and "position" not in array.coords:
        return
    position = np.zeros(len(rows), np.int64) if dim == "prompt" else np.asarray(array.coords["position"].values)[rows]
    keys = pd.DataFrame({"prompt": numbers, "position": position, "code": codes})
    twice = np.flatnonzero(keys.drop_duplicates().duplicated(["prompt", "position"]).to_numpy())
    if len(twice):
        different = keys.drop_duplicates().iloc[twice[0]]
        here = (keys["prompt"] == different["prompt"]) & (keys["position"] == different["position"])
        first, second = (classes[code].item() for code in keys["code"][here].unique()[:2])
        at = "" if dim == "prompt" else f" at position {different['position']}"
        raise LabelError(f"prompt {prompts[different['prompt']]} has two labels{at}, {first!r} and {second!r}: give each prompt one")


def show_rows(labelled: LabelledTokens, places: Array) -> str:
    """How many prompts some labelled tokens belong to, with the hashes of the first few, for messages."""
    return _shown_prompts(labelled.prompts, labelled.prompt[places])


def _shown_prompts(prompts: Array, numbers: Array) -> str:
    different = pd.unique(numbers)
    shown = ", ".join(str(prompts[number]) for number in different[:_SHOWN])
    return f"{len(different)} prompt{'s' if len(different) > 1 else ''} ({shown}{', …' if len(different) > _SHOWN else ''})"


# -- which tokens ----------------------------------------------------------------------------------------------------------


def _mask(array: xr.DataArray, dim: str, where: Any) -> Mask:
    n = array.sizes[dim]
    if where is None:
        return np.ones(n, bool)
    if isinstance(where, str):
        if where not in array.coords or array.coords[where].dims != (dim,):
            raise InvalidArgumentError(
                f"where={where!r} is no coordinate along {dim!r}: give one of truth values, or the values themselves"
            )
        where = array.coords[where]
    if isinstance(where, xr.DataArray):
        if where.dims != (dim,):
            raise InvalidArgumentError(f"where has dims {where.dims}, expected ({dim!r},): one truth value per {dim}")
        places = _matched(array, where, dim)
        if places is not None and (places < 0).any():
            raise InvalidArgumentError(
                f"where lacks {int((places < 0).sum())} of {n} {dim}s: make it from the same selection as the activations"
            )
        where = where.values if places is None else where.values[places]
    # A bare mask is taken as it is: it is computed from the view, not kept in the order of some call.
    mask = np.asarray(where)
    if mask.dtype != bool or mask.shape != (n,):
        raise InvalidArgumentError(
            f"where has shape {mask.shape} and dtype {mask.dtype}, expected {n} truth values, one per {dim}, as of mask_tokens"
        )
    if not mask.any():
        raise InvalidArgumentError(f"where leaves none of {n} {dim}s: there is nothing to learn from")
    return mask


def _matched(array: xr.DataArray, given: xr.DataArray, dim: str) -> Ints | None:
    """The place of each row in `given`, −1 where it has none; None where both have the same order."""
    mine, theirs = array.xindexes.get("prompt"), given.xindexes.get("prompt")
    if isinstance(mine, TokenIndex) and isinstance(theirs, TokenIndex):
        return None if mine.equals(theirs) else np.asarray(theirs.reindex_like(mine)[theirs.dim], np.int64)
    if given.sizes[dim] != array.sizes[dim]:
        raise InvalidArgumentError(
            f"there are {given.sizes[dim]} values for {array.sizes[dim]} {dim}s and no index over prompt and position to match them by"
        )
    for name in ("prompt", "position"):
        held = [each.coords[name].values for each in (array, given) if name in each.coords and each.coords[name].dims == (dim,)]
        if len(held) == 2 and not np.array_equal(*held):
            raise LabelError(
                f"the values are of other {dim}s than the activations, as their {name} says, and there is no index to match them by: "
                "make them from the same dataset, in its order"
            )
    return None


# -- labels ----------------------------------------------------------------------------------------------------------------


def _labels(array: xr.DataArray, dim: str, given: Any, numbers: Array, prompts: Array) -> tuple[str, Array, Array]:
    """The name of the labels, the number of each row's class (−1 without a label), and the classes."""
    n = array.sizes[dim]
    if isinstance(given, str):
        if given not in array.coords or array.coords[given].dims != (dim,):
            columns = sorted(str(key) for key, value in array.coords.items() if value.dims == (dim,) and key not in _NO_LABELS)
            raise LabelError(f"there is no coordinate {given!r} along {dim!r}: there is {', '.join(columns) or 'none'}; or give the labels")
        return given, *_classes(given, array.coords[given].values)
    name = str(given.name) if isinstance(given, xr.DataArray | pd.Series) and given.name is not None else "labels"
    if isinstance(given, xr.DataArray) and given.dims == (dim,) and dim != "prompt":
        places = _matched(array, given, dim)
        codes, classes = _classes(name, given.values)
        return name, codes if places is None else np.where(places < 0, -1, codes[places]), classes
    if isinstance(given, Mapping) and any(_is_listed(value) for value in given.values()):
        return name, *_classes(name, _spread(array, dim, given, numbers, prompts))
    if (
        not isinstance(given, xr.DataArray | Mapping | pd.Series)
        and isinstance(given, Iterable)
        and not isinstance(given, xr.Dataset | bytes)
    ):
        values = given if isinstance(given, np.ndarray) else np.asarray(given) if hasattr(given, "__array__") else list(given)
        if len(values) == n:
            check_listed(array, given, "labels")
            return name, *_classes(name, values)
        if len(values) != len(prompts):
            counts = f"{n} {dim}s" + ("" if dim == "prompt" else f" of {len(prompts)} prompts")
            raise LabelError(
                f"there are {len(values)} labels for {counts}: give one per {dim}" + (" or one per prompt" if dim != "prompt" else "")
            )
        given = values
    column = align_column(_head(array, dim, numbers, prompts), given, "label")
    codes, classes = _classes(column.name, column.values)
    return column.name, codes[numbers], classes


_NO_LABELS = ("prompt", "prompt_sha256", "text", "position", "token_id", "char_start", "char_end", "n_tokens", "prompt_length")


def _is_listed(value: Any) -> bool:
    return isinstance(value, list | tuple | np.ndarray) and np.ndim(value) == 1


def _spread(array: xr.DataArray, dim: str, given: Mapping[Any, Any], numbers: Array, prompts: Array) -> Array:
    """One value per row, from lists with one value for every token of a prompt; each row takes the value at its position."""
    if "position" not in array.coords:
        raise LabelError("labels are lists, one value per token, but the activations have no position coordinate to match them by")
    head = _head(array, dim, numbers, prompts)
    places = {prompt: number for number, prompt in enumerate(given)}
    column = align_column(head, places, "label")
    listed = list(given.values())
    position = np.asarray(array.coords["position"].values)
    values = np.full(len(numbers), None, object)
    order = np.argsort(numbers, kind="stable")
    for number, rows in enumerate(np.split(order, np.cumsum(np.bincount(numbers, minlength=len(prompts)))[:-1])):
        place = column.values[number]
        if place is None:
            continue
        labels = listed[int(place)]
        if not _is_listed(labels):
            values[rows] = labels
        elif len(labels) <= position[rows].max():
            raise LabelError(
                f"prompt {prompts[number]} has {len(labels)} labels, but a token at position {int(position[rows].max())}: "
                "give one label for every token of the prompt"
            )
        else:
            values[rows] = np.asarray(labels, object)[position[rows]]
    return values


def _head(array: xr.DataArray, dim: str, numbers: Array, prompts: Array) -> xr.DataArray:
    """One row per prompt with the columns of its first token and no activations, in the form that ``labels`` and ``folds`` take."""
    first = np.unique(numbers, return_index=True)[1]
    columns = {
        str(name): ("prompt", value.variable.isel({dim: first}).values, value.attrs)
        for name, value in array.coords.items()
        if value.dims == (dim,) and name not in ("prompt", "position", "prompt_sha256", "token_id", "char_start", "char_end")
    }
    return xr.DataArray(
        np.zeros(len(prompts), np.int8),
        dims="prompt",
        coords={"prompt": ("prompt", prompts, order_attributes(array)), **columns},
        name=array.name,
    )


def _classes(name: str, values: Any) -> tuple[Array, Array]:
    """The number of each value's class, −1 where the value is missing, and the sorted classes."""
    # numpy would turn a list of numbers and texts into texts.
    plain = values if isinstance(values, np.ndarray) else np.array(list(values), object)
    if plain.dtype.kind not in "biuf":
        plain = np.asarray([value.item() if isinstance(value, np.generic) else value for value in plain.tolist()], object)
    if plain.ndim != 1:
        raise LabelError(f"labels {name!r} have shape {plain.shape}: give one label per token or prompt")
    absent = np.asarray(pd.isna(cast(Any, plain)), bool)
    if plain.dtype == object:
        absent |= np.fromiter((isinstance(value, AbsentText) for value in plain), bool, len(plain))
    there = plain[~absent]
    if there.dtype.kind in "Ouf":
        check_width(name, there.tolist() if there.dtype == object else [float(there.max(initial=0)), float(there.min(initial=0))])
    kinds = {type(value) for value in there.tolist()} if there.dtype == object else {there.dtype.type(0).item().__class__}
    if kinds <= {int, float} and float in kinds:
        numbers = there.astype(np.float64)
        if not np.isfinite(numbers).all() or (numbers != np.round(numbers)).any():
            raise LabelError(
                f"labels {name!r} are continuous numbers: a probe learns classes, give whole numbers or texts (np.digitize makes bins)"
            )
        there, kinds = numbers.astype(np.int64), {int}
    if len(kinds) > 1 or not kinds <= {bool, int, str}:
        listed = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise LabelError(f"labels {name!r} hold {listed}: give truth values, whole numbers or texts, one kind only")
    if there.dtype == object:
        there = np.array(there.tolist()) if len(there) else there
    codes = np.full(len(plain), -1, np.int64)
    if not len(there):
        return codes, np.array([], np.int64)
    codes[~absent], classes = pd.factorize(there, sort=True)
    return codes, np.asarray(classes)


# -- folds -----------------------------------------------------------------------------------------------------------------


def plan_token_folds(array: xr.DataArray, dim: str, labelled: LabelledTokens, groups: Any, cv: Any, random_state: int) -> TokenFolds:
    """Folds of whole prompts over some labelled tokens.

    Parameters
    ----------
    array : DataArray with a token dimension
    dim : str
    labelled : LabelledTokens
    groups, cv, random_state
        As for `lmprobe_zarr.sweep_tokens`.

    Raises
    ------
    InvalidTypeError, InvalidArgumentError, LabelError
        As `lmprobe_zarr.probes.folds.plan_folds`; or a fold whose training tokens are of one class.
    """
    check_folds_listed(array, cv)
    prompts = labelled.prompts
    used = np.unique(labelled.prompt)
    together, unit = group_tokens(array, dim, labelled, groups)
    names = [str(prompt) for prompt in prompts[used]]
    n_classes = len(labelled.classes)
    counts = np.bincount(np.searchsorted(used, labelled.prompt) * n_classes + labelled.codes, minlength=len(used) * n_classes)
    counts = counts.reshape(len(used), n_classes)
    if ((counts > 0).sum(axis=1) == 1).all():
        pairs, described = plan_folds(labelled.classes[counts.argmax(axis=1)], names, together, cv, random_state)
    else:
        pairs, described = _deal(names, together, cv, random_state)
    train, test = (np.zeros((len(pairs), len(prompts)), bool) for _ in range(2))
    for fold, (learned, held) in enumerate(pairs):
        train[fold, used[learned]] = True
        test[fold, used[held]] = True
        classes = np.flatnonzero(counts[learned].sum(axis=0))
        if len(classes) < 2:
            raise LabelError(f"fold {fold} trains on {dim}s that all are {labelled.classes[classes[0]].item()!r}: use fewer folds")
    return TokenFolds(train, test, described, "" if together is None else together.name, unit)


def group_tokens(array: xr.DataArray, dim: str, labelled: LabelledTokens, groups: Any) -> tuple[Groups | None, Ints | None]:
    """The groups of the prompts that have labelled tokens, and the group of every prompt, −1 for the others; None without groups.

    Parameters
    ----------
    array : DataArray with a token dimension
    dim : str
    labelled : LabelledTokens
    groups
        As for `lmprobe_zarr.sweep_tokens`.

    Raises
    ------
    LabelError
        Groups are missing, or a prompt is in two.
    """
    if groups is None:
        return None, None
    numbers, prompts = prompts_of(array, dim)
    used = np.unique(labelled.prompt)
    head = _head(array, dim, numbers, prompts).isel(prompt=used)
    if isinstance(groups, str) and groups in array.coords and array.coords[groups].dims == (dim,):
        # `_head` holds the group of the first token alone.
        values = array.coords[groups].values[labelled.rows].tolist()
        by_prompt(zip((str(prompts[number]) for number in labelled.prompt), values, strict=True), "group")
    together = parse_groups(head, groups)
    unit = np.full(len(prompts), -1, np.int64)
    unit[used] = together.codes
    return together, unit


def _deal(names: list[str], together: Any, cv: Any, random_state: int) -> tuple[Any, str]:
    """Folds for labels that differ within a prompt, so that prompts have no label to stratify by."""
    described = ""
    if isinstance(cv, int | np.integer) and not isinstance(cv, bool):
        from sklearn.model_selection import StratifiedGroupKFold

        kept = np.arange(len(names)) if together is None else together.codes
        if not 2 <= cv <= len(np.unique(kept)):
            what = "prompts" if together is None else f"groups of {together.name!r}"
            raise LabelError(
                f"cv={cv!r} folds of {len(np.unique(kept))} {what} with labelled tokens: give from 2 to as many folds as there are"
            )
        # With one class for all, this is GroupKFold with a seed, which itself has one only since scikit-learn 1.6.
        splitter = StratifiedGroupKFold(n_splits=int(cv), shuffle=True, random_state=random_state)
        cv = list(splitter.split(np.zeros((len(names), 1)), np.zeros(len(names)), kept))
        described = f"{len(cv)} folds of whole {'prompts' if together is None else together.name}, random_state={random_state}"
    # plan_folds requires one label per prompt and two classes in each training fold, so it gets alternating ones. The caller checks the
    # classes of the training tokens.
    stand_in = np.arange(len(names)) % 2 if len(names) > 2 else np.arange(len(names))
    pairs, made = plan_folds(stand_in, names, together, cv, random_state)
    return pairs, described or made


def cells_of(folds: TokenFolds | None, n_prompts: int) -> tuple[Array, Mask]:
    """Cells: sets of prompts that are in the same training folds, so that every training fold is a union of cells.

    Returns
    -------
    cell : ndarray of int, shape (prompt,)
    trains : ndarray of bool, shape (fold, cell)
        Which cells each fold trains on. Without folds there is one fold with one cell, all prompts.
    """
    if folds is None:
        return np.zeros(n_prompts, np.int64), np.ones((1, 1), bool)
    patterns, cell = np.unique(folds.train, axis=1, return_inverse=True)
    return np.asarray(cell).reshape(-1), patterns
