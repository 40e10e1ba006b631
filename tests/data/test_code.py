"""Edits of real code: whole lines, always ending in the true text; prompts within their budget."""

import random
from itertools import pairwise

import pytest

from tokenbook.data import code

PROMPT = "".join(f"line_{n} = {n}\n" for n in range(20))
FOREIGN = [f"foreign_{n}()\n" for n in range(5000)]  # many: no line is drawn twice


def lines_of(text):
    return text.splitlines()


@pytest.mark.parametrize("kind", code.KINDS)
def test_the_last_version_is_the_true_text_and_each_place_changes_one_stretch_of_lines(kind):
    rng = random.Random(0)
    for _ in range(200):
        versions = code.line_edits(PROMPT, kind, FOREIGN, rng, n_places=3)
        assert versions[-1] == PROMPT
        assert len(versions) == (4 if kind == "multi" else 2)
        for text in versions:
            assert lines_of(text)[0] == "line_0 = 0"
            assert lines_of(text)[-1] == "line_19 = 19"
        old, true = set(lines_of(versions[0])), set(lines_of(PROMPT))
        if kind == "insertion":
            assert old < true
            assert 1 <= len(true - old) <= 3
        if kind == "deletion":
            assert true < old
            assert 1 <= len(old - true) <= 3
        if kind == "replacement":
            assert true - old
            assert old - true <= {line.strip() for line in FOREIGN}


def test_places_keep_a_line_between_them():
    rng = random.Random(1)
    for _ in range(200):
        versions = code.line_edits(PROMPT, "multi", FOREIGN, rng, n_places=4)
        steps = [set(lines_of(a)) ^ set(lines_of(b)) for a, b in pairwise(versions)]
        assert all(steps)
        untouched = set(lines_of(PROMPT)) - set().union(*steps)
        assert len(untouched) >= 5  # the first, the last, and one in each of three gaps


def test_a_prompt_with_too_few_lines_gives_nothing():
    assert code.line_edits("a\nb\n", "insertion", FOREIGN, random.Random(0)) is None
    assert code.line_edits("a\nb\nc\nd\ne\n", "multi", FOREIGN, random.Random(0), n_places=2) is None
    with pytest.raises(ValueError, match=r"kind must be one of insertion, .*got 'move'"):
        code.line_edits(PROMPT, "move", FOREIGN, random.Random(0))


def test_contexts_come_from_held_out_files_and_end_before_code():
    contexts = code.stdlib_contexts(random.Random(0), 256)
    texts = "".join(file.text for file in code.stdlib.corpus().heldout)
    for _, context in zip(range(50), contexts, strict=False):
        assert len(context.prompt) == 256
        assert context.prompt.endswith("\n")
        assert context.prompt + context.next_line in texts
        assert code.is_code(context.next_line)


@pytest.mark.parametrize(("text", "comment", "line"), [
    ("\n# no\n  x = 1\ny", "#", "  x = 1"),
    ('"""doc\nstill doc\n"""\nz = 2', "#", "z = 2"),
    ('"""one line"""\nz = 2', "#", "z = 2"),
    ("// no\n/* a\nb */\nint c;", "//", "int c;"),
    ("/* a */\nint c;", "//", "int c;"),
    ("# only", "#", "# only"),
    ("", "#", ""),
])  # fmt: skip
def test_first_code_line_skips_what_is_empty_or_comment(text, comment, line):
    assert code.first_code_line(text, comment) == line


def test_a_renamed_definition_is_the_only_earlier_use_and_changes_the_length():
    prompt = "def load(where):\n    total = 0\n    for x in where:\n        step(x)\n" + "    pass\n" * 5
    prompt += "    return total\n"
    rename = code.renamed_definition(prompt, random.Random(0))
    assert prompt[rename.start : rename.end] == "total"
    assert len(rename.old_text) != len(prompt)
    assert "total = 0" not in rename.old_text
    assert rename.old_text.endswith("return total\n")


def test_a_name_used_in_between_or_never_defined_is_not_taken():
    filler = "    pass\n" * 6
    assert code.renamed_definition(f"total = 0\nprint(total)\n{filler}total += 1\n", random.Random(0)) is None
    assert code.renamed_definition(f"print(total)\n{filler}total\n", random.Random(0)) is None


def row(n_snippet_lines=30):
    snippet = "\n".join(f"def f{n}(): pass" for n in range(n_snippet_lines))
    return {
        "repo_name": "me/it", "file_path": "a.py", "import_statement": "import b",
        "cropped_code": "x = b.f()  \n\n",
        "context": [{"path": "b.py", "snippet": snippet}],
        "next_line": "print(x)", "level": "2k",
    }  # fmt: skip


def test_a_prompt_holds_repository_snippets_and_file_in_order():
    prompt = code.repobench_prompt(row(2), 10_000, len)
    assert prompt == (
        "# Repo Name: me/it\n# Path: b.py\ndef f0(): pass\ndef f1(): pass\n\n"
        "# Path: a.py\nimport b\nx = b.f()\n"
    )
    assert code.repobench_prompt(row(2), 10_000, len, "//").startswith("// Repo Name: me/it\n// Path: b.py\n")


def test_snippet_lines_are_dropped_from_their_end_until_the_prompt_fits():
    prompt = code.repobench_prompt(row(), 200, len)
    assert len(prompt) <= 200
    assert "def f0(): pass\n" in prompt
    assert "def f29(): pass" not in prompt
    assert prompt.endswith("# Path: a.py\nimport b\nx = b.f()\n")
    assert code.repobench_prompt(row(), 30, len) is None


def test_contexts_keep_to_the_level_and_skip_comments():
    rows = [row(2), row(2) | {"level": "8k"}, row(2) | {"next_line": "# done"}]
    contexts = list(code.repobench_contexts(rows, "2k", random.Random(0), 1000, len))
    assert [c.next_line for c in contexts] == ["print(x)"]
