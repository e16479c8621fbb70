from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from conftest import GROUP, make_batch

import lmprobe_zarr as lz
from lmprobe_zarr.errors import InvalidArgumentError, NoSpaceError
from lmprobe_zarr.ingest import Ingest
from lmprobe_zarr.store import Store


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
    monkeypatch.setattr("lmprobe_zarr.ingest.COLUMN_BYTES", 1000)
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

    monkeypatch.setattr("lmprobe_zarr.writer.PartWriter.append", fail)
    monkeypatch.setattr("lmprobe_zarr.writer.PartWriter.abort", lambda _: (_ for _ in ()).throw(RuntimeError("and the cleaning up too")))
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


def test_nothing_is_taken_outside_of_the_context(store: Store) -> None:
    ingest = Ingest(store, GROUP)
    with pytest.raises(InvalidArgumentError, match="inside of the context"):
        ingest.put(make_batch(["a"]))
    with ingest:
        ingest.put(make_batch(["a"]))
    with pytest.raises(InvalidArgumentError, match="inside of the context"):
        ingest.put(make_batch(["b"]))
    assert store.dataset().text.values.tolist() == ["a"]
