"""What an extraction that is interrupted by Ctrl-C says: a note on the exception, with what is stored. Never stores anything itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lmprobe_zarr.display import count_of
from lmprobe_zarr.extraction.work import Work

__all__ = ["note_loading", "note_lookup", "note_stored", "note_workers"]


@contextmanager
def note_lookup() -> Iterator[None]:
    """Note that the store was still being searched."""
    with _noting("interrupted while the store was searched; make the same call again"):
        yield


@contextmanager
def note_loading(work: Work) -> Iterator[None]:
    """Note that the model was still being loaded, and what earlier calls have stored."""
    with _noting(describe_stored(work, 0)):
        yield


@contextmanager
def note_workers() -> Iterator[None]:
    """Note that the workers ran the model: what each of them has committed is not known here."""
    with _noting("interrupted: what the workers have committed is stored; the same call goes on from there"):
        yield


def note_stored(error: KeyboardInterrupt, work: Work, committed: int) -> None:
    """Note how many prompts are stored, of which this call has committed some."""
    error.add_note(describe_stored(work, committed))


def describe_stored(work: Work, committed: int) -> str:
    """How many of the requested prompts are stored with all that is requested.

    Parameters
    ----------
    work : Work
    committed : int
        How many this call has committed; those whose poolings were made of stored tokens too.
    """
    prompts = count_of(work.plan.prompts, "prompt")
    if work.lookup.request.refresh:
        again = "with refresh=True the same call runs all of them again" if committed else "make the same call again"
        return f"interrupted: {committed} of {prompts} were extracted again; {again}"
    stored = work.plan.found - work.plan.derived + committed
    return f"interrupted: {stored} of {prompts} are stored; the same call goes on from there"


@contextmanager
def _noting(note: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as error:
        error.add_note(note)
        raise
