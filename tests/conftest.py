"""Shared fixtures."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def book_html(tmp_path_factory) -> Path:
    """The committed book, rendered once by the same call as `tokenbook build`; a warning fails it."""
    from tokenbook import pages
    from tokenbook.papers import project_root

    root = project_root(Path(__file__).parent)
    return pages.render(root, output=tmp_path_factory.mktemp("book")).parent
