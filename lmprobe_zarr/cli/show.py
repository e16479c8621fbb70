"""The commands ``info`` and ``show``."""

from __future__ import annotations

import argparse
from typing import Any

from lmprobe_zarr.cli.arguments import add_choice, add_command, add_store
from lmprobe_zarr.cli.printing import plain, print_json
from lmprobe_zarr.layers import describe_layers
from lmprobe_zarr.plan import format_bytes
from lmprobe_zarr.schema import LEVELS
from lmprobe_zarr.store import Store, open_store

__all__ = ["add_info", "add_show"]


def add_info(commands: Any) -> None:
    command = add_command(commands, "info", _info, "say what a store holds: models, prompts, layers, variables, bytes")
    add_store(command, positional=True)


def _info(options: argparse.Namespace) -> None:
    store = open_store(options.store, mode="r")
    groups = [_describe_group(store, name) for name in store.groups()]
    if options.json:
        print_json({"store": store.url, "groups": groups})
        return
    print(f"{store.url}: {len(groups)} group{'' if len(groups) == 1 else 's'}")
    for group in groups:
        print(f"\n{group['model']}  [{group['group']}]")
        rows = {
            "prompts": f"{group['prompts']} in {group['parts']} part{'' if group['parts'] == 1 else 's'}",
            "tokens": str(group["tokens"]),
            "layers": describe_layers(group["layers"]) + (f" of {group['num_layers']}" if group["num_layers"] else ""),
            "hidden": str(group["hidden_size"] or "unknown"),
            "variables": ", ".join(f"{name} ({dtype})" for name, dtype in group["variables"].items()) or "none",
            "columns": ", ".join(group["columns"]) or "none",
            "size": format_bytes(group["nbytes"]),
            "provenance": ", ".join(f"{k}={_shown(v)}" for k, v in group["provenance"].items() if v is not None) or "unknown",
        }
        for name, value in rows.items():
            print(f"  {name:<11}{value}")


def _shown(value: Any) -> str:
    """A value of somebody's as a terminal may get it."""
    text = str(value)
    return text if text.isprintable() else repr(text)


def _describe_group(store: Store, name: str) -> dict[str, Any]:
    info = store.groups()[name]
    view = store.view(info)
    variables = {key: array.attributes.get("stored_dtype", array.dtype) for level in LEVELS for key, array in view.variables(level).items()}
    return {
        "model": info.model,
        "group": name,
        "prompts": len(view),
        "tokens": int(view.token_counts().sum()),
        "parts": len(view.parts),
        "layers": sorted({*view.layers("prompts"), *view.layers("tokens")}),
        "num_layers": info.num_layers,
        "hidden_size": info.hidden_size,
        "variables": variables,
        "columns": [column for column in view.columns("prompts") if column not in ("prompt", "prompt_sha256")],
        "nbytes": sum(int(entry[0]) for part in (*view.parts, *view.annotations) for entry in part.info.files.values()),
        "provenance": dict(info.provenance),
    }


def add_show(commands: Any) -> None:
    command = add_command(commands, "show", _show, "show a model's activations as xarray does, or some of its prompts")
    add_store(command, positional=True)
    add_choice(command)
    command.add_argument("--level", choices=LEVELS, default="prompts", help="one row per prompt, or per token (default: %(default)s)")
    command.add_argument("--prompt", action="append", help="only this prompt, by text or hash; may be repeated")
    command.add_argument("--list", type=int, metavar="N", help="list the first N prompts with their columns instead")


def _show(options: argparse.Namespace) -> None:
    store = open_store(options.store, mode="r")
    opened = store.tokens if options.level == "tokens" else store.dataset
    data = opened(options.model, options.prompt, group=options.group)
    if options.list is not None or options.json:
        dim = "token" if options.level == "tokens" else "prompt"
        table = data.drop_vars(list(data.data_vars)).reset_coords(drop=False).isel({dim: slice(0, options.list)})
        kept = [name for name, v in table.variables.items() if v.dims == (dim,) and name != "prompt_sha256"]
        rows = [{name: plain(table[name].values[i]) for name in kept} for i in range(table.sizes[dim])]
        if options.json:
            variables = {
                str(name): {"dims": list(v.dims), "shape": list(v.shape), "dtype": str(v.dtype)} for name, v in data.data_vars.items()
            }
            print_json({"model": str(data.model.values), "variables": variables, "rows": rows})
            return
        for row in rows:
            print("  ".join(f"{name}={value!r}" for name, value in row.items()))
        return
    print(data)
