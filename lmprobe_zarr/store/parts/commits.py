"""A second sign of every commit: an empty file per part, apart from it.

It tells a part whose document somebody deleted from one that a killed writer left half of. Only the writer of a part makes it, after the
commit, and whoever removes the part removes it first. So where it is and the document is not, something else than this package took the
document. Best effort: without it, such a part counts as one that was never committed.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

from lmprobe_zarr.errors import LmprobeZarrError
from lmprobe_zarr.storage import Storage
from lmprobe_zarr.store.format import COMMITS, PART_NAME
from lmprobe_zarr.store.parts.frozen import FrozenStorage

__all__ = ["commit_key", "find_lost", "note_commit"]


def commit_key(group: str, name: str) -> str:
    """The key of the sign of one part's commit."""
    return f"{group}/{COMMITS}/{name}"


def note_commit(storage: Storage, group: str, name: str) -> None:
    """Note that a part has just been committed. Never an error: the part is whole without it."""
    with suppress(OSError, LmprobeZarrError):
        storage.touch(commit_key(group, name))


def find_lost(storage: Storage, paths: Iterable[str]) -> list[str]:
    """Those of some parts without a document that had one, which something else than this package deleted.

    One list, where there are any such parts, and one or two requests for each that was committed.

    Parameters
    ----------
    storage : Storage
    paths : iterable of str
        Keys of folders of one group, in which there was no document just now.
    """
    without = [path for path in paths if PART_NAME.fullmatch(path.rpartition("/")[2])]
    if not without or isinstance(storage, FrozenStorage):
        return without  # a published copy names its parts
    committed = set(storage.list(f"{without[0].partition('/')[0]}/{COMMITS}"))
    # A part may have been committed since, or removed: then nothing is left of it.
    return [
        path
        for path in without
        if path.rpartition("/")[2] in committed and not storage.is_file(f"{path}/zarr.json") and storage.list(f"{path}/prompts")
    ]
