"""Turns between loading and running models: nobody waits for ever, and a load waits for those that run."""

from __future__ import annotations

import threading

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
