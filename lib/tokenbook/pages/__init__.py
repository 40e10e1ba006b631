"""The pages of the book that are written by a program, and the book's rendering.

    write(root)                  the committed pages, from committed material: `python -m tokenbook.pages`
    stale(root)                  which of them are not current; a test holds this list empty
    render(root, runs, output)   a whole book from the newest runs: what `tokenbook build` calls

All generated pages are plain Markdown: no directive, nothing that only one version of Jupyter Book knows.
"""

from tokenbook.pages.contents import PageError, chapters, toc
from tokenbook.pages.generate import generated, stale, write
from tokenbook.pages.rendering import RenderError, render

__all__ = ["PageError", "RenderError", "chapters", "generated", "render", "stale", "toc", "write"]
