"""``docs/design/architecture.md``: the rooms with what they import, and a picture of them, both drawn from the code.

``make pages`` writes them again. The five walks on the page are written by hand; a test holds each step to the code.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "lmprobe_zarr"
PAGE = ROOT / "docs" / "design" / "architecture.md"
PICTURE = ROOT / "docs" / "assets" / "rooms.svg"
BEGIN, END = "<!-- rooms: written by `make pages` -->\n", "<!-- end of rooms -->\n"

# A room imports only from lines above its own. A folder is a room, and so is a file of the root.
ORDER = [
    "errors typing display interchange model_files safetensors_file version",
    "batch storage tasks",
    "tokens config plots pages",
    "probes log",
    "extraction.models sweeps",
    "store.format store.parts store.upkeep store",
    "bridges streaming backend latents",
    "extraction accessor",
    "cache probe demo",
    "probe_ensemble reports",
    "__init__",
    "cli __main__",
]
# Of rooms on one line: which ones import from which, from the bottom up.
INNER = [
    "errors version typing",
    "display interchange model_files safetensors_file store.format cli",
    "store.parts __main__",
    "store.upkeep",
    "store",
]
LINE = {room: number for number, rooms in enumerate(ORDER) for room in rooms.split()}
RANK = {room: number for number, rooms in enumerate(INNER) for room in rooms.split()}


class Face(NamedTuple):
    """What a room's ``__init__`` says: its docstring, and the names that others may use."""

    doc: str
    names: frozenset[str]


@functools.cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name below it; a face by the name of its folder."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def room_of(module: str) -> str:
    """The room that a module lies in: the innermost folder that the order names."""
    parts = module.split(".")
    return next(room for n in (2, 1) if (room := ".".join(parts[:n])) in LINE)


def is_below(room: str, other: str) -> bool:
    """Whether a room may import from another one."""
    return LINE[other] < LINE[room] or (LINE[other] == LINE[room] and RANK.get(other, 99) < RANK.get(room, -1))


def face_of(path: Path) -> Face:
    tree = ast.parse(path.read_text())
    lists = [node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"]
    return Face(ast.get_docstring(tree) or "", frozenset(ast.literal_eval(lists[0])) if lists else frozenset())


@functools.cache
def faces() -> dict[str, Face]:
    """The face of every room that is a folder."""
    return {module: face_of(path) for module, path in modules().items() if path.name == "__init__.py" and module != "__init__"}


@functools.cache
def imports_of(path: Path) -> set[tuple[str, str]]:
    """What a file imports of the package, also inside functions and for types alone: (module, name), without a name for a whole module."""
    known, names_of = modules(), faces()
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "lmprobe_zarr"]
            found |= {(name.partition(".")[2] or "__init__", "") for name in names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lmprobe_zarr":
            module = node.module.partition(".")[2]
            for alias in node.names:
                inner = f"{module}.{alias.name}".removeprefix(".")
                is_module = inner in known and alias.name not in (names_of[module].names if module in names_of else ())
                found.add((inner, "") if is_module else (module or "__init__", alias.name))
    return found


@functools.cache
def arrows() -> dict[str, list[str]]:
    """The rooms that each room imports from."""
    found: dict[str, set[str]] = {room: set() for room in LINE}
    for module, path in modules().items():
        room = room_of(module)
        found[room] |= {room_of(other) for other, _ in imports_of(path)} - {room}
    return {room: sorted(others, key=lambda other: (LINE[other], other)) for room, others in found.items()}


def drawn() -> list[tuple[str, str]]:
    """The arrows of the picture: not those to the first line, nor those that follow from others."""
    found = arrows()

    def reached(room: str) -> set[str]:
        return set(found[room]).union(*(reached(other) for other in found[room]))

    pairs = [(room, other) for room, others in found.items() for other in others if LINE[other]]
    return [(room, other) for room, other in pairs if not any(other in reached(between) for between in found[room] if between != other)]


def lines_of(room: str) -> int:
    return sum(len(path.read_text().splitlines()) for module, path in modules().items() if room_of(module) == room)


def first_sentence(room: str) -> str:
    doc = ast.get_docstring(ast.parse(modules()[room].read_text())) or ""
    text = " ".join(doc.split("\n\n")[0].split())
    return re.split(r"(?<=[.])\s", text)[0].replace("``", "`")


def table() -> str:
    """The rooms as a Markdown table, in the order of the lines."""
    rows = ["| line | room | lines of code | holds | imports from |", "| --- | --- | --- | --- | --- |"]
    found = arrows()
    for number, rooms in enumerate(ORDER, 1):
        for room in rooms.split():
            others = ", ".join(f"`{other}`" for other in found[room]) or "–"
            rows.append(f"| {number} | `{room}` | {lines_of(room):,} | {first_sentence(room)} | {others} |")
    return "\n".join(rows) + "\n"


def places() -> Iterator[tuple[str, float, float]]:
    """Where each room's box is in the picture: its middle and its top."""
    for number, rooms in enumerate(ORDER):
        names = rooms.split()
        for place, room in enumerate(names):
            yield room, 600 + (place - (len(names) - 1) / 2) * 190, 20 + 78 * number


def picture() -> str:
    """The rooms as SVG: the top line imports nothing, and every arrow goes up."""
    at = {room: (x, y) for room, x, y in places()}
    height = 20 + 78 * len(ORDER)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1200 {height}" font-family="sans-serif" font-size="14">',
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#5470a8"/></marker></defs>',
        f'<rect width="1200" height="{height}" fill="white"/>',
    ]
    for room, other in drawn():
        (x, y), (there, above) = at[room], at[other]
        # Rooms of one line: an arc above them.
        way = f"Q{(x + there) / 2:.0f} {y - 26:.0f} {there:.0f} {above:.0f}" if y == above else f"L{there:.0f} {above + 36:.0f}"
        out.append(f'<path d="M{x:.0f} {y:.0f} {way}" fill="none" stroke="#5470a8" opacity="0.7" marker-end="url(#head)"/>')
    for room, (x, y) in at.items():
        folder = room in faces()
        fill = "#fbf3dc" if folder else "#f1f1f1"
        out.append(f'<rect x="{x - 80:.0f}" y="{y:.0f}" width="160" height="36" rx="6" fill="{fill}" stroke="#555"/>')
        out.append(f'<text x="{x:.0f}" y="{y + 23:.0f}" text-anchor="middle">{escape(room)}</text>')
    return "\n".join([*out, "</svg>\n"])


def page(text: str) -> str:
    """The page with its table of rooms written again."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def walks(text: str) -> dict[str, list[str]]:
    """The steps of each walk of the page, as dotted names of functions below the package."""
    found: dict[str, list[str]] = {}
    title = ""
    for line in text.partition("## Walks")[2].splitlines():
        if line.startswith("### "):
            title = line[4:]
            found[title] = []
        elif match := re.match(r"\d+\. `([\w.]+)`", line):
            found[title].append(match.group(1))
        elif line.startswith("## "):
            break
    return found


def main() -> None:
    PICTURE.write_text(picture(), encoding="utf-8")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
