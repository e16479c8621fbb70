"""Some rows of a chunk, read by the blocks that hold them: the same values as numpy has, and no more bytes than those of the blocks.

What is read is counted by the storage; where blocks lie is computed here from the stored frame itself, not from our tables.
"""

from __future__ import annotations

import pickle
import struct
import threading
import uuid
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pytest
from block_stores import Counted, Short, chunk_of, small_chunks, values_of, write_values
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmprobe_zarr.errors import CorruptPartError
from lmprobe_zarr.storage.base import Storage
from lmprobe_zarr.storage.local import LocalStorage
from lmprobe_zarr.storage.open import open_storage
from lmprobe_zarr.store.parts import Part
from lmprobe_zarr.store.parts.stored_array import StoredArray
from lmprobe_zarr.store.store import Store

Array = npt.NDArray[Any]
# dtype, width, rows: rows that fill a block, that straddle the 64 KiB at which blocks would end, and that are larger than any block.
SHAPES: Final = [
    ("float16", 4096, 150),
    ("float16", 3000, 200),
    ("float32", 77, 4000),
    ("float64", 8192, 17),
    ("int8", 1000, 1300),
    ("int8", 1, 700_000),
    ("int64", 5, 30_000),
    ("float32", 70_000, 9),
    ("float16", 140_001, 7),
    ("int8", 262_145, 5),
]
KINDS: Final = ["normal", "bytes", "constant"]


def place_of(kind: str, tmp_path: Path) -> Storage:
    if kind == "local":
        return LocalStorage(tmp_path / "s")
    inner = open_storage(f"memory://{uuid.uuid4().hex}")
    return Counted(inner, slow=True) if kind == "slow" else inner


def selections(rows: int, seed: int) -> list[Any]:
    """Slices, and rows that are scattered, in another order, and there more than once."""
    rng = np.random.default_rng(seed)
    some = rng.integers(0, rows, 6)
    begin, end = sorted(rng.integers(0, rows, 2).tolist())
    return [
        slice(0, rows),
        slice(begin, end + 1),
        slice(rows - 1, rows),
        slice(0, 1),
        slice(begin, begin),
        some,
        np.sort(some),
        np.array([rows - 1, 0, rows - 1]),
        np.array([rows // 2] * 3),
        np.zeros(0, np.int64),
        np.arange(rows)[::-1],
        np.arange(0, rows, max(1, rows // 3)),
    ]


def check_reads(array: StoredArray, values: Array, seed: int = 0) -> None:
    """Every way to read of every chunk, against numpy."""
    for layer in range(len(values)):
        for block in range(array.info.n_blocks):
            whole = chunk_of(values, array, layer, block)
            for rows in selections(len(whole), seed + block):
                found = array.read_rows(layer, block, rows)
                assert found.dtype == values.dtype
                assert found.shape == whole[rows].shape
                assert found.tobytes() == whole[rows].tobytes(), (layer, block, rows)
            assert array.read_chunk(layer, block).tobytes() == whole.tobytes()


@pytest.mark.few(2)
@pytest.mark.parametrize("compressed", [True, False], ids=["compressed", "raw"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "width", "rows"), SHAPES)
def test_rows_are_those_of_numpy(tmp_path: Path, dtype: str, width: int, rows: int, kind: str, compressed: bool) -> None:
    values = values_of(kind, (2, rows, width), dtype)
    with small_chunks(500_000, 1_100_000, least=300_000):
        for shards in (False, True):
            part = write_values(LocalStorage(tmp_path / f"{shards}"), values, compressed=compressed, shards=shards)
            array = part.array("tokens", "resid")
            assert (array.where.block_nbytes >= 65536) == (array.info.rows_per_chunk > 1), "of one row nobody reads a part"
            assert array.info.n_blocks > 1
            assert (array.info.shard_blocks > 1) == shards or array.info.chunk_nbytes * 2 > 1_100_000
            check_reads(array, values)


@pytest.mark.few(2)
@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("compressed", [True, False], ids=["compressed", "raw"])
@pytest.mark.parametrize("place", ["local", "memory", "slow"])
def test_rows_are_those_of_numpy_wherever_they_lie(tmp_path: Path, place: str, compressed: bool, shards: bool) -> None:
    for dtype, width, rows, kind in (("float16", 3000, 150, "normal"), ("float32", 70_000, 5, "bytes"), ("int64", 9, 12_001, "constant")):
        values = values_of(kind, (2, rows, width), dtype)
        with small_chunks(400_000, 900_000):
            part = write_values(place_of(place, tmp_path / dtype), values, compressed=compressed, shards=shards, pieces=3)
            check_reads(part.array("tokens", "resid"), values, seed=5)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_rows_of_any_shape(tmp_path: Path, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(["float16", "float32", "float64", "int8", "int16", "int64", "bool"]))
    itemsize = np.dtype(dtype).itemsize
    width = data.draw(st.integers(1, 400_000 // itemsize))
    rows = data.draw(st.integers(1, max(1, 900_000 // (width * itemsize))))
    values = values_of(data.draw(st.sampled_from(KINDS)), (1, rows, width), dtype if dtype != "bool" else "uint8").astype(dtype)
    with small_chunks(data.draw(st.sampled_from([140_000, 300_000, 700_000]))):
        part = write_values(
            LocalStorage(tmp_path / uuid.uuid4().hex), values, compressed=data.draw(st.booleans()), shards=data.draw(st.booleans())
        )
    array = part.array("tokens", "resid")
    for _ in range(4):
        block = data.draw(st.integers(0, array.info.n_blocks - 1))
        whole = chunk_of(values, array, 0, block)
        picked = data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=5))
        chosen = np.array(picked, np.int64)
        assert array.read_rows(0, block, chosen).tobytes() == whole[chosen].tobytes()
        start, stop = sorted((data.draw(st.integers(0, len(whole))), data.draw(st.integers(0, len(whole)))))
        assert array.read_rows(0, block, slice(start, stop)).tobytes() == whole[start:stop].tobytes()


# ------------------------------------------------------------------------------------------------------------- what is read


def blocks_in(frame: bytes, raw: bool, block_nbytes: int) -> list[tuple[int, int]]:
    """Where the blocks of a chunk lie in it, from its own header."""
    body = len(frame) - 4
    if raw:
        return [(a, min(a + block_nbytes, body)) for a in range(0, body, block_nbytes)]
    flags, decoded, block = frame[2], *struct.unpack_from("<2I", frame, 4)
    if flags & 2:
        return [(a, min(a + block_nbytes, body)) for a in range(16, body, block_nbytes)]
    assert block == block_nbytes
    starts = struct.unpack_from(f"<{-(-decoded // block)}i", frame, 16)
    assert list(starts) == sorted(starts), "in their order"
    return list(zip(starts, (*starts[1:], body), strict=True))


@pytest.mark.few(2)
@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize(("kind", "compressed"), [("normal", True), ("bytes", True), ("normal", False)])
def test_a_few_rows_cost_their_blocks_and_no_more(tmp_path: Path, kind: str, compressed: bool, shards: bool) -> None:
    values = values_of(kind, (2, 160, 8192), "float16")  # 16 KiB a row, 4 rows a block, 16 blocks a chunk
    counted = Counted(LocalStorage(tmp_path / "s"))
    with small_chunks(2**20, 2**21):
        array = write_values(counted, values, compressed=compressed, shards=shards).array("tokens", "resid")
    assert (array.info.rows_per_chunk, array.info.n_blocks, array.where.block_nbytes) == (64, 3, 65536)
    assert array.info.shard_blocks == (2 if shards else 0)
    array.read_rows(0, 0, slice(0, 1))  # the table is read now, where it is a file
    for layer, block in ((0, 0), (1, 1), (1, 2)):
        file = f"{array.path}/c.{layer}.{block // 2 if shards else block}.0"
        data = counted.inner.read(file)
        start = len(data)
        lengths = []
        if shards:  # places of the chunks by the index of Zarr, which we do not read
            index = np.frombuffer(data[-36:-4], "<u8").reshape(2, 2)
            start, length = index[block % 2].tolist()
            lengths = [length]
        chunk = data[start : start + lengths[0]] if shards else data
        start = start if shards else 0
        bounds = blocks_in(chunk, not compressed, 65536)
        assert len(bounds) == 16
        for rows, wanted in ((slice(9, 11), [2]), (slice(7, 9), [1, 2]), (np.array([50, 1, 2, 51, 50]), [0, 12]), (slice(63, 64), [15])):
            counted.read_of.clear()
            found = array.read_rows(layer, block, rows)
            np.testing.assert_array_equal(found, chunk_of(values, array, layer, block)[rows])
            expected = {(a + start, b + start) for a, b in (bounds[i] for i in wanted)}
            covered = {(a, b) for key, a, b in counted.read_of if key == file}
            assert {key for key, _, _ in counted.read_of} == {file}
            assert sum(b - a for a, b in covered) == sum(b - a for a, b in expected), (rows, covered, expected)
            assert {i for a, b in covered for i in range(a, b)} == {i for a, b in expected for i in range(a, b)}
            assert len(counted.read_of) == (1 if np.ptp(wanted) < 2 else 2), "neighbours are one range"


@pytest.mark.few(1)
@pytest.mark.parametrize("compressed", [True, False])
def test_a_whole_layer_never_reads_the_block_table(tmp_path: Path, compressed: bool) -> None:
    values = values_of("normal", (2, 1024, 4096), "float16")
    counted = Counted(LocalStorage(tmp_path / "s"))
    with small_chunks(2**20, 2**23):
        part = write_values(counted, values, compressed=compressed, shards=True, prompts=64)
    assert "tokens/resid/block_table" in part.info.files, "it is a file, so that reading it would be seen"
    counted.read_of.clear()
    store = Store(counted, durable=False)
    read = store.tokens(dtype="stored").resid.isel(layer=1).values
    np.testing.assert_array_equal(read, values[1])
    assert not counted.of("block_table")
    chunks = {key for key, _, _ in counted.of("c.") if key.startswith(f"{part.path}/tokens/resid/")}
    assert chunks == {f"{part.path}/tokens/resid/c.1.{i}.0" for i in range(len(chunks))}
    counted.read_of.clear()
    some = store.tokens(dtype="stored").resid.isel(layer=0, token=[3]).values
    np.testing.assert_array_equal(some, values[0, [3]])
    assert [key.rpartition("/")[2] for key, _, _ in counted.of("block_table")] == ["block_table"]
    assert sum(b - a for _, a, b in counted.of("c.0.0.0")) < 2 * 65536


def test_the_second_touch_of_a_chunk_of_a_slow_place_brings_all_of_it() -> None:
    values = values_of("normal", (1, 256, 4096), "float16")
    for compressed in (True, False):
        counted = Counted(open_storage(f"memory://{uuid.uuid4().hex}"), slow=True)
        with small_chunks(2**20):
            array = write_values(counted, values, compressed=compressed).array("tokens", "resid")
        counted.read_of.clear()
        costs = []
        for rows in (slice(0, 1), slice(100, 101), np.array([5, 120]), slice(17, 30)):
            counted.read_of.clear()
            np.testing.assert_array_equal(array.read_rows(0, 1, rows), values[0, 128:][rows])
            costs.append(sum(b - a for _, a, b in counted.of("c.")))
        chunk = len(counted.inner.read(f"{array.path}/c.0.1.0"))
        assert costs[0] <= 65536 + 16
        assert costs[1:] == [chunk, 0, 0]
        counted.read_of.clear()
        np.testing.assert_array_equal(array.read_rows(0, 0, slice(3, 4)), values[0, 3:4])
        assert sum(b - a for _, a, b in counted.of("c.")) <= 65536 + 16, "another chunk is another matter"


# ------------------------------------------------------------------------------------------------------------ and otherwise


@pytest.mark.few(1)
@pytest.mark.parametrize("shards", [False, True])
def test_a_pickled_array_reads_the_same(tmp_path: Path, shards: bool) -> None:
    values = values_of("normal", (2, 400, 3000), "float16")
    with small_chunks(300_000, 700_000):
        part = write_values(LocalStorage(tmp_path / "s"), values, shards=shards)
    array = part.array("tokens", "resid")
    data = pickle.dumps(array)
    again = pickle.loads(data)  # noqa: S301 — our own
    assert set(again.files) <= {"tokens/resid/chunk_table", "tokens/resid/block_table"}, "only its own files"
    check_reads(again, values)
    assert len(data) < 20_000


def test_threads_that_read_the_same_chunks_do_not_disturb_each_other(tmp_path: Path) -> None:
    values = values_of("normal", (2, 600, 3000), "float16")
    for place in ("local", "slow"):
        with small_chunks(700_000, 1_500_000):
            array = write_values(place_of(place, tmp_path), values, shards=True).array("tokens", "resid")
        wrong: list[Any] = []

        def read(seed: int, array: StoredArray = array, wrong: list[Any] = wrong) -> None:
            rng = np.random.default_rng(seed)
            for _ in range(60):
                layer, block = int(rng.integers(2)), int(rng.integers(array.info.n_blocks))
                whole = chunk_of(values, array, layer, block)
                rows: Any = rng.integers(0, len(whole), 4)
                rows = slice(int(rows[0]), int(rows[0]) + 7) if rows[1] % 2 and rows[0] + 7 <= len(whole) else rows
                try:
                    found = array.read_rows(layer, block, rows).copy()
                except Exception as error:  # noqa: BLE001
                    wrong.append(error)
                    return
                if found.tobytes() != whole[rows].tobytes():
                    wrong.append((layer, block, rows))

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("shards", [False, True])
def test_answers_that_end_early_are_an_error(tmp_path: Path, compressed: bool, shards: bool) -> None:
    values = values_of("normal", (1, 400, 3000), "float16")
    with small_chunks(300_000, 700_000):
        part = write_values(LocalStorage(tmp_path / "s"), values, compressed=compressed, shards=shards)
    cut = Part(Short(part.storage), part.path, part.info).array("tokens", "resid")
    if shards:  # chunks in a shard come by ranges too, so there is no other way to them
        for rows in (slice(0, 1), np.array([3, 7])):
            with pytest.raises(CorruptPartError, match=r"c\.0\.1\.0 of 'resid' ends in block"):
                cut.read_rows(0, 1, rows)
        with pytest.raises(CorruptPartError, match=r"c\.0\.1\.0 of 'resid'"):
            cut.read_chunk(0, 1)
    else:
        np.testing.assert_array_equal(cut.read_rows(0, 1, slice(0, 1)), chunk_of(values, cut, 0, 1)[:1], "from the whole file")
        np.testing.assert_array_equal(cut.read_chunk(0, 1), chunk_of(values, cut, 0, 1))


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("shards", [False, True])
def test_a_file_that_was_cut_reads_as_far_as_its_blocks_go(tmp_path: Path, compressed: bool, shards: bool) -> None:
    values = values_of("normal", (1, 256, 4096), "float16")  # 8 rows a block
    with small_chunks(2**20, 2**21):
        part = write_values(LocalStorage(tmp_path / "s"), values, compressed=compressed, shards=shards)
    array = part.array("tokens", "resid")
    file = tmp_path / "s" / array.path / "c.0.0.0"
    data = file.read_bytes()
    file.write_bytes(data[:300_000])
    np.testing.assert_array_equal(array.read_rows(0, 0, slice(0, 8)), values[0, :8])
    for rows in (slice(120, 128), slice(0, 128), np.array([0, 127])):
        with pytest.raises(CorruptPartError, match=r"c\.0\.0\.0 of 'resid'"):
            array.read_rows(0, 0, rows)
    with pytest.raises(CorruptPartError):
        array.read_chunk(0, 0)
    file.unlink()
    with pytest.raises(CorruptPartError, match="is missing"):
        array.read_rows(0, 0, slice(0, 1))
