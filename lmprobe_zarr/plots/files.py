"""Saves plots to files."""

from __future__ import annotations

import io
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from lmprobe_zarr.errors import InvalidArgumentError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["save_plot"]


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
    ending = path.suffix.lower().removeprefix(".")
    valid = f"use a path that can be written and ends with one of {', '.join(f'.{known}' for known in endings)}"
    if ending not in endings:
        raise InvalidArgumentError(f"{str(path)!r} has {f'the ending .{ending}' if ending else 'no ending'} for a picture: {valid}")
    drawn = io.BytesIO()
    try:
        canvas.figure.savefig(drawn, format=ending, dpi=dpi)
        path.write_bytes(drawn.getvalue())
    except (OSError, RuntimeError, ValueError) as error:
        raise InvalidArgumentError(f"the picture cannot be written to {str(path)!r} ({error}): {valid}") from error
