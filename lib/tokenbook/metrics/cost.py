"""What a computation costs: floating-point operations and seconds."""

import math
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch


class Timing(NamedTuple):
    """Seconds per call over repeats: the median, the quartiles `low` and `high`, and every repeat."""

    median: float
    low: float
    high: float
    seconds: tuple[float, ...]


def count_flops(function: Callable, *args, **kwargs) -> int:
    """Floating-point operations of the matrix products, convolutions and attention inside one call.

    A multiply and an add are two operations. Counted by torch's own counter through the dispatcher, forward
    and backward, plus what it lacks: scaled_dot_product_attention's kernel on the CPU (torch 2.13 counts it
    as 0), products with vectors, and the products with states inside `selective_scan`. Attention counts the
    full rectangle of scores, whatever the mask, on every device alike. Element-wise work, normalisation,
    softmax and custom Triton kernels count as 0, and so does compiled code. `function` is called once.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton where that is installed

    with FlopCounterMode(display=False, custom_mapping=_missing_formulas()) as counter:
        function(*args, **kwargs)
    return counter.get_total_flops()


def time_call(
    function: Callable[[], object], repeats: int = 20, warmup: int = 3, device: str | torch.device = "cpu"
) -> Timing:
    """Seconds of one call: median and quartiles over `repeats` calls, after `warmup` calls that do not count.

    Args:
        function: called without arguments.
        repeats: at least 1.
        warmup: calls before the first that counts (compilation, caches, memory pools).
        device: where `function` computes; a CUDA device is synchronised before each reading of the clock.

    Raises ValueError for repeats below 1 or a negative warmup.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats must be at least 1 and warmup at least 0, got {repeats} and {warmup}")
    device = torch.device(device)
    for _ in range(warmup):
        function()
    seconds = []
    for _ in range(repeats):
        _synchronise(device)
        start = time.perf_counter()
        function()
        _synchronise(device)
        seconds.append(time.perf_counter() - start)
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive") if repeats > 1 else seconds * 3
    return Timing(median, low, high, tuple(seconds))


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _missing_formulas() -> dict:
    aten, own = torch.ops.aten, torch.ops.tokenbook
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
        aten.mv: lambda matrix, vector, **_: 2 * matrix[0] * matrix[1],
        aten.addmv: lambda bias, matrix, vector, **_: 2 * matrix[0] * matrix[1],
        aten.dot: lambda a, b, **_: 2 * a[0],
    }
    if hasattr(own, "sum_over_few_states"):  # there once selective_scan is imported
        formulas[own.sum_over_few_states] = lambda weights, states, *_, **__: 2 * math.prod(states)
    return formulas


def _attention_flops(query, key, value, *_, **__) -> int:
    batch, n_heads, n_queries, width = query  # shapes; keys may have fewer heads (grouped queries)
    return 2 * batch * n_heads * n_queries * key[-2] * (width + value[-1])


def _attention_backward_flops(grad_out, query, key, value, *_, **__) -> int:
    from torch.utils.flop_counter import sdpa_backward_flop_count

    n_heads = query[1]
    repeated = [(shape[0], n_heads, *shape[2:]) for shape in (key, value)]
    return sdpa_backward_flop_count(grad_out, query, *repeated)
