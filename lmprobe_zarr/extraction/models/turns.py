"""Whose turn it is: torch has settings of the whole process, and hooks belong to a module, not to the thread that sets them.

While transformers loads a model it sets the default dtype for every thread, which a forward pass elsewhere would pick up; so nothing runs
while something loads. And one module runs for one caller at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

__all__ = ["loading", "running"]


class _Turns:
    """Many may run, or one may load."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0
        self._loading = False
        self._waiting = 0
        self._others = threading.RLock()
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
            except TypeError:  # something that cannot be told apart from its like: all of these wait for one another
                lock = self._others
        with lock:
            with self._changed:
                # Whoever wants to load goes first: those that run come back after every batch.
                self._changed.wait_for(lambda: not self._loading and not self._waiting)
                self._running += 1
            try:
                yield
            finally:
                with self._changed:
                    self._running -= 1
                    self._changed.notify_all()


_TURNS = _Turns()
loading = _TURNS.loading
running = _TURNS.running
