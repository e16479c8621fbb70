"""How values are shown: text for terminals, and HTML for notebooks and pages. Everything that somebody else named is escaped.

Knows nothing of stores, and needs no script: the HTML takes its colours from what it stands in, so it is as dark or light as the
notebook, and opens and closes by ``<details>``.
"""

from __future__ import annotations

import html
import math
import shutil
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import xarray as xr

__all__ = [
    "Html",
    "card",
    "definitions",
    "escape",
    "format_bytes",
    "format_table",
    "name_in_messages",
    "section",
    "shorten",
    "sparkline",
    "table",
    "terminal_width",
    "visible",
]

# Formats (direction marks among them), surrogates, controls, and what breaks lines: none of them can be seen, and some act on a terminal.
_UNSEEN: Final = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def visible(text: object, *, lines: bool = False) -> str:
    """A text as a terminal may show it: what cannot be seen is escaped as in Python, so that no name moves a cursor or turns a line.

    Parameters
    ----------
    text : object
        Anything with a `str`.
    lines : bool
        Whether line breaks stay as they are.
    """
    return "".join(c if unicodedata.category(c) not in _UNSEEN or (lines and c == "\n") else repr(c)[1:-1] for c in str(text))


def terminal_width(default: int = 120) -> int:
    """Columns of the terminal; `default` where standard output is none."""
    return max(40, shutil.get_terminal_size((default, 24)).columns)


def columns_of(text: str) -> int:
    """How many columns a text takes on a terminal: East Asian wide characters take two, marks that combine none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def shorten(text: str, width: int) -> str:
    """At most so many columns of a text, with … where it was cut."""
    if columns_of(text) <= width:
        return text
    kept, taken = "", 1
    for c in text:
        taken += columns_of(c)
        if taken > width:
            break
        kept += c
    return f"{kept}…"


def format_table(rows: Sequence[Mapping[str, object]], *, width: int | None = None) -> str:
    """Rows as aligned columns under their names; numbers to the right.

    Parameters
    ----------
    rows : sequence of mapping
        All with the same keys.
    width : int, optional
        What a line may take. The widest columns are cut until it fits, none below eight columns; None: nothing is cut.
    """
    if not rows:
        return ""
    names = list(rows[0])
    cells = [[visible(name) for name in names], *([visible(row[name]) for name in names] for row in rows)]
    widths = [max(columns_of(line[i]) for line in cells) for i in range(len(names))]
    while width is not None and sum(widths) + 2 * (len(widths) - 1) > width and max(widths) > 8:
        widths[widths.index(max(widths))] -= 1
    right = [all(isinstance(row[name], (int, float)) and not isinstance(row[name], bool) for row in rows) for name in names]

    def pad(text: str, i: int) -> str:
        cut = shorten(text, widths[i])
        space = " " * (widths[i] - columns_of(cut))
        return space + cut if right[i] else cut + space

    return "\n".join("  ".join(pad(text, i) for i, text in enumerate(line)).rstrip() for line in cells)


# -------------------------------------------------------------------------------------------------------------------- HTML


@dataclass(frozen=True, slots=True)
class Html:
    """Markup that is safe as it is; everything else is escaped where it is put in."""

    markup: str

    def __str__(self) -> str:
        return self.markup


def escape(value: object) -> str:
    """The markup of a value: its own where it is `Html`, else its escaped text."""
    return value.markup if isinstance(value, Html) else html.escape(visible(value))


def table(head: Sequence[object], rows: Iterable[Sequence[object]], *, caption: str = "") -> Html:
    """A table with a head; numbers stand to the right."""

    def cell(value: object) -> str:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return f'<td class="lz-n">{escape(value)}</td>' if number else f"<td>{escape(value)}</td>"

    titled = f"<caption>{escape(caption)}</caption>" if caption else ""
    names = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(f"<tr>{''.join(cell(value) for value in row)}</tr>" for row in rows)
    return Html(f"<table>{titled}<thead><tr>{names}</tr></thead><tbody>{body}</tbody></table>")


def definitions(rows: Mapping[str, object]) -> Html:
    """Names and values as a table without a head."""
    body = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in rows.items())
    return Html(f"<table><tbody>{body}</tbody></table>")


def section(title: object, content: object, *, opened: bool = False, note: object = "") -> Html:
    """Something that opens and closes.

    Parameters
    ----------
    title, note : object
        What is always seen; the note in a lighter tone.
    content : object
        What is seen when it is open.
    opened : bool
        Whether it is open at first.
    """
    noted = f' <span class="lz-dim">{escape(note)}</span>' if escape(note) else ""
    return Html(f"<details{' open' if opened else ''}><summary>{escape(title)}{noted}</summary><div>{escape(content)}</div></details>")


def card(kind: str, note: object, *content: object) -> Html:
    """The whole of a representation in a notebook: what it is of, and what there is to say.

    Parameters
    ----------
    kind : str
        Name of the class.
    note : object
        What tells it from others of its class.
    *content : object
        Sections and tables.
    """
    head = f'<div class="lz-head">{escape(kind)} <span class="lz-dim">{escape(note)}</span></div>'
    return Html(f'<div class="lz-card"><style>{_STYLE}</style>{head}{"".join(escape(one) for one in content)}</div>')


def sparkline(values: Sequence[float], low: float, high: float, *, label: str) -> Html:
    """A small curve in the text's own colour, with a dot at its highest place.

    Parameters
    ----------
    values : sequence of float
        From left to right; gaps where they are not finite.
    low, high : float
        What the lower and the upper edge stand for.
    label : str
        What a screen reader says of it.
    """
    width, height, edge = 140, 26, 4
    step = (width - 2 * edge) / max(1, len(values) - 1)
    span = (high - low) or 1.0
    points = [
        (edge + i * step, height - edge - (value - low) / span * (height - 2 * edge)) if math.isfinite(value) else None
        for i, value in enumerate(values)
    ]
    path, pen = "", "M"
    for point in points:
        path += "" if point is None else f"{pen}{point[0]:.1f} {point[1]:.1f}"
        pen = "M" if point is None else "L"
    there = [point for point in points if point is not None]
    best = min(there, key=lambda point: point[1], default=None)
    dot = "" if best is None else f'<circle cx="{best[0]:.1f}" cy="{best[1]:.1f}" r="2.5" fill="currentColor"/>'
    return Html(
        f'<svg role="img" aria-label="{escape(label)}" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
        f'<path d="{path}" fill="none" stroke="currentColor" stroke-width="1.5"/>{dot}</svg>'
    )


# Colours and lines are the notebook's own text colour, more or less of it: right in dark and light, and in themes nobody thought of.
_STYLE: Final = (
    ".lz-card{font:13px/1.5 system-ui,sans-serif;color:inherit;max-width:900px;text-align:left}"
    ".lz-card .lz-head{font-weight:600;border-bottom:1px solid color-mix(in srgb,currentColor 25%,transparent);padding:2px 0 4px;"
    "margin-bottom:4px;overflow-wrap:anywhere}"
    ".lz-card .lz-dim{opacity:.7;font-weight:400}"
    ".lz-card details{margin:2px 0}"
    ".lz-card details>div{padding:2px 0 4px 18px;overflow-x:auto}"
    ".lz-card summary{cursor:pointer;overflow-wrap:anywhere}"
    ".lz-card summary:focus-visible{outline:2px solid currentColor;outline-offset:2px}"
    ".lz-card table{border-collapse:collapse;border:0;margin:2px 0;font:inherit;color:inherit}"
    ".lz-card th,.lz-card td,.lz-card tr{background:none;border:0;text-align:left;vertical-align:top;padding:1px 14px 1px 0;"
    "color:inherit;max-width:none;white-space:normal;overflow-wrap:anywhere}"
    ".lz-card th{font-weight:400;opacity:.7;white-space:nowrap}"
    ".lz-card caption{text-align:left;opacity:.7;caption-side:top;color:inherit}"
    ".lz-card td.lz-n{text-align:right;font-variant-numeric:tabular-nums}"
    ".lz-card svg{max-width:100%;height:auto}"
)


def format_bytes(nbytes: int) -> str:
    """A number of bytes as people read it, in powers of 1024."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def name_in_messages(activations: xr.DataArray) -> str:
    """The variable's name, for messages."""
    return repr(str(activations.name)) if activations.name is not None else "the activations"


SHOWN_LINES = 50


def shortened(rows: Iterable[object]) -> list[str]:
    lines = [f"          {row}" for row in rows]
    more = len(lines) - SHOWN_LINES
    return lines if more <= 0 else [*lines[:SHOWN_LINES], f"          … and {more} more"]
