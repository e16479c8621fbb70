"""Scores by layer: one line per probe with a band around it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xarray as xr

from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.plots.layout import Canvas, finish, label_limit, open_canvas, thin_labels
from lmprobe_zarr.plots.scores import chance_levels, select_scores
from lmprobe_zarr.plots.style import COLOURS, LINES, MARKERS, SCORE_LABELS, Tones

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_scores"]

#: Line styles of chance and of the caller's baselines.
_DASHES = ("--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
#: Tones of controls, which have open markers: 0 is the ground, 1 the ink.
_TONES = (0.75, 0.5, 0.6, 0.4)
#: Up to so many layers each have a tick; so many letters of their names stand beside one another on an inch.
_TICKS = 16
_LETTERS_BESIDE = 11
#: Height of new axes as a share of their figure's width, and its limits in inches.
_HEIGHT, _LOWEST, _HIGHEST = 0.5, 1.9, 3.1


def plot_scores(
    scores: xr.Dataset,
    metric: str = "accuracy",
    ax: Axes | None = None,
    baseline: float | Mapping[str, float] | None = None,
    *,
    intervals: xr.Dataset | None = None,
    width: Literal["page", "column"] | float = "page",
) -> Axes:
    """Axes with one line per probe: the mean of a score over the folds by layer, and a band around it.

    Parameters
    ----------
    scores : Dataset
        From :func:`lmprobe_zarr.sweep` or :func:`lmprobe_zarr.sweep_tokens`. Probes whose coordinate ``kind`` is "control" are drawn
        grey, with open markers.
    metric : str
        A variable with dims (layer, probe, fold), perhaps seed: "accuracy", "auroc" or "fit_seconds".
    ax : matplotlib Axes, optional
        Where to draw. Without it a new figure is made. In a notebook, or if the caller has imported pyplot, pyplot makes it, so that it
        is displayed; otherwise it is a bare figure, which needs no display and can be saved with :func:`save_plot`.
    baseline : float or {label: float}, optional
        Scores to draw as horizontal lines, such as ``{"bag of words": 0.71}``.
    intervals : Dataset, optional
        The metric over layer, probe and ``bound``, which holds "lower" and "upper", to draw as bands. If it has an attribute ``level``
        (0 to 1), the plot names it.
    width : {"page", "column"} or float
        Width of a new figure: 7 inches, as the text of a paper in two columns, with letters of 9 points; 3.4 inches, as one of its columns,
        with letters of 8 points; or inches. Put it into the paper unscaled. Letters have the size of matplotlib's ``font.size`` where that
        was set. `ax` has its own.

    Returns
    -------
    Axes
        Without `intervals` a band reaches from the lowest to the highest fold; where only one fold has a score there is no band.
        Chance is drawn too: the share of the largest class for accuracy, 0.5 for AUROC. A new figure gets higher with its legend. Long
        names are cut in their middle. No matplotlib setting is changed. Lines and letters have the colours of the style that is used,
        light or dark.

    Raises
    ------
    MissingDependencyError
        matplotlib is not installed.
    InvalidTypeError
        `scores` is no dataset.
    InvalidArgumentError
        There is no such metric over layer, probe and fold, or it has further dims; or a width that no figure can have.
    """
    values = select_scores(scores, metric, ("layer", "probe", "fold"))
    interval = None if intervals is None else _interval_bounds(intervals, metric, values)
    lines = dict(baseline) if isinstance(baseline, Mapping) else {} if baseline is None else {"baseline": float(baseline)}
    canvas = open_canvas(ax, width)
    axes = canvas.axes

    layers = values["layer"].values
    numeric = layers.dtype.kind in "iuf"
    x = layers if numeric else np.arange(len(layers))
    order = np.argsort(x)
    probes = values["probe"].values
    controls = [str(kind) == "control" for kind in scores["kind"].values] if "kind" in scores.coords else [False] * len(probes)
    names = canvas.lettering.fit_all([*probes, *lines], label_limit(len(probes) + len(lines), canvas))
    entries = []
    for number, probe in enumerate(probes):
        label = names[number] + _convergence_note(scores, probe)
        drawn = _ProbeStyle(label, sum(controls[n] == controls[number] for n in range(number)), controls[number], number, len(probes))
        bounds = None if interval is None else [bound.sel(probe=probe).values[order] for bound in interval]
        entries.append(_draw_probe(canvas, x[order], values.sel(probe=probe).values[order], drawn, bounds))
    levels = [*chance_levels(scores, metric).items(), *zip(names[len(probes) :], lines.values(), strict=True)]
    for number, (label, height) in enumerate(levels):
        # Chance comes first and has the colour of the letters; the caller's baselines are greyer and differ by their dashes.
        colour = canvas.tones.mix(1.0 if number < len(levels) - len(lines) else 0.65)
        text = f"{label} ({height:.2f})"
        line = axes.axhline(height, color=colour, linestyle=_DASHES[number % len(_DASHES)], linewidth=1.2, zorder=1.5, label=text)
        entries.append((line, text))

    _label_axes(canvas, scores, metric, x[order], layers[order] if not numeric else None, values.sizes["fold"], intervals)
    # Below the plot, so that no curve runs behind it; the caller's own axes may have no room there.
    finish(canvas, (canvas.width, float(np.clip(_HEIGHT * canvas.width, _LOWEST, _HIGHEST))), legend=entries)
    if len(x) <= _TICKS or not numeric:
        thin_labels(axes)
    return axes  # type: ignore[no-any-return]


def _interval_bounds(intervals: Any, metric: str, values: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray]:
    """Lower and upper bound of a score by layer and probe, in the order of the scores."""
    if not isinstance(intervals, xr.Dataset) or metric not in intervals or not {"layer", "probe", "bound"} <= set(intervals[metric].dims):
        raise InvalidArgumentError(f"intervals have no {metric!r} over layer, probe and bound: give those of the same scores")
    found = intervals[metric].squeeze([d for d in intervals[metric].dims if d not in ("layer", "probe", "bound")], drop=True)
    found = found.reindex(layer=values["layer"], probe=values["probe"]).transpose("layer", "probe", "bound")
    return found.sel(bound="lower"), found.sel(bound="upper")


@dataclass(frozen=True, slots=True)
class _ProbeStyle:
    """How one probe is drawn.

    Its `number` among the probes (or among the controls) gives colour, marker and line. Its `place` among all `of` probes and controls
    shifts its markers, so that they do not cover one another.
    """

    label: str
    number: int
    control: bool
    place: int
    of: int

    def colour(self, tones: Tones) -> Any:
        return tones.mix(_TONES[self.number % len(_TONES)]) if self.control else COLOURS[self.number % len(COLOURS)]

    @property
    def marker(self) -> str:
        # Counted from the end, so that the first control does not get the marker of the first probe.
        return MARKERS[-1 - self.number % len(MARKERS)] if self.control else MARKERS[self.number % len(MARKERS)]

    @property
    def line(self) -> Any:
        return (0, (1, 1.2)) if self.control else LINES[self.number % len(LINES)]


def _draw_probe(canvas: Canvas, x: Any, values: Any, drawn: _ProbeStyle, bounds: list[Any] | None) -> tuple[Any, str]:
    """One line with its band, and its text for the legend; `values` has shape (layer, fold)."""
    axes, colour, ground = canvas.axes, drawn.colour(canvas.tones), canvas.tones.ground
    defined = ~np.isnan(values).all(axis=1)
    if not defined.any():
        label = f"{drawn.label} (undefined)"
        return axes.plot([], [], color=colour, label=label)[0], label
    x, values = x[defined], values[defined]
    mean = np.nanmean(values, axis=1)
    if bounds is None:
        # A single score has no spread, which is not a spread of 0.
        several = np.where((~np.isnan(values)).sum(axis=1) > 1, 0.0, np.nan)
        low, high = np.nanmin(values, axis=1) + several, np.nanmax(values, axis=1) + several
    else:
        low, high = (bound[defined] for bound in bounds)
    if len(x) == 1:
        # Side by side, since the bars would cover one another otherwise.
        x = x + (drawn.place - (drawn.of - 1) / 2) * 0.8 / drawn.of
    # About twenty markers are distinguishable on one line; probes start at different layers so that markers do not overlap.
    step = max(1, len(x) // 20)
    label = drawn.label + (" (control)" if drawn.control and "control" not in drawn.label else "")
    (line,) = axes.plot(
        x,
        mean,
        color=colour,
        linestyle=drawn.line,
        marker=drawn.marker,
        markevery=(drawn.place % step, step),
        markersize=5 if drawn.control else 5.5,
        markerfacecolor=ground if drawn.control else colour,
        markeredgecolor=colour if drawn.control else ground,
        markeredgewidth=1 if drawn.control else 0.6,
        linewidth=1.2 if drawn.control else 1.8,
        label=label,
        zorder=2.5 if drawn.control else 3,
    )
    if len(x) == 1 and not np.isnan([*low, *high]).any():
        # An interval need not contain the mean over the folds.
        lengths = np.maximum(np.stack([mean - low, high - mean]), 0)
        axes.errorbar(x, mean, yerr=lengths, color=colour, capsize=4, linewidth=1.2, zorder=2)
    elif len(x) > 1:
        axes.fill_between(x, low, high, color=colour, alpha=min(0.1 if drawn.control else 0.15, 0.9 / drawn.of), linewidth=0, zorder=2)
    return line, label


def _convergence_note(scores: xr.Dataset, probe: Any) -> str:
    if "converged" not in scores:
        return ""
    ended = scores["converged"].sel(probe=probe)
    stopped = int((~ended).sum())
    return f" ({stopped} of {ended.size} fits not converged)" if stopped else ""


def _label_axes(canvas: Canvas, scores: xr.Dataset, metric: str, x: Any, names: Any, n_folds: int, intervals: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes, lettering = canvas.axes, canvas.lettering
    if names is not None or len(x) <= _TICKS:
        every = max(1, -(-len(x) // _TICKS))
        shown = lettering.fit_all((x if names is None else names)[::every], 24)
        # Names longer than their part of the axis stand upright.
        upright = names is not None and max(map(len, shown)) * len(shown) > _LETTERS_BESIDE * canvas.inner_width
        axes.set_xticks(x[::every], shown, rotation=90 if upright else 0)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=max(4, min(12, int(2 * canvas.inner_width))), integer=True))
    if len(x) == 1:
        axes.set_xlim(x[0] - 1, x[0] + 1)
    else:
        margin = 0.02 * (x[-1] - x[0])
        axes.set_xlim(x[0] - margin, x[-1] + margin)
    axes.set_xlabel("layer")
    band = "bar" if len(x) == 1 else "band"
    spread = f"mean of {n_folds} folds" if n_folds > 1 else "one fold"
    if intervals is not None:
        level = intervals.attrs.get("level")
        spread += f", {band}: {'' if level is None else f'{100 * level:g} % '}interval"
    elif n_folds > 1:
        spread += f", {band}: lowest to highest"
    (score,) = lettering.fit_all([SCORE_LABELS.get(metric, metric)], 80)
    axes.set_ylabel(f"{score}\n({spread})", linespacing=1.5)
    model, labels, variable = lettering.fit_all((scores.attrs.get(name, "") for name in ("model", "labels", "variable")), 80)
    of = " from ".join(part for part in (labels, variable) if part)
    axes.set_title(" · ".join(part for part in (model, of) if part), fontsize=canvas.points("medium"))
    axes.grid(visible=True, color=canvas.tones.mix(0.1), linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
