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
    disable = False if "ipykernel" in sys.modules else None
    with tqdm(total=total, desc=description, unit=unit, unit_scale=True, disable=disable) as bar:

        def advance(count: int) -> None:
            bar.update(count)

        yield advance
