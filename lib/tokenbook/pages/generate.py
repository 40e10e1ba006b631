"""Which files are generated, and from what: written for the clone, or compared with what is committed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tokenbook.pages import kernels, picture, scoreboard, status, sweeps
from tokenbook.pages.contents import PageError, toc
from tokenbook.pages.material import Material, gather, totals

BEGIN, END = "<!-- scoreboard: begin -->", "<!-- scoreboard: end -->"

# Pages written by hand that show the totals between two markers, with the link to a chapter seen from there.
TOTALS = {
    "README.md": ("notebooks/{}.ipynb", "book/scoreboard.md"),
    "book/index.md": ("../notebooks/{}.ipynb", "scoreboard.md"),
}


def generated(root: Path, runs: Mapping[str, Path] | None = None) -> dict[str, str]:
    """Path (relative to the root) and text of every generated file.

    `runs` maps chapters to run folders; without one, a chapter's committed notebook speaks.
    """
    materials = gather(root, runs)
    files = {
        "_toc.yml": toc(root),
        "book/scoreboard.md": scoreboard.page(materials),
        "book/status.md": status.page(materials),
        "book/kernels.md": kernels.page(root / "benchmarks" / "results"),
    }
    drawn = picture.files() | kernels.figures(root / "benchmarks" / "results")
    files |= {f"book/figures/{name}": text for name, text in drawn.items()}
    files |= sweeps.generated(root)
    for path, (link, page) in TOTALS.items():
        text = _read(root / path)
        if text is None:
            raise PageError(f"{path} is missing")
        files[path] = _with_totals(path, text, materials, link, page)
    return files


def write(root: Path) -> list[str]:
    """Write the generated files that are not current, from committed material; returns their paths."""
    changed = []
    for path, text in generated(root).items():
        if _read(root / path) != text:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(text, "utf-8")
            changed.append(path)
    return changed


def stale(root: Path) -> list[str]:
    """Paths of the generated files that are missing or differ from what committed material gives."""
    return [path for path, text in generated(root).items() if _read(root / path) != text]


def _read(path: Path) -> str | None:
    return path.read_text("utf-8") if path.is_file() else None


def _with_totals(path: str, text: str, materials: list[Material], link: str, page: str) -> str:
    """The page's text with the block between the markers replaced by the current totals."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise PageError(f"{path} must hold the markers {BEGIN} and {END} once each")
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    counts = totals(materials)
    if sum(counts.values()):
        said = ", ".join(f"{n} {verdict}" for verdict, n in counts.items())
        n_chapters = sum(1 for material in materials if material.ledger)
        words = f"{n_chapters} chapter{'s' if n_chapters != 1 else ''}, {sum(counts.values())} claims"
        block = f"**{words}**: {said}. [Every claim]({page})\n\n"
        block += scoreboard.totals_table(materials, link)
    else:
        block = "No chapter has been executed yet.\n"
    return f"{head}{BEGIN}\n{block}{END}{tail}"
