"""Whether a tokenizer belongs to a model, from the sizes of their vocabularies and from where both were loaded. Never torch."""

from __future__ import annotations

from contextlib import suppress
from pathlib import PurePath
from typing import Any

from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.log import warn

__all__ = ["check_tokenizer"]


def _last_part(name: object) -> str:
    """The part of a hub id or folder that copies keep; of a snapshot in the hub's local cache that of its repository."""
    parts = PurePath(str(name or "")).parts
    if len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return parts[-3].rpartition("--")[2].lower()
    return parts[-1].lower() if parts else ""


def _without_row(tokenizer: Any, rows: int) -> list[str]:
    """The tokens whose ids have no row in a table of embeddings.

    Without special ones: tokens for padding or for pictures are often added to a tokenizer and not to the model. Where a prompt has such
    a token, that is an error of its own.
    """
    special = {number for number, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if getattr(token, "special", False)}
    special |= set(getattr(tokenizer, "all_special_ids", ()))
    return sorted(str(token) for token, number in tokenizer.get_vocab().items() if number >= rows and number not in special)


def check_tokenizer(tokenizer: Any, name: str, origin: object, rows: int | None) -> None:
    """Check that a tokenizer may be a model's.

    Parameters
    ----------
    tokenizer : transformers tokenizer
    name : str
        The model's name, for messages.
    origin : object
        Folder or hub id that the model was loaded from, if the tokenizer was given apart; empty or None where unknown.
    rows : int, optional
        Rows of the model's table of embeddings; None where unknown.

    Raises
    ------
    InvalidArgumentError
        The vocabulary is larger than the table of embeddings.

    Warns
    -----
    CacheWarning
        Both were loaded from places of different names.
    """
    size = None
    with suppress(TypeError, NotImplementedError, AttributeError):
        size = len(tokenizer)
    if rows is not None and size is not None and size > rows:
        beyond = _without_row(tokenizer, rows)
        if beyond:
            raise InvalidArgumentError(
                f"the tokenizer has {size} tokens and {name!r} has {rows} embeddings, so {len(beyond)} tokens, such as {beyond[0]!r}, have "
                "none: tokenizer and model do not belong together. Give the model's own tokenizer, or enlarge the model, "
                "model.resize_token_embeddings(len(tokenizer))"
            )
    given = getattr(tokenizer, "name_or_path", None)
    if _last_part(given) and _last_part(origin) and _last_part(given) != _last_part(origin):
        warn(
            f"the tokenizer was loaded from {str(given)!r} and the model {name!r} from {str(origin)!r}: where their vocabularies differ, "
            "the model sees other tokens than the prompts have"
        )
