"""The picture of the idea: what may happen at one token position, and how a claim about it is judged.

Drawn once per colour scheme (`idea-light.svg`, `idea-dark.svg`), because an image cannot see the theme that a
reader switched to. Type is large: the picture has to be read at 350 pixels width.
"""

from __future__ import annotations

from html import escape

WIDTH, HEIGHT = 640, 640
FONTS = "system-ui, -apple-system, Segoe UI, Roboto, sans-serif"
ALT = (
    "Above, a row of six tokens with one position marked, and seven things that the papers do at such a "
    "position: compute, move, prune, shuffle, mask, predict and edit. Below, how a claim is judged: the "
    "paper's figure, a threshold fixed before the run, our measurement with an interval, a control that must "
    "fail, and one of four verdicts: reproduced, direction only, not reproduced, untested."
)
PALETTES = {
    "light": {
        "ink": "#1f2933",
        "soft": "#52606d",
        "line": "#9aa5b1",
        "box": "#eef2f6",
        "accent": "#0b6e8f",
        "on_accent": "#ffffff",
        "good": "#0b6e4f",
        "half": "#8a5a00",
        "bad": "#a3341f",
        "none": "#52606d",
    },
    "dark": {
        "ink": "#e6eaee",
        "soft": "#b3bcc6",
        "line": "#6b7885",
        "box": "#26303a",
        "accent": "#5cc3e0",
        "on_accent": "#0d1b22",
        "good": "#5fd3a4",
        "half": "#f0c05a",
        "bad": "#ff9a85",
        "none": "#b3bcc6",
    },
}
TOKENS = ("def", "mean", "(", "xs", ")", ":")
MARKED = 3
STEPS = (
    ("claim", "the paper’s figure and its source"),
    ("threshold", "fixed before the run"),
    ("measurement", "ours, with its interval"),
    ("control", "must fail the threshold"),
)
VERDICTS = (
    ("✓ reproduced", "good"),
    ("↗ direction only", "half"),
    ("✗ not reproduced", "bad"),
    ("○ untested", "none"),
)
VERDICT_BOXES = ((8, 142), (160, 164), (334, 176), (520, 112))  # x and width


def files() -> dict[str, str]:
    """File names and their SVG text, one per colour scheme."""
    return {f"idea-{scheme}.svg": _svg(colours) for scheme, colours in PALETTES.items()}


def _svg(c: dict[str, str]) -> str:
    body = [
        f"<title>{escape(ALT)}</title>",
        '<defs><marker id="tip" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="6" markerHeight="6" '
        f'orient="auto-start-reverse"><path d="M0 0 10 5 0 10z" fill="{c["accent"]}"/></marker></defs>',
        *_token_row(c),
        *_verbs(c),
        *_path_to_verdict(c),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" role="img" font-family="{FONTS}">\n' + "\n".join(body) + "\n</svg>\n"
    )


def _text(x: float, y: float, text: str, size: int, fill: str, extra: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}" {extra}>{escape(text)}</text>'


def _box(x: float, y: float, w: float, h: float, fill: str, stroke: str, extra: str = "") -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="6" fill="{fill}" stroke="{stroke}" '
        f'stroke-width="2" {extra}/>'
    )


def _token_row(c: dict[str, str]) -> list[str]:
    """Six tokens with their positions, one of them marked."""
    shapes, width, gap = [], 88, 16
    left = (WIDTH - len(TOKENS) * width - (len(TOKENS) - 1) * gap) / 2
    for i, token in enumerate(TOKENS):
        x, marked = left + i * (width + gap), i == MARKED
        fill, stroke = (c["accent"], c["accent"]) if marked else (c["box"], c["line"])
        ink = c["on_accent"] if marked else c["ink"]
        middle = 'text-anchor="middle"'
        shapes.append(_box(x, 14, width, 52, fill, stroke))
        shapes.append(_text(x + width / 2, 48, token, 25, ink, f'{middle} font-family="monospace"'))
        weight = ' font-weight="700"' if marked else ""
        label = c["accent"] if marked else c["soft"]
        shapes.append(_text(x + width / 2, 92, str(i), 19, label, middle + weight))
    return shapes


def _verbs(c: dict[str, str]) -> list[str]:
    """Seven small pictures: three tokens each, and what is done to them."""
    shapes = [_text(WIDTH / 2, 142, "What happens at a token position?", 25, c["ink"], _BOLD_MIDDLE)]
    names = ("computed", "moved", "pruned", "shuffled", "masked", "predicted", "edited")
    for i, name in enumerate(names):
        column, row = (i, 0) if i < 4 else (i - 3.5, 1)
        x, y = 80 + column * 160, 168 + row * 96
        shapes += _pictogram(name, x, y, c)
        shapes.append(_text(x, y + 68, name, 20, c["ink"], 'text-anchor="middle"'))
    return shapes


_BOLD_MIDDLE = 'text-anchor="middle" font-weight="700"'


def _pictogram(name: str, x: float, y: float, c: dict[str, str]) -> list[str]:
    """Three squares centred on x, the middle one (for `predicted` the last one) under the verb."""
    side, top = 26, y + 16
    lefts = [x - 49 + k * 36 for k in range(3)]
    centre = [left + side / 2 for left in lefts]
    fills = [c["box"], c["accent"], c["box"]]
    strokes, dashed = [c["line"], c["accent"], c["line"]], [False] * 3
    if name == "pruned":
        fills[1], dashed[1] = "none", True
    if name == "predicted":
        fills, strokes, dashed[2] = [c["box"], c["box"], "none"], [c["line"], c["line"], c["accent"]], True
    if name in ("moved", "shuffled"):
        fills[1], strokes[1] = c["box"], c["line"]
        fills[0], strokes[0] = c["accent"], c["accent"]
    shapes = [
        _box(left, top, side, side, fill, stroke, 'stroke-dasharray="4 4"' if dash else "")
        for left, fill, stroke, dash in zip(lefts, fills, strokes, dashed, strict=True)
    ]

    def arc(start: float, end: float, both: bool = False) -> str:
        tail = ' marker-start="url(#tip)"' if both else ""
        return (
            f'<path d="M{start:g} {top - 3:g} Q{(start + end) / 2:g} {top - 24:g} {end:g} {top - 3:g}" '
            f'fill="none" stroke="{c["accent"]}" stroke-width="2.5" marker-end="url(#tip)"{tail}/>'
        )

    inside = {"masked": "?", "predicted": "?", "edited": "+", "pruned": "×"}
    if name in inside:
        k = 2 if name == "predicted" else 1
        ink = c["accent"] if name in ("predicted", "pruned") else c["on_accent"]
        shapes.append(_text(centre[k], top + 21, inside[name], 21, ink, _BOLD_MIDDLE))
    if name == "computed":
        shapes += [arc(centre[0], centre[1] - 4), arc(centre[2], centre[1] + 4)]
    if name == "moved":
        shapes.append(arc(centre[0], centre[2]))
    if name == "shuffled":
        shapes.append(arc(centre[0], centre[2], both=True))
    return shapes


def _path_to_verdict(c: dict[str, str]) -> list[str]:
    """The four steps that lead to a verdict, and the four verdicts."""
    top = 396
    shapes = [_text(WIDTH / 2, top, "How is a claim judged?", 25, c["ink"], _BOLD_MIDDLE)]
    for i, (step, words) in enumerate(STEPS):
        y = top + 40 + i * 42
        if i + 1 < len(STEPS):
            shapes.append(f'<path d="M46 {y + 10:g}V{y + 22:g}" stroke="{c["line"]}" stroke-width="2.5"/>')
        shapes.append(f'<circle cx="46" cy="{y - 7:g}" r="16" fill="{c["accent"]}"/>')
        shapes.append(_text(46, y, str(i + 1), 20, c["on_accent"], _BOLD_MIDDLE))
        shapes.append(_text(78, y, step, 21, c["ink"], 'font-weight="700"'))
        shapes.append(_text(252, y, words, 21, c["soft"]))
    y = top + 214
    for (words, colour), (x, w) in zip(VERDICTS, VERDICT_BOXES, strict=True):
        shapes.append(_box(x, y - 26, w, 40, "none", c[colour]))
        shapes.append(_text(x + w / 2, y + 1, words, 16, c[colour], _BOLD_MIDDLE))
    return shapes
