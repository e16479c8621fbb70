"""Calls of tokenizers that may refuse arguments which they do not know. Never imports a tokenizer's library."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from lmprobe_zarr.typing import Ints

__all__ = ["accepted", "decode_ids"]


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
