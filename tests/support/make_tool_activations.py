"""Writes ``tests/data/activault-run``, ``tests/data/hallulens-…`` and ``tests/data/probelab-…`` with these tools' own code, and the truth.

Run by hand, in an environment with torch, transformers, zarr, loguru, h5py and probelab 0.1.0, and with the sources of activault
(github.com/sukrucildirr/activault, a copy of Tilde Research's, commit ba1a334) and HalluLens (github.com/hyang0129/HalluLens, b6bd3d8):

    PYTHONPATH=activault:HalluLens python tests/support/make_tool_activations.py tests/data

The truth is one plain pass of the same tiny random Llama over each prompt with its answer.
"""

from __future__ import annotations

import importlib
import io
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

LAYERS, HIDDEN, VOCAB, ANSWER = 4, 16, 64, 5
N_PROMPTS = (7, 3, 6)


def tiny_model() -> Any:
    """A random Llama, the same every time."""
    transformers: Any = importlib.import_module("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=2, num_key_value_heads=2, vocab_size=VOCAB,
        max_position_embeddings=64, attn_implementation="eager",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def states_of(model: Any, ids: Any) -> Any:
    """``hidden_states`` of one plain pass, shape (layer + 1, token, hidden), float32."""
    with torch.no_grad():
        out = model(torch.as_tensor(np.asarray(ids))[None], output_hidden_states=True)
    return np.stack([state[0].numpy() for state in out.hidden_states])


def generated(model: Any) -> list[tuple[Any, Any]]:
    """For each prompt what transformers generates, and its token ids."""
    rng = np.random.default_rng(1)
    found = []
    for n in N_PROMPTS:
        prompt = torch.from_numpy(rng.integers(3, VOCAB, (1, n)))
        out = model.generate(
            prompt, max_new_tokens=ANSWER, min_new_tokens=ANSWER, do_sample=False, output_hidden_states=True, output_attentions=True,
            output_scores=True, return_dict_in_generate=True, pad_token_id=0,
        )  # fmt: skip
        found.append((out, out.sequences[0].numpy()))
    return found


class Bucket:
    """What activault's uploader asks of an S3 client, on a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _write(self, key: str, body: bytes) -> None:
        (self.folder / key).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / key).write_bytes(body)

    def put_object(self, *, Body: str, Bucket: str, Key: str) -> None:  # noqa: N803 — boto3's names
        self._write(Key, Body.encode())

    def create_multipart_upload(self, **_: Any) -> dict[str, str]:
        self.body = io.BytesIO()
        return {"UploadId": "1"}

    def upload_part(self, *, Body: bytes, **_: Any) -> dict[str, str]:  # noqa: N803
        self.body.write(Body)
        return {"ETag": "1"}

    def complete_multipart_upload(self, *, Key: str, **_: Any) -> None:  # noqa: N803
        self._write(Key, self.body.getvalue())


def write_activault(model: Any, out: Path) -> None:
    """Two files of two rows in each of three hooks, bfloat16, by the methods of ``HookUploader``; and what was given to them."""
    uploader: Any = importlib.import_module("pipeline.vault.hook_uploader").HookUploader
    config: Any = importlib.import_module("pipeline.config").Config
    hooks = ["blocks.0.hook_resid_post", "blocks.2.hook_resid_post", "blocks.3.hook_resid_post"]
    bucket = Bucket(out)
    made = []
    for hook in hooks:
        one = object.__new__(uploader)
        vars(one).update(
            prefix_path=f"activault-run/{hook}", batches_per_upload=1, _in_mem=[], metadata=None, s3_client=bucket, bucket_name="b",
            upload_attempt_count=0,
        )  # fmt: skip
        one.mp_upload_queue = SimpleNamespace(put=lambda item, one=one: one._save(*item))
        made.append(one)
    rng = np.random.default_rng(2)
    ids = rng.integers(3, VOCAB, (2, 2, 6))
    truth = []
    for number, uuid in enumerate(["1b4e28ba-2fa1-4d3b-a3f5-ef19b5a7633b", "6fa459ea-ee8a-4ca4-894e-db77e160355e"]):
        states = torch.from_numpy(np.stack([states_of(model, row) for row in ids[number]])).bfloat16()
        truth.append(states.float().numpy())
        for hook, one in zip(hooks, made, strict=True):
            # As activault's generate.py takes them: hidden_states[layer + 1].
            layer = int(hook.split(".")[1])
            one.append({"states": states[:, layer + 1].clone(), "input_ids": torch.from_numpy(ids[number])}, uuid)
    run = config(
        run_name="activault-run", transformer_config={"model_name": "acme/tiny-llama", "dtype": "bfloat16"},
        data_config={"bucket_name": "b", "batch_size": 2, "seq_length": 6}, upload_config={"batches_per_upload": 1, "hooks": hooks},
        num_runs=1, total_tokens=24, d_model=HIDDEN, n_total_files=2, batches_processed=2,
    )  # fmt: skip
    run.save_to_s3(bucket, blocking=True)
    np.savez(out / "activault-truth.npz", ids=ids.reshape(-1, 6), states=np.concatenate(truth))


def write_hallulens(model: Any, out: Path) -> None:
    """The same prompts with answers in both layouts."""
    capture: Any = importlib.import_module("activation_logging.generate_capture")
    writer: Any = importlib.import_module("activation_logging.inference_capture_writer").InferenceCaptureWriter
    zarr_logger: Any = importlib.import_module("activation_logging.zarr_activations_logger").ZarrActivationsLogger
    longest, most, top = 8, 6, 2
    config = {
        "model_name": "acme/tiny-llama", "num_layers": LAYERS, "hidden_dim": HIDDEN, "r_max": 4, "dtype": "float16",
        "response_logprobs_top_k": top, "max_prompt_len": longest, "max_response_len": most,
    }  # fmt: skip
    group = zarr_logger(
        str(out / "hallulens-zarr" / "activations.zarr"), prompt_max_tokens=longest, response_max_tokens=most, prompt_chunk_tokens=4,
        response_chunk_tokens=3, response_logprobs_top_k=top, chunk_size=4, verbose=False,
    )  # fmt: skip
    truth: dict[str, Any] = {}
    with writer(out / "hallulens-capture", "w", len(N_PROMPTS) + 1, config) as folder:
        for number, (result, ids) in enumerate(generated(model)):
            n = N_PROMPTS[number]
            answer = ids[n:]
            token_log_probs, top_ids, top_log_probs = capture.extract_logprobs(result.scores, answer, top_k=top)
            padded = np.full(longest, -1, np.int32)
            padded[:n] = ids[:n]
            padded_answer = np.full(most, -1, np.int32)
            padded_answer[: len(answer)] = answer
            folder.append(
                sample_index=number, prompt_hash=f"hash{number}", key=f"question {number}", prompt_len=n, response_len=len(answer),
                prompt_activations=capture.stitch_prompt_hidden_states(result.hidden_states, n, longest),
                response_activations=capture.stitch_response_hidden_states(result.hidden_states, n, most),
                response_attention=capture.stitch_response_to_response(result.attentions, n, 4, len(answer)),
                prompt_token_ids=padded, response_token_ids=padded_answer, response_token_logprobs=token_log_probs,
                response_topk_token_ids=top_ids, response_topk_logprobs=top_log_probs,
                icr_score_per_layer=np.zeros(LAYERS, np.float32), hallucinated=number == 1,
                generation_record={"prompt": f"Question {number}?", "generation": "…"},
            )  # fmt: skip
            entry = {
                "prompt": f"Question {number}?", "response": "…", "model": "acme/tiny-llama", "input_length": n, "trim_position": None,
                "model_outputs": SimpleNamespace(hidden_states=result.hidden_states),
            }  # fmt: skip
            group.log_entry(f"key{number}", entry)
            truth[f"ids{number}"], truth[f"states{number}"] = ids, states_of(model, ids)
    np.savez(out / "hallulens-truth.npz", n_prompts=N_PROMPTS, **truth)


def write_probelab(out: Path) -> None:
    """Every layout that ``probelab.storage`` writes, and the values that probelab itself reads back."""
    activations: Any = importlib.import_module("probelab.activations").Activations
    hdf5: Any = importlib.import_module("probelab.storage.hdf5")
    memmap: Any = importlib.import_module("probelab.storage.memmap")
    folder = out / "probelab-0.1.0"
    folder.mkdir()
    rng = np.random.default_rng(3)
    counts = [4, 1, 3]
    offsets = torch.tensor(np.cumsum([0, *counts]))
    values = torch.from_numpy(rng.standard_normal((8, 2, 6)).astype("float32"))
    mask = torch.tensor([True, False, True, True, True, True, True, True])
    layered = activations.from_flat(values, offsets, mask, dims="blsh", layers=(5, 2), metadata={})
    single = activations.from_flat(values[:, 0], offsets, dims="bsh", metadata={})
    pooled = activations.from_tensor(values[:3], dims="blh", layers=(5, 2), metadata={})
    memmap.save(layered, str(folder / "memmap"))
    hdf5.save(layered, str(folder / "tokens.h5"))
    hdf5.save(layered, str(folder / "tokens-float32-gzip.h5"), dtype="float32", compression="gzip")
    hdf5.save(single, str(folder / "one-layer.h5"))
    hdf5.save(pooled, str(folder / "pooled.h5"), dtype="float32")
    read = {
        name: hdf5.load(str(folder / f"{name}.h5"), cast="float32").data.numpy()
        for name in ("tokens", "tokens-float32-gzip", "one-layer", "pooled")
    }
    read["memmap"] = memmap.load(str(folder / "memmap")).data.float().numpy()
    np.savez(out / "probelab-truth.npz", offsets=offsets.numpy(), **read)


def main(out: Path) -> None:
    logging.disable()
    model = tiny_model()
    write_activault(model, out)
    write_hallulens(model, out)
    write_probelab(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
