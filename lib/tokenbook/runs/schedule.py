"""A set of runs: what they are, which are done, and executing the others on an engine."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenbook.runs import device, key, record, store, supervise, warm
from tokenbook.runs.notebooks import Chapter

# Seconds after which a run is taken for hanging, by scale; a run at paper scale may take days.
TIME_LIMITS = {"smoke": 300.0, "small": 1800.0, "paper": None}


@dataclass(frozen=True)
class Run:
    """One chapter with one set of parameters."""

    chapter: Chapter
    key: str
    given: dict[str, Any] = field(hash=False)
    parameters: dict[str, Any] = field(hash=False)

    @property
    def name(self) -> str:
        """CHAPTER/KEY, as in the store."""
        return f"{self.chapter.slug}/{self.key}"


def plan(
    chapter: Chapter,
    given: Iterable[dict[str, Any]],
    device_kind: Callable[[str], str | None] | None = None,
) -> list[Run]:
    """The runs of a chapter for sets of given parameters, all of them checked (ParameterError).

    `device_kind` says what a device parameter means where the runs will be executed, if not here.
    """
    shared, found, kinds = key.fingerprint(chapter), {}, {}
    for values in given:
        resolved = chapter.spec.resolve(values)
        name = resolved.get("device", "cpu")
        if name not in kinds:
            kinds[name] = (device_kind(name) if device_kind else None) or device.kind(name)
        kind = kinds[name]
        run = Run(chapter, key.run_key(shared, resolved, kind), values, resolved)
        found.setdefault(run.key, run)
    return list(found.values())


def jobs_of(
    runs: list[Run], where: str, *, threads: int, timeout: float | None, is_warm: bool
) -> list[dict[str, Any]]:
    """Runs as plain data for `supervise.execute`. `timeout` None: the scale's; 0: none."""
    texts: dict[str, str] = {}
    commits: dict[Path, str | None] = {}
    jobs = []
    for run in runs:
        chapter = run.chapter
        text = texts.setdefault(chapter.slug, chapter.path.read_text("utf-8"))
        if chapter.root not in commits:
            commits[chapter.root] = record.git_commit(chapter.root)
        limit = TIME_LIMITS.get(run.parameters.get("scale", "small")) if timeout is None else timeout
        jobs.append(
            {
                "chapter": chapter.slug,
                "key": run.key,
                "notebook": text,
                "parameters": run.parameters,
                "given": run.given,
                "store": where,
                "root": str(chapter.root),
                "threads": threads,
                "timeout": limit or None,
                "is_warm": is_warm and warm.available(),
                "git_commit": commits[chapter.root],
                "env": {},
            }
        )
    return jobs


def execute_all(
    jobs: list[dict[str, Any]],
    engine: Any,
    done: Callable[[dict[str, Any]], None] | None = None,
    retries: int = 0,
) -> list[dict[str, Any]]:
    """Execute jobs on an engine and return their records in order; `done` is called as each one ends.

    A run that fails is tried again up to `retries` times. On an interrupt the running ones are ended and
    nothing of them is kept.
    """
    ended: queue.SimpleQueue[Future] = queue.SimpleQueue()
    futures: dict[Future, int] = {}
    records: list[Any] = [None] * len(jobs)
    tries = [0] * len(jobs)

    def submit(index: int) -> None:
        future = engine.submit(supervise.execute, jobs[index])
        futures[future] = index
        future.add_done_callback(ended.put)

    try:
        for index in range(len(jobs)):
            submit(index)
        while futures:
            index = futures.pop(future := ended.get())
            record = _record_of(future, jobs[index], engine)
            if record is None:  # lost with its engine, not failed
                submit(index)
                continue
            tries[index] += 1
            if record["status"] != "done" and tries[index] <= retries:
                submit(index)
                continue
            records[index] = record
            if done is not None:
                done(record)
    except BaseException:
        engine.shutdown(wait=True, cancel_futures=True)
        raise
    return records


def _record_of(future: Future, job: dict[str, Any], engine: Any) -> dict[str, Any] | None:
    """The record of an ended run; None if the engine lost it and the run has to be submitted again."""
    try:
        return future.result()
    except supervise.Stopped:
        raise
    except (Exception, CancelledError) as error:
        if engine.recover(error):
            return None
        return supervise.unsaved(job, f"{type(error).__name__}: {error}")


def is_default(entry: dict[str, Any], chapter: Chapter, scale: str = "small") -> bool:
    """Whether a record is of a chapter's default run at a scale."""
    return entry["parameters"] == chapter.spec.resolve({} if scale == "small" else {"scale": scale})


def newest_default(where: store.LocalStore, chapter: Chapter, scale: str = "small") -> dict[str, Any] | None:
    """The newest successful default run of a chapter, preferably of its present state, else None."""
    (current,) = plan(chapter, [{} if scale == "small" else {"scale": scale}])
    entry = where.record(chapter.slug, current.key)
    if entry is not None and entry["status"] == "done":
        return entry
    others = [
        e for e in where.records(chapter.slug) if e["status"] == "done" and is_default(e, chapter, scale)
    ]
    return max(others, key=lambda e: e["finished"], default=None)
