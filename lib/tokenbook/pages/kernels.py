"""The page "The kernels": what `make bench` measured, operation by operation, from benchmarks/results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from tokenbook.ledger import number
from tokenbook.pages.contents import PageError
from tokenbook.pages.picture import FONTS, PALETTES
from tokenbook.pages.scoreboard import cell

INTRO = """# The kernels

The operations that chapters share, measured against their peers, side by side in one run. Of each call the
median is shown, with the quartiles; the floor is a plain copy, on the same device, of as many bytes as the
operation has to read and write. A speed is written down only where the operation's own tests passed in that
same run. `make bench` measures again on the machine at hand.
"""
NO_GPU = (
    "**No result from a GPU is committed yet.** All figures below were measured on a CPU; the Triton kernels "
    "are tested by Triton's interpreter, which says nothing about their speed.\n"
)
NONE = "No benchmark result is committed yet.\n"


def results(folder: Path) -> list[dict[str, Any]]:
    """The committed results, by operation. Raises PageError for a file that lacks what the page needs."""
    found = []
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text("utf-8"))
        for key in ("operation", "measured_on", "device", "versions", "rows"):
            if key not in result:
                raise PageError(f"benchmarks/results/{path.name} lacks {key!r}")
        found.append(result | {"file": path.stem})
    return found


def page(folder: Path) -> str:
    """The page `book/kernels.md`."""
    found = results(folder)
    if not found:
        return f"{INTRO}\n{NONE}"
    blocks = [INTRO] if any(_is_gpu(result) for result in found) else [INTRO, NO_GPU]
    return "\n".join(blocks + [_operation(result) for result in found])


def figures(folder: Path) -> dict[str, str]:
    """File names and SVG text of the page's figures, one per operation."""
    return {f"kernel-{result['file']}.svg": _bars(result, PALETTES["light"]) for result in results(folder)}


def _is_gpu(result: dict[str, Any]) -> bool:
    device = result["device"]
    kind = device.get("type", "") if isinstance(device, dict) else str(device)
    return "cuda" in str(kind).lower()


def _cases(result: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Title and rows of each case: same name, shape, dtype and direction."""
    for (name, shape, dtype, direction), rows in groupby(
        result["rows"], lambda r: (r["case"], tuple(r["shape"].items()), r["dtype"], r["direction"])
    ):
        dims = " ".join(f"{letter}={size}" for letter, size in shape)
        yield f"{name}, {direction} ({', '.join(filter(None, [dims, dtype]))})", list(rows)


def _operation(result: dict[str, Any]) -> str:
    said = [f"## `{result['operation']}`\n", _measured(result)]
    alt = f"Milliseconds per call of {result['operation']}, one bar per variant; the tables hold the numbers."
    said.append(f"![{alt}](figures/kernel-{result['file']}.svg)\n")
    for title, rows in _cases(result):
        said.append(f"**{cell(title)}**\n")
        said.append("| Variant | Median ms | Quartiles | Times ours | Peak memory | |")
        said.append("| --- | ---: | ---: | ---: | ---: | --- |")
        ours = rows[0]["median_ms"]
        said += [_variant(row, ours) for row in rows]
        said.append("")
    return "\n".join(said)


def _measured(result: dict[str, Any]) -> str:
    device = result["device"]
    device = ", ".join(str(v) for v in device.values() if v) if isinstance(device, dict) else str(device)
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    tests = result.get("tests") or {}
    passed = f", {tests['passed']} tests passed in the same run" if tests.get("passed") else ""
    command = f" by `{result['command']}`" if result.get("command") else ""
    return f"Measured on {result['measured_on']}{command}{passed}. {cell(device)}; {cell(versions)}.\n"


def _variant(row: dict[str, Any], ours: float | None) -> str:
    median = row["median_ms"]
    times = f"{median / ours:.2f}" if median and ours else "–"
    spread = f"{number(row['low_ms'])} to {number(row['high_ms'])}" if median else "–"
    peak = f"{row['peak_mib']:,.1f} MiB" if row.get("peak_mib") is not None else "–"
    cells = [cell(row["variant"]), number(median), spread, times, peak, cell(row.get("note") or "")]
    return f"| {' | '.join(cells)} |"


def _bars(result: dict[str, Any], c: dict[str, str]) -> str:
    """Horizontal bars, one group per case; each group has its own scale, for times differ by orders."""
    shapes, y, left, width = [], 8, 16, 608
    for title, rows in _cases(result):
        timed = [row for row in rows if row["median_ms"]]
        if not timed:
            continue
        shapes.append(_text(left, y + 20, title, 17, c["ink"], 'font-weight="700"'))
        y += 30
        longest = max(row["median_ms"] for row in timed)
        for i, row in enumerate(timed):
            length = max(2.0, width * row["median_ms"] / longest)
            colour = c["accent"] if i == 0 else c["line"]
            label = f"{row['variant']}: {number(row['median_ms'])} ms"
            shapes.append(_text(left, y + 16, label, 16, c["ink"] if i == 0 else c["soft"]))
            shapes.append(
                f'<rect x="{left}" y="{y + 22}" width="{length:.1f}" height="9" rx="3" fill="{colour}"/>'
            )
            y += 40
        y += 16
    title = escape(f"Milliseconds per call of {result['operation']}, by variant")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 {y}" width="640" height="{y}" role="img" '
        f'font-family="{FONTS}">\n<title>{title}</title>\n' + "\n".join(shapes) + "\n</svg>\n"
    )


def _text(x: float, y: float, text: str, size: int, fill: str, extra: str = "") -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{fill}" {extra}>{escape(text)}</text>'
