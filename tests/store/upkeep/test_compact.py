"""Compaction: fewer parts, the same view to the last bit, whoever reads, writes or dies meanwhile."""

from __future__ import annotations

import random
import shutil
import tempfile
import tracemalloc
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from shown_values import assert_same, shown
from stores import GROUP, Wrapped, make_batch

import lmprobe_zarr as lz
from lmprobe_zarr.batch.hashes import prompt_sha256
from lmprobe_zarr.batch.token_batch import TokenBatch
from lmprobe_zarr.storage.base import Storage
from lmprobe_zarr.store.format.part_names import new_part_name, replacement_name
from lmprobe_zarr.store.store import Store


def n_parts(store: Store) -> tuple[int, int]:
    view = lz.open_store(store.url).view(GROUP)
    return len(view.parts), len(view.annotations)


PROMPTS = [f"p{i}" for i in range(4)]
SHAPES: list[dict[str, Any]] = [
    {},
    {"columns": True},
    {"layers": (0, 1)},
    {"tokens": False},
    {"dtype": "float16", "columns": True},
]
Item = dict[str, Any]


def drawn(rng: random.Random) -> Item:
    """A part of one of two shapes, or an annotation. Few prompts, so that they meet."""
    if rng.random() < 0.3:
        return {"texts": rng.sample(PROMPTS, rng.randint(1, 2)), "names": rng.choice([("label",), ("split",), ("label", "split")])}
    counts = [rng.choice([1, 1, 1, 2]) for _ in PROMPTS]
    return {"texts": rng.sample(PROMPTS, rng.randint(1, 3)), "shape": rng.choice([0, 0, 0, 0, 1]), "counts": counts}


def write_item(store: Store, item: Item, seed: int, shapes: list[int]) -> None:
    texts = item["texts"]
    if "names" in item:
        values: dict[str, Any] = {"label": [100 * seed + i for i in range(len(texts))], "split": [f"{seed}.{i}" for i in range(len(texts))]}
        batch = TokenBatch(sha256=[prompt_sha256(t) for t in texts], prompt_columns={name: values[name] for name in item["names"]})
        store.write(GROUP, batch, kind="annotation")
        return
    shape = dict(SHAPES[shapes[item["shape"]]])
    columns = {"label": [1000 * seed + i for i in range(len(texts))]} if shape.pop("columns", False) else None
    store.write(GROUP, make_batch(texts, seed=seed, n_tokens=item["counts"][: len(texts)], columns=columns, **shape))


@settings(max_examples=examples(5, 300))
@given(seed=st.integers(0, 2**32 - 1))
def test_any_store_shows_the_same_after_compaction_and_whatever_is_written_then(seed: int) -> None:
    # Drawn by the seed, not by hypothesis item by item: that draws short and equal lists, in which little meets.
    rng = random.Random(seed)
    first: Item = {"texts": PROMPTS[:1], "shape": 0, "counts": [1]}
    items = [first, *(drawn(rng) for _ in range(rng.randint(4, 10)))]
    later = [drawn(rng) for _ in range(rng.randint(0, 3))]
    shapes = rng.sample(range(len(SHAPES)), 2)
    part_bytes = rng.choice([30_000, 60_000, 2**30, 2**30])
    root = tempfile.mkdtemp()  # of its own for each example
    try:
        plain, compacted = (lz.open_store(f"{root}/{name}", durable=False) for name in ("plain", "compacted"))
        items = [next((item for item in items if "shape" in item), {"texts": ["p0"], "shape": 0, "counts": [1]}), *items]
        for i, item in enumerate(items):
            for store in (plain, compacted):
                write_item(store, item, i, shapes)
        expected = shown(plain)
        assert_same(compacted, expected)
        plan = compacted.compact(part_bytes=part_bytes, progress=False)
        assert not plan.left
        assert sum(n_parts(compacted)) == plan.parts_after
        assert_same(compacted, expected)
        assert_same(lz.open_store(compacted.url), expected)
        compacted.gc(max_age=0)
        assert_same(lz.open_store(compacted.url), expected)
        for i, item in enumerate([drawn(rng) for _ in range(3)], 30):
            for store in (plain, compacted):
                write_item(store, item, i, shapes)
        writer = lz.open_store(compacted.url, durable=False)

        def write_later() -> None:
            for i, item in enumerate(later, 50):
                for store in (plain, writer):
                    write_item(store, item, i, shapes)

        meanwhile = Meanwhile(compacted.storage, write_later, after=rng.random() < 0.5)
        Store(meanwhile, durable=False).compact(progress=False)
        meanwhile.act_now()
        expected = shown(plain)
        assert_same(lz.open_store(compacted.url), expected)
        compacted.compact(progress=False)
        assert_same(lz.open_store(compacted.url), expected)
    finally:
        shutil.rmtree(root)


@pytest.mark.few(2)
def test_parts_of_equal_shape_are_merged_without_replaced_prompts(store: Store) -> None:
    for seed in range(4):
        store.write(GROUP, make_batch(["a", f"b{seed}"], seed=seed, columns={"label": [seed, seed]}))
    before = shown(store)
    planned = store.compact(dry_run=True)
    assert (planned.parts, planned.parts_after, n_parts(store)) == (4, 1, (4, 0))
    assert "4 parts become 1" in str(store.compact())
    assert n_parts(store) == (1, 0)
    assert_same(store, before)
    part = store.view(GROUP).parts[0]
    assert len(part.info.digests) == 5, "the prompt that all four held is there once"
    assert len(part.info.replaces) == 4
    assert store.compact().runs == ()


@pytest.mark.few(2)
def test_a_merged_part_keeps_its_place_and_names_all_parts_that_it_replaces(store: Store) -> None:
    names = [store.write(GROUP, make_batch([t], seed=i)) for i, t in enumerate("abcd")]
    part_nbytes = store.compact(dry_run=True).nbytes // 4
    assert store.compact(part_bytes=2 * part_nbytes + part_nbytes // 2).parts_after == 2
    assert store.compact().parts_after == 1
    merged = store.view(GROUP).parts[-1].info
    assert merged.name.startswith(f"{names[-1]}.")
    assert set(names) <= set(merged.replaces)
    newer = store.write(GROUP, make_batch(["a"], seed=9))
    assert store.view(GROUP).parts[-1].info.name == newer
    np.testing.assert_array_equal(store.dataset(prompts=["a"]).resid_mean[:, 0], make_batch(["a"], seed=9).prompts["resid_mean"][:, 0])


def test_a_part_of_another_shape_in_between_ends_the_run(store: Store) -> None:
    # The second layer set overlaps: it wins over the first part and loses to the third.
    store.write(GROUP, make_batch(["a", "b"], seed=0))
    store.write(GROUP, make_batch(["a", "b"], seed=1, layers=(0, 1)))
    store.write(GROUP, make_batch(["b"], seed=2))
    before = shown(store)
    assert store.compact().runs == ()
    assert_same(store, before)


@pytest.mark.few(2)
def test_an_annotation_in_between_goes_on_to_override_what_it_overrode(store: Store) -> None:
    store.write(GROUP, make_batch(["a"], seed=0, columns={"label": [1]}))
    store.annotate("acme/toy", {"label": {"a": 2}})
    store.write(GROUP, make_batch(["b"], seed=1, columns={"label": [3]}))
    store.write(GROUP, make_batch(["c"], seed=2, columns={"label": [4]}))
    before = shown(store)
    assert before[0].label.values.tolist() == [2, 3, 4]
    assert store.compact().parts_after == 3, "the last two become one, the first stays before its annotation"
    assert_same(store, before)


@pytest.mark.few(2)
def test_an_annotation_of_another_column_or_prompt_is_no_hindrance(store: Store) -> None:
    store.write(GROUP, make_batch(["a"], seed=0, columns={"label": [1]}))
    store.annotate("acme/toy", {"split": {"a": "train"}})
    store.write(GROUP, make_batch(["b"], seed=1, columns={"label": [3]}))
    store.annotate("acme/toy", {"label": {"b": 5}})
    store.write(GROUP, make_batch(["c"], seed=2, columns={"label": [3]}))
    before = shown(store)
    store.compact()
    assert n_parts(store) == (2, 2)
    assert_same(store, before)


def test_a_part_in_between_goes_on_to_override_an_annotation(store: Store) -> None:
    store.write(GROUP, make_batch(["a"], seed=0))
    store.annotate("acme/toy", {"label": {"a": 1}})
    store.write(GROUP, make_batch(["a"], seed=1, columns={"label": [2]}))
    store.write(GROUP, make_batch(["b"], seed=2))
    store.annotate("acme/toy", {"label": {"b": 3}})
    before = shown(store)
    assert before[0].label.values.tolist() == [2, 3]
    store.compact()
    assert n_parts(store)[1] == 2
    assert_same(store, before)


def test_tokens_that_a_disagreement_made_invalid_do_not_come_back(store: Store) -> None:
    attn = make_batch(["a"], seed=0, n_tokens=[3])
    store.write(GROUP, replace(attn, tokens={"attn": attn.tokens["resid"]}))
    store.write(GROUP, make_batch(["a"], seed=1, n_tokens=[2]))
    store.write(GROUP, make_batch(["a"], seed=2, n_tokens=[3]))
    before = shown(store)
    assert not bool(before[2].sel(variable="attn").any())
    store.compact()
    assert_same(store, before)


@pytest.mark.few(1)
def test_annotations_become_one_and_the_last_value_stays(store: Store) -> None:
    store.write(GROUP, make_batch(["a", "b", "c"]))
    for i in range(4):
        store.annotate("acme/toy", {"label": {"a": i, "b": 10 * i}})
        store.annotate("acme/toy", {"split": {"c": f"s{i}"}})
    before = shown(store)
    store.compact()
    assert n_parts(store) == (1, 2)
    assert_same(store, before)
    assert before[0].label.values[:2].tolist() == [3, 30]


def test_dtypes_widths_and_codecs_are_kept(store: Store) -> None:
    rng = np.random.default_rng(0)
    for i in range(3):
        texts = [f"{i}{j}" for j in range(3)]
        bf16 = (rng.standard_normal((2, 3, 4)).astype("f4").view("u4") & 0xFFFF0000).view("f4")
        batch = TokenBatch(
            sha256=[prompt_sha256(t) for t in texts],
            layers=(0, 2),
            prompts={
                "resid_mean": bf16,
                "logits_last_token_top_k_values": rng.standard_normal((3, 5)).astype("f2"),
                "logits_last_token_top_k_indices": rng.integers(0, 9, (3, 5)).astype("i4"),
            },
            unlayered=frozenset({"logits_last_token_top_k_values", "logits_last_token_top_k_indices"}),
            stored_dtype={"resid_mean": "bfloat16"},
            prompt_columns={"seen": np.array([True, False, True]), "weight": np.array([0.5, np.nan, 2.0]), "n": np.array([1, 2, 3])},
        )
        store.write(GROUP, batch, compressed=False)
    wider = replace(
        batch,
        prompts={"logits_last_token_top_k_values": np.zeros((3, 7), "f2"), "logits_last_token_top_k_indices": np.zeros((3, 7), "i4")},
        prompt_columns={},
        layers=(),
        sha256=[prompt_sha256(t) for t in "xyz"],
        stored_dtype={},
    )
    store.write(GROUP, wider)
    before = shown(store)
    store.compact()
    assert n_parts(store) == (2, 0)
    assert_same(store, before)
    arrays = store.view(GROUP).parts[0].info.arrays
    assert {array.shuffle for array in arrays.values()} == {None}
    assert arrays["prompts/resid_mean"].attributes["stored_dtype"] == "bfloat16"
    assert arrays["prompts/logits_last_token_top_k_values"].row_shape == (5,)


def test_raw_and_compressed_parts_stay_apart(store: Store) -> None:
    for i, compressed in enumerate([True, False]):
        store.write(GROUP, make_batch([f"p{i}"], seed=i), compressed=compressed)
    assert store.compact().runs == ()


def test_part_bytes_bounds_a_part_and_large_ones_stay(store: Store) -> None:
    for i in range(6):
        store.write(GROUP, make_batch([f"p{i}"], seed=i))
    part_nbytes = store.compact(dry_run=True).nbytes // 6
    assert store.compact(part_bytes=3 * part_nbytes + part_nbytes // 2, dry_run=True).parts_after == 2
    assert store.compact(part_bytes=part_nbytes, dry_run=True).runs == ()
    assert store.compact(min_parts=7).runs == ()


def test_a_caches_limit_bounds_its_parts() -> None:
    cache = lz.open_store()
    for i in range(4):
        cache.write(GROUP, make_batch([f"p{i}"], seed=i))
    whole = cache.compact(dry_run=True).nbytes
    lz.set_cache_limit(50 * (whole / 2 + 100) / 1024**3)
    assert cache.compact(dry_run=True).parts_after == 2
    assert lz.open_store(cache.url).compact(dry_run=True).parts_after == 1, "a store that is named is ruled by the call"
    lz.set_cache_limit(None)


def test_an_open_view_can_be_read_after_compaction_and_gc(store: Store) -> None:
    for i in range(3):
        store.write(GROUP, make_batch([f"p{i}"], seed=i))
    before = shown(store)
    lazy = lz.open_store(store.url).dataset()
    store.compact()
    store.gc()
    xr.testing.assert_identical(lazy.load(), before[0])


def test_a_store_for_reading_is_not_compacted(store: Store) -> None:
    store.write(GROUP, make_batch(["a"]))
    reader = lz.open_store(store.url, mode="r")
    for call in (reader.compact, reader.gc):
        with pytest.raises(lz.errors.ReadOnlyError):
            call()
    for wrong in ({"part_bytes": 0}, {"part_bytes": True}, {"min_parts": 1}):
        with pytest.raises(lz.errors.InvalidArgumentError):
            store.compact(**wrong)
    with pytest.raises(lz.errors.ModelNotStoredError):
        store.compact("nobody")
    assert lz.open_store("memory://nothing-there").compact().runs == ()


# ----------------------------------------------------------------------------------------------------- others, meanwhile


class Meanwhile(Wrapped):
    """A storage at which somebody else does something right before, or after, the first commit of a part."""

    def __init__(self, inner: Storage, act: Callable[[], None], *, after: bool = False) -> None:
        super().__init__(inner)
        self.act: Callable[[], None] | None = act
        self.after = after

    def act_now(self) -> None:
        act, self.act = self.act, None
        if act is not None:
            act()

    def write(self, key: str, data: Any, *, durable: bool) -> None:
        if not self.after:
            self.act_now()
        super().write(key, data, durable=durable)

    def commit(self, key: str, data: Any, *, durable: bool, replace: bool = True) -> None:
        super().commit(key, data, durable=durable, replace=replace)
        if self.after:
            self.act_now()


def three_parts(root: str) -> Store:
    store = lz.open_store(root)
    for i in range(3):
        store.write(GROUP, make_batch(["a", f"p{i}"], seed=i))
    return store


@pytest.mark.parametrize("after", [False, True])
def test_a_part_committed_meanwhile_wins(root: str, after: bool) -> None:
    store = three_parts(root)

    def write() -> None:
        lz.open_store(store.url).write(GROUP, make_batch(["a"], seed=7))

    plan = Store(Meanwhile(store.storage, write, after=after)).compact(progress=False)
    assert len(plan.runs) == 1
    assert n_parts(store) == (2, 0)
    np.testing.assert_array_equal(
        lz.open_store(root).dataset(prompts=["a"]).resid_mean[:, 0], make_batch(["a"], seed=7).prompts["resid_mean"][:, 0]
    )


@pytest.mark.parametrize("after", [False, True])
def test_a_part_that_turns_up_within_the_run_keeps_its_place(root: str, after: bool) -> None:
    store = three_parts(root)
    middle = replacement_name(store.view(GROUP).parts[0].info.name)  # as of a writer that was slow to begin

    def write() -> None:
        writer = store.new_part(GROUP)
        writer.name, writer.path = middle, f"{GROUP.name}/{middle}"
        writer.append(make_batch(["p0", "p2"], seed=7))
        writer.commit()

    plan = Store(Meanwhile(store.storage, write, after=after)).compact(progress=False)
    assert (len(plan.runs), len(plan.left)) == (0, 1)
    assert n_parts(store) == (4, 0)
    data = lz.open_store(root).dataset(prompts=["p0", "p2"])
    np.testing.assert_array_equal(data.resid_mean[:, 0], make_batch(["p0", "p2"], seed=7).prompts["resid_mean"][:, 0])
    np.testing.assert_array_equal(data.resid_mean[:, 1], make_batch(["a", "p2"], seed=2).prompts["resid_mean"][:, 1])


def test_a_part_that_is_still_being_written_ends_the_run(root: str) -> None:
    store = lz.open_store(root)
    store.write(GROUP, make_batch(["a"], seed=0))
    slow = store.new_part(GROUP)
    slow.append(make_batch(["a", "b"], seed=1))
    store.storage.write(f"{slow.path}/prompts/resid_mean/c.0.0.0", b"begun", durable=False)
    for i in (2, 3):
        store.write(GROUP, make_batch([f"p{i}"], seed=i))
    assert store.compact().parts_after == 2
    slow.commit()
    np.testing.assert_array_equal(
        lz.open_store(root).dataset(prompts=["a"]).resid_mean[:, 0], make_batch(["a", "b"], seed=1).prompts["resid_mean"][:, 0]
    )


@pytest.mark.few(3)
@pytest.mark.parametrize("after", [False, True])
def test_prompts_deleted_meanwhile_do_not_come_back(root: str, after: bool) -> None:
    store = three_parts(root)

    def delete() -> None:
        lz.open_store(store.url).delete("acme/toy", ["a"])

    Store(Meanwhile(store.storage, delete, after=after)).compact(progress=False)
    fresh = lz.open_store(root)
    assert len(fresh.view(GROUP)) == 3
    assert fresh.view(GROUP).locate("a") is None
    assert not any(prompt_sha256("a") == row.tobytes().hex() for part in fresh.list_parts(GROUP.name) for row in part.info.digests)


@pytest.mark.few(2)
@pytest.mark.parametrize("after", [False, True])
def test_two_that_compact_at_once_show_the_same(root: str, after: bool) -> None:
    store = three_parts(root)
    before = shown(store)
    rival = lz.open_store(root)

    def compact() -> None:
        rival.compact(progress=False)

    Store(Meanwhile(store.storage, compact, after=after)).compact(progress=False)
    assert_same(lz.open_store(root), before)
    lz.open_store(root).compact(progress=False)
    assert n_parts(store) == (1, 0)
    assert_same(lz.open_store(root), before)


def test_a_part_evicted_meanwhile_is_left_out(root: str) -> None:
    store = three_parts(root)

    def evict() -> None:
        lz.evict(store, max_gb=0, min_age=0)

    plan = Store(Meanwhile(store.storage, evict)).compact(progress=False)
    assert len(plan.left) == 1
    assert lz.open_store(root).models() == []


@pytest.mark.long
def test_memory_is_bounded_by_blocks_not_by_the_part(tmp_path: Path) -> None:
    store = lz.open_store(tmp_path / "s", durable=False)
    rng = np.random.default_rng(0)
    values = rng.standard_normal((4, 2000, 512)).astype("f4")  # 16 MB
    for i in range(20):
        texts = [f"{i}.{j}" for j in range(2000)]
        store.write(
            GROUP, TokenBatch(sha256=[prompt_sha256(t) for t in texts], text=texts, layers=(0, 1, 2, 3), prompts={"resid_mean": values})
        )
    del values
    tracemalloc.start()
    plan = lz.open_store(store.url, durable=False).compact(progress=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert plan.nbytes > 320e6
    assert plan.parts_after == 1
    assert peak < 200e6, peak


def test_texts_that_would_not_fit_into_memory_halve_the_run(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmprobe_zarr.store.upkeep import compact as compaction

    monkeypatch.setattr(compaction, "COLUMN_BYTES", 500)
    for i in range(8):
        store.write(GROUP, make_batch([f"{i}" * 100], seed=i, tokens=False))
    before = shown(store)
    store.compact()
    assert n_parts(store) == (2, 0)
    assert_same(store, before)


def test_a_hundred_small_parts_become_one() -> None:
    root = f"memory://{uuid.uuid4().hex}"
    store = lz.open_store(root)
    for i in range(100):
        store.write(GROUP, make_batch([f"p{i}"], seed=i, tokens=False))
    before = shown(store)
    store.compact(progress=False)
    assert n_parts(store) == (1, 0)
    assert_same(store, before)


def test_part_names_are_distinguished_from_other_names() -> None:
    from lmprobe_zarr.store.format.part_names import PART_NAME

    name = new_part_name()
    assert PART_NAME.fullmatch(name)
    assert PART_NAME.fullmatch(replacement_name(replacement_name(name)))
    for other in ("annotations", ".used", "zarr.json", name[:-1], f"{name}.x", "notes"):
        assert not PART_NAME.fullmatch(other)
