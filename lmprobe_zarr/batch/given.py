"""What a caller gives as the prompts of a call, as a list, and of which kind each is. Whatever is no list of prompts is refused here.

Tables, columns and tensors of other libraries are recognised by their attributes, so none of these libraries is imported.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, KeysView, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Final, Literal, TypeGuard

import numpy as np

from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError

__all__ = ["PROMPT_KINDS", "WAYS", "PromptKind", "common_kind", "given_prompts", "is_pair", "shorten"]

PromptKind = Literal["text", "chat", "ids", "pair"]
PROMPT_KINDS: Final = ("text", "chat", "ids", "pair")
SHOWN_CHARACTERS: Final = 40
SHOWN_NAMES: Final = 5
WAYS: Final = "a prompt is a text, a list of chat messages, a flat list of token ids, or for an encoder-decoder a tuple of two texts"


def shorten(text: str) -> str:
    """The first characters of a text, quoted, for a message."""
    return repr(text) if len(text) <= SHOWN_CHARACTERS else repr(text[:SHOWN_CHARACTERS] + "…")


def given_prompts(prompts: object, name: str = "prompts") -> list[Any]:
    """The prompts of a call as a list, in the caller's order; what each of them is, is not examined.

    Parameters
    ----------
    prompts : iterable
        A list, tuple, generator, view of a dict, column of a table (pandas, polars, Arrow, datasets), or array of texts. An array or tensor
        of integers of two dimensions is a list of token ids; where it is a masked array, masked ids are left out.
    name : str
        Name of the argument, for messages.

    Raises
    ------
    InvalidTypeError
        Something that is not a list of prompts, although Python could iterate over it: a text, a mapping such as a tokenizer's output, a
        set, a table, an open file, an array without dimensions or with fields.
    """
    if isinstance(prompts, str):
        raise InvalidTypeError(f"{name} is one text, {shorten(prompts)}, and not a list of prompts: wrap it, {name}=[…]")
    if isinstance(prompts, Mapping):
        raise InvalidTypeError(f"{name} is a {_describe_mapping(prompts)}; {WAYS}")
    if isinstance(prompts, AbstractSet) and not isinstance(prompts, KeysView):
        raise InvalidTypeError(f"{name} is a {type(prompts).__name__}, which has no order: give a list of prompts, such as sorted({name})")
    if isinstance(prompts, io.IOBase):
        raise InvalidTypeError(
            f"{name} is an open file, whose lines end in a line break: give a list of prompts, [line.strip() for line in file]"
        )
    if _is_table(prompts):
        raise InvalidTypeError(
            f"{name} is a {type(prompts).__name__}, a table{_shown_columns(prompts)}: give a list of prompts, such as one of its columns"
        )
    if isinstance(prompts, bytes | bytearray | memoryview) or not isinstance(prompts, Iterable):
        raise InvalidTypeError(f"{name} is a {type(prompts).__name__}: give a list of prompts; {WAYS}")
    return _list_of(prompts, name)


def _describe_mapping(given: Mapping[Any, Any]) -> str:
    """The type of a mapping, and what to give instead of it."""
    kind = type(given).__name__
    if "input_ids" in given:
        return (
            f"{kind} with 'input_ids', a tokenizer's output: give a list of prompts, the texts themselves or the token ids of each without "
            "padding, [ids[mask == 1] for ids, mask in zip(input_ids, attention_mask)]"
        )
    if "role" in given and "content" in given:
        return f"{kind} with 'role' and 'content', a single chat message: give a list of chats, [[message, …], …]"
    names = ", ".join(repr(key) for key in list(given)[:SHOWN_NAMES]) or "nothing"
    return f"{kind} of {names}: give a list of prompts, such as one of its values"


def _is_table(given: object) -> bool:
    """Whether this is a table, such as a data frame; iterating over it would give names of columns, whole columns or rows."""
    if getattr(given, "ndim", 1) == 2 and hasattr(given, "iloc"):
        return True
    if isinstance(given, np.ndarray):
        return given.dtype.names is not None
    return hasattr(type(given), "columns") or hasattr(type(given), "column_names")


def _shown_columns(table: Any) -> str:
    """The first names of its columns, in brackets, if they are cheap to know."""
    if isinstance(table, np.ndarray):
        names: Any = table.dtype.names
    else:
        with warnings.catch_warnings():  # a lazy frame warns that it has to look
            warnings.simplefilter("ignore")
            names = getattr(table, "column_names", None)
            names = getattr(table, "columns", None) if names is None else names
    try:
        listed = [repr(str(name)) for name in list(names)[:SHOWN_NAMES]]
    except TypeError:
        return ""
    return f" ({', '.join(listed)})" if listed else ""


def _list_of(prompts: Any, name: str) -> list[Any]:
    if hasattr(prompts, "__dask_graph__") and hasattr(prompts, "compute"):
        prompts = prompts.compute()
    if hasattr(prompts, "to_pylist"):  # a column of Arrow gives scalars of its own when iterated over
        return list(prompts.to_pylist())
    if getattr(prompts, "is_nested", False) is True:  # tensors of several lengths in one
        return list(prompts.unbind())
    if hasattr(prompts, "detach"):
        prompts = prompts.detach().cpu().numpy()
    elif hasattr(prompts, "dims") and hasattr(prompts, "values"):
        prompts = prompts.values
    if not isinstance(prompts, np.ndarray):
        return list(prompts)
    if prompts.ndim == 0:
        raise InvalidTypeError(f"{name} is an array without dimensions: give a list of prompts; {WAYS}")
    if prompts.ndim > 1 and prompts.dtype.kind not in "iufcb":
        raise InvalidTypeError(f"{name} is an array of shape {prompts.shape}: give a flat list of prompts, such as {name}.ravel()")
    if isinstance(prompts, np.ma.MaskedArray):
        if prompts.ndim == 1 and np.ma.getmaskarray(prompts).any():
            raise InvalidTypeError(f"{name} has masked entries: leave them out, {name}.compressed()")
        return [row.compressed() for row in prompts] if prompts.ndim == 2 else list(prompts.filled())
    return list(prompts)


# --------------------------------------------------------------------------------------------------------- kinds of prompts


def _is_chat(prompt: object) -> bool:
    """Whether this is a list of messages; files of Parquet give arrays of them."""
    if not isinstance(prompt, Sequence | np.ndarray) or isinstance(prompt, str | bytes):
        return False
    return (not isinstance(prompt, np.ndarray) or prompt.ndim == 1) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def is_pair(prompt: object) -> TypeGuard[tuple[str, str]]:
    """Whether this is a tuple of two texts, one for an encoder and one for its decoder. A list may be meant as a list of prompts."""
    return isinstance(prompt, tuple) and len(prompt) == 2 and all(isinstance(text, str) for text in prompt)


def _is_number(prompt: object) -> bool:
    if isinstance(prompt, int | np.integer):
        return not isinstance(prompt, bool)
    return hasattr(prompt, "detach") and getattr(prompt, "ndim", None) == 0


def _kind_of(prompt: object, number: int) -> PromptKind:
    if isinstance(prompt, str):
        if not prompt:
            raise InvalidArgumentError(f"prompts[{number}] is empty: leave it out, or give at least one character")
        return "text"
    if isinstance(prompt, Mapping):
        raise InvalidTypeError(f"prompts[{number}] is {_describe_row(prompt)}")
    if _is_number(prompt):
        raise InvalidTypeError(
            f"prompts[{number}] is the number {prompt!r}: wrap the token ids of each prompt in a list, prompts=[[1, 2, 3]]"
        )
    if _is_chat(prompt):
        return "chat"
    if is_pair(prompt):
        if not all(prompt):
            raise InvalidArgumentError(f"prompts[{number}] is a pair with an empty text: give at least one character for each side")
        return "pair"
    if isinstance(prompt, Sequence | np.ndarray) and not isinstance(prompt, bytes | bytearray | memoryview):
        return "ids"
    if hasattr(prompt, "detach"):
        return "ids"
    hint = ""
    if isinstance(prompt, bytes | bytearray):
        hint = "decode it, prompt.decode(); "
    elif prompt is None or type(prompt).__name__ in ("NAType", "NaTType") or (isinstance(prompt, float | np.floating) and np.isnan(prompt)):
        hint = "leave out missing prompts; "
    elif hasattr(prompt, "ids") and hasattr(prompt, "attention_mask"):
        hint = "give its ids without padding; "
    raise InvalidTypeError(f"prompts[{number}] is a {type(prompt).__name__}: {hint}{WAYS}")


def _describe_row(prompt: Mapping[Any, Any]) -> str:
    """What a mapping is that was given as one prompt, and what to give instead."""
    kind = type(prompt).__name__
    if "role" in prompt and "content" in prompt:
        return "a single chat message: wrap each conversation in a list, prompts=[[message, …], …]"
    if "input_ids" in prompt:
        return f"a {kind} with 'input_ids', a tokenizer's output: give the text, or the token ids without padding"
    names = ", ".join(repr(key) for key in list(prompt)[:SHOWN_NAMES]) or "nothing"
    return f"a {kind} of {names}, a row of a table: give one of its values; {WAYS}"


def common_kind(given: list[Any]) -> PromptKind:
    """The kind that all prompts are of.

    Raises
    ------
    InvalidTypeError, InvalidArgumentError
        No prompt, something that is no prompt, or several kinds.
    """
    if not given:
        raise InvalidArgumentError("prompts is empty: give at least one prompt")
    kinds = [_kind_of(prompt, number) for number, prompt in enumerate(given)]
    for number, kind in enumerate(kinds):
        if kind != kinds[0]:
            words = {"text": "a text", "chat": "a chat", "ids": "token ids", "pair": "a pair of texts"}
            raise InvalidTypeError(
                f"prompts[0] is {words[kinds[0]]} but prompts[{number}] is {words[kind]}: one call takes one kind of prompt"
            )
    return kinds[0]
