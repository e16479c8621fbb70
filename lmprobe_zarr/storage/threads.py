"""`run_all`: many reads or writes at a time, on one pool of threads per process and kind of place. Knows no storage."""

from __future__ import annotations

import functools
import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from lmprobe_zarr.storage.base import REMOTE_THREADS

__all__ = ["run_all", "submit"]

T = TypeVar("T")


def run_all(jobs: Iterable[Callable[[], None]], *, local: bool = True) -> None:
    """Run jobs on this thread and the package's pool, and wait for all. After an error no more jobs start, and it is raised."""
    todo = deque(jobs)
    errors: list[BaseException] = []

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

    others = min(len(todo), _threads(local)) - 1
    futures = [_pool(os.getpid(), local).submit(work) for _ in range(others)]
    work()
    for future in futures:
        # A future that no thread has taken yet has nothing left to do. `work` raises nothing.
        if not future.cancel():
            future.exception()
    if errors:
        raise errors[0]


def submit(job: Callable[[], T]) -> Future[T]:
    """Begin a job of a remote place that waits for no other job, while the caller goes on."""
    return _pool(os.getpid(), False).submit(job)


@functools.cache
def _pool(pid: int, local: bool) -> ThreadPoolExecutor:  # noqa: ARG001 — threads do not survive a fork: one pool per process
    return ThreadPoolExecutor(_threads(local), thread_name_prefix="lmprobe-zarr")


def _threads(local: bool) -> int:
    return max(2, _cores()) if local else REMOTE_THREADS


@functools.cache
def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
