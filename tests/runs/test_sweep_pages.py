"""Pages of committed sweeps: made from a file and a Parquet file, and refused when the two do not fit."""

import xml.etree.ElementTree as ET
from unittest import mock

import pandas
import pytest
from matplotlib.axes import Axes
from test_cli import call

from tokenbook import pages
from tokenbook.pages import sweeps as sweep_pages
from tokenbook.runs import sweeps

SPEC = """
title: Does the sum depend on n?
question: Is the sum n?
answer: It is. At n = 5 it is 5.
chapter: demo
fixed: {scale: smoke}
grid:
  seed: 0:3
  n: [1, 5]
plot: {x: n, y: p1_sum, y_label: sum (points)}
"""


@pytest.fixture
def swept(project):
    """A project with one chapter and a place for sweeps."""
    (project.root / "book/sweeps").mkdir()
    project.chapter()
    return project


def write(swept, text=SPEC, name="sum"):
    path = swept.root / f"book/sweeps/{name}.yml"
    path.write_text(text)
    return path


def frame_of(path, spec, **columns):
    """Results as a sweep leaves them, six runs, without executing any."""
    sweep = sweeps.load(path)
    given = sweep.given(spec)
    frame = pandas.DataFrame(given).assign(
        given=[sweep_pages._text(g) for g in given],
        key=[f"{i:020x}" for i in range(len(given))],
        p1_sum=[g["n"] + 0.1 * g["seed"] for g in given],
        p1_verdict="reproduced",
        seconds=2.0,
        finished="2031-05-04T12:30:00+00:00",
        git_commit="0123456789abcdef",
        device_kind="cpu",
        notebook="/somewhere/notebook.ipynb",
    )
    return sweep, frame.assign(**columns)


@pytest.fixture
def published(swept):
    path = write(swept)
    spec = sweep_pages.notebooks.find("demo", swept.root).spec
    sweep_pages.publish(path, *frame_of(path, spec))
    return swept


def test_a_published_sweep_has_a_page_a_figure_and_a_place_in_the_contents(published):
    made = pages.generated(published.root)
    page = made["book/sweeps/sum.md"]
    assert "**Is the sum n?**" in page
    assert "It is. At n = 5 it is 5." in page
    assert "| 1 | 3 | 1.1 (1 to 1.2) |" in page
    assert "| 5 | 3 | 5.1 (5 to 5.2) |" in page
    assert "tokenbook sweep book/sweeps/sum.yml --publish" in page
    assert "`scale = 'smoke'`" in page
    assert "![sum (points) against n" in page
    assert "- file: book/sweeps/sum" in made["_toc.yml"]
    ET.fromstring(made["book/figures/sweep-sum.svg"])
    assert made == pages.generated(published.root)


def test_paths_of_the_machine_are_not_published(published):
    columns = pandas.read_parquet(published.root / "book/sweeps/sum.parquet").columns
    assert "notebook" not in columns
    assert {"given", "p1_sum", "p1_verdict", "n", "seed"} <= set(columns)


def test_a_sweep_without_results_has_no_page(swept):
    write(swept)
    assert not [path for path in pages.generated(swept.root) if "sweep" in path]


def test_results_of_another_grid_are_refused(published):
    write(published, SPEC.replace("[1, 5]", "[1, 6]"))
    with pytest.raises(pages.PageError, match=r"other runs than sum.yml asks for: .*--publish"):
        pages.generated(published.root)


@pytest.mark.parametrize(
    ("plot", "sentence"),
    [
        ("{x: m, y: p1_sum}", "plot.x must be one of the swept seed, n"),
        ("{x: n, y: p1_mean}", "plot.y must be columns of the results; there is no p1_mean"),
        ("{x: n}", "plot must name x and y"),
        ("{x: n, y: p1_sum, z: 1}", "plot takes hue, kind, x, .*; got z"),
        ("{x: n, y: p1_sum, y_scale: root}", "plot.y_scale must be one of linear, log, symlog; got 'root'"),
        ("{x: n, y: p1_sum, kind: bars}", "plot.kind must be one of line, heat; got 'bars'"),
        ("{x: n, y: p1_sum, kind: heat}", "plot.kind heat needs plot.hue"),
        ("{x: n, y: p1_sum, y_label: [a, b]}", "plot.y_label must be as many as plot.y"),
    ],
)
def test_a_plot_that_cannot_be_drawn_is_refused(published, plot, sentence):
    write(published, SPEC.replace("{x: n, y: p1_sum, y_label: sum (points)}", plot))
    with pytest.raises(pages.PageError, match=sentence):
        pages.generated(published.root)


def test_a_lone_run_shows_its_own_interval_and_two_runs_none(swept):
    rows = pandas.DataFrame({"a": [2.0, 4.0], "a_low": [1.0, 3.0], "a_high": [3.0, 5.0]})
    assert sweep_pages.summary(rows[:1], "a") == (2.0, (1.0, 3.0))
    assert sweep_pages.summary(rows, "a") == (3.0, None)


def test_hues_and_lists_are_told_apart(swept):
    text = SPEC.replace("n: [1, 5]", "n: [5, 1]").replace("{x: n,", "{x: seed, hue: n,")
    path = write(swept, text)
    spec = sweep_pages.notebooks.find("demo", swept.root).spec
    sweep_pages.publish(path, *frame_of(path, spec))
    lines = pages.generated(swept.root)["book/sweeps/sum.md"].splitlines()
    found = [line for line in lines if line.startswith("| ") and line[2].isdigit()]
    assert [line.split("|")[1:3] for line in found] == [
        [f" {seed} ", f" {n} "] for n in (1, 5) for seed in (0, 1, 2)
    ]


def test_publishing_executes_the_runs_and_writes_file_and_page(swept, warm_light):
    path = write(swept, SPEC.replace("0:3", "0:2"))
    status, _, err = call("sweep", str(path), "--publish")
    assert status == 0, err
    assert "4 executed" in err
    assert "| 5 | 2 | 5 |" in (swept.root / "book/sweeps/sum.md").read_text()
    assert pages.stale(swept.root) == []


def test_publishing_needs_a_file(swept):
    status, _, err = call("sweep", "demo", "-g", "n=1,2", "--publish")
    assert (status, "--publish goes with a FILE.yml" in err) == (2, True)


def test_a_heat_map_writes_every_mean_into_its_cell(swept):
    path = write(swept, SPEC.replace("{x: n,", "{x: n, hue: seed, kind: heat, y_scale: log,"))
    spec = sweep_pages.notebooks.find("demo", swept.root).spec
    sweep, frame = frame_of(path, spec)
    with mock.patch.object(Axes, "text", autospec=True, side_effect=Axes.text) as text:
        figure = sweep_pages.svg("sum", sweep, frame)
    ET.fromstring(figure)
    written = {(call.args[1], call.args[2]): call.args[3] for call in text.call_args_list}
    assert written == {(c, s): f"{n + 0.1 * s:g}" for c, n in enumerate((1, 5)) for s in range(3)}


def test_a_heat_map_writes_the_interval_below_the_mean(swept):
    path = write(swept, SPEC.replace("{x: n,", "{x: n, hue: seed, kind: heat,"))
    sweep, frame = frame_of(path, sweep_pages.notebooks.find("demo", swept.root).spec)
    frame = frame.assign(p1_sum_low=frame.p1_sum - 1, p1_sum_high=frame.p1_sum + 1)
    with mock.patch.object(Axes, "text", autospec=True, side_effect=Axes.text) as text:
        sweep_pages.svg("sum", sweep, frame)
    assert {call.args[3] for call in text.call_args_list} >= {"1\n0 to\n2", "5\n4 to\n6"}
