"""Every Python block of the README and the pages runs, in order, page by page, as a reader would type it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://)([^)#]+)(?:#[^)]*)?\)")


def blocks(page: Path, language: str) -> list[str]:
    return [code for kind, code in BLOCK.findall(page.read_text()) if kind == language]


@pytest.mark.model
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.stem)
def test_every_python_block_runs(page: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from tiny_models import save_tiny

    save_tiny(
        "gpt2", tmp_path / "gpt2", head="AutoModelForCausalLM", n_layer=6
    )  # a tiny random model stands for the one that a reader would download
    code = "\n".join(blocks(page, "python"))
    script = tmp_path / "page.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, "-W", "error", script], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{page.name}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_readme_names_the_two_commands_on_its_first_screen() -> None:
    first_screen = "\n".join((ROOT / "README.md").read_text().splitlines()[:24])
    assert "make demo" in first_screen
    assert "make test" in first_screen


def test_every_command_of_the_command_line_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    from lmprobe_zarr.cli import main

    with pytest.raises(SystemExit):
        main(["--help"])
    commands = re.findall(r"^    (\w+) ", capsys.readouterr().out, re.MULTILINE)
    assert set(commands) >= {"demo", "extract", "info", "show", "sweep"}
    text = "\n".join(page.read_text() for page in PAGES)
    for command in commands:
        assert f"lmprobe-zarr {command}" in text or f"make {command}" in text, command


def test_the_table_of_environment_variables_is_that_of_the_code() -> None:
    from lmprobe_zarr.config import SETTINGS

    page = (ROOT / "docs" / "caching.md").read_text()
    for setting in SETTINGS.values():
        call = f"`{setting.call}()`" if setting.call else "—"
        row = f"| `{setting.variable}` | {setting.means} | {setting.values} | {setting.default} | `{setting.example}` | {call} |"
        assert row in page, row


def test_every_test_that_the_page_of_promises_names_is_there() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "guarantees.md").read_text()))
    there = {name for path in (ROOT / "tests").glob("test_*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)}
    assert len(named) > 60
    assert named <= there, sorted(named - there)
