"""The command line, called in this process."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from lmprobe_zarr.cli import main


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


SCHEMAS = Path(__file__).resolve().parents[2] / "docs" / "schemas.json"


@cache
def schema_of(command: str) -> Draft202012Validator:
    """The schema of what a command prints with ``--json``."""
    return Draft202012Validator(json.loads(SCHEMAS.read_text(encoding="utf-8"))["$defs"][command])


def check_document(command: str, document: Any) -> None:
    """Raise where a document differs from the schema of its command."""
    error = next(iter(schema_of(command).iter_errors(document)), None)
    assert error is None, f"{command}: {error}"


def call_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    code, out, err = call(capsys, *arguments, "--json")
    assert code == 0, err
    document = json.loads(out)
    check_document("cache info" if arguments[:2] == ("cache", "info") else arguments[0], document)
    return document
