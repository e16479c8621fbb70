"""The commands ``annotate``, ``drop`` and ``copy``: what is stored gets columns, loses variables, or is copied into another store."""

from __future__ import annotations

import argparse
from typing import Any

import pandas as pd

from lmprobe_zarr.batch import prompt_hash
from lmprobe_zarr.cli.arguments import (
    add_choice,
    add_command,
    add_format,
    add_prompts,
    add_yes,
    confirm,
    parse_layers,
    prompts_of,
    split_names,
)
from lmprobe_zarr.cli.printing import as_json, print_json, print_text
from lmprobe_zarr.cli.prompt_files import read_prompts
from lmprobe_zarr.display import count_of, visible
from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.store import open_store

__all__ = ["add_annotate", "add_copy", "add_drop"]


def add_annotate(commands: Any) -> None:
    command = add_command(commands, "annotate", _annotate, "store columns of a file with prompts that are stored already")
    command.add_argument("store", help="folder or URL of the store")
    command.add_argument("file", help="prompts or hashes with their columns: .jsonl or .csv; - is standard input")
    command.add_argument("--columns", required=True, metavar="NAMES", help="the columns, separated by commas")
    add_format(command)
    add_choice(command)


def _annotate(options: argparse.Namespace) -> None:
    names = split_names(options.columns)
    if not names:
        raise InvalidArgumentError(f"--columns {options.columns!r} names no column")
    prompts, columns = read_prompts(options.file, file_format=options.format, text_column=options.text_column, columns=names)
    if chat := next((number for number, prompt in enumerate(prompts, start=1) if not isinstance(prompt, str)), None):
        raise InvalidArgumentError(
            f"{options.file} prompt {chat} is no text: give the hashes of chats, which lmprobe-zarr show --list prints, with --text-column"
        )
    keys = [prompt_hash(prompt) for prompt in prompts]
    if len(set(keys)) < len(keys):
        twice = next(prompt for number, prompt in enumerate(prompts) if keys[number] in keys[:number])
        raise InvalidArgumentError(f"{options.file} has the prompt {twice[:60]!r} twice: give each once")
    # Of objects: pandas would make floats of integers with gaps, which are another kind of column.
    table = pd.DataFrame({name: pd.Series(values, index=prompts, dtype=object) for name, values in columns.items()})
    missing = {name: int(count) for name, count in table.isna().sum().items()}
    store = open_store(options.store)
    store.annotate(options.model, table, group=options.group)
    if options.json:
        print_json({"url": store.url, "columns": names, "prompts": len(prompts), "missing": missing})
        return
    for name in names:
        gaps = f" with a value, {missing[name]} missing," if missing[name] else ""
        print(f"{visible(name)}: {count_of(len(prompts) - missing[name], 'prompt')}{gaps} in {visible(store.url)}")


def add_drop(commands: Any) -> None:
    command = add_command(commands, "drop", _drop, "delete variables, or some of their layers; all other values stay")
    command.add_argument("store", help="folder or URL of the store")
    command.add_argument("variables", help="such as resid, separated by commas; lmprobe-zarr info lists them")
    command.add_argument("--layers", help="only these: all, middle, last, 0,4,-1 or 8:24 (default: the whole variables)")
    add_choice(command)
    add_yes(command)


def _drop(options: argparse.Namespace) -> None:
    names = split_names(options.variables)
    store = open_store(options.store)
    group = store.find_group(options.model, group=options.group)
    layers = None if options.layers is None else parse_layers(options.layers)
    what = f"{', '.join(names)}{'' if layers is None else f' in layers {options.layers}'}"
    confirm(options, f"{what} of {group.model} in {store.url} would be deleted permanently.")
    parts = store.drop(options.model, names, layers=layers, group=options.group)
    print_json({"variables": names, "parts": parts}) if options.json else print(f"{what} deleted from {count_of(parts, 'part')}")


def add_copy(commands: Any) -> None:
    command = add_command(commands, "copy", _copy, "copy what another store lacks into it; call it again after an interruption")
    command.add_argument("store", help="folder or URL of the store")
    command.add_argument("url", help="folder or URL of the other store, which is made where there is none")
    add_choice(command)
    add_prompts(command, "only these prompts or hashes")


def _copy(options: argparse.Namespace) -> None:
    store = open_store(options.store, mode="r")
    summary = store.copy_to(options.url, model=options.model, group=options.group, prompts=prompts_of(options), progress=not options.json)
    print_json(as_json(summary)) if options.json else print_text(summary, options)
