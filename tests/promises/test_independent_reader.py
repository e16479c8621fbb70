"""The page about the format is enough: a reader that was written from it alone, without zarr and without this package, reads the same
numbers, in parts, in views of many parts, and in stores of every version, and notices every damaged byte.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import independent_reader
import numpy as np
import numpy.typing as npt
import pytest
from paths import OLD_STORES
from stores import GROUP, make_batch

import lmprobe_zarr as lz
from lmprobe_zarr.batch.token_batch import TokenBatch
from lmprobe_zarr.store.format.group import GroupInfo
from lmprobe_zarr.store.store import Store

SCRIPT = Path(independent_reader.__file__)
OLD = OLD_STORES
COLUMNS = {"label": [1, 0, 1], "split": ["train", "", "träin 🐦"], "seen": [True, False, True], "weight": [0.5, 1.0, 2.0]}


def part_of(store: Store) -> Path:
    return next(path for path in (Path(store.url) / GROUP.name).iterdir() if path.is_dir() and path.name != "annotations")


def test_the_checksum_is_that_of_the_standard() -> None:
    # RFC 3720, B.4: 32 bytes of zeros, of ones, and ascending; and the check value that catalogues of crcs give.
    assert independent_reader.crc32c(b"123456789") == 0xE3069283
    assert independent_reader.crc32c(bytes(32)) == 0x8A9136AA
    assert independent_reader.crc32c(b"\xff" * 32) == 0x62A8AB43
    assert independent_reader.crc32c(bytes(range(32))) == 0x46DD794E


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_part_is_read_to_the_values_that_were_written_without_zarr_and_without_this_package(tmp_path: Path, dtype: str) -> None:
    texts = ["a", "bb", "ccc"]
    batch = make_batch(texts, columns=COLUMNS, dtype=dtype)
    store = lz.open_store(tmp_path / "s")
    store.write(GROUP, batch)
    # An isolated interpreter, which checks itself that neither zarr nor the package has been imported.
    command = [sys.executable, "-I", str(SCRIPT), f"{store.url}/{GROUP.name}", str(tmp_path / "read.npz")]
    subprocess.run(command, check=True, timeout=120)
    with np.load(tmp_path / "read.npz") as read:
        np.testing.assert_array_equal(read["tokens.resid"], batch.tokens["resid"].swapaxes(0, 1))
        np.testing.assert_array_equal(read["prompts.resid_mean"], batch.prompts["resid_mean"].swapaxes(0, 1))
        assert read["tokens.resid"].dtype == dtype
        assert read["prompts.layer"].tolist() == read["tokens.layer"].tolist() == [0, 1, 3]
        assert read["prompts.text"].tolist() == texts
        assert read["prompts.prompt"].tolist() == [lz.prompt_hash(text) for text in texts]
        for name, values in COLUMNS.items():
            assert read[f"prompts.{name}"].tolist() == values
        assert read["tokens.position"].tolist() == [0, 1, 0, 1, 2, 0, 1, 2, 3]
        np.testing.assert_array_equal(read["tokens.token_id"], batch.token_columns["token_id"])


def test_a_last_chunk_and_raw_chunks_are_read_too(tmp_path: Path) -> None:
    batch = make_batch([str(i) for i in range(1100)], layers=(5,), hidden=1000, tokens=False)  # more than the 4 MiB of one chunk
    info = GroupInfo(model="acme/wide", provenance={}, num_layers=8, hidden_size=1000)
    for compressed in (True, False):
        store = lz.open_store(tmp_path / f"{compressed}")
        part = Path(store.url) / info.name / store.write(info, batch, compressed=compressed)
        files = independent_reader.parse_part((part / "zarr.json").read_bytes())["files"]
        assert sum(key.startswith("prompts/resid_mean/c.") for key in files) > 1
        read, dims = independent_reader.read_array(part, "prompts/resid_mean", files)
        assert dims == ["layer", "prompt", "hidden"]
        np.testing.assert_array_equal(read, batch.prompts["resid_mean"])


def check_same(folder: Path, store: Store, **which: Any) -> None:
    read = independent_reader.read_group(folder)
    for level, dataset in (("prompts", store.dataset(**which)), ("tokens", store.tokens(**which))):
        names = [key.partition(".")[2] for key in read if key.startswith(f"{level}.")]
        assert set(names) >= set(dataset.data_vars), level
        for name in names:
            expected = dataset[name]
            if expected.ndim > 1 and "layer" in expected.dims:
                expected = expected.transpose(level.removesuffix("s"), "layer", ...)
            found: npt.NDArray[Any] = read[f"{level}.{name}"]
            same = np.asarray((found == expected.values) | ((found != found) & (expected.values != expected.values)), bool)
            assert found.shape == expected.shape, name
            assert same.all(), name


def with_logits(batch: TokenBatch, k: int) -> TokenBatch:
    """Also the k largest logits of the last token, which have no layers."""
    values = np.arange(len(batch.sha256) * k, dtype="float32").reshape(-1, k)
    logits = {"logits_last_token_top_k_values": values, "logits_last_token_top_k_indices": values.astype("int32")}
    return replace(batch, prompts={**batch.prompts, **logits}, unlayered=frozenset(logits))


def test_a_view_of_many_parts_is_the_same(tmp_path: Path) -> None:
    store = lz.open_store(tmp_path / "s")
    group = tmp_path / "s" / GROUP.name
    store.write(GROUP, make_batch(["a", "bb", "ccc"], columns=COLUMNS, seed=1))
    store.write(GROUP, make_batch(["dddd", "bb"], layers=(0, 2), seed=2, columns={"label": [3, 4]}))  # other layers, one prompt again
    check_same(group, store)
    store.write(GROUP, make_batch(["e", "a"], seed=3, tokens=False))  # no tokens
    check_same(group, store)
    store.write(GROUP, make_batch(["ccc"], seed=4, layers=(1,), n_tokens=[2]))  # another number of tokens: what came before is out of date
    check_same(group, store)
    store.write(GROUP, make_batch(["ccc"], seed=5, layers=(3,), n_tokens=[4]))  # as in the first part, which stays out of date
    check_same(group, store)
    store.annotate(GROUP.model, {"judge": {"a": 0.25, "e": 0.75}, "note": {"bb": "späte"}, "rank": {"a": 7}, "label": {"ccc": 9}})
    check_same(group, store)
    store.write(GROUP, with_logits(make_batch(["a", "f"], seed=6), 5))
    store.write(GROUP, with_logits(make_batch(["f", "g"], seed=7), 3))
    check_same(group, store)
    store.delete(GROUP.model, ["dddd"])
    store.compact(progress=False)
    check_same(group, store)
    store.gc(max_age=0)
    check_same(group, store)


@pytest.mark.parametrize("group", sorted(path for path in OLD.glob("*/*/*") if path.is_dir()), ids=lambda p: f"{p.parent.name}-{p.name}")
def test_stores_of_every_version_are_read(group: Path) -> None:
    check_same(group, lz.open_store(group.parent, mode="r"), group=group.name)


def test_a_changed_byte_in_any_file_and_a_file_that_is_missing_are_noticed(tmp_path: Path) -> None:
    store = lz.open_store(tmp_path / "s")
    store.write(GROUP, make_batch(["a", "bb", "ccc"], columns=COLUMNS))
    part = part_of(store)
    independent_reader.read_group(part.parent)
    unread = {"prompts/zarr.json", "tokens/zarr.json"}  # they repeat what the part's own document says
    unread |= {f"{level}/{name}" for level in ("prompts", "tokens") for name in ("layer", "n_tokens", "prompt_row", "prompt_sha256")}
    for path in sorted(path for path in part.rglob("*") if path.is_file()):
        key = path.relative_to(part).as_posix()
        if key in unread or key.rpartition("/")[0] in unread:
            continue
        whole = path.read_bytes()
        for at in {0, len(whole) // 2, len(whole) - 1}:
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(independent_reader.Damaged):
                independent_reader.read_group(part.parent)
        if key != "zarr.json":  # without its document a part is not there
            path.unlink()
            with pytest.raises(independent_reader.Damaged, match="is missing"):
                independent_reader.read_group(part.parent)
        path.write_bytes(whole)
    independent_reader.read_group(part.parent)
