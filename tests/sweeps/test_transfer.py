"""What a probe learned on one dataset, tested on another; directions held against one another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from sklearn.exceptions import ConvergenceWarning, FitFailedWarning
from sklearn.linear_model import LogisticRegression
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
        lz.cosine_similarity({"a": directions.rename(hidden="class")})
    with pytest.raises(InvalidArgumentError, match="empty"):
        lz.cosine_similarity({})


def facts(name: str, seed: int, *, identity: str = "prompt", first: int = 0) -> xr.DataArray:
    """Thirty facts in four wordings each, with labels at random."""
    rng = np.random.default_rng(seed)
    fact = np.repeat(np.arange(30), 4)
    x = rng.normal(size=(30, 64))[fact] + 0.3 * rng.normal(size=(120, 64))
    texts = [f"{name} {i}" for i in range(120)]
    known = {"prompt": [lz.prompt_hash(text) for text in texts], "text": ("prompt", texts), "number": np.arange(120)}
    coords: dict[str, Any] = {"label": ("prompt", rng.permutation(np.tile([0, 1], 15))[fact]), "fact": ("prompt", fact + first)}
    if identity:
        coords["prompt" if identity == "number" else identity] = known[identity]
    return xr.DataArray(x.astype("f4"), dims=("prompt", "hidden"), coords=coords)


def test_groups_are_on_one_side_of_the_diagonal_and_of_the_rest() -> None:
    data = {f"set {k}": facts(f"set {k}", k, first=100 * k) for k in range(4)}
    same = np.eye(4, dtype=bool)
    scores = lz.sweep_transfer(data, "label", "ridge", groups="fact").isel(layer=0, probe=0)
    leaking = lz.sweep_transfer(data, "label", "ridge").isel(layer=0, probe=0)
    assert leaking.accuracy.values[same].mean() > 0.95
    assert abs(scores.accuracy.values[same].mean() - 0.5) < 0.15
    np.testing.assert_array_equal(scores.accuracy.values[~same], leaking.accuracy.values[~same])
    assert scores.attrs["groups"] == "fact"
    # The diagonal is the mean of what a sweep of that dataset scores. Its ridge is solved otherwise, and rounds otherwise.
    for name, array in data.items():
        swept = lz.sweep(array, "label", "ridge", groups="fact", metrics="accuracy").accuracy.mean()
        assert float(scores.accuracy.sel(train=name, test=name)) == pytest.approx(float(swept), abs=0.01)
    half = {"a": data["set 0"], "b": data["set 0"].isel(prompt=slice(0, 60)).assign_coords(prompt=[f"other {i}" for i in range(60)])}
    shared = lz.sweep_transfer(half, "label", "ridge", groups={"a": "fact", "b": half["b"].fact.values})
    assert shared.n_test.values.tolist() == [[120, 0], [60, 60]]
    assert "train a, test b: every prompt, or group of 'fact', is in both" in shared.accuracy.attrs["nan_reasons"]


@pytest.mark.few(6)
@pytest.mark.parametrize(("first", "second", "unseen"), [
    ("prompt", "prompt", 60), ("text", "text", 60), ("prompt", "text", 60), ("text", "prompt", 60),
    ("", "", 120), ("number", "number", 120), ("prompt", "", 120), ("number", "prompt", 120),
])  # fmt: skip
def test_prompts_are_known_across_datasets_by_hash_or_text_and_never_by_number(first: str, second: str, unseen: int) -> None:
    # The second dataset has half of the prompts of the first: its rows 0 to 59 are the rows 60 to 119.
    a = facts("a", 0, identity=first)
    b = facts("a", 0, identity=second).isel(prompt=slice(60, None))
    more = facts("b", 1, identity=second).isel(prompt=slice(0, 60))
    if second == "number":
        b, more = b.assign_coords(prompt=np.arange(60)), more.assign_coords(prompt=np.arange(60, 120))
    scores = lz.sweep_transfer({"a": a, "b": xr.concat([b, more], "prompt")}, "label", "ridge")
    assert scores.n_test.values.tolist() == [[120, unseen], [unseen, 120]]
    assert np.isfinite(scores.accuracy).all()
    nameless = [name for name, identity in (("a", first), ("b", second)) if identity in ("", "number")]
    assert scores.attrs["without_identity"] == json.dumps(nameless)


def test_missing_labels_splitters_and_estimators_are_taken_as_in_a_sweep() -> None:
    a, b = DATA["same"], DATA["alike"]
    some = np.array([None, *a.label.values[1:]], object)
    with pytest.raises(LabelError, match=r"labels of 'a': labels 'labels' miss 1 of 60(?s:.*)missing='drop'"):
        lz.sweep_transfer({"a": a, "b": b}, {"a": some, "b": "label"})
    given: dict[str, Any] = {"probes": LogisticRegression(), "cv": StratifiedKFold(3)}
    scores = lz.sweep_transfer({"a": a, "b": b}, {"a": some, "b": "label"}, **given, missing="drop")
    rest = lz.sweep_transfer({"a": a.isel(prompt=slice(1, None)), "b": b}, "label", **given)
    np.testing.assert_array_equal(scores.accuracy, rest.accuracy)
    assert scores.n_train.values.tolist() == [[39, 59], [60, 40]]
    assert scores.attrs["n_dropped"] == [1, 0]
    assert scores.probe.values.tolist() == ["LogisticRegression"]
    pairs = [(np.arange(30), np.arange(30, 60))]
    with pytest.raises(InvalidArgumentError, match="every dataset has rows of its own"):
        lz.sweep_transfer({"a": a, "b": b}, "label", cv=pairs)


class Failing(LogisticRegression):  # type: ignore[misc]
    """Fails on the dataset in which the sum of all values is negative."""

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:  # noqa: N803
        if X.sum() < 0:
            raise ValueError("never on a negative sum")
        return super().fit(X, y, sample_weight)


def test_a_fit_that_fails_is_nan_with_its_reason_and_early_stops_are_counted() -> None:
    a, b = abs(DATA["same"]), -abs(DATA["alike"])
    with pytest.warns(FitFailedWarning, match="Failing: ValueError: never on a negative sum"):
        scores = lz.sweep_transfer({"a": a, "b": b}, "label", {"Failing": Failing(), "ridge": "ridge"})
    assert np.isnan(scores.accuracy.sel(probe="Failing", train="b")).all()
    assert np.isfinite(scores.accuracy.sel(probe="Failing", train="a")).all()
    assert np.isfinite(scores.accuracy.sel(probe="ridge")).all()
    assert "never on a negative sum" in scores.accuracy.attrs["nan_reasons"]
    with pytest.raises(InvalidArgumentError, match="never on a negative sum"):
        lz.sweep_transfer({"a": b, "b": b}, "label", Failing())
    with pytest.raises(InvalidArgumentError, match="of layer 1: ValueError: never on a negative sum"):
        lz.fit_directions(b, "label", Failing())
    slow = LogisticRegression(max_iter=1)
    with pytest.warns(ConvergenceWarning, match="8 of 8 fits stopped"):
        assert not lz.sweep_transfer({"a": DATA["same"], "b": DATA["alike"]}, "label", slow).converged.any()
