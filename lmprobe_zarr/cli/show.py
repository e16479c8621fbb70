"""The commands ``info`` and ``show``."""

from __future__ import annotations

import argparse
from typing import Any

from lmprobe_zarr.cli.arguments import add_choice, add_command, add_store
from lmprobe_zarr.cli.printing import plain, print_json
from lmprobe_zarr.display import format_bytes, format_table, shorten, terminal_width, visible
from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.store import GroupContents, HeldArray, describe_view, differences, open_store
from lmprobe_zarr.store.format import LEVELS, unrecorded_fields

__all__ = ["add_info", "add_show"]

# A digest tells a reader nothing, and takes half of the table's width.
_NOT_LISTED = ("prompt_sha256",)


def add_info(commands: Any) -> None:
    command = add_command(commands, "info", _info, "show what a store holds: models, prompts, layers, variables, bytes")
    add_store(command, positional=True)
    add_choice(command)


def _info(options: argparse.Namespace) -> None:
    store = open_store(options.store, mode="r")
    matching = store.matching(options.model, group=options.group)
    if not matching and (options.model is not None or options.group is not None):
        store.find_group(options.model, group=options.group)  # raises an error that lists what is stored
    groups = [describe_view(store.view(info)) for info in matching]
    if options.json:
        print_json({"store": store.url, "groups": [_document(contents) for contents in groups]})
        return
    print(f"{visible(store.url)}: {len(groups)} group{'' if len(groups) == 1 else 's'}")
    width = terminal_width()
    for contents in groups:
        print(f"\n{visible(contents.group.model)}  [{contents.group.name}]")
        same = [other.group for other in groups if other.group.model == contents.group.model]
        differing = {"differs": f"from the other groups of this model in {differences(same)}"} if len(same) > 1 else {}
        for name, value in (contents.facts() | differing).items():
            if name == "variables" and contents.variables:
                rows = [_row(variable) for variable in contents.variables]
                lines = format_table(rows, width=max(67, width - 13)).splitlines()
                print("\n".join(f"  {name if not i else '':<11}{line}" for i, line in enumerate(lines)))
                continue
            # Long values continue on the next lines, aligned with their first line.
            for i, line in enumerate(_wrapped(visible(value), width - 13)):
                print(f"  {name if not i else '':<11}{line}")


def _row(variable: HeldArray) -> dict[str, object]:
    return {
        "name": variable.name,
        "per": variable.level.removesuffix("s"),
        "dtype": variable.dtype,
        "values": "—" if variable.raw_nbytes is None else format_bytes(variable.raw_nbytes),
        "stored": format_bytes(variable.nbytes),
        "smaller": variable.described_ratio,
        "codecs": variable.codecs,
    }


def _wrapped(text: str, width: int) -> list[str]:
    """A comma-separated list, broken into lines that fit."""
    lines = [""]
    for piece in text.split(", "):
        longer = f"{lines[-1]}, {piece}" if lines[-1] else piece
        if lines[-1] and len(longer) > width - 1:
            lines[-1] += ","
            longer = piece
            lines.append("")
        lines[-1] = longer
    return lines


def _document(contents: GroupContents) -> dict[str, Any]:
    return {
        "model": contents.group.model,
        "group": contents.group.name,
        "prompts": contents.prompts,
        "tokens": contents.tokens,
        "parts": contents.parts,
        "annotations": contents.annotations,
        "layers": list(contents.layers),
        "num_layers": contents.group.num_layers,
        "hidden_size": contents.group.hidden_size,
        "variables": {variable.name: variable.dtype for variable in contents.variables},
        "columns": [column.name for column in contents.columns if column.level == "prompts" and column.name in contents.own_columns],
        "stored": {
            variable.name: {"level": variable.level, "codecs": variable.codecs, "values": variable.raw_nbytes, "nbytes": variable.nbytes}
            for variable in contents.variables
        },
        "nbytes": contents.nbytes,
        "modules": contents.found,
        "provenance": dict(contents.group.provenance),
        "unknown": list(unrecorded_fields(contents.group.provenance)),
    }


def add_show(commands: Any) -> None:
    command = add_command(commands, "show", _show, "show a model's activations as xarray does, or some of its prompts")
    add_store(command, positional=True)
    add_choice(command)
    command.add_argument("--level", choices=LEVELS, default="prompts", help="one row per prompt, or per token (default: %(default)s)")
    command.add_argument("--prompt", action="append", help="only this prompt, by text or hash; may be repeated")
    listed = "instead, list the first N prompts (or tokens) with their columns (default: %(const)s)"
    command.add_argument("--list", type=int, nargs="?", const=10, metavar="N", help=listed)


def _show(options: argparse.Namespace) -> None:
    import xarray as xr

    if options.list is not None and options.list < 1:
        raise InvalidArgumentError(f"--list {options.list} is not a number of rows to list: give at least 1")
    store = open_store(options.store, mode="r")
    opened = store.tokens if options.level == "tokens" else store.dataset
    data = opened(options.model, options.prompt, group=options.group)
    width = terminal_width()
    if options.list is None and not options.json:
        with xr.set_options(display_width=width):  # type: ignore[no-untyped-call]
            # All line breaks here are xarray's: it escapes those in values and names.
            print("\n".join(shorten(line, width) for line in visible(data, lines=True).splitlines()))
        return
    dim = "token" if options.level == "tokens" else "prompt"
    columns = data.drop_vars(list(data.data_vars)).reset_coords(drop=False).isel({dim: slice(0, options.list)})
    kept = [str(name) for name, v in columns.variables.items() if v.dims == (dim,) and name not in _NOT_LISTED]
    values = {name: columns[name].values for name in kept}
    rows = [{name: plain(values[name][i]) for name in kept} for i in range(columns.sizes[dim])]
    if options.json:
        variables = {str(name): {"dims": list(v.dims), "shape": list(v.shape), "dtype": str(v.dtype)} for name, v in data.data_vars.items()}
        print_json({"model": str(data.model.values), "variables": variables, "rows": rows})
        return
    # The columns that identify a row come first; the text, which is longest, comes last.
    order = sorted(kept, key=lambda name: (name == "text", name not in ("prompt", "position"), name))
    print(format_table([{name: row[name] for name in order} for row in rows], width=width) or f"no {dim}s")
