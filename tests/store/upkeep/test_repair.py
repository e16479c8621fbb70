"""Every kind of file of a store, damaged in every way, one at a time: never a wrong value, found by verify, taken out by repair.

The oracle is what was written: for every value the number, for every chunk the prompts and the layer whose values lie in it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

import google_crc32c
import numpy as np
import numpy.typing as npt
import pytest
import xarray as xr
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import OLD_STORES
from s3_server import S3, Fault
from shown_values import assert_same, shown
from stores import GROUP, Stops, make_batch

import lmprobe_zarr as lz
from lmprobe_zarr.batch import prompt_hash
from lmprobe_zarr.batch.token_batch import TokenBatch
from lmprobe_zarr.errors import CorruptPartError, ReadOnlyError, UnreachableError
from lmprobe_zarr.storage.base import Storage
from lmprobe_zarr.storage.local import LocalStorage
from lmprobe_zarr.storage.open import open_storage
from lmprobe_zarr.store.format.group import GroupInfo
from lmprobe_zarr.store.format.part_names import replacement_name
from lmprobe_zarr.store.parts import writer
from lmprobe_zarr.store.parts.writer import PartWriter
from lmprobe_zarr.store.store import Store
from lmprobe_zarr.store.upkeep.losses import RepairSummary

OTHER = GroupInfo(model="acme/other", num_layers=4, hidden_size=8)
LAYERS = (0, 1, 3)
# By hand: 2 + 3 + 4 tokens in the first part, 2 + 2 in the second; two rows in every chunk of a variable.
FIRST = make_batch(["a", "bb", "ccc"], seed=1, columns={"label": [1, 0, 1], "split": ["x", "ü", "x"]}, n_tokens=[2, 3, 4])
SECOND = make_batch(["d", "e"], seed=2, columns={"label": [0, 1], "split": ["y", "z"]}, n_tokens=[2, 2])
NOTES = [{"a": "one", "d": "two"}, {"bb": "three", "e": "four"}]
COLUMNS = ("text", "label", "split", "note")

# What is there to be read: (level, variable, layer, prompt), with layer −1 for columns.
Cell = tuple[str, str, int, str]
Values = dict[Cell, Any]


def truth() -> Values:
    """Every value that was written."""
    found: Values = {}
    for batch in (FIRST, SECOND):
        bounds = np.concatenate([[0], np.cumsum(np.asarray(batch.n_tokens))])
        for i, text in enumerate(batch.text or ()):
            tokens = slice(int(bounds[i]), int(bounds[i + 1]))
            for j, layer in enumerate(LAYERS):
                found["prompts", "resid_mean", layer, text] = batch.prompts["resid_mean"][j, i]
                found["tokens", "resid", layer, text] = batch.tokens["resid"][j, tokens]
            found["tokens", "token_id", -1, text] = batch.token_columns["token_id"][tokens]
            found["prompts", "text", -1, text] = text
            for name, column in batch.prompt_columns.items():
                found["prompts", name, -1, text] = column[i]
    return found | {("prompts", "note", -1, text): note for notes in NOTES for text, note in notes.items()}


TRUTH: Final = truth()
ABSENT: Final = "absent"


def build(place: str | Path) -> Store:
    """The store that is damaged."""
    store = lz.open_store(place, durable=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "CHUNK_BYTES", 64)
        patch.setattr(writer, "REMOTE_CHUNK_BYTES", 64)
        patch.setattr(writer, "MIN_CHUNK_BYTES", 64)
        for batch in (FIRST, SECOND):
            store.write(GROUP, batch)
    for notes in NOTES:
        store.annotate("acme/toy", {"note": notes})
    store.write(OTHER, make_batch(["f"], seed=3))
    return store


@pytest.fixture(scope="module", params=[1, 2], ids=["format 1", "format 2"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "s"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "PART_VERSION", request.param)
        build(path)
    return path


@pytest.fixture
def place(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "s"))


def parts_of(store: Store) -> list[str]:
    """Keys of the two parts and then of the two annotations."""
    listing = store.listing(GROUP)
    return [part.path for part in (*listing.parts, *listing.annotations)]


def observed(store: Store) -> Values:
    """Everything that a store shows, value by value: a number, the error that it raises, or that it is absent."""
    found: Values = dict.fromkeys(TRUTH, ABSENT)
    if "acme/toy" not in store.models():
        return found
    counts = store.view(GROUP).token_counts()
    data, tokens = store.dataset("acme/toy"), store.tokens("acme/toy") if counts.any() else xr.Dataset()
    bounds = np.concatenate([[0], np.cumsum(counts)])
    places = {str(label): i for i, label in enumerate(data.prompt.values)}
    for cell in TRUTH:
        level, name, layer, text = cell
        i = places.get(prompt_hash(text))
        if i is None:
            continue
        array: xr.DataArray = (data if level == "prompts" else tokens).get(name)  # type: ignore[assignment]
        if array is None or (layer >= 0 and layer not in array.layer.values):
            continue
        some = array.sel(layer=layer) if layer >= 0 else array
        some = some.isel(prompt=i) if level == "prompts" else some.isel(token=slice(int(bounds[i]), int(bounds[i + 1])))
        try:
            value: npt.NDArray[Any] = some.values
        except CorruptPartError as error:
            found[cell] = error
            continue
        empty = (value != value) | (value == -1) if value.dtype.kind in "fi" else (value == "") | (value != value)
        if not np.all(empty):
            found[cell] = value
    return found


def check(found: Values, absent: Iterable[Cell], broken: Iterable[Cell] = (), named: str = "") -> None:
    """Nothing is wrong: what is broken says so, what is absent is, and all else is what was written."""
    missing, damaged = set(absent), set(broken)
    for cell, value in found.items():
        if cell in damaged:
            assert isinstance(value, CorruptPartError), f"{cell} reads as {value!r}"
            message = str(value)
            assert repr(cell[1]) in message, "names the variable"
            assert named.rpartition("/")[2] in message, "names the chunk"
            assert len(message.splitlines()) <= 2
            assert value.part is not None
            assert value.part in message, "names the part"
        elif cell in missing:
            assert value is ABSENT, f"{cell} reads as {value!r}"
        else:
            assert value is not ABSENT, cell
            assert not isinstance(value, Exception), f"{cell}: {value}"
            np.testing.assert_array_equal(value, TRUTH[cell], err_msg=str(cell))


def cells(texts: str, *names: str, layers: Iterable[int] = (-1,), level: str = "prompts") -> set[Cell]:
    return {(level, name, layer, text) for text in texts.split() for name in names for layer in layers}


def everything(texts: str) -> set[Cell]:
    return {cell for cell in TRUTH if cell[3] in texts.split()}


# ---------------------------------------------------------------------------------------------------------------- one file

Damage = Literal["deleted", "truncated", "emptied", "exchanged", "flipped"]
DAMAGES: Final[tuple[Damage, ...]] = ("deleted", "truncated", "emptied", "exchanged", "flipped")


@dataclass(frozen=True)
class Case:
    """A kind of file.

    `file` is a key below the first part (``{0}``), its partner one that it is exchanged with; `own` and `others` are the values that lie in
    them; `made` says that these are known from elsewhere, so that nothing is lost.
    """

    file: str
    partner: str
    own: set[Cell] = field(default_factory=set)
    others: set[Cell] = field(default_factory=set)
    document: Literal["", "root", "group", "part", "annotation"] = ""


CASES: Final = {
    "root document": Case("zarr.json", "{group}/zarr.json", document="root"),
    "group document": Case("{group}/zarr.json", "{other}/zarr.json", document="group"),
    "part document": Case("{0}/zarr.json", "{1}/zarr.json", everything("a bb ccc"), everything("d e"), document="part"),
    "annotation document": Case("{2}/zarr.json", "{3}/zarr.json", cells("a d", "note"), cells("bb e", "note"), document="annotation"),
    "level document": Case("{0}/prompts/zarr.json", "{0}/tokens/zarr.json"),
    "array document": Case("{0}/tokens/resid/zarr.json", "{0}/prompts/resid_mean/zarr.json"),
    "document of an annotation's array": Case("{2}/prompts/note/zarr.json", "{2}/prompts/zarr.json"),
    "chunk of one prompt's tokens": Case(
        "{0}/tokens/resid/c.1.1.0", "{1}/tokens/resid/c.1.1.0",
        cells("bb", "resid", layers=[1], level="tokens"), cells("e", "resid", layers=[1], level="tokens"),
    ),
    "chunk of two prompts' tokens": Case(
        "{0}/tokens/resid/c.0.2.0", "{1}/tokens/resid/c.0.1.0",
        cells("bb ccc", "resid", layers=[0], level="tokens"), cells("e", "resid", layers=[0], level="tokens"),
    ),
    "pooled chunk": Case(
        "{0}/prompts/resid_mean/c.2.0.0", "{1}/prompts/resid_mean/c.2.0.0",
        cells("a bb", "resid_mean", layers=[3]), cells("d e", "resid_mean", layers=[3]),
    ),
    "column of numbers": Case("{0}/prompts/label/c.0", "{1}/prompts/label/c.0", cells("a bb ccc", "label"), cells("d e", "label")),
    "column of texts": Case("{0}/prompts/split/c.0", "{1}/prompts/split/c.0", cells("a bb ccc", "split"), cells("d e", "split")),
    "prompts' texts": Case("{0}/prompts/text/c.0", "{1}/prompts/text/c.0", cells("a bb ccc", "text"), cells("d e", "text")),
    "token ids": Case(
        "{0}/tokens/token_id/c.0", "{1}/tokens/token_id/c.0",
        cells("a bb ccc", "token_id", level="tokens"), cells("d e", "token_id", level="tokens"),
    ),
    "column that the index knows": Case("{0}/prompts/prompt/c.0", "{1}/prompts/prompt/c.0"),
    "column that counts rows": Case("{0}/tokens/prompt_row/c.0", "{1}/tokens/prompt_row/c.0"),
    "numbers of the layers": Case("{0}/tokens/layer/c.0", "{0}/prompts/n_tokens/c.0"),
    "annotation's column": Case("{2}/prompts/note/c.0", "{3}/prompts/note/c.0", cells("a d", "note"), cells("bb e", "note")),
}  # fmt: skip


def key_of(template: str, parts: list[str]) -> str:
    return template.format(*parts, group=GROUP.name, other=OTHER.name)


def apply(storage: Storage, damage: Damage, key: str, partner: str) -> list[str]:
    """Damage a file; returns what was touched."""
    data = storage.read(key)
    if damage == "exchanged":
        other = storage.read(partner)
        assert data != other, "an exchange that changes something"
        storage.write(key, other, durable=False)
        storage.write(partner, data, durable=False)
        return [key, partner]
    if damage == "deleted":
        storage.remove([key])
    else:
        flipped = bytearray(data)
        flipped[len(data) // 2] ^= 4
        storage.write(key, {"truncated": data[:-1], "emptied": b"", "flipped": bytes(flipped)}[damage], durable=False)
    return [key]


def write_lost(store: Store, summary: RepairSummary) -> None:
    """What an extraction of everything that is lost would write: the true values of those prompts, variables and layers."""
    for lost in summary.lost:
        assert lost.model == "acme/toy"
        assert [prompt_hash(text) for text in lost.prompts] == list(lost.hashes), "the texts are known"
        for batch in (FIRST, SECOND):
            for i, text in enumerate(batch.text or ()):
                if text in lost.prompts:
                    store.write(GROUP, subset(batch.take(i, i + 1), lost.variables, lost.layers))


def subset(batch: TokenBatch, names: Iterable[str], layers: tuple[int, ...]) -> TokenBatch:
    at = [LAYERS.index(layer) for layer in layers]
    wanted = set(names)
    keep = "resid" in wanted
    return replace(
        batch,
        layers=layers,
        prompts={name: array[at] for name, array in batch.prompts.items() if name in wanted},
        tokens={name: array[at] for name, array in batch.tokens.items() if name in wanted},
        n_tokens=batch.n_tokens if keep else None,
        token_columns=batch.token_columns if keep else {},
    )


@pytest.mark.few(10)
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", CASES)
def test_a_damaged_file_is_never_a_wrong_value_and_is_found_and_taken_out(kind: str, damage: Damage, place: Path) -> None:
    case, parts = CASES[kind], parts_of(lz.open_store(place))
    lands = LocalStorage(place)
    key, partner = key_of(case.file, parts), key_of(case.partner, parts)
    same_size = len(lands.read(key)) == len(lands.read(partner))
    touched = apply(lands, damage, key, partner)
    gone = case.own | (case.others if damage == "exchanged" else set())
    lost_commit = damage == "deleted" and case.document in ("part", "annotation")

    # Reading.
    if case.document == "root":
        with pytest.raises(CorruptPartError, match=r"/zarr\.json, the document of the root, is .*lmprobe-zarr repair"):
            lz.open_store(place)
    elif case.document and not lost_commit:
        with pytest.raises(CorruptPartError) as raised:
            lz.open_store(place).dataset("acme/toy")
        assert any(path.rpartition("/")[0] in str(raised.value) for path in touched), "names the folder"
        if case.document == "group" and damage != "exchanged":
            assert lz.open_store(place).view(OTHER).digests.tobytes().hex()[:16] == prompt_hash("f"), "the other group reads"
    elif lost_commit:
        check(observed(lz.open_store(place)), gone)
    else:
        check(observed(lz.open_store(place)), (), gone, "" if damage == "exchanged" else key)

    # Verifying.
    store = Store(LocalStorage(place))
    summary = store.verify(progress=False)
    if lost_commit:
        assert (summary.ok, summary.unfinished) == (True, 1), "the same as a part that is being written"
    else:
        assert not summary
        assert {problem.file for problem in summary.problems} == set(touched)
        assert all(problem.url == str(place) and problem.what and problem.advice for problem in summary.problems)
        assert all(file in str(summary) for file in touched)
    fast = {problem.file for problem in store.verify(full=False, progress=False).problems}
    unread = key.rpartition("/")[2] != "zarr.json" or not case.document  # what is read in any case is checked in any case
    expected = set() if lost_commit or (unread and (damage == "flipped" or (damage == "exchanged" and same_size))) else set(touched)
    assert fast == expected

    # Repairing.
    planned = store.repair(dry_run=True, progress=False)
    assert {problem.file for problem in store.verify(progress=False).problems} == (set() if lost_commit else set(touched)), "only a plan"
    done = store.repair(progress=False)
    assert replace(done, dry_run=True) == planned
    assert done.left == ()
    assert done.unknown == (), "the files beside a document say what it held"
    clean = lz.open_store(place)
    assert clean.verify(progress=False).ok
    assert clean.verify(full=False, progress=False).ok
    check(observed(clean), gone)
    if case.document in ("", "root", "group"):
        assert clean.dataset("acme/toy").prompt.values.tolist() == [prompt_hash(t) for t in ("a", "bb", "ccc", "d", "e")], "in order"
    reported = {(name, layer, text) for lost in done.lost for name in lost.variables for layer in lost.layers for text in lost.prompts}
    assert reported == {cell[1:] for cell in gone if cell[2] >= 0 and not lost_commit}
    columns = {(lost.column, label) for lost in done.columns for label in lost.hashes}
    if case.document in ("", "annotation") and not lost_commit:
        assert columns == {(cell[1], prompt_hash(cell[3])) for cell in gone if cell[2] < 0}
    assert clean.repair(progress=False).changes == 0

    # What is extracted again completes it.
    write_lost(clean, done)
    again = observed(lz.open_store(place))
    check(again, {cell for cell in gone if cell[2] < 0 and again[cell] is ABSENT} | (gone if lost_commit else set()))
    assert lz.open_store(place).repair(progress=False).lost == ()


@pytest.mark.few(1)
@settings(max_examples=examples(4, 300))
@given(st.dictionaries(st.integers(0, 10**6), st.sampled_from(["deleted", "truncated", "emptied", "flipped"]), min_size=1, max_size=8))
def test_many_damages_at_once_are_all_found_and_nothing_wrong_is_ever_read(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, damaged: dict[int, Damage]
) -> None:
    path = Path(shutil.copytree(whole, tmp_path_factory.mktemp("many") / "s"))
    lands = LocalStorage(path)
    files = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
    inside = [file for file in files if file.count("/") > 1 and not file.startswith(OTHER.name) and "/." not in file]
    commits = {f"{part}/zarr.json" for part in parts_of(lz.open_store(path))}
    touched = set()
    for number, damage in damaged.items():
        key = inside[number % len(inside)]
        if key not in touched:
            touched |= set(apply(lands, damage, key, ""))
    store = lz.open_store(path)
    found = {problem.file for problem in store.verify(progress=False).problems}
    # Of a part whose document cannot be believed nobody can say what else is wrong with it.
    lost = {key.removesuffix("zarr.json") for key in touched & commits}
    assert found == {key for key in touched if key in commits or not any(key.startswith(folder) for folder in lost)}
    if not lost:
        for cell, value in observed(lz.open_store(path)).items():
            assert isinstance(value, CorruptPartError) or np.array_equal(value, TRUTH[cell]), cell
    done = store.repair(progress=False)
    clean = lz.open_store(path)
    assert clean.verify(progress=False).ok
    values = observed(clean)
    check(values, {cell for cell, value in values.items() if value is ABSENT})
    if all(text is not None for lost in done.lost for text in lost.texts) and not done.unknown:
        write_lost(clean, done)
        values = observed(lz.open_store(path))
        check(values, {cell for cell, value in values.items() if value is ABSENT and cell[2] < 0})


def small(path: Path) -> Store:
    """Three prompts in two chunks of one layer each, and a note."""
    store = lz.open_store(path, durable=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "CHUNK_BYTES", 64)
        patch.setattr(writer, "REMOTE_CHUNK_BYTES", 64)
        patch.setattr(writer, "MIN_CHUNK_BYTES", 64)
        store.write(GROUP, replace(FIRST, n_tokens=None, tokens={}, token_columns={}))
    store.annotate("acme/toy", {"note": {"a": "one"}})
    return store


@pytest.mark.few(1)
def test_stopped_after_any_call_nothing_is_wrong_and_a_second_repair_completes_it(whole: Path, tmp_path: Path) -> None:
    large = bool(os.environ.get("LMPROBE_ZARR_STRESS"))
    source = whole if large else Path(small(tmp_path / "small").url)
    broken = ["{0}/prompts/resid_mean/c.2.0.0", "{0}/prompts/label/c.0"]
    gone = CASES["pooled chunk"].own | cells("a bb ccc", "label")
    if large:
        broken += ["{0}/tokens/resid/c.0.2.0", "{1}/prompts/split/c.0", "{2}/prompts/note/c.0"]
        gone |= CASES["chunk of two prompts' tokens"].own | cells("d e", "split") | cells("a d", "note")
    written = {cell for cell, value in observed(lz.open_store(source)).items() if value is not ABSENT}
    for n in range(0, 1000, 1 if large else 3):
        root = Path(shutil.copytree(source, tmp_path / str(n)))
        parts = parts_of(lz.open_store(root))
        if not large:
            parts.insert(1, "")
        for template in broken:
            (root / key_of(template, parts)).write_bytes(b"")
        stopped = False
        try:
            Store(Stops(LocalStorage(root), n), durable=False).repair(progress=False)
        except OSError as error:
            assert "plug" in str(error)  # noqa: PT017
            stopped = True
        for cell, value in observed(lz.open_store(root)).items():
            assert value is ABSENT or isinstance(value, CorruptPartError) or np.array_equal(value, TRUTH[cell]), (n, cell)
            assert cell in gone or cell not in written or isinstance(value, np.ndarray), (n, cell, value)
        if stopped:
            lz.open_store(root, durable=False).repair(progress=False)
        clean = lz.open_store(root)
        assert clean.verify(progress=False).ok
        check(observed(clean), gone | (TRUTH.keys() - written))
        shutil.rmtree(root)
        if not stopped:
            break
    else:
        pytest.fail("it never came to its end")
    assert n > 20


# --------------------------------------------------------------------------------------------------- parts that stand for others


def chunk_of(store: Store, part: str, key: str = "prompts/resid_mean/c.0.0.0") -> Path:
    return Path(store.url) / part / key


@pytest.fixture
def merged(tmp_path: Path) -> Store:
    store = lz.open_store(tmp_path / "m", durable=False)
    for i in range(3):
        store.write(GROUP, make_batch(["a", f"p{i}"], seed=i, n_tokens=[2, 2]))
    store.compact(progress=False)
    return store


def test_a_damaged_part_that_others_replaced_is_found_and_goes(merged: Store) -> None:
    before = shown(merged)
    old = sorted(part.path for part in merged.listing(GROUP).parts)[1]
    chunk_of(merged, old).write_bytes(b"")
    assert_same(merged, before)
    (problem,) = merged.verify(progress=False).problems
    assert (problem.part, problem.kind, "stands for it" in problem.advice) == (old, "size", True)
    done = merged.repair(progress=False)
    assert (done.dropped, done.lost, done.rewritten) == ((old,), (), ())
    assert_same(lz.open_store(merged.url), before)
    assert merged.verify(progress=False).ok


def test_the_parts_that_a_damaged_part_was_merged_from_become_visible_again(merged: Store) -> None:
    before = shown(merged)
    (new,) = (part.path for part in merged.listing(GROUP).parts if part.info.replaces)
    chunk_of(merged, new).unlink()
    done = merged.repair(progress=False)
    assert (done.dropped, done.lost) == ((new,), ())
    assert_same(lz.open_store(merged.url), before)
    merged.compact(progress=False)
    merged.gc(max_age=0)
    assert_same(lz.open_store(merged.url), before)


def test_a_deleted_prompt_never_becomes_visible_again_because_what_replaces_it_broke(tmp_path: Path) -> None:
    store = lz.open_store(tmp_path / "s", durable=False)
    store.write(GROUP, FIRST)
    (old,) = store.listing(GROUP).parts
    # As a deletion leaves it that stops right after its commit: the part without the prompt replaces the one with it.
    new = PartWriter(store.storage, GROUP, replacement_name(old.info.name), durable=False, replaces=(old.info.name,))
    new.append(FIRST.take(1, 3))
    info = new.commit()
    chunk_of(store, f"{GROUP.name}/{info.name}").unlink()
    done = store.repair(progress=False)
    assert set(lz.open_store(store.url).dataset().text.values) == {"bb", "ccc"}
    assert {text for lost in done.lost for text in lost.texts} == {"bb", "ccc"}


def test_values_that_a_later_part_holds_are_not_lost(tmp_path: Path) -> None:
    store = lz.open_store(tmp_path / "s", durable=False)
    store.write(GROUP, FIRST)
    store.write(GROUP, FIRST.take(0, 2))
    parts = [part.path for part in store.listing(GROUP).parts]
    chunk_of(store, parts[0]).unlink()
    (lost,) = store.repair(progress=False).lost
    assert (lost.variables, lost.layers, lost.prompts) == (("resid_mean",), (0,), ["ccc"])
    values = lz.open_store(store.url).dataset().resid_mean.values
    np.testing.assert_array_equal(values[:, :2], FIRST.prompts["resid_mean"][:, :2])
    chunk_of(store, parts[1]).unlink()
    (lost,) = store.repair(progress=False).lost
    assert (lost.variables, lost.layers, lost.prompts) == (("resid_mean",), (0,), ["a", "bb"])


def test_values_that_only_an_earlier_part_holds_are_lost_and_stay_hidden(tmp_path: Path) -> None:
    """Nobody can tell any more whether they were replaced because they were wrong."""
    store = lz.open_store(tmp_path / "s", durable=False)
    store.write(GROUP, FIRST)
    newer = replace(FIRST.take(0, 2), prompts={"resid_mean": FIRST.prompts["resid_mean"][:, :2] + 1})
    store.write(GROUP, newer)
    part = store.listing(GROUP).parts[1].path
    chunk_of(store, part).unlink()
    (lost,) = store.repair(progress=False).lost
    assert (lost.variables, lost.layers, lost.prompts) == (("resid_mean",), (0,), ["a", "bb"])
    values = lz.open_store(store.url).dataset().resid_mean.values
    assert np.isnan(values[0, :2]).all()
    np.testing.assert_array_equal(values[1:, :2], newer.prompts["resid_mean"][1:])
    np.testing.assert_array_equal(values[:, 2], FIRST.prompts["resid_mean"][:, 2])
    store.write(GROUP, newer)  # as an extraction of what is lost does
    np.testing.assert_array_equal(lz.open_store(store.url).dataset().resid_mean.values[:, :2], newer.prompts["resid_mean"])


def test_a_part_whose_token_positions_are_lost_is_removed(tmp_path: Path) -> None:
    store = lz.open_store(tmp_path / "s", durable=False)
    columns = {**FIRST.token_columns, "position": np.arange(9) + 5}
    store.write(GROUP, replace(FIRST, token_columns=columns))
    (part,) = store.listing(GROUP).parts
    chunk_of(store, part.path, "tokens/position/c.0").write_bytes(b"")
    done = store.repair(progress=False)
    assert done.dropped == (part.path,)
    assert {(lost.variables, lost.layers, tuple(lost.prompts)) for lost in done.lost} == {
        (("resid", "resid_mean"), LAYERS, ("a", "bb", "ccc"))
    }
    assert {lost.column for lost in done.columns} == {"label", "split"}
    assert lz.open_store(store.url).models() == []


# -------------------------------------------------------------------------------------------------------- groups and their documents


def test_a_groups_document_comes_back_from_any_of_its_parts(place: Path) -> None:
    (place / GROUP.name / "zarr.json").unlink()
    lz.open_store(place).repair(progress=False)
    assert lz.open_store(place).groups()[GROUP.name] == GROUP
    assert (place / GROUP.name / "zarr.json").read_bytes() == GROUP.to_document()


@pytest.mark.parametrize("damage", ["deleted", "flipped"])
def test_a_groups_document_that_no_part_holds_is_restored_by_the_next_part(damage: Damage, tmp_path: Path) -> None:
    old = Path(shutil.copytree(OLD_STORES / "version-1" / "store", tmp_path / "old"))
    info = lz.open_store(old).find_group("acme/toy")
    before = lz.open_store(old).dataset("acme/toy").load()
    apply(LocalStorage(old), damage, f"{info.name}/zarr.json", "")
    store = lz.open_store(old)
    (problem,) = store.repair(progress=False).left
    assert "extract any prompt of that model" in problem.advice
    with pytest.warns(lz.errors.CacheWarning):
        store.write(info, make_batch(["new"], layers=(1,), hidden=4, tokens=False))
    after = lz.open_store(old).dataset("acme/toy", prompts=[str(label) for label in before.prompt.values]).load()
    np.testing.assert_array_equal(after.resid_mean.values, before.resid_mean.values)


def test_somebody_elses_root_document_is_never_written_over(place: Path) -> None:
    theirs = b'{"zarr_format": 3, "node_type": "group", "attributes": {"of": "somebody else, who put it here"}}'
    (place / "zarr.json").write_bytes(theirs)
    done = Store(LocalStorage(place)).repair(progress=False)
    assert [problem.file for problem in done.left] == ["zarr.json"]
    assert (place / "zarr.json").read_bytes() == theirs


def test_foreign_folders_are_named_and_stay(place: Path) -> None:
    (place / GROUP.name / "mine").mkdir()
    (place / GROUP.name / "mine" / "zarr.json").write_text("{}")
    (place / GROUP.name / "notes.txt").write_text("hello")
    (place / "unrelated").mkdir()
    done = lz.open_store(place).repair(progress=False)
    (problem,) = done.left
    assert (problem.part, "none of ours" in problem.advice) == (f"{GROUP.name}/mine", True)
    assert (place / GROUP.name / "mine" / "zarr.json").exists()
    assert done.changes == 0


def test_repair_reports_and_keeps_a_part_of_a_newer_version(place: Path) -> None:
    part = parts_of(lz.open_store(place))[0]
    path = place / part / "zarr.json"
    changed = re.sub('"format_version":[12]', '"format_version":3', path.read_text())
    assert changed != path.read_text()
    path.write_text(changed)
    (problem,) = lz.open_store(place).repair(progress=False).left
    assert (problem.kind, "upgrade" in problem.advice) == ("version", True)
    assert path.exists()


# -------------------------------------------------------------------------------------------- places that are not simply ours to mend


def test_repair_reports_and_keeps_a_file_that_cannot_be_read_now(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = f"{parts_of(lz.open_store(place))[0]}/tokens/resid/c.1.1.0"
    real = LocalStorage.read_view

    def refuses(self: LocalStorage, name: str) -> Any:
        if name == key:
            raise OSError(5, "Input/output error")
        return real(self, name)

    monkeypatch.setattr(LocalStorage, "read_view", refuses)
    done = lz.open_store(place).repair(progress=False)
    (problem,) = done.left
    assert (problem.kind, done.changes) == ("unreadable", 0)
    monkeypatch.undo()
    check(observed(lz.open_store(place)), ())


def test_stores_that_may_not_be_written_are_not_repaired(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ReadOnlyError, match="mode='r'"):
        lz.open_store(place, mode="r").repair(progress=False)
    lz.open_store(place).publish(tmp_path / "copy", progress=False)
    with pytest.raises(ReadOnlyError, match="published copy"):
        lz.open_store(tmp_path / "copy").repair(progress=False)


def test_of_several_stores_all_are_verified_and_the_last_is_repaired(place: Path, tmp_path: Path) -> None:
    top = lz.open_store(tmp_path / "top", durable=False)
    top.write(GROUP, make_batch(["g"], seed=5))
    below, own = parts_of(lz.open_store(place))[0], top.listing(GROUP).parts[0].path
    (place / below / "tokens/resid/c.1.1.0").unlink()
    chunk_of(top, own).unlink()
    both = lz.open_store([place, tmp_path / "top"])
    assert [(problem.url, problem.part) for problem in both.verify(progress=False).problems] == [(str(place), below), (top.url, own)]
    assert both.repair(progress=False).rewritten == (own,)
    assert [problem.part for problem in both.verify(progress=False).problems] == [below]


@pytest.mark.few(6)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_published_copy_is_verified_against_its_root(damage: Damage, whole: Path, tmp_path: Path) -> None:
    lz.open_store(whole).publish(tmp_path / "copy", model="acme/toy", progress=False)
    copy = lz.open_store(tmp_path / "copy")
    assert copy.verify(progress=False).ok
    assert copy.verify(full=False, progress=False).ok
    parts = parts_of(copy)
    key = f"{parts[0]}/zarr.json"
    if damage == "exchanged":
        apply(LocalStorage(tmp_path / "copy"), damage, f"{parts[0]}/tokens/resid/c.0.0.0", f"{parts[0]}/tokens/resid/c.1.0.0")
        assert len(copy.verify(progress=False).problems) == 2
        return
    apply(LocalStorage(tmp_path / "copy"), damage, key, "")
    (problem,) = lz.open_store(tmp_path / "copy").verify(full=False, progress=False).problems
    assert problem.file == key
    assert "fetch or publish it again" in problem.advice


def test_a_published_root_that_disagrees_with_its_parts_is_found(whole: Path, tmp_path: Path) -> None:
    lz.open_store(whole).publish(tmp_path / "copy", progress=False)
    path = tmp_path / "copy" / "zarr.json"
    text = path.read_text()
    path.write_text(text.replace('"shape":[3,13,8]', '"shape":[3,12,8]', 1))
    assert path.read_text() != text
    (problem,) = lz.open_store(tmp_path / "copy").verify(full=False, progress=False).problems
    assert (problem.file, "does not agree" in problem.what) == ("zarr.json", True)
    path.write_text(text.replace('"format":"lmprobe-zarr"', '"format":"lmprobe-zebr"', 1))
    with pytest.raises(CorruptPartError, match="fetch or publish this copy again"):
        lz.open_store(tmp_path / "copy")


@pytest.mark.few(1)
def test_a_store_in_memory_is_verified_and_repaired(store: Store) -> None:
    build(store.url)
    parts = parts_of(store)
    for template in ("{0}/tokens/resid/c.1.1.0", "{2}/prompts/note/c.0"):
        apply(store.storage, "flipped", key_of(template, parts), "")
    assert len(store.verify(progress=False).problems) == 2
    store.repair(progress=False)
    assert store.verify(progress=False).ok
    check(observed(store), CASES["chunk of one prompt's tokens"].own | cells("a d", "note"))


# ------------------------------------------------------------------------------------------------------------------------- S3


@pytest.fixture
def url(s3: S3) -> str:
    return f"s3://team/{uuid.uuid4().hex}/acts"


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        ("chunk of one prompt's tokens", "exchanged"), ("pooled chunk", "truncated"), ("column of numbers", "deleted"),
        ("array document", "emptied"), ("part document", "flipped"),
    ],
)  # fmt: skip
def test_damage_is_found_and_repaired_on_s3(url: str, kind: str, damage: Damage) -> None:
    case, parts = CASES[kind], parts_of(build(url))
    storage = open_storage(url)
    key, partner = key_of(case.file, parts), key_of(case.partner, parts)
    touched = apply(storage, damage, key, partner)
    gone = case.own | (case.others if damage == "exchanged" else set())
    store = lz.open_store(url)
    assert {problem.file for problem in store.verify(progress=False).problems} == set(touched)
    store.repair(progress=False)
    clean = lz.open_store(url)
    assert clean.verify(progress=False).ok
    check(observed(clean), gone)


def test_a_fast_verification_reads_documents_only_on_s3(s3: S3, url: str) -> None:
    build(url)
    store = lz.open_store(url, "r", storage_options=s3.options(counted=True))
    assert store.catalog.hint is not None
    store.catalog.hint.result()  # the list that opening requests, without waiting for it
    s3.proxy.reset()
    assert store.verify(full=False, progress=False).ok
    kinds = s3.proxy.kinds()
    assert kinds["GET"] == 1 + 2 + 5, "root, groups, parts and annotations"
    assert kinds["LIST"] == 1 + 3 + 5, "the root, each group and the folder of annotations, each part"
    assert kinds["HEAD"] == 0


def test_a_place_that_does_not_answer_is_not_taken_for_a_broken_store(s3: S3, url: str) -> None:
    build(url)
    quick: dict[str, Any] = {"config_kwargs": {"retries": {"total_max_attempts": 1}}}
    store = lz.open_store(url, storage_options=s3.options(counted=True, **quick))
    s3.proxy.fault = lambda request: Fault(status=503) if request.path.endswith("resid/c.1.1.0") else None
    with pytest.raises(UnreachableError):
        store.repair(progress=False)
    s3.proxy.reset()
    assert store.verify(progress=False).ok


# ------------------------------------------------------------------------------------------------------- values that are odd


def odd_batch() -> TokenBatch:
    """By hand: three values that are no numbers, four blank rows of 18."""
    batch = make_batch(["a", "bb"], layers=(0, 1), n_tokens=[2, 3])
    resid, mean = batch.tokens["resid"].copy(), batch.prompts["resid_mean"].copy()
    resid[0, 1, 2], resid[1, 4, 0], mean[1, 1, 7] = np.nan, np.inf, -np.inf
    resid[0, 0], resid[1, 2], mean[0, 0], mean[1, 0] = 0.0, -0.0, 0.0, 0.0
    return replace(batch, tokens={"resid": resid}, prompts={"resid_mean": mean})


def test_values_that_are_no_numbers_and_blank_rows_are_counted_as_they_are_written(store: Store) -> None:
    store.write(GROUP, odd_batch())
    for full in (False, True):
        summary = store.verify(full=full, progress=False)
        assert summary.ok, "they were written so: no damage"
        assert (summary.not_finite, summary.blank, summary.uncounted) == (3, 4, 0)
        assert {odd.variable: (odd.not_finite, odd.blank) for odd in summary.odd} == {"tokens/resid": (2, 2), "prompts/resid_mean": (1, 2)}
        assert "3 values are not finite, 4 rows are all zeros" in str(summary)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_full_verification_counts_what_the_writer_did_not_count(dtype: str, tmp_path: Path) -> None:
    store = lz.open_store(tmp_path / "s")
    batch = odd_batch()
    tokens, prompts = batch.tokens["resid"].astype(dtype), batch.prompts["resid_mean"].astype(dtype)
    store.write(GROUP, replace(batch, tokens={"resid": tokens}, prompts={"resid_mean": prompts}))
    (part,) = store.listing(GROUP).parts
    path = Path(store.url) / part.path / "zarr.json"
    document = json.loads(path.read_bytes())
    del document["attributes"]["odd"]
    document["attributes"]["digest"] = "crc32c:00000000"
    data = json.dumps(document, separators=(",", ":")).encode()
    path.write_bytes(data.replace(b"crc32c:00000000", b"crc32c:%08x" % google_crc32c.value(data), 1))
    fast = lz.open_store(store.url).verify(full=False, progress=False)
    assert (fast.not_finite, fast.blank, fast.uncounted) == (0, 0, 1)
    summary = lz.open_store(store.url).verify(progress=False)
    assert (summary.not_finite, summary.blank, summary.uncounted) == (3, 4, 0)


def test_the_first_tokens_nan_is_not_reported(store: Store) -> None:
    batch = make_batch(["a"], tokens=False)
    store.write(
        GROUP,
        replace(
            batch,
            n_tokens=np.array([2]),
            tokens={"token_log_prob": np.array([np.nan, 0.0], np.float32)},
            unlayered=frozenset({"token_log_prob"}),
        ),
    )
    assert store.verify(progress=False).odd == ()


# ------------------------------------------------------------------------------------------------------ extracting what is lost


@pytest.mark.model
def test_an_extraction_of_what_is_lost_completes_the_store(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from tiny_models import save_tiny

    model = str(tmp_path / "toy")
    save_tiny("gpt2", Path(model), head="AutoModelForCausalLM", n_layer=3)
    texts = ["a walk in the sun", "the soup was cold", "rain", "one more"]
    what: dict[str, Any] = {
        "pooling": ["mean"], "keep_tokens": True, "perplexity": True, "logits": "last_token", "logits_top_k": 3, "dtype": "float32",
    }  # fmt: skip
    store = lz.open_store(tmp_path / "s", durable=False)
    for some in (texts[:2], texts[2:]):
        lz.extract(model, some, store=store, progress=False, **what)
    before = shown_values(store)
    parts = [part.path for part in store.view(store.find_group()).parts]
    for part, chunk in zip(parts, ("prompts/resid_mean/c.1.0.0", "tokens/resid/c.2.0.0"), strict=True):
        chunk_of(store, part, chunk).write_bytes(b"")
    chunk_of(store, parts[1], "tokens/token_log_prob/c.0").unlink()
    chunk_of(store, parts[0], "prompts/logits_last_token_top_k_values/c.0.0").unlink()
    summary = store.repair(progress=False)
    assert {name for lost in summary.lost for name in lost.variables} == {
        "resid_mean", "resid", "token_log_prob", "logits_last_token_top_k_values",
    }  # fmt: skip
    for lost in summary.lost:
        lz.extract(model, lost.prompts, store=store, progress=False, dtype="float32", **lost.arguments)
    after = shown_values(lz.open_store(store.url))
    assert set(after) == set(before)
    for name, array in before.items():
        np.testing.assert_allclose(after[name], array, rtol=1e-5, atol=1e-5, err_msg=name)
    stats = lz.extract(model, texts, store=store, progress=False, **{**what, "logits_top_k": 1})
    assert (stats.found, stats.model_loaded) == (4, False)


@pytest.mark.model
def test_what_is_lost_of_a_module_and_of_a_part_of_the_tokens_is_extracted_again(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from tiny_models import save_tiny

    model = str(tmp_path / "toy")
    save_tiny("gpt2", Path(model), n_layer=3)
    texts = ["a walk in the sun", "the soup was cold"]
    what: dict[str, Any] = {
        "sites": {"z": "attn.c_proj:input", "neurons": "neurons", "end": "/ln_f"}, "pooling": ["mean"], "keep_tokens": True,
        "over": {"all": "all", "tail": {"position": slice(-2, None)}}, "dtype": "float32",
    }  # fmt: skip
    store = lz.open_store(tmp_path / "s", durable=False)
    lz.extract(model, texts, store=store, progress=False, **what)
    lz.write_activations(
        store, model="toy", prompts=["mine"], pooled={"own_mean": {0: np.ones((1, 3), np.float32)}}, provenance={"note": "mine"}
    )  # fmt: skip
    group = next(name for name, info in store.groups().items() if "note" not in info.provenance)
    before = shown_values(store, group=group)
    (part,) = [part.path for part in store.view(store.groups()[group]).parts]
    for chunk in ("prompts/z_mean_tail/c.1.0.0", "prompts/end_mean/c.0.0", "tokens/neurons/c.2.0.0"):
        chunk_of(store, part, chunk).write_bytes(b"")
    (own,) = [part.path for part in store.view(next(info for name, info in store.groups().items() if name != group)).parts]
    chunk_of(store, own, "prompts/own_mean/c.0.0.0").write_bytes(b"")
    summary = store.repair(progress=False)
    assert {name for lost in summary.lost for name in lost.variables} == {"z_mean_tail", "end_mean", "neurons", "own_mean"}
    for lost in summary.lost:
        if "own_mean" in lost.variables:
            assert lost.arguments["sites"] == [], "nobody knows what it is of"
            continue
        lz.extract(model, lost.prompts, store=store, progress=False, dtype="float32", **lost.arguments)
    after = shown_values(lz.open_store(store.url), group=group)
    assert set(after) == set(before)
    for name, array in before.items():
        np.testing.assert_allclose(after[name], array, rtol=1e-5, atol=1e-5, err_msg=name)


def shown_values(store: Store, group: str | None = None) -> dict[str, npt.NDArray[Any]]:
    found: dict[str, npt.NDArray[Any]] = {}
    for data in (store.dataset(group=group), store.tokens(group=group)):
        for name, array in data.data_vars.items():
            found[str(name)] = array.values[..., :1] if "top_k" in str(name) else array.values
    return found
