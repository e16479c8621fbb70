"""The crc32c of pieces that follow one another, from the crc32c of each: reading the bytes a second time would cost more.

Behind a piece, the checksum of what is before it is what it would be with as many zeros behind, and that is a linear function of its bits.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Iterable
from typing import Final, TypeAlias

__all__ = ["crc32c_of_pieces"]

_POLYNOMIAL: Final = 0x82F63B78  # Castagnoli's, reflected
Columns = tuple[int, ...]
Table: TypeAlias = "array[int]"


def crc32c_of_pieces(pieces: Iterable[tuple[int, int]]) -> int:
    """The checksum of pieces end to end.

    Parameters
    ----------
    pieces : iterable of (int, int)
        Checksum and length in bytes of each, below 2**32.
    """
    found = 0
    for checksum, length in pieces:
        position = 0
        while length:
            digit = length & 255
            if digit and found:
                low, second, third, high = _tables(position, digit)
                found = low[found & 255] ^ second[found >> 8 & 255] ^ third[found >> 16 & 255] ^ high[found >> 24]
            length, position = length >> 8, position + 1
        found ^= checksum
    return found


@functools.lru_cache(maxsize=1024)
def _tables(position: int, digit: int) -> tuple[Table, Table, Table, Table]:
    """What ``digit * 256**position`` zeros make of a checksum: for each value of each of its four bytes."""
    columns: Columns = tuple(1 << i for i in range(32))
    for bit in range(8):
        if digit >> bit & 1:
            columns = _after(_zeros(8 * position + bit), columns)
    found = []
    for byte in range(4):
        table = array("I", [0])  # not a list: the processor's caches hold a thousand of these
        for column in columns[8 * byte : 8 * byte + 8]:
            table.extend([value ^ column for value in table])
        found.append(table)
    return found[0], found[1], found[2], found[3]


@functools.cache
def _zeros(power: int) -> Columns:
    """What ``2**power`` zero bytes make of each bit of a checksum."""
    if power:
        half = _zeros(power - 1)
        return _after(half, half)
    columns: Columns = (_POLYNOMIAL, *(1 << i for i in range(31)))  # one zero bit
    for _ in range(3):
        columns = _after(columns, columns)
    return columns


def _after(function: Columns, columns: Columns) -> Columns:
    """Both functions, `function` last."""

    def image(value: int) -> int:
        found = 0
        for column in function:
            if value & 1:
                found ^= column
            value >>= 1
        return found

    return tuple(map(image, columns))
