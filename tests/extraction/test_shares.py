"""Extractions and sweeps on `distributed`: values as from one process, a model per process, and workers that die."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import dask.array
import fsspec
import numpy as np
import pytest
import xarray as xr
from clusters import local_client
from hypothesis import given
from hypothesis import strategies as st

import lmprobe_zarr as lz
from lmprobe_zarr import tasks as cluster
from lmprobe_zarr.cli import main
from lmprobe_zarr.errors import (
    InvalidArgumentError,
    InvalidTypeError,
    MissingDependencyError,
    ModelNotFoundError,
    NumberRangeError,
    PromptTooLongError,
    UnreachableError,
)
from lmprobe_zarr.extraction.shares import cut
from lmprobe_zarr.storage.remote import FsspecStorage
from lmprobe_zarr.store.store import Store

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
distributed = pytest.importorskip("distributed")

from tiny_models import SENTENCES, SharedModels, save_tiny, tiny_model, tiny_tokenizer  # noqa: E402 — after the skips

pytestmark = pytest.mark.model

TEXTS = [f"{sentence} {number}" * (1 + number % 2) for number, sentence in enumerate(SENTENCES * 8)]
LABELS = [number % 2 for number in range(len(TEXTS))]


@pytest.fixture(scope="module")
def processes() -> Iterator[Any]:
    """Two workers, processes of their own; shared, since they take seconds to start."""
    with (
        # By default the cluster gives up a worker that is not back 15 seconds after its death; on a busy machine starting one takes longer.
        dask.config.set({"distributed.deploy.lost-worker-timeout": "180s"}),
        local_client(workers=2, threads=2, processes=True, set_as_default=False) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def threads() -> Iterator[Any]:
    """Two workers in this process."""
    with local_client(workers=2, threads=2, set_as_default=False) as client:
        yield client


@pytest.fixture(scope="session")
def llama(tiny_models: SharedModels) -> Path:
    return tiny_models("llama")


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes its time: wide and deep enough for a worker to be killed in the middle."""
    return save_tiny("llama", tmp_path_factory.mktemp("models") / "slow", hidden_size=256, intermediate_size=512, num_hidden_layers=12)


@pytest.fixture(scope="module")
def truth(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The same extraction by a single process."""
    store = lz.open_store(tmp_path_factory.mktemp("truth") / "acts", durable=False)
    run(llama, store)
    return store


def run(model: Any, store: Any, prompts: Any = None, **options: Any) -> lz.ExtractStats:
    settled = {"device": "cpu", "progress": False, "keep_tokens": True, "pooling": ["mean", "last_token"], "coords": {"label": LABELS}}
    return lz.extract(model, TEXTS if prompts is None else prompts, store=store, **{**settled, **options})


def same(store: Store, truth: Store) -> None:
    """Every prompt once in the view, with the values of a plain extraction."""
    found, expected = store.dataset(), truth.dataset()
    assert sorted(found.text.values) == sorted(expected.text.values)
    found, tokens = store.dataset(prompts=TEXTS), store.tokens(prompts=TEXTS)
    expected, wanted = truth.dataset(prompts=TEXTS), truth.tokens(prompts=TEXTS)
    for name in ("resid_mean", "resid_last_token"):
        np.testing.assert_allclose(found[name].values, expected[name].values, atol=1e-5)
    np.testing.assert_allclose(tokens.resid.values, wanted.resid.values, atol=1e-5)
    for name in ("label", "text", "prompt_length", "n_tokens"):
        assert found[name].values.tolist() == expected[name].values.tolist(), name
    assert tokens.token_id.values.tolist() == wanted.token_id.values.tolist()


# -- what comes out --------------------------------------------------------------------------------------------------------


def test_worker_processes_store_what_a_single_one_would(
    llama: Path, truth: Store, processes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(llama.parent)  # workers stand elsewhere
    stats = run("llama", tmp_path / "acts", client=processes)
    assert (stats.prompts, stats.found, stats.extracted) == (len(TEXTS), 0, len(TEXTS))
    assert stats.model_loaded
    assert stats.parts >= 2
    single = run(llama, tmp_path / "single")
    assert (stats.group, stats.tokens, stats.nbytes) == (single.group, single.tokens, single.nbytes)
    store = lz.open_store(tmp_path / "acts")
    same(store, truth)
    again = run(llama, tmp_path / "acts", client=processes)
    assert (again.found, again.extracted, again.model_loaded, again.parts) == (len(TEXTS), 0, False, 0)


def test_only_what_is_missing_is_run_and_what_is_stored_is_pooled_and_annotated(
    llama: Path, truth: Store, threads: Any, tmp_path: Path, runs: list[int]
) -> None:
    run(llama, tmp_path / "acts", TEXTS[:30], pooling="mean", coords=None)
    runs.clear()
    stats = run(llama, tmp_path / "acts", client=threads)
    assert (stats.found, stats.derived, stats.extracted) == (30, 30, 10)
    assert sum(runs) == 10
    assert max(runs) <= 2, "eight shares of ten prompts"
    same(lz.open_store(tmp_path / "acts"), truth)


def test_the_model_is_loaded_once_per_process_and_activations_never_pass_the_scheduler(
    llama: Path, processes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes.run(_count_loads)
    from distributed.protocol import pickle

    dumps: Any = pickle.dumps
    sent, back = [], []
    submit = processes.submit

    def counted(function: Any, *args: Any, **options: Any) -> Any:
        sent.append(len(dumps(args)))
        future = submit(function, *args, **options)
        future.add_done_callback(lambda done: back.append(len(dumps(done.result()))))
        return future

    monkeypatch.setattr(processes, "submit", counted)
    run(llama, tmp_path / "acts", client=processes, name="another", coords=None)
    assert len(sent) == 8
    assert sum(sent) < 20_000 + 2 * sum(map(len, TEXTS))
    assert max(back) < 3_000
    assert sorted(processes.run(_loads).values()) == [1, 1]


def _count_loads() -> None:
    from lmprobe_zarr.extraction import model_choice

    model_choice.loads = []  # type: ignore[attr-defined]
    real: Any = vars(model_choice)["_load"]

    def load(*args: Any, **options: Any) -> Any:
        model_choice.loads.append(1)  # type: ignore[attr-defined]
        return real(*args, **options)

    vars(model_choice)["_load"] = load


def _loads() -> int:
    from lmprobe_zarr.extraction import model_choice

    return len(model_choice.loads)  # type: ignore[attr-defined]


def test_chats_ids_and_repeated_prompts_go_to_workers_too(llama: Path, threads: Any, tmp_path: Path) -> None:
    ids = [[5, 6, 7], [8, 9], [5, 6, 7], [10]]
    for place, client in (("one", None), ("many", threads)):
        run(llama, tmp_path / place, ids, coords=None, client=client)
    one, many = lz.open_store(tmp_path / "one"), lz.open_store(tmp_path / "many")
    np.testing.assert_allclose(many.tokens(prompts=ids).resid.values, one.tokens(prompts=ids).resid.values, atol=1e-5)
    assert many.dataset().sizes["prompt"] == 3


def test_what_lies_below_is_not_run_again_by_workers(llama: Path, truth: Store, processes: Any, tmp_path: Path) -> None:
    run(llama, tmp_path / "team", TEXTS[:25], coords={"label": LABELS[:25]})
    places = [tmp_path / "team", tmp_path / "mine"]
    assert run(llama, places, client=processes).extracted == 15
    assert lz.open_store(tmp_path / "mine").dataset().sizes["prompt"] == 15
    same(lz.open_store(places), truth)


# -- workers that die ------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_worker_that_is_killed_in_the_middle_loses_and_doubles_nothing(slow: Path, processes: Any, tmp_path: Path) -> None:
    store = lz.open_store(tmp_path / "acts", durable=False)
    plain = lz.open_store(tmp_path / "plain", durable=False)
    options: dict[str, Any] = {"part_bytes": 200_000, "batch_prompts": 1}
    run(slow, plain, batch_prompts=1)
    killed: list[int] = []

    def kill() -> None:
        pids = list(processes.run(os.getpid).values())
        for _ in range(6000):
            groups = list(store.groups().values())
            if groups and len(store.list_parts(groups[0].name)) >= 3:
                os.kill(pids[0], signal.SIGKILL)
                killed.append(pids[0])
                return
            time.sleep(0.01)

    killer = threading.Thread(target=kill)
    killer.start()
    stats = run(slow, store, client=processes, **options)
    killer.join()
    assert killed
    assert stats.extracted == len(TEXTS)
    processes.wait_for_workers(2, timeout=180)
    same(lz.open_store(tmp_path / "acts"), plain)
    written = [one for part in store.view(store.find_group()).parts for one in part.info.digests[:, :8].tobytes().hex(" ", 8).split()]
    assert len(written) == len(set(written)) == len(TEXTS), "what was committed before was looked up, and not run again"


def test_prompts_that_kill_every_worker_are_an_error_of_ours(processes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes.cluster.scheduler, "allowed_failures", 0)  # four deaths as a rule, which take their time
    starts = [lambda: processes.submit(_die, pure=False)]
    with pytest.raises(UnreachableError, match=r"(?s)again and again.*too little memory"):
        cluster.run_on_client(processes, starts, 1, lambda _: None)
    processes.wait_for_workers(2, timeout=180)


def _die() -> None:
    os._exit(1)


@pytest.mark.long
def test_a_call_that_is_interrupted_cancels_what_waits_and_stops_what_runs(slow: Path, processes: Any, tmp_path: Path) -> None:
    processes.wait_for_workers(2, timeout=180)
    store = lz.open_store(tmp_path / "acts", durable=False)
    many = [f"{text} {number}" for number in range(40) for text in TEXTS]

    def interrupt() -> None:
        for _ in range(6000):
            groups = list(store.groups().values())
            if groups and store.list_parts(groups[0].name):
                break
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    killer = threading.Thread(target=interrupt)
    killer.start()
    with pytest.raises(KeyboardInterrupt):
        run(slow, store, many, coords=None, client=processes, part_seconds=0.0, batch_prompts=2)
    killer.join()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and any(processes.run(_busy).values()):
        time.sleep(0.1)
    assert not any(processes.run(_busy).values())
    found = len(lz.open_store(tmp_path / "acts").dataset().prompt)
    assert 0 < found < len(many), "what was committed is whole, the rest was not run"


def _busy(dask_worker: Any = None) -> bool:
    return bool(dask_worker.state.executing_count)


# -- errors ----------------------------------------------------------------------------------------------------------------


def test_errors_on_a_worker_come_back_as_ours(llama: Path, processes: Any, tmp_path: Path) -> None:
    big = tmp_path / "big"
    model = tiny_model("llama")
    with torch.no_grad():
        model.embed_tokens.weight.mul_(1e7)
    model.save_pretrained(big)
    tiny_tokenizer().save_pretrained(big)
    with pytest.raises(NumberRangeError, match="float16"):
        run(big, tmp_path / "acts", client=processes, storage_dtype="float16", overflow="raise")
    with pytest.raises(PromptTooLongError):
        run(llama, tmp_path / "acts", [*TEXTS[:3], "a " * 500], coords=None, client=processes)
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "bare" / name).write_bytes((llama / name).read_bytes())
    with pytest.raises(ModelNotFoundError):
        run(tmp_path / "bare", tmp_path / "acts", client=processes)


def test_objects_and_places_of_one_process_cannot_be_sent(llama: Path, processes: Any) -> None:
    with pytest.raises(InvalidTypeError, match="loaded model cannot be sent to workers: give its folder or hub id"):
        run(tiny_model("llama"), None, client=processes, name="m", tokenizer=tiny_tokenizer())
    with pytest.raises(InvalidTypeError, match="tokenizer object cannot be sent"):
        run(llama, None, client=processes, tokenizer=tiny_tokenizer())
    with pytest.raises(InvalidTypeError, match=r"distributed\.Client, not str"):
        run(llama, None, client="tcp://there")
    with pytest.raises(InvalidArgumentError, match="memory of one process and cannot be read by another: use threads, or a folder"):
        run(llama, f"memory://distributed-{os.getpid()}", client=processes)


def test_threads_may_write_into_the_memory_of_their_process(llama: Path, truth: Store, threads: Any) -> None:
    url = f"memory://distributed-threads-{os.getpid()}"
    run(llama, url, client=threads)
    same(lz.open_store(url), truth)
    fsspec.filesystem("memory").rm(url, recursive=True)


# -- shares ----------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(1, 300)), min_size=1, max_size=80), st.integers(1, 12), st.integers(1, 1000))
def test_shares_hold_every_prompt_once_and_none_is_too_large(items: list[tuple[int, int]], count: int, most: int) -> None:
    lengths, weights = (np.array(column, np.int64) for column in zip(*items, strict=True))
    shares = cut(lengths, weights, count=count, most=most)
    assert sorted(np.concatenate(shares).tolist()) == list(range(len(items)))
    assert len(shares) >= min(count, len(items))
    for share in shares:
        assert len(share) == 1 or weights[share].sum() <= most
        assert (np.diff(lengths[share]) <= 0).all()


def test_shares_take_about_equally_long() -> None:
    lengths = np.random.default_rng(0).integers(1, 500, 2000)
    shares = cut(lengths, np.full(2000, 100), count=8, most=2**20)
    assert len(shares) == 8
    work = [int(lengths[share].sum()) for share in shares]
    assert max(work) - min(work) <= 500, "never more apart than the longest prompt"


# -- sweeps ----------------------------------------------------------------------------------------------------------------


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["layered", "remote"])
def test_a_sweep_sends_no_values_of_a_layered_or_remote_store_and_labels_once(
    kind: str, processes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.random.default_rng(0).normal(size=(3, 40, 512)).astype("float32")
    texts = [f"text {i}" for i in range(40)]
    y = np.arange(40) % 2
    values[:, :, 0] += 4 * y
    # Files that are reached as objects are, through fsspec.
    far = Store(FsspecStorage(fsspec.filesystem("file", auto_mkdir=True), str(tmp_path / "far"), "far://acts"))
    near = lz.open_store(tmp_path / "near")
    stores = {"layered": [far, near], "remote": [far, far]}[kind]
    for store, rows in zip(stores, (slice(0, 25), slice(25, 40)), strict=True):
        pooled = {"resid_mean": {layer: values[layer, rows] for layer in range(3)}}
        lz.write_activations(store, model="m", prompts=texts[rows], pooled=pooled)
    array: xr.DataArray = lz.open_store([far, near] if kind == "layered" else far).dataset("m", prompts=texts).resid_mean
    from distributed.protocol import pickle

    dumps: Any = pickle.dumps
    sent: list[int] = []
    submit = processes.submit

    def counted(function: Any, *args: Any, **options: Any) -> Any:
        sent.append(len(dumps([arg for arg in args if not isinstance(arg, distributed.Future)])))
        return submit(function, *args, **options)

    monkeypatch.setattr(processes, "submit", counted)
    monkeypatch.setattr(processes, "scatter", lambda *args, **options: pytest.fail("values were sent"))
    scores = lz.sweep(array, y, ["logistic_regression", "ridge"], cv=2, client=processes)
    assert len(sent) == 1 + 3 * 2, (
        "the plan, which holds the labels, and then numbers: of a layer and a probe, four threads being more than layers"
    )
    assert sent[0] < 20_000 < array.nbytes / 10
    assert max(sent[1:]) < 200
    assert not array._in_memory
    expected = lz.sweep(array.load(), y, ["logistic_regression", "ridge"], cv=2)
    np.testing.assert_array_equal(scores.accuracy.values, expected.accuracy.values)


# -- the command line ------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_command_line_makes_workers_or_asks_a_scheduler(
    llama: Path, processes: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(TEXTS[:10]))
    command = ["extract", str(llama), str(prompts), "--device", "cpu", "--json"]
    assert main([*command, "--scheduler", processes.scheduler.address, "--store", str(tmp_path / "b")]) == 0
    assert json.loads(capsys.readouterr().out)["extracted"] == 10
    assert main([*command, "--scheduler", "tcp://127.0.0.1:1", "--workers", "1"]) == 1
    assert "leave one of the two out" in capsys.readouterr().err
    # Its workers are started by spawn, so import what was started: the module itself.
    fresh = [sys.executable, "-W", "error", "-m", "lmprobe_zarr", *command, "--workers", "1", "--store", "a"]
    done = subprocess.run(fresh, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["extracted"] == 10
    a, b = lz.open_store(tmp_path / "a").dataset(prompts=TEXTS[:10]), lz.open_store(tmp_path / "b").dataset(prompts=TEXTS[:10])
    np.testing.assert_allclose(a.resid_last_token.values, b.resid_last_token.values, atol=1e-5)


def test_workers_that_cannot_be_had_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidArgumentError, match="leave one of the two out"), cluster.own_client(workers=1, address="tcp://there:1"):
        pass
    with pytest.raises(InvalidArgumentError, match="at least 1"), cluster.own_client(workers=0):
        pass
    with pytest.raises(UnreachableError, match="no scheduler answers"), cluster.own_client(address="nonsense://there"):
        pass
    assert dask.array.arange(10).sum().compute() == 45, "no computation of Dask waits for a scheduler that was never there"
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(MissingDependencyError, match=r"lmprobe-zarr\[distributed\]"), cluster.own_client(workers=1):
        pass
    with cluster.own_client() as nothing, contextlib.nullcontext():
        assert nothing is None
