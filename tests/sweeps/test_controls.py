"""Controls: what they are fitted on, that they score at chance where nothing is to be found, and where they stand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import lmprobe_zarr as lz
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.probes.controls import CONTROLS
from lmprobe_zarr.sweeps.sweep import sweep

N, HIDDEN = 120, 10
RNG = np.random.default_rng(0)
Y = np.arange(N) % 2
#: Longer where the label is 1, with a word that tells it in two of three.
TEXTS = [f"a sentence of {'good' if y and i % 3 else 'plain'} words number {i}" + " more" * y for i, y in enumerate(Y)]
FOLDS = StratifiedKFold(5, shuffle=True, random_state=0)


def activations(layers: tuple[int, ...] = (0, 3, 7), signal: float = 3.0) -> xr.DataArray:
    values = np.random.default_rng(1).normal(size=(len(layers), N, HIDDEN)).astype("float32")
    values[1:, :, 2] += signal * Y
    coords: dict[str, Any] = {
        "layer": list(layers),
        "prompt": [lz.prompt_hash(text) for text in TEXTS],
        "text": ("prompt", TEXTS),
        "n_tokens": ("prompt", [len(text.split()) for text in TEXTS]),
        "label": ("prompt", Y),
    }
    return xr.DataArray(values, dims=("layer", "prompt", "hidden"), coords=coords, name="resid_mean")


def dataset() -> xr.Dataset:
    array = activations()
    perplexity = np.exp(np.random.default_rng(2).normal(size=(N, 3)) + 2 * Y[:, None])
    return xr.Dataset(
        {
            "resid_mean": array,
            "embed_mean": (("prompt", "hidden"), np.random.default_rng(3).normal(size=(N, HIDDEN)) + Y[:, None]),
            "perplexity": (("prompt", "statistic"), perplexity),
        },
        coords={**array.coords, "statistic": ["mean", "min", "max"]},
    )


def test_every_control_is_a_marked_row_beside_the_probes() -> None:
    ds = dataset()
    scores = sweep(ds, "label", ["ridge", "mass_mean"], controls=CONTROLS.keys(), random_state=0)
    names = ["ridge", "mass_mean", "shuffled_labels:ridge", "shuffled_labels:mass_mean", *list(CONTROLS)[1:]]
    assert scores.probe.values.tolist() == names
    assert scores.kind.values.tolist() == ["probe"] * 2 + ["control"] * (len(names) - 2)
    assert scores.control.values.tolist() == ["", "", "shuffled_labels", "shuffled_labels", *list(CONTROLS)[1:]]
    # The embeddings are a control here, and so no variable of their own.
    assert scores.variable.values.tolist() == ["resid_mean"]
    assert np.isfinite(scores.accuracy).all()
    probes_only = scores.isel(probe=scores.kind.values == "probe")
    xr.testing.assert_equal(probes_only.accuracy, sweep(ds[["resid_mean"]], "label", ["ridge", "mass_mean"]).accuracy)


def test_without_signal_everything_scores_at_chance_and_shuffled_labels_do_with_it() -> None:
    noise = activations(signal=0)
    scores = sweep(noise, "label", ["ridge", "logistic_regression"], controls="random_direction")
    # Three standard deviations of an AUROC of 60 against 60 prompts without any signal.
    np.testing.assert_allclose(scores.auroc.mean("fold"), 0.5, atol=0.16)
    scores = sweep(activations(), "label", ["ridge", "logistic_regression"], controls="shuffled_labels", seeds=12)
    mean = scores.auroc.mean(["fold", "seed"]).sel(layer=7)
    assert (mean.sel(probe=["ridge", "logistic_regression"]) > 0.95).all()
    np.testing.assert_allclose(mean.sel(probe=["shuffled_labels:ridge", "shuffled_labels:logistic_regression"]), 0.5, atol=0.06)
    selective = lz.selectivity(scores, "auroc")
    assert selective.probe.values.tolist() == ["ridge", "logistic_regression"]
    assert (selective.mean(["fold", "seed"]).sel(layer=7) > 0.4).all()
    np.testing.assert_allclose(
        selective.sel(probe="ridge"), scores.auroc.sel(probe="ridge") - scores.auroc.sel(probe="shuffled_labels:ridge").values
    )


def test_word_controls_equal_scikit_learns_pipelines_on_the_same_folds_and_know_no_layer() -> None:
    scores = sweep(activations(), "label", "mass_mean", controls=["bag_of_words", "tfidf"])
    # The texts are of ASCII words with single spaces, so a token is a word or a sign.
    options = {"token_pattern": r"\w+|[^\w\s]", "lowercase": False}
    for name, words in (("bag_of_words", CountVectorizer(**options)), ("tfidf", TfidfVectorizer(**options))):
        expected = cross_val_score(make_pipeline(words, LogisticRegression(max_iter=1000)), TEXTS, Y, cv=FOLDS)
        for layer in (0, 3, 7):
            np.testing.assert_array_equal(scores.accuracy.sel(probe=name, layer=layer), expected)
    assert scores.accuracy.sel(probe="bag_of_words").mean() > 0.8


def one_feature(values: Any) -> Any:
    return cross_val_score(make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)), np.reshape(values, (N, -1)), Y, cv=FOLDS)


def test_length_and_perplexity_are_logarithms_of_one_number() -> None:
    ds = dataset()
    scores = sweep(ds, "label", "mass_mean", controls=["length", "perplexity"]).isel(variable=0, layer=1)
    np.testing.assert_array_equal(
        scores.accuracy.sel(probe="length"), one_feature(np.float32(np.log([len(text.split()) for text in TEXTS])))
    )
    np.testing.assert_array_equal(scores.accuracy.sel(probe="perplexity"), one_feature(np.log(ds.perplexity.sel(statistic="mean").values)))
    characters = sweep(activations().drop_vars("n_tokens"), "label", "mass_mean", controls="length").isel(layer=0)
    np.testing.assert_array_equal(characters.accuracy.sel(probe="length"), one_feature(np.log([len(text) for text in TEXTS])))


def test_layer_0_and_the_embeddings_are_fitted_with_the_first_probe_and_drawn_flat() -> None:
    scores = sweep(dataset(), "label", ["mass_mean", "ridge"], controls=["layer_0", "embed", "majority"]).isel(variable=0)
    for layer in (0, 3, 7):
        np.testing.assert_array_equal(scores.auroc.sel(probe="layer_0", layer=layer), scores.auroc.sel(probe="mass_mean", layer=0))
    alone = sweep(dataset().embed_mean, "label", "mass_mean")
    np.testing.assert_array_equal(scores.auroc.sel(probe="embed", layer=7), alone.auroc.isel(layer=0, probe=0))
    np.testing.assert_array_equal(scores.accuracy.sel(probe="majority"), 0.5)


def test_a_random_direction_is_the_same_in_every_layer_and_fold_and_another_by_seed() -> None:
    given = activations()
    same = given.isel(layer=[0, 0]).assign_coords(layer=[1, 2])
    scores = sweep(same, "label", "mass_mean", controls="random_direction", seeds=[0, 1]).sel(probe="random_direction")
    np.testing.assert_array_equal(scores.auroc.sel(layer=1), scores.auroc.sel(layer=2))
    assert (scores.auroc.sel(seed=0) != scores.auroc.sel(seed=1)).any()


def test_the_callers_features_are_a_control_and_matched_by_prompt() -> None:
    hint = Y + RNG.normal(size=N)
    ds = dataset()
    scores = sweep(
        activations(), "label", "mass_mean", controls={"hint": hint, "pair": np.stack([hint, hint**2], axis=1), "majority": None}
    )
    assert scores.probe.values.tolist() == ["mass_mean", "hint", "pair", "majority"]
    np.testing.assert_array_equal(scores.accuracy.sel(probe="hint", layer=3), one_feature(hint))
    labelled = sweep(activations(), "label", "mass_mean", controls={"embeddings": ds.embed_mean})
    assert np.isfinite(labelled.accuracy).all()
    with pytest.raises(InvalidArgumentError, match="another order"):
        sweep(activations(), "label", "mass_mean", controls={"embeddings": ds.embed_mean[::-1]})


def test_shuffled_labels_are_dealt_to_prompts_whose_repeats_get_the_same() -> None:
    from lmprobe_zarr.probes.controls import shuffle_labels
    from lmprobe_zarr.probes.labels import parse_label_sets

    rows = np.r_[np.arange(N), np.arange(0, N, 3)]
    array = activations().isel(prompt=rows)
    (labels,) = parse_label_sets(array, "label")
    folds = ((np.arange(80), np.arange(80, 120)),)
    prompts = [str(row) for row in rows]
    dealt, drawn = shuffle_labels(labels, prompts, None, lambda _: folds, 0)
    assert drawn is folds
    np.testing.assert_array_equal(dealt[N:], dealt[np.arange(0, N, 3)])
    assert dealt[:N].sum() == Y.sum()
    assert 0.3 < (dealt == labels.values).mean() < 0.7
    assert (shuffle_labels(labels, prompts, None, lambda _: folds, 1)[0] != dealt).any()


def test_controls_of_a_regression_know_the_mean() -> None:
    target = Y * 2.0 + 0.1 * RNG.normal(size=N)
    scores = sweep(activations(), target, "ridge_regression", task="regression", controls=["majority", "bag_of_words", "shuffled_labels"])
    assert (scores.r2.sel(probe="majority") <= 0).all()
    assert scores.r2.sel(probe="ridge_regression", layer=7).mean() > 0.5
    assert scores.r2.sel(probe="shuffled_labels:ridge_regression").mean() < 0.1


@pytest.mark.parametrize(
    ("controls", "error", "message"),
    [
        ("bag", InvalidArgumentError, "no control 'bag': use some of shuffled_labels, bag_of_words"),
        (3, InvalidTypeError, "no names"),
        ({"mine": np.ones(3)}, InvalidArgumentError, r"control 'mine' has shape \(3,\), expected one row per prompt: \(120"),
        ({"mine": ["a"] * N}, InvalidTypeError, "expected numbers"),
        (
            {"mine": np.r_[np.nan, np.ones(N - 1)]},
            InvalidArgumentError,
            f"no finite value for 1 of 120 prompts .{lz.prompt_hash(TEXTS[0])}",
        ),
        ({"majority": np.ones(N)}, InvalidArgumentError, "takes no features"),
        ("embed", InvalidArgumentError, "needs the embeddings, which are not there"),
        ("perplexity", InvalidArgumentError, "needs the model's perplexities"),
        ({"mass_mean": np.ones(N)}, InvalidArgumentError, "a probe and a control are both called 'mass_mean'"),
    ],
)
def test_controls_that_cannot_be_are_refused(controls: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sweep(activations(), "label", "mass_mean", controls=controls)


def test_controls_that_need_what_is_not_stored_say_so() -> None:
    with pytest.raises(InvalidArgumentError, match="'bag_of_words' needs the prompts' texts, and there is no coordinate 'text'"):
        sweep(activations().drop_vars("text"), "label", "mass_mean", controls="bag_of_words")
    hidden = activations().assign_coords(text=("prompt", [""] * 2 + TEXTS[2:]))
    with pytest.raises(InvalidArgumentError, match=f"which 2 of 120 prompts lack .{lz.prompt_hash(TEXTS[0])}"):
        sweep(hidden, "label", "mass_mean", controls="tfidf")
    with pytest.raises(InvalidArgumentError, match="'layer_0' needs layer 0, and there are layers 3 to 7"):
        sweep(activations().sel(layer=[3, 7]), "label", "mass_mean", controls="layer_0")
    with pytest.raises(InvalidArgumentError, match="no shuffled labels to compare with"):
        lz.selectivity(sweep(activations(), "label", "mass_mean"))
