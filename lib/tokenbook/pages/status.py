"""The status page: what ran where, when, how long, and on which versions."""

from __future__ import annotations

from tokenbook.pages.material import Material
from tokenbook.pages.words import cell, device, row

INTRO = """---
html_theme.sidebar_secondary.remove: true
---

# Status

What the numbers in this book come from: for every chapter the run whose outputs are shown, on which device
it ran, when, for how long, and with which versions. Where it says *as committed*, the outputs came with the
repository. Running a chapter again ([](how-to-run.md)) and rendering the book replaces its row; a dash stands
for what the notebook's metadata do not tell.
"""
# Versions shown first, where a run has them; all others follow by name.
FIRST = ("python", "torch", "triton", "transformers", "numpy")


def page(materials: list[Material]) -> str:
    """The page `book/status.md`."""
    if not materials:
        return f"{INTRO}\nThere is no chapter yet.\n"
    heads = ["Chapter", "Outcome", "Scale", "Device", "Seconds", "Peak memory", "Finished", "Run"]
    table = [row(heads), row(["---"] * 4 + ["---:"] * 2 + ["---"] * 2)]
    table += [row(_cells(material)) for material in materials]
    return "\n".join([INTRO, *table, "", _parameters(materials), _versions(materials)])


def _cells(material: Material) -> list[str]:
    facts, name = material.provenance, material.chapter.name
    seconds, peak = facts.get("seconds"), facts.get("peak_memory_mib")
    if not material.ledger:
        outcome = "not executed yet"
    else:
        outcome = facts.get("status", "executed")
    return [
        f"[{name}](../notebooks/{name}.ipynb)",
        outcome if material.is_run else f"{outcome}, as committed",
        material.ledger["scale"] if material.ledger else "–",
        cell(device(facts.get("device"))),
        f"{seconds:.0f}" if seconds is not None else "–",
        f"{peak:,.0f} MiB" if peak is not None else "–",
        _time(facts.get("finished")),
        f"`{str(facts['key'])[:12]}`" if facts.get("key") else "–",
    ]


def _time(stamp: str | None) -> str:
    """A record's time, to the minute: `2026-05-04 12:30 UTC`."""
    return f"{stamp[:10]} {stamp[11:16]} UTC" if stamp else "–"


def _parameters(materials: list[Material]) -> str:
    lines = ["## Parameters\n", "What each run was given, or took from the preset of its scale.\n"]
    for material in materials:
        if material.ledger:
            given = ", ".join(f"{k} = {v!r}" for k, v in material.ledger["parameters"].items())
            lines.append(f"- **{material.chapter.name}**: `{given}`")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def _versions(materials: list[Material]) -> str:
    """A table with a row per chapter, or one line where all chapters that tell their versions agree."""
    by_chapter = {m.chapter.name: v for m in materials if (v := m.provenance.get("versions"))}
    names = {name for versions in by_chapter.values() for name in versions}
    if not names:
        return ""
    order = [n for n in FIRST if n in names] + sorted(names - set(FIRST))
    lines = ["## Versions\n"]
    if len({tuple(sorted(versions.items())) for versions in by_chapter.values()}) == 1:
        versions = next(iter(by_chapter.values()))
        silent = [f"**{m.chapter.name}**" for m in materials if m.chapter.name not in by_chapter]
        said = "The same in every chapter" + (f" (not told by {', '.join(silent)})" if silent else "")
        return "\n".join([*lines, f"{said}: {', '.join(f'{n} {versions[n]}' for n in order)}."]) + "\n"
    lines += [row(["Chapter", *order]), row(["---"] * (len(order) + 1))]
    for chapter, versions in by_chapter.items():
        lines.append(row([chapter, *[str(versions.get(name, "–")) for name in order]]))
    return "\n".join(lines) + "\n"
