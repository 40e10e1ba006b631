"""The generated pages and the renderer, on a small book of two chapters that never existed."""

import itertools
import json
import math
import re
import subprocess
from pathlib import Path

import nbformat
import pytest
import sample_book
from bs4 import BeautifulSoup

from tokenbook import pages
from tokenbook.pages import rendering, words
from tokenbook.pages.material import gather, totals


@pytest.fixture
def root(tmp_path) -> Path:
    return sample_book.make(tmp_path / "project")


def test_totals_count_every_claim_of_every_chapter(root):
    expected = {"reproduced": 2, "direction only": 2, "not reproduced": 2, "untested": 2}
    assert totals(gather(root)) == expected
    readme = pages.generated(root)["README.md"]
    assert "2 chapters, 8 claims" in readme
    assert "2 reproduced, 2 direction only, 2 not reproduced, 2 untested" in readme


def test_writing_twice_changes_nothing_and_a_changed_notebook_makes_pages_stale(root):
    assert pages.write(root)
    assert pages.write(root) == []
    assert pages.stale(root) == []
    nbformat.write(sample_book.chapter(root, "first", saved=10.0), root / "notebooks" / "first.ipynb")
    assert set(pages.stale(root)) == {"book/scoreboard.md", "book/index.md", "README.md"}


def test_a_page_changed_by_hand_is_stale(root):
    pages.write(root)
    (root / "book" / "scoreboard.md").write_text("# The scoreboard\n\nAll reproduced.\n")
    assert pages.stale(root) == ["book/scoreboard.md"]


def test_a_run_wins_over_the_committed_notebook(root, tmp_path):
    run = sample_book.run(root, tmp_path / "store", "first", saved=10.0)
    page = pages.generated(root, {"first": run})["book/scoreboard.md"]
    assert "**10\u00a0%**" in page
    assert totals(gather(root, {"first": run}))["reproduced"] == 1


def test_the_scoreboard_says_which_verdicts_the_intervals_leave_open(root, tmp_path):
    assert (
        "Of the 6 claims that were tested, 0 would get another" in pages.generated(root)["book/scoreboard.md"]
    )
    run = sample_book.run(root, tmp_path / "store", "first", saved=85.1)
    page = pages.generated(root, {"first": run})["book/scoreboard.md"]
    assert "Of the 6 claims that were tested, 1 would get another" in page
    assert page.count("<small>the intervals leave open: direction only</small>") == 1
    assert "**3.1\u00a0%** \\[2.6, 3.7\\]" in page


def test_runs_of_an_unknown_chapter_are_refused(root, tmp_path):
    with pytest.raises(pages.PageError, match="no chapter 'third': there are first, second"):
        pages.generated(root, {"third": tmp_path})


def test_a_paper_in_an_unknown_part_is_refused(root):
    paper = root / "book" / "papers" / "first.toml"
    paper.write_text(paper.read_text().replace(sample_book.PART, "nowhere"))
    with pytest.raises(
        pages.PageError, match=r"part must be one of .*Tokens that are edited.*, got 'nowhere'"
    ):
        pages.toc(root)


def test_a_notebook_that_was_not_executed_is_said_to_be_so(root):
    notebook = sample_book.chapter(root, "first")
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    nbformat.write(notebook, root / "notebooks" / "first.ipynb")
    page = pages.generated(root)["book/scoreboard.md"]
    assert "It has not been executed yet, so no claim is judged." in page
    assert sum(totals(gather(root)).values()) == 4


def test_a_broken_notebook_is_named(root):
    (root / "notebooks" / "first.ipynb").write_text('{"cells": [')
    with pytest.raises(pages.PageError, match=r"cannot read the notebook .*first\.ipynb"):
        pages.generated(root)


@pytest.mark.parametrize(
    "text", ["a | b", "`code`", "*not* bold", "x < 5 > y", "$5 & $6", "[a](b)", "# 1", "~~x~~"]
)
def test_text_in_a_table_cell_is_shown_as_it_stands(text):
    from markdown_it import MarkdownIt

    table = f"| head |\n| --- |\n| {words.cell(text)} |\n"
    html = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(table)
    soup = BeautifulSoup(html, "html.parser")
    assert soup.td.decode_contents() == soup.td.get_text().replace("&", "&amp;").replace("<", "&lt;").replace(
        ">", "&gt;"
    )
    assert soup.td.get_text() == text


def test_rendering_is_skipped_when_nothing_changed_and_repeated_when_a_number_did(
    root, tmp_path, monkeypatch
):
    calls = []
    real = subprocess.run
    monkeypatch.setattr(rendering.subprocess, "run", lambda *a, **k: (calls.append(a), real(*a, **k))[1])
    first = pages.render(root)
    assert first == root / "_build" / "html" / "index.html"
    pages.render(root)
    assert len(calls) == 1
    run = sample_book.run(root, tmp_path / "store", "first", saved=10.0)
    pages.render(root, {"first": run})
    assert len(calls) == 2
    html = first.parent
    assert "10\u00a0%" in (html / "book" / "scoreboard.html").read_text()
    assert "[9.8, 10.2]" in (html / "notebooks" / "first.html").read_text()


def test_a_warning_fails_the_rendering_every_time_and_says_which(root):
    page = root / "book" / "how-to-read.md"
    page.write_text(page.read_text() + "\nSee [nowhere](nowhere.md).\n")
    for _ in range(2):
        with pytest.raises(pages.RenderError, match="nowhere"):
            pages.render(root)
    page.write_text(page.read_text().replace("\nSee [nowhere](nowhere.md).\n", ""))
    pages.render(root)


def test_staged_files_that_no_longer_exist_are_removed(root):
    source = root / "_build" / "source"
    rendering.stage(root, source)
    for path in ("notebooks/second.ipynb", "book/papers/second.toml"):
        (root / path).unlink()
    rendering.stage(root, source)
    assert not (source / "notebooks" / "second.ipynb").exists()
    assert "notebooks/second" not in (source / "_toc.yml").read_text()


def test_unchanged_staged_files_keep_their_time(root):
    source = root / "_build" / "source"
    rendering.stage(root, source)
    before = {path: path.stat().st_mtime_ns for path in source.rglob("*") if path.is_file()}
    nbformat.write(sample_book.chapter(root, "first", saved=10.0), root / "notebooks" / "first.ipynb")
    rendering.stage(root, source)
    changed = {p.relative_to(source).as_posix() for p, time in before.items() if p.stat().st_mtime_ns != time}
    assert changed == {"notebooks/first.ipynb", "book/scoreboard.md", "book/index.md"}


def _result(root: Path, kind: str, rows: list[dict], name: str = "rope") -> None:
    folder = root / "benchmarks" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    result = {
        "operation": name,
        "measured_on": "2031-01-01",
        "device": {"kind": kind, "name": "Some | Device", "threads": 2},
        "versions": {"torch": "2.13.0"},
        "tests": {"passed": 12 if rows else 0, "failed": 0 if rows else 1},
        "command": f"python -m benchmarks {name}",
        "rows": rows,
    }
    (folder / f"{name}.{kind}.json").write_text(json.dumps(result))


def _row(variant: str, median: float | None, **changes) -> dict:
    row = {"case": "shift", "shape": {"B": 1, "T": 512}, "dtype": "float32", "direction": "forward"}
    row |= {"variant": variant, "median_ms": median, "low_ms": median, "high_ms": median, "peak_mib": 1.5}
    return row | {"floor_ms": 0.5, "note": ""} | changes


def test_the_kernels_page_says_so_when_there_is_no_result(root):
    assert "No benchmark result is committed yet." in pages.generated(root)["book/kernels.md"]


def test_the_kernels_page_shows_times_against_ours_and_says_when_no_gpu_was_at_hand(root):
    rows = [_row("ours", 2.0), _row("eager", 5.0), _row("peer", None, note="not installed")]
    rows += [_row("ours", 2.0, direction="both"), _row("copy", 0.001, direction="both")]
    _result(root, "cpu", rows)
    files = pages.generated(root)
    page = files["book/kernels.md"]
    assert "No result from a GPU is committed yet." in page
    assert "Some \\| Device, 2 threads" in page
    assert "12 tests passed in the same run" in page
    assert "| eager | 5 | 5 to 5 | 2.50 | 1.5 MiB |  |" in page
    assert "| peer | – | – | – | 1.5 MiB | not installed |" in page
    assert "**shift, forward and backward (B=1 T=512, float32)**" in page
    assert "| copy | 0.001 | 0.001 to 0.001 | < 0.01 | 1.5 MiB |  |" in page
    assert ">eager</text>" in files["book/figures/kernel-rope.cpu.svg"]
    assert ">peer</text>" not in files["book/figures/kernel-rope.cpu.svg"]
    _result(root, "cuda", rows)
    assert "No result from a GPU" not in pages.generated(root)["book/kernels.md"]


def test_the_kernels_page_gives_no_speed_where_tests_failed(root):
    _result(root, "cpu", [])
    page = pages.generated(root)["book/kernels.md"]
    assert "Its tests failed in that run, so no speed was measured." in page
    assert "![" not in page


def test_a_result_without_its_device_is_refused(root):
    _result(root, "cpu", [_row("ours", 2.0)])
    path = root / "benchmarks" / "results" / "rope.cpu.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "device"}))
    with pytest.raises(pages.PageError, match=r"rope\.cpu\.json lacks 'device'"):
        pages.generated(root)


def test_the_status_page_says_what_ran_where_when_and_how_long(root, tmp_path):
    run = sample_book.run(root, tmp_path / "store", "first", saved=97.2)
    record = json.loads((run / "record.json").read_text())
    record |= {
        "seconds": 61.4,
        "finished": "2031-05-04T12:30:59.123+00:00",
        "peak_memory_mib": 1234.5,
        "device": {"kind": "cpu", "processor": "Some CPU", "cores": 2, "memory_gib": 7.8, "threads": 1},
        "versions": {"numpy": "2.4.6", "python": "3.12.1", "torch": "2.13.0"},
    }
    (run / "record.json").write_text(json.dumps(record))
    page = pages.generated(root, {"first": run})["book/status.md"]
    device = "cpu, Some CPU, 2 cores, 1 thread, 7.8 GiB"
    assert f"| done | small | {device} | 61 | 1,234 MiB | 2031-05-04 12:30 UTC | `0123456789ab` |" in page
    told = "The same in every chapter (not told by **second**): python 3.12.1, torch 2.13.0, numpy 2.4.6."
    assert told in page
    assert "[second](../notebooks/second.ipynb) | executed, as committed" in page
    other = sample_book.run(root, tmp_path / "store", "second", saved=97.2)
    (other / "record.json").write_text(json.dumps(record | {"versions": {"python": "3.11.7"}}))
    page = pages.generated(root, {"first": run, "second": other})["book/status.md"]
    assert "| first | 3.12.1 | 2.13.0 | 2.4.6 |" in page
    assert "| second | 3.11.7 | – | – |" in page


def test_dots_of_a_kernel_figure_never_cover_each_other(root):
    rows = [_row("ours", 2.0), *[_row(f"peer {i}", 2.0 + 0.001 * i) for i in range(5)], _row("slow", 90.0)]
    _result(root, "cpu", rows)
    svg = pages.generated(root)["book/figures/kernel-rope.cpu.svg"]
    dots = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)]
    assert len(dots) == 12  # six letters in the legend, six on the axis
    assert all(math.dist(a, b) >= 20 for a, b in itertools.combinations(dots, 2))


def test_titles_in_a_kernel_figure_fit_and_tell_the_cases_apart(root):
    shapes = [{"B": 1, "T": 512}, {"B": 8, "T": 2048}]
    named = [
        _row(variant, time, shape=shape, case=case)
        for case, shape in zip(("first", "second"), shapes, strict=True)
        for variant, time in (("ours", 2.0), ("eager", 5.0))
    ]
    _result(root, "cpu", named)
    svg = pages.generated(root)["book/figures/kernel-rope.cpu.svg"]
    assert ">first, forward</text>" in svg
    assert "T=512" not in svg
    _result(root, "cpu", [row | {"case": "shift"} for row in named])
    svg = pages.generated(root)["book/figures/kernel-rope.cpu.svg"]
    assert ">shift, forward (B=1 T=512, float32)</text>" in svg
    assert ">shift, forward (B=8 T=2048, float32)</text>" in svg
