"""Arguments that several commands share, and their parsing."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lmprobe_zarr import config
from lmprobe_zarr.batch import LayerSpec
from lmprobe_zarr.errors import InvalidArgumentError

__all__ = [
    "add_choice",
    "add_command",
    "add_store",
    "add_yes",
    "check_target",
    "confirm",
    "join_negative",
    "parse_layers",
    "parse_object",
    "split_names",
]

#: Numbers, lists and slices that begin with a minus: -1, -2,-1 and -8:-2.
_NEGATIVE = re.compile(r"-\d[\d,:.+eE-]*")


def add_command(commands: Any, name: str, run: Callable[[argparse.Namespace], int | None], summary: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary)
    command.set_defaults(run=run)
    command.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    return command


def join_negative(arguments: Sequence[str]) -> list[str]:
    """Arguments in which an option and a value such as ``-2,-1`` are joined by "=", since argparse takes such a value for an option."""
    out: list[str] = []
    for number, argument in enumerate(arguments):
        if argument == "--":
            return [*out, *arguments[number:]]
        if out and re.fullmatch(r"--[a-z-]+", out[-1]) and _NEGATIVE.fullmatch(argument):
            out[-1] += f"={argument}"
        else:
            out.append(argument)
    return out


def add_store(command: argparse.ArgumentParser, *, positional: bool) -> None:
    default = config.default_name()
    place = f"folder or URL of the store (default: {default})".replace("%", "%%")
    if positional:
        command.add_argument("store", nargs="?", default=None, help=place)
    else:
        command.add_argument("--store", default=None, help=place)


def add_choice(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", help="the model, if the store holds several: its name, hub id or folder")
    command.add_argument("--group", help="name of the group, if the model has several")


def add_yes(command: argparse.ArgumentParser) -> None:
    command.add_argument("--yes", action="store_true", help="do not ask for confirmation")


def confirm(options: argparse.Namespace, question: str) -> None:
    """Ask the user to confirm, unless ``--yes`` was given.

    Raises
    ------
    InvalidArgumentError
        The user declines, or there is no terminal to ask on.
    """
    if options.yes:
        return
    if options.json or not sys.stdin.isatty():
        raise InvalidArgumentError(f"{question} There is no terminal to ask on: add --yes")
    if input(f"{question} [y/N] ").strip().lower() not in {"y", "yes"}:
        raise InvalidArgumentError("nothing was deleted")


def parse_layers(text: str) -> LayerSpec:
    """Parse ``--layers``: a word, numbers separated by commas, or a slice with colons.

    Raises
    ------
    InvalidArgumentError
        Anything else.
    """
    if text in {"all", "middle", "last"}:
        return text
    try:
        if ":" in text:
            return slice(*(int(item) if item.strip() else None for item in text.split(":")))
        return [int(item) for item in text.split(",")]
    except (ValueError, TypeError) as error:
        raise InvalidArgumentError(f"--layers {text!r} is not a choice of layers: use all, middle, last, 0,4,-1 or 8:24") from error


def check_target(option: str, path: str, endings: Sequence[str] = ()) -> None:
    """Check the file that an option names before any work is done for it.

    Parameters
    ----------
    option : str
        As it is written, such as ``--output``.
    path : str
    endings : sequence of str
        What the name may end with; by default anything.

    Raises
    ------
    InvalidArgumentError
        Another ending, a folder that does not exist, or a name that is a folder's.
    """
    file = Path(path)
    if endings and file.suffix.lower() not in endings:
        what = f"the ending {file.suffix}" if file.suffix else "no ending"
        raise InvalidArgumentError(f"{option} {path!r} has {what}: use one of {', '.join(endings)}")
    if not file.absolute().parent.is_dir():
        raise InvalidArgumentError(f"{option} {path!r}: the folder {str(file.parent)!r} does not exist, make it first")
    if file.is_dir():
        raise InvalidArgumentError(f"{option} {path!r} is a folder: give the name of a file")


def parse_object(text: str | None, option: str) -> dict[str, Any] | None:
    """The JSON object of an option; None if it is not given.

    Raises
    ------
    InvalidArgumentError
        Something else than a JSON object.
    """
    if text is None:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"{option} {text[:40]!r} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise InvalidArgumentError(f"""{option} {text[:40]!r} is no JSON object: write it as '{{"enable_thinking": false}}'""")
    return found


def split_names(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]
