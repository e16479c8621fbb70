"""Hooks that map the residual stream of a model, while somebody else runs it, to a few numbers per token. Never xarray, a probe or a store.

Every pass ends with one copy to the host, of what all layers were mapped to.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from lmprobe_zarr.errors import InvalidArgumentError, UnknownArchitectureError
from lmprobe_zarr.extraction.models.architectures import locate
from lmprobe_zarr.extraction.models.passing import Passing
from lmprobe_zarr.extraction.models.structure import first_tensor, text_settings
from lmprobe_zarr.extraction.models.wrappers import unwrapped
from lmprobe_zarr.typing import Array, Floats, Ints, Mask

__all__ = ["Generation", "Pass", "criterion_answer", "watched"]

# Values that are converted to float64 at a time.
_AT_ONCE: Final = 1 << 24
# Caches that do not say how many tokens they hold.
_UNCOUNTED: Final = ("cache_params", "state")


@dataclass(frozen=True, slots=True)
class Pass:
    """What one pass over a batch gave.

    Parameters
    ----------
    values : dict of int to ndarray of float64, shape (prompt, token, value)
        By layer.
    real : ndarray of bool, shape (prompt, token)
        Which tokens are no padding.
    before : int
        How many tokens came in earlier passes and are in the cache, padding included.
    ids : ndarray of int, shape (prompt, token), optional
        The token ids; None of embeddings.
    """

    values: Mapping[int, Floats]
    real: Mask
    before: int
    ids: Ints | None


@dataclass(slots=True)
class Generation:
    """The call of ``generate`` that is running.

    Parameters
    ----------
    number : int
        How many there have been; 0 where the model is run in another way.
    running : bool
    ends : tuple of int
        Token ids that end an answer.
    padding : int or None
        The token id that ended answers are filled with, if it ends none itself.
    prompt_length : int or None
        Tokens of the prompts, padding and what is in a cache included; None where embeddings were given.
    """

    number: int = 0
    running: bool = False
    ends: tuple[int, ...] = ()
    padding: int | None = None
    prompt_length: int | None = None


@contextmanager
def watched(
    model: nn.Module,
    matrices: Mapping[int, Floats | None],
    width: int,
    receive: Callable[[Pass], None],
    generation: Generation,
    modules: Mapping[str, str] | None,
) -> Iterator[None]:
    """A model of whose passes some layers are handed over, mapped; its hooks are removed at the end.

    Parameters
    ----------
    model : Module
    matrices : mapping of int to ndarray, shape (value, hidden), or None
        By layer, what its rows are multiplied with; None leaves them as they are.
    width : int
        The hidden size that is expected.
    receive : callable
        Is given each pass when it has ended.
    generation : Generation
        Is kept up to date.
    modules : mapping, optional

    Raises
    ------
    UnknownArchitectureError
        The blocks were not found.
    InvalidArgumentError
        A layer that the model does not have, or another width. While it runs: beam search, and what else cannot be followed.
    """
    inside = unwrapped(model)
    located = locate(inside, modules)
    blocks = located.blocks
    beyond = [layer for layer in matrices if not 0 <= layer < len(blocks)]
    if beyond:
        raise InvalidArgumentError(
            f"the model has layers 0 to {len(blocks) - 1}, and the probe reads layer {beyond[0]}: give the model that it was fitted on"
        )
    hidden = getattr(text_settings(inside), "hidden_size", None)
    if isinstance(hidden, int) and hidden != width:
        raise InvalidArgumentError(
            f"the probe reads layers that are {width} wide and the model is {hidden} wide: give the model that it was fitted on"
        )
    passing = _Watching(located.body, blocks, matrices, width, receive)
    with ExitStack() as stack:
        stack.callback(located.body.register_forward_pre_hook(passing.begin, with_kwargs=True).remove)
        stack.callback(located.body.register_forward_hook(passing.end).remove)
        for module in dict.fromkeys(blocks):
            stack.callback(module.register_forward_hook(passing.take).remove)
        for whole in dict.fromkeys([located.whole, inside]):
            if callable(getattr(whole, "generate", None)):
                stack.enter_context(_following_generate(whole, generation))
                break
        yield


@dataclass(slots=True)
class _Now:
    """The pass that is running."""

    real: torch.Tensor | None
    ids: torch.Tensor | None
    mapped: dict[int, torch.Tensor] = field(default_factory=dict)


class _Watching(Passing):
    def __init__(
        self,
        body: nn.Module,
        blocks: tuple[nn.Module, ...],
        matrices: Mapping[int, Floats | None],
        width: int,
        receive: Callable[[Pass], None],
    ) -> None:
        super().__init__(blocks)
        self._matrices, self._width, self._receive = matrices, width, receive
        self._signature = inspect.signature(body.forward)
        self._on_device: dict[tuple[int, torch.device], torch.Tensor] = {}
        self._now: _Now | None = None

    def begin(self, _module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        """A pass begins."""
        given = dict(kwargs)
        with suppress(TypeError):
            given |= self._signature.bind_partial(*args).arguments
        super().begin(_module, args, given)
        uncounted = next((name for name in _UNCOUNTED if given.get(name) is not None), None)
        if uncounted is not None:
            raise InvalidArgumentError(
                f"the cache of this model ({uncounted}) does not say how many tokens it holds, so a new text cannot be told from one that "
                "goes on: generate with use_cache=False"
            )
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2):
            shape = f"shape {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise InvalidArgumentError(
                f"attention_mask has {shape}, from which padding cannot be told: give one over (prompt, token), and generate with a cache "
                "that grows, cache_implementation='dynamic', not a static or compiled one"
            )
        self._now = _Now(None if mask is None else mask.detach(), ids.detach() if isinstance(ids, torch.Tensor) and ids.ndim == 2 else None)

    def take(self, module: nn.Module, _args: Any, output: Any) -> None:
        """A block has run."""
        layer = self.layer(module)
        if layer not in self._matrices or self._now is None:
            return
        rows = first_tensor(output)
        if rows is None or rows.ndim != 3:
            raise UnknownArchitectureError(f"layer {layer} ({type(module).__name__}) returns no activations over (prompt, token, hidden)")
        if rows.shape[-1] != self._width:
            raise InvalidArgumentError(f"the probe reads {self._width} units and layer {layer} is {rows.shape[-1]} wide")
        self._now.mapped[layer] = self._mapped(rows.detach(), layer)

    def _mapped(self, rows: torch.Tensor, layer: int) -> torch.Tensor:
        # In float64, since the values of a residual stream nearly cancel in a score; MPS has none.
        wide = torch.float32 if rows.device.type == "mps" else torch.float64
        matrix = self._matrices[layer]
        if matrix is None:
            return rows.to(wide)
        key = layer, rows.device
        if key not in self._on_device:
            self._on_device[key] = torch.from_numpy(np.ascontiguousarray(matrix.T)).to(rows.device, wide)
        there = self._on_device[key]
        step = max(1, _AT_ONCE // (rows.shape[0] * rows.shape[2]))
        pieces = [rows[:, first : first + step].to(wide) @ there for first in range(0, rows.shape[1], step)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    def end(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        """A pass has ended."""
        now, self._now = self._now, None
        if now is None:
            return
        missing = [layer for layer in self._matrices if layer not in now.mapped]
        if missing:
            raise UnknownArchitectureError(f"the pass ended without layer {missing[0]}: its block was not called")
        prompts, n = next(iter(now.mapped.values())).shape[:2]
        device = next(iter(now.mapped.values())).device
        widths = [mapped.shape[2] for mapped in now.mapped.values()]
        copied = torch.cat([mapped.to(device) for mapped in now.mapped.values()], dim=2).cpu().numpy().astype(np.float64, copy=False)
        values = dict(zip(now.mapped, np.split(copied, np.cumsum(widths)[:-1], axis=2), strict=True))
        self._receive(Pass(values, self._real(now, prompts, n), self.before, None if now.ids is None else now.ids.cpu().numpy()))

    def _real(self, now: _Now, prompts: int, n: int) -> Mask:
        if now.real is None:
            return np.ones((prompts, n), bool)
        if now.real.shape != (prompts, self.before + n):
            raise InvalidArgumentError(
                f"attention_mask has shape {tuple(now.real.shape)} for {prompts} prompts of {self.before + n} tokens, of which "
                f"{self.before} are in the cache: give one value for each token"
            )
        real: Mask = now.real[:, self.before :].cpu().numpy() != 0
        return real


@contextmanager
def _following_generate(whole: Any, generation: Generation) -> Iterator[None]:
    """Inside, calls of ``generate`` are known, and those that cannot be followed are refused; afterwards the method is as before."""
    original, own = whole.generate, vars(whole).get("generate")

    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)

        def setting(name: str) -> Any:
            places = (kwargs.get(name), getattr(config, name, None), getattr(getattr(whole, "generation_config", None), name, None))
            return next((value for value in places if value is not None), None) if name not in kwargs else kwargs[name]

        if (setting("num_beams") or 1) > 1:
            raise InvalidArgumentError(
                f"num_beams={setting('num_beams')} is beam search, which goes back to other texts, and what was pooled cannot be taken "
                "back: generate with num_beams=1"
            )
        for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit"):
            if setting(name):
                raise InvalidArgumentError(
                    f"{name}= lets tokens be guessed and taken back, and what was pooled cannot be taken back: generate without it"
                )
        ends = setting("eos_token_id")
        listed = () if ends is None else tuple(int(each) for each in np.atleast_1d(np.asarray(_on_host(ends))))
        padding = setting("pad_token_id")
        padding = None if padding is None or int(padding) in listed else int(padding)
        generation.number, generation.running, generation.ends, generation.padding = generation.number + 1, True, listed, padding
        ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        generation.prompt_length = int(ids.shape[1]) if isinstance(ids, torch.Tensor) and ids.ndim == 2 else None
        try:
            return original(*args, **kwargs)
        finally:
            generation.running = False

    whole.generate = generate
    try:
        yield
    finally:
        if own is None:
            del whole.generate
        else:
            whole.generate = own


def _on_host(value: Any) -> Any:
    return value.cpu().numpy() if isinstance(value, torch.Tensor) else value


def criterion_answer(done: Array, input_ids: Any) -> Any:
    """Truth values as the stopping criteria of transformers give them."""
    return torch.from_numpy(np.array(done, bool)).to(input_ids.device)
