"""`python -m tokenbook.pages [--check]`: write the generated pages, or only say which are not current."""

from __future__ import annotations

import sys

import click

from tokenbook.pages import PageError, stale, write
from tokenbook.papers import PaperError, project_root


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; exit status 1 if a page is not current.")
def main(check: bool) -> None:
    """Write the table of contents, the scoreboard, the status and kernel pages from committed material."""
    try:
        root = project_root()
        changed = stale(root) if check else write(root)
    except (PageError, PaperError) as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)
    for path in changed:
        click.echo(f"{'not current' if check else 'written'}: {path}", err=True)
    sys.exit(1 if check and changed else 0)


if __name__ == "__main__":
    main()
