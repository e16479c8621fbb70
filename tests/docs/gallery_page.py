"""Writes the pictures of docs/gallery.md by running the page's own lines, on a light and on a dark ground.

``python tests/docs/gallery_page.py`` takes about half a minute.
"""

from __future__ import annotations

import io
import os
import re
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "gallery.md"
PICTURES = ROOT / "docs" / "assets" / "gallery"
DPI = 110
#: The grounds of the pages, and letters that fit them.
GROUNDS: dict[str, dict[str, Any]] = {
    "light": {},
    "dark": {
        **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "#1e2129"),
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), "#e6e8ea"),
    },
}
PIECE = re.compile(
    r"^```python\n(?P<code>.*?)^```$|^!\[[^]]*\]\(assets/gallery/(?P<name>[\w-]+)-light\.png#only-light\)$", re.MULTILINE | re.DOTALL
)


def pieces(page: str) -> list[tuple[str, str]]:
    """The page's blocks of Python and its pictures, in order: ("code", lines) and ("picture", name)."""
    return [("code", found["code"]) if found["code"] is not None else ("picture", found["name"]) for found in PIECE.finditer(page)]


def draw(page: str, ground: str) -> dict[str, bytes]:
    """The pictures of the page by their names: each shows the ``axes`` that the lines above it have made."""
    import matplotlib.style
    from PIL import Image

    drawn: dict[str, bytes] = {}
    namespace: dict[str, Any] = {}
    with matplotlib.style.context(GROUNDS[ground]):
        for kind, text in pieces(page):
            if kind == "code":
                exec(compile(text, "gallery.md", "exec"), namespace)  # noqa: S102 — lines of our own page
                continue
            whole, small = io.BytesIO(), io.BytesIO()
            namespace.pop("axes").figure.savefig(whole, format="png", dpi=DPI, metadata={"Software": None})
            # 256 colours make the file a third as large, and no colour differs by more than one can see.
            few = Image.open(whole).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE)
            few.save(small, format="png", optimize=True)
            drawn[text] = small.getvalue()
    return drawn


def write() -> None:
    """Write all pictures again."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    here = Path.cwd()
    for ground in GROUNDS:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            try:
                drawn = draw(PAGE.read_text(encoding="utf-8"), ground)
            finally:
                os.chdir(here)
        for name, data in drawn.items():
            (PICTURES / f"{name}-{ground}.png").write_bytes(data)


if __name__ == "__main__":
    write()
