"""lmprobe's safetensors cache as a source: found by hash, described from headers, read without padding."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
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
    safetensors_bytes,
    sha16,
    state_of,
    to_bits,
)
from fsspec.implementations.memory import MemoryFileSystem
from paths import DATA

from lmprobe_zarr.batch.hashes import prompt_sha256
from lmprobe_zarr.batch.token_batch import TokenBatch
from lmprobe_zarr.bridges.entry import Entry, Held, Skipped
from lmprobe_zarr.bridges.files import RemoteFiles, open_files
from lmprobe_zarr.bridges.lmprobe_folders import ModelFolder, read_manifest, scan_models
from lmprobe_zarr.bridges.lmprobe_v2 import LmprobeV2
from lmprobe_zarr.errors import CorruptFileError
from lmprobe_zarr.storage.remote import FsspecStorage

Array = npt.NDArray[Any]


def source_of(root: Path | str, model: str = MODEL, **options: Any) -> LmprobeV2:
    return LmprobeV2(open_files(root), model, **options)


def only_entry(source: LmprobeV2) -> Entry:
    (entry,) = source.entries()
    assert isinstance(entry, Entry), entry
    return entry


def read_all(source: LmprobeV2, entry: Entry) -> dict[str, Array]:
    """Every variable of an entry, by itself."""
    found: dict[str, Array] = {}
    for held in entry.holds:
        batch = source.read([entry], [held])
        found[held.variable] = {**batch.tokens, **batch.prompts, **batch.token_columns}[held.variable]
    return found


def described(entry: Entry) -> dict[str, tuple[int, ...] | None]:
    return {held.variable: held.layers for held in entry.holds}


# ------------------------------------------------------------------------------------------------- what lmprobe itself wrote


def test_values_that_lmprobe_wrote_are_read_unchanged() -> None:
    root = DATA / "lmprobe-0.10.3"
    truth, known = np.load(DATA / "lmprobe-0.10.3-truth.npz"), json.loads((DATA / "lmprobe-0.10.3-truth.json").read_text())
    assert scan_models(open_files(root)) == [ModelFolder(sha16(known["model"]), known["model"])]
    source = source_of(root, known["model"])
    entries = list(source.entries())
    assert [e.text for e in entries if isinstance(e, Entry)] == known["prompts"], "in the order of the manifest"
    for i, entry in enumerate(entries):
        assert isinstance(entry, Entry)
        values, mask = read_all(source, entry), truth["mask"][i] == 1
        np.testing.assert_array_equal(values["resid"], truth["acts"][i][:, mask])
        assert entry.sha256 == prompt_sha256(known["prompts"][i])
        assert entry.n_tokens == mask.sum()
        assert ("resid_last_token" in values) == (i % 2 == 0)
        if i % 2 == 0:
            np.testing.assert_array_equal(values["resid_last_token"][:, 0], truth["acts"][i][:, np.flatnonzero(mask)[-1]])
        assert ("perplexity" in values) == (i % 3 == 0)
        if i % 3 == 0:
            np.testing.assert_array_equal(values["perplexity"], [[np.float32(1.5 + i), 2.5, 3.5]])


@pytest.mark.parametrize("pad", [(0, 0), (3, 0), (0, 3), (2, 1)], ids=["none", "left", "right", "both"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_padding_is_left_out_on_whichever_side_it_is(tmp_path: Path, pad: tuple[int, int], dtype: str) -> None:
    tensors = prompt_tensors(0, n=4, pad=pad, dtype=dtype)
    add_prompt(add_model(tmp_path), "a", tensors)
    source = source_of(tmp_path)
    entry = only_entry(source)
    batch = source.read([entry], entry.holds)
    for j in (0, 1):
        expected = tensors[f"layer_{j}"][0, pad[0] : pad[0] + 4]
        np.testing.assert_array_equal(batch.tokens["resid"][j], of_bits(expected) if dtype == "bfloat16" else expected)
    assert not (batch.tokens["resid"] == 99).any()
    assert batch.tokens["resid"].dtype == ("float32" if dtype == "bfloat16" else dtype)
    assert batch.stored_dtype == ({"resid": "bfloat16"} if dtype == "bfloat16" else {})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_that_are_not_contiguous_are_read_correctly(tmp_path: Path, dtype: str) -> None:
    tensors = prompt_tensors(0, n=6, pad=(1, 1), dtype=dtype)
    tensors["attention_mask"] = np.array([[0, 1, 1, 0, 1, 0, 1, 0]])
    add_prompt(add_model(tmp_path), "a", tensors)
    source = source_of(tmp_path)
    expected = tensors["layer_1"][0, [1, 2, 4, 6]]
    np.testing.assert_array_equal(read_all(source, only_entry(source))["resid"][1], of_bits(expected) if dtype == "bfloat16" else expected)


def test_every_kind_of_tensor_has_its_variable(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = prompt_tensors(0, n=4, pad=(2, 0), pooled=("last_token", "mean", "max", "min", "first_token"))
    tensors["router_layer_1"] = rng.standard_normal((6, 5)).astype("float32")
    ppl = {"perplexity": np.array([3, 1, 9], "float32"), "token_perplexity": np.array([4, 5, 6], "float32"), "token_ids": np.arange(7, 11)}
    logits = {
        "logits_top_k_values": rng.standard_normal((1, 6, 2)).astype("float32"),
        "logits_top_k_indices": rng.integers(0, 50, (1, 6, 2)).astype("int32"),
    }
    add_prompt(add_model(tmp_path), "a", tensors, perplexity=ppl, logits=logits)
    source = source_of(tmp_path)
    entry = only_entry(source)
    values = read_all(source, entry)
    assert described(entry) == {
        "perplexity": None, "resid_first_token": (0, 1), "resid_last_token": (0, 1), "resid_max": (0, 1), "resid_mean": (0, 1),
        "resid_min": (0, 1), "logits_top_k_indices": None, "logits_top_k_values": None, "resid": (0, 1), "router": (1,),
        "token_id": None, "token_perplexity": None,
    }  # fmt: skip
    for pooling in ("last_token", "mean", "max", "min"):
        np.testing.assert_array_equal(values[f"resid_{pooling}"][1], tensors[f"pooled_{pooling}_layer_1"])
    np.testing.assert_array_equal(values["resid_first_token"][1, 0], tensors["layer_1"][0, 2], "the first token, not the padding")
    np.testing.assert_array_equal(values["router"], tensors["router_layer_1"][None, 2:])
    np.testing.assert_array_equal(values["token_perplexity"], [np.nan, 4, 5, 6])
    np.testing.assert_array_equal(values["token_id"], [7, 8, 9, 10])
    np.testing.assert_array_equal(values["logits_top_k_values"], logits["logits_top_k_values"][0, 2:])
    np.testing.assert_array_equal(values["logits_top_k_indices"], logits["logits_top_k_indices"][0, 2:])
    assert values["logits_top_k_indices"].dtype == np.int32
    assert entry.notes == ()


def test_logits_of_the_last_token_are_one_row_per_prompt(tmp_path: Path) -> None:
    logits = np.random.default_rng(0).standard_normal((1, 1, 7)).astype("float16")
    add_prompt(add_model(tmp_path), "a", prompt_tensors(0), logits={"logits": logits})
    source = source_of(tmp_path)
    values = read_all(source, only_entry(source))
    np.testing.assert_array_equal(values["logits_last_token"], logits[0])
    assert "logits" not in values


def test_a_prompt_of_one_token_has_its_logits_for_the_last_and_for_every_token(tmp_path: Path) -> None:
    logits = np.ones((1, 1, 7), "float32")
    add_prompt(add_model(tmp_path), "a", prompt_tensors(0, n=1), logits={"logits": logits})
    source = source_of(tmp_path)
    values = read_all(source, only_entry(source))
    assert values["logits"].shape == values["logits_last_token"].shape == (1, 7)


def test_perplexity_and_logits_in_the_main_file_are_found_and_the_file_beside_it_counts_first(tmp_path: Path) -> None:
    tensors = prompt_tensors(0) | {"perplexity": np.array([1, 1, 1], "float32"), "logits": np.zeros((1, 6, 7), "float32")}
    folder = add_model(tmp_path)
    add_prompt(folder, "a", tensors)
    source = source_of(tmp_path)
    values = read_all(source, only_entry(source))
    assert values["perplexity"].tolist() == [[1, 1, 1]]
    assert values["logits"].shape == (4, 7)
    add_prompt(folder, "a", None, perplexity={"perplexity": np.array([2, 2, 2], "float32")})
    assert read_all(source, only_entry(source))["perplexity"].tolist() == [[2, 2, 2]]


def test_files_beside_a_main_file_that_is_not_there_are_read_too(tmp_path: Path) -> None:
    ppl = {"perplexity": np.ones(3, "float32"), "token_perplexity": np.ones(2, "float32"), "token_ids": np.arange(3)}
    add_prompt(add_model(tmp_path), "a", None, perplexity=ppl)
    source = source_of(tmp_path)
    entry = only_entry(source)
    assert entry.n_tokens == 3, "ids are never padded"
    assert read_all(source, entry)["token_id"].tolist() == [0, 1, 2]


def test_router_scores_without_padding_are_taken_as_they_are(tmp_path: Path) -> None:
    scores = np.random.default_rng(0).standard_normal((4, 5)).astype("float32")
    add_prompt(add_model(tmp_path), "a", prompt_tensors(0, n=4, pad=(2, 0)) | {"router_layer_0": scores, "router_layer_1": scores[None]})
    source = source_of(tmp_path)
    np.testing.assert_array_equal(read_all(source, only_entry(source))["router"], [scores, scores])


def test_tensors_that_cannot_be_imported_are_noted_and_the_rest_is_read(tmp_path: Path) -> None:
    tensors = prompt_tensors(0, layers=(0,)) | {
        "pooled_first_token_layer_5": np.ones((1, 3), "float32"),
        "pooled_all_layer_0": np.ones((1, 3), "float32"),
        "something": np.ones(3, "float32"),
        "router_layer_0": np.ones((9, 2), "float32"),
        "token_ids": np.arange(9),
        "pooled_mean_layer_0": np.ones((1, 3), "uint8"),
    }
    add_prompt(add_model(tmp_path), "a", tensors)
    entry = only_entry(source_of(tmp_path))
    assert described(entry) == {"resid": (0,)}
    assert len(entry.notes) == 4


def test_entries_of_unknown_text_have_the_digits_that_are_known(tmp_path: Path) -> None:
    add_prompt(add_model(tmp_path), "a", prompt_tensors(0), listed=False)
    entry = only_entry(source_of(tmp_path))
    assert entry.text is None
    assert entry.sha256 == sha16("a") + "0" * 48
    assert entry.hash == sha16("a")


def test_several_entries_become_one_batch(tmp_path: Path) -> None:
    folder = add_model(tmp_path)
    truth = {}
    for i, n in enumerate((3, 1, 5)):
        truth[f"p{i}"] = prompt_tensors(i, n=n, pad=(i, 0), pooled=("mean",))
        add_prompt(folder, f"p{i}", truth[f"p{i}"])
    source = source_of(tmp_path)
    entries = [e for e in source.entries() if isinstance(e, Entry)]
    assert len({id(e.holds) for e in entries}) == 1, "what they hold is shared"
    batch = source.read(entries, entries[0].holds)
    assert isinstance(batch, TokenBatch)
    assert np.asarray(batch.n_tokens).tolist() == [3, 1, 5]
    np.testing.assert_array_equal(batch.tokens["resid"][1, 3:4], truth["p1"]["layer_1"][0, 1:])
    np.testing.assert_array_equal(batch.prompts["resid_mean"][0, 2], truth["p2"]["pooled_mean_layer_0"][0])
    some = source.read(entries[1:], [Held(level="tokens", variable="resid", layers=(1,), dtype="float32", row_shape=(3,))])
    np.testing.assert_array_equal(some.tokens["resid"][0, 1:], truth["p2"]["layer_1"][0, 2:])


# ------------------------------------------------------------------------------------------------------------- looking up


def test_one_prompt_is_found_without_listing_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = add_model(tmp_path)
    for i in range(5):
        add_prompt(folder, f"p{i}", prompt_tensors(i))
    source = source_of(tmp_path)
    monkeypatch.setattr(type(source.files), "list", lambda *_: pytest.fail("listed"))
    found = source.find(["p3", "absent", sha16("p1")])
    assert found[1] is None
    (entry,) = found[0] or []
    assert isinstance(entry, Entry)
    assert entry.text == "p3"
    (by_hash,) = found[2] or []
    assert isinstance(by_hash, Entry)
    assert by_hash.text == "p1", "the manifest knows it"


def test_covering_gives_what_to_read_or_none_if_a_layer_is_missing(tmp_path: Path) -> None:
    tensors = prompt_tensors(0, layers=(0, 1, 2)) | {"layer_1": prompt_tensors(0, layers=(1,), dtype="float16")["layer_1"]}
    add_prompt(add_model(tmp_path), "a", tensors, perplexity={"perplexity": np.ones(3, "float32")})
    entry = only_entry(source_of(tmp_path))
    (held,) = entry.covering("tokens", "resid", (2, 0)) or ()
    assert held.layers == (0, 2)
    assert [(h.layers, h.dtype) for h in entry.covering("tokens", "resid", (0, 1)) or ()] == [((1,), "float16"), ((0,), "float32")]
    assert entry.covering("tokens", "resid", (0, 3)) is None
    assert entry.covering("prompts", "resid_mean", (0,)) is None
    assert len(entry.covering("prompts", "perplexity", None) or ()) == 1
    assert entry.covering("tokens", "token_id", None) is None


def test_sizes_are_those_of_all_files_of_a_prompt(tmp_path: Path) -> None:
    folder = add_model(tmp_path)
    add_prompt(folder, "a", prompt_tensors(0), perplexity={"perplexity": np.ones(3, "float32")})
    assert source_of(tmp_path).sizes() == {sha16("a"): sum(p.stat().st_size for p in folder.glob("*.safetensors"))}


def test_the_last_line_for_a_hash_counts_and_bad_lines_cost_only_themselves(tmp_path: Path) -> None:
    folder = add_model(tmp_path)
    good = [{"hash": sha16(t), "prompt": t} for t in ("a", "b\u2028c", "a")]
    lines = [json.dumps(line, ensure_ascii=False).encode() for line in good]
    bad = [b"{torn", b"\xff\xfe", b'{"hash": "0000000000000000", "prompt": "a"}', b"[]", b'{"hash": 3, "prompt": 4}', b"", b"[" * 10000]
    (folder / "_manifest.jsonl").write_bytes(b"\n".join([lines[0], *bad, *lines[1:]]))
    manifest = read_manifest(open_files(tmp_path), folder.name)
    assert manifest.texts == {sha16("a"): "a", sha16("b\u2028c"): "b\u2028c"}
    assert manifest.bad_lines == 6


@pytest.mark.parametrize("name", ["org/model", "../../etc/passwd", "..", "a.b.c", "/abs", "Ünï 你", "x" * 300, " padded "])
def test_any_name_of_a_model_is_only_ever_hashed(tmp_path: Path, name: str) -> None:
    add_prompt(add_model(tmp_path / "cache", name), "a", prompt_tensors(0))
    (found,) = scan_models(open_files(tmp_path / "cache"))
    assert isinstance(found, ModelFolder)
    assert found.model == name
    assert only_entry(source_of(tmp_path / "cache", name)).text == "a"
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


def test_a_folder_that_does_not_say_whose_it_is_is_skipped(tmp_path: Path) -> None:
    add_prompt(add_model(tmp_path, "good"), "a", prompt_tensors(0))
    other = add_model(tmp_path, "other")
    (other / "_model_name.txt").write_text("another")
    third = add_model(tmp_path, "third")
    (third / "_model_name.txt").unlink()
    (tmp_path / "notes").mkdir()
    (tmp_path / "0123456789abcdef").write_text("a file")
    found = scan_models(open_files(tmp_path))
    assert [f.model for f in found if isinstance(f, ModelFolder)] == ["good"]
    assert {f.name for f in found if isinstance(f, Skipped)} == {other.name, third.name}


# -------------------------------------------------------------------------------------------------------------- bad input

BAD: dict[str, tuple[Any, str]] = {
    "an empty file": (b"", "damaged"),
    "a file that was cut off": (safetensors_bytes(prompt_tensors(0))[:-5], "damaged"),
    "another file": (b"hello there, this is no safetensors file", "damaged"),
    "overlapping tensors": (
        raw_file({n: {"dtype": "F32", "shape": [1, 2, 1], "data_offsets": [0, 8]} for n in ("layer_0", "layer_1")}, bytes(8)),
        "damaged",
    ),
    "a mask of zeros": (prompt_tensors(0) | {"attention_mask": np.zeros((1, 6), np.int64)}, "single token"),
    "a mask of another length": (prompt_tensors(0) | {"attention_mask": np.ones((1, 5), np.int64)}, "shape"),
    "a mask of two prompts": (prompt_tensors(0) | {"attention_mask": np.ones((2, 3), np.int64)}, "shape"),
    "a layer of two prompts": (prompt_tensors(0) | {"layer_1": np.ones((2, 6, 3), "float32")}, "shape"),
    "a layer without a batch axis": (prompt_tensors(0) | {"layer_1": np.ones((6, 3), "float32")}, "shape"),
    "a wider layer": (prompt_tensors(0) | {"layer_1": np.ones((1, 6, 4), "float32")}, "shape"),
    "a layer of no width": (prompt_tensors(0, layers=()) | {"layer_1": np.ones((1, 6, 0), "float32")}, "shape"),
    "a pooled row of another width": (prompt_tensors(0) | {"pooled_mean_layer_0": np.ones((1, 4), "float32")}, "shape"),
    "a pooled matrix": (prompt_tensors(0) | {"pooled_mean_layer_0": np.ones((2, 3), "float32")}, "shape"),
    "perplexity of four numbers": (prompt_tensors(0) | {"perplexity": np.ones(4, "float32")}, "shape"),
    "nothing that is known": ({"weights": np.ones(3, "float32")}, "nothing"),
    "layers without a mask": ({"layer_0": np.ones((1, 4, 3), "float32")}, "nothing"),
    "only whole numbers": (prompt_tensors(0, layers=()) | {"layer_0": np.ones((1, 6, 3), np.int64)}, "nothing"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_entries_are_skipped_with_a_reason_and_the_others_read(tmp_path: Path, what: str) -> None:
    content, reason = BAD[what]
    folder = add_model(tmp_path)
    add_prompt(folder, "good", prompt_tensors(1))
    add_prompt(folder, "bad", content)
    found = list(source_of(tmp_path).entries())
    assert [e.text for e in found if isinstance(e, Entry)] == ["good"]
    (skipped,) = [e for e in found if isinstance(e, Skipped)]
    assert reason in skipped.reason
    assert skipped.name.startswith(sha16("bad"))


def test_a_damaged_file_beside_a_good_one_costs_only_itself(tmp_path: Path) -> None:
    add_prompt(add_model(tmp_path), "a", prompt_tensors(0), perplexity=b"junk", logits=b"")
    entry, *skipped = source_of(tmp_path).entries()
    assert isinstance(entry, Entry)
    assert described(entry) == {"resid": (0, 1)}
    assert [s.name.split(".")[1] for s in skipped if isinstance(s, Skipped)] == ["perplexity", "logits"]


def test_links_are_followed_inside_the_cache_and_never_out_of_it(tmp_path: Path) -> None:
    cache, outside = tmp_path / "cache", tmp_path / "outside"
    folder = add_model(cache)
    path = add_prompt(folder, "good", prompt_tensors(0))
    secret = add_prompt(add_model(outside), "secret", prompt_tensors(1))
    (folder / f"{sha16('secret')}.safetensors").symlink_to(secret)
    (folder / f"{sha16('again')}.safetensors").symlink_to(path)
    (cache / sha16("linked")).symlink_to(add_model(outside, "linked"), target_is_directory=True)
    add_prompt(add_model(outside, "linked"), "x", prompt_tensors(2))
    found = list(source_of(cache).entries())
    assert {e.hash for e in found if isinstance(e, Entry)} == {sha16("good"), sha16("again")}
    assert [s.reason for s in found if isinstance(s, Skipped)] == ["links that lead out of the cache"]
    assert {type(f) for f in scan_models(open_files(cache))} == {ModelFolder, Skipped}
    assert [s.reason for s in source_of(cache, "linked").entries() if isinstance(s, Skipped)] == ["links that lead out of the cache"]
    ((skipped,),) = [items or [] for items in source_of(cache).find(["secret"])]
    assert isinstance(skipped, Skipped)
    ((skipped,),) = [items or [] for items in source_of(cache, "linked").find(["x"])]
    assert isinstance(skipped, Skipped)


def test_a_cache_that_is_itself_behind_a_link_is_read(tmp_path: Path) -> None:
    add_prompt(add_model(tmp_path / "real"), "a", prompt_tensors(0))
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    assert only_entry(source_of(tmp_path / "link")).text == "a"


def test_pipes_and_folders_with_the_name_of_a_file_do_not_hang(tmp_path: Path) -> None:
    folder = add_model(tmp_path)
    os.mkfifo(folder / f"{sha16('pipe')}.safetensors")
    (folder / f"{sha16('folder')}.safetensors").mkdir()
    found = list(source_of(tmp_path).entries())
    assert len(found) == 2
    assert all(isinstance(e, Skipped) for e in found)


def test_a_file_that_was_exchanged_since_it_was_looked_at_is_noticed(tmp_path: Path) -> None:
    folder = add_model(tmp_path)
    add_prompt(folder, "a", prompt_tensors(0))
    source = source_of(tmp_path)
    entry = only_entry(source)
    path = add_prompt(folder, "a", prompt_tensors(0, n=5))
    with pytest.raises(CorruptFileError, match="changed since"):
        source.read([entry], entry.holds)
    path.unlink()
    with pytest.raises(CorruptFileError, match="removed after"):
        source.read([entry], entry.holds)


def test_headers_beyond_those_remembered_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmprobe_zarr.bridges.lmprobe_v2.REMEMBERED_HEADERS", 1)
    folder = add_model(tmp_path)
    truth = [prompt_tensors(i, n=i + 1) for i in range(4)]
    for i, tensors in enumerate(truth):
        add_prompt(folder, str(i), tensors, perplexity={"perplexity": np.ones(3, "float32")})
    source = source_of(tmp_path)
    for entry in source.entries():
        assert isinstance(entry, Entry)
        np.testing.assert_array_equal(read_all(source, entry)["resid"][0], truth[int(entry.text or 0)]["layer_0"][0, 2:])


def test_looking_and_reading_change_nothing(tmp_path: Path) -> None:
    add_prompt(add_model(tmp_path), "a", prompt_tensors(0), perplexity={"perplexity": np.ones(3, "float32")})
    before = state_of(tmp_path)
    source = source_of(tmp_path)
    read_all(source, only_entry(source))
    source.sizes()
    scan_models(source.files)
    assert state_of(tmp_path) == before


# ----------------------------------------------------------------------------------------------------------------- remote


class CountingFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """Memory that notes which ranges of which files are requested."""

    protocol = "counting"
    requests: list[tuple[str, int | None, int | None]] = []  # noqa: RUF012
    listed: list[str] = []  # noqa: RUF012

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        self.requests.append((path.rsplit("/", 1)[-1], start, end))
        data: bytes = super().cat_file(path, start=start, end=end, **options)
        return data

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        self.listed.append(path)
        return super().ls(path, detail=detail, **options)


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[RemoteFiles]:
    """A cache on an object store, of one long and one short prompt."""
    folder = add_model(tmp_path)
    add_prompt(folder, "long", prompt_tensors(0, n=4000, hidden=64, layers=tuple(range(4))))
    add_prompt(folder, "short", prompt_tensors(1))
    name = f"/{uuid.uuid4().hex}"
    memory = CountingFileSystem(skip_instance_cache=True)
    memory.put(str(tmp_path) + "/", name, recursive=True)
    memory.requests.clear()
    memory.listed.clear()
    yield RemoteFiles(FsspecStorage(memory, name, f"counting:/{name}"))
    memory.rm(name, recursive=True)


def test_on_an_object_store_only_the_requested_bytes_are_fetched(remote: RemoteFiles) -> None:
    requests = remote.storage.filesystem.requests
    source = LmprobeV2(remote, MODEL)
    ((entry,),) = [items or [] for items in source.find(["long"])]
    assert isinstance(entry, Entry)
    assert not remote.storage.filesystem.listed
    assert all(b is not None and b <= 2**17 for _, _, b in requests), "headers only"
    requests.clear()
    values = source.read([entry], [Held(level="tokens", variable="resid", layers=(2,), dtype="float32", row_shape=(64,))])
    np.testing.assert_array_equal(values.tokens["resid"][0], prompt_tensors(0, n=4000, hidden=64, layers=(0, 1, 2, 3))["layer_2"][0, 2:])
    fetched = sum((b or 0) - (a or 0) for _, a, b in requests)
    assert 4000 * 64 * 4 <= fetched <= 4000 * 64 * 4 + 2**11
    requests.clear()
    ((short,),) = [items or [] for items in source.find(["short"])]
    assert isinstance(short, Entry)
    requests.clear()
    source.read([short], short.holds)
    assert len(requests) == 1, "near ranges are one request"


def test_many_prompts_on_an_object_store_are_looked_up_in_one_listing(remote: RemoteFiles) -> None:
    source = LmprobeV2(remote, MODEL)
    found = source.find(["long", *(f"absent {i}" for i in range(150))])
    assert [bool(f) for f in found] == [True] + [False] * 150
    assert len(remote.storage.filesystem.listed) == 1
    assert len(remote.storage.filesystem.requests) == 1
    assert {e.text for e in source.entries() if isinstance(e, Entry)} == {"long", "short"}


def test_a_truncated_file_on_an_object_store_is_noticed(remote: RemoteFiles) -> None:
    path = f"{remote.storage.root}/{sha16(MODEL)}/{sha16('long')}.safetensors"
    remote.storage.filesystem.pipe_file(path, remote.storage.filesystem.cat_file(path)[:-100])
    source = LmprobeV2(remote, MODEL)
    assert [e.reason for e in source.entries() if isinstance(e, Skipped)] == ["damaged files"], "the listing knows its length"
    ((entry,),) = [items or [] for items in source.find(["long"])]
    assert isinstance(entry, Entry), "a look-up by hash does not"
    with pytest.raises(CorruptFileError, match="cut off"):
        source.read([entry], entry.holds)


def test_a_url_is_opened_by_fsspec(tmp_path: Path) -> None:
    add_prompt(add_model(tmp_path), "a", prompt_tensors(0))
    url = f"memory://{uuid.uuid4().hex}"
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path) + "/", url, recursive=True)
    try:
        assert only_entry(source_of(url)).text == "a"
        assert source_of(url).sizes().keys() == {sha16("a")}
    finally:
        memory.rm(url, recursive=True)


def test_bits_are_the_same_as_of_the_writer() -> None:
    values = np.array([1.0, -2.5, 3e38], np.float32)
    np.testing.assert_allclose(of_bits(to_bits(values)), values, rtol=0.01)
