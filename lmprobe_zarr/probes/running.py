"""Poolings that are kept up to date as tokens come in, exactly, in numpy. Never torch, a model or a store.

The same words and names as `POOLINGS` and `SEQUENCE_PROBES` have for whole prompts. What is kept does not grow with the number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

import numpy as np

from lmprobe_zarr.probes.sequences import SequenceProbe
from lmprobe_zarr.typing import Floats, Mask

__all__ = ["RUNNING", "RUNNING_LEARNED", "Running", "running_learned"]


class Running(Protocol):
    """A pooling of the tokens that several prompts have had so far."""

    def update(self, values: Floats, kept: Mask) -> None:
        """Take in the next tokens.

        Parameters
        ----------
        values : ndarray of float64, shape (prompt, token, value)
            Finite where they are kept.
        kept : ndarray of bool, shape (prompt, token)
            Which of them belong to a prompt; any number, none too.
        """

    def value(self) -> Floats:
        """What is pooled, shape (prompt, value); NaN for a prompt without a token."""


class _Last:
    def __init__(self, prompts: int, width: int) -> None:
        self._value: Floats = np.full((prompts, width), np.nan)

    def update(self, values: Floats, kept: Mask) -> None:
        last = kept.shape[1] - 1 - kept[:, ::-1].argmax(axis=1)
        some = kept.any(axis=1)
        self._value[some] = values[np.arange(len(values)), last][some]

    def value(self) -> Floats:
        return self._value.copy()


class _First:
    def __init__(self, prompts: int, width: int) -> None:
        self._value: Floats = np.full((prompts, width), np.nan)
        self._seen = np.zeros(prompts, bool)

    def update(self, values: Floats, kept: Mask) -> None:
        new = kept.any(axis=1) & ~self._seen
        self._value[new] = values[np.arange(len(values)), kept.argmax(axis=1)][new]
        self._seen |= new

    def value(self) -> Floats:
        return self._value.copy()


class _Mean:
    def __init__(self, prompts: int, width: int) -> None:
        self._total, self._count = np.zeros((prompts, width)), np.zeros(prompts, np.int64)

    def update(self, values: Floats, kept: Mask) -> None:
        self._total += np.where(kept[:, :, None], values, 0).sum(axis=1)
        self._count += kept.sum(axis=1)

    def value(self) -> Floats:
        return np.asarray(np.where(self._count[:, None] > 0, self._total / np.maximum(self._count, 1)[:, None], np.nan))


class _Max:
    _sign = 1.0

    def __init__(self, prompts: int, width: int) -> None:
        self._largest: Floats = np.full((prompts, width), -np.inf)

    def update(self, values: Floats, kept: Mask) -> None:
        new = np.where(kept[:, :, None], self._sign * values, -np.inf).max(axis=1)
        self._largest = np.maximum(self._largest, new)

    def value(self) -> Floats:
        return np.asarray(np.where(np.isinf(self._largest), np.nan, self._sign * self._largest))


class _Min(_Max):
    _sign = -1.0


#: By the word of a pooling, from the number of prompts and of values.
RUNNING: Final[Mapping[str, Callable[[int, int], Running]]] = {
    "last_token": _Last,
    "first_token": _First,
    "mean": _Mean,
    "max": _Max,
    "min": _Min,
}


class _Softmax:
    """A mean of values weighed by the softmax of scores: sums of both, less the largest score so far, which may grow."""

    def __init__(self, prompts: int, split: Callable[[Floats], tuple[Floats, Floats]], heads: int, scores: int, outputs: int) -> None:
        self._split = split
        self._top: Floats = np.full((prompts, heads, scores), -np.inf)
        self._weight, self._total = np.zeros((prompts, heads, scores)), np.zeros((prompts, heads, outputs))

    def update(self, values: Floats, kept: Mask) -> None:
        scores, averaged = self._split(values)
        here = kept[:, :, None, None]
        top = np.maximum(self._top, np.where(here, scores, -np.inf).max(axis=1))
        # Of a prompt without a token nothing is kept yet, and 0 stands for its largest score.
        safe = np.where(np.isinf(top), 0, top)
        before = np.where(np.isinf(self._top), 0, np.exp(np.where(np.isinf(self._top), 0, self._top) - safe))
        weights = np.exp(np.where(here, scores - safe[:, None], -np.inf))
        self._weight = self._weight * before + weights.sum(axis=1)
        self._total = self._total * before + (weights * np.where(here, averaged, 0)).sum(axis=1)
        self._top = top

    def value(self) -> Floats:
        known = self._weight > 0
        return np.asarray(np.where(known, self._total / np.where(known, self._weight, 1), np.nan).sum(axis=1))


def _attention(prompts: int, probe: SequenceProbe, outputs: int) -> Running:
    def split(values: Floats) -> tuple[Floats, Floats]:
        heads = probe.heads
        return values[:, :, :heads, None], values[:, :, heads:].reshape(*values.shape[:2], heads, outputs)

    return _Softmax(prompts, split, probe.heads, 1, outputs)


def _softmax_mean(prompts: int, probe: SequenceProbe, outputs: int) -> Running:
    return _Softmax(prompts, lambda values: (values[:, :, None] / probe.size, values[:, :, None]), 1, outputs, outputs)


class _Multimax(_Max):
    def __init__(self, prompts: int, probe: SequenceProbe, outputs: int) -> None:
        super().__init__(prompts, probe.heads * outputs)
        self._heads = probe.heads

    def value(self) -> Floats:
        largest = super().value()
        return np.asarray(largest.reshape(len(largest), self._heads, -1).sum(axis=1))


class _Windows:
    """The largest mean of a window, from the last tokens of each prompt; of all tokens as long as they are fewer than a window."""

    def __init__(self, prompts: int, probe: SequenceProbe, outputs: int) -> None:
        self._window = int(probe.size)
        self._last = [np.zeros((0, outputs)) for _ in range(prompts)]
        self._largest: Floats = np.full((prompts, outputs), -np.inf)

    def update(self, values: Floats, kept: Mask) -> None:
        for prompt, (new, here) in enumerate(zip(values, kept, strict=True)):
            if not here.any():
                continue
            held = np.concatenate([self._last[prompt], new[here]])
            if len(held) >= self._window:
                sums = np.concatenate([np.zeros((1, held.shape[1])), np.cumsum(held, axis=0)])
                means = (sums[self._window :] - sums[: -self._window]) / self._window
                self._largest[prompt] = np.maximum(self._largest[prompt], means.max(axis=0))
            self._last[prompt] = held[-self._window :]

    def value(self) -> Floats:
        found = self._largest.copy()
        for prompt, held in enumerate(self._last):
            if len(held) < self._window:
                found[prompt] = held.mean(axis=0) if len(held) else np.nan
        return found


class _InnerUnits(_Mean):
    def __init__(self, prompts: int, probe: SequenceProbe, _outputs: int) -> None:
        super().__init__(prompts, probe.inner)

    def value(self) -> Floats:
        return np.maximum(0, super().value())


#: By the name of a probe that learns how to pool, from the number of prompts, the probe and its number of scores.
RUNNING_LEARNED: Final[Mapping[str, Callable[[int, SequenceProbe, int], Any]]] = {
    "attention": _attention,
    "multimax": _Multimax,
    "softmax_mean": _softmax_mean,
    "rolling_mean_max": _Windows,
    "mlp": _InnerUnits,
}


def running_learned(prompts: int, probe: SequenceProbe, outputs: int) -> Running:
    """The pooling that such a probe has learned, of its projections.

    Parameters
    ----------
    prompts : int
    probe : SequenceProbe
    outputs : int
        The number of scores: 1 for two classes.
    """
    made: Running = RUNNING_LEARNED[probe.name](prompts, probe, outputs)
    return made
