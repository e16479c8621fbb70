"""What computes: sweeps beside scikit-learn, extraction beside the bare model; and how large its results are."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import numpy as np

import lmprobe_zarr as lz
from benchmarks.data import (
    Array,
    activations,
    digests,
)
from benchmarks.timing import Figure, Peer, alternate, ms
from lmprobe_zarr.batch.token_batch import TokenBatch
from lmprobe_zarr.store.format.group import GroupInfo


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


def extract_prompts(n: int) -> list[str]:
    """Prompts of 6 to 128 words that `save_model` knows."""
    rng = np.random.default_rng(0)
    return [" ".join(f"w{i}" for i in rng.integers(0, 31_997, length)) for length in rng.integers(6, 129, n)]


def extracting(folder: Path, peer: Peer, *, quick: bool, runs: int) -> list[Figure]:
    """Run a model over prompts and keep every token of every layer, the model loaded before."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.beside_bare import beside

    n = 26 if quick else 256
    prompts = extract_prompts(n)
    lengths = np.array([len(prompt.split()) for prompt in prompts])
    model = save_model(folder / "model")
    total = int(lengths.sum())
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    bare = loaded.model
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
    ratios = [one["bare"] / one["extract"] for one in beside(loaded, tokenizer, prompts, ids, folder, 2 if quick else max(3, runs))]
    values = total * 8 * 512 * 4
    checking = min(seconds_of_check(loaded, tokenizer) for _ in range(3))
    work = f"extract, {n} prompts of 6 to 128 words, 8-layer 512-wide Llama, tokens of every layer"
    limit = f"bare forward {total / took['sorted']:.0f} tok/s length-sorted, {total / took['given']:.0f} in given order"
    return [
        Figure(
            work=work, what="lmprobe / ours", value=took["lmprobe"] / took["ours"], reach=5, ours=f"{total / took['ours']:.0f} tok/s",
            lmprobe=f"{total / took['lmprobe']:.0f} tok/s",
        ),
        Figure(
            work=work, what="length-sorted bare forward / ours", value=float(np.median(ratios)), reach=0.92, stretch=0.97,
            ours=f"{total / took['ours']:.0f} tok/s", limit=limit,
        ),
        Figure(
            work="disk, the same run, float32", what="ours / the values alone", value=sizes["ours"] / values, reach=1.0, stretch=0.85,
            at_least=False, ours=f"{sizes['ours'] / 1e6:.0f} MB", lmprobe=f"{sizes['lmprobe'] / 1e6:.0f} MB",
            limit=f"{values / 1e6:.0f} MB",
        ),
        Figure(
            work="check of a model before its first prompt, 8-layer 512-wide Llama", what="seconds", value=checking, reach=0.3,
            at_least=False, unit="s", ours=f"{checking:.2f} s",
        ),
    ]  # fmt: skip


def seconds_of_check(module: Any, tokenizer: Any) -> float:
    """The time that the check of a model takes, once per model object."""
    from lmprobe_zarr.extraction import models
    from lmprobe_zarr.extraction.models.check import check_model

    loaded = models.load_model(copy.deepcopy(module), name="bench", tokenizer=tokenizer)
    began = time.perf_counter()
    check_model(loaded)
    return time.perf_counter() - began


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
