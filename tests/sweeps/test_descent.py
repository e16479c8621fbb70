"""Averaged descent on tokens is logistic regression, whatever the scale of units and the share of a class, and says where it is not.

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
