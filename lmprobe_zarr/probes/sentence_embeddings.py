"""Sentence embeddings of texts by any encoder of transformers: what the control ``sentence_embedding`` is fitted on. Never labels or fits.

One vector per text, the mean over its tokens of what the last block puts out, scaled to length 1: as sentence-transformers does for
all-MiniLM-L6-v2 and most of its models.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, MissingDependencyError
from lmprobe_zarr.typing import Floats

__all__ = ["check_encoder", "embed_texts", "is_encoder"]

#: Tokens of a batch, at most; one text may have more.
_TOKENS: Final = 8192


def is_encoder(given: Any) -> bool:
    """Whether a control is given a model, rather than features: a folder, a module of torch, or a pair (model, tokenizer)."""
    if isinstance(given, str | os.PathLike):
        return True
    if isinstance(given, tuple):
        return len(given) == 2 and callable(getattr(given[0], "forward", None))
    return callable(getattr(given, "forward", None))


def check_encoder(given: Any) -> None:
    """Raise, before anything is loaded, where no texts can be embedded with it.

    Raises
    ------
    InvalidTypeError
        A model without its tokenizer.
    InvalidArgumentError
        No folder of a model; or its folder says that it pools otherwise than by the mean.
    """
    if isinstance(given, tuple):
        return
    if not isinstance(given, str | os.PathLike):
        raise InvalidTypeError(
            f"control 'sentence_embedding' was given a {type(given).__name__} without its tokenizer: give (model, tokenizer), or a folder"
        )
    folder = Path(given).expanduser()
    if not (folder / "config.json").is_file():
        raise InvalidArgumentError(
            f"control 'sentence_embedding' found no model in {str(given)!r}: give the folder of an encoder and its tokenizer"
        )
    pooling = _setting(folder / "1_Pooling" / "config.json")
    modes = sorted(name for name, value in pooling.items() if name.startswith("pooling_mode_") and value)
    if modes not in ([], ["pooling_mode_mean_tokens"]):
        raise InvalidArgumentError(
            f"control 'sentence_embedding' takes the mean over tokens, and the encoder in {str(given)!r} says {', '.join(modes)}: "
            "give another encoder, or its embeddings as features of your own"
        )


def _setting(path: Path) -> dict[str, Any]:
    """What a file of settings holds, nothing where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def embed_texts(texts: Sequence[str], encoder: Any) -> Floats:
    """The embedding of each text, each distinct text being run once.

    Parameters
    ----------
    texts : sequence of str
    encoder : str, path, or (model, tokenizer)
        A folder, read without remote code and run in float32 on the CPU; or a loaded model of transformers, run as it is.

    Returns
    -------
    ndarray of float64, shape (text, hidden)
        Of length 1.

    Raises
    ------
    MissingDependencyError
        torch or transformers is not installed.
    InvalidArgumentError
        The folder cannot be read, or the model is no encoder: it needs more than token ids, or gives no hidden states.

    Warns
    -----
    UserWarning
        Texts are longer than the encoder takes, so that their ends are left out, as sentence-transformers does.
    """
    check_encoder(encoder)
    try:
        import torch
        import transformers  # noqa: F401  (an error here says what is missing)
    except ImportError as error:
        raise MissingDependencyError(
            "control 'sentence_embedding' needs torch and transformers, which are not installed: pip install 'lmprobe-zarr[models]'"
        ) from error
    model, tokenizer, limit = _loaded(encoder)
    distinct = list(dict.fromkeys(texts))
    ids = [list(tokenizer(text, truncation=False, verbose=False)["input_ids"]) for text in distinct]
    long = [number for number, held in enumerate(ids) if limit is not None and len(held) > limit]
    for number in long:
        ids[number] = list(tokenizer(distinct[number], truncation=True, max_length=limit)["input_ids"])
    if long:
        warnings.warn(
            f"{len(long)} of {len(distinct)} texts are longer than the {limit} tokens of the encoder of control 'sentence_embedding': "
            "their ends are left out",
            UserWarning,
            stacklevel=2,
        )
    vectors: list[Any] = [None] * len(ids)
    training = bool(getattr(model, "training", False))
    model.eval()
    try:
        with torch.inference_mode():
            for batch in _batches([len(held) for held in ids]):
                rows = torch.tensor([ids[number] for number in batch], device=next(model.parameters()).device)
                hidden = _hidden_states(model, rows)
                for number, of_text in zip(batch, hidden, strict=True):
                    mean = of_text.double().mean(dim=0)
                    vectors[number] = (mean / mean.norm().clamp_min(1e-12)).cpu().numpy()
    finally:
        model.train(training)
    places = {text: number for number, text in enumerate(distinct)}
    return np.stack([vectors[places[text]] for text in texts])


def _hidden_states(model: Any, rows: Any) -> Any:
    """The last block's output, shape (text, token, hidden)."""
    try:
        found = model(input_ids=rows, attention_mask=rows.new_ones(rows.shape)).last_hidden_state
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise InvalidArgumentError(
            f"control 'sentence_embedding' cannot embed texts with {type(model).__name__} ({str(error).strip().splitlines()[0]:.120}): "
            "give an encoder, such as all-MiniLM-L6-v2"
        ) from error
    return found


def _loaded(encoder: Any) -> tuple[Any, Any, int | None]:
    """Model, tokenizer, and how many tokens a text may have."""
    folder: Path | None = None
    if isinstance(encoder, tuple):
        model, tokenizer = encoder
    else:
        import torch
        from transformers import AutoModel, AutoTokenizer

        folder = Path(encoder).expanduser()
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        except Exception as error:
            raise InvalidArgumentError(
                f"control 'sentence_embedding' cannot load the encoder in {str(folder)!r} ({str(error).strip().splitlines()[0]:.120}): "
                "give the folder of an encoder and its tokenizer"
            ) from error
    if not callable(tokenizer):
        raise InvalidTypeError(f"control 'sentence_embedding' was given {type(tokenizer).__name__} as a tokenizer: give (model, tokenizer)")
    limits = [
        None if folder is None else _setting(folder / "sentence_bert_config.json").get("max_seq_length"),
        getattr(tokenizer, "model_max_length", None),
        getattr(getattr(model, "config", None), "max_position_embeddings", None),
    ]
    known = [limit for limit in limits if isinstance(limit, int) and 0 < limit < 10**9]
    return model, tokenizer, min(known, default=None)


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of texts, those of one length together, so that nothing is padded."""
    found: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda number: lengths[number]):
        length = lengths[number]
        if not length:
            raise InvalidArgumentError("control 'sentence_embedding' has a text without a single token: leave it out")
        if found and lengths[found[-1][0]] == length and (len(found[-1]) + 1) * length <= _TOKENS:
            found[-1].append(number)
        else:
            found.append([number])
    return found
