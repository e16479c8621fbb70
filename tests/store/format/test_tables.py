"""Tables of chunks and blocks: written and read back, against blosc's own headers, numpy's sums, and the shards that zarr writes."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import google_crc32c
import numpy as np
import numpy.typing as npt
import pytest
import zarr
from block_stores import small_chunks, values_of, write_values
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs import blosc
from stores import make_batch
from zarr.codecs import Crc32cCodec

import lmprobe_zarr as lz
from lmprobe_zarr.storage.local import LocalStorage
from lmprobe_zarr.store.format.array import ArrayInfo
from lmprobe_zarr.store.format.blosc_frame import header_of, in_order
from lmprobe_zarr.store.format.chunk import encode_body
from lmprobe_zarr.store.format.group import GroupInfo
from lmprobe_zarr.store.format.tables import (
    ArrayTables,
    BlockTable,
    ChunkTable,
    block_nbytes_of,
    block_record,
    block_table_nbytes,
    chunk_table_nbytes,
    parse_tables,
    shard_index,
    tables_document,
)

HEADER: Final = struct.Struct("<4B3I")
DTYPES: Final = ["float16", "float32", "float64", "int8", "int16", "int32", "int64", "bool"]


def info_of(
    width: int, rows: int, dtype: str = "float16", *, total: int = 0, layers: int = 1, shard: int = 0, shuffle: Any = "bitshuffle"
) -> ArrayInfo:
    return ArrayInfo(
        dims=("layer", "token", "hidden"), shape=(layers, total or rows, width), chunks=(1, rows, width), dtype=dtype, shuffle=shuffle,
        shard_blocks=shard,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------ blocks


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_blosc_makes_the_blocks_that_we_say_it_makes(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    itemsize = np.dtype(dtype).itemsize
    width = data.draw(st.one_of(st.integers(1, 300_000 // itemsize), st.sampled_from([1, 77, 768, 3000, 4096, 8192, 12288])))
    rows = data.draw(st.integers(1, max(1, 1_500_000 // (width * itemsize))))
    info = info_of(width, rows, dtype, shuffle=data.draw(st.sampled_from(["shuffle", "bitshuffle", "noshuffle"])))
    block = block_nbytes_of(info)
    row = width * itemsize
    if rows * row <= 2**17:
        assert block == 0
        return
    assert block == 0 or 2**16 <= block < rows * row
    assert block <= 2**18
    if row <= 2**18 and block:
        assert block % row == 0, "whole rows"
        assert block - row < 2**16, "and no more of them than are needed"
    if not block:
        assert rows == 1, "a chunk that is one block"
        return
    kind = data.draw(st.sampled_from(["normal", "constant", "bytes"]))
    values = values_of(kind, (1, rows, width), dtype if dtype != "bool" else "uint8").astype(dtype)
    body = encode_body(values, info, block)
    frame = bytes(body)
    *_, flags, typesize, decoded, made, encoded = HEADER.unpack_from(frame)
    assert (decoded, encoded, typesize) == (values.nbytes, len(frame), itemsize)
    n = -(-values.nbytes // block)
    record = block_record(frame, info, block)
    assert record is not None, (dtype, width, rows, made, block)
    if not flags & 2:
        assert made == block
        starts = struct.unpack_from(f"<{n}i", frame, 16)
        assert list(starts) == sorted(starts)
        assert starts[0] == 16 + 4 * n
        bounds = [*starts, len(frame)]
    else:
        bounds = [*range(16, len(frame), block), len(frame)]
    assert record.tolist()[:2] == [len(frame) + 4, int.from_bytes(frame[:4], "little")]
    assert record.tolist()[2::2] == [b - a for a, b in pairwise(bounds)]
    assert record.tolist()[3::2] == [google_crc32c.value(frame[a:b]) for a, b in pairwise(bounds)]


@pytest.mark.parametrize(("kind", "shuffle"), [("normal", None), ("normal", "bitshuffle"), ("constant", "shuffle"), ("bytes", "shuffle")])
def test_each_block_is_decoded_alone_and_with_others(kind: str, shuffle: str | None) -> None:
    for dtype, width, rows in (
        ("float16", 4096, 64),
        ("float32", 77, 1500),
        ("float32", 70_000, 3),
        ("int64", 9, 10_001),
        ("int8", 1, 300_001),
    ):
        info = info_of(width, rows, dtype, shuffle=shuffle)
        block = block_nbytes_of(info)
        values = values_of(kind, (1, rows, width), dtype)
        body = encode_body(values, info, block)
        record, whole, frame = block_record(body, info, block), values.tobytes(), bytes(body)
        assert record is not None
        n = -(-len(whole) // block)
        lengths = record[2::2].tolist()
        is_copied = shuffle is not None and record[1] >> 16 & 2
        start = 0 if shuffle is None else 16 if is_copied else 16 + 4 * n
        places = np.concatenate([[start], start + np.cumsum(lengths)]).tolist()
        assert places[-1] == len(frame)
        blocks = [frame[a:b] for a, b in pairwise(places)]
        if shuffle is None or is_copied:
            assert b"".join(blocks) == whole
            continue
        for some in ([0], [n - 1], [0, n - 1], [n - 2, n - 1], list(range(n))):
            expected = b"".join(whole[i * block : (i + 1) * block] for i in some)
            room = np.full(len(whole), 0xAB, np.uint8)
            header = header_of(int(record[1]), [lengths[i] for i in some], block, len(expected))
            blosc.decompress(header + b"".join(blocks[i] for i in some), room[: len(expected)])
            assert room[: len(expected)].tobytes() == expected, (dtype, some)
            assert (room[len(expected) :] == 0xAB).all(), "nothing was written behind it"


@pytest.mark.parametrize("threads", [2, 4, 8])
def test_frames_of_several_threads_are_put_in_order_and_decode_to_the_same(threads: int) -> None:
    values = values_of("normal", (400, 4096), "float16")
    before = blosc.set_nthreads(threads)
    try:
        frames = [bytes(blosc.compress(values, b"lz4", 5, blosc.BITSHUFFLE, 32768, 2)) for _ in range(8)]
    finally:
        blosc.set_nthreads(before)
    for frame in frames:
        sorted_frame = in_order(frame)
        starts = struct.unpack_from(f"<{values.nbytes // 65536}i", sorted_frame, 16)
        assert list(starts) == sorted(starts)
        assert len(sorted_frame) == len(frame)
        assert sorted_frame[:16] == frame[:16]
        assert blosc.decompress(sorted_frame) == values.tobytes()


@given(st.integers(0, 2**32), st.sampled_from([3, 7, 20]))
@settings(max_examples=20)
def test_blocks_in_any_order_are_put_in_theirs(seed: int, n: int) -> None:
    """As threads leave them now and then; here by hand, so that it is every time."""
    values = values_of("normal", (n * 65536 // 2 - 1000,), "float16", seed)
    frame = bytes(blosc.compress(values, b"lz4", 5, blosc.BITSHUFFLE, 32768, 2))
    assert not frame[2] & 2
    bounds = [*struct.unpack_from(f"<{n}i", frame, 16), len(frame)]
    blocks = [frame[a:b] for a, b in pairwise(bounds)]
    order = np.random.default_rng(seed).permutation(n)
    places = np.zeros(n, "<i4")
    at, body = bounds[0], b""
    for i in order:
        places[i] = at
        at, body = at + len(blocks[i]), body + blocks[i]
    mixed = frame[:16] + places.tobytes() + body
    assert blosc.decompress(mixed) == values.tobytes(), "blosc takes it as it is"
    assert in_order(mixed) == frame
    assert in_order(frame) == frame
    info = info_of(1, len(values), shuffle="bitshuffle")
    assert (block_record(mixed, info, 65536) is None) == (list(order) != sorted(order)), "such a frame has no record of its blocks"


def test_a_frame_with_other_blocks_has_no_record() -> None:
    values = values_of("normal", (400, 4096), "float16")
    info = info_of(4096, 400)
    for block in (2**17, 2**18):
        frame = bytes(blosc.compress(values, b"lz4", 5, blosc.BITSHUFFLE, block // 2, 2))
        assert block_record(frame, info, 65536) is None
        assert block_record(frame, info, block) is not None


# ------------------------------------------------------------------------------------------------------------------ places


@given(st.integers(1, 4), st.integers(1, 30), st.integers(0, 31), st.integers(0, 2**32))
def test_places_are_the_sums_of_the_lengths_before(layers: int, blocks: int, shard: int, seed: int) -> None:
    shard = shard if 2 <= shard <= blocks else 0
    info = info_of(500, 200, "float32", total=200 * blocks - 3, layers=layers, shard=shard)
    rng = np.random.default_rng(seed)
    lengths, checksums = rng.integers(4, 2**32, (2, layers, blocks)).astype("<u4")
    table = ChunkTable(np.stack([lengths, checksums], axis=-1).tobytes(), info)
    n = -(-info.chunk_nbytes // 65536)
    words = rng.integers(0, 2**32, (layers, blocks, 2 + 2 * n)).astype("<u4")
    words[..., 0] = lengths
    by_block = BlockTable(words.tobytes(), info, 65536)
    assert (table.words.nbytes, by_block.words.nbytes) == (chunk_table_nbytes(info), block_table_nbytes(info, 65536))
    each = shard or 1
    sizes = {}
    for layer in range(layers):
        for block in range(blocks):
            first = block // each * each
            place = sum(int(x) for x in lengths[layer, first:block])
            assert table.place(layer, block) == by_block.place(layer, block) == place
            assert table.entry(layer, block) == (lengths[layer, block], checksums[layer, block])
            np.testing.assert_array_equal(by_block.record(layer, block), words[layer, block])
        for file in range(-(-blocks // each)):
            inside = sum(int(x) for x in lengths[layer, file * each : (file + 1) * each])
            sizes[f"c.{layer}.{file}.0"] = inside + (16 * shard + 4 if shard else 0)
    assert table.file_sizes() == sizes
    assert sorted(info.file_names()) == sorted(sizes)


# ---------------------------------------------------------------------------------------------------------------- document


@pytest.mark.parametrize("shard", [0, 3])
@pytest.mark.parametrize("as_files", [(False, False), (True, False), (False, True), (True, True)])
def test_tables_read_back_as_what_was_written(as_files: tuple[bool, bool], shard: int) -> None:
    arrays = {"tokens/resid": info_of(4096, 40, total=120, layers=2, shard=shard), "prompts/resid_mean": info_of(8, 5)}
    rng = np.random.default_rng(0)
    chunks = rng.bytes(chunk_table_nbytes(arrays["tokens/resid"]))
    blocks = rng.bytes(block_table_nbytes(arrays["tokens/resid"], 65536))
    tables = {
        "tokens/resid": ArrayTables(
            nbytes=123, chunks=None if as_files[0] else chunks, block_nbytes=65536, blocks=None if as_files[1] else blocks
        ),
        "prompts/resid_mean": ArrayTables(nbytes=7, chunks=rng.bytes(8)),
    }
    document = json.loads(json.dumps(tables_document(tables)))
    assert parse_tables(document, arrays) == tables
    assert document["prompts/resid_mean"].keys() == {"nbytes", "chunk_table", "block_nbytes"}
    assert isinstance(document["tokens/resid"]["chunk_table"], str) != as_files[0]


def changed(**fields: Any) -> dict[str, Any]:
    info = info_of(4096, 40, total=120, layers=2)
    tables = ArrayTables(
        nbytes=5, chunks=bytes(chunk_table_nbytes(info)), block_nbytes=65536, blocks=bytes(block_table_nbytes(info, 65536))
    )
    document: dict[str, Any] = tables_document({"tokens/resid": tables})
    document["tokens/resid"] |= fields
    return document


@pytest.mark.parametrize(
    "document",
    [
        [],
        None,
        {"tokens/other": {}},
        {"tokens/resid": None},
        {"tokens/resid": {}},
        changed(nbytes=-1),
        changed(nbytes=2**53),
        changed(nbytes=1.0),
        changed(nbytes=True),
        changed(nbytes="5"),
        changed(block_nbytes=1),
        changed(block_nbytes=-65536),
        changed(block_nbytes=65535),
        changed(block_nbytes=2**40),
        changed(block_nbytes=4096 * 40 * 2),
        changed(block_nbytes=65536.0),
        changed(block_nbytes=True),
        changed(block_nbytes=None),
        changed(chunk_table=""),
        changed(chunk_table="AAAA"),
        changed(chunk_table="é"),
        changed(chunk_table="*" * 64),
        changed(chunk_table="A" * 65),
        changed(chunk_table=[1, 2]),
        changed(chunk_table=5),
        changed(block_table="AAAA"),
        changed(block_table={}),
    ],
    ids=lambda each: repr(each)[:60],
)
def test_false_tables_are_refused(document: Any) -> None:
    info = info_of(4096, 40, total=120, layers=2)
    assert parse_tables(changed(), {"tokens/resid": info})
    with pytest.raises((ValueError, KeyError, TypeError, AttributeError)):
        parse_tables(document, {"tokens/resid": info})


def test_arrays_that_cannot_have_tables_or_need_them_are_refused() -> None:
    info = info_of(4096, 40, total=120, layers=2)
    texts = ArrayInfo(dims=("prompt",), shape=(3,), chunks=(3,), dtype="string", shuffle="noshuffle")
    with pytest.raises(ValueError, match="chunk table"):
        parse_tables(changed(), {"tokens/resid": texts})
    with pytest.raises(ValueError, match="chunk table"):
        parse_tables(changed(chunk_table=None, block_table=None), {"tokens/resid": replace(info, shape=(2, 40 * 2**20, 4096))})
    with pytest.raises(ValueError, match="has shards and no table"):
        parse_tables({}, {"tokens/resid": replace(info, shard_blocks=3)})
    assert parse_tables({}, {"tokens/resid": info}) == {}


# ------------------------------------------------------------------------------------------------------------------ shards


def ours(folder: Path, values: npt.NDArray[Any], *, compressed: bool) -> tuple[Path, ArrayInfo]:
    with small_chunks(100_000, 320_000):
        part = write_values(LocalStorage(folder), values, compressed=compressed, shards=True)
    array = part.array("tokens", "resid")
    return folder / array.path, array.info


@pytest.mark.parametrize(("rows", "width"), [(330, 512), (97, 1000), (401, 300)])
def test_a_shard_is_byte_for_byte_what_zarr_writes_for_the_same_chunks(tmp_path: Path, rows: int, width: int) -> None:
    values = values_of("normal", (2, rows, width), "float32")
    path, info = ours(tmp_path / "s", values, compressed=False)
    assert info.shard_blocks >= 2
    theirs = zarr.create_array(
        tmp_path / "z", shape=values.shape, dtype="float32", chunks=info.chunks,
        shards=(1, info.rows_per_chunk * info.shard_blocks, width), compressors=[Crc32cCodec()],
        chunk_key_encoding={"name": "default", "separator": "."}, fill_value=np.nan,
    )  # fmt: skip
    theirs[:] = values
    files = sorted(info.file_names())
    assert files == sorted(each.name for each in (tmp_path / "z").iterdir() if each.name.startswith("c"))
    for file in files:
        assert (path / file).read_bytes() == (tmp_path / "z" / file).read_bytes(), file


@pytest.mark.parametrize("kind", ["normal", "constant", "bytes"])
def test_zarr_reads_our_shards_by_their_index(tmp_path: Path, kind: str) -> None:
    values = values_of(kind, (2, 1700, 512), "float16")
    path, info = ours(tmp_path / "s", values, compressed=True)
    assert info.n_files > 1
    np.testing.assert_array_equal(zarr.open_array(str(path), mode="r")[:], values)


@given(st.lists(st.integers(4, 2**31), min_size=1, max_size=8), st.integers(0, 4))
def test_the_index_of_a_shard_is_that_of_the_specification(lengths: Sequence[int], more: int) -> None:
    index = shard_index(lengths, len(lengths) + more)
    entries = np.frombuffer(index[:-4], "<u8").reshape(-1, 2)
    ends = np.cumsum(np.array(lengths, np.uint64))
    np.testing.assert_array_equal(entries[: len(lengths), 1], lengths)
    np.testing.assert_array_equal(entries[: len(lengths), 0], ends - np.array(lengths, np.uint64))
    assert (entries[len(lengths) :] == 2**64 - 1).all()
    assert len(entries) == len(lengths) + more
    assert int.from_bytes(index[-4:], "little") == google_crc32c.value(index[:-4])


# ------------------------------------------------------------------------------------------------------------------ widths


@given(rows=st.integers(1, 40), width=st.integers(1, 150_000), dtype=st.sampled_from(["float16", "float32", "float64"]))
def test_blocks_are_smaller_than_their_chunk_and_whole_rows_where_that_is_possible(rows: int, width: int, dtype: str) -> None:
    info = ArrayInfo(dims=("prompt", "vocab"), shape=(rows, width), chunks=(rows, width), dtype=dtype, shuffle="shuffle")
    size, row = block_nbytes_of(info), width * np.dtype(dtype).itemsize
    # Of one row nobody reads a part, and of 128 KiB half costs as much as all.
    assert (size == 0) == (rows == 1 or rows * row <= 2**17)
    if size:
        assert 2**16 <= size < rows * row
        least = next(n for n in range(1, 2**16 + 1) if n * row >= 2**16) * row
        assert size == (least if least <= 2**18 else 2**16)
    tables = {"prompts/x": ArrayTables(nbytes=9, chunks=bytes(chunk_table_nbytes(info)), block_nbytes=size)}
    assert parse_tables(tables_document(tables), {"prompts/x": info}) == tables


@pytest.mark.few(3)
@pytest.mark.parametrize("width", [32_768, 32_769, 50_257, 65_536, 65_537])
@pytest.mark.parametrize("rows", [1, 2, 12])
def test_rows_as_wide_as_a_vocabulary_are_stored(tmp_path: Path, rows: int, width: int) -> None:
    prompts = [f"p{i}" for i in range(rows)]
    batch = make_batch(prompts, layers=(0,), hidden=width, tokens=False, seed=width)
    for compressed in (True, False):
        store = lz.open_store(tmp_path / f"{compressed}", durable=False)
        store.write(GroupInfo(model="acme/wide"), batch, compressed=compressed)
        np.testing.assert_array_equal(store.dataset().resid_mean.values, batch.prompts["resid_mean"])
        np.testing.assert_array_equal(store.dataset(prompts=prompts[-1:]).resid_mean.values, batch.prompts["resid_mean"][:, -1:])
