"""Every operation that writes, stopped at every storage call: nothing half is shown, nothing committed is lost, and the same call once more
completes it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from crash_operations import OPERATIONS, check_equal, check_stopped, places_of, shown, state_of, stop_at
from paths import SUPPORT
from stores import pull_the_plug
from warmed import Warmed

STRESS = bool(os.environ.get("LMPROBE_ZARR_STRESS"))
SCRIPT = SUPPORT / "crash_operations.py"


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.few(4)
def test_stopped_at_any_call_only_whole_parts_show_and_the_same_call_completes_it(name: str, tmp_path: Path) -> None:
    operation = OPERATIONS[name]
    template = tmp_path / "template"
    template.mkdir()
    operation.prepare(template)
    check_equal(shown(template / operation.place), operation.before)
    stops = 0
    for moment, most in (("before", 7), ("half", 3), ("after", 3)):
        for n in places_of(operation, template, None if STRESS else most):
            base = tmp_path / f"{moment}-{n}"
            shutil.copytree(template, base)
            kept = {folder: state_of(base / folder) for folder in operation.kept}
            through = stop_at(operation, base, n, moment, pull_the_plug)
            try:
                check_stopped(operation, base)
            except AssertionError as error:
                raise AssertionError(f"{name}, stopped {moment} call {n}") from error
            assert {folder: state_of(base / folder) for folder in operation.kept} == kept
            shutil.rmtree(base)
            stops += not through
        assert through, "the last place is behind the last call"
    assert stops > 3


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="ends forked children, so that each round need not import everything again")
def test_a_process_that_ends_at_any_call_leaves_only_whole_parts() -> None:
    """As above, but nothing is cleaned up behind it: no `except`, no `finally`, no thread comes to its end."""
    command = [sys.executable, str(SCRIPT), "everywhere", "25", "before,half,after"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == len(OPERATIONS)
    assert all(int(line.rpartition(": ")[2]) > 0 for line in done.stdout.splitlines()), done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children, so that each round need not import everything again")
def test_kill_9_at_random_moments_of_random_operations_loses_nothing(warmed: Warmed) -> None:
    rounds = 400 if STRESS else 4
    done = warmed.run(SCRIPT, "random", str(rounds), str(os.getpid() if STRESS else 1), timeout=60 + 10 * rounds)
    assert done.returncode == 0, done.stdout + done.stderr
    kills = int(done.stdout.split()[-1])
    assert kills >= rounds * 3 // 4, f"only {kills} of {rounds} children were in the middle of something when they were killed"
