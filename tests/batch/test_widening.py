"""float16 as float32, against numpy's own cast: every number there is, in every layout."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from warmed import Warmed

from lmprobe_zarr.batch import copy_rows, widen, widening

EVERY = np.arange(2**16, dtype=np.uint16).view(np.float16)


@pytest.fixture(params=["numpy", "torch"])
def converter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        pytest.importorskip("torch")
    else:
        monkeypatch.setitem(sys.modules, "torch", None)


@pytest.mark.usefixtures("converter")
@pytest.mark.parametrize("repeats", [1, 5])
def test_every_float16_is_the_float32_of_the_same_value(repeats: int) -> None:
    values = np.tile(EVERY, repeats)
    finite = np.tile(EVERY[np.isfinite(EVERY)], repeats)  # without NaN and infinity, which are converted otherwise
    for given in (values, finite):
        wide = np.full(given.shape, -1, np.float32)
        widen(given, wide)
        expected = given.astype(np.float32)
        np.testing.assert_array_equal(wide, expected)
        np.testing.assert_array_equal(np.signbit(wide[given == 0]), np.signbit(given[given == 0]))


@pytest.mark.usefixtures("converter")
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_a_single_number_that_is_not_finite_stays_so(bad: float) -> None:
    values = np.linspace(-60000, 60000, 2**17 + 5000).astype(np.float16)
    values[2**17 + 7] = bad
    wide = np.empty(values.shape, np.float32)
    widen(values, wide)
    np.testing.assert_array_equal(wide, values.astype(np.float32))


@pytest.mark.usefixtures("converter")
def test_rows_are_copied_to_slices_lists_and_columns() -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((300, 70)).astype(np.float16)
    for rows in (slice(5, 305), rng.permutation(400)[:300]):
        for columns in ((), (slice(3, 9),), (np.array([4, 2, 2]),)):
            chosen = values[(slice(None), *columns)]
            out, expected = np.zeros((400, chosen.shape[1]), np.float32), np.zeros((400, chosen.shape[1]), np.float32)
            copy_rows(values, out, rows, columns)
            expected[rows] = chosen
            np.testing.assert_array_equal(out, expected)
    empty = np.zeros((0, 7), np.float16)
    copy_rows(empty, np.zeros((3, 7), np.float32), slice(1, 1), ())
    copy_rows(empty, np.zeros((3, 7), np.float32), np.zeros(0, np.int64), ())


def test_small_numbers_stay_where_the_processor_takes_them_for_zero(warmed: Warmed) -> None:
    pytest.importorskip("torch")
    script = """
import sys, threading, numpy as np, torch
if not torch.set_flush_denormal(True): raise SystemExit(5)
from lmprobe_zarr.batch import widen
values = np.tile(np.arange(2**16, dtype=np.uint16).view(np.float16), 2)
flags = []
for hidden in (False, True):
    if hidden: torch_module = sys.modules.pop("torch")
    wide = np.empty(values.shape, np.float32)
    widen(values, wide)
    bits = wide.view(np.uint32)
    flags.append(bool((bits[1:1024] >> 23 != 0).all()))
    sys.modules.setdefault("torch", torch)
torch.set_flush_denormal(False)
expected = values.astype(np.float32)
assert flags == [True, True], flags
assert np.array_equal(wide, expected, equal_nan=True)
"""
    done = warmed.run(script)
    if done.returncode == 5:
        pytest.skip("this processor cannot take small numbers for zero")
    assert done.returncode == 0, done.stderr


def test_blocks_are_larger_than_what_is_cast_at_once() -> None:
    assert widening._FEW < widening._TORCH_BLOCK < widening._BLOCK  # so that the tests above pass through each of them
