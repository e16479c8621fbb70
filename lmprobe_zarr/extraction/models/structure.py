"""Where the blocks of a model are, found in its module tree and verified by one short pass. Knows no model family by name.

A candidate is a list of modules that stands in no other list. One pass over a few token ids shows which of its modules are called, in
which order, and what goes in and comes out. The list holds the blocks if the output of each call is the input of the next (`chained`). A
module that is called several times in one pass stands for as many layers.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import nn

from lmprobe_zarr.extraction.models.identity import DEPTHS

__all__ = [
    "BlockList",
    "Call",
    "Part",
    "block_lists",
    "body_of",
    "chained",
    "encoder_of",
    "evaluating",
    "first_line",
    "first_tensor",
    "input_device",
    "input_embeddings",
    "input_tensor",
    "is_decoder_of_encoder",
    "leaving_no_hooks",
    "original_attention",
    "plain_ids",
    "signature",
    "takes_ids",
    "text_settings",
    "trace",
    "without_cache",
]

# A decoder of an encoder-decoder is a candidate too, so that it can be refused by name.
DEPTH_NAMES: Final = (*DEPTHS, "decoder_layers", "num_decoder_layers")
# How far the input of a block may be from the output of the block before it, relative to its largest value.
CHAIN_TOLERANCE: Final = 1e-3
TRACED_TOKENS: Final = 6
# Set by transformers on a model whose hidden states are captured by hooks.
_INSTALLED: Final = "_output_capturing_hooks_installed"
# Token ids below this number are often special tokens.
FIRST_PLAIN_ID: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockList:
    """A list of modules that may be the blocks.

    Parameters
    ----------
    path : str
        In the model.
    modules : tuple of Module
    body : Module
        The smallest part of the model that contains them and takes token ids.
    """

    path: str
    modules: tuple[nn.Module, ...]
    body: nn.Module


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One call of a module inside a block: its path in the block, its first floating-point input, and its output."""

    path: str
    module: nn.Module
    given: torch.Tensor | None
    output: torch.Tensor | None


@dataclass(slots=True, kw_only=True)
class Call:
    """One call of a block: its index in the list, its input and output, and the calls of the modules inside it, in order of return."""

    index: int
    given: torch.Tensor | None
    output: torch.Tensor | None = None
    parts: list[Part] = field(default_factory=list)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, so no dropout; afterwards every submodule has its own mode back."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextmanager
def original_attention(module: nn.Module) -> Iterator[None]:
    """BigBird switches from block-sparse to full attention for good when a prompt is short; afterwards it has its own kind back."""
    chosen = [(part, part.attention_type) for part in module.modules() if hasattr(type(part), "set_attention_type")]
    try:
        yield
    finally:
        for part, kind in chosen:
            if part.attention_type != kind:
                part.set_attention_type(kind)  # type: ignore[operator]


@contextmanager
def leaving_no_hooks(module: nn.Module) -> Iterator[None]:
    """Removes the hooks that transformers registers for good when hidden states are requested for the first time."""
    before = [(part, set(part._forward_hooks), _INSTALLED in vars(part)) for part in module.modules()]
    try:
        yield
    finally:
        for part, hooks, installed in before:
            for key in set(part._forward_hooks) - hooks:
                del part._forward_hooks[key]
            if not installed:
                # Otherwise the model would not register them again when it needs them.
                vars(part).pop(_INSTALLED, None)


def first_line(error: BaseException) -> str:
    """The kind of an error of a model's own code, and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:200]}"


def first_tensor(output: Any) -> torch.Tensor | None:
    """The floating-point tensor that a module returns: itself, the first of a tuple, or the first value of a mapping."""
    values = (output,) if isinstance(output, torch.Tensor) else tuple(output.values()) if isinstance(output, Mapping) else output
    first = values[0] if isinstance(values, tuple | list) and values else None
    return first if isinstance(first, torch.Tensor) and first.is_floating_point() else None


def input_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """The first floating-point tensor that a module is called with."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor) and value.is_floating_point()), None)


def takes_ids(module: nn.Module) -> bool:
    """Whether a module is called with token ids and embeds them itself."""
    # Looked up on the class, because a wrapper passes the name on to the wrapped model but is called differently.
    if not hasattr(type(module), "get_input_embeddings") or "input_ids" not in inspect.signature(module.forward).parameters:
        return False
    return input_embeddings(module) is not None


def text_settings(module: nn.Module) -> Any:
    """The configuration of the part of a model that reads text; None where there is none."""
    config: Any = getattr(module, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return config
    try:
        return config.get_text_config()
    except ValueError:  # several of them
        return config


def _depths(model: nn.Module) -> set[int]:
    configs = (text_settings(model), getattr(model, "config", None))
    return {value for config in configs for name in DEPTH_NAMES if isinstance(value := getattr(config, name, None), int)}


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 0


def _shared_owners(path: Sequence[str], other: Sequence[str]) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(path, other, strict=False)))


def body_of(model: nn.Module, path: str) -> nn.Module:
    """The smallest part of a model that contains the module at `path` and takes token ids."""
    names = path.split(".")
    owners = [model, *(model.get_submodule(".".join(names[:end])) for end in range(1, len(names)))]
    return next((owner for owner in reversed(owners) if takes_ids(owner)), model)


def block_lists(model: nn.Module) -> list[BlockList]:
    """The lists that may hold the blocks, the likeliest first.

    First those with as many modules as the configuration has layers; among them those in the part that takes token ids, nearest the input
    embeddings, then the largest. Encoders come before decoders that need them.
    """
    depths = _depths(model)
    embeddings = input_embeddings(model) if takes_ids(model) else None
    near = next((name for name, module in model.named_modules() if module is embeddings), "").split(".")
    ranked = []
    for path, module in model.named_modules():
        if not _is_list(module) or any(name.isdigit() for name in path.split(".")):
            continue
        modules: tuple[nn.Module, ...] = tuple(module)
        # Some models run only as many blocks as their configuration says.
        depth = getattr(text_settings(model), "num_hidden_layers", None)
        body = body_of(model, path)
        rank = (
            len(modules) in depths,
            not is_decoder_of_encoder(model, body),
            _shared_owners(path.split("."), near),
            sum(parameter.numel() for parameter in module.parameters()),
        )
        used = modules[:depth] if isinstance(depth, int) and 0 < depth < len(modules) and not depths & {len(modules)} else modules
        ranked.append((rank, BlockList(path=path, modules=used, body=body)))
    ranked.sort(key=lambda pair: pair[0], reverse=True)
    return [found for _, found in ranked]


def encoder_of(model: nn.Module) -> nn.Module | None:
    """The encoder of an encoder-decoder; None where a model has none."""
    try:
        encoder = model.get_encoder() if hasattr(type(model), "get_encoder") else None  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return encoder if isinstance(encoder, nn.Module) and encoder is not model else None


def is_decoder_of_encoder(model: nn.Module, body: nn.Module) -> bool:
    """Whether `body` is the decoder of an encoder-decoder, which has no meaning without the encoder's output."""
    if not getattr(getattr(body, "config", None), "is_encoder_decoder", False) and not getattr(
        getattr(model, "config", None), "is_encoder_decoder", False
    ):
        return False
    encoder = encoder_of(model)
    if encoder is not None and any(part is body for part in encoder.modules()):
        return False
    return "Encoder" not in type(body).__name__ or "Decoder" in type(body).__name__


def plain_ids(module: nn.Module, count: int, *, shift: int = 0) -> list[int]:
    """`count` different token ids of a model's vocabulary that are no special tokens."""
    config = text_settings(module)
    special: set[int] = set()
    settings: Any
    for settings in (config, getattr(module, "config", None)):
        for name, value in (settings.to_dict() if hasattr(settings, "to_dict") else {}).items():
            if "token" in name:
                special |= {v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, int)}
    embeddings = input_embeddings(module) if takes_ids(module) else None
    known = getattr(config, "vocab_size", None)
    size = known if isinstance(known, int) and known > 0 else getattr(embeddings, "num_embeddings", None) or 100
    ids = [i for i in range(min(FIRST_PLAIN_ID, max(0, size - count - len(special))), size) if i not in special] or [0]
    # Spread over the vocabulary, and the same for the same model.
    step = max(1, len(ids) // (4 * count))
    return [ids[(shift + i) * step % len(ids)] for i in range(count)]


def input_embeddings(module: nn.Module) -> nn.Module | None:
    """The module that embeds token ids; None where there is none."""
    try:
        found = module.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return found if isinstance(found, nn.Module) else None


def input_device(body: nn.Module) -> torch.device:
    """The device for token ids: that of the embeddings, or the one to which accelerate moves them."""
    reader = input_embeddings(body) or body
    weight = next(iter(reader.parameters()), None)
    device = torch.device("cpu") if weight is None else weight.device
    if device.type == "meta":
        device = torch.device(getattr(getattr(reader, "_hf_hook", None), "execution_device", "cpu"))
    return device


def without_cache(body: nn.Module) -> dict[str, Any]:
    """The argument that keeps a model from making a cache of keys and values; none where it takes none."""
    return {"use_cache": False} if "use_cache" in inspect.signature(body.forward).parameters else {}


def signature(block: nn.Module) -> tuple[str, ...]:
    """Blocks with the same signature are built alike, so what holds for one holds for all."""
    return (type(block).__name__, *(f"{name}:{type(part).__name__}" for name, part in block.named_children()))


def _copied(tensor: torch.Tensor | None) -> torch.Tensor | None:
    # Some models (Falcon) later write into the tensors that their modules returned.
    return None if tensor is None else tensor.detach().clone()


def trace(
    body: nn.Module, modules: Sequence[nn.Module], ids: Sequence[int], *, inside: bool = False, device: torch.device | None = None,
    **options: Any,
) -> tuple[list[Call], Any]:  # fmt: skip
    """The calls of some modules while `body` runs one prompt, in order, and what `body` returns.

    Parameters
    ----------
    body : Module
        Takes token ids.
    modules : sequence of Module
        The modules of a list; one that occurs several times counts as the first of its places.
    ids : sequence of int
        The prompt.
    inside : bool
        Whether to note the calls of the modules inside each call too.
    device : device, optional
        That of the token ids.
    **options
        Further arguments of `body`.
    """
    calls: list[Call] = []
    running: list[Call] = []
    places: dict[int, int] = {}
    for index, module in enumerate(modules):
        places.setdefault(id(module), index)

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = Call(index=places[id(module)], given=_copied(input_tensor(args, kwargs)))
        calls.append(call)
        running.append(call)

    def leave(_module: nn.Module, _args: Any, output: Any) -> None:
        running.pop().output = _copied(first_tensor(output))

    def note(path: str, block: nn.Module) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            # Blocks may share a module, which is noted in the block that calls it.
            if running and modules[running[-1].index] is block:
                given = _copied(input_tensor(args, kwargs))
                running[-1].parts.append(Part(path=path, module=module, given=given, output=_copied(first_tensor(output))))

        return hook

    with ExitStack() as stack:
        stack.enter_context(evaluating(body))
        stack.enter_context(original_attention(body))
        stack.enter_context(torch.no_grad())
        for module in {id(module): module for module in modules}.values():
            # Before hooks of the caller that change the input: what the block before it returned is compared with this.
            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True).remove)
            stack.callback(module.register_forward_hook(leave).remove)
            for path, part in module.named_modules() if inside else ():
                if path:
                    stack.callback(part.register_forward_hook(note(path, module), with_kwargs=True).remove)
        output = body(input_ids=torch.tensor([list(ids)], device=input_device(body) if device is None else device), **options)
    return calls, output


def chained(calls: Sequence[Call]) -> float:
    """How far, at most, the input of a call is from the output of the call before it, relative to its largest value.

    Infinite where their shapes differ.
    """
    worst = 0.0
    for before, after in itertools.pairwise(calls):
        if before.output is None or after.given is None or before.output.shape != after.given.shape:
            return float("inf")
        after_given = after.given.to(before.output)
        scale = float(after_given.abs().max()) or 1.0
        worst = max(worst, float((before.output - after_given).abs().max()) / scale)
    return worst
