"""Names in pictures: cut so that they stay distinct, never markup, in a font that has their script or with a note that there is none."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from lmprobe_zarr.plots import plot_scores, plot_tokens, save_plot
from lmprobe_zarr.plots.names import MISSING, Lettering, shorten_names

matplotlib = pytest.importorskip("matplotlib")

SCRIPTS = {"Chinese (Han)": "今天很好", "Korean (Hangul)": "안녕", "Thai": "สวัสดี", "Devanagari": "नमस्ते", "Hiragana": "ひらがな"}


@pytest.mark.parametrize(
    "given",
    [
        [f"statements_about_cities_{word}" for word in ("affirmed", "negated", "in_spanish")],
        [f"{word}_statements_about_cities_of_the_world" for word in ("affirmed", "negated")],
        [f"statements_about_{word}_in_many_languages_of_the_world" for word in ("a", "b", "cities")],
        [f"statements_about_{'x' * 40}{i}{'x' * 40}_in_the_world" for i in range(30)],
        ["".join("ab"[(i >> bit) & 1] * 9 for bit in range(7)) for i in range(128)],
        ["x" * n for n in range(1, 60)],
        ["今" * 30 + "一", "今" * 30 + "二"],
    ],
)
@pytest.mark.parametrize("most", [8, 16, 24])
@pytest.mark.parametrize("keep_start", [False, True])
def test_short_names_are_as_distinct_as_the_long_ones(given: list[str], most: int, keep_start: bool) -> None:
    short = shorten_names([*given, given[0]], most, keep_start=keep_start)
    assert len(set(short)) == len(set(given))
    assert short[-1] == short[0]
    assert max(map(len, short)) <= most + (6 if most == 8 else 0)
    assert all(kept == name or "…" in kept for kept, name in zip(short, given, strict=False))


def test_a_name_with_room_stays_and_a_long_one_keeps_both_ends() -> None:
    assert shorten_names(["short", "a_name_of_twenty_five_xyz"], 24) == ["short", "a_name_of_t…nty_five_xyz"]
    assert shorten_names(["an extraordinarily long one"], 16, keep_start=True) == ["an extraordinar…"]


def scores(probes: list[str], **attrs: str) -> xr.Dataset:
    values = np.random.default_rng(0).uniform(0.6, 0.9, size=(3, len(probes), 2))
    coords = {"layer": np.arange(3), "probe": np.array(probes, object)}
    return xr.Dataset({"accuracy": (("layer", "probe", "fold"), values)}, coords=coords, attrs={"majority_share": 0.5, **attrs})


def tokens(words: list[str]) -> xr.DataArray:
    coords = {"layer": [0, 1], "position": ("token", np.arange(len(words))), "token_text": ("token", np.array(words, object))}
    return xr.DataArray(np.random.default_rng(0).normal(size=(2, len(words))), dims=("layer", "token"), coords=coords)


ODD = ["in_$_a_$", "$", r"a\$b$", r"$\frac{1}", "_hidden", "two\nlines", "tab\t", "\x1b[31m", "\u202eabc", "\ud800", "{}%&#^~", ""]


def test_no_name_is_markup_and_each_is_in_the_legend(tmp_path: Path) -> None:
    axes: Any = plot_scores(scores(ODD, model="$m$", labels="$x_{1$", variable="a$b$c"), baseline={"_$y$": 0.7})
    for ending in ("png", "svg", "pdf"):
        save_plot(axes, tmp_path / f"a.{ending}", dpi=40)
    shown = [text.get_text() for text in axes.get_legend().get_texts()]
    assert len(shown) == len(ODD) + 2
    assert shown[:2] == [r"in_\$_a_\$", r"\$"]
    assert shown[4:6] == ["_hidden", r"two\nlines"]
    assert axes.get_title() == r"\$m\$ · \$x_{1\$ from a\$b\$c"
    save_plot(plot_tokens(tokens(ODD)), tmp_path / "b.png", dpi=40)


def test_a_title_of_the_caller_may_be_mathematics(tmp_path: Path) -> None:
    axes: Any = plot_scores(scores(["a"]))
    axes.set_title("$R^2$ by layer")
    save_plot(axes, tmp_path / "a.png", dpi=40)
    assert axes.title.get_parse_math()


def test_with_tex_all_of_its_signs_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)
    assert Lettering().fit("a_b $5 & 10 % {x}") == r"a\_b \$5 \& 10 \% \{x\}"


@pytest.fixture
def no_other_fonts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the fonts that come with matplotlib, whatever is installed."""
    from matplotlib import font_manager

    kept = [font for font in font_manager.fontManager.ttflist if "mpl-data" in font.fname]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", kept)


@pytest.mark.few(1)
@pytest.mark.parametrize("script", list(SCRIPTS))
@pytest.mark.usefixtures("no_other_fonts")
def test_a_script_that_no_font_has_is_named_in_the_picture_and_matplotlib_warns_of_nothing(tmp_path: Path, script: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for axes in (plot_tokens(tokens(list(SCRIPTS[script]))), plot_scores(scores([SCRIPTS[script], "plain"], model=SCRIPTS[script]))):
            save_plot(axes, tmp_path / "a.png", dpi=40)
            note: Any = axes.figure
            assert script in note.get_supxlabel().replace("\n", " ")
            assert MISSING in note.get_supxlabel()


@pytest.mark.usefixtures("no_other_fonts")
def test_scripts_that_the_font_has_are_drawn_as_they_are_and_there_is_no_note() -> None:
    words = ["сегодня", "σήμερα", "שלום", "اليوم", "élève", "→", "😀"]
    axes: Any = plot_scores(scores(words))
    assert [text.get_text() for text in axes.get_legend().get_texts()][:-1] == words
    assert axes.figure.get_supxlabel() == ""


@pytest.fixture
def installed(tmp_path: Path, no_other_fonts: None) -> Iterator[str]:
    """A font with the letters 今天很好 that was not there before."""
    from fontTools.fontBuilder import FontBuilder  # type: ignore[import-untyped]
    from fontTools.pens.ttGlyphPen import TTGlyphPen  # type: ignore[import-untyped]
    from matplotlib import font_manager

    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    for point in ((100, 700), (900, 700), (900, 0)):
        pen.lineTo(point)
    pen.closePath()
    box = pen.glyph()
    letters = {ord(c): f"uni{ord(c):04X}" for c in "今天很好"}
    glyphs = [".notdef", *letters.values()]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(glyphs)
    builder.setupCharacterMap(letters)
    builder.setupGlyf(dict.fromkeys(glyphs, box))
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 100)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Letters For A Test", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    path = tmp_path / "letters.ttf"
    builder.save(str(path))
    font_manager.fontManager.addfont(str(path))
    yield "Letters For A Test"
    font_manager.fontManager.ttflist = [font for font in font_manager.fontManager.ttflist if font.fname != str(path)]


def test_an_installed_font_that_has_the_script_is_used_beside_the_usual_one(tmp_path: Path, installed: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        axes: Any = plot_tokens(tokens(["今天", "is", "很好"]))
        save_plot(axes, tmp_path / "a.png", dpi=40)
    labels = axes.get_xticklabels()
    assert [label.get_text() for label in labels] == ["今天", "is", "很好"]
    assert labels[0].get_fontfamily()[-1] == installed
    assert axes.figure.get_supxlabel() == ""
    assert installed not in plot_tokens(tokens(["is"])).get_xticklabels()[0].get_fontfamily()
