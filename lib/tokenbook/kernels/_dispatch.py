"""Which backend an operation runs on, and a record of what it was.

Every operation takes `backend="auto"` and asks `choose_backend` once, after its arguments were checked:

    auto       Triton exactly when the tensors are on CUDA, Triton imports and the case is supported;
               else torch
    triton     Triton or a ValueError with the reason
    torch      the fast torch path, any device
    reference  the plain definition, any device, slow

The environment variable TOKENBOOK_BACKEND takes the place of "auto", so that a whole notebook can be forced;
a backend named in the call wins over it. Triton's interpreter (TRITON_INTERPRET=1, set before Triton is
imported) counts as Triton on CPU tensors, but only when "triton" is asked for: it is a test bench.

This module imports neither torch nor Triton.
"""

import functools
import importlib
import os
from collections.abc import Callable, Collection, Mapping

BACKENDS = ("auto", "triton", "torch", "reference")
ENVIRONMENT_VARIABLE = "TOKENBOOK_BACKEND"

_used: dict[str, set[str]] = {}


def choose_backend(
    operation: str,
    backend: str,
    tensors: Mapping[str, object],
    unsupported: str | Callable[[], str | None] | None = None,
    float64_ok: Collection[str] = (),
) -> str:
    """Decide the backend of one call, remember it for `backends_used`, and return its name.

    Args:
        operation: the public function's name, as it shall stand in the record.
        backend: "auto", "triton", "torch" or "reference".
        tensors: the call's tensors by argument name; None values are left out. All must share one device.
        unsupported: why Triton cannot take this shape, dtype or option; None or "" where it can. A callable
            is asked only if Triton is in question.
        float64_ok: names of arguments (frequencies, positions) that the kernel reads in float64.

    Returns: "triton", "torch" or "reference".

    Raises ValueError for an unknown backend, tensors on several devices, a forced "triton" that cannot run.
    """
    requested = _requested(backend)
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        given = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{operation}: all tensors must be on one device, got {given}")
    chosen = requested
    if requested in ("auto", "triton"):
        on_cuda = any(device.type == "cuda" for device in devices.values())
        # "auto" never asks further on a CPU: the interpreter must be named to be used.
        wanted = requested == "triton" or on_cuda
        reason = (
            _why_not_triton(tensors, on_cuda, unsupported, float64_ok)
            if wanted
            else "the tensors are not on CUDA"
        )
        if requested == "triton" and reason:
            raise ValueError(f"{operation}: backend 'triton' cannot run here: {reason}")
        chosen = "torch" if reason else "triton"
    _used.setdefault(operation, set()).add(chosen)
    return chosen


def backends_used() -> dict[str, str]:
    """Which backends each operation ran on since the import or the last `forget_backends`.

    Returns: {operation: backend}; where an operation ran on several, their sorted names joined by "+".
    """
    return {operation: "+".join(sorted(names)) for operation, names in sorted(_used.items())}


def forget_backends() -> None:
    """Empty the record of `backends_used`."""
    _used.clear()


def interpreting() -> bool:
    """Whether this process runs Triton kernels in the interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def triton_problem() -> str | None:
    """Why Triton cannot be imported, or None where it can."""
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken driver or compiler raises more than ImportError
        return f"Triton does not import ({type(error).__name__}: {error})"
    return None


def _requested(backend: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    if backend != "auto":
        return backend
    forced = os.environ.get(ENVIRONMENT_VARIABLE, "") or "auto"
    if forced not in BACKENDS:
        raise ValueError(f"{ENVIRONMENT_VARIABLE} must be one of {', '.join(BACKENDS)}; got {forced!r}")
    return forced


def _why_not_triton(tensors, on_cuda, unsupported, float64_ok) -> str | None:
    if not on_cuda and not interpreting():
        return "the tensors are not on CUDA and TRITON_INTERPRET=1 is not set"
    dtypes = {name: str(t.dtype).removeprefix("torch.") for name, t in tensors.items() if t is not None}
    for name, dtype in dtypes.items():
        if dtype in ("float64", "complex64", "complex128") and name not in float64_ok:
            return f"the kernels compute in float32 and {name} is {dtype}"
        if dtype == "bfloat16" and interpreting():
            return f"{name} is bfloat16, in which Triton's interpreter is silently wrong"
    reason = unsupported() if callable(unsupported) else unsupported
    return reason or triton_problem()
