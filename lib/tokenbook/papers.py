"""The facts of a paper and the claims it makes, read from `book/papers/SLUG.toml`.

Thresholds live there and nowhere else, so that a diff of that one file shows every change of a threshold.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

# Where a figure of the paper is known from. The last three are shown to readers with a caveat.
Source = Literal["abstract", "paper", "repository", "config", "second-hand", "recalled", "ours"]
CAVEATS = {
    "second-hand": "known at second hand, to be verified",
    "recalled": "from memory, to be verified",
    "ours": "our own check, no claim of the paper",
}

Finite = Annotated[float, Field(allow_inf_nan=False)]


class PaperError(ValueError):
    """A paper file that is missing or malformed."""


class Criterion(BaseModel):
    """One measured quantity and the threshold that it has to meet."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    what: str
    unit: str
    op: Literal[">=", ">", "<=", "<"]
    threshold: Finite
    null: Finite | None = None
    exact: bool = False
    control: bool = False
    role: Literal["required", "direction"] = "required"

    def met_by(self, value: float) -> bool:
        """Whether `value` meets the threshold; NaN never does."""
        ops = {">=": float.__ge__, ">": float.__gt__, "<=": float.__le__, "<": float.__lt__}
        return bool(ops[self.op](float(value), self.threshold))

    @property
    def wants_more(self) -> bool:
        """Whether larger values are better."""
        return self.op in (">=", ">")

    def __str__(self) -> str:
        sign = {">=": "≥", "<=": "≤"}.get(self.op, self.op)
        return f"{sign} {self.threshold:g} {self.unit}".rstrip()


class Claim(BaseModel):
    """One claim of the paper, how it is tested here and what would count as reproduced."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    statement: str
    paper: str
    where: str
    source: Source
    test: str = ""
    control: str = ""
    no_control: str = ""
    untested: str = ""
    criteria: tuple[Criterion, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Claim:
        ids = [criterion.id for criterion in self.criteria]
        if len(ids) != len(set(ids)):
            raise ValueError(f"claim {self.id}: criteria ids must differ, got {ids}")
        if not self.required and not self.untested:
            raise ValueError(f"claim {self.id} needs a required criterion, or `untested` with the reason")
        if self.required and bool(self.control) == bool(self.no_control):
            raise ValueError(f"claim {self.id} needs either `control` or `no_control` with the reason")
        return self

    @property
    def required(self) -> tuple[Criterion, ...]:
        """Criteria that must all hold for `reproduced`."""
        return tuple(c for c in self.criteria if c.role == "required")

    @property
    def direction(self) -> tuple[Criterion, ...]:
        """Criteria that, where given, alone decide `direction only`."""
        return tuple(c for c in self.criteria if c.role == "direction")

    @property
    def controlled(self) -> tuple[Criterion, ...]:
        """Criteria that the control must fail."""
        if not self.control:
            return ()
        return tuple(c for c in self.required if c.control) or self.required[:1]


class Paper(BaseModel):
    """A paper file: bibliographic facts, claims, and what the chapter's parameters may be."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    authors: str
    year: int
    venue: str = ""
    arxiv: str = ""
    code: str = ""
    licence: str = ""
    bibtex: str = ""
    part: str
    summary: str
    claims: tuple[Claim, ...]
    parameters: dict[str, dict[str, Any]] = {}

    @model_validator(mode="after")
    def _consistent(self) -> Paper:
        ids = [claim.id for claim in self.claims]
        if not ids:
            raise ValueError("a paper needs at least one claim")
        if len(ids) != len(set(ids)):
            raise ValueError(f"claim ids must differ, got {ids}")
        return self


def project_root(start: Path | None = None) -> Path:
    """Folder of the project: the one that holds `book/papers`.

    Looked for in TOKENBOOK_ROOT, then upwards from `start` (the working directory), then around this package.
    """
    if os.environ.get("TOKENBOOK_ROOT"):
        return Path(os.environ["TOKENBOOK_ROOT"]).resolve()
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents, Path(__file__).resolve().parents[2]):
        if (folder / "book" / "papers").is_dir():
            return folder
    raise PaperError("no project found: start inside a clone of Tokenbook, or set TOKENBOOK_ROOT to one")


def load(slug: str, root: Path | None = None) -> Paper:
    """Read and check `book/papers/SLUG.toml`; raises PaperError with one sentence."""
    path = (root or project_root()) / "book" / "papers" / f"{slug}.toml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.toml"))) or "none"
        raise PaperError(f"no paper file for chapter {slug!r}; there are: {known}")
    try:
        return Paper.model_validate(tomllib.loads(path.read_text("utf-8")))
    except tomllib.TOMLDecodeError as error:
        raise PaperError(f"book/papers/{slug}.toml is not valid TOML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise PaperError(f"book/papers/{slug}.toml: {where}: {first['msg']}") from error
