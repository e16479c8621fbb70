"""A published copy of format 2 on web servers: with ranges a few rows cost their blocks, without them everything is still right."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from web_server import HONEST, WHOLE, serving

import lmprobe_zarr as lz
from lmprobe_zarr.batch import TokenBatch
from lmprobe_zarr.batch.hashes import prompt_sha256
from lmprobe_zarr.errors import StoreNotFoundError
from lmprobe_zarr.store.format import GroupInfo
from lmprobe_zarr.store.parts import writer

pytest.importorskip("aiohttp", reason="aiohttp is not installed: pip install lmprobe-zarr[http]")

LAYERS, WIDTH = 3, 512
COUNTS = np.full(60, 25)
BOUNDS = np.concatenate([[0], np.cumsum(COUNTS)])
CHUNK = 2**19  # 512 rows, eight blocks of 64 KiB


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((LAYERS, int(COUNTS.sum()), WIDTH)).astype(np.float16)


@pytest.fixture(scope="module", params=[True, False], ids=["shards", "files"])
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, values: np.ndarray) -> dict[str, bytes]:
    """The files of a published copy, with three chunks for each layer."""
    root = tmp_path_factory.mktemp("published")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "CHUNK_BYTES", CHUNK)
        digests = [prompt_sha256(f"prompt {i}") for i in range(len(COUNTS))]
        batch = TokenBatch(sha256=digests, n_tokens=COUNTS, layers=tuple(range(LAYERS)), tokens={"resid": values})
        lz.open_store(root / "acts").write(GroupInfo(model="acme/toy", num_layers=LAYERS, hidden_size=WIDTH), batch)
        lz.open_store(root / "acts").publish(root / "copy", shards=request.param, progress=False)
    files = {path.relative_to(root / "copy").as_posix(): path.read_bytes() for path in (root / "copy").rglob("*") if path.is_file()}
    chunks = [name for name in files if "tokens/resid/c." in name]
    assert len(chunks) == LAYERS * (1 if request.param else 3)
    return files


@pytest.mark.few(2)
@pytest.mark.parametrize("habit", [HONEST[0], *WHOLE])
def test_rows_and_layers_are_right_and_whole_files_are_noted_once(
    published: dict[str, bytes], values: np.ndarray, habit: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "lmprobe_zarr.storage")
    with serving(published, habit) as server:
        resid = lz.open_store(server.url).tokens("acme/toy", dtype="stored").resid
        for prompt in (3, 30, 59, 3, 31):
            rows = slice(int(BOUNDS[prompt]), int(BOUNDS[prompt + 1]))
            np.testing.assert_array_equal(resid.isel(token=rows).values, values[:, rows])
        some = np.array([7, 400, 1499])
        np.testing.assert_array_equal(resid.isel(layer=1, token=some).values, values[1, some])
        np.testing.assert_array_equal(resid.isel(layer=2).values, values[2])
        said = [record.getMessage() for record in caplog.records if "sends whole files" in record.getMessage()]
        assert len(said) == (habit in WHOLE)


def test_one_prompt_costs_its_blocks_and_one_table(published: dict[str, bytes], values: np.ndarray) -> None:
    with serving(published, "ranges") as server:
        resid = lz.open_store(server.url).tokens("acme/toy", dtype="stored").resid
        server.requests.clear()
        rows = slice(int(BOUNDS[5]), int(BOUNDS[6]))
        np.testing.assert_array_equal(resid.isel(token=rows).values, values[:, rows])
        assert len(server.requests) <= LAYERS + 1
        assert sum(nbytes for *_, nbytes in server.requests) < LAYERS * 2 * 2**16 + 4096


def test_without_ranges_a_chunk_in_a_file_of_its_own_is_fetched_once(published: dict[str, bytes], values: np.ndarray) -> None:
    if sum("tokens/resid/c." in name for name in published) == LAYERS:
        pytest.skip("a shard is one file, of which every chunk is a part")
    with serving(published, "whole") as server:
        resid = lz.open_store(server.url).tokens("acme/toy", dtype="stored").resid
        np.testing.assert_array_equal(resid.isel(layer=0, token=slice(0, 25)).values, values[0, :25])
        server.requests.clear()
        for start in range(600, 1000, 25):
            np.testing.assert_array_equal(resid.isel(layer=1, token=slice(start, start + 25)).values, values[1, start : start + 25])
        assert len(server.requests) == 1, "rows 600 to 1000 are in one chunk, which is kept"


def test_a_web_address_without_a_store_is_not_to_be_made_one() -> None:
    with serving({}) as server, pytest.raises(StoreNotFoundError, match="there is no store at") as raised:
        lz.open_store(server.url)
    assert str(raised.value) == f"there is no store at {server.url}: check the path"
