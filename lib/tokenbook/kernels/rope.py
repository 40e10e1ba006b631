"""Moving cached rotary keys: `rope_shift` turns them by a change of position, `rope_splice` moves them too.

A rotary key at position p is k_p = R_p W h. Rotations compose, R_{p+delta} R_p^{-1} = R_delta for every p, so
a key whose position changed by delta is repaired by one rotation, without the network:

    k' = R_delta k:  k'_a = k_a cos(delta w) - k_b sin(delta w),  k'_b = k_b cos(delta w) + k_a sin(delta w)

for each pair of channels (a, b) with inverse frequency w. Shapes: k [B, H, S, D], float, any strides.
The inverse frequencies come from the loaded model (`model.model.rotary_emb.inv_freq`): linear, llama3 and
yarn scaling are folded in there. A model's `attention_scaling` must NOT enter: the cached key holds it.
Precision, layouts, complexity and the Triton kernel: `tokenbook.kernels._rotation`.

Source: He et al., Let the Code LLM Edit Itself When You Edit the Code (2407.03157), section 3.2; rotary
embeddings: Su et al., RoFormer (2104.09864), section 3.2. Used by the chapter `pie`.
"""

import functools
import itertools
from collections.abc import Sequence

import torch

from tokenbook.kernels import _rotation
from tokenbook.kernels._dispatch import choose_backend
from tokenbook.kernels._rotation import Rotation

LONGEST_SHIFT = 2**31 - 1


def rope_shift(
    k: torch.Tensor,
    delta: int | torch.Tensor,
    inv_freq: torch.Tensor,
    *,
    layout: str = "half",
    rotary_dim: int | None = None,
    out: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Rotate cached keys as if their positions had changed by `delta`.

    Args:
        k: keys [B, H, S, D], already rotated for their old positions; S = 0 is legal.
        delta: new position minus old position, in tokens: an int for all, or an integer tensor: [] or [S] (by
            position), [B, 1] (by row of the batch), [B, S] (both).
        inv_freq: radians per token of each pair, [rotary_dim / 2], float32 or float64, from the model.
        layout: "half" pairs channels (c, c + rotary_dim / 2), as Llama, Qwen and GPT-NeoX do; "interleaved"
            pairs (2c, 2c + 1), as GPT-J and ChatGLM do.
        rotary_dim: channels that rotate, the first ones (GPT-NeoX, Phi); the rest is copied. It follows from
            inv_freq; given, it is checked against it.
        out: where to write: None for a new tensor, k itself for in place, or a tensor like k elsewhere.
        backend: "auto", "triton", "torch" or "reference".

    Returns: the rotated keys in k's dtype (`out` where it was given). Differentiable in k where out is None;
        the gradient is rotated by -delta.

    Raises ValueError naming the argument, what was given and what is allowed.
    """
    rotation = _checked_rotation(k, inv_freq, layout, rotary_dim, _checked_delta(delta, k))
    if out is not None:
        _rotation.check_out(out, k, list(k.shape), in_place=True)
    tensors = {"k": k, "inv_freq": inv_freq, "out": out}
    tensors["delta"] = delta if isinstance(delta, torch.Tensor) else None
    chosen = choose_backend(
        "rope_shift", backend, tensors, _rotation.unsupported("k", k), float64_ok=("inv_freq",)
    )
    return _rotation.rotate(k, rotation, out, chosen)


def rope_shift_reference(k, delta, inv_freq, *, layout="half", rotary_dim=None) -> torch.Tensor:
    """The definition of `rope_shift` in float64, differentiable; same arguments."""
    rotation = _checked_rotation(k, inv_freq, layout, rotary_dim, _checked_delta(delta, k), any_gradient=True)
    return _rotation.rotate_reference(k, rotation)


def rope_splice(
    k: torch.Tensor,
    segments: Sequence[tuple[int, int, int]],
    inv_freq: torch.Tensor | None,
    out: torch.Tensor,
    *,
    layout: str = "half",
    rotary_dim: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Move kept segments of a cache to their new places, each key turned by how far it moved, in one pass.

    After several edits, the text between them is kept: k[:, :, start:stop] goes to
    out[:, :, new_start : new_start + stop - start], rotated by new_start - start. The places of newly encoded
    text are not touched; fill them before or after. Values carry no position: call it with inv_freq=None.
    The index tables of a list of segments are made once and serve all layers.

    Args:
        k: the old cache's keys (or values) [B, H, S, D].
        segments: (start, stop, new_start) in tokens, old positions half-open; their targets must not overlap.
        inv_freq: as in `rope_shift`; None copies without rotating.
        out: the new cache's keys [B, H, S', D], same B, H, D, dtype and device; shares no memory with k.
        layout, rotary_dim, backend: as in `rope_shift`.

    Returns: out. No gradient flows through it.

    Raises ValueError naming the argument, what was given and what is allowed.
    """
    _rotation.check_heads("k", k)
    shape = [
        *k.shape[:2],
        out.shape[2] if isinstance(out, torch.Tensor) and out.dim() == 4 else 0,
        k.shape[3],
    ]
    _rotation.check_out(out, k, shape, in_place=False)
    segments = _checked_segments(segments, k.shape[2], out.shape[2])
    rotation = None
    if inv_freq is not None:
        rotation = _checked_rotation(k, inv_freq, layout, rotary_dim, 0)
    tensors = {"k": k, "inv_freq": inv_freq, "out": out}
    chosen = choose_backend(
        "rope_splice", backend, tensors, _rotation.unsupported("k", k), float64_ok=("inv_freq",)
    )
    if chosen == "triton" and segments:
        moves, shifts = _tables(segments, k.device)
        moved = rotation and Rotation(shifts, rotation.freqs, layout)
        return _rotation.rotate_triton(k, moved, out, moves)
    for start, stop, new_start in segments:
        source, target = k[:, :, start:stop], out[:, :, new_start : new_start + stop - start]
        if rotation is None or new_start == start:
            target.copy_(source)
        else:
            _rotation.rotate(source, Rotation(new_start - start, rotation.freqs, layout), target, chosen)
    return out


def rope_splice_reference(k, segments, inv_freq, out, *, layout="half", rotary_dim=None) -> torch.Tensor:
    """The definition of `rope_splice`: a loop over positions; returns a new tensor, `out` stays as it is."""
    result = out.clone()
    for start, stop, new_start in segments:
        for old in range(start, stop):
            new = old - start + new_start
            row = k[:, :, old : old + 1]
            if inv_freq is not None:
                row = rope_shift_reference(row, new - old, inv_freq, layout=layout, rotary_dim=rotary_dim)
            result[:, :, new : new + 1] = row
    return result


def _checked_delta(delta, k: torch.Tensor) -> int | torch.Tensor:
    """delta as an int or as positions [B or 1, S or 1, 1]."""
    _rotation.check_heads("k", k)
    if isinstance(delta, int) and not isinstance(delta, bool):
        if abs(delta) > LONGEST_SHIFT:
            raise ValueError(f"delta must be within +-{LONGEST_SHIFT}, got {delta}")
        return delta
    if not isinstance(delta, torch.Tensor) or delta.is_floating_point() or delta.is_complex():
        given = str(delta.dtype) if isinstance(delta, torch.Tensor) else f"{type(delta).__name__} {delta!r}"
        raise ValueError(f"delta must be an int or an integer tensor, got {given}")
    if delta.dtype == torch.bool:
        raise ValueError("delta must be an int or an integer tensor, got torch.bool")
    batch, _, n_positions, _ = k.shape
    allowed = {(): (1, 1, 1), (n_positions,): (1, n_positions, 1)}
    allowed |= {(batch, 1): (batch, 1, 1), (batch, n_positions): (batch, n_positions, 1)}
    if tuple(delta.shape) not in allowed:
        shapes = f"[], [{n_positions}], [{batch}, 1] or [{batch}, {n_positions}]"
        raise ValueError(f"delta must be {shapes} for k {list(k.shape)}, got {list(delta.shape)}")
    return delta.to(torch.int64).reshape(allowed[tuple(delta.shape)])


def _checked_rotation(k, inv_freq, layout, rotary_dim, positions, any_gradient=False) -> Rotation:
    _rotation.check_layout(layout)
    _rotation.check_freqs("inv_freq", inv_freq)
    width = 2 * inv_freq.numel()
    if rotary_dim is not None and rotary_dim != width:
        raise ValueError(f"rotary_dim must be twice inv_freq's length, {width}, got {rotary_dim}")
    if width > k.shape[3]:
        raise ValueError(f"inv_freq rotates {width} channels, but k has {k.shape[3]} (k is {list(k.shape)})")
    if inv_freq.requires_grad and torch.is_grad_enabled() and not any_gradient:
        raise ValueError("inv_freq must not require a gradient; rope_shift_reference has one")
    return Rotation(positions, inv_freq, layout)


def _checked_segments(segments, n_old: int, n_new: int) -> tuple[tuple[int, int, int], ...]:
    checked = []
    for segment in segments:
        if len(segment) != 3 or not all(isinstance(n, int) and not isinstance(n, bool) for n in segment):
            raise ValueError(f"segments must be (start, stop, new_start) of ints, got {segment!r}")
        start, stop, new_start = segment
        if not 0 <= start <= stop <= n_old:
            raise ValueError(f"segments must satisfy 0 <= start <= stop <= {n_old}, got {tuple(segment)}")
        if not 0 <= new_start <= n_new - (stop - start):
            raise ValueError(f"segments must end within out's {n_new} positions, got {tuple(segment)}")
        if stop > start:
            checked.append((start, stop, new_start))
    by_target = sorted(checked, key=lambda segment: segment[2])
    for left, right in itertools.pairwise(by_target):
        if left[2] + left[1] - left[0] > right[2]:
            raise ValueError(f"segments must not overlap in out, got {left} and {right}")
    return tuple(checked)


@functools.lru_cache(maxsize=8)
def _tables(segments, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows read and written [2, S_moved], and shifts [1, S_moved, 1], int64."""
    read = torch.cat([torch.arange(start, stop) for start, stop, _ in segments])
    shifts = torch.cat([torch.full((stop - start,), new - start) for start, stop, new in segments])
    return torch.stack((read, read + shifts)).to(device), shifts.view(1, -1, 1).to(device)
