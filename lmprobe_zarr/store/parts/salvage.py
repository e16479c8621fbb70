"""What is known of a part whose document is damaged or gone, from the arrays beside it. Never writes."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from lmprobe_zarr.batch import HASH_DIGITS, digests_of
from lmprobe_zarr.errors import AccessDeniedError, CorruptPartError, UnreachableError
from lmprobe_zarr.storage import Storage
from lmprobe_zarr.store.format import (
    ANNOTATIONS,
    FORMAT_COLUMNS,
    LEVELS,
    PartInfo,
    file_entry,
    is_variable,
    parse_array,
    parse_removed,
)
from lmprobe_zarr.store.parts.stored_array import StoredArray
from lmprobe_zarr.typing import Ints

__all__ = ["NO_LAYER", "Cell", "Salvaged", "salvage"]

#: A variable with its level, and a layer of it (−1 where it has none).
Cell = tuple[str, int]
NO_LAYER: Final = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Salvaged:
    """What could be found out about a part.

    Parameters
    ----------
    info : PartInfo
        Its prompts, their numbers of tokens, and what it removes where it is a tombstone; without arrays and files.
    cells : mapping of Cell to ndarray of int
        What it held: the prompts, all of them, of each variable and layer.
    columns : tuple of str
        The user's own columns, by their keys.
    texts : mapping of bytes to str
        Texts of its prompts, by their hashes.
    """

    info: PartInfo
    cells: Mapping[Cell, Ints]
    columns: tuple[str, ...]
    texts: Mapping[bytes, str]


def salvage(storage: Storage, path: str) -> Salvaged | None:
    """What is known of the part in a folder; None where not even its prompts and the names of its arrays can be read.

    Raises
    ------
    AccessDeniedError, UnreachableError
    """
    cells: list[Cell] = []
    columns: list[str] = []
    removed: dict[str, tuple[int, ...] | None] = {}
    try:
        digests = _read_column(storage, path, "prompts/prompt_sha256")
        for level in LEVELS:
            names = [name for name in storage.list(f"{path}/{level}") if name != "zarr.json"]
            layers = [int(layer) for layer in _read_column(storage, path, f"{level}/layer")] if "layer" in names else []
            for name in names:
                array = parse_array(json.loads(storage.read(f"{path}/{level}/{name}/zarr.json")))
                if is_variable(name, array):
                    cells += [(f"{level}/{name}", layer) for layer in (layers if array.layered else [NO_LAYER])]
                elif level == "prompts" and name not in FORMAT_COLUMNS:
                    columns.append(f"{level}/{name}")
                removed |= parse_removed(array.attributes.get("removed", {}))
        counts = _read_column(storage, path, "prompts/n_tokens") if "n_tokens" in storage.list(f"{path}/prompts") else None
        info = PartInfo(
            group=path.partition("/")[0],
            name=path.rpartition("/")[2],
            kind="annotation" if f"/{ANNOTATIONS}/" in path else "part",
            digests=digests_of(digests),
            n_tokens=None if counts is None else np.array(counts, np.int64),
            arrays={},
            files={},
            removed=removed,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:  # the last of a file that was cut off
        if isinstance(error, (AccessDeniedError, UnreachableError)):
            raise
        return None
    texts: dict[bytes, str] = {}
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, CorruptPartError, struct.error):
        stored = _read_column(storage, path, "prompts/text")
        texts = {bytes.fromhex(digest[:HASH_DIGITS]): text for digest, text in zip(digests, stored, strict=True)}
    every = np.arange(len(digests))
    return Salvaged(info=info, cells=dict.fromkeys(cells, every), columns=tuple(columns), texts=texts)


def _read_column(storage: Storage, path: str, key: str) -> list[Any]:
    """Read a column without the part's table: its chunks still end in their own checksums."""
    array = parse_array(json.loads(storage.read(f"{path}/{key}/zarr.json")))
    files = {f"{key}/{chunk}": file_entry(storage.read(f"{path}/{key}/{chunk}"), chunk=True) for chunk in array.file_names()}
    stored = StoredArray(storage, f"{path}/{key}", array, files)
    return [value for block in range(array.n_blocks) for value in stored.read_chunk(0, block).tolist()][: array.shape[0]]
