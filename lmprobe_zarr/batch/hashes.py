"""The digest, hash and number of a prompt, and digests as bytes or hex digits. No other module converts between them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lmprobe_zarr.batch.given import is_pair
from lmprobe_zarr.errors import InvalidTypeError
from lmprobe_zarr.typing import Array, Mask

__all__ = [
    "HASH_DIGITS",
    "UNKNOWN_DIGITS",
    "digest_of_hash",
    "digests_of",
    "hashes_of",
    "is_hash",
    "keys_of",
    "prompt_sha256",
    "rows_differ",
    "sha256_of",
]

HASH_DIGITS: Final = 16
_DIGEST_BYTES: Final = 32


def prompt_sha256(prompt: str | Sequence[int] | Array | Sequence[Mapping[str, Any]] | tuple[str, str]) -> str:
    r"""The whole sha256 of a prompt, 64 hex digits.

    Parameters
    ----------
    prompt : str, sequence of int or pair of str
        A text, hashed as UTF-8; ready token ids, hashed as ``b"\0ids\0"`` and the ids as little-endian int64; or the texts of an encoder
        and of its decoder, hashed as ``b"\0pair\0"`` and the sha256 of each.

    Raises
    ------
    InvalidTypeError
        Neither a text nor a flat sequence of integers nor a pair of texts.
    """
    if isinstance(prompt, str):
        # Lone surrogates are legal in a Python string (JSON may contain them) but have no UTF-8: they are hashed unchanged.
        return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()
    if is_pair(prompt):
        texts = [text.encode("utf-8", "surrogatepass") for text in prompt]
        return hashlib.sha256(b"\0pair\0" + b"".join(hashlib.sha256(text).digest() for text in texts)).hexdigest()
    try:
        ids = np.asarray(prompt)
    except ValueError as error:
        raise InvalidTypeError(f"a prompt is a text or a flat list of token ids, not {type(prompt).__name__}") from error
    if ids.ndim == 1 and len(ids) and isinstance(ids[0], Mapping) and isinstance(prompt, list | tuple):
        raise InvalidTypeError("a chat is found by its hash: give prompt_hash(chat, tokenizer=…) instead")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise InvalidTypeError(f"a prompt is a text or a flat list of token ids, not {type(prompt).__name__}")
    return hashlib.sha256(b"\0ids\0" + ids.astype("<i8").tobytes()).hexdigest()


# lmprobe keeps 16 digits of a prompt's sha256. Where the text is unknown, zeros take the place of the other 48.
UNKNOWN_DIGITS: Final = "0" * 48


def digest_of_hash(prompt_hash: str) -> str:
    """The digest of a prompt of which only the hash is known: the hash and 48 zeros."""
    return prompt_hash + UNKNOWN_DIGITS


def is_hash(label: object) -> bool:
    """Whether a label looks like a prompt hash."""
    return isinstance(label, str) and len(label) == HASH_DIGITS and all(c in "0123456789abcdef" for c in label)


def digests_of(sha256: Sequence[str]) -> npt.NDArray[np.uint8]:
    """Digests as bytes, shape (prompt, 32), from their hex digits."""
    return np.frombuffer(bytes.fromhex("".join(sha256)), np.uint8).reshape(-1, _DIGEST_BYTES)


def sha256_of(digests: npt.NDArray[np.uint8]) -> list[str]:
    """The 64 hex digits of each digest, from an array of shape (prompt, 32)."""
    text = np.ascontiguousarray(digests).tobytes().hex()
    return [text[start : start + 2 * _DIGEST_BYTES] for start in range(0, len(text), 2 * _DIGEST_BYTES)]


def hashes_of(digests: npt.NDArray[np.uint8]) -> npt.NDArray[np.str_]:
    """The hash, 16 hex digits, of each digest."""
    text = np.ascontiguousarray(digests[:, : HASH_DIGITS // 2]).tobytes().hex()
    return np.frombuffer(text.encode(), f"S{HASH_DIGITS}").astype(f"U{HASH_DIGITS}")


def rows_differ(some: npt.NDArray[np.uint8], others: npt.NDArray[np.uint8]) -> Mask:
    """Which pairs of digests with equal hashes belong to different prompts.

    A digest that ends in zeros belongs to a prompt whose text is unknown (`digest_of_hash`): it never counts as different.
    """
    unknown = ~some[:, HASH_DIGITS // 2 :].any(axis=1) | ~others[:, HASH_DIGITS // 2 :].any(axis=1)
    return np.asarray((some != others).any(axis=1) & ~unknown, bool)


def keys_of(digests: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """The hash of each digest as a number, by which prompts are looked up."""
    # The first of four numbers per digest: much faster than a copy of the first eight bytes of each.
    return np.ascontiguousarray(digests).view(">u8")[:, 0].astype(np.uint64)
