"""What is a list of prompts, and what Python could iterate over but is none. Needs neither torch nor transformers, except where marked."""

from __future__ import annotations

import io
from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from tiny_models import tiny_tokenizer

import lmprobe_zarr as lz
from lmprobe_zarr.batch import given_prompts, parse_prompts, prompts_kind
from lmprobe_zarr.bridges.import_plan import prompt_list
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError

TEXTS = ("Who?", "the fox")
TABLE = pd.DataFrame({"text": TEXTS, "label": [0, 1]})


class ArrowColumn:
    """As a column of Arrow: iterating over it gives scalars of its own."""

    def __iter__(self) -> Any:
        return iter([object(), object()])

    def to_pylist(self) -> list[str]:
        return list(TEXTS)


class OtherTable:
    """As tables of polars, Arrow and datasets: columns have names, and iterating gives columns or rows."""

    column_names = ("text", "label")

    def __iter__(self) -> Any:
        return iter([list(TEXTS), [0, 1]])


class TokenizerOutput(UserDict[str, Any]):
    """As transformers' BatchEncoding, which is no dict."""


LISTS: dict[str, Callable[[], Any]] = {
    "tuple": lambda: TEXTS,
    "generator": lambda: (text for text in TEXTS),
    "column of pandas": lambda: TABLE["text"],
    "categories": lambda: TABLE["text"].astype("category"),
    "index": lambda: pd.Index(TEXTS),
    "array of texts": lambda: np.array(TEXTS),
    "array of objects": lambda: np.array(TEXTS, object),
    "array of xarray": lambda: xr.DataArray(list(TEXTS), dims="prompt"),
    "column of Arrow": ArrowColumn,
    "values of a dict": {"a": TEXTS[0], "b": TEXTS[1]}.values,
    "keys of a dict": lambda: dict.fromkeys(TEXTS).keys(),
}
NO_LISTS: dict[str, tuple[Callable[[], Any], str]] = {
    "DataFrame": (lambda: TABLE, "a table ('text', 'label'): give a list of prompts"),
    "records": (TABLE.to_records, "a table"),
    "another table": (OtherTable, "a table ('text', 'label')"),
    "dict": (lambda: {"text": TEXTS}, "prompts is a dict of 'text': give a list of prompts"),
    "dataset": (lambda: xr.Dataset({"text": ("prompt", list(TEXTS))}), "prompts is a Dataset"),
    "tokenizer's output": (lambda: TokenizerOutput(input_ids=[[1]], attention_mask=[[1]]), "a tokenizer's output"),
    "one message": (lambda: {"role": "user", "content": "a"}, "a single chat message"),
    "set": (lambda: set(TEXTS), "no order"),
    "frozenset": (lambda: frozenset(TEXTS), "no order"),
    "open file": (lambda: io.StringIO("a\nb\n"), "line.strip()"),
    "bytes": (lambda: b"Who?", "bytes"),
    "path": (lambda: Path("prompts.txt"), "Path"),
    "column of a matrix": (TABLE[["text"]].to_numpy, "shape (2, 1)"),
    "no dimensions": (lambda: np.array("Who?"), "without dimensions"),
    "masked texts": (lambda: np.ma.array(TEXTS, mask=[False, True]), "masked"),
}  # fmt: skip
NO_PROMPTS: dict[str, tuple[Callable[[], Any], str]] = {
    "rows of a table": (lambda: TABLE.to_dict("records"), "prompts[0] is a dict of 'text', 'label', a row of a table"),
    "pairs": (lambda: list(zip(TEXTS, [0, 1], strict=True)), "prompts[0] is a tuple"),
    "bytes": (lambda: [b"Who?"], "decode it"),
    "array of bytes": (lambda: np.array([b"Who?"]), "decode it"),
    "missing": (lambda: TABLE["text"].where(TABLE["label"] == 0), "leave out missing prompts"),
    "None": (lambda: ["a", None], "leave out missing prompts"),
    "NA": (lambda: pd.Series(["a", pd.NA], dtype=object), "leave out missing prompts"),
    "tokenizer's outputs": (lambda: [{"input_ids": [1, 2], "attention_mask": [1, 1]}], "a tokenizer's output"),
    "one chat": (lambda: [{"role": "user", "content": "a"}], "wrap each conversation in a list"),
    "one prompt of ids": (lambda: np.array([1, 2, 3]), "wrap the token ids"),
    "floats": (lambda: np.ones((2, 3), np.float32), "float32"),
    "three dimensions": (lambda: np.ones((2, 3, 4), np.int64), "shape (3, 4)"),
}


@pytest.mark.parametrize("make", LISTS.values(), ids=LISTS)
def test_a_column_is_a_list_of_prompts_in_its_order(make: Callable[[], Any]) -> None:
    prompts = parse_prompts(make())
    assert prompts.text == TEXTS
    assert all(type(text) is str for text in prompts.text)


@pytest.mark.parametrize(("make", "words"), NO_LISTS.values(), ids=NO_LISTS)
def test_what_is_no_list_is_never_iterated_over(make: Callable[[], Any], words: str) -> None:
    for check in (given_prompts, prompts_kind, parse_prompts):
        with pytest.raises(InvalidTypeError) as caught:
            check(make())
        assert words in str(caught.value)


@pytest.mark.parametrize(("make", "words"), NO_PROMPTS.values(), ids=NO_PROMPTS)
def test_what_is_no_prompt_is_named_with_what_to_do(make: Callable[[], Any], words: str) -> None:
    with pytest.raises((InvalidTypeError, InvalidArgumentError)) as caught:
        parse_prompts(make())
    assert words in str(caught.value)


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_an_array_of_ids_has_a_prompt_in_each_row(kind: Any) -> None:
    prompts = parse_prompts(np.array([[5, 6, 7], [8, 9, 4]], kind))
    assert prompts.sha256 == parse_prompts([[5, 6, 7], [8, 9, 4]]).sha256


def test_masked_ids_are_left_out() -> None:
    ids = np.ma.array([[5, 6, 7], [8, 9, 0]], mask=[[False, False, False], [False, False, True]])
    assert parse_prompts(ids).sha256 == parse_prompts([[5, 6, 7], [8, 9]]).sha256 == parse_prompts(list(ids)).sha256


@pytest.mark.model
def test_a_tensor_of_ids_has_a_prompt_in_each_row_and_one_prompt_alone_is_refused() -> None:
    torch = pytest.importorskip("torch")
    assert parse_prompts(torch.tensor([[5, 6], [8, 9]])).sha256 == parse_prompts([[5, 6], [8, 9]]).sha256
    for ids in (torch.tensor([5, 6]), [torch.tensor(5), torch.tensor(6)]):
        with pytest.raises(InvalidTypeError, match="wrap the token ids"):
            parse_prompts(ids)


@pytest.mark.model
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", ["<pad>", "</s>", "<unk>"])
@pytest.mark.parametrize("returned", [None, "np", "pt"])
def test_padding_never_becomes_tokens(side: str, pad: str, returned: str | None) -> None:
    tokenizer = tiny_tokenizer(padding_side=side)
    tokenizer.pad_token = pad
    texts = ["Who?", "The quick brown fox jumps."]
    batch = tokenizer(texts, padding=True, return_tensors=returned)
    with pytest.raises(InvalidArgumentError, match=rf"prompts\[0\] .* token id {tokenizer.pad_token_id}, which this tokenizer pads with"):
        parse_prompts(batch["input_ids"], tokenizer=tokenizer)
    bare = [np.asarray(ids)[np.asarray(mask) == 1] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert parse_prompts(bare, tokenizer=tokenizer).sha256 == parse_prompts([tokenizer(text)["input_ids"] for text in texts]).sha256


@pytest.mark.model
def test_ids_that_end_in_a_token_of_another_use_are_prompts() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "</s>"  # noqa: S105 - a token of a tokenizer
    assert len(parse_prompts([[2, 10, 3], [2, 10, 11, 3], [3, 12]], tokenizer=tokenizer)) == 3
    tokenizer.pad_token = "<pad>"  # noqa: S105
    assert len(parse_prompts([[1, 10], [1, 12, 13]], tokenizer=tokenizer)) == 2  # as decoders with an encoder begin


ENTRIES: dict[str, Callable[[Any, Any], object]] = {
    "dataset": lambda store, given: store.dataset("m", prompts=given),
    "tokens": lambda store, given: store.tokens("m", prompts=given),
    "coverage": lambda store, given: store.coverage("m", prompts=given),
    "delete": lambda store, given: store.delete("m", prompts=given),
    "engine": lambda store, given: xr.open_dataset(store.url, engine="lmprobe_zarr", prompts=given),
    "write_activations": lambda store, given: lz.write_activations(
        store, model="n", prompts=given, pooled={"resid_mean": {0: np.ones((2, 4), np.float32)}}
    ),
    "imports": lambda _, given: prompt_list(given),
    "report": lambda store, given: lz.report(store, prompts=given),
}


@pytest.mark.parametrize("call", ENTRIES.values(), ids=ENTRIES)
def test_every_entry_refuses_what_is_no_list(call: Callable[[Any, Any], object], tmp_path: Path) -> None:
    store = lz.open_store(tmp_path / "acts")
    tokens = {"resid": {0: [np.ones((2, 4), np.float32)] * 2}}
    lz.write_activations(store, model="m", prompts=["text", "label"], activations=tokens)  # the names of columns and keys
    for given in (TABLE, TABLE.to_dict("list"), {"text", "label"}, "text"):
        with pytest.raises((InvalidTypeError, InvalidArgumentError), match=r"list of prompts|one text"):
            call(store, given)
    assert len(store.dataset("m", prompts=pd.Series(["label", "text"])).text) == 2
