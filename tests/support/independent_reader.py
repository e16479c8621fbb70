"""A reader of stores by ``docs/format.md`` alone: json, base64, numpy and a decoder of Blosc. It knows neither zarr nor the package.

``python independent_reader.py GROUP OUTPUT.npz`` reads a group into one file, arrays named ``<level>.<name>``. Whatever the page forbids
raises ``Damaged``, and a version that it does not tell of ``Newer``. It is written to be followed beside the page, not to be fast.
"""

from __future__ import annotations

import binascii
import functools
import json
import re
import struct
import sys
import urllib.parse
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numcodecs import blosc

Document = dict[str, Any]
HEAD = b'{"zarr_format":3,"node_type":"group","attributes":{"digest":"crc32c:'
OWN = ("prompts.prompt_length",)
NO_LAYERS: list[Any] = [None]
LEVELS = {"prompts": "prompt", "tokens": "token"}
FILE = re.compile(r"(prompts|tokens)/(zarr\.json|[A-Za-z][A-Za-z0-9_]*/(zarr\.json|c(\.[0-9]+)+|(chunk|block)_table))")
NO_CHUNK = 2**64 - 1


class Damaged(Exception):  # noqa: N818 — what it says of a store
    pass


class Newer(Exception):  # noqa: N818 — likewise
    pass


# ------------------------------------------------------------------------------------------------------------- checksums

TABLE = []
for byte in range(256):
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    TABLE.append(byte)


@functools.lru_cache(maxsize=512)  # whoever changes one file reads all the others again
def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def parse_part(data: bytes) -> Document:
    """The attributes of a part's document, its digest checked; the index as lists in both versions, and `arrays`, the metadata of each."""
    try:
        whole = json.loads(data)
        document = dict(whole["attributes"])
        if document["format"] == "lmprobe-zarr" and document["format_version"] not in (1, 2):
            raise Newer(f"version {document['format_version']}")
        digits = data[len(HEAD) : len(HEAD) + 8]
        if not data.startswith(HEAD) or b"%08x" % crc32c(HEAD + b"0" * 8 + data[len(HEAD) + 8 :]) != digits:
            raise Damaged("digest")
        if document["format"] != "lmprobe-zarr" or document["kind"] not in ("part", "annotation"):
            raise Damaged("format")
        if document["format_version"] == 1 or "removed" in document:
            index, counts = bytes.fromhex(document["prompt_sha256"]), document["n_tokens"]
            if "tables" in document or "prompt_digests" in document or ("removed" in document and document["format_version"] != 2):
                raise Damaged("a mixture of versions")
        else:
            index, counts = from_base64(document["prompt_digests"]), document["n_tokens"]
            counts = None if counts is None else np.frombuffer(from_base64(counts), "<u4").tolist()
        document["arrays"] = {key: array for key, array in whole["consolidated_metadata"]["metadata"].items() if "/" in key}
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"document: {error!r}") from error
    hashes = [index[i : i + 32].hex() for i in range(0, len(index), 32)]
    document |= {"hashes": hashes, "n_tokens": counts, "tables": document.get("tables", {})}
    if len(index) % 32 or len(set(hashes)) != len(hashes) or (counts is not None and (len(counts) != len(hashes) or min(counts) < 1)):
        raise Damaged("index")
    if document["layers"] != sorted(set(document["layers"])) or not all(map(FILE.fullmatch, document["files"])):
        raise Damaged("layers, or a file that is none of a part")
    return document


def from_base64(text: str) -> bytes:
    return binascii.a2b_base64(text.encode("ascii"), strict_mode=True)


def read_bytes(part: Path, key: str) -> bytes:
    try:
        return (part / key).read_bytes()
    except FileNotFoundError:
        raise Damaged(f"{key} is missing") from None


def read_file(part: Path, key: str, files: dict[str, list[int]]) -> bytes:
    """A file of a part, held against the part's table; of a chunk what comes before its crc32c."""
    if key not in files:
        raise Damaged(f"{key} is not in the table of files")
    data = read_bytes(part, key)
    if key.rpartition("/")[2].startswith("c."):
        return check_chunk(data, files[key], key)
    if len(data) != files[key][0] or crc32c(data) != files[key][1]:
        raise Damaged(key)
    return data


def check_chunk(data: bytes, entry: list[int], key: str) -> bytes:
    """The body of a chunk, by its length and crc32c."""
    length, checksum = entry
    if len(data) != length or crc32c(data[:-4]) != checksum or struct.unpack("<I", data[-4:])[0] != checksum:
        raise Damaged(key)
    return data[:-4]


# ---------------------------------------------------------------------------------------------------------------- arrays


class Array(NamedTuple):
    """What an array's ``zarr.json`` says; `shard` chunks of rows lie in one file, 0 where each is a file."""

    key: str
    dims: list[str]
    shape: list[int]
    chunks: list[int]
    dtype: str
    codecs: list[Document]
    shard: int

    @property
    def axis(self) -> int:
        """Where the prompts or tokens are among the dimensions."""
        return int(len(self.dims) > 1 and self.dims[0] == "layer")

    @property
    def n_layers(self) -> int:
        return self.shape[0] if self.axis else 1

    @property
    def n_chunks(self) -> int:
        """Chunks of rows."""
        return -(-self.shape[self.axis] // self.chunks[self.axis])

    @property
    def nbytes(self) -> int:
        """Decoded bytes of a chunk."""
        return int(np.prod(self.chunks)) * np.dtype(self.dtype).itemsize

    def file(self, layer: int, number: int) -> str:
        """Key of a file, by its number among those of a layer."""
        index = [layer, number] if self.axis else [number]
        return f"{self.key}/c.{'.'.join(map(str, index + [0] * (len(self.shape) - len(index))))}"


def parse_array(part: Path, key: str, document: Document) -> Array:
    info = json.loads(read_file(part, f"{key}/zarr.json", document["files"]))
    if info != document["arrays"].get(key):
        raise Damaged(f"{key}/zarr.json and the part's document differ")
    shape, grid, codecs, dims = info["shape"], info["chunk_grid"]["configuration"]["chunk_shape"], info["codecs"], info["dimension_names"]
    chunks, shard = grid, 0
    if codecs[0]["name"] == "sharding_indexed":
        inner = codecs[0]["configuration"]
        index = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
        if len(codecs) != 1 or inner["index_location"] != "end" or inner["index_codecs"] != index or key not in document["tables"]:
            raise Damaged(f"{key} has shards of another kind")
        chunks, codecs = inner["chunk_shape"], inner["codecs"]
        shard = grid[int(dims[0] == "layer")] // chunks[int(dims[0] == "layer")]
        if shard < 1 or grid != [n * (shard if i == int(dims[0] == "layer") else 1) for i, n in enumerate(chunks)]:
            raise Damaged(f"{key} has shards that are not rows of chunks")
    lengths = {"prompt": len(document["hashes"]), "layer": len(document["layers"]), "token": sum(document["n_tokens"] or [])}
    if any(length != lengths.get(dim, length) for dim, length in zip(dims, shape, strict=True)):
        raise Damaged(f"{key} has another shape than the index says")
    return Array(key, dims, shape, chunks, info["data_type"], codecs, shard)


class Tables(NamedTuple):
    """Of each layer and chunk of rows its length and crc32c; and the records of blocks, where there are any."""

    chunks: Any
    block_nbytes: int
    blocks: Any
    nbytes: int


def read_tables(part: Path, array: Array, document: Document) -> Tables:
    """The tables of an array that has some."""
    said = document["tables"][array.key]
    size = said["block_nbytes"]
    if ("block_table" in said) != (size > 0) or (size and not 2**16 <= size < array.nbytes):
        raise Damaged(f"{array.key} has blocks of {size} bytes")
    widths = {"chunk_table": 2, "block_table": 2 + 2 * (-(-array.nbytes // size) if size else 0)}
    found = {}
    for name in ("chunk_table", "block_table")[: 2 if size else 1]:
        key, width = f"{array.key}/{name}", widths[name]
        if (said[name] is None) != (key in document["files"]):
            raise Damaged(f"{key} stands in two places, or in none")
        try:
            data = read_file(part, key, document["files"]) if said[name] is None else from_base64(said[name])
        except ValueError as error:
            raise Damaged(key) from error
        if len(data) != 4 * width * array.n_layers * array.n_chunks or (said[name] is None) != (len(data) > 1024):
            raise Damaged(f"{key} has {len(data)} bytes")
        found[name] = np.frombuffer(data, "<u4").reshape(array.n_layers, array.n_chunks, width).astype(int)
    chunks, blocks = found["chunk_table"], found.get("block_table")
    if blocks is not None and (blocks[:, :, 0] != chunks[:, :, 0]).any():
        raise Damaged(f"the tables of {array.key} have different lengths")
    return Tables(chunks, size, blocks, said["nbytes"])


def first_byte(array: Array, record: list[int]) -> int:
    """Where the first block begins, behind the start of its chunk."""
    if not any(codec["name"] == "blosc" for codec in array.codecs):
        return 0
    return 16 if record[1] >> 16 & 2 else 16 + 4 * len(record[2::2])


def check_blocks(body: bytes, array: Array, tables: Tables, record: list[int], key: str) -> None:
    """That a chunk's body is what the block table says of it."""
    at, lengths = first_byte(array, record), record[2::2]
    if at:
        head, decoded, size, length = struct.unpack("<4I", body[:16])
        copied = bool(record[1] >> 16 & 2)
        if (head, decoded, length) != (record[1], array.nbytes, len(body)) or not (copied or size == tables.block_nbytes):
            raise Damaged(f"{key}: a frame with another header")
        if not copied and list(struct.unpack(f"<{len(lengths)}i", body[16:at])) != [at + sum(lengths[:i]) for i in range(len(lengths))]:
            raise Damaged(f"{key}: blocks in other places")
    elif record[1]:
        raise Damaged(f"{key}: a header of a chunk that has none")
    if at + sum(lengths) != len(body):
        raise Damaged(f"{key}: blocks that are not all of it")
    for length, checksum in zip(lengths, record[3::2], strict=True):
        if crc32c(body[at : at + length]) != checksum:
            raise Damaged(f"{key}: a block")
        at += length


def check_index(index: bytes, lengths: list[int], shard: int, key: str) -> None:
    """That the index of a shard says what the chunk table says."""
    entries = struct.unpack(f"<{2 * shard}Q", index[:-4])
    expected = [number for i, n in enumerate(lengths) for number in (sum(lengths[:i]), n)]
    if list(entries) != expected + [NO_CHUNK] * (2 * (shard - len(lengths))) or struct.unpack("<I", index[-4:])[0] != crc32c(index[:-4]):
        raise Damaged(f"{key}: the index of the shard")


def decode(body: bytes, array: Array) -> Any:
    """One chunk, its crc32c already off."""
    names = [codec["name"] for codec in array.codecs]
    if names[0] not in ("bytes", "vlen-utf8") or names[-1] != "crc32c" or names[1:-1] not in ([], ["blosc"]):
        raise Damaged(f"codecs {names}")
    if "blosc" in names:
        decoded, _, length = struct.unpack("<3I", body[4:16])
        if length != len(body) or (array.dtype != "string" and decoded != array.nbytes):
            raise Damaged(f"{array.key}: a frame of another length")
        body = blosc.decompress(body)
    if array.dtype != "string":
        return np.frombuffer(body, np.dtype(array.dtype).newbyteorder("<")).reshape(array.chunks)
    (count,), at, texts = struct.unpack("<I", body[:4]), 4, []
    for _ in range(count):
        (length,) = struct.unpack("<I", body[at : at + 4])
        texts.append(body[at + 4 : at + 4 + length].decode("utf-8"))
        at += 4 + length
    return np.array(texts, object).reshape(array.chunks)


def read_array(part: Path, key: str, document: Document) -> tuple[Any, list[str]]:
    """An array of a part, and the names of its dimensions. Everything that is said of its files is checked."""
    array = parse_array(part, key, document)
    out = np.empty(array.shape, object if array.dtype == "string" else array.dtype)
    tables = read_tables(part, array, document) if key in document["tables"] else None
    nbytes, in_file, rows = 0, array.shard or 1, array.chunks[array.axis]
    for layer in range(array.n_layers):
        for number in range(-(-array.n_chunks // in_file)):
            name = array.file(layer, number)
            chunks = range(number * in_file, min((number + 1) * in_file, array.n_chunks))
            if tables is None:
                bodies = [read_file(part, name, document["files"])]
            else:
                data, at, bodies = read_bytes(part, name), 0, []
                for chunk in chunks:
                    entry = tables.chunks[layer, chunk].tolist()
                    bodies.append(check_chunk(data[at : at + entry[0]], entry, name))
                    at += entry[0]
                    if tables.blocks is not None:
                        check_blocks(bodies[-1], array, tables, tables.blocks[layer, chunk].tolist(), name)
                if len(data) != at + (16 * array.shard + 4 if array.shard else 0):
                    raise Damaged(f"{name} has {len(data)} bytes")
                if array.shard:
                    check_index(data[at:], tables.chunks[layer, chunks.start : chunks.stop, 0].tolist(), array.shard, name)
                nbytes += len(data)
            for chunk, body in zip(chunks, bodies, strict=True):
                values = decode(body, array)
                to: tuple[Any, ...] = (layer,) if array.axis else ()
                place = out[(*to, slice(chunk * rows, (chunk + 1) * rows))]
                # The last chunk is stored at full size.
                place[:] = (values[0] if array.axis else values)[: len(place)]
    if tables is not None and nbytes != tables.nbytes:
        raise Damaged(f"the files of {key} have {nbytes} bytes in all")
    return out, array.dims


def read_rows(part: Path, key: str, document: Document, layer: int, start: int, stop: int) -> Any:
    """Some rows of one chunk, from the blocks that hold them: nothing else of its file is read, and the chunk table is not either."""
    array = parse_array(part, key, document)
    tables = read_tables(part, array, document)
    rows, size, n = array.chunks[array.axis], tables.block_nbytes, tables.blocks.shape[2] // 2 - 1
    chunk = start // rows
    width = array.nbytes // rows
    begin, end = (start - chunk * rows) * width, (stop - chunk * rows) * width
    first, last = begin // size, -(-end // size)
    if last == n:  # a shorter last block is never decoded alone
        first = min(first, n - 2)
    record = tables.blocks[layer, chunk].tolist()
    lengths, checksums = record[2::2], record[3::2]
    in_file = array.shard or 1
    at = sum(tables.blocks[layer, chunk - chunk % in_file : chunk, 0].tolist()) + first_byte(array, record) + sum(lengths[:first])
    blocks = []
    with (part / array.file(layer, chunk // in_file)).open("rb") as file:
        for number in range(first, last):
            file.seek(at)
            blocks.append(file.read(lengths[number]))
            at += lengths[number]
            if len(blocks[-1]) != lengths[number] or crc32c(blocks[-1]) != checksums[number]:
                raise Damaged(f"{key}: block {number}")
    data = b"".join(blocks)
    if first_byte(array, record) > 16:
        decoded = min(last * size, array.nbytes) - first * size
        head = 16 + 4 * len(blocks)
        places = [head + sum(map(len, blocks[:i])) for i in range(len(blocks))]
        frame = struct.pack(f"<4I{len(blocks)}i", record[1], decoded, size, head + len(data), *places) + data
        data = blosc.decompress(frame)
    values = np.frombuffer(data[begin - first * size : end - first * size], np.dtype(array.dtype).newbyteorder("<"))
    return values.reshape(stop - start, *array.shape[array.axis + 1 :])


def check_made(part: Path, document: Document) -> None:
    """That the document names the same arrays everywhere, and that the arrays which repeat the index agree with it."""
    arrays = {key.removesuffix("/zarr.json") for key in document["files"] if key.count("/") == 2 and key.endswith("/zarr.json")}
    if arrays != document["arrays"].keys() or not document["tables"].keys() <= arrays:
        raise Damaged("arrays that are not everywhere in the document")
    many = {key for key, array in document["arrays"].items() if len(array["dimension_names"]) > 1}
    if document["format_version"] == 2 and not many <= document["tables"].keys():
        raise Damaged("variables without tables")
    for level in {key.partition("/")[0] for key in arrays}:
        read_file(part, f"{level}/zarr.json", document["files"])
    hashes, counts = document["hashes"], document["n_tokens"] or []
    said: dict[str, list[Any]] = {
        "prompts/prompt_sha256": hashes,
        "prompts/prompt": [digest[:16] for digest in hashes],
        "prompts/n_tokens": counts,
        "tokens/prompt_row": [row for row, n in enumerate(counts) for _ in range(n)],
        "prompts/layer": document["layers"],
        "tokens/layer": document["layers"],
    }
    for key, expected in said.items():
        if f"{key}/zarr.json" in document["files"] and read_array(part, key, document)[0].tolist() != expected:
            raise Damaged(f"{key} differs from the index")


# ----------------------------------------------------------------------------------------------------------------- group


def read_group(group: Path) -> dict[str, Any]:
    """What a group shows, by the steps of "Reading a group"."""
    found = {}
    for folder in [*group.iterdir(), *(group / "annotations").glob("*")]:
        if folder.name.startswith(".") or folder.name == "annotations" or not (folder / "zarr.json").is_file():
            continue
        document = parse_part((folder / "zarr.json").read_bytes())
        if (document["group"], document["name"]) != (group.name, folder.name):
            raise Damaged("a part that was moved")
        check_made(folder, document)
        found[folder] = document
    replaced = {name for document in found.values() for name in document["replaces"]}
    order = sorted((folder for folder in found if folder.name not in replaced), key=lambda folder: folder.name)

    hashes = {folder: found[folder]["hashes"] for folder in order}
    parts = [folder for folder in order if found[folder]["kind"] == "part"]
    prompts = list(dict.fromkeys(digest for folder in parts for digest in hashes[folder]))
    layers = {
        level: sorted({layer for f in parts if f"{level}/layer/zarr.json" in found[f]["files"] for layer in found[f]["layers"]})
        for level in LEVELS
    }
    n_tokens, since = token_rows(order, found, hashes)
    prompts = [digest for digest in prompts if is_shown(digest, order, found, hashes, since)]
    starts = dict(zip(prompts, np.cumsum([0, *(n_tokens.get(d, 0) for d in prompts)]).tolist(), strict=False))
    n_rows = {"prompts": len(prompts), "tokens": sum(n_tokens.get(d, 0) for d in prompts)}

    out: dict[str, Any] = {
        "prompts.prompt_sha256": np.array(prompts),
        **{f"{level}.layer": np.array(layers[level]) for level in LEVELS if layers[level]},
    }
    seen: dict[str, Any] = {}
    described: set[str] = set()
    for rank, folder in enumerate(order):
        document = found[folder]
        for key, hidden in document.get("removed", {}).items():
            level, name = key.split("/")
            hides: Any = out.get(f"{level}.{name}")
            for digest in hashes[folder] if hides is not None else []:
                if digest in starts:
                    first, n = (prompts.index(digest), 1) if level == "prompts" else (starts[digest], n_tokens.get(digest, 0))
                    which = slice(None) if hidden is None else [layers[level].index(layer) for layer in hidden if layer in layers[level]]
                    nothing: Any = {"f": np.nan, "O": "", "b": False}.get(hides.dtype.kind, -1)
                    hides[(slice(first, first + n), *([] if hidden is None else [which]))] = nothing
                    if hidden is None:
                        seen[f"{level}.{name}"][first : first + n] = False
        if "removed" in document:
            continue
        for key in sorted({key.rpartition("/")[0] for key in document["files"] if key.count("/") == 2}):
            level, name = key.split("/")
            if name in ("layer", "n_tokens", "prompt_row", "prompt_sha256"):
                continue
            values, dims = read_array(folder, key, document)
            if key == "tokens/role" and any("flag_meanings" in role_flags(found[f]) for f in order):
                values = role_texts(values, role_flags(document))
            elif key == "tokens/generated":
                values = values == 1
            if "column" in document["arrays"][key]["attributes"]:
                described.add(f"{level}.{name}")
            values = np.moveaxis(values, dims.index(LEVELS[level]), 0)  # (row, layer, …) or (row, …)
            by_layer = "layer" in dims
            row_shape = (len(layers[level]), *values.shape[2:]) if by_layer else values.shape[1:]
            absent: Any = {"f": np.nan, "O": "", "b": False}.get(values.dtype.kind, -1)
            before = out.get(f"{level}.{name}", np.empty((0, *row_shape), values.dtype))
            shape = (n_rows[level], *np.maximum(before.shape[1:], row_shape))  # parts may hold more or fewer of the largest logits
            place = out[f"{level}.{name}"] = np.full(shape, absent, np.promote_types(before.dtype, values.dtype))
            place[tuple(map(slice, before.shape))] = before
            filled = seen.setdefault(f"{level}.{name}", np.zeros(n_rows[level], bool))
            row = 0
            for i, digest in enumerate(hashes[folder]):
                n = 1 if level == "prompts" else document["n_tokens"][i]
                if digest in starts and (level == "prompts" or rank >= since[digest]):
                    first = prompts.index(digest) if level == "prompts" else starts[digest]
                    chosen = place[first : first + n]
                    if by_layer:
                        chosen[:, [layers[level].index(layer) for layer in document["layers"]]] = values[row : row + n]
                    else:
                        chosen[:] = absent
                        chosen[tuple(map(slice, values[row : row + n].shape))] = values[row : row + n]
                    filled[first : first + n] = True
                row += n
    for key, filled in seen.items():
        # A column of the user's that some prompts lack.
        if out[key].ndim == 1 and out[key].dtype.kind in "ibO" and not filled.all() and key not in OWN and key.startswith("prompts."):
            if out[key].dtype.kind == "O" and key not in described:
                continue
            out[key] = np.where(filled, out[key] if out[key].dtype.kind == "O" else out[key].astype(float), np.nan)
    return out


def role_flags(document: Document) -> dict[str, Any]:
    """What a part says of its codes of roles."""
    return document["arrays"].get("tokens/role", {}).get("attributes", {})  # type: ignore[no-any-return]


def role_texts(codes: Any, flags: dict[str, Any]) -> Any:
    """Codes as the names that a part gives them, "" for those without one."""
    names = [urllib.parse.unquote(name) for name in flags.get("flag_meanings", "").split(" ")]
    known = dict(zip(flags.get("flag_values", []), names, strict=False))
    return np.array([known.get(code, "") for code in codes.tolist()], object)


def holds(document: Document) -> dict[str, list[int] | None]:
    """The variables of a part that are values of a model, with their layers; None for one without."""
    if document["format_version"] == 2:
        return {key: document["layers"] if "layer" in document["arrays"][key]["dimension_names"] else None for key in document["tables"]}
    names = {key.rpartition("/")[0] for key in document["files"] if key.count("/") == 2}
    sites = tuple(f"{site}{end}" for site in ("resid", "attn", "mlp", "embed", "router") for end in ("", "_"))
    found: dict[str, list[int] | None] = {}
    for key in names:
        name = key.partition("/")[2]
        if name in sites[::2] or name.startswith((*sites[1::2], "logits", "perplexity", "token_log_prob", "token_perplexity")):
            unlayered = not name.startswith(("resid", "attn", "mlp", "router"))
            found[key] = None if unlayered else document["layers"]
    return found


def is_shown(digest: str, order: list[Path], found: dict[Path, Document], hashes: dict[Path, list[str]], since: dict[str, int]) -> bool:
    """Whether anything of a prompt is left that no tombstone hides."""
    mine = [folder for folder in order if digest in hashes[folder]]
    if not any("removed" in found[folder] for folder in mine):
        return True
    left: set[tuple[str, int | None]] = set()
    for folder in mine:
        for key, layers in found[folder].get("removed", {}).items():
            left -= {(key, layer) for layer in layers or NO_LAYERS}
        for key, layers in {} if "removed" in found[folder] else holds(found[folder]).items():
            if key.startswith("prompts/") or order.index(folder) >= since.get(digest, 0):
                left |= {(key, layer) for layer in layers or NO_LAYERS}
    return bool({(k, layer) for k, layer in left if k.startswith("prompts/") or order.index(mine[-1]) >= since.get(digest, 0)})


def token_rows(order: list[Path], found: dict[Path, Document], hashes: dict[Path, list[str]]) -> tuple[dict[str, int], dict[str, int]]:
    """How many token rows each prompt has, and from which part on they count."""
    n_tokens: dict[str, int] = {}
    since: dict[str, int] = {}
    kept: set[str] = set()  # prompts of which a part that is up to date keeps tokens
    for rank, folder in enumerate(order):
        counts = found[folder]["n_tokens"]
        for digest, n in zip(hashes[folder], counts or [], strict=counts is not None):
            if n_tokens.get(digest) != n:
                n_tokens[digest], since[digest] = n, rank
                kept.discard(digest)
            if "removed" not in found[folder]:
                kept.add(digest)
    return {digest: n for digest, n in n_tokens.items() if digest in kept}, since


if __name__ == "__main__":
    held = read_group(Path(sys.argv[1]))
    np.savez(sys.argv[2], **{name: values.astype(str) if values.dtype == object else values for name, values in held.items()})
    assert not {"zarr", "lmprobe_zarr", "xarray"} & set(sys.modules)
