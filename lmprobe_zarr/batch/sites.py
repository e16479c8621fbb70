"""Sites and outputs of a model, the variables that they give, and how many bytes a row takes. Names and integers only.

A site is a place in a model where activations are taken. Outputs are what the model computes besides:

* ``logits`` of its head for every token, or ``logits_last_token`` for the last token of each prompt: all of them, or only the largest
  (``…_top_k_values``, ``…_top_k_indices``).
* ``token_log_prob``, the natural logarithm of the probability of each token given those before it, and ``token_perplexity``, the
  exponential of its negative. Both are NaN for the first token of a prompt.
* ``perplexity`` of each prompt, one value for each of `STATISTICS`.
* ``router``, the scores of all experts in a mixture of experts, by layer and token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal, TypeAlias

from lmprobe_zarr.batch.pooling import ALL, POOLINGS, parse_poolings, split_variable
from lmprobe_zarr.display import nearest
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError

__all__ = [
    "BUILT_IN_SITES",
    "HIDDEN_SITES",
    "INNER_DIMS",
    "LAYERED_SITES",
    "LOGITS_POSITIONS",
    "SCALARS",
    "SITES",
    "STATISTICS",
    "Outputs",
    "RowBytes",
    "Sites",
    "SitesSpec",
    "is_top_k",
    "parse_sites",
    "pooled_name_problem",
    "row_bytes",
    "variable_problem",
]


# The sites of the first version of the format, whose names are variables wherever they stand.
LAYERED_SITES: Final = ("resid", "attn", "mlp")
SITES: Final = (*LAYERED_SITES, "embed")
# Sites whose values are as wide as the residual stream.
HIDDEN_SITES: Final = (*SITES, "resid_mid")
# Those that extraction finds by itself; the router's scores are an output, see `Outputs`.
BUILT_IN_SITES: Final = ("resid", "resid_mid", "attn", "mlp", "embed", "neurons", "heads", "router")
# lmprobe's three, in its order: the exponential of the mean, the least and the greatest negative log-probability of the tokens.
STATISTICS: Final = ("mean", "min", "max")
# Variables with one number per token, and so without a further axis.
SCALARS: Final = ("token_perplexity", "token_log_prob")
# Inner dimension of the variables whose rows do not hold the hidden units of a site.
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
    """Which outputs of a model to keep besides its activations. False if none.

    Parameters
    ----------
    perplexity : bool
        ``perplexity`` of every prompt, ``token_perplexity`` and ``token_log_prob`` of every token.
    logits : {None, "last_token", "all"}
        The head's logits: none, those at the last token of every prompt, or those at every token.
    top_k : int, optional
        How many of the largest logits to keep, with their token ids; None keeps all logits.
    router : bool
        The raw scores of all experts in a mixture of experts, by layer and token.

    Raises
    ------
    InvalidArgumentError
        Unknown position, a `top_k` below 1, or a `top_k` without `logits`.
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
        """Whether an output is kept for every token."""
        return self.perplexity or self.logits == "all" or self.router

    def variables(self) -> list[tuple[str, str, bool]]:
        """The variables to store: level (``prompts`` or ``tokens``), name, and whether it has a layer axis."""
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


@dataclass(frozen=True, slots=True)
class Sites:
    """Which sites of a model are taken; made by `parse_sites`.

    Parameters
    ----------
    names : tuple of str
        In the order asked for.
    paths : mapping of str to str
        Of those that the caller named by path: ``"self_attn.o_proj:input"`` in every block, or ``"/model.norm"`` outside of them.
    """

    names: tuple[str, ...] = ()
    paths: Mapping[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def layered(self, site: str) -> bool:
        """Whether a site is taken in every block that has it, so that its variable has layers."""
        return site != "embed" and not self.paths.get(site, "").startswith("/")

    @property
    def any_layered(self) -> bool:
        """Whether a site has layers."""
        return any(map(self.layered, self.names))

    @staticmethod
    def parse_path(path: str) -> tuple[str, bool]:
        """The path of the module, and whether its input is taken rather than its output."""
        where, _, point = path.partition(":")
        return where, point == "input"


SitesSpec: TypeAlias = str | Sequence[str] | Mapping[str, str]


def parse_sites(sites: SitesSpec | Sites, outputs: Outputs = NO_OUTPUTS) -> tuple[Sites, Outputs]:
    """The sites in the given order without repeats, and the outputs with ``router`` where it stands among the sites.

    Parameters
    ----------
    sites : str, sequence of str, or mapping of str to str
        Names of `BUILT_IN_SITES`; or names of the caller's own, with the path of a module. In a mapping, a built-in site stands for itself,
        ``{"resid": "resid"}``. May be empty only if `outputs` are kept.
    outputs : Outputs

    Raises
    ------
    InvalidArgumentError
        An unknown name in a list, a name that no variable can have, a path that is none, or no name at all.
    """
    if isinstance(sites, Sites):
        return sites, outputs
    if isinstance(sites, Mapping):
        given = dict(sites)
    elif not isinstance(sites, Iterable):
        raise InvalidTypeError(f"sites is a {type(sites).__name__}: give {', '.join(BUILT_IN_SITES)}, or {{'z': 'self_attn.o_proj:input'}}")
    else:
        names = (sites,) if isinstance(sites, str) else tuple(sites)
        unknown = [name for name in names if name not in BUILT_IN_SITES]
        if unknown:
            near = nearest(unknown[0], BUILT_IN_SITES)
            raise InvalidArgumentError(
                f"unknown site {unknown[0]!r}{near}: choose from {', '.join(BUILT_IN_SITES)}, or name a module, "
                "sites={'z': 'self_attn.o_proj:input'}"
            )
        given = {name: name for name in names}
    paths = {name: _checked_path(name, path) for name, path in given.items() if name not in BUILT_IN_SITES or path != name}
    if not given and not outputs:
        raise InvalidArgumentError(f"sites is empty: choose from {', '.join(BUILT_IN_SITES)}")
    lower: dict[str, str] = {}
    for name in given:
        if lower.setdefault(name.lower(), name) != name:
            raise InvalidArgumentError(
                f"the sites {lower[name.lower()]!r} and {name!r} differ by case alone, and some file systems ignore case"
            )
    if "router" in given:
        outputs = replace(outputs, router=True)
    return Sites(tuple(name for name in given if name != "router"), paths), outputs


def _checked_path(name: object, path: object) -> str:
    """The path of a site of the caller's own, checked; what the model has there is seen once it is loaded."""
    if name in BUILT_IN_SITES:
        raise InvalidArgumentError(f"sites={{{name!r}: {path!r}}} gives the path of a built-in site: choose another name for that module")
    if problem := variable_problem(name):
        raise InvalidArgumentError(f"{name!r:.80} is no name of a site: {problem}")
    if not isinstance(path, str):
        raise InvalidTypeError(f"sites={{{name!r}: …}} is a {type(path).__name__}: give the path of a module, 'self_attn.o_proj:input'")
    where, colon, point = path.partition(":")
    if (colon and point not in ("input", "output")) or where.endswith((".", "/")) or not (where or colon):
        raise InvalidArgumentError(
            f"sites={{{name!r}: {path!r}}} is no path of a module: give 'mlp.gate_proj' or 'self_attn.o_proj:input', in a block, or "
            "'/model.norm' outside of the blocks, with ':input' for what the module is given"
        )
    return path if point != "output" else where


def variable_problem(name: object) -> str | None:
    """Why a name can be no site's, as text; None if it can."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,63}", name):
        return "use the letters a to z, digits and _, a letter first, at most 64"
    pooling = next((pooling for pooling in POOLINGS if f"_{pooling}_" in f"{name}_"), None)
    if pooling is not None:
        return f"it {'ends like' if name.endswith(pooling) else 'holds'} a pooling, _{pooling}"
    if name.lower() in _TAKEN:
        return "it is a name of the format itself"
    return None


def pooled_name_problem(name: object, *, pooled: bool) -> str | None:
    """Why a name can be no variable's, with one row per prompt (`pooled`) or per token, as text; None if it can. For sites, not outputs."""
    site, pooling, _ = split_variable(name) if pooled and isinstance(name, str) else (name, None, ALL)
    problem = None if site in SITES else variable_problem(site)
    if problem is None and (pooling is not None) == pooled:
        return None
    wanted = "<site>_<pooling>, such as resid_last_token" if pooled else "such as resid, without a pooling"
    return f"give {wanted}{f' ({problem})' if problem else ''}"


# Names that columns and dimensions of every store have.
_TAKEN: Final = frozenset(
    {
        "prompt", "prompt_sha256", "prompt_row", "prompt_length", "text", "n_tokens", "token", "position", "token_id", "char_start",
        "char_end", "role", "turn", "generated", "layer", "hidden", "model", "mixer", *INNER_DIMS, *INNER_DIMS.values(), *SCALARS,
    }
)  # fmt: skip


def is_top_k(variable: str) -> bool:
    """Whether a variable keeps only the k largest values, so that its rows may differ in length from part to part."""
    return INNER_DIMS.get(variable) == "top_k"


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBytes:
    """Bytes of extracted activations, before compression.

    Parameters
    ----------
    token : int
        Bytes per token; 0 if tokens are not kept.
    prompt : int
        Bytes per prompt, besides its tokens.
    dtype : str
        Dtype of the arrays; bfloat16 numbers are stored exactly, in float32.
    source_dtype : str
        Dtype that the model computes in.
    """

    token: int
    prompt: int
    dtype: str
    source_dtype: str

    def total(self, prompts: int, tokens: int) -> int:
        """Bytes of this number of prompts, which have this number of tokens together."""
        return self.token * tokens + self.prompt * prompts


def row_bytes(
    *,
    layers: int,
    hidden_size: int,
    dtype: str,
    sites: SitesSpec | Sites,
    pooling: str | Sequence[str],
    keep_tokens: bool,
    outputs: Outputs = NO_OUTPUTS,
    vocab_size: int | None = None,
    experts: int | None = None,
    widths: Mapping[str, int] | None = None,
    site_layers: Mapping[str, int] | None = None,
    parts: int = 1,
) -> RowBytes:
    """Bytes of one token and of one prompt, from a model's size alone.

    Parameters
    ----------
    layers : int
        Number of layers that are stored.
    hidden_size : int
    dtype : {"float32", "float16", "bfloat16", "float64"}
        Dtype that the model computes in.
    sites, pooling, keep_tokens, outputs
        As for :func:`~lmprobe_zarr.extraction.run`.
    vocab_size : int, optional
        Logits per row. Without it, logits without `top_k` count as 0 bytes.
    experts : int, optional
        Scores per router; every layer is assumed to have a router. Without it, they count as 0 bytes.
    widths : mapping of str to int, optional
        Values of one token at a site, where they are not `hidden_size`.
    site_layers : mapping of str to int, optional
        How many of the layers have a site, where it is not all of them.
    parts : int
        Over how many parts of the tokens each pooling is.

    Raises
    ------
    InvalidArgumentError
        Unknown site, pooling or dtype.
    """
    if dtype not in ITEM_BYTES:
        raise InvalidArgumentError(f"dtype={dtype!r} is unknown: use one of {', '.join(map(repr, ITEM_BYTES))}")
    chosen, outputs = parse_sites(sites, outputs)
    poolings = parse_poolings(pooling if isinstance(pooling, str) else tuple(pooling))
    stored_dtype = "float32" if dtype == "bfloat16" else dtype
    item = ITEM_BYTES[stored_dtype]
    counts = {site: (site_layers or {}).get(site, layers) if chosen.layered(site) else 1 for site in chosen}
    row = sum(counts[site] * (widths or {}).get(site, hidden_size) for site in chosen) * item
    logits = (vocab_size or 0) * item if outputs.top_k is None else outputs.top_k * (item + INDEX_BYTES)
    token, prompt = row if keep_tokens else 0, row * len(poolings) * parts
    if outputs.perplexity:
        token += len(SCALARS) * SCALAR_BYTES
        prompt += len(STATISTICS) * SCALAR_BYTES
    if outputs.logits == "all":
        token += logits
    elif outputs.logits is not None:
        prompt += logits
    if outputs.router:
        token += layers * (experts or 0) * item
    return RowBytes(token=token, prompt=prompt, dtype=stored_dtype, source_dtype=dtype)
