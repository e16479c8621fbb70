"""Upkeep of a store, one verb per file: verify, repair, compact, copy, drop, delete, evict, gc, publish.

Each decides on records first (a plan), carries the plan out, and returns a summary. Records of `verify` and `repair` are in ``problems``
and ``losses``; ``rewrite`` writes parts again, ``removal`` removes them,
``tombstones`` keep hidden what a removed part had replaced, and ``last_use`` notes that parts are used. Modules that others
may import from: none, this face has everything.

Never arithmetic on activations.
"""

from lmprobe_zarr.store.upkeep.compact import CompactPlan, check_min_parts, compact_groups
from lmprobe_zarr.store.upkeep.copy import CopySummary, check_copy, copy_selections
from lmprobe_zarr.store.upkeep.delete import delete_from
from lmprobe_zarr.store.upkeep.drop import drop_from
from lmprobe_zarr.store.upkeep.evict import EvictionEntry, EvictPlan, list_entries, plan_evict, remove_entries
from lmprobe_zarr.store.upkeep.gc import GcSummary, collect_garbage
from lmprobe_zarr.store.upkeep.last_use import mark_used
from lmprobe_zarr.store.upkeep.losses import RepairSummary
from lmprobe_zarr.store.upkeep.problems import VerifySummary
from lmprobe_zarr.store.upkeep.publish import PublishSummary, Selection, publish_to, select_from
from lmprobe_zarr.store.upkeep.repair import repair_root
from lmprobe_zarr.store.upkeep.verify import StoreScan, scan_store, verify_scans

__all__ = [
    "CompactPlan",
    "CopySummary",
    "EvictPlan",
    "EvictionEntry",
    "GcSummary",
    "PublishSummary",
    "RepairSummary",
    "Selection",
    "StoreScan",
    "VerifySummary",
    "check_copy",
    "check_min_parts",
    "collect_garbage",
    "compact_groups",
    "copy_selections",
    "delete_from",
    "drop_from",
    "list_entries",
    "mark_used",
    "plan_evict",
    "publish_to",
    "remove_entries",
    "repair_root",
    "scan_store",
    "select_from",
    "verify_scans",
]
