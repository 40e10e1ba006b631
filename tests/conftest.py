"""Shared fixtures."""

import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # read when torch is imported: workers share the cores out
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def book_html(tmp_path_factory) -> Path:
    """The committed book, rendered once by the same call as `tokenbook build`; a warning fails it."""
    from tokenbook import pages
    from tokenbook.papers import project_root

    root = project_root(Path(__file__).parent)
    return pages.render(root, output=tmp_path_factory.mktemp("book")).parent
