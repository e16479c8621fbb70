"""Parts with chunks of several blocks, storages that count what is read of them, and places to damage in them."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import pytest
from stores import GROUP, Wrapped

from lmprobe_zarr.batch import fill_value
from lmprobe_zarr.batch.hashes import prompt_sha256
from lmprobe_zarr.batch.token_batch import TokenBatch
from lmprobe_zarr.storage.base import Storage
from lmprobe_zarr.store.format import new_part_name
from lmprobe_zarr.store.parts import Part, PartWriter, writer
from lmprobe_zarr.store.parts.stored_array import StoredArray

Array = npt.NDArray[Any]
LAYERS = (0, 3)


class Counted(Wrapped):
    """A storage that notes every range that is read, as (file, start, stop), and calls itself slow where it is told to."""

    def __init__(self, inner: Storage, *, slow: bool = False) -> None:
        super().__init__(inner)
        self.is_slow = slow
        self.read_of: list[tuple[str, int, int]] = []
        self._lock = threading.Lock()

    def _note(self, key: str, start: int, data: Any) -> Any:
        with self._lock:
            self.read_of.append((key, start, start + len(data)))
        return data

    @property
    def nbytes(self) -> int:
        return sum(stop - start for _, start, stop in self.read_of)

    def of(self, name: str) -> list[tuple[str, int, int]]:
        """What was read of files of this name, of chunks with ``c.``."""
        return [each for each in self.read_of if each[0].rpartition("/")[2].startswith(name)]

    def read(self, key: str) -> bytes:
        return bytes(self._note(key, 0, super().read(key)))

    def read_view(self, key: str) -> Any:
        return self._note(key, 0, super().read_view(key))

    def read_ranges(self, key: str, ranges: Any) -> Any:
        found = super().read_ranges(key, ranges)
        for (start, _), data in zip(ranges, found, strict=True):
            self._note(key, start, data)
        return found


class Short(Wrapped):
    """A storage whose ranges end early, as of a file that was cut."""

    def read_ranges(self, key: str, ranges: Any) -> Any:
        return [data[: len(data) // 2] for data in super().read_ranges(key, ranges)]


@contextmanager
def small_chunks(nbytes: int, shard_nbytes: int = 2**30, least: int | None = None) -> Iterator[None]:
    """Writers make chunks and shards of about so many bytes."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CHUNK_BYTES", "REMOTE_CHUNK_BYTES"):
            patch.setattr(writer, name, nbytes)
        patch.setattr(writer, "MIN_CHUNK_BYTES", nbytes if least is None else least)
        for name in ("SHARD_BYTES", "REMOTE_SHARD_BYTES"):
            patch.setattr(writer, name, shard_nbytes)
        yield


def values_of(kind: str, shape: tuple[int, ...], dtype: str, seed: int = 0) -> Array:
    """Values that do not compress, that compress a little, and that compress to almost nothing; none is NaN."""
    rng = np.random.default_rng(seed)
    if kind == "constant":
        return np.full(shape, 3, dtype)
    if kind == "bytes":
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        made: Array = rng.integers(0, 256, nbytes, np.uint8).view(dtype).reshape(shape)
        return np.where(made == made, made, np.ones((), dtype))
    scaled: Array = (rng.standard_normal(shape) * 50).astype(dtype)
    return scaled


def batch_of(values: Array, prompts: int = 1, first: int = 0) -> TokenBatch:
    """Tokens of some prompts, whose rows are `values`, shape (layer, token, …); the first has most of them."""
    texts = [f"p{first + i}" for i in range(prompts)]
    counts = np.full(prompts, values.shape[1] // prompts)
    counts[0] += values.shape[1] - counts.sum()
    return TokenBatch(
        sha256=[prompt_sha256(text) for text in texts],
        text=texts,
        n_tokens=counts,
        layers=LAYERS[: len(values)],
        tokens={"resid": values},
        prompts={},
    )


def write_values(
    storage: Storage, values: Array, *, compressed: bool = True, shards: bool = False, prompts: int = 1, pieces: int = 1, first: int = 0
) -> Part:
    """A part with one variable of tokens, in one call of the writer or in several."""
    with PartWriter(storage, GROUP, new_part_name(), compressed=compressed, durable=False, shards=shards) as new:
        if pieces == 1:
            new.append(batch_of(values, prompts, first))
        else:
            for i, some in enumerate(np.array_split(values, pieces, axis=1)):
                new.append(batch_of(some, 1, first + i))
        info = new.commit()
    return Part(storage, new.path, info)


def chunk_of(values: Array, array: StoredArray, layer: int, block: int) -> Array:
    """What a chunk is to hold: rows of the values, and the fill value behind their end."""
    rows = array.info.rows_per_chunk
    some = values[layer, block * rows : (block + 1) * rows]
    missing = np.full((rows - len(some), *some.shape[1:]), fill_value(values.dtype), values.dtype)
    return np.concatenate([some, missing])


# ----------------------------------------------------------------------------------------------------- changing what is stored


def reseal(document: Path, change: Callable[[Any], object]) -> None:
    """Change a part's document as somebody does who knows the format: its digest holds."""
    content = json.loads(document.read_bytes())
    change(content)
    content["attributes"]["digest"] = "crc32c:00000000"
    data = json.dumps(content, separators=(",", ":")).encode()
    document.write_bytes(data.replace(b"crc32c:00000000", b"crc32c:%08x" % google_crc32c.value(data), 1))


def words_of(text: str) -> npt.NDArray[np.uint32]:
    """A table in a document, as numbers that can be changed."""
    return np.frombuffer(base64.b64decode(text), "<u4").copy()


def text_of(words: npt.NDArray[Any]) -> str:
    return base64.b64encode(words.astype("<u4").tobytes()).decode()


def crc(data: Any) -> int:
    return int(google_crc32c.value(bytes(data)))
