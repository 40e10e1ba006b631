"""Rendering: a source tree with the executed notebooks and fresh pages, then Jupyter Book over it.

The tree in `_build/source` is synchronised, not rewritten, so that Jupyter Book reads only what changed; and
when nothing changed at all, it is not even started.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tokenbook.pages.generate import generated
from tokenbook.pages.material import gather

STAMP = ".rendered"  # in _build: the digest of what _build/html was rendered from


class RenderError(RuntimeError):
    """Jupyter Book did not render the book, or warned; the message holds what it said."""


def render(root: Path, runs: Mapping[str, Path] | None = None, output: Path | None = None) -> Path:
    """Render the book from the runs given and return the path of its first page.

    `runs` maps chapter names to run folders (`notebook.ipynb`, `record.json`); a chapter without one is
    rendered from its committed notebook. `output`: the folder that gets `_build/source` and
    `_build/html`, by default the root. Raises RenderError if Jupyter Book fails or warns, PageError for
    material that does not fit together.
    """
    root = Path(root).resolve()
    build = Path(output or root).resolve() / "_build"
    digest = stage(root, build / "source", runs)
    first, stamp = build / "html" / "index.html", build / STAMP
    if first.is_file() and stamp.is_file() and stamp.read_text() == f"{digest} {_environment(build)}":
        return first
    stamp.unlink(missing_ok=True)
    _jupyter_book(build)
    stamp.write_text(f"{digest} {_environment(build)}")
    return first


def _environment(build: Path) -> int:
    """When Sphinx last wrote its environment: `jupyter-book build .` by hand overwrites our pages."""
    pickle = build / ".doctrees" / "environment.pickle"
    return pickle.stat().st_mtime_ns if pickle.is_file() else 0


def stage(root: Path, source: Path, runs: Mapping[str, Path] | None = None) -> str:
    """Bring the source tree up to date and return the digest of all that the rendering depends on."""
    files = {"_config.yml": (root / "_config.yml").read_bytes()}
    for path in sorted((root / "book").rglob("*")):
        if path.is_file() and ".ipynb_checkpoints" not in path.parts:
            files[path.relative_to(root).as_posix()] = path.read_bytes()
    for material in gather(root, runs):
        files[f"notebooks/{material.chapter.name}.ipynb"] = material.notebook.read_bytes()
    files |= {path: text.encode() for path, text in generated(root, runs).items() if path != "README.md"}
    _synchronise(source, files)
    digest = hashlib.sha256()
    for name in ("jupyter-book", "sphinx", "myst-nb", "sphinx-book-theme"):
        digest.update(f"{name} {importlib.metadata.version(name)}\n".encode())
    for path in sorted(files):
        digest.update(f"{path} {hashlib.sha256(files[path]).hexdigest()}\n".encode())
    return digest.hexdigest()


def _synchronise(source: Path, files: dict[str, bytes]) -> None:
    """Make `source` hold exactly `files`, leaving untouched (times included) what is already right."""
    for path in sorted(source.rglob("*"), reverse=True) if source.is_dir() else []:
        if path.is_file() and path.relative_to(source).as_posix() not in files:
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    for name, content in files.items():
        path = source / name
        if not path.is_file() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def _jupyter_book(build: Path) -> None:
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build"]
    command += [str(build / "source"), "--path-output", str(build.parent), "-W", "--keep-going", "-q"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"NO_COLOR": "1"})
    if done.returncode == 0 and (build / "html" / "index.html").is_file():
        return
    # The next incremental build would not repeat the warnings of pages that it has already read.
    shutil.rmtree(build / ".doctrees", ignore_errors=True)
    raise RenderError(f"Jupyter Book stopped with exit status {done.returncode}:\n{_essence(done.stderr)}")


def _essence(stderr: str) -> str:
    """What Jupyter Book said, without the tracebacks that it adds to every error."""
    lines = [line for line in stderr.splitlines() if line.strip() and not line.startswith((" ", "Traceback"))]
    return "\n".join(dict.fromkeys(lines))
