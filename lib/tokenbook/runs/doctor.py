"""What this machine has, and what follows for running the chapters."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator
from importlib import metadata

from tokenbook import papers
from tokenbook.runs import device, notebooks, warm

GIB = 2**30


def report() -> Iterator[str]:
    """Lines for people: a fact each, with its consequence."""
    yield f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    cores, memory = device.cores(), device.memory_bytes() / GIB
    yield f"{device.processor()}: {cores} cores -> up to {cores} runs at once"
    enough = "enough for every chapter at small scale" if memory >= 4 else "little: use --jobs 1"
    yield f"{memory:.0f} GiB of memory -> {enough}"
    try:
        root = papers.project_root()
        free = shutil.disk_usage(root).free / GIB
        yield f"{free:.0f} GiB free on the disk of the project"
        yield f"{len(notebooks.discover(root))} chapters"
    except papers.PaperError as error:
        yield f"no project: {error}"
    yield from _torch()
    yield _package("transformers", "needed by the chapters")
    if warm.available():
        yield "warm kernels: yes -> one more run of a sweep costs less than a second beside its own work"
    else:
        yield "warm kernels: no (this system does not fork safely) -> every run imports its packages anew"


def _torch() -> Iterator[str]:
    try:
        import torch
    except ImportError as error:
        yield f"torch: cannot be imported ({error}) -> no chapter runs; `make setup` installs it"
        return
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        found = f"torch {torch.__version__}, CUDA {torch.version.cuda}: {', '.join(names)}"
        yield f"{found} -> device auto means cuda"
    else:
        why = "this torch was built without CUDA" if torch.version.cuda is None else "no usable GPU"
        yield f"torch {torch.__version__}: {why} -> device auto means cpu; paper scale needs a GPU"
    try:
        import triton

        use = (
            "kernels run on the GPU"
            if torch.cuda.is_available()
            else "used on a GPU only; tests interpret it"
        )
        yield f"triton {triton.__version__} -> {use}"
    except ImportError:
        yield "triton: missing -> every operation takes its torch path"


def _package(name: str, otherwise: str) -> str:
    try:
        return f"{name} {metadata.version(name)}"
    except metadata.PackageNotFoundError:
        return f"{name}: missing -> {otherwise}"
