"""Where runs are executed: anything with `concurrent.futures.Executor.submit`.

Engines keep no state: the store alone says what is done, and every engine resumes alike.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from typing import Any

from tokenbook.runs import device, supervise


class EngineError(RuntimeError):
    """An engine that cannot be reached: one sentence for people."""


class LocalEngine(Executor):
    """Runs on this machine, `jobs` at a time, each in a process of its own."""

    def __init__(
        self,
        jobs: int,
        watch: Callable[[str, dict[str, Any]], None] | None = None,
        gpus: list[str] | None = None,
    ):
        """`watch` gets a run's `CHAPTER/KEY` and what its process reports; `gpus`: one for each job."""
        self.jobs, self.stop, self._watch = jobs, threading.Event(), watch
        self._threads = ThreadPoolExecutor(jobs, thread_name_prefix="run")
        self._gpus: queue.SimpleQueue[str] = queue.SimpleQueue()
        for gpu in gpus or []:
            self._gpus.put(gpu)
        self._has_gpus = bool(gpus)

    def submit(self, fn: Callable[..., Any], /, job: dict[str, Any]) -> Future:
        """Execute `fn(job)` in its turn; `fn` is `supervise.execute`."""
        return self._threads.submit(self._call, fn, job)

    def _call(self, fn: Callable[..., Any], job: dict[str, Any]) -> Any:
        name = f"{job['chapter']}/{job['key']}"
        watch = None if self._watch is None else lambda event: self._watch(name, event)
        if not self._has_gpus:
            return fn(job, self.stop, watch)
        gpu = self._gpus.get()
        try:
            return fn({**job, "env": {**job["env"], "CUDA_VISIBLE_DEVICES": gpu}}, self.stop, watch)
        finally:
            self._gpus.put(gpu)

    def recover(self, error: BaseException) -> bool:
        """Whether a run that ended with `error` should be submitted again."""
        return False

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Ends running runs too if `cancel_futures`."""
        if cancel_futures:
            self.stop.set()
        self._threads.shutdown(wait, cancel_futures=cancel_futures)


class DaskEngine(Executor):
    """Runs on the workers of a Dask cluster, one for each of their threads."""

    RECONNECT_SECONDS = 120.0

    def __init__(self, address: str):
        """`address`: of the scheduler, e.g. `tcp://host:8786`. EngineError if it does not answer."""
        self.address, self._client = address, None
        self._connect(10.0)

    def _connect(self, seconds: float) -> None:
        from distributed import Client

        deadline = time.monotonic() + seconds
        while True:
            try:
                self._client = Client(self.address, timeout="5s", set_as_default=False)
                self._executor = self._client.get_executor(pure=False)
                return
            except (OSError, TimeoutError, ValueError) as error:
                if time.monotonic() > deadline or isinstance(error, ValueError):
                    reason = str(error).splitlines()[0]
                    raise EngineError(f"no Dask scheduler answers at {self.address}: {reason}") from error
                time.sleep(0.5)

    def slots(self) -> int:
        """Runs at once: threads of all workers."""
        return sum(self._client.nthreads().values())

    def device_kind(self, name: str) -> str | None:
        """What the device parameter `name` means on the workers; None while there is no worker."""
        workers = list(self._client.nthreads())
        return self._client.run(device.kind, name, workers=workers[:1])[workers[0]] if workers else None

    def submit(self, fn: Callable[..., Any], /, job: dict[str, Any]) -> Future:
        """Execute `fn(job)` on a worker."""
        return self._executor.submit(_on_worker, fn, job)

    def recover(self, error: BaseException) -> bool:
        """After the loss of the scheduler, wait until it is back; then its runs are submitted again."""
        from distributed.comm.core import CommClosedError

        if not isinstance(error, CancelledError | CommClosedError):
            return False
        if self._client.status != "running" or not self._answers():
            self._client.close(timeout=1)
            self._connect(self.RECONNECT_SECONDS)
        return True

    def _answers(self) -> bool:
        try:
            self._client.nthreads()
            return True
        except (OSError, TimeoutError):
            return False

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Leave the cluster; runs that nobody wants any more are ended by their workers."""
        if self._client.status == "running":
            self._executor.shutdown(wait=wait and not cancel_futures)  # without waiting it cancels
        self._client.close(timeout=5)


class _TaskGone:
    """Set when the scheduler no longer wants the task that asks."""

    def __init__(self, worker: Any, key: str):
        self.worker, self.key = worker, key

    def is_set(self) -> bool:
        task = self.worker.state.tasks.get(self.key)
        return task is None or task.state not in ("executing", "long-running")


def _on_worker(fn: Callable[..., Any], job: dict[str, Any]) -> Any:
    """A task on a Dask worker: the run is a child process, so that its crash never takes the worker along."""
    from distributed import get_worker

    worker = get_worker()
    threads = job["threads"] or max(1, device.cores() // worker.state.nthreads)
    return fn({**job, "threads": threads}, _TaskGone(worker, worker.get_current_task()))


def default_jobs(n_runs: int, needs_gpu: bool = False) -> int:
    """As many runs at once as there are cores, or GPUs where the runs need one."""
    return max(1, min(len(device.gpus()) if needs_gpu else device.cores(), n_runs))


def threads_per_run(jobs: int) -> int:
    """Cores of the machine shared out among the runs."""
    return max(1, device.cores() // jobs)


__all__ = ["DaskEngine", "EngineError", "LocalEngine", "default_jobs", "supervise", "threads_per_run"]
