"""One part, and the union of many: written, read, listed, and seen as one lazy variable.

Never upkeep, never models.
"""

from lmprobe_zarr.store.parts.columns import as_column
from lmprobe_zarr.store.parts.frozen import FrozenStorage
from lmprobe_zarr.store.parts.lazy import LazyArray
from lmprobe_zarr.store.parts.listing import Listing, committed_at, list_names, part_nbytes
from lmprobe_zarr.store.parts.part import Part
from lmprobe_zarr.store.parts.reading import blocks_of, read_batches, read_values
from lmprobe_zarr.store.parts.stored_array import StoredArray
from lmprobe_zarr.store.parts.variable import NOWHERE, VirtualArray
from lmprobe_zarr.store.parts.view import View, open_view
from lmprobe_zarr.store.parts.writer import BUFFER_BYTES, PART_BYTES, PartWriter, part_bytes_within, shape_of, write_group

__all__ = [
    "BUFFER_BYTES",
    "NOWHERE",
    "PART_BYTES",
    "FrozenStorage",
    "LazyArray",
    "Listing",
    "Part",
    "PartWriter",
    "StoredArray",
    "View",
    "VirtualArray",
    "as_column",
    "blocks_of",
    "committed_at",
    "list_names",
    "open_view",
    "part_bytes_within",
    "part_nbytes",
    "read_batches",
    "read_values",
    "shape_of",
    "write_group",
]
