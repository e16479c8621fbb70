"""Probes on sparse rows against scikit-learn by hand, against the same rows dense, and through a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.sparse import coo_array, csc_array, csr_array, csr_matrix
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import lmprobe_zarr as lz
from lmprobe_zarr.errors import InvalidArgumentError, LabelError


def sparse_rows(n: int = 120, width: int = 60, classes: int = 2, seed: int = 0) -> tuple[Any, Any]:
    """Rows of few positive numbers, as latents are, of which one column for each class tells it."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    dense = np.where(rng.random((n, width)) < 0.1, rng.gamma(2, 1, (n, width)), 0)
    dense[np.arange(n), y] += 2
    return csr_array(dense.astype(np.float32)), y


@pytest.mark.parametrize("classes", [2, 3])
def test_an_l1_penalty_is_that_of_scikit_learn_on_the_same_rows(classes: int) -> None:
    x, y = sparse_rows(classes=classes)
    probe = lz.Probe(classifier="logistic_l1").fit_from_activations(x[:80], y[:80])
    by_hand = make_pipeline(
        StandardScaler(with_mean=False), LogisticRegression(solver="saga", l1_ratio=1.0, C=0.1, max_iter=5000, random_state=0)
    ).fit(x[:80], y[:80])
    np.testing.assert_array_equal(probe.pipeline_[-1].coef_, by_hand[-1].coef_)
    np.testing.assert_array_equal(probe.predict_from_activations(x[80:]), by_hand.predict(x[80:]))
    np.testing.assert_array_equal(probe.predict_proba_from_activations(x[80:]), by_hand.predict_proba(x[80:]))
    assert probe.score_from_activations(x[80:], y[80:]) > 0.9
    chosen = np.flatnonzero(probe.pipeline_[-1].coef_.any(axis=0))
    assert set(chosen) >= set(range(2 if classes == 2 else 3))
    assert len(chosen) < 15, "few columns have a coefficient"


def test_the_optimum_is_that_of_liblinear_and_of_the_dense_rows() -> None:
    x, y = sparse_rows()
    x = x.astype(np.float64)
    options = {"tol": 1e-7, "C": 0.3, "max_iter": 1_000_000}
    of_sparse = lz.Probe(classifier="logistic_l1", classifier_kwargs=options).fit_from_activations(x, y)
    of_dense = lz.Probe(classifier="logistic_l1", classifier_kwargs=options).fit_from_activations(x.toarray(), y)
    np.testing.assert_allclose(of_sparse.pipeline_[-1].coef_, of_dense.pipeline_[-1].coef_, rtol=5e-3, atol=5e-3)
    proba = of_sparse.predict_proba_from_activations(x)
    np.testing.assert_allclose(proba, of_dense.predict_proba_from_activations(x.toarray()), atol=5e-3)
    # Liblinear's solver is another; a constant that is large makes its penalty of the intercept small.
    scaled = StandardScaler(with_mean=False).fit_transform(x)
    other = LogisticRegression(solver="liblinear", l1_ratio=1.0, C=0.3, tol=1e-10, intercept_scaling=1e3, max_iter=10_000).fit(scaled, y)
    np.testing.assert_allclose(of_sparse.pipeline_[-1].coef_, other.coef_, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", [csc_array, coo_array, csr_matrix])
@pytest.mark.parametrize("classifier", ["logistic_regression", "ridge", "svm"])
def test_other_linear_probes_take_sparse_rows_of_any_kind(classifier: str, kind: Any) -> None:
    x, y = sparse_rows()
    probe = lz.Probe(classifier=classifier).fit_from_activations(kind(x), y)
    dense = lz.Probe(classifier=classifier).fit_from_activations(x.toarray(), y)
    assert (probe.predict_from_activations(kind(x)) == dense.predict_from_activations(x.toarray())).mean() > 0.97


def test_a_probe_on_sparse_rows_is_saved_and_read(tmp_path: Path) -> None:
    x, y = sparse_rows()
    probe = lz.Probe(classifier="logistic_l1").fit_from_activations(x, y)
    wide = csr_array((x.data, x.indices.astype(np.int64), x.indptr.astype(np.int64)), shape=x.shape)
    of_wide = lz.Probe(classifier="logistic_l1").fit_from_activations(wide, y)
    np.testing.assert_array_equal(of_wide.pipeline_[-1].coef_, probe.pipeline_[-1].coef_)
    probe.save(tmp_path / "probe")
    again = lz.Probe.load(tmp_path / "probe")
    np.testing.assert_array_equal(again.predict_proba_from_activations(x), probe.predict_proba_from_activations(x))
    assert again.pipeline_[0].with_mean is False


def test_latents_of_prompts_are_probed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    y = np.arange(80) % 2
    rows = [rng.normal(size=(rng.integers(2, 9), 12)).astype(np.float32) for _ in y]
    for label, each in zip(y, rows, strict=True):
        each[rng.integers(len(each)), 3] += 6 * label  # one token of each prompt shows the label
    store = lz.open_store(tmp_path / "acts")
    texts = [f"prompt {number}" for number in range(len(y))]
    lz.write_activations(store, model="m", prompts=texts, activations={"resid": {1: rows}}, coords={"label": y})
    sae = lz.SparseAutoencoder(encoder=np.hstack([np.eye(12), -np.eye(12)]), encoder_bias=np.full(24, -1.0))
    latents = lz.encode(store.tokens(layers=[1]).resid, sae, progress=False)
    x, labels = lz.pool_latents(latents), store.dataset().label.values
    assert x.indices.dtype == np.int32, "as scikit-learn needs them"
    probe = lz.Probe(classifier="logistic_l1").fit_from_activations(x[:50], labels[:50])
    assert probe.score_from_activations(x[50:], labels[50:]) > 0.9
    coefficients = np.abs(probe.pipeline_[-1].coef_[0])
    assert coefficients.argmax() == 3, "the latent that the label is in"
    assert lz.top_tokens(latents, 3, 5).label.values.tolist() == [1] * 5


def test_sparse_rows_that_cannot_be_fitted_are_refused() -> None:
    x, y = sparse_rows()
    probe = lz.Probe(classifier="logistic_l1")
    with pytest.raises(LabelError, match=r"shape \(119,\) for 120 prompts"):
        probe.fit_from_activations(x, y[:-1])
    with pytest.raises(InvalidArgumentError, match="it is of one layer"):
        probe.fit_from_activations(x, y, n_layers=2)
    holes = x.copy()
    holes.data[3] = np.nan
    with pytest.raises(InvalidArgumentError, match="a sparse array holds NaN"):
        probe.fit_from_activations(holes, y)
    with pytest.raises(InvalidArgumentError, match=r"expected \(row, hidden\) numbers"):
        probe.fit_from_activations(csr_array((0, 5)), [])
    with pytest.raises(InvalidArgumentError, match="'lda' cannot be fitted on these 120 rows"):
        lz.Probe(classifier="lda").fit_from_activations(x, y)
    with pytest.raises(InvalidArgumentError, match="59 wide"):
        probe.fit_from_activations(x, y).predict_from_activations(x[:, :59])
