"""What a process forked from the template does before it becomes `python -m MODULE ARGUMENTS`.

This file is run by its path inside the forked child, never imported as a part of `tokenbook`: a kernel must
find the library as it is on disk when the notebook imports it. A child takes nothing over from its siblings
or the template but the imported modules: environment, working directory, streams, session and process group,
signal handlers, random state and thread counts are its own. Where that cannot be (a CUDA context, threads
that a fork does not copy, settings that are read only once, at import), the child replaces itself by the
cold command, under the same process id.
"""

import atexit
import ctypes
import gc
import os
import random
import runpy
import select
import signal
import sys
import threading
import traceback
import warnings

# Threads that survive a fork by their own design; any other thread in the template is missing in the child.
HARMLESS_THREADS = {"jemalloc_bg_thd"}
# Read once, when the interpreter or a preloaded package starts: the child cannot change them any more.
READ_AT_START = (
    "PYTHON", "LD_", "MALLOC_", "KMP_", "GOMP_", "OMP_", "MKL_", "OPENBLAS_", "NUMEXPR_", "HF_",
    "HUGGINGFACE_", "TRANSFORMERS_", "TORCH_", "PYTORCH_", "MATPLOTLIBRC", "MPLCONFIGDIR", "XDG_",
)  # fmt: skip
# ... except those which are carried over below.
CARRIED_OVER = {"PYTHONWARNINGS", "PYTHONPATH", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"}
PR_SET_PDEATHSIG = 1


def main(request: dict, parent_sentinel: int) -> int:
    """Become `python -m MODULE ARGUMENTS` and return its exit status.

    `request` holds argv, env, cwd and template (the template's process id). `parent_sentinel` reads
    end-of-file when the launching process is gone.
    """
    gc.freeze()  # a collection would otherwise touch, and so copy, every page shared with the template
    _die_with(request["template"])
    os.setsid()
    _own_streams()
    os.chdir(request["cwd"])
    _own_signals()
    started_with = _environment_of(request["template"])
    reason = _needs_cold_start(request, started_with)
    set_by_imports = {name: text for name, text in os.environ.items() if name not in started_with}
    os.environ.clear()
    os.environ.update({**set_by_imports, **request["env"]})
    if reason:
        os.write(2, f"tokenbook-warm: cold start: {reason}\n".encode())
        os.execve(request["argv"][0], request["argv"], request["env"])
    threading.Thread(target=_end_with_launcher, args=(parent_sentinel,), daemon=True).start()
    _own_interpreter_settings(started_with.get("PYTHONPATH", ""))
    _own_random_state()
    _own_thread_counts()
    atexit._clear()  # what the template's imports registered is the template's to do
    return _run_module(request["argv"])


def _die_with(template: int) -> None:
    """Have the kernel end this process when the template ends, even while the interpreter's lock is held."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != template:  # it ended before the line above
            os._exit(1)


def _end_with_launcher(parent_sentinel: int) -> None:
    poll = select.poll()
    poll.register(parent_sentinel, select.POLLIN)
    poll.poll()
    os.killpg(0, signal.SIGKILL)


def _own_streams() -> None:
    from multiprocessing import forkserver

    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    for target, fd in enumerate(forkserver._forkserver._inherited_fds, start=1):
        os.dup2(fd, target)
        os.close(fd)
    # The template lives as long as its launcher; a child that kept this open would keep the template alive.
    os.close(forkserver._forkserver._forkserver_alive_fd)
    forkserver._forkserver._forkserver_alive_fd = None


def _own_signals() -> None:
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if signal.getsignal(number) not in (signal.SIG_DFL, None):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as in every Python process
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _environment_of(process: int) -> dict:
    """The environment that a process was started with (imports add to `os.environ`)."""
    pairs = _read(f"/proc/{process}/environ").split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair) or dict(os.environ)


def _needs_cold_start(request: dict, started_with: dict) -> str:
    """Why this child cannot go on with the template's modules, or nothing."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "the template has a CUDA context, which no child can inherit"
    if any(_points_to(fd).startswith("/dev/nvidia") for fd in _entries("/proc/self/fd")):
        return "the template has opened a GPU"
    tasks = f"/proc/{request['template']}/task"
    names = {_read(f"{tasks}/{task}/comm") for task in _entries(tasks) if task != str(request["template"])}
    if names - HARMLESS_THREADS - {""}:
        return f"the template has threads: {', '.join(sorted(names))}"
    env = request["env"]
    for name in sorted((started_with.keys() | env.keys()) - CARRIED_OVER):
        same = env.get(name) in (started_with.get(name), os.environ.get(name))
        if name.startswith(READ_AT_START) and not same:
            return f"{name} differs from the template's"
    return ""


def _entries(folder: str) -> list:
    try:
        return os.listdir(folder)
    except OSError:
        return []  # no /proc on this system


def _read(path: str) -> str:
    try:
        with open(path, errors="surrogateescape") as file:
            return file.read().strip()
    except OSError:
        return ""  # the thread has ended


def _points_to(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


def _own_interpreter_settings(template_path: str) -> None:
    """Warnings and the module search path as `python -m` sets them up from the environment."""
    sys.warnoptions[:] = [option for option in os.environ.get("PYTHONWARNINGS", "").split(",") if option]
    warnings.filters[:] = [entry for entry in warnings.filters if entry != ("ignore", None, Warning, None, 0)]
    warnings._processoptions(sys.warnoptions)
    warnings._filters_mutated() if hasattr(warnings, "_filters_mutated") else None
    own = [os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    theirs = {"", os.getcwd(), *own, *(os.path.abspath(p) for p in template_path.split(os.pathsep) if p)}
    sys.path[:] = [os.getcwd(), *own, *(p for p in sys.path if p not in theirs)]


def _own_random_state() -> None:
    """Siblings share the template's generators: without this all of them would draw the same numbers."""
    random.seed()
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed()
    if (torch := sys.modules.get("torch")) is not None:
        torch.default_generator.seed()


def _own_thread_counts() -> None:
    """The thread counts which the libraries would have read from the environment when they were loaded."""
    env = os.environ
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    openmp = _count(env.get("OMP_NUM_THREADS"))
    blas = _count(env.get("OPENBLAS_NUM_THREADS")) or openmp or cores
    if (torch := sys.modules.get("torch")) is not None and openmp:
        torch.set_num_threads(openmp)
    if "threadpoolctl" in sys.modules:
        for library in sys.modules["threadpoolctl"].ThreadpoolController().lib_controllers:
            if library.user_api == "blas":
                library.set_num_threads(blas)
            elif openmp:
                library.set_num_threads(openmp)


def _count(text) -> int:
    return int(text) if text and text.isdigit() else 0


def _run_module(argv: list) -> int:
    module, arguments = argv[2], argv[3:]
    if module == "ipykernel_launcher":
        arguments = [*arguments, "--IPKernelApp.parent_handle=1"]  # _end_with_launcher watches the launcher
        if (matplotlib := sys.modules.get("matplotlib")) is not None:
            # Read from the environment at import, where the kernel would have put it.
            inline = "module://matplotlib_inline.backend_inline"
            matplotlib.rcParams["backend"] = os.environ.get("MPLBACKEND") or inline
    sys.argv = [module, *arguments]
    status = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 130 if isinstance(sys.exc_info()[1], KeyboardInterrupt) else 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status
