"""The process of one run: papermill over one notebook in a scratch folder, judged by what really ran.

    python -m tokenbook.runs.execute SCRATCH

reads SCRATCH/request.json, leaves the executed notebook and, last, `record.json`. Papermill's own metadata is
not believed: a kernel that dies leaves a notebook in which every cell says `completed`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import nbformat
import papermill
import psutil
from jupyter_client.asynchronous import AsyncKernelClient
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from papermill.engines import NBClientEngine, papermill_engines
from traitlets import Type

from tokenbook.runs import cells, record, store, warm

EVENTS, REQUEST, SOURCE = "events.jsonl", "request.json", "source.ipynb"
MAX_PRINTED = 1_000_000  # characters of one cell's stream that are kept
ANSI = re.compile(r"\x1b\[[0-9;]*m")


class Journal:
    """What the supervisor is told while the run goes on: the kernel's process, the cell that has begun."""

    def __init__(self, path: Path):
        self.path, self.cell, self.section = path, None, None

    def write(self, **event: Any) -> None:
        """Append one event as a line."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")


class RunKernelClient(AsyncKernelClient):
    """Knows a kernel as ready once it is idle; jupyter_client then waits 0.2 s for what might still come."""

    async def _async_wait_for_ready(self, timeout: float | None = None) -> None:
        channel, is_idle = self.iopub_channel, False
        receive = channel.get_msg

        async def receive_until_idle(timeout: float | None = None) -> dict[str, Any]:
            nonlocal is_idle
            if is_idle:
                raise queue.Empty
            message = await receive(timeout=timeout)
            is_idle = message["content"].get("execution_state") == "idle"
            return message

        channel.get_msg = receive_until_idle
        try:
            await super()._async_wait_for_ready(timeout=timeout)
        finally:
            channel.get_msg = receive

    wait_for_ready = _async_wait_for_ready


class RunKernelManager(AsyncKernelManager):
    """Tells the journal which process the kernel is; remembers how much memory it took and how it ended."""

    client_factory = Type(RunKernelClient, klass=AsyncKernelClient)
    journal: Journal | None = None
    current: RunKernelManager | None = None
    exit_status: int | None = None
    peak_bytes = 0

    async def _async_post_start_kernel(self, **kw: Any) -> None:
        await super()._async_post_start_kernel(**kw)
        type(self).current = self
        self.journal.write(kernel=self.provisioner.pid, started=time.time())

    async def _async_is_alive(self) -> bool:
        process = self.provisioner and self.provisioner.process
        alive = await super()._async_is_alive()
        if not alive and process and type(self).exit_status is None:
            type(self).exit_status = process.returncode
        return alive

    is_alive = _async_is_alive

    async def _async_shutdown_kernel(self, now: bool = False, restart: bool = False) -> None:
        self.measure_memory()
        await super()._async_shutdown_kernel(now=now, restart=restart)

    shutdown_kernel = _async_shutdown_kernel

    async def _async_finish_shutdown(self, *args: Any, **kwargs: Any) -> None:
        await super()._async_finish_shutdown(*args, **{"pollinterval": 0.01, **kwargs})

    finish_shutdown = _async_finish_shutdown

    def measure_memory(self) -> None:
        """Peak resident memory of the kernel's process so far."""
        with contextlib.suppress(OSError):  # it has ended, or there is no /proc
            status = Path(f"/proc/{self.provisioner.pid}/status").read_text()
            if found := re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE):
                type(self).peak_bytes = max(type(self).peak_bytes, int(found.group(1)) * 1024)


class RunEngine(NBClientEngine):
    """Papermill's own engine, except that saving between cells takes at most a tenth of the time.

    Papermill validates and writes the whole notebook twice per cell: seconds, where there are many figures.
    """

    @classmethod
    def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **kwargs: Any) -> Any:
        """Execute with `nb_man.save` held back; papermill saves once more at the end, whatever happens."""
        save, last, cost = nb_man.save, time.monotonic(), 0.0

        def rarely(**kw: Any) -> None:
            nonlocal last, cost
            start = time.monotonic()
            if start - last > 10 * cost:
                save(**kw)
                last = time.monotonic()
                cost = last - start

        nb_man.save = rarely
        try:
            return super().execute_managed_notebook(nb_man, kernel_name, **kwargs)
        finally:
            nb_man.save = save


def main(folder: str) -> int:
    """Execute the run of a scratch folder; exit status 0 exactly if it succeeded."""
    scratch = Path(folder)
    request = json.loads((scratch / REQUEST).read_text("utf-8"))
    if not warm.is_forked():
        threading.Thread(target=_end_with, args=(request["supervisor"],), daemon=True).start()
    journal = Journal(scratch / EVENTS)
    started, clock = record.now(), time.perf_counter()
    error = _execute(request, scratch, journal)
    notebook = _read(scratch / store.NOTEBOOK)
    error = error or _judge(notebook)
    entry = record.build(request, started, time.perf_counter() - clock, error)
    entry["peak_memory_mib"] = round(RunKernelManager.peak_bytes / 2**20, 1) or None
    if notebook is not None:
        record.add_results(entry, notebook)
    store.write_record(scratch, entry)
    return 0 if error is None else 1


def _execute(request: dict[str, Any], scratch: Path, journal: Journal) -> dict[str, Any] | None:
    """Run papermill; returns what went wrong."""
    logging.getLogger("papermill").setLevel(logging.ERROR)
    logging.getLogger("traitlets").setLevel(logging.ERROR)
    source = json.loads((scratch / SOURCE).read_text("utf-8"))
    where = cells.sections(source)
    tags = [cell["metadata"].get("tags", []) for cell in source["cells"]]
    # papermill puts the given parameters into a cell of their own behind the tagged one
    tagged = next((i for i, of_cell in enumerate(tags) if "parameters" in of_cell), None)
    if request["given"] and tagged is not None:
        where.insert(tagged + 1, where[tagged])

    def on_cell_start(cell: Any, cell_index: int) -> None:
        if cell.cell_type == "code":
            RunKernelManager.current.measure_memory()
            journal.cell, journal.section = cell_index + 1, where[cell_index]
            journal.write(cell=cell_index + 1, of=len(where), section=where[cell_index])

    papermill_engines.register("tokenbook", RunEngine)
    RunKernelManager.journal = journal
    os.environ["JUPYTER_DEFAULT_PROVISIONER_NAME"] = request["provisioner"]
    os.environ.update(request["env"])
    os.chdir(scratch)  # papermill writes both names into the notebook's metadata: no machine's paths there
    try:
        papermill.execute_notebook(
            SOURCE,
            store.NOTEBOOK,
            parameters=request["given"] or None,
            engine_name="tokenbook",
            progress_bar=False,
            cwd=request["cwd"],
            kernel_name="python3",
            kernel_manager_class=RunKernelManager,
            on_cell_start=on_cell_start,
            on_cell_executed=_tidy_streams,
        )
    except papermill.PapermillExecutionError as error:
        traceback = ANSI.sub("", "\n".join(error.traceback))
        return _error(journal, f"{error.ename}: {error.evalue}", traceback)
    except DeadKernelError:
        return _error(journal, f"the kernel died: {_how(RunKernelManager.exit_status)}")
    except OSError as error:
        return _error(journal, f"{type(error).__name__}: {error}")
    return None


def _tidy_streams(cell: Any, **_: Any) -> None:
    """Join what a cell has printed, and keep only the ends of what it has printed by the megabyte.

    nbclient's own `coalesce_streams` takes quadratic time on long lines: minutes for one megabyte.
    """
    tidy: list[Any] = []
    for output in cell.get("outputs", []):
        is_stream = output["output_type"] == "stream"
        if is_stream and tidy and tidy[-1].get("name") == output["name"]:
            tidy[-1]["text"].append(output["text"])
        else:
            tidy.append({**output, "text": [output["text"]]} if is_stream else output)
    cell["outputs"] = [
        nbformat.from_dict({**output, "text": _shortened("".join(output["text"]))})
        if output["output_type"] == "stream"
        else output
        for output in tidy
    ]


def _shortened(text: str) -> str:
    if len(text) <= MAX_PRINTED:
        return text
    half = MAX_PRINTED // 2
    return f"{text[:half]}\n[{len(text) - 2 * half} characters left out]\n{text[-half:]}"


def _how(status: int | None) -> str:
    if status is None:
        return "it did not say how"
    if status >= 0:
        return f"its process ended with exit status {status}"
    name = signal.Signals(-status).name
    return f"its process was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def _error(journal: Journal, reason: str, traceback: str = "") -> dict[str, Any]:
    return {
        "cell": journal.cell,
        "section": journal.section,
        "reason": reason[:2000],
        "traceback": traceback[-8000:],
    }


def _judge(notebook: dict[str, Any] | None) -> dict[str, Any] | None:
    """Why a notebook that papermill takes for completed has not succeeded, or None."""
    if notebook is None:
        return {
            "cell": None,
            "section": None,
            "reason": "the executed notebook cannot be read",
            "traceback": "",
        }
    where = cells.sections(notebook)
    code = [
        (index, cell)
        for index, cell in enumerate(notebook["cells"])
        if cell["cell_type"] == "code" and cells.text_of(cell["source"]).strip()
    ]
    ran = [index for index, cell in code if cell.get("execution_count") is not None]
    if len(ran) < len(code):
        last = max(ran, default=code[0][0])
        reason = "the notebook ended in this cell: those behind it did not run"
        return {"cell": last + 1, "section": where[last], "reason": reason, "traceback": ""}
    if cells.claims_payload(notebook) is None:
        index = code[-1][0] if code else 0
        reason = "every cell ran, but none displayed the claims ledger (`ledger.show()`)"
        return {
            "cell": index + 1,
            "section": where[index] if where else None,
            "reason": reason,
            "traceback": "",
        }
    return None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _end_with(supervisor: int) -> None:
    """A run that was started cold ends when its supervisor is gone (a forked one ends with its template)."""
    while os.getppid() == supervisor:
        time.sleep(0.5)
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
