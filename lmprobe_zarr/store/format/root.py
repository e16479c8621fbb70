"""The document of a root, that of a growing store or of a published copy, written and parsed. No I/O."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from lmprobe_zarr.errors import CorruptPartError, NotAStoreError
from lmprobe_zarr.store.format.names import ANNOTATIONS, FORMAT, FORMAT_VERSION, GROUP_NAME, check_version, dump, reason_of
from lmprobe_zarr.store.format.part_names import PART_NAME

__all__ = ["Published", "is_root_document", "parse_root", "root_document"]


# ---------------------------------------------------------------------------------------------------------------- root


def root_document() -> bytes:
    """The document at the root of every store."""
    return dump({"zarr_format": 3, "node_type": "group", "attributes": {"format": FORMAT, "format_version": FORMAT_VERSION}})


def is_root_document(document: object) -> bool:
    """Whether a parsed ``zarr.json`` claims to be the root of a store of ours, of whatever version."""
    attributes = document.get("attributes") if isinstance(document, dict) else None
    return isinstance(attributes, dict) and attributes.get("format") == FORMAT and "kind" not in attributes


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What the root of a published copy lists: everything in it, so that a reader needs no listing.

    Parameters
    ----------
    groups : mapping of str to tuple of str
        The parts and annotations of each group, by their keys below the group's folder.
    """

    groups: Mapping[str, tuple[str, ...]]


def parse_root(data: bytes, where: str) -> Published | None:
    """Check the root document; returns the record of a published copy, or None for a store that grows.

    Raises
    ------
    NotAStoreError
        It is not the document of a store of ours.
    UnsupportedVersionError
        It is of a version that this release does not know.
    CorruptPartError
        It claims to be that of a published copy, and is damaged.
    """
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        document = None
    if not is_root_document(document):
        raise NotAStoreError(f"{where} is not an {FORMAT} store (another zarr.json lies there): give another folder or prefix")
    attributes = document["attributes"]
    try:
        check_version(attributes.get("format_version"), where)
    except TypeError as error:
        raise NotAStoreError(f"{where}/zarr.json is no document of a store of {FORMAT}: {error}") from error
    if "published" not in attributes:
        return None
    try:
        return Published(groups={_group_key(name): tuple(map(_part_key, keys)) for name, keys in attributes["published"]["groups"].items()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptPartError(
            f"{where}/zarr.json, the root of a published copy, is damaged ({reason_of(error)}): fetch it again"
        ) from error


def _group_key(key: object) -> str:
    if not isinstance(key, str) or not GROUP_NAME.fullmatch(key):
        raise ValueError(f"{key!r:.80} is no group")
    return key


def _part_key(key: object) -> str:
    if not isinstance(key, str) or not PART_NAME.fullmatch(key.removeprefix(f"{ANNOTATIONS}/")):
        raise ValueError(f"{key!r:.80} is no part")
    return key
