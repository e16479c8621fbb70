"""Every Python block of the README and the pages runs, in order, page by page, as a reader would type it."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import reference_pages
from paths import ROOT
from tiny_models import VOCABULARY, SharedModels, random_model, tiny_tokenizer
from warmed import Warmed

from lmprobe_zarr.cli import _parser

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


@pytest.mark.model
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.stem)
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
    pages = {page.relative_to(docs).as_posix() for page in docs.rglob("*.md")}
    navigation = re.findall(r": (\S+\.(?:md|ipynb))$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(navigation) == len(set(navigation))
    assert pages <= set(navigation), sorted(pages - set(navigation))
    linked = set(LINK.findall((docs / "index.md").read_text()))
    # Pages of notebooks are made from them when the site is built.
    linked |= {re.sub(r"^\.\./(notebooks/.*)\.ipynb$", r"\1.md", link) for link in linked}
    assert set(navigation) - {"index.md"} <= linked, sorted(set(navigation) - linked)


def test_every_name_of_the_reference_is_on_the_page_that_was_built() -> None:
    """The generator takes a module where a function has its name, and leaves out what a class inherits, without a word."""
    built = ROOT / "site" / "reference" / "index.html"
    source = ROOT / "docs" / "reference.md"
    if not built.exists() or built.stat().st_mtime < source.stat().st_mtime:
        pytest.skip("the documentation was not built since its reference was changed: make docs")
    shown = set(re.findall(r'id="([^"]+)"', built.read_text()))
    wanted = {"lmprobe_zarr.accessor.ArrayAccessor.at", "lmprobe_zarr.accessor.DatasetAccessor.at"}
    for module, options in re.findall(r"^::: (\S+)\n((?:    .*\n)*)", source.read_text(), re.MULTILINE):
        members = re.findall(r"^        - (\w+)$", options, re.MULTILINE)
        wanted |= {f"{module}.{name}" for name in members} or {module}
    assert wanted <= shown, sorted(wanted - shown)


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
