"""A chapter's own cells, executed in this process."""

import contextlib
import io
from pathlib import Path
from unittest import mock

import nbformat
import pytest

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def execute_cells(chapter, before=None, patch=None, **parameters):
    """Execute a chapter's code cells with parameters; return its namespace.

    `before`: id of the cell at which to stop. `patch(namespace)` is called behind the imports.
    """
    namespace = {"__name__": "__main__"}
    for cell in nbformat.read(NOTEBOOKS / f"{chapter}.ipynb", as_version=4).cells:
        if cell.id == before:
            return namespace
        if cell.cell_type != "code":
            continue
        exec(compile(cell.source, f"{chapter}.ipynb:{cell.id}", "exec"), namespace)
        if "parameters" in cell.metadata.get("tags", []):
            namespace.update(parameters)
        if cell.id == "imports" and patch is not None:
            patch(namespace)
    if before is not None:
        raise LookupError(f"{chapter} has no cell {before!r}")
    return namespace


@pytest.fixture(scope="session")
def run_cells():
    """`execute_cells` without its displays, and with torch's global switches put back behind each call."""
    import IPython.display
    import torch

    def run(*args, **kwargs):
        with contextlib.ExitStack() as stack:
            stack.callback(torch.set_grad_enabled, torch.is_grad_enabled())
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(mock.patch.object(IPython.display, "display"))
            return execute_cells(*args, **kwargs)

    return run
