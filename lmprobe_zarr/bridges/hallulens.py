"""Reads what HalluLens captures of prompts and their answers: folders of memory-mapped arrays, and Zarr groups.

Layouts (HalluLens, June 2026): ``activation_logging/inference_capture_writer.py`` writes arrays without a header into files called
``.npy``, with ``config.json`` and, for each prompt that was written, a line in ``meta.jsonl``; ``zarr_activations_logger.py`` writes
``arrays/`` and ``meta/index.jsonl``. Both hold transformers' ``hidden_states``: number 0 is what goes into the first block, number n the
output of block n − 1, and the last has gone through the final norm in most models.

The two differ in which token an answer's row belongs to. In the Zarr group row n is that of the answer's token n. In the folder it is the
row that *gave* token n, that of the token before: row 0 repeats the last row of the prompt.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from lmprobe_zarr.batch import prompt_sha256
from lmprobe_zarr.bridges.entry import Entry, Held, Skipped
from lmprobe_zarr.bridges.files import Files
from lmprobe_zarr.bridges.lmprobe_folders import DAMAGED, FLOATS, NO_TOKENS, SHAPES
from lmprobe_zarr.bridges.raw_arrays import RawArray, open_file_array, open_zarr_array, read_json
from lmprobe_zarr.bridges.row_source import RowSource
from lmprobe_zarr.errors import CorruptFileError, InvalidArgumentError, NotAStoreError, UnsupportedVersionError
from lmprobe_zarr.typing import Array

__all__ = ["HallulensCapture", "HallulensZarr", "open_hallulens"]

FORMAT: Final = "inference_capture_v1"
LINES_BYTES: Final = 2**31
#: transformers' name of the last entry of ``hidden_states``.
LAST: Final = "last_hidden_state"
CUT: Final = "prompts that were cut off, so that their last rows are missing"
NO_TEXT: Final = "prompts without a text or whose lines do not say what was stored"


@dataclass(frozen=True, slots=True)
class _Place:
    """The row of an entry in the arrays, and how many of its tokens are the prompt's."""

    row: int
    n_prompt: int
    line: dict[str, Any]


class _Hallulens(RowSource):
    """What both layouts share: arrays (prompt, hidden state, token, hidden) of the prompts and of their answers."""

    prompts: RawArray
    answers: RawArray | None
    first_answer_row = 0

    def __init__(self, files: Files, *, responses: bool) -> None:
        self.files, self.is_local, self.responses = files, files.is_local, responses
        self._holds: dict[tuple[Any, ...], tuple[Held, ...]] = {}

    @property
    def url(self) -> str:
        """The folder."""
        return self.files.url

    def _described(self, states: Sequence[int], *, ids: bool, answered: bool) -> tuple[Held, ...]:
        """What an entry with some of the hidden states holds."""
        kept = (tuple(states), ids, answered)
        if kept not in self._holds:
            last, dtype, width = self.prompts.shape[1] - 1, self.prompts.dtype, self.prompts.shape[3:]
            layers = tuple(number - 1 for number in states if 0 < number < last)
            holds = [Held(level="tokens", variable="resid", layers=layers, dtype=dtype, row_shape=width)] if layers else []
            named = [("embed", 0), (LAST, last)]
            holds += [Held(level="tokens", variable=name, layers=None, dtype=dtype, row_shape=width) for name, n in named if n in states]
            columns = [("token_id", ids), ("generated", answered)]
            holds += [Held(level="tokens", variable=name, layers=None, dtype="int64", row_shape=()) for name, there in columns if there]
            self._holds[kept] = tuple(holds)
        return self._holds[kept]

    def rows(self, entry: Entry, held: Held, layer: int | None, start: int, stop: int) -> Array:
        """Some rows of one variable and layer; see `RowSource`."""
        place: _Place = entry.place
        if held.variable == "generated":
            return np.asarray(np.arange(start, stop) >= place.n_prompt)
        number = 0 if held.variable == "embed" else self.prompts.shape[1] - 1 if held.variable == LAST else (layer or 0) + 1
        shift = self.first_answer_row - place.n_prompt
        parts = [self.prompts.rows((place.row, number), start, min(stop, place.n_prompt))] if start < place.n_prompt else []
        if stop > place.n_prompt and self.answers is not None:
            parts.append(self.answers.rows((place.row, number), max(start, place.n_prompt) + shift, stop + shift))
        return np.concatenate(parts)

    def columns_of(self, entries: Iterable[Entry]) -> dict[str, dict[str, Any]]:
        """What HalluLens records of each prompt, as columns: whether its answer was hallucinated, and its key."""
        found: dict[str, dict[str, Any]] = {}
        for entry in entries:
            for name, given in (("hallucinated", bool), ("key", str)):
                value = entry.place.line.get(name)
                if isinstance(value, given):
                    found.setdefault(name, {})[entry.hash] = value
        return found


class HallulensCapture(_Hallulens):
    """A folder of ``InferenceCaptureWriter``. Prompts are known by their token ids, with those of the answer.

    Parameters
    ----------
    files : Files
        The folder.
    responses : bool
        Whether the rows of the answer's tokens follow those of the prompt.

    Raises
    ------
    NotAStoreError, UnsupportedVersionError
        It is no such folder, or one of another version.
    CorruptFileError
        A document or an array is damaged, missing, or of another size than the configuration says.
    """

    first_answer_row = 1

    def __init__(self, files: Files, *, responses: bool = True) -> None:
        super().__init__(files, responses=responses)
        try:
            config = read_json(files, "config.json")
        except FileNotFoundError as error:
            raise NotAStoreError(f"{files.url} is no capture of HalluLens: it has no config.json") from error
        if config.get("storage_format") != FORMAT:
            raise UnsupportedVersionError(
                f"{files.url}/config.json has the format {config.get('storage_format')!r:.60}, expected {FORMAT!r}"
            )
        try:
            names = ("n_samples", "num_layers", "max_prompt_len", "max_response_len", "hidden_dim")
            n, layers, prompt, answer, hidden = (int(config[name]) for name in names)
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptFileError(f"{files.url}/config.json is damaged: {error}") from error
        if n < 0 or min(layers, prompt, answer, hidden) < 1:
            raise CorruptFileError(f"{files.url}/config.json has sizes that no array has")
        self.model: str | None = config["model_name"] if isinstance(config.get("model_name"), str) else None
        # The writer stores float16 whatever `dtype` says.
        self.prompts = open_file_array(files, "prompt_activations.npy", "float16", (n, layers + 1, prompt, hidden))
        self.answers = open_file_array(files, "response_activations.npy", "float16", (n, layers + 1, answer, hidden))
        self.prompt_ids = open_file_array(files, "prompt_token_ids.npy", "int32", (n, prompt))
        self.answer_ids = open_file_array(files, "response_token_ids.npy", "int32", (n, answer))
        self.lengths = [open_file_array(files, f"{name}_len.npy", "int32", (n,)) for name in ("prompt", "response")]

    def entries(self) -> Iterator[Entry | Skipped]:
        """One entry for each prompt that ``meta.jsonl`` lists; token ids are read, and no hidden states."""
        states = range(self.prompts.shape[1])
        lengths = np.stack([array.read() for array in self.lengths], axis=1)
        for line in sorted(_lines(self.files, "meta.jsonl"), key=lambda line: _number(line, "sample_index") or 0):
            row, n_prompt, n_answer = (_number(line, name) for name in ("sample_index", "prompt_len", "response_len"))
            name = f"prompt number {row}"
            if row is None or n_prompt is None or n_answer is None or row >= self.prompts.shape[0]:
                yield Skipped(name=name, reason=DAMAGED, detail="its line in meta.jsonl names no row of the arrays")
                continue
            if lengths[row].tolist() != [n_prompt, n_answer]:
                yield Skipped(name=name, reason=SHAPES, detail="meta.jsonl and the arrays of lengths differ")
                continue
            if n_prompt == 0 or n_prompt > self.prompts.shape[2]:
                yield Skipped(name=name, reason=NO_TOKENS if n_prompt == 0 else CUT)
                continue
            # The row of the last token that is kept of the answer was never computed, or is not stored.
            more = max(0, min(n_answer, self.answer_ids.shape[1]) - 1) if self.responses else 0
            place = _Place(row, n_prompt, line)
            ids = self._ids(place, 0, n_prompt + more)
            if (ids < 0).any():
                yield Skipped(name=name, reason=SHAPES, detail="some of its token ids are missing")
                continue
            holds = self._described(states, ids=True, answered=self.responses)
            yield Entry(name=name, sha256=prompt_sha256(ids), text=None, n_tokens=len(ids), holds=holds, place=place)

    def rows(self, entry: Entry, held: Held, layer: int | None, start: int, stop: int) -> Array:
        """Some rows of one variable and layer; see `RowSource`."""
        if held.variable == "token_id":
            return self._ids(entry.place, start, stop)
        return super().rows(entry, held, layer, start, stop)

    def _ids(self, place: _Place, start: int, stop: int) -> Array:
        prompt = self.prompt_ids.rows((place.row,), 0, place.n_prompt)
        answer = self.answer_ids.rows((place.row,), 0, max(0, stop - place.n_prompt))
        return np.concatenate([prompt, answer]).astype(np.int64)[start:stop]


class HallulensZarr(_Hallulens):
    """A Zarr group of ``ZarrActivationsLogger``. Prompts are known by their texts; their token ids are not stored.

    Parameters
    ----------
    files : Files
        The folder or prefix that holds the group.
    prefix : str
        The group below it: nothing, or ``activations.zarr/``.
    responses : bool
        Whether the rows of the answer's tokens follow those of the prompt.
    model : str, optional
        Chooses between several models in one group.

    Raises
    ------
    NotAStoreError, CorruptFileError
        There is no such group, or a document of it is damaged or describes compressed chunks.
    InvalidArgumentError
        The group holds several models, and none of them was chosen.
    """

    def __init__(self, files: Files, prefix: str = "", *, responses: bool = True, model: str | None = None) -> None:
        super().__init__(files, responses=responses)
        self.prefix = prefix
        self.prompts = open_zarr_array(files, f"{prefix}arrays/prompt_activations")
        self.answers = None
        if any(item.name == "response_activations" for item in files.list(f"{prefix}arrays")):
            self.answers = open_zarr_array(files, f"{prefix}arrays/response_activations")
        for array in (self.prompts, *(() if self.answers is None else (self.answers,))):
            shape = array.shape
            alike = len(shape) == 4 and shape[1] == self.prompts.shape[1] and shape[3] == self.prompts.shape[3]
            if not alike or array.dtype not in FLOATS or array.chunks is None or array.chunks[3] != shape[3] or min(shape[1:]) < 1:
                raise CorruptFileError(f"{files.url}/{array.key} has {array.dtype} of shape {shape} in chunks of {array.chunks}")
        self.lengths = [open_zarr_array(files, f"{prefix}arrays/{name}_len") for name in ("prompt", "response")]
        try:
            lines = _lines(files, f"{prefix}meta/index.jsonl")
        except NotAStoreError as error:
            raise CorruptFileError(f"{files.url}/{prefix}meta/index.jsonl is missing: it says which prompts these are") from error
        by_key = {str(line.get("key")): line for line in lines}  # the last line of a key counts
        self._lines = [line for line in by_key.values() if line.get("sample_index") is not None]
        names = sorted({line["model"] for line in self._lines if isinstance(line.get("model"), str)})
        if len(names) > 1:
            if model not in names:
                raise InvalidArgumentError(f"{files.url} holds {', '.join(map(repr, names[:5]))}: choose one with model=")
            self._lines = [line for line in self._lines if line.get("model") == model]
            names = [model]
        self.model: str | None = names[0] if names else None

    def entries(self) -> Iterator[Entry | Skipped]:
        """One entry for each prompt with rows, described from the index."""
        count, _, longest, _ = self.prompts.shape
        rows: set[int] = set()
        length_of = [functools.cache(functools.partial(_chunk_of, array)) for array in self.lengths]
        for line in sorted(self._lines, key=lambda line: _number(line, "sample_index") or 0):
            row, n_prompt, n_answer = (_number(line, name) for name in ("sample_index", "prompt_len", "response_len"))
            name, text, given = f"prompt {line.get('key')!s:.60}", line.get("prompt"), _number(line, "input_length")
            config = line.get("logging_config")
            states = self._states(config.get("target_layers") if isinstance(config, dict) else None)
            if row is None or n_prompt is None or n_answer is None or row >= count or row in rows:
                yield Skipped(name=name, reason=DAMAGED, detail="its line in index.jsonl names no row of the arrays, or that of another")
                continue
            rows.add(row)
            if not isinstance(text, str) or states is None:
                yield Skipped(name=name, reason=NO_TEXT)
                continue
            try:
                lengths = [_length(array, chunk, row) for array, chunk in zip(self.lengths, length_of, strict=True)]
            except CorruptFileError as error:
                yield Skipped(name=name, reason=DAMAGED, detail=str(error))
                continue
            if lengths != [n_prompt, n_answer] or n_prompt > longest or n_answer > (0 if self.answers is None else self.answers.shape[2]):
                yield Skipped(name=name, reason=SHAPES, detail=f"index.jsonl says {n_prompt} and {n_answer} tokens, the arrays {lengths}")
                continue
            if n_prompt == 0 or n_prompt < (given or 0) or (given is None and n_prompt == longest):
                yield Skipped(name=name, reason=NO_TOKENS if n_prompt == 0 else CUT)
                continue
            holds = self._described(states, ids=False, answered=self.responses)
            n_tokens = n_prompt + (n_answer if self.responses else 0)
            place = _Place(row, n_prompt, line)
            yield Entry(name=name, sha256=prompt_sha256(text), text=text, n_tokens=n_tokens, holds=holds, place=place)

    def _states(self, target: object) -> Sequence[int] | None:
        """The hidden states that were stored; the others are zeros, or missing, in the arrays."""
        count = self.prompts.shape[1]
        known = {"all": range(count), "first_half": range(count // 2), "second_half": range(count // 2, count)}
        return known.get(target) if isinstance(target, str) else None


def open_hallulens(files: Files, *, responses: bool = True, model: str | None = None) -> HallulensCapture | HallulensZarr:
    """The source of a folder of either layout.

    Raises
    ------
    NotAStoreError
        It is neither.
    """
    names = {item.name for item in files.list("")}
    for prefix in ("", "activations.zarr/"):
        if "arrays" in (names if not prefix else {item.name for item in files.list(prefix.rstrip("/"))}):
            return HallulensZarr(files, prefix, responses=responses, model=model)
    if "config.json" not in names:
        raise NotAStoreError(f"{files.url} is nothing that HalluLens wrote: it has no config.json and no arrays/")
    return HallulensCapture(files, responses=responses)


def _chunk_of(array: RawArray, number: int) -> Array:
    """One chunk of a one-dimensional array."""
    length = array.shape[0] if array.chunks is None else array.chunks[0]
    return array.rows((), number * length, min((number + 1) * length, array.shape[0]))


def _length(array: RawArray, chunk_of: Callable[[int], Array], row: int) -> int:
    """One number of a one-dimensional array, of which whole chunks are kept."""
    length = array.shape[0] if array.chunks is None else array.chunks[0]
    if row >= array.shape[0] or len(array.shape) != 1:
        raise CorruptFileError(f"{array.files.url}/{array.key} has shape {array.shape}, and a prompt is number {row}")
    return int(chunk_of(row // length)[row % length])


def _lines(files: Files, key: str) -> list[dict[str, Any]]:
    """The objects of a file with one on each line. A last line that is cut off was being written, and does not count."""
    try:
        data = files.read(key, at_most=LINES_BYTES)
    except FileNotFoundError as error:
        raise NotAStoreError(f"{files.url}/{key} does not exist") from error
    lines = data.split(b"\n")
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError("no object")
        except ValueError as error:
            if number == len(lines):
                continue
            raise CorruptFileError(f"{files.url}/{key} is damaged: line {number} holds no JSON object") from error
        found.append(value)
    return found


def _number(line: dict[str, Any], name: str) -> int | None:
    """A count in a line; None for anything else."""
    value = line.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
