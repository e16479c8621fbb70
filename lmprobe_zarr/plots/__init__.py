"""Plots of scores, tokens and curves with matplotlib, and their files.

Each function takes what this package computes (a sweep, scores of tokens, ROC curves, …) and returns matplotlib Axes. Never computes a
score and knows no store. Importing it does not import matplotlib, which is loaded by the first plot.

Other rooms import from here, and the check of a file's name from ``files``; `lmprobe_zarr.plots` is the documented import path.
"""

from lmprobe_zarr.plots.curves import plot_calibration, plot_roc
from lmprobe_zarr.plots.files import save_plot
from lmprobe_zarr.plots.heatmaps import plot_cosine, plot_tokens, plot_transfer
from lmprobe_zarr.plots.lines import plot_scores
from lmprobe_zarr.plots.score_map import plot_heatmap

__all__ = ["plot_calibration", "plot_cosine", "plot_heatmap", "plot_roc", "plot_scores", "plot_tokens", "plot_transfer", "save_plot"]
