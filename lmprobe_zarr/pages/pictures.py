"""Draws SVG: curves by layer, and grids of coloured cells. The colours of curves are in the page's style sheet. Computes no score."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from lmprobe_zarr.display import Html, escape
from lmprobe_zarr.typing import Array

__all__ = ["Chart", "Series", "draw_chart", "draw_grid", "layer_places"]

WIDTH: Final = 720
HEIGHT: Final = 250
LEFT: Final = 64
RIGHT: Final = 14
TOP: Final = 10
BOTTOM: Final = 40
# The width of a letter or digit, and how many of them fit beside the vertical axis.
LETTER: Final = 7.5
UNIT_LETTERS: Final = 28
# Blue and vermilion of M. Okabe and K. Ito, "Color Universal Design" (2008).
BLUE: Final = (0, 114, 178)
VERMILION: Final = (213, 94, 0)
# Opacity of the strongest colour: text stays readable on it in both themes.
STRONGEST: Final = 0.72


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One curve.

    Parameters
    ----------
    name : str
    values : ndarray of float, shape (layer,)
        NaN makes a gap.
    low, high : ndarray of float, optional
        Edges of a band.
    kind : {"probe", "control"}
        Controls are dashed and grey.
    """

    name: str
    values: Array
    low: Array | None = None
    high: Array | None = None
    kind: str = "probe"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """Curves over the layers.

    Parameters
    ----------
    title, unit : str
        What is shown, and the label of the vertical axis.
    layers : tuple of int
    series : tuple of Series
    log : bool
        Whether the vertical axis is logarithmic.
    lines : tuple of (str, float)
        Horizontal lines with their labels, such as chance.
    note : str
        A remark for the reader.
    """

    title: str
    unit: str
    layers: tuple[int, ...]
    series: tuple[Series, ...]
    log: bool = False
    lines: tuple[tuple[str, float], ...] = ()
    note: str = ""


def layer_places(layers: Sequence[int]) -> list[float]:
    """The horizontal place of each layer, in the units of the picture."""
    low, high = layers[0], layers[-1]
    span = WIDTH - LEFT - RIGHT - 20
    if low == high:
        return [LEFT + 10 + span / 2]
    return [round(LEFT + 10 + span * (layer - low) / (high - low), 1) for layer in layers]


def draw_chart(chart: Chart) -> Html:
    """The picture of a chart. A line of class ``cursor`` marks the selected layer; the script moves it."""
    values = [array for series in chart.series for array in (series.values, series.low, series.high) if array is not None]
    every = np.concatenate([*values, np.array([height for _, height in chart.lines])])
    every = every[np.isfinite(every) & ((every > 0) | (not chart.log))]
    if not len(every):
        return Html('<p class="none">No values.</p>')
    ticks = _log_ticks(every.min(), every.max()) if chart.log else _ticks(every.min(), every.max())
    low, high = min(ticks[0], every.min()), max(ticks[-1], every.max())
    places = layer_places(chart.layers)

    def height(value: float) -> float:
        share = math.log(value / low) / math.log(high / low) if chart.log else (value - low) / (high - low)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP), 1)

    def points(array: Array) -> list[tuple[float, float] | None]:
        ok = [math.isfinite(v) and (v > 0 or not chart.log) for v in array.tolist()]
        return [(x, height(float(v))) if is_drawn else None for x, v, is_drawn in zip(places, array, ok, strict=True)]

    marks = []
    for tick in ticks:
        y = height(tick)
        marks.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        marks.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{_number(tick)}</text>')
    step = max(1, -(-len(places) // 16))
    taken = -math.inf
    for x, layer in list(zip(places, chart.layers, strict=True))[::step]:
        half = LETTER * len(str(layer)) / 2
        # Layers need not be evenly spaced: a number that would run into the one before is left out.
        if x - half < taken:
            continue
        taken = x + half + LETTER
        marks.append(f'<text class="tick" x="{x}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{layer}</text>')
    marks.append(f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">layer</text>')
    middle = (HEIGHT - BOTTOM + TOP) / 2
    unit = escape(_cut_middle(chart.unit, UNIT_LETTERS))
    marks.append(f'<text class="axis" x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">{unit}</text>')
    for _, level in chart.lines:
        y = height(level)
        marks.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
    curves = [_curve(series, number, points) for number, series in enumerate(chart.series)]
    names = [
        f'<text class="tick named" x="{WIDTH - RIGHT}" y="{height(level) - 5}" text-anchor="end">{escape(name)}</text>'
        for name, level in chart.lines
    ]
    label = f"{chart.title}: {_in_words(chart)}"
    cursor = f'<line class="cursor" x1="{places[0]}" x2="{places[0]}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
    return Html(
        f'<svg class="chart" role="img" aria-label="{escape(label)}" viewBox="0 0 {WIDTH} {HEIGHT}">'
        f"{''.join(marks)}{cursor}{''.join(curves)}{''.join(names)}</svg>"
    )


def style_of(number: int, kind: str) -> str:
    """The CSS classes of a curve; after the last colour the first is used again."""
    return f"s{number % 6} {escape(kind)}"


def _curve(series: Series, number: int, points: Any) -> str:
    out = []
    if series.low is not None and series.high is not None:
        for pairs in _runs(list(zip(points(series.low), points(series.high), strict=True))):
            if len(pairs) > 1:
                outline = [b for _, b in pairs] + [a for a, _ in reversed(pairs)]
                out.append(f'<polygon class="band" points="{" ".join(f"{x},{y}" for x, y in outline)}"/>')
            else:
                (x, y), (_, top) = pairs[0]
                out.append(f'<line class="line" x1="{x}" x2="{x}" y1="{y}" y2="{top}"/>')
    path, pen = "", "M"
    drawn = []
    for point in points(series.values):
        if point is None:
            pen = "M"
            continue
        path += f"{pen}{point[0]} {point[1]}"
        pen = "L"
        drawn.append(point)
    out.append(f'<path class="line" d="{path}"/>')
    step = max(1, len(drawn) // 20)
    out += [mark(x, y, number) for x, y in drawn[::step]]
    return f'<g class="{style_of(number, series.kind)}">{"".join(out)}</g>'


def _runs(pairs: list[tuple[Any, Any]]) -> list[list[tuple[Any, Any]]]:
    """Neighbouring layers that have both edges of a band: no band is drawn over a layer without."""
    runs: list[list[tuple[Any, Any]]] = [[]]
    for low, high in pairs:
        if low is None or high is None:
            runs.append([])
        else:
            runs[-1].append((low, high))
    return [run for run in runs if run]


def mark(x: float, y: float, number: int) -> str:
    """One of six shapes, so that curves can be distinguished without colour."""
    if number % 6 == 0:
        return f'<circle class="mark" cx="{x}" cy="{y}" r="3.5"/>'
    shapes = {
        1: "M-3.2 -3.2h6.4v6.4h-6.4z",
        2: "M0 -4.2L4 3H-4z",
        3: "M0 -4.6L4.6 0L0 4.6L-4.6 0z",
        4: "M0 4.2L4 -3H-4z",
        5: "M-4 -1.3h2.7v-2.7h2.6v2.7h2.7v2.6h-2.7v2.7h-2.6v-2.7h-2.7z",
    }
    return f'<path class="mark" transform="translate({x} {y})" d="{shapes[number % 6]}"/>'


def _in_words(chart: Chart) -> str:
    phrases = []
    for series in chart.series:
        values = np.asarray(series.values, float)
        if np.isfinite(values).any():
            best = int(np.nanargmax(values))
            phrases.append(f"{series.name} from {np.nanmin(values):.3g} to {values[best]:.3g}, highest at layer {chart.layers[best]}")
    return "; ".join(phrases)


def _ticks(low: float, high: float) -> list[float]:
    span = (high - low) or abs(high) or 1.0
    raw = span / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = [m * 10.0**p for p in powers for m in ((1,) if len(powers) > 3 else (1, 2, 5))]
    below = max((t for t in every if t <= low * 1.0001), default=every[0])
    above = min((t for t in every if t >= high * 0.9999), default=every[-1])
    kept = [t for t in every if below <= t <= above]
    return kept if len(kept) > 1 else [below, below * 10]


def _number(value: float) -> str:
    text = f"{value:,.0f}" if abs(value) >= 1000 and value == round(value) else f"{value:.4g}"
    # There is room for seven characters between the axis and its label.
    return text if len(text) <= 7 else f"{value:.3g}"


def _cut_middle(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1 - most // 2]}…{text[len(text) - most // 2 :]}"


# ------------------------------------------------------------------------------------------------------------------- grids


def draw_grid(colours: Array, *, label: str, describe_rows: Sequence[tuple[int, str]], cell: tuple[float, float]) -> Html:
    """A grid of coloured cells, one pixel each, stretched without being smoothed.

    Parameters
    ----------
    colours : ndarray of uint8, shape (row, column, 4)
        Red, green, blue and opacity; the first row is the lowest.
    label : str
        Description for screen readers.
    describe_rows : sequence of (int, str)
        Rows that have a label at the side.
    cell : (float, float)
        Width and height of a cell.
    """
    rows, columns = colours.shape[:2]
    left = max(34, math.ceil(LETTER * max((len(name) for _, name in describe_rows), default=0)) + 8)
    width, height = columns * cell[0], rows * cell[1]
    data = base64.b64encode(_png(colours[::-1])).decode()
    names = "".join(
        f'<text class="tick" x="{left - 5}" y="{height - (row + 0.5) * cell[1] + 4:.1f}" text-anchor="end">{escape(name)}</text>'
        for row, name in describe_rows
    )
    return Html(
        f'<svg class="cells" role="img" aria-label="{escape(label)}" viewBox="0 -6 {left + width + 1:.0f} {height + 12:.0f}" '
        f'data-left="{left}" data-cell="{cell[0]} {cell[1]}" style="max-width:{left + width + 1:.0f}px">'
        f'<rect class="frame" x="{left - 0.5}" y="-0.5" width="{width + 1:.1f}" height="{height + 1:.1f}"/>'
        f'<image x="{left}" y="0" width="{width:.1f}" height="{height:.1f}" preserveAspectRatio="none" '
        f'href="data:image/png;base64,{data}"/>'
        f'<rect class="chosen" x="{left}" y="0" width="{width:.1f}" height="{cell[1]}"/>{names}</svg>'
    )


def one_hue(shares: Array) -> Array:
    """Colours for shares from 0 to 1: a blue of that opacity; NaN is transparent. Shape (…,) to (…, 4)."""
    out = np.zeros((*shares.shape, 4), np.uint8)
    out[..., :3] = BLUE
    out[..., 3] = np.round(np.nan_to_num(np.clip(shares, 0, 1)) * 255 * STRONGEST)
    return out


def two_hues(shares: Array) -> Array:
    """Diverging colours for shares from 0 to 1: vermilion below one half, blue above, transparent in between."""
    out = np.zeros((*shares.shape, 4), np.uint8)
    filled = np.nan_to_num(shares, nan=0.5)
    out[..., :3] = np.where((filled >= 0.5)[..., None], np.array(BLUE, np.uint8), np.array(VERMILION, np.uint8))
    out[..., 3] = np.round(np.abs(np.clip(filled, 0, 1) - 0.5) * 2 * 255 * STRONGEST)
    return out


def _png(pixels: Array) -> bytes:
    """A PNG of 8 bits in four channels. Source: W3C, Portable Network Graphics (third edition)."""
    height, width = pixels.shape[:2]

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    lines = np.zeros((height, 1 + width * 4), np.uint8)
    lines[:, 1:] = pixels.reshape(height, width * 4)
    head = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines.tobytes(), 9)) + chunk(b"IEND", b"")
