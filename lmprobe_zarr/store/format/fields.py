"""The provenance fields that extraction writes, in words. Any other field is the caller's own, and means what the caller says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

__all__ = ["ABSENT_FIELDS", "PROCESS_FIELDS", "describe_field", "describe_unrecorded", "unrecorded_fields"]

WORDS: Final = {
    "revision": "the model's commit on the hub",
    "weights": "weights, configuration or attributes of the model's modules",
    "compute_dtype": "the dtype that the model computed in",
    "quantization": "how the weights were quantised",
    "adapter": "the active adapters",
    "tokenizer": "the tokenizer's content",
    "special_tokens": "true for texts, false for chats, null for token ids",
    "chat_template": "the template that chats were rendered with",
    "truncation": "the tokens that prompts were cut to",
    "modules": "the modules that the caller named",
    "engine": "what ran the model in the place of transformers",
    "engine_settings": "settings of the engine that change what is computed",
    "model_code": "functions and classes of the model that were replaced, registered or written by the caller",
    "remote_code": "code that came with the model and was run",
    "autocast": "the dtype of torch.autocast, within which the model was run",
    "float32_precision": "settings of torch for float32, such as torch.set_float32_matmul_precision",
    "default_dtype": "torch.get_default_dtype()",
}
# What it means that one of these is not there.
ABSENT_FIELDS: Final = {
    "engine": "transformers",
    "engine_settings": "none",
    "model_code": "as installed",
    "remote_code": "none",
    "autocast": "off",
    "float32_precision": "the default",
    "default_dtype": "float32",
}
# Settings of the process that ran the model.
PROCESS_FIELDS: Final = ("autocast", "float32_precision", "default_dtype")


def describe_field(name: str) -> str:
    """What a field says, in parentheses after a blank; empty for a field of the caller's own."""
    return f" ({WORDS[name]})" if name in WORDS else ""


def unrecorded_fields(provenance: Mapping[str, Any]) -> tuple[str, ...]:
    """The fields that every extraction records and that a provenance, such as that of an import, does not."""
    return tuple(name for name in WORDS if name not in provenance and name not in ABSENT_FIELDS)


def describe_unrecorded(fields: Iterable[str]) -> str:
    """Fields that are not recorded, as text: all of them in words, otherwise their names."""
    names = tuple(fields)
    return f"anything of how it was computed ({', '.join(names)})" if names == unrecorded_fields({}) else ", ".join(names)
