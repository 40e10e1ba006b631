"""Attention of a few query rows with blocked groups of keys, the keys shared by all rows.

Many interventions on one prompt differ only in which keys their query may not see. For row r, head h, query i
at position t_i and key j of group g_j

    visible(r, h, i, j) = (not blocked[r, h, g_j]  or  j = sink)  and  j <= t_i
    out[r, h, i] = sum_j softmax_j(scale q[r, h, i] . k[h', j] over the visible j) v[h', j]

with h' the key head of query head h (grouped queries: H a multiple of the number of key heads).

Cost: O(R H T n d). No key is copied per row, and the Triton kernel holds no mask [R, H, T, n]: it computes it
from one group number a key and one bit set a row. The rows are folded into the queries, so that each key is
read once for many rows instead of once a row. A blocked key has weight exactly 0.

Dtypes: float16, bfloat16 and float32 with float32 sums; float64 on the torch path.

Delicate: a boolean rule, never the addition of large negative numbers, which overflow to -inf or leave a
uniform row; a row without a visible key has no softmax and is refused. In float32 the products are done in
float32, not TF32: equal to masked scaled_dot_product_attention to 1e-6.

Used by all-for-one, prism and cross-modal-flow; `tokenbook.models.knockout` cuts edges in whole models.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenbook.kernels._dispatch import choose_backend

MAX_GROUPS = 62  # one bit each in an int64


def knockout_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_groups: Tensor,
    blocked: Tensor,
    *,
    query_positions: Tensor | None = None,
    sink: int | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of R rows of queries over one set of keys, of which each row has some groups blocked.

    Args:
        query: [R, H, T, d].
        key, value: [H_k, n, d] and [H_k, n, d_v], shared by all rows; H is a multiple of H_k.
        key_groups: integers [n] in 0..G-1, the group of each key; at most 62 groups.
        blocked: bool [R, G], or [R, H, G] to differ by head; True = the row does not see the group.
        query_positions: integers [T] in 0..n-1; a query sees keys up to its position. None = all keys.
        sink: a key that blocking leaves visible (causality still holds); None = no such key.
        scale: factor of the scores; None = 1 / sqrt(d).
        backend: "auto", "triton", "torch" or "reference".

    Returns: [R, H, T, d_v] in the query's dtype.

    Raises ValueError for shapes, dtypes, devices, groups or positions that do not fit, and for a query all of
    whose keys are blocked.
    """
    _check_tensors(query, key, value)
    groups, closed, positions = _check_blocks(query, key, key_groups, blocked, query_positions, sink)
    _refuse_empty_rows(groups, closed, positions, sink)
    widest = 128 if query.dtype == torch.float32 else 256  # float32 products are unrolled: minutes to compile
    unsupported = None
    if max(query.shape[-1], value.shape[-1]) > widest:
        unsupported = f"the head width is above {widest} in {query.dtype}"
    tensors = {"query": query, "key": key, "value": value, "key_groups": key_groups, "blocked": blocked}
    chosen = choose_backend("knockout_attention", backend, tensors, unsupported)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    arguments = (query, key, value, groups, closed, positions, sink, scale)
    with torch.autocast(query.device.type, enabled=False):  # the products keep the query's dtype
        if chosen == "reference":
            return knockout_attention_reference(*arguments)
        return _Triton.apply(*arguments) if chosen == "triton" else _torch(*arguments)


def knockout_attention_reference(query, key, value, groups, blocked, positions, sink, scale) -> Tensor:
    """The definition: a mask of -inf before the softmax; differentiable by torch."""
    repeat = query.shape[1] // key.shape[0]
    key, value = key.repeat_interleave(repeat, 0), value.repeat_interleave(repeat, 0)
    scores = scale * torch.einsum("rhtd,hnd->rhtn", query, key)
    visible = _visible(groups, blocked, positions, sink)
    return torch.einsum("rhtn,hnd->rhtd", scores.masked_fill(~visible, -torch.inf).softmax(-1), value)


def _visible(groups, blocked, positions, sink) -> Tensor:
    """bool [R, 1 or H, T, n]."""
    visible = ~blocked[..., groups]  # [R, 1 or H, n]
    if sink is not None:
        visible[..., sink] = True
    causal = torch.arange(len(groups), device=groups.device) <= positions[:, None]
    return visible[:, :, None] & causal


def _check_tensors(query, key, value) -> None:
    for name, tensor, form in (
        ("query", query, "[R, H, T, d]"),
        ("key", key, "[H_k, n, d]"),
        ("value", value, "[H_k, n, d_v]"),
    ):
        if tensor.ndim != form.count(",") + 1 or tensor.numel() == 0 or not tensor.is_floating_point():
            raise ValueError(
                f"{name} must be non-empty floats {form}, got {tensor.dtype} {list(tensor.shape)}"
            )
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name} must be {query.dtype} as the query is, got {tensor.dtype}")
    if key.shape[:2] != value.shape[:2] or key.shape[2] != query.shape[3] or query.shape[1] % key.shape[0]:
        raise ValueError(
            "key [H_k, n, d] and value [H_k, n, d_v] must share H_k and n, key the query's d, and H_k must "
            f"divide H; got query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
        )


def _check_blocks(query, key, key_groups, blocked, positions, sink):
    """The groups [n], the blocks [R, 1 or H, G] and the positions [T], all checked."""
    (n_rows, n_heads, n_queries, _), n_keys = query.shape, key.shape[1]
    shapes = [(n_rows, blocked.shape[-1]), (n_rows, n_heads, blocked.shape[-1])] if blocked.ndim else []
    if (
        blocked.dtype != torch.bool
        or tuple(blocked.shape) not in shapes
        or not 1 <= blocked.shape[-1] <= MAX_GROUPS
    ):
        raise ValueError(
            f"blocked must be bool [{n_rows}, G] or [{n_rows}, {n_heads}, G] with G in 1..{MAX_GROUPS}, got "
            f"{blocked.dtype} {list(blocked.shape)}"
        )
    groups = _check_integers("key_groups", key_groups, n_keys, blocked.shape[-1])
    if positions is None:
        positions = torch.full((n_queries,), n_keys - 1, device=query.device)
    positions = _check_integers("query_positions", positions, n_queries, n_keys)
    if sink is not None and not 0 <= sink < n_keys:
        raise ValueError(f"sink must lie in 0..{n_keys - 1}, got {sink}")
    return groups, blocked if blocked.ndim == 3 else blocked[:, None], positions


def _check_integers(name: str, tensor: Tensor, length: int, bound: int) -> Tensor:
    if tensor.shape != (length,) or tensor.is_floating_point() or tensor.dtype == torch.bool:
        raise ValueError(f"{name} must be integers [{length}], got {tensor.dtype} {list(tensor.shape)}")
    low, high = (int(end) for end in tensor.aminmax())
    if low < 0 or high >= bound:
        raise ValueError(f"{name} must lie in 0..{bound - 1}, got {low if low < 0 else high}")
    return tensor.long()


def _refuse_empty_rows(groups, blocked, positions, sink) -> None:
    """A group is in sight of a query from its first key on: [R, H, T, G] decides, no [R, H, T, n] is made."""
    n_groups, n_keys = blocked.shape[-1], len(groups)
    first = torch.full((n_groups,), n_keys, device=groups.device)
    first.scatter_reduce_(0, groups, torch.arange(n_keys, device=groups.device), "amin")
    reached = first <= positions[:, None]  # [T, G]
    seen = (reached & ~blocked[:, :, None]).any(-1)  # [R, 1 or H, T]
    if sink is not None:
        seen = seen | (positions >= sink)
    if not seen.all():
        row, head, query = (~seen).nonzero()[0].tolist()
        raise ValueError(
            f"row {row}, head {head}, query {query}: every key is blocked; leave one, or name a sink"
        )


def _torch(query, key, value, groups, blocked, positions, sink, scale) -> Tensor:
    """Rows folded into the queries: one product of [R T, d] with the keys instead of R of [T, d]."""
    n_rows, n_heads, n_queries, width = query.shape
    folded = query.transpose(0, 1).reshape(1, n_heads, n_rows * n_queries, width)
    visible = _visible(groups, blocked, positions, sink).transpose(0, 1)  # [1 or H, R, T, n]
    visible = visible.reshape(1, visible.shape[0], n_rows * n_queries, -1)
    repeat = n_heads // key.shape[0]
    out = F.scaled_dot_product_attention(
        folded, key[None], value[None], attn_mask=visible, scale=scale, enable_gqa=repeat > 1
    )
    return out.view(n_heads, n_rows, n_queries, -1).transpose(0, 1)


class _Triton(torch.autograd.Function):
    """Triton forward; the backward pass goes through the torch path, the same values to rounding."""

    @staticmethod
    def forward(ctx, query, key, value, groups, blocked, positions, sink, scale):
        from tokenbook.kernels._knockout_attention_triton import forward

        ctx.save_for_backward(query, key, value, groups, blocked, positions)
        ctx.sink, ctx.scale = sink, scale
        return forward(query, key, value, groups, blocked, positions, sink, scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        *qkv, groups, blocked, positions = ctx.saved_tensors
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in qkv]
            out = _torch(*leaves, groups, blocked, positions, ctx.sink, ctx.scale)
        return *torch.autograd.grad(out, leaves, grad), None, None, None, None, None
