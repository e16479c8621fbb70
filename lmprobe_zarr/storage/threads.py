"""`run_all`: many reads or writes at a time, on one pool of threads per process and kind of place. Knows no storage, only its pace."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, TypeVar

from lmprobe_zarr.storage.pace import Pace

__all__ = ["run_all", "submit"]

T = TypeVar("T")


_pools: Final[dict[tuple[int, bool, int], ThreadPoolExecutor]] = {}
_lock: Final = threading.Lock()


def run_all(jobs: Iterable[Callable[[], None]], pace: Pace) -> None:
    """Run jobs on this thread and the package's pool, as many at a time as `pace` says, and wait for all.

    After an error no more jobs start, and it is raised.
    """
    todo = deque(jobs)
    errors: list[BaseException] = []
    futures: list[Future[None]] = []

    def work() -> None:
        # One task per thread, not per job: thousands of small chunks would pay for each.
        while not errors:
            try:
                job = todo.popleft()
            except IndexError:
                return
            try:
                job()
            except BaseException as error:  # noqa: BLE001 — raised below, on the caller's thread
                errors.append(error)
            if len(futures) + 1 < pace.at_once and todo:
                begin()

    def begin() -> None:
        # Several threads may do so at once, and begin a few tasks too many: these find nothing to do, or take a turn later.
        futures.append(_pool(pace).submit(work))

    for _ in range(min(len(todo), pace.at_once) - 1):
        begin()
    work()
    for future in futures:
        # A future that no thread has taken yet has nothing left to do. `work` raises nothing.
        if not future.cancel():
            future.exception()
    if errors:
        raise errors[0]


def submit(job: Callable[[], T], pace: Pace) -> Future[T]:
    """Begin a job that waits for no other job, while the caller goes on."""
    return _pool(pace).submit(job)


def _pool(pace: Pace) -> ThreadPoolExecutor:
    # Threads do not survive a fork: one pool per process.
    key = (os.getpid(), pace.is_local, pace.most)
    with _lock:
        if key not in _pools:
            _pools[key] = ThreadPoolExecutor(pace.most, thread_name_prefix="lmprobe-zarr")
        return _pools[key]
