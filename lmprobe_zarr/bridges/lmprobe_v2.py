"""Reads lmprobe's safetensors cache, format v2 (lmprobe 0.5.10 to 0.10.3). Entries are described from headers and read by ranges.

A model's folder and a prompt's files are named after hashes, so a prompt is found without a listing. The rows of a tensor include the
padding of the batch in which they were computed, on either side; the attention mask says which rows to leave out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lmprobe_zarr.batch import POOLINGS, TokenBatch, digest_of_hash, prompt_hash, prompt_sha256
from lmprobe_zarr.bridges.entry import Entry, Held, Piece, Skipped, batch_of, rows_of
from lmprobe_zarr.bridges.files import Files, Want, map_files
from lmprobe_zarr.bridges.lmprobe_folders import (
    DAMAGED,
    DTYPE,
    ENTRY_FILE,
    FIRST_TOKEN,
    FLOATS,
    INTEGERS,
    MODEL_FOLDER,
    NO_MASK,
    NO_TOKENS,
    NOTHING,
    OTHER_TOKENS,
    OUTSIDE,
    SHAPES,
    SUFFIXES,
    UNKNOWN,
    model_hash,
    read_manifest,
)
from lmprobe_zarr.bridges.tensors import read_header
from lmprobe_zarr.errors import CorruptFileError
from lmprobe_zarr.safetensors_file import Header, Tensor, itemsize_of, widen_bfloat16
from lmprobe_zarr.store.format import Level
from lmprobe_zarr.typing import Array

__all__ = [
    "OF_EVERY",
    "OF_LAST",
    "UNPADDED",
    "LmprobeV2",
]

LAYERED_TENSOR: Final = re.compile(r"(?:pooled_(?:activation:)?(\w+)_|(router_)|)layer_(\d{1,9})")
# More prompts than this in a remote folder are looked up in a listing, which returns a thousand names per request.
LISTED_LOOKUPS: Final = 100
REMEMBERED_HEADERS: Final = 4096
OF_EVERY: Final = "every token"
OF_LAST: Final = "last token"
# Metadata that this package writes into a file without padding. lmprobe drops it when it changes the file.
UNPADDED: Final[Mapping[str, str]] = {"padding": "none", "writer": "lmprobe-zarr"}


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    """Where an entry is stored: the headers of its three files, and which rows of padded tensors are tokens.

    Parameters
    ----------
    key : str
        The files' common key, without suffix.
    headers : tuple of (Header or None), or None
        None if they were not kept.
    seq : int
        Rows of a padded tensor.
    first : int
        The first of them that is a token.
    rows : ndarray of int64, optional
        The rows that are tokens, if they are not contiguous.
    """

    key: str
    headers: tuple[Header | None, ...] | None
    seq: int
    first: int
    rows: npt.NDArray[np.int64] | None


@dataclass(frozen=True, slots=True)
class _Slab:
    """The rows of one variable and layer in a file.

    `file` is the number of its suffix in `SUFFIXES`; `rows` are the rows that are tokens, if they are not contiguous.
    """

    file: int
    dtype: str
    start: int
    row_nbytes: int
    rows: npt.NDArray[np.int64] | None


class LmprobeV2:
    """The entries of one model in a cache of format v2. Nothing is read when it is made.

    Parameters
    ----------
    files : Files
        The cache.
    model : str
        Name of the model.
    prompts : iterable of str, optional
        Only these: texts, or hashes if no prompt has that text. None for everything in the folder.
    """

    def __init__(self, files: Files, model: str, *, prompts: Iterable[str] | None = None) -> None:
        self.files, self.model, self.folder = files, model, model_hash(model)
        self.is_local = files.is_local
        self.prompts = None if prompts is None else list(dict.fromkeys(prompts))
        self._headers: dict[bytes, Header] = {}
        self._holds: dict[tuple[Held, ...], tuple[Held, ...]] = {}
        self._described: dict[tuple[Any, ...], tuple[tuple[Held, ...], list[str], int | None]] = {}

    @property
    def url(self) -> str:
        """The folder of the model's files."""
        return f"{self.files.url}/{self.folder}"

    # -------------------------------------------------------------------------------------------------------- finding

    def entries(self) -> Iterator[Entry | Skipped]:
        """All entries in the folder, or those of the wanted prompts, described from headers."""
        if self.prompts is not None:
            for prompt, found in zip(self.prompts, self.find(self.prompts), strict=True):
                if found is None:
                    yield Skipped(name=_label(prompt), reason="prompts that are not in this cache")
                else:
                    yield from found
            return
        if self.files.leads_out(self.folder):
            yield Skipped(name=self.folder, reason=OUTSIDE)
            return
        manifest = read_manifest(self.files, self.folder)
        if manifest.bad_lines:
            yield Skipped(name="_manifest.jsonl", reason="lines of the manifest that cannot be read", detail=f"{manifest.bad_lines} lines")
        groups: dict[str, dict[str, int | None]] = {}
        for listed in self.files.list(self.folder):
            match = ENTRY_FILE.fullmatch(listed.name)
            if listed.outside:
                yield Skipped(name=listed.name, reason=OUTSIDE)
            elif match and not listed.is_folder:
                groups.setdefault(match[1], {})[match[2]] = listed.size
            elif match or listed.name.endswith(".safetensors"):
                yield Skipped(name=listed.name, reason="files whose names are not lmprobe's")
        # Prompts in the order in which lmprobe first recorded them, which is that of its calls; then the others.
        order = {name: i for i, name in enumerate(manifest.texts)}
        names = sorted(groups, key=lambda name: (order.get(name, len(order)), name))
        work = ((name, manifest.texts.get(name), groups[name]) for name in names)
        for found in map_files(lambda item: self._describe(*item), work, local=self.files.is_local):
            yield from found

    def find(self, prompts: Sequence[str]) -> list[list[Entry | Skipped] | None]:
        """The entries of some prompts, in their order; None for a prompt without any.

        With an entry comes what had to be skipped of it, such as a damaged file beside a good one.
        """
        listed: dict[str, int | None] | None = None
        if not self.files.is_local and len(prompts) > LISTED_LOOKUPS:
            listed = {entry.name: entry.size for entry in self.files.list(self.folder)}
        hashes = any(MODEL_FOLDER.fullmatch(prompt) for prompt in prompts)
        texts = read_manifest(self.files, self.folder).texts if hashes else {}
        return list(map_files(partial(self._find, listed, texts), prompts, local=self.files.is_local))

    def _find(self, listed: Mapping[str, int | None] | None, texts: Mapping[str, str], prompt: str) -> list[Entry | Skipped] | None:
        if self.files.leads_out(self.folder):
            return [Skipped(name=self.folder, reason=OUTSIDE)]
        candidates: list[tuple[str, str | None]] = [(prompt_hash(prompt), prompt)]
        if MODEL_FOLDER.fullmatch(prompt):
            candidates.append((prompt, texts.get(prompt)))
        for name, text in candidates:
            sizes: dict[str, int | None] = dict.fromkeys(SUFFIXES)
            if listed is not None:
                sizes = {s: listed[f"{name}{s}.safetensors"] for s in SUFFIXES if f"{name}{s}.safetensors" in listed}
            found = self._describe(name, text, sizes)
            if found:
                return found
        return None

    def sizes(self) -> dict[str, int]:
        """Bytes of all files of every prompt, by the prompt's hash, from one listing."""
        total: dict[str, int] = {}
        for listed in self.files.list(self.folder):
            match = ENTRY_FILE.fullmatch(listed.name)
            if match and not listed.outside and not listed.is_folder:
                size = listed.size
                if size is None:
                    try:
                        size = self.files.head(f"{self.folder}/{listed.name}")[1]
                    except (FileNotFoundError, CorruptFileError):
                        continue
                total[match[1]] = total.get(match[1], 0) + (size or 0)
        return total

    # ----------------------------------------------------------------------------------------------------- describing

    def _describe(self, name: str, text: str | None, sizes: Mapping[str, int | None]) -> list[Entry | Skipped]:
        """The entry of a hash, and what had to be skipped of it; empty if there are no files."""
        key = f"{self.folder}/{name}"
        found: list[Entry | Skipped] = []
        headers: list[Header | None] = [None, None, None]
        head = b""
        for i, suffix in enumerate(SUFFIXES):
            if suffix not in sizes:
                continue
            file = f"{key}{suffix}.safetensors"
            try:
                headers[i], read = read_header(self.files, file, size=sizes[suffix])
                head = read if i == 0 else head
            except (FileNotFoundError, NotADirectoryError):
                continue
            except (CorruptFileError, PermissionError) as error:
                reason = OUTSIDE if "leads out" in str(error) else DAMAGED
                found.append(Skipped(name=f"{name}{suffix}.safetensors", reason=reason, detail=str(error)))
        if any(headers):
            headers = [None if h is None else self._remember(h) for h in headers]
            try:
                found.insert(0, self._entry(key, name, text, headers, head))
            except CorruptFileError as error:
                found.append(Skipped(name=name, reason=DAMAGED, detail=str(error)))
            except _UnfitError as error:
                found.append(Skipped(name=name, reason=error.reason, detail=error.detail))
        return found

    def _remember(self, header: Header) -> Header:
        """An equal header that is kept already, to save memory: prompts of equal length have equal headers."""
        known = self._headers.get(header.raw)
        if known is None and len(self._headers) < REMEMBERED_HEADERS:
            self._headers[header.raw] = known = header
        return known or header

    def _entry(self, key: str, name: str, text: str | None, headers: list[Header | None], head: bytes) -> Entry | Skipped:
        mask = self._mask(key, headers[0], head)
        holds, notes, n_tokens = self._describe_holds(headers, mask)
        if not holds:
            return Skipped(name=name, reason=NOTHING, detail="; ".join(notes))
        rows = np.zeros(0, np.int64) if mask is None else np.flatnonzero(mask)
        together = not len(rows) or int(rows[-1] - rows[0]) == len(rows) - 1
        kept = tuple(headers) if all(h is None or h.raw in self._headers for h in headers) else None
        return Entry(
            name=name,
            sha256=prompt_sha256(text) if text is not None else digest_of_hash(name),
            text=text,
            n_tokens=n_tokens,
            holds=self._holds.setdefault(holds, holds),
            notes=tuple(notes),
            place=_Place(key, kept, 0 if mask is None else len(mask), int(rows[0]) if len(rows) else 0, None if together else rows),
        )

    def _describe_holds(self, headers: list[Header | None], mask: Array | None) -> tuple[tuple[Held, ...], list[str], int | None]:
        """What an entry with these headers and this mask holds. Remembered, because entries of equal length are alike."""
        alike = (*(None if h is None else h.raw for h in headers), None if mask is None else int(mask.sum()))
        found = self._described.get(alike)
        if found is None:
            described = _Described(headers, mask)
            found = described.holds(), described.notes, described.n_tokens
            if len(self._described) < REMEMBERED_HEADERS:
                self._described[alike] = found
        return found

    def _mask(self, key: str, header: Header | None, head: bytes) -> Array | None:
        """The attention mask as booleans, shape (seq,); None if there is none."""
        tensor = header.tensors.get("attention_mask") if header is not None else None
        if tensor is None:
            return None
        if len(tensor.shape) != 2 or tensor.shape[0] != 1 or itemsize_of(tensor.dtype) is None or tensor.dtype == "bfloat16":
            raise _UnfitError(SHAPES, f"attention_mask is {tensor.dtype} {tensor.shape}")
        data = head[tensor.start : tensor.stop]
        if len(data) < tensor.stop - tensor.start:
            rest = bytearray(tensor.stop - tensor.start)
            self.files.fill(f"{key}.safetensors", [Want(tensor.start, memoryview(rest))])
            data = bytes(rest)
        mask: Array = np.frombuffer(data, tensor.dtype) != 0
        if not mask.any():
            raise _UnfitError(NO_TOKENS, "")
        return mask

    # -------------------------------------------------------------------------------------------------------- reading

    def read(self, entries: Sequence[Entry], holds: Sequence[Held]) -> TokenBatch:
        """Read some variables and layers of some entries, as one batch; see `entry.Source`."""
        offsets = rows_of(entries)
        arrays = {held: held.empty(int(offsets[held.level][-1])) for held in holds}
        work = []
        for i, entry in enumerate(entries):
            pieces = [
                Piece(entry, held, layer, 0, len(array[0, a:b]), array[j, a:b])
                for held, array in arrays.items()
                for j, layer in enumerate((None,) if held.layers is None else held.layers)
                for a, b in [(int(offsets[held.level][i]), int(offsets[held.level][i + 1]))]
            ]
            work.append((entry, pieces))
        for _ in map_files(lambda item: self.read_pieces(*item), work, local=self.files.is_local):
            pass
        return batch_of(entries, arrays)

    def read_pieces(self, entry: Entry, pieces: Sequence[Piece]) -> None:
        """Read rows of one entry into arrays. Each file is opened once, and only the bytes of these rows are fetched.

        Raises
        ------
        CorruptFileError
            A file was removed, is damaged, or has changed since the entry was described.
        """
        place: _Place = entry.place
        headers = place.headers or self._headers_again(place)
        wants: dict[int, list[Want]] = {}
        converted: list[tuple[Piece, _Slab, Array]] = []
        for piece in pieces:
            slab = _slab(entry, headers, piece.held, piece.layer)
            out, skip = piece.out, 0
            if piece.held.variable == "token_perplexity" and piece.start == 0 and piece.stop > 0:
                out[0], skip = np.nan, 1  # lmprobe has none for the first token
            shift = 1 if piece.held.variable == "token_perplexity" else 0
            start, stop = piece.start + skip - shift, piece.stop - shift
            target = out[skip:]
            if stop <= start:
                continue
            if slab.rows is not None:
                low, high = int(slab.rows[start]), int(slab.rows[stop - 1]) + 1
                buffer = np.empty((high - low, *piece.held.row_shape), "uint16" if slab.dtype == "bfloat16" else slab.dtype)
                converted.append((piece, slab, buffer))
                begin = slab.start + low * slab.row_nbytes
            elif slab.dtype == "bfloat16" or target.dtype != np.dtype(slab.dtype):
                buffer = np.empty(target.shape, "uint16" if slab.dtype == "bfloat16" else slab.dtype)
                converted.append((piece, slab, buffer))
                begin = slab.start + start * slab.row_nbytes
            else:
                buffer, begin = target, slab.start + start * slab.row_nbytes
            wants.setdefault(slab.file, []).append(Want(begin, buffer.reshape(-1).view(np.uint8).data))
        for file, wanted in wants.items():
            header = headers[file]
            assert header is not None  # noqa: S101 — the slab was found in this header
            self._fill(f"{place.key}{SUFFIXES[file]}.safetensors", header, wanted)
        for piece, slab, buffer in converted:
            values = widen_bfloat16(buffer) if slab.dtype == "bfloat16" else buffer
            if slab.rows is not None:
                taken = slab.rows[piece.start : piece.stop]
                values = values[taken - taken[0]]
            piece.out[len(piece.out) - len(values) :] = values

    def _headers_again(self, place: _Place) -> tuple[Header | None, ...]:
        """Read headers again that were not kept because there were too many different ones."""
        headers: list[Header | None] = []
        for suffix in SUFFIXES:
            try:
                headers.append(read_header(self.files, f"{place.key}{suffix}.safetensors")[0])
            except FileNotFoundError:
                headers.append(None)
        return tuple(headers)

    def _fill(self, key: str, header: Header, wants: list[Want]) -> None:
        head = bytearray(len(header.raw))
        try:
            self.files.fill(key, [Want(0, memoryview(head)), *wants])
        except FileNotFoundError as error:
            raise CorruptFileError(f"{self.files.url}/{key} was removed after its header was read") from error
        if head != header.raw:
            raise CorruptFileError(f"{self.files.url}/{key} has changed since its header was read: list the entries again")


class _UnfitError(Exception):
    """An entry that cannot be imported, with the reason under which it is counted."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


class _Described:
    """What an entry holds, by the headers of its files."""

    def __init__(self, headers: Sequence[Header | None], mask: Array | None) -> None:
        self.headers, self.mask = headers, mask
        self.notes: list[str] = []
        self.n_tokens: int | None = None if mask is None else int(mask.sum())
        self._found: dict[tuple[Level, str, bool, str, tuple[int, ...]], list[int]] = {}
        self._widths: dict[str, int] = {}

    def holds(self) -> tuple[Held, ...]:
        self._perplexity()
        main = self.headers[0]
        if main is not None:
            self._layered(main)
        self._logits()
        return tuple(
            Held(level=level, variable=variable, layers=tuple(sorted(layers)) if layered else None, dtype=dtype, row_shape=row)
            for (level, variable, layered, dtype, row), layers in sorted(self._found.items())
        )

    def _add(
        self, level: Level, variable: str, dtype: str, row: tuple[int, ...], layer: int | None, allowed: frozenset[str] = FLOATS
    ) -> None:
        if dtype not in allowed:
            self._note(DTYPE)
            return
        layers = self._found.setdefault((level, variable, layer is not None, dtype, row), [])
        if layer is not None:
            layers.append(layer)

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def _check_width(self, kind: str, width: int, name: str) -> None:
        """Raise unless the rows have the width of all other tensors of their kind."""
        usual = self._widths.setdefault(kind, width)
        if width < 1 or usual != width:
            raise _UnfitError(SHAPES, f"{name} has rows of {width} values" + (f", others have {usual}" if usual != width else ""))

    def _layered(self, main: Header) -> None:
        raw: dict[int, Tensor] = {}
        first: dict[int, Tensor] = {}
        seen: set[tuple[str, int]] = set()
        known = {"attention_mask", "perplexity", "token_perplexity", "token_ids", "logits", "logits_top_k_values", "logits_top_k_indices"}
        for name, tensor in main.tensors.items():
            match = LAYERED_TENSOR.fullmatch(name)
            if match is None or (match[1] is not None and match[1] not in POOLINGS):
                if name not in known:
                    self._note(UNKNOWN)
                continue
            layer, kind = int(match[3]), match[1] or match[2] or "raw"
            if (kind, layer) in seen:  # layer_07 beside layer_7, or activation:mean beside mean
                self._note(UNKNOWN)
                continue
            seen.add((kind, layer))
            if kind == "router_":
                self._router(name, layer, tensor)
            elif kind == "raw":
                raw[layer] = tensor
                self._raw(name, layer, tensor)
            else:
                if len(tensor.shape) != 2 or tensor.shape[0] != 1:
                    raise _UnfitError(SHAPES, f"{name} has shape {tensor.shape}, not (1, hidden)")
                self._check_width("hidden", tensor.shape[1], name)
                if kind == "first_token" and dict(main.metadata) != UNPADDED:
                    first[layer] = tensor
                else:
                    self._add("prompts", f"resid_{kind}", tensor.dtype, tensor.shape[1:], layer)
        for layer in first:
            if layer in raw and self.mask is not None:
                self._add("prompts", "resid_first_token", raw[layer].dtype, raw[layer].shape[2:], layer)
            else:
                self._note(FIRST_TOKEN)

    def _raw(self, name: str, layer: int, tensor: Tensor) -> None:
        if len(tensor.shape) != 3 or tensor.shape[0] != 1:
            raise _UnfitError(SHAPES, f"{name} has shape {tensor.shape}, not (1, tokens, hidden)")
        if self.mask is None:
            self._note(NO_MASK)
            return
        if tensor.shape[1] != len(self.mask):
            raise _UnfitError(SHAPES, f"{name} has shape {tensor.shape}, and the mask has {len(self.mask)} positions")
        self._check_width("hidden", tensor.shape[2], name)
        self._add("tokens", "resid", tensor.dtype, tensor.shape[2:], layer)

    def _router(self, name: str, layer: int, tensor: Tensor) -> None:
        shape = tensor.shape[1:] if len(tensor.shape) == 3 and tensor.shape[0] == 1 else tensor.shape
        if len(shape) != 2:
            raise _UnfitError(SHAPES, f"{name} has shape {tensor.shape}, not (tokens, experts)")
        if self.n_tokens is None:
            self._note(NO_MASK)
        elif shape[0] not in (self.n_tokens, 0 if self.mask is None else len(self.mask)):
            self._note(OTHER_TOKENS)
        else:
            self._check_width("expert", shape[1], name)
            self._add("tokens", "router", tensor.dtype, shape[1:], layer)

    def _perplexity(self) -> None:
        for header in (self.headers[1], self.headers[0]):
            if header is None:
                continue
            statistics, ids, values = (header.tensors.get(n) for n in ("perplexity", "token_ids", "token_perplexity"))
            if statistics is None and ids is None and values is None:
                continue
            if statistics is not None:
                if statistics.shape != (3,):
                    raise _UnfitError(SHAPES, f"perplexity has shape {statistics.shape}, not (3,)")
                self._add("prompts", "perplexity", statistics.dtype, (3,), None)
            if ids is not None:
                # Without a mask, the number of ids is the number of tokens: ids are never padded.
                count = ids.shape[0] if len(ids.shape) == 1 else 0
                if self.n_tokens is None and count:
                    self.n_tokens = count
                if count and count == self.n_tokens:
                    self._add("tokens", "token_id", ids.dtype, (), None, INTEGERS)
                else:
                    self._note(OTHER_TOKENS)
            if values is not None:
                if self.n_tokens is not None and values.shape == (self.n_tokens - 1,):
                    self._add("tokens", "token_perplexity", values.dtype, (), None)
                else:
                    self._note(OTHER_TOKENS)
            return

    def _logits(self) -> None:
        for header in (self.headers[2], self.headers[0]):
            if header is None or not any(name.startswith("logits") for name in header.tensors):
                continue
            for name in ("logits", "logits_top_k_values", "logits_top_k_indices"):
                tensor = header.tensors.get(name)
                if tensor is not None:
                    self._add_logits(name, tensor, header.metadata.get("logits"))
            return

    def _add_logits(self, name: str, tensor: Tensor, of: str | None) -> None:
        if len(tensor.shape) != 3 or tensor.shape[0] != 1 or not tensor.shape[1]:
            raise _UnfitError(SHAPES, f"{name} has shape {tensor.shape}, not (1, positions, …)")
        positions, width = tensor.shape[1:]
        self._check_width("vocab" if name == "logits" else "top_k", width, name)
        allowed = INTEGERS if name.endswith("indices") else FLOATS
        padded = 0 if self.mask is None else len(self.mask)
        # Logits of a single position may be those of the last token, or of all tokens of a one-token prompt. This package records which.
        if positions == 1 and of != OF_EVERY:
            self._add("prompts", name.replace("logits", "logits_last_token"), tensor.dtype, (width,), None, allowed)
        if positions in (self.n_tokens, padded) and of != OF_LAST:
            self._add("tokens", name, tensor.dtype, (width,), None, allowed)
        elif positions > 1:
            self._note(NO_MASK if self.mask is None else OTHER_TOKENS)


def _slab(entry: Entry, headers: Sequence[Header | None], held: Held, layer: int | None) -> _Slab:
    """Where the rows of one variable and layer are stored. Row 0 is the first token, or the value of the prompt."""
    place: _Place = entry.place
    file, tensor = _tensor(headers, held.variable, layer)
    values_per_row = int(np.prod(held.row_shape, dtype=np.int64))
    row_nbytes = values_per_row * (itemsize_of(tensor.dtype) or 0)
    rows = (tensor.stop - tensor.start) // row_nbytes
    start, index = tensor.start, None
    if held.variable == "resid_first_token" and tensor is _get(headers[0], f"layer_{layer}"):
        start += place.first * row_nbytes
    elif held.level == "tokens" and rows == place.seq and rows != entry.n_tokens:
        start, index = (start + place.first * row_nbytes, None) if place.rows is None else (start, place.rows)
    return _Slab(file, tensor.dtype, start, row_nbytes, index)


def _tensor(headers: Sequence[Header | None], variable: str, layer: int | None) -> tuple[int, Tensor]:
    main = headers[0]
    if layer is not None:
        names = {"resid": [f"layer_{layer}"], "router": [f"router_layer_{layer}"]}.get(variable)
        if names is None:
            pooling = variable.removeprefix("resid_")
            names = [f"pooled_{pooling}_layer_{layer}", f"pooled_activation:{pooling}_layer_{layer}"]
            if pooling == "first_token" and main is not None and dict(main.metadata) != UNPADDED:
                names = [f"layer_{layer}"]
        for name in names:
            tensor = _get(main, name)
            if tensor is not None:
                return 0, tensor
    sidecar = 2 if variable.startswith("logits") else 1
    name = {"token_id": "token_ids"}.get(variable, variable).replace("logits_last_token", "logits")
    for file in (sidecar, 0):
        tensor = _get(headers[file], name)
        if tensor is not None:
            return file, tensor
    raise CorruptFileError(f"{variable} of layer {layer} is not stored any more: list the entries again")


def _get(header: Header | None, name: str) -> Tensor | None:
    return None if header is None else header.tensors.get(name)


def _label(prompt: str) -> str:
    """A prompt's hash and the beginning of its text, for messages."""
    return f"{prompt_hash(prompt)} ({prompt[:24]!r})"
