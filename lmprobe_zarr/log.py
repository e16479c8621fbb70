"""The cache's log: one line per call with hits, misses, layers and seconds. Standard `logging`; no handler is installed at import."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Final

from lmprobe_zarr import config
from lmprobe_zarr.errors import CacheWarning, InvalidArgumentError

__all__ = ["LOGGER_NAME", "cache_logger", "enable_cache_logging", "warn"]

LOGGER_NAME: Final = "lmprobe_zarr.cache"
_LOGGER = logging.getLogger(LOGGER_NAME)


class _StandardError(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to the current `sys.stderr`, which notebooks and tests replace."""

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
        evicted or skipped. Another call changes the level.

    Raises
    ------
    InvalidArgumentError
        `level` is not a level of `logging`.
    """
    try:
        _LOGGER.setLevel(level.upper() if isinstance(level, str) else level)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(
            f"level={level!r} is not a logging level: use 'info', 'debug' or a number such as logging.INFO"
        ) from error
    if not any(isinstance(handler, _StandardError) for handler in _LOGGER.handlers):
        _LOGGER.addHandler(_StandardError())


def cache_logger() -> logging.Logger:
    """The logger ``lmprobe_zarr.cache``, at the level of ``$LMPROBE_CACHE_DEBUG`` unless a call has set another."""
    level = config.debug_level() or logging.NOTSET
    of_variable = getattr(_LOGGER, "level_of_variable", logging.NOTSET)
    if level != of_variable and _LOGGER.level == of_variable:
        enable_cache_logging(level)
        _LOGGER.level_of_variable = level  # type: ignore[attr-defined]
    return _LOGGER


def warn(message: str, category: type[Warning] = CacheWarning) -> None:
    """Issue a warning, by default a `CacheWarning`, that points at the caller's line, the first one outside this package."""
    frame, level = sys._getframe(1), 2
    package = __name__.split(".")[0]
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).split(".")[0] in (package, "contextlib"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
