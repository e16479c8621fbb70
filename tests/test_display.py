"""What is shown on terminals and in notebooks: aligned, whole, and with everything escaped that somebody else named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import call, call_json
from html_tags import Tags
from stores import GROUP, Wrapped, make_batch

import lmprobe_zarr as lz
from lmprobe_zarr.display import columns_of, count_of, escape, format_table, shorten, sparkline, visible
from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.store.contents import describe_view
from lmprobe_zarr.store.format.group import GroupInfo
from lmprobe_zarr.store.parts.stored_array import StoredArray
from lmprobe_zarr.store.store import Store

NAME = "<script>alert(1)</script>"  # of a model, which may not hold what cannot be shown
EVIL = f"{NAME}\x1b[31m\u202e"


def check(page: str) -> str:
    """The page, which needs no script and fetches nothing."""
    tags = Tags(page)
    assert "script" not in tags.seen
    assert not tags.active
    assert "http" not in page
    return page


# -------------------------------------------------------------------------------------------------------------- text


def test_only_one_is_singular() -> None:
    assert [count_of(number, "part") for number in (0, 1, 2)] == ["0 parts", "1 part", "2 parts"]
    assert [count_of(number, "entry", "entries") for number in (0, 1, 2)] == ["0 entries", "1 entry", "2 entries"]


def test_invisible_characters_are_escaped() -> None:
    assert visible("a\x1b[2Jb\u202ec\nd\u2028") == "a\\x1b[2Jb\\u202ec\\nd\\u2028"
    assert visible("a\nb", lines=True) == "a\nb"
    assert visible("日本 é ’ 🙂") == "日本 é ’ 🙂"
    assert escape("<b>\u202e") == "&lt;b&gt;\\u202e"


def test_a_table_is_aligned_also_with_wide_letters_and_cut_to_the_terminal() -> None:
    rows = [{"name": "日本語", "n": 5, "text": "x" * 50}, {"name": "ab", "n": 1234, "text": "y"}]
    lines = format_table(rows).splitlines()
    assert lines == ["name       n  text", f"日本語     5  {'x' * 50}", "ab      1234  y"]
    cut = format_table(rows, width=30).splitlines()
    assert max(map(columns_of, cut)) == 30
    assert cut[1].endswith("x…")
    assert shorten("日本語", 5) == "日本…"
    assert format_table([]) == ""


def test_a_sparkline_has_gaps_where_nothing_is_known() -> None:
    markup = str(sparkline([0.0, float("nan"), 1.0, 0.5], 0.0, 1.0, label="a <b>"))
    assert markup.count("M") == 2
    assert 'aria-label="a &lt;b&gt;"' in markup
    check(markup)
    check(str(sparkline([0.5], 0.5, 0.5, label="one")))


# ------------------------------------------------------------------------------------------------------------ contents


def test_sizes_are_those_of_the_files(tmp_path: Path) -> None:
    store = lz.open_store(tmp_path / "s")
    for i in range(2):
        store.write(GROUP, make_batch([f"a{i}", f"bb{i}", f"c{i}"], n_tokens=[2, 3, 4], columns={"label": [0, 1, 1]}))
    store.annotate("acme/toy", {"split": {"a0": "train"}})
    held = describe_view(store.view(GROUP))
    by_name = {array.name: array for array in (*held.variables, *held.columns)}
    # 3 layers × (2 × 9 tokens) × 8 hidden × 4 bytes
    assert (by_name["resid"].raw_nbytes, by_name["resid"].dtype, by_name["resid"].codecs) == (1728, "float32", "bitshuffle, lz4, crc32c")
    for level, name in (("tokens", "resid"), ("prompts", "resid_mean"), ("prompts", "label"), ("prompts", "split")):
        files = [f for f in (tmp_path / "s").rglob("*") if f.is_file() and f.parent.name == name and f.parent.parent.name == level]
        assert files
        assert by_name[name].nbytes == sum(f.stat().st_size for f in files), name
    assert by_name["text"].raw_nbytes is None
    assert by_name["text"].codecs == "zstd, crc32c"
    assert (held.prompts, held.tokens, held.parts, held.annotations, held.layers) == (6, 18, 2, 1, (0, 1, 3))
    assert held.own_columns == ("label", "split")
    assert held.described_parts == "2 parts, 1 annotation"


# --------------------------------------------------------------------------------------------------------------- reprs


@pytest.fixture
def evil(tmp_path: Path) -> Store:
    store = lz.open_store(tmp_path / "s")
    info = GroupInfo(model=f"acme/{NAME}", provenance={"note": EVIL}, num_layers=4, hidden_size=8)
    store.write(info, make_batch([f"{EVIL} {i}" for i in range(8)], columns={"label": [0, 1] * 4}))
    return store


def test_a_store_shows_what_it_holds_without_reading_activations(evil: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("values are read")

    monkeypatch.setattr(StoredArray, "__getitem__", read, raising=False)
    monkeypatch.setattr("lmprobe_zarr.store.parts.variable.read_pieces", read)
    page = check(evil._repr_html_())
    for shown in ("8 prompts", "resid_mean", "bitshuffle, lz4, crc32c", "&lt;script&gt;", "label", "layers 0-1, 3", "\\x1b[31m"):
        assert shown in page, shown
    assert "\x1b" not in repr(evil)
    assert "\u202e" not in repr(evil)
    assert "8 prompts" in repr(evil)


def test_an_empty_store_is_shown_as_empty(tmp_path: Path) -> None:
    assert "empty" in check(lz.open_store(tmp_path / "s")._repr_html_())


def test_many_groups_are_listed_and_the_first_shown(tmp_path: Path) -> None:
    store = lz.open_store(tmp_path / "s")
    for i in range(23):
        store.write(GroupInfo(model=f"m{i:02}"), make_batch(["a"]))
    page = check(store._repr_html_())
    assert "3 more groups" in page
    assert "m22" in page


def test_a_damaged_store_is_shown_with_what_is_damaged(evil: Store) -> None:
    evil.write(GROUP, make_batch(["x"]))
    (part,) = [p for p in (Path(evil.url) / GROUP.name).iterdir() if len(p.name) == 26]
    (part / "zarr.json").write_bytes(b"{}")
    store = lz.open_store(evil.url, "r")
    with pytest.warns(lz.errors.CacheWarning):
        text = repr(store)
    assert "damaged: " in text
    assert part.name in text
    assert "8 prompts" in text
    assert part.name in check(store._repr_html_())


def test_a_place_that_no_longer_answers_is_shown_with_its_error(evil: Store) -> None:
    class Gone(Wrapped):
        def list(self, key: str) -> Any:
            raise lz.errors.UnreachableError("nobody at home")

    store = Store(Gone(evil.storage), mode="r")
    assert "nobody at home" in repr(store)
    assert "nobody at home" in check(store._repr_html_())


def test_cache_info_shows_models_limit_and_stores_below(evil: Store, tmp_path: Path) -> None:
    mine = lz.open_store([evil.url, str(tmp_path / "mine")])
    mine.write(GROUP, make_batch(["mine"]))
    page = check(lz.cache_info(store=mine)._repr_html_())
    for shown in ("acme/toy", "Read only", "&lt;script&gt;", "limit"):
        assert shown in page, shown


def test_a_probe_shows_what_it_learned_and_from_what() -> None:
    x, y = np.random.default_rng(0).standard_normal((20, 8)), np.arange(20) % 2
    probe = lz.Probe(f"acme/{NAME}", layers=3, classifier="ridge")
    assert "not yet" in check(probe._repr_html_())
    probe.fit_from_activations(x, [f"{EVIL}{i}" for i in y])
    page = check(probe._repr_html_())
    for shown in ("&lt;script&gt;", "RidgeClassifier", "layers", "classes"):
        assert shown in page, shown


def test_scores_show_their_best_layers_and_curves(evil: Store) -> None:
    data = evil.dataset()
    scores = lz.sweep(data.resid_mean, labels="label", probes=["ridge"], cv=2)
    means = scores.accuracy.mean("fold").sel(probe="ridge")
    best = int(means.layer[int(np.argmax(means.values))])
    page = check(scores.lz._repr_html_())
    assert f"<td>{float(means.max()):.3f}</td><td>{best}</td>" in page
    assert page.count("<svg") == 2
    assert f"ridge: best accuracy {float(means.max()):.3f} at layer {best}" in repr(scores.lz)
    assert "hidden" in check(data.lz._repr_html_())
    assert "prompt: 8" in repr(data.lz)


# ------------------------------------------------------------------------------------------------------- info and show


def test_the_terminal_never_gets_a_control_character(
    evil: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for arguments in (["info"], ["show"], ["show", "--list", "3"], ["show", "--level", "tokens", "--list", "2"]):
        code, out, _ = call(capsys, *arguments[:1], evil.url, *arguments[1:])
        assert code == 0
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e]", out), arguments
        assert re.search(r"\\x1b|\\u001b", out), arguments
    code, _, err = call(capsys, "show", evil.url, "--model", EVIL)
    assert code == 1
    assert "\x1b" not in err


def test_show_keeps_to_the_width_of_the_terminal(evil: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for arguments in (["show", evil.url], ["show", evil.url, "--list", "5"], ["info", evil.url]):
        code, out, _ = call(capsys, *arguments)
        assert code == 0
        lines = [line for line in out.splitlines() if not line.startswith((evil.url, "acme/"))]  # names stay whole, for copying
        assert max(map(columns_of, lines)) <= 80, out


def test_show_refuses_to_list_nothing(evil: Store, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "show", evil.url, "--list", "0")
    assert code == 1
    assert "at least 1" in err


def test_info_as_json_describes_the_storage_of_each_variable(evil: Store, capsys: pytest.CaptureFixture[str]) -> None:
    (group,) = call_json(capsys, "info", evil.url)["groups"]
    assert group["stored"]["resid"]["codecs"] == "bitshuffle, lz4, crc32c"
    assert group["model"] == f"acme/{NAME}"


def test_scores_of_several_variables_have_a_line_each_and_no_mean_of_them(tmp_path: Path) -> None:
    store = lz.open_store(tmp_path / "two", durable=False)
    rng, topics = np.random.default_rng(0), np.array(["a", "b"] * 15)
    values = rng.standard_normal((2, 3, 30, 4)).astype(np.float32)
    values[0, 1, :, 0] += 3 * (topics == "a")  # layer 1 of the first variable knows it, layer 2 of the second a little
    values[1, 2, :, 0] += 1.5 * (topics == "a")
    arrays = {"resid_last_token": values[0], "resid_mean": values[1]}
    pooled = {name: {layer: array[layer] for layer in range(3)} for name, array in arrays.items()}
    lz.write_activations(store, model="two", prompts=[f"p{i}" for i in range(30)], pooled=pooled)
    data = store.dataset()
    scores = lz.sweep(data, topics, probes=["ridge"], cv=5)
    shown, page = repr(scores.lz), scores.lz._repr_html_()
    for name in ("resid_last_token", "resid_mean"):
        alone = lz.sweep(data[name], topics, probes=["ridge"], cv=5).accuracy.mean("fold").sel(probe="ridge")
        line = f"ridge, variable {name}: best accuracy {float(alone.max()):.3f} at layer {int(alone.layer[int(np.argmax(alone.values))])}"
        assert line in shown
        assert f"ridge, variable {name}" in page
    with pytest.raises(InvalidArgumentError, match=r"2 along 'variable'.*scores\.sel\(variable='resid_last_token'\)"):
        scores.lz.plot()
    with pytest.raises(InvalidArgumentError, match=r"scores\.sel\(variable='resid_last_token'\)"):
        scores.lz.plot_heatmap()
