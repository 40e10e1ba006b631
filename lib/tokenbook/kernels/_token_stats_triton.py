"""The Triton kernels of `token_stats`; this module imports Triton and is imported only where it runs."""

import functools

import torch
import triton
import triton.language as tl

from tokenbook.kernels._dispatch import interpreting

CONFIGS = tuple((block, warps) for block in (1024, 2048, 4096) for warps in (4, 8))  # lanes, warps a program


def partials(x, ids, n_splits: int | None = None, config: tuple[int, int] | None = None):
    """peak, others, slope, mass, rank and argmax, each [B, T], of logits [B, T, V].

    One program a row and part of the vocabulary; the parts are put together here. `config` is for tests.
    """
    n_batch, n_positions, n_vocabulary = x.shape
    n_rows = n_batch * n_positions
    if n_splits is None:  # enough programs to fill the device when there are few rows
        n_processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
        n_splits = max(1, min(4 * n_processors // n_rows, n_vocabulary // 8192))
    part = -(-n_vocabulary // n_splits)
    floats = torch.empty(4, n_rows, n_splits, dtype=torch.float32, device=x.device)
    counts = torch.empty(2, n_rows, n_splits, dtype=torch.int32, device=x.device)
    ids = None if ids is None else ids.contiguous()
    _launch(
        _forward_kernel, (n_rows, n_splits), config, x, ids, floats, counts, n_positions, n_vocabulary, part,
        n_splits, n_rows * n_splits, x.stride(0), x.stride(1), HAS_IDS=ids is not None,
    )  # fmt: skip
    peak, others, slope, mass = floats
    rank, argmax = counts
    top, winner = peak.max(1, keepdim=True)  # the first part that holds it, hence the lowest index
    scale = (peak - top).exp()
    gap = torch.where(scale > 0, peak - top, 0)
    slope = torch.where(scale > 0, (slope + gap * (1 + others)) * scale, 0).sum(1)
    own = others.gather(1, winner)
    others = ((1 + others) * scale).scatter(1, winner, own).sum(1)
    mass = torch.where(peak == top, mass, 0).sum(1) if ids is None else (mass * scale).sum(1)
    ranked = (top[:, 0], others, slope, mass, rank.sum(1), argmax.gather(1, winner)[:, 0].long())
    return [value.view(n_batch, n_positions) for value in ranked]


def gradient(x, y, argmax, scalars, config: tuple[int, int] | None = None):
    """Gradient of the logits, from the eight scalars of each row; see `token_stats._gradient`."""
    n_batch, n_positions, n_vocabulary = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    n_rows = n_batch * n_positions
    _launch(
        _backward_kernel, lambda meta: (n_rows, -(-n_vocabulary // meta["BLOCK"])), config, x, y.contiguous(),
        argmax.contiguous(), scalars, out, n_positions, n_vocabulary, n_rows, x.stride(0), x.stride(1),
    )  # fmt: skip
    return out


def _launch(kernel, grid, config: tuple[int, int] | None, *arguments, **constants) -> None:
    """Run a kernel with a named configuration, or with the fastest one (the interpreter: with the first)."""
    if config is None and not interpreting():
        _tuned(kernel)[grid](*arguments, **constants)
    else:
        block, warps = config or CONFIGS[0]
        kernel[grid](*arguments, **constants, BLOCK=block, num_warps=warps)


@functools.cache
def _tuned(kernel):
    configs = [triton.Config({"BLOCK": block}, num_warps=warps) for block, warps in CONFIGS]
    return triton.autotune(configs, key=["n_vocabulary"])(kernel)


@triton.jit
def _forward_kernel(
    x_ptr, ids_ptr, floats_ptr, counts_ptr, n_positions, n_vocabulary, part, n_splits, plane,
    stride_b, stride_t, HAS_IDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row's part of the vocabulary. Each lane keeps its own running maximum m and, relative to it,
    s = sum of exp(x - m) over its other elements and t = sum of exp(x - m) (x - m): one exp an element."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    x_ptr += (row // n_positions) * stride_b + (row % n_positions) * stride_t
    x_y = 0.0
    if HAS_IDS:
        x_y = tl.load(x_ptr + tl.load(ids_ptr + row)).to(tl.float32)
    lanes = tl.arange(0, BLOCK)
    m = tl.full([BLOCK], float("-inf"), tl.float32)
    s = tl.zeros([BLOCK], tl.float32)
    t = tl.zeros([BLOCK], tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    rank = tl.zeros([BLOCK], tl.int32)
    argmax = tl.zeros([BLOCK], tl.int32)
    end = tl.minimum((split + 1) * part, n_vocabulary)
    for start in range(split * part, end, BLOCK):
        columns = start + lanes
        x = tl.load(x_ptr + columns, mask=columns < end, other=float("-inf")).to(tl.float32)
        larger = x > m
        gap = tl.where(x == m, 0.0, -tl.abs(x - m))  # -inf beside -inf: no nan
        e = tl.exp(gap)
        positive = e > 0
        t = tl.where(
            larger, tl.where(positive, (t + gap * (1 + s)) * e, 0.0), t + tl.where(positive, e * gap, 0.0)
        )
        if HAS_IDS:
            mass = tl.where(larger, mass * e, mass) + tl.where(x >= x_y, tl.where(larger, 1.0, e), 0.0)
            rank += (x > x_y).to(tl.int32)
        else:  # how often the maximum occurs
            mass = tl.where(larger, 1.0, mass + (x == m).to(tl.float32))
        s = tl.where(larger, (1 + s) * e, s + e)
        argmax = tl.where(larger, columns, argmax)
        m = tl.where(larger, x, m)
    peak = tl.max(m, axis=0)
    scale = tl.where(m == float("-inf"), 0.0, tl.exp(m - peak))
    first = tl.min(tl.where(m == peak, argmax, n_vocabulary), axis=0)
    winner = (m == peak) & (argmax == first)
    gap = tl.where(scale > 0, m - peak, 0.0)
    slope = tl.sum(tl.where(scale > 0, (t + gap * (1 + s)) * scale, 0.0), axis=0)
    others = tl.sum(tl.where(winner, s, (1 + s) * scale), axis=0)
    if HAS_IDS:
        mass = mass * scale
    else:
        mass = tl.where(m == peak, mass, 0.0)
    place = row * n_splits + split
    tl.store(floats_ptr + place, peak)
    tl.store(floats_ptr + plane + place, others)
    tl.store(floats_ptr + 2 * plane + place, slope)
    tl.store(floats_ptr + 3 * plane + place, tl.sum(mass, axis=0))
    tl.store(counts_ptr + place, tl.sum(rank, axis=0))
    tl.store(counts_ptr + plane + place, first)


@triton.jit
def _backward_kernel(
    x_ptr, y_ptr, argmax_ptr, scalars_ptr, out_ptr, n_positions, n_vocabulary, plane, stride_b, stride_t,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += (row // n_positions) * stride_b + (row % n_positions) * stride_t
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n_vocabulary
    x = tl.load(x_ptr + columns, mask=inside, other=float("-inf")).to(tl.float32)
    scalars_ptr += row
    peak = tl.load(scalars_ptr)
    log_norm = tl.load(scalars_ptr + plane)
    constant = tl.load(scalars_ptr + 2 * plane)
    g_entropy = tl.load(scalars_ptr + 3 * plane)
    g_mass = tl.load(scalars_ptr + 4 * plane)
    x_y = tl.load(scalars_ptr + 5 * plane)
    log_p = x - peak - log_norm
    p = tl.exp(log_p)
    slope = constant + tl.where(x >= x_y, g_mass, 0.0)
    gradient = tl.where(p > 0, p * (slope - g_entropy * log_p), 0.0)
    gradient += tl.where(columns == tl.load(y_ptr + row), tl.load(scalars_ptr + 6 * plane), 0.0)
    gradient += tl.where(columns == tl.load(argmax_ptr + row), tl.load(scalars_ptr + 7 * plane), 0.0)
    tl.store(out_ptr + row * n_vocabulary + columns, gradient.to(out_ptr.dtype.element_ty), mask=inside)
