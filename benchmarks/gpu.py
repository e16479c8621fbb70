"""Extraction on a GPU beside the bare model: ``make test-gpu``.

``python -m benchmarks.gpu --page docs/design/gpu.md`` writes the table with card and date into the page. ``--device cpu --quick`` tries the
script without a GPU, and writes nothing.
"""

from __future__ import annotations

import argparse
import datetime
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import lmprobe_zarr as lz
from benchmarks.timing import alternate

LENGTHS = (6, 257)


def _model(quick: bool, device: str) -> tuple[Any, Any, int]:
    """A random Llama of 1.1 billion weights in bfloat16 on the device, a tokenizer of words, and the number of words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    size = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4} if quick else {}
    words = 32_000
    config = LlamaConfig(
        **{"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, **size}, num_attention_heads=8 if quick else 32,
        num_key_value_heads=4, vocab_size=words, max_position_embeddings=2048,
    )  # fmt: skip
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    vocabulary = {f"w{i}": i for i in range(words - 3)} | {"<unk>": words - 3, "<s>": words - 2, "<pad>": words - 1}
    cut = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    cut.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "pad_token": "<pad>"}
    return model, PreTrainedTokenizerFast(tokenizer_object=cut, **special), words - 3


def measure(place: Path, device: str, *, quick: bool, runs: int) -> list[tuple[str, str, str]]:
    """What was measured: work, figure, how it was reached."""
    import torch

    model, tokenizer, words = _model(quick, device)
    rng = np.random.default_rng(0)
    lengths = rng.integers(*LENGTHS, 64 if quick else 4096)
    ids = [rng.integers(0, words, length) for length in lengths]
    prompts = [" ".join(f"w{i}" for i in each) for each in ids]
    total, budget = int(lengths.sum()), 1024 if device == "cpu" else 16_384
    number = iter(range(1000))

    def wait() -> None:
        if device != "cpu":
            torch.cuda.synchronize()

    def bare() -> None:
        order, start = np.argsort(-lengths), 0
        with torch.inference_mode():
            while start < len(order):
                width = int(lengths[order[start]])
                rows = order[start : start + max(1, budget // width)]
                start += len(rows)
                tokens = np.zeros((len(rows), width), np.int64)
                mask = np.zeros((len(rows), width), np.int64)
                for at, row in enumerate(rows):
                    tokens[at, : lengths[row]], mask[at, : lengths[row]] = ids[row], 1
                model.model(
                    input_ids=torch.from_numpy(tokens).to(device), attention_mask=torch.from_numpy(mask).to(device), use_cache=False
                )
        wait()

    def ours(**options: Any) -> float:
        store = lz.open_store(place / f"s{next(number)}", durable=False)
        began = time.perf_counter()
        lz.extract(
            model, prompts, tokenizer=tokenizer, name="random", store=store, device=device, batch_tokens=budget, progress=False, **options
        )
        return time.perf_counter() - began

    layer = 2 if quick else 11
    took = alternate(
        {
            "bare": bare,
            "last token of every layer": lambda: ours(pooling=["last_token"]),
            "all tokens of one layer": lambda: ours(pooling=(), keep_tokens=True, layers=[layer]),
        },
        runs,
    )
    rows = [("bare forward, length-sorted, bfloat16", f"{total / took['bare']:,.0f} tok/s", f"{len(prompts):,} prompts, {total:,} tokens")]
    rows += [
        (f"extract, {work}", f"{total / seconds:,.0f} tok/s", f"{took['bare'] / seconds:.2f} × the bare forward")
        for work, seconds in took.items()
        if work != "bare"
    ]
    return rows + _streaming(place, layer, device, total, runs)


def _streaming(place: Path, layer: int, device: str, total: int, runs: int) -> list[tuple[str, str, str]]:
    """Batches of the stored tokens of a layer on the device, beside their sequential read."""
    import torch
    from torch.utils.data import DataLoader

    store = next(s for s in (lz.open_store(folder) for folder in sorted(place.iterdir())[::-1]) if "resid" in s.tokens())
    array = store.tokens().resid.sel(layer=layer)

    def read() -> None:
        np.asarray(array.values)

    def batches() -> None:
        loader = DataLoader(array.lz.batches(framework="torch", dtype=torch.bfloat16), batch_size=None, pin_memory=device != "cpu")
        for batch in loader:
            batch.to(device, non_blocking=True)
        if device != "cpu":
            torch.cuda.synchronize()

    took = alternate({"read": read, "batches": batches}, runs)
    speed = 2 * array.shape[-1] * total / took["batches"] / 1e9
    return [("shuffled bfloat16 batches to the device", f"{speed:.2f} GB/s", f"{took['read'] / took['batches']:.2f} × one sequential read")]


def main() -> None:
    """Measure, print the table, and write it into the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    import torch

    if given.device == "cuda" and not torch.cuda.is_available():
        print("no GPU: nothing was measured")
        return
    card = "no GPU" if given.device == "cpu" else torch.cuda.get_device_name(0)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), given.device, quick=given.quick, runs=1 if given.quick else 3)
    lines = ["| work | figure | |", "|---|---|---|", *("| " + " | ".join(row) + " |" for row in rows)]
    table = "\n".join(lines)
    print(f"{card}, torch {torch.__version__}\n\n{table}")
    if given.page is not None and given.device == "cuda":
        head = given.page.read_text().partition("<!-- measured -->")[0]
        day = datetime.datetime.now(datetime.UTC).date().isoformat()
        about = f"{card}, torch {torch.__version__}, {day}; medians of three, the sides in turn."
        given.page.write_text(f"{head}<!-- measured -->\n\n{about}\n\n{table}\n")


if __name__ == "__main__":
    main()
