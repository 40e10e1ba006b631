"""segment_mean against its definition in float64, and against index_add_."""

import pytest
import torch
from kernel_checks import ROUNDING, assert_close, poison_allocator

from tokenbook.kernels.segment_mean import PART, segment_mean, segment_mean_reference

SHAPES = [((1, 1), 1), ((63, 500), 7), ((500, 63), 63), ((3, 40, 5), 6), ((2, 1, 3), 2), ((1000, 4), 3)]


def rows_and_segments(shape, n_segments, dtype=torch.float64, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) + 3
    segments = torch.randint(n_segments, shape[:-1], generator=generator)
    return x.to(device, dtype).requires_grad_(), segments.to(device)


def assert_agrees(x, segments, n_segments, tolerance, **options):
    mean, count = segment_mean(x, segments, n_segments, empty="zero", **options)
    exact = x.detach().double().requires_grad_()
    expected = segment_mean_reference(exact, segments, n_segments)
    assert mean.dtype == x.dtype
    assert_close(mean, expected, tolerance)
    assert torch.equal(count.sum(-1).cpu(), torch.full(x.shape[:-2], x.shape[-2]))
    weight = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1)).to(mean)
    (dx,) = torch.autograd.grad(mean, x, weight)
    (expected_dx,) = torch.autograd.grad(expected, exact, weight.double())
    assert_close(dx, expected_dx, tolerance)


@pytest.mark.parametrize(("shape", "n_segments"), SHAPES)
@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_means_and_gradients_are_the_definitions(shape, n_segments, dtype):
    assert_agrees(*rows_and_segments(shape, n_segments, dtype), n_segments, ROUNDING[dtype])


def test_gradcheck_and_second_order():
    x, segments = rows_and_segments((2, 9, 3), 4)
    function = lambda x: segment_mean(x, segments, 4, empty="zero").mean  # noqa: E731
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


def test_a_long_segment_keeps_its_digits():
    # 200,000 rows in one running float32 sum are off by about 1e-5; two levels keep close to one rounding.
    x = torch.rand(200_000, 2, generator=torch.Generator().manual_seed(0))
    segments = (torch.arange(200_000) < 3).long()
    mean = segment_mean(x, segments, 2).mean
    assert_close(mean, segment_mean_reference(x.double(), segments, 2), 5e-7)


@pytest.mark.parametrize("n_rows", [PART - 1, PART, PART + 1, 2 * PART, 2 * PART + 1])
def test_every_row_counts_once_around_the_part_length(n_rows):
    x = torch.ones(n_rows + 1, 1)
    segments = torch.tensor([0] * n_rows + [2])
    mean, count = segment_mean(x, segments, 4, empty="zero")
    assert mean.flatten().tolist() == [1, 0, 1, 0]
    assert count.tolist() == [n_rows, 0, 1, 0]


def test_empty_segments_are_what_was_asked_for():
    x, segments = torch.ones(3, 2), torch.tensor([0, 3, 3])
    assert segment_mean(x, segments, 4, empty="zero").mean[1:3].eq(0).all()
    assert segment_mean(x, segments, 4, empty="nan").mean[1:3].isnan().all()
    with pytest.raises(ValueError, match=r"got none for segment 1$"):
        segment_mean(x, segments, 4)
    with pytest.raises(ValueError, match="got none for segment 0 of batch row 1"):
        segment_mean(torch.ones(2, 2, 1), torch.tensor([[0, 1], [1, 1]]), 2)


def test_strides_and_int32_segments_change_nothing():
    x, segments = rows_and_segments((2, 30, 6), 5)
    x = x.detach()
    strided = x.transpose(0, 2).contiguous().transpose(0, 2)
    expected = segment_mean(x, segments, 5, empty="zero").mean
    assert torch.equal(segment_mean(strided, segments.int(), 5, empty="zero").mean, expected)


def test_nan_and_huge_values_stay_in_their_segment():
    x = torch.tensor([[torch.nan], [1e38], [-1e38], [2.0]])
    mean = segment_mean(x, torch.tensor([0, 1, 1, 2]), 3).mean.flatten()
    assert mean[0].isnan()
    assert mean[1:].tolist() == [0, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": [1.0]}, "x must be a tensor, got list"),
        ({"x": torch.zeros(4)}, r"x must be \[N, D\] or \[B, N, D\] and not empty, got shape \[4\]"),
        ({"x": torch.zeros(0, 3)}, r"x must be .* not empty, got shape \[0, 3\]"),
        ({"x": torch.zeros(4, 3, dtype=torch.int64)}, "x must be float16.* got torch.int64"),
        ({"segments": torch.zeros(3, dtype=torch.int64)}, r"segments must be \[4\], x without D; got \[3\]"),
        ({"segments": torch.zeros(4)}, "segments must be int32 or int64, got torch.float32"),
        ({"segments": torch.tensor([0, -1, 0, 1])}, r"segments must be 0\.\.1, got -1"),
        ({"segments": torch.tensor([0, 1, 0, 2])}, r"segments must be 0\.\.1, got 2"),
        (
            {"segments": torch.zeros(4, dtype=torch.int64, device="meta")},
            "one device, got .*segments on meta",
        ),
        ({"n_segments": 0}, "n_segments must be an integer of at least 1, got 0"),
        ({"n_segments": 2.0}, "n_segments must be an integer of at least 1, got 2.0"),
        ({"empty": "skip"}, "empty must be one of raise, zero, nan; got 'skip'"),
    ],
)
def test_bad_input_is_named(change, message):
    given = {"x": torch.zeros(4, 3), "segments": torch.tensor([0, 1, 0, 1]), "n_segments": 2}
    with pytest.raises(ValueError, match=message):
        segment_mean(**given | change)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("shape", "n_segments"), [((1, 1), 1), ((63, 150), 7), ((2, 40, 5), 6), ((600, 3), 2)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_interpreted_kernel_is_the_definition(shape, n_segments, dtype):
    assert_agrees(*rows_and_segments(shape, n_segments, dtype), n_segments, ROUNDING[dtype], backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "n_segments"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gpu_kernel_is_the_definition(shape, n_segments, dtype):
    poison_allocator()
    x, segments = rows_and_segments(shape, n_segments, dtype, "cuda")
    assert_agrees(x, segments, n_segments, ROUNDING[dtype], backend="triton")


@pytest.mark.gpu
def test_gpu_every_configuration_and_twice_the_same(monkeypatch):
    from tokenbook.kernels.segment_mean import _kernel

    x, segments = rows_and_segments((5000, 300), 9, torch.float32, "cuda")
    for configuration in list(_kernel().configs):
        monkeypatch.setattr(_kernel(), "configs", [configuration])
        poison_allocator()
        assert_agrees(x, segments, 9, 2e-6, backend="triton")
        first, second = (segment_mean(x, segments, 9, backend="triton").mean for _ in range(2))
        assert torch.equal(first, second)
