"""A part's table of files is bytes until it is used: nothing that a document says is read otherwise for that, whoever wrote it."""

from __future__ import annotations

import base64
import binascii
import json
import pickle
import threading
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import google_crc32c
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from paths import OLD_STORES
from stores import GROUP

from lmprobe_zarr.errors import CorruptPartError, UnsupportedVersionError
from lmprobe_zarr.store.format.array import ArrayInfo
from lmprobe_zarr.store.format.files_table import FilesTable, bytes_by_folder, bytes_of_files, check_table
from lmprobe_zarr.store.format.part import PartInfo, parse_part, part_document
from lmprobe_zarr.store.format.tables import ArrayTables

HEAD = '{"zarr_format":3,"node_type":"group","attributes":{"digest":"crc32c:'
DOCUMENTS = sorted(path for path in OLD_STORES.rglob("zarr.json") if path.read_bytes().startswith(HEAD.encode()))
ARRAY = ArrayInfo(dims=("layer", "prompt", "hidden"), shape=(2, 3, 8), chunks=(1, 3, 8), dtype="float16", shuffle="shuffle")
LAYER = ArrayInfo(dims=("layer",), shape=(2,), chunks=(2,), dtype="int64", shuffle="shuffle")
PART = PartInfo(
    group="store",
    name="p",
    digests=np.arange(96, dtype=np.uint8).reshape(3, 32),
    layers=(0, 5),
    arrays={"prompts/resid_mean": ARRAY, "prompts/layer": LAYER},
    files={"prompts/zarr.json": (7, 2**32 - 1), "prompts/resid_mean/c.0.0.0": (10, 77), "prompts/resid_mean/c.1.0.0": (2**40, 78)},
)
# Of version 2: a table of chunks in the document, and tables of chunks and blocks as files.
PART_2 = replace(
    PART,
    n_tokens=np.array([1, 2, 3]),
    arrays={
        **PART.arrays,
        "tokens/position": ArrayInfo(dims=("token",), shape=(6,), chunks=(6,), dtype="int64", shuffle=None),
        "prompts/attn_mean": replace(ARRAY, shape=(2, 3, 40_000), chunks=(1, 3, 40_000)),
    },
    files={"prompts/zarr.json": (7, 2**32 - 1), "prompts/layer/c.0": (10, 77), "prompts/attn_mean/block_table": (10, 78)},
    tables={
        "prompts/attn_mean": ArrayTables(nbytes=7, chunks=None, block_nbytes=80_000),
        "prompts/resid_mean": ArrayTables(nbytes=30, chunks=bytes(range(16))),
    },
)


def sealed(text: str | bytes) -> bytes:
    """A document with a digest that holds, whatever else it is."""
    data = bytearray(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
    data[len(HEAD) : len(HEAD) + 8] = b"00000000"
    data[len(HEAD) : len(HEAD) + 8] = b"%08x" % google_crc32c.value(bytes(data))
    return bytes(data)


def laid_out_anew(data: bytes, *, indent: int | None = None) -> bytes:
    """The same document as another writer might have written it: the table of files first, blanks, or indented."""
    document = json.loads(data)
    attributes = dict(document["attributes"])
    rest = {"files": attributes.pop("files"), **{key: value for key, value in attributes.items() if key != "digest"}}
    inner = json.dumps(rest, indent=indent)[1:-1]
    metadata = json.dumps(document["consolidated_metadata"], indent=indent)
    return sealed(f'{HEAD}00000000",{inner}}}, "consolidated_metadata": {metadata}}}')


def whole(document: Mapping[str, Any]) -> dict[str, Any]:
    """What a plain JSON parser finds in a document, in the form of `shown`."""
    attributes = document["attributes"]
    is_2 = attributes["format_version"] == 2 and "removed" not in attributes
    counts = attributes["n_tokens"]
    return {
        "files": {key: tuple(entry) for key, entry in attributes["files"].items()},
        "digests": (from_base64(attributes["prompt_digests"]) if is_2 else bytes.fromhex(attributes["prompt_sha256"])).hex(),
        "n_tokens": np.frombuffer(from_base64(counts), "<u4").tolist() if is_2 and counts is not None else counts,
        "arrays": {key: doc["shape"] for key, doc in document["consolidated_metadata"]["metadata"].items() if "/" in key},
        "tables": {key: table_of(described) for key, described in attributes["tables"].items()} if is_2 else None,
        **{key: attributes[key] for key in ("group", "name", "kind", "layers", "replaces", "recorded")},
    }


def from_base64(text: str) -> bytes:
    return binascii.a2b_base64(text.encode("ascii"), strict_mode=True)


def table_of(described: Mapping[str, Any]) -> tuple[int, bytes | None, int, bytes | None]:
    """What a document says of the tables of one array."""
    held = [None if described.get(name) is None else from_base64(described[name]) for name in ("chunk_table", "block_table")]
    return described["nbytes"], held[0], described["block_nbytes"], held[1]


def shown(info: PartInfo) -> dict[str, Any]:
    return {
        "files": dict(info.files),
        "digests": info.digests.tobytes().hex(),
        "arrays": {key: list(array.shape) for key, array in info.arrays.items()},
        "group": info.group,
        "name": info.name,
        "kind": info.kind,
        "layers": list(info.layers),
        "n_tokens": None if info.n_tokens is None else info.n_tokens.tolist(),
        "replaces": list(info.replaces),
        "recorded": dict(info.recorded),
        "tables": None if info.tables is None else {key: (t.nbytes, t.chunks, t.block_nbytes, t.blocks) for key, t in info.tables.items()},
    }


@pytest.mark.few(47)
@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.parent.name[-6:])
@pytest.mark.parametrize(
    "layout", [lambda data: data, laid_out_anew, lambda data: laid_out_anew(data, indent=1)], ids=["own", "other", "indented"]
)
def test_every_document_of_the_old_stores_reads_as_a_json_parser_reads_it(path: Any, layout: Callable[[bytes], bytes]) -> None:
    data = path.read_bytes()
    info = parse_part(layout(data), "p")
    assert shown(info) == whole(json.loads(data))
    assert info.files == parse_part(data, "p").files


def test_there_are_documents_of_every_version_to_compare() -> None:
    found = [json.loads(path.read_bytes())["attributes"] for path in DOCUMENTS]
    for version, index in ((1, "prompt_sha256"), (2, "prompt_digests"), (2, "removed")):
        assert sum(attributes["format_version"] == version and index in attributes for attributes in found) >= (
            1 if index == "removed" else 5
        )


NAMES = st.from_regex(r"\A[A-Za-z][A-Za-z0-9_]{0,6}\Z")
KEYS = st.one_of(
    st.sampled_from(["prompts/zarr.json", "tokens/zarr.json"]),
    st.builds("{}/{}/zarr.json".format, st.sampled_from(["prompts", "tokens"]), NAMES),
    st.builds("{}/{}/c.{}.{}".format, st.sampled_from(["prompts", "tokens"]), NAMES, st.integers(0, 10**12), st.integers(0, 99)),
)
NUMBERS = st.integers(0, 2**53 - 1)
TABLES = st.dictionaries(KEYS, st.tuples(NUMBERS, NUMBERS), max_size=8)
RECORDED = st.dictionaries(
    st.text(max_size=8), st.recursive(st.text(max_size=8) | st.integers() | st.none(), st.lists, max_leaves=4), max_size=3
)


@pytest.mark.few(1)
@given(files=TABLES, recorded=RECORDED, group=st.text(max_size=5))
@example(files={}, recorded={"files": {}, '},"consolidated_metadata":': ',"files":{"a":[1,2]}'}, group="}")
@example(files={}, recorded={"x": {"a": 1, "files": {"b": {}}, "prompt_sha256": "00"}}, group=',"files":{')
@example(files={}, recorded={"x": ',"prompt_digests":"', "prompt_digests": "AAAA"}, group=',"prompt_digests":"AAAA"')
@pytest.mark.parametrize("of", [PART, PART_2], ids=["1", "2"])
def test_a_document_reads_back_whatever_its_texts_hold(
    of: PartInfo, files: dict[str, tuple[int, int]], recorded: dict[str, Any], group: str
) -> None:
    part = replace(of, files={**of.files, **files}, recorded=recorded, group=group)
    data = part_document(part, GROUP)
    for document in (data, laid_out_anew(data)):
        info = parse_part(document, "p")
        assert shown(info) == shown(part) | {"recorded": json.loads(json.dumps(recorded))}
        assert bytes_of_files(info.files) == sum(length for length, _ in part.files.values())
        assert bytes_by_folder(info.files) == bytes_by_folder(part.files)
    assert part_document(parse_part(data, "p"), GROUP) == data


BASE = part_document(PART, GROUP).decode()
BASE_2 = part_document(PART_2, GROUP).decode()
DIGESTS_2 = base64.b64encode(PART_2.digests.tobytes()).decode()
TABLE = BASE[BASE.index('"files":') + 8 : BASE.index('},"consolidated_metadata"')]
FILES = '"prompts/resid_mean/c.0.0.0":[10,77],"prompts/resid_mean/c.1.0.0":[10,78]'
HOSTILE = {
    "files twice": BASE.replace(',"files":', ',"files":{"../a":[1,2]},"files":'),
    "a wrong table last": BASE.replace(f'"files":{TABLE}', f'"files":{TABLE},"files":{{"../a":[1,2]}}'),
    "no table last": BASE.replace(f'"files":{TABLE}', f'"files":{TABLE},"files":null'),
    "keys behind the table": BASE.replace(TABLE, f'{{{FILES}}},"name":"q","x":{{"y":1}}'),
    "a list behind the table": BASE.replace(TABLE, f'{{{FILES}}},"replaces":["q"],"x":{{}}'),
    "keys behind the table in an array": BASE.replace(TABLE, f'{{{FILES},"tokens/a/c.0":[1,2}},"name":"q","x":[{{"y":1}}'),
    "attributes twice": BASE.replace('},"consolidated', '},"attributes":{"files":{}},"consolidated'),
    "attributes last": BASE[:-1] + ',"attributes":{"files":{"../a":[1,2]}}}',
    "metadata twice": BASE[:-1] + ',"consolidated_metadata":{"metadata":{}}}',
    "metadata in attributes": BASE.replace('"recorded":{}', '"recorded":{},"x":{"a":{}},"consolidated_metadata":{"metadata":{}}'),
    "the table in another object": BASE.replace('"recorded":{}', '"recorded":{"a":1').replace('},"consolidated', '}},"consolidated'),
    "the table in a list": BASE.replace('"recorded":{}', '"recorded":{},"l":[1').replace('},"consolidated', ']},"consolidated'),
    "the table in a text": BASE.replace('"recorded":{}', '"recorded":{},"l":"x').replace('},"consolidated', '"},"consolidated'),
    "digests elsewhere": BASE.replace('"prompt_sha256"', '"prompt_sha256":"","x":{"a":1,"prompt_sha256"').replace(
        ',"n_tokens"', '},"n_tokens"'
    ),
    "digests twice": BASE.replace('"n_tokens"', f'"prompt_sha256":"{"ab" * 32}","n_tokens"'),
    "digests as NaN": BASE.replace(f'"{PART.digests.tobytes().hex()}"', "NaN"),
    "digests with a blank": BASE.replace('"prompt_sha256":"', '"prompt_sha256":" '),
    "an escaped key": BASE.replace("prompts/resid_mean/c.1.0.0", "prompts\\u002fresid_mean\\u002fc.1.0.0"),
    "an escaped key that climbs": BASE.replace("prompts/resid_mean/c.1.0.0", "prompts/\\u002e\\u002e/c.1.0.0"),
    "a key with a line break": BASE.replace("prompts/zarr.json", "prompts/zarr.json\\ntokens/zarr.json"),
    "a key of other digits": BASE.replace("c.1.0.0", "c.\u0661.0.0"),
    "a key that ends in a line break": BASE.replace("c.1.0.0", "c.1.0.0\\n"),
    "a raw line break": BASE.replace("prompts/zarr.json", "prompts/zarr.json\n"),
    "files of one name": BASE.replace("c.0.0.0", "c.1.0.0"),
    "blanks in the table": BASE.replace(TABLE, TABLE.replace(",", " ,\n\t")),
    "a truth value": BASE.replace("[10,77]", "[true,77]"),
    "a fraction": BASE.replace("[10,77]", "[10.0,77]"),
    "a power": BASE.replace("[10,77]", "[1e1,77]"),
    "a negative length": BASE.replace("[10,77]", "[-10,77]"),
    "a negative nothing": BASE.replace("[10,77]", "[-0,77]"),
    "a long number": BASE.replace("[10,77]", f"[1{'0' * 60},77]"),
    "a number of 2**53": BASE.replace("[10,77]", f"[{2**53},77]"),
    "a number without end": BASE.replace("[10,77]", f"[1{'0' * 5000},77]"),
    "three numbers": BASE.replace("[10,77]", "[10,77,1]"),
    "a number instead": BASE.replace("[10,77]", "10"),
    "a text instead": BASE.replace("[10,77]", '"ab"'),
    "not a number": BASE.replace("[10,77]", "[NaN,77]"),
    "brackets without end": BASE.replace("[10,77]", "[" * 200_000),
    "nested brackets": BASE.replace("[10,77]", "[" * 50_000 + "]" * 50_000),
    "an empty table": BASE.replace(TABLE, "{}"),
    "too few files": BASE.replace(TABLE, '{"prompts/zarr.json":[1,2]' + " " * 1000 + "}"),
    "no table": BASE.replace(TABLE, "null"),
    "a comma at its end": BASE.replace(TABLE, TABLE[:-1] + ",}"),
    "a half of a pair": BASE.replace("prompts/zarr.json", "prompts/\\ud800"),
    "something behind": BASE + "{}",
    "blanks behind": BASE + " \n",
    "a mark of byte order": BASE.replace('"consolidated_metadata":', '"consolidated_metadata":\ufeff'),
    "2: digests elsewhere": BASE_2.replace('"prompt_digests"', '"prompt_digests":"","x":{"a":1,"prompt_digests"').replace(
        ',"n_tokens"', '},"n_tokens"'
    ),
    "2: digests twice": BASE_2.replace('"n_tokens"', f'"prompt_digests":"{"AQID" * 32}","n_tokens"'),
    "2: the digests of version 1 before": BASE_2.replace('"prompt_digests"', f'"prompt_sha256":"{"ab" * 32}","prompt_digests"'),
    "2: the digests of version 1 behind": BASE_2.replace('"n_tokens"', f'"prompt_sha256":"{"ab" * 32}","n_tokens"'),
    "2: digests in version 1": BASE.replace('"n_tokens"', f'"prompt_digests":"{"AQID" * 32}","n_tokens"'),
    "2: digests as NaN": BASE_2.replace(f'"{DIGESTS_2}"', "NaN"),
    "2: digests with a blank": BASE_2.replace(DIGESTS_2, f" {DIGESTS_2}"),
    "2: digests with an escape": BASE_2.replace(DIGESTS_2, f"\\u0041{DIGESTS_2[1:]}"),
    "2: digests with a line break": BASE_2.replace(DIGESTS_2, f"{DIGESTS_2[:4]}\\n{DIGESTS_2[4:]}"),
    "2: an escaped key": BASE_2.replace('"prompt_digests"', '"prompt\\u005fdigests"'),
    "2: tables twice": BASE_2.replace(',"files":', ',"tables":{},"files":'),
    "2: tables behind the files": BASE_2.replace('},"consolidated', ',"tables":{}},"consolidated'),
    "2: files in the tables": BASE_2.replace('"tables":{', '"tables":{"files":{},'),
    "2: the table in another object": BASE_2.replace('"tables":{', '"tables":{"a":1,', 1),
    "2: files twice": BASE_2.replace(',"files":', ',"files":{"../a":[1,2]},"files":'),
}  # fmt: skip


def read(data: bytes) -> dict[str, Any] | None:
    """All of a document, its table too; None where it is refused."""
    try:
        return shown(parse_part(data, "p"))
    except (CorruptPartError, UnsupportedVersionError):
        return None


def must_read(data: bytes) -> dict[str, Any] | None:
    """What a plain JSON parser finds in a document; None where it finds no such document, or entries that are none."""
    try:
        found = whole(json.loads(data))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    pairs = [entry for entry in found["files"].values() if len(entry) == 2 and all(type(n) is int and 0 <= n < 2**53 for n in entry)]
    return found if len(pairs) == len(found["files"]) else None


@pytest.mark.parametrize("name", HOSTILE)
def test_a_document_made_to_be_read_in_two_ways_is_refused_or_read_as_a_json_parser_reads_it(name: str) -> None:
    data = sealed(HOSTILE[name])
    assert data not in (sealed(BASE), sealed(BASE_2))
    found = read(data)
    assert found is None or found == must_read(data)


READABLE = [
    "files twice", "2: files twice", "2: an escaped key", "2: digests with an escape", "an escaped key",
    "blanks in the table", "blanks behind", "a negative nothing",
]  # fmt: skip


@pytest.mark.parametrize("name", READABLE)
def test_an_unusual_document_that_says_nothing_wrong_is_read(name: str) -> None:
    assert read(sealed(HOSTILE[name])) is not None


SNIPPETS = [
    ',"prompt_digests":"', ',"prompt_digests":"AAAA"', ',"tables":{',
    ',"files":{', '"files":', '},"consolidated_metadata":{', ',"prompt_sha256":"00"', ',"prompt_sha256":"', "NaN", "{", "}", "[", "]", '"',
    "\\", ",", ',"name":"q"', " ", '},"attributes":{', "\u00e9", "1", '"a":', "null",
]  # fmt: skip
EDITS = st.lists(st.tuples(st.integers(0), st.sampled_from(SNIPPETS), st.integers(0, 3)), min_size=1, max_size=4)


@pytest.mark.few(1)
@pytest.mark.parametrize("base", [BASE, BASE_2], ids=["1", "2"])
@given(edits=EDITS)
def test_a_document_changed_at_random_is_refused_or_read_as_a_json_parser_reads_it(base: str, edits: list[tuple[int, str, int]]) -> None:
    text = base
    for place, snippet, cut in edits:
        marks = [i for i in range(len(HEAD) + 9, len(text)) if text[i] in '{}[]",:']
        at = marks[place % len(marks)]
        text = text[:at] + snippet + text[at + cut :]
    data = sealed(text)
    found = read(data)
    if found is not None:
        assert found == must_read(data)


def test_a_table_of_a_huge_array_is_refused_before_memory_is_taken() -> None:
    large = replace(ARRAY, shape=(2, 2**50, 8), chunks=(1, 1, 8))
    data = sealed(part_document(replace(PART, arrays={"prompts/resid_mean": large, "prompts/layer": LAYER}), GROUP))
    tracemalloc.start()
    with pytest.raises(CorruptPartError):
        parse_part(data, "p")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    several = replace(ARRAY, shape=(2, 3, 8), chunks=(1, 1, 8))  # six chunks, and three files in a table with room for six
    spaced = part_document(replace(PART, arrays={"prompts/resid_mean": several, "prompts/layer": LAYER}), GROUP).decode()
    info = parse_part(sealed(spaced.replace(TABLE, TABLE[:-1] + " " * 100 + "}")), "p")
    with pytest.raises(CorruptPartError, match="6 chunks, which are more than the 3 files"):
        len(info.files)


def table(n: int) -> FilesTable:
    return FilesTable(json.dumps({f"tokens/resid/c.{i % 80}.{i // 80}.0": [i, 2**32 - 1 - i] for i in range(n)}).encode(), "root/p")


def test_a_table_pickles_before_and_after_it_was_used() -> None:
    first = table(100)
    second = pickle.loads(pickle.dumps(first))  # noqa: S301
    assert second["tokens/resid/c.7.1.0"] == (87, 2**32 - 88)
    third = pickle.loads(pickle.dumps(second))  # noqa: S301
    assert dict(third) == dict(second) == dict(first)
    assert "tokens/resid/c.7.9.0" not in third
    assert third.get("x") is None


def test_many_threads_may_use_a_table_first_at_the_same_time() -> None:
    for _ in range(2):
        shared = table(5000)
        start = threading.Barrier(8)
        found: list[Any] = []

        def use(number: int, shared: FilesTable = shared, start: threading.Barrier = start, found: list[Any] = found) -> None:
            start.wait()
            found.append((shared.nbytes, len(shared), shared[f"tokens/resid/c.{number}.3.0"], sum(bytes_by_folder(shared).values())))

        threads = [threading.Thread(target=use, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        total = sum(range(5000))
        assert sorted(found) == sorted((total, 5000, (240 + i, 2**32 - 241 - i), total) for i in range(8))


def test_sizes_are_exact_and_leave_the_table_as_it_is() -> None:
    long = table(20_000)
    tracemalloc.start()
    check_table(long)
    assert long.nbytes == sum(range(20_000))
    assert tracemalloc.get_traced_memory()[0] < 10_000, "nothing of it is kept"
    tracemalloc.stop()
    most = FilesTable(json.dumps({f"tokens/a/c.{i}": [2**53 - 1, 0] for i in range(4000)}).encode(), "p")
    assert most.nbytes == 4000 * (2**53 - 1), "more than 64 bits hold"


def test_a_false_table_is_refused_by_every_use_and_names_the_part() -> None:
    false = FilesTable(b'{"tokens/a/c.0":[1,2],"tokens/../c.0":[1,2]}', "place/g/p")
    false.name_part("place", "g/p")
    uses: list[Callable[[], object]] = [
        lambda: false["tokens/a/c.0"], lambda: false.get("tokens/a/c.0"), lambda: len(false), lambda: list(false), lambda: "x" in false,
        lambda: false.nbytes, lambda: check_table(false), lambda: bytes_by_folder(false), lambda: list(false.items()), lambda: false == {},
    ]  # fmt: skip
    for use in uses:
        with pytest.raises(CorruptPartError, match=r"place/g/p/zarr.json is damaged .*no file of a part") as caught:
            use()
        assert (caught.value.root, caught.value.part) == ("place", "g/p")
    with pytest.raises(CorruptPartError):
        check_table(pickle.loads(pickle.dumps(false)))  # noqa: S301
