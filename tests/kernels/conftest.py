"""How Triton kernels are tested.

Two markers:

    @pytest.mark.gpu          needs a CUDA device; skipped with the reason where there is none
    @pytest.mark.interpreter  runs Triton's interpreter on CPU tensors, with backend="triton"

Triton decides at its import whether kernels are compiled or interpreted, so one process can only do one of
the two, and other tests (or torch.compile) may have imported it long before. The tests marked `interpreter`
are therefore written like any other test, but run in a child pytest with TRITON_INTERPRET=1; the child's
reports are replayed here one by one, so that failures, durations and `-k` look as if they ran in this
process. To debug one, run it directly: `TRITON_INTERPRET=1 pytest -m interpreter tests/kernels --pdb`.

The interpreter is silently wrong in bfloat16 and the dispatcher refuses it there: use float32 and float16.
Helpers stand in kernel_checks.py (`from kernel_checks import assert_close, poisoned`).
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

REPORTS = "TOKENBOOK_INTERPRETER_REPORTS"
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu"):
        import torch

        if INTERPRETING:
            pytest.skip("TRITON_INTERPRET=1: this process cannot compile kernels")
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device and torch sees none")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    """Replay an interpreter test's reports from the child instead of running it here."""
    if INTERPRETING or not item.get_closest_marker("interpreter"):
        return None
    children = item.session.stash.setdefault(CHILDREN, {})
    # A worker of pytest-xdist collects all tests and is given some files: a child for each of those.
    of = item.path if "PYTEST_XDIST_WORKER" in os.environ else None
    if (child := children.get(of)) is None:
        wanted = [i for i in item.session.items if i.get_closest_marker("interpreter")]
        nodes = [i.nodeid for i in wanted if of in (None, i.path)]
        child = children[of] = _Child(item.config, nodes)
        item.config.add_cleanup(child.close)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in child.reports_of(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    # What the test before left set up for this one's module would otherwise outlive it.
    item.session._setupstate.teardown_exact(nextitem)
    return True


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report):
    """In the child: hand each report to the parent, one JSON line each."""
    if INTERPRETING and (path := os.environ.get(REPORTS)):
        with open(path, "a") as file:
            file.write(json.dumps(_config.hook.pytest_report_to_serializable(config=_config, report=report)))
            file.write("\n")


def pytest_configure(config):
    global _config
    _config = config


class _Child:
    """A pytest process under the interpreter, and the reports it has written so far."""

    def __init__(self, config, nodes: list[str]):
        self.config = config
        self.folder = tempfile.TemporaryDirectory(prefix="tokenbook-interpreter-")
        self.path = Path(self.folder.name, "reports.jsonl")
        self.path.touch()
        self.log = Path(self.folder.name, "log.txt")
        options = ["-p", "no:cacheprovider", "-q", "--rootdir", str(config.rootpath)]
        arguments = Path(self.folder.name, "nodes.txt")  # a list this long may not fit a command line
        arguments.write_text("\n".join(nodes))
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pytest", *options, f"@{arguments}"],
                cwd=config.rootpath,
                env={**os.environ, "TRITON_INTERPRET": "1", REPORTS: str(self.path)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def reports_of(self, item) -> list:
        """Wait for one test's reports, setup to teardown; a child that ended without them fails the test."""
        while True:
            ended = self.process.poll() is not None
            lines = self.path.read_text().split("\n")[:-1]  # the last line may be half written
            mine = [report for report in map(json.loads, lines) if report["nodeid"] == item.nodeid]
            if any(report["when"] == "teardown" for report in mine):
                from_json = self.config.hook.pytest_report_from_serializable
                return [from_json(config=self.config, data=report) for report in mine]
            if ended:
                return [self._lost(item)]
            time.sleep(0.05)

    def _lost(self, item) -> pytest.TestReport:
        reason = f"the interpreter process ended ({self.process.returncode}) without this test's report\n"
        reason += self.log.read_text()[-4000:]
        return pytest.TestReport(item.nodeid, item.location, {}, "failed", reason, "call", duration=0.0)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait()
        self.folder.cleanup()


CHILDREN = pytest.StashKey[dict]()
