"""Decoders of encoder-decoders, with a prompt for each: values are transformers' own, pair by pair, however pairs share batches."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


from tiny_models import IDS, SIZES, random_model, tiny_tokenizer  # noqa: E402
from zoo import NotBuiltError, build  # noqa: E402

import lmprobe_zarr as lz  # noqa: E402
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, PromptTooLongError  # noqa: E402

pytestmark = pytest.mark.model

PAIRS = [
    ("Who wrote this?", "A poet."),
    ("Rain", "It rained for many days and nights."),
    ("Translate: the house is small and the garden is large", "Das"),
    ("Rain", "Snow"),
    ("Snow", "Snow"),
]
TYPES = ["t5", "bart", "mbart", "m2m_100", "encoder-decoder"]
MORE_TYPES = [
    "blenderbot",
    "led",
    "longt5",
    "marian",
    "mt5",
    "mvp",
    "nllb-moe",
    "pegasus",
    "plbart",
    "prophetnet",
    "switch_transformers",
    "umt5",
]


def built(kind: str) -> Any:
    """A tiny random model whose configuration names what its decoder reads first."""
    try:
        model = build("seq2seq", kind).model
    except NotBuiltError as error:
        pytest.skip(str(error))
    if getattr(model.config, "decoder_start_token_id", None) is None:
        model.config.decoder_start_token_id = model.config.pad_token_id or 0
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = 0
    return model


def shifted(model: Any, labels: Any) -> Any:
    """What the decoder reads for labels, as transformers computes it."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return model.prepare_decoder_input_ids_from_labels(labels=labels)
    shift = sys.modules[type(model).__module__].shift_tokens_right
    return shift(labels, model.config.pad_token_id, model.config.decoder_start_token_id)


def own_output(model: Any, tokenizer: Any, pair: tuple[str, str]) -> tuple[Any, Any]:
    """What transformers gives for one pair whose second text is the label, and the ids that its decoder reads."""
    read = torch.tensor([tokenizer(pair[0])["input_ids"]])
    ids = shifted(model, torch.tensor([tokenizer(text_target=pair[1])["input_ids"]]))
    with torch.no_grad():
        return model(input_ids=read, decoder_input_ids=ids, output_hidden_states=True, use_cache=False), ids[0]


def extracted(model: Any, tokenizer: Any, folder: Path, pairs: Any = PAIRS, **options: Any) -> Any:
    store = lz.open_store(folder / "acts", durable=False)
    options = {"pooling": ("last_token", "mean"), "keep_tokens": True, "progress": False, **options}
    lz.extract(model, pairs, name="m", tokenizer=tokenizer, store=store, **options)
    return store


def check_values(kind: str, folder: Path) -> None:
    model, tokenizer = built(kind), tiny_tokenizer(encoder=True)
    store = extracted(model, tokenizer, folder)
    data, tokens = store.dataset("m", prompts=PAIRS).load(), store.tokens("m", prompts=PAIRS).load()
    assert data.text.values.tolist() == [second for _, second in PAIRS]
    assert data.encoder_text.values.tolist() == [first for first, _ in PAIRS]
    for row, pair in enumerate(PAIRS):
        output, ids = own_output(model, tokenizer, pair)
        right = torch.stack(output.decoder_hidden_states[1:-1])[:, 0].numpy()
        chosen = tokens.isel(token=tokens.prompt.values == lz.prompt_hash(pair))
        assert chosen.token_id.values.tolist() == ids.tolist()
        close: dict[str, Any] = {"atol": 1e-5 * max(1.0, float(np.abs(right).max())), "rtol": 0}
        np.testing.assert_allclose(chosen.resid.values[:-1], right, **close)
        np.testing.assert_allclose(data.resid_mean.isel(prompt=row).values[:-1], right.mean(1), **close)
        np.testing.assert_allclose(data.resid_last_token.isel(prompt=row).values[:-1], right[:, -1], **close)


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", TYPES)
def test_values_of_a_decoder_are_transformers_own(kind: str, tmp_path: Path) -> None:
    check_values(kind, tmp_path)


@pytest.mark.skipif("LMPROBE_ZARR_STRESS" not in os.environ, reason="more types take minutes: make stress")
@pytest.mark.parametrize("kind", MORE_TYPES)
def test_values_of_the_decoders_of_more_types_are_transformers_own(kind: str, tmp_path: Path) -> None:
    check_values(kind, tmp_path)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("kind", "mlp", "projection"), [("t5", "layer.2.DenseReluDense", "layer.2.DenseReluDense.wo"), ("bart", "fc2", "fc2")]
)
def test_the_mlp_of_a_decoder_is_not_its_attention_to_the_encoder(kind: str, mlp: str, projection: str, tmp_path: Path) -> None:
    model, tokenizer = built(kind), tiny_tokenizer(encoder=True)
    store = extracted(model, tokenizer, tmp_path, sites=["mlp", "neurons"], keep_tokens=False, pooling="mean")
    blocks = model.get_decoder().block if kind == "t5" else model.get_decoder().layers
    data = store.dataset("m", prompts=PAIRS).load()
    for row, pair in enumerate(PAIRS):
        kept: dict[str, list[Any]] = {"mlp": [], "neurons": []}
        handles = [b.get_submodule(mlp).register_forward_hook(lambda _, _a, out, kept=kept: kept["mlp"].append(out[0])) for b in blocks]
        handles += [
            b.get_submodule(projection).register_forward_pre_hook(lambda _, args, kept=kept: kept["neurons"].append(args[0][0]))
            for b in blocks
        ]
        own_output(model, tokenizer, pair)
        for handle in handles:
            handle.remove()
        for site, values in kept.items():
            right = torch.stack(values).mean(1).numpy()
            np.testing.assert_allclose(
                data[f"{site}_mean"].isel(prompt=row).values, right, atol=1e-5 * max(1.0, float(np.abs(right).max()))
            )


@pytest.fixture(scope="module")
def bart() -> Any:
    return built("bart")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer(encoder=True)


def test_logits_and_perplexity_are_of_the_decoders_text(bart: Any, tokenizer: Any, tmp_path: Path) -> None:
    store = extracted(bart, tokenizer, tmp_path, pooling=(), keep_tokens=False, perplexity=True, logits="all")
    tokens = store.tokens("m", prompts=PAIRS).load()
    for pair in PAIRS:
        output, ids = own_output(bart, tokenizer, pair)
        chosen = tokens.isel(token=tokens.prompt.values == lz.prompt_hash(pair))
        np.testing.assert_allclose(chosen.logits.values, output.logits[0].numpy(), atol=1e-4)
        right = torch.log_softmax(output.logits[0].double(), -1)[:-1].gather(1, ids[1:, None])[:, 0]
        np.testing.assert_allclose(chosen.token_log_prob.values[1:], right.numpy(), atol=1e-4)


@contextmanager
def returned_by(modules: dict[str, list[Any]]) -> Iterator[dict[str, list[Any]]]:
    """What some modules return, by name, in the order of their calls."""
    seen: dict[str, list[Any]] = {name: [] for name in modules}

    def keep(name: str) -> Any:
        return lambda _module, _given, out: seen[name].append(out[0] if isinstance(out, tuple) else out)

    hooks = [part.register_forward_hook(keep(name)) for name, parts in modules.items() for part in parts]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def test_what_attention_and_mlp_add_is_what_the_modules_return(bart: Any, tokenizer: Any, tmp_path: Path) -> None:
    store = extracted(bart, tokenizer, tmp_path, pooling=(), sites=("attn", "mlp", "embed"))
    tokens = store.tokens("m").load()
    for pair in PAIRS:
        layers = bart.get_decoder().layers
        with returned_by({"attn": [each.self_attn for each in layers], "mlp": [each.fc2 for each in layers]}) as seen:
            output, _ = own_output(bart, tokenizer, pair)
        chosen = tokens.isel(token=tokens.prompt.values == lz.prompt_hash(pair))
        for site, values in seen.items():
            right = torch.stack([value.reshape(-1, value.shape[-1]) for value in values]).numpy()
            np.testing.assert_allclose(chosen[site].values, right, atol=1e-5)
        np.testing.assert_allclose(chosen.embed.values, output.decoder_hidden_states[0][0].numpy(), atol=1e-5)


def test_a_folder_serves_pairs_and_texts_from_groups_of_their_own(bart: Any, tokenizer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    bart.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    store = lz.open_store(tmp_path / "acts", durable=False)
    plan = lz.plan_extract(folder, PAIRS, store=store)
    decoder, encoder = len(bart.get_decoder().layers), len(bart.get_encoder().layers)
    lengths = [len(tokenizer(second)["input_ids"]) for _, second in PAIRS]
    assert (plan.missing, plan.layers, plan.tokens) == (len(PAIRS), tuple(range(decoder)), sum(lengths))
    options: dict[str, Any] = {"store": store, "progress": False}
    stats = lz.extract(folder, PAIRS, **options)
    assert (stats.extracted, stats.tokens) == (len(PAIRS), sum(lengths))
    assert lz.extract(folder, PAIRS[::-1], **options).found == len(PAIRS)
    texts = lz.extract(folder, [second for _, second in PAIRS], **options)
    assert texts.found == 0
    assert texts.group != stats.group
    assert lz.plan_extract(folder, ["Rain"], store=store).layers == tuple(range(encoder))
    assert store.groups()[stats.group].provenance["stack"] == "decoder"
    assert "stack" not in store.groups()[texts.group].provenance
    by_object = lz.extract(bart, PAIRS, name="other", tokenizer=tokenizer, **options)
    np.testing.assert_allclose(
        store.dataset(group=stats.group, prompts=PAIRS).resid_last_token,
        store.dataset(group=by_object.group, prompts=PAIRS).resid_last_token,
        atol=1e-6,
    )


def test_a_checkpoint_without_a_head_serves_pairs(bart: Any, tokenizer: Any, tmp_path: Path) -> None:
    bart.model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    store = lz.open_store(tmp_path / "acts", durable=False)
    lz.extract(tmp_path / "model", PAIRS, name="m", store=store, progress=False)
    right = extracted(bart, tokenizer, tmp_path / "other", keep_tokens=False).dataset("m", prompts=PAIRS)
    np.testing.assert_allclose(store.dataset("m", prompts=PAIRS).resid_last_token, right.resid_last_token, atol=1e-6)


def test_a_probe_learns_from_pairs(bart: Any, tokenizer: Any, tmp_path: Path) -> None:
    pairs = [("Rain", f"It is {word} today") for word in ("wet", "dry", "cold", "warm")] * 5
    pairs = [(f"{first} {number}", second) for number, (first, second) in enumerate(pairs)]
    labels = [int("wet" in second or "cold" in second) for _, second in pairs]
    probe = lz.Probe(bart, name="m", tokenizer=tokenizer, store=tmp_path / "acts", layers=0)
    assert probe.fit(pairs, labels).score(pairs, labels) > 0.9


def test_texts_are_left_out_of_the_store_where_they_are_not_wanted(bart: Any, tokenizer: Any, tmp_path: Path) -> None:
    data = extracted(bart, tokenizer, tmp_path, keep_tokens=False, store_text=False).dataset("m", prompts=PAIRS)
    assert "encoder_text" not in data.coords
    assert data.resid_mean.notnull().all()


def test_characters_of_tokens_are_those_of_the_decoders_text(bart: Any, tokenizer: Any, tmp_path: Path) -> None:
    tokens = extracted(bart, tokenizer, tmp_path, pairs=[("Rain", "It rained.")]).tokens("m").load()
    starts, ends = tokens.char_start.values.tolist(), tokens.char_end.values.tolist()
    encoded = tokenizer("It rained.", return_offsets_mapping=True)["offset_mapping"][:-1]
    assert (starts[0], ends[0]) == (-1, -1)
    assert [pair for pair in zip(starts, ends, strict=True) if pair != (-1, -1)] == [pair for pair in encoded if pair != (0, 0)]


def test_long_texts_on_either_side_are_refused_or_cut(bart: Any, tokenizer: Any, tmp_path: Path) -> None:
    long = "word " * 200
    for pair in (("Rain", long), (long, "Rain")):
        with pytest.raises(PromptTooLongError, match="the limit is"):
            extracted(bart, tokenizer, tmp_path, pairs=[pair])
    # The decoder reads as many tokens as the text has with its special ones: the first comes, the end goes.
    exact = len(tokenizer("It rained for days.")["input_ids"])
    extracted(bart, tokenizer, tmp_path / "exact", pairs=[("Rain", "It rained for days.")], max_length=exact)
    with pytest.raises(PromptTooLongError, match=f"the limit is {exact - 1}"):
        extracted(bart, tokenizer, tmp_path, pairs=[("Rain", "It rained for days!")], max_length=exact - 1)
    with pytest.raises(PromptTooLongError, match="the limit is 3"):
        extracted(bart, tokenizer, tmp_path, pairs=[("Rain", "It rained for days?")], max_length=3, add_special_tokens=False)
    store = extracted(bart, tokenizer, tmp_path, pairs=[("Rain", long), (long, "Rain")], truncation=True, max_length=16)
    tokens = store.tokens("m").load()
    assert int((tokens.prompt.values == lz.prompt_hash(("Rain", long))).sum()) <= 16
    cut = tokenizer(long, truncation=True, max_length=16)["input_ids"]
    with torch.no_grad():
        right = bart(
            input_ids=torch.tensor([cut]), decoder_input_ids=shifted(bart, torch.tensor([tokenizer("Rain")["input_ids"]])),
            output_hidden_states=True,
        ).decoder_hidden_states[1][0].numpy()  # fmt: skip
    np.testing.assert_allclose(
        tokens.resid.isel(layer=0, token=tokens.prompt.values == lz.prompt_hash((long, "Rain"))).values, right, atol=1e-5
    )


def test_pairs_are_refused_where_they_mean_nothing(bart: Any, tokenizer: Any, tmp_path: Path) -> None:
    decoder_only = random_model("LlamaModel", "LlamaConfig", **SIZES, **IDS)
    with pytest.raises(InvalidArgumentError, match=r"it is no encoder-decoder\. Give a flat list of texts"):
        extracted(decoder_only, tokenizer, tmp_path)
    with pytest.raises(InvalidArgumentError, match="is not its decoder"):
        extracted(bart, tokenizer, tmp_path, modules={"layers": "model.encoder.layers"})
    with pytest.raises(InvalidArgumentError, match="a pair with an empty text"):
        extracted(bart, tokenizer, tmp_path, pairs=[("Rain", "")])
    with pytest.raises(InvalidTypeError, match=r"prompts\[0\] is a pair of texts but prompts\[1\] is a text"):
        extracted(bart, tokenizer, tmp_path, pairs=[("Rain", "Snow"), "Rain"])
    with pytest.raises(InvalidTypeError, match="a tuple of two texts"):
        extracted(bart, tokenizer, tmp_path, pairs=[["Rain", "Snow"]])
    with pytest.raises(InvalidArgumentError, match="coords names 'encoder_text'"):
        extracted(bart, tokenizer, tmp_path, pairs=[("Rain", "Snow")], coords={"encoder_text": ["x"]})
    with pytest.raises(InvalidArgumentError, match="the prompts are pairs of texts: give chats"):
        extracted(bart, tokenizer, tmp_path, tools=[{"type": "function"}])


def test_the_decoder_named_by_hand_is_the_one_that_is_found(bart: Any, tokenizer: Any, tmp_path: Path) -> None:
    store = extracted(bart, tokenizer, tmp_path, keep_tokens=False)
    named = lz.extract(bart, PAIRS, name="m", tokenizer=tokenizer, store=store, modules={"layers": "model.decoder.layers"}, progress=False)
    assert named.found == len(PAIRS)


def test_a_configuration_without_a_first_token_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    model = built("t5")
    model.config.decoder_start_token_id = model.config.bos_token_id = None
    with pytest.raises(InvalidArgumentError, match="names no decoder_start_token_id"):
        extracted(model, tokenizer, tmp_path)


def test_the_hash_of_a_pair_is_of_both_texts_and_their_sides() -> None:
    pairs = [("a", "b"), ("b", "a"), ("ab", ""), ("a", "ab"), ("aa", "b")]
    assert len({lz.prompt_hash(pair) for pair in pairs}) == len(pairs)
    sides = b"".join(hashlib.sha256(text.encode()).digest() for text in ("a", "b"))
    assert lz.prompt_hash(("a", "b")) == hashlib.sha256(b"\0pair\0" + sides).hexdigest()[:16]
    with pytest.raises(InvalidTypeError, match="a flat list of token ids"):
        lz.prompt_hash(["a", "b"])  # type: ignore[arg-type]
