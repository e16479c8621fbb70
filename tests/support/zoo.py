"""A tiny random model of every type that the installed transformers can build from a configuration, whatever its family.

The sizes in a default configuration are replaced by small ones, by their names. Several sets of sizes are tried until the model is built
and runs on token ids. Nothing here knows how `lmprobe_zarr` finds the parts of a model.
"""

from __future__ import annotations

import inspect
import os
import warnings
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

os.environ.setdefault("HF_HUB_OFFLINE", "1")

LAYERS: Final = 5
OTHER_LAYERS: Final = 3
VOCABULARY: Final = 320
MOST_PARAMETERS: Final = 300e6
MAPPINGS: Final = {
    "causal": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "AutoModelForCausalLM"),
    "masked": ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", "AutoModelForMaskedLM"),
    "seq2seq": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "AutoModelForSeq2SeqLM"),
    "image": ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "AutoModelForImageTextToText"),
    "multimodal": ("MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", "AutoModelForMultimodalLM"),
}
DEPTHS: Final = (
    "num_hidden_layers", "n_layer", "num_layers", "n_layers",
    "encoder_layers", "decoder_layers", "num_decoder_layers", "num_encoder_layers",
)  # fmt: skip
BY_SIZE: Final[Mapping[int, str]] = {
    64: "hidden_size d_model n_embd embed_dim embedding_size word_embed_proj_dim dim rnn_hidden lru_width lm_head_dim",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
    "num_experts num_local_experts n_routed_experts moe_num_experts",
    16: "head_dim d_kv v_head_dim q_lora_rank kv_lora_rank global_head_dim hidden_size_per_layer_input",
    VOCABULARY: "vocab_size vocab_size_per_layer_input",
    128: "intermediate_size d_ff ffn_dim n_inner encoder_ffn_dim decoder_ffn_dim hidden_dim ffn_hidden_size "
    "max_position_embeddings n_positions",
    2: "num_experts_per_tok num_experts_per_token moe_k moe_topk num_key_value_heads num_kv_shared_layers",
    1: "n_shared_experts n_group topk_group",
    32: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size image_size",
    8: "qk_rope_head_dim qk_nope_head_dim patch_size",
}
SIZES: Final[Mapping[str, Any]] = {name: size for size, names in BY_SIZE.items() for name in names.split()}
MAMBA: Final[Mapping[str, Any]] = {
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 1,
    "n_mamba_heads": 2, "mamba_d_state": 16, "state_size": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "time_step_rank": 8, "ssm_state_size": 16,
}  # fmt: skip
# Types whose sizes depend on each other in ways of their own: by type, what replaces the sizes above.
OWN_SIZES: Final[Mapping[str, Mapping[str, Any]]] = {
    "reformer": {"is_decoder": True, "axial_pos_shape": (8, 16), "axial_pos_embds_dim": (32, 32), "attn_layers": ["local", "lsh"] * 2},
    "xmod": {"default_language": "en_XX"},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2, "n_groups": 1, "state_size": 16},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16, "layer_types": None},
    "longcat_flash": {"num_layers": 3, "num_hidden_layers": 6, "zero_expert_num": 2, "moe_topk": 2, "expert_ffn_hidden_size": 32},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A tiny model, and the arguments that it runs with beside its token ids."""

    model: Any
    options: dict[str, Any] = field(default_factory=dict)


class NotBuiltError(Exception):
    """No set of sizes gave a model that runs; the message holds the first and the last error."""


def types_of(mapping: str) -> tuple[str, ...]:
    """The model types of one of `MAPPINGS` whose class is in none of those before it, in the order of transformers."""
    from transformers.models.auto import modeling_auto

    before: set[tuple[str, Any]] = set()
    for name, (attribute, _) in MAPPINGS.items():
        own = dict(getattr(modeling_auto, attribute, {}))
        if name == mapping:
            return tuple(each for each, kind in own.items() if (each, kind) not in before)
        before |= set(own.items())
    raise KeyError(mapping)


def _shrunk(
    cls: Any, sizes: Mapping[str, Any], layers: int, *, cut: bool, fill: bool, own: Mapping[str, Any] | None = None
) -> Any:  # fmt: skip
    base = cls()
    old = base.to_dict()
    new = {name: value for name, value in sizes.items() if isinstance(old.get(name), int) and not isinstance(old.get(name), bool)}
    if fill:  # sizes that the default configuration leaves open
        new |= {name: value for name, value in sizes.items() if name in old and old[name] is None}
    depth = next((old[name] for name in DEPTHS if isinstance(old.get(name), int)), None)
    new |= {name: layers for name in DEPTHS if isinstance(old.get(name), int)}
    for name, value in old.items():
        if name.endswith(("_token_id", "_token_index", "token_ids")) and isinstance(value, int) and value >= VOCABULARY:
            new[name] = VOCABULARY - 1 - zlib.crc32(name.encode()) % 40
        if cut and isinstance(value, list) and depth and len(value) == depth and name not in new:
            new[name] = value[:layers]
        elif name in ("layer_types", "mlp_layer_types") and isinstance(value, list):
            new[name] = value[:layers] if cut else None
    for key, declared in (getattr(cls, "sub_configs", None) or {}).items():
        part = getattr(base, key, None)
        subclass = type(part) if part is not None else declared
        if not isinstance(subclass, type) or subclass.__name__ in ("AutoConfig", "PreTrainedConfig"):
            continue
        text = key in ("text_config", "decoder", "encoder", "thinker_config", "llm_config", "language_config")
        try:
            new[key] = _shrunk(subclass, sizes, layers if text else OTHER_LAYERS, cut=cut, fill=fill)
        except Exception:  # noqa: BLE001, S112 — the default of this part is used
            continue
    return cls(**{**new, **(own or {})})


def _attempts() -> Iterator[tuple[dict[str, Any], bool, int, bool]]:
    """Sizes, whether lists with an entry per layer are cut, the number of layers, and whether sizes that are None are set."""
    plain = list(_plain_attempts())
    yield from ((*attempt, False) for attempt in plain)
    yield from ((*attempt, True) for attempt in plain[:6])


def _plain_attempts() -> Iterator[tuple[dict[str, Any], bool, int]]:
    base, mamba = dict(SIZES), {**SIZES, **MAMBA}
    ungrouped = {name: value for name, value in mamba.items() if name != "num_key_value_heads"}
    latent = {k: v for k, v in mamba.items() if k != "head_dim"} | {"num_key_value_heads": 4, "rotary_dim": 8}
    names = (
        "vocab_size",
        "hidden_size",
        "d_model",
        "n_embd",
        "intermediate_size",
        "num_attention_heads",
        "n_heads",
        "max_position_embeddings",
    )
    bare = {name: SIZES[name] for name in names} | {"emb_dim": 64}
    for cut in (False, True):
        yield base, cut, LAYERS
        yield mamba, cut, LAYERS
    yield ungrouped, False, LAYERS
    yield ungrouped, True, LAYERS
    yield base, False, 12
    yield mamba, True, 12
    for cut, layers in ((False, LAYERS), (True, LAYERS), (True, 12)):
        yield latent, cut, layers
    yield bare, False, LAYERS
    yield bare, True, 12
    yield {"vocab_size": VOCABULARY, "max_position_embeddings": 256}, False, LAYERS
    for layers in (LAYERS, 12):
        yield {"vocab_size": VOCABULARY}, True, layers
    yield {}, True, LAYERS


def options_for(model: Any, mapping: str) -> dict[str, Any]:
    """Arguments beside the token ids with which one pass of a model is what its users run."""
    import torch

    options: dict[str, Any] = {}
    if "use_cache" in inspect.signature(model.forward).parameters:
        options["use_cache"] = False
    if mapping == "seq2seq":
        options["decoder_input_ids"] = torch.arange(6, 15)[None]
    return options


def build(mapping: str, model_type: str, auto: str | None = None) -> Built:
    """A tiny random model of a type, in evaluation mode, float32, the same for the same transformers.

    Raises
    ------
    NotBuiltError
    """
    import torch
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind: Any = getattr(transformers, auto or MAPPINGS[mapping][1])
    errors = []
    for sizes, cut, layers, fill in _attempts():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                config = _shrunk(CONFIG_MAPPING[model_type], sizes, layers, cut=cut, fill=fill, own=OWN_SIZES.get(model_type))
                with torch.device("meta"):
                    count = sum(parameter.numel() for parameter in kind.from_config(config).parameters())
                if count > MOST_PARAMETERS:
                    raise ValueError(f"{count / 1e6:.0f} million parameters")
                torch.manual_seed(0)
                model = kind.from_config(config, dtype=torch.float32).eval()
                generator = torch.Generator().manual_seed(3)
                with torch.no_grad():
                    for parameter in model.parameters():
                        if not torch.isfinite(parameter).all():
                            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
                        elif parameter.ndim > 1:
                            # Large enough for tokens to differ and for a mistake to show.
                            parameter.mul_(min(4.0, max(1.0, 0.08 / (float(parameter.std()) + 1e-9))))
                options = options_for(model, mapping)
                with torch.no_grad():
                    output = model(input_ids=torch.arange(5, 17)[None], **options)
                first = output[0] if not hasattr(output, "logits") else output.logits
                if not bool(torch.isfinite(first).all()):
                    raise ValueError("values that are not finite")
                return Built(model=model, options=options)
        except Exception as error:  # noqa: BLE001 — the next sizes may do
            errors.append(f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:140]}")
            if isinstance(error, ImportError):
                break  # other sizes will not help
    raise NotBuiltError(errors[0] if errors[0] == errors[-1] else f"{errors[0]} | {errors[-1]}")
