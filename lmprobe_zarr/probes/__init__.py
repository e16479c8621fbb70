"""Probes: classifiers by name, and how they are scored.

Holds what happens between one matrix ``(prompt, hidden)`` with its labels and one score. Never layers, folds, files or
plots. scikit-learn is imported when a probe is made, not before.
"""

from lmprobe_zarr.probes.classifiers import converged, fit_in_place, make_probe, named_probes
from lmprobe_zarr.probes.metrics import accuracy, auroc, class_scores

__all__ = ["accuracy", "auroc", "class_scores", "converged", "fit_in_place", "make_probe", "named_probes"]
