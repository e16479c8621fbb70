"""Writing, reading, opening and looking at what is stored, on a local disk, beside lmprobe and ``np.fromfile``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import zarr

import lmprobe_zarr as lz
from benchmarks.data import (
    BATCH,
    GROUP,
    HIDDEN,
    LAYERS,
    Array,
    activations,
    clear,
    digests,
    lengths_of,
    pooled_batch,
    write_tokens,
)
from benchmarks.timing import Figure, Peer, alternate, ms
from lmprobe_zarr.batch.hashes import prompt_sha256
from lmprobe_zarr.batch.token_batch import TokenBatch
from lmprobe_zarr.store.format.group import GroupInfo
from lmprobe_zarr.store.store import Store


def pooled(folder: Path, peer: Peer, *, quick: bool, runs: int) -> list[Figure]:
    """Write and read what is one value per prompt."""
    n = 500 if quick else 5000
    values = activations((LAYERS, n, HIDDEN))
    np.save(folder / "pooled.npy", values)
    layer, layers = 7, list(range(LAYERS))
    values[layer].tofile(folder / "raw")
    number = iter(range(1000))
    batch = pooled_batch(values)

    def stored(*, compressed: bool = True, durable: bool = False) -> Store:
        store = lz.open_store(folder / f"p{next(number)}", durable=durable)
        store.write(GROUP, batch, compressed=compressed)
        return store

    def fresh(*, compressed: bool = True, durable: bool = False) -> float:
        began = time.perf_counter()
        store = stored(compressed=compressed, durable=durable)
        took = time.perf_counter() - began
        clear(Path(store.url))
        return took

    def theirs() -> float:
        place = folder / f"peer{next(number)}"
        took = float(peer("save_pooled", place=str(place), values=str(folder / "pooled.npy"), layers=layers))
        clear(place)
        return took

    wrote = alternate(
        {"ours": fresh, "raw": lambda: fresh(compressed=False), "synced": lambda: fresh(durable=True), "lmprobe": theirs}, min(runs, 3)
    )
    size = values.nbytes / 1e9
    work = f"write pooled, {n:,} × {LAYERS} × {HIDDEN} float16"
    out = [
        Figure(
            work=work,
            what="lmprobe / ours, neither flushed to the medium",
            value=wrote["lmprobe"] / wrote["ours"],
            reach=15,
            stretch=40,
            ours=f"{size / wrote['ours']:.2f} GB/s (raw {size / wrote['raw']:.2f}, flushed {size / wrote['synced']:.2f})",
            lmprobe=f"{size / wrote['lmprobe']:.3f} GB/s",
        )
    ]
    stores = {"default": stored(), "raw": stored(compressed=False)}
    place = str(folder / "peer-read")
    peer("save_pooled", place=place, values=str(folder / "pooled.npy"), layers=layers)
    views = {name: store.dataset(dtype="stored") for name, store in stores.items()}
    assert all((view.resid_mean.sel(layer=layer).values == values[layer]).all() for view in views.values())
    part = next(Path(stores["raw"].url).glob("*/*/prompts/resid_mean"))
    plain = zarr.open_array(part, mode="r")
    read = alternate(
        {
            "default": lambda: views["default"].resid_mean.sel(layer=layer).values,
            "raw": lambda: views["raw"].resid_mean.sel(layer=layer).values,
            "fromfile": lambda: np.fromfile(folder / "raw", np.float16),
            "zarr": lambda: plain[layer],
            "lmprobe": peer.seconds("read_pooled", place=place, count=n, layers=[layer]),
        },
        runs,
    )
    work = f"read pooled, one layer of {n:,} prompts, {values[layer].nbytes / 1e6:.0f} MB"
    limit = f"`np.fromfile` {ms(read['fromfile'])}, plain zarr raw {ms(read['zarr'])}"
    out.append(
        Figure(
            work=work,
            what="lmprobe / ours",
            value=read["lmprobe"] / read["default"],
            reach=100,
            stretch=200,
            ours=ms(read["default"]),
            lmprobe=ms(read["lmprobe"]),
        )
    )
    for name, reach, stretch in (("raw", 2.5, 1.3), ("default", 4.0, 2.0)):
        out.append(
            Figure(
                work=work,
                what=f"ours, {name} codec / `np.fromfile`",
                value=read[name] / read["fromfile"],
                reach=reach,
                stretch=stretch,
                at_least=False,
                ours=ms(read[name]),
                limit=limit,
            )
        )
    return out


def tokens(folder: Path, peer: Peer, *, quick: bool, runs: int) -> list[Figure]:
    """Write and read what is one value per token."""
    n = 40 if quick else 400
    lengths = lengths_of(n)
    values = activations((LAYERS, int(lengths.sum()), HIDDEN))
    np.save(folder / "tokens.npy", values)
    layer, layers = 7, list(range(LAYERS))
    values[layer].tofile(folder / "raw")
    number = iter(range(1000))

    def fresh(*, compressed: bool = True, durable: bool = False, keep: bool = False) -> float | Store:
        place = folder / f"t{next(number)}"
        store = lz.open_store(place, durable=durable)
        began = time.perf_counter()
        write_tokens(store, values, lengths, compressed=compressed)
        took = time.perf_counter() - began
        if keep:
            return store
        clear(place)
        return took

    given = {"values": str(folder / "tokens.npy"), "layers": layers, "lengths": lengths.tolist()}

    def theirs(batch: int) -> float:
        place = folder / f"peer{next(number)}"
        took = float(peer("save_tokens", place=str(place), batch=batch, **given))
        clear(place)
        return took

    wrote = alternate(
        {
            "ours": fresh,
            "raw": lambda: fresh(compressed=False),
            "synced": lambda: fresh(durable=True),
            "lmprobe": lambda: theirs(BATCH),
            "unpadded": lambda: theirs(1),
        },
        min(runs, 3),
    )
    size = values.nbytes / 1e9
    out = [
        Figure(
            work=f"write tokens, {size:.2f} GB",
            what="lmprobe / ours, neither flushed to the medium",
            value=wrote["lmprobe"] / wrote["ours"],
            reach=1.5,
            stretch=2,
            ours=f"{size / wrote['ours']:.2f} GB/s (raw {size / wrote['raw']:.2f}, flushed {size / wrote['synced']:.2f})",
            lmprobe=f"{size / wrote['lmprobe']:.2f} GB/s with its padding ({size / wrote['unpadded']:.2f} if there were none)",
        )
    ]
    stores = {"default": fresh(keep=True), "raw": fresh(compressed=False, keep=True)}
    place = str(folder / "peer-read")
    peer("save_tokens", place=place, batch=BATCH, **given)
    # In the dtype that lmprobe hands out too. Selected anew each time, since xarray keeps what it has read.
    views = {name: store.tokens(dtype="stored") for name, store in stores.items() if isinstance(store, Store)}
    assert all((view.resid.sel(layer=layer).values == values[layer]).all() for view in views.values())
    read = alternate(
        {
            "default": lambda: views["default"].resid.sel(layer=layer).values,
            "raw": lambda: views["raw"].resid.sel(layer=layer).values,
            "fromfile": lambda: np.fromfile(folder / "raw", np.float16),
            "lmprobe": peer.seconds("read_tokens", place=place, count=n, layer=layer),
        },
        runs,
    )
    work = f"read tokens, one layer of {n} prompts, {values[layer].nbytes / 1e6:.0f} MB"
    limit = f"`np.fromfile` {ms(read['fromfile'])}"
    out.append(
        Figure(
            work=work,
            what="lmprobe / ours",
            value=read["lmprobe"] / read["default"],
            reach=6,
            stretch=10,
            ours=ms(read["default"]),
            lmprobe=ms(read["lmprobe"]),
        )
    )
    for name, reach, stretch in (("raw", 0.8, 1.2), ("default", 0.4, 0.7)):
        out.append(
            Figure(
                work=work,
                what=f"`np.fromfile` / ours, {name} codec",
                value=read["fromfile"] / read[name],
                reach=reach,
                stretch=stretch,
                ours=ms(read[name]),
                limit=limit,
            )
        )
    hashes = [lz.prompt_hash(f"prompt {i}") for i in range(n)]
    turn = iter(range(10**6))

    def one_prompt() -> Array:
        found: Array = views["default"].resid.sel(prompt=hashes[next(turn) * 7 % n]).values
        return found

    def one_of_theirs() -> float:
        return float(peer("read_prompt", place=place, number=next(turn) * 7 % n, layers=layers))

    alone = alternate({"ours": one_prompt, "lmprobe": one_of_theirs}, 5 * runs)
    out.append(
        Figure(
            work=f"read tokens, one prompt of 5 to 127 tokens, all {LAYERS} layers",
            what="lmprobe / ours",
            value=alone["lmprobe"] / alone["ours"],
            reach=1,
            stretch=2,
            ours=ms(alone["ours"]),
            lmprobe=ms(alone["lmprobe"]),
        )
    )
    return out


def opening(folder: Path, _peer: Peer, *, quick: bool, runs: int) -> list[Figure]:
    """Open a group of many parts, and of one, from nothing."""
    parts = 100 if quick else 1000
    info = GroupInfo(model="open", num_layers=1, hidden_size=4)
    store = lz.open_store(folder / "many", durable=False)
    for part in range(parts):
        sha = [prompt_sha256(f"{part} {i}") for i in range(100)]
        store.write(info, TokenBatch(sha256=sha, layers=(0,), prompts={"resid_mean": np.zeros((1, 100, 4), np.float16)}))
    target = lz.open_store(folder / "one", durable=False)
    store.copy_to(target)
    target.compact(progress=False)
    target.gc(max_age=0)

    def from_nothing(url: str) -> Any:
        fresh = lz.open_store(url, "r")
        return fresh.view(fresh.find_group())

    took = alternate({"many": lambda: from_nothing(store.url), "one": lambda: from_nothing(target.url)}, runs)
    view = from_nothing(store.url)
    wanted = [f"{i % parts} {i % 100}" for i in range(10_000)]
    looked = alternate({"lookups": lambda: view.select(wanted)}, runs)
    work = f"open {100 * parts:,} prompts"
    scale = 0.1 if quick else 1
    return [
        Figure(
            work=work, what=f"in {parts:,} parts, local", value=took["many"], reach=0.5 * scale, stretch=0.25 * scale, at_least=False,
            unit="s", ours=ms(took["many"]),
        ),
        Figure(
            work=work, what="compacted, local", value=took["one"], reach=0.1, stretch=None, at_least=False, unit="s", ours=ms(took["one"])
        ),
        Figure(
            work=work, what="then 10,000 lookups", value=looked["lookups"], reach=0.05, stretch=0.002, at_least=False, unit="s",
            ours=ms(looked["lookups"]),
        ),
    ]  # fmt: skip


def looking(folder: Path, peer: Peer, *, quick: bool, runs: int) -> list[Figure]:
    """What is in the cache."""
    n = 540 if quick else 5400
    values = activations((4, n, 64))
    np.save(folder / "info.npy", values)
    peer("save_pooled", place=str(folder / "peer"), values=str(folder / "info.npy"), layers=[0, 1, 2, 3])
    store = lz.open_store(folder / "ours", durable=False)
    info = GroupInfo(model="info", num_layers=4, hidden_size=64)
    sha = digests(n)
    for i in range(0, n, n // 54):  # a part per hundred prompts, as an interrupted extraction leaves them
        rows = values[:, i : i + n // 54]
        store.write(info, TokenBatch(sha256=sha[i : i + n // 54], layers=(0, 1, 2, 3), prompts={"resid_mean": rows}))
    took = alternate(
        {"ours": lambda: lz.cache_info(store=lz.open_store(store.url, "r")), "lmprobe": peer.seconds("info", place=str(folder / "peer"))},
        runs,
    )
    return [
        Figure(
            work=f"`cache_info()` over {n:,} entries",
            what="ours",
            value=took["ours"],
            reach=0.1,
            stretch=0.03,
            at_least=False,
            unit="s",
            ours=ms(took["ours"]),
            lmprobe=ms(took["lmprobe"]),
        )
    ]
