"""Which rows are of one prompt: within an array, and across arrays. Reads coordinates alone.

A prompt is known by its hash, which the coordinate ``prompt`` holds, or by its text. The number of a row says nothing outside of its array.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable
from typing import Any, Final

import numpy as np
import pandas as pd
import xarray as xr

from lmprobe_zarr.batch import prompt_hash
from lmprobe_zarr.errors import LabelError
from lmprobe_zarr.interchange import AbsentText
from lmprobe_zarr.typing import Array

__all__ = ["by_prompt", "is_missing", "list_prompts", "prompt_names", "show_prompts", "unseen_rows"]

_SHOWN: Final = 3
_HASH: Final = re.compile("[0-9a-f]{16}")


def list_prompts(array: xr.DataArray) -> list[str]:
    """What tells the prompt of each row from those of other rows of this array: its label, else the hash of its text, else its number."""
    n = array.sizes["prompt"]
    if "prompt" in array.coords:
        # tolist, because zarr gives texts as numpy's StringDType, which can neither be cast to str nor sorted with others.
        return [str(value) for value in array.coords["prompt"].values.tolist()]
    return [str(row) if text is None else prompt_hash(text) for row, text in enumerate(_texts(array, n))]


def prompt_names(array: xr.DataArray) -> list[frozenset[str]]:
    """Under which names the prompt of each row may be found in other arrays; none where nothing but its number is known.

    Numbers along ``prompt`` count the rows of an array, as xarray and pandas do, and are no names.

    Returns
    -------
    list of frozenset of str
        Its hash, and a label that is a text.
    """
    n = array.sizes["prompt"]
    labels = array.coords["prompt"].values.tolist() if "prompt" in array.coords else [None] * n
    found = []
    for label, text in zip(labels, _texts(array, n), strict=True):
        names = set() if text is None else {prompt_hash(text)}
        if isinstance(label, str) and label:
            names |= {label} if _HASH.fullmatch(label) else {label, prompt_hash(label)}
        found.append(frozenset(names))
    return found


def _texts(array: xr.DataArray, n: int) -> list[str | None]:
    """The text of each row, None where it has none."""
    if "text" not in array.coords or array.coords["text"].dims != ("prompt",):
        return [None] * n
    return [text if isinstance(text, str) and text else None for text in array.coords["text"].values.tolist()]


def show_prompts(array: xr.DataArray, rows: Iterable[int]) -> str:
    """The hashes of the first few of these prompts, for messages; never their texts."""
    rows = list(rows)
    prompts = list_prompts(array)
    shown = ", ".join(prompts[row] if "prompt" in array.coords else f"row {row}" for row in rows[:_SHOWN])
    return shown + (", …" if len(rows) > _SHOWN else "")


def by_prompt(pairs: Iterable[tuple[str, Any]], noun: str) -> dict[str, Any]:
    """Prompt to value; a repeated prompt must have the same value each time.

    Raises
    ------
    LabelError
        A prompt has two values.
    """
    found: dict[str, Any] = {}
    for prompt, value in pairs:
        if prompt in found and not (is_missing(value) and is_missing(found[prompt])) and not _equal(found[prompt], value):
            raise LabelError(
                f"prompt {prompt} has two {noun}s, {reprlib.repr(found[prompt])} and {reprlib.repr(value)}: give each prompt one"
            )
        found[prompt] = value
    return found


def _equal(first: Any, second: Any) -> bool:
    return np.array_equal(first, second) if isinstance(first, np.ndarray) or isinstance(second, np.ndarray) else bool(first == second)


def is_missing(value: Any) -> bool:
    """Whether a value stands for none: None, NaN, NaT, pandas' NA, or a text that an older store did not have."""
    return isinstance(value, AbsentText) or (bool(pd.isna(value)) if pd.api.types.is_scalar(value) else False)


def unseen_rows(train: list[frozenset[str]], test: list[frozenset[str]]) -> Array:
    """The places of the prompts of one dataset that another one does not hold, by `prompt_names`."""
    known = frozenset().union(*train)
    return np.array([row for row, names in enumerate(test) if not names & known], dtype=np.intp)
