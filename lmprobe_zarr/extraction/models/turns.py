"""Locks between loading and running models: no model runs while one loads, and a module runs for one caller at a time.

While transformers loads a model it sets torch's default dtype for the whole process, which a forward pass in another thread would use, and
replaces functions of its own, which the fingerprint of the code in another thread would take for the caller's.
Hooks belong to a module, not to the thread that registers them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

__all__ = ["between_loads", "loading", "running"]


class _Turns:
    """Many models may run at a time, or one may load. A thread may do either inside either: it never waits for itself."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0  # threads
        self._loading = False
        self._waiting = 0  # threads that wait to load
        self._paused = 0  # those of them that run a model
        self._others = threading.RLock()
        self._here = threading.local()
        self._modules: WeakKeyDictionary[Any, threading.RLock] = WeakKeyDictionary()

    @contextmanager
    def loading(self) -> Iterator[None]:
        if getattr(self._here, "loads", False):
            yield
            return
        paused = bool(self._depth)
        with self._changed:
            self._waiting += 1
            self._paused += paused
            try:
                self._changed.wait_for(lambda: not self._loading and self._running == self._paused)
                self._loading = self._here.loads = True
            finally:
                self._waiting -= 1
                self._paused -= paused
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._loading = self._here.loads = False
                self._changed.notify_all()

    @contextmanager
    def running(self, module: Any) -> Iterator[None]:
        with self._changed:
            try:
                lock = self._modules.setdefault(module, threading.RLock())
            except TypeError:  # not hashable or weakly referenced: all such objects share one lock
                lock = self._others
        # Nobody waits for a load with a lock in hand, which a thread may need that the load waits for.
        while True:
            with lock, self._run(wait=False) as begun:
                if begun:
                    yield
                    return
            with self.between_loads():
                pass

    @contextmanager
    def between_loads(self) -> Iterator[None]:
        """No model is loaded inside."""
        with self._run(wait=True):
            yield

    @property
    def _depth(self) -> int:
        """How many runs of this thread have begun."""
        depth: int = getattr(self._here, "depth", 0)
        return depth

    @contextmanager
    def _run(self, *, wait: bool) -> Iterator[bool]:
        """Run; gives False, and does not, where a load would have to be waited for and `wait` is False."""
        outermost = not self._depth
        with self._changed:
            # A waiting load goes first, because runs begin again after every batch. But it waits for a thread that runs a model already,
            # which must therefore not wait for it.
            begun = not outermost or getattr(self._here, "loads", False)
            if not begun:
                begun = bool(self._changed.wait_for(self._is_free)) if wait else self._is_free()
            self._running += begun and outermost
            self._here.depth = self._depth + begun
        try:
            yield begun
        finally:
            with self._changed:
                self._here.depth = self._depth - begun
                self._running -= begun and outermost
                self._changed.notify_all()

    def _is_free(self) -> bool:
        return not self._loading and not self._waiting


_TURNS = _Turns()
loading = _TURNS.loading
running = _TURNS.running
between_loads = _TURNS.between_loads
