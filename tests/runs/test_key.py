"""What makes a run stale, and what does not."""

import ast
import json

import pytest

from tokenbook.parameters import ParameterError
from tokenbook.runs import device, key, notebooks, schedule


@pytest.fixture
def library(project):
    """A library with a module that the chapter uses through another, and one that it does not use."""
    folder = project.root / "lib" / "tokenbook"
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text("")
    (folder / "kernels" / "used.py").write_text(
        "def used():\n    from ..deep import thing\n    return thing\n"
    )
    (folder / "kernels" / "other.py").write_text("")
    (folder / "deep.py").write_text("thing = 1\n")
    (folder / "chapter.py").write_text("from . import papers\n")
    (folder / "papers.py").write_text("")
    project.chapter(
        imports="%matplotlib inline\nfrom tokenbook import chapter\nfrom tokenbook.kernels import used"
    )
    return folder


def current(**given):
    (run,) = schedule.plan(notebooks.find("demo"), [given])
    return run.key


def test_imports_are_followed_through_the_library_and_no_further(library):
    source = "from tokenbook import chapter\nfrom tokenbook.kernels import used\nimport numpy"
    names = set(key.imported_modules(source, library))
    assert names == {
        "tokenbook", "tokenbook.chapter", "tokenbook.papers", "tokenbook.kernels", "tokenbook.kernels.used",
        "tokenbook.deep",
    }  # fmt: skip


def test_magics_and_lines_that_go_on_with_a_percent_sign_are_read_as_ipython_reads_them():
    remainder = "rest = (\n    7\n    % 4\n)"
    cells = ["%%time\nimport tokenbook.hub", f"%matplotlib inline\n!ls\n{remainder}\nfiles = !ls"]
    plain = [key._without_magics(cell) for cell in cells]
    assert plain[0] == "import tokenbook.hub\n"
    assert remainder in plain[1]
    ast.parse("\n".join(plain))


def test_names_that_a_package_makes_at_run_time_bring_in_all_its_modules(library):
    (library / "kernels" / "__init__.py").write_text("def __getattr__(name):\n    ...\n")
    names = key.imported_modules("from tokenbook.kernels import rope_shift", library)
    assert {"tokenbook.kernels.used", "tokenbook.kernels.other"} <= set(names)


@pytest.mark.parametrize(
    "changed",
    ["lib/tokenbook/deep.py", "book/papers/demo.toml", "requirements.lock", "lib/tokenbook/chapter.py"],
)
def test_a_changed_dependency_makes_the_run_stale(library, project, changed):
    before = current()
    path = project.root / changed
    path.write_text(path.read_text() + "\n# changed\n")
    assert current() != before


def test_an_unrelated_module_prose_and_outputs_leave_the_run_alone(library, project):
    before = current()
    (library / "kernels" / "other.py").write_text("x = 2\n")
    path = project.root / "notebooks" / "demo.ipynb"
    notebook = json.loads(path.read_text())
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = "## Other words"
        else:
            cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "1"}]
    path.write_text(json.dumps(notebook))
    assert current() == before


def test_code_parameters_and_kind_of_device_are_part_of_the_key(library, project, monkeypatch):
    before = current()
    assert current(seed=1) != before
    assert current(n=2) == before  # the preset, given by hand
    monkeypatch.setattr(device, "gpus", lambda: ["NVIDIA H200"])
    assert current() != before
    assert current(device="cpu") not in (before, current())
    monkeypatch.undo()
    monkeypatch.setenv("TOKENBOOK_ROOT", str(project.root))
    project.chapter(body="print(1)")
    assert current() != before


def test_bad_parameters_are_refused_before_anything_runs(library):
    with pytest.raises(ParameterError, match=r"unknown parameter nn \(did you mean n\?\)"):
        schedule.plan(notebooks.find("demo"), [{"seed": 1}, {"nn": 1}])
    with pytest.raises(ParameterError, match=r"n must be a whole number, 1\.\.1000; got 0"):
        schedule.plan(notebooks.find("demo"), [{"n": 0}])


def test_equal_runs_are_planned_once(library):
    assert len(schedule.plan(notebooks.find("demo"), [{}, {"seed": 0}, {"seed": 1}])) == 2
