"""Names with characters that file systems, shells and URLs give a meaning: every verb takes them as they are."""

from __future__ import annotations

import inspect
import uuid
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from special_names import NAMES

import lmprobe_zarr as lz
from lmprobe_zarr.errors import ReadOnlyError
from lmprobe_zarr.storage import FsspecStorage, LocalStorage, Storage, open_storage
from lmprobe_zarr.storage.s3 import S3Storage

# Each matches one of those names, if that is taken for a pattern.
NEIGHBOURS = ["run1", "run2", "runx", "run", "x", "a b", "ab", "50", "run{1", "run"]


def text_of(storage: Storage, key: str) -> bytes | None:
    try:
        return storage.read(key)
    except FileNotFoundError:
        return None


@pytest.mark.few(12)
@pytest.mark.parametrize("name", NAMES)
def test_no_verb_touches_a_neighbour_whose_name_fits_a_pattern(root: str, name: str) -> None:
    if root.startswith(("s3://", "az://")) and "\\" in name:
        pytest.skip("the servers of these tests take a backslash for a slash")
    neighbours = [n for n in dict.fromkeys(NEIGHBOURS) if n != name]
    if root.startswith(("s3://", "gs://", "az://")):
        neighbours = neighbours[:3]  # a request each
    above = open_storage(root)
    for neighbour in neighbours:
        above.write(f"{neighbour}/g/f", b"neighbour", durable=False)
    storage = open_storage(f"{root}/{name}")
    storage.write("g/f", b"1", durable=False)
    storage.commit("g/p/zarr.json", b"2", durable=False, replace=False)
    storage.write(f"{name}/f", b"3", durable=False)
    assert (storage.read("g/f"), bytes(storage.read_view("g/p/zarr.json")), storage.read(f"{name}/f")) == (b"1", b"2", b"3")
    assert storage.list("") == sorted(["g", name])
    assert storage.is_file("g/f")
    assert storage.sizes("g", ["f", "p/zarr.json"]) == {"f": 1, "p/zarr.json": 1}
    assert above.read(f"{name}/g/f") == b"1", "the same file by another way"
    storage.remove(["g/f", f"{name}/f"])
    assert not storage.is_file("g/f")
    storage.remove_tree("g")
    storage.remove_folders([name])
    assert text_of(storage, "g/p/zarr.json") is None
    above.remove_tree(name)
    assert [text_of(above, f"{neighbour}/g/f") for neighbour in neighbours] == [b"neighbour"] * len(neighbours)


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["run[12]", "exp*", "run?", "a%20b", "a b", "日本", "a#b", "{a,b}"])
def test_a_store_is_written_read_copied_and_deleted_from_and_its_copies_stay(root: str, name: str) -> None:
    values = {"resid_mean": {0: np.arange(12, dtype="float32").reshape(3, 4)}}
    here, copies = f"{root}/{name}/acts", [f"{root}/{other}/acts" for other in ("run1", "exp-backup", "runx", "a", "b")]
    lz.write_activations(here, model="m", prompts=["a", "b", "c"], pooled=values)
    store = lz.open_store(here)
    for copy in copies:
        store.copy_to(copy, progress=False)
    lz.open_store(here).delete("m", ["a"])
    assert sorted(lz.open_store(here).dataset("m").text.values) == ["b", "c"]
    lz.open_store(here).compact(progress=False)
    lz.evict(here, max_gb=0, min_age=0)
    lz.open_store(here).gc(max_age=0)
    for copy in copies:
        found = lz.open_store(copy).dataset("m", prompts=["a", "b", "c"])
        np.testing.assert_array_equal(found.resid_mean.sel(layer=0).values, values["resid_mean"][0])
        assert not lz.open_store(copy).verify(progress=False).problems


# Verbs of fsspec that take patterns: used on a stored name they act on other files, too.
EXPANDING = [
    "rm",
    "cat",
    "get",
    "put",
    "copy",
    "cp",
    "mv",
    "move",
    "glob",
    "expand_path",
    "_expand_path",
    "rename",
    "_rm",
    "_cat",
    "_get",
    "_put",
]


@pytest.mark.parametrize("kind", [FsspecStorage, S3Storage, LocalStorage])
def test_no_verb_of_a_storage_calls_one_of_fsspec_that_expands(kind: type[Storage]) -> None:
    import lmprobe_zarr.bridges.files
    import lmprobe_zarr.storage.memory

    for module in (inspect.getmodule(kind), lmprobe_zarr.storage.memory, lmprobe_zarr.bridges.files):
        assert module is not None
        text = inspect.getsource(module)
        for verb in EXPANDING:
            assert f"filesystem.{verb}(" not in text, f"{module.__name__} calls {verb}"
            assert f"filesystem.{verb}," not in text, f"{module.__name__} calls {verb}"


def strict_memory() -> type[MemoryFileSystem]:
    """fsspec's memory under a protocol of its own, whose verbs that expand raise."""

    class Strict(MemoryFileSystem):  # type: ignore[misc]
        protocol = "strictmemory"
        store: dict[str, Any] = {}  # noqa: RUF012 — as in fsspec
        pseudo_dirs = [""]  # noqa: RUF012

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return str(super()._strip_protocol(path.removeprefix("strictmemory://")))

        def expand_path(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError(f"expands {args}")

        glob = rm = expand_path

    return Strict


@pytest.mark.parametrize("chain", ["strictmemory://", "simplecache::strictmemory://", "filecache::strictmemory://"])
def test_every_verb_works_where_those_of_fsspec_that_expand_raise(chain: str, tmp_path: Path) -> None:
    fsspec.register_implementation("strictmemory", strict_memory(), clobber=True)
    options = {chain.split("::", maxsplit=1)[0]: {"cache_storage": str(tmp_path)}} if "::" in chain else None
    name = f"{uuid.uuid4().hex}[12]*"
    storage = open_storage(f"{chain}{name}", options)
    storage.write("g/f", b"1", durable=False)
    storage.commit("g/p/zarr.json", b"2", durable=False, replace=False)
    storage.touch("g/t")
    assert storage.read("g/f") == b"1"
    storage.remove(["g/f", "g/nowhere"])
    assert not storage.is_file("g/f")
    storage.remove_tree("g")
    assert storage.list("g") == []
    writable = open_storage(f"strictmemory://{name}/acts")
    lz.write_activations(writable.url, model="m", prompts=["a", "b"], pooled={"resid_mean": {0: np.ones((2, 4), "float32")}})
    store = lz.open_store(writable.url)
    store.delete("m", ["a"])
    store.gc(max_age=0)
    lz.clear_cache(url=writable.url)


def test_a_file_system_that_removes_no_single_files_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(f"memory://{uuid.uuid4().hex}")
    assert isinstance(storage, FsspecStorage)
    storage.write("f[1]", b"1", durable=False)

    def none(*args: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr(type(storage.filesystem), "rm_file", none)
    with pytest.raises(ReadOnlyError, match="removes no single files"):
        storage.remove(["f[1]"])
    monkeypatch.undo()
    assert storage.read("f[1]") == b"1"


def test_the_verbs_that_are_used_take_no_patterns_in_this_release_of_fsspec() -> None:
    for kind in (fsspec.AbstractFileSystem, AsyncFileSystem, MemoryFileSystem):
        for verb in ("rm_file", "_rm_file", "cat_file", "pipe_file", "info", "ls", "find", "rmdir"):
            if hasattr(kind, verb):
                text = inspect.getsource(getattr(kind, verb))
                assert not any(f"self.{word}" in text for word in ("expand_path", "_expand_path", "glob", "_glob")), (
                    f"{kind.__name__}.{verb}"
                )
