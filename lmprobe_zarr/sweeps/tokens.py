"""Probes on tokens: fitted on every token, scored token by token, cross-validated over prompts.

However many tokens there are, only a few blocks of them are in memory at a time. This module holds the functions that users call and builds
their results. ``token_stream`` reads the rows, and ``probes.token_labels`` decides which tokens are learned from. Never a store, a model or
a plot.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from lmprobe_zarr.batch import Stage, check_flag, list_names, parse_stage
from lmprobe_zarr.display import name_in_messages
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.interchange import read_list, to_interchange
from lmprobe_zarr.probes import (
    LabelledTokens,
    NotFiniteError,
    Solution,
    TokenFolds,
    bare_variable,
    cells_of,
    plan_token_folds,
    select_labelled_tokens,
    show_rows,
)
from lmprobe_zarr.probes.token_controls import DEALT, deal_labels, parse_token_controls, score_by_counts
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
from lmprobe_zarr.sweeps.token_stream import STREAMED, Fitted, LayerRows, TaskPlan, fit_stream, measure_stream, score_stream
from lmprobe_zarr.tasks import Runner, parse_runner
from lmprobe_zarr.tokens import inner_dim, pool_tokens, prompts_of, stored_rows, token_texts
from lmprobe_zarr.typing import Array, Client

__all__ = ["fit_tokens", "score_tokens", "sweep_tokens"]
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
    random_state: int = 0,
    client: Client | None = None,
    scheduler: str | None = None,
    n_workers: int | None = None,
    progress: bool = False,
) -> xr.Dataset:
    """A linear probe per layer, fitted on every token, block by block: the tokens need not fit into memory.

    Parameters
    ----------
    activations : DataArray of real numbers, dims (layer, token, hidden) in any order
        As ``store.tokens()`` has them, lazy, of Dask arrays, or in memory. Without ``layer`` it is one layer; with ``prompt`` for ``token``
        every prompt is one row. Instead of ``hidden`` any inner dimension, which the coefficients then have. Layers that nothing is
        stored of are left out.
    labels : str, DataArray, mapping or array
        The name of a coordinate along ``token`` (such as a per-prompt column); a DataArray over ``token`` or ``prompt``, matched by its
        index; a mapping from text or prompt hash to a label or to a list of one label per token; or one value per token, or per prompt.
    probe : {"ridge", "lda", "mass_mean", "mass_mean_cov", "logistic_regression", "sgd"}
        See :func:`lmprobe_zarr.probes.named_probes`. The first four are exact: they are solved from sums that one pass over the tokens
        gives, and equal the fit in memory of that name, standardisation and shrinkage included. "logistic_regression" has the objective
        of the fit in memory, and reads the tokens again for each step of L-BFGS, 10 to 200 times, until its coefficients, for
        standardised units, are within 1e-4 of the optimum (of the largest, where that is above 1). "sgd" takes minibatches in random order:
        one pass for the standardisation, then at most 20 (more where there are few tokens, until a million have been seen). The result is
        the mean of the later steps; it has converged when twice as many passes changed its loss by less than 0.0001.
    where : str, DataArray or array of bool, optional
        Which tokens to learn from, as from :func:`lmprobe_zarr.mask_tokens`; others need no label.
    missing : {"raise", "drop"}
        What to do about tokens without a label (None, NaN): an error that names their prompts, or leave them out.
    random_state : int
        The seed of "sgd".
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
        ``converged`` (layer). Attributes name the probe, the labels, the classes with their counts, and how many tokens and prompts.

    Raises
    ------
    InvalidTypeError
        An argument of another type than named above.
    InvalidArgumentError
        Other dimensions, no prompt coordinate, activations that are NaN or infinite (with layer and prompts), a probe that cannot be
        streamed, or a mask that leaves nothing.
    LabelError
        Labels are missing, of another length, contradictory, continuous, or all the same.

    Warns
    -----
    ConvergenceWarning
        scikit-learn's own, once, where "sgd" or "logistic_regression" was still improving.

    Notes
    -----
    A task holds its sums, about four blocks of 16 MiB, and, while it solves, about three matrices of hidden²; as many tasks as there are
    workers run at a time. The sums are float64: hidden² numbers for "ridge", 3 × hidden² × classes for "lda" and "mass_mean_cov", whose
    shrinkage needs fourth moments, 4 × hidden × classes for the others.

    Source: sums of products are the sufficient statistics of least squares and of Gaussian classes; the fourth moments are those of
    O. Ledoit and M. Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", Journal of Multivariate Analysis 88
    (2004).
    """
    array, dim = parse_token_activations(activations)
    runner = parse_runner(client, scheduler, n_workers, progress=progress)
    (probe,) = _parse_probes([probe])
    seed = check_seed(random_state)
    examples = select_labelled_tokens(array, dim, labels, where=where, missing=missing)
    layer_rows, plan = _plan_stream(array, dim, examples, None, (probe,), seed)
    fits, seconds = _fit(array, examples, layer_rows, plan, runner)
    solutions = [fit[0, 0].solution for fit in fits]
    two = len(examples.classes) == 2
    inner = inner_dim(array)
    dims = ("layer", inner) if two else ("layer", "class", inner)
    coef, intercept = np.stack([each.coef for each in solutions]), np.stack([each.intercept for each in solutions])
    found = xr.Dataset(
        {
            "coef": (dims, coef[:, 0] if two else coef, {"long_name": "coefficients, in the units of the activations"}),
            "intercept": (dims[:-1], intercept[:, 0] if two else intercept),
            "converged": ("layer", [fit[0, 0].converged for fit in fits]),
        },
        coords={"layer": layer_labels(array), **({} if two else {"class": examples.classes})},
        attrs={"probe": probe, **describe_labels(array, examples), "random_state": seed, "pass_seconds": float(sum(seconds))},
    )
    failed = {layer: fit[0, 0].problem for layer, fit in zip(layer_labels(array).tolist(), fits, strict=True) if fit[0, 0].problem}
    if failed:
        if len(failed) == len(fits):
            raise InvalidArgumentError(f"{probe!r} cannot be fitted on any layer: {'; '.join(describe_failed_layers(failed)[:3])}")
        found["coef"].attrs["nan_reasons"] = found["intercept"].attrs["nan_reasons"] = describe_failed_layers(failed)
        warn_failed_layers(probe, failed, len(fits))
    warn_unconverged(found, _EXACT)
    return to_interchange(_name_model(found, array))


def score_tokens(
    probes: xr.Dataset,
    activations: xr.DataArray,
    pooling: str = "all",
    *,
    client: Client | None = None,
    scheduler: str | None = None,
    n_workers: int | None = None,
    progress: bool = False,
) -> xr.DataArray:
    """The decision function of :func:`fit_tokens` for every token, or of every prompt by its tokens.

    Parameters
    ----------
    probes : Dataset
        From :func:`fit_tokens`.
    activations : DataArray, dims (layer, token, hidden) in any order
        Of the layers that the probes were fitted on, or some of them; read block by block. Tokens without activations score NaN.
    pooling : str
        "all": one score per token. ``score:max``, ``score:mean``, ``score:min``, ``score:last_token``, ``score:first_token``, and bare
        ``max`` and ``min``, as in `Probe`: the scores of a prompt's tokens become one, each class by itself.
    client, scheduler, n_workers, progress
        As for :func:`fit_tokens`.

    Returns
    -------
    DataArray of float32
        Dims (layer, token) or (layer, prompt), with ``class`` behind for more than two classes. Above 0 means the second class. Tokens
        keep their index over prompt and position and all columns, and get ``token_text``, what a token stands for, where the texts and
        the places of tokens in them are stored.

    Raises
    ------
    InvalidArgumentError
        Something that `fit_tokens` did not make, layers that it was not fitted on, another hidden size, or a pooling of activations.
    """
    stage = _score_stage(pooling)
    array, dim = parse_token_activations(activations)
    runner = parse_runner(client, scheduler, n_workers, progress=progress)
    solutions, chosen = _solutions(probes, array)
    prompts_of(array, dim)
    n = array.sizes[dim]
    layer_rows = LayerRows(bare_variable(array.variable), dim, np.arange(n, dtype=np.int64))
    none = np.zeros(0, np.int8)
    plan = TaskPlan(
        layer_rows=None,
        n_rows=n,
        hidden=layer_rows.hidden,
        block_rows=layer_rows.block_rows,
        layers=tuple(str(layer) for layer in layer_labels(array)),
        probes=(),
        codes=none,
        cell=none,
        prompt=none,
        n_classes=len(read_list(probes.attrs, "classes") or ()),
        trains=np.ones((1, 1), bool),
        tests=None,
        random_state=0,
    )
    scores = np.stack(list(score_stream(layer_rows, plan, runner, solutions)))
    dims = ("layer", dim) if scores.ndim == 2 else ("layer", dim, "class")
    coords = {"layer": layer_labels(array), **({} if scores.ndim == 2 else {"class": chosen["class"].values})}
    columns = array.coords.to_dataset().drop_vars(["layer", inner_dim(array)], errors="ignore")
    scored = xr.DataArray(scores, dims=dims, coords=coords, name="score").assign_coords(columns.coords)
    scored.attrs = {
        "long_name": "score",
        "probe": probes.attrs["probe"],
        "labels": probes.attrs["labels"],
        "classes": probes.attrs["classes"],
    }
    if dim == "token":
        texts = token_texts(array)
        scored = scored if texts is None else scored.assign_coords(token_text=("token", texts))
    scored = to_interchange(scored)
    if stage.of == "nothing" or dim != "token":
        return scored
    # The stage has the bare name of the pooling. Each class is pooled by itself, as each layer is.
    return pool_tokens(scored.drop_vars("token_text", errors="ignore"), stage.pooling)


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
    controls: str | Iterable[str] | Mapping[str, int | None] | None = None,
    predictions: bool = False,
    choose: None = None,
    random_state: int = 0,
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
    activations, labels, where, missing, random_state, client, scheduler, n_workers, progress
        As for :func:`fit_tokens`.
    probes : str or iterable of str
        As there.
    cv : int, scikit-learn splitter, or iterable of (train, test)
        Folds of whole prompts, in the order in which these first appear among the tokens that are learned from. Where all tokens of a
        prompt have one label, a number means the folds of :func:`lmprobe_zarr.sweep` over those prompts; else shuffled ones.
    pooling : str
        "all" scores every token. The other values of :func:`score_tokens` score prompts, by the scores of their tokens; then all tokens
        of a prompt must have one label.
    groups : str, DataArray, mapping or array, optional
        Prompts of an equal group are never on both sides of a fold.
    controls : str, iterable of str, or mapping, optional
        Entries beside the probes that a good score has to beat: "shuffled_labels", "control_task", "token_identity", "position", "layer_0",
        "majority"; see :data:`lmprobe_zarr.probes.token_controls.TOKEN_CONTROLS`. The first two fit every probe on other labels, which
        takes two more passes each. ``{"shuffled_labels": 100}`` shuffles so many times, with two passes each, and gives p-values as
        :func:`lmprobe_zarr.sweep` does; other names in a mapping have None. The coordinates ``kind`` and ``control`` tell controls from
        probes.
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
    stage = _score_stage(pooling)
    chosen = parse_token_controls(controls)
    examples = select_labelled_tokens(array, dim, labels, where=where, missing=missing)
    if stage.of == "score":
        _check_by_prompt(examples, chosen)
    folds = plan_token_folds(array, dim, examples, groups, cv, seed)
    layer_rows, plan = _plan_stream(array, dim, examples, folds, names, seed)
    # Made before activations are read, so that missing token ids or positions are an error at once.
    tables = {name: score_by_counts(name, array, examples, folds) for name in chosen if name not in (*DEALT, _LAYER_0)}
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
                other = _plan_stream(array, dim, examples, drawn, names, seed)[1] if drawn is not folds else plan
                results, more = _run_trials(array, examples, layer_rows, replace(other, codes=codes), runner, stage, False)
                shuffles.append(results)
                seconds += more
            for place, probe in enumerate(names):
                of_probe = np.stack([results[place] for results in shuffles])  # shuffle, layer, fold
                found[TokenTrial(f"{name}:{probe}", name)] = of_probe[0] if not chosen[name] else mean_results(of_probe)
                if chosen[name]:
                    shuffled[probe] = of_probe
        elif name == _LAYER_0:
            found[TokenTrial(name, name)] = np.broadcast_to(rows[0][layers.index("0")], rows[0].shape)
        else:
            measures = [measure(examples.codes, examples.prompt, stage, predictions, *of_fold) for of_fold in tables[name]]
            found[TokenTrial(name, name)] = np.broadcast_to(as_objects([result_of(measured) for measured in measures]), rows[0].shape)
    scores = make_scores(array, examples, folds, plan, stage, found, seconds, predictions=predictions)
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
    return to_interchange(_name_model(scores, array))


# -- arguments -------------------------------------------------------------------------------------------------------------


def _parse_probes(names: list[Any]) -> tuple[str, ...]:
    if not names:
        raise InvalidArgumentError("probes is empty: name at least one, such as 'ridge'")
    for name in names:
        if not isinstance(name, str) or name not in STREAMED:
            raise InvalidArgumentError(
                f"{name!r:.60} cannot be fitted block by block: use one of {', '.join(STREAMED)}; "
                "or lz.Probe(train_pooling='all') where the tokens fit into memory"
            )
    if len(set(names)) < len(names):
        raise InvalidArgumentError(f"a probe is named twice in {names!r}: name each once")
    return tuple(names)


def _score_stage(pooling: Any) -> Stage:
    stage = parse_stage(pooling)
    if stage.of == "activation":
        raise InvalidArgumentError(
            f"pooling={pooling!r} pools activations, and here scores of tokens are pooled: use 'all', or 'score:{stage.pooling}'"
        )
    return stage


def _plan_stream(
    array: xr.DataArray, dim: str, examples: LabelledTokens, folds: TokenFolds | None, probes: tuple[str, ...], seed: int
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


def _units(dim: str) -> str:
    return "hidden units" if dim == "hidden" else f"units along {dim}"


def _solutions(probes: Any, array: xr.DataArray) -> tuple[list[Solution], xr.Dataset]:
    if not isinstance(probes, xr.Dataset) or "coef" not in probes or "intercept" not in probes or "classes" not in probes.attrs:
        raise InvalidTypeError(f"probes are the xarray.Dataset that fit_tokens gives, not {type(probes).__name__}")
    fitted = np.atleast_1d(probes["layer"].values).tolist()
    wanted = layer_labels(array).tolist()
    strange = [layer for layer in wanted if layer not in fitted]
    if strange:
        raise InvalidArgumentError(f"layers {strange} have no probe: there are probes of layers {fitted}, select these of the activations")
    fitted_on, inner = inner_dim(probes["coef"]), inner_dim(array)
    if probes.sizes[fitted_on] != array.sizes[inner]:
        raise InvalidArgumentError(
            f"the probes were fitted on {probes.sizes[fitted_on]} {_units(fitted_on)}, and these activations have {array.sizes[inner]}: "
            "give the same site of the same model"
        )
    chosen = probes.sel(layer=wanted) if "layer" in probes.dims else probes.expand_dims("layer")
    classes = np.arange(len(read_list(probes.attrs, "classes") or ()))
    found = []
    for n in range(len(wanted)):
        of_layer = chosen.isel(layer=n)
        coef = np.atleast_2d(of_layer["coef"].transpose(..., fitted_on).values)
        found.append(Solution(coef, np.atleast_1d(of_layer["intercept"].values), classes))
    return found, chosen


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


def _name_model(found: xr.Dataset, array: xr.DataArray) -> xr.Dataset:
    if "model" in array.coords and array.coords["model"].ndim == 0:
        found.attrs["model"] = str(array.coords["model"].item())
        return found.assign_coords(model=found.attrs["model"])
    return found
