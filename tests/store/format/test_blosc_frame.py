"""Part of what blosc compressed, against the same part of all of it, however it was compressed."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numcodecs import blosc

from lmprobe_zarr.store.format.blosc_frame import check_frame, decode_range

HEADER = struct.Struct("<4B3I")


def compressed(values: np.ndarray, *, cname: bytes = b"lz4", shuffle: int = blosc.BITSHUFFLE, block: int = 0, threads: int = 1) -> bytes:
    before = blosc.set_nthreads(threads)
    try:
        return bytes(blosc.compress(values, cname, 5, shuffle, block, values.dtype.itemsize))
    finally:
        blosc.set_nthreads(before)


def part_of(frame: bytes, start: int, stop: int, size: int) -> bytes:
    room = np.full(size, 0xAB, np.uint8)
    check_frame(memoryview(frame), exactly=size)
    return bytes(decode_range(memoryview(frame), start, stop, room.data))


@given(
    dtype=st.sampled_from(["float16", "uint16", "float32", "int64", "uint8", "bool"]),
    rows=st.integers(1, 40_000),
    shuffle=st.sampled_from([blosc.NOSHUFFLE, blosc.SHUFFLE, blosc.BITSHUFFLE]),
    cname=st.sampled_from([b"lz4", b"zstd", b"blosclz"]),
    block=st.sampled_from([0, 0, 256, 4096, 65536]),
    threads=st.sampled_from([1, 2, 4]),
    kind=st.sampled_from(["random", "rounded", "constant"]),
    data=st.data(),
)
def test_a_range_is_what_it_is_of_the_whole(
    dtype: str, rows: int, shuffle: int, cname: bytes, block: int, threads: int, kind: str, data: st.DataObject
) -> None:
    rng = np.random.default_rng(rows)
    values = {"random": rng.standard_normal(rows) * 100, "rounded": rng.integers(0, 9, rows), "constant": np.full(rows, 3)}[kind].astype(
        dtype
    )
    frame = compressed(values, cname=cname, shuffle=shuffle, block=block, threads=threads)
    whole = values.tobytes()
    start = data.draw(st.integers(0, len(whole) - 1))
    stop = data.draw(st.integers(start + 1, len(whole)))
    for begin, end in ((start, stop), (0, 1), (len(whole) - 1, len(whole)), (0, len(whole))):
        assert part_of(frame, begin, end, len(whole)) == whole[begin:end]


def test_blocks_that_threads_finished_in_another_order_are_found() -> None:
    """As two threads write them now and then; here by hand, so that it is every time."""
    values = np.random.default_rng(0).standard_normal(2**18).astype("float16")
    frame = compressed(values)
    *head, block, size = HEADER.unpack_from(frame)
    n = -(-values.nbytes // block)
    assert n == 2
    first, second = np.frombuffer(frame, "<i4", n, 16).tolist()
    blocks = frame[first:second], frame[second:]
    exchanged = HEADER.pack(*head, block, size) + struct.pack("<2i", first + len(blocks[1]), first) + blocks[1] + blocks[0]
    np.testing.assert_array_equal(np.frombuffer(blosc.decompress(exchanged), "float16"), values)
    assert part_of(exchanged, 10, 20, values.nbytes) == values.tobytes()[10:20]
    assert part_of(exchanged, block + 10, block + 20, values.nbytes) == values.tobytes()[block + 10 : block + 20]


def test_only_the_blocks_of_the_range_are_decoded() -> None:
    """Damage in a block that is not read stays unnoticed here, so the chunk's checksum is compared first, see `StoredArray.read_rows`."""
    values = np.random.default_rng(0).standard_normal(2**20).astype("float16")
    frame = bytearray(compressed(values))
    frame[-20_000:] = bytes(20_000)
    assert part_of(bytes(frame), 10, 20, values.nbytes) == values.tobytes()[10:20]
    with pytest.raises((ValueError, RuntimeError)):
        part_of(bytes(frame), values.nbytes - 10, values.nbytes, values.nbytes)


@pytest.mark.parametrize(
    ("place", "value"),
    [(8, 0), (8, 1), (8, 7), (8, 2**31), (16, 0), (16, 2**31 - 1), (16, 0xFFFFFFFF), (20, 16), (20, 2**31 - 1)],
    ids=["no block size", "blocks of 1", "blocks of 7", "a block of 2 GiB", "in the header", "far behind", "before", "within", "behind"],
)
def test_a_changed_header_raises_an_error_or_decodes_correctly(place: int, value: int) -> None:
    values = np.random.default_rng(0).standard_normal(2**19).astype("float16")
    frame = bytearray(compressed(values))
    frame[place : place + 4] = value.to_bytes(4, "little")
    for start, stop in ((0, 10), (values.nbytes // 2, values.nbytes)):
        try:
            found = part_of(bytes(frame), start, stop, values.nbytes)
        except (ValueError, RuntimeError):
            continue
        assert len(found) == stop - start


@given(place=st.integers(0, 63), value=st.integers(0, 255), start=st.integers(0, 2**20 - 1), length=st.integers(1, 2**19))
def test_any_byte_of_the_header_may_be_another(place: int, value: int, start: int, length: int) -> None:
    frame = bytearray(FRAME)
    frame[place] = value
    stop = min(start + length, 2**20)
    try:
        found = part_of(bytes(frame), start, stop, 2**20)
    except (ValueError, RuntimeError):
        return
    assert len(found) == stop - start


FRAME = compressed(np.random.default_rng(0).integers(0, 2**10, 2**19).astype("uint16"))
