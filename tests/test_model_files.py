"""Digests of files: one that is exchanged for another of the same length and time is hashed again."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lmprobe_zarr import model_files as files
from lmprobe_zarr.model_files import weights_digest

OLD = 10**18


def model_of(folder: Path, content: bytes = b"a" * 64) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(content)
    os.utime(folder / "model.safetensors", ns=(OLD, OLD))
    return folder


def in_place(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(b"b")


def by_another_file(folder: Path) -> None:
    (folder / "new").write_bytes(b"b" * 64)
    os.utime(folder / "new", ns=(OLD, OLD))
    (folder / "new").replace(folder / "model.safetensors")


def by_a_link(folder: Path) -> None:
    other = folder.parent / "other"
    other.write_bytes(b"b" * 64)
    os.utime(other, ns=(OLD, OLD))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(other)


def by_a_copy_with_its_times(folder: Path) -> None:
    other = model_of(folder.parent / "copied", b"b" * 64)
    shutil.copy2(other / "model.safetensors", folder / "model.safetensors")


@pytest.mark.parametrize("exchange", [in_place, by_another_file, by_a_link, by_a_copy_with_its_times])
def test_a_file_of_the_same_length_and_time_is_not_taken_for_the_one_before(exchange: Callable[[Path], None], tmp_path: Path) -> None:
    folder, memory = model_of(tmp_path / "m"), tmp_path / "memory.json"
    time.sleep(0.05)
    first = weights_digest(folder, memory)
    assert memory.exists()
    exchange(folder)
    os.utime(folder / "model.safetensors", ns=(OLD, OLD))
    changed = weights_digest(folder, memory)
    assert changed != first
    assert changed == weights_digest(folder)


def test_a_file_that_nobody_touched_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, memory = model_of(tmp_path / "m"), tmp_path / "memory.json"
    time.sleep(0.05)
    first = weights_digest(folder, memory)
    monkeypatch.setattr(files, "_file_sha256", lambda path: pytest.fail(f"{path} was read again"))
    assert weights_digest(folder, memory) == first


@pytest.mark.parametrize("lacking", ["ctime_ns", "inode"])
def test_what_an_earlier_version_remembered_is_not_trusted(lacking: str, tmp_path: Path) -> None:
    import json

    folder, memory = model_of(tmp_path / "m"), tmp_path / "memory.json"
    time.sleep(0.05)
    first = weights_digest(folder, memory)
    known = {
        path: {k: v for k, v in entry.items() if k != lacking} | {"sha256": "0" * 64}
        for path, entry in json.loads(memory.read_text()).items()
    }
    memory.write_text(json.dumps(known))
    assert weights_digest(folder, memory) == first
