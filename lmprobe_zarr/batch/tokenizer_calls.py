"""Calls of tokenizers that may refuse arguments which they do not know. Never imports a tokenizer's library."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from lmprobe_zarr.typing import Ints

__all__ = ["accepted", "decode_ids", "special_id"]


def accepted(function: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """Those options that a function names in its signature. What it takes as ``**kwargs`` it may refuse, so such options are left out."""
    try:
        known = inspect.signature(function).parameters
    except (TypeError, ValueError):  # compiled code need not have a signature
        return {}
    return {name: value for name, value in options.items() if name in known}


def decode_ids(tokenizer: Any, ids: Ints) -> str:
    """The text of token ids, special tokens and spaces as they are."""
    options = accepted(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return str(tokenizer.decode(ids.tolist(), **options))


def special_id(tokenizer: Any, name: str) -> int | None:
    """The id of a special token, such as ``bos_token``; None if there is none. Older transformers log an error for those not set."""
    known = getattr(tokenizer, "special_tokens_map", None)
    if isinstance(known, Mapping) and known and name not in known:
        return None
    found = getattr(tokenizer, f"{name}_id", None)
    return found if isinstance(found, int) and not isinstance(found, bool) else None
