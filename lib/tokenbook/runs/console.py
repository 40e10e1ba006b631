"""Executing runs for somebody who watches: progress on a terminal, silence elsewhere, a summary."""

from __future__ import annotations

import math
import sys
import threading
from dataclasses import dataclass
from typing import Any

import click
from tqdm import tqdm

from tokenbook.runs import device, engines, schedule, store, warm


class Failure(click.ClickException):
    """Something that was asked for did not succeed: exit status 1."""

    exit_code = 1


class Progress:
    """Runs done of all, elapsed and remaining time, and for every running chapter its cell and section."""

    def __init__(self, total: int, slots: int):
        self._running: dict[str, str] = {}
        self._seconds: list[float] = []
        self._total, self._slots = total, slots
        self._lock = threading.Lock()
        self._bar = tqdm(
            total=total,
            unit="run",
            disable=not sys.stderr.isatty(),
            leave=False,
            bar_format="{n_fmt}/{total_fmt} runs [{elapsed}{postfix}] {desc}",
        )

    def event(self, run: str, event: dict[str, Any]) -> None:
        """A run's process has begun a cell."""
        if "cell" in event:
            with self._lock:
                chapter = run.partition("/")[0]
                self._running[run] = f"{chapter} {event['cell']}/{event['of']} {event['section']}"
                self._bar.set_description_str(" | ".join(self._running.values())[:150])

    def done(self, record: dict[str, Any]) -> None:
        """A run has ended."""
        with self._lock:
            name = f"{record['chapter']}/{record['key']}"
            self._running.pop(name, None)
            self._seconds.append(record["seconds"])
            self._bar.set_description_str(" | ".join(self._running.values())[:150], refresh=False)
            self._bar.set_postfix_str(self.remaining(), refresh=False)
            self._bar.update(1)
            if record["status"] == "done" and not self._bar.disable:
                self._bar.write(f"done    {name}  {record['seconds']:.1f} s", file=sys.stderr)

    def remaining(self) -> str:
        """Time left, from the mean of the runs that have ended; nothing is claimed before there are two."""
        left = self._total - len(self._seconds)
        if len(self._seconds) < 2 or not left:
            return ""
        return f"about {duration(estimate(left, self._slots, sum(self._seconds) / len(self._seconds)))} left"

    def close(self) -> None:
        """Take the line away."""
        self._bar.close()


def estimate(n_runs: int, slots: int, seconds_per_run: float) -> float:
    """Seconds that so many runs take, `slots` at a time."""
    return math.ceil(n_runs / max(1, slots)) * seconds_per_run


def duration(seconds: float) -> str:
    """Seconds for people: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def failures(records: list[dict[str, Any]], location: Any) -> str:
    """A table of what failed: in which cell, why, and where its notebook lies."""
    lines = []
    for record in records:
        error, name = record["error"], f"{record['chapter']}/{record['key']}"
        where = (
            f"cell {error['cell']}, section {error['section']!r}" if error["cell"] else "outside its cells"
        )
        given = ", ".join(f"{key}={value}" for key, value in record["given"].items())
        lines.append(f"failed  {name}  {where}" + (f"  ({given})" if given else ""))
        lines.append(f"        {(error['reason'] or 'no reason').splitlines()[0]}")
        if not record.get("unsaved"):
            lines.append(f"        {location(record['chapter'], record['key'])}/{store.NOTEBOOK}")
    return "\n".join(lines)


@dataclass
class Options:
    """How runs are executed: see the options of `tokenbook sweep`."""

    jobs: int | None = None
    timeout: float | None = None
    retries: int = 0
    scheduler: str | None = None
    force: bool = False
    keep_going: bool = False


def execute(runs: list[schedule.Run], target: Any, options: Options) -> list[dict[str, Any]]:
    """Execute the runs that are not done and return the records of all, in order.

    Raises Failure with a table if any failed; with `keep_going` the table is only printed.
    """
    target.check_writable()
    target.sweep_scratch()
    if options.force:
        for item in runs:
            target.forget(item.chapter.slug, item.key)
    found = {item.key: target.record(item.chapter.slug, item.key) for item in runs}
    found = {key: entry for key, entry in found.items() if entry is not None and entry["status"] == "done"}
    waiting = [item for item in runs if item.key not in found]
    fresh = _execute(waiting, target, options) if waiting else []
    found |= {entry["key"]: entry for entry in fresh}
    failed = [entry for entry in fresh if entry["status"] != "done"]
    n_old, n_new = len(runs) - len(waiting), len(waiting) - len(failed)
    noun = "run" if len(runs) == 1 else "runs"
    click.echo(f"{len(runs)} {noun}: {n_old} already done, {n_new} executed, {len(failed)} failed.", err=True)
    if failed:
        table = failures(failed, target.location)
        if not options.keep_going:
            raise Failure("\n" + table)
        click.echo(table, err=True)
    return [found[item.key] for item in runs]


def preview(runs: list[schedule.Run], target: Any, jobs: int | None) -> None:
    """Say how many runs a sweep has, how many are done, and how long the others take, as far as known."""
    records = [target.record(item.chapter.slug, item.key) for item in runs]
    n_done = sum(1 for entry in records if entry is not None and entry["status"] == "done")
    n_failed = sum(1 for entry in records if entry is not None and entry["status"] != "done")
    left = len(runs) - n_done
    click.echo(f"{len(runs)} runs: {n_done} done, {left} to execute ({n_failed} of them failed before).")
    slug, scale = runs[0].chapter.slug, runs[0].parameters.get("scale")
    known = [
        entry["seconds"]
        for entry in target.records(slug)
        if entry["status"] == "done" and entry["parameters"].get("scale") == scale
    ]
    slots = jobs or engines.default_jobs(max(1, left))
    if not known:
        click.echo("No run of this chapter and scale is in the store, so the time is not known.")
    elif left:
        mean = sum(known) / len(known)
        total = duration(estimate(left, slots, mean))
        click.echo(f"About {total}, {slots} at a time: {len(known)} runs took {mean:.1f} s on average.")


def _execute(waiting: list[schedule.Run], target: Any, options: Options) -> list[dict[str, Any]]:
    if options.scheduler:
        engine: Any = engines.DaskEngine(options.scheduler)
        jobs, threads = engine.slots(), 0
        display = Progress(len(waiting), jobs)
    else:
        needs_gpu = any(device.kind(r.parameters.get("device", "cpu")).startswith("cuda") for r in waiting)
        jobs = options.jobs or engines.default_jobs(len(waiting), needs_gpu)
        threads = engines.threads_per_run(jobs)
        display = Progress(len(waiting), jobs)
        engine = engines.LocalEngine(jobs, display.event, device.gpu_ids()[:jobs] if needs_gpu else None)
    try:
        # The template costs about as much as one cold start.
        is_warm = len(waiting) > 1 or warm.template.pid is not None
        plain = schedule.jobs_of(
            waiting, str(target), threads=threads, timeout=options.timeout, is_warm=is_warm
        )
        return schedule.execute_all(plain, engine, display.done, options.retries)
    finally:
        engine.shutdown()
        display.close()
