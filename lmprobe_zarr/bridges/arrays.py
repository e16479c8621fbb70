"""Sources for hidden states that vLLM wrote, for folders with one array per layer, and for files of tensors. Each is an `entry.Source`.

These files do not hold the prompts: the caller gives them, in the order of the rows. Values are read by ranges, never whole files.
"""

from __future__ import annotations

import functools
import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

import numpy as np

from lmprobe_zarr.batch import TokenBatch, given_prompts, offsets_of, prompt_sha256, split_variable
from lmprobe_zarr.bridges.entry import Entry, Held, Skipped, batch_of, held_dtype, rows_of
from lmprobe_zarr.bridges.files import Files, Listed, Want
from lmprobe_zarr.bridges.lmprobe_folders import DAMAGED, FLOATS, NOTHING, OUTSIDE, SHAPES
from lmprobe_zarr.bridges.tensors import read_header, read_tensor
from lmprobe_zarr.errors import CorruptFileError, InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.safetensors_file import Header, Tensor, header_length, itemsize_of, parse_header, widen_bfloat16
from lmprobe_zarr.store.format import Level
from lmprobe_zarr.typing import Array

__all__ = ["Prompt", "RowTables", "VllmFiles", "npy_layers", "tensor_file"]
Prompt = str | Sequence[int]
SAFETENSORS: Final = ".safetensors"
LOCK: Final = ".lock"
VLLM_FILE: Final = re.compile(r"(?:hs_(\d{1,12})|(\d{1,12})-[0-9a-f]{8})\.safetensors")
#: How safetensors names float8 e4m3fn, and the tensor of the scales that its values are multiplied with.
FP8: Final = "F8_E4M3"
SCALES: Final = "hidden_states_scales"
BEING_WRITTEN: Final = "files that are still being written: another process holds their lock"
#: The slot that holds what goes into the first block.
EMBEDDINGS: Final = -1


# ---------------------------------------------------------------------------------------------------- one file per prompt


class _Place(NamedTuple):
    """Where an entry is found again: its folder, its file, and how many of its tokens are the prompt's, None where that is unknown."""

    files: Files
    name: str
    n_prompt: int | None


class VllmFiles:
    """Hidden states as vLLM's connector and speculators write them: one safetensors file per prompt.

    The names are ``hs_<number>.safetensors`` or ``<number>-<8 hex digits>.safetensors``; files of other names are taken for what is in
    them. ``hidden_states`` has shape (token, slot, hidden), and its slots are in ascending order of vLLM's layer ids, whatever order was
    asked for. Id 0 is what goes into the first block, the embeddings; id n is what goes into block n, the output of block n − 1.

    With ``include_output_tokens`` a file holds the prompt and what was generated but for the last token, which no block has seen.

    Parameters
    ----------
    files : Files, or sequence of Files
        The folder, or several.
    layers : sequence of int, optional
        For each slot the block whose output it holds, counted from 0, ascending: one less than vLLM's layer ids.
    layer_ids : sequence of int, optional
        Instead of these, vLLM's own layer ids, in any order.
    prompts : mapping of int to (str or sequence of int), or sequence of these, optional
        The text or the token ids of each prompt, by the number of its file. A prompt without either is identified by the ``token_ids`` of
        its file, as is one with generated tokens.
    n_prompt : int, or mapping of int to int, or sequence of int, optional
        How many tokens of each file, by its number, or of every file, are the prompt's; those after them were generated.
    """

    def __init__(
        self,
        files: Files | Sequence[Files],
        layers: Sequence[int] | None = None,
        *,
        layer_ids: Sequence[int] | None = None,
        prompts: Mapping[int, Prompt] | Sequence[Prompt] | None = None,
        n_prompt: int | Mapping[int, int] | Sequence[int] | None = None,
    ) -> None:
        self.folders = (files,) if isinstance(files, Files) else tuple(files)
        self.slots = _slots(layers, layer_ids)
        self.texts, self.ids = _texts_and_ids(prompts)
        if self.ids and n_prompt is not None:
            raise InvalidArgumentError("prompts holds token ids, which say where each prompt ends: leave n_prompt out, or give texts")
        self.n_prompt = _lengths(n_prompt)
        self._holds: dict[tuple[Held, ...], tuple[Held, ...]] = {}

    @property
    def url(self) -> str:
        """The folders of the files."""
        return ", ".join(files.url for files in self.folders)

    def entries(self) -> Iterator[Entry | Skipped]:
        """One entry per file, described from its header and its token ids."""
        listed = [(files, {item.name: item for item in files.list("") if not item.is_folder}) for files in self.folders]
        times = Counter(_number_of(name) for _, items in listed for name in items if name.endswith(SAFETENSORS))
        for files, items in listed:
            prefix = f"{files.url}/" if len(self.folders) > 1 else ""
            for found in self._entries_of(files, items, times):
                yield replace(found, name=f"{prefix}{found.name}")

    def _entries_of(self, files: Files, items: Mapping[str, Listed], times: Mapping[int | None, int]) -> Iterator[Entry | Skipped]:
        """Those of one folder."""
        numbers = {name: _number_of(name) for name in items if name.endswith(SAFETENSORS)}
        for name in sorted(numbers, key=lambda name: (numbers[name] is None, numbers[name] or 0, name)):
            number, item = numbers[name], items[name]
            if item.outside:
                yield Skipped(name=name, reason=OUTSIDE)
            elif f"{name}{LOCK}" in items and files.is_locked(f"{name}{LOCK}"):
                yield Skipped(name=name, reason=BEING_WRITTEN)
            elif number is not None and times[number] > 1 and self._knows(number):
                reason = "files of one number, of which nobody knows whose text is given: import each run's folder alone"
                yield Skipped(name=name, reason=reason)
            else:
                try:
                    yield self._entry(files, number, name, item.size)
                except (CorruptFileError, FileNotFoundError) as error:
                    yield Skipped(name=name, reason=_why_damaged(files, name), detail=str(error))
        for name in sorted(items):
            whole = name.removesuffix(LOCK)
            if name != whole and whole.endswith(SAFETENSORS) and whole not in items:
                is_held = files.is_locked(name)
                unknown = "files that are still being written, or whose writer ended: only their lock is there"
                ended = "files whose writer ended before it wrote them: only their lock is there, and nobody holds it"
                yield Skipped(name=whole, reason=unknown if is_held is None else BEING_WRITTEN if is_held else ended)

    def _knows(self, number: int) -> bool:
        """Whether anything is given of the file of this number alone."""
        return number in self.texts or number in self.ids or (isinstance(self.n_prompt, Mapping) and number in self.n_prompt)

    def _entry(self, files: Files, number: int | None, name: str, size: int | None) -> Entry | Skipped:
        header, _ = read_header(files, name, size=size)
        values, ids = header.tensors.get("hidden_states"), header.tensors.get("token_ids")
        scales = header.tensors.get(SCALES)
        if values is None or values.dtype not in {*FLOATS, FP8}:
            return Skipped(name=name, reason=NOTHING, detail="hidden_states is missing, or does not hold floats")
        if len(values.shape) != 3 or 0 in values.shape or values.shape[1] != len(self.slots):
            detail = f"hidden_states has shape {values.shape}, not (tokens, {len(self.slots)} layers, hidden)"
            return Skipped(name=name, reason=SHAPES, detail=detail)
        n_tokens = values.shape[0]
        notes = []
        if values.dtype == FP8:
            if scales is None or scales.dtype != "float32" or scales.shape not in {(n_tokens, 1, 1), (n_tokens, len(self.slots), 1)}:
                return Skipped(name=name, reason=SHAPES, detail=f"{SCALES} is missing, or has not one float32 for each token")
            notes.append("values of 8 bits with scales, which are stored as the float32 that they stand for")
        blocks = tuple(layer for layer in self.slots if layer != EMBEDDINGS)
        dtype, width = "float32" if values.dtype == FP8 else values.dtype, values.shape[2:]
        holds = [Held(level="tokens", variable="resid", layers=blocks, dtype=dtype, row_shape=width)] if blocks else []
        if EMBEDDINGS in self.slots:
            holds.append(Held(level="tokens", variable="embed", layers=None, dtype=dtype, row_shape=width))
        text = None if number is None else self.texts.get(number)
        given = None if number is None else self.ids.get(number)
        n_prompt = self.n_prompt if isinstance(self.n_prompt, int) else None if number is None else self.n_prompt.get(number)
        n_prompt = n_prompt if given is None else len(given)
        if n_prompt is not None and n_prompt > n_tokens:
            detail = f"it has {n_tokens}, and the prompt has {n_prompt}"
            return Skipped(name=name, reason="files with fewer tokens than their prompt has", detail=detail)
        if n_prompt is not None and n_prompt < n_tokens and text is not None:
            notes.append("texts of prompts whose files hold generated tokens too: the two together are known by their token ids")
            text = None
        numbers: Array | None = None
        if ids is not None and ids.shape == (n_tokens,) and ids.dtype in {"int32", "int64"}:
            holds.append(Held(level="tokens", variable="token_id", layers=None, dtype=ids.dtype, row_shape=()))
            numbers, _ = read_tensor(files, name, ids) if text is None else (None, "")
        else:
            notes.append("token ids that are missing, or whose number is not that of the tokens")
            numbers = given if n_prompt == n_tokens else None
        if text is None and numbers is None:
            return Skipped(name=name, reason="files whose prompt is unknown: give its text, by the number of the file, as prompts=")
        if given is not None and numbers is not None and not np.array_equal(numbers[:n_prompt], given):
            return Skipped(name=name, reason="files whose token ids do not begin with those that are given of their prompt")
        if n_prompt is not None:
            holds.append(Held(level="tokens", variable="generated", layers=None, dtype="int64", row_shape=()))
        kept = self._holds.setdefault(tuple(holds), tuple(holds))
        digest = prompt_sha256(text) if text is not None else prompt_sha256(np.asarray(numbers))
        place = _Place(files, name, n_prompt)
        return Entry(name=name, sha256=digest, text=text, n_tokens=n_tokens, holds=kept, notes=tuple(notes), place=place)

    def read(self, entries: Sequence[Entry], holds: Sequence[Held]) -> TokenBatch:
        """Some of what some entries hold, as one batch; see `entry.Source`."""
        bounds = rows_of(entries)["tokens"]
        arrays = {held: held.empty(int(bounds[-1])) for held in holds}
        for entry, a, b in zip(entries, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            place: _Place = entry.place
            header, _ = read_header(place.files, place.name)
            states: Array | None = None
            for held, array in arrays.items():
                if held.variable == "generated":
                    array[0, a:b] = np.arange(b - a) >= (b - a if place.n_prompt is None else place.n_prompt)
                    continue
                name = "token_ids" if held.variable == "token_id" else "hidden_states"
                tensor = header.tensors.get(name)
                width = () if held.variable == "token_id" else (len(self.slots), *held.row_shape)
                is_same = tensor is not None and tensor.dtype in {held.dtype, *({FP8} if held.dtype == "float32" else ())}
                if tensor is None or not is_same or tensor.shape != (b - a, *width):
                    raise CorruptFileError(f"{place.files.url}/{place.name} has changed since its header was read")
                if held.variable == "token_id":
                    array[0, a:b], _ = read_tensor(place.files, place.name, tensor)
                    continue
                if states is None:
                    states = _states(place, header, tensor)
                for j, layer in enumerate(held.layers or (EMBEDDINGS,)):
                    array[j, a:b] = states[:, self.slots.index(layer)]
        return batch_of(entries, arrays)


def _states(place: _Place, header: Header, tensor: Tensor) -> Array:
    """The values of a file, shape (token, slot, hidden)."""
    if tensor.dtype != FP8:
        return read_tensor(place.files, place.name, tensor)[0]
    scales = header.tensors.get(SCALES)
    if scales is None:
        raise CorruptFileError(f"{place.files.url}/{place.name} has changed since its header was read")
    codes = np.empty(tensor.shape, np.uint8)
    place.files.fill(place.name, [Want(tensor.start, codes.reshape(-1).data)])
    return float8_e4m3()[codes] * read_tensor(place.files, place.name, scales)[0]


def _why_damaged(files: Files, name: str) -> str:
    """Why a file cannot be read, so far as its length tells."""
    try:
        head, size = files.head(name)
    except (CorruptFileError, FileNotFoundError):
        return DAMAGED
    known = size if size is not None else len(head) if len(head) < files.head_bytes else None
    if known == 0:
        return "empty files: they are still to be written, or their writer ended"
    half = "half-written files: they end before the last of their values"
    if known is not None and known < 8:
        return half
    try:
        needed = header_length(head)
        is_half = needed > known if known is not None else False
        if not is_half and known is not None and needed <= len(head):
            is_half = parse_header(head[:needed]).size > known
    except ValueError:
        return DAMAGED
    return half if is_half else DAMAGED


def _texts_and_ids(prompts: Any) -> tuple[dict[int, str], dict[int, Array]]:
    """The prompts that are given as texts, and those that are given as token ids, by the numbers of their files."""
    given = dict(prompts) if isinstance(prompts, Mapping) else dict(enumerate(() if prompts is None else given_prompts(prompts)))
    texts: dict[int, str] = {}
    ids: dict[int, Array] = {}
    for number, prompt in given.items():
        if isinstance(number, bool) or not isinstance(number, int | np.integer):
            raise InvalidTypeError(f"prompts has a key {number!r}: give the number of each file, such as 0 for 0-a2427cb0.safetensors")
        if isinstance(prompt, str):
            texts[int(number)] = prompt
            continue
        try:
            held = np.asarray(prompt)
        except ValueError:  # lists of different lengths
            held = np.empty((0, 0))
        if held.ndim != 1 or held.dtype.kind not in "iu" or not len(held):
            raise InvalidTypeError(f"prompts[{number}]={prompt!r:.60} is no prompt: give a text, or token ids in a flat list")
        ids[int(number)] = held
    return texts, ids


def _lengths(n_prompt: Any) -> int | Mapping[int, int]:
    """How many tokens each prompt has: one number for all, or by the numbers of the files."""
    if n_prompt is None:
        return {}
    if isinstance(n_prompt, int | np.integer):
        found: dict[int, Any] = {0: n_prompt}
    elif isinstance(n_prompt, Mapping):
        found = dict(n_prompt)
    elif isinstance(n_prompt, str) or not hasattr(n_prompt, "__len__"):
        raise InvalidTypeError(
            f"n_prompt={n_prompt!r}: give the tokens of the prompts, one number for all, or one by the number of each file"
        )
    else:
        found = dict(enumerate(n_prompt))
    for length in found.values():
        if isinstance(length, bool) or not isinstance(length, int | np.integer):
            raise InvalidTypeError(f"n_prompt holds {length!r}, which is no whole number: give how many tokens each prompt has")
        if length < 1:
            raise InvalidArgumentError(f"n_prompt holds {length!r}: a prompt has at least one token")
    return int(found[0]) if isinstance(n_prompt, int | np.integer) else {int(number): int(length) for number, length in found.items()}


def _slots(layers: Sequence[int] | None, layer_ids: Sequence[int] | None) -> tuple[int, ...]:
    """The block whose output each slot holds, `EMBEDDINGS` for the input of the first."""
    if (layers is None) == (layer_ids is None):
        raise InvalidArgumentError(
            "each slot of hidden_states holds one layer: give layers=, the blocks, or layer_ids=, as vLLM numbers them"
        )
    name, given = ("layers", layers) if layer_ids is None else ("layer_ids", layer_ids)
    found = tuple(int(layer) for layer in given or ())
    if len(set(found)) != len(found) or not found or min(found) < 0:
        what = "block" if layer_ids is None else "layer id"
        raise InvalidArgumentError(f"{name}={given!r}: give one {what} for each slot of hidden_states, none twice")
    if layer_ids is not None:
        return tuple(layer - 1 for layer in sorted(found))
    if list(found) != sorted(found):
        raise InvalidArgumentError(
            f"layers={given!r}: the slots of hidden_states ascend, whatever order vLLM was asked for: give the blocks ascending, "
            "or layer_ids= as vLLM numbers them"
        )
    return found


def _number_of(name: str) -> int | None:
    match = VLLM_FILE.fullmatch(name)
    return None if match is None else int(match[1] or match[2])


@functools.cache
def float8_e4m3() -> Array:
    """What each of the 256 codes of float8 e4m3fn stands for: a sign, four bits of exponent, three of mantissa, no infinity."""
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, (codes & 7) / 8
    sizes = np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7.0))
    sizes[codes & 127 == 127] = np.nan
    return np.where(codes & 128, -sizes, sizes).astype(np.float32)


# ----------------------------------------------------------------------------------------------- all prompts in each array


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """An array in a file, with one row per prompt or per token.

    Parameters
    ----------
    key : str
        The file.
    dtype : str
        A numpy dtype, or ``bfloat16``.
    start : int
        The byte at which the first row starts.
    n_rows : int
        Number of rows.
    row_shape : tuple of int
        Shape of one row.
    """

    key: str
    dtype: str
    start: int
    n_rows: int
    row_shape: tuple[int, ...]

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row in the file."""
        return int(np.prod(self.row_shape, dtype=np.int64)) * (itemsize_of(self.dtype) or 0)


class RowTables:
    """Arrays over all prompts, or over the tokens of all prompts, as one entry per prompt.

    Parameters
    ----------
    files : Files
        The folder or prefix.
    prompts : sequence of str or of token ids
        In the order of the rows.
    tables : mapping of (str, int or None) to Table
        The array of each variable and layer; None for a variable without layers.
    rows : sequence of ndarray of int, optional
        For arrays over tokens: the rows of each prompt.
    """

    def __init__(
        self,
        files: Files,
        prompts: Sequence[Prompt],
        tables: Mapping[tuple[str, int | None], Table],
        *,
        rows: Sequence[Array] | None = None,
    ) -> None:
        if isinstance(prompts, str):
            raise InvalidArgumentError("prompts is one text: give a list of texts, in the order of the rows")
        self.files, self.prompts, self.tables = files, given_prompts(prompts), dict(tables)
        self.rows = None if rows is None else [np.asarray(r, np.int64) for r in rows]
        self.holds = self._check()

    @property
    def url(self) -> str:
        """The folder of the files."""
        return self.files.url

    def _check(self) -> tuple[Held, ...]:
        found: dict[tuple[Level, str, bool, str, tuple[int, ...]], list[int]] = {}
        for (variable, layer), table in self.tables.items():
            level: Level = "prompts" if split_variable(variable)[1] is not None else "tokens"
            needed = len(self.prompts)
            if level == "tokens":
                if self.rows is None:
                    raise InvalidArgumentError(f"{variable!r} has one row per token: give the rows of each prompt")
                needed = 1 + max((int(r.max()) for r in self.rows if len(r)), default=-1)
            if table.n_rows < needed or (level == "prompts" and table.n_rows != needed):
                raise InvalidArgumentError(
                    f"{table.key} ({variable!r}, layer {layer}) has {table.n_rows} rows, and the prompts need {needed}"
                )
            if table.dtype not in FLOATS or 0 in table.row_shape:
                raise InvalidArgumentError(f"{table.key} holds {table.dtype} of shape {table.row_shape}: expected floats")
            layers = found.setdefault((level, variable, layer is not None, table.dtype, table.row_shape), [])
            layers += [layer] if layer is not None else []
        if self.rows is not None and len(self.rows) != len(self.prompts):
            raise InvalidArgumentError(f"rows were given for {len(self.rows)} prompts, and there are {len(self.prompts)} prompts")
        if not found:
            raise InvalidArgumentError(f"no array in {self.files.url} has the given name: check the names of variables and files")
        return tuple(
            Held(level=level, variable=variable, layers=tuple(sorted(layers)) if layered else None, dtype=dtype, row_shape=row)
            for (level, variable, layered, dtype, row), layers in sorted(found.items())
        )

    def entries(self) -> Iterator[Entry | Skipped]:
        """One entry per prompt."""
        for number, prompt in enumerate(self.prompts):
            count = None if self.rows is None else len(self.rows[number])
            if count == 0:
                yield Skipped(name=f"prompt number {number}", reason="prompts without a single token")
                continue
            text = prompt if isinstance(prompt, str) else None
            yield Entry(
                name=f"prompt number {number}",
                sha256=prompt_sha256(prompt),
                text=text,
                n_tokens=count,
                holds=self.holds,
                place=number,
            )

    def read(self, entries: Sequence[Entry], holds: Sequence[Held]) -> TokenBatch:
        """Some of what some entries hold, as one batch; see `entry.Source`."""
        bounds = rows_of(entries)
        arrays = {held: held.empty(int(bounds[held.level][-1])) for held in holds}
        for held, array in arrays.items():
            for j, layer in enumerate(held.layers or (None,)):
                self._fill(self.tables[held.variable, layer], held.level, entries, array[j])
        return batch_of(entries, arrays)

    def _fill(self, table: Table, level: Level, entries: Sequence[Entry], out: Array) -> None:
        """Read rows of entries from one file into `out`; runs of neighbouring rows are read at once."""
        rows = np.concatenate([self._rows_of(entry, level) for entry in entries])
        stored = np.dtype("uint16" if table.dtype == "bfloat16" else table.dtype)
        direct = stored == held_dtype(table.dtype) and out.flags.c_contiguous
        buffer = out if direct else np.empty(out.shape, stored)
        cuts = np.flatnonzero(np.diff(rows) != 1) + 1
        wants = [
            Want(table.start + int(rows[a]) * table.row_nbytes, buffer[a:b].reshape(-1).view(np.uint8).data)
            for a, b in zip([0, *cuts.tolist()], [*cuts.tolist(), len(rows)], strict=True)
        ]
        try:
            self.files.fill(table.key, wants)
        except FileNotFoundError as error:
            raise CorruptFileError(f"{self.url}/{table.key} was removed after its header was read") from error
        if not direct:
            out[...] = widen_bfloat16(buffer) if table.dtype == "bfloat16" else buffer

    def _rows_of(self, entry: Entry, level: Level) -> Array:
        if level == "prompts" or self.rows is None:
            return np.array([entry.place], np.int64)
        rows: Array = self.rows[entry.place]
        return rows


def npy_layers(
    files: Files,
    prompts: Sequence[Prompt],
    *,
    variable: str = "resid",
    name: str = "layer_{layer}.npy",
    offsets: str = "offsets.npy",
    dtype: str | None = None,
    hidden_size: int | None = None,
) -> RowTables:
    """A folder with one array per layer over the tokens of all prompts, and a file with the first row of each prompt.

    Parameters
    ----------
    files : Files
        The folder.
    prompts : sequence of str or of token ids
        In the order of the rows.
    variable : str
        What the arrays hold: a site, with one row per token; or ``<site>_<pooling>``, with one row per prompt, which needs no offsets.
    name : str
        The name of a layer's file, containing ``{layer}``.
    offsets : str
        ``.npy`` file of integers: the first row of every prompt and the end of the last, or the number of tokens of every prompt.
    dtype, hidden_size : optional
        Dtype and width of files without a header (``numpy.memmap``). ``dtype="bfloat16"`` also reads a ``.npy`` file of uint16 bits.

    Raises
    ------
    InvalidArgumentError, CorruptFileError
        The files do not match the prompts, or each other.
    """
    match = re.compile(re.escape(name).replace(re.escape("{layer}"), r"(\d{1,9})"))
    if "{layer}" not in name:
        raise InvalidArgumentError(f"name={name!r} does not contain {{layer}}: give for example 'layer_{{layer}}.npy'")
    tables: dict[tuple[str, int | None], Table] = {}
    for item in files.list(""):
        found = match.fullmatch(item.name)
        if found and item.outside:
            raise CorruptFileError(f"{files.url}/{item.name} is a link that leads out of the folder: it is not followed")
        if found:
            tables[variable, int(found[1])] = _npy_table(files, item.name, item.size, dtype, hidden_size)
    rows = None
    if split_variable(variable)[1] is None:
        rows = _runs(_read_npy(files, offsets), len(prompts), f"{files.url}/{offsets}")
    return RowTables(files, prompts, tables, rows=rows)


def _npy_header(files: Files, key: str) -> tuple[tuple[int, ...], np.dtype[Any], int, int | None]:
    """Shape, dtype, first byte of the values and size in bytes of a ``.npy`` file."""
    head, size = files.head(key)
    stream = io.BytesIO(head)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except (ValueError, EOFError) as error:
        raise CorruptFileError(f"{files.url}/{key} is not a .npy file: {str(error)[:120]}") from error
    if (fortran and len(shape) > 1) or dtype.hasobject or dtype.byteorder == ">":
        raise CorruptFileError(
            f"{files.url}/{key} holds {dtype} in an order that cannot be read here: save it little-endian and with np.ascontiguousarray"
        )
    return tuple(shape), dtype, stream.tell(), size


def _npy_table(files: Files, key: str, size: int | None, dtype: str | None, hidden_size: int | None) -> Table:
    if hidden_size is not None:
        width = (itemsize_of(dtype) if dtype else None) or 0
        _, known = files.head(key)
        size = known if known is not None else size
        if not width or dtype is None or hidden_size < 1 or size is None or size % (width * hidden_size):
            raise InvalidArgumentError(f"{files.url}/{key} has {size} bytes, which is no multiple of {hidden_size} values of {dtype!r}")
        return Table(key=key, dtype=dtype, start=0, n_rows=size // (width * hidden_size), row_shape=(hidden_size,))
    shape, held, start, known = _npy_header(files, key)
    size = known if known is not None else size
    if len(shape) < 2 or (size is not None and size < start + int(np.prod(shape, dtype=np.int64)) * held.itemsize):
        raise CorruptFileError(f"{files.url}/{key} has shape {shape} and {size} bytes: it is cut off, or holds no rows")
    bits = dtype == "bfloat16" and held == np.uint16
    return Table(key=key, dtype="bfloat16" if bits else held.name, start=start, n_rows=shape[0], row_shape=shape[1:])


def _read_npy(files: Files, key: str) -> Array:
    """A whole small ``.npy`` file of integers."""
    try:
        shape, dtype, start, _ = _npy_header(files, key)
    except FileNotFoundError as error:
        raise InvalidArgumentError(
            f"{files.url}/{key} does not exist: give the file with the first row of each prompt as offsets="
        ) from error
    values = np.empty(shape, dtype)
    if dtype.kind not in "iu" or values.ndim != 1:
        raise CorruptFileError(f"{files.url}/{key} holds {dtype} of shape {shape}, not a one-dimensional array of integers")
    if values.size:
        files.fill(key, [Want(start, values.view(np.uint8).data)])
    return values


def _runs(numbers: Array, n_prompts: int, where: str) -> list[Array]:
    """The rows of each prompt, from offsets (one more than prompts) or numbers of tokens."""
    wide = numbers.astype(np.int64)
    offsets = wide if len(wide) == n_prompts + 1 else offsets_of(wide)
    if len(offsets) != n_prompts + 1 or offsets[0] != 0 or (np.diff(offsets) < 0).any():
        raise InvalidArgumentError(
            f"{where} holds {len(wide)} numbers for {n_prompts} prompts: give the first row of each prompt and the end of the last, "
            "ascending from 0, or the number of tokens of each prompt"
        )
    return [np.arange(a, b) for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]


def tensor_file(
    files: Files,
    key: str,
    prompts: Sequence[Prompt],
    mapping: Mapping[str, str | Mapping[int, str]],
    *,
    offsets: str | None = None,
    mask: str | None = None,
) -> RowTables:
    """One safetensors file with a tensor per layer.

    Parameters
    ----------
    files : Files
        The folder or prefix.
    key : str
        The file.
    prompts : sequence of str or of token ids
        In the order of the rows.
    mapping : mapping of str to (str or mapping of int to str)
        Variable (``resid``, ``resid_mean``, or a site of any name and width) to ``{layer: name of its tensor}``, or to a name that contains
        ``{layer}``, such as ``"blocks.{layer}.hook_resid_post"``; the name of one tensor for a site without layers.
    offsets : str, optional
        For tensors (token, hidden): the tensor with the first row of every prompt and the end of the last, or their numbers of tokens.
    mask : str, optional
        For padded tensors (prompt, position, hidden): the tensor (prompt, position) that is not 0 where there is a token.

    Raises
    ------
    InvalidArgumentError, CorruptFileError
        The tensors do not match the prompts, or the file is damaged.
    """
    try:
        header, _ = read_header(files, key)
    except FileNotFoundError as error:
        raise InvalidArgumentError(f"{files.url}/{key} does not exist: check the path") from error
    named: dict[tuple[str, int | None], str] = {}
    for variable, names in mapping.items():
        if isinstance(names, Mapping):
            named |= {(variable, int(layer)): name for layer, name in names.items()}
        elif "{layer}" in names:
            match = re.compile(re.escape(names).replace(re.escape("{layer}"), r"(\d{1,9})"))
            named |= {(variable, int(found[1])): name for name in header.tensors if (found := match.fullmatch(name))}
        else:
            named[variable, None] = names
    wanted = {*named.values(), *(name for name in (offsets, mask) if name is not None)}
    absent = sorted(wanted - set(header.tensors))
    if absent or not named:
        there = ", ".join(list(header.tensors)[:5])
        raise InvalidArgumentError(
            f"{files.url}/{key} has no tensor {', '.join(absent[:3]) or 'that the mapping names'}: it has {there}, …"
        )
    rows: list[Array] | None = None
    padded: tuple[int, ...] | None = None
    if mask is not None:
        kept = read_tensor(files, key, header.tensors[mask])[0] != 0
        if kept.ndim != 2 or len(kept) != len(prompts):
            raise InvalidArgumentError(f"the mask {mask!r} has shape {kept.shape} for {len(prompts)} prompts, expected (prompt, position)")
        padded = kept.shape
        rows = [i * kept.shape[1] + np.flatnonzero(row) for i, row in enumerate(kept)]
    elif offsets is not None:
        rows = _runs(read_tensor(files, key, header.tensors[offsets])[0].reshape(-1), len(prompts), f"tensor {offsets!r}")
    tables = {}
    for (variable, layer), name in named.items():
        tensor = header.tensors[name]
        shape = tensor.shape
        if padded is not None and split_variable(variable)[1] is None:
            if shape[:2] != padded:
                raise InvalidArgumentError(f"tensor {name!r} has shape {shape}, and the mask has shape {padded}")
            shape = (padded[0] * padded[1], *shape[2:])
        if len(shape) < 2:
            raise InvalidArgumentError(f"tensor {name!r} has shape {shape}, expected at least two dimensions, rows first")
        tables[variable, layer] = Table(key=key, dtype=tensor.dtype, start=tensor.start, n_rows=shape[0], row_shape=shape[1:])
    return RowTables(files, prompts, tables, rows=rows)
