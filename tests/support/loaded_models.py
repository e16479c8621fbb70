"""Tiny models, loaded, and what transformers gives for one prompt at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from tiny_models import tiny_tokenizer

from lmprobe_zarr.batch.token_batch import TokenBatch
from lmprobe_zarr.extraction import models as extraction

Array = npt.NDArray[Any]


def by_prompt(batches: list[TokenBatch]) -> dict[str, dict[str, Array]]:
    found: dict[str, dict[str, Array]] = {}
    for batch in batches:
        ends = np.cumsum(batch.n_tokens) if batch.n_tokens is not None else np.zeros(len(batch.sha256), int)
        for row, digest in enumerate(batch.sha256):
            values = {name: array[row] if name in batch.unlayered else array[:, row] for name, array in batch.prompts.items()}
            if batch.n_tokens is not None:
                own = slice(ends[row] - batch.n_tokens[row], ends[row])
                values |= {name: array[own] if name in batch.unlayered else array[:, own] for name, array in batch.tokens.items()}
                values |= {name: column[own] for name, column in batch.token_columns.items()}
            assert digest not in found
            found[digest] = values
    return found


def loaded_from(model: Any, *, encoder: bool = False, **options: Any) -> extraction.LoadedModel:
    options = {"name": "tiny", "tokenizer": tiny_tokenizer(encoder=encoder), **options}
    return extraction.load_model(model, **options)


def checked_from(model: Any, *, encoder: bool = False, **options: Any) -> extraction.LoadedModel:
    """A loaded model that has been checked already, so that its next pass is one over prompts."""
    from lmprobe_zarr.extraction.models.check import check_model

    loaded = loaded_from(model, encoder=encoder, **options)
    check_model(loaded)
    return loaded


class Scarce:
    """A device that has room for so many padded tokens at a time, and says otherwise what torch says."""

    def __init__(self, model: Any, room: int, error: Callable[[], Exception]) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.failed = 0

        def refuse(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
            shape = tuple(kwargs["input_ids"].shape)
            if shape[0] * shape[1] > room:
                self.failed += 1
                raise error()
            self.shapes.append(shape)

        model.register_forward_pre_hook(refuse, with_kwargs=True)
