"""Chats in pieces by role and turn, and the chat templates of models that are installed."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lmprobe_zarr.batch.chat_spans import ChatSpans

#: A folder of files `*.jinja`, for templates that are nowhere else.
FOLDER = "LMPROBE_ZARR_CHAT_TEMPLATES"
#: Where `make setup` puts those that no package installs; see `fetch_chat_templates`.
FETCHED = Path(sys.prefix) / "chat-templates"
#: Where packages that ship chat templates of models keep them.
PACKAGES = {"trl": "chat_templates", "axolotl": "utils/chat_templates/templates"}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def pieces_of(text: str, spans: ChatSpans) -> list[tuple[str, int, str]]:
    """A whole text in pieces, each with its role ("" for none) and its turn."""
    who: list[tuple[str, int]] = [("", -1)] * len(text)
    for span in spans.turns:
        who[span.start : span.end] = [("", span.turn)] * (span.end - span.start)
    for span in spans.contents:
        who[span.start : span.end] = [(str(span.role), span.turn)] * (span.end - span.start)
    pieces: list[tuple[str, int, str]] = []
    for (role, turn), character in zip(who, text, strict=True):
        if pieces and pieces[-1][:2] == (role, turn):
            character = pieces.pop()[2] + character
        pieces.append((role, turn, character))
    return pieces


def model_templates() -> dict[str, str]:
    """Templates by package and name: those of `PACKAGES`, which need not be imported, those of `FETCHED`, and those of `FOLDER`."""
    folders = {"llama.cpp: ": FETCHED, **({"": Path(os.environ[FOLDER])} if os.environ.get(FOLDER) else {})}
    for package, below in PACKAGES.items():
        found = find_spec(package)
        if found is not None and found.submodule_search_locations:
            folders[f"{package}: "] = Path(found.submodule_search_locations[0]) / below
    files = {prefix + file.stem: file for prefix, folder in folders.items() for file in sorted(folder.glob("*.jinja"))}
    return {name: file.read_text(encoding="utf-8") for name, file in files.items()}
