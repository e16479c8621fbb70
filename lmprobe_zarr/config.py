"""The settings of the cache: the value set by a call, else the environment variable, else the default.

The only module that reads environment variables. A variable is read when its setting is first used, and again after `reload`; none is read
when the package is imported. The settings apply to the default store only, not to a store that a call names, except for the memory and
the disk for what is read of remote places.
"""

from __future__ import annotations

import difflib
import logging
import math
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Final

from lmprobe_zarr.batch import Precision
from lmprobe_zarr.errors import CacheWarning, InvalidArgumentError, InvalidTypeError, StoreNotFoundError
from lmprobe_zarr.storage import ReadCache, local_path

__all__ = [
    "SETTINGS",
    "Setting",
    "bytes_of",
    "cache_backend",
    "cache_dir",
    "cache_limit",
    "cache_precision",
    "debug_level",
    "default_name",
    "default_root",
    "kept_chunk_bytes",
    "read_cache",
    "read_cache_folder",
    "reload",
    "set_cache_backend",
    "set_cache_dtype",
    "set_cache_limit",
    "weights_memory",
]

GB: Final = 1024**3
KEPT_BYTES: Final = 64 * 2**20
_SIZE: Final = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([KMGT]i?B)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One setting and the environment variable that it is read from.

    Parameters
    ----------
    variable : str
        The environment variable.
    means : str
        What it sets, for the documentation.
    values : str
        The allowed values, for the documentation and errors.
    default : str
        The value if neither the variable nor a call sets one.
    example : str
    call : str
        The function that overrides it; empty if there is none.
    parse : callable
        Makes the value of the variable's text; raises ValueError for text that is not allowed.
    """

    variable: str
    means: str
    values: str
    default: str
    example: str
    call: str
    parse: Callable[[str], Any]


def _parse_limit(text: str) -> int:
    found = _SIZE.fullmatch(text.strip())
    return _parse_size(text) if found is not None and found[2] else _limit_bytes(float(text))


def _parse_megabytes(text: str) -> int:
    return _limit_bytes(float(text) / 1024)


def _limit_bytes(gb: float) -> int:
    if not math.isfinite(gb * GB) or gb < 0:
        raise ValueError(gb)
    return math.ceil(gb * GB)  # rounded up, so that only 0 becomes 0


def _parse_size(text: str) -> int:
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise ValueError(text)
    number, unit = float(found[1]), found[2]
    return math.ceil(number * 1024 ** ("KMGT".index(unit[0].upper()) + 1)) if unit else _zero(number)


def _zero(number: float) -> int:
    if number:
        raise ValueError(number)
    return 0


def _parse_debug(text: str) -> int | None:
    levels = {"1": logging.INFO, "true": logging.INFO, "info": logging.INFO, "debug": logging.DEBUG}
    levels |= dict.fromkeys(("0", "false", "off"), logging.NOTSET)
    if text.lower() not in levels:
        raise ValueError(text)
    return levels[text.lower()] or None


def _parse_dtype(text: str) -> Precision:
    return Precision(dtype=text)


SETTINGS: Final = {
    "dir": Setting(
        variable="LMPROBE_CACHE_DIR",
        means="folder of the cache; activations are stored in .zarr inside it, beside lmprobe's own entries",
        values="a folder",
        default="~/.cache/lmprobe",
        example="/mnt/fast-ssd/lmprobe",
        call="",
        parse=str,
    ),
    "limit": Setting(
        variable="LMPROBE_CACHE_MAX_GB",
        means="size that evict() reduces the cache to, in GB of 1024³ bytes; with 0 nothing is stored, but what is stored can be read",
        values="a number of at least 0, or a size with its unit, such as 500 MB",
        default="no limit",
        example="100",
        call="set_cache_limit",
        parse=_parse_limit,
    ),
    "dtype": Setting(
        variable="LMPROBE_CACHE_DTYPE",
        means="precision in which activations are stored",
        values="float16, bfloat16 or float32",
        default="as the model computes",
        example="float16",
        call="set_cache_dtype",
        parse=_parse_dtype,
    ),
    "kept": Setting(
        variable="LMPROBE_CACHE_KEPT_MB",
        means="memory for chunks of remote places, so that reading prompt by prompt fetches each once, in MB of 1024² bytes",
        values="a number of at least 0, where 0 keeps none",
        default="64",
        example="256",
        call="",
        parse=_parse_megabytes,
    ),
    "reads": Setting(
        variable="LMPROBE_READ_CACHE",
        means="disk for what is read of remote stores, so that the next process reads it from this machine; see open_store",
        values="a size with its unit, such as 64 GB or 500 MB (of 1024³ and 1024² bytes), or 0 for none",
        default="0",
        example="64 GB",
        call="",
        parse=_parse_size,
    ),
    "reads_dir": Setting(
        variable="LMPROBE_READ_CACHE_DIR",
        means="folder of what is read of remote stores",
        values="a folder",
        default=".lmprobe-zarr/reads in the folder of the cache",
        example="/mnt/fast-ssd/reads",
        call="",
        parse=str,
    ),
    "backend": Setting(
        variable="LMPROBE_CACHE_BACKEND",
        means="place of the cache instead of its folder: a store, or a URL or path in which .zarr is made",
        values="a URL that fsspec knows, or a path",
        default="the folder of the cache",
        example="s3://my-bucket/prefix",
        call="set_cache_backend",
        parse=str,
    ),
    "debug": Setting(
        variable="LMPROBE_CACHE_DEBUG",
        means="log each use of the cache: hits, misses, layers, seconds",
        values="1 (one line per call), debug (more), or 0",
        default="0",
        example="1",
        call="enable_cache_logging",
        parse=_parse_debug,
    ),
}

SETTINGS_BY_VARIABLE: Final = {setting.variable: setting for setting in SETTINGS.values()}
#: What lmprobe itself reads, and this package does not.
OF_LMPROBE: Final = ("LMPROBE_PROFILE",)
#: Names that are not near the one that they stand for.
MEANT: Final = dict.fromkeys(("LMPROBE_CACHE_LIMIT", "LMPROBE_CACHE_SIZE", "LMPROBE_CACHE_LIMIT_GB"), "LMPROBE_CACHE_MAX_GB")

_warned_of: set[str] = set()
_from_environment: dict[str, Any] = {}
_from_calls: dict[str, Any] = {}


def _get(name: str, default: Any = None) -> Any:
    if name in _from_calls:
        return _from_calls[name]
    if name not in _from_environment:
        _warn_of_unknown()
        setting = SETTINGS[name]
        text = os.environ.get(setting.variable, "").strip()
        try:
            _from_environment[name] = setting.parse(text) if text else None
        except ValueError as error:
            raise InvalidArgumentError(
                f"the environment variable {setting.variable} is {text!r}: use {setting.values}, or leave it unset ({setting.default})"
            ) from error
    value = _from_environment[name]
    return default if value is None else value


def _warn_of_unknown() -> None:
    """Warn, once for each, of variables that nobody reads and that look like a mistyped one."""
    known = [setting.variable for setting in SETTINGS.values()]
    for variable in sorted(set(os.environ) - {*known, *OF_LMPROBE} - _warned_of):
        if not variable.startswith("LMPROBE_") or variable.startswith("LMPROBE_ZARR_"):
            continue
        near = difflib.get_close_matches(variable, known, n=1, cutoff=0.6 if variable.startswith("LMPROBE_CACHE_") else 0.85)
        if near:
            _warned_of.add(variable)
            meant = MEANT.get(variable, near[0])
            warnings.warn(
                f"the environment variable {variable} is read by nobody: did you mean {meant}, {SETTINGS_BY_VARIABLE[meant].means}?",
                CacheWarning,
                stacklevel=2,
            )


def reload() -> None:
    """Read the environment variables again, each at the next use of its setting. Settings made by calls stay."""
    _from_environment.clear()
    _warned_of.clear()


# -------------------------------------------------------------------------------------------------------------- getting


def cache_dir() -> Path:
    """The cache folder of lmprobe, as an absolute path: ``$LMPROBE_CACHE_DIR``, by default ``~/.cache/lmprobe``.

    Raises
    ------
    StoreNotFoundError
        It is below a home directory, and that is not known.
    InvalidArgumentError
        ``$LMPROBE_CACHE_DIR`` is no folder of this machine.
    """
    variable, given, backend = SETTINGS["dir"].variable, _get("dir"), SETTINGS["backend"].variable
    if given is None and not _home_is_known():
        raise StoreNotFoundError(
            f"there is no default store, because no home directory is known for {SETTINGS['dir'].default}: set {variable} to a folder, or "
            "name a store"
        )
    if given is not None and str(given).startswith("~") and not _home_is_known():
        raise StoreNotFoundError(f"there is no default store, because the home directory in {variable} is not known: give another folder")
    try:
        return Path(local_path(SETTINGS["dir"].default if given is None else given))
    except InvalidArgumentError as error:
        raise InvalidArgumentError(
            f"the environment variable {variable} has to be a folder of this machine (a URL goes into {backend}): {error}"
        ) from error


def _home_is_known() -> bool:
    try:
        return bool(Path.home())
    except RuntimeError:
        return False


def default_root() -> Path:
    """Where activations are stored if neither a store nor a backend is given: the folder ``.zarr`` in `cache_dir`, whose errors it has.

    lmprobe treats other folders there as its own and evicts them; it ignores those whose names begin with a dot.
    """
    return cache_dir() / ".zarr"


def default_name() -> str:
    """The path of `default_root`, or the words for it where it is not known: for messages and help, which must not fail."""
    try:
        return str(default_root())
    except (StoreNotFoundError, InvalidArgumentError):
        return f"${SETTINGS['dir'].variable}/.zarr"


def cache_backend() -> Any:
    """The argument of `set_cache_backend`, else ``$LMPROBE_CACHE_BACKEND``, else None."""
    return _get("backend")


def cache_limit() -> int | None:
    """The limit of the default store in bytes; None if there is no limit, 0 if nothing is to be stored."""
    limit: int | None = _get("limit")
    return limit


def cache_precision() -> Precision:
    """The precision in which the default store keeps activations."""
    precision: Precision = _get("dtype", Precision())
    return precision


def kept_chunk_bytes() -> int:
    """Bytes of chunks of remote places that a process keeps in memory; 0 for none."""
    kept: int = _get("kept", KEPT_BYTES)
    return kept


def read_cache(size: str | int | None = None, folder: str | os.PathLike[str] | None = None) -> ReadCache | None:
    """Where what is read of remote stores is kept, and up to which size; None where nothing is kept.

    Parameters
    ----------
    size : str, optional
        A size with its unit, such as ``"64 GB"``, or 0 for none; by default ``$LMPROBE_READ_CACHE``.
    folder : str or path, optional
        By default ``$LMPROBE_READ_CACHE_DIR``, else the folder ``.lmprobe-zarr/reads`` in `cache_dir`.

    Returns
    -------
    ReadCache, optional

    Raises
    ------
    InvalidArgumentError
        The size is none, or the folder is no folder of this machine, or none is known.
    """
    if size is None:
        limit: int = _get("reads", 0)
    else:
        try:
            limit = _parse_size("0" if size is False else str(size))
        except ValueError as error:
            raise InvalidArgumentError(
                f"cache={size!r:.40} is no size: give it with its unit, as '64 GB' or '500 MB', or 0 for none"
            ) from error
    return ReadCache(read_cache_folder(folder), limit) if limit else None


def read_cache_folder(folder: str | os.PathLike[str] | None = None) -> str:
    """The folder for what is read of remote stores, as an absolute path.

    Parameters
    ----------
    folder : str or path, optional
        As for `read_cache`.

    Returns
    -------
    str

    Raises
    ------
    InvalidArgumentError
        It is no folder of this machine, or none is known.
    """
    given = _get("reads_dir") if folder is None else folder
    if given is not None:
        return local_path(given, "a folder of this machine, for what is read of remote stores")
    try:
        return str(cache_dir() / ".lmprobe-zarr" / "reads")
    except StoreNotFoundError as error:
        raise InvalidArgumentError(
            f"there is no folder for what is read of remote stores: give cache_folder=, or set {SETTINGS['reads_dir'].variable}"
        ) from error


def debug_level() -> int | None:
    """The level of logging that ``$LMPROBE_CACHE_DEBUG`` sets; None for no logging."""
    level: int | None = _get("debug")
    return level


def weights_memory() -> Path | None:
    """The file with content hashes of local weights by path, size and time, for each to be hashed once; None without a cache folder."""
    try:
        return cache_dir() / ".lmprobe-zarr" / "weights.json"
    except (StoreNotFoundError, InvalidArgumentError):
        return None


# -------------------------------------------------------------------------------------------------------------- setting


def bytes_of(name: str, gb: object) -> int:
    """A size given in GB of 1024³ bytes, or as a text with its unit.

    Parameters
    ----------
    name : str
        Name of the argument, for the message.
    gb : float or str
        In GB of 1024³ bytes; a text is a size with its unit, such as ``"500 MB"``, or a number of GB.

    Returns
    -------
    int
        Bytes, rounded up.

    Raises
    ------
    InvalidArgumentError
        `gb` is not a finite number of at least 0, and no size.
    """
    try:
        if isinstance(gb, str):
            return _parse_limit(gb)
        if isinstance(gb, bool) or not isinstance(gb, Real):
            raise TypeError(gb)
        return _limit_bytes(float(gb))
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidArgumentError(
            f"{name}={gb!r:.40} is not a size: give a number of GB of at least 0, or a text such as '500 MB'"
        ) from error


def set_cache_limit(gb: float | str | None = None) -> None:
    """Set the size that `evict` reduces the default store to.

    Neither this call nor writing evicts anything: call `evict` when it suits.

    Parameters
    ----------
    gb : float or str, optional
        In GB of 1024³ bytes, or a size with its unit, such as ``"500 MB"``. None removes the limit. With 0 nothing more is stored, but
        what is stored can be read.

    Raises
    ------
    InvalidArgumentError
        `gb` is negative, or not a number.
    """
    _from_calls["limit"] = None if gb is None else bytes_of("gb", gb)


def set_cache_dtype(dtype: str | None = None, *, keep_bits: int | None = None, overflow: str = "bfloat16") -> None:
    """Set the precision in which the default store keeps new activations; stored ones stay as they are.

    Parameters
    ----------
    dtype : {"float16", "bfloat16", "float32"}, optional
        None for the dtype that the model computes in.
    keep_bits : int, optional
        Round to this many bits after the leading bit, so that values compress better; see `lmprobe_zarr.batch.Precision`.
    overflow : {"bfloat16", "raise"}
        What happens if values are beyond the range of float16: the part is stored with bfloat16's precision, or an error is raised.

    Raises
    ------
    InvalidArgumentError
        The dtype is unknown, or has fewer bits than `keep_bits`.
    """
    _from_calls["dtype"] = Precision(dtype=dtype, keep_bits=keep_bits, overflow=overflow)


def set_cache_backend(backend: Any = None) -> None:
    """Set the place of the default store.

    Parameters
    ----------
    backend : str, path, Store, or a sequence of these, optional
        A URL or path: of a store, or else of a folder, whose store is ``.zarr`` inside it, beside lmprobe's own entries. A `Store` is used
        as it is. Several are read as one, and only the last is written to. None restores the environment variable or the cache's folder.

    Raises
    ------
    InvalidTypeError
        `backend` is something else.
    """
    if backend is None:
        _from_calls.pop("backend", None)
        return
    places = list(backend) if isinstance(backend, (list, tuple)) else [backend]
    for place in places:
        if not isinstance(place, (str, os.PathLike)) and not hasattr(place, "storage"):
            raise InvalidTypeError(f"a cache's backend is a URL, a path, a Store, a list of these, or None, not {type(place).__name__}")
    if not places or any(isinstance(place, str) and not place.strip() for place in places):
        raise InvalidArgumentError("the cache's backend is an empty text: give a URL or a path, or None for the cache's own folder")
    _from_calls["backend"] = places if len(places) > 1 else places[0]
