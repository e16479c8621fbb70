"""Foreign bytes by the hundred thousand: each is an error of ours or a right result, soon, in little memory, and no code of theirs runs.

Valid documents that are changed a little reach further into a parser than noise does. A failure prints the seed that makes it again.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import json
import math
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from block_stores import small_chunks, values_of, write_values
from foreign_caches import CODES, add_model, prompt_tensors, safetensors_bytes
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stores import GROUP, make_batch
from versions import old_format

import lmprobe_zarr as lz
from lmprobe_zarr.bridges.files import open_files
from lmprobe_zarr.bridges.lmprobe_folders import read_manifest
from lmprobe_zarr.errors import LmprobeZarrError, MissingPromptsError
from lmprobe_zarr.safetensors_file import header_length, parse_header
from lmprobe_zarr.store.datasets import to_dataset
from lmprobe_zarr.store.format.group import parse_group
from lmprobe_zarr.store.format.names import LEVELS
from lmprobe_zarr.store.format.part import parse_part
from lmprobe_zarr.store.format.root import parse_root
from lmprobe_zarr.store.parts.listing import Listing, part_nbytes
from lmprobe_zarr.store.parts.part import Part
from lmprobe_zarr.store.parts.view import open_view
from lmprobe_zarr.store.upkeep.compact import plan_runs
from lmprobe_zarr.store.upkeep.evict import describe_entries, plan_evict

STRESS = bool(os.environ.get("LMPROBE_ZARR_STRESS"))
INPUTS = 200_000 if STRESS else 200
SEEDS = st.integers(0, 2**63 - 1)
many = settings(max_examples=INPUTS, deadline=None, database=None, parent=settings.default)

SECONDS = 5.0  # for one input, on a machine that others use too
MEGABYTES = 400.0

# -------------------------------------------------------------------------------------------------------- nothing runs

FORBIDDEN = {
    "ctypes.dlopen", "os.exec", "os.fork", "os.posix_spawn", "os.system", "pickle.find_class", "socket.connect", "subprocess.Popen",
}  # fmt: skip
_caught: list[str] = []
_watching = False


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if _watching and event in FORBIDDEN:
        _caught.append(event)


sys.addaudithook(_hook)


@contextmanager
def watched() -> Iterator[None]:
    """Nothing is run, the user is not asked for anything, and it does not take long."""
    global _watching  # noqa: PLW0603 — a hook cannot be taken away again
    _caught.clear()
    _watching, began = True, time.monotonic()
    try:
        yield
    finally:
        _watching = False
    assert _caught == []
    assert time.monotonic() - began < SECONDS, "it took too long"


@pytest.fixture(autouse=True)
def _bounded() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < MEGABYTES


def test_the_watch_notices_a_pickle_that_runs_code() -> None:
    import pickle

    with pytest.raises(AssertionError), watched():
        pickle.loads(pickle.dumps(math.sqrt))  # noqa: S301 — that is what is caught


# ----------------------------------------------------------------------------------------------------------- changing things

NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 255, 2**31, 2**53, 2**63, 2**64, 10**400, 1.5, -0.0, 1e308),
    *("", "..", "../../x", "/", "\0", "\ud800", "NaN", "a" * 5000, "int64", "object", "float16", "string", "F64", "BF16", "U8"),
    *("prompt", "token", "layer", "shuffle", "annotation"),
    *([], {}, [[]], [None], [0], [-1], [2**60], [1] * 40, ["x"], {"": None}, {"name": "numcodecs.pickle"}, [{"name": "bytes"}]),
)


def nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to everything in a JSON document."""
    yield path
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from nodes(inner, (*path, key))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    return functools.reduce(lambda held, key: held[key], path, value)


def change_json(document: Any, rng: random.Random) -> Any:
    """A document with one to three of its values replaced, exchanged, removed, doubled or renamed."""
    changed = copy.deepcopy(document)
    for _ in range(rng.randint(1, 3)):
        paths = [path for path in nodes(changed) if path]
        if not paths:
            return rng.choice(NASTY)
        path = rng.choice(paths)
        parent, key = at(changed, path[:-1]), path[-1]
        kind = rng.randrange(7)
        if kind == 0:
            parent[key] = copy.deepcopy(rng.choice(NASTY))
        elif kind == 1:
            other = rng.choice(paths)
            parent[key] = copy.deepcopy(at(changed, other))
        elif kind == 2:
            del parent[key]
        elif kind == 3 and isinstance(parent, list):
            parent.insert(rng.randrange(len(parent) + 1), copy.deepcopy(parent[key]))
        elif kind == 3:
            parent[rng.choice(["x", "prompts/x", "tokens/x/c.0", f"{key}2", "../up", *map(str, parent)])] = copy.deepcopy(parent[key])
        elif kind == 4 and isinstance(parent[key], (int, float)) and not isinstance(parent[key], bool):
            n = parent[key]
            parent[key] = rng.choice([n + 1, n - 1, -n, n * 2, str(n), float(n % 2**52)])
        elif kind == 5 and isinstance(parent[key], str) and parent[key]:
            i = rng.randrange(len(parent[key]))
            parent[key] = parent[key][:i] + rng.choice(["", "0", "/", "..", "\0", "é", parent[key]]) + parent[key][i + rng.randint(0, 2) :]
        else:
            parent[key] = [parent[key]] if rng.random() < 0.5 else {"x": parent[key]}
    return changed


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bytes with one to four places flipped, overwritten, cut out, doubled or cut off."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if not changed:
            break
        i, n = rng.randrange(len(changed)), rng.randint(1, 20)
        kind = rng.randrange(6)
        if kind == 0:
            changed[i] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[i] = rng.choice(b'\x00\xff\x80{}[]",:\\0123456789-eE.')
        elif kind == 2:
            del changed[i : i + n]
        elif kind == 3:
            changed[i:i] = changed[i : i + n]
        elif kind == 4:
            changed[i:i] = rng.choice([b"[" * 2000, b'{"a":' * 2000, b"9" * 5000, b"null", b"\xed\xa0\x80", b"NaN", b"1e999"])
        else:
            del changed[i:]
    return bytes(changed)


def dumped(document: Any) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


# ---------------------------------------------------------------------------------------------------- safetensors headers


@functools.cache
def headers() -> list[bytes]:
    """The JSON of a few valid files."""
    found = [
        safetensors_bytes({"a": np.zeros((2, 3), "f4")}),
        safetensors_bytes({"a": np.zeros((2, 3), "f4"), "b": np.zeros((0, 5), "f2"), "c": np.zeros((), "i8")}, {"by": "hand"}),
        safetensors_bytes(prompt_tensors(0, pooled=("mean",))),
    ]
    return [data[8 : 8 + int.from_bytes(data[:8], "little")] for data in found]


def check_header(text: bytes) -> None:
    with watched():
        try:
            header = parse_header(struct.pack("<Q", len(text)) + text)
        except ValueError:  # what reads the file makes it an error of ours, naming the file
            return
    document = json.loads(text)
    document.pop("__metadata__", None)
    spans = []
    for name, entry in document.items():
        start, stop = entry["data_offsets"]
        tensor = header.tensors[name]
        assert (tensor.start, tensor.stop, list(tensor.shape)) == (start + len(text) + 8, stop + len(text) + 8, entry["shape"])
        sizes = {code: np.dtype(dtype).itemsize for dtype, code in CODES.items()}
        if entry["dtype"] in sizes:
            assert math.prod(entry["shape"]) * sizes[entry["dtype"]] == stop - start
        spans.append((start, stop))
    end = 0
    for start, stop in sorted(spans):
        assert start == end, "no gap and no overlap"
        end = stop
    assert header.size == 8 + len(text) + end


@many
@given(SEEDS)
def test_changed_headers_of_safetensors_files(seed: int) -> None:
    rng = random.Random(seed)
    text = rng.choice(headers())
    check_header(change_bytes(text, rng) if rng.random() < 0.4 else dumped(change_json(json.loads(text), rng)))


@given(st.binary(max_size=40))
def test_any_first_bytes_of_a_file(head: bytes) -> None:
    with suppress(ValueError):
        assert 10 <= header_length(head) <= 2**24 + 8


# ------------------------------------------------------------------------------------------------------------- manifests


@functools.cache
def manifest() -> bytes:
    texts = ["a", "two words", "é\u2028\n", '"quoted"', "\ud800", "x" * 300]
    lines = [{"hash": lz.prompt_hash(t), "prompt": t, "num_tokens": len(t), "cached_at": "2025-01-01T00:00:00+00:00"} for t in texts]
    return b"\n".join(json.dumps(line).encode() for line in lines) + b"\n"


@pytest.fixture(scope="module")
def cache() -> Iterator[Path]:
    """In memory where the machine has a folder there: making a file on a disk takes ten times as long as reading it."""
    memory = Path("/dev/shm")  # noqa: S108
    folder = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
    yield add_model(folder)
    shutil.rmtree(folder)


@many
@given(SEEDS)
def test_changed_manifests(cache: Path, seed: int) -> None:
    rng = random.Random(seed)
    data = manifest()
    if rng.random() < 0.5:
        lines = data.split(b"\n")
        i = rng.randrange(len(lines) - 1)
        lines[i] = dumped(change_json(json.loads(lines[i]), rng))
        data = b"\n".join(lines)
    else:
        data = change_bytes(data, rng)
    (cache / "_manifest.jsonl").write_bytes(data)
    with watched():
        found = read_manifest(open_files(cache.parent), cache.name)
    for label, text in found.texts.items():
        assert hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16] == label, "never another prompt's"
    assert len(found.texts) + found.bad_lines <= data.count(b"\n") + 1


# --------------------------------------------------------------------------------------------------------- our documents


@functools.cache
def parts() -> list[tuple[Part, bytes]]:
    """Parts of every kind, as their writer leaves them."""
    store = lz.open_store(f"memory://{uuid.uuid4().hex}")
    store.write(GROUP, make_batch(["a", "bb", "ccc"], columns={"label": [1, 2, 3], "split": ["x", "y", "z"]}))
    store.write(GROUP, make_batch(["dd"], tokens=False, layers=(2,)), compressed=False)
    store.annotate(GROUP.model, {"note": {"a": "x"}})
    store.compact(progress=False)
    with old_format():
        store.write(GROUP, make_batch(["e", "bb"], seed=1, columns={"label": [4, 5]}))
    for i in range(2):
        store.write(GROUP, make_batch([f"shards {i}"], seed=2 + i, layers=(0,)))
    with small_chunks(64, 150):
        store.compact(progress=False, part_bytes=2**20)
    write_values(store.storage, values_of("normal", (2, 4200, 8), "float32"), prompts=3)  # chunks of several blocks
    listing = store.listing(GROUP)
    found = [(part, store.storage.read(f"{part.path}/zarr.json")) for part in (*listing.parts, *listing.annotations)]
    assert {part.info.version for part, _ in found} == {1, 2}
    assert any(part.info.has_shards for part, _ in found)
    assert any(table.block_nbytes for part, _ in found for table in (part.info.tables or {}).values())
    for part, data in found:  # what is imported late is imported now, by unpickling tables of its own perhaps
        use(part, data, found)
    return found


def sealed(document: Any) -> bytes:
    """With a digest that holds, as somebody makes it who knows the format."""
    if isinstance(document, dict) and isinstance(document.get("attributes"), dict):
        document["attributes"] = {"digest": "crc32c:00000000", **{k: v for k, v in document["attributes"].items() if k != "digest"}}
        document = {"zarr_format": 3, "node_type": "group", **{k: v for k, v in document.items() if k not in ("zarr_format", "node_type")}}
    data = dumped(document)
    return data.replace(b"crc32c:00000000", b"crc32c:%08x" % google_crc32c.value(data), 1)


def use(part: Part, data: bytes, beside: list[tuple[Part, bytes]]) -> None:
    """Do with a part whatever is done with parts; only errors of ours may come of it."""
    info = parse_part(data, "store/part")
    for name in info.files:
        assert name.split("/")[0] in ("prompts", "tokens")
        assert not {"", ".", ".."} & set(name.split("/"))
        assert "\\" not in name
        assert "\0" not in name
    assert len(info.digests) == len({row.tobytes() for row in info.digests})
    if info.group != part.info.group or info.name != part.info.name:
        return  # noticed by whoever lists the folder
    changed = Part(part.storage, part.path, info, len(data))
    describe_entries([changed], group=GROUP.name, stamps={})
    plan_evict(describe_entries([changed], group=GROUP.name, stamps={}), 0)
    part_nbytes(changed)
    kind = info.kind == "annotation"
    listing = Listing(parts=() if kind else (changed,), annotations=(changed,) if kind else (), names=frozenset({info.name}))
    plan_runs(GROUP, listing, part_bytes=2**30)
    others = [found_part for found_part, _ in beside if found_part.info.kind == "part" and found_part.path != part.path]
    view = open_view(part.storage, GROUP, [*others, *listing.parts], listing.annotations)
    for level in LEVELS:
        with suppress(MissingPromptsError):
            to_dataset(view, level).load()


@many
@given(SEEDS)
@example(26_752_120_326_777)  # positions of tokens by layer
def test_changed_documents_of_parts_whose_digest_holds(seed: int) -> None:
    rng = random.Random(seed)
    part, data = rng.choice(parts())
    with watched(), suppress(LmprobeZarrError):
        use(part, sealed(change_json(json.loads(data), rng)), parts())


@many
@given(SEEDS)
def test_changed_documents_of_parts_are_noticed(seed: int) -> None:
    rng = random.Random(seed)
    _, data = rng.choice(parts())
    changed = change_bytes(data, rng)
    with watched():
        if changed == data:
            return
        with pytest.raises(LmprobeZarrError):
            parse_part(changed, "store/part")


@functools.cache
def other_documents() -> list[tuple[bytes, Callable[[bytes, str], object]]]:
    store = lz.open_store(f"memory://{uuid.uuid4().hex}")
    store.write(GROUP, make_batch(["a"]))
    target = lz.open_store(f"memory://{uuid.uuid4().hex}")
    store.publish(target.url, progress=False)
    return [
        (store.storage.read("zarr.json"), parse_root),
        (store.storage.read(f"{GROUP.name}/zarr.json"), parse_group),
        (target.storage.read("zarr.json"), parse_root),
    ]


@many
@given(SEEDS)
def test_changed_documents_of_roots_and_groups(seed: int) -> None:
    rng = random.Random(seed)
    data, parse = rng.choice(other_documents())
    changed = change_bytes(data, rng) if rng.random() < 0.4 else dumped(change_json(json.loads(data), rng))
    with watched(), suppress(LmprobeZarrError):
        found: Any = parse(changed, "store")
        if parse is parse_group:
            assert "/" not in found.name
            assert ".." not in found.name
        elif found is not None:
            for key in itertools.chain(found.groups, *found.groups.values()):
                assert ".." not in key
                assert not key.startswith("/")
