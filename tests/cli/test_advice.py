"""What an error advises can be done at a shell: options of the command that failed, and nothing of Python."""

from __future__ import annotations

import argparse
import ast
import re
import shlex
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from command_line import call
from paths import ROOT

import lmprobe_zarr as lz
from lmprobe_zarr.cli import _parser
from lmprobe_zarr.cli.advice import for_shell, warnings_for_shell


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of eight prompts two have no label, and two more were stored in another layer only."""
    place = str(tmp_path_factory.mktemp("advice") / "acts")
    store, rng = lz.open_store(place), np.random.default_rng(0)
    for layer, texts, labels in ((0, "abcdef", [0, 1, 0, 1, None, None]), (1, "gh", [0, 1])):
        values = rng.normal(size=(len(texts), 4)).astype("float32")
        columns = {"label": labels, "size": [i / 7 for i in range(len(texts))]}
        lz.write_activations(
            store,
            model="m",
            prompts=list(texts),
            pooled={"resid_mean": {layer: values}},
            coords=columns,
        )
    return place


@pytest.fixture(scope="module")
def published(stored: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return lz.open_store(stored).publish(tmp_path_factory.mktemp("published") / "copy").url


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
        ("scores are drawn on the page, and page=False writes none", "publish", "scores are drawn on the page, and --no-page writes none"),
        (
            "choose, or name a module, sites={'z': 'self_attn.o_proj:input'}",
            "extract",
            "choose, or name a module, such as z=self_attn.o_proj:input",
        ),
        ("revision='main' was given for the folder 'x'", "extract", "--revision main was given for the folder 'x'"),
        (
            "if it is the same model, give group='g' or provenance='any'",
            "extract",
            "if it is the same model, give --group g or --any-provenance",
        ),
        ("delete it, store.delete(…, prompts=[…]), and", "extract", "delete it, lmprobe-zarr delete, and"),
        (
            "repair() removes it and lists its prompts, or extract them again with refresh=True",
            "sweep",
            "lmprobe-zarr repair removes it and lists its prompts, or extract them again with --refresh",
        ),
        ("use weights='streamed', device_map='auto', or less", "extract", "use --weights streamed, or less"),
    ],
)
def test_advice_is_worded_for_the_command(message: str, command: str | None, shown: str) -> None:
    arguments = {"extract": ["m", "p"], "copy": ["a", "b"], "publish": ["a", "b"]}.get(command or "", [])
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


#: What only a script can do: an argument with a value, or with none; a mode; objects and their methods.
OF_PYTHON = re.compile(
    r"\b[a-z_]+=(True|False|None|['\[{…]|[ ,;:)]|$)|\blz\.|\bstore\.|\.isel|\.dropna|themselves|\{name|estimator", re.MULTILINE
)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("evict {store} --dry-run", "give --max-gb, the size to bring it down to in GB"),
        ("evict {store} --max-gb -1", "--max-gb -1.0 is not a size"),
        ("evict {store} --max-gb 1 --min-age -1", "--min-age -1.0 is not an age"),
        ("publish {store} {copy}", "published already: give another place, or --overwrite"),
        ("publish {store} {tmp}/new --private", "--private is for repositories of the Hugging Face Hub"),
        ("publish {copy} {copy} --overwrite", ""),
        ("evict {copy} --max-gb 0 --yes", "is a published copy, which never changes"),
        ("clear {copy} --yes", "is a published copy, which never changes"),
        ("clear {copy} --dry-run", "is a published copy, which never changes"),
        ("copy {store} {copy}", "is a published copy, which never changes"),
        ("gc {copy}", "is a published copy, which never changes"),
        ("compact {copy}", "is a published copy, which never changes"),
        ("repair {copy}", "is a published copy, which never changes"),
        ("drop {copy} resid --yes", "is a published copy, which never changes"),
        ("delete {copy} {prompts} --yes", "is a published copy, which never changes"),
        ("delete {copy} {prompts} --dry-run", "is a published copy, which never changes"),
        ("annotate {copy} {table} --columns new", "is a published copy, which never changes"),
        ("sweep {store} --labels lable", "there is no column 'lable'"),
        ("sweep {store} {drop} --labels label --groups lable", "lable"),
        ("sweep {store} {drop} --labels label --split lable", "lable"),
        ("sweep {store} --controls bag_of_wrods", "there is no control 'bag_of_wrods'"),
        ("sweep {store} --controls sentence_embedding", "give its folder, sentence_embedding="),
        ("sweep {store} {drop} --controls shuffled_labels=0", ""),
        ("sweep {store} --controls perplexity --missing drop --layers 0", ""),
        ("sweep {store} {drop} --metrics acuracy", "acuracy"),
        ("sweep {store} {drop} --metrics accuracy,accuracy", "--metrics accuracy,accuracy holds one twice"),
        ("sweep {store} {drop} --probes rigde", "rigde"),
        ("sweep {store} --cv 1 --missing drop --layers 0", "--cv 1 leaves nothing to test on"),
        ("sweep {store} --repeats 0 --missing drop --layers 0", "--repeats 0 is no number of repetitions"),
        ("sweep {store} {drop} --strengths 1,1", ""),
        ("sweep {store} {drop} --cv 2 --solver batched --probes majority", ""),
        ("sweep {store} {drop} --device cuda:99", ""),
        ("sweep {store} --task regression --labels text", "or give --task classification"),
        ("sweep {store} --labels size", "or --task regression"),
        ("compact {store} --part-bytes 0", "--part-bytes 0"),
        ("compact {store} --min-parts 0", "--min-parts 0"),
        ("gc {store} --max-age -1", "--max-age -1.0"),
        ("show {store} --level tokens", "per prompt"),
        ("extract gpt2 {prompts} {new} --pooling none", "give a pooling, or --keep-tokens"),
        ("extract gpt2 {prompts} {new} --pooling median", "median"),
        ("extract gpt2 {prompts} {new} --sites ''", "sites is empty"),
        ("extract gpt2 {prompts} {new} --dtype int8", "--dtype int8"),
        ("extract gpt2 {prompts} {new} --storage-dtype int8", "int8"),
        ("extract gpt2 {table} --coords label,resid_mean {new}", ""),
        ("extract gpt2 {prompts} {new} --over assistant", ""),
        ("extract gpt2 {prompts} {new} --logits-top-k 0", ""),
        ("export --from {store} --to {tmp}/c --dtype int8", "--dtype int8 is unknown"),
        ("export --from {store} --to {tmp}/c --variables resid_maen", "resid_maen"),
        ("info {tmp}/nowhere", "check the path"),
        ("drop {store} resid_maen --yes", "resid_maen"),
        ("annotate {store} {table} --columns resid_mean", "resid_mean"),
        ("report {store} --labels lable -o {tmp}/r.html", "lable"),
        ("report {store} --variable resid_maen -o {tmp}/r.html", "resid_maen"),
    ],
)
def test_no_command_advises_what_only_python_can_do(
    stored: str, published: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, says: str
) -> None:
    (tmp_path / "p.txt").write_text("a\nb\n")
    (tmp_path / "t.csv").write_text("text,label,new,resid_mean\na,1,2,3\nb,0,2,3\n")
    parts = {"drop": "--missing drop --layers 0", "new": f"--store {tmp_path}/new"}
    places = {"store": stored, "copy": published, "tmp": tmp_path, "prompts": tmp_path / "p.txt", "table": tmp_path / "t.csv"}
    code, _, err = call(capsys, *shlex.split(command.format(**places, **parts)))
    assert says in err
    if code or says:
        assert code == 1, err
    shown = err.replace("sentence_embedding=", "").replace("shuffled_labels=", "")
    assert not OF_PYTHON.search(shown), shown


@pytest.mark.parametrize(
    ("command", "near"),
    [
        ("sweep {store} --labels lable", "'label'"),
        ("sweep {store} --missing drop --layers 0 --groups szie", "'size'"),
        ("sweep {store} --missing drop --layers 0 --probes rigde", "'ridge'"),
        ("sweep {store} --missing drop --layers 0 --metrics acuracy", "'accuracy'"),
        ("sweep {store} --controls bag_of_wrods", "'bag_of_words'"),
        ("sweep {store} --variable resid_maen", "'resid_mean'"),
        ("drop {store} resid_maen --yes", "'resid_mean'"),
        ("export {store} {tmp}/c --variables resid_maen", "'resid_mean'"),
        ("show {store} --model M", None),
        ("annotate {store} {table} --columns lable", "'label'"),
        ("extract gpt2 {table} --coords lable --store {tmp}/n", "'label'"),
        ("extract gpt2 {table} --text-column txt --store {tmp}/n", "'text'"),
        ("extract gpt2 {table} --pooling last_tokne --store {tmp}/n", "'last_token'"),
        ("extract {tmp}/tiny-gtp2 {table} --store {tmp}/n", "'{tmp}/tiny-gpt2'"),
        ("show {named} --model my-modle", "'my-model'"),
        ("extract my-modle {table} --store {named}", "'my-model', which"),
    ],
)
def test_a_mistyped_name_is_answered_by_the_nearest(
    stored: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, near: str | None
) -> None:
    if near is not None and near.endswith("which"):  # looks for the model, which needs transformers
        pytest.importorskip("torch")
    (tmp_path / "t.csv").write_text("text,label\na,1\n")
    (tmp_path / "tiny-gpt2").mkdir()
    (tmp_path / "tiny-gpt2" / "config.json").write_text("{}")
    named = lz.open_store(tmp_path / "named")
    lz.write_activations(named, model="my-model", prompts=["a"], pooled={"resid_mean": {0: np.zeros((1, 2), "float32")}})
    places = {"store": stored, "tmp": tmp_path, "table": tmp_path / "t.csv", "named": named.url}
    code, _, err = call(capsys, *shlex.split(command.format(**places)))
    assert code == 1
    assert ("did you mean" in err) == (near is not None)
    assert near is None or f"did you mean {near.format(**places)}" in err


def _messages() -> Iterator[str]:
    """Every text of an error or a warning of the package, with 1 in place of its values."""
    for file in sorted((ROOT / "lmprobe_zarr").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            warns = isinstance(node, ast.Call) and "warn" in getattr(node.func, "attr", getattr(node.func, "id", ""))
            raised = node.exc if isinstance(node, ast.Raise) else node if warns else None
            for part in () if raised is None else ast.walk(raised):
                if isinstance(part, ast.JoinedStr):
                    yield "".join(each.value if isinstance(each, ast.Constant) else "1" for each in part.values)  # type: ignore[misc]
                elif isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.value


def _commands() -> Iterator[argparse.ArgumentParser]:
    waiting = [_parser()]
    while waiting:
        parser = waiting.pop()
        inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        waiting += [command for action in inner for command in action.choices.values()]
        if not inner:
            yield parser


def test_every_message_names_an_option_where_the_command_has_one_for_the_argument() -> None:
    messages = sorted(set(_messages()))
    assert len(messages) > 1000
    messages = [message for message in messages if "=" in message]
    assert len(messages) > 100
    for command in _commands():
        names = {option[2:].replace("-", "_") for option in command._option_string_actions if option.startswith("--")} - {"json", "help"}
        argument = re.compile(rf"(?:^|[ (])(?:{'|'.join(sorted(names))})=(?!=|False|None)")
        for message in messages:
            assert not argument.search(re.sub(r"\w\([^()]*\)", "", for_shell(message, command))), command.prog


def test_a_warning_names_options() -> None:
    parser, said = _parser().parse_args(["extract", "m", "p"]).parser, "pass add_special_tokens=False for texts"
    with pytest.warns(UserWarning, match="pass add_special_tokens=False"):  # what is raised stays as it is
        warnings.warn(said, UserWarning, stacklevel=1)
    with warnings_for_shell(parser):
        assert "give --no-special-tokens for texts" in warnings.formatwarning(said, UserWarning, "x", 1)
    assert said in warnings.formatwarning(said, UserWarning, "x", 1)


def test_what_somebody_gave_is_shown_as_it_is() -> None:
    parser = _parser().parse_args(["sweep"]).parser
    for message in ("prompt 'missing=True, said he' is not stored", 'nothing at s3://a/b?labels=1, or "cv=5"', "there is x.layers=3"):
        assert for_shell(message, parser) == message
