"""What a probe learned on one dataset, tested on another; directions held against one another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold

import lmprobe_zarr as lz
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, LabelError
from lmprobe_zarr.probes import make_probe

HIDDEN = 10
FIRST, SECOND = np.eye(HIDDEN)[:2]


def dataset(name: str, direction: Any, n: int = 60, layers: tuple[int, ...] = (1, 2), hidden: int = HIDDEN) -> xr.DataArray:
    """Layer 1 knows nothing, layer 2 the label along a direction."""
    rng = np.random.default_rng(sum(name.encode()))
    y = np.arange(n) % 2
    x = rng.normal(size=(len(layers), n, hidden))
    x[-1] += 3 * (2 * y[:, None] - 1) * np.resize(direction, hidden)
    prompts = [lz.prompt_hash(f"{name} {i}") for i in range(n)]
    coords: dict[str, Any] = {"layer": list(layers), "prompt": prompts, "label": ("prompt", y), "model": "a/model"}
    return xr.DataArray(x, dims=("layer", "prompt", "hidden"), coords=coords, name="resid_mean")


DATA = {
    "same": dataset("same", FIRST),
    "alike": dataset("alike", FIRST),
    "other": dataset("other", SECOND),
    "against": dataset("no", -FIRST),
}


def test_a_shared_direction_carries_over_and_another_does_not() -> None:
    scores = lz.sweep_transfer(DATA, "label", ["mass_mean", "ridge"])
    assert scores.accuracy.dims == ("layer", "probe", "train", "test")
    area = scores.auroc.sel(layer=2, probe="mass_mean")
    for name in DATA:
        assert area.sel(train=name, test=name) > 0.98
    assert area.sel(train="same", test="alike") > 0.98
    assert 0.2 < area.sel(train="same", test="other") < 0.8
    assert area.sel(train="same", test="against") < 0.05
    assert (abs(scores.auroc.sel(layer=1) - 0.5) < 0.35).all()
    assert scores.attrs["model"] == "a/model"
    assert scores.converged.all()


def test_scores_equal_those_of_plain_fits() -> None:
    scores = lz.sweep_transfer({"a": DATA["same"], "b": DATA["other"]}, "label", "lda", 4, random_state=2)
    a, b = (DATA[name].sel(layer=2).values for name in ("same", "other"))
    y = DATA["same"].label.values
    probe = make_probe("lda").fit(a, y)
    at: dict[str, Any] = {"layer": 2, "probe": "lda", "train": "a"}
    assert scores.accuracy.sel(**at, test="b") == probe.score(b, y)
    assert scores.auroc.sel(**at, test="b") == pytest.approx(roc_auc_score(y, probe.decision_function(b)))
    folds = StratifiedKFold(4, shuffle=True, random_state=2).split(a, y)
    assert scores.accuracy.sel(**at, test="a") == pytest.approx(
        np.mean([make_probe("lda").fit(a[t], y[t]).score(a[u], y[u]) for t, u in folds])
    )


def test_prompts_that_were_trained_on_are_not_tested() -> None:
    whole = DATA["same"]
    scores = lz.sweep_transfer({"whole": whole, "half": whole.isel(prompt=slice(0, 30))}, "label")
    assert scores.n_test.values.tolist() == [[60, 0], [30, 30]]
    assert np.isnan(scores.accuracy.sel(train="whole", test="half")).all()
    rest = whole.isel(prompt=slice(30, None)).sel(layer=2)
    probe = make_probe("mass_mean").fit(whole.sel(layer=2).values[:30], whole.label.values[:30])
    assert scores.accuracy.sel(layer=2, train="half", test="whole", probe="mass_mean") == probe.score(rest.values, rest.label.values)


def test_layers_in_common_are_compared_and_other_widths_are_nan() -> None:
    wide = dataset("wide", FIRST, layers=(0, 2), hidden=2 * HIDDEN)
    scores = lz.sweep_transfer({"a": DATA["same"], "wide": wide}, "label")
    assert scores.layer.values.tolist() == [2]
    assert np.isnan(scores.accuracy.sel(train="a", test="wide")).all()
    assert scores.accuracy.sel(train="wide", test="wide") > 0.9


def test_lazy_data_on_any_scheduler_give_the_same(tmp_path: Path) -> None:
    store = lz.open_store(tmp_path / "acts", durable=False)
    for name, model in (("same", "m/a"), ("other", "m/b")):
        array = DATA[name]
        lz.write_activations(
            store,
            model=model,
            prompts=[f"{name} {i}" for i in range(60)],
            pooled={"resid_mean": {layer: array.sel(layer=layer).values.astype("f4") for layer in (1, 2)}},
            coords={"label": array.label.values},
        )
    lazy = {"a": store.dataset("m/a").resid_mean, "b": store.dataset("m/b").resid_mean}
    expected = lz.sweep_transfer({name: array.load() for name, array in lazy.items()}, "label")
    chunked = {"a": store.dataset("m/a", chunks={}).resid_mean, "b": store.dataset("m/b").resid_mean.transpose("hidden", "prompt", "layer")}
    for given, scheduler in ((lazy, "threads"), (chunked, "synchronous")):
        got = lz.sweep_transfer(given, "label", scheduler=scheduler)
        xr.testing.assert_identical(got.accuracy, expected.accuracy)


def test_datasets_without_a_common_sweep_are_refused() -> None:
    a = DATA["same"]
    with pytest.raises(InvalidArgumentError, match="nothing to carry over to"):
        lz.sweep_transfer({"a": a}, "label")
    with pytest.raises(InvalidTypeError, match="mapping from name to DataArray"):
        lz.sweep_transfer(a, "label")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match=r"no layer in common: a: \[1\]; b: \[2\]"):
        lz.sweep_transfer({"a": a.sel(layer=[1]), "b": a.sel(layer=[2])}, "label")
    with pytest.raises(LabelError, match=r"'b' has the classes \[1, 2\] and 'a' \[0, 1\]"):
        lz.sweep_transfer({"a": a, "b": DATA["alike"]}, {"a": "label", "b": a.label.values + 1})
    holed = DATA["alike"].copy(deep=True)
    holed[1, 7, 0] = np.nan
    with pytest.raises(InvalidArgumentError, match=rf"layer 2 of 'b' is NaN or infinite for 1 of 60 prompts \({holed.prompt.values[7]}\)"):
        lz.sweep_transfer({"a": a, "b": holed}, "label")


def test_where_it_runs_is_checked_as_in_a_sweep() -> None:
    for given, message in (
        ({"scheduler": "bogus"}, "scheduler='bogus' is unknown"),
        ({"n_workers": 0}, "n_workers=0 is not a number of workers"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            lz.sweep_transfer(DATA, "label", **given)
        with pytest.raises(InvalidArgumentError, match=message):
            lz.sweep(DATA["same"], "label", **given)
    with pytest.raises(InvalidArgumentError, match="n_workers=0 is not a number of workers"):
        lz.fit_directions(DATA["same"], "label", n_workers=0)


def test_integers_of_four_bytes_are_computed_in_float64() -> None:
    # Two classes that differ by 1 at 2**24, where float32 has no odd numbers.
    rng = np.random.default_rng(0)
    data = {}
    for name in ("a", "b"):
        y = np.arange(40) % 2
        values = np.column_stack([2**24 + y, rng.integers(0, 2, 40)]).astype(np.int32)
        data[name] = xr.DataArray(
            values, dims=("prompt", "hidden"), coords={"prompt": [f"{name}{i}" for i in range(40)], "label": ("prompt", y)}
        )
    assert (lz.sweep_transfer(data, "label").accuracy == 1).all()


def test_cosines_are_labelled_by_name_and_layer() -> None:
    coef = {name: lz.fit_tokens(array, "label", "mass_mean") for name, array in DATA.items()}
    matrix = lz.cosine_similarity(coef)
    assert matrix.dims == ("direction", "other")
    assert matrix.direction.values.tolist()[:2] == ["same layer 1", "same layer 2"]
    assert matrix.sel(direction="same layer 2", other="alike layer 2") > 0.8
    assert matrix.sel(direction="same layer 2", other="against layer 2") < -0.8
    assert abs(matrix.sel(direction="same layer 2", other="other layer 2")) < 0.5
    np.testing.assert_allclose(np.diag(matrix), 1)
    np.testing.assert_allclose(matrix, matrix.values.T)
    u, v = coef["same"].coef.values[0], coef["other"].coef.values[1]
    assert matrix[0, 5] == pytest.approx(u @ v / np.linalg.norm(u) / np.linalg.norm(v))
    assert matrix.coords["other_layer"].values.tolist() == [1, 2] * 4


def test_directions_of_other_widths_and_of_no_length_have_no_cosine() -> None:
    directions = xr.DataArray(np.eye(3), dims=("layer", "hidden"), coords={"layer": [0, 1, 2]})
    directions[2] = 0
    matrix = lz.cosine_similarity({"a": directions, "b": xr.DataArray(np.ones(4), dims="hidden")})
    assert matrix.direction.values.tolist() == ["a layer 0", "a layer 1", "a layer 2", "b"]
    np.testing.assert_array_equal(matrix[:3, 3], [np.nan] * 3)
    np.testing.assert_array_equal(matrix[2], [np.nan] * 4)
    assert matrix[3, 3] == pytest.approx(1)
    by_class = lz.cosine_similarity(xr.DataArray(np.eye(2), dims=("class", "hidden"), coords={"class": ["x", "y"]}))
    assert by_class.direction.values.tolist() == ["x", "y"]
    with pytest.raises(InvalidTypeError, match="no coefficients over hidden"):
        lz.cosine_similarity({"a": directions.rename(hidden="unit")})
    with pytest.raises(InvalidArgumentError, match="empty"):
        lz.cosine_similarity({})
