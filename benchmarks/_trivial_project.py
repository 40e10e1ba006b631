"""A project with one chapter that does nothing but import what chapters import, and show its ledger."""

from pathlib import Path

import nbformat
from nbformat import v4

PAPER = """
title = "A trivial chapter"
authors = "Nobody"
year = 2026
part = "benchmarks"
summary = "It imports what chapters import and does nothing."
[[claims]]
id = "T1"
statement = "one is one"
paper = "1"
where = "nowhere"
source = "paper"
no_control = "an identity"
[[claims.criteria]]
id = "one"
what = "one"
unit = ""
op = ">="
threshold = 1
exact = true
"""
HEAVY = "import seaborn\nimport torch\nimport transformers"
LEDGER = 'ledger = chapter.Ledger(paper, P)\nledger.measure("T1", "one", 1.0)\nledger.show()'


def make(root: Path, imports: str = HEAVY, body: str = "torch.ones(2).sum()") -> Path:
    """Write the project into `root` and return the path of its notebook, chapter `trivial`."""
    for folder in ("notebooks", "book/papers"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "book/papers/trivial.toml").write_text(PAPER)
    parameters = 'scale: str = "small"  # scale\nseed: int = 0  # seed\ndevice: str = "cpu"  # device'
    cells = [
        v4.new_code_cell('from tokenbook import chapter\npaper = chapter.Chapter("trivial")'),
        v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        v4.new_code_cell("P = paper.parameters(globals())"),
        v4.new_code_cell(imports),
        v4.new_markdown_cell("## Reproduction"),
        v4.new_code_cell(body),
        v4.new_code_cell(LEDGER),
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path = root / "notebooks" / "trivial.ipynb"
    nbformat.write(v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path
