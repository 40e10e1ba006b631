"""rope_nd: scores depend on coordinate differences alone; equal to the papers' own forms."""

import pytest
import torch
from kernel_checks import ROUNDING, assert_close, compiled_ptx, poison_allocator, recorded_launches, rms_ratio

from tokenbook.kernels import _rotation, _rotation_triton
from tokenbook.kernels._rotation_triton import rotate_triton
from tokenbook.kernels.rope import rope_shift
from tokenbook.kernels.rope_nd import axis_frequencies, rope_nd, rope_nd_reference

LAYOUTS = ("half", "interleaved")


def tensors(heads=3, kv_heads=1, n_tokens=35, width=24, dtype=torch.float32, device="cpu", batch=2):
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, heads, n_tokens, width), (batch, kv_heads, n_tokens, width)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in shapes]


def coordinates(n_axes, shape=(35,), dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(*shape, n_axes, generator=generator, dtype=torch.float64) * 1536).to(device, dtype)


def complex_form(x, positions, theta, resolution):
    """Adjacent channels as complex numbers times e^{i t}; pairs axis after axis, the rest times 1."""
    width, n_axes = x.shape[-1], positions.shape[-1]
    per_axis = width // 2 // n_axes
    powers = theta ** (-torch.arange(per_axis).double() / per_axis)
    angles = [positions[..., a, None].double() / resolution * powers for a in range(n_axes)]
    angles.append(torch.zeros(*positions.shape[:-1], width // 2 - per_axis * n_axes).double())
    phase = torch.polar(torch.ones(()).double(), torch.cat(angles, -1))
    phase = phase if phase.dim() == 2 else phase.unsqueeze(1)
    return torch.view_as_real(torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * phase).flatten(-2)


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize(("n_axes", "width"), [(1, 24), (2, 24), (3, 24), (3, 64), (5, 22)])
def test_interleaved_equals_the_complex_form(n_axes, width, dtype):
    q, k = tensors(width=width, dtype=dtype)
    for shape in ((35,), (2, 35)):
        positions = coordinates(n_axes, shape)
        rotated = rope_nd(q, k, positions, 100.0, resolution=0.5)
        for x, y in zip((q, k), rotated, strict=True):
            assert y.dtype == dtype
            assert_close(y, complex_form(x, positions, 100.0, 0.5), max(ROUNDING[dtype], 1e-12))


def test_half_layout_is_the_interleaved_one_with_channels_permuted():
    q, k = tensors(width=64)
    order = torch.cat((torch.arange(0, 64, 2), torch.arange(1, 64, 2)))  # (2c, 2c + 1) -> (c, c + 32)
    positions = coordinates(3)
    interleaved = rope_nd(q, k, positions)
    half = rope_nd(q[..., order], k[..., order], positions, layout="half")
    for a, b in zip(interleaved, half, strict=True):
        assert_close(b, a[..., order], 1e-7)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_torch_path_equals_the_reference_and_one_axis_equals_rope_shift(layout):
    q, k = tensors()
    positions = torch.arange(-17, 18)[:, None] * 100
    rotated = rope_nd(q, k, positions, layout=layout)
    reference = rope_nd_reference(q.double(), k.double(), positions, layout=layout)
    inv_freq = 10_000.0 ** (-torch.arange(0, 24, 2).double() / 24)
    for x, y, expected in zip((q, k), rotated, reference, strict=True):
        assert_close(y, expected)
        assert_close(rope_shift(x, positions[:, 0], inv_freq, layout=layout), expected)


def test_scores_depend_on_coordinate_differences_only():
    q, k = tensors(kv_heads=3, width=30, dtype=torch.float64)
    positions, offset = coordinates(3), torch.tensor([100.0, -3.5, 0.25], dtype=torch.float64)

    def scores(positions):
        a, b = rope_nd(q, k, positions)
        return a @ b.mT

    assert_close(scores(positions + offset), scores(positions), 1e-10)
    assert rms_ratio(scores(positions * 1.01), scores(positions)) > 0.01


def test_normalised_coordinates_give_one_place_one_phase_at_every_scale():
    """The corners and the centre of a 3 x 3 and a 9 x 9 grid, both on [0, 64]."""

    def phase(side, row, column):
        x = torch.tensor([1.0, 0.0]).repeat(12).view(1, 1, 1, 24)
        return rope_nd(x, x, torch.tensor([[column, row]]) / (side - 1) * 64)[0]

    for u in (0, 1, 2):
        for v in (0, 1, 2):
            assert torch.equal(phase(3, u, v), phase(9, 4 * u, 4 * v))
    assert not torch.allclose(phase(3, 0, 1), phase(3, 1, 0), atol=0.1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients(layout):
    q, k = (x.requires_grad_() for x in tensors(2, 1, 3, 8, torch.float64, batch=1))
    for positions in (coordinates(3, (3,)), torch.tensor([[200], [7], [0]], dtype=torch.uint8)):
        assert torch.autograd.gradcheck(lambda q, k, p=positions: rope_nd(q, k, p, layout=layout), (q, k))
        shifted = positions.double().requires_grad_()
        assert torch.autograd.gradcheck(
            lambda q, k, p: rope_nd_reference(q, k, p / 100, layout=layout), (q, k, shifted)
        )


def test_no_tokens_give_no_tokens():
    q, k = tensors(n_tokens=0)
    assert [x.shape[2] for x in rope_nd(q, k, torch.zeros(0, 3))] == [0, 0]


Q, K = tensors(2, 1, 4, 8)
P = torch.zeros(4, 2)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"q must be \[B, H, S, D\]", {"q": Q[0]}),
        (r"k must be \[2, H_kv, 4, 8\] torch.float32 like q, got \[2, 1, 3, 8\]", {"k": K[:, :, :3]}),
        ("k must be .* like q, got .* torch.float64", {"k": K.double()}),
        (r"positions must be \[4, n\] or \[2, 4, n\] for q .*, got \[3, 2\]", {"positions": P[:3]}),
        (r"positions must be \[4, n\] .*, got \[4\]", {"positions": P[:, 0]}),
        (r"positions must be \[4, n\] .*, got \[1, 4, 2\]", {"positions": P[None]}),
        (r"positions must be \[4, n\] .*, got \[4, 0\]", {"positions": P[:, :0]}),
        ("positions must be integer, float32 or float64, got torch.bfloat16", {"positions": P.bfloat16()}),
        ("positions must be .*, got torch.bool", {"positions": P.bool()}),
        ("positions must be .*, got list", {"positions": [[0, 0]] * 4}),
        ("positions must not require a gradient", {"positions": P.clone().requires_grad_()}),
        ("head width D must be even and at least 10 for 5 axes, got 8", {"positions": torch.zeros(4, 5)}),
        ("theta must be positive, got 0", {"theta": 0}),
        ("theta must be positive, got nan", {"theta": float("nan")}),
        ("resolution must be positive, got -1.0", {"resolution": -1.0}),
        ("layout must be one of half, interleaved; got 'axial'", {"layout": "axial"}),
        ("all tensors must be on one device", {"positions": P.to("meta")}),
    ],
)
def test_bad_input_is_refused(message, change):
    with pytest.raises(ValueError, match=message):
        rope_nd(**({"q": Q, "k": K, "positions": P} | change))


def test_frequencies_of_the_papers():
    two = axis_frequencies(64, 2, 10_000.0)  # f_m = theta^(-4 m / D)
    assert torch.allclose(two, (10_000.0 ** (-4 * torch.arange(16).double() / 64)).repeat(2))
    three = axis_frequencies(64, 3)  # 10 pairs an axis, 2 left over
    assert torch.allclose(three[:30], (10_000.0 ** (-torch.arange(10).double() / 10)).repeat(3))
    assert three[30:].tolist() == [0, 0]


def check_triton(dtype, device):
    for layout in LAYOUTS:
        for n_axes, width in ((2, 24), (3, 22), (3, 64)):
            q, k = tensors(n_tokens=9, width=width, dtype=dtype, device=device)
            for positions in (
                coordinates(n_axes, (9,), torch.float32, device),
                coordinates(n_axes, (2, 9), device=device),
            ):
                rotated = rope_nd(q, k, positions, layout=layout, backend="triton")
                expected = rope_nd_reference(q.double(), k.double(), positions, layout=layout)
                for a, b in zip(rotated, expected, strict=True):
                    assert_close(a, b)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_interpreted_kernel_equals_the_reference(dtype):
    check_triton(dtype, "cpu")


@pytest.mark.interpreter
def test_interpreted_gradient_is_the_inverse_rotation():
    q, k = (x.requires_grad_() for x in tensors(n_tokens=5))
    rotated = rope_nd(q, k, coordinates(3, (5,)), backend="triton")
    for x, grad in zip(
        (q, k), torch.autograd.grad([y.square().sum() / 2 for y in rotated], (q, k)), strict=True
    ):
        assert_close(grad, x.detach(), 3e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_kernel_compiles_without_a_gpu(dtype, monkeypatch):
    kernel, launches = _rotation_triton._kernel(), recorded_launches(monkeypatch, _rotation_triton, "_kernel")
    rotation = _rotation.Rotation(
        torch.zeros(1, 35, 3, dtype=dtype), axis_frequencies(24, 3), "interleaved", 4
    )
    rotate_triton(Q.new_zeros(2, 3, 35, 24).bfloat16(), rotation, Q.new_zeros(2, 3, 35, 24).bfloat16())
    assert ".entry" in compiled_ptx(kernel, *launches[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gpu_kernel_equals_the_reference_twice_on_poisoned_memory(dtype):
    poison_allocator()
    check_triton(dtype, "cuda")
    q, k = tensors(8, 2, 500, 64, dtype, "cuda")
    positions = coordinates(3, (500,), device="cuda")
    first, second = rope_nd(q, k, positions), rope_nd(q, k, positions)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
