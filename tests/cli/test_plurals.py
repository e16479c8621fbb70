"""Counts in what commands print: one of a thing is singular."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from command_line import call
from stores import GROUP, make_batch

import lmprobe_zarr as lz

#: A number 1 before a noun in the plural, or before a verb of several.
WRONG = re.compile(r"(?<![\d.])1 (?:\w+ )?(?:prompts|parts|annotations|groups|folders|files|tokens|entries|layers|rows|are)\b")


@pytest.mark.parametrize(
    "command",
    [
        "info {store}", "cache info {store}", "verify {store}", "compact {store} --dry-run", "gc {store} --dry-run",
        "gc {store} --max-age 0 --yes", "repair {store} --dry-run", "copy {store} {new}", "publish {store} {new}",
        "drop {store} resid --yes", "clear {store} --yes", "show {store} --list", "evict {store} --max-gb 0 --min-age 0 --dry-run",
    ],
)  # fmt: skip
def test_one_of_a_thing_is_singular(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    store = lz.open_store(tmp_path / "s")
    store.write(GROUP, make_batch(["a"]))
    store.annotate("acme/toy", {"label": {"a": 1}})
    store.write(GROUP, make_batch(["a"]))
    store.compact(min_parts=2)
    code, out, err = call(capsys, *command.format(store=store.url, new=tmp_path / "new").split())
    assert code == 0, err
    assert WRONG.search(out.replace(str(tmp_path), "")) is None, out
