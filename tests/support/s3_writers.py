"""Processes that write into one place at the same time, some of which are killed: the script of two tests of S3.

They are forked by a process that has imported everything and has no thread, and each prints what it has done to a pipe of its own.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

import lmprobe_zarr as lz

Work = Callable[[int], object]


def start(work: Work) -> tuple[int, int]:
    """A child that does something: its number, and a pipe to which it gives a byte for each step."""
    receive, send = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.close(receive)
            work(send)
            status = 0
        except BaseException:  # noqa: BLE001 — it must not come to the parent's code
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(send)
    return child, receive


def status_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill(started: tuple[int, int], after: float) -> None:
    """Kill a child some seconds after its first step."""
    child, receive = started
    assert os.read(receive, 1)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)


def write(who: int, url: str, go: Path, steps: int) -> None:
    """Six parts of 25 prompts, of which neighbours write some too; before the last it waits for a file, while the test reads the store."""
    store = lz.open_store(url)
    for turn in range(6):
        while turn == 5 and not go.exists():
            time.sleep(0.02)
        numbers = [(10 * (who + turn) + k) % 80 for k in range(25)]
        values = np.repeat(np.array(numbers, "f4")[:, None], 64, 1)
        pooled = {"resid_mean": {layer: values + layer / 4 for layer in range(4)}}
        lz.write_activations(store, model="m", prompts=[f"prompt {n}" for n in numbers], pooled=pooled)
        os.write(steps, b".")


def write_together(url: str, folder: Path) -> list[int]:
    """Eight writers, every third of which is killed; returns how the others ended."""
    writers = [start(partial(write, who, url, folder / "go")) for who in range(8)]
    for writer in writers[::3]:
        kill(writer, 0.03)
    (folder / "killed").touch()
    statuses = [status_of(child) for child, _ in writers]
    return [status for who, status in enumerate(statuses) if who % 3]


def extract(who: int, url: str, model: str, steps: int) -> None:
    """Twenty prompts, fifteen of which the next one extracts too."""
    prompts = [f"{n} dogs jump over {n + 1} foxes" for n in range(5 * who, 5 * who + 20)]
    os.write(steps, b".")
    options = {"pooling": ("mean",), "keep_tokens": True, "part_bytes": 20_000, "batch_prompts": 2, "progress": False}
    lz.extract(model, prompts, store=url, **options)  # type: ignore[arg-type]


def extract_together(url: str, model: str, number: int) -> list[int]:
    """So many at once, every third of which is killed and begins again; returns how they ended."""
    started = [start(partial(extract, who, url, model)) for who in range(number)]
    for each in started[1::3]:
        kill(each, random.uniform(0.4, 0.8))
    statuses = [status_of(child) for child, _ in started]
    again = [status_of(start(partial(extract, who, url, model))[0]) for who in range(number)[1::3]]
    return [status for who, status in enumerate(statuses) if who % 3 != 1] + again


if __name__ == "__main__":
    verb, url, where, *more = sys.argv[1:]
    found = write_together(url, Path(where)) if verb == "write" else extract_together(url, where, int(more[0]))
    sys.stdout.write(f"{found}\n")
