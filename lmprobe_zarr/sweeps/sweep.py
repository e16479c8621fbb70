"""Scores of probes over layers: everything is planned first, then every layer is fitted, then the scores become one dataset.

This module holds the function that users call, and makes the tasks of its plan. The plan, the fits, the table of scores and the store of
scores have modules of their own. Never a store of activations, or a plot.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from lmprobe_zarr.display import progress_bar
from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.probes import Fit, FitTask, NotFiniteError, describe_unfit, fit_task, number_repeats, show_prompts
from lmprobe_zarr.sweeps.below_chance import describe_below_chance, find_below_chance
from lmprobe_zarr.sweeps.given import warn_failed, warn_unconverged
from lmprobe_zarr.sweeps.options import SweepOptions
from lmprobe_zarr.sweeps.plan import Sweep, make_sweep
from lmprobe_zarr.sweeps.score_store import ScoreStore
from lmprobe_zarr.sweeps.scores import Scores
from lmprobe_zarr.tasks import Runner, parse_runner
from lmprobe_zarr.tokens import inner_dim
from lmprobe_zarr.typing import Array, Client

__all__ = ["sweep"]


def sweep(
    activations: xr.DataArray | xr.Dataset,
    labels: str | xr.DataArray | Mapping[Any, Any] | Iterable[Any],
    probes: str | Iterable[Any] | Mapping[str, Any] = ("logistic_regression",),
    cv: Any = None,
    *,
    groups: str | xr.DataArray | Mapping[Any, Any] | Iterable[Any] | None = None,
    split: str | xr.DataArray | Mapping[Any, Any] | Iterable[Any] | None = None,
    task: str = "classification",
    metrics: str | Iterable[str] | None = None,
    controls: str | Iterable[str] | Mapping[str, Any] | None = None,
    preprocessing: str | None = None,
    strengths: Iterable[float] | None = None,
    choose: str | Iterable[str] | None = None,
    inner_cv: int | None = None,
    choose_by: str | None = None,
    repeats: int = 1,
    seeds: int | Iterable[int] | None = None,
    missing: str = "raise",
    predictions: bool = False,
    solver: str = "scikit-learn",
    device: str | None = None,
    out: Any = None,
    storage_options: Mapping[str, Any] | None = None,
    random_state: int = 0,
    client: Client | None = None,
    scheduler: str | None = None,
    n_workers: int | None = None,
    progress: bool = False,
) -> xr.Dataset:
    """Scores of every probe and control on every layer and fold, as a dataset over ``layer, probe, fold``.

    Parameters
    ----------
    activations : DataArray of float, dims (layer, prompt, hidden) in any order; or Dataset of such
        What is fitted, exactly as given. Without ``layer`` it is one layer. A lazy array stays lazy: each task reads its own
        layer, one copy of which it holds at a time (float16 is computed in float32). Coordinates used where present:
        ``layer``, ``prompt``, ``text``, ``model`` and the labels. Of a dataset every variable over ``prompt`` and an inner dimension
        is fitted, but for logits and perplexities, and the result has the dim ``variable``. Instead of ``hidden`` any inner dimension will
        do, such as ``neurons_unit``.
    labels : str, DataArray, mapping or array
        The name of a coordinate over ``prompt``; a DataArray over ``prompt``, matched by prompt, whatever its order; a
        mapping from text or prompt hash to label; or values in the order of ``activations.prompt``. Several sets, each
        learned by itself on the same folds, are a list of coordinates' names or a DataArray over ``prompt`` and one more
        dimension; the result then has the dim ``label``.
    probes : names, {name: estimator}, or a list of names and estimators
        See :func:`lmprobe_zarr.probes.named_probes`. An estimator in a list is called by its class's name.
    cv : int, scikit-learn splitter, or iterable of (train, test)
        The same folds for every layer and probe; 5 where neither `cv` nor `split` is given. A number means shuffled folds. They are
        stratified by the label of a classification, unless there are several sets of labels. Where prompts repeat, all rows of one
        prompt are in one fold. Pairs hold row numbers or truth values over the prompts.
    groups : str, DataArray, mapping or array, optional
        Prompts of an equal group, such as a pair of sentences or a source, are never on both sides of a fold. Given as
        `labels` are, but of any hashable values. A number as `cv` needs at least as many groups. Splitters of scikit-learn that
        ignore groups, and pairs, are checked.
    split : str, DataArray, mapping or array, optional
        One held-out split instead of folds: prompts whose value is "train" are learned from, those of "test" scored, others left out.
    task : {"classification", "regression"}
        Labels are classes, or numbers. The default probe of a regression is ``ridge_regression``.
    metrics : names, optional
        Of a classification "accuracy" and "auroc" (the default), "balanced_accuracy", "f1", "precision", "recall", "auprc", "log_loss",
        "brier", "ece" and "recall_at_fpr_0.01" with any rate; of a regression "r2" and "mae" (the default), "spearman". See
        `lmprobe_zarr.probes.metrics` for what each means.
    controls : names, or {name: features}, optional
        Entries beside the probes that a good score has to beat: "shuffled_labels", "bag_of_words", "tfidf", "length", "perplexity",
        "layer_0", "embed", "random_direction", "majority"; see :data:`lmprobe_zarr.probes.controls.CONTROLS`. Features of one's own
        are numbers, one row per prompt. ``{"shuffled_labels": 100}`` shuffles so many times and gives p-values, see Returns.
        ``{"bag_of_tokens": store.tokens()}``, and "tfidf_of_tokens", count the model's own tokens, which are matched by prompt; they
        also take a list of token ids for each prompt. ``{"sentence_embedding": folder}`` runs the encoder in that folder, or a given
        ``(model, tokenizer)``, on the texts: the mean over tokens, of length 1. Names without features have None in a mapping. The
        coordinate ``kind`` tells controls from probes.
    preprocessing : str, optional
        In front of every probe, instead of its own standardisation: "standard", "per_layer", "pca:50", or several with "+".
    strengths : sequence of float, optional
        Regularisation strengths, larger being stronger (``alpha``, or 1 / ``C``), each fitted: the result has the dim ``strength``, along
        which probes without one are constant.
    choose : {"layer", "probe", "variable", "strength"} or several, optional
        What is chosen within each training fold, so that the score is of prompts that had no part in the choice. In each fold, the result
        holds the scores of the entry with the best mean over inner folds of the training prompts (of equal ones the first, or the
        strongest), fitted on all of them. ``chosen_layer`` and so on say which it is (NaN, or an empty text, for a control that has none).
        The dims are gone; only ``probe`` stays, with the entry "chosen". The best of many entries of a sweep without `choose` is
        reported with the score that it was chosen by, which is too high.
    inner_cv : int, optional
        The number of inner folds, 5 if not given, fewer where a class has fewer prompts or groups. They are those of a sweep of the
        training prompts alone: shuffled, stratified, with repeated prompts and groups on one side. Without `choose` it chooses one of
        `strengths`.
    choose_by : str, optional
        The metric to choose by; the first of `metrics` if not given.
    repeats : int
        How often a number of folds is drawn anew; the dim ``fold`` holds all, ``repeat`` says which.
    seeds : int or sequence of int, optional
        Seeds of fits and shuffled labels, each fitted on the same folds: the result has the dim ``seed``. Fits that use no random
        numbers are made once.
    missing : {"raise", "drop"}
        What happens to prompts without a label.
    predictions : bool
        Whether ``predicted``, ``score`` and ``probability`` of every prompt are kept, each from the fold that tests it, as
        :func:`lmprobe_zarr.confidence_intervals` needs them.
    solver : {"scikit-learn", "batched"}
        "batched" solves all folds, seeds, strengths, shuffled labels and sets of labels of a layer together, in torch: those of
        "logistic_regression", "ridge", "ridge_regression" and "mass_mean", whose objective and penalty stay scikit-learn's. Coefficients
        of a logistic regression, for standardised units, are within 1e-4 of its optimum (of the largest, where that is above 1), while
        scikit-learn's own stop earlier: scores differ where decisions are that close. Others are fitted one by one, as ever. Without
        `preprocessing`.
    device : str, optional
        Where "batched" solves: "cpu" (the default), "cuda", or "cuda:1". A layer at a time on a GPU, whatever the number of workers.
    out : path or URL, optional
        A Zarr store to which the scores of each layer are written as soon as it is done. The same call, in whatever process, takes the
        scores that are there already: an interrupted sweep goes on. ``xarray.open_zarr`` opens it at any time; with `choose` it holds
        the scores of all that can be chosen, and ``inner_score``. To check that the
        activations are the same as before, eight prompts are read in every layer.
    storage_options : mapping, optional
        For `out`, as fsspec takes them.
    random_state : int
        Seeds folds and fits. Each fit's seed depends only on it and on the names of layer, probe and fold, so scores are the
        same bit for bit on every scheduler and for any selection of layers. (Exception: estimators of the caller's that draw
        from a process-wide generator, such as ``LinearSVC(dual=True)``.)
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
        A variable for each metric (NaN where undefined, with the reasons in its attribute ``nan_reasons``),
        ``fit_seconds`` (wall time of the fit alone), ``converged`` (False: stopped at its iteration limit), each over layer, probe,
        fold and the further dims that the arguments add; ``n_train`` and ``n_test`` (fold). With `choose` also what was chosen, and
        ``inner_score``, the score that it was chosen by. Coordinates ``kind`` and ``control`` over
        ``probe``. Where labels are shuffled many times, that control is the mean over the shuffles, and each metric has
        ``<metric>_shuffled`` (over ``shuffle``, the mean over the folds) with ``_mean`` and ``_std``; ``<metric>_p_value``, the
        permutation p-value, (1 + shuffles that are at least as good) / (1 + shuffles); and ``<metric>_p_any_layer``, where a shuffle
        counts that is as good in any layer, for a layer that was chosen by its score. Attributes name labels, groups, classes, class
        counts, the share of the largest class (``majority_share``), folds, estimators and versions.

    Raises
    ------
    InvalidTypeError
        An argument of another type than named above.
    InvalidArgumentError
        Other dimensions, no prompts or layers, activations that are NaN or infinite, an unknown probe, metric or control, a metric that
        needs probabilities of an estimator without, folds that do not fit or that would put one prompt or group on both sides, an
        unknown solver, a device that does not exist, or an `out` that holds the scores of another sweep.
    MissingDependencyError
        solver="batched" without torch, or the control "sentence_embedding" without torch and transformers.
    DeviceMemoryError
        A GPU has too little memory for the fits of a layer.
    LabelError
        Labels are missing, of another length, contradictory, continuous, all the same, or too few of one class. Groups are
        missing, of another length, fewer than the folds, or one prompt is in two.

    Warns
    -----
    ConvergenceWarning
        scikit-learn's own, but once per sweep with the number of fits.
    UserWarning
        A control scores clearly below chance: prompts that are nearly alike and have different labels, such as the two of a pair, are
        probably on two sides of a fold. `groups` keeps them together. Or layers are left out, because nothing is stored of an array there.
    FitFailedWarning
        scikit-learn's own, once per sweep: some fits ended in an error, so their scores are NaN. ``nan_reasons`` says which and why. If
        every fit of every probe failed, it is an InvalidArgumentError.

    Notes
    -----
    While fits run in a process, BLAS is limited to one thread there: one fit per core beats many cores per fit
    (measured 2 to 5 times).
    """
    options = SweepOptions(
        activations=activations, labels=labels, probes=probes, cv=cv, groups=groups, split=split, task=task, metrics=metrics,
        controls=controls, preprocessing=preprocessing, strengths=strengths, choose=choose, inner_cv=inner_cv, choose_by=choose_by,
        repeats=repeats, seeds=seeds, missing=missing, predictions=predictions, random_state=random_state, solver=solver, device=device,
    )  # fmt: skip
    planned = make_sweep(options)
    runner = parse_runner(client, scheduler, n_workers)
    scores = Scores(planned)
    place = None if out is None else ScoreStore(out, planned.fingerprint(), _sample(planned), storage_options)
    if place is not None:
        # Created first, so that a place that cannot be written, or is another sweep's, is an error before anything is fitted.
        place.create(scores.columns(), scores.piece(0, 0))
        place.load(scores)
    try:
        _run(planned, scores, place, runner, progress=progress)
    except NotFiniteError as problem:
        raise _not_finite(planned, problem) from None
    if scores.all_failed():
        raise InvalidArgumentError(f"{scores.failures()}: give a probe that can be fitted on these prompts, or fewer folds")
    found = scores.dataset()
    if place is not None:
        # The place holds every layer, so that it is complete whatever was chosen.
        place.finish(scores.table() if planned.fits.chooses_among_scores else found)
    _warn_below_chance(planned, found)
    warn_failed(scores.failures())
    warn_unconverged(found, "give an estimator with a larger max_iter, or standardise")
    return found


def _warn_below_chance(sweep: Sweep, found: xr.Dataset) -> None:
    fits = sweep.fits
    if fits.task != "classification":
        return
    first = [fold for fold, repeat in zip(fits.folds, number_repeats(fits.folds), strict=True) if repeat == 0]
    below = find_below_chance(found, [each.codes for each in fits.labels], first, fits.kept)
    if below:
        warnings.warn(describe_below_chance(below, found.attrs["groups"]), UserWarning, stacklevel=3)


def _not_finite(sweep: Sweep, problem: NotFiniteError) -> InvalidArgumentError:
    array = sweep.arrays[max(problem.variable, 0)]
    n = sweep.plan.n_prompts
    if problem.variable < 0:
        return InvalidArgumentError(
            f"control {sweep.fits.trials[problem.trial].name!r} is NaN or infinite for {len(problem.rows)} of {n} prompts "
            f"({show_prompts(array, problem.rows)}): leave these prompts out, or the control"
        )
    return InvalidArgumentError(describe_unfit(array, problem.layer if "layer" in array.dims else None, problem.rows, n))


def _sample(sweep: Sweep) -> list[Array]:
    """Numbers that distinguish these activations from others: of eight prompts, in every layer of every variable."""
    rows = sweep.fits.labels[0].rows
    some = np.unique(rows[np.linspace(0, len(rows) - 1, 8).astype(int)])
    features = [values for values in sweep.fits.features.values() if isinstance(values, xr.Variable)]
    found = []
    for variable in (*(array.variable for array in sweep.arrays), *features):
        values = variable.isel(prompt=some).transpose(..., "prompt", inner_dim(variable)).values.astype(np.float64)
        # With a pattern of signs, so that shifted or reversed values give other numbers too.
        signs = np.where(np.arange(values.shape[-1]) % 3 == 0, -1.0, 1.0)
        found.append(np.stack([np.sqrt((values**2).mean(-1)), (values * signs).mean(-1)]))
    return found


# -- running ---------------------------------------------------------------------------------------------------------------


def _run(sweep: Sweep, scores: Scores, place: ScoreStore | None, runner: Runner, *, progress: bool) -> None:
    """Fit what is missing; enter and write each result as it comes."""
    every = sweep.tasks(runner.workers)
    tasks = [task for task in every if scores.missing(task)]
    written = set(scores.whole())
    with progress_bar(len(every), description="sweep", unit="task", enabled=progress) as advance:
        advance(len(every) - len(tasks))

        def finish(number: int, fits: list[Fit]) -> None:
            scores.enter(tasks[number], fits)
            if place is not None:
                for source, layer in sorted(set(scores.whole()) - written):
                    written.add((source, layer))
                    place.write(source, layer, scores.piece(source, layer))
            advance(1)

        starts = _starts(sweep, tasks, runner)
        # Where scores are written, tasks that other layers wait for run first.
        first = 0 if place is None or runner.keeps_order else sum(map(sweep.spreads, tasks))
        runner.run(starts[:first], "", finished=finish)
        runner.run(starts[first:], "", finished=lambda number, fits: finish(first + number, fits))


def _starts(sweep: Sweep, tasks: Sequence[FitTask], runner: Runner) -> list[Callable[[], Any]]:
    """For each task a function that makes it a task of the runner."""
    shared = runner.hand_over(sweep.fits)
    handed: dict[tuple[int, int], Any] = {}

    def start(number: int) -> Any:
        task = tasks[number]
        at = (task.variable, task.layer)
        if at not in handed:
            # Tasks of one layer share its values. The values of the layer before are released, so that workers hold few at a time.
            handed.clear()
            handed[at] = runner.hand_over_values(_layer_values(sweep, task))
        return runner.call(fit_task, shared, task, handed[at], name=f"sweep-{shared.key}-{number:09d}")

    return [partial(start, number) for number in range(len(tasks))]


def _layer_values(sweep: Sweep, task: FitTask) -> Any:
    """The activations that a task is handed: None where it reads them itself, the values in memory, or a Dask array."""
    if task.variable < 0 or sweep.fits.variables[task.variable].activations is not None:
        return None
    variable = sweep.arrays[task.variable].variable
    return variable.isel(layer=task.layer, missing_dims="ignore").transpose("prompt", ...).data
