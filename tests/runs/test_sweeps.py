"""Sweeps: what they are made of, that nothing runs before all is checked, and their results as a table."""

import json
import time
from pathlib import Path

import pytest
from test_cli import call

from tokenbook import runs
from tokenbook.parameters import ParameterError
from tokenbook.runs import store, sweeps, table

SPEC = """
title: Does the sum depend on the seed?
question: Does it?
chapter: demo
fixed: {scale: smoke}
grid:
  seed: 0:2
  n: [1, 5]
"""


@pytest.fixture
def spec(project):
    return project.chapter().spec


def given(spec, *grid, **more):
    return sweeps.from_options("demo", grid, {}, **more).given(spec)


def test_values_are_multiplied_and_each_is_taken_once(spec):
    assert given(spec, "seed=0,1,1", "n=3,4") == [
        {"seed": s, "n": n} for s in (0, 1) for n in (3, 4)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ("0:4", [0, 1, 2, 3]),
        ("1:8:3", [1, 4, 7]),
        ("lin:1:9:3", [1, 5, 9]),
        ("log:1:1000:4", [1, 10, 100, 1000]),
    ],
)
def test_ranges(spec, values, expected):
    assert [
        g["n"] if "n" in g else g["seed"]
        for g in given(spec, f"{'seed' if values == '0:4' else 'n'}={values}")
    ] == expected


def test_random_values_are_drawn_anew_for_each_run_and_the_same_with_the_same_seed(spec):
    first = given(spec, "seed=0,1", "n=random:1:900", samples=20, sample_seed=3)
    assert len(first) == 40
    assert len({g["n"] for g in first}) > 30
    assert first == given(spec, "seed=0,1", "n=random:1:900", samples=20, sample_seed=3)
    assert first != given(spec, "seed=0,1", "n=random:1:900", samples=20, sample_seed=4)
    logs = [g["n"] for g in given(spec, "n=lograndom:1:1000", samples=300)]
    assert 0.4 < sum(n <= 31 for n in logs) / 300 < 0.6  # half of the draws below the geometric middle


@pytest.mark.parametrize(
    ("grid", "sentence"),
    [
        ("seeed=1", "unknown parameter seeed (did you mean seed?)"),
        ("n=1,0", "n must be a whole number, 1..1000; got 0"),
        ("n=1,x", "n must be a whole number, 1..1000; got 'x'"),
        ("n=1:5:0", "the step of a range must not be 0"),
        ("n=5:5", "n is swept over no value"),
        ("n=log:0:1:3", "both ends of a log range must be positive"),
        ("n=lin:0:1:1", "needs at least 2 values"),
        ("n", "-g takes NAME=VALUES, got 'n'"),
        ("seed=0:1000000", "a sweep takes 1..100000 runs"),
    ],
)
def test_a_bad_grid_is_refused_in_one_sentence(project, grid, sentence):
    project.chapter()
    status, out, err = call("sweep", "demo", "-g", grid)
    assert (status, out) == (2, "")
    assert sentence in err


def test_nothing_runs_if_any_run_of_the_sweep_is_refused(project, warm_light):
    project.chapter()
    assert call("sweep", "demo", "-g", "n=1,2,1001")[0] == 2
    assert not list(project.store.records())


def test_lists_are_written_in_brackets(spec):
    spec.types["sizes"] = "list[int]"
    spec.rules["sizes"] = {"min": 1}
    assert [g["sizes"] for g in given(spec, "sizes=[1,2],[3]")] == [[1, 2], [3]]


def test_a_sweep_of_a_file(spec, tmp_path):
    path = tmp_path / "sum.yml"
    path.write_text(SPEC)
    assert sweeps.load(path).given(spec) == [
        {"scale": "smoke", "seed": s, "n": n} for s in (0, 1) for n in (1, 5)
    ]  # fmt: skip
    for text, sentence in [
        ("- 1", "must hold a mapping"),
        (SPEC + "colour: red", "unknown field colour"),
        (SPEC.replace("question: Does it?", ""), "lacks question"),
        (SPEC.replace("grid:", "grid: 3\nplot:"), "grid must be a mapping"),
        ("a: [", "cannot be read as YAML"),
    ]:
        path.write_text(text)
        with pytest.raises(ParameterError, match=sentence):
            sweeps.load(path)
    path.write_text(SPEC.replace("seed: 0:2", "scale: smoke"))
    with pytest.raises(ParameterError, match="scale is both fixed and swept"):
        sweeps.load(path).given(spec)


def test_a_sweep_is_executed_resumed_and_queried(project, warm_light):
    project.chapter()
    status, out, err = call("sweep", "demo", "-g", "seed=0,1", "-g", "n=3,4", "--dry-run")
    assert status == 0
    assert "4 runs: 0 done, 4 to execute" in out
    assert "the time is not known" in out
    assert call("run", "demo", "-p", "n", "3")[0] == 0
    status, out, err = call("sweep", "demo", "-g", "seed=0,1", "-g", "n=3,4", "--jobs", "2")
    assert status == 0
    assert "4 runs: 1 already done, 3 executed, 0 failed." in err
    status, out, err = call("sweep", "demo", "-g", "seed=0,1", "-g", "n=3,4", "--dry-run")
    assert "4 runs: 4 done, 0 to execute" in out
    query = "select seed, n, p1_sum, p1_verdict from runs order by seed, n"
    out = call("results", "demo", "--sql", query, "--csv")[1]
    assert out == "seed,n,p1_sum,p1_verdict\n" + "".join(
        f"{s},{n},{n}.0,reproduced\n" for s in (0, 1) for n in (3, 4)
    )
    target = project.root / "out.parquet"
    assert call("results", "demo", "--parquet", str(target))[0] == 0
    import pandas

    frame = pandas.read_parquet(target)
    assert len(frame) == 4
    assert json.loads(Path(frame.notebook[0]).read_text())["cells"]
    assert list(runs.results("demo", sql="select count(*) as n_runs from runs").n_runs) == [4]


def test_failed_runs_are_retried_and_then_reported(project, warm_light):
    marker = project.root / "tried"
    body = (
        f"import os; p = {str(marker)!r}\nif P.seed == 1 and not os.path.exists(p):\n    open(p, 'w'); 1 / 0"
    )
    project.chapter(body=body)
    status, _, err = call("sweep", "demo", "-g", "seed=0,1", "--retries", "1")
    assert status == 0, err
    project.chapter(body="if P.seed: raise ValueError(f'seed {P.seed}')")
    status, _, err = call("sweep", "demo", "-g", "seed=0:3", "--retries", "1")
    assert status == 1
    assert "3 runs: 0 already done, 1 executed, 2 failed." in err
    assert "ValueError: seed 2" in err
    assert "(seed=1)" in err
    frame = runs.results("demo")
    assert sorted(frame.status) == ["done", "done", "done", "failed", "failed"]
    assert set(frame.error.dropna()) == {"ValueError: seed 1", "ValueError: seed 2"}


def test_a_query_that_fails_is_a_sentence_and_status_1(project):
    project.chapter()
    status, _, err = call("results", "demo", "--sql", "select nothing from nowhere")
    assert status == 1
    assert "nowhere" in err
    assert "Traceback" not in err
    assert call("results", "demo")[1] == "no runs\n"


def test_ten_thousand_records_are_read_within_three_seconds(tmp_path):
    place = store.open_store(tmp_path)
    claim = {
        "claim": "P6",
        "verdict": "reproduced",
        "statement": "the divergence is small" * 5,
        "criteria": [{"id": "kl", "measured": 0.5, "interval": [0.4, 0.6], "control": 2.0, "what": "x" * 80}],
    }
    for number in range(10_000):
        folder = tmp_path / "demo" / f"{number:020x}"
        folder.mkdir(parents=True)
        record = {
            "format": store.FORMAT, "chapter": "demo", "key": folder.name, "status": "done", "error": None,
            "parameters": {"seed": number, "n": 2}, "given": {}, "started": "2026", "finished": "2026",
            "seconds": 1.0, "phases": {"a": 1.0}, "peak_memory_mib": 1.0, "claims": [claim] * 8,
            "measurements": {f"m{i}": {"value": 1.0, "unit": "", "interval": [0.0, 2.0]} for i in range(10)},
            "backends": {}, "versions": {f"p{i}": "1.0" for i in range(15)}, "device": {"kind": "cpu"},
            "git_commit": None,
        }  # fmt: skip
        (folder / "record.json").write_text(json.dumps(record, indent=1))
    began = time.process_time()  # of this process alone: the machine may be busy with other tests
    frame = table.results("demo", place, "select count(*) as n, avg(p6_kl) as kl, max(seed) as top from runs")
    assert time.process_time() - began < 3
    assert frame.to_dict("records") == [{"n": 10_000, "kl": 0.5, "top": 9999}]
