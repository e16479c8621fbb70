"""One batch of tokenized prompts through a model, and what several batches have in common. Never a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lmprobe_zarr.batch import concat_ranges, offsets_of, shorten
from lmprobe_zarr.errors import DeviceMemoryError
from lmprobe_zarr.extraction.models.batching import is_out_of_memory, next_batch
from lmprobe_zarr.extraction.models.captured import CaptureRequest, Collected
from lmprobe_zarr.extraction.models.conduct import Conduct
from lmprobe_zarr.extraction.models.continuing import StoredRows, is_rounded
from lmprobe_zarr.extraction.models.forward import KnownRows, ModelCall, run_forward_pass
from lmprobe_zarr.extraction.models.loaded_model import LoadedModel
from lmprobe_zarr.extraction.models.standing_in import Forms
from lmprobe_zarr.extraction.models.tokenizing import TokenizedPrompts
from lmprobe_zarr.typing import Ints

__all__ = ["Job", "Known", "Progress"]

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Prompts to run a model over, and how.

    Parameters
    ----------
    loaded : LoadedModel
    conduct : Conduct
    call : ModelCall
        Of a pass that computes all that is requested.
    request : CaptureRequest
    tokenized : TokenizedPrompts
    starts : ndarray of int64
        The first token of each prompt, and the end of the last.
    batch_tokens : int
        Padded tokens per batch.
    batch_prompts : int, optional
    cut : callable
        Cuts some of the prompts, given by their places, into windows that are sorted by length each for itself.
    progress : callable, optional
        Called with the number of prompts and of tokens that were run.
    after_window : callable, optional
        Called when all batches of a window have been taken.
    """

    loaded: LoadedModel
    conduct: Conduct
    call: ModelCall
    request: CaptureRequest
    tokenized: TokenizedPrompts
    starts: Ints
    batch_tokens: int
    batch_prompts: int | None
    cut: Callable[[Ints], list[Ints]]
    progress: Progress | None
    after_window: Callable[[], None] | None

    def in_order(self, window: Ints) -> Ints:
        """The prompts of a window in the order in which they are run.

        The longest come first, so that memory runs out early. A model whose state grows with the longest prompt so far needs them in
        ascending order.
        """
        lengths = self.tokenized.run_lengths[window]
        return window[np.argsort(lengths if self.call.uniform_above is not None else -lengths, kind="stable")]

    def next_batch(self, left: Ints, batch_tokens: int) -> Ints:
        """The prompts of the next batch, ascending, of those that are left in the order in which they are run."""
        count = next_batch(self.tokenized.run_lengths[left], batch_tokens, self.call.uniform_above, self.batch_prompts)
        return np.sort(left[:count])

    def halved(self, batch: Ints) -> int:
        """Padded tokens per batch where a batch was too large for the device."""
        return max(1, len(batch) * int(self.tokenized.run_lengths[batch].max()) // 2)

    def collect(self, call: ModelCall, request: CaptureRequest, batch: Ints, known: KnownRows | None) -> Collected | None:
        """What a pass over a batch keeps, or None where the device has too little memory for it. Then nothing of it is referenced.

        Raises
        ------
        DeviceMemoryError
            The device cannot hold a single prompt.
        """
        tokenized, loaded, starts = self.tokenized, self.loaded, self.starts
        ids = [tokenized.token_ids[starts[i] : starts[i + 1]] for i in batch]
        read = None if tokenized.encoder_ids is None else [tokenized.encoder_ids[i] for i in batch]
        try:
            return run_forward_pass(loaded, call, request, ids, encoder_ids=read, parts=self._parts(batch), known=known)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1:
                number = int(tokenized.first[batch[0]])
                raise DeviceMemoryError(
                    f"prompts[{number}] {shorten(tokenized.text[batch[0]])} with {len(ids[0])} tokens does not fit into the memory "
                    f"of {str(loaded.device)!r}: "
                    "use a smaller dtype or fewer layers, weights='streamed', device_map='auto', or truncation=True with max_length="
                ) from error
            return None

    def _parts(self, batch: Ints) -> Mapping[str, np.ndarray[tuple[int], np.dtype[np.bool_]]]:
        if not self.tokenized.parts:
            return {}
        places = concat_ranges(self.starts[batch], self.tokenized.lengths[batch])
        return {name: mask[places] for name, mask in self.tokenized.parts.items()}


@dataclass(slots=True)
class Known:
    """The stored rows of each batch, as long as they are what the model computed."""

    start: StoredRows
    forms: Forms
    loaded: LoadedModel

    def of(self, digests: Sequence[str], lengths: Ints) -> KnownRows | None:
        """The rows of some prompts; None where one has other tokens, is not finite or was rounded, so that the whole pass runs."""
        values = self.start.read(digests)
        dtype = self.loaded.dtype
        if len(values) != int(lengths.sum()) or not np.isfinite(values).all():
            return None
        # Prompt by prompt: one that was stored exactly would hide that another was rounded.
        if any(is_rounded(own, dtype) for own in np.split(values, offsets_of(lengths)[1:-1])):
            return None
        rows = torch.from_numpy(np.array(values)).to(getattr(torch, dtype))
        return KnownRows(layer=self.start.layer, rows=rows, forms=self.forms)
