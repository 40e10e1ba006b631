"""One look for all figures, which everybody can read: alternative text, safe colours, a white card.

`show` displays a figure as HTML with the PNG inside, so that the alternative text travels with it into the
book; the white card keeps axes and labels legible when the page is dark.
"""

from __future__ import annotations

import base64
import html
import io
import os
import re
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import seaborn as sns
from PIL import Image

# Okabe and Ito's palette: told apart with every common colour blindness, and on white and grey alike.
BLUE, ORANGE, GREEN, PINK, SKY, VERMILION, YELLOW, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000",
)  # fmt: skip
PALETTE = [BLUE, ORANGE, GREEN, VERMILION, PINK, SKY, BLACK, YELLOW]
#: The role decides the colour, so that a reader learns it once: our method, what it is measured against,
#: the naive way, controls that must fail, the paper's own value.
METHOD_COLOURS = {
    "ours": BLUE,
    "reference": BLACK,
    "fair": GREEN,
    "naive": VERMILION,
    "control": PINK,
    "paper": ORANGE,
}

_CARD = "margin:0.5em 0;padding:0.6em;background:#fff;color:#222;border-radius:6px;max-width:100%"


def theme() -> None:
    """Set the shared look; call it once, behind the imports."""
    sns.set_theme(context="notebook", style="whitegrid", palette=PALETTE, font_scale=0.9)
    matplotlib.rcParams.update(
        {
            "figure.dpi": 100,
            "figure.facecolor": "white",
            "figure.constrained_layout.use": True,
            "axes.titlelocation": "left",
            "axes.titlesize": "medium",
            "axes.titleweight": "bold",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
            "font.family": "DejaVu Sans",  # ships with matplotlib: the same letters on every machine
            "svg.hashsalt": "tokenbook",
        }
    )


def paper_value(ax, value: float, label: str, *, axis: str = "y") -> None:
    """Draw the paper's own value into the figure as a dashed line; `axis` "y" draws it horizontally."""
    draw = {"y": ax.axhline, "x": ax.axvline}.get(axis)
    if draw is None:
        raise ValueError(f"axis must be 'x' or 'y', got {axis!r}")
    draw(value, color=METHOD_COLOURS["paper"], linestyle="--", linewidth=1.8, label=label, zorder=1.5)


def png(figure, dpi: int = 110) -> bytes:
    """The figure as a PNG of at most 256 colours: a third of the size, and nothing that an eye would miss.

    Colours are picked by how far they lie apart: by how often they occur, a thin line beside a heat map would
    turn grey.
    """
    raw = io.BytesIO()
    figure.savefig(raw, format="png", dpi=dpi, metadata={"Software": None})
    palette = {"colors": 256, "method": Image.Quantize.MAXCOVERAGE, "kmeans": 2}
    image = Image.open(raw).convert("RGB").quantize(**palette, dither=0)
    small = io.BytesIO()
    image.save(small, format="png", optimize=True)
    return small.getvalue()


def show(figure, name: str, alt: str) -> None:
    """Display a figure with its alternative text and close it; save it into the run's folder, if any.

    `name` becomes the file name (`NAME.png` in the folder that TOKENBOOK_RUN_DIR names): lower-case letters,
    digits and underscores.  `alt` says in words what the figure shows, for those who cannot see it.
    """
    from IPython.display import display

    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"name must be lower-case letters, digits and underscores, got {name!r}")
    if len(alt.split()) < 5:
        raise ValueError(f"alt must say in words what the figure shows (at least 5 words), got {alt!r}")
    data = png(figure)
    plt.close(figure)
    folder = os.environ.get("TOKENBOOK_RUN_DIR")
    if folder:
        (Path(folder) / f"{name}.png").write_bytes(data)
    width, height = Image.open(io.BytesIO(data)).size
    image = (
        f'<img src="data:image/png;base64,{base64.b64encode(data).decode()}" alt="{html.escape(alt)}" '
        f'width="{width}" height="{height}" style="max-width:100%;height:auto;display:block;background:#fff">'
    )
    display(
        {
            "text/html": f'<div class="tokenbook-figure" style="{_CARD}">{image}</div>',
            "text/plain": f"[figure {name}: {alt}]",
        },
        raw=True,
    )
