"""The names of the parts of some model types, which spare the pass that would find them. The check of a model examines them too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

__all__ = ["BY_TYPE", "FAMILIES", "Family", "are_known", "is_encoder"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Where the modules of some model types are, by name.

    Parameters
    ----------
    types : tuple of str
        The values of ``config.model_type`` that the names hold for.
    layers : str
        Path of the list of blocks in the module that owns it.
    attn, mlp : tuple of str
        Paths in a block of the modules that add to the residual stream; the first that exists counts (names changed between releases).
    causal : bool
        Whether a token sees only those before it, so that padding on the right needs no mask.
    router : tuple of str
        Paths, in the blocks that have one, of the module that scores the experts.
    """

    types: tuple[str, ...]
    layers: str
    attn: tuple[str, ...]
    mlp: tuple[str, ...]
    causal: bool = True
    router: tuple[str, ...] = ()


FAMILIES: Final = (
    Family(
        types=("llama", "mistral", "qwen2", "qwen3", "phi", "phi3", "gemma"),
        layers="layers",
        attn=("self_attn",),
        mlp=("mlp",),
    ),
    Family(
        types=("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3"),
        layers="layers",
        attn=("self_attn",),
        mlp=("mlp", "block_sparse_moe"),
        router=("mlp.gate", "block_sparse_moe.gate"),
    ),
    Family(
        types=("gemma2", "gemma3", "gemma3_text", "olmo2"),
        layers="layers",
        attn=("post_attention_layernorm",),
        mlp=("post_feedforward_layernorm",),
    ),
    Family(types=("gpt2",), layers="h", attn=("attn",), mlp=("mlp",)),
    Family(types=("gpt_neox",), layers="layers", attn=("attention",), mlp=("mlp",)),
    Family(types=("opt",), layers="layers", attn=("self_attn",), mlp=("fc2",)),
    Family(types=("falcon",), layers="h", attn=("self_attention",), mlp=("mlp",)),
    Family(
        types=("bert", "roberta", "xlm-roberta", "camembert"),
        layers="encoder.layer",
        attn=("attention.output.dense",),
        mlp=("output.dense",),
        causal=False,
    ),
)
# What comes before the path of the blocks, by how a model was loaded.
PREFIXES: Final = ("", "model.", "transformer.", "gpt_neox.", "bert.", "roberta.", "decoder.", "model.decoder.")
BY_TYPE: Final[Mapping[str, Family]] = {name: family for family in FAMILIES for name in family.types}


def are_known(model_type: str | None, modules: Mapping[str, str]) -> bool:
    """Whether these names of modules are those that a model of this type is known by, so that naming them changes nothing."""
    family = BY_TYPE.get(model_type or "")
    if family is None or not {"layers"} <= set(modules) <= {"layers", "attn", "mlp"}:
        return False
    layers = {prefix + family.layers for prefix in PREFIXES}
    return modules["layers"] in layers and all(modules[site] == getattr(family, site)[0] for site in ("attn", "mlp") if site in modules)


def is_encoder(model_type: str | None) -> bool:
    """Whether models of this type are known to see the tokens after each token too."""
    family = BY_TYPE.get(model_type or "")
    return family is not None and not family.causal
