"""What a chapter's parameters may be, checked at every border: the command, papermill, a person in Jupyter.

The names, types, defaults and help stand in the notebook's cell tagged `parameters`; what is allowed and the
presets of the scales stand in the `[parameters.NAME]` tables of the paper file. Nothing here imports torch.
"""

from __future__ import annotations

import ast
import difflib
import json
import math
import re
import tokenize
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tokenbook import papers

SCALES = ("smoke", "small", "paper")
COMMON_RULES: dict[str, dict[str, Any]] = {
    "scale": {"choices": list(SCALES)},
    "seed": {"min": 0, "max": 2**31 - 1},
    "device": {"pattern": r"auto|cpu|mps|cuda(:\d+)?", "takes": "auto, cpu, mps, cuda or cuda:N"},
    "model": {},
    "dataset": {},
}
RULE_KEYS = {"min", "max", "choices", "min_items", "max_items", "pattern", "takes", "optional", *SCALES}
TYPES: dict[str, tuple[Any, str]] = {
    "str": (str, "text"),
    "int": (int, "a whole number"),
    "float": (float, "a number"),
    "bool": (bool, "true or false"),
    "list[str]": (list[str], "a list of texts"),
    "list[int]": (list[int], "a list of whole numbers"),
    "list[float]": (list[float], "a list of numbers"),
}


class ParameterError(ValueError):
    """A parameter that is unknown or out of bounds: one sentence, shown without a stack of frames."""

    def _render_traceback_(self) -> list[str]:
        return [f"ParameterError: {self}"]


@dataclass(frozen=True)
class Parameter:
    """One line of the parameters cell."""

    name: str
    type: str
    default: Any
    help: str


def read_cell(source: str) -> dict[str, Parameter]:
    """Parameters of the source of a parameters cell: every statement is `name: type = literal  # help`."""
    comments = {
        token.start[0]: token.string.lstrip("# ").strip()
        for token in tokenize.generate_tokens(StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    for node in ast.parse(source).body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value):
            raise papers.PaperError(
                f"line {node.lineno} of the parameters cell must read `name: type = value  # what it is`"
            )
        kind = ast.unparse(node.annotation)
        if kind not in TYPES:
            raise papers.PaperError(
                f"{node.target.id}: the type must be one of {', '.join(TYPES)}, got {kind}"
            )
        default = ast.literal_eval(node.value)
        found[node.target.id] = Parameter(node.target.id, kind, default, comments.get(node.end_lineno, ""))
    return found


def read_notebook(path: Path) -> dict[str, Parameter]:
    """Parameters of a notebook file; PaperError unless exactly one cell is tagged `parameters`."""
    cells = [
        "".join(cell["source"])
        for cell in json.loads(Path(path).read_text("utf-8"))["cells"]
        if cell["cell_type"] == "code" and "parameters" in cell.get("metadata", {}).get("tags", [])
    ]
    if len(cells) != 1:
        raise papers.PaperError(
            f"{Path(path).name} must have exactly one cell tagged `parameters`, it has {len(cells)}"
        )
    return read_cell(cells[0])


def type_name(annotation: Any) -> str:
    """`list[str]` of the annotation object or text that the parameters cell leaves in a namespace."""
    return annotation.__name__ if annotation in (str, int, float, bool) else str(annotation)


class Spec:
    """What the parameters of one chapter may be."""

    def __init__(
        self,
        slug: str,
        types: dict[str, str],
        rules: dict[str, dict[str, Any]],
        defaults: dict[str, Any] | None = None,
    ):
        """`types`: name -> type as in the parameters cell; `rules`: the paper file's parameter tables."""
        self.slug, self.types, self.defaults = slug, types, defaults or {}
        self.rules = {name: {**COMMON_RULES.get(name, {}), **rules.get(name, {})} for name in types}
        if stray := sorted(set(rules) - set(types)):
            raise ParameterError(
                f"{slug}: the parameters cell lacks {', '.join(stray)}, named in its paper file"
            )
        for name, rule in self.rules.items():
            if unknown := sorted(set(rule) - RULE_KEYS):
                raise papers.PaperError(f"{slug}: parameters.{name} has unknown keys {', '.join(unknown)}")

    @classmethod
    def load(cls, slug: str, root: Path | None = None) -> Spec:
        """The spec of a chapter, from its notebook and its paper file, without executing anything."""
        root = root or papers.project_root()
        path = root / "notebooks" / f"{slug}.ipynb"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in path.parent.glob("*.ipynb"))) or "none"
            raise ParameterError(f"unknown chapter {slug!r}; there are: {known}")
        cell = read_notebook(path).values()
        types, defaults = {p.name: p.type for p in cell}, {p.name: p.default for p in cell}
        return cls(slug, types, papers.load(slug, root).parameters, defaults)

    def takes(self, name: str) -> str:
        """What a parameter takes, in words: `1..8`, `one of a, b`, `a whole number`."""
        rule, kind = self.rules[name], self.types[name]
        words = rule.get("takes") or TYPES[kind][1]
        if "choices" in rule:
            words = (
                ("items" if kind.startswith("list") else "one")
                + " of "
                + ", ".join(map(str, rule["choices"]))
            )
        elif "min" in rule or "max" in rule:
            low, high = rule.get("min"), rule.get("max")
            bounds = (
                f"at most {high}" if low is None else f"at least {low}" if high is None else f"{low}..{high}"
            )
            words = f"{words}, {bounds}"
        if "min_items" in rule or "max_items" in rule:
            words += f", {rule.get('min_items', 0)}..{rule.get('max_items', 'any number of')} items"
        return words

    def known(self, name: str) -> None:
        """Raise ParameterError unless the chapter has this parameter."""
        if name not in self.types:
            near = difflib.get_close_matches(name, self.types, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ParameterError(f"unknown parameter {name}{hint}; {self.slug} takes {', '.join(self.types)}")

    def check(self, name: str, value: Any) -> Any:
        """`value` if the parameter takes it, else ParameterError. None is left for `resolve`."""
        self.known(name)
        if value is None:
            return None
        rule = self.rules[name]
        try:
            checked = TypeAdapter(TYPES[self.types[name]][0]).validate_python(value, strict=True)
        except ValidationError:
            self._refuse(name, value)
        items = checked if isinstance(checked, list) else [checked]
        for item in items:
            if isinstance(item, float) and not math.isfinite(item):
                self._refuse(name, value)
            if "choices" in rule and item not in rule["choices"]:
                self._refuse(name, value)
            if ("min" in rule and item < rule["min"]) or ("max" in rule and item > rule["max"]):
                self._refuse(name, value)
            if "pattern" in rule and not re.fullmatch(rule["pattern"], item):
                self._refuse(name, value)
        if isinstance(checked, list) and not (
            rule.get("min_items", 0) <= len(checked) <= rule.get("max_items", len(checked))
        ):
            self._refuse(name, value)
        return checked

    def _refuse(self, name: str, value: Any) -> None:
        raise ParameterError(f"{name} must be {self.takes(name)}; got {value!r}") from None

    def parse(self, name: str, text: str) -> Any:
        """Value of a parameter given as text on a command line, checked."""
        self.known(name)
        kind = self.types[name]
        if text.strip().lower() in ("none", "null"):
            return None
        return self.check(name, _parse(kind, text))

    def resolve(self, given: dict[str, Any]) -> dict[str, Any]:
        """Every parameter with its value: what is given, else the default, else the preset of the scale.

        None, and the empty text where the scale has a preset for it, stand for "not given".
        """
        values = {**self.defaults, **given}
        scale = self.check("scale", values.get("scale")) or "small" if "scale" in self.types else "small"
        for name, value in values.items():
            self.known(name)
            preset = self.rules[name].get(scale)
            if value == "" and preset is not None:
                value = None
            if value is None and preset is None and not self.rules[name].get("optional"):
                raise ParameterError(f"{name} has no preset for scale {scale}: it must be {self.takes(name)}")
            values[name] = self.check(name, preset if value is None else value)
        return values


def _parse(kind: str, text: str) -> Any:
    """Text to a value of a type, or the text itself where it is none (`check` then refuses it)."""
    if kind == "str":
        return text
    if kind == "bool":
        return {"true": True, "false": False}.get(text.strip().lower(), text)
    if kind.startswith("list["):
        inner = text.strip().removeprefix("[").removesuffix("]")
        parts = [part.strip().strip("\"'") for part in inner.split(",")] if inner.strip() else []
        return [_parse(kind[5:-1], part) for part in parts]
    try:
        return int(text) if kind == "int" else float(text)
    except ValueError:
        return text
