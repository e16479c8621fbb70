"""The band above a heat map of tokens that shows whose tokens they are, and which of them the model generated."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, Final

from lmprobe_zarr.plots.layout import Canvas, Entry
from lmprobe_zarr.plots.style import COLOURS

__all__ = ["draw_roles"]

#: Points between the axes and the band, and of its height; more above it where a line marks what was generated.
_GAP: Final = 3.0
_HEIGHT: Final = 7.0
_LINE: Final = 4.0
#: Patterns of roles, so that they can be distinguished without colour.
_PATTERNS: Final = ("", "////", "....", "xxxx", "----", "++++")


def draw_roles(canvas: Canvas, roles: Sequence[Any], generated: Sequence[Any]) -> tuple[list[Entry], float] | None:
    """Draw the band, and give the entries of its legend and the points above the axes that it takes; None where nothing is known.

    Parameters
    ----------
    canvas : Canvas
        Its axes have a token at every whole number.
    roles : sequence of str
        The role of each token, "" where it is unknown; empty where there are none.
    generated : sequence of bool
        Whether the model has generated each token; empty where that is not known.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle
    from matplotlib.transforms import Affine2D, ScaledTranslation, blended_transform_factory

    named = ["" if role is None or role != role else str(role) for role in roles]
    found = list(dict.fromkeys(role for role in named if role))
    made = [bool(each) for each in generated]
    if not found and not any(made):
        return None
    axes = canvas.axes
    # Places of tokens along the axis, and points from the upper edge of the axes on.
    points = Affine2D().scale(1 / 72) + axes.figure.dpi_scale_trans + ScaledTranslation(0, 1, axes.transAxes)
    place = blended_transform_factory(axes.transData, points)
    entries: list[Entry] = []
    names = canvas.lettering.fit_all(found, 24)
    for number, (role, name) in enumerate(zip(found, names, strict=True)):
        style: dict[str, Any] = {
            "facecolor": COLOURS[number % len(COLOURS)],
            "hatch": _PATTERNS[number % len(_PATTERNS)],
            "edgecolor": canvas.tones.ground,
            "linewidth": 0,
        }
        for start, length in _runs([each == role for each in named]):
            band = Rectangle((start - 0.5, _GAP), length, _HEIGHT, transform=place, clip_on=False, **style)
            band.set_gid(f"role {role}")
            axes.add_artist(band)
        entries.append((Rectangle((0, 0), 1, 1, **style), name))
    top = _GAP + _HEIGHT if found else 0.0
    if any(made):
        line: dict[str, Any] = {"color": canvas.tones.ink, "linewidth": 2.0, "solid_capstyle": "butt"}
        for start, length in _runs(made):
            drawn = Line2D([start - 0.5, start + length - 0.5], [top + _LINE / 2 + 1] * 2, transform=place, clip_on=False, **line)
            drawn.set_gid("generated")
            axes.add_artist(drawn)
        entries.append((Line2D([], [], **line), "generated"))
        top += _LINE + 1
    return entries, top


def _runs(flags: Sequence[bool]) -> list[tuple[int, int]]:
    """Start and length of every run of neighbours that are true."""
    runs, at = [], 0
    for is_true, run in groupby(flags):
        length = len(list(run))
        if is_true:
            runs.append((at, length))
        at += length
    return runs
