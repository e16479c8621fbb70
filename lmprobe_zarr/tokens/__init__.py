"""Ragged token axes in xarray: the index over prompt and position, tokens pooled and padded back to prompts, masks of tokens.

Never a store, never a fit.
"""

from lmprobe_zarr.tokens.index import TokenIndex, by_appearance
from lmprobe_zarr.tokens.lazy import TakenArray, lazy_variable, tidy_key
from lmprobe_zarr.tokens.masks import mask_tokens
from lmprobe_zarr.tokens.prompts import OF_TOKENS, T, one_per_prompt, pool_values, prompts_of, renamed, token_texts

__all__ = [
    "OF_TOKENS",
    "T",
    "TakenArray",
    "TokenIndex",
    "by_appearance",
    "lazy_variable",
    "mask_tokens",
    "one_per_prompt",
    "pool_values",
    "prompts_of",
    "renamed",
    "tidy_key",
    "token_texts",
]
