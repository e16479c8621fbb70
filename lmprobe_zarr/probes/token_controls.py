"""Controls for probes on tokens: probes on shuffled labels, and predictions from what is known of a token without its activation.

Holds the names, the shuffled labels, and scores from counts. Never an activation, a fit or a store.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import xarray as xr

from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, LabelError
from lmprobe_zarr.probes.bags import make_bag
from lmprobe_zarr.probes.classifiers import make_probe
from lmprobe_zarr.probes.controls import check_shuffles, deal_to_units
from lmprobe_zarr.probes.layer import fits_running
from lmprobe_zarr.probes.token_labels import LabelledTokens, TokenFolds
from lmprobe_zarr.typing import Array, Ints

__all__ = ["DEALT", "RANDOM_WEIGHTS", "TOKEN_CONTROLS", "deal_labels", "parse_token_controls", "score_by_counts"]

#: Every control of `lmprobe_zarr.sweep_tokens` by name, and what it says.
TOKEN_CONTROLS: Final[Mapping[str, str]] = {
    "shuffled_labels": "each probe on labels dealt anew, to prompts where all tokens of a prompt share theirs, else sequence by sequence",
    "control_task": "each probe on a random label for every token id, drawn as often as in the labels: what it learns by heart",
    "token_identity": "how often each class had this very token id among the training tokens",
    "position": "how often each class had this position in its prompt among the training tokens",
    "layer_0": "the first probe on layer 0: what is there before the model has worked on it",
    "majority": "the most frequent class of the training tokens, for every token",
    "bag_of_tokens": "logistic regression on counts of the token ids of each prompt, where a prompt has one label",
    "random_weights": "each probe on given activations of the same tokens: of a model of the same shape with random weights",
}
#: The control that other activations are given for.
RANDOM_WEIGHTS: Final = "random_weights"
#: Controls with other labels, on which every probe is fitted again.
DEALT: Final = ("shuffled_labels", "control_task")


def parse_token_controls(controls: Any) -> dict[str, Any]:
    """The names, checked, each with 0; "shuffled_labels" with how often labels are shuffled for a p-value, "random_weights" with its value.

    Raises
    ------
    InvalidTypeError, InvalidArgumentError
        No names, or unknown ones.
    """
    if controls is None:
        return {}
    listed = [controls] if isinstance(controls, str) else list(controls) if isinstance(controls, Iterable) else [None]
    given = dict(controls) if isinstance(controls, Mapping) else {}
    features = any(value is not None and name not in ("shuffled_labels", RANDOM_WEIGHTS) for name, value in given.items())
    if features or not all(isinstance(name, str) for name in listed):
        raise InvalidTypeError(
            f"controls={controls!r:.60} are no names: give some of {', '.join(TOKEN_CONTROLS)}, or {{'shuffled_labels': 100}} for p-values"
        )
    strange = next((name for name in listed if name not in TOKEN_CONTROLS), None)
    if strange is not None:
        raise InvalidArgumentError(f"there is no control {strange!r} of tokens: use some of {', '.join(TOKEN_CONTROLS)}")
    if RANDOM_WEIGHTS in listed and given.get(RANDOM_WEIGHTS) is None:
        raise InvalidArgumentError(
            f"control {RANDOM_WEIGHTS!r} needs activations of the same tokens: give them as {{{RANDOM_WEIGHTS!r}: other.resid}}"
        )
    return {str(name): given[name] if name == RANDOM_WEIGHTS else check_shuffles(given.get(name)) for name in listed}


def deal_labels(
    control: str,
    array: xr.DataArray,
    labelled: LabelledTokens,
    folds: TokenFolds,
    random_state: int,
    *,
    draw_folds: Callable[[LabelledTokens], TokenFolds] | None = None,
    number: int = 0,
) -> tuple[Array, TokenFolds]:
    """Labels dealt anew, shape (token,), of the dtype of ``labelled.codes``, and their folds.

    For "shuffled_labels", prompts that have one label each exchange them, as whole groups where there are groups. Where the tokens of a
    prompt differ, the labels of each prompt, or group, stay in their order: these sequences follow one another in a random order, from a
    random place on, and are dealt to the tokens as they come. So neighbours stay as alike as they were. Folds are of whole prompts, so
    nothing that was learned by heart helps.

    For "control_task" every token id gets one label at random, as frequent as among the tokens: a probe may learn by heart which token
    has which, and what it scores then is its capacity to do so.

    Parameters
    ----------
    control : {"shuffled_labels", "control_task"}
    array : DataArray with a token dimension
        Whose ``token_id`` is read.
    labelled : LabelledTokens
    folds : TokenFolds
        Labels are dealt again until each trains on two classes.
    random_state : int
    draw_folds : callable, optional
        Draws folds for shuffled labels, as `folds` were drawn for the true ones.
    number : int
        Which of several shuffles.

    Raises
    ------
    InvalidArgumentError
        Token ids are not known, or no such labels were found.

    Notes
    -----
    Source: J. Hewitt and P. Liang, "Designing and Interpreting Probes with Control Tasks" (2019), arXiv:1909.03368: the control task gives
    each type of word a random output.
    """
    words = f"{random_state}\0{control}\0{labelled.name}" + (f"\0{number}" if number else "")
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(words.encode("utf-8", "surrogatepass")).digest()[:8], "little"))
    by_type = control == "control_task"
    types = np.unique(_known(control, array, "token_id", labelled), return_inverse=True)[1] if by_type else np.zeros(0, np.int64)
    for _ in range(100):
        values = rng.choice(labelled.codes, int(types.max()) + 1)[types] if by_type else _shuffle(labelled, folds.unit, rng)
        dealt = np.asarray(values, labelled.codes.dtype)
        drawn = folds
        if draw_folds is not None and not by_type:
            try:
                drawn = draw_folds(replace(labelled, codes=dealt))
            except LabelError:
                continue
            # A splitter may give another number of folds for other labels.
            drawn = drawn if len(drawn.train) == len(folds.train) else folds
        if all(len(np.unique(dealt[trained[labelled.prompt]])) > 1 for trained in drawn.train):
            return dealt, drawn
    raise InvalidArgumentError(f"control {control!r} found no labels of two classes for every fold: use fewer folds, or leave it out")


def _shuffle(labelled: LabelledTokens, unit: Ints | None, rng: np.random.Generator) -> Array:
    if labelled.by_prompt:
        used, first, of_token = np.unique(labelled.prompt, return_index=True, return_inverse=True)
        return deal_to_units(labelled.codes[first], None if unit is None else unit[used], rng)[of_token]
    of_token = labelled.prompt if unit is None else unit[labelled.prompt]
    order = np.argsort(of_token, kind="stable")
    sequences = np.split(labelled.codes[order], np.flatnonzero(np.diff(of_token[order])) + 1)
    laid = np.concatenate([sequences[place] for place in rng.permutation(len(sequences))])
    dealt = np.empty_like(labelled.codes)
    dealt[order] = np.roll(laid, int(rng.integers(len(laid))))
    return dealt


def score_by_counts(
    control: str, array: xr.DataArray, labelled: LabelledTokens, folds: TokenFolds
) -> list[tuple[Ints, Array, npt.NDArray[np.int64]]]:
    """Scores of each fold's test tokens from how often each class was seen with the same token id or position, or at all.

    The logarithm of (count + share) / (all counts + 1), the share being that of the class in the training tokens, which is what a token
    that was never seen has. Of two classes it is the difference, as a decision function has it.

    Parameters
    ----------
    control : {"token_identity", "position", "majority", "bag_of_tokens"}
        The last scores all tokens of a prompt alike, by a logistic regression on the counts of its token ids.
    array, labelled, folds
        As for `deal_labels`.

    Returns
    -------
    list of (places, scores, classes), one per fold
        Places of the test tokens among the labelled ones; scores, shape (token,) or (token, class); the numbers of the classes trained on.

    Raises
    ------
    InvalidArgumentError
        Token ids or positions are not known; or, for "bag_of_tokens", labels differ within a prompt.
    """
    if control == "bag_of_tokens":
        return _score_bags(control, array, labelled, folds)
    if control == "majority":
        number = np.zeros(len(labelled.codes), np.int64)
    else:
        values = _known(control, array, "token_id" if control == "token_identity" else "position", labelled)
        number = np.unique(values, return_inverse=True)[1]
    found = []
    for trained, tested in zip(folds.train, folds.test, strict=True):
        learned, places = trained[labelled.prompt], np.flatnonzero(tested[labelled.prompt])
        classes, codes = np.unique(labelled.codes[learned], return_inverse=True)
        counts = np.bincount(number[learned] * len(classes) + codes, minlength=(int(number.max()) + 1) * len(classes))
        counts = counts.reshape(-1, len(classes))
        share = counts.sum(axis=0) / counts.sum()
        scores = np.log((counts + share) / (counts.sum(axis=1, keepdims=True) + 1))[number[places]]
        found.append((places, scores[:, 1] - scores[:, 0] if len(classes) == 2 else scores, classes.astype(np.int64)))
    return found


def _score_bags(
    control: str, array: xr.DataArray, labelled: LabelledTokens, folds: TokenFolds
) -> list[tuple[Ints, Array, npt.NDArray[np.int64]]]:
    if not labelled.by_prompt:
        raise InvalidArgumentError(
            f"control {control!r} counts the tokens of a prompt, and labels {labelled.name!r} differ within a prompt: use 'token_identity'"
        )
    ids = _known(control, array, "token_id", labelled)
    used, first, number = np.unique(labelled.prompt, return_index=True, return_inverse=True)
    order = np.argsort(number, kind="stable")
    bags = [" ".join(map(str, each.tolist())) for each in np.split(ids[order], np.cumsum(np.bincount(number))[:-1])]
    texts, codes = np.array(bags, object), labelled.codes[first].astype(np.int64)
    found = []
    with fits_running():
        for trained, tested in zip(folds.train, folds.test, strict=True):
            bag = make_bag(control, make_probe("logistic_regression", standardise=False)).fit(texts[trained[used]], codes[trained[used]])
            places = np.flatnonzero(tested[labelled.prompt])
            scores = np.asarray(bag.decision_function(texts))[number[places]]
            found.append((places, scores, np.asarray(bag.classes_, np.int64)))
    return found


def _known(control: str, array: xr.DataArray, name: str, labelled: LabelledTokens) -> Array:
    """A whole number for each labelled token, from a coordinate that must have it for all of them."""
    if name not in array.coords or array.coords[name].dims != ("token",):
        raise InvalidArgumentError(
            f"control {control!r} needs a coordinate {name!r} along 'token', and there is none: leave the control out"
        )
    values = np.asarray(array.coords[name].values)[labelled.rows]
    unknown = int((values < 0).sum())
    if unknown:
        raise InvalidArgumentError(
            f"control {control!r} needs {name!r}, which is not known of {unknown} of {len(values)} tokens: leave it out"
        )
    return values
