"""Tiny random models of every architecture that is named, and small fast tokenizers made in memory."""

from __future__ import annotations

import fcntl
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Who wants to go for a walk in the park today?",
    "A model is run over thousands of prompts, and its activations are kept.",
    "Ja, ein paar Wörter mit Umlauten: äöü ß.",
    "Numbers such as 12, 345 and 6789 are cut into pieces.",
]
PROMPTS = [
    "The quick brown fox.",
    "Who?",
    "A model is run over thousands of prompts, and its activations are kept. " * 2,
    "Go for a walk",
    "12 dogs jump over 345 lazy foxes in the park; ein paar Wörter mit Umlauten.",
    "the",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
VOCABULARY = 300


@dataclass(frozen=True)
class Tiny:
    """How one tiny model is built."""

    config: str
    options: dict[str, Any]
    encoder: bool = False


SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
}
GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2}
LATENT: dict[str, Any] = {
    **SIZES,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
IDS: dict[str, Any] = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
TINY = {
    "llama": Tiny("LlamaConfig", GROUPED),
    "mistral": Tiny("MistralConfig", {**GROUPED, "sliding_window": 8}),
    "qwen2": Tiny("Qwen2Config", {**GROUPED, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
    "qwen3": Tiny("Qwen3Config", {**GROUPED, "head_dim": 8}),
    "gemma2": Tiny("Gemma2Config", {**GROUPED, "head_dim": 8, "sliding_window": 8}),
    "gemma3": Tiny(
        "Gemma3TextConfig", {**GROUPED, "head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
    ),
    "gpt2": Tiny("GPT2Config", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128}),
    "gpt_neox": Tiny("GPTNeoXConfig", SIZES),
    "gpt_neox_sequential": Tiny("GPTNeoXConfig", {**SIZES, "use_parallel_residual": False}),
    "opt": Tiny("OPTConfig", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "opt_post_norm": Tiny("OPTConfig", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 24, "do_layer_norm_before": False}),
    "phi": Tiny("PhiConfig", SIZES),
    "falcon": Tiny("FalconConfig", {**SIZES, "new_decoder_architecture": False, "multi_query": True}),
    "falcon_alibi": Tiny("FalconConfig", {**SIZES, "alibi": True, "parallel_attn": False, "multi_query": False}),
    "falcon_new": Tiny("FalconConfig", {**SIZES, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "mixtral": Tiny("MixtralConfig", {**GROUPED, "num_local_experts": 4}),
    "bert": Tiny("BertConfig", SIZES, encoder=True),
    "roberta": Tiny("RobertaConfig", {**SIZES, "max_position_embeddings": 130}, encoder=True),
    "gemma": Tiny("GemmaConfig", {**GROUPED, "head_dim": 8}),
    "phi3": Tiny("Phi3Config", GROUPED),
    "olmo2": Tiny("Olmo2Config", GROUPED),
    "qwen2_moe": Tiny("Qwen2MoeConfig", {**GROUPED, "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}),
    "qwen3_moe": Tiny(
        "Qwen3MoeConfig", {**GROUPED, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    ),
    "deepseek_v2": Tiny("DeepseekV2Config", {**LATENT, "q_lora_rank": None}),
    "deepseek_v3": Tiny("DeepseekV3Config", {**LATENT, "q_lora_rank": 16}),
    "xlm_roberta": Tiny("XLMRobertaConfig", {**SIZES, "max_position_embeddings": 130}, encoder=True),
}


def tiny_tokenizer(*, encoder: bool = False, **options: Any) -> Any:
    """A byte-level BPE tokenizer of 300 entries; with ``<s>`` before, and for encoders ``</s>`` after."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.BPE(unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<unk>", "<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    single = "<s> $A </s>" if encoder else "<s> $A"
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 2), ("</s>", 3)])
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names, **options)


def tiny_config(kind: str, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    tiny = TINY[kind]
    return getattr(transformers, tiny.config)(**{**IDS, **tiny.options, **options})


def tiny_model(kind: str, head: str = "AutoModel", **options: Any) -> Any:
    """A random model in evaluation mode, the same for the same arguments; weights large enough for tokens to differ."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(sum(map(ord, kind)))
    model = getattr(transformers, head).from_config(tiny_config(kind, **options))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def save_tiny(kind: str, folder: Path, *, head: str = "AutoModel", dtype: str = "float32", **options: Any) -> Path:
    """A model with its tokenizer in a folder, as ``save_pretrained`` writes it."""
    torch = pytest.importorskip("torch")
    model = tiny_model(kind, head, **options).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    tiny_tokenizer(encoder=TINY[kind].encoder).save_pretrained(folder)
    return folder


def random_model(name: str, config: str, **options: Any) -> Any:
    """A random model of a class of transformers, in evaluation mode; weights large enough for tokens to differ."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**{**IDS, **options})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


class SharedModels:
    """Tiny models in folders that all tests of a run share, in all workers: each is made once, and nobody writes to its folder.

    Parameters
    ----------
    root : Path
        A folder that the workers of the run have in common.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def __call__(self, kind: str, *, head: str = "AutoModel", dtype: str = "float32", **options: Any) -> Path:
        """The folder of a model, named after its kind; made where no test has asked for it yet."""
        recipe = hashlib.sha256(repr((kind, head, dtype, sorted(options.items()))).encode()).hexdigest()[:16]
        folder = self.root / recipe / kind
        with (self.root / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "tokenizer_config.json").exists():  # which is written last
                save_tiny(kind, folder, head=head, dtype=dtype, **options)
        return folder
