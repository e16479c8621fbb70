"""Names of parts: unique, and in the order in which parts take precedence."""

from __future__ import annotations

import re
import secrets
import time
from typing import Final

__all__ = ["PART_NAME", "new_part_name", "part_milliseconds", "replacement_name"]

PART_NAME: Final = re.compile(r"[0-9a-hjkmnp-tv-z]{26}(?:\.[0-9a-hjkmnp-tv-z]{10})*")
_ULID_DIGITS: Final = "0123456789abcdefghjkmnpqrstvwxyz"


def new_part_name(after: str = "") -> str:
    """A name that no other writer can choose and that sorts after all older ones.

    Parameters
    ----------
    after : str
        The last name known; the new one sorts after it even where this machine's clock is behind.

    Returns
    -------
    str
        26 digits as in a ULID: 10 of milliseconds since 1970, 16 (80 bits) at random.
    """
    milliseconds = max(time.time_ns() // 1_000_000, part_milliseconds(after) + 1)
    return _base32(milliseconds, 10) + _base32(secrets.randbits(80), 16)


def replacement_name(last: str) -> str:
    """A name for the part that replaces others, of which `last` sorts last.

    It sorts right after `last`, so that the new part never wins over a part that was written meanwhile.
    """
    return f"{last}.{_base32(secrets.randbits(50), 10)}"


def part_milliseconds(name: str) -> int:
    """When a part was begun by its writer's clock, in milliseconds since 1970, as its name says; 0 where the name holds no time."""
    head = name[:10]
    if len(head) < 10 or any(c not in _ULID_DIGITS for c in head):
        return 0
    # Ten digits hold 50 bits but a ULID's time has 48: a larger number is no time, and is ignored.
    value = sum(_ULID_DIGITS.index(c) << (5 * (9 - i)) for i, c in enumerate(head))
    return value if value < 2**48 - 1 else 0


def _base32(number: int, digits: int) -> str:
    return "".join(_ULID_DIGITS[(number >> (5 * i)) & 31] for i in reversed(range(digits)))
