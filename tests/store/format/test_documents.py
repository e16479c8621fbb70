from __future__ import annotations

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

from lmprobe_zarr.batch.sites import split_variable
from lmprobe_zarr.errors import CorruptPartError, InvalidArgumentError, NotAStoreError, UnsupportedVersionError
from lmprobe_zarr.store.format.array import ArrayInfo, parse_array
from lmprobe_zarr.store.format.group import GroupInfo, parse_group
from lmprobe_zarr.store.format.names import PROMPT_COLUMNS, validate_column_names
from lmprobe_zarr.store.format.part import PartInfo, parse_part, part_document
from lmprobe_zarr.store.format.part_names import new_part_name
from lmprobe_zarr.store.format.root import parse_root, root_document

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


def test_a_part_document_reads_back_as_what_was_written() -> None:
    read = parse_part(part_document(PART, GROUP), "store/group/p")
    assert read.name == "p"
    assert (read.digests == PART.digests).all()
    assert read.n_tokens is not None
    assert read.n_tokens.tolist() == [1, 2, 3]
    assert read.layers == (0, 5)
    assert read.arrays == PART.arrays
    assert {k: tuple(v) for k, v in read.files.items()} == PART.files


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


def test_any_changed_byte_of_a_part_document_is_noticed() -> None:
    whole = part_document(PART, GROUP)
    for position in range(len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 1
        with pytest.raises((CorruptPartError, UnsupportedVersionError)):
            parse_part(bytes(changed), "p")


def resealed(change: Callable[[dict[str, Any]], None]) -> bytes:
    """A part document with a change, and a digest that holds."""
    document = json.loads(part_document(PART, GROUP))
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


@pytest.mark.parametrize("lie", LIES)
def test_a_false_part_document_with_a_valid_digest_is_refused(lie: str) -> None:
    with pytest.raises(CorruptPartError, match="damaged"):
        parse_part(resealed(LIES[lie]), "store/p")


def test_an_unchanged_part_document_with_a_new_digest_is_accepted() -> None:
    assert parse_part(resealed(lambda _: None), "store/p").layers == (0, 5)


@given(st.integers(min_value=0))
def test_a_truncated_part_document_is_noticed(length: int) -> None:
    whole = part_document(PART, GROUP)
    with pytest.raises(CorruptPartError):
        parse_part(whole[: length % len(whole)], "p")


def test_a_newer_part_is_refused_as_newer_not_as_damaged() -> None:
    newer = part_document(PART, GROUP).replace(b'"format_version":1', b'"format_version":3')
    with pytest.raises(UnsupportedVersionError, match="upgrade"):
        parse_part(newer, "p")


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


def test_a_newer_store_is_refused_with_what_to_do() -> None:
    newer = json.loads(root_document())
    newer["attributes"]["format_version"] = 2
    with pytest.raises(UnsupportedVersionError, match="here has format version 2, this release reads version 1: upgrade"):
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
    assert split_variable("resid_last_token") == ("resid", "last_token")
    assert split_variable("attn_mean") == ("attn", "mean")
    assert split_variable("mlp") == ("mlp", None)


def test_provenance_takes_json_scalars_only() -> None:
    assert list(GroupInfo(model="m", provenance={"b": 1, "a": None}).provenance) == ["a", "b"]
    for bad in ({"a": [1]}, {"a": float("nan")}, {1: "a"}):
        with pytest.raises(InvalidArgumentError):
            GroupInfo(model="m", provenance=bad)  # type: ignore[arg-type]
