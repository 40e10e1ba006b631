"""Seconds per run of a sweep of trivial runs, and how they grow from 50 to 1,000 runs.

First case: runs that import torch, transformers and seaborn, by plain papermill in a loop, by papermill in
a process pool, and by `tokenbook sweep`'s engine, as many at once as there are cores. Second case: a stub
notebook that imports nothing, 50 runs and 1,000 runs on our engine: time per run, memory and open files of
the process that drives the sweep. Third case: runs that compute for 5 s on one core each, one at a time and
as many at once as there are cores: the note gives the parallel efficiency, time alone over cores times time
together. TOKENBOOK_BENCH_RUNS sets other numbers of runs, e.g. `10,20,40,4`.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import psutil
import torch

from benchmarks import _trivial_project
from benchmarks.harness import Row
from tokenbook.runs import device as machine
from tokenbook.runs import engines, notebooks, schedule, warm

TESTS = ["tests/runs/test_run.py"]
_SIZES = os.environ.get("TOKENBOOK_BENCH_RUNS", "50,50,1000,8").split(",")
HEAVY_RUNS, FEW, MANY, LONG_RUNS = map(int, _SIZES)
LONG = "end = time.thread_time() + 5\nwhile time.thread_time() < end:\n    sum(range(10_000))"


def measure(device: torch.device) -> list[Row]:
    """Rows of all cases, milliseconds per run."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ["TOKENBOOK_ROOT"] = folder
        try:
            path = _trivial_project.make(root)
            ways = {
                f"tokenbook, {machine.cores()} at a time": _ours,
                "papermill in a process pool": _pool,
                "papermill in a loop": _loop,
            }
            for name, way in ways.items():
                seconds = _timed(way, path, root / "heavy", HEAVY_RUNS)
                rows.append(_row("a sweep of runs that import torch", name, HEAVY_RUNS, seconds))
            path = _trivial_project.make(root, imports="import time", body="time.time()")
            for n_runs in (FEW, MANY):
                seconds = _timed(_ours, path, root / f"stub-{n_runs}", n_runs)
                rows.append(
                    _row("a sweep of stub runs", f"tokenbook, {n_runs} runs", n_runs, seconds, _footprint())
                )
            path = _trivial_project.make(root, imports="import time", body=LONG)
            rows += _efficiency(path, root)
        finally:
            warm.template.stop()
            del os.environ["TOKENBOOK_ROOT"]
    return rows


def _efficiency(path: Path, root: Path) -> list[Row]:
    cores, case = machine.cores(), "a sweep of runs of 5 s"
    together = _timed(_ours, path, root / "together", LONG_RUNS)
    alone = _timed(partial(_ours, jobs=1), path, root / "alone", LONG_RUNS)
    note = f"parallel efficiency {alone / (cores * together):.2f} on {cores} cores"
    return [
        _row(case, f"tokenbook, {cores} at a time", LONG_RUNS, together, note),
        _row(case, "tokenbook, one at a time", LONG_RUNS, alone),
    ]


def _ours(path: Path, out: Path, n_runs: int, jobs: int | None = None) -> None:
    runs = schedule.plan(notebooks.Chapter("trivial", path), [{"seed": seed} for seed in range(n_runs)])
    jobs = jobs or machine.cores()
    engine = engines.LocalEngine(jobs)
    plain = schedule.jobs_of(runs, str(out), threads=engines.threads_per_run(jobs), timeout=120, is_warm=True)
    records = schedule.execute_all(plain, engine)
    engine.shutdown()
    if any(record["status"] != "done" for record in records):
        raise RuntimeError("a trivial run failed")


def _pool(path: Path, out: Path, n_runs: int) -> None:
    # Threads as in ours; the pool's processes are fresh ones, as papermill's users have to make them.
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(machine.cores(), mp_context=get_context("spawn")) as pool:
        list(pool.map(_plain, [(str(path), str(out), seed) for seed in range(n_runs)]))
    del os.environ["OMP_NUM_THREADS"]


def _loop(path: Path, out: Path, n_runs: int) -> None:
    for seed in range(n_runs):
        _plain((str(path), str(out), seed))


def _plain(run: tuple[str, str, int]) -> None:
    import papermill

    path, out, seed = run
    Path(out).mkdir(exist_ok=True)
    papermill.execute_notebook(
        path, f"{out}/plain-{seed}.ipynb", parameters={"seed": seed}, progress_bar=False
    )


def _timed(way: Callable[[Path, Path, int], None], path: Path, out: Path, n_runs: int) -> float:
    start = time.perf_counter()
    way(path, out, n_runs)
    return time.perf_counter() - start


def _footprint() -> str:
    process = psutil.Process()
    mib = process.memory_info().rss / 2**20
    return f"driving process: {mib:.0f} MiB resident, {process.num_fds()} open files"


def _row(case: str, name: str, n_runs: int, seconds: float, note: str = "") -> Row:
    per_run = round(1e3 * seconds / n_runs, 1)
    shape = {"runs": n_runs} if case.endswith("torch") else {}
    return Row(case, shape, "", "wall time per run", name, per_run, per_run, per_run, None, None, note)


if __name__ == "__main__":
    for row in measure(torch.device("cpu")):
        print(row, file=sys.stdout)
