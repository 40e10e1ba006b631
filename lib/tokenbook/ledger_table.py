"""The ledger for people: its rows as an HTML table, and the words that the book's pages share with it."""

from __future__ import annotations

import html
from typing import Any

from tokenbook.papers import CAVEATS


def number(value: float | None) -> str:
    """A number for people: four significant digits, a dash where there is none."""
    return "–" if value is None else f"{value:.4g}"


def bounds(interval: list[float | None] | None) -> str:
    """An interval for people, with a space before it; nothing where there is none."""
    return "" if interval is None else f" [{number(interval[0])}, {number(interval[1])}]"


def left_open(row: dict[str, Any]) -> str:
    """What the intervals leave open, as a sentence without its full stop; nothing where that is nothing."""
    others = row.get("other_verdicts")
    return f"the intervals leave open: {' or '.join(others)}" if others else ""


def _criterion_html(c: dict[str, Any]) -> str:
    interval = bounds(c["interval"])
    given = c["control"] is not None
    control = f"; control {number(c['control'])}{bounds(c['control_interval'])}" if given else ""
    role = "direction: " if c["role"] == "direction" else ""
    return (
        f"<div>{role}{html.escape(c['what'])}: <b>{number(c['measured'])}</b>{interval} "
        f"{html.escape(c['unit'])} (wanted {html.escape(c['threshold'])}{control})</div>"
    )


def ledger_html(rows: list[dict[str, Any]]) -> str:
    """The ledger as an HTML table; verdicts are words, the colour only repeats them."""
    body = []
    for row in rows:
        caveat = CAVEATS.get(row["source"], "")
        source = html.escape(row["where"]) + (f" <i>({caveat})</i>" if caveat else "")
        measured = "".join(_criterion_html(c) for c in row["criteria"]) or "–"
        control = html.escape(row["control"]["what"]) if row["control"] else "–"
        reasons = (row["reason"], left_open(row))
        reason = "".join(f"<div>{html.escape(said)}</div>" for said in reasons if said)
        badge = f'<span class="verdict verdict-{row["verdict"].replace(" ", "-")}">{row["verdict"]}</span>'
        body.append(
            f"<tr><th scope='row'>{html.escape(row['claim'])}</th><td>{html.escape(row['statement'])}</td>"
            f"<td>{html.escape(row['paper'])}<br><small>{source}</small></td><td>{measured}</td>"
            f"<td>{control}</td><td>{badge}{reason}</td></tr>"
        )
    heads = ("Claim", "Statement", "Paper", "Ours [interval] (threshold; control)", "Control", "Verdict")
    head = "".join(f"<th scope='col'>{h}</th>" for h in heads)
    return (
        f'<div class="ledger-scroll"><table class="ledger"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )
