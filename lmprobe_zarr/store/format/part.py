"""`PartInfo`, one part as its own ``zarr.json`` describes it: the document that commits a part, written and parsed. No I/O."""

from __future__ import annotations

import base64
import binascii
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import google_crc32c
import numpy as np
import numpy.typing as npt

from lmprobe_zarr.batch import digests_of, keys_of, sha256_of
from lmprobe_zarr.errors import CorruptPartError, UnsupportedVersionError
from lmprobe_zarr.store.format.array import ArrayInfo, is_variable, lengths_of, parse_array
from lmprobe_zarr.store.format.files_table import (
    PARSE_ERRORS,
    FilesTable,
    bytes_by_folder,
    bytes_of_files,
    check_table,
    damaged_part,
)
from lmprobe_zarr.store.format.group import GroupInfo
from lmprobe_zarr.store.format.names import (
    FORMAT,
    FORMAT_COLUMNS,
    FORMAT_VERSION,
    LEVELS,
    PART_VERSION,
    SAMPLE_DIM,
    TOMBSTONE_VERSION,
    Json,
    Level,
    check_version,
    consolidated,
    dump,
)
from lmprobe_zarr.store.format.tables import ArrayTables, parse_tables, tables_document
from lmprobe_zarr.typing import Ints

__all__ = ["PartInfo", "level_document", "parse_part", "parse_part_group", "parse_removed", "part_document", "removed_document"]

_ARRAY_KEY: Final = re.compile(r"(prompts|tokens)/([A-Za-z][A-Za-z0-9_]*)")

# The digest is at a fixed place, so that it can be checked on the bytes as they are, without writing the document again.
_PREFIX: Final = b'{"zarr_format":3,"node_type":"group","attributes":{"digest":"crc32c:'
_DIGEST: Final = slice(len(_PREFIX), len(_PREFIX) + 8)
_UP_TO_DIGEST: Final = google_crc32c.value(_PREFIX + b"00000000")
# Where `part_document` puts what takes the most bytes.
_ATTRIBUTES: Final = _PREFIX.index(b'{"digest"')
_SHA256: Final = b',"prompt_sha256":"'
_DIGESTS: Final = b',"prompt_digests":"'
_FILES: Final = b',"files":'
_METADATA: Final = b'},"consolidated_metadata":'
_CUT: Final = object()
_KEPT_BYTES: Final = 2**16  # longer metadata is not remembered


@dataclass(frozen=True, slots=True, kw_only=True)
class PartInfo:
    """One immutable part, as its own ``zarr.json`` describes it. Reading that one document opens the part.

    Parameters
    ----------
    group, name : str
        Folder of the group, and of the part below it.
    kind : {"part", "annotation"}
        An annotation holds per-prompt columns only and never adds prompts to a view.
    digests : ndarray of uint8, shape (prompt, 32)
        sha256 of each prompt, in the part's order; no prompt twice.
    n_tokens : ndarray of int64, shape (prompt,), optional
        Token rows of each prompt; None where no tokens are kept.
    layers : tuple of int
        Layers along the layer axis.
    arrays : mapping of str to ArrayInfo
        ``"prompts/<name>"`` and ``"tokens/<name>"``.
    files : mapping of str to (int, int)
        Every other file of the part, without the chunks of arrays that have tables: length in bytes and crc32c. Of a stored part it is
        a `FilesTable`, which is checked when it is first used, and raises `CorruptPartError` then. For a chunk it is the crc32c that the
        chunk ends with, that is, of all but the last four bytes (over the whole, the crc32c of anything with its own crc32c appended is
        one constant).
    recorded : mapping
        What is only noted: versions, device, time.
    replaces : tuple of str
        Parts that this one replaces.
    odd : mapping of str to (int, int), optional
        Of each variable that has any: values that are not finite, and rows that hold nothing but zeros. None where they were not counted.
    removed : mapping of str to (tuple of int, or None)
        Of a tombstone: the variables and columns, by their keys, whose values were removed for all its prompts, with the layers of each;
        None for a variable without layers, and for a column. Empty for any other part.
    tables : mapping of str to ArrayTables, optional
        Of a part of format 2: the arrays whose chunks have tables of their own, and are not in `files`. None for a part of format 1.
    """

    group: str
    name: str
    kind: str = "part"
    digests: npt.NDArray[np.uint8]
    n_tokens: Ints | None = None
    layers: tuple[int, ...] = ()
    arrays: Mapping[str, ArrayInfo]
    files: Mapping[str, Sequence[int]]
    recorded: Mapping[str, Any] = field(default_factory=dict)
    replaces: tuple[str, ...] = ()
    odd: Mapping[str, Sequence[int]] | None = None
    removed: Mapping[str, tuple[int, ...] | None] = field(default_factory=dict)
    tables: Mapping[str, ArrayTables] | None = None

    @property
    def version(self) -> int:
        """Version of the format that its document has."""
        if self.removed:
            return TOMBSTONE_VERSION
        return FORMAT_VERSION if self.tables is None else PART_VERSION

    def file_names(self) -> Iterator[str]:
        """Keys of all files but its document."""
        yield from self.files
        for key in self.tables or ():
            for name in self.arrays[key].file_names():
                yield f"{key}/{name}"

    @property
    def n_files(self) -> int:
        """How many files it has beside its document."""
        arrays = (self.arrays[key] for key in self.tables or ())
        return len(self.files) + sum(array.n_files * (array.shape[0] if array.layered else 1) for array in arrays)

    @property
    def files_nbytes(self) -> int:
        """Bytes of all files but its document."""
        return bytes_of_files(self.files) + sum(table.nbytes for table in (self.tables or {}).values())

    def nbytes_by_folder(self) -> dict[str, int]:
        """Bytes of the files of each folder, by its key: those of an array by ``"prompts/<name>"`` or ``"tokens/<name>"``."""
        found = bytes_by_folder(self.files)
        for key, table in (self.tables or {}).items():
            found[key] = found.get(key, 0) + table.nbytes
        return found

    @property
    def is_tombstone(self) -> bool:
        """Whether it hides values of older parts that a part which is gone had replaced."""
        return bool(self.removed)

    def variables(self, level: Level) -> dict[str, ArrayInfo]:
        """Arrays of one level, by their names in it."""
        return {key.removeprefix(f"{level}/"): info for key, info in self.arrays.items() if key.startswith(f"{level}/")}

    @property
    def activations(self) -> dict[str, ArrayInfo]:
        """Arrays that hold activations, or numbers that a model computes; by their keys, as ``"tokens/resid"``."""
        return {key: array for key, array in self.arrays.items() if is_variable(key.partition("/")[2], array)}

    @property
    def own_columns(self) -> dict[str, ArrayInfo]:
        """The user's own columns, one value per prompt; by their keys, as ``"prompts/label"``."""
        columns = {name: array for name, array in self.variables("prompts").items() if not is_variable(name, array)}
        return {f"prompts/{name}": array for name, array in columns.items() if name not in FORMAT_COLUMNS}

    @property
    def has_shards(self) -> bool:
        """Whether files of some array hold many chunks."""
        return any(array.shard_blocks for array in self.arrays.values())

    @property
    def compressed(self) -> bool:
        """Whether the part was written with compression."""
        return any(array.shuffle is not None for array in self.arrays.values())


def part_document(info: PartInfo, group: GroupInfo) -> bytes:
    """The ``zarr.json`` that commits a part: a Zarr v3 group with consolidated metadata and the part's index."""
    attributes: Json = {
        "digest": "crc32c:00000000",
        "format": FORMAT,
        # A reader that does not know tombstones must refuse one: it would show what it hides.
        "format_version": info.version,
        "kind": info.kind,
        # Everything in the group's own document: where that is lost, any part restores it.
        "model": group.model,
        "num_layers": group.num_layers,
        "hidden_size": group.hidden_size,
        "provenance": dict(group.provenance),
        "group": info.group,
        "name": info.name,
        "layers": list(info.layers),
        **_index_document(info),
        "replaces": list(info.replaces),
        "odd": None if info.odd is None else {key: list(counts) for key, counts in info.odd.items()},
        **({"removed": removed_document(info.removed)} if info.removed else {}),
        "recorded": dict(info.recorded),
        **({} if info.tables is None else {"tables": tables_document(info.tables)}),
        "files": {key: list(value) for key, value in info.files.items()},
    }
    metadata: Json = {level: level_document(arrays, level, nested=False) for level in LEVELS if (arrays := info.variables(level))}
    metadata |= {key: array.to_document() for key, array in info.arrays.items()}
    document = {"zarr_format": 3, "node_type": "group", "attributes": attributes, "consolidated_metadata": consolidated(metadata)}
    data = bytearray(dump(document, sort=False))
    data[_DIGEST] = b"%08x" % google_crc32c.value(bytes(data))
    return bytes(data)


def _index_document(info: PartInfo) -> Json:
    """The index of the prompts: as text in format 1, as base64 in format 2."""
    counts = info.n_tokens
    if info.tables is None:
        return {"prompt_sha256": "".join(sha256_of(info.digests)), "n_tokens": None if counts is None else counts.tolist()}
    digests = base64.b64encode(np.ascontiguousarray(info.digests).tobytes()).decode()
    return {
        "prompt_digests": digests,
        "n_tokens": None if counts is None else base64.b64encode(counts.astype("<u4").tobytes()).decode(),
    }


def _parse_counts(counts: object) -> Ints | None:
    """Token rows of each prompt, from a list or from base64."""
    if counts is None:
        return None
    if isinstance(counts, str):
        return np.frombuffer(binascii.a2b_base64(counts.encode("ascii"), strict_mode=True), "<u4").astype(np.int64)
    return np.array(lengths_of(counts), np.int64)


def level_document(arrays: Mapping[str, ArrayInfo], level: Level, *, nested: bool = True) -> Json:
    """The document of a part's ``prompts`` or ``tokens`` group; `arrays` are those of the level, by their names in it.

    It names the columns, so that plain xarray makes coordinates of them.
    """
    samples = (SAMPLE_DIM[level],)
    columns = [name for name, array in arrays.items() if array.dims == samples and not is_variable(name, array) and name != samples[0]]
    document: Json = {"zarr_format": 3, "node_type": "group", "attributes": {"coordinates": " ".join(columns)} if columns else {}}
    if nested:
        document["consolidated_metadata"] = consolidated({name: array.to_document() for name, array in arrays.items()})
    return document


def parse_part(data: bytes, where: str) -> PartInfo:
    """The record of a part's document.

    Raises
    ------
    CorruptPartError
        The document is damaged, or is not one of a part.
    UnsupportedVersionError
        It is of a version that this release does not know.
    """
    try:
        # The digest is that of the document with zeros in its place.
        intact = data.startswith(_PREFIX) and data[_DIGEST] == b"%08x" % google_crc32c.extend(
            _UP_TO_DIGEST, np.frombuffer(data, np.uint8, offset=min(_DIGEST.stop, len(data)))
        )
        content = (_cut_document(data) if intact else None) or _whole_document(data)
        attributes = content.attributes
        if attributes["format"] == FORMAT:
            check_version(attributes["format_version"], where, (FORMAT_VERSION, PART_VERSION))
        if not intact:
            raise ValueError("its digest does not hold")
        if attributes["format"] != FORMAT or attributes["kind"] not in {"part", "annotation"}:
            raise ValueError(f"it is a {attributes['kind']!r} of {attributes['format']!r}")
        is_binary = "prompt_digests" in attributes
        # Tombstones had the number of format 2 before it was there, since readers that do not know them must refuse them.
        if is_binary != (attributes["format_version"] == PART_VERSION and "removed" not in attributes):
            raise ValueError(f"its index is not that of format {attributes['format_version']}")
        known = _parse_arrays(content.metadata)
        tables = parse_tables(attributes["tables"], known.arrays) if is_binary else None
        least = known.n_chunks if not tables else max((a.n_chunks for key, a in known.arrays.items() if key not in tables), default=0)
        table = FilesTable(content.files, where, least=least)
        if content.digests is None:
            check_table(table)
        info = PartInfo(
            group=_text(attributes["group"]),
            name=_text(attributes["name"]),
            kind=attributes["kind"],
            digests=_parse_digests(attributes) if content.digests is None else content.digests,
            n_tokens=_parse_counts(attributes["n_tokens"]),
            layers=lengths_of(attributes["layers"]),
            arrays=known.arrays,
            files=table,
            recorded=dict(attributes["recorded"]),
            replaces=tuple(_text(name) for name in attributes["replaces"]),
            odd=None if (odd := attributes.get("odd")) is None else {key: lengths_of(counts) for key, counts in odd.items()},
            removed=parse_removed(attributes.get("removed", {})),
            tables=tables,
        )
        _check_part(info, known)
        if least > table.at_most:
            raise ValueError("an array has more chunks than there are files")
    except (UnsupportedVersionError, CorruptPartError):
        raise
    except PARSE_ERRORS as error:
        raise damaged_part(where, error) from error
    return info


class _Content(NamedTuple):
    """A part's document, its largest pieces apart."""

    attributes: Any
    #: The consolidated metadata, as JSON.
    metadata: bytes
    #: The table of files, as JSON.
    files: bytes
    #: None where `attributes` has them as text, of a document that was parsed as a whole.
    digests: npt.NDArray[np.uint8] | None


def _whole_document(data: bytes) -> _Content:
    """The content of any document, whatever the order of its keys."""
    document = json.loads(data)
    attributes = document["attributes"]
    # Written again from what was parsed, so that there is one way from JSON to arrays and tables.
    files, metadata = (json.dumps(part).encode() for part in (attributes["files"], document["consolidated_metadata"]))
    return _Content(attributes, metadata, files, None)


class _Arrays(NamedTuple):
    """The arrays of a part, and what they require of the rest of its document."""

    arrays: Mapping[str, ArrayInfo]
    #: Every length that an array states of each dimension, by its name.
    lengths: Mapping[str, frozenset[int]]
    #: The chunks of the array that has most.
    n_chunks: int


def _parse_arrays(metadata: bytes) -> _Arrays:
    """The arrays in consolidated metadata, from its JSON. Parts with equal metadata share the records."""
    return _kept_arrays(metadata) if len(metadata) <= _KEPT_BYTES else _kept_arrays.__wrapped__(metadata)


@functools.lru_cache(maxsize=64)
def _kept_arrays(metadata: bytes) -> _Arrays:
    documents = json.loads(metadata.decode("utf-8", "surrogatepass"))["metadata"]
    arrays = {key: parse_array(document) for key, document in documents.items() if "/" in key}
    lengths: dict[str, set[int]] = {}
    for key, array in arrays.items():
        match = _ARRAY_KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"array name {key!r}")
        sample = "token" if match[1] == "tokens" else "prompt"
        layered = array.dims[0] == "layer"
        if array.dims != ("layer",) if match[2] == "layer" else array.dims[layered : layered + 1] != (sample,):
            raise ValueError(f"{key} has dimensions {array.dims}")
        if layered and f"{match[1]}/layer" not in arrays:
            raise ValueError(f"{key} has layers without numbers")
        for dim, length in zip(array.dims, array.shape, strict=True):
            lengths.setdefault(dim, set()).add(length)
    n_chunks = max((array.n_chunks for array in arrays.values()), default=0)
    return _Arrays(arrays, {dim: frozenset(found) for dim, found in lengths.items()}, n_chunks)


def _cut_document(data: bytes) -> _Content | None:
    """The content of a document whose keys are where `part_document` puts them, without parsing its table of files; None for any other.

    The document is taken as ``HEAD attributes ,"files": table },"consolidated_metadata": metadata }``. This is how a JSON parser would
    read the whole of it, whatever the pieces hold: ``attributes }`` and ``metadata`` are parsed as one value each, so the cuts are between
    values and not inside of a text. The table is one object if it is JSON at all, since it has no braces but its first and its last byte;
    so it cannot end early, and hide keys behind it.
    """
    end = data.rfind(_METADATA)
    table = data.rfind(b"{", 0, max(end, 0))
    start = table - len(_FILES)
    if start < 0 or not data.startswith(_FILES, start) or data.find(b"}", table, end) != end - 1 or not data.endswith(b"}"):
        return None
    files, metadata = data[table:end], data[end + len(_METADATA) : -1]
    name = _DIGESTS if data.find(_DIGESTS, _ATTRIBUTES, start) >= 0 else _SHA256
    begin = data.find(name, _ATTRIBUTES, start) + len(name)
    stop = data.find(b'"', begin, start)
    if begin < _ATTRIBUTES + len(name) or stop < 0:
        return None
    cuts: list[str] = []

    def cut(constant: str) -> object:
        cuts.append(constant)
        return _CUT

    try:
        text = memoryview(data)[begin:stop]
        digests = _binary_digests(text) if name is _DIGESTS else np.frombuffer(binascii.unhexlify(text), np.uint8).reshape(-1, 32)
        # In the place of the digests stands a value that `part_document` never writes. One elsewhere would be another's.
        rest = data[_ATTRIBUTES : begin - 1] + b"NaN" + data[stop + 1 : start] + b"}"
        attributes = json.loads(rest.decode("utf-8", "surrogatepass"), parse_constant=cut)
        _parse_arrays(metadata)
    except PARSE_ERRORS:
        return None
    if len(cuts) != 1 or attributes.get(name[2:-3].decode()) is not _CUT or "files" in attributes:
        return None
    return _Content(attributes, metadata, files, digests)


def removed_document(removed: Mapping[str, tuple[int, ...] | None]) -> Json:
    """What a tombstone removes, as JSON."""
    return {key: None if layers is None else list(layers) for key, layers in removed.items()}


def parse_removed(document: Any) -> dict[str, tuple[int, ...] | None]:
    """What a tombstone removes; raises ValueError, TypeError or AttributeError where the document says something else."""
    removed = {_text(key): None if layers is None else lengths_of(layers) for key, layers in document.items()}
    for key, layers in removed.items():
        if not _ARRAY_KEY.fullmatch(key) or (layers is not None and (not layers or list(layers) != sorted(set(layers)))):
            raise ValueError(f"it removes {key[:80]!r} of layers {layers!r:.80}")
    return removed


def parse_part_group(data: bytes) -> GroupInfo | None:
    """The group that a part's document describes; None where it describes none, since the first writers of version 1 left it out.

    `parse_part` must accept the document.
    """
    attributes = json.loads(data)["attributes"]
    if "provenance" not in attributes:
        return None
    return GroupInfo(
        model=attributes["model"],
        provenance=attributes["provenance"],
        num_layers=attributes["num_layers"],
        hidden_size=attributes["hidden_size"],
    )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.40} is no text")
    return value


def _parse_digests(attributes: Json) -> npt.NDArray[np.uint8]:
    if "prompt_digests" in attributes:
        return _binary_digests(attributes["prompt_digests"].encode("ascii"))
    return digests_of([attributes["prompt_sha256"]])


def _binary_digests(text: bytes | memoryview) -> npt.NDArray[np.uint8]:
    return np.frombuffer(binascii.a2b_base64(text, strict_mode=True), np.uint8).reshape(-1, 32)


def _check_part(info: PartInfo, known: _Arrays) -> None:
    """Raise ValueError where pieces of a document contradict one another."""
    n = len(info.digests)
    # Sorting numbers is much faster than np.unique of rows of bytes. Whole digests are compared only where two begin with the same number.
    begins = np.sort(keys_of(info.digests))
    if not n or (bool((begins[1:] == begins[:-1]).any()) and len(np.unique(info.digests, axis=0)) != n):
        raise ValueError("a prompt occurs twice, or there is none")
    if list(info.layers) != sorted(set(info.layers)) or (info.layers and info.layers[-1] >= 2**31):
        raise ValueError("layers are not ascending")
    if info.name in info.replaces or any(len(counted) != 2 for counted in (info.odd or {}).values()):
        raise ValueError("it replaces itself, or what it counts of a variable is not two numbers")
    counts = info.n_tokens
    if info.removed and (info.kind != "annotation" or info.own_columns or info.activations):
        raise ValueError("it removes values and holds some")
    if counts is not None and (counts.shape != (n,) or (counts < 1).any() or ("tokens/position" not in info.arrays and not info.removed)):
        raise ValueError("n_tokens does not fit the prompts")
    sizes = {"prompt": n, "layer": len(info.layers), "token": 0 if counts is None else int(counts.sum())}
    for dim, lengths in known.lengths.items():
        wrong = lengths - {sizes[dim] or None} if dim in sizes else lengths & {0}
        if wrong:
            raise ValueError(f"{dim} has {min(wrong)} rows in an array but {sizes.get(dim)} in the index")
