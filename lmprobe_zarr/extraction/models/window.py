"""How many tokens a model takes at once, from its configuration. Never torch, a tokenizer or a file.

The number that a configuration names means different things:

* Learned positions, and position tables of a fixed size (BERT, GPT-2, OPT, GPT-J): the model fails beyond it. Some tables begin after
  the id of the padding token (RoBERTa).
* Rotary positions: what the model was trained for, before a scaling or after it. The model runs on longer prompts too.
* ALiBi, relative positions and state-space models: the length of training examples or nothing at all; there is no limit.

A sliding window limits how far a token sees, not how long a prompt is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

__all__ = ["UNKNOWN_WINDOW", "Window", "refine_window", "rope_kind", "rope_settings", "window_of"]

Config = Mapping[str, Any]


def _types(names: str) -> frozenset[str]:
    """Model types, given in one text."""
    return frozenset(names.split())


NAMES: Final = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_target_positions",
    "max_encoder_position_embeddings",
    "n_ctx",
    "seq_length",
)
# These have a table of positions, and fail on longer prompts.
WITH_TABLE: Final = _types(
    "albert bart bert bert-generation big_bird bigbird_pegasus biogpt blenderbot blenderbot-small canine clip_text_model codegen convbert "
    "ctrl deberta deberta-v2 distilbert electra ernie flaubert fnet gpt-sw3 gpt2 gpt_bigcode gpt_neo gptj imagegpt layoutlm led marian "
    "mbart megatron-bert mobilebert mpt mra mvp nystromformer openai-gpt opt pegasus plbart reformer rembert roc_bert roformer splinter "
    "squeezebert trocr whisper xlm yoso"
)
# Their position ids begin after the id of the padding token, which shortens the window.
AFTER_PADDING: Final = _types(
    "camembert data2vec-text esm ibert layoutlmv3 lilt longformer luke markuplm roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl "
    "xmod"
)
# The same, whatever the id of the padding token is: how many rows are not used.
ROWS_BEFORE: Final = {"mpnet": 2, "prophetnet": 2}
# Relative positions, ALiBi, or a state instead of positions.
WITHOUT_LIMIT: Final = _types(
    "bloom cpmant falcon_mamba funnel longt5 mamba mamba2 mt5 pop2piano recurrent_gemma rwkv switch_transformers t5 transfo-xl umt5 xlnet "
    "xlstm"
)
# Scalings that multiply the original window by their factor, whatever the configuration names as the whole.
MULTIPLY: Final = ("dynamic", "linear", "ntk", "yarn")
# These name the whole window beside a linear scaling.
WHOLE_IS_NAMED: Final = ("gemma3", "gemma3_text", "t5gemma2", "t5gemma2_decoder", "t5gemma2_encoder")
# Tables of positions may have some rows more than the configuration names: OPT and BART have two.
MOST_SPARE_ROWS: Final = 8
# Layers of these kinds look at the last tokens only, so their positions do not limit the prompt.
LOCAL_LAYERS: Final = ("chunked", "local", "sliding")


@dataclass(frozen=True, slots=True)
class Window:
    """The most tokens that a model takes at once.

    Parameters
    ----------
    tokens : int or None
        None where there is no limit, or it is not known.
    fixed : bool or None
        Whether the model fails on more. None where its configuration does not tell.
    known : bool
        Whether the configuration tells the limit, or that there is none.
    """

    tokens: int | None = None
    fixed: bool | None = None
    known: bool = True

    @staticmethod
    def of(given: int | Window | None) -> Window:
        """A number of tokens as a fixed window, and None as an unknown one."""
        if isinstance(given, Window):
            return given
        return UNKNOWN_WINDOW if given is None else Window(given, fixed=True)


UNKNOWN_WINDOW: Final = Window(known=False)


def _first_int(config: Config, names: Iterable[str]) -> int | None:
    values = (config.get(name) for name in names)
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool) and value > 0), None)


def rope_settings(config: Config) -> dict[str, Config]:
    """The settings of rotary positions by kind of layer; under the empty name where all layers have the same. Empty if there are none."""
    found = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(found, Mapping):
        return {}
    by_layer = {str(kind): settings for kind, settings in found.items() if isinstance(settings, Mapping)}
    return by_layer or {"": found}


def rope_kind(settings: Config) -> str:
    """The scaling that some settings name; ``default`` if none."""
    return str(settings.get("rope_type") or settings.get("type") or "default")


def _scaled(config: Config, settings: Config, named: int) -> int:
    """The window of rotary positions with a scaling, where the configuration names a number."""
    kind, factor = rope_kind(settings), settings.get("factor")
    given = _first_int(settings, ["original_max_position_embeddings"]) or _first_int(config, ["original_max_position_embeddings"])
    if not isinstance(factor, int | float) or kind not in (*MULTIPLY, "llama3", "longrope", "su"):
        return named
    if given is None and kind == "linear" and config.get("model_type") in WHOLE_IS_NAMED:
        return named
    original = given or named
    # The factor of Llama 3 stretches wavelengths, not the window, which is named where it is larger than the original one.
    if kind not in MULTIPLY and named > original:
        return named
    return max(named, round(factor * original))


def window_of(config: Config) -> Window:
    """The window of the language model that a configuration describes, without running it.

    Parameters
    ----------
    config : mapping
        The content of ``config.json``, or of its ``text_config``.
    """
    kind = str(config.get("model_type"))
    named = _first_int(config, NAMES)
    relative = kind in ("deberta", "deberta-v2") and config.get("position_biased_input") is False
    if kind in WITHOUT_LIMIT or relative or (kind == "falcon" and config.get("alibi") is True):
        return Window()
    if named is None:
        return UNKNOWN_WINDOW
    if kind in ROWS_BEFORE:
        return Window(named - ROWS_BEFORE[kind], fixed=True)
    if kind in AFTER_PADDING and config.get("position_embedding_type") != "rotary":
        padding = config.get("pad_token_id")
        return Window(named - (1 if padding is None else int(padding)) - 1, fixed=True)
    if kind in WITH_TABLE:
        return Window(named, fixed=True)
    settings = rope_settings(config)
    rotary = bool(settings) or "rope_theta" in config or config.get("position_embedding_type") == "rotary"
    whole = [each for layer, each in settings.items() if not any(word in layer for word in LOCAL_LAYERS)]
    tokens = min((_scaled(config, each, named) for each in whole), default=named)
    return Window(tokens, fixed=False if rotary else None)


def refine_window(window: Window, tables: Iterable[int]) -> Window:
    """The window of a loaded model, where its configuration does not tell whether it fails on longer prompts.

    Parameters
    ----------
    window : Window
    tables : iterable of int
        Rows of the model's tables beside that of its vocabulary. One with as many rows as the window, or a few more, holds positions.
    """
    if window.fixed is not None or window.tokens is None:
        return window
    return replace(window, fixed=any(window.tokens <= rows <= window.tokens + MOST_SPARE_ROWS for rows in tables))
