"""The store: finished runs, each in its folder STORE/CHAPTER/KEY/.

The store alone says what is done. A run is executed in a private scratch folder and published in one step,
its `record.json` last: a run without a readable record did not happen. Two processes that execute the same
run publish one of the two results whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenbook.runs.remote_store import RemoteStore

RECORD, NOTEBOOK = "record.json", "notebook.ipynb"
FORMAT = 1  # of record.json; a record of another format counts as absent


class StoreError(RuntimeError):
    """A store that cannot be used: one sentence for people."""


class LocalStore:
    """A store in a local folder."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder).expanduser().resolve()

    def __str__(self) -> str:
        return str(self.folder)

    def location(self, chapter: str, key: str) -> str:
        """Where the folder of a run lies, for people."""
        return str(self.folder / chapter / key)

    def check_writable(self) -> None:
        """Raise StoreError unless runs can be written; creates the folder."""
        try:
            with self.scratch("probe", "probe") as folder:
                (folder / "probe").write_bytes(b"probe")
        except OSError as error:
            raise StoreError(f"cannot write to the store {self.folder}: {error.strerror}") from error

    def record(self, chapter: str, key: str) -> dict[str, Any] | None:
        """The record of a run, done or failed; None if it is missing, cut short or of another format."""
        return read_record(self.folder / chapter / key / RECORD)

    def is_done(self, chapter: str, key: str) -> bool:
        """Whether the run has succeeded."""
        record = self.record(chapter, key)
        return record is not None and record["status"] == "done"

    def records(self, chapter: str | None = None) -> Iterator[dict[str, Any]]:
        """All readable records, of one chapter or of all."""
        for path in sorted(self.folder.glob(f"{chapter or '[!.]*'}/*/{RECORD}")):
            if (record := read_record(path)) is not None:
                yield record

    def read(self, chapter: str, key: str, name: str) -> bytes:
        """A file of a run, e.g. its `notebook.ipynb`."""
        return (self.folder / chapter / key / name).read_bytes()

    @contextlib.contextmanager
    def scratch(self, chapter: str, key: str) -> Iterator[Path]:
        """A private folder for one attempt at a run; gone afterwards unless it was published."""
        name = f"{key}.{os.getpid()}.{socket.gethostname()}.{secrets.token_hex(4)}"
        folder = self.folder / ".running" / chapter / name
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def publish(self, scratch: Path, chapter: str, key: str) -> dict[str, Any]:
        """Move a finished attempt into its place; returns the record that is now in the store.

        A run that is done stays as it is: the first success wins, and no failure replaces it.
        """
        record, target = read_record(scratch / RECORD), self.folder / chapter / key
        if record is None:
            raise StoreError(f"{scratch} holds no finished run")
        target.parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                os.rename(scratch, target)  # atomic; fails where the target has files in it
                _sync_folder(target.parent)
                return record
            except OSError:
                if not target.is_dir():
                    raise
            existing = read_record(target / RECORD)
            if existing is not None and existing["status"] == "done":
                return existing
            away = scratch.with_name(f"{scratch.name}-replaced-{secrets.token_hex(4)}")
            with contextlib.suppress(FileNotFoundError):  # somebody else has moved it away
                os.rename(target, away)
                shutil.rmtree(away, ignore_errors=True)

    def forget(self, chapter: str, key: str) -> None:
        """Remove a run, so that it is executed again."""
        shutil.rmtree(self.folder / chapter / key, ignore_errors=True)

    def sweep_scratch(self) -> None:
        """Remove what processes that are no longer alive on this machine have left half done."""
        import psutil

        for folder in self.folder.glob(".running/*/*"):
            _, owner, rest = folder.name.split(".", 2)
            if rest.rpartition(".")[0] == socket.gethostname() and not psutil.pid_exists(int(owner)):
                shutil.rmtree(folder, ignore_errors=True)


def open_store(where: Path | str) -> LocalStore | RemoteStore:
    """The store in a local folder, or behind an fsspec URL such as `s3://bucket/runs`."""
    if "://" in str(where):
        from tokenbook.runs.remote_store import RemoteStore

        return RemoteStore(str(where))
    return LocalStore(where)


def read_record(path: Path) -> dict[str, Any] | None:
    """A record file, None if it is missing, not whole or of another format."""
    try:
        return parse_record(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None


def parse_record(content: bytes) -> dict[str, Any] | None:
    """A record, None if it is not whole or of another format."""
    try:
        record = json.loads(content)
    except ValueError:
        return None
    return record if isinstance(record, dict) and record.get("format") == FORMAT else None


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write `record.json` atomically: a temporary file, flushed to the disk, renamed."""
    temporary = folder / f".{RECORD}.{secrets.token_hex(4)}"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(record, file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / RECORD)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
