"""What `record.json` says about a run."""

from __future__ import annotations

import datetime
import math
import platform
import subprocess
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from tokenbook.runs import cells, device, store

PACKAGES = (
    "tokenbook", "torch", "triton", "transformers", "tokenizers", "datasets", "numpy", "scipy",
    "scikit-learn", "pandas", "seaborn", "papermill", "nbclient", "ipykernel",
)  # fmt: skip


def now() -> str:
    """The time, UTC, to the millisecond."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a chapter builds on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # optional, or not for this system
    return found


def git_commit(root: Path) -> str | None:
    """The commit of the project, with `-dirty` if tracked files differ from it; None outside a clone."""
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}-dirty" if changed else head


def build(
    request: dict[str, Any], started: str, seconds: float, error: dict[str, Any] | None
) -> dict[str, Any]:
    """A record without results: what was asked for, when and on what it ran, and what went wrong."""
    return {
        "format": store.FORMAT,
        "chapter": request["chapter"],
        "key": request["key"],
        "status": "failed" if error else "done",
        "error": error,
        "parameters": request["parameters"],
        "given": request["given"],
        "started": started,
        "finished": now(),
        "seconds": round(seconds, 3),
        "phases": {},
        "peak_memory_mib": None,
        "claims": [],
        "measurements": {},
        "backends": {},
        "versions": versions(),
        "device": {
            **device.describe(request["parameters"].get("device", "auto")),
            "threads": request["threads"],
        },
        "git_commit": request["git_commit"],
    }


def add_results(record: dict[str, Any], notebook: dict[str, Any]) -> None:
    """Lift phases, claims, measurements and backends from the executed notebook into the record."""
    record["phases"] = phases(notebook)
    payload = cells.claims_payload(notebook) or {}
    for name in ("claims", "measurements", "backends"):
        if payload.get(name):
            record[name] = finite(payload[name])


def phases(notebook: dict[str, Any]) -> dict[str, float]:
    """Seconds per `##` section, from papermill's times of the cells."""
    found: dict[str, float] = {}
    for cell, section in zip(notebook["cells"], cells.sections(notebook), strict=True):
        if cell["cell_type"] == "code":
            seconds = cell["metadata"].get("papermill", {}).get("duration") or 0.0
            found[section] = round(found.get(section, 0.0) + seconds, 3)
    return found


def finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
