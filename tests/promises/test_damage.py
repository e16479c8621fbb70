"""A file that was made to lie, or moved, is an error that names it; what happens by accident to any kind of file is in `test_repair.py`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import google_crc32c
import pytest
from block_stores import reseal, text_of, words_of
from numcodecs import blosc
from stores import GROUP, make_batch

import lmprobe_zarr as lz
from lmprobe_zarr.errors import CorruptPartError, PartGoneError
from lmprobe_zarr.store.parts import writer
from lmprobe_zarr.store.store import Store


@pytest.fixture
def local(tmp_path: Path) -> Store:
    store = lz.open_store(tmp_path / "s")
    store.write(GROUP, make_batch(["a", "b", "c"], columns={"label": [0, 1, 0]}))
    return store


def part_folder(store: Store) -> Path:
    (name,) = (n for n in store.storage.list(GROUP.name) if len(n) == 26)
    return Path(store.url) / GROUP.name / name


def test_a_view_whose_part_was_deleted_raises_an_error(local: Store) -> None:
    view = local.dataset()
    shutil.rmtree(part_folder(local))
    with pytest.raises(PartGoneError, match="open the store again"):
        _ = view.resid_mean.values


def rewrite_chunk(store: Store, chunk: str, body: bytes) -> None:
    """Replace a chunk by hostile bytes whose checksum holds, in the file and in the part's table; of a variable, its first chunk."""
    folder = part_folder(store)
    checksum = google_crc32c.value(body)
    (folder / chunk).write_bytes(body + checksum.to_bytes(4, "little"))

    def rename(document: Any) -> None:
        attributes = document["attributes"]
        table = attributes.get("tables", {}).get(chunk.rpartition("/")[0])
        if table is None:
            assert chunk in attributes["files"]
            attributes["files"][chunk] = [len(body) + 4, checksum]
        else:
            words = words_of(table["chunk_table"])
            words[:2] = len(body) + 4, checksum
            table["chunk_table"] = text_of(words)

    reseal(folder / "zarr.json", rename)


def header(decoded: int, encoded: int, flags: int = 0) -> bytes:
    return bytes([2, 1, flags, 4]) + decoded.to_bytes(4, "little") + decoded.to_bytes(4, "little") + encoded.to_bytes(4, "little")


CHUNK = 3 * 8 * 4  # bytes of resid_mean in one layer


@pytest.mark.few(10)
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
@pytest.mark.parametrize("version", [1, 2])
def test_a_lying_blosc_header_is_not_believed(tmp_path: Path, body: bytes, version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "PART_VERSION", version)
    local = lz.open_store(tmp_path / "s")
    local.write(GROUP, make_batch(["a", "b", "c"], columns={"label": [0, 1, 0]}))
    rewrite_chunk(local, "prompts/resid_mean/c.0.0.0", body)
    with pytest.raises(CorruptPartError, match=r"c\.0\.0\.0 of 'resid_mean' cannot be decoded"):
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
    shutil.rmtree(next(p for p in group.iterdir() if len(p.name) == 26 and p != part))
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
