"""The commands ``compact``, ``verify``, ``repair``, ``gc`` and ``publish``. Only ``gc`` and ``repair`` delete, and ask first."""

from __future__ import annotations

import argparse
from typing import Any

from lmprobe_zarr.cli.arguments import (
    add_choice,
    add_command,
    add_dry_run,
    add_prompts,
    add_store,
    add_yes,
    confirm,
    parse_layers,
    prompts_of,
)
from lmprobe_zarr.cli.printing import as_json, print_json, print_text
from lmprobe_zarr.cli.score_files import open_scores
from lmprobe_zarr.display import count_of
from lmprobe_zarr.errors import CorruptPartError
from lmprobe_zarr.storage import open_storage
from lmprobe_zarr.store import Mode, Store, open_store
from lmprobe_zarr.store.upkeep import GcSummary, RepairSummary

__all__ = ["add_compact", "add_gc", "add_publish", "add_repair", "add_verify"]


def add_compact(commands: Any) -> None:
    command = add_command(commands, "compact", _compact, "merge small parts into larger ones; the stored data stay the same")
    add_store(command, positional=True)
    add_choice(command)
    command.add_argument("--part-bytes", type=int, help="largest uncompressed size of a merged part (default: 1 GiB)")
    command.add_argument("--min-parts", type=int, default=2, help="do not merge runs of fewer parts than this (default: %(default)s)")
    command.add_argument("--all", action="store_true", help="write every part of format 1 again in format 2, merged or not")
    _add_no_shards(command)
    add_dry_run(command)


def _add_no_shards(command: argparse.ArgumentParser) -> None:
    command.add_argument("--no-shards", action="store_true", help="write each chunk to a file of its own")


def _compact(options: argparse.Namespace) -> None:
    plan = open_store(options.store).compact(
        options.model,
        group=options.group,
        part_bytes=options.part_bytes,
        min_parts=options.min_parts,
        shards=not options.no_shards,
        upgrade=options.all,
        dry_run=options.dry_run,
        progress=not options.json,
    )
    if options.json:
        runs = [[part.path for part in run.parts] for run in plan.runs]
        document = {"url": plan.url, "parts": plan.parts, "parts_after": plan.parts_after, "nbytes": plan.nbytes}
        print_json({**document, "runs": runs, "left": len(plan.left), "dry_run": options.dry_run})
    else:
        print_text(plan, options)


def add_verify(commands: Any) -> None:
    command = add_command(commands, "verify", _verify, "compare every file with what was committed; exit code 1 if there is a problem")
    add_store(command, positional=True)
    add_choice(command)
    command.add_argument("--fast", action="store_true", help="only read documents and compare sizes")


def _verify(options: argparse.Namespace) -> int:
    store = _open_any_root(options.store, "r")
    summary = store.verify(options.model, group=options.group, full=not options.fast, progress=not options.json)
    print_json({"ok": summary.ok, **as_json(summary)}) if options.json else print_text(summary, options)
    return 0 if summary.ok else 1


def add_repair(commands: Any) -> None:
    command = add_command(commands, "repair", _repair, "remove damaged files that a verification finds, and list what to extract again")
    command.add_argument("store", help="folder or URL of the store")
    add_choice(command)
    add_dry_run(command)
    add_yes(command)


def _repair(options: argparse.Namespace) -> None:
    store = _open_any_root(options.store, "a")
    progress = not options.json
    summary: RepairSummary = store.repair(options.model, group=options.group, dry_run=True, progress=progress)
    if summary.changes and not options.dry_run:
        if not options.json:
            print_text(summary, options)
        confirm(options, f"{count_of(len(summary.rewritten), 'part')} would be written again, {len(summary.dropped)} removed permanently.")
        summary = store.repair(options.model, group=options.group, progress=progress)
    print_json(as_json(summary)) if options.json else print_text(summary, options)


def _open_any_root(place: str | None, mode: Mode) -> Store:
    """A store, even if the document of its root is missing or damaged."""
    try:
        return open_store(place, mode)
    except CorruptPartError as error:
        if place is None or error.part != "":
            raise
        return Store(open_storage(place), mode=mode)


def add_gc(commands: Any) -> None:
    command = add_command(commands, "gc", _gc, "delete parts that were replaced long ago, and files that interrupted writers left")
    command.add_argument("store", help="folder or URL of the store")
    command.add_argument("--max-age", type=float, default=86400.0, help="only files older than this many seconds (default: %(default)s)")
    add_dry_run(command)
    add_yes(command)


def _gc(options: argparse.Namespace) -> None:
    store = open_store(options.store)
    summary = store.gc(max_age=options.max_age, dry_run=True)
    count = sum(map(len, (summary.replaced, summary.unfinished, summary.partials, summary.stamps, summary.uploads)))
    if count and not options.dry_run:
        confirm(options, f"{summary.freed} bytes in {count_of(count, 'entry', 'entries')} would be deleted.")
        summary = store.gc(max_age=options.max_age)
    print_json(_document(summary, options.dry_run)) if options.json else print_text(summary, options)


def _document(summary: GcSummary, dry_run: bool) -> dict[str, Any]:
    return {
        "url": summary.url,
        "replaced": [part.path for part in summary.replaced],
        "unfinished": [left.folder for left in summary.unfinished],
        "files": [*summary.partials, *summary.stamps],
        "uploads": [upload.key for upload in summary.uploads],
        "freed": summary.freed,
        "young": summary.young,
        "dry_run": dry_run,
    }


def add_publish(commands: Any) -> None:
    command = add_command(commands, "publish", _publish, "write a compacted, read-only copy that plain web servers can serve")
    command.add_argument("store", help="folder or URL of the store")
    command.add_argument("url", help="a new or empty folder or URL")
    add_choice(command)
    add_prompts(command, "only these prompts or hashes")
    command.add_argument("--layers", help="only these: all, middle, last, 0,4,-1 or 8:24")
    command.add_argument("--no-text", action="store_true", help="do not publish the prompts' texts")
    command.add_argument("--overwrite", action="store_true", help="replace an earlier published copy")
    command.add_argument("--no-page", action="store_true", help="write no index.html, the page for browsers")
    command.add_argument("--scores", metavar="PLACE", help="draw these scores on the page: what sweep --out wrote, or .zarr or .nc")
    licence = "for the card, by its name on the Hugging Face Hub, such as cc-by-4.0"
    command.add_argument("--licence", "--license", dest="licence", help=licence)
    command.add_argument("--private", action="store_true", help="make the repository on the Hugging Face Hub a private one")
    _add_no_shards(command)


def _publish(options: argparse.Namespace) -> None:
    summary = open_store(options.store, mode="r").publish(
        options.url,
        model=options.model,
        group=options.group,
        prompts=prompts_of(options),
        layers=None if options.layers is None else parse_layers(options.layers),
        text=not options.no_text,
        overwrite=options.overwrite,
        licence=options.licence,
        private=options.private or None,
        page=not options.no_page,
        scores=None if options.scores is None else open_scores(options.scores),
        shards=not options.no_shards,
        progress=not options.json,
    )
    if options.json:
        numbers = {name: getattr(summary, name) for name in ("groups", "parts", "annotations", "prompts", "nbytes")}
        print_json({"url": summary.url, **numbers})
    else:
        print_text(summary, options)
