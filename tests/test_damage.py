"""A damaged file is an error that names it, never zeros; what is not damaged still reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from conftest import GROUP, make_batch
from numcodecs import blosc

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


def rewrite_chunk(store: Store, chunk: str, body: bytes) -> None:
    """Replace a chunk by hostile bytes whose checksum holds, in the file and in the part's table."""
    folder = part_folder(store)
    checksum = google_crc32c.value(body)
    (folder / chunk).write_bytes(body + checksum.to_bytes(4, "little"))
    document = json.loads((folder / "zarr.json").read_bytes())
    document["attributes"]["files"][chunk] = [len(body) + 4, checksum]
    document["attributes"]["digest"] = "crc32c:00000000"
    data = json.dumps(document, separators=(",", ":")).encode()
    sealed = data.replace(b"crc32c:00000000", b"crc32c:%08x" % google_crc32c.value(data), 1)
    (folder / "zarr.json").write_bytes(sealed)


def header(decoded: int, encoded: int, flags: int = 0) -> bytes:
    return bytes([2, 1, flags, 4]) + decoded.to_bytes(4, "little") + decoded.to_bytes(4, "little") + encoded.to_bytes(4, "little")


CHUNK = 3 * 8 * 4  # bytes of resid_mean in one layer


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\0" * 15,
        header(2**31 - 1, 16),
        header(CHUNK, CHUNK + 16, flags=2),  # says that it was copied, and holds nothing: blosc would read beyond its end
        header(CHUNK, 17, flags=2) + b"\0",
        header(CHUNK, 1000) + b"\0" * 20,
        header(CHUNK - 1, 36) + b"\0" * 20,
    ],
)
def test_a_lying_blosc_header_is_not_believed(local: Store, body: bytes) -> None:
    rewrite_chunk(local, "prompts/resid_mean/c.0.0.0", body)
    with pytest.raises(CorruptPartError, match=r"c\.0\.0\.0 of 'resid_mean'"):
        _ = lz.open_store(local.url).dataset().resid_mean.sel(layer=0).values


@pytest.mark.parametrize(
    "texts",
    [
        (2**32 - 1).to_bytes(4, "little"),
        (3).to_bytes(4, "little") + (2**31 - 1).to_bytes(4, "little") + b"a",
        (4).to_bytes(4, "little") + b"\1\0\0\0a" * 4,
        (3).to_bytes(4, "little") + b"\1\0\0\0\xff" * 3,
        b"",
    ],
)
def test_lying_texts_are_not_believed(local: Store, texts: bytes) -> None:
    rewrite_chunk(local, "prompts/text/c.0", blosc.compress(texts or b"\0", b"zstd", 5, 0, 0, 1))
    with pytest.raises(CorruptPartError, match=r"c\.0 of 'text'"):
        _ = lz.open_store(local.url).dataset().text.values


def test_texts_that_would_unpack_to_gigabytes_are_not_unpacked(local: Store) -> None:
    rewrite_chunk(local, "prompts/text/c.0", header(2**32 - 1, 40) + b"\0" * 24)
    with pytest.raises(CorruptPartError, match="size in the header"):
        _ = lz.open_store(local.url).dataset().text.values


def test_documents_that_were_renamed_copied_or_lost_are_named(local: Store) -> None:
    root, group, part = Path(local.url), part_folder(local).parent, part_folder(local)
    shutil.copytree(part, group / part.name.replace(part.name[-1], "0" if part.name[-1] != "0" else "1"))
    with pytest.raises(CorruptPartError, match="renamed, moved or copied"):
        lz.open_store(local.url).dataset()
    shutil.rmtree(next(p for p in group.iterdir() if p.is_dir() and p != part))
    shutil.copytree(group, root / "other-0123456789ab")
    with pytest.raises(CorruptPartError, match="renamed or copied"):
        lz.open_store(local.url).models()
    shutil.rmtree(root / "other-0123456789ab")
    (group / "zarr.json").rename(group / "away")
    with pytest.raises(CorruptPartError, match=r"own zarr\.json is gone"):
        lz.open_store(local.url).models()
    (group / "zarr.json").mkdir()
    with pytest.raises(CorruptPartError, match="is a folder"):
        lz.open_store(local.url).models()


def test_somebody_elses_group_beside_ours_disturbs_nothing(local: Store) -> None:
    import zarr

    zarr.create_group(f"{local.url}/theirs")
    (Path(local.url) / "notes.txt").write_text("hello")
    assert lz.open_store(local.url).dataset().sizes["prompt"] == 3
