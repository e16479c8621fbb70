"""Several who write, read, merge and remove in one root at the same time: right values or a clear error, never zeros, never another's."""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from crash_operations import Truth, annotated, check_equal, same, without, written
from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from shown_values import truth_of
from stores import GROUP, Wrapped, kept_tokens, make_batch

import lmprobe_zarr as lz
from lmprobe_zarr.errors import MissingPromptsError, ModelNotStoredError, PartGoneError
from lmprobe_zarr.storage.open import open_storage
from lmprobe_zarr.store.parts import writer as writer_module
from lmprobe_zarr.store.store import Store
from lmprobe_zarr.store.upkeep.copy import copy_group

STRESS = bool(os.environ.get("LMPROBE_ZARR_STRESS"))
TEXTS = ("a", "bb", "ccc", "dddd")
MODEL = GROUP.model


# -------------------------------------------------------------------------------------------------------- the state machine


class ManyStores(RuleBasedStateMachine):
    """Three stores open on one root, and one that reads another root below it; a dict knows what each must show.

    It holds the newest version of everything that was ever written. Where an eviction or a repair has taken that, the store must show
    nothing: never an earlier version, which may still be stored.
    """

    @initialize()
    def open(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.root, self.upper = self.folder / "s", self.folder / "upper"
        self.stores = [lz.open_store(self.root, durable=False) for _ in range(3)]
        self.truth: Truth = {}
        self.over: Truth = {}
        self.held: list[tuple[xr.Dataset, xr.Dataset, Truth]] = []
        self.begun: list[tuple[Any, Truth]] = []
        self.layered: Store | None = None
        self.noted: Truth = {}  # columns of prompts that were evicted, which are there again with the prompt
        self.hidden: set[tuple[str, str]] = set()  # what was evicted above, and stays hidden below

    def wrote(self, batch: Any) -> None:
        """What was written is shown, with the columns that a prompt had before it was evicted."""
        before, self.truth = self.truth, written(self.truth, batch)
        found = truth_of(lz.open_store(self.root))
        for text in set(batch.text) - before.keys():
            for name, value in self.noted.get(text, {}).items():
                # A column that was damaged since is gone.
                if name not in self.truth[text] and name in found[text]:
                    assert same(found[text][name], value), f"{name} of {text!r} is not its newest version"
                    self.truth[text][name] = value

    def lost(self, texts: set[str]) -> None:
        """Of some prompts values may be gone, each of them or all; what is shown is the newest version, and the rest is as it was."""
        found = truth_of(lz.open_store(self.root))
        for text, held in found.items():
            for name, value in held.items():
                assert name in self.truth.get(text, {}), f"{name} of {text!r} has come back"
                newest = self.truth[text][name]
                # A layer that was lost in all prompts is not shown, which the arrays that are compared here do not say.
                assume(np.shape(value) == np.shape(newest))
                shown = value if name in ("label", "split") else np.where(np.isnan(value), newest, value)  # of some layers it may be gone
                assert same(shown, newest), f"{name} of {text!r} is not its newest version"
        check_equal({t: v for t, v in found.items() if t not in texts}, {t: v for t, v in self.truth.items() if t not in texts})
        for text in self.truth.keys() - found.keys():
            self.noted[text] = {name: v for name, v in self.truth[text].items() if name in ("label", "split")}
        self.truth = found

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)

    which = st.integers(0, 2)
    texts = st.lists(st.sampled_from(TEXTS), min_size=1, max_size=3, unique=True)
    seeds = st.integers(0, 10**6)

    @rule(i=which, texts=texts, seed=seeds, tokens=st.booleans(), label=st.booleans())
    def write(self, i: int, texts: list[str], seed: int, tokens: bool, label: bool) -> None:
        batch = make_batch(texts, seed=seed, tokens=tokens, columns={"label": [seed] * len(texts)} if label else None)
        self.stores[i].write(GROUP, batch)
        self.wrote(batch)

    @rule(i=which, seed=seeds)
    def begin(self, i: int, seed: int) -> None:
        """A part that is not committed yet; its place among the others is that of its beginning."""
        if len(self.begun) < 2:
            text = f"own {len(self.begun)}"  # whose place would matter, were it another's too
            batch = make_batch([text], seed=seed)
            writer = self.stores[i].new_part(GROUP)
            writer.append(batch)
            writer.storage.write(f"{writer.path}/prompts/zarr.json", b"{}", durable=False)  # so that others see it
            self.begun.append((writer, {text: written({}, batch)[text]}))

    @precondition(lambda self: self.begun)
    @rule()
    def commit(self) -> None:
        writer, added = self.begun.pop(0)
        if added.keys() & self.truth.keys():
            writer.abort()
            return
        writer.commit()
        self.truth = {**self.truth, **added}

    @precondition(lambda self: self.truth)
    @rule(i=which, seed=seeds, data=st.data())
    def annotate(self, i: int, seed: int, data: Any) -> None:
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.truth)), min_size=1, unique=True))
        values = {text: f"{seed}{text}" for text in chosen}
        self.stores[i].annotate(MODEL, {"split": values})
        self.truth = annotated(self.truth, "split", values)

    @rule(i=which, small=st.booleans())
    def compact(self, i: int, small: bool) -> None:
        self.stores[i].compact(progress=False, part_bytes=3000 if small else None)

    @rule(i=which, at_once=st.booleans())
    def gc(self, i: int, at_once: bool) -> None:
        """At once only where nobody is in the middle of anything: that is what the age is for."""
        self.stores[i].gc(max_age=0 if at_once and not self.begun else 3600)

    @precondition(lambda self: self.truth)
    @rule(i=which, data=st.data())
    def delete(self, i: int, data: Any) -> None:
        text = data.draw(st.sampled_from(sorted(self.truth)))
        self.stores[i].delete(MODEL, [text])
        self.truth = without(self.truth, (text,))

    @rule(i=which, part=st.floats(0, 1), used=st.lists(st.sampled_from(TEXTS), max_size=2))
    def evict(self, i: int, part: float, used: list[str]) -> None:
        """All of it, or the least recently used of it: whatever goes, its columns and what it had replaced do not."""
        store = self.stores[i]
        if not store.models():
            return
        view = store.view(GROUP)
        store.mark_used(view.parts_with(view.select([text for text in used if text in self.truth])))
        part = 0.0 if part < 0.2 else part
        total = sum(entry.nbytes for entry in store.entries(GROUP))
        columns = {text: {c: held[c] for c in ("label", "split") if c in held} for text, held in self.truth.items()}
        plan = lz.evict(store, max_gb=part * total / 2**30, min_age=0)
        assert plan is not None
        if not part:
            assert not store.listing(GROUP).parts
            assert not any(note.info.is_tombstone for note in store.listing(GROUP).annotations)
        gone = {row.tobytes().hex()[:16] for entry in plan.entries for row in entry.part.info.digests}
        self.lost({text for text in self.truth if lz.prompt_hash(text) in gone})
        for text, held in self.truth.items():
            assert {c: held[c] for c in ("label", "split") if c in held} == columns[text], "columns stay"

    @rule(i=which, data=st.data(), how=st.sampled_from(["flipped", "emptied", "gone"]))
    def damage_and_repair(self, i: int, data: Any, how: str) -> None:
        """A file of a part breaks; what it held is listed as lost, and nothing older shows in its place."""
        files = sorted(path for path in self.root.glob("*/**/*") if self.may_break(path, how))
        if not files:
            return
        path = data.draw(st.sampled_from(files))
        content = path.read_bytes()
        path.write_bytes(b"" if how == "emptied" else content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        if how == "gone":
            path.unlink()
        before = self.truth
        summary = self.stores[i].repair(progress=False)
        listed = {label for lost in summary.lost for label in lost.hashes} | {label for lost in summary.columns for label in lost.hashes}
        texts = {text for text in before if summary.unknown or lz.prompt_hash(text) in listed}
        self.lost(texts)

    def may_break(self, path: Path, how: str) -> bool:
        """A document or chunk of a committed part: without its document a part is the same as one that was never committed."""
        inside = path.relative_to(self.root).parts
        folder = self.root.joinpath(*inside[: 3 if inside[1] == "annotations" else 2])
        if not path.is_file() or path.name.startswith(".") or inside[1].startswith(".") or not (folder / "zarr.json").is_file():
            return False
        return path.stat().st_size > 9 and "text" not in inside and (how != "gone" or path.parent != folder)

    @rule(i=which, mode=st.sampled_from(["a", "r"]))
    def reopen(self, i: int, mode: Any) -> None:
        if mode == "a" or (self.root / "zarr.json").exists():
            check_equal(truth_of(lz.open_store(self.root, mode)), self.truth)
        self.stores[i] = lz.open_store(self.root, durable=False)

    @rule()
    def hold(self) -> None:
        """Views that stay open while all else goes on."""
        if self.stores[0].models() and len(self.held) < 3:
            self.held.append((self.stores[0].dataset(), kept_tokens(self.stores[0]), self.truth))

    @precondition(lambda self: self.held)
    @rule()
    def read_held(self) -> None:
        """What was open gives what it showed then, or says that it is gone."""
        data, tokens, truth = self.held.pop(0)
        with suppress(PartGoneError):
            check_equal(truth_of(self.stores[0], data, tokens), truth)

    @rule(texts=texts, seed=seeds)
    def write_above(self, texts: list[str], seed: int) -> None:
        if (self.root / "zarr.json").exists():
            self.layered = lz.open_store([self.root, self.upper], durable=False)
            batch = make_batch(texts, seed=seed)
            self.layered.write(GROUP, batch)
            self.over = written(self.over, batch)
            self.hidden -= {(text, name) for text in texts for name in self.over[text]}

    @precondition(lambda self: self.layered is not None)
    @rule()
    def evict_above(self) -> None:
        """What the upper store had replaced of the lower one stays hidden in both of them read as one."""
        assert self.layered is not None
        lz.evict(self.layered, max_gb=0, min_age=0)
        self.hidden |= {(t, name) for t, held in self.over.items() for name in held if name in self.truth.get(t, {})}
        self.over = {}

    @precondition(lambda self: self.layered is not None)
    @invariant()
    def what_is_above_wins(self) -> None:
        assert self.layered is not None
        found = truth_of(self.layered)
        expected = {}
        for text in self.truth.keys() | self.over.keys():
            below = {name: v for name, v in self.truth.get(text, {}).items() if (text, name) not in self.hidden}
            if text in self.over and text not in self.truth:
                below = {name: v for name, v in found.get(text, {}).items() if same(v, self.noted.get(text, {}).get(name))}
            expected[text] = {**below, **self.over.get(text, {})}
        visible = {text: held for text, held in expected.items() if held.keys() - {"label", "split"}}
        check_equal(found, visible)

    @invariant()
    def every_store_shows_the_same(self) -> None:
        if hasattr(self, "stores"):
            for store in self.stores[:2]:
                check_equal(truth_of(store), self.truth)


ManyStores.TestCase.settings = settings(
    max_examples=400 if STRESS else 8,
    stateful_step_count=40 if STRESS else 20,
    deadline=None,
    suppress_health_check=[],
    parent=settings.default,
)
TestManyStores = ManyStores.TestCase


# -------------------------------------------------------------------------------------------------------------- open views


def remove_under(what: str, store: Store) -> None:
    other = lz.open_store(store.url, durable=False)
    if what == "compacted":
        other.compact(progress=False)
    elif what == "collected":
        other.compact(progress=False)
        other.gc(max_age=0)
    elif what == "evicted":
        lz.evict(other, max_gb=0, min_age=0)
    elif what == "deleted":
        other.delete(MODEL, ["a"])
    elif what == "dropped":
        other.drop(MODEL, ["resid", "resid_mean"])
    elif what == "cleared and filled anew":
        lz.clear_cache(url=other)
        other.write(GROUP, make_batch(["zz", "yy", "a"], seed=99))


@pytest.mark.few(3)
@pytest.mark.parametrize("what", ["compacted", "collected", "evicted", "deleted", "dropped", "cleared and filled anew"])
@pytest.mark.parametrize("chunks", [None, {}])
def test_an_open_view_returns_its_values_or_raises_part_gone(root: str, what: str, chunks: Any) -> None:
    store = lz.open_store(root, durable=False)
    batches = [make_batch(["a", "b"], seed=1), make_batch(["b", "c"], seed=2)]
    for batch in batches:
        store.write(GROUP, batch)
    expected = store.dataset().resid_mean.load()
    whole = store.tokens().resid.load()
    view, tokens = store.dataset(chunks=chunks), store.tokens(chunks=chunks)
    half_read = view.resid_mean.sel(layer=0).values  # some values are read before the change
    remove_under(what, store)
    for now, then in ((view.resid_mean, expected), (tokens.resid, whole), (view.resid_mean[:, ::-1], expected[:, ::-1])):
        try:
            values = now.values
        except PartGoneError as error:
            assert "open the store again" in str(error)  # noqa: PT017
            assert what != "compacted", "a replaced part can still be read"
        else:
            assert what == "compacted"
            np.testing.assert_array_equal(values, then.values)
    np.testing.assert_array_equal(half_read, expected.sel(layer=0).values)


class Between(Wrapped):
    """A storage that lets somebody else act right before the n-th reading of a document or a list."""

    def __init__(self, inner: Any, n: int, act: Callable[[], object]) -> None:
        super().__init__(inner)
        self.n, self.act = n, act

    def _count(self) -> None:
        self.n -= 1
        if self.n == -1:
            self.act()

    def read(self, key: str) -> bytes:
        self._count()
        return super().read(key)

    def list(self, key: str) -> Any:
        self._count()
        return super().list(key)

    def is_file(self, key: str) -> bool:
        self._count()
        return super().is_file(key)


@pytest.mark.few(1)
@pytest.mark.parametrize("what", ["delete", "drop", "compact and gc"])
def test_prompts_are_never_missed_while_their_parts_are_written_again(what: str, root: str) -> None:
    """What a reader has listed may be replaced and removed before it is read; what replaced it was not in the list."""
    act: dict[str, Callable[[Store], object]] = {
        "delete": lambda s: s.delete(MODEL, ["a"]),
        "drop": lambda s: s.drop(MODEL, ["resid"]),
        "compact and gc": lambda s: (s.compact(progress=False), s.gc(max_age=0)),
    }
    truth = written(written({}, make_batch(["a", "b"], seed=1)), make_batch(["c"], seed=2))
    for n in range(60):
        here = f"{root}-{n}"
        store = lz.open_store(here, durable=False)
        store.write(GROUP, make_batch(["a", "b"], seed=1))
        store.write(GROUP, make_batch(["c"], seed=2))
        storage = Between(store.storage, n, lambda store=store: act[what](store))  # type: ignore[misc]
        data = Store(storage, mode="r").dataset()
        for text in ("b", "c"):
            assert lz.prompt_hash(text) in data.prompt.values, f"{text!r} is stored all the time (call {n})"
            with suppress(PartGoneError):
                assert same(data.resid_mean.sel(prompt=lz.prompt_hash(text)).values, truth[text]["resid_mean"])
        if storage.n >= 0:
            break
    else:
        pytest.fail("it never came to its end")
    assert n > 5


def test_a_document_forgotten_by_one_thread_is_read_again_by_another(root: str) -> None:
    """A store that threads share remembers documents; whoever removes something makes it forget what others are about to look at."""
    store = lz.open_store(root, durable=False)
    store.write(GROUP, make_batch(["a", "b"], seed=1))
    store.write(GROUP, make_batch(["c"], seed=2))

    class Forgets(Wrapped):
        def read(self, key: str) -> bytes:
            data = super().read(key)
            for path in [*shared.catalog._parts]:
                shared.forget(path)
            return data

    shared = Store(Forgets(store.storage), mode="r")
    assert len(shared.dataset().prompt) == 3


@pytest.mark.few(1)
def test_an_open_store_does_not_remember_removed_parts(root: str) -> None:
    stays, other = lz.open_store(root, durable=False), lz.open_store(root, durable=False)
    for seed in range(6):
        other.write(GROUP, make_batch(["a"], seed=seed))
        stays.dataset()
        other.compact(progress=False)
        other.gc(max_age=0)
        stays.dataset()
        assert len(stays.catalog._parts) == 1


# -------------------------------------------------------------------------------------------------------- who writes slowly


@pytest.mark.few(1)
def test_gc_spares_active_writers_and_a_writer_that_lost_its_part_raises(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CHUNK_BYTES", "REMOTE_CHUNK_BYTES", "MIN_CHUNK_BYTES"):
        monkeypatch.setattr(writer_module, name, 32)
    store = lz.open_store(root, durable=False)
    store.write(GROUP, make_batch(["a"]))
    for max_age in (3600.0, 0.0):
        batch = make_batch(["slow"], hidden=GROUP.hidden_size or 8, seed=5)
        writer = lz.open_store(root, durable=False).new_part(GROUP)
        writer.append(batch)
        assert store.storage.list(writer.path), "it is in the middle"
        time.sleep(0.01)
        summary = store.gc(max_age=max_age)
        if max_age:
            assert (summary.unfinished, summary.young) == ((), 1)
            writer.commit()
            np.testing.assert_array_equal(lz.open_store(root).dataset(prompts=["slow"]).resid_mean.values, batch.prompts["resid_mean"])
            store.delete(MODEL, ["slow"])
        else:
            assert len(summary.unfinished) == 1
            with pytest.raises(PartGoneError, match="max_age"):
                writer.commit()
            assert lz.open_store(root).dataset().text.values.tolist() == ["a"], "nothing that lacks its files is committed"


def test_who_copies_what_another_has_just_copied_never_breaks_it(tmp_path: Path) -> None:
    """Two copy the same part; the second is slower, and dies in the middle of a file that the first has committed."""
    store = lz.open_store(tmp_path / "s", durable=False)
    store.write(GROUP, make_batch(["a", "b"]))
    expected = store.dataset().load()

    class Dies(Wrapped):
        def write(self, key: str, data: Any, *, durable: bool) -> None:
            if key.endswith("c.1.0.0"):
                super().write(key, data[:10], durable=durable)
                raise OSError("died")
            super().write(key, data, durable=durable)

        def is_file(self, key: str) -> bool:
            return False if key.endswith("/zarr.json") and key.count("/") == 2 else super().is_file(key)  # it looked a moment before

    target = lz.open_store(tmp_path / "t", durable=False)
    stale = target.listing(GROUP)
    store.copy_to(tmp_path / "t", progress=False)
    with suppress(OSError):
        copy_group(
            store.storage,
            Dies(target.storage),
            GROUP,
            store.listing(GROUP),
            stale,
            None,
            target.new_part,
            durable=False,
            advance=lambda n: None,
        )
    xr.testing.assert_identical(lz.open_store(tmp_path / "t").dataset().load(), expected)


# --------------------------------------------------------------------------------------------------------------- threads


@pytest.fixture
def often_switching() -> Iterator[None]:
    """Threads take turns after every few steps."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.few(1)
def test_files_are_made_and_listed_while_others_remove_the_folders_around_them(root: str, often_switching: None) -> None:
    storage = open_storage(root)
    until = time.monotonic() + (20 if STRESS else 1.5)
    failures: list[BaseException] = []

    def make_and_remove(who: int) -> None:
        n = 0
        try:
            while time.monotonic() < until:
                n += 1
                key = f"g/annotations/{who % 2}/prompts/x/c.{who}.{n}"
                storage.write(key, b"x", durable=False)
                assert storage.read(key) == b"x"
                assert f"c.{who}.{n}" in storage.scan(key.rpartition("/")[0])
                storage.remove([key])
                storage.scan("g/annotations")
        except BaseException as error:  # noqa: BLE001 — raised again in the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=make_and_remove, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.few(1)
@pytest.mark.parametrize("shared", [True, False])
def test_threads_that_do_everything_at_once_read_right_values_or_get_an_error(root: str, shared: bool) -> None:
    """Each prompt's values tell its name and which writing of it they are, so any mixture would be noticed."""
    store = lz.open_store(root, durable=False)
    seconds = 20 if STRESS else 2.5
    until = time.monotonic() + seconds
    failures: list[BaseException] = []
    done: dict[str, int] = dict.fromkeys(["write", "read", "compact", "gc", "annotate", "delete"], 0)

    def value(text: str, version: int) -> float:
        return TEXTS.index(text) * 1000 + version % 1000

    def write(own: Store, rng: random.Random) -> None:
        texts = rng.sample(TEXTS, 2)
        versions = [rng.randrange(1000) for _ in texts]
        rows = np.array([[value(t, v)] * 4 for t, v in zip(texts, versions, strict=True)], "f4")
        lz.write_activations(own, model="m", prompts=texts, pooled={"resid_mean": {0: rows, 1: rows + 0.5}}, coords={"label": versions})

    def read(own: Store, rng: random.Random) -> None:
        data = own.dataset("m")
        values = data.resid_mean.values
        texts, labels = data.text.values.tolist(), data.label.values.tolist()
        assert sorted(set(texts)) == sorted(texts)
        for i, text in enumerate(texts):
            low, high = values[0, i], values[1, i]
            assert len({*low.tolist()}) == 1, "whole rows"
            assert (high - low == 0.5).all(), "of one writing in all layers"
            assert int(low[0]) // 1000 == TEXTS.index(text), f"never another prompt's: {text!r} shows {low[0]}"
            assert labels[i] == int(low[0]) % 1000, "with the label of the same writing"

    def act(name: str, do: Callable[[Store, random.Random], object], seed: int) -> None:
        rng = random.Random(seed)
        own = store if shared else lz.open_store(root, durable=False)
        try:
            while time.monotonic() < until:
                with suppress(PartGoneError, ModelNotStoredError, MissingPromptsError):
                    do(own, rng)
                done[name] += 1
        except BaseException as error:  # noqa: BLE001 — raised again in the test's own thread
            failures.append(error)

    def annotate(own: Store, rng: random.Random) -> None:
        own.annotate("m", {"split": {rng.choice(TEXTS): "x"}})

    def delete(own: Store, rng: random.Random) -> None:
        own.delete("m", [rng.choice(TEXTS)])
        time.sleep(0.1)

    work: list[tuple[str, Callable[[Store, random.Random], object]]] = [
        ("write", write), ("write", write), ("read", read), ("read", read), ("compact", lambda s, r: s.compact(progress=False)),
        ("gc", lambda s, r: s.gc(max_age=1.0)), ("annotate", annotate), ("delete", delete),
    ]  # fmt: skip
    threads = [threading.Thread(target=act, args=(name, do, seed)) for seed, (name, do) in enumerate(work)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert all(done.values()), done
    with suppress(ModelNotStoredError):
        read(lz.open_store(root), random.Random(0))
