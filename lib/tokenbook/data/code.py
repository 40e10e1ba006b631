"""Editing real code: contexts that end before a line to be predicted, and edits of whole lines in them.

The edited text is always the true file, so that its true next line is the gold answer; an edit's *old*
text is what a developer would have had before it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from tokenbook.data import stdlib

KINDS = ("insertion", "deletion", "replacement", "multi")
REPOBENCH_COLUMNS = (
    "repo_name",
    "file_path",
    "context",
    "import_statement",
    "cropped_code",
    "next_line",
    "level",
)
#: Names of many lengths; one of them stands where a definition is renamed.
OTHER_NAMES = ("i", "key", "path", "value", "handler", "_context", "file_name", "DEFAULT_SIZE", "is_complete")


class Context(NamedTuple):
    """A prompt that ends with a newline, and the line of code that follows it (without its newline)."""

    prompt: str
    next_line: str


class Rename(NamedTuple):
    """The text before a definition got the name that the prompt has, and where the prompt copies it."""

    old_text: str
    start: int  # in characters of the prompt
    end: int


def is_code(line: str, comment: str = "#") -> bool:
    """Whether a line is neither empty nor a comment (`comment`: "#" or "//") nor the start of a docstring."""
    bare = line.strip()
    return bool(bare) and not bare.startswith((comment, '"""', "'''", "/*", "*"))


def first_code_line(text: str, comment: str = "#") -> str:
    """The first line that is neither empty nor a comment; the first line if there is none.

    Source: RepoBench, run.py (Python: `#` and triple-quoted blocks; Java: `//` and `/* */`).
    """
    lines, closes = text.split("\n"), None
    for line in lines:
        bare = line.strip()
        if closes:
            closes = None if closes in bare else closes
        elif comment == "#" and bare.startswith(('"""', "'''")):
            closes = None if bare[:3] in bare[3:] else bare[:3]
        elif comment == "//" and bare.startswith("/*"):
            closes = None if "*/" in bare else "*/"
        elif bare and not bare.startswith(comment):
            return line
    return lines[0]


def stdlib_contexts(rng: random.Random, n_symbols: int) -> Iterator[Context]:
    """Endless random windows of `n_symbols` from the standard library's held-out files."""
    texts = [file.text for file in stdlib.corpus().heldout if len(file.text) > 2 * n_symbols]
    if not texts:
        raise ValueError(f"n_symbols must leave a held-out file of twice that length, got {n_symbols}")
    while True:
        text = rng.choice(texts)
        end = text.find("\n", rng.randrange(n_symbols, len(text))) + 1
        prompt, next_line = text[end - n_symbols : end], text[end:].partition("\n")[0]
        if end > n_symbols and prompt.splitlines()[-1].strip() and is_code(next_line):
            yield Context(prompt, next_line)


def repobench_contexts(
    rows: Iterable[dict[str, Any]],
    level: str,
    rng: random.Random,
    budget: int,
    count_tokens: Callable[[str], int],
    comment: str = "#",
) -> Iterator[Context]:
    """RepoBench v1.1's rows of one level in random order, as prompts of at most `budget` tokens."""
    wanted = [row for row in rows if row["level"] == level]
    for row in rng.sample(wanted, len(wanted)):
        prompt = repobench_prompt(row, budget, count_tokens, comment)
        if prompt is not None and is_code(row["next_line"], comment):
            yield Context(prompt, row["next_line"])


def repobench_prompt(
    row: dict[str, Any], budget: int, count_tokens: Callable[[str], int], comment: str = "#"
) -> str | None:
    """Repository, snippets of other files, then this file up to the line to be predicted.

    Snippet lines are dropped from their end until the prompt has at most `budget` tokens; None if this file
    alone has more.  Source: RepoBench, data/utils.py.
    """
    snippets = "".join(f"{comment} Path: {s['path']}\n{s['snippet']}\n\n" for s in row["context"])
    cross_file = snippets.splitlines(keepends=True)
    in_file = f"{comment} Path: {row['file_path']}\n{row['import_statement']}\n"
    in_file += row["cropped_code"].rstrip() + "\n"
    while True:
        prompt = f"{comment} Repo Name: {row['repo_name']}\n" + "".join(cross_file) + in_file
        prompt = re.sub(r"\n{4,}", "\n\n", prompt)
        excess = count_tokens(prompt) - budget
        if excess <= 0:
            return prompt
        if not cross_file:
            return None
        while excess > 0 and cross_file:
            excess -= count_tokens(cross_file.pop())


def line_edits(
    prompt: str,
    kind: str,
    foreign: list[str],
    rng: random.Random,
    *,
    n_lines: tuple[int, int] = (1, 3),
    n_places: int = 3,
) -> list[str] | None:
    """An edit of whole lines, as texts: before it, after its first place, ..., and at last `prompt` itself.

    Insertion: the old text lacks lines; deletion: it has lines of `foreign` (another file's); replacement:
    it has those in place of true ones; multi: `n_places` such places, each of a random kind.  The first line
    (it may be cut) and the last (the query) are never touched, and between two places a line stays.  None
    when the prompt has too few lines.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    lines = prompt.splitlines(keepends=True)
    n_places = n_places if kind == "multi" else 1
    room = (len(lines) - 2) // n_places - (n_places > 1)  # lines that one place may touch
    if room < 1:
        return None
    places = []
    for number in range(n_places):
        one = rng.choice(KINDS[:3]) if kind == "multi" else kind
        n_true = 0 if one == "deletion" else min(rng.randint(*n_lines), room)
        n_old = 0 if one == "insertion" else rng.randint(*n_lines)
        start = 1 + number * (room + 1) + rng.randint(0, room - n_true)
        first = rng.randrange(max(1, len(foreign) - n_old))
        places.append((start, start + n_true, foreign[first : first + n_old]))
    return [_with_places_done(lines, places, n_done) for n_done in range(n_places + 1)]


def _with_places_done(lines: list[str], places: list[tuple[int, int, list[str]]], n_done: int) -> str:
    text, here = [], 0
    for number, (start, end, old) in enumerate(places):
        text += lines[here:start] + (lines[start:end] if number < n_done else old)
        here = end
    return "".join(text + lines[here:])


def renamed_definition(prompt: str, rng: random.Random, n_tail: int = 40) -> Rename | None:
    """A text in which one definition has another name of different length, which the prompt's tail copies.

    Looked for is an identifier that the last `n_tail` characters use and that occurs once before: where it is
    defined.  None when there is no such identifier.
    """
    tail_at = len(prompt) - n_tail
    for use in re.finditer(r"\b[A-Za-z_]\w{2,}\b", prompt[tail_at:]):
        name, start = use[0], tail_at + use.start()
        earlier = [m.start() for m in re.finditer(rf"\b{name}\b", prompt[:start])]
        definition = rf"\b(def|class|for|as|import) +{name}\b|\b{name} *=[^=]|\bdef \w+\([^)]*\b{name}\b"
        cut_off = use.start() == 0 and prompt[tail_at - 1].isidentifier()
        if len(earlier) == 1 and not cut_off and re.search(definition, prompt[:tail_at]):
            other = rng.choice([n for n in OTHER_NAMES if len(n) != len(name)])
            old_text = prompt[: earlier[0]] + other + prompt[earlier[0] + len(name) :]
            return Rename(old_text, start, start + len(name))
    return None
