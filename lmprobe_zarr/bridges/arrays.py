"""Sources for folders with one array per layer, and for files of tensors over all prompts. Each is an `entry.Source`.

These files do not hold the prompts: the caller gives them, in the order of the rows. Values are read by ranges, never whole files.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmprobe_zarr.batch import TokenBatch, given_prompts, offsets_of, prompt_sha256, split_variable
from lmprobe_zarr.bridges.entry import Entry, Held, Skipped, batch_of, held_dtype, rows_of
from lmprobe_zarr.bridges.files import Files, Want
from lmprobe_zarr.bridges.lmprobe_folders import FLOATS
from lmprobe_zarr.bridges.tensors import read_header, read_tensor
from lmprobe_zarr.bridges.vllm_files import VllmFiles
from lmprobe_zarr.errors import CorruptFileError, InvalidArgumentError
from lmprobe_zarr.safetensors_file import itemsize_of, widen_bfloat16
from lmprobe_zarr.store.format import Level
from lmprobe_zarr.typing import Array

# `VllmFiles` was defined in this module once, and is documented as its name.
__all__ = ["Prompt", "RowTables", "VllmFiles", "npy_layers", "tensor_file"]
Prompt = str | Sequence[int]


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
        counts = {table.n_rows for table in tables.values()}
        try:
            given = _read_npy(files, offsets)
        except FileNotFoundError as error:
            which = f"{len(prompts)} rows, as there are prompts" if counts == {len(prompts)} else f"rows for {len(prompts)} prompts"
            raise InvalidArgumentError(
                f"{files.url}/{offsets} does not exist, and the files have {which}: if each row is one prompt, give "
                f"variable='{variable}_mean', or what it was pooled by; if each row is one token, give the file with the first row of each "
                "prompt as offsets="
            ) from error
        rows = _runs(given, len(prompts), f"{files.url}/{offsets}")
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
    shape, dtype, start, _ = _npy_header(files, key)
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
