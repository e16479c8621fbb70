"""Arguments that several commands share, and their parsing."""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import fsspec

from lmprobe_zarr import config
from lmprobe_zarr.batch import LayerSpec
from lmprobe_zarr.cli.prompt_files import FORMATS, read_prompts
from lmprobe_zarr.errors import InvalidArgumentError

__all__ = [
    "Parser",
    "add_choice",
    "add_command",
    "add_dry_run",
    "add_format",
    "add_prompts",
    "add_store",
    "add_yes",
    "check_target",
    "confirm",
    "join_negative",
    "parse_layers",
    "parse_object",
    "prompts_of",
    "set_storage_options",
    "split_names",
]

#: Numbers, lists and slices that begin with a minus: -1, -2,-1 and -8:-2.
_NEGATIVE = re.compile(r"-\d[\d,:.+eE-]*")


# Options that open a place of this protocol as somebody without credentials.
_ANONYMOUS: Final[dict[str, dict[str, Any]]] = {
    "s3": {"anon": True},
    "gs": {"token": "anon"},
    "gcs": {"token": "anon"},
    "az": {"anon": True},
    "abfs": {"anon": True},
    "hf": {"token": False},
}


#: What is meant by commands of other programs.
_MEANT: Final = dict.fromkeys(("ls", "list"), "info, which lists what a store holds, or show --list, which lists its prompts") | {
    "rm": "delete for prompts, drop for variables, or clear for all", "cp": "copy", "help": "--help",
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """A parser whose errors name the nearest command, option or choice."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As that of argparse."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            used = getattr(found, "parser", self)
            options = [name for action in used._actions for name in action.option_strings]
            near = _nearest(unknown[0].partition("=")[0], options)
            used.error(f"unrecognized arguments: {unknown[0] + near if near else ' '.join(unknown)}")
        return found

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            if isinstance(action, argparse._SubParsersAction) and value in _MEANT:
                raise argparse.ArgumentError(action, f"{value!r} is no command: did you mean {_MEANT[value]}?")
            near = _nearest(str(value), choices) or f"choose from {', '.join(choices)}"
            raise argparse.ArgumentError(action, f"{value!r} is none of its choices: {near.removeprefix(': ')}")


def _nearest(given: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(given, known, n=1)
    return f": did you mean {near[0]}?" if near else ""


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int | None], summary: str, *, remote: bool = True
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary)
    command.set_defaults(run=run, parser=command)
    command.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    if remote:
        access = command.add_argument_group("remote places")
        access.add_argument("--anon", action="store_true", help="open them without credentials, as a public bucket is read")
        access.add_argument("--storage-options", metavar="JSON", help="an object of options for their file system")
    return command


def set_storage_options(options: argparse.Namespace) -> None:
    """Make ``--anon`` and ``--storage-options`` the defaults of the file systems that the command's places are on.

    Raises
    ------
    InvalidArgumentError
        They were given without a remote place, or ``--anon`` for one that knows no anonymous users.
    """
    given = parse_object(getattr(options, "storage_options", None), "--storage-options")
    anonymous = getattr(options, "anon", False)
    if given is None and not anonymous:
        return
    named = [getattr(options, name, None) for name in ("store", "url", "target", "source")]
    places = [value for value in (*named, *getattr(options, "places", ())) if isinstance(value, str)]
    protocols = sorted({place.partition("://")[0].lower() for place in places if "://" in place} - {"file", "local", "memory"})
    if not protocols:
        raise InvalidArgumentError("--anon and --storage-options are for remote places such as s3://bucket/acts, and none is named")
    for protocol in protocols:
        if anonymous and protocol not in _ANONYMOUS:
            raise InvalidArgumentError(f"--anon says nothing to {protocol}://: give what its file system takes with --storage-options")
        fsspec.config.conf[protocol] = {**(_ANONYMOUS[protocol] if anonymous else {}), **(given or {})}


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


def add_prompts(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("--prompts", metavar="FILE", help=what + ": .txt, .jsonl or .csv; - is standard input")
    add_format(command)


def add_format(command: argparse.ArgumentParser) -> None:
    command.add_argument("--format", choices=FORMATS, help="of the prompts; by default the file's ending, txt for standard input")
    command.add_argument("--text-column", default="text", help="column of the prompts (default: %(default)s)")


def prompts_of(options: argparse.Namespace) -> list[Any] | None:
    """The prompts in the file of ``--prompts``; None if it is not given."""
    if options.prompts is None:
        return None
    return read_prompts(options.prompts, file_format=options.format, text_column=options.text_column, columns=[])[0]


def add_dry_run(command: argparse.ArgumentParser) -> None:
    command.add_argument("--dry-run", action="store_true", help="only report what would be done")


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
