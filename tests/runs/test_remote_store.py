"""The store behind an S3 API, on a real server in a process of its own."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from tokenbook.runs import schedule, store, supervise, table

s3fs = pytest.importorskip("s3fs", reason="the extra `s3` is not installed")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Address of an S3 server on the loopback interface."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = open(tmp_path_factory.mktemp("moto") / "log", "wb")  # noqa: SIM115 - the server's
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=log, stderr=log)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.2)
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(10)
    log.close()


@pytest.fixture
def place(server, monkeypatch, tmp_path):
    """A fresh bucket as a store."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    bucket = f"book-{tmp_path.name.replace('_', '-').lower()}"[:60].strip("-")
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir(bucket)
    return store.open_store(f"s3://{bucket}/runs")


def attempt(place, key="k1", status="done", **more):
    with place.scratch("demo", key) as scratch:
        (scratch / "notebook.ipynb").write_text(json.dumps({"status": status, **more}))
        entry = {"format": store.FORMAT, "chapter": "demo", "key": key, "status": status, **more}
        store.write_record(scratch, entry)
        return place.publish(scratch, "demo", key)


def test_runs_are_published_found_and_forgotten(place):
    place.check_writable()
    assert place.record("demo", "k1") is None
    assert list(place.records()) == []
    attempt(place, number=1)
    attempt(place, key="k2", number=2)
    assert place.is_done("demo", "k1")
    assert [r["number"] for r in place.records("demo")] == [1, 2]
    assert json.loads(place.read("demo", "k2", "notebook.ipynb"))["number"] == 2
    place.forget("demo", "k1")
    assert [r["key"] for r in place.records()] == ["k2"]


def test_a_failure_is_replaced_by_a_success_and_never_the_other_way(place):
    attempt(place, status="failed")
    assert not place.is_done("demo", "k1")
    assert attempt(place)["status"] == "done"
    assert attempt(place, status="failed")["status"] == "done"
    assert json.loads(place.read("demo", "k1", "notebook.ipynb"))["status"] == "done"


def test_a_record_cut_in_half_is_no_record(place):
    attempt(place)
    path = f"{place.path}/demo/k1/record.json"
    place.fs.pipe_file(path, place.fs.cat_file(path)[:20])
    assert place.record("demo", "k1") is None
    attempt(place)
    assert place.is_done("demo", "k1")


def test_writers_at_the_same_moment_leave_one_whole_result(place):
    barrier = threading.Barrier(4)

    def write(number):
        barrier.wait()
        attempt(place, number=number)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    kept = place.record("demo", "k1")["number"]
    assert json.loads(place.read("demo", "k1", "notebook.ipynb"))["number"] == kept
    assert not place.fs.exists(f"{place.path}/demo/k1/.publishing")


def test_a_claim_of_a_dead_writer_is_taken_over(place, monkeypatch):
    from tokenbook.runs import remote_store

    monkeypatch.setattr(remote_store, "PATIENCE_SECONDS", 0.5)
    place.fs.pipe_file(f"{place.path}/demo/k1/.publishing", b"dead")
    attempt(place)
    assert place.is_done("demo", "k1")


def test_a_bucket_that_cannot_be_written_is_said_before_the_first_run(place):
    with pytest.raises(store.StoreError, match="cannot write to the store s3://nobody"):
        store.open_store("s3://nobody-has-this/runs").check_writable()
    with pytest.raises(store.StoreError, match="cannot open the store"):
        store.open_store("nonsense://x")


def test_a_real_run_goes_to_the_bucket_and_is_not_repeated(place, project, warm_light):
    chapter = project.chapter()
    (run,) = schedule.plan(chapter, [{"seed": 5}])
    (job,) = schedule.jobs_of([run], str(place), threads=1, timeout=60, is_warm=True)
    record = supervise.execute(job)
    assert record["status"] == "done"
    assert supervise.execute(job) == record
    frame = table.results("demo", place)
    assert frame.seed[0] == 5
    assert frame.notebook[0] == f"{place}/demo/{run.key}/notebook.ipynb"
    assert json.loads(place.read("demo", run.key, "notebook.ipynb"))["cells"]
    assert os.environ["AWS_ENDPOINT_URL"]
