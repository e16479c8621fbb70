"""Probes on one matrix of activations with its labels: how they are made, fitted, scored and saved.

What is learned from: ``given``, ``labels`` and ``token_labels`` parse what callers give, ``folds`` splits prompts. Estimators:
``classifiers`` makes them by name, ``mass_mean``, ``ensemble``, ``descent`` and ``regressors`` hold our own, ``scaling`` and
``pipelines`` what comes before them, ``augment`` a column beside them. Fits: ``task`` holds the records, ``fit`` fits one layer,
``ridge`` a single probe, ``gram`` and ``sufficient`` solve linear probes from sums, ``batched`` all fits of a layer at once in torch,
``passes`` from passes over the rows. Which of several layers matter: ``group_lasso`` and ``layer_choice``. Probes with a pooling of their
own: ``sequences`` computes them, ``sequence_fits`` is how they learn, ``sequence_classifiers`` has them as estimators, ``running`` pools
tokens as they come in, and ``watched`` has any fitted probe in the form in which it follows a growing text. How a layer is read, in which
dtype it is computed and which rows are finite is decided in ``layer``. Results: ``metrics``, ``curves`` and ``coefficients``; what a
score has to beat: ``controls``, ``token_controls`` and ``sentence_embeddings``. ``ensemble_files`` puts several into one file. ``files``
turns a fitted pipeline into bytes and back, and ``file_checks`` says what such a file must hold.

Never stores, files on disk, schedulers or plots. scikit-learn is imported when a probe is made, not before, and torch when something is
learned or solved with it. Other rooms import from here or from ``batched``, ``controls``, ``curves``, ``devices``, ``layer_choice``,
``metrics``, ``passes``, ``sequence_fits`` and ``token_controls``.
"""

from __future__ import annotations

from lmprobe_zarr.probes.absent import describe_unfit
from lmprobe_zarr.probes.apart import fit_apart
from lmprobe_zarr.probes.classifiers import check_task, converged, fit_in_place, has_strength, make_probe, named_probes
from lmprobe_zarr.probes.coefficients import coefficients
from lmprobe_zarr.probes.curves import calibration_curves, roc_curves
from lmprobe_zarr.probes.ensemble_files import dump_ensemble, parse_ensemble
from lmprobe_zarr.probes.evaluation import evaluate_classification, evaluate_regression
from lmprobe_zarr.probes.files import dump_probe, parse_probe
from lmprobe_zarr.probes.fit import draw_within, fit_task
from lmprobe_zarr.probes.folds import (
    check_folds_listed,
    evaluation_folds,
    group_codes,
    keep_together,
    number_repeats,
    plan_folds,
)
from lmprobe_zarr.probes.given import (
    as_array,
    check_agreement,
    check_batch_size,
    check_labels,
    check_weights,
    has_weights,
    is_matrix,
    is_sparse,
    list_given,
    parse_matrix,
    rows_together,
    split_labels,
    true_labels,
)
from lmprobe_zarr.probes.identity import list_prompts, prompt_names, show_prompts, unseen_rows
from lmprobe_zarr.probes.labels import (
    Groups,
    Labels,
    align_labels,
    bare_variable,
    check_missing,
    parse_groups,
    parse_label_sets,
    parse_labels,
    parse_sides,
)
from lmprobe_zarr.probes.layer import as_fit_dtype, fits_running, not_finite_rows, read_layer
from lmprobe_zarr.probes.metrics import accuracy, auroc, class_scores
from lmprobe_zarr.probes.pipelines import PreprocessingStep, keep_zeros, make_pipeline_for, parse_preprocessing
from lmprobe_zarr.probes.ridge import fit_probe, rows_for
from lmprobe_zarr.probes.sequence_fits import draw_looks, fit_sequences
from lmprobe_zarr.probes.sequences import (
    SEQUENCE_PROBES,
    BoundSequences,
    SequenceProbe,
    SequenceSolution,
    fit_sequence_pipeline,
    is_sequence_classifier,
    is_sequence_probe,
    parse_sequence_probe,
    pooling_weights,
    sequence_probes,
)
from lmprobe_zarr.probes.sufficient import (
    EXACT,
    ClassSums,
    Solution,
    Unit,
    empty_sums,
    merge_sums,
    order_of,
    scaling_of,
    solve,
    unit_of,
)
from lmprobe_zarr.probes.task import Fit, FitPlan, FitTask, FitVariable, NotFiniteError
from lmprobe_zarr.probes.token_labels import (
    LabelledTokens,
    TokenFolds,
    cells_of,
    group_tokens,
    plan_token_folds,
    select_labelled_tokens,
    show_rows,
)
from lmprobe_zarr.probes.watched import WatchedProbe, watch_pipeline, watch_solution

__all__ = [
    "EXACT",
    "SEQUENCE_PROBES",
    "BoundSequences",
    "ClassSums",
    "Fit",
    "FitPlan",
    "FitTask",
    "FitVariable",
    "Groups",
    "LabelledTokens",
    "Labels",
    "NotFiniteError",
    "PreprocessingStep",
    "SequenceProbe",
    "SequenceSolution",
    "Solution",
    "TokenFolds",
    "Unit",
    "WatchedProbe",
    "accuracy",
    "align_labels",
    "as_array",
    "as_fit_dtype",
    "auroc",
    "bare_variable",
    "calibration_curves",
    "cells_of",
    "check_agreement",
    "check_batch_size",
    "check_folds_listed",
    "check_labels",
    "check_missing",
    "check_task",
    "check_weights",
    "class_scores",
    "coefficients",
    "converged",
    "describe_unfit",
    "draw_looks",
    "draw_within",
    "dump_ensemble",
    "dump_probe",
    "empty_sums",
    "evaluate_classification",
    "evaluate_regression",
    "evaluation_folds",
    "fit_apart",
    "fit_in_place",
    "fit_probe",
    "fit_sequence_pipeline",
    "fit_sequences",
    "fit_task",
    "fits_running",
    "group_codes",
    "group_tokens",
    "has_strength",
    "has_weights",
    "is_matrix",
    "is_sequence_classifier",
    "is_sequence_probe",
    "is_sparse",
    "keep_together",
    "keep_zeros",
    "list_given",
    "list_prompts",
    "make_pipeline_for",
    "make_probe",
    "merge_sums",
    "named_probes",
    "not_finite_rows",
    "number_repeats",
    "order_of",
    "parse_ensemble",
    "parse_groups",
    "parse_label_sets",
    "parse_labels",
    "parse_matrix",
    "parse_preprocessing",
    "parse_probe",
    "parse_sequence_probe",
    "parse_sides",
    "plan_folds",
    "plan_token_folds",
    "pooling_weights",
    "prompt_names",
    "read_layer",
    "roc_curves",
    "rows_for",
    "rows_together",
    "scaling_of",
    "select_labelled_tokens",
    "sequence_probes",
    "show_prompts",
    "show_rows",
    "solve",
    "split_labels",
    "true_labels",
    "unit_of",
    "unseen_rows",
    "watch_pipeline",
    "watch_solution",
]
