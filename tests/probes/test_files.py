"""Saved probes: the same predictions bit for bit, no pickle, and a clear error for whatever else is read."""

from __future__ import annotations

import json
import pickle
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from examples import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler

from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, NotAProbeError, UnsupportedVersionError
from lmprobe_zarr.probes import converged, dump_probe, make_pipeline_for, make_probe, named_probes, parse_probe
from lmprobe_zarr.probes.container import pack_tensors, unpack_tensors
from lmprobe_zarr.probes.files import FORMAT, _digest

HEADER = {"model": "acme/toy", "layers": [3, 8], "pooling": None, "nested": {"é": [True, 1.5]}}


def activations(classes: int = 2, n: int = 90, hidden: int = 300, dtype: str = "float32") -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    y = np.arange(n) % classes
    x = rng.normal(size=(n, hidden)) * np.linspace(0.1, 5, hidden) + 2
    x[np.arange(n), y] += 5
    return x.astype(dtype), y


def same_predictions(first: Any, other: Any, x: Any) -> None:
    for method in ("predict", "predict_proba", "decision_function"):
        assert hasattr(first, method) == hasattr(other, method), method
        if hasattr(first, method):
            expected, found = getattr(first, method)(x), getattr(other, method)(x)
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found, expected)
    if hasattr(first, "classes_"):
        assert other.classes_.dtype == first.classes_.dtype


def saved(**options: Any) -> bytes:
    x, y = activations(hidden=6)
    return dump_probe(make_pipeline_for("ridge", **options).fit(x, y), HEADER)


# -- there and back --------------------------------------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {},
    {"n_layers": 3, "normalize_layers": "per_layer"},
    {"n_layers": 3, "preprocessing": "pca:9"},
    {"preprocessing": "standard+pca:1+standard"},
]


@pytest.mark.few(2)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("name", named_probes("classification"))
# scikit-learn 1.5 divides zero by zero where stochastic gradient descent gives every class a probability of zero.
@pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning")
# Three classes in 90 rows of 300 units are apart by far, and the way of a descent is long.
@pytest.mark.filterwarnings("ignore:DescentClassifier has not reached the optimum")
def test_a_named_classifier_comes_back_bit_for_bit(name: str, classes: int, dtype: str) -> None:
    x, y = activations(classes, dtype=dtype)
    for options in OPTIONS:
        pipeline = make_pipeline_for(name, **options).fit(x, y)
        data = dump_probe(pipeline, HEADER)
        parsed, header = parse_probe(data, "probe.safetensors")
        assert header == HEADER
        for rows in (x, x[:1], x[::-1]):
            same_predictions(pipeline, parsed, rows)
        assert [(step, type(made)) for step, made in parsed.steps] == [(step, type(made)) for step, made in pipeline.steps]
        assert parsed.n_features_in_ == pipeline.n_features_in_
        assert converged(parsed) == converged(pipeline)
        assert dump_probe(parsed, header) == data
        # Fitted again, it learns the same.
        assert str(parsed[-1].get_params()) == str(pipeline[-1].get_params())


@pytest.mark.parametrize("name", named_probes("regression"))
def test_a_named_regression_comes_back_bit_for_bit(name: str) -> None:
    x, _ = activations()
    y = x[:, 0] * 3 - x[:, 7]
    for options in OPTIONS:
        pipeline = make_pipeline_for(name, task="regression", **options).fit(x, y)
        parsed, _ = parse_probe(dump_probe(pipeline, {}), "probe.safetensors")
        same_predictions(pipeline, parsed, x)
    unanchored = make_probe(name, task="regression", params={"fit_intercept": False}).fit(x, y)
    same_predictions(unanchored, parse_probe(dump_probe(unanchored, {}), "f")[0], x)


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "labels",
    [
        np.array(["no", "yes", "nô"]),
        np.array(["no", "yes", "a\nb"], dtype=object),
        np.array([-1, 4, 7], dtype=np.int8),
        np.array([0.0, 1.0, 2.0]),
        np.array([2**60, 2**61, 2**62]),
    ],
)
def test_classes_of_every_kind_come_back(labels: Any) -> None:
    for classes in (2, 3):
        x, y = activations(classes, hidden=9)
        for name in ("logistic_regression", "ridge", "mlp", "majority"):
            pipeline = make_pipeline_for(name).fit(x, labels[y])
            same_predictions(pipeline, parse_probe(dump_probe(pipeline, {}), "f")[0], x)
    x, y = activations(hidden=9)
    truth = make_pipeline_for("ridge").fit(x, y == 1)
    same_predictions(truth, parse_probe(dump_probe(truth, {}), "f")[0], x)


def test_more_classes_than_half_the_prompts_do_not_warn() -> None:
    x, y = activations(30, hidden=40)
    for name in ("ridge", "mlp"):
        pipeline = make_pipeline_for(name).fit(x, y)
        same_predictions(pipeline, parse_probe(dump_probe(pipeline, {}), "f")[0], x)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("logistic_regression", {"C": 0.01, "class_weight": {0: 1.0, 1: 3}, "fit_intercept": False}),
        ("logistic_regression", {"solver": "liblinear", "class_weight": "balanced"}),
        ("logistic_regression_cv", {"Cs": np.logspace(-2, 2, 3)}),
        ("sgd", {"loss": "modified_huber"}),
        ("mlp", {"hidden_layer_sizes": (5, 4), "activation": "tanh"}),
        ("ridge", {"fit_intercept": False}),
        ("svm", {"fit_intercept": False}),
        ("lda", {"solver": "svd", "shrinkage": None}),
        ("ensemble", {"C_values": [0.5, 2]}),
        ("majority", {"strategy": "most_frequent"}),
    ],
)
def test_parameters_come_back_with_the_probe(name: str, params: dict[str, Any]) -> None:
    x, y = activations(hidden=9)
    probe = make_probe(name, params=params).fit(x, y)
    parsed, _ = parse_probe(dump_probe(probe, {}), "f")
    same_predictions(probe, parsed, x)
    for key, value in params.items():
        found = parsed[-1].get_params()[key]
        assert np.array_equal(found, value) if not isinstance(value, dict) else found == value


def test_a_bare_estimator_and_inner_pipelines_come_back_as_one_pipeline() -> None:
    x, y = activations(hidden=9)
    bare = make_probe("lda").fit(x, y)
    parsed, _ = parse_probe(dump_probe(bare, {}), "f")
    assert [name for name, _ in parsed.steps] == ["probe"]
    same_predictions(bare, parsed, x)
    nested = make_pipeline(make_pipeline(StandardScaler()), "passthrough", LogisticRegression()).fit(x, y)
    parsed, _ = parse_probe(dump_probe(nested, {}), "f")
    assert [name for name, _ in parsed.steps] == ["standardscaler", "logisticregression"]
    same_predictions(nested, parsed, x)


def test_the_file_is_one_that_the_safetensors_package_reads(tmp_path: Any) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    x, y = activations(3, hidden=9)
    for name in named_probes("classification"):
        pipeline = make_pipeline_for(name).fit(x, y)
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(dump_probe(pipeline, HEADER))
        tensors = safetensors.load_file(path)
        np.testing.assert_array_equal(tensors["probe.classes_"], pipeline.classes_)
        if hasattr(pipeline[-1], "coef_"):
            np.testing.assert_array_equal(tensors["probe.coef_"], pipeline[-1].coef_)


def test_the_container_reads_what_the_safetensors_package_writes() -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    tensors = {"a": np.arange(6.0).reshape(2, 3), "b": np.array([True]), "c": np.zeros((0, 3), np.int32), "d": np.array(2, np.float32)}
    found, metadata = unpack_tensors(safetensors.save(tensors, {"k": "v"}), "f")
    assert metadata == {"k": "v"}
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(found[name], array)
    swapped = {"a": np.arange(3, dtype=">f4")}
    np.testing.assert_array_equal(unpack_tensors(pack_tensors(swapped, {}), "f")[0]["a"], [0, 1, 2])
    with pytest.raises(TypeError, match="complex128"):
        pack_tensors({"a": np.zeros(2, complex)}, {})


# -- what cannot be saved --------------------------------------------------------------------------------------------------


class LogisticRegressionOfTheirs(LogisticRegression):  # type: ignore[misc]
    pass


def test_an_estimator_of_the_callers_own_is_not_saved_and_never_pickled() -> None:
    x, y = activations(hidden=9)
    theirs: Any = type("LogisticRegression", (LogisticRegression,), {})
    for estimator in (GaussianNB(), LogisticRegressionOfTheirs(), theirs(), make_pipeline(MinMaxScaler(), LogisticRegression())):
        with pytest.raises(InvalidArgumentError, match=r"cannot be saved: only named probes and preprocessing can.*no pickle"):
            dump_probe(estimator.fit(x, y), {})


def test_what_is_not_fitted_or_not_plain_is_not_saved() -> None:
    x, y = activations(hidden=9)
    several = np.stack([y, 1 - y], axis=1)
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: make_pipeline_for("ridge"), "StandardScaler cannot be saved: it is not fitted"),
        (lambda: make_pipeline(StandardScaler(with_std=False), LogisticRegression()).fit(x, y), "with_std=False"),
        (lambda: make_probe("logistic_regression_cv", params={"cv": KFold(3)}).fit(x, y), "cv=KFold.* cannot be saved"),
        (lambda: make_probe("mlp").fit(x, several), "has an array|has no classes"),
        (lambda: make_probe("majority").fit(x, np.zeros(90)).set_params(strategy="uniform"), "strategy='uniform'"),
        (lambda: make_pipeline_for("ridge").fit(x, y).set_params(probe=None), "has no estimator there"),
    ]
    for make, message in cases:
        with pytest.raises(InvalidArgumentError, match=message):
            dump_probe(make(), {})


@pytest.mark.parametrize(
    ("header", "error", "message"),
    [
        ([], InvalidTypeError, "is a mapping, not list"),
        ({"a": float("nan")}, InvalidArgumentError, "the header cannot be saved: it holds float"),
        ({"a": {1: 2}}, InvalidArgumentError, "it holds dict"),
        ({"a": {1, 2}}, InvalidArgumentError, "it holds set"),
        ({"a": b"x"}, InvalidArgumentError, "it holds bytes"),
        ({"a": "x" * (3 << 20)}, InvalidArgumentError, "a saved probe holds 2097152 at most"),
    ],
)
def test_a_header_that_json_cannot_hold_is_refused(header: Any, error: type[Exception], message: str) -> None:
    x, y = activations(hidden=6)
    with pytest.raises(error, match=message):
        dump_probe(make_pipeline_for("ridge").fit(x, y), header)


# -- hostile input ---------------------------------------------------------------------------------------------------------


def with_header(change: Callable[[dict[str, Any]], Any], data: bytes) -> bytes:
    """The file with its table of tensors changed."""
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    change(entries)
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def with_document(change: Callable[[dict[str, Any]], Any], data: bytes, drop: str = "", arrays: dict[str, Any] | None = None) -> bytes:
    """The file with its document or arrays changed, its digest made to fit."""
    tensors, metadata = unpack_tensors(data, "f")
    document = json.loads(metadata["probe"])
    change(document)
    text = json.dumps(document)
    tensors = {name: array for name, array in tensors.items() if name != drop} | (arrays or {})
    return pack_tensors(tensors, {"probe": text, "sha256": _digest(text, tensors)})


def test_the_error_says_what_a_file_is_if_not_a_probe() -> None:
    for data, message in (
        (b"", "f is not a saved probe, which is a safetensors file"),
        (b"PK\x03\x04" + bytes(100), "is not a saved probe"),
        (pickle.dumps({"a": np.zeros(9)}), "pickles, such as lmprobe's own probes, are never loaded"),
        (b"\xff" * 8 + b"{" + b"x" * 50, "is not a saved probe"),
        ((3 << 20).to_bytes(8, "little") + b"{" + b"x" * 50, "is cut off: its header has 3145728 bytes, of which 51 are there"),
        (pack_tensors({"layer_0": np.zeros(3)}, {"version": "2"}), "is a safetensors file, but no saved probe"),
        (pack_tensors({}, {"probe": '{"format": "another"}'}), "no saved probe"),
        (pack_tensors({}, {"probe": "[" * 100_000}), "no JSON document"),
        (pack_tensors({}, {"probe": '{"format": NaN}'}), "NaN is no JSON number"),
        (pack_tensors({}, {"probe": '{"a": 1e999}'}), "1e999 is no JSON number"),
        (pack_tensors({}, {"probe": '{"a": 1, "a": 2}'}), "a name comes twice"),
        (pack_tensors({}, {"probe": '{"a": ' + "9" * 5000 + "}"}), "no JSON document"),
    ):
        with pytest.raises(NotAProbeError, match=message):
            parse_probe(data, "f")
    with pytest.raises(InvalidTypeError, match="is bytes, not str: read the file first"):
        parse_probe("probe.safetensors", "f")  # type: ignore[arg-type]


def test_a_file_cut_off_anywhere_is_refused() -> None:
    data = saved()
    for length in range(len(data)):
        with pytest.raises(NotAProbeError, match=r"cut off|not a saved probe"):
            parse_probe(data[:length], "f")
    with pytest.raises(NotAProbeError, match="where its header says"):
        parse_probe(data + b"\0", "f")


@pytest.mark.parametrize("version", [3, 10**30])
def test_the_error_for_a_newer_version_advises_a_newer_release(version: int) -> None:
    for data in (
        with_document(lambda d: d.update(version=version), saved()),
        pack_tensors({}, {"probe": f'{{"format": "{FORMAT}", "version": {version}}}'}),
    ):
        with pytest.raises(UnsupportedVersionError, match="reads up to 2: install a newer"):
            parse_probe(data, "f")


@pytest.mark.parametrize(
    "entry",
    [
        None,
        {},
        {"dtype": "F64", "shape": [6], "data_offsets": [0, 47]},
        {"dtype": "F64", "shape": [6], "data_offsets": [48, 0]},
        {"dtype": "F64", "shape": [-6], "data_offsets": [0, 48]},
        {"dtype": "F64", "shape": [2**62, 2**62], "data_offsets": [0, 48]},
        {"dtype": "F64", "shape": [0, 2**62], "data_offsets": [0, 0]},
        {"dtype": "F64", "shape": [6.0], "data_offsets": [0, 48]},
        {"dtype": "F64", "shape": [True] * 6, "data_offsets": [0, 48]},
        {"dtype": "F64", "shape": [1] * 40, "data_offsets": [0, 8]},
        {"dtype": "F64", "shape": [6], "data_offsets": [0, 48, 1]},
        {"dtype": "O", "shape": [6], "data_offsets": [0, 48]},
        {"dtype": ["F64"], "shape": [6], "data_offsets": [0, 48]},
    ],
)
def test_a_tensor_outside_the_file_is_refused(entry: Any) -> None:
    with pytest.raises(NotAProbeError):
        parse_probe(with_header(lambda entries: entries.update({"standard.mean_": entry}), saved()), "f")


def test_any_changed_value_is_found_by_the_digest() -> None:
    data = saved()
    with pytest.raises(NotAProbeError, match="its digest is not that of its values"):
        parse_probe(data[:-1] + bytes([data[-1] ^ 1]), "f")


def step(number: int, **changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda document: document["steps"][number].update(changes)


@pytest.mark.few(21)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (step(1, **{"class": "os.system"}), "a step is of class 'os.system', expected one of StandardScaler"),
        (step(1, **{"class": "Pipeline"}), "a step is of class 'Pipeline'"),
        (step(1, **{"class": ["x"]}), "a step is of class"),
        (step(1, **{"class": "LogisticRegressionCV"}), None),
        (step(1, **{"class": "Ridge"}), "does not fit|does not belong"),
        (step(1, **{"class": "MLPClassifier"}), "network of 0 layers"),
        (step(0, **{"class": "PCA"}), "lacks its array components_"),
        (step(0, **{"class": "LayerScaler"}), "does not fit|does not belong"),
        (step(1, name="a__b"), "a step is called 'a__b'"),
        (step(1, name="standard"), "no classes, or one twice"),
        (step(1, name="steps"), "a step is called 'steps'"),
        (step(1, n_features_in=7), "does not fit its others"),
        (step(1, n_features_in=True), "lacks its width"),
        (step(1, params={"alpha": -1}), "RidgeClassifier cannot have its parameters"),
        (step(1, params={"alpha": {"pairs": [[[], 1]]}}), "RidgeClassifier has alpha="),
        (step(1, params={"alpha": {"x": 1}}), "RidgeClassifier has alpha="),
        (step(0, params={"with_std": False}), "StandardScaler has with_std=False"),
        (step(1, values={"classes_": ["U", ["a", "b"]], "coef_": 3}), "values that do not belong"),
        (step(0, values={"n_samples_seen_": "x"}), "values that do not belong"),
        (step(1, values={"turned": ["classes_"]}), "does not say how its matrices lie"),
        (lambda d: d.update(steps=[]), "no header or no steps"),
        (lambda d: d.update(header=[]), "no header or no steps"),
        (lambda d: d.update(steps=[1]), "a step is described by int"),
        (lambda d: d.update(version=0), "its version is 0"),
        (lambda d: d["steps"].reverse(), "transformers with one estimator at the end"),
        (lambda d: d["steps"].pop(), "its tensors are not those of its steps"),
        (lambda d: d["steps"].append(d["steps"][1]), "its tensors are not those of its steps"),
    ],
)
def test_a_document_that_fits_nothing_is_refused_though_its_digest_fits(change: Any, message: str | None) -> None:
    data = with_document(change, saved())
    if message is None:
        parse_probe(data, "f")
        return
    with pytest.raises(NotAProbeError, match=message):
        parse_probe(data, "f")


def test_a_parameter_of_another_scikit_learn_is_named() -> None:
    with pytest.raises(UnsupportedVersionError, match=r"another version of scikit-learn: the installed .* knows no 'momentum'"):
        parse_probe(with_document(step(1, params={"momentum": 1}), saved()), "f")
    parse_probe(with_document(step(1, params={"n_jobs": 1}), saved()), "f")


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("standard.mean_", np.zeros(5), "array mean_ of shape .5,., which does not fit"),
        ("standard.mean_", np.zeros((6, 1)), "does not fit"),
        ("standard.scale_", np.full(6, np.nan), "is NaN or infinite"),
        ("standard.scale_", np.arange(6), "expected float32 or float64"),
        ("probe.coef_", np.zeros((2, 6)), "does not fit"),
        ("probe.classes_", np.arange(3), "does not fit"),
        ("probe.classes_", np.zeros(2), "no classes, or one twice"),
        ("probe.classes_", np.zeros((2, 1)), "no classes"),
        ("probe.classes_", np.array([0.25, 0.5]), "cannot have its classes"),
        ("probe.extra", np.zeros(2), "'extra' that does not belong"),
        ("other.coef_", np.zeros(2), "tensors are not those of its steps"),
        ("coef_", np.zeros(2), "tensors are not those of its steps"),
    ],
)
def test_an_array_that_does_not_fit_is_refused_though_its_digest_fits(name: str, array: Any, message: str) -> None:
    with pytest.raises(NotAProbeError, match=message):
        parse_probe(with_document(lambda _: None, saved(), arrays={name: array}), "f")


@pytest.mark.parametrize("name", ["standard.mean_", "standard.var_", "probe.coef_", "probe.intercept_", "probe.classes_"])
def test_a_missing_array_is_named(name: str) -> None:
    with pytest.raises(NotAProbeError, match=r"lacks its array|has no classes"):
        parse_probe(with_document(lambda _: None, saved(), drop=name), "f")


def test_steps_of_different_widths_are_refused() -> None:
    data = with_document(step(0, n_features_in=4), saved(), arrays={f"standard.{name}": np.ones(4) for name in ("mean_", "var_", "scale_")})
    with pytest.raises(NotAProbeError, match="StandardScaler gives 4 columns, RidgeClassifier takes others"):
        parse_probe(data, "f")


def test_a_promise_of_more_than_the_file_holds_takes_no_memory() -> None:
    data = with_header(lambda e: e.update({"standard.mean_": {"dtype": "F64", "shape": [2**40], "data_offsets": [0, 2**43]}}), saved())
    wide = with_document(step(0, n_features_in=2**30), saved(n_layers=2, normalize_layers="per_layer"))
    tracemalloc.start()
    for hostile in (data, wide):
        with pytest.raises(NotAProbeError):
            parse_probe(hostile, "f")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5 << 20


WHOLE = {name: dump_probe(make_pipeline_for(name).fit(*activations(hidden=6)), HEADER) for name in named_probes("classification")}
PLACES = st.integers(0, 10_000)


def expected_or_refused(data: bytes, name: str) -> None:
    """Either an error of ours, or a probe that predicts as the whole one does."""
    try:
        parsed, _ = parse_probe(data, "f")
    except (NotAProbeError, UnsupportedVersionError):
        return
    x, _ = activations(hidden=6)
    whole, _ = parse_probe(WHOLE[name], "f")
    same_predictions(whole, parsed, x)


@settings(max_examples=examples(80, 400), suppress_health_check=[HealthCheck.too_slow])
@given(name=st.sampled_from(sorted(WHOLE)), place=PLACES, until=PLACES, new=st.binary(max_size=12))
def test_bytes_that_are_changed_anywhere_are_refused_or_change_nothing(name: str, place: int, until: int, new: bytes) -> None:
    data = WHOLE[name]
    start = place % len(data)
    expected_or_refused(data[:start] + new + data[start + until % 16 :], name)


WEIRD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=5),
    st.lists(st.integers(0, 3), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


@settings(max_examples=examples(80, 400), suppress_health_check=[HealthCheck.too_slow])
@given(name=st.sampled_from(sorted(WHOLE)), place=PLACES, new=WEIRD)
def test_a_document_changed_anywhere_under_a_fitting_digest_gives_our_errors_only(name: str, place: int, new: Any) -> None:
    def change(document: dict[str, Any]) -> None:
        found = places(document["steps"]) + [(document, key) for key in document]
        container, key = found[place % len(found)]
        container[key] = new

    try:
        parsed, _ = parse_probe(with_document(change, WHOLE[name]), "f")
    except (NotAProbeError, UnsupportedVersionError):
        return
    x, _ = activations(hidden=6)
    assert len(parsed.predict(x)) == len(x)


@settings(max_examples=examples(80, 400), suppress_health_check=[HealthCheck.too_slow])
@given(data=st.binary(max_size=200), length=st.integers(0, 2**64 - 1))
def test_noise_is_no_probe(data: bytes, length: int) -> None:
    for hostile in (data, length.to_bytes(8, "little") + b"{" + data, len(data).to_bytes(8, "little") + data):
        with pytest.raises(NotAProbeError):
            parse_probe(hostile, "f")
