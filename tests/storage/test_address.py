"""What a path or URL names: what looks like a URL and is none is refused, with what was probably meant."""

from __future__ import annotations

import pickle
import uuid
from collections.abc import Callable
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import pytest

import lmprobe_zarr as lz
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, LmprobeZarrError, StoreNotFoundError
from lmprobe_zarr.storage import local_path, open_storage

VALUES = {"resid_mean": {0: np.ones((1, 4), "float32")}}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Cloud:
    """A path as cloud libraries have them: asked for its path, it downloads."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __str__(self) -> str:
        return self.url

    def __fspath__(self) -> str:
        raise AssertionError("downloaded")

    def joinpath(self, *names: str) -> Cloud:
        return Cloud("/".join((self.url, *names)))


REFUSED: dict[Any, str] = {
    "s3:/team/acts": "'s3://team/acts'",
    "s3:team/acts": "'s3://team/acts'",
    "S3://team/acts": "'s3://team/acts'",
    "s3:\\\\team\\acts": "'s3://team/acts'",
    "s3//team/acts": "'s3://team/acts'",
    "s3;//team/acts": "'s3://team/acts'",
    "s4://team": "'s3://team'",
    "htps://host/acts": "'https://host/acts'",
    "https:/host/acts": "'https://host/acts'",
    "nosuch://bucket": "check its spelling",
    "://bucket": "no protocol",
    "s3://": "no bucket",
    "s3:///team/acts": "'s3://team/acts'",
    "gs:///team": "'gs://team'",
    "https:///host": "'https://host'",
    " s3://team/acts": "give 's3://team/acts'",
    "s3://team/acts\n": "give 's3://team/acts'",
    "memory:acts": "'memory://acts'",
    "hf:datasets/org/name": "'hf://datasets/org/name'",
    "smplecache::memory://acts": "'simplecache::memory://acts'",
    "simplecache::S3://team": "'simplecache::s3://team'",
    "simplecache::s3:/team/a": "'s3://team/a'",
    "memory://run::1/acts": "chains file systems",
    "/data/s3://team/acts": "'s3://team/acts'",
    "C:\\acts": "was '/acts' meant",
    "C:/acts": "was '/acts' meant",
    "C:acts": "was '/acts' meant",
    "\\\\server\\share": "'//server/share'",
    "file:acts": "no absolute path",
    "file://acts/run": "a machine called 'acts'",
    "file://server/share": "a machine called 'server'",
    "file:///C:/acts": "no drives here",
    "FILE:///acts": "'file:///acts'",
    "file://": "names no folder",
    "~nobody-of-that-name/acts": "no user 'nobody-of-that-name'",
    "$HOME/acts": "os.path.expandvars",
    "${HOME}/acts": "os.path.expandvars",
    "/data/$USER/acts": "os.path.expandvars",
    "%TEMP%/acts": "os.path.expandvars",
    "{run}/acts": "an f before the text",
    "memory://{run}/acts": "an f before the text",
    "": "empty",
    "  ": "empty",
    "a\0b": "NUL",
    Path("s3://team/acts"): "'s3://team/acts'",
    Path("gs://team/acts"): "'gs://team/acts'",
    PureWindowsPath("C:\\acts"): "no|was '/acts' meant",
}


@pytest.mark.parametrize("place", REFUSED, ids=repr)
def test_what_looks_like_a_url_and_is_none_is_refused_with_what_was_meant(place: Any, folder: Path) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: open_storage(place),
        lambda: lz.open_store(place),
        lambda: lz.write_activations(place, model="m", prompts=["a"], pooled=VALUES),
        lambda: lz.cache_info(store=place),
        lambda: lz.import_safetensors(place, folder / "acts"),
    ]
    for call in calls:
        with pytest.raises(InvalidArgumentError, match=REFUSED[place].replace("(", "\\(")):
            call()
    assert list(folder.iterdir()) == [], "nothing was written"


@pytest.mark.parametrize("place", ["s3:/team/acts", Path("gs://team/acts"), "$SCRATCH/copy", "~nobody-of-that-name/acts"], ids=repr)
def test_every_call_that_writes_to_a_place_refuses_it(place: Any, folder: Path) -> None:
    lz.write_activations(folder / "acts", model="m", prompts=["a"], pooled=VALUES)
    store = lz.open_store(folder / "acts")
    calls: list[Callable[[], Any]] = [
        lambda: store.copy_to(place, progress=False),
        lambda: store.publish(place, progress=False),
        lambda: lz.export_safetensors(store, place),
        lambda: lz.open_legacy(place, "m"),
    ]
    for call in calls:
        with pytest.raises(InvalidArgumentError):
            call()
    assert [path.name for path in folder.iterdir()] == ["acts"]


def test_the_absolute_form_of_a_url_is_refused_too_as_the_engine_of_xarray_makes_it(folder: Path) -> None:
    import xarray as xr

    for place in (f"{folder}/s3:/team/acts", Path("s3://team/acts").absolute()):
        with pytest.raises(InvalidArgumentError, match="'s3://team/acts' meant"):
            open_storage(place)
    with pytest.raises(LmprobeZarrError, match="'s3://team/acts' meant"):
        xr.open_dataset("s3:/team/acts", engine="lmprobe_zarr")


@pytest.mark.parametrize("url", ["s3://team/acts", "gs://team/acts", "az://team/acts", "memory://acts"])
def test_a_path_of_a_cloud_library_is_refused_before_it_downloads(url: str) -> None:
    with pytest.raises(InvalidTypeError, match=f"give its URL as text, '{url}'"):
        open_storage(Cloud(url))


@pytest.mark.parametrize("place", [3, b"acts", None, ["acts"]], ids=repr)
def test_what_is_neither_text_nor_path_is_refused(place: Any) -> None:
    with pytest.raises(InvalidTypeError, match="by a path or a URL"):
        open_storage(place)


def test_file_urls_name_the_folder_that_they_name_everywhere_else(folder: Path) -> None:
    for name in ("my acts", "naïve", "a#b", "100%", "a%20b", "日本", "[12]*?"):
        meant = str(folder / name)
        assert open_storage((folder / name).as_uri()).url == meant
    meant = str(folder / "acts")
    for url in (f"file:{meant}", f"file://{meant}", f"file://localhost{meant}", f"local://{meant}", Path(f"file://{meant}")):
        assert open_storage(url).url == meant
    assert open_storage(f"simplecache::file://{folder}/a%20b").url == f"simplecache::file://{folder}/a b"


def test_a_folder_called_as_it_stands_in_a_file_url_is_not_passed_over(folder: Path) -> None:
    (folder / "a%20b").mkdir()
    with pytest.raises(InvalidArgumentError, match="give the folder as a path"):
        open_storage(f"file://{folder}/a%20b")
    assert open_storage(f"{folder}/a%20b").url == str(folder / "a%20b")


def test_a_dot_and_a_slash_make_a_path_of_everything(folder: Path) -> None:
    for text in ("s3:/team", "$HOME/acts", "~nobody", "C:\\acts", "memory:acts", "{run}", "file:acts"):
        storage = open_storage(f"./{text}")
        assert storage.url == str(folder / text)
        assert storage.is_local


def test_a_folder_that_exists_may_be_called_like_a_variable(folder: Path) -> None:
    (folder / "{run}").mkdir()
    assert open_storage("{run}/acts").url == str(folder / "{run}/acts")
    (folder / "s3:").mkdir()
    assert open_storage(folder / "s3:" / "team").url == str(folder / "s3:/team")
    with pytest.raises(InvalidArgumentError, match=r"'\./s3:/team'"):
        open_storage("s3:/team")
    name = f"{{run}}-{uuid.uuid4().hex}"
    with pytest.raises(InvalidArgumentError, match="not filled in"):
        open_storage(f"memory://{name}")
    open_storage(f"memory://{name[:0]}x").filesystem.pipe_file(f"/{name}/zarr.json", b"{}")  # type: ignore[attr-defined]
    assert open_storage(f"memory://{name}").read("zarr.json") == b"{}"


@pytest.mark.parametrize(
    "text", ["run:1/acts", "run::1", "a~b", "a b", "-acts", "a%20b", "run[1]", "run{1,2}", "org/name", "a$b", "50%", "#1"]
)
def test_plain_paths_are_taken_as_they_are_and_shown_absolute(text: str, folder: Path) -> None:
    storage = open_storage(text)
    assert storage.url == local_path(text) == str(folder / text)
    assert str(folder / text) in repr(storage)
    assert pickle.loads(pickle.dumps(storage)).url == storage.url  # noqa: S301 — our own bytes
    with pytest.raises(StoreNotFoundError, match=str(folder).replace("\\", ".")):
        lz.open_store(text, "r")


def test_a_relative_cache_folder_is_shown_absolute_and_a_url_there_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmprobe_zarr import config

    monkeypatch.setenv("LMPROBE_CACHE_DIR", "cache")
    config.reload()
    assert lz.open_store().url == str(folder / "cache" / ".zarr")
    for wrong in ("s3://team/acts", "s3:/team/acts", "$SCRATCH/acts"):
        monkeypatch.setenv("LMPROBE_CACHE_DIR", wrong)
        config.reload()
        with pytest.raises(InvalidArgumentError, match="LMPROBE_CACHE_DIR has to be a folder of this machine"):
            lz.open_store()
    monkeypatch.setenv("LMPROBE_CACHE_DIR", f"file://{folder}/my%20cache")
    config.reload()
    assert lz.open_store().url == str(folder / "my cache" / ".zarr")
    monkeypatch.undo()
    config.reload()


@pytest.mark.parametrize("protocol", ["simplecache", "filecache"])
def test_a_copy_that_is_published_again_is_seen_through_a_cache(protocol: str, folder: Path) -> None:
    name = f"memory://{uuid.uuid4().hex}/public"
    options = {protocol: {"cache_storage": str(folder / "kept")}}
    source = lz.open_store(folder / "acts")
    damaged = b"no document"
    for value in (1.0, 2.0, 3.0):
        lz.write_activations(source, model="m", prompts=["a", "b"], pooled={"resid_mean": {0: np.full((2, 4), value, "float32")}})
        source.publish(name, overwrite=value > 1, progress=False)
        through = lz.open_store(f"{protocol}::{name}", "r", storage_options=options).dataset().resid_mean.values
        np.testing.assert_array_equal(through, np.full((1, 2, 4), value, "float32"))
    for kept in (folder / "kept").iterdir():
        if kept.read_bytes().startswith(b"{") and b'"published"' in kept.read_bytes():
            kept.write_bytes(damaged)
    assert lz.open_store(f"{protocol}::{name}", "r", storage_options=options).models() == ["m"]
