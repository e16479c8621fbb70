"""What a caller's path or URL names: a folder of this machine, or a URL for fsspec; and errors for what looks like a URL and is none.

A text that is not quite a URL would otherwise be taken for a relative path, and everything written below the working directory. Reads no
file and sends nothing: whether a folder exists is all that is looked at, and only where a name is suspicious.
"""

from __future__ import annotations

import difflib
import inspect
import os
import re
from pathlib import PurePath
from typing import Any, Final, NamedTuple
from urllib.parse import unquote

import fsspec

from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError

__all__ = ["Address", "local_path", "parse_address", "unfilled", "unfilled_name"]

_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*")
_HAS_BUCKET: Final = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "r2", "http", "https"}
_LOCAL: Final = {"file", "local"}
# Variables of a shell in capitals, others only in braces; and {name}, the placeholder of a text whose f was forgotten.
_PLACEHOLDER: Final = re.compile(r"\$\{[A-Za-z_]\w*\}|\$[A-Z_][A-Z0-9_]+(?![a-z])|%[A-Za-z_]\w+%|\{[A-Za-z_]\w+\}")


class Address(NamedTuple):
    """Where a place is: an absolute path where `is_local`, else a URL for fsspec."""

    text: str
    is_local: bool


def parse_address(place: str | os.PathLike[str]) -> Address:
    """What a path or URL names.

    Parameters
    ----------
    place : str or path
        A folder, a ``file:`` URL, or a URL that fsspec knows. Relative paths are made absolute; ``~`` is the home directory. A relative
        path that begins with ``./`` is a path whatever it looks like.

    Raises
    ------
    InvalidTypeError
        Neither text nor path, or the path of a cloud library, which is no path of this machine.
    InvalidArgumentError
        A text that looks like a URL and is none, or a path that cannot be; the message says what was probably meant.
    """
    text = _as_text(place)
    if not text.strip():
        raise InvalidArgumentError("the path of the store is empty: give a folder or a URL")
    if "\0" in text:
        raise InvalidArgumentError(f"{text!r} cannot be a path: it holds a NUL")
    if text.startswith(("./", "../", f".{os.sep}")) or text in (".", ".."):
        return Address(os.path.abspath(text), True)
    if text != text.strip() and ("://" in text or text.strip().startswith("file:")):
        raise InvalidArgumentError(f"{text!r} has spaces or line breaks around a URL: give {text.strip()!r}")
    if _is_file_url(text):
        return Address(_path_of_file_url(text), True)
    if _is_chain(text) or ("://" in text and not text.startswith(("/", "~"))):
        return Address(_checked_url(text), False)
    return Address(_checked_path(text), True)


def local_path(place: str | os.PathLike[str], what: str = "a folder of this machine") -> str:
    """The absolute path of a place that has to be a folder or file of this machine; `what` says so in the error for a URL."""
    address = parse_address(place)
    if not address.is_local:
        raise InvalidArgumentError(f"{os.fspath(place)!r} is a URL, and this has to be {what}")
    return address.text


def _as_text(place: Any) -> str:
    if isinstance(place, str):
        return str(place)
    if not isinstance(place, PurePath) and "://" in str(place) and hasattr(place, "joinpath"):
        # Of cloudpathlib, universal_pathlib and others. Some of them download a copy when they are asked for their path.
        raise InvalidTypeError(f"a {type(place).__name__} is no path of this machine: give its URL as text, {str(place)!r}")
    if not isinstance(place, os.PathLike):
        raise InvalidTypeError(f"a store is opened by a path or a URL, not by {type(place).__name__}")
    if isinstance(place, PurePath) and type(place).__module__.partition(".")[0] != "pathlib" and "://" in str(place):
        raise InvalidTypeError(f"a {type(place).__name__} is no path of this machine: give its URL as text, {str(place)!r}")
    return os.fsdecode(os.fspath(place))


# ---------------------------------------------------------------------------------------------------------------------- URLs


def _is_chain(text: str) -> bool:
    """Whether a text is a chain of file systems, such as ``simplecache::s3://…``: its first link is a protocol, or looks like one."""
    first, separator, rest = text.partition("::")
    return bool(separator) and (first in _protocols() or "://" in first or ("://" in rest and _SCHEME.fullmatch(first) is not None))


def _checked_url(text: str) -> str:
    links = text.split("::")
    checked = []
    for number, link in enumerate(links):
        protocol, separator, rest = link.partition("://")
        last = number == len(links) - 1
        if not separator and (last or link not in _protocols()) and not _is_file_url(link):
            if last:  # the file at the end of a chain
                checked.append(_checked_path(link))
                continue
            raise InvalidArgumentError(_unknown(link, text))
        if separator and protocol not in _protocols() and not _is_file_url(link):
            raise InvalidArgumentError(_unknown(protocol, text))
        if separator and not last and not _wraps(protocol):
            raise InvalidArgumentError(
                f"{text!r} holds '::', which chains file systems in fsspec, and {protocol}:// is none that reads through another one: "
                "give a name without '::'"
            )
        if protocol in _HAS_BUCKET and separator and (not rest.strip("/") or rest.startswith("/")):
            what = "server" if protocol.startswith("http") else "bucket"
            meant = f"{protocol}://{rest.lstrip('/')}" if rest.strip("/") else f"{protocol}://NAME-OF-THE-{what.upper()}/…"
            raise InvalidArgumentError(f"{text!r} names no {what}: was {meant!r} meant?")
        checked.append(f"file://{_path_of_file_url(link)}" if _is_file_url(link) else link)
    return "::".join(checked)


def _wraps(protocol: str) -> bool:
    """Whether a file system reads through another one, as caches and archives do; True where its package is not installed."""
    try:
        wanted = inspect.signature(fsspec.get_filesystem_class(protocol).__init__).parameters
    except (ImportError, ValueError):
        return True
    return bool({"fo", "fs", "target_protocol"} & set(wanted))


def _unknown(protocol: str, text: str) -> str:
    shown = text if len(text) <= 200 else f"{text[:200]}…"
    known = _protocols()
    if not _SCHEME.fullmatch(protocol):
        inner = re.search(r"[A-Za-z][A-Za-z0-9+.\-]*$", protocol)
        if inner and inner.group() in known:
            meant = text[inner.start() :]
            return f"{shown!r} has a URL inside of a path: was {meant!r} meant? A folder of that name is given as {'./' + text!r}"
        return f"{shown!r} has no protocol before '://': give a folder, or a URL such as 's3://bucket/prefix'"
    if protocol.lower() in known:
        return f"{shown!r} writes its protocol in capitals: was {text.replace(f'{protocol}', protocol.lower(), 1)!r} meant?"
    close = difflib.get_close_matches(protocol.lower(), sorted(known), 1, 0.5)
    meant = f": was {text.replace(protocol, close[0], 1)!r} meant?" if close else ": check its spelling, or install what provides it"
    return f"{protocol}:// cannot be opened: fsspec knows no protocol {protocol!r}{meant}"


def _protocols() -> set[str]:
    return {*fsspec.available_protocols(), *fsspec.registry}


# ---------------------------------------------------------------------------------------------------------------- file: URLs


def _is_file_url(text: str) -> bool:
    return text.lower().startswith(("file:", "local://"))


def _path_of_file_url(text: str) -> str:
    """The absolute path of a ``file:`` URL, whose host is empty or localhost, with %20 and the like decoded (RFC 8089)."""
    scheme, _, rest = text.partition(":")
    if scheme not in _LOCAL:
        raise InvalidArgumentError(f"{text!r} writes its protocol in capitals: was {scheme.lower() + ':' + rest!r} meant?")
    if rest.startswith("//"):
        host, slash, path = rest[2:].partition("/")
        if host not in ("", "localhost") or not slash:
            meant = host + slash + path
            if not meant:
                raise InvalidArgumentError(f"{text!r} names no folder: give its path")
            raise InvalidArgumentError(
                f"{text!r} names a machine called {host!r}, because a file URL has an absolute path: give {os.path.abspath(meant)!r} "
                "if a folder below the working directory was meant"
            )
        rest = slash + path
    if not rest.startswith("/"):
        meant = os.path.abspath(unquote(rest)) if rest else "/…"
        raise InvalidArgumentError(f"{text!r} has no absolute path, as a file URL needs it: was {meant!r} meant?")
    if re.match(r"/+[A-Za-z][:|](/|$)", rest):
        raise InvalidArgumentError(f"{text!r} is a path of Windows, and there are no drives here: give the folder as this machine names it")
    literal, decoded = os.path.abspath(f"/{rest.lstrip('/')}"), os.path.abspath(f"/{unquote(rest).lstrip('/')}")
    if "\0" in decoded:
        raise InvalidArgumentError(f"{text!r} cannot be a path: it holds a NUL")
    if decoded != literal and os.path.isdir(literal) and not os.path.isdir(decoded):
        raise InvalidArgumentError(f"{text!r} means {decoded!r}, which does not exist, and there is {literal!r}: give the folder as a path")
    return decoded


# --------------------------------------------------------------------------------------------------------------------- paths


def _checked_path(text: str) -> str:
    expanded = os.path.expanduser(text)
    if text.startswith("~") and expanded.startswith("~"):
        user = text[1:].partition("/")[0]
        why = f"there is no user {user!r} whose home directory that could be" if user else "the home directory is not known: set HOME"
        raise InvalidArgumentError(f"{text!r} cannot be opened: {why}; give an absolute path, or {'./' + text!r} for a folder of that name")
    try:
        path = os.path.abspath(expanded)
    except ValueError as error:
        raise InvalidArgumentError(f"{text!r} cannot be a path: {error}") from error
    if meant := _url_meant(expanded):
        raise InvalidArgumentError(
            f"{text!r} is a folder below {os.getcwd()}, and looks like a URL: was {meant!r} meant? A folder of that name is given as "
            f"{'./' + text!r}"
            if not os.path.isabs(expanded)
            else f"{text!r} has a URL inside of a path: was {meant!r} meant? Make the folder first if it is to be called so"
        )
    _refuse_placeholders(text, path)
    return path


def _url_meant(text: str) -> str | None:
    """What a path was probably meant to be, where it looks like a URL or a path of Windows; None where it does not."""
    if text.startswith("/"):
        return _url_inside(text)
    if re.match(r"[A-Za-z]:", text):
        return "/…" if len(text) < 3 else f"/{text[2:].replace(chr(92), '/').lstrip('/')}"
    if text.startswith("\\\\"):
        return text.replace("\\", "/")
    scheme, colon, rest = text.partition(":")
    known = scheme.lower() in _protocols()
    if colon and _SCHEME.fullmatch(scheme) and (known or rest.startswith(("/", "\\"))):
        close = [] if known else difflib.get_close_matches(scheme.lower(), sorted(_protocols()), 1, 0.6)
        below = rest.replace("\\", "/").lstrip("/")
        return f"{close[0] if close else scheme.lower()}://{below}"
    # A colon that is missing or mistyped: s3//bucket, s3;//bucket.
    slashes = re.match(r"([A-Za-z][A-Za-z0-9+.\-]*?)[^\w/\\]{0,2}(?://|\\\\)(.*)", text, re.DOTALL)
    if slashes and slashes.group(1).lower() in _protocols():
        return f"{slashes.group(1).lower()}://{slashes.group(2)}"
    return None


def _url_inside(path: str) -> str | None:
    """The URL in a path such as os.path.abspath("s3://team/acts"), unless a folder called "s3:" does exist there."""
    pieces = path.split("/")
    for number, piece in enumerate(pieces[:-1]):
        if piece.endswith(":") and piece[:-1].lower() in _protocols() and not os.path.isdir("/".join(pieces[: number + 1])):
            return f"{piece[:-1].lower()}://{'/'.join(pieces[number + 1 :]).lstrip('/')}"
    return None


def _refuse_placeholders(text: str, path: str) -> None:
    """Raise for a name that was not filled in, unless a folder of that very name exists."""
    reached = ""
    for piece in path.split("/"):
        reached += f"/{piece}" if piece else ""
        if (name := unfilled_name(piece)) and not os.path.isdir(reached):
            raise unfilled(text, name)


def unfilled_name(text: str) -> str | None:
    """The first variable or placeholder in a text, such as ``$HOME``, ``%TEMP%`` or ``{run}``; None where there is none."""
    found = _PLACEHOLDER.search(text)
    return found.group() if found else None


def unfilled(text: str, name: str) -> InvalidArgumentError:
    """The error for an address in which a name was not filled in."""
    way = "put an f before the text" if name.startswith("{") else "os.path.expandvars() fills in variables"
    return InvalidArgumentError(
        f"{text!r} holds {name}, which was not filled in: {way}\na folder whose name does hold {name} is opened once it exists"
    )
