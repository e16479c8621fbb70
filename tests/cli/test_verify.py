"""Verification and repair on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import call, call_json
from stores import GROUP, make_batch

import lmprobe_zarr as lz
from lmprobe_zarr.cli import main
from lmprobe_zarr.errors import CorruptPartError


@pytest.fixture
def place(tmp_path: Path) -> Path:
    store = lz.open_store(tmp_path / "s")
    store.write(GROUP, make_batch(["a", "b"], columns={"label": [0, 1]}))
    return tmp_path / "s"


def chunk(place: Path) -> Path:
    (path,) = place.glob("*/*/prompts/resid_mean/c.1.0.0")
    return path


def test_verify_reports_problems_and_exits_with_1(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "verify", str(place))
    assert (code, "every checksum" in out, "none" in out) == (0, True, True)
    data = bytearray(chunk(place).read_bytes())
    data[20] ^= 1
    chunk(place).write_bytes(data)
    assert call(capsys, "verify", str(place), "--fast")[0] == 0
    code, out, _ = call(capsys, "verify", str(place))
    assert (code, str(chunk(place)) in out, "lmprobe-zarr repair drops it" in out) == (1, True, True)
    assert main(["verify", str(place), "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] is False
    assert [problem["kind"] for problem in document["problems"]] == ["content"]
    assert call(capsys, "verify", str(place), "--model", "acme/other")[0] == 1


def test_repair_plans_confirms_and_lists_what_to_extract_again(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "repair", str(place))[0] == 0, "nothing is wrong, so there is no question"
    path = chunk(place)
    path.write_bytes(b"")
    code, out, _ = call(capsys, "repair", str(place), "--dry-run")
    assert (code, "1 part to be written again" in out, "resid_mean, layer 1 of 2 prompts" in out) == (0, True, True)
    assert "--dry-run --json lists their prompts" in out
    code, _, err = call(capsys, "repair", str(place))
    assert (code, "--yes" in err) == (1, True)
    assert path.exists()
    document = call_json(capsys, "repair", str(place), "--dry-run")
    assert [(lost["variables"], lost["layers"], lost["texts"]) for lost in document["lost"]] == [(["resid_mean"], [1], ["a", "b"])]
    code, out, _ = call(capsys, "repair", str(place), "--yes")
    assert (code, out.count("to get them back, give the extract command that stored them again: it runs what is missing")) == (0, 1)
    assert call(capsys, "verify", str(place))[0] == 0


def test_damage_below_a_later_part_is_said_to_lose_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = chunk(place)
    store = lz.open_store(place)
    store.write(GROUP, make_batch(["a", "b"], columns={"label": [0, 1]}))
    damaged.write_bytes(b"")
    (problem,) = lz.open_store(place, mode="r").verify().problems
    assert problem.advice == "nothing is lost, a later part holds these values: repair() removes it"
    assert "nothing is lost, a later part holds these values: lmprobe-zarr repair removes it" in call(capsys, "verify", str(place))[1]
    assert store.repair(dry_run=True).lost == ()


def test_damage_that_a_later_part_covers_in_part_is_lost(place: Path) -> None:
    damaged = chunk(place)
    lz.open_store(place).write(GROUP, make_batch(["a"], columns={"label": [0]}))
    damaged.write_bytes(b"")
    store = lz.open_store(place)
    (problem,) = store.verify().problems
    assert problem.advice == "repair() drops it and lists the prompts to extract again"
    assert [lost.texts for lost in store.repair(dry_run=True).lost] == [("b",)]


def test_a_damaged_chunk_names_the_repair(place: Path) -> None:
    data = bytearray(chunk(place).read_bytes())
    data[20] ^= 1
    chunk(place).write_bytes(data)
    with pytest.raises(CorruptPartError, match=r"repair\(\) removes it and lists its prompts, or extract them again with refresh=True"):
        lz.open_store(place, mode="r").dataset().resid_mean.load()


def test_a_root_without_its_document_is_verified_and_repaired(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "zarr.json").unlink()
    code, _, err = call(capsys, "info", str(place))
    assert (code, f"lmprobe-zarr repair {place}" in err) == (1, True)
    assert call(capsys, "verify", str(place), "--fast")[0] == 1
    assert call(capsys, "repair", str(place), "--yes")[0] == 0
    assert call(capsys, "verify", str(place))[0] == 0
    assert lz.open_store(place, mode="r").dataset().text.values.tolist() == ["a", "b"]
