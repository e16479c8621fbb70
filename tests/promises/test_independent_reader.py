"""The page about the format is enough: a reader that was written from it alone, without zarr and without this package, reads the same
numbers, in parts, in blocks of chunks, in views of many parts, and in stores of every version, and notices every damaged byte and lie.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import google_crc32c
import independent_reader
import numpy as np
import numpy.typing as npt
import pytest
from paths import OLD_STORES
from stores import GROUP, make_batch
from versions import small_chunks, write_part, write_version

import lmprobe_zarr as lz
from lmprobe_zarr.batch.token_batch import TokenBatch
from lmprobe_zarr.store.format.group import GroupInfo
from lmprobe_zarr.store.store import Store

SCRIPT = Path(independent_reader.__file__)
OLD = OLD_STORES
COLUMNS = {"label": [1, 0, 1], "split": ["train", "", "träin 🐦"], "seen": [True, False, True], "weight": [0.5, 1.0, 2.0]}


WIDE = GroupInfo(model="acme/wide", provenance={}, num_layers=8, hidden_size=1000)


@pytest.fixture(params=[1, 2])
def version(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The version that parts are written in."""
    number: int = request.param
    write_version(monkeypatch, number)
    return number


def part_of(store: Store) -> Path:
    return next(path for path in (Path(store.url) / GROUP.name).iterdir() if len(path.name) == 26)


def test_the_checksum_is_that_of_the_standard() -> None:
    # RFC 3720, B.4: 32 bytes of zeros, of ones, and ascending; and the check value that catalogues of crcs give.
    assert independent_reader.crc32c(b"123456789") == 0xE3069283
    assert independent_reader.crc32c(bytes(32)) == 0x8A9136AA
    assert independent_reader.crc32c(b"\xff" * 32) == 0x62A8AB43
    assert independent_reader.crc32c(bytes(range(32))) == 0x46DD794E


@pytest.mark.few(1)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_part_is_read_to_the_values_that_were_written_without_zarr_and_without_this_package(
    tmp_path: Path, dtype: str, version: int
) -> None:
    texts = ["a", "bb", "ccc"]
    batch = make_batch(texts, columns=COLUMNS, dtype=dtype)
    store = lz.open_store(tmp_path / "s")
    store.write(GROUP, batch)
    assert b'"format_version":%d,"kind":"part"' % version in (part_of(store) / "zarr.json").read_bytes()
    # An isolated interpreter, which checks itself that neither zarr nor the package has been imported.
    command = [sys.executable, "-I", str(SCRIPT), f"{store.url}/{GROUP.name}", str(tmp_path / "read.npz")]
    subprocess.run(command, check=True, timeout=120)
    with np.load(tmp_path / "read.npz") as read:
        np.testing.assert_array_equal(read["tokens.resid"], batch.tokens["resid"].swapaxes(0, 1))
        np.testing.assert_array_equal(read["prompts.resid_mean"], batch.prompts["resid_mean"].swapaxes(0, 1))
        assert read["tokens.resid"].dtype == dtype
        assert read["prompts.layer"].tolist() == read["tokens.layer"].tolist() == [0, 1, 3]
        assert read["prompts.text"].tolist() == texts
        assert read["prompts.prompt"].tolist() == [lz.prompt_hash(text) for text in texts]
        for name, values in COLUMNS.items():
            assert read[f"prompts.{name}"].tolist() == values
        assert read["tokens.position"].tolist() == [0, 1, 0, 1, 2, 0, 1, 2, 3]
        np.testing.assert_array_equal(read["tokens.token_id"], batch.token_columns["token_id"])


def filled(batch: TokenBatch, kind: str) -> TokenBatch:
    """The same batch with values that compress very well, somewhat, or not at all."""

    def change(array: npt.NDArray[Any], seed: int) -> npt.NDArray[Any]:
        rng = np.random.default_rng(seed)
        if kind == "bits":
            return np.frombuffer(rng.bytes(array.nbytes), array.dtype).reshape(array.shape)
        return array if kind == "normal" else np.broadcast_to(rng.integers(-9, 9, (*array.shape[:-1], 1)), array.shape).astype(array.dtype)

    made = [{name: change(array, i) for i, (name, array) in enumerate(arrays.items())} for arrays in (batch.prompts, batch.tokens)]
    return replace(batch, prompts=made[0], tokens=made[1])


def assert_same_bits(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> None:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert found.tobytes() == expected.tobytes()


@pytest.mark.few(1)
@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("kind", ["constant", "normal", "bits"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_many_chunks_are_read_and_rows_by_their_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int, dtype: str, kind: str, compressed: bool, shards: bool
) -> None:
    small_chunks(monkeypatch, 2**18)
    prompts = 230 if dtype == "float32" else 460
    batch = filled(make_batch([f"{i}" for i in range(prompts)], layers=(0, 5), hidden=1000, tokens=False, dtype=dtype), kind)
    values = batch.prompts["resid_mean"]
    store = lz.open_store(tmp_path / "s")
    info = write_part(store, WIDE, batch, compressed=compressed, shards=shards)
    part = tmp_path / "s" / WIDE.name / info.name
    document = independent_reader.parse_part((part / "zarr.json").read_bytes())
    array = independent_reader.parse_array(part, "prompts/resid_mean", document)
    assert array.n_chunks > 3
    assert prompts % array.chunks[1], "the last chunk is not full"
    assert array.shard == (3 if shards and version == 2 else 0)
    read, dims = independent_reader.read_array(part, "prompts/resid_mean", document)
    assert dims == ["layer", "prompt", "hidden"]
    assert_same_bits(read, values)
    if version == 1:
        assert not document["tables"]
        return
    tables = independent_reader.read_tables(part, array, document)
    assert tables.block_nbytes % (values.itemsize * 1000) == 0, "whole rows"
    assert array.chunks[1] * values.itemsize * 1000 % tables.block_nbytes == 0, "whole blocks"
    copied = tables.blocks[:, :, 1] >> 16 & 2
    if kind != "normal":  # of which some frames become smaller
        assert (copied[:, :-1] > 0).all() == (copied[:, :-1] > 0).any() == (kind == "bits" and compressed)
    rows = array.chunks[1]
    for layer in (0, 1):
        for start, stop in [(0, 1), (rows - 1, rows), (rows, rows + 3), (3 * rows, 4 * rows), (rows // 2, rows), (prompts - 1, prompts)]:
            found = independent_reader.read_rows(part, "prompts/resid_mean", document, layer, start, stop)
            assert_same_bits(found, values[layer, start:stop])


@pytest.mark.few(1)
@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("kind", ["constant", "normal", "bits"])
def test_rows_wider_than_a_block_are_read_by_their_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, compressed: bool
) -> None:
    small_chunks(monkeypatch, 2**20)
    width = 70_001
    batch = filled(make_batch(["a", "b", "c", "d", "e"], layers=(1,), hidden=width, tokens=False), kind)
    store = lz.open_store(tmp_path / "s")
    info = write_part(store, GroupInfo(model="acme/vocabulary"), batch, compressed=compressed, shards=True)
    part = next((tmp_path / "s").glob(f"*/{info.name}"))
    document = independent_reader.parse_part((part / "zarr.json").read_bytes())
    array = independent_reader.parse_array(part, "prompts/resid_mean", document)
    tables = independent_reader.read_tables(part, array, document)
    assert (array.chunks, array.shard, tables.block_nbytes) == ([1, 3, width], 2, 2**16)
    assert array.nbytes % 2**16, "the last block is shorter"
    values = batch.prompts["resid_mean"]
    assert_same_bits(independent_reader.read_array(part, "prompts/resid_mean", document)[0], values)
    for start, stop in [(0, 1), (1, 2), (2, 3), (1, 3), (3, 4), (3, 5)]:
        assert_same_bits(independent_reader.read_rows(part, "prompts/resid_mean", document, 0, start, stop), values[0, start:stop])


def check_same(folder: Path, store: Store, **which: Any) -> None:
    read = independent_reader.read_group(folder)
    for level, dataset in (("prompts", store.dataset(**which)), ("tokens", store.tokens(**which))):
        names = [key.partition(".")[2] for key in read if key.startswith(f"{level}.")]
        assert set(names) >= set(dataset.data_vars), level
        for name in names:
            expected = dataset[name]
            if expected.ndim > 1 and "layer" in expected.dims:
                expected = expected.transpose(level.removesuffix("s"), "layer", ...)
            found: npt.NDArray[Any] = read[f"{level}.{name}"]
            same = np.asarray((found == expected.values) | ((found != found) & (expected.values != expected.values)), bool)
            assert found.shape == expected.shape, name
            assert same.all(), name


def with_logits(batch: TokenBatch, k: int) -> TokenBatch:
    """Also the k largest logits of the last token, which have no layers."""
    values = np.arange(len(batch.sha256) * k, dtype="float32").reshape(-1, k)
    logits = {"logits_last_token_top_k_values": values, "logits_last_token_top_k_indices": values.astype("int32")}
    return replace(batch, prompts={**batch.prompts, **logits}, unlayered=frozenset(logits))


def test_variables_of_any_name_and_columns_of_tokens_are_read(tmp_path: Path) -> None:
    batch = make_batch(["a", "bb", "ccc"])
    n, rng = int(batch.token_columns["token_id"].size), np.random.default_rng(1)
    wide = {"attn_z": rng.standard_normal((3, n, 8)).astype("f4"), "head_scores_7": rng.standard_normal((3, n, 5)).astype("f2")}
    pooled = {"attn_z_max": rng.standard_normal((3, 3, 8)).astype("f4"), "probe_mean": rng.integers(0, 9, (3, 2), np.int32)}
    columns = {"role": rng.integers(0, 3, n), "turn": np.arange(n) // 4, "generated": np.arange(n) % 2}
    store = lz.open_store(tmp_path / "s")
    first = replace(
        batch,
        tokens={**batch.tokens, **wide},
        prompts={**batch.prompts, **pooled},
        token_columns={**batch.token_columns, **columns},
        unlayered=frozenset({"probe_mean"}),
    )
    name = store.write(GROUP, first)
    document = independent_reader.parse_part((tmp_path / "s" / GROUP.name / name / "zarr.json").read_bytes())
    variables = {f"tokens/{name}" for name in ("resid", *wide)} | {f"prompts/{name}" for name in ("resid_mean", *pooled)}
    assert document["tables"].keys() == independent_reader.holds(document).keys() == variables
    dims = {key.partition("/")[2]: document["arrays"][key]["dimension_names"][-1] for key in variables}
    assert (dims["attn_z"], dims["attn_z_max"], dims["head_scores_7"], dims["probe_mean"]) == (
        "hidden",
        "hidden",
        "head_scores_7_unit",
        "probe_unit",
    )
    store.write(GROUP, make_batch(["dddd"], seed=3))  # without any of these
    check_same(tmp_path / "s" / GROUP.name, store)
    read = independent_reader.read_group(tmp_path / "s" / GROUP.name)
    for key, values in columns.items():
        assert read[f"tokens.{key}"].tolist() == [*values.tolist(), *[0 if key == "generated" else -1] * 5]
    np.testing.assert_array_equal(read["tokens.head_scores_7"][:n].swapaxes(0, 1), wide["head_scores_7"])
    np.testing.assert_array_equal(read["prompts.probe_mean"][:3], pooled["probe_mean"])


def test_roles_are_read_by_the_names_that_each_part_has(tmp_path: Path) -> None:
    store = lz.open_store(tmp_path / "s")
    group = tmp_path / "s" / GROUP.name

    def write(texts: list[str], names: tuple[str, ...], seed: int) -> None:
        batch = make_batch(texts, seed=seed)
        codes = np.arange(batch.token_columns["token_id"].size) % (len(names) + 1) - 1
        store.write(GROUP, replace(batch, token_columns={**batch.token_columns, "role": codes}, role_names=names))

    write(["a", "bb"], ("user", "assistant"), 1)
    check_same(group, store)
    write(["ccc"], ("my critic", "user"), 2)
    write(["dddd"], ("judge", "my critic", "50%"), 3)
    store.write(GROUP, make_batch(["eeeee"], seed=4))  # without roles
    check_same(group, store)
    before = store.tokens().load()
    assert {*before.role.values.tolist()} == {"", "user", "assistant", "my critic", "judge", "50%"}
    store.compact()
    check_same(group, lz.open_store(tmp_path / "s"))
    assert before.identical(lz.open_store(tmp_path / "s").tokens().load())
    assert store.verify().ok


@pytest.mark.few(1)
@pytest.mark.usefixtures("version")
def test_a_view_of_many_parts_is_the_same(tmp_path: Path) -> None:
    store = lz.open_store(tmp_path / "s")
    group = tmp_path / "s" / GROUP.name
    store.write(GROUP, make_batch(["a", "bb", "ccc"], columns=COLUMNS, seed=1))
    store.write(GROUP, make_batch(["dddd", "bb"], layers=(0, 2), seed=2, columns={"label": [3, 4]}))  # other layers, one prompt again
    check_same(group, store)
    store.write(GROUP, make_batch(["e", "a"], seed=3, tokens=False))  # no tokens
    check_same(group, store)
    store.write(GROUP, make_batch(["ccc"], seed=4, layers=(1,), n_tokens=[2]))  # another number of tokens: what came before is out of date
    check_same(group, store)
    store.write(GROUP, make_batch(["ccc"], seed=5, layers=(3,), n_tokens=[4]))  # as in the first part, which stays out of date
    check_same(group, store)
    store.annotate(GROUP.model, {"judge": {"a": 0.25, "e": 0.75}, "note": {"bb": "späte"}, "rank": {"a": 7}, "label": {"ccc": 9}})
    check_same(group, store)
    store.write(GROUP, with_logits(make_batch(["a", "f"], seed=6), 5))
    store.write(GROUP, with_logits(make_batch(["f", "g"], seed=7), 3))
    check_same(group, store)
    store.delete(GROUP.model, ["dddd"])
    store.compact(progress=False)
    check_same(group, store)
    store.gc(max_age=0)
    check_same(group, store)


@pytest.mark.few(2)
@pytest.mark.parametrize("group", sorted(path for path in OLD.glob("*/*/*") if path.is_dir()), ids=lambda p: f"{p.parent.name}-{p.name}")
def test_stores_of_every_version_are_read(group: Path) -> None:
    check_same(group, lz.open_store(group.parent, mode="r"), group=group.name)


Layout = tuple[TokenBatch, GroupInfo, int]
LAYOUTS: dict[str, Callable[[], Layout]] = {
    "one chunk": lambda: (make_batch(["a", "bb", "ccc"], columns=COLUMNS), GROUP, 2**21),
    # 129 chunks per layer make a chunk table of more than 1024 bytes, which is a file.
    "many small chunks": lambda: (make_batch([f"{i}" for i in range(257)], layers=(0,), hidden=64, tokens=False), WIDE, 2**9),
    "a table of blocks in the document": lambda: (
        filled(make_batch([f"{i}" for i in range(110)], layers=(2,), hidden=1000, tokens=False), "constant"),
        WIDE,
        2**18,
    ),
    "a table of blocks as a file": lambda: (
        filled(make_batch([f"{i}" for i in range(150)], layers=tuple(range(12)), hidden=1000, tokens=False), "constant"),
        WIDE,
        2**18,
    ),
}


@pytest.fixture(
    params=[(name, version, shards) for name in LAYOUTS for version, shards in ((1, False), (2, False), (2, True))],
    ids=lambda param: f"{param[0]}-{param[1]}{'-shards' if param[2] else ''}",
)
def laid_out(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A part of one of the layouts, as `write_part` makes it."""
    name, version, shards = request.param
    batch, group, nbytes = LAYOUTS[name]()
    write_version(monkeypatch, version)
    small_chunks(monkeypatch, nbytes, in_shard=50 if name == "many small chunks" else 2)
    store = lz.open_store(tmp_path / "s")
    info = write_part(store, group, batch, shards=shards)
    part = tmp_path / "s" / group.name / info.name
    tables = {path.name for path in part.glob("*/*/*_table")}
    if version == 2:
        assert ("chunk_table" in tables) == (name == "many small chunks")
        assert ("block_table" in tables) == (name == "a table of blocks as a file")
        assert info.has_shards == (shards and name != "one chunk")
        assert (info.tables or {})["prompts/resid_mean"].block_nbytes > 0 if "blocks" in name else True
    else:
        assert not tables
    return part


@pytest.mark.few(1)
def test_a_changed_byte_in_any_file_and_a_file_that_is_missing_are_noticed(laid_out: Path) -> None:
    part, group = laid_out, laid_out.parent
    independent_reader.read_group(group)
    paths = sorted(path for path in part.rglob("*") if path.is_file())
    chunks = [path for path in paths if path.parent.name.startswith("resid") and path.name.startswith("c.")]
    # Of many chunks alike some.
    for path in [path for path in paths if path not in chunks] + chunks[:: -(-len(chunks) // 6)]:
        key = path.relative_to(part).as_posix()
        whole = path.read_bytes()
        # The last byte of a shard is its index's.
        for at in {0, len(whole) // 2, len(whole) - 1}:
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(independent_reader.Damaged):
                independent_reader.read_group(group)
        for data in (whole[:-1], whole + b"\0"):
            path.write_bytes(data)
            with pytest.raises(independent_reader.Damaged):
                independent_reader.read_group(group)
        if key != "zarr.json":  # without its document a part is not there
            path.unlink()
            with pytest.raises(independent_reader.Damaged, match="is missing"):
                independent_reader.read_group(group)
        path.write_bytes(whole)
    independent_reader.read_group(group)


# --------------------------------------------------------------------------------------------------------------------- lies


def sealed(document: dict[str, Any]) -> bytes:
    """A part's document with a digest that holds."""
    document["attributes"]["digest"] = "crc32c:00000000"
    data = json.dumps(document, separators=(",", ":")).encode()
    return data.replace(b"crc32c:00000000", b"crc32c:%08x" % google_crc32c.value(data), 1)


KEY = "prompts/resid_mean"
Attributes = dict[str, Any]


def with_words(change: Callable[[npt.NDArray[Any]], None], table: str, width: int) -> Callable[[Attributes], None]:
    """A change of the numbers in a table, one row for each chunk; `width` counts from the number of blocks."""

    def lie(attributes: Attributes) -> None:
        described = attributes["tables"][KEY]
        words = np.frombuffer(base64.b64decode(described[table]), "<u4").copy()
        change(words.reshape(-1, width))
        described[table] = base64.b64encode(words.tobytes()).decode()

    return lie


def add(row: int, column: int, number: int) -> Callable[[npt.NDArray[Any]], None]:
    def change(words: npt.NDArray[Any]) -> None:
        words[row, column] = (int(words[row, column]) + number) % 2**32

    return change


def swap_lengths(words: npt.NDArray[Any]) -> None:
    words[0, 2], words[0, 4] = words[0, 2] + 1, words[0, 4] - 1


def in_tables(**what: Any) -> Callable[[Attributes], None]:
    return lambda attributes: attributes["tables"][KEY].update(what)


LIES: dict[str, Callable[[Attributes], object]] = {
    "bytes of all files": lambda a: a["tables"][KEY].update(nbytes=a["tables"][KEY]["nbytes"] + 1),
    "a chunk's length": with_words(add(1, 0, 1), "chunk_table", 2),
    "a chunk's crc32c": with_words(add(1, 1, 1), "chunk_table", 2),
    "a chunk's length in the other table": with_words(add(1, 0, 1), "block_table", 8),
    "the header of a frame": with_words(add(1, 1, 1 << 24), "block_table", 8),
    "that a frame was copied": with_words(add(1, 1, 2 << 16), "block_table", 8),
    "a block's length": with_words(add(1, 4, 1), "block_table", 8),
    "where a block ends": with_words(swap_lengths, "block_table", 8),
    "a block's crc32c": with_words(add(2, 7, 1), "block_table", 8),
    "another size of blocks": in_tables(block_nbytes=65_536),
    "blocks of a whole chunk": in_tables(block_nbytes=204_000),
    "no blocks": in_tables(block_nbytes=0),
    "a table that is longer": lambda a: a["tables"][KEY].update(chunk_table=a["tables"][KEY]["chunk_table"] + "AAAA"),
    "no base64": in_tables(chunk_table="ä"),
    "a line break in base64": lambda a: a["tables"][KEY].update(chunk_table=a["tables"][KEY]["chunk_table"] + "\n"),
    "a file that is not there": in_tables(chunk_table=None),
    "no tables": lambda a: a.update(tables={}),
    "tables of another array": lambda a: a["tables"].update({"prompts/other": a["tables"][KEY]}),
    "another number of prompts": lambda a: a.update(prompt_digests=base64.b64encode(base64.b64decode(a["prompt_digests"])[32:]).decode()),
    "a prompt twice": lambda a: a.update(prompt_digests=base64.b64encode(base64.b64decode(a["prompt_digests"])[:32] * 110).decode()),
    "half a digest": lambda a: a.update(prompt_digests=base64.b64encode(base64.b64decode(a["prompt_digests"])[:-16]).decode()),
    "the index of version 1": lambda a: a.update(prompt_sha256=base64.b64decode(a.pop("prompt_digests")).hex()),
    "version 1": lambda a: a.update(format_version=1),
    "a file of another place": lambda a: a["files"].update({"../x": [0, 0]}),
    "layers": lambda a: a.update(layers=[3]),
}


@pytest.mark.few(13)
@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("lie", LIES)
def test_a_document_that_says_something_else_than_the_files_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lie: str, shards: bool
) -> None:
    small_chunks(monkeypatch, 2**18, in_shard=2)
    batch = make_batch([f"{i}" for i in range(110)], layers=(2,), hidden=1000, tokens=False)
    info = write_part(lz.open_store(tmp_path / "s"), WIDE, batch, shards=shards)
    group = tmp_path / "s" / WIDE.name
    path = group / info.name / "zarr.json"
    document = json.loads(path.read_bytes())
    path.write_bytes(sealed(document))
    read = independent_reader.read_group(group)
    assert_same_bits(read["prompts.resid_mean"].swapaxes(0, 1), batch.prompts["resid_mean"])
    LIES[lie](document["attributes"])
    path.write_bytes(sealed(document))
    with pytest.raises(independent_reader.Damaged):
        independent_reader.read_group(group)


def test_a_newer_version_is_told_from_damage(tmp_path: Path, version: int) -> None:
    store = lz.open_store(tmp_path / "s")
    store.write(GROUP, make_batch(["a"]))
    path = part_of(store) / "zarr.json"
    newer = path.read_bytes().replace(b'"format_version":%d' % version, b'"format_version":3', 1)
    path.write_bytes(newer)  # its digest does not hold: a newer one may be computed in another way
    with pytest.raises(independent_reader.Newer, match="version 3"):
        independent_reader.read_group(path.parent.parent)
