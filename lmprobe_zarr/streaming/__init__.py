"""Shuffled batches for training: the order of rows, the rows, batches in numpy or torch, statistics.

Never writes, except the statistics that are kept. ``torch`` needs torch and is imported where it is used.
"""

from lmprobe_zarr.streaming.batches import Batches
from lmprobe_zarr.streaming.open import open_batches
from lmprobe_zarr.streaming.statistics import norms_of, statistics_of

__all__ = ["Batches", "norms_of", "open_batches", "statistics_of"]
