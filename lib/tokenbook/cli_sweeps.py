"""The commands `tokenbook sweep` and `tokenbook results`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from tokenbook import papers
from tokenbook.cli_options import jobs_option, open_store, store_option, timeout_option
from tokenbook.runs import console, engines, notebooks, schedule, sweeps, table


@click.command()
@click.argument("what", metavar="CHAPTER|FILE.yml")
@click.option("-g", "grid", multiple=True, metavar="NAME=VALUES", help="Sweep a parameter; repeatable.")
@click.option("-p", "pairs", nargs=2, multiple=True, metavar="NAME VALUE", help="Fix a parameter.")
@click.option("--samples", type=click.IntRange(1), default=1, help="Draws of the random parameters.")
@click.option("--sample-seed", type=int, default=0, help="Seed of the draws.")
@click.option("--dry-run", is_flag=True, help="Only say how many runs, how many are done, how long.")
@jobs_option
@click.option("--scheduler", metavar="ADDRESS", help="Run on a Dask cluster, e.g. tcp://host:8786.")
@store_option
@timeout_option
@click.option("--retries", type=click.IntRange(0), default=0, help="Further tries of a run that fails.")
@click.option("--publish", is_flag=True, help="Write the results beside FILE.yml, and their page.")
def sweep(
    what: str,
    grid: tuple,
    pairs: tuple,
    samples: int,
    sample_seed: int,
    dry_run: bool,
    where: str | None,
    publish: bool,
    **how: Any,
) -> None:
    """Execute a chapter for all combinations of parameters.

    VALUES: 0,1,2 | 0:10 | lin:0:1:5 | log:1e-4:1e-1:4 | random:0:1 | lograndom:1e-4:1e-1. A FILE.yml under
    book/sweeps/ names chapter, grid and what to plot. Prints the folder of the store.
    """
    if how["jobs"] and how["scheduler"]:
        raise click.UsageError("--jobs is for this machine; with --scheduler the workers' threads decide")
    is_file = what.endswith((".yml", ".yaml"))
    if publish and not is_file:
        raise click.UsageError("--publish goes with a FILE.yml, which says what to show")
    if is_file:
        if grid or pairs:
            raise click.UsageError("a sweep's file holds its parameters: -g and -p go with a CHAPTER")
        specification = sweeps.load(Path(what))
    else:
        spec = notebooks.find(what).spec
        fixed = {name: spec.parse(name, text) for name, text in pairs}
        specification = sweeps.from_options(what, grid, fixed, samples=samples, sample_seed=sample_seed)
    found = notebooks.find(specification.chapter)
    given = specification.given(found.spec)
    if how["scheduler"]:
        cluster = engines.DaskEngine(how["scheduler"])
        runs = schedule.plan(found, given, cluster.device_kind)
        cluster.shutdown()
    else:
        runs = schedule.plan(found, given)
    target = open_store(where, found.root)
    if dry_run:
        console.preview(runs, target, how["jobs"])
        return
    records = console.execute(runs, target, console.Options(**how))
    if publish:
        _publish(Path(what), specification, runs, table.to_frame(records, target), found.root)
    click.echo(str(target))


def _publish(
    path: Path, specification: sweeps.Sweep, runs: list[schedule.Run], frame: Any, root: Path
) -> None:
    """Keep what the book shows of a sweep: a small Parquet file, its page, its figure."""
    from tokenbook import pages
    from tokenbook.pages import sweeps as sweep_pages

    given = {run.key: json.dumps(run.given, sort_keys=True) for run in runs}
    try:
        target = sweep_pages.publish(path, specification, frame.assign(given=frame["key"].map(given)))
        for name in [target, *pages.write(root)]:
            click.echo(f"written: {name}", err=True)
    except pages.PageError as error:
        raise console.Failure(str(error)) from error


@click.command()
@click.argument("chapter", required=False)
@click.option("--sql", metavar="QUERY", default="select * from runs", help="Over the table `runs`.")
@click.option("--csv", is_flag=False, flag_value="-", metavar="FILE", help="As CSV; without FILE on stdout.")
@click.option("--parquet", metavar="FILE", help="As Parquet.")
@store_option
def results(chapter: str | None, sql: str, csv: str | None, parquet: str | None, where: str | None) -> None:
    """The runs of CHAPTER (of all) as a table: parameters, measurements, verdicts, a row per run."""
    if chapter:
        notebooks.find(chapter)
    frame = table.results(chapter, open_store(where, papers.project_root()), sql)
    if csv == "-":
        click.echo(frame.to_csv(index=False), nl=False)
    elif csv:
        frame.to_csv(csv, index=False)
    if parquet:
        frame.to_parquet(parquet, index=False)
    if not (csv or parquet):
        click.echo(frame.to_string(index=False, max_colwidth=60) if len(frame) else "no runs")
