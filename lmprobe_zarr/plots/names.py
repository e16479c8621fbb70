"""Names and texts of others as a picture can show them: short but distinct, free of markup, in fonts that have their scripts."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, Final

from lmprobe_zarr.display import visible

__all__ = ["MISSING", "Lettering", "shorten_names"]

#: Drawn in place of a character that no installed font has.
MISSING: Final = "\N{WHITE VERTICAL RECTANGLE}"
#: How scripts are called whose Unicode names are no everyday words.
_SCRIPTS: Final = {"CJK": "Chinese (Han)", "HANGUL": "Korean (Hangul)", "IDEOGRAPHIC": "Chinese (Han)"}
_TEX: Final = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "▯": r"$\square$", **{c: f"\\{c}" for c in "&%$#_{}"},
}  # fmt: skip


def shorten_names(names: Sequence[str], most: int, *, keep_start: bool = False) -> list[str]:
    """Names of at most `most` characters, of which different ones stay different.

    Parameters
    ----------
    names : sequence of str
    most : int
        At least 8. A name that cannot be told apart otherwise gets a number in addition.
    keep_start : bool
        Whether a long name is cut at its end where that leaves it distinct, rather than in its middle.

    Returns
    -------
    list of str
        With … where something was left out.
    """
    short = [_cut_end(name, most) if keep_start else _cut_middle(name, most) for name in names]
    if keep_start:
        alike = _collisions(names, short)
        short = [_cut_middle(name, most) if kept in alike else kept for name, kept in zip(names, short, strict=True)]
    for kept in _collisions(names, short):
        rows = [row for row, found in enumerate(short) if found == kept]
        varying = _varying_parts([names[row] for row in rows], most)
        for row, found in zip(rows, varying, strict=True):
            short[row] = found
    # Whatever is still alike, such as two long names that differ in many places, is numbered.
    alike, numbers = _collisions(names, short), dict[str, int]()
    for row, found in enumerate(short):
        if found in alike:
            number = numbers.setdefault(names[row], len(numbers) + 1)
            short[row] = f"{_cut_middle(found, most - len(str(number)) - 3)} ({number})"
    return short


def _collisions(names: Sequence[str], short: Sequence[str]) -> set[str]:
    """The short forms that stand for more than one name."""
    owners: dict[str, str] = {}
    return {kept for name, kept in zip(names, short, strict=True) if owners.setdefault(kept, name) != name}


def _cut_end(name: str, most: int) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _cut_middle(name: str, most: int) -> str:
    if len(name) <= most:
        return name
    tail = most // 2
    return f"{name[: most - 1 - tail]}…{name[len(name) - tail :]}"


def _varying_parts(names: Sequence[str], most: int) -> list[str]:
    """Each name as its beginning, the part in which it differs from the others, and its end."""
    before = _same_start(names)
    after = min(_same_start([name[::-1] for name in names]), min(map(len, names)) - before)
    out = []
    for name in names:
        part = _cut_middle(name[before : len(name) - after], most - 4)
        room = most - len(part) - 2
        out.append(f"{name[: room - room // 2]}…{part}…{name[len(name) - room // 2 :]}" if room > 1 else f"…{part}…")
    return out


def _same_start(names: Sequence[str]) -> int:
    """How many characters all names begin with."""
    return next((place for place, letters in enumerate(zip(*names, strict=False)) if len(set(letters)) > 1), min(map(len, names)))


class Lettering:
    """Makes names fit to be drawn, and finds fonts for them.

    `fit` is called for every text before it is drawn, `dress` once for all artists of the picture.
    """

    def __init__(self) -> None:
        from matplotlib.font_manager import FontProperties

        self._family: list[str] = list(FontProperties().get_family())
        self._more: list[str] = []
        self._absent: dict[str, None] = {}

    def fit(self, text: object) -> str:
        """The text without markup and without control characters, and with a sign for each character that no font has."""
        plain = visible(text)
        lacking = set(plain) - self._known(plain)
        if lacking:
            found = {c: _font_with(c) for c in sorted(lacking)}
            for c, name in found.items():
                if name is None:
                    self._absent[_script_of(c)] = None
                elif name not in self._more:
                    self._more.append(name)
            plain = "".join(MISSING if c in found and found[c] is None else c for c in plain)
        return _without_markup(plain)

    def fit_all(self, names: Iterable[object], most: int, *, keep_start: bool = False) -> list[str]:
        """Names that are short, distinct and fit to be drawn."""
        return [self.fit(name) for name in shorten_names([visible(name) for name in names], most, keep_start=keep_start)]

    def _known(self, text: str) -> set[str]:
        if text.isascii():
            return set(text)
        charmaps = [_charmap(path) for path in _paths_of(tuple(self._family + self._more))]
        return {c for c in set(text) if any(ord(c) in charmap for charmap in charmaps)}

    @property
    def note(self) -> str:
        """Which scripts are missing; empty if none is."""
        if not self._absent:
            return ""
        return f"{_without_markup(MISSING)}: no installed font has {', '.join(self._absent)}; install one that does, such as Noto Sans"

    def dress(self, artists: Iterable[Any]) -> None:
        """Give the further fonts to all texts of some artists; without further fonts nothing changes."""
        if not self._more:
            return
        from matplotlib.text import Text

        for artist in artists:
            for text in artist.findobj(Text):
                text.set_fontfamily([*self._family, *self._more])


def _without_markup(text: str) -> str:
    """The text with what matplotlib, or TeX where it is used, would take for mathematics or commands."""
    import matplotlib

    if matplotlib.rcParams["text.usetex"]:
        return "".join(_TEX.get(c, c) for c in text)
    return text.replace("$", r"\$")


def _script_of(character: str) -> str:
    """The script of a character in English, or its number if it is a symbol."""
    if unicodedata.category(character)[0] in "LMN":
        word = unicodedata.name(character, "").partition(" ")[0].partition("-")[0]
        if word:
            return _SCRIPTS.get(word, word.title())
    return "symbols" if ord(character) < 0x1F000 else "emoji"


@functools.lru_cache(maxsize=64)
def _paths_of(families: tuple[str, ...]) -> tuple[str, ...]:
    """The files of the fonts with which text of these families is drawn."""
    from matplotlib.font_manager import FontProperties, findfont

    return tuple(dict.fromkeys(str(findfont(FontProperties(family=[family]))) for family in families))


@functools.lru_cache(maxsize=512)
def _charmap(path: str) -> frozenset[int]:
    """The characters of a font; none if it cannot be read, as some bitmap fonts."""
    from matplotlib.font_manager import get_font

    try:
        return frozenset(get_font(path).get_charmap())
    except (OSError, RuntimeError, TypeError, ValueError):
        return frozenset()


def _plainness(font: Any) -> tuple[bool, ...]:
    """Sorts upright sans-serif fonts of normal weight first."""
    name = font.name.lower()
    return "noto sans" not in name, "sans" not in name, font.style != "normal", str(font.weight) not in {"400", "normal", "regular"}


def _font_with(character: str) -> str | None:
    """The family of an installed font that has a character, or None. Plain sans-serif fonts are preferred."""
    from matplotlib.font_manager import fontManager

    # Boxes of a last resort are no letters, and coloured bitmaps cannot be drawn.
    usable = [font for font in fontManager.ttflist if not re.search("last ?resort|colou?r", font.name, re.IGNORECASE)]
    usable.sort(key=_plainness)
    seen: set[str] = set()
    for entry in usable:
        if entry.name not in seen:
            seen.add(entry.name)
            # By the family's own file: that is what a text of this family is drawn with.
            if ord(character) in _charmap(entry.fname) and any(ord(character) in _charmap(path) for path in _paths_of((entry.name,))):
                return str(entry.name)
    return None
