"""pair_shift against float64 formulas written out here, on both back ends."""

import math

import pytest
import torch
from kernel_checks import assert_close, poison_allocator

from tokenbook.kernels import token_stats as module
from tokenbook.kernels.pair_shift import pair_shift

BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.interpreter)]


def case(n_vocabulary, seed=0, shape=(2, 3), distance=1.0, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(*shape, n_vocabulary, generator=g)
    y = x + distance * torch.randn(*shape, n_vocabulary, generator=g)
    return (
        x.to(device, dtype),
        y.to(device, dtype),
        torch.randint(n_vocabulary, shape, generator=g).to(device),
    )


def assert_right(found, x, y, ids, tolerance=3e-6):
    x, y, ids = x.double().cpu(), y.double().cpu(), ids.cpu()
    log_p, log_q = x.log_softmax(-1), y.log_softmax(-1)
    assert_close(found.kl.cpu(), (log_p.exp() * (log_p - log_q)).sum(-1), tolerance)
    for logits, log_prob, rank, argmax, chosen in (
        (x, found.log_prob_p, found.rank_p, found.argmax_p, log_p),
        (y, found.log_prob_q, found.rank_q, found.argmax_q, log_q),
    ):
        assert_close(log_prob.cpu(), chosen.gather(-1, ids[..., None]).squeeze(-1), tolerance)
        assert torch.equal(rank.cpu(), (logits > logits.gather(-1, ids[..., None])).sum(-1))
        assert torch.equal(argmax.cpu(), logits.argmax(-1))


@pytest.mark.parametrize("n_vocabulary", [1, 2, 63, 500, 1031])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_equals_the_float64_definition(n_vocabulary, backend):
    x, y, ids = case(n_vocabulary)
    found = pair_shift(x, y, ids, backend=backend)
    if n_vocabulary == 1:
        assert found.kl.abs().max() == 0
    else:
        assert_right(found, x, y, ids)


@pytest.mark.interpreter
def test_triton_in_float16_and_in_parts(monkeypatch):
    from tokenbook.kernels import _pair_shift_triton as kernels

    x, y, ids = case(700, dtype=torch.float16)
    assert_right(pair_shift(x, y, ids, backend="triton"), x, y, ids)
    whole = kernels.divergence
    monkeypatch.setattr(kernels, "divergence", lambda *arguments: whole(*arguments, n_splits=5))
    assert_right(pair_shift(x, y, ids, backend="triton"), x, y, ids)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("distance", [1e-2, 1e-4])
def test_divergence_of_models_that_agree_keeps_its_digits(backend, distance):
    x, y, ids = case(2000, distance=distance)
    found = pair_shift(x, y, ids, backend=backend).kl.double()
    log_p, log_q = x.double().log_softmax(-1), y.double().log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)  # about distance^2 / 2: 5e-5 and 5e-9 nats
    assert expected.max() < 2 * distance**2
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-12)
    naive = (x.log_softmax(-1).exp() * (x.log_softmax(-1) - y.log_softmax(-1))).sum(-1).double()
    if distance == 1e-4:
        assert ((naive - expected).abs() / expected).max() > 0.5  # what the plain sum in float32 makes of it


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_models_are_at_distance_zero(backend):
    x, _, ids = case(900)
    assert pair_shift(x, x + 5, ids, backend=backend).kl.max() < 1e-11  # all logits shifted
    assert pair_shift(x, x, ids, backend=backend).kl.max() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_impossible_tokens(backend):
    x = torch.tensor(
        [[0.0, 0.0, -math.inf], [0.0, -math.inf, 0.0], [0.0, -200.0, 0.0], [0.0, -math.inf, 0.0]]
    )
    y = torch.tensor([[0.0, 0.0, 0.0], [0.0, -math.inf, 0.0], [0.0, -math.inf, 0.0], [0.0, 300.0, 0.0]])
    found = pair_shift(x, y, torch.tensor([2, 0, 1, 0]), backend=backend)
    expected = [math.log(1.5), 0.0, math.inf, 300 - math.log(2)]
    assert found.kl.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-7)
    assert found.log_prob_p[0] == -math.inf
    assert found.rank_p.tolist() == [2, 0, 2, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_token_defaults_to_what_p_would_write(backend):
    x, y, _ = case(400)
    found = pair_shift(x, y, backend=backend)
    named = pair_shift(x, y, x.argmax(-1), backend=backend)
    assert found.rank_p.max() == 0
    assert torch.equal(found.rank_q, named.rank_q)
    torch.testing.assert_close(found.log_prob_q, named.log_prob_q)


def test_the_vocabulary_of_a_large_model_and_strided_slices():
    x, y, ids = case(151_936, shape=(1, 3), distance=0.3)
    assert_right(pair_shift(x[:, :-1], y[:, :-1], ids[:, 1:]), x[:, :-1], y[:, :-1], ids[:, 1:])


def test_chunks_leading_dimensions_and_float64(monkeypatch):
    x, y, ids = case(50, shape=(2, 2, 3), dtype=torch.float64)
    whole = pair_shift(x, y, ids)
    assert whole.kl.dtype == torch.float64
    assert_right(whole, x, y, ids, 1e-12)
    monkeypatch.setitem(module.CHUNK_VALUES, "cpu", 51)
    for a, b in zip(pair_shift(x, y, ids), whole, strict=True):
        torch.testing.assert_close(a, b)
    assert not pair_shift(x.clone().requires_grad_(), y).kl.requires_grad


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3), torch.zeros(2, 4)), r"must have one shape, got \[2, 3\] and \[2, 4\]"),
        ((torch.zeros(0, 3), torch.zeros(0, 3)), "p_logits must be non-empty"),
        ((torch.zeros(2, 3), torch.zeros(2, 3).long()), "q_logits must be non-empty floats"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, 3])), r"lie in 0\.\.2, got 3"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0])), r"integers \[2\]"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        pair_shift(*arguments)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["p_logits", "q_logits"])
def test_rows_without_a_softmax_are_refused(backend, poison, name):
    x, y, ids = case(60)
    row = (x if name == "p_logits" else y)[1, 2]
    row[slice(None) if poison == -math.inf else 4] = poison
    with pytest.raises(ValueError, match=rf"{name} must hold neither nan .* position \[1, 2\]"):
        pair_shift(x, y, ids, backend=backend)


@pytest.mark.gpu
@pytest.mark.parametrize("index", range(6))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cuda_every_configuration_twice(index, dtype, monkeypatch):
    from tokenbook.kernels import _pair_shift_triton as kernels

    assert len(kernels.CONFIGS) == 6
    whole, config = kernels.divergence, kernels.CONFIGS[index]
    monkeypatch.setattr(kernels, "divergence", lambda *arguments: whole(*arguments, config=config))
    for n_vocabulary, shape in ((63, (2, 3)), (151_936, (3,)), (10_007, (2, 300))):
        x, y, ids = case(n_vocabulary, shape=shape, dtype=dtype, device="cuda")
        poison_allocator()
        found = pair_shift(x, y, ids, backend="triton")
        assert_right(found, x, y, ids)
        for a, b in zip(found, pair_shift(x, y, ids, backend="triton"), strict=True):
            assert torch.equal(a, b)
