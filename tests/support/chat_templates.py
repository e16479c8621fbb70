"""Chats in pieces by role and turn, and the chat templates of models that are installed."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lmprobe_zarr.batch.roles import ChatSpans

#: A folder of files `*.jinja`, for templates that no installed package has.
FOLDER = "LMPROBE_ZARR_CHAT_TEMPLATES"


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
    """Templates by name: those that TRL ships, whose files need no import of it, and those of a folder that the environment names."""
    found = find_spec("trl")
    folders = [] if found is None else [Path(place) / "chat_templates" for place in found.submodule_search_locations or ()]
    folders += [Path(os.environ[FOLDER])] if os.environ.get(FOLDER) else []
    return {file.stem: file.read_text(encoding="utf-8") for folder in folders for file in sorted(folder.glob("*.jinja"))}
