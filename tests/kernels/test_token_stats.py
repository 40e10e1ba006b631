"""token_stats against float64 formulas written out here, on both back ends."""

import math

import pytest
import torch
from kernel_checks import assert_close, poison_allocator

from tokenbook.kernels import token_stats as module
from tokenbook.kernels.token_stats import TokenStats, token_stats, token_stats_reference

FLOATS = ("log_prob", "entropy", "confidence", "mass_above")
VOCABULARIES = (1, 2, 63, 500, 1031, 5000)


def case(n_vocabulary, seed=0, shape=(2, 5), scale=3.0, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(*shape, n_vocabulary, generator=generator)
    ids = torch.randint(n_vocabulary, shape, generator=generator)
    return logits.to(device, dtype), ids.to(device)


def by_hand(logits, ids):
    """Every statistic in float64 from its definition, sorted where sorting defines it."""
    x = logits.double().cpu()
    ids = ids.cpu()
    p = (x - x.amax(-1, keepdim=True)).exp()
    p = p / p.sum(-1, keepdim=True)
    x_y = x.gather(-1, ids[..., None])
    position = torch.arange(x.shape[-1]).expand_as(x)
    return TokenStats(
        log_prob=x_y.squeeze(-1) - x.logsumexp(-1),
        entropy=torch.special.entr(p).sum(-1),
        argmax=torch.where(x == x.amax(-1, keepdim=True), position, x.shape[-1]).amin(-1),
        confidence=p.amax(-1),
        rank=(x.sort(-1, descending=True).values > x_y).sum(-1),
        mass_above=p.masked_fill(x < x_y, 0).sum(-1),
    )


def assert_stats_close(found, expected, tolerance=2e-6):
    assert torch.equal(found.argmax.cpu(), expected.argmax)
    assert torch.equal(found.rank.cpu(), expected.rank)
    for name in FLOATS:
        value, wanted = getattr(found, name).cpu(), getattr(expected, name)
        assert_close(value, wanted, tolerance)


@pytest.mark.parametrize("n_vocabulary", VOCABULARIES)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_equals_the_float64_definition(n_vocabulary, backend):
    logits, ids = case(n_vocabulary, n_vocabulary)
    assert_stats_close(token_stats(logits, ids, backend=backend), by_hand(logits, ids))


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("n_vocabulary", VOCABULARIES)
def test_triton_equals_the_float64_definition(n_vocabulary, dtype):
    logits, ids = case(n_vocabulary, n_vocabulary, dtype=dtype)
    assert_stats_close(token_stats(logits, ids, backend="triton"), by_hand(logits, ids))
    without = token_stats(logits, backend="triton")
    assert_stats_close(without, by_hand(logits, without.argmax))


@pytest.mark.interpreter
@pytest.mark.parametrize("n_splits", [1, 2, 7])
def test_parts_of_the_vocabulary_are_put_together(n_splits, monkeypatch):
    from tokenbook.kernels import _token_stats_triton as kernels

    whole = kernels.partials
    monkeypatch.setattr(kernels, "partials", lambda x, ids: whole(x, ids, n_splits=n_splits))
    logits, ids = case(500, shape=(1, 2))
    logits[0, 0, 100:300] = -math.inf  # a whole part without a finite logit
    logits[0, 1, 3] = logits[0, 1, 450] = 20  # the maximum in two parts
    assert_stats_close(token_stats(logits, ids, backend="triton"), by_hand(logits, ids))
    tied = token_stats(logits, backend="triton")
    assert tied.argmax[0, 1] == 3
    assert tied.mass_above[0, 1].item() == pytest.approx(2 * tied.confidence[0, 1].item(), rel=1e-6)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_ties_go_to_the_lowest_index_and_do_not_count_as_above(backend):
    logits = torch.zeros(3, 700)
    logits[1, [40, 300, 690]] = 2.0
    ids = torch.tensor([5, 300, 7])
    found = token_stats(logits, ids, backend=backend)
    assert found.argmax.tolist() == [0, 40, 0]
    assert found.rank.tolist() == [0, 0, 0]
    top = 3 * math.exp(2) / (3 * math.exp(2) + 697)
    assert found.mass_above.tolist() == pytest.approx([1.0, top, 1.0], rel=1e-6)
    assert found.entropy[0].item() == pytest.approx(math.log(700), rel=1e-6)
    lower = token_stats(logits, torch.tensor([5, 0, 7]), backend=backend)
    assert lower.rank.tolist() == [0, 3, 0]
    assert lower.mass_above.tolist() == pytest.approx([1.0] * 3)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_logits_of_minus_infinity_are_probability_zero(backend):
    logits, ids = case(600, shape=(3,))
    logits[0, ::2] = -math.inf
    logits[1] = -math.inf
    logits[1, 417] = 3.0  # one token is certain
    ids = torch.tensor([2, 417, 5])  # the first is itself impossible
    found = token_stats(logits, ids, backend=backend)
    assert_stats_close(
        TokenStats(*(v[1:] for v in found)), TokenStats(*(v[1:] for v in by_hand(logits, ids)))
    )
    assert found.log_prob[0] == -math.inf
    assert (found.rank[0], found.mass_above[0]) == (300, 1.0)
    assert found.entropy[0].item() == pytest.approx(by_hand(logits, ids).entropy[0].item(), rel=1e-6)
    assert (found.log_prob[1], found.entropy[1], found.confidence[1], found.argmax[1]) == (0, 0, 1, 417)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_nearly_deterministic_rows_keep_their_digits(backend):
    logits = torch.full((1, 1000), -30.0)
    logits[0, 7] = 0.0
    found = token_stats(logits, torch.tensor([7]), backend=backend)
    rest = 999 * math.exp(-30)  # 9.3e-11, far below the spacing of float32 at 1
    assert found.log_prob.item() == pytest.approx(-math.log1p(rest), rel=1e-5)
    assert found.entropy.item() == pytest.approx(math.log1p(rest) + 30 * rest / (1 + rest), rel=1e-5)
    assert logits.log_softmax(-1)[0, 7] == 0  # what is lost otherwise


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_a_logit_just_below_another_ranks_below_it(backend):
    top = torch.tensor(1000.0)
    below = torch.nextafter(top, torch.tensor(0.0))
    logits = torch.stack([below, top, torch.tensor(-1000.0)])
    assert token_stats(logits, torch.tensor(0), backend=backend).rank == 1
    assert token_stats(logits, torch.tensor(1), backend=backend).rank == 0
    assert token_stats(logits, backend=backend).argmax == 1


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_huge_and_lowest_finite_logits(backend):
    logits, ids = case(400, scale=1e4)
    logits[0, 0, 1:] = torch.finfo(torch.float32).min
    found, expected = token_stats(logits, ids, backend=backend), by_hand(logits, ids)
    assert torch.equal(found.rank, expected.rank)
    assert torch.equal(found.argmax, expected.argmax)
    for name in FLOATS:  # log-probabilities of -1e5, entropies of 1e-35
        torch.testing.assert_close(
            getattr(found, name).double(), getattr(expected, name), rtol=2e-6, atol=1e-30
        )


def test_the_vocabulary_of_a_large_model():
    logits, ids = case(151_936, shape=(3,), scale=2.0)
    assert_stats_close(token_stats(logits, ids), by_hand(logits, ids))
    half = logits.bfloat16()
    assert_stats_close(token_stats(half, ids), by_hand(half, ids))


def test_slices_of_positions_and_strided_vocabularies():
    logits, ids = case(300, shape=(3, 6))
    for view, y in ((logits[:, :-1], ids[:, 1:]), (logits[:, ::2], ids[:, ::2])):
        assert not view.is_contiguous()
        assert_stats_close(token_stats(view, y), by_hand(view, y))
    transposed = logits.transpose(1, 2).contiguous().transpose(1, 2)
    assert_stats_close(token_stats(transposed, ids), by_hand(logits, ids))


def test_leading_dimensions_and_chunks_do_not_matter(monkeypatch):
    logits, ids = case(50, shape=(2, 3, 4))
    whole = token_stats(logits, ids)
    assert whole.rank.shape == (2, 3, 4)
    assert token_stats(logits[0, 0, 0], ids[0, 0, 0]).entropy.shape == ()
    monkeypatch.setitem(module.CHUNK_VALUES, "cpu", 51)  # one row at a time
    for a, b in zip(token_stats(logits, ids), whole, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_hidden_states_and_output_matrix_give_the_same(dtype, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 7, 16, generator=generator).to(dtype)
    weight = torch.randn(9000, 16, generator=generator).to(dtype)
    ids = torch.randint(9000, (2, 7), generator=generator)
    monkeypatch.setitem(module.BUFFER_BYTES, "cpu", 3 * 9000 * 4)  # several chunks
    found = token_stats(hidden=hidden, weight=weight, token_ids=ids)
    expected = by_hand(hidden.double() @ weight.double().T, ids)
    assert (found.argmax == expected.argmax).float().mean() >= 0.9
    assert (found.rank - expected.rank).abs().max() <= 1  # float32 products may swap neighbours
    for name in FLOATS:
        assert_close(getattr(found, name), getattr(expected, name), 5e-6)


def test_autocast_does_not_round_the_logits():
    hidden, weight, ids = torch.randn(5, 32), torch.randn(900, 32), torch.randint(900, (5,))
    expected = token_stats(hidden=hidden, weight=weight, token_ids=ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = token_stats(hidden=hidden, weight=weight, token_ids=ids)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_hidden_states_never_hold_all_logits(monkeypatch):
    from benchmarks.harness import peak_bytes

    hidden, weight = torch.randn(512, 8), torch.randn(20_000, 8)
    ids = torch.randint(20_000, (512,))
    monkeypatch.setitem(module.BUFFER_BYTES, "cpu", 2**21)
    peak = peak_bytes(lambda: token_stats(hidden=hidden, weight=weight, token_ids=ids), torch.device("cpu"))
    assert peak < 512 * 20_000 * 4 / 5
    eager = peak_bytes(lambda: (hidden @ weight.T).log_softmax(-1), torch.device("cpu"))
    assert eager >= 2 * 512 * 20_000 * 4  # the meter sees what it should


@pytest.mark.parametrize("with_ids", [True, False])
def test_gradients_by_finite_differences(with_ids):
    logits, ids = case(17, shape=(2, 3), dtype=torch.float64)
    ids = ids if with_ids else None
    hidden = torch.randn(2, 3, 4, dtype=torch.float64)
    weight = torch.randn(17, 4, dtype=torch.float64)

    def floats(stats):
        return [getattr(stats, name) for name in FLOATS]

    assert torch.autograd.gradcheck(lambda x: floats(token_stats(x, ids)), logits.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda h, w: floats(token_stats(hidden=h, weight=w, token_ids=ids)),
        (hidden.requires_grad_(), weight.requires_grad_()),
    )


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_equal_those_of_the_definition(backend, masked):
    logits, ids = case(700)
    if masked:
        logits[..., 600:] = -math.inf
        ids = ids.clamp(max=599)
    weights = torch.randn(4, 2, 5, dtype=torch.float64)
    gradients = []
    for dtype, function in (
        (torch.float32, lambda x: token_stats(x, ids, backend=backend)),
        (torch.float64, lambda x: token_stats_reference(x, ids)),
    ):
        x = logits.clone().to(dtype).requires_grad_()
        stats = function(x)
        values = [w * getattr(stats, n).double() for w, n in zip(weights, FLOATS, strict=True)]
        torch.stack(values).sum().backward()
        gradients.append(x.grad)
    assert_close(gradients[0], gradients[1].nan_to_num(), 2e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give either logits, or hidden and weight; got neither"),
        ({"logits": torch.zeros(2, 3), "weight": torch.zeros(3, 2)}, "got logits and weight"),
        ({"logits": torch.zeros(0, 3)}, r"non-empty floats \[..., V\], got float32 \[0, 3\]"),
        ({"logits": torch.zeros(2, 3, dtype=torch.int64)}, "got int64"),
        ({"logits": torch.zeros(2, 3), "token_ids": torch.tensor([0])}, r"integers \[2\], got int64 \[1\]"),
        ({"logits": torch.zeros(2, 3), "token_ids": torch.tensor([0.0, 1.0])}, "got float32"),
        ({"logits": torch.zeros(2, 3), "token_ids": torch.tensor([0, 3])}, r"lie in 0\.\.2, got 3"),
        ({"logits": torch.zeros(2, 3), "token_ids": torch.tensor([-100, 1])}, r"lie in 0\.\.2, got -100"),
        ({"hidden": torch.zeros(2, 3), "weight": torch.zeros(5, 4)}, r"weight must be \[V, 3\]"),
        ({"hidden": torch.zeros(2, 3), "weight": torch.zeros(5, 3).half()}, "got float16"),
        ({"logits": torch.zeros(2, 3), "backend": "cuda"}, "backend must be one of"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        token_stats(**arguments)


@pytest.mark.parametrize(
    "backend", ["torch", "reference", pytest.param("triton", marks=pytest.mark.interpreter)]
)
@pytest.mark.parametrize("with_ids", [True, False])
@pytest.mark.parametrize("poison", [[math.nan], [math.inf], [-math.inf] * 600])
def test_rows_without_a_softmax_are_refused(backend, with_ids, poison):
    logits, ids = case(600)
    logits[1, 2, : len(poison)] = torch.tensor(poison)
    with pytest.raises(ValueError, match=r"neither nan nor \+inf .* position \[1, 2\]"):
        token_stats(logits, ids if with_ids else None, backend=backend)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n_vocabulary", [1, 63, 500, 32_000, 151_936])
def test_cuda_equals_the_float64_definition_twice(n_vocabulary, dtype):
    for shape in ((3,), (2, 200)):
        logits, ids = case(n_vocabulary, shape=shape, dtype=dtype, device="cuda")
        poison_allocator()
        found = token_stats(logits, ids, backend="triton")
        assert_stats_close(found, by_hand(logits, ids))
        for a, b in zip(found, token_stats(logits, ids, backend="triton"), strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("index", range(6))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cuda_every_configuration(index, dtype, monkeypatch):
    from tokenbook.kernels import _token_stats_triton as kernels

    assert len(kernels.CONFIGS) == 6
    config = kernels.CONFIGS[index]
    forward, backward = kernels.partials, kernels.gradient
    monkeypatch.setattr(kernels, "partials", lambda x, ids: forward(x, ids, config=config))
    monkeypatch.setattr(kernels, "gradient", lambda *arguments: backward(*arguments, config=config))
    logits, ids = case(10_007, dtype=dtype, device="cuda")
    logits.requires_grad_()
    poison_allocator()
    found = token_stats(logits, ids, backend="triton")
    assert_stats_close(found, by_hand(logits.detach(), ids))
    x = logits.detach().double().requires_grad_()
    expected = token_stats_reference(x, ids)
    (found.log_prob + found.entropy + found.mass_above).sum().backward()
    (expected.log_prob + expected.entropy + expected.mass_above).sum().backward()
    assert_close(logits.grad, x.grad)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_from_hidden_states(dtype):
    hidden = torch.randn(300, 64, device="cuda").to(dtype)
    weight = torch.randn(151_936, 64, device="cuda").to(dtype)
    ids = torch.randint(151_936, (300,), device="cuda")
    found = token_stats(hidden=hidden, weight=weight, token_ids=ids)
    expected = by_hand(hidden.double() @ weight.double().T, ids)
    for name in FLOATS:
        assert_close(getattr(found, name), getattr(expected, name), 1e-4)
    assert (found.argmax.cpu() == expected.argmax).float().mean() > 0.99
