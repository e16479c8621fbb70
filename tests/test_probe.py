"""`Probe`: a cache in front of a model, and a classifier behind it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from sklearn.exceptions import FitFailedWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

import lmprobe_zarr as lz
from lmprobe_zarr import config
from lmprobe_zarr.batch.layers import parse_sweep
from lmprobe_zarr.batch.stages import Stage, parse_stage, reduce_scores
from lmprobe_zarr.errors import (
    CacheWarning,
    InvalidArgumentError,
    InvalidTypeError,
    LabelError,
    LayerOutOfRangeError,
    MissingPromptsError,
    NotAProbeError,
    NotFittedError,
    ReadOnlyError,
)
from lmprobe_zarr.extraction import models as extraction
from lmprobe_zarr.sweeps.origin import Origin

pytestmark = pytest.mark.model
torch = pytest.importorskip("torch")

from tiny_models import SharedModels, save_tiny, tiny_model, tiny_tokenizer  # noqa: E402 — needs torch
from warmed import Warmed  # noqa: E402

POSITIVE = [f"I love the dog number {i}, what a walk it was" for i in range(8)]
NEGATIVE = [f"The {i} rainy foxes are sad" for i in range(8)]
TEST = ["I love a walk", "sad foxes", "the dog", "rainy"]


@pytest.fixture(scope="session")
def llama(tiny_models: SharedModels) -> Path:
    return tiny_models("llama")


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every loading of a model."""
    seen: list[Any] = []
    real = extraction.load_model

    def load(model: Any, **options: Any) -> Any:
        seen.append(model)
        return real(model, **options)

    monkeypatch.setattr(extraction, "load_model", load)
    return seen


# ------------------------------------------------------------------------------------------------------------- always on


def test_repeated_prompts_never_run_the_model_again(llama: Path, runs: list[int], loads: list[Any]) -> None:
    probe = lz.Probe(str(llama), layers=2).fit(POSITIVE, NEGATIVE)
    assert (runs, len(loads)) == ([16], 1)
    probe.predict([*POSITIVE[:3], TEST[0]])
    assert runs == [16, 1], "only what is new"
    assert len(loads) == 1, "the model is still there"
    again = lz.Probe(str(llama), layers=2).fit(POSITIVE, NEGATIVE)
    assert again.predict([*POSITIVE, *NEGATIVE]).tolist() == [1] * 8 + [0] * 8
    assert runs == [16, 1]
    assert len(loads) == 1, "with every prompt cached the model is not even loaded"


def test_with_everything_cached_torch_is_not_needed(llama: Path) -> None:
    fitted = lz.Probe(str(llama), layers=[1, 2]).fit(POSITIVE, NEGATIVE)
    code = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'transformers'): raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "import json, lmprobe_zarr as lz\n"
        "model, positive, negative = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])\n"
        "probe = lz.Probe(model, layers=[1, 2]).fit(positive, negative)\n"
        "print(json.dumps(probe.predict_proba(positive).tolist()))\n"
    )
    arguments = [sys.executable, "-c", code, str(llama), json.dumps(POSITIVE), json.dumps(NEGATIVE)]
    done = subprocess.run(arguments, check=True, capture_output=True, text=True, timeout=120)
    assert json.loads(done.stdout) == fitted.predict_proba(POSITIVE).tolist()


def test_layers_on_the_way_are_kept_and_serve_later_probes(llama: Path, runs: list[int]) -> None:
    lz.Probe(str(llama), layers=2).fit(POSITIVE, NEGATIVE)
    info = lz.discover_cached("llama", POSITIVE[0])
    assert info is not None
    assert info.pooled == {"last_token": [0, 1, 2]}
    assert info.raw_layers == [], "tokens only where every token is classified"
    lz.Probe(str(llama), layers=[0, 1]).fit(POSITIVE, NEGATIVE)
    assert runs == [16]
    lz.Probe(str(llama), layers=3).fit(POSITIVE, NEGATIVE)
    assert runs == [16, 16], "a deeper layer is run"


def test_warmup_extracts_once_and_reports_what_was_stored(llama: Path, runs: list[int]) -> None:
    probe = lz.Probe(model=str(llama), layers=1)
    stats = probe.warmup(TEST, batch_size=16)
    assert (stats.hit_rate, stats.extracted, stats.prompts) == (0, 4, 4)
    assert stats.seconds > 0
    stats = probe.warmup([*TEST, "one more"], batch_size=1)
    assert stats.hit_rate == 0.8
    probe.fit(POSITIVE, NEGATIVE)
    assert probe.predict(TEST).shape == (4,)
    assert runs == [4, 1, 16]


def test_batch_size_is_the_most_that_a_pass_takes(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmprobe_zarr.extraction.models import passes
    from lmprobe_zarr.extraction.models.forward import run_forward_pass

    sizes: list[int] = []
    real = run_forward_pass

    def forward(loaded: Any, calling: Any, request: Any, ids: Any, **rest: Any) -> Any:
        sizes.append(len(ids))
        return real(loaded, calling, request, ids, **rest)

    monkeypatch.setattr(passes, "run_forward_pass", forward)
    lz.Probe(str(llama), layers=0, batch_size=3).warmup(POSITIVE)
    assert sizes == [3, 3, 2]


def test_invalidating_runs_everything_again(llama: Path, runs: list[int]) -> None:
    probe = lz.Probe(str(llama), layers=1).fit(POSITIVE, NEGATIVE)
    probe.fit(POSITIVE, NEGATIVE, invalidate_cache=True)
    assert runs == [16, 16]


def test_another_dtype_revision_or_template_is_never_a_hit(llama: Path, tmp_path: Path, runs: list[int]) -> None:
    lz.Probe(str(llama), layers=0, dtype="float32").warmup(TEST)
    lz.Probe(str(llama), layers=0, dtype="bfloat16").warmup(TEST)
    assert runs == [4, 4]
    lz.Probe(str(llama), layers=0, dtype="bfloat16").warmup(TEST)
    changed = save_tiny("llama", tmp_path / "llama", initializer_range=0.3)
    weights = changed / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    lz.Probe(str(changed), layers=0, dtype="float32").warmup(TEST)
    assert runs == [4, 4, 4], "other weights under the same name are another key"


def test_a_dtype_that_is_not_named_takes_what_is_stored(llama: Path, runs: list[int]) -> None:
    lz.extract(str(llama), POSITIVE + NEGATIVE, dtype="bfloat16", progress=False)
    probe = lz.Probe(str(llama), layers=1).fit(POSITIVE, NEGATIVE)
    assert runs == [16]
    probe.predict(TEST)
    assert lz.open_store().groups()
    assert len(lz.open_store().groups()) == 1, "and what is missing is computed alike"


def test_with_cache_only_the_model_is_never_run(llama: Path, runs: list[int]) -> None:
    probe = lz.Probe(str(llama), layers=1).fit(POSITIVE, NEGATIVE)
    strict = lz.Probe(str(llama), layers=1, cache_only=True).fit(POSITIVE, NEGATIVE)
    assert runs == [16]
    with pytest.raises(MissingPromptsError) as error:
        strict.predict([POSITIVE[0], *TEST])
    assert "4 of 5 prompts" in str(error.value)
    assert "'I love a walk'" in str(error.value)
    assert len(str(error.value).splitlines()) <= 2
    assert runs == [16]
    assert probe.predict(TEST).shape == (4,)


def test_a_pooling_that_was_not_stored_comes_from_stored_tokens(llama: Path, runs: list[int]) -> None:
    lz.extract(str(llama), POSITIVE + NEGATIVE, keep_tokens=True, pooling=[], dtype="float32", progress=False)
    values = {}
    for pooling in ("last_token", "mean", "first_token"):
        probe = lz.Probe(str(llama), layers=2, pooling=pooling).fit(POSITIVE, NEGATIVE)
        values[pooling] = probe.predict_proba(POSITIVE)
    assert runs == [16]
    fresh = lz.open_store()
    lz.clear_cache()
    for pooling, known in values.items():
        probe = lz.Probe(str(llama), layers=2, pooling=pooling).fit(POSITIVE, NEGATIVE)
        np.testing.assert_allclose(probe.predict_proba(POSITIVE), known, atol=1e-5)
    assert fresh.storage.is_local


# ----------------------------------------------------------------------------------------------------------------- layers


def test_every_way_of_naming_layers(llama: Path) -> None:
    for layers, expected in [
        (1, (1,)),
        (-1, (3,)),
        ([2, 0], (0, 2)),
        ("all", (0, 1, 2, 3)),
        ("middle", (1, 2)),
        ("last", (3,)),
        (slice(1, 3), (1, 2)),
    ]:
        probe = lz.Probe(str(llama), layers=layers).fit(POSITIVE, NEGATIVE)  # type: ignore[arg-type]
        assert probe.layers_ == expected
        assert probe.pipeline_.n_features_in_ == 32 * len(expected)
    with pytest.raises(LayerOutOfRangeError):
        lz.Probe(str(llama), layers=4).fit(POSITIVE, NEGATIVE)
    with pytest.raises(InvalidTypeError, match="names no layers"):
        lz.Probe(str(llama), layers="deepest").fit(POSITIVE, NEGATIVE)


@pytest.mark.parametrize(
    ("layers", "parsed"),
    [("sweep", "all"), ("sweep:10", slice(None, None, 10)), ("sweep:55-65", slice(55, 66)), ("all", None), (3, None), ([1], None)],
)
def test_layers_that_mean_a_sweep_are_recognised(layers: Any, parsed: Any) -> None:
    assert parse_sweep(layers) == parsed


@pytest.mark.parametrize("layers", ["sweep:", "sweep:0", "sweep:x", "sweep:5-3", "sweep:1-2-3", "sweeps"])
def test_sweeps_that_are_none_are_refused(layers: str) -> None:
    with pytest.raises(InvalidTypeError, match="sweep:10"):
        parse_sweep(layers)


def test_a_sweep_fits_one_probe_per_layer_in_one_pass(llama: Path, runs: list[int]) -> None:
    probe = lz.Probe(str(llama), layers="sweep").fit(POSITIVE, NEGATIVE)
    assert runs == [16]
    assert probe.sweep_result_ is not None
    assert probe.sweep_result_.layers == [0, 1, 2, 3]
    y = [1, 0, 1, 0]
    scores = probe.sweep_result_.score(TEST, y)
    assert runs == [16, 4], "all layers of new prompts in one pass"
    for layer, score in scores.items():
        alone = lz.Probe(str(llama), layers=layer).fit(POSITIVE, NEGATIVE)
        assert alone.score(TEST, y) == score
    results = probe.evaluate(TEST, y)
    assert results["best_layer"] == max(scores, key=lambda layer: scores[layer])
    assert probe.layers_ == (results["best_layer"],)
    assert set(results["layer_results"]) == {0, 1, 2, 3}
    some = lz.Probe(str(llama), layers="sweep:2").fit(POSITIVE, NEGATIVE)
    assert some.sweep_result_ is not None
    assert some.sweep_result_.layers == [0, 2]
    inner = lz.Probe(str(llama), layers="sweep:1-9").fit(POSITIVE, NEGATIVE)
    assert inner.sweep_result_ is not None
    assert inner.sweep_result_.layers == [1, 2, 3], "as far as the model has them"
    with pytest.raises(InvalidArgumentError, match="sweep_result_"):
        probe.fit(POSITIVE, NEGATIVE).save("never.probe")


def test_a_sweep_is_evaluated_by_layers_that_were_chosen_on_other_prompts(llama: Path, runs: list[int]) -> None:
    probe = lz.Probe(str(llama), layers="sweep", classifier="mass_mean").fit(POSITIVE, NEGATIVE)
    assert probe.sweep_result_ is not None
    prompts = [f"{word} number {i}" for i in range(12) for word in ("love", "rainy", "the dog")]
    y = np.random.default_rng(0).permutation(np.arange(36) % 2)
    topic = np.repeat(np.arange(12), 3)
    shown = probe.evaluate(prompts, y)
    assert "these prompts, on which the best of 4 layers scores too high: give choose='layer'" in shown["chosen_by"]
    predicted = probe.sweep_result_.predict(prompts)
    for groups in (None, topic):
        found = probe.evaluate(prompts, y, choose="layer", groups=groups)
        splitter = StratifiedKFold if groups is None else StratifiedGroupKFold
        expected, layers = [], []
        for others, rows in splitter(5, shuffle=True, random_state=0).split(y, y, groups):
            right = {layer: (predicted[layer] == y).astype(float) for layer in range(4)}
            layers.append(max(right, key=lambda layer: right[layer][others].mean()))
            expected.append(right[layers[-1]][rows].mean())
        assert found["chosen_layers"] == layers
        assert found["accuracy"] == pytest.approx(np.mean(expected))
        assert found["n_eval"] == 36
        assert found["chosen_by"] == "the other prompts, in each of 5 folds"
        assert (found["best_layer"], found["best_accuracy"]) == (shown["best_layer"], shown["best_accuracy"])
    assert runs == [16, 36], "all layers in one pass"
    for given, options in (("sweep", {"choose": "probe"}), ("sweep", {"groups": topic}), (1, {"choose": "layer"})):
        fitted = lz.Probe(str(llama), layers=given, classifier="mass_mean").fit(POSITIVE, NEGATIVE)
        with pytest.raises(InvalidArgumentError, match="'layer' can be chosen, of a probe that was fitted with layers='sweep'"):
            fitted.evaluate(prompts, y, **options)
    with pytest.raises(LabelError, match="groups hold 3 values for 36 prompts"):
        probe.evaluate(prompts, y, choose="layer", groups=[1, 2, 3])


class Fragile(LogisticRegression):  # type: ignore[misc]
    """Cannot be fitted where the first number of the first row is one of `broken`."""

    def __init__(self, broken: tuple[float, ...] = ()) -> None:
        super().__init__()
        self.broken = broken

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Fragile:  # noqa: N803
        if any(abs(X[0, 0] - value) < 1e-4 for value in self.broken):
            raise RuntimeError("the solver gave up")
        super().fit(X, y, sample_weight)
        return self


@pytest.fixture(scope="module")
def by_transformers(llama: Path) -> dict[int, Any]:
    """The residual stream at the last token of every prompt behind each of the four blocks, by transformers alone, one prompt at a time."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(llama).eval(), AutoTokenizer.from_pretrained(llama)
    found: dict[int, list[Any]] = {layer: [] for layer in range(4)}

    def keep(layer: int, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        found[layer].append(states.reshape(-1, states.shape[-1])[-1].numpy())

    for layer in range(4):
        model.layers[layer].register_forward_hook(lambda _m, _a, output, layer=layer: keep(layer, output))
    with torch.inference_mode():
        for text in (*POSITIVE, *NEGATIVE, *TEST):
            model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False))
    return {layer: np.stack(rows) for layer, rows in found.items()}


@pytest.mark.few(1)
@pytest.mark.parametrize("broken", [(2,), (0, 3)])
def test_layers_of_a_sweep_that_cannot_be_fitted_are_nan_and_the_others_are_kept(
    llama: Path, by_transformers: dict[int, Any], broken: tuple[int, ...]
) -> None:
    y = [1, 0, 1, 0]
    fragile = Fragile(tuple(float(by_transformers[layer][0, 0]) for layer in broken))
    probe = lz.Probe(str(llama), layers="sweep", classifier=fragile)
    with pytest.warns(FitFailedWarning, match=rf"{len(broken)} of 4 layers could not be fitted, .*layer {broken[0]}: .*the solver gave up"):
        probe.fit(POSITIVE, NEGATIVE)
    sweep = probe.sweep_result_
    assert sweep is not None
    assert (sweep.layers, len(sweep), sorted(sweep.failed)) == ([0, 1, 2, 3], 4, list(broken))
    results, scores = probe.evaluate(TEST, y), sweep.score(TEST, y)
    predicted, probabilities = sweep.predict(TEST), sweep.predict_proba(TEST)
    expected = {}
    for layer, rows in by_transformers.items():
        if layer in broken:
            assert np.isnan([scores[layer], *predicted[layer], *probabilities[layer].ravel()]).all()
            assert (predicted[layer].shape, probabilities[layer].shape) == ((4,), (4, 2))
            assert np.isnan([value for name, value in results["layer_results"][layer].items() if name != "n_eval"]).all()
            assert "RuntimeError: the solver gave up" in results["failed_layers"][layer]
            with pytest.raises(NotFittedError, match=f"layer {layer} could not be fitted .*the solver gave up"):
                sweep[layer]
            continue
        plain = LogisticRegression().fit(rows[:16], [1] * 8 + [0] * 8)
        expected[layer] = plain.score(rows[16:], y)
        assert (scores[layer], results["layer_results"][layer]["accuracy"]) == (expected[layer], expected[layer])
        np.testing.assert_allclose(probabilities[layer], plain.predict_proba(rows[16:]), atol=1e-4)
    best = max(expected, key=lambda layer: expected[layer])
    assert (results["best_layer"], sweep.best_layer(TEST, y), probe.layers_) == (best, best, (best,))
    chosen = probe.evaluate([*POSITIVE, *NEGATIVE], [1] * 8 + [0] * 8, choose="layer")
    assert not set(chosen["chosen_layers"]) & set(broken)
    assert "failed on layers" in repr(sweep)
    assert "the solver gave up" in sweep._repr_html_()


def test_no_other_layer_takes_the_place_of_a_first_layer_that_failed(llama: Path, by_transformers: dict[int, Any]) -> None:
    probe = lz.Probe(str(llama), layers="sweep", classifier=Fragile((float(by_transformers[0][0, 0]),)))
    with pytest.warns(FitFailedWarning):
        probe.fit(POSITIVE, NEGATIVE)
    for call in (probe.predict, probe.predict_proba, lambda prompts: probe.score(prompts, [1, 0, 1, 0])):
        with pytest.raises(NotFittedError, match=r"layer 0: .*the solver gave up.*call evaluate, or take another layer, .*\[1\]"):
            call(TEST)
    probe.evaluate(TEST, [1, 0, 1, 0])
    assert len(probe.predict(TEST)) == 4


def test_where_a_single_probe_or_every_layer_cannot_be_fitted_it_is_an_error(llama: Path, by_transformers: dict[int, Any]) -> None:
    every = Fragile(tuple(float(rows[0, 0]) for rows in by_transformers.values()))
    for layers in (1, "sweep", "sweep:2-3"):
        with pytest.raises(InvalidArgumentError, match="cannot be fitted on these 16 rows: RuntimeError: the solver gave up"):
            lz.Probe(str(llama), layers=layers, classifier=every).fit(POSITIVE, NEGATIVE)


def test_several_layers_are_brought_to_one_scale(llama: Path) -> None:
    x = np.random.default_rng(0).standard_normal((40, 6)).astype("f4") * np.array([1, 1, 1, 1e4, 1e4, 1e4], "f4")
    y = (x[:, 0] > 0).astype(int)
    scaled = lz.Probe(classifier="mass_mean").fit_from_activations(x, y, n_layers=2)
    plain = lz.Probe(classifier="mass_mean", normalize_layers=False).fit_from_activations(x, y, n_layers=2)
    assert scaled.score_from_activations(x, y) > plain.score_from_activations(x, y), "the large layer would drown the small one"
    with pytest.raises(InvalidArgumentError, match="normalize_layers"):
        lz.Probe(normalize_layers="by_hand")


# ---------------------------------------------------------------------------------------------------------------- pooling


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("last_token", Stage("activation", "last_token")),
        ("first_token", Stage("activation", "first_token")),
        ("mean", Stage("activation", "mean")),
        ("max", Stage("score", "max")),
        ("min", Stage("score", "min")),
        ("activation:max", Stage("activation", "max")),
        ("score:mean", Stage("score", "mean")),
        ("score:last_token", Stage("score", "last_token")),
        ("all", Stage("nothing")),
    ],
)
def test_pooling_names_mean_what_they_mean_in_lmprobe(name: str, stage: Stage) -> None:
    assert parse_stage(name) == stage


@pytest.mark.parametrize("name", ["median", "scores:max", ":max", "score:all", "score:", "", None])
def test_unknown_poolings_are_refused(name: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="unknown pooling"):
        parse_stage(name)
    with pytest.raises(InvalidArgumentError, match="pooling"):
        lz.Probe("m", inference_pooling=name or "nothing")


@pytest.mark.parametrize("name", ["max", "min", "activation:max", "score:mean"])
def test_poolings_of_scores_are_refused_for_training_with_advice(name: str) -> None:
    with pytest.raises(InvalidArgumentError, match="inference_pooling"):
        lz.Probe("m", pooling=name)


def test_scores_are_reduced_class_by_class() -> None:
    scores = np.array([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6]])
    counts = np.array([2, 1])
    assert reduce_scores(scores, counts, "max").tolist() == [[0.9, 0.8], [0.4, 0.6]]
    assert reduce_scores(scores, counts, "min").tolist() == [[0.2, 0.1], [0.4, 0.6]]
    assert reduce_scores(scores[:, 1], counts, "mean").tolist() == pytest.approx([0.45, 0.6])
    assert reduce_scores(scores[:, 0], counts, "last_token").tolist() == [0.2, 0.4]


def test_score_pooling_classifies_every_token_then_reduces(llama: Path) -> None:
    probe = lz.Probe(str(llama), layers=2, pooling="mean", inference_pooling="score:max").fit(POSITIVE, NEGATIVE)
    proba = probe.predict_proba(TEST)
    per_token = lz.Probe(str(llama), layers=2, pooling="mean", inference_pooling="all").fit(POSITIVE, NEGATIVE)
    scores = per_token.predict_proba(TEST)
    assert isinstance(scores, xr.DataArray)
    for i, text in enumerate(TEST):
        mine = scores.sel(prompt=lz.prompt_hash(text))
        assert mine.sizes["token"] == len(tiny_tokenizer()(text)["input_ids"]), "never a padding token"
        np.testing.assert_allclose(proba[i], mine.values.max(axis=0))
    assert probe.predict(TEST).tolist() == probe.classes_[proba.argmax(axis=1)].tolist()  # type: ignore[index]
    labels = per_token.predict(TEST)
    assert set(labels.values.tolist()) <= {0, 1}
    assert labels.lz.at(-1).sizes["prompt"] == 4
    twice = per_token.predict_proba([TEST[0], TEST[0]])
    assert twice.sizes["token"] == 2 * scores.sel(prompt=lz.prompt_hash(TEST[0])).sizes["token"]


def test_score_pooling_works_without_probabilities(llama: Path) -> None:
    probe = lz.Probe(str(llama), layers=2, pooling="mean", inference_pooling="max", classifier="ridge").fit(POSITIVE, NEGATIVE)
    assert set(probe.predict(TEST).tolist()) <= {0, 1}
    with pytest.raises(InvalidArgumentError, match="no probabilities"):
        probe.predict_proba(TEST)


def test_training_on_all_tokens_takes_every_token_and_no_padding(llama: Path) -> None:
    probe = lz.Probe(str(llama), layers=1, pooling="all", inference_pooling="last_token").fit(POSITIVE, NEGATIVE)
    tokens = sum(len(tiny_tokenizer()(text)["input_ids"]) for text in POSITIVE + NEGATIVE)
    assert probe.pipeline_.steps[0][1].n_samples_seen_ == tokens
    assert probe.predict(TEST).shape == (4,)


# ------------------------------------------------------------------------------------------------- fitting and evaluating


def test_prompts_and_labels_or_two_lists_are_the_same(llama: Path) -> None:
    probe = lz.Probe(str(llama), layers=1).fit(POSITIVE, NEGATIVE)
    y = [1] * 8 + [0] * 8
    for labels in (y, np.array(y), tuple(y), [bool(v) for v in y]):
        other = lz.Probe(str(llama), layers=1).fit(POSITIVE + NEGATIVE, labels)
        np.testing.assert_allclose(other.predict_proba(TEST), probe.predict_proba(TEST))
    named = lz.Probe(str(llama), layers=1).fit(POSITIVE + NEGATIVE, labels=["yes"] * 8 + ["no"] * 8)
    assert named.classes_ is not None
    assert named.classes_.tolist() == ["no", "yes"]
    assert set(named.predict(TEST).tolist()) <= {"no", "yes"}


def test_evaluate_gives_the_usual_measures(llama: Path) -> None:
    from sklearn import metrics

    probe = lz.Probe(str(llama), layers=2).fit(POSITIVE, NEGATIVE)
    y = np.array([1, 0, 1, 0])
    found = probe.evaluate(TEST, y)
    predicted, proba = probe.predict(TEST), probe.predict_proba(TEST)
    assert found["accuracy"] == metrics.accuracy_score(y, predicted) == probe.score(TEST, y)
    assert found["f1"] == pytest.approx(metrics.f1_score(y, predicted, zero_division=0))
    assert found["precision"] == pytest.approx(metrics.precision_score(y, predicted, zero_division=0))
    assert found["recall"] == pytest.approx(metrics.recall_score(y, predicted, zero_division=0))
    assert found["auroc"] == pytest.approx(metrics.roc_auc_score(y, proba[:, 1]))
    assert found["n_eval"] == 4


def test_a_regression_predicts_values(llama: Path) -> None:
    y = np.linspace(0.0, 3.5, 16) + 0.25
    probe = lz.Probe(str(llama), layers=2, task="regression").fit(POSITIVE + NEGATIVE, y)
    assert probe.classes_ is None
    assert probe.score(POSITIVE + NEGATIVE, y) > 0.9
    assert set(probe.evaluate(POSITIVE, y[:8])) == {"r2", "mae", "n_eval"}
    with pytest.raises(InvalidArgumentError, match="no probabilities"):
        probe.predict_proba(TEST)
    pooled = lz.Probe(str(llama), layers=2, task="regression", inference_pooling="score:mean").fit(POSITIVE + NEGATIVE, y)
    assert pooled.predict(TEST).shape == (4,)


def test_weights_count(llama: Path) -> None:
    x = np.array([[0.0], [1.0], [1.0]], "f4")
    even = lz.Probe().fit_from_activations(np.vstack([x, x]), [0, 1, 0] * 2)
    heavy = lz.Probe().fit_from_activations(np.vstack([x, x]), [0, 1, 0] * 2, sample_weight=[1, 9, 1] * 2)
    assert heavy.predict_proba_from_activations(x)[1, 1] > even.predict_proba_from_activations(x)[1, 1]


def test_activations_of_ones_own_need_no_model() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((60, 5)), np.arange(60) % 2
    x[:, 0] += 3 * y
    probe = lz.Probe().fit_from_activations(x, y)
    assert probe.score_from_activations(x, y) > 0.9
    np.testing.assert_array_equal(probe.predict_from_activations(x), probe.predict(x))
    assert probe.predict_proba_from_activations(x).shape == (60, 2)
    layered = xr.DataArray(np.stack([x, -x]), dims=("layer", "prompt", "hidden"), coords={"layer": [4, 7]}, name="resid_mean")
    both = lz.Probe().fit_from_activations(layered, y)
    assert both.layers_ == (4, 7)
    with pytest.raises(InvalidArgumentError, match="5 wide"):
        both.predict_from_activations(x)
    with pytest.raises(InvalidArgumentError, match="no model"):
        lz.Probe().fit(POSITIVE, NEGATIVE)
    with pytest.raises(InvalidArgumentError, match="from activations too"):
        probe.predict(["a text"])
    import torch

    assert (
        lz.Probe().fit_from_activations(torch.from_numpy(x), torch.from_numpy(y)).predict(torch.from_numpy(x)) == probe.predict(x)
    ).all()


def test_it_works_with_scikit_learns_own_tools() -> None:
    from sklearn.base import clone, is_classifier, is_regressor
    from sklearn.model_selection import GridSearchCV, cross_val_score

    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((80, 5)), np.arange(80) % 2
    x[:, 0] += 3 * y
    probe = lz.Probe(classifier="ridge", layers=3)
    copy = clone(probe)
    assert copy.get_params() == probe.get_params()
    assert is_classifier(probe)
    assert is_regressor(lz.Probe(task="regression"))
    scores = cross_val_score(lz.Probe(), x, y, cv=4)
    assert scores.mean() > 0.9
    assert cross_val_score(lz.Probe(), x, y, cv=4, scoring="roc_auc").mean() > 0.95
    assert cross_val_score(lz.Probe(task="regression"), x, x[:, 0], cv=4).mean() > 0.9
    search = GridSearchCV(lz.Probe(), {"classifier": ["ridge", "logistic_regression"]}, cv=3).fit(x, y)
    assert search.best_score_ > 0.9
    assert probe.set_params(classifier="svm").classifier == "svm"
    with pytest.raises(InvalidArgumentError, match="no parameter 'depth'"):
        probe.set_params(depth=2)
    assert repr(probe) == "Probe(layers=3, classifier='svm')"


# ------------------------------------------------------------------------------------------------------------------ files


@pytest.mark.few(1)
@pytest.mark.parametrize("classifier", ["logistic_regression", "ridge", "lda", "mass_mean"])
def test_a_saved_probe_predicts_the_same_bits(llama: Path, tmp_path: Path, classifier: str) -> None:
    probe = lz.Probe(str(llama), layers=[1, 3], pooling="mean", classifier=classifier, random_state=3).fit(POSITIVE, NEGATIVE)
    probe.save(tmp_path / "p.probe")
    loaded = lz.Probe.load(tmp_path / "p.probe")
    np.testing.assert_array_equal(loaded.predict(TEST), probe.predict(TEST))
    if classifier != "ridge":
        np.testing.assert_array_equal(loaded.predict_proba(TEST), probe.predict_proba(TEST))
    assert loaded.get_params() == probe.get_params()
    assert loaded.layers_ == (1, 3)
    assert list(tmp_path.iterdir()) == [tmp_path / "p.probe"], "no temporary file stays"


def test_a_probe_notices_other_weights_under_the_name_of_its_model(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    shutil.copytree(llama, tmp_path / "first" / "toy")
    shutil.copytree(llama, tmp_path / "second" / "toy")
    tuned = AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        for weight in tuned.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    tuned.save_pretrained(tmp_path / "second" / "toy")

    monkeypatch.chdir(tmp_path / "first")
    swept = lz.Probe("toy", layers="sweep", pooling="mean", classifier="ridge").fit(POSITIVE, NEGATIVE)
    probe = lz.Probe("toy", layers=1, pooling="mean", classifier="ridge").fit(POSITIVE, NEGATIVE)
    probe.save(tmp_path / "p.probe")
    loaded = lz.Probe.load(tmp_path / "p.probe")
    assert loaded.origin_ == probe.origin_
    assert (probe.origin_.model, probe.origin_.variable) == ("toy", "resid_mean")
    right = probe.predict(TEST)
    np.testing.assert_array_equal(loaded.predict(TEST), right)

    monkeypatch.chdir(tmp_path / "second")
    probes: list[Any] = [probe, loaded, swept.sweep_result_, swept]
    for each in probes:
        with pytest.warns(UserWarning, match="learned from resid_mean of 'toy' with other weights"):
            each.predict(TEST)
    with pytest.warns(UserWarning, match="with other weights"):
        loaded.score(TEST, [1, 0, 1, 0])
    monkeypatch.chdir(tmp_path / "first")
    np.testing.assert_array_equal(loaded.predict(TEST), right)


def test_a_file_of_a_probe_without_an_origin_is_read(tmp_path: Path) -> None:
    probe = lz.Probe().fit_from_activations([[0.0], [1.0]], [0, 1])
    for held in (None, "toy", {"model": 3, "weights": []}, {"weights": {"revision": 1}}):
        assert isinstance(Origin.parse(held), Origin)
    probe.save(tmp_path / "p.probe")
    assert lz.Probe.load(tmp_path / "p.probe").origin_ == Origin()


def test_no_pickle_is_written_and_none_is_read(llama: Path, tmp_path: Path) -> None:
    from sklearn.tree import DecisionTreeClassifier

    probe = lz.Probe(str(llama), layers=1, classifier=DecisionTreeClassifier()).fit(POSITIVE, NEGATIVE)
    with pytest.raises(InvalidArgumentError, match="only named classifiers"):
        probe.save(tmp_path / "p.probe")
    assert not list(tmp_path.iterdir())
    lz.Probe().fit_from_activations([[0.0], [1.0]], [0, 1]).save(tmp_path / "p.probe")
    data = (tmp_path / "p.probe").read_bytes()
    assert b"pickle" not in data
    (tmp_path / "evil.probe").write_bytes(b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(NotAProbeError):
        lz.Probe.load(tmp_path / "evil.probe")
    assert not Path("pwned").exists()


# ------------------------------------------------------------------------------------------------------ where nothing fits


def test_a_limit_of_zero_stores_nothing_and_reads_all_the_same(llama: Path, runs: list[int]) -> None:
    lz.Probe(str(llama), layers=1).fit(POSITIVE[:4], NEGATIVE[:4])
    before = lz.cache_info().total_size_bytes
    lz.set_cache_limit(0)
    probe = lz.Probe(str(llama), layers=1).fit(POSITIVE, NEGATIVE)
    assert runs == [8, 8], "what is stored is read"
    assert lz.cache_info().total_size_bytes == before
    assert probe.predict(TEST).shape == (4,)
    with pytest.raises(ReadOnlyError, match="limit is 0"):
        lz.extract(str(llama), TEST, progress=False)
    assert lz.extract(str(llama), POSITIVE[:4], dtype="float32", layers=[1], progress=False).found == 4
    import fsspec

    assert not [path for path in fsspec.filesystem("memory").store if "lmprobe-zarr-" in path], "nothing is left in memory"


def test_a_cache_that_cannot_be_written_warns_once_and_computing_continues(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a file"
    file.write_text("not a folder")
    monkeypatch.setenv("LMPROBE_CACHE_DIR", str(file))
    lz.config.reload()
    probe = lz.Probe(str(llama), layers=1)
    with pytest.warns(CacheWarning) as caught:
        probe.fit(POSITIVE, NEGATIVE)
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 1
    assert str(file) in messages[0]
    assert "LMPROBE_CACHE_DIR" in messages[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert probe.predict(TEST).shape == (4,)
    assert file.read_text() == "not a folder"
    with pytest.raises(ReadOnlyError, match="a file"):
        lz.extract(str(llama), TEST, store=file / "acts", progress=False)


def test_a_read_only_folder_warns_and_a_full_one_too(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmprobe_zarr.errors import NoSpaceError
    from lmprobe_zarr.storage.local import LocalStorage

    monkeypatch.setattr(LocalStorage, "may_write", lambda self: False)
    with pytest.warns(CacheWarning, match="cannot be written"):
        expected = lz.Probe(str(llama), layers=1).fit(POSITIVE, NEGATIVE).predict_proba(TEST)
    monkeypatch.undo()

    def full(self: Any, key: str, data: Any, *, durable: bool) -> None:
        raise NoSpaceError("no space left")

    monkeypatch.setattr(LocalStorage, "write", full)
    with pytest.warns(CacheWarning, match="no space left"):
        found = lz.Probe(str(llama), layers=1).fit(POSITIVE, NEGATIVE).predict_proba(TEST)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_named_store_that_cannot_be_written_is_an_error(llama: Path, tmp_path: Path) -> None:
    lz.write_activations(tmp_path / "s", model="m", prompts=["a"], pooled={"resid_mean": {0: [[1.0]]}})
    with pytest.raises(ReadOnlyError):
        lz.Probe(str(llama), layers=1, store=lz.open_store(tmp_path / "s", mode="r")).fit(POSITIVE, NEGATIVE)


def test_a_limit_below_the_working_set_names_the_size_that_is_needed(llama: Path) -> None:
    lz.set_cache_limit(1000 / 1024**3)
    with pytest.warns(CacheWarning, match=r"set_cache_limit\("):
        lz.Probe(str(llama), layers=3).fit(POSITIVE, NEGATIVE)
    parts = lz.open_store().view(next(iter(lz.open_store().groups().values()))).parts
    assert len(parts) == 16, "a part holds at most a fiftieth of the limit, or one prompt"


@pytest.mark.few(1)
@pytest.mark.parametrize("damage", ["chunk", "document"])
def test_a_damaged_part_is_logged_and_the_model_computes_its_prompts_again(llama: Path, runs: list[int], damage: str) -> None:
    probe = lz.Probe(str(llama), layers=1)
    probe.fit(POSITIVE, NEGATIVE)
    expected = probe.predict_proba(POSITIVE)
    root = Path(lz.open_store().url)
    name = "zarr.json" if damage == "document" else "prompts/resid_last_token/c.1.0.0"
    (path,) = [p for p in root.glob(f"*/*/{name}") if p.parent.name != "annotations"]
    path.write_bytes(path.read_bytes()[:-1])
    fresh = lz.Probe(str(llama), layers=1)
    with pytest.warns(CacheWarning, match="damaged"):
        fresh.fit(POSITIVE, NEGATIVE)
    np.testing.assert_allclose(fresh.predict_proba(POSITIVE), expected, atol=1e-6)
    assert runs == [16, 16]


def test_parts_evicted_under_a_probe_are_made_up_for(llama: Path, runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    probe = lz.Probe(str(llama), layers=1).fit(POSITIVE, NEGATIVE)
    expected = probe.predict_proba(POSITIVE)
    import lmprobe_zarr.extraction.supply as supply

    real, done = supply.read_activations, list[Any]()

    def evicted_first(*arguments: Any, **options: Any) -> Any:
        if not done:
            done.append(lz.evict(lz.open_store(), max_gb=0, min_age=0))
        return real(*arguments, **options)

    monkeypatch.setattr(supply, "read_activations", evicted_first)
    np.testing.assert_allclose(probe.predict_proba(POSITIVE), expected, atol=1e-6)
    assert done
    assert runs == [16, 8]


# ------------------------------------------------------------------------------------------------------------- concurrency


def test_eight_threads_on_the_same_prompts(llama: Path) -> None:
    expected = lz.Probe(str(llama), layers=2, store="memory://eight-threads").fit(POSITIVE, NEGATIVE).predict_proba(TEST)
    found: list[Any] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            found.append(lz.Probe(str(llama), layers=2).fit(POSITIVE, NEGATIVE).predict_proba(TEST))
        except BaseException as error:  # noqa: BLE001 — shown below
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for probabilities in found:
        np.testing.assert_allclose(probabilities, expected, atol=1e-5)
    assert len(found) == 8
    listed = [cached.prompt for cached in lz.list_cached_prompts("llama")]
    assert sorted(listed) == sorted([*POSITIVE, *NEGATIVE, *TEST])  # type: ignore[type-var]


PROCESSES = """
import json, os, pathlib, sys
import lmprobe_zarr as lz
model, positive, negative = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
children = []
for place in sys.argv[4:]:
    children.append(os.fork())
    if not children[-1]:
        probe = lz.Probe(model, layers=2).fit(positive, negative)
        pathlib.Path(place).write_text(json.dumps(probe.predict_proba(positive + negative).tolist()))
        os._exit(0)
print([os.waitpid(child, 0)[1] for child in children])
"""


def test_two_processes_on_the_same_prompts(llama: Path, warmed: Warmed, tmp_path: Path) -> None:
    places = [tmp_path / "one", tmp_path / "two"]
    environment = {**os.environ, "LMPROBE_CACHE_DIR": str(config.cache_dir()), "OMP_NUM_THREADS": "1"}
    done = warmed.run(PROCESSES, str(llama), json.dumps(POSITIVE), json.dumps(NEGATIVE), *map(str, places), env=environment)
    assert done.stdout == "[0, 0]\n", done.stderr
    results = [json.loads(place.read_text()) for place in places]
    np.testing.assert_allclose(results[0], results[1], atol=1e-5)
    assert len(lz.list_cached_prompts("llama")) == 16
    assert np.isfinite(lz.open_store().dataset().resid_last_token.values).all()


# --------------------------------------------------------------------------------------------------------------- bad input


def bad(call: Callable[[], Any], error: type[Exception], words: str) -> Any:
    return pytest.param(call, error, words, id=words)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        bad(lambda: lz.Probe("m", classifier="tree"), InvalidArgumentError, "no probe named 'tree'"),
        bad(lambda: lz.Probe("m", task="ranking"), InvalidArgumentError, "'classification' or 'regression'"),
        bad(lambda: lz.Probe("m", batch_size=0), InvalidArgumentError, "batch_size=0"),
        bad(lambda: lz.Probe("m", task="regression", classifier="lda"), InvalidArgumentError, "regression"),
        bad(lambda: lz.Probe("m", preprocessing="whiten"), InvalidArgumentError, "whiten"),
        bad(lambda: lz.Probe("m", classifier_kwargs={"depth": 2}), InvalidArgumentError, "depth"),
        bad(lambda: lz.Probe().predict([[0.5]]), NotFittedError, "call fit first"),
        bad(lambda: lz.Probe("m").fit("one text", ["b"]), InvalidTypeError, "one text"),
        bad(lambda: lz.Probe("m").fit(["a"]), InvalidArgumentError, r"\(positive, negative\)"),
        bad(lambda: lz.Probe("m").fit(["a", "b"], [1]), LabelError, "labels of shape"),
        bad(lambda: lz.Probe("m").fit(["a", "b"], [1, 1]), LabelError, "all 2 labels are 1"),
        bad(lambda: lz.Probe("m").fit(["a", "b"], []), LabelError, "all 2 labels are 1"),
        bad(lambda: lz.Probe("m").fit([], []), LabelError, "no prompts"),
        bad(lambda: lz.Probe("m").fit(["a", "b"], [1, float("nan")]), LabelError, "missing"),
        bad(lambda: lz.Probe("m").fit(["a", "b"], [0.5, 1.5]), LabelError, "regression"),
        bad(lambda: lz.Probe("m").fit(["a", "b"], [0, 1], sample_weight=[1]), InvalidArgumentError, "sample_weight"),
        bad(lambda: lz.Probe().fit_from_activations([[1.0, float("nan")], [1, 2]], [0, 1]), InvalidArgumentError, "NaN"),
        bad(lambda: lz.Probe().fit_from_activations([1.0, 2.0], [0, 1]), InvalidArgumentError, "shape"),
        bad(lambda: lz.Probe().fit_from_activations([[1.0, 2, 3], [1, 2, 3]], [0, 1], n_layers=2), InvalidArgumentError, "n_layers"),
        bad(lambda: lz.Probe("m").set_params(store=3).warmup(["a"]), InvalidTypeError, "path or a URL"),
    ],
)
def test_bad_arguments_say_what_to_do(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        call()
    assert len(str(caught.value).splitlines()) <= 2


def test_a_model_object_under_a_name_of_ones_own(runs: list[int]) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    probe = lz.Probe(model, layers=1, name="edited", tokenizer=tokenizer).fit(POSITIVE, NEGATIVE)
    probe.predict(POSITIVE)
    assert runs == [16]
    assert lz.cache_info().models[0].model_name == "edited"


# ---------------------------------------------------------------------------------------------------------------- protections


def test_labels_of_texts_are_matched_by_prompt_and_no_text_has_two(llama: Path) -> None:
    prompts, y = [*POSITIVE, *NEGATIVE], np.array([1] * 8 + [0] * 8)
    expected = lz.Probe(str(llama), layers=1).fit(prompts, y).pipeline_[-1].coef_
    by_text = pd.Series(y, index=prompts)[::-1]
    by_hash = {lz.prompt_hash(prompt): label for prompt, label in zip(prompts, y.tolist(), strict=True)}
    array = xr.DataArray(y[::-1], dims="prompt", coords={"prompt": [lz.prompt_hash(prompt) for prompt in prompts[::-1]]})
    for given in (by_text, by_hash, array):
        for fitted in (lz.Probe(str(llama), layers=1).fit(prompts, given), lz.Probe(str(llama), layers=1).fit(prompts, labels=given)):
            np.testing.assert_array_equal(fitted.pipeline_[-1].coef_, expected)
            assert fitted.score(prompts, given) == fitted.score(prompts, y)
            assert fitted.evaluate(prompts, given) == fitted.evaluate(prompts, y)
    probe = lz.Probe(str(llama), layers=1)
    with pytest.raises(LabelError, match=rf"prompt {lz.prompt_hash(POSITIVE[0])} has two labels, 1 and 0"):
        probe.fit(POSITIVE, [*NEGATIVE, POSITIVE[0]])
    probe.fit(POSITIVE, NEGATIVE)
    for score in (probe.score, probe.evaluate):
        with pytest.raises(LabelError, match="has two labels"):
            score([TEST[0], TEST[0]], [0, 1])
        for missing in (None, np.nan):
            with pytest.raises(LabelError, match="1 of 2 labels are missing, first row 1"):
                score(TEST[:2], [0, missing])
        with pytest.raises(LabelError, match="miss 1 of 2 prompts"):
            score(TEST[:2], {TEST[0]: 1})


@pytest.mark.filterwarnings("ignore:.*was still improving")
def test_a_classifier_that_learns_how_to_pool_is_given_the_tokens_of_each_prompt(llama: Path, runs: list[int], tmp_path: Path) -> None:
    prompts, y = [*POSITIVE, *NEGATIVE], [1] * 8 + [0] * 8
    options: dict[str, Any] = {"classifier": "attention", "classifier_kwargs": {"max_epochs": 5}, "store": tmp_path / "s", "device": "cpu"}
    probe = lz.Probe(str(llama), layers=2, **options).fit(POSITIVE, NEGATIVE)
    assert probe.layers_ == (2,)
    toks = lz.open_store(tmp_path / "s").tokens(prompts=prompts).resid.sel(layer=2)
    again = lz.Probe(**options).fit_from_activations(toks, dict(zip(prompts, y, strict=True)))
    np.testing.assert_allclose(again.pipeline_[-1].query_, probe.pipeline_[-1].query_, rtol=1e-4, atol=1e-6)
    found = probe.predict_proba(TEST)
    assert found.shape == (4, 2)
    given = lz.open_store(tmp_path / "s").tokens(prompts=TEST).resid.sel(layer=2)
    np.testing.assert_allclose(found, probe.predict_proba_from_activations(given), rtol=1e-5)
    assert probe.predict(TEST).tolist() == probe.predict_from_activations(given).tolist()
    measured = probe.evaluate(prompts, y)
    assert measured["n_eval"] == 16
    assert measured["accuracy"] == probe.score(prompts, y)
    assert {"auroc", "f1"} <= set(measured)
    several = lz.Probe(str(llama), layers=[1, 2], **options).fit(POSITIVE, NEGATIVE)
    assert several.pipeline_[-1].coef_.shape[-1] == 2 * toks.sizes["hidden"]
    sweep = lz.Probe(str(llama), layers="sweep:1-2", **options).fit(POSITIVE, NEGATIVE)
    assert sweep.sweep_result_ is not None
    np.testing.assert_array_equal(sweep.sweep_result_[2].pipeline_[-1].coef_, probe.pipeline_[-1].coef_)
    assert set(sweep.sweep_result_.predict_proba(TEST)) == {1, 2}
    assert sweep.evaluate(prompts, y)["best_layer"] in (1, 2)
    probe.save(tmp_path / "probe")
    np.testing.assert_array_equal(lz.Probe.load(tmp_path / "probe", store=tmp_path / "s").predict_proba(TEST), found)


def best_score(fitted: Any) -> float:
    """The mean over the inner folds of a LogisticRegressionCV, for the best strength; in some versions of scikit-learn it is by class."""
    held = np.asarray(next(iter(fitted.scores_.values())) if isinstance(fitted.scores_, dict) else fitted.scores_)
    return float(held.reshape(len(held), -1).mean(axis=0).max())


@pytest.mark.few(1)
@pytest.mark.parametrize("given", ["prompts", "groups"])
def test_a_classifier_that_chooses_within_its_rows_keeps_what_belongs_together(given: str) -> None:
    # Thirty facts in four wordings with labels at random: among wordings the weakest penalty looks best, among facts none does.
    rng = np.random.default_rng(0)
    fact = np.tile(np.arange(30), 4)  # the folds of scikit-learn are runs of rows
    y = rng.permutation(np.tile([0, 1], 15))[fact]
    x = (rng.normal(size=(30, 64))[fact] + 0.3 * rng.normal(size=(120, 64))).astype("f4")
    prompts = fact if given == "prompts" else np.arange(120)
    array = xr.DataArray(x, dims=("prompt", "hidden"), coords={"prompt": [lz.prompt_hash(f"p{i}") for i in prompts]})
    groups = None if given == "prompts" else fact
    fits = [
        lz.Probe(classifier="logistic_regression_cv").fit(array, y, groups=groups).pipeline_[-1],
        lz.Probe(classifier="logistic_regression_cv").fit_from_activations(array, y, groups=groups).pipeline_[-1],
    ]
    for fitted in fits:
        assert best_score(fitted) < 0.8
    if groups is not None:
        leaking = lz.Probe(classifier="logistic_regression_cv").fit(array, y).pipeline_[-1]
        assert best_score(leaking) > 0.9
