"""Warm kernels: processes forked from a template that has imported the heavy packages already.

`WarmProvisioner` is jupyter_client's LocalProvisioner except that a Python kernel is forked from a template
started by the standard library's forkserver. Name it in the environment and every Jupyter tool uses it:

    JUPYTER_DEFAULT_PROVISIONER_NAME=tokenbook-warm papermill notebooks/pie.ipynb out.ipynb

The template belongs to the process that started it and ends with it, and its children end with the template.
It imports third-party packages and does nothing else: a parallel torch operation before the fork would make
every child hang at its first one. What a child makes its own stands in `warm_child`, as do the cases in which
it starts cold. Where fork is missing or not safe (Windows, macOS) kernels start the ordinary way.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import multiprocessing
import os
import pathlib
import select
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from jupyter_client.provisioning.local_provisioner import LocalProvisioner

PRELOAD = [
    "ipykernel.ipkernel",
    "ipykernel.kernelapp",
    "ipykernel.debugger",  # imported by every kernel, and half of its start
    "IPython.core.completerlib",
    "IPython.extensions.storemagic",
    "tornado.platform.asyncio",
    "tornado.queues",
    "sqlite3",
    "tomllib",
    "papermill",
    "papermill.execute",
    "jupyter_client.manager",
    "threadpoolctl",
    "psutil",
    "pydantic.main",
    "pydantic.fields",
    "pydantic.types",
    "pydantic.plugin._loader",
    "pydantic.type_adapter",
    "pandas",
    "scipy.stats",
    "matplotlib.pyplot",
    "matplotlib.backends.backend_agg",
    "seaborn",
    "torch",
    "transformers.modeling_utils",
    "sklearn.linear_model",
]
# The run process is told here which template its kernel is to be forked from.
TEMPLATE_ENV = "TOKENBOOK_TEMPLATE"
_CHILD = str(pathlib.Path(__file__).with_name("warm_child.py"))
log = logging.getLogger(__name__)


def available() -> bool:
    """Whether this system forks safely; macOS can fork, but its frameworks do not survive it."""
    return sys.platform != "darwin" and "forkserver" in multiprocessing.get_all_start_methods()


def is_forked() -> bool:
    """Whether this process was forked from the template of the process that supervises it."""
    return TEMPLATE_ENV in os.environ


class TemplateError(RuntimeError):
    """The template could not be started or has died."""


class Template:
    """A forkserver with the heavy packages imported; one per process, started at the first use."""

    def __init__(self, preload: list[str] | None = None):
        """`preload`: modules to import instead of PRELOAD or those that TOKENBOOK_PRELOAD names."""
        own = os.environ.get("TOKENBOOK_PRELOAD")
        self.preload = preload or (own.split(",") if own else PRELOAD)
        self._server, self._lock = None, threading.Lock()

    def address(self) -> str:
        """Socket of the running template; starts it, or starts it again after its death."""
        from multiprocessing import resource_tracker
        from multiprocessing.forkserver import ForkServer

        with self._lock:
            # The forkserver starts it too, but its start unblocks SIGINT and SIGTERM again: so before.
            resource_tracker.ensure_running()
            if self._server is None:
                self._server = ForkServer()
                self._server.set_forkserver_preload(self.preload)
                atexit.register(self.stop)
            with _environment_of_template(), _blocked_signals():
                self._server.ensure_running()
            return f"{self._server._forkserver_pid}:{self._server._forkserver_address}"

    @property
    def pid(self) -> int | None:
        """Process id of the template, None before its start."""
        return self._server and self._server._forkserver_pid

    def stop(self) -> None:
        """End the template, at once even while it is importing, and with it its children."""
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError, FileNotFoundError):
                self._server._stop()


template = Template()


@contextlib.contextmanager
def _environment_of_template():
    """One BLAS thread (none is started at import) and silent imports; `warm_child` undoes both."""
    ours = {"OPENBLAS_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    saved = {name: os.environ.get(name) for name in (*ours, "OMP_NUM_THREADS")}
    os.environ.update(ours)
    os.environ.pop("OMP_NUM_THREADS", None)
    try:
        yield
    finally:
        for name, value in saved.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


@contextlib.contextmanager
def _blocked_signals():
    """What is sent to the whole process group is meant for the launcher; it ends the template in its time."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Entry:
    """What the forkserver's child unpickles: an object whose `_bootstrap(sentinel)` runs `warm_child.main`.

    The file goes by its path: unpickling a class of this package would import the package in the child.
    """

    def __init__(self, request: dict[str, Any]):
        self.request = request

    def __reduce__(self):
        code = (
            "__import__('types').SimpleNamespace(_bootstrap=__import__('functools').partial("
            "__import__('runpy').run_path(path)['main'], request))"
        )
        return eval, (code, {"path": _CHILD, "request": self.request})


class ForkedProcess:
    """A child of the template, with the interface of `subprocess.Popen` that LocalProvisioner uses."""

    stdin = stdout = stderr = None

    def __init__(self, pid: int, status_fd: int, alive_fd: int):
        self.pid, self.returncode = pid, None
        self._status_fd, self._alive_fd = status_fd, alive_fd
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        """Exit status, negative for a signal; None while it runs; 255 if the template died with it."""
        return self._read(0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; subprocess.TimeoutExpired after `timeout` seconds."""
        status = self._read(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        return status

    def _read(self, timeout: float | None) -> int | None:
        from multiprocessing.forkserver import read_signed

        with self._lock:
            if self.returncode is None:
                poll = select.poll()
                poll.register(self._status_fd, select.POLLIN)
                if not poll.poll(None if timeout is None else timeout * 1000):
                    return None
                try:
                    self.returncode = read_signed(self._status_fd)
                except EOFError:
                    self.returncode = 255
                self.close()
            return self.returncode

    def close(self) -> None:
        """Let go of the process: it ends if it still runs."""
        for name in ("_status_fd", "_alive_fd"):
            if getattr(self, name) >= 0:
                os.close(getattr(self, name))
                setattr(self, name, -1)

    def send_signal(self, number: int) -> None:
        """Signal the process, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)

    def __del__(self):
        self.close()


def fork(
    argv: list[str],
    env: dict[str, str],
    cwd: str | None = None,
    stdout: int = 1,
    stderr: int = 2,
    address: str | None = None,
) -> ForkedProcess:
    """Start `[sys.executable, "-m", MODULE, ...]` as a fork of the template; blocks until it is forked.

    `address`: the template of another process (default: this process's own). Raises TemplateError if the
    template cannot be reached.
    """
    import socket
    from multiprocessing import reduction, resource_tracker
    from multiprocessing.forkserver import read_signed

    pid, _, path = (address or template.address()).partition(":")
    request = {"argv": argv, "env": env, "cwd": str(cwd or os.getcwd()), "template": int(pid)}
    child_r, alive_w = os.pipe()
    status_r, child_w = os.pipe()
    null = os.open(os.devnull, os.O_RDONLY)  # stands in for the forkserver's own alive descriptor
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            reduction.sendfds(client, [child_r, child_w, null, resource_tracker.getfd(), stdout, stderr])
        for fd in (child_r, child_w):
            os.close(fd)
        data = bytes(reduction.ForkingPickler.dumps({})) + bytes(
            reduction.ForkingPickler.dumps(_Entry(request))
        )
        with open(alive_w, "wb", closefd=False) as pipe:
            pipe.write(data)
        return ForkedProcess(read_signed(status_r), status_r, alive_w)
    except (OSError, EOFError) as error:
        for fd in (status_r, alive_w):
            os.close(fd)
        raise TemplateError(f"the template of warm kernels is gone: {error}") from error
    finally:
        os.close(null)


class WarmProvisioner(LocalProvisioner):
    """Starts Python kernels of this very interpreter as forks of the template, all others as usual."""

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> Any:
        """Fork the kernel; start it cold if it cannot be forked."""
        if not (available() and cmd[0] == sys.executable and cmd[1:3] == ["-m", "ipykernel_launcher"]):
            return await super().launch_kernel(cmd, **kwargs)
        if kwargs.get("independent"):  # meant to outlive its launcher
            return await super().launch_kernel(cmd, **kwargs)
        env = {**kwargs.get("env", os.environ), "JPY_PARENT_PID": str(os.getpid())}
        streams = {name: kwargs[name] for name in ("stdout", "stderr") if isinstance(kwargs.get(name), int)}
        if any(fd < 0 for fd in streams.values()):  # subprocess.PIPE and its like
            return await super().launch_kernel(cmd, **kwargs)
        address = os.environ.get(TEMPLATE_ENV)
        env.pop(TEMPLATE_ENV, None)
        started = time.monotonic()
        try:
            self.process = await asyncio.to_thread(
                fork, cmd, env, kwargs.get("cwd"), address=address, **streams
            )
        except TemplateError as error:
            log.warning("%s; starting a cold kernel", error)
            return await super().launch_kernel(cmd, **kwargs)
        log.debug("forked kernel %d in %.3f s", self.process.pid, time.monotonic() - started)
        self.pid = self.pgid = self.process.pid  # the child is the leader of its own session
        self.cwd = kwargs.get("cwd", pathlib.Path.cwd())
        return self.connection_info
