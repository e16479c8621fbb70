"""`CallOrder`, the order of the prompts of one call: recorded in the parts that it writes, and compared by the views that show them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from lmprobe_zarr.batch import digests_of, keys_of
from lmprobe_zarr.store.format import CallPlaces, PartInfo, call_of, parse_places
from lmprobe_zarr.typing import Ints

__all__ = ["CallOrder", "merged_order", "places_in_one_call"]


@dataclass(frozen=True, slots=True, eq=False)
class CallOrder:
    """Where prompts are in the list of one call.

    Parameters
    ----------
    call : str or None
        See `CallPlaces`.
    keys : ndarray of uint64, shape (prompt,)
        Of the prompts, by which they are looked up.
    places : ndarray of int64, shape (prompt,)
        The place of each.
    """

    call: str | None
    keys: Any
    places: Ints

    @staticmethod
    def of(sha256: Sequence[str]) -> CallOrder:
        """The order of a whole call, from the digests of its different prompts."""
        return CallOrder(call_of(sha256), keys_of(digests_of(sha256)), np.arange(len(sha256), dtype=np.int64))

    def take(self, rows: Ints) -> CallOrder:
        """The same call with only some of its prompts, for a process that writes only these."""
        return CallOrder(self.call, self.keys[rows], self.places[rows])

    def record(self, digests: Any) -> dict[str, Any]:
        """What a part with these prompts records; prompts of another call make it a part of several calls."""
        rows = np.asarray(pd.Index(self.keys).get_indexer(pd.Index(keys_of(digests))), np.int64)
        if self.call is None or (rows < 0).any():
            return CallPlaces(None, np.zeros(0, np.int64)).to_record()
        return CallPlaces(self.call, self.places[rows]).to_record()


def merged_order(infos: Sequence[PartInfo]) -> CallOrder | None:
    """The order to record in a part that is made from others; None where there is nothing to record."""
    found = [parse_places(info.recorded, len(info.digests)) for info in infos]
    if len(infos) == 1 and found[0] is None:
        return None
    calls = {None if each is None else each.call for each in found}
    call = calls.pop() if len(calls) == 1 else None
    if call is None:
        return CallOrder(None, np.zeros(0, np.uint64), np.zeros(0, np.int64))
    keys = np.concatenate([keys_of(info.digests) for info in infos])
    places = np.concatenate([each.places for each in found if each is not None])
    keys, first = np.unique(keys, return_index=True)
    return CallOrder(call, keys, places[first])


def places_in_one_call(infos: Sequence[PartInfo]) -> list[Ints] | None:
    """The places of the prompts of each part, if all are of one call; None where they are of several, or that is not known."""
    found = [parse_places(info.recorded, len(info.digests)) for info in infos]
    if len(infos) <= 1 and found in ([], [None]):
        return [np.arange(len(info.digests), dtype=np.int64) for info in infos]
    places = [each.places for each in found if each is not None and each.call is not None]
    same = len({each.call for each in found if each is not None}) == 1
    return places if same and len(places) == len(infos) else None
