"""Tables of chunks and blocks: what a writer chooses, a reader accepts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stores import make_batch

import lmprobe_zarr as lz
from lmprobe_zarr.store.format.array import ArrayInfo
from lmprobe_zarr.store.format.group import GroupInfo
from lmprobe_zarr.store.format.tables import ArrayTables, block_nbytes_of, chunk_table_nbytes, parse_tables, tables_document


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
