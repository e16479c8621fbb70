"""Probes that score a text while a model writes it, against what they say of the same text when it is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from tiny_models import tiny_model, tiny_tokenizer

import lmprobe_zarr as lz
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, NotFittedError, UnknownArchitectureError

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = pytest.mark.model
STEPS = 6
NEVER = 3  # ends an answer, and no answer has it
PROMPTS = ([5, 6, 7], [9, 8, 7, 40, 41, 42], [60, 61, 62, 63, 64])
OPTIONS: dict[str, Any] = {"max_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0, "eos_token_id": NEVER}


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {kind: tiny_model(kind, "AutoModelForCausalLM") for kind in ("llama", "gpt2")}


def padded(prompts: Any = PROMPTS) -> dict[str, Any]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(each)) + list(each) for each in prompts])
    mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, **options: Any) -> Any:
    return model.generate(**padded(), **{**OPTIONS, **options})


def texts(sequences: Any) -> list[list[int]]:
    """The token ids of each prompt with its answer, without padding."""
    longest = max(map(len, PROMPTS))
    return [row[longest - len(prompt) :] for row, prompt in zip(sequences.tolist(), PROMPTS, strict=True)]


def hooked(model: Any) -> bool:
    """Whether a hook of this package is there; transformers leaves hooks of its own, which read hidden states."""
    hooks = [hook for module in model.modules() for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())]
    return any(hook.__module__.startswith("lmprobe_zarr") for hook in hooks) or "generate" in vars(model)


@pytest.fixture(scope="module")
def written(models: dict[str, Any]) -> dict[str, Any]:
    """The token ids that each model writes, by itself."""
    found = {kind: generate(model) for kind, model in models.items()}
    assert not any((ids[:, -STEPS:] == NEVER).any() or (ids[:, -STEPS:] == 0).any() for ids in found.values())
    return found


@pytest.fixture(scope="module")
def stored(models: dict[str, Any], written: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> lz.Store:
    """What llama's layers say of every beginning of the texts, with labels for probes to learn."""
    prefixes = [text[: len(prompt) + step] for text, prompt in zip(texts(written["llama"]), PROMPTS, strict=True) for step in range(STEPS)]
    store = lz.open_store(tmp_path_factory.mktemp("watched"))
    rng = np.random.default_rng(0)
    more = [rng.integers(4, 300, rng.integers(3, 12)).tolist() for _ in range(30)]
    labels = [n % 2 == 0 for n in range(len(prefixes) + len(more))]
    three = [("a", "b", "c")[n % 3] for n in range(len(labels))]
    lz.extract(
        models["llama"], prefixes + more, store=store, name="tiny", tokenizer=tiny_tokenizer(), keep_tokens=True, progress=False,
        coords={"label": labels, "three": three},
    )  # fmt: skip
    return store


def beginnings(written: Any) -> list[list[str]]:
    """The names of the stored beginnings, by step and prompt."""
    rows = texts(written)
    return [[lz.prompt_hash(row[: len(prompt) + step]) for row, prompt in zip(rows, PROMPTS, strict=True)] for step in range(STEPS)]


LEARNED = ("attention:2", "multimax:2", "softmax_mean:2", "rolling_mean_max:3", "mlp:4")


@pytest.mark.few(1)
@pytest.mark.parametrize("label", ["label", "three"])
@pytest.mark.parametrize("probe", ["lda", *LEARNED])
def test_scores_are_those_of_stored_tokens(
    models: dict[str, Any], written: dict[str, Any], stored: lz.Store, probe: str, label: str
) -> None:
    tokens = stored.tokens().resid.sel(layer=[0, 2])
    probes = lz.fit_tokens(tokens, label, probe, device="cpu", random_state=1)
    poolings = ["score:max", "score:min", "score:mean", "score:last_token", "score:first_token"] if probe == "lda" else [None]
    for pooling in poolings:
        expected = lz.score_tokens(probes, tokens, pooling)
        for options in ({}, {"use_cache": False}):
            with lz.watch(models["llama"], probes, pooling) as seen:
                assert torch.equal(generate(models["llama"], **options), written["llama"])
            assert seen.scores.dims[:3] == ("layer", "step", "prompt")
            for step, names in enumerate(beginnings(written["llama"])):
                wanted = expected.sel(prompt=names).transpose("layer", "prompt", ...)
                np.testing.assert_allclose(seen.scores.sel(step=step), wanted, rtol=1e-5, atol=1e-5)
            np.testing.assert_array_equal(seen.latest, seen.scores.isel(step=-1))
            np.testing.assert_array_equal(seen.scores.n_tokens, [[len(each) + step for each in PROMPTS] for step in range(STEPS)])
    assert not hooked(models["llama"])


def test_the_last_token_is_scored_by_itself(models: dict[str, Any], written: dict[str, Any], stored: lz.Store) -> None:
    tokens = stored.tokens().resid
    for probe in ("ridge", "attention"):
        probes = lz.fit_tokens(tokens, "label", probe, device="cpu")
        single = lz.score_tokens(probes, tokens, "all")
        with lz.watch(models["llama"], probes, "all", layers=[3, 1]) as seen:
            generate(models["llama"])
        for step, names in enumerate(beginnings(written["llama"])):
            for prompt, name in enumerate(names):
                wanted = single.sel(prompt=name, layer=[3, 1]).isel(token=-1)
                np.testing.assert_allclose(seen.scores.sel(step=step)[:, prompt], wanted, rtol=1e-5, atol=1e-5)


PROBES: tuple[dict[str, Any], ...] = (
    *({"pooling": pooling} for pooling in ("mean", "last_token", "first_token")),
    *(
        {"pooling": "mean", "inference_pooling": pooling}
        for pooling in ("max", "min", "score:mean", "score:last_token", "activation:max", "activation:min")
    ),
    {"pooling": "mean", "layers": [0, 2]},
    {"pooling": "mean", "layers": [0, 2], "inference_pooling": "activation:max"},
    {"pooling": "mean", "layers": [2, 3], "inference_pooling": "max", "normalize_layers": "per_layer"},
    {"pooling": "mean", "preprocessing": "standard+pca:4"},
    *({"pooling": "mean", "classifier": name} for name in ("lda", "mass_mean", "sgd", "svm", "ridge", "ensemble", "mlp")),
    {"pooling": "mean", "inference_pooling": "max", "classifier": "mlp"},
    {"pooling": "mean", "inference_pooling": "max", "classifier": "svm"},
    {"pooling": "mean", "layers": [1, 2], "classifier": "mlp"},
    *({"classifier": name} for name in LEARNED[:4]),
    {"pooling": "mean", "task": "regression"},
)


@pytest.mark.few(1)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("three", [False, True])
@pytest.mark.parametrize("given", PROBES, ids=lambda given: "-".join(map(str, given.values())))
def test_scores_are_those_of_the_probe(
    models: dict[str, Any], written: dict[str, Any], stored: lz.Store, given: dict[str, Any], three: bool, tmp_path: Path
) -> None:
    model = models["llama"]
    rows = texts(written["llama"])
    learns = [row[: len(row) - cut] for row in rows for cut in range(1, 7)]
    labels = [(n * 7) % (3 if three else 2) for n in range(len(learns))]
    probe = lz.Probe(
        model, name="tiny", tokenizer=tiny_tokenizer(), store=stored, random_state=0, **{"layers": 2, "device": "cpu", **given}
    )
    probe.fit(learns, labels=labels)
    with probe.watch(model) as seen:
        generate(model)
    for step in (0, STEPS - 1):
        now = [row[: len(prompt) + step] for row, prompt in zip(rows, PROMPTS, strict=True)]
        if given.get("task") == "regression":
            expected = probe.predict(now)
        elif given.get("classifier") in ("svm", "ridge") and given.get("inference_pooling") is None:
            read = probe._read(now, None)
            expected = probe.decision_function(read.features)
        elif given.get("classifier") == "svm":
            read = probe._read(now, None)
            each = probe.pipeline_.decision_function(read.features)
            assert read.n_tokens is not None
            expected = np.array([part.max(axis=0) for part in np.split(each, np.cumsum(read.n_tokens)[:-1])])
        else:
            expected = probe.predict_proba(now) if three else probe.predict_proba(now)[:, 1]
        np.testing.assert_allclose(seen.scores.sel(step=step), expected, rtol=1e-5, atol=1e-5)
    if given == PROBES[0] and not three:
        probe.save(tmp_path / "probe.safetensors")
        with lz.Probe.load(tmp_path / "probe.safetensors").watch(model) as again:
            generate(model)
        np.testing.assert_array_equal(again.scores, seen.scores)


def fitted(layers: Any = 2, classes: int = 2, hidden: int = 32, **options: Any) -> lz.Probe:
    rng = np.random.default_rng(3)
    rows = xr.DataArray(
        rng.standard_normal((len(np.atleast_1d(layers)), 60, hidden)), dims=("layer", "prompt", "hidden"),
        coords={"layer": np.atleast_1d(layers)},
    )  # fmt: skip
    return lz.Probe(**{"pooling": "mean", **options}).fit_from_activations(rows, np.arange(60) % classes)


def states(model: Any, ids: list[int], layer: int = 2) -> Any:
    """The output of a block for each token of a text, as transformers itself returns it."""
    with torch.inference_mode():
        found = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[layer + 1][0]
    return found.double().numpy()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generated_tokens_alone(models: dict[str, Any], written: dict[str, Any], kind: str) -> None:
    probe = fitted()
    for options in ({}, {"use_cache": False}):
        with probe.watch(models[kind], tokens="generated") as seen:
            generate(models[kind], **options)
        assert seen.scores.isel(step=0).isnull().all()
        for prompt, (text, begin) in enumerate(zip(texts(written[kind]), PROMPTS, strict=True)):
            pooled = states(models[kind], text[:-1])[len(begin) :].mean(axis=0)
            np.testing.assert_allclose(seen.latest[prompt], probe.predict_proba_from_activations(pooled[None])[0, 1], rtol=1e-5)
    with fitted(over="generated").watch(models[kind]) as again:
        generate(models[kind])
    np.testing.assert_array_equal(again.scores, seen.scores.where(seen.scores.isnull(), again.scores))
    assert again.scores.isel(step=0).isnull().all()


def test_threshold_and_callback_end_answers(models: dict[str, Any], written: dict[str, Any]) -> None:
    model, probe = models["llama"], fitted()
    with probe.watch(model) as plain:
        generate(model)
    scores = plain.scores.values
    threshold = float(np.median(scores.max(axis=0)))
    crossed = [int(np.argmax(scores[:, n] > threshold)) if (scores[:, n] > threshold).any() else STEPS - 1 for n in range(3)]
    assert len(set(crossed)) > 1, "the prompts should cross it at several steps"

    def check(sequences: Any, seen: lz.Watch) -> None:
        start = max(map(len, PROMPTS))
        for n, step in enumerate(crossed):
            answer = written["llama"][n, start : start + step + 1].tolist()
            assert sequences[n, start:].tolist() == (answer + [0] * STEPS)[: sequences.shape[1] - start]
            # The token that was chosen before the answer ended is read if other answers go on.
            last = min(step + 1, len(seen.scores.step) - 1)
            np.testing.assert_allclose(seen.scores[: last + 1, n], scores[: last + 1, n], rtol=1e-5)
            assert seen.scores[last + 1 :, n].isnull().all()
            np.testing.assert_allclose(seen.latest[n], scores[last, n], rtol=1e-5)

    for options in ({}, {"use_cache": False}):
        with probe.watch(model, threshold=threshold) as seen:
            check(generate(model, stopping_criteria=[seen], **options), seen)
        assert seen.above.tolist() == [bool((scores[:, n] > threshold).any()) for n in range(3)]
        steps: list[int] = []

        def stop(step: int, found: Any, steps: list[int] = steps) -> Any:
            steps.append(step)
            assert found.shape == (3,)
            return found > threshold

        with probe.watch(model, callback=stop) as seen:
            check(generate(model, stopping_criteria=[seen], **options), seen)
        assert steps == list(range(len(seen.scores.step)))
    # Without a criterion nothing ends, and what was above stays known.
    with probe.watch(model, threshold=threshold) as seen:
        assert torch.equal(generate(model), written["llama"])
    assert seen.above.tolist() == [bool((scores[:, n] > threshold).any()) for n in range(3)]


def test_ended_answers_are_not_scored_on_what_fills_them(models: dict[str, Any], written: dict[str, Any]) -> None:
    model, probe = models["llama"], fitted()
    with probe.watch(model) as plain:
        generate(model)
    start = max(map(len, PROMPTS))
    answers = written["llama"][:, start:].tolist()
    end = answers[1][1]
    lengths = [answer.index(end) + 1 if end in answer else STEPS for answer in answers]
    assert min(lengths) < max(lengths)
    for options in ({}, {"use_cache": False}, {"pad_token_id": end}):
        with probe.watch(model) as seen:
            generate(model, eos_token_id=end, **options)
        for n, length in enumerate(lengths):
            read = min(length, STEPS - 1)
            np.testing.assert_allclose(seen.scores[: read + 1, n], plain.scores[: read + 1, n], rtol=1e-5)
            assert seen.scores[read + 1 :, n].isnull().all()
            np.testing.assert_allclose(seen.latest[n], plain.scores[read, n], rtol=1e-5)


def test_several_classes_and_the_probes_of_a_sweep(models: dict[str, Any], written: dict[str, Any], stored: lz.Store) -> None:
    model = models["llama"]
    with fitted(classes=3).watch(model, threshold=0.0, label=2) as seen:
        generate(model)
    assert seen.scores.dims == ("step", "prompt", "class")
    np.testing.assert_allclose(seen.scores.sum("class"), 1)
    assert seen.above.all()
    probe = lz.Probe(model, layers="sweep", pooling="mean", name="tiny", tokenizer=tiny_tokenizer(), store=stored, device="cpu")
    rows = [text[:-1] for text in texts(written["llama"])]
    probe.fit([row[:n] for row in rows for n in (3, 4, 5)], labels=[0, 1, 0, 1, 1, 0, 0, 1, 0])
    with probe.watch(model, layers=[3, 0]) as seen:
        generate(model)
    found = probe.sweep_result_
    assert found is not None
    expected = found.predict_proba(rows)
    for layer in (3, 0):
        np.testing.assert_allclose(seen.latest.sel(layer=layer), expected[layer][:, 1], rtol=1e-5)
    with probe.watch(model) as seen:
        generate(model)
    np.testing.assert_allclose(seen.latest, expected[0][:, 1], rtol=1e-5)


def test_a_loop_of_ones_own_and_a_conversation(models: dict[str, Any]) -> None:
    model, probe = models["llama"], fitted()

    def score(ids: list[int]) -> float:
        return float(probe.predict_proba_from_activations(states(model, ids).mean(axis=0)[None])[0, 1])

    with probe.watch(model) as seen, torch.inference_mode():
        cache = model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values
        model(input_ids=torch.tensor([[8, 9]]), past_key_values=cache)
        model(input_ids=torch.tensor([[10]]), past_key_values=cache)
        np.testing.assert_allclose(seen.latest, score([5, 6, 7, 8, 9, 10]), rtol=1e-5)
        # Padding on the right, and a batch of another size: a new text.
        model(input_ids=torch.tensor([[5, 6, 7, 8], [9, 8, 0, 0]]), attention_mask=torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]))
        np.testing.assert_allclose(seen.scores, [[score([5, 6, 7, 8]), score([9, 8])]], rtol=1e-5)
    with probe.watch(model) as seen:
        options = {**OPTIONS, "return_dict_in_generate": True, "max_new_tokens": 3}
        first = model.generate(torch.tensor([[5, 6, 7]]), **options)
        turn = torch.cat([first.sequences, torch.tensor([[20, 21]])], dim=1)
        second = model.generate(turn, past_key_values=first.past_key_values, **options)
    np.testing.assert_allclose(seen.latest, score(second.sequences[0, :-1].tolist()), rtol=1e-5)


def test_steered_text_is_scored_as_it_is(models: dict[str, Any]) -> None:
    model, probe = models["llama"], fitted()
    direction = xr.DataArray(np.arange(32.0), dims="hidden", coords={"layer": 1})
    with lz.steer(model, direction, strength=2.0), probe.watch(model) as seen:
        ids = model.generate(torch.tensor([[5, 6, 7]]), **OPTIONS)[0, :-1].tolist()
    with lz.steer(model, direction, strength=2.0):
        pooled = states(model, ids).mean(axis=0)
    np.testing.assert_allclose(seen.latest, probe.predict_proba_from_activations(pooled[None])[:, 1], rtol=1e-5)


def test_sixteen_bits(models: dict[str, Any]) -> None:
    model = tiny_model("llama", "AutoModelForCausalLM").to(torch.bfloat16)
    probe = fitted()
    with probe.watch(model) as seen:
        ids = model.generate(torch.tensor([[5, 6, 7]]), **OPTIONS)[0, :-1].tolist()
    expected = probe.predict_proba_from_activations(states(model, ids).mean(axis=0)[None])[:, 1]
    np.testing.assert_allclose(seen.latest, expected, rtol=0.02)  # the cache adds in another order


def test_a_step_costs_one_product_per_layer(models: dict[str, Any], stored: lz.Store) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.products = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.products += str(function).split(".")[1] in ("mm", "bmm", "addmm", "mv", "baddbmm", "matmul")
            return function(*args, **(kwargs or {}))

    model = models["llama"]
    probes = lz.fit_tokens(stored.tokens().resid, "three", "attention:2", device="cpu")
    with Counting() as alone:
        generate(model)
    for layers in ([1], [0, 1, 3]):
        with lz.watch(model, probes, layers=layers), Counting() as watched:
            generate(model)
        assert watched.products - alone.products == STEPS * len(layers)


def test_no_hook_is_left_behind(models: dict[str, Any]) -> None:
    model = models["llama"]
    with fitted().watch(model):
        assert hooked(model)

    def fails(_step: int, _scores: Any) -> None:
        raise RuntimeError("the callback's own")

    with pytest.raises(RuntimeError, match="the callback's own"), fitted().watch(model, callback=fails):
        generate(model)
    assert not hooked(model)
    seen = fitted().watch(model)
    with pytest.raises(IndexError), seen:
        model.generate(torch.tensor([[10_000]]), **OPTIONS)
    assert not hooked(model)
    # The next text begins anew, and the context can be entered again.
    with seen:
        generate(model)
        with pytest.raises(InvalidArgumentError, match="has been entered already"), seen:
            pass
    assert len(seen.scores.step) == STEPS
    assert "18" not in repr(seen)
    assert f"{STEPS} passes over 3 prompts" in repr(seen)
    assert not hooked(model)


def test_what_cannot_be_watched_is_refused(models: dict[str, Any], stored: lz.Store) -> None:
    model, probe = models["llama"], fitted()
    tokens = stored.tokens().resid
    probes = lz.fit_tokens(tokens, "label", "ridge")
    pooled = lz.fit_directions(stored.dataset().resid_last_token, "label", "ridge", missing="drop")
    refusals: tuple[tuple[Any, str], ...] = (
        (lambda: probe.watch(model, layers=[1]), r"layers=\[1\]: this probe was trained on layers \[2\]"),
        (lambda: lz.watch(model, probes, layers=[1, 9]), r"layers \[9\] have no probe: there are probes of layers \[0, 1, 2, 3\]"),
        (lambda: lz.watch(model, probes, layers=[]), "no layer was named"),
        (lambda: lz.watch(model, probes, "mean"), "pools activations, and here scores of tokens"),
        (lambda: lz.watch(model, probes.assign(coef=probes.coef * np.nan)), "the probe of layer 0 is NaN or infinite"),
        (lambda: lz.watch(model, probes.assign_attrs(variable="attn")), "probes on 'attn'"),
        (lambda: lz.watch(model, probes.rename(hidden="neurons_unit")), "probes on 'neurons'"),
        (lambda: lz.watch(model, pooled), "probes on 'resid_last_token': only probes of fit_tokens"),
        (lambda: probe.watch(model, tokens="some"), "tokens='some' names no tokens"),
        (lambda: fitted(over="assistant").watch(model), "over='assistant': which tokens these are is not known"),
        (lambda: probe.watch(model, threshold=np.nan), "is no finite number"),
        (lambda: probe.watch(model, threshold=0.5, label=7), "label=7: scores are of the second class, 1"),
        (lambda: fitted(classes=3).watch(model, threshold=0.5), "label=None: a threshold is for the score of one class"),
        (lambda: lz.Probe().fit_from_activations(np.eye(4), [0, 1, 0, 1]).watch(model), "of 1 unknown layers: give their numbers"),
        (lambda: probe.watch(model).scores, "nothing was watched"),
    )  # fmt: skip
    for call, words in refusals:
        with pytest.raises(InvalidArgumentError, match=words):
            call()
    with pytest.raises(NotFittedError, match="has learned nothing yet"):
        lz.Probe().watch(model)
    with pytest.raises(InvalidTypeError, match="model is a loaded torch Module, not str"):
        probe.watch("gpt2")  # type: ignore[arg-type]
    with pytest.raises(InvalidTypeError, match="callback is a function"):
        probe.watch(model, callback=3)  # type: ignore[arg-type]
    with pytest.raises(InvalidTypeError, match="that fit_tokens gives"):
        lz.watch(model, np.ones(3))  # type: ignore[arg-type]
    for other, words in (
        (fitted(hidden=16), "16 wide and the model is 32 wide"),
        (fitted(9), "layers 0 to 3, and the probe reads layer 9"),
    ):
        with pytest.raises(InvalidArgumentError, match=words), other.watch(model):
            pass
    with pytest.raises(UnknownArchitectureError), probe.watch(torch.nn.Linear(3, 3)):
        pass
    with probe.watch(model, layers=2), pytest.raises(InvalidArgumentError, match="unknown layers"):
        lz.Probe().fit_from_activations(np.eye(4), [0, 1, 0, 1]).watch(model)
    assert not hooked(model)


def test_what_cannot_be_followed_is_refused_while_the_model_runs(models: dict[str, Any]) -> None:
    model, probe = models["llama"], fitted()
    with torch.inference_mode():
        before = model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values

    def grow(seen: lz.Watch) -> Any:
        cache = model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        return model(input_ids=torch.tensor([[8], [9]]), past_key_values=cache)

    def crop(seen: lz.Watch) -> Any:
        cache = model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values
        cache.crop(-1)
        return model(input_ids=torch.tensor([[8]]), past_key_values=cache)

    def four(seen: lz.Watch) -> Any:
        return model(input_ids=torch.tensor([[5, 6]]), attention_mask=torch.zeros(1, 1, 2, 2))

    def strange(seen: lz.Watch) -> Any:
        with probe.watch(model, threshold=0.5) as other:
            generate(model)
            return other(torch.zeros(3, 99))

    def ended(seen: lz.Watch) -> Any:
        found = generate(model, eos_token_id=first, return_dict_in_generate=True)
        return model.generate(found.sequences, past_key_values=found.past_key_values, **OPTIONS)

    with probe.watch(model):
        first = int(generate(model)[1, max(map(len, PROMPTS))])
    calls: tuple[tuple[Any, str], ...] = (
        (lambda seen: generate(model, num_beams=2), "num_beams=2 is beam search"),
        (lambda seen: generate(model, prompt_lookup_num_tokens=2), "prompt_lookup_num_tokens= lets tokens be guessed"),
        (lambda seen: generate(model, cache_implementation="static"), "cache_implementation='dynamic'"),
        (lambda seen: model(input_ids=torch.tensor([[8]]), past_key_values=before), "holds 3 tokens and this watch has seen 0"),
        (grow, "the batch has 2 prompts after 1"),
        (crop, "holds 2 tokens and this watch has seen 3"),
        (four, r"attention_mask has shape \(1, 1, 2, 2\)"),
        (ended, "the answer to prompt number . of the batch had ended"),
        (lambda seen: generate(model, stopping_criteria=[probe.watch(model, threshold=0.5)]), "nothing was watched"),
        (lambda seen: generate(model, stopping_criteria=[seen]), "has nothing to stop for"),
        (strange, "was given texts of shape .3, 99., and 3 of 11 tokens were watched"),
    )  # fmt: skip
    for call, words in calls:
        with pytest.raises(InvalidArgumentError, match=words), torch.inference_mode(), probe.watch(model) as seen:
            call(seen)
        assert not hooked(model)
    with (
        probe.watch(model, callback=lambda step, scores: "yes"),
        pytest.raises(InvalidArgumentError, match="callback returned 'yes'"),
    ):
        generate(model)
    with torch.no_grad():
        weight = model.get_submodule("model.layers.1").mlp.down_proj.weight
        kept = weight.clone()
        try:
            weight.fill_(np.nan)
            with probe.watch(model), pytest.raises(InvalidArgumentError, match=r"layers \[2\] are NaN or infinite for prompt number 0"):
                model(**padded())
        finally:
            weight.copy_(kept)
