"""Rows are written and shown in the order in which the caller gave the prompts, whatever order they were run in."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clusters import local_client
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import make_batch

import lmprobe_zarr as lz
from lmprobe_zarr.batch import TokenBatch, prompt_sha256
from lmprobe_zarr.errors import InvalidArgumentError, NoSpaceError
from lmprobe_zarr.extraction import fill, in_order
from lmprobe_zarr.extraction.in_order import InOrder
from lmprobe_zarr.store.store import Store

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.model

RNG = np.random.default_rng(0)
PROMPTS = [f"{i} " + "walk the dog " * int(RNG.integers(0, 9)) + "home" for i in range(30)]
LABELS = [i % 2 for i in range(len(PROMPTS))]


@pytest.fixture
def llama(tiny_models: Callable[[str], Path]) -> Path:
    return tiny_models("llama")


@pytest.fixture
def acts(tmp_path: Path) -> Store:
    return lz.open_store(tmp_path / "acts", durable=False)


def run(model: Any, prompts: Any, store: Any, **options: Any) -> lz.ExtractStats:
    return lz.extract(model, prompts, store=store, device="cpu", progress=False, **options)


def written(store: Store) -> list[str]:
    """The texts of all parts, in the order of their rows."""
    (info,) = store.groups().values()
    parts = store.list_parts(info.name)
    return [text for part in parts for text in np.asarray(part.array("prompts", "text").read_chunk(0, 0)).reshape(-1).tolist()]


def alone(folder: Path, texts: list[str]) -> list[Any]:
    """The output of every block for each prompt alone, (block, token, hidden), by transformers itself."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found, outputs = [], []
    for block in model.layers:
        block.register_forward_hook(lambda _module, _given, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    for text in texts:
        outputs.clear()
        with torch.no_grad():
            model(**tokenizer(text, return_tensors="pt"))
        found.append(torch.stack([out[0] for out in outputs]).numpy())
    return found


@pytest.mark.few(1)
@pytest.mark.parametrize("window_bytes", [256 << 20, 3_000], ids=["in memory", "in a scratch file"])
@pytest.mark.parametrize("batches", [1, 3, 64])
def test_rows_of_every_part_and_of_the_view_are_in_the_callers_order(
    llama: Path, acts: Store, monkeypatch: pytest.MonkeyPatch, batches: int, window_bytes: int
) -> None:
    monkeypatch.setattr(fill, "WINDOW_BATCHES", batches)
    monkeypatch.setattr(fill, "WINDOW_BYTES", window_bytes)
    monkeypatch.setattr(fill, "MEMORY_BYTES", window_bytes)
    monkeypatch.setattr(in_order, "SLICE_BYTES", 4_000)
    run(llama, PROMPTS, acts, pooling=["last_token", "mean"], keep_tokens=True, batch_tokens=64, coords={"label": LABELS})
    assert written(acts) == PROMPTS
    data, tokens = acts.dataset(), acts.tokens()
    assert data.text.values.tolist() == PROMPTS
    assert data.label.values.tolist() == LABELS
    bounds = np.cumsum([0, *data.n_tokens.values])
    for i, right in enumerate(alone(llama, PROMPTS)):
        np.testing.assert_allclose(tokens.resid.values[:, bounds[i] : bounds[i + 1]], right, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(data.resid_mean.values[:, i], right.mean(axis=1), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(data.resid_last_token.values[:, i], right[:, -1], rtol=1e-4, atol=1e-5)
    assert not list(Path(acts.url).rglob("*lmprobe-zarr-*")), "no scratch file is left"


def test_several_parts_of_one_call_are_in_the_callers_order(llama: Path, acts: Store) -> None:
    stats = run(llama, PROMPTS, acts, part_bytes=4_000, batch_tokens=64)
    assert stats.parts > 3
    assert acts.dataset().text.values.tolist() == PROMPTS
    assert written(acts) == PROMPTS


def test_a_prompt_that_is_given_twice_is_stored_where_it_came_first(llama: Path, acts: Store) -> None:
    run(llama, [*PROMPTS[:5], PROMPTS[2], *PROMPTS[5:], PROMPTS[0]], acts, batch_tokens=64)
    assert acts.dataset().text.values.tolist() == PROMPTS


def test_an_interruption_keeps_what_has_arrived_and_the_next_call_completes_the_callers_order(
    llama: Path, acts: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmprobe_zarr.extraction.models.passes import Job

    real, calls = Job.collect, 0

    def interrupted(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(Job, "collect", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(llama, PROMPTS, acts, keep_tokens=True, batch_prompts=3)
    assert acts.dataset().sizes["prompt"] == 12
    assert np.isfinite(acts.tokens().resid.values).all()
    stats = run(llama, PROMPTS, acts, keep_tokens=True)
    assert (stats.found, stats.extracted) == (12, 18)
    data = lz.open_store(acts.url).dataset()
    assert data.text.values.tolist() == PROMPTS
    lz.sweep(data.resid_last_token, LABELS, cv=2)


def test_an_interruption_while_a_window_is_handed_on_hands_it_on_again() -> None:
    batch = make_batch(["a", "b"])
    other = make_batch(["c"])
    taken: list[str] = []
    calls = 0

    def put(window: Iterator[TokenBatch]) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise KeyboardInterrupt
        taken.extend(text for each in window for text in each.text or ())

    places = {digest: i for i, digest in enumerate([*batch.sha256, *other.sha256])}
    with pytest.raises(KeyboardInterrupt), closing(InOrder(put, places, memory=1)) as ordered, ordered:
        ordered.take(batch)
        ordered.take(other)  # into the scratch file
        ordered.flush()
    assert taken == ["a", "b", "c"]


@pytest.mark.parametrize("second", [["c"], ["c", "d"]], ids=["of one kind", "of two kinds"])
def test_what_is_taken_after_the_scratch_files_are_closed_is_an_error_and_never_zeros(second: list[str]) -> None:
    batches = [make_batch(["a", "b"]), make_batch(second, tokens=len(second) < 2)]
    windows: list[Iterator[TokenBatch]] = []
    places = {digest: i for i, digest in enumerate(digest for batch in batches for digest in batch.sha256)}
    with closing(InOrder(windows.append, places, memory=1)) as ordered, ordered:
        for batch in batches:
            ordered.take(batch)
    (window,) = windows
    with pytest.raises(ValueError, match="closed file"):
        list(window)


def test_a_failure_of_the_writing_ends_the_run_without_another_try() -> None:
    calls = 0

    def put(_: Iterator[TokenBatch]) -> None:
        nonlocal calls
        calls += 1
        raise NoSpaceError("full")

    batch = make_batch(["a"])
    with pytest.raises(NoSpaceError), closing(InOrder(put, {batch.sha256[0]: 0}, memory=1)) as ordered, ordered:
        ordered.take(batch)
        ordered.flush()
    assert calls == 1


def test_the_shares_of_workers_are_shown_in_the_callers_order(llama: Path, acts: Store) -> None:
    with local_client(workers=2) as client:
        run(llama, PROMPTS, acts, client=client)
    data = acts.dataset()
    assert data.text.values.tolist() == PROMPTS
    lz.sweep(data.resid_last_token, LABELS, cv=2)


def test_labels_by_list_and_by_column_give_the_same_scores(llama: Path, acts: Store) -> None:
    run(llama, PROMPTS, acts, coords={"label": LABELS}, batch_tokens=64)
    data = acts.dataset()
    by_list, by_column = (lz.sweep(data.resid_last_token, labels, cv=3) for labels in (LABELS, "label"))
    np.testing.assert_array_equal(by_list.accuracy.values, by_column.accuracy.values)


@pytest.mark.few(1)
@pytest.mark.parametrize("second", [PROMPTS[10:], PROMPTS, PROMPTS[::-1]], ids=["others", "more", "in another order"])
def test_after_a_second_call_a_bare_list_is_refused(llama: Path, acts: Store, second: list[str]) -> None:
    first = PROMPTS if second == PROMPTS[::-1] else PROMPTS[:20]
    run(llama, first, acts)
    run(llama, second, acts)
    assert sorted(acts.dataset().text.values.tolist()) == sorted(PROMPTS)
    with pytest.raises(InvalidArgumentError, match=r"several calls have stored or requested(?s:.*)prompts=\[…\]"):
        lz.sweep(acts.dataset().resid_last_token, LABELS, cv=2)
    lz.sweep(acts.dataset(prompts=PROMPTS).resid_last_token, LABELS, cv=2)


def test_other_layers_of_the_same_prompts_in_the_same_order_leave_the_order_known(llama: Path, acts: Store) -> None:
    run(llama, PROMPTS, acts, layers=[0])
    run(llama, PROMPTS, acts, layers=[1, 2], batch_tokens=64)
    lz.sweep(acts.dataset().resid_last_token, LABELS, cv=2)
    run(llama, PROMPTS[::-1], acts, layers=[3])
    with pytest.raises(InvalidArgumentError, match="several calls"):
        lz.sweep(acts.dataset().resid_last_token, LABELS, cv=2)


# ------------------------------------------------------------------------------------------------------- the buffer itself


@settings(max_examples=60, deadline=None)
@given(data=st.data(), memory=st.sampled_from([0, 500, 1 << 30]), slice_bytes=st.sampled_from([1, 300, 1 << 30]))
def test_any_batches_come_out_in_order_with_their_own_values(data: st.DataObject, memory: int, slice_bytes: int) -> None:
    n = data.draw(st.integers(1, 20))
    order = data.draw(st.permutations(range(n)))
    cuts = sorted(data.draw(st.sets(st.integers(1, n))) | {0, n})
    rng = np.random.default_rng(n)
    lengths = rng.integers(1, 5, n)
    values = [rng.normal(size=(2, length, 3)).astype(np.float16) for length in lengths]
    digests = [prompt_sha256(str(i)) for i in range(n)]

    def batch(rows: list[int]) -> TokenBatch:
        return TokenBatch(
            sha256=[digests[i] for i in rows],
            text=[f"text {i}" for i in rows],
            prompt_length=lengths[rows],
            n_tokens=lengths[rows],
            layers=(3, 7),
            tokens={"resid": np.concatenate([values[i] for i in rows], axis=1), "embed": np.concatenate([values[i][0] for i in rows])},
            token_columns={"token_id": np.concatenate([np.full(lengths[i], i) for i in rows])},
            prompts={"resid_mean": np.stack([values[i].mean(axis=1) for i in rows], axis=1)},
            prompt_columns={"label": np.array([f"label {i}" for i in rows], object)},
            unlayered=frozenset({"embed"}),
        )

    taken: list[TokenBatch] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_order, "SLICE_BYTES", slice_bytes)
        with closing(InOrder(taken.extend, {digest: i for i, digest in enumerate(digests)}, memory=memory)) as ordered, ordered:
            for a, b in itertools.pairwise(cuts):
                ordered.take(batch(sorted(order[a:b])))
    assert [digest for each in taken for digest in each.sha256] == digests
    assert [text for each in taken for text in each.text or ()] == [f"text {i}" for i in range(n)]
    assert np.concatenate([each.prompt_columns["label"] for each in taken]).tolist() == [f"label {i}" for i in range(n)]
    assert np.concatenate([each.token_columns["token_id"] for each in taken]).tolist() == np.repeat(np.arange(n), lengths).tolist()
    np.testing.assert_array_equal(np.concatenate([each.tokens["resid"] for each in taken], axis=1), np.concatenate(values, axis=1))
    np.testing.assert_array_equal(np.concatenate([each.tokens["embed"] for each in taken]), np.concatenate([v[0] for v in values]))
    means = np.stack([v.mean(axis=1) for v in values], axis=1)
    np.testing.assert_array_equal(np.concatenate([each.prompts["resid_mean"] for each in taken], axis=1), means)


@pytest.mark.parametrize(("free", "held"), [(None, 64), (1 << 30, 64), (8 << 30, 128), (1 << 40, 256)])
def test_a_window_takes_a_64th_of_the_free_memory_within_bounds(free: int | None, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmprobe_zarr.extraction.models.free_on", lambda _device: free)
    assert fill._window_memory() == held << 20
