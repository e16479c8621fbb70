"""The places in a model where values are taken, and what a row of them weighs. Names and integers only.

Beside the sites, what a model says of its input: ``logits`` of its head, for every token or, as ``logits_last_token``, for the last one of each
prompt, whole or only the largest of them (``…_top_k_values``, ``…_top_k_indices``); ``token_log_prob``, the natural logarithm of the probability
of each token after those before it, and ``token_perplexity``, its exponential with the sign turned, both NaN for the first token of a prompt;
``perplexity``, per prompt the mean, least and greatest of `STATISTICS`; and ``router``, a mixture of experts' scores of its experts by layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.pooling import parse_poolings

__all__ = ["INNER_DIMS", "LAYERED_SITES", "SCALARS", "SITES", "STATISTICS", "RowBytes", "is_top_k", "parse_sites", "row_bytes"]

LAYERED_SITES: Final = ("resid", "attn", "mlp")
SITES: Final = (*LAYERED_SITES, "embed")
# lmprobe's three, in its order: the exponential of the mean, the least and the greatest negative log-probability of the tokens.
STATISTICS: Final = ("mean", "min", "max")
# One number per token: variables without a further axis.
SCALARS: Final = ("token_perplexity", "token_log_prob")
# What a row holds, where it is not the hidden units of a site.
INNER_DIMS: Final[Mapping[str, str]] = {
    "perplexity": "statistic",
    "logits": "vocab",
    "logits_top_k_values": "top_k",
    "logits_top_k_indices": "top_k",
    "logits_last_token": "vocab",
    "logits_last_token_top_k_values": "top_k",
    "logits_last_token_top_k_indices": "top_k",
    "router": "expert",
}
ITEM_BYTES: Final = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def parse_sites(sites: str | Sequence[str]) -> tuple[str, ...]:
    """Site names as a tuple without repeats, in the given order.

    Raises
    ------
    InvalidArgumentError
        A name is none of ``resid, attn, mlp, embed``, or there is none.
    """
    names = (sites,) if isinstance(sites, str) else tuple(sites)
    for name in names:
        if name not in SITES:
            raise InvalidArgumentError(f"unknown site {name!r}: choose from {', '.join(SITES)}")
    if not names:
        raise InvalidArgumentError(f"sites is empty: choose from {', '.join(SITES)}")
    return tuple(dict.fromkeys(names))


def is_top_k(variable: str) -> bool:
    """Whether a variable's rows may be of another length in every part: the largest few of many."""
    return INNER_DIMS.get(variable) == "top_k"


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBytes:
    """What extracted activations weigh, before compression.

    Parameters
    ----------
    token : int
        Bytes per token; 0 where tokens are not kept.
    prompt : int
        Bytes per prompt, beside its tokens.
    dtype : str
        Dtype of the arrays: bfloat16 is held, exactly, in float32.
    source_dtype : str
        Dtype that the model computes in.
    """

    token: int
    prompt: int
    dtype: str
    source_dtype: str

    def total(self, prompts: int, tokens: int) -> int:
        """Bytes of so many prompts with so many tokens together."""
        return self.token * tokens + self.prompt * prompts


def row_bytes(
    *, layers: int, hidden_size: int, dtype: str, sites: str | Sequence[str], pooling: str | Sequence[str], keep_tokens: bool
) -> RowBytes:
    """What one token and one prompt weigh, from a model's size alone.

    Parameters
    ----------
    layers : int
        How many layers are asked for.
    hidden_size : int
    dtype : {"float32", "float16", "bfloat16", "float64"}
        What the model computes in.
    sites, pooling, keep_tokens
        As for :func:`~lmprobe_zarr.extraction.run`.

    Raises
    ------
    InvalidArgumentError
        Unknown site, pooling or dtype.
    """
    if dtype not in ITEM_BYTES:
        raise InvalidArgumentError(f"dtype={dtype!r} is unknown: use one of {', '.join(map(repr, ITEM_BYTES))}")
    names = parse_sites(sites)
    poolings = parse_poolings(pooling if isinstance(pooling, str) else tuple(pooling))
    held = "float32" if dtype == "bfloat16" else dtype
    vectors = sum(layers if name in LAYERED_SITES else 1 for name in names)
    row = vectors * hidden_size * ITEM_BYTES[held]
    return RowBytes(token=row if keep_tokens else 0, prompt=row * len(poolings), dtype=held, source_dtype=dtype)
