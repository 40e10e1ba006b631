"""What every chapter's notebook opens with: its paper, its checked parameters, its ledger.

    paper = chapter.Chapter("pie")
    paper.show_claims()
    P = paper.parameters(globals())        # behind the parameters cell, before anything heavy is imported
    ledger = chapter.Ledger(paper, P)      # measure ... then ledger.show()

Importing this module imports no torch: a bad parameter stops the run before anything is loaded.
"""

from __future__ import annotations

import ast
import html
import warnings
from pathlib import Path
from typing import Any

from tokenbook import papers
from tokenbook.ledger import Ledger, LedgerError
from tokenbook.parameters import ParameterError, Spec, type_name

# tqdm (through transformers) says this once in every kernel that has no widgets; saved notebooks keep stderr.
warnings.filterwarnings("ignore", message="IProgress not found")

__all__ = ["Chapter", "Ledger", "LedgerError", "ParameterError", "Parameters", "refuse_if"]


def refuse_if(wrong: Any, sentence: str) -> None:
    """Stop the run with ParameterError if something is `wrong`.

    `sentence`: which parameter, what it takes, what it got.
    """
    if wrong:
        raise ParameterError(sentence)


class Parameters:
    """The resolved parameters of a run as read-only attributes."""

    def __init__(self, values: dict[str, Any], spec: Spec):
        object.__setattr__(self, "_values", dict(values))
        object.__setattr__(self, "_spec", spec)

    def __getattr__(self, name: str) -> Any:
        try:
            return self._values[name]
        except KeyError:
            raise AttributeError(f"no parameter {name}; there are {', '.join(self._values)}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"parameters are read-only: set {name} in the parameters cell and run it again")

    def as_dict(self) -> dict[str, Any]:
        """A copy as plain data."""
        return dict(self._values)

    def __repr__(self) -> str:
        return "\n".join(f"{name} = {value!r}" for name, value in self._values.items())

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th scope='row'><code>{name}</code></th><td><code>{html.escape(repr(value))}</code></td>"
            f"<td>{html.escape(self._spec.takes(name))}</td></tr>"
            for name, value in self._values.items()
        )
        head = "".join(f"<th scope='col'>{h}</th>" for h in ("parameter", "this run", "takes"))
        return (
            f'<div class="ledger-scroll"><table class="parameters"><thead><tr>{head}</tr></thead>'
            f"<tbody>{rows}</tbody></table></div>"
        )


class Chapter:
    """A chapter: its slug and its paper's facts."""

    def __init__(self, slug: str, root: Path | None = None):
        """Reads `book/papers/SLUG.toml`; PaperError if it is missing or malformed."""
        self.slug, self.paper = slug, papers.load(slug, root)

    def parameters(self, namespace: dict[str, Any]) -> Parameters:
        """Check and resolve what the parameters cell (and papermill behind it) left in `globals()`.

        Raises ParameterError, one sentence, for a name that the chapter does not have, a wrong type, a value
        that is not finite or outside its range.
        """
        annotated = {n: a for n, a in namespace.get("__annotations__", {}).items() if not n.startswith("_")}
        spec = Spec(self.slug, {n: type_name(a) for n, a in annotated.items()}, self.paper.parameters)
        for name in _injected(namespace.get("In", [])):
            spec.known(name)
        return Parameters(spec.resolve({name: namespace[name] for name in annotated}), spec)

    def show_claims(self) -> None:
        """Display the table of claims: the paper's figure, where it stands, the test, the thresholds."""
        from IPython.display import display

        plain = "\n".join(f"{claim.id}: {claim.statement}" for claim in self.paper.claims)
        display({"text/plain": plain, "text/html": self._claims_html()}, raw=True)

    def _claims_html(self) -> str:
        body = []
        for claim in self.paper.claims:
            caveat = papers.CAVEATS.get(claim.source, f"from the {claim.source}")
            wanted = "".join(
                f"<div>{'direction: ' if c.role == 'direction' else ''}{html.escape(c.what)} "
                f"<b>{html.escape(str(c))}</b></div>"
                for c in claim.criteria
            )
            control = f"control: {claim.control}" if claim.control else f"no control: {claim.no_control}"
            wanted += f"<div><small>{html.escape(control)}</small></div>" if claim.criteria else ""
            wanted += f"<div>untested here: {html.escape(claim.untested)}</div>" if claim.untested else ""
            body.append(
                f"<tr><th scope='row'>{html.escape(claim.id)}</th><td>{html.escape(claim.statement)}</td>"
                f"<td>{html.escape(claim.paper)}<br>"
                f"<small>{html.escape(claim.where)} <i>({caveat})</i></small></td>"
                f"<td>{html.escape(claim.test)}</td><td>{wanted}</td></tr>"
            )
        heads = (
            "Claim",
            "Statement",
            "The paper's figure",
            "Tested here by",
            "Threshold, fixed before the run",
        )
        head = "".join(f"<th scope='col'>{h}</th>" for h in heads)
        return (
            f'<div class="ledger-scroll"><table class="claims"><thead><tr>{head}</tr></thead>'
            f"<tbody>{''.join(body)}</tbody></table></div>"
        )


def _injected(history: list[str]) -> list[str]:
    """Names that papermill set: it puts a cell that begins with `# Parameters` behind the tagged one."""
    for source in reversed(history):
        if source.startswith("# Parameters\n"):
            nodes = ast.parse(source).body
            return [
                t.id for n in nodes if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)
            ]
    return []
