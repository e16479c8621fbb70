"""Every figure that the store is to reach, beside lmprobe and beside what the machine can do: one function per kind of work.

Data are random with a few outlier dimensions, as residual streams have them, where speed is measured, and real activations of
all-MiniLM-L6-v2 where size is.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr

import lmprobe_zarr as lz
from benchmarks.timing import Figure, Peer, alternate, ms
from lmprobe_zarr.batch import TokenBatch, prompt_sha256
from lmprobe_zarr.schema import GroupInfo
from lmprobe_zarr.store import Store

Array = np.ndarray[Any, Any]
LAYERS, HIDDEN = 16, 2048
GROUP = GroupInfo(model="bench", num_layers=LAYERS, hidden_size=HIDDEN)
#: lmprobe runs prompts in batches of so many unless told otherwise, and stores each with its batch's padding.
BATCH = 8


def activations(shape: tuple[int, ...], seed: int = 0) -> Array:
    """Random values with a few outlier dimensions; float16."""
    rng = np.random.default_rng(seed)
    out = np.empty(shape, np.float16)
    outliers = rng.integers(0, shape[-1], 3)
    for layer in range(shape[0]):  # a layer at a time: float32 of all of them would be gigabytes
        values = rng.standard_normal(shape[1:], dtype=np.float32)
        values[..., outliers] *= 40
        out[layer] = values
    return out


def digests(count: int) -> list[str]:
    """Those of the prompts that lmprobe's side stores too."""
    return [prompt_sha256(f"prompt {i}") for i in range(count)]


def pooled_batch(values: Array) -> TokenBatch:
    """One value per prompt, of all layers."""
    return TokenBatch(sha256=digests(values.shape[1]), layers=tuple(range(len(values))), prompts={"resid_mean": values})


def lengths_of(prompts: int) -> Array:
    """Tokens of each prompt: 5 to 127, 66 in the middle."""
    return np.random.default_rng(1).integers(5, 128, prompts)


def token_batches(values: Array, lengths: Array, prompts_each: int = 50) -> Iterator[TokenBatch]:
    """Tokens of all layers, some prompts at a time, as extraction hands them over."""
    sha, ends = digests(len(lengths)), np.concatenate([[0], np.cumsum(lengths)])
    for i in range(0, len(lengths), prompts_each):
        counts = lengths[i : i + prompts_each]
        rows = values[:, ends[i] : ends[i + len(counts)]]
        yield TokenBatch(sha256=sha[i : i + len(counts)], layers=tuple(range(len(values))), n_tokens=counts, tokens={"resid": rows})


def write_tokens(store: Store, values: Array, lengths: Array, *, compressed: bool = True) -> str:
    """All of it as one part; its name."""
    part = store.new_part(GROUP, compressed=compressed)
    for batch in token_batches(values, lengths):
        part.append(batch)
    return part.commit().name


def clear(place: Path) -> None:
    """Remove what one side has written, so that it is not flushed to the medium while the next one is timed."""
    shutil.rmtree(place)
    os.sync()


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
    data = {name: store.dataset().resid_mean.sel(layer=layer) for name, store in stores.items()}
    assert all((one.values == values[layer]).all() for one in data.values())
    part = next(Path(stores["raw"].url).glob("*/*/prompts/resid_mean"))
    plain = zarr.open_array(part, mode="r")
    read = alternate(
        {
            "default": lambda: data["default"].values,
            "raw": lambda: data["raw"].values,
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
    views = {name: store.tokens() for name, store in stores.items() if isinstance(store, Store)}
    data = {name: view.resid.sel(layer=layer) for name, view in views.items()}
    assert all((one.values == values[layer]).all() for one in data.values())
    read = alternate(
        {
            "default": lambda: data["default"].values,
            "raw": lambda: data["raw"].values,
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


def save_config(folder: Path, layers: int, hidden: int) -> str:
    """A model's configuration without weights, which lmprobe wants to see where everything is cached."""
    from transformers import LlamaConfig

    LlamaConfig(num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=8).save_pretrained(folder)
    return str(folder)


def sweeping(folder: Path, peer: Peer, *, quick: bool, runs: int) -> list[Figure]:
    """Fit and score a probe on every stored layer: one split into training and test, reading included on every side."""
    from sklearn.linear_model import LogisticRegression, RidgeClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    n, layers, hidden = (200 if quick else 2000), 16, 1024
    rng = np.random.default_rng(0)
    y = np.arange(n) % 2
    values = activations((layers, n, hidden), 1)
    direction = rng.standard_normal(hidden).astype(np.float32)
    values += ((y - 0.5)[None, :, None] * 0.05 * direction).astype(np.float16)
    np.save(folder / "sweep.npy", values)
    for layer in range(layers):
        values[layer].tofile(folder / f"layer{layer}")
    model = save_config(folder / "model", layers, hidden)
    peer(
        "save_tokens",
        place=str(folder / "peer"),
        values=str(folder / "sweep.npy"),
        layers=list(range(layers)),
        lengths=[1] * n,
        batch=1,
        model=model,
    )
    store = lz.open_store(folder / "ours", durable=False)
    info = GroupInfo(model="sweep", num_layers=layers, hidden_size=hidden)
    store.write(info, TokenBatch(sha256=digests(n), layers=tuple(range(layers)), prompts={"resid_last_token": values}))
    train, test = np.arange(n * 4 // 5), np.arange(n * 4 // 5, n)
    texts = [f"prompt {i}" for i in range(n)]
    given = {
        "place": str(folder / "peer"),
        "model": model,
        "positive": [texts[i] for i in train if y[i]],
        "negative": [texts[i] for i in train if not y[i]],
        "test": [texts[i] for i in test],
        "labels": y[test].tolist(),
    }

    def ours(probe: str) -> Any:
        return lz.sweep(lz.open_store(store.url, "r").dataset().resid_last_token, labels=y, probes=[probe], cv=[(train, test)])

    def plain(estimator: Any) -> list[float]:
        scores = []
        with threadpool_limits(1):
            for layer in range(layers):
                x = np.fromfile(folder / f"layer{layer}", np.float16).reshape(n, hidden).astype(np.float32)
                fit = make_pipeline(StandardScaler(), estimator).fit(x[train], y[train])
                scores.append(float(fit.score(x[test], y[test])))
        return scores

    out = []
    for probe, estimator, reach, stretch in (
        ("ridge", RidgeClassifier(), 1.1, 0.6),
        ("logistic_regression", LogisticRegression(max_iter=1000), 1.6, 1.0),
    ):
        np.testing.assert_allclose(ours(probe).accuracy.squeeze().values, plain(estimator), atol=2.5 / len(test))
        took = alternate(
            {
                "ours": lambda p=probe: ours(p),  # type: ignore[misc]
                "plain": lambda e=estimator: plain(e),  # type: ignore[misc]
                "lmprobe": lambda p=probe: float(peer("sweep", classifier=p, **given)["seconds"]),  # type: ignore[misc]
            },
            min(runs, 3),
        )
        work = f"sweep, {probe}, {layers} layers × {n:,} prompts × {hidden}"
        out.append(
            Figure(
                work=work, what="lmprobe / ours", value=took["lmprobe"] / took["ours"], reach=40, ours=ms(took["ours"]),
                lmprobe=ms(took["lmprobe"]),
            )
        )  # fmt: skip
        out.append(
            Figure(
                work=work, what="ours / plain scikit-learn loop", value=took["ours"] / took["plain"], reach=reach, stretch=stretch,
                at_least=False, ours=ms(took["ours"]), limit=ms(took["plain"]),
            )
        )  # fmt: skip
    return out


def save_model(folder: Path) -> str:
    """An 8-layer, 512-wide Llama of random weights with a vocabulary of 32,000 words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=1376, vocab_size=32_000, max_position_embeddings=512
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(31_997)} | {"<unk>": 31_997, "<s>": 31_998, "<pad>": 31_999}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return str(folder)


def extracting(folder: Path, peer: Peer, *, quick: bool, runs: int) -> list[Figure]:
    """Run a model over prompts and keep every token of every layer, the model loaded before."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    n = 32 if quick else 256
    rng = np.random.default_rng(0)
    lengths = rng.integers(6, 129, n)
    prompts = [" ".join(f"w{i}" for i in rng.integers(0, 31_997, length)) for length in lengths]
    model = save_model(folder / "model")
    total = int(lengths.sum())
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    bare = AutoModel.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = [tokenizer(p, add_special_tokens=False)["input_ids"] for p in prompts]
    assert [len(one) for one in ids] == lengths.tolist()
    number, sizes = iter(range(1000)), {}

    def forward(order: Array, batch: int) -> None:
        with torch.inference_mode():
            for i in range(0, n, batch):
                rows = [ids[j] for j in order[i : i + batch]]
                width = max(map(len, rows))
                tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
                mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
                bare(input_ids=tokens, attention_mask=mask, use_cache=False)

    def ours() -> float:
        store = lz.open_store(folder / f"e{next(number)}", durable=False)
        began = time.perf_counter()
        lz.extract(
            loaded, prompts, tokenizer=tokenizer, name="bench", store=store, pooling=(), keep_tokens=True, device="cpu", progress=False
        )
        took = time.perf_counter() - began
        sizes["ours"] = sum(f.stat().st_size for f in Path(store.url).rglob("*") if f.is_file())
        return took

    def theirs() -> float:
        answer = peer("extract", place=str(folder / "peer"), model=model, prompts=prompts)
        sizes["lmprobe"] = answer["bytes"]
        return float(answer["seconds"])

    order = np.argsort(lengths)
    took = alternate(
        {"ours": ours, "sorted": lambda: forward(order, 8), "given": lambda: forward(np.arange(n), 8), "lmprobe": theirs},
        1 if quick else min(runs, 2),
    )
    values = total * 8 * 512 * 4
    work = f"extract, {n} prompts of 6 to 128 words, 8-layer 512-wide Llama, tokens of every layer"
    limit = f"bare forward {total / took['sorted']:.0f} tok/s length-sorted, {total / took['given']:.0f} in given order"
    return [
        Figure(
            work=work, what="lmprobe / ours", value=took["lmprobe"] / took["ours"], reach=5, ours=f"{total / took['ours']:.0f} tok/s",
            lmprobe=f"{total / took['lmprobe']:.0f} tok/s",
        ),
        Figure(
            work=work, what="length-sorted bare forward / ours", value=took["sorted"] / took["ours"], reach=0.95, stretch=0.99,
            ours=f"{total / took['ours']:.0f} tok/s", limit=limit,
        ),
        Figure(
            work="disk, the same run, float32", what="ours / the values alone", value=sizes["ours"] / values, reach=1.0, stretch=0.85,
            at_least=False, ours=f"{sizes['ours'] / 1e6:.0f} MB", lmprobe=f"{sizes['lmprobe'] / 1e6:.0f} MB",
            limit=f"{values / 1e6:.0f} MB",
        ),
    ]  # fmt: skip


def sizes(folder: Path, _peer: Peer, *, quick: bool, runs: int) -> list[Figure]:  # noqa: ARG001 — nothing is timed
    """Bits per stored value, lossless, of real activations: every token and layer of the demo's sentences through all-MiniLM-L6-v2."""
    from lmprobe_zarr.demo import bundled_model, load_sentences

    sentences = load_sentences()["text"]
    out = []
    for dtype, reach, stretch in (("float32", 26, 25), ("float16", 14, 13.1), ("bfloat16", 11.5, 10.7)):
        store = lz.open_store(folder / dtype, durable=False)
        lz.extract(
            bundled_model(), sentences[: len(sentences) // (10 if quick else 1)], store=store, pooling=(), keep_tokens=True,
            dtype="float32", storage_dtype=dtype, progress=False,
        )  # fmt: skip
        count = store.tokens().resid.size
        size = sum(f.stat().st_size for f in Path(store.url).glob("*/*/tokens/resid/c.*"))
        out.append(
            Figure(
                work="bits per stored value, real activations, lossless", what=dtype, value=8 * size / count, reach=reach, stretch=stretch,
                at_least=False, unit="bits", ours=f"{8 * size / count:.1f} bits",
                limit=f"{16 if dtype == 'bfloat16' else np.dtype(dtype).itemsize * 8} bits as it is",
            )
        )  # fmt: skip
    return out


@contextmanager
def s3_server() -> Iterator[Any]:
    """A SeaweedFS of its own with a proxy that counts and can wait, as in the tests."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
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
    return [
        Figure(
            work=f"S3, one layer of {n:,} prompts in 10 parts, opening included", what="lmprobe / ours",
            value=took["lmprobe"] / took["ours"], reach=20, stretch=50, ours=ms(took["ours"]), lmprobe=ms(took["lmprobe"]),
        )
    ]  # fmt: skip


def _in_a_process_of_its_own(call: Any, *given: Any) -> int:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return int(pool.submit(_peak_of, call, *given).result())


def _peak_of(call: Any, *given: Any) -> int:
    """Bytes of memory that the second of two calls takes beyond what the process holds before it."""
    from benchmarks.curves import forget_peak, peak

    call(*given, warm=True)
    before = forget_peak()
    call(*given, warm=False)
    return peak() - before


def _sweep_once(url: str, *, warm: bool) -> None:
    data = lz.open_store(url, "r").dataset().resid_mean
    n = 64 if warm else data.sizes["prompt"]
    lz.sweep(data.isel(prompt=slice(0, n)), labels=np.arange(n) % 2, probes="ridge", cv=2, n_workers=1)


def _compact_once(url: str, *, warm: bool) -> None:
    if not warm:
        lz.open_store(url, durable=False).compact(progress=False)


def _import_once(place: str, url: str, *, warm: bool) -> None:
    if not warm:
        lz.import_safetensors(place, lz.open_store(url, durable=False), progress=False)


def _extract_once(model: str, url: str, *, warm: bool) -> None:
    rng = np.random.default_rng(0)
    prompts = [" ".join(f"w{i}" for i in rng.integers(0, 31_997, 64)) for _ in range(1 if warm else 512)]
    # The model's own memory is that of the first call, which loads it.
    store = lz.open_store(url, durable=False)
    lz.extract(model, prompts, store=store, pooling=("mean",), keep_tokens=True, device="cpu", progress=False)


def memory(folder: Path, peer: Peer, *, quick: bool, runs: int) -> list[Figure]:  # noqa: ARG001 — nothing is timed
    """Peak memory of what handles much, each in a process of its own."""
    n, layers, hidden = (2000 if quick else 20_000), 8, 1024
    values = activations((layers, n, hidden))
    store = lz.open_store(folder / "pooled", durable=False)
    info = GroupInfo(model="memory", num_layers=layers, hidden_size=hidden)
    sha = digests(n)
    for i in range(0, n, n // 20):
        rows = values[:, i : i + n // 20]
        store.write(info, TokenBatch(sha256=sha[i : i + n // 20], layers=tuple(range(layers)), prompts={"resid_mean": rows}))
    layer, fold = n * hidden * 4, n * hidden * 2
    swept = _in_a_process_of_its_own(_sweep_once, store.url)
    out = [
        Figure(
            work="peak memory", what=f"sweep of {layers} × {n:,} × {hidden}, ridge, 2 folds: of two layers and a training fold in float32",
            value=swept / (2 * layer + fold), reach=1, stretch=0.5, at_least=False, ours=f"{swept / 2**20:.0f} MiB",
            limit=f"{(2 * layer + fold) / 2**20:.0f} MiB",
        )
    ]  # fmt: skip
    lengths = lengths_of(40 if quick else 400)
    acts = activations((LAYERS, int(lengths.sum()), HIDDEN))
    np.save(folder / "tokens.npy", acts)
    given = {"values": str(folder / "tokens.npy"), "layers": list(range(LAYERS)), "lengths": lengths.tolist()}
    peer("save_tokens", place=str(folder / "peer"), batch=BATCH, **given)
    tokens_store = lz.open_store(folder / "tokens", durable=False)
    for batch in token_batches(acts, lengths, 4):
        tokens_store.write(GROUP, batch)
    size = acts.nbytes / 1e9
    del acts, values
    model = save_model(folder / "model")
    for what, took in (
        (f"compact {size:.1f} GB in {-(-len(lengths) // 4)} parts", _in_a_process_of_its_own(_compact_once, tokens_store.url)),
        (f"import {size:.1f} GB of lmprobe's", _in_a_process_of_its_own(_import_once, str(folder / "peer"), str(folder / "imported"))),
        ("extract 512 prompts, over the model", _in_a_process_of_its_own(_extract_once, model, str(folder / "extracted"))),
    ):
        out.append(
            Figure(
                work="peak memory", what=what, value=took / 2**30, reach=1, stretch=0.5, at_least=False, unit="GiB",
                ours=f"{took / 2**20:.0f} MiB",
            )
        )  # fmt: skip
    return out


#: Every kind of work, in the order of the table.
ALL = {
    "pooled": pooled,
    "tokens": tokens,
    "sweep": sweeping,
    "extract": extracting,
    "bits": sizes,
    "s3": on_s3,
    "open": opening,
    "info": looking,
    "memory": memory,
}
