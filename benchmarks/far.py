"""Reading over a network that is slow and far: one layer of 1,000 prompts in ten parts, and a reader's own cache: ``make bench``.

An S3 server of the benchmark's own, behind a proxy that waits before it hands on each request. Reads through the cache are compared with
those of the same store on the local disk, the sides in turn.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

import lmprobe_zarr as lz
from benchmarks.data import HIDDEN, activations, digests
from benchmarks.on_s3 import s3_server
from benchmarks.timing import alternate, ms
from lmprobe_zarr.batch.token_batch import TokenBatch
from lmprobe_zarr.store.format.group import GroupInfo
from lmprobe_zarr.store.parts import kept_chunks

LAYERS, PROMPTS, PARTS, PER_PROMPT = 8, 1000, 10, 30
GROUP = GroupInfo(model="far", num_layers=LAYERS, hidden_size=HIDDEN)


def write(store: lz.Store, level: str, *, compressed: bool = True) -> np.ndarray[Any, Any]:
    """Ten parts; what they hold."""
    each = 1 if level == "prompts" else PER_PROMPT
    values, sha, step = activations((LAYERS if each == 1 else 2, PROMPTS * each, HIDDEN)), digests(PROMPTS), PROMPTS // PARTS
    for i in range(0, PROMPTS, step):
        rows = values[:, i * each : (i + step) * each]
        held: dict[str, Any] = {"prompts": {"resid_mean": rows}}
        if each > 1:
            held = {"n_tokens": np.full(step, each), "tokens": {"resid": rows}}
        part = store.new_part(GROUP, compressed=compressed)
        part.append(TokenBatch(sha256=sha[i : i + step], layers=tuple(range(len(values))), **held))
        part.commit()
    return values


def lazily(store: lz.Store, level: str) -> Any:
    """The variable that is read."""
    return store.dataset(dtype="stored").resid_mean if level == "prompts" else store.tokens(dtype="stored").resid


def read_again(array: Any) -> None:
    """One layer; xarray keeps what it has read, so of a copy."""
    array.copy().sel(layer=1).values  # noqa: B018


@contextmanager
def waiting(s3: Any, seconds: float) -> Iterator[None]:
    """The proxy adds so much to each request."""
    fault = sys.modules["s3_server"].Fault
    s3.proxy.reset()
    s3.proxy.fault = lambda _: fault(delay=seconds)
    try:
        yield
    finally:
        s3.proxy.reset()


def cached(folder: Path, s3: Any, runs: int) -> list[dict[str, Any]]:
    """Second reads through the cache, beside those of the same store on the local disk."""
    found = []
    for level, compressed in (("prompts", True), ("tokens", True), ("tokens", False)):
        name = f"{level}-{'default' if compressed else 'raw'}"
        near = lz.open_store(folder / name, durable=False)
        values = write(near, level, compressed=compressed)
        near.copy_to(f"s3://team/{name}", storage_options=s3.options(), progress=False)
        with waiting(s3, 0.02):
            far = lz.open_store(
                f"s3://team/{name}", "r", storage_options=s3.options(counted=True), cache="4 GB", cache_folder=folder / "reads"
            )
            sides = {"local": lazily(near, level), "cached": lazily(far, level)}
            began = time.perf_counter()
            first = sides["cached"].sel(layer=1).values
            once = time.perf_counter() - began
            assert (first == values[1]).all()
            s3.proxy.requests.clear()
            took = alternate({side: partial(read_again, array) for side, array in sides.items()}, runs)
            assert not s3.proxy.requests
            kept_chunks._kept.cache_clear()

            def opened(place: Any, level: str = level, **options: Any) -> float:
                began = time.perf_counter()
                lazily(lz.open_store(place, "r", **options), level).sel(layer=1).values  # noqa: B018
                return time.perf_counter() - began

            again = opened(f"s3://team/{name}", storage_options=s3.options(counted=True), cache="4 GB", cache_folder=folder / "reads")
        what = f"{level}, {'default codec' if compressed else 'raw'}, {first.nbytes / 1e6:.0f} MB"
        times = {"first": once, "second": took["cached"], "local": took["local"], "opened again": again}
        found.append({"read": what, **times, "share": took["local"] / took["cached"]})
    return found


def stand_before(endpoint: str, seconds: float, ports: Any) -> None:
    """A proxy in a process of its own, so that it takes no turns of the reader's interpreter."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
    import s3_server as server

    proxy = server.Proxy(endpoint)
    proxy.fault = lambda _: server.Fault(delay=seconds)
    ports.put(proxy.server_address[1])
    proxy.serve_forever(poll_interval=0.05)


@contextmanager
def apart(endpoint: str, seconds: float) -> Iterator[str]:
    """The endpoint of a proxy that waits so long before each request."""
    spawn = get_context("spawn")
    ports = spawn.Queue()
    process = spawn.Process(target=stand_before, args=(endpoint, seconds, ports), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ports.get(timeout=60)}"
    finally:
        process.kill()
        process.join()


def fetch(endpoint: str, names: list[str]) -> int:
    """Bytes of some objects that anybody may read, each over a connection of its own, all at once."""

    def one(name: str) -> int:
        connection = http.client.HTTPConnection(endpoint.removeprefix("http://"))
        connection.request("GET", f"/{name}")
        return len(connection.getresponse().read())

    with ThreadPoolExecutor(len(names)) as pool:
        return sum(pool.map(one, names))


def opened_and_read(s3: Any, runs: int) -> list[dict[str, Any]]:
    """One layer, opening included, beside three latencies and the time that its bytes alone take."""
    url = "s3://pub/far"
    values = write(lz.open_store(url, storage_options=s3.options()), "prompts")
    storage: Any = lz.open_store(url, storage_options=s3.options()).storage
    keys = [str(key) for key in storage.filesystem.find("pub/far")]
    chunks = [key for key in keys if key.endswith("resid_mean/c.5.0.0")]
    assert len(chunks) == PARTS
    found = []
    for delay in (0.02, 0.1):
        with apart(s3.endpoint, delay) as slow, apart(s3.endpoint, 0.0) as fast:

            def read(client: str, endpoint: str = slow) -> None:
                options = {**s3.options(), "endpoint_url": endpoint, "client": client}
                layer = lz.open_store(url, "r", storage_options=options).dataset(dtype="stored").resid_mean.sel(layer=5).values
                assert (layer == values[5]).all()

            sides = {client: partial(read, client) for client in ("s3fs", "obstore")}
            took = alternate({**sides, "bytes": partial(fetch, fast, chunks), "one": partial(fetch, slow, ["pub/far/zarr.json"])}, runs)
            least = 3 * delay + took["bytes"]
            beside = {"delay": delay, "bytes": took["bytes"], "one request": took["one"]}
            found += [{"client": side, **beside, "seconds": took[side], "ratio": took[side] / least} for side in sides]
    return found


def main() -> int:
    """Print tables, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, s3_server() as s3:
        far = opened_and_read(s3, options.runs)
        found = cached(Path(folder), s3, options.runs)
    if options.json:
        json.dump({"opened and read": far, "cached": found}, sys.stdout, indent=2)
        return 0
    print("| added | client | opened and read | its bytes alone | a request alone | of three latencies and the bytes |")
    print("|---|---|---|---|---|---|")
    for row in far:
        times = [ms(row[name]) for name in ("seconds", "bytes", "one request")]
        print(f"| {ms(row['delay'])} | {row['client']} | {' | '.join(times)} | {row['ratio']:.2f} |")
    print()
    print("| one layer, 20 ms added | first read | second, through the cache | local store | share of its speed | opened again and read |")
    print("|---|---|---|---|---|---|")
    for row in found:
        times = [ms(row[name]) for name in ("first", "second", "local")]
        print(f"| {row['read']} | {' | '.join(times)} | {row['share']:.2f} | {ms(row['opened again'])} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
