"""Shows values as text for terminals, and as HTML for notebooks and pages, and progress. Names and texts from elsewhere are escaped.

Knows no store. The HTML needs no script: it takes its colours from the page around it, dark or light, and ``<details>`` opens and closes
sections.
"""

from __future__ import annotations

import difflib
import html
import math
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import xarray as xr

__all__ = [
    "Html",
    "card",
    "count_of",
    "definitions",
    "describe_error",
    "escape",
    "format_bytes",
    "format_table",
    "name_in_messages",
    "nearest",
    "progress_bar",
    "section",
    "shorten",
    "sparkline",
    "table",
    "terminal_width",
    "visible",
]

# Unicode categories of format characters (such as direction marks), surrogates, controls and line breaks. They are invisible, and some
# control a terminal.
_UNSEEN: Final = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def describe_error(error: BaseException) -> str:
    """The kind of an error that code from elsewhere raised, and the beginning of its message, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def visible(text: object, *, lines: bool = False) -> str:
    """A text that is safe to print on a terminal: invisible characters are escaped as in Python, so that no name can move the cursor.

    Parameters
    ----------
    text : object
        Converted with `str`.
    lines : bool
        Whether line breaks are kept.
    """
    return "".join(c if unicodedata.category(c) not in _UNSEEN or (lines and c == "\n") else repr(c)[1:-1] for c in str(text))


def terminal_width(default: int = 120) -> int:
    """Columns of the terminal, at least 40; `default` if standard output is not a terminal."""
    return max(40, shutil.get_terminal_size((default, 24)).columns)


def nearest(given: object, known: Iterable[object]) -> str:
    """A question in brackets that names what is nearest to a mistyped name, for an error; empty where nothing is near."""
    near = difflib.get_close_matches(str(given), [str(name) for name in known], n=1)
    return f" (did you mean {near[0]!r}?)" if near and near[0] != given else ""


def columns_of(text: str) -> int:
    """How many columns a text takes on a terminal: East Asian wide characters take two, combining marks none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def count_of(number: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun, in the plural where it is not 1. Without `plural`, an "s" is added."""
    return f"{number} {noun}" if number == 1 else f"{number} {plural or f'{noun}s'}"


def shorten(text: str, width: int) -> str:
    """A text cut to at most `width` columns, ending in … if it was cut."""
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
    """Rows as aligned columns under their names; numbers are aligned to the right.

    Parameters
    ----------
    rows : sequence of mapping
        All with the same keys.
    width : int, optional
        Columns of the terminal per line. The widest columns are cut until a line fits, but not below eight. None cuts nothing.
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
    """Markup that is inserted as it is; all other values are escaped when they are inserted."""

    markup: str

    def __str__(self) -> str:
        return self.markup


def escape(value: object) -> str:
    """The markup of a value: that of an `Html`, else the escaped text."""
    return value.markup if isinstance(value, Html) else html.escape(visible(value))


def table(head: Sequence[object], rows: Iterable[Sequence[object]], *, caption: str = "") -> Html:
    """A table with a head; numbers are aligned to the right."""

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
    """A section that can be opened and closed.

    Parameters
    ----------
    title, note : object
        Always shown; the note in a lighter tone.
    content : object
        Shown when the section is open.
    opened : bool
        Whether it is open at first.
    """
    noted = f' <span class="lz-dim">{escape(note)}</span>' if escape(note) else ""
    return Html(f"<details{' open' if opened else ''}><summary>{escape(title)}{noted}</summary><div>{escape(content)}</div></details>")


def card(kind: str, note: object, *content: object) -> Html:
    """The whole HTML representation of an object in a notebook.

    Parameters
    ----------
    kind : str
        Name of the class.
    note : object
        What distinguishes the object from others of its class.
    *content : object
        Sections and tables.
    """
    head = f'<div class="lz-head">{escape(kind)} <span class="lz-dim">{escape(note)}</span></div>'
    return Html(f'<div class="lz-card"><style>{_STYLE}</style>{head}{"".join(escape(item) for item in content)}</div>')


def sparkline(values: Sequence[float], low: float, high: float, *, label: str) -> Html:
    """A small curve in the colour of the text, with a dot at its highest point.

    Parameters
    ----------
    values : sequence of float
        From left to right; values that are not finite are gaps.
    low, high : float
        The values at the lower and the upper edge.
    label : str
        Description for screen readers.
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
    finite = [point for point in points if point is not None]
    best = min(finite, key=lambda point: point[1], default=None)
    dot = "" if best is None else f'<circle cx="{best[0]:.1f}" cy="{best[1]:.1f}" r="2.5" fill="currentColor"/>'
    return Html(
        f'<svg role="img" aria-label="{escape(label)}" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
        f'<path d="{path}" fill="none" stroke="currentColor" stroke-width="1.5"/>{dot}</svg>'
    )


# All colours are derived from the notebook's text colour, so they suit light, dark and any other theme.
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
    """A number of bytes for people to read, in powers of 1024."""
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
    """Rows as indented lines, at most `SHOWN_LINES` of them and a note of how many more there are."""
    lines = [f"          {row}" for row in rows]
    more = len(lines) - SHOWN_LINES
    return lines if more <= 0 else [*lines[:SHOWN_LINES], f"          … and {more} more"]


@contextmanager
def progress_bar(total: int, *, description: str, unit: str, enabled: bool) -> Iterator[Callable[[int], None]]:
    """Show a bar on standard error, on terminals and in notebooks and never in a file or a pipe.

    Gives a function that advances it by a number of units.
    """
    if not enabled:
        yield lambda _: None
        return
    from tqdm.auto import tqdm

    # With None, tqdm shows the bar on terminals only. A notebook is not a terminal, but can show the bar.
    disable = False if _in_notebook() else None
    with tqdm(total=total, desc=description, unit=unit, unit_scale=total >= 10_000, disable=disable) as bar:

        def advance(count: int) -> None:
            bar.update(count)

        yield advance


def _in_notebook() -> bool:
    """Whether this code runs in a notebook's kernel. That IPython is imported is not enough to know."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return hasattr(shell, "kernel")
