"""Committed notebooks carry outputs, and nothing of the run or the machine that made them."""

import json

import pytest

from tokenbook.runs import refresh, schedule, supervise

pytestmark = pytest.mark.usefixtures("warm_light")

BODY = """
import os, sys, warnings
print(os.getcwd() + "/notebooks", sys.prefix, object())
warnings.warn("careful")
P.n
"""


def refreshed(project, chapter):
    runs = schedule.plan(chapter, [{}])
    (job,) = schedule.jobs_of(runs, str(project.store), threads=1, timeout=60, is_warm=True)
    record = supervise.execute(job)
    executed = json.loads(project.store.read(chapter.slug, record["key"], "notebook.ipynb"))
    return refresh.refreshed(chapter.notebook, executed, record, project.root)


def test_outputs_are_fresh_and_nothing_else_has_changed(project):
    chapter = project.chapter(body=BODY)
    fresh = refreshed(project, chapter)
    source = json.loads(chapter.path.read_text())
    assert [c["source"] for c in fresh["cells"]] == [c["source"] for c in source["cells"]]
    assert [c["id"] for c in fresh["cells"]] == [c["id"] for c in source["cells"]]
    assert [c["metadata"] for c in fresh["cells"]] == [c["metadata"] for c in source["cells"]]
    counts = [c["execution_count"] for c in fresh["cells"] if c["cell_type"] == "code"]
    assert counts == [1, 2, 3, 4, 5, None]  # the last cell is empty
    text = json.dumps(fresh)
    assert str(project.root) not in text
    assert "/tmp/" not in text
    assert "papermill" not in text.replace('"papermill": "', "")  # but for its version
    assert "./notebooks" in text
    assert "<cell>:3: UserWarning: careful" in text
    assert "object object at 0x..." in text


def test_provenance_is_kept_for_the_status_page(project):
    facts = refreshed(project, project.chapter())["metadata"]["tokenbook"]
    assert facts["status"] == "done"
    assert facts["seconds"] > 0
    assert facts["versions"]["python"]
    assert "claims" not in facts


def test_refreshing_twice_changes_no_output_and_no_line_of_code(project):
    chapter = project.chapter(body=BODY)
    refresh.write(chapter.path, refreshed(project, chapter))
    again = schedule.Chapter(chapter.slug, chapter.path)
    assert schedule.plan(again, [{}])[0].key == schedule.plan(chapter, [{}])[0].key
    assert refresh.write(chapter.path, refreshed(project, again)) is False


def test_a_notebook_edited_after_its_run_is_not_given_its_outputs(project):
    chapter = project.chapter()
    executed = json.loads(project.chapter(slug="other", body="print(2)").path.read_text())
    record = dict.fromkeys(refresh.KEPT) | {"chapter": "demo"}
    with pytest.raises(refresh.RefreshError, match="has changed since it was executed"):
        refresh.refreshed(chapter.notebook, executed, record, project.root)
