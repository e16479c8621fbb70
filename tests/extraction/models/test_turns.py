"""Turns between loading and running models: nobody waits for ever, and a load waits for those that run."""

from __future__ import annotations

import signal
import threading

import pytest

from lmprobe_zarr.extraction.models import turns

WAIT_S = 20


class Module:
    pass


def test_a_thread_that_runs_a_model_may_run_it_again_while_another_waits_to_load() -> None:
    module, loaded, inner = Module(), threading.Event(), threading.Event()

    def load() -> None:
        with turns.loading():
            loaded.set()

    def run() -> None:
        with turns.running(module):
            loader.start()
            while not turns._TURNS._waiting:  # the load is waiting for this run
                threading.Event().wait(0.001)
            with turns.running(module), turns.running(Module()):
                assert not loaded.is_set()
                inner.set()

    loader, runner = (threading.Thread(target=target, daemon=True) for target in (load, run))
    runner.start()
    runner.join(WAIT_S)
    assert inner.is_set()
    assert loaded.wait(WAIT_S)


def test_a_run_that_begins_after_a_waiting_load_lets_it_go_first() -> None:
    order: list[str] = []
    first, module = threading.Event(), Module()

    def load() -> None:
        with turns.loading():
            order.append("load")

    def run() -> None:
        with turns.running(Module()):
            order.append("run")

    threads = [threading.Thread(target=target, daemon=True) for target in (load, run)]
    with turns.running(module):
        threads[0].start()
        while not turns._TURNS._waiting:
            first.wait(0.001)
        threads[1].start()
        first.wait(0.05)
        assert order == []
    for thread in threads:
        thread.join(WAIT_S)
    assert order == ["load", "run"]


def test_a_thread_that_runs_a_model_may_load_another() -> None:
    done = threading.Event()

    def work() -> None:
        with turns.running(Module()), turns.loading(), turns.loading(), turns.running(Module()), turns.between_loads():
            done.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert done.wait(WAIT_S)
    thread.join(WAIT_S)
    assert not turns._TURNS._running
    assert not turns._TURNS._loading


def test_two_threads_that_load_while_they_run_take_turns() -> None:
    both, loaded = threading.Barrier(2), []

    def work() -> None:
        with turns.running(Module()):
            both.wait(WAIT_S)
            with turns.loading():
                loaded.append(turns._TURNS._loading)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert loaded == [True, True]


def test_a_run_that_waits_for_a_load_keeps_no_module_from_the_run_that_the_load_waits_for() -> None:
    first, shared, done = Module(), Module(), threading.Event()

    def load() -> None:
        with turns.loading():
            pass

    def run_shared() -> None:
        with turns.running(shared):
            pass

    def run_both() -> None:
        with turns.running(first):
            others[0].start()
            while not turns._TURNS._waiting:
                threading.Event().wait(0.001)
            others[1].start()
            threading.Event().wait(0.1)  # the second now waits for the load
            with turns.running(shared):
                done.set()

    others = [threading.Thread(target=target, daemon=True) for target in (load, run_shared)]
    threading.Thread(target=run_both, daemon=True).start()
    assert done.wait(WAIT_S)
    for thread in others:
        thread.join(WAIT_S)
        assert not thread.is_alive()


def test_a_load_that_is_interrupted_while_it_waits_keeps_nobody_waiting() -> None:
    release, begun = threading.Event(), threading.Event()

    def run() -> None:
        with turns.running(Module()):
            begun.set()
            release.wait(WAIT_S)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert begun.wait(WAIT_S)
    timer = threading.Timer(0.2, signal.pthread_kill, [threading.get_ident(), signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt), turns.loading():
        pass
    timer.join()
    with turns.running(Module()):  # no load is waiting
        release.set()
    thread.join(WAIT_S)
    with turns.loading():
        pass
