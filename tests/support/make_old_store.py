"""Makes the store that `test_old_stores.py` opens: run once for each version of the format, with the code that writes that version.

    python tests/support/make_old_store.py tests/old_stores/version-1

What is made is never made again: files of an old version are what only old code can write. The values that it must show are kept beside it,
computed here from what was written, by loops and not by the reader. `version-1` was made before there was the group `LARGE`, whose parts
have tables of chunks and of blocks, in their documents and as files, and shards.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import lmprobe_zarr as lz
from lmprobe_zarr.batch.hashes import prompt_sha256
from lmprobe_zarr.batch.token_batch import TokenBatch
from lmprobe_zarr.store.format.group import GroupInfo
from lmprobe_zarr.store.parts import writer
from lmprobe_zarr.store.upkeep.evict import remove_entries

KNOWN = GroupInfo(
    model="acme/toy",
    provenance={"revision": "abc", "compute_dtype": "float32", "truncation": None, "max_length": 64, "scale": 0.5, "special_tokens": True},
    num_layers=3,
    hidden_size=4,
)
UNKNOWN = GroupInfo(model="acme/ids")
LARGE = GroupInfo(model="acme/large", num_layers=4, hidden_size=2048)

rng = np.random.default_rng(20)


def values(*shape: int, dtype: str = "float32") -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = rng.standard_normal(shape).astype(dtype)
    return array


def bfloat16(*shape: int) -> npt.NDArray[Any]:
    """float32 with the last 16 bits zero: what bfloat16 can say."""
    return (values(*shape).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def pooled_batch() -> TokenBatch:
    texts = ["a", "bé", "c"]
    layered = ("resid_last_token", "resid_mean")
    unlayered = {"embed_mean": values(3, 4), "perplexity": values(3, 3), "logits_last_token": values(3, 5)}
    return TokenBatch(
        sha256=[prompt_sha256(t) for t in texts],
        text=texts,
        prompt_length=np.array([1, 2, 3]),
        layers=(0, 1),
        prompts={**{name: values(2, 3, 4) for name in layered}, **unlayered},
        prompt_columns={
            "label": np.array([1, 0, 1]),
            "weight": np.array([0.5, 1.5, 2.5]),
            "seen": np.array([True, False, True]),
            "split": np.array(["train", "tést", "train"], object),
        },
        unlayered=frozenset(unlayered),
    )


def tokens_batch() -> TokenBatch:
    texts, counts = ["bé", "c", "d"], np.array([2, 3, 1])
    n = int(counts.sum())
    unlayered = {
        "embed": values(n, 4),
        "logits_top_k_values": values(n, 2),
        "logits_top_k_indices": rng.integers(0, 5, (n, 2), np.int32),
        "token_log_prob": np.where(np.array([0, 2, 5])[:, None] == np.arange(n), np.nan, -1.5).min(0).astype(np.float32),
        "token_perplexity": values(n),
    }
    return TokenBatch(
        sha256=[prompt_sha256(t) for t in texts],
        text=texts,
        prompt_length=counts,
        n_tokens=counts,
        layers=(0, 2),
        tokens={
            "resid": values(2, n, 4, dtype="float16"), "attn": bfloat16(2, n, 4), "router": values(2, n, 2), **unlayered,
        },
        token_columns={"token_id": rng.integers(0, 99, n), "char_start": np.arange(n), "char_end": np.arange(n) + 1},
        prompts={"logits_last_token_top_k_values": values(3, 2), "logits_last_token_top_k_indices": rng.integers(0, 5, (3, 2), np.int32)},
        unlayered=frozenset((*unlayered, "logits_last_token_top_k_values", "logits_last_token_top_k_indices")),
        stored_dtype={"attn": "bfloat16"},
    )  # fmt: skip


def mean_batch(texts: Sequence[str], *, dtype: str, store_text: bool = True) -> TokenBatch:
    return TokenBatch(
        sha256=[prompt_sha256(t) for t in texts],
        text=list(texts) if store_text else None,
        layers=(1,),
        prompts={"resid_mean": values(1, len(texts), 4, dtype=dtype)},
    )


def ids_batch(*, hash_only: bool) -> TokenBatch:
    digest = prompt_sha256([1, 2, 3]) if not hash_only else prompt_sha256("unknown")[:16] + "0" * 48
    return TokenBatch(
        sha256=[digest],
        n_tokens=np.array([3]),
        layers=(5,),
        tokens={"resid": values(1, 3, 4, dtype="float64"), "logits": values(3, 5)},
        unlayered=frozenset({"logits"}),
    )


def large_batch(which: range, name: str, layers: tuple[int, ...], dtype: str) -> TokenBatch:
    """Rows of 2048 equal values, which take few bytes once they are compressed."""
    texts = [f"q{number}" for number in which]
    rows = np.repeat(values(len(layers), len(texts), 1, dtype=dtype), 2048, axis=2)
    return TokenBatch(sha256=[prompt_sha256(t) for t in texts], text=texts, layers=layers, prompts={name: rows})


def raw_batch() -> TokenBatch:
    """With a variable of a name and width of its own, and columns of tokens that chats have."""
    texts = ["q0", "q1", "q2", "q3"]
    rows = np.repeat(values(1, 40, 1, dtype="float16"), 2048, axis=2)
    return TokenBatch(
        sha256=[prompt_sha256(t) for t in texts],
        text=texts,
        n_tokens=np.full(4, 10),
        layers=(2,),
        tokens={"resid": rows, "head_scores": values(1, 40, 3)},
        token_columns={"role": rng.integers(0, 3, 40), "turn": np.arange(40) % 10 // 4, "generated": rng.integers(0, 2, 40)},
    )


def chunks_of(nbytes: int, *, in_shard: int) -> None:
    """Smaller chunks and shards from now on, so that a small store has many."""
    writer.CHUNK_BYTES = writer.MIN_CHUNK_BYTES = nbytes  # type: ignore[misc]
    writer.SHARD_BYTES = nbytes * in_shard  # type: ignore[misc]


def write_large(store: lz.Store) -> dict[str, npt.NDArray[Any]]:
    """Write the group with tables and shards; returns what it must show."""
    chunks_of(2**13, in_shard=20)  # 68 chunks in each of two layers: the table of chunks is a file
    small = [large_batch(range(68), "attn_mean", (0, 1), "float16"), large_batch(range(68, 136), "attn_mean", (0, 1), "float16")]
    for batch in small:
        store.write(LARGE, batch)
    store.compact("acme/large")
    chunks_of(2**18, in_shard=2)  # 7 chunks of four blocks in each of four layers: the table of blocks is a file
    wide = [large_batch(range(a, a + 56), "resid_mean", (0, 1, 2, 3), "float64") for a in (0, 56)]
    for batch in wide:
        store.write(LARGE, batch)
    store.compact("acme/large")
    raw = raw_batch()
    store.write(LARGE, raw, compressed=False)
    hidden = large_batch(range(3), "mlp_mean", (1,), "float32")
    store.write(LARGE, hidden)
    name = store.write(LARGE, large_batch(range(1, 2), "mlp_mean", (1,), "float32"))
    remove_entries(store.catalog, [entry for entry in store.entries(LARGE) if entry.part.info.name == name])  # leaves a tombstone
    hidden.prompts["mlp_mean"][:, 1] = np.nan
    store.annotate("acme/large", {"label": {"q2": 5, "q135": 6}})
    found = shown([*small, *wide, raw, hidden])
    found["prompts/label"] = np.full(136, np.nan)
    found["prompts/label"][[2, 135]] = 5, 6
    return found


def shown(batches: Sequence[TokenBatch]) -> dict[str, npt.NDArray[Any]]:
    """What a store that was written batch by batch must show: for each variable and prompt the last that holds it, else NaN or −1."""
    digests = list(dict.fromkeys(digest for batch in batches for digest in batch.sha256))
    found: dict[str, npt.NDArray[Any]] = {"prompt_sha256": np.array(digests)}
    counts = dict.fromkeys(digests, 0)
    for batch in batches:
        if batch.n_tokens is not None:
            counts |= {digest: int(count) for digest, count in zip(batch.sha256, batch.n_tokens, strict=True)}
    found["n_tokens"] = np.array([counts[digest] for digest in digests])
    starts = {digest: sum(counts[d] for d in digests[:i]) for i, digest in enumerate(digests)}
    for level in ("prompts", "tokens"):
        total = len(digests) if level == "prompts" else sum(counts.values())
        layers = sorted({layer for batch in batches for layer in batch.layers if getattr(batch, level)})
        found |= {f"{level}/layer": np.array(layers)} if layers else {}
        for batch in batches:
            lengths = [1] * len(batch.sha256) if level == "prompts" else np.asarray(batch.n_tokens).tolist() if batch.tokens else []
            for name, array in {**getattr(batch, level), **(batch.token_columns if level == "tokens" else {})}.items():
                layered = name not in batch.unlayered and name not in batch.token_columns
                key = f"{level}/{name}"
                if key not in found:
                    absent = np.nan if array.dtype.kind == "f" else -1
                    rows = array.shape[2:] if layered else array.shape[1:]
                    shape = (len(layers), total, *rows) if layered else (total, *rows)
                    found[key] = np.full(shape, absent, np.float64 if array.dtype.kind == "f" else np.int64)
                at = 0
                for digest, length in zip(batch.sha256, lengths, strict=True):
                    to = digests.index(digest) if level == "prompts" else starts[digest]
                    if layered:
                        for place, layer in enumerate(batch.layers):
                            found[key][layers.index(layer), to : to + length] = array[place, at : at + length]
                    else:
                        found[key][to : to + length] = array[at : at + length]
                    at += length
    return found


def main(folder: Path) -> None:
    known = [pooled_batch(), tokens_batch(), mean_batch(["d", "e"], dtype="float16", store_text=False)]
    merged = [mean_batch(["f"], dtype="float32"), mean_batch(["g"], dtype="float32")]
    unknown = [ids_batch(hash_only=False), ids_batch(hash_only=True)]
    store = lz.open_store(folder / "store")
    for batch in merged:
        store.write(KNOWN, batch)
    store.compact()  # the two stay, replaced
    for number, batch in enumerate(known):
        store.write(KNOWN, batch, compressed=number < 2)
    for batch in unknown:
        store.write(UNKNOWN, batch)
    store.annotate("acme/toy", {"label": {"a": 7, "e": 8}, "note": {"a": "ä", "g": "n"}})
    store.annotate("acme/ids", {"label": {unknown[1].sha256[0][:16]: 3}})
    large = write_large(store)
    store.publish(folder / "published", model="acme/ids")
    store.publish(folder / "published-large", model="acme/large", shards=True)
    groups = {KNOWN.name: [*merged, *known], UNKNOWN.name: unknown}
    arrays = {f"{name}/{key}": array for name, batches in groups.items() for key, array in shown(batches).items()}
    arrays |= {f"{LARGE.name}/{key}": array for key, array in large.items()}
    np.savez_compressed(folder / "expected.npz", **arrays)  # type: ignore[arg-type]
    # Per-prompt columns of the first group, in the order f g a bé c d e; None is absent.
    columns = {
        "text": ["f", "g", "a", "bé", "c", "d", ""],
        "prompt_length": [-1, -1, 1, 2, 3, 1, -1],
        "label": [None, None, 7, 0, 1, None, 8],
        "weight": [None, None, 0.5, 1.5, 2.5, None, None],
        "seen": [None, None, 1, 0, 1, None, None],
        # Where no part says of a column of texts what is missing, as in version-1, it is shown as "".
        "split": [None, None, "train", "tést", "train", None, None],
        "note": [None, "n", "ä", None, None, None, None],
    }
    (folder / "expected.json").write_text(json.dumps(columns, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
