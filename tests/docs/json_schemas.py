"""What every command prints with ``--json``, as JSON Schema. ``python tests/docs/json_schemas.py`` writes the file and the page again.

Records of the package are described from their own types and docstrings. Every output that a test of the command line reads is validated.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import types
import typing
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Literal

from lmprobe_zarr.bridges import ExportSummary, ImportSummary
from lmprobe_zarr.cache import ModelCacheInfo
from lmprobe_zarr.cache.info import ReadsInfo
from lmprobe_zarr.extraction import ExtractPlan, ExtractStats
from lmprobe_zarr.store.upkeep import CopySummary, RepairSummary, VerifySummary

DOCS: Final = Path(__file__).resolve().parents[2] / "docs"
FILE: Final = DOCS / "schemas.json"
PAGE: Final = DOCS / "json.md"
Schema = dict[str, Any]

_PLAIN: Final[Mapping[Any, str]] = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null", datetime: "string"}


def _of(kind: str | list[str], description: str = "", **rest: Any) -> Schema:
    return {"type": kind, **({"description": description} if description else {}), **rest}


def _list(items: Schema, description: str = "") -> Schema:
    return _of("array", description, items=items)


def _object(
    properties: Mapping[str, Schema], *, optional: tuple[str, ...] = (), rest: bool | Schema = False, description: str = ""
) -> Schema:
    required = [name for name in properties if name not in optional]
    return _of("object", description, properties=dict(properties), required=required, additionalProperties=rest)


def _type(hint: Any) -> Schema:
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        kinds = [_type(each) for each in inside]
        if all(set(kind) == {"type"} for kind in kinds):
            return {"type": [kind["type"] for kind in kinds]}
        return {"anyOf": kinds}
    if origin is Literal:
        return {"enum": list(inside)}
    if origin is tuple:
        return _list(_type(inside[0]))
    if origin is not None and issubclass(origin, Mapping):
        return _of("object", additionalProperties=_type(inside[1]))
    if dataclasses.is_dataclass(hint):
        return _record(hint)
    return {} if hint is Any else {"type": _PLAIN[hint]}


def _record(record: Any, *, without: tuple[str, ...] = ()) -> Schema:
    """The schema of a dataclass: types from its annotations, descriptions from its docstring. An undefined number is null."""
    described = _parameters(record)
    hints = typing.get_type_hints(record)
    found = {}
    for field in dataclasses.fields(record):
        if field.name not in without:
            schema = _type(hints[field.name])
            if schema.get("type") == "number":
                schema = {"type": ["number", "null"]}
            found[field.name] = {**schema, "description": described[field.name]}
    return _object(found)


def _parameters(record: Any) -> dict[str, str]:
    """What a docstring says of each parameter, in a line."""
    section = (inspect.getdoc(record) or "").split("Parameters\n----------\n", 1)[1]
    section = re.split(r"\n\w[\w ]*\n-{3,}\n", section)[0]
    found: dict[str, list[str]] = {}
    names: list[str] = []
    for line in section.splitlines():
        if line and not line.startswith(" "):
            names = line.partition(" : ")[0].split(", ")
            found |= {name: [] for name in names}
        elif line.strip():
            for name in names:
                found[name].append(line.strip())
    return {name: " ".join(lines).replace("``", "`") for name, lines in found.items()}


_TEXT: Final = _of("string")
_INT: Final = _of("integer")
_SCORE: Final = _of(["number", "null"], "null where it is undefined")
_URL: Final = _of("string", "address of the store")
_DRY: Final = _of("boolean", "whether nothing was changed, because of `--dry-run`")


def _model() -> Schema:
    return _record(ModelCacheInfo)


def _nullable(schema: Schema, description: str) -> Schema:
    return {"anyOf": [schema, {"type": "null"}], "description": description}


def _groups() -> Schema:
    stored = _object(
        {
            "level": _of("string", "`prompts` or `tokens`"),
            "codecs": _of("string", "how its chunks are encoded"),
            "values": _of(["integer", "null"], "bytes of its values; null where they have no fixed size"),
            "nbytes": _of("integer", "bytes on disk"),
        }
    )
    return _object(
        {
            "model": _of("string", "name of the model"),
            "group": _of("string", "name of the group, for `--group`"),
            "prompts": _of("integer", "distinct prompts"),
            "tokens": _of("integer", "stored tokens"),
            "parts": _of("integer", "parts that are shown"),
            "annotations": _of("integer", "annotations that are shown"),
            "layers": _list(_INT, "layers that anything is stored of"),
            "num_layers": _of(["integer", "null"], "layers of the model"),
            "hidden_size": _of(["integer", "null"], "width of the model"),
            "variables": _of("object", "dtype of each variable", additionalProperties=_TEXT),
            "columns": _list(_TEXT, "columns of prompts that were given"),
            "stored": _of("object", "how each variable is stored", additionalProperties=stored),
            "nbytes": _of("integer", "bytes on disk"),
            "modules": _of("string", "the modules that the sites were found in"),
            "provenance": _of("object", "what else identifies the group", additionalProperties=True),
            "unknown": _list(_TEXT, "fields of the provenance that are not recorded"),
        }
    )


def _scores() -> Schema:
    row = _object(
        {
            "layer": _of("integer", "left out with `--choose layer`"),
            "probe": _of("string", "name of the probe or control"),
            "kind": _of("string", "`probe` or `control`"),
            "strength": _of("number", "with `--strengths`"),
            "chosen_layers": _list(_INT, "with `--choose layer`: what was chosen in some fold"),
            "chosen_probes": _list(_TEXT, "with `--choose probe`: what was chosen in some fold"),
        },
        optional=("layer", "strength", "chosen_layers", "chosen_probes"),
        rest=_SCORE,
        description="the mean over folds of each metric by its name, `<metric>_std`, the standard deviation over folds (of a control of "
        "many shuffles, over the shuffles), and, where labels were shuffled many times, `<metric>_p_value` and `<metric>_p_any_layer`",
    )
    return _object(
        {
            "model": _of("string", "name of the model"),
            "variable": _of("string", "what was probed"),
            "labels": _of("string", "the column of the labels"),
            "prompts": _of("integer", "prompts with a label"),
            "left_out": _of("integer", "prompts without a label, which `--missing drop` leaves out"),
            "classes": _list(
                _object(
                    {"label": _of(["string", "number", "boolean"], "the class"), "prompts": _of("integer", "prompts of it that are tested")}
                ),
                "each class; empty for a regression",
            ),
            "folds": _of("integer", "folds, with `--repeats` of all repeats"),
            "groups": _of(["string", "null"], "the column of `--groups`"),
            "cv": _of("string", "how the folds come about"),
            "scores": _list(row, "a row for each layer, probe or control, and strength"),
            "chosen": _of("string", "with `--choose`: what was chosen, and by which score"),
        },
        optional=("chosen",),
    )


def schemas() -> dict[str, Schema]:
    """A schema for each command; several in ``anyOf`` where an option changes what is printed, each with that option as its title."""
    extract_plan = _record(ExtractPlan)
    extract_plan["properties"] |= {
        "missing": _of("integer", "prompts that the model would run on"),
        "fits": _of("boolean", "whether the disk has room for it"),
    }
    extract_plan["required"] += ["missing", "fits"]
    verified = _record(VerifySummary)
    verified["properties"] = {"ok": _of("boolean", "whether there are no problems; else the exit code is 1"), **verified["properties"]}
    verified["required"] = ["ok", *verified["required"]]
    spread = "mean accuracy of each variable, and its standard deviation as `<variable>_std`"
    demo_row = _object({"layer": _of("integer", "the layer")}, rest=_SCORE, description=spread)
    best = _object(
        {
            "variable": _of("string", "the variable"),
            "layer": _of("integer", "the layer"),
            "accuracy": _of("number", "its mean accuracy"),
            "chosen_by": _of("string", "why this accuracy is too high"),
        }
    )
    listed = _object(
        {"dims": _list(_TEXT, "names of its dimensions"), "shape": _list(_INT, "its sizes"), "dtype": _of("string", "dtype of its values")}
    )
    found: dict[str, Schema] = {
        "demo": _object(
            {
                "stats": {**_record(ExtractStats), "description": "what the extraction did"},
                "table": _list(demo_row, "a row for each layer"),
                "bag_of_words": _of("number", "mean accuracy of logistic regression on word counts"),
                "best": {**best, "description": "the best of all layers and variables"},
                "plot": _of("string", "path of the picture"),
            }
        ),
        "extract": {"anyOf": [{"title": "", **_record(ExtractStats)}, {"title": "--dry-run", **extract_plan}]},
        "info": _object({"store": _URL, "groups": _list(_groups(), "one for each model and provenance")}),
        "annotate": _object(
            {
                "url": _URL,
                "columns": _list(_TEXT, "columns that were written"),
                "prompts": _of("integer", "prompts in the file"),
                "missing": _of("object", "of each column, how many of them have no value", additionalProperties=_INT),
            }
        ),
        "drop": _object({"variables": _list(_TEXT, "what was dropped"), "parts": _of("integer", "parts that held any")}),
        "copy": _record(CopySummary),
        "show": _object(
            {
                "model": _of("string", "name of the model"),
                "variables": _of("object", "each variable", additionalProperties=listed),
                "rows": _list(_of("object", additionalProperties=True), "columns of each prompt or token, all or the first of `--list`"),
            }
        ),
        "sweep": {
            "anyOf": [
                {"title": "", **_scores()},
                {
                    "title": "--dry-run",
                    **_object(
                        {
                            "fits": _of("integer", "fits that would be made"),
                            "tasks": _of("integer", "tasks that they are made in"),
                            "nbytes": _of("integer", "bytes of activations that would be read"),
                            "layers": _list(_INT, "layers"),
                            "chosen": _of("string", "with `--choose`: how"),
                        },
                        optional=("chosen",),
                    ),
                },
            ]
        },
        "sites": _list(
            _object(
                {
                    "site": _of("string", "name of a built-in site; empty for other modules"),
                    "path": _of("string", "path of the module, with `:input` for what it is given"),
                    "layers": _of("string", "layers that have it; empty outside of the blocks"),
                    "width": _of("integer", "values of a token"),
                    "nbytes": _of("integer", "bytes of a token in one layer"),
                }
            )
        ),
        "report": _object({"output": _of("string", "path of the page"), "nbytes": _of("integer", "its bytes")}),
        "cache info": _object(
            {
                "url": _of("string", "address of the cache"),
                "total_size_bytes": _of("integer", "bytes of all models"),
                "limit_bytes": _of(["integer", "null"], "the limit; null where there is none"),
                "models": _list(_model(), "what is stored"),
                "legacy": _list(_model(), "lmprobe's own entries beside the store"),
                "reads": _nullable(_record(ReadsInfo), "what is kept of remote stores; null for a store that was named"),
            }
        ),
        "evict": _object(
            {
                "entries": _list(_TEXT, "parts that go, by their keys"),
                "freed": _of("integer", "bytes that become free"),
                "kept": _of(["integer", "null"], "bytes that stay; null where there is nothing to evict from"),
                "limit": _of(["integer", "null"], "the limit in bytes; null where none is set"),
                "fits": _of("boolean", "whether what stays is within the limit"),
                "dry_run": _DRY,
            }
        ),
        "clear": {
            "anyOf": [
                {
                    "title": "",
                    **_object(
                        {
                            "deleted": _of("integer", "prompts that were deleted"),
                            "parts": _of("integer", "parts that held them"),
                            "annotations": _of("integer", "annotations that went with them"),
                            "legacy_left": _of("integer", "lmprobe's own entries that remain"),
                            "reads_left_bytes": _of("integer", "bytes of what was read of remote stores that remain"),
                        }
                    ),
                },
                {
                    "title": "--dry-run",
                    **_object(
                        {
                            "models": _list(_model(), "what would be deleted"),
                            "legacy": _list(_model(), "with `--legacy`: lmprobe's own entries that would be deleted"),
                            "dry_run": _DRY,
                        }
                    ),
                },
                {
                    "title": "--reads",
                    **_object({"reads_bytes": _of("integer", "bytes of what was read of remote stores that were deleted")}),
                },
            ]
        },
        "delete": {
            "anyOf": [
                {
                    "title": "",
                    **_object({"prompts": _of("integer", "prompts that were named"), "parts": _of("integer", "parts that held any")}),
                },
                {"title": "--dry-run", **_object({"prompts": _of("integer", "prompts that were named, all stored"), "dry_run": _DRY})},
            ]
        },
        "compact": _object(
            {
                "url": _URL,
                "parts": _of("integer", "parts before"),
                "parts_after": _of("integer", "parts afterwards"),
                "nbytes": _of("integer", "bytes of the parts that are merged"),
                "runs": _list(_list(_TEXT), "the parts that become one, by their keys"),
                "left": _of("integer", "runs that were not merged, since another process changed their parts"),
                "dry_run": _DRY,
            }
        ),
        "verify": verified,
        "repair": _record(RepairSummary),
        "gc": _object(
            {
                "url": _URL,
                "replaced": _list(_TEXT, "parts that others replaced, by their keys"),
                "unfinished": _list(_TEXT, "folders that interrupted writers left"),
                "files": _list(_TEXT, "single files: documents that were never committed, and signs of parts that are gone"),
                "uploads": _list(_TEXT, "uploads that were never finished"),
                "freed": _of("integer", "bytes"),
                "young": _of("integer", "what stays because it is not old enough"),
                "dry_run": _DRY,
            }
        ),
        "publish": _object(
            {
                "url": _of("string", "address of the copy"),
                "groups": _of("integer", "groups in it"),
                "parts": _of("integer", "parts with activations in it"),
                "annotations": _of("integer", "annotations in it, which hold columns only"),
                "prompts": _of("integer", "prompts in it"),
                "nbytes": _of("integer", "its bytes"),
            }
        ),
        "import": _record(ImportSummary),
        "export": _record(ExportSummary),
    }
    return found


def document() -> str:
    """The file of all schemas."""
    held = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "What lmprobe-zarr prints with --json",
        "description": "One schema for each command, in $defs.",
        "$defs": schemas(),
    }
    return json.dumps(held, indent=1, ensure_ascii=False) + "\n"


PAGE_HEAD: Final = """# JSON output

For people who call `lmprobe-zarr` from scripts. After this page you know what each command prints with `--json`.

A command prints one JSON document on standard output. Progress, warnings and errors go to standard error, so
`lmprobe-zarr info acts --json | jq .groups[0].prompts` works whatever else is said. A number that is undefined, or infinite, is `null`.
Sizes are in bytes, times in seconds, dates in ISO 8601. Keys are not removed or renamed within a minor version; new ones may come. Exit
codes are those of [the command line](command-line.md).

[schemas.json](schemas.json) holds a [JSON Schema](https://json-schema.org) for each command, under `$defs`. Every output that the tests
read is validated against it. File and page are written by `python tests/docs/json_schemas.py`.
"""


def _shown(schema: Schema) -> str:
    """A type in words."""
    if "anyOf" in schema:
        return " or ".join(_shown(each) for each in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    kind = schema.get("type")
    if kind == "array":
        return f"list of {_shown(schema['items'])}"
    if isinstance(kind, list):
        return " or ".join(kind)
    return str(kind or "any value")


def _rows(schema: Schema, before: str = "") -> list[str]:
    """A row for each key, those of inner objects behind them."""
    rows = []
    for name, inner in schema.get("properties", {}).items():
        rows.append(f"| `{before}{name}` | {_shown(inner)} | {_escaped(inner.get('description', ''))} |")
        below, path = inner, f"{before}{name}"
        while True:
            if "anyOf" in below:
                below = next((each for each in below["anyOf"] if each.get("type") == "object"), {})
            elif below.get("type") == "array":
                below, path = below["items"], f"{path}[]"
            elif "properties" not in below and isinstance(below.get("additionalProperties"), dict):
                below, path = below["additionalProperties"], f"{path}.*"
            else:
                break
        rows += _rows(below, f"{path}.")
        if below.get("properties") and isinstance(below.get("additionalProperties"), dict):
            rows.append(f"| `{path}.*` | {_shown(below['additionalProperties'])} | {_escaped(below.get('description', ''))} |")
    return rows


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;") if "`" not in text else text.replace("|", "\\|")


def page() -> str:
    """The page about them."""
    pieces = [PAGE_HEAD]
    for name, schema in schemas().items():
        pieces.append(f"## {name}\n")
        for each in schema.get("anyOf", [schema]):
            if each.get("title"):
                pieces.append(f"With `{each['title']}`:\n")
            rows = _rows(each["items"], "[].") if each["type"] == "array" else _rows(each)
            pieces.append("\n".join(["| key | type | |", "|---|---|---|", *rows]) + "\n")
    return "\n".join(pieces)


if __name__ == "__main__":
    FILE.write_text(document(), encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")
