"""rope_shift and rope_splice: moved keys equal keys encoded at their new positions."""

import math

import pytest
import torch
from kernel_checks import (
    ROUNDING,
    assert_close,
    compiled_ptx,
    guarded,
    poison_allocator,
    poisoned,
    recorded_launches,
    rms_ratio,
)
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as glm_rotary
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as neox_rotary
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rotary

from tokenbook import kernels
from tokenbook.kernels import _rotation, _rotation_triton
from tokenbook.kernels._rotation_triton import rotate_triton
from tokenbook.kernels.rope import rope_shift, rope_shift_reference, rope_splice, rope_splice_reference

LAYOUTS = ("half", "interleaved")
# B, H, S, D, rotary_dim: one of each, odd lengths, partial rotation, a width that is no power of two
SHAPES = [(1, 1, 1, 2, 2), (2, 3, 63, 24, 24), (1, 2, 500, 80, 32), (2, 4, 7, 128, 128), (1, 2, 5, 7, 4)]


def frequencies(rotary_dim: int, theta: float = 10_000.0, device="cpu") -> torch.Tensor:
    return theta ** (-torch.arange(0, rotary_dim, 2, device=device).float() / rotary_dim)


def keys(shape, dtype=torch.float32, device="cpu", seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def deltas(kind: str, batch: int, n: int, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    shape = {"positions": (n,), "rows": (batch, 1), "both": (batch, n), "scalar": ()}.get(kind)
    if shape is None:
        return -4095
    return torch.randint(-9000, 9000, shape, generator=generator).to(device)


def one_pair_at_a_time(k, delta, inv_freq, layout):
    """The formula by hand: Python floats, one pair at a time."""
    out, n_pairs = k.double().clone(), len(inv_freq)
    shifts = torch.as_tensor(delta).expand(k.shape[0], k.shape[2]).tolist()
    for b, h, s in torch.cartesian_prod(*(torch.arange(n) for n in k.shape[:3])).tolist():
        for c in range(n_pairs):
            i, j = (c, c + n_pairs) if layout == "half" else (2 * c, 2 * c + 1)
            z = complex(k[b, h, s, i].item(), k[b, h, s, j].item())
            angle = shifts[b][s] * inv_freq[c].item()
            z *= complex(math.cos(angle), math.sin(angle))
            out[b, h, s, i], out[b, h, s, j] = z.real, z.imag
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["int", "scalar", "positions", "rows", "both"])
def test_reference_and_torch_path_equal_the_formula_by_hand(layout, kind):
    k, inv_freq = keys((2, 2, 5, 10), torch.float64), frequencies(6)
    delta = deltas(kind, 2, 5)
    by_hand = one_pair_at_a_time(k, delta, inv_freq, layout)
    for backend in ("torch", "reference"):
        assert_close(rope_shift(k, delta, inv_freq, layout=layout, backend=backend), by_hand, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_path_equals_the_reference(shape, layout, dtype):
    *shape, rotary_dim = shape
    k, inv_freq = keys(shape, dtype), frequencies(rotary_dim)
    for kind in ("int", "positions", "rows", "both"):
        delta = deltas(kind, shape[0], shape[2])
        expected = rope_shift_reference(k.double(), delta, inv_freq, layout=layout)
        actual = rope_shift(k, delta, inv_freq, layout=layout, rotary_dim=rotary_dim)
        assert actual.dtype == dtype
        assert_close(actual, expected)
        assert torch.equal(actual[..., rotary_dim:], k[..., rotary_dim:])
        in_place = k.clone()
        assert rope_shift(in_place, delta, inv_freq, layout=layout, out=in_place) is in_place
        assert torch.equal(in_place, actual)


def test_blocks_change_nothing(monkeypatch):
    k, inv_freq, delta = keys((2, 3, 100, 16)), frequencies(12), deltas("both", 2, 100)
    whole = rope_shift(k, delta, inv_freq)
    for n_elements in (1, 40, 500, 5000):
        monkeypatch.setattr(_rotation, "BLOCK_ELEMENTS", n_elements)
        assert torch.equal(rope_shift(k, delta, inv_freq), whole)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_keys_and_outputs(layout):
    packed = keys((2, 9, 3, 16)).transpose(1, 2)  # [B, S, H, D] in memory
    inv_freq, out = frequencies(16), poisoned(2, 3, 9, 32)[..., ::2]
    expected = rope_shift_reference(packed.double(), 77, inv_freq, layout=layout)
    assert rope_shift(packed, 77, inv_freq, layout=layout, out=out) is out
    assert_close(out, expected)
    assert_close(rope_shift(packed[:, :, 2:7], 77, inv_freq, layout=layout), expected[:, :, 2:7])


def encoded(k, position_ids, inv_freq, rotary=llama_rotary):
    """Keys rotated for positions by transformers, in float64."""
    angle = position_ids[..., None].double() * inv_freq.double()
    cos, sin = (torch.cat((t, t), -1) for t in (angle.cos(), angle.sin()))
    return rotary(k, k, cos, sin)[1]


@pytest.mark.parametrize(
    ("rotary", "layout", "rotary_dim"),
    [(llama_rotary, "half", 32), (neox_rotary, "half", 8), (glm_rotary, "interleaved", 16)],
)
def test_shifted_keys_equal_keys_encoded_by_transformers_at_the_new_positions(rotary, layout, rotary_dim):
    raw, inv_freq = keys((2, 4, 50, 32), torch.float64), frequencies(rotary_dim, theta=100_000.0) / 4
    old = torch.arange(50).expand(2, 50)
    delta = deltas("both", 2, 50)
    shifted = rope_shift(encoded(raw, old, inv_freq, rotary), delta, inv_freq, layout=layout)
    assert_close(shifted, encoded(raw, old + delta, inv_freq, rotary), 1e-11)
    off_by_one = rope_shift(encoded(raw, old, inv_freq, rotary), delta + 1, inv_freq, layout=layout)
    assert rms_ratio(off_by_one, encoded(raw, old + delta, inv_freq, rotary)) > 0.01


def test_rotations_compose_invert_and_keep_norms():
    k, inv_freq = keys((1, 2, 40, 64)), frequencies(64)
    twice = rope_shift(rope_shift(k, 1000, inv_freq), -37, inv_freq)
    assert_close(twice, rope_shift(k.double(), 963, inv_freq), 3e-7)
    assert_close(rope_shift(rope_shift(k, 12345, inv_freq), -12345, inv_freq), k, 3e-7)
    assert_close(rope_shift(k, 777, inv_freq).norm(dim=-1), k.norm(dim=-1), 3e-7)
    assert torch.equal(rope_shift(k, 0, inv_freq), k)


def test_angles_stay_exact_at_any_distance():
    """A float32 angle at a million tokens would be off by 0.03 rad."""
    k, inv_freq = keys((1, 1, 8, 64)), frequencies(64)
    for delta in (2**20 - 1, -(2**31) + 1, torch.full((8,), 10**6 + 7)):
        assert_close(rope_shift(k, delta, inv_freq), rope_shift_reference(k.double(), delta, inv_freq), 2e-6)


def test_an_empty_suffix_stays_empty():
    k, inv_freq = keys((1, 2, 3, 8)), frequencies(8)
    for backend in ("torch", "reference"):
        assert rope_shift(k[:, :, 3:], 5, inv_freq, backend=backend).shape == (1, 2, 0, 8)
    assert rope_shift(k[:, :, 3:], torch.zeros(0, dtype=torch.int64), inv_freq).shape == (1, 2, 0, 8)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradients(layout, backend):
    k, inv_freq = keys((1, 2, 3, 6), torch.float64).requires_grad_(), frequencies(4)
    for delta in (5, torch.tensor([1, -2, 300])):

        def shift(k, delta=delta):
            return rope_shift(k, delta, inv_freq, layout=layout, backend=backend)

        assert torch.autograd.gradcheck(shift, k)
        assert torch.autograd.gradgradcheck(shift, k)


def test_gradient_refuses_positions_that_changed_since():
    k, delta = keys((1, 1, 3, 4)).requires_grad_(), torch.tensor([1, 2, 3])
    shifted = rope_shift(k, delta, frequencies(4))
    with torch.no_grad():
        rope_shift(k, delta, frequencies(4), out=torch.empty(1, 1, 3, 4))  # allowed without a gradient
    shifted.sum().backward()
    assert_close(k.grad, rope_shift_reference(torch.ones_like(k), -delta, frequencies(4)))


SEGMENTS = [(0, 10, 0), (12, 30, 15), (30, 31, 40), (35, 63, 41), (50, 50, 3)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_splice_equals_gather_rotate_write_and_leaves_the_rest(layout, dtype):
    k, inv_freq = keys((2, 3, 63, 20), dtype), frequencies(16)
    out = poisoned(2, 3, 75, 20, dtype=dtype)
    expected = rope_splice_reference(k.double(), SEGMENTS, inv_freq, out.double(), layout=layout)
    for backend in ("torch", "reference"):
        written = rope_splice(k, SEGMENTS, inv_freq, out.clone(), layout=layout, backend=backend)
        untouched = written.isnan().all(-1).all(0).all(0)
        assert [p for p in range(75) if untouched[p]] == [10, 11, 12, 13, 14, *range(33, 40), *range(69, 75)]
        assert_close(written[:, :, ~untouched], expected[:, :, ~untouched])


def test_splice_of_values_copies_bit_for_bit():
    v, out = keys((1, 2, 63, 20), torch.float16), poisoned(1, 2, 75, 20, dtype=torch.float16)
    rope_splice(v, SEGMENTS, None, out)
    for start, stop, new in SEGMENTS:
        assert torch.equal(out[:, :, new : new + stop - start], v[:, :, start:stop])


def test_splice_equals_single_edits_one_after_the_other():
    raw, inv_freq = keys((1, 2, 40, 16), torch.float64), frequencies(16)
    cache = encoded(raw, torch.arange(40)[None], inv_freq)
    # Delete [5, 8), then put 4 tokens in at 20 (old numbering): the text behind moves by -3, then by +1.
    spliced = rope_splice(
        cache, [(0, 5, 0), (8, 20, 5), (20, 40, 21)], inv_freq, torch.zeros(1, 2, 41, 16).double()
    )
    kept = torch.tensor([*range(5), *range(8, 40)])
    new = torch.tensor([*range(17), *range(21, 41)])
    assert_close(spliced[:, :, new], encoded(raw[:, :, kept], new[None], inv_freq), 1e-12)
    assert torch.equal(spliced[:, :, 17:21], torch.zeros(1, 2, 4, 16).double())


K, W = torch.zeros(2, 1, 4, 8), torch.ones(4)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"k must be \[B, H, S, D\] with B, H, D >= 1, got \[4, 8\]", {"k": K[0, 0]}),
        (r"k must be .*, got \[0, 1, 4, 8\]", {"k": K[:0]}),
        ("k must be a floating tensor .*, got torch.int64", {"k": K.long()}),
        ("delta must be an int or an integer tensor, got float 1.5", {"delta": 1.5}),
        ("delta must be an int or an integer tensor, got bool True", {"delta": True}),
        ("delta must be an int or an integer tensor, got torch.float32", {"delta": torch.ones(4)}),
        (
            r"delta must be \[\], \[4\], \[2, 1\] or \[2, 4\] for k .*, got \[3\]",
            {"delta": torch.ones(3).long()},
        ),
        (r"delta must be within \+-2147483647, got 2147483648", {"delta": 2**31}),
        ("inv_freq must be float32 or float64, got torch.bfloat16", {"inv_freq": W.bfloat16()}),
        (r"inv_freq must be a tensor .*, got \[2, 4\]", {"inv_freq": torch.ones(2, 4)}),
        ("inv_freq must be a tensor .*, got list", {"inv_freq": [1.0]}),
        ("inv_freq rotates 10 channels, but k has 8", {"inv_freq": torch.ones(5)}),
        ("inv_freq must not require a gradient", {"inv_freq": torch.ones(4, requires_grad=True)}),
        ("rotary_dim must be twice inv_freq's length, 8, got 6", {"rotary_dim": 6}),
        ("layout must be one of half, interleaved; got 'neox'", {"layout": "neox"}),
        ("backend must be one of", {"backend": "cuda"}),
        ("backend 'triton' cannot run here: the tensors are not on CUDA", {"backend": "triton"}),
        (r"out must be a tensor \[2, 1, 4, 8\], got \[2, 1, 3, 8\]", {"out": torch.zeros(2, 1, 3, 8)}),
        ("out must have k's dtype torch.float32, got torch.float64", {"out": K.double()}),
        ("out must be k itself or share no memory with it", {"out": torch.zeros(1).expand(2, 1, 4, 8)}),
        ("all tensors must be on one device, got k on cpu, inv_freq on meta", {"inv_freq": W.to("meta")}),
    ],
)
def test_bad_shift_is_refused(message, change, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if "share no memory" in message:
        buffer = torch.zeros(2, 1, 5, 8)
        change = {"k": buffer[:, :, :4], "out": buffer[:, :, 1:]}
    with pytest.raises(ValueError, match=message):
        rope_shift(**({"k": K, "delta": 1, "inv_freq": W} | change))


def test_expanded_output_and_wanted_gradient_are_refused():
    with pytest.raises(ValueError, match="out must not be an expanded tensor"):
        rope_shift(K, 1, W, out=torch.zeros(1).expand(2, 1, 4, 8))
    with pytest.raises(ValueError, match="out cannot be given where a gradient is wanted"):
        rope_shift(K.clone().requires_grad_(), 1, W, out=torch.zeros_like(K))


@pytest.mark.parametrize(
    ("message", "segments"),
    [
        (r"segments must satisfy 0 <= start <= stop <= 4, got \(0, 5, 0\)", [(0, 5, 0)]),
        ("segments must satisfy", [(-1, 2, 0)]),
        ("segments must satisfy", [(3, 2, 0)]),
        (r"segments must end within out's 6 positions, got \(0, 4, 3\)", [(0, 4, 3)]),
        ("segments must end within", [(0, 4, -1)]),
        (r"segments must not overlap in out, got \(2, 4, 0\) and \(0, 2, 1\)", [(0, 2, 1), (2, 4, 0)]),
        ("segments must be .* of ints", [(0, 1.5, 0)]),
        ("segments must be .* of ints", [(0, 1)]),
    ],
)
def test_bad_segments_are_refused(message, segments):
    with pytest.raises(ValueError, match=message):
        rope_splice(K, segments, W, torch.zeros(2, 1, 6, 8))


def test_bad_splice_output_is_refused():
    with pytest.raises(ValueError, match="out overlaps k"):
        rope_splice(K, [(0, 2, 2)], W, K)
    with pytest.raises(ValueError, match=r"out must be a tensor \[2, 1, 6, 8\], got \[2, 3, 6, 8\]"):
        rope_splice(K, [(0, 2, 2)], W, torch.zeros(2, 3, 6, 8))
    with pytest.raises(ValueError, match="out cannot be given where a gradient is wanted"):
        rope_splice(K.clone().requires_grad_(), [(0, 2, 2)], W, torch.zeros(2, 1, 6, 8))


def test_the_record_names_the_backend():
    kernels.forget_backends()
    rope_shift(K, 1, W)
    rope_splice(K, [(0, 2, 2)], W, torch.zeros(2, 1, 6, 8), backend="reference")
    assert kernels.backends_used() == {"rope_shift": "torch", "rope_splice": "reference"}


# ---- Triton: one check, in the interpreter (float32, float16) and on a GPU (every dtype and block shape)

BLOCKS = [None, (1, 1, 1), (4, 2, 4), (16, 8, 4), (32, 3, 8)]


def check_triton(dtype, device, layout, shape, block=None):
    """Out of place and in place, every kind of delta, nothing written outside the buffer."""
    *shape, rotary_dim = shape
    k, inv_freq = keys(shape, dtype, device), frequencies(rotary_dim, device=device)
    for kind in ("int", "positions", "rows", "both"):
        delta = deltas(kind, shape[0], shape[2], device)
        expected = rope_shift_reference(k.double(), delta, inv_freq, layout=layout)
        out, margins_unwritten = guarded(poisoned(*shape, dtype=dtype, device=device))
        rotation = _rotation.Rotation(delta if kind == "int" else _rows(delta, shape), inv_freq, layout)
        rotate_triton(k, rotation, out, block=block)
        assert_close(out, expected)
        margins_unwritten()
        in_place = k.clone()
        rotate_triton(in_place, rotation, in_place, block=block)
        assert torch.equal(in_place, out)


def _rows(delta, shape):
    return delta.reshape(-1 if delta.dim() == 2 else 1, 1 if delta.shape[-1:] == (1,) else shape[2], 1)


@pytest.mark.interpreter
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [SHAPES[0], (2, 3, 37, 20, 12), SHAPES[4]], ids=str)
def test_interpreted_kernel_equals_the_reference(shape, layout):
    for dtype in (torch.float32, torch.float16):
        check_triton(dtype, "cpu", layout, shape, block=(32, 2, 4))


@pytest.mark.interpreter
@pytest.mark.parametrize("block", BLOCKS[:4], ids=str)
def test_interpreted_kernel_in_every_block_shape(block):
    check_triton(torch.float32, "cpu", "half", (2, 3, 5, 12, 8), block)


@pytest.mark.interpreter
def test_interpreted_public_functions_run_triton_with_gradient_strides_and_splice():
    kernels.forget_backends()
    k, inv_freq = keys((2, 9, 3, 16)).transpose(1, 2).requires_grad_(), frequencies(16)
    for delta in (-4095, 1, 16, deltas("both", 2, 9)):
        shifted = rope_shift(k, delta, inv_freq, backend="triton")
        assert_close(shifted, rope_shift_reference(k.double(), delta, inv_freq))
        (grad,) = torch.autograd.grad(shifted.square().sum() / 2, k)
        assert_close(grad, k.detach(), 3e-7)  # the norm is kept, so the gradient of |k'|^2 / 2 is k
    k, out = keys((2, 3, 63, 20)), poisoned(2, 3, 75, 20)
    spliced = rope_splice(k, SEGMENTS, inv_freq, out.clone(), backend="triton")
    plain = rope_splice(k, SEGMENTS, inv_freq, out.clone(), backend="torch")
    assert torch.equal(spliced.isnan(), plain.isnan())
    assert_close(spliced.nan_to_num(), plain.nan_to_num())
    values = rope_splice(k, SEGMENTS, None, out.clone(), backend="triton")
    assert torch.equal(values.nan_to_num(), rope_splice(k, SEGMENTS, None, out.clone()).nan_to_num())
    assert kernels.backends_used()["rope_shift"] == "triton"
    with pytest.raises(ValueError, match="silently wrong"):
        rope_shift(k.bfloat16(), 1, inv_freq, backend="triton")
    with pytest.raises(ValueError, match="k's head width is 1026"):
        rope_shift(torch.ones(1, 1, 1, 1026), 1, inv_freq, backend="triton")


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel_compiles_without_a_gpu(dtype, capability, monkeypatch):
    k, out, inv_freq = keys((2, 3, 9, 20), dtype), poisoned(2, 3, 75, 20, dtype=dtype), frequencies(16)
    kernel, launches = _rotation_triton._kernel(), recorded_launches(monkeypatch, _rotation_triton, "_kernel")
    moves, shifts = torch.zeros(2, 5, dtype=torch.int64), torch.ones(1, 5, 1, dtype=torch.int64)
    rotate_triton(k, _rotation.Rotation(-7, inv_freq, "interleaved"), k)
    rotate_triton(k, _rotation.Rotation(shifts, inv_freq.double()), out, moves)
    rotate_triton(k, None, out, moves)
    assert len(launches) == 3
    for arguments, options in launches:
        assert ".entry" in compiled_ptx(kernel, arguments, options, capability)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_gpu_kernel_equals_the_reference(dtype, layout, block):
    for shape in SHAPES:
        check_triton(dtype, "cuda", layout, shape, block)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_gpu_functions_are_right_on_poisoned_memory_and_twice_the_same(dtype):
    k, inv_freq = keys((2, 4, 500, 80), dtype, "cuda"), frequencies(32, device="cuda")
    results, segments = [], [(0, 100, 0), (130, 500, 105)]
    for _ in range(2):
        poison_allocator()
        kernels.forget_backends()
        shifted = rope_shift(k, -4095, inv_freq)
        spliced = rope_splice(k, segments, inv_freq, poisoned(2, 4, 475, 80, dtype=dtype, device="cuda"))
        assert set(kernels.backends_used().values()) == {"torch" if dtype == torch.float64 else "triton"}
        results.append((shifted, spliced))
    assert_close(shifted, rope_shift_reference(k.double(), -4095, inv_freq))
    expected = rope_shift_reference(k[:, :, 130:].double(), -25, inv_freq)
    assert_close(spliced[:, :, 105:], expected)
    assert spliced[:, :, 100:105].isnan().all()
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(*results, strict=True))


@pytest.mark.gpu
def test_gpu_offsets_beyond_two_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    k = torch.zeros(1, 1, 2**24 + 64, 130, dtype=torch.float16, device="cuda")
    k[..., -64:, :] = keys((1, 1, 64, 130), torch.float16, "cuda")
    inv_freq = frequencies(130, device="cuda")
    expected = rope_shift_reference(k[:, :, -64:].double(), 9, inv_freq)
    assert_close(rope_shift(k, 9, inv_freq, out=k)[:, :, -64:], expected)
