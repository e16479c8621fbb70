"""Where the blocks, the attention, the MLP, the routers and the head of a model are: found by structure, or named by hand.

What is captured at each site:

``resid``
    The output of block i, before the model's final norm: what transformers calls ``hidden_states[i + 1]``, except for the last block, whose
    entry there has gone through the final norm.
``embed``
    The input of block 0: ``hidden_states[0]``. With position embeddings where they are added (GPT-2, OPT), scaled where the model scales
    (Gemma), after the embedding norm in encoders.
``attn``, ``mlp``
    The vector that the token mixer, or the MLP, adds to the residual stream. The token mixer is the attention, or what a block has in its
    place: Mamba, linear attention, a convolution. For most models the vector is the output of the attention module (after its output
    projection) and of the MLP module. Gemma 2 and 3 and OLMo 2 normalise both before they add them, so it is the output of that norm.
    Granite multiplies both by a constant, so it is the product. OPT has no MLP module: it is the output of ``fc2``. Encoders (BERT,
    RoBERTa) add first and normalise then: it is the output of ``attention.output.dense`` and of ``output.dense``, before the sum and its
    norm. Mixtral and its like: the weighted sum over the chosen experts.
``router``
    The scores that the router of a mixture of experts gives to every expert, before softmax, sigmoid or choice; in the blocks that have
    one.

In pre-norm decoders, therefore, ``resid[i] == resid[i - 1] + attn[i] + mlp[i]`` up to rounding, with ``embed`` before block 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from torch import nn

from lmprobe_zarr.errors import InvalidArgumentError, UnknownArchitectureError
from lmprobe_zarr.extraction.models.additions import Addition, BlockSites, sites_of
from lmprobe_zarr.extraction.models.families import BY_TYPE
from lmprobe_zarr.extraction.models.identity import num_experts_of
from lmprobe_zarr.extraction.models.paired import PairedBody, takes_pairs
from lmprobe_zarr.extraction.models.structure import (
    CHAIN_TOLERANCE,
    TRACED_TOKENS,
    BlockList,
    Call,
    block_lists,
    body_of,
    chained,
    encoder_of,
    first_line,
    is_decoder_of_encoder,
    plain_ids,
    signature,
    text_settings,
    trace,
    without_cache,
)

__all__ = ["Located", "Place", "Router", "Site", "constants_of", "locate", "submodule"]

MODULE_NAMES: Final = ("layers", "attn", "mlp", "router")
SHOWN_LISTS: Final = 6
# More candidates than these are not run.
TRIED_LISTS: Final = 4


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
class Site:
    """A module whose output, multiplied by `scale`, is added to the residual stream."""

    module: nn.Module
    scale: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the values of one site are.

    Parameters
    ----------
    modules : mapping of int or None to Module
        By layer, ascending; a layer that lacks the site is left out. By None for a site that is outside of the blocks.
    given : bool
        Whether it is the first floating-point tensor that the module is given, rather than what it returns.
    scales : mapping of int to float
        What the values of a layer are multiplied by, where that is not 1.
    token_axis : int, optional
        Which axis of the module's tensor counts the tokens of a prompt, where that was seen; axis 0 counts prompts. All further axes become
        one.
    width : int, optional
        Values of a token.
    heads : int, optional
        How many heads these values are of, end to end.
    path : str
        As the caller named it; empty for a site that is known by its own name.
    """

    modules: Mapping[int | None, nn.Module]
    given: bool = False
    scales: Mapping[int, float] = field(default_factory=dict)
    token_axis: int | None = None
    width: int | None = None
    heads: int | None = None
    path: str = ""

    @property
    def layered(self) -> bool:
        """Whether it is inside of the blocks."""
        return None not in self.modules

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have the site; none where it is outside of the blocks."""
        return tuple(layer for layer in self.modules if layer is not None)

    @staticmethod
    def of(sites: Mapping[int, Site]) -> Place:
        """The place of what is added to the residual stream."""
        return Place(
            modules={layer: site.module for layer, site in sites.items()},
            scales={layer: site.scale for layer, site in sites.items() if site.scale != 1},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """The modules of one model that are captured or run.

    Parameters
    ----------
    body : Module
        The smallest part that takes token ids and runs every block: no head, no vocabulary projection.
    blocks : tuple of Module
        One per layer. A module that one pass calls several times stands here once for each call.
    attn, mlp : mapping of int to Site, or None
        By layer; a block that has no attention, or no MLP, is left out. None where they are not known.
    routers : mapping of int to Router
        By layer; only those that have one.
    whole, head : Module or None
        The part that gives logits, and its projection onto the vocabulary; None where there is none.
    by_hand : bool
        Whether the caller named the modules.
    paths : mapping of str to str
        Where they are, as `modules` would name them: ``layers``, and ``attn``, ``mlp`` and ``router`` where known. Different paths in
        different blocks are separated by ``" | "``.
    mixers : tuple of str
        The path in each block of what its ``attn`` site is; empty where that is not known.
    """

    body: nn.Module
    blocks: tuple[nn.Module, ...]
    attn: Mapping[int, Site] | None
    mlp: Mapping[int, Site] | None
    routers: Mapping[int, Router] = field(default_factory=dict)
    whole: nn.Module | None = None
    head: nn.Module | None = None
    by_hand: bool = False
    paths: Mapping[str, str] = field(default_factory=dict)
    mixers: tuple[str, ...] = ()


def submodule(module: nn.Module, path: str) -> nn.Module | None:
    """The module at a path, itself at an empty one; None where there is none.

    As ``get_submodule``, but never through a wrapper's ``__getattr__``: PEFT models pass every name on to what they wrap.
    """
    for name in path.split(".") if path else ():
        children = dict(module.named_children())
        if name not in children:
            return None
        module = children[name]
    return module


# ------------------------------------------------------------------------------------------------------------------ errors


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


def _with_encoder(model: nn.Module, path: str, body: nn.Module) -> PairedBody:
    """A decoder together with its encoder.

    Raises
    ------
    UnknownArchitectureError
        No part of the model takes what both read.
    """
    names = path.split(".")
    owners = [model, *(model.get_submodule(".".join(names[:end])) for end in range(1, len(names)))]
    inner = next((owner for owner in reversed(owners) if takes_pairs(owner)), None)
    encoder = encoder_of(model)
    if inner is None or encoder is None:
        raise _unknown(model, f"no part of {type(model).__name__} takes input_ids and decoder_input_ids")
    return PairedBody(inner, encoder, body)


def _needs_encoder(model: nn.Module, path: str) -> UnknownArchitectureError:
    if "encoder" in path.split(".") and "decoder" not in path.split("."):
        return UnknownArchitectureError(
            f"{path!r} is in no part of {type(model).__name__} that takes token ids by itself, and the whole needs two prompts, one for "
            "its encoder and one for its decoder: use another model"
        )
    return UnknownArchitectureError(
        f"{path!r} is the decoder of {type(model).__name__}, an encoder-decoder: without the encoder's output its values mean nothing. "
        "Give pairs of texts, one for the encoder and one for the decoder, or extract the encoder (leave modules= out)"
    )


# ------------------------------------------------------------------------------------------------------------ inside a block


def _located_parts(model: nn.Module, blocks: Sequence[nn.Module], paths: Sequence[str], site: str) -> dict[int, Site]:
    for path in paths:
        parts = [submodule(block, path) for block in blocks]
        if None not in parts:
            return {layer: Site(module=part) for layer, part in enumerate(parts) if part is not None}
    children = ", ".join(repr(name) for name, _ in blocks[0].named_children())
    raise _unknown(model, f"no {site} {' or '.join(map(repr, paths))} in every block of {type(model).__name__}; a block holds {children}")


def _located_routers(blocks: Sequence[nn.Module], paths: Sequence[str]) -> dict[int, Router]:
    found = {}
    for layer, block in enumerate(blocks):
        for path in paths:
            gate, (around, _, _) = submodule(block, path), path.rpartition(".")
            if gate is not None:
                found[layer] = Router(gate=gate, around=submodule(block, around) if around else None)
                break
    return found


def _router_paths(model: nn.Module, blocks: Sequence[nn.Module], hidden_size: int | None) -> list[str]:
    """Paths in the blocks of modules with a row of weights for every expert."""
    config: Any = getattr(model, "config", None)
    experts = num_experts_of(config.to_dict()) if hasattr(config, "to_dict") else None
    if experts is None:
        return []
    found: dict[str, None] = {}
    for block in blocks:
        for path, part in block.named_modules():
            weight, names = getattr(part, "weight", None), path.split(".")
            scores = getattr(weight, "ndim", 0) == 2 and weight is not None and weight.shape[0] == experts
            fits = scores and (hidden_size is None or weight is None or weight.shape[-1] == hidden_size)
            if fits and not any(name.isdigit() for name in names) and any(word in path for word in ("gate", "router", "wg")):
                found.setdefault(path)
                break
    return list(found)


def _located_head(model: nn.Module, body: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """The part that gives logits, and its projection onto the vocabulary."""
    if isinstance(body, PairedBody):
        return _paired_head(model, body)
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


def _paired_head(model: nn.Module, body: PairedBody) -> tuple[nn.Module | None, nn.Module | None]:
    """As `_located_head`, of a decoder with its encoder."""
    for part in model.modules():
        if takes_pairs(part) and hasattr(type(part), "get_output_embeddings"):
            head = part.get_output_embeddings()  # type: ignore[operator]
            if isinstance(head, nn.Module):
                return body if part is body.inner else body.around(part), head
    return None, None


# ------------------------------------------------------------------------------------------------------------------ by hand


def _by_hand(model: nn.Module, modules: Mapping[str, str], paired: bool) -> Located:
    strange = sorted(set(modules) - set(MODULE_NAMES))
    if strange or "layers" not in modules:
        raise InvalidArgumentError(f"modules={dict(modules)!r}: name 'layers', and 'attn', 'mlp' and 'router' if wanted; nothing else")
    path = modules["layers"]
    # A model loaded without its head has paths that are shorter by the base model's prefix. Both forms are accepted.
    prefix = getattr(model, "base_model_prefix", "")
    others = (path.removeprefix(prefix + "."), f"{prefix}.{path}") if prefix else ()
    found, where = next(((m, p) for p in (path, *others) if (m := submodule(model, p)) is not None), (None, path))
    if not isinstance(found, nn.ModuleList | nn.Sequential) or not len(found):
        raise _unknown(model, f"modules['layers']={path!r} is no list of modules in {type(model).__name__}")
    body = body_of(model, where)
    decodes = is_decoder_of_encoder(model, body)
    if decodes and not paired:
        raise _needs_encoder(model, path)
    if paired and not decodes:
        raise _only_for_decoders(model, f"{path!r} is not its decoder")
    body = _with_encoder(model, where, body) if paired else body
    blocks = _as_called(body, tuple(found))
    attn, mlp = (_located_parts(model, blocks, (modules[site],), site) if site in modules else None for site in ("attn", "mlp"))
    routers = _located_routers(blocks, (modules["router"],)) if "router" in modules else {}
    if "router" in modules and not routers:
        raise _unknown(model, f"modules['router']={modules['router']!r} is in no block of {type(model).__name__}")
    whole, head = _located_head(model, body)
    return Located(
        body=body, blocks=blocks, attn=attn, mlp=mlp, routers=routers, whole=whole, head=head, by_hand=True,
        paths={**modules, "layers": where},
    )  # fmt: skip


def _as_called(body: nn.Module, listed: tuple[nn.Module, ...]) -> tuple[nn.Module, ...]:
    """The blocks in the order of a pass, which may call some of them several times."""
    try:
        calls, _ = trace(body, listed, plain_ids(body, TRACED_TOKENS), **without_cache(body))
    except Exception:  # noqa: BLE001 — whether the model runs at all is examined before its first prompt
        return listed
    return _layers_of(listed, calls) or listed


def _layers_of(listed: tuple[nn.Module, ...], calls: Sequence[Call]) -> tuple[nn.Module, ...] | None:
    """The module of every layer: the list, or the calls, where modules are called several times; None where some are never called."""
    if len(calls) <= len(listed):
        return listed if calls else None
    return tuple(listed[call.index] for call in calls)


# -------------------------------------------------------------------------------------------------------------- by structure


def _named(model: nn.Module, found: BlockList) -> Located | None:
    """The sites of a model type whose names are known, or None."""
    config: Any = getattr(found.body, "config", None)
    family = BY_TYPE.get(getattr(config, "model_type", ""))
    if family is None or not f".{found.path}".endswith(f".{family.layers}"):
        return None
    try:
        attn = _located_parts(found.body, found.modules, family.attn, "attn")
        mlp = _located_parts(found.body, found.modules, family.mlp, "mlp")
    except UnknownArchitectureError:
        return None
    paths = {site: _first_path(found.modules, getattr(family, site)) for site in ("attn", "mlp")}
    return _assembled(model, found, found.modules, attn, mlp, family.router, paths)


def _first_path(blocks: Sequence[nn.Module], paths: Sequence[str]) -> str:
    return next(path for path in paths if all(submodule(block, path) is not None for block in blocks))


def _assembled(
    model: nn.Module,
    found: BlockList,
    blocks: tuple[nn.Module, ...],
    attn: Mapping[int, Site] | None,
    mlp: Mapping[int, Site] | None,
    routers: Sequence[str],
    paths: Mapping[str, str],
    mixers: tuple[str, ...] = (),
) -> Located:
    whole, head = _located_head(model, found.body)
    scored = _located_routers(blocks, routers)
    known = {"layers": found.path, **{site: path for site, path in paths.items() if path}}
    if scored:
        known["router"] = " | ".join(path for path in routers if any(submodule(block, path) is not None for block in blocks))
    return Located(
        body=found.body, blocks=blocks, attn=attn, mlp=mlp, routers=scored, whole=whole, head=head, paths=known, mixers=mixers,
    )  # fmt: skip


def _traced(model: nn.Module, found: BlockList) -> Located | str:
    """The sites of a list whose blocks are verified by a pass, or why they are not the blocks."""
    try:
        calls, _ = trace(found.body, found.modules, plain_ids(found.body, TRACED_TOKENS), inside=True, **without_cache(found.body))
    except Exception as error:  # noqa: BLE001 — any error of a model's own code
        return f"{type(found.body).__name__} does not run on token ids alone ({first_line(error)})"
    blocks = _layers_of(found.modules, calls)
    depth = _depth(model)
    if blocks is None:
        return f"a pass calls none of the modules of {found.path!r} by themselves"
    if [call.index for call in calls] != sorted(call.index for call in calls) and len(blocks) == len(found.modules):
        return f"the modules of {found.path!r} are called in another order than they are listed"
    if len(found.modules) != len(blocks) and depth is not None and len(blocks) != depth:
        return f"the modules of {found.path!r} are called {len(blocks)} times in a pass, and the model has {depth} layers"
    gap = chained(calls)
    if gap > CHAIN_TOLERANCE:
        return f"what goes into a module of {found.path!r} is not what came out of the one before it (relative difference {gap:.2g})"
    constants = constants_of(model, len(blocks))
    sites: dict[tuple[str, ...], BlockSites] = {}
    for call in calls:
        sites.setdefault(signature(found.modules[call.index]), sites_of(call, constants))
    per_layer = [sites.get(signature(block), BlockSites()) for block in blocks]
    attn, mlp = (_sites(blocks, per_layer, site) for site in ("attn", "mlp"))
    paths = {site: _joined([getattr(each, site) for each in per_layer]) for site, known in (("attn", attn), ("mlp", mlp)) if known}
    mixers = tuple("" if each.attn is None else each.attn.path for each in per_layer) if attn else ()
    width = None if calls[0].output is None else int(calls[0].output.shape[-1])
    return _assembled(model, found, blocks, attn, mlp, _router_paths(model, blocks, width), paths, mixers)


def constants_of(model: nn.Module, depth: int) -> list[float]:
    """The numbers of a configuration that its blocks may multiply by: each, and each over the root of the depth (MiniCPM)."""
    config: Any = text_settings(model)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    # The fewer candidates, the fewer coincidences.
    named = [value for name, value in settings.items() if isinstance(value, float) or "multiplier" in name or "scale" in name]
    numbers = [float(value) for value in named if isinstance(value, int | float) and not isinstance(value, bool) and value]
    return [*numbers, *(number / depth**0.5 for number in numbers)]


def _depth(model: nn.Module) -> int | None:
    depth = getattr(text_settings(model), "num_hidden_layers", None)
    return depth if isinstance(depth, int) else None


def _sites(blocks: Sequence[nn.Module], per_layer: Sequence[BlockSites], site: str) -> dict[int, Site] | None:
    """What is added at a site, by layer; None where what some block adds is not known, or no block adds anything there.

    A block whose only addition is the token mixer's has no MLP, and the other way round (Nemotron-H).
    """
    found = {}
    for layer, (block, known) in enumerate(zip(blocks, per_layer, strict=True)):
        addition = getattr(known, site)
        if addition is None and not known.whole:
            return None
        part = None if addition is None else submodule(block, addition.path)
        if part is not None and addition is not None:
            found[layer] = Site(module=part, scale=addition.scale)
    return found or None


def _joined(additions: Sequence[Addition | None]) -> str:
    counts = Counter(addition.path for addition in additions if addition is not None)
    return " | ".join(path for path, _ in counts.most_common())


def _only_for_decoders(model: nn.Module, why: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"the prompts are pairs of texts, which only the decoder of an encoder-decoder takes, and {type(model).__name__} is not run so: "
        f"{why}. Give a flat list of texts"
    )


def _as_paired(model: nn.Module, found: BlockList) -> BlockList:
    return replace(found, body=_with_encoder(model, found.path, found.body))


def locate(model: nn.Module, modules: Mapping[str, str] | None = None, *, paired: bool = False) -> Located:
    """The modules of a model, also inside a wrapper.

    Parameters
    ----------
    model : Module
        A base model, one with a head, or a PEFT model around either.
    modules : mapping, optional
        ``layers``: path of the list of blocks in `model`; ``attn``, ``mlp`` and ``router``: paths in a block. For models whose parts are
        not found by structure.
    paired : bool
        Whether prompts are pairs, so that the decoder of an encoder-decoder is wanted, together with its encoder.

    Raises
    ------
    UnknownArchitectureError
        The blocks were not found; the message names the lists of modules in the model, and why they are not the blocks.
    InvalidArgumentError
        `modules` has other keys than these four, or lacks ``layers``; or prompts are pairs and the model is no encoder-decoder.
    """
    if modules is not None:
        return _by_hand(model, modules, paired)
    lists = block_lists(model)
    if paired:
        lists = [_as_paired(model, found) for found in lists if is_decoder_of_encoder(model, found.body)]
        if not lists:
            raise _only_for_decoders(model, "it is no encoder-decoder")
    reasons = []
    for found in lists[:TRIED_LISTS]:
        if not paired and is_decoder_of_encoder(model, found.body):
            reasons.append(str(_needs_encoder(model, found.path)))
            continue
        located = _named(model, found) or _traced(model, found)
        if isinstance(located, Located):
            return located
        reasons.append(located)
    kind = getattr(getattr(model, "config", None), "model_type", None)
    why = f" ({reasons[0]})" if reasons else ""
    raise _unknown(model, f"the blocks of {type(model).__name__} (model_type {kind!r}) were not found{why}")
