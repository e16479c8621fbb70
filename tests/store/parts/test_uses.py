"""A use is a use: whatever reads values notes it, so that eviction takes what was used longest ago."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import pytest
import xarray as xr
from stores import GROUP, Wrapped, make_batch

import lmprobe_zarr as lz
from lmprobe_zarr.store.format.names import STAMPS
from lmprobe_zarr.store.parts import uses
from lmprobe_zarr.store.store import Store

TEXTS: Final = [f"prompt {i}" for i in range(12)]
LABELS: Final = [i % 2 for i in range(12)]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = lz.open_store(tmp_path / "s", durable=False)
    store.write(GROUP, make_batch(TEXTS, columns={"label": LABELS}))
    return store


def stamps(store: Store) -> list[str]:
    folder = Path(store.url) / GROUP.name / STAMPS
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def engine(store: Store) -> object:
    return xr.open_dataset(store.url, engine="lmprobe_zarr", model=GROUP.model).resid_mean.values


def batches(store: Store) -> object:
    return list(store.dataset().resid_mean.lz.batches(layer=0, batch_tokens=4))


def export(store: Store) -> object:
    return lz.export_safetensors(store, Path(store.url).parent / "out", model=GROUP.model)


USES: Final[dict[str, Callable[[Store], object]]] = {
    "a dataset": lambda s: s.dataset().resid_mean.values,
    "one value of it": lambda s: float(s.dataset().resid_mean[0, 0, 0]),
    "tokens": lambda s: s.tokens().resid[0].values,
    "Dask": lambda s: s.dataset(chunks={}).resid_mean.mean().compute(),
    "a tree": lambda s: s.datatree()[f"/{GROUP.name}/prompts"].resid_mean.values,
    "the engine": engine,
    "a sweep": lambda s: lz.sweep(s.dataset().resid_mean, labels="label", cv=2),
    "batches of prompts": batches,
    "batches of tokens": lambda s: list(s.tokens().resid.lz.batches(layer=0, batch_tokens=4)),
    "a report": lambda s: lz.report(s, Path(s.url).parent / "report.html"),
    "an export": export,
    "a pickled array": lambda s: pickle.loads(pickle.dumps(s.dataset().resid_mean)).values,  # noqa: S301 — as workers get it
}  # fmt: skip


@pytest.mark.few(6)
@pytest.mark.parametrize("use", USES)
def test_reading_is_a_use(store: Store, use: str) -> None:
    assert stamps(store) == []
    try:
        USES[use](store)
    except AttributeError as error:
        pytest.skip(str(error))
    assert stamps(store) == [part.info.name for part in store.view(GROUP).parts]


def test_looking_and_upkeep_are_no_use(store: Store, tmp_path: Path) -> None:
    data = store.dataset()
    repr(data), repr(store), store.coverage(), lz.cache_info(store=store)
    lz.list_cached_prompts(GROUP.model, store=store)
    store.write(GROUP, make_batch(["more"], columns={"label": [1]}))
    store.verify(progress=False)
    store.copy_to(tmp_path / "copy", progress=False)
    store.publish(tmp_path / "published", progress=False)
    store.compact(progress=False)
    assert stamps(store) == []


def test_only_the_parts_that_are_read_are_used(store: Store) -> None:
    store.write(GROUP, make_batch(["another"], columns={"label": [0]}))
    first, second = (part.info.name for part in store.view(GROUP).parts)
    values = store.dataset().resid_mean
    values.isel(prompt=slice(0, 3)).values  # noqa: B018
    assert stamps(store) == [first]
    values.isel(prompt=-1).values  # noqa: B018
    assert stamps(store) == sorted([first, second])


def test_a_read_only_store_and_a_store_below_are_never_written_to(store: Store, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    lz.open_store(store.url, "r").dataset().resid_mean.values  # noqa: B018
    lz.open_store([store.url, tmp_path / "upper"]).dataset().resid_mean.values  # noqa: B018
    assert sorted(tmp_path.rglob("*")) == before
    store.publish(tmp_path / "published", progress=False)
    before = sorted((tmp_path / "published").rglob("*"))
    lz.open_store(tmp_path / "published").dataset().resid_mean.values  # noqa: B018
    assert sorted((tmp_path / "published").rglob("*")) == before


def test_a_part_is_stamped_at_most_once_in_five_minutes_and_an_eviction_knows_more(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    touched: list[str] = []

    class Counts(Wrapped):
        def touch(self, key: str) -> None:
            touched.append(key)
            super().touch(key)

    counted = Store(Counts(store.storage), durable=False)
    values = counted.dataset().resid_mean
    for _ in range(20):
        values[0].values  # noqa: B018
    assert len(touched) == 1
    (entry,) = store.entries(GROUP)  # of the same root, in the same process
    assert time.time() - entry.used < 5
    assert len(touched) == 2, "an eviction asks when it was used since"
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + uses.PATIENCE + 1)
    values[0].values  # noqa: B018
    assert len(touched) == 3


def test_a_stamp_that_cannot_be_made_fails_no_reading(store: Store) -> None:
    class Refuses(Wrapped):
        def touch(self, key: str) -> None:
            raise OSError("no space")

    refusing = Store(Refuses(store.storage), durable=False)
    assert np.isfinite(refusing.dataset().resid_mean.values).all()


def test_what_is_read_is_evicted_last_and_min_age_holds(store: Store) -> None:
    store.write(GROUP, make_batch(["never read"]))
    read, other = (part.info.name for part in store.view(GROUP).parts)
    folder = Path(store.url) / GROUP.name
    hour_ago = time.time() - 3600
    entries = store.entries(GROUP)
    aged = [type(e)(part=e.part, group=e.group, nbytes=e.nbytes, committed=hour_ago, used=0.0) for e in entries]
    assert [e.part.info.name for e in lz.store.upkeep.plan_evict(aged, sum(e.nbytes for e in aged) - 1).entries] == [read]
    for name in (read, other):
        os.utime(folder / name / "zarr.json", (hour_ago, hour_ago))
    store.dataset(prompts=TEXTS[:1]).resid_mean.values  # noqa: B018
    total = sum(e.nbytes for e in entries)
    aged = [type(e)(part=e.part, group=e.group, nbytes=e.nbytes, committed=hour_ago, used=e.used) for e in store.entries(GROUP)]
    plan = lz.store.upkeep.plan_evict(aged, total - 1, min_age=600)
    assert [entry.part.info.name for entry in plan.entries] == [other]
    everything = lz.store.upkeep.plan_evict(aged, 0, min_age=600)
    assert [entry.part.info.name for entry in everything.entries] == [other], "what was used within min_age stays"


def test_noting_a_use_imports_no_torch(store: Store) -> None:
    script = f"""
import sys
import lmprobe_zarr as lz
lz.open_store({store.url!r}).dataset().resid_mean.values
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ})
    assert len(stamps(store)) == 1
