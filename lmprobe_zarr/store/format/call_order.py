"""Which place the prompts of a part had in the list of the call that wrote them, as a part records it.

Lists of labels are in the order of a call's prompts, so a view has to know whether its own order is that of one call.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from lmprobe_zarr.typing import Ints

__all__ = ["CALL_ORDER", "CallPlaces", "call_of", "parse_places"]

#: The field of `PartInfo.recorded`.
CALL_ORDER: Final = "call_order"
_CALL_DIGITS: Final = 16


@dataclass(frozen=True, slots=True, eq=False)
class CallPlaces:
    """The places of a part's prompts in one call.

    Parameters
    ----------
    call : str or None
        Equal for calls with the same prompts in the same order; None for a part that was made from the parts of several calls.
    places : ndarray of int64, shape (prompt,)
        The number of each prompt among the different prompts of the call; empty without a call.
    """

    call: str | None
    places: Ints

    def to_record(self) -> dict[str, Any]:
        """What a part records: the call, and runs of consecutive places as (first, number)."""
        if self.call is None:
            return {"call": None}
        starts = np.flatnonzero(np.diff(self.places, prepend=self.places[:1] - 2) != 1)
        counts = np.diff(np.append(starts, len(self.places)))
        return {"call": self.call, "runs": [[int(self.places[a]), int(n)] for a, n in zip(starts, counts, strict=True)]}


def call_of(sha256: Sequence[str]) -> str:
    """What stands for a call: a hash of the digests of its different prompts, in their order."""
    return hashlib.sha256("".join(sha256).encode()).hexdigest()[:_CALL_DIGITS]


def parse_places(recorded: Mapping[str, Any], n_prompts: int) -> CallPlaces | None:
    """What a part of `n_prompts` records; None where it records nothing, or nothing that fits."""
    found = recorded.get(CALL_ORDER)
    if not isinstance(found, Mapping):
        return None
    call, runs = found.get("call"), found.get("runs")
    if call is None:
        return CallPlaces(None, np.zeros(0, np.int64))
    try:
        pairs = np.asarray(runs, np.int64).reshape(-1, 2)
    except (TypeError, ValueError, OverflowError):
        return None
    if not isinstance(call, str) or (pairs < 0).any() or (pairs > 2**40).any() or int(pairs[:, 1].sum()) != n_prompts:
        return None
    if len(pairs) == 1:
        return CallPlaces(call, np.arange(pairs[0, 0], pairs[0, 0] + n_prompts, dtype=np.int64))
    starts = np.repeat(pairs[:, 0] - np.concatenate([[0], np.cumsum(pairs[:, 1])[:-1]]), pairs[:, 1])
    return CallPlaces(call, (starts + np.arange(n_prompts)).astype(np.int64))
