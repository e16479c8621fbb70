"""What a model says of its prompts: logits, perplexities and router scores, against the same model run one prompt at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from loaded_models import Scarce, by_prompt, checked_from, loaded_from
from tiny_models import PROMPTS, TINY, save_tiny, tiny_model, tiny_tokenizer

from lmprobe_zarr.batch.sites import INNER_DIMS, SCALARS, Outputs, Sites, parse_sites, row_bytes
from lmprobe_zarr.batch.token_batch import TokenBatch
from lmprobe_zarr.errors import InvalidArgumentError, ModelNotFoundError, UnknownArchitectureError
from lmprobe_zarr.extraction import models as extraction
from lmprobe_zarr.extraction.models import TokenizedPrompts, parse_prompts, tokenize

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)
pytestmark = pytest.mark.model

Array = npt.NDArray[Any]
CAUSAL = "AutoModelForCausalLM"
# Some are mixtures of experts in every layer, some in every second, some behind a dense first one.
MIXTURES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "mixtral": ({}, (0, 1, 2, 3)),
    "qwen2_moe": ({"decoder_sparse_step": 2}, (1, 3)),
    "qwen3_moe": ({"mlp_only_layers": [2]}, (0, 1, 3)),
    "deepseek_v2": ({}, (1, 2, 3)),
    "deepseek_v3": ({}, (1, 2, 3)),
}
DECODERS = [kind for kind, tiny in TINY.items() if not tiny.encoder]


def options_of(kind: str) -> dict[str, Any]:
    return MIXTURES[kind][0] if kind in MIXTURES else {}


def each(tokenized: TokenizedPrompts) -> Iterator[tuple[str, Array]]:
    ends = np.cumsum(tokenized.lengths)
    for row, digest in enumerate(tokenized.sha256):
        yield digest, tokenized.token_ids[ends[row] - tokenized.lengths[row] : ends[row]]


def logits_alone(model: Any, ids: Array) -> Array:
    with torch.no_grad():
        found: Array = model(input_ids=torch.from_numpy(ids)[None]).logits[0].float().numpy()
    return found


def log_probs_by_hand(logits: Array, ids: Array) -> Array:
    wide = logits.astype(np.float64)
    total = np.log(np.exp(wide - wide.max(-1, keepdims=True)).sum(-1)) + wide.max(-1)
    return np.array([np.nan] + [wide[place - 1, ids[place]] - total[place - 1] for place in range(1, len(ids))])


def router_scores_by_hand(kind: str, model: Any, ids: Array) -> dict[int, Array]:
    """From what goes into the mixture and the gate's weights, whatever the gate gives."""
    body = model.model if hasattr(model, "model") else model
    heard: dict[int, Array] = {}
    handles = []
    for layer, block in enumerate(body.layers):
        mixture = getattr(block, "mlp", None) or block.block_sparse_moe
        if hasattr(mixture, "gate"):
            weight = mixture.gate.weight.detach().double().numpy()

            def hear(_module: Any, args: Any, layer: int = layer, weight: Array = weight) -> None:
                heard[layer] = args[0][0].double().numpy() @ weight.T

            handles.append(mixture.register_forward_pre_hook(hear))
    with torch.no_grad():
        body(input_ids=torch.from_numpy(ids)[None])
    for handle in handles:
        handle.remove()
    return heard


def tokens_of(batches: list[TokenBatch], variable: str) -> dict[str, Array]:
    found: dict[str, Array] = {}
    for batch in batches:
        if variable in batch.tokens:
            assert batch.n_tokens is not None
            ends = np.cumsum(batch.n_tokens)
            for row, digest in enumerate(batch.sha256):
                own = slice(ends[row] - batch.n_tokens[row], ends[row])
                found[digest] = batch.tokens[variable][own] if variable in batch.unlayered else batch.tokens[variable][:, own]
    return found


# ---------------------------------------------------------------- what the head says


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", DECODERS)
def test_logits_and_perplexities_are_those_of_the_prompt_alone(kind: str, tmp_path: Path) -> None:
    folder = save_tiny(kind, tmp_path / kind, head=CAUSAL, **options_of(kind))
    loaded = extraction.load_model(folder, device="cpu", head=True)
    tokenized = tokenize(parse_prompts(PROMPTS), loaded.tokenizer)
    truth = {digest: logits_alone(loaded.module, ids) for digest, ids in each(tokenized)}
    for budget in (1, 120, 10**6):
        every = by_prompt(list(extraction.run(loaded, tokenized, outputs=Outputs(perplexity=True, logits="all"), batch_tokens=budget)))
        last = by_prompt(list(extraction.run(loaded, tokenized, outputs=Outputs(logits="last_token"), batch_tokens=budget)))
        both = by_prompt(
            list(extraction.run(loaded, tokenized, outputs=Outputs(logits="last_token", perplexity=True), batch_tokens=budget))
        )
        assert set(every) == set(last) == set(both) == set(truth)
        for digest, ids in each(tokenized):
            mine, logits = every[digest], truth[digest]
            np.testing.assert_allclose(mine["logits"], logits, rtol=0, atol=1e-5)
            np.testing.assert_allclose(last[digest]["logits_last_token"], logits[-1], rtol=0, atol=1e-5)
            np.testing.assert_allclose(both[digest]["logits_last_token"], logits[-1], rtol=0, atol=1e-5)
            by_hand = log_probs_by_hand(logits, ids)
            for found in (mine, both[digest]):
                np.testing.assert_allclose(found["token_log_prob"], by_hand, rtol=0, atol=1e-5)
                np.testing.assert_allclose(found["token_perplexity"], np.exp(-by_hand), rtol=1e-4)
                losses = [-x for x in by_hand[1:]]
                means = [math.exp(sum(losses) / len(losses)), math.exp(min(losses)), math.exp(max(losses))]
                np.testing.assert_allclose(found["perplexity"], means, rtol=1e-4)
            assert {mine[name].dtype.name for name in (*SCALARS, "perplexity", "logits")} == {"float32"}


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "qwen2_moe", "deepseek_v3"])
def test_activations_are_the_same_with_the_head_and_without(kind: str, tmp_path: Path) -> None:
    folder = save_tiny(kind, tmp_path / kind, head=CAUSAL, **options_of(kind))
    whole, body = extraction.load_model(folder, device="cpu", head=True), extraction.load_model(folder, device="cpu")
    assert whole.provenance == body.provenance
    assert whole.recorded == body.recorded
    assert (whole.num_layers, whole.hidden_size, whole.vocab_size) == (body.num_layers, body.hidden_size, body.vocab_size)
    tokenized = tokenize(parse_prompts(PROMPTS), body.tokenizer)
    asked: dict[str, Any] = {"sites": ("resid", "embed", "mlp"), "layers": [1, 2], "poolings": "mean", "keep_tokens": True}
    plain = by_prompt(list(extraction.run(body, tokenized, **asked)))
    more = by_prompt(list(extraction.run(whole, tokenized, outputs=Outputs(perplexity=True, logits="last_token"), **asked)))
    for digest, values in plain.items():
        for name, value in values.items():
            assert np.array_equal(more[digest][name], value), name


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["CohereConfig", "GraniteConfig"])
def test_logits_are_scaled_as_the_model_scales_them_also_where_the_blocks_are_named_by_hand(kind: str) -> None:
    scale = {"CohereConfig": {"logit_scale": 0.3}, "GraniteConfig": {"logits_scaling": 7.0}}[kind]
    sizes: dict[str, Any] = {**TINY["llama"].options, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**sizes, **scale)).eval()
    loaded = loaded_from(model, modules={"layers": "model.layers"})
    tokenized = tokenize(parse_prompts(PROMPTS), loaded.tokenizer)
    found = by_prompt(list(extraction.run(loaded, tokenized, outputs=Outputs(perplexity=True, logits="all"))))
    for digest, ids in each(tokenized):
        logits = logits_alone(model, ids)
        np.testing.assert_allclose(found[digest]["logits"], logits, atol=1e-5)
        np.testing.assert_allclose(found[digest]["token_log_prob"], log_probs_by_hand(logits, ids), atol=1e-5)


def test_capped_logits_are_kept_capped() -> None:
    model = tiny_model("gemma2", CAUSAL, final_logit_softcapping=0.5)
    loaded = loaded_from(model)
    (batch,) = extraction.run(loaded, tokenize(parse_prompts(["Who?"]), loaded.tokenizer), outputs=Outputs(logits="all"))
    assert 0.3 < abs(batch.tokens["logits"]).max() <= 0.5


def test_a_head_that_is_not_seen_at_work_gives_the_same() -> None:
    model = tiny_model("llama", CAUSAL)
    loaded = loaded_from(model)
    # As where a model multiplies with its embeddings itself: nothing can be left out before the logits are there.
    blind = dataclasses.replace(loaded, located=dataclasses.replace(loaded.located, head=torch.nn.Linear(32, 300)))
    tokenized = tokenize(parse_prompts(PROMPTS), loaded.tokenizer)
    for outputs in (Outputs(perplexity=True, logits="all"), Outputs(logits="last_token")):
        one, other = (by_prompt(list(extraction.run(m, tokenized, outputs=outputs, batch_tokens=10**6))) for m in (loaded, blind))
        for digest, values in one.items():
            for name, value in values.items():
                np.testing.assert_allclose(other[digest][name], value, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.few(1)
@pytest.mark.parametrize("position", ["last_token", "all"])
def test_the_top_k_are_the_largest_of_all_logits(position: Any) -> None:
    loaded = loaded_from(tiny_model("gpt2", CAUSAL))
    tokenized = tokenize(parse_prompts(PROMPTS), loaded.tokenizer)
    full = by_prompt(list(extraction.run(loaded, tokenized, outputs=Outputs(logits=position), batch_tokens=120)))
    for k in (1, 7, 300):
        found = by_prompt(list(extraction.run(loaded, tokenized, outputs=Outputs(logits=position, top_k=k), batch_tokens=120)))
        name = "logits" if position == "all" else "logits_last_token"
        for digest, values in found.items():
            top, places, every = values[f"{name}_top_k_values"], values[f"{name}_top_k_indices"], full[digest][name]
            assert (top.dtype.name, places.dtype.name) == ("float32", "int32")
            assert np.array_equal(top, -np.sort(-every, axis=-1)[..., :k])
            assert np.array_equal(np.take_along_axis(every, places.astype(np.int64), -1), top)
            assert name not in values


def test_bfloat16_logits_come_exactly_as_float32_and_their_probabilities_are_computed_in_float32(tmp_path: Path) -> None:
    loaded = extraction.load_model(save_tiny("llama", tmp_path / "m", head=CAUSAL, dtype="bfloat16"), device="cpu", head=True)
    tokenized = tokenize(parse_prompts(PROMPTS[:1]), loaded.tokenizer)
    outputs = Outputs(perplexity=True, logits="all")
    (batch,) = extraction.run(loaded, tokenized, outputs=outputs, sites=())
    logits = logits_alone(loaded.module, tokenized.token_ids)
    assert batch.stored_dtype == {"logits": "bfloat16"}
    assert batch.tokens["logits"].dtype == np.float32
    assert np.array_equal(batch.tokens["logits"], logits)
    assert not (logits.view(np.uint32) & 0xFFFF).any()
    np.testing.assert_allclose(batch.tokens["token_log_prob"], log_probs_by_hand(logits, tokenized.token_ids), atol=1e-5)
    (top,) = extraction.run(loaded, tokenized, outputs=Outputs(logits="last_token", top_k=3), sites=())
    assert top.stored_dtype == {"logits_last_token_top_k_values": "bfloat16"}
    assert top.prompts["logits_last_token_top_k_indices"].dtype == np.int32


def test_float16_and_float64_logits_stay_as_they_are_and_perplexities_are_float32() -> None:
    for name in ("float16", "float64"):
        loaded = loaded_from(tiny_model("llama", CAUSAL).to(getattr(torch, name)))
        tokenized = tokenize(parse_prompts(["Who?"]), loaded.tokenizer)
        (batch,) = extraction.run(loaded, tokenized, outputs=Outputs(perplexity=True, logits="all"), sites=())
        assert batch.tokens["logits"].dtype.name == name
        assert batch.prompts["perplexity"].dtype == batch.tokens["token_log_prob"].dtype == np.float32
        by_hand = log_probs_by_hand(batch.tokens["logits"], tokenized.token_ids)
        np.testing.assert_allclose(batch.tokens["token_log_prob"], by_hand, atol=1e-5)


def test_a_prompt_of_one_token_has_a_perplexity_of_one_and_its_token_has_none() -> None:
    loaded = loaded_from(tiny_model("llama", CAUSAL))
    for prompts in ([[5]], [[5], [6, 7, 8], [9]]):
        tokenized = tokenize(parse_prompts(prompts), loaded.tokenizer)
        found = by_prompt(list(extraction.run(loaded, tokenized, outputs=Outputs(perplexity=True), sites=(), batch_tokens=10**6)))
        alone = found[tokenized.sha256[0]]
        assert alone["perplexity"].tolist() == [1, 1, 1]
        assert np.isnan(alone["token_log_prob"]).all()
        assert np.isnan(alone["token_perplexity"]).all()
        for digest, ids in each(tokenized):
            assert np.isnan(found[digest]["token_log_prob"]).tolist() == [True] + [False] * (len(ids) - 1)


def test_the_perplexity_of_a_head_that_knows_nothing_is_the_size_of_the_vocabulary() -> None:
    model = tiny_model("llama", CAUSAL)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    loaded = loaded_from(model)
    (batch,) = extraction.run(loaded, tokenize(parse_prompts([[4, 5, 6]]), loaded.tokenizer), outputs=Outputs(perplexity=True))
    np.testing.assert_allclose(batch.prompts["perplexity"], [[300, 300, 300]], rtol=1e-5)
    np.testing.assert_allclose(batch.tokens["token_log_prob"][1:], -math.log(300), rtol=1e-6)


def test_perplexities_follow_the_formula_by_hand() -> None:
    from lmprobe_zarr.extraction.models.outputs import perplexity_of

    nothing = np.nan
    log_probs = np.log(np.array([nothing, 0.5, 0.125, nothing, nothing, 0.25], np.float32))
    prompts, tokens = perplexity_of(log_probs, np.array([3, 1, 2]))
    # The geometric mean of 2 and 8 is 4.
    np.testing.assert_allclose(prompts, [[4, 2, 8], [1, 1, 1], [4, 4, 4]], rtol=1e-6)
    np.testing.assert_allclose(tokens, [nothing, 2, 8, nothing, nothing, 4], rtol=1e-6)
    assert perplexity_of(np.array([nothing, -2000.0], np.float32), np.array([2]))[0].tolist() == [[math.inf] * 3]
    assert np.isnan(perplexity_of(np.array([nothing, nothing, -1.0], np.float32), np.array([3]))[0]).all()  # the model's own NaN


def test_logits_are_worked_through_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    from lmprobe_zarr.extraction.models import outputs as made

    loaded = loaded_from(tiny_model("llama", CAUSAL))
    tokenized = tokenize(parse_prompts(PROMPTS), loaded.tokenizer)
    asked = Outputs(perplexity=True, logits="all", top_k=5)
    truth = by_prompt(list(extraction.run(loaded, tokenized, outputs=asked)))
    seen: list[int] = []
    whole = torch.nn.functional.cross_entropy

    def watched(logits: Any, *rest: Any, **options: Any) -> Any:
        seen.append(len(logits))
        return whole(logits, *rest, **options)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", watched)
    for rows in (1, 3):
        monkeypatch.setattr(made, "SLICE_BYTES", rows * 300 * 4)
        found = by_prompt(list(extraction.run(loaded, tokenized, outputs=asked)))
        assert max(seen) == rows
        seen.clear()
        for digest, values in truth.items():
            for name, value in values.items():
                np.testing.assert_allclose(found[digest][name], value, atol=1e-6)


def test_the_head_sees_no_padding_and_only_the_last_tokens_where_they_are_enough() -> None:
    model = tiny_model("llama", CAUSAL)
    loaded = checked_from(model, provenance={"watched": True})
    tokenized = tokenize(parse_prompts(PROMPTS), loaded.tokenizer)
    seen: list[tuple[int, ...]] = []
    model.lm_head.register_forward_hook(lambda _m, _a, output: seen.append(tuple(output.shape)))
    for outputs in (Outputs(logits="last_token", top_k=2), Outputs(perplexity=True), Outputs(logits="all")):
        list(extraction.run(loaded, tokenized, outputs=outputs, batch_tokens=10**6))
    assert seen == [(1, len(PROMPTS), 300), (1, tokenized.num_tokens, 300), (1, tokenized.num_tokens, 300)]


# ---------------------------------------------------------------- routers


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", MIXTURES)
def test_router_scores_are_those_of_the_prompt_alone_before_any_softmax(kind: str, tmp_path: Path) -> None:
    options, layers = MIXTURES[kind]
    loaded = extraction.load_model(save_tiny(kind, tmp_path / kind, **options), device="cpu")
    assert loaded.router_layers == layers
    assert loaded.num_experts == 4
    tokenized = tokenize(parse_prompts(PROMPTS), loaded.tokenizer)
    for budget in (1, 120, 10**6):
        batches = list(extraction.run(loaded, tokenized, outputs=Outputs(router=True), sites=(), batch_tokens=budget))
        assert {batch.layers for batch in batches} == {layers}
        found = tokens_of(batches, "router")
        for digest, ids in each(tokenized):
            truth = router_scores_by_hand(kind, loaded.module, ids)
            assert found[digest].shape == (len(layers), len(ids), 4)
            np.testing.assert_allclose(found[digest], np.stack([truth[layer] for layer in layers]), rtol=0, atol=1e-5)
            assert (found[digest] < 0).any()


def test_router_scores_of_a_mixtral_are_those_that_transformers_gives() -> None:
    model = tiny_model("mixtral", CAUSAL)
    loaded = loaded_from(model)
    tokenized = tokenize(parse_prompts(PROMPTS), loaded.tokenizer)
    found = tokens_of(list(extraction.run(loaded, tokenized, outputs=Outputs(router=True), sites=())), "router")
    for digest, ids in each(tokenized):
        with torch.no_grad():
            scores = model(input_ids=torch.from_numpy(ids)[None], output_router_logits=True).router_logits
        own = torch.stack([each.reshape(-1, 4) for each in scores]).numpy()
        if abs(own.sum(-1) - 1).max() > 1e-4:  # some releases give probabilities under this name
            np.testing.assert_allclose(found[digest], own, atol=1e-5)


def test_a_router_with_other_layers_comes_in_a_batch_of_its_own_directly_after() -> None:
    loaded = loaded_from(tiny_model("qwen2_moe", CAUSAL, decoder_sparse_step=2))
    tokenized = tokenize(parse_prompts(PROMPTS), loaded.tokenizer)
    outputs = Outputs(router=True, perplexity=True)
    batches = list(extraction.run(loaded, tokenized, outputs=outputs, batch_tokens=60, keep_tokens=False))
    assert len(batches) > 4
    for rest, router in zip(batches[::2], batches[1::2], strict=True):
        assert (rest.layers, router.layers) == ((0, 1, 2, 3), (1, 3))
        assert set(rest.tokens) == {"token_perplexity", "token_log_prob"}
        assert set(rest.prompts) == {"resid_last_token", "perplexity"}
        assert (set(router.tokens), set(router.prompts)) == ({"router"}, set())
        assert rest.unlayered == {"token_perplexity", "token_log_prob", "perplexity"}
        assert not router.unlayered
        assert router.sha256 == rest.sha256
        assert np.array_equal(router.n_tokens, rest.n_tokens)  # type: ignore[arg-type]
        assert set(rest.token_columns) == set(router.token_columns) == {"position", "token_id", "char_start", "char_end"}
        assert all(np.array_equal(column, router.token_columns[name]) for name, column in rest.token_columns.items())
    plain = by_prompt(list(extraction.run(loaded, tokenized)))
    for batch in batches[::2]:
        np.testing.assert_allclose(batch.prompts["resid_last_token"][:, 0], plain[batch.sha256[0]]["resid_last_token"], rtol=0, atol=1e-5)


@pytest.mark.few(2)
@pytest.mark.parametrize(("sites", "layers"), [("resid", [1, 3]), ("embed", "all"), ((), "all")])
def test_a_router_with_the_same_layers_or_the_only_ones_comes_in_the_same_batch(sites: Any, layers: Any) -> None:
    loaded = loaded_from(tiny_model("qwen2_moe", decoder_sparse_step=2))
    tokenized = tokenize(parse_prompts(PROMPTS), loaded.tokenizer)
    (batch,) = extraction.run(loaded, tokenized, sites=sites, layers=layers, outputs=Outputs(router=True), batch_tokens=10**6)
    assert batch.layers == (1, 3)
    assert set(batch.tokens) == {"router"}
    assert set(batch.prompts) == ({f"{sites}_last_token"} if sites else set())


def test_a_router_of_bfloat16_is_kept_as_the_model_scores() -> None:
    # Releases whose routers give probabilities leave the scores to be computed here, in float32.
    computed = transformers.__version__.startswith("5.0.")
    for kind, stored in (("mixtral", {} if computed else {"router": "bfloat16"}), ("deepseek_v3", {})):
        loaded = loaded_from(tiny_model(kind).to(torch.bfloat16))
        (batch,) = extraction.run(loaded, tokenize(parse_prompts(["Who?"]), loaded.tokenizer), sites=(), outputs=Outputs(router=True))
        assert batch.tokens["router"].dtype == np.float32
        # DeepSeek scores in float32, whatever the rest is computed in.
        assert batch.stored_dtype == stored


class Choosing(torch.nn.Module):  # type: ignore[misc,name-defined]
    """A router as transformers had them: that gives probabilities, or only the experts that it chose."""

    def __init__(self, gives: str) -> None:
        super().__init__()
        self.gives = gives
        self.weight = torch.nn.Parameter(torch.randn(4, 8))

    def forward(self, hidden: Any) -> Any:
        scores = torch.nn.functional.linear(hidden.flatten(0, -2), self.weight)
        if self.gives == "raw":
            return scores, scores.topk(2).indices
        probabilities = scores.softmax(-1)
        return (probabilities, probabilities.topk(2).indices) if self.gives == "probabilities" else probabilities.topk(4)[::-1]


class Mixture(torch.nn.Module):  # type: ignore[misc,name-defined]
    def __init__(self, gives: str) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(8, 4) if gives in {"linear", "unseen"} else Choosing(gives)
        self.gives = gives

    def forward(self, hidden: Any) -> Any:
        if self.gives == "unseen":
            return hidden + torch.nn.functional.linear(hidden, self.gate.weight, self.gate.bias).sum(-1, keepdim=True)
        given = self.gate(hidden)
        return hidden + (given[0] if isinstance(given, tuple) else given).float().mean()


class Mixed(torch.nn.Module):  # type: ignore[misc,name-defined]
    def __init__(self, gives: str) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(300, 8)
        self.blocks = torch.nn.ModuleList(
            torch.nn.ModuleDict({"mlp": Mixture(gives)}) if layer else torch.nn.ModuleDict({"mlp": torch.nn.Linear(8, 8)})
            for layer in range(3)
        )

    def forward(self, input_ids: Any) -> Any:
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = block["mlp"](hidden)
        return hidden


@pytest.mark.parametrize("gives", ["linear", "unseen", "raw", "probabilities", "chosen"])
def test_raw_scores_are_found_whatever_a_router_gives(gives: str) -> None:
    torch.manual_seed(0)
    model = Mixed(gives)
    loaded = loaded_from(model, modules={"layers": "blocks", "router": "mlp.gate"})
    assert loaded.router_layers == (1, 2)
    tokenized = tokenize(parse_prompts([[9, 8, 7]]), loaded.tokenizer)
    (batch,) = extraction.run(loaded, tokenized, sites=(), outputs=Outputs(router=True))
    with torch.no_grad():
        hidden = model.blocks[0]["mlp"](model.embed(torch.tensor([[9, 8, 7]])))
        for row, block in enumerate(list(model.blocks)[1:]):
            gate = block["mlp"].gate
            scores = hidden[0].double() @ gate.weight.double().T + (gate.bias.double() if getattr(gate, "bias", None) is not None else 0)
            np.testing.assert_allclose(batch.tokens["router"][row], scores.numpy(), rtol=0, atol=1e-5)
            hidden = block["mlp"](hidden)


def test_a_router_whose_scores_cannot_be_known_is_an_error_at_once() -> None:
    class Opaque(torch.nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(8, 4)

        def forward(self, hidden: Any) -> Any:
            return self.inner(hidden).softmax(-1)

    model = Mixed("raw")
    model.blocks[1]["mlp"].gate = Opaque()
    loaded = loaded_from(model, modules={"layers": "blocks", "router": "mlp.gate"})
    tokenized = tokenize(parse_prompts([[9, 8, 7]]), loaded.tokenizer)
    with pytest.raises(UnknownArchitectureError, match="Opaque"):
        extraction.run(loaded, tokenized, sites=(), outputs=Outputs(router=True))


# ---------------------------------------------------------------- what runs


def test_the_pass_stops_after_the_deepest_layer_unless_the_head_is_needed() -> None:
    model = tiny_model("qwen3_moe", CAUSAL, mlp_only_layers=[2])
    loaded = checked_from(model, provenance={"watched": True})
    tokenized = tokenize(parse_prompts(PROMPTS), loaded.tokenizer)
    calls: list[Any] = []
    for layer, block in enumerate(model.model.layers):
        block.input_layernorm.register_forward_pre_hook(lambda *_, layer=layer: calls.append(layer))
    model.lm_head.register_forward_pre_hook(lambda *_: calls.append("head"))

    def ran(**options: Any) -> list[Any]:
        calls.clear()
        list(extraction.run(loaded, tokenized, batch_tokens=10**6, **options))
        return list(calls)

    assert ran(layers=[0, 1], outputs=Outputs(router=True)) == [0, 1]
    assert ran(layers=[0, 2], outputs=Outputs(router=True)) == [0, 1, 2]
    assert ran(layers=[1, 2], outputs=Outputs(router=True), sites=()) == [0, 1]
    assert ran(layers=[1], outputs=Outputs(router=True), sites="embed") == [0, 1]
    assert ran(layers=[0], outputs=Outputs(perplexity=True, router=True)) == [0, 1, 2, 3, "head"]
    assert ran(outputs=Outputs(logits="last_token"), sites="embed") == [0, 1, 2, 3, "head"]
    assert ran(layers=[0]) == [0]


def test_tokens_and_their_columns_come_with_any_output_per_token() -> None:
    loaded = loaded_from(tiny_model("llama", CAUSAL))
    tokenized = tokenize(parse_prompts(PROMPTS), loaded.tokenizer)
    for outputs, per_token in (
        (Outputs(perplexity=True), True),
        (Outputs(logits="all", top_k=2), True),
        (Outputs(logits="last_token"), False),
    ):
        assert outputs.token_level is per_token
        for batch in extraction.run(loaded, tokenized, outputs=outputs, keep_tokens=False):
            assert (batch.n_tokens is not None) is per_token
            assert bool(batch.token_columns) is per_token
            assert "resid" not in batch.tokens
            named = {(level, name): layered for level, name, layered in outputs.variables()}
            assert {("tokens", name) for name in batch.tokens} == {key for key in named if key[0] == "tokens"}
            assert {("prompts", name) for name in batch.prompts} - {("prompts", "resid_last_token")} == {
                k for k in named if k[0] == "prompts"
            }
            assert batch.unlayered == {name for (_, name), layered in named.items() if not layered}


def test_without_a_pooling_or_tokens_only_the_outputs_are_kept() -> None:
    loaded = loaded_from(tiny_model("llama", CAUSAL))
    tokenized = tokenize(parse_prompts(PROMPTS), loaded.tokenizer)
    for batch in extraction.run(loaded, tokenized, poolings=(), outputs=Outputs(logits="last_token")):
        assert (set(batch.prompts), set(batch.tokens), batch.layers) == ({"logits_last_token"}, set(), ())


def test_what_a_row_weighs_counts_the_outputs() -> None:
    loaded = loaded_from(tiny_model("mixtral", CAUSAL).to(torch.bfloat16))
    tokenized = tokenize(parse_prompts(PROMPTS), loaded.tokenizer)
    for outputs in (
        Outputs(perplexity=True, logits="all", router=True),
        Outputs(perplexity=True, logits="last_token"),
        Outputs(logits="all", top_k=7),
        Outputs(logits="last_token", top_k=7, router=True),
    ):
        options: dict[str, Any] = {"sites": ("resid", "embed"), "keep_tokens": True, "outputs": outputs}
        batches = list(extraction.run(loaded, tokenized, layers=[0, 3], poolings="mean", **options))
        weight = row_bytes(
            layers=2, hidden_size=32, dtype="bfloat16", pooling="mean", vocab_size=300, experts=loaded.num_experts, **options
        )
        assert weight.total(len(tokenized), tokenized.num_tokens) == sum(batch.nbytes for batch in batches)


def test_batches_are_bounded_by_what_the_logits_weigh(monkeypatch: pytest.MonkeyPatch) -> None:
    from lmprobe_zarr.extraction.models import batching

    model = tiny_model("gpt2", CAUSAL)
    loaded = loaded_from(model, provenance={"watched": True})
    scarce = Scarce(model, 10**9, RuntimeError)
    tokenized = tokenize(parse_prompts([[n] * (1 + n % 9) for n in range(4, 200)]), loaded.tokenizer)
    monkeypatch.setattr(batching, "LEAST_TOKENS", 1)
    monkeypatch.setattr(batching, "BATCH_BYTES", 50 * 300 * 4)
    for outputs, padded, prompts in (
        (Outputs(perplexity=True), 50, 50),
        (Outputs(logits="all"), 25, 25),  # computed, and kept
        (Outputs(logits="last_token"), 2048, 50),
    ):
        scarce.shapes.clear()
        batches = list(extraction.run(loaded, tokenized, outputs=outputs, sites=()))
        assert sum(len(batch.sha256) for batch in batches) == len(tokenized)
        assert max(rows * longest for rows, longest in scarce.shapes) <= padded
        assert max(rows for rows, _ in scarce.shapes) <= prompts
        assert max(rows for rows, _ in scarce.shapes) > prompts // 3


def test_out_of_memory_halves_the_batch_with_outputs_too() -> None:
    model = tiny_model("qwen2_moe", CAUSAL, decoder_sparse_step=2)
    loaded = loaded_from(model, provenance={"watched": True})
    tokenized = tokenize(parse_prompts([f"prompt number {n} of the fox" for n in range(40)]), loaded.tokenizer)
    outputs = Outputs(perplexity=True, logits="last_token", top_k=3, router=True)
    truth = list(extraction.run(loaded, tokenized, outputs=outputs))

    def refuse(_module: Any, args: Any) -> None:
        if args[0].shape[1] > 100:  # the head is the first to need more
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    model.lm_head.register_forward_pre_hook(refuse, prepend=True)
    model.lm_head.register_forward_hook(lambda _m, _a, out: refuse(_m, (out,)))
    seen: list[tuple[int, int]] = []
    found = list(extraction.run(loaded, tokenized, outputs=outputs, batch_tokens=700, progress=lambda p, t: seen.append((p, t))))
    assert len(seen) > 4
    assert (sum(p for p, _ in seen), sum(t for _, t in seen)) == (40, tokenized.num_tokens)
    for name in ("router", "token_log_prob"):
        one, other = tokens_of(truth, name), tokens_of(found, name)
        assert set(one) == set(other)
        assert all(np.allclose(one[digest], other[digest], atol=1e-5, equal_nan=True) for digest in one)


@pytest.mark.few(2)
@pytest.mark.parametrize("way", ["ids", "chat", "truncated"])
def test_ids_chats_and_cut_prompts_have_outputs_of_the_tokens_that_were_run(way: str) -> None:
    loaded = loaded_from(tiny_model("gpt2", CAUSAL))
    if way == "ids":
        tokenized = tokenize(parse_prompts([[4, 5, 6], [7]]), loaded.tokenizer)
    elif way == "chat":
        template = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
        tokenizer = tiny_tokenizer(chat_template=template)
        chats: list[Any] = [[{"role": "user", "content": text}] for text in PROMPTS[:3]]
        tokenized = tokenize(parse_prompts(chats, tokenizer=tokenizer), tokenizer)
    else:
        tokenized = tokenize(parse_prompts(PROMPTS), loaded.tokenizer, max_length=6, truncation=True)
        assert tokenized.truncated.any()
    found = by_prompt(list(extraction.run(loaded, tokenized, outputs=Outputs(perplexity=True, logits="all"), sites=())))
    for digest, ids in each(tokenized):
        logits = logits_alone(loaded.module, ids)
        np.testing.assert_allclose(found[digest]["logits"], logits, atol=1e-5)
        np.testing.assert_allclose(found[digest]["token_log_prob"], log_probs_by_hand(logits, ids), atol=1e-5)


def test_batches_of_one_run_have_the_same_dtypes_and_no_hook_is_left() -> None:
    model = tiny_model("deepseek_v3", CAUSAL).to(torch.bfloat16)
    loaded = loaded_from(model)
    tokenized = tokenize(parse_prompts(PROMPTS), loaded.tokenizer)
    outputs = Outputs(perplexity=True, logits="all", router=True)
    batches = list(extraction.run(loaded, tokenized, outputs=outputs, batch_tokens=1))
    kinds: dict[str, set[Any]] = {}
    for batch in batches:
        for name, array in (*batch.tokens.items(), *batch.prompts.items()):
            kinds.setdefault(name, set()).add((array.dtype.name, batch.stored_dtype.get(name)))
    assert all(len(found) == 1 for found in kinds.values()), kinds
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_spread_over_devices_is_brought_together_with_its_outputs() -> None:
    loaded = loaded_from(tiny_model("mixtral", CAUSAL))
    tokenized = tokenize(parse_prompts(PROMPTS), loaded.tokenizer)
    outputs = Outputs(perplexity=True, logits="all", top_k=3, router=True)
    one, other = (
        by_prompt(list(extraction.run(m, tokenized, outputs=outputs))) for m in (loaded, dataclasses.replace(loaded, spread=True))
    )
    for digest, values in one.items():
        assert all(np.array_equal(other[digest][name], value, equal_nan=value.dtype.kind == "f") for name, value in values.items())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_an_adapter_changes_the_logits_and_the_router_as_it_does_in_the_model() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "lm_head"], init_lora_weights=False)
    base = tiny_model("mixtral", CAUSAL)
    bare = logits_alone(base, np.array([4, 5, 6]))
    model = peft.get_peft_model(base, config).eval()
    loaded = loaded_from(model)
    tokenized = tokenize(parse_prompts([[4, 5, 6], [9] * 9]), loaded.tokenizer)
    batches = list(extraction.run(loaded, tokenized, outputs=Outputs(logits="all", router=True), sites=(), batch_tokens=10**6))
    logits, router = tokens_of(batches, "logits"), tokens_of(batches, "router")
    for digest, ids in each(tokenized):
        np.testing.assert_allclose(logits[digest], logits_alone(model, ids), atol=1e-5)
        truth = router_scores_by_hand("mixtral", model.base_model.model, ids)
        np.testing.assert_allclose(router[digest], np.stack([truth[layer] for layer in range(4)]), atol=1e-5)
    assert abs(logits[tokenized.sha256[0]] - bare).max() > 1e-2


# ---------------------------------------------------------------- loading


def test_a_checkpoint_without_its_head_is_an_error_and_not_random_numbers(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "headless")
    extraction.load_model(folder, device="cpu")
    with pytest.raises(ModelNotFoundError, match=r"saved without its head \('lm_head.weight' is missing\)") as caught:
        extraction.load_model(folder, device="cpu", head=True)
    assert len(str(caught.value).splitlines()) <= 2
    classifier = save_tiny("llama", tmp_path / "classifier", head="AutoModelForSequenceClassification")
    with pytest.raises(ModelNotFoundError, match="saved without its head"):
        extraction.load_model(classifier, device="cpu", head=True)


def test_a_checkpoint_that_lacks_more_than_its_head_is_incomplete(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    folder = save_tiny("llama", tmp_path / "m", head=CAUSAL)
    weights = safetensors.load_file(folder / "model.safetensors")
    del weights["lm_head.weight"], weights["model.layers.1.mlp.up_proj.weight"]
    safetensors.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelNotFoundError, match="lack 2 of the model's tensors"):
        extraction.load_model(folder, device="cpu", head=True)


@pytest.mark.few(2)
@pytest.mark.parametrize(("kind", "options"), [("gpt2", {}), ("gemma2", {}), ("llama", {"tie_word_embeddings": True})])
def test_a_head_that_is_the_embeddings_needs_no_weights_of_its_own(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    whole, bare = save_tiny(kind, tmp_path / "whole", head=CAUSAL, **options), save_tiny(kind, tmp_path / "bare", **options)
    for folder in (whole, bare):
        loaded = extraction.load_model(folder, device="cpu", head=True)
        assert loaded.located.head is not None
        assert loaded.located.head.weight is loaded.located.body.get_input_embeddings().weight  # type: ignore[operator]


def test_names_of_modules_hold_with_the_head_and_without(tmp_path: Path) -> None:
    folder = save_tiny("gpt2", tmp_path / "m", head=CAUSAL)
    for layers in ("h", "transformer.h"):
        whole, body = (extraction.load_model(folder, device="cpu", modules={"layers": layers}, head=head) for head in (True, False))
        assert whole.provenance == body.provenance
        tokenized = tokenize(parse_prompts(PROMPTS), whole.tokenizer)
        one, other = (
            by_prompt(list(extraction.run(whole, tokenized, outputs=Outputs(perplexity=True)))),
            by_prompt(list(extraction.run(body, tokenized))),
        )
        assert all(np.array_equal(one[digest]["resid_last_token"], other[digest]["resid_last_token"]) for digest in one)


def test_an_encoder_is_asked_for_no_logits(tmp_path: Path) -> None:
    folder = save_tiny("bert", tmp_path / "bert")
    with pytest.raises(InvalidArgumentError, match="does not predict the next token"):
        extraction.load_model(folder, device="cpu", head=True)
    for head in ("AutoModel", "AutoModelForMaskedLM", "AutoModelForCausalLM"):
        loaded = loaded_from(tiny_model("bert", head), encoder=True)
        tokenized = tokenize(parse_prompts(PROMPTS), loaded.tokenizer)
        for outputs in (Outputs(perplexity=True), Outputs(logits="last_token")):
            with pytest.raises(InvalidArgumentError, match="does not predict the next token") as caught:
                extraction.run(loaded, tokenized, outputs=outputs)
            assert len(str(caught.value).splitlines()) <= 2
    by_hand = loaded_from(tiny_model("bert", "AutoModelForMaskedLM"), encoder=True, modules={"layers": "bert.encoder.layer"})
    with pytest.raises(InvalidArgumentError, match="does not predict the next token"):
        extraction.run(by_hand, tokenize(parse_prompts(PROMPTS), by_hand.tokenizer), outputs=Outputs(perplexity=True))
    both_ways = loaded_from(tiny_model("gemma3", CAUSAL, use_bidirectional_attention=True))
    with pytest.raises(InvalidArgumentError, match="does not predict the next token"):
        extraction.run(both_ways, tokenize(parse_prompts(PROMPTS), both_ways.tokenizer), outputs=Outputs(perplexity=True))


def test_an_architecture_without_such_a_head_is_an_error_before_it_is_loaded(tmp_path: Path) -> None:
    config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    config.save_pretrained(tmp_path)
    with pytest.raises(InvalidArgumentError, match=r"\(vit\) does not predict the next token"):
        extraction.load_model(tmp_path, device="cpu", head=True)


@pytest.mark.parametrize("head", ["AutoModel", "AutoModelForSequenceClassification", "AutoModelForTokenClassification"])
def test_an_object_without_a_head_says_so_before_it_runs(head: str) -> None:
    model = tiny_model("qwen3", head)
    loaded = loaded_from(model)
    tokenized = tokenize(parse_prompts(PROMPTS), loaded.tokenizer)
    for outputs in (Outputs(perplexity=True), Outputs(logits="all")):
        with pytest.raises(InvalidArgumentError, match="has no head") as caught:
            extraction.run(loaded, tokenized, outputs=outputs)
        assert len(str(caught.value).splitlines()) <= 2
    with pytest.raises(InvalidArgumentError, match="has no head"):
        loaded_from(model, head=True)


def test_own_code_in_the_head_needs_a_field_that_names_it_only_where_the_head_runs() -> None:
    model = tiny_model("llama", CAUSAL)
    model.lm_head.register_forward_hook(lambda _m, _a, output: output * 2)
    loaded = loaded_from(model)
    tokenized = tokenize(parse_prompts(PROMPTS), loaded.tokenizer)
    list(extraction.run(loaded, tokenized))
    for call in (lambda: extraction.run(loaded, tokenized, outputs=Outputs(perplexity=True)), lambda: loaded_from(model, head=True)):
        with pytest.raises(InvalidArgumentError, match="a forward hook on 'lm_head'"):
            call()
    named = loaded_from(model, head=True, provenance={"head": "doubled"})
    found = by_prompt(list(extraction.run(named, tokenized, outputs=Outputs(logits="last_token"))))
    for digest, ids in each(tokenized):
        np.testing.assert_allclose(found[digest]["logits_last_token"], logits_alone(model, ids)[-1], atol=1e-5)


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logits": "first_token"}, "logits='first_token' is unknown"),
        ({"logits": True}, "logits=True is unknown"),
        ({"logits": "all", "top_k": 0}, "top_k=0 is no number"),
        ({"logits": "all", "top_k": True}, "top_k=True is no number"),
        ({"logits": "all", "top_k": 2.0}, "top_k=2.0 is no number"),
        ({"top_k": 5}, "top_k=5 was given without logits"),
    ],
)
def test_outputs_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        Outputs(**options)
    assert len(str(caught.value).splitlines()) <= 2


def test_outputs_say_what_they_store() -> None:
    assert not Outputs()
    assert Outputs().variables() == []
    assert Outputs(perplexity=True, logits="all", top_k=3, router=True).variables() == [
        ("prompts", "perplexity", False),
        ("tokens", "token_perplexity", False),
        ("tokens", "token_log_prob", False),
        ("tokens", "logits_top_k_values", False),
        ("tokens", "logits_top_k_indices", False),
        ("tokens", "router", True),
    ]
    assert Outputs(logits="last_token").variables() == [("prompts", "logits_last_token", False)]
    assert (Outputs(router=True).needs_head, Outputs(router=True).token_level) == (False, True)
    assert (Outputs(logits="last_token").needs_head, Outputs(logits="last_token").token_level) == (True, False)
    every = [Outputs(perplexity=True, logits=p, top_k=k, router=True) for p in ("last_token", "all") for k in (None, 3)]
    assert {name for outputs in every for _, name, _ in outputs.variables()} == {*INNER_DIMS, *SCALARS}
    with pytest.raises(InvalidArgumentError, match="sites is empty"):
        parse_sites(())
    assert parse_sites((), Outputs(router=True)) == (Sites(), Outputs(router=True))
    assert parse_sites(("router", "resid")) == (Sites(("resid",)), Outputs(router=True))


def test_bad_arguments_are_errors_before_any_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, sparse = loaded_from(tiny_model("llama", CAUSAL)), loaded_from(tiny_model("qwen2_moe", decoder_sparse_step=2))
    tokenized = tokenize(parse_prompts(PROMPTS), dense.tokenizer)
    cases: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: extraction.run(dense, tokenized, outputs=Outputs(router=True)), UnknownArchitectureError, "no router that is known"),
        (
            lambda: extraction.run(sparse, tokenized, layers=[0, 2], outputs=Outputs(router=True)),
            InvalidArgumentError,
            r"layers 0, 2 of 'tiny' have no router: leave router out, or ask for layers among 1, 3",
        ),
        (lambda: extraction.run(dense, tokenized, outputs=Outputs(logits="all", top_k=301)), InvalidArgumentError, "give at most 300"),
        (lambda: extraction.run(dense, tokenized, sites=()), InvalidArgumentError, "sites is empty"),
        (lambda: extraction.run(dense, tokenized, poolings=()), InvalidArgumentError, "nothing would be kept"),
        (lambda: loaded_from(tiny_model("llama"), modules={"layers": "layers", "router": "mlp.gate"}), UnknownArchitectureError, "router"),
    ]
    assert (dense.router_layers, dense.num_experts, sparse.router_layers) == ((), None, (1, 3))
    for call, error, message in cases:
        with pytest.raises(error, match=message) as caught:
            call()
        assert len(str(caught.value).splitlines()) <= 2
