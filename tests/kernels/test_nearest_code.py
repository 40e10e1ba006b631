"""nearest_code against every distance in float64: ties, duplicates, cancellation, memory."""

import pytest
import torch
from kernel_checks import assert_close, poison_allocator

from tokenbook.kernels.nearest_code import METRICS, SCORES_PER_BLOCK, nearest_code, nearest_code_reference

SHAPES = [(1, 1, 1), (63, 500, 7), (500, 63, 33), (40, 2, 64), (7, 700, 1), (3, 1, 5)]


def vectors(n, k, d, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, codebook = (torch.randn(m, d, generator=generator, dtype=torch.float64) for m in (n, k))
    return x.to(device, dtype), codebook.to(device, dtype)


def assert_agrees(x, codebook, metric, **options):
    """Every index is that of float64 on the same (rounded) numbers; distances to float32 rounding."""
    actual = nearest_code(x, codebook, metric=metric, **options)
    expected = nearest_code_reference(x.double(), codebook.double(), metric=metric)
    assert actual.index.dtype == torch.int64
    assert torch.equal(actual.index.cpu(), expected.index.cpu())
    assert_close(actual.distance, expected.distance, 1e-14 if x.dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_indices_and_distances_are_the_definitions(shape, dtype, metric):
    assert_agrees(*vectors(*shape, dtype), metric)


@pytest.mark.parametrize("metric", METRICS)
def test_duplicate_codes_give_the_lowest_index(metric):
    x, codebook = vectors(200, 37, 19)
    many = codebook.repeat(5, 1)[torch.randperm(185, generator=torch.Generator().manual_seed(1))]
    assert_agrees(x, many, metric)
    alike = codebook[:1].expand(300, -1)
    assert nearest_code(x, alike, metric=metric).index.eq(0).all()


def test_exact_ties_give_the_lowest_index():
    grid = torch.cartesian_prod(*[torch.arange(-2.0, 3)] * 3)
    halfway = torch.randint(-3, 4, (400, 3), generator=torch.Generator().manual_seed(0)) / 2
    assert_agrees(halfway, grid, "euclidean")
    assert nearest_code(torch.zeros(2, 3), grid[[0, 1, 62, 62]], metric="cosine").index.tolist() == [0, 0]


def test_vectors_far_from_the_origin_find_the_right_code():
    # |c|^2 / 2 - <x, c> alone errs here: at 1e4 its rounding, 8, is a thousand times the squared distances.
    x, codebook = vectors(100, 50, 6)
    x, codebook = x * 0.1 + 1e4, codebook * 0.1 + 1e4
    assert_agrees(x, codebook, "euclidean")


@pytest.mark.parametrize("factor", [1e-38, 1e-20, 1e18, 1e36])
def test_huge_and_tiny_values_find_the_right_code(factor):
    x, codebook = (t * factor for t in vectors(50, 40, 8))
    expected = nearest_code_reference(x.double(), codebook.double())
    assert torch.equal(nearest_code(x, codebook).index, expected.index)
    assert_agrees(x, codebook, "cosine")


def test_zero_vectors_have_cosine_zero_with_everything():
    x, codebook = torch.zeros(1, 2), torch.tensor([[-1.0, 0], [0, 0], [1, 1]])
    assert nearest_code(x, codebook, metric="cosine") == (torch.tensor([0]), torch.tensor([1.0]))
    away = nearest_code(torch.tensor([[1.0, 0]]), codebook[:2], metric="cosine")
    assert away == (torch.tensor([1]), torch.tensor([1.0]))


def test_leading_axes_strides_and_dtypes_mix():
    x, codebook = vectors(60, 21, 6)
    flat = nearest_code(x, codebook)
    shaped = nearest_code(x.view(3, 4, 5, 6), codebook.T.contiguous().T)
    assert torch.equal(shaped.index, flat.index.view(3, 4, 5))
    assert torch.equal(shaped.distance, flat.distance.view(3, 4, 5))
    assert_agrees(x.half(), codebook, "euclidean")


def test_the_distance_matrix_is_never_whole():
    n, k = 20_000, 2_000
    x, codebook = vectors(n, k, 4)
    with torch.profiler.profile(profile_memory=True) as profile:
        nearest_code(x, codebook)
    largest = max(e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
    assert largest <= 16 * SCORES_PER_BLOCK < n * k * 4 / 10


def test_autocast_does_not_blur_the_search():
    x, codebook = vectors(400, 900, 40)
    with torch.autocast("cpu", torch.bfloat16):
        assert_agrees(x, codebook, "euclidean")


def test_no_gradient_flows():
    x, codebook = vectors(5, 4, 3)
    found = nearest_code(x.requires_grad_(), codebook.requires_grad_())
    assert not found.distance.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": [1.0]}, "x must be a tensor, got list"),
        ({"x": torch.zeros(4, 3, dtype=torch.int64)}, "x must be float16.* got torch.int64"),
        ({"x": torch.zeros(0, 3)}, r"x must not be empty or a scalar, got shape \[0, 3\]"),
        ({"x": torch.tensor(1.0)}, r"x must not be empty or a scalar, got shape \[\]"),
        ({"x": torch.full((4, 3), torch.nan)}, "x must be finite, got NaN or infinity"),
        ({"codebook": torch.full((2, 3), torch.inf)}, "codebook must be finite, got NaN or infinity"),
        ({"codebook": torch.zeros(2, 4)}, r"codebook must be \[K, 3\], D from x; got \[2, 4\]"),
        ({"codebook": torch.zeros(3)}, r"codebook must be \[K, 3\], D from x; got \[3\]"),
        ({"codebook": torch.zeros(0, 3)}, r"codebook must not be empty or a scalar, got shape \[0, 3\]"),
        ({"codebook": torch.zeros(2, 3, device="meta")}, "one device, got .*codebook on meta"),
        ({"metric": "manhattan"}, "metric must be one of euclidean, cosine; got 'manhattan'"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        nearest_code(**{"x": torch.zeros(4, 3), "codebook": torch.zeros(2, 3)} | change)


@pytest.mark.interpreter
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES, (63, 200, 40)])
def test_interpreted_kernel_is_the_definition(shape, dtype, metric):
    assert_agrees(*vectors(*shape, dtype), metric, backend="triton")


@pytest.mark.interpreter
def test_interpreted_search_gives_best_and_second_best():
    from tokenbook.kernels import nearest_code as module

    x, codebook = vectors(40, 150, 20)
    offsets = codebook.square().sum(1) / 2
    index, best, second = module._search_triton(x, codebook, offsets, 1.0)
    values, order = (offsets - x @ codebook.T).topk(2, largest=False)
    assert torch.equal(index, order[:, 0])
    assert_close(best, values[:, 0], 1e-6)
    assert_close(second, values[:, 1], 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, (1000, 3000, 96)])
def test_gpu_kernel_is_the_definition(shape, dtype, metric):
    poison_allocator()
    assert_agrees(*vectors(*shape, dtype, "cuda"), metric, backend="triton")


@pytest.mark.gpu
def test_gpu_every_configuration_and_twice_the_same(monkeypatch):
    from tokenbook.kernels.nearest_code import _kernel

    x, codebook = vectors(500, 1000, 63, device="cuda")
    for configuration in list(_kernel().configs):
        monkeypatch.setattr(_kernel(), "configs", [configuration])
        poison_allocator()
        assert_agrees(x, codebook, "euclidean", backend="triton")
        first, second = (nearest_code(x, codebook, backend="triton") for _ in range(2))
        assert torch.equal(first.index, second.index)
        assert torch.equal(first.distance, second.distance)
