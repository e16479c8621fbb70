"""The command ``report``."""

from __future__ import annotations

import argparse
from typing import Any

from lmprobe_zarr.cli.arguments import add_choice, add_command, add_store, check_target
from lmprobe_zarr.cli.printing import print_json
from lmprobe_zarr.cli.score_files import open_scores
from lmprobe_zarr.display import format_bytes, visible
from lmprobe_zarr.errors import InvalidArgumentError

__all__ = ["add_report"]


def add_report(commands: Any) -> None:
    command = add_command(commands, "report", _report, "write one self-contained HTML page about a store")
    add_store(command, positional=True)
    command.add_argument("-o", "--output", default="report.html", metavar="FILE", help="the file to write (default: %(default)s)")
    add_choice(command)
    command.add_argument("--scores", metavar="PLACE", help="plot these scores: what sweep --out wrote, or a .zarr folder or .nc file")
    command.add_argument("--labels", help="column with labels: sweep all layers for it, and show the score of each token")
    command.add_argument("--groups", help="column of groups, kept in one fold each (default: a column that shows pairs); '' for none")
    command.add_argument("--missing", default="raise", choices=("raise", "drop"), help="what to do about prompts without a label")
    command.add_argument("--variable", help="variable to fit on (default: resid_last_token, or another pooled variable that is stored)")
    command.add_argument("--prompt", action="append", help="show the tokens of this prompt, by text or hash; may be repeated")
    command.add_argument(
        "--prompts", type=int, default=4, metavar="N", help="how many prompts to show if none is named (default: %(default)s)"
    )
    command.add_argument("--no-text", action="store_true", help="show hashes instead of the texts of prompts")
    command.add_argument("--sample-mb", type=float, default=256.0, metavar="MB", help="megabytes to read for norms (default: %(default)g)")


def _report(options: argparse.Namespace) -> None:
    from lmprobe_zarr.reports import report

    check_target("--output", options.output, (".html", ".htm"))
    if not options.sample_mb > 0:
        raise InvalidArgumentError(f"--sample-mb {options.sample_mb:g} is not a size to read: give megabytes above 0")
    page = report(
        options.store, options.output, model=options.model, group=options.group,
        scores=None if options.scores is None else open_scores(options.scores), labels=options.labels, groups=options.groups,
        missing=options.missing, variable=options.variable,
        prompts=options.prompt or options.prompts, text=not options.no_text, sample_bytes=max(1, int(options.sample_mb * 2**20)),
    )  # fmt: skip
    nbytes = len(page.html.encode())
    if options.json:
        print_json({"output": options.output, "nbytes": nbytes})
        return
    print(f"report: {visible(options.output)} ({format_bytes(nbytes)})")
