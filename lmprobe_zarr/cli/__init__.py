"""The command line ``lmprobe-zarr``: parses arguments, calls the package, prints text or JSON. Has no logic of its own."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

import lmprobe_zarr
from lmprobe_zarr.cli.arguments import join_negative
from lmprobe_zarr.cli.cache import add_cache, add_clear, add_delete, add_evict
from lmprobe_zarr.cli.demo import add_demo
from lmprobe_zarr.cli.exchange import add_export, add_import
from lmprobe_zarr.cli.extract import add_extract
from lmprobe_zarr.cli.report import add_report
from lmprobe_zarr.cli.show import add_info, add_show
from lmprobe_zarr.cli.sites import add_sites
from lmprobe_zarr.cli.sweep import add_sweep
from lmprobe_zarr.cli.upkeep import add_compact, add_gc, add_publish, add_repair, add_verify
from lmprobe_zarr.display import visible
from lmprobe_zarr.errors import LmprobeZarrError

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
    options = _parser().parse_args(join_negative(sys.argv[1:] if arguments is None else arguments))
    try:
        run: Callable[[argparse.Namespace], int | None] = options.run
        code = run(options) or 0
        sys.stdout.flush()
    except LmprobeZarrError as error:
        print(f"lmprobe-zarr: {visible(error, lines=True)}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader of the pipe, such as head, has ended, so nothing more can be printed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"lmprobe-zarr: {visible(error, lines=True)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("lmprobe-zarr: interrupted; what was committed is kept", file=sys.stderr)
        return 130
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lmprobe-zarr", description="Language-model activations in Zarr: extract once, slice, probe every layer."
    )
    parser.add_argument("--version", action="version", version=f"lmprobe-zarr {lmprobe_zarr.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_demo(commands)
    add_extract(commands)
    add_sites(commands)
    add_info(commands)
    add_show(commands)
    add_sweep(commands)
    add_report(commands)
    add_cache(commands)
    add_evict(commands)
    add_clear(commands)
    add_delete(commands)
    add_compact(commands)
    add_verify(commands)
    add_repair(commands)
    add_gc(commands)
    add_publish(commands)
    add_import(commands)
    add_export(commands)
    return parser
