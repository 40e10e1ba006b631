"""A chapter's ledger in an invented world: what it says of measurements that a test has made up."""

import contextlib
import io
from unittest import mock

import nbformat

from tests.chapters.conftest import NOTEBOOKS


def rows_in(space, chapter, first="ledger", besides=(), without=()):
    """Execute the code cells from `first` on in `space`, which holds the measurements; {claim: its row}.

    `besides`: ids of earlier cells that are executed too, in the notebook's order. `without`: how the ids of
    cells begin that are left out (figures, which an invented world need not fill).
    """
    cells = nbformat.read(NOTEBOOKS / f"{chapter}.ipynb", as_version=4).cells
    ids = [cell.id for cell in cells]
    if missing := {first, *besides} - set(ids):
        raise LookupError(f"{chapter} has no cell {min(missing)!r}")
    with contextlib.redirect_stdout(io.StringIO()), mock.patch("IPython.display.display"):
        for cell in [c for c in cells if c.id in besides] + cells[ids.index(first) :]:
            if cell.cell_type == "code" and not cell.id.startswith(tuple(without)):
                exec(compile(cell.source, f"{chapter}.ipynb:{cell.id}", "exec"), space)
    return {row["claim"]: row for row in space["ledger"].rows()}


def verdicts_in(space, chapter, **cells):
    """{claim: verdict} of `rows_in`."""
    return {claim: row["verdict"] for claim, row in rows_in(space, chapter, **cells).items()}
