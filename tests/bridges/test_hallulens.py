"""What HalluLens' own code captured of a tiny Llama's answers, imported and read where it lies.

The truth is one plain pass of the same model over each prompt with its answer.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from command_line import call, call_json
from paths import DATA

import lmprobe_zarr as lz
from lmprobe_zarr.errors import CorruptFileError, InvalidArgumentError, NotAStoreError, UnsupportedVersionError

CAPTURE, GROUP = DATA / "hallulens-capture", DATA / "hallulens-zarr"
TRUTH = np.load(DATA / "hallulens-truth.npz")
N_PROMPTS = [int(n) for n in TRUTH["n_prompts"]]
IDS = [TRUTH[f"ids{i}"] for i in range(3)]
STATES = [TRUTH[f"states{i}"] for i in range(3)]
TEXTS = [f"Question {i}?" for i in range(3)]
#: Rounding to float16, and generation token by token in place of one pass.
CLOSE: dict[str, Any] = {"rtol": 2e-3, "atol": 1e-4}


def imported(folder: Path, place: Path, **options: Any) -> tuple[lz.Store, lz.ImportSummary]:
    summary = lz.import_hallulens(folder, place, progress=False, **options)
    return lz.open_store(place), summary


def check(mine: Any, states: Any, n_prompt: int) -> None:
    """Rows of one prompt against `hidden_states` of one plain pass over its tokens and those of its answer."""
    n = mine.sizes["token"]
    assert mine.layer.values.tolist() == [0, 1, 2], "the last of four blocks is stored after the final norm only"
    np.testing.assert_allclose(mine.embed, states[0, :n], **CLOSE)
    np.testing.assert_allclose(mine.resid, states[1:4, :n], **CLOSE)
    np.testing.assert_allclose(mine.last_hidden_state, states[4, :n], **CLOSE)
    if "generated" in mine.coords:
        np.testing.assert_array_equal(mine.generated, np.arange(n) >= n_prompt)


def test_rows_of_a_capture_are_those_of_the_tokens_that_were_read(tmp_path: Path) -> None:
    store, summary = imported(CAPTURE, tmp_path / "acts", strict=True)
    assert (summary.imported, summary.models) == (3, ("acme/tiny-llama",))
    (info,) = store.groups().values()
    assert info.provenance == {"engine": "hallulens"}
    tokens = store.tokens(dtype="stored")
    assert tokens.resid.dtype == np.float16
    for ids, states, n_prompt in zip(IDS, STATES, N_PROMPTS, strict=True):
        mine = tokens.sel(prompt=lz.prompt_hash(ids[:-1].tolist()))
        np.testing.assert_array_equal(mine.token_id, ids[:-1])
        check(mine, states, n_prompt)
    labels = store.dataset()
    assert [bool(labels.hallucinated.sel(prompt=lz.prompt_hash(ids[:-1].tolist()))) for ids in IDS] == [False, True, False]
    answers = tokens.isel(token=tokens.generated.values).resid.lz.pool("mean").sel(prompt=lz.prompt_hash(IDS[1][:-1].tolist()))
    assert answers.hallucinated.item() is True
    np.testing.assert_allclose(answers, STATES[1][1:4, 3:7].mean(axis=1), **CLOSE)
    _, again = imported(CAPTURE, tmp_path / "acts")
    assert (again.stored, again.imported) == (3, 0)


def test_rows_of_a_capture_are_its_bits(tmp_path: Path) -> None:
    raw = np.memmap(CAPTURE / "prompt_activations.npy", dtype="float16", mode="r", shape=(4, 5, 8, 16))
    answers = np.memmap(CAPTURE / "response_activations.npy", dtype="float16", mode="r", shape=(4, 5, 6, 16))
    opened = lz.open_legacy(CAPTURE, tool="hallulens", level="tokens", dtype="stored")
    for number, (ids, n) in enumerate(zip(IDS, N_PROMPTS, strict=True)):
        mine = opened.sel(prompt=lz.prompt_hash(ids[:-1].tolist()))
        np.testing.assert_array_equal(mine.resid.sel(layer=1)[:n], raw[number, 2, :n])
        np.testing.assert_array_equal(mine.resid.sel(layer=1)[n:], answers[number, 2, 1:5])
        np.testing.assert_array_equal(mine.embed[n - 1 : n + 2], [raw[number, 0, n - 1], *answers[number, 0, 1:3]])
        # Row 0 of an answer repeats the prompt's last.
        np.testing.assert_array_equal(answers[number, :, 0], raw[number, :, n - 1])


def test_prompts_alone_are_a_group_of_their_own(tmp_path: Path) -> None:
    for folder, prompts in ((CAPTURE, [ids[:n].tolist() for ids, n in zip(IDS, N_PROMPTS, strict=True)]), (GROUP, TEXTS)):
        imported(folder, tmp_path / folder.name, strict=True)
        store, summary = imported(folder, tmp_path / folder.name, responses=False, strict=True)
        assert summary.imported == 3
        tokens = store.tokens(dtype="stored", group=summary.groups[0])
        for prompt, states, n in zip(prompts, STATES, N_PROMPTS, strict=True):
            mine = tokens.sel(prompt=lz.prompt_hash(prompt))
            assert mine.sizes["token"] == n
            check(mine, states, n)


@pytest.mark.parametrize("below", [False, True])
def test_rows_of_a_group_are_those_of_the_tokens_that_were_read(tmp_path: Path, below: bool) -> None:
    store, summary = imported(GROUP / "activations.zarr" if below else GROUP, tmp_path / "acts", strict=True)
    assert (summary.imported, summary.models) == (3, ("acme/tiny-llama",))
    tokens = store.tokens(dtype="stored")
    opened = lz.open_legacy(GROUP, tool="hallulens", level="tokens")
    arrays: Any = zarr.open_group(GROUP / "activations.zarr", mode="r")["arrays"]
    for number, (text, states, n_prompt) in enumerate(zip(TEXTS, STATES, N_PROMPTS, strict=True)):
        mine = tokens.sel(prompt=lz.prompt_hash(text))
        np.testing.assert_array_equal(mine.resid[1, :n_prompt], arrays["prompt_activations"][number, 2, :n_prompt])
        np.testing.assert_array_equal(mine.resid[1, n_prompt:], arrays["response_activations"][number, 2, :4])
        assert mine.sizes["token"] == n_prompt + 4, "the last token of an answer is never read"
        check(mine, states, n_prompt)
        np.testing.assert_array_equal(opened.resid.sel(prompt=lz.prompt_hash(text))[1, 2:6], mine.resid[1, 2:6])
    assert store.dataset().key.sel(prompt=lz.prompt_hash(TEXTS[2])).item() == "key2"


@pytest.fixture
def capture(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CAPTURE, tmp_path / "capture"))


@pytest.fixture
def group(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GROUP / "activations.zarr", tmp_path / "group"))


def with_lines(path: Path, change: Any) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in change(lines)))


@pytest.mark.parametrize("name", ["prompt_activations.npy", "response_activations.npy", "prompt_token_ids.npy", "response_len.npy"])
@pytest.mark.parametrize("how", ["removed", "cut", "longer", "link"])
def test_a_damaged_array_of_a_capture_is_an_error_and_nothing_is_written(capture: Path, tmp_path: Path, name: str, how: str) -> None:
    victim = capture / name
    data = victim.read_bytes()
    if how == "link":
        shutil.move(victim, tmp_path / "elsewhere")
        victim.symlink_to(tmp_path / "elsewhere")
    elif how == "removed":
        victim.unlink()
    else:
        victim.write_bytes(data[:-2] if how == "cut" else data + b"\0\0")
    with pytest.raises(CorruptFileError, match=name):
        imported(capture, tmp_path / "acts")
    assert not (tmp_path / "acts").exists()


def test_lines_that_contradict_the_arrays_are_skipped_and_named(capture: Path, tmp_path: Path) -> None:
    def change(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        lines[0]["prompt_len"] = 6
        lines[1]["sample_index"] = 9
        return lines

    with_lines(capture / "meta.jsonl", change)
    with (capture / "meta.jsonl").open("a") as file:
        file.write('{"sample_index": 3, "prompt_l')  # still being written
    _, summary = imported(capture, tmp_path / "acts")
    assert (summary.imported, sum(reason.count for reason in summary.skipped)) == (1, 2)
    (capture / "meta.jsonl").write_text('{"sample_index": 0\n{}\n')
    with pytest.raises(CorruptFileError, match=r"meta\.jsonl is damaged: line 1"):
        imported(capture, tmp_path / "acts")


def test_a_prompt_that_was_cut_off_is_skipped(capture: Path, tmp_path: Path) -> None:
    def change(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        lines[0]["prompt_len"] = 9
        return lines

    with_lines(capture / "meta.jsonl", change)
    np.memmap(capture / "prompt_len.npy", dtype="int32", mode="r+", shape=(4,))[0] = 9
    _, summary = imported(capture, tmp_path / "acts")
    assert [("cut off" in reason.text, reason.count) for reason in summary.skipped] == [(True, 1)]


def test_configurations_of_other_formats_are_errors(capture: Path, tmp_path: Path) -> None:
    config = json.loads((capture / "config.json").read_text())
    changed: Any
    for changed, error in (
        ({**config, "storage_format": "inference_capture_v2"}, UnsupportedVersionError), ({**config, "hidden_dim": 15}, CorruptFileError),
        ({**config, "num_layers": "four"}, CorruptFileError), ({**config, "n_samples": -1}, CorruptFileError), ([], CorruptFileError),
    ):  # fmt: skip
        (capture / "config.json").write_text(json.dumps(changed))
        with pytest.raises(error, match=r"config\.json|prompt_activations"):
            imported(capture, tmp_path / "acts")
    del config["model_name"]
    (capture / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidArgumentError, match="model="):
        imported(capture, tmp_path / "acts")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotAStoreError, match="HalluLens"):
        imported(tmp_path / "empty", tmp_path / "acts")
    with pytest.raises(InvalidArgumentError, match="nothing does not exist: check the path"):
        imported(tmp_path / "nothing", tmp_path / "acts")


def test_a_missing_chunk_is_never_zero(group: Path, tmp_path: Path) -> None:
    victim = group / "arrays/prompt_activations/c/1/2/0/0"
    victim.unlink()
    array: Any = zarr.open_group(group, mode="r")["arrays/prompt_activations"]
    assert (array[1, 2] == 0).all(), "zarr itself reads zeros"
    store, summary = imported(group, tmp_path / "acts")
    assert summary.imported == 2
    (reason,) = summary.skipped
    assert reason.names == ("prompt key1",)
    assert lz.prompt_hash(TEXTS[1]) not in store.tokens().prompt.values
    opened = lz.open_legacy(group, tool="hallulens", level="tokens").resid.sel(prompt=lz.prompt_hash(TEXTS[1]))
    np.testing.assert_allclose(opened[0], STATES[1][1, :7], **CLOSE)
    with pytest.raises(CorruptFileError, match="c/1/2/0/0 is missing"):
        opened[1].compute()


@pytest.mark.parametrize(("target", "layers", "others"), [("first_half", [0], {"embed"}), ("second_half", [1, 2], {"last_hidden_state"})])
def test_layers_that_were_not_stored_are_not_there(group: Path, tmp_path: Path, target: str, layers: list[int], others: set[str]) -> None:
    with_lines(group / "meta/index.jsonl", lambda lines: [{**line, "logging_config": {"target_layers": target}} for line in lines])
    store, _ = imported(group, tmp_path / "acts", strict=True)
    tokens = store.tokens()
    assert (tokens.layer.values.tolist(), set(tokens.data_vars)) == (layers, {"resid", *others})
    np.testing.assert_allclose(tokens.resid.sel(prompt=lz.prompt_hash(TEXTS[0])), STATES[0][[n + 1 for n in layers], :11], **CLOSE)


def test_lines_of_a_group_that_do_not_say_enough_are_skipped(group: Path, tmp_path: Path) -> None:
    def change(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        lines[0]["input_length"] = 12
        del lines[1]["logging_config"]
        lines[2]["response_len"] = 3
        return [*lines, {"key": "metadata only", "sample_index": None}]

    with_lines(group / "meta/index.jsonl", change)
    with pytest.raises(CorruptFileError, match="strict=True") as caught:
        imported(group, tmp_path / "acts", strict=True)
    assert all(f"key{number}" in str(caught.value) for number in range(3))
    with_lines(group / "meta/index.jsonl", lambda lines: [{**line, "model": f"m{n}"} for n, line in enumerate(lines[:3])])
    with pytest.raises(InvalidArgumentError, match="'m0', 'm1', 'm2'"):
        imported(group, tmp_path / "acts")
    (group / "meta/index.jsonl").unlink()
    with pytest.raises(CorruptFileError, match=r"index\.jsonl is missing"):
        imported(group, tmp_path / "acts")


@pytest.mark.parametrize("separator", [".", "/"])
def test_groups_of_the_older_zarr_format_are_read(group: Path, tmp_path: Path, separator: Any) -> None:
    source, target = zarr.open_group(group, mode="r"), zarr.open_group(tmp_path / "older", mode="w", zarr_format=2)
    for name in ("prompt_activations", "response_activations", "prompt_len", "response_len"):
        array: Any = source[f"arrays/{name}"]
        made = target.create_array(
            f"arrays/{name}", shape=array.shape, chunks=array.chunks, dtype=array.dtype, compressors=None, fill_value=0,
            chunk_key_encoding={"name": "v2", "separator": separator},
        )  # fmt: skip
        made[...] = array[...]
    shutil.copytree(group / "meta", tmp_path / "older/meta")
    store, _ = imported(tmp_path / "older", tmp_path / "acts", strict=True)
    for text, states, n_prompt in zip(TEXTS, STATES, N_PROMPTS, strict=True):
        check(store.tokens(dtype="stored").sel(prompt=lz.prompt_hash(text)), states, n_prompt)


def test_compressed_chunks_and_damaged_documents_are_errors(group: Path, tmp_path: Path) -> None:
    document = group / "arrays/response_activations/zarr.json"
    said = json.loads(document.read_text())
    changed: Any
    for changed in (
        {**said, "codecs": [*said["codecs"], {"name": "zstd", "configuration": {"level": 1}}]}, {**said, "shape": [3]},
        {**said, "data_type": "int16"}, {key: value for key, value in said.items() if key != "chunk_grid"}, [],
    ):  # fmt: skip
        document.write_text(json.dumps(changed))
        with pytest.raises(CorruptFileError, match="response_activations"):
            imported(group, tmp_path / "acts")


def test_tools_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.txt").write_text("one\ntwo\nthree\n")
    to = ["--to", str(tmp_path / "acts")]
    summary: Any = call_json(capsys, "import", "--tool", "hallulens", "--from", str(GROUP), *to, "--tool-options", '{"responses": false}')
    assert (summary["imported"], summary["tokens"]) == (3, sum(N_PROMPTS))
    run = str(DATA / "activault-run")
    mapping = '{"mapping": {"resid": {"0": "blocks.0.hook_resid_post"}}}'
    summary = call_json(capsys, "import", "--tool", "activault", "--from", run, *to, "--tool-options", mapping, "--strict")
    assert summary["imported"] == 4
    saved = ["--tool", "probelab", "--from", str(DATA / "probelab-0.1.0/memmap"), *to]
    summary = call_json(capsys, "import", *saved, "--model", "m", "--prompts", str(tmp_path / "p.txt"))
    assert summary["imported"] == 3
    for arguments, said in (
        (["--tool", "activault", *to], "--from"), (saved, "--prompts"), ([*saved, "--prompts", str(tmp_path / "p.txt")], "--model"),
        (["--tool", "activault", "--from", run, *to, "--tool-options", "{"], "no JSON"), ([*to], "--tool"),
        (["--tool", "activault", "--from", run, *to, "--tool-options", '{"layer": 3}'], "layer"),
        (["--tool", "activault", "--from", run, *to, "--tool-options", '{"store": "x"}'], "mapping, responses"),
        (["--all", "--tool-options", "{}"], "--tool"),
    ):  # fmt: skip
        code, _, err = call(capsys, "import", *arguments)
        assert code == 1
        assert said in err
