"""A model's own generation configuration, from its files without loading it, or from a loaded model. Never torch.

transformers reads ``generation_config.json``; where there is none, what ``config.json`` names of it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from lmprobe_zarr.batch import NEUTRAL, SAMPLING
from lmprobe_zarr.extraction.models.identity import cached_snapshot, local_folder, text_config
from lmprobe_zarr.model_files import read_json

__all__ = ["own_generation"]

FILE: Final = "generation_config.json"
_IN_CONFIG: Final = ("do_sample", *SAMPLING, *NEUTRAL)


def own_generation(model: Any, revision: str | None = None) -> dict[str, Any]:
    """What a model's own generation configuration sets.

    Parameters
    ----------
    model : str, path or torch Module
        A folder, a hub id, or a loaded model.
    revision : str, optional
        Branch, tag or commit of a hub id.

    Raises
    ------
    ModelNotFoundError
        A path without a model.
    """
    if not isinstance(model, str | os.PathLike):
        found: Any = getattr(model, "generation_config", None)
        values = found.to_dict() if hasattr(found, "to_dict") else {}
        return {str(name): value for name, value in values.items() if value is not None}
    folder = local_folder(model)
    path = _of_hub(os.fspath(model), revision) if folder is None else folder / FILE
    if path is not None and path.is_file():
        return {name: value for name, value in read_json(path).items() if value is not None}
    files = cached_snapshot(os.fspath(model), revision)[1] if folder is None else folder
    config: Mapping[str, Any] = {} if files is None or not (files / "config.json").is_file() else read_json(files / "config.json")
    held = {**config, **text_config(config)}
    return {name: held[name] for name in _IN_CONFIG if held.get(name) is not None}


def _of_hub(model: str, revision: str | None) -> Path | None:
    """The file of a hub model, fetched where its local cache does not know yet whether there is one."""
    try:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
    except ImportError:
        return None
    commit = cached_snapshot(model, revision)[0] or revision
    found = try_to_load_from_cache(model, FILE, revision=commit)
    if isinstance(found, str):
        return Path(found)
    if found is None:
        with suppress(Exception):  # offline, or there is none: as loading the model would find out
            return Path(hf_hub_download(model, FILE, revision=commit))
    return None
