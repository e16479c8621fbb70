"""What was replaced never comes back, whatever takes away the part that replaced it. The oracle is a dictionary of versions."""

from __future__ import annotations

import os
import random
import shutil
import warnings
from pathlib import Path
from typing import Any, Final

import independent_reader
import numpy as np
import pytest
from stores import GROUP, kept_tokens
from versions import write_version

import lmprobe_zarr as lz
from lmprobe_zarr.batch.hashes import prompt_sha256
from lmprobe_zarr.batch.token_batch import TokenBatch
from lmprobe_zarr.errors import CacheWarning, CorruptPartError, UnsupportedVersionError
from lmprobe_zarr.store.format import part as part_module
from lmprobe_zarr.store.format.names import check_version
from lmprobe_zarr.store.format.part import parse_part, part_document
from lmprobe_zarr.store.store import Store
from lmprobe_zarr.store.upkeep.evict import remove_entries

STRESS: Final = bool(os.environ.get("LMPROBE_ZARR_STRESS"))
TEXTS: Final = ("a", "bb", "ccc", "dddd")
VARIABLES: Final = ("resid_mean", "attn_mean", "resid", "embed_mean", "label")
#: What is shown of a cell: (prompt, variable, layer) to the number of the version; each version's values are its number.
Versions = dict[tuple[str, str, int], int]


def version(
    number: int, texts: list[str], names: list[str], layers: tuple[int, ...], *, counts: int = 2, label: bool = False
) -> tuple[TokenBatch, Versions]:
    """A batch whose values are all the number of the version, and the cells that it writes."""
    n = len(texts)
    tokens, pooled = [name for name in names if name == "resid"], [name for name in names if name != "resid"]
    cells = {(t, name, layer): number for t in texts for name in names for layer in ((-1,) if name == "embed_mean" else layers)}
    if label:
        cells |= {(t, "label", -1): number for t in texts}
    batch = TokenBatch(
        sha256=[prompt_sha256(t) for t in texts],
        text=texts,
        layers=layers if set(names) - {"embed_mean"} else (),
        n_tokens=np.full(n, counts) if tokens else None,
        tokens={name: np.full((len(layers), n * counts, 4), number, "f4") for name in tokens},
        prompts={name: np.full((n, 4) if name == "embed_mean" else (len(layers), n, 4), number, "f4") for name in pooled},
        unlayered=frozenset({"embed_mean"} & set(names)),
        prompt_columns={"label": np.full(n, number)} if label else {},
    )
    return batch, cells


def shown(store: Store) -> Versions:
    """The versions that a store shows; an absent value is left out."""
    if not store.models():
        return {}
    found: Versions = {}
    data, tokens = store.dataset().load(), kept_tokens(store).load()
    texts = {lz.prompt_hash(text): text for text in TEXTS}
    for label in data.prompt.values.tolist():
        row = data.sel(prompt=label)
        for name in row.data_vars:
            values = row[name].values
            for layer, value in zip(row.layer.values.tolist() if values.ndim > 1 else [-1], np.atleast_2d(values), strict=True):
                if not np.isnan(value).all():
                    assert len(set(value.tolist())) == 1
                    found[texts[label], str(name), layer] = int(value[0])
        if "label" in row.coords and not np.isnan(row.label.values):
            found[texts[label], "label", -1] = int(row.label.values)
    for name in tokens.data_vars:
        for text in TEXTS:
            mine = tokens[name].values[:, tokens.prompt.values == lz.prompt_hash(text)]
            for layer, value in zip(tokens.layer.values.tolist(), mine, strict=True):
                if value.size and not np.isnan(value).all():
                    assert len(set(value.reshape(-1).tolist())) == 1
                    found[text, str(name), layer] = int(value.flat[0])
    return found


def entry_of(store: Store, name: str) -> Any:
    (entry,) = (entry for entry in store.entries(GROUP) if entry.part.info.name == name)
    return entry


def take(store: Store, name: str) -> None:
    """Evict this part and no other."""
    remove_entries(store.catalog, [entry_of(store, name)])


def kept(before: Versions, gone: Versions, *, columns: bool = True) -> Versions:
    """What is shown once everything that `gone` wrote and nobody wrote later is gone; a prompt without values is gone with its columns."""
    left = {cell: n for cell, n in before.items() if gone.get(cell) != n or (cell[1] == "label" and columns)}
    texts = {text for text, name, _ in left if name != "label"}
    return {cell: n for cell, n in left.items() if cell[0] in texts}


OLDER: Final = version(1, ["a", "bb", "ccc"], ["resid_mean", "attn_mean", "resid", "embed_mean"][:3], (0, 1, 2), label=True)
NEWER: Final = {
    "all of a prompt": version(2, ["a", "dddd"], ["resid_mean", "attn_mean", "resid"], (0, 1, 2), label=True),
    "one variable": version(2, ["a", "bb"], ["attn_mean"], (0, 1, 2)),
    "one layer": version(2, ["a", "bb"], ["resid_mean"], (1,), label=True),
    "layers that the older lacks, and one that it has": version(2, ["a"], ["resid_mean"], (2, 3)),
    "tokens alone": version(2, ["a", "bb"], ["resid"], (0, 1, 2)),
    "tokens of some layers": version(2, ["a"], ["resid"], (1,)),
    "tokens of another number": version(2, ["a", "bb"], ["resid"], (1,), counts=3),
    "everything": version(2, ["a", "bb", "ccc"], ["resid_mean", "attn_mean", "resid"], (0, 1, 2), label=True),
}


@pytest.fixture
def place(tmp_path: Path) -> str:
    """A local folder, whose files are damaged."""
    return str(tmp_path / "s")


@pytest.fixture(params=NEWER)
def newer(request: pytest.FixtureRequest) -> tuple[TokenBatch, Versions]:
    return NEWER[request.param]


@pytest.fixture
def two(place: str, newer: tuple[TokenBatch, Versions]) -> tuple[Store, str, Versions]:
    """A store with an older and a newer part; the newer one's name, and what is shown."""
    store = lz.open_store(place, durable=False)
    store.write(GROUP, OLDER[0])
    name = store.write(GROUP, newer[0])
    before = {**OLDER[1], **newer[1]}
    if newer[0].n_tokens is not None and int(newer[0].n_tokens[0]) == 3:
        # Tokens of another number put all tokens of the prompt out of date.
        before = {cell: n for cell, n in before.items() if n == 2 or cell[1] != "resid" or cell[0] not in (newer[0].text or ())}
    assert shown(store) == before
    return store, name, before


@pytest.mark.few(2)
def test_what_an_evicted_part_had_replaced_stays_hidden(two: tuple[Store, str, Versions], newer: tuple[TokenBatch, Versions]) -> None:
    store, name, before = two
    take(store, name)
    after = kept(before, newer[1])
    assert shown(store) == after
    assert shown(lz.open_store(store.url)) == after
    assert store.verify(progress=False).ok
    again = store.write(GROUP, newer[0])
    assert shown(store) == before, "and is shown once it was written again"
    take(store, again)
    assert shown(store) == after


@pytest.mark.few(2)
@pytest.mark.parametrize("how", ["its document", "no document", "a chunk", "all chunks"])
def test_what_a_damaged_part_had_replaced_stays_hidden_and_is_listed(
    two: tuple[Store, str, Versions], newer: tuple[TokenBatch, Versions], how: str
) -> None:
    store, name, before = two
    folder = Path(store.url) / GROUP.name / name
    chunks = sorted(path for path in folder.rglob("c.*") if path.parent.name in VARIABLES)
    if how == "no document":
        (folder / "zarr.json").unlink()
        with pytest.raises(CorruptPartError, match=f"{name}/zarr.json is missing, though the part was committed"):
            shown(store)
        (problem,) = lz.open_store(store.url).verify(progress=False).problems
        assert (problem.part, problem.kind) == (f"{GROUP.name}/{name}", "missing")
        with pytest.warns(CacheWarning, match="is missing"):
            assert not store.gc(max_age=0).unfinished, "what is left of it is no garbage"
        chunks = []
    for path in [folder / "zarr.json"] if how == "its document" else chunks[:1] if how == "a chunk" else chunks:
        content = path.read_bytes()
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    summary = store.repair(progress=False)
    found = shown(lz.open_store(store.url))
    for cell, number in found.items():
        assert number == before[cell], f"{cell} has come back"
    listed = {
        (text, name, layer) for lost in summary.lost for text in lost.prompts for name in lost.variables for layer in lost.layers or (-1,)
    }
    listed |= {(text, column.column, -1) for column in summary.columns for text in TEXTS if lz.prompt_hash(text) in column.hashes}
    texts = {text for text, name, _ in found if name != "label"}
    missing = {cell for cell in before.keys() - found.keys() if cell[1] != "label" or cell[0] in texts}
    assert missing <= listed, "what is lost is listed"
    assert listed <= newer[1].keys(), "and nothing else"
    assert store.repair(progress=False).changes == 0
    store.write(GROUP, newer[0])
    assert shown(store) == before


@pytest.mark.few(4)
def test_whoever_leaves_out_a_damaged_part_is_not_served_by_what_it_had_replaced(
    two: tuple[Store, str, Versions], newer: tuple[TokenBatch, Versions]
) -> None:
    """`extract` and `Probe` read around damage; what is hidden to them is run again."""
    store, name, _ = two
    path = Path(store.url) / GROUP.name / name / "zarr.json"
    path.write_bytes(path.read_bytes()[:-20])
    reader = lz.open_store(store.url, "r")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CacheWarning)
        view = reader.view(GROUP, whole=False)
    rows = view.find([prompt_sha256(text) for text in TEXTS])
    for text, name_, layer in newer[1]:
        row = rows[TEXTS.index(text)]
        if row >= 0 and name_ != "label":
            level = "tokens" if name_ == "resid" else "prompts"
            assert not view.covers(level, name_, np.array([row]), (layer,) if layer >= 0 else ()).any(), (text, name_)  # type: ignore[arg-type]


@pytest.mark.few(2)
def test_hidden_stays_hidden_through_every_verb(
    two: tuple[Store, str, Versions], newer: tuple[TokenBatch, Versions], tmp_path: Path
) -> None:
    store, name, before = two
    store.copy_to(tmp_path / "earlier", progress=False)
    take(store, name)
    after = kept(before, newer[1])
    store.copy_to(tmp_path / "copied", progress=False)
    assert shown(lz.open_store(tmp_path / "copied")) == {c: n for c, n in after.items() if n == 1 or c[1] == "label"}
    if after:
        store.publish(tmp_path / "published", progress=False)
        published = lz.open_store(tmp_path / "published")
        assert shown(published) == after
        assert not any(note.info.is_tombstone for note in published.view(GROUP).annotations), "nothing hidden is published"
    store.compact(progress=False)
    assert shown(store) == after
    store.gc(max_age=0)
    assert shown(store) == after
    layered = lz.open_store([store.url, tmp_path / "upper"])
    assert shown(layered) == after
    if not after:
        return
    if ("ccc", "resid_mean", 0) in after:
        store.delete(GROUP.model, ["ccc"])
    left = {cell: n for cell, n in after.items() if cell[0] != "ccc"}
    assert shown(store) == left
    names = {n for _, n, _ in left if n not in ("label", "resid_mean")}
    if names:
        gone = min(names)
        store.drop(GROUP.model, [gone])
        texts = {t for t, n, _ in left if n not in ("label", gone)}
        assert {cell for cell in shown(store) if cell[0] in texts} == {c for c in left if c[1] != gone and c[0] in texts}
        assert shown(store).items() <= left.items()


@pytest.mark.few(2)
def test_a_tombstone_goes_once_there_is_nothing_left_to_hide(two: tuple[Store, str, Versions]) -> None:
    store, name, _ = two
    take(store, name)
    assert [note.info.removed for note in store.view(GROUP).annotations if note.info.is_tombstone]
    lz.evict(store, max_gb=0, min_age=0)
    assert not [note for note in store.listing(GROUP).annotations if note.info.is_tombstone]
    assert store.models() == []


def test_of_a_chain_of_versions_only_the_newest_is_ever_shown(place: str) -> None:
    """Random versions, random parts taken away, damaged and repaired, merged and collected, against a dictionary of versions."""
    for seed in range(60 if STRESS else 3):
        rng = random.Random(seed)
        store = lz.open_store(f"{place}-{seed}", durable=False)
        newest: Versions = {}  # of what was ever written
        gone: set[tuple[str, str, int]] = set()  # what was taken away since
        number = 0
        for _ in range(14):
            action = rng.choice(["write", "write", "take", "take", "damage", "compact", "gc"])
            names = [part.info.name for part in store.view(GROUP).parts] if store.models() else []
            if action == "write" or not names:
                number += 1
                some = rng.sample(["resid_mean", "attn_mean", "resid"], rng.randint(1, 3))
                layers = tuple(sorted(rng.sample(range(3), rng.randint(1, 3))))
                batch, cells = version(number, rng.sample(TEXTS, rng.randint(1, 3)), some, layers, label=rng.random() < 0.4)
                store.write(GROUP, batch)
                newest |= cells
                gone -= cells.keys()
            elif action == "take":
                take(store, rng.choice(names))
            elif action == "compact":
                store.compact(progress=False)
            elif action == "gc":
                store.gc(max_age=0)
            else:
                folder = Path(store.url) / GROUP.name / rng.choice(names)
                path = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file() and "text" not in path.parts))
                path.write_bytes(path.read_bytes()[:-1])
                store.repair(progress=False)
            found = shown(store)
            for cell, shown_number in found.items():
                assert shown_number == newest[cell], (seed, action, cell)
                assert cell not in gone or cell[1] == "label", f"{(seed, action, cell)} has come back"
            missing = newest.keys() - found.keys()
            if action in ("take", "damage"):
                gone |= missing
            assert missing <= gone or {cell[1] for cell in missing - gone} <= {"label"}, (seed, action, missing - gone)


@pytest.mark.few(2)
def test_a_store_below_does_not_show_what_was_replaced_above(tmp_path: Path, newer: tuple[TokenBatch, Versions]) -> None:
    shared = lz.open_store(tmp_path / "shared", durable=False)
    shared.write(GROUP, OLDER[0])
    both = lz.open_store([tmp_path / "shared", tmp_path / "mine"], durable=False)
    both.write(GROUP, newer[0])
    before = shown(both)
    lz.evict(both, max_gb=0, min_age=0)
    assert shown(both) == kept(before, newer[1])
    assert shown(shared) == OLDER[1], "whoever reads the shared store alone sees it as it is"
    lz.evict(tmp_path / "mine", max_gb=0, min_age=0)
    both.gc(max_age=0)
    assert shown(lz.open_store([tmp_path / "shared", tmp_path / "mine"])) == kept(before, newer[1])


@pytest.mark.few(2)
def test_a_damaged_tombstone_still_hides(two: tuple[Store, str, Versions], newer: tuple[TokenBatch, Versions], tmp_path: Path) -> None:
    store, name, before = two
    take(store, name)
    after = kept(before, newer[1])
    (tombstone,) = (note for note in store.view(GROUP).annotations if note.info.is_tombstone)
    for file in ("zarr.json", "prompts/zarr.json", "prompts/prompt_sha256/c.0"):
        copy = tmp_path / file.replace("/", "-")
        shutil.copytree(store.url, copy)
        path = copy / tombstone.path / file
        path.write_bytes(path.read_bytes()[:-7])
        damaged = lz.open_store(copy)
        if file == "zarr.json":
            with pytest.raises(CorruptPartError):
                damaged.dataset()
        damaged.repair(progress=False)
        assert shown(lz.open_store(copy)) == after
        assert lz.open_store(copy).verify(progress=False).ok


def test_a_reader_that_knows_no_tombstones_refuses_one(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would show what is hidden. Its version is read before anything else of it."""
    write_version(monkeypatch, 1)
    store = lz.open_store(root, durable=False)
    store.write(GROUP, OLDER[0])
    take(store, store.write(GROUP, NEWER["one layer"][0]))
    (tombstone,) = (note for note in store.view(GROUP).annotations if note.info.is_tombstone)
    assert {part.info.version for part in store.view(GROUP).parts} == {1}
    document = store.storage.read(f"{tombstone.path}/zarr.json")
    assert b'"format_version":2' in document
    assert part_document(parse_part(document, "here"), GROUP) == document
    # As in a release that has none, which reads parts of version 1 alone.
    monkeypatch.setattr(part_module, "check_version", lambda version, where, _: check_version(version, where, (1,)))
    with pytest.raises(UnsupportedVersionError, match=f"{tombstone.path} has format version 2"):
        lz.open_store(root).dataset()


def test_a_newer_tombstone_is_refused_as_newer(root: str) -> None:
    store = lz.open_store(root, durable=False)
    store.write(GROUP, OLDER[0])
    take(store, store.write(GROUP, NEWER["one layer"][0]))
    (tombstone,) = (note for note in store.view(GROUP).annotations if note.info.is_tombstone)
    key = f"{tombstone.path}/zarr.json"
    newer = store.storage.read(key).replace(b'"format_version":2', b'"format_version":3', 1)
    store.storage.commit(key, newer, durable=False)
    with pytest.raises(UnsupportedVersionError, match="format version 3, this release reads versions 1 and 2"):
        lz.open_store(root).dataset()
    (problem,) = lz.open_store(root).verify(progress=False).problems
    assert (problem.kind, problem.file) == ("version", key)
    assert lz.open_store(root).repair(progress=False).changes == 0, "nothing that a newer release wrote is touched"
    assert store.storage.read(key) == newer


@pytest.mark.few(3)
@pytest.mark.parametrize("versions", [(1, 1), (2, 2), (1, 2), (2, 1)])
def test_a_reader_written_from_the_page_on_the_format_shows_the_same(
    place: str, newer: tuple[TokenBatch, Versions], monkeypatch: pytest.MonkeyPatch, versions: tuple[int, int]
) -> None:
    write_version(monkeypatch, versions[0])
    store = lz.open_store(place, durable=False)
    store.write(GROUP, OLDER[0])
    write_version(monkeypatch, versions[1])
    take(store, store.write(GROUP, newer[0]))
    if not store.models():
        return
    read = independent_reader.read_group(Path(store.url) / GROUP.name)
    data, tokens = store.dataset().load(), kept_tokens(store).load()
    assert [digest[:16] for digest in read["prompts.prompt_sha256"].tolist()] == data.prompt.values.tolist()
    for variable in data.data_vars:
        np.testing.assert_array_equal(read[f"prompts.{variable}"], data[variable].transpose("prompt", ...).values)
    for variable in tokens.data_vars:
        np.testing.assert_array_equal(read[f"tokens.{variable}"], tokens[variable].transpose("token", ...).values)
    np.testing.assert_array_equal(read["prompts.label"], data.label.values)


def test_columns_of_an_evicted_part_stay_and_the_newest_wins(root: str) -> None:
    store = lz.open_store(root, durable=False)
    first, _ = version(1, ["a", "bb"], ["resid_mean"], (0,), label=True)
    second, _ = version(2, ["a"], ["resid_mean"], (0,), label=True)
    names = [store.write(GROUP, first), store.write(GROUP, second)]
    store.annotate(GROUP.model, {"split": {"a": "train"}})
    take(store, names[1])
    assert shown(store) == {("bb", "resid_mean", 0): 1, ("bb", "label", -1): 1}
    store.write(GROUP, version(3, ["a"], ["resid_mean"], (0,))[0])
    data = store.dataset(prompts=["a", "bb"])
    assert data.label.values.tolist() == [2, 1]
    assert data.split.fillna("?").values.tolist() == ["train", "?"]
    lz.evict(store, max_gb=0, min_age=0, annotations=True)
    store.write(GROUP, version(4, ["a"], ["resid_mean"], (0,))[0])
    assert "label" not in store.dataset().coords
    assert "split" not in store.dataset().coords
