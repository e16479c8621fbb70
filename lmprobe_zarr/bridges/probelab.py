"""Reads what probelab's ``storage`` saves: a folder of one memory-mapped file per layer, or an HDF5 file.

Layouts (probelab 0.1.0 and 0.1.1, ``probelab/storage``): ``meta.json`` with ``offsets.bin`` (int64), ``detection_mask.bin`` and
``layer_<n>.bin``, bits of bfloat16, shape (token, hidden); or the datasets ``data``, ``offsets``, ``layers`` and ``detection_mask`` of an
HDF5 file, whose attribute ``dims`` is ``bh``, ``blh``, ``bsh`` or ``blsh``. Where there are tokens, those of all prompts are end to end.
Neither holds the model or the prompts.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from lmprobe_zarr.batch import given_prompts, prompt_sha256, split_variable
from lmprobe_zarr.bridges.entry import Entry, Held, Skipped
from lmprobe_zarr.bridges.files import Files, open_source
from lmprobe_zarr.bridges.lmprobe_folders import NO_TOKENS
from lmprobe_zarr.bridges.raw_arrays import RawArray, open_file_array, read_json
from lmprobe_zarr.bridges.row_source import RowSource
from lmprobe_zarr.errors import (
    CorruptFileError,
    InvalidArgumentError,
    MissingDependencyError,
    NotAStoreError,
    UnsupportedVersionError,
)
from lmprobe_zarr.safetensors_file import widen_bfloat16
from lmprobe_zarr.store.format import Level
from lmprobe_zarr.typing import Array, Ints

__all__ = ["ProbelabActivations", "open_probelab"]
Prompt = str | Sequence[int]

FORMAT: Final = "memmap_v1"
_DIMS: Final = ("bh", "blh", "bsh", "blsh")
_SUFFIXES: Final = frozenset({".h5", ".hdf5", ".he5"})
_STORED: Final = {"torch.bfloat16": ("bfloat16", "uint16"), "torch.float32": ("float32", "float32")}
MASKS: Final = "detection masks, which are left out"
#: Rows of one layer, by its place among the stored ones: (place, start, stop) to an array of shape (stop - start, hidden).
Reader = Callable[[int, int, int], Array]


class ProbelabActivations(RowSource):
    """Activations of probelab, whichever file they are in.

    Parameters
    ----------
    url : str
        The folder or file.
    read : callable
        Reads rows of one layer.
    dtype, width
        Of a row.
    prompts : sequence of str or of token ids
        In the order of the rows.
    offsets : ndarray of int64, shape (prompt + 1,), optional
        The first row of each prompt, and the end of the last. None for one row per prompt.
    variable : str, optional
        What it is called; None for `resid`, if there is a row for each token.
    stored : sequence of int, optional
        The numbers of the layers in the file.
    layers : sequence of int, optional
        Instead of these, the blocks that they are, from 0.
    masked : bool
        Whether probelab marks only some of the tokens.

    Raises
    ------
    InvalidArgumentError
        The file does not say the layer or the pooling, and neither does the call; or the numbers of prompts or tokens differ.
    """

    def __init__(
        self,
        url: str,
        read: Reader,
        dtype: str,
        width: int,
        prompts: Sequence[Prompt] | None,
        *,
        n_rows: int,
        offsets: Ints | None,
        variable: str | None,
        stored: Sequence[int] | None,
        layers: Sequence[int] | None,
        masked: bool,
        is_local: bool = True,
    ) -> None:
        self._url, self._read, self.is_local = url, read, is_local
        if prompts is None:
            raise InvalidArgumentError(
                f"{url} does not say which prompts these are: give them with prompts=, in the order in which they were run"
            )
        self.prompts, self.offsets, self.masked = given_prompts(prompts), offsets, masked
        count = n_rows if offsets is None else len(offsets) - 1
        if len(self.prompts) != count:
            raise InvalidArgumentError(f"{url} holds {count} prompts, and {len(self.prompts)} were given")
        level: Level = "prompts" if offsets is None else "tokens"
        if variable is None and offsets is None:
            raise InvalidArgumentError(
                f"{url} holds one row per prompt and does not say how they were pooled: give variable='resid_mean', …"
            )
        self.variable = variable or "resid"
        if (split_variable(self.variable)[1] is not None) != (offsets is None):
            raise InvalidArgumentError(f"variable={self.variable!r} does not fit {url}, which holds one row per {level.rstrip('s')}")
        self._places = _places(url, stored, layers)
        held = Held(level=level, variable=self.variable, layers=tuple(sorted(self._places)), dtype=dtype, row_shape=(width,))
        self._holds = (held,)

    @property
    def url(self) -> str:
        """The folder or file."""
        return self._url

    def entries(self) -> Iterator[Entry | Skipped]:
        """One entry per prompt."""
        notes = (MASKS,) if self.masked else ()
        for number, prompt in enumerate(self.prompts):
            name = f"prompt number {number}"
            count = None if self.offsets is None else int(self.offsets[number + 1] - self.offsets[number])
            if count == 0:
                yield Skipped(name=name, reason=NO_TOKENS)
                continue
            if count is not None and not isinstance(prompt, str) and len(prompt) != count:
                raise InvalidArgumentError(f"prompts[{number}] has {len(prompt)} token ids, and {self.url} has {count} tokens for it")
            text = prompt if isinstance(prompt, str) else None
            yield Entry(name=name, sha256=prompt_sha256(prompt), text=text, n_tokens=count, holds=self._holds, notes=notes, place=number)

    def rows(self, entry: Entry, held: Held, layer: int | None, start: int, stop: int) -> Array:
        """Some rows of one layer; see `RowSource`."""
        first = entry.place if self.offsets is None else int(self.offsets[entry.place])
        return self._read(self._places[layer or 0], first + start, first + stop)


def _places(url: str, stored: Sequence[int] | None, layers: Sequence[int] | None) -> dict[int, int]:
    """For each block the place of its layer in the file."""
    if stored is None and layers is None:
        raise InvalidArgumentError(f"{url} holds one layer and does not say which: give layers=[…], the block whose output it is, from 0")
    numbers = [int(n) for n in (stored if layers is None else layers) or ()]
    if len(numbers) != (1 if stored is None else len(stored)) or len(set(numbers)) != len(numbers) or min(numbers, default=0) < 0:
        raise InvalidArgumentError(
            f"{url} holds {1 if stored is None else len(stored)} layers, and layers are {numbers}: give a different block, from 0, for each"
        )
    return {number: place for place, number in enumerate(numbers)}


def open_probelab(
    path: str | os.PathLike[str],
    *,
    prompts: Sequence[Prompt] | None,
    variable: str | None = None,
    layers: Sequence[int] | None = None,
    storage_options: Any = None,
) -> ProbelabActivations:
    """The source of a folder or an HDF5 file that probelab saved; see `ProbelabActivations`.

    Raises
    ------
    NotAStoreError, UnsupportedVersionError, CorruptFileError
        It is neither, of another version, or damaged.
    MissingDependencyError
        It is an HDF5 file, and h5py is not installed.
    """
    local = Path(path)
    if "://" in str(path) and local.suffix in _SUFFIXES:
        raise InvalidArgumentError(f"{path} is an HDF5 file elsewhere: copy it to this machine, as h5py reads it")
    if local.is_file():
        return _open_hdf5(local, prompts, variable, layers)
    return _open_memmap(open_source(path, storage_options), prompts, variable, layers)


def _open_memmap(files: Files, prompts: Sequence[Prompt] | None, variable: str | None, layers: Sequence[int] | None) -> ProbelabActivations:
    try:
        meta = read_json(files, "meta.json")
    except FileNotFoundError as error:
        raise NotAStoreError(f"{files.url} is nothing that probelab saved: it is no HDF5 file, and has no meta.json") from error
    if meta.get("format") != FORMAT:
        raise UnsupportedVersionError(f"{files.url}/meta.json has the format {meta.get('format')!r:.60}, expected {FORMAT!r}")
    try:
        count, total, width = (int(meta[name]) for name in ("n_samples", "total_tokens", "hidden_dim"))
        stored = [int(n) for n in meta["layers"]]
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(f"{files.url}/meta.json is damaged: {error}") from error
    if min(count, total) < 0 or width < 1 or not stored:
        raise CorruptFileError(f"{files.url}/meta.json has sizes that no array has")
    offsets = _checked(open_file_array(files, "offsets.bin", "int64", (count + 1,)).read(), total, f"{files.url}/offsets.bin")
    mask = open_file_array(files, "detection_mask.bin", "uint8", (total,)).read()
    arrays = [open_file_array(files, f"layer_{number}.bin", "bfloat16", (total, width)) for number in stored]
    return ProbelabActivations(
        files.url, _Layers(tuple(arrays)), "bfloat16", width, prompts, n_rows=total, offsets=offsets, variable=variable, stored=stored,
        layers=layers, masked=not mask.all(), is_local=files.is_local,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Layers:
    """A `Reader` of one array per layer."""

    arrays: tuple[RawArray, ...]

    def __call__(self, place: int, start: int, stop: int) -> Array:
        return self.arrays[place].rows((), start, stop)


def _checked(offsets: Array, total: int, where: str) -> Ints:
    if not len(offsets) or offsets[0] != 0 or offsets[-1] != total or (np.diff(offsets) < 0).any():
        raise CorruptFileError(f"{where} does not ascend from 0 to the {total} tokens that there are")
    return np.asarray(offsets, np.int64)


class _Hdf5:
    """An HDF5 file, opened again in each process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened: tuple[int, Any] = (-1, None)
        self._datasets: dict[str, Any] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hdf5, (self.path,)

    def file(self) -> Any:
        """The open file."""
        try:
            import h5py
        except ImportError as error:
            raise MissingDependencyError(
                "probelab's HDF5 files are read by h5py, which is not installed: pip install lmprobe-zarr[hdf5]"
            ) from error
        with self._lock:
            if self._opened[0] != os.getpid():
                try:
                    found = h5py.File(self.path, "r")
                    # Links to other files are not followed, here as in `dataset`.
                    data = found["data"] if isinstance(found.get("data", getlink=True), h5py.HardLink) else None
                    if isinstance(data, h5py.Dataset) and data.chunks is not None and data.id.get_create_plist().get_nfilters():
                        # A compressed chunk has all layers of up to 4096 tokens. Without room for two, a prompt across
                        # them has both decompressed for every read.
                        room = 2 * math.prod(data.chunks) * data.dtype.itemsize
                        found.close()
                        found = h5py.File(self.path, "r", rdcc_nbytes=room + 1)
                except OSError as error:
                    raise CorruptFileError(f"{self.path} is no HDF5 file, or is cut off: {str(error).splitlines()[0]}") from error
                self._opened, self._datasets = (os.getpid(), found), {}
            return self._opened[1]

    def dataset(self, name: str) -> Any:
        """A dataset of the file itself; None if there is none.

        Raises
        ------
        CorruptFileError
            It is a link, or its values are in other files.
        """
        import h5py

        file = self.file()
        if name in self._datasets:
            return self._datasets[name]
        link = file.get(name, getlink=True)
        if link is None:
            return None
        found = file[name] if isinstance(link, h5py.HardLink) else None
        if not isinstance(found, h5py.Dataset) or found.external or found.is_virtual:
            raise CorruptFileError(f"{self.path}: {name!r} leads to other files, or is no dataset: it is not followed")
        # Kept, because HDF5 forgets the chunks that it has decompressed when a dataset is closed.
        self._datasets[name] = found
        return found


@dataclass(frozen=True, slots=True)
class _Data:
    """A `Reader` of the dataset ``data``, shape (row, layer, hidden) or (row, hidden)."""

    source: _Hdf5
    layered: bool
    dtype: str

    def __call__(self, place: int, start: int, stop: int) -> Array:
        found = self.source.dataset("data")
        try:
            values = np.asarray(found[start:stop, place] if self.layered else found[start:stop])
        except (OSError, ValueError) as error:
            raise CorruptFileError(f"{self.source.path}: rows {start} to {stop} cannot be read: {str(error).splitlines()[0]}") from error
        return widen_bfloat16(values.view(np.uint16)) if self.dtype == "bfloat16" else values


def _open_hdf5(path: Path, prompts: Sequence[Prompt] | None, variable: str | None, layers: Sequence[int] | None) -> ProbelabActivations:
    source = _Hdf5(path)
    attributes = source.file().attrs
    dims, kind = str(attributes.get("dims", "")), str(attributes.get("dtype", ""))
    data = source.dataset("data")
    if data is None or dims not in _DIMS or kind not in _STORED:
        raise NotAStoreError(f"{path} is no file of probelab: it has dims {dims!r:.20} and dtype {kind!r:.30}, or no data")
    dtype, held = _STORED[kind]
    expected = len(dims) - ("s" in dims)
    if data.ndim != expected or data.dtype not in {np.dtype(held), np.dtype("int16" if held == "uint16" else held)} or not data.shape[-1]:
        raise CorruptFileError(f"{path}: data has {data.dtype} of shape {data.shape}, which {dims} of {kind} has not")
    numbers, offsets, mask = (source.dataset(name) for name in ("layers", "offsets", "detection_mask"))
    stored = None
    if "l" in dims:
        stored = [] if numbers is None else [int(n) for n in numbers[()]]
        if len(stored) != data.shape[1]:
            raise CorruptFileError(f"{path}: layers names {len(stored)} layers, and data has {data.shape[1]}")
    firsts: Ints | None = None
    if "s" in dims:
        if offsets is None or offsets.ndim != 1 or offsets.dtype.kind not in "iu":
            raise CorruptFileError(f"{path} has no offsets, which say where each prompt begins")
        firsts = _checked(offsets[()], data.shape[0], f"{path}: offsets")
    masked = mask is not None and not bool(np.asarray(mask[()]).all())
    reader = _Data(source, layered="l" in dims, dtype=dtype)
    return ProbelabActivations(
        str(path), reader, dtype, int(data.shape[-1]), prompts, n_rows=int(data.shape[0]), offsets=firsts, variable=variable, stored=stored,
        layers=layers, masked=masked,
    )  # fmt: skip
