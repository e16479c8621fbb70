"""The check of a model before its first prompt: two short prompts through the captured pass and through the model's own.

Nothing is believed from a family's name. Alone, as the model itself runs them, the two prompts give the right values. Then they are run as
they would be captured: padded in one batch without a mask, with a mask, in batches of equal length, one at a time. The first way that gives
the right values is how the model is run. In the same passes it is seen that every block is called once and in order, that what goes into a
block came out of the block before it, how the rows are laid out, and whether a token sees those after it.
"""

from __future__ import annotations

import inspect
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from lmprobe_zarr.errors import DeviceMemoryError, UnknownArchitectureError
from lmprobe_zarr.extraction.models.architectures import Place
from lmprobe_zarr.extraction.models.batching import is_out_of_memory
from lmprobe_zarr.extraction.models.captured import CaptureRequest, Collected
from lmprobe_zarr.extraction.models.conduct import Conduct, Layout, Padding
from lmprobe_zarr.extraction.models.forward import ModelCall, run_forward_pass
from lmprobe_zarr.extraction.models.loaded_model import LoadedModel
from lmprobe_zarr.extraction.models.loading_report import quiet_logging
from lmprobe_zarr.extraction.models.paired import PairedBody, encoder_ids_of
from lmprobe_zarr.extraction.models.structure import (
    CHAIN_TOLERANCE,
    Call,
    chained,
    first_line,
    is_decoder_of_encoder,
    leaving_no_hooks,
    plain_ids,
    trace,
)
from lmprobe_zarr.extraction.models.turns import running
from lmprobe_zarr.extraction.models.wrappers import uncompiled
from lmprobe_zarr.typing import Ints

__all__ = ["check_model"]

LONG: Final = 7
SHORT: Final = 3
# The largest difference between a token alone and in a batch, relative to the length of its vector, that is rounding; and between two
# batches of the same shape, which differ in their padding only.
ROUNDING: Final = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 8e-2}
SAME_SHAPE: Final = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
# With reduced precision of matrix products (TF32), float32 rounds more.
REDUCED: Final = 2e-2
# A model that its user has loaded is given to many calls. What was examined holds as long as its fingerprint and its settings do.
_EXAMINED: Final[WeakKeyDictionary[nn.Module, tuple[str, Conduct]]] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Alone:
    """One prompt by itself, through the model's own pass."""

    ids: list[int]
    rows: torch.Tensor  # (layer, token, hidden), float64 on the host


def check_model(loaded: LoadedModel) -> Conduct:
    """How a model has to be run; examined once per loaded model, and once per model object until it is edited.

    Raises
    ------
    UnknownArchitectureError
        No way of running it gives the values that it gives by itself, or its blocks are not what they seem.
    """
    known = loaded.checked.get("conduct")
    if known is None:
        # As prompts are run: hooks do not run in compiled code.
        with running(loaded.turn), uncompiled(loaded.module):
            known = loaded.checked["conduct"] = _examined(loaded)
        loaded.recorded["padding"] = known.padding
        loaded.recorded["causal"] = known.causal
        for name, path in loaded.located.paths.items():
            loaded.recorded[f"found_{name}"] = path
        if len(set(loaded.located.mixers)) > 1:
            loaded.recorded["mixers"] = list(loaded.located.mixers)
    return known


def _examined(loaded: LoadedModel) -> Conduct:
    settings = loaded.provenance, loaded.recorded, loaded.located.paths, str(loaded.device), loaded.spread
    key = json.dumps(settings, sort_keys=True, default=str)
    held, known = _EXAMINED.get(loaded.module, ("", None))
    if known is None or held != key:
        known = _examine(loaded)
        _EXAMINED[loaded.module] = key, known
    return known


def _examine(loaded: LoadedModel) -> Conduct:
    ids = plain_ids(loaded.located.body, LONG + SHORT + 1)
    long, other = ids[:LONG], [*ids[: LONG - 1], ids[-1]]
    with leaving_no_hooks(loaded.module):
        calls, states = _own_pass(loaded, long)
        if not calls and loaded.located.by_hand:
            # Modules inside the blocks may be called all the same. No padding is the careful way to run them.
            return Conduct(padding="equal")
        _check_calls(loaded, calls)
        layout, extra = _layout(loaded, calls, states)
        alone = _alone(loaded, calls, long, layout)
        _check_states(loaded, alone, states)
        short = _alone(loaded, _own_pass(loaded, ids[LONG:-1])[0], ids[LONG:-1], layout)
    request = CaptureRequest(
        layers=_called_layers(loaded, calls),
        places={"resid": Place(modules=dict(enumerate(loaded.located.blocks)))},
        poolings=(),
        keep_tokens=True,
    )
    conduct, captured = _whole_or_body(loaded, request, Conduct(layout=layout, extra_rows=extra, layers=request.layers), alone)
    conduct = replace(conduct, causal=_is_causal(loaded, request, conduct, captured, other))
    return replace(conduct, padding=_padding(loaded, request, conduct, (alone, short), other))


def _called_layers(loaded: LoadedModel, calls: Sequence[Call]) -> tuple[int, ...]:
    """The layers that a pass over token ids calls: all but, for example, those that look at an image."""
    blocks, called = loaded.located.blocks, iter([id(loaded.located.blocks[call.index]) for call in calls])
    found, following = [], next(called, None)
    for layer, block in enumerate(blocks):
        if id(block) == following:
            found.append(layer)
            following = next(called, None)
    return tuple(found)


def _refused(loaded: LoadedModel, why: str) -> UnknownArchitectureError:
    layers = loaded.located.paths.get("layers", "?")
    return UnknownArchitectureError(
        f"{loaded.name!r} ({type(loaded.module).__name__}, blocks {layers!r}) is not run: {why}. "
        "Nothing was stored; if other modules are its blocks, name them with modules={'layers': '…'}"
    )


# --------------------------------------------------------------------------------------------------------- the model by itself


def _takes(module: nn.Module, name: str) -> bool:
    parameters = inspect.signature(module.forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _own(loaded: LoadedModel) -> list[nn.Module]:
    """What the model's users call, and its body, if that is another module."""
    whole, body = loaded.module, loaded.located.body
    if whole is body or not _takes(whole, "input_ids") or is_decoder_of_encoder(whole, body) or _is_encoder_decoder(whole):
        return [body]
    return [whole, body]


def _is_encoder_decoder(module: nn.Module) -> bool:
    return bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))


def _own_pass(loaded: LoadedModel, ids: Sequence[int]) -> tuple[list[Call], tuple[torch.Tensor, ...]]:
    """The calls of the blocks while the model runs one prompt by itself, and its ``hidden_states``, if it gives them."""
    errors = []
    for module in _own(loaded):
        states = {"output_hidden_states": True} if _takes(module, "output_hidden_states") else {}
        uncached = {"use_cache": False} if _takes(module, "use_cache") else {}
        # As its users call it, if that is possible.
        for options in (states, {**states, **uncached}, uncached):
            try:
                with quiet_logging():
                    calls, output = trace(module, loaded.located.blocks, ids, device=loaded.device, **options)
            except Exception as error:  # any error of a model's own code; the next way may do
                if is_out_of_memory(error):
                    raise DeviceMemoryError(
                        f"a prompt of {len(ids)} tokens does not fit into the memory of {str(loaded.device)!r} beside {loaded.name!r}: "
                        "use a smaller dtype, or device_map='auto'"
                    ) from error
                errors.append(error)
                continue
            given = getattr(output, "hidden_states", None)
            return calls, tuple(given) if isinstance(given, tuple | list) else ()
    raise _refused(loaded, f"it does not run on token ids alone ({first_line(errors[0])})") from errors[0]


def _check_calls(loaded: LoadedModel, calls: Sequence[Call]) -> None:
    blocks = loaded.located.blocks
    if not calls:
        raise _refused(loaded, "a pass calls none of its blocks by themselves, so that hooks on them see nothing")
    modules = [id(blocks[call.index]) for call in calls]
    if len(calls) > len(blocks):
        raise _refused(
            loaded, f"a pass calls its {len(blocks)} blocks {len(calls)} times: it is not clear which values are those of a layer"
        )
    left = iter([id(block) for block in blocks])
    if not all(module in left for module in modules):
        raise _refused(loaded, "a pass calls its blocks in another order than they are listed")
    gap = chained(calls)
    if gap > CHAIN_TOLERANCE and not loaded.located.by_hand:
        raise _refused(loaded, f"what goes into a block is not what came out of the one before it (relative difference {gap:.2g})")


def _layout(loaded: LoadedModel, calls: Sequence[Call], states: tuple[torch.Tensor, ...]) -> tuple[Layout, bool]:
    """How the rows of the blocks' outputs are arranged, and whether there are more than the prompt has tokens."""
    output = calls[0].output
    if output is None:
        raise _refused(loaded, "its blocks return no tensor of floating-point numbers")
    shape = tuple(output.shape)
    if output.ndim == 3 and shape[:2] == (1, LONG):
        # Block-sparse attention chooses its blocks by the length of the batch.
        return Layout(), getattr(loaded.located.body, "attention_type", None) == "block_sparse"
    if output.ndim == 2 and shape[0] == LONG:
        return Layout(), False
    if output.ndim == 3 and shape[:2] == (LONG, 1):
        return Layout(sequence_first=True), False
    state = next((s for s in states[1:] if isinstance(s, torch.Tensor) and s.shape[-1] == shape[-1]), None)
    if output.ndim == 4 and shape[1:3] == (1, LONG):
        stream = getattr(getattr(loaded.located.body, "config", None), "altup_active_idx", None)
        if isinstance(stream, int) and 0 <= stream < shape[0]:
            return Layout(stream=stream), False
    if output.ndim == 3 and shape[0] == 1 and shape[1] > LONG:
        rows = output[0].float().cpu()
        if state is not None and state.shape[1] == LONG:
            for leading in (0, shape[1] - LONG):
                if torch.allclose(rows[leading : leading + LONG], state[0].float().cpu(), rtol=1e-3, atol=1e-5):
                    return Layout(leading=leading), True
        second = _own_pass(loaded, plain_ids(loaded.located.body, SHORT))[0][0].output
        # Padded at the end to a multiple of a window. As many rows for prompts of any length are no tokens (the latents of Perceiver).
        if second is not None and second.ndim == 3 and second.shape[1] != shape[1] and second.shape[1] - SHORT != shape[1] - LONG:
            return Layout(), True
    raise _refused(loaded, f"its blocks return {shape} for one prompt of {LONG} tokens, not (batch 1, token {LONG}, hidden)")


def _alone(loaded: LoadedModel, calls: Sequence[Call], ids: Sequence[int], layout: Layout) -> _Alone:
    rows = []
    for call in calls:
        if call.output is None:
            raise _refused(loaded, "one of its blocks returns no tensor of floating-point numbers")
        hidden = layout.apply(call.output, 1, len(ids))
        if hidden.ndim not in (2, 3) or hidden.shape[:-1].numel() != len(ids):
            raise _refused(loaded, f"a block returns {tuple(call.output.shape)} for one prompt of {len(ids)} tokens")
        rows.append(hidden.reshape(len(ids), hidden.shape[-1]).double().cpu())
    return _Alone(ids=list(ids), rows=torch.stack(rows))


def _check_states(loaded: LoadedModel, alone: _Alone, states: tuple[torch.Tensor, ...]) -> None:
    """Check that blocks return what the model gives as ``hidden_states`` in the same pass, where these have the same shape.

    The entry of block 0 is the second, after the embeddings, or the first (Mamba). That of the last block may have gone through a norm.
    """
    middle = len(alone.rows) - 1
    compared = []
    for first in (1, 0):
        entries = [state for state in states[first : first + middle] if isinstance(state, torch.Tensor)]
        rows = [entry[0].double().cpu() for entry in entries if entry.ndim == 3 and entry.shape[0] == 1]
        if middle > 0 and len(rows) == middle and all(row.shape == alone.rows[0].shape for row in rows):
            compared.append(float(_distance(alone.rows[:middle], torch.stack(rows)).max()))
    if compared and min(compared) > CHAIN_TOLERANCE and not loaded.located.by_hand:
        raise _refused(
            loaded,
            f"what its blocks return is not what it gives as hidden_states in the same pass (relative difference {min(compared):.2g})",
        )


# ----------------------------------------------------------------------------------------------------------------- as captured


def _captured(
    loaded: LoadedModel, request: CaptureRequest, conduct: Conduct, prompts: Sequence[Sequence[int]], pad_id: int | None = None
) -> list[torch.Tensor]:
    """The rows of each prompt, (layer, token, hidden), as one batch of these prompts is captured."""
    call = ModelCall.of(loaded, request, conduct)
    ids: list[Ints] = [np.array(prompt, np.int64) for prompt in prompts]
    read = [encoder_ids_of(prompt) for prompt in ids] if isinstance(loaded.located.body, PairedBody) else None
    collected: Collected = run_forward_pass(loaded, call, request, ids, encoder_ids=read, pad_id=pad_id)
    rows = collected.tokens["resid"].double().cpu()
    return list(torch.split(rows, [len(prompt) for prompt in prompts], dim=1))


def _distance(found: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The largest difference of each token over the layers, relative to the length of its vector.

    A vector that is not finite by itself is not compared; one that is not finite only in the batch differs infinitely.
    """
    if found.shape != right.shape:
        return torch.full((right.shape[1],), torch.inf, dtype=torch.float64)
    off = (found - right).norm(dim=-1) / right.norm(dim=-1).clamp_min(1e-30)
    off = torch.where(torch.isfinite(right).all(dim=-1), off, torch.zeros_like(off))
    return torch.nan_to_num(off, nan=torch.inf).amax(dim=0)


def _tolerance(loaded: LoadedModel, table: dict[torch.dtype, float]) -> float:
    tolerance = table.get(getattr(torch, loaded.dtype, torch.float32), 1e-4)
    reduced = loaded.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
    return (
        max(tolerance, REDUCED)
        if loaded.dtype == "float32" and (reduced or torch.get_float32_matmul_precision() != "highest")
        else tolerance
    )


def _alike(loaded: LoadedModel, found: torch.Tensor, right: torch.Tensor, table: dict[torch.dtype, float] = ROUNDING) -> bool:
    off, tolerance = _distance(found, right), _tolerance(loaded, table)
    if loaded.dtype in ("float32", "float64"):
        return bool((off <= tolerance).all())
    # Rounding can send a single token of a mixture of experts to another expert.
    return float((off <= tolerance).double().mean()) >= 2 / 3


def _whole_or_body(
    loaded: LoadedModel, request: CaptureRequest, conduct: Conduct, alone: _Alone
) -> tuple[Conduct, torch.Tensor]:  # fmt: skip
    """Whether the body alone, without a cache, gives what the model gives, or more has to run; and what was captured of the prompt."""
    errors: list[BaseException] = []
    for whole, cache in itertools.product((False, True) if len(_own(loaded)) > 1 else (False,), (False, True)):
        way = replace(conduct, whole=whole, cache=cache)
        try:
            found = _captured(loaded, request, way, [alone.ids])[0]
        except UnknownArchitectureError:
            raise
        except Exception as error:  # noqa: BLE001 — any error of a model's own code
            errors.append(error)
            continue
        if _alike(loaded, found, alone.rows):
            return way, found
    why = f" ({first_line(errors[0])})" if errors else ""
    raise _refused(loaded, f"one prompt gives other values when it is captured than when the model runs it by itself{why}")


def _is_causal(
    loaded: LoadedModel, request: CaptureRequest, conduct: Conduct, captured: torch.Tensor, other: Sequence[int]
) -> bool | None:  # fmt: skip
    """Whether the last token of a prompt leaves the values of those before it as they are."""
    try:
        changed = _captured(loaded, request, conduct, [other])[0]
    except Exception:  # noqa: BLE001 — not examined
        return None
    return _alike(loaded, changed[:, :-1], captured[:, :-1], SAME_SHAPE)


def _padding(loaded: LoadedModel, request: CaptureRequest, conduct: Conduct, truth: Sequence[_Alone], other: Sequence[int]) -> Padding:
    """The fastest way of sharing a batch in which every prompt has the values that it has alone."""
    ways: tuple[Padding, ...] = ("masked", "equal") if conduct.causal is False else ("unmasked", "masked", "equal")
    if isinstance(loaded.located.body, PairedBody):
        # Prompts of equal length may have encoders' prompts of other lengths, on which attention in blocks depends.
        if any(hasattr(type(part), "set_attention_type") for part in loaded.module.modules()):
            return "single"
        ways = tuple(way for way in ways if way != "equal")
    elif conduct.extra_rows:
        ways = ("equal",)
    long, short = truth
    filling = other[-1]
    for padding in ways:
        way = replace(conduct, padding=padding)
        try:
            if padding == "equal":
                first, _ = _captured(loaded, request, way, [long.ids, list(other)])
                if _alike(loaded, first, long.rows):
                    return padding
                continue
            found = _captured(loaded, request, way, [short.ids, long.ids])
            filled = _captured(loaded, request, way, [short.ids, long.ids], pad_id=filling)
        except Exception:  # noqa: BLE001, S112 — a model that cannot be run in this way is run in the next
            continue
        right = _alike(loaded, found[0], short.rows) and _alike(loaded, found[1], long.rows)
        if right and _alike(loaded, filled[0], found[0], SAME_SHAPE):
            return padding
    return "single"
