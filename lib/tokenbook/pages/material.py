"""What the generated pages are made from: claims and provenance of every chapter's newest run.

A run folder holds `notebook.ipynb` and `record.json`. Where a chapter has no run, its committed notebook
speaks: the claims travel in its outputs, and its metadata say where the outputs come from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenbook.ledger import MIME, VERDICTS
from tokenbook.pages.contents import Chapter, PageError, chapters

__all__ = ["MIME", "VERDICTS", "Material", "gather", "totals"]


@dataclass(frozen=True)
class Material:
    """A chapter with the notebook that is shown, its ledger and where both come from.

    `ledger`: the payload of the claims output, or None if the notebook was not executed. `provenance`: the
    run's record (`is_run`), or what the committed notebook's metadata keep of it.
    """

    chapter: Chapter
    notebook: Path
    ledger: dict[str, Any] | None
    provenance: dict[str, Any] = field(default_factory=dict)
    is_run: bool = False

    @property
    def claims(self) -> list[dict[str, Any]]:
        """The rows of the ledger; none for a chapter that was not executed."""
        return self.ledger["claims"] if self.ledger else []


def gather(root: Path, runs: Mapping[str, Path] | None = None) -> list[Material]:
    """The material of every chapter, in the order of the book.

    `runs` maps chapter names to run folders; chapters without one fall back on the committed notebook.
    Raises PageError for a run of a chapter that does not exist, or a notebook that is not readable.
    """
    runs = runs or {}
    known = chapters(root)
    if unknown := sorted(set(runs) - {chapter.name for chapter in known}):
        raise PageError(f"no chapter {unknown[0]!r}: there are {', '.join(c.name for c in known) or 'none'}")
    return [_material(chapter, runs.get(chapter.name)) for chapter in known]


def _material(chapter: Chapter, run: Path | None) -> Material:
    path = run / "notebook.ipynb" if run else chapter.notebook
    notebook = read_notebook(path)
    if run:
        provenance = json.loads((run / "record.json").read_text("utf-8"))
    else:
        provenance = notebook["metadata"].get("tokenbook", {})
    return Material(chapter, path, find_ledger(notebook), provenance, run is not None)


def read_notebook(path: Path) -> dict[str, Any]:
    """A notebook as plain data. Raises PageError with one sentence if it is none."""
    try:
        notebook = json.loads(path.read_text("utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise PageError(f"cannot read the notebook {path}: {error}") from error
    if not isinstance(notebook.get("cells"), list):
        raise PageError(f"cannot read the notebook {path}: it has no list of cells")
    return notebook


def find_ledger(notebook: dict[str, Any]) -> dict[str, Any] | None:
    """The last claims output of a notebook, or None."""
    for cell in reversed(notebook["cells"]):
        for output in reversed(cell.get("outputs", [])):
            if MIME in output.get("data", {}):
                return output["data"][MIME]
    return None


def totals(materials: list[Material]) -> dict[str, int]:
    """How many claims have which verdict, over all chapters, in the fixed order of the verdicts."""
    counts = dict.fromkeys(VERDICTS, 0)
    for material in materials:
        for claim in material.claims:
            counts[claim["verdict"]] += 1
    return counts
