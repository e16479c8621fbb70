"""What the page and the file of JSON output say; that outputs are so is checked wherever a test reads one (`command_line.call_json`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import json_schemas
import pytest
import reference_pages
from command_line import call, call_json, check_document
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from stores import GROUP, make_batch

import lmprobe_zarr as lz

AGAIN = "write it again: python tests/docs/json_schemas.py"


def test_the_file_and_the_page_are_those_of_the_code() -> None:
    assert json_schemas.FILE.read_text(encoding="utf-8") == json_schemas.document(), AGAIN
    assert json_schemas.PAGE.read_text(encoding="utf-8") == json_schemas.page(), AGAIN


def test_every_command_has_a_schema_in_which_every_key_is_described() -> None:
    assert set(json_schemas.schemas()) == {name for name, _ in reference_pages.commands()}
    for name, schema in json_schemas.schemas().items():
        Draft202012Validator.check_schema(schema)
        for each in schema.get("anyOf", [schema]):
            top = each["items"] if each["type"] == "array" else each
            assert all(inner.get("description") for inner in top["properties"].values()), name


def test_a_document_that_differs_is_found() -> None:
    check_document("delete", {"prompts": 1, "parts": 2})
    wrong: Any
    for wrong in ({"prompts": 1}, {"prompts": 1, "parts": "2"}, {"prompts": 1, "parts": 2, "more": 0}, []):
        with pytest.raises(AssertionError, match="delete"):
            check_document("delete", wrong)


def test_commands_whose_output_no_other_test_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = lz.open_store(tmp_path / "acts", durable=False)
    store.write(GROUP, make_batch(["a", "bb"], columns={"label": [0, 1]}))
    call_json(capsys, "compact", store.url, "--dry-run")
    call_json(capsys, "gc", store.url)
    call_json(capsys, "repair", store.url, "--dry-run")
    call_json(capsys, "publish", store.url, str(tmp_path / "copy"))
    call_json(capsys, "export", "--from", store.url, "--to", str(tmp_path / "cache"))
    call_json(capsys, "import", "--from", str(tmp_path / "cache"), "--to", str(tmp_path / "other"), "--model", GROUP.model)
    (tmp_path / "acts" / GROUP.name / next(iter(store.listing(GROUP).names)) / "zarr.json").write_bytes(b"{}")
    code, out, _ = call(capsys, "verify", store.url, "--json")
    assert code == 1
    check_document("verify", json.loads(out))
    call_json(capsys, "repair", store.url, "--yes")
