"""Runs of chapters: notebooks as files, executed, stored, found again.

from tokenbook import runs
frame = runs.results("pie")      # a pandas DataFrame with a row per run
"""

from typing import Any


def results(*arguments: Any, **options: Any) -> Any:
    """The runs of a chapter, or of all chapters, as a DataFrame: see `tokenbook.runs.table.results`."""
    from tokenbook.runs import table  # pandas and DuckDB are slow to import, and a kernel needs neither

    return table.results(*arguments, **options)


__all__ = ["results"]
