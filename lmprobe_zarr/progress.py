"""Progress bars: on terminals and in notebooks, never into a file or a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["progress_bar"]


@contextmanager
def progress_bar(total: int, *, description: str, unit: str, enabled: bool) -> Iterator[Callable[[int], None]]:
    """A bar on standard error, as a function that advances it by so many units."""
    if not enabled:
        yield lambda _: None
        return
    from tqdm.auto import tqdm

    # None leaves it to tqdm, which looks for a terminal; a notebook's output is none, and shows the bar all the same.
    disable = False if _in_notebook() else None
    with tqdm(total=total, desc=description, unit=unit, unit_scale=total >= 10_000, disable=disable) as bar:

        def advance(count: int) -> None:
            bar.update(count)

        yield advance


def _in_notebook() -> bool:
    """Whether this code runs in a kernel; that its package was imported by something says nothing."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return hasattr(shell, "kernel")
