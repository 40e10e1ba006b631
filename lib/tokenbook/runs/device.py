"""What a run would compute on, told without importing torch (the command has to answer at once)."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

NVIDIA = Path("/proc/driver/nvidia/gpus")


@lru_cache(maxsize=1)
def torch_has_cuda() -> bool:
    """Whether the installed torch was built for CUDA."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.origin:
        return False
    version = Path(spec.origin).with_name("version.py")
    return bool(version.is_file() and re.search(r"^cuda[^=]*=\s*['\"]", version.read_text(), re.MULTILINE))


def gpus() -> list[str]:
    """Names of the GPUs that torch would see, in order."""
    if not torch_has_cuda():
        return []
    names = []
    for folder in sorted(NVIDIA.glob("*")) if NVIDIA.is_dir() else []:
        model = re.search(r"^Model:\s*(.+)$", (folder / "information").read_text(), re.MULTILINE)
        names.append(model.group(1).strip() if model else "NVIDIA GPU")
    if "CUDA_VISIBLE_DEVICES" not in os.environ:
        return names
    return [names[int(i)] if i.isdigit() and int(i) < len(names) else "NVIDIA GPU" for i in gpu_ids()]


def gpu_ids() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls those GPUs: numbers, or UUIDs if it holds UUIDs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(number) for number in range(len(gpus()))]
    return [item.strip() for item in visible.split(",") if item.strip() not in ("", "-1")]


def kind(device: str) -> str:
    """Kind of device that a chapter's parameter `device` means here: part of the run's key.

    Two machines with the same kind are expected to give the same result: the name of the GPU is part of it
    (its kernels differ), the name of the processor is not.
    """
    name = device.partition(":")[0]
    if name == "auto":
        name = "cuda" if gpus() else "cpu"
    if name != "cuda":
        return name
    found = gpus()
    index = int(device.partition(":")[2] or 0)
    return f"cuda {found[index]}" if index < len(found) else "cuda"


def describe(device: str) -> dict[str, Any]:
    """The device of a run for its record: kind, processor, cores."""
    return {
        "kind": kind(device),
        "processor": processor(),
        "cores": cores(),
        "memory_gib": round(memory_bytes() / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """Memory of the machine."""
    import psutil

    return psutil.virtual_memory().total


@lru_cache(maxsize=1)
def processor() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    return found.group(1).strip() if found else platform.processor() or platform.machine()
