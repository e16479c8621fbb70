"""Results of probes on tokens: measured for each layer and fold, and put into one dataset of scores. Never fits; reads no activation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import xarray as xr

from lmprobe_zarr.batch import Stage, reduce_scores
from lmprobe_zarr.interchange import read_list
from lmprobe_zarr.probes import LabelledTokens, SequenceSolution, TokenFolds
from lmprobe_zarr.probes.metrics import accuracy, auroc
from lmprobe_zarr.probes.token_controls import DEALT
from lmprobe_zarr.sweeps.given import layer_labels
from lmprobe_zarr.sweeps.shuffles import add_p_values, shuffled_attributes, shuffled_name
from lmprobe_zarr.sweeps.token_predictions import Predicted, prediction_variables
from lmprobe_zarr.sweeps.token_rows import Solutions, TaskPlan
from lmprobe_zarr.sweeps.token_stream import Tested
from lmprobe_zarr.typing import Array, Ints

__all__ = [
    "TokenResult", "TokenTrial", "add_shuffles", "as_objects", "describe_labels", "failed_result", "failures_of", "make_scores",
    "mean_results", "measure", "result_of", "score_layer",
]  # fmt: skip
_FAILED: Final = "the fit failed"


@dataclass(frozen=True, slots=True)
class TokenTrial:
    """One place along ``probe``: its name, and which control it is, if any."""

    name: str
    control: str = ""


class TokenResult(NamedTuple):
    """What one probe scored on one layer and fold."""

    accuracy: float
    auroc: float
    reason: str
    seconds: float
    converged: bool
    predicted: Predicted | None = None


def result_of(measured: tuple[float, float, str, Predicted | None], seconds: float = 0.0, converged: bool = True) -> TokenResult:
    return TokenResult(*measured[:3], seconds, converged, measured[3])


def failed_result(problem: str, seconds: float) -> TokenResult:
    """That of a fit that ended in an error."""
    return TokenResult(np.nan, np.nan, f"{_FAILED} ({problem})", seconds, True)


def failures_of(scores: xr.Dataset) -> str:
    """How many scores are NaN because their fits failed, and why; empty if none are."""
    bad = np.isnan(scores["accuracy"].values)
    if not bad.any():
        return ""
    reasons = [reason for reason in read_list(scores["accuracy"].attrs, "nan_reasons") or () if _FAILED in reason]
    return f"{int(bad.sum())} of {bad.size} scores are NaN because their fits failed ({'; '.join(reasons[:3])})"


def as_objects(rows: list[TokenResult]) -> Array:
    """Results as an array of objects. Without this, numpy would make an axis of their fields."""
    held = np.empty(len(rows), object)
    held[:] = rows
    return held


def mean_results(results: Array) -> Array:
    """The mean over the first axis, of shuffles, as one result for each layer and fold."""
    rows = []
    for place in np.ndindex(results.shape[1:]):
        some: list[TokenResult] = list(results[(slice(None), *place)])
        # A shuffle whose fit failed is left out.
        shares, areas = ([value for each in some if np.isfinite(value := getattr(each, name))] for name in ("accuracy", "auroc"))
        share, area = (float(np.mean(known)) if known else np.nan for known in (shares, areas))
        seconds, ended = sum(each.seconds for each in some), all(each.converged for each in some)
        rows.append(TokenResult(share, area, "" if areas else some[0].reason, seconds, ended))
    return as_objects(rows).reshape(results.shape[1:])


def add_shuffles(scores: xr.Dataset, shuffled: Mapping[str, Array]) -> xr.Dataset:
    """The scores with those of each shuffle, and what they say; by probe the results, shape (shuffle, layer, fold)."""
    n = len(next(iter(shuffled.values())))
    for metric in ("accuracy", "auroc"):
        values = np.full((scores.sizes["layer"], scores.sizes["probe"], n), np.nan)
        for place, name in enumerate(scores["probe"].values.tolist()):
            if name in shuffled:
                by_fold = np.reshape([getattr(each, metric) for each in shuffled[name].ravel()], shuffled[name].shape)
                values[:, place] = xr.DataArray(by_fold, dims=("shuffle", "layer", "fold")).mean("fold").values.T
        attrs = shuffled_attributes(str(scores[metric].attrs["long_name"]), n, larger_is_better=True)
        scores[shuffled_name(metric)] = ("layer", "probe", "shuffle"), values, attrs
    return add_p_values(scores, ("accuracy", "auroc"))


def score_layer(
    codes: Array, prompt: Array, stage: Stage, keep: bool, solutions: Solutions, tested: Tested
) -> dict[tuple[int, int], tuple[float, float, str, Predicted | None]]:
    """The result of `measure` for every probe and fold of a layer."""
    found = {}
    for key, scores in tested.scores.items():
        solution = solutions[key]
        pool = solution.pool if isinstance(solution, SequenceSolution) else None
        found[key] = measure(codes, prompt, stage, keep, tested.places[key[1]], scores, solution.classes, pool)
    return found


def measure(
    codes: Array,
    prompt: Array,
    stage: Stage,
    keep: bool,
    places: Array,
    scores: Array,
    classes: Array,
    pool: Callable[[Array, Ints], Array] | None = None,
) -> tuple[float, float, str, Predicted | None]:
    """Accuracy, AUROC, and the reason why the AUROC is NaN, of some scores; and the predictions, if they are kept.

    With `pool`, scores are projections of tokens, which it makes the scores of prompts of; otherwise the stage's pooling does.
    """
    true, rows = codes[places], places
    if stage.of == "score":
        order = np.argsort(prompt[places], kind="stable")
        rows, counts = np.unique(prompt[places], return_counts=True)
        counts = counts.astype(np.int64)
        scores = reduce_scores(scores[order], counts, stage.pooling) if pool is None else pool(scores[order], counts)
        true = true[order][np.cumsum(counts) - 1]
    predicted = classes[(scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(axis=1)]
    return accuracy(predicted, true), *auroc(scores, true, classes), Predicted(rows, predicted, scores) if keep else None


def describe_labels(
    array: xr.DataArray, examples: LabelledTokens, folds: TokenFolds | None = None, *, by_prompt: bool = False
) -> dict[str, Any]:
    """Attributes of a result: the labels, and how often each class occurs among the tokens, or prompts, that are scored."""
    codes = examples.codes
    if folds is not None:
        scored = np.asarray(folds.test.any(axis=0))[examples.prompt]
        first = np.unique(examples.prompt[scored], return_index=True)[1] if by_prompt else slice(None)
        codes = codes[scored][first]
    counts = np.bincount(codes, minlength=len(examples.classes))
    return {
        "labels": examples.name,
        "classes": examples.classes.tolist(),
        "class_counts": counts.tolist(),
        "majority_share": float(counts.max() / counts.sum()),
        "n_tokens": len(examples.rows),
        "n_prompts": len(np.unique(examples.prompt)),
        "n_missing": examples.n_missing,
        "variable": str(array.name) if array.name is not None else "",
    }


def make_scores(
    array: xr.DataArray,
    examples: LabelledTokens,
    folds: TokenFolds,
    plan: TaskPlan,
    stage: Stage,
    found: Mapping[TokenTrial, Array],
    seconds: Array,
    *,
    predictions: bool = False,
) -> xr.Dataset:
    """The scores of a sweep over tokens; with the predictions of the fits on the given labels, where they are kept."""
    rows = np.stack(list(found.values()), axis=1)  # layer, probe, fold
    reasons: dict[str, set[str]] = {}
    for (_, place, _), row in np.ndenumerate(rows):
        if row.reason:
            reasons.setdefault(row.reason, set()).add(list(found)[place].name)
    nan_reasons = [f"{', '.join(sorted(names))}: {reason}" for reason, names in sorted(reasons.items())]
    count: Callable[[Any], int] = (
        (lambda kept: int(kept[examples.prompt].sum()))
        if stage.of == "nothing"
        else (lambda kept: len(np.unique(examples.prompt[kept[examples.prompt]])))
    )

    def column(name: str, dtype: type, attrs: dict[str, Any]) -> tuple[tuple[str, ...], Array, dict[str, Any]]:
        values = [getattr(row, name) for row in rows.ravel()]
        return ("layer", "probe", "fold"), np.array(values, dtype).reshape(rows.shape), attrs

    why = {"nan_reasons": nan_reasons} if nan_reasons else {}
    failed = [reason for reason in nan_reasons if f": {_FAILED}" in reason]
    lost = {"nan_reasons": failed} if failed else {}
    converged = column("converged", bool, {"long_name": "fit ended before its iteration limit"})
    scores = xr.Dataset(
        {
            "accuracy": column("accuracy", float, {"long_name": "accuracy", "units": "1", **lost}),
            "auroc": column("auroc", float, {"long_name": "area under the ROC curve", "units": "1", **why}),
            "fit_seconds": column("seconds", float, {"long_name": "wall time of the fit", "units": "s"}),
            "converged": converged,
            "n_train": ("fold", np.array([count(kept) for kept in folds.train])),
            "n_test": ("fold", np.array([count(kept) for kept in folds.test])),
            "pass_seconds": ("layer", seconds, {"long_name": "time of the passes that sum, over all tasks", "units": "s"}),
        },
        coords={
            "layer": layer_labels(array),
            "probe": [trial.name for trial in found],
            "kind": ("probe", ["control" if trial.control else "probe" for trial in found]),
            "control": ("probe", [trial.control for trial in found]),
            "fold": np.arange(len(folds.train)),
        },
    )
    scores.attrs = {
        **describe_labels(array, examples, folds, by_prompt=stage.of == "score"),
        "task": "classification",
        "groups": folds.group,
        "cv": folds.described,
        "pooling": "all" if stage.of == "nothing" else f"score:{stage.pooling}",
        "random_state": plan.random_state,
        "n_unconverged": int((~converged[1]).sum()),
    }
    if predictions:
        held = np.frompyfunc(lambda row: row.predicted, 1, 1)(rows)
        held[:, [place for place, trial in enumerate(found) if trial.control in DEALT]] = None
        variables, coords = prediction_variables(array, examples, folds, held, by_prompt=stage.of == "score")
        scores = scores.assign_coords(coords).assign(variables)
    return scores
