"""Forward passes with hooks: tokenized prompts to an iterator of `TokenBatch`. Never a path, a store or a tokenizer.

Without logits or perplexity only the model's body runs, up to the deepest layer asked for. With them the whole model runs, so that its
logits are scaled and capped as it does itself; but its head sees no padding, and where that is enough only the last token of every prompt.

Batches are padded on the right, whatever the tokenizer's padding side. In a causal model no token sees those after it, so padding on the
right changes nothing, needs no mask, and leaves every token at the position that it has alone; encoders get the mask. Padding never leaves
this file.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lmprobe_zarr.batch import (
    LAYERED_SITES,
    NO_OUTPUTS,
    LayerSpec,
    Outputs,
    TokenBatch,
    concat_ranges,
    describe_layers,
    offsets_of,
    parse_poolings,
    parse_sites,
    positions_of,
    resolve_layers,
    row_bytes,
    shorten,
)
from lmprobe_zarr.errors import DeviceMemoryError, InvalidArgumentError, UnknownArchitectureError
from lmprobe_zarr.extraction.models.loading import LoadedModel, check_head, quiet_logging
from lmprobe_zarr.extraction.models.outputs import gives_raw_scores, head_width, largest, next_token_log_probs, perplexity_of, raw_scores
from lmprobe_zarr.extraction.models.padded_pooling import POOL_PADDED
from lmprobe_zarr.extraction.models.tokenizing import TokenizedPrompts, outside_vocabulary
from lmprobe_zarr.extraction.models.turns import running
from lmprobe_zarr.typing import Ints

__all__ = ["Progress", "default_batch_tokens", "run"]

Progress = Callable[[int, int], None]

DEVICE_TOKENS: Final = {"cuda": 16384, "mps": 4096, "cpu": 1024}  # on two cores, 1,024 to 1,536 stay in their caches
# A batch's kept activations, on the device and again on the host while they are written.
BATCH_BYTES: Final = 256 << 20
LEAST_TOKENS: Final = 256
# What a logit weighs while it is computed, whatever its dtype.
LOGIT_BYTES: Final = 4
NUMPY_DTYPES: Final = (torch.float32, torch.float16, torch.float64, torch.int32)


class _DeepestLayerDoneError(Exception):
    """Raised in the last hook that is needed, to spend nothing on the layers and the head behind it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """What to take."""

    layers: tuple[int, ...]
    sites: tuple[str, ...]
    poolings: tuple[str, ...]
    keep_tokens: bool
    outputs: Outputs = NO_OUTPUTS
    # Layers of the router, and whether its own output is what is wanted.
    routers: tuple[int, ...] = ()
    routers_raw: bool = True

    @property
    def head_rows(self) -> str:
        """The tokens that the head has to see; see :meth:`_Padded.index`."""
        return "tokens" if self.outputs.perplexity or self.outputs.logits == "all" else "last_token"

    @property
    def token_level(self) -> bool:
        return self.keep_tokens or self.outputs.token_level

    @property
    def router_apart(self) -> bool:
        """Whether the router needs a batch of its own, because other variables have other layers."""
        return bool(self.layers) and bool(self.routers) and self.layers != self.routers

    @property
    def deepest(self) -> int | None:
        """The block after which nothing is needed; None for none of them."""
        return max((*self.layers, *self.routers), default=None)


@dataclass(slots=True)
class _Padded:
    """One batch as the model sees it, and where its tokens lie in (batch × longest) rows."""

    lengths: Ints
    longest: int
    token_ids: Ints
    copies: dict[tuple[str, torch.device], torch.Tensor] = field(default_factory=dict)

    def index(self, what: str, device: torch.device) -> torch.Tensor:
        """Rows of the ``tokens``, of the ``last_token`` or ``first_token`` of every prompt; or the ``mask``, shape (batch, longest, 1).

        Without padding: the ``ids``, and the rows of the ``firsts`` and ``lasts`` among the tokens end to end.
        """
        if (what, device) not in self.copies:
            starts = np.arange(len(self.lengths), dtype=np.int64) * self.longest
            if what == "mask":
                values: npt.NDArray[Any] = (np.arange(self.longest) < self.lengths[:, None])[..., None]
            elif what == "tokens":
                values = concat_ranges(starts, self.lengths)
            elif what == "ids":
                values = self.token_ids
            elif what in ("firsts", "lasts"):
                values = offsets_of(self.lengths)[:-1] + (self.lengths - 1 if what == "lasts" else 0)
            else:
                values = starts + (self.lengths - 1 if what == "last_token" else 0)
            self.copies[what, device] = torch.from_numpy(values).to(device)
        return self.copies[what, device]

    def pool(self, hidden: torch.Tensor, pooling: str) -> torch.Tensor:
        """(batch, longest, width) to (batch, width), as :func:`~lmprobe_zarr.pooling.pool_ragged` does it."""
        return POOL_PADDED[pooling](hidden, self.index)


@dataclass(slots=True)
class _Collected:
    """The activations of one batch as they come in, layer by layer, in one buffer per variable.

    Everything is copied at once: some models (Falcon) go on to write into what their modules return.
    """

    request: _Request
    padded: _Padded
    on_host: bool
    tokens: dict[str, torch.Tensor] = field(default_factory=dict)
    prompts: dict[str, torch.Tensor] = field(default_factory=dict)
    seen: set[tuple[str, int | None]] = field(default_factory=set)

    def take(self, site: str, layer: int | None, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple | list) else output
        batch, longest = len(self.padded.lengths), self.padded.longest
        # Older OPT runs its MLP on (batch × longest, width).
        if not isinstance(hidden, torch.Tensor) or hidden.ndim not in {2, 3} or hidden.shape[:-1].numel() != batch * longest:
            got = tuple(hidden.shape) if isinstance(hidden, torch.Tensor) else type(hidden).__name__
            raise UnknownArchitectureError(
                f"the module at site {site!r} gives {got}, not (batch {batch}, token {longest}, hidden): name the right one with modules="
            )
        hidden = hidden.reshape(batch, longest, hidden.shape[-1])
        self.seen.add((site, layer))
        if self.request.keep_tokens or site == "router":
            flat, wanted = hidden.flatten(0, 1), self.padded.index("tokens", hidden.device)
            room = self._room(self.tokens, site, layer, (len(wanted), flat.shape[1]), flat)
            if room is None:
                self._put(self.tokens, site, layer, flat.index_select(0, wanted))
            else:
                torch.index_select(flat, 0, wanted, out=room)
        for pooling in self.request.poolings if site != "router" else ():
            self._put(self.prompts, f"{site}_{pooling}", layer, self.padded.pool(hidden, pooling))

    def take_logits(self, output: Any) -> None:
        """What is kept of what the whole model gave."""
        outputs, padded = self.request.outputs, self.padded
        logits = getattr(output, "logits", output[0] if isinstance(output, tuple) and output else None)
        every = self.request.head_rows == "tokens"
        wanted, cells = len(padded.token_ids) if every else len(padded.lengths), len(padded.lengths) * padded.longest
        if not isinstance(logits, torch.Tensor) or logits.ndim < 2 or logits.shape[:-1].numel() not in {wanted, cells}:
            got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(output).__name__
            raise UnknownArchitectureError(
                f"the model gives {got} where logits of (batch {len(padded.lengths)}, token {padded.longest}, vocab) were expected: "
                "leave logits and perplexity out"
            )
        rows = logits.reshape(-1, logits.shape[-1])
        if len(rows) != wanted:
            # Its head was not seen at work, and so it saw the padding too.
            rows = rows.index_select(0, padded.index(self.request.head_rows, rows.device))
        if outputs.perplexity:
            ids, firsts = padded.index("ids", rows.device), padded.index("firsts", rows.device)
            self._put(self.tokens, "token_log_prob", None, next_token_log_probs(rows, ids, firsts))
        if outputs.logits is None:
            return
        if every and outputs.logits == "last_token":
            rows = rows.index_select(0, padded.index("lasts", rows.device))
        buffers, name = (self.tokens, "logits") if outputs.logits == "all" else (self.prompts, "logits_last_token")
        if outputs.top_k is None:
            self._put(buffers, name, None, rows)
        else:
            values, indices = largest(rows, outputs.top_k)
            self._put(buffers, f"{name}_top_k_values", None, values)
            self._put(buffers, f"{name}_top_k_indices", None, indices)

    def _put(self, buffers: dict[str, torch.Tensor], variable: str, layer: int | None, rows: torch.Tensor) -> None:
        if layer is None:
            buffers[variable] = rows.cpu() if self.on_host else rows
            return
        buffer = self._buffer(buffers, variable, tuple(rows.shape), rows)
        if buffer.dtype != rows.dtype:
            # Layers may be kept at a higher precision than the rest.
            buffer = buffers[variable] = buffer.to(torch.promote_types(buffer.dtype, rows.dtype))
        buffer[self._layers(variable).index(layer)].copy_(rows)

    def _layers(self, variable: str) -> tuple[int, ...]:
        return self.request.routers if variable == "router" else self.request.layers

    def _buffer(self, buffers: dict[str, torch.Tensor], variable: str, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        if variable not in buffers:
            home = torch.device("cpu") if self.on_host else like.device
            buffers[variable] = torch.empty((len(self._layers(variable)), *shape), dtype=like.dtype, device=home)
        return buffers[variable]

    def _room(
        self, buffers: dict[str, torch.Tensor], variable: str, layer: int | None, shape: tuple[int, ...], like: torch.Tensor
    ) -> torch.Tensor | None:
        """Where rows of a layer go, if they can be gathered right there, which saves a copy: same device and dtype."""
        if layer is None:
            return None
        buffer = self._buffer(buffers, variable, shape, like)
        alike = buffer.dtype == like.dtype and buffer.device == like.device
        return buffer[self._layers(variable).index(layer)] if alike else None


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """No dropout inside; every part back in its own mode afterwards."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _hooks(loaded: LoadedModel, collected: _Collected, stack: ExitStack) -> None:
    """Hooks at every site asked for; removed with the stack. The last one to be reached stops the pass, unless the head is needed."""
    request, located = collected.request, loaded.located
    stops = not request.outputs.needs_head
    outputs = {"resid": located.blocks, "attn": located.attn, "mlp": located.mlp}

    def keep(site: str, layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            collected.take(site, layer, output)

        return hook

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        collected.take("embed", None, args[0] if args else kwargs["hidden_states"])
        if stops and request.deepest is None:
            raise _DeepestLayerDoneError

    def score(layer: int) -> Callable[..., None]:
        def hook(gate: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            collected.take("router", layer, raw_scores(gate, (*args, *kwargs.values()), output if request.routers_raw else None))

        return hook

    def score_unseen(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any) -> None:
            # Some only take the weights of their gate and never call it.
            if ("router", layer) not in collected.seen:
                collected.take("router", layer, raw_scores(located.routers[layer].gate, (*args, *kwargs.values())))

        return hook

    def leave_padding_out(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = args[0] if args else None
        if not isinstance(hidden, torch.Tensor) or hidden.shape[:-1] != (len(collected.padded.lengths), collected.padded.longest):
            return None
        return (hidden.flatten(0, 1).index_select(0, collected.padded.index(request.head_rows, hidden.device))[None], *args[1:])

    def stop(*_: Any) -> None:
        raise _DeepestLayerDoneError

    handles = []
    if "embed" in request.sites:
        handles.append(located.blocks[0].register_forward_pre_hook(enter, with_kwargs=True))
    for site in request.sites:
        parts = outputs.get(site)
        if parts is not None:
            handles += [parts[layer].register_forward_hook(keep(site, layer)) for layer in request.layers]
    for layer in request.routers:
        router = located.routers[layer]
        handles.append(router.gate.register_forward_hook(score(layer), with_kwargs=True))
        if router.around is not None:
            handles.append(router.around.register_forward_hook(score_unseen(layer), with_kwargs=True))
    if stops and request.deepest is not None:
        handles.append(located.blocks[request.deepest].register_forward_hook(stop))
    elif not stops and located.head is not None:
        handles.append(located.head.register_forward_pre_hook(leave_padding_out))
    for handle in handles:
        stack.callback(handle.remove)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Calling:
    """What is called and how, and which prompts may share a batch."""

    module: nn.Module
    takes_mask: bool
    takes_cache: bool
    uniform_above: int | None

    @staticmethod
    def of(loaded: LoadedModel, request: _Request) -> _Calling:
        module = loaded.located.whole if request.outputs.needs_head and loaded.located.whole is not None else loaded.located.body
        names = inspect.signature(module.forward).parameters
        takes_mask = "attention_mask" in names or any(p.kind is p.VAR_KEYWORD for p in names.values())
        config = getattr(loaded.located.body, "config", None)
        rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, dict) else None
        uniform = None
        if kind in {"dynamic", "longrope"}:
            # These turn by the longest prompt of the batch once it is past the original window.
            uniform = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None) or 0
        elif not takes_mask and not loaded.located.causal:
            uniform = 0
        return _Calling(module=module, takes_mask=takes_mask, takes_cache="use_cache" in names, uniform_above=uniform)


def _forward(loaded: LoadedModel, calling: _Calling, request: _Request, ids: Sequence[Ints]) -> _Collected:
    lengths = np.array([len(i) for i in ids], np.int64)
    longest = int(lengths.max())
    padded = np.full((len(ids), longest), loaded.pad_id, np.int64)
    for row, tokens in zip(padded, ids, strict=True):
        row[: len(tokens)] = tokens
    collected = _Collected(request, _Padded(lengths, longest, np.concatenate(ids)), on_host=loaded.spread)
    options: dict[str, Any] = {"use_cache": False} if calling.takes_cache else {}
    if calling.takes_mask and not loaded.located.causal and lengths.min() < longest:
        options["attention_mask"] = collected.padded.index("mask", loaded.device)[..., 0].to(torch.int64)
    with ExitStack() as stack:
        stack.enter_context(running(loaded.located.body))
        stack.enter_context(_evaluating(loaded.module))
        stack.enter_context(torch.inference_mode())
        # GPT-2 asks for the mask that a causal model does not need here.
        stack.enter_context(quiet_logging())
        _hooks(loaded, collected, stack)
        stack.enter_context(suppress(_DeepestLayerDoneError))
        output = calling.module(input_ids=torch.from_numpy(padded).to(loaded.device), **options)
        if request.outputs.needs_head:
            collected.take_logits(output)
    wanted: set[tuple[str, int | None]] = {(site, layer) for site in request.sites if site in LAYERED_SITES for layer in request.layers}
    wanted |= {(site, None) for site in request.sites if site not in LAYERED_SITES} | {("router", layer) for layer in request.routers}
    absent = sorted(map(str, wanted - collected.seen))
    if absent:
        raise UnknownArchitectureError(
            f"the model ran without calling {absent[0]} ({len(absent)} in all): name the right ones with modules="
        )
    return collected


@dataclass(slots=True)
class _OnTheWay:
    """One batch whose arrays are being copied to the host."""

    rows: Ints
    tokens: dict[str, torch.Tensor]
    prompts: dict[str, torch.Tensor]
    arrived: Any


def _to_host(collected: _Collected, rows: Ints) -> _OnTheWay:
    """All variables of a batch on their way to the host; on CUDA through pinned memory, without waiting."""

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type != "cuda":
            return tensor.cpu()
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)

    tokens = {name: copied(tensor) for name, tensor in collected.tokens.items()}
    prompts = {name: copied(tensor) for name, tensor in collected.prompts.items()}
    arrived: Any = None
    device = next((t.device for t in (*collected.tokens.values(), *collected.prompts.values()) if t.device.type == "cuda"), None)
    if device is not None:
        with torch.cuda.device(device):
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
    return _OnTheWay(rows, tokens, prompts, arrived)


def _to_numpy(tensors: dict[str, torch.Tensor], stored: dict[str, str]) -> dict[str, npt.NDArray[Any]]:
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name, tensor in tensors.items():
        if tensor.dtype in NUMPY_DTYPES:
            arrays[name] = tensor.numpy()
        else:
            # numpy has no bfloat16; float32 holds its values exactly, and is widened here, after the copy.
            stored[name] = str(tensor.dtype).removeprefix("torch.")
            arrays[name] = tensor.float().numpy()
    return arrays


def _finish(going: _OnTheWay, tokenized: TokenizedPrompts, request: _Request) -> Iterator[TokenBatch]:
    """The batch; and where the router has other layers than the rest, one of its own after it."""
    if going.arrived is not None:
        going.arrived.synchronize()
    part = tokenized.take(going.rows)
    stored: dict[str, str] = {}
    columns: dict[str, npt.NDArray[Any]] = {}
    if request.token_level:
        columns = {"position": positions_of(part.lengths), "token_id": part.token_ids}
        if part.char_start is not None and part.char_end is not None:
            columns |= {"char_start": part.char_start, "char_end": part.char_end}
    tokens, prompts = _to_numpy(going.tokens, stored), _to_numpy(going.prompts, stored)
    if request.outputs.perplexity:
        prompts["perplexity"], tokens["token_perplexity"] = perplexity_of(tokens["token_log_prob"], part.lengths)
    flat = {name for _, name, layered in request.outputs.variables() if not layered}

    def batch(layers: tuple[int, ...], tokens: dict[str, npt.NDArray[Any]], prompts: dict[str, npt.NDArray[Any]]) -> TokenBatch:
        names = {*tokens, *prompts}
        return TokenBatch(
            sha256=part.sha256,
            text=part.text,
            prompt_length=part.lengths,
            n_tokens=part.lengths if request.token_level else None,
            layers=layers,
            tokens=tokens,
            token_columns=columns,
            prompts=prompts,
            unlayered=frozenset(name for name in names if name in flat or name.split("_")[0] == "embed"),
            stored_dtype={name: dtype for name, dtype in stored.items() if name in names},
        )

    router = {"router": tokens.pop("router")} if request.router_apart else {}
    yield batch(request.layers or request.routers, tokens, prompts)
    if router:
        yield batch(request.routers, router, {})


def _is_out_of_memory(error: BaseException) -> bool:
    kind = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)
    words = str(error)
    return isinstance(error, kind | MemoryError) or "out of memory" in words or "can't allocate memory" in words


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def default_batch_tokens(device: str, bytes_per_token: int = 0) -> int:
    """Padded tokens per batch where the caller names no number.

    Parameters
    ----------
    device : {"cuda", "mps", "cpu"}
    bytes_per_token : int
        What is kept of every token, and what its logits weigh where they are computed: a batch holds at most 256 MiB of it.
    """
    most = DEVICE_TOKENS.get(device, DEVICE_TOKENS["cpu"])
    return most if not bytes_per_token else max(LEAST_TOKENS, min(most, BATCH_BYTES // bytes_per_token))


def _next_batch(lengths: Ints, budget: int, uniform_above: int | None, most: int | None = None) -> int:
    """How many of the prompts ahead go into the next batch.

    Parameters
    ----------
    lengths : ndarray of int64
        Tokens of the prompts ahead, sorted.
    budget : int
        Padded tokens: prompts × longest.
    uniform_above : int or None
        Prompts longer than this share a batch with their equals only.
    most : int, optional
        Prompts.
    """
    longest = np.maximum.accumulate(lengths)
    fits = int(np.searchsorted(longest * np.arange(1, len(lengths) + 1), budget, side="right"))
    if uniform_above is not None:
        short = lengths <= uniform_above
        alike = short if short[0] else lengths == lengths[0]
        fits = min(fits, int(np.argmin(alike)) if not alike.all() else len(lengths))
    return max(1, fits if most is None else min(fits, most))


def _check_outputs(loaded: LoadedModel, tokenized: TokenizedPrompts, request: _Request, chosen: tuple[int, ...]) -> None:
    outputs = request.outputs
    if outputs.needs_head:
        check_head(loaded)
        width = head_width(loaded.located.head, loaded.vocab_size)
        if outputs.top_k is not None and width is not None and outputs.top_k > width:
            raise InvalidArgumentError(f"top_k={outputs.top_k} is more than the {width} logits of {loaded.name!r}: give at most {width}")
        if outputs.perplexity:
            _check_vocabulary(tokenized, width)
    if outputs.router and not loaded.router_layers:
        raise UnknownArchitectureError(
            f"{loaded.name!r} has no router that is known: leave router out, or name it where it is a mixture of experts, "
            "modules={'layers': '…', 'router': 'mlp.gate'}"
        )
    if outputs.router and not request.routers:
        raise InvalidArgumentError(
            f"layers {describe_layers(chosen)} of {loaded.name!r} have no router: leave router out, or ask for layers among "
            f"{describe_layers(loaded.router_layers)}"
        )


def _check_vocabulary(tokenized: TokenizedPrompts, vocab_size: int | None) -> None:
    if vocab_size is not None and len(tokenized) and tokenized.token_ids.max() >= vocab_size:
        place = int(tokenized.token_ids.argmax())
        row = int(np.searchsorted(np.cumsum(tokenized.lengths), place, side="right"))
        raise outside_vocabulary(int(tokenized.first[row]), int(tokenized.token_ids[place]), vocab_size)


def _check(
    loaded: LoadedModel, tokenized: TokenizedPrompts, request: _Request, batch_tokens: int | None, batch_prompts: int | None
) -> None:
    if not request.keep_tokens and not request.poolings and not request.outputs:
        raise InvalidArgumentError("nothing would be kept: give a pooling, keep_tokens=True or outputs=")
    if batch_prompts is not None and (isinstance(batch_prompts, bool) or not isinstance(batch_prompts, int) or batch_prompts < 1):
        raise InvalidArgumentError(f"batch_prompts={batch_prompts!r} is no number of prompts: give a whole number of at least 1, or None")
    if batch_tokens is not None and (isinstance(batch_tokens, bool) or not isinstance(batch_tokens, int) or batch_tokens < 1):
        raise InvalidArgumentError(f"batch_tokens={batch_tokens!r} is no number of tokens: give a whole number of at least 1, or None")
    _check_vocabulary(tokenized, loaded.vocab_size)
    for site in ("attn", "mlp"):
        if site in request.sites and getattr(loaded.located, site) is None:
            raise UnknownArchitectureError(
                f"site {site!r} of {loaded.name!r} is not known: name it, modules={{'layers': '…', {site!r}: '…'}}"
            )


def run(
    loaded: LoadedModel,
    tokenized: TokenizedPrompts,
    *,
    layers: LayerSpec = "all",
    sites: str | Sequence[str] = ("resid",),
    poolings: str | Sequence[str] = ("last_token",),
    keep_tokens: bool = False,
    outputs: Outputs = NO_OUTPUTS,
    batch_tokens: int | None = None,
    batch_prompts: int | None = None,
    progress: Progress | None = None,
) -> Iterator[TokenBatch]:
    """The activations of every prompt, batch by batch, the longest prompts first.

    Parameters
    ----------
    loaded : LoadedModel
    tokenized : TokenizedPrompts
    layers : LayerSpec
        Nothing behind the deepest of them is computed, unless `outputs` need the head. Without meaning where nothing has layers. The
        router comes from those of them that have one.
    sites : sequence of {"resid", "attn", "mlp", "embed"}
        May be empty where `outputs` are asked for.
    poolings : sequence of {"last_token", "first_token", "mean", "max", "min"}
        Pooled on the device; variables ``<site>_<pooling>``, (layer, prompt, hidden).
    keep_tokens : bool
        Whether every token is kept too; variables ``<site>``, (layer, token, hidden).
    outputs : Outputs
        What else to keep, from the same forward pass; names and meanings in :mod:`lmprobe_zarr.sites`. Logits and router as the model
        computed them, perplexities and log-probabilities in float32.
    batch_tokens : int, optional
        Padded tokens per batch: prompts × longest. A prompt longer than that is run alone. None: see :func:`default_batch_tokens`.
    batch_prompts : int, optional
        Prompts per batch at most.
    progress : callable, optional
        Called with the number of prompts and of tokens of every batch.

    Yields
    ------
    TokenBatch
        Float32, float16 and float64 as the model computed them; bfloat16 as float32 of the same values, named in ``stored_dtype``.
        Where the router has other layers than the other variables, it comes in a batch of its own, directly after theirs, with the same
        prompts and columns.

    Raises
    ------
    DeviceMemoryError
        The device cannot hold a single prompt. Batches that do not fit are halved, and so are all that follow.
    UnknownArchitectureError
        A site or a router that is not known for this model.
    InvalidArgumentError, LayerOutOfRangeError
        Arguments out of range, a head that is needed and not there, or layers without a router; raised at once, not at the first batch.
    """
    names = parse_sites(sites, outputs)
    pooled = parse_poolings(poolings if isinstance(poolings, str) else tuple(poolings))
    if outputs and not pooled and not keep_tokens:
        names = ()  # nothing of them would be kept
    layered = any(site in LAYERED_SITES for site in names)
    # A number or array of numpy's is a number or a list here.
    chosen = resolve_layers(layers.tolist() if isinstance(layers, np.ndarray | np.generic) else layers, loaded.num_layers)
    request = _Request(
        layers=chosen if layered else (),
        sites=names,
        poolings=pooled,
        keep_tokens=keep_tokens and bool(names),
        outputs=outputs,
        routers=tuple(layer for layer in chosen if layer in loaded.located.routers) if outputs.router else (),
    )
    _check(loaded, tokenized, request, batch_tokens, batch_prompts)
    _check_outputs(loaded, tokenized, request, chosen)
    if request.routers:
        gate, dtype = loaded.located.routers[request.routers[0]].gate, getattr(torch, loaded.dtype)
        with running(loaded.located.body), _evaluating(gate):
            request = replace(request, routers_raw=gives_raw_scores(gate, loaded.hidden_size, dtype, loaded.device, loaded.name))
    width = head_width(loaded.located.head, loaded.vocab_size) or 0
    most = None
    if batch_tokens is None:
        size = {"layers": max(len(request.layers), len(request.routers)), "hidden_size": loaded.hidden_size or 0, "dtype": loaded.dtype}
        kept = {"sites": names, "pooling": (), "keep_tokens": request.keep_tokens, "outputs": outputs}
        weight = row_bytes(**size, **kept, vocab_size=width, experts=loaded.num_experts).token  # type: ignore[arg-type]
        if outputs.needs_head and request.head_rows == "tokens":
            weight += LOGIT_BYTES * width
        elif outputs.needs_head:
            most = max(1, BATCH_BYTES // (LOGIT_BYTES * max(1, width)))
        batch_tokens = default_batch_tokens(loaded.device.type, weight)
    if batch_prompts is not None:
        most = batch_prompts if most is None else min(most, batch_prompts)
    return _batches(loaded, tokenized, request, batch_tokens, most, progress)


def _batches(
    loaded: LoadedModel, tokenized: TokenizedPrompts, request: _Request, budget: int, most: int | None, progress: Progress | None
) -> Iterator[TokenBatch]:
    calling = _Calling.of(loaded, request)
    starts = offsets_of(tokenized.lengths)
    # The longest first, so that memory runs out at once or never; ascending where a model's state only grows with the length.
    order = np.argsort(tokenized.lengths if calling.uniform_above is not None else -tokenized.lengths, kind="stable")
    done = 0
    before: _OnTheWay | None = None
    while done < len(order):
        count = _next_batch(tokenized.lengths[order[done:]], budget, calling.uniform_above, most)
        rows = np.sort(order[done : done + count])
        going = _attempt(loaded, calling, request, tokenized, starts, rows)
        if going is None:
            budget = max(1, count * int(tokenized.lengths[rows].max()) // 2)
            _free(loaded.device)
            continue
        done += count
        # The batch before is read while the device works on this one.
        if before is not None:
            yield from _finish(before, tokenized, request)
        before = going if going.arrived is not None else None
        if progress is not None:
            progress(count, int(tokenized.lengths[rows].sum()))
        if before is None:
            yield from _finish(going, tokenized, request)
    if before is not None:
        yield from _finish(before, tokenized, request)


def _attempt(
    loaded: LoadedModel, calling: _Calling, request: _Request, tokenized: TokenizedPrompts, starts: Ints, rows: Ints
) -> _OnTheWay | None:
    """One batch, or None where the device has no memory for it: what it held is free once this has returned."""
    ids = [tokenized.token_ids[starts[i] : starts[i + 1]] for i in rows]
    try:
        return _to_host(_forward(loaded, calling, request, ids), rows)
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        if len(rows) == 1:
            number = int(tokenized.first[rows[0]])
            raise DeviceMemoryError(
                f"prompts[{number}] {shorten(tokenized.text[rows[0]])} with {len(ids[0])} tokens does not fit into the memory "
                f"of {str(loaded.device)!r}: "
                "use a smaller dtype or fewer layers, device_map='auto', or truncation=True with max_length="
            ) from error
        return None
