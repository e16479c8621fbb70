"""How the benchmarks time: both sides in turn within one run, medians; and lmprobe in an environment of its own."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def alternate(sides: Mapping[str, Callable[[], Any]], runs: int, *, warm_up: int = 1) -> dict[str, float]:
    """Median seconds of each side, the sides in turn, so that ratios hold where the machine's speed drifts.

    A side that returns a float says itself how long it took: one that runs in another process, or that must prepare first.
    """
    os.sync()  # what was written before would be flushed meanwhile, at everybody's cost
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(runs + warm_up):
        for name, call in sides.items():
            began = time.perf_counter()
            said = call()
            elapsed = time.perf_counter() - began
            times[name].append(said if isinstance(said, float) else elapsed)
    return {name: statistics.median(values[warm_up:]) for name, values in times.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One line of the table: a ratio, or a size, and what it should be.

    Parameters
    ----------
    work, what : str
        What is done; which ratio, or which number.
    value, reach, stretch : float
        As measured, the goal, and what would be better still.
    at_least : bool
        Whether more is better.
    unit : str
        ``×`` for ratios.
    ours, lmprobe, limit : str
        What was measured, with its unit; empty where there is none.
    """

    work: str
    what: str
    value: float
    reach: float
    stretch: float | None = None
    at_least: bool = True
    unit: str = "×"
    ours: str = ""
    lmprobe: str = ""
    limit: str = ""

    def holds(self, goal: float | None) -> bool:
        """Whether a goal is reached."""
        return goal is not None and (self.value >= goal if self.at_least else self.value <= goal)

    @property
    def verdict(self) -> str:
        """Reached, and how far."""
        return "stretch" if self.holds(self.stretch) else "reached" if self.holds(self.reach) else "**not reached**"

    def as_json(self) -> dict[str, Any]:
        """For the file of results."""
        return {**asdict(self), "verdict": self.verdict.strip("*")}


def ms(seconds: float) -> str:
    """A time that people read."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


class Peer:
    """lmprobe 0.10.3 in a process and an environment of its own; see `benchmarks.peer` for the jobs."""

    def __init__(self, folder: Path) -> None:
        python = Path(os.environ.get("LMPROBE_PYTHON", ROOT / ".venv-lmprobe/bin/python"))
        if not python.is_file():
            sys.exit(f"lmprobe's own environment is missing ({python}): run make bench, which makes it")
        environment = {**os.environ, "LMPROBE_CACHE_DIR": str(folder), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment |= {"OMP_WAIT_POLICY": "passive"}  # its threads would otherwise go on spinning while it is our turn
        self.process = subprocess.Popen(
            [str(python), str(Path(__file__).with_name("peer.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def __call__(self, job: str, **given: Any) -> Any:
        """What the job returns."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"job": job, **given}) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("=> "):  # lmprobe prints too
                answer = json.loads(line[3:])
                if "error" in answer:
                    raise RuntimeError(f"lmprobe could not do {job}: {answer['error']}")
                return answer["value"]
        raise RuntimeError(f"lmprobe's process ended during {job}")

    def seconds(self, job: str, **given: Any) -> Callable[[], float]:
        """A side for `alternate`."""
        return lambda: float(self(job, **given))

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
