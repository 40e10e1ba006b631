"""The fixed cost of one more run in a sweep: a run of `tokenbook` against plain papermill.

The chapter imports torch, transformers and seaborn, does nothing and shows its ledger. Both execute it with
another seed each time, one run at a time, taking turns; papermill and the template of warm kernels are loaded
before the first run, as they are before the second run of any sweep. The template's start is paid once.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import papermill
import torch

from benchmarks import _trivial_project
from benchmarks.harness import Row
from tokenbook.runs import notebooks, schedule, store, supervise, warm

TESTS = ["tests/runs/test_warm.py"]
ROUNDS = 7
OURS, PLAIN = "tokenbook, warm kernel", "papermill"


def measure(device: torch.device) -> list[Row]:
    """Seconds of a run, ours and plain papermill's, in turns."""
    seconds: dict[str, list[float]] = {OURS: [], PLAIN: []}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        path = _trivial_project.make(root)
        os.environ["TOKENBOOK_ROOT"] = folder
        try:
            start = time.perf_counter()
            warm.fork([sys.executable, "-m", "this"], dict(os.environ), stdout=_null(), stderr=_null()).wait()
            template = time.perf_counter() - start
            for seed in range(ROUNDS):
                seconds[OURS].append(_timed(_ours, path, root, seed))
                seconds[PLAIN].append(_timed(_plain, path, root, seed))
        finally:
            warm.template.stop()
            del os.environ["TOKENBOOK_ROOT"]
    ratio = statistics.median(seconds[PLAIN]) / statistics.median(seconds[OURS])
    notes = {
        OURS: f"{ratio:.1f} times less; its template starts once, in {template:.1f} s",
        PLAIN: "in one process",
    }
    return [_row(name, values, notes[name]) for name, values in seconds.items()]


def _ours(path: Path, root: Path, seed: int) -> None:
    (run,) = schedule.plan(notebooks.Chapter("trivial", path), [{"seed": seed}])
    (job,) = schedule.jobs_of([run], str(root / "runs"), threads=1, timeout=120, is_warm=True)
    record = supervise.execute(job)
    if record["status"] != "done":
        raise RuntimeError(record["error"]["reason"])
    store.open_store(root / "runs").read("trivial", run.key, store.NOTEBOOK)


def _plain(path: Path, root: Path, seed: int) -> None:
    out = root / f"plain-{seed}.ipynb"
    papermill.execute_notebook(path, out, parameters={"seed": seed}, progress_bar=False)


def _timed(run, *arguments) -> float:
    start = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - start


def _null() -> int:
    return os.open(os.devnull, os.O_WRONLY)


def _row(name: str, values: list[float], note: str) -> Row:
    low, median, high = (round(1e3 * q, 1) for q in statistics.quantiles(values, n=4))
    return Row(
        "one more run", {"runs": len(values)}, "", "wall time", name, median, low, high, None, None, note
    )
