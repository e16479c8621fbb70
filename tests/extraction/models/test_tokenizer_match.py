"""A tokenizer that does not belong to the model is refused where that is certain, and warned of where it is likely."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_models import PROMPTS, save_tiny, tiny_model, tiny_tokenizer

import lmprobe_zarr as lz
from lmprobe_zarr.errors import CacheWarning, InvalidArgumentError
from lmprobe_zarr.extraction.models.tokenizer_match import check_tokenizer

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.model


@pytest.mark.few(2)
@pytest.mark.parametrize("rows", [299, 280, 10])
def test_a_vocabulary_larger_than_the_embeddings_is_refused_before_anything_is_stored(rows: int, tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=rows)
    with pytest.raises(InvalidArgumentError, match=rf"has 300 tokens and 'm' has {rows} embeddings, so {300 - rows} tokens"):
        lz.extract(model, PROMPTS, name="m", tokenizer=tiny_tokenizer(), store=tmp_path / "store", progress=False)
    folder = save_tiny("llama", tmp_path / "named", vocab_size=rows)
    for tokenizer in (None, tiny_tokenizer()):
        with pytest.raises(InvalidArgumentError, match="do not belong together"):
            lz.extract(folder, ["a"], tokenizer=tokenizer, store=tmp_path / "store", progress=False)
    assert lz.open_store(tmp_path / "store").groups() == {}


@pytest.mark.parametrize("rows", [300, 320])
def test_a_table_of_embeddings_that_is_as_large_or_padded_is_right(rows: int) -> None:
    check_tokenizer(tiny_tokenizer(), "m", None, rows)
    check_tokenizer(tiny_tokenizer(), "m", None, None)


@pytest.mark.parametrize("added", [{"pad_token": "[PAD]"}, {"additional_special_tokens": ["<image>"]}])
def test_special_tokens_that_were_added_for_padding_or_pictures_are_allowed(added: dict[str, Any]) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens(added)
    assert len(tokenizer) == 301
    check_tokenizer(tokenizer, "m", None, 300)
    tokenizer.add_tokens(["quick"])
    with pytest.raises(InvalidArgumentError, match="so 1 tokens, such as 'quick'"):
        check_tokenizer(tokenizer, "m", None, 300)


@pytest.mark.parametrize(
    ("tokenizer", "model", "differ"),
    [
        ("owner/first", "owner/second", True), ("owner/first", "/data/first", False), ("", "owner/first", False),
        ("owner/first", None, False), ("/data/First/", "owner/first", False), ("/data/a", "/data/b", True),
        ("/cache/models--owner--first/snapshots/" + "a" * 40, "owner/first", False),
    ],
)  # fmt: skip
def test_names_that_differ_are_warned_of(tokenizer: str, model: Any, differ: bool) -> None:
    given = SimpleNamespace(name_or_path=tokenizer)
    if differ:
        with pytest.warns(CacheWarning, match="the tokenizer was loaded from"):
            check_tokenizer(given, "m", model, None)
    else:
        check_tokenizer(given, "m", model, None)
