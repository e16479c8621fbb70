"""Saves plots to files."""

from __future__ import annotations

import io
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from lmprobe_zarr.errors import InvalidArgumentError, MissingDependencyError
from lmprobe_zarr.plots.style import NEEDS_MATPLOTLIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["parse_plot_path", "save_plot"]


def save_plot(axes: Axes, path: str | PathLike[str], dpi: int = 150) -> None:
    """Write the whole figure of some axes to a file; the file's ending chooses the format.

    Parameters
    ----------
    axes : matplotlib Axes
        From :func:`plot_scores`.
    path : str or path
        With an ending that matplotlib knows, such as ``.png``, ``.svg`` or ``.pdf``. An existing file is replaced once the picture is
        drawn.
    dpi : int
        Dots per inch; vector formats ignore it.

    Raises
    ------
    InvalidArgumentError
        An unknown ending or none, or the picture cannot be drawn or written.
    """
    path = Path(path)
    # Through the canvas: axes may be in a subfigure, which cannot be saved by itself.
    canvas = axes.figure.canvas
    endings = sorted(canvas.get_supported_filetypes())
    ending = _parse_ending(path, endings)
    drawn = io.BytesIO()
    try:
        canvas.figure.savefig(drawn, format=ending, dpi=dpi)
        path.write_bytes(drawn.getvalue())
    except (OSError, RuntimeError, ValueError) as error:
        raise InvalidArgumentError(f"the picture cannot be written to {str(path)!r} ({error}): {_valid(endings)}") from error


def parse_plot_path(path: str | PathLike[str]) -> str:
    """The format of a file for a plot, by its ending: checked before there is anything to draw.

    Parameters
    ----------
    path : str or path

    Returns
    -------
    str
        Such as "png".

    Raises
    ------
    MissingDependencyError
        matplotlib is not installed.
    InvalidArgumentError
        An unknown ending or none, a folder that does not exist, or a path that is a folder.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(NEEDS_MATPLOTLIB) from error
    path = Path(path)
    endings = sorted(Figure().canvas.get_supported_filetypes())
    ending = _parse_ending(path, endings)
    if not path.absolute().parent.is_dir():
        raise InvalidArgumentError(f"{str(path)!r}: the folder {str(path.parent)!r} does not exist, make it first")
    if path.is_dir():
        raise InvalidArgumentError(f"{str(path)!r} is a folder: give the name of a file for the picture")
    return ending


def _parse_ending(path: Path, endings: list[str]) -> str:
    ending = path.suffix.lower().removeprefix(".")
    if ending not in endings:
        what = f"the ending .{ending}" if ending else "no ending"
        raise InvalidArgumentError(f"{str(path)!r} has {what} for a picture: {_valid(endings)}")
    return ending


def _valid(endings: list[str]) -> str:
    return f"use a path that can be written and ends with one of {', '.join(f'.{known}' for known in endings)}"
