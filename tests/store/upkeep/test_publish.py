"""Published copies: the same view, frozen, found without any listing, and never seen half."""

from __future__ import annotations

import json
import pickle
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from stores import GROUP, make_batch

import lmprobe_zarr as lz
from lmprobe_zarr.storage.local import LocalStorage
from lmprobe_zarr.store.format.group import GroupInfo
from lmprobe_zarr.store.store import Store

OTHER = GroupInfo(model="acme/other", provenance={"revision": "1"}, num_layers=4, hidden_size=8)


class Quiet(SimpleHTTPRequestHandler):
    """Serves files, lists no folder, and records the requests."""

    requests: list[str]

    def list_directory(self, path: Any) -> None:
        self.send_error(404)

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.requests.append(f"GET {self.path}")
        super().do_GET()

    def do_HEAD(self) -> None:
        self.requests.append(f"HEAD {self.path}")
        super().do_HEAD()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str, list[str]]]:
    """A folder, its web address, and the requests to the server."""
    folder = tmp_path / "public"
    folder.mkdir()
    requests: list[str] = []
    handler = type("Handler", (Quiet,), {"requests": requests})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_address[1]}", requests
    server.shutdown()
    server.server_close()
    thread.join()


def filled(store: Store) -> Store:
    for i in range(3):
        store.write(GROUP, make_batch([f"a{i}", f"b{i}"], seed=i, columns={"label": [i, -i]}))
    store.write(GROUP, make_batch(["a0", "c"], seed=7, layers=(0, 1)))
    for i in range(2):
        store.annotate("acme/toy", {"split": {f"a{i}": f"s{i}"}})
    return store


def assert_same(copy: Store, store: Store, **chosen: Any) -> None:
    xr.testing.assert_identical(copy.dataset("acme/toy").load(), store.dataset("acme/toy", **chosen).load())
    xr.testing.assert_identical(copy.tokens("acme/toy").load(), store.tokens("acme/toy", **chosen).load())


@pytest.mark.few(1)
def test_a_published_copy_shows_the_same_in_fewer_parts(store: Store, tmp_path: Path) -> None:
    filled(store)
    summary = store.publish(tmp_path / "copy")
    copy = lz.open_store(tmp_path / "copy")
    assert copy.is_published
    assert not store.is_published
    assert_same(copy, store)
    xr.testing.assert_identical(copy.coverage(), store.coverage())
    assert (len(copy.view(GROUP).parts), len(copy.view(GROUP).annotations)) == (2, 1)
    assert (summary.groups, summary.parts, summary.annotations, summary.prompts) == (1, 2, 1, 7)
    assert "7 prompts in 2 parts, 1 annotation, " in str(summary)
    xr.testing.assert_identical(pickle.loads(pickle.dumps(copy)).dataset().load(), store.dataset().load())  # noqa: S301


@pytest.mark.few(1)
def test_a_published_copy_is_read_only(store: Store, tmp_path: Path) -> None:
    filled(store).publish(tmp_path / "copy")
    with pytest.raises(lz.errors.ReadOnlyError, match="published copy"):
        lz.open_store(tmp_path / "copy", mode="a")
    copy = lz.open_store(tmp_path / "copy")
    assert copy.mode == "r"
    for call in (
        lambda: copy.write(GROUP, make_batch(["z"])),
        lambda: copy.delete("acme/toy", ["a0"]),
        lambda: copy.annotate("acme/toy", {"label": {"a0": 1}}),
        copy.compact,
        copy.gc,
        lambda: lz.evict(copy, max_gb=0, min_age=0),
        lambda: Store(copy.storage, mode="a").write(GROUP, make_batch(["z"])),
        lambda: Store(LocalStorage(tmp_path / "copy"), mode="a").write(GROUP, make_batch(["z"])),
    ):
        with pytest.raises(lz.errors.ReadOnlyError):
            call()
    assert_same(lz.open_store(tmp_path / "copy"), store)


def test_over_http_from_a_server_that_lists_nothing(served: tuple[Path, str, list[str]], tmp_path: Path) -> None:
    folder, url, requests = served
    store = filled(lz.open_store(tmp_path / "s"))
    store.publish(folder / "acts")
    copy = lz.open_store(f"{url}/acts")
    assert copy.mode == "r"
    layer = copy.dataset("acme/toy").resid_mean.sel(layer=3).values
    np.testing.assert_array_equal(layer, store.dataset("acme/toy").resid_mean.sel(layer=3).values)
    group = GROUP.name
    parts = lz.open_store(folder / "acts").storage
    documents = [f"{group}/{name}" for name in parts.list(group) if name not in ("zarr.json", "annotations")]
    documents += [f"{group}/annotations/{name}" for name in parts.list(f"{group}/annotations")]
    chunks = [request for request in requests if "/resid_mean/c.2." in request]
    assert sorted(requests) == sorted(["GET /acts/zarr.json", *(f"GET /acts/{key}/zarr.json" for key in (group, *documents)), *chunks])
    assert len(requests) == 2 + 3 + 1, "one for the layer: the other part does not hold it"
    assert_same(copy, store)
    with pytest.raises(lz.errors.ReadOnlyError, match="web address"):
        lz.open_store(f"{url}/acts", mode="a")
    with pytest.raises(lz.errors.StoreNotFoundError):
        lz.open_store(f"{url}/nothing")


@pytest.mark.long
def test_over_http_sizes_need_no_download_and_checksums_do(served: tuple[Path, str, list[str]], tmp_path: Path) -> None:
    folder, url, requests = served
    filled(lz.open_store(tmp_path / "s")).publish(folder / "acts")
    copy = lz.open_store(f"{url}/acts")
    requests.clear()
    assert copy.verify(full=False, progress=False).ok
    assert all(request.endswith("/zarr.json") for request in requests if request.startswith("GET")), "documents only"
    assert copy.verify(progress=False).ok
    chunk, other = sorted((folder / "acts").glob("*/*/prompts/resid_mean/c.[01].0.0"))[:2]
    chunk.write_bytes(chunk.read_bytes() + b"0")
    other.unlink()
    for full in (False, True):
        assert {problem.kind for problem in copy.verify(full=full, progress=False).problems} == {"size", "missing"}


def test_an_unpublished_store_over_http_raises_an_error(served: tuple[Path, str, list[str]]) -> None:
    folder, url, _ = served
    filled(lz.open_store(folder / "live"))
    with pytest.raises(lz.errors.NotAStoreError, match="publish"):
        lz.open_store(f"{url}/live")


def test_plain_xarray_and_zarr_read_it_here_and_over_http(served: tuple[Path, str, list[str]], tmp_path: Path) -> None:
    folder, url, _ = served
    store = filled(lz.open_store(tmp_path / "s"))
    store.publish(folder / "acts")
    copy = lz.open_store(folder / "acts")
    part = copy.view(GROUP).parts[0]
    for place in (str(folder / "acts"), f"{url}/acts"):
        tokens = xr.open_zarr(f"{place}/{part.path}", group="tokens", chunks=None)
        np.testing.assert_array_equal(tokens.resid.values, part_tokens(copy))
        root = zarr.open_group(place, mode="r", use_consolidated=True)
        assert root.attrs["format"] == "lmprobe-zarr"
        assert root[GROUP.name].attrs["model"] == "acme/toy"
        np.testing.assert_array_equal(np.asarray(root[f"{part.path}/tokens/resid"][:]), tokens.resid.values)  # type: ignore[index]


def part_tokens(copy: Store) -> Any:
    part = copy.view(GROUP).parts[0]
    counts = part.info.n_tokens
    assert counts is not None
    array = part.array("tokens", "resid")
    return np.stack([array.read_chunk(i, 0)[: counts.sum()] for i in range(3)])


@pytest.mark.few(1)
def test_prompts_layers_and_models_can_be_chosen_and_texts_left_out(store: Store, tmp_path: Path) -> None:
    filled(store)
    store.write(OTHER, make_batch(["secret"], seed=3))
    store.publish(tmp_path / "all")
    assert lz.open_store(tmp_path / "all").models() == ["acme/other", "acme/toy"]
    store.publish(tmp_path / "some", model="acme/toy", prompts=["b2", "a0"], layers=[1, 3], text=False)
    copy = lz.open_store(tmp_path / "some")
    assert copy.models() == ["acme/toy"]
    wanted = store.dataset("acme/toy", prompts=["a0", "b2"], layers=[1, 3]).load()
    # Requested in an order, as the others are: without it, the rows of prompts that two calls wrote are in no known order.
    xr.testing.assert_identical(copy.dataset(prompts=["a0", "b2"]).load(), wanted.drop_vars("text"))
    tokens = store.tokens("acme/toy", ["a0", "b2"], [1, 3]).load().drop_vars("text")
    xr.testing.assert_identical(copy.tokens(prompts=["a0", "b2"]).load(), tokens)
    every = b"".join(path.read_bytes() for path in (tmp_path / "some").rglob("*") if path.is_file())
    assert b"secret" not in every
    for wrong, error in (
        ({"model": "acme/toy", "prompts": ["nobody"]}, lz.errors.MissingPromptsError),
        ({"model": "acme/toy", "layers": [2]}, lz.errors.LayerOutOfRangeError),
        ({"model": "nobody"}, lz.errors.ModelNotStoredError),
        ({"prompts": ["a0"]}, lz.errors.AmbiguousProvenanceError),
        ({"part_bytes": 0}, lz.errors.InvalidArgumentError),
    ):
        with pytest.raises(error):
            store.publish(tmp_path / "wrong", **wrong)
    assert not (tmp_path / "wrong").exists()
    with pytest.raises(lz.errors.ModelNotStoredError):
        lz.open_store(tmp_path / "empty").publish(tmp_path / "wrong")


def test_a_run_that_is_too_large_becomes_several_parts_in_order(store: Store, tmp_path: Path) -> None:
    store.write(GROUP, make_batch([f"p{i}" for i in range(9)], seed=1))
    store.write(GROUP, make_batch(["q"], seed=2))
    store.publish(tmp_path / "copy", part_bytes=700)
    copy = lz.open_store(tmp_path / "copy")
    assert_same(copy, store)


@pytest.mark.few(1)
def test_the_card_describes_the_copy_and_how_to_open_it(store: Store, tmp_path: Path) -> None:
    filled(store).publish(tmp_path / "copy")
    card = (tmp_path / "copy" / "README.md").read_text()
    for text in (
        "acme/toy",
        "revision",
        "abc",
        "| prompts | 7 |",
        "label, split",
        "resid_mean",
        "License:",
        "| layers | 0-1, 3 |",
        "float32",
    ):
        assert text in card, text
    assert str(tmp_path) not in card
    code = [block.split("```")[0] for block in card.split("```python\n")[1:]]
    for block in code:
        exec(block.replace("…", str(tmp_path / "copy")), {})  # noqa: S102 — what the card tells people to type
    store.publish(tmp_path / "none", card=False)
    assert not (tmp_path / "none" / "README.md").exists()
    store.publish(tmp_path / "own", card="# Mine\n")
    assert (tmp_path / "own" / "README.md").read_text() == "# Mine\n"


@pytest.mark.few(1)
def test_publish_replaces_nothing_but_an_older_copy(store: Store, tmp_path: Path) -> None:
    filled(store)
    live = filled(lz.open_store(tmp_path / "live"))
    with pytest.raises(lz.errors.InvalidArgumentError, match="grows"):
        store.publish(tmp_path / "live", overwrite=True)
    (tmp_path / "live" / "zarr.json").unlink()
    with pytest.raises(lz.errors.NotAStoreError, match="parts of a store"):
        store.publish(tmp_path / "live", overwrite=True)
    assert live.view(GROUP).parts
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(lz.errors.NotAStoreError, match="thesis"):
        store.publish(tmp_path / "mine", overwrite=True)
    (tmp_path / "copy").mkdir()
    store.publish(tmp_path / "copy")
    before = set((tmp_path / "copy").rglob("c.*"))
    with pytest.raises(lz.errors.InvalidArgumentError, match="overwrite=True"):
        store.publish(tmp_path / "copy")
    store.write(GROUP, make_batch(["new"], seed=9))
    store.publish(tmp_path / "copy", overwrite=True)
    assert_same(lz.open_store(tmp_path / "copy"), store)
    assert not any(path.exists() for path in before)


@pytest.mark.few(1)
def test_drafts_of_whoever_was_killed_are_cleared_and_nothing_else(store: Store, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    filled(store).publish(target)
    (target / "zarr.json").unlink()
    drafts = [target / ".README.md.0123456789ab.partial", target / ".zarr.json.0123456789ab.partial"]
    for draft in drafts:
        draft.write_bytes(b"{")
    mine = target / ".README.md.mine.partial"
    mine.write_bytes(b"notes")
    with pytest.raises(lz.errors.NotAStoreError, match="holds other things"):
        store.publish(target)
    assert all(draft.exists() for draft in drafts)
    mine.unlink()
    store.publish(target)
    assert not any(draft.exists() for draft in drafts)
    assert_same(lz.open_store(target), store)


def test_verify_reports_a_damaged_published_root(store: Store, tmp_path: Path) -> None:
    filled(store).publish(tmp_path / "copy")
    root = tmp_path / "copy" / "zarr.json"
    document = json.loads(root.read_bytes())
    broken: list[Any] = [{"groups": {"../x": []}}, {"groups": {GROUP.name: ["../../x"]}}, {"groups": [1]}, 3, {}]
    for wrong in broken:
        document["attributes"]["published"] = wrong
        root.write_text(json.dumps(document))
        with pytest.raises(lz.errors.CorruptPartError):
            lz.open_store(tmp_path / "copy")
