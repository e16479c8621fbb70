"""A reader's own cache: what was read once is read from this machine, and values are never wrong, whatever happens to its folder."""

from __future__ import annotations

import logging
import os
import pickle
import random
import signal
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from block_stores import Counted
from command_line import call, call_json
from s3_server import S3
from stores import GROUP, make_batch
from web_server import serving

import lmprobe_zarr as lz
from lmprobe_zarr import config
from lmprobe_zarr.batch import TokenBatch
from lmprobe_zarr.batch.hashes import prompt_sha256
from lmprobe_zarr.errors import AccessDeniedError, CorruptPartError, InvalidArgumentError
from lmprobe_zarr.storage import LocalStorage
from lmprobe_zarr.storage.read_cache import _account_of
from lmprobe_zarr.store.format import GroupInfo, new_part_name
from lmprobe_zarr.store.parts import PartWriter, kept_chunks, writer
from lmprobe_zarr.store.store import Store

FORK = get_context("fork")
LAYERS, WIDTH, PROMPTS = 3, 512, 24
COUNTS = np.arange(20, 20 + 2 * PROMPTS, 2)  # tokens of each prompt
BOUNDS = np.concatenate([[0], np.cumsum(COUNTS)])
TOY = GroupInfo(model="acme/toy", num_layers=LAYERS, hidden_size=WIDTH)
#: Of tokens 512 rows, in eight blocks of 64 KiB.
CHUNK = 2**19
FORMS = ("format 1", "blocks", "shards", "raw", "raw shards")


def values_of(seed: int) -> tuple[Any, Any]:
    """Tokens and pooled values that do not compress."""
    rng = np.random.default_rng(seed)
    tokens = rng.standard_normal((LAYERS, int(COUNTS.sum()), WIDTH)).astype(np.float16)
    return tokens, rng.standard_normal((LAYERS, PROMPTS, WIDTH)).astype(np.float32)


TOKENS, POOLED = values_of(0)
TEXTS = [f"prompt {i}" for i in range(PROMPTS)]


def batch_of(tokens: Any, pooled: Any) -> TokenBatch:
    return TokenBatch(
        sha256=[prompt_sha256(text) for text in TEXTS], text=TEXTS, n_tokens=COUNTS, layers=tuple(range(LAYERS)), tokens={"resid": tokens},
        token_columns={"token_id": np.arange(int(COUNTS.sum()))}, prompts={"resid_mean": pooled},
        prompt_columns={"label": np.arange(PROMPTS) % 2},
    )  # fmt: skip


def write_part(root: Path, form: str, *, seed: int = 0, name: str | None = None) -> str:
    """A part of one of the forms; its name."""
    with pytest.MonkeyPatch.context() as patch:
        for each in ("CHUNK_BYTES", "REMOTE_CHUNK_BYTES", "MIN_CHUNK_BYTES"):
            patch.setattr(writer, each, CHUNK)
        patch.setattr(writer, "PART_VERSION", 1 if form == "format 1" else 2)
        lz.open_store(root, durable=False).catalog.new_part(TOY).abort()  # makes root and group
        storage, compressed, shards = LocalStorage(root), not form.startswith("raw"), form.endswith("shards")
        with PartWriter(storage, TOY, name or new_part_name(), compressed=compressed, durable=False, shards=shards) as new:
            new.append(batch_of(*values_of(seed)))
            return new.commit().name


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def filled(tmp_path: Path, form: str) -> Path:
    write_part(tmp_path / "acts", form)
    return tmp_path / "acts"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "reads"


def new_process() -> None:
    """Forget what a process keeps in memory."""
    kept_chunks._kept.cache_clear()
    _account_of.cache_clear()


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    new_process()
    yield
    new_process()


def session(root: Path, folder: Path, size: str = "1 GB") -> tuple[Store, Counted]:
    """A store on a slow place as a new process opens it, and what counts the reads of that place."""
    new_process()
    counted = Counted(LocalStorage(root), slow=True)
    return lz.open_store(counted, "r", cache=size, cache_folder=folder), counted


def beyond_documents(counted: Counted) -> list[tuple[str, int, int]]:
    return [each for each in counted.read_of if not each[0].endswith("zarr.json")]


SOME = np.array([3, 4, 700, 1001])
READS: dict[str, tuple[Callable[[Store], Any], Any]] = {
    "a pooled layer": (lambda s: s.dataset("acme/toy").resid_mean.sel(layer=1), POOLED[1]),
    "all pooled": (lambda s: s.dataset("acme/toy").resid_mean, POOLED),
    "a layer of tokens": (lambda s: s.tokens("acme/toy", dtype="stored").resid.sel(layer=2), TOKENS[2]),
    "one prompt": (
        lambda s: s.tokens("acme/toy", dtype="stored").resid.isel(token=slice(int(BOUNDS[5]), int(BOUNDS[6]))),
        TOKENS[:, BOUNDS[5] : BOUNDS[6]],
    ),
    "some tokens": (lambda s: s.tokens("acme/toy", dtype="stored").resid.isel(layer=0, token=SOME), TOKENS[0, SOME]),
    "texts": (lambda s: s.dataset("acme/toy").text, np.array(TEXTS, object)),
    "a column": (lambda s: s.dataset("acme/toy").label, np.arange(PROMPTS) % 2),
    "token ids": (lambda s: s.tokens("acme/toy").token_id, np.arange(int(COUNTS.sum()))),
}


def read_all(store: Store, names: Any = READS) -> None:
    for name in names:
        read, expected = READS[name]
        np.testing.assert_array_equal(read(store).values, expected, name)


# ------------------------------------------------------------------------------------------------------------- what it saves


@pytest.mark.few(1)
def test_a_second_session_reads_nothing_but_documents(filled: Path, folder: Path) -> None:
    first, counted = session(filled, folder)
    read_all(first)
    assert beyond_documents(counted)
    for _ in range(2):
        again, counted = session(filled, folder)
        read_all(again)
        read_all(again)  # where a chunk is read a second time, all of it is wanted
        assert beyond_documents(counted) == []
        assert Counter(key for key, _, _ in counted.read_of).most_common(1)[0][1] == 1, "and each document once"


@pytest.mark.few(6)
@pytest.mark.parametrize("name", READS)
def test_each_kind_of_read_is_kept_by_itself(filled: Path, folder: Path, name: str) -> None:
    read_all(session(filled, folder)[0], [name])
    again, counted = session(filled, folder)
    for _ in range(3):
        read_all(again, [name])
    assert beyond_documents(counted) == []


def test_a_layer_that_was_read_serves_its_prompts_and_rows(filled: Path, folder: Path) -> None:
    first, _ = session(filled, folder)
    np.testing.assert_array_equal(first.tokens("acme/toy", dtype="stored").resid.values, TOKENS)
    again, counted = session(filled, folder)
    read_all(again, ["one prompt", "some tokens"])
    tables = [key for key, _, _ in beyond_documents(counted) if not key.endswith("block_table")]
    assert tables == [], "of the files of chunks nothing is read"


@pytest.mark.few(2)
def test_selections_in_any_order_are_those_of_numpy_and_are_fetched_once(filled: Path, folder: Path) -> None:
    dice = np.random.default_rng(1)
    n = int(COUNTS.sum())
    picks: list[tuple[Any, Any]] = []
    for _ in range(25):
        start = int(dice.integers(n - 60))
        rows = slice(start, start + int(dice.integers(1, 60))) if dice.random() < 0.5 else np.sort(dice.choice(n, 5, replace=False))
        picks.append((int(dice.integers(LAYERS)), rows))
    for turn in range(3):
        store, counted = session(filled, folder)
        resid = store.tokens("acme/toy", dtype="stored").resid
        for layer, rows in [picks[i] for i in dice.permutation(len(picks))]:
            np.testing.assert_array_equal(resid.isel(layer=layer, token=rows).values, TOKENS[layer, rows])
        assert (beyond_documents(counted) == []) == (turn > 0)


def test_batches_of_a_second_epoch_need_no_request(s3: S3, tmp_path: Path, folder: Path) -> None:
    url = f"s3://pub/{uuid.uuid4().hex}/acts"
    batches = [make_batch([f"prompt {i}" for i in range(50 * part, 50 * part + 50)], seed=part) for part in range(4)]
    for batch in batches:
        lz.open_store(url).write(GROUP, batch)
    expected = np.concatenate([batch.tokens["resid"][1] for batch in batches])

    def epoch(tokens: Any) -> None:
        found = np.concatenate(list(tokens.lz.batches(layer=1, batch_tokens=64, buffer_tokens=300)))
        np.testing.assert_array_equal(found[np.lexsort(found.T)], expected[np.lexsort(expected.T)])

    def opened() -> Any:
        new_process()
        return lz.open_store(url, "r", storage_options=s3.options(counted=True), cache="1 GB", cache_folder=folder).tokens()

    tokens = opened()
    s3.proxy.reset()
    epoch(tokens)
    assert s3.proxy.kinds() == {"GET": 4}, "a chunk of each part"
    s3.proxy.reset()
    epoch(tokens)
    assert s3.proxy.requests == [], "a second epoch"
    s3.proxy.reset()
    epoch(opened())
    assert {request.path.rpartition("/")[2] for request in s3.proxy.requests if request.kind == "GET"} == {"zarr.json"}, "a second session"
    assert s3.proxy.kinds()["LIST"] == 3
    assert s3.proxy.kinds().total() == 3 + 1 + 1 + 4, "lists, root, group and parts"


def test_a_published_copy_on_a_web_server_is_kept_too(tmp_path: Path, folder: Path) -> None:
    pytest.importorskip("aiohttp", reason="aiohttp is not installed: pip install lmprobe-zarr[http]")
    write_part(tmp_path / "acts", "shards")
    lz.open_store(tmp_path / "acts").publish(tmp_path / "copy", progress=False)
    files = {p.relative_to(tmp_path / "copy").as_posix(): p.read_bytes() for p in (tmp_path / "copy").rglob("*") if p.is_file()}
    asked: list[str] = []

    class Noted(dict[str, bytes]):
        def get(self, key: str, default: Any = None) -> Any:
            asked.append(key)
            return super().get(key, default)

    with serving(Noted(files)) as server:
        for turn in range(2):
            new_process()
            asked.clear()
            read_all(lz.open_store(server.url, cache="1 GB", cache_folder=folder))
            assert any(not key.endswith("zarr.json") for key in asked) == (turn == 0)


def test_a_store_of_this_machine_is_not_kept_a_second_time(tmp_path: Path, folder: Path) -> None:
    write_part(tmp_path / "acts", "blocks")
    store = lz.open_store(tmp_path / "acts", cache="1 GB", cache_folder=folder)
    read_all(store)
    assert store.catalog.reads is None
    assert not folder.exists()


# -------------------------------------------------------------------------------------------------------- never wrong


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("??/*") if not path.name.startswith("."))


def _change(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 0x10]))


@pytest.mark.few(2)
@pytest.mark.parametrize("damage", ["a byte", "cut", "longer", "empty", "exchanged", "a folder", "gone", "another's header"])
def test_entries_that_are_damaged_are_fetched_again_and_mended(filled: Path, folder: Path, damage: str) -> None:
    read_all(session(filled, folder)[0])
    dice = random.Random(0)
    before = {path: path.read_bytes() for path in entries(folder)}
    assert len(before) > 10
    paths = list(before)
    for path, other in zip(paths, paths[1:] + paths[:1], strict=True):
        match damage:
            case "a byte":
                _change(path, dice.randrange(len(before[path])))
            case "cut":
                path.write_bytes(before[path][: dice.randrange(len(before[path]))])
            case "longer":
                path.write_bytes(before[path] + b"\0")
            case "empty":
                path.write_bytes(b"")
            case "exchanged":
                path.write_bytes(before[other])
            case "a folder":
                path.unlink()
                path.mkdir()
            case "gone":
                path.unlink()
            case "another's header":
                path.write_bytes(before[path][:64] + before[other][64:][: len(before[path]) - 64].ljust(len(before[path]) - 64, b"\0"))
    again, counted = session(filled, folder)
    read_all(again)
    assert beyond_documents(counted)
    if damage == "a folder":
        return
    again, counted = session(filled, folder)
    read_all(again)
    assert beyond_documents(counted) == [], "what was damaged was replaced"


def test_every_byte_of_an_entry_may_change(tmp_path: Path, folder: Path) -> None:
    lz.open_store(tmp_path / "acts").write(GROUP, make_batch(["one", "two"], hidden=4, layers=(0,), tokens=False))
    expected = lz.open_store(tmp_path / "acts").dataset().resid_mean.values

    def read() -> list[tuple[str, int, int]]:
        store, counted = session(tmp_path / "acts", folder)
        np.testing.assert_array_equal(store.dataset().resid_mean.values, expected)
        return beyond_documents(counted)

    read()
    places = [(path, place) for path in entries(folder) for place in range(path.stat().st_size)]
    assert len(places) > 100
    for path, place in places:
        _change(path, place)
        assert len(read()) == 1, f"byte {place}"
    assert read() == []


def test_a_chunk_that_comes_damaged_is_an_error_is_not_kept_and_is_right_once_it_is_mended(filled: Path, folder: Path) -> None:
    files = [path for path in filled.rglob("c.*") if path.is_file()]
    whole = {path: path.read_bytes() for path in files}
    for path in files:
        path.write_bytes(bytes(len(whole[path])))
    store, _ = session(filled, folder)
    for name in ("a layer of tokens", "one prompt", "some tokens", "texts", "all pooled"):
        with pytest.raises(CorruptPartError):
            READS[name][0](store).values  # noqa: B018
    for path in files:
        path.write_bytes(whole[path])
    read_all(session(filled, folder)[0])


@pytest.mark.few(2)
def test_verify_and_repair_look_at_the_place_and_never_at_what_is_kept(filled: Path, folder: Path) -> None:
    store, _ = session(filled, folder)
    read_all(store)
    damaged = next(path for path in sorted(filled.rglob("tokens/resid/c.*")) if path.is_file())
    _change(damaged, damaged.stat().st_size // 3)
    assert store.verify().problems
    again, _ = session(filled, folder)
    assert again.verify().problems
    read_all(again)  # the values are those that were stored, from this machine


@pytest.mark.few(2)
def test_a_part_that_was_replaced_by_one_of_its_name_is_never_served_from_what_is_kept(tmp_path: Path, folder: Path, form: str) -> None:
    name = write_part(tmp_path / "acts", form)
    store, _ = session(tmp_path / "acts", folder)
    read_all(store)
    before = store.view(store.find_group()).parts[0].kept
    LocalStorage(tmp_path / "acts").remove_tree(f"{TOY.name}/{name}")
    assert write_part(tmp_path / "acts", form, seed=7, name=name) == name
    tokens, pooled = values_of(7)
    for _ in range(2):
        store, _ = session(tmp_path / "acts", folder)
        assert store.view(store.find_group()).parts[0].kept != before, "none of its checksums has to tell them apart"
        np.testing.assert_array_equal(store.tokens("acme/toy", dtype="stored").resid.values, tokens)
        np.testing.assert_array_equal(store.tokens("acme/toy", dtype="stored").resid.isel(layer=1, token=SOME).values, tokens[1, SOME])
        np.testing.assert_array_equal(store.dataset("acme/toy").resid_mean.values, pooled)


def test_a_copy_that_is_published_again_is_seen(tmp_path: Path, folder: Path) -> None:
    for seed in (0, 7):
        write_part(tmp_path / f"acts{seed}", "blocks", seed=seed)
        lz.open_store(tmp_path / f"acts{seed}").publish(tmp_path / "copy", progress=False, overwrite=seed > 0)
        store, _ = session(tmp_path / "copy", folder)
        np.testing.assert_array_equal(store.dataset("acme/toy").resid_mean.values, values_of(seed)[1])


def test_an_url_on_another_server_is_another_place(s3: S3, folder: Path) -> None:
    url = f"s3://pub/{uuid.uuid4().hex}/acts"
    lz.open_store(url).write(GROUP, make_batch(["a", "b"]))

    def read(**options: Any) -> int:
        new_process()
        s3.proxy.reset()
        lz.open_store(url, "r", storage_options=options, cache="1 GB", cache_folder=folder).dataset().resid_mean.values  # noqa: B018
        return sum("/c." in request.path for request in s3.proxy.requests)

    read(**s3.options())
    assert read(**s3.options(counted=True)) > 0, "the same bucket under another endpoint"
    assert read(**s3.options(counted=True)) == 0
    key = {**s3.options(counted=True), "client_kwargs": {"region_name": "us-east-1"}}
    assert read(**key) == 0, "with another client of the same endpoint"


def test_what_may_no_longer_be_read_is_not_read_from_what_is_kept(s3: S3, folder: Path) -> None:
    url = f"s3://team/{uuid.uuid4().hex}/acts"
    lz.open_store(url).write(GROUP, make_batch(["a", "b"]))
    lz.open_store(url, "r", cache="1 GB", cache_folder=folder).dataset().resid_mean.values  # noqa: B018
    assert entries(folder)
    with pytest.raises(AccessDeniedError):
        lz.open_store(url, "r", storage_options=s3.options({"anon": True}), cache="1 GB", cache_folder=folder)


def test_no_secret_and_no_address_is_in_the_folder(s3: S3, folder: Path) -> None:
    url = f"s3://team/{uuid.uuid4().hex}/acts"
    lz.open_store(url).write(GROUP, make_batch(["a", "b"]))
    options = s3.options()
    lz.open_store(url, "r", storage_options=options, cache="1 GB", cache_folder=folder).dataset().load()
    held = b"".join(str(path).encode() + path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert not [text for text in (options["key"], options["secret"], url) if text.encode() in held]


# ------------------------------------------------------------------------------------------------------------- processes


def _read_for(root: Path, folder: Path, size: str, seed: int, seconds: float) -> int:
    dice, until, count = random.Random(seed), time.monotonic() + seconds, 0
    while time.monotonic() < until:
        store, _ = session(root, folder, size)
        for name in dice.sample(list(READS), 4):
            read_all(store, [name])
            count += 1
    return count


@pytest.mark.few(1)
@pytest.mark.parametrize("size", ["1 GB", "1 MB"])
def test_processes_that_share_a_folder_read_right_values_while_it_is_damaged_and_cleared(tmp_path: Path, folder: Path, size: str) -> None:
    write_part(tmp_path / "acts", "shards")
    dice = random.Random(0)
    with FORK.Pool(3) as pool:
        found = pool.starmap_async(_read_for, [(tmp_path / "acts", folder, size, seed, 1.5) for seed in range(3)])
        while not found.ready():
            for path in dice.sample(held, min(3, len(held))) if (held := entries(folder)) else ():
                try:
                    _change(path, dice.randrange(path.stat().st_size))
                except (OSError, ValueError, IndexError):
                    continue  # gone meanwhile
            if dice.random() < 0.05:
                lz.clear_read_cache(folder)
            time.sleep(0.01)
        assert min(found.get()) > 5


def test_a_reader_that_is_killed_at_any_moment_leaves_nothing_wrong(tmp_path: Path, folder: Path) -> None:
    write_part(tmp_path / "acts", "blocks")
    for kill in range(6):
        child = FORK.Process(target=_read_for, args=(tmp_path / "acts", folder, "2 MB", kill, 60.0))
        child.start()
        time.sleep(0.03 + 0.07 * kill)
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
        read_all(session(tmp_path / "acts", folder)[0])


def test_a_store_that_is_pickled_keeps_its_cache(tmp_path: Path, folder: Path) -> None:
    write_part(tmp_path / "acts", "blocks")
    store, _ = session(tmp_path / "acts", folder)
    assert pickle.loads(pickle.dumps(store.catalog.reads)) == store.catalog.reads  # noqa: S301 — made above
    array = store.view(store.find_group()).source("tokens", "resid", np.arange(PROMPTS), (0,), COUNTS).arrays[0]
    again = array.__reduce__()[0](*array.__reduce__()[1])
    assert again.kept == array.kept
    assert again.where.__reduce__()[1][-1] == array.kept
    assert store.catalog.__reduce__()[1][-1] == store.catalog.reads
    assert lz.open_store(store).catalog.reads == store.catalog.reads


def test_a_cache_that_cannot_be_written_is_a_log_and_reading_goes_on(
    filled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    store, counted = session(filled, tmp_path / "file" / "reads")
    read_all(store)
    read_all(store)
    assert beyond_documents(counted)
    logged = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(logged) == 1
    assert "reading goes on" in logged[0]


# -------------------------------------------------------------------------------------------------------------- settings


def test_the_size_and_the_folder_come_from_the_call_or_the_environment(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMPROBE_CACHE_DIR", str(tmp_path / "cache"))
    config.reload()
    counted = Counted(LocalStorage(tmp_path / "acts"), slow=True)
    write_part(tmp_path / "acts", "blocks")
    assert lz.open_store(counted).catalog.reads is None
    assert str(lz.open_store(counted, cache="1.5 kb").catalog.reads) == (
        f"ReadCache(folder='{tmp_path}/cache/.lmprobe-zarr/reads', limit=1536)"
    )
    monkeypatch.setenv("LMPROBE_READ_CACHE", "64 GB")
    monkeypatch.setenv("LMPROBE_READ_CACHE_DIR", str(folder))
    config.reload()
    found = lz.open_store(counted).catalog.reads
    assert found is not None
    assert (found.folder, found.limit) == (str(folder), 64 * 2**30)
    assert lz.open_store(counted, cache=0).catalog.reads is None
    other = lz.open_store(counted, cache="2TiB", cache_folder=tmp_path / "other").catalog.reads
    assert other is not None
    assert (other.folder, other.limit) == (str(tmp_path / "other"), 2**41)
    assert lz.open_store(lz.open_store(counted, cache=0)).catalog.reads == found
    monkeypatch.setenv("LMPROBE_READ_CACHE", "64")
    config.reload()
    with pytest.raises(InvalidArgumentError, match=r"LMPROBE_READ_CACHE is '64'"):
        lz.open_store(counted)


@pytest.mark.parametrize("size", ["64", 64, "64 G", "-1 GB", "GB", "many", "", True, "1e3 GB", float("nan")])
def test_what_is_no_size_is_refused(tmp_path: Path, size: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="is no size"):
        lz.open_store(tmp_path / "acts", cache=size)


def test_a_folder_that_is_a_url_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="folder of this machine"):
        lz.open_store(tmp_path / "acts", cache="1 GB", cache_folder="s3://bucket/reads")


# ------------------------------------------------------------------------------------------------------- info and clear


def test_cache_info_counts_what_is_kept_and_clear_removes_it(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LMPROBE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("LMPROBE_READ_CACHE", "2 GB")
    monkeypatch.setenv("LMPROBE_READ_CACHE_DIR", str(folder))
    config.reload()
    write_part(tmp_path / "acts", "blocks")
    new_process()
    read_all(lz.open_store(Counted(LocalStorage(tmp_path / "acts"), slow=True)))
    nbytes = sum(-(-path.stat().st_size // 4096) * 4096 for path in entries(folder))
    reads = lz.cache_info().reads
    assert reads is not None
    assert (reads.folder, reads.size_bytes, reads.entries, reads.limit_bytes) == (str(folder), nbytes, len(entries(folder)), 2 * 2**30)
    assert str(folder) in str(lz.cache_info())
    assert str(folder) in lz.cache_info()._repr_html_()
    assert lz.cache_info(store=tmp_path / "acts").reads is None
    assert call_json(capsys, "cache", "info")["reads"] == {
        "folder": str(folder), "size_bytes": nbytes, "entries": len(entries(folder)), "limit_bytes": 2 * 2**30
    }  # fmt: skip
    assert str(folder) in call(capsys, "cache", "info")[1]
    assert f"{nbytes} bytes of what was read of remote stores remain" in call(capsys, "clear", "--yes")[1]
    assert call(capsys, "clear", "--reads", "--model", "acme/toy")[0] == 1
    assert call_json(capsys, "clear", "--reads") == {"reads_bytes": nbytes}
    assert entries(folder) == []
    assert lz.clear_read_cache() == 0
    assert call(capsys, "clear", "--reads")[1].startswith("0 bytes")
