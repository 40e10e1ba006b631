"""Kernels compile for a GPU that is not at hand: Hopper, every autotune configuration, float32 and bfloat16.

The interpreter accepts what the compiler refuses (types that change inside a loop, say), and only a GPU runs
the other tests of compiled kernels. ptxas comes with Triton, so this needs no device.
"""

import pytest

from tokenbook.kernels._dispatch import interpreting, triton_problem

pytestmark = pytest.mark.skipif(
    interpreting() or triton_problem() is not None, reason="needs Triton's compiler, not its interpreter"
)
POINTERS = {"index_ptr": "*i64", "order_ptr": "*i64", "starts_ptr": "*i64", "ends_ptr": "*i64"}
SWITCHES = ("HAS_D", "HAS_Z", "HAS_BIAS", "HAS_DECAY", "SOFTPLUS", "KEEP")


def compile_for_hopper(kernel, configuration, dtypes, constants):
    """Compile one autotuned kernel; pointers are float32 unless `dtypes` says otherwise, numbers int32."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.fn.arg_names
    constants = {name: value for name, value in (constants | configuration.kwargs).items() if name in names}
    signature = {name: "*fp32" if name.endswith("_ptr") else "i32" for name in names}
    signature |= {name: dtype for name, dtype in dtypes.items() if name in names}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        fn=kernel.fn, signature=signature, constexprs={(names.index(k),): v for k, v in constants.items()}
    )
    options = {"num_warps": configuration.num_warps, "num_stages": configuration.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def assert_compiles(kernel, dtypes, constants):
    for configuration in kernel.configs:
        compiled = compile_for_hopper(kernel, configuration, dtypes, constants)
        assert compiled.asm["cubin"]
        assert compiled.metadata.shared <= 227 * 1024, f"{configuration}: more shared memory than there is"


@pytest.mark.parametrize("dtype", ["*fp32", "*bf16"])
@pytest.mark.parametrize("switched_on", [True, False])
@pytest.mark.parametrize("direction", ["_forward_kernel", "_backward_kernel"])
def test_selective_scan_compiles(direction, switched_on, dtype):
    from tokenbook.kernels import selective_scan_triton as module

    inputs = (
        "u",
        "delta",
        "A",
        "B",
        "C",
        "D",
        "z",
        "bias",
        "decay",
        "y",
        "dy",
        "du",
        "ddelta",
        "ddecay",
        "dz",
    )
    constants = dict.fromkeys(SWITCHES, switched_on) | {"N_PAD": 16}
    constants |= {"CHUNK": module.CHUNK, "BLOCK_D": module.BLOCK_D}
    assert_compiles(getattr(module, direction), {f"{name}_ptr": dtype for name in inputs}, constants)


@pytest.mark.parametrize("dtype", ["*fp32", "*bf16"])
@pytest.mark.parametrize("operation", ["segment_mean", "nearest_code"])
def test_search_and_mean_compile(operation, dtype):
    import importlib

    kernel = importlib.import_module(f"tokenbook.kernels.{operation}")._kernel()
    assert_compiles(kernel, POINTERS | {"x_ptr": dtype, "scale": "fp32"}, {})
