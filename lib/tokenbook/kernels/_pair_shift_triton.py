"""The Triton kernel of `pair_shift`'s second stream; this module, which imports Triton, loads where used."""

import functools

import torch
import triton
import triton.language as tl

from tokenbook.kernels._dispatch import interpreting

CONFIGS = tuple((block, warps) for block in (1024, 2048, 4096) for warps in (4, 8))  # lanes, warps a program


def divergence(x, y, x_norm, y_norm, n_splits: int | None = None, config: tuple[int, int] | None = None):
    """KL [B, T] of logits [B, T, V] with their log-normalisers [B, T]; one program a row and part of V."""
    n_batch, n_positions, n_vocabulary = x.shape
    n_rows = n_batch * n_positions
    if n_splits is None:  # enough programs to fill the device when there are few rows
        n_processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
        n_splits = max(1, min(4 * n_processors // n_rows, n_vocabulary // 8192))
    sums = torch.empty(n_rows, n_splits, dtype=torch.float32, device=x.device)
    arguments = (
        x, y, x_norm.contiguous(), y_norm.contiguous(), sums, n_positions, n_vocabulary,
        -(-n_vocabulary // n_splits), n_splits, x.stride(0), x.stride(1), y.stride(0), y.stride(1),
    )  # fmt: skip
    if config is None and not interpreting():
        _tuned()[(n_rows, n_splits)](*arguments)
    else:
        block, warps = config or CONFIGS[0]
        _kernel[(n_rows, n_splits)](*arguments, BLOCK=block, num_warps=warps)
    return sums.sum(1).view(n_batch, n_positions)


@functools.cache
def _tuned():
    configs = [triton.Config({"BLOCK": block}, num_warps=warps) for block, warps in CONFIGS]
    return triton.autotune(configs, key=["n_vocabulary"])(_kernel)


@triton.jit
def _kernel(
    x_ptr, y_ptr, x_norm_ptr, y_norm_ptr, sums_ptr, n_positions, n_vocabulary, part, n_splits,
    x_stride_b, x_stride_t, y_stride_b, y_stride_t, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    x_ptr += (row // n_positions) * x_stride_b + (row % n_positions) * x_stride_t
    y_ptr += (row // n_positions) * y_stride_b + (row % n_positions) * y_stride_t
    x_norm = tl.load(x_norm_ptr + row)
    y_norm = tl.load(y_norm_ptr + row)
    total = tl.zeros([BLOCK], tl.float32)
    end = tl.minimum((split + 1) * part, n_vocabulary)
    for start in range(split * part, end, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + columns, mask=columns < end, other=float("-inf")).to(tl.float32)
        y = tl.load(y_ptr + columns, mask=columns < end, other=float("-inf")).to(tl.float32)
        p = tl.exp(x - x_norm)
        q = tl.exp(y - y_norm)
        impossible = x == float("-inf")
        u = tl.where(impossible, 0.0, (y - x) - (y_norm - x_norm))
        series = 1 / 362880 * u + 1 / 40320
        series = series * u + 1 / 5040
        series = series * u + 1 / 720
        series = series * u + 1 / 120
        series = series * u + 1 / 24
        series = series * u + 1 / 6
        series = (series * u + 0.5) * u * u * p
        excluded = u == float("-inf")
        far = q - p - tl.where(p > 0, p * u, 0.0)
        term = tl.where(tl.abs(u) < 0.5, series, far)
        term = tl.where(excluded, float("inf"), term)
        total += tl.where(impossible, q, term)
    tl.store(sums_ptr + row * n_splits + split, tl.sum(total, axis=0))
