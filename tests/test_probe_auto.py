"""`Probe` with ``layers="auto"`` and ``"fast_auto"``: layers are chosen by the labels, and the probe is that of the chosen layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import xarray as xr

import lmprobe_zarr as lz
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, LabelError, LayerOutOfRangeError, NotFittedError

N, HIDDEN = 60, 8
Y = np.arange(N) % 2


def given(layers: tuple[int, ...] = (0, 3, 5, 8), best: int = 5) -> xr.DataArray:
    """Activations of some layers, of which one tells the label."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(len(layers), N, HIDDEN)).astype("float32")
    x[layers.index(best), :, :3] += 2 * Y[:, None]
    coords = {"layer": list(layers), "prompt": [lz.prompt_hash(f"text {i}") for i in range(N)]}
    return xr.DataArray(x, dims=("layer", "prompt", "hidden"), coords=coords, name="resid_mean")


X = given()

CHOICES: list[dict[str, Any]] = [
    {"layers": "auto", "auto_candidates": [0, 3, 5, 8], "auto_alpha": 0.15},
    {"layers": "auto", "auto_candidates": [0.0, 0.7, 1.0], "auto_alpha": 0.05},
    {"layers": "auto"},
    {"layers": "fast_auto", "auto_candidates": [0, 3, 5, -1], "fast_auto_top_k": 1},
    {"layers": "fast_auto", "auto_candidates": [0, 3, 5, 8]},
    {"layers": "fast_auto", "auto_candidates": [0, 3, 5, 8], "classifier": "ridge"},
    {"layers": "fast_auto", "auto_candidates": [3, 5], "preprocessing": "pca:3", "mass_mean_augment": True},
    {"layers": "auto", "auto_candidates": [3, 5, 8], "normalize_layers": "per_layer", "mass_mean_augment": True},
]


@pytest.mark.parametrize("options", CHOICES, ids=lambda options: " ".join(map(str, options.values())))
def test_the_probe_is_that_of_the_chosen_layers_named(options: dict[str, Any], tmp_path: Path) -> None:
    probe = lz.Probe(random_state=0, **options).fit_from_activations(X, Y)
    chosen = list(probe.layers_)
    assert probe.selected_layers_ == chosen
    assert 5 in chosen or 5 not in (probe.candidate_layers_ or [])
    assert set(chosen) <= set(probe.candidate_layers_ or [])
    assert probe.layer_importances_ is not None
    assert len(probe.layer_importances_) == len(probe.candidate_layers_ or [])
    named = {name: value for name, value in options.items() if "auto" not in name} | {"layers": chosen}
    plain = lz.Probe(random_state=0, **named).fit_from_activations(X.sel(layer=chosen), Y)
    part = X.sel(layer=chosen)
    np.testing.assert_array_equal(probe.predict(part), plain.predict(part))
    answer = "decision_function" if options.get("classifier") == "ridge" else "predict_proba_from_activations"
    np.testing.assert_array_equal(getattr(probe, answer)(part), getattr(plain, answer)(part))

    probe.save(tmp_path / "probe.safetensors")
    loaded = lz.Probe.load(tmp_path / "probe.safetensors")
    for name in ("layers", "auto_candidates", "auto_alpha", "fast_auto_top_k", "mass_mean_augment"):
        assert getattr(loaded, name) == getattr(probe, name), name
    assert (loaded.layers_, loaded.selected_layers_, loaded.candidate_layers_) == (probe.layers_, chosen, probe.candidate_layers_)
    np.testing.assert_array_equal(loaded.layer_importances_, probe.layer_importances_)
    np.testing.assert_array_equal(getattr(loaded, answer)(part), getattr(probe, answer)(part))
    assert f"fitted on layers {chosen}" in repr(probe)
    assert f"chosen from {', '.join(map(str, probe.candidate_layers_ or []))}" in probe._repr_html_()


def test_fractions_are_of_the_number_of_layers_and_numbers_are_layers() -> None:
    cases: list[tuple[Any, list[int]]] = [
        (None, [0, 3, 5]),
        ([0.0, 1.0], [0, 8]),
        ([0.5], [3]),
        ([-1, 0], [0, 8]),
        (np.array([5, 3]), [3, 5]),
    ]
    for candidates, wanted in cases:
        probe = lz.Probe(layers="fast_auto", auto_candidates=candidates).fit_from_activations(X, Y)
        assert probe.candidate_layers_ == wanted


def test_a_stronger_penalty_chooses_fewer_layers_and_the_one_with_the_label_last() -> None:
    numbers = [
        lz.Probe(layers="auto", auto_candidates=[0, 3, 5, 8], auto_alpha=alpha).fit_from_activations(X, Y).selected_layers_
        for alpha in (0.001, 0.05, 0.2)
    ]
    assert numbers[0] == [0, 3, 5, 8]
    assert numbers[-1] == [5]
    assert [len(each or []) for each in numbers] == sorted((len(each or []) for each in numbers), reverse=True)


def test_weights_count_in_a_fast_choice() -> None:
    x = given()
    x[0, : N // 2, 0] += 9 * Y[: N // 2].astype("float32")
    weights = np.where(np.arange(N) < N // 2, 1.0, 1e-6)
    options: dict[str, Any] = {"layers": "fast_auto", "auto_candidates": [0, 5], "fast_auto_top_k": 1, "classifier_kwargs": {"C": 0.01}}
    x[1:, : N // 2] = np.random.default_rng(0).normal(size=(3, N // 2, HIDDEN)).astype("float32")
    assert lz.Probe(**options).fit_from_activations(x, Y, sample_weight=weights).selected_layers_ == [0]
    assert lz.Probe(**options).fit_from_activations(x, Y, sample_weight=weights[::-1].copy()).selected_layers_ == [5]


def test_a_regression_is_chosen_for_by_coefficients() -> None:
    values = X.sel(layer=3).values[:, 0] * 3.0
    options: dict[str, Any] = {"auto_candidates": [0, 3, 5, 8], "fast_auto_top_k": 1, "task": "regression"}
    probe = lz.Probe(layers="fast_auto", **options).fit_from_activations(X, values)
    assert probe.selected_layers_ == [3]
    assert probe.score_from_activations(X.sel(layer=[3]), values) > 0.9


def test_three_classes_are_chosen_for_by_coefficients() -> None:
    x, y = given(), np.arange(N) % 3
    x.loc[{"layer": 8}] += (3 * (y[:, None] == np.arange(HIDDEN))).astype("float32")
    probe = lz.Probe(layers="fast_auto", auto_candidates=[0, 3, 8], fast_auto_top_k=1).fit_from_activations(x, y)
    assert probe.selected_layers_ == [8]


def test_one_layer_is_nothing_to_choose_from_and_other_fits_choose_nothing() -> None:
    probe = lz.Probe(layers="auto").fit_from_activations(X.sel(layer=5), Y)
    assert (probe.layers_, probe.selected_layers_, probe.candidate_layers_) == ((5,), [5], [5])
    plain = lz.Probe(layers=5).fit_from_activations(X.sel(layer=[3, 5]), Y)
    assert (plain.selected_layers_, plain.candidate_layers_, plain.layer_importances_) == (None, None, None)
    shares = plain.compute_layer_importance()
    assert shares.sum() == pytest.approx(1)
    assert plain.candidate_layers_ == [3, 5]
    assert shares[1] > shares[0]
    np.testing.assert_allclose(
        plain.compute_layer_importance("l2", normalize=False) / plain.compute_layer_importance("l2", False).sum(), shares
    )
    assert plain.selected_layers_ is None


def test_parameters_are_given_and_set_like_any_others() -> None:
    probe = lz.Probe("m", layers="auto", auto_candidates=[1, 2], auto_alpha=0.1, mass_mean_augment=True)
    assert "layers='auto', auto_candidates=[1, 2], auto_alpha=0.1, mass_mean_augment=True" in repr(probe)
    again = lz.Probe(**probe.get_params())
    assert again.get_params() == probe.get_params()
    assert probe.set_params(layers="fast_auto", fast_auto_top_k=2).fast_auto_top_k == 2
    with pytest.raises(InvalidArgumentError, match="chooses nothing"):
        probe.set_params(fast_auto_top_k=0)
    assert probe.fast_auto_top_k == 2


def bad(call: Callable[[], Any], error: type[Exception], words: str) -> Any:
    return pytest.param(call, error, words, id=words)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        bad(lambda: lz.Probe("m", layers="auto", auto_alpha=-1), InvalidArgumentError, "auto_alpha=-1 penalises nothing"),
        bad(lambda: lz.Probe("m", layers="auto", auto_candidates=[]), InvalidArgumentError, "auto_candidates is empty"),
        bad(lambda: lz.Probe("m", layers="auto", auto_candidates=cast("Any", "middle")), InvalidTypeError, "is no list"),
        bad(lambda: lz.Probe("m", layers="auto", auto_candidates=cast("Any", 0.5)), InvalidTypeError, "is no list"),
        bad(lambda: lz.Probe("m", layers="auto", auto_candidates=[1, 0.5]), InvalidArgumentError, "neither layer numbers nor fractions"),
        bad(lambda: lz.Probe("m", layers="auto", auto_candidates=[1.5]), InvalidArgumentError, "neither layer numbers nor fractions"),
        bad(lambda: lz.Probe("m", layers="auto", auto_candidates=[True]), InvalidArgumentError, "neither layer numbers nor fractions"),
        bad(lambda: lz.Probe("m", layers="auto", task="regression"), InvalidArgumentError, "for a regression use layers='fast_auto'"),
        bad(lambda: lz.Probe("m", layers="auto", classifier="attention"), InvalidArgumentError, "by which no layers are chosen"),
        bad(lambda: lz.Probe("m", layers="fast_auto", classifier="mlp"), InvalidArgumentError, "'mlp' has none: use layers='auto'"),
        bad(lambda: lz.Probe("m", layers="auto").fit(["a", "b", "c"], [0, 1, 2]), LabelError, "there are 3: use layers='fast_auto'"),
        bad(lambda: lz.Probe("m", layers="auto").fit(["a"], ["b"], sample_weight=[1, 2]), InvalidArgumentError, "takes no sample_weight"),
        bad(lambda: lz.Probe("m", mass_mean_augment=True).fit(["a", "b", "c"], [0, 1, 2]), LabelError, "there are 3 classes"),
        bad(lambda: lz.Probe("m", mass_mean_augment=True, task="regression"), InvalidArgumentError, "a regression has none"),
        bad(lambda: lz.Probe("m", mass_mean_augment=True, classifier="multimax"), InvalidArgumentError, "learns from the tokens"),
        bad(lambda: lz.Probe(layers="auto").fit_from_activations(np.ones((4, 6)), [0, 1, 0, 1]), InvalidArgumentError, "give a DataArray"),
        bad(lambda: lz.Probe(layers="auto", auto_candidates=[4]).fit_from_activations(X, Y), LayerOutOfRangeError, "layer 4 is not stored"),
        bad(lambda: lz.Probe(layers="fast_auto").compute_layer_importance(), NotFittedError, "call fit first"),
        bad(lambda: lz.Probe().fit_from_activations(X, Y).compute_layer_importance("l7"), InvalidArgumentError, "metric='l7' is unknown"),
    ],
)
def test_bad_arguments_say_what_to_do(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        call()
    assert len(str(caught.value).splitlines()) <= 2


# ------------------------------------------------------------------------------------------------------- with a model


POSITIVE = [f"I love the dog number {i}, what a walk it was" for i in range(8)]
NEGATIVE = [f"The {i} rainy foxes are sad" for i in range(8)]
TEST = ["I love a walk", "sad foxes", "the dog", "rainy"]


@pytest.mark.few(1)
@pytest.mark.model
@pytest.mark.parametrize("word", ["auto", "fast_auto"])
def test_the_model_runs_once_and_only_chosen_layers_are_read_to_predict(word: str, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("torch")
    llama, runs = request.getfixturevalue("tiny_models")("llama"), request.getfixturevalue("runs")
    probe = lz.Probe(str(llama), layers=word, auto_alpha=0.2, fast_auto_top_k=1, random_state=0)
    probe.warmup(POSITIVE)
    probe.fit(POSITIVE, NEGATIVE)
    assert sum(runs) == 16
    assert probe.candidate_layers_ == [0, 1, 2], "fractions 0.25, 0.5 and 0.75 of four layers"
    chosen = probe.selected_layers_
    assert chosen is not None
    assert len(chosen) < 3
    plain = lz.Probe(str(llama), layers=chosen, random_state=0).fit(POSITIVE, NEGATIVE)
    np.testing.assert_array_equal(probe.predict_proba(TEST), plain.predict_proba(TEST))
    assert sum(runs) == 20
    info = lz.discover_cached("llama", TEST[0])
    assert info is not None
    assert info.pooled == {"last_token": list(range(max(chosen) + 1))}, "no layer above those chosen is computed"
