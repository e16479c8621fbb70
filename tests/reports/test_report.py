"""What the report says: numbers as computed another way, everything escaped, nothing of a text that is not wanted, and a bounded size."""

from __future__ import annotations

import html
import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from command_line import call, call_json
from html_tags import Tags
from stores import GROUP, make_batch

import lmprobe_zarr as lz
from lmprobe_zarr.batch import ROLES, TokenBatch, prompt_sha256
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, LabelError, ModelNotStoredError
from lmprobe_zarr.pages.page import embed_json
from lmprobe_zarr.reports.profiles import map_tokens, profile_layers
from lmprobe_zarr.store.contents import bin_coverage
from lmprobe_zarr.store.format.group import GroupInfo
from lmprobe_zarr.store.store import Store

NAME = "</script><script>alert(1)</script>"  # of a model, which may not hold what cannot be shown
EVIL = f"{NAME}\u2028\u202e"


def data_of(page: lz.Report) -> list[dict[str, Any]]:
    """What the page's script is given."""
    return [
        json.loads(text) for text in re.findall(r'<script type="application/json" class="lz-data">(.*?)</script>', page.html, re.DOTALL)
    ]


@pytest.fixture
def stored(tmp_path: Path) -> Store:
    store = lz.open_store(tmp_path / "s")
    texts = [f"prompt {i}{'!' * (i % 5)}" for i in range(40)]
    batch = make_batch(texts, columns={"label": [i % 2 for i in range(40)]})
    batch.prompts["resid_mean"][:, 1::2] += 1.5
    store.write(GROUP, batch)
    return store


# ------------------------------------------------------------------------------------------------------------- numbers


def test_norms_and_outliers_are_those_of_plain_numpy(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    counts = [3, 1, 4, 2, 5]
    values = {layer: [rng.standard_normal((n, 8)).astype("float32") for n in counts] for layer in (0, 2)}
    for tokens in values[2]:
        tokens[:, 5] *= 100
    values[2][1][0, 0] = np.inf
    store = lz.open_store(tmp_path / "s")
    lz.write_activations(store, model="m", prompts=list("abcde"), activations={"resid": values})
    profile = profile_layers(store.view(store.find_group("m")), "tokens", "resid", (0, 2), sample_bytes=2**20)
    assert not profile.is_sample
    assert (profile.rows, profile.of_rows, profile.prompts) == (15, 15, 5)
    assert profile.not_finite.tolist() == [0, 1]
    for i, layer in enumerate((0, 2)):
        rows = np.concatenate(values[layer]).astype(float)
        firsts = np.cumsum([0, *counts[:-1]])
        kept = np.isfinite(rows).all(axis=1)
        norms = np.sqrt((rows[kept] ** 2).sum(axis=1))
        assert profile.norms[:, i] == pytest.approx(np.percentile(norms, [5, 50, 95]), rel=1e-5)
        assert profile.largest_norm[i] == pytest.approx(norms.max(), rel=1e-5)
        assert profile.first_norm is not None
        first = np.sqrt((rows[[f for f in firsts if kept[f]]] ** 2).sum(axis=1))
        assert profile.first_norm[i] == pytest.approx(np.median(first), rel=1e-5)
        rms = np.sqrt((rows[kept] ** 2).mean(axis=0))
        assert profile.ratio[i] == pytest.approx(rms.max() / np.median(rms), rel=1e-5)
        assert profile.peak[i] == pytest.approx(np.abs(rows[kept]).max(), rel=1e-5)
    assert (profile.unit[1], profile.n_outliers.tolist()) == (5, [0, 1])


def test_a_sample_of_a_large_store_is_read_and_the_page_notes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = lz.open_store(tmp_path / "s")
    texts = [f"p{i}" for i in range(400)]
    store.write(GROUP, make_batch(texts, n_tokens=[5] * 400, hidden=8))
    # A fifth of 3 layers × 2,000 tokens × 32 bytes, in eight runs of ten prompts.
    profile = profile_layers(store.view(GROUP), "tokens", "resid", (0, 1, 3), sample_bytes=3 * 2000 * 32 // 5)
    assert profile.is_sample
    assert (profile.prompts, profile.rows, profile.of_rows) == (80, 400, 2000)
    page = lz.report(store, sample_bytes=3 * 2000 * 32 // 5)
    assert "A sample: 400 of 2,000 tokens, of 80 of 400 prompts" in page.html


def test_coverage_in_bins_is_that_of_the_store(tmp_path: Path) -> None:
    store = lz.open_store(tmp_path / "s")
    store.write(GROUP, make_batch([f"a{i}" for i in range(30)], layers=(0, 1)))
    store.write(GROUP, make_batch([f"a{i}" for i in range(20, 33)], layers=(3,)))
    view = store.view(GROUP)
    truth = store.coverage().sel(variable="resid").transpose("layer", "prompt").values
    for bins in (1, 7, 33, 100):
        found = bin_coverage(view, "tokens", "resid", (0, 1, 3), bins=bins)
        assert found.edges[-1] == 33
        assert len(found.edges) - 1 == min(bins, 33)
        for b, (low, high) in enumerate(zip(found.edges, found.edges[1:], strict=False)):
            assert found.shares[:, b] == pytest.approx(truth[:, low:high].mean(axis=1))


def test_tokens_show_their_norms_where_there_is_nothing_else(stored: Store) -> None:
    (data,) = data_of(lz.report(stored, prompts=["prompt 3!!!", "prompt 0"]))
    toks = stored.tokens(prompts=["prompt 3!!!"])
    norms = np.linalg.norm(toks.resid.values.astype(float), axis=2)
    assert np.array(data["maps"][0]["values"]) == pytest.approx(norms, rel=1e-3)
    assert len(data["maps"]) == 2
    assert data["maps"][0]["what"] == "norm of resid"


def test_tokens_show_their_role_and_which_were_generated(tmp_path: Path) -> None:
    texts = ["ask: yes", "ask: no"]
    role = np.array([-1, 2, 3, 3, -1, 2, 3, 3])
    made = np.array([0, 0, 0, 1, 0, 0, 0, 0])
    batch = TokenBatch(
        sha256=[prompt_sha256(text) for text in texts], text=texts, n_tokens=np.array([4, 4]), layers=(0,),
        tokens={"resid": np.ones((1, 8, 4), np.float32)}, token_columns={"role": role, "turn": np.zeros(8, int), "generated": made},
        role_names=ROLES,
    )  # fmt: skip
    store = lz.open_store(tmp_path / "s")
    store.write(GroupInfo(model="acme/chat", num_layers=1, hidden_size=4), batch)
    page = lz.report(store)
    (data,) = data_of(page)
    assert [shown["marks"] for shown in data["maps"]] == [
        ["", "user", "assistant", "assistant, generated"], ["", "user", "assistant", "assistant"],
    ]  # fmt: skip
    words = re.findall(r'<b(?: class="([^"]*)")? style=', page.html)
    assert words == ["id", "id r0", "id r1", "id r1 made", "id", "id r0", "id r1", "id r1"]
    assert '<b class="r0">user</b> <b class="r1">assistant</b> <b class="made">generated</b>' in page.html
    assert page.html.count("assistant, generated</td>") == 1, "in the table of the prompt"


def test_tokens_show_the_log_odds_of_a_regression_on_the_other_prompts(stored: Store) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    shown = ["prompt 3!!!", "prompt 6!"]
    (data,) = data_of(lz.report(stored, labels="label", prompts=shown))
    ds = stored.dataset()
    others = ~np.isin(ds.text.values.astype(str), shown)
    for i, layer in enumerate((0, 1, 3)):
        x = ds.resid_mean.sel(layer=layer).values[others]
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000)).fit(x, ds.label.values[others])
        tokens = stored.tokens(prompts=shown[:1]).resid.sel(layer=layer).values
        assert np.array(data["maps"][0]["values"][i]) == pytest.approx(probe.decision_function(tokens), rel=0.02, abs=0.02)


def test_tokens_show_the_scores_of_a_probe_that_is_given(stored: Store) -> None:
    ds = stored.dataset()
    probe = lz.Probe(classifier="ridge").fit_from_activations(ds.resid_mean.sel(layer=1).values, ds.label.values)
    (data,) = data_of(lz.report(stored, probe=lz.LayerSweep({1: probe}), prompts=["prompt 3!!!"]))
    tokens = stored.tokens(prompts=["prompt 3!!!"]).resid.sel(layer=1).values
    assert data["maps"][0]["layers"] == [1]
    assert data["maps"][0]["values"][0] == pytest.approx(probe.pipeline_.decision_function(tokens), rel=1e-3, abs=1e-3)


def test_tokens_show_the_scores_of_what_fit_tokens_gives(stored: Store) -> None:
    tokens = stored.tokens()
    labels = tokens.label.values
    fitted = lz.fit_tokens(tokens.resid, labels, "ridge")
    page = lz.report(stored, probe=fitted, prompts=["prompt 3!!!"])
    (data,) = data_of(page)
    shown = stored.tokens(prompts=["prompt 3!!!"]).resid
    right = (shown * fitted.coef).sum("hidden") + fitted.intercept
    assert data["maps"][0]["layers"] == [0, 1, 3]
    for i, layer in enumerate((0, 1, 3)):
        assert data["maps"][0]["values"][i] == pytest.approx(right.sel(layer=layer).values, rel=1e-3, abs=1e-3)
    assert "(ridge): above 0 for " in page.html
    assert "below for 0." in page.html
    # A layer on which it could not be fitted has no scores.
    fitted["coef"] = fitted.coef.where(fitted.layer != 1)
    (data,) = data_of(lz.report(stored, probe=fitted, prompts=["prompt 3!!!"]))
    assert data["maps"][0]["layers"] == [0, 3]
    three = lz.fit_tokens(tokens.resid, np.arange(tokens.sizes["token"]) % 3, "ridge")
    scores = lz.sweep(stored.dataset().resid_mean, "label", probes=["ridge"], cv=2)
    for wrong in (three, scores, fitted.drop_vars("intercept"), fitted.assign_attrs(classes="?"), fitted.isel(layer=0)):
        with pytest.raises(InvalidArgumentError, match="give what fit_tokens returns for a linear probe"):
            lz.report(stored, probe=wrong, prompts=["prompt 3!!!"])


def test_a_probe_of_another_model_or_site_is_shown_with_a_warning(stored: Store) -> None:
    tokens = stored.tokens()
    fitted = lz.fit_tokens(tokens.resid, tokens.label.values, "ridge")
    with pytest.warns(UserWarning, match="learned from resid of 'other', and is given resid of 'acme/toy'"):
        lz.report(stored, probe=fitted.assign_attrs(model="other"), prompts=["prompt 3!!!"])
    ds = stored.dataset()
    probe = lz.Probe(classifier="ridge").fit_from_activations(ds.resid_mean.sel(layer=1).rename("attn_mean"), ds.label.values)
    with pytest.warns(UserWarning, match="learned from attn_mean of 'acme/toy', and is given resid of 'acme/toy'"):
        lz.report(stored, probe=lz.LayerSweep({1: probe}), prompts=["prompt 3!!!"])


@pytest.mark.model
@pytest.mark.filterwarnings("ignore:.*was still improving")
def test_tokens_show_how_much_they_weigh_for_a_probe_that_learned_how_to_pool(stored: Store) -> None:
    pytest.importorskip("torch")
    toks = stored.tokens().resid.sel(layer=1)
    probe = lz.Probe(classifier="attention:2", classifier_kwargs={"max_epochs": 3}, device="cpu").fit_from_activations(toks, "label")
    page = lz.report(stored, probe=probe, prompts=["prompt 3!!!", "prompt 4!!!!"])
    (data,) = data_of(page)
    assert "How much each token weighs in the score of its prompt by the probe that was given (AttentionClassifier)" in page.html
    assert "log-odds" not in page.html
    for shown, text in zip(data["maps"], ["prompt 3!!!", "prompt 4!!!!"], strict=True):
        assert (shown["what"], shown["two"], shown["layers"]) == ("weight", False, [1])
        rows = stored.tokens(prompts=[text]).resid.sel(layer=1).values.astype(float)
        scaler, fitted = probe.pipeline_[0], probe.pipeline_[-1]
        raised = np.exp((rows - scaler.mean_) / scaler.scale_ @ fitted.query_.T)
        weights = (raised / raised.sum(axis=0)).mean(axis=1)
        assert shown["values"][0] == pytest.approx(weights.tolist(), rel=1e-3, abs=1e-4)
        assert sum(shown["values"][0]) == pytest.approx(1, rel=1e-3)


def labelled_in_part(root: Path, labels: list[Any], kept: list[int]) -> Store:
    """The prompts of these numbers, each with its label, which None stands for where there is none."""
    every = [f"prompt {i}{'!' * (i % 5)}" for i in range(len(labels))]
    rng = np.random.default_rng(3)
    hidden = [rng.standard_normal((3, 4)).astype("float32") + (i % 2) for i in range(len(labels))]
    store = lz.open_store(root)
    lz.write_activations(
        store, model="m", prompts=[every[i] for i in kept], coords={"topic": [labels[i] for i in kept]},
        activations={"resid": {layer: [(1 + layer) * hidden[i] for i in kept] for layer in (0, 1)}},
        pooled={"resid_mean": {layer: np.stack([(1 + layer) * hidden[i].mean(0) for i in kept]) for layer in (0, 1)}},
    )  # fmt: skip
    return store


def curves_of(page: lz.Report) -> dict[str, Any]:
    """The curves of scores on a page of one group, by title."""
    (data,) = data_of(page)
    return {chart["title"]: chart["series"] for chart in data["charts"] if chart["title"] in ("Accuracy", "AUROC")}


KINDS_OF_LABELS: dict[str, list[Any]] = {"float": [0.0, 1.0], "str": ["art", "sport"], "bool": [False, True]}


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", KINDS_OF_LABELS)
def test_prompts_without_a_label_are_left_out_if_asked(kind: str, tmp_path: Path) -> None:
    two = KINDS_OF_LABELS[kind]
    labels = [None if i % 5 == 3 else two[i % 2] for i in range(60)]
    have = [i for i, label in enumerate(labels) if label is not None]
    store, whole = labelled_in_part(tmp_path / "s", labels, list(range(60))), labelled_in_part(tmp_path / "whole", labels, have)
    with pytest.raises(LabelError, match=r"labels 'topic' miss 12 of 60 prompts .*missing='drop'"):
        lz.report(store, labels="topic")
    page = lz.report(store, labels="topic", missing="drop")
    (data,), (expected,) = data_of(page), data_of(lz.report(whole, labels="topic"))
    assert "12 of 60 prompts have no label in &#x27;topic&#x27; and are left out of the scores." in page.html
    assert "12 of 60 prompts have no label in &#x27;topic&#x27; and are left out of this regression." in page.html
    # The curves: those of a store of the labelled prompts alone, and those of a sweep.
    assert curves_of(page) == curves_of(lz.report(whole, labels="topic"))
    assert set(curves_of(page)) == {"Accuracy", "AUROC"}
    with_controls: dict[str, Any] = {"controls": ["shuffled_labels", "bag_of_words"], "missing": "drop"}
    scores = lz.sweep(store.dataset().resid_mean, "topic", **with_controls)
    series = {name: line for name, line, *_ in curves_of(page)["Accuracy"]}
    for name in scores.probe.values:
        assert series[str(name)] == pytest.approx(scores.accuracy.sel(probe=name).mean("fold").values.tolist(), rel=1e-3)
    # Tokens: the same prompts of both classes, with the same log-odds.
    assert [shown["tokens"] for shown in data["maps"]] == [shown["tokens"] for shown in expected["maps"]]
    for shown, right in zip(data["maps"], expected["maps"], strict=True):
        assert np.array(shown["values"]) == pytest.approx(np.array(right["values"]), rel=1e-3)
    assert {shown["what"].partition(" = ")[0] for shown in data["maps"]} == {"log-odds of topic"}
    named = [f"prompt {i}{'!' * (i % 5)}" for i in (3, 4)]
    both = lz.report(store, labels="topic", missing="drop", prompts=named)
    assert len(data_of(both)[0]["maps"]) == 2
    assert both.html.count(" · topic ") == 1, "a prompt without a label is shown without one"
    # Labels by prompt, and scores that exist, which have recorded how many prompts they lack.
    by_text = dict(zip(whole.dataset().text.values.tolist(), [labels[i] for i in have], strict=True))
    assert curves_of(lz.report(store, labels=by_text, missing="drop")) == curves_of(lz.report(whole, labels=by_text))
    given = lz.report(store, labels="topic", missing="drop", scores=scores)
    assert "12 of 60 prompts have no label in &#x27;topic&#x27; and are left out of the scores." in given.html
    assert "left out of this regression" in given.html
    assert lz.report(whole, labels="topic", missing="drop").html.count("left out of") == 0, "every prompt has a label"


def test_groups_are_those_of_the_prompts_that_have_a_label(tmp_path: Path) -> None:
    store = labelled_in_part(tmp_path / "s", [None if i in (38, 39) else i % 2 for i in range(40)], list(range(40)))
    texts = store.dataset().text.values.tolist()
    store.annotate("m", {"fact": {text: i // 2 for i, text in enumerate(texts[:38])}})
    page = lz.report(store, labels="topic", missing="drop")
    assert "2 of 40 prompts have no label in &#x27;topic&#x27; and are left out of the scores. Prompts with the same" in page.html
    scores = lz.sweep(store.dataset().resid_mean, "topic", groups="fact", missing="drop")
    assert curves_of(page)["Accuracy"][0][1] == pytest.approx(scores.accuracy.mean("fold").values[:, 0].tolist(), rel=1e-3)


def note_of(page: str) -> list[str]:
    """The sentences on prompts that the scores lack, and on groups."""
    text = html.unescape(re.sub(r"<[^>]*>", "\n", page))
    return re.findall(r"\d+ of \d+ prompts ha[^.]* left out of the scores\.|Prompts with the same [^.]*\.", text)


@pytest.mark.filterwarnings("ignore::zarr.errors.UnstableSpecificationWarning")
def test_scores_that_are_given_say_the_same_of_prompts_and_groups_as_a_sweep_of_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = labelled_in_part(tmp_path / "s", [None if i in (38, 39) else i % 2 for i in range(40)], list(range(40)))
    texts = store.dataset().text.values.tolist()
    store.annotate("m", {"fact": {text: i // 2 for i, text in enumerate(texts[:38])}})
    expected = [
        "2 of 40 prompts have no label in 'topic' and are left out of the scores.", "Prompts with the same 'fact' are in the same fold.",
    ]  # fmt: skip
    assert note_of(lz.report(store, labels="topic", missing="drop", groups="fact").html) == expected
    scores = lz.sweep(store.dataset().resid_mean, "topic", groups="fact", missing="drop", out=str(tmp_path / "scores"))
    assert note_of(lz.report(store, scores=scores).html) == expected
    target = str(tmp_path / "r.html")
    assert call(capsys, "report", store.url, "-o", target, "--scores", str(tmp_path / "scores"))[0] == 0
    assert note_of(Path(target).read_text(encoding="utf-8")) == expected
    assert note_of(lz.report(store, scores=scores.drop_attrs().assign_attrs(model="m")).html) == []
    for option, message in ((["--groups", "fact"], "leave --groups out"), (["--missing", "drop"], "leave it out, or give --labels")):
        code, _, err = call(capsys, "report", store.url, "-o", target, "--scores", str(tmp_path / "scores"), *option)
        assert code == 1
        assert message in err
    assert (
        call(capsys, "report", store.url, "-o", target, "--scores", str(tmp_path / "scores"), "--labels", "topic", "--missing", "drop")[0]
        == 0
    )


def test_a_report_needs_some_labels_and_a_known_word(tmp_path: Path) -> None:
    store = labelled_in_part(tmp_path / "s", [None] * 10, list(range(10)))
    with pytest.raises(LabelError, match="labels 'topic' are missing for all 10 prompts: nothing is left to learn from"):
        lz.report(store, labels="topic", missing="drop")
    for labels in (None, "topic"):
        with pytest.raises(InvalidArgumentError, match="missing='maybe' is unknown: use 'raise', or 'drop'"):
            lz.report(store, labels=labels, missing="maybe")


def test_curves_are_the_scores_with_their_controls_and_further_dims(stored: Store) -> None:
    ds = stored.dataset()
    scores = lz.sweep(ds.resid_mean, labels="label", probes=["ridge", "mass_mean"], cv=3)
    (data,) = data_of(lz.report(stored, scores=scores))
    chart = data["charts"][0]
    assert chart["title"] == "Accuracy"
    assert [name for name, _ in chart["series"]] == ["ridge", "mass_mean"]
    assert chart["series"][1][1] == pytest.approx(scores.accuracy.sel(probe="mass_mean").mean("fold").values.tolist(), rel=1e-3)
    marked = scores.assign_coords(kind=("probe", ["control", "probe"]))
    page = lz.report(stored, scores=marked)
    assert [name for name, _ in data_of(page)[0]["charts"][0]["series"]] == ["mass_mean", "ridge"]
    assert 'class="s1 control"' in page.html
    assert "Dashed and grey: controls" in page.html
    sites = xr.concat([scores, scores], xr.Variable("site", ["resid", "mlp"]), data_vars="all").assign_attrs(scores.attrs)
    (data,) = data_of(lz.report(stored, scores=sites))
    assert len(data["charts"][0]["series"]) == 4
    assert any("mlp" in name and "ridge" in name for name, _ in data["charts"][0]["series"])


# ------------------------------------------------------------------------------------------------------------- markup


def test_everything_that_others_named_is_escaped(tmp_path: Path) -> None:
    store = lz.open_store(tmp_path / "s")
    texts = [f"{EVIL} {i}" for i in range(12)]
    info = GroupInfo(model=NAME, provenance={EVIL: EVIL}, num_layers=4, hidden_size=8)
    store.write(info, make_batch(texts, columns={"label": [EVIL, "b"] * 6}))
    page = lz.report(store, labels="label", prompts=texts[:2])
    assert "<script>alert" not in page.html
    assert not set("\u2028\u2029\u202e") & set(page.html)
    tags = Tags(page.html)
    assert tags.seen.count("script") == 2
    assert all(tag.startswith("image href=data:image/png") for tag in tags.active), tags.active
    assert "default-src 'none'" in page.html
    assert not re.search(r"https?://", page.html)
    assert data_of(page)[0]["maps"][0]["what"] == f"log-odds of label = {sorted(['b', EVIL])[1]}"


def test_json_cannot_end_its_script() -> None:
    text = str(embed_json({"a": ["</script><!--\u2028\u2029&", float("nan"), float("inf"), 1 / 3, "\ud800"]}))
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text.replace("\\ud800", "?"))["a"][:4] == ["</script><!--\u2028\u2029&", None, None, 0.3333]
    text.encode("utf-8")


def test_texts_stay_out_where_they_are_not_wanted_or_not_there(stored: Store, tmp_path: Path) -> None:
    kept = lz.report(stored, prompts=["prompt 3!!!"], text=False)
    assert "prompt 3!" not in kept.html
    assert lz.prompt_hash("prompt 3!!!") in kept.html
    assert "#" not in "".join(data_of(kept)[0]["maps"][0]["tokens"]), "token ids are texts too, for who has the tokenizer"
    stored.publish(tmp_path / "pub", text=False)
    published = lz.report(tmp_path / "pub", prompts=[lz.prompt_hash("prompt 3!!!")])
    assert "prompt 3!" not in published.html
    assert "prompt 3!!!" in lz.report(stored, prompts=["prompt 3!!!"]).html


def test_a_page_does_not_show_the_local_path_of_the_store(stored: Store, tmp_path: Path) -> None:
    assert str(tmp_path) not in lz.report(stored).html


def test_the_title_says_whose_activations_they_are_and_below_what_the_page_is(tmp_path: Path) -> None:
    def titles(store: Store) -> tuple[str, str, str]:
        html = lz.report(store).html
        found = re.search(r"<title>(.*?)</title>.*<h1>(.*?)</h1><p[^>]*>(.*?):", html, re.DOTALL)
        assert found is not None
        return found[1], found[2], found[3]

    store = lz.open_store(tmp_path / "activations")
    assert titles(store)[1:] == ("An empty store of activations", "Report on the store activations")
    for model in ("acme/one", "acme/two", "acme/three"):
        lz.write_activations(store, model=model, prompts=["a"], pooled={"resid_mean": {0: np.ones((1, 4), "float32")}})
        expected = {
            "acme/one": "Activations of acme/one",
            "acme/two": "Activations of acme/one and acme/two",
            "acme/three": "Activations of 3 models",
        }[model]
        assert titles(store) == (f"{expected} · lmprobe-zarr report", expected, "Report on the store activations")


def test_every_picture_has_a_text_that_says_what_is_seen(stored: Store) -> None:
    html = lz.report(stored, labels="label").html
    drawn = re.findall(r"<svg[^>]*>", html)
    described = [re.search(r'role="img" aria-label="([^"]+)"', tag) for tag in drawn if "aria-hidden" not in tag]
    assert len(described) >= 6
    labels = [found[1] for found in described if found is not None]
    assert len(labels) == len(described)
    assert all(len(label) > 20 for label in labels), labels
    for start in (
        "Accuracy: ",
        "AUROC: ",
        "Norm of resid: ",
        "Outlier units of resid: ",
        "log-odds of label = 1 of each token by layer",
        "resid",
    ):
        assert any(label.startswith(start) for label in labels), start
    assert "<img" not in html


def test_the_page_is_bounded_whatever_the_store_holds(tmp_path: Path) -> None:
    store = lz.open_store(tmp_path / "s")
    layers = tuple(range(170))
    for m in range(6):
        info = GroupInfo(model=f"m{m}", num_layers=170, hidden_size=2)
        store.write(info, make_batch([f"{i} " * 50 for i in range(250)], layers=layers, hidden=2, n_tokens=[30] * 250))
    page = lz.report(store, prompts=12)
    assert len(page.html.encode()) < 3 * 2**20
    assert len(data_of(page)) == 4
    assert "4 of 6 groups are shown in full" in page.html
    assert all(len(chart["layers"]) <= 160 for chart in data_of(page))


def test_tokens_are_cut_where_they_are_many(stored: Store) -> None:
    view = stored.view(GROUP)
    rows = view.select(["prompt 4!!!!", "prompt 3!!!"])
    found = map_tokens(view, "resid", rows, (0,), most=2)
    assert found.counts.tolist() == [2, 2]
    whole = [stored.tokens(prompts=[p]).resid.sel(layer=0).values[:2] for p in ("prompt 4!!!!", "prompt 3!!!")]
    assert found.values[0] == pytest.approx(np.linalg.norm(np.concatenate(whole), axis=1), rel=1e-5)


def test_stores_with_little_in_them_have_a_page_too(tmp_path: Path) -> None:
    store = lz.open_store(tmp_path / "s")
    assert "It is empty" in lz.report(store).html
    store.write(GROUP, make_batch(["a"], tokens=False))
    page = lz.report(store)
    Tags(page.html)
    assert "No tokens are stored" in page.html
    assert "All 1 prompts." in page.html or "All 1 prompt" in page.html


# ---------------------------------------------------------------------------------------------------- calls and errors


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompts": 99}, InvalidArgumentError, "0 to 12"),
        ({"prompts": ["prompt 0"] * 13}, InvalidArgumentError, "at most 12"),
        ({"sample_bytes": 0}, InvalidArgumentError, "at least 1"),
        ({"model": "nobody"}, ModelNotStoredError, "nobody"),
        ({"labels": "nothing"}, LabelError, "nothing"),
        ({"labels": "label", "variable": "mlp_mean"}, InvalidArgumentError, "there is resid_mean"),
        ({"scores": 3}, InvalidTypeError, "not int"),
        ({"scores": xr.Dataset()}, InvalidArgumentError, "give what sweep gives"),
        ({"probe": 3}, InvalidTypeError, "fitted"),
        ({"probe": lz.Probe()}, InvalidArgumentError, "not fitted"),
        ({"path": "/nowhere/at/all/r.html"}, InvalidArgumentError, "cannot be written"),
    ],
)
def test_a_page_that_cannot_be_made_raises(stored: Store, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lz.report(stored, **arguments)


def test_scores_of_another_model_are_refused(stored: Store) -> None:
    scores = lz.sweep(stored.dataset().resid_mean, labels="label", probes=["ridge"], cv=2)
    scores.attrs["model"] = "other"
    with pytest.raises(InvalidArgumentError, match="'other', and shown is acme/toy"):
        lz.report(stored, scores=scores)


def test_a_report_shows_itself_in_a_notebook_in_a_frame_of_its_own(stored: Store) -> None:
    page = lz.report(stored)
    frame = page._repr_html_()
    assert frame.startswith("<iframe")
    assert 'sandbox="allow-scripts"' in frame
    assert frame.count('"') == frame.split("srcdoc=")[0].count('"') + 2
    assert repr(page).startswith("<lmprobe_zarr report, ")


def test_the_command_writes_the_page(stored: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "r.html"
    code, out, err = call(capsys, "report", stored.url, "-o", str(target), "--labels", "label", "--prompts", "2")
    assert code == 0, err
    assert str(target) in out
    assert len(data_of(lz.Report(target.read_text(encoding="utf-8")))[0]["maps"]) == 2
    document = call_json(capsys, "report", stored.url, "-o", str(target), "--prompt", "prompt 3!!!", "--no-text")
    assert document["nbytes"] == target.stat().st_size
    assert "prompt 3!" not in target.read_text(encoding="utf-8")
    for arguments in (["--scores", str(tmp_path / "none.zarr")], ["-o", str(tmp_path / "no" / "r.html")], ["--sample-mb", "0"]):
        code, _, err = call(capsys, "report", stored.url, *arguments)
        assert code == 1
        assert len(err.splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.html", "s"]


def test_the_command_leaves_out_prompts_without_a_label_if_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = labelled_in_part(tmp_path / "s", [None if i % 5 == 3 else i % 2 for i in range(60)], list(range(60)))
    target = tmp_path / "r.html"
    arguments = ["report", store.url, "-o", str(target), "--labels", "topic"]
    code, _, err = call(capsys, *arguments)
    assert code == 1
    assert err.endswith("give each a label, or leave them out with --missing drop\n")
    assert not target.exists()
    assert call(capsys, *arguments, "--missing", "drop")[0] == 0
    assert curves_of(lz.Report(target.read_text(encoding="utf-8"))) == curves_of(lz.report(store, labels="topic", missing="drop"))


@pytest.mark.filterwarnings("ignore::zarr.errors.UnstableSpecificationWarning")
def test_the_command_draws_scores_that_were_saved(stored: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = lz.sweep(stored.dataset().resid_mean, labels="label", probes=["ridge"], cv=2)
    scores.to_zarr(tmp_path / "scores.zarr", zarr_format=3, consolidated=False)
    code, _, err = call(capsys, "report", stored.url, "-o", str(tmp_path / "r.html"), "--scores", str(tmp_path / "scores.zarr"))
    assert code == 0, err
    (data,) = data_of(lz.Report((tmp_path / "r.html").read_text(encoding="utf-8")))
    assert data["charts"][0]["series"][0][1] == pytest.approx(scores.accuracy.mean("fold").values[:, 0].tolist(), rel=1e-3)


# ------------------------------------------------------------------------------------------------- sites of any name


def free_sites(root: Path) -> Store:
    """No residual stream: `neurons` in one layer of two and by token, `gate_mean` in both, `last_mean` without layers."""
    rng = np.random.default_rng(0)
    labels = [i % 2 for i in range(40)]
    tokens = [rng.standard_normal((3, 7)).astype("float32") + 2 * label for label in labels]
    gate = {layer: rng.standard_normal((40, 5)).astype("float32") for layer in (0, 1)}
    last = rng.standard_normal((40, 6)).astype("float32") + np.array(labels)[:, None]
    store = lz.open_store(root)
    texts = [f"prompt {i}" for i in range(40)]
    lz.write_activations(
        store, model="m", prompts=texts, coords={"label": labels}, activations={"neurons": {1: tokens}},
        pooled={"neurons_mean": {1: np.stack([t.mean(0) for t in tokens])}, "last_mean": last},
    )  # fmt: skip
    lz.write_activations(store, model="m", prompts=texts, pooled={"gate_mean": gate})
    return store


def test_a_store_without_a_residual_stream_is_shown_by_the_sites_that_it_holds(tmp_path: Path) -> None:
    store = free_sites(tmp_path / "s")
    page = lz.report(store)
    assert "Norm of neurons" in page.html
    assert "norm of neurons" in page.html
    for name in ("neurons", "neurons_mean", "gate_mean", "last_mean"):
        assert name in page.html
    profile = profile_layers(store.view(store.find_group("m")), "tokens", "neurons", (1,), sample_bytes=2**20)
    values = store.tokens("m").neurons.sel(layer=1).values.astype(float)
    assert profile.norms[:, 0] == pytest.approx(np.percentile(np.linalg.norm(values, axis=1), [5, 50, 95]), rel=1e-5)


@pytest.mark.few(2)
@pytest.mark.parametrize("variable", ["neurons_mean", "gate_mean", "last_mean"])
def test_labels_are_fitted_on_any_pooled_site(tmp_path: Path, variable: str) -> None:
    store = free_sites(tmp_path / "s")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        page = lz.report(store, labels="label", variable=variable)
    assert f"from {variable}" in page.html
    # Tokens are scored by a probe of their own site, and are not where no probe has learned from rows like theirs.
    assert ("log-odds of label = 1" in page.html) == (variable == "neurons_mean")
    assert ("norm of neurons" in page.html) == (variable != "neurons_mean")
    with pytest.raises(InvalidArgumentError, match=r"'neurons' is no site that is stored per prompt in .*: there is .*gate_mean"):
        lz.report(store, labels="label", variable="neurons")


def test_a_probe_of_another_width_than_the_tokens_is_refused(tmp_path: Path) -> None:
    store = free_sites(tmp_path / "s")
    ds = store.dataset("m")
    fits = lz.Probe(model="m", classifier="ridge").fit_from_activations(ds.neurons_mean.sel(layer=[1]), ds.label.values)
    assert "score of 1" in lz.report(store, probe=fits).html
    other = lz.Probe(model="m", classifier="ridge").fit_from_activations(ds.gate_mean.sel(layer=[1]), ds.label.values)
    with pytest.raises(InvalidArgumentError, match="fitted on rows of 5 values, and the tokens of 'neurons' have 7"):
        lz.report(store, probe=other)


def test_the_command_line_takes_any_site(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    free_sites(tmp_path / "s")
    out = tmp_path / "page.html"
    assert call(capsys, "report", str(tmp_path / "s"), "-o", str(out), "--labels", "label", "--variable", "neurons_mean")[0] == 0
    assert "log-odds of label = 1" in out.read_text()
    with pytest.warns(UserWarning, match=r"'neurons_mean' is not stored in the layers \[0\], which are left out"):
        swept = call_json(capsys, "sweep", str(tmp_path / "s"), "--labels", "label", "--variable", "neurons_mean", "--probes", "ridge")
    assert swept["variable"] == "neurons_mean"
    assert {row["layer"] for row in swept["scores"]} == {1}
    assert max(row["accuracy"] for row in swept["scores"]) > 0.9
