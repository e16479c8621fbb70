"""Every figure beside its goal, as a table and as JSON: ``python -m benchmarks``, or ``make bench`` which sets everything up."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.computed import extracting, sizes, sweeping
from benchmarks.memory import memory
from benchmarks.on_s3 import on_s3
from benchmarks.stored import looking, opening, pooled, tokens
from benchmarks.timing import Figure, Peer

#: Every kind of work, in the order of the table.
ALL = {
    "pooled": pooled,
    "tokens": tokens,
    "sweep": sweeping,
    "extract": extracting,
    "bits": sizes,
    "s3": on_s3,
    "open": opening,
    "info": looking,
    "memory": memory,
}
PACKAGES = ("lmprobe-zarr", "numpy", "zarr", "xarray", "dask", "numcodecs", "scikit-learn", "torch", "transformers", "s3fs")


def machine() -> dict[str, Any]:
    """What it ran on."""
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    return {
        "cpu": cpu or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES} | {"lmprobe": "0.10.3"},
    }


def show_value(figure: Figure, value: float | None) -> str:
    """A number of the table."""
    return "" if value is None else f"{value:.3g} {figure.unit}".replace(" ×", " ×")


def table(figures: list[Figure]) -> str:
    """The table in Markdown."""
    lines = [
        "| work | ours | lmprobe | limit | ratio or number | measured | reach | stretch | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    before = ""
    for f in figures:
        sign = "≥" if f.at_least else "≤"
        goals = [f"{sign} {show_value(f, goal)}" if goal is not None else "" for goal in (f.reach, f.stretch)]
        cells = [f.work if f.work != before else "″", f.ours, f.lmprobe, f.limit, f.what, show_value(f, f.value), *goals, f.verdict]
        before = f.work
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Run what is asked for, print the table, and keep it where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("only", nargs="*", metavar="work", help=f"some of: {', '.join(ALL)}")
    parser.add_argument("--quick", action="store_true", help="a tenth of the size, in under two minutes")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--json", type=Path, help="keep the figures in this file")
    parser.add_argument("--page", type=Path, help="put the table into this page, between its marks")
    options = parser.parse_args()
    unknown = set(options.only) - set(ALL)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(ALL)}")
    figures = _kept(options.json) if options.only else {}
    for name in options.only or ALL:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            peer = Peer(Path(folder) / "lmprobe")
            try:
                (Path(folder) / "work").mkdir()
                found = ALL[name](Path(folder) / "work", peer, quick=options.quick, runs=3 if options.quick else options.runs)
            finally:
                peer.close()
        figures[name] = found
        print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
        for f in found:
            print(f"  {f.work}: {f.what} {show_value(f, f.value)} ({f.verdict.strip('*')})", file=sys.stderr)
    in_order = [figure for name in ALL for figure in figures.get(name, [])]
    print(table(in_order))
    if options.json:
        document = {"machine": machine(), "figures": {name: [f.as_json() for f in figures[name]] for name in ALL if name in figures}}
        options.json.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    if options.page:
        begin, end = "<!-- figures -->\n", "<!-- end of figures -->"
        head, rest = options.page.read_text().split(begin)
        options.page.write_text(f"{head}{begin}\n{table(in_order)}\n\n{end}{rest.split(end)[1]}")
    return 0


def _kept(path: Path | None) -> dict[str, list[Figure]]:
    """Figures of an earlier run, which one of some kinds of work leaves as they are; every ratio is of one run."""
    if path is None or not path.is_file():
        return {}
    kept = json.loads(path.read_text())["figures"]
    return {name: [Figure(**{k: v for k, v in row.items() if k != "verdict"}) for row in rows] for name, rows in kept.items()}


if __name__ == "__main__":
    raise SystemExit(main())
