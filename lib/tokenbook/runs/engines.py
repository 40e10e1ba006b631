"""Where runs are executed: anything with `concurrent.futures.Executor.submit`.

Engines keep no state: the store alone says what is done.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

from tokenbook.runs import device, supervise


class LocalEngine(Executor):
    """Runs on this machine, `jobs` at a time, each in a process of its own."""

    def __init__(self, jobs: int, watch: Callable[[str, dict[str, Any]], None] | None = None):
        """`watch` is called with a run's `CHAPTER/KEY` and what its process reports."""
        self.jobs, self.stop, self._watch = jobs, threading.Event(), watch
        self._threads = ThreadPoolExecutor(jobs, thread_name_prefix="run")

    def submit(self, fn: Callable[..., Any], /, job: dict[str, Any]) -> Future:
        """Execute `fn(job)` in its turn; `fn` is `supervise.execute`."""
        name = f"{job['chapter']}/{job['key']}"
        watch = None if self._watch is None else lambda event: self._watch(name, event)
        return self._threads.submit(fn, job, self.stop, watch)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Ends running runs too if `cancel_futures`."""
        if cancel_futures:
            self.stop.set()
        self._threads.shutdown(wait, cancel_futures=cancel_futures)


def default_jobs(n_runs: int) -> int:
    """As many runs at once as there are cores."""
    return max(1, min(device.cores(), n_runs))


def threads_per_run(jobs: int) -> int:
    """Cores of the machine shared out among the runs."""
    return max(1, device.cores() // jobs)


__all__ = ["LocalEngine", "default_jobs", "supervise", "threads_per_run"]
