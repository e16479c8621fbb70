"""`ProbeEnsemble`: members answer together, resamples keep together what belongs together, and a file holds all of it without pickle."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import xarray as xr
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import lmprobe_zarr as lz
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, LabelError, NotAProbeError, NotFittedError, UnsupportedVersionError
from lmprobe_zarr.probes.container import pack_tensors, unpack_tensors
from lmprobe_zarr.probes.ensemble_files import _digest, parse_ensemble

N, HIDDEN = 40, 6
Y = np.arange(N) % 2


def given(n: int = N, seed: int = 0, prompts: Any = None) -> xr.DataArray:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, HIDDEN)).astype("float32")
    x[:, 0] += np.arange(n) % 2
    names = [f"text {i}" for i in range(n)] if prompts is None else prompts
    return xr.DataArray(x, dims=("prompt", "hidden"), coords={"prompt": [lz.prompt_hash(name) for name in names]}, name="resid_mean")


X, NEW = given(), given(12, 1)


def by_hand(x: Any, y: Any, rows: Any, new: Any, weights: Any = None, C: float = 1.0) -> Any:  # noqa: N803
    """Probabilities of a logistic regression on some rows, in scikit-learn alone."""
    scaler = StandardScaler().fit(x[rows])
    fitted = LogisticRegression(C=C, max_iter=1000, tol=1e-10).fit(scaler.transform(x[rows]), y[rows], weights)
    return fitted.predict_proba(scaler.transform(new))


def tight(**options: Any) -> lz.Probe:
    kwargs = {"tol": 1e-10, **options.pop("classifier_kwargs", {})}
    return lz.Probe(random_state=0, classifier_kwargs=kwargs, **options)


# ------------------------------------------------------------------------------------------------------------ resamples


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize("kind", ["array", "DataArray"])
def test_without_repeats_and_groups_members_learn_from_plain_draws_of_rows(seed: int, kind: str) -> None:
    x, new = (X, NEW) if kind == "DataArray" else (X.values, NEW.values)
    ensemble = lz.ProbeEnsemble.bootstrap(tight(), 4, random_state=seed).fit(x, Y)
    rng = np.random.default_rng(seed)
    wanted = np.stack([by_hand(X.values, Y, rng.choice(N, size=N, replace=True), NEW.values) for _ in range(4)])
    np.testing.assert_allclose([probe.predict_proba(new) for probe in ensemble.probes_], wanted, atol=1e-4)
    np.testing.assert_allclose(ensemble.predict_proba(new), wanted.mean(0), atol=1e-4)
    np.testing.assert_allclose(ensemble.prediction_std(new), wanted[:, :, 1].std(0), atol=1e-4)
    spread = ensemble.predict_spread(new, level=0.5)
    np.testing.assert_allclose(spread["low"], np.percentile(wanted, 25, axis=0), atol=1e-4)
    np.testing.assert_allclose(spread["high"], np.percentile(wanted, 75, axis=0), atol=1e-4)
    np.testing.assert_allclose(spread["mean"], wanted.mean(0), atol=1e-4)
    assert spread["std"].dims == ("prompt", "class")
    assert spread["class"].values.tolist() == [0, 1]
    assert spread.attrs == {"level": 0.5, "members": 4, "resampled": 1}
    assert ("prompt" in spread.coords) == (kind == "DataArray")


@pytest.mark.parametrize("by", ["groups", "repeated prompts"])
def test_what_belongs_together_is_drawn_together(by: str) -> None:
    unit = np.array([3, 3, 1, 1, 1, 0, 0, 2, 2, 4, 4, 4, 5, 5, 6, 6, 7, 7, 8, 9])
    y = np.isin(unit, [3, 0, 4, 6, 8]).astype(int)
    names = None if by == "groups" else [f"text {i}" for i in unit]
    x = given(20, prompts=names)
    options: dict[str, Any] = {"groups": unit} if by == "groups" else {}
    ensemble = lz.ProbeEnsemble.bootstrap(tight(), 5, random_state=2).fit(x, y, **options)
    order = list(dict.fromkeys(unit.tolist()))
    rng = np.random.default_rng(2)
    for probe in ensemble.probes_:
        while True:
            rows = np.concatenate([np.flatnonzero(unit == order[i]) for i in rng.choice(10, size=10, replace=True)])
            if len(set(y[rows].tolist())) == 2:
                break
        np.testing.assert_allclose(probe.predict_proba(NEW), by_hand(x.values, y, rows, NEW.values), atol=1e-4)


def test_weights_go_with_their_rows_and_groups_into_inner_folds() -> None:
    weights = np.linspace(0.1, 3, N)
    ensemble = lz.ProbeEnsemble.bootstrap(tight(), 3, random_state=1).fit(X, Y, sample_weight=weights)
    rng = np.random.default_rng(1)
    for probe in ensemble.probes_:
        rows = rng.choice(N, size=N, replace=True)
        np.testing.assert_allclose(probe.predict_proba(NEW), by_hand(X.values, Y, rows, NEW.values, weights[rows]), atol=1e-4)
    chosen = lz.ProbeEnsemble.bootstrap(lz.Probe(classifier="logistic_regression_cv"), 2, random_state=0).fit(X, Y)
    rng = np.random.default_rng(0)
    for probe in chosen.probes_:
        rows = rng.choice(N, size=N, replace=True)
        for train, test in probe.pipeline_[-1].cv:
            assert not set(rows[train].tolist()) & set(rows[test].tolist()), "a row that was drawn twice is on one side"


def test_a_resample_without_a_class_is_drawn_again_and_too_few_are_refused() -> None:
    y = np.zeros(N, int)
    y[0] = 1
    ensemble = lz.ProbeEnsemble.bootstrap(lz.Probe(), 4, random_state=0).fit(X, y)
    assert all(probe.classes_.tolist() == [0, 1] for probe in ensemble.probes_ if probe.classes_ is not None)
    with pytest.raises(LabelError, match="100 resamples of 40 prompts or groups lacked a class: give more"):
        lz.ProbeEnsemble.bootstrap(tight(), 2, random_state=0).fit(X, np.arange(N))


def test_the_same_seed_gives_the_same_members_and_another_seed_others() -> None:
    first, same, other = (lz.ProbeEnsemble.bootstrap(tight(), 3, random_state=seed).fit(X, Y).predict_proba(NEW) for seed in (4, 4, 5))
    np.testing.assert_array_equal(first, same)
    assert not np.allclose(first, other)


def test_the_spread_is_the_error_that_fresh_samples_would_have() -> None:
    """Probabilities of probes on many independent samples, against the spread of one sample's bootstrap."""
    rng = np.random.default_rng(0)

    def sample(n: int = 200) -> tuple[Any, Any]:
        y = rng.integers(0, 2, n)
        return rng.normal(size=(n, 2)) + 0.7 * y[:, None], y

    new = np.array([[0.3, 0.3], [1.0, 0.0], [-0.5, 0.8]])
    fresh = np.stack([by_hand(*sample(), slice(None), new)[:, 1] for _ in range(100)]).std(0)
    spreads = [lz.ProbeEnsemble.bootstrap(lz.Probe(), 30, random_state=seed).fit(*sample()).prediction_std(new) for seed in range(3)]
    np.testing.assert_allclose(np.mean(spreads, axis=0), fresh, rtol=0.35)


# --------------------------------------------------------------------------------------------------- answers together


def test_means_are_weighted_and_votes_count_by_weight() -> None:
    members = [tight(classifier_kwargs={"C": C}) for C in (0.001, 0.1, 10)]
    soft = lz.ProbeEnsemble(members, weights=[1, 2, 5]).fit(X, Y)
    wanted = np.stack([by_hand(X.values, Y, slice(None), NEW.values, C=C) for C in (0.001, 0.1, 10)])
    np.testing.assert_allclose(soft.predict_proba(NEW), np.average(wanted, axis=0, weights=[1, 2, 5]), atol=1e-4)
    np.testing.assert_array_equal(soft.predict(NEW), np.average(wanted, axis=0, weights=[1, 2, 5]).argmax(1))
    y = np.arange(12) % 2
    assert soft.score(NEW, y) == np.mean(soft.predict(NEW) == y)
    classes = wanted.argmax(2)
    assert (classes.min(0) != classes.max(0)).any(), "the members disagree"
    for weights in (None, [1, 1, 3], [3, 1, 1]):
        hard = lz.ProbeEnsemble(members, weights=weights, voting="hard").fit(X, Y)
        counts = np.stack([((classes == label) * np.array(weights or [1, 1, 1])[:, None]).sum(0) for label in (0, 1)])
        np.testing.assert_array_equal(hard.predict(NEW), counts.argmax(0))


def test_texts_are_labels_like_any_others_and_of_three_classes() -> None:
    labels = np.array(["no", "yes", "other"])[np.arange(N) % 3]
    ensemble = lz.ProbeEnsemble.bootstrap(lz.Probe(classifier="lda"), 3, random_state=0, voting="hard").fit(X, labels)
    assert ensemble.classes_ is not None
    assert ensemble.classes_.tolist() == ["no", "other", "yes"]
    assert set(ensemble.predict(NEW).tolist()) <= {"no", "yes", "other"}
    assert ensemble.prediction_std(NEW).shape == (12, 3)
    # A tie goes to the first class.
    tie = lz.ProbeEnsemble(ensemble.probes_[:2], voting="hard")
    predicted = np.stack([probe.predict(NEW) for probe in tie.probes_])
    assert tie.predict(NEW).tolist() == [min(each) for each in predicted.T.tolist()]


def test_a_regression_is_the_mean_of_values_with_a_spread() -> None:
    values = X.values[:, 1] * 2.0 + 1
    ensemble = lz.ProbeEnsemble.bootstrap(lz.Probe(task="regression"), 4, random_state=0).fit(X, values)
    each = np.stack([probe.predict(NEW) for probe in ensemble.probes_])
    np.testing.assert_allclose(ensemble.predict(NEW), each.mean(0))
    spread = ensemble.predict_spread(NEW)
    assert spread["std"].dims == ("prompt",)
    np.testing.assert_allclose(spread["std"], each.std(0))
    np.testing.assert_allclose(ensemble.prediction_std(NEW), each.std(0))
    assert ensemble.score(NEW, NEW.values[:, 1] * 2.0 + 1) > 0.9
    assert ensemble.classes_ is None
    with pytest.raises(InvalidArgumentError, match="a regression has no probabilities"):
        ensemble.predict_proba(NEW)


def test_members_choose_layers_of_their_own() -> None:
    layers = xr.concat([X, given(seed=7).assign_coords(prompt=X.prompt)], xr.Variable("layer", [2, 4]))
    base = lz.Probe(layers="auto", auto_candidates=[2, 4], auto_alpha=0.25)
    ensemble = lz.ProbeEnsemble.bootstrap(base, 6, random_state=0).fit(layers, Y)
    chosen = [probe.selected_layers_ for probe in ensemble.probes_]
    assert len({str(each) for each in chosen}) > 1, "another resample, another choice"
    wanted = np.mean([probe.predict_proba(layers.sel(layer=each)) for probe, each in zip(ensemble.probes_, chosen, strict=True)], axis=0)
    np.testing.assert_allclose(ensemble.predict_proba(layers), wanted, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------------ files


def test_a_saved_ensemble_answers_the_same_bits(tmp_path: Path) -> None:
    ensemble = lz.ProbeEnsemble.bootstrap(lz.Probe(mass_mean_augment=True), 3, random_state=4, weights=[1, 2, 3]).fit(X, Y)
    place = tmp_path / "ensemble.safetensors"
    ensemble.save(place)
    loaded = lz.ProbeEnsemble.load(place)
    np.testing.assert_array_equal(loaded.predict_proba(NEW), ensemble.predict_proba(NEW))
    np.testing.assert_array_equal(loaded.prediction_std(NEW), ensemble.prediction_std(NEW))
    assert (loaded.voting, loaded.weights_.tolist()) == (ensemble.voting, ensemble.weights_.tolist())
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == place.read_bytes()
    # Fitted again, it draws the same resamples.
    np.testing.assert_array_equal(loaded.fit(X, Y).predict_proba(NEW), ensemble.predict_proba(NEW))
    assert "bootstrap of Probe(mass_mean_augment=True)" in repr(loaded)
    assert "3 members" in repr(loaded)


def saved(tmp_path: Path) -> bytes:
    lz.ProbeEnsemble([lz.Probe(classifier="ridge")], voting="hard").fit(X, Y).save(tmp_path / "e")
    return (tmp_path / "e").read_bytes()


def test_what_is_no_saved_ensemble_is_refused(tmp_path: Path) -> None:
    data = saved(tmp_path)
    tensors, metadata = unpack_tensors(data, "f")
    text = metadata["ensemble"]

    def changed(text: str, tensors: Any = tensors, digest: bool = True) -> bytes:
        members = [array.tobytes() for array in tensors.values()]
        return pack_tensors(tensors, {"ensemble": text, "sha256": _digest(text, members) if digest else metadata["sha256"]})

    assert parse_ensemble(changed(text), "f")[1]["voting"] == "hard"
    lz.Probe().fit(X, Y).save(tmp_path / "probe")
    newer = text.replace('"version": 1', '"version": 2')
    cases: list[tuple[bytes, type[Exception], str]] = [
        (pickle.dumps({"probes_": []}), NotAProbeError, "pickles, such as lmprobe's own probes, are never loaded"),
        ((tmp_path / "probe").read_bytes(), NotAProbeError, "load a single probe with Probe.load"),
        (data[:-9], NotAProbeError, "cut off"),
        (data[:-1] + bytes([data[-1] ^ 1]), NotAProbeError, "its digest is not that"),
        (changed(newer), UnsupportedVersionError, "reads up to 1: install a newer"),
        (changed(text.replace('"version": 1', '"version": 0')), NotAProbeError, "its version is 0"),
        (changed(text.replace('"members": 1', '"members": 2')), NotAProbeError, "members or settings are missing"),
        (changed(text, {"member_000000": np.zeros(3)}), NotAProbeError, "members or settings are missing"),
        (changed(text.replace('"hard"', '"loud"')), NotAProbeError, "voting='loud' is unknown"),
        (changed(text.replace("[1.0]", "[1.0, 2]")), NotAProbeError, "weights have shape"),
        (changed(text, {"member_000000": np.zeros(30, np.uint8)}), NotAProbeError, "member 0 is not a saved probe"),
    ]
    for content, error, words in cases:
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(error, match=words):
            lz.ProbeEnsemble.load(tmp_path / "bad")
    with pytest.raises(NotAProbeError, match="no saved probe"):
        lz.Probe.load(tmp_path / "e")
    with pytest.raises(FileNotFoundError):
        lz.ProbeEnsemble.load(tmp_path / "nowhere")


# -------------------------------------------------------------------------------------------------------------- bad input


def bad(call: Callable[[], Any], error: type[Exception], words: str) -> Any:
    return pytest.param(call, error, words, id=words)


def pair(**options: Any) -> lz.ProbeEnsemble:
    return lz.ProbeEnsemble([lz.Probe(), lz.Probe()], **options)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        bad(lambda: lz.ProbeEnsemble([]), InvalidArgumentError, "at least one"),
        bad(lambda: lz.ProbeEnsemble(cast("Any", lz.Probe())), InvalidTypeError, "a list of lmprobe_zarr.Probe"),
        bad(lambda: lz.ProbeEnsemble(cast("Any", ["ridge"])), InvalidTypeError, "a list of lmprobe_zarr.Probe"),
        bad(lambda: pair(voting="loud"), InvalidArgumentError, "voting='loud' is unknown: use 'soft' or 'hard'"),
        bad(lambda: pair(weights=[1]), InvalidArgumentError, "for 2 members: give one for each"),
        bad(lambda: pair(weights=[0, 0]), InvalidArgumentError, "not all of them 0"),
        bad(lambda: pair(weights=[-1, 2]), InvalidArgumentError, "at least 0"),
        bad(lambda: pair(weights=["a", "b"]), InvalidTypeError, "are no numbers"),
        bad(lambda: lz.ProbeEnsemble([lz.Probe(), lz.Probe(task="regression")]), InvalidArgumentError, "make an ensemble of each"),
        bad(lambda: lz.ProbeEnsemble([lz.Probe(task="regression")], voting="hard"), InvalidArgumentError, "a regression has none"),
        bad(lambda: lz.ProbeEnsemble([lz.Probe(layers="sweep")]), InvalidArgumentError, "member 0 is a sweep"),
        bad(lambda: lz.ProbeEnsemble([lz.Probe(inference_pooling="all")]), InvalidArgumentError, "pool the scores"),
        bad(lambda: lz.ProbeEnsemble.bootstrap(lz.Probe(), 0), InvalidArgumentError, "n_resamples=0 leaves no member"),
        bad(lambda: lz.ProbeEnsemble.bootstrap(lz.Probe(), cast("Any", 2.5)), InvalidTypeError, "n_resamples=2.5"),
        bad(lambda: lz.ProbeEnsemble.bootstrap(cast("Any", "ridge")), InvalidTypeError, "base_probe is a lmprobe_zarr.Probe"),
        bad(lambda: lz.ProbeEnsemble.bootstrap(lz.Probe(), 2, -1), InvalidArgumentError, "random_state=-1 is negative"),
        bad(lambda: lz.ProbeEnsemble.bootstrap(lz.Probe(), 2, cast("Any", "x")), InvalidTypeError, "random_state='x'"),
        bad(lambda: pair().predict(NEW), NotFittedError, "member 0 of this ensemble has learned nothing yet: call fit first"),
        bad(lambda: pair().fit(X, Y[:-1]), LabelError, "labels"),
        bad(lambda: pair().fit(X, np.zeros(N)), LabelError, "at least two classes"),
        bad(lambda: pair().fit(X, Y, groups=["a"]), LabelError, "groups"),
        bad(lambda: pair().fit(X, Y, sample_weight=[1]), InvalidArgumentError, "sample_weight"),
        bad(
            lambda: lz.ProbeEnsemble([lz.Probe(classifier="attention")]).fit(X, Y),
            InvalidArgumentError,
            "give prompts, or fit it alone",
        ),
        bad(lambda: lz.ProbeEnsemble([lz.Probe(classifier="ridge")]).fit(X, Y).predict(NEW), InvalidArgumentError, "use voting='hard'"),
        bad(lambda: pair().fit(X, Y).predict_spread(NEW, level=1), InvalidArgumentError, "between 0 and 1"),
        bad(lambda: pair().fit(X, Y).predict(["a text"]), InvalidArgumentError, "unknown layers: predict from activations too"),
        bad(
            lambda: lz.ProbeEnsemble([lz.Probe().fit(X, Y), lz.Probe().fit(X, Y + 3)]).predict(NEW),
            InvalidArgumentError,
            "fit all on the same labels",
        ),
    ],
)
def test_bad_arguments_say_what_to_do(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        call()
    assert len(str(caught.value).splitlines()) <= 2


# ----------------------------------------------------------------------------------------------------------- with a model


POSITIVE = [f"I love the dog number {i}, what a walk it was" for i in range(8)]
NEGATIVE = [f"The {i} rainy foxes are sad" for i in range(8)]
TEST = ["I love a walk", "sad foxes", "the dog", "rainy"]


@pytest.mark.model
def test_the_model_runs_once_for_all_members_and_each_is_as_if_alone(request: pytest.FixtureRequest) -> None:
    pytest.importorskip("torch")
    llama, runs = request.getfixturevalue("tiny_models")("llama"), request.getfixturevalue("runs")
    configs: list[dict[str, Any]] = [
        {"layers": "last"},
        {"layers": [0, 2], "pooling": "mean"},
        {"layers": "fast_auto", "fast_auto_top_k": 1},
        {"layers": 1, "inference_pooling": "max"},
        {"layers": 1, "train_pooling": "all", "inference_pooling": "score:mean"},
    ]
    ensemble = lz.ProbeEnsemble.from_configs(str(llama), configs, random_state=0, device="cpu").fit(POSITIVE, NEGATIVE)
    assert sum(runs) == 16, "one pass over the prompts"
    found = ensemble.predict_proba(TEST)
    assert sum(runs) == 20
    alone = [lz.Probe(str(llama), random_state=0, device="cpu", **config).fit(POSITIVE, NEGATIVE).predict_proba(TEST) for config in configs]
    assert sum(runs) == 20
    np.testing.assert_allclose(found, np.mean(alone, axis=0), atol=1e-12)
    spread = ensemble.predict_spread(TEST)
    assert spread.prompt.values.tolist() == [lz.prompt_hash(text) for text in TEST]
    np.testing.assert_allclose(spread["std"], np.std(alone, axis=0), atol=1e-12)


@pytest.mark.model
def test_repeated_prompts_are_drawn_together_with_all_their_tokens(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    llama, runs = request.getfixturevalue("tiny_models")("llama"), request.getfixturevalue("runs")
    prompts = [*POSITIVE, *NEGATIVE, POSITIVE[0], NEGATIVE[3]]
    labels = [1] * 8 + [0] * 8 + [1, 0]
    base = lz.Probe(str(llama), layers=2, train_pooling="all", inference_pooling="score:mean", random_state=0, device="cpu")
    ensemble = lz.ProbeEnsemble.bootstrap(base, 3, random_state=0).fit(prompts, labels)
    assert sum(runs) == 16
    rng = np.random.default_rng(0)
    units = [[i] for i in range(16)]
    units[0].append(16)
    units[11].append(17)
    for probe in ensemble.probes_:
        rows = [row for unit in rng.choice(16, size=16, replace=True) for row in units[unit]]
        alone = lz.Probe(**base.get_params()).fit([prompts[row] for row in rows], [labels[row] for row in rows])
        np.testing.assert_array_equal(probe.predict_proba(TEST), alone.predict_proba(TEST))
    ensemble.save(tmp_path / "ensemble")
    np.testing.assert_array_equal(lz.ProbeEnsemble.load(tmp_path / "ensemble").predict_proba(TEST), ensemble.predict_proba(TEST))
    assert sum(runs) == 20
