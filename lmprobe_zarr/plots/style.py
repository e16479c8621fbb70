"""What all plots share: colours, markers and line styles, the names of scores, and new axes."""

from __future__ import annotations

import sys
from typing import Any

from lmprobe_zarr.errors import MissingDependencyError

__all__ = ["COLOURS", "LINES", "MARKERS", "NEEDS_MATPLOTLIB", "SCORE_LABELS", "new_axes"]

NEEDS_MATPLOTLIB = 'plots need matplotlib, which is not installed: pip install "lmprobe-zarr[plot]"'

# Source: M. Okabe and K. Ito, "Color Universal Design" (2008), without yellow (too light on white) and black (used for chance).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
#: Line styles of probes and curves, so that they can be distinguished without colour.
LINES = ("-", (0, (6, 1.5)), (0, (4, 1.2, 1, 1.2)), (0, (2.5, 1)), (0, (8, 1.5, 1, 1.5, 1, 1.5)))
#: How a score is written on an axis where its name alone would be unclear.
SCORE_LABELS = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "balanced_accuracy": "balanced accuracy",
    "brier": "Brier score",
    "ece": "expected calibration error",
    "f1": "F1",
    "fit_seconds": "fit time (s)",
    "log_loss": "log loss (nats)",
    "mae": "mean absolute error (units of the target)",
    "r2": "R²",
    "spearman": "Spearman's ρ",
}


def new_axes(size: tuple[float, float] = (7.2, 4.2)) -> Any:
    """Axes of a new figure, displayed where the caller uses pyplot or a notebook; `size` in inches."""
    shell = sys.modules.get("IPython")
    try:
        # pyplot picks a backend for the whole process and keeps every figure alive, so use it only where it is in use anyway.
        if "matplotlib.pyplot" in sys.modules or (shell is not None and shell.get_ipython() is not None):
            import matplotlib.pyplot as plt

            return plt.subplots(figsize=size, layout="constrained")[1]
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(NEEDS_MATPLOTLIB) from error
    return Figure(figsize=size, layout="constrained").subplots()
