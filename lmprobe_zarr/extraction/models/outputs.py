"""Logits reduced to probabilities, perplexities and top k, and raw scores of routers. Never a hook or a prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from lmprobe_zarr.batch import Outputs
from lmprobe_zarr.errors import UnknownArchitectureError
from lmprobe_zarr.extraction.models.tensor_bits import without_gradients

__all__ = ["KeptLogits", "gives_raw_scores", "head_width", "largest", "perplexity_of", "raw_scores"]

Floats = npt.NDArray[np.float32]

# Bounds the float32 copy of the logits that are processed at a time. The computation needs as much again.
SLICE_BYTES: Final = 32 << 20
PLAIN: Final = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def head_width(head: nn.Module | None, vocab_size: int | None) -> int | None:
    """How many logits a head gives per token; `vocab_size` where the module does not say."""
    width = getattr(head, "out_features", None)
    return width if isinstance(width, int) else vocab_size


def _slices(rows: int, width: int) -> list[slice]:
    step = max(1, SLICE_BYTES // (4 * width))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _log_probs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The log-probability of a token in each row, float32: shape (row,)."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    found = [
        -functional.cross_entropy(logits[rows].to(wide), ids[rows], reduction="none").to(torch.float32)
        for rows in _slices(len(ids), logits.shape[-1])
    ]
    return torch.cat(found) if found else torch.empty(0, dtype=torch.float32, device=logits.device)


def largest(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `k` largest of each row, descending, and their columns as int32: shapes (row, k)."""
    slices = [logits[rows].topk(k, dim=-1) for rows in _slices(len(logits), logits.shape[-1])]
    return torch.cat([top.values for top in slices]), torch.cat([top.indices.to(torch.int32) for top in slices])


class KeptLogits:
    """What is kept of the logits of one batch, which come a slice of tokens after another.

    Parameters
    ----------
    outputs : Outputs
    every : bool
        Whether the logits are those of all tokens, one prompt after the other; otherwise those of the last token of every prompt.
    index : callable
        As `PaddedBatch.index`: the ``ids`` of all tokens, and the rows of the prompts' ``firsts`` and ``lasts`` among them.
    """

    def __init__(self, outputs: Outputs, every: bool, index: Callable[[str, torch.device], torch.Tensor]) -> None:
        self.outputs, self.every, self.index = outputs, every, index
        self.log_probs: torch.Tensor | None = None
        self.logits: torch.Tensor | None = None
        self.kept: list[tuple[torch.Tensor, ...]] = []

    def add(self, start: int, logits: torch.Tensor) -> None:
        """Take the logits of the tokens from `start` on: shape (token, vocab)."""
        stop, device = start + len(logits), logits.device
        ids = self.index("ids", device) if self.every else None
        if self.outputs.perplexity and ids is not None:
            if self.log_probs is None:
                self.log_probs = torch.full(ids.shape, torch.nan, dtype=torch.float32, device=device)
            after = ids[start + 1 : stop + 1]
            self.log_probs[start + 1 : stop + 1] = _log_probs(logits[: len(after)], after)
        if self.outputs.logits is None:
            return
        if ids is not None and self.outputs.logits == "last_token":
            lasts = self.index("lasts", device)
            logits = logits.index_select(0, lasts[(lasts >= start) & (lasts < stop)] - start)
            if not len(logits):
                return
        elif ids is not None and self.outputs.top_k is None and len(logits) < len(ids):
            # All logits of a long prompt may be more than the device holds.
            if self.logits is None:
                self.logits = torch.empty((len(ids), logits.shape[-1]), dtype=logits.dtype)
            self.logits[start:stop] = logits
            return
        self.kept.append((logits,) if self.outputs.top_k is None else largest(logits, self.outputs.top_k))

    def variables(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The variables per token and per prompt, by name."""
        tokens: dict[str, torch.Tensor] = {}
        prompts: dict[str, torch.Tensor] = {}
        if self.log_probs is not None:
            # The last token of a prompt does not predict the first of the next prompt.
            firsts = self.index("firsts", self.log_probs.device)
            tokens["token_log_prob"] = self.log_probs.index_fill_(0, firsts, torch.nan)
        found, name = (tokens, "logits") if self.outputs.logits == "all" else (prompts, "logits_last_token")
        if self.logits is not None:
            found[name] = self.logits
        elif self.kept:
            names = (name,) if self.outputs.top_k is None else (f"{name}_top_k_values", f"{name}_top_k_indices")
            joined = (parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*self.kept, strict=True))
            found |= dict(zip(names, joined, strict=True))
        return tokens, prompts


def perplexity_of(log_probs: Floats, lengths: npt.NDArray[np.int64]) -> tuple[Floats, Floats]:
    """The perplexity of every prompt and of every token.

    Parameters
    ----------
    log_probs : ndarray of float32, shape (token,)
        Of the tokens of all prompts, one prompt after the other; the first of each does not count.
    lengths : ndarray of int64, shape (prompt,)

    Returns
    -------
    prompts : ndarray of float32, shape (prompt, 3)
        The exponential of the mean, the least and the greatest cross-entropy; 1 for a prompt of one token, as in lmprobe.
    tokens : ndarray of float32, shape (token,)
    """
    firsts = np.cumsum(lengths) - lengths
    losses = -log_probs.astype(np.float64)
    least, greatest = losses.copy(), losses.copy()
    losses[firsts], least[firsts], greatest[firsts] = 0, np.inf, -np.inf
    mean = np.add.reduceat(losses, firsts) / np.maximum(lengths - 1, 1)
    statistics = np.stack([mean, np.minimum.reduceat(least, firsts), np.maximum.reduceat(greatest, firsts)], axis=1)
    statistics[lengths == 1] = 0
    # The perplexity of an almost impossible token exceeds float32 and becomes infinite.
    with np.errstate(over="ignore"):
        return np.exp(statistics).astype(np.float32), np.exp(-log_probs.astype(np.float64)).astype(np.float32)


def _first_scores(output: Any) -> torch.Tensor | None:
    first = output[0] if isinstance(output, tuple | list) else output
    return first if isinstance(first, torch.Tensor) and first.is_floating_point() else None


def gives_raw_scores(gate: nn.Module, hidden_size: int | None, dtype: torch.dtype, device: torch.device, name: str) -> bool:
    """Whether the first output of a router is the score of every expert, before softmax or sigmoid.

    The output of transformers' routers changed between its releases: raw scores, probabilities under the same name, or the chosen experts
    only. So the router is called with a token of zeros: its raw scores are zero or the bias, its probabilities are not.

    Raises
    ------
    UnknownArchitectureError
        The router gives no raw scores and has no weights to compute them with.
    """
    weight = getattr(gate, "weight", None)
    matrix = weight if isinstance(weight, torch.Tensor) and weight.ndim == 2 else None
    width = hidden_size or (None if matrix is None else matrix.shape[-1])
    own = next(iter(gate.parameters()), None)
    if width is not None and own is not None:
        place = device if own.device.type == "meta" else own.device
        # Some models keep the router in a higher precision; packed weights do not show the dtype of their input.
        dtype = own.dtype if own.dtype in PLAIN else dtype
        with without_gradients(gate):
            scores = _first_scores(gate(torch.zeros(1, 1, width, dtype=dtype, device=place)))
        if scores is not None and _is_projection(gate):
            return True
        bias = getattr(gate, "bias", None)
        nothing = bias if isinstance(bias, torch.Tensor) else torch.zeros((), device=place)
        experts = None if matrix is None else matrix.shape[0]
        if scores is not None and scores.shape[-1] == experts and bool((scores == nothing.to(scores)).all()):
            return True
    if matrix is None or not matrix.is_floating_point() or matrix.shape[-1] != width:
        raise UnknownArchitectureError(
            f"the router {type(gate).__name__} of {name!r} gives no scores before their softmax, and has no weights to compute them with: "
            "leave router out"
        )
    return False


def _is_projection(gate: nn.Module) -> bool:
    """Whether it is a linear layer, wrapped or packed or not."""
    return isinstance(getattr(gate, "out_features", None), int)


def raw_scores(gate: nn.Module, given: tuple[Any, ...], output: Any = None) -> torch.Tensor:
    """A router's score of every expert: its output, or, where `output` is None, computed from its input and weights in float32."""
    scores = _first_scores(output)
    if scores is not None:
        return scores
    hidden: torch.Tensor = given[0]
    bias = getattr(gate, "bias", None)
    weight: Any = gate.weight
    return functional.linear(hidden.float(), weight.float(), bias.float() if isinstance(bias, torch.Tensor) else None)
