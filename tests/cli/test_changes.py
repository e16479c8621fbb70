"""The commands that change what is stored: columns added, variables dropped, copies; and what all commands share at their edges."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pytest
from command_line import call, call_json
from stores import GROUP, make_batch

import lmprobe_zarr as lz
from lmprobe_zarr.cli import main
from lmprobe_zarr.reports.groups import find_groups

TEXTS = [f"prompt {i}" for i in range(40)]


@pytest.fixture
def stored(tmp_path: Path) -> str:
    store = lz.open_store(tmp_path / "s")
    store.write(GROUP, make_batch(TEXTS, columns={"label": [i % 2 for i in range(40)], "pair": [i // 2 for i in range(40)]}))
    return store.url


# ------------------------------------------------------------------------------------------------------------------ annotate


def test_annotate_adds_columns_of_a_file(stored: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "new.csv").write_text("text,tone,score\n" + "".join(f"{text},t{i % 3},{i / 2}\n" for i, text in enumerate(TEXTS)))
    said = call_json(capsys, "annotate", stored, str(tmp_path / "new.csv"), "--columns", "tone,score")
    assert (said["columns"], said["prompts"]) == (["tone", "score"], 40)
    data = lz.open_store(stored).dataset(prompts=TEXTS)
    assert data.tone.values.tolist() == [f"t{i % 3}" for i in range(40)]
    np.testing.assert_array_equal(data.score.values, np.arange(40) / 2)


@pytest.mark.parametrize("quoted", [False, True])
def test_empty_cells_are_what_a_table_of_pandas_with_gaps_is(
    quoted: bool, stored: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty, rng = '""' if quoted else "", np.random.default_rng(0)
    full = {
        "topic": [("animal", "food")[i % 2] for i in range(40)],
        "count": [str(i) for i in range(40)], "score": [f"{i}.5" for i in range(40)],
        "seen": [("true", "False")[i % 2] for i in range(40)], "id": [f"{i:03}" for i in range(40)],
    }  # fmt: skip
    given = {name: [empty if gap else cell for cell, gap in zip(cells, rng.random(40) < 0.2, strict=True)] for name, cells in full.items()}
    for name, columns in (("all.csv", full), ("some.csv", given | {"none": [empty] * 40})):
        rows = zip(TEXTS, *columns.values(), strict=True)
        (tmp_path / name).write_text("\n".join(map(",".join, [("text", *columns), *rows])) + "\n")
    for name, columns in (("all.csv", full), ("some.csv", given | {"none": [empty] * 40})):
        said = call_json(capsys, "annotate", stored, str(tmp_path / name), "--columns", ",".join(columns))
        assert said["missing"] == {column: sum(cell == empty for cell in cells) for column, cells in columns.items()}
    shown = lz.open_store(stored).dataset(prompts=TEXTS)

    read: dict[str, Any] = {"index_col": "text", "keep_default_na": False, "na_values": [""], "dtype": {"id": object, "topic": object}}
    other = lz.open_store(tmp_path / "other")
    other.write(GROUP, make_batch(TEXTS))
    other.annotate(None, pd.read_csv(tmp_path / "all.csv", **read))
    gaps = pd.read_csv(tmp_path / "some.csv", **read)
    other.annotate(None, gaps.astype({"count": "Int64", "seen": "boolean"}))
    expected = other.dataset(prompts=TEXTS)
    for name in (*full, "none"):
        np.testing.assert_array_equal(shown[name].isnull(), gaps[name].isna(), err_msg=name)
        pd.testing.assert_series_equal(shown[name].lz.to_series(), expected[name].lz.to_series())
    assert "" not in shown.topic.values.tolist()


def test_annotate_says_how_many_prompts_have_a_value(stored: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "new.csv").write_text("text,topic,n\n" + "".join(f"{text},{'' if i < 2 else 'food'},1\n" for i, text in enumerate(TEXTS)))
    assert call(capsys, "annotate", stored, str(tmp_path / "new.csv"), "--columns", "topic,n") == (
        0,
        f"topic: 38 prompts with a value, 2 missing, in {stored}\nn: 40 prompts in {stored}\n",
        "",
    )


@pytest.mark.parametrize("n", [2, 8])
def test_empty_labels_are_no_class(n: int, stored: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "new.csv").write_text("text,topic\n" + "".join(f"{t},{'' if i < n else ('x', 'y')[i % 2]}\n" for i, t in enumerate(TEXTS)))
    assert call(capsys, "annotate", stored, str(tmp_path / "new.csv"), "--columns", "topic")[0] == 0
    code, _, err = call(capsys, "sweep", stored, "--labels", "topic", "--variable", "resid_mean")
    assert code == 1
    assert f"labels 'topic' miss {n} of 40 prompts" in err
    assert "--missing drop" in err
    assert call(capsys, "sweep", stored, "--labels", "topic", "--variable", "resid_mean", "--missing", "drop")[0] == 0


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("text,tone\nprompt 1,a\nprompt 1,b\n", "has the prompt 'prompt 1' twice"),
        ("text,tone\nnobody knows it,a\n", "are not in"),
        ("text,mood\nprompt 1,a\n", "has no 'tone'"),
    ],
)
def test_columns_that_cannot_be_added(lines: str, message: str, stored: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "new.csv").write_text(lines)
    code, _, err = call(capsys, "annotate", stored, str(tmp_path / "new.csv"), "--columns", "tone")
    assert code == 1
    assert message in err
    assert "tone" not in lz.open_store(stored).dataset().coords


def test_a_chat_in_the_file_is_refused_with_what_to_give(stored: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "new.jsonl").write_text('{"text": [{"role": "user", "content": "hi"}], "tone": "a"}\n')
    code, _, err = call(capsys, "annotate", stored, str(tmp_path / "new.jsonl"), "--columns", "tone")
    assert code == 1
    assert "give the hashes of chats" in err


# ---------------------------------------------------------------------------------------------------------------- drop, copy


def test_drop_removes_variables_or_layers(stored: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = call(capsys, "drop", stored, "resid")
    assert code == 1
    assert "add --yes" in err
    assert call_json(capsys, "drop", stored, "resid", "--layers", "0", "--yes") == {"variables": ["resid"], "parts": 1}
    assert lz.open_store(stored).tokens().resid.layer.values.tolist() == [1, 3]
    assert call_json(capsys, "drop", stored, "resid", "--yes")["parts"] == 1
    store = lz.open_store(stored)
    assert "resid" not in store.view(store.find_group(None)).variables("tokens")
    assert "resid_mean" in store.dataset()
    code, _, err = call(capsys, "drop", stored, "nothing", "--yes")
    assert code == 1
    assert "nothing" in err


def test_copy_is_what_copy_to_does(stored: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "some.txt").write_text("prompt 3\nprompt 4\n")
    other = str(tmp_path / "other")
    call_json(capsys, "copy", stored, other, "--prompts", str(tmp_path / "some.txt"))
    assert sorted(lz.open_store(other).dataset().text.values) == ["prompt 3", "prompt 4"]
    said = call_json(capsys, "copy", stored, other)
    assert said["url"] == other
    right, found = (lz.open_store(place).dataset(prompts=TEXTS).resid_mean.values for place in (stored, other))
    np.testing.assert_array_equal(found, right)


def test_evict_says_what_it_would_do(stored: str, capsys: pytest.CaptureFixture[str]) -> None:
    plan = call_json(capsys, "evict", stored, "--max-gb", "0", "--min-age", "0", "--dry-run")
    assert plan["dry_run"]
    assert len(plan["entries"]) == 1
    assert lz.open_store(stored).dataset().sizes["prompt"] == 40


def test_sweep_solves_in_bulk_and_tries_strengths(stored: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    options = (
        "--variable",
        "resid_mean",
        "--labels",
        "label",
        "--groups",
        "pair",
        "--cv",
        "2",
        "--probes",
        "ridge",
        "--strengths",
        "0.1,10",
    )
    plain, batched = (call_json(capsys, "sweep", stored, *options, "--solver", solver) for solver in ("scikit-learn", "batched"))
    assert plain == batched
    assert [row["strength"] for row in plain["scores"]] == [0.1, 10.0] * 3, "three layers with two strengths"
    _, out, _ = call(capsys, "sweep", stored, *options)
    assert [line.split()[:3] for line in out.splitlines()[2:4]] == [["0", "ridge", "0.1"], ["0", "ridge", "10"]]
    code, _, err = call(capsys, "sweep", stored, *options, "--solver", "batched", "--device", "cuda:99")
    assert code == 1
    assert "--device cuda:99 cannot be used here" in err
    code, _, err = call(capsys, "sweep", stored, "--strengths", "weak")
    assert code == 1
    assert "--strengths 'weak' is no list of numbers" in err


# --------------------------------------------------------------------------------------------------------------- remote places


def test_options_of_file_systems_are_those_of_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("s3fs")
    monkeypatch.setattr(fsspec.config, "conf", {})
    code, _, err = call(capsys, "info", "s3://bucket/acts", "--anon", "--storage-options", '{"endpoint_url": "http://127.0.0.1:9"}')
    assert code == 1, "nothing listens there"
    assert "does not answer" in err
    assert fsspec.config.conf == {"s3": {"anon": True, "endpoint_url": "http://127.0.0.1:9"}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "acts", "--anon"], "are for remote places"),
        (["info", "https://example.org/acts", "--anon"], "--anon says nothing to https://"),
        (["info", "s3://bucket/acts", "--storage-options", "[1]"], "--storage-options '[1]' is no JSON object"),
    ],
)
def test_options_of_file_systems_that_say_nothing(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, *arguments)
    assert code == 1
    assert message in err


# ------------------------------------------------------------------------------------------------------------------- the edges


def test_without_a_command_the_first_steps_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys)
    assert code == 0
    assert "first steps:" in out
    assert "lmprobe-zarr demo" in out
    from lmprobe_zarr.cli import _parser

    (commands,) = (action for action in _parser()._actions if hasattr(action, "choices") and isinstance(action.choices, dict))
    for name in commands.choices or ():
        assert f"\n  {name} " in out, "a command is listed nowhere"


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (["sweeep"], "did you mean sweep?"),
        (["sweep", "acts", "--lables", "x"], "unrecognized arguments: --lables: did you mean --labels?"),
        (["extract", "gpt2", "p.txt", "--format", "jsonll"], "did you mean jsonl?"),
        (["cache", "inof"], "did you mean info?"),
        (["sweep", "acts", "--task", "zzz"], "choose from classification, regression"),
    ],
)
def test_a_typing_error_names_the_nearest(arguments: list[str], near: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert near in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_of_a_shell(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    code, out, _ = call(capsys, "--print-completion", shell)
    assert code == 0
    assert "annotate" in out
    assert "lmprobe-zarr" in out


def test_bash_completes_a_command() -> None:
    pytest.importorskip("shtab")
    script = subprocess.run(
        [sys.executable, "-m", "lmprobe_zarr", "--print-completion", "bash"], capture_output=True, text=True, check=True
    ).stdout
    ask = script + '\nCOMP_WORDS=(lmprobe-zarr swe); COMP_CWORD=1; _shtab_lmprobe_zarr; echo "${COMPREPLY[@]}"\n'
    assert subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True).stdout.strip() == "sweep"


# --------------------------------------------------------------------------------------------------------- groups of a report


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"number": np.arange(40) // 2}, "number"),  # pairs, whatever their name
        ({"statement_id": np.arange(40) // 5}, "statement_id"),  # larger groups by their name
        ({"topic": np.arange(40) // 5}, None),  # a column like any other
        ({"length": np.arange(40)}, None),
        ({"pair": np.arange(40) // 20}, None),  # too few
        ({"pair": np.where(np.arange(40) < 2, np.nan, np.arange(40) // 2)}, None),  # not every prompt has one
        ({"number": np.arange(40) // 2, "pair": np.arange(40) // 3}, "pair"),  # a name says more than a shape
        ({"pair": [f"p{i // 2}" for i in range(40)]}, "pair"),
    ],
)
def test_a_column_that_shows_pairs(columns: dict[str, object], found: str | None, tmp_path: Path) -> None:
    store = lz.open_store(tmp_path / "s")
    store.write(GROUP, make_batch(TEXTS, columns={"label": [i % 2 for i in range(40)], **{n: list(v) for n, v in columns.items()}}))  # type: ignore[call-overload]
    assert find_groups(store.dataset(), "label") == found


def test_a_report_keeps_pairs_together_and_says_so(stored: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    call_json(capsys, "report", stored, "-o", str(page), "--labels", "label", "--prompts", "1")
    assert (
        "Prompts with the same &#x27;pair&#x27;, whose values show that prompts belong together, are in the same fold." in page.read_text()
    )
    call_json(capsys, "report", stored, "-o", str(page), "--labels", "label", "--prompts", "1", "--groups", "")
    assert "in the same fold" not in page.read_text()
    code, _, err = call(capsys, "report", stored, "-o", str(page), "--labels", "label", "--groups", "pears")
    assert code == 1
    assert "pears" in err
