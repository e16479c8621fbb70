"""Scores of a running sweep as a plain Zarr v3 group, in which every layer that is marked as done is complete.

Every measure is one array over all layers, with one chunk per layer (of one variable). The chunks of a layer are written first, and its
chunk of the array ``done`` last; each is written whole or not at all. A resumed sweep trusts ``done`` only where every chunk of the layer
is intact. So any number of processes may die, resume or even run at the same time: they all write the same values. ``xarray.open_zarr``
reads the group while it fills; layers that are not written yet are NaN. Never fits, and knows nothing of what scores mean.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

import google_crc32c
import numpy as np
import xarray as xr
from numcodecs.vlen import VLenUTF8

from lmprobe_zarr.errors import AlreadyCommittedError, InvalidArgumentError, NotAStoreError
from lmprobe_zarr.storage import open_storage
from lmprobe_zarr.typing import Array

if TYPE_CHECKING:
    from lmprobe_zarr.sweeps.scores import Scores

__all__ = ["ScoreStore"]

_FORMAT: Final = "lmprobe-zarr-scores"
_VERSION: Final = 1
_DONE: Final = "done"
_CRC: Final = struct.Struct("<I")
#: Dims along which an array is cut; along all others a layer has one chunk.
_CUT: Final = ("variable", "layer")
_AT_ONCE: Final = 16
_SAMPLE: Final = "activations"


class ScoreStore:
    """The place of one sweep's scores.

    Parameters
    ----------
    place : path or URL
    fingerprint : mapping
        What identifies the sweep; a place holds the scores of one sweep only.
    sample : sequence of ndarray
        Numbers computed from the activations; their last digits may differ between machines.
    storage_options : mapping, optional
        As fsspec takes them.
    """

    def __init__(
        self, place: Any, fingerprint: Mapping[str, Any], sample: Sequence[Array], storage_options: Mapping[str, Any] | None = None
    ) -> None:
        self._storage = open_storage(place, storage_options)
        self._fingerprint = {**fingerprint, _SAMPLE: [values.tolist() for values in sample]}
        self._cut: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, np.dtype[Any]] = {}
        self._named = True

    # ------------------------------------------------------------------------------------------------------------ creating

    def create(self, scores: xr.Dataset, piece: Mapping[str, Array]) -> None:
        """Create the group, unless this sweep has created it before.

        Parameters
        ----------
        scores : Dataset
            Every column, without any fit yet.
        piece : mapping of name to ndarray
            One layer (of one variable) of every column that is cut by layer.

        Raises
        ------
        InvalidArgumentError
            The place holds the scores of another sweep.
        NotAStoreError
            The place holds something else.
        """
        self._named = "variable" in scores["fit_seconds"].dims
        self._dtypes = {name: values.dtype for name, values in piece.items()}
        self._cut = {name: values.shape for name, values in piece.items()}
        if self._holds_this_sweep():
            return
        lead = [dim for dim in _CUT if dim in scores["fit_seconds"].dims]
        done = np.zeros([scores.sizes[dim] for dim in lead], bool)
        scores = scores.assign({_DONE: (lead, done, {"long_name": "all scores of this layer are there"})})
        documents = {name: self._array_document(scores, name) for name in (*scores.data_vars, *scores.coords)}
        for name, document in documents.items():
            self._storage.commit(f"{name}/zarr.json", _dump(document), durable=True)
        for name in scores.variables:
            if name not in self._cut and name != _DONE:
                self._write_whole(str(name), scores[name])
        try:
            self._storage.commit("zarr.json", _dump(self._root_document(scores, documents)), durable=True, replace=False)
        except AlreadyCommittedError:
            # Another process has created it in the meantime.
            self._holds_this_sweep()

    def _holds_this_sweep(self) -> bool:
        """Whether the place holds this sweep already."""
        try:
            document = json.loads(self._storage.read("zarr.json"))
        except FileNotFoundError:
            stray = [name for name in self._storage.list("") if not name.startswith(".")]
            if stray and not self._storage.is_file("fit_seconds/zarr.json"):
                raise NotAStoreError(f"{self._storage.url} holds {stray[0]!r} and no scores: give a new place as out") from None
            return False
        except ValueError as error:
            raise NotAStoreError(f"{self._storage.url} holds a zarr.json that is none: give a new place as out") from error
        attributes = document.get("attributes", {}) if isinstance(document, dict) else {}
        if attributes.get("format") != _FORMAT or attributes.get("format_version") != _VERSION:
            raise NotAStoreError(f"{self._storage.url} holds something else than scores of this release: give a new place as out")
        before = json.loads(attributes["sweep"])
        changed = [name for name, now in self._fingerprint.items() if name != _SAMPLE and before.get(name) != now]
        if not changed and not _agree(before.get(_SAMPLE, ()), self._fingerprint[_SAMPLE]):
            changed = [_SAMPLE]
        if changed:
            raise InvalidArgumentError(
                f"{self._storage.url} holds the scores of another sweep, with other {', '.join(changed)}:\n"
                "sweep with the same arguments to go on with it, or give a new place as out"
            )
        return True

    def _root_document(self, scores: xr.Dataset, documents: Mapping[Any, Any]) -> dict[str, Any]:
        attributes = {
            "format": _FORMAT,
            "format_version": _VERSION,
            "sweep": json.dumps(self._fingerprint, sort_keys=True),
            **scores.attrs,
            "coordinates": " ".join(str(name) for name in scores.coords if name not in scores.dims),
        }
        inline = {str(name): document for name, document in documents.items()}
        return {
            "zarr_format": 3,
            "node_type": "group",
            "attributes": attributes,
            "consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": inline},
        }

    def _array_document(self, scores: xr.Dataset, name: Any) -> dict[str, Any]:
        values = scores[name]
        text = values.dtype.kind in "UTO"
        dtype = "string" if text else values.dtype.name
        chunks = [1] * values.ndim if name == _DONE else [*self._cut.get(str(name), values.shape)]
        ordering: list[dict[str, Any]] = [{"name": "vlen-utf8"}]
        if not text:
            ordering = [{"name": "bytes"} if values.dtype.itemsize == 1 else {"name": "bytes", "configuration": {"endian": "little"}}]
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(values.shape),
            "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [max(1, size) for size in chunks]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": "" if text else _json_fill(values.dtype),
            "codecs": [*ordering, {"name": "crc32c"}],
            "attributes": {str(key): value for key, value in values.attrs.items()},
            "dimension_names": list(values.dims),
            "storage_transformers": [],
        }

    def _write_whole(self, name: str, values: xr.DataArray) -> None:
        key = ".".join(["c", *("0" for _ in values.dims)])
        self._storage.commit(f"{name}/{key}", _encode(values.values), durable=True)

    # ------------------------------------------------------------------------------------------------------- layer by layer

    def _key(self, name: str, source: int, layer: int) -> str:
        lead = [source, layer] if self._named else [layer]
        rest = [] if name == _DONE else [0] * (len(self._cut[name]) - len(lead))
        return f"{name}/" + ".".join(["c", *map(str, [*lead, *rest])])

    def write(self, source: int, layer: int, piece: Mapping[str, Array]) -> None:
        """Commit one layer of one variable: its chunks first, then the mark that it is done."""
        for name in self._cut:
            self._storage.commit(self._key(name, source, layer), _encode(piece[name]), durable=True)
        self._storage.commit(self._key(_DONE, source, layer), _encode(np.array(True)), durable=True)

    def load(self, scores: Scores) -> None:
        """Enter every layer that is done and intact into the scores; the others are fitted again."""
        places = [tuple(map(int, key.split(".")[1:])) for key in self._storage.list(_DONE) if key.startswith("c.")]
        places = [place if self._named else (0, *place) for place in places]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for (source, layer), piece in zip(places, pool.map(lambda place: self._read(*place), places), strict=True):
                if piece is not None:
                    scores.take_piece(source, layer, piece)

    def _read(self, source: int, layer: int) -> dict[str, Array] | None:
        """One layer, or None where a chunk is missing or damaged."""
        found = {}
        for name, shape in self._cut.items():
            try:
                data = self._storage.read(self._key(name, source, layer))
            except FileNotFoundError:
                return None
            dtype = self._dtypes[name]
            size = int(np.prod(shape)) * dtype.itemsize
            if len(data) != size + _CRC.size or google_crc32c.value(data[:size]) != _CRC.unpack(data[size:])[0]:
                return None
            found[name] = np.frombuffer(data[:size], dtype.newbyteorder("<")).astype(dtype).reshape(shape)
        return found

    def finish(self, scores: xr.Dataset) -> None:
        """Write what is known only at the end: why measures are NaN, and how many fits have not converged."""
        root = json.loads(self._storage.read("zarr.json"))
        documents = root["consolidated_metadata"]["metadata"]
        before = _dump(root)
        for name in scores.data_vars:
            if name in documents:
                documents[name]["attributes"] |= {str(key): value for key, value in scores[name].attrs.items()}
        root["attributes"] |= scores.attrs
        if _dump(root) == before:
            return
        for name in scores.data_vars:
            if name in self._cut and "nan_reasons" in scores[name].attrs:
                self._storage.commit(f"{name}/zarr.json", _dump(documents[name]), durable=True)
        self._storage.commit("zarr.json", _dump(root), durable=True)


def _agree(before: Sequence[Any], now: Sequence[Any]) -> bool:
    """Whether two samples are of the same activations, up to the rounding of different machines."""
    if len(before) != len(now):
        return False
    for old, new in zip(map(np.array, before), map(np.array, now), strict=True):
        if old.shape != new.shape:
            return False
        scale = np.nan_to_num(np.abs(old[:1]), posinf=0)
        if not np.isclose(old, new, rtol=0, atol=1e-3 * np.broadcast_to(scale, old.shape), equal_nan=True).all():
            return False
    return True


_FILLS: Final[Mapping[str, Callable[[], Any]]] = {"f": lambda: np.nan, "b": lambda: False, "i": lambda: -1, "u": lambda: 0}


def _fill(dtype: np.dtype[Any]) -> Any:
    return _FILLS[dtype.kind]()


def _json_fill(dtype: np.dtype[Any]) -> Any:
    return "NaN" if dtype.kind == "f" else _fill(dtype)


def _encode(values: Array) -> bytes:
    if values.dtype.kind in "UTO":
        data = bytes(VLenUTF8().encode(values.astype(object).ravel()))
    else:
        data = np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes()
    return data + _CRC.pack(google_crc32c.value(data))


def _dump(document: object) -> bytes:
    return json.dumps(document, sort_keys=True).encode()
