from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from stores import GROUP, make_batch

import lmprobe_zarr as lz
from lmprobe_zarr.batch import TokenBatch
from lmprobe_zarr.errors import InvalidArgumentError, NoSpaceError
from lmprobe_zarr.store.ingest import Ingest
from lmprobe_zarr.store.store import Store


def alive() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "lmprobe-zarr-ingest"]


def test_batches_become_parts_by_size(store: Store) -> None:
    size = make_batch(["a"]).nbytes
    with Ingest(store, GROUP, part_bytes=2 * size) as ingest:
        for name in "abcdeabc"[:5]:
            ingest.put(make_batch([name]))
    assert len(ingest.parts) == 3
    assert ingest.prompts == 5
    assert store.dataset().text.values.tolist() == list("abcde")


def test_a_part_is_committed_when_it_is_old_though_nothing_follows(store: Store) -> None:
    with Ingest(store, GROUP, part_seconds=0.2) as ingest:
        ingest.put(make_batch(["a"]))
        deadline = time.monotonic() + 30
        while not ingest.parts and time.monotonic() < deadline:
            time.sleep(0.05)
        assert lz.open_store(store.url).dataset().sizes["prompt"] == 1


def test_texts_count_towards_memory(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmprobe_zarr.store.ingest.COLUMN_BYTES", 1000)
    with Ingest(store, GROUP) as ingest:
        for i in range(4):
            ingest.put(make_batch([f"{i}" * 600], tokens=False))
    assert len(ingest.parts) == 2


@pytest.mark.parametrize("failure", [NoSpaceError("full"), RuntimeError("anything"), KeyboardInterrupt()])
def test_a_failure_of_the_writing_reaches_whoever_puts_and_never_hangs(
    store: Store, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    store.write(GROUP, make_batch(["before"]))

    def fail(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr("lmprobe_zarr.store.parts.writer.PartWriter.append", fail)
    monkeypatch.setattr(
        "lmprobe_zarr.store.parts.writer.PartWriter.abort", lambda _: (_ for _ in ()).throw(RuntimeError("and the cleaning up too"))
    )
    with pytest.raises(type(failure)), Ingest(store, GROUP) as ingest:
        for i in range(50):
            ingest.put(make_batch([str(i)]))
    assert not alive()
    assert lz.open_store(store.url).dataset().text.values.tolist() == ["before"]


def test_a_failing_source_keeps_what_was_put(store: Store) -> None:
    with pytest.raises(ValueError, match="the source"), Ingest(store, GROUP) as ingest:
        ingest.put(make_batch(["a"]))
        raise ValueError("the source")
    assert store.dataset().text.values.tolist() == ["a"]
    assert np.isfinite(store.dataset().resid_mean.values).all()
    assert not alive()


def test_batches_are_made_on_the_thread_that_writes_them_in_the_order_in_which_they_were_put(store: Store) -> None:
    threads: set[str] = set()

    def made(names: str) -> Iterator[TokenBatch]:
        for name in names:
            threads.add(threading.current_thread().name)
            yield make_batch([name])

    with Ingest(store, GROUP) as ingest:
        ingest.put(make_batch(["a"]))
        ingest.put_all(made("bcd"))
        ingest.put_all(made("ef"))
        ingest.put(make_batch(["g"]))
    assert threads == {"lmprobe-zarr-ingest"}
    assert store.dataset().text.values.tolist() == list("abcdefg")


@pytest.mark.few(1)
def test_no_more_batches_are_handed_over_than_those_that_are_made_already(store: Store) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def waiting() -> Iterator[TokenBatch]:
        begun.set()
        go_on.wait(30)
        yield make_batch(["a"])

    with Ingest(store, GROUP) as ingest:
        ingest.put_all(waiting())
        begun.wait(30)
        second = threading.Thread(target=ingest.put_all, args=(iter([make_batch(["b"])]),))
        second.start()
        second.join(0.3)
        assert second.is_alive(), "it waits until the first ones have been taken"
        go_on.set()
        second.join(30)
        assert not second.is_alive()
    assert store.dataset().text.values.tolist() == ["a", "b"]


@pytest.mark.parametrize("failure", [NoSpaceError("full"), RuntimeError("anything")])
def test_a_batch_that_cannot_be_made_fails_the_writing(store: Store, failure: Exception) -> None:
    store.write(GROUP, make_batch(["before"]))

    def failing() -> Iterator[TokenBatch]:
        yield make_batch(["a"])
        raise failure

    with pytest.raises(type(failure), match=str(failure)), Ingest(store, GROUP) as ingest:
        for _ in range(50):
            ingest.put_all(failing())
    assert not alive()
    assert lz.open_store(store.url).dataset().text.values.tolist() == ["before"]


def test_nothing_is_taken_outside_of_the_context(store: Store) -> None:
    ingest = Ingest(store, GROUP)
    with pytest.raises(InvalidArgumentError, match="inside of the context"):
        ingest.put(make_batch(["a"]))
    with ingest:
        ingest.put(make_batch(["a"]))
    with pytest.raises(InvalidArgumentError, match="inside of the context"):
        ingest.put(make_batch(["b"]))
    with pytest.raises(InvalidArgumentError, match="inside of the context"):
        ingest.put_all(iter([make_batch(["b"])]))
    assert store.dataset().text.values.tolist() == ["a"]


def test_batches_of_several_kinds_go_into_parts_of_their_own(store: Store) -> None:
    with Ingest(store, GROUP) as ingest:
        ingest.put(make_batch(["a", "b"], layers=(0, 1)))
        ingest.put(make_batch(["c"], layers=(2,), dtype="float16"))
        ingest.put(make_batch(["d"], layers=(0, 1), seed=2))
        ingest.put(make_batch(["a"], layers=(3,), tokens=False))
    assert len(ingest.parts) == 3
    assert ingest.prompts == 4, "a prompt in two parts counts once"
    view = store.view(GROUP)
    assert sorted(len(part.info.digests) for part in view.parts) == [1, 1, 3]
    assert store.coverage().sel(variable="resid_mean", prompt=lz.prompt_hash("a")).values.tolist() == [True, True, False, True]


def test_open_parts_together_hold_no_more_than_one_may(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmprobe_zarr.store.ingest.BUFFER_BYTES", 20_000)
    with Ingest(store, GROUP) as ingest:
        for i in range(12):
            ingest.put(make_batch([f"{i}-{j}" for j in range(10)], layers=tuple(range(1 + i % 4))))
            waiting = sum(part.writer.waiting_nbytes for part in ingest._open.values())
            assert waiting < 60_000
    assert ingest.prompts == 120


def test_no_part_is_larger_than_part_bytes(store: Store) -> None:
    prompt_nbytes = make_batch(["x" * 4], tokens=True).nbytes
    with Ingest(store, GROUP, part_bytes=3 * prompt_nbytes) as ingest:
        ingest.put(make_batch([f"{i:04}" for i in range(20)]))
        ingest.put(make_batch([f"{i:04}" for i in range(20, 25)]))
    sizes = [
        sum(a.shape[0] * a.shape[1] * a.shape[2] * 4 for a in p.info.arrays.values() if len(a.dims) == 3) for p in store.view(GROUP).parts
    ]
    assert max(sizes) <= 3 * prompt_nbytes
    assert len(sizes) <= 13, "and they are filled"
    assert ingest.prompts == 25
    for i in (0, 7, 24):
        texts = [f"{j:04}" for j in (range(20) if i < 20 else range(20, 25))]
        truth = make_batch(texts).prompts["resid_mean"][:, i if i < 20 else i - 20]
        np.testing.assert_array_equal(store.dataset(prompts=[f"{i:04}"]).resid_mean.values[:, 0], truth)


def test_a_prompt_larger_than_a_part_is_a_part_of_its_own(store: Store) -> None:
    with Ingest(store, GROUP, part_bytes=10) as ingest:
        ingest.put(make_batch(["aaaa", "bbbb"]))
    assert len(ingest.parts) == 2
