"""What is written in a picture, and whether it can be read: inside of the picture, beside the axes, not over anything else."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any


def texts(figure: Any) -> Iterator[Any]:
    """Every text that is drawn: ticks outside of the limits are not."""
    from matplotlib.text import Text

    hidden = set()
    for axes in figure.axes:
        for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            for tick in axis.get_major_ticks():
                if not min(limits) - 1e-9 <= tick.get_loc() <= max(limits) + 1e-9:
                    hidden |= {tick.label1, tick.label2}
    for text in figure.findobj(Text):
        if text not in hidden and text.get_visible() and text.get_text().strip():
            yield text


def assert_readable(axes: Any) -> None:
    figure = axes.figure
    figure.draw_without_rendering()
    inside = figure.bbox
    shown = list(texts(figure))
    for text in shown:
        box = text.get_window_extent()
        assert box.x0 >= -1, text
        assert box.y0 >= -1, text
        assert box.x1 <= inside.x1 + 1, text
        assert box.y1 <= inside.y1 + 1, text
    frame = axes.get_window_extent()
    assert frame.height >= 0.5 * inside.height
    outer = [axes.title, axes.xaxis.label, axes.yaxis.label]
    legend = axes.get_legend()
    boxes = [text.get_window_extent() for text in outer if text.get_text()]
    boxes += [] if legend is None else [legend.get_window_extent()]
    for number, box in enumerate(boxes):
        assert not box.overlaps(frame)
        assert not any(box.overlaps(other) for other in boxes[number + 1 :])
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        along = [text.get_window_extent() for text in labels if text in shown]
        assert not any(box.x1 > other.x0 + 1 and box.overlaps(other) for box, other in pairwise(along))
