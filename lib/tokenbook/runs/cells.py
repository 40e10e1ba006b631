"""The cells of a notebook as plain data: sources, sections, claims.

The process of a run imports this, and neither papers nor parameters: the notebook checks those itself.
"""

from __future__ import annotations

import json
from typing import Any

CLAIMS_MIME = "application/vnd.tokenbook.claims+json"
OPENING = "opening"  # the section of cells above the first `##` heading


def text_of(field: str | list[str]) -> str:
    """A multi-line field of the notebook format, which may be stored as text or as a list of lines."""
    return field if isinstance(field, str) else "".join(field)


def code_sources(notebook: dict[str, Any]) -> list[str]:
    """Sources of the code cells that are executed: those that are not empty."""
    sources = (text_of(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")
    return [source for source in sources if source.strip()]


def sections(notebook: dict[str, Any]) -> list[str]:
    """For every cell, the `##` heading under which it stands."""
    current, found = OPENING, []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            for line in text_of(cell["source"]).splitlines():
                if line.startswith("## "):
                    current = line[3:].strip()
        found.append(current)
    return found


def claims_payload(notebook: dict[str, Any]) -> dict[str, Any] | None:
    """The last claims output of an executed notebook, None where there is none."""
    found = None
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            if CLAIMS_MIME in output.get("data", {}):
                found = output["data"][CLAIMS_MIME]
    return json.loads(text_of(found)) if isinstance(found, (str, list)) else found
