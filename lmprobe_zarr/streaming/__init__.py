"""Shuffled batches for training: the order of rows, the rows, batches in numpy or torch; norms, statistics and differences of rows.

Never writes, except statistics where ``keep=`` names a file. Never imports torch: ``torch`` does, and is imported where a caller chooses
torch. Others may import from ``order`` and ``torch``.
"""

from lmprobe_zarr.streaming.batches import Batches
from lmprobe_zarr.streaming.differences import compare_groups
from lmprobe_zarr.streaming.open import BatchOptions, open_batches
from lmprobe_zarr.streaming.statistics import norms_of, statistics_of

__all__ = ["BatchOptions", "Batches", "compare_groups", "norms_of", "open_batches", "statistics_of"]
