"""The order of streamed rows: every row once, in the same order every time, mixed about as well as a full shuffle would."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmprobe_zarr.batch.ragged import offsets_of
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.streaming.order import Blocks, Order, ReadingPlan, count_steps, join_blocks, plan_reading

Ints = npt.NDArray[np.int64]


def blocks_of(sizes: list[int], **known: Any) -> Blocks:
    return Blocks(offsets_of(sizes), **known)


def batches_of(plan: ReadingPlan) -> list[list[int]]:
    """What the plan says, spelled out: all rows window by window, cut where batches begin."""
    rows = [int(row) for number in range(len(plan.cuts) - 1) for row in plan.window(number)]
    return [rows[a:b] for a, b in itertools.pairwise(plan.bounds.tolist())]


def epoch_of(blocks: Blocks, order: Order, epoch: int = 0, readers: int = 1) -> list[list[int]]:
    """The batches of one trainer, its readers in turn."""
    in_turns = [batches_of(plan_reading(blocks, order, epoch, reader, readers)) for reader in range(readers)]
    return [batch for turn in itertools.zip_longest(*in_turns) for batch in turn if batch is not None]


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    batch=st.integers(1, 12),
    buffer=st.integers(1, 40),
    world=st.integers(1, 4),
    readers=st.integers(1, 3),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
    seed=st.integers(0, 2**40),
    left_out=st.sets(st.integers(0, 107)),
    scattered=st.booleans(),
)
def test_every_wanted_row_comes_once_per_epoch_to_one_trainer(
    sizes: list[int],
    batch: int,
    buffer: int,
    world: int,
    readers: int,
    shuffle: bool,
    drop_last: bool,
    seed: int,
    left_out: set[int],
    scattered: bool,
) -> None:
    n = sum(sizes)
    numbers = np.random.default_rng(seed).permutation(n) if scattered else None
    kept = np.array([row not in left_out for row in range(n)])
    blocks = blocks_of(sizes, rows=numbers, kept=kept)
    wanted = [row for row in range(n) if row not in left_out]
    orders = [Order(batch, buffer, shuffle, seed, drop_last, rank, world) for rank in range(world)]
    # By hand: how many batches can each have, so that none is empty or, if they must be, all are full?
    if drop_last:
        steps = len(wanted) // world // batch
    else:
        steps = -(-len(wanted) // (world * batch))
        if len(wanted) // world < steps:
            steps = 0
    if not steps:
        with pytest.raises(InvalidArgumentError, match="rows are left"):
            plan_reading(blocks, orders[0], 0)
        return
    given_rows: list[int] = []
    for order in orders:
        assert count_steps(len(wanted), order) == steps
        batches = epoch_of(blocks, order, 3, readers)
        assert len(batches) == steps, "all trainers have equally many batches"
        assert all(len(rows) == batch if drop_last else 1 <= len(rows) <= batch for rows in batches)
        given_rows += [row for rows in batches for row in rows]
    assert len(set(given_rows)) == len(given_rows), "no row twice"
    assert set(given_rows) <= set(wanted)
    assert len(given_rows) == (steps * batch * world if drop_last else len(wanted))
    if not shuffle and readers == 1 and not drop_last and not scattered:
        assert given_rows == wanted, "in their order"


def test_a_window_holds_whole_blocks_and_no_more_than_the_buffer_and_one_block() -> None:
    blocks = blocks_of([10] * 95)
    plan = plan_reading(blocks, Order(7, 100, seed=1), 0)
    windows = [plan.window(number) for number in range(len(plan.cuts) - 1)]
    assert len(windows) == 10, "950 rows by 100, about equally many in each"
    assert {len(rows) for rows in windows} == {90, 100}
    for rows in windows:
        held = np.unique(rows // 10)
        assert len(rows) == 10 * len(held), "each block is read in one window, whole"
        assert (np.diff(rows) != 1).mean() > 0.8, "its rows are mixed"
    assert sorted(np.concatenate(windows).tolist()) == list(range(950))


def test_epochs_and_seeds_are_orders_of_their_own_and_each_is_the_same_every_time() -> None:
    blocks = blocks_of([8] * 40)
    orders = [(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    found = [str(epoch_of(blocks, Order(16, 64, seed=seed), epoch)) for seed, epoch in orders]
    assert len(set(found)) == 4
    assert found == [str(epoch_of(blocks, Order(16, 64, seed=seed), epoch)) for seed, epoch in orders]


def test_rows_that_fit_into_the_buffer_are_shuffled_completely() -> None:
    """Each row is equally likely at each place: chi-squared over 2,000 orders of 12 rows in blocks of 4."""
    blocks = blocks_of([4, 4, 4])
    counts = np.zeros((12, 12))
    for seed in range(2000):
        rows = plan_reading(blocks, Order(4, 12, seed=seed), 0).window(0)
        counts[np.arange(12), rows] += 1
    expected = 2000 / 12
    chi = ((counts - expected) ** 2 / expected).sum()
    assert chi < 121 + 5 * np.sqrt(2 * 121), chi  # 11 × 11 degrees of freedom


def distinct_prompts(prompts: Ints, batches: list[list[int]]) -> float:
    return float(np.mean([len(np.unique(prompts[batch])) for batch in batches]))


@pytest.mark.parametrize(("buffer", "least"), [(2**17, 0.99), (2**16, 0.85), (2**14, 0.65)])
def test_a_batch_holds_nearly_as_many_prompts_as_one_of_a_full_shuffle(buffer: int, least: float) -> None:
    """131,072 tokens of prompts of 64, in chunks of 1,024 as float16 rows of 2,048 are stored; batches of 256."""
    n = 2**17
    prompts = np.arange(n) // 64
    blocks = blocks_of([1024] * 128)
    ours = distinct_prompts(prompts, epoch_of(blocks, Order(256, buffer), 0))
    full = np.random.default_rng(0).permutation(n).reshape(-1, 256).tolist()
    in_order = np.arange(n).reshape(-1, 256).tolist()
    assert distinct_prompts(prompts, in_order) == 4
    share = ours / distinct_prompts(prompts, full)
    assert least < share < 1.01, share
    # From first principles: 256 draws from the prompts of one buffer hit 1 − (1 − 1/k)^256 of the k.
    k = buffer // 64
    assert ours == pytest.approx(k * (1 - (1 - 1 / k) ** 256), rel=0.05)


def test_blocks_are_joined_in_the_order_of_their_first_rows() -> None:
    plain = join_blocks([slice(3, 5), slice(0, 3), slice(5, 5)])
    assert (plain.offsets.tolist(), plain.rows) == ([0, 3, 5], None)
    mixed = join_blocks([np.array([4, 1]), slice(2, 4), np.zeros(0, np.int64)])
    assert mixed.rows is not None
    assert (mixed.offsets.tolist(), mixed.rows.tolist()) == ([0, 2, 4], [2, 3, 4, 1])
    assert mixed.take(np.array([1, 0])).tolist() == [4, 1, 2, 3]
    gap = join_blocks([slice(1, 3)])
    assert gap.rows is not None
    assert gap.rows.tolist() == [1, 2]
    assert join_blocks([]).total == 0


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"batch_tokens": 0}, InvalidArgumentError, "batch_tokens=0 is out of range"),
        ({"batch_tokens": 2.0}, InvalidTypeError, "batch_tokens=2.0 is no whole number"),
        ({"buffer_tokens": -1}, InvalidArgumentError, "buffer_tokens=-1"),
        ({"seed": True}, InvalidTypeError, "seed=True"),
        ({"seed": -1}, InvalidArgumentError, "seed=-1"),
        ({"rank": 2, "world_size": 2}, InvalidArgumentError, "ranks go from 0 to 1"),
        ({"world_size": 0}, InvalidArgumentError, "world_size=0"),
    ],
)
def test_numbers_that_define_no_order_are_refused(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Order(**{"batch_tokens": 4, "buffer_tokens": 8, **options})
