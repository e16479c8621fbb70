"""The command ``sites``."""

from __future__ import annotations

import argparse
from typing import Any

from lmprobe_zarr.cli.arguments import add_command
from lmprobe_zarr.cli.printing import print_json
from lmprobe_zarr.display import format_bytes, format_table, terminal_width
from lmprobe_zarr.extraction import list_sites

__all__ = ["add_sites"]


def add_sites(commands: Any) -> None:
    command = add_command(
        commands, "sites", _sites, "list what can be taken of a model: built-in sites, and every module by its path", remote=False
    )
    command.add_argument("model", help="folder or hub id of the model")
    command.add_argument("--revision", help="branch, tag or commit of a hub model")
    command.add_argument("--dtype", default="auto", help="auto, float32, float16, bfloat16 (default: %(default)s)")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default: %(default)s)")
    command.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def _sites(options: argparse.Namespace) -> None:
    found = list_sites(
        options.model, revision=options.revision, dtype=options.dtype, device=options.device, trust_remote_code=options.trust_remote_code
    )
    if options.json:
        print_json(found.to_dict("records"))
        return
    built_in, modules = found[found["site"] != ""], found[found["site"] == ""]
    for rows, name in ((built_in, "site"), (modules, "path")):
        table = [
            {
                name: row[name],
                "layers": row["layers"] or "outside of the blocks",
                "shape": f"(token, {row['width']})",
                "per token": format_bytes(row["nbytes"]),
            }
            for row in rows.to_dict("records")
        ]
        print(format_table(table, width=terminal_width()) + ("\n" if name == "site" else ""))
