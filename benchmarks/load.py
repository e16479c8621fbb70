"""Many processes read, write, merge and clean one store for minutes: ``python -m benchmarks.load [URL] --minutes 10``.

Every value tells whose it is and which writing of it, so a wrong one cannot go unnoticed. Prints how much was done, and what memory and
open files were early and late; exits with 1 where a value was wrong, or either grew. ``--s3`` starts the S3 server of the tests.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import lmprobe_zarr as lz
from lmprobe_zarr.errors import LmprobeZarrError, ModelNotStoredError, PartGoneError, StoreNotFoundError

MODEL = "load"
PROMPTS = 400
AT_ONCE = 20  # prompts in one part
LAYERS = 4
HIDDEN = 256
GC_AGE = 30.0  # seconds; no view stays open for longer
HELD = 3.0  # seconds for which a view is kept open
SAMPLE = 5.0  # seconds between two looks at memory and files
GROWTH = 1.15, 16.0  # the most that memory may grow: a factor, or megabytes
FILES = 8, 48  # and open files, beyond what a pool of connections takes, which fills up to 32 and stays


def value(prompt: int, version: int) -> int:
    """What all of a prompt's numbers are in layer 0; exact in float32, and in layer i half an i more."""
    return prompt * 1000 + version


def write(store: lz.Store, rng: random.Random) -> None:
    """One part of some prompts, each with a version of its own, which is its label too."""
    prompts = rng.sample(range(PROMPTS), AT_ONCE)
    versions = [rng.randrange(1000) for _ in prompts]
    rows = np.array([value(*one) for one in zip(prompts, versions, strict=True)], "f4")
    whole = np.repeat(rows[:, None], HIDDEN, axis=1)
    pooled = {"resid_mean": {layer: whole + layer / 2 for layer in range(LAYERS)}}
    lz.write_activations(store, model=MODEL, prompts=[f"prompt {i}" for i in prompts], pooled=pooled, coords={"version": versions})


def check(data: Any, rng: random.Random) -> int:
    """Read one layer and compare every number; returns how many prompts were wrong."""
    layer = rng.randrange(LAYERS)
    values = data.resid_mean.sel(layer=layer).values
    prompts = np.array([int(text.split()[1]) for text in data.text.values])
    expected = (prompts * 1000 + data.version.values + layer / 2)[:, None]
    return int((values != expected).any(axis=1).sum()) + len(prompts) - len(set(prompts.tolist()))


def read(store: lz.Store, rng: random.Random, done: Counter[str]) -> None:
    """What is there now; and sometimes once more, after it was open for a while."""
    data = store.dataset(MODEL)
    done["wrong"] += check(data, rng)
    if rng.random() < 0.1:
        time.sleep(rng.uniform(0, HELD))
        done["wrong"] += check(store.dataset(MODEL) if rng.random() < 0.5 else data, rng)
        done["held"] += 1


def upkeep(store: lz.Store, rng: random.Random) -> None:
    """Merge, and remove what was merged long enough ago."""
    store.compact(progress=False)
    store.gc(max_age=GC_AGE)
    time.sleep(rng.uniform(0, 1))


def usage() -> tuple[float, int]:
    """Megabytes of memory and number of open files of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def work(role: str, url: str, seconds: float, seed: int) -> None:
    """One process: do its work until the time is over, and say as lines of JSON how it goes."""
    rng, done = random.Random(seed), Counter[str]()
    began = time.monotonic()
    told = began
    stays = lz.open_store(url)
    while time.monotonic() - began < seconds:
        # Every second time as a process that has just begun, which knows no document yet.
        store = stays if rng.random() < 0.5 else lz.open_store(url)
        try:
            {"write": write, "upkeep": upkeep}[role](store, rng) if role != "read" else read(store, rng, done)
            done[role] += 1
        except (ModelNotStoredError, StoreNotFoundError):
            time.sleep(0.1)  # nothing is there yet
        except PartGoneError:
            done["gone"] += 1
        except (LmprobeZarrError, OSError) as error:
            done["errors"] += 1
            print(f"{role}: {error!r}", file=sys.stderr, flush=True)
        if time.monotonic() - told >= SAMPLE:
            told = time.monotonic()
            memory, files = usage()
            print(json.dumps({"at": told - began, "memory": memory, "files": files}), flush=True)
    print(json.dumps({"done": done}), flush=True)


@contextlib.contextmanager
def place(options: argparse.Namespace) -> Iterator[str]:
    """Where the store lies: at a new prefix of what was named, in a new folder, or on the tests' S3 server."""
    with contextlib.ExitStack() as stack:
        if options.s3:
            sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
            import s3_server

            folder = stack.enter_context(tempfile.TemporaryDirectory())
            endpoint, connection = s3_server.server_of(Path(folder))
            stack.enter_context(connection)
            os.environ |= {"AWS_ACCESS_KEY_ID": s3_server.ADMIN["key"], "AWS_SECRET_ACCESS_KEY": s3_server.ADMIN["secret"]}
            os.environ |= {"AWS_ENDPOINT_URL": endpoint, "AWS_EC2_METADATA_DISABLED": "true"}
            yield f"s3://team/{uuid.uuid4().hex}"
        elif options.url:
            yield f"{options.url.rstrip('/')}/{uuid.uuid4().hex}"
        else:
            yield stack.enter_context(tempfile.TemporaryDirectory())


def run(options: argparse.Namespace, url: str) -> dict[str, Any]:
    """Start all processes, wait for their end, and put together what they say."""
    roles = ["read"] * options.readers + ["write"] * options.writers + ["upkeep"]
    command = [sys.executable, "-m", "benchmarks.load", url, "--minutes", str(options.minutes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    children = [
        subprocess.Popen([*command, "--role", role, "--seed", str(seed)], stdout=subprocess.PIPE, text=True, env=environment)
        for seed, role in enumerate(roles)
    ]
    try:
        said = [child.communicate(timeout=options.minutes * 60 + 300)[0] for child in children]
    finally:
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(signal.SIGKILL)
    done, samples = Counter[str](), []
    for child, lines in zip(children, said, strict=True):
        records = [json.loads(line) for line in lines.splitlines()]
        done["died"] += child.returncode != 0
        done.update(next((record["done"] for record in records if "done" in record), {}))
        samples.append([record for record in records if "at" in record])
    store = lz.open_store(url, "r")
    done["wrong"] += check(store.dataset(MODEL), random.Random(0))
    return {"url": url, "done": dict(done), "prompts": len(store.dataset(MODEL).prompt), **growth(samples, roles)}


def growth(samples: list[list[dict[str, Any]]], roles: list[str]) -> dict[str, Any]:
    """Memory and open files by role, in the second fifth of the time and in the last, medians over processes; and whether any grew."""
    table: dict[str, Any] = {}
    grew = False
    for role in dict.fromkeys(roles):
        rows = []
        for taken in (taken for one, taken in zip(roles, samples, strict=True) if one == role and len(taken) >= 5):
            fifth = len(taken) // 5
            early, late = taken[fifth : 2 * fifth], taken[-fifth:]
            rows.append([statistics.median(s[what] for s in some) for what in ("memory", "files") for some in (early, late)])
            memory, later, files, files_later = rows[-1]
            grew |= later > max(memory * GROWTH[0], memory + GROWTH[1]) or files_later > max(files + FILES[0], FILES[1])
        if rows:
            table[role] = [round(statistics.median(column), 1) for column in zip(*rows, strict=True)]
    return {"usage": table, "grew": grew}


def main() -> int:
    """Print what happened; 1 where a value was wrong, a process died, or memory or files grew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", nargs="?")
    parser.add_argument("--s3", action="store_true", help="on the S3 server of the tests")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--readers", type=int, default=16)
    parser.add_argument("--writers", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--role", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        work(options.role, options.url, options.minutes * 60, options.seed)
        return 0
    with place(options) as url:
        result = run(options, url)
    if options.json:
        print(json.dumps(result))
    else:
        done = result["done"]
        print(
            f"{result['url']}, {options.minutes:g} minutes, {options.readers} readers, {options.writers} writers, 1 that merges and cleans"
        )
        print(
            f"{done.get('read', 0)} layers read ({done.get('held', 0)} again after a while), {done.get('write', 0)} parts written,", end=" "
        )
        print(f"{done.get('upkeep', 0)} times merged and cleaned; {result['prompts']} prompts")
        print(f"{done.get('wrong', 0)} wrong, {done.get('gone', 0)} gone, {done.get('errors', 0)} errors, {done.get('died', 0)} died")
        for role, (memory, later, files, files_later) in result["usage"].items():
            print(f"{role}: memory {memory:.0f} MB, at the end {later:.0f} MB; open files {files:.0f}, at the end {files_later:.0f}")
    bad = any(result["done"].get(what) for what in ("wrong", "gone", "errors", "died"))
    return int(bad or result["grew"])


if __name__ == "__main__":
    sys.exit(main())
