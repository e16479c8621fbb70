"""`Listing`: every part of a group at one moment, with its size and time."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Final

import numpy as np

from lmprobe_zarr.storage import Storage
from lmprobe_zarr.store.format import ANNOTATIONS, PART_NAME, PartInfo, is_variable, part_milliseconds
from lmprobe_zarr.store.parts.part import Part

__all__ = ["Listing", "committed_at", "list_names", "part_nbytes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """Everything in a group's folder at one moment.

    Parameters
    ----------
    parts, annotations : tuple of Part
        Committed ones in the order of their names, replaced ones too.
    names : frozenset of str
        Names of all folders that are named like a part, committed or not.
    """

    parts: tuple[Part, ...]
    annotations: tuple[Part, ...]
    names: frozenset[str]

    @property
    def replaced(self) -> frozenset[str]:
        """Names that some committed part replaces."""
        return frozenset(name for part in (*self.parts, *self.annotations) for name in part.info.replaces)

    @property
    def unfinished(self) -> tuple[str, ...]:
        """Names without a commit, sorted: these parts are being written, or were left by a writer that was killed."""
        return tuple(sorted(self.names - {part.info.name for part in (*self.parts, *self.annotations)}))


def part_nbytes(part: Part) -> int:
    """About how many bytes a part holds: activations uncompressed, columns as stored."""
    info = part.info
    inside = {key for key, array in info.arrays.items() if is_variable(key.split("/")[1], array)}
    held = sum(int(np.prod(info.arrays[key].shape)) * np.dtype(info.arrays[key].dtype).itemsize for key in inside)
    return held + sum(nbytes for folder, nbytes in info.nbytes_by_folder().items() if folder not in inside)


def list_names(storage: Storage, group: str) -> frozenset[str]:
    """Names of all folders of a group that are named like a part, committed or not."""
    return frozenset(n for folder in (group, f"{group}/{ANNOTATIONS}") for n in storage.list(folder) if PART_NAME.fullmatch(n))


END_OF_TIME: Final = 253370764800.0  # the year 9999, the last that a date can have


def committed_at(info: PartInfo) -> float:
    """When a part was committed by its writer's clock, in seconds since 1970.

    The part records this time. Where that is missing, the time in its name is used. It only says when the part was begun, and may be later
    than that, so that the name sorts after others.
    """
    written = str(info.recorded.get("written", ""))
    moment = part_milliseconds(info.name) / 1000
    with suppress(ValueError, OverflowError):
        moment = datetime.fromisoformat(written).timestamp()
    return min(max(moment, 0.0), END_OF_TIME)
