"""`empty_aligned`: large arrays begin at a page, whatever their shape and dtype, and are ordinary arrays otherwise."""

from __future__ import annotations

import mmap
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmprobe_zarr.storage import LocalStorage, empty_aligned


def address(array: np.ndarray[Any, Any]) -> int:
    return int(array.__array_interface__["data"][0])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8", "int64", "bool", "M8[ns]"])
@pytest.mark.parametrize("shape", [(2**16,), (1, 512, 256), (3, 700, 111), (300_001,)])
def test_large_arrays_begin_at_a_page(shape: tuple[int, ...], dtype: str) -> None:
    held = [empty_aligned(shape, np.dtype(dtype)) for _ in range(3)]
    for array in held:
        assert address(array) % mmap.PAGESIZE == 0
        assert (array.shape, array.dtype) == (shape, np.dtype(dtype))
        assert array.flags.c_contiguous
        assert array.flags.writeable
    held[0][:] = 1
    held[1][:] = 0
    assert (held[0] == np.ones((), dtype)).all(), "each has memory of its own"


@pytest.mark.parametrize(("shape", "dtype"), [((), "f4"), ((0,), "f2"), ((0, 2048), "f2"), ((3, 4), "i4"), ((70_000,), "O")])
def test_small_arrays_and_objects_are_plain(shape: tuple[int, ...], dtype: str) -> None:
    array = empty_aligned(shape, np.dtype(dtype))
    assert (array.shape, array.dtype, array.base) == (shape, np.dtype(dtype), None)


@pytest.mark.parametrize("nbytes", [0, 1, 100, 2**16, 2**21 + 20])
def test_files_are_read_to_a_page_and_whole(tmp_path: Path, nbytes: int) -> None:
    storage = LocalStorage(tmp_path)
    data = np.random.default_rng(nbytes).bytes(nbytes)
    storage.write("large", bytes(2**22), durable=False)
    storage.write("file", data, durable=False)
    for key in ("file", "large", "file"):
        view = storage.read_view(key)
        assert bytes(view) == (data if key == "file" else bytes(2**22))
        if len(view) >= 2**16:
            assert address(np.frombuffer(view, np.uint8)) % mmap.PAGESIZE == 0


def test_what_a_long_file_takes_is_given_back(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    for key, nbytes in (("chunk", 2**21), ("shard", 2**26)):
        storage.write(key, bytes(nbytes), durable=False)
    tracemalloc.start()
    try:
        assert len(storage.read_view("chunk")) == 2**21
        assert tracemalloc.get_traced_memory()[0] > 2**21, "kept for the next chunk"
        assert not any(storage.read_view("shard")[:: 2**16])
        assert tracemalloc.get_traced_memory()[1] > 2**26
        assert tracemalloc.get_traced_memory()[0] < 2**22
        assert len(storage.read_view("chunk")) == 2**21
    finally:
        tracemalloc.stop()
