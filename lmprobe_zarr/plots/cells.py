"""Grids of coloured cells: colours, ticks, and numbers where they fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from lmprobe_zarr.plots.layout import Canvas
from lmprobe_zarr.plots.style import contrast
from lmprobe_zarr.typing import Array

__all__ = ["SMALLEST", "draw_mesh", "format_cells", "set_ticks", "write_numbers"]

#: Its lightness rises monotonically, so it also works in grey; blue and yellow are distinguishable with almost any colour vision.
_COLOUR_MAP: Final = "cividis"
#: Points of the smallest letters.
SMALLEST: Final = 5.0
#: A digit is so wide, as a share of the size of letters; and numbers take so much of a cell's width and height.
_DIGIT: Final = 0.64
_FILLED: Final = 0.92


def draw_mesh(canvas: Canvas, values: Array, low: float, high: float, *, dark_is_high: bool = False) -> Any:
    """Coloured cells, centred on whole numbers; NaN is hatched.

    Parameters
    ----------
    canvas : Canvas
    values : ndarray of float, shape (row, column)
    low, high : float
        Ends of the colour scale.
    dark_is_high : bool
        Whether the scale is reversed, so that the least value is the lightest.
    """
    axes = canvas.axes
    edges = [np.arange(n + 1) - 0.5 for n in values.shape]
    colours = f"{_COLOUR_MAP}_r" if dark_is_high else _COLOUR_MAP
    mesh = axes.pcolormesh(edges[1], edges[0], np.ma.masked_invalid(values), cmap=colours, vmin=low, vmax=high, rasterized=True)
    if np.isnan(values).any():
        axes.patch.set(hatch="////", edgecolor=canvas.tones.mix(0.4), facecolor=canvas.tones.ground)
    return mesh


def set_ticks(axis: Any, names: list[str], most: int, **options: Any) -> None:
    """Ticks at whole numbers with their names, at most so many, in round steps."""
    least = -(-len(names) // max(1, most))
    # Round steps: 1, 2 or 5 times a power of ten.
    every = next(step * 10**power for power in range(9) for step in (1, 2, 5) if step * 10**power >= least)
    places = np.arange(0, len(names), every)
    axis.set_ticks(places, [names[place] for place in places], **options)


def format_cells(values: Array) -> list[list[str]]:
    """Numbers of one precision, in two digits after the point or about three in all; "" for NaN."""
    finite = np.abs(values[np.isfinite(values)])
    largest = float(finite.max()) if finite.size else 1.0
    digits = 2 if 0.05 <= largest < 10 or largest == 0 else int(np.clip(2 - np.floor(np.log10(largest)), 0, 4))
    # Adding 0 makes −0 a 0.
    numbers = [[f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−") for value in row] for row in values.tolist()]
    return [["" if np.isnan(value) else number for value, number in zip(*row, strict=True)] for row in zip(values, numbers, strict=True)]


def write_numbers(canvas: Canvas, mesh: Any, values: Array, numbers: Sequence[Sequence[str]], largest: float) -> bool:
    """Write a number into each cell, in letters that fit, and say whether they did; the axes have their final size."""
    axes = canvas.axes
    box = axes.get_window_extent()
    wide, high = (72 * side / axes.figure.dpi / n for side, n in zip((box.width, box.height), values.shape[::-1], strict=True))
    longest = max((len(number) for row in numbers for number in row), default=0)
    size = min(largest, _FILLED * wide / (_DIGIT * max(1, longest)), _FILLED * high / 1.2)
    if size < SMALLEST or not longest:
        return False
    colours = mesh.cmap(mesh.norm(values))
    black, white = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            # Whatever can be read better on the cell, whose colour does not depend on the ground.
            cell = colours[row, column]
            ink = black if contrast(black, cell) >= contrast(white, cell) else white
            axes.text(column, row, numbers[row][column], ha="center", va="center", color=ink, fontsize=size)
    return True
