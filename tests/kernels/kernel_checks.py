"""What the kernel tests measure errors and catch unwritten elements with."""

import math

import torch

# Largest RMS error over RMS of the reference that rounding once to the dtype explains, with room for a few
# float32 operations in between: half a unit in the last place is 2^-9, 2^-12 and 2^-25 of the value.
ROUNDING = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-6, torch.float64: 1e-14}


def rms_ratio(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """RMS of the error over RMS of the reference; inf if `actual` has a NaN or another shape."""
    if actual.shape != expected.shape:
        return math.inf
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    error = (actual - expected).square().mean().sqrt().item()
    scale = expected.square().mean().sqrt().item()
    if math.isnan(error):
        return math.inf
    return error / scale if scale else (0.0 if error == 0 else math.inf)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float | None = None) -> None:
    """Fail unless `rms_ratio` is at most `tolerance`, by default the rounding of `actual`'s dtype."""
    tolerance = ROUNDING[actual.dtype] if tolerance is None else tolerance
    ratio = rms_ratio(actual, expected)
    assert ratio <= tolerance, f"RMS error ratio {ratio:.3g} > {tolerance:.3g}"


def poisoned(*shape: int, dtype=torch.float32, device="cpu") -> torch.Tensor:
    """An output buffer of NaN: an element that a kernel forgets to write stays visible."""
    return torch.full(shape, math.nan, dtype=dtype, device=device)


def poison_allocator(device="cuda", mebibytes: int = 256) -> None:
    """Fill the allocator's free blocks with NaN, so that `torch.empty` inside an operation hands NaN out."""
    blocks = [poisoned(n * 2**18, device=device) for n in (1, 4, mebibytes - 5)]
    small = [poisoned(2**k, device=device) for k in range(4, 18) for _ in range(4)]
    del blocks, small


def guarded(tensor: torch.Tensor, margin: int = 64) -> tuple[torch.Tensor, callable]:
    """A contiguous copy between two NaN margins, and a check that the margins were not written."""
    n = tensor.numel()
    flat = poisoned(n + 2 * margin, dtype=tensor.dtype, device=tensor.device)
    flat[margin : margin + n] = tensor.reshape(-1)

    def check() -> None:
        assert flat[:margin].isnan().all(), "written before the buffer"
        assert flat[margin + n :].isnan().all(), "written behind the buffer"

    return flat[margin : margin + n].view(tensor.shape), check


def recorded_launches(monkeypatch, module, name: str) -> list[tuple[tuple, dict]]:
    """Replace the factory `module.name` of a kernel by one that only records each launch's arguments."""
    launches = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *arguments, **options: launches.append((arguments, options))

    monkeypatch.setattr(module, name, lambda: Recorder())
    return launches


def compiled_ptx(kernel, arguments: tuple, options: dict, capability: int = 90) -> str:
    """Compile a launch for an NVIDIA GPU of this compute capability, which need not be there; the PTX.

    Triton's front end and ptxas find most of what the interpreter lets pass: types, shapes that are no power
    of two, functions that exist on the CPU only.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    given = dict(zip(kernel.arg_names, arguments, strict=False)) | options
    signature, constants = {}, {}
    for parameter in kernel.params:
        value = given[parameter.name]
        is_one = type(value) is int and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or is_one:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TRITON_TYPES[value.dtype]
        else:
            signature[parameter.name] = (
                "fp32" if type(value) is float else "i32" if abs(value) < 2**31 else "i64"
            )
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    target = GPUTarget("cuda", capability, 32)
    warps = {key: options[key] for key in ("num_warps", "num_stages") if key in options}
    return compile(source, target=target, options=warps).asm["ptx"]


TRITON_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.bool: "i1",
}
