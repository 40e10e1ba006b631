"""What the book is made of: its chapters, their parts, and the table of contents that follows.

A chapter exists when `notebooks/NAME.ipynb` exists; its paper file names its part by title; `book/parts.toml`
gives the order of the parts. Nothing else has to be edited when a chapter is added.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

import yaml

from tokenbook import papers

# Pages that stand before and behind the chapters, by the caption they stand under.
BEFORE = ("Start here", ("how-to-read", "how-to-run", "scoreboard"))
BEHIND = ("Beside the chapters", ("kernels", "status", "references"))

HEADER = "# Written by `python -m tokenbook.pages` from notebooks/, book/papers/ and book/parts.toml.\n"


class PageError(ValueError):
    """Material of the book that is missing or does not fit together."""


@dataclass(frozen=True)
class Chapter:
    """A chapter that exists: its name, its committed notebook and its paper's facts."""

    name: str
    notebook: Path
    paper: papers.Paper


def chapters(root: Path) -> list[Chapter]:
    """Every chapter with a notebook, in the order of the book: by part, then by name.

    Raises PageError when a paper names a part that `book/parts.toml` does not have.
    """
    order = [part["title"] for part in parts(root)]
    found = []
    for notebook in sorted((root / "notebooks").glob("*.ipynb")):
        paper = papers.load(notebook.stem, root)
        if paper.part not in order:
            raise PageError(
                f"book/papers/{notebook.stem}.toml: part must be one of the titles in book/parts.toml "
                f"({'; '.join(order)}), got {paper.part!r}"
            )
        found.append(Chapter(notebook.stem, notebook, paper))
    return sorted(found, key=lambda chapter: (order.index(chapter.paper.part), chapter.name))


def parts(root: Path) -> list[dict[str, str]]:
    """The parts in their order, each with its `title` and its introducing `page`."""
    path = root / "book" / "parts.toml"
    try:
        return tomllib.loads(path.read_text("utf-8"))["parts"]
    except (OSError, tomllib.TOMLDecodeError, KeyError) as error:
        raise PageError(f"book/parts.toml must list the parts of the book: {error}") from error


def sweep_pages(root: Path) -> list[str]:
    """Pages of the sweeps whose results are committed, as paths without suffix."""
    return [f"book/sweeps/{path.stem}" for path in sorted((root / "book" / "sweeps").glob("*.parquet"))]


def toc(root: Path) -> str:
    """The text of `_toc.yml`: pages first, then the parts that have a chapter, then the rest."""
    by_part: dict[str, list[str]] = {}
    for chapter in chapters(root):
        by_part.setdefault(chapter.paper.part, []).append(f"notebooks/{chapter.name}")
    sections = [_pages(*BEFORE)]
    for part in parts(root):
        if part["title"] in by_part:
            files = [f"book/parts/{part['page']}", *by_part[part["title"]]]
            sections.append(_section(part["title"], files))
    if sweeps := sweep_pages(root):
        sections.append(_section("Sweeps", sweeps))
    sections.append(_pages(*BEHIND))
    tree = {"format": "jb-book", "root": "book/index", "parts": sections}
    return HEADER + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=1000)


def _pages(caption: str, names: tuple[str, ...]) -> dict[str, object]:
    return _section(caption, [f"book/{name}" for name in names])


def _section(caption: str, files: list[str]) -> dict[str, object]:
    return {"caption": caption, "chapters": [{"file": file} for file in files]}
