"""The commands ``cache info``, ``evict``, ``clear`` and ``delete``. Commands that delete ask for confirmation first."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from typing import Any

from lmprobe_zarr.cache import (
    MIN_AGE,
    CacheInfo,
    ModelCacheInfo,
    cache_info,
    check_is_stored,
    clear_cache,
    clear_read_cache,
    evict,
    why_nothing_to_evict,
)
from lmprobe_zarr.cli.arguments import add_choice, add_command, add_dry_run, add_format, add_yes, confirm
from lmprobe_zarr.cli.printing import print_json, print_text
from lmprobe_zarr.cli.prompt_files import read_prompts
from lmprobe_zarr.display import count_of
from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.store import open_store
from lmprobe_zarr.store.upkeep import EvictPlan

__all__ = ["add_cache", "add_clear", "add_delete", "add_evict"]


def add_cache(commands: Any) -> None:
    summary = "show what the cache holds"
    group = commands.add_parser("cache", help=summary, description=summary)
    inner = group.add_subparsers(required=True, metavar="COMMAND")
    command = add_command(inner, "info", _info, "show what the cache holds, by model, and its size")
    command.add_argument("store", nargs="?", default=None, help="folder or URL to show instead of the cache")
    command.add_argument("--model", help="only this model: its name, hub id or folder")


def _info(options: argparse.Namespace) -> None:
    info = cache_info(options.model, store=options.store)
    print_json(_document(info)) if options.json else print(info)


def _document(info: CacheInfo) -> dict[str, Any]:
    return {
        "url": info.url,
        "total_size_bytes": info.total_size_bytes,
        "limit_bytes": info.limit_bytes,
        "models": [_model(model) for model in info.models],
        "legacy": [_model(model) for model in info.legacy],
        "reads": None if info.reads is None else asdict(info.reads),
    }


def _model(model: ModelCacheInfo) -> dict[str, Any]:
    dates = {name: None if (moment := getattr(model, name)) is None else moment.isoformat() for name in ("oldest", "newest")}
    return {**asdict(model), **dates}


def add_evict(commands: Any) -> None:
    command = add_command(commands, "evict", _evict, "remove the least recently used parts until the cache is within a limit")
    command.add_argument("store", nargs="?", default=None, help="folder or URL instead of the cache; needed for a remote place")
    command.add_argument("--max-gb", type=float, help="the limit in GB of 1024³ bytes (default: the cache's limit)")
    command.add_argument(
        "--min-age",
        type=float,
        help=f"keep parts that were committed or used less than this many seconds ago (default: {MIN_AGE:g}, and 0 for the cache)",
    )
    command.add_argument("--annotations", action="store_true", help="remove columns too, which no model gives again")
    command.add_argument("--given", action="store_true", help="remove from the cache also what was imported or written by hand")
    add_dry_run(command)
    add_yes(command)


def _evict(options: argparse.Namespace) -> None:
    request = {"max_gb": options.max_gb, "min_age": options.min_age, "annotations": options.annotations, "given": options.given or None}
    plan = evict(options.store, dry_run=True, **request)
    if plan is not None and plan.entries and not options.dry_run:
        parts = sum(not entry.is_annotation for entry in plan.entries)
        what = f"{count_of(parts, 'part')} of {count_of(plan.prompts, 'prompt')}"
        what += f" and {count_of(len(plan.entries) - parts, 'annotation')}" if parts < len(plan.entries) else ""
        confirm(options, f"{plan.freed} bytes would be removed: {what}.")
        plan = evict(options.store, **request)
    elif plan is not None:
        plan = replace(plan, dry_run=options.dry_run)
    if options.json:
        print_json({**_plan(plan), "dry_run": options.dry_run})
    else:
        print_text(f"nothing to evict: {why_nothing_to_evict(max_gb=options.max_gb)}" if plan is None else plan, options)


def _plan(plan: EvictPlan | None) -> dict[str, Any]:
    if plan is None:
        return {"entries": [], "freed": 0, "kept": None, "limit": None, "fits": True}
    entries = [entry.part.path for entry in plan.entries]
    return {"entries": entries, "freed": plan.freed, "kept": plan.kept, "limit": plan.limit, "fits": plan.fits}


def add_clear(commands: Any) -> None:
    command = add_command(commands, "clear", _clear, "delete all cached activations; this cannot be undone")
    command.add_argument("store", nargs="?", default=None, help="folder or URL instead of the cache; needed for a remote place")
    command.add_argument("--model", help="only activations of this model: its name, hub id or folder")
    command.add_argument("--legacy", action="store_true", help="also delete lmprobe's own entries beside the store")
    command.add_argument("--reads", action="store_true", help="only delete what is kept of remote stores, which is read from there again")
    add_dry_run(command)
    add_yes(command)


def _clear(options: argparse.Namespace) -> None:
    if options.reads:
        if options.store or options.model or options.legacy:
            raise InvalidArgumentError("--reads deletes what is kept of all remote stores, and nothing else: leave out the rest")
        if options.dry_run:
            raise InvalidArgumentError("--dry-run is for stored activations: lmprobe-zarr cache info says what --reads would delete")
        freed = clear_read_cache()
        print_json({"reads_bytes": freed}) if options.json else print(f"{freed} bytes of what was read of remote stores deleted")
        return
    info = cache_info(options.model, store=options.store)
    if options.model is not None and not info.models and not info.legacy:
        check_is_stored(open_store(options.store), options.model)
    if info.models and options.store is not None:
        open_store(options.store).check_writable()
    if not options.json:
        print(info)
    held = bool(info.models or (options.legacy and info.legacy))
    said = f"All of {options.model or 'this'} would be deleted{_columns_of(info)}."
    if options.dry_run:
        legacy = [_model(model) for model in info.legacy] if options.legacy else []
        document = {"models": [_model(model) for model in info.models], "legacy": legacy, "dry_run": True}
        print_json(document) if options.json else print(said if held else "Nothing would be deleted.")
        return
    if held:
        confirm(options, said)
    count = clear_cache(options.model, url=options.store, legacy=options.legacy)
    if options.json:
        print_json(
            {
                "deleted": int(count),
                "parts": count.parts,
                "annotations": count.annotations,
                "legacy_left": 0 if options.legacy else sum(model.num_prompts for model in info.legacy),
                "reads_left_bytes": 0 if info.reads is None else info.reads.size_bytes,
            }
        )
        return
    print(f"{count_of(int(count), 'entry', 'entries')} deleted: {count}")
    if info.legacy and not options.legacy:
        left = sum(model.num_prompts for model in info.legacy)
        remain = "remains" if left == 1 else "remain"
        print(f"{count_of(left, 'entry', 'entries')} of lmprobe's own {remain}; --legacy deletes {'it' if left == 1 else 'them'} too")
    if info.reads is not None and info.reads.entries:
        print(f"{info.reads.size_bytes} bytes of what was read of remote stores remain; --reads deletes them")


def _columns_of(info: CacheInfo) -> str:
    """What no model gives again, for the confirmation."""
    notes = sum(model.num_annotations for model in info.models)
    columns = sorted({name for model in info.models for name in model.columns})
    if not columns:
        return ""
    return f", with {count_of(notes, 'annotation')}; no model gives back the columns {', '.join(columns)}"


def add_delete(commands: Any) -> None:
    command = add_command(commands, "delete", _delete, "delete prompts and everything that is stored of them")
    command.add_argument("store", help="folder or URL of the store")
    command.add_argument("prompts", help="prompts or hashes: .txt, .jsonl or .csv; - is standard input")
    add_format(command)
    add_choice(command)
    add_dry_run(command)
    add_yes(command)


def _delete(options: argparse.Namespace) -> None:
    prompts, _ = read_prompts(options.prompts, file_format=options.format, text_column=options.text_column, columns=[])
    store = open_store(options.store)
    said = f"{count_of(len(prompts), 'prompt')} in {store.url} would be deleted permanently."
    if options.dry_run:
        store.check_writable()
        store.dataset(options.model, group=options.group, prompts=prompts)  # raises an error that names prompts that are not stored
        print_json({"prompts": len(prompts), "dry_run": True}) if options.json else print(said)
        return
    confirm(options, said)
    parts = store.delete(options.model, prompts, group=options.group)
    print_json({"prompts": len(prompts), "parts": parts}) if options.json else print(
        f"{count_of(len(prompts), 'prompt')} deleted from {count_of(parts, 'part')}"
    )
