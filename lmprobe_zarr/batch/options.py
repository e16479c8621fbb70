"""Options of calls that are a truth value, a word or some names, checked in one place. Knows nothing of what they are for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.typing import is_listed

__all__ = ["check_flag", "check_word", "list_names"]


def check_flag(option: str, value: Any) -> bool:
    """The truth value of an option; a text such as "False", which Python takes for true, is an error.

    Raises
    ------
    InvalidTypeError
        Neither True nor False.
    """
    if not isinstance(value, bool | np.bool_):
        raise InvalidTypeError(f"{option}={value!r:.60} is no truth value: give True or False")
    return bool(value)


def check_word(option: str, value: Any, words: Iterable[str]) -> str:
    """The value of an option that is one of some words.

    Raises
    ------
    InvalidArgumentError
        It is none of them.
    """
    listed = list(words)
    if not isinstance(value, str) or value not in listed:
        raise InvalidArgumentError(f"{option}={value!r:.60} is unknown: use {' or '.join(map(repr, listed))}")
    return value


def list_names(option: str, value: Any, example: str) -> list[str]:
    """The names that an option holds, which is one name or several.

    Raises
    ------
    InvalidTypeError
        Neither a text nor an iterable of texts.
    """
    names = [value] if isinstance(value, str) else list(value) if is_listed(value) else None
    if names is None or not all(isinstance(name, str) for name in names):
        raise InvalidTypeError(f"{option}={value!r:.60} holds no names: give one or several, such as {example!r}")
    return [str(name) for name in names]
