"""What an error advises can be done at a shell: options of the command that failed, and nothing of Python."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from command_line import call

import lmprobe_zarr as lz
from lmprobe_zarr.cli import _parser
from lmprobe_zarr.cli.advice import for_shell


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of eight prompts two have no label, and two more were stored in another layer only."""
    place = str(tmp_path_factory.mktemp("advice") / "acts")
    store, rng = lz.open_store(place), np.random.default_rng(0)
    for layer, texts, labels in ((0, "abcdef", [0, 1, 0, 1, None, None]), (1, "gh", [0, 1])):
        values = rng.normal(size=(len(texts), 4)).astype("float32")
        lz.write_activations(store, model="m", prompts=list(texts), pooled={"resid_mean": {layer: values}}, coords={"label": labels})
    return place


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sweep", "--labels", "label", "--layers", "0", "--cv", "2"], "leave them out with --missing drop"),
        (["sweep", "--labels", "label", "--layers", "0", "--missing", "drop", "--cv", "2"], "with --layers 0, or choose other layers"),
        (["report", "--labels", "label"], "leave them out with --missing drop"),
        (["sweep", "--labels", "label", "--missing", "drop", "--layers", "0", "--probes", "nope"], "use one of logistic_regression"),
        (["sweep", "--labels", "text", "--cv", "2"], "… of 8 classes}: use fewer folds, another column, or label more"),
    ],
)
def test_advice_is_an_option_of_the_command(stored: str, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str) -> None:
    code, _, err = call(capsys, arguments[0], stored, *arguments[1:])
    assert code == 1
    assert says in err
    for python in ("missing=", "layers=", ".isel", ".dropna", "estimator"):
        assert python not in err


def test_a_wrong_path_is_to_be_checked_and_not_opened_in_another_mode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "info", str(tmp_path / "typo"))
    assert (code, err) == (1, f"lmprobe-zarr: there is no store at {tmp_path / 'typo'}: check the path\n")


def test_the_column_of_the_prompts_is_named_by_an_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}], "label": 1}\n')
    code, _, err = call(capsys, "extract", "gpt2", str(tmp_path / "p.jsonl"), "--store", str(tmp_path / "acts"))
    assert code == 1
    assert err.endswith("line 1 has no 'text': its columns are 'label', 'messages'; --text-column names the column of the prompts\n")


@pytest.mark.parametrize(
    ("message", "command", "shown"),
    [
        ("the limit is 9: shorten it, or pass truncation=True", "extract", "the limit is 9: shorten it, or give --truncation"),
        ("it is opened with storage_options={'anon': True}", "show", "it is opened with --anon"),
        ("give storage_options=, or set the AWS_* variables", "show", "give --storage-options, or set the AWS_* variables"),
        ("give storage_options={'token': …}", "copy", "give --storage-options {'token': …}"),
        ("give storage_options={'client_kwargs': …}", None, "give storage_options={'client_kwargs': …}"),
        ("it ends with storage_options=", "info", "it ends with --storage-options"),
        ("there is no probe named 'missing'", "sweep", "there is no probe named 'missing'"),
    ],
)
def test_advice_is_worded_for_the_command(message: str, command: str | None, shown: str) -> None:
    arguments = {"extract": ["m", "p"], "copy": ["a", "b"]}.get(command or "", [])
    parser = _parser().parse_args([command, *arguments]).parser if command else None
    assert for_shell(message, parser) == shown


def test_prompts_that_are_not_stored_are_not_to_be_extracted_before_they_are_deleted(
    stored: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("a\nnobody has stored this\n")
    code, _, err = call(capsys, "delete", stored, str(tmp_path / "p.txt"), "--yes")
    assert code == 1
    assert err.endswith("number 1 ('nobody has stored this'); nothing was deleted\n")
    assert lz.open_store(stored, mode="r").dataset().sizes["prompt"] == 8
