"""The commands ``import``, for lmprobe's caches and the files of other tools, and ``export``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from typing import Any, Final

from lmprobe_zarr import config
from lmprobe_zarr.bridges import (
    ImportSummary,
    export_safetensors,
    import_activault,
    import_hallulens,
    import_lmprobe_dataset,
    import_probelab,
    import_pt,
    import_saelens,
    import_safetensors,
    list_models,
)
from lmprobe_zarr.cli.arguments import add_choice, add_command, add_prompts, parse_layers, prompts_of, split_names
from lmprobe_zarr.cli.printing import as_json, print_json, print_text
from lmprobe_zarr.errors import InvalidArgumentError, ModelNotStoredError
from lmprobe_zarr.store import open_to_read

__all__ = ["add_export", "add_import"]

TOOLS: Final[Mapping[str, Callable[..., ImportSummary]]] = {
    "activault": import_activault, "hallulens": import_hallulens, "probelab": import_probelab, "saelens": import_saelens,
}  # fmt: skip


def add_import(commands: Any) -> None:
    command = add_command(
        commands, "import", _import, "import lmprobe's cache or dataset, or another tool's files, into a store; they are only read"
    )
    cache = config.default_name().removesuffix("/.zarr").replace("%", "%%")
    command.add_argument("places", nargs="*", metavar="CACHE STORE", help="short for --from CACHE --to STORE")
    command.add_argument("--from", dest="source", metavar="CACHE", help=f"folder or URL of the cache, dataset or files (default: {cache})")
    command.add_argument("--to", dest="store", metavar="STORE", help="folder or URL of the store (default: the cache's own)")
    which = command.add_mutually_exclusive_group()
    which.add_argument("--model", help="only this model, as it was given to lmprobe; with --tool its name, if the files do not say it")
    which.add_argument("--all", action="store_true", help="every model of the cache; needed if it holds several and none is named")
    which.add_argument("--dataset", action="store_true", help="--from is a dataset that lmprobe shared, such as hf://datasets/org/name")
    command.add_argument("--tool", choices=sorted(TOOLS), help="--from was written by this tool")
    command.add_argument("--tool-options", metavar="JSON", help="with --tool: arguments of its import that the files do not say, as JSON")
    command.add_argument("--as-model", metavar="MODEL", help="folder or hub id of the model that computed it, so that extract finds it")
    command.add_argument("--compute-dtype", help="with --as-model: the dtype that it was computed in (default: float32)")
    command.add_argument("--v1", action="store_true", help="old .pt files instead of safetensors; needs --model")
    add_prompts(command, "only these prompts; also gives the texts of prompts that the cache knows by hash only")
    command.add_argument("--strict", action="store_true", help="fail before anything is written if anything would be skipped")
    command.add_argument("--dry-run", action="store_true", help="print the plan and stop")


def _import(options: argparse.Namespace) -> None:
    _take_places(options, "source", "store")
    source = options.source if options.source is not None else str(config.cache_dir())
    if options.compute_dtype is not None and options.as_model is None:
        raise InvalidArgumentError("--compute-dtype is part of what --as-model says: give both")
    computed = None if options.compute_dtype is None else {"compute_dtype": options.compute_dtype}
    summary: ImportSummary
    rest: dict[str, Any] = {"as_model": options.as_model, "provenance": computed}
    rest |= {"prompts": prompts_of(options), "dry_run": options.dry_run, "strict": options.strict, "progress": not options.json}
    if options.v1 and options.model is None:
        raise InvalidArgumentError("old .pt caches do not hold the model's name: give it with --model")
    if options.tool is not None:
        summary = _import_tool(options, rest)
    elif options.tool_options is not None:
        raise InvalidArgumentError("--tool-options needs --tool, the tool that wrote the files")
    elif options.dataset:
        if options.source is None or options.v1:
            raise InvalidArgumentError("--dataset needs --from, the folder or URL of the dataset, and not --v1")
        summary = import_lmprobe_dataset(source, options.store, **rest)
    elif options.v1:
        summary = import_pt(source, options.store, model=options.model, **rest)
    else:
        if options.model is None and not options.all and len(names := list_models(source)) > 1:
            raise InvalidArgumentError(f"{source} holds {', '.join(map(repr, names))}: choose one with --model, or all with --all")
        try:
            summary = import_safetensors(source, options.store, model=options.model, **rest)
        except ModelNotStoredError as error:
            if options.model is not None or options.all:
                raise
            raise ModelNotStoredError(f"{error}; --dataset or --tool says that it is something else") from error
    print_json(as_json(summary)) if options.json else print_text(summary, options)


def _take_places(options: argparse.Namespace, source: str, target: str) -> None:
    """Enter places that were given without ``--from`` and ``--to`` as if they had been."""
    if len(options.places) > 2:
        raise InvalidArgumentError(f"{len(options.places)} places were given: give one to read from and one to write to")
    for place, name, option in zip(options.places, (source, target), ("--from", "--to"), strict=False):
        if getattr(options, name) is not None:
            raise InvalidArgumentError(f"{place!r} and {option} {getattr(options, name)!r} both say that place: give one of them")
        setattr(options, name, place)


def _import_tool(options: argparse.Namespace, rest: dict[str, Any]) -> ImportSummary:
    """Import the files of another tool: what they do not say is in ``--model``, ``--prompts`` and ``--tool-options``."""
    if options.source is None or options.all or options.dataset or options.v1 or options.as_model is not None:
        raise InvalidArgumentError("--tool needs --from, the files, and not --all, --dataset, --v1 or --as-model")
    try:
        given = json.loads(options.tool_options or "{}")
    except ValueError as error:
        raise InvalidArgumentError(f"--tool-options {options.tool_options!r:.60} is no JSON: {error}") from error
    known = ("mapping", "responses", "columns", "variable", "layer", "layers")
    if not isinstance(given, dict) or set(given) - set(known):
        raise InvalidArgumentError(f"--tool-options {options.tool_options!r:.60} is no JSON object with some of {', '.join(known)}")
    given |= {"model": options.model} if options.model is not None else {}
    if (options.tool == "probelab") != (rest["prompts"] is not None):
        raise InvalidArgumentError("--tool probelab needs --prompts, those that were run, in their order; other tools take none")
    given |= {"prompts": rest["prompts"]} if options.tool == "probelab" else {}
    if options.model is None and options.tool in {"probelab", "saelens"}:
        raise InvalidArgumentError(f"{options.tool} does not write which model it was: give it with --model")
    try:
        return TOOLS[options.tool](options.source, options.store, **given, **{k: rest[k] for k in ("dry_run", "strict", "progress")})
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise InvalidArgumentError(f"--tool {options.tool} has no such option: {error}") from error


def add_export(commands: Any) -> None:
    command = add_command(commands, "export", _export, "write a store's activations as a cache that lmprobe uses as its own")
    command.add_argument("places", nargs="*", metavar="STORE CACHE", help="short for --from STORE --to CACHE")
    command.add_argument("--from", dest="store", metavar="STORE", help="folder or URL of the store (default: the cache's own)")
    command.add_argument("--to", dest="target", metavar="CACHE", help="folder or URL of the cache to write into")
    add_choice(command)
    command.add_argument("--layers", default="all", help="all, middle, last, numbers (0,4,-1) or a slice (8:24) (default: %(default)s)")
    command.add_argument("--variables", help="only these, separated by commas (default: all that lmprobe's format has a name for)")
    command.add_argument("--dtype", help="float16, bfloat16 or float32 (default: as stored)")
    command.add_argument("--overwrite", action="store_true", help="replace existing files")
    add_prompts(command, "only these prompts")


def _export(options: argparse.Namespace) -> None:
    _take_places(options, "store", "target")
    if options.target is None:
        raise InvalidArgumentError("nothing says where to write: give the folder or URL of the cache with --to")
    store = open_to_read(options.store)
    models = store.models()
    model = options.model or (models[0] if len(models) == 1 else None)
    if model is None:
        raise ModelNotStoredError(f"{store.url} holds {', '.join(models) or 'nothing yet'}: choose a model with --model")
    summary = export_safetensors(
        store, options.target, model=model, prompts=prompts_of(options), group=options.group, dtype=options.dtype,
        layers=None if options.layers == "all" else parse_layers(options.layers), overwrite=options.overwrite, progress=not options.json,
        variables=split_names(options.variables) if options.variables else None,
    )  # fmt: skip
    print_json(as_json(summary)) if options.json else print_text(summary, options)
