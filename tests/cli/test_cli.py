"""The command line as its users meet it: output, JSON, exit codes, one plain line for an expected error."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from command_line import call, call_json
from stores import GROUP, make_batch

import lmprobe_zarr as lz
from lmprobe_zarr.cli import main
from lmprobe_zarr.cli.arguments import parse_layers
from lmprobe_zarr.cli.prompt_files import read_prompts
from lmprobe_zarr.errors import InvalidArgumentError


@pytest.fixture
def stored(tmp_path: Path) -> str:
    store = lz.open_store(tmp_path / "s")
    texts = [f"prompt {i}" for i in range(40)]
    labels = [i % 2 for i in range(40)]
    store.write(GROUP, make_batch(texts, columns={"label": labels, "pair": [i // 2 for i in range(40)]}))
    return store.url


# ------------------------------------------------------------------------------------------------------------ prompt files


def test_prompts_from_txt_jsonl_and_csv(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\ufeffone\n\n  two  \nthree", encoding="utf-8")
    assert read_prompts(str(tmp_path / "p.txt")) == (["one", "two", "three"], {})
    (tmp_path / "p.jsonl").write_text('{"text": "one", "y": 1}\n\n{"text": "tw\\u00f6", "y": 2}\n')
    assert read_prompts(str(tmp_path / "p.jsonl"), columns=["y"]) == (["one", "twö"], {"y": [1, 2]})
    (tmp_path / "q.jsonl").write_text('"one"\n"two"\n')
    assert read_prompts(str(tmp_path / "q.jsonl")) == (["one", "two"], {})
    (tmp_path / "c.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    assert read_prompts(str(tmp_path / "c.jsonl"), text_column="messages") == ([[{"role": "user", "content": "hi"}]], {})
    (tmp_path / "p.csv").write_text('q,y,w,s\n"one, and",1,0.5,a\n"two\nlines",0,1,b\n')
    prompts, columns = read_prompts(str(tmp_path / "p.csv"), text_column="q", columns=["y", "w", "s"])
    assert prompts == ["one, and", "two\nlines"]
    assert columns == {"y": [1, 0], "w": [0.5, 1.0], "s": ["a", "b"]}


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["1", "", "3"], [1, None, 3]),
        (["true", "", "FALSE"], [True, None, False]),
        (["x", "", "3"], ["x", None, "3"]),
        (["", "", ""], [None, None, None]),
        (["x", "NA", " "], ["x", "NA", " "]),
        ([str(2**63), "", "3"], [str(2**63), None, "3"]),
        (["1e999", "", "3"], ["1e999", None, "3"]),
        (["1_000", "2", "3"], ["1_000", "2", "3"]),
        (["\uff11", "2", "3"], ["\uff11", "2", "3"]),
        ([" 1", "2", "3"], [" 1", "2", "3"]),
        ([str(2**63), "2", "3"], [str(2**63), "2", "3"]),
        ([str(2**63 - 1), "-2", "+3"], [2**63 - 1, -2, 3]),
        (["1e999", "2", "3"], ["1e999", "2", "3"]),
        ([str(2**53 + 1), "0.5", "3"], [str(2**53 + 1), "0.5", "3"]),
        (["inf", ".5", "-1e3"], [np.inf, 0.5, -1000.0]),
    ],
)
def test_a_cell_of_a_csv_is_a_number_only_where_it_stays_the_same(tmp_path: Path, cells: list[str], expected: list[Any]) -> None:
    (tmp_path / "p.csv").write_text("text,y\n" + "".join(f'p{i},"{cell}"\n' for i, cell in enumerate(cells)), encoding="utf-8")
    _, columns = read_prompts(str(tmp_path / "p.csv"), columns=["y"])
    assert columns["y"] == expected
    assert list(map(type, columns["y"])) == list(map(type, expected))


def test_null_in_jsonl_is_a_missing_value(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"text": "one", "y": null, "s": ""}\n{"text": "two", "y": 2, "s": null}\n')
    assert read_prompts(str(tmp_path / "p.jsonl"), columns=["y", "s"]) == (["one", "two"], {"y": [None, 2], "s": ["", None]})


def test_columns_of_a_csv_are_read_for_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("text,id,seen,w,n,s\na,007,true,0.5,1,x\nb,008,False,,2,\n")
    _, columns = read_prompts(str(tmp_path / "p.csv"), columns=["id", "seen", "w", "n", "s"])
    assert columns["id"] == ["007", "008"]
    assert columns["seen"] == [True, False]
    assert columns["w"][0] == 0.5
    assert np.isnan(columns["w"][1])
    assert columns["n"] == [1, 2]
    assert columns["s"] == ["x", None]


def test_prompts_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"text": "one", "y": "a"}\n'))
    assert read_prompts("-", file_format="jsonl", columns=["y"]) == (["one"], {"y": ["a"]})


@pytest.mark.parametrize(
    ("name", "content", "columns", "message"),
    [
        ("p.jsonl", '{"text": "one"}\n{"txt": "two"}\n', [], "line 2 has no 'text'"),
        ("p.jsonl", '{"text": "one"}\n{"text": \n', [], "line 2 is not JSON"),
        ("p.jsonl", "[1]\n", [], "line 1 is neither"),
        ("p.csv", "text,y\none,1\n", ["label"], "no 'label': its columns are 'text', 'y'"),
        ("p.csv", 'text\n"one\n', [], "is not CSV"),
        ("p.csv", "text,y\nThe cat, it sat,1\n", ["y"], "line 2 has 3 fields, and the header has 2"),
        ("p.csv", "text,y,y\none,1,2\n", ["y"], "a column twice in its header"),
        ("p.jsonl", '{"text": null, "y": 1}\n', ["y"], "line 1: 'text' is null"),
        (
            "p.jsonl",
            '{"text": "one", "y": 1}\n{"text": "half \\ud83d", "y": 2}\n',
            ["y"],
            r"line 2: 'text' is 'half .ud83d', .* lone surrogate",
        ),
        ("p.jsonl", '{"text": "one", "y": "\\udc00"}\n', ["y"], r"line 1: 'y' is '.udc00', .* lone surrogate"),
        ("p.txt", "one\n", ["label"], "no columns"),
        ("p.parquet", "one\n", [], "--format"),
    ],
)
def test_prompt_files_that_cannot_be_read_say_where(tmp_path: Path, name: str, content: str, columns: list[str], message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InvalidArgumentError, match=message):
        read_prompts(str(tmp_path / name), columns=columns)
    with pytest.raises(InvalidArgumentError, match="cannot be read"):
        read_prompts(str(tmp_path / "nowhere.txt"))
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidArgumentError, match="cannot be read"):
        read_prompts(str(tmp_path / "binary.txt"))


def test_layers_are_parsed_as_typed() -> None:
    assert parse_layers("middle") == "middle"
    assert parse_layers("0,4,-1") == [0, 4, -1]
    assert parse_layers("8:24") == slice(8, 24)
    assert parse_layers("::2") == slice(None, None, 2)
    for bad in ("most", "1;2", "1:2:3:4", ""):
        with pytest.raises(InvalidArgumentError, match="--layers"):
            parse_layers(bad)


# --------------------------------------------------------------------------------------------------------- info, show, sweep


def test_info_describes_the_store(stored: str, capsys: pytest.CaptureFixture[str]) -> None:
    document = call_json(capsys, "info", stored)
    (group,) = document["groups"]
    assert (group["model"], group["prompts"], group["layers"], group["parts"]) == ("acme/toy", 40, [0, 1, 3], 1)
    assert group["variables"] == {"resid_mean": "float32", "resid": "float32"}
    on_disk = sum(f.stat().st_size for f in Path(stored).glob("*/*/**/*") if f.is_file() and f.parent.parent.name != GROUP.name[:0])
    documents = sum(f.stat().st_size for f in Path(stored).glob("*/*/zarr.json"))
    assert group["nbytes"] == on_disk - documents
    _, out, _ = call(capsys, "info", stored)
    assert "acme/toy" in out
    assert "layers     0-1, 3 of 4" in out
    assert "revision=abc" in out


def test_show_prints_the_view_or_its_prompts(stored: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = call(capsys, "show", stored)
    assert "<xarray.Dataset>" in out
    assert "resid_mean" in out
    _, out, _ = call(capsys, "show", stored, "--list", "2")
    head, first, _ = out.splitlines()
    assert head.split() == ["prompt", "label", "n_tokens", "pair", "prompt_length", "text"]
    assert first.endswith("prompt 0")
    document = call_json(capsys, "show", stored, "--level", "tokens", "--prompt", "prompt 3", "--list", "3")
    assert document["variables"]["resid"]["dims"] == ["layer", "token", "hidden"]
    assert {row["text"] for row in document["rows"]} == {"prompt 3"}
    assert [row["position"] for row in document["rows"]] == [0, 1, 2]


def test_info_lists_the_columns_that_were_given(stored: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call_json(capsys, "info", stored)["groups"][0]["columns"] == ["label", "pair"]
    _, out, _ = call(capsys, "info", stored)
    (line,) = (line for line in out.splitlines() if line.startswith("  columns"))
    assert line.split() == ["columns", "label,", "pair"]


def test_show_lists_ten_prompts_where_no_number_is_given(stored: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "show", stored, "--list")
    assert (code, len(out.splitlines())) == (0, 1 + 10)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("ls", "did you mean info, which lists what a store holds, or show --list, which lists its prompts?"),
        ("list", "or show --list, which lists its prompts?"),
        ("rm", "did you mean delete for prompts"),
        ("swep", "did you mean sweep?"),
    ],
)
def test_a_word_of_another_program_is_answered_by_the_command(word: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main([word])
    assert error.value.code == 2
    assert says in capsys.readouterr().err


def test_sweep_prints_a_table_and_draws(stored: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "scores.png"
    code, out, err = call(
        capsys, "sweep", stored, "--variable", "resid_mean", "--probes", "ridge,mass_mean", "--cv", "2", "--plot", str(picture)
    )
    assert code == 0, err
    assert out.splitlines()[1].split() == ["layer", "probe", "accuracy", "auroc"]
    assert len(out.splitlines()) == 2 + 6 + 1
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert "\r" not in err, "no progress bar where there is no terminal"
    document = call_json(capsys, "sweep", stored, "--variable", "resid_mean", "--cv", "2", "--layers", "1:", "--groups", "pair")
    assert [row["layer"] for row in document["scores"]] == [1, 3]
    ours = lz.sweep(lz.open_store(stored).dataset(layers=[1, 3]).resid_mean, labels="label", cv=2, groups="pair")
    np.testing.assert_allclose([row["accuracy"] for row in document["scores"]], ours.accuracy.mean("fold").values[:, 0])


def test_sweep_says_what_it_fitted_on_which_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, rng = lz.open_store(tmp_path / "s"), np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "topic": [None, None, *["animal", "food"] * 19],
            "thing": np.arange(40) // 2,
            "size": rng.normal(size=40),
            "many": np.arange(40) % 20,
        }
    )
    table["many"] = np.arange(40) % 20
    table["split"] = np.where(table.thing < 14, "train", "test")
    values = {0: rng.normal(size=(40, 4)).astype("float32")}
    columns = {str(name): column.tolist() for name, column in table.items()}
    lz.write_activations(store, model="m", prompts=[f"p{i}" for i in range(40)], pooled={"resid_mean": values}, coords=columns)

    def first(*options: str) -> str:
        code, out, err = call(capsys, "sweep", store.url, *options)
        assert code == 0, err
        return out.splitlines()[0]

    drop = ("--labels", "topic", "--missing", "drop")
    counts = table.topic.value_counts()
    what = f"animal: {counts['animal']}, food: {counts['food']}; {table.topic.isna().sum()} prompts without label left out"
    assert first(*drop, "--groups", "thing") == f"topic ({what}) from resid_mean, 5 folds by thing"
    assert first(*drop, "--cv", "2", "--repeats", "3") == f"topic ({what}) from resid_mean, 2 folds, drawn 3 times"
    tested = table[table.split == "test"].topic.value_counts()
    what = f"animal: {tested['animal']}, food: {tested['food']} tested; 2 prompts without label left out"
    assert first(*drop, "--split", "split") == f"topic ({what}) from resid_mean, split by split"
    assert first("--labels", "size", "--task", "regression") == "size (40 prompts) from resid_mean, 5 folds"
    assert first("--labels", "many", "--cv", "2", "--metrics", "accuracy") == "many (20 classes of 2 prompts) from resid_mean, 2 folds"
    document = call_json(capsys, "sweep", store.url, *drop, "--groups", "thing")
    assert document["classes"] == [{"label": str(name), "prompts": int(count)} for name, count in counts.sort_index().items()]
    assert (document["prompts"], document["left_out"], document["folds"], document["groups"]) == (38, 2, 5, "thing")


def test_sweep_chooses_within_training_folds_and_prints_what_was_chosen(stored: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["sweep", stored, "--variable", "resid_mean", "--probes", "ridge,mass_mean", "--cv", "2", "--controls", "majority"]
    code, out, err = call(capsys, *options, "--choose", "layer")
    assert code == 0, err
    lines = out.splitlines()[1:]
    assert lines[0].split() == ["probe", "accuracy", "auroc", "chosen", "layers"]
    assert [line.split()[0] for line in lines[1:4]] == ["ridge", "mass_mean", "majority"]
    assert lines[3].split()[-1] == "-"
    assert lines[4] == "chosen: layer, in each fold by accuracy over 5 inner folds of its training prompts"
    document = call_json(capsys, *options, "--choose", "layer,probe")
    ours = lz.sweep(
        lz.open_store(stored).dataset().resid_mean, "label", ["ridge", "mass_mean"], 2, choose=["layer", "probe"], controls="majority"
    )
    assert [row["probe"] for row in document["scores"]] == ["chosen", "majority"]
    np.testing.assert_allclose([row["accuracy"] for row in document["scores"]], ours.accuracy.mean("fold"))
    assert document["scores"][0]["chosen_layers"] == np.unique(ours.chosen_layer[0]).tolist()
    assert document["chosen"] == ours.attrs["chosen"]
    assert "chosen     layer, in each fold" in call(capsys, *options, "--choose", "layer", "--dry-run")[1]
    for bad, message in (
        ("fold", "use some of 'layer', 'probe'"),
        ("layer,probe", "Run two commands: sweep … --choose layer,probe, and sweep … --plot x.png\n"),
    ):
        code, _, err = call(capsys, *options, "--choose", bad, *(["--plot", "x.png"] if "layer" in bad else []))
        assert code != 0
        assert message in err


@pytest.mark.few(1)
@pytest.mark.parametrize(("ending", "begins"), [(".md", "| layer |"), (".tex", "% Mean"), (".csv", "layer,")])
def test_sweep_writes_a_table(stored: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, ending: str, begins: str) -> None:
    place = tmp_path / f"scores{ending}"
    options = ["sweep", stored, "--variable", "resid_mean", "--probes", "ridge,mass_mean", "--cv", "2", "--table", str(place)]
    code, out, _ = call(capsys, *options)
    assert code == 0
    assert out.splitlines()[-1] == f"table: {place}"
    ours = lz.sweep(lz.open_store(stored).dataset().resid_mean, labels="label", probes=["ridge", "mass_mean"], cv=2)
    assert place.read_text() == ours.lz.table(path=tmp_path / f"ours{ending}")
    assert place.read_text().startswith(begins)
    call_json(capsys, *options)  # one document, whatever else is written


def test_sweep_takes_controls_metrics_a_split_and_a_place(stored: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = [
        "sweep",
        stored,
        "--variable",
        "resid_mean",
        "--cv",
        "2",
        "--controls",
        "majority,shuffled_labels",
        "--metrics",
        "f1,log_loss",
    ]
    code, out, _ = call(capsys, *options, "--dry-run")
    assert code == 0
    assert "controls   majority, shuffled_labels:logistic_regression" in out
    document = call_json(capsys, *options, "--out", str(tmp_path / "scores"))
    assert {row["kind"] for row in document["scores"]} == {"probe", "control"}
    assert {"f1", "log_loss", "f1_std", "log_loss_std"} < set(document["scores"][0])
    assert call_json(capsys, *options, "--out", str(tmp_path / "scores")) == document
    assert call_json(capsys, *options, "--dry-run")["fits"] > 0
    code, out, _ = call(capsys, *options)
    assert out.splitlines()[1].split() == ["layer", "probe", "f1", "log_loss"]


def test_sweep_shuffles_as_often_as_the_control_says_and_shows_p_values(stored: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["sweep", stored, "--variable", "resid_mean", "--cv", "2", "--layers", "0", "--controls", "majority,shuffled_labels=4"]
    probe, *controls = call_json(capsys, *options)["scores"]
    assert probe["accuracy_p_value"] in (0.2, 0.4, 0.6, 0.8, 1.0)
    assert "auroc_p_value" in probe
    assert not any("accuracy_p_value" in row for row in controls)
    lines = call(capsys, *options)[1].splitlines()[1:]
    assert f"p={probe['accuracy_p_value']:.2g}" in lines[1]
    assert "p=" not in lines[2]
    # The control is a mean of shuffles, and its spread is theirs.
    drawn = lz.sweep(
        lz.open_store(stored).dataset(layers=[0]).resid_mean, "label", cv=2, controls={"majority": None, "shuffled_labels": 4}
    ).accuracy_shuffled.values[0, 0]
    shuffled = next(row for row in controls if row["probe"].startswith("shuffled_labels"))
    assert shuffled["accuracy_std"] == pytest.approx(np.std(drawn))
    assert f"{np.mean(drawn):.3f} ± {np.std(drawn):.3f}" in next(line for line in lines if "shuffled_labels:" in line)
    assert any(line.startswith("shuffled_labels: ± over its 4 shuffles") for line in lines)
    assert "p: the permutation p-value of each layer by itself; of 4 shuffles it is at least 1/5 = 0.2." in lines
    options[options.index("--layers") + 1] = "0,1,3"
    rows = [row for row in call_json(capsys, *options)["scores"] if row["kind"] == "probe"]
    best = max(rows, key=lambda row: row["accuracy"])
    said = next(line for line in call(capsys, *options)[1].splitlines() if line.startswith("p of the best of 3 layers"))
    assert f"logistic_regression: accuracy at layer {best['layer']} has p = {best['accuracy_p_any_layer']:.2g}" in said
    counted = call_json(capsys, *options[:-1], "bag_of_tokens")["scores"][:2]
    assert [row["probe"] for row in counted] == ["logistic_regression", "bag_of_tokens"]


@pytest.mark.few(7)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["sweep", "{store}", "--variable", "resid_mean", "--controls", "length=3"],
            "shuffled_labels takes a number, as",
        ),
        (["sweep", "{store}", "--variable", "resid_mean", "--controls", "shuffled_labels=many"], "'shuffled_labels=many' is no control"),
        (["sweep", "{store}", "--variable", "resid_mean", "--controls", "shuffled_labels=0"], "such as 100, or None for once"),
        (["info", "{tmp}/nowhere"], "there is no store at"),
        (["show", "{store}", "--model", "gpt2"], "model 'gpt2' is not in"),
        (["show", "{store}", "--prompt", "unheard of"], "1 of 1 prompts are not in"),
        (["sweep", "{store}", "--variable", "resid_max"], "'resid_max' is not stored per prompt: stored are resid_mean"),
        (["show", "{store}", "--group", "nobody"], "group 'nobody' is not in"),
        (["info", "{tmp}"], "is no store of lmprobe-zarr"),
        (["sweep", "{store}", "--variable", "resid_mean", "--labels", "sentiment"], "sentiment"),
        (["sweep", "{store}", "--variable", "resid_mean", "--probes", "perceptron"], "perceptron"),
        (["sweep", "{store}", "--variable", "resid_mean", "--layers", "7"], "layer 7 is out of range"),
        (["sweep", "{store}", "--variable", "resid_mean", "--cv", "2", "--plot", "{tmp}/no/such/folder/x.png"], "x.png"),
        (
            ["sweep", "{store}", "--variable", "resid_max", "--table", "{tmp}/x.xlsx"],
            "has the ending .xlsx for a table: use one of .md",
        ),
        (["sweep", "{store}", "--variable", "resid_max", "--table", "{tmp}/no/such/folder/x.md"], "does not exist"),
        (["extract", "no/model", "{tmp}/nowhere.txt", "--store", "{tmp}/new"], "cannot be read"),
    ],
)
def test_expected_errors_are_one_plain_line_and_exit_code_1(
    stored: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, out, err = call(capsys, *(a.format(store=stored, tmp=tmp_path) for a in arguments))
    assert code == 1
    assert err.startswith("lmprobe-zarr: ")
    assert message in err
    assert "Traceback" not in err
    assert out == ""
    assert not (tmp_path / "new").exists()


def test_wrong_arguments_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["extract"], ["sweep", "s", "--cv", "five"], ["nonsense"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        capsys.readouterr()


def test_it_runs_as_a_program_and_stops_quietly_when_a_pipe_closes(stored: str) -> None:
    command = f"{sys.executable} -W error -m lmprobe_zarr show {stored} --list 40 | head -2"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120, check=True)  # noqa: S602 — a pipe is the point
    assert "prompt 0" in done.stdout
    assert done.stderr == ""
    version = subprocess.run([sys.executable, "-m", "lmprobe_zarr", "--version"], capture_output=True, text=True, timeout=120, check=True)
    assert version.stdout.strip() == f"lmprobe-zarr {lz.__version__}"


@pytest.mark.model
def test_ctrl_c_during_an_extraction_says_how_much_is_stored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    from tiny_models import save_tiny

    from lmprobe_zarr.extraction.models.passes import Job

    model = str(save_tiny("gpt2", tmp_path / "tiny"))
    (tmp_path / "p.txt").write_text("\n".join(f"the dog {'walks ' * number}" for number in range(6)))
    command = ["extract", model, str(tmp_path / "p.txt"), "--store", str(tmp_path / "acts"), "--batch-tokens", "1"]
    real, calls = Job.collect, 0

    def interrupted(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(Job, "collect", interrupted)
        code, _, err = call(capsys, *command)
    assert code == 130
    assert err.splitlines()[-1] == "lmprobe-zarr: interrupted: 2 of 6 prompts are stored; the same command goes on from there"
    assert lz.open_store(tmp_path / "acts", mode="r").dataset().sizes["prompt"] == 2
    code, out, _ = call(capsys, *command, "--part-seconds", "0")
    assert (code, "2 found in the store, 4 extracted" in out) == (0, True)
    assert (
        call(capsys, *command, "--part-seconds", "-1")[2] == "lmprobe-zarr: --part-seconds -1.0 is not a time: give seconds, at least 0\n"
    )


def test_extract_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    from tiny_models import save_tiny

    model = str(save_tiny("gpt2", tmp_path / "gpt2"))
    lines = [{"text": f"the dog {i}", "label": i % 2} for i in range(6)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    capsys.readouterr()
    base = ["extract", model, str(tmp_path / "p.jsonl"), "--store", str(tmp_path / "acts"), "--coords", "label"]
    options = ["--layers", "0,-1", "--pooling", "mean,last_token", "--keep-tokens", "--device", "cpu"]
    plan = call_json(capsys, *base, *options, "--dry-run")
    assert (plan["missing"], plan["layers"], plan["fits"]) == (6, [0, 3], True)
    assert not (tmp_path / "acts").exists()
    code, out, err = call(capsys, *base, *options)
    assert code == 0, err
    assert "6 extracted" in out
    assert err == "", "no bar, no warning, nothing of transformers"
    assert call_json(capsys, *base, *options)["found"] == 6
    data = lz.open_store(tmp_path / "acts").dataset()
    assert data.label.values.tolist() == [0, 1] * 3
    assert sorted(map(str, data.data_vars)) == ["resid_last_token", "resid_mean"]
    code, _, err = call(capsys, "extract", str(tmp_path / "nowhere"), str(tmp_path / "p.jsonl"), "--store", str(tmp_path / "acts"))
    assert code == 1
    assert "does not exist" in err
