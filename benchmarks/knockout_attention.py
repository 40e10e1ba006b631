"""knockout_attention beside SDPA with a mask a row, and FlexAttention."""

import torch
import torch.nn.functional as F

from benchmarks.harness import Case, Variant
from tokenbook.kernels.knockout_attention import knockout_attention

SHAPES = {
    # rows = flows x windows of layers; keys = the prompt
    "last position, text": {"R": 96, "H": 16, "T": 1, "n": 256, "d": 64, "G": 4},
    "question tokens, image prompt": {"R": 32, "H": 16, "T": 12, "n": 640, "d": 64, "G": 6},
}


def cases(device: torch.device) -> list[Case]:
    dtypes = ("float32", "bfloat16") if device.type == "cuda" else ("float32",)
    return [_case(name, shape, dtype) for name, shape in SHAPES.items() for dtype in dtypes]


def _case(name, shape, dtype) -> Case:
    n_rows, n_heads, n_queries, n, width, n_groups = shape.values()
    real = getattr(torch, dtype)

    def build(device):
        torch.manual_seed(0)
        query = torch.randn(n_rows, n_heads, n_queries, width, device=device).to(real)
        key, value = (torch.randn(n_heads, n, width, device=device).to(real) for _ in range(2))
        groups = torch.randint(n_groups, (n,), device=device)
        blocked = torch.rand(n_rows, n_groups, device=device) < 0.3
        blocked[:, 0] = False
        mask = ~blocked[:, groups][:, None, None].expand(-1, 1, n_queries, -1)
        each = [tensor.expand(n_rows, -1, -1, -1) for tensor in (key, value)]
        return {
            "knockout_attention": lambda: knockout_attention(query, key, value, groups, blocked),
            "SDPA, a mask a row": lambda: F.scaled_dot_product_attention(query, *each, attn_mask=mask),
            "SDPA, keys copied a row": lambda: F.scaled_dot_product_attention(
                query, *(tensor.contiguous() for tensor in each), attn_mask=mask
            ),
            "FlexAttention": Variant(_flex(query, each, groups, blocked), optional=True),
        }

    moved = real.itemsize * n_heads * width * (2 * n + 2 * n_rows * n_queries)
    return Case(name, shape, dtype, "forward", build, moved)


def _flex(query, each, groups, blocked):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(row, head, query_index, key_index):
        return ~blocked[row, groups[key_index]]

    n_rows, _, n_queries, _ = query.shape
    block_mask = create_block_mask(visible, n_rows, None, n_queries, len(groups), device=query.device.type)
    compiled = torch.compile(flex_attention, dynamic=False)
    key, value = (tensor.contiguous() for tensor in each)
    return lambda: compiled(query, key, value, block_mask=block_mask)
