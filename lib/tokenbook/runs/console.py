"""Executing runs for somebody who watches: progress on a terminal, silence elsewhere, a summary."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

import click
from tqdm import tqdm

from tokenbook.runs import engines, schedule, store, warm


class Failure(click.ClickException):
    """Something that was asked for did not succeed: exit status 1."""

    exit_code = 1


class Progress:
    """Runs done of all, the elapsed time, and for every running chapter its cell and section."""

    def __init__(self, total: int):
        self._running: dict[str, str] = {}
        self._lock, self._started = threading.Lock(), time.monotonic()
        self._bar = tqdm(
            total=total,
            unit="run",
            disable=not sys.stderr.isatty(),
            leave=False,
            bar_format="{n_fmt}/{total_fmt} runs [{elapsed}] {desc}",
        )

    def event(self, run: str, event: dict[str, Any]) -> None:
        """A run's process has begun a cell."""
        if "cell" in event:
            with self._lock:
                chapter = run.partition("/")[0]
                self._running[run] = f"{chapter} {event['cell']}/{event['of']} {event['section']}"
                self._bar.set_description_str(" | ".join(self._running.values())[:150])

    def tick(self) -> None:
        """Redraw the elapsed time."""
        with self._lock:
            self._bar.refresh()

    def done(self, record: dict[str, Any]) -> None:
        """A run has ended."""
        with self._lock:
            name = f"{record['chapter']}/{record['key']}"
            self._running.pop(name, None)
            self._bar.set_description_str(" | ".join(self._running.values())[:150])
            self._bar.update(1)
            if record["status"] == "done" and not self._bar.disable:
                self._bar.write(f"done    {name}  {record['seconds']:.1f} s", file=sys.stderr)

    def close(self) -> None:
        """Take the line away."""
        self._bar.close()


def failures(records: list[dict[str, Any]], location: Any) -> str:
    """A table of what failed: in which cell, why, and where its notebook lies."""
    lines = []
    for record in records:
        error = record["error"]
        where = (
            f"cell {error['cell']}, section {error['section']!r}"
            if error["cell"]
            else "before the first cell"
        )
        lines.append(f"failed  {record['chapter']}/{record['key']}  {where}")
        lines.append(
            f"        {click.unstyle(error['reason']).splitlines()[0] if error['reason'] else 'no reason'}"
        )
        lines.append(f"        {location(record['chapter'], record['key'])}/notebook.ipynb")
    return "\n".join(lines)


def execute(
    runs: list[schedule.Run],
    target: store.LocalStore,
    jobs: int | None = None,
    timeout: float | None = None,
    force: bool = False,
    keep_going: bool = False,
) -> list[dict[str, Any]]:
    """Execute the runs that are not done and return the records of all, in order.

    Raises Failure with a table if any failed; `keep_going` only prints the table. `force` executes done runs
    again.
    """
    target.check_writable()
    target.sweep_scratch()
    if force:
        for item in runs:
            target.forget(item.chapter.slug, item.key)
    waiting = [item for item in runs if not target.is_done(item.chapter.slug, item.key)]
    if waiting:
        _execute(waiting, target, jobs or engines.default_jobs(len(waiting)), timeout)
    records = [target.record(item.chapter.slug, item.key) for item in runs]
    failed = [record for record in records if record["status"] != "done"]
    n_old, n_new = len(runs) - len(waiting), len(waiting) - len(failed)
    noun = "run" if len(runs) == 1 else "runs"
    click.echo(f"{len(runs)} {noun}: {n_old} already done, {n_new} executed, {len(failed)} failed.", err=True)
    if failed:
        table = failures(failed, target.location)
        if not keep_going:
            raise Failure("\n" + table)
        click.echo(table, err=True)
    return records


def _execute(waiting: list[schedule.Run], target: store.LocalStore, jobs: int, timeout: float | None) -> None:
    display = Progress(len(waiting))
    engine = engines.LocalEngine(jobs, display.event)
    try:
        plain = schedule.jobs_of(
            waiting,
            str(target),
            threads=engines.threads_per_run(jobs),
            timeout=timeout,
            # The template costs about as much as one cold start.
            is_warm=len(waiting) > 1 or warm.template.pid is not None,
        )
        schedule.execute_all(plain, engine, display.done)
    finally:
        engine.shutdown()
        display.close()
