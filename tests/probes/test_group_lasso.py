"""The group lasso over layers: optimal by its conditions, worked out in plain numpy, and what it chooses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, LabelError
from lmprobe_zarr.probes import group_lasso, make_pipeline_for
from lmprobe_zarr.probes.group_lasso import fit_group_lasso
from lmprobe_zarr.probes.layer_choice import check_alpha, check_top_k, choose_by_importance, choose_by_lasso, layer_importance

SHAPES = [(40, 4, 3), (40, 64, 3), (120, 10, 6), (25, 7, 1)]


def layers(n: int, hidden: int, n_layers: int, dtype: str = "float64") -> tuple[Any, Any]:
    """Layers of which the second tells the label, where there is one."""
    rng = np.random.default_rng(n + hidden)
    x = rng.normal(size=(n, n_layers, hidden))
    y = (x[:, min(1, n_layers - 1), :2].sum(axis=1) + 0.3 * rng.normal(size=n) > 0).astype(int)
    x = (x - x.mean(0)) / x.std(0)
    return x.reshape(n, -1).astype(dtype), y


def objective(w: Any, x: Any, y: Any, n_layers: int, alpha: float) -> float:
    sign = np.where(y == 1, 1, -1)
    return float(np.log1p(np.exp(-sign * (x @ w))).mean() + alpha * np.linalg.norm(w.reshape(n_layers, -1), axis=1).sum())


@pytest.mark.parametrize(("n", "hidden", "n_layers"), SHAPES)
@pytest.mark.parametrize("alpha", [0.3, 0.05, 0.01, 0.001])
def test_the_optimality_conditions_hold(n: int, hidden: int, n_layers: int, alpha: float) -> None:
    x, y = layers(n, hidden, n_layers)
    coef, converged = fit_group_lasso(x, y, n_layers, alpha)
    assert converged
    assert coef.shape == (n_layers, hidden)
    sign = np.where(y == 1, 1, -1)
    slope = (-(sign / (1 + np.exp(sign * (x @ coef.ravel())))) @ x / n).reshape(n_layers, hidden)
    for layer in range(n_layers):
        length = np.linalg.norm(coef[layer])
        if length:
            assert np.linalg.norm(slope[layer] + alpha * coef[layer] / length) <= 2e-4 * alpha
        else:
            assert np.linalg.norm(slope[layer]) <= alpha * (1 + 2e-4)


@pytest.mark.few(1)
@pytest.mark.parametrize("alpha", [0.2, 0.02])
def test_no_general_solver_finds_less(alpha: float) -> None:
    x, y = layers(40, 4, 3)
    found = fit_group_lasso(x, y, 3, alpha)[0].ravel()
    reached = objective(found, x, y, 3, alpha)
    rng = np.random.default_rng(0)
    starts = [rng.normal(size=12) * scale for scale in (0.1, 1, 3)]
    others = [
        minimize(objective, start, (x, y, 3, alpha), method="Powell", options={"maxiter": 20_000, "ftol": 1e-12}).fun for start in starts
    ]
    assert reached <= min(others) + 1e-7


def test_a_strong_penalty_leaves_nothing_and_a_weaker_one_the_layer_with_the_label_first() -> None:
    x, y = layers(120, 10, 6)
    slopes = np.linalg.norm(((0.5 - y) @ x / len(x)).reshape(6, -1), axis=1)
    assert slopes.argmax() == 1
    # At zero coefficients the gradient of each layer decides whether it stays out.
    assert not fit_group_lasso(x, y, 6, float(slopes.max()) * 1.001)[0].any()
    coef, _ = fit_group_lasso(x, y, 6, float(slopes.max()) * 0.98)
    assert np.flatnonzero(np.linalg.norm(coef, axis=1)).tolist() == [1]


def test_activations_of_float32_and_more_units_than_prompts_give_the_same() -> None:
    x, y = layers(40, 64, 3)
    wide = fit_group_lasso(x, y, 3, 0.02)[0]
    np.testing.assert_allclose(fit_group_lasso(x.astype("float32"), y, 3, 0.02)[0], wide, atol=1e-4)
    # Columns without values change nothing, but leave fewer prompts than units.
    padded = np.concatenate([x.reshape(40, 3, 64), np.zeros((40, 3, 50))], axis=2).reshape(40, -1)
    np.testing.assert_allclose(fit_group_lasso(padded, y, 3, 0.02)[0][:, :64], wide, atol=1e-4)


def test_layers_are_chosen_and_their_norms_given() -> None:
    x, y = layers(120, 10, 6, "float32")
    shifted = x * np.repeat([1, 20, 1, 1, 1, 0.01], 10).astype("float32") + 3
    chosen, norms = choose_by_lasso(shifted, np.where(y == 1, "yes", "no"), 6, 0.15, True)
    assert chosen == [1] == np.flatnonzero(norms).tolist(), "layers are brought to one scale first"
    np.testing.assert_allclose(norms, np.linalg.norm(fit_group_lasso(x, y, 6, 0.15)[0], axis=1), atol=1e-3)


def test_where_no_layer_is_left_all_are_used_and_a_warning_says_so() -> None:
    x, y = layers(40, 4, 3)
    with pytest.warns(UserWarning, match="chose no layer with auto_alpha=50, so all 3 are used: give a smaller"):
        chosen, norms = choose_by_lasso(x, y, 3, 50, True)
    assert chosen == [0, 1, 2]
    assert not norms.any()


def test_a_solution_that_is_not_optimal_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_lasso, "_MOST_STEPS", 3)
    x, y = layers(40, 64, 3)
    with pytest.warns(ConvergenceWarning, match="stopped before its optimum: give a larger auto_alpha"):
        choose_by_lasso(x, y, 3, 0.001, True)


@pytest.mark.parametrize("classes", [2, 3])
def test_importances_are_norms_of_coefficients_over_units_and_classes(classes: int) -> None:
    x, y = layers(120, 10, 6)
    y = y + (np.arange(120) % 3 == 0) * (classes - 2)
    oracle = LogisticRegression(max_iter=1000).fit(x, y)
    blocks = oracle.coef_.reshape(len(oracle.coef_), 6, 10)
    chosen, importances = choose_by_importance(x, 6, 2, True, lambda rows: LogisticRegression(max_iter=1000).fit(rows, y))
    wanted = np.sqrt((blocks**2).sum(axis=(0, 2)))
    np.testing.assert_allclose(importances, wanted, rtol=1e-3)
    assert chosen == sorted(np.argsort(wanted)[-2:])
    half, _ = choose_by_importance(x, 6, None, True, lambda rows: LogisticRegression(max_iter=1000).fit(rows, y))
    assert half == sorted(np.argsort(wanted)[-3:])
    assert choose_by_importance(x, 6, 99, True, lambda rows: oracle)[0] == list(range(6))
    metrics: list[tuple[str, Any]] = [
        ("l1", lambda b: np.abs(b).sum()),
        ("mean_abs", lambda b: np.abs(b).mean()),
        ("max_abs", lambda b: np.abs(b).max()),
    ]
    for metric, of in metrics:
        np.testing.assert_allclose(layer_importance(oracle, 6, metric), [of(blocks[:, layer]) for layer in range(6)], rtol=1e-9)


def test_components_are_undone_before_importances_are_taken() -> None:
    x, y = layers(120, 10, 6)
    pipeline = make_pipeline_for("logistic_regression", n_layers=6, preprocessing="pca:60").fit(x, y)
    scaled = pipeline[0].transform(x)
    # With all components the decision is a map of the scaled layers, which least squares finds.
    maps = np.linalg.lstsq(np.column_stack([scaled, np.ones(120)]), pipeline.decision_function(x), rcond=None)[0]
    np.testing.assert_allclose(layer_importance(pipeline, 6), np.linalg.norm(maps[:-1].reshape(6, 10), axis=1), atol=1e-8)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: check_alpha(0), InvalidArgumentError, "penalises nothing"),
        (lambda: check_alpha(float("nan")), InvalidArgumentError, "penalises nothing"),
        (lambda: check_alpha("0.1"), InvalidTypeError, "is no number"),
        (lambda: check_top_k(0), InvalidArgumentError, "chooses nothing"),
        (lambda: check_top_k(1.5), InvalidTypeError, "is no number of layers"),
        (lambda: choose_by_lasso(np.ones((3, 4)), np.arange(3), 2, 0.1, True), LabelError, "and there are 3: use layers='fast_auto'"),
        (lambda: layer_importance(make_pipeline_for("mlp"), 1), InvalidArgumentError, "no coefficients by layer"),
        (lambda: layer_importance(LogisticRegression(), 1, "l3"), InvalidArgumentError, "metric='l3' is unknown"),
    ],
)
def test_what_chooses_no_layers_is_refused(call: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        call()
