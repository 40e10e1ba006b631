"""A small book with two chapters that never existed, for tests of the pages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import nbformat

from tokenbook.chapter import Chapter, Ledger
from tokenbook.ledger import MIME
from tokenbook.ledger_table import ledger_html
from tokenbook.papers import project_root

ROOT = project_root(Path(__file__).parent)

PART = "Tokens that are edited"
PAPER = """
title = "{title}"
authors = "A. Nobody and B. Noone"
year = 2031
part = "{part}"
summary = "A paper that does not exist."
bibtex = "su2024roformer"

[[claims]]
id = "P1"
statement = "Saves work | on every `edit`, at *any* length n < 512, for $5"
paper = "over 85 %"
where = "abstract; Table 3"
source = "abstract"
control = "a rotation by the wrong angle"
[[claims.criteria]]
id = "saved"
what = "work saved"
unit = "%"
op = ">="
threshold = 85
null = 0
[[claims.criteria]]
id = "slower"
what = "slow-down"
unit = "ms"
op = "<="
threshold = 2.5

[[claims]]
id = "P2"
statement = "The quality stays"
paper = "0.3 points"
where = "Table 1"
source = "recalled"
control = "labels shuffled"
[[claims.criteria]]
id = "gap"
what = "gap"
unit = "nats"
op = "<="
threshold = 0.1
null = 1

[[claims]]
id = "P3"
statement = "Splicing collapses"
paper = "0.29 %"
where = "Table 1"
source = "paper"
control = "no edit at all"
[[claims.criteria]]
id = "loss"
what = "loss"
unit = "nats"
op = ">="
threshold = 1
null = 0

[[claims]]
id = "P4"
statement = "People like it"
paper = "71 of 100"
where = "Section 5"
source = "second-hand"
untested = "needs people who rate"
"""

IMAGE = (
    '<img alt="A square that stands for a figure" width="1" height="1" src="data:image/png;base64,'
    'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==">'
)


def make(folder: Path, names: tuple[str, ...] = ("first", "second")) -> Path:
    """A copy of this project's book whose only chapters are the ones named; returns its root."""
    shutil.copytree(ROOT / "book", folder / "book")
    for name in ("_config.yml", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    shutil.rmtree(folder / "book" / "papers", ignore_errors=True)
    shutil.rmtree(folder / "book" / "sweeps", ignore_errors=True)
    (folder / "book" / "papers").mkdir()
    (folder / "notebooks").mkdir()
    (folder / "book" / "parts.toml").write_text(f'[[parts]]\ntitle = "{PART}"\npage = "editing"\n')
    for name in names:
        paper = PAPER.format(title=f"The {name} paper: tokens & <positions>", part=PART)
        (folder / "book" / "papers" / f"{name}.toml").write_text(paper)
        notebook = folder / "notebooks" / f"{name}.ipynb"
        nbformat.write(chapter(folder, name), notebook)
    return folder


def chapter(root: Path, name: str, saved: float = 97.2, scale: str = "small") -> nbformat.NotebookNode:
    """An executed notebook whose ledger has every verdict (P1 depends on `saved`)."""
    parameters = {"scale": scale, "seed": 0}
    paper = Chapter(name, root)
    ledger = Ledger(paper, SimpleNamespace(scale=scale, as_dict=lambda: dict(parameters)))
    ledger.measure("P1", "saved", saved, interval=(saved - 0.2, saved + 0.2),
                   control=3.1, control_interval=(2.6, 3.7))  # fmt: skip
    ledger.measure("P1", "slower", 1.25, interval=(1.1, 1.4))
    ledger.measure("P2", "gap", 0.3, interval=(0.2, 0.4), control=2.0)
    ledger.measure("P3", "loss", -0.5, interval=(-0.6, -0.4), control=0.0)
    payload = ledger.payload()
    html = ledger_html(payload["claims"])
    shown = {"text/html": html, "text/plain": "the ledger", MIME: payload}
    cells = [
        nbformat.v4.new_markdown_cell(f"# Chapter {name}\n\nWith an equation, $R_a R_b = R_{{a+b}}$."),
        _code("1 + 1", {"text/plain": "2"}, 1),
        _code("show(figure)", {"text/html": IMAGE, "text/plain": "[figure]"}, 2),
        _code("ledger.show()", shown, 3),
    ]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=metadata)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    return notebook


def run(root: Path, store: Path, name: str, saved: float) -> Path:
    """A run folder of that chapter in which the work saved was `saved` per cent."""
    folder = store / name / "0123456789abcdef"
    folder.mkdir(parents=True)
    nbformat.write(chapter(root, name, saved), folder / "notebook.ipynb")
    record = {"key": folder.name, "chapter": name, "status": "done"}
    (folder / "record.json").write_text(json.dumps(record))
    return folder


def _code(source: str, data: dict, count: int) -> nbformat.NotebookNode:
    output = nbformat.v4.new_output("display_data", data=data)
    return nbformat.v4.new_code_cell(source, outputs=[output], execution_count=count)
