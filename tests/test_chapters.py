"""What every chapter must be: executed, small, clean, complete by its paper file, and alive at `smoke`."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest

from tokenbook import papers
from tokenbook.ledger import MIME, VERDICTS
from tokenbook.parameters import SCALES, Spec, read_notebook

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
COMMON = ("scale", "seed", "device", "model")
SECTIONS = (
    "Claims",
    "Parameters",
    "Method",
    "Reproduction",
    "Results",
    "What we learned",
    "At paper scale",
    "Try it",
)
CHECK = "# NBVAL_CHECK_OUTPUT"
KIB_600 = 600 * 1000


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def path(request):
    return request.param


@pytest.fixture(scope="module")
def notebook(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def checked_cells(notebook):
    return [cell for cell in code_cells(notebook) if cell.source.startswith(CHECK)]


def claims_payload(notebook):
    found = [o.data[MIME] for c in code_cells(notebook) for o in c.outputs if MIME in o.get("data", {})]
    assert len(found) == 1, "the ledger must be shown exactly once"
    return found[0]


def printed(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def test_there_are_chapters():
    assert NOTEBOOKS, "notebooks/ holds no chapter"


def test_sections_stand_in_order(notebook):
    headings = [
        line.removeprefix("## ").strip()
        for cell in notebook.cells
        if cell.cell_type == "markdown"
        for line in cell.source.splitlines()
        if line.startswith("## ")
    ]
    assert tuple(headings) == SECTIONS
    titles = [c for c in notebook.cells if c.cell_type == "markdown" and c.source.startswith("# ")]
    assert len(titles) == 1
    assert notebook.cells[0] is titles[0]


def test_one_parameters_cell_agrees_with_the_paper_file(path):
    parameters = read_notebook(path)  # raises unless there is exactly one
    assert [name for name in COMMON if name not in parameters] == []
    assert [p.name for p in parameters.values() if not p.help] == [], "every parameter says what it is"
    spec = Spec.load(path.stem)
    for scale in SCALES:
        assert spec.resolve({"scale": scale})["scale"] == scale
    assert spec.resolve({})["scale"] == "small"


def test_parameters_are_checked_before_anything_heavy_is_imported(notebook):
    sources = [cell.source for cell in code_cells(notebook)]
    checked = next(n for n, source in enumerate(sources) if ".parameters(globals())" in source)
    tagged = next(n for n, c in enumerate(code_cells(notebook)) if "parameters" in c.metadata.get("tags", []))
    assert checked == tagged + 1
    packages = "torch|transformers|seaborn|matplotlib|pandas|sklearn|scipy"
    heavy = re.compile(rf"^\s*(import|from) ({packages})", re.M)
    assert not heavy.search("\n".join(sources[:checked]))


def test_outputs_are_those_of_one_fresh_small_run(notebook):
    cells = [cell for cell in code_cells(notebook) if cell.source.strip()]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    payload = claims_payload(notebook)
    assert payload["scale"] == "small"


def test_saved_outputs_are_clean(path, notebook):
    for cell in code_cells(notebook):
        for output in cell.outputs:
            assert output.output_type != "error", cell.id
            assert output.get("name") != "stderr", f"{cell.id}: {output.get('text')}"
    text = path.read_text("utf-8")
    assert "papermill" not in json.loads(text)["metadata"]
    assert not any("injected-parameters" in c.metadata.get("tags", []) for c in notebook.cells)
    assert not re.search(r"/(home|root|tmp|Users|work)/|0x[0-9a-f]{8,}", _without_pictures(text))


def _without_pictures(text):
    return re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)


def test_size(path):
    assert path.stat().st_size <= KIB_600


def test_figures_have_alternative_text(notebook):
    html = "".join(
        "".join(o.data["text/html"])
        for c in code_cells(notebook)
        for o in c.outputs
        if "text/html" in o.get("data", {})
    )
    images = re.findall(r"<img [^>]*>", html)
    assert images, "a chapter has figures"
    for image in images:
        assert (alt := re.search(r'alt="([^"]{20,})"', image)), image[:60]
        assert not re.search(r"[.;:,] *[.;]", alt[1].replace("...", "")), f"a gap in: {alt[1]}"
    assert not any("image/png" in o.get("data", {}) for c in code_cells(notebook) for o in c.outputs)


def test_checked_cells_are_not_vacuous(notebook):
    checked = checked_cells(notebook)
    assert len(checked) >= 4
    for cell in checked:
        assert printed(cell).strip(), f"{cell.id} has no stored output: nbval would pass whatever it prints"
        shown = cell.source.removeprefix(CHECK)
        assert re.search(r"print\([^)]*[,{]", shown), f"{cell.id} prints nothing that is computed"


def test_no_other_spelling_of_the_check_marker(notebook):
    for cell in code_cells(notebook):
        if "NBVAL" in cell.source:
            assert cell.source.startswith(CHECK + "\n"), f"{cell.id}: nbval would not see this marker"


def test_every_claim_has_a_row_with_todays_thresholds(path, notebook):
    paper, payload = papers.load(path.stem), claims_payload(notebook)
    rows = {row["claim"]: row for row in payload["claims"]}
    assert list(rows) == [claim.id for claim in paper.claims]
    for claim in paper.claims:
        row = rows[claim.id]
        assert row["verdict"] in VERDICTS
        assert row["statement"] == claim.statement
        if row["verdict"] == "untested":
            assert row["reason"]
            continue
        stored = {c["id"]: c["threshold"] for c in row["criteria"]}
        assert stored == {c.id: str(c) for c in claim.criteria}


def test_stored_parameters_are_the_small_presets(path, notebook):
    assert claims_payload(notebook)["parameters"] == Spec.load(path.stem).resolve({})


@pytest.fixture(scope="module")
def smoke_copy(path, tmp_path_factory):
    """The notebook with scale = smoke, as papermill prepares it, stored outputs kept."""
    target = tmp_path_factory.mktemp(path.stem) / path.name
    papermill.execute_notebook(
        str(path), str(target), {"scale": "smoke"}, prepare_only=True, progress_bar=False
    )
    return target


def run_nbval(copy):
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-current-env", "-q", "--no-header"]
    command += ["-p", "no:cacheprovider", "-o", "addopts=", "--nbval-cell-timeout", "300", str(copy)]
    environment = os.environ | {"TOKENBOOK_ROOT": str(ROOT), "OMP_NUM_THREADS": "2"}
    options = {"cwd": copy.parent, "env": environment, "capture_output": True, "text": True}
    return subprocess.run(command, timeout=500, **options)


def test_smoke_under_nbval(smoke_copy):
    kept = nbformat.read(smoke_copy, as_version=4)
    assert len(checked_cells(kept)) >= 4
    assert all(cell.outputs for cell in checked_cells(kept))
    done = run_nbval(smoke_copy)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
