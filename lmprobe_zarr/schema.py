"""Every name of the format, and its documents as frozen records: root, group, part and array.

A record is made from a document by ``parse_…`` (which raises) and turned into one by ``to_…``. No I/O and no arrays of
activations here; what the bytes of a chunk mean is in `chunks`.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
import re
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

import google_crc32c
import numpy as np
import numpy.typing as npt

from lmprobe_zarr.errors import CorruptPartError, InvalidArgumentError, NotAStoreError, UnsupportedVersionError
from lmprobe_zarr.pooling import POOLINGS
from lmprobe_zarr.sites import INNER_DIMS, SCALARS, SITES

__all__ = [
    "ANNOTATIONS",
    "COLUMN_NAME",
    "FORMAT",
    "FORMAT_VERSION",
    "GROUP_NAME",
    "LEVELS",
    "PART_NAME",
    "ArrayInfo",
    "GroupInfo",
    "Level",
    "PartInfo",
    "Provenance",
    "Published",
    "array_dims",
    "is_root_document",
    "is_variable",
    "new_part_name",
    "parse_group",
    "parse_part",
    "parse_part_group",
    "parse_root",
    "part_document",
    "part_milliseconds",
    "published_document",
    "replacement_name",
    "root_document",
    "split_variable",
    "validate_column_names",
    "validate_provenance",
]

FORMAT: Final = "lmprobe-zarr"
FORMAT_VERSION: Final = 1

ANNOTATIONS: Final = "annotations"
GROUP_NAME: Final = re.compile(r"(?:[a-z0-9.-]+-)?[0-9a-f]{12}")

PART_NAME: Final = re.compile(r"[0-9a-hjkmnp-tv-z]{26}(?:\.[0-9a-hjkmnp-tv-z]{10})*")

Level = Literal["prompts", "tokens"]
LEVELS: Final[tuple[Level, ...]] = ("prompts", "tokens")
SAMPLE_DIM: Final[Mapping[Level, str]] = {"prompts": "prompt", "tokens": "token"}


# Columns that the format itself uses; a user's column may not bear these names, nor that of a dimension or variable.
PROMPT_COLUMNS: Final = ("prompt", "prompt_sha256", "text", "n_tokens", "prompt_length")
TOKEN_COLUMNS: Final = ("prompt_row", "position", "token_id", "char_start", "char_end")
DIMENSIONS: Final = ("prompt", "token", "layer", "hidden")
COLUMN_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")

ProvenanceValue: TypeAlias = str | int | float | bool | None
Provenance: TypeAlias = Mapping[str, ProvenanceValue]
Json: TypeAlias = dict[str, Any]

# Nothing else is ever written, copied or removed by the word of a part's document: a key that climbs would lead out of the store.
_FILE_KEY: Final = re.compile(r"(?:prompts|tokens)/(?:zarr\.json|[A-Za-z][A-Za-z0-9_]*/(?:zarr\.json|c(?:\.[0-9]+)+))")
_DTYPES: Final = frozenset({"float16", "float32", "float64", "int8", "int16", "int32", "int64", "bool", "string"})
_BLOSC_LIMIT: Final = 2**31 - 17
_ULID_DIGITS: Final = "0123456789abcdefghjkmnpqrstvwxyz"


def split_variable(variable: str) -> tuple[str, str | None]:
    """Site and pooling of a variable's name: ``"resid_last_token"`` gives ``("resid", "last_token")``."""
    for pooling in POOLINGS:
        if variable.endswith(f"_{pooling}"):
            return variable.removesuffix(f"_{pooling}"), pooling
    return variable, None


def array_dims(variable: str, level: Level, ndim: int, layered: bool) -> tuple[str, ...]:
    """Dimension names of an activation variable."""
    head = (("layer",) if layered else ()) + (SAMPLE_DIM[level],)
    tail = ndim - len(head)
    return head + ((INNER_DIMS.get(variable, "hidden"),) if tail == 1 else tuple(f"{variable}_dim{i}" for i in range(tail)))


def is_variable(name: str, info: ArrayInfo) -> bool:
    """Whether an array of a part holds activations, or what a model says, and not a column that describes prompts or tokens."""
    return len(info.dims) > 1 or name in SCALARS


def validate_column_names(names: Iterable[str]) -> None:
    """Raise `InvalidArgumentError` for a user's column that could not be stored under its name."""
    for name in names:
        if not isinstance(name, str) or not COLUMN_NAME.fullmatch(name):
            raise InvalidArgumentError(f"{name!r} is no column name: use letters, digits and _, a letter first, at most 64")
        taken = (*PROMPT_COLUMNS, *TOKEN_COLUMNS, *DIMENSIONS, *INNER_DIMS, *INNER_DIMS.values(), *SCALARS, "model")
        if name in taken or split_variable(name)[0] in SITES:
            raise InvalidArgumentError(f"{name!r} is a name of the format itself: choose another name for that column")


def validate_provenance(provenance: Mapping[str, Any]) -> dict[str, ProvenanceValue]:
    """The same fields in sorted order, checked to be JSON scalars.

    Raises
    ------
    InvalidArgumentError
        A name is not a string, or a value is neither string, number, truth value nor None.
    """
    for name, value in provenance.items():
        if not isinstance(name, str) or not (value is None or isinstance(value, (str, bool, int, float))):
            raise InvalidArgumentError(f"provenance field {name!r}={value!r}: use a string name and a string, number, truth value or None")
        if isinstance(value, float) and not np.isfinite(value):
            raise InvalidArgumentError(f"provenance field {name!r}={value!r} is not finite")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise InvalidArgumentError(f"provenance field {name!r} is an integer beyond 64 bits: use a string")
    return {name: provenance[name] for name in sorted(provenance)}


# ---------------------------------------------------------------------------------------------------------------- root


def root_document() -> bytes:
    """The document at the root of every store."""
    return _dump({"zarr_format": 3, "node_type": "group", "attributes": {"format": FORMAT, "format_version": FORMAT_VERSION}})


def is_root_document(document: object) -> bool:
    """Whether a parsed ``zarr.json`` claims to be the root of a store of ours, of whatever version."""
    attributes = document.get("attributes") if isinstance(document, dict) else None
    return isinstance(attributes, dict) and attributes.get("format") == FORMAT and "kind" not in attributes


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What the root of a published copy says: all that is in it, so that a reader needs no listing.

    Parameters
    ----------
    groups : mapping of str to tuple of str
        The parts and annotations of each group, by their keys below the group's folder.
    """

    groups: Mapping[str, tuple[str, ...]]


def published_document(published: Published, groups: Mapping[str, GroupInfo], parts: Mapping[str, PartInfo]) -> bytes:
    """The document at the root of a published copy: as of any store, with all that is below it.

    Parameters
    ----------
    published : Published
    groups, parts : mapping
        Records of all groups and parts, by their keys below the root.
    """
    metadata: Json = {}
    for name, group in groups.items():
        metadata[name] = json.loads(group.to_document())
    for folder in sorted({key.rpartition("/")[0] for key in parts} - set(groups)):
        metadata[folder] = {"zarr_format": 3, "node_type": "group", "attributes": {}}
    for key, part in parts.items():
        # The index and the table of files stand in the part's own document only: once is enough, and they are large.
        few = {"format": FORMAT, "format_version": FORMAT_VERSION, "kind": part.kind, "group": part.group, "name": part.name}
        metadata[key] = {"zarr_format": 3, "node_type": "group", "attributes": few}
        levels = {f"{key}/{level}": level_document(part, level, nested=False) for level in LEVELS if part.variables(level)}
        metadata |= levels | {f"{key}/{name}": array.to_document() for name, array in part.arrays.items()}
    attributes: Json = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "published": {"groups": {name: list(keys) for name, keys in published.groups.items()}},
    }
    document = {"zarr_format": 3, "node_type": "group", "attributes": attributes, "consolidated_metadata": _consolidated(metadata)}
    return _dump(document, sort=False)


def parse_root(data: bytes, where: str) -> Published | None:
    """Check the root document; returns what it says of a published copy, None of a store that grows.

    Raises
    ------
    NotAStoreError
        It is no document of ours.
    UnsupportedVersionError
        It is of a version that this release does not know.
    CorruptPartError
        It claims to be that of a published copy, and is damaged.
    """
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        document = None
    if not is_root_document(document):
        raise NotAStoreError(f"{where} is not an {FORMAT} store (another zarr.json lies there): give another folder or prefix")
    attributes = document["attributes"]
    try:
        _check_version(attributes.get("format_version"), where)
    except TypeError as error:
        raise NotAStoreError(f"{where}/zarr.json is no document of a store of {FORMAT}: {error}") from error
    if "published" not in attributes:
        return None
    try:
        return Published(groups={_group_key(name): tuple(map(_part_key, keys)) for name, keys in attributes["published"]["groups"].items()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptPartError(f"{where}/zarr.json, the root of a published copy, is damaged ({_reason(error)}): fetch it again") from error


def _group_key(key: object) -> str:
    if not isinstance(key, str) or not GROUP_NAME.fullmatch(key):
        raise ValueError(f"{key!r:.80} is no group")
    return key


def _part_key(key: object) -> str:
    if not isinstance(key, str) or not PART_NAME.fullmatch(key.removeprefix(f"{ANNOTATIONS}/")):
        raise ValueError(f"{key!r:.80} is no part")
    return key


def _check_version(version: object, where: str) -> None:
    if type(version) is not int:
        raise TypeError(f"format version {version!r:.40} is no number")
    if version != FORMAT_VERSION:
        raise UnsupportedVersionError(
            f"{where} has format version {version!r}, this release reads version {FORMAT_VERSION}: upgrade lmprobe-zarr to open it"
        )


# --------------------------------------------------------------------------------------------------------------- group


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupInfo:
    """What all parts of one group have in common: the model and how its activations came about.

    Two groups are the same exactly when all four fields are, so a group's document never differs between two writers.

    Parameters
    ----------
    model : str
        Name of the model.
    provenance : mapping of str to str, int, float, bool or None
        Everything known that changes the values: revision, weights, compute_dtype, tokenizer, …; empty where unknown.
    num_layers : int, optional
        Blocks of the model; None where unknown.
    hidden_size : int, optional
        Width of the residual stream; None where unknown.
    """

    model: str
    provenance: Provenance = field(default_factory=dict)
    num_layers: int | None = None
    hidden_size: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model.strip():
            raise InvalidArgumentError(f"model={self.model!r} is no name of a model: give a text that is not empty")
        if not self.model.isprintable():
            # It is shown wherever the store is, on terminals too, and comes with stores of others.
            raise InvalidArgumentError(f"model={self.model[:80]!r} holds characters that cannot be shown: give a name without them")
        object.__setattr__(self, "provenance", validate_provenance(self.provenance))
        for name in ("num_layers", "hidden_size"):
            object.__setattr__(self, name, _validate_count(name, getattr(self, name)))

    @property
    def name(self) -> str:
        """Folder of the group: a readable slug and a short hash of all four fields."""
        identity = [self.model, self.num_layers, self.hidden_size, dict(self.provenance)]
        digest = hashlib.sha256(_dump(identity)).hexdigest()[:12]
        slug = re.sub(r"[^a-z0-9.]+", "-", self.model.lower().replace("/", "--"))
        slug = re.sub(r"\.{2,}", ".", slug).strip("-.")[:64]
        return f"{slug}-{digest}" if slug else digest

    def to_document(self) -> bytes:
        """The group's ``zarr.json``."""
        attributes = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "kind": "group",
            "model": self.model,
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "provenance": dict(self.provenance),
        }
        return _dump({"zarr_format": 3, "node_type": "group", "attributes": attributes})


def parse_group(data: bytes, where: str) -> GroupInfo:
    """The record of a group's document.

    Raises
    ------
    CorruptPartError
        The document is not one of a group.
    UnsupportedVersionError
        It is of a version that this release does not know.
    """
    try:
        attributes = json.loads(data)["attributes"]
        if attributes["format"] != FORMAT or attributes["kind"] != "group":
            raise ValueError("another document")
        _check_version(attributes["format_version"], where)
        return GroupInfo(
            model=attributes["model"],
            provenance=attributes["provenance"],
            num_layers=attributes["num_layers"],
            hidden_size=attributes["hidden_size"],
        )
    except UnsupportedVersionError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptPartError(f"{where}/zarr.json is no group document of {FORMAT}: {_reason(error)}") from error


def _validate_count(name: str, value: Any) -> int | None:
    try:
        count = None if value is None else operator.index(value)
    except TypeError:
        count = 0
    if isinstance(value, bool) or (count is not None and not 0 < count < 2**31):
        raise InvalidArgumentError(f"{name}={value!r} is no count: give a whole number of at least 1, or None where it is not known")
    return count


# --------------------------------------------------------------------------------------------------------------- array


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayInfo:
    """One zarr array of a part: shape, chunks, dtype, and which of our codec chains its chunks went through.

    Parameters
    ----------
    dims : tuple of str
        Dimension names.
    shape, chunks : tuple of int
        Only the sample dimension is ever cut into chunks of more than one; along ``layer`` a chunk holds one.
    dtype : str
        ``float16 float32 float64 int8 int16 int32 int64 bool string``.
    shuffle : {None, "noshuffle", "shuffle", "bitshuffle"}
        Blosc's filter before lz4 (zstd for strings); None for chunks that are not compressed.
    attributes : mapping
        ``stored_dtype`` and the CF ragged-array attributes.
    """

    dims: tuple[str, ...]
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: str
    shuffle: str | None
    attributes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def layered(self) -> bool:
        """Whether the first dimension is ``layer``."""
        return len(self.dims) > 1 and self.dims[0] == "layer"

    @property
    def sample_axis(self) -> int:
        """Axis of the sample dimension."""
        return int(self.layered)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row: of what one prompt or token holds in one layer."""
        return self.shape[self.sample_axis + 1 :]

    @property
    def rows_per_chunk(self) -> int:
        """Rows of the sample dimension in one chunk."""
        return self.chunks[self.sample_axis]

    @property
    def chunk_nbytes(self) -> int:
        """Bytes of one decoded chunk; 0 for strings, whose length is not fixed."""
        return 0 if self.dtype == "string" else math.prod(self.chunks) * np.dtype(self.dtype).itemsize

    def chunk_key(self, layer: int, block: int) -> str:
        """Key of a chunk, relative to the array: `layer` and `block` count stored layers and chunks of rows."""
        head = (layer, block) if self.layered else (block,)
        return ".".join(["c", *map(str, head), *("0" for _ in self.row_shape)])

    @property
    def n_blocks(self) -> int:
        """Chunks along the sample dimension."""
        return -(-self.shape[self.sample_axis] // self.rows_per_chunk)

    @property
    def n_chunks(self) -> int:
        """Chunks in all."""
        return self.n_blocks * (self.shape[0] if self.layered else 1)

    def chunk_keys(self) -> list[str]:
        """Keys of all chunks."""
        layers, blocks = self.shape[0] if self.layered else 1, self.n_blocks
        return [self.chunk_key(layer, block) for layer in range(layers) for block in range(blocks)]

    @property
    def codecs(self) -> list[Json]:
        """The codec chain, as the array's document names it."""
        text = self.dtype == "string"
        itemsize = 1 if text else np.dtype(self.dtype).itemsize
        codecs: list[Json]
        if text:
            codecs = [{"name": "vlen-utf8"}]
        elif itemsize == 1:
            codecs = [{"name": "bytes"}]
        else:
            codecs = [{"name": "bytes", "configuration": {"endian": "little"}}]
        if self.shuffle is not None:
            blosc = {"typesize": itemsize, "cname": "zstd" if text else "lz4", "clevel": 5, "shuffle": self.shuffle, "blocksize": 0}
            codecs.append({"name": "blosc", "configuration": blosc})
        codecs.append({"name": "crc32c"})
        return codecs

    def to_document(self) -> Json:
        """The array's ``zarr.json``, as the Zarr v3 core specification has it."""
        kind = "string" if self.dtype == "string" else np.dtype(self.dtype).kind
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.chunks)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": {"string": "", "f": "NaN", "b": False}.get(kind, -1),
            "codecs": self.codecs,
            "attributes": dict(self.attributes),
            "dimension_names": list(self.dims),
            "storage_transformers": [],
        }


def parse_array(document: object) -> ArrayInfo:
    """The record of an array's document.

    Only what `ArrayInfo.to_document` writes is accepted, so nothing that a document says can make a reader run an
    unknown codec or allocate more than a chunk of at most 2 GiB.

    Raises
    ------
    ValueError
        Anything else; the caller adds which part and variable it was.
    """
    if not isinstance(document, dict):
        raise ValueError(f"an array document is an object, not {type(document).__name__}")
    shape, chunks = (_lengths(document["shape"]), _lengths(document["chunk_grid"]["configuration"]["chunk_shape"]))
    dtype, dims, codecs = document["data_type"], document["dimension_names"], document["codecs"]
    if dtype not in _DTYPES:
        raise ValueError(f"data type {dtype!r}")
    if not (len(dims) == len(shape) == len(chunks)) or not shape or not all(isinstance(d, str) for d in dims):
        raise ValueError("dimensions, shape and chunks differ in number")
    blosc = [c["configuration"]["shuffle"] for c in codecs if c["name"] == "blosc"]
    info = ArrayInfo(
        dims=tuple(dims),
        shape=shape,
        chunks=chunks,
        dtype=dtype,
        shuffle=blosc[0] if blosc else None,
        attributes=dict(document["attributes"]),
    )
    if not isinstance(info.attributes.get("stored_dtype", ""), str):
        raise ValueError("stored_dtype is no text")
    if info.shuffle not in {None, "noshuffle", "shuffle", "bitshuffle"} or codecs != info.codecs:
        raise ValueError(f"codecs {[c.get('name') for c in codecs]}")
    if document["chunk_key_encoding"] != {"name": "default", "configuration": {"separator": "."}}:
        raise ValueError("chunk key encoding")
    if info.layered and chunks[0] != 1:
        raise ValueError("a chunk over several layers")
    if info.row_shape != chunks[info.sample_axis + 1 :] or min(chunks) < 1 or info.chunk_nbytes > _BLOSC_LIMIT:
        raise ValueError(f"chunks {chunks} of shape {shape}")
    return info


def _lengths(values: object) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(v) is int and 0 <= v < 2**53 for v in values):
        raise ValueError(f"lengths {values!r}")
    return tuple(values)


# ---------------------------------------------------------------------------------------------------------------- part

# The digest stands at a fixed place, so that it can be checked on the bytes as they are, without writing the document again.
_PREFIX: Final = b'{"zarr_format":3,"node_type":"group","attributes":{"digest":"crc32c:'
_DIGEST: Final = slice(len(_PREFIX), len(_PREFIX) + 8)


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
        Every other file of the part: length in bytes and crc32c. For a chunk it is the crc32c that the chunk ends with,
        that is, of all but the last four bytes (over the whole, the crc32c of anything with its own crc32c appended is one constant).
    recorded : mapping
        What was only noted: versions, device, time.
    replaces : tuple of str
        Parts that this one supersedes.
    odd : mapping of str to (int, int), optional
        Of each variable that has any: values that are not finite, and rows that hold nothing but zeros. None where nobody counted.
    """

    group: str
    name: str
    kind: str = "part"
    digests: npt.NDArray[np.uint8]
    n_tokens: npt.NDArray[np.int64] | None = None
    layers: tuple[int, ...] = ()
    arrays: Mapping[str, ArrayInfo]
    files: Mapping[str, Sequence[int]]
    recorded: Mapping[str, Any] = field(default_factory=dict)
    replaces: tuple[str, ...] = ()
    odd: Mapping[str, Sequence[int]] | None = None

    def variables(self, level: Level) -> dict[str, ArrayInfo]:
        """Arrays of one level, by their names in it."""
        return {key.removeprefix(f"{level}/"): info for key, info in self.arrays.items() if key.startswith(f"{level}/")}


def new_part_name(after: str = "") -> str:
    """A name that no other writer can choose and that sorts after all older ones.

    Parameters
    ----------
    after : str
        The last name known; the new one sorts after it even where this machine's clock is behind.

    Returns
    -------
    str
        26 digits as in a ULID: 10 of milliseconds since 1970, 16 (80 bits) at random.
    """
    milliseconds = max(time.time_ns() // 1_000_000, part_milliseconds(after) + 1)
    return _base32(milliseconds, 10) + _base32(secrets.randbits(80), 16)


def replacement_name(last: str) -> str:
    """A name for what replaces parts, of which `last` sorts last: right after it, so that it never outranks a part written meanwhile."""
    return f"{last}.{_base32(secrets.randbits(50), 10)}"


def part_milliseconds(name: str) -> int:
    """When a part was begun by its writer's clock, in milliseconds since 1970, as its name tells; 0 where it does not."""
    head = name[:10]
    if len(head) < 10 or any(c not in _ULID_DIGITS for c in head):
        return 0
    # Ten digits hold 50 bits but a ULID's time has 48: a name beyond them is nobody's clock and is not followed.
    value = sum(_ULID_DIGITS.index(c) << (5 * (9 - i)) for i, c in enumerate(head))
    return value if value < 2**48 - 1 else 0


def _base32(number: int, digits: int) -> str:
    return "".join(_ULID_DIGITS[(number >> (5 * i)) & 31] for i in reversed(range(digits)))


def part_document(info: PartInfo, group: GroupInfo) -> bytes:
    """The ``zarr.json`` that commits a part: a Zarr v3 group with consolidated metadata and the part's index."""
    attributes: Json = {
        "digest": "crc32c:00000000",
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "kind": info.kind,
        # All that the group's own document says: where that is lost, any part brings it back.
        "model": group.model,
        "num_layers": group.num_layers,
        "hidden_size": group.hidden_size,
        "provenance": dict(group.provenance),
        "group": info.group,
        "name": info.name,
        "layers": list(info.layers),
        "prompt_sha256": info.digests.tobytes().hex(),
        "n_tokens": None if info.n_tokens is None else info.n_tokens.tolist(),
        "replaces": list(info.replaces),
        "odd": None if info.odd is None else {key: list(counts) for key, counts in info.odd.items()},
        "recorded": dict(info.recorded),
        "files": {key: list(value) for key, value in info.files.items()},
    }
    metadata: Json = {level: level_document(info, level, nested=False) for level in LEVELS if info.variables(level)}
    metadata |= {key: array.to_document() for key, array in info.arrays.items()}
    document = {"zarr_format": 3, "node_type": "group", "attributes": attributes, "consolidated_metadata": _consolidated(metadata)}
    data = bytearray(_dump(document, sort=False))
    data[_DIGEST] = b"%08x" % google_crc32c.value(bytes(data))
    return bytes(data)


def level_document(info: PartInfo, level: Level, *, nested: bool = True) -> Json:
    """The document of a part's ``prompts`` or ``tokens`` group; plain xarray takes the columns as coordinates from it."""
    arrays = info.variables(level)
    samples = (SAMPLE_DIM[level],)
    columns = [name for name, array in arrays.items() if array.dims == samples and not is_variable(name, array) and name != samples[0]]
    document: Json = {"zarr_format": 3, "node_type": "group", "attributes": {"coordinates": " ".join(columns)} if columns else {}}
    if nested:
        document["consolidated_metadata"] = _consolidated({name: array.to_document() for name, array in arrays.items()})
    return document


def _consolidated(metadata: Json) -> Json:
    return {"kind": "inline", "must_understand": False, "metadata": metadata}


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
        zeroed = bytearray(data)
        zeroed[_DIGEST] = b"00000000"
        intact = data.startswith(_PREFIX) and data[_DIGEST] == b"%08x" % google_crc32c.value(bytes(zeroed))
        attributes = (document := json.loads(data))["attributes"]
        if attributes["format"] == FORMAT:
            _check_version(attributes["format_version"], where)
        if not intact:
            raise ValueError("its digest does not hold")
        if attributes["format"] != FORMAT or attributes["kind"] not in {"part", "annotation"}:
            raise ValueError(f"it is a {attributes['kind']!r} of {attributes['format']!r}")
        metadata = document["consolidated_metadata"]["metadata"]
        counts = attributes["n_tokens"]
        info = PartInfo(
            group=_text(attributes["group"]),
            name=_text(attributes["name"]),
            kind=attributes["kind"],
            digests=np.frombuffer(bytes.fromhex(attributes["prompt_sha256"]), np.uint8).reshape(-1, 32),
            n_tokens=None if counts is None else np.array(_lengths(counts), np.int64),
            layers=_lengths(attributes["layers"]),
            arrays={key: parse_array(doc) for key, doc in metadata.items() if "/" in key},
            files={_text(key): _lengths(entry) for key, entry in attributes["files"].items()},
            recorded=dict(attributes["recorded"]),
            replaces=tuple(_text(name) for name in attributes["replaces"]),
            odd=None if (odd := attributes.get("odd")) is None else {key: _lengths(counts) for key, counts in odd.items()},
        )
        _check_part(info)
    except UnsupportedVersionError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OverflowError) as error:
        raise CorruptPartError(
            f"{where}/zarr.json is damaged ({_reason(error)}): none of this part can be trusted\n"
            "delete that folder, and extract its prompts again"
        ) from error
    return info


def parse_part_group(data: bytes) -> GroupInfo | None:
    """What a part's document says of its group; None where it does not: the first writers of version 1 left it out.

    The document is one that `parse_part` takes.
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


def _check_part(info: PartInfo) -> None:
    """Raise ValueError where parts of a document contradict one another."""
    n = len(info.digests)
    # Numbers sort much faster than rows of bytes, and than np.unique finds them; whole digests are only compared where two begin alike.
    begins = np.sort(np.ascontiguousarray(info.digests[:, :8]).view(np.uint64), axis=None)
    if not n or (bool((begins[1:] == begins[:-1]).any()) and len(np.unique(info.digests, axis=0)) != n):
        raise ValueError("a prompt occurs twice, or there is none")
    if list(info.layers) != sorted(set(info.layers)) or (info.layers and info.layers[-1] >= 2**31):
        raise ValueError("layers are not ascending")
    if info.name in info.replaces or any(len(entry) != 2 for entry in (*info.files.values(), *(info.odd or {}).values())):
        raise ValueError("it replaces itself, or its table of files is none")
    strange = next((key for key in info.files if not _FILE_KEY.fullmatch(key)), None)
    if strange is not None:
        raise ValueError(f"{strange[:80]!r} is no file of a part")
    counts = info.n_tokens
    if counts is not None and (counts.shape != (n,) or (counts < 1).any() or "tokens/position" not in info.arrays):
        raise ValueError("n_tokens does not fit the prompts")
    sizes = {"prompt": n, "layer": len(info.layers), "token": 0 if counts is None else int(counts.sum())}
    for key, array in info.arrays.items():
        match = re.fullmatch(r"(prompts|tokens)/([A-Za-z][A-Za-z0-9_]*)", key)
        if match is None:
            raise ValueError(f"array name {key!r}")
        sample = "token" if match[1] == "tokens" else "prompt"
        layered = array.dims[0] == "layer"
        if array.dims != ("layer",) if match[2] == "layer" else array.dims[layered : layered + 1] != (sample,):
            raise ValueError(f"{key} has dimensions {array.dims}")
        if layered and f"{match[1]}/layer" not in info.arrays:
            raise ValueError(f"{key} has layers without numbers")
        for dim, length in zip(array.dims, array.shape, strict=True):
            if sizes.get(dim, length) != length or not length:
                raise ValueError(f"{dim} has {length} rows in {key} but {sizes.get(dim, length)} in the index")
        if array.n_chunks > len(info.files):
            raise ValueError(f"{key} has more chunks than there are files")


def _dump(document: object, *, sort: bool = True) -> bytes:
    return json.dumps(document, allow_nan=False, separators=(",", ":"), sort_keys=sort).encode()


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:160]
