"""`Pace`, how many requests of a process are under way to a place at a time: more while a far server keeps up, fewer when it refuses."""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Final

__all__ = ["REMOTE_REQUESTS", "Pace", "local_pace", "remote_pace"]

REMOTE_REQUESTS: Final = 32  # under way at a time to a remote place, before anything is known of it
# A request that takes longer than so many times the fastest one waits for others: more at a time would only wait longer.
_CROWDED: Final = 2.0


class Pace:
    """How many jobs run at a time. Usable from many threads.

    With a server far away most of the time goes to waiting, so that twice as many requests at a time take half as long. While all turns are
    taken and requests take about as long as the fastest one did, their number grows, up to `most`. When the server refuses because there
    are too many, the number is halved; from then on it grows by one in the time that a request on each turn takes.

    Parameters
    ----------
    start, most : int
        How many at first, and at most.
    is_local : bool
        Whether the jobs use this machine only, so that its cores are what they wait for.
    """

    def __init__(self, start: int, most: int, *, is_local: bool = False) -> None:
        self.most, self.is_local = most, is_local
        self.answers = 0  # how many requests have been answered
        self._limit = float(start)
        self._under_way = 0
        self._fastest = float("inf")
        self._lowered: float | None = None
        self._free = threading.Condition()
        self._held = threading.local()

    @property
    def at_once(self) -> int:
        """How many at a time now."""
        return int(self._limit)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait until fewer than so many are under way. A thread that has a turn takes no second one."""
        if getattr(self._held, "turn", False):
            yield
            return
        with self._free:
            self._free.wait_for(lambda: self._under_way < self.at_once)
            self._under_way += 1
        self._held.turn = True
        try:
            yield
        finally:
            self._held.turn = False
            with self._free:
                self._under_way -= 1
                self._free.notify()

    def answered(self, seconds: float) -> None:
        """A request was answered, so many seconds after it was sent."""
        with self._free:
            self.answers += 1
            self._fastest = min(self._fastest, seconds)
            if self._under_way < self.at_once or seconds > _CROWDED * self._fastest or self._limit >= self.most:
                return
            before = self.at_once
            self._limit = min(self.most, self._limit + (1 if self._lowered is None else 1 / self._limit))
            self._free.notify(self.at_once - before)

    def refused(self, sent: float) -> None:
        """A server refused a request because there are too many; `sent` is when it was sent, as `time.monotonic` gives it."""
        with self._free:
            # The others that were under way say nothing of the new number.
            if self._lowered is None or sent > self._lowered:
                self._limit = max(1.0, self._limit / 2)
                self._lowered = time.monotonic()


@functools.cache
def local_pace() -> Pace:
    """That of this machine's disks and memory: one job per core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Pace(max(2, cores), max(2, cores), is_local=True)


def remote_pace(client: Hashable, most: int) -> Pace:
    """That of one client of a remote place: whoever uses the client in this process shares it."""
    return _pace_of(os.getpid(), client, most)


@functools.lru_cache(maxsize=256)
def _pace_of(pid: int, client: Hashable, most: int) -> Pace:  # noqa: ARG001 — locks do not survive a fork: one per process
    return Pace(REMOTE_REQUESTS, most)
