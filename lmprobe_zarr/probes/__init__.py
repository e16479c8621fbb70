"""Probes: what they learn from, how they are fitted, scored, saved and looked into.

``classifiers``, ``pipelines``, ``coefficients``, ``files`` and ``metrics`` know one matrix ``(prompt, hidden)`` with its labels,
``labels`` and ``folds`` prompts without activations; ``fits`` puts them together for one layer. Never stores, files on disk,
schedulers or plots. scikit-learn is imported when a probe is made, not before.
"""

from lmprobe_zarr.probes.classifiers import converged, fit_in_place, make_probe, named_probes
from lmprobe_zarr.probes.coefficients import coefficients
from lmprobe_zarr.probes.curves import calibration_curves, roc_curves
from lmprobe_zarr.probes.files import dump_probe, parse_probe
from lmprobe_zarr.probes.metrics import accuracy, auroc, class_scores, evaluate_classification, evaluate_regression
from lmprobe_zarr.probes.pipelines import PreprocessingStep, make_pipeline_for, parse_preprocessing

__all__ = [
    "PreprocessingStep",
    "accuracy",
    "auroc",
    "calibration_curves",
    "class_scores",
    "coefficients",
    "converged",
    "dump_probe",
    "evaluate_classification",
    "evaluate_regression",
    "fit_in_place",
    "make_pipeline_for",
    "make_probe",
    "named_probes",
    "parse_preprocessing",
    "parse_probe",
    "roc_curves",
]
