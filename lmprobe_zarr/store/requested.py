"""In which orders this process has requested the prompts of a group, for datasets that have to know whether a list can be in their order.

A call whose prompts are all stored writes nothing, so the store itself cannot tell that they were given in another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmprobe_zarr.batch import sha256_of
from lmprobe_zarr.store.format import call_of

__all__ = ["note_request", "requested_otherwise"]

# By the address of a root, the group and the set of prompts: every order in which a call gave them.
_REQUESTED: dict[tuple[str, str, str], set[str]] = {}


def note_request(url: str, group: str, sha256: Sequence[str]) -> None:
    """Note the different prompts of a call, in their order."""
    _REQUESTED.setdefault((url, group, call_of(sorted(sha256))), set()).add(call_of(sha256))


def requested_otherwise(url: str, group: str, digests: Any) -> bool:
    """Whether a call gave exactly these prompts in another order."""
    if not any(known[:2] == (url, group) for known in _REQUESTED):
        return False
    sha256 = sha256_of(digests)
    calls = _REQUESTED.get((url, group, call_of(sorted(sha256))), set())
    return not calls <= {call_of(sha256)}
