"""Molecules from files: .xyz (also QM9's own dialect) and the .lmdb archives of Uni-3DAR.

Every molecule is a dictionary with `atom_type` (element symbols) and `atom_pos` ([x, y, z] in angstrom): the
names of the archives.

Rows with these columns in .jsonl, .parquet or on the hub are read by `tokenbook.hub.load_rows`.
Only the chapter `uni-3dar` (2503.16278) uses it; it stays here because reading files, and refusing pickles
that run something, is no part of its method, and a library would read one of the two formats only.
"""

import gzip
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What a pickled numpy array names, in numpy 1 and 2.
_ARRAYS = {"ndarray", "dtype", "_reconstruct", "_frombuffer", "scalar"}


class MoleculeFileError(ValueError):
    """A file of molecules that cannot be read; the message says which and why."""


def read_molecules(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the molecules of an .xyz or .lmdb file.

    Raises MoleculeFileError for another suffix, a file that is not there or broken, a missing `lmdb` package,
    and a pickle that names anything but numbers, texts and arrays (it is not run).
    """
    path, readers = Path(path), {".xyz": _xyz_rows, ".lmdb": _lmdb_rows}
    if path.suffix not in readers:
        raise MoleculeFileError(f"a file of molecules must end in .xyz or .lmdb, got {path.name}")
    if not path.exists():
        raise MoleculeFileError(f"there is no file {path.name}")
    return readers[path.suffix](path)


def unpickle_plain(data: bytes) -> Any:
    """The object of a pickle that holds numbers, texts, containers and numpy arrays only."""
    try:
        return _PlainUnpickler(io.BytesIO(data)).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError) as error:
        raise MoleculeFileError(f"a pickled molecule cannot be read: {error}") from error


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if module.split(".")[0] == "numpy" and name in _ARRAYS:
            return super().find_class(module, name)
        raise MoleculeFileError(f"a pickled molecule must hold plain data, this one names {module}.{name}")


def _xyz_rows(path: Path) -> Iterator[dict[str, Any]]:
    lines, at = path.read_text("utf-8").splitlines(), 0
    while at < len(lines):
        if not lines[at].strip().isdigit():  # QM9 puts frequencies, SMILES and InChI behind the atoms
            at += 1
            continue
        n_atoms = int(lines[at])
        atoms = [line.replace("*^", "e").split() for line in lines[at + 2 : at + 2 + n_atoms]]
        try:
            positions = [[float(x) for x in (a[1], a[2], a[3])] for a in atoms]
        except (ValueError, IndexError) as error:
            raise MoleculeFileError(f"{path.name} line {at + 1}: an atom reads `symbol x y z`") from error
        if len(atoms) < n_atoms:
            raise MoleculeFileError(
                f"{path.name} line {at + 1}: {n_atoms} atoms announced, {len(atoms)} there"
            )
        yield {"atom_type": [a[0] for a in atoms], "atom_pos": positions}
        at += 2 + n_atoms


def _lmdb_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Each value is the gzip of a pickled dictionary."""
    try:
        import lmdb
    except ImportError:
        raise MoleculeFileError(f"{path.name} needs the package lmdb: install it, or use .jsonl") from None
    with lmdb.open(str(path), subdir=False, readonly=True, lock=False) as store, store.begin() as reader:
        for _, value in reader.cursor():
            yield unpickle_plain(gzip.decompress(value))
