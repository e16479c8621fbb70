"""Parts of version 1 and version 2 side by side are read as one, and old parts are written again without a change to the view."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import independent_reader
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from command_line import call, call_json
from make_old_store import shown
from paths import OLD_STORES
from stores import GROUP, kept_tokens, make_batch
from versions import small_chunks, write_part, write_version

import lmprobe_zarr as lz
from lmprobe_zarr.batch.token_batch import TokenBatch
from lmprobe_zarr.store.parts import Part
from lmprobe_zarr.store.store import Store
from lmprobe_zarr.store.upkeep.evict import remove_entries

HIDDEN = 1200  # 60 rows are more than 128 KiB, so that their chunks have blocks


def batches() -> list[TokenBatch]:
    """Ten prompts and sixty tokens and more each; prompts come again, in other layers, with other tokens and without."""

    def batch(texts: list[str], seed: int, **options: Any) -> TokenBatch:
        counts = [6 + (7 * seed + i) % 3 if "other" in options else 6 + i % 3 for i in range(len(texts))]
        options.pop("other", None)
        return make_batch(texts, hidden=HIDDEN, seed=seed, n_tokens=counts if options.get("tokens", True) else None, **options)

    texts = [f"prompt {i}" for i in range(14)]
    return [
        batch(texts[:10], 1, columns={"label": list(range(10)), "split": ["train", "tést"] * 5}),
        batch(texts[:5], 2, layers=(1, 2)),
        batch(texts[3:12], 3, tokens=False),
        batch(texts[9:14], 4, other=True, columns={"label": [70, 71, 72, 73, 74], "split": [""] * 5}),
        batch(texts[6:8], 5, layers=(0, 1, 2, 3), tokens=False),
    ]


#: Version of each part in turn, and whether it has shards.
ORDERS = {
    "old, then new": [(1, False), (1, False), (2, False), (2, True), (2, True)],
    "new, then old": [(2, True), (2, False), (1, False), (1, False), (1, False)],
    "in turn": [(1, False), (2, True), (1, False), (2, False), (1, False)],
    "all old": [(1, False)] * 5,
}


@pytest.fixture(params=ORDERS)
def mixed(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store of parts of both versions, and annotations of both."""
    store = lz.open_store(tmp_path / "s", durable=False)
    order = ORDERS[request.param]
    with monkeypatch.context() as patched:
        small_chunks(patched, 2**18, in_shard=2)
        for number, (batch, (version, shards)) in enumerate(zip(batches(), order, strict=True)):
            write_version(patched, version)
            info = write_part(store, GROUP, batch, shards=shards, compressed=number != 1)
            assert info.version == version
        for (version, _), columns in zip(
            order, ({"judge": {"prompt 1": 0.5}}, {"judge": {"prompt 1": 0.25, "prompt 13": 1.0}}), strict=False
        ):
            write_version(patched, version)
            store.annotate(GROUP.model, columns)
    versions = {part.info.version for part in store.view(GROUP).parts}
    assert versions == ({1} if request.param == "all old" else {1, 2})
    return store


def content(store: Store) -> tuple[xr.Dataset, xr.Dataset]:
    return store.dataset(dtype="stored").load(), kept_tokens(store).load()


def assert_same(found: tuple[xr.Dataset, xr.Dataset], expected: tuple[xr.Dataset, xr.Dataset]) -> None:
    for one, other in zip(found, expected, strict=True):
        xr.testing.assert_identical(one.drop_attrs(deep=False), other.drop_attrs(deep=False))


def versions_of(store: Store) -> list[int]:
    """Of each visible part and annotation, but tombstones."""
    listing = store.listing(GROUP)
    every: list[Part] = [*listing.parts, *listing.annotations]
    return [part.info.version for part in every if part.info.name not in listing.replaced and not part.info.is_tombstone]


def check_values(store: Store) -> None:
    """What `shown` computes by loops from the batches is what each way of reading gives."""
    expected = shown(batches())
    data, tokens = content(store)
    assert data.prompt_sha256.values.tolist() == expected["prompt_sha256"].tolist()
    for name, level, dim in (("resid_mean", "prompts", "prompt"), ("resid", "tokens", "token")):
        dataset = data if level == "prompts" else tokens
        np.testing.assert_array_equal(dataset[name].transpose("layer", dim, "hidden").values, expected[f"{level}/{name}"])
    np.testing.assert_array_equal(tokens.token_id.values, expected["tokens/token_id"])
    labels = [0, 1, 2, 3, 4, 5, 6, 7, 8, 70, 71, 72, 73, 74]  # those of prompts 9 to 13 are the fourth part's
    np.testing.assert_array_equal(data.label.values, labels)
    np.testing.assert_array_equal(data.judge.values, np.where(np.arange(14) == 1, 0.25, np.where(np.arange(14) == 13, 1.0, np.nan)))


@pytest.mark.few(2)
def test_a_store_of_both_versions_reads_as_one(mixed: Store) -> None:
    check_values(mixed)
    expected = shown(batches())
    # Lazily, and few rows at a time, which parts of version 2 read from their blocks.
    lazy = mixed.dataset(dtype="stored").resid_mean
    for row in (0, 4, 9, 13):
        np.testing.assert_array_equal(lazy[:, row].values, expected["prompts/resid_mean"][:, row])
    tokens = mixed.tokens(dtype="stored").resid.transpose("layer", "token", "hidden")
    for rows in ([0], [3, 40, 41], [70, 2], list(range(10, 30))):
        np.testing.assert_array_equal(tokens[:, rows].values, expected["tokens/resid"][:, rows])
    some = mixed.dataset(prompts=["prompt 11", "prompt 2"], layers=[1, 3], dtype="stored")
    np.testing.assert_array_equal(
        some.resid_mean.transpose("layer", "prompt", "hidden").values, expected["prompts/resid_mean"][1::2][:, [11, 2]]
    )


@pytest.mark.few(1)
def test_the_independent_reader_shows_the_same(mixed: Store) -> None:
    read = independent_reader.read_group(Path(mixed.url) / GROUP.name)
    expected = shown(batches())
    for level, name in (("prompts", "resid_mean"), ("tokens", "resid")):
        np.testing.assert_array_equal(read[f"{level}.{name}"].swapaxes(0, 1), expected[f"{level}/{name}"])
    data, _ = content(mixed)
    np.testing.assert_array_equal(read["prompts.label"], data.label.values)
    np.testing.assert_array_equal(read["prompts.judge"], data.judge.values)
    assert pd.Series(read["prompts.split"]).equals(pd.Series(data.split.values))


def test_every_check_accepts_it_and_sees_damage_in_parts_of_each_version(mixed: Store) -> None:
    assert mixed.verify(progress=False).ok
    for part in mixed.view(GROUP).parts:
        path = next((Path(mixed.url) / part.path / "prompts" / "resid_mean").glob("c.*"))
        whole = path.read_bytes()
        path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:])
        (problem,) = lz.open_store(mixed.url).verify(progress=False).problems
        assert problem.file == f"{part.path}/prompts/resid_mean/{path.name}"
        path.write_bytes(whole)


@pytest.mark.few(1)
def test_compaction_joins_parts_of_both_versions(mixed: Store) -> None:
    # Two more of equal shape at the end, of which one is old.
    later = [make_batch([f"later {i}" for i in range(20)], hidden=HIDDEN, seed=8), make_batch(["later 3", "new"], hidden=HIDDEN, seed=9)]
    with pytest.MonkeyPatch.context() as patched:
        for version, batch in zip((1, 2), later, strict=True):
            write_version(patched, version)
            write_part(mixed, GROUP, batch)
    before = content(mixed)
    plan = mixed.compact(progress=False)
    assert any({part.info.version for part in run.parts} == {1, 2} for run in plan.runs)
    for store in (mixed, lz.open_store(mixed.url)):
        assert_same(content(store), before)
    merged = mixed.view(GROUP).parts[-1]
    assert merged.info.version == 2
    mixed.gc(max_age=0)
    assert_same(content(lz.open_store(mixed.url)), before)
    assert mixed.verify(progress=False).ok


@pytest.mark.parametrize("shards", [True, False])
@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.few(1)
def test_old_parts_are_upgraded_with_the_same_view(mixed: Store, shards: bool, by_hand: bool, capsys: pytest.CaptureFixture[str]) -> None:
    before, held = content(mixed), versions_of(mixed)
    options = ["--all", *([] if shards else ["--no-shards"])]
    files = {path: path.stat().st_mtime_ns for path in Path(mixed.url).rglob("*") if path.is_file() and ".used" not in path.parts}
    planned = mixed.compact(upgrade=True, shards=shards, dry_run=True, progress=False)
    assert {path: path.stat().st_mtime_ns for path in files} == files, "a dry run writes nothing"
    if by_hand:
        done = mixed.compact(upgrade=True, shards=shards, progress=False)
        assert [[part.path for part in run.parts] for run in done.runs] == [[part.path for part in run.parts] for run in planned.runs]
        assert not done.left
    else:
        code, out, err = call(capsys, "compact", mixed.url, *options)
        assert code == 0, err
        alone = sum(len(run.parts) == 1 for run in planned.runs)
        assert f"{alone} of them only change their format" in out
    assert 1 in held
    assert set(versions_of(mixed)) == {2}
    for store in (mixed, lz.open_store(mixed.url)):
        assert_same(content(store), before)
    check_values(mixed)
    assert mixed.verify(progress=False).ok
    mixed.gc(max_age=0)
    check_values(lz.open_store(mixed.url))
    assert b'"format_version":1,"kind":"part"' not in b"".join(path.read_bytes() for path in Path(mixed.url).glob("*/*/zarr.json"))
    assert call_json(capsys, "compact", mixed.url, *options)["runs"] == [], "there is nothing left to do"
    read = independent_reader.read_group(Path(mixed.url) / GROUP.name)
    np.testing.assert_array_equal(read["tokens.resid"].swapaxes(0, 1), shown(batches())["tokens/resid"])


def test_a_tombstone_hides_the_same_after_an_upgrade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older, newer, other = batches()[0], batches()[1], make_batch(["x"], hidden=HIDDEN, seed=7)
    write_version(monkeypatch, 1)
    store = lz.open_store(tmp_path / "s", durable=False)
    store.write(GROUP, older)
    gone = store.write(GROUP, newer)
    remove_entries(store.catalog, [entry for entry in store.entries(GROUP) if entry.part.info.name == gone])
    store.write(GROUP, other)
    monkeypatch.undo()
    before = content(store)
    assert np.isnan(before[0].resid_mean.sel(layer=1).values[:5]).all()
    assert not np.isnan(before[0].resid_mean.sel(layer=0).values).any()
    store.compact(upgrade=True, progress=False)
    assert set(versions_of(store)) == {2}
    for _ in range(2):
        for each in (store, lz.open_store(tmp_path / "s")):
            assert_same(content(each), before)
        store.gc(max_age=0)
    tombstones = [note for note in store.view(GROUP).annotations if note.info.is_tombstone]
    assert [note.info.removed["prompts/resid_mean"] for note in tombstones] == [(1, 2)]


def test_columns_of_every_kind_and_what_a_part_records_survive_an_upgrade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_version(monkeypatch, 1)
    store = lz.open_store(tmp_path / "s", durable=False)
    columns: dict[str, Any] = {
        "number": [1, None, 3],
        "when": pd.Series(np.array(["2026-01-31T08:30:00.000001", "NaT", "1999-12-31"], "M8[us]")).dt.tz_localize("UTC"),
        "kind": pd.Categorical(["b", None, "a"], categories=["c", "b", "a"], ordered=True),
        "long": pd.to_timedelta(["1s", "2D", None]),
        "seen": [True, None, False],
        "big": [2**62, None, 1],
        "nothing": [None, None, None],
    }
    batch = make_batch(["a", "bb", "ccc"], columns=columns, dtype="float32")
    batch = replace(batch, stored_dtype={"resid": "bfloat16"}, prompts={**batch.prompts, "resid_mean": batch.prompts["resid_mean"] * 0})
    batch.tokens["resid"][0, 0, 0] = np.inf
    store.write(GROUP, batch, recorded={"device": "cuda", "mixers": ["attention", "mamba"]})
    monkeypatch.undo()
    before, old = content(store), store.view(GROUP).parts[0].info
    store.compact(upgrade=True, progress=False)
    (new,) = (part.info for part in lz.open_store(tmp_path / "s").view(GROUP).parts)
    assert (old.version, new.version) == (1, 2)
    assert_same(content(lz.open_store(tmp_path / "s")), before)
    assert new.odd == old.odd == {"prompts/resid_mean": (0, 9), "tokens/resid": (1, 0)}
    assert {key: new.recorded[key] for key in ("device", "mixers", "written")} == {
        key: old.recorded[key] for key in ("device", "mixers", "written")
    }
    assert {key: a.attributes for key, a in new.arrays.items()} == {key: a.attributes for key, a in old.arrays.items()}


def test_the_committed_store_of_version_1_is_upgraded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(OLD_STORES / "version-1", tmp_path / "old")
    store = lz.open_store(tmp_path / "old" / "store")
    before = {name: (store.dataset(group=name).load(), store.tokens(group=name).load()) for name in store.groups()}
    assert call(capsys, "compact", store.url, "--all")[0] == 0
    for name in store.groups():
        view = store.view(store.find_group(group=name))
        assert {part.info.version for part in (*view.parts, *view.annotations)} == {2}
        assert_same((store.dataset(group=name).load(), store.tokens(group=name).load()), before[name])
        independent_reader.read_group(tmp_path / "old" / "store" / name)
    store.gc(max_age=0)
    again = lz.open_store(store.url)
    for name, shown_before in before.items():
        assert_same((again.dataset(group=name).load(), again.tokens(group=name).load()), shown_before)
    assert again.verify(progress=False).ok


@pytest.mark.few(2)
def test_a_published_copy_names_the_version_of_each_part(mixed: Store, tmp_path: Path) -> None:
    before = content(mixed)
    mixed.publish(tmp_path / "published", progress=False)
    published = lz.open_store(tmp_path / "published")
    assert_same(content(published), before)
    root = json.loads((tmp_path / "published" / "zarr.json").read_bytes())
    said = root["consolidated_metadata"]["metadata"]
    parts = published.view(GROUP).parts
    assert {part.path: said[part.path]["attributes"]["format_version"] for part in parts} == {
        part.path: part.info.version for part in parts
    }
    assert root["attributes"]["format_version"] == said[GROUP.name]["attributes"]["format_version"] == 1


@pytest.mark.few(2)
def test_a_copy_keeps_the_version_of_each_part(mixed: Store, tmp_path: Path) -> None:
    before, held = content(mixed), versions_of(mixed)
    mixed.copy_to(tmp_path / "copy", progress=False)
    copy = lz.open_store(tmp_path / "copy")
    assert_same(content(copy), before)
    assert versions_of(copy) == held
    assert copy.verify(progress=False).ok
