"""The head of a long prompt, slice by slice, so that the logits of all its tokens are never in memory together.

The pass ends with the model's body. Then the whole model's own forward is called for some tokens at a time, with the body replaced by the
rows that it gave for them. So logits are projected, scaled and capped by the model's own code, whatever it does there. The first time,
this is compared with the model's own pass over a few tokens; where it differs, the logits of a batch are computed at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import nn

from lmprobe_zarr.extraction.models.batching import is_out_of_memory
from lmprobe_zarr.extraction.models.captured import Collected, logits_of
from lmprobe_zarr.extraction.models.outputs import head_width

__all__ = ["BodyDoneError", "HeadInSlices", "SlicedHead", "slice_tokens"]

# Logits of fewer bytes are computed at once; those of more, in slices of this size. Bytes as of float32.
WHOLE_BYTES: Final = 256 << 20
SLICE_BYTES: Final = 128 << 20
# Tokens of the comparison, which runs as two slices.
COMPARED_TOKENS: Final = 6


class BodyDoneError(Exception):
    """Raised after the model's body, so that its head does not run on all tokens."""


@dataclass(slots=True)
class HeadInSlices:
    """Whether a model's head may be run in slices; None until that was compared with the model's own pass."""

    allowed: bool | None = None


def slice_tokens(collected: Collected, head: nn.Module | None, vocab_size: int | None) -> int | None:
    """How many tokens a slice of the head has; None where the logits of the batch are small enough to be computed at once."""
    width, request, tokens = head_width(head, vocab_size), collected.request, len(collected.padded.token_ids)
    if not request.outputs.needs_head or request.head_rows != "tokens" or width is None or 4 * width * tokens <= WHOLE_BYTES:
        return None
    return max(1, SLICE_BYTES // (4 * width))


def _hidden(output: Any) -> torch.Tensor | None:
    """The hidden states in the output of a model's body."""
    found = output[0] if isinstance(output, tuple | list) and output else getattr(output, "last_hidden_state", output)
    return found if isinstance(found, torch.Tensor) else None


def _with_hidden(output: Any, rows: torch.Tensor) -> Any:
    """The output of a body with other hidden states."""
    if isinstance(output, torch.Tensor):
        return rows
    if hasattr(output, "last_hidden_state") and hasattr(output, "keys"):
        return type(output)(**{**output, "last_hidden_state": rows})
    return (rows, *output[1:])


@contextmanager
def _standing_in(body: nn.Module, output: Any) -> Iterator[None]:
    """Inside, a call of the body gives `output` and computes nothing."""
    own = vars(body).get("forward")
    body.forward = lambda *_, **__: output
    try:
        yield
    finally:
        del body.forward
        if own is not None:
            body.forward = own


@dataclass(slots=True)
class SlicedHead:
    """The head of one batch, run in slices of tokens.

    Parameters
    ----------
    whole, body : Module
        The model that gives logits, and the part of it that runs every block.
    collected : Collected
        Takes what is kept of the logits.
    options : dict
        How the model is called, beside its token ids.
    device : torch.device
        The device of its token ids.
    """

    whole: nn.Module
    body: nn.Module
    collected: Collected
    options: dict[str, Any]
    device: torch.device
    output: Any = None
    hooks: ExitStack = field(default_factory=ExitStack)

    def stop_after_body(self) -> None:
        """Let the pass that follows end with a `BodyDoneError`, once the body has run."""
        self.hooks.callback(self.body.register_forward_hook(self._stop).remove)

    def _stop(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self.output = output
        raise BodyDoneError

    def run(self, step: int) -> None:
        """Run the head on all tokens, `step` at a time."""
        self.hooks.close()
        padded = self.collected.padded
        hidden = _hidden(self.output)
        assert hidden is not None  # noqa: S101 - as in the comparison
        flat = hidden.flatten(0, 1)
        # Without padding all rows are needed, without a copy.
        rows = flat if len(padded.token_ids) == len(flat) else flat.index_select(0, padded.index("tokens", flat.device))
        ids, kept = padded.index("ids", self.device), self.collected.keep_logits()
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            kept.add(start, self._logits(rows[None, part], ids[None, part], self.output)[0])
        self.output = None
        self.collected.put_logits(kept)

    def _logits(self, rows: torch.Tensor, ids: torch.Tensor, output: Any) -> torch.Tensor:
        """The logits of some tokens, from the rows that the body gave for them: shape (1, token, vocab)."""
        options = {name: value for name, value in self.options.items() if name != "attention_mask"}
        with _standing_in(self.body, _with_hidden(output, rows)):
            logits = logits_of(self.whole(input_ids=ids, **options))
        if logits is None:
            raise TypeError(type(self.whole).__name__)
        return logits

    def agrees(self) -> bool:
        """Whether slices give the logits of the model's own pass over the first few tokens of the batch."""
        if self.body is self.whole:
            return False
        given: list[Any] = []
        ids = self.collected.padded.index("ids", self.device)[None, :COMPARED_TOKENS]
        handle = self.body.register_forward_hook(lambda _module, _args, output: given.append(output))
        try:
            options = {name: value for name, value in self.options.items() if name != "attention_mask"}
            right = logits_of(self.whole(input_ids=ids, **options))
            handle.remove()
            hidden = _hidden(given[0]) if len(given) == 1 else None
            if right is None or hidden is None or hidden.shape[:2] != ids.shape or right.shape[:2] != ids.shape:
                return False
            middle = ids.shape[1] // 2
            found = [self._logits(hidden[:, part], ids[:, part], given[0]) for part in (slice(middle), slice(middle, None))]
            return _alike(torch.cat(found, dim=1), right)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            return False
        finally:
            handle.remove()


def _alike(found: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether logits are equal but for rounding, which depends on how many rows are multiplied together."""
    if found.shape != right.shape:
        return False
    near = 1e-4 if right.dtype in (torch.float32, torch.float64) else 2e-2
    same = torch.isclose(found.float(), right.float(), rtol=0, atol=near * float(right.abs().max()), equal_nan=True)
    return bool(same.all())
