"""`ArrayInfo`, one Zarr array of a part: shape, chunks, dtype and codecs, as in its ``zarr.json``. No I/O."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from lmprobe_zarr.batch import INNER_DIMS, SCALARS, SITES, decode_role_names, split_variable
from lmprobe_zarr.store.format.names import COLUMN, SAE, SAMPLE_DIM, Json, Level

__all__ = ["SITE_ATTRIBUTES", "ArrayInfo", "array_dims", "is_variable", "lengths_of", "parse_array"]

_DTYPES: Final = frozenset({"float16", "float32", "float64", "int8", "int16", "int32", "int64", "bool", "string"})
_BLOSC_LIMIT: Final = 2**31 - 17  # bytes, the most that blosc compresses at once
# What the arrays of a site say of it: the path that the caller named it by, how many heads its values are of, the layers of the model that
# have it, where some lack it; the part of the tokens that a variable is pooled over, where it is not all of them; and the autoencoder that
# latents are of.
SITE_ATTRIBUTES: Final = ("site_path", "num_heads", "site_layers", "over", SAE)


def array_dims(
    variable: str, level: Level, shape: tuple[int, ...], layered: bool, hidden_size: int | None, *, latents: bool = False
) -> tuple[str, ...]:
    """Dimension names of an activation variable.

    A site that is none of those that extraction knows has the inner dimension ``hidden`` where it is as wide as the residual stream, and a
    dimension of its own elsewhere: one dataset holds variables of several widths. Values and indices of `latents` share a dimension.
    """
    head = (("layer",) if layered else ()) + (SAMPLE_DIM[level],)
    if latents:
        return (*head, f"{variable.removesuffix('_values').removesuffix('_indices')}_k")
    tail = len(shape) - len(head)
    if tail != 1:
        return head + tuple(f"{variable}_dim{i}" for i in range(tail))
    site = split_variable(variable)[0] if level == "prompts" else variable
    own = "hidden" if site in SITES or shape[-1] == hidden_size else f"{site}_unit"
    return (*head, INNER_DIMS.get(variable, own))


def is_variable(name: str, info: ArrayInfo) -> bool:
    """Whether an array of a part holds activations or other outputs of the model, and is not a column that describes prompts or tokens."""
    return len(info.dims) > 1 or name in SCALARS


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
        ``stored_dtype``, the CF ragged-array attributes, and the names of roles as CF flags.
    shard_blocks : int
        How many chunks of rows lie in one file, a shard; 0 where each chunk is a file.
    """

    dims: tuple[str, ...]
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: str
    shuffle: str | None
    attributes: Mapping[str, Any] = field(default_factory=dict)
    shard_blocks: int = 0

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
        """Shape of one row: the values of one prompt or token in one layer."""
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
        tail = ".0" * (len(self.shape) - self.sample_axis - 1)
        return f"c.{layer}.{block}{tail}" if self.layered else f"c.{block}{tail}"

    @property
    def n_blocks(self) -> int:
        """Chunks along the sample dimension."""
        return -(-self.shape[self.sample_axis] // self.rows_per_chunk)

    @property
    def n_chunks(self) -> int:
        """Chunks in all."""
        return self.n_blocks * (self.shape[0] if self.layered else 1)

    @property
    def blocks_per_file(self) -> int:
        """Chunks of rows in one file."""
        return self.shard_blocks or 1

    def first_in_shard(self, block: int) -> int:
        """The first chunk of rows in the file that holds one."""
        return block - block % self.blocks_per_file

    @property
    def n_files(self) -> int:
        """Files that hold the chunks of one layer."""
        return -(-self.n_blocks // self.blocks_per_file)

    def file_name(self, layer: int, file: int) -> str:
        """Name of a file with chunks: `layer` and `file` count stored layers and the files of each."""
        return self.chunk_key(layer, file)

    def file_of(self, layer: int, block: int) -> str:
        """Name of the file that holds a chunk."""
        return self.chunk_key(layer, block // self.blocks_per_file)

    def file_names(self) -> list[str]:
        """Names of all files with chunks."""
        layers, files = self.shape[0] if self.layered else 1, self.n_files
        return [self.file_name(layer, file) for layer in range(layers) for file in range(files)]

    @property
    def shard_index_nbytes(self) -> int:
        """Bytes of the index at the end of each shard; 0 where there are none."""
        return 16 * self.shard_blocks + 4 if self.shard_blocks else 0

    @property
    def codecs(self) -> list[Json]:
        """The codec chain of a file, as the array's document names it."""
        if not self.shard_blocks:
            return self.chunk_codecs
        index = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
        described = {"chunk_shape": list(self.chunks), "codecs": self.chunk_codecs, "index_codecs": index, "index_location": "end"}
        return [{"name": "sharding_indexed", "configuration": described}]

    @property
    def chunk_codecs(self) -> list[Json]:
        """The codec chain of a chunk."""
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
        grid = list(self.chunks)
        grid[self.sample_axis] *= self.blocks_per_file
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": grid}},
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
    shape, grid = (lengths_of(document["shape"]), lengths_of(document["chunk_grid"]["configuration"]["chunk_shape"]))
    dtype, dims, outer = document["data_type"], document["dimension_names"], document["codecs"]
    sharding = outer[0]["configuration"] if outer[0]["name"] == "sharding_indexed" else None
    codecs, chunks = (outer, grid) if sharding is None else (sharding["codecs"], lengths_of(sharding["chunk_shape"]))
    if dtype not in _DTYPES:
        raise ValueError(f"data type {dtype!r}")
    if not (len(dims) == len(shape) == len(chunks)) or not shape or not all(isinstance(d, str) for d in dims):
        raise ValueError("dimensions, shape and chunks differ in number")
    if len(grid) != len(shape) or min(chunks) < 1:
        raise ValueError(f"chunks {chunks} of shape {shape}")
    axis = int(len(dims) > 1 and dims[0] == "layer")
    blosc = [c["configuration"]["shuffle"] for c in codecs if c["name"] == "blosc"]
    info = ArrayInfo(
        dims=tuple(dims),
        shape=shape,
        chunks=chunks,
        dtype=dtype,
        shuffle=blosc[0] if blosc else None,
        attributes=dict(document["attributes"]),
        shard_blocks=0 if sharding is None else grid[axis] // chunks[axis],
    )
    if not isinstance(info.attributes.get("stored_dtype", ""), str):
        raise ValueError("stored_dtype is no text")
    for name in ("site_path", "over", SAE):
        if not isinstance(info.attributes.get(name, ""), str):
            raise ValueError(f"{name} is no text")
    lengths_of([info.attributes.get("num_heads", 1)])
    lengths_of(info.attributes.get("site_layers", []))
    if COLUMN in info.attributes:
        _check_column(info, info.attributes[COLUMN])
    if info.dims == ("token",):
        decode_role_names(info.attributes)
    if info.shuffle not in {None, "noshuffle", "shuffle", "bitshuffle"} or outer != info.codecs:
        raise ValueError(f"codecs {[c.get('name') for c in outer]}")
    if list(grid) != info.to_document()["chunk_grid"]["configuration"]["chunk_shape"] or (sharding is not None and not info.shard_blocks):
        raise ValueError(f"shards {grid} of chunks {chunks}")
    if info.shard_blocks > info.n_blocks:
        raise ValueError(f"shards of {info.shard_blocks} chunks, of which there are {info.n_blocks}")
    if document["chunk_key_encoding"] != {"name": "default", "configuration": {"separator": "."}}:
        raise ValueError("chunk key encoding")
    if info.layered and chunks[0] != 1:
        raise ValueError("a chunk over several layers")
    if info.row_shape != chunks[info.sample_axis + 1 :] or min(chunks) < 1 or info.chunk_nbytes > _BLOSC_LIMIT:
        raise ValueError(f"chunks {chunks} of shape {shape}")
    return info


# The dtypes on disk of each kind of column; see docs/format.md. Kinds of later versions are read by their dtype alone.
_COLUMN_DTYPES: Final[Mapping[str, frozenset[str]]] = {
    "bool": frozenset({"bool", "float64"}), "int": frozenset({"int64", "float64", "string"}), "float": frozenset({"float64"}),
    "text": frozenset({"string"}), "datetime": frozenset({"string"}), "date": frozenset({"string"}), "timedelta": frozenset({"string"}),
    "missing": frozenset({"float64"}),
}  # fmt: skip


def _check_column(info: ArrayInfo, described: object) -> None:
    """Raise ValueError where what an array says of its column cannot be so."""
    if not isinstance(described, dict) or not isinstance(described.get("kind"), str) or len(info.dims) != 1:
        raise ValueError("the attribute column")
    kind = described["kind"]
    if kind not in _COLUMN_DTYPES:
        return
    if info.dtype not in _COLUMN_DTYPES[kind]:
        raise ValueError(f"a column of kind {kind} with data type {info.dtype}")
    if kind in ("datetime", "date", "timedelta") and described.get("unit") not in ("s", "ms", "us", "ns"):
        raise ValueError(f"a column of kind {kind} in units of {described.get('unit')!r:.20}")
    texts = [described.get(key, "") for key in ("missing_text", "time_zone", "dtype")]
    if not all(isinstance(text, str) for text in texts) or not isinstance(described.get("ordered", False), bool):
        raise ValueError("the attribute column")
    if type(described.get("missing", 0)) is not int or not 0 <= described.get("missing", 0) <= info.shape[0]:
        raise ValueError("missing values of a column")
    categories = described.get("categories", [])
    of = {"text": (str,), "bool": (bool,), "float": (float, int)}.get(kind, (int,))
    if not isinstance(categories, list) or not all(type(value) in of for value in categories) or len(set(categories)) < len(categories):
        raise ValueError("categories of a column")


def lengths_of(values: object) -> tuple[int, ...]:
    """Lengths that a document lists, as a tuple; ValueError where they are none."""
    # No comparison before all are known to be integers, and none in Python: some lists are as long as a part has prompts.
    if not isinstance(values, list) or not set(map(type, values)) <= {int} or (values and not 0 <= min(values) <= max(values) < 2**53):
        raise ValueError(f"lengths {values!r}")
    return tuple(values)
