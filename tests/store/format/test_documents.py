from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stores import GROUP

from lmprobe_zarr.batch import split_variable
from lmprobe_zarr.errors import CorruptPartError, InvalidArgumentError, NotAStoreError, UnsupportedVersionError
from lmprobe_zarr.store.format.array import ArrayInfo, parse_array
from lmprobe_zarr.store.format.files_table import check_table
from lmprobe_zarr.store.format.group import GroupInfo, parse_group
from lmprobe_zarr.store.format.names import PROMPT_COLUMNS, validate_column_names
from lmprobe_zarr.store.format.part import PartInfo, parse_part, part_document
from lmprobe_zarr.store.format.part_names import new_part_name
from lmprobe_zarr.store.format.root import parse_root, root_document
from lmprobe_zarr.store.format.tables import ArrayTables

ARRAY = ArrayInfo(dims=("layer", "prompt", "hidden"), shape=(2, 3, 8), chunks=(1, 3, 8), dtype="float16", shuffle="shuffle")
LAYER = ArrayInfo(dims=("layer",), shape=(2,), chunks=(2,), dtype="int64", shuffle="shuffle")
POSITION = ArrayInfo(dims=("token",), shape=(6,), chunks=(6,), dtype="int64", shuffle="shuffle")
PART = PartInfo(
    group="store",
    name="p",
    digests=np.arange(96, dtype=np.uint8).reshape(3, 32),
    n_tokens=np.array([1, 2, 3]),
    layers=(0, 5),
    arrays={"prompts/resid_mean": ARRAY, "prompts/layer": LAYER, "tokens/position": POSITION},
    files={"prompts/resid_mean/c.0.0.0": (10, 77), "prompts/resid_mean/c.1.0.0": (10, 78)},
)
# Of version 2: small chunks, chunks of three blocks, and two shards of chunks, with tables in the document and as files.
BLOCKS = ArrayInfo(dims=("layer", "prompt", "hidden"), shape=(2, 3, 20_000), chunks=(1, 3, 20_000), dtype="float32", shuffle=None)
SHARDS = ArrayInfo(
    dims=("layer", "prompt", "hidden"), shape=(2, 3, 8), chunks=(1, 1, 8), dtype="float16", shuffle="shuffle", shard_blocks=2
)
PART_2 = replace(
    PART,
    arrays={**PART.arrays, "prompts/attn_mean": BLOCKS, "prompts/mlp_mean": SHARDS},
    files={"prompts/layer/c.0": (10, 77), "prompts/mlp_mean/chunk_table": (48, 5), "prompts/attn_mean/zarr.json": (100, 6)},
    tables={
        "prompts/attn_mean": ArrayTables(nbytes=480_008, chunks=bytes(16), block_nbytes=80_000, blocks=bytes(range(64))),
        "prompts/mlp_mean": ArrayTables(nbytes=300, chunks=None),
        "prompts/resid_mean": ArrayTables(nbytes=30, chunks=bytes(range(16))),
    },
)
PARTS = {1: PART, 2: PART_2}
of_every_version = pytest.mark.parametrize("version", PARTS)


@of_every_version
def test_a_part_document_reads_back_as_what_was_written(version: int) -> None:
    part = PARTS[version]
    read = parse_part(part_document(part, GROUP), "store/group/p")
    assert read.version == part.version == version
    assert read.name == "p"
    assert (read.digests == part.digests).all()
    assert read.n_tokens is not None
    assert read.n_tokens.tolist() == [1, 2, 3]
    assert read.layers == (0, 5)
    assert read.arrays == part.arrays
    assert {k: tuple(v) for k, v in read.files.items()} == part.files
    assert read.tables == part.tables


def test_a_part_of_version_2_knows_all_its_files() -> None:
    document = json.loads(part_document(PART_2, GROUP))["attributes"]
    assert "prompt_sha256" not in document
    assert base64.b64decode(document["prompt_digests"]) == bytes(range(96))
    assert base64.b64decode(document["n_tokens"]) == np.array([1, 2, 3], "<u4").tobytes()
    read = parse_part(part_document(PART_2, GROUP), "store/p")
    chunks = ["resid_mean/c.0.0.0", "resid_mean/c.1.0.0", "attn_mean/c.0.0.0", "attn_mean/c.1.0.0"]
    shards = [f"mlp_mean/c.{layer}.{shard}.0" for layer in (0, 1) for shard in (0, 1)]
    assert sorted(read.file_names()) == sorted([*PART_2.files, *(f"prompts/{name}" for name in (*chunks, *shards))])
    assert read.n_files == 11
    assert read.files_nbytes == 158 + 480_008 + 300 + 30
    assert read.nbytes_by_folder()["prompts/mlp_mean"] == 348
    assert read.has_shards
    assert not parse_part(part_document(PART, GROUP), "store/p").has_shards


def test_a_part_knows_its_activations_and_the_users_own_columns() -> None:
    column = ArrayInfo(dims=("prompt",), shape=(3,), chunks=(3,), dtype="int64", shuffle=None)
    spread = ArrayInfo(dims=("token",), shape=(6,), chunks=(6,), dtype="float32", shuffle=None)
    columns = {f"prompts/{name}": column for name in (*PROMPT_COLUMNS, "label")}
    arrays = {"prompts/resid_mean": ARRAY, "prompts/layer": LAYER, "tokens/position": POSITION, "tokens/token_log_prob": spread, **columns}
    part = replace(PART, arrays=arrays)
    assert set(part.activations) == {"prompts/resid_mean", "tokens/token_log_prob"}
    assert set(part.own_columns) == {"prompts/label"}
    assert part.compressed
    assert not replace(PART, arrays=columns).compressed


@pytest.mark.few(1)
@of_every_version
def test_any_changed_byte_of_a_part_document_is_noticed(version: int) -> None:
    whole = part_document(PARTS[version], GROUP)
    for position in range(len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 1
        with pytest.raises((CorruptPartError, UnsupportedVersionError)):
            parse_part(bytes(changed), "p")


def resealed(change: Callable[[dict[str, Any]], object], part: PartInfo = PART) -> bytes:
    """A part document with a change, and a digest that holds."""
    document = json.loads(part_document(part, GROUP))
    change(document)
    document["attributes"]["digest"] = "crc32c:00000000"
    data = json.dumps(document, separators=(",", ":")).encode()
    return data.replace(b"crc32c:00000000", b"crc32c:%08x" % google_crc32c.value(data), 1)


def attribute(name: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["attributes"].__setitem__(name, value)


WRONG: dict[str, list[Any]] = {
    "layers": [[1, 0], [0, "1"], [0, None], [0, 2**80], [[0]], [0, -1], [0, True], 3, [0]],
    "n_tokens": [[1, 2], [1, 2, 4], [1.0, 2, 3], ["1", 2, 3], [0, 3, 3], [-1, 4, 3], [2**80, 1, 1], "123", 6],
    "prompt_sha256": ["", "abc", "zz" * 96, "00" * 96, 5, None],
    "replaces": [["p"], [["x"]], [3], 5, None],
    "files": [[], None, {"a": 3}, {"a": [1]}, {"a": ["1", 2]}, {"a": [1, -2]}, {}],
    "kind": ["group", None, 3, ["part"]],
    "format": ["zzz", None],
    "recorded": [3, "x"],
    "name": [3, None],
    "group": [None],
}
LIES: dict[str, Callable[[dict[str, Any]], None]] = {
    **{f"{name}={value!r:.30}": attribute(name, value) for name, values in WRONG.items() for value in values},
    "no attributes": lambda d: d.__setitem__("attributes", {"digest": "crc32c:00000000"}),
    "no metadata": lambda d: d.pop("consolidated_metadata"),
    "metadata a list": lambda d: d["consolidated_metadata"].__setitem__("metadata", []),
    "no position": lambda d: d["consolidated_metadata"]["metadata"].pop("tokens/position"),
    "no layer numbers": lambda d: d["consolidated_metadata"]["metadata"].pop("prompts/layer"),
    "a path for a name": lambda d: d["consolidated_metadata"]["metadata"].__setitem__("prompts/../x", LAYER.to_document()),
    "other dimensions": lambda d: d["consolidated_metadata"]["metadata"].__setitem__("prompts/x", POSITION.to_document()),
    "attributes a list": lambda d: d["consolidated_metadata"]["metadata"]["prompts/layer"].__setitem__("attributes", [1]),
    "a huge array": lambda d: d["consolidated_metadata"]["metadata"]["tokens/position"].__setitem__("shape", [2**50]),
}


@pytest.mark.few(43)
@pytest.mark.parametrize("lie", LIES)
def test_a_false_part_document_with_a_valid_digest_is_refused(lie: str) -> None:
    with pytest.raises(CorruptPartError, match="damaged"):
        parse_part(resealed(LIES[lie]), "store/p")


def table(key: str, **what: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["attributes"]["tables"][f"prompts/{key}"].update(what)


def text_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


WRONG_2: dict[str, list[Any]] = {
    **{name: WRONG[name] for name in ("layers", "replaces", "kind", "format", "recorded", "name", "group")},
    "prompt_digests": ["", text_of(bytes(32)), text_of(bytes(96)), text_of(bytes(95)), "ä" * 128, "+" * 127, "AAAA\n" * 32, 5, None, [1]],
    "n_tokens": [text_of(bytes(12)), text_of(np.array([1, 2], "<u4").tobytes()), text_of(bytes(11)), "?", [1, 2], 6, {}],
    "files": [[], None, {"a": 3}, {}, {"prompts/layer/c.0": [10, -7]}, {"prompts/layer/c.0": [1, 2], "prompts/layer/other_table": [1, 2]}],
    "tables": [None, [], 3, {}, {"prompts/x": {}}, {"prompts/mlp_mean": {}}, {"prompts/mlp_mean": 5}],
    "format_version": [1],
}
LIES_2: dict[str, Callable[[dict[str, Any]], object]] = {
    **{f"{name}={value!r:.30}": attribute(name, value) for name, values in WRONG_2.items() for value in values},
    "the index of version 1 too, and no other": lambda d: d["attributes"].update(prompt_sha256="00" * 96, prompt_digests=None),
    "no index": lambda d: d["attributes"].pop("prompt_digests"),
    "no tables": lambda d: d["attributes"].pop("tables"),
    "shards without a table": lambda d: d["attributes"]["tables"].pop("prompts/mlp_mean"),
    "chunks that nobody knows": lambda d: (d["attributes"]["tables"].pop("prompts/resid_mean"), d["attributes"].update(files={})),
    "a table that is no text": table("resid_mean", chunk_table=[1]),
    "a table that is no base64": table("resid_mean", chunk_table="?" * 24),
    "a short chunk table": table("resid_mean", chunk_table=text_of(bytes(15))),
    "a long chunk table": table("resid_mean", chunk_table=text_of(bytes(24))),
    "a short block table": table("attn_mean", block_table=text_of(bytes(63))),
    "a long block table": table("attn_mean", block_table=text_of(bytes(72))),
    "no block table": lambda d: d["attributes"]["tables"]["prompts/attn_mean"].pop("block_table"),
    "blocks that are too small": table("attn_mean", block_nbytes=1),
    "blocks below zero": table("attn_mean", block_nbytes=-80_000),
    "blocks as large as a chunk": table("attn_mean", block_nbytes=240_000),
    "blocks that are no number": table("attn_mean", block_nbytes="80000"),
    "blocks that are a truth value": table("resid_mean", block_nbytes=False),
    "blocks in small chunks": table("resid_mean", block_nbytes=65_536, block_table=text_of(bytes(64))),
    "bytes below zero": table("mlp_mean", nbytes=-1),
    "very many bytes": table("mlp_mean", nbytes=2**60),
    "bytes that are no number": table("mlp_mean", nbytes="300"),
    "chunks without number": lambda d: (
        d["consolidated_metadata"]["metadata"]["prompts/mlp_mean"].update(shape=[2, 3, 2**40]),
        d["consolidated_metadata"]["metadata"]["prompts/mlp_mean"]["codecs"][0]["configuration"].update(chunk_shape=[1, 1, 2**40]),
    ),
}


@pytest.mark.parametrize("lie", LIES_2)
def test_a_false_part_document_of_version_2_is_refused(lie: str) -> None:
    with pytest.raises(CorruptPartError, match="damaged"):
        check_table(parse_part(resealed(LIES_2[lie], PART_2), "store/p").files)


@of_every_version
def test_an_unchanged_part_document_with_a_new_digest_is_accepted(version: int) -> None:
    assert parse_part(resealed(lambda _: None, PARTS[version]), "store/p").layers == (0, 5)


@of_every_version
def test_keys_in_another_order_say_the_same(version: int) -> None:
    def turn(document: dict[str, Any]) -> None:
        digest = document["attributes"].pop("digest")
        document["attributes"] = {"digest": digest, **dict(reversed(document["attributes"].items()))}

    read = parse_part(resealed(turn, PARTS[version]), "store/p")
    assert read.tables == PARTS[version].tables
    assert (read.digests == PARTS[version].digests).all()
    assert dict(read.files) == PARTS[version].files


@pytest.mark.few(1)
@of_every_version
@given(length=st.integers(min_value=0))
def test_a_truncated_part_document_is_noticed(version: int, length: int) -> None:
    whole = part_document(PARTS[version], GROUP)
    with pytest.raises(CorruptPartError):
        parse_part(whole[: length % len(whole)], "p")


@of_every_version
@pytest.mark.parametrize("sealed", [True, False])
def test_a_newer_part_is_refused_as_newer_not_as_damaged(version: int, sealed: bool) -> None:
    newer = part_document(PARTS[version], GROUP).replace(b'"format_version":%d' % version, b'"format_version":3', 1)
    if sealed:
        newer = resealed(attribute("format_version", 3), PARTS[version])
    with pytest.raises(UnsupportedVersionError, match="p has format version 3, this release reads versions 1 and 2: upgrade"):
        parse_part(newer, "p")


def test_a_part_of_version_1_that_says_it_is_of_version_2_is_damaged() -> None:
    with pytest.raises(CorruptPartError, match="index is not that of format 2"):
        parse_part(resealed(attribute("format_version", 2)), "p")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("codecs", [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "numcodecs.pickle"}]),
        ("codecs", [{"name": "bytes", "configuration": {"endian": "little"}}]),
        ("data_type", "object"),
        ("shape", [2, 3, 2**60]),
        ("shape", [2, -3, 8]),
        ("shape", [2, True, 8]),
        ("dimension_names", ["layer", "prompt"]),
        ("chunk_key_encoding", {"name": "v2"}),
        ("chunk_grid", {"name": "regular", "configuration": {"chunk_shape": [2, 3, 8]}}),
        ("chunk_grid", {"name": "regular", "configuration": {"chunk_shape": [1, 0, 8]}}),
        ("chunk_grid", {"name": "regular", "configuration": {"chunk_shape": [1, 2**40, 8]}}),
    ],
)
def test_array_documents_that_we_do_not_write_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_array(ARRAY.to_document() | {field: value})


@pytest.mark.parametrize("info", [ARRAY, LAYER, BLOCKS, SHARDS], ids=["chunk", "column", "blocks", "shards"])
def test_an_array_document_reads_back(info: ArrayInfo) -> None:
    assert parse_array(json.loads(json.dumps(info.to_document()))) == info


def inner(**what: Any) -> list[Any]:
    """The codecs of shards, with a change."""
    document: Any = SHARDS.to_document()
    return [{"name": "sharding_indexed", "configuration": document["codecs"][0]["configuration"] | what}]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("codecs", inner(index_location="start")),
        ("codecs", inner(index_codecs=[{"name": "bytes", "configuration": {"endian": "little"}}])),
        ("codecs", inner(codecs=SHARDS.to_document()["codecs"])),
        ("codecs", inner(codecs=[])),
        ("codecs", inner(chunk_shape=[1, 0, 8])),
        ("codecs", inner(chunk_shape=[1, 3, 8])),
        ("codecs", inner(chunk_shape=[1, 1, 4])),
        ("codecs", inner(chunk_shape=[1, 1])),
        ("codecs", [*inner(), {"name": "crc32c"}]),
        ("codecs", []),
        ("chunk_grid", {"name": "regular", "configuration": {"chunk_shape": [2, 2, 8]}}),
        ("chunk_grid", {"name": "regular", "configuration": {"chunk_shape": [1, 2, 16]}}),
        ("chunk_grid", {"name": "regular", "configuration": {"chunk_shape": [1, 0, 8]}}),
    ],
)
def test_shards_that_we_do_not_write_are_refused(field: str, value: object) -> None:
    with pytest.raises((ValueError, LookupError), match=r"."):
        parse_array(SHARDS.to_document() | {field: value})


@pytest.mark.parametrize("version", [2, 3])
def test_a_newer_group_is_refused_as_newer(version: int) -> None:
    newer = GROUP.to_document().replace(b'"format_version":1', b'"format_version":%d' % version)
    with pytest.raises(UnsupportedVersionError, match=f"g has format version {version}, this release reads version 1: upgrade"):
        parse_group(newer, "g")


def test_a_group_reads_back_and_its_name_tells_every_field_apart() -> None:
    assert parse_group(GROUP.to_document(), "g") == GROUP
    others = [
        GroupInfo(model="acme/Toy", provenance={"revision": "abc"}, num_layers=4, hidden_size=8),
        GroupInfo(model="acme/toy", provenance={"revision": "abd"}, num_layers=4, hidden_size=8),
        GroupInfo(model="acme/toy", provenance={}, num_layers=4, hidden_size=8),
        GroupInfo(model="acme/toy", provenance={"revision": "abc"}, num_layers=5, hidden_size=8),
        GroupInfo(model="acme/toy", provenance={"revision": "abc"}, num_layers=4, hidden_size=16),
    ]
    names = {GROUP.name, *(other.name for other in others)}
    assert len(names) == 6
    assert len({name.lower() for name in names}) == 6, "two groups must not meet on a file system that folds case"


@given(st.text(min_size=1, max_size=300).filter(lambda text: text.strip() and text.isprintable()))
def test_no_model_name_climbs_out_of_the_root(model: str) -> None:
    name = GroupInfo(model=model).name
    assert "/" not in name
    assert "\\" not in name
    assert "\0" not in name
    assert not name.startswith(".")
    assert ".." not in name
    assert len(name.encode()) < 100


@pytest.mark.parametrize("document", [b"", b"[]", b"null", b"{}", b'{"attributes": 3}', b'{"attributes": {"format": "ome"}}', b"\xff\xfe"])
def test_another_document_at_the_root_is_not_taken_for_a_store(document: bytes) -> None:
    with pytest.raises(NotAStoreError):
        parse_root(document, "here")


@pytest.mark.parametrize("version", [2, 3])
def test_a_newer_store_is_refused_with_what_to_do(version: int) -> None:
    newer = json.loads(root_document())
    newer["attributes"]["format_version"] = version
    with pytest.raises(UnsupportedVersionError, match=f"here has format version {version}, this release reads version 1: upgrade"):
        parse_root(json.dumps(newer).encode(), "here")


def test_part_names_sort_by_time_even_when_the_clock_jumps_back(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    for now in (5_000, 5_000, 4_000, 1_000, 9_000):
        monkeypatch.setattr("time.time_ns", lambda now=now: now * 10**12)
        names.append(new_part_name(max(names, default="")))
    assert names == sorted(names)
    assert len(set(names)) == len(names)
    assert all(len(name) == 26 for name in names)


def test_a_foreign_name_in_the_far_future_is_not_followed() -> None:
    assert new_part_name("zzzzzzzzzzzzzzzzzzzzzzzzzz") < "1"
    assert new_part_name("readme.txt") < "1"


@pytest.mark.parametrize(
    "name", ["prompt", "text", "layer", "resid", "resid_mean", "position", "model", "a b", "", "1st", "x" * 65, "../up"]
)
def test_columns_cannot_take_a_name_of_the_format_or_a_path(name: str) -> None:
    with pytest.raises(InvalidArgumentError):
        validate_column_names([name])


def test_variable_names_split_into_site_and_pooling() -> None:
    assert split_variable("resid_last_token") == ("resid", "last_token", "all")
    assert split_variable("attn_mean") == ("attn", "mean", "all")
    assert split_variable("mlp") == ("mlp", None, "all")
    assert split_variable("resid_mean_assistant") == ("resid", "mean", "assistant")
    assert split_variable("my_site_last_token_tail_8") == ("my_site", "last_token", "tail_8")
    assert split_variable("max_pool") == ("max_pool", None, "all")


def test_provenance_takes_json_scalars_only() -> None:
    assert list(GroupInfo(model="m", provenance={"b": 1, "a": None}).provenance) == ["a", "b"]
    for bad in ({"a": [1]}, {"a": float("nan")}, {1: "a"}):
        with pytest.raises(InvalidArgumentError):
            GroupInfo(model="m", provenance=bad)  # type: ignore[arg-type]
