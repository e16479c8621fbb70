"""Reads the datasets of activations that SAELens caches: Arrow files with one row per context, all of one number of tokens.

Layout (SAELens 6.54, ``CacheActivationsRunner``): ``state.json`` lists ``data-00000-of-00002.arrow`` and so on, Arrow streams with a column
named after the hook, such as ``blocks.3.hook_resid_post``, shape (token, hidden), and a column ``token_ids``.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from lmprobe_zarr.batch import prompt_sha256, site_of_hook
from lmprobe_zarr.bridges.entry import Entry, Held, Skipped
from lmprobe_zarr.bridges.row_source import RowSource
from lmprobe_zarr.errors import CorruptFileError, InvalidArgumentError, MissingDependencyError, NotAStoreError
from lmprobe_zarr.typing import Array

__all__ = ["SaelensActivations"]

_TOKENS: Final = "token_ids"
#: Sites whose rows are what a hook of TransformerLens has; those of heads have another shape there.
_KNOWN: Final = ("resid", "resid_mid", "attn", "mlp", "embed", "neurons")


class SaelensActivations(RowSource):
    """A folder that ``datasets`` saved, with one hook's activations, as a source of an import.

    Parameters
    ----------
    folder : Path
        Of this machine: the files are mapped into memory, not read.
    variable, layer : optional
        What the hook is called in the store, for a hook that is no site of this package.

    Raises
    ------
    NotAStoreError
        There is no such dataset.
    InvalidArgumentError
        The hook is no site of this package, and `variable` was not given; or the dataset has no token ids.
    CorruptFileError
        A file is missing or damaged.
    MissingDependencyError
        pyarrow is not installed.
    """

    def __init__(self, folder: Path, *, variable: str | None = None, layer: int | None = None) -> None:
        self.folder, self._given = folder, (variable, layer)
        self._tables = _open(folder)
        names = [name for name in self._tables[0].column_names if name != _TOKENS]
        if len(names) != 1 or _TOKENS not in self._tables[0].column_names:
            raise InvalidArgumentError(
                f"{folder} has the columns {', '.join(self._tables[0].column_names)}: expected token_ids and one hook, as SAELens writes "
                "them; without token ids it is unknown which prompts these are"
            )
        (self.hook,) = names
        site, number = site_of_hook(self.hook) if variable is None else (variable, layer)
        if site is None or (variable is None and site not in _KNOWN):
            raise InvalidArgumentError(f"{self.hook!r} is no site of this package: say with variable= and layer= how to call it")
        self._site, self._layer = site, number
        self._starts = np.concatenate([[0], np.cumsum([len(table) for table in self._tables])]).astype(np.int64)

    def __reduce__(self) -> tuple[Any, ...]:
        # The tables are mapped again, not copied.
        variable, layer = self._given
        return functools.partial(SaelensActivations, variable=variable, layer=layer), (self.folder,)

    @property
    def url(self) -> str:
        """The folder of the files."""
        return str(self.folder)

    def _rows(self, name: str, row: int) -> Array:
        """The values of one context, without a copy."""
        file = int(np.searchsorted(self._starts, row, side="right")) - 1
        cell = self._tables[file].column(name)[row - int(self._starts[file])]
        values = cell.values
        if values is None:
            return np.empty(0)
        if values.type.num_fields:  # a list of lists
            flat = values.flatten().to_numpy(zero_copy_only=False)
            return np.asarray(flat.reshape(len(values), -1))
        return np.asarray(values.to_numpy(zero_copy_only=False))

    def entries(self) -> Iterator[Entry | Skipped]:
        """One entry for each context."""
        layers = None if self._layer is None else (self._layer,)
        for row in range(int(self._starts[-1])):
            name = f"context {row}"
            ids, values = self._rows(_TOKENS, row), self._rows(self.hook, row)
            if not len(ids) or values.ndim != 2 or len(values) != len(ids) or values.dtype.kind != "f":
                yield Skipped(name=name, reason="contexts whose activations are not one row of floats for each token id")
                continue
            held = Held(level="tokens", variable=self._site, layers=layers, dtype=values.dtype.name, row_shape=values.shape[1:])
            token = Held(level="tokens", variable="token_id", layers=None, dtype="int32", row_shape=())
            digest = prompt_sha256(np.asarray(ids, np.int64))
            yield Entry(name=name, sha256=digest, text=None, n_tokens=len(ids), holds=(held, token), place=row)

    def rows(self, entry: Entry, held: Held, layer: int | None, start: int, stop: int) -> Array:
        """Some rows of one context; see `RowSource`."""
        return self._rows(_TOKENS if held.variable == "token_id" else self.hook, entry.place)[start:stop]


def _plain(pyarrow: Any, table: Any) -> Any:
    """The table without types of `datasets`, which a process has where that package was imported."""
    columns = [
        pyarrow.chunked_array([chunk.storage for chunk in column.chunks], column.type.storage_type)
        if isinstance(column.type, pyarrow.BaseExtensionType)
        else column
        for column in table.columns
    ]
    return pyarrow.table(columns, names=table.column_names)


def _open(folder: Path) -> list[Any]:
    """The tables of all files, in their order, mapped into memory."""
    try:
        state = json.loads((folder / "state.json").read_bytes())
        files = [Path(each["filename"]).name for each in state["_data_files"]]
    except FileNotFoundError as error:
        raise NotAStoreError(f"{folder} is no dataset that SAELens cached: it has no state.json") from error
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptFileError(f"{folder}/state.json is damaged: it lists no files") from error
    if not files:
        raise NotAStoreError(f"{folder}/state.json lists no files")
    try:
        import pyarrow
    except ImportError as error:
        raise MissingDependencyError("SAELens caches Arrow files: pip install lmprobe-zarr[parquet]") from error
    tables = []
    for name in files:
        try:
            with pyarrow.memory_map(str(folder / name)) as source:
                tables.append(_plain(pyarrow, pyarrow.ipc.open_stream(source).read_all()))
        except (OSError, pyarrow.ArrowException) as error:
            raise CorruptFileError(f"{folder / name} cannot be read: {str(error).splitlines()[0]}") from error
    if any(table.column_names != tables[0].column_names for table in tables):
        raise CorruptFileError(f"the files of {folder} have different columns")
    return tables
