"""``docs/command-line.md`` and ``docs/environment.md``, from the code. ``python tests/docs/reference_pages.py`` writes both again.

What the first says of an argument is what ``--help`` says of it, taken from the same parser. Its printed form is left to argparse, which
lays it out by the width of the terminal and otherwise in each Python.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from lmprobe_zarr import cli, config

DOCS = Path(__file__).resolve().parents[2] / "docs"
COMMAND_LINE = DOCS / "command-line.md"
ENVIRONMENT = DOCS / "environment.md"

COMMAND_LINE_HEAD = """# Command line

For people who work at a shell. After this page you know every command with an example, its options and its exit codes.

`lmprobe-zarr COMMAND`, or `python -m lmprobe_zarr COMMAND`. Every command takes `--json` and then prints one JSON document and nothing
else ([what is in it](json.md)). Commands that delete ask first, or need `--yes`. If no store is named, it is the [cache](caching.md).

This page is written from what `--help` says, by `python tests/docs/reference_pages.py`. `tests/docs/test_reference_pages.py` fails if the
two differ.

| exit code | |
|---|---|
| 0 | The command did what it says. |
| 1 | An expected error, printed on standard error in at most two lines; for `verify`, a problem was found. |
| 2 | Wrong arguments. The message names the nearest command or option. |
| 130 | Ctrl-C. What was committed before is kept, and the same command goes on from it. |

Every command that opens a store takes two options for remote places:

| argument | |
|---|---|
| `--anon` | open them without credentials, as a public bucket is read |
| `--storage-options JSON` | an object of options for their file system, such as `'{"endpoint_url": "https://s3.example.org"}'` |

In a CSV file of prompts and columns, an empty cell is a missing value ([files of prompts](prompts.md#files-on-the-command-line)).

`lmprobe-zarr --print-completion bash` prints the completion for a shell (bash, zsh or tcsh); it needs
`pip install 'lmprobe-zarr[completion]'`. Save it where the shell looks for completions, or `eval` it.
"""

# One example of each, which `tests/docs/test_docs.py` holds against the parser like every other command on a page.
EXAMPLES = {
    "demo": "lmprobe-zarr demo --output demo-output",
    "extract": "lmprobe-zarr extract gpt2 prompts.jsonl --coords label --pooling mean,last_token --store acts",
    "info": "lmprobe-zarr info acts",
    "annotate": "lmprobe-zarr annotate acts labels.csv --columns label",
    "drop": "lmprobe-zarr drop acts resid --layers 0:8 --model gpt2 --yes",
    "copy": "lmprobe-zarr copy acts s3://bucket/acts",
    "show": "lmprobe-zarr show acts --list 5",
    "sweep": "lmprobe-zarr sweep acts --variable resid_mean --labels label --plot scores.png",
    "sites": "lmprobe-zarr sites gpt2",
    "report": "lmprobe-zarr report acts --labels label -o report.html",
    "cache info": "lmprobe-zarr cache info --json",
    "evict": "lmprobe-zarr evict --max-gb 50",
    "clear": "lmprobe-zarr clear --model gpt2 --yes",
    "delete": "lmprobe-zarr delete acts prompts.txt --model gpt2",
    "compact": "lmprobe-zarr compact acts --dry-run",
    "verify": "lmprobe-zarr verify acts",
    "repair": "lmprobe-zarr repair acts --dry-run",
    "gc": "lmprobe-zarr gc acts",
    "publish": "lmprobe-zarr publish acts s3://bucket/acts",
    "import": "lmprobe-zarr import ~/.cache/lmprobe acts --all",
    "export": "lmprobe-zarr export acts cache --model gpt2",
}

ENVIRONMENT_HEAD = """# Environment variables

For people who configure the cache without code. After this page you know each variable, its values, its default and the function that
overrides it. The page about [the cache](caching.md) says what the settings are for.

A variable is read when its setting is first needed, and again after `lz.config.reload()`. Importing the package reads none. A setter
function overrides the variable. Neither applies to a store that a call names with `store=`, except for what is kept of remote
places (`LMPROBE_CACHE_KEPT_MB`, `LMPROBE_READ_CACHE`). A value that cannot be used is an error that names the variable. A variable
whose name looks like a mistyped one of these is warned of.

This page is written from `lmprobe_zarr.config.SETTINGS`, by `python tests/docs/reference_pages.py`. `tests/docs/test_reference_pages.py`
fails if the two differ.
"""


def commands(parser: argparse.ArgumentParser | None = None, name: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command that does something, by its name on the command line."""
    parser = cli._parser() if parser is None else parser
    nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not nested:
        yield name, parser
    for action in nested:
        for piece, below in action.choices.items():
            yield from commands(below, f"{name} {piece}".strip())


def arguments(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    """What a command takes, and what its ``--help`` says of it."""
    formatter = parser._get_formatter()
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction) or action.dest in ("anon", "storage_options"):
            continue  # the page says these once
        taken = action.metavar or ("{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper())
        if action.option_strings:
            shown = ", ".join(action.option_strings) + ("" if action.nargs == 0 else f" {taken}")
        else:
            shown = f"[{action.dest}]" if action.nargs == "?" else str(action.metavar or action.dest)
        yield shown, formatter._expand_help(action).replace(str(config.cache_dir()), "~/.cache/lmprobe")


def command_line() -> str:
    pieces = [COMMAND_LINE_HEAD]
    for name, parser in commands():
        rows = "\n".join(f"| `{shown}` | {meaning} |" for shown, meaning in arguments(parser))
        does = f"{parser.description}"
        summary = f"{does[0].upper()}{does[1:]}."
        pieces.append(f"## {name}\n\n{summary}\n\n```bash\n{EXAMPLES[name]}\n```\n\n| argument | |\n|---|---|\n{rows}\n")
    return "\n".join(pieces)


def environment() -> str:
    rows = ["| variable | sets | values | default | example | overridden by |", "|---|---|---|---|---|---|"]
    for setting in config.SETTINGS.values():
        call = f"`{setting.call}()`" if setting.call else "—"
        rows.append(f"| `{setting.variable}` | {setting.means} | {setting.values} | {setting.default} | `{setting.example}` | {call} |")
    return ENVIRONMENT_HEAD + "\n" + "\n".join(rows) + "\n"


if __name__ == "__main__":
    COMMAND_LINE.write_text(command_line(), encoding="utf-8")
    ENVIRONMENT.write_text(environment(), encoding="utf-8")
