"""Stores on the Hugging Face Hub: read at one revision, published in few commits, and what is said when the Hub refuses.

The Hub is a server of its HTTP surface on this machine (`hub_server`). Its own one was never asked.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import traceback
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import xarray as xr
from hub_server import PIECE, READER, STRANGER, WRITER, Hub, HubFault, HubRequest, Repo
from stores import GROUP, make_batch

import lmprobe_zarr as lz
from lmprobe_zarr import errors
from lmprobe_zarr.cli import main
from lmprobe_zarr.errors import AccessDeniedError, InvalidArgumentError, NotAStoreError, ReadOnlyError, StoreNotFoundError, UnreachableError
from lmprobe_zarr.storage import HubStorage, open_storage, remote
from lmprobe_zarr.storage.hub import HubRepo, parse_repo
from lmprobe_zarr.store.store import Store

hub_module = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed: pip install lmprobe-zarr[hub]")
URL = "hf://datasets/lab/acts"
NAME = "datasets/lab/acts"
BATCH = make_batch([f"prompt {i}" for i in range(20)], seed=1, columns={"label": list(range(20))})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    import huggingface_hub.constants
    import huggingface_hub.utils._http as http

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    # Nobody's own token, and no waiting between the tries of a request.
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(http.time, "sleep", lambda seconds: None)  # type: ignore[attr-defined]
    monkeypatch.setattr(remote, "_WAITS", (0.0,) * 6)
    huggingface_hub.HfFileSystem.clear_instance_cache()
    with Hub().running() as server:
        # Old releases of the client understand the address of a commit only where it is below this one.
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.endpoint)
        yield server


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store on disk, with two parts of prompts and tokens and a column."""
    made = lz.open_store(tmp_path / "acts")
    made.write(GROUP, BATCH)
    return made


def opened(hub: Hub, url: str = URL, token: str | bool = WRITER, mode: Any = None) -> Store:
    return lz.open_store(url, mode, storage_options=hub.options(token))


def publish(store: Store, hub: Hub, url: str = URL, token: str | bool = WRITER, **more: Any) -> Any:
    return store.publish(url, storage_options=hub.options(token), progress=False, **more)


def check_whole(found: Store, store: Store) -> None:
    xr.testing.assert_identical(found.dataset().load().drop_attrs(), store.dataset().load().drop_attrs())
    xr.testing.assert_identical(found.tokens().load().drop_attrs(), store.tokens().load().drop_attrs())


# ---------------------------------------------------------------------------------------------------- publishing, reading


def test_a_copy_is_published_in_one_commit_and_read_by_whoever_may(hub: Hub, store: Store) -> None:
    summary = publish(store, hub, licence="cc-by-4.0")
    assert (summary.url, summary.prompts) == (URL, 20)
    repo = hub.repos[NAME]
    assert repo.titles == ["initial commit", "Publish activations"]
    assert hub.kinds()["commit"] == 1
    hub.reset()
    for token in (READER, STRANGER, False):
        found = opened(hub, token=token)
        assert found.mode == "r"
        check_whole(found, store)
        assert not found.verify(progress=False).problems
    assert {request.method for request in hub.requests} == {"GET"}, "a published copy is read without listing"


def test_a_layer_is_read_in_one_request_per_chunk_and_a_prompt_in_ranges(hub: Hub, store: Store) -> None:
    publish(store, hub)
    found = opened(hub)
    data = found.dataset()
    hub.reset()
    np.testing.assert_array_equal(data.resid_mean.sel(layer=1).values, BATCH.prompts["resid_mean"][1])
    assert hub.kinds()["resolve"] <= 2, "the chunk, and the table of chunks"
    storage = open_storage(URL, hub.options())
    key = "zarr.json"
    whole = storage.read(key)
    ranges = [(5, 9), (len(whole) - 2, len(whole) + 5), (len(whole) + 9, len(whole) + 12)]
    assert [bytes(each) for each in storage.read_ranges(key, ranges)] == [whole[5:9], whole[-2:], b""]
    assert storage.is_file(key)
    assert not storage.is_file("nothing")
    assert storage.scan("nothing") == {}
    assert sorted(storage.scan("")) == sorted(["README.md", "index.html", "zarr.json", GROUP.name])
    assert storage.scan("")["zarr.json"].nbytes == len(whole)
    assert not storage.scan("")[GROUP.name].is_file


def test_long_listings_come_page_by_page(hub: Hub) -> None:
    repo = hub.repos[NAME] = Repo()
    repo.commit({f"g/{i:03}": b"x" * i for i in range(130)})
    storage = open_storage(URL, hub.options())
    assert storage.list("g") == [f"{i:03}" for i in range(130)]
    assert hub.kinds()["tree"] == 3
    assert storage.sizes("g", ["007", "100", "nothing"]) == {"007": 7, "100": 100}


def test_the_cards_metadata_is_what_the_hub_shows(hub: Hub, store: Store) -> None:
    publish(store, hub, licence="cc-by-4.0")
    text = hub.repos[NAME].files("main")["README.md"].decode()  # type: ignore[index]
    card = hub_module.DatasetCard(text)
    assert card.data.license == "cc-by-4.0"
    assert card.data.size_categories == ["n<1K"]
    assert {"activations", "lmprobe-zarr", "acme/toy"} <= set(card.data.tags)
    (held,) = card.data.to_dict()["lmprobe_zarr"]
    assert (held["model"], held["prompts"], held["layers"]) == ("acme/toy", 20, [0, 1, 3])
    assert f"lz.open_store({URL!r})" in text
    assert "hf_SESAME" not in text


def test_a_model_whose_name_is_yaml_stays_a_text(tmp_path: Path) -> None:
    name = """x": ['] # --- {license: stolen}, & *a !!python/object: é 🤗"""
    lz.write_activations(tmp_path / "acts", model=name, prompts=["a"], pooled={"resid_mean": {0: np.ones((1, 4), "float32")}})
    lz.open_store(tmp_path / "acts").publish(tmp_path / "copy", progress=False)
    card = hub_module.DatasetCard((tmp_path / "copy/README.md").read_text())
    assert card.data.license == "unknown"
    assert name in card.data.tags


def test_the_page_goes_up_with_the_root_and_an_earlier_one_is_removed(hub: Hub, store: Store) -> None:
    def pages() -> list[str]:
        files = hub.repos[NAME].files("main")
        assert files is not None
        return [files[path].decode() for path in files if path.endswith(".html")]

    publish(store, hub)
    (page,) = pages()
    assert f'lz.open_store("{URL}")' in unescape(page)
    publish(store, hub, overwrite=True, page=False)
    assert pages() == []
    publish(store, hub, overwrite=True)
    files = hub.repos[NAME].files("main")
    assert files is not None
    hub.repos[NAME].commit({**files, "index.html": b"<title>mine</title>"})
    with pytest.raises(InvalidArgumentError, match=r"index\.html"):
        publish(store, hub, overwrite=True)
    publish(store, hub, overwrite=True, page=False)
    assert pages() == ["<title>mine</title>"]


def test_an_open_store_stays_at_its_revision_and_a_new_one_sees_the_next(hub: Hub, store: Store) -> None:
    publish(store, hub)
    early = opened(hub)
    before = early.dataset().load()
    first = hub.repos[NAME].names["main"]
    batch = make_batch(["another"], seed=9)
    store.write(GROUP, batch)
    with pytest.raises(InvalidArgumentError, match="published already"):
        publish(store, hub)
    publish(store, hub, overwrite=True)
    inner = early.storage.inner  # type: ignore[attr-defined]
    assert isinstance(inner, HubStorage)
    assert inner.commit_id == first
    lazy = pickle.loads(pickle.dumps(early))  # noqa: S301 — our own bytes
    for reading in (early, lazy, opened(hub, f"{URL}@{first}")):
        xr.testing.assert_identical(reading.dataset().load().drop_attrs(), before.drop_attrs())
        assert reading.tokens().resid.notnull().all()
    check_whole(opened(hub), store)
    old = {path for path in hub.repos[NAME].commits[first] if path.startswith(GROUP.name)}
    new = hub.repos[NAME].files("main")
    assert new is not None
    assert not [path for path in old & set(new) if "/01" in path], "the parts of the first copy are gone from the second"
    hub.repos[NAME].names["v1"] = first
    assert opened(hub, f"{URL}@v1").dataset().sizes["prompt"] == 20


def test_a_revision_is_a_branch_and_a_folder_of_a_repository_holds_a_store(hub: Hub, store: Store) -> None:
    publish(store, hub, f"{URL}/run 1/50%")
    check_whole(opened(hub, f"{URL}/run 1/50%"), store)
    assert open_storage(URL, hub.options()).list("") == ["run 1"]
    store.publish(f"{URL}/日本", storage_options=hub.options(), progress=False, overwrite=True)
    check_whole(opened(hub, f"{URL}/日本"), store)
    check_whole(opened(hub, f"{URL}/run 1/50%"), store)


@pytest.mark.parametrize(
    ("url", "repo"),
    {
        "hf://datasets/lab/acts": HubRepo("dataset", "lab/acts", None, ""),
        "hf://datasets/lab/acts@v1/a/b/": HubRepo("dataset", "lab/acts", "v1", "a/b"),
        "hf://datasets/lab/acts@refs/pr/3/a": HubRepo("dataset", "lab/acts", "refs/pr/3", "a"),
        "hf://datasets/lab/acts@my%2Fbranch": HubRepo("dataset", "lab/acts", "my/branch", ""),
        "hf://lab/model/acts": HubRepo("model", "lab/model", None, "acts"),
    }.items(),
)
def test_urls_of_repositories(url: str, repo: HubRepo) -> None:
    assert parse_repo(url) == repo


@pytest.mark.parametrize("url", ["hf://", "hf://datasets/acts", "hf://datasets", "hf://datasets/", "hf://acts"])
def test_a_url_without_a_repository_is_an_error_that_says_how_it_is_given(url: str) -> None:
    with pytest.raises(InvalidArgumentError, match="hf://datasets/ORGANISATION/NAME"):
        lz.open_store(url)
    with pytest.raises(InvalidArgumentError, match="hf://buckets/ORGANISATION/NAME"):
        lz.open_store("hf://buckets/lab/")


def test_nothing_of_the_local_store_is_written_and_no_temporary_folder_stays(
    hub: Hub, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    before = sorted(str(path) for path in (tmp_path / "acts").rglob("*"))
    publish(lz.open_store(tmp_path / "acts", "r"), hub)
    hub.fault = lambda request: HubFault(status=403) if request.kind == "commit" else None
    with pytest.raises(ReadOnlyError):
        publish(store, hub, overwrite=True)
    assert sorted(str(path) for path in (tmp_path / "acts").rglob("*")) == before
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_repository_is_written_to_as_a_whole_only(hub: Hub, store: Store) -> None:
    publish(store, hub)
    storage = open_storage(URL, hub.options())
    for write in (
        lambda: storage.write("f", b"1", durable=False),
        lambda: storage.commit("f", b"1", durable=False),
        lambda: storage.open_pieces("f", durable=False),
        lambda: storage.touch("f"),
        lambda: storage.remove(["zarr.json"]),
        lambda: storage.remove_tree(""),
        lambda: storage.remove_folders([GROUP.name]),
        lambda: lz.open_store(URL, "a", storage_options=hub.options()),
        lambda: store.copy_to(lz.open_store(URL, storage_options=hub.options())),
    ):
        with pytest.raises(ReadOnlyError, match="publish"):
            write()


# --------------------------------------------------------------------------------------------------------------- buckets


class XetOfTests:
    """What stands in for Xet's upload of the contents of files, whose server is not here: they go to the Hub of the tests at once."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub

    def new_upload_commit(self, **given: Any) -> XetOfTests:
        return self

    def __enter__(self) -> XetOfTests:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def start_upload_bytes(self, data: bytes, **given: Any) -> Any:
        oid = hashlib.sha256(data).hexdigest()
        self.hub.objects[oid] = bytes(data)
        found = SimpleNamespace(xet_info=SimpleNamespace(hash=oid, file_size=len(data)))
        return SimpleNamespace(result=lambda: found)

    def start_upload_file(self, path: str, **given: Any) -> Any:
        return self.start_upload_bytes(Path(path).read_bytes())


@pytest.fixture
def bucket(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> str:
    pytest.importorskip("hf_xet", reason="hf_xet is not installed: pip install huggingface_hub[hf_xet]")
    if not hasattr(hub_module.HfApi, "batch_bucket_files"):
        pytest.skip("this release of huggingface_hub has no buckets")
    monkeypatch.setattr("huggingface_hub.utils._xet.get_xet_session", lambda: XetOfTests(hub))
    repo = hub.repos["buckets/lab/box"] = Repo()
    repo.commit({"acts-of-others/g/f": b"theirs"})
    return "hf://buckets/lab/box/acts"


def test_a_bucket_is_read_from_and_written_to_part_by_part(hub: Hub, bucket: str) -> None:
    storage = open_storage(bucket, hub.options())
    storage.write("g/run 1%20#?", b"123456", durable=True)
    storage.commit("g/p/zarr.json", b"1", durable=True, replace=False)
    with pytest.raises(errors.AlreadyCommittedError):
        open_storage(bucket, hub.options()).commit("g/p/zarr.json", b"2", durable=True, replace=False)
    assert storage.list("g") == ["p", "run 1%20#?"]
    assert storage.list("") == ["g"]
    assert [bytes(each) for each in storage.read_ranges("g/run 1%20#?", [(1, 3), (5, 9), (9, 12)])] == [b"23", b"6", b""]
    assert (storage.is_file("g/p/zarr.json"), storage.is_file("g/p"), storage.scan("nothing")) == (True, False, {})
    with storage.open_pieces("g/q", durable=True) as pieces:
        pieces.append(b"in pieces")
    assert storage.read("g/q") == b"in pieces"
    storage.remove_tree("g")
    assert storage.list("") == []
    with pytest.raises(FileNotFoundError):
        storage.read("g/q")
    store = lz.open_store(bucket, storage_options=hub.options())
    store.write(GROUP, BATCH)
    early = lz.open_store(bucket, "r", storage_options=hub.options(READER))
    assert early.dataset().sizes["prompt"] == 20
    store.write(GROUP, make_batch(["another"], seed=3))
    store.delete("acme/toy", ["prompt 3"])
    assert lz.open_store(bucket, "r", storage_options=hub.options(False)).dataset().sizes["prompt"] == 20
    assert not store.verify(progress=False).problems
    assert hub.repos["buckets/lab/box"].files("main")["acts-of-others/g/f"] == b"theirs"  # type: ignore[index]


def test_a_bucket_that_is_not_there_or_may_not_be_written_is_an_error_of_ours(hub: Hub, bucket: str) -> None:
    with pytest.raises(AccessDeniedError, match="not there, or is private"):
        lz.open_store("hf://buckets/lab/nothing", "r", storage_options=hub.options()).models()
    with pytest.raises(ReadOnlyError, match="right to write") as caught:
        open_storage(bucket, hub.options(READER)).write("f", b"1", durable=False)
    assert "SESAME" not in "".join(traceback.format_exception(caught.value))


# ------------------------------------------------------------------------------------------------- private, other contents


def test_a_private_repository_is_made_and_never_a_public_one_taken_for_it(
    hub: Hub, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(store, hub, private=True)
    assert hub.repos[NAME].private
    check_whole(opened(hub, token=READER), store)
    publish(store, hub, private=True, overwrite=True)
    publish(store, hub, "hf://datasets/lab/open", private=False)
    assert not hub.repos["datasets/lab/open"].private
    titles = list(hub.repos["datasets/lab/open"].titles)
    with pytest.raises(InvalidArgumentError, match="open to everyone already"):
        publish(store, hub, "hf://datasets/lab/open", private=True, overwrite=True)
    assert hub.repos["datasets/lab/open"].titles == titles
    with pytest.raises(InvalidArgumentError, match="private= is for repositories of the Hugging Face Hub"):
        store.publish(Path(store.url).parent / "copy", private=True)


def test_the_command_publishes_privately(
    hub: Hub, store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": hub.endpoint})
    monkeypatch.setenv("HF_TOKEN", WRITER)
    assert main(["publish", store.url, URL, "--private", "--license", "mit", "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["url"] == URL
    assert hub.repos[NAME].private
    assert hub_module.DatasetCard(hub.repos[NAME].files("main")["README.md"].decode()).data.license == "mit"  # type: ignore[index]
    assert "SESAME" not in shown.out + shown.err


def test_other_things_in_a_repository_are_left_alone(hub: Hub, store: Store) -> None:
    publish(store, hub)
    repo = hub.repos[NAME]
    repo.commit({**(repo.files("main") or {}), f"{GROUP.name}/notes.txt": b"mine"}, "notes")
    publish(store, hub, overwrite=True)
    repo = hub.repos["datasets/lab/other"] = Repo()
    repo.commit({"train.parquet": b"PAR1"})
    with pytest.raises(NotAStoreError, match=r"train\.parquet"):
        publish(store, hub, "hf://datasets/lab/other")
    assert repo.titles == ["initial commit"]


# -------------------------------------------------------------------------------------------------------------- failures


def some_times(times: int, fault: HubFault, *kinds: str) -> Callable[[HubRequest], HubFault | None]:
    seen: dict[tuple[str, str, str], int] = {}

    def decide(request: HubRequest) -> HubFault | None:
        if kinds and request.kind not in kinds:
            return None
        key = (request.method, request.path, request.range)
        seen[key] = seen.get(key, 0) + 1
        return fault if seen[key] <= times else None

    return decide


BUSY = HubFault(status=429, headers={"Retry-After": "1"})
PASSING = {"429": BUSY, "503": HubFault(status=503), "hung up on": HubFault(hang_up=True), "cut short": HubFault(cut=20)}


@pytest.mark.few(1)
@pytest.mark.parametrize("name", PASSING)
def test_a_fault_that_passes_is_not_noticed(hub: Hub, store: Store, name: str) -> None:
    hub.fault = some_times(1, PASSING[name])
    publish(store, hub)
    hub.fault = some_times(1, PASSING[name])
    check_whole(opened(hub), store)


@pytest.mark.parametrize("kind", ["create", "preupload", "batch", "piece", "complete", "object", "validate", "commit"])
@pytest.mark.parametrize("fault", [HubFault(status=503), HubFault(hang_up=True)], ids=["503", "hung up on"])
@pytest.mark.few(2)
def test_an_upload_that_breaks_shows_nothing_and_the_next_goes_on_with_what_is_there(
    hub: Hub, tmp_path: Path, kind: str, fault: HubFault
) -> None:
    rng = np.random.default_rng(0)
    values = {layer: rng.standard_normal((300, 600)).astype("float32") for layer in (0, 1)}
    prompts = [f"prompt {i}" for i in range(300)]
    lz.write_activations(tmp_path / "acts", model="m", prompts=prompts, pooled={"resid_mean": values})
    store = lz.open_store(tmp_path / "acts")
    hub.fault = lambda request: fault if request.kind == kind else None
    with pytest.raises(UnreachableError) as caught:
        publish(store, hub, shards=False)
    assert URL in str(caught.value)
    assert "SESAME" not in "".join(traceback.format_exception(caught.value))
    assert NAME not in hub.repos or hub.repos[NAME].titles == ["initial commit"]
    uploaded = set(hub.objects)
    hub.reset()
    publish(store, hub, shards=False)
    again = {request.path.split("/")[2] for request in hub.requests if request.kind in ("object", "piece")}
    assert not again & uploaded, "what the Hub has is not sent again"
    assert kind not in ("commit", "validate") or len(uploaded) > 2
    assert any(len(data) > PIECE for data in hub.objects.values())
    np.testing.assert_array_equal(opened(hub).dataset().resid_mean.sel(layer=1).values, values[1])


FAILURES: dict[str, tuple[type[Exception], str | bool, HubFault | None, str]] = {
    "no token, private": (AccessDeniedError, False, None, "not there, or is private.*hf auth login"),
    "another's private": (AccessDeniedError, STRANGER, None, "not there, or is private"),
    "wrong token": (AccessDeniedError, "hf_wrongSESAME", None, "check the credentials"),
    "gated": (AccessDeniedError, STRANGER, None, "ask for access"),
    "no such repository": (AccessDeniedError, WRITER, None, "check its name"),
    "revision gone": (StoreNotFoundError, WRITER, None, "has no such revision"),
    "disabled": (
        AccessDeniedError,
        WRITER,
        HubFault(status=403, headers={"X-Error-Message": "Access to this resource is disabled."}),
        "disabled",
    ),
    "overloaded": (UnreachableError, WRITER, BUSY, "overloaded"),
    "broken": (UnreachableError, WRITER, HubFault(status=500), "status 500"),
    "hangs up": (UnreachableError, WRITER, HubFault(hang_up=True), "does not answer"),
    "no JSON": (UnreachableError, WRITER, HubFault(status=200, body="<html>a login page of a hotel</html>"), "something else than JSON"),
    "offline": (UnreachableError, WRITER, None, "HF_HUB_OFFLINE is set"),
    "unreachable": (UnreachableError, WRITER, None, "does not answer"),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("name", FAILURES)
def test_failed_requests_raise_one_of_our_errors_without_a_token(
    hub: Hub, store: Store, name: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, token, fault, says = FAILURES[name]
    publish(store, hub, private="private" in name)
    hub.repos[NAME].gated = name == "gated"
    place = {"no such repository": "hf://datasets/lab/nothing", "revision gone": f"{URL}@v9"}.get(name, URL)
    caplog.set_level(logging.DEBUG, "lmprobe_zarr")
    hub.fault = lambda request: fault
    options = hub.options(token)
    if name == "offline":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if name == "unreachable":
        options["endpoint"] = "http://127.0.0.1:9"
    with pytest.raises(kind, match=says) as caught:
        lz.open_store(place, "r", storage_options=options).models()
    message = str(caught.value)
    assert place in message
    assert len(message.splitlines()) <= 2
    seen = "".join(traceback.format_exception(caught.value)) + repr(caught.value) + caplog.text + "".join(capfd.readouterr())
    opened = Store(open_storage(place, options))
    seen += repr(opened.storage) + str(opened.storage) + object.__repr__(opened) + opened.url
    assert "SESAME" not in seen


@pytest.mark.parametrize(
    ("token", "says"), {False: "hf auth login", READER: "cannot be written", "hf_wrongSESAME": "cannot be written"}.items()
)
def test_who_may_not_publish_is_told_so_before_anything_is_written(hub: Hub, store: Store, token: Any, says: str) -> None:
    with pytest.raises((ReadOnlyError, AccessDeniedError), match=says) as caught:
        publish(store, hub, token=token)
    assert not hub.repos
    assert set(hub.kinds()) <= {"create", "info"}
    assert "SESAME" not in "".join(traceback.format_exception(caught.value))


def test_a_damaged_file_of_the_hub_is_an_error_and_never_a_number(hub: Hub, store: Store) -> None:
    publish(store, hub)
    repo = hub.repos[NAME]
    files = dict(repo.files("main") or {})
    for path, data in files.items():
        if "/prompts/resid_mean/c." in path:
            files[path] = bytes([data[0]]) + bytes(byte ^ 1 for byte in data[1:])
    repo.commit(files, "damage")
    with pytest.raises(errors.CorruptPartError):
        _ = opened(hub).dataset().resid_mean.values


def test_a_dataset_that_lmprobe_shared_is_imported_from_its_repository(hub: Hub, tmp_path: Path) -> None:
    pytest.importorskip("lmprobe")
    pytest.importorskip("torch")
    from lmprobe_datasets import make_truth, write_dataset
    from parquet import with_pyarrow

    truth = make_truth()
    with with_pyarrow():
        folder = write_dataset(tmp_path / "dataset", truth)
        check_import(hub, folder, truth, tmp_path)


def check_import(hub: Hub, folder: Path, truth: Any, tmp_path: Path) -> None:
    repo = hub.repos["datasets/lab/shared"] = Repo(private=True)
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    repo.commit({**files, "README.md": b"# activations"})
    with pytest.raises((AccessDeniedError, NotAStoreError)):
        lz.import_lmprobe_dataset("hf://datasets/lab/shared", tmp_path / "none", storage_options=hub.options(False), progress=False)
    summary = lz.import_lmprobe_dataset("hf://datasets/lab/shared", tmp_path / "acts", storage_options=hub.options(READER), progress=False)
    assert (summary.imported, summary.skipped) == (len(truth.prompts), ())
    tokens = lz.open_store(tmp_path / "acts").tokens(dtype="stored")
    for text, values in zip(truth.prompts, truth.tokens, strict=True):
        np.testing.assert_array_equal(tokens.resid.sel(prompt=lz.prompt_hash(text)), values)
