"""Classifiers by name, each a fresh scikit-learn estimator. Never folds, layers or files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError

__all__ = ["converged", "fit_in_place", "make_probe", "named_probes"]

Array = npt.NDArray[Any]
_UNITS_AT_ONCE = 256


def _logistic_regression(random_state: int) -> Any:
    """Every hidden unit is standardised (mean 0, variance 1 over the training prompts). L2 penalty, C = 1; lbfgs, 1,000 iterations."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, random_state=random_state))


def _ridge(random_state: int) -> Any:
    """Every hidden unit is standardised. Least squares on ±1 labels (one against the rest for more classes), penalty alpha = 1."""
    from sklearn.linear_model import RidgeClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), RidgeClassifier(random_state=random_state))


def _lda(random_state: int) -> Any:  # noqa: ARG001  (nothing random in it)
    """Nothing needs standardising: linear discriminant analysis estimates the covariance itself.

    The covariance is shrunk by Ledoit and Wolf's formula, since a hidden size above the number of prompts is the rule here
    and the plain estimate is then singular.
    """
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    return LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")


def _svm(random_state: int) -> Any:
    """Every hidden unit is standardised. Linear support vector machine, squared hinge loss, C = 1, tol = 0.001; no probabilities."""
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import LinearSVC

    # The default tolerance takes up to twenty times as long on some thousand hidden units.
    # The dual solver draws from one generator that all threads share, so its scores would depend on the scheduler.
    return make_pipeline(StandardScaler(), LinearSVC(dual=False, tol=1e-3, random_state=random_state))


def _mass_mean(random_state: int) -> Any:  # noqa: ARG001  (nothing random in it)
    """Nothing is standardised: difference of the class means (Marks & Tegmark 2023, arXiv:2310.06824), see `MassMeanClassifier`."""
    from lmprobe_zarr.probes.mass_mean import MassMeanClassifier

    return MassMeanClassifier()


def _majority(random_state: int) -> Any:
    """Looks at nothing: the most frequent training label for every prompt. A control, not a probe."""
    from sklearn.dummy import DummyClassifier

    return DummyClassifier(strategy="prior", random_state=random_state)


@dataclass(frozen=True, slots=True)
class _NamedProbe:
    make: Callable[[int], Any]
    #: Parameters under which a fit may overwrite its training matrix instead of copying it.
    overwriting: Mapping[str, bool] = field(default_factory=dict)


_SCALED: Mapping[str, bool] = {"standardscaler__copy": False}
_NAMED: Mapping[str, _NamedProbe] = {
    "logistic_regression": _NamedProbe(_logistic_regression, _SCALED),
    "ridge": _NamedProbe(_ridge, {**_SCALED, "ridgeclassifier__copy_X": False}),
    "lda": _NamedProbe(_lda),
    "svm": _NamedProbe(_svm, _SCALED),
    "mass_mean": _NamedProbe(_mass_mean),
    "majority": _NamedProbe(_majority),
}


def named_probes() -> dict[str, str]:
    """Name to description of every named classifier: what it standardises and what it fits."""
    return {name: " ".join((probe.make.__doc__ or "").split()) for name, probe in _NAMED.items()}


def make_probe(probe: Any, random_state: int = 0) -> Any:
    """A fresh, unfitted scikit-learn classifier.

    Parameters
    ----------
    probe : str or estimator
        A name, see :func:`named_probes`; or any scikit-learn classifier, which is cloned, never fitted itself.
    random_state : int
        The seed of a named classifier. In an estimator every ``random_state`` that is None is set to it; one that the
        caller has set stays.

    Raises
    ------
    InvalidArgumentError
        No classifier has that name, or the estimator is a regressor.
    InvalidTypeError
        Neither a name nor an estimator that can be cloned, fitted and asked for predictions.
    """
    if isinstance(probe, str):
        if probe not in _NAMED:
            raise InvalidArgumentError(f"there is no probe named {probe!r}: use one of {', '.join(_NAMED)}, or a scikit-learn estimator")
        return _NAMED[probe].make(random_state)
    from sklearn.base import clone, is_regressor

    if isinstance(probe, type):
        raise InvalidTypeError(f"{probe.__name__} is a class: give an instance, {probe.__name__}()")
    if not all(callable(getattr(probe, method, None)) for method in ("fit", "predict", "get_params", "set_params")):
        raise InvalidTypeError(f"a probe is one of {', '.join(_NAMED)}, or a scikit-learn classifier, not {type(probe).__name__}")
    if is_regressor(probe):
        raise InvalidArgumentError(f"{type(probe).__name__} is a regressor: labels are classes here, give a classifier")
    fresh = clone(probe)
    unset = [name for name, value in fresh.get_params().items() if value is None and name.rpartition("__")[2] == "random_state"]
    return fresh.set_params(**dict.fromkeys(unset, random_state))


def fit_in_place(probe: Any, estimator: Any, activations: Array, labels: Array) -> Any:
    """The estimator, fitted as ``estimator.fit(activations, labels)`` does, but free to overwrite `activations`.

    Parameters
    ----------
    probe : str or estimator
        What the estimator was made from by :func:`make_probe`; estimators of the caller's are fitted untouched.
    estimator : estimator
    activations : ndarray of float, shape (prompt, hidden)
        The caller's own copy: undefined afterwards.
    labels : ndarray, shape (prompt,)
    """
    overwriting = _NAMED[probe].overwriting if isinstance(probe, str) else {}
    if not overwriting:
        return estimator.fit(activations, labels)
    (_, scaler), (_, classifier) = estimator.steps
    estimator.set_params(**overwriting)
    try:
        _fit_scaler(scaler, activations)
        classifier.fit(scaler.transform(activations), labels)
    finally:
        # Predicting must not overwrite: the same matrix is scored twice.
        estimator.set_params(**dict.fromkeys(overwriting, True))
    return estimator


def _fit_scaler(scaler: Any, activations: Array) -> None:
    """``scaler.fit(activations)``, bit for bit, some hidden units at a time: at once it takes a float64 copy of the whole matrix."""
    from sklearn.base import clone

    blocks = [clone(scaler).fit(activations[:, start : start + _UNITS_AT_ONCE]) for start in range(0, activations.shape[1], _UNITS_AT_ONCE)]
    for name in ("mean_", "var_", "scale_"):
        setattr(scaler, name, np.concatenate([getattr(block, name) for block in blocks]))
    scaler.n_samples_seen_ = blocks[0].n_samples_seen_
    scaler.n_features_in_ = activations.shape[1]


def converged(estimator: Any) -> bool:
    """False where a fitted estimator stopped at its iteration limit; True where it did not, or has none."""
    estimator = getattr(estimator, "best_estimator_", estimator)
    steps = getattr(estimator, "steps", None)
    if steps:
        return converged(steps[-1][1])
    limit, taken = getattr(estimator, "max_iter", None), getattr(estimator, "n_iter_", None)
    if limit is None or taken is None or limit <= 0:
        return True
    return bool(np.max(taken) < limit)
