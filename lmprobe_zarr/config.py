"""The settings of the default store. The only place that reads environment variables."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_dir", "default_root", "weights_memory"]


def cache_dir() -> Path:
    """The cache folder of lmprobe: ``$LMPROBE_CACHE_DIR``, by default ``~/.cache/lmprobe``."""
    return Path(os.environ.get("LMPROBE_CACHE_DIR") or "~/.cache/lmprobe").expanduser()


def default_root() -> Path:
    """Where activations go when no store is named: the folder ``.zarr`` in `cache_dir`.

    lmprobe takes every other folder there for its own and evicts it, but leaves those alone that begin with a dot.
    """
    return cache_dir() / ".zarr"


def weights_memory() -> Path:
    """The file that remembers content hashes of local weights by path, size and time, so that each is hashed once."""
    return cache_dir() / ".lmprobe-zarr" / "weights.json"
