"""Upkeep, one verb a file: verify, repair, compact, copy, drop, delete, evict, gc, publish.

Never arithmetic on activations.
"""

from lmprobe_zarr.store.upkeep.compact import CompactPlan, merge_run, plan_runs
from lmprobe_zarr.store.upkeep.copy import CopySummary, copy_group
from lmprobe_zarr.store.upkeep.delete import delete_prompts
from lmprobe_zarr.store.upkeep.drop import drop_variables
from lmprobe_zarr.store.upkeep.evict import Entry, EvictPlan, describe_entries, plan_evict, remove_entries
from lmprobe_zarr.store.upkeep.gc import GcSummary, plan_gc, remove_garbage
from lmprobe_zarr.store.upkeep.last_use import stamp_parts
from lmprobe_zarr.store.upkeep.losses import RepairSummary
from lmprobe_zarr.store.upkeep.problems import VerifySummary
from lmprobe_zarr.store.upkeep.publish import PublishSummary, Selection, publish_groups, total_nbytes
from lmprobe_zarr.store.upkeep.repair import repair_store
from lmprobe_zarr.store.upkeep.verify import check_files, scan_store, verify_stores

__all__ = [
    "CompactPlan",
    "CopySummary",
    "Entry",
    "EvictPlan",
    "GcSummary",
    "PublishSummary",
    "RepairSummary",
    "Selection",
    "VerifySummary",
    "check_files",
    "copy_group",
    "delete_prompts",
    "describe_entries",
    "drop_variables",
    "merge_run",
    "plan_evict",
    "plan_gc",
    "plan_runs",
    "publish_groups",
    "remove_entries",
    "remove_garbage",
    "repair_store",
    "scan_store",
    "stamp_parts",
    "total_nbytes",
    "verify_stores",
]
