"""What calls cost, whatever the machine's speed: files opened, bytes read and written, and memory. Times are never asserted.

Expected numbers are counted by hand from what is stored: the documents, and the chunks of what was requested.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from stores import Wrapped

import lmprobe_zarr as lz
from lmprobe_zarr.batch.hashes import prompt_sha256
from lmprobe_zarr.batch.token_batch import TokenBatch
from lmprobe_zarr.storage.base import Storage
from lmprobe_zarr.storage.open import open_storage
from lmprobe_zarr.store import store as store_room
from lmprobe_zarr.store.format.group import GroupInfo
from lmprobe_zarr.store.parts import writer
from lmprobe_zarr.store.store import Store

LAYERS = (0, 1, 2, 3, 4, 5)
HIDDEN = 64
PROMPTS = 30  # of each part
TOKENS = 20  # of each prompt
ROWS = 128  # of a chunk of tokens, float16
GROUP = GroupInfo(model="acme/toy", num_layers=6, hidden_size=HIDDEN)

# A part has 600 token rows: 5 chunks per layer; 30 pooled rows: one chunk per layer.
TOKEN_CHUNKS = -(-PROMPTS * TOKENS // ROWS)


class Counting(Wrapped):
    """A storage that counts its requests."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self.reads: Counter[str] = Counter()
        self.writes: dict[str, int] = {}
        self.verbs: Counter[str] = Counter()
        self.bytes_read = 0

    def reset(self) -> None:
        self.reads.clear()
        self.writes.clear()
        self.verbs.clear()
        self.bytes_read = 0

    def chunks(self, *names: str) -> Counter[str]:
        """Reads of chunks, of some arrays or of all."""
        chunks = Counter({key: n for key, n in self.reads.items() if key.rpartition("/")[2].startswith("c.")})
        return chunks if not names else Counter({k: n for k, n in chunks.items() if k.split("/")[-2] in names})

    @property
    def documents(self) -> Counter[str]:
        """Reads of documents."""
        return Counter({key: n for key, n in self.reads.items() if key.endswith("zarr.json")})

    def _read(self, verb: str, key: str, data: Any) -> Any:
        self.verbs[verb] += 1
        self.reads[key] += 1
        self.bytes_read += len(data)
        return data

    def read(self, key: str) -> bytes:
        return bytes(self._read("read", key, super().read(key)))

    def read_view(self, key: str) -> Any:
        return self._read("read", key, super().read_view(key))

    def read_ranges(self, key: str, ranges: Any) -> Any:
        found = super().read_ranges(key, ranges)
        self._read("read", key, b"".join(found))
        return found

    def scan(self, key: str) -> Any:
        self.verbs["list"] += 1
        return super().scan(key)

    def list(self, key: str) -> Any:
        self.verbs["list"] += 1
        return super().list(key)

    def is_file(self, key: str) -> bool:
        self.verbs["is_file"] += 1
        return super().is_file(key)

    def write(self, key: str, data: Any, *, durable: bool) -> None:
        self.verbs["write"] += 1
        self.writes[key] = sum(map(len, data)) if isinstance(data, tuple) else len(data)
        super().write(key, data, durable=durable)

    def commit(self, key: str, data: Any, *, durable: bool, replace: bool = True) -> None:
        self.verbs["commit"] += 1
        self.writes[key] = len(data)
        super().commit(key, data, durable=durable, replace=replace)

    def remove(self, keys: Iterable[str]) -> None:
        listed = [*keys]
        self.verbs["remove"] += len(listed)
        super().remove(listed)


def batch_of(part: int, prompts: int = PROMPTS) -> TokenBatch:
    rng = np.random.default_rng(part)
    texts = [f"{part}.{i}" for i in range(prompts)]
    return TokenBatch(
        sha256=[prompt_sha256(text) for text in texts],
        text=texts,
        layers=LAYERS,
        n_tokens=np.full(prompts, TOKENS),
        tokens={"resid": rng.standard_normal((len(LAYERS), prompts * TOKENS, HIDDEN)).astype("f2")},
        token_columns={"token_id": rng.integers(0, 99, prompts * TOKENS)},
        prompts={"resid_mean": rng.standard_normal((len(LAYERS), prompts, HIDDEN)).astype("f2")},
        prompt_columns={"label": np.arange(prompts) % 2},
    )


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[Store, Counting]]:
    """A store of three parts, opened anew with nothing read and nothing counted."""
    monkeypatch.setattr(writer, "CHUNK_BYTES", ROWS * HIDDEN * 2)
    monkeypatch.setattr(writer, "REMOTE_CHUNK_BYTES", ROWS * HIDDEN * 2)
    monkeypatch.setattr(writer, "MIN_CHUNK_BYTES", ROWS * HIDDEN * 2)
    first = lz.open_store(tmp_path / "acts", durable=False)
    for part in range(3):
        first.write(GROUP, batch_of(part))

    def anew() -> tuple[Store, Counting]:
        counting: list[Counting] = []
        real = open_storage

        def open_counted(*args: Any, **options: Any) -> Storage:
            counting.append(Counting(real(*args, **options)))
            return counting[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store_room, "open_storage", open_counted)
            store = lz.open_store(tmp_path / "acts", durable=False)
        return store, counting[-1]

    return anew


def stored_bytes(store: Store, *patterns: str) -> int:
    return sum(path.stat().st_size for pattern in patterns for path in Path(store.url).glob(pattern))


def once(reads: Counter[str]) -> bool:
    return set(reads.values()) <= {1}


# ----------------------------------------------------------------------------------------------------------------- reading


def test_opening_a_group_reads_each_document_once_and_no_chunk(opened: Callable[[], tuple[Store, Counting]]) -> None:
    store, counting = opened()
    assert store.dataset().sizes["prompt"] == 3 * PROMPTS
    assert once(counting.documents)
    assert len(counting.documents) == 1 + 1 + 3, "the root, the group, three parts"
    assert not counting.chunks()
    assert counting.bytes_read == stored_bytes(store, "zarr.json", "*/zarr.json", "*/*/zarr.json")
    assert counting.verbs["list"] == 3, "the root's groups, the group's parts, its annotations"
    assert counting.verbs["is_file"] <= 1, "whether the group holds any part"
    assert counting.verbs["write"] == counting.verbs["commit"] == 0
    counting.reset()
    assert store.tokens().sizes["token"] == 3 * PROMPTS * TOKENS
    assert counting.verbs["list"] == 3, "what is new since"
    assert counting.bytes_read == 0, "documents never change, and are kept"


def test_one_layer_costs_its_chunks_and_nothing_else(opened: Callable[[], tuple[Store, Counting]]) -> None:
    store, counting = opened()
    data, tokens = store.dataset(), store.tokens()
    counting.reset()
    data.resid_mean.sel(layer=2).values  # noqa: B018
    assert once(counting.reads)
    assert len(counting.reads) == 3, "one chunk of each part"
    assert counting.bytes_read == stored_bytes(store, "*/*/prompts/resid_mean/c.2.*")
    counting.reset()
    tokens.resid.sel(layer=2).values  # noqa: B018
    assert once(counting.reads)
    assert len(counting.reads) == 3 * TOKEN_CHUNKS
    assert counting.bytes_read == stored_bytes(store, "*/*/tokens/resid/c.2.*")
    assert set(counting.verbs) == {"read"}
    counting.reset()
    tokens.resid.sel(layer=[1, 4]).values  # noqa: B018
    assert len(counting.reads) == 2 * 3 * TOKEN_CHUNKS
    assert counting.bytes_read == stored_bytes(store, "*/*/tokens/resid/c.1.*", "*/*/tokens/resid/c.4.*")
    assert set(counting.verbs) == {"read"}


def calls_of_ours(select: Callable[[], xr.DataArray]) -> Counter[str]:
    """Calls of functions of this package, on this thread, by file and name, while a selection is made and read."""
    root, calls = str(Path(lz.__file__).parent), Counter[str]()

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(root):
            calls[f"{frame.f_code.co_filename[len(root) :]}:{frame.f_code.co_name}"] += 1

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        assert len(select().values)
    finally:
        sys.setprofile(before)
    return calls


def test_one_row_takes_few_calls_however_many_parts_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "CHUNK_BYTES", ROWS * HIDDEN * 2)
    monkeypatch.setattr(writer, "MIN_CHUNK_BYTES", ROWS * HIDDEN * 2)
    found: dict[str, list[int]] = {}
    for parts in (1, 3, 12):
        store = lz.open_store(tmp_path / str(parts), durable=False)
        for part in range(parts):
            store.write(GROUP, batch_of(part))
        data, tokens, label = store.dataset(dtype="stored"), store.tokens(dtype="stored"), lz.prompt_hash("0.2")
        selections: dict[str, Callable[[], xr.DataArray]] = {
            "row": partial(data.resid_mean.isel, layer=3, prompt=17),
            "row by prompt": partial(data.resid_mean.sel, layer=3, prompt=label),
            "token": partial(tokens.resid.isel, layer=3, token=57),
            "prompt": partial(tokens.resid.sel, layer=3, prompt=label),
            "layer": partial(data.resid_mean.isel, layer=3),
        }
        for name, select in selections.items():
            assert len(select().values), "warm: what is computed once has been"
            found.setdefault(name, []).append(calls_of_ours(select).total())
    # Before there was a way for rows that follow one another: 112, 113, 117, 137 in one part, and 60 more in twelve.
    limits = {"row": 60, "row by prompt": 62, "token": 66, "prompt": 78}
    for name, limit in limits.items():
        assert len(set(found[name])) == 1, f"{name}: {found[name]} calls in 1, 3 and 12 parts"
        assert found[name][0] <= limit, (name, found[name])
    assert found["layer"][2] - found["layer"][1] <= 9 * 50, "by part one chunk, which is read as a row is"


def test_reading_one_prompt_over_all_layers_reads_only_its_chunks(opened: Callable[[], tuple[Store, Counting]]) -> None:
    store, counting = opened()
    tokens = store.tokens()
    counting.reset()
    tokens.resid.sel(prompt=lz.prompt_hash("1.2")).values  # noqa: B018
    assert len(counting.reads) == len(LAYERS), "rows 40 to 59 of the first chunk"
    assert once(counting.reads)
    counting.reset()
    tokens.resid.sel(prompt=lz.prompt_hash("1.6")).values  # noqa: B018
    assert len(counting.reads) == 2 * len(LAYERS), "rows 120 to 139 lie in two chunks"
    assert once(counting.reads)
    assert set(counting.verbs) == {"read"}
    counting.reset()
    store.dataset(prompts=["1.6"]).resid_mean.values  # noqa: B018
    assert len(counting.chunks("resid_mean")) == len(LAYERS) == len(counting.reads)


def test_batches_read_each_chunk_once_per_epoch_and_a_resumed_run_only_what_follows(opened: Callable[[], tuple[Store, Counting]]) -> None:
    store, counting = opened()
    tokens = store.tokens()
    counting.reset()
    rows = sum(len(x) for x in tokens.lz.batches(layer=3, batch_tokens=100, buffer_tokens=400, epochs=2, skip_positions=0))
    assert rows == 2 * 3 * PROMPTS * (TOKENS - 1)
    assert set(counting.reads.values()) == {2}, "once in each of two epochs"
    assert len(counting.reads) == 3 * TOKEN_CHUNKS
    assert counting.bytes_read == 2 * stored_bytes(store, "*/*/tokens/resid/c.3.*")
    counting.reset()
    # The last of 18 batches of 100: one buffer of 400 rows, whole chunks, so at most 400 and one chunk.
    list(tokens.lz.batches(layer=3, batch_tokens=100, buffer_tokens=400, start_step=17))
    assert len(counting.reads) <= -(-400 // (PROMPTS * TOKENS // TOKEN_CHUNKS)) + 1
    counting.reset()
    tokens.lz.statistics(layer=[3, 5])
    assert once(counting.reads)
    assert len(counting.reads) == 2 * 3 * TOKEN_CHUNKS


def test_a_sweep_reads_each_layer_once(opened: Callable[[], tuple[Store, Counting]]) -> None:
    store, counting = opened()
    data = store.dataset()
    counting.reset()
    scores = lz.sweep(data.resid_mean, labels="label", probes=["ridge", "mass_mean"], cv=3, scheduler="synchronous")
    assert scores.sizes["layer"] == len(LAYERS)
    assert set(counting.chunks("resid_mean").values()) == {1}, "for two probes and three folds"
    assert len(counting.chunks("resid_mean")) == 3 * len(LAYERS)
    # Besides: the labels and the texts, each at most a few times.
    assert counting.bytes_read - stored_bytes(store, "*/*/prompts/resid_mean/c.*") <= 4 * stored_bytes(
        store, "*/*/prompts/label/c.*", "*/*/prompts/text/c.*"
    )


def test_cache_info_reads_documents_only(opened: Callable[[], tuple[Store, Counting]]) -> None:
    store, counting = opened()
    info = lz.cache_info(store=store)
    assert info.models[0].num_prompts == 3 * PROMPTS
    assert not counting.chunks()
    assert once(counting.documents)
    assert len(counting.documents) <= 1 + 1 + 3
    assert counting.bytes_read <= stored_bytes(store, "zarr.json", "*/zarr.json", "*/*/zarr.json")


# ----------------------------------------------------------------------------------------------------------------- writing


def test_writing_a_part_writes_each_byte_once_and_reads_none_of_them(opened: Callable[[], tuple[Store, Counting]]) -> None:
    store, counting = opened()
    store.groups()
    counting.reset()
    name = store.write(GROUP, batch_of(7))
    assert not counting.chunks(), "nothing that is stored is read"
    part = f"{GROUP.name}/{name}"
    here = {key: size for key, size in counting.writes.items() if key.startswith(part)}
    assert sum(here.values()) == stored_bytes(store, f"{part}/**/*.json", f"{part}/**/c*")
    chunks = [key for key in here if key.rpartition("/")[2].startswith("c.")]
    assert len([key for key in chunks if "/resid/" in key]) == len(LAYERS) * TOKEN_CHUNKS
    assert len([key for key in chunks if "/resid_mean/" in key]) == len(LAYERS)
    assert set(counting.writes) - set(here) <= {"zarr.json", f"{GROUP.name}/zarr.json"}
    assert counting.verbs["write"] + counting.verbs["commit"] == len(counting.writes), "no file is written twice"
    assert list(counting.writes)[-1] == f"{part}/zarr.json", "the commit comes last"
    values = len(LAYERS) * PROMPTS * (TOKENS + 1) * HIDDEN * 2
    # Random float16 does not compress much below 14 of 16 bits; the last chunk of each layer is full size, its rest compresses away.
    assert 0.8 * values < sum(size for key, size in here.items() if key in chunks) < 1.05 * values + 8192


def test_compaction_reads_and_writes_everything_once(opened: Callable[[], tuple[Store, Counting]]) -> None:
    store, counting = opened()
    stored = stored_bytes(store, "*/*/**/c*")
    counting.reset()
    plan = store.compact(progress=False)
    assert (plan.parts, plan.parts_after) == (3, 1)
    assert set(counting.chunks("resid", "resid_mean").values()) == {1}
    assert len(counting.chunks("resid")) == 3 * len(LAYERS) * TOKEN_CHUNKS
    read = sum(n * (Path(store.url) / key).stat().st_size for key, n in counting.chunks().items())
    assert read <= 1.1 * stored + 8192
    written = sum(size for key, size in counting.writes.items() if key.rpartition("/")[2].startswith("c."))
    assert written <= 1.05 * stored
    assert counting.verbs["remove"] == 0, "gc removes what was replaced"


@pytest.mark.model
def test_extracting_what_is_stored_loads_no_model_and_reads_few_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from tiny_models import PROMPTS as TEXTS
    from tiny_models import save_tiny

    folder = save_tiny("llama", tmp_path / "llama")
    url = tmp_path / "acts"
    lz.extract(folder, TEXTS, store=url, device="cpu", progress=False)
    counting = Counting(open_storage(url))
    monkeypatch.setattr(store_room, "open_storage", lambda *_, **__: counting)
    monkeypatch.setattr("lmprobe_zarr.extraction.models.loading.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    stats = lz.extract(folder, TEXTS, store=lz.open_store(url), device="cpu", progress=False)
    assert (stats.found, stats.extracted) == (len(TEXTS), 0)
    assert not counting.chunks("resid_last_token")
    assert not counting.writes
    assert counting.bytes_read <= 2 * stored_bytes(lz.open_store(url), "zarr.json", "*/zarr.json", "*/*/zarr.json")


# ------------------------------------------------------------------------------------------- files opened, and peak memory

AUDITED = """
import json, sys
from pathlib import Path
import numpy as np
import lmprobe_zarr as lz
url = sys.argv[1]
opened = []
def hook(event, args):
    if event == "open" and isinstance(args[0], str) and args[0].startswith(url):
        opened.append(args[0][len(url) + 1:])
sys.addaudithook(hook)
def peak():
    return 1024 * int(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
out = {}
def step(name, call):
    before = peak()
    opened.clear()
    value = call()
    out[name] = {"opened": sorted(opened), "grown": peak() - before}
    return value
step("warm", lambda: lz.open_store("memory://warm").models())
store = step("store", lambda: lz.open_store(url, "r"))
tokens = step("open", lambda: store.tokens())
step("prompt", lambda: tokens.resid.sel(prompt=lz.prompt_hash("3")).values.nbytes)
step("batches", lambda: sum(len(x) for x in tokens.lz.batches(layer=0, batch_tokens=512, buffer_tokens=2048)))
step("statistics", lambda: tokens.lz.statistics(layer=0).mean_norm)
step("layer", lambda: tokens.resid.sel(layer=1).values.nbytes)
print(json.dumps(out))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process's own memory is read from Linux")
def test_each_file_is_opened_once_and_memory_is_that_of_what_is_returned(tmp_path: Path) -> None:
    """One part of 16,000 tokens, 1024 wide, float16: 33 MB per layer in chunks of 2 MiB, which are 1,024 rows."""
    prompts, per_prompt, hidden = 200, 80, 1024
    store = lz.open_store(tmp_path / "acts", durable=False)
    values = np.random.default_rng(0).standard_normal((2, prompts * per_prompt, hidden), np.float32).astype(np.float16)
    group = GroupInfo(model="m", num_layers=2, hidden_size=hidden)
    digests = [prompt_sha256(str(i)) for i in range(prompts)]
    part = store.write(group, TokenBatch(sha256=digests, layers=(0, 1), n_tokens=np.full(prompts, per_prompt), tokens={"resid": values}))
    done = subprocess.run([sys.executable, "-c", AUDITED, store.url], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    cost = json.loads(done.stdout)
    here = f"{group.name}/{part}"
    layer, chunk, chunks = values[0].nbytes, 2**21, -(-prompts * per_prompt // 1024)
    documents = ["zarr.json", f"{group.name}/zarr.json", f"{here}/zarr.json"]
    assert sorted(cost["store"]["opened"] + cost["open"]["opened"]) == sorted(documents)
    table = f"{here}/tokens/resid/block_table"
    assert cost["prompt"]["opened"] == [table, *(f"{here}/tokens/resid/c.{i}.0.0" for i in (0, 1))], "rows 240 to 319"
    assert cost["layer"]["opened"] == sorted(f"{here}/tokens/resid/c.1.{i}.0" for i in range(chunks))
    for name in ("batches", "statistics"):
        assert cost[name]["opened"] == sorted(f"{here}/tokens/resid/c.0.{i}.0" for i in range(chunks))
    small = 8 * 2**20  # the interpreter, and what it does for the first time
    # An encoded and a decoded chunk for each of two threads.
    assert cost["prompt"]["grown"] < 2 * 2 * chunk + small
    # Two buffers of 2,048 rows and at most one chunk more; as much again for the threads.
    assert cost["batches"]["grown"] < 2 * 2 * chunk + 2 * 2 * chunk + small
    # Two windows of at most 64 MiB, that is the whole layer; float64 pieces are small.
    assert cost["statistics"]["grown"] < layer + 2 * 2 * chunk + small
    assert cost["layer"]["grown"] < layer + 2 * chunk + small
