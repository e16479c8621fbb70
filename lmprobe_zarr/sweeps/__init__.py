"""Probes over layers, variables and labels: what a sweep would do (`plan_sweep`), its scores, and what they allow to conclude.

``sweep`` fits probes on prompts, and ``tokens`` on every token, block by block. ``transfer`` fits on one dataset and tests on another.
``directions`` fits one probe per layer for its coefficients, and ``direction_files`` keeps them. ``compare``, ``shuffles``, ``table``,
``glance`` and ``charts`` (for HTML pages, imported as a module) read nothing but scores. All others run their tasks through
`lmprobe_zarr.tasks.Runner`. ``origin`` warns where a probe meets activations of another model or site. Never a store of activations, a
model or a plot.
"""

from lmprobe_zarr.sweeps.compare import compare, confidence_intervals, selectivity
from lmprobe_zarr.sweeps.direction_files import load_directions, save_directions
from lmprobe_zarr.sweeps.directions import cosine_similarity, fit_directions
from lmprobe_zarr.sweeps.glance import best_scores, describe_scores, scores_card
from lmprobe_zarr.sweeps.plan import SweepPlan, plan_sweep
from lmprobe_zarr.sweeps.sweep import sweep
from lmprobe_zarr.sweeps.table import parse_table_path, table_of_scores
from lmprobe_zarr.sweeps.token_scores import pooling_weights, score_tokens, watched_probes
from lmprobe_zarr.sweeps.tokens import fit_tokens, sweep_tokens
from lmprobe_zarr.sweeps.transfer import sweep_transfer

__all__ = [
    "SweepPlan",
    "best_scores",
    "compare",
    "confidence_intervals",
    "cosine_similarity",
    "describe_scores",
    "fit_directions",
    "fit_tokens",
    "load_directions",
    "parse_table_path",
    "plan_sweep",
    "pooling_weights",
    "save_directions",
    "score_tokens",
    "scores_card",
    "selectivity",
    "sweep",
    "sweep_tokens",
    "sweep_transfer",
    "table_of_scores",
    "watched_probes",
]
