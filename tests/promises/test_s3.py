"""Stores on a real S3 server: what they cost in requests, what they say when it fails, and many processes on one of them."""

from __future__ import annotations

import itertools
import json
import logging
import os
import pickle
import subprocess
import sys
import threading
import time
import traceback
import uuid
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest
import xarray as xr
from command_line import call_json
from paths import SUPPORT
from s3_server import ADMIN, ANON, GETTER, READER, S3, Fault, Request
from stores import GROUP, make_batch
from tiny_models import SharedModels
from warmed import Warmed

import lmprobe_zarr as lz
from lmprobe_zarr import errors
from lmprobe_zarr.batch import TokenBatch
from lmprobe_zarr.errors import AccessDeniedError, AlreadyCommittedError, ReadOnlyError, StoreNotFoundError, UnreachableError
from lmprobe_zarr.storage import remote, s3_obstore, s3_uploads
from lmprobe_zarr.storage.open import open_storage
from lmprobe_zarr.storage.s3 import S3Storage
from lmprobe_zarr.store.format import GroupInfo
from lmprobe_zarr.store.parts import writer
from lmprobe_zarr.store.store import Store

# One try of botocore's, and of s3fs's where a test sets it: what is tested is what comes after them.
QUICK: dict[str, Any] = {"config_kwargs": {"retries": {"total_max_attempts": 1}}}
WRITES = ("PUT", "POST", "DELETE")
CLIENTS = pytest.mark.parametrize("client", ["s3fs", "obstore"])


@pytest.fixture
def url(s3: S3) -> str:
    return f"s3://pub/{uuid.uuid4().hex}/acts"


PARTS = [make_batch([f"prompt {i}" for i in range(100 * part, 100 * (part + 1))], seed=part) for part in range(10)]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten parts of a hundred prompts each, one chunk per layer and part."""
    folder = tmp_path_factory.mktemp("filled") / "acts"
    fill(str(folder))
    return folder


@pytest.fixture
def filled(s3: S3, url: str, local: Path) -> str:
    """The same on the server, its files sent by the client that takes the least time for it."""
    return upload(s3, local, url)


def upload(s3: S3, folder: Path, url: str) -> str:
    storage = lz.open_store(url, storage_options=s3.options(client="obstore")).storage
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: storage.write(name, (folder / name).read_bytes(), durable=True), names))
    return url


@pytest.fixture
def kept(s3: S3, local: Path, once: list[str]) -> str:
    """The same, written once, for tests that only read and count no requests: chunks that were read stay in memory."""
    if not once:
        once.append(upload(s3, local, f"s3://pub/{uuid.uuid4().hex}/acts"))
        s3.proxy.reset()
    return once[0]


@pytest.fixture(scope="module")
def once() -> list[str]:
    return []


def fill(url: str) -> str:
    store = lz.open_store(url, durable=False)
    for batch in PARTS:
        store.write(GROUP, batch)
    return url


def counted(s3: S3, url: str, identity: dict[str, Any] | None = None, mode: Any = "r", **more: Any) -> Store:
    return lz.open_store(url, mode, storage_options=s3.options(identity, counted=True, **more))


# --------------------------------------------------------------------------------------------------------------- requests


def test_a_model_is_opened_and_a_layer_read_in_one_get_per_part_and_chunk_and_five_more(s3: S3, filled: str) -> None:
    s3.proxy.fault = lambda request: Fault(delay=0.05)
    data = counted(s3, filled).dataset("acme/toy")
    values = data.resid_mean.sel(layer=1).values
    kinds = s3.proxy.kinds()
    assert kinds["HEAD"] == 0
    assert kinds["GET"] == 10 + 10 + 2, "the root's document and the group's"
    assert kinds["LIST"] == 3
    assert kinds.total() <= 10 + 10 + 5
    assert s3.proxy.most_at_once >= 8, "in parallel"
    np.testing.assert_array_equal(values, np.concatenate([batch.prompts["resid_mean"][1] for batch in PARTS]))


def test_an_epoch_of_batches_costs_one_get_per_chunk_of_the_layer(s3: S3, filled: str) -> None:
    tokens = counted(s3, filled).tokens("acme/toy")
    s3.proxy.reset()
    found = np.concatenate(list(tokens.lz.batches(layer=1, batch_tokens=64, buffer_tokens=300)))
    assert dict(s3.proxy.kinds()) == {"GET": 10}, "one chunk of each part"
    expected = np.concatenate([batch.tokens["resid"][1] for batch in PARTS])
    np.testing.assert_array_equal(found[np.lexsort(found.T)], expected[np.lexsort(expected.T)])
    s3.proxy.reset()
    tokens.lz.statistics(layer=1)
    assert dict(s3.proxy.kinds()) == {"GET": 10}


def test_one_prompt_over_all_layers_and_two_layers_cost_one_get_per_chunk(s3: S3, filled: str) -> None:
    tokens = counted(s3, filled).tokens("acme/toy")
    s3.proxy.reset()
    tokens.resid.sel(prompt=lz.prompt_hash("prompt 512")).values  # noqa: B018
    assert dict(s3.proxy.kinds()) == {"GET": 3}, "three layers of one part"
    s3.proxy.reset()
    tokens.resid.sel(layer=[0, 3]).values  # noqa: B018
    assert dict(s3.proxy.kinds()) == {"GET": 20}


Values = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def local_wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Values]:
    """A part whose chunks of 4 MiB have 64 blocks each: 16 layers of 3,000 tokens × 1,024 in float16; and its values."""
    rng = np.random.default_rng(0)
    counts = rng.integers(5, 128, 46)
    values = rng.standard_normal((16, int(counts.sum()), 1024)).astype(np.float16)
    digests = [lz.prompt_hash(f"prompt {i}").ljust(64, "0") for i in range(len(counts))]
    group = GroupInfo(model="acme/wide", num_layers=16, hidden_size=1024)
    folder = tmp_path_factory.mktemp("wide") / "acts"
    batch = TokenBatch(sha256=digests, n_tokens=counts, layers=tuple(range(16)), tokens={"resid": values})
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(writer, "CHUNK_BYTES", writer.REMOTE_CHUNK_BYTES)
        lz.open_store(folder, durable=False).write(group, batch)
    return folder, (values, np.concatenate([[0], np.cumsum(counts)]))


@pytest.fixture
def wide(s3: S3, url: str, local_wide: tuple[Path, Values]) -> tuple[str, Values]:
    folder, values = local_wide
    return upload(s3, folder, url), values


def test_one_prompt_over_sixteen_layers_costs_a_range_of_each_and_one_table(s3: S3, wide: tuple[str, Values]) -> None:
    url, (values, bounds) = wide
    resid = counted(s3, url).tokens("acme/wide").resid
    nbytes = {}
    for prompt in (3, 40):
        rows = slice(*bounds[prompt : prompt + 2])
        s3.proxy.reset()
        np.testing.assert_array_equal(resid.isel(token=rows).values, values[:, rows])
        nbytes[prompt] = s3.proxy.bytes_sent
        # The table of blocks is read once.
        assert dict(s3.proxy.kinds()) == {"GET": 16 + (prompt == 3)}
    block, row = 2**16, 2048
    for prompt, sent in nbytes.items():
        needed = 16 * (int(np.diff(bounds)[prompt]) * row + block)
        assert sent < 1.3 * needed + 2**16, "the blocks that hold its rows, the table, and headers"


def test_scattered_tokens_cost_their_blocks_and_a_whole_layer_never_reads_that_table(s3: S3, wide: tuple[str, Values]) -> None:
    url, (values, _) = wide
    resid = counted(s3, url).tokens("acme/wide").resid
    s3.proxy.reset()
    np.testing.assert_array_equal(resid.isel(layer=2).values, values[2])
    assert not [request for request in s3.proxy.requests if "block_table" in request.path]
    rows = np.array([10, 11, 1500, 2700])
    s3.proxy.reset()
    np.testing.assert_array_equal(resid.isel(layer=5, token=rows).values, values[5, rows])
    blocks = [request for request in s3.proxy.requests if "resid/c." in request.path]
    assert 3 <= len(blocks) <= 4, "rows that are neighbours lie in one or two blocks, which are one range"
    assert s3.proxy.bytes_sent < 6 * 2**16 + 2**17


@pytest.mark.few(1)
@pytest.mark.parametrize("shards", [False, True])
def test_a_published_copy_reads_ranges_of_few_large_objects(s3: S3, wide: tuple[str, Values], shards: bool) -> None:
    url, (values, bounds) = wide
    copy = f"{url}-copy"
    lz.open_store(url, "r").publish(copy, shards=shards, progress=False)
    store = counted(s3, copy)
    (info,) = [part.info.arrays["tokens/resid"] for part in store.catalog.view(*store.catalog.groups().values()).parts]
    assert len(info.file_names()) == 16 * (1 if shards else 2)
    resid = store.tokens("acme/wide").resid
    s3.proxy.reset()
    rows = slice(*bounds[20:22])
    np.testing.assert_array_equal(resid.isel(token=rows).values, values[:, rows])
    assert dict(s3.proxy.kinds()) == {"GET": 17}
    np.testing.assert_array_equal(resid.values, values)


def test_cache_info_costs_one_get_per_part_and_seven_more(s3: S3, filled: str) -> None:
    store = counted(s3, filled)
    info = lz.cache_info(store=store)
    assert info.models[0].num_prompts == 1000
    kinds = s3.proxy.kinds()
    assert (kinds["GET"], kinds["HEAD"]) == (10 + 2, 0)
    assert kinds.total() <= 10 + 7


def test_ten_thousand_lookups_cost_nothing(s3: S3, kept: str) -> None:
    store = counted(s3, kept)
    view = store.view(store.find_group("acme/toy"))
    s3.proxy.reset()
    began = time.perf_counter()
    rows = view.select([f"prompt {i % 1000}" for i in range(10_000)])
    assert rows.tolist() == list(np.arange(10_000) % 1000)
    assert time.perf_counter() - began < 5
    assert s3.proxy.kinds().total() == 0


def test_every_verb_costs_one_request(s3: S3, url: str) -> None:
    storage = open_storage(url, s3.options(counted=True))
    assert isinstance(storage, S3Storage)

    def costs(**expected: int) -> None:
        assert dict(s3.proxy.kinds()) == expected
        s3.proxy.reset()

    storage.write("g/a", b"1", durable=True)
    costs(PUT=1)
    storage.commit("g/p/zarr.json", b"2", durable=True, replace=False)
    costs(PUT=1)
    assert storage.read("g/a") == b"1"
    costs(GET=1)
    assert storage.is_file("g/a")
    costs(HEAD=1)
    assert not storage.is_file("g")
    costs(HEAD=1)
    assert list(storage.scan("g")) == ["a", "p"]
    costs(LIST=1)
    assert storage.scan("nowhere") == {}
    costs(LIST=1)
    storage.remove([f"g/{i}" for i in range(1200)])
    costs(POST=2)
    storage.remove_tree("g")
    costs(LIST=1, POST=1)
    with pytest.raises(FileNotFoundError):
        storage.read("g/a")


@pytest.mark.long
def test_long_folders_are_listed_page_by_page(s3: S3, url: str) -> None:
    storage = open_storage(url, s3.options(counted=True))
    names = [f"{i:04}" for i in range(1100)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: storage.touch(f"g/{name}"), names))
    s3.proxy.reset()
    assert storage.list("g") == names
    assert s3.proxy.kinds()["LIST"] == 2
    storage.remove_tree("g")
    assert storage.list("g") == []


def test_a_file_system_that_caches_is_chained_before(s3: S3, filled: str, tmp_path: Path) -> None:
    options = {"simplecache": {"cache_storage": str(tmp_path / "cache")}, "s3": s3.options(counted=True)}
    totals = []
    for _ in range(2):
        s3.proxy.reset()
        store = lz.open_store(f"simplecache::{filled}", "r", storage_options=options)
        assert np.isfinite(store.dataset().resid_mean.sel(layer=1).values).all()
        totals.append(s3.proxy.kinds())
    assert totals[0]["GET"] == 22
    assert totals[1]["GET"] == 0, "all of it comes from the local copies"
    assert totals[1]["LIST"] <= 3


# ---------------------------------------------------------------------------------------------------- far away, and obstore


@pytest.mark.few(1)
@CLIENTS
def test_a_model_is_opened_and_a_layer_read_in_three_rounds_of_requests(s3: S3, filled: str, client: str) -> None:
    assert len(counted(s3, filled, client=client).models()) == 1  # makes the client, which looks for credentials
    s3.proxy.reset()
    wait, arrived, lock = 1.5, list[tuple[float, str]](), threading.Lock()

    def slow(request: Request) -> Fault:
        with lock:
            arrived.append((time.monotonic(), f"{request.kind} {request.path.rpartition('/')[2]}"))
        return Fault(delay=wait)

    s3.proxy.fault = slow
    data = counted(s3, filled, client=client).dataset("acme/toy")
    np.testing.assert_array_equal(data.resid_mean.sel(layer=1).values, np.concatenate([batch.prompts["resid_mean"][1] for batch in PARTS]))
    # A request that waits for the answer to another comes at least so much later.
    rounds: list[list[str]] = []
    last = -wait
    for when, what in sorted(arrived):
        if when - last >= wait * 0.9:
            rounds.append([])
            last = when
        rounds[-1].append(what)
    assert len(rounds) == 3, rounds
    assert sorted(what.split()[0] for what in rounds[0]) == ["GET", "LIST"]
    assert len([what for what in rounds[1] if what == "GET zarr.json"]) == 11, "the group's and the parts' documents"
    assert len(rounds[2]) == 10, "a chunk of each part"


def test_what_was_committed_or_removed_since_a_store_was_opened_is_seen(s3: S3, filled: str) -> None:
    store = lz.open_store(filled, "r")
    other = lz.open_store(filled)
    other.write(GROUP, make_batch(["one more"], seed=99))
    assert store.dataset("acme/toy").sizes["prompt"] == 1001
    store = lz.open_store(filled, "r")
    other.compact(progress=False)
    other.gc(max_age=0)
    assert store.dataset("acme/toy").sizes["prompt"] == 1001
    store = lz.open_store(filled, "r")
    lz.clear_cache(url=other)
    with pytest.raises(errors.ModelNotStoredError):
        store.dataset("acme/toy")


def test_of_several_models_only_the_one_that_is_read_is_requested(s3: S3, filled: str) -> None:
    for name in ("acme/other", "acme/third"):
        lz.open_store(filled).write(GroupInfo(model=name, num_layers=4, hidden_size=8), make_batch(["a", "b"], seed=5))
    data = counted(s3, filled).dataset("acme/third")
    np.testing.assert_array_equal(data.resid_mean.values, make_batch(["a", "b"], seed=5).prompts["resid_mean"])
    requests = [request.path for request in s3.proxy.requests if request.kind == "GET" and request.path.count("/") == 6]
    assert requests
    assert not [path for path in requests if "third" not in path], "no document of a part of another model"
    assert s3.proxy.kinds()["LIST"] <= 4


def test_who_may_not_list_is_told_so_where_a_list_is_needed(s3: S3, kept: str) -> None:
    store = lz.open_store(kept, "r", storage_options=s3.options(GETTER))
    with pytest.raises(AccessDeniedError, match="cannot be listed"):
        store.dataset("acme/toy")


def test_both_clients_read_the_same_and_writing_is_the_same(s3: S3, kept: str, url: str) -> None:
    found = [lz.open_store(kept, storage_options=s3.options(client=client)).tokens().resid.values for client in ("s3fs", "obstore")]
    np.testing.assert_array_equal(found[0], found[1])
    store = lz.open_store(f"{url}-obstore", storage_options=s3.options(client="obstore"))
    store.write(GROUP, make_batch(["a", "b"], seed=3))
    store.write(GROUP, make_batch(["b", "c"], seed=4))
    store.compact(progress=False)
    store.delete("acme/toy", ["a"])
    assert store.verify().problems == ()
    assert lz.open_store(f"{url}-obstore").dataset().text.values.tolist() == ["b", "c"]


@CLIENTS
def test_every_request_says_that_the_reader_pays_where_that_was_asked_for(s3: S3, url: str, client: str) -> None:
    storage = open_storage(url, s3.options(counted=True, client=client, requester_pays=True))
    storage.commit("a", b"1234567890", durable=True, replace=False)
    with storage.open_pieces("large", durable=True) as writer:
        writer.append(bytes(s3_uploads.PART_BYTES + 1))
    assert storage.read("a") == b"1234567890"
    assert [bytes(data) for data in storage.read_ranges("a", [(2, 4)])] == [b"34"]
    assert storage.is_file("a")
    assert set(storage.scan("")) == {"a", "large"}
    storage.remove(["a", "large"])
    assert storage.list("") == []
    assert {"GET", "PUT", "POST", "HEAD", "LIST"} <= set(s3.proxy.kinds())
    assert {request.payer for request in s3.proxy.requests} == {"requester"}


def test_obstore_is_chosen_for_s3_alone_and_refuses_what_it_lacks(s3: S3, url: str, tmp_path: Path) -> None:
    for place, options, says in (
        ("memory://acts", {"client": "obstore"}, "s3:// only"),
        (url, {"client": "boto"}, "'boto'"),
        (url, s3.options(client="obstore", s3_additional_kwargs={"SSECustomerAlgorithm": "AES256"}), "s3_additional_kwargs"),
        (url, s3.options(client="obstore", client_kwargs={"verify": str(tmp_path)}), "verify"),
    ):
        with pytest.raises(errors.InvalidArgumentError, match=says):
            open_storage(place, options)


# ----------------------------------------------------------------------------------------------------------- credentials


OPENS = "import sys, lmprobe_zarr as lz; print(lz.open_store(sys.argv[1], 'r').dataset().sizes['prompt'])"


def opened_elsewhere(warmed: Warmed, url: str, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    done = warmed.run(OPENS, url, env={**kept, **environment})
    return done.stdout + done.stderr


def test_credentials_come_from_the_environment_and_from_a_profile(s3: S3, url: str, warmed: Warmed, tmp_path: Path) -> None:
    lz.open_store(url).write(GROUP, make_batch(["a", "b"]))
    place = {"AWS_ENDPOINT_URL": s3.endpoint, "AWS_EC2_METADATA_DISABLED": "true"}
    keys = {"AWS_ACCESS_KEY_ID": READER["key"], "AWS_SECRET_ACCESS_KEY": READER["secret"]}
    assert opened_elsewhere(warmed, url, **place, **keys) == "2\n"
    profile = tmp_path / "credentials"
    profile.write_text(f"[lab]\naws_access_key_id = {READER['key']}\naws_secret_access_key = {READER['secret']}\n")
    variables = {"AWS_SHARED_CREDENTIALS_FILE": str(profile), "AWS_PROFILE": "lab"}
    assert opened_elsewhere(warmed, url, **place, **variables) == "2\n"


FAILURES: dict[str, tuple[type[Exception], dict[str, Any], Fault | None, str]] = {
    "wrong bucket": (StoreNotFoundError, {}, None, "bucket that is not there"),
    "impossible bucket": (errors.InvalidArgumentError, {}, None, "no possible place"),
    "unknown key": (AccessDeniedError, {"key": "nobodys-key"}, None, "check key and secret"),
    "wrong secret": (AccessDeniedError, {"key": ADMIN["key"]}, None, "check key and secret"),
    "expired token": (AccessDeniedError, {"token": "SESAME-token"}, Fault(status=400, code="ExpiredToken"), "expired"),
    "invalid token": (AccessDeniedError, {"token": "SESAME-token"}, Fault(status=400, code="InvalidToken"), "new credentials"),
    "wrong clock": (AccessDeniedError, {}, Fault(status=403, code="RequestTimeTooSkewed"), "clock"),
    "another region": (UnreachableError, {}, Fault(status=400, code="AuthorizationHeaderMalformed"), "region"),
    "no permission": (AccessDeniedError, {}, Fault(status=403, code="AccessDenied"), "cannot be read"),
    "no such profile": (AccessDeniedError, {"profile": "nobody"}, None, "needs credentials"),
    "overloaded": (UnreachableError, {}, Fault(status=503, code="SlowDown"), "overloaded"),
    "broken": (UnreachableError, {}, Fault(status=500, code="InternalError"), "status 500"),
    "unreachable": (UnreachableError, {"endpoint_url": "http://127.0.0.1:9"}, None, "does not answer"),
}


@pytest.mark.few(13)
@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize("mode", ["r", "a"])
@CLIENTS
def test_failed_requests_raise_one_of_our_errors_without_a_secret(
    s3: S3,
    client: str,
    name: str,
    mode: Any,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import s3fs

    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setattr(s3_obstore, "_TRIES", {"max_retries": 0})
    if client == "obstore":
        monkeypatch.setattr(remote, "_WAITS", (0.01,))
    kind, given, fault, says = FAILURES[name]
    caplog.set_level(logging.DEBUG, "lmprobe_zarr")
    place = {"wrong bucket": "s3://no-such-bucket/acts", "impossible bucket": "s3://no bucket/acts"}.get(name, "s3://pub/acts")
    identity = ADMIN if fault is not None or "bucket" in name else {"key": "nobodys-key", "secret": "SESAME-secret"}
    if "profile" in given:
        identity = {}
    options = {**s3.options(identity, counted=True), **QUICK, **given, "client": client}
    if fault is not None:
        s3.proxy.fault = lambda request: fault
    with pytest.raises(kind, match=says) as caught:
        lz.open_store(place, mode, storage_options=options).models()
    message = str(caught.value)
    assert place in message
    assert len(message.splitlines()) <= 2
    seen = "".join(traceback.format_exception(caught.value)) + repr(caught.value) + caplog.text + "".join(capfd.readouterr())
    store = Store(open_storage(place, options))
    seen += repr(store.storage) + str(store.storage) + object.__repr__(store) + store.url
    for secret in ("SESAME", ADMIN["secret"]):
        assert secret not in seen


def test_a_wrong_bucket_is_no_empty_cache(s3: S3) -> None:
    for look in (
        lambda: lz.cache_info(store="s3://no-such-bucket/acts"),
        lambda: lz.discover_cached("m", "a", store="s3://no-such-bucket/acts"),
        lambda: lz.clear_cache(url="s3://no-such-bucket/acts"),
    ):
        with pytest.raises(StoreNotFoundError, match="bucket that is not there"):
            look()
    assert lz.cache_info(store="s3://pub/nothing/here").models == ()


@pytest.mark.few(1)
@CLIENTS
def test_the_error_names_missing_credentials(s3: S3, client: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(AccessDeniedError, match="'anon': True"):
        lz.open_store("s3://pub/acts", "r", storage_options={"endpoint_url": s3.proxy.endpoint, "client": client})


def test_user_and_password_in_a_url_are_not_shown() -> None:
    storage = open_storage("https://user:SESAME@example.org/acts?X-Amz-Signature=SESAME")
    assert "SESAME" not in repr(storage) + storage.url


def test_the_error_names_the_missing_permission_to_list(s3: S3, url: str) -> None:
    lz.open_store(url).write(GROUP, make_batch(["a"]))
    store = lz.open_store(url, "r", storage_options=s3.options(GETTER))
    with pytest.raises(AccessDeniedError, match="cannot be listed"):
        store.models()


def test_the_error_names_the_missing_permission_to_delete(s3: S3, url: str) -> None:
    lz.open_store(url).write(GROUP, make_batch(["a"]))
    with pytest.raises(ReadOnlyError, match="may delete"):
        open_storage(url, s3.options(READER)).remove(["zarr.json"])
    with pytest.raises(ReadOnlyError, match="cannot be written"):
        lz.open_store(url, storage_options=s3.options(READER)).write(GROUP, make_batch(["b"]))
    assert lz.open_store(url).dataset().sizes["prompt"] == 1


# ---------------------------------------------------------------------------------------------------------------- faults


def first_times(times: int, fault: Fault, method: str = "GET") -> Any:
    seen: dict[Request, int] = {}

    def decide(request: Request) -> Fault | None:
        if request.method != method:
            return None
        seen[request] = seen.get(request, 0) + 1
        return fault if seen[request] <= times else None

    return decide


@pytest.mark.few(1)
@pytest.mark.parametrize("fault", [Fault(status=503, code="SlowDown"), Fault(cut=20), Fault(lose_answer=True)], ids=repr)
@CLIENTS
def test_a_fault_that_passes_is_not_noticed(s3: S3, url: str, client: str, fault: Fault) -> None:
    batch = make_batch(["a", "b"])
    lz.open_store(url).write(GROUP, batch)
    s3.proxy.fault = first_times(2, fault)
    data = counted(s3, url, client=client).dataset()
    np.testing.assert_array_equal(data.resid_mean.values, batch.prompts["resid_mean"])


def test_answers_that_are_always_cut_short_are_an_error(s3: S3, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setattr(remote, "_WAITS", (0.01, 0.01))  # so that a refusal for ever is soon found out
    lz.open_store(url).write(GROUP, make_batch(["a", "b"]))
    data = counted(s3, url, **QUICK).dataset()
    s3.proxy.fault = lambda request: Fault(cut=20)
    with pytest.raises(UnreachableError, match="cut short"):
        _ = data.resid_mean.values
    assert s3.proxy.kinds()["GET"] > 3, "tried again before that"


def test_a_commit_whose_answer_was_lost_is_a_success(s3: S3, url: str) -> None:
    storage = open_storage(url, s3.options(counted=True))
    s3.proxy.fault = first_times(1, Fault(lose_answer=True), "PUT")
    storage.commit("g/p/zarr.json", b"{}", durable=True, replace=False)
    assert s3.proxy.kinds()["PUT"] >= 2
    s3.proxy.fault = first_times(1, Fault(status=503, code="SlowDown"), "PUT")
    storage.commit("g/q/zarr.json", b"{}", durable=True, replace=False)
    s3.proxy.fault = first_times(1, Fault(status=409, code="ConditionalRequestConflict"), "PUT")
    storage.commit("g/r/zarr.json", b"{}", durable=True, replace=False)
    assert [storage.read(f"g/{part}/zarr.json") for part in "pqr"] == [b"{}"] * 3


def test_on_a_server_without_conditional_writes_existence_is_checked_first(s3: S3, url: str) -> None:
    storage = open_storage(url, s3.options(counted=True))
    decide = first_times(1, Fault(status=501, code="NotImplemented"), "PUT")
    s3.proxy.fault = decide
    storage.commit("g/p/zarr.json", b"1", durable=True, replace=False)
    assert storage.read("g/p/zarr.json") == b"1"
    s3.proxy.fault = lambda request: Fault(status=501, code="NotImplemented") if request.method == "PUT" else None
    with pytest.raises(AlreadyCommittedError):
        storage.commit("g/p/zarr.json", b"2", durable=True, replace=False)
    assert storage.read("g/p/zarr.json") == b"1"


# ------------------------------------------------------------------------------------------------------------- read only


@pytest.mark.few(1)
@pytest.mark.parametrize("identity", [READER, ANON], ids=["reader", "anonymous"])
def test_reading_writes_nothing(s3: S3, url: str, identity: dict[str, Any]) -> None:
    writer = lz.open_store(url)
    batch = make_batch(["a", "b"])
    writer.write(GROUP, batch)
    writer.annotate("acme/toy", {"label": {"a": 1, "b": 0}})
    store = counted(s3, url, identity)
    assert store.models() == ["acme/toy"]
    np.testing.assert_array_equal(store.dataset().resid_mean.values, batch.prompts["resid_mean"])
    np.testing.assert_array_equal(store.tokens().resid.values, batch.tokens["resid"])
    assert store.dataset().label.values.tolist() == [1, 0]
    assert store.coverage().any()
    assert "acme/toy" in repr(store)
    assert lz.cache_info(store=store).models[0].num_prompts == 2
    found = lz.discover_cached("acme/toy", "a", store=store)
    assert found is not None
    assert found.pooled["mean"] == [0, 1, 3]
    assert len(lz.list_cached_prompts("acme/toy", store=store)) == 2
    options = s3.options(identity, counted=True)
    data = xr.open_dataset(url, engine="lmprobe_zarr", model="acme/toy", storage_options=options)
    np.testing.assert_array_equal(data.resid_mean.values, batch.prompts["resid_mean"])
    assert len(xr.open_datatree(url, engine="lmprobe_zarr", storage_options=options).leaves) == 2
    for write in (
        lambda: store.write(GROUP, batch),
        lambda: store.annotate("acme/toy", {"label": {"a": 3}}),
        lambda: store.delete("acme/toy", ["a"]),
        lambda: lz.evict(store, max_gb=0),
        lambda: lz.clear_cache(url=store),
    ):
        with pytest.raises(ReadOnlyError):
            write()
    store.mark_used(store.view(store.find_group()).parts)
    assert not [request for request in s3.proxy.requests if request.method in WRITES]


def test_the_command_line_opens_a_public_bucket_without_credentials(
    s3: S3, filled: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fsspec.config.conf", {})
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "wrong")
    access = ("--anon", "--storage-options", json.dumps({"endpoint_url": s3.endpoint}))
    (group,) = call_json(capsys, "info", filled, *access)["groups"]
    assert (group["model"], group["prompts"]) == ("acme/toy", 1000)


# ------------------------------------------------------------------------------------------------- sharing and upkeep


@pytest.mark.few(1)
@pytest.mark.parametrize("identity", [GETTER, ANON], ids=["who may not list", "anonymous"])
def test_a_published_copy_is_read_without_listing(s3: S3, filled: str, identity: dict[str, Any]) -> None:
    store = lz.open_store(filled)
    summary = store.publish(f"{filled}-published", progress=False)
    assert summary.parts == 1
    assert summary.prompts == 1000
    copy = counted(s3, f"{filled}-published", identity, mode=None)
    assert copy.mode == "r"
    values = copy.dataset("acme/toy").resid_mean.sel(layer=1).values
    np.testing.assert_array_equal(values, np.concatenate([batch.prompts["resid_mean"][1] for batch in PARTS]))
    kinds = s3.proxy.kinds()
    assert kinds.pop("LIST") == 1, "requested with the root, before it is known what the root is; it may be refused"
    assert set(kinds) == {"GET"}
    assert kinds["GET"] <= 5, "root, group, the one part, its chunk"
    with pytest.raises(ReadOnlyError, match="published"):
        counted(s3, f"{filled}-published", ADMIN, mode="a")
    storage = lz.open_store(f"{filled}-published").storage
    for name in ("README.md", "index.html"):
        written = storage.read(name).decode()
        assert "acme/toy" in written
        assert f"{filled}-published" in written, "the line that opens it"
        assert not any(secret in written for account in (ADMIN, READER, GETTER) for secret in (account["key"], account["secret"]))
    inner: Any = open_storage(f"{filled}-published")
    head = inner.filesystem.call_s3("head_object", **inner.object_of("index.html"))
    assert head["ContentType"] == "text/html; charset=utf-8", "browsers save what has another type"


def test_parts_are_merged_and_the_old_ones_removed(s3: S3, filled: str) -> None:
    store = lz.open_store(filled)
    before = store.dataset("acme/toy").load()
    early = lz.open_store(filled, "r").dataset("acme/toy")
    plan = store.compact(progress=False)
    assert (plan.parts, plan.parts_after) == (10, 1)
    np.testing.assert_array_equal(early.resid_mean.values, before.resid_mean.values)
    assert store.gc(max_age=3600).replaced == (), "younger than that"
    assert len(store.gc(max_age=0).replaced) == 10
    assert len([name for name in store.storage.list(GROUP.name) if "." not in name]) == 0, "nor the folders that this server keeps"
    fresh = counted(s3, filled)
    xr.testing.assert_identical(fresh.dataset("acme/toy").load().drop_attrs(), before.drop_attrs())
    assert s3.proxy.kinds()["GET"] < 30
    assert len(fresh.view(fresh.find_group("acme/toy")).parts) == 1


@pytest.mark.long
def test_tokens_are_dropped_and_the_pooled_vectors_stay(s3: S3, filled: str) -> None:
    store = lz.open_store(filled)
    before = store.dataset("acme/toy").resid_mean.values
    assert store.drop("acme/toy", ["resid"]) == 10
    fresh = lz.open_store(filled, "r")
    np.testing.assert_array_equal(fresh.dataset("acme/toy").resid_mean.values, before)
    assert "resid" not in fresh.tokens("acme/toy")
    assert not any("/tokens/resid/" in key for key in fresh.storage.filesystem.find(fresh.storage.root))  # type: ignore[attr-defined]


def test_a_student_adds_to_what_the_team_has_and_pushes_it_up(s3: S3, url: str, tmp_path: Path) -> None:
    team = lz.open_store(url)
    team.write(GROUP, PARTS[0])
    both = lz.open_store([counted(s3, url, READER), tmp_path / "mine"])
    both.write(GROUP, PARTS[1])
    assert both.dataset("acme/toy").sizes["prompt"] == 200
    assert both.dataset("acme/toy").resid_mean.notnull().all()
    assert not [request for request in s3.proxy.requests if request.method in WRITES], "the team's bucket was only read"
    with pytest.raises(ReadOnlyError, match="only read"):
        both.delete("acme/toy", ["prompt 3"])
    summary = both.copy_to(url, progress=False)
    assert summary.copied == 1
    assert both.copy_to(url, progress=False).copied == 0, "once is enough"
    data = lz.open_store(url, "r").dataset("acme/toy")
    wanted = np.concatenate([batch.prompts["resid_mean"] for batch in PARTS[:2]], axis=1)
    np.testing.assert_array_equal(data.resid_mean.values, wanted)


# -------------------------------------------------------------------------------------------------------------- bad input


def test_foreign_objects_in_the_prefix_are_left_alone(s3: S3, url: str) -> None:
    store = lz.open_store(url)
    batch = make_batch(["a", "b"])
    store.write(GROUP, batch)
    foreign = [f"{GROUP.name}/notes.txt", "paper/draft.md", f"{GROUP.name}/0notapart/c.0", "readme.txt"]
    for key in foreign:
        store.storage.write(key, b"not ours", durable=False)
    fresh = lz.open_store(url)
    assert fresh.models() == ["acme/toy"]
    np.testing.assert_array_equal(fresh.dataset().resid_mean.values, batch.prompts["resid_mean"])
    fresh.compact(progress=False)
    fresh.gc(max_age=0)
    lz.clear_cache(url=fresh)
    assert all(fresh.storage.is_file(key) for key in foreign)


def test_a_committed_part_without_its_chunks_is_an_error_and_never_zeros(s3: S3, url: str) -> None:
    store = lz.open_store(url)
    part = store.write(GROUP, make_batch(["a", "b"]))
    store.storage.remove([f"{GROUP.name}/{part}/prompts/resid_mean/c.1.0.0"])
    data = lz.open_store(url, "r").dataset()
    assert np.isfinite(data.resid_mean.isel(layer=0).values).all(), "what is there can be read"
    with pytest.raises((errors.CorruptPartError, errors.PartGoneError), match=r"c\.1\.0\.0|chunk"):
        _ = data.resid_mean.isel(layer=1).values


@pytest.mark.few(1)
@pytest.mark.parametrize("hours", [-5, 5])
def test_a_writer_whose_clock_is_wrong_does_not_win_over_a_later_one(s3: S3, url: str, monkeypatch: pytest.MonkeyPatch, hours: int) -> None:
    real = time.time_ns
    first, second = (make_batch(["a"], seed=seed) for seed in (1, 2))
    with monkeypatch.context() as clock:
        clock.setattr("lmprobe_zarr.store.format.part_names.time.time_ns", lambda: real() + hours * 3600 * 10**9)
        lz.open_store(url).write(GROUP, first)
    with monkeypatch.context() as clock:
        clock.setattr("lmprobe_zarr.store.format.part_names.time.time_ns", lambda: real() - hours * 3600 * 10**9)
        lz.open_store(url).write(GROUP, second)
    data = lz.open_store(url, "r").dataset()
    np.testing.assert_array_equal(data.resid_mean.values, second.prompts["resid_mean"])


# ------------------------------------------------------------------------------------------------- processes and threads


def sum_of(store: Store, layer: int) -> float:
    return float(store.dataset().resid_mean.sel(layer=layer).values.sum())


@pytest.mark.few(1)
@CLIENTS
def test_a_store_is_used_from_other_processes_and_from_threads(s3: S3, kept: str, client: str) -> None:
    store = counted(s3, kept, client=client)
    truth = [sum_of(store, layer) for layer in (0, 1, 3)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(sum_of, [store] * 9, [0, 1, 3] * 3)) == truth * 3
    with get_context("forkserver").Pool(2) as processes:
        assert processes.starmap(sum_of, [(store, layer) for layer in (0, 1, 3)]) == truth
    array = pickle.loads(pickle.dumps(store.dataset().resid_mean))  # noqa: S301 — our own bytes
    assert float(array.sel(layer=1).values.sum()) == truth[1]


def test_of_many_who_commit_one_name_one_succeeds(s3: S3, url: str) -> None:
    barrier = threading.Barrier(16)

    def commit(who: int) -> bool:
        storage = open_storage(url, s3.options(counted=who % 2 == 1))
        barrier.wait()
        try:
            storage.commit("g/p/zarr.json", f"by {who}".encode(), durable=True, replace=False)
        except AlreadyCommittedError:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        won = [who for who, done in enumerate(pool.map(commit, range(16))) if done]
    assert len(won) == 1
    assert open_storage(url).read("g/p/zarr.json") == f"by {won[0]}".encode()


WRITERS = SUPPORT / "s3_writers.py"


def check_whole(url: str) -> int:
    """Every prompt that is seen is seen once, and whole."""
    data = lz.open_store(url, "r").dataset("m")
    texts = data.text.values.tolist()
    assert len(set(texts)) == len(texts)
    numbers = np.array([int(text.split()[1]) for text in texts], "f4")
    truth = numbers[None, :, None] + np.arange(4, dtype="f4")[:, None, None] / 4
    np.testing.assert_array_equal(data.resid_mean.values, np.broadcast_to(truth, data.resid_mean.shape))
    return len(texts)


@pytest.mark.long
def test_many_processes_write_overlapping_prompts_and_some_are_killed(s3: S3, url: str, warmed: Warmed, tmp_path: Path) -> None:
    looks = 0
    with ThreadPoolExecutor(1) as pool:
        ran = pool.submit(warmed.run, WRITERS, "write", url, str(tmp_path))
        while not ((tmp_path / "killed").exists() or ran.done()):
            time.sleep(0.02)
        while not ran.done():
            check_whole(url)
            looks += 1
            if looks == 2:
                (tmp_path / "go").touch()
    done = ran.result()
    assert done.stdout == f"{[0] * 5}\n", done.stderr
    assert looks > 1, "readers looked on meanwhile"
    assert check_whole(url) == 80


@pytest.mark.long
@pytest.mark.model
def test_processes_extract_overlapping_prompts_into_one_prefix_and_some_are_killed(
    s3: S3, url: str, warmed: Warmed, tiny_models: SharedModels
) -> None:
    pytest.importorskip("torch")
    number = 8 if os.environ.get("LMPROBE_ZARR_STRESS") else 3
    done = warmed.run(WRITERS, "extract", url, str(tiny_models("gpt2")), str(number))
    assert done.stdout == f"{[0] * number}\n", done.stderr
    store = lz.open_store(url, "r")
    data, tokens = store.dataset(), store.tokens()
    texts = [f"{n} dogs jump over {n + 1} foxes" for n in range(5 * number + 15)]
    assert sorted(data.text.values.tolist()) == sorted(texts), "each once"
    assert store.coverage().all()
    mean = tokens.resid.lz.pool("mean").sel(prompt=data.prompt.values)
    np.testing.assert_allclose(mean.values, data.resid_mean.values, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------- the test server itself


STARTS = """
import pathlib, sys, time
sys.path.insert(0, sys.argv[2])
import s3_server
endpoint, connection = s3_server.server_of(pathlib.Path(sys.argv[1]))
print(endpoint, flush=True)
time.sleep(600)
"""


@pytest.mark.long
def test_the_server_ends_with_a_test_run_that_is_killed(s3: S3, tmp_path: Path) -> None:
    run = subprocess.Popen([sys.executable, "-c", STARTS, str(tmp_path), str(SUPPORT)], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    assert run.stdout.readline().startswith("http://")
    keeper = psutil.Process(json.loads((tmp_path / "keeper.json").read_text())["pid"])
    started = [keeper, *keeper.children(recursive=True)]
    assert len(started) > 1
    run.kill()
    run.communicate()
    _, alive = psutil.wait_procs(started, timeout=30)
    assert not alive
    assert not list(itertools.chain(tmp_path.glob("data-*"), tmp_path.glob("keeper.json")))
