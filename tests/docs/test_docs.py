"""Every Python block of the README and the pages runs, in order, page by page, as a reader would type it."""

from __future__ import annotations

import functools
import http.server
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import pytest
import reference_pages
from browser import browser, find_browser
from paths import ROOT
from tiny_models import VOCABULARY, SharedModels, random_model, tiny_tokenizer
from warmed import Warmed

import lmprobe_zarr as lz
from lmprobe_zarr import config, errors
from lmprobe_zarr.cli import _parser

SITE = ROOT / "site"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://)([^)#]+)(?:#[^)]*)?\)")


def blocks(page: Path, language: str) -> list[str]:
    return [code for kind, code in BLOCK.findall(page.read_text()) if kind == language]


@pytest.fixture(scope="session")
def gpt2(tiny_models: SharedModels) -> Path:
    """A tiny random model, which stands for the one that a reader would download."""
    return tiny_models("gpt2", head="AutoModelForCausalLM", n_layer=6)


def save_t5(folder: Path) -> None:
    """A tiny random encoder-decoder, likewise."""
    sizes = {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 48, "decoder_start_token_id": 0}
    random_model("T5ForConditionalGeneration", "T5Config", vocab_size=VOCABULARY, **sizes).save_pretrained(folder)
    tiny_tokenizer(encoder=True).save_pretrained(folder)


# Worker processes that are started as by default, each importing everything; those of `tests/extraction/test_shares.py` are forked.
RUN = [pytest.param(p, marks=[pytest.mark.long] * (p.stem == "distributed"), id=p.stem) for p in PAGES if blocks(p, "python")]


@pytest.mark.model
@pytest.mark.parametrize("page", RUN)
def test_every_python_block_runs(page: Path, gpt2: Path, warmed: Warmed, tmp_path: Path) -> None:
    shutil.copytree(gpt2, tmp_path / "gpt2")
    code = "\n".join(blocks(page, "python"))
    if '"t5-small"' in code:
        save_t5(tmp_path / "t5-small")
    script = tmp_path / "page.py"
    script.write_text(code)
    done = warmed.run(script, cwd=tmp_path)
    assert done.returncode == 0, f"{page.name}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_page_is_in_the_navigation_and_linked_from_the_first_page() -> None:
    docs = ROOT / "docs"
    first = (docs / "index.md").read_text()
    navigation = [
        name
        for tree in re.findall(r"^```{toctree}\n(.*?)^```$", first, re.MULTILINE | re.DOTALL)
        for name in re.findall(r"<(\S+)>$", tree, re.MULTILINE)
    ]
    pages = {page.relative_to(docs).with_suffix("").as_posix() for page in docs.rglob("*.md")}
    pages |= {f"notebooks/{page.stem}" for page in (ROOT / "notebooks").glob("*.ipynb")}
    assert len(navigation) == len(set(navigation))
    assert {"index", *navigation} == pages
    linked = {re.sub(r"^\.\./(?=notebooks/)", "", link.rpartition(".")[0]) for link in LINK.findall(first)}
    assert set(navigation) <= linked, sorted(set(navigation) - linked)


def test_the_build_fails_on_what_leads_nowhere(tmp_path: Path) -> None:
    pytest.importorskip("sphinx")
    pytest.importorskip("myst_parser")
    pytest.importorskip("pydata_sphinx_theme")
    broken = {
        "[a](nowhere.md)": "nowhere.md",
        "[b](other.md#no-heading)": "no-heading",
        "[c](#no-anchor)": "no-anchor",
        "![d](no-picture.png)": "no-picture.png",
        "[e](no-notebook.ipynb)": "no-notebook.ipynb",
        "[f](#lmprobe_zarr.no_function)": "lmprobe_zarr.no_function",
        "```{eval-rst}\n.. autofunction:: lmprobe_zarr.not_there\n```": "not_there",
        "```{eval-rst}\n:func:`lmprobe_zarr.nor_this`\n```": "nor_this",
    }
    whole = "[g](other.md#a-heading), [h](#lmprobe_zarr.prompt_hash), [i](#first)\n\n"
    whole += "```{eval-rst}\n.. autofunction:: lmprobe_zarr.prompt_hash\n```\n"
    contents = "\n```{toctree}\n:caption: All\n\nOther <other>\n```\n"
    (tmp_path / "other.md").write_text("# Other\n\n## A heading\n")
    build: list[str | Path] = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-E",
        "-c",
        ROOT / "docs",
        tmp_path,
        tmp_path / "site",
    ]
    (tmp_path / "index.md").write_text("\n\n".join(["# First", whole, *broken, contents]))
    done = subprocess.run(build, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1, done.stderr
    assert [target for target in broken.values() if target not in done.stderr] == []
    assert [target for target in ("other.md#a-heading", "prompt_hash", "#first") if target in done.stderr] == []


@pytest.mark.parametrize("from_server", [False, True], ids=["from files", "from a server"])
def test_search_finds_functions_and_pages_without_a_network(from_server: bool, tmp_path: Path) -> None:
    executable = find_browser()
    if executable is None:
        pytest.skip("no Chromium on this machine")
    if not (SITE / "search.html").exists():
        pytest.skip("the documentation was not built: make docs")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=SITE)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, browser(executable, tmp_path) as page:
        Thread(target=server.serve_forever, daemon=True).start()
        place = f"http://127.0.0.1:{server.server_port}" if from_server else SITE.as_uri()
        for words, wanted in (("open_store", "reference.html#lmprobe_zarr.open_store"), ("calibration", "gallery.html")):
            page.open(f"{place}/search.html?q={words}")
            deadline = time.monotonic() + 30
            found: list[str] = []
            while wanted not in found and time.monotonic() < deadline:
                found = page.ask(
                    "[...document.querySelectorAll('#search-results li a')].map(a => a.getAttribute('href').replace(/[?].*#/, '#'))"
                )
                time.sleep(0.1)
            assert wanted in found, found
            assert all(url.startswith(place) for url in page.requests())
        server.shutdown()


def test_every_name_of_the_reference_is_on_the_page_that_was_built() -> None:
    """The generator leaves out what a class inherits, and members without a docstring, without a word."""
    built = SITE / "reference.html"
    source = ROOT / "docs" / "reference.md"
    if not built.exists() or built.stat().st_mtime < source.stat().st_mtime:
        pytest.skip("the documentation was not built since its reference was changed: make docs")
    shown = set(re.findall(r'id="([^"]+)"', built.read_text()))
    wanted = {f"lmprobe_zarr.accessor.{kind}.at" for kind in ("ArrayAccessor", "DatasetAccessor")}
    wanted |= {"lmprobe_zarr.Watch.__call__", "lmprobe_zarr.streaming.Batches.__len__"}
    for module, entries in re.findall(r"^\.\. currentmodule:: (\S+)\n(.*?)^```$", source.read_text(), re.MULTILINE | re.DOTALL):
        for name, members in re.findall(r"^\.\. auto\w+:: (\w+)\n(?:   :members:(.*))?", entries, re.MULTILINE):
            wanted |= {f"{module}.{name}", *(f"{module}.{name}.{member}" for member in re.findall(r"\w+", members))}
    wanted |= {
        f"lmprobe_zarr.{module.__name__.rpartition('.')[2]}.{name}"
        for module in (config, errors)
        for name in module.__all__
        if callable(getattr(module, name))
    }
    assert len(wanted) > 150
    assert wanted <= shown, sorted(wanted - shown)
    # Of the public names, only the modules have no entry of their own.
    assert {f"lmprobe_zarr.{name}" for name in lz.__all__} - wanted == {"lmprobe_zarr.config", "lmprobe_zarr.errors"}


def test_the_readme_links_to_every_page() -> None:
    pages = {f"docs/{page.relative_to(ROOT / 'docs').as_posix()}" for page in PAGES[1:]}
    missing = pages - set(LINK.findall((ROOT / "README.md").read_text())) - {"docs/index.md"}
    assert not missing, sorted(missing)


def test_the_readme_names_the_two_commands_on_its_first_screen() -> None:
    first_screen = "\n".join((ROOT / "README.md").read_text().splitlines()[:24])
    assert "make demo" in first_screen
    assert "make test" in first_screen


def test_every_command_is_explained_on_a_page_that_somebody_wrote() -> None:
    text = "\n".join(page.read_text() for page in PAGES if page != reference_pages.COMMAND_LINE)
    for name, _ in reference_pages.commands():
        assert f"lmprobe-zarr {name}" in text or f"make {name}" in text, name


@pytest.mark.few(35)
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_every_command_on_a_page_is_one_that_the_parser_takes(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for block in [code for _, code in BLOCK.findall(page.read_text())]:
        for line in block.splitlines():
            if line.startswith("lmprobe-zarr "):
                try:
                    _parser().parse_args(shlex.split(line, comments=True)[1:])
                except SystemExit:
                    pytest.fail(f"{page.name}: {line}\n{capsys.readouterr().err}")


def test_every_test_that_the_page_of_promises_names_is_there() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "guarantees.md").read_text()))
    there = {
        name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    assert len(named) > 60
    assert named <= there, sorted(named - there)
