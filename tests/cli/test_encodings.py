"""Output in encodings that lack some of the characters that are printed: an escape in their place, and no traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from warmed import Warmed

import lmprobe_zarr as lz

COMMAND = "import runpy; runpy.run_module('lmprobe_zarr', run_name='__main__', alter_sys=True)"  # python -m lmprobe_zarr
NAME, TEXTS = "mödel/日本", ["日本語", "naïve", "plain"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("encodings") / "äcts"
    values = {"resid_mean": {0: np.ones((3, 4), "float32")}}
    lz.write_activations(place, model=NAME, prompts=TEXTS, pooled=values, coords={"label": ["ä", "b", "日"]})
    return place


@pytest.mark.few(6)
@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii", "latin-1", "cp437", "utf-16"])
@pytest.mark.parametrize("command", [["info"], ["show", "--list", "5"], ["info", "--json"], ["show", "--json"], ["verify"]], ids=" ".join)
def test_what_an_encoding_lacks_is_printed_as_an_escape(place: Path, encoding: str, command: list[str], warmed: Warmed) -> None:
    done = warmed.run(COMMAND, command[0], str(place), *command[1:], env={**os.environ, "PYTHONIOENCODING": encoding})
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)
    if "--json" in command:
        assert NAME in json.dumps(json.loads(done.stdout), ensure_ascii=False), "JSON reads back as it was, in every encoding"
    elif command == ["info"]:
        assert (NAME if encoding.startswith("utf") else NAME.encode(encoding, "backslashreplace").decode(encoding)) in done.stdout


def test_an_error_is_one_line_in_every_encoding(place: Path) -> None:
    arguments = [sys.executable, "-m", "lmprobe_zarr", "show", str(place), "--model", "日本"]
    done = subprocess.run(arguments, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(b"lmprobe-zarr: ")
    assert b"Traceback" not in done.stderr
