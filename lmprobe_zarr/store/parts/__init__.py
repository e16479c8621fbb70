"""Parts: one part is written, listed and read; the union of many is a `View`, read as lazy variables; `Catalog` is the index of one root.

Other rooms import from this face. Never upkeep, models or xarray datasets.
"""

from lmprobe_zarr.store.parts.as_pandas import as_series, prompt_index
from lmprobe_zarr.store.parts.call_order import CallOrder, merged_order
from lmprobe_zarr.store.parts.catalog import Catalog, Mode, any_holds_parts, groups_of, open_union, requesting_ahead, urls_of, visible_parts
from lmprobe_zarr.store.parts.columns import column_attrs, column_of, holds_texts_only, merged_kind, shown_column
from lmprobe_zarr.store.parts.commits import commit_key, find_lost, note_commit
from lmprobe_zarr.store.parts.frozen import FrozenStorage
from lmprobe_zarr.store.parts.lazy import LazyArray, as_stored
from lmprobe_zarr.store.parts.listing import Listing, committed_at, list_names, part_nbytes
from lmprobe_zarr.store.parts.part import PART_BYTES, Part, part_bytes_within
from lmprobe_zarr.store.parts.reading import blocks_of, kinds_of_column, read_batches, read_column, read_values
from lmprobe_zarr.store.parts.roles import FlagArray, RoleArray, has_role_names
from lmprobe_zarr.store.parts.salvage import NO_LAYER, Cell, Salvaged, salvage
from lmprobe_zarr.store.parts.stored_array import StoredArray
from lmprobe_zarr.store.parts.uses import stamp_noted
from lmprobe_zarr.store.parts.variable import NOWHERE, VirtualArray
from lmprobe_zarr.store.parts.view import View, open_view
from lmprobe_zarr.store.parts.writer import BUFFER_BYTES, PartWriter, shape_of, write_group

__all__ = [
    "BUFFER_BYTES",
    "NOWHERE",
    "NO_LAYER",
    "PART_BYTES",
    "CallOrder",
    "Catalog",
    "Cell",
    "FlagArray",
    "FrozenStorage",
    "LazyArray",
    "Listing",
    "Mode",
    "Part",
    "PartWriter",
    "RoleArray",
    "Salvaged",
    "StoredArray",
    "View",
    "VirtualArray",
    "any_holds_parts",
    "as_series",
    "as_stored",
    "blocks_of",
    "column_attrs",
    "column_of",
    "commit_key",
    "committed_at",
    "find_lost",
    "groups_of",
    "has_role_names",
    "holds_texts_only",
    "kinds_of_column",
    "list_names",
    "merged_kind",
    "merged_order",
    "note_commit",
    "open_union",
    "open_view",
    "part_bytes_within",
    "part_nbytes",
    "prompt_index",
    "read_batches",
    "read_column",
    "read_values",
    "requesting_ahead",
    "salvage",
    "shape_of",
    "shown_column",
    "stamp_noted",
    "urls_of",
    "visible_parts",
    "write_group",
]
