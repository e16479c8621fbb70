"""What all plots share: colours, markers and line styles, the names of scores, tones that fit the ground, and new axes."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Final

from lmprobe_zarr.errors import InvalidArgumentError, MissingDependencyError

__all__ = [
    "COLOURS",
    "LINES",
    "MARKERS",
    "NEEDS_MATPLOTLIB",
    "SCORE_LABELS",
    "Tones",
    "contrast",
    "letter_size",
    "new_axes",
    "parse_width",
    "tones_of",
]

NEEDS_MATPLOTLIB = 'plots need matplotlib, which is not installed: pip install "lmprobe-zarr[plot]"'

# Source: M. Okabe and K. Ito, "Color Universal Design" (2008), without yellow (too light on white) and black (used for chance).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
#: Line styles of probes and curves, so that they can be distinguished without colour.
LINES = ("-", (0, (6, 1.5)), (0, (4, 1.2, 1, 1.2)), (0, (2.5, 1)), (0, (8, 1.5, 1, 1.5, 1, 1.5)))
#: How a score is written on an axis where its name alone would be unclear.
SCORE_LABELS = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "balanced_accuracy": "balanced accuracy",
    "brier": "Brier score",
    "ece": "expected calibration error",
    "f1": "F1",
    "fit_seconds": "fit time (s)",
    "log_loss": "log loss (nats)",
    "mae": "mean absolute error (units of the target)",
    "r2": "R²",
    "spearman": "Spearman's ρ",
}

#: Inches of the text of a paper in two columns, and of one of its columns.
_WIDTHS: Final = {"page": 7.0, "column": 3.4}
#: Points of letters in figures that are wider than so many inches, and in narrower ones.
_WIDE: Final = 5.0
_LETTERS: Final = (9.0, 8.0)
#: Inches: narrower figures have no room for axes, and wider ones no use.
_POSSIBLE: Final = (2.0, 40.0)
#: The least contrast of lines and letters against the ground. Source: W3C, Web Content Accessibility Guidelines 2.2, 1.4.11.
_LEAST_CONTRAST: Final = 3.0


def parse_width(width: Any) -> float:
    """Inches of a new figure, by its name or as they are given.

    Raises
    ------
    InvalidArgumentError
        Another name, or a number that no figure can have.
    """
    if isinstance(width, str) and width in _WIDTHS:
        return _WIDTHS[width]
    if isinstance(width, bool) or not isinstance(width, int | float) or not _POSSIBLE[0] <= width <= _POSSIBLE[1]:
        raise InvalidArgumentError(f"width={width!r:.40}: use 'page' (7 inches), 'column' (3.4 inches), or inches from 2 to 40")
    return float(width)


def letter_size(inches: float) -> float:
    """Points of the letters of a new figure: 9, or 8 in a narrow one, unless matplotlib's ``font.size`` was set by the caller."""
    from matplotlib import rcParams, rcParamsDefault

    own = float(rcParams["font.size"])
    return own if own != float(rcParamsDefault["font.size"]) else _LETTERS[0] if inches > _WIDE else _LETTERS[1]


def new_axes(inches: float) -> Any:
    """Axes of a new figure, displayed where the caller uses pyplot or a notebook; its letters fit a figure so many inches wide."""
    shell = sys.modules.get("IPython")
    size = (inches, 4.0)
    try:
        # pyplot picks a backend for the whole process and keeps every figure alive, so use it only where it is in use anyway.
        if "matplotlib.pyplot" in sys.modules or (shell is not None and shell.get_ipython() is not None):
            import matplotlib.pyplot as plt

            axes: Any = plt.subplots(figsize=size, layout="constrained")[1]
        else:
            from matplotlib.figure import Figure

            axes = Figure(figsize=size, layout="constrained").subplots()
    except ImportError as error:
        raise MissingDependencyError(NEEDS_MATPLOTLIB) from error
    return axes


# -- tones -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tones:
    """Colours of lines and letters of some axes, which fit their ground, light or dark.

    Parameters
    ----------
    ink, ground : tuple of float
        Red, green and blue, 0 to 1.
    """

    ink: tuple[float, float, float]
    ground: tuple[float, float, float]

    def mix(self, share: float) -> tuple[float, float, float]:
        """A tone between the ground, 0, and the ink, 1."""
        red, green, blue = (share * ink + (1 - share) * ground for ink, ground in zip(self.ink, self.ground, strict=True))
        return red, green, blue


def tones_of(axes: Any) -> Tones:
    """The tones of some axes: matplotlib's colour of text on the axes' own ground, or black or white where that could not be seen."""
    from matplotlib import rcParams
    from matplotlib.colors import to_rgb, to_rgba

    layers = [to_rgba(axes.get_facecolor()), to_rgba(axes.figure.get_facecolor()), to_rgba(rcParams["figure.facecolor"])]
    ground = next((layer[:3] for layer in layers if layer[3] > 0.5), (1.0, 1.0, 1.0))
    candidates: list[tuple[float, float, float]] = [to_rgb(rcParams["text.color"]), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)]
    ink = next((colour for colour in candidates if contrast(colour, ground) >= _LEAST_CONTRAST), candidates[1])
    return Tones(ink, ground)


def contrast(first: Any, second: Any) -> float:
    """Contrast of two colours, 1 to 21. Source: W3C, Web Content Accessibility Guidelines 2.2, "contrast ratio"."""
    low, high = sorted((_luminance(first), _luminance(second)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: Any) -> float:
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour[:3])
    return float(0.2126 * red + 0.7152 * green + 0.0722 * blue)
