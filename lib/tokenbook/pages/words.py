"""Small pieces of Markdown that the generated pages share."""

from __future__ import annotations

import re
from typing import Any

from tokenbook.ledger import number

# Units of the numbers in a device's description; all else speaks for itself.
COUNTED = {"cores": "cores", "threads": "threads", "memory_gib": "GiB"}


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
    """A device in words: `cpu, Some Processor, 2 cores, 2 threads`."""
    known = {key: value for key, value in (facts or {}).items() if value not in (None, "")}
    said = [f"{value} {COUNTED[key]}" if key in COUNTED else str(value) for key, value in known.items()]
    return ", ".join(said) or "–"
