"""Tasks on the workers of a `distributed.Client`, a few at a time, in the order of their jobs. Knows nothing of what they do."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, MissingDependencyError, UnreachableError
from lmprobe_zarr.progress import progress_bar
from lmprobe_zarr.typing import Array

__all__ = ["Runner", "check_client", "check_run", "is_in_process", "own_client", "run_on_client", "stop_if_cancelled"]


_SCHEDULERS: Final = ("threads", "processes", "synchronous")


def check_client(client: Any) -> None:
    """Raise `InvalidTypeError` where something is no `distributed.Client`."""
    if not (hasattr(client, "submit") and hasattr(client, "nthreads")):
        raise InvalidTypeError(f"client is a distributed.Client, not {type(client).__name__}")


def check_run(client: Any, scheduler: Any, n_workers: Any) -> None:
    """Raise where no work can be done as it is asked for: on a client, or without one by some scheduler of Dask's and with some workers.

    Raises
    ------
    InvalidTypeError, InvalidArgumentError
        No client, an unknown scheduler, no workers, or a client beside the other two.
    """
    if client is not None and (scheduler is not None or n_workers is not None):
        raise InvalidArgumentError("client and scheduler or n_workers were given: a client brings its own workers, leave the others out")
    if client is not None:
        check_client(client)
    if scheduler not in (None, *_SCHEDULERS):
        raise InvalidArgumentError(f"scheduler={scheduler!r} is unknown: use {', '.join(map(repr, _SCHEDULERS))}, or a client")
    if n_workers is not None and n_workers < 1:
        raise InvalidArgumentError(f"n_workers={n_workers!r} leaves nobody to work: give at least 1")


def is_in_process(client: Any) -> bool:
    """Whether all workers of a client are threads of this very process."""
    return all(str(address).startswith("inproc://") for address in client.nthreads())


def run_on_client(client: Any, starts: Sequence[Callable[[], Any]], in_flight: int, finished: Callable[[int], None]) -> list[Any]:
    """Results of tasks, in their order. The tasks of a worker that dies are run on another; when this is left early, the rest is cancelled.

    Parameters
    ----------
    client : distributed.Client
    starts : sequence of callable
        Each submits a task and returns its future.
    in_flight : int
        How many are submitted and not finished at a time, so that what is sent along does not pile up.
    finished : callable
        Told the number of each task that has ended.

    Raises
    ------
    UnreachableError
        Workers died again and again over one task.
    others
        What a task raised.
    """
    import distributed

    as_completed: Any = distributed.as_completed
    completed = as_completed(loop=client.loop)
    running: dict[Any, int] = {}
    results: dict[int, Any] = {}

    def collect() -> None:
        future = next(completed)
        try:
            results[running[future]] = future.result()
        except distributed.KilledWorker as error:
            raise UnreachableError(
                f"workers died over the same task again and again, {error.last_worker.address} last: they may have too little memory\n"
                "what was stored before is whole; see the workers' logs, and call again with fewer or larger workers"
            ) from error
        finished(running.pop(future))

    try:
        for number, start in enumerate(starts):
            future = start()
            running[future] = number
            completed.add(future)
            if len(running) >= in_flight:
                collect()
        while running:
            collect()
    finally:
        client.cancel(list(running))
    return [results[number] for number in range(len(starts))]


def stop_if_cancelled() -> None:
    """Raise `CancelledError` in a task that nobody waits for any more; does nothing where the worker does not tell."""
    import distributed

    worker: Any = distributed.get_worker()
    tasks = getattr(getattr(worker, "state", None), "tasks", None)
    if tasks is None:
        return
    task = tasks.get(worker.get_current_task())
    if task is None or task.state == "cancelled":
        raise CancelledError("nobody waits for this task any more")


@contextmanager
def own_client(*, workers: int | None = None, address: str | None = None) -> Iterator[Any]:
    """A client for the duration: of as many processes of this machine, of the scheduler at an address, or None for neither.

    Raises
    ------
    InvalidArgumentError
        Both are given, or no workers.
    MissingDependencyError
        `distributed` is not installed.
    UnreachableError
        No scheduler answers.
    """
    if workers is None and address is None:
        yield None
        return
    if workers is not None and address is not None:
        raise InvalidArgumentError("workers and a scheduler were given: a scheduler brings its own workers, leave one of the two out")
    if workers is not None and workers < 1:
        raise InvalidArgumentError(f"workers={workers} leaves nobody to work: give at least 1")
    try:
        import distributed
    except ImportError as error:
        raise MissingDependencyError(
            "working on several processes needs distributed, which is not installed: pip install 'lmprobe-zarr[distributed]'"
        ) from error
    make: Any = distributed.Client
    if address is None:
        local: Any = distributed.LocalCluster
        with local(n_workers=workers, threads_per_worker=1, processes=True, dashboard_address=":0") as cluster, make(cluster) as client:
            yield client
        return
    try:
        client = make(address)
    except (OSError, ValueError) as error:
        raise UnreachableError(f"no scheduler answers at {address!r} ({error}): check the address, and that it runs") from error
    with client:
        yield client


# -- how tasks are spread --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Runner:
    """Where tasks run.

    Parameters
    ----------
    client : distributed.Client, optional
    scheduler : "threads", "processes" or "synchronous"
    n_workers : int, optional
    progress : bool
    """

    client: Any = None
    scheduler: str = "threads"
    n_workers: int | None = None
    progress: bool = False

    @property
    def workers(self) -> int:
        """How many tasks run at a time."""
        if self.client is not None:
            return max(1, int(sum(self.client.nthreads().values())))
        if self.scheduler == "synchronous":
            return 1
        from dask.system import CPU_COUNT

        return int(self.n_workers or CPU_COUNT)

    @property
    def reads_here(self) -> bool:
        """Whether tasks see this process's memory."""
        return self.client is None and self.scheduler != "processes"

    def run(self, starts: Sequence[Callable[[], Any]], description: str, in_flight: int) -> list[Any]:
        """Results of delayed tasks, in their order; each is made when it is its turn, where a client runs them."""
        with progress_bar(len(starts), description=description, unit="layer", enabled=self.progress) as advance:
            if self.client is not None:
                made = [partial(_submit, self.client, start) for start in starts]
                return run_on_client(self.client, made, in_flight, lambda _: advance(1))
            import dask.base
            from dask.callbacks import Callback

            tasks = [start() for start in starts]
            keys: set[Hashable] = {task.key for task in tasks}
            callback: Any = Callback
            compute: Any = dask.base.compute

            def posttask(key: Hashable, *_: object) -> None:
                if key in keys:
                    advance(1)

            with callback(posttask=posttask):
                return list(compute(*tasks, scheduler=self.scheduler, num_workers=self.workers))

    def hand_over(self, plan: Any) -> Any:
        """The plan as tasks take it, sent once."""
        from dask.delayed import delayed

        return delayed(plan, traverse=False, pure=False) if self.client is None else self.client.submit(_itself, plan, pure=False)

    def hand_over_values(self, values: Array) -> Any:
        """Values as tasks take them: as arguments they would be copied through the scheduler, which warns of it."""
        return values if self.client is None else self.client.scatter(values, hash=False)


def _submit(client: Any, start: Callable[[], Any]) -> Any:
    return client.compute(start())


def _itself(plan: Any) -> Any:
    return plan
