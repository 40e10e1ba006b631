"""One run from start to finish: its process started, watched, ended in time, and its result published.

`execute` is what engines submit: it takes plain data, keeps no state but the store's, and never raises for a
run that fails; whatever happens to the run's process, a failed run says in which cell, why, and leaves its
notebook.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from tokenbook import papers
from tokenbook.runs import record, store, warm

POLL_SECONDS = 0.1
EVENTS, REQUEST, SOURCE, LOG = "events.jsonl", "request.json", "source.ipynb", "log.txt"


class Stopped(RuntimeError):
    """The run was ended because the command was interrupted: it leaves nothing and starts anew next time."""


def execute(
    job: dict[str, Any],
    stop: threading.Event | None = None,
    watch: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Execute one run, unless it is done, and return its record.

    `job`: chapter, key, notebook (its text), parameters, given, store, root, threads, timeout, is_warm,
    git_commit and env. `stop` ends the run early (Stopped). `watch` gets the events of the run's process.
    """
    target = store.open_store(job["store"])
    chapter, key = job["chapter"], job["key"]
    if target.is_done(chapter, key):
        return target.record(chapter, key)
    with target.scratch(chapter, key) as scratch:
        started, clock = record.now(), time.perf_counter()
        request = _request(job, scratch)
        (scratch / SOURCE).write_text(job["notebook"], "utf-8")
        (scratch / REQUEST).write_text(json.dumps(request), "utf-8")
        process = _start(job, request, scratch)
        try:
            reason = _watch(process, scratch, job["timeout"], stop, watch)
        finally:
            _end(process, scratch)
        try:
            if store.read_record(scratch / store.RECORD) is None:
                seconds = time.perf_counter() - clock
                _write_failure(request, scratch, started, seconds, reason or _died(process))
            return _publish(target, scratch, chapter, key)
        except OSError as error:  # the disk is full, or the store has gone: the sweep goes on and says so
            return unsaved(request, f"the run could not be stored: {error}")


def unsaved(job: dict[str, Any], reason: str) -> dict[str, Any]:
    """The record of a failed run that left nothing in the store."""
    error = {"cell": None, "section": None, "reason": reason, "traceback": ""}
    return record.build({"threads": 0, **job}, record.now(), 0.0, error) | {"unsaved": True}


def _publish(target: Any, scratch: Path, chapter: str, key: str) -> dict[str, Any]:
    is_done = store.read_record(scratch / store.RECORD)["status"] == "done"
    for name in (EVENTS, REQUEST, SOURCE, *([LOG] if is_done else [])):
        (scratch / name).unlink(missing_ok=True)
    return target.publish(scratch, chapter, key)


def _request(job: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """What the run's process has to know."""
    threads = str(job["threads"])
    # On a cluster the project may lie elsewhere than where the sweep was started.
    root = job["root"] if Path(job["root"]).is_dir() else str(papers.project_root())
    env = {
        "TOKENBOOK_RUN": f"{job['chapter']}/{job['key']}",
        "TOKENBOOK_RUN_DIR": str(scratch),
        "TOKENBOOK_ROOT": root,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        **job["env"],
    }
    kept = ("chapter", "key", "parameters", "given", "threads", "git_commit")
    return {
        **{name: job[name] for name in kept},
        "env": env,
        "cwd": root,
        "provisioner": "tokenbook-warm" if job["is_warm"] else "local-provisioner",
        "supervisor": os.getpid(),
    }


def _start(job: dict[str, Any], request: dict[str, Any], scratch: Path) -> Any:
    """Start the run's process, forked from the template or cold."""
    argv = [sys.executable, "-m", "tokenbook.runs.execute", str(scratch)]
    env = {name: text for name, text in os.environ.items() if name != warm.TEMPLATE_ENV}
    with open(scratch / LOG, "wb") as log:
        if job["is_warm"]:
            address = warm.template.address()
            env[warm.TEMPLATE_ENV] = address
            try:
                return warm.fork(argv, env, str(scratch), log.fileno(), log.fileno(), address)
            except warm.TemplateError:
                request["provisioner"] = "local-provisioner"
                (scratch / REQUEST).write_text(json.dumps(request), "utf-8")
                del env[warm.TEMPLATE_ENV]
        return subprocess.Popen(
            argv,
            env=env,
            cwd=scratch,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _watch(process: Any, scratch: Path, timeout: float | None, stop: Any, watch: Any) -> str | None:
    """Wait for the end of the run's process; returns the reason if it had to be ended."""
    clock, seen = time.perf_counter(), 0
    while True:
        try:
            process.wait(POLL_SECONDS)
            return None
        except subprocess.TimeoutExpired:
            pass
        if stop is not None and stop.is_set():
            raise Stopped("interrupted")
        if timeout and time.perf_counter() - clock > timeout:
            return f"ended at its time limit of {timeout:g} s"
        if watch is not None:
            events = _events(scratch)
            for event in events[seen:]:
                watch(event)
            seen = len(events)


def _events(scratch: Path) -> list[dict[str, Any]]:
    try:
        lines = (scratch / EVENTS).read_text("utf-8").splitlines()
    except FileNotFoundError:
        return []
    events = []
    for line in lines:
        with contextlib.suppress(ValueError):  # the last line may be half written
            events.append(json.loads(line))
    return events


def _end(process: Any, scratch: Path) -> None:
    """End whatever is left of a run: its process, its kernel, and what either of them started."""
    groups = {process.pid}
    for event in _events(scratch):
        if "kernel" in event:
            groups.add(event["kernel"])
    descendants = []
    for pid in groups:
        with contextlib.suppress(psutil.NoSuchProcess):
            descendants += psutil.Process(pid).children(recursive=True)
    for pid in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
    for child in descendants:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait()


def _died(process: Any) -> str:
    status = process.returncode
    if status == 255:
        return "the template that the run was forked from has died"
    how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
    return f"the run's process {how} before the run was finished"


def _write_failure(request: dict[str, Any], scratch: Path, started: str, seconds: float, reason: str) -> None:
    """The record of a run whose process could not write it."""
    cells = [event for event in _events(scratch) if "cell" in event]
    log = (scratch / LOG).read_text("utf-8", errors="replace")[-4000:] if (scratch / LOG).exists() else ""
    last = cells[-1] if cells else {}
    error = {"cell": last.get("cell"), "section": last.get("section"), "reason": reason, "traceback": log}
    entry = record.build(request, started, seconds, error)
    try:
        record.add_results(entry, json.loads((scratch / store.NOTEBOOK).read_text("utf-8")))
    except (FileNotFoundError, ValueError):  # never written, or cut off while it was
        (scratch / store.NOTEBOOK).write_bytes((scratch / SOURCE).read_bytes())
    store.write_record(scratch, entry)
