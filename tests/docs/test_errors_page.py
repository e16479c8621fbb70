"""``docs/errors.md`` holds every error class, with the message that it really prints."""

from __future__ import annotations

import re
from pathlib import Path

import errors_page
import pytest
from paths import ROOT

from lmprobe_zarr import errors


@pytest.mark.few(12)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.model) if n in errors_page.MODELS else n for n in errors_page.provoked()]
)
def test_the_page_has_the_message_as_it_prints(name: str, tmp_path: Path) -> None:
    if name in errors_page.MODELS:
        pytest.importorskip("torch")
    message = errors_page.message_of(name, tmp_path)
    assert len(message.splitlines()) <= 2, "at most two lines"
    assert errors_page.entry(name, message) in errors_page.PAGE.read_text(encoding="utf-8"), (
        "write it again: python tests/docs/errors_page.py"
    )


def test_the_page_has_every_class_once_and_nothing_else() -> None:
    text = errors_page.PAGE.read_text(encoding="utf-8")
    headings = [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]
    assert headings == sorted(set(errors.__all__) - {"LmprobeZarrError"})
    assert text.startswith(errors_page.HEAD)


def test_every_class_has_a_way_out_on_the_page_of_troubleshooting() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[`(\w+)`\]\(errors\.md#(\w+)\) \| [^|]+ \| [^|]+ \|$", text, re.MULTILINE)
    assert rows == [(name, name.lower()) for name in re.findall(r"^## (\w+)$", errors_page.PAGE.read_text(encoding="utf-8"), re.MULTILINE)]
