"""Probes on tokens: the same as in memory, whatever is streamed where; whose labels; which tokens; scores by token and by prompt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from clusters import local_client
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import KFold, StratifiedGroupKFold, StratifiedKFold
from xarray.backends import BackendArray
from xarray.core import indexing

import lmprobe_zarr as lz
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, LabelError, MissingPromptsError
from lmprobe_zarr.probes import coefficients, make_probe
from lmprobe_zarr.probes.sufficient import EXACT
from lmprobe_zarr.probes.token_controls import deal_labels
from lmprobe_zarr.probes.token_labels import plan_token_folds, select_labelled_tokens
from lmprobe_zarr.sweeps import token_descents, token_rows
from lmprobe_zarr.sweeps import tokens as token_sweeps

LAYERS, PROMPTS, HIDDEN = (2, 5), 40, 12
TEXTS = [f"prompt number {i}" for i in range(PROMPTS)]
Y = np.array([0, 1] * (PROMPTS // 2))
COUNTS = np.random.default_rng(9).integers(2, 9, PROMPTS)
N = int(COUNTS.sum())
OF = np.repeat(np.arange(PROMPTS), COUNTS)
POSITION = np.concatenate([np.arange(count) for count in COUNTS])


def values(dtype: str = "float32") -> Any:
    """Layer 2 knows nothing, layer 5 has the label along one direction."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(len(LAYERS), N, HIDDEN)) + rng.normal(size=HIDDEN)
    x[1] += 2 * Y[OF][:, None] * DIRECTION
    return x.astype(dtype)


DIRECTION = np.r_[np.ones(3), np.zeros(HIDDEN - 3)] / np.sqrt(3)


def tokens(data: Any = None) -> xr.DataArray:
    coords: dict[str, Any] = {
        "layer": list(LAYERS),
        "prompt": ("token", np.array([lz.prompt_hash(text) for text in TEXTS])[OF]),
        "position": ("token", POSITION),
        "text": ("token", np.array(TEXTS)[OF]),
        "label": ("token", Y[OF]),
        "model": "a/model",
    }
    data = values() if data is None else data
    array = xr.DataArray(data, dims=("layer", "token", "hidden"), coords=coords, name="resid")
    return array.set_xindex(["prompt", "position"], lz.TokenIndex)


@pytest.fixture
def stored(tmp_path: Path) -> Any:
    """The same activations in a store, as float16."""
    store = lz.open_store(tmp_path / "acts", durable=False)
    split = [np.split(layer, np.cumsum(COUNTS)[:-1]) for layer in values("float16")]
    lz.write_activations(
        store, model="a/model", prompts=TEXTS, activations={"resid": dict(zip(LAYERS, split, strict=True))}, coords={"label": Y}
    )
    return store


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_rows, "BLOCK_BYTES", 8 * HIDDEN * 16)


def in_memory(name: str, x: Any, y: Any) -> Any:
    coef, intercept = coefficients(make_probe(name).fit(x, y))
    return coef[0, 0], intercept[0]


# -- fits ------------------------------------------------------------------------------------------------------------------


@pytest.mark.few(6)
@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_exact_probes_equal_the_fit_in_memory(name: str, dtype: str, small_blocks: None) -> None:
    data = values(dtype)
    fitted = lz.fit_tokens(tokens(data), "label", name, n_workers=3)
    assert fitted.coef.dims == ("layer", "hidden")
    for i, layer in enumerate(data.astype("float64")):
        coef, intercept = in_memory(name, layer, Y[OF])
        np.testing.assert_allclose(fitted.coef[i], coef, rtol=1e-6, atol=1e-6 * np.abs(coef).max())
        np.testing.assert_allclose(fitted.intercept[i], intercept, rtol=1e-6, atol=1e-8)


def test_a_known_direction_is_recovered_and_the_result_records_its_arguments() -> None:
    for name in EXACT:
        fitted = lz.fit_tokens(tokens(), "label", name)
        coef = fitted.coef.sel(layer=5).values
        assert coef @ DIRECTION / np.linalg.norm(coef) > 0.9, name
    expected = {"probe": "mass_mean_cov", "labels": "label", "classes": [0, 1], "n_tokens": N, "n_prompts": PROMPTS, "model": "a/model"}
    assert {key: fitted.attrs[key] for key in expected} == expected
    assert fitted.layer.values.tolist() == list(LAYERS)
    assert fitted.converged.all()


def many(seed: int = 0, n: int = 20_000) -> tuple[xr.DataArray, Any]:
    """Enough tokens for a descent, sorted by label as a store may be, with a known direction of the log odds."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, HIDDEN)) * np.linspace(1, 100, HIDDEN)
    y = (rng.uniform(size=n) < 1 / (1 + np.exp(-2 * x[:, 0] - 0.02 * x[:, -1]))).astype(int)
    order = np.argsort(y, kind="stable")
    coords = {"prompt": ("token", (np.arange(n) // 10).astype(str)), "position": ("token", np.arange(n) % 10)}
    return xr.DataArray(x[order].astype("f4")[None], dims=("layer", "token", "hidden"), coords=coords), y[order]


def test_minibatches_find_the_direction_of_the_log_odds_and_their_order_is_the_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_rows, "BLOCK_BYTES", 8 * HIDDEN * 2000)
    array, y = many()
    fitted = lz.fit_tokens(array, y, "sgd")
    coef = fitted.coef.values[0] * np.linspace(1, 100, HIDDEN)
    true = np.r_[2, np.zeros(HIDDEN - 2), 2]
    assert coef @ true / np.linalg.norm(coef) / np.linalg.norm(true) > 0.97
    assert fitted.converged.all()
    xr.testing.assert_identical(lz.fit_tokens(array, y, "sgd").coef, fitted.coef)
    assert (lz.fit_tokens(array, y, "sgd", random_state=1).coef != fitted.coef).any()
    held, truth = many(seed=1)
    assert roc_auc_score(truth, lz.score_tokens(fitted, held)[0]) > 0.87  # 0.884 with the true direction


@pytest.mark.few(1)
@pytest.mark.parametrize("n_classes", [2, 3])
def test_logistic_regression_by_passes_is_the_fit_in_memory(n_classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    monkeypatch.setattr(token_rows, "BLOCK_BYTES", 8 * HIDDEN * 100)
    array, y = many(n=1500)
    array = array + 1000.0
    y = np.where(np.arange(1500) % 7 == 0, n_classes - 1, y)
    x = array.values[0].astype(float)

    def optimum(rows: Any) -> Any:
        converged = LogisticRegression(solver="newton-cholesky", tol=1e-10, max_iter=500)
        return make_pipeline(StandardScaler(), converged).fit(x[rows], y[rows])

    whole = optimum(slice(None))
    for given, workers in ((array, 1), (array, 4), (array.chunk({"token": 400}), 2)):
        fitted = lz.fit_tokens(given, y, "logistic_regression", n_workers=workers)
        assert fitted.converged.all()
        scaled = fitted.coef.values[0] * whole[0].scale_
        np.testing.assert_allclose(np.atleast_2d(scaled), whole[1].coef_, atol=1e-4 * max(1, np.abs(whole[1].coef_).max()))
        np.testing.assert_allclose(lz.score_tokens(fitted, given)[0], whole.decision_function(x) - (
            whole[1].intercept_.mean() if n_classes > 2 else 0), atol=2e-3)  # fmt: skip
    # Folds of whole prompts, given as pairs, so that both sides have the same.
    side = [np.isin(np.arange(150) % 3, [fold]) for fold in range(3)]
    scores = lz.sweep_tokens(array, y, ["ridge", "logistic_regression"], cv=[(~each, each) for each in side])
    for fold, each in enumerate(side):
        test = np.repeat(each, 10)
        found = scores.accuracy.sel(probe="logistic_regression", fold=fold).item()
        assert found == pytest.approx(optimum(~test).score(x[test], y[test]), abs=1.5 / test.sum())


def test_passes_that_did_not_converge_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.exceptions import ConvergenceWarning

    from lmprobe_zarr.probes import passes

    monkeypatch.setattr(passes, "_MOST_PASSES", 3)
    with pytest.warns(ConvergenceWarning, match="2 of 2 fits stopped"):
        fitted = lz.fit_tokens(tokens(), "label", "logistic_regression")
    assert not fitted.converged.any()


def test_a_descent_that_did_not_converge_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.exceptions import ConvergenceWarning

    monkeypatch.setattr(token_descents, "_EPOCHS", (2, 2))
    with pytest.warns(ConvergenceWarning, match="2 of 2 fits stopped"):
        fitted = lz.fit_tokens(tokens(), "label", "sgd")
    assert not fitted.converged.any()


@pytest.mark.few(1)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("name", [*EXACT, "sgd"])
def test_lazy_dask_and_memory_give_the_same_on_every_scheduler(
    stored: Any, name: str, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_descents, "_EPOCHS", (2, 2))
    memory = stored.tokens().resid.load()
    expected = lz.fit_tokens(memory, "label", name, scheduler="synchronous")
    lazy, dask = stored.tokens().resid, stored.tokens(chunks={"token": 23}).resid
    turned = lazy.transpose("hidden", "token", "layer"), dask.transpose("token", "hidden", "layer")
    for given, workers in ((memory, 1), (memory, 7), (lazy, 7), (dask, 3), (turned[0], 1), (turned[1], 2)):
        fitted = lz.fit_tokens(given, "label", name, n_workers=workers)
        np.testing.assert_allclose(fitted.coef, expected.coef, rtol=1e-9, atol=1e-12)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_processes_and_a_client_give_the_same(stored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_descents, "_EPOCHS", (4, 4))
    memory = stored.tokens().resid.load()
    names = ["ridge", "lda", "sgd"]
    expected = lz.sweep_tokens(memory, "label", names, 3)
    got = []
    apart = lz.fit_tokens(stored.tokens().resid, "label", "lda", scheduler="processes", n_workers=2)
    np.testing.assert_allclose(apart.coef, lz.fit_tokens(memory, "label", "lda").coef, rtol=1e-9)
    with local_client(workers=2) as client:
        for given in (stored.tokens().resid, stored.tokens(chunks={"token": 50}).resid, memory):
            got.append(lz.sweep_tokens(given, "label", names, 3, client=client))
            scored = lz.score_tokens(lz.fit_tokens(given, "label", client=client), given, client=client)
            np.testing.assert_allclose(scored, lz.score_tokens(lz.fit_tokens(memory, "label"), memory), rtol=1e-5, atol=1e-6)
    for scores in got:
        for name in ("accuracy", "auroc", "n_train", "n_test"):
            xr.testing.assert_allclose(scores[name], expected[name], rtol=1e-9)


class Counting(BackendArray):
    """A lazy array that notes how many rows each read takes."""

    def __init__(self, data: Any) -> None:
        self.data, self.shape, self.dtype = data, data.shape, data.dtype
        self.taken: list[int] = []

    def __getitem__(self, key: Any) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._take)

    def _take(self, key: Any) -> Any:
        found = self.data
        for axis, index in reversed(list(enumerate(key))):
            found = found[(slice(None),) * axis + (index,)]
        self.taken.append(found.shape[-2] if found.ndim > 1 else 1)
        return found


def test_a_lazy_layer_is_read_block_by_block_once_per_pass(small_blocks: None) -> None:
    counting = Counting(values())
    lazy = tokens().copy()
    lazy = lazy.drop_indexes(["prompt", "position"])
    lazy = xr.DataArray(xr.Variable(lazy.dims, indexing.LazilyIndexedArray(counting), fastpath=True), coords=lazy.coords, name="resid")
    scores = lz.sweep_tokens(lazy, "label", ["ridge", "lda", "mass_mean"], 4, n_workers=2)
    assert scores.sizes["fold"] == 4
    blocks = [rows for rows in counting.taken if rows != N]  # what is no more than a pilot for the units of the sums is read whole here
    assert max(blocks) == 16
    assert sum(blocks) == 2 * len(LAYERS) * N  # one pass to fit four folds of three probes, one to score


def test_more_classes_have_a_direction_each() -> None:
    y = np.array(["red", "green", "blue"])[np.arange(PROMPTS) % 3]
    for name in EXACT:
        fitted = lz.fit_tokens(tokens(), y, name)
        assert fitted.coef.dims == ("layer", "class", "hidden")
        assert fitted["class"].values.tolist() == ["blue", "green", "red"]
        expected = make_probe(name).fit(values("float64")[1], y[OF])
        scores = lz.score_tokens(fitted, tokens())
        assert scores.dims == ("layer", "token", "class")
        np.testing.assert_allclose(scores[1], expected.decision_function(values("float64")[1]), rtol=1e-4, atol=1e-4)


def test_prompts_can_stand_for_tokens() -> None:
    pooled = tokens().lz.pool("mean")
    fitted = lz.fit_tokens(pooled, "label", "lda")
    np.testing.assert_allclose(fitted.coef[1], in_memory("lda", pooled[1].values.astype("float64"), Y)[0], rtol=1e-4, atol=1e-6)
    assert lz.score_tokens(fitted, pooled).dims == ("layer", "prompt")


# -- sweeps ----------------------------------------------------------------------------------------------------------------


def test_scores_equal_a_plain_loop_over_the_same_folds(small_blocks: None) -> None:
    data = values("float64")
    scores = lz.sweep_tokens(tokens(data), "label", list(EXACT), 4, random_state=3)
    folds = list(StratifiedKFold(4, shuffle=True, random_state=3).split(np.zeros((PROMPTS, 1)), Y))
    for i, layer in enumerate(data):
        for j, name in enumerate(EXACT):
            for k, (train, test) in enumerate(folds):
                learned, held = np.isin(OF, train), np.isin(OF, test)
                probe = make_probe(name).fit(layer[learned], Y[OF][learned])
                assert scores.accuracy[i, j, k] == pytest.approx(probe.score(layer[held], Y[OF][held]), abs=1e-12)
                assert scores.auroc[i, j, k] == pytest.approx(roc_auc_score(Y[OF][held], probe.decision_function(layer[held])), abs=1e-12)
    assert scores.n_test.values.tolist() == [int(np.isin(OF, test).sum()) for _, test in folds]
    assert scores.attrs["cv"] == "StratifiedKFold(n_splits=4, random_state=3, shuffle=True)"
    assert 0.3 < scores.auroc.sel(layer=2).mean() < 0.7
    assert scores.auroc.sel(layer=5).mean() > 0.8
    assert scores.lz.plot("auroc").get_xlabel() == "layer"


def test_folds_that_overlap_are_sums_of_cells_too() -> None:
    pairs = [(np.arange(30), np.arange(30, 40)), (np.arange(10, 40), np.arange(10)), (np.arange(5, 25), np.arange(25, 40))]
    data = values("float64")
    scores = lz.sweep_tokens(tokens(data), "label", "lda", pairs)
    for k, (train, test) in enumerate(pairs):
        learned, held = np.isin(OF, train), np.isin(OF, test)
        probe = make_probe("lda").fit(data[1][learned], Y[OF][learned])
        assert scores.accuracy[1, 0, k] == pytest.approx(probe.score(data[1][held], Y[OF][held]))


def test_folds_that_need_too_many_sums_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_sweeps, "_MOST_CELLS", 4)
    with pytest.raises(InvalidArgumentError, match=r"5 folds cut the prompts into 5 sets.*at most 4 folds"):
        lz.sweep_tokens(tokens(), "label", "ridge", 5)


def test_groups_stay_together_and_pooled_scores_are_of_prompts() -> None:
    family = np.arange(PROMPTS) // 4
    scores = lz.sweep_tokens(tokens(), "label", "ridge", 3, groups=family, pooling="score:max")
    assert scores.n_test.sum() == PROMPTS
    assert scores.attrs["pooling"] == "score:max"
    folds = list(StratifiedGroupKFold(3, shuffle=True, random_state=0).split(np.zeros((PROMPTS, 1)), Y, family))
    data = values("float64")[1]
    for k, (train, test) in enumerate(folds):
        probe = make_probe("ridge").fit(data[np.isin(OF, train)], Y[OF][np.isin(OF, train)])
        best = [probe.decision_function(data[prompt == OF]).max() for prompt in test]
        assert scores.auroc[1, 0, k] == pytest.approx(roc_auc_score(Y[test], best), abs=1e-6)
        assert scores.accuracy[1, 0, k] == pytest.approx(np.mean((np.array(best) > 0) == Y[test]))


def test_labels_may_differ_within_a_prompt() -> None:
    first = xr.zeros_like(tokens().isel(layer=0, hidden=0, drop=True), dtype=int)
    first[:] = POSITION == 0
    scores = lz.sweep_tokens(tokens(), first, "ridge", 4)
    assert scores.attrs["class_counts"] == [N - PROMPTS, PROMPTS]
    assert scores.n_test.sum() == N
    assert "whole prompts" in scores.attrs["cv"]
    with pytest.raises(InvalidArgumentError, match="differ within a prompt"):
        lz.sweep_tokens(tokens(), first, pooling="max")
    with pytest.raises(LabelError, match="cv=50 folds of 40 prompts"):
        lz.sweep_tokens(tokens(), first, cv=50)


# -- labels, masks, and what is wrong with them ----------------------------------------------------------------------------


# -- controls --------------------------------------------------------------------------------------------------------------

#: Of each token, among 30; the class of a token type is what its number says, so that identity alone tells it.
IDS = np.random.default_rng(3).integers(0, 30, N)


def identified(data: Any = None) -> xr.DataArray:
    """Layers 0 and 1: noise; and every token id as an axis of its own."""
    if data is None:
        noise = np.random.default_rng(1).normal(size=(2, N, 30)).astype("float32")
        noise[1] = np.eye(30, dtype="float32")[IDS] + noise[1] / 100
        data = noise
    coords: dict[str, Any] = {name: value for name, value in tokens().coords.items() if name in ("text", "label", "model")}
    array = xr.DataArray(data, dims=("layer", "token", "hidden"), coords={**coords, "layer": [0, 1]}, name="resid")
    array = array.assign_coords(
        prompt=("token", tokens().prompt.values), position=("token", POSITION), token_id=("token", IDS), kind_of_token=("token", IDS % 2)
    )
    return array.set_xindex(["prompt", "position"], lz.TokenIndex)


def test_controls_stand_beside_the_probes_and_say_what_a_score_is_worth() -> None:
    requested = ["shuffled_labels", "control_task", "token_identity", "position", "layer_0", "majority"]
    scores = lz.sweep_tokens(identified(), "kind_of_token", ["ridge", "mass_mean"], controls=requested)
    names = ["ridge", "mass_mean", *(f"{dealt}:{probe}" for dealt in requested[:2] for probe in ("ridge", "mass_mean")), *requested[2:]]
    assert scores.probe.values.tolist() == names
    assert scores.kind.values.tolist() == ["probe"] * 2 + ["control"] * 8
    assert scores.control.values.tolist() == ["", "", "shuffled_labels", "shuffled_labels", "control_task", "control_task", *requested[2:]]
    mean = scores.accuracy.mean("fold").to_pandas()
    assert mean.loc[1, "ridge"] > 0.98
    assert mean.loc[1, "token_identity"] > 0.98, "nothing but the token tells the label, and the table says so"
    assert mean.loc[1, "control_task:ridge"] > 0.95, "and a probe with such activations learns any labels of tokens by heart"
    for chance in ("shuffled_labels:ridge", "shuffled_labels:mass_mean", "position", "layer_0", "majority"):
        assert 0.35 < mean.loc[1, chance] < 0.65, chance
    assert mean.loc[0, "control_task:ridge"] < 0.65, "noise does not even learn these"
    for same in ("token_identity", "position", "majority", "layer_0"):
        assert mean.loc[0, same] == mean.loc[1, same], "no layer knows more of it"
    np.testing.assert_array_equal(scores.auroc.sel(probe="layer_0", layer=1), scores.auroc.sel(probe="ridge", layer=0))
    assert lz.selectivity(scores, control="control_task").sel(layer=1, probe="ridge").mean() < 0.05, "Hewitt and Liang's point"
    assert lz.selectivity(scores).sel(layer=1, probe="ridge").mean() > 0.35
    plain = lz.sweep_tokens(identified(), "kind_of_token", ["ridge", "mass_mean"])
    xr.testing.assert_identical(plain.accuracy, scores.accuracy.isel(probe=slice(0, 2)))


@pytest.mark.parametrize("labels", ["kind_of_token", "label", "three"])
def test_tables_of_counts_equal_a_plain_loop(labels: str) -> None:
    array = identified().assign_coords(three=("token", (IDS + POSITION) % 3))
    array = array.isel(token=np.flatnonzero(IDS != 29))  # in the array's own order, with some left out
    folds = list(KFold(4, shuffle=True, random_state=0).split(np.zeros(PROMPTS)))
    scores = lz.sweep_tokens(array, labels, "ridge", cv=folds, controls=["token_identity", "position", "majority"])
    prompts = array.prompt.values
    order = list(dict.fromkeys(prompts.tolist()))
    for control, key in (
        ("token_identity", array.token_id.values),
        ("position", array.position.values),
        ("majority", np.zeros(len(prompts))),
    ):
        for fold, (train, test) in enumerate(folds):
            learned, tested = (np.isin(prompts, [order[i] for i in side]) for side in (train, test))
            y = array[labels].values
            classes, sizes = np.unique(y[learned], return_counts=True)
            shares = []
            for value in key[tested]:
                seen = np.array([((key == value) & (y == c) & learned).sum() for c in classes])
                shares.append((seen + sizes / sizes.sum()) / (seen.sum() + 1))
            probabilities = np.array(shares)
            right = (classes[probabilities.argmax(axis=1)] == y[tested]).mean()
            assert scores.accuracy.sel(probe=control, fold=fold)[0] == pytest.approx(right), (control, fold)
            if len(classes) == 2 and control != "majority":
                expected = roc_auc_score(y[tested], probabilities[:, 1])
                assert scores.auroc.sel(probe=control, fold=fold)[0] == pytest.approx(expected, abs=1e-9)


def test_labels_are_dealt_to_prompts_where_these_have_one_and_are_the_seeds() -> None:
    array = identified()
    examples = select_labelled_tokens(array, "token", "label")
    folds = plan_token_folds(array, "token", examples, None, 5, 0)
    dealt = deal_labels("shuffled_labels", array, examples, folds, 0)[0]
    assert (dealt != examples.codes).any()
    assert all(len(set(dealt[examples.prompt == prompt])) == 1 for prompt in range(PROMPTS))
    first = np.unique(examples.prompt, return_index=True)[1]
    assert sorted(dealt[first]) == sorted(examples.codes[first]), "as many prompts of each class"
    np.testing.assert_array_equal(dealt, deal_labels("shuffled_labels", array, examples, folds, 0)[0])
    assert (dealt != deal_labels("shuffled_labels", array, examples, folds, 1)[0]).any()
    types = deal_labels("control_task", array, examples, folds, 0)[0]
    assert all(len(set(types[token_id == IDS])) == 1 for token_id in range(30))
    mixed = select_labelled_tokens(array, "token", "kind_of_token")
    dealt = deal_labels("shuffled_labels", array, mixed, folds, 0)[0]
    assert sorted(dealt) == sorted(mixed.codes)
    assert any(len(set(dealt[mixed.prompt == prompt])) > 1 for prompt in range(PROMPTS))


def test_controls_are_the_same_from_a_store_on_every_scheduler_and_where_prompts_count(stored: Any, small_blocks: None) -> None:
    array = stored.tokens().resid
    options: dict[str, Any] = {
        "pooling": "score:mean",
        "controls": ["shuffled_labels", "position", "majority"],
        "where": array.position < 6,
    }
    expected = lz.sweep_tokens(array, "label", "lda", **options, scheduler="synchronous")
    assert expected.n_test.sum() == PROMPTS
    assert expected.accuracy.sel(probe="majority").values.tolist() == [[0.5] * 5] * 2
    assert abs(float(expected.accuracy.sel(probe="shuffled_labels:lda").mean()) - 0.5) < 0.2
    found = lz.sweep_tokens(array.load(), "label", "lda", **options, n_workers=3)
    np.testing.assert_allclose(found.accuracy, expected.accuracy, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"controls": "bag_of_words"}, InvalidArgumentError, "no control 'bag_of_words' of tokens: use some of shuffled_labels"),
        ({"controls": {"mine": [1]}}, InvalidTypeError, "are no names"),
        ({"controls": 3}, InvalidTypeError, "are no names"),
        ({"controls": "layer_0"}, InvalidArgumentError, "needs layer 0, and there are layers 2, 5"),
        ({"controls": "token_identity"}, InvalidArgumentError, "needs a coordinate 'token_id' along 'token', and there is none"),
        ({"controls": "control_task", "pooling": "score:max"}, InvalidArgumentError, "use pooling='all', or 'shuffled_labels'"),
    ],
)
def test_controls_that_cannot_be_had_say_why(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lz.sweep_tokens(tokens(), "label", **change)


def test_token_ids_that_are_not_known_are_no_control() -> None:
    array = identified()
    array = array.assign_coords(token_id=("token", np.where(IDS == 3, -1, IDS)))
    with pytest.raises(InvalidArgumentError, match=f"not known of {(IDS == 3).sum()} of {N} tokens"):
        lz.sweep_tokens(array, "label", controls="control_task")
    lz.sweep_tokens(array, "label", controls="control_task", where=array.token_id >= 0)
    with pytest.raises(InvalidArgumentError, match="no labels of its own"):
        lz.selectivity(lz.sweep_tokens(array, "label"), control="layer_0")
    with pytest.raises(InvalidArgumentError, match="no control task to compare with"):
        lz.selectivity(lz.sweep_tokens(array, "label"), control="control_task")


def test_labels_are_matched_whatever_they_are_given_as() -> None:
    expected = lz.fit_tokens(tokens(), "label").coef
    by_token = tokens().label
    shuffled = by_token.isel(token=np.random.default_rng(1).permutation(N))
    by_prompt = xr.DataArray(Y, dims="prompt", coords={"prompt": [lz.prompt_hash(text) for text in TEXTS]}).isel(
        prompt=slice(None, None, -1)
    )
    lists = {text: [int(y)] * int(count) for text, y, count in zip(TEXTS, Y, COUNTS, strict=True)}
    texts = dict(zip(TEXTS, Y.tolist(), strict=True))
    for labels in (by_token, shuffled, by_prompt, lists, texts, pd.Series(texts), Y, Y.tolist(), Y[OF], Y[OF].astype(float)):
        xr.testing.assert_identical(lz.fit_tokens(tokens(), labels).coef, expected)
    words = lz.fit_tokens(tokens(), np.array(["no", "yes"])[Y])
    assert json.loads(words.attrs["classes"]) == ["no", "yes"]
    np.testing.assert_array_equal(words.coef, expected)


def test_where_selects_the_tokens_to_learn_from() -> None:
    late = POSITION > 1
    expected = in_memory("ridge", values("float64")[1][late], Y[OF][late])[0]
    array = tokens()
    for where in (late, array.position > 1, lz.mask_tokens(array, position=slice(2, None))):
        np.testing.assert_allclose(lz.fit_tokens(array, "label", where=where).coef[1], expected, rtol=1e-4, atol=1e-6)
    turned = array.isel(token=slice(None, None, -1))
    np.testing.assert_allclose(lz.fit_tokens(array, "label", where=turned.position > 1).coef[1], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        lz.fit_tokens(array.isel(token=late), "label").coef, lz.fit_tokens(array, "label", where=late).coef, rtol=1e-9
    )


def test_missing_labels_are_named_and_dropped_only_with_missing_drop() -> None:
    some: list[Any] = Y.tolist()
    some[3] = None
    with pytest.raises(LabelError, match=rf"miss {COUNTS[3]} of {N} tokens, in 1 prompt \({lz.prompt_hash(TEXTS[3])}\).*missing='drop'"):
        lz.fit_tokens(tokens(), some)
    kept = OF != 3
    fitted = lz.fit_tokens(tokens(), some, missing="drop")
    assert fitted.attrs["n_missing"] == COUNTS[3]
    expected = in_memory("ridge", values("float64")[1][kept], Y[OF][kept])[0]
    np.testing.assert_allclose(fitted.coef[1], expected, rtol=1e-4, atol=1e-6)
    assert lz.fit_tokens(tokens(), some, where=kept).attrs["n_missing"] == 0
    ours = {text: [0, None, *[1] * 9] for text in TEXTS}
    assert lz.fit_tokens(tokens(), ours, missing="drop").attrs["n_missing"] == PROMPTS


def test_activations_that_are_not_finite_are_named_by_layer_and_prompts(small_blocks: None) -> None:
    data = values()
    data[1, OF == 4, 3] = np.nan
    data[1, np.flatnonzero(OF == 30)[0], 0] = np.inf
    message = rf"layer 5 of 'resid' is NaN or infinite for {COUNTS[4] + 1} of {N} tokens, in 2 prompts"
    for name in ("ridge", "sgd"):
        with pytest.raises(InvalidArgumentError, match=message) as caught:
            lz.fit_tokens(tokens(data), "label", name)
        assert lz.prompt_hash(TEXTS[4]) in str(caught.value)
        assert lz.prompt_hash(TEXTS[30]) in str(caught.value)
        assert str(caught.value).count("\n") <= 1
    good = ~np.isin(OF, (4, 30))
    assert np.isfinite(lz.fit_tokens(tokens(data), "label", where=good).coef).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"where": np.zeros(N, bool)}, InvalidArgumentError, "leaves none of"),
        ({"where": np.ones(N)}, InvalidArgumentError, "truth values"),
        ({"where": np.ones(3, bool)}, InvalidArgumentError, r"shape \(3,\)"),
        ({"where": Y[OF] == 1}, LabelError, "have the label 1 of 'label': a probe needs"),
        ({"labels": "lable"}, LabelError, "no coordinate 'lable' along 'token': there is label"),
        ({"labels": Y[:-1]}, LabelError, f"39 labels for {N} tokens of 40 prompts"),
        ({"labels": Y + 0.25}, LabelError, "continuous"),
        ({"labels": [*Y[:-1].tolist(), "yes"]}, LabelError, "hold int, str"),
        ({"labels": {TEXTS[0]: [0]}}, LabelError, "has 1 labels, but a token at position"),
        ({"labels": {"another": 1}}, LabelError, f"miss {N} of {N} tokens, in 40 prompts"),
        ({"labels": {"another": 1}, "missing": "drop"}, LabelError, "none of"),
        ({"labels": 3}, InvalidTypeError, "not int"),
        ({"probe": "svm"}, InvalidArgumentError, "'svm' cannot be fitted block by block: use one of ridge"),
        ({"missing": "ignore"}, InvalidArgumentError, "missing='ignore'"),
        ({"random_state": True}, InvalidTypeError, "random_state"),
        ({"scheduler": "cloud"}, InvalidArgumentError, "'cloud'"),
    ],
)
def test_unsuitable_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        lz.fit_tokens(tokens(), **{"labels": "label", **arguments})
    assert str(caught.value).count("\n") <= 1
    assert TEXTS[0] not in str(caught.value)


def test_activations_of_another_kind_are_refused() -> None:
    with pytest.raises(InvalidTypeError, match=r"give toks\[name\]"):
        lz.fit_tokens(tokens().to_dataset(), "label")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="expected layer"):
        lz.fit_tokens(tokens().rename(hidden="head"), "label")
    with pytest.raises(InvalidArgumentError, match="no token"):
        lz.fit_tokens(tokens().isel(token=slice(0)), "label")
    with pytest.raises(InvalidArgumentError, match="no prompt coordinate"):
        lz.fit_tokens(xr.DataArray(values(), dims=("layer", "token", "hidden")), Y[OF])


# -- scores ----------------------------------------------------------------------------------------------------------------


def test_every_token_is_scored_with_its_labels(stored: Any, small_blocks: None) -> None:
    toks = stored.tokens()
    fitted = lz.fit_tokens(toks.resid, "label", "mass_mean")
    scores = lz.score_tokens(fitted, toks.resid)
    assert scores.dims == ("layer", "token")
    expected = np.einsum("lth,lh->lt", toks.resid.values.astype("float64"), fitted.coef.values) + fitted.intercept.values[:, None]
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)
    prompt = scores.sel(layer=5, prompt=lz.prompt_hash(TEXTS[7]))
    assert prompt.position.values.tolist() == list(range(COUNTS[7]))
    assert prompt.label.values.tolist() == [Y[7]] * COUNTS[7]
    some = lz.score_tokens(fitted, toks.resid.sel(layer=5, prompt=[lz.prompt_hash(TEXTS[7])]))
    np.testing.assert_array_equal(some[0], prompt)


@pytest.mark.parametrize("pooling", ["score:max", "max", "min", "score:mean", "score:last_token", "score:first_token"])
def test_scores_of_a_prompt_are_those_of_its_tokens_pooled(pooling: str) -> None:
    fitted = lz.fit_tokens(tokens(), "label")
    each = lz.score_tokens(fitted, tokens())
    pooled = lz.score_tokens(fitted, tokens(), pooling)
    assert pooled.dims == ("layer", "prompt")
    reduce: dict[str, Any] = {"max": np.max, "min": np.min, "mean": np.mean, "last_token": lambda v: v[-1], "first_token": lambda v: v[0]}
    for number, text in enumerate(TEXTS):
        expected = reduce[pooling.removeprefix("score:")](each[1].values[number == OF])
        assert pooled.sel(layer=5, prompt=lz.prompt_hash(text)) == pytest.approx(float(expected), rel=1e-5)
    assert pooled.label.values.tolist() == Y.tolist()


@pytest.mark.model
def test_scores_agree_with_a_probe_that_classifies_every_token(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from tiny_models import save_tiny

    save_tiny("llama", tmp_path / "m")
    store = lz.open_store(tmp_path / "acts", durable=False)
    probe = lz.Probe(str(tmp_path / "m"), 1, train_pooling="all", inference_pooling="max", classifier="lda", store=store).fit(TEXTS, Y)
    toks = store.tokens(prompts=TEXTS).resid.sel(layer=[1])
    fitted = lz.fit_tokens(toks, Y, "lda")
    pooled = lz.score_tokens(fitted, toks, "score:max")[0].values
    # There the largest probability of each class by itself is kept, and a probability grows with the score.
    np.testing.assert_allclose(probe.predict_proba(TEXTS)[:, 1], 1 / (1 + np.exp(-pooled)), atol=1e-4)
    assert lz.score_tokens(fitted, toks).token_text.values[:2].tolist() == [
        "",
        "p",
    ]  # a letter or two per token, behind the tokenizer's own


def test_scores_of_other_layers_or_widths_are_refused() -> None:
    fitted = lz.fit_tokens(tokens().sel(layer=[5]), "label")
    with pytest.raises(InvalidArgumentError, match=r"layers \[2\] have no probe: there are probes of layers \[5\]"):
        lz.score_tokens(fitted, tokens())
    with pytest.raises(InvalidArgumentError, match="fitted on 12 hidden units, and these activations have 11"):
        lz.score_tokens(fitted, tokens().sel(layer=[5]).isel(hidden=slice(1, None)))
    with pytest.raises(InvalidArgumentError, match=r"pools activations.*'score:mean'"):
        lz.score_tokens(fitted, tokens(), "mean")
    with pytest.raises(InvalidTypeError, match="that fit_tokens gives"):
        lz.score_tokens(tokens().to_dataset(), tokens())
    assert lz.score_tokens(fitted, tokens().sel(layer=5)).sizes["layer"] == 1


def test_a_token_without_activations_scores_nan() -> None:
    data = values()
    data[1, 3] = np.nan
    scores = lz.score_tokens(lz.fit_tokens(tokens(), "label"), tokens(data))
    assert np.flatnonzero(np.isnan(scores[1])).tolist() == [3]


# -- masks -----------------------------------------------------------------------------------------------------------------

CHATS = [
    [{"role": "user", "content": "Is it hot?"}, {"role": "assistant", "content": " Yes, it is. "}, {"role": "user", "content": "Is it?"}],
    [{"role": "user", "content": "yes"}, {"role": "assistant", "content": "yes"}],
]
RENDERED = ["<user>Is it hot?<assistant>Yes, it is.<user>Is it?", "<user>yes<assistant>yes"]


def spelled(texts: list[str] = RENDERED) -> xr.DataArray:
    """One token per character, and one in front that the tokenizer added."""
    counts = np.array([len(text) + 1 for text in texts])
    of = np.repeat(np.arange(len(texts)), counts)
    start = np.concatenate([np.r_[-1, np.arange(count - 1)] for count in counts])
    coords: dict[str, Any] = {
        "prompt": ("token", np.array([lz.prompt_hash(text) for text in texts])[of]),
        "position": ("token", np.concatenate([np.arange(count) for count in counts])),
        "text": ("token", np.array(texts)[of]),
        "char_start": ("token", start),
        "char_end": ("token", np.where(start < 0, -1, start + 1)),
    }
    array = xr.DataArray(np.zeros((len(of), 1)), dims=("token", "hidden"), coords=coords)
    return array.set_xindex(["prompt", "position"], lz.TokenIndex)


def selected_text(array: xr.DataArray, mask: xr.DataArray) -> list[str]:
    """The characters of each prompt whose tokens a mask selects."""
    chosen = array.isel(token=mask.values)
    letters = [
        text[a:b] if a >= 0 else "^"
        for text, a, b in zip(chosen.text.values, chosen.char_start.values, chosen.char_end.values, strict=True)
    ]
    return [
        "".join(letter for letter, prompt in zip(letters, chosen.prompt.values, strict=True) if prompt == lz.prompt_hash(text))
        for text in RENDERED
    ]


def test_masks_select_tokens_by_position_from_either_end() -> None:
    array = spelled()
    assert selected_text(array, lz.mask_tokens(array, position=0)) == ["^", "^"]
    assert selected_text(array, lz.mask_tokens(array, position=-1)) == ["?", "s"]
    assert selected_text(array, lz.mask_tokens(array, position=[1, -2])) == ["<t", "<e"]
    assert selected_text(array, lz.mask_tokens(array, position=slice(-3, None))) == ["it?", "yes"]
    assert selected_text(array, lz.mask_tokens(array, position=slice(1, -20)))[1] == "<us"
    last_half = array.isel(token=array.position.values < 7)
    assert lz.mask_tokens(last_half, position=-1).sum() == 2


def test_masks_select_tokens_by_a_span_of_characters() -> None:
    array = spelled()
    assert selected_text(array, lz.mask_tokens(array, span="it")) == ["ititit", ""]
    assert selected_text(array, lz.mask_tokens(array, span="yes")) == ["", "yesyes"]
    assert selected_text(array, lz.mask_tokens(array, span={RENDERED[0]: (6, 8)})) == ["Is", ""]
    assert selected_text(array, lz.mask_tokens(array, span={lz.prompt_hash(RENDERED[1]): [(0, 2), (5, 8)]})) == ["", "<u>ye"]
    assert selected_text(array, lz.mask_tokens(array, span="it", position=slice(None, 20))) == ["it", ""]


def test_a_span_that_is_in_no_prompt_warns() -> None:
    array = spelled()
    with pytest.warns(UserWarning, match="span='Zzz' is in none of the texts of 2 prompts: the mask selects no token") as caught:
        assert not lz.mask_tokens(array, span="Zzz").any()
    assert [Path(warning.filename).name for warning in caught] == ["test_tokens.py"]
    with pytest.warns(UserWarning, match="span='Zzz' is not in the text of the only prompt"):
        lz.mask_tokens(array.isel(token=array.prompt.values == array.prompt.values[0]), span="Zzz")


def test_masks_select_tokens_by_the_role_of_their_message() -> None:
    array = spelled()
    for chats in (CHATS, dict(zip(RENDERED, CHATS, strict=True))):
        assert selected_text(array, lz.mask_tokens(array, role="assistant", chats=chats)) == ["Yes, it is.", "yes"]
        assert selected_text(array, lz.mask_tokens(array, role="user", chats=chats)) == ["Is it hot?Is it?", "yes"]
    mask = lz.mask_tokens(array, role="assistant", chats=CHATS, position=slice(20, None))
    assert selected_text(array, mask)[1] == "yes"
    assert mask.dims == ("token",)
    assert mask.sel(prompt=lz.prompt_hash(RENDERED[1])).sum() == 3


def test_chats_are_matched_by_the_tokenizer_that_rendered_them() -> None:
    class Renders:
        chat_template = "x"

        def apply_chat_template(self, messages: Any, **_: Any) -> str:
            return "".join(f"<{m['role']}>{m['content'].strip()}" for m in messages)

    array = spelled()
    other = [{"role": "user", "content": "?"}]
    mask = lz.mask_tokens(array, role="assistant", chats=[other, *reversed(CHATS)], tokenizer=Renders())
    assert selected_text(array, mask) == ["Yes, it is.", "yes"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, InvalidArgumentError, "position=, span= or role="),
        ({"role": "assistant"}, InvalidArgumentError, "give chats="),
        ({"role": "tool", "chats": CHATS}, InvalidArgumentError, "no message has the role 'tool': there are assistant, user"),
        ({"role": "user", "chats": CHATS[:1]}, InvalidArgumentError, "1 chats for 2 prompts"),
        ({"role": "user", "chats": CHATS[::-1]}, InvalidArgumentError, "is not in the text of prompt"),
        ({"role": "user", "chats": {RENDERED[0]: CHATS[0]}}, MissingPromptsError, "chats lacks 1 of 2 prompts"),
        ({"role": "user", "chats": {"another": CHATS[0]}}, MissingPromptsError, "names a prompt that is not among these 2"),
        ({"span": ""}, InvalidArgumentError, "empty text"),
        ({"span": {RENDERED[0]: (5, 5)}}, InvalidArgumentError, "no characters"),
        ({"span": {RENDERED[0]: ["ab"]}}, InvalidTypeError, "expected \\(start, end\\)"),
        ({"span": 3}, InvalidTypeError, "not int"),
        ({"position": 1.5}, InvalidTypeError, "no whole number"),
        ({"position": True}, InvalidTypeError, "no whole number"),
        ({"position": slice(0, 9, 2)}, InvalidArgumentError, "has a step"),
    ],
)
def test_masks_that_cannot_be_made_say_why(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lz.mask_tokens(spelled(), **arguments)
    if "span" in arguments:
        with pytest.raises((InvalidArgumentError, InvalidTypeError, MissingPromptsError)):
            lz.mask_tokens(spelled().drop_vars(["char_start", "char_end"]), **arguments)


def test_token_texts_are_read_off_the_prompts() -> None:
    array = spelled().expand_dims(layer=[0]).assign_coords(y=("token", np.arange(spelled().sizes["token"]) % 2))
    scores = lz.score_tokens(lz.fit_tokens(array, "y", "mass_mean"), array)
    prompt = scores.sel(prompt=lz.prompt_hash(RENDERED[1]))
    assert "".join(prompt.token_text.values) == RENDERED[1]


# -- memory ----------------------------------------------------------------------------------------------------------------

MEMORY = """
import sys, time
import numpy as np
import lmprobe_zarr as lz
from lmprobe_zarr.probes import make_probe, coefficients

def peak():
    with open('/proc/self/status') as status:
        return next(int(line.split()[1]) for line in status if line.startswith('VmHWM')) / 1024

store = lz.open_store(sys.argv[1], mode='r')
toks = store.tokens()
lz.sweep_tokens(toks.resid.isel(token=slice(0, 4000)), 'label', ['ridge', 'lda', 'mass_mean'], 5, n_workers=2)  # what has to be imported
before = peak()
began = time.perf_counter()
scores = lz.sweep_tokens(toks.resid, 'label', ['ridge', 'lda', 'mass_mean'], 5, n_workers=2)
print(peak() - before, time.perf_counter() - began, float(scores.auroc.mean()), int(scores.n_test.sum()))
"""


def write_many(folder: Path, rows: int, hidden: int) -> None:
    """Rows of a hundred tokens per prompt with a known direction, part by part."""
    store = lz.open_store(folder, durable=False)
    rng = np.random.default_rng(0)
    per_part = 2000
    for start in range(0, rows // 100, per_part):
        n = min(per_part, rows // 100 - start)
        y = rng.integers(0, 2, n)
        x = rng.standard_normal((n * 100, hidden), np.float32)
        x[:, 0] += np.repeat(y, 100)
        lz.write_activations(
            store,
            model="m",
            prompts=[f"{start + i}" for i in range(n)],
            activations={"resid": {0: list(x.astype(np.float16).reshape(n, 100, hidden))}},
            coords={"label": y},
        )


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this machine does not tell a process's peak of memory")
def test_memory_is_bounded_by_sums_and_blocks_on_many_token_rows(tmp_path: Path) -> None:
    rows, hidden = (5_000_000, 256) if os.environ.get("LMPROBE_ZARR_STRESS") else (1_000_000, 64)
    write_many(tmp_path / "acts", rows, hidden)
    done = subprocess.run([sys.executable, "-W", "error", "-c", MEMORY, tmp_path / "acts"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    grown, seconds, auroc, n_test = (float(word) for word in done.stdout.split())
    print(done.stdout, f"{rows} rows of {hidden}: {grown:.0f} MiB more at the peak, {seconds:.0f} s")  # noqa: T201
    # Two tasks, each with its sums (five folds and two classes apart) and blocks; scores, labels and prompts of every row.
    state = 8 * 3 * 5 * 2 * hidden**2 / 2**20
    # as docs/token-probes.md counts them; scores twice while they are put together.
    allowed = 2 * (2 * state + 6 * 16) + rows * (50 + 2 * (3 * 8 + 8)) / 2**20
    assert grown < allowed
    assert n_test == rows
    assert auroc == pytest.approx(0.76, abs=0.01)  # Φ(1/√2)


@pytest.mark.few(1)
@pytest.mark.parametrize("pooling", ["all", "score:mean"])
def test_intervals_of_tokens_draw_whole_prompts_and_are_around_the_score(pooling: str) -> None:
    array = tokens()
    plain = lz.sweep_tokens(array, "label", ["ridge"], 3, pooling=pooling)
    scores = lz.sweep_tokens(array, "label", ["ridge"], 3, pooling=pooling, predictions=True, controls="shuffled_labels")
    np.testing.assert_array_equal(scores.accuracy.sel(probe="ridge"), plain.accuracy.sel(probe="ridge"))
    of_fold = [scores.isel({scores.predicted.dims[-1]: np.flatnonzero(scores.test_fold == fold)}) for fold in range(3)]
    by_hand = [(held.predicted == held.true).mean(held.predicted.dims[-1]).sel(probe="ridge").values for held in of_fold]
    np.testing.assert_allclose(scores.accuracy.sel(probe="ridge").T, by_hand)
    assert (scores.predicted.sel(probe="shuffled_labels:ridge") == -1).all()
    found = lz.confidence_intervals(scores, n_resamples=200).sel(probe="ridge")
    assert found.attrs["resampled"] == "prompt"
    for metric in ("accuracy", "auroc"):
        np.testing.assert_allclose(found[metric].sel(bound="estimate"), scores[metric].sel(probe="ridge").mean("fold"))
        # Where every resample is perfect there is no interval.
        low, estimate = found[metric].sel(bound="lower"), found[metric].sel(bound="estimate")
        assert ((low <= estimate) | (low.isnull() & (estimate == 1))).all()
    # Five times as many tokens of each prompt, all alike, tell no more than before.
    dim = scores.predicted.dims[-1]
    again = scores.isel({dim: np.repeat(np.arange(scores.sizes[dim]), 5)})
    np.testing.assert_allclose(lz.confidence_intervals(again, n_resamples=200).sel(probe="ridge").accuracy, found.accuracy)


# ------------------------------------------------------------------------------------------- activations of something else


def two_models(tmp_path: Path) -> lz.Store:
    """Two models of one width, with the same prompts."""
    store = lz.open_store(tmp_path / "two", durable=False)
    rng = np.random.default_rng(0)
    texts = [f"prompt {i}" for i in range(12)]
    for model in ("base", "tuned"):
        sites = {
            site: {layer: [rng.standard_normal((3, 4)).astype("f4") for _ in texts] for layer in range(2)} for site in ("resid", "attn")
        }
        pooled = {
            f"resid_{pooling}": {layer: np.stack([x.mean(0) for x in sites["resid"][layer]]) for layer in range(2)}
            for pooling in ("mean", "last_token")
        }
        lz.write_activations(store, model=model, prompts=texts, activations=sites, pooled=pooled, coords={"y": [0, 1] * 6})
    return store


def test_a_probe_of_another_model_or_site_scores_with_a_warning(tmp_path: Path) -> None:
    store = two_models(tmp_path)
    base, tuned = store.tokens("base"), store.tokens("tuned")
    probes = lz.fit_tokens(base.resid, "y")
    right = lz.score_tokens(probes, base.resid)
    assert lz.score_tokens(probes, store.dataset("base").resid_mean).sizes["prompt"] == 12, "what is pooled lies in the space of the tokens"
    assert lz.score_tokens(probes, base.resid.drop_vars("model").rename(None)).equals(right.drop_vars("model")), "nothing says what it is"
    for other, said in ((tuned.resid, "resid of 'base', and is given resid of 'tuned'"), (base.attn, "given attn of 'base'")):
        with pytest.warns(UserWarning, match=said):
            scores = lz.score_tokens(probes, other)
        np.testing.assert_allclose(scores, (other * probes.coef).sum("hidden") + probes.intercept, rtol=1e-4, atol=1e-5)


def test_a_probe_that_is_given_another_pooling_or_model_says_so(tmp_path: Path) -> None:
    store = two_models(tmp_path)
    base, tuned = store.dataset("base"), store.dataset("tuned")
    y = base.y.values
    probe = lz.Probe(classifier="ridge").fit_from_activations(base.resid_mean.sel(layer=1), y)
    right = probe.score_from_activations(base.resid_mean.sel(layer=1), y)
    assert probe.score_from_activations(base.resid_mean.sel(layer=1).values, y) == right, "an array of numpy says nothing"
    for other, said in (
        (base.resid_mean.rename("attn_mean"), "attn_mean of 'base'"),
        (base.resid_mean.rename("resid_max"), "resid_max of 'base'"),
        (tuned.resid_mean, "resid_mean of 'tuned'"),
    ):
        with pytest.warns(UserWarning, match=f"learned from resid_mean of 'base', and is given {said}"):
            probe.predict_from_activations(other.sel(layer=1))
    # One that is made to predict from another pooling does so without a word.
    made = lz.Probe(classifier="ridge", train_pooling="mean", inference_pooling="last_token")
    made.fit_from_activations(base.resid_mean.sel(layer=1), y).predict_from_activations(base.resid_last_token.sel(layer=1))
