"""Parameters are refused at the border, in one sentence, before anything is loaded."""

import subprocess
import sys

import pytest

from tokenbook import papers
from tokenbook.chapter import Parameters, _injected, refuse_if
from tokenbook.parameters import ParameterError, Spec, read_cell

CELL = """\
scale: str = "small"  # smoke, small or paper
seed: int = 0  # first random seed
device: str = "auto"  # auto, cpu, cuda or cuda:N
model: str = ""  # hub id; paper: org/name
n_edits: int = None  # edits per text; paper: 8
rate: float = 0.5  # learning rate
kinds: list[str] = None  # edit kinds
shuffle: bool = False  # whether to shuffle
"""
RULES = {
    "n_edits": {"min": 1, "max": 8, "smoke": 1, "small": 3, "paper": 8},
    "rate": {"min": 0.0, "max": 1.0},
    "kinds": {
        "choices": ["in", "out"],
        "min_items": 1,
        "smoke": ["in"],
        "small": ["in", "out"],
        "paper": ["out"],
    },
    "model": {"paper": "org/name"},
}


@pytest.fixture
def spec():
    cell = read_cell(CELL)
    return Spec(
        "demo", {p.name: p.type for p in cell.values()}, RULES, {p.name: p.default for p in cell.values()}
    )


def test_the_cell_yields_name_type_default_and_help():
    assert read_cell(CELL)["n_edits"].help == "edits per text; paper: 8"
    assert read_cell(CELL)["kinds"].type == "list[str]"
    with pytest.raises(papers.PaperError, match="line 1"):
        read_cell("a = 3")
    with pytest.raises(papers.PaperError, match="dict"):
        read_cell("a: dict = None")


@pytest.mark.parametrize(
    ("scale", "edits", "model"), [("smoke", 1, ""), ("small", 3, ""), ("paper", 8, "org/name")]
)
def test_none_takes_the_preset_of_its_scale(spec, scale, edits, model):
    values = spec.resolve({"scale": scale})
    assert (values["n_edits"], values["model"]) == (edits, model)


def test_empty_text_stands_for_the_preset_even_where_only_some_texts_are_allowed():
    spec = Spec(
        "demo", {"scale": "str", "dtype": "str"}, {"dtype": {"choices": ["float32"], "small": "float32"}}
    )
    assert spec.resolve({"scale": "small", "dtype": ""})["dtype"] == "float32"
    with pytest.raises(ParameterError, match="dtype must be one of float32; got ''"):
        spec.resolve({"scale": "paper", "dtype": ""})


def test_a_value_that_is_given_wins_over_the_preset(spec):
    assert spec.resolve({"scale": "paper", "n_edits": 2, "model": "a/b"})["n_edits"] == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_edits", 0),
        ("n_edits", 9),
        ("n_edits", True),
        ("n_edits", "3"),
        ("n_edits", 2.0),
        ("rate", float("nan")),
        ("rate", float("inf")),
        ("rate", "true"),
        ("shuffle", "true"),
        ("shuffle", 1),
        ("kinds", "in"),
        ("kinds", ["up"]),
        ("kinds", []),
        ("scale", "huge"),
        ("device", "gpu"),
        ("seed", -1),
    ],
)
def test_bad_values_are_refused_by_name_value_and_bounds(spec, name, value):
    with pytest.raises(ParameterError) as error:
        spec.resolve({name: value})
    sentence = str(error.value)
    assert sentence == f"{name} must be {spec.takes(name)}; got {value!r}"


def test_the_sentence_names_the_allowed_range(spec):
    with pytest.raises(ParameterError, match=r"^n_edits must be a whole number, 1\.\.8; got 0$"):
        spec.resolve({"n_edits": 0})


def test_an_unknown_name_is_refused_with_the_near_one(spec):
    with pytest.raises(ParameterError, match=r"unknown parameter n_edit \(did you mean n_edits\?\)"):
        spec.resolve({"n_edit": 2})


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("n_edits", "3", 3),
        ("rate", "1e-1", 0.1),
        ("shuffle", "true", True),
        ("kinds", "in,out", ["in", "out"]),
        ("kinds", '["in"]', ["in"]),
        ("model", "true", "true"),
        ("n_edits", "none", None),
    ],
)
def test_text_from_a_command_line_is_read_by_type(spec, name, text, value):
    assert spec.parse(name, text) == value


@pytest.mark.parametrize(
    ("name", "text"), [("n_edits", "true"), ("n_edits", "2.0"), ("rate", "nan"), ("shuffle", "1")]
)
def test_text_that_is_not_of_the_type_is_refused(spec, name, text):
    with pytest.raises(ParameterError, match=f"^{name} must be"):
        spec.parse(name, text)


def test_what_papermill_injects_is_seen():
    assert _injected(["", "x = 1", "# Parameters\nn_edit = 3\nseed = 1\n"]) == ["n_edit", "seed"]
    assert _injected(["", "x = 1"]) == []


def test_what_does_not_fit_together_stops_the_run_with_the_sentence():
    refuse_if(7 % 7, "gates must divide features = 7; got 7")
    with pytest.raises(ParameterError, match=r"^gates must divide features = 7; got 2$"):
        refuse_if(7 % 2, "gates must divide features = 7; got 2")


def test_parameters_are_read_only(spec):
    P = Parameters(spec.resolve({}), spec)
    with pytest.raises(AttributeError, match="read-only"):
        P.seed = 3
    assert "n_edits" in P._repr_html_()


def test_importing_the_chapter_module_loads_neither_torch_nor_transformers():
    code = "import sys, tokenbook.chapter; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
