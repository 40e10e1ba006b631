"""Chapters as files: where they are, what they are called, what parameters they take.

Nothing here executes or imports a notebook.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenbook import papers, parameters
from tokenbook.runs import cells


@dataclass(frozen=True)
class Chapter:
    """One notebook under `notebooks/`, as a file."""

    slug: str
    path: Path

    @property
    def root(self) -> Path:
        """The project's folder."""
        return self.path.parents[1]

    @cached_property
    def notebook(self) -> dict[str, Any]:
        """The notebook as plain data."""
        return json.loads(self.path.read_text("utf-8"))

    @property
    def title(self) -> str:
        """The paper's title; without a paper file, the first heading."""
        try:
            return papers.load(self.slug, self.root).title
        except papers.PaperError:
            headings = (
                line.lstrip("# ").strip()
                for cell in self.notebook["cells"]
                for line in cells.text_of(cell["source"]).splitlines()
                if cell["cell_type"] == "markdown" and line.startswith("# ")
            )
            return next(headings, self.slug)

    @cached_property
    def spec(self) -> parameters.Spec:
        """What its parameters may be; PaperError or ParameterError if the files do not fit together."""
        return parameters.Spec.load(self.slug, self.root)

    @cached_property
    def parameters(self) -> dict[str, parameters.Parameter]:
        """The lines of the cell tagged `parameters`."""
        return parameters.read_notebook(self.path)


def discover(root: Path | None = None) -> list[Chapter]:
    """All chapters of a project, by name."""
    root = root or papers.project_root()
    return [Chapter(path.stem, path) for path in sorted((root / "notebooks").glob("*.ipynb"))]


def find(slug: str, root: Path | None = None) -> Chapter:
    """The chapter of that name; ParameterError that lists the others if there is none."""
    known = {chapter.slug: chapter for chapter in discover(root)}
    if slug not in known:
        raise parameters.ParameterError(f"unknown chapter {slug!r}; there are: {', '.join(known) or 'none'}")
    return known[slug]
