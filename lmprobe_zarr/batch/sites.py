"""The places in a model where values are taken, and what a row of them weighs. Names and integers only.

Beside the sites, what a model says of its input: ``logits`` of its head, for every token or, as ``logits_last_token``, for the last one of
each prompt, whole or only the largest of them (``…_top_k_values``, ``…_top_k_indices``); ``token_log_prob``, the natural logarithm of the
probability of each token after those before it, and ``token_perplexity``, its exponential with the sign turned, both NaN for the first
token of a prompt; ``perplexity``, per prompt the mean, least and greatest of `STATISTICS`; and ``router``, a mixture of experts' scores of
its experts by layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from lmprobe_zarr.batch.pooling import POOLINGS, parse_poolings
from lmprobe_zarr.errors import InvalidArgumentError

__all__ = [
    "INNER_DIMS",
    "LAYERED_SITES",
    "LOGITS_POSITIONS",
    "SCALARS",
    "SITES",
    "STATISTICS",
    "Outputs",
    "RowBytes",
    "is_top_k",
    "parse_sites",
    "row_bytes",
    "split_variable",
]


def split_variable(variable: str) -> tuple[str, str | None]:
    """Site and pooling of a variable's name: ``"resid_last_token"`` gives ``("resid", "last_token")``."""
    for pooling in POOLINGS:
        if variable.endswith(f"_{pooling}"):
            return variable.removesuffix(f"_{pooling}"), pooling
    return variable, None


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
LOGITS_POSITIONS: Final = ("last_token", "all")
INDEX_BYTES: Final = 4
SCALAR_BYTES: Final = 4
ITEM_BYTES: Final = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """What to keep of what a model says, beside its activations. False where nothing is.

    Parameters
    ----------
    perplexity : bool
        ``perplexity`` of every prompt, ``token_perplexity`` and ``token_log_prob`` of every token.
    logits : {None, "last_token", "all"}
        The head's logits: none, those at the last token of every prompt, or those at every token.
    top_k : int, optional
        Only so many of the logits, the largest, with their token ids; None: all of them.
    router : bool
        Every expert's raw score in a mixture of experts, by layer and token.

    Raises
    ------
    InvalidArgumentError
        Unknown position, a `top_k` below 1, or one without `logits`.
    """

    perplexity: bool = False
    logits: Literal["last_token", "all"] | None = None
    top_k: int | None = None
    router: bool = False

    def __post_init__(self) -> None:
        if self.logits is not None and self.logits not in LOGITS_POSITIONS:
            raise InvalidArgumentError(f"logits={self.logits!r} is unknown: use None, {', '.join(map(repr, LOGITS_POSITIONS))}")
        if self.top_k is None:
            return
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 1:
            raise InvalidArgumentError(f"top_k={self.top_k!r} is no number of logits: give a whole number of at least 1, or None for all")
        if self.logits is None:
            raise InvalidArgumentError(f"top_k={self.top_k} was given without logits: add logits='last_token' or 'all', or leave it out")

    def __bool__(self) -> bool:
        return self.needs_head or self.router

    @property
    def needs_head(self) -> bool:
        """Whether the projection onto the vocabulary has to run."""
        return self.perplexity or self.logits is not None

    @property
    def token_level(self) -> bool:
        """Whether anything is kept of every token."""
        return self.perplexity or self.logits == "all" or self.router

    def variables(self) -> list[tuple[str, str, bool]]:
        """What is stored: level (``prompts`` or ``tokens``), name, and whether it has a layer axis."""
        found = []
        if self.perplexity:
            found += [("prompts", "perplexity", False), ("tokens", "token_perplexity", False), ("tokens", "token_log_prob", False)]
        if self.logits is not None:
            level, name = ("tokens", "logits") if self.logits == "all" else ("prompts", "logits_last_token")
            names = [name] if self.top_k is None else [f"{name}_top_k_values", f"{name}_top_k_indices"]
            found += [(level, each, False) for each in names]
        if self.router:
            found.append(("tokens", "router", True))
        return found


NO_OUTPUTS: Final = Outputs()


def parse_sites(sites: str | Sequence[str], outputs: Outputs = NO_OUTPUTS) -> tuple[str, ...]:
    """Site names as a tuple without repeats, in the given order; empty only where `outputs` are asked for instead.

    Raises
    ------
    InvalidArgumentError
        A name is none of ``resid, attn, mlp, embed``, or there is none.
    """
    names = (sites,) if isinstance(sites, str) else tuple(sites)
    for name in names:
        if name not in SITES:
            raise InvalidArgumentError(f"unknown site {name!r}: choose from {', '.join(SITES)}")
    if not names and not outputs:
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
    *,
    layers: int,
    hidden_size: int,
    dtype: str,
    sites: str | Sequence[str],
    pooling: str | Sequence[str],
    keep_tokens: bool,
    outputs: Outputs = NO_OUTPUTS,
    vocab_size: int | None = None,
    experts: int | None = None,
) -> RowBytes:
    """What one token and one prompt weigh, from a model's size alone.

    Parameters
    ----------
    layers : int
        How many layers are asked for.
    hidden_size : int
    dtype : {"float32", "float16", "bfloat16", "float64"}
        What the model computes in.
    sites, pooling, keep_tokens, outputs
        As for :func:`~lmprobe_zarr.extraction.run`.
    vocab_size : int, optional
        Logits per row. Without it, whole logits weigh nothing here.
    experts : int, optional
        Scores per router, taken to be in every layer. Without it, they weigh nothing here.

    Raises
    ------
    InvalidArgumentError
        Unknown site, pooling or dtype.
    """
    if dtype not in ITEM_BYTES:
        raise InvalidArgumentError(f"dtype={dtype!r} is unknown: use one of {', '.join(map(repr, ITEM_BYTES))}")
    names = parse_sites(sites, outputs)
    poolings = parse_poolings(pooling if isinstance(pooling, str) else tuple(pooling))
    held = "float32" if dtype == "bfloat16" else dtype
    item = ITEM_BYTES[held]
    row = sum(layers if name in LAYERED_SITES else 1 for name in names) * hidden_size * item
    logits = (vocab_size or 0) * item if outputs.top_k is None else outputs.top_k * (item + INDEX_BYTES)
    token, prompt = row if keep_tokens else 0, row * len(poolings)
    if outputs.perplexity:
        token += len(SCALARS) * SCALAR_BYTES
        prompt += len(STATISTICS) * SCALAR_BYTES
    if outputs.logits == "all":
        token += logits
    elif outputs.logits is not None:
        prompt += logits
    if outputs.router:
        token += layers * (experts or 0) * item
    return RowBytes(token=token, prompt=prompt, dtype=held, source_dtype=dtype)
