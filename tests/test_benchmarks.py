"""The benchmark harness: what it counts, and that a failing operation gets no speed."""

import json
import sys
import types

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import harness

CPU = torch.device("cpu")


def case(build, bytes_moved=0):
    return harness.Case("case", {"n": 1}, "float32", "forward", build, bytes_moved)


@pytest.fixture
def fake_benchmark(monkeypatch, tmp_path):
    """Installs a benchmark module whose tests are the given source; returns its record after the run."""

    def run(test_source: str) -> tuple[bool, dict]:
        test_file = tmp_path / "test_fake_operation.py"
        test_file.write_text(test_source)
        module = types.ModuleType("benchmarks.fake")
        module.TESTS = [str(test_file)]
        module.cases = lambda device: [case(lambda device: {"ours": lambda: torch.ones(10)}, 80)]
        monkeypatch.setitem(sys.modules, "benchmarks.fake", module)
        monkeypatch.setattr(command, "ROOT", tmp_path)
        monkeypatch.setattr(command, "RESULTS", tmp_path / "results")
        passed = command.benchmark("fake", CPU, seconds=0.01)
        return passed, json.loads((tmp_path / "results" / "fake.json").read_text())

    return run


def test_speed_is_written_when_the_operations_tests_pass(fake_benchmark):
    passed, record = fake_benchmark("def test_it(): pass")
    assert passed
    assert record["tests"] == {"passed": 1, "failed": 0, "skipped": 0}
    ours, floor = record["rows"]
    assert ours["variant"] == "ours"
    assert floor["variant"] == harness.FLOOR
    assert ours["floor_ms"] == floor["median_ms"]
    assert 0 < ours["low_ms"] <= ours["median_ms"] <= ours["high_ms"]


@pytest.mark.parametrize(
    "source", ["def test_it(): assert False", "def broken(:", "import pytest\ndef test_it(): pytest.skip()"]
)
def test_no_speed_without_a_passing_test(fake_benchmark, source):
    passed, record = fake_benchmark(source)
    assert not passed
    assert record["tests"]["failed"] >= 1
    assert record["rows"] == []


def test_peak_counts_temporaries_and_the_result_but_not_the_inputs():
    x = torch.ones(2**18)  # 1 MiB
    assert harness.peak_bytes(lambda: x.add_(1), CPU) < 1024
    assert harness.peak_bytes(lambda: x + 1, CPU) == pytest.approx(2**20, rel=0.01)
    assert harness.peak_bytes(lambda: (x + 1) * 2, CPU) == pytest.approx(2 * 2**20, rel=0.01)


def test_an_optional_peer_that_cannot_run_says_why_and_others_must_run():
    def broken():
        raise RuntimeError("no compiler here\nand a long story")

    build = {"ours": lambda: None, "peer": harness.Variant(broken, optional=True)}
    rows = harness.measure_case(case(lambda device: build), CPU, seconds=0.01)
    assert rows[1].median_ms is None
    assert rows[1].note == "could not run: RuntimeError: no compiler here"
    with pytest.raises(RuntimeError, match="no compiler"):
        harness.measure_case(case(lambda device: {"ours": broken}), CPU, seconds=0.01)


def test_an_unknown_name_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "ropes"])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 2
    assert "got ropes" in capsys.readouterr().err
