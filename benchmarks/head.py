"""What perplexity and the largest logits of one long prompt need in memory beside the pass itself: ``python -m benchmarks.head``.

A random model with a narrow residual stream and a large vocabulary, so that nearly all memory is its head's. Each line is a process of its
own: by how much its peak (the kernel's ``VmHWM``) exceeds that of the pass alone, or by how much memory grows while the head runs,
whichever is more, since the pass may have needed as much before. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

from benchmarks.curves import forget_peak, peak

KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3": {"final_logit_softcapping": 30.0, "head_dim": 8, "layer_types": ["full_attention"] * 2},
    "granite": {"logits_scaling": 7.0},
}
ASKED: dict[str, dict[str, Any]] = {
    "the pass alone": {},
    "perplexity": {"perplexity": True},
    "perplexity and logits of the last token": {"perplexity": True, "logits": "last_token"},
    "perplexity and the 5 largest logits of all tokens": {"perplexity": True, "logits": "all", "top_k": 5},
}
LIMIT_BYTES = 1 << 30


def run_once(kind: str, tokens: int, vocabulary: int, asked: str) -> dict[str, Any]:
    """One prompt through a model in this process."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models

    from lmprobe_zarr.batch.sites import Outputs
    from lmprobe_zarr.extraction import models as extraction
    from lmprobe_zarr.extraction.models.head import SlicedHead

    before, grown, run = [0], [0], SlicedHead.run

    def watched(sliced: SlicedHead, step: int) -> None:
        before.append(peak())
        held = forget_peak()
        run(sliced, step)
        grown.append(peak() - held)

    SlicedHead.run = watched  # type: ignore[method-assign]

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    sizes |= {"vocab_size": vocabulary, "max_position_embeddings": tokens, "tie_word_embeddings": True}
    config = {"llama": transformers.LlamaConfig, "gemma3": transformers.Gemma3TextConfig, "granite": transformers.GraniteConfig}[kind]
    options = {**KINDS[kind], "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = transformers.AutoModelForCausalLM.from_config(config(**sizes, **options), attn_implementation="sdpa").eval()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))
    modules = {"layers": "model.layers"} if kind == "granite" else None
    loaded = extraction.load_model(model, name="wide", tokenizer=tokenizer, modules=modules)
    ids = torch.randint(3, vocabulary, (tokens,), generator=torch.Generator().manual_seed(1)).tolist()
    tokenized = extraction.tokenize(extraction.parse_prompts([ids]), tokenizer, context_length=loaded.window)
    # The whole model runs in every case, so that the pass is the same.
    outputs = Outputs(**(ASKED[asked] or {"logits": "last_token", "top_k": 1}))
    began = time.perf_counter()
    (batch,) = extraction.run(loaded, tokenized, outputs=outputs, batch_tokens=tokens)
    seconds = time.perf_counter() - began
    found = {"kind": kind, "tokens": tokens, "vocabulary": vocabulary, "asked": asked, "seconds": seconds}
    found |= {"peak": max(peak(), *before), "head": max(grown)}
    return found | ({"perplexity": float(batch.prompts["perplexity"][0, 0])} if "perplexity" in batch.prompts else {})


def measure(kind: str, tokens: int, vocabulary: int, *, quick: bool) -> list[dict[str, Any]]:
    """One process for each thing that is asked for; with `quick` only for the pass alone and for perplexity."""
    rows: list[dict[str, Any]] = []
    for asked in list(ASKED)[: 2 if quick else None]:
        command = [sys.executable, "-m", "benchmarks.head", "--child", kind, str(tokens), str(vocabulary), asked]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]))
        rows[-1]["over"] = max(rows[-1]["peak"] - rows[0]["peak"], rows[-1]["head"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--vocabulary", type=int, default=152_064)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--quick", action="store_true", help="perplexity only")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", nargs=4, metavar=("KIND", "TOKENS", "VOCABULARY", "ASKED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        kind, tokens, vocabulary, asked = options.child
        print(json.dumps(run_once(kind, int(tokens), int(vocabulary), asked)))
        return
    rows = [row for kind in options.kinds for row in measure(kind, options.tokens, options.vocabulary, quick=options.quick)]
    if options.json:
        print(json.dumps(rows))
    else:
        print(f"one prompt of {options.tokens:,} tokens, a vocabulary of {options.vocabulary:,}")
        for row in rows:
            print(f"{row['kind']:<8} {row['asked']:<52} {row['over'] / 2**20:7,.0f} MiB over the pass {row['seconds']:7.1f} s")
    if max(row["over"] for row in rows) > LIMIT_BYTES:
        sys.exit(f"more than {LIMIT_BYTES >> 20} MiB over the pass")


if __name__ == "__main__":
    main()
