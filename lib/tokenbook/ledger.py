"""The claims ledger: what was measured against thresholds fixed before, and the verdict that follows.

A verdict is computed, never typed:
    reproduced       every required criterion meets its threshold, its interval excludes the null, and the
                     control fails the threshold, as it should
    direction only   the right sign, but a threshold or an interval is missed
    not reproduced   neither; also when the control meets the threshold, because then nothing is shown
    untested         with the reason
"""

from __future__ import annotations

import html
import math
import os
import sys
from dataclasses import dataclass
from typing import Any

from tokenbook.papers import CAVEATS, Claim, Criterion

MIME = "application/vnd.tokenbook.claims+json"
VERDICTS = ("reproduced", "direction only", "not reproduced", "untested")


class LedgerError(ValueError):
    """A measurement that does not fit the claims, or a claim left without one."""


@dataclass(frozen=True)
class Measurement:
    """A value with its interval, and the control's value, all in the criterion's unit."""

    value: float
    interval: tuple[float, float] | None = None
    control: float | None = None


def interval_holds(criterion: Criterion, measured: Measurement) -> bool:
    """Whether the interval excludes the null (where none is given: whether all of it meets the threshold)."""
    if criterion.exact:
        return True
    if measured.interval is None:
        return False
    low, high = measured.interval
    if criterion.null is None:
        return criterion.met_by(low) and criterion.met_by(high)
    return low > criterion.null if criterion.wants_more else high < criterion.null


def _right_sign(criterion: Criterion, measured: Measurement) -> bool:
    if criterion.null is None or criterion.exact:
        return criterion.met_by(measured.value)
    return measured.value > criterion.null if criterion.wants_more else measured.value < criterion.null


def judge(claim: Claim, measured: dict[str, Measurement]) -> tuple[str, str]:
    """Verdict on a claim and the reason in a few words. `measured` maps criterion ids to measurements."""
    if any(math.isnan(measured[c.id].control) for c in claim.controlled):
        return "not reproduced", "the control could not be measured, so nothing is shown"
    passing = [c for c in claim.controlled if c.met_by(measured[c.id].control)]
    if claim.controlled and len(passing) == len(claim.controlled):
        return "not reproduced", "the control meets the threshold too, so nothing is shown"
    missed = [c for c in claim.required if not c.met_by(measured[c.id].value)]
    loose = [c for c in claim.required if c not in missed and not interval_holds(c, measured[c.id])]
    if not missed and not loose:
        return "reproduced", ""
    reason = "; ".join(
        [f"{c.id} misses {c}" for c in missed]
        + [f"the interval of {c.id} does not exclude {_null(c)}" for c in loose]
    )
    if claim.direction:
        right = all(c.met_by(measured[c.id].value) for c in claim.direction)
    else:
        right = all(_right_sign(c, measured[c.id]) for c in claim.required)
    return ("direction only" if right else "not reproduced"), reason


def _null(criterion: Criterion) -> str:
    null = criterion.threshold if criterion.null is None else criterion.null
    return f"{null:g} {criterion.unit}".rstrip()


class Ledger:
    """Collects the measurements of one run and judges every claim of its paper."""

    def __init__(self, chapter: Any, parameters: Any):
        """`chapter`: a `tokenbook.chapter.Chapter`; `parameters`: what its `parameters()` returned."""
        self.chapter, self.parameters = chapter, parameters
        self.claims = {claim.id: claim for claim in chapter.paper.claims}
        self.measured: dict[str, dict[str, Measurement]] = {}
        self.reasons: dict[str, str] = {}
        self.measurements: dict[str, dict[str, Any]] = {}

    def measure(
        self,
        claim: str,
        criterion: str,
        value: float,
        interval: tuple[float, float] | None = None,
        control: float | None = None,
    ) -> None:
        """Enter one measurement, in the criterion's unit.

        Raises LedgerError for an unknown claim or criterion, an interval that is not (low, high), a missing
        interval (unless the criterion is exact) or a missing control (where the claim names one).
        """
        entry = self._claim(claim)
        known = {c.id: c for c in entry.criteria}
        if criterion not in known:
            raise LedgerError(f"claim {claim} has no criterion {criterion!r}; it has {', '.join(known)}")
        rule = known[criterion]
        if interval is None and not rule.exact and rule.role == "required":
            raise LedgerError(f"{claim}.{criterion} needs an interval (only exact criteria go without one)")
        if interval is not None:
            interval = (float(interval[0]), float(interval[1]))
            if interval[0] > interval[1]:
                raise LedgerError(f"{claim}.{criterion}: the interval must read (low, high), got {interval}")
        if control is None and rule in entry.controlled:
            raise LedgerError(f"{claim}.{criterion} needs the control's value: {entry.control}")
        self.reasons.pop(claim, None)
        control = None if control is None else float(control)
        self.measured.setdefault(claim, {})[criterion] = Measurement(float(value), interval, control)

    def untested(self, claim: str, reason: str) -> None:
        """Leave a claim untested, with the reason that readers are shown."""
        self._claim(claim)
        if not reason.strip():
            raise LedgerError(f"claim {claim}: `untested` needs a reason")
        self.measured.pop(claim, None)
        self.reasons[claim] = reason

    def record(
        self, name: str, value: float, unit: str = "", interval: tuple[float, float] | None = None
    ) -> None:
        """Keep a further number with the run (it decides no claim)."""
        bounds = None if interval is None else [_finite(interval[0]), _finite(interval[1])]
        self.measurements[name] = {"value": _finite(value), "unit": unit, "interval": bounds}

    def verdict(self, claim: str) -> str:
        """The computed verdict on one claim."""
        return self._judge(self._claim(claim))[0]

    def rows(self) -> list[dict[str, Any]]:
        """One object per claim, as in `tokenbook claims --json`."""
        missing = [c for c in self.claims if self._missing(self.claims[c])]
        if missing:
            wants = "; ".join(f"{c}: {', '.join(self._missing(self.claims[c]))}" for c in missing)
            raise LedgerError(f"claims without a measurement: {wants}")
        return [self._row(claim) for claim in self.claims.values()]

    def payload(self) -> dict[str, Any]:
        """What travels inside the executed notebook."""
        dispatch = sys.modules.get("tokenbook.kernels")
        return {
            "chapter": self.chapter.slug,
            "scale": self.parameters.scale,
            "parameters": self.parameters.as_dict(),
            "claims": self.rows(),
            "measurements": self.measurements,
            "backends": dispatch.backends_used() if hasattr(dispatch, "backends_used") else {},
        }

    def show(self) -> None:
        """Display the ledger as a table and, in the same output, as machine-readable data."""
        from IPython.display import display

        payload = self.payload()
        plain = "\n".join(f"{row['claim']}: {row['verdict']}" for row in payload["claims"])
        bundle = {"text/plain": plain, "text/html": ledger_html(payload["claims"]), MIME: payload}
        display(bundle, raw=True)

    def _claim(self, claim: str) -> Claim:
        if claim not in self.claims:
            raise LedgerError(f"unknown claim {claim!r}; the paper file has {', '.join(self.claims)}")
        return self.claims[claim]

    def _missing(self, claim: Claim) -> list[str]:
        got = self.measured.get(claim.id, {})
        if claim.id in self.reasons or (not got and claim.untested):
            return []
        return [c.id for c in claim.criteria if c.id not in got]

    def _judge(self, claim: Claim) -> tuple[str, str]:
        if claim.id in self.reasons:
            return "untested", self.reasons[claim.id]
        if claim.id not in self.measured and claim.untested:
            return "untested", claim.untested
        if missing := self._missing(claim):
            raise LedgerError(f"claim {claim.id} lacks {', '.join(missing)}")
        return judge(claim, self.measured[claim.id])

    def _row(self, claim: Claim) -> dict[str, Any]:
        verdict, reason = self._judge(claim)
        got = self.measured.get(claim.id, {})
        criteria = [
            {
                **{k: v for k, v in c.model_dump().items() if k in ("id", "what", "unit", "exact", "role")},
                "threshold": str(c),
                "measured": _finite(got[c.id].value),
                "interval": None if got[c.id].interval is None else [_finite(x) for x in got[c.id].interval],
                "control": None if got[c.id].control is None else _finite(got[c.id].control),
                "met": c.met_by(got[c.id].value),
            }
            for c in claim.criteria
            if c.id in got
        ]
        head = criteria[0] if criteria else {}
        shown = next((c["control"] for c in criteria if c["control"] is not None), None)
        return {
            "chapter": self.chapter.slug,
            "claim": claim.id,
            "statement": claim.statement,
            "paper": claim.paper,
            "where": claim.where,
            "source": claim.source,
            "measured": head.get("measured"),
            "interval": head.get("interval"),
            "unit": head.get("unit", ""),
            "threshold": head.get("threshold", ""),
            "control": None if not claim.control else {"value": shown, "what": claim.control},
            "verdict": verdict,
            "reason": reason,
            "scale": self.parameters.scale,
            "run": os.environ.get("TOKENBOOK_RUN"),
            "criteria": criteria,
        }


def _finite(value: float) -> float | None:
    """JSON knows no NaN and no infinity: they become null, which no criterion takes for met."""
    return float(value) if math.isfinite(value) else None


def number(value: float | None) -> str:
    """A number for people: four significant digits, a dash where there is none."""
    return "–" if value is None else f"{value:.4g}"


def _criterion_html(c: dict[str, Any]) -> str:
    interval = "" if c["interval"] is None else f" [{number(c['interval'][0])}, {number(c['interval'][1])}]"
    control = "" if c["control"] is None else f"; control {number(c['control'])}"
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
        reason = f"<div>{html.escape(row['reason'])}</div>" if row["reason"] else ""
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
