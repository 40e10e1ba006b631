"""The store holds whole runs or none."""

import json
import os
import socket
import threading

import pytest

from tokenbook.runs import store


@pytest.fixture
def place(tmp_path):
    return store.open_store(tmp_path / "runs")


def attempt(place, key="k1", status="done", **more):
    with place.scratch("demo", key) as scratch:
        (scratch / "notebook.ipynb").write_text(f"{status} {more}")
        entry = {"format": store.FORMAT, "chapter": "demo", "key": key, "status": status, **more}
        store.write_record(scratch, entry)
        return place.publish(scratch, "demo", key)


def test_a_published_run_is_found_again(place):
    attempt(place, seconds=1.0)
    assert place.is_done("demo", "k1")
    assert place.record("demo", "k1")["seconds"] == 1.0
    assert [r["key"] for r in place.records()] == ["k1"]
    assert place.read("demo", "k1", "notebook.ipynb")


def test_without_a_readable_record_a_run_did_not_happen(place):
    attempt(place)
    path = place.folder / "demo" / "k1" / "record.json"
    path.write_text(path.read_text()[: len(path.read_text()) // 2])  # cut in half
    assert place.record("demo", "k1") is None
    assert not place.is_done("demo", "k1")
    assert list(place.records()) == []
    attempt(place)  # and it can be made good
    assert place.is_done("demo", "k1")


def test_a_run_of_another_format_is_executed_again(place):
    attempt(place)
    path = place.folder / "demo" / "k1" / "record.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 0}))
    assert not place.is_done("demo", "k1")
    assert attempt(place)["format"] == store.FORMAT


def test_a_failure_is_kept_never_counts_and_never_replaces_a_success(place):
    attempt(place, status="failed")
    assert not place.is_done("demo", "k1")
    assert place.record("demo", "k1")["status"] == "failed"
    attempt(place, status="done")
    assert place.is_done("demo", "k1")
    assert attempt(place, status="failed")["status"] == "done"
    assert place.is_done("demo", "k1")


def test_an_attempt_without_a_record_cannot_be_published(place):
    with place.scratch("demo", "k1") as scratch, pytest.raises(store.StoreError, match="no finished run"):
        place.publish(scratch, "demo", "k1")
    assert place.record("demo", "k1") is None


def test_many_writers_of_one_run_leave_one_whole_result(place):
    barrier, results = threading.Barrier(8), []

    def write(number):
        with place.scratch("demo", "k1") as scratch:
            (scratch / "notebook.ipynb").write_text(str(number))
            store.write_record(
                scratch,
                {"format": store.FORMAT, "chapter": "demo", "key": "k1", "status": "done", "number": number},
            )
            barrier.wait()
            results.append(place.publish(scratch, "demo", "k1")["number"])

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    kept = place.record("demo", "k1")["number"]
    assert results == [kept] * 8
    assert place.read("demo", "k1", "notebook.ipynb").decode() == str(kept)
    assert list((place.folder / ".running" / "demo").iterdir()) == []


def test_scratch_folders_of_dead_processes_are_removed_and_no_others(place):
    waiting = place.folder / ".running" / "demo"
    waiting.mkdir(parents=True)
    host = socket.gethostname()
    dead, alive, elsewhere = f"k.4194399.{host}.a", f"k.{os.getpid()}.{host}.b", "k.4194399.other.host.c"
    for name in (dead, alive, elsewhere):
        (waiting / name).mkdir()
    place.sweep_scratch()
    assert {p.name for p in waiting.iterdir()} == {alive, elsewhere}


def test_a_store_that_cannot_be_written_is_said_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(store.StoreError, match="cannot write to the store"):
        store.open_store(tmp_path / "file" / "runs").check_writable()
