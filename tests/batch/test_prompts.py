"""What a caller may hand over as prompts, and what becomes of it. Needs neither torch nor transformers, except where marked."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from tiny_models import CHAT_TEMPLATE, SENTENCES, tiny_tokenizer

from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, PromptTooLongError
from lmprobe_zarr.extraction.models import length_limit, parse_prompts, prompts_kind, tokenize


def test_the_package_and_its_light_rooms_import_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, lmprobe_zarr.extraction, lmprobe_zarr.batch.prompts, lmprobe_zarr.extraction.models.identity, "
        "lmprobe_zarr.extraction.models.tokenizing; "
        "print([m for m in ('torch', 'transformers', 'huggingface_hub') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_without_torch_the_error_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from lmprobe_zarr.errors import MissingDependencyError\n"
        "import lmprobe_zarr.extraction.models as ex\n"
        "try:\n    ex.load_model\nexcept MissingDependencyError as error:\n    print(error)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "lmprobe-zarr[models]" in out


def test_texts_are_hashed_as_utf8_and_need_no_tokenizer() -> None:
    prompts = parse_prompts(["äöü", "b"])
    assert prompts.sha256[0] == hashlib.sha256("äöü".encode()).hexdigest()
    assert prompts.kind == "text"
    assert prompts.text == ("äöü", "b")


def test_a_prompt_given_twice_is_kept_once_and_the_callers_order_is_known() -> None:
    prompts = parse_prompts(["b", "a", "b", "c", "a"])
    assert prompts.text == ("b", "a", "c")
    assert prompts.row.tolist() == [0, 1, 0, 2, 1]
    assert prompts.first.tolist() == [0, 1, 3]
    part = prompts.take([2, 0])
    assert part.text == ("c", "b")
    assert part.first.tolist() == [3, 0]
    assert part.sha256 == (prompts.sha256[2], prompts.sha256[0])


@pytest.mark.parametrize("make", [list, tuple, lambda ids: np.array(ids, np.int32), lambda ids: np.array(ids, np.uint8)])
def test_ids_of_any_container_have_the_same_hash(make: Any) -> None:
    prompts = parse_prompts([make([5, 6, 7])])
    assert prompts.kind == "ids"
    assert prompts.sha256[0] == hashlib.sha256(b"\0ids\0" + np.array([5, 6, 7], "<i8").tobytes()).hexdigest()
    assert prompts.text is None
    assert prompts.token_ids is not None
    assert prompts.token_ids[0].tolist() == [5, 6, 7]


@pytest.mark.model
def test_ids_may_be_a_torch_tensor() -> None:
    torch = pytest.importorskip("torch")
    assert parse_prompts([torch.tensor([5, 6, 7])]).sha256 == parse_prompts([[5, 6, 7]]).sha256


def test_the_callers_array_may_change_afterwards() -> None:
    mine = np.array([1, 2, 3])
    prompts = parse_prompts([mine])
    mine[:] = 9
    assert prompts.token_ids is not None
    assert prompts.token_ids[0].tolist() == [1, 2, 3]


BAD: list[tuple[object, type[Exception], str]] = [
    ([], InvalidArgumentError, "prompts is empty"),
    ("a text", InvalidTypeError, "wrap it, prompts=[…]"),
    (b"bytes", InvalidTypeError, "bytes"),
    (3, InvalidTypeError, "int"),
    ({"a": 1}, InvalidTypeError, "dict"),
    (["a", ""], InvalidArgumentError, "prompts[1] is empty"),
    (["a", None], InvalidTypeError, "prompts[1] is a NoneType"),
    (["a", 2.5], InvalidTypeError, "prompts[1] is a float"),
    (["a", [1, 2]], InvalidTypeError, "prompts[0] is a text but prompts[1] is token ids"),
    ([1, 2, 3], InvalidTypeError, "wrap the token ids of each prompt in a list"),
    ([{"role": "user", "content": "hi"}], InvalidTypeError, "wrap each conversation in a list"),
    ([[1, 2], []], InvalidArgumentError, "prompts[1] is empty"),
    ([[1, -100]], InvalidArgumentError, "-100"),
    ([[1.5, 2.0]], InvalidTypeError, "float64"),
    ([[[1, 2], [3, 4]]], InvalidTypeError, "shape (2, 2)"),
    ([[[1, 2], [3]]], InvalidTypeError, "nested"),
    ([[True, False]], InvalidTypeError, "bool"),
    ([["a", "b"]], InvalidTypeError, "dtype <U1"),
]


@pytest.mark.parametrize(("prompts", "error", "words"), BAD)
def test_bad_prompts_are_named_by_number_with_what_to_do(prompts: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        parse_prompts(prompts)
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2


def test_a_long_prompt_is_never_shown_whole() -> None:
    with pytest.raises(InvalidTypeError) as caught:
        parse_prompts("secret " * 100)
    assert str(caught.value).count("secret") < 7


def test_the_kind_is_known_without_a_tokenizer() -> None:
    assert prompts_kind(["a"]) == "text"
    assert prompts_kind([[1]]) == "ids"
    assert prompts_kind([[{"role": "user", "content": "a"}]]) == "chat"


def test_a_chat_without_tokenizer_or_template_says_so() -> None:
    chat = [[{"role": "user", "content": "hi"}]]
    with pytest.raises(InvalidArgumentError, match="pass tokenizer="):
        parse_prompts(chat)
    with pytest.raises(InvalidArgumentError, match="no chat template"):
        parse_prompts(chat, tokenizer=tiny_tokenizer())


@pytest.mark.model
def test_a_chat_is_its_rendered_text_without_special_tokens_added_again() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    chat = [[{"role": "user", "content": "Who?"}], [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "the fox"}]]
    prompts = parse_prompts(chat, tokenizer=tokenizer)
    assert prompts.text == ("<s>user: Who?</s><s>assistant: ", "<s>user: Who?</s><s>assistant: the fox</s>")
    assert prompts.sha256[0] == hashlib.sha256(prompts.text[0].encode()).hexdigest()
    closed = parse_prompts(chat[:1], tokenizer=tokenizer, add_generation_prompt=False)
    assert closed.text == ("<s>user: Who?</s>",)
    ids = tokenize(prompts, tokenizer).token_ids.tolist()
    assert ids[: len(tokenizer(prompts.text[0], add_special_tokens=False)["input_ids"])][0] == 2
    assert ids.count(2) == 4  # one per message and one for the opening; none added in front


@pytest.mark.model
def test_ids_are_used_as_they_are_and_their_text_is_their_decoding() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("the fox")["input_ids"]
    done = tokenize(parse_prompts([ids, [2, *ids]]), tokenizer)
    assert done.text == ("<s>the fox", "<s><s>the fox")
    assert done.token_ids.tolist() == [*ids, 2, *ids]
    assert done.char_start is None
    assert parse_prompts([ids], tokenizer=tokenizer).text == ("<s>the fox",)


@pytest.mark.model
@pytest.mark.parametrize("encoder", [False, True])
def test_char_offsets_point_at_the_right_text_and_added_tokens_have_none(encoder: bool) -> None:
    tokenizer = tiny_tokenizer(encoder=encoder)
    texts = [*SENTENCES, "emoji 🦊 and ß"]
    done = tokenize(parse_prompts(texts), tokenizer)
    assert done.char_start is not None
    assert done.char_end is not None
    at = 0
    for text, length in zip(done.text, done.lengths, strict=True):
        ids = done.token_ids[at : at + length]
        places = list(zip(done.char_start[at : at + length].tolist(), done.char_end[at : at + length].tolist(), strict=True))
        assert places[0] == (-1, -1)
        assert ids[0] == 2
        assert (places[-1] == (-1, -1)) == encoder
        inside = [p for p in places if p != (-1, -1)]
        assert inside[0][0] == 0
        assert inside[-1][1] == len(text)
        for (start, end), token in zip(places, ids, strict=True):
            word = tokenizer.decode([int(token)])
            if start >= 0 and "�" not in word:
                assert text[start:end] == word
        at += length


@pytest.mark.model
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_tokenizer_is_left_as_it_was(side: str) -> None:
    tokenizer = tiny_tokenizer(model_max_length=5, padding_side=side)
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=7)
    before = (tokenizer.backend_tokenizer.to_str(), tokenizer.padding_side, dict(getattr(tokenizer, "deprecation_warnings", {})))
    done = tokenize(parse_prompts(["Who wants to go for a walk in the park today?"]), tokenizer, context_length=100)
    assert done.lengths[0] > 7
    assert (tokenizer.backend_tokenizer.to_str(), tokenizer.padding_side, dict(getattr(tokenizer, "deprecation_warnings", {}))) == before


@pytest.mark.model
def test_a_long_sequence_makes_the_tokenizer_warn_of_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer = tiny_tokenizer(model_max_length=5)
    tokenize(parse_prompts([SENTENCES[0]]), tokenizer, context_length=100)
    out, err = capfd.readouterr()
    assert out + err == ""


@pytest.mark.model
def test_a_prompt_longer_than_the_window_is_an_error_unless_truncation_is_allowed() -> None:
    tokenizer = tiny_tokenizer(encoder=True)
    prompts = parse_prompts(["Who?", "Who?", SENTENCES[0]])
    with pytest.raises(PromptTooLongError) as caught:
        tokenize(prompts, tokenizer, context_length=10)
    full = len(tokenizer(SENTENCES[0])["input_ids"])
    assert f"prompts[2] 'The quick brown fox jumps over the lazy …' has {full} tokens, but the limit is 10" in str(caught.value)
    assert "truncation=True" in str(caught.value)
    done = tokenize(prompts, tokenizer, context_length=10, truncation=True)
    assert done.lengths.tolist() == [len(tokenizer("Who?")["input_ids"]), 10]
    assert done.token_ids[-1] == 3  # the tokenizer's own end stays
    assert done.truncated.tolist() == [False, True]
    assert done.token_ids[-10:].tolist() == tokenizer(SENTENCES[0], truncation=True, max_length=10)["input_ids"]


@pytest.mark.model
def test_ids_are_cut_on_the_tokenizers_truncation_side() -> None:
    prompts = parse_prompts([[10, 11, 12, 13]])
    assert tokenize(prompts, tiny_tokenizer(), max_length=3, truncation=True).token_ids.tolist() == [10, 11, 12]
    assert tokenize(prompts, tiny_tokenizer(truncation_side="left"), max_length=3, truncation=True).token_ids.tolist() == [11, 12, 13]


@pytest.mark.model
def test_a_limit_without_room_beside_the_special_tokens_is_an_error() -> None:
    with pytest.raises(InvalidArgumentError, match="2 special tokens"):
        tokenize(parse_prompts(["Who?"]), tiny_tokenizer(encoder=True), max_length=2, truncation=True)


@pytest.mark.model
def test_ids_outside_of_the_vocabulary_are_an_error_before_the_model_runs() -> None:
    with pytest.raises(InvalidArgumentError, match=r"prompts\[1\] holds the token id 300"):
        tokenize(parse_prompts([[1], [299, 300]]), tiny_tokenizer(), vocab_size=300)


@pytest.mark.model
def test_a_prompt_without_any_token_is_an_error() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = __import__("tokenizers").processors.ByteLevel()
    tokenizer.backend_tokenizer.normalizer = __import__("tokenizers").normalizers.Strip()
    with pytest.raises(InvalidArgumentError, match=r"prompts\[1\] ' ' has no tokens"):
        tokenize(parse_prompts(["a", " "]), tokenizer)


@pytest.mark.model
def test_a_lone_surrogate_is_an_error_that_names_the_prompt() -> None:
    with pytest.raises(InvalidArgumentError, match=r"prompts\[1\]"):
        tokenize(parse_prompts(["a", "b\ud800"]), tiny_tokenizer())


@pytest.mark.model
def test_many_prompts_come_back_in_order() -> None:
    tokenizer = tiny_tokenizer()
    texts = [f"prompt {n} the fox" for n in range(1200)]
    done = tokenize(parse_prompts(texts), tokenizer)
    assert done.text == tuple(texts)
    ends = np.cumsum(done.lengths)
    for n in (0, 511, 512, 1199):
        assert done.token_ids[ends[n] - done.lengths[n] : ends[n]].tolist() == tokenizer(texts[n])["input_ids"]
    part = done.take([1199, 3])
    assert part.token_ids.tolist() == tokenizer(texts[1199])["input_ids"] + tokenizer(texts[3])["input_ids"]


def test_the_limit_is_the_smaller_of_window_and_max_length_and_absurd_lengths_are_no_limit() -> None:
    class Odd:
        model_max_length = int(1e30)

    class Small:
        model_max_length = 77

    assert length_limit(512, None) == 512
    assert length_limit(512, 100) == 100
    assert length_limit(512, 1000) == 512
    assert length_limit(None, None, Odd()) is None
    assert length_limit(None, None, Small()) == 77
    assert length_limit(512, None, Small()) == 512
    for bad in (0, -1, 2.5, True, "10"):
        with pytest.raises(InvalidArgumentError, match="max_length"):
            length_limit(512, bad)  # type: ignore[arg-type]
