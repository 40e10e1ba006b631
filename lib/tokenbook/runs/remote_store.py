"""A store behind an fsspec URL, e.g. `s3://bucket/runs`.

Object stores rename nothing and lock nothing. A run's files are uploaded under a claim (an object that only
one writer can create), `record.json` last; a reader takes a run for done only by its record.
"""

from __future__ import annotations

import contextlib
import secrets
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from tokenbook.runs.store import RECORD, StoreError, parse_record, read_record

CLAIM = ".publishing"
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss"}
PATIENCE_SECONDS = 120.0  # after which a claim is taken for a dead writer's


class RemoteStore:
    """A store on any file system that fsspec knows."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        try:
            self.fs, self.path = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise StoreError(f"cannot open the store {url}: {error}") from error

    def __str__(self) -> str:
        return self.url

    def location(self, chapter: str, key: str) -> str:
        """Where the folder of a run lies, for people."""
        return f"{self.url}/{chapter}/{key}"

    def check_writable(self) -> None:
        """Raise StoreError unless objects can be written."""
        probe = f"{self.path}/.running/{secrets.token_hex(8)}"
        try:
            self._make_folder(f"{self.path}/.running")
            self.fs.pipe_file(probe, b"probe")
            self.fs.rm_file(probe)
        except Exception as error:  # every backend has its own
            raise StoreError(f"cannot write to the store {self.url}: {_sentence(error)}") from error

    def record(self, chapter: str, key: str) -> dict[str, Any] | None:
        """The record of a run, done or failed; None if it is missing, cut short or of another format."""
        self.fs.invalidate_cache()
        try:
            return parse_record(self.fs.cat_file(f"{self.path}/{chapter}/{key}/{RECORD}"))
        except FileNotFoundError:
            return None

    def is_done(self, chapter: str, key: str) -> bool:
        """Whether the run has succeeded."""
        record = self.record(chapter, key)
        return record is not None and record["status"] == "done"

    def records(self, chapter: str | None = None) -> Iterator[dict[str, Any]]:
        """All readable records, of one chapter or of all."""
        self.fs.invalidate_cache()
        paths = sorted(self.fs.glob(f"{self.path}/{chapter or '*'}/*/{RECORD}"))
        contents = (
            self.fs.cat(paths, on_error="omit") if len(paths) > 1 else {p: self.fs.cat_file(p) for p in paths}
        )
        for path in paths:
            if (record := parse_record(contents.get(path, b""))) is not None:
                yield record

    def read(self, chapter: str, key: str, name: str) -> bytes:
        """A file of a run, e.g. its `notebook.ipynb`."""
        return self.fs.cat_file(f"{self.path}/{chapter}/{key}/{name}")

    @contextlib.contextmanager
    def scratch(self, chapter: str, key: str) -> Iterator[Path]:
        """A private local folder for one attempt at a run."""
        with tempfile.TemporaryDirectory(
            prefix=f"tokenbook-{chapter}-", ignore_cleanup_errors=True
        ) as folder:
            yield Path(folder)

    def publish(self, scratch: Path, chapter: str, key: str) -> dict[str, Any]:
        """Upload a finished attempt, its record last; returns the record that is now in the store."""
        record, target = read_record(scratch / RECORD), f"{self.path}/{chapter}/{key}"
        if record is None:
            raise StoreError(f"{scratch} holds no finished run")
        claim = self._claim(target)
        try:
            existing = self.record(chapter, key)
            if existing is not None and existing["status"] == "done":
                return existing
            if existing is not None:
                self.fs.rm_file(f"{target}/{RECORD}")  # from here on the failed attempt did not happen
            for path in sorted(scratch.rglob("*")):
                if path.is_file() and path.name != RECORD and not path.name.startswith("."):
                    self.fs.pipe_file(f"{target}/{path.relative_to(scratch).as_posix()}", path.read_bytes())
            self.fs.pipe_file(f"{target}/{RECORD}", (scratch / RECORD).read_bytes())
            return record
        finally:
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm_file(claim)

    def _claim(self, target: str) -> str:
        """Wait until this writer alone may write the run's folder."""
        claim, deadline = f"{target}/{CLAIM}", time.monotonic() + PATIENCE_SECONDS
        self._make_folder(target)
        while True:
            try:
                self.fs.pipe_file(claim, secrets.token_bytes(8), mode="create")
                return claim
            except FileExistsError:
                if time.monotonic() > deadline:
                    with contextlib.suppress(FileNotFoundError):
                        self.fs.rm_file(claim)
                time.sleep(0.1)

    def _make_folder(self, path: str) -> None:
        """Object stores need no folders; there `makedirs` would create a bucket that nobody asked for."""
        protocols = {self.fs.protocol} if isinstance(self.fs.protocol, str) else set(self.fs.protocol)
        if not protocols & OBJECT_STORES:
            self.fs.makedirs(path, exist_ok=True)

    def forget(self, chapter: str, key: str) -> None:
        """Remove a run, so that it is executed again: its record first."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(f"{self.path}/{chapter}/{key}/{RECORD}")
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm(f"{self.path}/{chapter}/{key}", recursive=True)

    def sweep_scratch(self) -> None:
        """Nothing is left in the store: scratch folders are local, in the system's temporary folder."""


def _sentence(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
