"""Parts of a chosen version of the format, with chunks and shards so small that few values have many of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lmprobe_zarr.batch.token_batch import TokenBatch
from lmprobe_zarr.store.format.group import GroupInfo
from lmprobe_zarr.store.format.part import PartInfo
from lmprobe_zarr.store.format.part_names import new_part_name
from lmprobe_zarr.store.parts import writer
from lmprobe_zarr.store.parts.writer import PartWriter, write_group
from lmprobe_zarr.store.store import Store


def write_version(monkeypatch: pytest.MonkeyPatch, version: int) -> None:
    """From now on, parts are written in this version of the format."""
    monkeypatch.setattr(writer, "PART_VERSION", version)


@contextmanager
def old_format() -> Iterator[None]:
    """Parts are written in format 1."""
    with pytest.MonkeyPatch.context() as patch:
        write_version(patch, 1)
        yield


def small_chunks(monkeypatch: pytest.MonkeyPatch, nbytes: int, *, in_shard: int = 3) -> None:
    """From now on, chunks have at most so many bytes, and shards hold so many chunks."""
    monkeypatch.setattr(writer, "CHUNK_BYTES", nbytes)
    monkeypatch.setattr(writer, "MIN_CHUNK_BYTES", nbytes)
    monkeypatch.setattr(writer, "SHARD_BYTES", nbytes * in_shard)


def write_part(store: Store, group: GroupInfo, *batches: TokenBatch, compressed: bool = True, shards: bool = False) -> PartInfo:
    """Write one part at the end of a store, of one layout."""
    write_group(store.storage, group, durable=False)
    name = new_part_name(max((part.info.name for part in store.listing(group).parts), default=""))
    with PartWriter(store.storage, group, name, compressed=compressed, shards=shards, durable=False) as part:
        for batch in batches:
            part.append(batch)
        return part.commit()
