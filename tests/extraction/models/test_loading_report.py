"""What transformers reports while it loads: weights without a place, without values, of another shape; and its warnings, once."""

from __future__ import annotations

import importlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_models import SENTENCES, save_tiny

import lmprobe_zarr as lz
from lmprobe_zarr.errors import CacheWarning, InvalidArgumentError, ModelNotFoundError
from lmprobe_zarr.extraction import models as extraction

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)
pytestmark = pytest.mark.model

from lmprobe_zarr.extraction.models import loading_report  # noqa: E402


def configured(folder: Path, **settings: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))
    return folder


def with_tensors(folder: Path, **added: Any) -> Path:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    save_file(
        {**weights, **{name.replace("__", "."): tensor for name, tensor in added.items()}}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


# ---------------------------------------------------------------- weights without a place


def without_biases(path: Path, head: str) -> Path:
    return configured(save_tiny("llama", path, head=head, attention_bias=True), attention_bias=False)


def without_biases_of_the_mlp(path: Path, head: str) -> Path:
    return configured(save_tiny("llama", path, head=head, mlp_bias=True), mlp_bias=False)


def without_norms_of_queries(path: Path, head: str) -> Path:
    return configured(save_tiny("qwen3", path, head=head), model_type="llama", architectures=["LlamaModel"])


def without_the_last_layer(path: Path, head: str) -> Path:
    return configured(save_tiny("llama", path, head=head), num_hidden_layers=3, layer_types=None)


def with_an_adapter_inside(path: Path, head: str) -> Path:
    prefix = "" if head == "AutoModel" else "model__"
    return with_tensors(save_tiny("llama", path, head=head), **{f"{prefix}layers__1__adapter__down__weight": torch.ones(2, 2)})


def with_a_bias_of_a_norm(path: Path, head: str) -> Path:
    prefix = "" if head == "AutoModel" else "model__"
    return with_tensors(save_tiny("llama", path, head=head), **{f"{prefix}norm__bias": torch.ones(32)})


KINDS = [
    without_biases,
    without_biases_of_the_mlp,
    without_norms_of_queries,
    without_the_last_layer,
    with_an_adapter_inside,
    with_a_bias_of_a_norm,
]


@pytest.mark.few(6)
@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("head", ["AutoModel", "AutoModelForCausalLM"])
def test_a_checkpoint_with_weights_that_the_model_has_no_place_for_is_refused(make: Any, head: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "m", head)
    for whole in (False, True) if head == "AutoModelForCausalLM" else (False,):
        with pytest.raises(ModelNotFoundError, match=r"has no place for.*would run without them"):
            extraction.load_model(folder, device="cpu", head=whole)


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("kind", "head"),
    [
        ("llama", "AutoModelForCausalLM"), ("llama", "AutoModelForSequenceClassification"), ("llama", "AutoModelForTokenClassification"),
        ("bert", "AutoModelForMaskedLM"), ("bert", "AutoModelForSequenceClassification"), ("bert", "AutoModelForQuestionAnswering"),
        ("gpt2", "AutoModelForCausalLM"), ("roberta", "AutoModelForMaskedLM"), ("deepseek_v3", "AutoModelForCausalLM"),
    ],
)  # fmt: skip
def test_a_head_that_is_not_needed_is_nothing(kind: str, head: str, tmp_path: Path) -> None:
    assert extraction.load_model(save_tiny(kind, tmp_path / "m", head=head), device="cpu").num_layers == 4


@pytest.mark.parametrize("name", ["layers__0__self_attn__rotary_emb__inv_freq", "layers__0__self_attn__k_scale", "mtp__layers__0__weight"])
def test_tensors_that_are_computed_or_for_training_are_nothing(name: str, tmp_path: Path) -> None:
    assert extraction.load_model(with_tensors(save_tiny("llama", tmp_path / "m"), **{name: torch.ones(4)}), device="cpu").num_layers == 4


def test_tensors_of_which_nothing_is_known_are_warned_of(tmp_path: Path) -> None:
    folder = with_tensors(save_tiny("llama", tmp_path / "m"), projector__weight=torch.ones(4))
    with pytest.warns(CacheWarning, match=r"1 tensors of .* are not used, 'projector\.weight' for one"):
        extraction.load_model(folder, device="cpu")


def test_tensors_of_another_shape_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="cannot load the model"):
        extraction.load_model(configured(save_tiny("llama", tmp_path / "m"), intermediate_size=64), device="cpu")


# ---------------------------------------------------------------- weights without values


def test_the_device_meta_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="device='meta' holds no numbers"):
        extraction.load_model(save_tiny("llama", tmp_path / "m"), device="meta")


# ---------------------------------------------------------------- warnings


@pytest.fixture
def heard() -> Iterator[io.StringIO]:
    """What transformers' own logger puts out."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    noise: Any = importlib.import_module("transformers.utils.logging")
    noise.add_handler(handler)
    yield text
    noise.remove_handler(handler)


def warned_by(source: str, *, inside: Any) -> None:
    with loading_report.listening(source):
        inside()


def test_a_warning_of_transformers_comes_out_once_per_model(heard: io.StringIO) -> None:
    logger = logging.getLogger("transformers.models.somewhere")
    handlers = list(logging.getLogger("transformers").handlers)

    def inside() -> None:
        logger.warning("incorrect tokenization")
        logger.info("not shown")

    for source in ("first", "first", "second"):
        warned_by(source, inside=inside)
    assert heard.getvalue().splitlines() == ["incorrect tokenization"] * 2
    assert logging.getLogger("transformers").handlers == handlers


def test_warnings_come_out_where_loading_fails_too(heard: io.StringIO) -> None:
    logger = logging.getLogger("transformers.models.somewhere")

    def fail() -> None:
        logger.warning("a key of rope_scaling is not known")
        raise OSError("no such file")

    with pytest.raises(OSError, match="no such file"):
        warned_by("fails", inside=fail)
    assert "rope_scaling" in heard.getvalue()


def test_warnings_of_python_come_out_once_and_those_of_deprecation_do_not() -> None:
    def inside() -> None:
        warnings.warn("the tokenizer is not right", UserWarning, stacklevel=2)
        warnings.warn("an old argument", FutureWarning, stacklevel=2)

    with pytest.warns(UserWarning, match="tokenizer is not right") as caught:
        warned_by("python", inside=inside)
    assert [str(each.message) for each in caught] == ["the tokenizer is not right"]
    warned_by("python", inside=inside)


def test_a_tokenizer_that_cuts_wrongly_is_warned_of_while_a_model_is_extracted(heard: io.StringIO, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    # Mistral's: more than 100,000 tokens, written by a release before 5.
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab={**letters, **{f"<t{n}>": n for n in range(256, 100_100)}}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = {"pad_token": "<t258>"}
    large = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    folder = save_tiny("mistral", tmp_path / "m", vocab_size=100_100, hidden_size=16, num_hidden_layers=1)
    large.save_pretrained(folder)
    configured(folder, transformers_version="4.50.0")
    transformers.AutoTokenizer.from_pretrained(folder)
    if "incorrect tokenization" not in heard.getvalue():
        pytest.skip("this release of transformers does not warn")
    heard.seek(0)
    heard.truncate()
    for _ in range(2):
        lz.extract(folder, SENTENCES, store=tmp_path / "store", progress=False, device="cpu")
    assert heard.getvalue().count("incorrect tokenization") == 1
