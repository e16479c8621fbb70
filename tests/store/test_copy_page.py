"""The page beside a published copy: what it shows, what it must not, and when it is refused or replaced."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from browser import browser, find_browser
from html_tags import Tags
from stores import GROUP, make_batch
from web_server import serving

import lmprobe_zarr as lz
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, NotAStoreError
from lmprobe_zarr.store.format.group import GroupInfo
from lmprobe_zarr.store.store import Store

CHROMIUM = find_browser()
NAME = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
TEXTS = [f"the secret text {i}" for i in range(20)]
LABELS = ["yes" if i % 2 else "no" for i in range(20)]


def published(folder: Path) -> str:
    return (folder / "index.html").read_text(encoding="utf-8")


def write(store: Store, model: str = "acme/toy", **more: Any) -> Store:
    rng = np.random.default_rng(0)
    values = {layer: rng.standard_normal((20, 8), dtype="float32") + layer * (np.arange(20) % 2)[:, None] for layer in range(4)}
    pooled = {layer: each.astype("float32") for layer, each in values.items()}
    lz.write_activations(store, model=model, prompts=TEXTS, pooled={"resid_mean": pooled}, coords={"label": LABELS}, **more)
    return store


@pytest.fixture
def stored(tmp_path: Path) -> Store:
    return write(lz.open_store(tmp_path / "s"))


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> xr.Dataset:
    store = write(lz.open_store(tmp_path_factory.mktemp("scores") / "s"))
    return lz.sweep(store.dataset("acme/toy").resid_mean, labels="label", cv=2, controls=["shuffled_labels"])


def test_the_page_shows_models_prompts_layers_variables_coverage_and_sizes(store: Store, tmp_path: Path) -> None:
    store.write(GROUP, make_batch(["first", "second"], seed=1, columns={"label": [7, 8]}))
    store.write(GROUP, make_batch(["third"], seed=2, layers=(0, 1)))
    store.write(GroupInfo(model="acme/other", provenance={"revision": "9"}, num_layers=4, hidden_size=8), make_batch(["x"]))
    store.publish(tmp_path / "copy", licence="cc-by-4.0")
    text = unescape(re.sub(r"<[^>]*>", " ", published(tmp_path / "copy").partition("<main>")[2]))
    shown = [
        "Activations of acme/toy and acme/other",
        "Published copy copy: 2 groups, 4 prompts",
        "resid_mean",
        "second",
        "revision",
        "0-1, 3",
    ]
    for wanted in shown:
        assert wanted in text, wanted
    assert "cc-by-4.0" in text
    # Of three layers of three prompts, layer 3 lacks the third prompt: 8 of 9.
    assert "88.9 % of prompts × layers stored" in text
    assert re.search(r"first\s+7\s", text), "the user's own column beside the prompt"
    assert re.search(r"third\s+—\s", text), "which one of the prompts lacks"
    assert str(tmp_path) not in published(tmp_path / "copy"), "no path of this machine"


def test_the_lines_on_the_page_open_the_copy(stored: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored.publish(tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"<pre[^>]*><code>(.*?)</code></pre>", published(tmp_path / "copy"), re.DOTALL)
    found: dict[str, Any] = {}
    for block in blocks:
        exec(unescape(re.sub(r"<[^>]*>", "", block)), found)  # noqa: S102 — what the page tells people to type
        assert found["ds"].sizes["prompt"] == 20
    assert len(blocks) == 2


def test_scores_are_drawn_by_layer_with_their_controls(stored: Store, scores: xr.Dataset, tmp_path: Path) -> None:
    stored.publish(tmp_path / "copy", scores=scores)
    page = published(tmp_path / "copy")
    rows = re.search(r"<caption>Accuracy</caption>.*?</table>", page, re.DOTALL)
    assert rows is not None
    cells = [[float(v) for v in re.findall(r"<td[^>]*>([\d.]+)</td>", row)] for row in re.findall(r"<tr>(.*?)</tr>", rows[0])[1:]]
    for layer, value, control in cells:
        mine = scores.accuracy.sel(layer=int(layer)).mean("fold")
        assert [value, control] == pytest.approx(mine.values.tolist(), abs=1e-3)
    assert len(cells) == 4
    assert 'class="chart"' in page
    assert "Labels &#x27;label&#x27;, from resid_mean. Mean of 2 folds" in page
    stored.publish(tmp_path / "without")
    assert 'class="chart"' not in published(tmp_path / "without")


def test_texts_stay_out_where_the_copy_has_none(stored: Store, scores: xr.Dataset, tmp_path: Path) -> None:
    stored.publish(tmp_path / "copy", text=False, scores=scores)
    assert "secret" not in published(tmp_path / "copy")
    assert lz.prompt_hash(TEXTS[0]) in published(tmp_path / "copy")
    stored.publish(tmp_path / "some", prompts=TEXTS[3:5], layers=[1])
    page = published(tmp_path / "some")
    assert TEXTS[3] in page
    assert TEXTS[0] not in page, "not of what is not published"


def test_everything_that_others_named_is_escaped(tmp_path: Path) -> None:
    evil = f"{NAME}\u2028\u202e"
    store = lz.open_store(tmp_path / "s")
    info = GroupInfo(model=f"a{NAME}", provenance={"note": evil}, num_layers=4, hidden_size=8)
    store.write(info, make_batch([f"{evil} {i}" for i in range(3)], columns={"label": [evil] * 3}))
    store.publish(tmp_path / "<img src=x onerror=alert(3)>", licence=evil)
    page = published(tmp_path / "<img src=x onerror=alert(3)>")
    assert "<script>alert" not in page
    assert "<img" not in page
    assert not set("\u2028\u202e") & set(page)
    tags = Tags(page)
    assert tags.seen.count("script") == 2
    assert all(tag.startswith("image href=data:image/png") for tag in tags.active), tags.active
    assert "default-src 'none'" in page
    assert not re.search(r"https?://", page)


def test_scores_that_cannot_be_drawn_are_refused_before_anything_is_written(stored: Store, scores: xr.Dataset, tmp_path: Path) -> None:
    other = scores.assign_attrs(model="acme/another")
    for wrong, error, message in (
        ({"scores": other}, InvalidArgumentError, "acme/another"),
        ({"scores": stored.dataset()}, InvalidArgumentError, "layer and probe"),
        ({"scores": {"accuracy": 1}}, InvalidTypeError, "dict"),
        ({"scores": scores, "page": False}, InvalidArgumentError, "page=False"),
    ):
        with pytest.raises(error, match=message):
            stored.publish(tmp_path / "copy", **wrong)
    write(stored, provenance={"revision": "2"})
    with pytest.raises(InvalidArgumentError, match=r"2 groups .* choose one of them with group="):
        stored.publish(tmp_path / "copy", scores=scores)
    assert not (tmp_path / "copy").exists()
    stored.publish(tmp_path / "copy", scores=scores, group=next(iter(stored.groups())))


def test_a_copy_is_whole_without_its_page_and_whatever_is_in_it(stored: Store, tmp_path: Path) -> None:
    stored.publish(tmp_path / "copy")
    page = tmp_path / "copy" / "index.html"
    for change in (lambda: None, lambda: page.write_bytes(b"another"), page.unlink):
        change()
        copy = lz.open_store(tmp_path / "copy")
        assert copy.verify().ok
        assert copy.verify(full=False).ok
        xr.testing.assert_identical(copy.dataset().load(), stored.dataset().load())
    stored.publish(tmp_path / "none", page=False)
    assert not (tmp_path / "none" / "index.html").exists()
    assert lz.open_store(tmp_path / "none").verify().ok


def test_only_a_page_of_an_earlier_copy_is_replaced_or_removed(stored: Store, tmp_path: Path) -> None:
    copy, page = tmp_path / "copy", tmp_path / "copy" / "index.html"
    stored.publish(copy)
    write(stored, "acme/new")
    stored.publish(copy, overwrite=True)
    assert "acme/new" in published(copy)
    stored.publish(copy, overwrite=True, page=False)
    assert not page.exists()
    # A page of the user's own, and a report, are none of ours.
    for mine in ("<title>mine</title>", lz.report(stored).html):
        page.write_text(mine)
        before = sorted(copy.rglob("*"))
        with pytest.raises(InvalidArgumentError, match=r"index\.html"):
            stored.publish(copy, overwrite=True)
        assert sorted(copy.rglob("*")) == before
        stored.publish(copy, overwrite=True, page=False)
        assert page.read_text() == mine
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("<title>mine</title>")
    with pytest.raises(NotAStoreError, match=r"index\.html"):
        stored.publish(tmp_path / "site")


def test_the_page_is_bounded_whatever_is_published(tmp_path: Path) -> None:
    store = lz.open_store(tmp_path / "s")
    rng = np.random.default_rng(0)
    for number in range(6):
        store.write(
            GroupInfo(model=f"acme/m{number}", provenance={}, num_layers=4, hidden_size=8),
            make_batch(
                [f"{'long ' * 2000}{i}" for i in range(30 + number)],
                seed=number,
                columns={f"c{i}": rng.integers(0, 9, 30 + number) for i in range(9)},
            ),
        )
    store.publish(tmp_path / "copy")
    page = published(tmp_path / "copy")
    assert len(page) < 400_000
    assert "4 of 6 groups are shown in full" in page
    assert "The first 12 of 35" in page
    assert "6 of 9 columns" in page
    assert all(f"acme/m{number}" in page for number in range(6)), "every group is listed"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory, scores: xr.Dataset) -> Path:
    folder = tmp_path_factory.mktemp("browsed")
    store = write(lz.open_store(folder / "s"))
    write(store, f"acme/{NAME}")
    # Nothing with layers: a page without a slider.
    lz.write_activations(store, model="acme/flat", prompts=["a"], pooled={"embed_mean": np.ones((1, 8), "float32")})
    store.publish(folder / "a copy", scores=scores)
    return folder / "a copy"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")
def test_in_a_browser_it_fits_says_where_it_lies_and_fetches_nothing(copy: Path, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    files = {"acts/index.html": (copy / "index.html").read_bytes()}
    with browser(CHROMIUM, tmp_path / "profile") as page, serving(files, "ranges") as server:
        for width in (400, 1400):
            for scheme in ("light", "dark"):
                page.resize(width)
                page.scheme(scheme)
                page.open(copy / "index.html")
                assert page.ask("document.documentElement.scrollWidth") <= width
                back = page.ask("getComputedStyle(document.body).backgroundColor")
                assert (back == "rgb(255, 255, 255)") == (scheme == "light")
        assert page.complaints() == []
        assert [url for url in page.requests() if not url.startswith("file:")] == []
        titles = page.ask("[...document.querySelectorAll('h2')].map(h => h.textContent)")
        assert set(titles) == {"Opening it", "acme/toy", f"acme/{NAME}", "acme/flat"}
        assert titles[1] == "acme/toy", "the group with scores comes first"
        assert f'lz.open_store("{copy}")' in page.ask("document.querySelector('pre').textContent")
        page.press("ArrowLeft")
        assert page.ask("document.querySelector('section.group .bar output').textContent").startswith("layer ")
        page.open(f"{server.url}/acts/index.html#there")
        assert f'lz.open_store("{server.url}/acts")' in page.ask("document.querySelector('pre').textContent")
