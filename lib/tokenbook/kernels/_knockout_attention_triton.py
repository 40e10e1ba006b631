"""The Triton kernel of `knockout_attention`; this module imports Triton, and is imported where it runs."""

import functools

import torch
import triton
import triton.language as tl

from tokenbook.kernels._dispatch import interpreting

# Queries, keys and warps a program, by whether all is float32. There the products are scalar code (no TF32),
# unrolled: small tiles, or the compiler takes minutes. Halves go to the tensor cores, which add in float32.
CONFIGS = {
    True: ((16, 32, 4), (16, 64, 4), (32, 32, 4)),
    False: ((16, 64, 4), (16, 128, 4), (32, 64, 4), (64, 64, 4), (64, 128, 8)),
}


def forward(
    query, key, value, groups, blocked, positions, sink, scale, config: tuple[int, int, int] | None = None
):
    """[R, H, T, d_v] from arguments already checked; `config` is for tests."""
    n_rows, n_heads, n_queries, width = query.shape
    n_key_heads, n_keys, width_v = value.shape
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    bit = torch.arange(blocked.shape[-1], device=query.device)
    closed = (blocked.long() << bit).sum(-1).expand(n_rows, n_heads).contiguous()  # [R, H], one bit a group
    out = torch.empty(n_rows, n_heads, n_queries, width_v, dtype=query.dtype, device=query.device)
    n_folded = n_rows * n_queries
    arguments = (
        query, key, value, groups.int(), closed, positions.int(), out, n_heads, n_heads // n_key_heads,
        n_queries, n_folded, n_keys, width, width_v, -1 if sink is None else sink, scale * 1.4426950408889634,
    )  # fmt: skip
    widths = {
        "WIDTH": max(16, triton.next_power_of_2(width)),
        "WIDTH_V": max(16, triton.next_power_of_2(width_v)),
    }
    grid = lambda meta: (triton.cdiv(n_folded, meta["QUERIES"]), n_heads)  # noqa: E731
    if config is None and not interpreting():
        _tuned(query.dtype == torch.float32)[grid](*arguments, **widths)
    else:
        queries, keys, warps = config or CONFIGS[query.dtype == torch.float32][0]
        _kernel[grid](*arguments, **widths, QUERIES=queries, KEYS=keys, num_warps=warps, num_stages=2)
    return out


@functools.cache
def _tuned(is_float32: bool):
    configs = [
        triton.Config({"QUERIES": queries, "KEYS": keys}, num_warps=warps, num_stages=2)
        for queries, keys, warps in CONFIGS[is_float32]
    ]
    return triton.autotune(configs, key=["n_folded", "n_keys", "width", "width_v"])(_kernel)


@triton.jit
def _kernel(
    q_ptr, k_ptr, v_ptr, groups_ptr, closed_ptr, positions_ptr, out_ptr, n_heads, n_repeat, n_queries,
    n_folded, n_keys, width, width_v, sink, scale,
    WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A block of (row, query) pairs of one head, streaming over the keys; scores in powers of two."""
    folded = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    head = tl.program_id(1)
    inside = folded < n_folded
    row, query = folded // n_queries, folded % n_queries
    place = (row.to(tl.int64) * n_heads + head) * n_queries + query  # of a query in [R, H, T]
    channel = tl.arange(0, WIDTH)
    channel_v = tl.arange(0, WIDTH_V)
    q = tl.load(q_ptr + place[:, None] * width + channel, mask=inside[:, None] & (channel < width), other=0.0)
    closed = tl.load(closed_ptr + row * n_heads + head, mask=inside, other=0)
    position = tl.load(positions_ptr + query, mask=inside, other=0)
    key_head = (head // n_repeat).to(tl.int64)
    k_ptr += key_head * n_keys * width
    v_ptr += key_head * n_keys * width_v
    peak = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    out = tl.zeros([QUERIES, WIDTH_V], tl.float32)
    for start in range(0, tl.max(position, axis=0) + 1, KEYS):
        keys = start + tl.arange(0, KEYS)
        present = keys < n_keys
        keys = keys.to(tl.int64)
        k = tl.load(
            k_ptr + keys[:, None] * width + channel, mask=present[:, None] & (channel < width), other=0.0
        )
        v = tl.load(
            v_ptr + keys[:, None] * width_v + channel_v,
            mask=present[:, None] & (channel_v < width_v),
            other=0.0,
        )
        group = tl.load(groups_ptr + keys, mask=present, other=0).to(tl.int64)
        open_ = (((closed[:, None] >> group[None, :]) & 1) == 0) | (keys == sink)[None, :]
        visible = open_ & (keys[None, :] <= position[:, None]) & present[None, :]
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing visible yet
        weight = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(weight, axis=1)
        out = out * shrink[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        peak = higher
    out = out / total[:, None]
    tl.store(
        out_ptr + place[:, None] * width_v + channel_v,
        out.to(out_ptr.dtype.element_ty),
        mask=inside[:, None] & (channel_v < width_v),
    )
