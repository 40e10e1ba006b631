"""A benchmark as a figure: for each case, how many times as long as ours every other variant takes.

Each variant is a letter on a logarithmic axis; the line at 1 is ours. Letters, not colours, tell them apart.
"""

from __future__ import annotations

import math
import string
from html import escape
from typing import Any

from tokenbook.ledger_table import number
from tokenbook.pages.picture import FONTS, PALETTES

WIDTH, LEFT, RIGHT = 640, 28, 596
COLOURS = PALETTES["light"]
# White around the letters of a case's title, so that the vertical lines do not strike them through.
HALO = 'stroke="#fff" stroke-width="5" stroke-linejoin="round" paint-order="stroke"'


def svg(operation: str, cases: list[tuple[str, list[dict[str, Any]]]]) -> str:
    """The figure's SVG. `cases`: title and rows of each case, the project's own variant first."""
    ratios = {title: found for title, rows in cases if (found := _ratios(rows))}
    labels = _labels(list(ratios))
    names = list(dict.fromkeys(name for found in ratios.values() for name in found))
    letters = dict(zip(names, string.ascii_letters, strict=False))
    values = [value for found in ratios.values() for value in found.values()]
    low, high = min([1.0, *values]), max([2.0, *values])

    def x(value: float) -> float:
        return LEFT + (RIGHT - LEFT) * math.log(value / low) / math.log(high / low)

    shapes, y = [], 16
    for name, letter in letters.items():
        shapes += [_dot(LEFT, y, letter), _text(LEFT + 18, y + 5, name, COLOURS["ink"])]
        y += 26
    top = y + 8
    y = top + 8
    for title, found in ratios.items():
        shapes.append(_text(LEFT - 12, y + 14, labels[title], COLOURS["soft"], HALO))
        y += 36
        shapes.append(f'<path d="M{LEFT} {y}H{RIGHT}" stroke="{COLOURS["box"]}" stroke-width="2"/>')
        levels = _levels({name: x(value) for name, value in found.items()})
        shapes += [_dot(x(found[name]), y + 21 * level, letters[name]) for name, level in levels.items()]
        y += 22 + 21 * max(levels.values())
    shapes = [_tick(tick, x(tick), top, y) for tick in _ticks(low, high)] + shapes
    shapes.append(_text(LEFT - 12, y + 42, "left of ours: faster; right of it: slower", COLOURS["soft"]))
    height, title = y + 56, escape(f"Times of {operation}, as multiples of ours, by case and variant")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" role="img" font-family="{FONTS}">\n<title>{title}</title>\n'
        f'<rect width="{WIDTH}" height="{height}" rx="6" fill="#fff"/>\n' + "\n".join(shapes) + "\n</svg>\n"
    )


def _labels(titles: list[str]) -> dict[str, str]:
    """What the figure calls each case: its title without the shape, for which a line is too short."""
    short = {title: title.split(" (")[0] for title in titles}
    return short if len(set(short.values())) == len(short) else {title: title for title in titles}


def _tick(tick: float, x: float, top: float, bottom: float) -> str:
    """A vertical line with its label; the one at 1 is ours."""
    if tick == 1:
        line, ink, width, label = COLOURS["accent"], COLOURS["accent"], 2, "ours"
    else:
        line, ink, width, label = COLOURS["line"], COLOURS["soft"], 1, f"×{number(tick)}"
    path = f'<path d="M{x:.1f} {top}V{bottom}" stroke="{line}" stroke-width="{width}"/>'
    return path + _text(x, bottom + 18, label, ink, 'text-anchor="middle"')


def _levels(places: dict[str, float]) -> dict[str, int]:
    """For each name a line of its own where its dot would cover another: 0 on the axis, 1 below it, ..."""
    levels: dict[str, int] = {}
    for name, x in sorted(places.items(), key=lambda item: item[1]):
        taken = {levels[other] for other in levels if abs(places[other] - x) < 21}
        levels[name] = next(level for level in range(len(places)) if level not in taken)
    return levels


def _ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Each other variant's median over ours; empty where ours was not timed."""
    ours = rows[0]["median_ms"]
    if not ours:
        return {}
    return {row["variant"]: row["median_ms"] / ours for row in rows[1:] if row["median_ms"]}


def _ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 and their decimal multiples inside the range; only powers of ten where that would be many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(decades) <= 3 else (1,)
    found = [step * 10.0**k for k in decades for step in steps]
    return [tick for tick in found if low * 0.999 <= tick <= high * 1.001]


def _dot(x: float, y: float, letter: str) -> str:
    return (
        f'<circle cx="{x:.1f}" cy="{y}" r="10" fill="{COLOURS["ink"]}"/>'
        f'<text x="{x:.1f}" y="{y + 5}" font-size="14" fill="#fff" text-anchor="middle">{letter}</text>'
    )


def _text(x: float, y: float, text: str, fill: str, extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y}" font-size="15" fill="{fill}" {extra}>{escape(text)}</text>'
