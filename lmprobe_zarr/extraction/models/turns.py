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
    """Many models may run at a time, or one may load."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0
        self._loading = False
        self._waiting = 0
        self._others = threading.RLock()
        self._here = threading.local()
        self._modules: WeakKeyDictionary[Any, threading.RLock] = WeakKeyDictionary()

    @contextmanager
    def loading(self) -> Iterator[None]:
        with self._changed:
            self._waiting += 1
            self._changed.wait_for(lambda: not self._loading and not self._running)
            self._waiting -= 1
            self._loading = True
        try:
            yield
        finally:
            with self._changed:
                self._loading = False
                self._changed.notify_all()

    @contextmanager
    def running(self, module: Any) -> Iterator[None]:
        with self._changed:
            try:
                lock = self._modules.setdefault(module, threading.RLock())
            except TypeError:  # not hashable or weakly referenced: all such objects share one lock
                lock = self._others
        with lock, self.between_loads():
            yield

    @contextmanager
    def between_loads(self) -> Iterator[None]:
        """No model is loaded inside."""
        inside = getattr(self._here, "depth", 0)
        with self._changed:
            # A waiting load goes first, because runs ask again after every batch. But it waits for a thread that runs a model already,
            # which must therefore not wait for it.
            if not inside:
                self._changed.wait_for(lambda: not self._loading and not self._waiting)
            self._running += 1
        self._here.depth = inside + 1
        try:
            yield
        finally:
            self._here.depth = inside
            with self._changed:
                self._running -= 1
                self._changed.notify_all()


_TURNS = _Turns()
loading = _TURNS.loading
running = _TURNS.running
between_loads = _TURNS.between_loads
