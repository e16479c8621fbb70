"""The cache without a model: what is in it, what leaves it, and that nothing else ever does."""

from __future__ import annotations

import os
import threading
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stores import GROUP, make_batch, write_shared

import lmprobe_zarr as lz
from lmprobe_zarr import config
from lmprobe_zarr.batch.hashes import prompt_sha256
from lmprobe_zarr.batch.token_batch import TokenBatch
from lmprobe_zarr.errors import CacheWarning, CorruptPartError, InvalidArgumentError, MissingPromptsError, PartGoneError, ReadOnlyError
from lmprobe_zarr.storage.local import LocalStorage
from lmprobe_zarr.store.format.group import GroupInfo
from lmprobe_zarr.store.format.names import STAMPS
from lmprobe_zarr.store.format.part import PartInfo
from lmprobe_zarr.store.parts.part import Part
from lmprobe_zarr.store.store import Store
from lmprobe_zarr.store.upkeep.evict import EvictionEntry, plan_evict

OTHER = GroupInfo(model="acme/other", num_layers=4, hidden_size=8)


@pytest.fixture
def cache() -> Store:
    """The default store, on local disk."""
    return lz.open_store()


def age(store: Store, name: str, seconds: float) -> None:
    """Make a part look as if it was last used so long ago."""
    stamp = Path(store.url) / GROUP.name / STAMPS / name
    stamp.parent.mkdir(exist_ok=True)
    stamp.touch()
    os.utime(stamp, (time.time() - seconds, time.time() - seconds))


def counted(monkeypatch: pytest.MonkeyPatch, kind: type, *names: str) -> list[str]:
    """The first argument of every call of these methods from now on."""
    seen: list[str] = []

    def wrapped(real: Any) -> Any:
        def method(self: Any, key: Any, *rest: Any, **options: Any) -> Any:
            seen.append(str(key))
            return real(self, key, *rest, **options)

        return method

    for name in names:
        monkeypatch.setattr(kind, name, wrapped(getattr(kind, name)))
    return seen


def everything_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---------------------------------------------------------------------------------------------------------------- looking in


def test_an_empty_cache_is_described_and_nothing_is_created(tmp_path: Path) -> None:
    info = lz.cache_info()
    assert info.total_size_gb == 0
    assert info.models == ()
    assert lz.discover_cached("m", "a") is None
    assert lz.list_cached_prompts("m") == []
    assert lz.evict() is None
    assert lz.clear_cache() == 0
    assert not config.default_root().exists()


def test_the_sum_of_all_files_is_what_is_reported(cache: Store) -> None:
    cache.write(GROUP, make_batch(["a", "b"]))
    cache.write(GROUP, make_batch(["c"], tokens=False))
    cache.write(OTHER, make_batch(["d"]))
    cache.annotate("acme/toy", {"label": {"a": 1, "c": 0}})
    info = lz.cache_info()
    parts = [path for group in (GROUP, OTHER) for path in (Path(cache.url) / group.name).rglob("*") if path.is_file()]
    documents = {Path(cache.url) / group.name / "zarr.json" for group in (GROUP, OTHER)}
    assert info.total_size_bytes == sum(path.stat().st_size for path in parts if path not in documents and STAMPS not in path.parts)
    assert [model.model_name for model in info.models] == ["acme/toy", "acme/other"], "the largest first"
    assert info.total_size_gb == info.total_size_bytes / 1024**3
    first = info.models[0]
    assert (first.num_prompts, first.num_layers, first.num_parts, first.has_tokens, first.has_pooled) == (3, 3, 2, True, True)
    assert not first.has_perplexity
    assert lz.cache_info("acme/other").models[0].num_prompts == 1
    assert lz.cache_info("nobody").models == ()
    assert info.oldest is not None
    assert info.newest is not None
    assert info.oldest <= info.newest


def test_it_prints_as_the_page_shows_and_as_a_table(cache: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write(GROUP, make_batch(["a", "b"]))
    lz.set_cache_limit(3)
    info = lz.cache_info()
    assert repr(info) == "CacheInfo(total_size_gb=0.00, models=['acme/toy'])"
    text = str(info)
    assert text.splitlines()[0].split() == ["cache", cache.url]
    assert "3.0 GiB" in text
    assert "2 prompts, 3 layers, pooled, tokens" in text
    page = info._repr_html_()
    assert "acme/toy" in page
    assert "<script>" not in lz.CacheInfo(url="<script>alert(1)</script>")._repr_html_(), "names are escaped"
    lz.set_cache_limit(0)
    assert "nothing is stored" in str(lz.cache_info())


def test_discover_cached_reads_no_activations(cache: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write(GROUP, make_batch(["a", "bb"]))
    cache.write(GROUP, make_batch(["c"], tokens=False, layers=(1,)))
    read = counted(monkeypatch, LocalStorage, "read", "read_view")
    info = lz.discover_cached("acme/toy", "bb")
    assert info is not None
    assert info.raw_layers == [0, 1, 3]
    assert info.pooled == {"mean": [0, 1, 3]}
    assert info.num_tokens == 3
    assert (info.has_perplexity, info.has_token_perplexity, info.has_logits, info.logits_top_k, info.router_layers) == (
        False, False, False, None, [],
    )  # fmt: skip
    pooled_only = lz.discover_cached("acme/toy", lz.prompt_hash("c"))
    assert pooled_only is not None
    assert (pooled_only.raw_layers, pooled_only.pooled) == ([], {"mean": [1]})
    assert lz.discover_cached("acme/toy", "never seen") is None
    assert lz.discover_cached("nobody", "a") is None
    lz.cache_info()
    assert not [key for key in read if "resid" in key and not key.endswith("zarr.json")]


def test_discover_cached_describes_perplexity_logits_and_router(cache: Store) -> None:
    n = np.array([2, 1])
    batch = TokenBatch(
        sha256=[prompt_sha256(t) for t in ("a", "b")],
        n_tokens=n,
        layers=(1, 2),
        tokens={
            "token_perplexity": np.ones(3, np.float32),
            "router": np.ones((2, 3, 4), np.float32),
            "logits_top_k_values": np.ones((3, 5), np.float32),
            "logits_top_k_indices": np.ones((3, 5), np.int32),
        },
        prompts={"perplexity": np.ones((2, 3), np.float32), "logits_last_token": np.ones((2, 7), np.float32)},
        unlayered=frozenset({"token_perplexity", "logits_top_k_values", "logits_top_k_indices", "perplexity", "logits_last_token"}),
    )
    cache.write(GROUP, batch)
    info = lz.discover_cached("acme/toy", "a")
    assert info is not None
    assert (info.has_perplexity, info.has_token_perplexity, info.has_logits, info.logits_top_k, info.router_layers) == (
        True, True, True, 5, [1, 2],
    )  # fmt: skip
    assert info.num_tokens == 2
    (model,) = lz.cache_info().models
    assert (model.has_perplexity, model.has_logits, model.has_router) == (True, True, True)


def test_prompts_are_listed_with_texts_counts_and_dates(cache: Store) -> None:
    cache.write(GROUP, make_batch(["a", "bbb"]))
    secret = make_batch(["secret"], tokens=False)
    cache.write(GROUP, TokenBatch(sha256=secret.sha256, layers=secret.layers, prompts=secret.prompts))
    listed = lz.list_cached_prompts("acme/toy")
    assert [(cached.prompt, cached.num_tokens) for cached in listed] == [("a", 2), ("bbb", 4), (None, None)]
    assert listed[2].hash == lz.prompt_hash("secret")
    assert all(cached.cached_at.startswith("20") for cached in listed)


def test_requests_grow_with_parts_and_not_with_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "memory://requests"
    store = lz.open_store(url)
    store.write(GROUP, make_batch([str(i) for i in range(5)]))
    memory = fsspec.filesystem("memory")
    calls = counted(monkeypatch, type(memory), "cat_file", "ls", "isfile", "info")

    def cost() -> int:
        calls.clear()
        lz.cache_info(store=url)
        return len(calls)

    few = cost()
    store.write(OTHER, make_batch([str(i) for i in range(500)]))
    one_more_group = cost()
    store.write(OTHER, make_batch([str(i) for i in range(500, 3000)]))
    one_more_part = cost()
    assert one_more_part - one_more_group <= 2
    assert one_more_group - few <= 12
    memory.rm(url, recursive=True)


def test_five_thousand_entries_are_counted_at_once(cache: Store) -> None:
    for first in range(0, 5400, 540):
        cache.write(GROUP, make_batch([f"prompt {i}" for i in range(first, first + 540)], tokens=False))
    lz.cache_info()
    began = time.perf_counter()
    info = lz.cache_info()
    seconds = time.perf_counter() - began
    assert info.models[0].num_prompts == 5400
    assert seconds < 2, "reported in the benchmarks; here only that it is no crawl"


# ------------------------------------------------------------------------------------------------------------------ eviction


def entries() -> st.SearchStrategy[list[EvictionEntry]]:
    def build(rows: list[tuple[int, float, float, bool, int]]) -> list[EvictionEntry]:
        made = []
        for i, (nbytes, committed, used, note, replaced) in enumerate(rows):
            replaces = (f"{replaced:03}",) if not note and replaced < i else ()
            info = PartInfo(
                group="g", name=f"{i:03}", kind="annotation" if note else "part", digests=np.zeros((1, 32), np.uint8), arrays={}, files={},
                replaces=replaces,
            )  # fmt: skip
            made.append(
                EvictionEntry(
                    part=Part(LocalStorage("/nowhere"), f"g/{i:03}", info), group="g", nbytes=nbytes, committed=committed, used=used
                )
            )
        old = {name for entry in made for name in entry.part.info.replaces}
        return [
            EvictionEntry(part=e.part, group=e.group, nbytes=e.nbytes, committed=e.committed, used=e.used, replaced=e.part.info.name in old)
            for e in made
        ]

    row = st.tuples(st.integers(1, 100), st.floats(0, 1000), st.floats(0, 1000), st.booleans(), st.integers(0, 30))
    return st.lists(row, max_size=12).map(build)


@given(entries(), st.integers(0, 600), st.floats(0, 800))
def test_the_plan_takes_the_least_recently_used_and_no_more_than_needed(held: list[EvictionEntry], limit: int, min_age: float) -> None:
    plan = plan_evict(held, limit, min_age=min_age, now=1000.0)
    gone = {entry.part.path for entry in plan.entries}
    kept = [entry for entry in held if entry.part.path not in gone]
    assert plan.freed == sum(entry.nbytes for entry in plan.entries)
    assert plan.kept == sum(entry.nbytes for entry in kept)
    assert all(1000.0 - entry.touched >= min_age for entry in plan.entries if not entry.is_annotation)
    if sum(entry.nbytes for entry in held) <= limit:
        assert not plan.entries, "within the limit nothing goes"
    parts = [entry for entry in plan.entries if not entry.is_annotation]
    if parts:
        before_last = plan.kept + parts[-1].nbytes + sum(e.nbytes for e in plan.entries if e.is_annotation)
        assert before_last > limit, "the last one was needed"
    visible_gone = [entry.touched for entry in parts if not entry.replaced]
    still_movable = [
        e for e in kept if not e.is_annotation and not e.replaced and 1000.0 - e.touched >= min_age and not e.part.info.replaces
    ]  # fmt: skip
    if visible_gone and still_movable:
        assert max(visible_gone) <= min(entry.touched for entry in still_movable)
    names = {entry.part.info.name for entry in kept}
    for entry in plan.entries:
        assert not names.intersection(entry.part.info.replaces) or entry.is_annotation, "what it replaced would become visible again"
    assert not any(entry.is_annotation for entry in plan.entries), "no model gives labels again"
    asked = plan_evict(held, limit, min_age=min_age, now=1000.0, annotations=True)
    notes_gone = [entry for entry in asked.entries if entry.is_annotation]
    left = [entry for entry in held if entry.part.path not in {gone.part.path for gone in asked.entries}]
    if any(not entry.is_annotation for entry in left):
        assert not notes_gone, "even then labels stay while there is a part they belong to"


def test_the_least_recently_used_parts_go_first(cache: Store) -> None:
    names = [cache.write(GROUP, make_batch([text], seed=i)) for i, text in enumerate("abc")]
    for name, seconds in zip(names, (500, 9000, 100), strict=True):
        age(cache, name, seconds)
    # A commit counts as a use, so all three would count as used now.
    size = lz.cache_info().total_size_bytes
    aged = cache.entries(GROUP)
    plan = plan_evict([EvictionEntry(part=e.part, group=e.group, nbytes=e.nbytes, committed=0, used=e.used) for e in aged], size - 1)
    assert [entry.part.info.name for entry in plan.entries] == [names[1]]


def test_evict_reduces_the_cache_to_its_limit_and_logs_what_was_removed(cache: Store, caplog: pytest.LogCaptureFixture) -> None:
    for i in range(6):
        cache.write(GROUP, make_batch([f"{i}"], seed=i))
        time.sleep(0.002)
    size = lz.cache_info().total_size_bytes
    lz.set_cache_limit(size / 2 / 1024**3)
    with caplog.at_level("INFO", "lmprobe_zarr.cache"):
        plan = lz.evict()
    assert plan is not None
    assert plan.fits
    assert lz.cache_info().total_size_bytes <= size / 2
    assert plan.kept == lz.cache_info().total_size_bytes
    assert "evicted" in caplog.text
    left = lz.list_cached_prompts("acme/toy")
    assert [cached.prompt for cached in left] == ["3", "4", "5"], "the first ones were the least recently used"
    assert cache.dataset(prompts=["4"]).resid_mean.values.shape == (3, 1, 8), "an open store sees what went"
    assert lz.evict() is not None, "evicting again does nothing"
    assert [cached.prompt for cached in lz.list_cached_prompts("acme/toy")] == ["3", "4", "5"]


def write_by_hand(texts: list[str]) -> None:
    lz.write_activations(None, model="by hand", prompts=texts, pooled={"resid_mean": {0: np.ones((len(texts), 64), "f4")}})


def test_labels_survive_eviction_and_extraction(cache: Store) -> None:
    """An annotation and a column that came with a part are there again with their prompts; nobody had to ask for it."""
    batch = make_batch(["a", "bb"], columns={"label": [0, 1]})
    cache.write(GROUP, batch)
    cache.annotate("acme/toy", {"toxic": {"a": "yes"}})
    for _ in range(3):
        plan = lz.evict(max_gb=0)
        assert plan is not None
        assert not cache.models()
        assert "of 2 prompts evicted" in str(plan)
        assert "annotations, which no model gives again" in str(plan)
        cache.write(GROUP, make_batch(["bb", "a"], seed=9))
        data = cache.dataset(prompts=["a", "bb"])
        assert (data.label.values.tolist(), data.toxic.values[0], data.toxic.isnull().values.tolist()) == ([0, 1], "yes", [False, True])
    lz.evict(max_gb=0, annotations=True)
    cache.write(GROUP, make_batch(["a", "bb"]))
    assert not {"label", "toxic"} & set(cache.dataset().coords)


def test_what_was_imported_or_written_by_hand_stays_in_the_cache(cache: Store, tmp_path: Path) -> None:
    write_by_hand(["x"])
    with cache.new_part(OTHER, recorded={"imported_from": "/somewhere"}) as writer:
        writer.append(make_batch(["y"]))
        writer.commit()
    cache.write(GROUP, make_batch(["a"]))
    plan = lz.evict(max_gb=0)
    assert plan is not None
    assert cache.models() == ["acme/other", "by hand"]
    assert "imported or written by hand" in str(plan)
    cache.compact(progress=False)
    lz.evict(max_gb=0)
    assert cache.models() == ["acme/other", "by hand"]
    named = lz.evict(cache, max_gb=0, min_age=0, dry_run=True)
    assert named is not None
    assert len(named.entries) == 2, "whoever names a place means what is in it"
    lz.evict(max_gb=0, given=True)
    assert cache.models() == []


def test_clear_says_what_of_it_no_model_gives_again(cache: Store) -> None:
    cache.write(GROUP, make_batch(["a", "bb"], columns={"label": [0, 1]}))
    cache.write(GROUP, make_batch(["bb", "c"], seed=1))
    cache.annotate("acme/toy", {"toxic": {"a": "yes"}})
    info = lz.cache_info().models[0]
    assert (info.num_parts, info.num_annotations, info.columns) == (2, 1, ("label", "toxic"))
    assert "1 annotation, columns label, toxic" in str(info)
    gone = lz.clear_cache()
    assert gone == 3
    assert str(gone) == "2 parts of 3 prompts, 1 annotation; columns label, toxic"
    assert (gone.parts, gone.annotations, gone.prompts, gone.columns) == (2, 1, 3, ("label", "toxic"))


def test_no_limit_means_no_eviction(cache: Store) -> None:
    cache.write(GROUP, make_batch(["a"]))
    assert lz.evict() is None
    lz.set_cache_limit(0)
    assert lz.evict() is None, "0 stores nothing; it does not empty the cache"
    assert lz.cache_info().models


def test_foreign_files_are_never_touched(cache: Store) -> None:
    part = cache.write(GROUP, make_batch(["a"]))
    root = Path(cache.url)
    foreign = [
        root / "notes.txt",
        root / GROUP.name / "notes.txt",
        root / GROUP.name / part / "tokens" / "notes.txt",
        root / "somebody" / "else.bin",
        config.cache_dir() / "0123456789abcdef" / "0123456789abcdef.safetensors",
    ]
    for path in foreign:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    lz.set_cache_limit(1e-9)
    plan = lz.evict()
    assert plan is not None
    assert len(plan.entries) == 1
    assert lz.clear_cache() == 0
    assert all(path.read_text() == "mine" for path in foreign)
    assert not (root / GROUP.name / part / "prompts").exists(), "ours are gone, with the folders that this left empty"


def test_recently_used_or_committed_parts_are_not_evicted_from_shared_places(tmp_path: Path) -> None:
    url = str(tmp_path / "team")
    store = lz.open_store(url)
    store.write(GROUP, make_batch(["a"]))
    plan = lz.evict(url, max_gb=0)
    assert plan is not None
    assert not plan.entries
    assert not plan.fits
    assert plan.protected > 0
    assert "min_age" in str(plan)
    plan = lz.evict(url, max_gb=0, min_age=0)
    assert plan is not None
    assert len(plan.entries) == 1
    with pytest.raises(InvalidArgumentError, match="max_gb="):
        lz.evict(url)
    for bad in ({"max_gb": -1}, {"max_gb": 1, "min_age": -1}, {"max_gb": float("nan")}):
        with pytest.raises(InvalidArgumentError):
            lz.evict(url, **bad)


def test_the_clock_of_the_place_protects_a_part_whose_writer_lives_in_the_past(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = lz.open_store(tmp_path / "team")
    real = time.time
    monkeypatch.setattr("lmprobe_zarr.store.format.part_names.time.time_ns", lambda: int((real() - 86400) * 1e9))
    writer = store.new_part(GROUP, recorded={"written": "2020-01-01T00:00:00+00:00"})
    writer.append(make_batch(["a"]))
    writer.commit()
    plan = lz.evict(store, max_gb=0)
    assert plan is not None
    assert not plan.entries
    assert lz.list_cached_prompts("acme/toy", store=store)


def test_a_remote_root_is_emptied_only_when_the_call_names_it(caplog: pytest.LogCaptureFixture) -> None:
    url = "memory://shared-dataset"
    store = lz.open_store(f"{url}/.zarr")
    store.write(GROUP, make_batch(["a"]))
    lz.set_cache_backend(url)
    lz.set_cache_limit(1e-9)
    assert lz.cache_info().models, "the backend is looked into"
    with caplog.at_level("WARNING", "lmprobe_zarr.cache"):
        assert lz.evict() is None
    assert "remote" in caplog.text
    with pytest.raises(InvalidArgumentError, match="name it in the call"):
        lz.clear_cache()
    assert lz.cache_info().models
    plan = lz.evict(f"{url}/.zarr", max_gb=0, min_age=0)
    assert plan is not None
    assert len(plan.entries) == 1
    store.write(GROUP, make_batch(["b"]))
    assert lz.clear_cache(url=f"{url}/.zarr") == 1
    assert not lz.cache_info().models
    fsspec.filesystem("memory").rm(url, recursive=True)


def test_an_open_view_of_an_evicted_part_names_it(cache: Store) -> None:
    name = cache.write(GROUP, make_batch(["a"]))
    data = lz.open_store(mode="r").dataset()
    lz.evict(cache, max_gb=0, min_age=0)
    with pytest.raises(PartGoneError, match=name):
        _ = data.resid_mean.values


def test_a_hit_is_a_use_and_a_read_only_store_leaves_no_stamp(cache: Store) -> None:
    name = cache.write(GROUP, make_batch(["a"]))
    stamps = Path(cache.url) / GROUP.name / STAMPS
    reader = lz.open_store(mode="r")
    reader.mark_used(reader.view(GROUP).parts)
    assert not stamps.exists()
    cache.mark_used(cache.view(GROUP).parts)
    assert [path.name for path in stamps.iterdir()] == [name]
    (entry,) = cache.entries(GROUP)
    assert abs(entry.used - time.time()) < 5
    assert len(cache.view(GROUP)) == 1, "stamps are no parts"
    lz.evict(cache, max_gb=0, min_age=0)
    assert not stamps.exists() or not list(stamps.iterdir())


def test_evicting_at_the_same_time_from_many_threads_disturbs_nobody(cache: Store) -> None:
    for i in range(12):
        cache.write(GROUP, make_batch([f"{i}"], seed=i))
    size = lz.cache_info().total_size_bytes
    failures: list[BaseException] = []

    def evict() -> None:
        try:
            lz.evict(lz.open_store(), max_gb=size / 2 / 1024**3, min_age=0)
        except BaseException as error:  # noqa: BLE001 — shown below
            failures.append(error)

    threads = [threading.Thread(target=evict) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    fresh = lz.open_store(mode="r")
    assert np.isfinite(fresh.dataset().resid_mean.values).all()
    assert 0 < lz.cache_info().total_size_bytes <= size / 2


# ------------------------------------------------------------------------------------------------------- clearing, deleting


def test_clear_takes_everything_or_one_model(cache: Store) -> None:
    cache.write(GROUP, make_batch(["a", "b"]))
    cache.write(GROUP, make_batch(["c"]))
    cache.annotate("acme/toy", {"label": {"a": 1}})
    cache.write(OTHER, make_batch(["d"]))
    assert lz.clear_cache("acme/toy") == 3
    assert [model.model_name for model in lz.cache_info().models] == ["acme/other"]
    assert lz.open_store().models() == ["acme/other"]
    assert lz.clear_cache() == 1
    assert lz.clear_cache() == 0
    assert list(everything_below(Path(cache.url))) == ["zarr.json"]
    cache.write(GROUP, make_batch(["a"]))
    assert lz.open_store().models() == ["acme/toy"], "and it can be filled again"


def test_a_cleared_group_no_longer_stands_in_the_way_of_another(cache: Store) -> None:
    cache.write(GROUP, make_batch(["a"]))
    newer = GroupInfo(model=GROUP.model, provenance={"revision": "def"}, num_layers=4, hidden_size=8)
    cache.write(newer, make_batch(["b"]))
    lz.evict(cache, max_gb=0, min_age=0)
    cache.write(newer, make_batch(["b"]))
    fresh = lz.open_store()
    assert fresh.dataset("acme/toy").sizes["prompt"] == 1
    assert fresh.find_group("acme/toy").name == newer.name


def test_a_read_only_store_is_neither_cleared_nor_evicted(tmp_path: Path) -> None:
    lz.open_store(tmp_path / "s").write(GROUP, make_batch(["a"]))
    before = everything_below(tmp_path)
    store = lz.open_store(tmp_path / "s", mode="r")
    for call in (
        lambda: lz.evict(store, max_gb=0, min_age=0),
        lambda: lz.clear_cache(url=store),
        lambda: store.delete("acme/toy", ["a"]),
    ):
        with pytest.raises(ReadOnlyError, match="mode='r'"):
            call()
    assert everything_below(tmp_path) == before


def test_deleted_prompts_are_removed_from_all_files_and_the_rest_is_unchanged(root: str) -> None:
    store = lz.open_store(root)
    secret = "the secret prompt"  # noqa: S105
    first = make_batch(["a", secret, "b"], seed=1, columns={"label": [1, 2, 3], "who": ["x", "a name nobody may know", "z"]})
    store.write(GROUP, first)
    store.write(GROUP, make_batch([secret], seed=2, layers=(2,), tokens=False))
    store.write(GROUP, make_batch(["c"], seed=3))
    store.annotate("acme/toy", {"note": {"a": "kept", secret: "a name nobody may know"}})
    before = store.dataset(prompts=["a", "b", "c"]).load()
    tokens = store.tokens(prompts=["a", "b", "c"]).load()
    order = lz.open_store(root).dataset().prompt.values.tolist()
    assert store.delete("acme/toy", [secret]) == 3
    fresh = lz.open_store(root)
    for opened in (store, fresh):
        assert opened.dataset().prompt.values.tolist() == [p for p in order if p != lz.prompt_hash(secret)]
        after = opened.dataset(prompts=["a", "b", "c"]).load()
        assert after[["resid_mean", "label", "who", "note"]].identical(before.sel(layer=[0, 1, 3])[["resid_mean", "label", "who", "note"]])
        assert opened.tokens(prompts=["a", "b", "c"]).load().sel(layer=[0, 1, 3]).resid.identical(tokens.sel(layer=[0, 1, 3]).resid)
        with pytest.raises(MissingPromptsError):
            opened.dataset(prompts=[secret])
    assert fresh.view(GROUP).variables("tokens")["resid"].attributes == {"stored_dtype": "float32"}
    found = fsspec.filesystem("memory").find(root) if root.startswith("memory") else [str(p) for p in Path(root).rglob("*") if p.is_file()]
    opener = fsspec.filesystem("memory" if root.startswith("memory") else "file")
    digest = prompt_sha256(secret)
    for path in found:
        data = opener.cat_file(path)
        assert digest[:16].encode() not in data, path
        assert bytes.fromhex(digest) not in data
    parts = [part.info.name for part in fresh.view(GROUP).parts]
    assert len(parts) == 2
    assert len(parts[0].split(".")) == 2, "what was written again stands where the old part stood"


def test_a_later_part_still_wins_after_a_deletion(store: Store) -> None:
    store.write(GROUP, make_batch(["a", "b"], seed=1))
    store.write(GROUP, make_batch(["a"], seed=2))
    expected = store.dataset(prompts=["a"]).resid_mean.values
    store.delete("acme/toy", ["b"])
    np.testing.assert_array_equal(store.dataset(prompts=["a"]).resid_mean.values, expected)


def test_deleting_twice_from_a_part_leaves_no_older_one_to_show_again(store: Store) -> None:
    store.write(GROUP, make_batch(["a", "b", "c"]))
    store.delete("acme/toy", ["a"])
    store.delete("acme/toy", [lz.prompt_hash("b")])
    assert [cached.prompt for cached in lz.list_cached_prompts("acme/toy", store=store)] == ["c"]
    store.delete("acme/toy", ["c"])
    assert lz.list_cached_prompts("acme/toy", store=store) == []


def test_deleting_what_is_not_there_deletes_nothing(store: Store) -> None:
    store.write(GROUP, make_batch(["a"]))
    with pytest.raises(MissingPromptsError, match="never"):
        store.delete("acme/toy", ["a", "never seen"])
    assert len(store.view(GROUP)) == 1


# ---------------------------------------------------------------------------------------------------------------- damage


def test_a_damaged_part_is_logged_and_skipped_if_others_serve(cache: Store) -> None:
    broken = cache.write(GROUP, make_batch(["a"]))
    cache.write(GROUP, make_batch(["b"]))
    path = Path(cache.url) / GROUP.name / broken / "zarr.json"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.warns(CacheWarning, match=broken):
        info = lz.cache_info()
    assert info.models[0].num_prompts == 1
    with pytest.warns(CacheWarning, match="going on without"):
        assert lz.discover_cached("acme/toy", "b") is not None
    with pytest.warns(CacheWarning):
        assert lz.discover_cached("acme/toy", "a") is None
    with pytest.raises(CorruptPartError, match=broken):
        lz.open_store().dataset()


# ------------------------------------------------------------------------------------------------------------- concurrency


def test_two_processes_lose_no_line_of_the_list(tmp_path: Path) -> None:
    with get_context("forkserver").Pool(2) as pool:
        pool.starmap(write_shared, [(tmp_path / "s", name, 25) for name in ("one", "two")], chunksize=1)
    listed = [cached.prompt for cached in lz.list_cached_prompts("acme/toy", store=tmp_path / "s")]
    assert len(listed) == len(set(listed)) == 75


def test_bytes_written_grow_with_the_prompts_and_not_with_their_square(tmp_path: Path) -> None:
    store = lz.open_store(tmp_path / "s")
    written: list[int] = []

    class Counting(LocalStorage):
        def write(self, key: str, data: Any, *, durable: bool) -> None:
            written.append(len(data))
            super().write(key, data, durable=durable)

        def commit(self, key: str, data: Any, *, durable: bool, replace: bool = True) -> None:
            written.append(len(data))
            super().commit(key, data, durable=durable, replace=replace)

    store = Store(Counting(tmp_path / "s"), durable=False)
    costs = []
    for round_ in range(4):
        written.clear()
        for i in range(25):
            store.write(GROUP, make_batch([f"{round_} {i}"], tokens=False))
        costs.append(sum(written))
    assert max(costs) < 1.1 * min(costs)


def test_another_writers_layers_are_seen_by_a_reader_that_looked_before(tmp_path: Path) -> None:
    url = "memory://no-stale-headers"
    reader, writer = lz.open_store(url), lz.open_store(url)
    writer.write(GROUP, make_batch(["a"], layers=(0,), tokens=False, seed=1))
    first = reader.dataset(prompts=["a"]).resid_mean.values
    more = make_batch(["a"], layers=(0, 2), tokens=False, seed=2)
    writer.write(GROUP, more)
    assert not np.array_equal(reader.dataset(prompts=["a"]).resid_mean.sel(layer=[0]).values, first)
    np.testing.assert_array_equal(reader.dataset(prompts=["a"]).resid_mean.values, more.prompts["resid_mean"])
    fsspec.filesystem("memory").rm(url, recursive=True)
