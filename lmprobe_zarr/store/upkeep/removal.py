"""The one way in which a part is removed: its commit first, then its files; never through a link that leads out of the store."""

from __future__ import annotations

from collections.abc import Iterable

from lmprobe_zarr.errors import ReadOnlyError
from lmprobe_zarr.storage import Storage
from lmprobe_zarr.store.format import STAMPS
from lmprobe_zarr.store.parts import Part, commit_key

__all__ = ["check_removable", "lies_within", "remove_part"]


def lies_within(storage: Storage, part: Part) -> bool:
    """Whether all files of a part are inside the store, none of them behind a link that leads out of it."""
    folders = {f"{part.path}/{name}".rpartition("/")[0] for name in part.info.file_names()}
    return not any(storage.leads_out(folder) for folder in (part.path, *folders))


def check_removable(storage: Storage, parts: Iterable[Part]) -> None:
    """Raise `ReadOnlyError` where a file of the parts is behind a link that leads out of the store."""
    for part in parts:
        if not lies_within(storage, part):
            raise ReadOnlyError(
                f"{storage.url}/{part.path} lies behind a link that leads out of the store, where nothing is removed: remove the link"
            )


def remove_part(storage: Storage, part: Part) -> None:
    """Remove one part: the signs of its commit, the commit, then the files that its commit names."""
    check_removable(storage, [part])
    # A part with either sign and without a commit is one that something else has damaged, so neither may outlive the commit.
    storage.remove([commit_key(part.info.group, part.info.name), f"{part.info.group}/{STAMPS}/{part.info.name}"])
    storage.remove([f"{part.path}/zarr.json"])
    storage.remove([f"{part.path}/{name}" for name in part.info.file_names()])
