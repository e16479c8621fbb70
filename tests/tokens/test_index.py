"""The index over prompt and position by itself; a pandas MultiIndex, or a loop over tokens, says what is right."""

from __future__ import annotations

import copy
import pickle
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from lmprobe_zarr.batch import prompt_hash
from lmprobe_zarr.errors import InvalidArgumentError, MissingPromptsError
from lmprobe_zarr.tokens.index import TokenIndex

Array = npt.NDArray[Any]
LABELS = ["cc", "aa", "dd", "bb"]


def dataset(rows: list[tuple[str, int]]) -> xr.Dataset:
    """Tokens at some (prompt, position), with a running number as their value."""
    return xr.Dataset(
        {"number": ("token", np.arange(len(rows)))},
        {
            "prompt": ("token", np.array([p for p, _ in rows], "U16" if any(len(p) > 2 for p, _ in rows) else "U2")),
            "position": ("token", np.array([i for _, i in rows], np.int64)),
        },
    )


def indexed(rows: list[tuple[str, int]]) -> xr.Dataset:
    return dataset(rows).set_xindex(["prompt", "position"], TokenIndex)


def whole(*lengths: int) -> list[tuple[str, int]]:
    return [(label, i) for label, n in zip(LABELS, lengths, strict=False) for i in range(n)]


def numbers(data: xr.Dataset) -> list[int]:
    found: list[int] = np.atleast_1d(data.number.values).tolist()
    return found


unique_rows = st.lists(st.tuples(st.sampled_from(LABELS), st.integers(0, 3)), max_size=12, unique=True)
any_rows = st.lists(st.tuples(st.sampled_from(LABELS), st.integers(0, 3)), max_size=12)


# ------------------------------------------------------------------------------------------------------------ selecting


@given(any_rows, st.lists(st.sampled_from(LABELS), max_size=4))
@settings(deadline=None)
def test_a_list_of_prompts_gives_their_tokens_in_the_order_of_the_list(rows: list[tuple[str, int]], prompts: list[str]) -> None:
    data = indexed(rows)
    expected = [i for wanted in prompts for i, (p, _) in enumerate(rows) if p == wanted]
    if any(wanted not in [p for p, _ in rows] for wanted in prompts):
        with pytest.raises(MissingPromptsError):
            data.sel(prompt=prompts)
        return
    got = data.sel(prompt=prompts)
    assert numbers(got) == expected
    assert [(str(p), int(i)) for p, i in zip(got.prompt.values, got.position.values, strict=True)] == [rows[i] for i in expected]
    assert isinstance(got.xindexes["prompt"], TokenIndex)


@given(any_rows)
@settings(deadline=None)
def test_a_single_prompt_gives_its_tokens_whether_rows_are_in_the_order_of_prompts_or_not(rows: list[tuple[str, int]]) -> None:
    for ordered in (rows, sorted(rows)):
        data = indexed(ordered)
        for wanted in (*LABELS, np.str_("cc")):
            expected = [i for i, (p, _) in enumerate(ordered) if p == wanted]
            if not expected:
                with pytest.raises(MissingPromptsError, match="1 of 1 prompts"):
                    data.sel(prompt=wanted)
                continue
            got = data.sel(prompt=wanted)
            assert numbers(got) == expected
            assert got.sizes["token"] == len(expected), "the dimension stays"
            assert isinstance(got.xindexes["prompt"], TokenIndex)


def test_a_single_prompt_is_found_by_its_text() -> None:
    data = indexed([(p, i) for p in map(prompt_hash, ("some text", "another")) for i in range(3)])
    assert numbers(data.sel(prompt="another")) == numbers(data.sel(prompt=prompt_hash("another"))) == [3, 4, 5]
    with pytest.raises(MissingPromptsError, match="a third"):
        data.sel(prompt="a third")


@given(any_rows, st.lists(st.integers(0, 4), max_size=4))
@settings(deadline=None)
def test_a_list_of_positions_gives_each_prompts_tokens_in_the_order_of_the_list(rows: list[tuple[str, int]], places: list[int]) -> None:
    data = indexed(rows)
    if any(wanted not in [i for _, i in rows] for wanted in places):
        with pytest.raises(MissingPromptsError):
            data.sel(position=places)
        return
    appearing = list(dict.fromkeys(p for p, _ in rows))
    expected = [n for label in appearing for wanted in places for n, row in enumerate(rows) if row == (label, wanted)]
    assert numbers(data.sel(position=places)) == expected


@given(any_rows, st.integers(0, 4), st.one_of(st.none(), st.integers(0, 4)))
@settings(deadline=None)
def test_one_position_or_a_slice_of_them_keeps_the_order_of_rows(rows: list[tuple[str, int]], low: int, high: int | None) -> None:
    data = indexed(rows)
    assert numbers(data.sel(position=slice(low, high))) == [
        n for n, (_, i) in enumerate(rows) if low <= i <= (99 if high is None else high)
    ]
    expected = [n for n, (_, i) in enumerate(rows) if i == low]
    if expected:
        assert numbers(data.sel(position=low)) == expected
    else:
        with pytest.raises(MissingPromptsError):
            data.sel(position=low)


def test_prompts_and_positions_together_are_both_lists_in_their_order() -> None:
    data = indexed(whole(3, 2, 4))  # cc 0-2, aa 3-4, dd 5-8
    assert numbers(data.sel(prompt=["dd", "cc"], position=[2, 0])) == [7, 5, 2, 0]
    assert numbers(data.sel(prompt="cc", position=[2, 0, 2])) == [2, 0, 2]
    assert numbers(data.sel(prompt=["aa", "dd"], position=3)) == [8], "aa has no token there"
    assert numbers(data.sel(prompt=["dd", "dd"], position=[1, 0])) == [6, 5, 6, 5]
    assert numbers(data.sel(prompt="cc", position=slice(1, None))) == [1, 2]
    one = data.sel(prompt="cc", position=1)
    assert one.number.ndim == 0
    assert (str(one.prompt.values), int(one.position)) == ("cc", 1)


def test_two_arrays_select_pair_by_pair() -> None:
    data = indexed(whole(3, 2, 4))
    pairs = {"prompt": xr.DataArray(["dd", "cc"], dims="z", coords={"z": [7, 8]}), "position": xr.DataArray([3, 1], dims="z")}
    got = data.sel(pairs)
    assert got.number.dims == ("z",)
    assert numbers(got) == [8, 1]
    assert got.z.values.tolist() == [7, 8]
    assert "prompt" not in got.xindexes
    grid = data.sel(prompt=xr.DataArray(["cc", "dd"], dims="p"), position=xr.DataArray([0, 2, 1], dims="q"))
    assert grid.number.transpose("p", "q").values.tolist() == [[0, 2, 1], [5, 7, 6]]
    again = data.sel(prompt=data.prompt[[4, 0]], position=data.position[[4, 0]])
    assert again.number.dims == ("token",)
    assert numbers(again) == [4, 0]
    with pytest.raises(MissingPromptsError, match="1 of 2 pairs"):
        data.sel(prompt=xr.DataArray(["aa", "cc"], dims="z"), position=xr.DataArray([2, 2], dims="z"))
    with pytest.raises(InvalidArgumentError, match="several times"):
        data.isel(token=[0, 0]).sel(prompt=xr.DataArray(["cc"], dims="z"), position=xr.DataArray([0], dims="z"))


@pytest.mark.parametrize(
    ("selection", "error"),
    [
        ({"position": np.array([True, False, True])}, InvalidArgumentError),
        ({"position": True}, InvalidArgumentError),
        ({"position": [0, True]}, InvalidArgumentError),
        ({"prompt": np.array([True, False, True])}, InvalidArgumentError),
        ({"position": "0"}, InvalidArgumentError),
        ({"position": ["0", "1"]}, InvalidArgumentError),
        ({"position": None}, InvalidArgumentError),
        ({"position": 0.5}, MissingPromptsError),
        ({"position": -1}, InvalidArgumentError),
        ({"position": [0, 9]}, MissingPromptsError),
        ({"position": slice("a", "b")}, InvalidArgumentError),
        ({"position": slice(0, 2, 2)}, InvalidArgumentError),
        ({"prompt": slice("aa", "cc")}, InvalidArgumentError),
        ({"prompt": [["aa", "cc"]]}, InvalidArgumentError),
        ({"prompt": {"aa"}}, InvalidArgumentError),
        ({"prompt": "zz"}, MissingPromptsError),
        ({"prompt": None}, MissingPromptsError),
        ({"prompt": ["aa", "zz"]}, MissingPromptsError),
        ({"prompt": "aa", "position": 2}, MissingPromptsError),
        ({"prompt": "aa", "method": "nearest"}, InvalidArgumentError),
    ],
)
def test_what_selects_no_tokens_is_an_error(selection: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        indexed(whole(1, 2)).sel(**selection)


# ------------------------------------------------------------------------------------------------------ following xarray


def test_renamed_coordinates_stay_selectable() -> None:
    data = indexed(whole(3, 2))
    renamed = data.rename(prompt="p").isel(token=slice(None, None, -1))
    assert set(renamed.coords) == {"p", "position"}
    assert numbers(renamed.sel(p="aa")) == [4, 3]
    assert numbers(data.rename(prompt="p", position="q").sel(p=["aa"], q=[1])) == [4]
    swapped = data.rename(prompt="position", position="prompt")
    assert numbers(swapped.sel(position="aa", prompt=[1, 0])) == [4, 3]
    both = xr.concat([renamed, renamed], "token")
    assert numbers(both.sel(p="aa")) == [4, 3, 4, 3]
    assert numbers(data.rename_dims({"token": "row"}).isel(row=[4, 0]).sel(prompt="cc")) == [0]


def test_swap_dims_onto_a_coordinate_never_leaves_a_stale_index() -> None:
    swapped = indexed(whole(3, 2)).swap_dims({"token": "prompt"})
    assert "prompt" not in swapped.isel(prompt=[4, 0]).xindexes
    assert numbers(swapped.isel(prompt=[4, 0])) == [4, 0]
    uses: list[Callable[[], Any]] = [lambda: swapped.sortby("position"), lambda: swapped.sel(prompt="aa")]
    for use in uses:
        with pytest.raises(ValueError, match=r"drop_indexes|do not exist"):
            use()
    plain = indexed(whole(3, 1)).drop_indexes(["prompt", "position"]).isel(token=[3, 0]).swap_dims({"token": "prompt"})
    assert numbers(plain.sel(prompt="aa")) == [3]


@given(unique_rows)
@settings(deadline=None)
def test_unstack_is_that_of_a_multi_index(rows: list[tuple[str, int]]) -> None:
    expected = dataset(rows).set_index(token=["prompt", "position"]).unstack("token")
    xr.testing.assert_equal(indexed(rows).unstack("token"), expected)
    xr.testing.assert_equal(indexed(rows).unstack(), expected)


def test_unstack_of_a_prompt_given_twice_is_an_error() -> None:
    with pytest.raises(InvalidArgumentError, match="several times"):
        indexed(whole(2)).isel(token=[0, 0]).unstack("token")


@pytest.mark.few(1)
@pytest.mark.parametrize("how", ["inner", "outer", "left", "right"])
@given(one=unique_rows, other=unique_rows)
@settings(max_examples=40, deadline=None)
def test_alignment_is_that_of_a_multi_index(how: Any, one: list[tuple[str, int]], other: list[tuple[str, int]]) -> None:
    ours = xr.align(indexed(one), indexed(other), join=how)
    theirs = xr.align(*(dataset(rows).set_index(token=["prompt", "position"]) for rows in (one, other)), join=how)
    for mine, expected in zip(ours, theirs, strict=True):
        for name in ("prompt", "position", "number"):
            np.testing.assert_array_equal(mine[name].values, expected[name].values)


@given(any_rows, any_rows)
@settings(max_examples=40, deadline=None)
def test_equal_means_the_same_tokens_in_the_same_order(one: list[tuple[str, int]], other: list[tuple[str, int]]) -> None:
    a, b = indexed(one).xindexes["prompt"], indexed(other).xindexes["prompt"]
    assert a.equals(b) == (one == other)
    # Another order of labels is the same index.
    assert a.equals(indexed([("zz", 0), *one]).isel(token=slice(1, None)).xindexes["prompt"])


@given(st.lists(any_rows, min_size=1, max_size=3))
@settings(max_examples=40, deadline=None)
def test_concat_lays_tokens_end_to_end(several: list[list[tuple[str, int]]]) -> None:
    joined = xr.concat([indexed(rows) for rows in several], "token")
    together = [row for rows in several for row in rows]
    assert list(zip(joined.prompt.values.tolist(), joined.position.values.tolist(), strict=True)) == together
    for label in {p for p, _ in together}:
        assert joined.sel(prompt=label).position.values.tolist() == [i for p, i in together if p == label]


def test_labels_keep_their_kind() -> None:
    data = dataset(whole(2, 1)).assign_coords(prompt=("token", [30, 30, 7])).set_xindex(["prompt", "position"], TokenIndex)
    assert data.prompt.dtype == np.int64
    joined = xr.concat([data, data], "token")
    assert joined.sel(prompt=7).number.values.tolist() == [2, 2]
    assert (data + data.isel(token=[2])).sel(prompt=7).number.values.tolist() == [4]


def test_what_has_no_prompt_or_position_gets_no_index() -> None:
    padded = indexed(whole(2, 1)).pad(token=1)
    assert "prompt" not in padded.xindexes
    with pytest.raises(InvalidArgumentError, match="pad"):
        padded.set_xindex(["prompt", "position"], TokenIndex)
    nameless = dataset(whole(2)).assign_coords(prompt=("token", np.array(["aa", None], object)))
    with pytest.raises(InvalidArgumentError, match="no prompt"):
        nameless.set_xindex(["prompt", "position"], TokenIndex)


def test_the_coordinates_cannot_be_written_into() -> None:
    data = indexed(whole(3))
    some = data.isel(token=slice(0, 2))
    with pytest.raises(ValueError, match="read-only"):
        some.position.values[0] = 9
    with pytest.raises((TypeError, ValueError)):
        some["prompt"][0] = "zz"
    assert data.position.values.tolist() == [0, 1, 2]


def test_one_coordinate_cannot_be_replaced_or_dropped_alone() -> None:
    data = indexed(whole(3))
    changes: list[Callable[[], Any]] = [
        lambda: data.assign_coords(position=("token", [5, 6, 7])),
        lambda: data.drop_vars("prompt"),
        lambda: data.drop_indexes("prompt"),
    ]
    for change in changes:
        with pytest.raises(ValueError, match="corrupt"):
            change()


def test_copies_and_pickles_select_alike() -> None:
    data = indexed(whole(3, 2))
    data.sel(prompt="aa")  # fills what is looked up lazily
    for again in (copy.copy(data), copy.deepcopy(data), pickle.loads(pickle.dumps(data))):  # noqa: S301 — our own bytes
        assert numbers(again.sel(prompt="aa")) == [3, 4]


# --------------------------------------------------------------------------------------------------------- size and speed


def test_ten_million_tokens_take_four_bytes_each_and_no_time() -> None:
    n_prompts, length = 100_000, 100
    labels = np.array([f"{i:016x}" for i in range(n_prompts)])
    codes = np.repeat(np.arange(n_prompts, dtype=np.int32), length)
    places = np.tile(np.arange(length), n_prompts)
    tracemalloc.start()
    try:
        start = time.perf_counter()
        index = TokenIndex(labels, codes, places)
        coords = xr.Coordinates(index.create_variables(), indexes={"prompt": index, "position": index})
        data = xr.Dataset({"number": ("token", places)}, coords)
        built = time.perf_counter() - start
        assert tracemalloc.get_traced_memory()[1] < 2**20, "the arrays are held, not copied, and no label is spelled out"
        tracemalloc.reset_peak()
        one = data.isel(token=slice(5_000_000, 5_000_200)).sel(prompt=labels[50_001])
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()
    assert one.position.values.tolist() == list(range(length))
    assert built < 0.5
    assert data.prompt[7].item() == labels[0]


def test_the_pandas_index_has_the_same_tokens() -> None:
    rows = [("cc", 3), ("aa", 1), ("cc", 0)]
    index = indexed(rows).xindexes["prompt"]
    assert list(index.to_pandas_index()) == rows
    assert isinstance(index.to_pandas_index(), pd.MultiIndex)
    assert repr(index) == "TokenIndex(3 tokens of 2 prompts, dim='token')"


def test_positions_from_the_end_are_refused_with_what_counts_from_there() -> None:
    data = indexed(whole(3, 1, 4))
    for position in (slice(-3, None), slice(None, -1), slice(-3, -1), slice(0, -1), -1, [-3, -2, -1], [0, -1]):
        with pytest.raises(InvalidArgumentError, match=r"negative.*mask_tokens.*lz\.at\(-1\)"):
            data.sel(position=position)
        with pytest.raises(InvalidArgumentError, match="negative"):
            data.sel(prompt="cc", position=position)
    assert numbers(data.sel(position=slice(0, 1))) == [0, 1, 3, 4, 5]


def test_positions_that_are_negative_are_labels_as_any_other() -> None:
    # As where somebody counts from the beginning of the answer.
    data = indexed([("cc", i) for i in range(-3, 2)])
    assert numbers(data.sel(position=slice(-2, 0))) == [1, 2, 3]
    assert numbers(data.sel(position=-1)) == [2]
    with pytest.raises(MissingPromptsError, match="position -4"):
        data.sel(position=-4)
