"""A pandas index of prompt hashes that finds prompts by their texts too, so that ``sel(prompt=text)`` works.

xarray keeps it inside its own ``PandasIndex``, so it aligns, joins and concatenates with the plain index of any other array; a subclass of
``PandasIndex`` would be refused there as another kind of index. What pandas makes anew, as in a union, may be a plain index, which knows
hashes alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from xarray import Coordinates
from xarray.indexes import PandasIndex

from lmprobe_zarr.batch import prompt_hash
from lmprobe_zarr.interchange import TEXT

__all__ = ["PromptLabels", "as_prompt_labels", "prompt_coordinates"]


class PromptLabels(pd.Index):
    """Hashes of prompts; a text that is not among them is looked up by its own hash."""

    def __reduce__(self) -> tuple[Any, ...]:
        return as_prompt_labels, (np.asarray(self), self.name)

    def get_loc(self, key: Any) -> Any:
        """The place of a hash or a text."""
        try:
            return super().get_loc(key)
        except KeyError:
            if not isinstance(key, str):
                raise
            try:
                return super().get_loc(prompt_hash(str(key)))
            except KeyError:
                raise KeyError(
                    f"prompt {str(key)[:40]!r} is not here, neither as a hash nor as a text: see .prompt; "
                    "lmprobe_zarr.prompt_hash gives the hash of token ids and chats"
                ) from None

    def get_indexer(self, target: Any, *given: Any, **options: Any) -> Any:
        """The places of hashes or texts, −1 for those that are not here."""
        found = super().get_indexer(target, *given, **options)
        if (found >= 0).all() or given or any(value is not None for value in options.values()):
            return found
        keys = list(target)
        texts = [i for i in np.flatnonzero(found < 0).tolist() if isinstance(keys[i], str)]
        if texts:
            found = np.array(found)
            found[texts] = super().get_indexer(pd.Index([prompt_hash(str(keys[i])) for i in texts], dtype=self.dtype))
        return found

    def append(self, other: Any) -> Any:
        """These labels and others; with other prompt labels, prompt labels again."""
        joined = super().append(other)
        others = other if isinstance(other, list | tuple) else [other]
        return as_prompt_labels(joined, joined.name) if all(isinstance(each, PromptLabels) for each in others) else joined


def as_prompt_labels(hashes: Any, name: Any = None) -> PromptLabels:
    """The index of these hashes."""
    return PromptLabels._simple_new(np.asarray(hashes).astype(object), name=name)  # type: ignore[attr-defined,no-any-return]


def prompt_coordinates(hashes: Any, dim: str = "prompt") -> Coordinates:
    """The index coordinate of prompts with these hashes."""
    index = PandasIndex(as_prompt_labels(hashes, dim), dim, coord_dtype=TEXT)
    return Coordinates(index.create_variables(), indexes={dim: index})
