"""Probes by name, each a fresh scikit-learn estimator. Never folds, layers or files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lmprobe_zarr.display import nearest
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.probes.ridge import fit_probe, is_ridge
from lmprobe_zarr.probes.sequences import is_sequence_probe
from lmprobe_zarr.typing import Array, Estimator

__all__ = ["check_task", "converged", "draws_at_random", "fit_in_place", "has_strength", "make_probe", "named_probes", "standardises"]
_UNITS_AT_ONCE = 256
_TASKS = ("classification", "regression")


# `named_probes` shows these docstrings. The functions make the estimator alone: `make_probe` puts the standardisation that a docstring
# mentions before it if `_NamedProbe.standardised` is true.


def _logistic_regression(random_state: int) -> Any:
    """Every hidden unit is standardised (mean 0, variance 1 over the training prompts). L2 penalty, C = 1; lbfgs, 1,000 iterations."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=1000, random_state=random_state)


def _logistic_regression_cv(random_state: int) -> Any:
    """Every hidden unit is standardised. Logistic regression whose C is chosen by accuracy over 5 stratified folds.

    C is one of ten from 1e-4 to 1e4; then all prompts are fitted with it. The folds are standardised with the mean and variance of all
    training prompts, as scikit-learn and lmprobe do it. With few groups that favours weak penalties: ``strengths=…, choose="strength"``
    of a sweep standardises within each fold.
    """
    from inspect import signature

    from sklearn.linear_model import LogisticRegressionCV

    options: dict[str, Any] = {"cv": 5, "max_iter": 1000, "scoring": "accuracy", "random_state": random_state}
    # Since scikit-learn 1.8 there is a warning without these. Earlier versions lack them, or have the same values by default.
    if "use_legacy_attributes" in signature(LogisticRegressionCV).parameters:
        options |= {"use_legacy_attributes": False, "l1_ratios": (0.0,)}
    return LogisticRegressionCV(**options)


def _logistic_l1(random_state: int) -> Any:
    """Every hidden unit is standardised; of sparse rows it is divided by its standard deviation alone. Logistic regression, L1 penalty,
    C = 0.1; saga, 5,000 iterations: few units have a coefficient.

    Source: A. Y. Ng, "Feature selection, L1 vs. L2 regularization, and rotational invariance" (ICML 2004).
    """
    from sklearn.linear_model import LogisticRegression

    # Not liblinear: it penalises the intercept, draws from one generator that all threads share, and knows two classes only.
    return LogisticRegression(solver="saga", l1_ratio=1.0, C=0.1, max_iter=5000, random_state=random_state)


def _ridge(random_state: int) -> Any:
    """Every hidden unit is standardised. Least squares on ±1 labels (one against the rest for more classes), penalty alpha = 1."""
    from sklearn.linear_model import RidgeClassifier

    return RidgeClassifier(random_state=random_state)


def _lda(random_state: int) -> Any:  # noqa: ARG001  (nothing random in it)
    """Nothing needs standardising: linear discriminant analysis estimates the covariance itself.

    The covariance is shrunk by Ledoit and Wolf's formula, since a hidden size above the number of prompts is the rule here
    and the plain estimate is then singular.
    """
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    return LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")


def _svm(random_state: int) -> Any:
    """Every hidden unit is standardised. Linear support vector machine, squared hinge loss, C = 1, tol = 0.001; no probabilities."""
    from sklearn.svm import LinearSVC

    # The default tolerance takes up to twenty times as long with a few thousand hidden units.
    # The dual solver draws from one generator that all threads share, so its scores would depend on the scheduler.
    return LinearSVC(dual=False, tol=1e-3, random_state=random_state)


def _mass_mean(random_state: int) -> Any:  # noqa: ARG001  (nothing random in it)
    """Nothing is standardised: difference of the class means (Marks & Tegmark 2023, arXiv:2310.06824), see `MassMeanClassifier`."""
    from lmprobe_zarr.probes.mass_mean import MassMeanClassifier

    return MassMeanClassifier()


def _mass_mean_cov(random_state: int) -> Any:  # noqa: ARG001  (nothing random in it)
    """Every hidden unit is standardised, so that all are shrunk alike. Difference of the class means, corrected by the covariance.

    The direction is Σ⁻¹(μ₁ − μ₀) (Marks & Tegmark 2023, arXiv:2310.06824), Σ the covariance about the class means, shrunk by
    Ledoit and Wolf's formula so that it exists with more hidden units than prompts, see `MassMeanClassifier`.
    """
    from lmprobe_zarr.probes.mass_mean import MassMeanClassifier

    return MassMeanClassifier(covariance=True)


def _sgd(random_state: int) -> Any:
    """Every hidden unit is standardised. Logistic regression by stochastic gradient descent, L2 penalty alpha = 1e-4.

    Steps shrink until the loss no longer improves; on tokens they are of one size, and averaged. Where the optimum is not reached,
    ``converged`` is False, see `DescentClassifier`.
    """
    from lmprobe_zarr.probes.descent import DescentClassifier

    options = {"learning_rate": "adaptive", "eta0": 4.0, "tol": 1e-5, "n_iter_no_change": 10, "max_iter": 2000}
    return DescentClassifier(loss="log_loss", random_state=random_state, **options)


def _ensemble(random_state: int) -> Any:
    """Every hidden unit is standardised. Logistic regressions with C = 0.01, 0.1, 0.5, 1 and 5, whose probabilities are averaged."""
    from lmprobe_zarr.probes.ensemble import EnsembleClassifier

    return EnsembleClassifier(random_state=random_state)


def _mlp(random_state: int) -> Any:
    """Every hidden unit is standardised. Perceptron with one inner layer of 64 rectified units; lbfgs, L2 penalty alpha = 0.1; not linear.

    Source: J. Hewitt and P. Liang, "Designing and Interpreting Probes with Control Tasks" (2019), arXiv:1909.03368, "MLP-1",
    who also show why to compare it with shuffled labels.
    """
    from sklearn.neural_network import MLPClassifier

    # Adam, the default, suits more prompts than there usually are: with a few hundred it takes longer and scores worse.
    return MLPClassifier(hidden_layer_sizes=(64,), solver="lbfgs", alpha=0.1, max_iter=5000, random_state=random_state)


def _majority(random_state: int) -> Any:
    """Looks at nothing: the most frequent training label for every prompt. A control, not a probe."""
    from sklearn.dummy import DummyClassifier

    return DummyClassifier(strategy="prior", random_state=random_state)


def _ridge_regression(random_state: int) -> Any:
    """Every hidden unit is standardised. Least squares, L2 penalty alpha = 1."""
    from sklearn.linear_model import Ridge

    return Ridge(random_state=random_state)


def _lasso(random_state: int) -> Any:
    """Every hidden unit is standardised, and so is the target. Least squares, L1 penalty alpha = 0.1: few units with a coefficient.

    Source: R. Tibshirani, "Regression Shrinkage and Selection via the Lasso", Journal of the Royal Statistical Society B 58 (1996).
    """
    from lmprobe_zarr.probes.regressors import ScaledTargetLasso

    return ScaledTargetLasso(alpha=0.1, max_iter=10_000, random_state=random_state)


def _svr(random_state: int) -> Any:
    """Every hidden unit is standardised, and so is the target. Linear support vector regression, epsilon = 0.1, C = 1, squared loss."""
    from lmprobe_zarr.probes.regressors import ScaledTargetLinearSVR

    # The primal solver, as for svm: the dual one, which the unsquared loss needs, would make scores depend on the scheduler.
    return ScaledTargetLinearSVR(
        loss="squared_epsilon_insensitive", dual=False, epsilon=0.1, tol=1e-3, max_iter=10_000, random_state=random_state
    )


@dataclass(frozen=True, slots=True)
class _NamedProbe:
    make: Callable[[int], Any]
    standardised: bool = True
    task: str = "classification"
    #: Parameters of the estimator under which a fit may overwrite its training matrix instead of copying it.
    overwriting: Mapping[str, bool] = field(default_factory=dict)
    #: Name of the parameter that sets the strength of the regularisation; empty if there is none.
    penalty: str = ""
    #: Whether another seed gives another fit.
    random: bool = False


_NAMED: Mapping[str, _NamedProbe] = {
    "logistic_regression": _NamedProbe(_logistic_regression, penalty="C"),
    "logistic_regression_cv": _NamedProbe(_logistic_regression_cv),
    "logistic_l1": _NamedProbe(_logistic_l1, penalty="C", random=True),
    "ridge": _NamedProbe(_ridge, penalty="alpha"),
    "lda": _NamedProbe(_lda, standardised=False),
    "svm": _NamedProbe(_svm, penalty="C"),
    "mass_mean": _NamedProbe(_mass_mean, standardised=False),
    "mass_mean_cov": _NamedProbe(_mass_mean_cov),
    "sgd": _NamedProbe(_sgd, penalty="alpha", random=True),
    "ensemble": _NamedProbe(_ensemble),
    "mlp": _NamedProbe(_mlp, penalty="alpha", random=True),
    "majority": _NamedProbe(_majority, standardised=False),
    "ridge_regression": _NamedProbe(_ridge_regression, task="regression", penalty="alpha"),
    "lasso": _NamedProbe(_lasso, task="regression", overwriting={"copy_X": False}, penalty="alpha"),
    "svr": _NamedProbe(_svr, task="regression", penalty="C"),
}


def check_task(task: Any) -> str:
    """The task, if it is one.

    Raises
    ------
    InvalidArgumentError
        Neither "classification" nor "regression".
    """
    if not isinstance(task, str) or task not in _TASKS:
        raise InvalidArgumentError(f"task={task!r} is unknown: use {' or '.join(map(repr, _TASKS))}")
    return str(task)


def named_probes(task: str | None = None) -> dict[str, str]:
    """Name to description of every named estimator: what it standardises and what it fits.

    Parameters
    ----------
    task : {"classification", "regression"}, optional
        Only the estimators for this task.
    """
    if task is not None:
        check_task(task)
    return {name: " ".join((probe.make.__doc__ or "").split()) for name, probe in _NAMED.items() if task in (None, probe.task)}


def standardises(probe: str | Estimator) -> bool:
    """Whether :func:`make_probe` puts a standardisation of every hidden unit before the estimator; False for the caller's own."""
    return isinstance(probe, str) and probe in _NAMED and _NAMED[probe].standardised


def draws_at_random(probe: str | Estimator) -> bool:
    """Whether another seed may give another fit: False for named probes that draw nothing, True for any estimator of the caller's own."""
    return not isinstance(probe, str) or (probe in _NAMED and _NAMED[probe].random)


def has_strength(probe: str | Estimator) -> bool:
    """Whether the probe has one regularisation strength, which `make_probe` can set: named ones with ``C`` or ``alpha`` do."""
    return isinstance(probe, str) and probe in _NAMED and bool(_NAMED[probe].penalty)


def make_probe(
    probe: Any,
    random_state: int = 0,
    *,
    task: str = "classification",
    params: Mapping[str, Any] | None = None,
    standardise: bool = True,
    strength: float | None = None,
) -> Any:
    """A fresh, unfitted scikit-learn estimator.

    Parameters
    ----------
    probe : str or estimator
        A name, see :func:`named_probes`; or any scikit-learn estimator for the task, which is cloned, never fitted itself.
    random_state : int
        The seed of a named estimator. In the caller's own, every ``random_state`` that is None is set to it; others stay as they are.
    task : {"classification", "regression"}
        What the probe must be able to do.
    params : mapping of str to value, optional
        Arguments of the named estimator's own constructor that replace its defaults, such as ``{"C": 0.01}``.
    standardise : bool
        False leaves out the standardisation that a named estimator has by default.
    strength : float, optional
        Strength of the regularisation: ``alpha`` of the estimator, or 1 / ``C``. Estimators without either ignore it.

    Raises
    ------
    InvalidArgumentError
        No estimator has that name; it is for the other task; it has no such parameter, or that cannot have such a value; or parameters
        are given with an estimator of the caller's own.
    InvalidTypeError
        Neither a name nor an estimator that can be cloned, fitted and used to predict.
    """
    names = ", ".join(named_probes(check_task(task)))
    if isinstance(probe, str):
        if probe not in _NAMED and is_sequence_probe(probe):
            raise InvalidArgumentError(
                f"{probe!r:.60} learns how to pool the tokens of a prompt, and here there is one vector per prompt: use sweep_tokens, "
                "fit_tokens or Probe"
            )
        if probe not in _NAMED:
            near = nearest(probe, _NAMED)
            raise InvalidArgumentError(f"there is no probe named {probe!r}{near}: use one of {names}, or a scikit-learn estimator")
        named = _NAMED[probe]
        if named.task != task:
            raise InvalidArgumentError(f"{probe!r} is for {named.task}, not for {task}: use one of {names}, or a scikit-learn estimator")
        made = named.make(random_state)
        if strength is not None and named.penalty:
            made.set_params(**{named.penalty: 1 / strength if named.penalty == "C" else strength})
        _override(probe, made, params)
        if not (named.standardised and standardise):
            return made
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        return make_pipeline(StandardScaler(), made)
    from sklearn.base import clone, is_classifier, is_regressor

    if isinstance(probe, type):
        raise InvalidTypeError(f"{probe.__name__} is a class: give an instance, {probe.__name__}()")
    if not all(callable(getattr(probe, method, None)) for method in ("fit", "predict", "get_params", "set_params")):
        raise InvalidTypeError(f"a probe is one of {names}, or a scikit-learn estimator, not {type(probe).__name__}")
    if task == "classification" and is_regressor(probe):
        raise InvalidArgumentError(f"{type(probe).__name__} is a regressor: labels are classes here, give a classifier")
    if task == "regression" and is_classifier(probe):
        raise InvalidArgumentError(f"{type(probe).__name__} is a classifier: labels are numbers here, give a regressor")
    if params:
        raise InvalidArgumentError(
            f"parameters {', '.join(map(repr, params))} were given with an estimator of your own: set them on {type(probe).__name__} itself"
        )
    fresh = clone(probe)
    unset = [name for name, value in fresh.get_params().items() if value is None and name.rpartition("__")[2] == "random_state"]
    return fresh.set_params(**dict.fromkeys(unset, random_state))


def _override(name: str, estimator: Any, params: Mapping[str, Any] | None) -> None:
    if params is None:
        return
    if not isinstance(params, Mapping):
        raise InvalidTypeError(f"parameters are a mapping such as {{'C': 0.01}}, not {type(params).__name__}")
    valid = estimator.get_params(deep=False)
    unknown = [repr(given) for given in params if given not in valid]
    if unknown:
        listed = f"its parameters are {', '.join(valid)}" if valid else "it has none"
        raise InvalidArgumentError(f"{name!r} has no parameter {', '.join(unknown)}: {listed}")
    estimator.set_params(**params)
    try:
        # Every fit of scikit-learn validates first; done here, it comes before anything is extracted.
        if hasattr(estimator, "_parameter_constraints"):
            estimator._validate_params()
    except ValueError as error:
        raise InvalidArgumentError(f"{name!r} cannot be made with {dict(params)!r}: {' '.join(str(error).split())}") from error


def fit_in_place(probe: str | Estimator, estimator: Any, activations: Array, labels: Array) -> Any:
    """The estimator, fitted as ``estimator.fit(activations, labels)`` does, but free to overwrite `activations`.

    Parameters
    ----------
    probe : str or estimator
        What the estimator was made from by :func:`make_probe`; the caller's own estimators are fitted as they are.
    estimator : estimator
    activations : ndarray of float, shape (prompt, hidden)
        The caller's own copy; its values are undefined afterwards.
    labels : ndarray, shape (prompt,)
    """
    if is_ridge(probe) or not isinstance(probe, str) or not standardises(probe):
        return fit_probe(probe, estimator, activations, labels)
    (_, scaler), (_, fitted) = estimator.steps
    overwriting = _NAMED[probe].overwriting
    scaler.set_params(copy=False)
    fitted.set_params(**overwriting)
    try:
        _fit_scaler(scaler, activations)
        fitted.fit(scaler.transform(activations), labels)
    finally:
        # Predicting must not overwrite its matrix, which is scored twice.
        scaler.set_params(copy=True)
        fitted.set_params(**dict.fromkeys(overwriting, True))
    return estimator


def _fit_scaler(scaler: Any, activations: Array) -> None:
    """``scaler.fit(activations)``, bit for bit, on some hidden units at a time: one fit would copy the whole matrix to float64."""
    from sklearn.base import clone

    blocks = [clone(scaler).fit(activations[:, start : start + _UNITS_AT_ONCE]) for start in range(0, activations.shape[1], _UNITS_AT_ONCE)]
    for name in ("mean_", "var_", "scale_"):
        setattr(scaler, name, np.concatenate([getattr(block, name) for block in blocks]))
    scaler.n_samples_seen_ = blocks[0].n_samples_seen_
    scaler.n_features_in_ = activations.shape[1]


def converged(estimator: Estimator) -> bool:
    """False if a fitted estimator stopped at its iteration limit, or says so itself; True if it did not, or has no limit."""
    estimator = getattr(estimator, "best_estimator_", estimator)
    steps = getattr(estimator, "steps", None)
    if steps:
        return converged(steps[-1][1])
    if hasattr(estimator, "converged_"):
        return bool(estimator.converged_)
    limit, taken = getattr(estimator, "max_iter", None), getattr(estimator, "n_iter_", None)
    if limit is None or taken is None or limit <= 0:
        return True
    return bool(np.max(taken) < limit)
