"""Checksums of pieces, joined: against google-crc32c on the whole, and its published check value."""

from __future__ import annotations

from itertools import pairwise

import google_crc32c
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lmprobe_zarr.store.format.crc import crc32c_of_pieces


@given(st.lists(st.binary(max_size=700), max_size=12))
def test_pieces_have_the_checksum_of_the_whole(pieces: list[bytes]) -> None:
    joined = crc32c_of_pieces((google_crc32c.value(piece), len(piece)) for piece in pieces)
    assert joined == google_crc32c.value(b"".join(pieces))


def test_large_pieces_of_every_length_too() -> None:
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, 5_000_000, np.uint8).tobytes()
    for n in (1, 2, 33, 256):
        cuts = [0, *sorted(rng.integers(0, len(data), n - 1).tolist()), len(data)]
        pieces = [data[a:b] for a, b in pairwise(cuts)]
        assert crc32c_of_pieces((google_crc32c.value(piece), len(piece)) for piece in pieces) == google_crc32c.value(data)


def test_the_check_value_of_the_catalogue() -> None:
    assert crc32c_of_pieces([(google_crc32c.value(b"1234"), 4), (google_crc32c.value(b"56789"), 5)]) == 0xE3069283
    assert crc32c_of_pieces([]) == google_crc32c.value(b"") == 0
    zeros = bytes(3 * 2**24 + 5)
    assert crc32c_of_pieces([(google_crc32c.value(b"x"), 1), (google_crc32c.value(zeros), len(zeros))]) == google_crc32c.value(b"x" + zeros)
