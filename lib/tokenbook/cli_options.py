"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tokenbook.runs import store

store_option = click.option(
    "--store",
    "where",
    metavar="FOLDER|URL",
    help="Where finished runs lie: a folder or an fsspec URL [default: runs/ in the project].",
)
jobs_option = click.option("--jobs", type=click.IntRange(1), help="Runs at once [default: one per core].")
timeout_option = click.option(
    "--timeout",
    type=click.FloatRange(0),
    help="Seconds after which a run is ended; 0: never [default: by scale].",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Machine-readable, on stdout.")


def open_store(where: str | None, root: Path) -> Any:
    """The store that a command works on."""
    return store.open_store(where or root / "runs")
