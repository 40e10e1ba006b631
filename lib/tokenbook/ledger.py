"""The claims ledger: what was measured against thresholds fixed before, and the verdict that follows.

A verdict is computed, never typed:
    reproduced       every required criterion meets its threshold, its interval excludes the null, and the
                     control fails the threshold, as it should
    direction only   the right sign, but a threshold or an interval is missed
    not reproduced   neither; also when the control meets the threshold, because then nothing is shown
    untested         with the reason

Another run, with other seeds, measures something else. `other_verdicts` tells how far a verdict depends on
that: which ones the ends of the intervals would have given.
"""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass, replace
from typing import Any

from tokenbook.ledger_table import ledger_html
from tokenbook.papers import Claim, Criterion

MIME = "application/vnd.tokenbook.claims+json"
VERDICTS = ("reproduced", "direction only", "not reproduced", "untested")


class LedgerError(ValueError):
    """A measurement that does not fit the claims, or a claim left without one."""


@dataclass(frozen=True)
class Measurement:
    """A value with its interval, and the control's value with its own, all in the criterion's unit."""

    value: float
    interval: tuple[float, float] | None = None
    control: float | None = None
    control_interval: tuple[float, float] | None = None


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


def other_verdicts(claim: Claim, measured: dict[str, Measurement]) -> list[str]:
    """Verdicts other than that of `judge` which the intervals leave open, in the order of VERDICTS.

    The claim is judged again with all its measurements at the ends of their intervals that speak against it
    (and its controls at the ends that speak against them failing), then at those that speak for it.  What
    has no interval stays where it is.  An empty list: the verdict does not depend on where in the intervals
    the truth lies.
    """
    rules = {c.id: c for c in claim.criteria}
    ends = [
        judge(claim, {name: _at_end(rules[name], m, good) for name, m in measured.items()})[0]
        for good in (False, True)
    ]
    return [v for v in VERDICTS if v in ends and v != judge(claim, measured)[0]]


def _at_end(criterion: Criterion, measured: Measurement, good: bool) -> Measurement:
    """The measurement at the end of its interval that speaks for the claim (`good`) or against it."""
    upper = criterion.wants_more == good
    if _known(measured.interval):
        end = measured.interval[upper]
        measured = replace(measured, value=end, interval=(end, end))
    if _known(measured.control_interval):
        measured = replace(measured, control=measured.control_interval[not upper])
    return measured


def _known(interval: tuple[float, float] | None) -> bool:
    return interval is not None and not any(math.isnan(end) for end in interval)


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
        value: float | tuple[float, tuple[float, float]],
        interval: tuple[float, float] | None = None,
        control: float | tuple[float, tuple[float, float]] | None = None,
        control_interval: tuple[float, float] | None = None,
    ) -> None:
        """Enter one measurement, in the criterion's unit.

        `value` and `control` may be pairs of a number and its interval, as `metrics.estimate` returns.

        Raises LedgerError for an unknown claim or criterion, an interval that is not (low, high), a missing
        interval (unless the criterion is exact), a missing control (where the claim names one) or an interval
        of a control that is not there.
        """
        if isinstance(value, tuple):
            value, interval = value
        if isinstance(control, tuple):
            control, control_interval = control
        entry = self._claim(claim)
        known = {c.id: c for c in entry.criteria}
        if criterion not in known:
            raise LedgerError(f"claim {claim} has no criterion {criterion!r}; it has {', '.join(known)}")
        rule = known[criterion]
        if interval is None and not rule.exact and rule.role == "required":
            raise LedgerError(f"{claim}.{criterion} needs an interval (only exact criteria go without one)")
        if control is None and control_interval is not None:
            raise LedgerError(f"{claim}.{criterion}: control_interval needs a control")
        interval, control_interval = (
            _checked(f"{claim}.{criterion}", given) for given in (interval, control_interval)
        )
        if control is None and rule in entry.controlled:
            raise LedgerError(f"{claim}.{criterion} needs the control's value: {entry.control}")
        self.reasons.pop(claim, None)
        control = None if control is None else float(control)
        measured = Measurement(float(value), interval, control, control_interval)
        self.measured.setdefault(claim, {})[criterion] = measured

    def untested(self, claim: str, reason: str) -> None:
        """Leave a claim untested, with the reason that readers are shown."""
        self._claim(claim)
        if not reason.strip():
            raise LedgerError(f"claim {claim}: `untested` needs a reason")
        self.measured.pop(claim, None)
        self.reasons[claim] = reason

    def record(
        self,
        name: str,
        value: float | tuple[float, tuple[float, float]],
        unit: str = "",
        interval: tuple[float, float] | None = None,
    ) -> None:
        """Keep a further number with the run (it decides no claim); `value` may bring its interval along."""
        if isinstance(value, tuple):
            value, interval = value
        self.measurements[name] = {"value": _finite(value), "unit": unit, "interval": _plain(interval)}

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
                "interval": _plain(got[c.id].interval),
                "control": None if got[c.id].control is None else _finite(got[c.id].control),
                "control_interval": _plain(got[c.id].control_interval),
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
            "other_verdicts": [] if verdict == "untested" else other_verdicts(claim, got),
            "scale": self.parameters.scale,
            "run": os.environ.get("TOKENBOOK_RUN"),
            "criteria": criteria,
        }


def _finite(value: float) -> float | None:
    """JSON knows no NaN and no infinity: they become null, which no criterion takes for met."""
    return float(value) if math.isfinite(value) else None


def _plain(interval: tuple[float, float] | None) -> list[float | None] | None:
    return None if interval is None else [_finite(end) for end in interval]


def _checked(where: str, interval: tuple[float, float] | None) -> tuple[float, float] | None:
    if interval is None:
        return None
    low, high = (float(end) for end in interval)
    if low > high:
        raise LedgerError(f"{where}: the interval must read (low, high), got {(low, high)}")
    return low, high
