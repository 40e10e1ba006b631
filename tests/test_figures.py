"""Figures carry their alternative text, stay small, and are saved where a run wants them."""

import base64
import io
import re

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from tokenbook import figures

ALT = 'A line that rises from "zero" to one & stays'


@pytest.fixture
def shown(monkeypatch):
    outputs = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: outputs.append(data))
    monkeypatch.delenv("TOKENBOOK_RUN_DIR", raising=False)
    matplotlib.use("Agg")
    figures.theme()
    return outputs


def line():
    figure, ax = plt.subplots(figsize=(7, 3.5))
    ax.plot([0, 1], [0, 1])
    return figure


def test_show_displays_one_image_with_alternative_text_on_a_white_card(shown):
    figures.show(line(), "rise", ALT)
    html = shown[0]["text/html"]
    assert html.count("<img ") == 1
    assert 'alt="A line that rises from &quot;zero&quot; to one &amp; stays"' in html
    assert "background:#fff" in html
    data = base64.b64decode(re.search(r"base64,([^\"]+)", html)[1])
    assert Image.open(io.BytesIO(data)).size == (770, 385)
    assert len(data) < 30_000
    assert ALT in shown[0]["text/plain"]
    assert plt.get_fignums() == []  # closed: the notebook does not show it a second time


def test_show_saves_into_the_run_folder(shown, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENBOOK_RUN_DIR", str(tmp_path))
    figures.show(line(), "rise", ALT)
    assert [p.name for p in tmp_path.iterdir()] == ["rise.png"]
    assert str(tmp_path) not in shown[0]["text/html"]


def test_the_same_figure_gives_the_same_bytes(shown):
    assert figures.png(line()) == figures.png(line())


@pytest.mark.parametrize(("name", "alt", "message"), [
    ("../rise", ALT, "name must be"), ("Rise", ALT, "name must be"), ("rise", "plot", "alt must say"),
])  # fmt: skip
def test_bad_names_and_missing_text_are_refused(shown, name, alt, message):
    with pytest.raises(ValueError, match=message):
        figures.show(line(), name, alt)
    assert shown == []


def test_paper_value_draws_the_papers_line(shown):
    figure = line()
    figures.paper_value(figure.axes[0], 0.5, "paper")
    assert list(figure.axes[0].lines[-1].get_ydata()) == [0.5, 0.5]
    with pytest.raises(ValueError, match="axis must be 'x' or 'y', got 'z'"):
        figures.paper_value(figure.axes[0], 0.5, "paper", axis="z")


def test_a_thin_line_keeps_its_colour_beside_a_picture_of_many_colours():
    rng = np.random.default_rng(0)
    fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4))
    for colour in figures.PALETTE:
        left.plot(rng.normal(size=30).cumsum(), lw=1, color=colour)
    right.imshow(rng.random((40, 40, 3)))
    image = Image.open(io.BytesIO(figures.png(fig))).convert("RGB")
    plt.close(fig)
    found = np.array([colour for _, colour in image.getcolors(1 << 20)], dtype=float)
    for colour in figures.PALETTE:
        wanted = 255 * np.array(matplotlib.colors.to_rgb(colour))
        assert np.abs(found - wanted).max(1).min() < 20, colour
