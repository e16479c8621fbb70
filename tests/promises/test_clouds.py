"""Stores on Google's and Azure's object stores: what they cost in requests, what they say when a server fails, and who may do what.

Their servers are fake-gcs-server and Azurite. The contracts of a storage are those of every place, in `tests/storage`.
"""

from __future__ import annotations

import logging
import os
import pickle
import threading
import traceback
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from cloud_servers import ACCOUNT_KEY, Cloud, sas_token
from fsspec.asyn import sync
from s3_server import Fault, Request
from special_names import NAMES
from stores import GROUP, make_batch

import lmprobe_zarr as lz
from lmprobe_zarr import errors
from lmprobe_zarr.errors import AccessDeniedError, AlreadyCommittedError, ReadOnlyError, StoreNotFoundError, UnreachableError
from lmprobe_zarr.storage import azure, gcs, open_storage, remote
from lmprobe_zarr.storage.objects import ObjectStorage
from lmprobe_zarr.store.store import Store

WRITES = ("PUT", "POST", "DELETE", "PATCH")
SCHEMES = ["gs", "az"]
STRESS = bool(os.environ.get("LMPROBE_ZARR_STRESS"))


@pytest.fixture(params=SCHEMES)
def cloud(request: pytest.FixtureRequest) -> Cloud:
    found: Cloud = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting between the tries of a request, of ours and of gcsfs."""
    monkeypatch.setattr(remote, "_WAITS", (0.01, 0.01))
    try:
        import gcsfs.retry
    except ImportError:
        return
    monkeypatch.setattr(gcsfs.retry, "min", lambda *_: 0.01, raising=False)


@pytest.fixture
def url(cloud: Cloud) -> str:
    return f"{cloud.scheme}://pub/{uuid.uuid4().hex}/acts"


PARTS = [make_batch([f"prompt {i}" for i in range(10 * part, 10 * (part + 1))], seed=part) for part in range(2)]


@pytest.fixture
def filled(url: str) -> str:
    store = lz.open_store(url)
    for batch in PARTS:
        store.write(GROUP, batch)
    return url


def counted(cloud: Cloud, url: str, who: str = "admin", mode: Any = "r", **more: Any) -> Store:
    return lz.open_store(url, mode, storage_options=cloud.options(who, counted=True, **more))


# --------------------------------------------------------------------------------------------------------------- requests


@pytest.mark.few(1)
def test_a_model_is_opened_and_a_layer_read_in_one_get_per_part_and_chunk(cloud: Cloud, filled: str) -> None:
    data = counted(cloud, filled).dataset("acme/toy")
    values = data.resid_mean.sel(layer=1).values
    assert dict(cloud.proxy.kinds()) == {"GET": 2 + 2 + 2, "LIST": 3}, "as on S3"
    np.testing.assert_array_equal(values, np.concatenate([batch.prompts["resid_mean"][1] for batch in PARTS]))


def test_every_verb_costs_one_request(cloud: Cloud, url: str) -> None:
    storage = open_storage(url, cloud.options(counted=True))
    assert isinstance(storage, ObjectStorage)
    put, head = {"gs": ("POST", "GET"), "az": ("PUT", "HEAD")}[cloud.scheme]

    def costs(**expected: int) -> None:
        assert dict(cloud.proxy.kinds()) == expected
        cloud.proxy.reset()

    storage.write("g/a", b"123456", durable=True)
    costs(**{put: 1})
    storage.commit("g/p/zarr.json", b"2", durable=True, replace=False)
    costs(**{put: 1})
    assert storage.read("g/a") == b"123456"
    costs(GET=1)
    assert [bytes(each) for each in storage.read_ranges("g/a", [(1, 3), (3, 4)])] == [b"23", b"4"]
    costs(GET=1)
    assert storage.is_file("g/a")
    costs(**{head: 1})
    assert not storage.is_file("g")
    costs(**{head: 1})
    assert list(storage.scan("g")) == ["a", "p"]
    costs(LIST=1)
    assert storage.scan("nowhere") == {}
    costs(LIST=1)
    assert storage.sizes("g", ["a", "p/zarr.json", "b"]) == {"a": 6, "p/zarr.json": 1}
    costs(LIST=1)
    storage.remove_tree("g")
    costs(LIST=1, DELETE=2)
    with pytest.raises(FileNotFoundError):
        storage.read("g/a")


@pytest.mark.few(1)
def test_long_folders_are_listed_page_by_page(cloud: Cloud, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(url, cloud.options(counted=True))
    names = [f"{i:02}" for i in range(25)]
    for name in names:
        storage.touch(f"g/{name}")
    storage.touch("gg/f")
    if cloud.scheme == "gs":
        real = storage.filesystem.call  # type: ignore[attr-defined]
        monkeypatch.setattr(storage.filesystem, "call", lambda *a, **k: real(*a, **{**k, "maxResults": 10} if "maxResults" in k else k))  # type: ignore[attr-defined]
    else:
        client = type(storage.filesystem.service_client.get_container_client("pub"))  # type: ignore[attr-defined]
        for verb in ("walk_blobs", "list_blobs"):
            method = getattr(client, verb)
            monkeypatch.setattr(client, verb, lambda self, *a, _method=method, **k: _method(self, *a, results_per_page=10, **k))
    cloud.proxy.reset()
    assert storage.list("g") == names
    assert cloud.proxy.kinds()["LIST"] == 3
    storage.remove_tree("g")
    assert storage.list("g") == []
    assert storage.list("") == ["gg"]


# ----------------------------------------------------------------------------------------------------- uploads in pieces


@pytest.mark.parametrize("times", [0, 1])
@pytest.mark.usefixtures("impatient")
def test_a_file_in_pieces_appears_when_it_is_whole_and_once_its_answers_come_through(
    cloud: Cloud, url: str, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    for module in (gcs, azure):
        monkeypatch.setattr(module, "PIECE_BYTES", 2**18)
    storage = open_storage(url, cloud.options(counted=True))
    cloud.proxy.fault = first_times(times, Fault(status=503, code="ServerBusy"), *WRITES)
    data = np.random.default_rng(0).bytes(5 * 2**17)
    with storage.open_pieces("g/f", durable=True) as pieces:
        for start in range(0, len(data), 100_000):
            pieces.append(data[start : start + 100_000])
        assert storage.scan("g") == {}, "nobody sees half a file"
    assert storage.read("g/f") == data
    assert [bytes(each) for each in storage.read_ranges("g/f", [(2**18 - 3, 2**18 + 3)])] == [data[2**18 - 3 : 2**18 + 3]]
    with pytest.raises(KeyboardInterrupt), storage.open_pieces("g/h", durable=True) as pieces:
        pieces.append(data)
        raise KeyboardInterrupt
    assert list(storage.scan("g")) == ["f"]


def test_the_answer_to_the_last_request_of_an_upload_may_be_lost(cloud: Cloud, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if cloud.scheme == "gs":
        pytest.skip("fake-gcs-server forgets an upload that is whole; Google answers with the object again")
    monkeypatch.setattr(azure, "PIECE_BYTES", 2**18)
    storage = open_storage(url, cloud.options(counted=True))
    data = bytes(range(256)) * 2**11
    cloud.proxy.fault = lambda request: None
    with storage.open_pieces("g/f", durable=True) as pieces:
        pieces.append(data)
        seen = first_times(1, Fault(lose_answer=True), "PUT")
        cloud.proxy.fault = lambda request: seen(request) if "comp=blocklist" in request.query else None
    assert storage.read("g/f") == data


# ----------------------------------------------------------------------------------------------------------- who may what


@pytest.mark.few(1)
def test_reading_writes_nothing(cloud: Cloud, filled: str) -> None:
    for who in ("admin",) if cloud.scheme == "gs" else ("reader", "anonymous"):
        cloud.proxy.reset()
        store = counted(cloud, filled, who)
        assert store.models() == ["acme/toy"]
        np.testing.assert_array_equal(store.tokens().resid.values, np.concatenate([batch.tokens["resid"] for batch in PARTS], 1))
        assert lz.cache_info(store=store).models[0].num_prompts == 20
        options = cloud.options(who, counted=True)
        data = xr.open_dataset(filled, engine="lmprobe_zarr", model="acme/toy", storage_options=options)
        assert data.resid_mean.notnull().all()
        for write in (
            lambda store=store: store.write(GROUP, PARTS[0]),
            lambda store=store: store.delete("acme/toy", ["prompt 1"]),
            lambda store=store: lz.evict(store, max_gb=0),
        ):
            with pytest.raises(ReadOnlyError):
                write()
        store.mark_used(store.view(store.find_group()).parts)
        assert not [request for request in cloud.proxy.requests if request.method in WRITES]


def test_azure_refuses_a_reader_and_a_nobody_to_write_and_says_so(az: Cloud) -> None:
    url = f"az://pub/{uuid.uuid4().hex}/acts"
    lz.open_store(url).write(GROUP, PARTS[0])
    for who in ("reader", "anonymous"):
        with pytest.raises((ReadOnlyError, AccessDeniedError), match=r"cannot be written|not for everyone"):
            lz.open_store(url, storage_options=az.options(who)).write(GROUP, PARTS[1])
        with pytest.raises((ReadOnlyError, AccessDeniedError)):
            open_storage(url, az.options(who)).remove(["zarr.json"])
    assert lz.open_store(url).dataset().sizes["prompt"] == 10


def test_who_may_not_list_on_azure_is_told_so_and_reads_a_published_copy(az: Cloud) -> None:
    url = f"az://team/{uuid.uuid4().hex}/acts"
    store = lz.open_store(url)
    store.write(GROUP, PARTS[0])
    getter = az.options(f"token:{sas_token('r')}", counted=True)
    with pytest.raises(AccessDeniedError, match="cannot be listed"):
        lz.open_store(url, "r", storage_options=getter).models()
    store.publish(f"{url}-published", progress=False)
    az.proxy.reset()
    copy = lz.open_store(f"{url}-published", storage_options=getter)
    assert copy.mode == "r"
    np.testing.assert_array_equal(copy.dataset().resid_mean.values, PARTS[0].prompts["resid_mean"])
    assert set(az.proxy.kinds()) == {"GET"}
    for name in ("README.md", "index.html"):
        written = copy.storage.read(name).decode()
        assert ACCOUNT_KEY not in written
        assert "sig=" not in written


@pytest.mark.few(1)
def test_the_page_of_a_copy_is_written_as_html(cloud: Cloud, tmp_path: Path) -> None:
    store = lz.open_store(tmp_path / "acts")
    store.write(GROUP, PARTS[0])
    url = f"{cloud.scheme}://team/{uuid.uuid4().hex}/copy"
    store.publish(url, progress=False)
    inner: Any = open_storage(url)
    bucket, name = inner.object_of("index.html")
    if cloud.scheme == "gs":
        kind = inner.filesystem.call("GET", "b/{}/o/{}", bucket, name, json_out=True)["contentType"]
    else:
        client = inner.filesystem.service_client.get_blob_client(bucket, name)
        kind = sync(inner.filesystem.loop, client.get_blob_properties).content_settings.content_type
    assert kind == "text/html; charset=utf-8", "browsers save what has another type"
    assert lz.open_store(url).verify(progress=False).ok


FAILURES: dict[str, tuple[str, type[Exception], str, Fault | None, str]] = {
    "wrong bucket": ("gs az", StoreNotFoundError, "admin", None, "bucket that is not there"),
    "private, as nobody": ("az", AccessDeniedError, "anonymous", None, "check the credentials"),
    # As Azure itself answers, which Azurite does not.
    "private, as nobody on Azure": ("az", AccessDeniedError, "anonymous", Fault(status=404, code="ResourceNotFound"), "not for everyone"),
    "wrong key": ("az", AccessDeniedError, "wrong key", None, "check the credentials"),
    "expired token": ("az", AccessDeniedError, "expired", None, "check the credentials"),
    "a clock that is wrong": ("az", AccessDeniedError, "admin", Fault(status=403, code="AuthenticationFailed"), "this machine's clock"),
    "refused": ("gs", AccessDeniedError, "admin", Fault(status=403, code="forbidden"), "cannot be listed|cannot be read"),
    "unknown token": ("gs", AccessDeniedError, "admin", Fault(status=401, code="unauthorized"), "check the credentials|cannot be"),
    "who reads pays": (
        "gs",
        AccessDeniedError,
        "admin",
        Fault(status=400, code="Bucket is requester pays bucket"),
        "'requester_pays': True",
    ),
    "no permission": ("az", AccessDeniedError, "admin", Fault(status=403, code="AuthorizationPermissionMismatch"), "cannot be"),
    "overloaded": ("gs az", UnreachableError, "admin", Fault(status=503, code="ServerBusy"), "overloaded"),
    "too many requests": ("gs az", UnreachableError, "admin", Fault(status=429, code="rateLimitExceeded"), "overloaded"),
    "broken": ("gs az", UnreachableError, "admin", Fault(status=500, code="InternalError"), "status 500"),
    "unreachable": ("gs az", UnreachableError, "nowhere", None, "does not answer"),
}


@pytest.mark.few(6)
@pytest.mark.parametrize(("scheme", "name"), [(scheme, name) for name, given in FAILURES.items() for scheme in given[0].split()])
@pytest.mark.parametrize("mode", ["r", "a"] if STRESS else ["r"])
@pytest.mark.usefixtures("impatient")
def test_failed_requests_raise_one_of_our_errors_without_a_secret(
    request: pytest.FixtureRequest,
    scheme: str,
    name: str,
    mode: Any,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    cloud: Cloud = request.getfixturevalue(scheme)
    _, kind, who, fault, says = FAILURES[name]
    caplog.set_level(logging.DEBUG, "lmprobe_zarr")
    place = f"{scheme}://{'no-such-bucket' if name == 'wrong bucket' else 'team'}/acts"
    if who in ("wrong key", "expired"):
        who = f"token:{sas_token('rl', key='U0VTQU1F') if who == 'wrong key' else sas_token('rl', hours=-2)}"
    options = cloud.options(who, counted=True) if who != "nowhere" else Cloud(scheme, "http://127.0.0.1:9", cloud.proxy).options()
    if fault is not None:
        cloud.proxy.fault = lambda request: fault
    with pytest.raises(kind, match=says) as caught:
        lz.open_store(place, mode, storage_options=options).models()
    message = str(caught.value)
    assert place in message
    assert len(message.splitlines()) <= 2
    seen = "".join(traceback.format_exception(caught.value)) + repr(caught.value) + caplog.text + "".join(capfd.readouterr())
    store = Store(open_storage(place, options))
    seen += repr(store.storage) + str(store.storage) + object.__repr__(store) + store.url
    secrets = [ACCOUNT_KEY, *([who.partition("sig=")[2].partition("&")[0]] if "sig=" in who else [])]
    for secret in secrets:
        assert secret not in seen


def test_a_wrong_bucket_is_no_empty_cache(cloud: Cloud) -> None:
    place = f"{cloud.scheme}://no-such-bucket/acts"
    for look in (lambda: lz.cache_info(store=place), lambda: lz.discover_cached("m", "a", store=place), lambda: lz.clear_cache(url=place)):
        with pytest.raises(StoreNotFoundError, match="bucket that is not there"):
            look()
    assert lz.cache_info(store=f"{cloud.scheme}://pub/nothing/here").models == ()


def test_missing_credentials_are_named_with_what_each_service_takes(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue("az")
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING")
    with pytest.raises(errors.InvalidArgumentError, match="account_name"):
        lz.open_store("az://team/acts", "r")
    pytest.importorskip("gcsfs")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nowhere/SESAME.json")
    monkeypatch.setenv("CLOUDSDK_CONFIG", "/nowhere")
    with pytest.raises(AccessDeniedError, match=r"gs://team/acts needs credentials .*gcloud auth[^\n]*\n.*'token': 'anon'"):
        open_storage("gs://team/acts", {"token": "google_default", "endpoint_url": "http://127.0.0.1:9"})


# ---------------------------------------------------------------------------------------------------------------- faults


def first_times(times: int, fault: Fault, *methods: str) -> Callable[[Request], Fault | None]:
    seen: dict[Request, int] = {}

    def decide(request: Request) -> Fault | None:
        if methods and request.method not in methods:
            return None
        seen[request] = seen.get(request, 0) + 1
        return fault if seen[request] <= times else None

    return decide


@pytest.mark.few(1)
@pytest.mark.parametrize("fault", [Fault(status=503, code="ServerBusy"), Fault(cut=20), Fault(lose_answer=True)], ids=repr)
@pytest.mark.usefixtures("impatient")
def test_a_fault_that_passes_is_not_noticed(cloud: Cloud, filled: str, fault: Fault) -> None:
    cloud.proxy.fault = first_times(2, fault, "GET")
    data = counted(cloud, filled).dataset()
    wanted = np.concatenate([batch.prompts["resid_mean"] for batch in PARTS], 1)
    np.testing.assert_array_equal(data.resid_mean.values, wanted)


@pytest.mark.few(1)
@pytest.mark.usefixtures("impatient")
def test_answers_that_are_always_cut_short_are_an_error(cloud: Cloud, filled: str) -> None:
    data = counted(cloud, filled).dataset()
    cloud.proxy.reset()
    cloud.proxy.fault = lambda request: Fault(cut=20)
    with pytest.raises(UnreachableError, match="cut short"):
        _ = data.resid_mean.values
    assert cloud.proxy.kinds()["GET"] > 3, "tried again before that"


@pytest.mark.usefixtures("impatient")
def test_a_commit_whose_answer_was_lost_is_a_success(cloud: Cloud, url: str) -> None:
    storage = open_storage(url, cloud.options(counted=True))
    for part, fault in {"p": Fault(lose_answer=True), "q": Fault(status=503, code="ServerBusy")}.items():
        cloud.proxy.fault = first_times(1, fault, "PUT", "POST")
        storage.commit(f"g/{part}/zarr.json", b"{}", durable=True, replace=False)
        assert storage.read(f"g/{part}/zarr.json") == b"{}"
    with pytest.raises(AlreadyCommittedError):
        storage.commit("g/p/zarr.json", b"[]", durable=True, replace=False)


@pytest.mark.few(1)
def test_of_many_who_commit_one_name_one_succeeds(cloud: Cloud, url: str) -> None:
    barrier = threading.Barrier(16)

    def commit(who: int) -> bool:
        storage = open_storage(url, cloud.options(counted=who % 2 == 1))
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


def test_marks_between_the_parts_of_a_request_may_be_in_the_data(cloud: Cloud, url: str) -> None:
    storage = open_storage(url)
    # gcsfs's own mark of the end of an upload, which would end this file after its first line.
    data = b"a text\n--==0==--\nand what follows\r\n--==0==\r\n"
    storage.write("g/f", data, durable=True)
    assert storage.read("g/f") == data


# ------------------------------------------------------------------------------------------------------- whole stores


@pytest.mark.few(1)
def test_a_store_is_merged_cleared_of_garbage_deleted_from_and_copied(cloud: Cloud, filled: str) -> None:
    store = lz.open_store(filled)
    before = store.dataset("acme/toy").load()
    early = lz.open_store(filled, "r").dataset("acme/toy")
    assert store.compact(progress=False).parts_after == 1
    np.testing.assert_array_equal(early.resid_mean.values, before.resid_mean.values)
    assert len(store.gc(max_age=0).replaced) == 2
    fresh = counted(cloud, filled)
    xr.testing.assert_identical(fresh.dataset("acme/toy").load().drop_attrs(), before.drop_attrs())
    store.copy_to(f"{filled}-copy", progress=False)
    store.delete("acme/toy", ["prompt 3"])
    assert lz.open_store(filled).dataset().sizes["prompt"] == 19
    assert lz.open_store(f"{filled}-copy").dataset().sizes["prompt"] == 20
    assert not lz.open_store(f"{filled}-copy").verify(progress=False).problems
    array = pickle.loads(pickle.dumps(fresh.dataset().resid_mean))  # noqa: S301 — our own bytes
    assert array.sel(layer=1).notnull().all()


@pytest.mark.few(1)
def test_a_committed_part_without_its_chunks_is_an_error_and_never_zeros(cloud: Cloud, url: str) -> None:
    store = lz.open_store(url)
    part = store.write(GROUP, make_batch(["a", "b"]))
    store.storage.remove([f"{GROUP.name}/{part}/prompts/resid_mean/c.1.0.0"])
    data = lz.open_store(url, "r").dataset()
    assert np.isfinite(data.resid_mean.isel(layer=0).values).all(), "what is there can be read"
    with pytest.raises((errors.CorruptPartError, errors.PartGoneError), match=r"c\.1\.0\.0|chunk"):
        _ = data.resid_mean.isel(layer=1).values


@pytest.mark.few(1)
def test_names_are_taken_as_they_are_and_never_for_patterns(cloud: Cloud, url: str) -> None:
    # Azure's server takes a backslash for a slash, and Google allows no line breaks.
    names = [name for name in NAMES if name not in ("a\\b", "a\nb")]
    storage = open_storage(url, cloud.options())
    for name in names:
        storage.write(f"{name}/g/f", name.encode(), durable=False)
        storage.commit(f"{name}.json", b"{}", durable=False, replace=False)
    assert storage.list("") == sorted([*names, *(f"{name}.json" for name in names)])
    for name in names:
        assert open_storage(f"{url}/{name}", cloud.options()).read("g/f") == name.encode()
        assert list(storage.scan(f"{name}/g")) == ["f"]
    for name in ("run[12]", "run*", "**", "run?", "run{1,2}"):
        storage.remove_tree(name)
        storage.remove([f"{name}.json"])
    left = [name for name in names if name not in ("run[12]", "run*", "**", "run?", "run{1,2}")]
    assert storage.list("") == sorted([*left, *(f"{name}.json" for name in left)])


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["run 12%20", "日本/naïve", "a#b?c=d&e", "{a,b}[1]*"])
def test_prefixes_with_blanks_percent_signs_and_other_scripts(cloud: Cloud, name: str) -> None:
    url = f"{cloud.scheme}://team/{uuid.uuid4().hex}/{name}"
    lz.open_store(url).write(GROUP, PARTS[0])
    np.testing.assert_array_equal(counted(cloud, url).dataset().resid_mean.values, PARTS[0].prompts["resid_mean"])
