"""From prompts to stored activations: the request, what the store has already, the plan, and the run.

``models`` is the model side. Never chunks, never probes.
"""

from lmprobe_zarr.extraction.extract import extract, plan_extract
from lmprobe_zarr.extraction.plan import ExtractPlan, ExtractStats
from lmprobe_zarr.extraction.supply import Activations, Supply, SupplyMemory

__all__ = ["Activations", "ExtractPlan", "ExtractStats", "Supply", "SupplyMemory", "extract", "plan_extract"]
