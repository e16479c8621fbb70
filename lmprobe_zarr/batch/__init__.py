"""`TokenBatch`, which every source of activations gives to a writer, and its vocabulary: prompts, layers, sites, poolings, precision.

Numpy and names only: never files, xarray, torch or zarr. Other rooms import from this face.
"""

from lmprobe_zarr.batch.aligned import align_columns, columns_by_key
from lmprobe_zarr.batch.chats import NO_CHAT_OPTIONS, ChatOptions, parse_chat_options, unused_arguments
from lmprobe_zarr.batch.columns import (
    ANY_KIND,
    Column,
    ColumnKind,
    KindName,
    check_texts,
    fit_column,
    has_utf8,
    is_wide,
    join_columns,
    merge_kinds,
    show_value,
)
from lmprobe_zarr.batch.given import PROMPT_KINDS, PromptKind, given_prompts, is_pair, shorten
from lmprobe_zarr.batch.hashes import (
    HASH_DIGITS,
    UNKNOWN_DIGITS,
    digest_of_hash,
    digests_of,
    hashes_of,
    is_hash,
    keys_of,
    prompt_hash,
    prompt_sha256,
    rows_differ,
    sha256_of,
)
from lmprobe_zarr.batch.layers import LayerSpec, choose_layers, describe_layers, parse_sweep, resolve_layers
from lmprobe_zarr.batch.options import check_flag, check_word, list_names
from lmprobe_zarr.batch.parse_column import parse_column, with_encoder_texts
from lmprobe_zarr.batch.pooling import POOLINGS, parse_poolings, pool_ragged
from lmprobe_zarr.batch.precision import Precision, count_odd, fill_value, round_bits, store_as
from lmprobe_zarr.batch.prompts import Prompts, parse_prompts, prompts_kind
from lmprobe_zarr.batch.ragged import as_slice, concat_ranges, offsets_of, positions_of
from lmprobe_zarr.batch.sites import (
    INNER_DIMS,
    LAYERED_SITES,
    LOGITS_POSITIONS,
    NO_OUTPUTS,
    SCALARS,
    SITES,
    STATISTICS,
    Outputs,
    is_top_k,
    parse_sites,
    row_bytes,
    split_variable,
)
from lmprobe_zarr.batch.stages import Stage, parse_stage, reduce_scores
from lmprobe_zarr.batch.token_batch import TokenBatch
from lmprobe_zarr.batch.tokenizer_calls import accepted, decode_ids, special_id
from lmprobe_zarr.batch.widening import copy_rows, widen

__all__ = [
    "ANY_KIND",
    "HASH_DIGITS",
    "INNER_DIMS",
    "LAYERED_SITES",
    "LOGITS_POSITIONS",
    "NO_CHAT_OPTIONS",
    "NO_OUTPUTS",
    "POOLINGS",
    "PROMPT_KINDS",
    "SCALARS",
    "SITES",
    "STATISTICS",
    "UNKNOWN_DIGITS",
    "ChatOptions",
    "Column",
    "ColumnKind",
    "KindName",
    "LayerSpec",
    "Outputs",
    "Precision",
    "PromptKind",
    "Prompts",
    "Stage",
    "TokenBatch",
    "accepted",
    "align_columns",
    "as_slice",
    "check_flag",
    "check_texts",
    "check_word",
    "choose_layers",
    "columns_by_key",
    "concat_ranges",
    "copy_rows",
    "count_odd",
    "decode_ids",
    "describe_layers",
    "digest_of_hash",
    "digests_of",
    "fill_value",
    "fit_column",
    "given_prompts",
    "has_utf8",
    "hashes_of",
    "is_hash",
    "is_pair",
    "is_top_k",
    "is_wide",
    "join_columns",
    "keys_of",
    "list_names",
    "merge_kinds",
    "offsets_of",
    "parse_chat_options",
    "parse_column",
    "parse_poolings",
    "parse_prompts",
    "parse_sites",
    "parse_stage",
    "parse_sweep",
    "pool_ragged",
    "positions_of",
    "prompt_hash",
    "prompt_sha256",
    "prompts_kind",
    "reduce_scores",
    "resolve_layers",
    "round_bits",
    "row_bytes",
    "rows_differ",
    "sha256_of",
    "shorten",
    "show_value",
    "special_id",
    "split_variable",
    "store_as",
    "unused_arguments",
    "widen",
    "with_encoder_texts",
]
