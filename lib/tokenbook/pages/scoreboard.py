"""The scoreboard: every claim of every chapter, as plain Markdown tables.

The filter in the browser (`book/_static/tokenbook.js`) reads these tables; without it they stay readable.
"""

from __future__ import annotations

from typing import Any

from tokenbook.ledger_table import left_open, number
from tokenbook.pages.material import VERDICTS, Material, totals
from tokenbook.pages.words import cell, quantity, row
from tokenbook.papers import CAVEATS

# The sign repeats the word, so that nobody depends on the colour.
SIGNS = {"reproduced": "✓", "direction only": "↗", "not reproduced": "✗", "untested": "○"}

INTRO = """---
html_theme.sidebar_secondary.remove: true
---

# The scoreboard

Every claim of every chapter: the paper's figure, ours with its 95 % interval, the threshold that was fixed
before the run, what the control gave, and the verdict that follows from them. A verdict is computed, never
typed; [](how-to-read.md) says by which rule. It speaks of the scale that stands above each table: at `small`,
of small models trained in the notebook. A claim that is not reproduced there is not refuted for the paper's
own models.
"""


def page(materials: list[Material]) -> str:
    """The page `book/scoreboard.md`."""
    blocks = [INTRO]
    if any(material.claims for material in materials):
        blocks += ["## Totals\n", totals_table(materials, link="../notebooks/{}.ipynb"), _how_firm(materials)]
    else:
        blocks.append("No chapter has been executed yet.\n")
    blocks += [_chapter(material) for material in materials]
    return "\n".join(blocks)


def badge(verdict: str) -> str:
    """A verdict as a coloured word with its sign."""
    return f'<span class="verdict verdict-{verdict.replace(" ", "-")}">{SIGNS[verdict]} {verdict}</span>'


def totals_table(materials: list[Material], link: str) -> str:
    """Claims by chapter and verdict. `link` is a path with a place for the chapter's name."""
    heads = ["Chapter", *VERDICTS, "claims"]
    lines = [row(heads), row(["---", *["---:"] * (len(heads) - 1)])]
    for material in materials:
        counts = totals([material])
        title = f"[{cell(material.chapter.paper.title)}]({link.format(material.chapter.name)})"
        lines.append(row([title, *[str(n) for n in counts.values()], str(sum(counts.values()))]))
    counts = totals(materials)
    lines.append(row([f"**{text}**" for text in ("All", *counts.values(), sum(counts.values()))]))
    return "\n".join(lines) + "\n"


def _how_firm(materials: list[Material]) -> str:
    """How many verdicts depend on where in their intervals the truth lies."""
    tested = [c for m in materials for c in m.claims if c["verdict"] != "untested"]
    n_open = sum(bool(left_open(claim)) for claim in tested)
    return (
        f"Of the {len(tested)} claims that were tested, {n_open} would get another verdict at one end of "
        "their intervals. They are marked below; with other seeds, expect some of them to move.\n"
    )


def _chapter(material: Material) -> str:
    paper = material.chapter.paper
    head = f"## {cell(paper.title)}\n\n{cell(paper.authors)}, {paper.year}. "
    head += f"[The chapter](../notebooks/{material.chapter.name}.ipynb)"
    if not material.ledger:
        return f"{head}. It has not been executed yet, so no claim is judged.\n"
    without = {claim.id: claim.no_control for claim in paper.claims}
    lines = [
        f"{head}, run at scale `{material.ledger['scale']}`.\n",
        row(["Claim", "The paper", "Ours [interval], and the threshold", "Control", "Verdict"]),
        row(["---"] * 5),
        *[row(_cells(claim, without.get(claim["claim"], ""))) for claim in material.claims],
    ]
    return "\n".join(lines) + "\n"


def _cells(claim: dict[str, Any], without: str) -> list[str]:
    """The row of a claim; `without` says why it needs no control, where it has none."""
    caveat = CAVEATS.get(claim.get("source", ""), "")
    where = "; ".join(filter(None, [claim.get("where", ""), caveat]))
    paper = cell(claim["paper"]) + (f"<br><small>{cell(where)}</small>" if where else "")
    dot = "• " if len(claim["criteria"]) > 1 else ""
    ours = "<br>".join(dot + _criterion(c) for c in claim["criteria"]) or "–"
    verdict = badge(claim["verdict"])
    for said in (claim.get("reason"), left_open(claim)):
        verdict += f"<br><small>{cell(said)}</small>" if said else ""
    return [
        f"**{cell(claim['claim'])}** {cell(claim['statement'])}",
        paper,
        ours,
        _control(claim, without),
        verdict,
    ]


def _criterion(criterion: dict[str, Any]) -> str:
    value = f"**{quantity(criterion['measured'], criterion['unit'])}**{_bounds(criterion['interval'])}"
    return f"{cell(criterion['what'])}: {value}, wanted {cell(criterion['threshold'])}"


def _control(claim: dict[str, Any], without: str) -> str:
    if not claim["control"]:
        return f"none needed: {cell(without)}" if without else "–"
    values = [
        f"**{quantity(c['control'], c['unit'])}**{_bounds(c.get('control_interval'))}"
        for c in claim["criteria"]
        if c["control"] is not None
    ]
    return f"{cell(claim['control']['what'])}{': ' if values else ''}{', '.join(values)}"


def _bounds(interval: list[float | None] | None) -> str:
    return f" \\[{number(interval[0])}, {number(interval[1])}\\]" if interval else ""
