"""What a sweep survives, with nothing lost and nothing counted twice."""

import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
from process_watch import gone, processes_with

from tokenbook.runs import engines, schedule, store, supervise

ENVIRONMENT = {"TOKENBOOK_PRELOAD": "ipykernel.ipkernel,ipykernel.kernelapp,papermill.execute"}


def jobs(project, chapter, seeds, timeout=90, is_warm=True):
    runs = schedule.plan(chapter, [{"seed": s} for s in seeds])
    return schedule.jobs_of(runs, str(project.store), threads=1, timeout=timeout, is_warm=is_warm)


def test_one_bad_run_leaves_its_siblings_alone(project, warm_light):
    body = """import os, time
if P.seed == 0: os._exit(1)
if P.seed == 1: time.sleep(600)
if P.seed == 2: 1 / 0"""
    engine = engines.LocalEngine(2)
    records = schedule.execute_all(jobs(project, project.chapter(body=body), range(5), timeout=12), engine)
    engine.shutdown()
    assert [r["status"] for r in records] == ["failed", "failed", "failed", "done", "done"]
    reasons = [r["error"]["reason"] for r in records[:3]]
    assert "exit status 1" in reasons[0]
    assert "time limit" in reasons[1]
    assert "ZeroDivisionError" in reasons[2]
    assert len(list(project.store.records())) == 5


def test_a_kernel_that_prints_a_hundred_megabytes_is_done_and_its_notebook_stays_small(project, warm_light):
    body = "for _ in range(1000): print('x' * 100_000)"
    (record,) = [supervise.execute(job) for job in jobs(project, project.chapter(body=body), [0])]
    assert record["status"] == "done", record["error"]
    content = project.store.read("demo", record["key"], "notebook.ipynb")
    assert len(content) < 3_000_000
    assert b"characters left out" in content


def test_a_disk_that_is_full_while_the_notebook_is_written(project):
    body = "print('x' * 700_000)"
    (job,) = jobs(project, project.chapter(body=body), [0], is_warm=False)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # no file may grow beyond this, in this process and in its children
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
        record = supervise.execute(job)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert record["status"] == "failed"
    assert "File too large" in record["error"]["reason"] + record["error"]["traceback"]
    assert not project.store.is_done("demo", job["key"])
    assert supervise.execute(job)["status"] == "done"  # with room again


def test_a_store_that_vanishes_fails_the_run_and_not_the_sweep(project, warm_light, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    plain = jobs(project, project.chapter(), range(2))
    monkeypatch.setattr(store.LocalStore, "publish", full)
    engine = engines.LocalEngine(1)
    records = schedule.execute_all(plain, engine)
    engine.shutdown()
    assert [r["status"] for r in records] == ["failed", "failed"]
    assert all("No space left on device" in r["error"]["reason"] for r in records)
    assert not list(project.store.records())


@pytest.mark.parametrize("damage", ["cut", "older"])
def test_a_damaged_or_older_run_folder_is_executed_again(project, warm_light, damage):
    (job,) = jobs(project, project.chapter(), [0])
    record = supervise.execute(job)
    path = project.store.folder / "demo" / job["key"] / "record.json"
    text = path.read_text()
    path.write_text(text[: len(text) // 2] if damage == "cut" else json.dumps({**record, "format": 0}))
    again = supervise.execute(job)
    assert again["status"] == "done"
    assert again["started"] > record["started"]
    assert project.store.record("demo", job["key"]) == again
    assert len(list(project.store.records())) == 1


def command(project, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "tokenbook.cli", "sweep", "demo", "-g", "seed=0:4", *arguments],
        env={**os.environ, **ENVIRONMENT, "MARK_OF_THE_TEST": str(project.root)},
        cwd=project.root,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_sweep_leaves_no_process_and_goes_on_where_it_was(project):
    slow = project.root / "slow"
    slow.touch()
    body = f"import os, time\nif P.seed >= 2 and os.path.exists({str(slow)!r}): time.sleep(600)"
    project.chapter(body=body)
    process = command(project, "--jobs", "2")
    assert gone(lambda: len(list(project.store.records())) < 2, 120)
    time.sleep(1)
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    assert gone(lambda: processes_with(str(project.root)), 10)
    before = {r["key"]: r for r in project.store.records()}
    assert len(before) == 2
    slow.unlink()
    process = command(project, "--jobs", "2")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "4 runs: 2 already done, 2 executed, 0 failed." in err
    after = {r["key"]: r for r in project.store.records()}
    assert {key: after[key] for key in before} == before
    assert not list(project.store.folder.glob(".running/*/*"))


def test_two_sweeps_of_the_same_runs_at_once_give_one_result_each(project):
    project.chapter(body="import time; time.sleep(0.5)")
    both = [command(project, "--jobs", "2") for _ in range(2)]
    for process in both:
        _, err = process.communicate(timeout=150)
        assert process.returncode == 0, err
    records = list(project.store.records())
    assert sorted(r["parameters"]["seed"] for r in records) == [0, 1, 2, 3]
    for record in records:
        notebook = json.loads(project.store.read("demo", record["key"], "notebook.ipynb"))
        assert notebook["metadata"]["papermill"]["start_time"] > record["started"]
        assert notebook["metadata"]["papermill"]["end_time"] < record["finished"]
