"""Probes with a pooling of their own as scikit-learn estimators of rows in memory, which a `Probe` fits and saves. Never folds or files.

Rows are tokens; ``n_tokens`` says how many belong to each prompt, and without it each row is a prompt of its own. Labels, predictions and
scores are one per prompt.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin

from lmprobe_zarr.batch import concat_ranges, offsets_of
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.probes.sequence_fits import SequenceFit, Training, draw_looks, fit_sequences
from lmprobe_zarr.probes.sequences import SEQUENCE_PROBES, SequenceProbe, SequenceSolution, parse_sequence_probe
from lmprobe_zarr.typing import Array, Floats, Ints

__all__ = [
    "SEQUENCE_CLASSIFIERS", "AttentionClassifier", "MultimaxClassifier", "RollingMeanMaxClassifier",
    "SequenceClassifier", "SoftmaxMeanClassifier", "make_sequence_classifier",
]  # fmt: skip


class SequenceClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """What the classifiers of this module have in common.

    Attributes
    ----------
    classes_ : ndarray, shape (class,)
    coef_ : ndarray of float64
        Of the linear scores that are pooled, shape (1 or class, hidden); with heads (head, 1 or class, hidden).
    intercept_ : ndarray of float64, shape (1 or class,)
    loss_curve_, inner_loss_curve_ : ndarray of float64, shape (epoch,)
        Mean loss of the training prompts and of the inner fold, in nats.
    n_iter_ : int
        Passes over the training prompts.
    converged_ : bool
        Whether the loss of the inner fold stopped falling.
    """

    _name = ""
    classes_: Array
    n_features_in_: int
    random_state: int
    learning_rate: float
    weight_decay: float
    batch_prompts: int
    max_epochs: int
    patience: int

    @property
    def _probe(self) -> SequenceProbe:
        return SequenceProbe(self._name, getattr(self, SEQUENCE_PROBES[self._name].size))

    def _validate_params(self) -> None:
        """Raise a ValueError for parameters that cannot be learned with."""
        parse_sequence_probe(f"{self._name}:{_plain(getattr(self, SEQUENCE_PROBES[self._name].size))}")
        whole = {"batch_prompts": 1, "max_epochs": 1, "patience": 1}
        for name, least in whole.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
                raise ValueError(f"{name}={value!r} is no whole number of at least {least}")
        for name, most in {"learning_rate": 100.0, "weight_decay": 1.0}.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most or (name[0] == "l" and not value):
                raise ValueError(f"{name}={value!r} is no number up to {most:g}")

    def fit(self, X: Any, y: Any, n_tokens: Any = None, together: Any = None, device: str = "cpu") -> Self:  # noqa: N803
        """Learn from the tokens of some prompts.

        Parameters
        ----------
        X : array of float, shape (token, hidden)
            The tokens of all prompts, end to end.
        y : array, shape (prompt,)
        n_tokens : array of int, shape (prompt,), optional
            How many tokens each prompt has.
        together : array of int, shape (prompt,), optional
            Prompts of an equal number are on one side of the inner fold.
        device : str
            From `parse_device`.

        Raises
        ------
        LabelError
            A class has a single prompt, or group.

        Warns
        -----
        ConvergenceWarning
            scikit-learn's own: the inner fold was still improving in the last pass allowed.
        """
        rows, counts = _parse_rows(X, n_tokens)
        labels = np.asarray(y)
        if len(labels) != len(counts):
            raise InvalidArgumentError(f"there are {len(labels)} labels for {len(counts)} prompts: give one per prompt")
        self._validate_params()
        classes, codes = np.unique(labels, return_inverse=True)
        kept = np.arange(len(counts)) if together is None else np.asarray(together, np.int64)
        looks = draw_looks(codes, kept, self.random_state)
        offsets = offsets_of(counts)
        fit = SequenceFit(
            probe=self._probe, learns=~looks, looks=looks, mean=np.zeros(rows.shape[1]), scale=np.ones(rows.shape[1]),
            seed=self.random_state,
        )  # fmt: skip
        names = ("batch_prompts", "learning_rate", "weight_decay", "max_epochs", "patience")
        (trained,) = fit_sequences(
            [fit], lambda prompts: rows[concat_ranges(offsets[prompts], counts[prompts])], counts, codes,
            seed=self.random_state, device=device, training=Training(**{name: getattr(self, name) for name in names}),
        )  # fmt: skip
        if trained.problem:
            raise ValueError(trained.problem)
        self._take(trained.solution)
        self.classes_, self.n_features_in_ = classes, rows.shape[1]
        self.loss_curve_, self.inner_loss_curve_ = trained.losses, trained.inner_losses
        self.n_iter_, self.converged_ = len(trained.losses), trained.converged
        if not self.converged_:
            from sklearn.exceptions import ConvergenceWarning

            warnings.warn(
                f"{type(self).__name__} was still improving after {self.n_iter_} passes: raise max_epochs or learning_rate",
                ConvergenceWarning,
                stacklevel=2,
            )
        return self

    def _take(self, solution: SequenceSolution) -> None:
        """Keep what a fit found, in arrays that a file can hold."""
        self.coef_, self.intercept_ = solution.coef, solution.bias

    def solution(self) -> SequenceSolution:
        """What was learned, in the units of the rows."""
        coef = self._projections()
        nothing = np.zeros((len(self.intercept_), 0))
        return SequenceSolution(self._probe, coef, np.zeros(len(coef)), nothing, self.intercept_, np.arange(len(self.classes_)))

    def _projections(self) -> Floats:
        return np.asarray(self.coef_.reshape(-1, self.n_features_in_))

    def decision_function(self, X: Any, n_tokens: Any = None) -> Array:  # noqa: N803
        """The score of each prompt, shape (prompt,): above 0 for the second class; (prompt, class) for more than two.

        Parameters
        ----------
        X : array of float, shape (token, hidden)
        n_tokens : array of int, shape (prompt,), optional
        """
        rows, counts = _parse_rows(X, n_tokens)
        solution = self.solution()
        return solution.pool(solution.project(rows), counts)

    def predict_proba(self, X: Any, n_tokens: Any = None) -> Array:  # noqa: N803
        """The probability of each class, shape (prompt, class).

        Parameters
        ----------
        X : array of float, shape (token, hidden)
        n_tokens : array of int, shape (prompt,), optional
        """
        from scipy.special import expit, softmax

        scores = self.decision_function(X, n_tokens)
        return np.asarray(np.stack([expit(-scores), expit(scores)], axis=1) if scores.ndim == 1 else softmax(scores, axis=1))

    def predict(self, X: Any, n_tokens: Any = None) -> Array:  # noqa: N803
        """The class of each prompt, shape (prompt,).

        Parameters
        ----------
        X : array of float, shape (token, hidden)
        n_tokens : array of int, shape (prompt,), optional
        """
        scores = self.decision_function(X, n_tokens)
        return np.asarray(self.classes_[(scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(axis=1)])

    def weights(self, X: Any, n_tokens: Any = None) -> Array:  # noqa: N803
        """How much each token weighs in the score of its prompt, shape (token, head, 1 or class); those of a prompt sum to 1.

        Parameters
        ----------
        X : array of float, shape (token, hidden)
        n_tokens : array of int, shape (prompt,), optional
        """
        rows, counts = _parse_rows(X, n_tokens)
        solution = self.solution()
        return solution.weights(solution.project(rows), counts)


class AttentionClassifier(SequenceClassifier):
    """Each head weighs tokens by the softmax of a linear score, and averages another linear score; heads are added.

    Parameters
    ----------
    n_heads : int
    random_state : int
        Of the first coefficients, the order of prompts, and the inner fold.
    learning_rate, weight_decay, batch_prompts, max_epochs, patience
        As `lmprobe_zarr.probes.sequence_fits.Training` has them.

    Attributes
    ----------
    query_ : ndarray of float64, shape (head, hidden)
        Of the scores whose softmax weighs tokens.

    Notes
    -----
    Source: A. McKenzie et al., "Detecting High-Stakes Interactions with Activation Probes" (2025), arXiv:2506.10805.
    """

    _name = "attention"
    query_: Floats

    def __init__(
        self, n_heads: int = 1, random_state: int = 0, learning_rate: float = 0.5, weight_decay: float = 0.01, batch_prompts: int = 32,
        max_epochs: int = 200, patience: int = 10,
    ) -> None:  # fmt: skip
        self.n_heads = n_heads
        self.random_state = random_state
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.batch_prompts = batch_prompts
        self.max_epochs = max_epochs
        self.patience = patience

    def _take(self, solution: SequenceSolution) -> None:
        heads = solution.probe.heads
        self.query_, self.intercept_ = solution.coef[:heads].copy(), solution.bias
        self.coef_ = solution.coef[heads:].reshape(heads, len(solution.bias), -1).copy()

    def _projections(self) -> Floats:
        return np.concatenate([self.query_, super()._projections()])


class MultimaxClassifier(SequenceClassifier):
    """Each head takes the largest of a linear score over the tokens; heads are added.

    Parameters
    ----------
    n_heads : int
    random_state, learning_rate, weight_decay, batch_prompts, max_epochs, patience
        As for `AttentionClassifier`.

    Notes
    -----
    Source: J. Kramár et al., "Building Production-Ready Probes For Gemini" (2026), arXiv:2601.11516.
    """

    _name = "multimax"

    def __init__(
        self, n_heads: int = 4, random_state: int = 0, learning_rate: float = 0.5, weight_decay: float = 0.01, batch_prompts: int = 32,
        max_epochs: int = 200, patience: int = 10,
    ) -> None:  # fmt: skip
        self.n_heads = n_heads
        self.random_state = random_state
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.batch_prompts = batch_prompts
        self.max_epochs = max_epochs
        self.patience = patience

    def _take(self, solution: SequenceSolution) -> None:
        self.coef_ = solution.coef.reshape(solution.probe.heads, len(solution.bias), -1)
        self.intercept_ = solution.bias


class SoftmaxMeanClassifier(SequenceClassifier):
    """The mean of a linear score of tokens, weighed by the softmax of that score divided by a temperature.

    Parameters
    ----------
    temperature : float
    random_state, learning_rate, weight_decay, batch_prompts, max_epochs, patience
        As for `AttentionClassifier`.

    Notes
    -----
    Source: A. McKenzie et al., "Detecting High-Stakes Interactions with Activation Probes" (2025), arXiv:2506.10805.
    """

    _name = "softmax_mean"

    def __init__(
        self, temperature: float = 1.0, random_state: int = 0, learning_rate: float = 0.5, weight_decay: float = 0.01,
        batch_prompts: int = 32, max_epochs: int = 200, patience: int = 10,
    ) -> None:  # fmt: skip
        self.temperature = temperature
        self.random_state = random_state
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.batch_prompts = batch_prompts
        self.max_epochs = max_epochs
        self.patience = patience


class RollingMeanMaxClassifier(SequenceClassifier):
    """The largest mean of a linear score over neighbouring tokens; over all tokens of a prompt that is shorter than the window.

    Parameters
    ----------
    window : int
        Tokens.
    random_state, learning_rate, weight_decay, batch_prompts, max_epochs, patience
        As for `AttentionClassifier`.

    Notes
    -----
    Source: A. McKenzie et al., "Detecting High-Stakes Interactions with Activation Probes" (2025), arXiv:2506.10805.
    """

    _name = "rolling_mean_max"

    def __init__(
        self, window: int = 10, random_state: int = 0, learning_rate: float = 0.5, weight_decay: float = 0.01, batch_prompts: int = 32,
        max_epochs: int = 200, patience: int = 10,
    ) -> None:  # fmt: skip
        self.window = window
        self.random_state = random_state
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.batch_prompts = batch_prompts
        self.max_epochs = max_epochs
        self.patience = patience


#: By name. ``mlp`` is not among them: on pooled vectors scikit-learn's perceptron of that name is what a `Probe` fits.
SEQUENCE_CLASSIFIERS: Mapping[str, type[SequenceClassifier]] = {
    each._name: each for each in (AttentionClassifier, MultimaxClassifier, SoftmaxMeanClassifier, RollingMeanMaxClassifier)
}


def make_sequence_classifier(probe: str, random_state: int = 0, params: Mapping[str, Any] | None = None) -> SequenceClassifier:
    """A fresh, unfitted classifier of such a name, as ``"attention"`` or ``"attention:4"``.

    Raises
    ------
    InvalidArgumentError
        It has no such parameter, or that cannot have such a value.
    InvalidTypeError
        The parameters are no mapping.
    """
    parsed = parse_sequence_probe(probe)
    if parsed is None or parsed.name not in SEQUENCE_CLASSIFIERS:
        raise InvalidArgumentError(f"{probe!r:.60} is no classifier of token sequences: use one of {', '.join(SEQUENCE_CLASSIFIERS)}")
    named = SEQUENCE_PROBES[parsed.name]
    size = int(parsed.size) if named.whole else parsed.size
    made = SEQUENCE_CLASSIFIERS[parsed.name](random_state=random_state, **{named.size: size})
    if params is not None and not isinstance(params, Mapping):
        raise InvalidTypeError(f"parameters are a mapping such as {{'max_epochs': 50}}, not {type(params).__name__}")
    valid = made.get_params()
    unknown = [repr(name) for name in params or {} if name not in valid]
    if unknown:
        raise InvalidArgumentError(f"{probe!r} has no parameter {', '.join(unknown)}: its parameters are {', '.join(valid)}")
    made.set_params(**(params or {}))
    try:
        made._validate_params()
    except ValueError as error:
        raise InvalidArgumentError(f"{probe!r} cannot be made with {dict(params or {})!r}: {error}") from error
    return made


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float | np.number) and not isinstance(value, bool) else str(value)


def _parse_rows(rows: Any, n_tokens: Any) -> tuple[Array, Ints]:
    matrix = np.asarray(rows)
    counts = np.ones(len(matrix), np.int64) if n_tokens is None else np.asarray(n_tokens, np.int64)
    if matrix.ndim != 2 or counts.ndim != 1 or counts.sum() != len(matrix) or not len(counts) or (counts < 1).any():
        raise InvalidArgumentError(
            f"rows have shape {matrix.shape}, and n_tokens shape {counts.shape} with sum {int(counts.sum())}: give one row per token, and "
            "the number of tokens of each prompt, at least 1"
        )
    return matrix, counts
