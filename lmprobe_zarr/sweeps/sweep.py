"""Scores of probes over layers: everything is settled first, then every layer is fitted on Dask, then scores are put together.

Holds the call that users make, and how fits are spread over threads, processes or a cluster. Planning, fits, the table of scores and
its place on disk have rooms of their own. Never activations of its own, or a plot.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from lmprobe_zarr.display import called
from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.probes import Fit, FitPlan, FitTask, NotFiniteError, fit_task, show_prompts
from lmprobe_zarr.progress import progress_bar
from lmprobe_zarr.sweeps.plan import SweepPlan, plan_sweep
from lmprobe_zarr.sweeps.score_store import ScoreStore
from lmprobe_zarr.sweeps.scores import Scores
from lmprobe_zarr.tasks import check_run, run_on_client
from lmprobe_zarr.typing import Array

__all__ = ["sweep"]
#: What to do with what a task found, by the task's number.
_Finish = Callable[[int, list[Fit]], None]


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
    inner_cv: int | None = None,
    choose_by: str | None = None,
    repeats: int = 1,
    seeds: int | Iterable[int] | None = None,
    missing: str = "raise",
    predictions: bool = False,
    out: Any = None,
    storage_options: Mapping[str, Any] | None = None,
    random_state: int = 0,
    client: Any = None,
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
        ``layer``, ``prompt``, ``text``, ``model`` and the labels. Of a dataset every variable over ``prompt`` and ``hidden`` is
        fitted, and the result has the dim ``variable``.
    labels : str, DataArray, mapping or array
        The name of a coordinate over ``prompt``; a DataArray over ``prompt``, matched by prompt, whatever its order; a
        mapping from text or prompt hash to label; or values in the order of ``activations.prompt``. Several sets, each
        learned by itself on the same folds, are a list of coordinates' names or a DataArray over ``prompt`` and one more
        dimension; the result then has the dim ``label``.
    probes : names, {name: estimator}, or a list of names and estimators
        See :func:`lmprobe_zarr.probes.named_probes`. An estimator in a list is called by its class's name.
    cv : int, scikit-learn splitter, or iterable of (train, test)
        The same folds for every layer and probe; 5 without `cv` and `split`. A number means shuffled folds, stratified by the label
        of a classification (by none of several); where prompts repeat, all rows of one prompt lie in one fold. Pairs hold row
        numbers or truth values over the prompts.
    groups : str, DataArray, mapping or array, optional
        Prompts of an equal group, such as a pair of sentences or a source, never lie on both sides of a fold. Given as
        `labels` are, but of any values that have a hash. With a number as `cv`, as many groups at least; splitters of
        scikit-learn that know no groups, and pairs, are checked.
    split : str, DataArray, mapping or array, optional
        One held-out split instead of folds: prompts whose value is "train" are learned from, those of "test" scored, others left out.
    task : {"classification", "regression"}
        Labels are classes, or numbers. The default probe of a regression is ``ridge_regression``.
    metrics : names, optional
        Of a classification "accuracy" and "auroc" (the default), "balanced_accuracy", "f1", "precision", "recall", "auprc", "log_loss",
        "brier", "ece" and "recall_at_fpr_0.01" with any rate; of a regression "r2" and "mae" (the default), "spearman". See
        :mod:`lmprobe_zarr.probes.metrics` for what each means.
    controls : names, or {name: features}, optional
        Entries beside the probes that a good score has to beat: "shuffled_labels", "bag_of_words", "tfidf", "length", "perplexity",
        "layer_0", "embed", "random_direction", "majority"; see :data:`lmprobe_zarr.probes.controls.CONTROLS`. Features of one's own
        are numbers, one row per prompt. The coordinate ``kind`` tells controls from probes.
    preprocessing : str, optional
        In front of every probe, instead of its own standardisation: "standard", "per_layer", "pca:50", or several with "+".
    strengths : sequence of float, optional
        Regularisation strengths, larger being stronger (``alpha``, or 1 / ``C``), each fitted: the result has the dim ``strength``, along
        which probes without one are constant. With `inner_cv` the best is chosen.
    inner_cv : int, optional
        Folds within each training fold by which one of the strengths is chosen; the chosen one is fitted on the whole training fold, and
        ``chosen_strength`` tells it. Groups stay together in them too.
    choose_by : str, optional
        The metric by which; the first of `metrics` if not given.
    repeats : int
        How often a number of folds is drawn anew; the dim ``fold`` holds all, ``repeat`` says which.
    seeds : int or sequence of int, optional
        Seeds of fits and shuffled labels, each fitted on the same folds: the result has the dim ``seed``. What draws nothing is
        fitted once.
    missing : {"raise", "drop"}
        What happens to prompts without a label.
    predictions : bool
        Whether ``predicted``, ``score`` and ``probability`` of every prompt are kept, each from the fold that tests it, as
        :func:`lmprobe_zarr.confidence_intervals` needs them.
    out : path or URL, optional
        A Zarr store to which the scores of each layer are written as soon as it is done, and from which the same call takes what is
        there already, in whatever process: an interrupted sweep goes on. ``xarray.open_zarr`` opens it at any time. That the activations
        are those of before is asked of eight prompts in every layer, which are read for it.
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
        fold and what further dims were asked for; ``n_train`` and ``n_test`` (fold). Coordinates ``kind`` and ``control`` over
        ``probe``. Attributes name labels, groups, classes, class counts, the share of the largest class
        (``majority_share``), folds, estimators and versions.

    Raises
    ------
    InvalidTypeError
        An argument of another type than named above.
    InvalidArgumentError
        Other dimensions, no prompts or layers, activations that are NaN or infinite, an unknown probe, metric or control, a metric that
        needs probabilities of an estimator without, folds that do not fit or that would put one prompt or group on both sides, or
        an `out` that holds the scores of another sweep.
    LabelError
        Labels are missing, of another length, contradictory, continuous, all the same, or too few of one class. Groups are
        missing, of another length, fewer than the folds, or one prompt is in two.

    Warns
    -----
    ConvergenceWarning
        scikit-learn's own, but once per sweep with the number of fits.

    Notes
    -----
    While fits run in a process, BLAS is limited to one thread there: one fit per core beats many cores per fit
    (measured 2 to 5 times).
    """
    plan = plan_sweep(
        activations, labels, probes, cv, groups=groups, split=split, task=task, metrics=metrics, controls=controls,
        preprocessing=preprocessing, strengths=strengths, inner_cv=inner_cv, choose_by=choose_by, repeats=repeats, seeds=seeds,
        missing=missing, predictions=predictions, random_state=random_state,
    )  # fmt: skip
    check_run(client, scheduler, n_workers)
    scores = Scores(plan)
    place = None if out is None else ScoreStore(out, plan.fingerprint(), _sampled(plan), storage_options)
    if place is not None:
        # First, so that a place that cannot be written, or is another sweep's, is known before anything is fitted.
        place.create(scores.columns(), scores.piece(0, 0))
        place.load(scores)
    try:
        _run(plan, scores, place, client=client, scheduler=scheduler or "threads", n_workers=n_workers, progress=progress)
    except NotFiniteError as problem:
        raise _not_finite(plan, problem) from None
    found = scores.dataset()
    if place is not None:
        place.finish(found)
    if found.attrs["n_unconverged"]:
        from sklearn.exceptions import ConvergenceWarning

        warnings.warn(
            f"{found.attrs['n_unconverged']} of {found['converged'].size} fits stopped at their iteration limit: "
            "scores.converged says which; give an estimator with a larger max_iter, or standardise",
            ConvergenceWarning,
            stacklevel=2,
        )
    return found


def _not_finite(plan: SweepPlan, problem: NotFiniteError) -> InvalidArgumentError:
    array = plan._arrays[max(problem.variable, 0)]
    if problem.variable < 0:
        where = f"control {plan._fits.trials[problem.trial].name!r}"
    else:
        place = plan._fits.variables[problem.variable].layers[problem.layer]
        where = f"layer {plan.layers[place]} of {called(array)}" if place >= 0 else called(array)
    n = plan.n_prompts
    return InvalidArgumentError(
        f"{where} is NaN or infinite for {len(problem.rows)} of {n} prompts ({show_prompts(array, problem.rows)}): "
        "drop them with .dropna('prompt'), or extract them again (float16 overflows at 65504)"
    )


def _sampled(plan: SweepPlan) -> list[Array]:
    """Some numbers about the activations that others would not have: of eight prompts, in every layer of every variable."""
    rows = plan._fits.labels[0].rows
    some = np.unique(rows[np.linspace(0, len(rows) - 1, 8).astype(int)])
    features = [held for held in plan._fits.features.values() if isinstance(held, xr.Variable)]
    found = []
    for held in (*(array.variable for array in plan._arrays), *features):
        values = held.isel(prompt=some).transpose(..., "prompt", "hidden").values.astype(np.float64)
        # Signs by turns, so that what is only moved or turned round has other numbers too.
        signs = np.where(np.arange(values.shape[-1]) % 3 == 0, -1.0, 1.0)
        found.append(np.stack([np.sqrt((values**2).mean(-1)), (values * signs).mean(-1)]))
    return found


# -- execution -------------------------------------------------------------------------------------------------------------


def _run(
    plan: SweepPlan, scores: Scores, place: ScoreStore | None, *, client: Any, scheduler: str, n_workers: int | None, progress: bool
) -> None:
    """Fit what is missing, and enter and write it as it comes."""
    if client is not None:
        workers = sum(client.nthreads().values())
    else:
        from dask.system import CPU_COUNT

        workers = n_workers or CPU_COUNT
    every = plan.tasks(workers)
    tasks = [task for task in every if scores.missing(task)]
    written = set(scores.whole())
    with progress_bar(len(every), description="sweep", unit="task", enabled=progress) as advance:
        advance(len(every) - len(tasks))

        def finish(number: int, fits: list[Fit]) -> None:
            scores.enter(tasks[number], fits)
            if place is not None:
                for variable, layer in sorted(set(scores.whole()) - written):
                    written.add((variable, layer))
                    place.write(variable, layer, scores.piece(variable, layer))
            advance(1)

        if client is not None:
            _run_on_client(plan, tasks, finish, client=client, in_flight=2 * max(1, workers))
        else:
            _run_here(plan, tasks, finish, scheduler=scheduler, workers=workers, in_order=place is not None)


def _layer_values(plan: SweepPlan, task: FitTask) -> Any:
    """What a task is handed: nothing (it reads), the values in memory, or a dask array."""
    if task.variable < 0 or plan._fits.variables[task.variable].activations is not None:
        return None
    variable = plan._arrays[task.variable].variable
    return variable.isel(layer=task.layer, missing_dims="ignore").transpose("prompt", "hidden").data


def _run_here(plan: SweepPlan, tasks: Sequence[FitTask], finish: _Finish, *, scheduler: str, workers: int, in_order: bool) -> None:
    import dask.base
    from dask.callbacks import Callback
    from dask.delayed import delayed

    callback: Any = Callback
    compute: Any = dask.base.compute
    shared = delayed(plan._fits, traverse=False, pure=False)
    fit = delayed(fit_task, pure=False)
    # Named by their place, so that Dask takes them in the same order every time.
    names = [f"sweep-{shared.key}-{number:09d}" for number in range(len(tasks))]
    jobs = [fit(shared, task, _layer_values(plan, task), dask_key_name=name) for task, name in zip(tasks, names, strict=True)]
    numbers: dict[Hashable, int] = {job.key: number for number, job in enumerate(jobs)}

    def posttask(key: Hashable, fits: list[Fit], *_: object) -> None:
        if key in numbers:
            finish(numbers[key], fits)

    # Where scores are written, what other layers wait for comes first; Dask's own order is another.
    first = sum(map(plan.spreads, tasks)) if in_order else 0
    with callback(posttask=posttask):
        for some in (jobs[:first], jobs[first:]):
            compute(*some, scheduler=scheduler, num_workers=workers)


def _run_on_client(plan: SweepPlan, tasks: Sequence[FitTask], finish: _Finish, *, client: Client, in_flight: int) -> None:
    from dask.delayed import delayed

    shared = client.submit(_itself, plan._fits, pure=False)
    sent: dict[tuple[int, int], Any] = {}
    futures: dict[int, Any] = {}

    def start(number: int) -> Any:
        task = tasks[number]
        values = _layer_values(plan, task)
        if hasattr(values, "__dask_graph__"):
            future = client.compute(delayed(fit_task, pure=False)(shared, task, values))
        else:
            at = (task.variable, task.layer)
            if values is not None:
                # As arguments they would be copied through the scheduler, which warns of it.
                if at not in sent:
                    sent.clear()
                    sent[at] = client.scatter(values, hash=False)
                values = sent[at]
            future = client.submit(fit_task, shared, task, values, pure=False)
        futures[number] = future
        return future

    # Values are sent only as fast as they are fitted, so that few lie in the workers' memory.
    starts = [partial(start, number) for number in range(len(tasks))]
    run_on_client(client, starts, in_flight, lambda number: finish(number, futures.pop(number).result()))


def _itself(plan: FitPlan) -> FitPlan:
    return plan
