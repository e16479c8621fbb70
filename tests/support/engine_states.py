"""Hidden states that vLLM wrote of a tiny Llama, in an environment of its own, and the same from transformers.

``.venv/bin/python tests/support/engine_states.py .venv-engines/bin/python FOLDER`` makes the files below ``tests/data``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tiny_models import save_tiny

#: Token ids, each of another length.
PROMPTS = [[2, 40, 41], [2, 5, 6, 7, 8], [2, 9, 9, 9, 9, 9, 9, 10]]
#: What vLLM is asked for: the embeddings and the outputs of blocks 0, 2 and 3.
LAYER_IDS = [0, 1, 3, 4]
GENERATED = 4
#: The options of each kind of file.
KINDS = {"prompts": [], "outputs": ["--outputs", "--generate", str(GENERATED)], "fp8": ["--fp8"]}
_SCRIPT = Path(__file__).parents[1] / "engines" / "write_states.py"


def save_model(folder: Path) -> Path:
    """A Llama with heads that vLLM has kernels for on a CPU."""
    sizes: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    return save_tiny("llama", folder, head="AutoModelForCausalLM", **sizes)


def write_states(python: str, model: Path, out: Path, kind: str) -> dict[str, Any]:
    """Files of one kind in a folder, one for each of `PROMPTS`; returns what was generated, and the versions."""
    command = [python, str(_SCRIPT), str(model), str(out), *KINDS[kind], "--layer-ids", *map(str, LAYER_IDS)]
    # Without the paths and settings of this process, which are those of another environment.
    environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    done = subprocess.run(command, input=json.dumps(PROMPTS), env=environment, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode:
        raise RuntimeError(f"vLLM ended with {done.returncode}:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def plain_states(model: Path, ids: list[int]) -> npt.NDArray[np.float32]:
    """The embeddings and the output of every block by one plain pass of transformers, shape (1 + block, token, hidden)."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found: list[Any] = []
    inner = loaded.eval().model
    inner.embed_tokens.register_forward_hook(lambda _, __, output: found.append(output[0]))
    for block in inner.layers:
        block.register_forward_hook(
            lambda _, __, output: found.append((output[0] if isinstance(output, tuple) else output).reshape(len(ids), -1))
        )
    with torch.no_grad():
        inner(torch.tensor([ids]))
    values: npt.NDArray[np.float32] = np.stack([states.numpy() for states in found])
    return values


def main() -> int:
    """Write all kinds, what they were made of, and the truth."""
    python, folder = sys.argv[1], Path(sys.argv[2])
    folder.mkdir(parents=True)
    model = save_model(folder / "model")
    made = {kind: write_states(python, model, folder / kind, kind) for kind in KINDS}
    whole = [[*ids, *answer[:-1]] for ids, answer in zip(PROMPTS, made["outputs"]["generated"], strict=True)]
    truth: dict[str, Any] = {str(i): plain_states(model, ids) for i, ids in enumerate(whole)}
    np.savez(folder / "truth.npz", **truth)
    about = {"versions": made["outputs"]["versions"], "prompts": PROMPTS, "generated": made["outputs"]["generated"], "layer_ids": LAYER_IDS}
    (folder / "about.json").write_text(json.dumps(about, indent=1) + "\n")
    for path in model.iterdir():
        path.unlink()
    model.rmdir()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
