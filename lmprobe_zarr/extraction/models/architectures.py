"""Where the blocks, the attention and the MLP of a model are, by name. One table; no code per model.

What is captured at each site, for every family in the table:

``resid``
    The output of block i, before the model's final norm: what transformers calls ``hidden_states[i + 1]``, except for the last block, whose
    entry there has gone through the final norm.
``embed``
    The input of block 0: ``hidden_states[0]``. With position embeddings where they are added (GPT-2, OPT), scaled where the model scales
    (Gemma), after the embedding norm in encoders.
``attn``, ``mlp``
    The vector that the attention, or the MLP, adds to the residual stream. For most families that is the output of the attention module
    (after its output projection) and of the MLP module. Gemma 2 and 3 and OLMo 2 normalise both before they add them, so it is the output
    of that norm. OPT has no MLP module: it is the output of ``fc2``. Encoders (BERT, RoBERTa) add first and normalise then: it is the
    output of ``attention.output.dense`` and of ``output.dense``, before the sum and its norm. Mixtral and its like: the weighted sum over
    the chosen experts.

``router``
    The scores that the router of a mixture of experts gives to every expert, before softmax, sigmoid or choice; in the blocks that have
    one.

In pre-norm decoders, therefore, ``resid[i] == resid[i - 1] + attn[i] + mlp[i]`` up to rounding, with ``embed`` before block 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from torch import nn

from lmprobe_zarr.errors import InvalidArgumentError, UnknownArchitectureError

__all__ = ["FAMILIES", "Family", "Located", "Router", "is_encoder", "locate"]


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
BY_TYPE: Final[Mapping[str, Family]] = {name: family for family in FAMILIES for name in family.types}
MODULE_NAMES: Final = ("layers", "attn", "mlp", "router")
SHOWN_LISTS: Final = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """The module that scores the experts of one block.

    Parameters
    ----------
    gate : Module
    around : Module or None
        The module that contains the gate and has the same input; None where the block itself contains the gate.
    """

    gate: nn.Module
    around: nn.Module | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """The modules of one model that are captured or run.

    Parameters
    ----------
    body : Module
        The smallest part that takes token ids and runs every block: no head, no vocabulary projection.
    blocks : tuple of Module
    attn, mlp : tuple of Module, one per block, or None
        None where they are not known.
    causal : bool
        Whether padding on the right needs no mask.
    routers : mapping of int to Router
        By layer; only those that have one.
    whole, head : Module or None
        The part that gives logits, and its projection onto the vocabulary; None where there is none.
    """

    body: nn.Module
    blocks: tuple[nn.Module, ...]
    attn: tuple[nn.Module, ...] | None
    mlp: tuple[nn.Module, ...] | None
    causal: bool
    routers: Mapping[int, Router] = field(default_factory=dict)
    whole: nn.Module | None = None
    head: nn.Module | None = None


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    """As ``get_submodule``, but never through a wrapper's ``__getattr__``: PEFT models pass every name on to what they wrap."""
    for name in path.split("."):
        children = dict(module.named_children())
        if name not in children:
            return None
        module = children[name]
    return module


def is_encoder(model_type: str | None) -> bool:
    """Whether models of this type are known to see the tokens after each token too."""
    family = BY_TYPE.get(model_type or "")
    return family is not None and not family.causal


def _is_causal(family: Family, config: Any) -> bool:
    return family.causal and not getattr(config, "use_bidirectional_attention", False) and getattr(config, "is_causal", True) is not False


def _candidates(model: nn.Module) -> str:
    lists = [
        (name, len(module)) for name, module in model.named_modules() if isinstance(module, nn.ModuleList | nn.Sequential) and len(module)
    ]
    # Lists inside of blocks (experts, for example) distract from the one that matters.
    outer = [(name, length) for name, length in lists if not any(part.isdigit() for part in name.split("."))]
    shown = ", ".join(f"{name!r} ({length} modules)" for name, length in outer[:SHOWN_LISTS])
    return shown + (", …" if len(outer) > SHOWN_LISTS else "") if outer else "none"


def _unknown(model: nn.Module, why: str) -> UnknownArchitectureError:
    return UnknownArchitectureError(
        f"{why}; lists of modules in it: {_candidates(model)}.\n"
        "Name them by hand: modules={'layers': 'model.layers', 'attn': 'self_attn', 'mlp': 'mlp'} (attn, mlp: inside a layer, if wanted)"
    )


def _located_parts(model: nn.Module, blocks: tuple[nn.Module, ...], paths: tuple[str, ...], site: str) -> tuple[nn.Module, ...]:
    for path in paths:
        parts = [_submodule(block, path) for block in blocks]
        if None not in parts:
            return tuple(part for part in parts if part is not None)
    children = ", ".join(repr(name) for name, _ in blocks[0].named_children())
    raise _unknown(model, f"no {site} {' or '.join(map(repr, paths))} in every block of {type(model).__name__}; a block holds {children}")


def _located_routers(blocks: tuple[nn.Module, ...], paths: tuple[str, ...]) -> dict[int, Router]:
    found = {}
    for layer, block in enumerate(blocks):
        for path in paths:
            gate, (around, _, _) = _submodule(block, path), path.rpartition(".")
            if gate is not None:
                found[layer] = Router(gate=gate, around=_submodule(block, around) if around else None)
                break
    return found


def _located_head(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """The part that gives logits, and its projection onto the vocabulary."""
    for part in model.modules():
        # Looked up on the class, because a wrapper passes the name on to the wrapped model but is called differently.
        if not hasattr(type(part), "get_output_embeddings"):
            continue
        try:
            head = part.get_output_embeddings()  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(head, nn.Module):
            return part, head
    return None, None


def _by_hand(model: nn.Module, modules: Mapping[str, str]) -> Located:
    strange = sorted(set(modules) - set(MODULE_NAMES))
    if strange or "layers" not in modules:
        raise InvalidArgumentError(f"modules={dict(modules)!r}: name 'layers', and 'attn', 'mlp' and 'router' if wanted; nothing else")
    path = modules["layers"]
    # A model loaded without its head has paths that are shorter by the base model's prefix. Both forms are accepted.
    prefix = getattr(model, "base_model_prefix", "")
    others = (path.removeprefix(prefix + "."), f"{prefix}.{path}") if prefix else ()
    found, where = next(((m, p) for p in (path, *others) if (m := _submodule(model, p)) is not None), (None, path))
    if not isinstance(found, nn.ModuleList | nn.Sequential) or not len(found):
        raise _unknown(model, f"modules['layers']={path!r} is no list of modules in {type(model).__name__}")
    blocks = tuple(found)
    attn, mlp = (_located_parts(model, blocks, (modules[site],), site) if site in modules else None for site in ("attn", "mlp"))
    owners = [model, *(model.get_submodule(where[:n]) for n, character in enumerate(where) if character == ".")]
    bodies = [owner for owner in owners if hasattr(owner, "config") and hasattr(owner, "get_input_embeddings")]
    routers = _located_routers(blocks, (modules["router"],)) if "router" in modules else {}
    if "router" in modules and not routers:
        raise _unknown(model, f"modules['router']={modules['router']!r} is in no block of {type(model).__name__}")
    whole, head = _located_head(model)
    body = bodies[-1] if bodies else model
    return Located(body=body, blocks=blocks, attn=attn, mlp=mlp, causal=False, routers=routers, whole=whole, head=head)


def locate(model: nn.Module, modules: Mapping[str, str] | None = None) -> Located:
    """The modules of a model, also inside a wrapper.

    Parameters
    ----------
    model : Module
        A base model, one with a head, or a PEFT model around either.
    modules : mapping, optional
        ``layers``: path of the list of blocks in `model`; ``attn``, ``mlp`` and ``router``: paths in a block. For architectures that are
        not known.

    Raises
    ------
    UnknownArchitectureError
        The blocks were not found; the message names the lists of modules in the model.
    InvalidArgumentError
        `modules` has other keys than these four, or lacks ``layers``.
    """
    if modules is not None:
        return _by_hand(model, modules)
    for body in model.modules():
        config = getattr(body, "config", None)
        family = BY_TYPE.get(getattr(config, "model_type", ""))
        found = None if family is None else _submodule(body, family.layers)
        if family is None or not isinstance(found, nn.ModuleList) or not len(found):
            continue
        # Some models run only as many blocks as their configuration says.
        blocks = tuple(found)[: getattr(config, "num_hidden_layers", len(found))]
        whole, head = _located_head(model)
        return Located(
            body=body,
            blocks=blocks,
            attn=_located_parts(body, blocks, family.attn, "attn"),
            mlp=_located_parts(body, blocks, family.mlp, "mlp"),
            causal=_is_causal(family, config),
            routers=_located_routers(blocks, family.router),
            whole=whole,
            head=head,
        )
    kind = getattr(getattr(model, "config", None), "model_type", None)
    raise _unknown(model, f"the architecture of {type(model).__name__} (model_type {kind!r}) is not known")
