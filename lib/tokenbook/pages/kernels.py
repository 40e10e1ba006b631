"""The page "The kernels": what `make bench` measured, operation by operation, from benchmarks/results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from tokenbook.ledger_table import number
from tokenbook.pages import kernel_figure
from tokenbook.pages.contents import PageError
from tokenbook.pages.words import cell, device
from tokenbook.pages.words import row as line

INTRO = """# The kernels

The operations that chapters share, measured against their peers, side by side in one run. Of each call the
median is shown, with the quartiles; the floor is a plain copy, on the same device, of as many bytes as the
operation has to read and write. The first variant of each table is ours. A speed is written down only where
the operation's own tests passed in that same run. The letters of a shape are explained at the top of the
operation's file in `lib/tokenbook/kernels/`. `make bench` measures again on the machine at hand.
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
    return {
        f"kernel-{result['file']}.svg": kernel_figure.svg(result["operation"], list(_cases(result)))
        for result in results(folder)
        if result["rows"]
    }


def _is_gpu(result: dict[str, Any]) -> bool:
    return result["device"].get("kind") == "cuda"


def _cases(result: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Title and rows of each case: same name, shape, dtype and direction."""
    for (name, shape, dtype, direction), rows in groupby(
        result["rows"], lambda r: (r["case"], tuple(r["shape"].items()), r["dtype"], r["direction"])
    ):
        dims = " ".join(f"{letter}={size}" for letter, size in shape)
        direction = "forward and backward" if direction == "both" else direction
        yield f"{name}, {direction} ({', '.join(filter(None, [dims, dtype]))})", list(rows)


def _operation(result: dict[str, Any]) -> str:
    name = result["operation"]
    said = [f"## `{name}` on a {'GPU' if _is_gpu(result) else 'CPU'}\n", _measured(result)]
    if not result["rows"]:
        said.append("Its tests failed in that run, so no speed was measured.\n")
        return "\n".join(said)
    alt = f"Time per call of {name}'s peers as multiples of ours, one line per case; tables hold the numbers."
    said.append(f"![{alt}](figures/kernel-{result['file']}.svg)\n")
    for title, rows in _cases(result):
        said.append(f"**{cell(title)}**\n")
        said.append(line(["Variant", "Median ms", "Quartiles", "Times ours", "Peak memory", "Note"]))
        said.append(line(["---", *["---:"] * 4, "---"]))
        said += [_variant(row, rows[0]["median_ms"]) for row in rows]
        said.append("")
    return "\n".join(said)


def _measured(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    tests = result.get("tests") or {}
    passed = f", {tests['passed']} tests passed in the same run" if tests.get("passed") else ""
    command = f" by `{result['command']}`" if result.get("command") else ""
    where = f"On {cell(device(result['device']))}; {cell(versions)}."
    return f"Measured on {result['measured_on']}{command}{passed}. {where}\n"


def _times(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio >= 0.01 else "< 0.01"


def _variant(row: dict[str, Any], ours: float | None) -> str:
    median = row["median_ms"]
    times = _times(median / ours) if median and ours else "–"
    spread = f"{number(row['low_ms'])} to {number(row['high_ms'])}" if median else "–"
    peak = f"{row['peak_mib']:,.1f} MiB" if row.get("peak_mib") is not None else "–"
    cells = [cell(row["variant"]), number(median), spread, times, peak, cell(row.get("note") or "")]
    return line(cells)
