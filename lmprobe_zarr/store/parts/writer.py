"""One part from batches to its commit: lay out, write chunks as they fill, commit last. Never reads back.

Nothing of a part is visible before `PartWriter.commit` returns: the part's own ``zarr.json`` is written last, after
everything that it names has been written and flushed.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Collection, Hashable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Final, Self

import numpy as np

from lmprobe_zarr.batch import (
    HASH_DIGITS,
    NO_ROLE,
    ROLES,
    Column,
    TokenBatch,
    check_texts,
    digests_of,
    encode_role_names,
    join_columns,
    parse_column,
    positions_of,
    split_variable,
)
from lmprobe_zarr.errors import CorruptPartError, InvalidArgumentError, PartGoneError, ReadOnlyError
from lmprobe_zarr.storage import PieceWriter, Storage
from lmprobe_zarr.store.format import (
    ANNOTATIONS,
    BLOCK_TABLE,
    CALL_ORDER,
    CHUNK_TABLE,
    COLUMN,
    COLUMN_NAME,
    INLINE_BYTES,
    LEVELS,
    PART_VERSION,
    SAE,
    SAMPLE_DIM,
    ArrayInfo,
    ArrayTables,
    GroupInfo,
    Level,
    PartInfo,
    array_dims,
    block_nbytes_of,
    check_table,
    encode_chunk,
    file_entry,
    level_document,
    parse_group,
    parse_part,
    parse_root,
    part_document,
    removed_document,
    root_document,
    validate_column_names,
)
from lmprobe_zarr.store.parts.call_order import CallOrder
from lmprobe_zarr.store.parts.chunk_files import ChunkFiles
from lmprobe_zarr.store.parts.columns import encode_column, text_rows
from lmprobe_zarr.store.parts.commits import note_commit
from lmprobe_zarr.store.parts.stored_array import StoredArray
from lmprobe_zarr.store.parts.written_arrays import MovedArray, RowBuffer
from lmprobe_zarr.typing import Array, Buffer, Ints

__all__ = ["BUFFER_BYTES", "PartWriter", "shape_of", "write_group"]


# A chunk is what one read fetches, and what one prompt's tokens cost to read (docs/design/performance.md). On other storages
# than a local disk each chunk is one request.
CHUNK_BYTES: Final = 2 * 2**20
REMOTE_CHUNK_BYTES: Final = 4 * 2**20
MIN_CHUNK_BYTES: Final = 2**18
# The most that all chunks being filled hold together; with many layers each gets a smaller share.
BUFFER_BYTES: Final = 256 * 2**20
COLUMN_ROWS: Final = 2**20
# Files of a part that is written with shards: few for an object store, and still several that can be read at the same time.
SHARD_BYTES: Final = 64 * 2**20
REMOTE_SHARD_BYTES: Final = 256 * 2**20


def write_group(storage: Storage, group: GroupInfo, *, durable: bool) -> None:
    """Write the documents of the root and of a group where they are not there yet; a group's also where it is damaged.

    Two writers may do so at once: both write the same bytes.
    """
    try:
        if parse_root(storage.read_current("zarr.json"), storage.url) is not None:
            raise ReadOnlyError(f"{storage.url} is a published copy, which never changes: write to the store that it was made from")
    except (FileNotFoundError, NotADirectoryError):
        storage.commit("zarr.json", root_document(), durable=durable, replace=False)
    key, document = f"{group.name}/zarr.json", group.to_document()
    try:
        there = storage.read(key)
    except (FileNotFoundError, NotADirectoryError):
        storage.commit(key, document, durable=durable, replace=False)
        return
    if there != document:
        # The folder's name holds a hash of everything in the document, so a document that differs is damaged.
        with suppress(CorruptPartError):
            parse_group(there, f"{storage.url}/{group.name}")  # raises where it is of another version
        storage.commit(key, document, durable=durable)


class PartWriter:
    """Writes one part.

    Use it as a context manager: a part that is not committed when the context ends, for whatever reason, is removed.

    Parameters
    ----------
    storage : Storage
        The place of the store.
    group : GroupInfo
        The group; its documents must be there (`write_group`).
    name : str
        Name of the part, unique (`new_part_name`).
    kind : {"part", "annotation"}
        Annotations have a folder of their own.
    compressed : bool
        Lossless lz4 with checksums, or checksums alone.
    durable : bool
        Flush every file to the medium before the commit.
    replaces : tuple of str
        Parts that this one replaces.
    recorded : mapping, optional
        What is noted in the part and never read again: versions, device.
    alone : bool
        Leave the documents of root and group to the caller, who writes them later.
    removed : mapping, optional
        What a tombstone removes of all its prompts, see `PartInfo`; its batches hold prompts alone.
    removed_counts : ndarray of int64, shape (prompt,), optional
        Token rows that each prompt of a tombstone had.
    order : CallOrder, optional
        Where the prompts are in the list of their call, which the part records. None for a part that is a call of its own.
    shards : bool
        Write many chunks of a layer to one file, of about 64 MiB on a local disk and 256 MiB elsewhere.
    bare_texts : collection of str
        Keys of columns of texts that do not say so, as of earlier versions, and must not: what other parts lack of them is shown as an
        empty text, and not as missing.

    Notes
    -----
    Every batch must hold the same variables, layers and columns as the first.
    """

    def __init__(
        self,
        storage: Storage,
        group: GroupInfo,
        name: str,
        *,
        kind: str = "part",
        compressed: bool = True,
        durable: bool = True,
        replaces: tuple[str, ...] = (),
        recorded: Mapping[str, Any] | None = None,
        alone: bool = False,
        removed: Mapping[str, tuple[int, ...] | None] | None = None,
        removed_counts: Ints | None = None,
        order: CallOrder | None = None,
        shards: bool = False,
        bare_texts: Collection[str] = (),
    ) -> None:
        self.removed, self.removed_counts = dict(removed or {}), removed_counts
        self.storage, self.group, self.name, self.kind = storage, group, name, kind
        self.path = f"{group.name}/{f'{ANNOTATIONS}/' if kind == 'annotation' else ''}{name}"
        self.compressed, self.durable, self.replaces, self.alone = compressed, durable, replaces, alone
        self.recorded = {"python": platform.python_version(), **{k: v for k, v in (recorded or {}).items() if k != CALL_ORDER}}
        self.order, self.bare_texts = order, bare_texts
        self.nbytes = self.held_nbytes = 0
        # A tombstone stays readable for readers that know nothing else of format 2.
        self.version = 1 if self.removed else PART_VERSION
        self.shard_bytes = 0
        if shards and self.version > 1:
            self.shard_bytes = SHARD_BYTES if storage.is_local else REMOTE_SHARD_BYTES
        self._files: dict[str, tuple[int, int]] = {}
        self._tables: dict[str, ArrayTables] = {}
        self._first_file = ""
        self._arrays: dict[str, ArrayInfo] = {}
        self._variables: dict[str, RowBuffer | MovedArray] = {}
        self._columns: dict[str, list[Any]] = {}
        self._digests: list[str] = []
        self._seen: set[str] = set()
        self._n_tokens: list[Ints] = []
        self._shape: tuple[Any, ...] | None = None
        self._layers: tuple[int, ...] = ()
        self._whole_prompts = True
        self._roles: list[str] = []
        self._unfinished = False
        self._ended = False  # committed or aborted

    def __len__(self) -> int:
        """Prompts so far."""
        return len(self._digests)

    @property
    def waiting_nbytes(self) -> int:
        """Bytes of activations that wait in memory for their chunk to be full."""
        return sum(buffer.waiting_nbytes for buffer in self._variables.values())

    def append(self, batch: TokenBatch) -> None:
        """Add the prompts of a batch.

        Raises
        ------
        InvalidArgumentError
            The batch holds other variables, layers, row shapes or columns than the first, or a prompt again.
        NoSpaceError, ReadOnlyError
            The place cannot take it; nothing becomes visible.
        """
        columns = self._check(batch)
        # If anything below fails, only some of the batch may have been added, and the part must never be committed.
        self._unfinished = True
        self._digests += batch.sha256
        self._seen.update(batch.sha256)
        if batch.n_tokens is not None:
            self._n_tokens.append(np.asarray(batch.n_tokens, np.int64))
        for name, column in columns.items():
            self._columns.setdefault(name, []).append(column)
        for level in LEVELS:
            for name, array in (batch.prompts if level == "prompts" else batch.tokens).items():
                layered = name not in batch.unlayered
                self._buffer(level, name, array, layered, batch).append(array if layered else array[None])
        self.nbytes += batch.nbytes
        self.held_nbytes += batch.held_nbytes
        self._unfinished = False

    def _check(self, batch: TokenBatch) -> dict[str, Any]:
        """The columns of a batch as they are stored; raises where it does not fit the first one."""
        columns = self._batch_columns(batch)
        for name, values in columns.items():
            if isinstance(values, Column) and name in self._columns:
                try:
                    join_columns(name.partition("/")[2], [self._columns[name][-1][:0], values[:0]])
                except InvalidArgumentError as error:
                    raise InvalidArgumentError(f"one part holds the same variables, layers and columns throughout: {error}") from error
        shape = shape_of(batch)
        if self._shape is None:
            validate_column_names(batch.prompt_columns)
            for name in (*batch.prompts, *batch.tokens, *batch.token_columns):
                if not COLUMN_NAME.fullmatch(name):
                    raise InvalidArgumentError(
                        f"{name!r:.80} is no name of a variable: use the letters a to z, digits and _, a letter first"
                    )
            for name, array in (*batch.prompts.items(), *batch.tokens.items()):
                dtype = array.dtype
                if dtype.kind not in "fiub" or dtype.itemsize > 8 or dtype == np.uint64:
                    raise InvalidArgumentError(f"{name!r} has dtype {dtype}, which cannot be stored: use float16, 32, 64 or integers")
            self._shape, self._layers = shape, batch.layers
        elif shape != self._shape:
            raise InvalidArgumentError(f"one part holds the same variables, layers and columns throughout: {shape} after {self._shape}")
        again = self._seen.intersection(batch.sha256)
        if again:
            raise InvalidArgumentError(f"prompt {min(again)[:HASH_DIGITS]} was already given for this part")
        return columns

    def _batch_columns(self, batch: TokenBatch) -> dict[str, Any]:
        n = len(batch.sha256)
        columns: dict[str, Any] = {}
        if batch.prompt_length is not None:
            columns["prompts/prompt_length"] = np.asarray(batch.prompt_length, np.int64)
        if batch.text is not None:
            check_texts(batch.text)
            columns["prompts/text"] = np.array(list(map(str.__str__, batch.text)), object)
        columns |= {f"prompts/{name}": parse_column(name, values) for name, values in batch.prompt_columns.items()}
        if batch.n_tokens is not None:
            counts = np.asarray(batch.n_tokens, np.int64)
            columns["prompts/n_tokens"] = counts
            columns["tokens/prompt_row"] = np.repeat(np.arange(len(self), len(self) + n), counts)
            whole = positions_of(counts)
            token_columns = {"position": whole, **batch.token_columns}
            self._whole_prompts &= bool(np.array_equal(token_columns["position"], whole))
            columns |= {f"tokens/{name}": np.asarray(values, np.int64) for name, values in token_columns.items()}
            if "role" in token_columns and batch.role_names:
                columns["tokens/role"] = self._role_codes(columns["tokens/role"], batch.role_names)
        return columns

    def _role_codes(self, codes: Ints, names: tuple[str, ...]) -> Ints:
        """Codes of a batch as those of the part, in which the names that a batch has first follow one another."""
        self._roles = self._roles or list(ROLES)
        self._roles += [names[code] for code in np.unique(codes[codes >= 0]) if names[code] and names[code] not in self._roles]
        # What is not used has no code, and -1 stays what it is, as the last.
        known = [self._roles.index(name) if name in self._roles else NO_ROLE for name in names]
        return np.array([*known, NO_ROLE], np.int64)[codes]

    def adopt(self, source: StoredArray, layers: tuple[int, ...], odd: tuple[int, int]) -> None:
        """Take over a variable of another part that has the same prompts in the same order, without decoding it.

        Its chunks are read and checked when the part is committed. No batch may hold this variable.

        Parameters
        ----------
        source : StoredArray
            One that has tables.
        layers : tuple of int
            The layers of that part.
        odd : (int, int)
            What that part says of its values, see `PartInfo`.
        """
        if source.info.layered:
            self._layers = layers
        self._variables[source.where.name] = MovedArray(self, source.where.name, source, odd)

    def _buffer(self, level: Level, name: str, array: Array, layered: bool, batch: TokenBatch) -> RowBuffer:
        key = f"{level}/{name}"
        buffer = self._variables.get(key)
        if not isinstance(buffer, RowBuffer):
            wide = array.dtype if array.dtype.kind in "fbi" else np.dtype(np.int64)
            row_shape = array.shape[2 if layered else 1 :]
            buffers = sum(a.shape[0] for v in (batch.prompts, batch.tokens) for n, a in v.items() if n not in batch.unlayered) or 1
            most = CHUNK_BYTES if self.storage.is_local else REMOTE_CHUNK_BYTES
            chunk_bytes = max(MIN_CHUNK_BYTES, min(most, BUFFER_BYTES // buffers))
            rows = max(1, chunk_bytes // max(1, int(np.prod(row_shape)) * wide.itemsize))
            if self.version > 1:
                rows = _whole_blocks(rows, int(np.prod(row_shape)) * wide.itemsize)
            noted = {
                **batch.site_attributes.get(split_variable(name)[0] if level == "prompts" else name, {}),
                **batch.site_attributes.get(name, {}),
            }
            info = ArrayInfo(
                dims=array_dims(name, level, array.shape, layered, self.group.hidden_size, latents=SAE in noted),
                shape=((len(self._layers),) if layered else ()) + (0, *row_shape),
                chunks=((1,) if layered else ()) + (rows, *row_shape),
                dtype=wide.name,
                # Byte shuffle decodes twice as fast and costs a tenth in size: the better trade for small pooled arrays.
                shuffle=("shuffle" if level == "prompts" else "bitshuffle") if self.compressed else None,
                attributes={"stored_dtype": batch.stored_dtype.get(name, wide.name), **noted},
            )
            buffer = self._variables[key] = RowBuffer(self, key, info)
        return buffer

    def write_chunk(self, key: str, info: ArrayInfo, layer: int, block: int, values: Array) -> None:
        """Encode and write one chunk."""
        name = f"{key}/{info.chunk_key(layer, block)}"
        body, checksum = encode_chunk(values, info)
        self.write_file(name, (body, checksum))
        self._files[name] = memoryview(body).nbytes + len(checksum), int.from_bytes(checksum, "little")

    def write_file(self, name: str, data: Buffer | tuple[Buffer, ...]) -> None:
        """Write one file of the part."""
        self.storage.write(f"{self.path}/{name}", data, durable=self.durable)
        self.note_file(name)

    def note_file(self, name: str) -> None:
        """Remember the first file that was written."""
        self._first_file = self._first_file or name

    def open_shard(self, name: str) -> PieceWriter:
        """A file of the part that is written piece by piece."""
        return self.storage.open_pieces(f"{self.path}/{name}", durable=self.durable)

    def commit(self) -> PartInfo:
        """Make the part visible; the writer cannot be used afterwards.

        Raises
        ------
        InvalidArgumentError
            No batch was appended.
        NoSpaceError, ReadOnlyError
            The place cannot take it; nothing becomes visible.
        PartGoneError
            `gc` removed its files as those of a killed writer, because nothing was written to it for too long.
        """
        if not self._digests or self._unfinished:
            what = "whose writing failed half-way" if self._unfinished else "without prompts"
            raise InvalidArgumentError(f"a part {what} cannot be committed: abort it, and start another")
        for key, buffer in self._variables.items():
            self._arrays[key] = buffer.finish()
            if buffer.files is not None:
                self._write_tables(key, buffer.files)
        self._write_columns()
        self._write_documents()
        digests = digests_of(self._digests)
        order = {} if self.order is None else {CALL_ORDER: self.order.record(digests)}
        info = PartInfo(
            group=self.group.name,
            name=self.name,
            kind=self.kind,
            digests=digests,
            n_tokens=np.concatenate(self._n_tokens) if self._n_tokens else self.removed_counts,
            layers=self._layers,
            arrays=dict(sorted(self._arrays.items())),
            files=dict(sorted(self._files.items())),
            recorded={"written": datetime.now(UTC).isoformat(timespec="milliseconds"), **self.recorded, **order},
            replaces=self.replaces,
            odd={key: buffer.odd for key, buffer in sorted(self._variables.items()) if any(buffer.odd)},
            removed=self.removed,
            tables=dict(sorted(self._tables.items())) if self.version > 1 else None,
        )
        document = part_document(info, self.group)
        check_table(parse_part(document, self.path).files)  # a part that could not be read must not become visible
        if not self.alone:
            # Another process may have emptied the group meanwhile, and a part cannot be used without the document of its group.
            write_group(self.storage, self.group, durable=self.durable)
        # `gc` removes all files of a part that was untouched for too long at once, so it is enough to check the oldest file.
        if not self.storage.is_file(f"{self.path}/{self._first_file}"):
            raise PartGoneError(
                f"part {self.path!r} of {self.storage.url} was removed while it was being written: collect garbage with a greater max_age\n"
                "than the longest pause of a writer, and write it again"
            )
        self.storage.commit(f"{self.path}/zarr.json", document, durable=self.durable, replace=False)
        self._ended = True
        if not self.alone:  # a published copy names its parts
            note_commit(self.storage, self.group.name, self.name)
        return info

    def abort(self) -> None:
        """Remove what was written, unless it is visible: an interruption may come between the commit and its return."""
        self._ended = True
        for buffer in self._variables.values():
            if buffer.files is not None:
                buffer.files.abort()
        if not self.storage.is_file(f"{self.path}/zarr.json"):
            self.storage.remove_tree(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._ended:
            return
        with suppress(OSError):  # files that stay are garbage, and the error that ended the context is the one to raise
            self.abort()

    def _write_documents(self) -> None:
        """Write the ``zarr.json`` of every array and of both levels."""
        arrays = dict(sorted(self._arrays.items()))
        documents: dict[str, Any] = {f"{key}/zarr.json": array.to_document() for key, array in arrays.items()}
        for level in LEVELS:
            of_level = {key.removeprefix(f"{level}/"): array for key, array in arrays.items() if key.startswith(f"{level}/")}
            if of_level:
                documents[f"{level}/zarr.json"] = level_document(of_level, level)
        for name, document in documents.items():
            data = json.dumps(document, allow_nan=False, separators=(",", ":")).encode()
            self.write_file(name, data)
            self._files[name] = file_entry(data, chunk=False)

    def _write_tables(self, key: str, written: ChunkFiles) -> None:
        """The tables of one variable, as files where they are too long for the part's document."""
        nbytes, chunks, blocks = written.tables()
        held: list[bytes | None] = []
        for name, data in ((CHUNK_TABLE, chunks), (BLOCK_TABLE, blocks)):
            is_file = len(data) > INLINE_BYTES
            held.append(None if is_file else data)
            if is_file:
                self.write_file(f"{key}/{name}", data)
                self._files[f"{key}/{name}"] = file_entry(data, chunk=False)
        block_nbytes = written.block_nbytes
        self._tables[key] = ArrayTables(nbytes=nbytes, chunks=held[0], block_nbytes=block_nbytes, blocks=held[1] if block_nbytes else None)

    def _write_columns(self) -> None:
        attributes: dict[str, dict[str, Any]] = {
            "n_tokens": {"sample_dimension": "token"},
            "prompt_row": {"instance_dimension": "prompt"},
            "position": {"whole_prompts": self._whole_prompts},  # if so, a reader knows the positions without reading them
        }
        columns: dict[str, Array] = {}
        for key, parts in self._columns.items():
            if isinstance(parts[0], Column):
                name = key.partition("/")[2]
                columns[key], described = encode_column(join_columns(name, parts))
                attributes[name] = {} if key in self.bare_texts and described == {COLUMN: {"kind": "text"}} else described
            else:
                columns[key] = np.concatenate(parts)
        columns["prompts/prompt"] = np.array([d[:HASH_DIGITS] for d in self._digests], object)
        columns["prompts/prompt_sha256"] = np.array(self._digests, object)
        if self._layers:
            for level in {key.split("/")[0] for key in self._variables}:
                columns[f"{level}/layer"] = np.array(self._layers, np.int64)
        if self.removed:
            # Once more beside the document: were that damaged, nobody else would know what is hidden.
            attributes["prompt_sha256"] = {"removed": removed_document(self.removed)}
            if self.removed_counts is not None:
                columns["prompts/n_tokens"] = self.removed_counts
        for key, values in columns.items():
            level, name = key.split("/")
            text = values.dtype == object
            rows = min(len(values), text_rows(key, values) if text else COLUMN_ROWS)
            shuffle = ("noshuffle" if text or values.dtype.itemsize == 1 else "shuffle") if self.compressed else None
            info = ArrayInfo(
                dims=("layer",) if name == "layer" else (SAMPLE_DIM["tokens" if level == "tokens" else "prompts"],),
                shape=(len(values),),
                chunks=(rows,),
                dtype="string" if text else values.dtype.name,
                shuffle=shuffle,
                attributes=encode_role_names(self._roles) if key == "tokens/role" and self._roles else attributes.get(name, {}),
            )
            for block in range(-(-len(values) // rows)):
                self.write_chunk(key, info, 0, block, values[block * rows : (block + 1) * rows])
            self._arrays[key] = info


def _whole_blocks(rows: int, row_nbytes: int) -> int:
    """At most as many rows, that fill whole blocks: a shorter last block costs one more for each read of it."""
    info = ArrayInfo(dims=("row", "byte"), shape=(rows, row_nbytes), chunks=(rows, row_nbytes), dtype="int8", shuffle=None)
    block_nbytes = block_nbytes_of(info) if row_nbytes else 0
    each = block_nbytes // row_nbytes if block_nbytes and block_nbytes % row_nbytes == 0 else 1
    return rows - rows % each if rows > each else rows


def shape_of(batch: TokenBatch) -> tuple[Hashable, ...]:
    """What all batches of one part must have in common: variables with their dtypes and rows, layers, and which columns there are."""
    variables = frozenset(
        (level, name, array.dtype.str, array.shape[0 if name in batch.unlayered else 1 :][1:], batch.stored_dtype.get(name))
        for level, values in (("prompts", batch.prompts), ("tokens", batch.tokens))
        for name, array in values.items()
    )
    optional = (batch.text is None, batch.prompt_length is None, batch.n_tokens is None, bool(batch.role_names))
    noted = json.dumps({site: dict(values) for site, values in batch.site_attributes.items()}, sort_keys=True)
    return batch.layers, variables, optional, frozenset(batch.token_columns), frozenset(batch.prompt_columns), noted
