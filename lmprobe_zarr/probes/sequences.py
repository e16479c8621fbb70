"""Probes with a pooling of their own: what they compute from the tokens of a prompt, in numpy. Never torch, folds, files or a store.

Each is a linear map of every token to a few numbers, its projections, and a pooling of the projections of a prompt to one score. So tokens
are read block by block as for every other probe, and only projections of whole prompts are ever held together. A new one is an entry of
`SEQUENCE_PROBES`, and its pooling for torch an entry of ``sequence_fits.POOL_PADDED``, by which it learns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.typing import Array, Floats, Ints, Mask

__all__ = [
    "SEQUENCE_PROBES", "BoundSequences", "SequenceProbe", "SequenceSolution", "fit_sequence_pipeline", "is_sequence_classifier",
    "is_sequence_probe", "parse_sequence_probe", "pooling_weights", "sequence_probes",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class SequenceProbe:
    """A probe with a pooling of its own.

    Parameters
    ----------
    name : str
        A key of `SEQUENCE_PROBES`.
    size : float
        Its number: of heads, of tokens in a window, of inner units, or the temperature.
    """

    name: str
    size: float

    @property
    def heads(self) -> int:
        """How many heads it has; 1 where it knows none."""
        return int(self.size) if self.name in ("attention", "multimax") else 1

    @property
    def inner(self) -> int:
        """How many inner units it has; 0 where its output is the pooled projections themselves."""
        return int(self.size) if self.name == "mlp" else 0

    def projections(self, outputs: int) -> int:
        """How many numbers each token is mapped to, for so many outputs."""
        if self.name == "mlp":
            return self.inner
        return self.heads * (outputs + (self.name == "attention"))

    def __str__(self) -> str:
        return f"{self.name}:{self.size:g}"


# -- pooling ---------------------------------------------------------------------------------------------------------------
#
# Projections of attention are the scores of the heads, then their values, head by head; of the others the values alone. Each function
# takes them, shape (token, projection), the number of tokens of each prompt, the probe, and the number of outputs.


def _starts(counts: Ints) -> Ints:
    return np.asarray(np.cumsum(counts) - counts, np.int64)


def _softmax(scores: Floats, counts: Ints) -> Floats:
    """The softmax of each column over the tokens of each prompt."""
    starts = _starts(counts)
    raised = np.exp(scores - np.repeat(np.maximum.reduceat(scores, starts), counts, axis=0))
    return np.asarray(raised / np.repeat(np.add.reduceat(raised, starts), counts, axis=0))


def _split_heads(projected: Floats, probe: SequenceProbe, outputs: int) -> Floats:
    """The values of each head, shape (token, head, output)."""
    return projected[:, projected.shape[1] - probe.heads * outputs :].reshape(len(projected), probe.heads, outputs)


def _weigh_attention(projected: Floats, counts: Ints, probe: SequenceProbe, _outputs: int) -> Floats:
    return _softmax(projected[:, : probe.heads], counts)[:, :, None]


def _weigh_largest(projected: Floats, counts: Ints, probe: SequenceProbe, outputs: int) -> Floats:
    values = _split_heads(projected, probe, outputs)
    return _first_of_each(values.reshape(len(values), -1), counts).reshape(values.shape)


def _first_of_each(values: Floats, counts: Ints) -> Floats:
    """1 at the first largest value of each column in each prompt, else 0."""
    starts = _starts(counts)
    largest = values == np.repeat(np.maximum.reduceat(values, starts), counts, axis=0)
    # How many there were before in the same prompt.
    seen = np.cumsum(largest, axis=0)
    before = np.repeat(seen[starts] - largest[starts], counts, axis=0)
    return np.asarray(largest & (seen - before == 1), np.float64)


def _weigh_softmax(projected: Floats, counts: Ints, probe: SequenceProbe, outputs: int) -> Floats:
    return _softmax(projected / probe.size, counts)[:, None, :outputs]


def _window_means(values: Floats, counts: Ints, size: int) -> tuple[Floats, Ints]:
    """For each token the mean of the window that ends with it, −inf where there is no whole one; and the width of its prompt's windows."""
    width = np.repeat(np.minimum(counts, size), counts)
    sums = np.concatenate([np.zeros((1, values.shape[1])), np.cumsum(values, axis=0)])
    ends = np.arange(1, len(values) + 1)
    means = (sums[ends] - sums[ends - width]) / width[:, None]
    place = ends - np.repeat(_starts(counts), counts)
    return np.asarray(np.where((place >= width)[:, None], means, -np.inf)), width


def _weigh_window(projected: Floats, counts: Ints, probe: SequenceProbe, outputs: int) -> Floats:
    means, width = _window_means(projected[:, :outputs], counts, int(probe.size))
    last = _first_of_each(means, counts)
    # A token is in the window if that ends within the width from it on, and in its own prompt.
    ends = np.concatenate([np.zeros((1, outputs)), np.cumsum(last, axis=0)])
    here = np.arange(len(last))
    stop = np.minimum(here + width, np.repeat(np.cumsum(counts), counts))
    return np.asarray((ends[stop] - ends[here]) / width[:, None])[:, None, :]


def _weigh_all(projected: Floats, counts: Ints, _probe: SequenceProbe, _outputs: int) -> Floats:
    return np.repeat(1 / counts, counts)[:, None, None] * np.ones((len(projected), 1, 1))


def _pool_by_weight(projected: Floats, counts: Ints, probe: SequenceProbe, outputs: int) -> Floats:
    weights = SEQUENCE_PROBES[probe.name].weigh(projected, counts, probe, outputs)
    values = _split_heads(projected, probe, outputs)
    return np.asarray(np.add.reduceat((weights * values).sum(axis=1), _starts(counts)))


def _pool_multimax(projected: Floats, counts: Ints, probe: SequenceProbe, outputs: int) -> Floats:
    largest = np.maximum.reduceat(projected, _starts(counts))
    return np.asarray(largest.reshape(len(counts), probe.heads, outputs).sum(axis=1))


def _pool_windows(projected: Floats, counts: Ints, probe: SequenceProbe, _outputs: int) -> Floats:
    return np.asarray(np.maximum.reduceat(_window_means(projected, counts, int(probe.size))[0], _starts(counts)))


def _pool_mean(projected: Floats, counts: Ints, _probe: SequenceProbe, _outputs: int) -> Floats:
    return np.asarray(np.maximum(0, np.add.reduceat(projected, _starts(counts)) / counts[:, None]))


_Pool = Callable[[Floats, Ints, SequenceProbe, int], Floats]


@dataclass(frozen=True, slots=True)
class _Named:
    """One kind of probe: its number's name, default and least value, how it pools, how much each token weighs, and what it is."""

    size: str
    default: float
    whole: bool
    pool: _Pool
    weigh: _Pool
    described: str


_MCKENZIE: Final = 'A. McKenzie et al., "Detecting High-Stakes Interactions with Activation Probes" (2025), arXiv:2506.10805'
_KRAMAR: Final = 'J. Kramár et al., "Building Production-Ready Probes For Gemini" (2026), arXiv:2601.11516'

#: Every probe with a pooling of its own, by name.
SEQUENCE_PROBES: Final[Mapping[str, _Named]] = {
    "attention": _Named(
        "n_heads", 1, True, _pool_by_weight, _weigh_attention,
        "Each head weighs tokens by the softmax of a linear score and averages another linear score; heads are added. "
        f"'attention:4' has four heads, 'attention' one. Source: {_MCKENZIE}; {_KRAMAR}.",
    ),
    "multimax": _Named(
        "n_heads", 4, True, _pool_multimax, _weigh_largest,
        "Each head takes the largest of a linear score over the tokens; heads are added. 'multimax:8' has eight heads, 'multimax' four. "
        f"Source: {_KRAMAR}.",
    ),
    "softmax_mean": _Named(
        "temperature", 1, False, _pool_by_weight, _weigh_softmax,
        "The mean of a linear score, weighed by the softmax of that score itself divided by a temperature: 'softmax_mean:5', by default 1. "
        f"Source: {_MCKENZIE}.",
    ),
    "rolling_mean_max": _Named(
        "window", 10, True, _pool_windows, _weigh_window,
        "The largest mean of a linear score over neighbouring tokens: 'rolling_mean_max:20' of twenty, by default ten; of all tokens of a "
        f"shorter prompt. Source: {_MCKENZIE}.",
    ),
    "mlp": _Named(
        "n_units", 64, True, _pool_mean, _weigh_all,
        "The mean of the tokens, and a perceptron on it with one inner layer of rectified units: 'mlp:32', by default 64. "
        'Source: J. Hewitt and P. Liang, "Designing and Interpreting Probes with Control Tasks" (2019), arXiv:1909.03368, "MLP-1".',
    ),
}  # fmt: skip
_LARGEST: Final = 10_000


def sequence_probes() -> dict[str, str]:
    """Name to description of every probe over the tokens of a prompt that learns how to pool them.

    All standardise every hidden unit over the training tokens, learn by minibatches of prompts (AdamW) and stop where an inner fold of
    whole prompts, or groups, no longer improves. A number after a colon replaces the default one, as ``"attention:4"``.
    """
    return {name: named.described for name, named in SEQUENCE_PROBES.items()}


def parse_sequence_probe(probe: object) -> SequenceProbe | None:
    """The probe of such a name, as ``"attention"`` or ``"attention:4"``; None for anything else.

    Raises
    ------
    InvalidArgumentError
        The name of one, with a number that it cannot have.
    """
    if not isinstance(probe, str):
        return None
    name, colon, number = probe.partition(":")
    if name not in SEQUENCE_PROBES:
        return None
    named = SEQUENCE_PROBES[name]
    if not colon:
        return SequenceProbe(name, named.default)
    size = float(number) if re.fullmatch(r"[0-9]{1,6}" if named.whole else r"[0-9]{1,6}(\.[0-9]{1,6})?", number) else 0.0
    if not 0 < size <= _LARGEST:
        kind = "a whole number" if named.whole else "a number"
        raise InvalidArgumentError(
            f"{probe!r:.60} has no {named.size} that can be used: give {kind} from {1 if named.whole else 'above 0'} to {_LARGEST}, as "
            f"'{name}:{named.default:g}'"
        )
    return SequenceProbe(name, size)


def is_sequence_probe(probe: object) -> bool:
    """Whether this is the name of a probe with a pooling of its own."""
    return isinstance(probe, str) and probe.partition(":")[0] in SEQUENCE_PROBES


def is_sequence_classifier(probe: object) -> bool:
    """Whether this names one that is fitted on rows in memory too: all but "mlp", which there is scikit-learn's, on pooled vectors."""
    return is_sequence_probe(probe) and str(probe).partition(":")[0] != "mlp"


# -- a fitted one ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SequenceSolution:
    """A fitted probe in the units of the activations.

    Parameters
    ----------
    probe : SequenceProbe
    coef : ndarray of float64, shape (projection, hidden)
        ``activations @ coef.T + intercept`` are the projections of tokens.
    intercept : ndarray of float64, shape (projection,)
    output : ndarray of float64, shape (1 or class, inner unit)
        What is made of pooled inner units; of no columns where there are none, and the pooled projections are the scores.
    bias : ndarray of float64, shape (1 or class,)
        Added to the scores: one for two classes, above 0 for the second.
    classes : ndarray of int, shape (class,)
        The numbers of the classes that there were prompts of.
    """

    probe: SequenceProbe
    coef: Floats
    intercept: Floats
    output: Floats
    bias: Floats
    classes: Array

    def project(self, rows: Array) -> Floats:
        """The projections of tokens, shape (token, projection)."""
        return np.asarray(rows.astype(np.float64) @ self.coef.T + self.intercept)

    def pool(self, projected: Array, counts: Ints) -> Floats:
        """The scores of prompts, shape (prompt,) for two classes, else (prompt, class).

        Parameters
        ----------
        projected : ndarray, shape (token, projection)
            Of the tokens of all prompts, end to end, in the order of their positions.
        counts : ndarray of int, shape (prompt,)
            How many tokens each prompt has, at least 1.
        """
        wide, known = _finite(projected, counts)
        scores = self.score(SEQUENCE_PROBES[self.probe.name].pool(wide, counts, self.probe, len(self.bias)))
        scores[~known] = np.nan
        return scores

    def score(self, pooled: Floats) -> Floats:
        """The scores of prompts from their pooled projections, shape (prompt,) for two classes, else (prompt, class)."""
        scores = (pooled @ self.output.T if self.probe.inner else pooled) + self.bias
        return scores[:, 0] if len(self.bias) == 1 else scores

    def weights(self, projected: Array, counts: Ints) -> Floats:
        """How much each token weighs in the score of its prompt, as `pooling_weights` has it."""
        return pooling_weights(self.probe, projected, counts, len(self.bias))


def pooling_weights(probe: SequenceProbe, projected: Array, counts: Ints, outputs: int) -> Floats:
    """How much each token weighs in the score of its prompt, shape (token, head, 1 or output); the weights of a prompt sum to 1.

    Attention weights; of a maximum 1 for the token that is largest, the first of equal ones; of a window equal weights for its tokens.

    Parameters
    ----------
    probe : SequenceProbe
    projected : ndarray, shape (token, projection)
        As for `SequenceSolution.pool`.
    counts : ndarray of int, shape (prompt,)
    outputs : int
        The number of scores: 1 for two classes.
    """
    wide, known = _finite(projected, counts)
    found = SEQUENCE_PROBES[probe.name].weigh(wide, counts, probe, outputs)
    found[~np.repeat(known, counts)] = np.nan
    return found


def _finite(projected: Array, counts: Ints) -> tuple[Floats, Mask]:
    """The projections as float64, 0 in prompts with a token that was never extracted; and which prompts have none of those."""
    wide = np.array(projected, np.float64).reshape(len(projected), -1)
    known = np.isfinite(np.add.reduceat(wide.sum(axis=1), _starts(counts)))
    wide[~np.repeat(known, counts)] = 0
    return wide, known


# -- pipelines of rows in memory -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BoundSequences:
    """A fitted pipeline that ends in such a classifier, for rows of which it is known how many belong to each prompt.

    Parameters
    ----------
    pipeline : scikit-learn Pipeline
    n_tokens : ndarray of int, shape (prompt,)
    """

    pipeline: Any
    n_tokens: Ints

    @property
    def classes_(self) -> Array:
        """The labels, sorted."""
        return np.asarray(self.pipeline.classes_)

    def _call(self, method: str, rows: Array) -> Array:
        for _, step in self.pipeline.steps[:-1]:
            rows = step.transform(rows)
        return np.asarray(getattr(self.pipeline.steps[-1][1], method)(rows, self.n_tokens))

    def decision_function(self, rows: Array) -> Array:
        """The score of each prompt."""
        return self._call("decision_function", rows)

    def predict_proba(self, rows: Array) -> Array:
        """The probability of each class for each prompt, shape (prompt, class)."""
        return self._call("predict_proba", rows)

    def predict(self, rows: Array) -> Array:
        """The class of each prompt."""
        return self._call("predict", rows)

    def weights(self, rows: Array) -> Array:
        """How much each token weighs in the score of its prompt."""
        return self._call("weights", rows)


def fit_sequence_pipeline(pipeline: Any, rows: Array, labels: Array, n_tokens: Ints, together: Ints, device: str) -> None:
    """Fit all steps of a pipeline that ends in such a classifier, on the tokens of prompts with one label each."""
    for _, step in pipeline.steps[:-1]:
        rows = step.fit_transform(rows)
    pipeline.steps[-1][1].fit(rows, labels, n_tokens, together, device)
