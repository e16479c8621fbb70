"""Reads lmprobe's oldest caches, format v1: one ``.pt`` file per layer, in a folder per prompt (0.4 to 0.5.5) or per list of prompts
(0.2, 0.3). From a pickle, nothing but tensors is ever loaded.

These caches hold no names and no texts: the caller gives both, or a prompt is known by its hash only.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lmprobe_zarr.batch import HASH_DIGITS, POOLINGS, TokenBatch, digest_of_hash, prompt_hash, prompt_sha256
from lmprobe_zarr.bridges.entry import Entry, Held, Skipped, batch_of, rows_of
from lmprobe_zarr.bridges.files import Files, LocalFiles
from lmprobe_zarr.bridges.lmprobe_folders import (
    DAMAGED,
    DTYPE,
    FIRST_TOKEN,
    FLOATS,
    NO_MASK,
    NO_TOKENS,
    NOTHING,
    OUTSIDE,
    SHAPES,
    model_hash,
)
from lmprobe_zarr.errors import CorruptFileError, MissingDependencyError
from lmprobe_zarr.safetensors_file import widen_bfloat16
from lmprobe_zarr.typing import Array

__all__ = ["LmprobeV1", "prompts_hash"]

FOLDER: Final = re.compile(r"[0-9a-f]{16}")
LAYER_FILE: Final = re.compile(r"layer_(\d{1,9})\.pt")
PERPLEXITY: Final = "perplexity"
PT_BYTES: Final = 2**40
UNSAFE: Final = "files whose pickle holds more than tensors, such as code: refused"
NEWER: Final = "prompts that are stored in format v2 too, which is preferred: use import_safetensors"
BATCH: Final = "folders of a whole list of prompts: give that list as prompts="


def prompts_hash(prompts: Sequence[str]) -> str:
    """The folder of a list of prompts in lmprobe 0.2 and 0.3."""
    return hashlib.sha256(json.dumps(list(prompts), sort_keys=True, ensure_ascii=True).encode()).hexdigest()[:HASH_DIGITS]


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    """Where an entry is stored: its folder, its row in the folder's tensors, and the attention mask of that row."""

    folder: str
    row: int
    batch: int
    mask: npt.NDArray[np.bool_] | None


class LmprobeV1:
    """The entries of one model in a cache of format v1. Nothing is read when it is made.

    Parameters
    ----------
    files : Files
        The cache.
    model : str
        Name of the model.
    prompts : sequence of str, optional
        Texts. Each text may have a folder, and so may the list as a whole (0.2, 0.3). None for every folder; prompts are then known by
        their hashes.
    """

    def __init__(self, files: Files, model: str, *, prompts: Sequence[str] | None = None) -> None:
        self.files, self.model, self.folder = files, model, model_hash(model)
        self.prompts = None if prompts is None else list(prompts)
        self._holds: dict[tuple[Held, ...], tuple[Held, ...]] = {}
        self._newer: frozenset[str] = frozenset()

    @property
    def url(self) -> str:
        """The folder of the model's files."""
        return f"{self.files.url}/{self.folder}"

    def entries(self) -> Iterator[Entry | Skipped]:
        """What the folder holds, described from the shapes of its tensors."""
        listed = self.files.list(self.folder)
        self._newer = frozenset(item.name.removesuffix(".safetensors") for item in listed if item.name.endswith(".safetensors"))
        folders = {item.name: item for item in listed if FOLDER.fullmatch(item.name)}
        if self.prompts is None:
            for name, item in folders.items():
                if item.outside:
                    yield Skipped(name=name, reason=OUTSIDE)
                elif item.is_folder:
                    yield from self._folder(name, None)
            return
        together = prompts_hash(self.prompts)
        found = set()
        if together in folders:
            for entry in self._folder(together, self.prompts):
                found.add(entry.sha256 if isinstance(entry, Entry) else "")
                yield entry
        for text in dict.fromkeys(self.prompts):
            name = prompt_hash(text)
            if name not in folders and FOLDER.fullmatch(text) and text in folders:
                yield from self._folder(text, None)
            elif name in folders and folders[name].outside:
                yield Skipped(name=name, reason=OUTSIDE)
            elif name in folders:
                if prompt_sha256(text) not in found:
                    yield from self._folder(name, [text])
            elif together not in folders:
                yield Skipped(name=f"{name} ({text[:24]!r})", reason="prompts that are not in this cache")

    def find(self, prompts: Sequence[str]) -> list[list[Entry | Skipped] | None]:
        """The entries of some prompts, in their order; None for a prompt without any. Folders of lists of prompts are not searched."""
        found: list[list[Entry | Skipped] | None] = []
        for text in prompts:
            name = prompt_hash(text)
            found.append(list(self._folder(name, [text])) if self.files.list(f"{self.folder}/{name}") else None)
        return found

    # ----------------------------------------------------------------------------------------------------- describing

    def _folder(self, name: str, texts: Sequence[str] | None) -> Iterator[Entry | Skipped]:
        if name in self._newer:
            yield Skipped(name=name, reason=NEWER)
            return
        try:
            yield from self._describe(name, texts)
        except _SkippedError as error:
            yield Skipped(name=name, reason=error.reason, detail=error.detail)

    def _describe(self, name: str, texts: Sequence[str] | None) -> Iterator[Entry | Skipped]:
        folder = f"{self.folder}/{name}"
        notes: list[str] = []
        mask = self._shapes(f"{folder}/attention_mask.pt")
        raw, pooled, perplexity = self._tensors(folder)
        if perplexity is None:
            perplexity = self._shapes(_perplexity_file(folder))
        if not raw and not pooled and perplexity is None:
            return  # not lmprobe's folder
        batch = next((t.shape[0] for t in (mask, *raw.values(), *(t for by in pooled.values() for t in by.values())) if t is not None), 1)
        if texts is None and batch != 1:
            raise _SkippedError(BATCH, f"{name} holds {batch}")
        if texts is not None and batch != len(texts):
            raise _SkippedError(SHAPES, f"{name} holds {batch} prompts, and {len(texts)} were given")
        kept = None if mask is None else np.asarray(self._load(f"{folder}/attention_mask.pt")[0]) != 0
        if kept is not None and (kept.ndim != 2 or kept.shape[0] != batch):
            raise _SkippedError(SHAPES, f"attention_mask has shape {kept.shape}")
        holds = self._describe_holds(raw, pooled, perplexity, kept, batch, notes)
        if not holds:
            raise _SkippedError(NOTHING, "; ".join(notes))
        holds = self._holds.setdefault(holds, holds)
        for row in range(batch):
            text = None if texts is None else texts[row]
            count = None if kept is None else int(kept[row].sum())
            label = name if batch == 1 else f"{name}[{row}]"
            if count == 0:
                yield Skipped(name=label, reason=NO_TOKENS)
                continue
            yield Entry(
                name=label,
                sha256=digest_of_hash(name) if text is None else prompt_sha256(text),
                text=text,
                n_tokens=count,
                holds=holds,
                notes=tuple(notes),
                place=_Place(folder, row, batch, None if kept is None else kept[row]),
            )

    def _describe_holds(
        self,
        raw: Mapping[int, _Shape],
        pooled: Mapping[str, Mapping[int, _Shape]],
        perplexity: _Shape | None,
        mask: Array | None,
        batch: int,
        notes: list[str],
    ) -> tuple[Held, ...]:
        found: dict[tuple[Any, ...], list[int]] = {}
        widths = {t.shape[-1] for t in (*raw.values(), *(t for by_layer in pooled.values() for t in by_layer.values())) if t.shape}
        if len(widths) > 1 or 0 in widths:
            raise _SkippedError(SHAPES, f"rows of {sorted(widths)} values")

        def add(level: str, variable: str, tensor: _Shape, layer: int) -> None:
            if tensor.dtype in FLOATS:
                found.setdefault((level, variable, tensor.dtype, tensor.shape[-1:]), []).append(layer)
            elif DTYPE not in notes:
                notes.append(DTYPE)

        for layer, tensor in raw.items():
            if mask is None:
                if NO_MASK not in notes:
                    notes.append(NO_MASK)
                continue
            if len(tensor.shape) != 3 or tensor.shape[:2] != mask.shape:
                raise _SkippedError(SHAPES, f"layer_{layer} has shape {tensor.shape}, and the mask has shape {mask.shape}")
            add("tokens", "resid", tensor, layer)
        for pooling, by_layer in pooled.items():
            for layer, tensor in by_layer.items():
                if len(tensor.shape) != 2 or tensor.shape[0] != batch:
                    raise _SkippedError(SHAPES, f"pooled_{pooling}/layer_{layer} has shape {tensor.shape}")
                if pooling != "first_token":
                    add("prompts", f"resid_{pooling}", tensor, layer)
                elif layer in raw and mask is not None:
                    add("prompts", "resid_first_token", raw[layer], layer)
                elif FIRST_TOKEN not in notes:
                    notes.append(FIRST_TOKEN)
        holds = [
            Held(level=level, variable=variable, layers=tuple(sorted(layers)), dtype=dtype, row_shape=row)
            for (level, variable, dtype, row), layers in sorted(found.items())
        ]
        if perplexity is not None:
            if perplexity.shape not in {(3,), (batch, 3)}:
                raise _SkippedError(SHAPES, f"perplexity has shape {perplexity.shape}")
            holds.append(Held(level="prompts", variable="perplexity", layers=None, dtype=perplexity.dtype, row_shape=(3,)))
        return tuple(holds)

    def _tensors(self, folder: str) -> tuple[dict[int, _Shape], dict[str, dict[int, _Shape]], _Shape | None]:
        raw: dict[int, _Shape] = {}
        pooled: dict[str, dict[int, _Shape]] = {}
        perplexity = None
        for item in self.files.list(folder):
            match = LAYER_FILE.fullmatch(item.name)
            if item.outside:
                raise _SkippedError(OUTSIDE, item.name)
            if match:
                raw[int(match[1])] = self._shape(f"{folder}/{item.name}")
            elif item.name == "perplexity.pt":
                perplexity = self._shape(f"{folder}/{item.name}")
            elif item.is_folder and item.name.removeprefix("pooled_").removeprefix("activation:") in POOLINGS:
                by_layer = pooled.setdefault(item.name.removeprefix("pooled_").removeprefix("activation:"), {})
                for file in self.files.list(f"{folder}/{item.name}"):
                    match = LAYER_FILE.fullmatch(file.name)
                    if file.outside:
                        raise _SkippedError(OUTSIDE, file.name)
                    if match:
                        by_layer[int(match[1])] = self._shape(f"{folder}/{item.name}/{file.name}")
        return raw, pooled, perplexity

    # -------------------------------------------------------------------------------------------------------- reading

    def read(self, entries: Sequence[Entry], holds: Sequence[Held]) -> TokenBatch:
        """Read some variables and layers of some entries, as one batch; see `entry.Source`."""
        offsets = rows_of(entries)
        arrays = {held: held.empty(int(offsets[held.level][-1])) for held in holds}
        by_folder: dict[str, list[int]] = {}
        for i, entry in enumerate(entries):
            by_folder.setdefault(entry.place.folder, []).append(i)
        for members in by_folder.values():
            for held, array in arrays.items():
                for j, layer in enumerate((None,) if held.layers is None else held.layers):
                    self._read_layer([entries[i] for i in members], held, layer, array[j], offsets[held.level][members])
        return batch_of(entries, arrays)

    def _read_layer(self, entries: Sequence[Entry], held: Held, layer: int | None, out: Array, starts: Array) -> None:
        """Read rows of one variable and layer for entries of one folder; its file is loaded once."""
        folder = entries[0].place.folder
        pooling = held.variable.removeprefix("resid_")
        names = [f"{folder}/layer_{layer}.pt"]
        if held.variable == PERPLEXITY:
            names = [f"{folder}/perplexity.pt", _perplexity_file(folder)]
        elif held.level == "prompts" and pooling != "first_token":
            names = [f"{folder}/pooled_{pooling}/layer_{layer}.pt", f"{folder}/pooled_activation:{pooling}/layer_{layer}.pt"]
        try:
            values, _ = next(loaded for loaded in (self._load_or_none(name) for name in names) if loaded is not None)
        except (StopIteration, _SkippedError) as error:
            raise CorruptFileError(f"{self.files.url}/{names[0]} was removed or damaged after it was described") from error
        for entry, start in zip(entries, starts.tolist(), strict=True):
            place: _Place = entry.place
            try:
                if held.variable == PERPLEXITY:
                    out[start] = values.reshape(-1, 3)[place.row]
                elif held.level == "tokens":
                    assert place.mask is not None  # noqa: S101 — token variables need a mask
                    out[start : start + (entry.n_tokens or 0)] = values[place.row][place.mask]
                elif pooling == "first_token":
                    assert place.mask is not None  # noqa: S101 — it is pooled from the tokens
                    out[start] = values[place.row][int(np.argmax(place.mask))]
                else:
                    out[start] = values[place.row]
            except (IndexError, ValueError) as error:
                raise CorruptFileError(f"{self.files.url}/{names[0]} has changed since it was described") from error

    # -------------------------------------------------------------------------------------------------------- loading

    def _shapes(self, key: str) -> _Shape | None:
        try:
            return self._shape(key)
        except FileNotFoundError:
            return None

    def _shape(self, key: str) -> _Shape:
        tensor = self._tensor(key)
        return _Shape(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

    def _load(self, key: str) -> tuple[Array, str]:
        import torch

        tensor = self._tensor(key).detach().contiguous()
        if tensor.dtype == torch.bfloat16:
            return widen_bfloat16(tensor.view(torch.int16).numpy().view(np.uint16)), "bfloat16"
        return tensor.numpy(), str(tensor.dtype).removeprefix("torch.")

    def _load_or_none(self, key: str) -> tuple[Array, str] | None:
        try:
            return self._load(key)
        except FileNotFoundError:
            return None

    def _tensor(self, key: str) -> Any:
        """The tensor of a file. If the file allows it, values are read only when they are needed.

        Raises
        ------
        FileNotFoundError
            The file does not exist.
        _SkippedError
            It is damaged, holds something else, or is a pickle that would run code.
        """
        try:
            import torch
        except ModuleNotFoundError as error:
            raise MissingDependencyError(
                "lmprobe's .pt files are read by torch, which is not installed: pip install 'lmprobe-zarr[models]'"
            ) from error
        name = key.removeprefix(f"{self.folder}/")
        try:
            head, _ = self.files.head(key)
        except FileNotFoundError:
            raise
        except (CorruptFileError, PermissionError) as error:
            raise _SkippedError(OUTSIDE if "leads out" in str(error) else DAMAGED, str(error)) from error
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns about the protocol of the pickle
                if isinstance(self.files, LocalFiles):
                    # Memory-mapped, to read only the rows in use. Files from before torch 1.6 are no archives and cannot be mapped.
                    path, mapped = f"{self.files.root}/{key}", head.startswith(b"PK")
                    _check_archive(path if mapped else None)
                    tensor = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
                else:
                    data = io.BytesIO(self.files.read(key, at_most=PT_BYTES))
                    _check_archive(data if head.startswith(b"PK") else None)
                    tensor = torch.load(data, map_location="cpu", weights_only=True)
        except Exception as error:  # an untrusted file can make torch raise anything
            reason = UNSAFE if type(error).__name__ == "UnpicklingError" else DAMAGED
            named = re.search(r"GLOBAL (\S+)", str(error))
            detail = f"it names {named[1]}" if named else str(error).partition("\n")[0][:120] or type(error).__name__
            raise _SkippedError(reason, f"{name}: {detail}") from error
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise _SkippedError(SHAPES, f"{name} holds a {type(tensor).__name__}, not a plain tensor")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            # With a stride of 0, a file of four bytes claims terabytes, which would fill the memory when read.
            raise _SkippedError(SHAPES, f"{name} has shape {tuple(tensor.shape)}, and fewer bytes than that")
        return tensor


def _check_archive(file: str | io.BytesIO | None) -> None:
    """Raise ValueError if an archive has compressed records. torch writes none; mapped, they are garbage; read, they may fill memory."""
    if file is None:
        return
    with zipfile.ZipFile(file) as archive:
        if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
            raise ValueError("its records are compressed, which torch does not do")
    if isinstance(file, io.BytesIO):
        file.seek(0)


def _perplexity_file(folder: str) -> str:
    """The file in which lmprobe 0.2 to 0.4 kept the perplexities of a whole list of prompts."""
    parent, _, name = folder.rpartition("/")
    return f"{parent}/perplexity_{name}.pt"


@dataclass(frozen=True, slots=True)
class _Shape:
    shape: tuple[int, ...]
    dtype: str


class _SkippedError(Exception):
    """A folder that cannot be imported, with the reason under which it is counted."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail
