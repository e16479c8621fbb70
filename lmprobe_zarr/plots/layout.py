"""Where things stand in a picture: a figure has the width of a page or a column, and grows in height with what is written in it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

import numpy as np

from lmprobe_zarr.plots.names import Lettering
from lmprobe_zarr.plots.style import Tones, letter_size, new_axes, parse_width, tones_of

__all__ = ["Canvas", "Entry", "add_bar", "bar_width", "finish", "label_limit", "open_canvas", "thin_labels"]

#: An entry of a legend: the artist that is shown, and its text.
Entry = tuple[Any, str]
#: Axes have more than this share of the figure's height, whatever is written around them.
_SHARE: Final = 0.53
#: Inches that axes are wide at least, whatever is written beside them, and what is usually written there.
_LEAST: Final = 1.0
_BESIDE: Final = 0.7
#: Points between the axes' labels and the legend.
_GAP: Final = 5.0
#: Inches that a colour bar takes beside the axes; in narrower figures than so many inches it is below them.
_BAR: Final = 1.1
_NARROW: Final = 5.0
#: Inches beside a legend that is as wide as its figure.
_EDGE: Final = 0.15
#: Stands for an escaped dollar while lines are broken, so that no line ends between the two characters.
_DOLLAR: Final = "\ue000"


@dataclass(frozen=True, slots=True)
class Canvas:
    """Axes to draw on.

    Parameters
    ----------
    axes : matplotlib Axes
    is_new : bool
        Whether their figure was made for them alone; its size can be chosen then.
    width : float
        Inches of the new figure, at most; of the axes themselves where they are the caller's.
    letters : float
        Points of letters of medium size.
    tones : Tones
        Colours of lines and letters on their ground.
    lettering : Lettering
    """

    axes: Any
    is_new: bool
    width: float
    letters: float
    tones: Tones
    lettering: Lettering = field(default_factory=Lettering)

    @property
    def inner_width(self) -> float:
        """Inches that axes with usual labels are wide."""
        return self.width - _BESIDE if self.is_new else self.width

    def points(self, size: str | float) -> float:
        """A size of letters in points, by its name, such as "small", or as it is given."""
        from matplotlib.font_manager import font_scalings

        return float(size) if isinstance(size, int | float) else self.letters * float(font_scalings[size])


def open_canvas(ax: Any, width: str | float) -> Canvas:
    """The caller's axes, or new ones in a figure of that width.

    Raises
    ------
    MissingDependencyError
        matplotlib is not installed.
    InvalidArgumentError
        No possible width.
    """
    inches = parse_width(width)
    axes = new_axes(inches) if ax is None else ax
    if ax is not None:
        from matplotlib import rcParams

        return Canvas(axes, False, _inches(axes)[0], float(rcParams["font.size"]), tones_of(axes))
    canvas = Canvas(axes, True, inches, letter_size(inches), tones_of(axes))
    _size_letters(canvas, axes)
    return canvas


def _size_letters(canvas: Canvas, axes: Any) -> None:
    """Give labels and ticks of new axes the sizes of matplotlib's settings, of which named ones follow the canvas."""
    import matplotlib

    rc: Any = matplotlib.rcParams
    for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        axes.tick_params(axis=name, labelsize=canvas.points(rc[f"{name}tick.labelsize"]))
        axis.label.set_size(canvas.points(rc["axes.labelsize"]))


def label_limit(count: int, canvas: Canvas) -> int:
    """How many characters the names of so many entries of a legend may have; fewer in narrow axes."""
    most = 60 if count <= 6 else 40 if count <= 16 else 24
    return max(12, min(most, int((10 if canvas.is_new else 6) * canvas.inner_width)))


def finish(
    canvas: Canvas,
    size: tuple[float, float],
    *,
    legend: Sequence[Entry] = (),
    title: str | None = None,
    bar: Any = None,
    place: str = "best",
    above: float | None = None,
    remarks: Sequence[str] = (),
) -> None:
    """Fit everything around the axes into the figure: a new one grows in height, and the caller's keeps its size.

    Parameters
    ----------
    canvas : Canvas
        Its axes are the only ones of a new figure, apart from those of a colour bar. Its lettering has seen all texts.
    size : (float, float)
        Inches that the axes of a new figure are wide at most, and high at least.
    legend : sequence of (artist, str)
        Entries of a legend: below new axes, inside of the caller's.
    title : str, optional
        Title of the legend.
    bar : Colorbar, optional
    place : str
        Where in the caller's axes the legend lies.
    above : float, optional
        Points above the axes that are drawn on. The legend of the caller's axes then lies above these, not over the axes.
    remarks : sequence of str
        What a reader has to know, below a new figure; in the label of the caller's axes.
    """
    if above:
        canvas.axes.set_title(canvas.axes.get_title(), fontsize=canvas.axes.title.get_size(), pad=above + _GAP)
    if not canvas.is_new:
        canvas.axes.set_xlabel("\n".join((canvas.axes.get_xlabel(), *remarks)))
        _finish_given(canvas, legend, title, bar, place, above)
        return
    if bar is not None:
        _size_letters(canvas, bar.ax)
    _finish_new(canvas, size, legend, title, bar, remarks)


def _finish_new(
    canvas: Canvas, size: tuple[float, float], legend: Sequence[Entry], title: str | None, bar: Any, remarks: Sequence[str]
) -> None:
    axes, lettering = canvas.axes, canvas.lettering
    figure = axes.figure
    note: Any = None
    if said := [*remarks, *([lettering.note] if lettering.note else [])]:
        note = figure.supxlabel("\n".join(said), fontsize=canvas.points("x-small"), color=canvas.tones.mix(0.75))
    # Before anything is measured: legends are dressed when they are placed.
    lettering.dress([figure])
    # Axes of equal aspect lie in the middle of their place, where what is around them cannot be measured.
    aspect = axes.get_aspect()
    axes.set_aspect("auto")
    # Large enough for anything, so that no axes collapse while what is around them is measured.
    figure.set_size_inches(16, 24)
    width, height = min(size[0], max(_LEAST, canvas.width - _around(axes)[0])), size[1]
    if legend:
        _legend_below(canvas, width, legend, title, square=aspect != "auto")
    # Once with room for everything, and again, since ticks, broken lines and a colour bar depend on the size.
    whole = [(label, label.get_text()) for label, _ in _labels(axes, bar)]
    for _ in range(3):
        for label, text in whole:
            label.set_text(text)
        _wrap_labels(axes, bar, width, height)
        beside, above = _around(axes)
        if note is not None:
            note.set_text("\n".join(said))
            _wrap(note, (width + beside - _EDGE) * figure.dpi, upright=False)
            beside, above = _around(axes)
        height = max(size[1], above * _SHARE / (1 - _SHARE))
        width = max(_LEAST, min(size[0] * (height / size[1] if aspect != "auto" else 1), canvas.width - beside))
        if aspect != "auto":
            # The axes fill their place, or there would be gaps around them.
            height = width * size[1] / size[0]
        figure.set_size_inches(width + beside, height + above)
    axes.set_aspect(aspect)


def _finish_given(canvas: Canvas, legend: Sequence[Entry], title: str | None, bar: Any, place: str, above: float | None) -> None:
    axes, lettering = canvas.axes, canvas.lettering
    _run_layout(axes)
    width, height = _inches(axes)
    if legend and above is not None:
        _legend_above(canvas, legend, width, above)
    _wrap_labels(axes, bar, width, height)
    if legend and above is None:
        # Other axes of the figure, which may get labels later, leave less room than there is now.
        others = [(h, t) for h, t in zip(*axes.get_legend_handles_labels(), strict=True) if all(h is not ours for ours, _ in legend)]
        _legend_inside(canvas, [*others, *legend], title, place, (0.8 * width, 0.4 * height))
    if lettering.note:
        note = "\n".join(textwrap.wrap(lettering.note, max(16, int(15 * width))))
        axes.annotate(note, (0.01, 0.01), xycoords="axes fraction", fontsize="xx-small", color=canvas.tones.mix(0.65), zorder=6)
    lettering.dress([axes] if bar is None else [axes, bar.ax])


def _inches(axes: Any) -> tuple[float, float]:
    """Width and height of axes in inches."""
    box = axes.get_window_extent()
    return float(box.width / axes.figure.dpi), float(box.height / axes.figure.dpi)


def add_bar(canvas: Canvas, mesh: Any, label: str, levels: Sequence[float] = (), *, pad: float = 0.015) -> Any:
    """A colour bar, beside the axes or below those of a narrow new figure, with a line at each of some levels."""
    below = canvas.is_new and canvas.width < _NARROW
    bar = canvas.axes.figure.colorbar(mesh, ax=canvas.axes, pad=pad, aspect=24, location="bottom" if below else "right")
    bar.set_label(label)
    for level in levels:
        # Black within white can be seen on every colour.
        for style in ({"color": "white", "linewidth": 2.6}, {"color": "black", "linewidth": 1.0}):
            (bar.ax.axvline if below else bar.ax.axhline)(level, **style)
    return bar


def bar_width(canvas: Canvas) -> float:
    """Inches beside the axes that a colour bar takes with its ticks and label."""
    return _BAR if canvas.width >= _NARROW else 0.2


def _labels(axes: Any, bar: Any) -> list[tuple[Any, bool]]:
    """Title and labels, which may take several lines, and whether they are upright."""
    own = [(axes.title, False), (axes.xaxis.label, False), (axes.yaxis.label, True)]
    if bar is None:
        return own
    return [*own, (bar.ax.xaxis.label, False) if bar.orientation == "horizontal" else (bar.ax.yaxis.label, True)]


def _wrap_labels(axes: Any, bar: Any, width: float, height: float) -> None:
    for label, upright in _labels(axes, bar):
        _wrap(label, (height if upright else width) * axes.figure.dpi, upright=upright)


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
    """Leave out labels of the horizontal axis that would run into the one before; in steps, where layers are evenly spaced."""
    _run_layout(axes)
    labels = axes.get_xticklabels()
    boxes = [label.get_window_extent() for label in labels]
    places = np.asarray(axes.get_xticks())
    steps = range(1, len(labels)) if len(set(np.diff(places).round(9).tolist())) == 1 else ()
    for kept in (list(range(0, len(labels), step)) for step in steps):
        if all(boxes[right].x0 > boxes[left].x1 + 2 for left, right in pairwise(kept)):
            break
    else:
        kept = []
        for number, box in enumerate(boxes):
            if not kept or box.x0 > boxes[kept[-1]].x1 + 2:
                kept.append(number)
    if len(kept) < len(labels):
        axes.set_xticks(places[kept], [labels[number].get_text() for number in kept])


# -- legends ---------------------------------------------------------------------------------------------------------------


def _legend_below(canvas: Canvas, width: float, entries: Sequence[Entry], title: str | None, *, square: bool) -> None:
    """Place a legend below the axes and their labels, in as many columns as there is room for."""
    from matplotlib.transforms import ScaledTranslation

    axes = canvas.axes
    figure = axes.figure
    options: dict[str, Any] = {"loc": "upper center", "frameon": False, "title": title, "borderpad": 0.2, "borderaxespad": 0}
    box = _place_legend(canvas, entries, ncols=1, **options).get_window_extent()
    each, line = box.width / figure.dpi, box.height / figure.dpi / len(entries)
    columns = 1
    # A square may be much narrower than its figure.
    for wide in (width, *([canvas.width - _EDGE] if square else [])):
        columns = max(1, min(len(entries), int(wide / each)))
        if -(-len(entries) // columns) * line <= 0.8 * wide:
            break
    legend = _place_legend(canvas, entries, ncols=columns, **options)
    below = axes.get_window_extent().y0 - axes.xaxis.get_tightbbox().y0
    offset = ScaledTranslation(0, -below / figure.dpi - _GAP / 72, figure.dpi_scale_trans)
    legend.set_bbox_to_anchor((0.5, 0.0), transform=axes.transAxes + offset)


def _legend_above(canvas: Canvas, entries: Sequence[Entry], width: float, above: float) -> None:
    """Place a legend between the caller's axes, with what is drawn above them, and their title."""
    from matplotlib.transforms import ScaledTranslation

    axes = canvas.axes
    dpi = axes.figure.dpi
    options: dict[str, Any] = {"loc": "lower center", "frameon": False, "borderpad": 0, "borderaxespad": 0, "fontsize": "x-small"}
    each = _place_legend(canvas, entries, ncols=1, **options).get_window_extent().width / dpi
    legend = _place_legend(canvas, entries, ncols=max(1, min(len(entries), int(width / each))), **options)
    raised = axes.transAxes + ScaledTranslation(0, (above + _GAP) / 72, axes.figure.dpi_scale_trans)
    legend.set_bbox_to_anchor((0.5, 1.0), transform=raised)
    pad = above + 2 * _GAP + 72 * legend.get_window_extent().height / dpi
    axes.set_title(axes.get_title(), fontsize=axes.title.get_size(), pad=pad)


def _legend_inside(canvas: Canvas, entries: Sequence[Entry], title: str | None, place: str, room: tuple[float, float]) -> None:
    """Place a legend in the axes: in more columns, then in smaller letters, until it fits; what does not fit is counted."""
    ground = {"facecolor": canvas.tones.ground, "edgecolor": canvas.tones.mix(0.15)}
    options: dict[str, Any] = {"loc": place, "frameon": True, "framealpha": 0.9, "title": title, **ground}
    dpi = canvas.axes.figure.dpi
    shown, left = list(entries), 0
    for size in ("small", "x-small", "xx-small"):
        box = _place_legend(canvas, shown, ncols=1, **options, fontsize=size, title_fontsize=size).get_window_extent()
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
    _place_legend(canvas, shown, ncols=columns, **options, fontsize=size, title_fontsize=size)


def _no_handle() -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], linestyle="none")


def _place_legend(canvas: Canvas, entries: Sequence[Entry], **options: Any) -> Any:
    """A legend with exactly these entries."""
    settings: dict[str, Any] = {"fontsize": "small", "title_fontsize": "small", "handlelength": 3.2, **options}
    settings |= {name: canvas.points(settings[name]) for name in ("fontsize", "title_fontsize")}
    # matplotlib leaves out labels that begin with an underscore, so the texts are set afterwards.
    legend = canvas.axes.legend([artist for artist, _ in entries], [f"entry {number}" for number in range(len(entries))], **settings)
    for text, (_, shown) in zip(legend.get_texts(), entries, strict=True):
        text.set_text(shown)
    for text in (*legend.get_texts(), legend.get_title()):
        text.set_color(canvas.tones.ink)
    canvas.lettering.dress([legend])
    return legend
