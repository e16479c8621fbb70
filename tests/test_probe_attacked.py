"""What a hostile tester found in probes and the cache, each as it was found."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import lmprobe_zarr as lz
from lmprobe_zarr import config
from lmprobe_zarr.errors import AmbiguousProvenanceError, CacheWarning, InvalidArgumentError, LabelError, NumberRangeError, ReadOnlyError
from lmprobe_zarr.store.upkeep import delete as delete_module

pytestmark = pytest.mark.model
torch = pytest.importorskip("torch")

from tiny_models import SharedModels, save_tiny, tiny_tokenizer  # noqa: E402 — needs torch

POSITIVE = [f"I love the dog number {i}, what a walk it was" for i in range(8)]
NEGATIVE = [f"The {i} rainy foxes are sad" for i in range(8)]
LABELS = [1] * 8 + [0] * 8


@pytest.fixture(scope="session")
def llama(tiny_models: SharedModels) -> Path:
    return tiny_models("llama", head="AutoModelForCausalLM")


def reference(model: Path, prompts: list[str], layer: int) -> Any:
    """The last token of each prompt by itself, straight from transformers."""
    transformers = pytest.importorskip("transformers")
    body = transformers.AutoModel.from_pretrained(model, dtype=torch.float32).eval()
    kept = []
    handle = body.layers[layer].register_forward_hook(lambda _m, _a, out: kept.append((out[0] if isinstance(out, tuple) else out)[0, -1]))
    with torch.inference_mode():
        for prompt in prompts:
            body(torch.tensor([tiny_tokenizer()(prompt)["input_ids"]]))
    handle.remove()
    return torch.stack(kept).numpy()


# ----------------------------------------------------------------------------------------------------------------- threads


def test_one_probe_in_many_threads_stores_no_prompt_under_another(llama: Path) -> None:
    probe = lz.Probe(str(llama), layers=2).fit(POSITIVE, NEGATIVE)
    probe.predict(["x"])
    words = ["the", "dog", "fox", "walk", "park", "lazy"]
    texts = [f"{a} {b} {c}" for a in words for b in words for c in words]
    jobs = [texts[i : i + 12] for i in range(0, len(texts), 12)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(probe.predict, jobs))
    stored = lz.open_store().dataset(prompts=texts).resid_last_token.sel(layer=2).values
    np.testing.assert_allclose(stored, reference(llama, texts, 2), atol=1e-5)


def test_loading_in_one_thread_does_not_change_what_another_computes(llama: Path) -> None:
    def work(number: int) -> None:
        dtype = ("float32", "bfloat16")[number % 2]
        lz.Probe(str(llama), layers=2, dtype=dtype).warmup([f"{text} {number}" for text in POSITIVE])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(12)))
    assert torch.get_default_dtype() == torch.float32
    texts = [f"{text} {number}" for number in range(0, 12, 2) for text in POSITIVE]
    stored = lz.open_store().dataset(provenance={"compute_dtype": "float32"}, prompts=texts).resid_last_token.sel(layer=2).values
    np.testing.assert_allclose(stored, reference(llama, texts, 2), atol=1e-5)


# ------------------------------------------------------------------------------------------------------------------ layers


def test_layers_in_any_order_are_read_in_theirs(llama: Path) -> None:
    lz.extract(str(llama), POSITIVE + NEGATIVE, dtype="float32", progress=False)
    data = lz.open_store().dataset(prompts=POSITIVE + NEGATIVE).resid_last_token
    probe = lz.Probe(str(llama)).fit_from_activations(data.sel(layer=[3, 1]), LABELS)
    assert probe.layers_ == (1, 3)
    expected = probe.predict_proba_from_activations(data.sel(layer=[1, 3]))
    np.testing.assert_allclose(probe.predict_proba(POSITIVE + NEGATIVE), expected, atol=1e-6)
    np.testing.assert_allclose(probe.predict_proba_from_activations(data.sel(layer=[3, 1])), expected, atol=1e-6)
    with pytest.raises(InvalidArgumentError, match=r"layers \[0, 1\]"):
        probe.predict(data.sel(layer=[0, 1]))


def test_layers_that_are_not_known_are_not_invented(llama: Path) -> None:
    x = np.random.default_rng(0).standard_normal((16, 64)).astype("f4")
    probe = lz.Probe(str(llama), layers=[2, 3]).fit_from_activations(x, LABELS, n_layers=2)
    assert probe.layers_ == ()
    assert probe.predict_from_activations(x).shape == (16,)
    with pytest.raises(InvalidArgumentError, match="unknown layers"):
        probe.predict(POSITIVE)


def test_a_sweep_without_a_place_to_store_runs_once_and_anew(llama: Path, runs: list[int]) -> None:
    lz.set_cache_dtype("bfloat16", keep_bits=1)
    lz.Probe(str(llama), layers="sweep").fit(POSITIVE, NEGATIVE)
    lz.set_cache_dtype(None)
    lz.set_cache_limit(0)
    probe = lz.Probe(str(llama), layers="sweep").fit(POSITIVE, NEGATIVE, invalidate_cache=True)
    assert runs == [16, 16]
    assert probe.sweep_result_ is not None
    fresh = lz.Probe(str(llama), layers=2, store="memory://fresh-sweep").fit(POSITIVE, NEGATIVE)
    new = ["a walk", "sad"]
    np.testing.assert_allclose(probe.sweep_result_.predict_proba(new)[2], fresh.predict_proba(new), atol=1e-5)


def test_evaluating_a_sweep_runs_new_prompts_once(llama: Path, runs: list[int]) -> None:
    probe = lz.Probe(str(llama), layers="sweep").fit(POSITIVE, NEGATIVE)
    probe.evaluate(["a walk", "sad foxes"], [1, 0])
    assert runs == [16, 2]


# --------------------------------------------------------------------------------------------------------- whose is what


def test_a_read_only_backend_is_neither_evicted_nor_cleared(tmp_path: Path) -> None:
    lz.write_activations(tmp_path / "s", model="m", prompts=["a"], pooled={"resid_mean": {0: [[1.0]]}})
    lz.set_cache_backend(lz.open_store(tmp_path / "s", mode="r"))
    with pytest.raises(ReadOnlyError):
        lz.clear_cache()
    with pytest.raises(ReadOnlyError):
        lz.evict(max_gb=0, min_age=0)
    assert lz.cache_info().models[0].num_prompts == 1


def test_two_folders_of_one_name_are_two_models(llama: Path, tmp_path: Path) -> None:
    checkpoint = save_tiny("llama", tmp_path / "runA" / "checkpoint-100")
    other = save_tiny("gpt2", tmp_path / "runB" / "checkpoint-100")
    lz.Probe(str(other), layers=0).warmup(["a prompt"])
    assert lz.discover_cached(str(checkpoint), "a prompt") is None
    assert lz.discover_cached(str(other), "a prompt") is not None
    lz.Probe(str(checkpoint), layers=0).warmup(["a prompt"])
    assert lz.discover_cached(str(checkpoint), "a prompt") is not None
    with pytest.raises(AmbiguousProvenanceError):
        lz.discover_cached("checkpoint-100", "a prompt")
    assert len(lz.cache_info(str(checkpoint)).models) == 1
    assert lz.clear_cache(str(checkpoint)) == 1
    assert lz.discover_cached(str(other), "a prompt") is not None


def test_one_model_used_in_many_ways_can_still_be_looked_up(llama: Path) -> None:
    probe = lz.Probe(str(llama), layers=1).fit(POSITIVE, NEGATIVE)
    lz.Probe(str(llama), layers=1).warmup([[5, 6, 7], [8, 9]])
    lz.Probe(str(llama), layers=1, dtype="bfloat16").warmup(["another"])
    assert lz.discover_cached("llama", POSITIVE[0]) is not None
    assert lz.discover_cached("llama", [5, 6, 7]) is not None
    assert len(lz.list_cached_prompts("llama")) == 16 + 2 + 1
    before = probe.predict_proba(POSITIVE)
    lz.Probe(str(llama), layers=1, dtype="bfloat16").warmup(POSITIVE)
    np.testing.assert_array_equal(probe.predict_proba(POSITIVE), before)
    assert probe.dtype_ == "float32"
    chosen = next(name for name, info in lz.open_store().groups().items() if info.provenance["compute_dtype"] == "bfloat16")
    lz.Probe(str(llama), layers=1, group=chosen, cache_only=True).warmup(POSITIVE)
    with pytest.raises(InvalidArgumentError, match="group="):
        lz.Probe(str(llama), layers=1, group=chosen, dtype="float32").warmup(["never seen"])


# ------------------------------------------------------------------------------------------------------------------ damage


def test_a_deletion_that_was_interrupted_is_completed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = lz.open_store(tmp_path / "s")
    lz.write_activations(store, model="m", prompts=["a", "the very private"], pooled={"resid_mean": {0: np.ones((2, 4), "f4")}})

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(delete_module, "remove_part", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.delete("m", ["the very private"])
    assert len(lz.open_store(store.url).dataset().prompt) == 1, "hidden already"
    lz.open_store(store.url).delete("m", ["the very private"])
    assert not [
        path for path in Path(store.url).rglob("*") if path.is_file() and lz.prompt_hash("the very private").encode() in path.read_bytes()
    ]


def test_damaged_tokens_are_made_up_for_by_the_model(llama: Path, runs: list[int]) -> None:
    lz.extract(str(llama), POSITIVE + NEGATIVE, keep_tokens=True, pooling=[], dtype="float32", progress=False)
    (chunk,) = Path(lz.open_store().url).glob("*/*/tokens/resid/c.2.0.0")
    data = bytearray(chunk.read_bytes())
    data[5] ^= 1
    chunk.write_bytes(data)
    with pytest.warns(CacheWarning, match="damaged"):
        probe = lz.Probe(str(llama), layers=2, pooling="mean").fit(POSITIVE, NEGATIVE)
    assert runs == [16, 16]
    assert probe.predict(POSITIVE).shape == (8,)


def test_a_folder_where_a_chunk_should_be_is_damage(llama: Path, runs: list[int]) -> None:
    lz.Probe(str(llama), layers=2).fit(POSITIVE, NEGATIVE)
    (chunk,) = Path(lz.open_store().url).glob("*/*/prompts/resid_last_token/c.2.0.0")
    chunk.unlink()
    chunk.mkdir()
    with pytest.warns(CacheWarning, match="cannot be read"):
        lz.Probe(str(llama), layers=2).fit(POSITIVE, NEGATIVE)
    assert runs == [16, 16]
    plan = lz.evict(lz.open_store(), max_gb=0, min_age=0)
    assert plan is not None
    assert plan.kept == 0


@pytest.mark.few(2)
@pytest.mark.parametrize("how", ["flipped", "folder", "loop"])
def test_one_damaged_group_does_not_stop_the_cache(llama: Path, how: str) -> None:
    lz.write_activations(lz.open_store(), model="other", prompts=["a"], pooled={"resid_mean": {0: [[1.0]]}})
    (path,) = Path(lz.open_store().url).glob("other-*/zarr.json")
    text = path.read_text()
    path.unlink()
    if how == "flipped":
        path.write_text(text.replace('"other"', '"ather"'))
    elif how == "folder":
        path.mkdir()
    else:
        path.symlink_to(path)
    with pytest.warns(CacheWarning, match="other-"):
        lz.Probe(str(llama), layers=2).fit(POSITIVE, NEGATIVE)
    with pytest.warns(CacheWarning, match="other-"):
        assert [model.model_name for model in lz.cache_info().models] == ["llama"]
    with pytest.warns(CacheWarning, match="other-"):
        assert lz.clear_cache("llama") == 1


def test_files_of_a_killed_writer_are_not_a_stored_model(llama: Path) -> None:
    lz.Probe(str(llama), layers=2, dtype="bfloat16").fit(POSITIVE, NEGATIVE)
    place = Path(lz.open_store().url)
    for path in (*place.glob("*/*/zarr.json"), *place.glob("*/.committed/*")):
        path.unlink()
    assert lz.open_store().models() == []
    lz.Probe(str(llama), layers=2).fit(POSITIVE, NEGATIVE)
    assert lz.discover_cached("llama", POSITIVE[0]) is not None


def test_of_what_lost_its_document_a_probe_runs_the_model_again_and_says_so(llama: Path) -> None:
    expected = lz.Probe(str(llama), layers=2).fit(POSITIVE, NEGATIVE).predict_proba(POSITIVE)
    for path in Path(lz.open_store().url).glob("*/*/zarr.json"):
        path.unlink()
    with pytest.warns(CacheWarning, match=r"zarr\.json is missing, though the part was committed"):
        again = lz.Probe(str(llama), layers=2).fit(POSITIVE, NEGATIVE).predict_proba(POSITIVE)
    np.testing.assert_array_equal(again, expected)
    assert {problem.kind for problem in lz.open_store().verify(progress=False).problems} == {"missing"}
    lz.open_store().repair(progress=False)
    assert lz.open_store().verify(progress=False).ok
    assert len(lz.open_store().dataset().prompt) == len({*POSITIVE, *NEGATIVE})


# ---------------------------------------------------------------------------------------------------------------- settings


def test_a_relative_cache_folder_is_the_local_default_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LMPROBE_CACHE_DIR", "here/../relative")
    lz.config.reload()
    lz.write_activations(lz.open_store(), model="m", prompts=["a"], pooled={"resid_mean": {0: [[1.0]]}})
    plan = lz.evict(max_gb=0, given=True)
    assert plan is not None
    assert len(plan.entries) == 1


def test_arguments_go_before_settings_one_by_one(llama: Path) -> None:
    lz.set_cache_dtype("float16")
    lz.extract(str(llama), POSITIVE, keep_bits=5, progress=False)
    data = lz.open_store().dataset(dtype="stored").resid_last_token
    assert data.dtype == np.float16
    assert not (data.values.view(np.uint16) & 0b11111).any()
    model = save_tiny("llama", config.cache_dir() / "wide" / "wide")
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    save_file({k: v * 1e6 if "embed" in k else v for k, v in weights.items()}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(NumberRangeError):
        lz.extract(str(model), POSITIVE, overflow="raise", progress=False)


def test_the_limit_counts_the_layers_that_are_kept_on_the_way(llama: Path) -> None:
    one_layer = 16 * 32 * 4
    lz.set_cache_limit(2 * one_layer / 1024**3)
    with pytest.warns(CacheWarning, match="limit"):
        lz.Probe(str(llama), layers=3).warmup(POSITIVE + NEGATIVE)


@pytest.mark.parametrize("gb", [float("inf"), 1e308, 10**400, "much"])
def test_sizes_beyond_all_numbers_are_refused(gb: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="not a size"):
        lz.evict(max_gb=gb)
    with pytest.raises(InvalidArgumentError, match="not a size"):
        lz.set_cache_limit(gb)
    with pytest.raises(InvalidArgumentError, match="logging"):
        lz.enable_cache_logging("bogus")


def test_a_tiny_limit_is_not_none_at_all() -> None:
    lz.set_cache_limit(1e-12)
    assert config.cache_limit() == 1


def test_the_debug_variable_counts_again_after_a_reload(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("lmprobe_zarr.cache")
    logger.setLevel(logging.NOTSET)  # as nobody has touched it
    monkeypatch.setattr(logger, "level_of_variable", logging.NOTSET, raising=False)
    for value, shown in (("1", True), ("0", False), ("debug", True), ("0", False)):
        monkeypatch.setenv("LMPROBE_CACHE_DEBUG", value)
        lz.config.reload()
        lz.evict()
        assert ("evict" in capsys.readouterr().err) == shown, value


def test_warnings_point_at_the_callers_line(llama: Path) -> None:
    lz.set_cache_limit(1e-12)
    with pytest.warns(CacheWarning) as caught:
        lz.Probe(str(llama), layers=3).warmup(POSITIVE)
    assert {Path(warning.filename).name for warning in caught} == {Path(__file__).name}


# ------------------------------------------------------------------------------------------------------- arguments


def test_texts_that_repeat_are_classes_and_texts_that_do_not_are_prompts(llama: Path, runs: list[int]) -> None:
    from sklearn.model_selection import cross_val_score

    names = ["pos"] * 8 + ["neg"] * 8
    probe = lz.Probe(str(llama), layers=2).fit(POSITIVE + NEGATIVE, names)
    assert probe.classes_ is not None
    assert probe.classes_.tolist() == ["neg", "pos"]
    scores = cross_val_score(lz.Probe(str(llama), layers=2), POSITIVE + NEGATIVE, names, cv=2)
    assert scores.mean() > 0.5
    assert runs == [16], "no label was run through the model"
    with pytest.raises(LabelError, match="none of the labels"):
        probe.score(POSITIVE, ["1"] * 8)
    with pytest.raises(LabelError, match="none of the labels"):
        probe.evaluate(POSITIVE, [1] * 8)


def test_scores_of_tokens_come_one_per_class_or_not_at_all(llama: Path) -> None:
    from sklearn.svm import SVC

    y = [0, 1, 2, 3] * 4
    probe = lz.Probe(str(llama), layers=2, pooling="mean", inference_pooling="max", classifier=SVC(decision_function_shape="ovo"))
    probe.fit(POSITIVE + NEGATIVE, y)
    with pytest.raises(InvalidArgumentError, match="ovr"):
        probe.predict(POSITIVE)
    assert set(probe.set_params(inference_pooling="mean").predict(POSITIVE)) <= {0, 1, 2, 3}


@pytest.mark.few(1)
@pytest.mark.parametrize("classifier", ["svm", "ridge"])
def test_the_area_under_the_curve_needs_scores_not_probabilities(llama: Path, classifier: str) -> None:
    from sklearn.model_selection import cross_val_score

    probe = lz.Probe(str(llama), layers=2, classifier=classifier).fit(POSITIVE, NEGATIVE)
    assert 0 <= probe.evaluate(POSITIVE + NEGATIVE, LABELS)["auroc"] <= 1
    x = np.random.default_rng(0).standard_normal((40, 5))
    x[:20] += 2
    scores = cross_val_score(lz.Probe(classifier=classifier), x, [1] * 20 + [0] * 20, scoring="roc_auc", cv=4)
    assert scores.mean() > 0.9


def test_unsuitable_arguments_for_the_classifier_raise_our_own_errors(llama: Path) -> None:
    x = np.random.default_rng(0).standard_normal((16, 5))
    calls: list[tuple[Any, str]] = [
        (lambda: lz.Probe(classifier="lda").fit_from_activations(x, LABELS, sample_weight=[1] * 16), "sample_weight"),
        (lambda: lz.Probe().fit_from_activations(x, LABELS, sample_weight=[0] * 16), "sample_weight"),
        (lambda: lz.Probe().fit_from_activations(x, LABELS, sample_weight=["a"] * 16), "sample_weight"),
        (lambda: lz.Probe(preprocessing="pca:50").fit_from_activations(x, LABELS), "n_components"),
        (lambda: lz.Probe().fit_from_activations(x, [None, *LABELS[1:]]), "none missing"),
        (lambda: lz.Probe(task="regression").fit_from_activations(x, ["a"] * 16), "numbers"),
        (lambda: lz.Probe().fit_from_activations(x, LABELS).save("/nowhere/p.probe"), "cannot be written"),
        (lambda: lz.Probe.load("/"), "folder"),
    ]
    for call, words in calls:
        with pytest.raises(lz.errors.LmprobeZarrError, match=words) as caught:
            call()
        assert len(str(caught.value).splitlines()) <= 2


def test_a_model_that_computes_nan_is_named_with_its_prompts(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    # Finite weights whose products are not; and weights that are NaN themselves, which are named before anything is stored.
    for factor, words in ((1e25, lz.prompt_hash(POSITIVE[0])), (float("nan"), r"the weight 'layers\.2\.")):
        model = save_tiny("llama", tmp_path / f"times {factor}")
        weights = load_file(model / "model.safetensors")
        save_file({k: v * factor if "layers.2" in k else v for k, v in weights.items()}, model / "model.safetensors", {"format": "pt"})
        with pytest.raises(InvalidArgumentError, match=words):
            lz.Probe(str(model), layers=2).fit(POSITIVE, NEGATIVE)


def test_parameters_that_are_refused_change_nothing() -> None:
    probe = lz.Probe(layers=3)
    with pytest.raises(InvalidArgumentError):
        probe.set_params(pooling="bogus", layers=1)
    assert (probe.pooling, probe.layers) == ("last_token", 3)


def test_a_table_of_pandas_is_activations() -> None:
    pandas = pytest.importorskip("pandas")
    x = np.random.default_rng(0).standard_normal((16, 5))
    probe = lz.Probe().fit(pandas.DataFrame(x), pandas.Series(LABELS))
    np.testing.assert_array_equal(probe.predict(pandas.DataFrame(x)), probe.predict(x))


def test_a_table_of_xarray_is_activations_too() -> None:
    x = np.random.default_rng(0).standard_normal((16, 5))
    data = xr.DataArray(x, dims=("prompt", "hidden"), coords={"layer": 4})
    assert lz.Probe().fit(data, LABELS).layers_ == (4,)
