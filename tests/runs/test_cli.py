"""The command: what it prints where, and with which exit status it ends."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from process_watch import gone, processes_with

from tokenbook import cli
from tokenbook.runs import notebooks, schedule

pytestmark = pytest.mark.usefixtures("warm_light")


def call(*arguments, **env):
    """Run the command in this process: (exit status, stdout, stderr)."""
    with pytest.MonkeyPatch.context() as patch:
        for name, text in env.items():
            patch.setenv(name, text)
        patch.setattr(sys, "argv", ["tokenbook", *arguments])
        patch.setattr(signal, "signal", lambda *_: None)
        runner = CliRunner()
        with runner.isolation() as (out, err, _):
            status = 0
            try:
                cli.main()
            except SystemExit as end:
                status = end.code or 0
            return status, out.getvalue().decode(), err.getvalue().decode()


def test_list_as_json_names_chapters_titles_and_parameters(project):
    project.chapter()
    status, out, err = call("list", "--json")
    (row,) = json.loads(out)
    assert (status, err) == (0, "")
    assert (row["chapter"], row["title"]) == ("demo", "A small paper")
    assert row["parameters"]["n"] == {
        "type": "int",
        "default": None,
        "help": "how many; None = the scale's preset",
    }


def test_list_and_show_are_readable(project):
    project.chapter()
    status, out, _ = call("list")
    assert status == 0
    assert "demo" in out
    assert "A small paper" in out
    status, out, _ = call("show", "demo")
    assert status == 0
    assert "P1" in out
    assert "sum ≥ 1 points" in out
    assert "a whole number, 1..1000" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "nobody"], "unknown chapter 'nobody'; there are: demo"),
        (["run", "demo", "-p", "nn", "3"], "unknown parameter nn (did you mean n?)"),
        (["run", "demo", "-p", "n", "true"], "n must be a whole number, 1..1000; got 'true'"),
        (["run", "demo", "-p", "n", "nan"], "n must be a whole number, 1..1000; got 'nan'"),
        (["run", "demo", "-p", "n", "1001"], "n must be a whole number, 1..1000; got 1001"),
        (["run", "demo", "-p", "scale", "large"], "scale must be one of smoke, small, paper; got 'large'"),
        (["run", "demo", "-p", "device", "gpu"], "device must be auto, cpu, mps, cuda or cuda:N; got 'gpu'"),
        (["show", "nobody"], "unknown chapter"),
        (["run"], "Missing argument 'CHAPTER'"),
        (["sing"], "No such command 'sing'"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_status_2(project, arguments, sentence):
    project.chapter()
    status, out, err = call(*arguments)
    assert (status, out) == (2, "")
    assert sentence in err
    assert "Traceback" not in err
    assert not list(project.store.records())


def test_run_prints_the_folder_and_a_second_call_executes_nothing(project):
    project.chapter()
    status, out, err = call("run", "demo", "-p", "seed", "4")
    assert status == 0
    assert "1 run: 0 already done, 1 executed, 0 failed." in err
    record = json.loads(Path(out.strip(), "record.json").read_text())
    assert record["parameters"]["seed"] == 4
    status, again, err = call("run", "demo", "-p", "seed", "4")
    assert (status, again) == (0, out)
    assert "1 already done, 0 executed" in err


def test_a_failed_run_ends_with_status_1_and_says_where_and_why(project):
    project.chapter(body="raise ValueError('no such luck')")
    status, out, err = call("run", "demo")
    assert (status, out) == (1, "")
    assert "cell 7, section 'Reproduction'" in err
    assert "ValueError: no such luck" in err
    assert "notebook.ipynb" in err


def test_claims_come_from_the_newest_default_run_and_else_from_the_committed_notebook(project):
    project.chapter()
    status, out, err = call("claims", "--json")
    assert (status, json.loads(out)) == (0, [])
    assert "not executed yet" in err
    call("run", "demo", "-p", "n", "7")  # not a default run
    assert json.loads(call("claims", "demo", "--json")[1]) == []
    call("run", "demo")
    (row,) = json.loads(call("claims", "demo", "--json")[1])
    wanted = {
        "chapter",
        "claim",
        "statement",
        "paper",
        "measured",
        "interval",
        "threshold",
        "control",
        "verdict",
    }
    assert wanted | {"scale", "run"} <= set(row)
    assert (row["measured"], row["verdict"], row["scale"]) == (2.0, "reproduced", "small")
    assert "reproduced" in call("claims")[1]
    # Without a run in the store the committed outputs speak.
    assert call("refresh", "demo")[0] == 0
    (row,) = json.loads(call("claims", "--json", "--store", str(project.root / "empty"))[1])
    assert row["measured"] == 2.0


def test_a_stale_default_run_still_shows_until_there_is_a_newer_one(project):
    (before,) = schedule.plan(project.chapter(), [{}])
    call("run", "demo")
    project.chapter(body="print('changed')")
    (after,) = schedule.plan(notebooks.find("demo"), [{}])
    entry = schedule.newest_default(project.store, notebooks.find("demo"))
    assert entry["key"] == before.key != after.key


def test_build_executes_only_what_is_stale_and_hands_the_runs_to_the_pages(project, monkeypatch):
    from tokenbook import pages

    rendered = []
    monkeypatch.setattr(
        pages, "render", lambda root, runs: rendered.append((root, runs)) or root / "index.html"
    )
    project.chapter("demo")
    project.chapter("other")
    status, out, err = call("build", "--scale", "smoke", "--jobs", "2")
    assert status == 0, err
    assert out.strip() == str(project.root / "index.html")
    assert "2 runs: 0 already done, 2 executed" in err
    (root, runs) = rendered[0]
    assert root == project.root
    assert sorted(runs) == ["demo", "other"]
    assert json.loads((runs["demo"] / "record.json").read_text())["parameters"]["scale"] == "smoke"
    assert "2 already done, 0 executed" in call("build", "--scale", "smoke")[2]
    project.chapter("other", body="raise ValueError")
    status, _, err = call("build", "--scale", "smoke")
    assert status == 1
    assert "1 already done, 0 executed, 1 failed" in err
    assert sorted(rendered[-1][1]) == ["demo"]  # the book is rendered all the same


def test_refresh_writes_outputs_into_the_notebooks(project):
    chapter = project.chapter(body="print('fresh')")
    status, _, err = call("refresh")
    assert status == 0, err
    assert "written: notebooks/demo.ipynb" in err
    assert "written: book/scoreboard.md" in err
    assert "fresh\\n" in chapter.path.read_text()
    assert "unchanged: notebooks/demo.ipynb" in call("refresh", "demo")[2]


def test_a_store_that_cannot_be_written_is_said_before_the_first_run(project):
    project.chapter()
    (project.root / "file").write_text("")
    status, _, err = call("run", "demo", "--store", str(project.root / "file" / "x"))
    assert status == 1
    assert "cannot write to the store" in err


def test_doctor_says_what_follows(project):
    status, out, _ = call("doctor")
    assert status == 0
    for word in ("Python", "cores", "GiB of memory", "torch", "triton", "warm kernels"):
        assert word in out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_kernels_with_status_130_and_the_next_call_resumes(project, number):
    for slug in ("first", "second"):
        body = f"if P.seed == 0:\n    open({str(project.root / slug)!r}, 'w'); import time; time.sleep(600)"
        project.chapter(slug, body=body)
    env = {**os.environ, "TOKENBOOK_PRELOAD": "ipykernel.ipkernel,ipykernel.kernelapp,papermill.execute"}
    command = [sys.executable, "-m", "tokenbook.cli", "build", "--jobs", "2"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command,
        env=env,
        cwd=project.root,
        stdout=pipe,
        stderr=pipe,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's `&` has it ignored
    )
    assert gone(lambda: not all((project.root / slug).exists() for slug in ("first", "second")), 60)
    os.killpg(process.pid, number)  # as a terminal does
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert b"Interrupted" in err
    assert b"Traceback" not in err
    assert gone(lambda: processes_with(str(project.root)))
    assert [(r["status"], r["error"]) for r in project.store.records()] == []
    assert not list(project.store.folder.glob(".running/*/*"))
    assert call("run", "first", "-p", "seed", "1")[0] == 0
