"""Runs tasks in threads, processes, this thread, or on the workers of a `distributed.Client`. Knows nothing of what they do.

`parse_runner` checks a caller's arguments and returns a `Runner`, which every sweep uses. Extraction calls `run_on_client` directly,
because its tasks write to a store by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any, Final, TypeVar

from lmprobe_zarr.display import progress_bar
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, MissingDependencyError, UnreachableError
from lmprobe_zarr.typing import Client

__all__ = ["Runner", "check_client", "is_in_process", "own_client", "parse_runner", "run_on_client", "stop_if_cancelled"]

T = TypeVar("T")

_SCHEDULERS: Final = ("threads", "processes", "synchronous")


def check_client(client: object) -> None:
    """Raise `InvalidTypeError` unless `client` is a `distributed.Client`."""
    if not (hasattr(client, "submit") and hasattr(client, "nthreads")):
        raise InvalidTypeError(f"client is a distributed.Client, not {type(client).__name__}")


def is_in_process(client: Client) -> bool:
    """Whether all workers of a client are threads of this process."""
    return all(str(address).startswith("inproc://") for address in client.nthreads())


def run_on_client(client: Client, starts: Sequence[Callable[[], Any]], in_flight: int, finished: Callable[[int], None]) -> list[Any]:
    """The results of tasks, in the order of the tasks.

    If a worker dies, its tasks are run on another. After an error, the remaining tasks are cancelled.

    Parameters
    ----------
    client : distributed.Client
    starts : sequence of callable
        Each submits a task and returns its future.
    in_flight : int
        At most this many tasks are submitted and not finished, so that their arguments do not pile up.
    finished : callable
        Called with the number of each task that has ended.

    Raises
    ------
    UnreachableError
        Several workers died while running the same task.
    others
        Raised by a task.
    """
    results: dict[int, Any] = {}
    with closing(_as_finished(client, starts, in_flight)) as ended:
        for number, result in ended:
            results[number] = result
            finished(number)
    return [results[number] for number in range(len(starts))]


def _as_finished(client: Client, starts: Sequence[Callable[[], Any]], in_flight: int) -> Generator[tuple[int, Any]]:
    """The number and the result of each task as it ends; closing the generator cancels the tasks that still run."""
    import distributed

    as_completed: Any = distributed.as_completed
    completed = as_completed(loop=client.loop)
    running: dict[Any, int] = {}

    def collect() -> tuple[int, Any]:
        future = next(completed)
        try:
            result = future.result()
        except distributed.KilledWorker as error:
            raise UnreachableError(
                f"workers died on the same task again and again, {error.last_worker.address} last: they may have too little memory\n"
                "what was stored before is whole; see the workers' logs, and call again with fewer or larger workers"
            ) from error
        return running.pop(future), result

    try:
        for number, start in enumerate(starts):
            future = start()
            running[future] = number
            completed.add(future)
            if len(running) >= in_flight:
                yield collect()
        while running:
            yield collect()
    finally:
        client.cancel(list(running))


def stop_if_cancelled() -> None:
    """Raise `CancelledError` in a task that its client has cancelled. Does nothing if the worker keeps no record of its tasks."""
    import distributed

    worker: Any = distributed.get_worker()
    tasks = getattr(getattr(worker, "state", None), "tasks", None)
    if tasks is None:
        return
    task = tasks.get(worker.get_current_task())
    if task is None or task.state == "cancelled":
        raise CancelledError("the client has cancelled this task")


@contextmanager
def own_client(*, workers: int | None = None, address: str | None = None) -> Iterator[Client | None]:
    """A client for the duration of the context.

    Of new worker processes on this machine, or of the scheduler at an address; None if neither is given.

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
        raise InvalidArgumentError("workers and a scheduler were given: a scheduler has workers of its own, leave one of the two out")
    if workers is not None and workers < 1:
        raise InvalidArgumentError(f"workers={workers} is not a number of workers: give at least 1")
    try:
        import distributed
    except ImportError as error:
        raise MissingDependencyError(
            "running in several processes needs distributed, which is not installed: pip install 'lmprobe-zarr[distributed]'"
        ) from error
    # Not the default of the process: that would stay where no scheduler answers, and every later computation of Dask would wait for it.
    make: Any = partial(distributed.Client, set_as_default=False)
    if address is None:
        local: Any = distributed.LocalCluster
        with local(n_workers=workers, threads_per_worker=1, processes=True, dashboard_address=":0") as cluster, make(cluster) as client:
            yield client
        return
    try:
        client = make(address)
    except (OSError, ValueError) as error:
        raise UnreachableError(f"no scheduler answers at {address!r} ({error}): check the address, and that the scheduler runs") from error
    with client:
        yield client


# -- the runner of sweeps ----------------------------------------------------------------------------------------------------


def parse_runner(client: Client | None = None, scheduler: Any = None, n_workers: Any = None, *, progress: bool = False) -> Runner:
    """Check where tasks are to run.

    Parameters
    ----------
    client : distributed.Client, optional
    scheduler : "threads", "processes" or "synchronous", optional
        Only without a client; threads by default.
    n_workers : int, optional
        Only without a client; one per core by default.
    progress : bool
        Whether a progress bar is shown.

    Raises
    ------
    InvalidTypeError, InvalidArgumentError
        `client` is not a client, the scheduler is unknown, `n_workers` is below 1, or a client is given with one of the others.
    """
    if client is not None and (scheduler is not None or n_workers is not None):
        raise InvalidArgumentError("client was given with scheduler or n_workers: a client has workers of its own, leave the others out")
    if client is not None:
        check_client(client)
    if scheduler is not None and (not isinstance(scheduler, str) or scheduler not in _SCHEDULERS):
        raise InvalidArgumentError(f"scheduler={scheduler!r} is unknown: use {', '.join(map(repr, _SCHEDULERS))}, or a client")
    if n_workers is not None and (isinstance(n_workers, bool) or not isinstance(n_workers, Integral) or n_workers < 1):
        raise InvalidArgumentError(f"n_workers={n_workers!r} is not a number of workers: give at least 1")
    return Runner(client, scheduler or "threads", None if n_workers is None else int(n_workers), progress)


@dataclass(frozen=True, slots=True)
class Runner:
    """Where tasks run; made by `parse_runner`.

    Parameters
    ----------
    client : distributed.Client, optional
    scheduler : "threads", "processes" or "synchronous"
    n_workers : int, optional
    progress : bool
    """

    client: Client | None = None
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
        """Whether tasks share this process's memory."""
        return self.client is None and self.scheduler != "processes"

    @property
    def keeps_order(self) -> bool:
        """Whether tasks start in the given order. Without a client, Dask chooses the order."""
        return self.client is not None

    def run(
        self,
        starts: Sequence[Callable[[], Any]],
        description: str,
        in_flight: int | None = None,
        finished: Callable[[int, Any], None] | None = None,
    ) -> list[Any]:
        """The results of tasks, in the order of the tasks.

        Parameters
        ----------
        starts : sequence of callable
            Each makes a task: a Dask delayed, or what `call` returns. With a client, each is called shortly before its task is submitted.
        description : str
            Of the progress bar.
        in_flight : int, optional
            How many tasks a client holds at a time; two per worker by default.
        finished : callable, optional
            Called with the number and the result of each task that has ended.
        """
        with progress_bar(len(starts), description=description, unit="layer", enabled=self.progress) as advance:

            def end(number: int, result: Any) -> None:
                if finished is not None:
                    finished(number, result)
                advance(1)

            if self.client is not None:
                return self._run_on_client(self.client, starts, 2 * self.workers if in_flight is None else in_flight, end)
            return self._run_here(starts, end)

    @staticmethod
    def _run_on_client(client: Client, starts: Sequence[Callable[[], Any]], in_flight: int, end: Callable[[int, Any], None]) -> list[Any]:
        results: dict[int, Any] = {}
        submits = [partial(_submit, client, start) for start in starts]
        with closing(_as_finished(client, submits, in_flight)) as ended:
            for number, result in ended:
                results[number] = result
                end(number, result)
        return [results[number] for number in range(len(starts))]

    def _run_here(self, starts: Sequence[Callable[[], Any]], end: Callable[[int, Any], None]) -> list[Any]:
        import dask.base
        from dask.callbacks import Callback

        callback: Any = Callback
        compute: Any = dask.base.compute
        tasks = [start() for start in starts]
        numbers: dict[Hashable, int] = {task.key: number for number, task in enumerate(tasks)}

        def posttask(key: Hashable, result: Any, *_: object) -> None:
            if key in numbers:
                end(numbers[key], result)

        with callback(posttask=posttask):
            return list(compute(*tasks, scheduler=self.scheduler, num_workers=self.workers))

    def call(self, function: Callable[..., Any], *arguments: Any, name: str | None = None) -> Any:
        """A task that calls a function.

        Parameters
        ----------
        function : callable
        *arguments
            Values, Dask collections, or what `hand_over` and `hand_over_values` returned.
        name : str, optional
            Different for every task. Without a client, Dask starts similar tasks in the order of their names.
        """
        from dask.delayed import delayed

        if self.client is None:
            return delayed(function, pure=False)(*arguments, dask_key_name=name)
        if any(_is_dask(argument) for argument in arguments):
            return delayed(function, pure=False)(*arguments)
        # Not as a graph of one task, which would take more bytes through the scheduler.
        return self.client.submit(function, *arguments, pure=False)

    def hand_over(self, plan: Any) -> Any:
        """An object that all tasks share, as an argument of `call`; it is sent to the workers once."""
        from dask.delayed import delayed

        return delayed(plan, traverse=False, pure=False) if self.client is None else self.client.submit(_unchanged, plan, pure=False)

    def hand_over_values(self, values: Any) -> Any:
        """Values as an argument of `call`. Plain arguments would be copied through the scheduler, which warns about large ones."""
        if self.client is None or values is None or _is_dask(values):
            return values
        return self.client.scatter(values, hash=False)


def _is_dask(value: Any) -> bool:
    return hasattr(value, "__dask_graph__")


def _submit(client: Client, start: Callable[[], Any]) -> Any:
    task = start()
    return client.compute(task) if _is_dask(task) else task


def _unchanged(value: T) -> T:
    return value
