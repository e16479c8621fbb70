"""How a store grows: to ten million prompts of 80 layers × 8192, on paper and with real documents: ``make bench``.

The documents are those of real parts with their whole index and table of files; only the chunks are left out (a store is opened without
reading any), except for one small store that is written whole, whose files and requests must be what the paper says.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

import lmprobe_zarr as lz
from benchmarks.opening import GIB, Counting
from lmprobe_zarr.batch.token_batch import TokenBatch
from lmprobe_zarr.store.format.group import GroupInfo
from lmprobe_zarr.store.format.part import parse_part, part_document
from lmprobe_zarr.store.format.part_names import new_part_name
from lmprobe_zarr.store.parts import writer
from lmprobe_zarr.store.store import Store

LAYERS, HIDDEN, ITEMSIZE = 80, 8192, 2
_CHOICES = ("CHUNK_BYTES", "MIN_CHUNK_BYTES", "PART_VERSION")
GROUP = GroupInfo(model="scale", num_layers=LAYERS, hidden_size=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Paper:
    """One variable of all layers in numbers; `per_prompt` rows of each prompt (1 where pooled)."""

    prompts: int
    per_prompt: int
    part_bytes: int
    version: int = 2

    @property
    def chunk_rows(self) -> int:
        """Rows of one chunk: 4 MiB on an object store, or less where many layers are filled together."""
        nbytes = max(writer.MIN_CHUNK_BYTES, min(writer.REMOTE_CHUNK_BYTES, writer.BUFFER_BYTES // LAYERS))
        return int(nbytes // (HIDDEN * ITEMSIZE))

    @property
    def prompts_per_part(self) -> int:
        return int(max(1, min(self.prompts, self.part_bytes // (LAYERS * HIDDEN * ITEMSIZE * self.per_prompt))))

    @property
    def parts(self) -> int:
        return -(-self.prompts // self.prompts_per_part)

    @property
    def chunks_of_a_layer(self) -> int:
        """In one part."""
        return -(-self.prompts_per_part * self.per_prompt // self.chunk_rows)

    @property
    def objects(self) -> int:
        """Chunks of all layers; a part's other files are fewer than twenty."""
        return self.parts * LAYERS * self.chunks_of_a_layer

    @property
    def published(self) -> int:
        """Files of all layers in a published copy on an object store, in shards."""
        of_layer = self.prompts_per_part * self.per_prompt * HIDDEN * ITEMSIZE
        return self.parts * LAYERS * -(-of_layer // writer.REMOTE_SHARD_BYTES)

    @property
    def nbytes(self) -> int:
        return self.prompts * self.per_prompt * LAYERS * HIDDEN * ITEMSIZE


@contextmanager
def narrow(paper: Paper) -> Iterator[None]:
    """As many chunks at one number per row as there would be at 8192, in the paper's version of the format."""
    before = [getattr(writer, name) for name in _CHOICES]
    _set(paper.chunk_rows * ITEMSIZE, 1, paper.version)
    try:
        yield
    finally:
        _set(*before)


def _set(*values: int) -> None:
    for name, value in zip(_CHOICES, values, strict=True):
        setattr(writer, name, value)


def write_part(store: Store, paper: Paper, rng: np.random.Generator) -> str:
    """A real part; its path."""
    n = paper.prompts_per_part
    rows = n * paper.per_prompt
    name = "resid_mean" if paper.per_prompt == 1 else "resid"
    values = {name: rng.standard_normal((LAYERS, rows, 1)).astype(np.float16)}
    digests = [row.tobytes().hex() for row in rng.integers(0, 256, (n, 32), np.uint8)]
    counts = None if paper.per_prompt == 1 else np.full(n, paper.per_prompt)
    held: dict[str, Any] = {"prompts": values} if counts is None else {"tokens": values}
    with narrow(paper):
        part = store.write(GROUP, TokenBatch(sha256=digests, layers=tuple(range(LAYERS)), n_tokens=counts, **held))
    return f"{GROUP.name}/{part}"


def print_paper() -> None:
    """What needs no measurement: objects, bytes, and requests of one layer and of a sweep over all."""
    print("on paper, float16")
    print("   prompts rows of    parts       objects  published         bytes   a layer:     bytes")
    print("             each                                                    requests")
    for per_prompt in (1, 100):
        for prompts in (10**4, 10**5, 10**6, 10**7):
            for gib in (1, 8):
                p = Paper(prompts=prompts, per_prompt=per_prompt, part_bytes=gib * GIB)
                requests = p.parts * p.chunks_of_a_layer
                print(
                    f"{prompts:>10,} {per_prompt:>4} {gib:>2} GiB {p.parts:>9,} {p.objects:>11,} {p.published:>10,}"
                    f" {p.nbytes / 1e12:>10.3f} TB {requests:>10,} {p.nbytes / LAYERS / 1e9:>9.1f} GB"
                )
    print()


def check_paper(folder: Path) -> None:
    """A store that is written whole has the objects that the paper says, and a layer takes the requests that it says."""
    for per_prompt in (1, 100):
        paper = Paper(prompts=4 * GIB // (LAYERS * HIDDEN * ITEMSIZE * per_prompt), per_prompt=per_prompt, part_bytes=GIB)
        store = lz.open_store(folder / f"whole-{per_prompt}", durable=False)
        rng = np.random.default_rng(0)
        for _ in range(paper.parts):
            write_part(store, paper, rng)
        level = "prompts" if per_prompt == 1 else "tokens"
        chunks = sum(1 for _ in Path(store.url).rglob(f"{level}/resid*/c.*"))
        assert chunks == paper.objects, (chunks, paper.objects)
        storage = Counting(folder / f"whole-{per_prompt}")
        fresh = Store(storage, mode="r")
        data = fresh.dataset() if per_prompt == 1 else fresh.tokens()
        opened = storage.reads
        values = data["resid_mean" if per_prompt == 1 else "resid"].isel(layer=7).values
        assert np.isfinite(values).all()
        assert opened == paper.parts + 1, (opened, paper.parts)  # each part's document and the group's
        # And the table of chunks of each part.
        assert storage.reads - opened == paper.parts * (paper.chunks_of_a_layer + 1), storage.reads


def simulate(paper: Paper, folder: str) -> None:
    """Write the documents of all parts."""
    root = Path(folder)
    store = lz.open_store(root, durable=False)
    rng = np.random.default_rng(0)
    path = write_part(store, paper, rng)
    whole = (root / path / "zarr.json").read_bytes()
    model = parse_part(whole, path)
    name = model.name
    text = base64.b64encode if paper.version > 1 else binascii.hexlify

    def another(name: str, digests: Any) -> bytes:
        """The document of a part like the first: its name, digests and checksum in the place of the first one's."""
        old, new = (text(each.tobytes()) for each in (model.digests, digests))
        data = whole.replace(old, new).replace(f'"name":"{model.name}"'.encode(), f'"name":"{name}"'.encode())
        at = data.index(b'"crc32c:') + len(b'"crc32c:')
        blank = data[:at] + b"0" * 8 + data[at + 8 :]
        return data[:at] + b"%08x" % google_crc32c.value(blank) + data[at + 8 :]

    for number in range(paper.parts - 1):
        name = new_part_name(name)
        digests = rng.integers(0, 256, model.digests.shape, np.uint8)
        data = another(name, digests)
        if number < 3:  # millions of entries are written once, and the result is that of the package's own writer
            assert data == part_document(replace(model, name=name, digests=digests), GROUP)
        target = root / GROUP.name / name
        target.mkdir()
        (target / "zarr.json").write_bytes(data)


def opened(paper: Paper, folder: str, checkout: Path) -> dict[str, Any]:
    """What opening costs with the package of one checkout, in a process of its own so that its peak of memory is this one's."""
    command = [sys.executable, "-P", str(Path(__file__).with_name("opening.py")), folder]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(checkout)}, capture_output=True, check=True)
    return {
        "checkout": str(checkout),
        "per_prompt": paper.per_prompt,
        "part_gib": paper.part_bytes / GIB,
        "parts": paper.parts,
        "objects": paper.objects,
        "bytes": paper.nbytes,
        "requests_of_a_layer": paper.parts * paper.chunks_of_a_layer,
        "layer_bytes": paper.nbytes // LAYERS,
        **json.loads(done.stdout),
    }


def run(paper: Paper, checkouts: Sequence[Path], repeats: int) -> list[dict[str, Any]]:
    """Simulate once and measure every checkout in turn; of each the fastest of some runs, since others may use the machine."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            pool.submit(simulate, paper, folder).result()
        found = [[opened(paper, folder, checkout) for checkout in checkouts] for _ in range(repeats)]
    return [min(runs, key=lambda run: run["open_s"]) for runs in zip(*found, strict=True)]


def main() -> int:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="up to a hundred thousand prompts")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--opening", action="store_true", help="only the four stores whose opening docs/design/performance.md shows")
    parser.add_argument("--beside", type=Path, help="another checkout, whose package opens the same documents")
    parser.add_argument("--repeats", type=int, default=1, help="openings of each store, of which the fastest is shown")
    parser.add_argument("--format", type=int, choices=(1, 2), default=2, help="of the parts (default: %(default)s)")
    options = parser.parse_args()
    checkouts = [Path(__file__).parents[1], *([] if options.beside is None else [options.beside])]
    if not options.opening:
        with tempfile.TemporaryDirectory() as folder:
            check_paper(Path(folder))
    pooled = [10**4, 10**5] if options.quick else [10**4, 10**5, 10**6, 10**7]
    papers = [Paper(prompts=n, per_prompt=1, part_bytes=gib * GIB) for n in pooled for gib in (1, 8)]
    papers += [Paper(prompts=n, per_prompt=100, part_bytes=8 * GIB) for n in (pooled[:1] if options.quick else pooled[:3])]
    if options.opening:
        sizes = [(10**4, 1), (10**4, 100)] if options.quick else [(10**6, 1), (10**7, 1), (10**5, 100), (10**6, 100)]
        papers = [Paper(prompts=prompts, per_prompt=rows, part_bytes=8 * GIB) for prompts, rows in sizes]
    elif not options.json:
        print_paper()
    papers = [replace(paper, version=options.format) for paper in papers]
    rows = [row for paper in papers for row in run(paper, checkouts, options.repeats)]
    if options.json:
        json.dump(rows, sys.stdout, indent=2)
        return 0
    print(
        "   prompts rows of    parts       objects      bytes   documents   to open       CPU    memory   first  10,000   a layer:", end=""
    )
    print(f"     bytes\n             each{'lookup lookups  requests':>102}")
    for r in rows:
        print(
            f"{r['prompts']:>10,} {r['per_prompt']:>4} {r['part_gib']:>2.0f} GiB {r['parts']:>6,} {r['objects']:>11,}"
            f" {r['bytes'] / 1e12:>7.3f} TB {r['document_bytes'] / 1e6:>7.1f} MB {r['open_s']:>7.2f} s {r['open_cpu_s']:>7.2f} s"
            f" {r['open_gib']:>5.2f} GiB {r['first_lookup_s']:>5.2f} s {r['lookup_10000_ms']:>4.1f} ms {r['requests_of_a_layer']:>10,}"
            f" {r['layer_bytes'] / 1e9:>7.1f} GB{'' if options.beside is None else '  ' + r['checkout']}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
