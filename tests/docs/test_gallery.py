"""The gallery shows every plot, on both grounds, with a text that says what is seen, and its script draws what the page's lines make."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gallery_page
import pytest
from browser import browser, find_browser

from lmprobe_zarr import plots

matplotlib = pytest.importorskip("matplotlib")

PAGE = gallery_page.PAGE.read_text(encoding="utf-8")
SHOWN = re.findall(r"^!\[([^]]*)\]\(assets/gallery/([\w-]+)-(light|dark)\.png#only-(light|dark)\)$", PAGE, re.MULTILINE)


def test_every_plot_has_its_lines_and_its_picture() -> None:
    methods = {"plot_scores": ".lz.plot("} | {name: f".lz.{name}(" for name in plots.__all__ if name not in ("plot_scores", "save_plot")}
    code = [text for kind, text in gallery_page.pieces(PAGE) if kind == "code"]
    for name, call in methods.items():
        assert any(re.search(rf"^axes = .*{re.escape(call)}", block, re.MULTILINE) for block in code), name
    kinds = [kind for kind, _ in gallery_page.pieces(PAGE)]
    drawing = [number for number, (kind, text) in enumerate(gallery_page.pieces(PAGE)) if kind == "code" and "axes = " in text]
    assert all(kinds[number + 1] == "picture" for number in drawing)
    assert kinds.count("picture") == len(drawing)


def test_pictures_are_there_on_both_grounds_with_texts_and_are_small() -> None:
    names = {(name, ground) for _, name, ground, only in SHOWN if ground == only}
    assert len(names) == len(SHOWN)
    assert names == {(name, ground) for name, _ in names for ground in gallery_page.GROUNDS}
    assert {f"{name}-{ground}.png" for name, ground in names} == {path.name for path in gallery_page.PICTURES.iterdir()}
    assert all(len(alt) >= 25 for alt, *_ in SHOWN)
    assert sum(path.stat().st_size for path in gallery_page.PICTURES.iterdir()) < 600_000


def test_pictures_have_the_ground_that_they_are_for() -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    for path in gallery_page.PICTURES.iterdir():
        dark = path.stem.endswith("-dark")
        expected: Any = to_rgb(gallery_page.GROUNDS["dark"]["figure.facecolor"]) if dark else (1.0, 1.0, 1.0)
        assert imread(path)[0, 0, :3] == pytest.approx(expected, abs=0.02), path.name


def test_the_script_draws_the_axes_of_the_lines_above_each_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (
        "```python\nfrom matplotlib.figure import Figure\n\naxes = Figure(figsize=(1, 1)).subplots()\n```\n\n"
        "![one](assets/gallery/one-light.png#only-light)\n\n```python\naxes = Figure(figsize=(2, 1)).subplots()\n```\n\n"
        "![two](assets/gallery/two-light.png#only-light)\n"
    )
    from matplotlib.image import imread

    for ground, corner in (("light", 1.0), ("dark", 0x1E / 255)):
        drawn = gallery_page.draw(page, ground)
        assert list(drawn) == ["one", "two"]
        for name, width in (("one", 110), ("two", 220)):
            (tmp_path / "a.png").write_bytes(drawn[name])
            pixels = imread(tmp_path / "a.png")
            assert pixels.shape[:2] == (110, width)
            assert pixels[0, 0, 0] == pytest.approx(corner, abs=0.01)


def test_a_picture_for_one_ground_has_one_for_the_other() -> None:
    for page in gallery_page.PAGE.parent.rglob("*.md"):
        text = page.read_text(encoding="utf-8")
        shown = {ground: re.findall(rf"\]\((assets/[^)]+)\.png#only-{ground}\)", text) for ground in gallery_page.GROUNDS}
        assert [name.removesuffix("-light") for name in shown["light"]] == [name.removesuffix("-dark") for name in shown["dark"]], page
        for name in (*shown["light"], *shown["dark"]):
            assert (page.parent / f"{name}.png").exists(), name


@pytest.mark.parametrize("width", [400, 1400])
def test_the_site_shows_the_pictures_for_the_ground_that_the_reader_chose(width: int, tmp_path: Path) -> None:
    executable, built = find_browser(), gallery_page.ROOT / "site" / "gallery.html"
    if executable is None:
        pytest.skip("no Chromium on this machine")
    if not built.exists():
        pytest.skip("the documentation was not built: make docs")
    shown = (
        "[...document.querySelectorAll('article img')].filter(i => getComputedStyle(i).display !== 'none').map(i => i.getAttribute('src'))"
    )
    with browser(executable, tmp_path) as page:
        page.resize(width)
        for ground in gallery_page.GROUNDS:
            page.scheme(ground)
            page.open(built)
            names = page.ask(shown)
            assert len(names) == len(SHOWN) / 2
            assert all(name.endswith(f"-{ground}.png") for name in names), names
            assert page.ask("document.documentElement.scrollWidth <= window.innerWidth")
            assert not [url for url in page.requests() if not url.startswith("file:")]
