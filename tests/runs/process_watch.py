"""Which processes a test has left behind."""

import os
import time

import psutil


def processes_with(text: str) -> list[psutil.Process]:
    """Processes whose command line, environment or working directory names `text`."""
    found = []
    for process in psutil.process_iter():
        try:
            facts = [*process.cmdline(), process.cwd(), *process.environ().values()]
        except (psutil.Error, OSError):
            continue
        if process.pid != os.getpid() and any(text in fact for fact in facts):
            found.append(process)
    return found


def gone(condition, seconds=15.0):
    """Whether `condition()` becomes empty within some seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not condition():
            return True
        time.sleep(0.1)
    return not condition()
