"""knockout_attention against a softmax written out row by row, and against masked SDPA."""

import math

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import assert_close, poison_allocator

from tokenbook.kernels.knockout_attention import knockout_attention

SHAPES = {  # R, H, H_k, T, n, d, d_v, G
    "one row": (1, 1, 1, 1, 1, 8, 8, 1),
    "last query of many flows": (7, 4, 4, 1, 63, 16, 16, 3),
    "grouped queries": (3, 6, 2, 5, 130, 24, 24, 5),
    "odd widths": (2, 2, 1, 3, 70, 5, 11, 62),
}


def case(name, dtype=torch.float32, device="cpu", per_head=True, seed=0):
    n_rows, n_heads, n_key_heads, n_queries, n, width, width_v, n_groups = SHAPES[name]
    g = torch.Generator().manual_seed(seed)
    query = 2 * torch.randn(n_rows, n_heads, n_queries, width, generator=g)
    key = torch.randn(n_key_heads, n, width, generator=g)
    value = torch.randn(n_key_heads, n, width_v, generator=g)
    groups = torch.randint(n_groups, (n,), generator=g)
    groups[0] = 0
    blocked = torch.rand(n_rows, *([n_heads] if per_head else []), n_groups, generator=g) < 0.5
    blocked[..., 0] = False  # key 0 is in sight of every query
    positions = torch.randint(n, (n_queries,), generator=g)
    qkv = [tensor.to(device, dtype) for tensor in (query, key, value)]
    return (*qkv, groups.to(device), blocked.to(device)), positions.to(device)


def by_hand(query, key, value, groups, blocked, positions, sink=None, scale=None):
    """Every query by itself, in float64, over the keys that remain."""
    query, key, value = query.double().cpu(), key.double().cpu(), value.double().cpu()
    groups, blocked, positions = groups.cpu(), blocked.cpu(), positions.cpu()
    n_rows, n_heads, n_queries, width = query.shape
    repeat = n_heads // len(key)
    out = torch.full((n_rows, n_heads, n_queries, value.shape[-1]), math.nan, dtype=torch.float64)
    for r in range(n_rows):
        for h in range(n_heads):
            closed = blocked[r] if blocked.ndim == 2 else blocked[r, h]
            for i in range(n_queries):
                seen = [
                    j
                    for j in range(key.shape[1])
                    if j <= positions[i] and (j == sink or not closed[groups[j]])
                ]
                scores = key[h // repeat, seen] @ query[r, h, i] * (width**-0.5 if scale is None else scale)
                out[r, h, i] = scores.softmax(0) @ value[h // repeat, seen]
    return out


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_equals_the_remaining_keys_taken_alone(name, per_head, backend):
    arguments, positions = case(name, per_head=per_head)
    found = knockout_attention(*arguments, query_positions=positions, backend=backend)
    assert_close(found, by_hand(*arguments, positions))


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", SHAPES)
def test_triton_equals_the_remaining_keys_taken_alone(name, dtype):
    arguments, positions = case(name, dtype)
    found = knockout_attention(*arguments, query_positions=positions, backend="triton")
    assert_close(found, by_hand(*arguments, positions))


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_equals_masked_sdpa_to_1e_6(backend):
    (query, key, value, groups, blocked), _ = case("last query of many flows", per_head=False)
    n_rows = len(query)
    mask = ~blocked[:, groups][:, None, None]
    shared = [tensor.expand(n_rows, *tensor.shape) for tensor in (key, value)]
    expected = F.scaled_dot_product_attention(query, *shared, attn_mask=mask)
    found = knockout_attention(query, key, value, groups, blocked, backend=backend)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_autocast_does_not_lower_the_precision():
    arguments, positions = case("grouped queries")
    expected = knockout_attention(*arguments, query_positions=positions)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(knockout_attention(*arguments, query_positions=positions), expected)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_blocked_keys_have_no_influence_whatever_they_hold(backend):
    (query, key, value, groups, blocked), _ = case("grouped queries", per_head=False)
    blocked[:] = False
    blocked[:, 3] = True
    before = knockout_attention(query, key, value, groups, blocked, backend=backend)
    key[:, groups == 3], value[:, groups == 3] = 1e4, -1e4
    assert torch.equal(knockout_attention(query, key, value, groups, blocked, backend=backend), before)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_the_sink_stays_visible_and_alone_it_takes_all(backend):
    (query, key, value, groups, blocked), positions = case("grouped queries")
    positions = positions.clamp(min=9)
    found = knockout_attention(
        query, key, value, groups, blocked, query_positions=positions, sink=9, scale=0.3, backend=backend
    )
    assert_close(found, by_hand(query, key, value, groups, blocked, positions, sink=9, scale=0.3))
    alone = knockout_attention(query, key, value, groups, blocked | True, sink=9, backend=backend)
    expected = value[:, 9].repeat_interleave(3, 0)[None, :, None].expand_as(alone)
    torch.testing.assert_close(alone, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_huge_scores_and_strided_inputs(backend):
    (query, key, value, groups, blocked), positions = case("grouped queries")
    strided = [
        tensor.transpose(-1, -2).contiguous().transpose(-1, -2) for tensor in (300 * query, key, value)
    ]
    found = knockout_attention(*strided, groups, blocked, query_positions=positions, backend=backend)
    assert_close(found, by_hand(300 * query, key, value, groups, blocked, positions), 2e-5)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_gradients_equal_those_of_the_definition(backend):
    (query, key, value, groups, blocked), positions = case("grouped queries")
    gradients = []
    for dtype, name in ((torch.float32, backend), (torch.float64, "reference")):
        leaves = [tensor.clone().to(dtype).requires_grad_() for tensor in (query, key, value)]
        out = knockout_attention(*leaves, groups, blocked, query_positions=positions, backend=name)
        out.sin().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for found, expected in zip(*gradients, strict=True):
        assert_close(found, expected, 2e-6)


def test_gradients_by_finite_differences():
    (*qkv, groups, blocked), positions = case("odd widths", torch.float64)
    qkv = [tensor[..., :9, :4] if tensor.ndim == 3 else tensor[..., :4] for tensor in qkv]
    positions = positions.clamp(max=8)

    def function(*x):
        return knockout_attention(*x, groups[:9], blocked, query_positions=positions)

    assert torch.autograd.gradcheck(function, [tensor.clone().requires_grad_() for tensor in qkv])


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_fully_blocked_query_is_refused_unless_a_sink_is_named(backend):
    (query, key, value, groups, blocked), positions = case("grouped queries", per_head=False)
    blocked[1] = True
    with pytest.raises(ValueError, match="row 1, head 0, query 0: every key is blocked"):
        knockout_attention(query, key, value, groups, blocked, backend=backend)
    # blocked only as far as this query can see
    groups[:] = 1
    groups[:50], blocked[:] = 0, False
    blocked[2, 0] = True
    positions[3], others = 49, [0, 1, 2, 4]
    positions[others] = 60
    with pytest.raises(ValueError, match="row 2, head 0, query 3: every key is blocked"):
        knockout_attention(query, key, value, groups, blocked, query_positions=positions, backend=backend)
    found = knockout_attention(
        query, key, value, groups, blocked, query_positions=positions, sink=0, backend=backend
    )
    assert found.isfinite().all()


def replaced(index, change):
    def make():
        arguments, _ = case("grouped queries")
        arguments = list(arguments)
        arguments[index] = change(arguments[index])
        return arguments, {}

    return make


def option(**options):
    return lambda: (case("grouped queries")[0], options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (replaced(0, lambda q: q[0]), r"query must be non-empty floats \[R, H, T, d\]"),
        (replaced(0, lambda q: q[:0]), r"query must be non-empty floats \[R, H, T, d\]"),
        (replaced(1, lambda k: k.half()), "key must be torch.float32 as the query is"),
        (replaced(1, lambda k: k[:, :-1]), "must share H_k and n"),
        (replaced(0, lambda q: q[:, :5]), "H_k must divide H"),
        (replaced(3, lambda g: g + 1), r"key_groups must lie in 0\.\.4, got 5"),
        (replaced(3, lambda g: g.float()), "key_groups must be integers"),
        (replaced(3, lambda g: g[:-1]), r"key_groups must be integers \[130\]"),
        (replaced(4, lambda b: b.int()), "blocked must be bool"),
        (replaced(4, lambda b: b[:, :2]), r"blocked must be bool \[3, G\] or \[3, 6, G\]"),
        (option(sink=130), r"sink must lie in 0\.\.129, got 130"),
        (
            option(query_positions=torch.tensor([0, 1, 2, 3, 130])),
            r"query_positions must lie in 0\.\.129, got 130",
        ),
        (option(query_positions=torch.tensor([0])), r"query_positions must be integers \[5\]"),
        (option(backend="flash"), "backend must be one of"),
    ],
)
def test_bad_arguments_are_named(make, message):
    arguments, options = make()
    with pytest.raises(ValueError, match=message):
        knockout_attention(*arguments, **options)


@pytest.mark.interpreter
def test_triton_says_which_head_widths_it_takes():
    query, key = torch.randn(1, 1, 2, 160), torch.randn(1, 5, 160)
    arguments = (query, key, key, torch.zeros(5, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"cannot run here: the head width is above 128 in torch\.float32"):
        knockout_attention(*arguments, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_cuda_every_configuration_twice(name, dtype):
    from tokenbook.kernels import _knockout_attention_triton as kernels

    (query, key, value, groups, blocked), positions = case(name, dtype, "cuda")
    arguments = (query, key, value, groups, blocked, positions, None, query.shape[-1] ** -0.5)
    expected = by_hand(query, key, value, groups, blocked, positions)
    for config in kernels.CONFIGS[dtype == torch.float32]:
        poison_allocator()
        found = kernels.forward(*arguments, config=config)
        assert_close(found, expected)
        assert torch.equal(found, kernels.forward(*arguments, config=config))
    tuned = knockout_attention(query, key, value, groups, blocked, query_positions=positions)
    assert_close(tuned, expected)
