"""A damaged file is an error that names it, never zeros; what is not damaged still reads."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import GROUP, make_batch

import lmprobe_zarr as lz
from lmprobe_zarr.errors import CorruptPartError, PartGoneError
from lmprobe_zarr.store import Store


@pytest.fixture
def local(tmp_path: Path) -> Store:
    store = lz.open_store(tmp_path / "s")
    store.write(GROUP, make_batch(["a", "b", "c"], columns={"label": [0, 1, 0]}))
    return store


def part_folder(store: Store) -> Path:
    (name,) = (n for n in store.storage.list(GROUP.name) if len(n) == 26)
    return Path(store.url) / GROUP.name / name


def damages(data: bytes) -> dict[str, bytes | None]:
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 4
    tail = bytearray(data)
    tail[-1] ^= 1
    changed = {"flipped": bytes(flipped), "its checksum flipped": bytes(tail), "truncated": data[:-1], "longer": data + b"\0"}
    return {"deleted": None, "emptied": b"", **changed}


@pytest.mark.parametrize("what", list(damages(b"12345678")))
@pytest.mark.parametrize(
    "chunk", ["tokens/resid/c.1.0.0", "prompts/resid_mean/c.1.0.0", "prompts/label/c.0", "prompts/text/c.0", "tokens/token_id/c.0"]
)
def test_a_damaged_chunk_raises_and_the_rest_reads(local: Store, what: str, chunk: str) -> None:
    path = part_folder(local) / chunk
    wanted = damages(path.read_bytes())[what]
    path.unlink() if wanted is None else path.write_bytes(wanted)
    fresh = lz.open_store(local.url, mode="r")
    level, variable, key = chunk.split("/")
    data = fresh.tokens() if level == "tokens" else fresh.dataset()
    with pytest.raises(CorruptPartError) as error:
        _ = data[variable].values
    message = str(error.value)
    assert path.parts[-4] in message, "names the part"
    assert repr(variable) in message, "names the variable"
    assert key in message, "names the chunk"
    assert len(message.splitlines()) <= 2
    assert np.isfinite(fresh.tokens().resid.sel(layer=0).values).all()
    assert np.isfinite(fresh.dataset().resid_mean.sel(layer=[0, 3]).values).all()


def test_chunks_exchanged_with_one_another_are_noticed(local: Store) -> None:
    folder = part_folder(local) / "prompts" / "resid_mean"
    one, two = (folder / "c.0.0.0").read_bytes(), (folder / "c.1.0.0").read_bytes()
    (folder / "c.0.0.0").write_bytes(two)
    (folder / "c.1.0.0").write_bytes(one)
    with pytest.raises(CorruptPartError, match=r"c\.[01]\.0\.0"):
        _ = lz.open_store(local.url).dataset().resid_mean.values


@pytest.mark.parametrize("damage", ["flipped", "truncated", "emptied"])
def test_a_damaged_part_document_is_named(local: Store, damage: str) -> None:
    path = part_folder(local) / "zarr.json"
    path.write_bytes(damages(path.read_bytes())[damage] or b"")
    with pytest.raises(CorruptPartError, match=path.parent.name):
        lz.open_store(local.url).dataset()


def test_a_damaged_group_document_is_named(local: Store) -> None:
    (Path(local.url) / GROUP.name / "zarr.json").write_text("{")
    with pytest.raises(CorruptPartError, match=GROUP.name):
        lz.open_store(local.url).models()


def test_a_part_without_its_commit_is_not_there(local: Store) -> None:
    local.write(GROUP, make_batch(["d"], seed=5))
    first = min(n for n in local.storage.list(GROUP.name) if len(n) == 26)
    (Path(local.url) / GROUP.name / first / "zarr.json").unlink()
    assert lz.open_store(local.url).dataset().text.values.tolist() == ["d"]


def test_a_view_whose_part_was_deleted_says_so(local: Store) -> None:
    view = local.dataset()
    shutil.rmtree(part_folder(local))
    with pytest.raises(PartGoneError, match="open the store again"):
        _ = view.resid_mean.values


def test_a_lying_blosc_header_allocates_nothing(local: Store) -> None:
    import google_crc32c

    folder = part_folder(local)
    chunk = folder / "prompts" / "resid_mean" / "c.0.0.0"
    body = bytearray(chunk.read_bytes()[:-4])
    body[4:8] = (2**31 - 1).to_bytes(4, "little")
    chunk.write_bytes(bytes(body) + google_crc32c.value(bytes(body)).to_bytes(4, "little"))
    with pytest.raises(CorruptPartError):
        _ = lz.open_store(local.url).dataset().resid_mean.sel(layer=0).values
