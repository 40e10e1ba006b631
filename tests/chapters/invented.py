"""A chapter's ledger in an invented world: what it says of measurements that a test has made up."""

from pathlib import Path

import nbformat

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def verdicts_in(space, chapter):
    """Execute the code cells from `ledger` on in `space`, which holds the measurements; {claim: verdict}."""
    cells = nbformat.read(NOTEBOOKS / f"{chapter}.ipynb", as_version=4).cells
    for cell in cells[[cell.id for cell in cells].index("ledger") :]:
        if cell.cell_type == "code":
            exec(compile(cell.source, f"{chapter}.ipynb:{cell.id}", "exec"), space)
    return {row["claim"]: row["verdict"] for row in space["ledger"].rows()}
