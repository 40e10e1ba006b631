"""selective_scan against its definition in float64, transformers' loop and its own identities."""

import pytest
import torch
from kernel_checks import ROUNDING, assert_close, poison_allocator

from tokenbook.kernels import backends_used, forget_backends
from tokenbook.kernels import selective_scan as module
from tokenbook.kernels.selective_scan import LONGEST_CHUNK, selective_scan, selective_scan_reference

OPTIONS = ("D", "z", "delta_bias", "delta_decay")
SHAPES = [
    (1, 1, 1, 1),
    (2, 5, 1, 3),
    (3, 4, LONGEST_CHUNK, 2),
    (1, 7, LONGEST_CHUNK + 1, 16),
    (2, 63, 63, 5),
    (1, 3, 500, 2),
    (2, 40, 21, 11),  # large enough for products by torch.bmm, all others are summed in a loop
]


def arguments(n_rows, width, length, n_states, without=(), dtype=torch.float64, device="cpu", seed=0):
    """Random arguments that all want a gradient; steps of both signs of their softplus' bend."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    made = {
        "u": normal(n_rows, width, length),
        "delta": normal(n_rows, width, length) - 2,
        "A": -3 * normal(width, n_states).abs(),
        "B": normal(n_rows, n_states, length),
        "C": normal(n_rows, n_states, length),
        "D": normal(width),
        "z": normal(n_rows, width, length),
        "delta_bias": normal(width),
        "delta_decay": normal(n_rows, width, length).abs(),
    }
    kept = {name: t.to(device, dtype).requires_grad_() for name, t in made.items() if name not in without}
    return kept | {"delta_softplus": True}


def values_and_gradients(function, given, **options):
    """The output and the gradient of every tensor argument, by name."""
    tensors = {name: t for name, t in given.items() if isinstance(t, torch.Tensor)}
    y = function(**given, **options)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad(y, list(tensors.values()), weight.to(y))
    return {"y": y} | dict(zip(tensors, gradients, strict=True))


def assert_agrees(given, tolerance, **options):
    """The output and every gradient are those of the definition, evaluated on the same (rounded) numbers."""
    actual = values_and_gradients(selective_scan, given, **options)
    exact = {k: t.detach().double().requires_grad_() if isinstance(t, torch.Tensor) else t
             for k, t in given.items()}  # fmt: skip
    expected = values_and_gradients(selective_scan_reference, exact)
    for name, value in actual.items():
        assert value.dtype == (given["u"] if name == "y" else given[name]).dtype
        assert_close(value, expected[name], tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("without", [(), ("delta_decay",), OPTIONS], ids=["all", "own decay", "bare"])
def test_values_and_gradients_are_the_definitions(shape, without):
    assert_agrees(arguments(*shape, without=without), 1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_state_is_float32_whatever_the_dtype(dtype):
    # One rounding of inputs' gradients and outputs; the recurrence itself adds float32 errors only.
    assert_agrees(arguments(2, 8, 300, 4, dtype=dtype), max(2 * ROUNDING[dtype], 2e-6))


@pytest.mark.parametrize("length", [3, 4, 5, 13])
def test_chunks_meet(length, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_VALUES", 1)
    assert module._chunk(10) == 4
    assert_agrees(arguments(2, 6, length, 3), 1e-13)


def test_shapes_take_both_ways_of_summing_over_states():
    products = {width * n_states >= module.SMALL_PRODUCT for _, width, _, n_states in SHAPES}
    assert products == {True, False}


def test_gradcheck(monkeypatch):
    monkeypatch.setattr(module, "LONGEST_CHUNK", 5)
    given = arguments(2, 3, 12, 2)
    names = [name for name, t in given.items() if isinstance(t, torch.Tensor)]

    def function(*tensors):
        return selective_scan(**dict(zip(names, tensors, strict=True)), delta_softplus=True)

    assert torch.autograd.gradcheck(function, [given[name] for name in names])


def test_equals_the_loop_of_transformers():
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    g = arguments(2, 6, 65, 4, without=("delta_decay",), dtype=torch.float32)
    theirs = mamba_selective_scan(
        g["u"], g["delta"], g["A"], g["B"], g["C"], g["D"], g["z"], g["delta_bias"], True
    )
    assert_close(selective_scan(**g), theirs, 1e-6)


BLOCKED = ("A", "D", "delta_bias")  # arguments that blocks of rows have for themselves


def blocks_of_rows(n_blocks, without=(), **options):
    """Arguments for 2 rows in each of several blocks, and those of each block alone."""
    each = [arguments(2, 5, 11, 3, without=without, seed=i, **options) for i in range(n_blocks)]
    names = [name for name, t in each[0].items() if isinstance(t, torch.Tensor)]
    join = {name: torch.stack if name in BLOCKED else torch.cat for name in names}
    joint = {n: join[n]([g[n].detach() for g in each]).requires_grad_() for n in names}
    return joint | {"delta_softplus": True}, each


@pytest.mark.parametrize("without", [(), OPTIONS], ids=["all", "bare"])
def test_blocks_of_rows_have_weights_of_their_own(without):
    joint, each = blocks_of_rows(3, without)
    assert_agrees(joint, 1e-13)
    together = selective_scan(**joint)
    alone = torch.cat([selective_scan(**g) for g in each])
    assert_close(together, alone, 1e-14)


def test_gradcheck_of_blocks(monkeypatch):
    monkeypatch.setattr(module, "LONGEST_CHUNK", 5)
    joint, _ = blocks_of_rows(2)
    names = [name for name, t in joint.items() if isinstance(t, torch.Tensor)]

    def function(*tensors):
        return selective_scan(**dict(zip(names, tensors, strict=True)), delta_softplus=True)

    assert torch.autograd.gradcheck(function, [joint[name] for name in names])


@pytest.mark.parametrize("shared", [(), ("A", "u")], ids=["all mapped", "some shared"])
@pytest.mark.parametrize("inner", [False, True], ids=["rows alike", "blocks of rows"])
def test_vmap_gives_each_model_its_own_scan(inner, shared, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_VALUES", 1)  # several chunks
    models = [blocks_of_rows(2)[0] if inner else arguments(2, 5, 11, 3, seed=i) for i in range(3)]
    names = [name for name, t in models[0].items() if isinstance(t, torch.Tensor)]
    for m in models[1:]:
        m.update({name: models[0][name] for name in shared})
    stacked = {n: models[0][n] if n in shared else torch.stack([m[n] for m in models]) for n in names}
    axes = {n: None if n in shared else 0 for n in names}
    mapped = torch.func.vmap(lambda g: selective_scan(**g, delta_softplus=True), (axes,))(stacked)
    weight = torch.randn(mapped.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    got = torch.autograd.grad(
        (mapped * weight).sum(), [m[n] for m in models for n in names], allow_unused=True
    )
    alone = torch.stack([selective_scan(**m) for m in models])
    assert_close(mapped, alone, 1e-14)
    wanted = torch.autograd.grad((alone * weight).sum(), [m[n] for m in models for n in names])
    for g, w in zip(got, wanted, strict=True):
        assert_close(g, w, 1e-13)


def test_tokens_with_a_gap_decay_as_if_the_missing_ones_had_been_passed():
    g = arguments(2, 4, 40, 3, without=("delta_decay", "z", "delta_bias"))
    g["delta_softplus"] = False
    delta = g["delta"].abs().detach()
    kept = torch.tensor([0, 1, 4, 5, 6, 13, 20, 21, 39])
    silent = torch.zeros(40, dtype=torch.float64)
    silent[kept] = 1
    whole = selective_scan(**g | {"u": g["u"] * silent, "delta": delta})
    passed = torch.nn.functional.pad(delta.cumsum(-1)[:, :, kept], (1, 0)).diff(dim=-1)
    packed = {name: g[name][:, :, kept] for name in ("u", "B", "C")}
    gapped = selective_scan(**g | packed | {"delta": delta[:, :, kept], "delta_decay": passed})
    assert_close(gapped, whole[:, :, kept], 1e-13)


def test_a_decay_step_equal_to_the_step_changes_nothing():
    g = arguments(2, 4, 30, 3, without=("delta_decay", "delta_bias"))
    g["delta_softplus"] = False
    assert torch.equal(selective_scan(**g), selective_scan(**g, delta_decay=g["delta"]))


def test_strided_inputs_give_what_their_contiguous_copies_give():
    g = arguments(2, 6, 21, 3)
    strided = {k: g[k].detach().transpose(0, 2).contiguous().transpose(0, 2) for k in ("u", "B", "z")}
    strided["delta"] = torch.stack([g["delta"].detach()] * 2, dim=-1)[..., 0]
    strided["C"] = g["C"].detach()[:, :, :1].expand(-1, -1, 21)
    copies = {k: t.contiguous() for k, t in strided.items()}
    assert torch.equal(selective_scan(**g | strided), selective_scan(**g | copies))


def test_huge_steps_forget_everything_and_stay_finite():
    g = arguments(1, 4, 50, 3, dtype=torch.float32, without=("delta_decay", "delta_bias"))
    forgets = g | {"delta_decay": torch.full((1, 4, 50), 1e30, requires_grad=True)}
    result = values_and_gradients(selective_scan, forgets)
    assert all(value.isfinite().all() for value in result.values())
    step = torch.nn.functional.softplus(g["delta"])
    alone = (g["B"] * g["C"]).sum(1, keepdim=True) * step * g["u"] + g["D"][:, None] * g["u"]
    assert_close(result["y"], alone * torch.nn.functional.silu(g["z"]), 1e-6)
    large = selective_scan(**g | {"delta": g["delta"].detach() * 1e4})
    assert large.isfinite().all()


@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", *OPTIONS])
def test_nan_is_never_hidden(name):
    g = {
        k: t.detach().clone() if isinstance(t, torch.Tensor) else t for k, t in arguments(2, 3, 9, 2).items()
    }
    g[name][(0,) * g[name].dim()] = torch.nan
    # The very first decay meets an empty state: 0 * NaN.
    assert selective_scan(**g)[0, 0, 0].isnan()


def test_no_gradient_means_the_same_values():
    g = arguments(2, 3, 50, 2)
    with torch.no_grad():
        assert torch.equal(selective_scan(**g), selective_scan(**{**g}).detach())
    assert torch.equal(selective_scan(**g), selective_scan(**g))


def test_autocast_does_not_change_the_scan():
    g = arguments(2, 3, 50, 2, dtype=torch.float32)
    expected = values_and_gradients(selective_scan, g)
    with torch.autocast("cpu", torch.bfloat16):
        actual = values_and_gradients(selective_scan, g)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_only_the_wanted_gradients_are_given():
    g = arguments(2, 3, 9, 2)
    for name in ("delta", "C", "D"):
        g[name] = g[name].detach()
    selective_scan(**g).sum().backward()
    assert g["u"].grad is not None
    assert g["delta"].grad is None


def test_backends_are_recorded():
    forget_backends()
    g = arguments(1, 2, 3, 2)
    selective_scan(**g)
    assert backends_used() == {"selective_scan": "torch"}
    assert_close(selective_scan(**g, backend="reference"), selective_scan(**g), 1e-13)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(3, 4)}, r"u must be \[B, D, L\], got shape \[3, 4\]"),
        ({"u": torch.zeros(2, 3, 0)}, r"u must not be empty, got shape \[2, 3, 0\]"),
        ({"u": [1.0]}, "u must be a tensor, got list"),
        ({"u": torch.zeros(2, 3, 4, dtype=torch.int64)}, "u must be float16.*got torch.int64"),
        ({"delta": torch.zeros(2, 3, 5)}, r"delta must be \[B, D, L\] = \[2, 3, 4\], got \[2, 3, 5\]"),
        ({"A": torch.zeros(2, 3)}, r"A must be \[D, N\] with D = 3 .* got \[2, 3\]"),
        ({"A": torch.zeros(3, 0)}, r"A must be \[D, N\].* N >= 1, got \[3, 0\]"),
        ({"B": torch.zeros(2, 4, 2)}, r"B must be \[B, N, L\] = \[2, 2, 4\], got \[2, 4, 2\]"),
        ({"C": torch.zeros(1, 2, 4)}, r"C must be \[B, N, L\] = \[2, 2, 4\], got \[1, 2, 4\]"),
        ({"D": torch.zeros(4)}, r"D must be \[D\] = \[3\], got \[4\]"),
        ({"z": torch.zeros(2, 4, 3)}, r"z must be \[B, D, L\] = \[2, 3, 4\], got \[2, 4, 3\]"),
        ({"delta_bias": torch.zeros(1, 3)}, r"delta_bias must be \[D\] = \[3\], got \[1, 3\]"),
        ({"delta_decay": torch.zeros(2, 3)}, r"delta_decay must be \[B, D, L\]"),
        ({"delta_decay": 1.5}, "delta_decay must be a tensor, got float"),
        ({"A": torch.zeros(3, 3, 2)}, r"G must divide the 2 rows of u, got \[3, 3, 2\]"),
        ({"A": torch.zeros(2, 3, 2)}, r"D must be \[G, D\] = \[2, 3\], got \[3\]"),
        ({"delta_softplus": 1}, "delta_softplus must be True or False, got 1"),
        ({"backend": "cuda"}, "backend must be one of auto, triton, torch, reference; got 'cuda'"),
        ({"A": torch.zeros(3, 2, device="meta")}, "one device, got .*A on meta"),
    ],
)
def test_bad_input_is_named(change, message):
    given = arguments(2, 3, 4, 2, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        selective_scan(**given | change)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("shape", "without", "dtype"),
    [
        ((2, 35, 18, 3), (), torch.float32),
        ((1, 1, 1, 1), (), torch.float32),
        ((1, 63, 16, 5), ("delta_decay",), torch.float32),
        ((2, 3, 33, 4), OPTIONS, torch.float32),
        ((2, 5, 20, 4), ("z", "delta_bias"), torch.float16),
    ],
)
def test_interpreted_kernels_are_the_definition(shape, without, dtype):
    assert_agrees(arguments(*shape, without, dtype), max(2 * ROUNDING[dtype], 2e-6), backend="triton")


@pytest.mark.interpreter
def test_interpreted_kernels_take_blocks_of_rows():
    joint, _ = blocks_of_rows(2, dtype=torch.float32)
    assert_agrees(joint, 2e-6, backend="triton")


@pytest.mark.interpreter
def test_interpreted_softplus_keeps_the_digits_of_small_steps_and_nan():
    g = arguments(1, 4, 5, 2, ("delta_bias", "D", "delta_decay"), torch.float32)
    g["delta"] = torch.linspace(-20, 30, 20).view(1, 4, 5).requires_grad_()
    assert_agrees(g, 2e-6, backend="triton")
    small = g | {"delta": torch.full((1, 4, 5), -15.0, requires_grad=True)}
    assert_agrees(small, 2e-6, backend="triton")
    lost = g | {"delta": torch.full((1, 4, 5), torch.nan)}
    assert selective_scan(**lost, backend="triton").isnan().all()


@pytest.mark.interpreter
def test_interpreted_kernels_take_strides():
    g = arguments(2, 5, 6, 3, dtype=torch.float32)
    for name in ("u", "delta", "z", "B"):
        channels_last = g[name].detach().transpose(1, 2).contiguous().transpose(1, 2)
        g[name] = channels_last.requires_grad_()
    assert_agrees(g, 2e-6, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 63, 500, 16), (2, 192, 65, 5)])
@pytest.mark.parametrize("without", [(), OPTIONS], ids=["all", "bare"])
def test_gpu_kernels_are_the_definition(shape, without, dtype):
    poison_allocator()
    assert_agrees(arguments(*shape, without, dtype, "cuda"), max(2 * ROUNDING[dtype], 5e-6), backend="triton")


@pytest.mark.gpu
def test_gpu_every_configuration_and_twice_the_same(monkeypatch):
    from tokenbook.kernels import selective_scan_triton as kernels

    given = arguments(3, 63, 100, 16, dtype=torch.float32, device="cuda")
    results = []
    for configuration in kernels.CONFIGS:
        for kernel in (kernels._forward_kernel, kernels._backward_kernel):
            monkeypatch.setattr(kernel, "configs", [configuration])
        poison_allocator()
        assert_agrees(given, 5e-6, backend="triton")
        results += [values_and_gradients(selective_scan, given, backend="triton") for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(results[-1].values(), results[-2].values(), strict=True))
