"""File systems that answer a question wrongly, or not at all: what can be written is written, and what cannot be read is no damage."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stores import GROUP, make_batch

import lmprobe_zarr as lz
from lmprobe_zarr.errors import (
    AccessDeniedError,
    CorruptPartError,
    InvalidArgumentError,
    LmprobeZarrError,
    NoSpaceError,
    ReadOnlyError,
    UnreachableError,
)  # fmt: skip
from lmprobe_zarr.storage import LocalStorage

Usage = namedtuple("Usage", "total used free")
NETWORK = [errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOTCONN, errno.EAGAIN, errno.ECONNRESET, errno.EBUSY]


def failing(number: int, applies: Callable[..., bool], call: Callable[..., Any]) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        if applies(*args):
            raise OSError(number, os.strerror(number))
        return call(*args, **kwargs)

    return fail


def is_folder(descriptor: int) -> bool:
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF])
@pytest.mark.parametrize("of", ["folders", "everything"])
def test_what_cannot_be_flushed_is_written_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, of: str) -> None:
    monkeypatch.setattr(os, "fsync", failing(number, is_folder if of == "folders" else lambda _: True, os.fsync))
    batch = make_batch(["a", "b"])
    lz.open_store(tmp_path / "acts").write(GROUP, batch)
    np.testing.assert_array_equal(lz.open_store(tmp_path / "acts").dataset().resid_mean.values, batch.prompts["resid_mean"])


def test_a_medium_that_fails_to_flush_is_an_error_with_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", failing(errno.EIO, lambda _: True, os.fsync))
    with pytest.raises(UnreachableError, match=r"acts.*cannot be written.*check the disk"):
        lz.open_store(tmp_path / "acts").write(GROUP, make_batch(["a"]))


def raising(number: int) -> Callable[..., Any]:
    return failing(number, lambda *_: True, lambda *_: None)


@pytest.mark.parametrize(
    "usage",
    [lambda _: Usage(0, 0, 0), lambda _: Usage(2**40, 2**40, 0), *(raising(n) for n in (errno.ENOTSUP, errno.ENOSYS, errno.EACCES))],
)
def test_free_space_that_is_not_known_is_not_taken_for_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, usage: Any) -> None:
    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert LocalStorage(tmp_path).free_bytes() is None


def test_a_folder_that_access_says_no_of_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_args, **_more: False)
    (tmp_path / "empty").mkdir()
    for place in ("empty", "new/acts"):
        lz.open_store(tmp_path / place).write(GROUP, make_batch(["a"]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "new"], "the try leaves nothing behind"
    monkeypatch.setattr(os, "mkdir", raising(errno.EROFS))
    with pytest.raises(ReadOnlyError, match="cannot be written"):
        lz.open_store(tmp_path / "third").write(GROUP, make_batch(["a"]))


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EXDEV, errno.EACCES])
def test_without_hard_links_a_commit_never_takes_the_place_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(os, "link", raising(number))
    storage = LocalStorage(tmp_path)
    storage.commit("g/zarr.json", b"1", durable=True, replace=False)
    storage.commit("g/zarr.json", b"1", durable=True, replace=False)
    with pytest.raises(FileExistsError):
        storage.commit("g/zarr.json", b"2", durable=True, replace=False)
    assert [path.name for path in (tmp_path / "g").iterdir()] == ["zarr.json"]


@pytest.mark.few(16)
@pytest.mark.parametrize("number", NETWORK)
@pytest.mark.parametrize("call", ["open", "preadv", "scandir", "listdir"])
def test_a_network_that_is_away_is_no_damage_and_not_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    lz.open_store(tmp_path / "acts").write(GROUP, make_batch(["a", "b"]))
    data = lz.open_store(tmp_path / "acts").dataset()
    with monkeypatch.context() as away:
        away.setattr(os, call, raising(number))
        if call in ("open", "preadv"):
            with pytest.raises(UnreachableError, match=str(tmp_path)):
                _ = data.resid_mean.values
        else:
            storage = LocalStorage(tmp_path / "acts")
            with pytest.raises(UnreachableError, match=str(tmp_path)):
                _ = storage.list("") if call == "listdir" else storage.scan("")
    assert np.isfinite(data.resid_mean.values).all()


def test_a_file_that_cannot_be_looked_at_is_not_taken_for_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = LocalStorage(tmp_path)
    storage.write("f", b"1", durable=False)
    for number, kind in ((errno.ESTALE, UnreachableError), (errno.EACCES, AccessDeniedError)):
        with monkeypatch.context() as away:
            away.setattr(os, "stat", raising(number))
            with pytest.raises(kind, match=str(tmp_path)):
                storage.is_file("f")
    assert storage.is_file("f")
    assert not storage.is_file("f/g")
    assert not storage.is_file("x" * 300)


@pytest.mark.parametrize("number", [errno.EIO, errno.EBADMSG])
def test_a_medium_that_is_damaged_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    lz.open_store(tmp_path / "acts").write(GROUP, make_batch(["a", "b"]))
    data = lz.open_store(tmp_path / "acts").dataset()
    monkeypatch.setattr(os, "preadv", raising(number))
    with pytest.raises(CorruptPartError, match="cannot be read"):
        _ = data.resid_mean.values


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.ENOSPC, NoSpaceError), (errno.EDQUOT, NoSpaceError), (errno.EROFS, ReadOnlyError), (errno.ENAMETOOLONG, InvalidArgumentError),
     (errno.EILSEQ, InvalidArgumentError), (errno.EIO, UnreachableError), (errno.ESTALE, UnreachableError)],
)  # fmt: skip
def test_every_error_of_writing_is_one_of_ours_with_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type
) -> None:
    monkeypatch.setattr(os, "write", raising(number))
    with pytest.raises(kind, match=str(tmp_path / "f")) as caught:
        LocalStorage(tmp_path).write("f", b"1", durable=False)
    assert isinstance(caught.value, LmprobeZarrError)
