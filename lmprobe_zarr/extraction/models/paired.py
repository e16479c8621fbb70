"""The decoder of an encoder-decoder as a model that takes token ids: for each of its prompts the encoder reads a prompt of its own.

Everything else here works on models that are called with ``input_ids``. `PairedBody` is such a model: its ``input_ids`` are what the
decoder reads, and `reading` sets what the encoder reads for each row of the batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.extraction.models.structure import input_embeddings
from lmprobe_zarr.extraction.models.tokenizing import DecoderStart
from lmprobe_zarr.typing import Ints

__all__ = ["PairedBody", "decoder_start", "encoder_ids_of", "takes_pairs"]

# Their labels end with the token of the language, which the decoder reads first.
_WRAPPING: Final = ("mbart", "plbart")


def takes_pairs(module: nn.Module) -> bool:
    """Whether a module is called with the token ids of an encoder and of its decoder."""
    return {"input_ids", "decoder_input_ids"} <= inspect.signature(module.forward).parameters.keys()


def encoder_ids_of(ids: Ints) -> Ints:
    """What the encoder reads beside a decoder's prompt of the check: all but its last token, so that the last changes the decoder only."""
    return ids[: max(1, len(ids) - 1)]


class PairedBody(nn.Module):
    """A decoder together with its encoder, called with what the decoder reads.

    Parameters
    ----------
    inner : Module
        Takes ``input_ids`` and ``decoder_input_ids``.
    encoder, decoder : Module
        Parts of `inner`.
    """

    inner: nn.Module
    encoder: nn.Module
    decoder: nn.Module
    _read: tuple[torch.Tensor, torch.Tensor] | None

    def __init__(self, inner: nn.Module, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        # Not as modules of their own, which they are in `inner`.
        vars(self).update(encoder=encoder, decoder=decoder, _read=None)

    @property
    def config(self) -> Any:
        """The decoder's configuration."""
        return getattr(self.decoder, "config", None) or getattr(self.inner, "config", None)

    def get_input_embeddings(self) -> nn.Module | None:
        """The embeddings of the decoder's tokens."""
        return input_embeddings(self.decoder) or input_embeddings(self.inner)

    def around(self, part: nn.Module) -> PairedBody:
        """The same encoder and decoder in a larger part of the model, such as one with a head."""
        return PairedBody(part, self.encoder, self.decoder)

    @contextmanager
    def reading(self, encoder_ids: Sequence[Ints], pad_id: int) -> Iterator[None]:
        """Inside, the encoder reads these token ids, one prompt for each row of the batch."""
        lengths = np.array([len(ids) for ids in encoder_ids])
        padded = np.full((len(lengths), lengths.max()), pad_id, np.int64)
        for row, ids in zip(padded, encoder_ids, strict=True):
            row[: len(ids)] = ids
        mask = (np.arange(padded.shape[1]) < lengths[:, None]).astype(np.int64)
        self._read = torch.from_numpy(padded), torch.from_numpy(mask)
        try:
            yield
        finally:
            self._read = None

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        use_cache: bool | None = None,
    ) -> SimpleNamespace:
        """The decoder's ``hidden_states`` and ``logits``, where there are any."""
        if self._read is None:
            read = torch.stack([torch.from_numpy(encoder_ids_of(ids)) for ids in input_ids.cpu().numpy()])
            mask = torch.ones_like(read)
        else:
            read, mask = self._read
        given = {"decoder_attention_mask": attention_mask, "output_hidden_states": output_hidden_states, "use_cache": use_cache}
        known = inspect.signature(self.inner.forward).parameters
        options = {name: value for name, value in given.items() if value is not None and name in known}
        output = self.inner(
            input_ids=read.to(input_ids.device), attention_mask=mask.to(input_ids.device), decoder_input_ids=input_ids, **options
        )
        return SimpleNamespace(hidden_states=getattr(output, "decoder_hidden_states", None), logits=getattr(output, "logits", None))


def decoder_start(model: nn.Module, config: Mapping[str, Any]) -> DecoderStart:
    """How the text of a decoder becomes what it reads, as transformers shifts labels.

    Parameters
    ----------
    model : Module
    config : mapping
        The model's configuration.

    Raises
    ------
    InvalidArgumentError
        The configuration names no first token, or the model shifts its labels in another way.
    """
    nested = config.get("decoder")
    settings = [config, nested if isinstance(nested, Mapping) else {}]
    wraps = config.get("model_type") in _WRAPPING
    named = [each.get(name) for name in ("decoder_start_token_id", "bos_token_id") for each in settings]
    token_id = next((value for value in named if isinstance(value, int)), None)
    if token_id is None and not wraps:
        raise InvalidArgumentError(
            f"the configuration of {type(model).__name__} names no decoder_start_token_id, which its decoder reads first: set it, "
            "model.config.decoder_start_token_id = …, and give the model object"
        )
    start = DecoderStart(token_id=token_id or 0, wraps=wraps)
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is not None:
        labels = np.array([7, 6, 5], np.int64)
        try:
            shifted = shift(labels=torch.from_numpy(labels)[None])[0].numpy()
        except Exception:  # noqa: BLE001 — not every model with this method can be called so
            return start
        if not np.array_equal(shifted, start.before(labels, ends=True)):
            raise InvalidArgumentError(
                f"{type(model).__name__} makes of labels what its decoder reads in a way that is not known here: extract its encoder"
            )
    return start
