"""Writes ``tests/data/sae-lens-…`` and ``tests/data/dictionary-learning-…``, and what these packages themselves encode with them.

Run by hand, in an environment with sae-lens and dictionary-learning (from its repository, which has the trainers):
``python tests/support/make_autoencoders.py tests/data``. The weights are random numbers.
"""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

WIDTH, LATENTS = 8, 24


def fill(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, values in model.named_parameters():
            values.copy_(torch.randn(values.shape, generator=generator) * (0.3 if values.ndim == 1 else 0.5))
            if name == "threshold":
                values.abs_().add_(0.1)


def by_saelens(out: Path, rows: torch.Tensor, truth: dict[str, Any]) -> None:
    saes = {name: importlib.import_module(f"sae_lens.saes.{name}_sae") for name in ("standard", "topk", "jumprelu", "gated", "batchtopk")}
    base = importlib.import_module("sae_lens.saes.sae")

    def write(folder: str, kind: str, name: str, seed: int, hook: str = "blocks.1.hook_resid_post", **options: Any) -> None:
        noted = base.SAEMetadata(model_name="gpt2", hook_name=hook, **options.pop("noted", {}))
        config = getattr(saes[kind], f"{name}Config")(d_in=WIDTH, d_sae=LATENTS, metadata=noted, **options)
        model = getattr(saes[kind], name)(config)
        fill(model, seed)
        if kind == "batchtopk":
            model.topk_threshold.fill_(0.7)
        (model.save_inference_model if kind == "batchtopk" else model.save_model)(out / folder)
        truth[f"lens_{folder}"] = base.SAE.load_from_disk(out / folder).encode(rows).detach().numpy()

    write("standard", "standard", "StandardSAE", 1)
    write("pre", "standard", "StandardSAE", 2, "blocks.2.hook_resid_pre", apply_b_dec_to_input=False, normalize_activations="layer_norm")
    write("topk", "topk", "TopKSAE", 3, k=5)
    write("topk_rescaled", "topk", "TopKSAE", 4, k=5, rescale_acts_by_decoder_norm=True)
    write("jumprelu", "jumprelu", "JumpReLUSAE", 5, "blocks.1.hook_mlp_out", normalize_activations="constant_norm_rescale")
    write("gated", "gated", "GatedSAE", 6)
    write("by_average", "standard", "StandardSAE", 7, normalize_activations="expected_average_only_in")
    write("batchtopk", "batchtopk", "BatchTopKTrainingSAE", 8, k=4)
    write("centred", "standard", "StandardSAE", 9, noted={"model_from_pretrained_kwargs": {"center_writing_weights": True}})
    shutil.copytree(out / "topk", out / "before_6")
    old = {
        "architecture": "standard", "d_in": WIDTH, "d_sae": LATENTS, "dtype": "float32", "device": "cpu", "model_name": "gpt2",
        "hook_name": "blocks.1.hook_resid_post", "hook_layer": 1, "hook_head_index": None, "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 5}, "apply_b_dec_to_input": True, "normalize_activations": False, "context_size": 128,
        "sae_lens_training_version": "5.0.0",
    }  # fmt: skip
    (out / "before_6" / "cfg.json").write_text(json.dumps(old))
    truth["lens_before_6"] = base.SAE.load_from_disk(out / "before_6").encode(rows).detach().numpy()


def by_dictionary_learning(out: Path, rows: torch.Tensor, truth: dict[str, Any]) -> None:
    plain = importlib.import_module("dictionary_learning.dictionary")
    of = dict.fromkeys(("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder"), plain)
    of |= {
        "AutoEncoderTopK": importlib.import_module("dictionary_learning.trainers.top_k"),
        "BatchTopKSAE": importlib.import_module("dictionary_learning.trainers.batch_top_k"),
        "MatryoshkaBatchTopKSAE": importlib.import_module("dictionary_learning.trainers.matryoshka_batch_top_k"),
    }
    for seed, (name, module) in enumerate(of.items(), 11):
        has_k = "TopK" in name
        more: tuple[Any, ...] = (4, [8, 16]) if name.startswith("Matryoshka") else (4,) if has_k else ()
        model = getattr(module, name)(WIDTH, LATENTS, *more)
        fill(model, seed)
        if has_k:
            model.threshold.fill_(0.6)
        (out / name).mkdir(parents=True)
        torch.save({key: values.cpu() for key, values in model.state_dict().items()}, out / name / "ae.pt")
        trainer = {
            "dict_class": name, "activation_dim": WIDTH, "dict_size": LATENTS, "layer": 1, "lm_name": "gpt2",
            "submodule_name": "resid_post_layer_1", **({"k": 4} if has_k else {}),
        }  # fmt: skip
        (out / name / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"d_submodule": WIDTH, "io": "out"}}, indent=4))
        loaded = getattr(module, name).from_pretrained(out / name / "ae.pt", **({"k": 4} if has_k else {}))
        truth[f"dictionary_{name}"] = loaded.encode(rows).detach().numpy()


def main() -> None:
    data = Path(sys.argv[1])
    rows = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(99)) * 2 + 0.3
    truth: dict[str, Any] = {"rows": rows.numpy()}
    for name, write in (("sae-lens-6.54.12", by_saelens), ("dictionary-learning-0.1.0", by_dictionary_learning)):
        shutil.rmtree(data / name, ignore_errors=True)
        (data / name).mkdir()
        write(data / name, rows, truth)
    np.savez_compressed(data / "autoencoders-truth.npz", **truth)


if __name__ == "__main__":
    main()
