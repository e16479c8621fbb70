"""The cache's log: one line per call with hits, misses, layers and seconds. Standard `logging`; no handler is installed at import."""

from __future__ import annotations

import logging
import sys

from lmprobe_zarr import config

__all__ = ["cache_logger", "enable_cache_logging"]

_LOGGER = logging.getLogger("lmprobe_zarr.cache")


class _StandardError(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to what standard error is at the moment of writing, as a notebook or a test may exchange it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)
        self.setFormatter(logging.Formatter("%(message)s"))

    @property
    def stream(self) -> object:
        return sys.stderr


def enable_cache_logging(level: int | str = logging.INFO) -> None:
    """Show what the cache does on standard error.

    Parameters
    ----------
    level : int or str
        ``logging.INFO`` shows one line per call: hits, misses, layers, seconds. ``logging.DEBUG`` adds every part that is committed,
        evicted or skipped. Calling again changes the level.
    """
    _LOGGER.setLevel(level.upper() if isinstance(level, str) else level)
    if not any(isinstance(handler, _StandardError) for handler in _LOGGER.handlers):
        _LOGGER.addHandler(_StandardError())


def cache_logger() -> logging.Logger:
    """The logger ``lmprobe_zarr.cache``, with what ``$LMPROBE_CACHE_DEBUG`` asks for where nothing else was said."""
    level = config.debug_level()
    if level is not None and _LOGGER.level == logging.NOTSET:
        enable_cache_logging(level)
    return _LOGGER
