"""Tables of chunks and blocks that lie, in a document whose digest holds, and bytes that were exchanged: an error, and never a wrong value.

What may be read is what was written. Where only one of both tables lies, the other is a way to the values that can be checked.
"""

from __future__ import annotations

import base64
import shutil
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pytest
from block_stores import crc, reseal, small_chunks, text_of, values_of, words_of, write_values
from stores import GROUP

import lmprobe_zarr as lz
from lmprobe_zarr.errors import CorruptPartError, LmprobeZarrError
from lmprobe_zarr.storage.local import LocalStorage
from lmprobe_zarr.store.format.tables import chunk_table_nbytes
from lmprobe_zarr.store.parts import Part, writer

Words = npt.NDArray[np.uint32]
KEY: Final = "tokens/resid"
VALUES: Final = values_of("normal", (2, 300, 4096), "float16")  # 8 rows a block, 64 a chunk: 5 chunks, of which 3 are in a shard
N_BLOCKS: Final = 8
LAYOUTS: Final = [(compressed, shards, inline) for compressed in (True, False) for shards in (False, True) for inline in (True, False)]


def made(root: Path, *, compressed: bool, shards: bool, inline: bool, values: npt.NDArray[Any] = VALUES, first: int = 0) -> Part:
    with small_chunks(2**19, 3 * 2**19), pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "INLINE_BYTES", 2**20 if inline else 0)
        return write_values(LocalStorage(root), values, compressed=compressed, shards=shards, prompts=10, first=first)


@pytest.fixture(
    scope="module",
    params=LAYOUTS,
    ids=lambda p: "-".join(w for w, is_so in zip(("lz4", "shards", "inline"), p, strict=True) if is_so) or "plain",
)
def template(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Part]:
    compressed, shards, inline = request.param
    root = tmp_path_factory.mktemp("template") / "s"
    return root, made(root, compressed=compressed, shards=shards, inline=inline)


@pytest.fixture
def copied(template: tuple[Path, Part], tmp_path: Path) -> tuple[Path, Part]:
    root, part = template
    there = Path(shutil.copytree(root, tmp_path / "s"))
    return there, Part(LocalStorage(there), part.path, part.info)


SELECTIONS: Final[list[Any]] = [slice(0, 1), slice(60, 70), slice(299, 300), [3, 64, 130, 131, 290], slice(0, 300), slice(5, 290)]


def outcomes(root: Path) -> list[bool]:
    """Whether each of several reads gives what was written; those that do not raise our error, and nothing else is ever read."""
    found = []
    view = lz.open_store(root, "r").tokens(dtype="stored").resid
    for layer in (0, 1):
        for rows in SELECTIONS:
            try:
                read = view.isel(layer=layer, token=rows).values
            except CorruptPartError:
                found.append(False)
            else:
                np.testing.assert_array_equal(read, VALUES[layer, rows])
                found.append(True)
    return found


def change_table(root: Path, part: Part, name: str, change: Callable[[Words], object]) -> None:
    """Change a table as somebody does who knows the format, in the document or in its file."""
    place = root / part.path

    def reword(document: Any) -> None:
        attributes = document["attributes"]
        described = attributes["tables"][KEY]
        if described[name] is not None:
            words = words_of(described[name])
            changed = change(words)
            described[name] = text_of(words if changed is None else changed)  # type: ignore[arg-type]
            return
        words = np.frombuffer((place / KEY / name).read_bytes(), "<u4").copy()
        changed = change(words)
        data = (words if changed is None else np.asarray(changed)).astype("<u4").tobytes()
        (place / KEY / name).write_bytes(data)
        attributes["files"][f"{KEY}/{name}"] = [len(data), crc(data)]

    reseal(place / "zarr.json", reword)


def every(number: int, value: Callable[[Words], Any], width: int) -> Callable[[Words], None]:
    """Change one number of every chunk."""

    def change(words: Words) -> None:
        of_chunks = words.reshape(-1, width)
        of_chunks[:, number] = value(of_chunks[:, number].astype(np.int64))

    return change


RECORD: Final = 2 + 2 * N_BLOCKS
LENGTHS: Final[dict[str, Callable[[Words], Any]]] = {
    "nothing": lambda n: n * 0,
    "three": lambda n: n * 0 + 3,
    "four": lambda n: n * 0 + 4,
    "one more": lambda n: n + 1,
    "one less": lambda n: n - 1,
    "four gigabytes": lambda n: n * 0 + 2**32 - 1,
    "twice": lambda n: n * 2,
    "those of the neighbour": lambda n: np.roll(n, 1),
}
HEADS: Final[dict[str, Callable[[Words], Any]]] = {
    "no head": lambda n: n * 0,
    "all bits": lambda n: n * 0 + 2**32 - 1,
    "copied": lambda n: n ^ (2 << 16),
    "not split": lambda n: n ^ (16 << 16),
    "no filter": lambda n: n & ~(5 << 16),
    "another filter": lambda n: n ^ (5 << 16),
    "another codec": lambda n: n ^ (3 << 21),
    "no items": lambda n: n & 0xFFFFFF,
    "larger items": lambda n: (n & 0xFFFFFF) | 255 << 24,
    "other items": lambda n: (n & 0xFFFFFF) | 4 << 24,
    "another version": lambda n: n ^ 1,
}
CHUNK_LIES: Final = {
    **{f"lengths of chunks: {name}": every(0, value, 2) for name, value in LENGTHS.items()},
    "checksums of chunks": every(1, lambda n: n ^ 1, 2),
    "chunks in another order": lambda words: words.reshape(-1, 2)[::-1].ravel(),
    "all zeros": lambda words: words * 0,
    "all ones": lambda words: np.full_like(words, 2**32 - 1),
}
BLOCK_LIES: Final = {
    **{f"lengths of chunks: {name}": every(0, value, RECORD) for name, value in LENGTHS.items()},
    **{f"heads: {name}": every(1, value, RECORD) for name, value in HEADS.items()},
    **{f"length of the first block: {name}": every(2, value, RECORD) for name, value in LENGTHS.items()},
    **{f"length of the last block: {name}": every(2 * N_BLOCKS, value, RECORD) for name, value in LENGTHS.items()},
    "checksums of the first blocks": every(3, lambda n: n ^ 1, RECORD),
    "chunks in another order": lambda words: words.reshape(-1, RECORD)[::-1].ravel(),
    "all zeros": lambda words: words * 0,
    "all ones": lambda words: np.full_like(words, 2**32 - 1),
}  # fmt: skip


@pytest.fixture
def few_bytes() -> Iterator[None]:
    """What is read takes no more memory than what is stored, several times."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 32 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.few(6)
def test_unchanged_everything_is_read(template: tuple[Path, Part]) -> None:
    root, part = template
    assert part.info.tables is not None
    assert part.info.tables[KEY].block_nbytes == 2**16
    assert all(outcomes(root))
    assert lz.open_store(root, "r").verify(progress=False).ok


def restored(root: Path, part: Part) -> Callable[[], None]:
    """What puts the part's document and its tables back as they are now."""
    files = [root / part.path / "zarr.json", *(path for path in (root / part.path / KEY).iterdir() if path.name.endswith("_table"))]
    kept = {path: path.read_bytes() for path in files}

    def restore() -> None:
        for path, data in kept.items():
            path.write_bytes(data)

    return restore


@pytest.mark.few(1)
def test_where_the_chunk_table_lies_values_come_by_the_blocks(copied: tuple[Path, Part]) -> None:
    root, part = copied
    restore, before = restored(root, part), (root / part.path / "zarr.json").read_bytes()
    for name, lie in CHUNK_LIES.items():
        change_table(root, part, "chunk_table", lie)
        if (root / part.path / "zarr.json").read_bytes() == before:
            assert "neighbour" in name, "all chunks have one length"
            continue
        assert all(outcomes(root)), f"{name}: the blocks have checksums of their own"
        assert not lz.open_store(root, "r").verify(progress=False).ok, name
        restore()


@pytest.mark.few(1)
def test_where_the_block_table_lies_values_come_by_the_chunks(copied: tuple[Path, Part]) -> None:
    root, part = copied
    restore = restored(root, part)
    for name, lie in BLOCK_LIES.items():
        change_table(root, part, "block_table", lie)
        assert all(outcomes(root)), f"{name}: the chunks have checksums of their own"
        restore()


@pytest.mark.few(1)
def test_where_both_tables_lie_nothing_is_read(copied: tuple[Path, Part]) -> None:
    root, part = copied
    restore, shards = restored(root, part), part.info.has_shards
    first, later = SELECTIONS.index(slice(0, 1)), SELECTIONS.index(slice(299, 300))
    for name in sorted(CHUNK_LIES.keys() & BLOCK_LIES.keys()):
        change_table(root, part, "chunk_table", CHUNK_LIES[name])
        change_table(root, part, "block_table", BLOCK_LIES[name])
        found = outcomes(root)
        if name.startswith("lengths"):
            assert found[first], "of the first chunk in a file the place of the blocks is known"
            assert found[later] or shards, "and so it is where each chunk is a file"
        elif name.startswith("all"):
            assert not any(found), name
        restore()


def test_tables_that_lie_take_no_memory(copied: tuple[Path, Part], few_bytes: None) -> None:
    root, part = copied
    for name in ("lengths of chunks: four gigabytes", "all ones"):
        change_table(root, part, "chunk_table", CHUNK_LIES[name])
        change_table(root, part, "block_table", BLOCK_LIES[name])
        array = lz.open_store(root, "r").listing(GROUP).parts[0].array("tokens", "resid")
        for rows in (slice(3, 4), slice(0, 64), np.array([1, 60])):
            with suppress(CorruptPartError):
                np.testing.assert_array_equal(array.read_rows(1, 1, rows), VALUES[1, 64:128][rows])


@pytest.mark.few(6)
@pytest.mark.parametrize("change", [-1, 1, 2**20])
def test_tables_of_another_length_are_refused(copied: tuple[Path, Part], change: int) -> None:
    root, part = copied
    restore = restored(root, part)
    for name in ("chunk_table", "block_table"):
        change_table(root, part, name, lambda words: words[:change] if change < 0 else np.concatenate([words, np.zeros(change, "<u4")]))
        if part.info.tables is not None and part.info.tables[KEY].chunks is not None:
            with pytest.raises(CorruptPartError):
                lz.open_store(root, "r").tokens()
        else:
            assert all(outcomes(root)), "the other table is one way to everything"
        restore()


TABLES_LIES: Final[dict[str, Callable[[Any], object]]] = {
    "no tables": lambda d: d["attributes"].pop("tables"),
    "tables of nothing": lambda d: d["attributes"].update(tables=None),
    "a list": lambda d: d["attributes"].update(tables=[]),
    "an array that is not there": lambda d: d["attributes"]["tables"].update({"tokens/other": d["attributes"]["tables"][KEY]}),
    "a path": lambda d: d["attributes"]["tables"].update({"../../x": d["attributes"]["tables"][KEY]}),
    "garbage": lambda d: d["attributes"]["tables"][KEY].update(chunk_table="%%%%"),
    "half of base64": lambda d: d["attributes"]["tables"][KEY].update(chunk_table="AAA"),
    "not ASCII": lambda d: d["attributes"]["tables"][KEY].update(chunk_table="\ud800é"),
    "blocks of a byte": lambda d: d["attributes"]["tables"][KEY].update(block_nbytes=1),
    "blocks of a terabyte": lambda d: d["attributes"]["tables"][KEY].update(block_nbytes=2**40),
    "negative blocks": lambda d: d["attributes"]["tables"][KEY].update(block_nbytes=-65536),
    "no number of bytes": lambda d: d["attributes"]["tables"][KEY].update(nbytes="5"),
    "2^60 rows": lambda d: d["consolidated_metadata"]["metadata"][KEY]["shape"].__setitem__(1, 2**60),
    "2^60 rows in a chunk": lambda d: _chunks_of(d).__setitem__(1, 2**60),
    "a million chunks": lambda d: (
        _chunks_of(d).__setitem__(1, 1),
        d["consolidated_metadata"]["metadata"][KEY]["shape"].__setitem__(1, 2**20),
    ),
    "digests of one prompt": lambda d: d["attributes"].update(prompt_digests=base64.b64encode(bytes(32)).decode()),
    "digests that are none": lambda d: d["attributes"].update(prompt_digests=base64.b64encode(bytes(33)).decode()),
    "no digests": lambda d: d["attributes"].update(prompt_digests=""),
    "counts of no tokens": lambda d: d["attributes"].update(n_tokens=base64.b64encode(bytes(40)).decode()),
    "counts of four billion tokens": lambda d: d["attributes"].update(n_tokens=base64.b64encode(b"\xff" * 40).decode()),
    "half a count": lambda d: d["attributes"].update(n_tokens=base64.b64encode(bytes(38)).decode()),
    "an index as text": lambda d: d["attributes"].update(prompt_sha256=base64.b64decode(d["attributes"].pop("prompt_digests")).hex()),
    "version 1": lambda d: d["attributes"].update(format_version=1),
}


def _chunks_of(document: Any) -> list[int]:
    array = document["consolidated_metadata"]["metadata"][KEY]
    sharding = array["codecs"][0].get("configuration", {})
    found: list[int] = sharding["chunk_shape"] if "chunk_shape" in sharding else array["chunk_grid"]["configuration"]["chunk_shape"]
    return found


@pytest.mark.few(24)
@pytest.mark.parametrize("lie", TABLES_LIES)
def test_documents_that_contradict_themselves_are_refused_whole(copied: tuple[Path, Part], lie: str, few_bytes: None) -> None:
    root, part = copied
    reseal(root / part.path / "zarr.json", TABLES_LIES[lie])
    with pytest.raises(CorruptPartError) as caught:
        lz.open_store(root, "r").tokens()
    assert part.path in str(caught.value)
    assert len(str(caught.value)) < 600
    (problem,) = lz.open_store(root, "r").verify(progress=False).problems
    assert (problem.part, problem.kind) == (part.path, "document")


@pytest.mark.parametrize("blocks", [1, 6, 7, 2**20, 2**40])
def test_shards_of_other_sizes_are_refused(tmp_path: Path, blocks: int, few_bytes: None) -> None:
    part = made(tmp_path / "s", compressed=True, shards=True, inline=True)

    def restate(document: Any) -> None:
        document["consolidated_metadata"]["metadata"][KEY]["chunk_grid"]["configuration"]["chunk_shape"][1] = 64 * blocks

    reseal(tmp_path / "s" / part.path / "zarr.json", restate)
    if blocks == 1:  # it says of each chunk where another shard would have it
        assert not all(outcomes(tmp_path / "s"))
        assert not lz.open_store(tmp_path / "s", "r").verify(progress=False).ok
        return
    with pytest.raises(CorruptPartError):
        lz.open_store(tmp_path / "s", "r").tokens()


def test_a_sharded_array_needs_a_table_and_files_are_none(tmp_path: Path) -> None:
    part = made(tmp_path / "s", compressed=True, shards=True, inline=True)
    sizes = part.array("tokens", "resid").where.file_sizes()

    def untable(document: Any) -> None:
        del document["attributes"]["tables"][KEY]
        document["attributes"]["files"] |= {f"{KEY}/{name}": [nbytes, 0] for name, nbytes in sizes.items()}

    reseal(tmp_path / "s" / part.path / "zarr.json", untable)
    with pytest.raises(CorruptPartError, match="no table of chunks"):
        lz.open_store(tmp_path / "s", "r").tokens()


@pytest.mark.few(2)
@pytest.mark.parametrize("nbytes", [0, 8, 2**31, 2**50])
@pytest.mark.parametrize("name", ["chunk_table", "block_table"])
def test_files_of_tables_that_are_said_to_be_huge_are_not_read(tmp_path: Path, name: str, nbytes: int, few_bytes: None) -> None:
    part = made(tmp_path / "s", compressed=True, shards=True, inline=False)
    reseal(tmp_path / "s" / part.path / "zarr.json", lambda d: d["attributes"]["files"].update({f"{KEY}/{name}": [nbytes, 0]}))
    assert all(outcomes(tmp_path / "s")), "by the other table"
    other = "block_table" if name == "chunk_table" else "chunk_table"
    reseal(tmp_path / "s" / part.path / "zarr.json", lambda d: d["attributes"]["files"].pop(f"{KEY}/{other}"))
    assert not any(outcomes(tmp_path / "s"))


def test_a_table_of_a_million_chunks_costs_nothing_before_it_is_found_false(tmp_path: Path, few_bytes: None) -> None:
    part = made(tmp_path / "s", compressed=False, shards=False, inline=False)

    def many(document: Any) -> None:
        array = document["consolidated_metadata"]["metadata"][KEY]
        array["chunk_grid"]["configuration"]["chunk_shape"][1] = 1
        # Of each row a chunk, in a layer: as many as the document may state, with a table that would be as long.
        document["attributes"]["tables"][KEY] = {"nbytes": 2**52, "chunk_table": None, "block_nbytes": 0}
        document["attributes"]["files"][f"{KEY}/chunk_table"] = [8 * 600, 0]

    reseal(tmp_path / "s" / part.path / "zarr.json", many)
    assert not any(outcomes(tmp_path / "s"))
    assert chunk_table_nbytes(part.info.arrays[KEY]) == 80


# -------------------------------------------------------------------------------------------------------- what was exchanged


def two_parts(tmp_path: Path, *, compressed: bool, shards: bool, inline: bool) -> tuple[Part, Part]:
    parts = [
        made(tmp_path / name, compressed=compressed, shards=shards, inline=inline, values=values, first=first)
        for name, values, first in (("s", VALUES, 0), ("o", values_of("normal", VALUES.shape, "float16", 1), 100))
    ]
    return parts[0], parts[1]


@pytest.mark.parametrize(("compressed", "shards"), [(True, True), (True, False), (False, True), (False, False)])
def test_tables_of_another_part_are_not_believed(tmp_path: Path, compressed: bool, shards: bool) -> None:
    import json

    part, other = two_parts(tmp_path, compressed=compressed, shards=shards, inline=True)
    theirs = json.loads((tmp_path / "o" / other.path / "zarr.json").read_bytes())["attributes"]["tables"][KEY]
    reseal(tmp_path / "s" / part.path / "zarr.json", lambda d: d["attributes"]["tables"].update({KEY: theirs}))
    assert not any(outcomes(tmp_path / "s"))
    part, other = two_parts(tmp_path / "2", compressed=compressed, shards=shards, inline=False)
    for name in ("chunk_table", "block_table"):
        shutil.copy(tmp_path / "2" / "o" / other.path / KEY / name, tmp_path / "2" / "s" / part.path / KEY / name)
    assert not any(outcomes(tmp_path / "2" / "s"))
    found = {problem.file.rpartition("/")[2] for problem in lz.open_store(tmp_path / "2" / "s", "r").verify(progress=False).problems}
    assert {"chunk_table", "block_table"} <= found


def swap(data: bytes, first: tuple[int, int], second: tuple[int, int]) -> bytes:
    (a, b), (c, d) = sorted([first, second])
    assert b <= c
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


@pytest.mark.parametrize("shards", [False, True])
def test_exchanged_blocks_of_one_length_are_an_error(tmp_path: Path, shards: bool) -> None:
    part = made(tmp_path / "s", compressed=False, shards=shards, inline=True)
    file = tmp_path / "s" / part.path / KEY / "c.0.0.0"
    data = file.read_bytes()
    file.write_bytes(swap(data, (2 * 65536, 3 * 65536), (5 * 65536, 6 * 65536)))
    array = part.array("tokens", "resid")
    for rows in (slice(16, 17), slice(47, 48), np.array([0, 20]), slice(0, 64)):
        with pytest.raises(CorruptPartError, match=r"c\.0\.0\.0 of 'resid'"):
            array.read_rows(0, 0, rows)
    for rows in (slice(0, 16), slice(24, 40), slice(48, 64)):
        np.testing.assert_array_equal(array.read_rows(0, 0, rows), VALUES[0, rows])
    assert [p.file.rpartition("/")[2] for p in lz.open_store(tmp_path / "s", "r").verify(progress=False).problems] == ["c.0.0.0"]


@pytest.mark.parametrize("compressed", [False, True])
def test_exchanged_chunks_in_a_shard_and_exchanged_shards_are_an_error(tmp_path: Path, compressed: bool) -> None:
    part = made(tmp_path / "s", compressed=compressed, shards=True, inline=True)
    array = part.array("tokens", "resid")
    file = tmp_path / "s" / part.path / KEY / "c.0.0.0"
    data = file.read_bytes()
    ends = np.cumsum([0, *(array.where.chunk(0, block).length for block in range(3))]).tolist()
    file.write_bytes(swap(data, (ends[0], ends[1]), (ends[2], ends[3])))
    for block in (0, 2):
        with pytest.raises(CorruptPartError, match=rf"c\.0\.{block}\.0 of 'resid'"):
            array.read_rows(0, block, slice(3, 4))
        with pytest.raises(CorruptPartError):
            array.read_chunk(0, block)
    np.testing.assert_array_equal(array.read_rows(0, 3, slice(3, 4)), VALUES[0, 195:196])
    file.write_bytes(data)
    assert all(outcomes(tmp_path / "s"))
    other = file.with_name("c.1.0.0")
    theirs = other.read_bytes()
    file.write_bytes(theirs)
    other.write_bytes(data)
    for layer in (0, 1):
        for block in (0, 1, 2):
            with pytest.raises(CorruptPartError):
                array.read_rows(layer, block, slice(3, 4))
            with pytest.raises(CorruptPartError):
                array.read_chunk(layer, block)
    found = {p.file.rpartition("/")[2] for p in lz.open_store(tmp_path / "s", "r").verify(progress=False).problems}
    assert found == {"c.0.0.0", "c.1.0.0"}


@pytest.mark.parametrize("compressed", [False, True])
def test_a_changed_index_of_a_shard_matters_to_other_readers_alone_and_is_found_and_mended(tmp_path: Path, compressed: bool) -> None:
    part = made(tmp_path / "s", compressed=compressed, shards=True, inline=True)
    file = tmp_path / "s" / part.path / KEY / "c.1.0.0"
    data = bytearray(file.read_bytes())
    index = np.frombuffer(data[-52:-4], "<u8").reshape(3, 2)[[1, 0, 2]].tobytes()
    data[-52:] = index + crc(index).to_bytes(4, "little")
    file.write_bytes(data)
    assert all(outcomes(tmp_path / "s"))
    (problem,) = lz.open_store(tmp_path / "s", "r").verify(progress=False).problems
    assert problem.file.endswith("c.1.0.0")
    done = lz.open_store(tmp_path / "s", durable=False).repair(progress=False)
    assert (done.lost, done.columns, done.dropped) == ((), (), ())
    assert all(outcomes(tmp_path / "s"))
    assert lz.open_store(tmp_path / "s", "r").verify(progress=False).ok


def test_upkeep_of_a_store_with_lying_tables_ends_in_our_errors_or_none(copied: tuple[Path, Part]) -> None:
    root, part = copied
    change_table(root, part, "chunk_table", CHUNK_LIES["all ones"])
    change_table(root, part, "block_table", BLOCK_LIES["all ones"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for act in (
            lambda: lz.open_store(root, durable=False).compact(progress=False),
            lambda: lz.open_store(root, durable=False).copy_to(root.parent / "c", progress=False),
            lambda: lz.open_store(root, durable=False).publish(root.parent / "p", progress=False),
            lambda: lz.open_store(root, durable=False).gc(max_age=0),
            lambda: lz.open_store(root, durable=False).verify(full=False, progress=False),
            lambda: lz.cache_info(store=root),
            lambda: lz.open_store(root, durable=False).repair(dry_run=True, progress=False),
            lambda: lz.open_store(root, durable=False).repair(progress=False),
        ):
            with suppress(LmprobeZarrError):
                act()
    assert lz.open_store(root, "r").verify(progress=False).ok
    assert (root / GROUP.name).is_dir()
