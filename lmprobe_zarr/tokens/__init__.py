"""Ragged token axes in xarray: the index over prompt and position, lazy labels, tokens back to prompts, masks of tokens, order of rows, the
inner dimension.

Never a store, never a fit. Everything that others use is in this face.
"""

from lmprobe_zarr.tokens.index import INDEXED_COLUMNS, TokenIndex, by_appearance, without_coordinates
from lmprobe_zarr.tokens.inner import find_inner_dim, inner_dim, is_inner_dim, is_ranked, without_absent_layers
from lmprobe_zarr.tokens.lazy import (
    ColumnVariable,
    LazyVariable,
    TakenArray,
    kept_in_memory,
    lazy_variable,
    protect,
    stored_rows,
    tidy_key,
    unwrapped,
    with_columns,
)
from lmprobe_zarr.tokens.masks import mask_tokens
from lmprobe_zarr.tokens.prompt_labels import prompt_coordinates
from lmprobe_zarr.tokens.prompts import pad_tokens, pool_tokens, prompts_of, sequences_of, token_texts, tokens_at
from lmprobe_zarr.tokens.row_order import SEVERAL_CALLS, check_listed, is_in_known_order, order_attributes

__all__ = [
    "INDEXED_COLUMNS",
    "SEVERAL_CALLS",
    "ColumnVariable",
    "LazyVariable",
    "TakenArray",
    "TokenIndex",
    "by_appearance",
    "check_listed",
    "find_inner_dim",
    "inner_dim",
    "is_in_known_order",
    "is_inner_dim",
    "is_ranked",
    "kept_in_memory",
    "lazy_variable",
    "mask_tokens",
    "order_attributes",
    "pad_tokens",
    "pool_tokens",
    "prompt_coordinates",
    "prompts_of",
    "protect",
    "sequences_of",
    "stored_rows",
    "tidy_key",
    "token_texts",
    "tokens_at",
    "unwrapped",
    "with_columns",
    "without_absent_layers",
    "without_coordinates",
]
