"""Progress bars: on terminals and in notebooks, never into a file or a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["progress_bar"]


@contextmanager
def progress_bar(total: int, *, description: str, unit: str, enabled: bool) -> Iterator[Callable[[int], None]]:
    """Show a bar on standard error; gives a function that advances it by a number of units."""
    if not enabled:
        yield lambda _: None
        return
    from tqdm.auto import tqdm

    # With None, tqdm shows the bar on terminals only. A notebook is not a terminal, but can show the bar.
    disable = False if _in_notebook() else None
    with tqdm(total=total, desc=description, unit=unit, unit_scale=total >= 10_000, disable=disable) as bar:

        def advance(count: int) -> None:
            bar.update(count)

        yield advance


def _in_notebook() -> bool:
    """Whether this code runs in a notebook's kernel. That IPython is imported is not enough to know."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return hasattr(shell, "kernel")
