"""Rotary embedding with n coordinates a token: images (row, column), space (x, y, z).

The D / 2 channel pairs of a head are shared out among the n axes in order: pairs_per_axis = floor(D / 2 / n),
the pairs that are left over do not rotate. Pair c = axis * pairs_per_axis + m turns by

    t = p_axis / resolution * theta^(-m / pairs_per_axis),   m = 0 .. pairs_per_axis - 1

so an attention score depends on the difference of two tokens' coordinates, axis by axis, and on nothing
else. Shapes: q [B, H, T, D], k [B, H_kv, T, D], positions [T, n] or [B, T, n]. Precision, layouts, complexity
and the Triton kernel: `tokenbook.kernels._rotation`, shared with `rope_shift`.

Source: normalised 2D RoPE of STAR (2406.10797), n = 2 with coordinates on [0, 64] at every scale; 3D RoPE of
Uni-3DAR (2503.16278), n = 3 with positions in angstrom over the resolution. Both pair adjacent channels.
"""

import math

import torch

from tokenbook.kernels import _rotation
from tokenbook.kernels._dispatch import choose_backend
from tokenbook.kernels._rotation import Rotation


def rope_nd(
    q: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor,
    theta: float = 10_000.0,
    *,
    resolution: float = 1.0,
    layout: str = "interleaved",
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys by their tokens' n coordinates.

    Args:
        q: queries [B, H, T, D].
        k: keys [B, H_kv, T, D], q's dtype; H_kv may be smaller than H.
        positions: coordinates, [T, n] or [B, T, n], integer, float32 or float64, in any unit.
        theta: base of the frequencies.
        resolution: length in the unit of `positions` that counts as one step.
        layout: "interleaved" pairs channels (2c, 2c + 1), as both papers do; "half" pairs (c, c + D / 2).
        backend: "auto", "triton", "torch" or "reference".

    Returns: the rotated (q, k). Differentiable in q and k.

    Raises ValueError naming the argument, what was given and what is allowed.
    """
    rotation = _checked_rotation(q, k, positions, theta, resolution, layout)
    if positions.requires_grad and torch.is_grad_enabled():
        raise ValueError("positions must not require a gradient; rope_nd_reference has one")
    tensors = {"q": q, "k": k, "positions": positions}
    chosen = choose_backend(
        "rope_nd", backend, tensors, _rotation.unsupported("q", q), float64_ok=("positions",)
    )
    return _rotation.rotate(q, rotation, None, chosen), _rotation.rotate(k, rotation, None, chosen)


def rope_nd_reference(q, k, positions, theta=10_000.0, *, resolution=1.0, layout="interleaved"):
    """The definition of `rope_nd` in float64, differentiable in q, k and positions; same arguments."""
    rotation = _checked_rotation(q, k, positions, theta, resolution, layout)
    return _rotation.rotate_reference(q, rotation), _rotation.rotate_reference(k, rotation)


def axis_frequencies(head_width: int, n_axes: int, theta: float = 10_000.0, device=None) -> torch.Tensor:
    """Radians per step of each pair, axis after axis, 0 for the pairs left over: [D / 2], float64.

    head_width D must be even and at least 2 n_axes, theta positive; else ValueError.
    """
    pairs, per_axis = head_width // 2, head_width // 2 // n_axes
    if head_width % 2 or per_axis < 1:
        raise ValueError(
            f"head width D must be even and at least {2 * n_axes} for {n_axes} axes, got {head_width}"
        )
    if not 0 < theta < math.inf:
        raise ValueError(f"theta must be positive, got {theta}")
    freqs = torch.zeros(pairs, dtype=torch.float64, device=device)
    steps = torch.arange(per_axis, dtype=torch.float64, device=device)
    freqs[: per_axis * n_axes] = (theta ** (-steps / per_axis)).repeat(n_axes)
    return freqs


def _checked_rotation(q, k, positions, theta, resolution, layout) -> Rotation:
    _rotation.check_heads("q", q)
    _rotation.check_heads("k", k)
    _rotation.check_layout(layout)
    batch, _, n_tokens, width = q.shape
    if (k.shape[0], *k.shape[2:]) != (batch, n_tokens, width) or k.dtype != q.dtype:
        wanted, given = f"[{batch}, H_kv, {n_tokens}, {width}] {q.dtype}", f"{list(k.shape)} {k.dtype}"
        raise ValueError(f"k must be {wanted} like q, got {given}")
    if not isinstance(positions, torch.Tensor) or positions.is_complex() or positions.dtype == torch.bool:
        given = positions.dtype if isinstance(positions, torch.Tensor) else type(positions).__name__
        raise ValueError(f"positions must be an integer, float32 or float64 tensor, got {given}")
    if positions.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(f"positions must be integer, float32 or float64, got {positions.dtype}: too coarse")
    shapes = f"[{n_tokens}, n] or [{batch}, {n_tokens}, n]"
    leading = tuple(positions.shape[:-1])
    if positions.dim() < 2 or leading not in ((n_tokens,), (batch, n_tokens)) or positions.shape[-1] == 0:
        raise ValueError(f"positions must be {shapes} for q {list(q.shape)}, got {list(positions.shape)}")
    if not 0 < resolution < math.inf:
        raise ValueError(f"resolution must be positive, got {resolution}")
    n_axes = positions.shape[-1]
    freqs = axis_frequencies(width, n_axes, theta, q.device) / resolution
    if not positions.is_floating_point():
        positions = positions.to(torch.int64)  # the gradient negates them, which unsigned integers cannot
    positions = positions if positions.dim() == 3 else positions.unsqueeze(0)
    return Rotation(positions, freqs, layout, pairs_per_axis=width // 2 // n_axes)
