"""Probes: what they learn from, how they are fitted, and how they are scored.

``classifiers`` and ``metrics`` know one matrix ``(prompt, hidden)`` with its labels, ``labels`` and ``folds`` prompts without
activations; ``fits`` puts them together for one layer. Never stores, files, schedulers or plots. scikit-learn is imported when
a probe is made, not before.
"""

from lmprobe_zarr.probes.classifiers import converged, fit_in_place, make_probe, named_probes
from lmprobe_zarr.probes.metrics import accuracy, auroc, class_scores

__all__ = ["accuracy", "auroc", "class_scores", "converged", "fit_in_place", "make_probe", "named_probes"]
