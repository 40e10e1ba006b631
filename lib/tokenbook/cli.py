"""The command `tokenbook`: data on stdout, messages on stderr, exit status 0 only for full success."""

from __future__ import annotations

import json
import os
import signal
import sys
import textwrap
from pathlib import Path
from typing import Any

import click

from tokenbook import papers, parameters
from tokenbook.cli_options import jobs_option, json_option, open_store, store_option, timeout_option
from tokenbook.cli_sweeps import results, sweep
from tokenbook.ledger_table import left_open
from tokenbook.runs import cells, console, engines, notebooks, refresh, schedule, store, table
from tokenbook.runs import doctor as machine

USAGE, INTERRUPTED = 2, 130
# Seconds on two cores, as promised to readers; shown by `list`.
BUDGETS = {"smoke": 15, "small": 120}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="tokenbook")
def cli() -> None:
    """A reproduction book: run its chapters, see what they claim, render it."""


cli.add_command(sweep)
cli.add_command(results)


def main() -> None:
    """Entry point: bad input is one sentence and exit status 2, an interrupt exit status 130."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        cli.main(standalone_mode=False)
    except (parameters.ParameterError, papers.PaperError) as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(USAGE)
    except (store.StoreError, engines.EngineError, table.ResultsError) as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("\nInterrupted: running kernels were ended, finished runs are kept.", err=True)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # `tokenbook list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


@cli.command("list")
@json_option
def list_chapters(as_json: bool) -> None:
    """Chapters, their parameters and budgets."""
    chapters = notebooks.discover()
    if as_json:
        rows = [
            {
                "chapter": chapter.slug,
                "title": chapter.title,
                "parameters": {
                    p.name: {"type": p.type, "default": p.default, "help": p.help}
                    for p in chapter.parameters.values()
                },
                "budget_seconds": BUDGETS,
            }
            for chapter in chapters
        ]
        click.echo(json.dumps(rows, indent=1))
        return
    for chapter in chapters:
        click.echo(f"{chapter.slug:<22} {chapter.title}")
        names = ", ".join(chapter.parameters)
        click.echo(textwrap.fill(names, 100, initial_indent=" " * 23, subsequent_indent=" " * 23))
    budgets = ", ".join(f"{scale} {seconds} s" for scale, seconds in BUDGETS.items())
    click.echo(f"Budget of one chapter on two cores: {budgets}.", err=True)


@cli.command()
@click.argument("chapter")
def show(chapter: str) -> None:
    """Claims and parameters of CHAPTER."""
    found = notebooks.find(chapter)
    paper, spec = papers.load(chapter, found.root), found.spec
    click.echo(f"{paper.title}\n{paper.authors} ({paper.year})\n{paper.summary}\n\nClaims")
    for claim in paper.claims:
        click.echo(f"  {claim.id:<5} {claim.statement}")
        click.echo(f"        paper: {claim.paper} ({claim.where})")
        for criterion in claim.criteria:
            click.echo(f"        wanted: {criterion.what} {criterion}")
        if claim.untested:
            click.echo(f"        untested here: {claim.untested}")
    click.echo("\nParameters")
    for p in found.parameters.values():
        default = "preset of the scale" if p.default is None else repr(p.default)
        click.echo(f"  {p.name}: {p.type} = {default}\n        {p.help}\n        takes {spec.takes(p.name)}")


@cli.command()
@click.argument("chapter")
@click.option(
    "-p", "pairs", nargs=2, multiple=True, metavar="NAME VALUE", help="Set a parameter; repeatable."
)
@store_option
@timeout_option
@click.option("--force", is_flag=True, help="Run again even if this run is done.")
def run(
    chapter: str, pairs: tuple[tuple[str, str], ...], where: str | None, timeout: float | None, force: bool
) -> None:
    """Execute CHAPTER once; prints the folder of the run."""
    found = notebooks.find(chapter)
    given = {name: found.spec.parse(name, text) for name, text in pairs}
    runs = schedule.plan(found, [given])
    target = open_store(where, found.root)
    (record,) = console.execute(runs, target, console.Options(timeout=timeout, force=force))
    click.echo(target.location(record["chapter"], record["key"]))


@cli.command()
@click.argument("chapter", required=False)
@json_option
@store_option
def claims(chapter: str | None, as_json: bool, where: str | None) -> None:
    """The ledger of the newest default runs; without one, of the committed notebook."""
    chapters = [notebooks.find(chapter)] if chapter else notebooks.discover()
    rows: list[dict[str, Any]] = []
    for found in chapters:
        entry = schedule.newest_default(open_store(where, found.root), found)
        if entry is not None:
            rows += entry["claims"]
        elif payload := cells.claims_payload(found.notebook):
            rows += payload["claims"]
        else:
            click.echo(f"{found.slug}: not executed yet; run `tokenbook run {found.slug}`", err=True)
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    for row in rows:
        measured = "-" if row["measured"] is None else f"{row['measured']:.4g} {row['unit']}".strip()
        wanted = row["threshold"] or "-"
        click.echo(
            f"{row['chapter']:<18} {row['claim']:<5} {row['verdict']:<15} {measured} (wanted {wanted})"
            + (f"; {said}" if (said := left_open(row)) else "")
        )
        click.echo(textwrap.fill(row["statement"], 100, initial_indent=" " * 25, subsequent_indent=" " * 25))


@cli.command()
@click.option("--scale", type=click.Choice(parameters.SCALES), default="small", show_default=True)
@jobs_option
@store_option
@timeout_option
def build(scale: str, jobs: int | None, where: str | None, timeout: float | None) -> None:
    """Execute what is stale, then render the book; prints the path of its first page."""
    from tokenbook import pages

    root = papers.project_root()
    given = {} if scale == "small" else {"scale": scale}
    runs = [item for found in notebooks.discover(root) for item in schedule.plan(found, [given])]
    target = open_store(where, root)
    records = console.execute(runs, target, console.Options(jobs, timeout, keep_going=True))
    folders = {
        r["chapter"]: Path(target.location(r["chapter"], r["key"])) for r in records if r["status"] == "done"
    }
    try:
        first = pages.render(root, folders)
    except (pages.RenderError, pages.PageError) as error:
        raise console.Failure(str(error)) from error
    click.echo(first)
    if len(folders) < len(records):
        raise console.Failure("the book shows the committed outputs of the chapters that failed")


@cli.command("refresh")
@click.argument("chapters", nargs=-1, metavar="[CHAPTER]...")
@jobs_option
@store_option
@timeout_option
def refresh_notebooks(
    chapters: tuple[str, ...], jobs: int | None, where: str | None, timeout: float | None
) -> None:
    """Write fresh small-scale outputs into notebooks/, executing what is stale; then the generated pages."""
    from tokenbook import pages

    root = papers.project_root()
    found = [notebooks.find(slug, root) for slug in chapters] or notebooks.discover(root)
    runs = [item for chapter in found for item in schedule.plan(chapter, [{}])]
    target = open_store(where, root)
    records = console.execute(runs, target, console.Options(jobs, timeout, keep_going=True))
    failed = [record for record in records if record["status"] != "done"]
    for chapter, record in zip(found, records, strict=True):
        if record["status"] == "done":
            executed = json.loads(target.read(chapter.slug, record["key"], store.NOTEBOOK))
            fresh = refresh.refreshed(chapter.notebook, executed, record, root)
            changed = refresh.write(chapter.path, fresh)
            click.echo(f"{'written' if changed else 'unchanged'}: notebooks/{chapter.path.name}", err=True)
    try:
        for path in pages.write(root):
            click.echo(f"written: {path}", err=True)
    except pages.PageError as error:
        raise console.Failure(str(error)) from error
    if failed:
        raise console.Failure(f"{len(failed)} chapters failed; their notebooks are as they were")


@cli.command()
def doctor() -> None:
    """What this machine has, and what follows from it."""
    for line in machine.report():
        click.echo(line)


if __name__ == "__main__":
    main()
