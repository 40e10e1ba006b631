"""A project of trivial chapters in a temporary folder; templates of warm kernels that end with the tests."""

from pathlib import Path

import nbformat
import pytest
from nbformat import v4

from tokenbook.pages import generate
from tokenbook.runs import schedule, store, warm

PAPER = """
title = "A small paper"
authors = "A. Body"
year = 2026
part = "tests"
summary = "It does what the test says."
[[claims]]
id = "P1"
statement = "the sum is at least one"
paper = "1"
where = "Table 1"
source = "paper"
no_control = "an identity"
[[claims.criteria]]
id = "sum"
what = "sum"
unit = "points"
op = ">="
threshold = 1
exact = true
[parameters.n]
min = 1
max = 1000
smoke = 1
small = 2
paper = 3
"""
PARAMETERS = """scale: str = "small"  # smoke, small or paper
seed: int = 0  # first random seed
device: str = "auto"  # auto, cpu or cuda
n: int = None  # how many; None = the scale's preset"""
# Enough for a kernel and for papermill; the full list takes seconds to import.
LIGHT = ["ipykernel.ipkernel", "ipykernel.kernelapp", "papermill.execute", "psutil", "pydantic.type_adapter"]


class Project:
    """A project folder with chapters whose body the test chooses."""

    def __init__(self, root: Path):
        self.root = root
        for folder in ("notebooks", "book/papers", "lib/tokenbook"):
            (root / folder).mkdir(parents=True)
        (root / "requirements.lock").write_text("numpy==1\n")
        (root / "lib/tokenbook/__init__.py").write_text("")
        (root / "book/parts.toml").write_text('[[parts]]\ntitle = "tests"\npage = "tests"\n')
        for page in ("README.md", "book/index.md"):
            (root / page).write_text(f"# A book\n\n{generate.BEGIN}\n{generate.END}\n")
        self.store = store.open_store(root / "runs")

    def chapter(self, slug="demo", body="print(P.n)", end="", imports="from tokenbook import chapter"):
        """Write a chapter and its paper file; `body` is the cell under `## Reproduction`."""
        (self.root / "book/papers" / f"{slug}.toml").write_text(PAPER)
        cells = [
            v4.new_markdown_cell("# A chapter"),
            v4.new_code_cell(f'{imports}\npaper = chapter.Chapter("{slug}")'),
            v4.new_markdown_cell("## Parameters"),
            v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
            v4.new_code_cell("P = paper.parameters(globals())"),
            v4.new_markdown_cell("## Reproduction\n\nWhat is done."),
            v4.new_code_cell(body),
            v4.new_markdown_cell("## Results"),
            v4.new_code_cell(
                "ledger = chapter.Ledger(paper, P)\n"
                'ledger.measure("P1", "sum", float(P.n))\n'
                'ledger.record("seed", float(P.seed), unit="count")\n'
                "ledger.show()"
            ),
            v4.new_code_cell(end),
        ]
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        notebook = v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
        path = self.root / "notebooks" / f"{slug}.ipynb"
        nbformat.write(notebook, path)
        return schedule.Chapter(slug, path)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty project that every part of the package takes for the current one."""
    monkeypatch.setenv("TOKENBOOK_ROOT", str(tmp_path))
    return Project(tmp_path)


@pytest.fixture(scope="session")
def light_template():
    """A template that has imported what a kernel and papermill need."""
    template = warm.Template(LIGHT)
    yield template
    template.stop()


@pytest.fixture(scope="session")
def full_template():
    """The template as users get it."""
    template = warm.Template(warm.PRELOAD)
    yield template
    template.stop()


@pytest.fixture
def warm_light(light_template, monkeypatch):
    """Runs of this process are forked from the light template."""
    monkeypatch.setattr(warm, "template", light_template)
    return light_template
