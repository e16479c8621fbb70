"""Reads datasets that lmprobe shares: an index in Parquet, and safetensors files that each hold one layer of many prompts.

Layout (lmprobe 0.10.3, format 2.0): ``index/train-00000-of-00001.parquet`` has one row per prompt. The metadata of its schema, under names
that begin with ``lmprobe:``, says which model it is and what each kind of tensor file holds. A file such as
``tensors/hidden_layer003_shard000.safetensors`` has the rows of one layer. In a dataset of whole sequences the last token of a prompt lies
in another file than its other tokens; the index has the file and the row of every token.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np

from lmprobe_zarr.batch import POOLINGS, TokenBatch, is_hash, prompt_hash, prompt_sha256
from lmprobe_zarr.bridges.entry import Entry, Held, Skipped, batch_of, rows_of
from lmprobe_zarr.bridges.files import Files, Want, map_files
from lmprobe_zarr.bridges.lmprobe_folders import DTYPE, FIRST_TOKEN, FLOATS, INTEGERS, NOTHING, OTHER_TOKENS
from lmprobe_zarr.bridges.tensors import read_header
from lmprobe_zarr.errors import CorruptFileError, MissingDependencyError, NotAStoreError, UnsupportedVersionError
from lmprobe_zarr.safetensors_file import Tensor, itemsize_of, widen_bfloat16
from lmprobe_zarr.typing import Array, Ints

__all__ = ["LmprobeDataset"]

INDEX: Final = "index"
#: What a version of this package that reads a dataset must know of its format.
KNOWN_MAJOR: Final = 2
INDEX_BYTES: Final = 2**34
#: Columns of the index that say where values lie, or are values of a kind of their own.
_OWN_COLUMNS: Final = frozenset({
    "text", "num_tokens", "shard_index", "row_offset", "token_offset", "shard_index_logits", "row_offset_logits", "token_shard_ids",
    "token_shard_offsets", "token_ids", "token_perplexity", "token_strings", "perplexity_mean", "perplexity_min", "perplexity_max",
})  # fmt: skip
MISSING_FILES: Final = "prompts whose tensors lie in files that are missing, damaged or too short"
NO_PLACE: Final = "tensors of which the index does not say where a prompt's rows are"
MISSING_LAYERS: Final = "layers or kinds of tensors that the index lists, and of which no file can be read"


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """One array per shard, and the shard and row of each value.

    Parameters
    ----------
    tensors : mapping of (int or None, int) to (str, Tensor)
        By layer (None without layers) and shard: the file, and the tensor in it.
    shards, rows : ndarray of int64
        Of each row of the index; or of each token, prompt by prompt.
    """

    tensors: Mapping[tuple[int | None, int], tuple[str, Tensor]]
    shards: Ints
    rows: Ints


class LmprobeDataset:
    """A dataset that lmprobe's ``push_dataset`` wrote, as a source of an import.

    Parameters
    ----------
    files : Files
        The folder or repository.
    prompts : iterable of str, optional
        Only these, by text or by hash.

    Attributes
    ----------
    model : str
        The model's name.
    revision : str or None
        Its commit on the hub, if the dataset says it.

    Raises
    ------
    NotAStoreError
        There is no index, or it has none of lmprobe's metadata.
    UnsupportedVersionError
        The dataset is of a later format.
    MissingDependencyError
        pyarrow is not installed.
    """

    def __init__(self, files: Files, prompts: Iterable[str] | None = None) -> None:
        self.files = files
        self._wanted = None if prompts is None else {each if is_hash(each) else prompt_hash(each) for each in prompts}
        self._table, info = _read_index(files)
        model = info.get("model")
        name = model.get("name") if isinstance(model, dict) else None
        if not isinstance(name, str):
            raise NotAStoreError(f"the index of {files.url} does not say which model its activations are of")
        self.model: str = name
        revision = model.get("revision") if isinstance(model, dict) else None
        self.revision = revision if isinstance(revision, str) else None
        self._texts: list[str | None] = self._table.column("text").to_pylist()
        counts = self._column("num_tokens")
        self._counts = np.full(len(self._texts), -1, np.int64) if counts is None else counts
        self._offsets = np.concatenate([[0], np.cumsum(np.maximum(self._counts, 0))]).astype(np.int64)
        tensors = info.get("tensors")
        self._kinds: dict[str, Any] = tensors if isinstance(tensors, dict) else {}
        self._found: dict[Held, _Rows] = {}
        self._notes: list[str] = []
        self._lists_of_tokens: dict[str, tuple[Ints, Ints]] = {}
        self._statistics: list[Array | None] = []

    @property
    def url(self) -> str:
        """The folder of the files."""
        return self.files.url

    # ------------------------------------------------------------------------------------------------------------- the index

    def _column(self, name: str) -> Ints | None:
        """A column of whole numbers; −1 where one is missing, None where there is no such column."""
        if name not in self._table.column_names:
            return None
        return np.array([-1 if value is None else value for value in self._table.column(name).to_pylist()], np.int64)

    def _lists(self, name: str) -> tuple[Ints, Ints] | None:
        """A column of lists: its values end to end, and the length of each list."""
        if name not in self._table.column_names:
            return None
        column = self._table.column(name).combine_chunks()
        lengths = np.array([0 if value is None else value for value in column.value_lengths().to_pylist()], np.int64)
        return np.asarray(column.flatten().to_numpy(zero_copy_only=False)), lengths

    def columns(self) -> dict[str, dict[str, Any]]:
        """The labels and other values of the prompts: by column, the value of each prompt by its hash; without lists."""
        found: dict[str, dict[str, Any]] = {}
        for name in self._table.column_names:
            if name in _OWN_COLUMNS:
                continue
            values = self._table.column(name).to_pylist()
            if not any(isinstance(value, list | dict | bytes) for value in values) and any(value is not None for value in values):
                named = zip(self._texts, values, strict=True)
                found[name] = {prompt_hash(text): value for text, value in reversed([*named]) if text is not None}
        return found

    # ----------------------------------------------------------------------------------------------------------- the tensors

    def _describe(self) -> None:
        """Find out what there is, from the headers of all files."""
        self._found, self._notes = {}, []
        self._lists_of_tokens = {name: lists for name in ("token_ids", "token_perplexity") if (lists := self._lists(name)) is not None}
        self._statistics = [self._floats(f"perplexity_{name}") for name in ("mean", "min", "max")]
        hidden = self._kinds.get("hidden_layers")
        if isinstance(hidden, dict):
            self._hidden(hidden)
        logits = self._kinds.get("logits_topk")
        if isinstance(logits, dict):
            shard, row = self._column("shard_index_logits"), self._column("row_offset_logits")
            place = (self._column("shard_index"), self._column("row_offset")) if shard is None or row is None else (shard, row)
            for name, key, allowed in (("values", "logits_topk.values", FLOATS), ("indices", "logits_topk.indices", INTEGERS)):
                found = self._tensors(logits, {None: key}, allowed)
                self._add("prompts", f"logits_last_token_top_k_{name}", found, *place)
        router = self._kinds.get("router_logits")
        if isinstance(router, dict):
            # The index does not say where they lie: in its order, as many in each file as the file holds.
            found = self._tensors(router, {layer: f"router.layer_{layer}" for layer in _layers(router)}, FLOATS)
            sizes = [int(each.get("num_prompts", 0)) for each in router.get("shards", ())]
            shard = np.repeat(np.arange(len(sizes)), sizes)
            row = np.arange(len(shard)) - np.repeat(np.concatenate([[0], np.cumsum(sizes)])[:-1].astype(np.int64), sizes)
            fits = len(shard) == len(self._texts)
            self._add("prompts", "router_logits_last_token", found, shard if fits else None, row if fits else None)

    def _hidden(self, kind: Mapping[str, Any]) -> None:
        found = self._tensors(kind, {layer: f"hidden.layer_{layer}" for layer in _layers(kind)}, FLOATS)
        if kind.get("storage", "pooled") == "full_sequence":
            shards, rows = self._lists("token_shard_ids"), self._lists("token_shard_offsets")
            if shards is not None and rows is not None:
                lengths = np.maximum(self._counts, 0)
                if not (np.array_equal(shards[1], lengths) and np.array_equal(rows[1], lengths)):
                    raise CorruptFileError(f"the index of {self.url} gives the places of another number of tokens than num_tokens says")
                self._add("tokens", "resid", found, shards[0].astype(np.int64), rows[0].astype(np.int64))
                return
            shard, first = self._column("shard_index"), self._column("token_offset")
            if shard is None or first is None:
                raise CorruptFileError(f"the index of {self.url} does not say where the tokens of a prompt lie")
            lengths = np.maximum(self._counts, 0)
            inside = np.arange(self._offsets[-1]) - np.repeat(self._offsets[:-1], lengths)
            self._add("tokens", "resid", found, np.repeat(shard, lengths), np.repeat(first, lengths) + inside)
            return
        pooling = str(kind.get("pooling", "last_token")).removeprefix("activation:")
        if pooling == "first_token":
            self._notes.append(FIRST_TOKEN)
        elif pooling not in POOLINGS:
            self._notes.append(f"activations of a pooling that is unknown here ({pooling!r:.40})")
        else:
            self._add("prompts", f"resid_{pooling}", found, self._column("shard_index"), self._column("row_offset"))

    def _tensors(
        self, kind: Mapping[str, Any], keys: Mapping[int | None, str], allowed: frozenset[str]
    ) -> dict[tuple[int | None, int], tuple[str, Tensor]]:
        """The tensors of every layer and shard whose files can be read."""
        shards = kind.get("shards")
        pattern = str(kind.get("file_pattern", "tensors/hidden_layer{layer:03d}_shard{shard:03d}.safetensors"))
        jobs = []
        for number, shard in enumerate(shards if isinstance(shards, list) else ()):
            for layer, key in keys.items():
                file = shard.get("file") if isinstance(shard, dict) else None
                jobs.append((layer, number, file if isinstance(file, str) else _file_name(pattern, layer, number), key))
        found = {}
        for (layer, number, file, key), header in zip(jobs, map_files(self._header, jobs, local=self.files.is_local), strict=True):
            tensor = None if header is None else header.tensors.get(key)
            if tensor is None or len(tensor.shape) != 2 or not tensor.shape[1]:
                continue
            if tensor.dtype in allowed:
                found[layer, number] = file, tensor
            elif DTYPE not in self._notes:
                self._notes.append(DTYPE)
        if {layer for layer, _ in found} != set(keys) and not {DTYPE, MISSING_LAYERS} & {*self._notes}:
            self._notes.append(MISSING_LAYERS)
        return found

    def _header(self, job: tuple[int | None, int, str, str]) -> Any:
        if {"..", ""} & {*job[2].split("/")}:
            return None  # a dataset names no file outside of it
        try:
            return read_header(self.files, job[2])[0]
        except (CorruptFileError, FileNotFoundError):
            return None  # its prompts are skipped and counted

    def _add(
        self, level: Any, variable: str, found: Mapping[tuple[int | None, int], tuple[str, Tensor]], shards: Ints | None, rows: Ints | None
    ) -> None:
        if found and (shards is None or rows is None):
            self._notes.append(NO_PLACE)
        if not found or shards is None or rows is None:
            return
        alike: dict[tuple[str, tuple[int, ...]], set[int | None]] = {}
        for (layer, _), (_, tensor) in found.items():
            alike.setdefault((tensor.dtype, tensor.shape[1:]), set()).add(layer)
        for (dtype, shape), layers in alike.items():
            numbered = tuple(sorted(layer for layer in layers if layer is not None))
            held = Held(level=level, variable=variable, layers=numbered or None, dtype=dtype, row_shape=shape)
            kept = {key: each for key, each in found.items() if (each[1].dtype, each[1].shape[1:]) == (dtype, shape)}
            self._found[held] = _Rows(kept, shards, rows)

    def _has(self, held: Held, place: slice) -> bool:
        """Whether all rows of a prompt are in files that are there."""
        found = self._found[held]
        shards, rows = found.shards[place], found.rows[place]
        if not len(shards) or (rows < 0).any():
            return False
        for shard in np.unique(shards).tolist():
            last = int(rows[shards == shard].max())
            for layer in held.layers or (None,):
                there = found.tensors.get((layer, shard))
                if there is None or there[1].shape[0] <= last:
                    return False
        return True

    # ------------------------------------------------------------------------------------------------------------ the source

    def _place(self, held: Held, number: int) -> slice:
        if held.level == "prompts":
            return slice(number, number + 1)
        return slice(int(self._offsets[number]), int(self._offsets[number + 1]))

    def entries(self) -> Iterator[Entry | Skipped]:
        """One entry for each prompt of the index."""
        self._describe()
        every = _cells(self._found)
        for number, text in enumerate(self._texts):
            name = f"row {number} of the index"
            if text is None:
                yield Skipped(name=name, reason="prompts without a text")
                continue
            if self._wanted is not None and prompt_hash(text) not in self._wanted:
                continue
            count = int(self._counts[number])
            holds = [held for held in self._found if self._has(held, self._place(held, number))]
            if _cells(holds) != every:
                yield Skipped(name=name, reason=MISSING_FILES)
                continue
            notes = [*self._notes]
            if all(each is not None and np.isfinite(each[number]) for each in self._statistics):
                holds.append(Held(level="prompts", variable="perplexity", layers=None, dtype="float32", row_shape=(3,)))
            for column, shift, variable, dtype in (
                ("token_ids", 0, "token_id", "int64"),
                ("token_perplexity", 1, "token_perplexity", "float32"),
            ):
                lists = self._lists_of_tokens.get(column)
                length = 0 if lists is None else int(lists[1][number])
                if length and count > 0 and length == count - shift:
                    holds.append(Held(level="tokens", variable=variable, layers=None, dtype=dtype, row_shape=()))
                elif length:
                    notes.append(OTHER_TOKENS)
            if not holds:
                yield Skipped(name=name, reason=NOTHING)
                continue
            yield Entry(
                name=f"{prompt_hash(text)} ({text[:24]!r})",
                sha256=prompt_sha256(text),
                text=text,
                n_tokens=count if count > 0 else None,
                holds=tuple(holds),
                notes=tuple(dict.fromkeys(notes)),
                place=number,
            )

    def _floats(self, name: str) -> Array | None:
        if name not in self._table.column_names:
            return None
        return np.array([np.nan if value is None else value for value in self._table.column(name).to_pylist()])

    def read(self, entries: Sequence[Entry], holds: Sequence[Held]) -> TokenBatch:
        """Some of what some entries hold, as one batch; see `entry.Source`."""
        bounds = rows_of(entries)
        arrays = {held: held.empty(int(bounds[held.level][-1])) for held in holds}
        for held, array in arrays.items():
            if held.variable in ("token_id", "token_perplexity"):
                self._fill_lists(held, entries, bounds[held.level], array[0])
            elif held.variable == "perplexity":
                numbers = [entry.place for entry in entries]
                array[0] = np.stack([each[numbers] for each in self._statistics if each is not None], axis=1)
            else:
                self._fill(held, entries, array)
        return batch_of(entries, arrays)

    def _fill_lists(self, held: Held, entries: Sequence[Entry], bounds: Ints, out: Array) -> None:
        lists = self._lists_of_tokens["token_ids" if held.variable == "token_id" else held.variable]
        starts = np.concatenate([[0], np.cumsum(lists[1])]).astype(np.int64)
        for entry, a, b in zip(entries, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            values = lists[0][starts[entry.place] : starts[entry.place + 1]]
            if held.variable == "token_perplexity":
                out[a] = np.nan  # lmprobe has none for the first token
            out[b - len(values) : b] = values

    def _fill(self, held: Held, entries: Sequence[Entry], out: Array) -> None:
        """Read the rows of entries; neighbouring rows of a file are read at once."""
        found = next(rows for each, rows in self._found.items() if _is_part_of(held, each))
        places = [self._place(held, entry.place) for entry in entries]
        shards, rows = (np.concatenate([values[place] for place in places]) for values in (found.shards, found.rows))
        jobs = [(j, layer, shard) for j, layer in enumerate(held.layers or (None,)) for shard in np.unique(shards).tolist()]
        fill = partial(self._fill_from, found, shards, rows, held, out)
        for _ in map_files(fill, jobs, local=self.files.is_local):
            pass

    def _fill_from(self, found: _Rows, shards: Ints, rows: Ints, held: Held, out: Array, job: tuple[int, int | None, int]) -> None:
        j, layer, shard = job
        file, tensor = found.tensors[layer, shard]
        mine = np.flatnonzero(shards == shard)
        mine = mine[np.argsort(rows[mine], kind="stable")]
        wanted = rows[mine]
        stored = np.dtype("uint16" if tensor.dtype == "bfloat16" else tensor.dtype)
        buffer = np.empty((len(mine), *held.row_shape), stored)
        row_nbytes = int(np.prod(held.row_shape, dtype=np.int64)) * (itemsize_of(tensor.dtype) or 0)
        cuts = np.flatnonzero(np.diff(wanted) != 1) + 1
        wants = [
            Want(tensor.start + int(wanted[a]) * row_nbytes, buffer[a:b].reshape(-1).view(np.uint8).data)
            for a, b in zip([0, *cuts.tolist()], [*cuts.tolist(), len(wanted)], strict=True)
        ]
        try:
            self.files.fill(file, wants)
        except FileNotFoundError as error:
            raise CorruptFileError(f"{self.url}/{file} was removed after its header was read") from error
        out[j, mine] = widen_bfloat16(buffer) if tensor.dtype == "bfloat16" else buffer


def _cells(holds: Iterable[Held]) -> set[tuple[str, int | None]]:
    """The variables and layers that are held, whatever their dtype."""
    return {(held.variable, layer) for held in holds for layer in held.layers or (None,)}


def _is_part_of(held: Held, whole: Held) -> bool:
    """Whether something to read is some layers of what was described."""
    same = (held.level, held.variable, held.dtype, held.row_shape) == (whole.level, whole.variable, whole.dtype, whole.row_shape)
    return same and set(held.layers or ()) <= set(whole.layers or ())


def _layers(kind: Mapping[str, Any]) -> list[int]:
    layers = kind.get("layers")
    return [int(layer) for layer in layers if isinstance(layer, int)] if isinstance(layers, list) else []


def _file_name(pattern: str, layer: int | None, shard: int) -> str:
    """The file of a layer and shard. Only the two numbers are put in, so that a pattern of others reads nothing else."""
    for text, value in (("{layer:03d}", "" if layer is None else f"{layer:03d}"), ("{shard:03d}", f"{shard:03d}")):
        pattern = pattern.replace(text, value)
    return pattern


def _read_index(files: Files) -> tuple[Any, dict[str, Any]]:
    """The index as a table of pyarrow, and what its schema says of the dataset."""
    names = [each.name for each in files.list(INDEX) if not each.is_folder and each.name.endswith(".parquet")]
    if not names:
        raise NotAStoreError(
            f"{files.url} is no dataset of lmprobe's: it has no index/*.parquet; for lmprobe's cache use import_safetensors"
        )
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingDependencyError("lmprobe's datasets have an index in Parquet: pip install lmprobe-zarr[parquet]") from error
    try:
        tables = [parquet.read_table(pyarrow.BufferReader(files.read(f"{INDEX}/{name}", at_most=INDEX_BYTES))) for name in sorted(names)]
        table = pyarrow.concat_tables(tables)
    except pyarrow.ArrowException as error:
        raise CorruptFileError(f"{files.url}/{INDEX} cannot be read as Parquet: {str(error).splitlines()[0]}") from error
    info: dict[str, Any] = {}
    for key, value in (tables[0].schema.metadata or {}).items():
        if key.startswith(b"lmprobe:"):
            try:
                info[key[8:].decode()] = json.loads(value)
            except ValueError as error:
                raise CorruptFileError(f"the index of {files.url} has metadata {key.decode(errors='replace')!r} that is no JSON") from error
    if not info:
        try:
            info = json.loads(files.read("lmprobe_info.json", at_most=2**24))
        except (FileNotFoundError, ValueError) as error:
            raise NotAStoreError(f"the index of {files.url} has none of the metadata that lmprobe writes") from error
    if not isinstance(info, dict) or "text" not in table.column_names:
        raise NotAStoreError(f"the index of {files.url} has no column of texts, or its metadata is no mapping")
    version = str(info.get("format_version", "1.0"))
    major = version.split(".", maxsplit=1)[0]
    if not major.isdigit() or int(major) > KNOWN_MAJOR:
        raise UnsupportedVersionError(
            f"{files.url} is of format {version} of lmprobe's datasets, and this version reads up to {KNOWN_MAJOR}"
        )
    return table, info
