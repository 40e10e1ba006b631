"""Small pieces of Markdown that the generated pages share."""

from __future__ import annotations

import re
from typing import Any

from tokenbook.ledger_table import number

# A device's facts in the order in which they are told, and how the numbers among them are said.
DEVICE = ("kind", "name", "processor", "cores", "threads", "memory_gib", "system")
COUNTED = {"cores": "core", "threads": "thread"}


def cell(text: str) -> str:
    """Text made safe for a cell of a Markdown table: nothing in it is markup."""
    text = re.sub(r"\s+", " ", text.strip())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]|$~#])", r"\\\1", text)


def row(cells: list[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def quantity(value: float | None, unit: str) -> str:
    """A number with its unit, which a line break must not part."""
    return f"{number(value)}\u00a0{cell(unit)}" if unit else number(value)


def device(facts: dict[str, Any] | None) -> str:
    """A device in words: `cpu, Some Processor, 2 cores, 1 thread`. Facts with other names come last."""
    facts = facts or {}
    order = [*(key for key in DEVICE if key in facts), *(key for key in facts if key not in DEVICE)]
    return ", ".join(_fact(key, facts[key]) for key in order if facts[key] not in (None, "")) or "–"


def _fact(key: str, value: Any) -> str:
    if key in COUNTED:
        return f"{value} {COUNTED[key]}{'' if value == 1 else 's'}"
    return f"{value} GiB" if key == "memory_gib" else str(value)
