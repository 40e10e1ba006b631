"""One run from its parameters to its record, and all the ways in which it can end."""

import json
import threading
import time

import psutil
import pytest
from process_watch import gone, processes_with

from tokenbook.runs import engines, schedule, supervise

pytestmark = pytest.mark.usefixtures("warm_light")


def job(project, chapter, given=None, timeout=60.0, is_warm=True):
    runs = schedule.plan(chapter, [given or {}])
    return schedule.jobs_of(runs, str(project.store), threads=1, timeout=timeout, is_warm=is_warm)[0]


def failed(project, record):
    """The error of a run that must be kept as failed, with a notebook to look at."""
    assert record["status"] == "failed"
    assert not project.store.is_done("demo", record["key"])
    json.loads(project.store.read("demo", record["key"], "notebook.ipynb"))
    return record["error"]


@pytest.mark.parametrize("is_warm", [True, False])
def test_a_run_leaves_a_record_with_claims_phases_and_provenance(project, is_warm):
    chapter = project.chapter()
    record = supervise.execute(job(project, chapter, {"seed": 3}, is_warm=is_warm))
    assert (record["status"], record["error"]) == ("done", None)
    assert record["given"] == {"seed": 3}
    assert record["parameters"] == {"scale": "small", "seed": 3, "device": "auto", "n": 2}
    (claim,) = record["claims"]
    assert (claim["claim"], claim["measured"], claim["verdict"]) == ("P1", 2.0, "reproduced")
    assert claim["run"] == f"demo/{record['key']}"
    assert record["measurements"]["seed"] == {"value": 3.0, "unit": "count", "interval": None}
    assert set(record["phases"]) == {"opening", "Parameters", "Reproduction", "Results"}
    assert 0 < sum(record["phases"].values()) <= record["seconds"]
    assert record["peak_memory_mib"] > 10
    assert record["versions"]["papermill"]
    assert record["device"]["kind"]
    assert record["device"]["threads"] == 1
    notebook = json.loads(project.store.read("demo", record["key"], "notebook.ipynb"))
    assert str(project.root) not in json.dumps(notebook["metadata"])
    folder = project.store.folder / "demo" / record["key"]
    assert {path.name for path in folder.iterdir()} == {"notebook.ipynb", "record.json"}


def test_a_done_run_is_not_executed_again(project):
    chapter = project.chapter()
    first = supervise.execute(job(project, chapter))
    assert supervise.execute(job(project, chapter)) == first


def test_figures_saved_by_the_chapter_lie_in_the_run_folder(project):
    body = "import os, pathlib\npathlib.Path(os.environ['TOKENBOOK_RUN_DIR'], 'loss.png').write_bytes(b'x')"
    record = supervise.execute(job(project, project.chapter(body=body)))
    assert project.store.read("demo", record["key"], "loss.png") == b"x"


def test_an_exception_is_a_failed_run_that_names_cell_section_and_reason(project):
    chapter = project.chapter(body="1 / 0")
    error = failed(project, supervise.execute(job(project, chapter, {"seed": 1})))
    assert error["section"] == "Reproduction"
    assert error["cell"] == 8  # the seventh of the source, behind the injected parameters
    assert error["reason"] == "ZeroDivisionError: division by zero"
    assert "1 / 0" in error["traceback"]


@pytest.mark.parametrize(
    ("body", "reason", "is_warm"),
    [
        ("import os; os._exit(0)", "exit status 0", True),
        ("import os; os._exit(7)", "exit status 7", False),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL (out of memory?)", True),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV", False),
    ],
)
def test_a_dead_kernel_is_a_failed_run_although_papermill_says_completed(project, body, reason, is_warm):
    record = supervise.execute(job(project, project.chapter(body=body), is_warm=is_warm))
    error = failed(project, record)
    assert error["section"] == "Reproduction"
    assert "the kernel died" in error["reason"]
    assert reason in error["reason"]
    notebook = json.loads(project.store.read("demo", record["key"], "notebook.ipynb"))
    states = {c["metadata"]["papermill"]["status"] for c in notebook["cells"]}
    assert states == {"completed"}  # which is why nobody may believe it


def test_a_kernel_that_dies_after_its_last_reply_has_not_lost_its_run(project):
    chapter = project.chapter(end="import os, threading\nthreading.Timer(0.05, os._exit, [1]).start()")
    assert supervise.execute(job(project, chapter))["status"] in ("done", "failed")
    assert gone(lambda: processes_with(str(project.root)))


def test_leaving_early_is_a_failed_run(project):
    error = failed(project, supervise.execute(job(project, project.chapter(body="import sys; sys.exit(0)"))))
    assert error["section"] == "Reproduction"


def test_a_run_without_its_ledger_is_a_failed_run(project):
    chapter = project.chapter()
    notebook = json.loads(chapter.path.read_text())
    notebook["cells"] = notebook["cells"][:-2]
    chapter.path.write_text(json.dumps(notebook))
    error = failed(project, supervise.execute(job(project, chapter)))
    assert "none displayed the claims ledger" in error["reason"]


@pytest.mark.parametrize("is_warm", [True, False])
def test_a_hanging_run_is_ended_at_its_time_limit_with_all_its_processes(project, is_warm):
    body = "import subprocess, time\nsubprocess.Popen(['sleep', '987'])\ntime.sleep(600)"
    started = time.monotonic()
    record = supervise.execute(job(project, project.chapter(body=body), timeout=12, is_warm=is_warm))
    assert time.monotonic() - started < 30
    error = failed(project, record)
    assert error["reason"] == "ended at its time limit of 12 s"
    assert error["section"] == "Reproduction"
    assert gone(lambda: processes_with(str(project.root)))
    assert not [p for p in psutil.process_iter() if _is_sleep(p)]


def _is_sleep(process):
    try:
        return process.cmdline() == ["sleep", "987"] and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def test_a_kernel_that_holds_the_interpreter_lock_is_ended_too(project):
    body = "import re; re.match('(a+)+$', 'a' * 40 + 'b')"  # hours in C code without releasing the lock
    error = failed(project, supervise.execute(job(project, project.chapter(body=body), timeout=8)))
    assert "time limit" in error["reason"]
    assert gone(lambda: processes_with(str(project.root)))


def test_an_interrupt_ends_running_runs_and_keeps_nothing_of_them(project):
    chapter = project.chapter(body="import time; time.sleep(600)")
    engine = engines.LocalEngine(2)
    runs = schedule.plan(chapter, [{"seed": s} for s in range(4)])
    jobs = schedule.jobs_of(runs, str(project.store), threads=1, timeout=60, is_warm=True)
    threading.Timer(3, engine.stop.set).start()
    with pytest.raises(supervise.Stopped):
        schedule.execute_all(jobs, engine)
    assert list(project.store.records()) == []
    assert gone(lambda: processes_with(str(project.root)))


def test_runs_at_once_keep_their_own_results(project):
    chapter = project.chapter(body="print('seed', P.seed)")
    engine = engines.LocalEngine(2)
    runs = schedule.plan(chapter, [{"seed": s} for s in range(4)])
    jobs = schedule.jobs_of(runs, str(project.store), threads=1, timeout=60, is_warm=True)
    records = schedule.execute_all(jobs, engine)
    engine.shutdown()
    assert [r["parameters"]["seed"] for r in records] == [0, 1, 2, 3]
    for record in records:
        assert record["measurements"]["seed"]["value"] == record["parameters"]["seed"]
        assert (
            f"seed {record['parameters']['seed']}"
            in project.store.read("demo", record["key"], "notebook.ipynb").decode()
        )
