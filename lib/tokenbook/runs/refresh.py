"""Fresh outputs for the committed notebooks, without anything that only the run or the machine knows."""

from __future__ import annotations

import copy
import json
import os
import re
import sys
import sysconfig
from pathlib import Path
from typing import Any

from tokenbook.runs import cells

# What of a run's record a committed notebook keeps, for the status page.
KEPT = (
    "key", "status", "parameters", "started", "finished", "seconds", "phases", "peak_memory_mib",
    "versions", "device", "git_commit",
)  # fmt: skip


class RefreshError(ValueError):
    """An executed notebook that does not fit the source that it was made from."""


def refreshed(
    source: dict[str, Any], executed: dict[str, Any], record: dict[str, Any], root: Path
) -> dict[str, Any]:
    """The source notebook with the outputs of an execution of it.

    Cells, ids and metadata stay the source's own; execution counts run from 1; machine paths are replaced.
    Raises RefreshError if the code cells of the two differ.
    """
    fresh = copy.deepcopy(source)
    ran = [c for c in executed["cells"] if "injected-parameters" not in c["metadata"].get("tags", [])]
    ran = [c for c in ran if c["cell_type"] == "code"]
    own = [c for c in fresh["cells"] if c["cell_type"] == "code"]
    if [cells.text_of(c["source"]) for c in ran] != [cells.text_of(c["source"]) for c in own]:
        raise RefreshError(
            f"{record['chapter']}: the notebook has changed since it was executed; run it again"
        )
    clean = _Cleaner(root)
    count = 0
    for cell, done in zip(own, ran, strict=True):
        cell["metadata"].pop("papermill", None)
        if done.get("execution_count") is not None:
            count += 1
        cell["execution_count"] = count if done.get("execution_count") is not None else None
        cell["outputs"] = clean(copy.deepcopy(done["outputs"]))
        for output in cell["outputs"]:
            output.pop("transient", None)
            if "execution_count" in output:
                output["execution_count"] = cell["execution_count"]
    fresh["metadata"].pop("papermill", None)
    fresh["metadata"]["tokenbook"] = {name: record[name] for name in KEPT}
    return fresh


class _Cleaner:
    """Replaces what differs from machine to machine and from run to run in texts of any depth."""

    def __init__(self, root: Path):
        packages = sysconfig.get_paths()["purelib"]
        paths = {str(root): ".", packages: "site-packages", sys.prefix: "python", sys.base_prefix: "python"}
        paths[os.path.expanduser("~")] = "~"
        self.paths = sorted(paths.items(), key=lambda pair: -len(pair[0]))

    def __call__(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: item if key == "image/png" else self(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self(item) for item in value]
        return self.text(value) if isinstance(value, str) else value

    def text(self, text: str) -> str:
        """One text, cleaned."""
        for path, name in self.paths:
            text = re.sub(rf"{re.escape(path)}(?=[/\s:'\"]|$)", name, text)
        text = re.sub(r"/\S*?/ipykernel_\d+/\d+\.py", "<cell>", text)
        return re.sub(r"\bat 0x[0-9a-f]{6,}", "at 0x...", text)


def write(path: Path, notebook: dict[str, Any]) -> bool:
    """Write a notebook as Jupyter does; returns whether the file has changed."""
    text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    if path.is_file() and path.read_text("utf-8") == text:
        return False
    path.write_text(text, "utf-8")
    return True
