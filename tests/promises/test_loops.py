"""Written and read prompt by prompt, a remote place costs what it holds: nothing is fetched twice, and nothing is ever out of date."""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from s3_server import S3, Fault
from stores import GROUP, make_batch

import lmprobe_zarr as lz
from lmprobe_zarr import config
from lmprobe_zarr.errors import CacheWarning, CorruptPartError
from lmprobe_zarr.store.parts.kept_chunks import _KeptChunks

N, TOKENS, WIDTH = 60, 7, 16


@pytest.fixture
def url(s3: S3) -> str:
    return f"s3://pub/{uuid.uuid4().hex}/acts"


def one_prompt(i: int) -> dict[str, Any]:
    return {"model": "m", "prompts": [f"p{i}"], "pooled": {"resid_mean": {0: np.full((1, 4), i, "float32")}}}


def test_each_write_by_url_costs_the_same_requests(s3: S3, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.proxy.endpoint)
    costs = []
    for i in range(7):
        s3.proxy.reset()
        lz.write_activations(url, **one_prompt(i))
        costs.append(s3.proxy.kinds())
    assert all(cost["GET"] <= costs[1]["GET"] + 1 for cost in costs[2:])
    assert all(cost.total() <= costs[1].total() + 1 for cost in costs[2:])
    data = lz.open_store(url).dataset()
    np.testing.assert_array_equal(data.resid_mean.sel(layer=0)[:, 0], np.arange(7))


@pytest.mark.few(2)
def test_a_loop_of_writes_sees_what_others_did_meanwhile(root: str) -> None:
    for i in range(3):
        lz.write_activations(root, **one_prompt(i))
    other = lz.open_store(root)
    other.delete("m", ["p0"])
    lz.write_activations(root, **one_prompt(3))
    other.compact(progress=False)
    lz.write_activations(root, **one_prompt(4))
    lz.clear_cache(url=root)
    lz.write_activations(root, **one_prompt(5))
    assert lz.open_store(root).dataset().text.values.tolist() == ["p5"]


def test_a_document_that_was_changed_between_two_writes_is_read_again(tmp_path: Path) -> None:
    for i in range(2):
        lz.write_activations(tmp_path / "acts", **one_prompt(i))
    document = max((tmp_path / "acts").glob("*/*/zarr.json"))
    document.write_bytes(document.read_bytes()[:-7] + b"damaged")
    with pytest.warns(CacheWarning, match="is damaged"):
        lz.write_activations(tmp_path / "acts", **one_prompt(2))


@pytest.fixture
def filled(url: str) -> tuple[str, list[Any]]:
    values = [np.random.default_rng(i).standard_normal((TOKENS, WIDTH)).astype("float32") for i in range(N)]
    lz.write_activations(
        url,
        model="m",
        prompts=[f"p{i}" for i in range(N)],
        activations={"resid": {0: values}},
        pooled={"resid_mean": {0: np.stack([v.mean(0) for v in values])}},
    )
    return url, values


def reads(values: list[Any], dataset: Any, tokens: Any) -> dict[str, tuple[Callable[[], Any], Any]]:
    hashes, one = dataset.prompt.values, tokens.resid.sel(layer=0)
    means = np.stack([v.astype(np.float64).mean(0) for v in values])
    in_order = np.argsort(hashes)
    return {
        "sel of tokens": (lambda: np.stack([tokens.resid.sel(layer=0, prompt=h).values for h in hashes]), np.stack(values)),
        "sel of prompts": (lambda: np.stack([dataset.resid_mean.sel(layer=0, prompt=h).values for h in hashes]), means),
        "isel of prompts": (lambda: np.stack([dataset.resid_mean.isel(layer=0, prompt=i).values for i in range(N)]), means),
        "groupby": (lambda: one.groupby("prompt").mean().values, means[in_order]),
        "windows": (lambda: np.concatenate([one[i : i + 5].values for i in range(0, N * TOKENS, 5)]), np.concatenate(values)),
        "text": (lambda: [dataset.text.values.tolist() for _ in range(3)], [[f"p{i}" for i in range(N)]] * 3),
    }


@pytest.mark.few(1)
@pytest.mark.parametrize("what", ["sel of tokens", "sel of prompts", "isel of prompts", "groupby", "windows", "text"])
def test_read_prompt_by_prompt_each_chunk_is_fetched_once(s3: S3, filled: tuple[str, list[Any]], what: str) -> None:
    url, values = filled
    store = lz.open_store(url, "r", storage_options=s3.options(counted=True))
    dataset, tokens = store.dataset(), store.tokens()
    call, expected = reads(values, dataset, tokens)[what]
    s3.proxy.reset()
    found = call()
    assert s3.proxy.kinds()["GET"] <= 2
    assert s3.proxy.kinds().total() <= 2
    if what == "text":
        assert found == expected
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_without_memory_for_them_each_read_fetches(s3: S3, filled: tuple[str, list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMPROBE_CACHE_KEPT_MB", "0")
    config.reload()
    dataset = lz.open_store(filled[0], "r", storage_options=s3.options(counted=True)).dataset()
    s3.proxy.reset()
    for i in range(4):
        np.testing.assert_allclose(dataset.resid_mean.isel(layer=0, prompt=i).values, filled[1][i].mean(0), rtol=1e-5)
    assert s3.proxy.kinds()["GET"] == 4


def test_threads_that_read_one_chunk_share_one_request(s3: S3, filled: tuple[str, list[Any]]) -> None:
    dataset = lz.open_store(filled[0], "r", storage_options=s3.options(counted=True)).dataset(chunks={"prompt": 1})
    s3.proxy.reset()
    s3.proxy.fault = lambda request: Fault(delay=0.2)
    found = dataset.resid_mean.sel(layer=0).compute(scheduler="threads", num_workers=8).values
    assert len([request for request in s3.proxy.requests if "resid_mean/c." in request.path]) == 1
    np.testing.assert_allclose(found, np.stack([v.mean(0) for v in filled[1]]), rtol=1e-5)


def test_values_that_were_replaced_are_never_shown_from_memory(s3: S3, url: str) -> None:
    options = s3.options(counted=True)
    for value in (1, 2, 3):
        lz.write_activations(
            url, **one_prompt(value) | {"prompts": ["a", "b"], "pooled": {"resid_mean": {0: np.full((2, 4), value, "float32")}}}
        )
        data = lz.open_store(url, "r", storage_options=options).dataset()
        assert [float(data.resid_mean.isel(layer=0, prompt=i).mean()) for i in range(2)] == [value, value]


def test_a_chunk_that_is_damaged_is_not_kept(s3: S3, url: str) -> None:
    store = lz.open_store(url, storage_options=s3.options())
    store.write(GROUP, make_batch(["a", "b", "c"]))
    data = store.dataset()
    part = store.listing(store.find_group()).parts[0]
    key = next(f"{part.path}/{name}" for name in part.info.file_names() if "resid_mean/c." in name)
    whole = store.storage.read(key)
    store.storage.write(key, whole[:-1] + bytes([whole[-1] ^ 1]), durable=False)
    for _ in range(2):
        with pytest.raises(CorruptPartError):
            _ = data.resid_mean.isel(layer=0, prompt=0).values
    store.storage.write(key, whole, durable=False)
    assert np.isfinite(data.resid_mean.isel(layer=0, prompt=0).values).all()


# ----------------------------------------------------------------------------------------------------------------- alone


def test_what_is_kept_is_bounded_and_the_least_recently_read_goes_first() -> None:
    kept, fetched = _KeptChunks(), []

    def fetch(i: int) -> bytes:
        fetched.append(i)
        return bytes(10)

    for i in (0, 1, 2, 0, 3, 0, 1):
        kept.get(i, lambda i=i: fetch(i), 30)  # type: ignore[misc]
    assert fetched == [0, 1, 2, 3, 1], "1 went for 3, because 0 had been read since"
    assert kept._nbytes == sum(map(len, kept._bodies.values())) == 30
    assert len(kept.get("large", lambda: bytes(31), 30)) == 31
    assert kept._nbytes == 30, "what is larger than all of it is not kept"


def test_an_error_of_a_fetch_reaches_all_who_wait_and_is_not_kept() -> None:
    kept, errors = _KeptChunks(), []
    started = threading.Event()

    def fail() -> bytes:
        started.set()
        time.sleep(0.1)
        raise FileNotFoundError("gone")

    def read() -> None:
        try:
            kept.get("a", fail, 30)
        except FileNotFoundError as error:
            errors.append(error)

    threads = [threading.Thread(target=read) for _ in range(3)]
    threads[0].start()
    started.wait()
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 3
    assert kept.get("a", lambda: b"now", 30) == b"now"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_does_not_wait_for_a_lock_of_its_parent(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = f"""
import os, threading, time, numpy as np
import lmprobe_zarr as lz
from lmprobe_zarr.store import reopen
from lmprobe_zarr.store.parts import kept_chunks
for what in ("chunks", "tables"):
    kept_chunks._kept(os.getpid(), what)._lock.acquire()
reopen._lock.acquire()
child = os.fork()
if child == 0:
    assert kept_chunks.kept_chunk("a", lambda: b"1") == kept_chunks.kept_table("a", lambda: b"1") == b"1"
    lz.write_activations({str(tmp_path / "acts")!r}, model="m", prompts=["a"], pooled={{"resid_mean": {{0: np.ones((1, 4), "float32")}}}})
    os._exit(0)
until = time.monotonic() + 60
while time.monotonic() < until:
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        raise SystemExit(os.waitstatus_to_exitcode(status))
    time.sleep(0.05)
os.kill(child, 9)
raise SystemExit(7)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0
