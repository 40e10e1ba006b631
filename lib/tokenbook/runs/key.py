"""The key of a run: a hash of everything that its result depends on.

The notebook's code cells, the resolved parameters, the source of the library modules that the notebook
imports (followed through their own imports, so that a new kernel leaves unrelated chapters alone), the paper
file, the lock file and the kind of device.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from IPython.core.inputtransformer2 import TransformerManager

import tokenbook
from tokenbook.runs import cells, notebooks

PACKAGE = "tokenbook"


def fingerprint(chapter: notebooks.Chapter) -> str:
    """Hash of what all runs of a chapter share: code cells, library, paper file, lock."""
    sources = cells.code_sources(chapter.notebook)
    modules = imported_modules("\n".join(map(_without_magics, sources)), library_folder(chapter.root))
    parts = [
        ("cells", sources),
        ("library", [(name, _digest(path)) for name, path in sorted(modules.items())]),
        ("paper", _digest(chapter.root / "book" / "papers" / f"{chapter.slug}.toml")),
        ("lock", _digest(chapter.root / "requirements.lock")),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def run_key(fingerprint: str, parameters: dict[str, Any], device_kind: str) -> str:
    """Key of one run, 20 hexadecimal digits."""
    parts = json.dumps([fingerprint, parameters, device_kind], sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()[:20]


def library_folder(root: Path) -> Path:
    """The package's source: the project's own `lib/`, else the installed package."""
    own = root / "lib" / PACKAGE
    return own if own.is_dir() else Path(tokenbook.__file__).parent


def imported_modules(source: str, library: Path) -> dict[str, Path]:
    """Modules of the library that `source` imports, directly or through others: dotted name -> file."""
    found: dict[str, Path] = {}
    waiting = _imports(source, PACKAGE, library)
    while waiting:
        name = waiting.pop()
        path = _file_of(name, library)
        if name in found or path is None:
            continue
        found[name] = path
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        waiting |= _module_imports(path, package, library, path.stat().st_mtime_ns)
    return found


@functools.lru_cache(maxsize=1024)
def _module_imports(path: Path, package: str, library: Path, changed: int) -> frozenset[str]:
    """Imports of a file of the library; `changed` makes the cache forget an edited file."""
    return frozenset(_imports(path.read_text("utf-8"), package, library))


def _imports(source: str, package: str, library: Path) -> set[str]:
    """Dotted names of the library that a source imports anywhere in it, with their parent packages."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= _from_import(node, package, library)
    inside = {name for name in names if name.split(".")[0] == PACKAGE}
    return inside | {".".join(name.split(".")[:n]) for name in inside for n in range(1, name.count(".") + 1)}


def _from_import(node: ast.ImportFrom, package: str, library: Path) -> set[str]:
    base = node.module or ""
    if node.level:
        parent = package.split(".")[: len(package.split(".")) - node.level + 1]
        base = ".".join([*parent, base] if base else parent)
    if base.split(".")[0] != PACKAGE:
        return set()
    names = {base}
    for alias in node.names:
        inner = f"{base}.{alias.name}"
        if _file_of(inner, library) is not None:
            names.add(inner)
        elif alias.name == "*" or _is_lazy(alias.name, base, library):
            # A name that the package makes at run time may come from any of its modules.
            names |= {f"{base}.{path.stem}" for path in _folder(base, library).glob("*.py")}
    return names - {f"{base}.__init__"}


def _is_lazy(name: str, module: str, library: Path) -> bool:
    path = _file_of(module, library)
    if path is None or path.name != "__init__.py":
        return False
    return (
        not re.search(rf"\b{re.escape(name)}\b", path.read_text("utf-8")) or "__getattr__" in path.read_text()
    )


def _folder(module: str, library: Path) -> Path:
    return library.joinpath(*module.split(".")[1:])


def _file_of(module: str, library: Path) -> Path | None:
    folder = _folder(module, library)
    if (folder / "__init__.py").is_file():
        return folder / "__init__.py"
    file = folder.with_suffix(".py")
    return file if file.is_file() and folder != library else None


def _without_magics(source: str) -> str:
    """One cell as plain Python: IPython's own reading of `%magics` and `!commands`.

    A line that begins with `%` may as well go on with a remainder from the line before. Of a cell magic
    (`%%time`) only the first line is dropped: the imports below it count.
    """
    body = source.partition("\n")[2] if source.startswith("%%") else source
    return TransformerManager().transform_cell(body)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
