"""Probes on tokens: fitted on every token, scored token by token, cross-validated over prompts.

However many tokens there are, only a few blocks of them are in memory at a time. This module holds the functions that users call and builds
their results. ``token_stream`` reads the rows, ``token_scores`` says what fitted probes make of them, and ``probes.token_labels`` decides
which tokens are learned from. Never a store, a model or a plot.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from lmprobe_zarr.batch import Stage, check_flag, list_names
from lmprobe_zarr.display import name_in_messages
from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.interchange import to_interchange
from lmprobe_zarr.probes import (
    SEQUENCE_PROBES,
    LabelledTokens,
    NotFiniteError,
    TokenFolds,
    bare_variable,
    cells_of,
    group_tokens,
    is_sequence_probe,
    parse_sequence_probe,
    plan_token_folds,
    select_labelled_tokens,
    show_rows,
)
from lmprobe_zarr.probes.devices import parse_device
from lmprobe_zarr.probes.token_controls import DEALT, RANDOM_WEIGHTS, deal_labels, parse_token_controls, score_by_counts
from lmprobe_zarr.sweeps.below_chance import describe_below_chance, find_below_chance
from lmprobe_zarr.sweeps.given import (
    check_seed,
    describe_failed_layers,
    is_drawn,
    layer_labels,
    parse_token_activations,
    refuse_choice,
    warn_failed,
    warn_failed_layers,
    warn_unconverged,
)
from lmprobe_zarr.sweeps.token_results import (
    TokenTrial,
    add_shuffles,
    as_objects,
    describe_labels,
    failed_result,
    failures_of,
    make_scores,
    mean_results,
    measure,
    result_of,
    score_layer,
)
from lmprobe_zarr.sweeps.token_rows import Fitted, LayerRows, TaskPlan
from lmprobe_zarr.sweeps.token_scores import LEARNED, name_model, parse_score_stage, solutions_to_dataset
from lmprobe_zarr.sweeps.token_stream import STREAMED, fit_stream, measure_stream
from lmprobe_zarr.tasks import Runner, parse_runner
from lmprobe_zarr.tokens import stored_rows
from lmprobe_zarr.typing import Array, Client

__all__ = ["fit_tokens", "sweep_tokens"]
Labels = str | xr.DataArray | Mapping[Any, Any] | Iterable[Any]

_MOST_CELLS = 64
_LAYER_0 = "layer_0"
_EXACT = "'ridge' and 'lda' have none"


def fit_tokens(
    activations: xr.DataArray,
    labels: Labels,
    probe: str = "ridge",
    *,
    where: str | xr.DataArray | Iterable[Any] | None = None,
    missing: str = "raise",
    groups: str | xr.DataArray | Mapping[Any, Any] | Iterable[Any] | None = None,
    random_state: int = 0,
    device: str = "auto",
    client: Client | None = None,
    scheduler: str | None = None,
    n_workers: int | None = None,
    progress: bool = False,
) -> xr.Dataset:
    """A probe per layer, fitted on every token, block by block: the tokens need not fit into memory.

    Parameters
    ----------
    activations : DataArray of real numbers, dims (layer, token, hidden) in any order
        As ``store.tokens()`` has them, lazy, of Dask arrays, or in memory. Without ``layer`` it is one layer; with ``prompt`` for ``token``
        every prompt is one row. Instead of ``hidden`` any inner dimension, which the coefficients then have. Layers that nothing is
        stored of are left out.
    labels : str, DataArray, mapping or array
        The name of a coordinate along ``token`` (such as a per-prompt column); a DataArray over ``token`` or ``prompt``, matched by its
        index; a mapping from text or prompt hash to a label or to a list of one label per token; or one value per token, or per prompt.
    probe : {"ridge", "lda", "mass_mean", "mass_mean_cov", "logistic_regression", "sgd", "attention", "multimax", "softmax_mean", \
            "rolling_mean_max", "mlp"}
        See :func:`lmprobe_zarr.probes.named_probes`. The first four are exact: they are solved from sums that one pass over the tokens
        gives, and equal the fit in memory of that name, standardisation and shrinkage included. "logistic_regression" has the objective
        of the fit in memory, and reads the tokens again for each step of L-BFGS, 10 to 200 times, until its coefficients, for
        standardised units, are within 1e-4 of the optimum (of the largest, where that is above 1). "sgd" takes minibatches in random order:
        one pass for the standardisation, then at most 20 (more where there are few tokens, until a million have been seen). The result is
        the mean of the later steps; it has converged when twice as many passes changed its loss by less than 0.0001. The others learn in
        torch how to pool the tokens of a prompt, whose label they share; see :func:`lmprobe_zarr.probes.sequence_probes`. A number replaces
        their default: "attention:4" has four heads. One in five training prompts says when to stop, after at most 100 passes.
    where : str, DataArray or array of bool, optional
        Which tokens to learn from, as from :func:`lmprobe_zarr.mask_tokens`; others need no label.
    missing : {"raise", "drop"}
        What to do about tokens without a label (None, NaN): an error that names their prompts, or leave them out.
    groups : str, DataArray, mapping or array, optional
        Prompts of an equal group are together among those that say when to stop, or not.
    random_state : int
        The seed of "sgd", and of probes that learn how to pool.
    device : str
        Where the latter learn: "cpu", "cuda", "cuda:1", "mps"; "auto" takes CUDA, then the CPU. The same seed gives the same numbers on
        the same device.
    client : distributed.Client, optional
        Where to run. Lazy arrays are read by the workers, which must reach the store.
    scheduler : "threads" (default), "processes" or "synchronous"
        Where to run without a client.
    n_workers : int, optional
        Threads or processes without a client; by default one per core.
    progress : bool
        Shows a progress bar on stderr.

    Returns
    -------
    Dataset
        ``coef`` (layer, hidden) and ``intercept`` (layer) for two classes, pointing to the second; with ``class`` behind ``layer`` for
        more. Both in the units of the activations: ``(activations * coef).sum("hidden") + intercept`` is the decision function.
        ``converged`` (layer). Of "attention" and "multimax" ``coef`` has the dimension ``head``, and "attention" also ``query_coef``
        (layer, head, hidden); of "mlp" ``coef`` is over ``unit``, and ``inner_coef`` (layer, unit, hidden) and ``inner_intercept`` before
        it. Attributes name the probe, the labels, the classes with their counts, and how many tokens and prompts.

    Raises
    ------
    InvalidTypeError
        An argument of another type than named above.
    InvalidArgumentError
        Other dimensions, no prompt coordinate, activations that are NaN or infinite (with layer and prompts), a probe that cannot be
        streamed, a mask that leaves nothing, labels that differ within a prompt for a probe that pools it, or a device that is not here.
    LabelError
        Labels are missing, of another length, contradictory, continuous, or all the same.
    MissingDependencyError
        A probe that learns in torch, and torch is not installed.

    Warns
    -----
    ConvergenceWarning
        scikit-learn's own, once, where "sgd", "logistic_regression" or a probe that learns how to pool was still improving.

    Notes
    -----
    A task holds its sums, about four blocks of 16 MiB, and, while it solves, about three matrices of hidden²; as many tasks as there are
    workers run at a time. The sums are float64: hidden² numbers for "ridge", 3 × hidden² × classes for "lda" and "mass_mean_cov", whose
    shrinkage needs fourth moments, 4 × hidden × classes for the others. What learns in torch holds at most
    256 MiB of rows at a time, and reads rows that are more than 128 MiB as float32 once in every pass.

    Source: sums of products are the sufficient statistics of least squares and of Gaussian classes; the fourth moments are those of
    O. Ledoit and M. Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", Journal of Multivariate Analysis 88
    (2004).
    """
    array, dim = parse_token_activations(activations)
    runner = parse_runner(client, scheduler, n_workers, progress=progress)
    (probe,) = _parse_probes([probe])
    seed = check_seed(random_state)
    examples = select_labelled_tokens(array, dim, labels, where=where, missing=missing)
    if is_sequence_probe(probe):
        device = _check_sequences(array, dim, examples, (probe,), device)
    elif device not in ("auto", "cpu"):
        parse_device(device, needed_by=f"device={device!r}")
    unit = group_tokens(array, dim, examples, groups)[1]
    layer_rows, plan = _plan_stream(array, dim, examples, None, (probe,), seed, device)
    fits, seconds = _fit(array, examples, layer_rows, replace(plan, unit=unit), runner)
    failed = {layer: fit[0, 0].problem for layer, fit in zip(layer_labels(array).tolist(), fits, strict=True) if fit[0, 0].problem}
    if len(failed) == len(fits):
        raise InvalidArgumentError(f"{probe!r} cannot be fitted on any layer: {'; '.join(describe_failed_layers(failed)[:3])}")
    attrs = {"probe": probe, **describe_labels(array, examples), "random_state": seed, "pass_seconds": float(sum(seconds))}
    attrs["variable"] = "" if array.name is None else str(array.name)
    found = solutions_to_dataset([fit[0, 0].solution for fit in fits], array, examples.classes, attrs)
    found["converged"] = "layer", [fit[0, 0].converged for fit in fits]
    if failed:
        found["coef"].attrs["nan_reasons"] = found["intercept"].attrs["nan_reasons"] = describe_failed_layers(failed)
        warn_failed_layers(probe, failed, len(fits))
    warn_unconverged(found, _EXACT)
    return to_interchange(name_model(found, array))


def sweep_tokens(
    activations: xr.DataArray,
    labels: Labels,
    probes: str | Iterable[str] = ("ridge",),
    cv: Any = 5,
    *,
    where: str | xr.DataArray | Iterable[Any] | None = None,
    missing: str = "raise",
    pooling: str = "all",
    groups: str | xr.DataArray | Mapping[Any, Any] | Iterable[Any] | None = None,
    controls: str | Iterable[str] | Mapping[str, Any] | None = None,
    predictions: bool = False,
    choose: None = None,
    random_state: int = 0,
    device: str = "auto",
    client: Client | None = None,
    scheduler: str | None = None,
    n_workers: int | None = None,
    progress: bool = False,
) -> xr.Dataset:
    """Scores of probes that learn from every token, by layer, probe and fold; the tokens need not fit into memory.

    One pass over the tokens fits all exact probes on all folds: sums are kept for each set of prompts that the folds cut, and those of a
    training set are added up. A second pass scores the tokens that each fold left out.

    Parameters
    ----------
    activations, labels, where, missing, random_state, device, client, scheduler, n_workers, progress
        As for :func:`fit_tokens`.
    probes : str or iterable of str
        As there.
    cv : int, scikit-learn splitter, or iterable of (train, test)
        Folds of whole prompts, in the order in which these first appear among the tokens that are learned from. Where all tokens of a
        prompt have one label, a number means the folds of :func:`lmprobe_zarr.sweep` over those prompts; else shuffled ones.
    pooling : str
        "all" scores every token. The other values of :func:`score_tokens` score prompts, by the scores of their tokens; then all tokens
        of a prompt must have one label. Probes that learn how to pool score prompts by that; where all of them do, there is nothing to
        choose, and beside others `pooling` says what becomes of the scores of these.
    groups : str, DataArray, mapping or array, optional
        Prompts of an equal group are never on both sides of a fold, nor of an inner fold that says when to stop.
    controls : str, iterable of str, or mapping, optional
        Entries beside the probes that a good score has to beat: "shuffled_labels", "control_task", "token_identity", "position", "layer_0",
        "majority", "bag_of_tokens", and "random_weights"; see :data:`lmprobe_zarr.probes.token_controls.TOKEN_CONTROLS`. The first two fit
        every probe on other labels, which takes two more passes each. ``{"random_weights": other.resid}`` fits every probe on the
        activations that a model of the same shape with random weights has of the same tokens. ``{"shuffled_labels": 100}`` shuffles so many
        times, with two passes each, and gives p-values as :func:`lmprobe_zarr.sweep` does; other names in a mapping have None. The
        coordinates ``kind`` and ``control`` tell controls from probes.
    predictions : bool
        Whether ``predicted`` and ``score`` of every labelled token (or prompt, where scores are pooled) are kept, each from the fold that
        tests it, as :func:`lmprobe_zarr.confidence_intervals` needs them; −1 and NaN for controls with labels of their own.
    choose : None
        Nothing is chosen here; any other value is an error that says how to choose a layer.

    Returns
    -------
    Dataset
        As :func:`lmprobe_zarr.sweep` returns it: ``accuracy`` and ``auroc`` (layer, probe, fold), ``converged``, ``fit_seconds`` (of
        solving alone), ``n_train`` and ``n_test`` (fold; tokens or, where scores are pooled, prompts), and ``pass_seconds`` (layer; of
        the pass that all exact fits share, over all tasks). Attributes as there.

    Raises
    ------
    InvalidTypeError, InvalidArgumentError, LabelError
        As :func:`fit_tokens`; folds that do not fit, that train on one class, or that put a prompt or group on both sides; an unknown
        control, or one whose token ids, positions or layer 0 are missing.

    Notes
    -----
    Memory as for :func:`fit_tokens`, the sums once per fold. Test scores take 8 bytes per token and probe of each layer being scored.

    A control task gives every token id one random label, which a probe may learn by heart. Its score on these labels measures its
    capacity, and :func:`lmprobe_zarr.selectivity` subtracts it. Source: J. Hewitt and P. Liang (2019), arXiv:1909.03368.
    """
    refuse_choice(choose, "sweep pooled tokens, as toks.lz.pool('mean'), or choose with sweep_tokens on some prompts and report others")
    array, dim = parse_token_activations(activations)
    runner = parse_runner(client, scheduler, n_workers, progress=progress)
    names = _parse_probes(list_names("probes", probes, "ridge"))
    predictions = check_flag("predictions", predictions)
    seed = check_seed(random_state)
    stage = _parse_pooling(pooling, names)
    chosen = parse_token_controls(controls)
    examples = select_labelled_tokens(array, dim, labels, where=where, missing=missing)
    if any(map(is_sequence_probe, names)):
        device = _check_sequences(array, dim, examples, names, device)
    elif device not in ("auto", "cpu"):
        parse_device(device, needed_by=f"device={device!r}")
    if stage.of == "score":
        _check_by_prompt(examples, chosen)
    folds = plan_token_folds(array, dim, examples, groups, cv, seed)
    layer_rows, plan = _plan_stream(array, dim, examples, folds, names, seed, device)
    other = _check_alike(array, dim, chosen[RANDOM_WEIGHTS]) if RANDOM_WEIGHTS in chosen else None
    # Made before activations are read, so that missing token ids or positions are an error at once.
    tables = {name: score_by_counts(name, array, examples, folds) for name in chosen if name not in (*DEALT, _LAYER_0, RANDOM_WEIGHTS)}
    draw = partial(plan_token_folds, array, dim, groups=groups, cv=cv, random_state=seed) if is_drawn(cv) else None
    dealt = {
        name: [deal_labels(name, array, examples, folds, seed, draw_folds=draw, number=number) for number in range(max(1, times))]
        for name, times in chosen.items()
        if name in DEALT
    }
    layers = [str(layer) for layer in layer_labels(array)]
    if _LAYER_0 in chosen and "0" not in layers:
        raise InvalidArgumentError(
            f"control {_LAYER_0!r} needs layer 0, and there are layers {', '.join(layers)}: give it too, or leave it out"
        )
    rows, seconds = _run_trials(array, examples, layer_rows, plan, runner, stage, predictions)
    found = {TokenTrial(name): of_probe for name, of_probe in zip(names, rows, strict=True)}
    shuffled: dict[str, Array] = {}
    for name in chosen:
        if name in dealt:
            shuffles = []
            for codes, drawn in dealt[name]:
                redrawn = _plan_stream(array, dim, examples, drawn, names, seed, device)[1] if drawn is not folds else plan
                results, more = _run_trials(array, examples, layer_rows, replace(redrawn, codes=codes), runner, stage, False)
                shuffles.append(results)
                seconds += more
            for place, probe in enumerate(names):
                of_probe = np.stack([results[place] for results in shuffles])  # shuffle, layer, fold
                found[TokenTrial(f"{name}:{probe}", name)] = of_probe[0] if not chosen[name] else mean_results(of_probe)
                if chosen[name]:
                    shuffled[probe] = of_probe
        elif other is not None and name == RANDOM_WEIGHTS:
            results, more = _run_trials(
                other, examples, *_plan_stream(other, dim, examples, folds, names, seed, device), runner, stage, False
            )
            found |= {TokenTrial(f"{name}:{probe}", name): of_probe for probe, of_probe in zip(names, results, strict=True)}
            seconds += more
        elif name == _LAYER_0:
            found[TokenTrial(name, name)] = np.broadcast_to(rows[0][layers.index("0")], rows[0].shape)
        else:
            measures = [measure(examples.codes, examples.prompt, stage, predictions, *of_fold) for of_fold in tables[name]]
            found[TokenTrial(name, name)] = np.broadcast_to(as_objects([result_of(measured) for measured in measures]), rows[0].shape)
    scores = make_scores(array, examples, folds, plan, stage, found, seconds, predictions=predictions)
    if all(map(is_sequence_probe, names)):
        scores.attrs["pooling"] = LEARNED
    if shuffled:
        scores = add_shuffles(scores, shuffled)
    failures = failures_of(scores)
    if np.isnan(scores["accuracy"].values[:, : len(names)]).all():
        raise InvalidArgumentError(f"{failures}: give activations whose squares are finite numbers")
    warn_failed(failures)
    warn_unconverged(scores, _EXACT)
    units = examples.prompt if folds.unit is None else folds.unit[examples.prompt]
    tested = [
        (np.flatnonzero(learned[examples.prompt]), np.flatnonzero(held[examples.prompt]))
        for learned, held in zip(folds.train, folds.test, strict=True)
    ]
    below = find_below_chance(scores, [examples.codes], tested, units)
    if below:
        warnings.warn(describe_below_chance(below, folds.group), UserWarning, stacklevel=2)
    return to_interchange(name_model(scores, array))


# -- arguments -------------------------------------------------------------------------------------------------------------


def _parse_probes(names: list[Any]) -> tuple[str, ...]:
    if not names:
        raise InvalidArgumentError("probes is empty: name at least one, such as 'ridge'")
    for name in names:
        if not isinstance(name, str) or (name not in STREAMED and parse_sequence_probe(name) is None):
            raise InvalidArgumentError(
                f"{name!r:.60} cannot be fitted block by block: use one of {', '.join((*STREAMED, *SEQUENCE_PROBES))}; "
                "or lz.Probe(train_pooling='all') where the tokens fit into memory"
            )
    if len(set(names)) < len(names):
        raise InvalidArgumentError(f"a probe is named twice in {names!r}: name each once")
    return tuple(names)


def _parse_pooling(pooling: Any, names: tuple[str, ...]) -> Stage:
    """What becomes of the scores of tokens: one score per prompt where a probe gives nothing else."""
    stage = parse_score_stage(pooling)
    learned = [name for name in names if is_sequence_probe(name)]
    if not learned or stage.of == "score":
        return stage
    if len(learned) < len(names):
        rest = next(name for name in names if name not in learned)
        raise InvalidArgumentError(
            f"{learned[0]!r} scores prompts, and pooling='all' has {rest!r} score tokens: give pooling='score:mean', or sweep them apart"
        )
    # Controls by counts score tokens; their logarithms are averaged.
    return Stage("score", "mean")


def _check_sequences(array: xr.DataArray, dim: str, examples: LabelledTokens, names: Iterable[str], device: Any) -> str:
    """The device on which probes learn how to pool, once labels and tokens are such that they can."""
    if not examples.by_prompt:
        name = next(name for name in names if is_sequence_probe(name))
        raise InvalidArgumentError(
            f"labels {examples.name!r} differ within a prompt, and {name!r} gives one score for all its tokens: use a probe that scores "
            "each token by itself, such as 'ridge'"
        )
    if dim == "token" and "position" in array.coords and array.coords["position"].dims == (dim,):
        position = np.asarray(array.coords["position"].values)[examples.rows]
        order = np.argsort(examples.prompt, kind="stable")
        falls = (np.diff(position[order]) <= 0) & (np.diff(examples.prompt[order]) == 0)
        if falls.any():
            shown = show_rows(examples, order[1:][falls])
            raise InvalidArgumentError(f"tokens do not follow one another in {shown}: sort them by position, each prompt once")
    return parse_device(device, needed_by="a probe that learns how to pool")


def _check_alike(array: xr.DataArray, dim: str, given: Any) -> xr.DataArray:
    """The activations of the control "random_weights": other values of the same tokens in the same layers."""
    other, other_dim = parse_token_activations(given)
    layers, theirs = layer_labels(array).tolist(), layer_labels(other).tolist()
    if other_dim != dim or other.sizes[dim] != array.sizes[dim] or not set(layers) <= set(theirs):
        raise InvalidArgumentError(
            f"control {RANDOM_WEIGHTS!r} has {other.sizes[other_dim]} {other_dim}s in layers {theirs}, expected {array.sizes[dim]} {dim}s "
            f"in layers {layers}, as the activations have: extract the same prompts with the other model"
        )
    for name in ("prompt", "position"):
        held = [each.coords[name].values for each in (array, other) if name in each.coords and each.coords[name].dims == (dim,)]
        if len(held) == 2 and not np.array_equal(*held):
            raise InvalidArgumentError(
                f"control {RANDOM_WEIGHTS!r} has other {dim}s than the activations, or another order, as {name} says: select the same of "
                "both"
            )
    return other.sel(layer=layers) if "layer" in other.dims else other


def _plan_stream(
    array: xr.DataArray, dim: str, examples: LabelledTokens, folds: TokenFolds | None, probes: tuple[str, ...], seed: int, device: str
) -> tuple[LayerRows, TaskPlan]:
    layer_rows = LayerRows(bare_variable(array.variable), dim, examples.rows)
    cell, trains = cells_of(folds, len(examples.prompts))
    if trains.shape[1] > _MOST_CELLS:
        raise InvalidArgumentError(
            f"these {len(trains)} folds cut the prompts into {trains.shape[1]} sets, and sums are kept for each of them: "
            f"use at most {_MOST_CELLS} folds without overlap, as cv=5 makes"
        )
    plan = TaskPlan(
        layer_rows=None,
        n_rows=len(examples.rows),
        hidden=layer_rows.hidden,
        block_rows=layer_rows.block_rows,
        layers=tuple(str(layer) for layer in layer_labels(array)),
        probes=probes,
        codes=examples.codes,
        cell=cell[examples.prompt].astype(np.min_scalar_type(trains.shape[1])),
        prompt=examples.prompt,
        n_classes=len(examples.classes),
        trains=trains,
        tests=None if folds is None else folds.test,
        random_state=seed,
        unit=None if folds is None else folds.unit,
        device=device,
    )
    return layer_rows, plan


def _fit(
    array: xr.DataArray, examples: LabelledTokens, layer_rows: LayerRows, plan: TaskPlan, runner: Runner
) -> tuple[list[dict[tuple[int, int], Fitted]], list[float]]:
    try:
        return fit_stream(layer_rows, plan, runner)
    except NotFiniteError as problem:
        held = stored_rows(array.variable.isel(layer=problem.layer, missing_dims="ignore"))
        absent = [] if held is None else [row for row in problem.rows if not held[examples.rows[row]]]
        layer, shown = layer_labels(array)[problem.layer], show_rows(examples, np.array(absent or problem.rows))
        what = "was never extracted" if absent else "is NaN or infinite"
        raise InvalidArgumentError(
            f"layer {layer} of {name_in_messages(array)} {what} for {len(absent or problem.rows)} of {plan.n_rows} {layer_rows.dim}s, in "
            f"{shown}:\nleave them out with where=, "
            + (f"or extract them with layers=[{layer}]" if absent else "or extract them again (float16 overflows at 65504)")
        ) from None


def _check_by_prompt(examples: LabelledTokens, controls: Iterable[str]) -> None:
    if "control_task" in controls:
        raise InvalidArgumentError(
            "control 'control_task' gives the tokens of a prompt different labels, so scores that are pooled by prompt have nothing to be "
            "compared with: use pooling='all', or 'shuffled_labels'"
        )
    if not examples.by_prompt:
        raise InvalidArgumentError(
            f"labels {examples.name!r} differ within a prompt, so scores that are pooled by prompt have nothing to be compared with: "
            "use pooling='all'"
        )


# -- results ---------------------------------------------------------------------------------------------------------------


def _run_trials(
    array: xr.DataArray, examples: LabelledTokens, layer_rows: LayerRows, plan: TaskPlan, runner: Runner, stage: Stage, keep: bool
) -> tuple[list[Array], Array]:
    """The results of each probe, shape (layer, fold), and the seconds that each layer's pass took."""
    fits, seconds = _fit(array, examples, layer_rows, plan, runner)
    measured = measure_stream(layer_rows, plan, runner, fits, partial(score_layer, plan.codes, examples.prompt, stage, keep))
    found = []
    for probe in range(len(plan.probes)):
        rows = [
            failed_result(fit[probe, fold].problem, fit[probe, fold].seconds)
            if fit[probe, fold].problem
            else result_of(of_layer[probe, fold], fit[probe, fold].seconds, fit[probe, fold].converged)
            for fit, of_layer in zip(fits, measured, strict=True)
            for fold in range(len(plan.trains))
        ]
        found.append(as_objects(rows).reshape(len(plan.layers), -1))
    return found, np.array(seconds)
