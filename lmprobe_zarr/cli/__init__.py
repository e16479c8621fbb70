"""The command line ``lmprobe-zarr``: parses arguments, calls the package, prints text or JSON. Has no logic of its own."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Final

import lmprobe_zarr
from lmprobe_zarr.cli.advice import for_shell, warnings_for_shell
from lmprobe_zarr.cli.arguments import Parser, join_negative, set_storage_options
from lmprobe_zarr.cli.cache import add_cache, add_clear, add_delete, add_evict
from lmprobe_zarr.cli.changes import add_annotate, add_copy, add_drop
from lmprobe_zarr.cli.demo import add_demo
from lmprobe_zarr.cli.exchange import add_export, add_import
from lmprobe_zarr.cli.extract import add_extract
from lmprobe_zarr.cli.report import add_report
from lmprobe_zarr.cli.show import add_info, add_show
from lmprobe_zarr.cli.sites import add_sites
from lmprobe_zarr.cli.sweep import add_sweep
from lmprobe_zarr.cli.upkeep import add_compact, add_gc, add_publish, add_repair, add_verify
from lmprobe_zarr.display import visible
from lmprobe_zarr.errors import LmprobeZarrError, MissingDependencyError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Parameters
    ----------
    arguments : sequence of str, optional
        Those of the process by default.

    Returns
    -------
    int
        0; 1 after an expected error, which is printed on standard error, and if a verification finds a problem; 130 after Ctrl-C. Wrong
        arguments exit with 2.
    """
    # What the encoding of the output lacks is printed as an escape, such as \xef, rather than ending the command.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    parser = _parser()
    options = parser.parse_args(join_negative(sys.argv[1:] if arguments is None else arguments))
    try:
        if options.print_completion is not None:
            return _print_completion(parser, options.print_completion)
        if options.command is None:
            parser.print_help()
            return 0
        set_storage_options(options)
        run: Callable[[argparse.Namespace], int | None] = options.run
        with warnings_for_shell(getattr(options, "parser", None)):
            code = run(options) or 0
        sys.stdout.flush()
    except LmprobeZarrError as error:
        print(f"lmprobe-zarr: {for_shell(visible(error, lines=True), getattr(options, 'parser', None))}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader of the pipe, such as head, has ended, so nothing more can be printed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"lmprobe-zarr: {for_shell(visible(error, lines=True), getattr(options, 'parser', None))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        said = "\n".join(getattr(error, "__notes__", ["interrupted; what was committed is kept"]))
        print(f"lmprobe-zarr: {for_shell(visible(said, lines=True), getattr(options, 'parser', None))}", file=sys.stderr)
        return 130
    return code


_COMMANDS: Final = (
    add_demo, add_extract, add_sites, add_info, add_show, add_annotate, add_sweep, add_report, add_cache, add_evict, add_clear, add_delete,
    add_drop, add_compact, add_gc, add_verify, add_repair, add_copy, add_publish, add_import, add_export,
)  # fmt: skip
#: The commands by what they are for.
_GROUPS: Final = {
    "first": ("demo",),
    "extract and look": ("extract", "sites", "info", "show", "annotate"),
    "probe": ("sweep", "report"),
    "space": ("cache", "evict", "clear", "delete", "drop", "compact", "gc"),
    "check": ("verify", "repair"),
    "share and move": ("copy", "publish", "import", "export"),
}
_EXAMPLES: Final = """first steps:
  lmprobe-zarr demo                                        # a small model on 400 sentences, its layers probed and drawn
  lmprobe-zarr extract MODEL prompts.jsonl --coords label  # store your own: a line {"text": …, "label": …} for each prompt
  lmprobe-zarr sweep --labels label                        # a probe for each layer
  lmprobe-zarr COMMAND --help                              # what a command takes

Documentation: docs/index.md of the project; docs/command-line.md has an example of every command and the exit codes.
"""


class _TopParser(Parser):
    """The parser of the command itself, whose help lists the commands by what they are for."""

    def format_help(self) -> str:
        """Usage, the commands and the first steps."""
        (commands,) = (action for action in self._actions if isinstance(action, argparse._SubParsersAction))
        summaries = {action.dest: action.help for action in commands._choices_actions}
        lists = ["\n".join([f"{title}:", *(f"  {name:<10}{summaries[name]}" for name in names)]) for title, names in _GROUPS.items()]
        options = "options:\n  --version, --print-completion {bash,zsh,tcsh}, -h"
        return "\n\n".join([self.format_usage().strip(), str(self.description), *lists, options, _EXAMPLES])


def _parser() -> argparse.ArgumentParser:
    parser = _TopParser(
        prog="lmprobe-zarr",
        usage="%(prog)s [-h] [--version] COMMAND …",
        description="Language-model activations in Zarr: extract once, slice, probe every layer.",
    )
    parser.add_argument("--version", action="version", version=f"lmprobe-zarr {lmprobe_zarr.__version__}")
    parser.add_argument("--print-completion", choices=("bash", "zsh", "tcsh"), help="print a shell's completion of this command")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser, prog="lmprobe-zarr")
    for add in _COMMANDS:
        add(commands)
    return parser


def _print_completion(parser: argparse.ArgumentParser, shell: str) -> int:
    try:
        import shtab
    except ImportError as error:
        raise MissingDependencyError("--print-completion needs shtab: pip install 'lmprobe-zarr[completion]'") from error
    print(shtab.complete(parser, shell=shell))
    return 0
