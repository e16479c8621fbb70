"""What each token, or prompt, was predicted to be by the fold that tests it, as variables of a sweep's scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from lmprobe_zarr.probes import LabelledTokens, TokenFolds, number_repeats
from lmprobe_zarr.tokens import order_attributes
from lmprobe_zarr.typing import Array

__all__ = ["Predicted", "prediction_variables"]


class Predicted(NamedTuple):
    """Predictions for the test rows of a fold.

    Parameters
    ----------
    rows : ndarray of int, shape (row,)
        Places among the labelled tokens; or numbers of prompts.
    classes : ndarray of int, shape (row,)
        The number of each row's class.
    scores : ndarray, shape (row,) or (row, class)
        What rows are ranked by.
    """

    rows: Array
    classes: Array
    scores: Array


def prediction_variables(
    array: xr.DataArray, examples: LabelledTokens, folds: TokenFolds, found: Array, *, by_prompt: bool
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The variables ``predicted``, ``score`` and ``test_fold``, and the coordinates of their rows.

    Parameters
    ----------
    array : DataArray
        The activations; only coordinates are read.
    examples : LabelledTokens
    folds : TokenFolds
    found : ndarray of object, shape (layer, probe, fold)
        A `Predicted` each, None where there are none: −1 and NaN stand there.
    by_prompt : bool
        Whether rows are prompts, along ``prompt``; otherwise labelled tokens, along ``token``.
    """
    used = np.unique(examples.prompt) if by_prompt else examples.prompt
    n, dim = len(used), "prompt" if by_prompt else "token"
    place = np.full(len(examples.prompts), -1)
    place[used] = np.arange(n)
    repeats = number_repeats([(np.flatnonzero(train), np.flatnonzero(test)) for train, test in zip(folds.train, folds.test, strict=True)])
    shape = (*found.shape[:2], int(repeats[-1]) + 1, n)
    n_classes = len(examples.classes)
    predicted = np.full(shape, -1, np.int16)
    scores = np.full((*shape, n_classes) if n_classes > 2 else shape, np.nan)
    tests = np.full(shape[2:], -1, np.int32)
    for fold, repeat in enumerate(repeats):
        tests[repeat, folds.test[fold][used]] = fold
        for layer, probe in np.ndindex(found.shape[:2]):
            of_fold = found[layer, probe, fold]
            if of_fold is not None:
                rows = place[of_fold.rows] if by_prompt else of_fold.rows
                predicted[layer, probe, repeat, rows] = of_fold.classes
                scores[layer, probe, repeat, rows] = _by_class(of_fold.scores, n_classes)
    held = {
        "predicted": (("layer", "probe"), predicted, f"prediction by the fold that tests the {dim}, as the number of its class"),
        "score": (("layer", "probe"), scores, f"what {dim}s are ranked by"),
        "test_fold": ((), tests, f"fold that tests the {dim}, -1 for none"),
    }
    variables = {}
    for name, (before, values, described) in held.items():
        several = shape[2] > 1
        after = ("class",) if values.ndim > len(before) + 2 else ()
        dims = (*before, *(("repetition",) if several else ()), dim, *after)
        variables[name] = (dims, values if several else values.squeeze(len(before)), {"long_name": described})
    first = np.unique(examples.prompt, return_index=True)[1] if by_prompt else slice(None)
    coords: dict[str, Any] = {
        "prompt": (dim, examples.prompts[used], order_attributes(array)),
        "true": (dim, examples.codes[first].astype(np.int64)),
    }
    if folds.unit is not None:
        coords["group"] = (dim, folds.unit[used])
    if not by_prompt and "position" in array.coords:
        coords["position"] = (dim, np.asarray(array.coords["position"].values)[examples.rows])
    if n_classes > 2:
        coords["class"] = examples.classes
    return variables, coords


def _by_class(scores: Array, n_classes: int) -> Array:
    """Scores with one column per class where there are more than two; a fold that trained on two of them ranks by one number."""
    if n_classes == 2 or scores.ndim == 2:
        return scores if scores.ndim == 1 or scores.shape[1] == n_classes else np.full((len(scores), n_classes), np.nan)
    return np.full((len(scores), n_classes), np.nan)
