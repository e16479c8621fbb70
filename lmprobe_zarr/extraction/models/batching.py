"""How many prompts share a batch: by padded tokens, by the bytes that are kept of them, and by the memory of the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.typing import Ints

__all__ = [
    "LOGIT_BYTES",
    "Windows",
    "check_batch_sizes",
    "default_batch_tokens",
    "free_memory",
    "is_out_of_memory",
    "most_prompts_with_logits",
    "next_batch",
]

DEVICE_TOKENS: Final = {"cuda": 16384, "mps": 4096, "cpu": 640}  # on two cores, 384 to 768 tokens stay in the caches
# Bounds the activations that are kept of one batch. They exist on the device, and on the host while they are written.
BATCH_BYTES: Final = 256 << 20
LEAST_TOKENS: Final = 256
SCRATCH_BATCHES: Final = 32
# Bytes of a logit while it is computed, whatever its dtype.
LOGIT_BYTES: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """How many prompts are sorted by length at a time, so that what is collected of them can be put in order again.

    Parameters
    ----------
    batches : int
        Batches of one window at most, roughly: as many tokens.
    nbytes : int
        Bytes of activations that are collected of one window at most …
    scratch_nbytes : int
        … and as many more where these hold fewer than 32 batches.
    """

    batches: int
    nbytes: int
    scratch_nbytes: int = 0

    def cut(self, nbytes: Ints, lengths: Ints, batch_tokens: int, batch_prompts: int | None) -> list[tuple[int, int]]:
        """Consecutive windows as (start, stop), each of at least one prompt.

        Parameters
        ----------
        nbytes, lengths : ndarray of int, shape (prompt,)
            Bytes that are collected of each prompt, and its tokens.
        batch_tokens, batch_prompts : int
            The most that a batch holds.
        """
        # Beyond 32 batches a window saves little padding, so no file is written for more.
        batch_bytes = int(nbytes.sum() * batch_tokens // max(1, lengths.sum()))
        most_bytes = max(self.nbytes, min(self.nbytes + self.scratch_nbytes, SCRATCH_BATCHES * batch_bytes))
        ends = [(np.cumsum(nbytes), most_bytes), (np.cumsum(np.minimum(lengths, batch_tokens)), self.batches * batch_tokens)]
        if batch_prompts is not None:
            ends.append((np.arange(1, len(lengths) + 1), self.batches * batch_prompts))
        windows, start = [], 0
        while start < len(lengths):
            most = (int(np.searchsorted(end, (end[start - 1] if start else 0) + limit, side="right")) for end, limit in ends)
            stop = max(start + 1, min(most))
            windows.append((start, stop))
            start = stop
        return windows


def check_batch_sizes(batch_tokens: int | None, batch_prompts: int | None) -> None:
    """Raise `InvalidArgumentError` for sizes of batches that are no numbers."""
    if batch_prompts is not None and (isinstance(batch_prompts, bool) or not isinstance(batch_prompts, int) or batch_prompts < 1):
        raise InvalidArgumentError(f"batch_prompts={batch_prompts!r} is no number of prompts: give a whole number of at least 1, or None")
    if batch_tokens is not None and (isinstance(batch_tokens, bool) or not isinstance(batch_tokens, int) or batch_tokens < 1):
        raise InvalidArgumentError(f"batch_tokens={batch_tokens!r} is no number of tokens: give a whole number of at least 1, or None")


def default_batch_tokens(device: str, bytes_per_token: int = 0) -> int:
    """Padded tokens per batch where the caller names no number.

    Parameters
    ----------
    device : {"cuda", "mps", "cpu"}
    bytes_per_token : int
        Bytes that are kept per token, and those of its logits where they are computed. A batch holds at most 256 MiB of them.
    """
    most = DEVICE_TOKENS.get(device, DEVICE_TOKENS["cpu"])
    return most if not bytes_per_token else max(LEAST_TOKENS, min(most, BATCH_BYTES // bytes_per_token))


def most_prompts_with_logits(vocab_size: int) -> int:
    """The most prompts in a batch where the logits of one token per prompt are computed: 256 MiB of logits."""
    return max(1, BATCH_BYTES // (LOGIT_BYTES * max(1, vocab_size)))


def next_batch(lengths: Ints, budget: int, uniform_above: int | None, most: int | None = None) -> int:
    """How many of the remaining prompts the next batch takes.

    Parameters
    ----------
    lengths : ndarray of int64
        Tokens of the remaining prompts, sorted.
    budget : int
        Padded tokens at most: prompts × longest. At least one prompt is taken.
    uniform_above : int or None
        Prompts longer than this share a batch only with prompts of the same length.
    most : int, optional
        Prompts at most.
    """
    longest = np.maximum.accumulate(lengths)
    fits = int(np.searchsorted(longest * np.arange(1, len(lengths) + 1), budget, side="right"))
    if uniform_above is not None:
        short = lengths <= uniform_above
        alike = short if short[0] else lengths == lengths[0]
        fits = min(fits, int(np.argmin(alike)) if not alike.all() else len(lengths))
    return max(1, fits if most is None else min(fits, most))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device or the host has too little memory."""
    kind = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)
    words = str(error)
    return isinstance(error, kind | MemoryError) or "out of memory" in words or "can't allocate memory" in words


def free_memory(device: torch.device) -> None:
    """Give cached memory back to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
