"""The tags of a page."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any


class Tags(HTMLParser):
    """The tags of a page, checked to be closed in their order, and all that it would fetch or run."""

    VOID = ("meta", "link", "br", "circle", "path", "line", "rect", "image", "input", "use", "hr")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.opened: list[str] = []
        self.seen: list[str] = []
        self.active: list[str] = []
        self.feed(page)
        self.close()
        assert not self.opened, self.opened

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)
        self.active += [f"{tag} {name}={value}" for name, value in attrs if name.startswith("on") or name in ("src", "href")]
        if tag not in self.VOID:
            self.opened.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.opened.pop() == tag
