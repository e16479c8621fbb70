"""What messages advise in Python, said with the options of a command. Never changes what a message says of its cause."""

from __future__ import annotations

import argparse
import contextlib
import re
import shlex
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Final

__all__ = ["for_shell", "warnings_for_shell"]

#: Advice in Python, as a regular expression; the option that a command needs for the advice beside it, if any; and that advice.
_ADVICE: Final[tuple[tuple[str, str | None, str], ...]] = (
    (r"storage_options=\{'(anon': True|token': 'anon'|token': False)\}", "--anon", "--anon"),
    (r"storage_options=(\{)?", "--storage-options", r"--storage-options \1"),
    (r"--storage-options (?=[ ,;)]|$)", None, "--storage-options"),
    (r", or open it with mode='a' to make one", None, ""),
    (r": leave mode='a' out to read it", None, ". This command writes: give a store that is no copy"),
    (r": leave mode='a' out", None, ". This command writes: give another place"),
    (r"was opened with mode='r': open it with mode='a' to write", None, "is only read here"),
    (r"check permissions, or open with mode='r'", None, "check permissions"),
    (r"pass (?=truncation=True|max_length=|add_special_tokens=False)", None, "give "),
    (r", or drop these prompts first, as with \.isel\(prompt=…\)", "--missing", ", or leave them out with --missing drop"),
    (r", or drop these prompts first, as with \.isel\(prompt=…\)", None, ""),
    (r", or leave these prompts out with \.dropna\('prompt'\)", "--layers", ", or choose other layers with --layers"),
    (r", or leave these prompts out with \.dropna\('prompt'\)", None, ""),
    (r", or a scikit-learn estimator", None, ""),
    (r", or give (?:its features as )?\{'?name'?: (?:…|features)\}", None, ""),
    (r"[,;] or give the (?:label|group|side|split)s(?: themselves)?(?=$|[;:,])", None, ""),
    (r": give the (?:label|group|side|split)s themselves", None, ""),
    (r"give its folder, \{'sentence_embedding': '([^']*)'\}", None, r"give its folder, sentence_embedding=\1"),
    (r", or give them as \{'perplexity': values\}", None, ""),
    (r"such as 100, or None for once", None, "such as 100, or none for once"),
    (r"there is no coordinate (?=')", None, "there is no column "),
    (r" \(np\.digitize makes bins\)", None, ""),
    (r", or device_map='auto'| device_map='auto',", None, ""),
    (r", or name a module, sites=\{'(\w+)': '([\w.:]+)'\}", None, r", or name a module, such as \1=\2"),
    (r"give group='([^']*)' or provenance='any'", "--group", r"give --group \1 or --any-provenance"),
    (r"extract and Probe use it with group= or provenance='any'", None, "extract uses it with --group or --any-provenance"),
    (r"(extract (?:it |them |again |them again )?)with keep_tokens=True", None, r"\1with --keep-tokens"),
    (r"(extract (?:it |them |again |them again )?)with (perplexity|refresh)=True", None, r"\1with --\2"),
    (r"store\.(delete|drop)\(…, (?:prompts=)?\[…\]\)", None, r"lmprobe-zarr \1"),
    (r"store\.drop\(…, \[('[^']*')\]\)", None, r"lmprobe-zarr drop STORE \1"),
    (r"store\.copy_to\(…\)", None, "lmprobe-zarr copy"),
    (r"read what is stored per prompt with store\.dataset\(\)", "--level", "read what is stored per prompt with --level prompts"),
    (r"\b(repair|gc|evict)\(\)", None, r"lmprobe-zarr \1"),
    (r"leave client= out", "--workers", "leave --workers and --scheduler out"),
    (r"say with variable= and layer=", "--tool-options", "say with variable and layer in --tool-options"),
    (r"(give|with) (mapping|layers)=", "--tool-options", r"\1 \2 in --tool-options"),
    (r"make the same call again", None, "give the same command again"),
    (
        r"to get them back, for each of summary\.lost: extract\(.*\)",
        None,
        "to get them back, give the extract command that stored them again: it runs what is missing",
    ),
    (r"their prompts are in summary\.lost, with", None, "--dry-run --json lists their prompts, with"),
    (r"the same call (?=goes on|runs)", None, "the same command "),
    (r"; extract them first", "--yes", "; nothing was deleted"),
)
#: Arguments whose option has another name. A value that an option stands for by itself is named with it.
_RENAMED: Final[Mapping[str, str]] = {
    "n": "--samples", "settings": "--generation-settings", "provenance='any'": "--any-provenance",
    "add_special_tokens=False": "--no-special-tokens", "text=False": "--no-text", "store_text=False": "--no-text",
    "page=False": "--no-page", "shards=False": "--no-shards", "upgrade=True": "--all",
}  # fmt: skip
# Texts in quotes are what somebody gave, and are left as they are.
_ARGUMENT: Final = re.compile(
    r"(?<![\w.'\"/?&%-])(?<!\w\()(?P<name>[a-z][a-z_0-9]*)=(?P<value>True|False|None|'[^']*'|\"[^\"]*\"|\[[^\]]*\]|\{[^}]*\}|-?\d[\w.+-]*|…)?"
    r"|(?<![\w=])'(?:[^'\\]|\\.)*'(?!\w)|(?<![\w=])\"(?:[^\"\\]|\\.)*\"(?!\w)"
)


def for_shell(message: str, command: argparse.ArgumentParser | None) -> str:
    """A message with options in place of arguments of Python.

    Parameters
    ----------
    message : str
        What an error, a warning or a summary says.
    command : ArgumentParser, optional
        Of the command that prints it. Of options that not every command has, only its own are advised.

    Returns
    -------
    str
    """
    options = dict(command._option_string_actions) if command else {}
    for advice, option, instead in _ADVICE:
        if option is None or option in options:
            message = re.sub(advice, instead, message)
    return _ARGUMENT.sub(lambda found: _as_option(found, options), message)


def _as_option(found: re.Match[str], options: Mapping[str, argparse.Action]) -> str:
    """An argument of Python as an option of the command; as it is where the command has none for it."""
    said, name, value = found[0], found["name"], found["value"] or ""
    if name is None:
        return str(said)
    whole = _RENAMED.get(found[0])
    if whole is not None and whole in options:
        return whole
    option = _RENAMED.get(name, f"--{name.replace('_', '-')}")
    if option not in options or value in ("False", "None"):
        return str(said)
    if not value or value == "True":
        return option
    if value[0] in "'\"":
        return f"{option} {shlex.quote(value[1:-1])}"
    if value[0] == "[":
        return f"{option} {','.join(item.strip().strip(chr(39)) for item in value[1:-1].split(','))}"
    return f"{option} {value}"


@contextlib.contextmanager
def warnings_for_shell(command: argparse.ArgumentParser | None) -> Iterator[None]:
    """While a command runs, warnings are printed with its options."""
    usual = warnings.formatwarning

    def as_printed(message: Warning | str, *where: Any, **line: Any) -> str:
        return usual(for_shell(str(message), command), *where, **line)

    warnings.formatwarning = as_printed
    try:
        yield
    finally:
        warnings.formatwarning = usual
