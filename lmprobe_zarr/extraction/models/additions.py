"""What a block adds to the residual stream, found by arithmetic in the values of one traced call.

The output ``v`` of a module was added to the stream ``x`` where ``x + s·v`` is the block's output or the input of a later module. The
first that is added comes from the token mixer (attention, Mamba, linear attention), the last from the MLP. Some models multiply by a
constant before they add (Granite): that is `s`. It is taken from the configuration, because numbers of 16 bits show it only roughly; a
factor that is neither 1 nor a constant of the configuration is believed only where it was computed with more bits.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn

from lmprobe_zarr.extraction.models.structure import Call, Part

__all__ = ["Addition", "BlockSites", "sites_of"]

# The largest remainder of a sum, relative to the vector that was added, by bits of the dtype.
TOLERANCE: Final = {torch.float64: 1e-6, torch.float32: 1e-3}
COARSE: Final = 0.1
# How near a fitted factor is to the constant that it is, by bits of the dtype.
NEAR: Final = {torch.float64: 1e-6, torch.float32: 1e-4}
ROUGHLY: Final = 1e-2
PARALLEL: Final = 0.9
MLP_NAMES: Final = re.compile(
    r"mlp|ffn|feed_?forward|\bff\b|^fc|moe|expert|ffw|channel_mix|^output\.dense|dense_4h|intermediate", re.IGNORECASE
)
MIXER_NAMES: Final = re.compile(r"att|mixer|mamba|ssm|conv|rwkv|recurrent|temporal|delta|retention|linear_attn|rnn|lru", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Addition:
    """A module whose output is added to the residual stream, multiplied by `scale`; `path` is in the block."""

    path: str
    scale: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSites:
    """What is added by the token mixer and by the MLP of a block; None where it was not found, or where a `whole` block has none."""

    attn: Addition | None = None
    mlp: Addition | None = None
    whole: bool = False


def sites_of(call: Call, constants: Sequence[float] = ()) -> BlockSites:
    """The token mixer and the MLP of a block, from one call of it.

    `constants` are the numbers of the configuration that a block may multiply by.
    """
    if call.given is None or call.output is None or call.given.shape != call.output.shape:
        return BlockSites()
    steps = _steps(call, _candidates(call), (1.0, *constants))
    if not steps:
        return BlockSites()
    if len(steps) == 1 and len(steps[0]) == 2:
        steps = [(addition,) for addition in steps[0]]  # both at once: parallel blocks
    single = [step[0] if len(step) == 1 else None for step in steps]
    if len(single) == 1:
        only = single[0]
        if only is None:
            return BlockSites()
        return BlockSites(mlp=only, whole=True) if _is_mlp(only.path) else BlockSites(attn=only, whole=True)
    first, last = single[0], single[-1]
    if first is not None and last is not None and _is_mlp(first.path) and not _is_mlp(last.path):
        first, last = last, first
    return BlockSites(attn=first, mlp=last)


def _is_mlp(path: str) -> bool:
    return bool(MLP_NAMES.search(path)) and not MIXER_NAMES.search(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    order: int
    part: Part
    output: torch.Tensor


def _candidates(call: Call) -> list[_Candidate]:
    """Calls whose output has the shape of the stream, each value once: of several modules with the same output the outermost."""
    assert call.given is not None  # noqa: S101 — `sites_of` has checked it
    shape = call.given.shape
    found: dict[int, _Candidate] = {}
    counts: dict[str, int] = {}
    for part in call.parts:
        counts[part.path] = counts.get(part.path, 0) + 1
    for order, part in enumerate(call.parts):
        output = part.output
        if output is None or output.shape[-1] != shape[-1] or output.numel() != call.given.numel() or counts[part.path] > 1:
            continue
        if output.ndim == len(shape) and output.shape != shape:
            continue  # laid out otherwise, which a prompt by itself hides
        if isinstance(part.module, nn.Identity | nn.Dropout) or not bool(output.any()):
            continue
        values = output.reshape(shape).to(torch.float64 if output.dtype == torch.float64 else torch.float32)
        key = next((k for k, other in found.items() if torch.equal(other.output, values)), order)
        known = found.get(key)
        if known is None or part.path.count(".") < known.part.path.count("."):
            found[key] = _Candidate(order=key, part=part, output=values)
    return sorted(found.values(), key=lambda candidate: candidate.order)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Factors:
    """How exactly a sum and its factor are known, and the constants that the factor may be."""

    tolerance: float
    near: float
    exact: bool
    constants: tuple[float, ...]

    def fit(self, goal: torch.Tensor, stream: torch.Tensor, added: torch.Tensor) -> float | None:
        """The factor `s` with which ``goal = stream + s·added``; None where there is none, or it is not known exactly enough."""
        rest, size = goal - stream, float(added.norm())
        if not size or not bool(torch.isfinite(rest).all()):
            return None
        if abs(float((stream * added).sum())) > PARALLEL * size * float(stream.norm()):
            return None  # a norm of the stream itself: any multiple of the stream is the sum of it and this
        fitted = float((rest * added).sum()) / size**2
        if not 1e-3 < abs(fitted) < 1e3:
            return None
        nearest = min(self.constants, key=lambda constant: abs(constant - fitted))
        known = abs(nearest - fitted) <= self.near * abs(fitted)
        if not known and not self.exact:
            return None
        factor = nearest if known else fitted
        return factor if float((rest - factor * added).norm()) <= self.tolerance * abs(factor) * size else None


def _returned(
    goals: Sequence[tuple[int, torch.Tensor, torch.Tensor | None]], last: int, goal: torch.Tensor, alike: Callable[..., bool]
) -> list[torch.Tensor]:
    """What later modules made of a state of the stream: its norm, in models that normalise after they add."""
    found = [output for order, given, output in goals if order > last and output is not None and alike(given, goal)]
    return [
        output.reshape(goal.shape).to(goal) for output in found if output.numel() == goal.numel() and output.shape[-1] == goal.shape[-1]
    ]


def _steps(call: Call, candidates: Sequence[_Candidate], constants: tuple[float, ...]) -> list[tuple[Addition, ...]]:
    """The additions that lead from a block's input to its output, in order; several in one tuple where they are added at once."""
    given, output = call.given, call.output
    assert given is not None and output is not None  # noqa: S101, PT018 — `sites_of` has checked it
    tolerance = TOLERANCE.get(given.dtype, COARSE)
    wide = torch.float64 if given.dtype == torch.float64 else torch.float32
    exact = given.dtype in TOLERANCE
    factors = _Factors(tolerance=tolerance, near=NEAR.get(given.dtype, ROUGHLY), exact=exact, constants=constants)
    stream, end = given.to(wide), output.to(wide)
    # What each module was given, a later state of the stream perhaps, and what it returned, where that may be its norm. A module with a
    # matrix may have added something itself: the last part of a T5 block is given the stream, and returns it with the MLP's output.
    goals = [
        (order, part.given.reshape(stream.shape).to(wide), None if _has_matrix(part.module) else part.output)
        for order, part in enumerate(call.parts)
        if part.given is not None and part.given.numel() == stream.numel() and part.given.shape[-1] == stream.shape[-1]
    ]

    def alike(a: torch.Tensor, b: torch.Tensor) -> bool:
        return float((a - b).norm()) <= tolerance * 1e-1 * float(b.norm())

    def follow(states: list[torch.Tensor], start: int) -> list[tuple[Addition, ...]] | None:
        """The rest of the additions from one of these states of the stream, of candidates that return after `start`."""
        if start and any(alike(state, end) for state in states):
            return []
        later = [candidate for candidate in candidates if candidate.order >= start]
        for width in (1, 2):
            for picked in _picked(later, width):
                total = sum((candidate.output for candidate in picked[1:]), start=picked[0].output)
                last = picked[-1].order
                for state in states:
                    # At the end of the block first: otherwise a module that is given the sum by chance would hide it.
                    for goal in (end, *(given for order, given, _ in goals if order > last)):
                        factor = factors.fit(goal, state, total)
                        if factor is None:
                            continue
                        after = [goal, *_returned(goals, last, goal, alike)]
                        rest = follow(after, last + 1)
                        if rest is not None:
                            return [tuple(Addition(path=c.part.path, scale=factor) for c in picked), *rest]
        return None

    # Some blocks replace the stream by its norm before anything is added (the first of RWKV).
    return follow([stream], 0) or follow(_returned(goals, -1, stream, alike), 0) or []


def _has_matrix(module: nn.Module) -> bool:
    return any(tensor.ndim > 1 for tensor in itertools.chain(module.parameters(), module.buffers()))


def _picked(candidates: Sequence[_Candidate], width: int) -> list[tuple[_Candidate, ...]]:
    if width == 1:
        return [(candidate,) for candidate in candidates]
    return [
        (a, b) for number, a in enumerate(candidates) for b in candidates[number + 1 :] if not b.part.path.startswith(a.part.path + ".")
    ]
