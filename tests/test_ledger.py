"""Verdicts follow from measurements; none can be typed."""

import json

import pytest

from tokenbook import metrics, papers
from tokenbook.ledger import MIME, Ledger, LedgerError, judge, other_verdicts
from tokenbook.ledger import Measurement as M
from tokenbook.ledger_table import ledger_html

MORE = {"id": "gain", "what": "gain", "unit": "%", "op": ">=", "threshold": 50, "null": 0}
LESS = {"id": "gap", "what": "gap", "unit": "nats", "op": "<=", "threshold": 0.02}
EXACT = {"id": "error", "what": "error", "unit": "", "op": "<=", "threshold": 1e-5, "exact": True}
HALF = {"id": "ratio", "what": "ratio", "unit": "", "op": "<=", "threshold": 0.5, "role": "direction"}


def claim(*criteria, **facts):
    facts = {"control": "shuffled"} | facts
    return papers.Claim(
        id="C1", statement="s", paper="p", where="Table 1", source="recalled", criteria=criteria, **facts
    )


@pytest.mark.parametrize(
    ("value", "interval", "control", "verdict"),
    [
        (60, (40, 80), 3, "reproduced"),
        (60, (-1, 90), 3, "direction only"),  # the interval holds the null
        (30, (20, 40), 3, "direction only"),  # the threshold is missed
        (-5, (-9, -1), 3, "not reproduced"),  # the wrong sign
        (60, (40, 80), 55, "not reproduced"),  # the control passes
        (float("nan"), (40, 80), 3, "not reproduced"),
        (60, (40, 80), float("nan"), "not reproduced"),  # a control that could not be measured shows nothing
        (60, (40, 80), float("-inf"), "reproduced"),
    ],
)
def test_a_lower_bound_is_judged_by_threshold_interval_and_control(value, interval, control, verdict):
    assert judge(claim(MORE), {"gain": M(value, interval, control)})[0] == verdict


@pytest.mark.parametrize(
    ("value", "interval", "verdict"),
    [
        (0.01, (0.0, 0.015), "reproduced"),
        (0.01, (0.0, 0.03), "direction only"),
        (0.03, (0, 1), "not reproduced"),
    ],
)
def test_without_a_null_the_whole_interval_must_meet_the_threshold(value, interval, verdict):
    assert judge(claim(LESS), {"gap": M(value, interval, control=0.5)})[0] == verdict


def test_a_direction_criterion_alone_decides_direction_only():
    measured = {"gap": M(0.03, (0.02, 0.04), control=0.5)}
    assert judge(claim(LESS, HALF), measured | {"ratio": M(0.4)})[0] == "direction only"
    assert judge(claim(LESS, HALF), measured | {"ratio": M(0.6)})[0] == "not reproduced"


@pytest.mark.parametrize(
    ("value", "interval", "control", "control_interval", "others"),
    [
        (60, (55, 65), 3, None, []),
        (60, (40, 80), 3, None, ["direction only"]),
        (30, (-5, 60), 3, None, ["reproduced", "not reproduced"]),
        (-5, (-9, -1), 3, None, []),
        (60, (55, 65), 45, (40, 52), ["not reproduced"]),  # the control might have passed
        (60, (55, 65), 52, (45, 60), ["reproduced"]),  # the control might have failed
        (60, (55, 65), float("nan"), None, []),
        (
            60,
            (float("nan"), float("nan")),
            3,
            (float("nan"), float("nan")),
            [],
        ),  # too few values for an interval
    ],
)
def test_the_ends_of_the_intervals_tell_which_verdicts_they_leave_open(
    value, interval, control, control_interval, others
):
    assert other_verdicts(claim(MORE), {"gain": M(value, interval, control, control_interval)}) == others


@pytest.mark.parametrize(("interval", "others"), [((0, 0.015), []), ((0.0, 0.03), ["reproduced"])])
def test_where_less_is_wanted_the_lower_end_speaks_for_the_claim(interval, others):
    measured = {"gap": M(0.01, interval, 0.5), "ratio": M(0.4)}
    assert other_verdicts(claim(LESS, HALF), measured) == others


def test_a_criterion_without_an_interval_leaves_nothing_open():
    assert other_verdicts(claim(EXACT), {"error": M(1e-6, None, 0.2)}) == []
    assert other_verdicts(claim(EXACT), {"error": M(1e-6, (0, 1e-4), 0.2)}) == ["not reproduced"]


def test_every_required_criterion_must_hold():
    measured = {"gain": M(60, (40, 80), control=3), "error": M(1e-4)}
    verdict, reason = judge(claim(MORE, EXACT), measured)
    assert verdict == "not reproduced"
    assert "error misses ≤ 1e-05" in reason


@pytest.mark.parametrize(
    "facts",
    [{"control": ""}, {"no_control": "exact"}],
    ids=["neither", "both"],
)
def test_a_claim_names_its_control_or_the_reason_for_none(facts):
    with pytest.raises(ValueError, match="control"):
        claim(MORE, **facts)


class Chapter:
    slug = "demo"
    paper = papers.Paper(
        title="t",
        authors="a",
        year=2024,
        part="p",
        summary="s",
        claims=(
            claim(MORE),
            papers.Claim(
                id="C2", statement="big", paper="9", where="T2", source="paper", untested="needs 7B"
            ),
        ),
    )


class P:
    scale = "small"

    @staticmethod
    def as_dict():
        return {"scale": "small"}


@pytest.fixture
def ledger():
    return Ledger(Chapter, P)


def test_measurements_that_do_not_fit_are_refused(ledger):
    with pytest.raises(LedgerError, match="unknown claim 'C9'"):
        ledger.measure("C9", "gain", 1)
    with pytest.raises(LedgerError, match="no criterion 'loss'"):
        ledger.measure("C1", "loss", 1)
    with pytest.raises(LedgerError, match="needs an interval"):
        ledger.measure("C1", "gain", 1, control=0)
    with pytest.raises(LedgerError, match="needs the control's value"):
        ledger.measure("C1", "gain", 1, interval=(0, 2))
    with pytest.raises(LedgerError, match=r"\(low, high\)"):
        ledger.measure("C1", "gain", 1, interval=(2, 0), control=0)
    with pytest.raises(LedgerError, match=r"\(low, high\)"):
        ledger.measure("C1", "gain", 1, interval=(0, 2), control=0, control_interval=(1, 0))
    with pytest.raises(LedgerError, match="control_interval needs a control"):
        ledger.measure("C1", "gain", 1, interval=(0, 2), control_interval=(0, 1))
    with pytest.raises(LedgerError, match="reason"):
        ledger.untested("C1", " ")


def test_a_claim_without_a_row_stops_the_ledger(ledger):
    with pytest.raises(LedgerError, match="C1: gain"):
        ledger.rows()


def test_rows_hold_the_contract_and_are_plain_json(ledger):
    ledger.measure("C1", "gain", 60, interval=(40, 80), control=float("-inf"))
    ledger.record("nll", 2.5, unit="nats", interval=(2, 3))
    payload = json.loads(json.dumps(ledger.payload(), allow_nan=False))
    first, second = payload["claims"]
    contract = {
        *(
            "chapter",
            "claim",
            "statement",
            "paper",
            "measured",
            "interval",
            "threshold",
            "control",
            "verdict",
        ),
        *("scale", "run"),
    }
    assert contract <= set(first)
    assert (first["verdict"], first["measured"], first["interval"]) == ("reproduced", 60.0, [40.0, 80.0])
    assert first["control"] == {"value": None, "what": "shuffled"}
    assert first["other_verdicts"] == ["direction only"]
    assert (second["verdict"], second["reason"]) == ("untested", "needs 7B")
    assert second["other_verdicts"] == []
    assert payload["measurements"]["nll"] == {"value": 2.5, "unit": "nats", "interval": [2.0, 3.0]}


def test_a_pair_brings_its_interval_along(ledger):
    ledger.measure("C1", "gain", metrics.Estimate(60.0, (55, 65)), control=(3.0, (1, 5)))
    ledger.record("nll", metrics.Estimate(2.5, (2, 3)), unit="nats")
    assert ledger.measurements["nll"] == {"value": 2.5, "unit": "nats", "interval": [2.0, 3.0]}
    criterion = ledger.rows()[0]["criteria"][0]
    assert (criterion["measured"], criterion["interval"]) == (60, [55, 65])
    assert (criterion["control"], criterion["control_interval"]) == (3, [1, 5])


def test_the_table_says_the_verdict_in_words_and_the_caveat(ledger):
    ledger.measure("C1", "gain", 60, interval=(40, 80), control=3)
    table = ledger_html(ledger.rows())
    assert ">reproduced</span>" in table
    assert "from memory, to be verified" in table
    assert "the intervals leave open: direction only" in table


def test_the_table_shows_the_interval_of_a_control(ledger):
    ledger.measure("C1", "gain", 60, interval=(55, 80), control=3, control_interval=(-2, 7))
    table = ledger_html(ledger.rows())
    assert "control 3 [-2, 7]" in table
    assert "leave open" not in table


def test_show_puts_table_and_data_into_one_output(ledger, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw: shown.append(bundle))
    ledger.measure("C1", "gain", 60, interval=(40, 80), control=3)
    ledger.show()
    assert set(shown[0]) == {"text/plain", "text/html", MIME}
