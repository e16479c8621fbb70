"""The column that is the projection on the difference of two class means, against numpy and scikit-learn."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.preprocessing import StandardScaler

from lmprobe_zarr.batch.stages import parse_stage
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, LabelError, NotAProbeError
from lmprobe_zarr.probes import coefficients, dump_probe, make_pipeline_for, parse_probe, watch_pipeline
from lmprobe_zarr.probes.augment import MassMeanColumn
from lmprobe_zarr.probes.container import pack_tensors, unpack_tensors
from lmprobe_zarr.probes.files import _digest

#: Preprocessing, number of layers, and what scales the rows before the direction is taken.
CASES = [(None, 1, True), (None, 2, True), ("pca:4", 1, True), ("pca:4", 2, True), ("standard", 1, True), ("standard+pca:3", 2, False)]


def activations(dtype: str = "float64", n: int = 60, hidden: int = 12) -> tuple[Any, Any]:
    rng = np.random.default_rng(1)
    y = np.arange(n) % 2
    x = rng.normal(size=(n, hidden)) * np.linspace(0.2, 4, hidden) + 1
    x[:, 2] += y
    return x.astype(dtype), y


def by_hand(x: Any, y: Any, preprocessing: str | None, scaled: bool) -> Any:
    """The matrix that the classifier is given, in plain numpy and scikit-learn, one step at a time."""
    rows = (x - x.mean(0)) / x.std(0) if scaled else x
    difference = rows[y == 1].mean(0) - rows[y == 0].mean(0)
    column = rows @ (difference / np.sqrt((difference**2).sum()))
    for word in (preprocessing or "").split("+"):
        if word == "standard":
            rows = StandardScaler().fit_transform(rows)
        elif word:
            rows = PCA(int(word.partition(":")[2]), random_state=0).fit_transform(rows)
    return np.column_stack([rows, column])


@pytest.mark.parametrize(("preprocessing", "n_layers", "scaled"), CASES)
def test_the_classifier_is_given_the_projection_beside_the_preprocessed_rows(preprocessing: Any, n_layers: int, scaled: bool) -> None:
    x, y = activations()
    wanted = by_hand(x, y, preprocessing, scaled)
    options = {"preprocessing": preprocessing, "n_layers": n_layers, "mass_mean_augment": True}
    pipeline = make_pipeline_for("logistic_regression", **options).fit(x, y)
    np.testing.assert_allclose(pipeline[:-1].transform(x), wanted, atol=1e-9)
    oracle = LogisticRegression(max_iter=5000, tol=1e-10).fit(wanted, y)
    tight = make_pipeline_for("logistic_regression", params={"tol": 1e-10, "max_iter": 5000}, **options).fit(x, y)
    np.testing.assert_allclose(tight.predict_proba(x), oracle.predict_proba(wanted), atol=1e-6)
    plain = make_pipeline_for("logistic_regression", **{**options, "mass_mean_augment": False}).fit(x, y)
    assert not np.allclose(plain.predict_proba(x), pipeline.predict_proba(x), atol=1e-6), "the column has a part in the fit"


def test_the_direction_leads_from_the_first_class_to_the_second_and_has_length_one() -> None:
    x, y = activations("float32")
    labels = np.where(y == 1, "b", "a")
    fitted = MassMeanColumn().fit(x, labels)
    wide = x.astype(np.float64)
    difference = wide[y == 1].mean(0) - wide[y == 0].mean(0)
    np.testing.assert_allclose(fitted.direction_, difference / np.linalg.norm(difference), rtol=1e-12)
    made = fitted.transform(x)
    assert made.dtype == np.float32
    np.testing.assert_array_equal(made[:, :-1], x)
    same = MassMeanColumn().fit(np.ones((4, 3)), [0, 1, 0, 1])
    np.testing.assert_array_equal(same.transform(np.ones((2, 3)))[:, -1], [0, 0])


@pytest.mark.few(2)
@pytest.mark.parametrize("classifier", ["logistic_regression", "ridge", "mass_mean", "lda", "mlp"])
@pytest.mark.parametrize(("preprocessing", "n_layers", "scaled"), CASES)
def test_a_saved_one_comes_back_bit_for_bit(classifier: str, preprocessing: Any, n_layers: int, scaled: bool) -> None:
    x, y = activations("float32")
    pipeline = make_pipeline_for(classifier, preprocessing=preprocessing, n_layers=n_layers, mass_mean_augment=True).fit(x, y)
    data = dump_probe(pipeline, {})
    parsed, _ = parse_probe(data, "f")
    np.testing.assert_array_equal(parsed.predict(x), pipeline.predict(x))
    method = "predict_proba" if hasattr(pipeline, "predict_proba") else "decision_function"
    np.testing.assert_array_equal(getattr(parsed, method)(x), getattr(pipeline, method)(x))
    assert [name for name, _ in parsed.steps] == [name for name, _ in pipeline.steps]
    assert dump_probe(parsed, {}) == data


@pytest.mark.parametrize(("preprocessing", "n_layers", "scaled"), CASES)
def test_coefficients_and_scores_of_growing_texts_are_in_the_units_of_the_activations(
    preprocessing: Any, n_layers: int, scaled: bool
) -> None:
    x, y = activations()
    pipeline = make_pipeline_for("logistic_regression", preprocessing=preprocessing, n_layers=n_layers, mass_mean_augment=True).fit(x, y)
    coef, intercept = coefficients(pipeline, n_layers)
    np.testing.assert_allclose(x @ coef.reshape(1, -1)[0] + intercept[0], pipeline.decision_function(x), atol=1e-8)
    watched = watch_pipeline(pipeline, parse_stage("last_token"), tuple(range(n_layers)), "logistic_regression", pipeline.classes_)
    assert watched.coef is not None
    values = np.einsum("pld,lvd->pv", x.reshape(len(x), n_layers, -1), watched.coef) + watched.intercept
    np.testing.assert_allclose(watched.score(values), pipeline.predict_proba(x)[:, 1], atol=1e-9)


def test_a_ridge_is_solved_on_the_same_rows() -> None:
    from lmprobe_zarr.probes import fit_probe

    x, y = activations()
    pipeline = fit_probe("ridge", make_pipeline_for("ridge", preprocessing="pca:4", mass_mean_augment=True), x, y)
    wanted = by_hand(x, y, "pca:4", scaled=True)
    np.testing.assert_allclose(pipeline.decision_function(x), RidgeClassifier().fit(wanted, y).decision_function(wanted), atol=1e-8)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: make_pipeline_for("ridge_regression", task="regression", mass_mean_augment=True),
            InvalidArgumentError,
            "a regression has none",
        ),
        (lambda: make_pipeline_for("attention", mass_mean_augment=True), InvalidArgumentError, "'attention' learns from the tokens"),
        (lambda: make_pipeline_for("ridge", mass_mean_augment=cast("Any", "yes")), InvalidTypeError, "neither True nor False"),
        (lambda: MassMeanColumn().fit(np.ones((3, 2)), [0, 1, 2]), LabelError, "and there are 3: leave it out"),
        (lambda: MassMeanColumn().fit(np.ones((3, 2)), [1, 1, 1]), LabelError, "and there are 1: leave it out"),
        (lambda: MassMeanColumn().fit(np.eye(2), [0, 1]).transform(np.ones((1, 3))), InvalidArgumentError, "3 features"),
    ],
)
def test_what_has_no_difference_of_two_means_is_refused(call: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        call()


def changed(change: Any) -> bytes:
    import json

    x, y = activations()
    pipeline = make_pipeline_for("ridge", preprocessing="pca:4", mass_mean_augment=True).fit(x, y)
    tensors, metadata = unpack_tensors(dump_probe(pipeline, {}), "f")
    document = json.loads(metadata["probe"])
    assert document["version"] == 2, "older releases say that they are too old"
    change(document)
    text = json.dumps(document)
    return pack_tensors(tensors, {"probe": text, "sha256": _digest(text, tensors)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["steps"][2].update(all_but_last=1), "does not say which columns"),
        (lambda d: d["steps"][3].update(all_but_last=True), "does not say which columns"),
        (lambda d: d["steps"][2].pop("all_but_last"), "columns, PCA takes others|MassMeanColumn gives 13 columns"),
        (lambda d: d["steps"][1].update({"class": "MassMeanClassifier"}), "no classes|lacks its array"),
    ],
)
def test_a_damaged_file_of_one_is_refused(change: Any, words: str) -> None:
    with pytest.raises(NotAProbeError, match=words):
        parse_probe(changed(change), "f")


def test_a_probe_without_the_column_is_saved_as_older_releases_read_it() -> None:
    x, y = activations()
    _, metadata = unpack_tensors(dump_probe(make_pipeline_for("ridge").fit(x, y), {}), "f")
    assert '"version":1' in metadata["probe"]
