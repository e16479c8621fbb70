"""The head of long prompts in slices of tokens: the values of the model's own pass, in less memory."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from loaded_models import by_prompt, loaded_from
from paths import ROOT
from tiny_models import PROMPTS, TINY, tiny_model

from lmprobe_zarr.batch.sites import Outputs
from lmprobe_zarr.extraction import models as extraction
from lmprobe_zarr.extraction.models import head, parse_prompts, tokenize

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)
pytestmark = pytest.mark.model

Array = npt.NDArray[Any]
DECODERS = [kind for kind, tiny in TINY.items() if not tiny.encoder]
SMALL: dict[str, Any] = {**TINY["llama"].options, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
# Heads that scale, cap or transform, of types whose blocks are named by hand.
BY_HAND: dict[str, tuple[str, dict[str, Any], str]] = {
    "cohere": ("CohereConfig", {**SMALL, "logit_scale": 0.3}, "model.layers"),
    "granite": ("GraniteConfig", {**SMALL, "logits_scaling": 7.0}, "model.layers"),
    "gptj": (
        "GPTJConfig",
        {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 128},
        "transformer.h",
    ),
    "bloom": ("BloomConfig", {"vocab_size": 300, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "transformer.h"),
    "mpt": ("MptConfig", {"vocab_size": 300, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128}, "transformer.blocks"),
    "mamba": ("MambaConfig", {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}, "backbone.layers"),
    "xglm": (
        "XGLMConfig",
        {"vocab_size": 300, "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4},
        "model.layers",
    ),
}
OUTPUTS = (
    Outputs(perplexity=True),
    Outputs(perplexity=True, logits="last_token"),
    Outputs(perplexity=True, logits="all"),
    Outputs(logits="all", top_k=5),
    Outputs(perplexity=True, logits="last_token", top_k=3),
)


def in_slices(monkeypatch: pytest.MonkeyPatch, rows: int, width: int = 300) -> None:
    monkeypatch.setattr(head, "WHOLE_BYTES", 4 * width * rows)
    monkeypatch.setattr(head, "SLICE_BYTES", 4 * width * rows)


def by_hand(name: str) -> Any:
    config, options, _ = BY_HAND[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**options)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())) * 0.1)
    return model


def check_against_transformers(loaded: Any, model: Any, monkeypatch: pytest.MonkeyPatch, rows: int = 7) -> None:
    """Sliced values equal the whole pass of this package, and what transformers gives for each prompt alone."""
    tokenized = tokenize(parse_prompts(PROMPTS), loaded.tokenizer)
    ends = np.cumsum(tokenized.lengths)
    seen: list[int] = []
    handle = model.get_output_embeddings().register_forward_hook(lambda _m, _a, output: seen.append(output.shape[-2]))
    for outputs in OUTPUTS:
        with monkeypatch.context() as patch:
            in_slices(patch, 10**6)
            whole = by_prompt(list(extraction.run(loaded, tokenized, outputs=outputs, batch_tokens=10**6, keep_tokens=True)))
        seen.clear()
        with monkeypatch.context() as patch:
            in_slices(patch, rows)
            sliced = by_prompt(list(extraction.run(loaded, tokenized, outputs=outputs, batch_tokens=10**6, keep_tokens=True)))
        # Once, six tokens are compared with the model's own pass: first together, then as two slices.
        assert seen[:3] == [6, 3, 3]
        assert max(seen[3:]) == rows
        assert sum(seen[3:]) == tokenized.num_tokens
        for digest, values in whole.items():
            assert set(sliced[digest]) == set(values)
            for name, value in values.items():
                assert sliced[digest][name].dtype == value.dtype
                np.testing.assert_allclose(sliced[digest][name], value, rtol=1e-5, atol=1e-5, err_msg=name)
            assert np.array_equal(sliced[digest]["resid"], values["resid"])
    handle.remove()
    with monkeypatch.context() as patch:
        in_slices(patch, rows)
        found = by_prompt(list(extraction.run(loaded, tokenized, outputs=Outputs(perplexity=True, logits="all"), batch_tokens=10**6)))
    for row, digest in enumerate(tokenized.sha256):
        ids = torch.from_numpy(tokenized.token_ids[ends[row] - tokenized.lengths[row] : ends[row]])[None]
        with torch.no_grad():
            right = model(input_ids=ids, labels=ids)
        np.testing.assert_allclose(found[digest]["logits"], right.logits[0].float().numpy(), atol=1e-5)
        if ids.shape[1] > 1:
            assert abs(-found[digest]["token_log_prob"][1:].mean() - float(right.loss)) < 1e-5


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", DECODERS)
def test_slices_give_the_logits_and_the_loss_of_transformers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(kind, "AutoModelForCausalLM", **({"final_logit_softcapping": 0.5} if kind == "gemma2" else {}))
    check_against_transformers(loaded_from(model, provenance={"watched": True}), model, monkeypatch)


@pytest.mark.few(1)
@pytest.mark.parametrize("name", BY_HAND)
def test_heads_that_scale_cap_or_add_a_bias_do_so_in_slices_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = by_hand(name)
    check_against_transformers(loaded_from(model, modules={"layers": BY_HAND[name][2]}, provenance={"w": 1}), model, monkeypatch)


@pytest.mark.few(1)
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_slices_of_any_size_give_the_same(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gemma2", "AutoModelForCausalLM", final_logit_softcapping=0.5)
    check_against_transformers(loaded_from(model, provenance={"watched": True}), model, monkeypatch, rows)


def test_what_fits_is_computed_at_once_bit_for_bit_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", "AutoModelForCausalLM")
    loaded = loaded_from(model)
    tokenized = tokenize(parse_prompts(PROMPTS), loaded.tokenizer)
    monkeypatch.setattr(head.SlicedHead, "agrees", lambda _: pytest.fail("sliced"))
    found = by_prompt(list(extraction.run(loaded, tokenized, outputs=Outputs(perplexity=True, logits="all"), batch_tokens=1)))
    ends = np.cumsum(tokenized.lengths)
    for row, digest in enumerate(tokenized.sha256):
        ids = torch.from_numpy(tokenized.token_ids[ends[row] - tokenized.lengths[row] : ends[row]])
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0]
        right = -torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
        assert np.array_equal(found[digest]["logits"], logits.numpy())
        assert np.array_equal(found[digest]["token_log_prob"][1:], right.numpy())


class Whole(torch.nn.Module):  # type: ignore[misc,name-defined]
    """A model whose logits depend on more than the rows that its body gives."""

    def __init__(self, inner: Any, way: str) -> None:
        super().__init__()
        self.inner, self.way, self.config = inner, way, inner.config

    def get_output_embeddings(self) -> Any:
        return self.inner.lm_head

    def forward(self, input_ids: Any, **options: Any) -> Any:
        hidden = self.inner.model(input_ids=input_ids, **options).last_hidden_state
        if self.way == "length":
            hidden = hidden + hidden.shape[1]
        elif self.way == "sum":
            hidden = hidden + hidden.sum(1, keepdim=True)
        elif self.way == "place":
            hidden = hidden + torch.arange(hidden.shape[1])[:, None]
        elif self.way == "shape":
            hidden = hidden.reshape(*input_ids.shape, -1)
        return (self.inner.lm_head(hidden),)


@pytest.mark.few(2)
@pytest.mark.parametrize("way", ["length", "sum", "shape", "place"])
def test_a_model_whose_head_needs_all_tokens_gets_them(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tiny_model("llama", "AutoModelForCausalLM")
    loaded = loaded_from(inner, provenance={"watched": True})
    whole = Whole(inner, way)
    loaded = dataclasses.replace(loaded, located=dataclasses.replace(loaded.located, whole=whole))
    tokenized = tokenize(parse_prompts(PROMPTS), loaded.tokenizer)
    with torch.no_grad():
        right = {
            digest: whole(input_ids=torch.from_numpy(tokenized.take([row]).token_ids)[None])[0][0].numpy()
            for row, digest in enumerate(tokenized.sha256)
        }
    in_slices(monkeypatch, 5)
    found = by_prompt(list(extraction.run(loaded, tokenized, outputs=Outputs(perplexity=True, logits="all"), batch_tokens=1)))
    for digest, logits in right.items():
        np.testing.assert_allclose(found[digest]["logits"], logits, atol=1e-5)
    assert "forward" not in vars(inner.model)
    seen: list[int] = []
    inner.lm_head.register_forward_hook(lambda _m, _a, output: seen.append(output.shape[-2]))
    long = tokenize(parse_prompts([[9] * 40]), loaded.tokenizer)
    list(extraction.run(loaded, long, outputs=Outputs(perplexity=True)))
    assert max(seen) == (6 if way == "shape" else 40)  # only what needs all tokens is computed at once


def test_the_model_is_left_as_it_was_also_where_a_slice_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", "AutoModelForCausalLM")
    loaded = loaded_from(model)
    tokenized = tokenize(parse_prompts(PROMPTS), loaded.tokenizer)
    in_slices(monkeypatch, 5)
    before = (dict(model._forward_hooks), dict(model.model._forward_hooks), loaded_from(model).provenance)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "cross_entropy", lambda *_, **__: (_ for _ in ()).throw(KeyError("no")))
        with pytest.raises(KeyError):
            list(extraction.run(loaded, tokenized, outputs=Outputs(perplexity=True)))
    assert "forward" not in vars(model.model)
    assert (dict(model._forward_hooks), dict(model.model._forward_hooks), loaded_from(model).provenance) == before


@pytest.mark.long
def test_the_head_of_a_long_prompt_takes_little_memory() -> None:
    """A short form of `benchmarks.head`: all logits at once would take 600 MB, and three times that while they are capped."""
    whole = bool(os.environ.get("LMPROBE_ZARR_STRESS"))
    more = [] if whole else ["--kinds", "gemma3", "--tokens", "1024", "--quick"]
    command = [sys.executable, "-m", "benchmarks.head", "--json", *more]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "2"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) == (12 if whole else 2)
    assert max(row["over"] for row in rows) < (1 << 30 if whole else 600 << 20)
    # A random head knows nothing: the perplexity is about the size of the vocabulary.
    assert all(row["perplexity"] == pytest.approx(152_064, rel=0.2) for row in rows if "perplexity" in row["asked"] and "perplexity" in row)
