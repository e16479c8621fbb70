"""Whether a model predicts the next token, which logits, perplexity and answers need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.models.auto import modeling_auto

from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.extraction.models import turns
from lmprobe_zarr.extraction.models.architectures import Located
from lmprobe_zarr.extraction.models.families import is_encoder
from lmprobe_zarr.extraction.models.fingerprint import check_code, foreign_code
from lmprobe_zarr.extraction.models.identity import FIXED_FIELDS
from lmprobe_zarr.extraction.models.loaded_model import LoadedModel
from lmprobe_zarr.extraction.models.paired import PairedBody
from lmprobe_zarr.extraction.models.structure import text_settings
from lmprobe_zarr.extraction.models.wrappers import uncompiled

__all__ = ["check_head", "check_predicts", "no_prediction", "predicts_next"]


def check_predicts(source: str, config: Mapping[str, Any], paired: bool) -> None:
    """An error, before anything is loaded, for an architecture without a head that predicts the next token."""
    kind = config.get("model_type")
    if paired:
        return
    if config.get("is_encoder_decoder"):
        # Its class for causal models runs the decoder without what its encoder gives.
        raise no_prediction(source, f"{kind}, an encoder-decoder")
    known = kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "AutoModelForCausalLM" in (config.get("auto_map") or {})
    if is_encoder(kind) or not known:
        raise no_prediction(source, str(kind))


def no_prediction(name: str, kind: str) -> InvalidArgumentError:
    """The error for logits or perplexity of a model that does not predict the next token."""
    return InvalidArgumentError(
        f"{name!r} ({kind}) does not predict the next token, so it has no logits, no perplexity and no answers: "
        "ask for activations only, or use a causal language model"
    )


def predicts_next(located: Located) -> bool:
    """Whether the class and the configuration of a model are those of one that predicts the next token."""
    if located.whole is None:
        return False
    config: Any = getattr(located.whole, "config", None)
    text = text_settings(located.whole)
    if getattr(text, "use_bidirectional_attention", False) or getattr(text, "is_causal", True) is False:
        return False
    kind = getattr(config, "model_type", None)
    if isinstance(located.body, PairedBody):
        return True
    # Encoders have a class for causal models too, which is_decoder switches on.
    switched_off = kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    names = {*modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()}
    named = type(located.whole).__name__ in names or type(located.whole).__name__.endswith("ForCausalLM")
    return named and not switched_off and not is_encoder(kind)


def check_head(loaded: LoadedModel) -> None:
    """Check that a model can predict the next token.

    Raises
    ------
    InvalidArgumentError
        It has no head, or does not predict the next token; or the caller's own code runs in the head, and no provenance field of the
        caller describes it.
    """
    whole = loaded.located.whole
    paired = isinstance(loaded.located.body, PairedBody)
    # Without a head, a model whose blocks were named by hand may or may not be an encoder.
    if (not paired and is_encoder(getattr(getattr(loaded.located.body, "config", None), "model_type", None))) or (
        whole is not None and not loaded.predicts_next
    ):
        raise no_prediction(loaded.name, type(loaded.module).__name__)
    if whole is None:
        raise InvalidArgumentError(
            f"{loaded.name!r} ({type(loaded.module).__name__}) has no head, which logits and perplexity need: "
            "load it with head=True, or give the whole model, such as AutoModelForCausalLM loads it"
        )
    # Code outside the body of a model object is checked only where it runs.
    if str(loaded.provenance.get("weights")).startswith("bits:"):
        with uncompiled(whole), turns.between_loads():
            found = foreign_code(whole)
        check_code(found, {k: v for k, v in loaded.provenance.items() if k not in FIXED_FIELDS})
