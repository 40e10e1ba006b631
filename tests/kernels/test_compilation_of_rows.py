"""token_stats, pair_shift and knockout_attention compile for Hopper: every configuration."""

import pytest
from test_compilation import assert_compiles

from tokenbook.kernels._dispatch import interpreting, triton_problem

pytestmark = pytest.mark.skipif(
    interpreting() or triton_problem() is not None, reason="needs Triton's compiler, not its interpreter"
)
DTYPES = ["*fp32", "*bf16"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_ids", [True, False])
def test_token_stats_forward_compiles(dtype, has_ids):
    from tokenbook.kernels import _token_stats_triton as module

    pointers = {"x_ptr": dtype, "ids_ptr": "*i64", "counts_ptr": "*i32"}
    assert_compiles(module._tuned(module._forward_kernel), pointers, {"HAS_IDS": has_ids})


@pytest.mark.parametrize("dtype", DTYPES)
def test_token_stats_backward_compiles(dtype):
    from tokenbook.kernels import _token_stats_triton as module

    pointers = {"x_ptr": dtype, "out_ptr": dtype, "y_ptr": "*i64", "argmax_ptr": "*i64"}
    assert_compiles(module._tuned(module._backward_kernel), pointers, {})


@pytest.mark.parametrize("dtype", DTYPES)
def test_pair_shift_compiles(dtype):
    from tokenbook.kernels import _pair_shift_triton as module

    assert_compiles(module._tuned(), {"x_ptr": dtype, "y_ptr": dtype}, {})


@pytest.mark.parametrize(("dtype", "width"), [("*fp32", 64), ("*bf16", 64), ("*bf16", 256)])
def test_knockout_attention_compiles(dtype, width):
    from tokenbook.kernels import _knockout_attention_triton as module

    values = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), dtype)
    others = {"groups_ptr": "*i32", "closed_ptr": "*i64", "positions_ptr": "*i32", "scale": "fp32"}
    assert_compiles(module._tuned(dtype == "*fp32"), values | others, {"WIDTH": width, "WIDTH_V": width})
