"""Reading and opening on an S3 server of the benchmark's own, beside lmprobe."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import lmprobe_zarr as lz
from benchmarks.data import (
    HIDDEN,
    Array,
    activations,
    digests,
)
from benchmarks.remote import measure
from benchmarks.timing import Figure, Peer, alternate, ms
from lmprobe_zarr.batch.token_batch import TokenBatch
from lmprobe_zarr.store.format.group import GroupInfo


@contextmanager
def s3_server() -> Iterator[Any]:
    """A SeaweedFS of its own with a proxy that counts and can wait, as in the tests."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
    import s3_server as server

    with tempfile.TemporaryDirectory() as folder:
        endpoint, connection = server.server_of(Path(folder))
        proxy = server.Proxy(endpoint)
        with connection, proxy.running():
            yield server.S3(endpoint, proxy)


def on_s3(folder: Path, _peer: Peer, *, quick: bool, runs: int) -> list[Figure]:
    """One layer of 1,000 prompts in ten parts, and opening many parts."""
    with s3_server() as s3:
        os.environ |= {
            "AWS_ENDPOINT_URL": s3.endpoint,
            "AWS_ACCESS_KEY_ID": s3.options()["key"],
            "AWS_SECRET_ACCESS_KEY": s3.options()["secret"],
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        peer = Peer(folder / "s3-peer")
        try:
            return _on_s3(folder, peer, quick=quick, runs=runs)
        finally:
            peer.close()


def _on_s3(folder: Path, peer: Peer, *, quick: bool, runs: int) -> list[Figure]:
    n, layers = (100 if quick else 1000), 8
    values = activations((layers, n, HIDDEN))
    np.save(folder / "s3.npy", values)
    place = "s3://team/bench-lmprobe"
    peer("save_pooled", place=place, values=str(folder / "s3.npy"), layers=list(range(layers)))
    store = lz.open_store("s3://team/bench-ours")
    info = GroupInfo(model="s3", num_layers=layers, hidden_size=HIDDEN)
    sha, step = digests(n), n // 10
    for i in range(0, n, step):
        rows = values[:, i : i + step]
        store.write(info, TokenBatch(sha256=sha[i : i + step], layers=tuple(range(layers)), prompts={"resid_mean": rows}))

    def ours() -> Array:
        found: Array = lz.open_store("s3://team/bench-ours", "r").dataset().resid_mean.sel(layer=5).values
        return found

    assert (ours() == values[5]).all()
    took = alternate({"ours": ours, "lmprobe": peer.seconds("read_pooled", place=place, count=n, layers=[5])}, min(runs, 5))
    opened = measure("s3://team", 100 if quick else 1000, min(runs, 3))
    work = f"open {10_000 if quick else 100_000:,} prompts on S3"
    return [
        Figure(
            work=f"S3, one layer of {n:,} prompts in 10 parts, opening included", what="lmprobe / ours",
            value=took["lmprobe"] / took["ours"], reach=20, stretch=50, ours=ms(took["ours"]), lmprobe=ms(took["lmprobe"]),
        ),
        Figure(
            work=work, what=f"in {100 if quick else 1000:,} parts", value=opened["many"], reach=5, stretch=2, at_least=False, unit="s",
            ours=f"{ms(opened['many'])} (compacted {ms(opened['one'])})",
        ),
        Figure(
            work=work, what="then 10,000 lookups", value=opened["lookups"], reach=0.05, stretch=0.002, at_least=False, unit="s",
            ours=ms(opened["lookups"]),
        ),
    ]  # fmt: skip
