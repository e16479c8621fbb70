"""The mark of a published copy, and its consolidated document, which any Zarr reader can open. No I/O."""

from __future__ import annotations

import json
from collections.abc import Mapping

from lmprobe_zarr.store.format.group import GroupInfo
from lmprobe_zarr.store.format.names import FORMAT, FORMAT_VERSION, LEVELS, Json, consolidated, dump
from lmprobe_zarr.store.format.part import PartInfo, level_document
from lmprobe_zarr.store.format.root import Published

__all__ = ["PUBLISHED_MARK", "published_document"]
PUBLISHED_MARK = "published_copy"


def published_document(published: Published, groups: Mapping[str, GroupInfo], parts: Mapping[str, PartInfo]) -> bytes:
    """The document at the root of a published copy: that of any store, with the metadata of everything below it.

    Parameters
    ----------
    published : Published
    groups, parts : mapping
        Records of all groups and parts, by their keys below the root.
    """
    metadata: Json = {}
    for name, group in groups.items():
        metadata[name] = json.loads(group.to_document())
    for folder in sorted({key.rpartition("/")[0] for key in parts} - set(groups)):
        metadata[folder] = {"zarr_format": 3, "node_type": "group", "attributes": {}}
    for key, part in parts.items():
        # The index and the table of files are large, so only the part's own document holds them.
        few = {"format": FORMAT, "format_version": part.version, "kind": part.kind, "group": part.group, "name": part.name}
        metadata[key] = {"zarr_format": 3, "node_type": "group", "attributes": few}
        levels = {f"{key}/{level}": level_document(arrays, level, nested=False) for level in LEVELS if (arrays := part.variables(level))}
        metadata |= levels | {f"{key}/{name}": array.to_document() for name, array in part.arrays.items()}
    attributes: Json = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "published": {"groups": {name: list(keys) for name, keys in published.groups.items()}},
    }
    document = {"zarr_format": 3, "node_type": "group", "attributes": attributes, "consolidated_metadata": consolidated(metadata)}
    return dump(document, sort=False)
