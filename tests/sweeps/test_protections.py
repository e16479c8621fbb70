"""One set of protections for all calls that take labels: a table, call by protection, that is held full.

Each cell of the table is a test that the protection acts in the call, or a reason why it has nothing to act on.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import xarray as xr
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

import lmprobe_zarr as lz
from lmprobe_zarr.accessor import ArrayAccessor, DatasetAccessor
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, LabelError, LmprobeZarrError
from lmprobe_zarr.interchange import ABSENT_TEXT
from lmprobe_zarr.probe import LayerSweep
from lmprobe_zarr.probes import calibration_curves, roc_curves

N, HIDDEN = 40, 6
Y = np.tile([0, 1], N // 2)
FACT = np.arange(N) // 4


def activations(name: str = "a", seed: int = 0, y: Any = Y) -> xr.DataArray:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(1, N, HIDDEN)) + np.asarray(y)[:, None] * np.eye(HIDDEN)[0]
    prompts = [lz.prompt_hash(f"{name} {i}") for i in range(N)]
    coords = {"layer": [0], "prompt": prompts, "label": ("prompt", Y), "fact": ("prompt", FACT)}
    return xr.DataArray(x.astype("float32"), dims=("layer", "prompt", "hidden"), coords=coords, name="resid_mean")


OTHER = activations("b", 1)


def probe(of: Any = "ridge") -> lz.Probe:
    return lz.Probe(classifier=of, random_state=0)


def fitted() -> lz.Probe:
    return probe().fit_from_activations(OTHER.isel(layer=0), Y)


def curve(make: Callable[..., Any], array: xr.DataArray, labels: Any) -> Any:
    scores = 1 / (1 + np.exp(-array.isel(layer=0, hidden=0)))
    return make(scores, labels)


def transfer(array: xr.DataArray, labels: Any, of: Any = "ridge", **options: Any) -> Any:
    options = {name: {"a": given, "b": "fact"} if name == "groups" else given for name, given in options.items()}
    return lz.sweep_transfer({"a": array, "b": OTHER}, {"a": labels, "b": "label"}, of, 2, **options)


#: Call, as (array, labels, probe, **options).
CALLS: dict[str, Callable[..., Any]] = {
    "sweep": lambda array, labels, of="ridge", **given: lz.sweep(array, labels, of, None if "split" in given else 2, **given),
    "plan_sweep": lambda array, labels, of="ridge", **given: lz.plan_sweep(array, labels, of, None if "split" in given else 2, **given),
    "sweep_tokens": lambda array, labels, of="ridge", **given: lz.sweep_tokens(array, labels, of, 2, **given),
    "sweep_transfer": transfer,
    "fit_directions": lambda array, labels, of="ridge", **given: lz.fit_directions(array, labels, of, **given),
    "fit_tokens": lambda array, labels, of="ridge", **given: lz.fit_tokens(array, labels, of, **given),
    "Probe.fit": lambda array, labels, of="ridge", **given: probe(of).fit(array.isel(layer=0), labels, **given),
    "Probe.fit_from_activations": lambda array, labels, of="ridge", **given: probe(of).fit_from_activations(
        array.isel(layer=0), labels, **given
    ),
    "Probe.evaluate": lambda array, labels: fitted().evaluate(array.isel(layer=0), labels),
    "Probe.score": lambda array, labels: fitted().score(array.isel(layer=0), labels),
    "Probe.score_from_activations": lambda array, labels: fitted().score_from_activations(array.isel(layer=0), labels),
    "ProbeEnsemble.fit": lambda array, labels, of="ridge", **given: lz.ProbeEnsemble.bootstrap(probe(of), 2, 0, voting="hard").fit(
        array.isel(layer=0), labels, **given
    ),
    "ProbeEnsemble.score": lambda array, labels: lz.ProbeEnsemble([fitted()], voting="hard").score(array.isel(layer=0), labels),
    "roc_curves": lambda array, labels: curve(roc_curves, array, labels),
    "calibration_curves": lambda array, labels: curve(calibration_curves, array, labels),
}
FUNCTIONS: dict[str, Any] = {
    **{name: getattr(lz, name) for name in ("sweep", "plan_sweep", "sweep_tokens", "sweep_transfer", "fit_directions", "fit_tokens")},
    **{f"Probe.{name}": getattr(lz.Probe, name) for name in ("fit", "fit_from_activations", "evaluate", "score", "score_from_activations")},
    **{f"ProbeEnsemble.{name}": getattr(lz.ProbeEnsemble, name) for name in ("fit", "score")},
    "roc_curves": roc_curves,
    "calibration_curves": calibration_curves,
}
SCORES = "draws scores that SCORE_CALLS check"
NO_LABELS = "takes no labels, and fits nothing"
#: Public calls that the table leaves out, each with the reason.
OUTSIDE: dict[str, str] = {
    "Probe.watch": "it scores tokens while a model runs; the probe was fitted before",
    "ds.lz.save": "it writes directions that were fitted before",
    **dict.fromkeys(("array.lz.table", "ds.lz.plot", "ds.lz.plot_heatmap", "ds.lz.plot_transfer"), SCORES),
    **dict.fromkeys(("ds.lz.plot_roc", "ds.lz.plot_calibration"), "draws curves that were computed"),
    **dict.fromkeys(("array.lz.plot_cosine", "array.lz.plot_tokens"), "draws scores that were computed"),
    **dict.fromkeys(("score_tokens", "cosine_similarity", "compare_groups"), NO_LABELS),
    **{f"{kind}.lz.{name}": NO_LABELS for kind in ("ds", "array") for name in ("at", "pool", "padded", "to_torch", "norms")},
    "array.lz.to_series": NO_LABELS,
    "array.lz.heads": NO_LABELS,
    "ds.lz.to_dataframe": NO_LABELS,
    **{
        f"ProbeEnsemble.{name}": NO_LABELS
        for name in ("bootstrap", "from_configs", "predict", "predict_proba", "prediction_std", "predict_spread", "save", "load")
    },
    "ds.lz.to_sparse": NO_LABELS,
    **{f"LayerSweep.{name}": NO_LABELS for name in ("predict", "predict_proba")},
    **{f"LayerSweep.{name}": "each layer is scored as by Probe.score, on prompts of its model" for name in ("score", "best_layer")},
    **{
        f"Probe.{name}": NO_LABELS
        for name in (
            "predict", "predict_proba", "predict_from_activations", "predict_proba_from_activations", "decision_function", "warmup",
            "get_params", "set_params", "save", "load", "compute_layer_importance",
        )
    },
}  # fmt: skip


def of_tokens() -> xr.DataArray:
    """Two layers of 20 prompts with four tokens each."""
    rng = np.random.default_rng(2)
    y = np.repeat(np.arange(20) % 2, 4)
    x = rng.normal(size=(2, 80, HIDDEN)) + 0.5 * y[:, None]
    prompts, positions = np.repeat([f"p{i}" for i in range(20)], 4), np.tile(np.arange(4), 20)
    coords = {"layer": [0, 1], "prompt": ("token", prompts), "position": ("token", positions), "label": ("token", y)}
    return xr.DataArray(x, dims=("layer", "token", "hidden"), coords=coords, name="resid")


#: Calls that are given the scores of a sweep, as (scores, metric).
SCORE_CALLS: dict[str, Callable[..., Any]] = {
    "compare": lz.compare,
    "confidence_intervals": lambda scores, metric="accuracy": lz.confidence_intervals(scores, metric, n_resamples=20),
    "selectivity": lz.selectivity,
    "ds.lz.best": lambda scores, metric="accuracy": scores.lz.best(metric),
    "ds.lz.table": lambda scores, metric="accuracy": scores.lz.table(metric),
}
#: Calls that hand out or measure rows, as (array, **options).
ROW_CALLS: dict[str, Callable[..., Any]] = {
    "array.lz.batches": lambda array, **given: next(iter(array.lz.batches(batch_tokens=8, **given))),
    "ds.lz.batches": lambda array, **given: next(iter(array.to_dataset().lz.batches(batch_tokens=8, **given))),
    "array.lz.statistics": lambda array, **given: array.lz.statistics(**given),
    "ds.lz.statistics": lambda array, **given: array.to_dataset().lz.statistics(**given),
}


def repeated() -> xr.DataArray:
    """The rows, with the first prompt once more at the end in place of the last but one."""
    return activations().isel(prompt=np.r_[np.arange(N - 1), 0])


def numbers(result: Any) -> Any:
    """What a call gave, to compare."""
    if isinstance(result, xr.Dataset):
        measures = [name for name in ("accuracy", "coef", "auroc", "ece") if name in result]
        return {name: result[name].values.round(5).tolist() for name in measures}
    if isinstance(result, lz.ProbeEnsemble):
        return [numbers(member) for member in result.probes_]
    if isinstance(result, lz.Probe):
        return result.pipeline_[-1].coef_.round(5).tolist()
    return str(result)


# -- the protections, each a check of one call ----------------------------------------------------------------------------------


def a_prompt_with_two_labels(call: str) -> None:
    array = repeated()
    labels = np.r_[Y[: N - 1], 1 - Y[0]]
    for given in (labels, labels.tolist(), array.label.copy(data=labels)):
        with pytest.raises(LabelError, match=r"two labels, [01] and [01]"):
            CALLS[call](array, given)
    with pytest.raises(LabelError, match="two labels"):
        CALLS[call](array.assign_coords(label=("prompt", labels)), "label")


def a_missing_label(call: str) -> None:
    takes = "missing" in inspect.signature(FUNCTIONS[call]).parameters
    for missing in (None, np.nan, ABSENT_TEXT):
        words = np.array([missing, *np.where(Y, "true", "false")[1:]], object)
        labels = words if missing is ABSENT_TEXT else np.array([missing, *Y[1:]], object)
        with pytest.raises(LmprobeZarrError, match=r"miss|None|labels hold") as caught:
            CALLS[call](activations().assign_coords(some=("prompt", labels)), "some")
        assert ("missing='drop'" in str(caught.value)) == takes
        if takes and missing is not ABSENT_TEXT:
            CALLS[call](activations().assign_coords(some=("prompt", labels)), "some", missing="drop")
    if takes:
        with pytest.raises(InvalidArgumentError, match="missing='maybe' is unknown"):
            CALLS[call](activations(), "label", missing="maybe")


def labels_matched_by_prompt(call: str) -> None:
    array = activations()
    expected = numbers(CALLS[call](array, Y))
    backwards = array.label.isel(prompt=slice(None, None, -1))
    by_hash = dict(zip(array.prompt.values.tolist()[::-1], Y[::-1].tolist(), strict=True))
    for given in ("label", backwards, by_hash):
        assert numbers(CALLS[call](array, given)) == expected
    with pytest.raises(LabelError, match="no coordinate 'lable'"):
        CALLS[call](array, "lable")


def marks_that_outlive_their_values(call: str) -> None:
    signs = 2 * Y - 1
    y = xr.DataArray(signs, dims="prompt", coords={"prompt": activations().prompt}, attrs={"missing": N // 2, "_FillValue": -1})
    array = activations().assign_coords(sign=y)
    if call in (*TESTED, "sweep_transfer"):
        for given in (y, "sign"):
            with pytest.raises(LabelError, match="classes") if call == "sweep_transfer" else warnings.catch_warnings():
                CALLS[call](array, given)
        return
    expected = numbers(CALLS[call](array, signs))
    for given in (y, "sign"):
        assert numbers(CALLS[call](array, given)) == expected


def numbers_beyond_64_bits(call: str) -> None:
    with pytest.raises(LmprobeZarrError):
        CALLS[call](activations(), [int(v) * 10**20 for v in Y])


def a_prompt_in_two_groups(call: str) -> None:
    array = repeated()
    groups = np.r_[FACT[: N - 1], 99]
    labels = np.r_[Y[: N - 1], Y[0]]
    for given in (groups, array.fact.copy(data=groups)):
        with pytest.raises(LabelError, match=r"two groups, 0 and 99|40 groups for 39 prompts"):
            CALLS[call](array, labels, groups=given)
    with pytest.raises(LmprobeZarrError):
        CALLS[call](activations(), "label", groups=FACT[:-1])
    with pytest.raises(LmprobeZarrError):
        CALLS[call](activations(), "label", groups=[None, *FACT[1:]])
    CALLS[call](activations(), "label", groups="fact")


def sides_given_by_a_column(call: str) -> None:
    array = activations().assign_coords(side=("prompt", np.where(np.arange(N) < 30, "train", "test")))
    CALLS[call](array, "label", split="side")
    with pytest.raises(LabelError, match="needs prompts of 'train' and of 'test'"):
        CALLS[call](array, "label", split=["train"] * N)


def fits_that_stop_early(call: str) -> None:
    scaled = activations() * np.logspace(0, 3, HIDDEN)
    with pytest.warns(ConvergenceWarning):
        CALLS[call](scaled.assign_coords(label=("prompt", Y)), "label", LogisticRegression(max_iter=2))


def several_sets_of_labels(call: str) -> None:
    both = xr.concat([activations().label.drop_vars("fact", errors="ignore")] * 2, xr.Variable("set", ["one", "two"]))
    with pytest.raises(LmprobeZarrError):
        CALLS[call](activations(), both)


CHECKS: dict[str, Callable[[str], None]] = {
    "contradictory labels": a_prompt_with_two_labels,
    "missing": a_missing_label,
    "label matching": labels_matched_by_prompt,
    "marks": marks_that_outlive_their_values,
    "numbers beyond 64 bits": numbers_beyond_64_bits,
    "groups": a_prompt_in_two_groups,
    "split": sides_given_by_a_column,
    "convergence": fits_that_stop_early,
    "several sets": several_sets_of_labels,
}
CURVES = ("roc_curves", "calibration_curves")
TESTED = ("Probe.evaluate", "Probe.score", "Probe.score_from_activations", "ProbeEnsemble.score")
FITTED = ("Probe.fit", "Probe.fit_from_activations", "ProbeEnsemble.fit")
#: (call, protection) to the reason why there is nothing to protect.
EXEMPT: dict[tuple[str, str], str] = {
    **{(call, "groups"): "nothing is learned or split here, so nothing can be on both sides" for call in (*CURVES, *TESTED)},
    **{(call, "split"): "there are no folds" for call in (*CURVES, *TESTED, "fit_directions", "fit_tokens")},
    **{(call, "split"): "one fit on all rows given; select the rows" for call in FITTED},
    ("sweep_tokens", "split"): "cv=[(train, test)] of prompts says the same",
    ("sweep_transfer", "split"): "the split is between the datasets; within one, cv takes a splitter",
    **{(call, "convergence"): "nothing is fitted" for call in (*CURVES, *TESTED, "plan_sweep")},
    **{
        (
            call,
            "convergence",
        ): "takes named probes alone; see test_a_descent_that_did_not_converge_is_reported, test_fits_that_stop_early_are_reported"
        for call in ("sweep_tokens", "fit_tokens")
    },
    **{(call, "label matching"): "its plan does not depend on which prompt has which label" for call in ("plan_sweep",)},
    **{(call, "several sets"): "learns several sets on the same folds" for call in ("sweep", "plan_sweep")},
}


@pytest.mark.few(10)
@pytest.mark.parametrize("protection", CHECKS)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.filterwarnings("ignore:The number of unique classes")
def test_each_protection_acts_in_each_call_or_has_a_reason(call: str, protection: str) -> None:
    reason = EXEMPT.get((call, protection))
    if reason is None:
        CHECKS[protection](call)
        return
    assert len(reason) > 10
    own = {"groups", "split", "missing"} & {protection}
    taken = set(inspect.signature(FUNCTIONS[call]).parameters)
    assert not own & taken or (call, protection) == ("Probe.evaluate", "groups"), "what a call takes, it checks"


def test_the_table_has_every_public_call() -> None:
    functions = {
        name for name in lz.__all__ if name.startswith(("sweep", "plan_sweep", "fit_", "score_", "compare", "confidence", "select", "cos"))
    }
    found = functions | {"roc_curves", "calibration_curves"}
    kinds = {"Probe": lz.Probe, "ProbeEnsemble": lz.ProbeEnsemble, "LayerSweep": LayerSweep, "array.lz": ArrayAccessor}
    for prefix, kind in {**kinds, "ds.lz": DatasetAccessor}.items():
        found |= {f"{prefix}.{name}" for name, held in inspect.getmembers(kind) if not name.startswith("_") and callable(held)}
    found |= {"Probe.decision_function"}
    assert found == set(CALLS) | set(SCORE_CALLS) | set(ROW_CALLS) | set(OUTSIDE)
    assert set(CALLS) == set(FUNCTIONS)
    assert not (set(CALLS) | set(SCORE_CALLS) | set(ROW_CALLS)) & set(OUTSIDE)
    assert all(call in CALLS and protection in CHECKS for call, protection in EXEMPT)
    assert all(len(reason) > 10 for reason in OUTSIDE.values())


# -- calls on scores, and on rows ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swept() -> dict[str, xr.Dataset]:
    probes = ["ridge", "mass_mean"]
    return {
        "prompts": lz.sweep(activations(), "label", probes, 4, controls="shuffled_labels", predictions=True),
        "tokens": lz.sweep_tokens(of_tokens(), "label", probes, 4, controls="shuffled_labels", predictions=True),
    }


@pytest.mark.few(6)
@pytest.mark.parametrize("kind", ["prompts", "tokens"])
@pytest.mark.parametrize("call", SCORE_CALLS)
def test_each_call_on_scores_refuses_what_it_cannot_read(call: str, kind: str, swept: dict[str, xr.Dataset]) -> None:
    scores, of = swept[kind], SCORE_CALLS[call]
    of(scores)
    for metric in ("acuracy", 5, ["accuracy", "x"], np.zeros(2), np.nan):
        with pytest.raises(LmprobeZarrError, match=r"there is no (score|metric)|no names|holds no metric|unknown"):
            of(scores, metric)
    nothing: list[int] = []
    for dim in ("layer", "probe", "fold"):
        if not call.startswith("ds"):
            with pytest.raises(InvalidArgumentError, match=f"these scores are of no {dim}"):
                of(scores.isel({dim: nothing}))
    if not call.startswith("ds"):
        for given in (None, scores.accuracy, scores.drop_attrs(), activations().to_dataset(), scores.rename(probe="p")):
            with pytest.raises(LmprobeZarrError, match=r"scores are the xarray.Dataset|holds no scores over probe and fold"):
                of(given)


@pytest.mark.parametrize("kind", ["prompts", "tokens"])
@pytest.mark.parametrize("option", [("reference", "lda"), ("reference", np.array(["ridge", "lda"])), ("reference", True), ("along", "prob"),
                                    ("along", None), ("permutations", -1), ("permutations", "9"), ("permutations", None)])  # fmt: skip
def test_options_of_a_comparison_are_refused_where_they_cannot_be(option: tuple[str, Any], kind: str, swept: dict[str, xr.Dataset]) -> None:
    with pytest.raises(InvalidArgumentError, match=r"use one of|give 999"):
        lz.compare(swept[kind], **dict([option]))
    with pytest.raises(InvalidArgumentError, match="'ridge' is there twice"):
        lz.compare(swept[kind].isel(probe=[0, 0]))


@pytest.mark.parametrize("option", [("level", "0.9"), ("level", None), ("level", True), ("n_resamples", 0), ("n_resamples", 1.5),
                                    ("random_state", -1), ("random_state", None), ("random_state", "x")])  # fmt: skip
def test_options_of_intervals_are_refused_where_they_cannot_be(option: tuple[str, Any], swept: dict[str, xr.Dataset]) -> None:
    with pytest.raises(LmprobeZarrError, match="give"):
        lz.confidence_intervals(swept["prompts"], **dict([option]))


def test_numbers_of_numpy_are_numbers(swept: dict[str, xr.Dataset]) -> None:
    number: Callable[[int], Any] = np.int64
    plain = lz.sweep(activations(), "label", "ridge", 2, repeats=2, seeds=2)
    found = lz.sweep(activations(), "label", "ridge", number(2), repeats=number(2), seeds=number(2))
    xr.testing.assert_identical(found[["accuracy"]], plain[["accuracy"]])
    half: Any = np.float32(0.5)
    mine = lz.confidence_intervals(swept["prompts"], level=half, n_resamples=number(20), random_state=number(0))
    xr.testing.assert_allclose(mine, lz.confidence_intervals(swept["prompts"], level=0.5, n_resamples=20))
    truth: Any = np.bool_(False)
    batches = activations().lz.batches(batch_tokens=number(8), shuffle=truth)
    np.testing.assert_array_equal(next(iter(batches)), next(iter(activations().lz.batches(batch_tokens=8, shuffle=False))))
    np.testing.assert_array_equal(
        of_tokens().lz.statistics(skip_positions=number(0)).mean_value, of_tokens().lz.statistics(skip_positions=[0]).mean_value
    )


@pytest.mark.parametrize("call", ROW_CALLS)
def test_each_call_on_rows_refuses_options_that_it_cannot_follow(call: str) -> None:
    array, of = of_tokens(), ROW_CALLS[call]
    of(array)
    of(array, where=(array.position > 0).drop_vars(["prompt", "position"]), skip_positions=[1], missing="drop")
    nothing: list[int] = []
    wrong: list[tuple[str, Any]] = [
        *(("missing", given) for given in ("maybe", None, ["drop"], np.zeros(2))),
        *(("skip_positions", given) for given in (-1, None, 1.5, "0", True, np.nan)),
        *(("where", given) for given in (np.zeros(80, bool), np.ones(3, bool), np.ones(80), "label", array.position)),
        *(("layer", given) for given in (7, "x", 1.5, nothing)),
    ]
    if call.endswith("batches"):
        wrong += [(name, given) for name in ("shuffle", "drop_last", "prefetch") for given in ("False", None, 2, [True], np.zeros(2))]
        wrong += [("labels", given) for given in (5, "lable", [["label"]], np.zeros(2), array.label)]
        wrong += [("framework", given) for given in ("jax", None, ["numpy"])]
    for name, given in wrong:
        with pytest.raises(LmprobeZarrError, match=r"give|use|name|there is no|stored|filter less|extract it first"):
            of(array, **{name: given})
    variables: tuple[Any, ...] = ("residue", 5, ["resid"], np.zeros(2))
    for variable in variables:
        if call.startswith("ds"):
            with pytest.raises(InvalidArgumentError, match="name one of"):
                of(array, variable=variable)


@pytest.mark.parametrize("call", ["sweep", "plan_sweep", "sweep_tokens"])
def test_a_text_is_no_truth_value(call: str) -> None:
    for given in ("False", 1, None, np.zeros(2)):
        with pytest.raises(InvalidTypeError, match=r"predictions=.* is no truth value: give True or False"):
            CALLS[call](activations(), "label", predictions=given)


@pytest.mark.parametrize("probes", [None, 5, np.nan, ["ridge", None], np.zeros((2, 2)), object()])
def test_probes_of_tokens_are_names(probes: Any) -> None:
    with pytest.raises(InvalidTypeError, match="holds no names: give one or several, such as 'ridge'"):
        lz.sweep_tokens(of_tokens(), "label", probes)
    with pytest.raises(InvalidArgumentError, match="cannot be fitted block by block"):
        lz.fit_tokens(of_tokens(), "label", probes)


@pytest.mark.parametrize("call", ["sweep", "plan_sweep", "sweep_tokens", "sweep_transfer", "fit_directions", "fit_tokens"])
def test_layers_that_cannot_be_told_apart_are_refused(call: str) -> None:
    both = xr.concat([activations(), activations("a", 1)], "layer")
    for layers, said in (([3, 3], "holds a layer twice"), ([3.0, np.nan], "has a layer whose label is NaN")):
        with pytest.raises(InvalidArgumentError, match=said):
            CALLS[call](both.assign_coords(layer=layers), "label")


def test_values_of_tokens_of_another_dataset_are_refused() -> None:
    array = of_tokens()
    other = array.assign_coords(prompt=("token", np.repeat([f"q{i}" for i in range(20)], 4)))
    backwards = array.isel(token=slice(None, None, -1))
    for given in (other, backwards):
        for options in ({"labels": given.label}, {"labels": "label", "where": given.label >= 0}):
            for of in (lz.sweep_tokens, lz.fit_tokens):
                with pytest.raises(LabelError, match="of other tokens than the activations"):
                    of(array, **options)
    xr.testing.assert_identical(lz.fit_tokens(array, array.label).coef, lz.fit_tokens(array, "label").coef)


@pytest.mark.parametrize("kind", ["prompts", "tokens"])
def test_intervals_of_selected_folds_are_around_the_scores_of_these_folds(kind: str, swept: dict[str, xr.Dataset]) -> None:
    scores = swept[kind]
    for folds in ([2], [3, 1]):
        found = lz.confidence_intervals(scores.isel(fold=folds), "accuracy", n_resamples=50).accuracy
        expected = scores.accuracy.isel(fold=folds).mean("fold").isel(probe=slice(2))
        np.testing.assert_allclose(found.sel(bound="estimate").isel(probe=slice(2)), expected)
    gone = {"prompt" if kind == "prompts" else "token": np.flatnonzero(np.asarray(scores.test_fold) != 1)}
    for of in (lz.compare, lz.confidence_intervals):
        with pytest.raises(InvalidArgumentError, match=r"fold 1 tests none of the \d+ prompts that are left: leave it out too"):
            of(scores.drop_sel(probe=[name for name in scores.probe.values if "shuffled" in name]).isel(gone))


def test_probes_of_tokens_are_compared_by_exchanging_whole_prompts(swept: dict[str, xr.Dataset]) -> None:
    scores = swept["tokens"]
    for layer in (0, 1):
        found = float(lz.compare(scores.sel(layer=[layer])).p_permutation.sel(probe="mass_mean").item())
        hits = {probe: (scores.predicted.sel(layer=layer, probe=probe) == scores.true).values for probe in ("ridge", "mass_mean")}
        apart = hits["mass_mean"].astype(float) - hits["ridge"]
        tests, prompt = scores.test_fold.values, scores.prompt.values
        # What each prompt adds to the mean over the folds of the difference.
        adds = np.array(
            [sum(apart[(prompt == p) & (tests == k)].sum() / (tests == k).sum() for k in range(4)) / 4 for p in np.unique(prompt)]
        )
        adds = adds[np.abs(adds) > 1e-12]
        assert len(adds) <= 12
        signs = np.array(np.meshgrid(*[[-1, 1]] * len(adds))).reshape(len(adds), -1).T if len(adds) else np.ones((1, 0))
        assert found == pytest.approx((np.abs(signs @ adds) >= abs(adds.sum()) - 1e-12).mean())
