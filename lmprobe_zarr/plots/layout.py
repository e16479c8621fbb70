"""Where things stand in a picture: a figure grows with what is written around its axes, which keep their size."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from lmprobe_zarr.plots.names import Lettering

__all__ = ["finish_figure", "finish_given", "label_limit", "thin_labels"]

#: An entry of a legend: the artist that is shown, and its text.
Entry = tuple[Any, str]
#: Axes have more than this share of the figure's height, whatever is written around them.
_SHARE: Final = 0.53
#: Widths of axes in inches that keep a long legend short.
_WIDER: Final = (8.6, 11.6)
#: Points between the axes' labels and the legend.
_GAP: Final = 5.0
#: Stands for an escaped dollar while lines are broken, so that no line ends between the two characters.
_DOLLAR: Final = "\ue000"


def label_limit(count: int, given: Any = None) -> int:
    """How many characters the names of so many entries of a legend may have; fewer in narrow axes of the caller."""
    most = 60 if count <= 6 else 40 if count <= 16 else 24
    return most if given is None else max(12, min(most, int(6 * given.get_window_extent().width / given.figure.dpi)))


def finish_figure(
    axes: Any,
    lettering: Lettering,
    size: tuple[float, float],
    *,
    legend: Sequence[Entry] = (),
    title: str | None = None,
    bar: Any = None,
) -> None:
    """Size a new figure so that its axes have a size in inches, or more, and everything around them is inside of the figure.

    Parameters
    ----------
    axes : Axes
        The only ones of their figure, apart from those of a colour bar.
    lettering : Lettering
        It has seen all texts.
    size : (float, float)
        Width and height that the axes have at least.
    legend : sequence of (artist, str)
        Entries of a legend below the axes.
    title : str, optional
        Title of the legend.
    bar : Colorbar, optional
    """
    figure = axes.figure
    if lettering.note:
        figure.supxlabel("\n".join(textwrap.wrap(lettering.note, int(15 * size[0]))), fontsize="x-small", color="0.35")
    # Axes of equal aspect lie in the middle of their place, where what is around them cannot be measured.
    aspect = axes.get_aspect()
    axes.set_aspect("auto")
    # Large enough for anything, so that no axes collapse while what is around them is measured.
    figure.set_size_inches(16, 24)
    if legend:
        size = _legend_below(axes, lettering, size, legend, title, square=aspect != "auto")
    lettering.dress([figure])
    width, height = size
    # Once with room for everything, and once more, since ticks and a colour bar depend on the size.
    for _ in range(2):
        _wrap_labels(axes, bar, width, height)
        beside, above = _around(axes)
        height = max(height, above * _SHARE / (1 - _SHARE))
        width = max(width, size[0] * height / size[1]) if aspect != "auto" else width
        figure.set_size_inches(width + beside, height + above)
    axes.set_aspect(aspect)


def finish_given(
    axes: Any, lettering: Lettering, *, legend: Sequence[Entry] = (), title: str | None = None, place: str = "best", bar: Any = None
) -> None:
    """Fit texts and a legend into axes of the caller, whose size stays."""
    _run_layout(axes)
    box = axes.get_window_extent()
    width, height = box.width / axes.figure.dpi, box.height / axes.figure.dpi
    _wrap_labels(axes, bar, width, height)
    if legend:
        # Other axes of the figure, which may get labels later, leave less room than there is now.
        others = [(h, t) for h, t in zip(*axes.get_legend_handles_labels(), strict=True) if all(h is not ours for ours, _ in legend)]
        _legend_inside(axes, lettering, [*others, *legend], title, place, (0.8 * width, 0.4 * height))
    if lettering.note:
        note = "\n".join(textwrap.wrap(lettering.note, max(16, int(15 * width))))
        axes.annotate(note, (0.01, 0.01), xycoords="axes fraction", fontsize="xx-small", color="0.35", zorder=6)
    lettering.dress([axes] if bar is None else [axes, bar.ax])


def _wrap_labels(axes: Any, bar: Any, width: float, height: float) -> None:
    dpi = axes.figure.dpi
    _wrap(axes.title, width * dpi, upright=False)
    _wrap(axes.xaxis.label, width * dpi, upright=False)
    _wrap(axes.yaxis.label, height * dpi, upright=True)
    if bar is not None:
        _wrap(bar.ax.yaxis.label, height * dpi, upright=True)


def _wrap(label: Any, most: float, *, upright: bool) -> None:
    """Break the lines of a label until none is longer than `most` pixels."""

    def length() -> float:
        box = label.get_window_extent()
        return float(box.height if upright else box.width)

    whole = label.get_text().replace(r"\$", _DOLLAR)
    characters = max(map(len, whole.split("\n")))
    while characters > 8 and length() > most:
        characters = min(characters - 1, int(characters * max(0.5, most / length())))
        lines = [piece for line in whole.split("\n") for piece in textwrap.wrap(line, characters) or [""]]
        label.set_text("\n".join(lines).replace(_DOLLAR, r"\$"))


def _around(axes: Any) -> tuple[float, float]:
    """Width and height in inches of what is around the axes: labels, ticks, title, legend, colour bar."""
    figure = axes.figure
    figure.get_layout_engine().execute(figure)
    box = axes.get_position(original=True)
    width, height = figure.get_size_inches()
    return float(width * (1 - box.width)), float(height * (1 - box.height))


def _run_layout(axes: Any) -> None:
    """Let the layout of the whole figure, if it has one, find the present place of some axes."""
    figure = axes.figure
    while figure.figure is not figure:
        figure = figure.figure
    if (engine := figure.get_layout_engine()) is not None:
        engine.execute(figure)


def thin_labels(axes: Any) -> None:
    """Leave out labels of the horizontal axis that would run into the one before."""
    _run_layout(axes)
    labels = axes.get_xticklabels()
    boxes = [label.get_window_extent() for label in labels]
    kept: list[int] = []
    for number, box in enumerate(boxes):
        if not kept or box.x0 > boxes[kept[-1]].x1 + 2:
            kept.append(number)
    if len(kept) < len(labels):
        axes.set_xticks(np.asarray(axes.get_xticks())[kept], [labels[number].get_text() for number in kept])


# -- legends ---------------------------------------------------------------------------------------------------------------


def _legend_below(
    axes: Any, lettering: Lettering, size: tuple[float, float], entries: Sequence[Entry], title: str | None, *, square: bool
) -> tuple[float, float]:
    """Place a legend below the axes and their labels; gives the size that the axes need for it."""
    from matplotlib.transforms import ScaledTranslation

    figure = axes.figure
    options: dict[str, Any] = {"loc": "upper center", "frameon": False, "title": title, "borderpad": 0.2, "borderaxespad": 0}
    box = _place_legend(axes, lettering, entries, ncols=1, **options).get_window_extent()
    each, line = box.width / figure.dpi, box.height / figure.dpi / len(entries)
    wide, columns = size[0], 1
    for wide in (max(size[0], each), *(found for found in _WIDER if found > max(size[0], each))):
        columns = max(1, min(len(entries), int(wide / each)))
        if -(-len(entries) // columns) * line <= (0.8 * wide if square else 0.6 * size[1]):
            break
    legend = _place_legend(axes, lettering, entries, ncols=columns, **options)
    below = axes.get_window_extent().y0 - axes.xaxis.get_tightbbox().y0
    offset = ScaledTranslation(0, -below / figure.dpi - _GAP / 72, figure.dpi_scale_trans)
    legend.set_bbox_to_anchor((0.5, 0.0), transform=axes.transAxes + offset)
    return (wide, max(size[1], wide)) if square else (wide, size[1])


def _legend_inside(
    axes: Any, lettering: Lettering, entries: Sequence[Entry], title: str | None, place: str, room: tuple[float, float]
) -> None:
    """Place a legend in the axes: in more columns, then in smaller letters, until it fits; what does not fit is counted."""
    options: dict[str, Any] = {"loc": place, "frameon": True, "framealpha": 0.9, "edgecolor": "0.85", "title": title}
    dpi = axes.figure.dpi
    shown, left = list(entries), 0
    for size in ("small", "x-small", "xx-small"):
        box = _place_legend(axes, lettering, shown, ncols=1, **options, fontsize=size, title_fontsize=size).get_window_extent()
        columns = max(1, int(room[0] / (box.width / dpi)))
        rows = max(1, int(room[1] / (box.height / dpi / len(shown))))
        if -(-len(shown) // columns) <= rows:
            break
    else:
        # One row less, which says how many are left out.
        kept = max(1, columns * rows - 1)
        left, shown = len(shown) - kept, shown[:kept]
    if left:
        shown = [*shown, (_no_handle(), f"… and {left} more")]
    columns = -(-len(shown) // rows)
    _place_legend(axes, lettering, shown, ncols=columns, **options, fontsize=size, title_fontsize=size)


def _no_handle() -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], linestyle="none")


def _place_legend(axes: Any, lettering: Lettering, entries: Sequence[Entry], **options: Any) -> Any:
    """A legend with exactly these entries."""
    settings: dict[str, Any] = {"fontsize": "small", "title_fontsize": "small", "handlelength": 3.2, **options}
    # matplotlib leaves out labels that begin with an underscore, so the texts are set afterwards.
    legend = axes.legend([artist for artist, _ in entries], [f"entry {number}" for number in range(len(entries))], **settings)
    for text, (_, shown) in zip(legend.get_texts(), entries, strict=True):
        text.set_text(shown)
    lettering.dress([legend])
    return legend
