from __future__ import annotations

import hashlib
import json
import pickle
import threading
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from stores import GROUP, make_batch, write_shared

import lmprobe_zarr as lz
from lmprobe_zarr.batch import prompt_hash, prompt_sha256
from lmprobe_zarr.batch.token_batch import TokenBatch
from lmprobe_zarr.errors import (
    AmbiguousProvenanceError,
    CorruptPartError,
    InvalidArgumentError,
    LayerOutOfRangeError,
    MissingPromptsError,
    ModelNotStoredError,
    NoSpaceError,
    NotAStoreError,
    PromptCollisionError,
    ReadOnlyError,
    StoreNotFoundError,
    UnsupportedVersionError,
)
from lmprobe_zarr.store.format.group import GroupInfo
from lmprobe_zarr.store.format.part import parse_part
from lmprobe_zarr.store.parts.writer import PartWriter
from lmprobe_zarr.store.store import Store

TEXTS = ["one", "two", "three", "a rather longer prompt", "five"]


def part_names(store: Store, group: GroupInfo = GROUP) -> list[str]:
    return [name for name in store.storage.list(group.name) if len(name) == 26]


# ------------------------------------------------------------------------------------------------------- write and read


@pytest.mark.few(2)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_written_values_are_read_at_both_levels(store: Store, dtype: str) -> None:
    batch = make_batch(TEXTS, dtype=dtype, columns={"label": [1, 0, 1, 0, 1]})
    store.write(GROUP, batch)
    data, tokens = store.dataset("acme/toy", dtype="stored"), store.tokens("acme/toy", dtype="stored")
    assert data.resid_mean.dtype == tokens.resid.dtype == dtype
    np.testing.assert_array_equal(data.resid_mean.values, batch.prompts["resid_mean"])
    np.testing.assert_array_equal(tokens.resid.values, batch.tokens["resid"])
    data, tokens = store.dataset("acme/toy"), store.tokens("acme/toy")
    assert data.resid_mean.dtype == tokens.resid.dtype == max(np.dtype(dtype), np.dtype(np.float32))
    assert data.resid_mean.stored_dtype == tokens.resid.stored_dtype == dtype
    np.testing.assert_array_equal(data.resid_mean.values, batch.prompts["resid_mean"])
    np.testing.assert_array_equal(tokens.resid.values, batch.tokens["resid"])
    assert data.prompt.values.tolist() == [prompt_hash(t) for t in TEXTS]
    assert data.text.values.tolist() == TEXTS
    assert data.prompt_sha256.values.tolist() == [prompt_sha256(t) for t in TEXTS]
    assert data.layer.values.tolist() == [0, 1, 3]
    assert data.label.values.tolist() == [1, 0, 1, 0, 1]
    assert data.n_tokens.values.tolist() == [1 + len(t) % 5 for t in TEXTS]
    assert tokens.token_id.values.tolist() == batch.token_columns["token_id"].tolist()
    assert str(data.model.values) == "acme/toy"
    assert data.attrs["num_layers"] == 4


@pytest.mark.few(2)
def test_prompts_come_in_the_requested_order_with_repeats(store: Store) -> None:
    batch = make_batch(TEXTS)
    store.write(GROUP, batch)
    requested = ["five", prompt_hash("one"), "five", "three"]
    rows = [4, 0, 4, 2]
    data, tokens = store.dataset(prompts=requested, layers=[3, 0]), store.tokens(prompts=requested)
    assert data.text.values.tolist() == [TEXTS[i] for i in rows]
    np.testing.assert_array_equal(data.resid_mean.values, batch.prompts["resid_mean"][[0, 2]][:, rows])
    bounds = np.cumsum([0, *batch.n_tokens])  # type: ignore[misc]
    wanted = np.concatenate([batch.tokens["resid"][:, bounds[i] : bounds[i + 1]] for i in rows], axis=1)
    np.testing.assert_array_equal(tokens.resid.values, wanted)


@pytest.mark.few(2)
def test_a_later_part_wins_for_the_prompts_and_layers_it_holds(store: Store) -> None:
    first = make_batch(["a", "b", "c"], layers=(0, 1), seed=1)
    second = make_batch(["c", "d", "a"], layers=(1, 3), seed=2)
    store.write(GROUP, first)
    store.write(GROUP, second)
    data = store.dataset()
    assert data.text.values.tolist() == ["a", "b", "c", "d"]
    old, new = first.prompts["resid_mean"], second.prompts["resid_mean"]
    np.testing.assert_array_equal(data.resid_mean.sel(layer=0).values[:3], old[0])
    assert np.isnan(data.resid_mean.sel(layer=0).values[3]).all()
    np.testing.assert_array_equal(data.resid_mean.sel(layer=1).values, np.stack([new[0, 2], old[1, 1], new[0, 0], new[0, 1]]))
    np.testing.assert_array_equal(data.resid_mean.sel(layer=3).values[[0, 2, 3]], new[1][[2, 0, 1]])
    assert np.isnan(data.resid_mean.sel(layer=3).values[1]).all()
    there = store.coverage().sel(variable="resid_mean")
    assert there.values.tolist() == [[True, True, True], [True, True, False], [True, True, True], [False, True, True]]


@pytest.mark.few(2)
def test_a_prompt_with_other_tokens_than_before_is_never_mixed(store: Store) -> None:
    store.write(GROUP, make_batch(["a", "b"], n_tokens=[3, 2], layers=(0, 1), seed=1))
    newer = make_batch(["a"], n_tokens=[5], layers=(1,), seed=2)
    store.write(GROUP, newer)
    tokens = store.tokens(prompts=["a"])
    assert tokens.sizes["token"] == 5
    np.testing.assert_array_equal(tokens.resid.sel(layer=1).values, newer.tokens["resid"][0])
    assert np.isnan(tokens.resid.sel(layer=0).values).all(), "layer 0 was only ever seen with three tokens"


@pytest.mark.few(2)
def test_tokens_seen_as_others_since_never_come_back(store: Store) -> None:
    """Three tokens, then two, then three again: what was stored of the first three is out of date."""
    store.write(GROUP, make_batch(["a"], n_tokens=[3], layers=(0, 1), seed=1))
    store.write(GROUP, make_batch(["a"], n_tokens=[2], layers=(0,), seed=2))
    last = make_batch(["a"], n_tokens=[3], layers=(1,), seed=3)
    store.write(GROUP, last)
    resid = store.tokens().resid
    np.testing.assert_array_equal(resid.sel(layer=1).values, last.tokens["resid"][0])
    assert np.isnan(resid.sel(layer=0).values).all()
    assert store.coverage().sel(variable="resid").values.tolist() == [[False, True]]


@pytest.mark.few(2)
def test_an_unknown_length_does_not_hide_a_known_one(store: Store) -> None:
    store.write(GROUP, make_batch(["abc"]))
    batch = make_batch(["abc"])
    store.write(GROUP, TokenBatch(sha256=batch.sha256, layers=batch.layers, prompts=batch.prompts))
    assert store.dataset().prompt_length.values.tolist() == [4]


@pytest.mark.few(2)
def test_a_view_is_a_snapshot_and_another_shows_what_came_later(store: Store) -> None:
    store.write(GROUP, make_batch(["a"]))
    before = store.dataset()
    store.write(GROUP, make_batch(["b"]))
    assert before.sizes["prompt"] == 1
    assert store.dataset().sizes["prompt"] == 2


@pytest.mark.few(2)
def test_pooled_parts_and_token_parts_live_side_by_side(store: Store) -> None:
    store.write(GROUP, make_batch(["a", "b"], tokens=False))
    store.write(GROUP, make_batch(["c"], tokens=True))
    np.testing.assert_array_equal(store.dataset().n_tokens.values, [np.nan, np.nan, 2])
    assert set(store.tokens().prompt.values) == {prompt_hash("c")}
    with pytest.raises(MissingPromptsError, match=r"1 of 2 prompts .* without tokens.*keep_tokens=True"):
        store.tokens(prompts=["c", "a"])


@pytest.mark.few(2)
def test_many_chunks_and_parts_read_the_same_as_one(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmprobe_zarr.store.parts.writer.CHUNK_BYTES", 8 * 4 * 3)
    monkeypatch.setattr("lmprobe_zarr.store.parts.writer.REMOTE_CHUNK_BYTES", 8 * 4 * 3)
    monkeypatch.setattr("lmprobe_zarr.store.parts.writer.MIN_CHUNK_BYTES", 8)
    monkeypatch.setattr("lmprobe_zarr.store.parts.columns.TEXT_ROWS", 4)
    monkeypatch.setattr("lmprobe_zarr.store.parts.writer.COLUMN_ROWS", 5)
    texts = [f"prompt {i}" * (i % 4 + 1) for i in range(23)]
    whole = make_batch(texts)
    assert whole.n_tokens is not None
    bounds = np.cumsum([0, *whole.n_tokens])
    for low, high in ((0, 9), (9, 10), (10, 23)):
        writer = store.new_part(GROUP)
        for i in range(low, high, 2):
            j = min(i + 2, high)
            writer.append(
                TokenBatch(
                    sha256=whole.sha256[i:j],
                    text=texts[i:j],
                    prompt_columns={"label": np.arange(i, j) % 3 == 0},
                    n_tokens=whole.n_tokens[i:j],
                    layers=whole.layers,
                    tokens={"resid": whole.tokens["resid"][:, bounds[i] : bounds[j]]},
                    prompts={"resid_mean": whole.prompts["resid_mean"][:, i:j]},
                )
            )
        writer.commit()
    np.testing.assert_array_equal(store.dataset().resid_mean.values, whole.prompts["resid_mean"])
    np.testing.assert_array_equal(store.tokens().resid.values, whole.tokens["resid"])
    assert store.dataset().text.values.tolist() == texts
    assert store.dataset().label.values.tolist() == [i % 3 == 0 for i in range(23)]
    rng = np.random.default_rng(0)
    rows = rng.integers(0, bounds[-1], 40)
    np.testing.assert_array_equal(store.tokens().resid.isel(token=rows).values, whole.tokens["resid"][:, rows])


def test_raw_chunks_read_the_same(store: Store) -> None:
    batch = make_batch(TEXTS)
    store.write(GROUP, batch, compressed=False)
    np.testing.assert_array_equal(store.tokens().resid.values, batch.tokens["resid"])


def test_bfloat16_is_kept_exactly_and_recorded(store: Store) -> None:
    batch = make_batch(["a"])
    values = (batch.prompts["resid_mean"].view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    store.write(
        GROUP, TokenBatch(sha256=batch.sha256, layers=batch.layers, prompts={"resid_mean": values}, stored_dtype={"resid_mean": "bfloat16"})
    )
    data = store.dataset().resid_mean
    np.testing.assert_array_equal(data.values, values)
    assert data.dtype == np.float32
    assert data.attrs["stored_dtype"] == "bfloat16"


@pytest.mark.few(2)
def test_dask_chunks_give_the_same_numbers(store: Store) -> None:
    batch = make_batch(TEXTS)
    store.write(GROUP, batch)
    data = store.tokens(chunks={})
    assert data.resid.chunks is not None
    assert data.resid.data.numblocks[0] == 3
    np.testing.assert_array_equal(data.resid.compute(scheduler="threads").values, batch.tokens["resid"])


def test_a_store_and_its_lazy_data_survive_pickling(tmp_path: Path) -> None:
    store = lz.open_store(tmp_path / "s")
    batch = make_batch(TEXTS)
    store.write(GROUP, batch)
    again = pickle.loads(pickle.dumps(store))  # noqa: S301 — our own bytes
    assert again.url == store.url
    lazy = pickle.loads(pickle.dumps(store.tokens().resid.isel(layer=1)))  # noqa: S301 — our own bytes
    np.testing.assert_array_equal(lazy.values, batch.tokens["resid"][1])


def test_texts_may_be_left_out_and_prompts_still_be_found(store: Store) -> None:
    batch = make_batch(["secret", "other"])
    store.write(GROUP, TokenBatch(sha256=batch.sha256, layers=batch.layers, prompts=batch.prompts))
    data = store.dataset(prompts=["secret"])
    assert "text" not in data.coords
    np.testing.assert_array_equal(data.resid_mean.values, batch.prompts["resid_mean"][:, :1])


@pytest.mark.few(3)
def test_texts_that_utf8_cannot_encode_are_refused_and_have_different_hashes(store: Store) -> None:
    batch = make_batch(["?", "\ud800", "\ud801"])
    with pytest.raises(InvalidArgumentError, match=r"prompts\[1\] '\\ud800' holds a lone surrogate"):
        store.write(GROUP, batch)
    assert len(store.view(GROUP)) == 0
    # Versions that stored the text of such a prompt as "?" kept its hash, by which it is found.
    store.write(GROUP, replace(batch, text=["?"] * 3))
    np.testing.assert_array_equal(store.dataset(prompts=["\ud801"]).resid_mean.values, batch.prompts["resid_mean"][:, 2:])


# --------------------------------------------------------------------------------------------------------------- columns


@pytest.mark.few(2)
def test_annotations_add_and_replace_columns(store: Store) -> None:
    store.write(GROUP, make_batch(["a", "b", "c"], columns={"label": [1, 2, 3], "split": ["x", "y", "z"]}))
    store.annotate("acme/toy", {"label": {"b": 20}, "weight": {prompt_hash("a"): 0.5, "c": 1.5}})
    store.annotate("acme/toy", {"seen": {"a": True, "b": False, "c": True}})
    data = store.dataset()
    assert data.label.values.tolist() == [1, 20, 3]
    assert data.split.values.tolist() == ["x", "y", "z"]
    assert data.seen.values.tolist() == [True, False, True]
    np.testing.assert_array_equal(data.weight.values, [0.5, np.nan, 1.5])
    store.write(GROUP, make_batch(["b"], columns={"label": [200], "split": ["w"]}))
    assert store.dataset().label.values.tolist() == [1, 200, 3], "the last by time wins, be it a part or an annotation"
    tokens = store.tokens()
    assert dict(zip(tokens.text.values.tolist(), tokens.label.values.tolist(), strict=True)) == {"a": 1, "b": 200, "c": 3}


@pytest.mark.few(2)
def test_absent_column_values_are_marked_and_counted(store: Store) -> None:
    store.write(GROUP, make_batch(["a", "b"]))
    store.annotate(None, {"i": {"a": 5}, "s": {"a": "x"}, "t": {"a": True}, "f": {"a": 1.0}})
    data = store.dataset()
    np.testing.assert_array_equal(data.i.values, [5, np.nan])
    assert data.s.values[0] == "x"
    assert np.isnan(data.s.values[1]), "an empty text may be a value"
    np.testing.assert_array_equal(data.t.values, [1, np.nan])
    assert store.dataset(prompts=["a"]).i.dtype == np.int64
    assert store.dataset(prompts=["a"]).t.dtype == bool
    assert np.isnan(data.f.values[1])
    assert {name: data[name].attrs["missing"] for name in "istf"} == dict.fromkeys("istf", 1)


def test_annotations_of_prompts_that_are_not_stored_write_nothing(store: Store) -> None:
    store.write(GROUP, make_batch(["a"]))
    with pytest.raises(MissingPromptsError, match="'nobody'"):
        store.annotate(None, {"label": {"a": 1, "nobody": 2}})
    with pytest.raises(InvalidArgumentError, match="no values"):
        store.annotate(None, {"label": {}})
    with pytest.raises(InvalidArgumentError, match="twice"):
        store.annotate(None, {"label": {"a": 1, prompt_hash("a"): 2}})
    with pytest.raises(InvalidArgumentError, match="cannot be stored"):
        store.annotate(None, {"label": {"a": object()}})
    assert "label" not in store.dataset().coords
    assert store.storage.list(f"{GROUP.name}/annotations") == []


# ----------------------------------------------------------------------------------------------------- opening and groups


def test_opening_a_store_writes_nothing(tmp_path: Path) -> None:
    store = lz.open_store(tmp_path / "new")
    assert store.models() == []
    assert "empty" in repr(store)
    assert list(tmp_path.iterdir()) == []


def test_the_default_root_is_a_dot_folder_in_lmprobes_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LMPROBE_CACHE_DIR", str(tmp_path))
    lz.config.reload()
    assert lz.open_store().url == str(tmp_path / ".zarr")


def test_a_file_a_foreign_zarr_a_full_folder_and_nothing_are_each_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotAStoreError, match="is a file"):
        lz.open_store(tmp_path / "file")
    xr.Dataset({"x": ("a", np.zeros(3))}).to_zarr(tmp_path / "zarr", zarr_format=3, consolidated=False)
    with pytest.raises(NotAStoreError, match=r"another zarr\.json"):
        lz.open_store(tmp_path / "zarr")
    xr.Dataset({"x": ("a", np.zeros(3))}).to_zarr(tmp_path / "zarr2", zarr_format=2, consolidated=False)
    with pytest.raises(NotAStoreError, match="holds other things"):
        lz.open_store(tmp_path / "zarr2")
    with pytest.raises(StoreNotFoundError, match="mode='a'"):
        lz.open_store(tmp_path / "nothing", mode="r")
    with pytest.raises(InvalidArgumentError, match="mode='w'"):
        lz.open_store(tmp_path / "nothing", mode="w")  # type: ignore[arg-type]
    assert not (tmp_path / "nothing").exists()


def test_a_newer_store_is_refused(store: Store) -> None:
    store.write(GROUP, make_batch(["a"]))
    document = json.loads(store.storage.read("zarr.json"))
    document["attributes"]["format_version"] = 99
    store.storage.commit("zarr.json", json.dumps(document).encode(), durable=False)
    with pytest.raises(UnsupportedVersionError, match="99"):
        lz.open_store(store.url)


def test_a_read_only_store_is_never_written_to(store: Store) -> None:
    store.write(GROUP, make_batch(["a"]))
    reading = lz.open_store(store.url, mode="r")
    for write in (
        lambda: reading.write(GROUP, make_batch(["b"])),
        lambda: reading.new_part(GROUP),
        lambda: reading.annotate(None, {"label": {"a": 1}}),
        lambda: lz.write_activations(reading, model="m", prompts=["a"], pooled={"resid_mean": {0: np.zeros((1, 2))}}),
    ):
        with pytest.raises(ReadOnlyError, match="mode='r'"):
            write()
    assert reading.dataset().sizes["prompt"] == 1


@pytest.mark.few(2)
def test_several_groups_of_a_model_need_a_choice(store: Store) -> None:
    other = GroupInfo(model="acme/toy", provenance={"revision": "xyz"}, num_layers=4, hidden_size=8)
    store.write(GROUP, make_batch(["a"]))
    store.write(other, make_batch(["b"]))
    with pytest.raises(AmbiguousProvenanceError, match=r"revision: 'abc' or 'xyz'") as error:
        store.dataset("acme/toy")
    assert GROUP.name in str(error.value)
    assert store.dataset("acme/toy", provenance={"revision": "xyz"}).text.values.tolist() == ["b"]
    assert store.dataset(group=GROUP.name).text.values.tolist() == ["a"]
    with pytest.raises(ModelNotStoredError, match="not with provenance"):
        store.dataset("acme/toy", provenance={"revision": "nope"})
    with pytest.raises(ModelNotStoredError, match="acme/toy"):
        store.dataset("other/model")
    store.write(GroupInfo(model="b"), make_batch(["a"]))
    with pytest.raises(AmbiguousProvenanceError, match="acme/toy, b"):
        store.dataset()


@pytest.mark.few(2)
def test_layers_and_prompts_that_are_not_there_are_named(store: Store) -> None:
    store.write(GROUP, make_batch(TEXTS))
    with pytest.raises(LayerOutOfRangeError, match=r"layer 2 is not stored .* holds layers 0-1, 3"):
        store.dataset(layers=2)
    with pytest.raises(LayerOutOfRangeError, match="layer 9 is out of range"):
        store.dataset(layers=[9])
    assert store.dataset(layers=-1).layer.values.tolist() == [3]
    assert store.dataset(layers=slice(1, None)).layer.values.tolist() == [1, 3]
    with pytest.raises(LayerOutOfRangeError, match="layer 2 is not stored"):
        store.dataset(layers=slice(2, 3))
    with pytest.raises(MissingPromptsError, match=r"2 of 3 prompts .*number 1 \('unknown text'\)"):
        store.dataset(prompts=["one", "unknown text", "0123456789abcdef"])
    with pytest.raises(InvalidArgumentError, match="one text"):
        store.dataset(prompts="one")


# ------------------------------------------------------------------------------------------------------------- collisions


def test_two_prompts_with_one_hash_are_an_error_never_each_others_data(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    real = prompt_sha256("a")
    store.write(GROUP, make_batch(["a"]))

    def colliding(prompt: object) -> str:
        return real[:16] + "1" * 48 if prompt == "b" else prompt_sha256(str(prompt))

    monkeypatch.setattr("lmprobe_zarr.store.parts.view.prompt_sha256", colliding)
    with pytest.raises(PromptCollisionError, match=real[:16]):
        store.dataset(prompts=["b"])
    batch = make_batch(["b"])
    object.__setattr__(batch, "sha256", [colliding("b")])
    with pytest.raises(PromptCollisionError, match=real[:16]):
        store.write(GROUP, batch)
    assert len(part_names(store)) == 1


def test_the_hash_of_ids_is_never_that_of_a_text() -> None:
    assert prompt_sha256([1, 2]) == hashlib.sha256(b"\0ids\0" + bytes([1, *[0] * 7, 2, *[0] * 7])).hexdigest()
    assert prompt_hash([1, 2]) == prompt_hash(np.array([1, 2], np.int32)) != prompt_hash("[1, 2]")
    assert prompt_hash("Who wants to go for a walk?") == "cdb0653ff12f87fd", "as lmprobe 0.10.3 names its files"


# ----------------------------------------------------------------------------------------------------------------- commit


@pytest.mark.few(2)
def test_nothing_of_a_part_shows_before_its_commit(store: Store) -> None:
    store.write(GROUP, make_batch(["a"]))
    writer = store.new_part(GROUP)
    writer.append(make_batch(["b"]))
    assert store.dataset().text.values.tolist() == ["a"]
    writer.commit()
    assert store.dataset().text.values.tolist() == ["a", "b"]


def test_an_aborted_part_leaves_nothing(store: Store) -> None:
    store.write(GROUP, make_batch(["a"]))
    writer = store.new_part(GROUP)
    writer.append(make_batch(["b"]))
    writer.abort()
    assert len(part_names(store)) == 1


def test_a_context_that_ends_without_a_commit_leaves_nothing(store: Store) -> None:
    store.write(GROUP, make_batch(["a"]))
    with pytest.raises(KeyError, match="stopped"), store.new_part(GROUP) as writer:
        writer.append(make_batch(["b"]))
        raise KeyError("stopped")
    with store.new_part(GROUP) as writer:
        writer.append(make_batch(["c"]))
    assert len(part_names(store)) == 1


@pytest.mark.few(2)
def test_a_context_leaves_what_it_has_committed(store: Store) -> None:
    with pytest.raises(KeyError, match="after the commit"), store.new_part(GROUP) as writer:
        writer.append(make_batch(["a"]))
        writer.commit()
        raise KeyError("after the commit")
    assert store.dataset().text.values.tolist() == ["a"]


def test_cleaning_up_after_an_error_never_hides_the_error(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(key: str) -> None:
        raise PermissionError(key)

    with pytest.raises(KeyError, match="first"), store.new_part(GROUP) as writer:
        writer.append(make_batch(["a"]))
        monkeypatch.setattr(writer.storage, "remove_tree", fail)
        raise KeyError("first")


def test_batches_that_do_not_fit_the_first_are_refused(store: Store) -> None:
    writer = store.new_part(GROUP)
    writer.append(make_batch(["a"]))
    others: list[dict[str, Any]] = [{"layers": (0, 1)}, {"hidden": 4}, {"dtype": "float16"}, {"tokens": False}]
    for other in [make_batch(["b"], **options) for options in others]:
        with pytest.raises(InvalidArgumentError, match="same variables"):
            writer.append(other)
    with pytest.raises(InvalidArgumentError, match="already given"):
        writer.append(make_batch(["a"]))
    with pytest.raises(InvalidArgumentError, match="without prompts"):
        store.new_part(GROUP).commit()


def test_a_part_whose_writing_failed_is_never_committed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CHUNK_BYTES", "REMOTE_CHUNK_BYTES", "MIN_CHUNK_BYTES"):
        monkeypatch.setattr(f"lmprobe_zarr.store.parts.writer.{name}", 32)
    writer = store.new_part(GROUP)
    real = store.storage.write
    monkeypatch.setattr(store.storage, "write", lambda *_, **__: (_ for _ in ()).throw(NoSpaceError("full")))
    with pytest.raises(NoSpaceError):
        writer.append(make_batch(["a", "b"]))
    monkeypatch.setattr(store.storage, "write", real)
    with pytest.raises(InvalidArgumentError, match="failed half-way"):
        writer.commit()


@pytest.mark.few(2)
def test_aborting_after_the_commit_deletes_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when Ctrl-C comes after the file has its name, and before the call returns."""
    real = store.storage.commit

    def interrupted(key: str, data: bytes, **options: bool) -> None:
        real(key, data, **options)
        if key.count("/") == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(store.storage, "commit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.write(GROUP, make_batch(["a"]))
    assert np.isfinite(lz.open_store(store.url).dataset().resid_mean.values).all()
    assert lz.open_store(store.url).dataset().sizes["prompt"] == 1


@pytest.mark.few(2)
def test_an_annotation_of_another_prompt_with_the_same_hash_is_an_error(store: Store) -> None:
    store.write(GROUP, make_batch(["a"]))
    forged = TokenBatch(sha256=[prompt_sha256("a")[:16] + "1" * 48], prompt_columns={"label": np.array([7])})
    writer = store.new_part(GROUP, kind="annotation")
    writer.append(forged)
    writer.commit()
    with pytest.raises(PromptCollisionError, match="annotation"):
        store.dataset()


@pytest.mark.few(2)
def test_long_texts_are_cut_into_chunks_by_size(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmprobe_zarr.store.parts.columns.TEXT_BYTES", 5000)
    texts = ["x" * (n * 100) for n in range(1, 30)]
    store.write(GROUP, make_batch(texts, tokens=False))
    assert store.dataset().text.values.tolist() == texts
    with pytest.raises(InvalidArgumentError, match="text of"):
        store.write(GROUP, make_batch(["y" * 6000], tokens=False))


def test_columns_of_one_part_keep_their_kind(store: Store) -> None:
    writer = store.new_part(GROUP)
    writer.append(make_batch(["a"], columns={"label": [1]}))
    with pytest.raises(InvalidArgumentError, match="same variables"):
        writer.append(make_batch(["b"], columns={"label": ["one"]}))


@pytest.mark.few(2)
def test_a_part_that_replaces_others_takes_their_place(store: Store) -> None:
    first = store.write(GROUP, make_batch(["a", "b"], seed=1))
    second = store.write(GROUP, make_batch(["c"], seed=2))
    merged = make_batch(["a", "b", "c"], seed=9)
    writer = PartWriter(store.storage, GROUP, f"{second}-merged", replaces=(first, second))
    writer.append(merged)
    writer.commit()
    assert len(store.view(GROUP).parts) == 1
    np.testing.assert_array_equal(store.dataset().resid_mean.values, merged.prompts["resid_mean"])


@pytest.mark.few(1)
def test_threads_write_and_read_one_root_at_the_same_time(store: Store) -> None:
    errors: list[BaseException] = []

    def work(k: int) -> None:
        try:
            for i in range(4):
                store.write(GROUP, make_batch([f"{k}-{i}", f"shared-{i}"], seed=10 * k + i))
                for row in store.dataset().resid_mean.values[0]:
                    assert np.isfinite(row).all()
        except BaseException as error:  # noqa: BLE001 — handed to the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]
    assert set(lz.open_store(store.url).dataset().text.values) == {f"{k}-{i}" for k in (*range(4), "shared") for i in range(4)}


def test_processes_write_one_root_at_the_same_time(tmp_path: Path) -> None:
    with get_context("forkserver").Pool(3) as pool:
        pool.starmap(write_shared, [(tmp_path / "s", str(k), 5) for k in range(3)], chunksize=1)
    data = lz.open_store(tmp_path / "s", mode="r").dataset()
    assert sorted(data.text.values) == sorted({f"{k}-{i}" for k in (*range(3), "shared") for i in range(5)})
    assert np.isfinite(data.resid_mean.values).all()


@pytest.mark.few(2)
def test_parts_that_disagree_on_a_shape_are_an_error(store: Store) -> None:
    store.write(GROUP, make_batch(["a"], hidden=8))
    store.write(GROUP, make_batch(["b"], hidden=4))
    with pytest.raises(CorruptPartError, match="disagree"):
        store.dataset()


@pytest.mark.few(2)
def test_each_part_document_is_read_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(3):
        store.write(GROUP, make_batch([str(i)]))
    reading = lz.open_store(store.url, mode="r")
    parsed: list[str] = []

    def counting(data: bytes, where: str) -> object:
        parsed.append(where)
        return parse_part(data, where)

    monkeypatch.setattr("lmprobe_zarr.store.parts.catalog.parse_part", counting)
    reading.dataset()
    reading.tokens()
    assert len(parsed) == 3


@pytest.mark.few(2)
def test_a_store_prints_its_models_layers_and_variables(store: Store) -> None:
    store.write(GROUP, make_batch(TEXTS))
    text = repr(store)
    assert "acme/toy: 5 prompts" in text
    assert "layers 0-1, 3" in text
    assert "resid (tokens)" in text


@pytest.mark.few(2)
def test_a_prompt_known_by_its_hash_alone_is_the_prompt_of_that_text(store: Store) -> None:
    hash_only = make_batch(["a", "b"], seed=1)
    unknown = replace(hash_only, sha256=[prompt_sha256(t)[:16] + "0" * 48 for t in ("a", "b")], text=None)
    store.write(GROUP, unknown)
    assert store.dataset(prompts=["b"]).sizes["prompt"] == 1, "found by its text"
    store.write(GROUP, make_batch(["a", "c"], seed=2, layers=(2,)))
    ds = store.dataset(prompts=["a", lz.prompt_hash("b"), "c"])
    assert ds.prompt_sha256.values[0] == prompt_sha256("a"), "the whole digest, once it is known"
    assert np.isfinite(ds.resid_mean.sel(layer=2).values[[0, 2]]).all()
    assert np.isfinite(ds.resid_mean.sel(layer=0).values[:2]).all()
    assert store.delete("acme/toy", ["a"]) == 2
    assert lz.open_store(store.url).dataset().sizes["prompt"] == 2 if store.storage.is_local else True
