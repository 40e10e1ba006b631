"""selective_scan beside the loop of transformers' Mamba, and mamba_ssm's CUDA kernel where it is installed.

The floor is a copy of u, delta, B, C and y (backward: of these, dy and the four gradients). On a GPU the
exponentials can weigh more: a multiprocessor takes 16 a clock, so an H200 (132 of them at 1.8 GHz) needs
0.26 ps each; the notes give their number, and the time they take there.
"""

import torch

from benchmarks.harness import Case, Variant
from tokenbook.kernels.selective_scan import selective_scan

SHAPES = {
    "Vision Mamba, 8x8 patches": {"B": 32, "D": 192, "L": 65, "N": 16},
    "Vision Mamba, 14x14 patches": {"B": 16, "D": 384, "L": 197, "N": 16},
}
GPU_SHAPES = {"Vision Mamba, batch 128": {"B": 128, "D": 768, "L": 197, "N": 16}}
GPU_EXPONENTIALS_PER_SECOND = 16 * 132 * 1.8e9


def cases(device: torch.device) -> list[Case]:
    shapes = SHAPES | (GPU_SHAPES if device.type == "cuda" else {})
    dtypes = [torch.float32, torch.bfloat16] if device.type == "cuda" else [torch.float32]
    return [
        _case(name, shape, dtype, direction)
        for name, shape in shapes.items()
        for dtype in dtypes
        for direction in ("forward", "both")
    ]


def floor_bytes(shape: dict[str, int], itemsize: int, direction: str) -> int:
    """Bytes that must move: forward u, delta, B, C, y; backward these but y, dy and four gradients."""
    rows, states = shape["B"] * shape["D"] * shape["L"], shape["B"] * shape["N"] * shape["L"]
    forward = 3 * rows + 2 * states
    backward = 5 * rows + 4 * states
    return itemsize * (forward if direction == "forward" else forward + backward)


def _case(name, shape, dtype, direction) -> Case:
    n_rows, width, length, n_states = shape.values()
    exponentials = (1 if direction == "forward" else 3) * n_rows * width * length * n_states

    def build(device):
        torch.manual_seed(0)
        u, dy = (torch.randn(n_rows, width, length, device=device, dtype=dtype) for _ in range(2))
        delta = torch.rand(n_rows, width, length, device=device).mul(0.1).to(dtype)
        A = -torch.arange(1.0, n_states + 1, device=device).repeat(width, 1)
        B, C = (torch.randn(n_rows, n_states, length, device=device, dtype=dtype) for _ in range(2))
        given = [t.requires_grad_(direction == "both") for t in (u, delta, A, B, C)]

        def variant(function, note="", optional=False):
            def both():
                torch.autograd.grad(function(*given), given, dy)

            return Variant(both if direction == "both" else lambda: function(*given), note, optional)

        seconds = exponentials / GPU_EXPONENTIALS_PER_SECOND
        note = f"{exponentials / 1e6:.0f} M exponentials"
        note += f", {seconds * 1e3:.3g} ms on an H200" if device.type == "cuda" else ""
        found = {"selective_scan": variant(selective_scan, note), "transformers' loop": variant(_loop())}
        if device.type == "cuda":
            found["mamba_ssm"] = variant(_mamba_ssm, optional=True)
        return found

    itemsize = dtype.itemsize
    moved = floor_bytes(shape, itemsize, direction)
    return Case(name, shape, str(dtype).removeprefix("torch."), direction, build, moved)


def _loop():
    """The scan of MambaMixer's slow path."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan
    from transformers.utils import logging

    logging.set_verbosity_error()  # it would warn that it is the slow path: that is why it is here
    return mamba_selective_scan


def _mamba_ssm(*given):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return selective_scan_fn(*given)
