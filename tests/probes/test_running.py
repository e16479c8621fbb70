"""Poolings that are kept up to date give what they give for whole prompts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lmprobe_zarr.batch.pooling import POOLINGS, pool_ragged
from lmprobe_zarr.probes.running import RUNNING, RUNNING_LEARNED, running_learned
from lmprobe_zarr.probes.sequences import SEQUENCE_PROBES, SequenceProbe, SequenceSolution

PASSES = (7, 1, 1, 4, 1, 1, 1, 9, 1)


def passes(width: int, scale: float = 1.0) -> tuple[Any, Any]:
    """Values of 4 prompts in several passes, and which of them are no padding; the last prompt has none for long."""
    rng = np.random.default_rng(0)
    values = scale * rng.standard_normal((4, sum(PASSES), width))
    kept = rng.random(values.shape[:2]) < 0.7
    kept[:3, 6], kept[3, :12] = True, False
    return values, kept


def follow(pooling: Any, values: Any, kept: Any) -> list[Any]:
    """What is pooled after each pass; what is padding may be anything."""
    found = []
    for first, n in zip(np.cumsum(PASSES) - PASSES, PASSES, strict=True):
        part, here = values[:, first : first + n], kept[:, first : first + n]
        pooling.update(np.where(here[:, :, None], part, np.nan), here)
        found.append(pooling.value())
    return found


def test_there_is_one_of_each_pooling() -> None:
    assert tuple(RUNNING) == POOLINGS
    assert tuple(RUNNING_LEARNED) == tuple(SEQUENCE_PROBES)


@pytest.mark.parametrize("word", POOLINGS)
def test_named_poolings(word: str) -> None:
    values, kept = passes(5)
    for found, end in zip(follow(RUNNING[word](4, 5), values, kept), np.cumsum(PASSES), strict=True):
        for prompt in range(4):
            tokens = values[prompt, :end][kept[prompt, :end]]
            expected = pool_ragged(tokens, [len(tokens)], word)[0] if len(tokens) else np.full(5, np.nan)
            np.testing.assert_allclose(found[prompt], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize(
    ("name", "size"), [("attention", 1), ("attention", 3), ("multimax", 2), ("softmax_mean", 0.5), ("rolling_mean_max", 4), ("mlp", 6)]
)
def test_learned_poolings(name: str, size: float, outputs: int) -> None:
    probe, rng = SequenceProbe(name, size), np.random.default_rng(1)
    width = probe.projections(outputs)
    output = rng.standard_normal((outputs, probe.inner))
    solution = SequenceSolution(probe, np.zeros((width, 2)), np.zeros(width), output, rng.standard_normal(outputs), np.arange(2))
    # Scores of hundreds, whose exponential no float holds.
    values, kept = passes(width, 300.0)
    for found, end in zip(follow(running_learned(4, probe, outputs), values, kept), np.cumsum(PASSES), strict=True):
        for prompt in range(4):
            tokens = values[prompt, :end][kept[prompt, :end]]
            if not len(tokens):
                assert np.isnan(found[prompt]).all()
                continue
            expected = solution.pool(tokens, np.array([len(tokens)]))
            np.testing.assert_allclose(solution.score(found[prompt][None]), expected, rtol=1e-11, atol=1e-9)
