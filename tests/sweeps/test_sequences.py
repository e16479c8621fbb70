"""Probes with a pooling of their own over stored tokens: folds, controls, scores, weights, what they find, and what they refuse."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from sklearn.exceptions import ConvergenceWarning, FitFailedWarning
from sklearn.metrics import roc_auc_score

import lmprobe_zarr as lz
from lmprobe_zarr.errors import InvalidArgumentError, LabelError, NotAProbeError
from lmprobe_zarr.probes import sequence_fits
from lmprobe_zarr.probes.token_controls import TOKEN_CONTROLS
from lmprobe_zarr.typing import Array, Ints

pytestmark = [pytest.mark.model, pytest.mark.filterwarnings("ignore:.*stopped at their iteration limit")]
pytest.importorskip("torch")

LEARNED = ["attention", "multimax:2", "softmax_mean", "rolling_mean_max:2", "mlp:8"]
LAYERS = (0, 3)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few passes, for tests that ask for no score."""
    monkeypatch.setattr(sequence_fits, "Training", lambda **given: sequence_fits_training(**{"max_epochs": 4, "patience": 2} | given))


sequence_fits_training = sequence_fits.Training


@pytest.fixture
def full(short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many passes as users get."""
    monkeypatch.setattr(sequence_fits, "Training", sequence_fits_training)


def make(
    n: int = 40, hidden: int = 8, *, where: str = "every", size: float = 1.0, seed: int = 0, longest: int = 6
) -> tuple[Any, Ints, Ints]:
    """Values (layer, token, hidden), tokens of each prompt, labels. Layer 3 has the label in one token, or some of it in every one."""
    rng = np.random.default_rng(seed)
    counts, y = rng.integers(1, longest + 1, n), np.arange(n) % 2
    x = rng.normal(size=(len(LAYERS), counts.sum(), hidden)) + 3
    signs = 2 * y - 1
    if where == "every":
        x[1, :, 0] += size * np.repeat(signs, counts)
    else:
        one = np.cumsum(counts) - counts + rng.integers(0, counts)
        x[1, one, 0] += size * signs
        x[1, one, 1] += size
    return x.astype("float32"), counts, y


def tokens(x: Any, counts: Ints, y: Ints) -> xr.DataArray:
    of = np.repeat(np.arange(len(counts)), counts)
    position = np.concatenate([np.arange(count) for count in counts])
    coords = {
        "layer": list(LAYERS),
        "prompt": ("token", np.array([lz.prompt_hash(f"prompt {i}") for i in range(len(counts))])[of]),
        "position": ("token", position),
        "label": ("token", y[of]),
        "pair": ("token", of // 2),
        "token_id": ("token", (7 * of + position) % 11),
    }
    return xr.DataArray(x, dims=("layer", "token", "hidden"), coords=coords, name="resid").set_xindex(["prompt", "position"], lz.TokenIndex)


def small() -> xr.DataArray:
    return tokens(*make())


def pooled(array: xr.DataArray, pooling: str) -> xr.DataArray:
    found: xr.DataArray = array.lz.pool(pooling)
    return found


def bounds(scores: xr.Dataset, probe: str) -> tuple[float, float]:
    """The interval of the AUROC of a probe on the only layer."""
    found = lz.confidence_intervals(scores, "auroc", n_resamples=300).auroc.sel(probe=probe).squeeze("layer")
    return float(found.sel(bound="lower")), float(found.sel(bound="upper"))


# -- what they find --------------------------------------------------------------------------------------------------------


def test_where_one_token_carries_the_label_they_beat_mean_and_max_pooling(full: None) -> None:
    array = tokens(*make(240, 12, where="one", size=3.5, longest=40)).sel(layer=[3])
    names = ["attention", "multimax:2", "softmax_mean"]
    learned = lz.sweep_tokens(array, "label", names, 3, predictions=True)
    for pooling in ("mean", "max"):
        plain = lz.sweep(pooled(array, pooling), "label", "logistic_regression", 3, predictions=True)
        for name in names:
            assert bounds(learned, name)[0] > bounds(plain, "logistic_regression")[1], (name, pooling)


def test_where_every_token_carries_it_they_are_not_better_than_the_mean(full: None) -> None:
    array = tokens(*make(160, 8, size=0.35, longest=12)).sel(layer=[3])
    names = ["attention", "multimax:2", "softmax_mean", "rolling_mean_max:3"]
    learned = lz.sweep_tokens(array, "label", names, 4)
    plain = lz.sweep(pooled(array, "mean"), "label", "logistic_regression", 4, predictions=True)
    lower, upper = bounds(plain, "logistic_regression")
    assert upper - lower < 0.2
    for name in names:
        assert float(learned.auroc.sel(probe=name).mean()) <= upper


def test_attention_weights_find_the_token_that_carries_the_label(full: None) -> None:
    x, counts, y = make(160, 8, where="one", size=5.0, longest=12)
    array = tokens(x, counts, y)
    fitted = lz.fit_tokens(array, "label", "attention")
    assert fitted.coef.dims == fitted.query_coef.dims == ("layer", "head", "hidden")
    weights = lz.pooling_weights(fitted, array)
    assert weights.dims == ("layer", "token", "head")
    np.testing.assert_allclose(_sums(weights, counts), 1, rtol=1e-5)
    carries = np.abs(x[1, :, 1] - 3) > 2.5
    heavy = weights.sel(layer=3).squeeze("head").values
    assert heavy[carries].mean() > 5 * heavy[~carries].mean()
    one = weights.sel(layer=3, prompt=lz.prompt_hash("prompt 3"))
    assert one.sizes["token"] == counts[3]
    np.testing.assert_array_equal(one.position, np.arange(counts[3]))


def _sums(weights: xr.DataArray, counts: Ints) -> Array:
    return np.add.reduceat(weights.values, np.cumsum(counts) - counts, axis=1)


# -- the same folds, records and numbers -----------------------------------------------------------------------------------


def test_scores_are_those_of_the_fits_on_the_folds_of_a_sweep_of_prompts() -> None:
    array = small()
    scores = lz.sweep_tokens(array, "label", LEARNED, 4, groups="pair", predictions=True)
    plain = lz.sweep(pooled(array, "mean"), "label", "ridge", 4, groups="pair", predictions=True)
    assert scores.attrs["pooling"] == "learned"
    assert scores.auroc.dims == ("layer", "probe", "fold")
    np.testing.assert_array_equal(scores.test_fold.sel(prompt=plain.prompt), plain.test_fold)
    np.testing.assert_array_equal(scores.n_test, plain.n_test)
    # Of each prompt the prediction of the fold that tests it; the AUROC is of them.
    for probe in LEARNED:
        for fold in range(4):
            tested = scores.test_fold.values == fold
            ranked = scores.score.sel(layer=3, probe=probe).values[tested]
            expected = roc_auc_score(scores.true.values[tested], ranked)
            assert float(scores.auroc.sel(layer=3, probe=probe, fold=fold)) == pytest.approx(expected)
            np.testing.assert_array_equal(scores.predicted.sel(layer=3, probe=probe).values[tested], ranked > 0)
    train = [np.flatnonzero(scores.test_fold.values != 0), np.flatnonzero(scores.test_fold.values == 0)]
    again = lz.sweep_tokens(array, "label", LEARNED, [train], groups="pair")
    for probe in LEARNED:
        assert float(again.auroc.sel(layer=3, probe=probe, fold=0)) == float(scores.auroc.sel(layer=3, probe=probe, fold=0))


def test_beside_other_probes_these_are_pooled_as_asked() -> None:
    array = small()
    both = lz.sweep_tokens(array, "label", ["ridge", "attention"], 3, pooling="score:max")
    xr.testing.assert_equal(
        both.auroc.sel(probe="ridge"), lz.sweep_tokens(array, "label", "ridge", 3, pooling="score:max").auroc.sel(probe="ridge")
    )
    xr.testing.assert_equal(both.auroc.sel(probe="attention"), lz.sweep_tokens(array, "label", "attention", 3).auroc.sel(probe="attention"))
    assert both.attrs["pooling"] == "score:max"


@pytest.mark.few(1)
@pytest.mark.parametrize("probe", LEARNED)
@pytest.mark.parametrize("classes", [2, 3])
def test_a_fitted_probe_scores_stored_tokens_as_its_coefficients_say(probe: str, classes: int, tmp_path: Path) -> None:
    x, counts, _ = make()
    y = np.arange(len(counts)) % classes
    array = tokens(x, counts, y)
    fitted = lz.fit_tokens(array, "label", probe)
    split = {layer: np.split(values, np.cumsum(counts)[:-1]) for layer, values in zip(LAYERS, x, strict=True)}
    store = lz.open_store(tmp_path / "acts", durable=False)
    lz.write_activations(store, model="a/model", prompts=[f"prompt {i}" for i in range(len(counts))], activations={"resid": split})
    scores = lz.score_tokens(fitted, store.tokens().resid.sel(layer=[3]))
    assert scores.dims == ("layer", "prompt") if classes == 2 else ("layer", "prompt", "class")
    values = x[1].astype(np.float64)
    of = fitted.sel(layer=3)
    for number in (0, 7, 23):
        rows = values[np.repeat(np.arange(len(counts)), counts) == number]
        expected = by_hand(probe, of, rows)
        found = scores.sel(layer=3, prompt=lz.prompt_hash(f"prompt {number}")).values
        np.testing.assert_allclose(np.atleast_1d(found), expected, rtol=1e-4, atol=1e-4)
    alone = lz.score_tokens(fitted, array, "all")
    assert alone.sizes["token"] == counts.sum()
    single = int(np.flatnonzero(counts == 1)[0])
    np.testing.assert_allclose(
        alone.sel(layer=3, prompt=lz.prompt_hash(f"prompt {single}")).values[0],
        lz.score_tokens(fitted, array).sel(layer=3, prompt=lz.prompt_hash(f"prompt {single}")).values, rtol=1e-5, atol=1e-6,
    )  # fmt: skip


def by_hand(probe: str, of: xr.Dataset, rows: Array) -> Array:
    name, _, number = probe.partition(":")
    bias = np.atleast_1d(of.intercept.values)
    if name == "mlp":
        inner = np.maximum(0, of.inner_coef.values @ rows.mean(axis=0) + of.inner_intercept.values)
        return np.asarray(np.atleast_2d(of.coef.transpose(..., "unit").values) @ inner + bias)
    coef = of.coef if "head" in of.coef.dims else of.coef.expand_dims("head")
    coef = coef if "class" in coef.dims else coef.expand_dims("class")
    total = bias.copy()
    for head, weights in enumerate(coef.transpose("head", "class", "hidden").values):
        values = rows @ weights.T
        if name == "attention":
            raised = np.exp(rows @ of.query_coef.values[head] - (rows @ of.query_coef.values[head]).max())
            total = total + raised @ values / raised.sum()
        elif name == "multimax":
            total = total + values.max(axis=0)
        elif name == "softmax_mean":
            raised = np.exp(values - values.max(axis=0))
            total = total + (raised * values).sum(axis=0) / raised.sum(axis=0)
        else:
            size = min(int(number), len(values))
            total = total + np.max([values[at : at + size].mean(axis=0) for at in range(len(values) - size + 1)], axis=0)
    return np.asarray(total)


def test_a_seed_gives_the_same_numbers_on_every_scheduler_from_a_store_and_from_dask(tmp_path: Path) -> None:
    x, counts, y = make()
    split = {layer: np.split(values, np.cumsum(counts)[:-1]) for layer, values in zip(LAYERS, x, strict=True)}
    store = lz.open_store(tmp_path / "acts", durable=False)
    names = [f"prompt {i}" for i in range(len(counts))]
    lz.write_activations(store, model="m", prompts=names, activations={"resid": split}, coords={"label": y})
    memory = lz.sweep_tokens(tokens(x, counts, y), "label", ["attention", "mlp:8"], 3, scheduler="synchronous", random_state=5)
    lazy = store.tokens().resid
    several: list[tuple[xr.DataArray, dict[str, Any]]] = [
        (lazy, {"n_workers": 1}),
        (lazy, {"n_workers": 3}),
        (store.tokens(chunks={}).resid, {}),
    ]
    for given, options in several:
        again = lz.sweep_tokens(given, "label", ["attention", "mlp:8"], 3, random_state=5, **options)
        np.testing.assert_array_equal(again.auroc, memory.auroc)
    first, second = (lz.fit_tokens(lazy, "label", "multimax:2", random_state=seed) for seed in (5, 6))
    np.testing.assert_array_equal(first.coef, lz.fit_tokens(tokens(x, counts, y), "label", "multimax:2", random_state=5).coef)
    assert not np.array_equal(first.coef, second.coef)


# -- controls --------------------------------------------------------------------------------------------------------------


def test_controls_stand_beside_the_probes(full: None) -> None:
    x, counts, y = make(120, 8, where="one", size=5.0, longest=10)
    array = tokens(x, counts, y)
    noise = tokens(np.random.default_rng(3).normal(size=x.shape).astype("float32"), counts, y)
    asked = {"shuffled_labels": None, "layer_0": None, "bag_of_tokens": None, "random_weights": noise, "majority": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a control may score below chance
        scores = lz.sweep_tokens(array, "label", ["attention"], 3, controls=asked)
    assert list(scores.probe.values) == [
        "attention", "shuffled_labels:attention", "layer_0", "bag_of_tokens", "random_weights:attention", "majority",
    ]  # fmt: skip
    at = scores.auroc.sel(layer=3).mean("fold")
    assert float(at.sel(probe="attention")) > 0.9
    for control in scores.probe.values[1:]:
        assert float(at.sel(probe=control)) < 0.75, control
    np.testing.assert_array_equal(scores.auroc.sel(probe="layer_0", layer=3), scores.auroc.sel(probe="attention", layer=0))
    apart = lz.sweep_tokens(noise, "label", ["attention"], 3)
    np.testing.assert_array_equal(scores.auroc.sel(probe="random_weights:attention"), apart.auroc.sel(probe="attention"))
    assert set(asked) <= set(TOKEN_CONTROLS)


def test_a_bag_of_tokens_is_a_logistic_regression_on_counts_of_token_ids() -> None:
    from sklearn.linear_model import LogisticRegression

    x, counts, y = make()
    array = tokens(x, counts, y)
    ids = np.where(np.random.default_rng(0).random(counts.sum()) < 0.5, 20 + array.label.values, array.token_id.values)
    array = array.assign_coords(token_id=("token", ids))
    fold = (np.arange(30), np.arange(30, 40))
    scores = lz.sweep_tokens(array, "label", ["ridge"], [fold], pooling="score:mean", controls="bag_of_tokens")
    table = np.zeros((40, 22))
    np.add.at(table, (np.repeat(np.arange(40), counts), ids), 1)
    expected = LogisticRegression(max_iter=1000).fit(table[:30], y[:30]).decision_function(table[30:])
    assert float(scores.auroc.sel(probe="bag_of_tokens", layer=0).item()) == pytest.approx(roc_auc_score(y[30:], expected))
    with pytest.raises(InvalidArgumentError, match="'bag_of_tokens' counts the tokens of a prompt, and labels 'labels' differ within"):
        lz.sweep_tokens(array, array.position.values % 2, "ridge", 3, controls="bag_of_tokens")


def test_random_weights_must_be_of_the_same_tokens() -> None:
    array = small()
    for given, message in (
        (array.isel(token=slice(0, -1)), "expected"), (array.sel(layer=[0]), "in layers"),
        (array.isel(token=np.arange(array.sizes["token"])[::-1]), "another order, as prompt says"),
    ):  # fmt: skip
        with pytest.raises(InvalidArgumentError, match=message):
            lz.sweep_tokens(array, "label", "attention", 3, controls={"random_weights": given})
    with pytest.raises(InvalidArgumentError, match="needs activations of the same tokens: give them as"):
        lz.sweep_tokens(array, "label", "attention", 3, controls="random_weights")


# -- bad input -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [lz.fit_tokens, lz.sweep_tokens])
def test_a_label_that_varies_within_a_prompt_is_refused(call: Any) -> None:
    array = small()
    with pytest.raises(InvalidArgumentError, match="labels 'labels' differ within a prompt, and 'attention' gives one score for all"):
        call(array, array.position.values % 2, "attention")


def test_labels_of_tokens_are_refused_for_pooled_prompts() -> None:
    array = small()
    for given, message in (
        (array.label.copy(data=array.position.values % 2), "one label per prompt, or fit single tokens with sweep_tokens"),
        (array.position.values % 2, "labels for 40 prompts: give one per prompt"),
    ):  # fmt: skip
        with pytest.raises(LabelError, match=message):
            lz.sweep(pooled(array, "mean"), given, "ridge", 3)


def test_prompts_of_one_token_are_prompts() -> None:
    x, _, y = make(longest=1)
    array = tokens(x, np.ones(40, np.int64), y)
    for probe in LEARNED:
        fitted = lz.fit_tokens(array, "label", probe)
        np.testing.assert_allclose(lz.score_tokens(fitted, array), lz.score_tokens(fitted, array, "all").values, rtol=1e-5)
        np.testing.assert_allclose(lz.pooling_weights(fitted, array), 1)
    assert lz.score_tokens(fitted, array).sizes["prompt"] == 40


def test_one_class_in_a_fold_is_refused_and_too_few_for_an_inner_fold_is_a_failed_fit() -> None:
    array = small()
    one = np.flatnonzero(np.arange(40) % 2 == 0)
    with pytest.raises((InvalidArgumentError, LabelError), match=r"all are|trains on"):
        lz.sweep_tokens(array, "label", "attention", [(one, np.setdiff1d(np.arange(40), one))])
    few = (np.array([0, 1, 2]), np.arange(3, 40))
    with pytest.warns(FitFailedWarning, match="a single prompt"):
        scores = lz.sweep_tokens(array, "label", ["attention"], [few, (np.arange(30), np.arange(30, 40))])
    assert np.isnan(scores.auroc.values[:, 0, 0]).all()
    assert np.isfinite(scores.auroc.values[:, 0, 1]).all()
    with pytest.raises(InvalidArgumentError, match=r"cannot be fitted on any layer.*a single prompt"):
        lz.fit_tokens(array.isel(token=np.flatnonzero(np.repeat(np.arange(40), make()[1]) < 3)), "label", "attention")


def test_nan_tokens_are_named_and_can_be_left_out() -> None:
    x, counts, y = make()
    x[1, 5, 2] = np.nan
    array = tokens(x, counts, y)
    with pytest.raises(InvalidArgumentError, match=r"layer 3 of .* is NaN or infinite for 1 of"):
        lz.fit_tokens(array, "label", "attention")
    fitted = lz.fit_tokens(array, "label", "attention", where=np.arange(counts.sum()) != 5)
    scores = lz.score_tokens(fitted, array)
    prompt = int(np.repeat(np.arange(40), counts)[5])
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(scores.sel(layer=3).values)), [prompt])
    assert np.isnan(lz.pooling_weights(fitted, array).sel(layer=3).values[np.repeat(np.arange(40), counts) == prompt]).all()


@pytest.mark.filterwarnings("ignore:.*was still improving")
def test_a_probe_refuses_nan_tokens_and_a_single_class() -> None:
    x, counts, y = make()
    array = tokens(x, counts, y).sel(layer=3)
    holed = x.copy()
    holed[1, 5, 2] = np.nan
    bad = tokens(holed, counts, y).sel(layer=3)
    probe = lz.Probe(classifier="attention", classifier_kwargs={"max_epochs": 1}, device="cpu")
    with pytest.raises(InvalidArgumentError, match="1 of 141 rows hold NaN or infinity, first row 5: leave them out"):
        probe.fit_from_activations(bad, "label")
    with pytest.raises(LabelError, match="have the label 0 of 'labels': a probe needs at least two classes"):
        probe.fit_from_activations(array, np.zeros(array.sizes["token"], int))
    probe.fit_from_activations(array, "label")
    with pytest.raises(InvalidArgumentError, match="1 of 141 rows hold NaN or infinity, first row 5: leave them out"):
        probe.predict_from_activations(bad)


def test_a_device_that_does_not_exist_is_refused_before_anything_is_read() -> None:
    for call in (lz.fit_tokens, lz.sweep_tokens):
        with pytest.raises(InvalidArgumentError, match=r"device='cuda:7' cannot be used here: there is cpu"):
            call(small(), "label", "attention", device="cuda:7")
        with pytest.raises(InvalidArgumentError, match=r"device='cuda:7' cannot be used here: there is cpu"):
            call(small(), "label", "ridge", device="cuda:7")  # which needs none
        call(small(), "label", "ridge", device="cpu")


def test_poolings_and_orders_that_cannot_be_are_refused() -> None:
    array = small()
    with pytest.raises(InvalidArgumentError, match="'attention' scores prompts, and pooling='all' has 'ridge' score tokens"):
        lz.sweep_tokens(array, "label", ["ridge", "attention"], 3)
    fitted, linear = lz.fit_tokens(array, "label", "attention"), lz.fit_tokens(array, "label", "ridge")
    with pytest.raises(InvalidArgumentError, match="has learned how to pool a prompt, so pooling='score:max' has nothing to pool"):
        lz.score_tokens(fitted, array, "score:max")
    with pytest.raises(InvalidArgumentError, match="'learned' is for probes with a pooling of their own"):
        lz.score_tokens(linear, array, "learned")
    with pytest.raises(InvalidArgumentError, match="'ridge' scores each token by itself, so it weighs none"):
        lz.pooling_weights(linear, array)
    backwards = array.isel(token=np.arange(array.sizes["token"])[::-1])
    with pytest.raises(InvalidArgumentError, match="tokens do not follow one another in"):
        lz.fit_tokens(backwards, "label", "rolling_mean_max")
    xr.testing.assert_allclose(lz.score_tokens(fitted, backwards).sortby("prompt"), lz.score_tokens(fitted, array).sortby("prompt"))
    with pytest.raises(InvalidArgumentError, match="'attention' learns how to pool the tokens of a prompt, and here"):
        lz.sweep(pooled(array, "mean"), "label", "attention", 3)


@pytest.mark.filterwarnings("default:.*stopped at their iteration limit")
def test_fits_that_stop_early_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence_fits, "Training", lambda: sequence_fits_training(max_epochs=1))
    with pytest.warns(ConvergenceWarning, match="2 of 2 fits stopped at their iteration limit"):
        assert not lz.fit_tokens(small(), "label", "attention").converged.any()


# -- Probe -----------------------------------------------------------------------------------------------------------------


@pytest.mark.few(1)
@pytest.mark.filterwarnings("ignore:.*was still improving")
@pytest.mark.parametrize("classifier", ["attention:2", "multimax", "softmax_mean", "rolling_mean_max:3"])
def test_a_probe_learns_from_given_tokens_and_is_saved(classifier: str, tmp_path: Path) -> None:
    x, counts, y = make(60, where="one", size=5.0)
    array = tokens(x, counts, np.array(["no", "yes"])[y]).sel(layer=3)
    probe = lz.Probe(classifier=classifier, classifier_kwargs={"max_epochs": 30}, device="cpu").fit_from_activations(
        array, "label", groups="pair"
    )
    assert probe.classes_ is not None
    assert probe.classes_.tolist() == ["no", "yes"]
    assert probe.layers_ == (3,)
    predicted = probe.predict_from_activations(array)
    assert predicted.shape == (60,)
    assert (predicted == np.array(["no", "yes"])[y]).mean() > 0.8
    np.testing.assert_allclose(probe.predict_proba_from_activations(array).sum(axis=1), 1)
    mixed = array.isel(token=np.random.default_rng(0).permutation(array.sizes["token"]))
    order = {prompt: place for place, prompt in enumerate(dict.fromkeys(array.prompt.values.tolist()))}
    there = [order[prompt] for prompt in dict.fromkeys(mixed.prompt.values.tolist())]
    np.testing.assert_array_equal(probe.predict_from_activations(mixed), predicted[there])
    probe.save(tmp_path / "probe")
    again = lz.Probe.load(tmp_path / "probe")
    assert again.classifier == classifier
    np.testing.assert_array_equal(again.decision_function(array), probe.decision_function(array))
    damaged = bytearray((tmp_path / "probe").read_bytes())
    damaged[-3] ^= 1
    (tmp_path / "bad").write_bytes(damaged)
    with pytest.raises(NotAProbeError):
        lz.Probe.load(tmp_path / "bad")


def test_what_a_probe_cannot_pool_is_refused() -> None:
    array = small().sel(layer=3)
    with pytest.raises(InvalidArgumentError, match="so pooling='mean' has nothing to pool: leave it out"):
        lz.Probe(classifier="attention", pooling="mean")
    with pytest.raises(InvalidArgumentError, match="over="):
        lz.Probe(classifier="attention", over={"tail": {"position": slice(-2, None)}})
    probe = lz.Probe(classifier="attention", classifier_kwargs={"max_epochs": 1}, device="cuda:9")
    with pytest.raises(InvalidArgumentError, match="ndarray does not say which rows those are"):
        probe.fit_from_activations(array.values, "label")
    with pytest.raises(InvalidArgumentError, match="differ within a prompt"):
        probe.fit_from_activations(array, array.position.values % 2)
    with pytest.raises(InvalidArgumentError, match="device='cuda:9' cannot be used here"):
        probe.fit_from_activations(array, "label")
    with pytest.raises(InvalidArgumentError, match="takes no sample_weight"):
        probe.fit_from_activations(array, "label", sample_weight=np.ones(40))
    with pytest.raises(InvalidArgumentError):
        lz.Probe(classifier="attention", task="regression")
