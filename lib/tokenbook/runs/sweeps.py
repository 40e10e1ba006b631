"""What a sweep is made of: a chapter, values for some of its parameters, fixed values for others.

On the command line `-g NAME=VALUES`, in a file under `book/sweeps/` the same text or a YAML list. VALUES is
    0,1,2            these values; lists in brackets: [1,3],[4,8]
    0:10, 0:10:2     whole numbers from the first up to, not including, the second, as in Python's `range`
    lin:0:1:5        so many numbers, evenly spaced, both ends included
    log:1e-4:1e-1:4  the same, evenly spaced in the logarithm
    random:0:1, lograndom:1e-4:1e-1, random:1:65   drawn anew for each of `samples` runs
Values of several parameters are multiplied; random ones are drawn `samples` times for each combination.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tokenbook.parameters import ParameterError, Spec

MAX_RUNS = 100_000
FIELDS = {"title", "question", "answer", "chapter", "fixed", "grid", "samples", "sample_seed", "plot"}
REQUIRED = ("title", "question", "chapter", "grid")


@dataclass(frozen=True)
class Sweep:
    """A sweep's specification; `grid` maps parameters to texts or lists of values."""

    chapter: str
    grid: dict[str, Any]
    fixed: dict[str, Any] = field(default_factory=dict)
    samples: int = 1
    sample_seed: int = 0
    title: str = ""
    question: str = ""
    answer: str = ""
    plot: dict[str, Any] = field(default_factory=dict)

    def given(self, spec: Spec) -> list[dict[str, Any]]:
        """The given parameters of every run, each value checked; ParameterError in one sentence."""
        axes: dict[str, list[Any]] = {}
        drawn: dict[str, str] = {}
        for name, values in self.grid.items():
            spec.known(name)
            if isinstance(values, str) and _RANDOM.fullmatch(values.strip()):
                drawn[name] = values.strip()
            else:
                axes[name] = _values(spec, name, values)
        fixed = {name: spec.check(name, value) for name, value in self.fixed.items()}
        if clash := sorted(set(fixed) & set(self.grid)):
            raise ParameterError(f"{clash[0]} is both fixed and swept")
        n_samples = self.samples if drawn else 1
        if self.samples < 1:
            raise ParameterError(f"samples must be at least 1, got {self.samples}")
        n_runs = math.prod(len(values) for values in axes.values()) * n_samples
        if not 1 <= n_runs <= MAX_RUNS:
            raise ParameterError(f"a sweep takes 1..{MAX_RUNS} runs; this one would be {n_runs}")
        source, found = random.Random(self.sample_seed), []
        for values in itertools.product(*axes.values()):
            for _ in range(n_samples):
                draws = {name: _draw(spec, name, text, source) for name, text in drawn.items()}
                found.append({**fixed, **dict(zip(axes, values, strict=True)), **draws})
        return found


def from_options(chapter: str, grid: tuple[str, ...], fixed: dict[str, Any], **more: Any) -> Sweep:
    """A sweep from `-g NAME=VALUES` options."""
    axes = {}
    for option in grid:
        name, equals, values = option.partition("=")
        if not equals or not values:
            raise ParameterError(f"-g takes NAME=VALUES, got {option!r}")
        if name in axes:
            raise ParameterError(f"-g {name} is given twice")
        axes[name] = values
    return Sweep(chapter, axes, fixed, **more)


def load(path: Path) -> Sweep:
    """A sweep from a YAML file; ParameterError says what is wrong with it."""
    try:
        data = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ParameterError(f"{path.name} cannot be read as YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(data, dict):
        raise ParameterError(f"{path.name} must hold a mapping with {', '.join(REQUIRED)}")
    if unknown := sorted(set(data) - FIELDS):
        raise ParameterError(
            f"{path.name} has the unknown field {unknown[0]}; it takes {', '.join(sorted(FIELDS))}"
        )
    if missing := [name for name in REQUIRED if not data.get(name)]:
        raise ParameterError(f"{path.name} lacks {', '.join(missing)}")
    for name in ("grid", "fixed", "plot"):
        if not isinstance(data.get(name, {}), dict):
            raise ParameterError(f"{path.name}: {name} must be a mapping")
    return Sweep(**data)


_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RANDOM = re.compile(rf"(random|lograndom):({_NUMBER}):({_NUMBER})")
_SPACED = re.compile(rf"(lin|log):({_NUMBER}):({_NUMBER}):(\d+)")
_RANGE = re.compile(r"([-+]?\d+):([-+]?\d+)(?::([-+]?\d+))?")


def _values(spec: Spec, name: str, values: Any) -> list[Any]:
    """The checked values of one parameter, each once."""
    if isinstance(values, str):
        checked = [spec.parse(name, text) for text in _texts(spec, name, values.strip())]
    else:
        checked = [spec.check(name, value) for value in (values if isinstance(values, list) else [values])]
    if not checked:
        raise ParameterError(f"{name} is swept over no value: {values!r}")
    return list({repr(value): value for value in checked}.values())


def _texts(spec: Spec, name: str, text: str) -> list[str]:
    if match := _RANGE.fullmatch(text):
        start, stop, step = int(match[1]), int(match[2]), int(match[3] or 1)
        if step == 0:
            raise ParameterError(f"{name}={text}: the step of a range must not be 0")
        if len(range(start, stop, step)) > MAX_RUNS:
            raise ParameterError(f"{name}={text}: a sweep takes 1..{MAX_RUNS} runs")
        return [str(value) for value in range(start, stop, step)]
    if match := _SPACED.fullmatch(text):
        numbers = _spaced(name, match[1] == "log", float(match[2]), float(match[3]), int(match[4]))
        return [str(round(x)) if spec.types[name] == "int" else repr(x) for x in numbers]
    return re.findall(r"\[[^\]]*\]|[^,\[\]]+", text)


def _spaced(name: str, is_log: bool, low: float, high: float, n: int) -> list[float]:
    if n < 2:
        raise ParameterError(f"{name}: an evenly spaced range needs at least 2 values, got {n}")
    if is_log and min(low, high) <= 0:
        raise ParameterError(f"{name}: both ends of a log range must be positive, got {low:g} and {high:g}")
    if is_log:
        a, b = math.log10(low), math.log10(high)
        return [float(f"{10 ** (a + (b - a) * i / (n - 1)):.12g}") for i in range(n)]
    return [float(f"{low + (high - low) * i / (n - 1):.12g}") for i in range(n)]


def _draw(spec: Spec, name: str, text: str, source: random.Random) -> Any:
    kind, low, high = _RANDOM.fullmatch(text).groups()
    low, high = float(low), float(high)
    if kind == "lograndom" and min(low, high) <= 0:
        raise ParameterError(f"{name}: both ends of {text} must be positive")
    if spec.types[name] == "int" and kind == "random":
        return spec.check(name, source.randrange(int(low), max(int(low) + 1, int(high))))
    value = (
        source.uniform(low, high)
        if kind == "random"
        else math.exp(source.uniform(math.log(low), math.log(high)))
    )
    return spec.check(name, round(value) if spec.types[name] == "int" else value)
