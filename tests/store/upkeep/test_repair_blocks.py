"""Damage in blocks, shards and tables: what can still be checked is read, `verify` names the file, and `repair` keeps all that is whole.

The oracle is what was written, and which rows lie in which block, counted here by hand.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from block_stores import LAYERS, small_chunks, values_of, write_values
from stores import GROUP, Wrapped

import lmprobe_zarr as lz
from lmprobe_zarr.batch import prompt_hash
from lmprobe_zarr.errors import CorruptPartError
from lmprobe_zarr.storage.local import LocalStorage
from lmprobe_zarr.store.parts import Part, kept_chunks, writer
from lmprobe_zarr.store.store import Store
from lmprobe_zarr.store.upkeep.losses import RepairSummary

KEY: Final = "tokens/resid"
ROWS, PROMPTS, TOKENS = 300, 60, 5  # of each prompt 5 rows
IN_BLOCK, IN_CHUNK, IN_SHARD = 8, 60, 3  # rows of a block and of a chunk, the last of whose 8 blocks has 4; chunks of a shard
VALUES: Final = values_of("normal", (2, ROWS, 4096), "float16")
Lost = set[tuple[int, int]]  # layer (its place), prompt


@pytest.fixture(
    scope="module",
    params=[(c, s) for c in (True, False) for s in (True, False)],
    ids=lambda p: f"{'lz4' if p[0] else 'raw'}-{'shards' if p[1] else 'files'}",
)
def template(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Part]:
    compressed, shards = request.param
    root = tmp_path_factory.mktemp("template") / "s"
    with small_chunks(2**19, IN_SHARD * 2**19), pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "INLINE_BYTES", 0)  # tables are files
        patch.setattr(writer, "_whole_blocks", lambda rows, nbytes: IN_CHUNK)  # and the last block of a chunk is shorter
        part = write_values(LocalStorage(root), VALUES, compressed=compressed, shards=shards, prompts=PROMPTS)
    info = part.info.arrays[KEY]
    assert (info.rows_per_chunk, info.n_blocks, info.shard_blocks) == (IN_CHUNK, 5, IN_SHARD if shards else 0)
    assert part.array("tokens", "resid").where.block_nbytes == IN_BLOCK * 8192
    return root, part


@pytest.fixture
def place(template: tuple[Path, Part], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return Path(shutil.copytree(template[0], tmp_path / "s"))


@pytest.fixture
def folder(template: tuple[Path, Part], place: Path) -> Path:
    return place / template[1].path / KEY


def file_of(folder: Path, layer: int, chunk: int) -> Path:
    return (
        folder / f"c.{layer}.{chunk // IN_SHARD if (folder / 'c.0.1.0').stat().st_size and not (folder / 'c.0.4.0').exists() else chunk}.0"
    )


def start_of(part: Part, layer: int, chunk: int) -> int:
    """Where a chunk begins in its file, by the part that is not damaged."""
    return part.array("tokens", "resid").where.chunk(layer, chunk).start


def bounds_of(part: Part, folder: Path, layer: int, chunk: int) -> list[int]:
    """Where the blocks of a chunk begin in its file, and the end of the last; by the header of its frame."""
    start, length = part.array("tokens", "resid").where.chunk(layer, chunk)[1:3]
    if not part.info.compressed:
        return [start + min(i * IN_BLOCK * 8192, IN_CHUNK * 8192) for i in range(9)]
    frame = file_of(folder, layer, chunk).read_bytes()[start : start + length]
    return [*(start + np.frombuffer(frame, "<i4", 8, 16)).tolist(), start + length - 4]


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 0x10
    file.write_bytes(data)


def prompts_of(rows: Iterable[int]) -> set[int]:
    return {row // TOKENS for row in rows if row < ROWS}


def rows_of(chunk: int, block: int) -> range:
    first = chunk * IN_CHUNK
    return range(first + block * IN_BLOCK, first + min((block + 1) * IN_BLOCK, IN_CHUNK))


def check_reads(root: Path, lost: Lost) -> None:
    """Each row alone and each layer in the ways in which it is read: the error where it must be, and otherwise what was written."""
    view = lz.open_store(root, "r").tokens(dtype="stored").resid
    for layer in (0, 1):
        for prompt in range(PROMPTS):
            some = view.isel(layer=layer, token=slice(prompt * TOKENS, (prompt + 1) * TOKENS))
            if (layer, prompt) in lost:
                with pytest.raises(CorruptPartError, match="of 'resid'"):
                    _ = some.values
            else:
                np.testing.assert_array_equal(some.values, VALUES[layer, prompt * TOKENS : (prompt + 1) * TOKENS])
        if any(at == layer for at, _ in lost):
            with pytest.raises(CorruptPartError, match="of 'resid'"):
                _ = view.isel(layer=layer).values
        else:
            np.testing.assert_array_equal(view.isel(layer=layer).values, VALUES[layer])


def check_kept(root: Path, lost: Lost) -> None:
    """All values but those that are lost are there, and all prompts in their order."""
    store = lz.open_store(root, "r")
    assert store.verify(progress=False).ok
    assert store.dataset().text.values.tolist() == [f"p{i}" for i in range(PROMPTS)]
    view = store.tokens(dtype="stored")
    labels = view.prompt.values
    for layer in (0, 1):
        for prompt in range(PROMPTS):
            mine = np.flatnonzero(labels == prompt_hash(f"p{prompt}"))
            read = view.resid.sel(layer=LAYERS[layer]).isel(token=mine).values
            if (layer, prompt) in lost:
                assert np.isnan(read).all()
            else:
                np.testing.assert_array_equal(read, VALUES[layer, prompt * TOKENS : (prompt + 1) * TOKENS])


def listed(done: RepairSummary) -> Lost:
    assert all(lost.variables == ("resid",) for lost in done.lost)
    return {(LAYERS.index(layer), int(text[1:])) for lost in done.lost for layer in lost.layers for text in lost.prompts}


def check_damage(root: Path, lost: Lost, named: set[str]) -> RepairSummary:
    """Reading, verifying, repairing."""
    kept_chunks._kept.cache_clear()  # as another process reads
    check_reads(root, lost)
    assert {problem.file.rpartition("/")[2] for problem in lz.open_store(root, "r").verify(progress=False).problems} == named
    planned = lz.open_store(root, durable=False).repair(dry_run=True, progress=False)
    done = lz.open_store(root, durable=False).repair(progress=False)
    assert replace(done, dry_run=True) == planned
    assert (done.left, done.unknown, done.dropped, done.columns) == ((), (), (), ())
    kept_chunks._kept.cache_clear()
    check_kept(root, lost)
    assert listed(done) == lost
    assert lz.open_store(root, durable=False).repair(progress=False).changes == 0
    return done


# ----------------------------------------------------------------------------------------------------------------- in a chunk


@pytest.mark.few(1)
@pytest.mark.parametrize(("layer", "chunk", "block"), [(0, 0, 0), (1, 1, 3), (0, 2, 7), (1, 2, 6), (0, 4, 5)])
def test_a_flipped_byte_in_a_block_costs_the_rows_of_that_block(
    template: tuple[Path, Part], place: Path, folder: Path, layer: int, chunk: int, block: int
) -> None:
    bounds = bounds_of(template[1], folder, layer, chunk)
    file = file_of(folder, layer, chunk)
    flip(file, (bounds[block] + bounds[block + 1]) // 2)
    lost = {(layer, prompt) for prompt in prompts_of(rows_of(chunk, block))}
    assert 0 < len(lost) < 4
    done = check_damage(place, lost, {file.name})
    assert len(done.rewritten) == 1


@pytest.mark.few(1)
def test_damages_of_several_blocks_of_several_files_cost_no_more_than_these(template: tuple[Path, Part], place: Path, folder: Path) -> None:
    lost: Lost = set()
    named = set()
    for layer, chunk, block in ((0, 0, 2), (0, 1, 0), (1, 3, 7), (1, 0, 1)):
        bounds = bounds_of(template[1], folder, layer, chunk)
        flip(file_of(folder, layer, chunk), bounds[block] + 5)
        named.add(file_of(folder, layer, chunk).name)
        lost |= {(layer, prompt) for prompt in prompts_of(rows_of(chunk, block))}
    check_damage(place, lost, named)


@pytest.mark.few(1)
@pytest.mark.parametrize("where", ["crc", "versions", "flags", "size", "places"])
def test_damage_beside_the_blocks_costs_nothing(template: tuple[Path, Part], place: Path, folder: Path, where: str) -> None:
    part = template[1]
    start, length = part.array("tokens", "resid").where.chunk(1, 1)[1:3]
    if where != "crc" and not part.info.compressed:
        pytest.skip("raw chunks have no header")
    file = file_of(folder, 1, 1)
    flip(file, start + {"crc": length - 2, "versions": 0, "flags": 2, "size": 5, "places": 21}[where])
    check_damage(place, set(), {file.name})


# ------------------------------------------------------------------------------------------------------------------- tables


DAMAGES: Final[dict[str, Callable[[Path], object]]] = {
    "missing": Path.unlink,
    "empty": lambda file: file.write_bytes(b""),
    "flipped": lambda file: flip(file, file.stat().st_size // 2),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-8]),
}


@pytest.mark.few(1)
@pytest.mark.parametrize("names", [("chunk_table",), ("block_table",), ("chunk_table", "block_table")], ids="+".join)
@pytest.mark.parametrize("damage", DAMAGES)
def test_tables_come_back_byte_for_byte(
    template: tuple[Path, Part], place: Path, folder: Path, names: tuple[str, ...], damage: str
) -> None:
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    for name in names:
        DAMAGES[damage](folder / name)
    lost = {(layer, prompt) for layer in (0, 1) for prompt in range(PROMPTS)} if len(names) == 2 else set()
    kept_chunks._kept.cache_clear()
    view = lz.open_store(place, "r").tokens(dtype="stored").resid
    if lost:
        with pytest.raises(CorruptPartError, match="repair"):
            _ = view.isel(layer=0, token=[3]).values
    else:
        check_reads(place, set())
    found = {problem.file.rpartition("/")[2]: problem for problem in lz.open_store(place, "r").verify(progress=False).problems}
    assert found.keys() == set(names), "the chunks are whole"
    assert all("writes it again" in problem.advice for problem in found.values())
    assert set(names) <= {p.file.rpartition("/")[2] for p in lz.open_store(place, "r").verify(full=False, progress=False).problems} | (
        {"block_table"} if damage == "flipped" else set()
    )
    done = lz.open_store(place, durable=False).repair(progress=False)
    assert {key.rpartition("/")[2] for key in done.restored} == set(names)
    assert (done.rewritten, done.dropped, done.lost, done.left) == ((), (), (), ())
    after = {path: path.read_bytes() for path in place.rglob("*") if path.is_file() and path.parent.name != ".used"}
    assert after == {path: data for path, data in before.items() if path.parent.name != ".used"}
    check_kept(place, set())


@pytest.mark.few(1)
@pytest.mark.parametrize("table", ["chunk_table", "block_table"])
def test_a_lost_table_and_a_damaged_block_cost_what_cannot_be_checked(
    template: tuple[Path, Part], place: Path, folder: Path, table: str
) -> None:
    bounds = bounds_of(template[1], folder, 0, 1)
    (folder / table).unlink()
    file = file_of(folder, 0, 1)
    flip(file, bounds[3] + 9)
    # Without the table of blocks it is unknown where in the chunk the damage is.
    rows = rows_of(1, 3) if table == "chunk_table" else range(IN_CHUNK, 2 * IN_CHUNK)
    lost = {(0, prompt) for prompt in prompts_of(rows)}
    kept_chunks._kept.cache_clear()
    check_reads(place, lost)
    done = lz.open_store(place, durable=False).repair(progress=False)
    assert listed(done) == lost
    kept_chunks._kept.cache_clear()
    check_kept(place, lost)


def test_both_tables_and_a_shard_lost_end_in_a_store_without_faults(template: tuple[Path, Part], place: Path, folder: Path) -> None:
    for name in ("chunk_table", "block_table"):
        (folder / name).write_bytes(b"")
    file_of(folder, 0, 1).write_bytes(b"")
    kept_chunks._kept.cache_clear()
    done = lz.open_store(place, durable=False).repair(progress=False)
    # Nothing says any more what the chunks are to hold.
    assert listed(done) == {(layer, prompt) for layer in (0, 1) for prompt in range(PROMPTS)}
    kept_chunks._kept.cache_clear()
    clean = lz.open_store(place, "r")
    assert clean.verify(progress=False).ok
    assert clean.dataset().text.values.tolist() == [f"p{i}" for i in range(PROMPTS)]
    assert "resid" not in clean.tokens()
    assert lz.open_store(place, durable=False).repair(progress=False).changes == 0


# ------------------------------------------------------------------------------------------------------------------- shards


def needs_shards(part: Part) -> None:
    if not part.info.has_shards:
        pytest.skip("chunks are files")


@pytest.mark.few(1)
@pytest.mark.parametrize("at", [1, 6, 30, 52])
def test_damage_in_the_index_of_a_shard_costs_nothing(template: tuple[Path, Part], place: Path, folder: Path, at: int) -> None:
    needs_shards(template[1])
    flip(folder / "c.1.0.0", (folder / "c.1.0.0").stat().st_size - at)
    check_damage(place, set(), {"c.1.0.0"})


@pytest.mark.few(1)
@pytest.mark.parametrize("table", ["chunk_table", "block_table", None])
def test_damage_in_an_index_and_of_a_table_costs_nothing(template: tuple[Path, Part], place: Path, folder: Path, table: str | None) -> None:
    needs_shards(template[1])
    if table is not None:
        (folder / table).unlink()
    for layer in (0, 1):
        flip(folder / f"c.{layer}.0.0", (folder / f"c.{layer}.0.0").stat().st_size - 9)
    check_damage(place, set(), {"c.0.0.0", "c.1.0.0", *([] if table is None else [table])})


@pytest.mark.few(2)
@pytest.mark.parametrize("longer", [False, True])
def test_a_cut_shard_costs_what_was_cut_off(template: tuple[Path, Part], place: Path, folder: Path, longer: bool) -> None:
    part = template[1]
    needs_shards(part)
    file = folder / "c.0.0.0"
    if longer:
        file.write_bytes(file.read_bytes() + b"more")
        check_damage(place, set(), {"c.0.0.0"})
        return
    bounds = bounds_of(part, folder, 0, 1)
    file.write_bytes(file.read_bytes()[: bounds[4] + 100])
    lost = {(0, prompt) for prompt in prompts_of(range(rows_of(1, 4).start, 3 * IN_CHUNK))}
    check_damage(place, lost, {"c.0.0.0"})


@pytest.mark.few(1)
@pytest.mark.parametrize("how", ["missing", "empty"])
def test_a_missing_file_of_chunks_costs_its_rows(template: tuple[Path, Part], place: Path, folder: Path, how: str) -> None:
    file, chunks = file_of(folder, 1, 4), (3, 4) if template[1].info.has_shards else (4,)
    DAMAGES[how](file)
    lost = {(1, prompt) for chunk in chunks for prompt in prompts_of(range(chunk * IN_CHUNK, (chunk + 1) * IN_CHUNK))}
    check_damage(place, lost, {file.name})


def test_a_store_of_chunks_without_blocks_keeps_the_other_chunks_of_a_damaged_shard(tmp_path: Path) -> None:
    values = values_of("normal", (2, 100, 64), "float32")
    with small_chunks(2560, 4 * 2560):  # 10 rows a chunk
        part = write_values(LocalStorage(tmp_path / "s"), values, shards=True, prompts=20)
    info = part.info.arrays[KEY]
    assert (info.rows_per_chunk, info.shard_blocks, part.array("tokens", "resid").where.block_nbytes) == (10, 4, 0)
    start = part.array("tokens", "resid").where.chunk(0, 5)[1]
    flip(tmp_path / "s" / part.path / KEY / "c.0.1.0", start + 30)
    done = lz.open_store(tmp_path / "s", durable=False).repair(progress=False)
    assert {(layer, text) for lost in done.lost for layer in lost.layers for text in lost.texts} == {(0, "p10"), (0, "p11")}
    view = lz.open_store(tmp_path / "s", "r").tokens(dtype="stored").resid
    read: Any = view.sel(layer=0).values
    np.testing.assert_array_equal(np.delete(read, slice(50, 60), axis=0), np.delete(values[0], slice(50, 60), axis=0))
    np.testing.assert_array_equal(view.sel(layer=3).values, values[1])
    assert GROUP.name in part.path


# ---------------------------------------------------------------------------------------------------- parts that go meanwhile


class Going(Wrapped):
    """A storage from which another process removes a part, right before its table of chunks is read."""

    def read(self, key: str) -> bytes:
        if key.endswith("chunk_table"):
            self.inner.remove_tree(key.removesuffix(f"/{KEY}/chunk_table"))
        return super().read(key)


@pytest.mark.parametrize("full", [True, False])
def test_a_part_that_goes_while_it_is_verified_is_no_damage(place: Path, full: bool) -> None:
    kept_chunks._kept.cache_clear()
    summary = Store(Going(LocalStorage(place))).verify(full=full, progress=False)
    assert (summary.ok, summary.problems) == (True, ())


def test_garbage_is_collected_though_the_part_that_replaces_others_goes_meanwhile(tmp_path: Path) -> None:
    with small_chunks(2**19), pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "INLINE_BYTES", 0)
        for i in range(2):
            write_values(LocalStorage(tmp_path / "s"), VALUES[:, :100], first=i)
        lz.open_store(tmp_path / "s", durable=False).compact(progress=False)
    kept_chunks._kept.cache_clear()
    summary = Store(Going(LocalStorage(tmp_path / "s")), durable=False).gc(max_age=0)
    assert summary.replaced == ()
    assert lz.open_store(tmp_path / "s").dataset().text.values.tolist() == ["p0", "p1"], "what was replaced shows again"
