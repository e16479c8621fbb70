"""vLLM into a store beside vLLM alone, by the CPU time of one process: run with the Python of an environment that has vLLM.

``.venv-engines/bin/python -m benchmarks.engine`` makes a random Llama of 8 blocks, 512 wide, and prints tokens per second of CPU time, best
of three. All in one process with one thread, so that its CPU time is that of everything.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "0", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np

PROMPTS: Final = 96
REPEATS: Final = 3
SETTINGS: Final = {"kv_cache_memory_bytes": 1 << 30, "max_model_len": 256}


def save_model(folder: Path) -> None:
    """A random Llama and a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8, intermediate_size=1408,
        max_position_embeddings=512,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)


def in_turn(runs: Mapping[str, Callable[[int], None]]) -> dict[str, float]:
    """The least CPU seconds of each of several runs, which take turns, since the machine may be shared."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(REPEATS):
        for name, run in runs.items():
            began = time.process_time()
            run(number)
            taken[name].append(time.process_time() - began)
    return {name: min(seconds) for name, seconds in taken.items()}


def main() -> None:
    """Measure and print."""
    from vllm import SamplingParams

    import lmprobe_zarr as lz
    from lmprobe_zarr.batch import NO_OUTPUTS
    from lmprobe_zarr.extraction import ModelChoice
    from lmprobe_zarr.extraction.model_choice import ModelMemory
    from lmprobe_zarr.extraction.models import parse_engine
    from lmprobe_zarr.extraction.options import Options, keeping_of
    from lmprobe_zarr.extraction.request import check_request
    from lmprobe_zarr.extraction.run import carry_out

    rng = np.random.default_rng(0)
    prompts = [rng.integers(5, 250, n).tolist() for n in rng.integers(16, 128, PROMPTS)]
    tokens = sum(map(len, prompts))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / "llama")
        choice = ModelChoice(model=str(folder / "llama"), engine=parse_engine("vllm", SETTINGS))
        memory = ModelMemory()

        def alone(_: int) -> None:
            settings = SamplingParams(max_tokens=1, temperature=0, detokenize=False)
            started: Any = memory.loaded
            started.llm.generate([{"prompt_token_ids": ids} for ids in prompts], settings, use_tqdm=False)

        def stored(number: int, *, keep_tokens: bool) -> None:
            store = lz.open_store(folder / f"store-{keep_tokens}-{number}")
            request = check_request(
                choice, prompts, store, layers="all", sites=("resid",), pooling=("last_token", "mean"), keep_tokens=keep_tokens,
                outputs=NO_OUTPUTS,
            )  # fmt: skip
            carry_out(request, Options(keeping=keeping_of(is_default=False), memory=memory, progress=False))

        stored(REPEATS, keep_tokens=False)  # which starts the engine
        seconds = in_turn(
            {
                "vLLM alone": alone,
                "into a store, pooled": lambda number: stored(number, keep_tokens=False),
                "into a store, every token": lambda number: stored(number, keep_tokens=True),
            }
        )
        memory.release()
    for what, taken in seconds.items():
        print(f"{what:28} {tokens / taken:8,.0f} tokens per CPU second   {seconds['vLLM alone'] / taken:.2f}")


if __name__ == "__main__":
    main()
