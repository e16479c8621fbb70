"""The xarray engine ``lmprobe_zarr``, which opens stores with `xarray.open_dataset` and `xarray.open_datatree`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import xarray as xr
from xarray.backends import BackendEntrypoint

from lmprobe_zarr.batch import LayerSpec
from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.store import Dtype, Model, Store, open_to_read, to_dataset
from lmprobe_zarr.store.format import LEVELS, Level, Provenance, is_root_document
from lmprobe_zarr.tokens import without_coordinates

__all__ = ["LmprobeZarrBackend"]


class LmprobeZarrBackend(BackendEntrypoint):
    """Opens a store, read-only, through xarray.

    With ``chunks=``, activations become Dask arrays, named after what is stored. Columns and coordinates of indexes stay as they are.

    Examples
    --------
    >>> import xarray as xr
    >>> xr.open_dataset(url, engine="lmprobe_zarr", model="gpt2", level="tokens")  # doctest: +SKIP
    """

    description = "Language-model activations in an lmprobe-zarr store"
    url = "https://pypi.org/project/lmprobe-zarr/"
    open_dataset_parameters: ClassVar[tuple[str, ...]] = (
        "filename_or_obj",
        "drop_variables",
        "model",
        "level",
        "prompts",
        "layers",
        "provenance",
        "group",
        "dtype",
        "storage_options",
    )
    supports_groups = True

    def open_dataset(
        self,
        filename_or_obj: Any,
        *,
        drop_variables: str | Iterable[str] | None = None,
        model: Model | None = None,
        level: Level = "prompts",
        prompts: Iterable[Any] | None = None,
        layers: LayerSpec | None = None,
        provenance: Provenance | None = None,
        group: str | None = None,
        dtype: Dtype = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> xr.Dataset:
        """One level of one group; see `Store.dataset` and `Store.tokens` for the arguments and errors."""
        if level not in LEVELS:
            raise InvalidArgumentError(f"level={level!r} is unknown: use 'prompts' (one row per prompt) or 'tokens' (one row per token)")
        store = _open(filename_or_obj, storage_options)
        view = store.view(store.find_group(model, provenance=provenance, group=group))
        data = to_dataset(view, level, prompts=prompts, layers=layers, dtype=dtype)
        dropped = [drop_variables] if isinstance(drop_variables, str) else list(drop_variables or ())
        return without_coordinates(data, dropped)

    def open_datatree(
        self,
        filename_or_obj: Any,
        *,
        drop_variables: str | Iterable[str] | None = None,
        dtype: Dtype = None,
        storage_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> xr.DataTree:
        """All groups, or those that match: ``/<group>/prompts`` and ``/<group>/tokens``; see `Store.datatree` for the arguments."""
        options: dict[str, Any] = {"drop_variables": drop_variables, "dtype": dtype, "storage_options": storage_options}
        groups = self.open_groups_as_dict(filename_or_obj, **options, **kwargs)
        return xr.DataTree.from_dict(groups)

    def open_groups_as_dict(
        self,
        filename_or_obj: Any,
        *,
        drop_variables: str | Iterable[str] | None = None,
        model: Model | None = None,
        provenance: Provenance | None = None,
        group: str | None = None,
        dtype: Dtype = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> dict[str, xr.Dataset]:
        """All groups, or those that match, as datasets by path."""
        dropped = [drop_variables] if isinstance(drop_variables, str) else list(drop_variables or ())
        tree = _open(filename_or_obj, storage_options).datatree(model, provenance=provenance, group=group, dtype=dtype)
        return {node.path: without_coordinates(node.to_dataset(), dropped) for node in tree.subtree}

    def guess_can_open(self, filename_or_obj: Any) -> bool:
        """Whether a local folder is the root of a store. False for URLs, which are not read: name the engine for them."""
        if not isinstance(filename_or_obj, (str, os.PathLike)):
            return False
        try:
            return is_root_document(json.loads((Path(filename_or_obj) / "zarr.json").read_bytes()))
        except (OSError, ValueError):
            return False


def _open(place: Any, storage_options: Mapping[str, Any] | None) -> Store:
    return open_to_read(place, storage_options=storage_options)
