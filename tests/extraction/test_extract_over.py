"""Poolings over a part of the tokens, against numpy on one prompt at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lmprobe_zarr as lz
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.store.store import Store

pytestmark = pytest.mark.model
torch = pytest.importorskip("torch")

from tiny_models import PROMPTS, SharedModels, tiny_tokenizer  # noqa: E402 — needs torch

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHATS = [
    [{"role": "user", "content": "Where is the cat?"}, {"role": "assistant", "content": "he is on the mat"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "he"}],
    [
        {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"}, {"role": "assistant", "content": "four and five"},
    ],
    [{"role": "user", "content": "no answer yet"}],
]  # fmt: skip
POOL: dict[str, Callable[[Any], Any]] = {
    "mean": lambda rows: rows.mean(0), "max": lambda rows: rows.max(0), "min": lambda rows: rows.min(0),
    "last_token": lambda rows: rows[-1], "first_token": lambda rows: rows[0],
}  # fmt: skip


@pytest.fixture(scope="session")
def model(tiny_models: SharedModels) -> Path:
    return tiny_models("llama", head="AutoModelForCausalLM")


@pytest.fixture
def acts(tmp_path: Path) -> Store:
    return lz.open_store(tmp_path / "acts")


@pytest.fixture
def run(model: Path, acts: Store) -> Callable[..., lz.ExtractStats]:
    return partial(lz.extract, model, store=acts, device="cpu", progress=False)


def chatting() -> Any:
    return tiny_tokenizer(chat_template=TEMPLATE)


def rendered(chat: list[dict[str, str]]) -> tuple[str, list[tuple[int, int, str]]]:
    """A chat as the template prints it, and where each content is; written by hand, with the beginning of an answer where none is."""
    text, places = "", []
    for message in chat:
        text += f"<{message['role']}>"
        places.append((len(text), len(text) + len(message["content"]), message["role"]))
        text += message["content"] + f"</{message['role']}>"
    return text + ("" if chat[-1]["role"] == "assistant" else "<assistant>"), places


@functools.cache
def loaded(model: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


@functools.cache
def values_of(model: Path, text: str, special: bool) -> tuple[Any, Any, Any]:
    """The residual stream of every token, (layer, token, hidden), and the characters of each token; straight from transformers."""
    whole = loaded(model)
    encoded = tiny_tokenizer()(text, return_offsets_mapping=True, add_special_tokens=special)
    kept: list[Any] = []
    handles = [
        block.register_forward_hook(lambda _, args, out: kept.append(out if isinstance(out, torch.Tensor) else out[0]))
        for block in whole.model.layers
    ]
    with torch.inference_mode():
        whole(input_ids=torch.tensor([encoded["input_ids"]]))
    for handle in handles:
        handle.remove()
    starts, ends = np.array(encoded["offset_mapping"]).T
    added = starts == ends
    return torch.stack([each[0] for each in kept]).double().numpy(), np.where(added, -1, starts), np.where(added, -1, ends)


def check(ds: Any, model: Path, name: str, selected: list[Any], texts: list[str], *, special: bool) -> None:
    """Each pooling of a part equals numpy's over the selected tokens; NaN where none is selected."""
    for number, (text, choose) in enumerate(zip(texts, selected, strict=True)):
        values, starts, ends = values_of(model, text, special)
        mask = choose(starts, ends, text)
        for pooling, pool in POOL.items():
            found = ds[f"resid_{pooling}_{name}"].isel(prompt=number).values
            if not mask.any():
                assert np.isnan(found).all(), (name, pooling, number)
                continue
            right = np.stack([pool(layer[mask]) for layer in values])
            np.testing.assert_allclose(found, right, atol=1e-5, err_msg=f"{name} {pooling} {number}")


def test_a_role_is_pooled_at_extraction_without_its_tokens_being_kept(model: Path, acts: Store, run: Any) -> None:
    with pytest.warns(UserWarning, match=r"1 of 4 prompts, first prompts\[3\], have no token in over='assistant'"):
        stats = run(CHATS, tokenizer=chatting(), pooling=list(POOL), over=["all", "assistant", "user"])
    assert stats.extracted == 4
    ds = acts.dataset(prompts=[rendered(chat)[0] for chat in CHATS])
    assert set(ds.data_vars) == {f"resid_{pooling}{part}" for pooling in POOL for part in ("", "_assistant", "_user")}
    assert ds.resid_mean_assistant.dims == ("layer", "prompt", "hidden")

    def of(role: str, chat: Any) -> Any:
        places = [(a, b) for a, b, who in rendered(chat)[1] if who == role]
        return lambda starts, ends, _: np.any(
            [(starts >= 0) & (starts < b) & (ends > a) for a, b in places] or [np.zeros(len(starts), bool)], axis=0
        )

    texts = [rendered(chat)[0] for chat in CHATS]
    for role in ("assistant", "user"):
        check(ds, model, role, [of(role, chat) for chat in CHATS], texts, special=False)
    again = run(CHATS, tokenizer=chatting(), pooling=list(POOL), over=["all", "assistant", "user"])
    assert (again.extracted, again.model_loaded) == (0, False)
    with pytest.raises(InvalidArgumentError, match=r"no token of the 4 prompts is in over='tool'.*the roles there are"):
        run(CHATS, tokenizer=chatting(), over="tool")


def test_chats_of_one_text_with_other_roles_are_not_taken_for_one(acts: Store, run: Any) -> None:
    tokenizer = tiny_tokenizer(chat_template="{% for m in messages %}{{ m.content }} {% endfor %}")
    one = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three"}]
    other = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two three"}]
    options: dict[str, Any] = {"tokenizer": tokenizer, "pooling": "mean"}
    with pytest.raises(InvalidArgumentError, match=r"prompts\[0\] and prompts\[2\] are chats that .* over='assistant'"):
        run([one, one, other], over=["all", "assistant"], **options)
    same = [one[0], {"role": "assistant", "content": [{"type": "text", "text": "three"}]}]
    assert run([one, same, one], over=["all", "assistant"], **options).extracted == 1
    assert run([one, other], over="all", **options).found == 1


def test_last_tokens_spans_and_what_follows_a_marker(model: Path, acts: Store, run: Any) -> None:
    texts = [text for text in PROMPTS if len(text) > 12][:4]
    spans = [(1, 5), (0, 2), None, (3, 12)]
    over = {
        "tail": {"position": slice(-3, None)}, "head": {"position": slice(0, 2)}, "word": {"span": "the"}, "own": {"span": spans},
        "same": {"span": (2, 6)}, "later": {"after": " "}, "both": {"span": "e", "position": slice(-6, None)},
    }  # fmt: skip
    run_ = partial(run, texts, pooling=list(POOL), over=over)
    with pytest.warns(UserWarning, match="have no token in over="):
        run_()
    ds = acts.dataset(prompts=texts)

    def inside(pairs: list[tuple[int, int]]) -> Any:
        return lambda starts, ends, _: np.any(
            [(starts >= 0) & (starts < b) & (ends > a) for a, b in pairs] or [np.zeros(len(starts), bool)], axis=0
        )

    def occurrences(text: str, wanted: str) -> list[tuple[int, int]]:
        return [(at, at + len(wanted)) for at in range(len(text)) if text.startswith(wanted, at)]

    def last(n: int) -> Any:
        return lambda starts, _ends, _text: np.arange(len(starts)) >= len(starts) - n

    right = {
        "tail": [last(3)] * 4,
        "head": [lambda starts, _ends, _text: np.arange(len(starts)) < 2] * 4,
        "word": [inside(occurrences(text, "the")) for text in texts],
        "own": [inside([] if span is None else [span]) for span in spans],
        "same": [inside([(2, 6)])] * 4,
        "later": [lambda starts, _ends, text: starts >= (text.rindex(" ") + 1 if " " in text else 10**6)] * 4,
        "both": [lambda s, e, text: inside(occurrences(text, "e"))(s, e, text) & last(6)(s, e, text)] * 4,
    }
    for name, selected in right.items():
        check(ds, model, name, selected, texts, special=True)
    assert ds.own_span.values.tolist()[:2] == ["1:5", "0:2"]
    assert run_().extracted == 0


def test_another_span_of_a_stored_prompt_is_computed_anew(model: Path, acts: Store, run: Any) -> None:
    texts = [text for text in PROMPTS if len(text) > 12][:3]
    run(texts, pooling="mean", over={"own": {"span": [(0, 4), (1, 5), (2, 6)]}})
    stats = run(texts, pooling="mean", over={"own": {"span": [(0, 4), (6, 11), (2, 6)]}})
    assert stats.extracted == 1
    values, starts, ends = values_of(model, texts[1], True)
    mask = (starts >= 0) & (starts < 11) & (ends > 6)
    ds = acts.dataset(prompts=texts)
    np.testing.assert_allclose(ds.resid_mean_own.isel(prompt=1).values, values[:, mask].mean(1), atol=1e-5)
    assert ds.own_span.values.tolist() == ["0:4", "6:11", "2:6"]


def test_what_would_be_left_with_another_span_is_an_error_before_anything_is_run(acts: Store, run: Any) -> None:
    texts = [text for text in PROMPTS if len(text) > 12][:3]
    first, second = ({"own": {"span": [(0, 4), span, None]}} for span in ((1, 5), (6, 11)))
    with pytest.warns(UserWarning, match="no token"):
        run(texts, pooling=["mean", "max"], over=first)
    with pytest.raises(InvalidArgumentError, match=r"prompts\[1\].*'resid_max_own'.*would be left with it"):
        run(texts, pooling="mean", over=second)
    with pytest.raises(InvalidArgumentError, match=r"prompts\[0\].*'resid_max_own' in layers 1-3"):
        run(texts[1:2], pooling=["max", "mean"], over={"own": {"span": [(6, 11)]}}, layers=0, refresh=True)
    assert run(texts[:1], pooling="mean", over={"own": {"span": [(0, 4)]}}, layers=0).extracted == 0
    with pytest.warns(UserWarning, match="no token"):
        assert run(texts, pooling=["mean", "max", "min"], over=second).extracted == 3
    ds = acts.dataset(prompts=texts)
    assert ds.own_span.values.tolist()[:2] == ["0:4", "6:11"]
    assert (ds.resid_min_own.isel(prompt=1) <= ds.resid_max_own.isel(prompt=1)).all()
    assert np.isnan(ds.resid_max_own.isel(prompt=2)).all()


def test_the_column_of_spans_is_not_the_callers_to_change(acts: Store, run: Any) -> None:
    texts = [text for text in PROMPTS if len(text) > 12][:2]
    run(texts, pooling="mean", over={"own": {"span": [(0, 4), (1, 5)]}})
    with pytest.raises(InvalidArgumentError, match=r"'own_span', the characters that 'resid_mean_own'.*pooled over"):
        run(texts, pooling="mean", coords={"own_span": ["0:9", "1:9"]})
    with pytest.raises(InvalidArgumentError, match=r"'own_span' says which characters 'resid_mean_own' is pooled over"):
        acts.annotate(None, {"own_span": {texts[0]: "0:9"}})


def test_a_group_of_its_own_may_hold_something_else_under_another_name(acts: Store, run: Any) -> None:
    tail: dict[str, Any] = {"tail": {"position": slice(-2, None)}}
    run(PROMPTS, pooling="mean", over={"tail": {"position": slice(-3, None)}})
    with pytest.warns(UserWarning, match="a group of its own"):
        gate = run(PROMPTS, pooling="mean", over=tail, sites={"z": "mlp.gate_proj"})
    with pytest.warns(UserWarning, match=r"'tail' of .* and .* holds 'z' of the module 'mlp.gate_proj'.*a group of its own"):
        up = run(PROMPTS, pooling="mean", over=tail, sites={"z": "mlp.up_proj"})
    assert gate.group != up.group
    for stats, path in ((gate, "mlp.gate_proj"), (up, "mlp.up_proj")):
        with pytest.warns(UserWarning, match="a group of its own"):
            again = run(PROMPTS, pooling="mean", over=tail, sites={"z": path})
        assert (again.group, again.extracted) == (stats.group, 0)
    held = [acts.dataset(group=stats.group, prompts=PROMPTS).z_mean_tail for stats in (gate, up)]
    assert not np.allclose(*held)


def test_other_tokens_under_the_same_name_go_into_another_group(acts: Store, run: Any) -> None:
    first = run(PROMPTS, pooling="mean", over={"tail": {"position": slice(-3, None)}})
    with pytest.warns(UserWarning, match=r"what is pooled over 'tail' of .*a group of its own"):
        second = run(PROMPTS, pooling="mean", over={"tail": {"position": slice(-2, None)}})
    assert first.group != second.group
    assert run(PROMPTS, pooling="mean", over={"tail": {"position": slice(-3, None)}}).extracted == 0
    three, two = (acts.dataset(group=stats.group, prompts=PROMPTS).resid_mean_tail for stats in (first, second))
    assert not np.allclose(three.values, two.values)


def test_parts_hold_for_sites_of_any_width_and_survive_compaction(acts: Store, run: Any) -> None:
    options: dict[str, Any] = {
        "sites": ["resid", "neurons"],
        "pooling": ["mean", "last_token"],
        "over": {"tail": {"position": slice(-2, None)}},
    }
    run(PROMPTS[:3], **options)
    run(PROMPTS, **options)
    acts.compact(progress=False)
    ds = acts.dataset(prompts=PROMPTS)
    assert ds.neurons_mean_tail.dims == ("layer", "prompt", "neurons_unit")
    scores = lz.sweep(ds[["resid_mean_tail", "resid_last_token_tail"]], [0, 1] * 3, "ridge", cv=3)
    assert scores.site.values.tolist() == ["resid", "resid"]
    assert scores.pooling.values.tolist() == ["mean", "last_token"]
    assert scores.over.values.tolist() == ["tail", "tail"]
    assert run(PROMPTS, **options).extracted == 0


@pytest.mark.parametrize(
    ("over", "error", "message"),
    [
        ("assistant", InvalidArgumentError, "roles are of chats"),
        ({"own": {"span": [(0, 4)]}}, InvalidArgumentError, "1 spans for 3 prompts"),
        ({"own": {"span": [(0, 4), (0, 10**6), (0, 1)]}}, InvalidArgumentError, r"span 0:1000000 for prompts\[1\], whose text has"),
        ({"own": {"span": (5, 5)}}, InvalidArgumentError, "no characters"),
        ({"own": {"spann": "x"}}, InvalidArgumentError, "criterion 'spann': use role, generated"),
        ({"x_mean": {"span": "a"}}, InvalidArgumentError, "choose another name"),
        ({"first_token_x": {"span": "a"}}, InvalidArgumentError, "choose another name"),
        ({"Own": {"span": "a"}, "own": {"span": "e"}}, InvalidArgumentError, "'Own' and 'own' of over= differ by case alone"),
        ({"own": {"span": [(0.5, 4), (0, 1), (0, 1)]}}, InvalidTypeError, "whole characters"),
        (None, InvalidTypeError, "over is a NoneType"),
        ({"a b": {"span": "a"}}, InvalidArgumentError, "letters a to z"),
        ({"own": {}}, InvalidTypeError, "give a role, or criteria"),
        ({"own": {"position": 3}}, InvalidTypeError, "give a slice"),
        ({"own": {"after": ""}}, InvalidTypeError, "some characters"),
        ({"own": {"after": "nowhere at all"}}, InvalidArgumentError, "no token of the 3 prompts"),
        ("generated", InvalidArgumentError, "no token of the 3 prompts"),
        ([], InvalidArgumentError, "over is empty"),
    ],
)
def test_parts_that_cannot_be_are_errors_before_anything_is_run(
    over: Any, error: type[Exception], message: str, acts: Store, run: Any
) -> None:
    with pytest.raises(error, match=message):
        run(PROMPTS[:3], pooling="mean", over=over)
    assert not acts.models()


def test_a_part_without_a_pooling_is_refused(run: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="without a pooling"):
        run(PROMPTS, pooling=[], keep_tokens=True, over={"tail": {"position": slice(-2, None)}})


def test_a_probe_learns_from_a_part_of_the_tokens_and_is_saved_with_it(model: Path, acts: Store, tmp_path: Path) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    chats = [
        [{"role": "user", "content": f"ask {n} {word}"}, {"role": "assistant", "content": f"{word} is what he said {n}"}]
        for n in range(6)
        for word in ("yes", "no")
    ]
    labels = np.array([0, 1] * 6)
    probe = lz.Probe(str(model), layers=2, pooling="mean", over="assistant", tokenizer=chatting(), store=acts, device="cpu", random_state=0)
    probe.fit(chats, labels=labels)
    texts = [rendered(chat)[0] for chat in chats]
    rows = []
    for text, chat in zip(texts, chats, strict=True):
        values, starts, ends = values_of(model, text, False)
        a, b, _ = rendered(chat)[1][1]
        rows.append(values[2][(starts >= 0) & (starts < b) & (ends > a)].mean(0))
    np.testing.assert_allclose(acts.dataset(prompts=texts).resid_mean_assistant.sel(layer=2).values, np.array(rows), atol=1e-5)
    plain = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(np.array(rows), labels)
    np.testing.assert_array_equal(probe.predict(chats), plain.predict(np.array(rows)))
    assert set(acts.dataset().data_vars) == {"resid_mean_assistant"}
    probe.save(tmp_path / "probe.safetensors")
    loaded = lz.Probe.load(tmp_path / "probe.safetensors", store=acts)
    loaded.set_params(tokenizer=chatting())
    np.testing.assert_allclose(loaded.predict_proba(chats), probe.predict_proba(chats))
    over = {"tail": {"position": slice(-2, None)}}
    tail = lz.Probe(str(model), layers=2, over=over, store=acts, device="cpu").fit(PROMPTS, labels=[0, 1] * 3)
    tail.save(tmp_path / "tail.safetensors")
    again = lz.Probe.load(tmp_path / "tail.safetensors", store=acts)
    np.testing.assert_allclose(again.predict_proba(PROMPTS), tail.predict_proba(PROMPTS))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"inference_pooling": "max"}, "classifies every token"),
        ({"over": ["assistant", "user"]}, "2 parts"),
        ({"over": {"x": {"span": [(0, 1)]}}}, "span for each"),
    ]
    for options, message in wrong:
        with pytest.raises(InvalidArgumentError, match=message):
            lz.Probe(str(model), **{"pooling": "mean", "over": "assistant"} | options)
