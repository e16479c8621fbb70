"""Bags of words and of tokens: what word controls count, and the estimators that count it. Never activations, fits or scores.

A bag is a text per prompt. Of words it is the prompt's own text; of tokens its token ids as numbers with spaces between, from a table of
the model's own tokenizer, which cuts every script into what the model itself reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import numpy as np
import xarray as xr

from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.probes.identity import list_prompts, show_prompts
from lmprobe_zarr.probes.labels import align_column
from lmprobe_zarr.tokens import check_listed, prompts_of
from lmprobe_zarr.typing import Array

__all__ = ["BAGS", "BAGS_OF_TOKENS", "make_bag", "read_token_ids"]

#: Controls whose features are texts.
BAGS_OF_TOKENS: Final[Mapping[str, str]] = {
    "bag_of_tokens": "logistic regression on counts of the model's own tokens",
    "tfidf_of_tokens": "logistic regression on the same counts by how rare each is (TF-IDF)",
}
BAGS: Final = ("text", *BAGS_OF_TOKENS)

#: A word of any length, a character of a script that puts no spaces between words (Thai, Lao, Burmese, Khmer, Chinese, Japanese), a mark of
#: punctuation or any other symbol, or white space other than a single space. So nothing of a text is left out that may tell its label.
_WORDS: Final = (
    r"(?u)[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\ua4cf\uf900-\ufaff\U00020000-\U0003ffff]"
    r"|[^\W\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\ua4cf\uf900-\ufaff\U00020000-\U0003ffff]+"
    r"|[^\w\s]|\s{2,}|[^\S ]"
)
_IDS: Final = r"\d+"


def make_bag(control: str, estimator: Any) -> Any:
    """The estimator on counts of what a word control sees."""
    from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
    from sklearn.pipeline import make_pipeline

    options = {"token_pattern": _IDS if control in BAGS_OF_TOKENS else _WORDS, "lowercase": False}
    counts = TfidfVectorizer(**options) if control.startswith("tfidf") else CountVectorizer(**options)
    return make_pipeline(counts, estimator)


def read_token_ids(name: str, given: Any, array: xr.DataArray, dataset: xr.Dataset | None, rows: Array) -> list[str]:
    """The token ids of every prompt, as one text each.

    Parameters
    ----------
    name : str
        The control, for messages.
    given : DataArray, Dataset, mapping, sequence, or None
        Tokens with the coordinates ``prompt`` and ``token_id``, as ``store.tokens()`` has them, matched by prompt; a mapping from text or
        prompt hash to the ids; or the ids of each prompt in the order of the rows. None: the dataset or the array has them by the name
        ``token_id``, over ``prompt`` as lists, or over ``prompt`` and one more dimension, in which a negative id stands for none.
    array : DataArray over prompt
        Whose coordinates are read.
    dataset : Dataset, optional
        What the activations are a variable of.
    rows : ndarray of int
        The prompts that must have ids.

    Raises
    ------
    InvalidTypeError, InvalidArgumentError
        Something else, or prompts without ids.
    """
    listed: list[Any] | None
    if isinstance(given, xr.DataArray | xr.Dataset):
        listed = _of_tokens(name, given, array)
    elif isinstance(given, Mapping):
        places = {key: number for number, key in enumerate(given)}
        values, ids = align_column(array, places, "token ids").values, list(given.values())
        listed = [None if place is None else ids[int(place)] for place in values]
    elif given is not None:
        check_listed(array, given, f"the token ids of control {name!r}")
        listed = list(given) if isinstance(given, Iterable) and not isinstance(given, str | bytes) else [None]
        if len(listed) != array.sizes["prompt"]:
            raise InvalidArgumentError(
                f"control {name!r} has the token ids of {len(listed)} prompts, expected {array.sizes['prompt']}: give a list for each"
            )
    else:
        listed = _of_columns(array, dataset)
    if listed is None:
        raise InvalidArgumentError(
            f"control {name!r} needs the prompts' token ids, which are not there: give them with {{{name!r}: store.tokens()}}, or give a "
            "list of ids for each prompt"
        )
    bags = ["" if ids is None else _as_text(name, ids) for ids in listed]
    without = [int(row) for row in rows if not bags[row]]
    if without:
        raise InvalidArgumentError(
            f"control {name!r} needs the prompts' token ids, which {len(without)} of {len(rows)} prompts lack "
            f"({show_prompts(array, without)}): extract their tokens, or leave it out"
        )
    return bags


def _of_columns(array: xr.DataArray, dataset: xr.Dataset | None) -> list[Any] | None:
    """The ids that activations carry, None where there are none."""
    for held in (array.coords, {} if dataset is None else dataset):
        column = held.get("token_id")
        if column is not None and column.dims == ("prompt",) and column.dtype == object:
            return list(column.values)
        if column is not None and column.ndim == 2 and "prompt" in column.dims:
            return [ids[ids >= 0] for ids in column.transpose("prompt", ...).values]
    return None


def _of_tokens(name: str, given: xr.DataArray | xr.Dataset, array: xr.DataArray) -> list[Any]:
    """The ids of each of the array's prompts, None where there are none, from an array or dataset of tokens."""
    if "token_id" not in given.coords or given.coords["token_id"].ndim != 1:
        raise InvalidArgumentError(
            f"control {name!r} was given tokens without a coordinate 'token_id' along them (coordinates "
            f"{', '.join(map(str, given.coords)) or 'none'}): give store.tokens(), or lists of ids"
        )
    ids = given.coords["token_id"]
    if "prompt" not in array.coords:
        raise InvalidArgumentError(f"control {name!r} cannot match tokens to activations without a coordinate 'prompt': give lists of ids")
    numbers, prompts = prompts_of(ids, str(ids.dims[0]))
    order = np.argsort(numbers, kind="stable")
    sorted_ids = np.asarray(ids.values)[order]
    of_prompt = np.split(sorted_ids, np.cumsum(np.bincount(numbers, minlength=len(prompts)))[:-1])
    # An unknown id leaves the bag of its prompt incomplete.
    known = {str(prompt): held for prompt, held in zip(prompts, of_prompt, strict=True) if len(held) and (held >= 0).all()}
    return [known.get(prompt) for prompt in list_prompts(array)]


def _as_text(name: str, ids: Any) -> str:
    values = np.asarray(ids)
    if values.ndim != 1 or (values.size and (values.dtype.kind not in "iu" or values.min() < 0)):
        raise InvalidTypeError(f"control {name!r} was given {ids!r:.60} as the token ids of a prompt: give whole numbers of at least 0")
    return " ".join(map(str, values.tolist()))
