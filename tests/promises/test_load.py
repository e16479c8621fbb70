"""A short form of `benchmarks.load`: processes that read, write, merge and clean one store, and not one wrong value."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT
from s3_server import S3

STRESS = bool(os.environ.get("LMPROBE_ZARR_STRESS"))


def load(url: str, minutes: float, readers: int, writers: int) -> dict[str, Any]:
    command = [sys.executable, "-W", "error", "-m", "benchmarks.load", url, "--json", "--minutes", str(minutes)]
    command += ["--readers", str(readers), "--writers", str(writers)]
    root = ROOT
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=60 * minutes + 400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.long
@pytest.mark.few(1)
@pytest.mark.parametrize("where", ["local", "s3"])
def test_many_processes_read_no_wrong_value_and_neither_memory_nor_open_files_grow(
    where: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if where == "s3":
        server: S3 = request.getfixturevalue("s3")
        assert server.endpoint == os.environ["AWS_ENDPOINT_URL"]
    url = str(tmp_path) if where == "local" else "s3://team/load"
    result = load(url, 10.0, 16, 4) if STRESS else load(url, 0.1, 2, 1)
    done = result["done"]
    assert done["read"] > 0
    assert done["write"] > 0
    assert done["upkeep"] > 0
    assert not any(done.get(what) for what in ("wrong", "gone", "errors", "died"))
    assert not result["grew"]
    assert not STRESS or set(result["usage"]) == {"read", "write", "upkeep"}
