"""`VllmFiles`: hidden states that vLLM wrote, one file per prompt, as an `entry.Source`.

The files do not hold the prompts: the caller gives them by the numbers of the files. Values are read by ranges, never whole files.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple

import numpy as np

from lmprobe_zarr.batch import TokenBatch, given_prompts, prompt_sha256
from lmprobe_zarr.bridges.entry import Entry, Held, Skipped, batch_of, rows_of
from lmprobe_zarr.bridges.files import Files, Listed, Want
from lmprobe_zarr.bridges.lmprobe_folders import DAMAGED, FLOATS, NOTHING, OUTSIDE, SHAPES
from lmprobe_zarr.bridges.tensors import read_header, read_tensor
from lmprobe_zarr.errors import CorruptFileError, InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.safetensors_file import Header, Tensor, header_length, parse_header
from lmprobe_zarr.typing import Array

__all__ = ["VllmFiles"]
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
