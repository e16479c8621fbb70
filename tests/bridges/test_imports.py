"""Imports, exports and round trips: bit for bit, resumable, and never at the cost of what was there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import pytest
from foreign_caches import (
    MODEL,
    add_model,
    add_prompt,
    of_bits,
    prompt_tensors,
    raw_file,
    read_safetensors,
    safetensors_bytes,
    sha16,
    state_of,
    to_bits,
)
from paths import DATA
from stores import GROUP, make_batch
from warmed import Warmed

import lmprobe_zarr as lz
from lmprobe_zarr import config
from lmprobe_zarr.batch.hashes import prompt_sha256
from lmprobe_zarr.batch.token_batch import TokenBatch
from lmprobe_zarr.bridges.exports import export_safetensors
from lmprobe_zarr.bridges.imports import import_safetensors
from lmprobe_zarr.bridges.lmprobe_v2 import LmprobeV2
from lmprobe_zarr.errors import (
    CorruptFileError,
    InvalidArgumentError,
    InvalidTypeError,
    LayerOutOfRangeError,
    MissingPromptsError,
    ModelNotStoredError,
    ReadOnlyError,
)
from lmprobe_zarr.store.format.group import GroupInfo
from lmprobe_zarr.store.store import Store

Array = npt.NDArray[Any]
DTYPES = ("float32", "float16", "bfloat16")


def quiet_import(cache: Path | str, store: Any, **options: Any) -> Any:
    return import_safetensors(cache, store, progress=False, **options)


def quiet_export(store: Any, cache: Path | str, **options: Any) -> Any:
    return export_safetensors(store, cache, progress=False, **options)


def cast(values: Array, dtype: str) -> Array:
    """float32 values in another dtype, bfloat16 as its bits."""
    return to_bits(values) if dtype == "bfloat16" else values.astype(dtype)


def every_kind(seed: int, dtype: str, *, positions: str, pad: tuple[int, int]) -> dict[str, dict[str, Array]]:
    """The three files of one prompt with every kind of tensor that lmprobe writes."""
    rng, n = np.random.default_rng(seed), 3 + seed % 4
    seq = pad[0] + n + pad[1]

    def normal(*shape: int) -> Array:
        return cast(rng.standard_normal(shape).astype("float32"), dtype)

    main = prompt_tensors(seed, n=n, pad=pad, layers=(0, 2, 11), hidden=5, dtype=dtype)
    for pooling, layers in (("last_token", (0, 2, 11)), ("mean", (2,)), ("max", (2,)), ("min", (0, 11))):
        main |= {f"pooled_{pooling}_layer_{i}": normal(1, 5) for i in layers}
    main |= {f"router_layer_{i}": normal(n, 4) for i in (2, 11)}
    ppl = {
        "perplexity": rng.standard_normal(3).astype("float32"),
        "token_perplexity": rng.standard_normal(n - 1).astype("float32"),
        "token_ids": rng.integers(0, 2**40, n),
    }
    rows = 1 if positions == "last" else seq
    if seed % 2:
        logits = {"logits": normal(1, rows, 9)}
    else:
        k = 2 + seed % 3
        logits = {"logits_top_k_values": normal(1, rows, k), "logits_top_k_indices": rng.integers(0, 9, (1, rows, k)).astype("int32")}
    return {"": main, ".perplexity": ppl, ".logits": logits}


def without_padding(files: dict[str, dict[str, Array]]) -> dict[str, dict[str, Array]]:
    """The same files with the rows that the mask takes away left out, as an export has them."""
    kept = files[""]["attention_mask"][0] == 1
    stripped: dict[str, dict[str, Array]] = {}
    for suffix, tensors in files.items():
        stripped[suffix] = {}
        for name, values in tensors.items():
            padded = values.ndim >= 2 and values.shape[1] == len(kept) and not name.startswith(("pooled", "router"))
            stripped[suffix][name] = values[:, kept] if padded else values
    return stripped


def written(cache: Path, text: str, model: str = MODEL) -> dict[str, dict[str, Array]]:
    folder = cache / sha16(model)
    paths = {s: folder / f"{sha16(text)}{s}.safetensors" for s in ("", ".perplexity", ".logits")}
    return {suffix: read_safetensors(path.read_bytes()) for suffix, path in paths.items() if path.exists()}


def assert_same_tensors(found: dict[str, dict[str, Array]], expected: dict[str, dict[str, Array]]) -> None:
    assert {s: set(t) for s, t in found.items()} == {s: set(t) for s, t in expected.items()}
    for suffix, tensors in expected.items():
        for name, values in tensors.items():
            assert found[suffix][name].dtype == values.dtype, name
            assert found[suffix][name].shape == values.shape, name
            assert found[suffix][name].tobytes() == np.ascontiguousarray(values).tobytes(), name


def assert_same_stores(first: Store, other: Store, prompts: list[str], **group: Any) -> None:
    """Every variable of both levels, bit for bit, with its dtype, coordinates and what it was stored as."""
    for level in ("prompts", "tokens"):
        a, b = (s.dataset(prompts=prompts, **group) if level == "prompts" else s.tokens(prompts=prompts, **group) for s in (first, other))
        assert set(a.variables) == set(b.variables)
        assert a.sizes == b.sizes
        for name in a.variables:
            assert a[name].attrs.get("stored_dtype") == b[name].attrs.get("stored_dtype"), name
            assert a[name].dtype == b[name].dtype, name
            x, y = a[name].values, b[name].values
            assert (x.tolist() == y.tolist()) if x.dtype == object else (x.tobytes() == y.tobytes()), name


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return lz.open_store(tmp_path / "store")


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A copy of what lmprobe 0.10.3 wrote."""
    shutil.copytree(DATA / "lmprobe-0.10.3", tmp_path / "toy")
    return tmp_path / "toy"


# -------------------------------------------------------------------------------------------------------------- importing


def test_a_cache_of_lmprobe_is_imported_and_not_changed(toy: Path, store: Store) -> None:
    truth, known = np.load(DATA / "lmprobe-0.10.3-truth.npz"), json.loads((DATA / "lmprobe-0.10.3-truth.json").read_text())
    before = state_of(toy)
    summary = quiet_import(toy, store, strict=True)
    assert (summary.found, summary.imported, summary.stored, summary.tokens) == (4, 4, 0, int(truth["mask"].sum()))
    assert summary.models == ("acme/toy-4l",)
    assert summary.skipped == summary.notes == ()
    ds, toks = store.dataset("acme/toy-4l", prompts=known["prompts"]), store.tokens("acme/toy-4l")
    assert ds.text.values.tolist() == known["prompts"]
    assert ds.n_tokens.values.tolist() == ds.prompt_length.values.tolist() == truth["mask"].sum(1).tolist()
    for i, text in enumerate(known["prompts"]):
        np.testing.assert_array_equal(toks.resid.sel(prompt=lz.prompt_hash(text)), truth["acts"][i][:, truth["mask"][i] == 1])
    np.testing.assert_array_equal(ds.perplexity[3], [4.5, 2.5, 3.5])
    assert np.isnan(ds.perplexity[1]).all()
    assert store.find_group().provenance == {}
    assert store.find_group().hidden_size == 8
    assert state_of(toy) == before, "not a byte and not a time has changed"


def test_a_second_import_reads_nothing_again(toy: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet_import(toy, store)
    parts = state_of(Path(store.url))
    monkeypatch.setattr(LmprobeV2, "read", lambda *_: pytest.fail("read again"))
    again = quiet_import(toy, store)
    assert (again.found, again.stored, again.imported, again.parts) == (4, 4, 0, 0)
    assert state_of(Path(store.url)) == parts
    assert "4 found, 4 stored already, 0 imported" in str(again)


def test_a_dry_run_prints_the_plan_and_writes_nothing(toy: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LmprobeV2, "read", lambda *_: pytest.fail("read"))
    plan = quiet_import(toy, store, dry_run=True)
    assert plan.dry_run
    assert "4 found, 0 stored already, 4 to import" in str(plan)
    assert plan.nbytes == 28 * 4 * 8 * 4 + 2 * 4 * 8 * 4 + 2 * 3 * 4
    assert not Path(store.url).exists()


def test_an_interrupted_import_is_completed_by_the_next_run(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = add_model(tmp_path / "cache")
    for i in range(9):
        add_prompt(folder, f"p{i}", prompt_tensors(i, n=2 + i % 3))
    read, calls = LmprobeV2.read, []

    def stop_at_the_third(self: LmprobeV2, entries: Any, holds: Any) -> TokenBatch:
        calls.append(entries)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return read(self, entries, holds)

    monkeypatch.setattr("lmprobe_zarr.bridges.import_plan.BATCH_PROMPTS", 2)
    monkeypatch.setattr(LmprobeV2, "read", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        quiet_import(tmp_path / "cache", store)
    assert len(store.dataset().prompt) == 4
    summary = quiet_import(tmp_path / "cache", store)
    assert (summary.stored, summary.imported) == (4, 5)
    for i in range(9):
        np.testing.assert_array_equal(
            store.tokens().resid.sel(prompt=lz.prompt_hash(f"p{i}"), layer=1), prompt_tensors(i, n=2 + i % 3)["layer_1"][0, 2:]
        )


def test_a_second_import_brings_what_lmprobe_added_meanwhile(tmp_path: Path, store: Store) -> None:
    folder = add_model(tmp_path / "cache")
    add_prompt(folder, "a", prompt_tensors(0))
    quiet_import(tmp_path / "cache", store)
    add_prompt(folder, "a", prompt_tensors(0, layers=(0, 1, 2)), perplexity={"perplexity": np.ones(3, "float32")})
    add_prompt(folder, "b", prompt_tensors(1))
    summary = quiet_import(tmp_path / "cache", store)
    assert (summary.stored, summary.imported) == (0, 2)
    assert store.coverage().sel(variable="resid", prompt=lz.prompt_hash("a")).values.all()
    assert store.dataset(prompts=["a"]).perplexity.values.tolist() == [[1, 1, 1]]
    assert quiet_import(tmp_path / "cache", store).stored == 2


def test_prompts_are_chosen_and_named_by_the_caller(tmp_path: Path, store: Store) -> None:
    folder = add_model(tmp_path / "cache")
    for i in range(4):
        add_prompt(folder, f"p{i}", prompt_tensors(i), listed=False)
    summary = quiet_import(tmp_path / "cache", store, prompts=["p2", "absent", sha16("p3"), "p2"])
    assert (summary.found, summary.imported) == (2, 2)
    assert summary.skipped[0].names[0].startswith(sha16("absent"))
    assert store.dataset(prompts=["p2"]).text.values.tolist() == ["p2"]
    assert store.dataset(prompts=[sha16("p3")]).prompt_sha256.values.tolist() == [sha16("p3") + "0" * 48]
    with pytest.raises(InvalidTypeError, match="one text"):
        quiet_import(tmp_path / "cache", store, prompts="p2")
    with pytest.raises(InvalidTypeError, match="by their text"):
        quiet_import(tmp_path / "cache", store, prompts=[[1, 2]])


def test_a_prompt_whose_text_becomes_known_later_stays_the_same_prompt_and_gets_its_text(tmp_path: Path, store: Store) -> None:
    folder = add_model(tmp_path / "cache")
    for text in "ab":
        add_prompt(folder, text, prompt_tensors(0), listed=False)
    quiet_import(tmp_path / "cache", store)
    held = store.tokens(prompts=["a", "b"]).resid.values
    summary = quiet_import(tmp_path / "cache", store, prompts=["a"])
    assert (summary.stored, summary.imported) == (1, 0)
    assert "known only now" in summary.notes[0].text
    ds = store.dataset(prompts=[sha16("a"), sha16("b")])
    assert ds.text.values.tolist() == ["a", ""]
    assert ds.prompt_sha256.values.tolist() == [prompt_sha256("a"), sha16("b") + "0" * 48]
    np.testing.assert_array_equal(store.tokens(prompts=["a", "b"]).resid, held)
    assert ds.prompt_length.values.tolist() == [4, 4]
    again = quiet_import(tmp_path / "cache", store, prompts=["a"])
    assert (again.stored, again.parts, again.notes) == (1, 0, ())
    add_prompt(folder, "b", prompt_tensors(0, layers=(0, 1, 2)), listed=False)
    assert quiet_import(tmp_path / "cache", store, prompts=["b"]).imported == 1
    assert store.dataset(prompts=["a", "b"]).text.values.tolist() == ["a", "b"]
    assert quiet_import(tmp_path / "cache", store).stored == 2, "the cache still does not know the texts, but the store does"


def test_a_prompt_that_only_shares_its_hash_is_skipped_and_nothing_is_harmed(tmp_path: Path, store: Store) -> None:
    folder = add_model(tmp_path / "cache")
    add_prompt(folder, "a", prompt_tensors(0))
    add_prompt(folder, "b", prompt_tensors(1))
    other = TokenBatch(sha256=[prompt_sha256("a")[:16] + "f" * 48], layers=(0,), prompts={"resid_mean": np.ones((1, 1, 3), "float32")})
    store.write(GroupInfo(model=MODEL, hidden_size=3), other)
    summary = quiet_import(tmp_path / "cache", store)
    assert summary.imported == 1
    assert "share their hash" in summary.skipped[0].text
    assert store.dataset(prompts=[sha16("a")]).resid_mean.values.tolist() == [[[1, 1, 1]]]


def test_models_of_any_name_are_imported(tmp_path: Path, store: Store) -> None:
    names = ["org/model", "../../up", "..", ".", "a.b", "Ünï/你", "x" * 200]
    for name in names:
        add_prompt(add_model(tmp_path / "cache", name), "a", prompt_tensors(len(name)))
    lost = add_model(tmp_path / "cache", "lost/name")
    (lost / "_model_name.txt").unlink()
    add_prompt(lost, "a", prompt_tensors(0))
    summary = quiet_import(tmp_path / "cache", store)
    assert sorted(store.models()) == sorted(names)
    assert summary.skipped[0].names == (lost.name,)
    assert quiet_import(tmp_path / "cache", store, model="lost/name").imported == 1
    np.testing.assert_array_equal(store.tokens("..").resid[0], prompt_tensors(2)["layer_0"][0, 2:])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "store"]


def test_the_default_store_in_the_cache_is_not_imported_as_a_model(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMPROBE_CACHE_DIR", str(toy))
    config.reload()
    before = state_of(toy / sha16("acme/toy-4l"))
    assert quiet_import(toy, None, strict=True).imported == 4
    assert (toy / ".zarr" / "zarr.json").exists()
    assert quiet_import(toy, None, strict=True).stored == 4
    assert quiet_export(None, toy).present == 4
    assert state_of(toy / sha16("acme/toy-4l")) == before


def test_a_folder_that_is_not_a_cache_raises_an_error(tmp_path: Path, store: Store) -> None:
    (tmp_path / "photos").mkdir()
    for options in ({}, {"model": "m"}):
        with pytest.raises(ModelNotStoredError, match=r"photos"):
            quiet_import(tmp_path / "photos", store, **options)
    with pytest.raises(InvalidArgumentError, match="nowhere does not exist: check the path"):
        quiet_import(tmp_path / "nowhere", store)


def test_imports_of_different_provenance_go_into_different_groups(toy: Path, store: Store) -> None:
    quiet_import(toy, store, provenance={"revision": "abc"})
    assert store.find_group("acme/toy-4l").provenance == {"revision": "abc"}
    quiet_import(toy, store)
    assert len(store.matching("acme/toy-4l")) == 2


def test_perplexities_and_activations_of_a_model_are_in_the_same_group(tmp_path: Path, store: Store) -> None:
    first = add_model(tmp_path / "first")
    add_prompt(first, "a", None, perplexity={"perplexity": np.ones(3, "float32")})
    second = add_model(tmp_path / "second")
    add_prompt(second, "a", prompt_tensors(0))
    for order in (("first", "second"), ("second", "first")):
        target = lz.open_store(tmp_path / "-".join(order))
        for name in order:
            quiet_import(tmp_path / name, target)
        assert len(target.groups()) == 1
        assert target.dataset(prompts=["a"]).perplexity.values.tolist() == [[1, 1, 1]]


def test_prompts_with_different_layers_dtypes_and_variables_are_imported_together(tmp_path: Path, store: Store) -> None:
    folder = add_model(tmp_path / "cache")
    wide, half = prompt_tensors(0, layers=(0, 1)), prompt_tensors(1, layers=(1, 5), dtype="float16")
    mixed = prompt_tensors(2, layers=(0,)) | {"layer_1": prompt_tensors(2, layers=(1,))["layer_1"].astype("float16")}
    for name, tensors in (("wide", wide), ("half", half), ("mixed", mixed)):
        add_prompt(folder, name, tensors)
    summary = quiet_import(tmp_path / "cache", store)
    assert summary.imported == 3
    assert "fewer layers" in summary.notes[0].text
    toks = store.tokens()
    np.testing.assert_array_equal(toks.resid.sel(prompt=sha16("half"), layer=5), half["layer_5"][0, 2:])
    np.testing.assert_array_equal(toks.resid.sel(prompt=sha16("mixed"), layer=1), mixed["layer_1"][0, 2:])
    assert np.isnan(toks.resid.sel(prompt=sha16("wide"), layer=5)).all(), "what is missing is never zero"
    assert toks.resid.attrs["stored_dtype"] == "float16, float32"


def test_first_token_comes_from_the_raw_layers_or_not_at_all(tmp_path: Path, store: Store) -> None:
    folder = add_model(tmp_path / "cache")
    pooled = {f"pooled_first_token_layer_{i}": np.full((1, 3), 99, "float32") for i in (0, 1)}
    add_prompt(folder, "with", prompt_tensors(0) | pooled)
    add_prompt(folder, "without", pooled | {"pooled_mean_layer_0": np.ones((1, 3), "float32")})
    summary = quiet_import(tmp_path / "cache", store, strict=True)
    first = store.dataset().resid_first_token
    np.testing.assert_array_equal(first.sel(prompt=sha16("with")), [prompt_tensors(0)[f"layer_{i}"][0, 2] for i in (0, 1)])
    assert np.isnan(first.sel(prompt=sha16("without"))).all()
    assert [n.names for n in summary.notes if "first_token" in n.text] == [(sha16("without"),)]


# -------------------------------------------------------------------------------------------------------------- bad input

GOOD = prompt_tensors(1)
BAD: dict[str, Any] = {
    "a truncated file": safetensors_bytes(prompt_tensors(0))[:-1],
    "an empty file": b"",
    "no safetensors": b"x" * 100,
    "a header that lies": raw_file({"layer_0": {"dtype": "F32", "shape": [1, 2, 3], "data_offsets": [0, 2**40]}}, bytes(24)),
    "wrong shapes": prompt_tensors(0) | {"layer_1": np.ones((1, 9, 3), "float32")},
    "another hidden size": prompt_tensors(0, hidden=4),
    "a mask of zeros": prompt_tensors(0) | {"attention_mask": np.zeros((1, 6), np.int64)},
    "no mask": {"layer_0": np.ones((1, 6, 3), "float32")},
}


@pytest.mark.parametrize("what", BAD)
def test_bad_entries_are_skipped_with_a_reason_or_stop_a_strict_run(tmp_path: Path, store: Store, what: str) -> None:
    store.write(GROUP, make_batch(["before"]))
    held = state_of(Path(store.url))
    folder = add_model(tmp_path / "cache")
    for name in ("good", "also good"):
        add_prompt(folder, name, GOOD)
    add_prompt(folder, "bad", BAD[what])
    before = state_of(tmp_path / "cache")
    with pytest.raises(CorruptFileError, match="strict=True"):
        quiet_import(tmp_path / "cache", store, strict=True)
    assert state_of(Path(store.url)) == held, "nothing was written"
    summary = quiet_import(tmp_path / "cache", store)
    assert (summary.imported, sum(r.count for r in summary.skipped)) == (2, 1)
    assert sha16("bad") in str(summary)
    assert store.dataset(group=GROUP.name).text.values.tolist() == ["before"]
    np.testing.assert_array_equal(store.tokens(MODEL).resid.sel(prompt=sha16("good"), layer=0), GOOD["layer_0"][0, 2:])
    assert state_of(tmp_path / "cache") == before


@pytest.mark.parametrize(
    "line",
    [
        b'{"hash": "x", "prompt": "\xff\xfe"}\n',
        b"not json\n",
        b'{"prompt": 3}\n',
        b"\x00\x00\n",
        b'{"hash": "0123456789abcdef", "prompt": "a"}\n',
    ],
    ids=["not UTF-8", "no JSON", "no hash", "zeros", "another prompt's hash"],
)
def test_bad_lines_of_the_manifest_cost_only_themselves(tmp_path: Path, store: Store, line: bytes) -> None:
    folder = add_model(tmp_path / "cache")
    add_prompt(folder, "a", GOOD)
    add_prompt(folder, "b", GOOD, listed=False)
    with (folder / "_manifest.jsonl").open("ab") as file:
        file.write(line)
    summary = quiet_import(tmp_path / "cache", store)
    assert summary.imported == 2
    assert "manifest" in summary.skipped[0].text
    assert store.dataset(prompts=["a", sha16("b")]).text.values.tolist() == ["a", ""]


def test_a_manifest_that_lists_a_prompt_twice_or_without_a_file_is_no_problem(tmp_path: Path, store: Store) -> None:
    folder = add_model(tmp_path / "cache")
    for _ in range(3):
        add_prompt(folder, "a", GOOD)
    add_prompt(folder, "listed only", None)
    summary = quiet_import(tmp_path / "cache", store, strict=True)
    assert (summary.found, summary.imported) == (1, 1)


def test_a_file_that_is_damaged_only_while_it_is_read_costs_only_itself(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = add_model(tmp_path / "cache")
    for i in range(5):
        add_prompt(folder, f"p{i}", GOOD)
    read = LmprobeV2.read

    def spoil(self: LmprobeV2, entries: Any, holds: Any) -> TokenBatch:
        (folder / f"{sha16('p3')}.safetensors").write_bytes(safetensors_bytes(prompt_tensors(7, n=2)))
        return read(self, entries, holds)

    monkeypatch.setattr(LmprobeV2, "read", spoil)
    summary = quiet_import(tmp_path / "cache", store)
    assert summary.imported == 4
    assert summary.skipped[0].names == (sha16("p3"),)
    assert len(store.dataset().prompt) == 4


def test_a_store_that_may_not_be_written_is_refused_before_anything_is_read(toy: Path, tmp_path: Path) -> None:
    lz.open_store(tmp_path / "s").write(GROUP, make_batch(["a"]))
    with pytest.raises(ReadOnlyError):
        quiet_import(toy, lz.open_store(tmp_path / "s", mode="r"))
    with pytest.raises(InvalidArgumentError, match="part_bytes"):
        quiet_import(toy, tmp_path / "s", part_bytes=0)


def test_thousands_of_tiny_files_take_little_memory_and_time(tmp_path: Path) -> None:
    """100,000 under `make stress`; the time for each stays the same."""
    count = 100_000 if os.environ.get("LMPROBE_ZARR_STRESS") else 3_000
    folder = add_model(tmp_path / "cache")
    contents = [safetensors_bytes(prompt_tensors(i, n=1 + i, layers=(0, 1, 2))) for i in range(10)]
    with (folder / "_manifest.jsonl").open("w") as manifest:
        for i in range(count):
            name = sha16(f"prompt {i}")
            (folder / f"{name}.safetensors").write_bytes(contents[i % 10])
            manifest.write(json.dumps({"hash": name, "prompt": f"prompt {i}", "num_tokens": 1 + i % 10}) + "\n")
    code = f"""
import resource, time, lmprobe_zarr
from lmprobe_zarr.bridges import import_safetensors
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.monotonic()
summary = import_safetensors({str(tmp_path / "cache")!r}, {str(tmp_path / "store")!r}, progress=False)
assert summary.imported == {count}, summary
print(time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True, timeout=1800)
    seconds, kilobytes = map(float, done.stdout.split())
    assert seconds < 20 + count * 0.003
    assert kilobytes < 2**17 + count * 4, "a few kilobytes for each prompt"
    assert len(lz.open_store(tmp_path / "store").dataset().prompt) == count


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process's own memory is read from Linux")
def test_prompts_larger_than_memory_allows_are_read_in_pieces(tmp_path: Path) -> None:
    """Three prompts of 1.2 GB each, as holes in files; the whole process stays below 1 GiB."""
    folder = add_model(tmp_path / "cache")
    layers, n, hidden = 24, 3000, 4096
    header: dict[str, Any] = {"attention_mask": {"dtype": "I64", "shape": [1, n], "data_offsets": [0, 8 * n]}}
    place = 8 * n
    for i in range(layers):
        header[f"layer_{i}"] = {"dtype": "F32", "shape": [1, n, hidden], "data_offsets": [place, place + 4 * n * hidden]}
        place += 4 * n * hidden
    for i in range(3):
        path = add_prompt(folder, str(i), raw_file(header, np.ones(n, np.int64).tobytes()))
        os.truncate(path, path.stat().st_size - 8 * n + place)
    code = f"""
import lmprobe_zarr
from pathlib import Path
from lmprobe_zarr.bridges import import_safetensors
summary = import_safetensors({str(tmp_path / "cache")!r}, {str(tmp_path / "store")!r}, progress=False)
assert summary.imported == 3 and not summary.skipped, summary
assert summary.nbytes == {3 * layers * n * hidden * 4}
# Not ru_maxrss, which a new process takes over from the one that started it.
print(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True, timeout=600)
    assert int(done.stdout) < 2**20, f"{int(done.stdout) // 1024} MiB"
    coverage = lz.open_store(tmp_path / "store").coverage()
    assert coverage.sizes == {"variable": 1, "prompt": 3, "layer": layers}
    assert coverage.values.all()


def test_neither_torch_nor_safetensors_is_needed(toy: Path, tmp_path: Path) -> None:
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('torch', 'safetensors', 'transformers', 's3fs'): raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Refuse())
from lmprobe_zarr.bridges import export_safetensors, import_safetensors, open_legacy
a, b = {str(tmp_path / "a")!r}, {str(tmp_path / "b")!r}
assert import_safetensors({str(toy)!r}, a, progress=False).imported == 4
assert export_safetensors(a, b, dtype='bfloat16', progress=False).exported == 4
assert open_legacy(b, 'acme/toy-4l', level='tokens').resid.attrs['stored_dtype'] == 'bfloat16'
print('fine')
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "fine"


# -------------------------------------------------------------------------------------------------------------- exporting


@pytest.fixture
def filled(tmp_path: Path) -> Store:
    """A store with prompts and tokens of four layers."""
    store = lz.open_store(tmp_path / "filled")
    store.write(GROUP, make_batch(["one", "two", "three", "fourth one"], layers=(0, 1, 3)))
    return store


def test_an_export_is_laid_out_as_lmprobe_lays_it_out(filled: Store, tmp_path: Path) -> None:
    summary = quiet_export(filled, tmp_path / "out")
    assert (summary.prompts, summary.exported, summary.files, summary.present) == (4, 4, 4, 0)
    folder = tmp_path / "out" / sha16("acme/toy")
    assert [p.name for p in (tmp_path / "out").iterdir()] == [folder.name]
    assert (folder / "_model_name.txt").read_text() == "acme/toy"
    lines = [json.loads(line) for line in (folder / "_manifest.jsonl").read_text().splitlines()]
    counts = filled.dataset().n_tokens.values.tolist()
    assert [(e["hash"], e["prompt"], e["num_tokens"]) for e in lines] == [
        (sha16(t), t, n) for t, n in zip(["one", "two", "three", "fourth one"], counts, strict=True)
    ]
    assert {p.name for p in folder.iterdir()} == {f"{e['hash']}.safetensors" for e in lines} | {"_model_name.txt", "_manifest.jsonl"}
    found = written(tmp_path / "out", "two", "acme/toy")[""]
    assert set(found) == {"attention_mask", "token_ids"} | {f"{k}_{i}" for k in ("layer", "pooled_mean_layer") for i in (0, 1, 3)}
    np.testing.assert_array_equal(found["layer_3"][0], filled.tokens().resid.sel(prompt=sha16("two"), layer=3))
    np.testing.assert_array_equal(found["pooled_mean_layer_1"][0], filled.dataset().resid_mean.sel(prompt=sha16("two"), layer=1))
    assert found["attention_mask"].tolist() == [[1] * counts[1]]


def test_prompts_and_layers_are_chosen(filled: Store, tmp_path: Path) -> None:
    summary = quiet_export(filled, tmp_path / "out", prompts=["three", sha16("one"), "three"], layers=[1, 3])
    assert (summary.prompts, summary.exported) == (2, 2)
    assert set(written(tmp_path / "out", "three", "acme/toy")[""]) == {"attention_mask", "token_ids"} | {
        f"{k}_{i}" for k in ("layer", "pooled_mean_layer") for i in (1, 3)
    }
    with pytest.raises(MissingPromptsError):
        quiet_export(filled, tmp_path / "none", prompts=["absent"])
    with pytest.raises(LayerOutOfRangeError, match="layer 2"):
        quiet_export(filled, tmp_path / "none", layers=[1, 2])
    with pytest.raises(ModelNotStoredError):
        quiet_export(filled, tmp_path / "none", model="another")
    with pytest.raises(InvalidArgumentError, match="float8"):
        quiet_export(filled, tmp_path / "none", dtype="float8")
    assert not (tmp_path / "none").exists(), "nothing is written before all of that is known"


@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
def test_export_converts_activations_to_the_given_dtype(filled: Store, tmp_path: Path, dtype: str) -> None:
    quiet_export(filled, tmp_path / "out", dtype=dtype)
    found = written(tmp_path / "out", "two", "acme/toy")[""]["layer_3"][0]
    exact = filled.tokens().resid.sel(prompt=sha16("two"), layer=3).values
    if dtype == "bfloat16":
        assert found.dtype == np.uint16
        np.testing.assert_allclose(of_bits(found), exact, rtol=2**-8)
    else:
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, exact.astype(dtype))


def test_values_that_a_dtype_cannot_hold_are_never_written_as_infinity(tmp_path: Path, store: Store) -> None:
    big = np.ones((1, 2, 3), "float32")
    big[0, 1] = 70000
    store.write(GROUP, TokenBatch(sha256=[prompt_sha256(t) for t in "ab"], text=["a", "b"], layers=(0,), prompts={"resid_mean": big}))
    summary = quiet_export(store, tmp_path / "out", dtype="float16")
    assert summary.exported == 1
    assert "beyond the range" in summary.skipped[0].text
    assert not written(tmp_path / "out", "b", "acme/toy")
    assert quiet_export(store, tmp_path / "out", dtype="bfloat16").exported == 1


def test_export_changes_and_deletes_nothing_without_overwrite(filled: Store, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    folder = add_model(cache, "acme/toy")
    (folder / "_model_name.txt").write_text("acme/toy\n")
    add_prompt(folder, "two", prompt_tensors(0))
    add_prompt(folder, "of lmprobe", prompt_tensors(1))
    with (folder / "_manifest.jsonl").open("a") as manifest:
        manifest.write('{"torn')
    other = add_model(cache, "another")
    add_prompt(other, "x", prompt_tensors(2))
    (folder / sha16("three")).mkdir()
    (folder / sha16("three") / "layer_0.pt").write_text("format v1")
    before, manifest_before = state_of(cache), (folder / "_manifest.jsonl").read_bytes()
    summary = quiet_export(filled, cache)
    assert (summary.exported, summary.present, summary.files) == (3, 1, 3)
    after = state_of(cache)
    changed = {name for name in before if after[name][0] != before[name][0]}
    assert changed == {f"{folder.name}/_manifest.jsonl"}
    grown = (folder / "_manifest.jsonl").read_bytes()
    assert grown.startswith(manifest_before + b"\n")
    assert [json.loads(line)["prompt"] for line in grown[len(manifest_before) + 1 :].splitlines()] == ["one", "three", "fourth one"]
    assert quiet_export(filled, cache).files == 0
    assert (folder / "_manifest.jsonl").read_bytes() == grown, "each prompt is listed once"
    again = quiet_export(filled, cache, prompts=["two"], overwrite=True)
    assert again.files == 1
    assert "pooled_mean_layer_0" in written(cache, "two", "acme/toy")[""]
    assert state_of(cache)[f"{folder.name}/{sha16('of lmprobe')}.safetensors"] == before[f"{folder.name}/{sha16('of lmprobe')}.safetensors"]
    assert not list(cache.rglob("*.partial"))


def test_a_killed_export_leaves_whole_files_only_and_is_completed_by_the_next(
    filled: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmprobe_zarr.bridges import lmprobe_write

    write, calls = lmprobe_write.write_file, []

    def stop(storage: Any, key: str, data: bytes, *, overwrite: bool) -> bool:
        calls.append(key)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return write(storage, key, data, overwrite=overwrite)

    monkeypatch.setattr(lmprobe_write, "write_file", stop)
    with pytest.raises(KeyboardInterrupt):
        quiet_export(filled, tmp_path / "out")
    for path in (tmp_path / "out").rglob("*.safetensors"):
        read_safetensors(path.read_bytes())
    monkeypatch.undo()
    summary = quiet_export(filled, tmp_path / "out")
    assert summary.exported + summary.present == 4
    folder = tmp_path / "out" / sha16("acme/toy")
    assert len((folder / "_manifest.jsonl").read_text().splitlines()) == 4
    assert not list(folder.glob(".*"))


def test_a_file_that_appears_in_this_very_moment_is_not_replaced(filled: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmprobe_zarr.storage.local import LocalStorage

    folder = add_model(tmp_path / "out", "acme/toy")
    seen = LocalStorage.is_file

    def appears(self: LocalStorage, key: str) -> bool:
        there = seen(self, key)
        if key.endswith(".safetensors") and not there:
            (folder / Path(key).name).write_text("of lmprobe")
        return there

    monkeypatch.setattr(LocalStorage, "is_file", appears)
    summary = quiet_export(filled, tmp_path / "out")
    assert (summary.exported, summary.present) == (0, 4)
    assert {p.read_text() for p in folder.glob("*.safetensors")} == {"of lmprobe"}


def test_prompts_without_a_text_are_written_under_their_hash(tmp_path: Path, store: Store) -> None:
    batch = make_batch(["a"])
    hidden = TokenBatch(
        sha256=[prompt_sha256("secret"), prompt_sha256([5, 6])],
        text=None,
        layers=(0,),
        prompts={"resid_mean": np.ones((1, 2, 8), "float32")},
    )
    store.write(GROUP, batch)
    store.write(GROUP, hidden)
    summary = quiet_export(store, tmp_path / "out")
    assert summary.exported == 3
    assert summary.notes[0].count == 2
    folder = tmp_path / "out" / sha16("acme/toy")
    assert (folder / f"{sha16('secret')}.safetensors").exists()
    assert [json.loads(line)["prompt"] for line in (folder / "_manifest.jsonl").read_text().splitlines()] == ["a"]


@pytest.mark.parametrize("text", ["", "a\nb", "line\u2028separator\x85\x0b", "你好 😀", '"quotes" and \\', " "])
def test_any_text_is_listed_so_that_lmprobe_reads_it_back(tmp_path: Path, store: Store, text: str) -> None:
    store.write(GROUP, make_batch([text, "other"]))
    quiet_export(store, tmp_path / "out")
    manifest = (tmp_path / "out" / sha16("acme/toy") / "_manifest.jsonl").read_text()
    # As lmprobe 0.10.3 takes it apart.
    assert [json.loads(line)["prompt"] for line in manifest.splitlines() if line.strip()] == [text, "other"]
    quiet_import(tmp_path / "out", tmp_path / "again", strict=True)
    assert lz.open_store(tmp_path / "again").dataset(prompts=[text]).text.values.tolist() == [text]


def test_a_text_that_utf_8_cannot_hold_is_not_listed_as_another(tmp_path: Path, store: Store) -> None:
    # As earlier versions stored such a text; now it is refused.
    store.write(GROUP, replace(make_batch(["lone \ud800 surrogate"]), text=["lone ? surrogate"]))
    summary = quiet_export(store, tmp_path / "out")
    assert "unknown text" in summary.notes[0].text
    assert not (tmp_path / "out" / sha16("acme/toy") / "_manifest.jsonl").exists()


def test_variables_that_lmprobes_format_cannot_hold_are_left_out_with_a_note(tmp_path: Path, store: Store) -> None:
    batch = TokenBatch(
        sha256=[prompt_sha256("a")],
        text=["a"],
        layers=(0,),
        prompts={"attn_mean": np.ones((1, 1, 8), "float32"), "resid_mean": np.ones((1, 1, 8), "float32")},
    )
    store.write(GROUP, batch)
    summary = quiet_export(store, tmp_path / "out")
    assert summary.notes[0].names == ("attn_mean",)
    assert set(written(tmp_path / "out", "a", "acme/toy")[""]) == {"pooled_mean_layer_0"}


def test_some_tokens_of_a_prompt_are_not_passed_off_as_all(tmp_path: Path, store: Store) -> None:
    def batch(text: str, length: int, positions: list[int]) -> TokenBatch:
        return TokenBatch(
            sha256=[prompt_sha256(text)], text=[text], prompt_length=np.array([length]), n_tokens=np.array([3]), layers=(0,),
            tokens={"resid": np.ones((1, 3, 8), "float32")}, token_columns={"position": np.array(positions)},
            prompts={"resid_mean": np.ones((1, 1, 8), "float32")},
        )  # fmt: skip

    store.write(GROUP, batch("whole", 3, [0, 1, 2]))
    store.write(GROUP, batch("cut", 9, [0, 1, 2]))
    store.write(GROUP, batch("picked", 3, [0, 4, 8]))
    summary = quiet_export(store, tmp_path / "out")
    assert summary.skipped[0].count == 2
    assert "layer_0" in written(tmp_path / "out", "whole", "acme/toy")[""]
    for text in ("cut", "picked"):
        assert set(written(tmp_path / "out", text, "acme/toy")[""]) == {"pooled_mean_layer_0"}


def test_the_logits_of_every_token_stand_for_those_of_the_last(tmp_path: Path, store: Store) -> None:
    batch = TokenBatch(
        sha256=[prompt_sha256("a")], text=["a"], prompt_length=np.array([2]), n_tokens=np.array([2]),
        tokens={"logits": np.ones((2, 5), "float32")}, prompts={"logits_last_token": np.ones((1, 5), "float32")},
        unlayered=frozenset({"logits", "logits_last_token"}),
    )  # fmt: skip
    store.write(GROUP, batch)
    summary = quiet_export(store, tmp_path / "out")
    assert summary.notes[0].names == ("logits_last_token",)
    assert written(tmp_path / "out", "a", "acme/toy")[".logits"]["logits"].shape == (1, 2, 5)


def test_an_empty_choice_writes_nothing(filled: Store, tmp_path: Path) -> None:
    summary = quiet_export(filled, tmp_path / "out", prompts=[])
    assert (summary.prompts, summary.files) == (0, 0)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------ round trips


@pytest.mark.parametrize("positions", ["last", "all"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_from_lmprobe_to_a_store_and_back_every_tensor_is_the_same_but_for_the_padding(
    tmp_path: Path, store: Store, dtype: str, positions: str
) -> None:
    folder = add_model(tmp_path / "cache")
    truth = {f"p{i}": every_kind(i, dtype, positions=positions, pad=(i % 3, (i // 2) % 2)) for i in range(6)}
    for text, files in truth.items():
        add_prompt(folder, text, files[""], perplexity=files[".perplexity"], logits=files[".logits"])
    assert quiet_import(tmp_path / "cache", store, strict=True).imported == 6
    summary = quiet_export(store, tmp_path / "back")
    assert (summary.exported, summary.files, summary.skipped, summary.notes) == (6, 18, (), ())
    for text, files in truth.items():
        assert_same_tensors(written(tmp_path / "back", text), without_padding(files))


@pytest.mark.parametrize("dtype", DTYPES)
def test_from_a_store_to_lmprobe_and_back_every_variable_is_the_same(tmp_path: Path, dtype: str) -> None:
    rng = np.random.default_rng(0)
    texts, counts = [f"prompt {i}" for i in range(7)], np.array([1, 2, 3, 4, 5, 6, 7])
    layers, total = (0, 3, 4), int(np.sum(np.arange(8)))

    def normal(*shape: int) -> Array:
        values = rng.standard_normal(shape).astype("float32")
        return of_bits(to_bits(values)) if dtype == "bfloat16" else values.astype(dtype)

    perplexity = rng.standard_normal(total).astype("float32")
    perplexity[np.cumsum(counts) - counts] = np.nan
    prompts = {f"resid_{p}": normal(3, 7, 5) for p in ("last_token", "first_token", "mean", "max", "min")}
    prompts |= {"perplexity": rng.standard_normal((7, 3)).astype("float32")}
    tokens = {"resid": normal(3, total, 5), "router": normal(3, total, 4), "logits": normal(total, 9), "token_perplexity": perplexity}
    held = [*prompts, *tokens]
    batch = TokenBatch(
        sha256=[prompt_sha256(t) for t in texts], text=texts, prompt_length=counts, n_tokens=counts, layers=layers, tokens=tokens,
        token_columns={"token_id": rng.integers(0, 50, total)}, prompts=prompts,
        unlayered=frozenset({"perplexity", "logits", "token_perplexity"}),
        stored_dtype=dict.fromkeys((n for n in held if "perplexity" not in n), "bfloat16") if dtype == "bfloat16" else {},
    )  # fmt: skip
    store, again = lz.open_store(tmp_path / "one"), lz.open_store(tmp_path / "two")
    store.write(GroupInfo(model=MODEL, hidden_size=5), batch)
    quiet_export(store, tmp_path / "cache")
    summary = quiet_import(tmp_path / "cache", again, strict=True)
    assert summary.notes == (), "first_token too: there is no padding in what this package writes"
    assert_same_stores(store, again, texts)


def test_variables_in_parts_of_several_dtypes_go_and_come_back_in_their_own(tmp_path: Path, store: Store) -> None:
    store.write(GROUP, make_batch(["a", "b"], dtype="float16", seed=1))
    store.write(GROUP, make_batch(["c"], dtype="float32", seed=2))
    quiet_export(store, tmp_path / "cache")
    assert written(tmp_path / "cache", "a", "acme/toy")[""]["layer_0"].dtype == "float16"
    assert written(tmp_path / "cache", "c", "acme/toy")[""]["layer_0"].dtype == "float32"
    again = lz.open_store(tmp_path / "again")
    quiet_import(tmp_path / "cache", again, strict=True)
    for prompts in (["a", "b"], ["c"], ["a", "b", "c"]):
        np.testing.assert_array_equal(again.tokens(prompts=prompts).resid, store.tokens(prompts=prompts).resid)


@pytest.mark.parametrize("held", [("token_id",), ("token_perplexity", "token_id"), ("perplexity",), ("logits_last_token",)])
def test_a_variable_that_is_there_alone_survives_alone(tmp_path: Path, store: Store, held: tuple[str, ...]) -> None:
    values: dict[str, Array] = {
        "token_perplexity": np.array([np.nan, 2, 3], "float32"),
        "perplexity": np.array([[1, 2, 3]], "float32"),
        "logits_last_token": np.array([[1, 2, 3, 4]], "float32"),
    }
    by_token = held[0].startswith("token")
    batch = TokenBatch(
        sha256=[prompt_sha256("a")], text=["a"], prompt_length=np.array([3]), n_tokens=np.array([3]) if by_token else None,
        tokens={k: values[k] for k in held if k in values} if by_token else {},
        token_columns={"token_id": np.array([4, 5, 6])} if "token_id" in held else {},
        prompts={} if by_token else {k: values[k] for k in held}, unlayered=frozenset(held),
    )  # fmt: skip
    store.write(GroupInfo(model=MODEL), batch)
    quiet_export(store, tmp_path / "cache")
    again = lz.open_store(tmp_path / "again")
    quiet_import(tmp_path / "cache", again, strict=True)
    if by_token:
        assert_same_stores(store, again, ["a"])
    for name in held:
        data = again.tokens() if by_token else again.dataset()
        np.testing.assert_array_equal(data[name], [4, 5, 6] if name == "token_id" else values[name])


# ----------------------------------------------------------------------------------------------------------------- remote


@pytest.fixture
def url() -> Iterator[str]:
    url = f"memory://{uuid.uuid4().hex}"
    yield url
    memory = fsspec.filesystem("memory")
    if memory.exists(url):
        memory.rm(url, recursive=True)


def test_a_cache_on_an_object_store_is_written_and_read(filled: Store, tmp_path: Path, url: str) -> None:
    summary = quiet_export(filled, f"{url}/cache", prompts=["one", "two"])
    assert summary.files == 2
    assert quiet_export(filled, f"{url}/cache").files == 2
    memory = fsspec.filesystem("memory")
    manifest = memory.cat_file(f"{url}/cache/{sha16('acme/toy')}/_manifest.jsonl").decode()
    assert [json.loads(line)["prompt"] for line in manifest.splitlines()] == ["one", "two", "three", "fourth one"]
    again = lz.open_store(f"{url}/store")
    assert quiet_import(f"{url}/cache", again, strict=True).imported == 4
    assert_same_stores(filled, again, ["one", "two", "three", "fourth one"])


# --------------------------------------------------------------------------------------------------------- lmprobe itself

ITS_WARNINGS = "import warnings; warnings.simplefilter('default')\n"  # which are not ours
USE_LMPROBE = """
import os, sys, json
import numpy as np, torch, lmprobe
from lmprobe.cache import discover_cached, load_prompt_activations, load_prompt_perplexity, load_prompt_token_perplexity, \
    load_prompt_logits, load_prompt_pooled_activations, load_prompt_router_logits, list_cached_prompts, cache_info
import lmprobe.extraction, lmprobe.backends
truth = np.load(sys.argv[1])
model, texts = sys.argv[2], [str(t) for t in truth["texts"]]
for i, text in enumerate(texts):
    info = discover_cached(model, text)
    assert info is not None and info.raw_layers == [0, 1, 3] and info.pooled == {"mean": [0, 1, 3], "last_token": [0, 1, 3]}, info
    assert info.has_perplexity and info.has_token_perplexity and info.has_logits and info.router_layers == [0, 1, 3], info
    a, b = int(truth["bounds"][i]), int(truth["bounds"][i + 1])
    assert info.num_tokens == b - a
    acts, mask = load_prompt_activations(model, text, [1, 3])
    assert np.array_equal(acts[0].numpy(), np.concatenate([truth["resid"][1, a:b], truth["resid"][2, a:b]], 1)) and mask.all()
    assert np.array_equal(load_prompt_pooled_activations(model, text, [3], "mean")[0].numpy(), truth["mean"][2, i])
    assert np.array_equal(load_prompt_perplexity(model, text).numpy(), truth["perplexity"][i])
    values, ids = load_prompt_token_perplexity(model, text)
    assert np.array_equal(values.numpy(), truth["token_perplexity"][a + 1:b]) and np.array_equal(ids.numpy(), truth["ids"][a:b])
    assert np.array_equal(load_prompt_logits(model, text)[0][0].numpy(), truth["logits"][a:b])
    assert np.array_equal(load_prompt_router_logits(model, text, [3])[3].numpy(), truth["router"][2, a:b])
assert [(e.prompt, e.num_tokens) for e in list_cached_prompts(model, verify=True)] == list(zip(texts, np.diff(truth["bounds"]).tolist()))
assert [m.model_name for m in cache_info().models] == [model]
def refuse(*args, **kwargs):
    raise AssertionError("the model was loaded")
import transformers
for name in ("AutoModel", "AutoModelForCausalLM", "AutoTokenizer"):
    getattr(transformers, name).from_pretrained = refuse
probe = lmprobe.Probe(model=model, layers=[1], pooling="last_token", classifier="ridge", device="cpu")
half = len(texts) // 2
probe.fit(texts[:half], texts[half:])
print(json.dumps([int(p) for p in probe.predict(texts)]))
"""


@pytest.mark.model
def test_lmprobe_uses_an_export_as_its_own_without_loading_the_model(tmp_path: Path, store: Store, warmed: Warmed) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("lmprobe")
    rng = np.random.default_rng(0)
    texts, counts = [f"prompt {i}" for i in range(8)], np.arange(2, 10)
    total, last = int(counts.sum()), np.cumsum(counts) - 1
    resid = rng.standard_normal((3, total, 8)).astype("float32")
    resid[:, last[:4]] += 5  # what the first four end with
    perplexity = rng.standard_normal(total).astype("float32")
    perplexity[last - counts + 1] = np.nan
    tokens = {"resid": resid, "router": rng.standard_normal((3, total, 4)).astype("float32"), "token_perplexity": perplexity,
              "logits": rng.standard_normal((total, 11)).astype("float32")}  # fmt: skip
    prompts = {"resid_mean": rng.standard_normal((3, 8, 8)).astype("float32"), "resid_last_token": resid[:, last],
               "perplexity": rng.standard_normal((8, 3)).astype("float32")}  # fmt: skip
    ids = rng.integers(0, 100, total)
    batch = TokenBatch(
        sha256=[prompt_sha256(t) for t in texts], text=texts, prompt_length=counts, n_tokens=counts, layers=(0, 1, 3), tokens=tokens,
        token_columns={"token_id": ids}, prompts=prompts, unlayered=frozenset({"token_perplexity", "logits", "perplexity"}),
    )  # fmt: skip
    # A model that has a configuration and nothing else: no weights, no tokenizer.
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 4, "n_embd": 8, "n_head": 2}))
    store.write(GroupInfo(model=str(model), hidden_size=8), batch)
    quiet_export(store, tmp_path / "cache")
    truth: dict[str, Any] = {"texts": texts, "bounds": [0, *np.cumsum(counts)], "mean": prompts["resid_mean"], "ids": ids, **tokens}
    np.savez(tmp_path / "truth.npz", allow_pickle=False, perplexity=prompts["perplexity"], **truth)
    environment = {**os.environ, "LMPROBE_CACHE_DIR": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = warmed.run(ITS_WARNINGS + USE_LMPROBE, str(tmp_path / "truth.npz"), str(model), env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [1, 1, 1, 1, 0, 0, 0, 0]


WRITE_LMPROBE = """
import sys, torch, numpy as np
from lmprobe.cache import save_prompt_activations, save_prompt_pooled_activations, save_prompt_perplexity, save_prompt_logits, \
    save_prompt_router_logits
torch.manual_seed(0)
model, out = "acme/written", {}
for i, n in enumerate((3, 5, 4)):
    text, pad = f"text {i}", 6 - n
    mask = torch.tensor([[0] * pad + [1] * n])
    acts = torch.randn(1, 6, 2 * 4)
    save_prompt_activations(model, text, [2, 7], acts.to(torch.bfloat16), mask)
    save_prompt_pooled_activations(model, text, [2, 7], torch.full((1, 8), 3.0), "mean")
    save_prompt_router_logits(model, text, {7: torch.randn(6, 3)})
    ppl = torch.randn(n - 1)
    save_prompt_perplexity(model, text, torch.tensor([1.0, 2.0, 3.0]), ppl, torch.arange(n))
    logits = torch.randn(1, 6, 9)
    save_prompt_logits(model, text, logits, mask, top_k=2 if i else None, positions="all")
    out |= {f"resid{i}": acts.to(torch.bfloat16).float()[0, pad:].numpy(), f"ppl{i}": ppl.numpy(), f"logits{i}": logits[0, pad:].numpy()}
np.savez(sys.argv[1], **out)
"""


@pytest.mark.model
def test_everything_that_lmprobe_writes_now_is_imported(tmp_path: Path, store: Store, warmed: Warmed) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("lmprobe")
    environment = {**os.environ, "LMPROBE_CACHE_DIR": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = warmed.run(ITS_WARNINGS + WRITE_LMPROBE, str(tmp_path / "truth.npz"), env=environment)
    assert done.returncode == 0, done.stderr
    truth = np.load(tmp_path / "truth.npz")
    assert quiet_import(tmp_path / "cache", store, strict=True).imported == 3
    toks = store.tokens()
    assert toks.resid.attrs["stored_dtype"] == "bfloat16"
    for i in range(3):
        shown = toks.sel(prompt=lz.prompt_hash(f"text {i}"))
        np.testing.assert_array_equal(np.concatenate([shown.resid.sel(layer=2), shown.resid.sel(layer=7)], 1), truth[f"resid{i}"])
        np.testing.assert_array_equal(shown.token_perplexity, [np.nan, *truth[f"ppl{i}"]])
        if i == 0:
            np.testing.assert_array_equal(shown.logits, truth["logits0"])
        else:
            np.testing.assert_array_equal(shown.logits_top_k_values, np.sort(truth[f"logits{i}"])[:, :-3:-1])
