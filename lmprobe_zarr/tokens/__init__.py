"""Ragged token axes in xarray: the index over prompt and position, lazy labels, tokens back to prompts, masks of tokens.

Never a store, never a fit. Everything that others use is in this face.
"""

from lmprobe_zarr.tokens.index import TokenIndex, by_appearance
from lmprobe_zarr.tokens.lazy import ColumnVariable, LazyVariable, TakenArray, lazy_variable, protect, tidy_key, unwrapped, with_columns
from lmprobe_zarr.tokens.masks import mask_tokens
from lmprobe_zarr.tokens.prompts import pad_tokens, pool_tokens, prompts_of, token_texts, tokens_at

__all__ = [
    "ColumnVariable",
    "LazyVariable",
    "TakenArray",
    "TokenIndex",
    "by_appearance",
    "lazy_variable",
    "mask_tokens",
    "pad_tokens",
    "pool_tokens",
    "prompts_of",
    "protect",
    "tidy_key",
    "token_texts",
    "tokens_at",
    "unwrapped",
    "with_columns",
]
