"""Runs on a real Dask scheduler and real worker processes on the loopback interface."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest
from process_watch import gone, processes_with

from tokenbook.runs import console, engines, schedule

LIGHT = "ipykernel.ipkernel,ipykernel.kernelapp,papermill.execute"


class Cluster:
    """A scheduler and its workers as processes of the operating system."""

    def __init__(self, folder):
        self.folder, self.processes = folder, []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"tcp://127.0.0.1:{self.port}"
        self.scheduler = self.start_scheduler()

    def _start(self, *arguments):
        env = {**os.environ, "TOKENBOOK_PRELOAD": LIGHT, "DASK_DISTRIBUTED__DEATH_TIMEOUT": "60"}
        log = open(self.folder / f"log-{len(self.processes)}", "wb")  # noqa: SIM115 - the process's own
        command = [sys.executable, "-m", "distributed.cli." + arguments[0], *arguments[1:], "--no-dashboard"]
        process = subprocess.Popen(command, env=env, cwd=self.folder, stdout=log, stderr=log)
        self.processes.append(process)
        return process

    def start_scheduler(self):
        return self._start("dask_scheduler", "--host", "127.0.0.1", "--port", str(self.port))

    def start_worker(self):
        options = ("--nthreads", "1", "--no-nanny", "--local-directory", str(self.folder), "--reconnect")
        return self._start("dask_worker", self.address, *options[:-1])

    def stop(self):
        for process in self.processes:
            process.kill()
            process.wait(10)


@pytest.fixture
def cluster(project, tmp_path_factory):
    found = Cluster(tmp_path_factory.mktemp("cluster"))
    yield found
    found.stop()


def planned(project, seeds):
    return schedule.plan(project.chapter(body=project.body), [{"seed": s} for s in seeds])


def sweep(project, cluster, seeds=range(3), **options):
    return console.execute(
        planned(project, seeds),
        project.store,
        console.Options(scheduler=cluster.address, timeout=120, **options),
    )


def test_a_sweep_runs_on_the_workers_and_resumes(project, cluster):
    project.body = "import os; print(os.getpid())"
    cluster.start_worker()
    cluster.start_worker()
    records = sweep(project, cluster)
    assert [r["status"] for r in records] == ["done"] * 3
    assert [r["parameters"]["seed"] for r in records] == [0, 1, 2]
    assert sweep(project, cluster) == records


def test_a_crash_does_not_take_the_worker_along(project, cluster):
    project.body = "import os\nif P.seed == 1: os._exit(9)"
    worker = cluster.start_worker()
    with pytest.raises(console.Failure, match="exit status 9"):
        sweep(project, cluster)
    assert worker.poll() is None
    assert sorted(r["status"] for r in project.store.records()) == ["done", "done", "failed"]


def test_a_worker_killed_in_the_middle_of_a_run_loses_nothing(project, cluster):
    marker = project.root / "first-try"
    project.body = f"""import os, time
if P.seed == 0 and not os.path.exists({str(marker)!r}):
    open({str(marker)!r}, 'w').close()
    time.sleep(600)"""
    worker = cluster.start_worker()
    done = []
    thread = threading.Thread(target=lambda: done.append(sweep(project, cluster)))
    thread.start()
    assert gone(lambda: not marker.exists(), 90)
    worker.send_signal(signal.SIGKILL)
    worker.wait(10)
    assert gone(lambda: [p for p in processes_with(str(project.root)) if "execute" in " ".join(p.cmdline())])
    cluster.start_worker()
    thread.join(120)
    assert [r["status"] for r in done[0]] == ["done"] * 3
    assert len(list(project.store.records())) == 3


def test_a_restarted_scheduler_loses_nothing(project, cluster):
    project.body = f"import time; open({str(project.root)!r} + f'/began-{{P.seed}}', 'w'); time.sleep(2)"
    cluster.start_worker()
    done = []
    thread = threading.Thread(target=lambda: done.append(sweep(project, cluster)))
    thread.start()
    assert gone(lambda: not (project.root / "began-0").exists(), 90)
    cluster.scheduler.kill()
    cluster.scheduler.wait(10)
    time.sleep(1)
    cluster.start_scheduler()
    cluster.start_worker()
    thread.join(150)
    assert [r["status"] for r in done[0]] == ["done"] * 3
    assert len(list(project.store.records())) == 3


def test_a_scheduler_that_does_not_answer_is_said_in_one_sentence():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines.DaskEngine, "_connect", lambda self, seconds: engines_connect(self, 1.0))
        with pytest.raises(engines.EngineError, match="no Dask scheduler answers"):
            engines.DaskEngine(address)
    assert psutil.Process().is_running()


engines_connect = engines.DaskEngine._connect
