"""The results of many runs as one table: a row per run, ready for pandas, seaborn and SQL.

Columns: chapter, key, status, seconds, ..., every parameter under its name, every further measurement under
its name (`NAME_low`, `NAME_high`: its interval), every criterion of a claim as `p6_kl` (claim P6, criterion
kl; with `_low`, `_high`, `_control`, `_control_low` and `_control_high`), every verdict as `p6_verdict`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tokenbook import papers
from tokenbook.runs import store as stores

if TYPE_CHECKING:
    import pandas

FACTS = ("chapter", "key", "status", "seconds", "peak_memory_mib", "started", "finished", "git_commit")


class ResultsError(ValueError):
    """A query that DuckDB refuses; the message is its own."""


def results(chapter: str | None = None, store: Any = None, sql: str | None = None) -> pandas.DataFrame:
    """The runs of a chapter (of all chapters) as a DataFrame; `sql` queries them as the table `runs`.

    `store`: a folder, an fsspec URL or an opened store, by default `runs/` in the project. Failed runs are
    rows too, with `status`, `error` and `cell`. Raises ResultsError for a query that fails.
    """
    where = store if hasattr(store, "records") else stores.open_store(store or papers.project_root() / "runs")
    frame = to_frame(where.records(chapter), where)
    return frame if sql is None else query(frame, sql)


def to_frame(records: Iterable[dict[str, Any]], where: Any) -> pandas.DataFrame:
    """Records as a DataFrame, oldest run first."""
    import pandas

    rows = [flatten(record) | {"notebook": _notebook(where, record)} for record in records]
    frame = pandas.DataFrame(
        rows or {name: [] for name in (*FACTS, "error", "cell", "device_kind", "notebook")}
    )
    return frame.sort_values(["started", "key"], ignore_index=True)


def query(frame: pandas.DataFrame, sql: str) -> pandas.DataFrame:
    """The answer of DuckDB to a query over the table `runs`."""
    import duckdb

    with duckdb.connect() as connection:
        connection.execute("set python_enable_replacements = false")
        connection.register("runs", frame)
        try:
            return connection.execute(sql).df()
        except duckdb.Error as error:
            raise ResultsError(str(error)) from error


def flatten(record: dict[str, Any]) -> dict[str, Any]:
    """One record as a flat row; a parameter that is named like a fact takes its column."""
    row = {name: record.get(name) for name in FACTS}
    error = record.get("error") or {}
    row |= {"error": error.get("reason"), "cell": error.get("cell")}
    row["device_kind"] = record["device"]["kind"]
    for name, measured in record["measurements"].items():
        row[name] = measured["value"]
        if measured["interval"] is not None:
            row[f"{name}_low"], row[f"{name}_high"] = measured["interval"]
    for claim in record["claims"]:
        prefix = claim["claim"].lower()
        row[f"{prefix}_verdict"] = claim["verdict"]
        for criterion in claim.get("criteria", []):
            column = f"{prefix}_{criterion['id']}"
            row[column] = criterion["measured"]
            if criterion["interval"] is not None:
                row[f"{column}_low"], row[f"{column}_high"] = criterion["interval"]
            if criterion["control"] is not None:
                row[f"{column}_control"] = criterion["control"]
            if criterion.get("control_interval") is not None:
                low, high = criterion["control_interval"]
                row[f"{column}_control_low"], row[f"{column}_control_high"] = low, high
    return row | record["parameters"]


def _notebook(where: Any, record: dict[str, Any]) -> str:
    return f"{where.location(record['chapter'], record['key'])}/{stores.NOTEBOOK}"
