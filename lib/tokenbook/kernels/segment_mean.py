"""The mean of each segment's rows: m_k = sum over rows i with segment k of x_i, divided by their number.

Shapes: x [N, D] or [B, N, D], floating; segments [N] or [B, N], integer, in any order; means [K, D] or
[B, K, D] in x's dtype, counts [K] or [B, K]. Segments of different batch rows are different segments.
O(N D + N log N): rows are sorted by segment (stably) and each segment's rows are added up where they lie.

Delicate: sums of thousands of float32 rows lose digits, so at most PART rows are added in one float32 sum and
these partial sums are added again, the last in float64 on the torch path. Half dtypes are upcast first. No
atomics: two runs agree to the bit. A segment without rows has no mean; `empty` says what then. The gradient
dx_i = dm_k / count_k is a division over K rows and one gather: no byte too many, no kernel needed.

Used by the chapters `vqtoken` (code vectors, 2503.16980, section 3) and `all-for-one` (conditional means,
section 3), where a missing (position, token) pair must be an error and not a zero.
"""

import functools
from typing import NamedTuple

import torch

from tokenbook.kernels._dispatch import choose_backend

PART = 256
EMPTY = ("raise", "zero", "nan")


class SegmentMean(NamedTuple):
    """Means [(B,) K, D] in x's dtype and the number of rows behind each, int64 [(B,) K]."""

    mean: torch.Tensor
    count: torch.Tensor


def segment_mean(
    x: torch.Tensor, segments: torch.Tensor, n_segments: int, *, empty: str = "raise", backend: str = "auto"
) -> SegmentMean:
    """Average the rows of each segment.

    Args:
        x: rows [N, D] or [B, N, D], floating, not empty.
        segments: the segment of each row, int64 or int32 [N] or [B, N], each 0..n_segments - 1.
        n_segments: number of segments K, at least 1.
        empty: what a segment without rows gives: "raise" a ValueError that names the first such segment,
            "zero" or "nan" as its mean.
        backend: "auto", "triton", "torch" or "reference".

    Returns: SegmentMean(mean, count); mean is differentiable in x.

    Raises ValueError naming the argument, what was given and what is allowed.
    """
    _check(x, segments, n_segments, empty)
    chosen = choose_backend("segment_mean", backend, {"x": x, "segments": segments})
    low, high = (int(v) for v in torch.aminmax(segments))
    if low < 0 or high >= n_segments:
        raise ValueError(f"segments must be 0..{n_segments - 1}, got {low if low < 0 else high}")
    batch = x.shape[0] if x.dim() == 3 else 1
    offsets = n_segments * torch.arange(batch, device=x.device)
    keys = (segments.reshape(batch, -1).long() + offsets[:, None]).flatten()  # (B N,)
    counts = torch.bincount(keys, minlength=batch * n_segments)
    if empty == "raise" and not counts.all():
        missing = int((counts == 0).nonzero()[0])
        row = f" of batch row {missing // n_segments}" if x.dim() == 3 else ""
        raise ValueError(
            f"segments must give every segment a row (or name empty='zero' or 'nan'), "
            f"got none for segment {missing % n_segments}{row}"
        )
    shape = (*x.shape[:-2], n_segments)
    if chosen == "reference":
        mean = segment_mean_reference(x, segments, n_segments)
    else:
        mean = _SegmentMean.apply(x.reshape(-1, x.shape[-1]), keys, counts, chosen == "triton")
        mean = mean.view(*shape, x.shape[-1])
    counts = counts.view(shape)
    if empty == "nan":
        mean = mean.masked_fill(counts[..., None] == 0, torch.nan)
    return SegmentMean(mean, counts)


def segment_mean_reference(x: torch.Tensor, segments: torch.Tensor, n_segments: int) -> torch.Tensor:
    """The definition: one segment after the other, in float64, differentiable; empty segments give zeros."""
    if x.dim() == 3:
        rows = zip(x, segments, strict=True)
        return torch.stack([segment_mean_reference(*row, n_segments) for row in rows])
    members = [x[segments == k].double() for k in range(n_segments)]
    return torch.stack([rows.sum(0) / max(1, len(rows)) for rows in members]).to(x.dtype)


class _SegmentMean(torch.autograd.Function):
    """x [M, D], keys [M], counts [S] -> means [S, D]; linear, so its gradient is differentiable again."""

    @staticmethod
    def forward(ctx, x, keys, counts, use_triton):
        ctx.save_for_backward(keys, counts)
        add = _sum_runs_triton if use_triton else _sum_runs_torch
        order = torch.argsort(keys, stable=True)
        starts = counts.cumsum(0) - counts
        if int(counts.max()) > PART:
            parts_per_segment = (counts + PART - 1) // PART
            first_part = parts_per_segment.cumsum(0) - parts_per_segment
            owner = torch.repeat_interleave(parts_per_segment)
            part = torch.arange(len(owner), device=x.device) - first_part[owner]
            sums = add(x, order, starts[owner] + PART * part)
            order, starts = torch.arange(len(sums), device=x.device), first_part
            x_summed = sums if use_triton else sums.double()
        else:
            x_summed = x
        sums = add(x_summed, order, starts)
        return (sums / counts.clamp(min=1)[:, None]).to(x.dtype)

    @staticmethod
    def backward(ctx, dmean):
        keys, counts = ctx.saved_tensors
        return (dmean / counts.clamp(min=1)[:, None].to(dmean.dtype)).index_select(0, keys), None, None, None


def _sum_runs_torch(x, order, starts):
    """Sums [S, D] of x[order[starts[s] : starts[s + 1]]]; embedding_bag adds rows without copying them."""
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    return torch.nn.functional.embedding_bag(order, x, starts, mode="sum")


def _sum_runs_triton(x, order, starts):
    """The same by the kernel; float32 sums."""
    import triton

    sums = torch.empty(len(starts), x.shape[1], dtype=torch.float32, device=x.device)
    ends = torch.cat([starts[1:], starts.new_tensor([len(order)])])
    grid = lambda meta: (len(starts), triton.cdiv(x.shape[1], meta["BLOCK"]))  # noqa: E731
    _kernel()[grid](x, order, starts, ends, sums, x.shape[1], *x.stride())
    return sums


@functools.cache
def _kernel():
    import triton
    import triton.language as tl

    from tokenbook.kernels._dispatch import interpreting

    configs = [
        triton.Config({"ROWS": rows, "BLOCK": block}, num_warps=warps)
        for rows, block, warps in ((8, 128, 4), (16, 64, 4), (4, 256, 4), (32, 32, 4), (4, 128, 2))
    ]

    @triton.autotune(configs[:1] if interpreting() else configs, key=["width"])
    @triton.jit
    def sum_runs(
        x_ptr, order_ptr, starts_ptr, ends_ptr, sums_ptr, width, x_row, x_column,
        ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        run = tl.program_id(0).to(tl.int64)
        d = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        start, end = tl.load(starts_ptr + run), tl.load(ends_ptr + run)
        total = tl.zeros([ROWS, BLOCK], tl.float32)
        for first in range(start, end, ROWS):
            i = first + tl.arange(0, ROWS)
            row = tl.load(order_ptr + i, mask=i < end, other=0)
            mask = (i < end)[:, None] & (d < width)[None, :]
            place = row[:, None] * x_row + d[None, :] * x_column
            total += tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(sums_ptr + run * width + d, tl.sum(total, axis=0), mask=d < width)

    return sum_runs


def _check(x, segments, n_segments, empty) -> None:
    for name, tensor in {"x": x, "segments": segments}.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.dim() not in (2, 3) or x.numel() == 0:
        raise ValueError(f"x must be [N, D] or [B, N, D] and not empty, got shape {list(x.shape)}")
    if segments.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"segments must be int32 or int64, got {segments.dtype}")
    if segments.shape != x.shape[:-1]:
        raise ValueError(f"segments must be {list(x.shape[:-1])}, x without D; got {list(segments.shape)}")
    if not isinstance(n_segments, int) or isinstance(n_segments, bool) or n_segments < 1:
        raise ValueError(f"n_segments must be an integer of at least 1, got {n_segments!r}")
    if empty not in EMPTY:
        raise ValueError(f"empty must be one of {', '.join(EMPTY)}; got {empty!r}")
