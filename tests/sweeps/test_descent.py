"""Descent on tokens and on prompts is logistic regression, whatever the scale of units and the share of a class, and says where it is not.

The case of units of one scale and equal classes is in ``test_statistics``.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import xarray as xr
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import lmprobe_zarr as lz

Array = npt.NDArray[Any]
LENGTH, HIDDEN = 8, 32


def tokens(kind: str) -> tuple[Array, Array]:
    """Rows, shape (layer, prompt, token, hidden), and the class of each prompt."""
    rng = np.random.default_rng(7)
    n = 1200 if kind == "1 % of one class" else 300
    y = rng.permutation(np.arange(n) % {"1 % of one class": 100, "three classes, two layers": 3}.get(kind, 2))
    y = (y == 0).astype(int) if kind == "1 % of one class" else y
    x = rng.normal(size=(n, LENGTH, HIDDEN))
    x[:, :, 0] += 0.5 * y[:, None]
    x[:, :, 1] += 0.7 * (y == 1)[:, None]
    if kind == "unscaled units":
        x = x * 10.0 ** rng.uniform(-3, 3, HIDDEN) + 1000 * rng.normal(size=HIDDEN)
    if kind == "units with much in common":
        x = 0.3 * x + rng.normal(size=(n, LENGTH, 1)) * rng.normal(size=HIDDEN)
    layers = [x, x[..., ::-1] + 3] if "two layers" in kind else [x]
    return np.stack(layers).astype("f4"), y


def array_of(x: Array) -> xr.DataArray:
    prompts = np.repeat(np.arange(x.shape[1]).astype(str), LENGTH)
    coords = {"layer": np.arange(len(x)), "prompt": ("token", prompts), "position": ("token", np.tile(np.arange(LENGTH), x.shape[1]))}
    return xr.DataArray(x.reshape(len(x), -1, HIDDEN), dims=("layer", "token", "hidden"), coords=coords)


KINDS = ("unscaled units", "1 % of one class", "units with much in common", "three classes, two layers")


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", KINDS)
def test_descent_is_within_0_005_auroc_of_logistic_regression(kind: str) -> None:
    x, y = tokens(kind)
    classes = np.unique(y)
    scores = lz.sweep_tokens(array_of(x), np.repeat(y, LENGTH), "sgd", cv=3)
    assert scores.converged.all()
    for layer in range(len(x)):
        areas = []
        for train, test in StratifiedKFold(3, shuffle=True, random_state=0).split(y, y):
            for k in classes[1:] if len(classes) == 2 else classes:  # of more classes, one against the rest
                plain = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
                plain.fit(x[layer, train].reshape(-1, HIDDEN), np.repeat(y[train], LENGTH) == k)
                areas.append(roc_auc_score(np.repeat(y[test], LENGTH) == k, plain.decision_function(x[layer, test].reshape(-1, HIDDEN))))
        assert abs(float(scores.auroc.isel(layer=layer).mean()) - np.mean(areas)) < 0.005


def test_descent_that_has_not_arrived_says_so() -> None:
    rng = np.random.default_rng(0)
    x, y = tokens("few prompts")
    common = rng.normal(size=(*x.shape[:-1], 1)) * rng.normal(size=HIDDEN)
    for share, arrives in ((0.3, True), (0.01, False)):
        rows = common + share * x.astype("f8")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scores = lz.sweep_tokens(array_of(rows), np.repeat(y, LENGTH), "sgd", cv=2)
        areas = []
        for train, test in StratifiedKFold(2, shuffle=True, random_state=0).split(y, y):
            # The penalty of 'sgd' per token is 0.0001.
            plain = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000, C=1e4 / (len(train) * LENGTH)))
            plain.fit(rows[0, train].reshape(-1, HIDDEN), np.repeat(y[train], LENGTH))
            areas.append(roc_auc_score(np.repeat(y[test], LENGTH), plain.decision_function(rows[0, test].reshape(-1, HIDDEN))))
        assert bool(abs(float(scores.auroc.mean()) - np.mean(areas)) < 0.005) is arrives
        assert scores.converged.values.tolist() == [[[arrives, arrives]]]
        assert [each.category for each in caught] == [] if arrives else [ConvergenceWarning]


#: Number of prompts that are learned from, and of units, by kind.
OF_PROMPTS = {
    "more units than prompts": (200, 300),
    "few prompts": (60, 200),
    "more prompts than units": (800, 32),
    "unscaled units": (300, 40),
    "one in twelve": (600, 40),
    "three classes": (300, 30),
    "units with much in common": (800, 32),
}
NEW = 2000


def prompts(kind: str, share: float = 0.3) -> tuple[Array, Array]:
    """Rows and classes; those behind the number of the kind are new prompts."""
    n, hidden = OF_PROMPTS[kind]
    rng = np.random.default_rng(3)
    y = rng.integers(0, {"one in twelve": 12, "three classes": 3}.get(kind, 2), n + NEW)
    y = (y == 0).astype(int) if kind == "one in twelve" else y
    x = rng.normal(size=(n + NEW, hidden))
    x[:, :5] += 0.4 * (y == 1)[:, None]
    if kind == "unscaled units":
        x = x * 10.0 ** rng.uniform(-3, 3, hidden) + 1000 * rng.normal(size=hidden)
    if kind == "units with much in common":
        x = share * x + rng.normal(size=(len(x), 1)) * rng.normal(size=hidden)
    return x.astype("f4"), y


def exact(x: Array, y: Array, weights: Array | None = None) -> Any:
    """The optimum of what 'sgd' minimises, by scikit-learn in float64: its penalty of 0.0001 is per prompt."""
    plain = make_pipeline(StandardScaler(), LogisticRegression(C=1e4 / len(y), max_iter=20000, tol=1e-6))
    return plain.fit(x.astype("f8"), y, logisticregression__sample_weight=weights)


def exact_area(x: Array, y: Array, n: int) -> float:
    """AUROC of the optimum on new prompts; of three classes the mean of each against the rest."""
    wanted = [1] if y.max() == 1 else range(3)
    return float(np.mean([roc_auc_score(y[n:] == k, exact(x[:n], y[:n] == k).decision_function(x[n:].astype("f8"))) for k in wanted]))


def as_prompts(x: Array) -> xr.DataArray:
    coords = {"layer": [0], "prompt": [f"p{i}" for i in range(len(x))]}
    return xr.DataArray(x[None], dims=("layer", "prompt", "hidden"), coords=coords)


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", OF_PROMPTS)
def test_descent_on_prompts_is_within_0_005_auroc_of_logistic_regression(kind: str) -> None:
    (x, y), n = prompts(kind), OF_PROMPTS[kind][0]
    expected = exact_area(x, y, n)
    scores = lz.sweep(as_prompts(x), y, "sgd", split=np.where(np.arange(len(y)) < n, "train", "test"), seeds=2)
    assert scores.converged.all()
    np.testing.assert_allclose(scores.auroc.values, expected, atol=0.005)
    decisions = lz.Probe(classifier="sgd").fit_from_activations(x[:n], y[:n]).decision_function(x[n:])
    areas = [roc_auc_score(y[n:] == k, each) for k, each in (enumerate(decisions.T) if decisions.ndim == 2 else [(1, decisions)])]
    assert abs(float(np.mean(areas)) - expected) < 0.005


def test_descent_takes_weights_of_prompts_as_logistic_regression_does() -> None:
    x, y = prompts("more prompts than units")
    x, y = x[:800], y[:800]
    weights = np.where(np.arange(len(y)) % 4 == 0, 3.0, 0.25)
    probe = lz.Probe(classifier="sgd").fit_from_activations(x, y, sample_weight=weights)
    expected = exact(x, y, weights)[-1].coef_[0]
    np.testing.assert_allclose(probe.pipeline_[-1].coef_[0], expected, atol=0.05)
    assert np.abs(exact(x, y)[-1].coef_[0] - expected).max() > 0.15


def test_descent_on_prompts_that_says_it_has_arrived_is_right() -> None:
    said = []
    for share in (0.3, 0.03, 0.01, 0.003):
        x, y = prompts("units with much in common", share)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scores = lz.sweep(as_prompts(x), y, "sgd", split=np.where(np.arange(len(y)) < 800, "train", "test"))
        said.append(bool(scores.converged.all()))
        assert [each.category for each in caught] == ([] if said[-1] else [ConvergenceWarning])
        if said[-1]:
            assert abs(float(scores.auroc.mean()) - exact_area(x, y, 800)) < 0.005
    assert said[0], said
    assert not all(said), said
    short = lz.Probe(classifier="sgd", classifier_kwargs={"tol": 1e-1, "n_iter_no_change": 1})
    with pytest.warns(ConvergenceWarning, match="has not reached the optimum"):
        short.fit_from_activations(x[:800], y[:800])
