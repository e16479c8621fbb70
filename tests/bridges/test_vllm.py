"""Files that vLLM and hs-connectors wrote, with generated tokens and without; and what is passed by while they write."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from foreign_caches import read_safetensors, safetensors_bytes
from paths import DATA

import lmprobe_zarr as lz
from lmprobe_zarr.batch.hashes import prompt_sha256
from lmprobe_zarr.bridges.files import open_files
from lmprobe_zarr.bridges.imports import import_npy, import_vllm
from lmprobe_zarr.bridges.vllm_files import VllmFiles
from lmprobe_zarr.errors import CorruptFileError, InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.store.store import Store

Array = npt.NDArray[Any]
REAL = DATA / "vllm-0.32.0"
ABOUT = json.loads((REAL / "about.json").read_text())
LAYER_IDS: list[int] = ABOUT["layer_ids"]
PROMPTS: list[list[int]] = ABOUT["prompts"]
LENGTHS = [len(ids) for ids in PROMPTS]
#: The last token that vLLM generates has no row.
WHOLE = [[*ids, *answer[:-1]] for ids, answer in zip(PROMPTS, ABOUT["generated"], strict=True)]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return lz.open_store(tmp_path / "store")


def bring(folder: Any, store: Store, **options: Any) -> Any:
    return import_vllm(folder, store, **{"model": "m", "layer_ids": LAYER_IDS, "progress": False, **options})


def truth(n_tokens: list[int]) -> Array:
    """What transformers computes, shape (slot, token, hidden)."""
    with np.load(REAL / "truth.npz") as known:
        return np.concatenate([known[str(i)][LAYER_IDS, :n] for i, n in enumerate(n_tokens)], axis=1)


def slots(store: Store, prompts: list[list[int]]) -> Array:
    toks = store.tokens("m", prompts=prompts)
    assert toks.layer.values.tolist() == [layer - 1 for layer in LAYER_IDS[1:]]
    return np.concatenate([toks.embed.values[None], toks.resid.values])


# ------------------------------------------------------------------------------------------------------------- real files


def test_real_files_of_vllm_hold_what_transformers_computes(store: Store) -> None:
    summary = bring(REAL / "prompts", store, strict=True)
    assert (summary.imported, len(summary.notes)) == (3, 1), "of unknown text"
    expected, found = truth(LENGTHS), slots(store, PROMPTS)
    np.testing.assert_array_equal(found[0], expected[0], err_msg="embeddings are looked up")
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    assert store.tokens("m", prompts=PROMPTS).token_id.values.tolist() == [i for ids in PROMPTS for i in ids]
    assert "generated" not in store.tokens("m").coords


def test_real_files_with_generated_tokens_say_which_these_are(store: Store) -> None:
    summary = bring(REAL / "outputs", store, prompts=PROMPTS, strict=True)
    assert summary.imported == 3
    expected, found = truth([len(ids) for ids in WHOLE]), slots(store, WHOLE)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    toks = store.tokens("m", prompts=WHOLE)
    assert toks.generated.dtype == bool
    assert toks.generated.values.tolist() == [int(i >= n) for n, ids in zip(LENGTHS, WHOLE, strict=True) for i in range(len(ids))]
    assert toks.token_id.values[toks.generated.values].tolist() == [i for answer in ABOUT["generated"] for i in answer[:-1]]


def test_real_files_of_8_bits_are_as_near_as_these_can_be(store: Store) -> None:
    bring(REAL / "fp8", store, prompts=PROMPTS, strict=True)
    expected, found = truth(LENGTHS), slots(store, PROMPTS)
    # Three bits of mantissa, and one scale for all values of a token, of which the largest is 448.
    scales = np.abs(expected).max(axis=(0, 2), keepdims=True) / 448
    assert (np.abs(found - expected) <= np.abs(expected) * 2**-4 * 1.001 + scales * 2**-9).all()
    assert np.abs(found - expected).max() > 0


# -------------------------------------------------------------------------------------------------------- generated tokens


@pytest.mark.parametrize("n_prompt", [LENGTHS, dict(enumerate(LENGTHS)), np.array(LENGTHS)], ids=["list", "mapping", "array"])
def test_lengths_of_prompts_mark_generated_tokens_as_their_ids_do(store: Store, n_prompt: Any) -> None:
    bring(REAL / "outputs", store, n_prompt=n_prompt, strict=True)
    generated = store.tokens("m", prompts=WHOLE).generated.values
    assert generated.tolist() == [int(i >= n) for n, ids in zip(LENGTHS, WHOLE, strict=True) for i in range(len(ids))]


def test_one_length_is_that_of_every_file(store: Store) -> None:
    bring(REAL / "outputs", store, n_prompt=2, strict=True)
    assert store.tokens("m", prompts=WHOLE).generated.values.tolist() == [int(i >= 2) for ids in WHOLE for i in range(len(ids))]


def test_texts_name_prompts_alone_and_never_prompts_with_answers(store: Store) -> None:
    texts = ["a", "b", "c"]
    summary = bring(REAL / "outputs", store, n_prompt={0: LENGTHS[0], 1: len(WHOLE[1]), 2: LENGTHS[2]}, prompts=texts)
    assert any("generated tokens too" in note.text and note.count == 2 for note in summary.notes)
    assert set(store.dataset("m").prompt.values) == {prompt_sha256(p)[:16] for p in (WHOLE[0], "b", WHOLE[2])}


def test_files_that_contradict_what_is_given_of_their_prompts_are_passed_by(store: Store) -> None:
    given = [[2, 40, 42], PROMPTS[1], [*WHOLE[2], 5]]
    summary = bring(REAL / "outputs", store, prompts=given)
    assert summary.imported == 1
    assert sorted(reason.text for reason in summary.skipped) == [
        "files whose token ids do not begin with those that are given of their prompt",
        "files with fewer tokens than their prompt has",
    ]


def test_files_without_token_ids_are_known_by_those_that_are_given(tmp_path: Path, store: Store) -> None:
    for path in copy(REAL / "prompts", tmp_path / "hs"):
        tensors = read_safetensors(path.read_bytes())
        path.write_bytes(safetensors_bytes({"hidden_states": tensors["hidden_states"]}))
    assert bring(tmp_path / "hs", store, prompts=PROMPTS).imported == 3
    np.testing.assert_allclose(slots(store, PROMPTS), truth(LENGTHS), atol=1e-5)


def test_a_second_import_adds_which_tokens_were_generated(store: Store) -> None:
    assert bring(REAL / "outputs", store).imported == 3
    again = bring(REAL / "outputs", store, prompts=PROMPTS)
    assert (again.imported, again.groups) == (3, bring(REAL / "outputs", store, dry_run=True).groups)
    assert store.tokens("m", prompts=WHOLE).generated.values.sum() == 9
    assert bring(REAL / "outputs", store, prompts=PROMPTS).stored == 3


@pytest.mark.parametrize(
    ("given", "error"),
    [({"n_prompt": 0}, InvalidArgumentError), ({"n_prompt": [3, -1]}, InvalidArgumentError), ({"n_prompt": True}, InvalidTypeError),
     ({"n_prompt": [2.5]}, InvalidTypeError), ({"n_prompt": "3"}, InvalidTypeError), ({"n_prompt": {0: None}}, InvalidTypeError),
     ({"n_prompt": 3, "prompts": PROMPTS}, InvalidArgumentError), ({"prompts": [[1.5]]}, InvalidTypeError),
     ({"prompts": [[]]}, InvalidTypeError), ({"prompts": [[[1], [2, 3]]]}, InvalidTypeError), ({"prompts": {"0": "a"}}, InvalidTypeError),
     ({"prompts": {0: None}}, InvalidTypeError)],
)  # fmt: skip
def test_lengths_that_cannot_be_are_refused(store: Store, given: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        bring(REAL / "outputs", store, **given)
    assert not store.models()


# ---------------------------------------------------------------------------------------------------- while others write


def copy(source: Path, target: Path) -> list[Path]:
    shutil.copytree(source, target)
    return sorted(target.glob("*.safetensors"))


@contextmanager
def held(path: Path) -> Iterator[None]:
    """A file that another process holds locked, as vLLM does while it writes."""
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        yield
        holder.communicate("")


def test_a_file_whose_lock_is_held_is_passed_by_until_it_is_written(tmp_path: Path, store: Store) -> None:
    paths = copy(REAL / "prompts", tmp_path / "hs")
    with held(Path(f"{paths[0]}.lock")), held(tmp_path / "hs" / "9-00000000.safetensors.lock"):
        summary = bring(tmp_path / "hs", store)
        assert summary.imported == 2
        (skipped,) = summary.skipped
        assert sorted(skipped.names) == [paths[0].name, "9-00000000.safetensors"]
        assert "another process holds their lock" in skipped.text
        with pytest.raises(CorruptFileError, match="holds their lock"):
            bring(tmp_path / "hs", lz.open_store(tmp_path / "other"), strict=True)
    later = bring(tmp_path / "hs", store)
    assert (later.imported, later.stored) == (1, 2)
    assert "nobody holds it" in later.skipped[0].text, "the one that was never written"


def test_empty_and_half_written_and_damaged_files_are_told_apart(tmp_path: Path, store: Store) -> None:
    paths = copy(REAL / "outputs", tmp_path / "hs")
    data = paths[0].read_bytes()
    cases = {"empty": data[:0], "a few bytes": data[:5], "in the header": data[:30], "in the values": data[:-1], "longer": data + b"\0",
             "no header": b"\xff" * 100}  # fmt: skip
    for name, content in cases.items():
        (tmp_path / "hs" / f"{name}.safetensors").write_bytes(content)
    summary = bring(tmp_path / "hs", store)
    assert summary.imported == 3
    found = {reason.text.split(":")[0]: {name.removesuffix(".safetensors") for name in reason.names} for reason in summary.skipped}
    assert found == {
        "empty files": {"empty"},
        "half-written files": {"a few bytes", "in the header", "in the values"},
        "damaged files": {"longer", "no header"},
    }


# ---------------------------------------------------------------------------------------------------------- several folders


def test_several_folders_are_one_import(tmp_path: Path, store: Store) -> None:
    _, second, third = copy(REAL / "outputs", tmp_path / "a")
    (tmp_path / "b").mkdir()
    second.rename(tmp_path / "b" / second.name)
    shutil.copy(third, tmp_path / "b" / "7-00000000.safetensors")
    (tmp_path / "b" / "8-00000000.safetensors").touch()
    summary = bring([tmp_path / "a", tmp_path / "b"], store, n_prompt={0: LENGTHS[0], 1: LENGTHS[1], 2: LENGTHS[2], 7: LENGTHS[2]})
    assert (summary.imported, summary.found) == (3, 3)
    assert summary.source == f"{tmp_path / 'a'}, {tmp_path / 'b'}"
    names = {name for reason in summary.skipped for name in reason.names}
    assert {f"{tmp_path / 'b'}/7-00000000.safetensors", f"{tmp_path / 'b'}/8-00000000.safetensors"} <= names
    np.testing.assert_allclose(slots(store, WHOLE), truth([len(ids) for ids in WHOLE]), atol=1e-5)
    assert store.tokens("m").generated.values.sum() == 9


def test_a_number_in_two_folders_takes_nothing_that_is_given_by_number(tmp_path: Path, store: Store) -> None:
    copy(REAL / "outputs", tmp_path / "a")
    copy(REAL / "prompts", tmp_path / "b")
    summary = bring([tmp_path / "a", tmp_path / "b"], store, prompts={0: "a text"})
    assert summary.imported == 4
    (skipped,) = summary.skipped
    assert skipped.count == 2
    assert "one number" in skipped.text
    with pytest.raises(InvalidArgumentError, match="no folder"):
        bring([], store)


# -------------------------------------------------------------------------------------------------------------- provenance


def test_what_an_engine_computed_is_a_group_of_its_own(tmp_path: Path, store: Store) -> None:
    np.save(tmp_path / "layer_0.npy", truth(LENGTHS)[1])
    np.save(tmp_path / "offsets.npy", np.cumsum([0, *LENGTHS]))
    import_npy(tmp_path, store, model="m", prompts=PROMPTS, progress=False)
    summary = bring(REAL / "prompts", store)
    (group,) = summary.groups
    assert store.groups()[group].provenance == {"engine": "vllm"}
    assert len(store.groups()) == 2
    assert store.tokens("m", provenance={"engine": "vllm"}, prompts=PROMPTS).sizes["layer"] == 3
    bring(REAL / "prompts", store, provenance={"engine": "vllm 0.32.0", "compute_dtype": "float32"})
    assert {"engine": "vllm 0.32.0", "compute_dtype": "float32"} in [dict(info.provenance) for info in store.groups().values()]


def test_a_folder_that_an_earlier_version_imported_is_continued_in_its_group(tmp_path: Path, store: Store) -> None:
    paths = copy(REAL / "prompts", tmp_path / "hs")
    late = paths[2].rename(tmp_path / "late.safetensors")
    # As it was before: a source of these files without a word of the engine.
    source = VllmFiles(open_files(tmp_path / "hs"), layer_ids=LAYER_IDS)
    older = lz.import_source(source, store, model="m", progress=False)
    assert store.groups()[older.groups[0]].provenance == {}
    late.rename(paths[2])
    again = bring(tmp_path / "hs", store)
    assert (again.groups, again.stored, again.imported) == (older.groups, 2, 1)
    np.testing.assert_allclose(slots(store, PROMPTS), truth(LENGTHS), atol=1e-5)
    other = bring(REAL / "outputs", store)
    assert other.groups != older.groups, "another folder"
    assert store.groups()[other.groups[0]].provenance == {"engine": "vllm"}
