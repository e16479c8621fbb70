"""Hidden states of a tiny Llama, written by vLLM: run with the Python of vLLM's own environment, see `engine_states`.

Reads lists of token ids as JSON from its standard input, writes a file for each of them, and prints what vLLM generated after each.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

# In one process: the step in which files are written can then be waited for.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
sys.path.insert(0, str(Path(__file__).parent))


def main() -> int:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--fp8", action="store_true")
    parser.add_argument("--outputs", action="store_true", help="states of generated tokens too")
    parser.add_argument("--generate", type=int, default=1)
    parser.add_argument("--layer-ids", type=int, nargs="+", required=True)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    from vllm import LLM, SamplingParams

    prompts = json.load(sys.stdin)
    llm = LLM(
        options.model,
        dtype=options.dtype,
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=4,
        enable_prefix_caching=False,
        speculative_config={
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": options.layer_ids}},
        },
        kv_transfer_config={
            "kv_connector": "Fp8States" if options.fp8 else "States",
            "kv_connector_module_path": "cpu_connectors",
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {"shared_storage_path": options.out},
        },
    )
    extra = {"kv_transfer_params": {"include_output_tokens": True}} if options.outputs else {}
    sampling = SamplingParams(max_tokens=options.generate, temperature=0, ignore_eos=True, detokenize=False, extra_args=extra)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    # A file is written in the step after its request has ended.
    core = llm.llm_engine.engine_core.engine_core
    for _ in range(100):
        if not core.scheduler.has_requests():
            break
        core.step_fn()
    generated = [list(output.outputs[0].token_ids) for output in outputs]
    versions = {name: version(name) for name in ("vllm-cpu", "hs-connectors", "torch", "transformers")}
    sys.stdout.write("\n" + json.dumps({"generated": generated, "versions": versions}) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
