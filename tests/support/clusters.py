"""Clusters of `distributed` on this machine."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from warmed import fork_workers


@contextmanager
def local_client(*, workers: int, threads: int = 1, processes: bool = False, set_as_default: bool = True) -> Iterator[Any]:
    """A client of a cluster whose dashboard has a port of its own.

    `dashboard_address=None` would open the default port all the same, so two tests that run at once would collide.
    """
    distributed: Any = pytest.importorskip("distributed")
    options: dict[str, Any] = {"n_workers": workers, "threads_per_worker": threads, "processes": processes, "dashboard_address": ":0"}
    if processes:
        fork_workers()
        options["env"] = dict(os.environ)  # else that of the first worker process of this run
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster, set_as_default=set_as_default) as client:
        yield client
