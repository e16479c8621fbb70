"""Memory is used again when nobody holds it, and never before."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest

from lmprobe_zarr.streaming.memory import ReusedMemory, copy_cast


def address(array: Any) -> int:
    return int(array.__array_interface__["data"][0])


def test_memory_without_references_is_used_again() -> None:
    reused = ReusedMemory()
    first = reused.empty((4, 1000), np.float32)
    assert first.shape == (4, 1000)
    assert first.dtype == np.float32
    at = address(first)
    del first
    second = reused.empty((3, 1000), np.float64)
    assert address(second) != at, "more than there is room for"
    del second
    third = reused.empty((1000,), np.float16)
    assert address(third) == at


@pytest.mark.few(1)
@pytest.mark.parametrize("kept", ["itself", "a row", "a view of a view", "another dtype", "its transpose", "memory", "a base of a base"])
def test_memory_that_is_referenced_is_not_used_again(kept: str) -> None:
    ways: dict[str, Any] = {
        "itself": lambda a: a,
        "a row": lambda a: a[2],
        "a view of a view": lambda a: a[1:][:, ::2],
        "another dtype": lambda a: a.view(np.int32)[0, :3],
        "its transpose": lambda a: a.T,
        "memory": lambda a: memoryview(a)[1:],
        "a base of a base": lambda a: np.asarray(memoryview(a[1:])).reshape(-1)[:7],
    }
    reused = ReusedMemory()
    made = reused.empty((4, 100), np.float32)
    made[:] = 7
    holding = ways[kept](made)
    before = bytes(np.ascontiguousarray(holding))
    at = address(made)
    del made
    gc.collect()
    for _ in range(10):
        other = reused.empty((4, 100), np.float32)
        assert address(other) != at
        other[:] = 0
    assert bytes(np.ascontiguousarray(holding)) == before


def test_arrays_that_are_never_freed_do_not_accumulate_buffers() -> None:
    reused = ReusedMemory()
    held = [reused.empty((100,), np.float32) for _ in range(50)]
    for number, array in enumerate(held):
        array[:] = number
    assert [float(array[0]) for array in held] == list(range(50))
    assert len({address(array) for array in held}) == 50
    assert len(reused._held) == 3


@pytest.mark.model
def test_tensors_hold_their_memory_too() -> None:
    torch = pytest.importorskip("torch")
    reused = ReusedMemory()
    made = torch.from_numpy(reused.empty((4, 100), np.float32)).fill_(7)
    row = made.reshape(2, 200)[1]
    at = made.data_ptr()
    del made
    other = torch.from_numpy(reused.empty((4, 100), np.float32)).fill_(0)
    assert other.data_ptr() != at
    assert (row == 7).all()
    del row
    gc.collect()
    assert address(reused.empty((4, 100), np.float32)) == at


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("given", ["float16", "float32", "float64", "int32"])
def test_values_are_those_of_astype(given: str, dtype: str) -> None:
    rng = np.random.default_rng(0)
    values = (rng.standard_normal((3, 1000)) * 10.0 ** rng.integers(-7, 4, (3, 1000))).astype(given)
    if given != "int32":
        values[0, :5] = [np.nan, np.inf, -np.inf, -0.0, np.finfo(given).smallest_subnormal]
    for some in (values, values[:, ::3], values[::2, 5:50]):
        target = np.empty(some.shape, dtype)
        copy_cast(target, some)
        with np.errstate(over="ignore"):
            expected = some.astype(dtype)
        np.testing.assert_array_equal(target, expected)
        np.testing.assert_array_equal(np.signbit(target), np.signbit(expected))


@pytest.mark.model
def test_every_float16_is_the_same_with_torch_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    values = np.arange(2**16, dtype=np.uint16).view(np.float16)
    with_torch, without = np.empty(2**16, np.float32), np.empty(2**16, np.float32)
    copy_cast(with_torch, values)
    monkeypatch.delitem(__import__("sys").modules, "torch")
    copy_cast(without, values)
    np.testing.assert_array_equal(with_torch, without)
    number = ~np.isnan(without)
    np.testing.assert_array_equal(with_torch[number].view(np.uint32), without[number].view(np.uint32))
