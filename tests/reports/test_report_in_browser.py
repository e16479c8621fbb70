"""The report in a real browser: by mouse and by keyboard, dark and light, narrow and on paper; it runs and fetches nothing else."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Page, browser, find_browser

import lmprobe_zarr as lz
from lmprobe_zarr.store.store import Store

CHROMIUM = find_browser()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")

NAME = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"  # of a model, which may not hold what cannot be shown
EVIL = f"{NAME}\u2028"


def make_store(folder: Path) -> Store:
    """Two classes that later layers tell apart, with names and texts that would like to run."""
    rng = np.random.default_rng(0)
    texts = [f"{EVIL} says {i}" for i in range(24)]
    labels = [EVIL if i % 2 else "tame" for i in range(24)]
    counts = [4 + i % 5 for i in range(24)]
    means = [layer * (0.5 if label == EVIL else -0.5) for layer in range(6) for label in labels]
    values = {
        layer: [(rng.standard_normal((n, 8)) + means[layer * 24 + i]).astype("float32") for i, n in enumerate(counts)] for layer in range(6)
    }
    pooled = {layer: np.stack([prompt_tokens.mean(axis=0) for prompt_tokens in each]) for layer, each in values.items()}
    store = lz.open_store(folder)
    lz.write_activations(
        store, model=f"acme/{NAME}", prompts=texts, activations={"resid": values}, pooled={"resid_mean": pooled},
        coords={"label": labels}, provenance={"note": EVIL},
    )  # fmt: skip
    return store


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    folder = tmp_path_factory.mktemp("report")
    lz.report(make_store(folder / "s"), folder / "report.html", labels="label")
    assert CHROMIUM is not None
    with browser(CHROMIUM, folder / "profile") as opened:
        opened.resize(1000)
        opened.open(folder / "report.html")
        yield opened


@pytest.fixture(autouse=True)
def fresh(page: Page) -> None:
    page.resize(1000)
    page.scheme("light")
    page.ask("document.activeElement.blur(); scrollTo(0, 0)")
    choose(page, 3)


def choose(page: Page, layer: int) -> None:
    page.ask(f"{{ const s = document.querySelector('.bar input'); s.value = {layer}; s.dispatchEvent(new Event('input')); }}")


def layer_of(page: Page) -> int:
    return int(page.ask("document.querySelector('section.group').dataset.layer"))


def tip(page: Page) -> str:
    return str(page.ask("document.getElementById('tip').hidden ? '' : document.getElementById('tip').textContent"))


def test_nothing_runs_that_is_not_the_pages_own_and_nothing_is_fetched(page: Page) -> None:
    assert page.complaints() == []
    assert [url for url in page.requests() if not url.startswith("file:")] == []
    assert len([url for url in page.requests() if url.startswith("file:")]) == 1
    assert page.ask("document.scripts.length") == 2, "the script and its data"
    assert page.ask("document.querySelectorAll('img').length") == 0
    assert "</script><script>alert(1)" in page.ask("document.querySelector('h2').textContent"), "shown as it is called"


def test_arrow_keys_choose_a_layer_from_anywhere_and_on_the_slider(page: Page) -> None:
    start = layer_of(page)
    page.press("ArrowLeft")
    assert layer_of(page) == start - 1
    page.press("ArrowRight")
    assert layer_of(page) == start
    page.ask("document.querySelector('.bar input').focus()")
    page.press("ArrowLeft")
    page.press("ArrowLeft")
    assert layer_of(page) == start - 2
    assert page.ask("document.querySelector('.bar output').textContent") == f"layer {start - 2}"
    for _ in range(9):
        page.press("ArrowLeft")
    assert layer_of(page) == 0
    for _ in range(start):
        page.press("ArrowRight")
    assert layer_of(page) == start


def test_a_chosen_layer_moves_the_curves_marks_and_colours_the_words(page: Page) -> None:
    def state() -> Any:
        return page.ask(
            "[document.querySelector('svg.chart .cursor').getAttribute('x1'), document.querySelector('.tokens .chosen').getAttribute('y'),"
            "document.querySelector('.words b').style.background]"
        )

    before = state()
    page.press("ArrowLeft")
    after = state()
    assert all(a != b for a, b in zip(before, after, strict=True)), (before, after)
    page.press("ArrowRight")
    assert state() == before


def test_colours_without_the_script_equal_those_that_the_script_draws(page: Page) -> None:
    """The colours that the page comes with, for readers without scripts, are those of the layer that is chosen at first."""
    source = Path(page.ask("decodeURI(location.pathname)")).read_text(encoding="utf-8")
    choose(page, json.loads(page.ask("document.querySelector('script.lz-data').textContent"))["layer"])
    number = r"background: ?rgba\((\d+), ?(\d+), ?(\d+), ?([\d.]+)\)"
    written = re.findall(rf'<b[^>]*style="{number}"', source)
    drawn = re.findall(
        number, " ".join(page.ask("[...document.querySelectorAll('.words b')].map(b => 'background:' + b.style.background)"))
    )
    assert len(written) == len(drawn) > 10
    for ours, its in zip(written, drawn, strict=True):
        assert float(ours[3]) == pytest.approx(float(its[3]), abs=0.006)
        assert ours[:3] == its[:3] or float(ours[3]) < 0.01


def test_hovering_shows_the_values_of_a_layer(page: Page) -> None:
    left, top, width, height = page.box("svg.chart")
    page.point(left + width * 0.5, top + height * 0.4)
    shown = tip(page)
    assert re.fullmatch(
        r"layer [23]\nlogistic_regression: [\d.]+(\n(shuffled_labels:logistic_regression|bag_of_words): [\d.]+){2}", shown
    ), shown
    table = page.ask(
        "[...document.querySelectorAll('figure[data-of] table tbody tr')].slice(0, 6).map(r => [...r.cells].map(c => c.textContent))"
    )
    layer, value, *_ = re.findall(r"[\d.]+", shown)
    assert float({row[0]: row[1] for row in table}[layer]) == pytest.approx(float(value), abs=1e-3)
    page.point(left + width * 0.5, top + height * 0.4, click=True)
    assert layer_of(page) == int(layer)
    page.point(2, 2)
    assert tip(page) == ""


def test_hovering_over_a_token_shows_its_value(page: Page) -> None:
    left, top, _, height = page.box("figure.tokens svg.cells")
    page.point(left + 40, top + height / 2)
    shown = tip(page)
    assert "layer" in shown
    assert "log-odds" in shown
    page.press("Escape")
    assert tip(page) == ""


def test_tokens_are_walked_with_the_arrow_keys(page: Page) -> None:
    page.ask("document.querySelector('.walk').focus()")
    first = tip(page)
    assert first.startswith("0\n")
    page.press("ArrowRight")
    assert tip(page).startswith("1\n")
    start = layer_of(page)
    page.press("ArrowDown")
    assert layer_of(page) == start - 1
    assert f"layer {start - 1}" in tip(page)
    page.press("ArrowUp")
    assert layer_of(page) == start


def test_the_focus_can_be_seen_and_reaches_everything(page: Page) -> None:
    page.ask("scrollTo(0, 0)")
    seen = []
    for _ in range(40):
        page.press("Tab")
        seen.append(page.ask("document.activeElement.tagName + ' ' + document.activeElement.className"))
        focused = not seen[-1].startswith("BODY")
        assert not focused or page.ask("getComputedStyle(document.activeElement).outlineStyle") != "none", seen[-1]
    kinds = " ".join(seen)
    for wanted in ("INPUT", "SELECT", "SUMMARY", "DIV walk"):
        assert wanted in kinds, wanted


def test_another_score_and_another_variable_can_be_chosen(page: Page) -> None:
    assert page.ask("[...document.querySelectorAll('figure[data-of=\"scores-0\"]')].map(f => f.hidden)") == [False, True]
    page.ask("{ const s = document.querySelector('select.pick'); s.selectedIndex = 1; s.dispatchEvent(new Event('change')); }")
    assert page.ask("[...document.querySelectorAll('figure[data-of=\"scores-0\"]')].map(f => f.hidden)") == [True, False]
    page.ask("{ const s = document.querySelector('select.pick'); s.selectedIndex = 0; s.dispatchEvent(new Event('change')); }")


def contrast(first: str, second: str) -> float:
    """Contrast of two colours. Source: W3C, Web Content Accessibility Guidelines 2.2."""

    def luminance(colour: str) -> float:
        parts = [int(v) / 255 for v in re.findall(r"\d+", colour)[:3]]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    low, high = sorted([luminance(first), luminance(second)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_can_be_read_in_the_light_and_in_the_dark(page: Page, scheme: str) -> None:
    page.scheme(scheme)
    back = page.ask("getComputedStyle(document.body).backgroundColor")
    assert (contrast(back, "rgb(255,255,255)") < 1.2) == (scheme == "light")
    for selector, least in (("body", 7), (".dim", 4.5), ("th", 4.5), ("figcaption", 4.5)):
        colour = page.ask(f"getComputedStyle(document.querySelector({selector!r})).color")
        assert contrast(back, colour) >= least, selector
    for number in range(6):
        line = page.ask(f"getComputedStyle(document.documentElement).getPropertyValue('--c{number}')").strip()
        rgb = f"rgb({int(line[1:3], 16)}, {int(line[3:5], 16)}, {int(line[5:7], 16)})"
        assert contrast(back, rgb) >= 3, f"curve {number}"
    # The strongest colour behind a word: 72 % of blue or vermilion over the page's own.
    over = [int(v) for v in re.findall(r"\d+", back)]
    for hue in ((0, 114, 178), (213, 94, 0)):
        mixed = "rgb({}, {}, {})".format(*(round(0.72 * h + 0.28 * b) for h, b in zip(hue, over, strict=True)))
        assert contrast(mixed, page.ask("getComputedStyle(document.body).color")) >= 4.5, hue


@pytest.mark.parametrize("width", [360, 1000, 1600])
def test_it_fits_every_width(page: Page, width: int) -> None:
    page.resize(width)
    assert page.ask("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_chart_fits_a_phone_with_letters_that_can_be_read_and_do_not_touch(page: Page, scheme: str) -> None:
    page.resize(400)
    page.scheme(scheme)
    box, letters = page.ask(
        "(() => { const s = document.querySelector('svg.chart'), b = (e) => { const r = e.getBoundingClientRect();"
        "return [r.left, r.top, r.right, r.bottom]; };"
        "const shown = [...s.querySelectorAll('text')].filter(t => getComputedStyle(t).display !== 'none');"
        "return [b(s), shown.map(t => [t.textContent, b(t)])]; })()"
    )
    assert box[0] >= 0
    assert box[2] <= 400
    drawn = [found for text, found in letters if text != "majority class 0.50"]
    assert min(bottom - top for _, top, _, bottom in drawn) >= 10
    for number, (left, top, right, bottom) in enumerate(drawn):
        assert 0 <= left < right <= 400
        for others in drawn[number + 1 :]:
            apart = right <= others[0] + 1 or others[2] <= left + 1 or bottom <= others[1] + 3 or others[3] <= top + 3
            assert apart, (letters[number], others)


def test_it_prints(page: Page) -> None:
    page.medium("print")
    try:
        assert page.ask("getComputedStyle(document.querySelector('.bar')).display") == "none"
        page.scheme("dark")
        page.medium("print")
        assert page.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    finally:
        page.medium("")
    data = base64.b64decode(page.pdf())
    assert data.startswith(b"%PDF-")
    assert len(data) > 20_000


def test_a_screen_reader_meets_names(page: Page) -> None:
    roles = page.roles()
    assert ("slider", "Layer") in roles
    pictures = [name for role, name in roles if role in ("image", "img")]
    assert any(name.startswith("Accuracy: logistic_regression from") for name in pictures)
    assert all(pictures)
    assert [name for role, name in roles if role == "combobox"] == ["Which score", "Which variable"]
