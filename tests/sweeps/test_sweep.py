"""Sweeps: whose labels, which folds, what is read where, and the same scores everywhere."""

from __future__ import annotations

import io
import json
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from clusters import local_client
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import BaseCrossValidator, GroupKFold, LeaveOneGroupOut, ShuffleSplit, StratifiedGroupKFold, StratifiedKFold
from sklearn.svm import LinearSVC
from threadpoolctl import threadpool_info
from xarray.backends import BackendArray
from xarray.core import indexing

import lmprobe_zarr as lz
from lmprobe_zarr.batch import prompt_hash
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, LabelError
from lmprobe_zarr.interchange import ABSENT_TEXT
from lmprobe_zarr.probes import make_probe
from lmprobe_zarr.probes.layer import fits_running
from lmprobe_zarr.probes.task import NotFiniteError
from lmprobe_zarr.store.store import Store
from lmprobe_zarr.sweeps.sweep import sweep

LAYERS, PROMPTS, HIDDEN = 3, 60, 12
TEXTS = [f"prompt number {i}" for i in range(PROMPTS)]
Y = np.array([0, 0, 1] * (PROMPTS // 3))


def values(dtype: str = "float32", seed: int = 0) -> Any:
    """Layer 0 knows nothing, layer 1 a little, layer 2 nearly all."""
    x = np.random.default_rng(seed).normal(size=(LAYERS, PROMPTS, HIDDEN))
    x[1, :, 4] += 1.5 * Y
    x[2, :, 7] += 5 * Y
    return x.astype(dtype)


def activations(data: Any = None) -> xr.DataArray:
    coords: dict[str, Any] = {
        "layer": [4, 8, 16],
        "prompt": [prompt_hash(text) for text in TEXTS],
        "text": ("prompt", TEXTS),
        "label": ("prompt", Y),
        "model": "a/model",
    }
    return xr.DataArray(values() if data is None else data, dims=("layer", "prompt", "hidden"), coords=coords, name="resid_mean")


def same(first: xr.Dataset, other: xr.Dataset) -> None:
    for name in ("accuracy", "auroc", "converged", "n_train", "n_test"):
        xr.testing.assert_identical(first[name], other[name])


# -- scores ----------------------------------------------------------------------------------------------------------------


def test_a_known_direction_is_found_and_noise_scores_at_chance() -> None:
    scores = sweep(activations(), "label", ["logistic_regression", "mass_mean", "majority"])
    mean = scores.auroc.mean("fold")
    assert mean.sel(layer=16, probe="logistic_regression") > 0.98
    assert mean.sel(layer=16, probe="mass_mean") > 0.95
    assert 0.25 < mean.sel(layer=4, probe="logistic_regression") < 0.75
    assert (scores.auroc.sel(probe="majority") == 0.5).all()
    np.testing.assert_allclose(scores.accuracy.sel(probe="majority"), 2 / 3)


def test_the_result_is_labelled_and_records_its_arguments() -> None:
    scores = sweep(activations(), "label", ["ridge", "lda"], 4, random_state=3)
    assert dict(scores.sizes) == {"layer": 3, "probe": 2, "fold": 4}
    assert scores.layer.values.tolist() == [4, 8, 16]
    assert scores.probe.values.tolist() == ["ridge", "lda"]
    assert set(scores.data_vars) == {"accuracy", "auroc", "fit_seconds", "converged", "n_train", "n_test"}
    assert scores.n_train.values.tolist() == [45] * 4
    assert (scores.fit_seconds > 0).all()
    assert scores.converged.all()
    expected = {
        "labels": "label",
        "classes": [0, 1],
        "class_counts": [40, 20],
        "random_state": 3,
        "variable": "resid_mean",
        "model": "a/model",
    }
    assert {name: scores.attrs[name] for name in expected} == expected
    assert scores.attrs["majority_share"] == pytest.approx(2 / 3)
    assert scores.attrs["cv"] == "StratifiedKFold(n_splits=4, random_state=3, shuffle=True)"
    assert "RidgeClassifier" in json.loads(scores.attrs["estimators"])[0]
    assert json.loads(scores.attrs["versions"])[1].startswith("scikit-learn ")
    assert scores.model == "a/model"
    assert json.loads(json.dumps(scores.attrs)) == scores.attrs


@pytest.mark.few(1)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_scores_equal_a_plain_scikit_learn_loop(dtype: str) -> None:
    data = values(dtype)
    names = ["logistic_regression", "ridge", "lda", "svm", "mass_mean"]
    scores = sweep(activations(data), "label", names, 3)
    folds = list(StratifiedKFold(3, shuffle=True, random_state=0).split(data[0], Y))
    for i, layer in enumerate(data.astype("float32") if dtype == "float16" else data):
        for j, name in enumerate(names):
            for k, (train, test) in enumerate(folds):
                probe = make_probe(name).fit(layer[train], Y[train])
                assert scores.accuracy[i, j, k] == probe.score(layer[test], Y[test])
                assert scores.auroc[i, j, k] == pytest.approx(roc_auc_score(Y[test], probe.decision_function(layer[test])), abs=1e-6)


def test_several_classes_as_texts_are_scored_one_against_the_rest() -> None:
    y = np.array(["red", "green", "blue"] * (PROMPTS // 3))
    scores = sweep(activations(), y, ["logistic_regression", "mass_mean"], 3)
    assert json.loads(scores.attrs["classes"]) == ["blue", "green", "red"]
    assert np.isfinite(scores.auroc).all()


def test_dimensions_may_come_in_any_order_and_layer_may_be_missing() -> None:
    whole = sweep(activations(), "label", "mass_mean", 3)
    same(sweep(activations().transpose("hidden", "layer", "prompt"), "label", "mass_mean", 3), whole)
    layer_8 = sweep(activations().sel(layer=8), "label", "mass_mean", 3)
    xr.testing.assert_identical(layer_8.accuracy, whole.accuracy.sel(layer=[8]))
    assert sweep(activations().sel(layer=8, drop=True), "label", "mass_mean", 3).layer.values.tolist() == [0]


def test_fits_that_stopped_early_are_counted_and_warned_about_once() -> None:
    with pytest.warns(ConvergenceWarning, match="15 of 15 fits stopped") as seen:
        scores = sweep(activations(), "label", {"hasty": LogisticRegression(max_iter=1)}, n_workers=2)
    assert len(seen) == 1
    assert scores.attrs["n_unconverged"] == 15
    assert not scores.converged.any()


def test_an_estimator_without_scores_has_no_auroc_and_the_reason_is_recorded() -> None:
    class Hard(LogisticRegression):  # type: ignore[misc]
        decision_function = predict_proba = property()

        def predict(self, X: Any) -> Any:  # noqa: N803
            return (X @ self.coef_[0] + self.intercept_ > 0).astype(int)

    scores = sweep(activations(), "label", {"hard": Hard(), "ridge": "ridge"})
    assert scores.auroc.sel(probe="hard").isnull().all()
    assert json.loads(scores.auroc.attrs["nan_reasons"]) == ["hard: the estimator gives no score per class"]
    assert scores.accuracy.sel(layer=16, probe="hard").mean() > 0.9


def test_the_same_seed_gives_the_same_scores_for_any_selection_of_layers_and_probes() -> None:
    names = ["logistic_regression", "ridge"]
    whole = sweep(activations(), "label", names, 3, random_state=5)
    same(sweep(activations(), "label", names, 3, random_state=5), whole)
    part = sweep(activations().sel(layer=[16]), "label", "ridge", 3, random_state=5)
    xr.testing.assert_identical(part.auroc, whole.auroc.sel(layer=[16], probe=["ridge"]))
    assert (sweep(activations(), "label", names, 3, random_state=6).auroc != whole.auroc).any()


# -- labels ----------------------------------------------------------------------------------------------------------------


def test_labels_in_another_order_are_matched_by_prompt() -> None:
    quick = ("mass_mean", 2)
    expected = sweep(activations(), "label", *quick)
    order = np.random.default_rng(1).permutation(PROMPTS)
    array = activations().label.drop_vars(["text", "model"])[order]
    hashes = {prompt_hash(TEXTS[i]): int(Y[i]) for i in order}
    texts = {TEXTS[i]: int(Y[i]) for i in order}
    for labels in (array, hashes, texts, {**texts, "of another prompt": 0}, pd.Series(texts), Y, Y.tolist(), pd.Series(Y), Y.astype(float)):
        same(sweep(activations(), labels, *quick), expected)
    same(sweep(activations().drop_vars("text"), texts, *quick), expected)
    same(sweep(activations().drop_vars("label"), {text: bool(y) for text, y in texts.items()}, *quick), expected)


def test_a_text_is_matched_before_its_hash_since_token_ids_have_another() -> None:
    given = activations().assign_coords(prompt=[prompt_hash([i, i + 1]) for i in range(PROMPTS)])
    expected = sweep(given, Y, "mass_mean", 2)
    same(sweep(given, dict(zip(TEXTS, Y.tolist(), strict=True)), "mass_mean", 2), expected)
    same(sweep(given.drop_vars("text"), {(i, i + 1): int(Y[i]) for i in range(PROMPTS)}, "mass_mean", 2), expected)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (Y[:-1], "59 labels for 60 prompts"),
        (np.stack([Y, Y]), r"shape \(2, 60\)"),
        ([0] * PROMPTS, "all 60 labels 'labels' are 0: .*two classes"),
        ([0] * 57 + [1] * 3, r"5 folds need 5 different prompts of each class, but there are \{0: 57, 1: 3\}"),
        (
            [0] * 51 + [*range(1, 10)],
            r"\{1: 1, 2: 1, 3: 1, 4: 1, 5: 1, 6: 1, … of 10 classes\}: use fewer folds, another column, or label more",
        ),
        ([*Y[:-2].tolist(), None, np.nan], f"miss 2 of 60 prompts .{prompt_hash(TEXTS[58])}, {prompt_hash(TEXTS[59])}.: .*missing='drop'"),
        (Y + 0.25, "continuous"),
        ([*Y[:-1].tolist(), "yes"], "hold int, str"),
        ([[0], [1]] * 30, "hold sequences"),
        ({TEXTS[i]: int(Y[i]) for i in range(50)}, f"miss 10 of 60 prompts .{prompt_hash(TEXTS[50])}, "),
        ({**dict.fromkeys(TEXTS, 0), prompt_hash(TEXTS[7]): 1}, f"prompt {prompt_hash(TEXTS[7])} has two labels, 0 and 1"),
        ("lable", r"no coordinate 'lable' \(did you mean 'label'\?\): those per prompt are label"),
        ("model", r"has dims \(\), expected"),
        (xr.DataArray(Y, dims="prompt"), "have no prompt coordinate"),
        (xr.DataArray(Y, dims="row"), r"dims \('row',\)"),
        (pd.Series(Y, index=np.arange(PROMPTS)[::-1]), "without prompts as its index"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels: Any, message: str) -> None:
    with pytest.raises(LabelError, match=message) as caught:
        sweep(activations(), labels)
    assert str(caught.value).count("\n") <= 1
    assert TEXTS[50] not in str(caught.value)


@pytest.mark.few(1)
@pytest.mark.parametrize(("column", "label"), [(np.where(np.arange(PROMPTS) < 9, -1, Y), -1), (np.array([*[""] * 9, *"ab" * 25, "a"]), "")])
def test_an_attribute_that_outlives_its_column_makes_no_label_missing(column: Any, label: Any) -> None:
    given = activations().assign_coords(mark=("prompt", column))
    given.mark.attrs["missing"] = 9
    for labels in ("mark", given.mark, given.mark.values):
        for missing in ("raise", "drop"):
            scores = sweep(given, labels, "ridge", 2, missing=missing)
            assert label in json.loads(str(scores.attrs["classes"]))
            assert scores.attrs["n_dropped"] == 0


def test_texts_that_an_old_store_does_not_have_are_missing_wherever_they_are_taken() -> None:
    marked = np.array([ABSENT_TEXT, *"ab" * 29, "a"], object)
    given = activations().assign_coords(mark=("prompt", marked))
    for array in (given, given.isel(prompt=slice(None, None, -1)), given.copy(deep=True)):
        with pytest.raises(LabelError, match="labels 'mark' miss 1 of 60"):
            sweep(array, "mark")
        with pytest.raises(LabelError, match="labels 'mark' miss 1 of 60"):
            sweep(activations(), array.mark)
        scores = sweep(array, "mark", "ridge", 2, missing="drop")
        assert scores.attrs["classes"] == '["a", "b"]'
        assert scores.attrs["n_dropped"] == 1
    # What is computed from it are texts of the caller's own.
    computed = given.assign_coords(mark=given.mark.str.upper())
    assert "" in json.loads(sweep(computed, "mark", "ridge", cv=[(range(20), range(20, 60))]).attrs["classes"])


def test_labels_of_a_wrong_type_are_named() -> None:
    with pytest.raises(InvalidTypeError, match="not int"):
        sweep(activations(), 3)  # type: ignore[arg-type]


# -- folds -----------------------------------------------------------------------------------------------------------------


def test_folds_may_be_a_splitter_or_pairs() -> None:
    splitter = StratifiedKFold(3, shuffle=True, random_state=9)
    pairs = list(splitter.split(np.zeros((PROMPTS, 1)), Y))
    by_splitter = sweep(activations(), "label", cv=splitter)
    same(sweep(activations(), "label", cv=iter(pairs)), by_splitter)
    masks = [(np.isin(np.arange(PROMPTS), train), np.isin(np.arange(PROMPTS), test)) for train, test in pairs]
    scores = sweep(activations(), "label", cv=masks)
    same(scores, by_splitter)
    assert scores.attrs["cv"] == "3 (train, test) pairs"


def test_a_repeated_prompt_is_never_on_both_sides_of_a_split() -> None:
    rows = np.r_[np.arange(PROMPTS), np.arange(0, PROMPTS, 2)]
    repeated = activations().isel(prompt=rows)
    scores = sweep(repeated, "label", ["ridge"], 4)
    assert "StratifiedGroupKFold" in scores.attrs["cv"]
    assert int(scores.n_test.sum()) == len(rows)
    # A prompt in two folds' tests would have been refused, as it is here.
    with pytest.raises(InvalidArgumentError, match=r"prompts on both sides.*drop_duplicates"):
        sweep(repeated, "label", cv=ShuffleSplit(2, random_state=0))
    assert sweep(repeated, "label", "ridge", GroupKFold(3)).sizes["fold"] == 3
    same(sweep(repeated, {text: int(y) for text, y in zip(TEXTS, Y, strict=True)}, ["ridge"], 4), scores)


def test_a_class_of_one_repeated_prompt_is_too_few() -> None:
    rows = [*range(20), *[20] * 10]
    with pytest.raises(LabelError, match=r"\{0: 20, 1: 1\}"):
        sweep(activations().isel(prompt=rows), [0] * 20 + [1] * 10, cv=2)


@pytest.mark.parametrize(
    ("cv", "error", "message"),
    [
        (1, InvalidArgumentError, "at least 2 folds"),
        (True, InvalidTypeError, "cv=True"),
        ("five", InvalidTypeError, "cv='five'"),
        ([], InvalidArgumentError, "no folds"),
        ([([0, 1], [60])], InvalidArgumentError, "test holds rows 60 to 60, but there are 60 prompts"),
        ([([0, 2], [])], InvalidArgumentError, "test has shape"),
        ([([0, 2], [2, 3])], InvalidArgumentError, "1 prompts on both sides, first row 2"),
        ([([0, 1], [2])], LabelError, "trains on 2 prompts that all are 0"),
        ([7], InvalidArgumentError, "not a pair"),
        (StratifiedKFold(50), InvalidArgumentError, "cannot split"),
    ],
)
def test_folds_that_do_not_fit_are_refused(cv: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sweep(activations(), "label", cv=cv)


# -- groups ----------------------------------------------------------------------------------------------------------------

#: Six variables of ten prompts each, every one of both classes.
SOURCES = [f"source {i % 6}" for i in np.random.default_rng(2).permutation(PROMPTS)]


def test_grouped_folds_are_scikit_learns_own() -> None:
    given = activations().assign_coords(source=("prompt", SOURCES))
    scores = sweep(given, "label", "ridge", 3, groups="source", random_state=4)
    splitter = StratifiedGroupKFold(3, shuffle=True, random_state=4)
    folds = list(splitter.split(np.zeros((PROMPTS, 1)), Y, SOURCES))
    same(sweep(activations(), "label", "ridge", folds, random_state=4), scores)
    same(sweep(given, "label", "ridge", splitter, groups="source", random_state=4), scores)
    assert scores.attrs["groups"] == "source"
    assert scores.attrs["cv"] == "StratifiedGroupKFold(n_splits=3, random_state=4, shuffle=True) grouped by source"
    assert sweep(given, "label", "mass_mean", 2).attrs["groups"] == ""


def test_groups_are_read_as_labels_are_and_may_be_any_values() -> None:
    expected = sweep(activations(), "label", "mass_mean", 3, groups=SOURCES)
    order = np.random.default_rng(1).permutation(PROMPTS)
    array = activations().label.copy(data=SOURCES).drop_vars("text")[order]
    texts = {TEXTS[i]: SOURCES[i] for i in order}
    dates = np.datetime64("2024-01-01", "ns") + np.array([int(source[-1]) for source in SOURCES]).astype("timedelta64[D]")
    tuples = [("a", int(source[-1])) for source in SOURCES]
    numbers = np.array([float(source[-1]) + 0.5 for source in SOURCES])
    for given in (array, texts, pd.Series(texts), np.array(SOURCES), dates, tuples, numbers):
        scores = sweep(activations(), "label", "mass_mean", 3, groups=given)
        same(scores, expected)
        assert scores.attrs["groups"] == ("label" if given is array else "groups")
    # What cannot be sorted is numbered by first appearance.
    mixed = [source if source != "source 3" else 3 for source in SOURCES]
    assert sweep(activations(), "label", "mass_mean", 3, groups=mixed).n_test.sum() == PROMPTS


def test_splitters_that_know_groups_are_given_them() -> None:
    class Mine(BaseCrossValidator):  # type: ignore[misc]
        def get_n_splits(self, X: Any = None, y: Any = None, groups: Any = None) -> int:  # noqa: N803
            return 6

        def _iter_test_masks(self, X: Any = None, y: Any = None, groups: Any = None) -> Iterator[Any]:  # noqa: N803
            return (groups == group for group in range(6))

    by_source = sweep(activations(), "label", "mass_mean", LeaveOneGroupOut(), groups=SOURCES)
    assert by_source.n_test.values.tolist() == [10] * 6
    same(sweep(activations(), "label", "mass_mean", Mine(), groups=SOURCES), by_source)


def test_a_group_on_both_sides_is_refused() -> None:
    message = r"fold 0 has \d groups on both sides, first 'source \d' of 'groups'.*cv=5, which keeps groups"
    folds = list(StratifiedKFold(3).split(np.zeros((PROMPTS, 1)), Y))
    for cv in (StratifiedKFold(3), folds, ShuffleSplit(2, random_state=0)):
        with pytest.raises(InvalidArgumentError, match=message):
            sweep(activations(), "label", cv=cv, groups=SOURCES)


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        (SOURCES[:-1], LabelError, "59 groups for 60 prompts"),
        ([*SOURCES[:-1], None], LabelError, f"groups 'groups' miss 1 of 60 prompts .{prompt_hash(TEXTS[59])}.: give each a group"),
        ({TEXTS[0]: 1}, LabelError, "miss 59 of 60"),
        (np.where(np.arange(PROMPTS) < 20, np.nan, 1.0), LabelError, "miss 20 of 60"),
        ("sauce", LabelError, "no coordinate 'sauce'.*give the groups themselves"),
        ([[0], [1]] * 30, LabelError, f"groups 'groups' hold list .{prompt_hash(TEXTS[0])}."),
        (3, InvalidTypeError, "groups are a coordinate's name.*not int"),
        ([i % 4 for i in range(PROMPTS)], LabelError, "5 folds need 5 different groups, but there are 4 of 'groups'"),
        (Y, LabelError, "5 folds need 5 different groups, but there are 2 of 'groups'"),
        (np.where(Y == 0, 0, np.arange(PROMPTS)), LabelError, "groups that mix classes"),
    ],
)
def test_groups_that_do_not_fit_are_refused(groups: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sweep(activations(), "label", groups=groups)


def test_repeated_prompts_stay_together_in_their_group_and_may_not_be_in_two() -> None:
    rows = np.r_[np.arange(PROMPTS), np.arange(0, PROMPTS, 2)]
    repeated, variables = activations().isel(prompt=rows), [SOURCES[row] for row in rows]
    scores = sweep(repeated, "label", "mass_mean", 3, groups=variables)
    folds = StratifiedGroupKFold(3, shuffle=True, random_state=0).split(np.zeros((len(rows), 1)), Y[rows], variables)
    same(sweep(repeated, "label", "mass_mean", folds), scores)
    with pytest.raises(LabelError, match=f"prompt {prompt_hash(TEXTS[58])} has two groups, '{SOURCES[58]}' and 'another'"):
        sweep(repeated, "label", groups=[*variables[:-1], "another"])
    with pytest.raises(LabelError, match=r"5 different prompts of each class, but there are \{0: 20, 1: 1\}"):
        sweep(activations().isel(prompt=[*range(20), *[20] * 10]), [0] * 20 + [1] * 10, groups=[*range(20), *[20] * 10])


# -- what is fitted --------------------------------------------------------------------------------------------------------


def test_nan_and_infinity_are_named_by_layer_and_prompt() -> None:
    data = values()
    data[1, 3, 2], data[1, 9, 0] = np.nan, np.inf
    with pytest.raises(
        InvalidArgumentError, match=f"layer 8 of 'resid_mean' .* 2 of 60 prompts .{prompt_hash(TEXTS[3])}, {prompt_hash(TEXTS[9])}"
    ):
        sweep(activations(data), "label")


def test_bad_values_found_in_another_process_keep_their_place() -> None:
    from dask.multiprocessing import remote_exception

    # What the scheduler "processes" raises instead: a class made on the fly, whose arguments are others.
    found: Any = remote_exception(NotFiniteError(1, [3, 9]), "traceback")
    assert isinstance(found, NotFiniteError)
    assert (found.layer, found.rows) == (1, [3, 9])


def test_large_finite_values_are_not_taken_for_infinite() -> None:
    data = values("float64")
    data[:, :, 0] = 1e308
    data[:, :, 1] = 1e308
    assert np.isfinite(sweep(activations(data), "label", "majority").accuracy).all()


@pytest.mark.parametrize(
    ("array", "error", "message"),
    [
        (activations().rename(hidden="vocab").to_dataset(), InvalidArgumentError, "holds no activations.*resid_mean"),
        (values(), InvalidTypeError, "not ndarray"),
        (activations().rename(prompt="token"), InvalidArgumentError, r"dims \('layer', 'token', 'hidden'\).*pool the tokens first"),
        (activations()[:, :0], InvalidArgumentError, "no prompt"),
        (activations().astype(complex), InvalidTypeError, "complex128"),
    ],
)
def test_activations_of_another_kind_are_refused(array: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sweep(array, "label")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"probes": []}, InvalidArgumentError, "probes is empty"),
        ({"probes": ["ridge", "ridge"]}, InvalidArgumentError, "two probes are called 'ridge'"),
        ({"probes": "rigde"}, InvalidArgumentError, "no probe named 'rigde'"),
        ({"probes": {1: "ridge"}}, InvalidTypeError, "named by a text"),
        ({"random_state": None}, InvalidTypeError, "give a seed"),
        ({"random_state": -1}, InvalidArgumentError, "out of range"),
        ({"scheduler": "cluster"}, InvalidArgumentError, "'threads', 'processes', 'synchronous'"),
        ({"n_workers": 0}, InvalidArgumentError, "at least 1"),
        ({"client": "tcp://there"}, InvalidTypeError, "distributed.Client, not str"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sweep(activations(), "label", **options)


def test_names_and_estimators_may_be_mixed() -> None:
    scores = sweep(activations(), "label", ["ridge", LinearSVC(dual=False)], 2)
    assert scores.probe.values.tolist() == ["ridge", "LinearSVC"]


class Counted(BackendArray):
    """Stored values that note every read: its number of values and its thread."""

    def __init__(self, data: Any) -> None:
        self.data, self.shape, self.dtype = data, data.shape, data.dtype
        self.reads: list[tuple[int, int]] = []

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.BASIC, self._read)

    def _read(self, key: Any) -> Any:
        found = self.data[key]
        self.reads.append((found.size, threading.get_ident()))
        return found


@pytest.mark.parametrize("dims", [("layer", "prompt", "hidden"), ("hidden", "prompt", "layer")])
def test_a_lazy_array_is_read_once_per_layer_in_the_tasks_and_never_whole(dims: tuple[str, ...]) -> None:
    stored = Counted(activations().transpose(*dims).values)
    # As xarray wraps what its backends open.
    layers: list[Any] = [indexing.LazilyIndexedArray, indexing.CopyOnWriteArray, indexing.MemoryCachedArray]
    cached: Any = stored
    for wrap in layers:
        cached = wrap(cached)
    lazy = xr.Dataset({"resid_mean": xr.Variable(dims, cached)}, coords=activations().coords).resid_mean
    scores = sweep(lazy, "label", ["ridge", "lda"], 2, n_workers=2)
    assert [size for size, _ in stored.reads] == [PROMPTS * HIDDEN] * LAYERS
    assert threading.get_ident() not in {thread for _, thread in stored.reads}
    assert not lazy._in_memory
    same(scores, sweep(activations(), "label", ["ridge", "lda"], 2))


def test_dask_arrays_are_fitted_as_they_are() -> None:
    same(sweep(activations().chunk(layer=2, prompt=17), "label", "mass_mean", 3), sweep(activations(), "label", "mass_mean", 3))


# -- where it runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The activations in a store of ours, and three layers of many hidden units."""
    store = lz.open_store(tmp_path_factory.mktemp("sweep") / "acts")
    data = activations()
    layers = dict(zip(data.layer.values.tolist(), data.values, strict=True))
    lz.write_activations(store, model="a/model", prompts=TEXTS, pooled={"resid_mean": layers}, coords={"label": Y.tolist()})
    wide = np.random.default_rng(0).normal(size=(LAYERS, PROMPTS, 1024)).astype("float32")
    lz.write_activations(store, model="wide", prompts=TEXTS, pooled={"resid_mean": dict(enumerate(wide))})
    return store


def opened(store: Store, model: str = "a/model") -> xr.DataArray:
    array: xr.DataArray = store.dataset(model)["resid_mean"]
    assert not array._in_memory
    return array


@pytest.fixture
def in_process_client() -> Iterator[Any]:
    with local_client(workers=1, threads=2) as client:
        yield client


NAMES = ["logistic_regression", "ridge", "svm", "mass_mean"]


def test_scores_are_the_same_bit_for_bit_on_every_scheduler(stored: Store, in_process_client: Any) -> None:
    expected = sweep(activations(), "label", NAMES, 2, scheduler="synchronous")
    same(sweep(opened(stored), "label", NAMES, 2, scheduler="synchronous"), expected)
    same(sweep(opened(stored), "label", NAMES, 2, scheduler="threads", n_workers=2), expected)
    same(sweep(opened(stored), "label", NAMES, 2, scheduler="threads", n_workers=8), expected)
    same(sweep(opened(stored), "label", NAMES, 2, scheduler="processes", n_workers=2), expected)
    same(sweep(opened(stored), "label", NAMES, 2, client=in_process_client), expected)
    same(sweep(opened(stored).load(), "label", NAMES, 2, client=in_process_client), expected)
    same(sweep(opened(stored).chunk(layer=1), "label", NAMES, 2, client=in_process_client), expected)
    same(sweep(opened(stored).load().isel(layer=[0]), "label", NAMES, 2, client=in_process_client), expected.isel(layer=[0]))


def test_a_client_brings_its_own_workers_and_its_errors_are_ours(in_process_client: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="leave the others out"):
        sweep(activations(), "label", client=in_process_client, scheduler="threads")
    data = values()
    data[0, 0, 0] = np.nan
    with pytest.raises(InvalidArgumentError, match="layer 4"):
        sweep(activations(data), "label", client=in_process_client)


def test_worker_processes_read_the_store_themselves_and_score_the_same(stored: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    distributed = pytest.importorskip("distributed")
    from distributed.protocol import pickle

    dumps: Any = pickle.dumps
    wide = opened(stored, "wide")
    sent: list[int] = []
    with local_client(workers=2, processes=True) as client:
        submit = client.submit

        def counted(function: Any, *args: Any, **kwargs: Any) -> Any:
            sent.append(len(dumps([arg for arg in args if not isinstance(arg, distributed.Future)])))
            return submit(function, *args, **kwargs)

        monkeypatch.setattr(client, "submit", counted)
        monkeypatch.setattr(client, "scatter", lambda *args, **kwargs: pytest.fail("values were sent"))
        scores = sweep(wide, Y, NAMES, 2, client=client)
    assert len(sent) == 1 + LAYERS
    assert sum(sent) < 20_000 < wide.nbytes / 20
    assert not wide._in_memory
    same(scores, sweep(wide.load(), Y, NAMES, 2))


def test_the_process_is_left_as_it_was_however_tasks_overlap() -> None:
    def blas() -> list[int]:
        return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]

    threads, filters = blas(), list(warnings.filters)
    inside, leave = threading.Barrier(3), [threading.Event(), threading.Event()]

    def task(number: int) -> None:
        with fits_running():
            inside.wait(10)
            leave[number].wait(10)

    tasks = [threading.Thread(target=task, args=(number,)) for number in (0, 1)]
    for thread in tasks:
        thread.start()
    inside.wait(10)
    leave[0].set()
    tasks[0].join()
    assert set(blas()) == {1}
    leave[1].set()
    tasks[1].join()
    assert blas() == threads
    assert list(warnings.filters) == filters


def test_a_failing_fit_leaves_the_process_as_it_was() -> None:
    filters = list(warnings.filters)
    with pytest.raises(NotFiniteError), fits_running():
        raise NotFiniteError(0, [0])
    assert list(warnings.filters) == filters


def test_progress_is_shown_only_if_enabled_and_on_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = {}
    for terminal, enabled in ((True, False), (True, True), (False, True)):
        error = io.StringIO()
        monkeypatch.setattr(error, "isatty", lambda terminal=terminal: terminal, raising=False)
        monkeypatch.setattr("sys.stderr", error)
        sweep(activations(), "label", n_workers=2, progress=enabled)
        shown[terminal, enabled] = "3/3" in error.getvalue()
    assert shown == {(True, False): False, (True, True): True, (False, True): False}
