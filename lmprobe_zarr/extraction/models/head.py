"""The head of a long prompt, slice by slice, so that the logits of all its tokens are never in memory together.

The model runs once, and its head sees the first tokens only. For the others the whole model's own forward is called again, with its body
replaced by the rows that the body gave. So logits are projected, scaled and capped by the model's own code, whatever it does there.
Models whose forward cannot be called this way compute all logits at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import nn

from lmprobe_zarr.extraction.models.captured import Collected, logits_of
from lmprobe_zarr.extraction.models.outputs import head_width

__all__ = ["HeadSlices", "NotInSlicesError", "SlicedHead"]

# Logits of fewer bytes are computed at once; those of more, in slices of this size, as float32.
WHOLE_BYTES: Final = 256 << 20
SLICE_BYTES: Final = 128 << 20


class NotInSlicesError(Exception):
    """The model's head cannot be run on some of its tokens by themselves."""


@dataclass(slots=True)
class HeadSlices:
    """Whether a model's head may be run in slices, and whether that was compared with the model's own pass already."""

    allowed: bool = True
    compared: bool = False


def _first_rows(output: Any) -> torch.Tensor | None:
    """The hidden states in the output of a model's body."""
    found = output[0] if isinstance(output, tuple | list) and output else getattr(output, "last_hidden_state", output)
    return found if isinstance(found, torch.Tensor) else None


def _with_rows(output: Any, rows: torch.Tensor) -> Any:
    """The output of a body with other hidden states."""
    if isinstance(output, torch.Tensor):
        return rows
    if isinstance(output, tuple) and type(output) is tuple:
        return (rows, *output[1:])
    if hasattr(output, "last_hidden_state") and hasattr(output, "keys"):
        return type(output)(**{**output, "last_hidden_state": rows})
    raise NotInSlicesError


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
    """One pass whose head is run in slices.

    Parameters
    ----------
    whole, body : Module
        The model that gives logits, and the part of it that runs every block.
    collected : Collected
    step : int
        Tokens in a slice.
    slices : HeadSlices
    """

    whole: nn.Module
    body: nn.Module
    collected: Collected
    step: int
    slices: HeadSlices
    rows: torch.Tensor | None = None
    output: Any = None
    hooks: ExitStack = field(default_factory=ExitStack)

    @staticmethod
    def needed(whole: nn.Module, body: nn.Module, head: nn.Module | None, vocab_size: int | None, collected: Collected) -> int | None:
        """How many tokens a slice has; None where all logits are computed at once."""
        width = head_width(head, vocab_size)
        request, tokens = collected.request, len(collected.padded.token_ids)
        if not request.outputs.needs_head or request.head_rows != "tokens" or width is None or body is whole:
            return None
        return None if 4 * width * tokens <= WHOLE_BYTES else min(tokens, max(1, SLICE_BYTES // (4 * width)))

    def watch(self) -> None:
        """Cut what the head sees in the pass that follows."""
        self.hooks.callback(self.body.register_forward_hook(self._cut).remove)

    def _cut(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        padded = self.collected.padded
        hidden = _first_rows(output)
        if self.rows is not None or hidden is None or hidden.ndim != 3 or hidden.shape[:2] != (len(padded.lengths), padded.longest):
            raise NotInSlicesError
        flat = hidden.flatten(0, 1)
        # Without padding all rows are wanted, and they need no copy.
        self.rows = flat if len(padded.token_ids) == len(flat) else flat.index_select(0, padded.index("tokens", flat.device))
        self.output = output
        return _with_rows(output, self.rows[None, : self.step])

    def take(self, first: Any, options: dict[str, Any]) -> None:
        """Hand the logits of all slices on.

        Parameters
        ----------
        first : output of the model
            For the first slice.
        options : dict
            How the model is called, beside its token ids.

        Raises
        ------
        NotInSlicesError
        """
        self.hooks.close()
        if self.rows is None:
            raise NotInSlicesError
        kept, number = self.collected.keep_logits(), len(self.rows)
        logits = self._checked(logits_of(first), min(self.step, number))
        if not self.slices.compared:
            again = self._again(slice(0, self.step), options)
            if not torch.allclose(again.float(), logits.float(), rtol=1e-3, atol=1e-3 * float(logits.abs().max())):
                raise NotInSlicesError
            self.slices.compared = True
            del again
        kept.add(0, logits)
        del logits, first
        for start in range(self.step, number, self.step):
            kept.add(start, self._again(slice(start, start + self.step), options))
        self.collected.put_logits(kept)

    def _again(self, part: slice, options: dict[str, Any]) -> torch.Tensor:
        """The logits of some tokens, from the rows that the body gave for them."""
        assert self.rows is not None  # noqa: S101 - the pass has run
        rows = self.rows[None, part]
        ids = self.collected.padded.index("ids", rows.device)[None, part]
        with _standing_in(self.body, _with_rows(self.output, rows)):
            try:
                output = self.whole(input_ids=ids, **{name: value for name, value in options.items() if name != "attention_mask"})
            except (IndexError, TypeError, ValueError) as error:
                raise NotInSlicesError from error
        return self._checked(logits_of(output), rows.shape[1])

    def _checked(self, logits: torch.Tensor | None, number: int) -> torch.Tensor:
        if logits is None or logits.ndim != 3 or logits.shape[:2] != (1, number):
            raise NotInSlicesError
        return logits[0]
